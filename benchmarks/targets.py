"""What the numbers should be, and whether they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: A warm transfer against reading the adapter and writing an output.
WARM = 2.0
#: An SVD against ``decompose``, per shape class: thin, and full as torch.linalg.svd's default.
WIDE, SQUARE = 10.0, 2.0
#: Of any transfer, in MB.
PEAK = 2000.0


@dataclass(frozen=True)
class Target:
    """One target: what was asked, what was measured, and whether that is enough."""

    name: str
    asked: str
    measured: str
    met: bool


def shape_class(shape: list[int]) -> str:
    """ "square", "wide" or "tall" (one side at least twice the other), or "oblong" (between)."""
    rows, columns = shape
    if rows == columns:
        return "square"
    if max(shape) < 2 * min(shape):
        return "oblong"
    return "wide" if columns > rows else "tall"


def judge(found: dict[str, Any]) -> list[Target]:
    """Hold the results of :mod:`benchmarks.transfer_sdxl` against the targets.

    Per shape class the slowest shape counts, not the mean.
    """
    targets = []
    for key, floor in (("warm_to_floor", "floor"), ("warm_to_floor_with_three_hashes", "3 hashes")):
        for name, ratio in found.get(key, {}).items():
            label = f"{name}, against the floor" + (f" with {floor}" if floor != "floor" else "")
            targets.append(Target(label, f"≤ {WARM:g} ×", f"{ratio:.2f} ×", ratio <= WARM))
    for kind, limit in (("wide", WIDE), ("tall", WIDE), ("square", SQUARE)):
        for key, word in (("ratio", "thin"), ("ratio_default", "full")):
            ratios = [r[key] for r in found["svd"]["shapes"] if r["class"] == kind]
            if ratios:
                name = f"decompose against {word} SVD, {kind} weights (worst shape)"
                slowest = min(ratios)
                targets.append(Target(name, f"≥ {limit:g} ×", f"{slowest:.1f} ×", slowest >= limit))
    peaks = {k: v["peak_mb"] for k, v in found["runs"].items() if k != "floor"}
    worst = max(peaks, key=lambda k: peaks[k])
    name, measured = f"peak memory (worst: {worst})", f"{peaks[worst]:.0f} MB"
    targets.append(Target(name, f"< {PEAK:g} MB", measured, peaks[worst] < PEAK))
    return targets
