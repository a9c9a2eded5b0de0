"""How an adapter's energy lies along its singular directions, for each kind of layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch

from regraft.adapters.algebra import rank_for_energy
from regraft.adapters.families import Module, get_family
from regraft.adapters.update import Layout, Update
from regraft.dialects.kinds import kind_of_name
from regraft.dialects.shapes import weight_shape
from regraft.dialects.source import AdapterSource
from regraft.errors import RegraftError
from regraft.parallel import in_order, single_threaded

#: Numbers of directions whose share of the energy is given.
_FIRST = (1, 2, 4, 8, 16, 32, 64)


@single_threaded()
def spectrum(source: AdapterSource, scales: dict[str, float], damaged: Iterable[str]) -> Any:
    """The singular values of every update that needs no base, by kind of layer.

    Parameters
    ----------
    source : AdapterSource
    scales : dict of module to float
        alpha / rank.
    damaged : iterable of str
        Modules with NaN or infinity; they are left out.

    Returns
    -------
    dict
        ``kinds``: kind of layer → sites, energy ‖ΔW‖² (sum), effective_rank (median of the
        exponential of the entropy of σ / Σσ; Roy and Vetterli 2007), rank_for_90 and rank_for_99
        (median and largest over the sites, of the smallest rank that keeps this share of the
        energy), share (mean share of the energy in the first k directions). ``left_out``: reason →
        number of modules.
    """
    bad = set(damaged)
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    left_out: Counter[str] = Counter({"NaN or infinity": len(bad)} if bad else {})

    def one(name: str) -> torch.Tensor | str:
        try:
            update = _update(source, name, scales.get(name, 1.0))
            return update if isinstance(update, str) else update.spectrum().s
        except RegraftError as error:
            return error.what
        except (RuntimeError, ValueError) as error:  # a decomposition that fails
            return str(error).splitlines()[0][:100]

    names = [name for name in source.modules if name not in bad]
    for name, s in zip(names, in_order(one, names), strict=True):
        if isinstance(s, str):
            left_out[s] += 1
        elif not torch.isfinite(s).all():
            left_out["beyond what fp32 can hold"] += 1
        elif s.numel() and float(s[0]) > 0:
            found[kind_of_name(name)].append(s)
        else:
            left_out["zero"] += 1
    return {
        "kinds": {kind: _summary(values) for kind, values in sorted(found.items())},
        "left_out": dict(left_out),
    }


def _update(source: AdapterSource, name: str, scale: float) -> Update | str:
    """The update of one module, or why it cannot be had without a base."""
    family = get_family(source.families[name])
    roles = source.modules[name]
    shape = weight_shape({r: source.file[t].shape for r, t in roles.items()})
    if family.needs_base or shape is None:
        return f"{family.title}: its change depends on the base's weights"
    stored = {source.file[t].dtype for r, t in roles.items() if r != "alpha"}
    if not all(dtype.is_floating_point for dtype in stored):
        return "stored as whole numbers"
    layout: Layout = "conv" if len(shape) > 2 else "linear"

    def absent() -> torch.Tensor:
        raise RegraftError("its change depends on the base's weights")

    module = Module(
        name=name,
        tensors={r: source.file.read(t) for r, t in roles.items() if r != "alpha"},
        shape=shape,
        layout=layout,
        scale=lambda rank: scale,
        alpha=None,
        weight=absent,
        bias=lambda: None,
        settings={},
    )
    built = family.build(module)
    if "weight" not in built:
        return "a bias only"
    return built["weight"]


def _summary(values: list[torch.Tensor]) -> dict[str, Any]:
    squares = [s.double() ** 2 for s in values]
    shares = [q.cumsum(0) / q.sum() for q in squares]
    longest = max(q.numel() for q in squares)
    ranks = {p: [rank_for_energy(s, p / 100) for s in values] for p in (90, 99)}
    return {
        "sites": len(values),
        "energy": sum(float(q.sum()) for q in squares),
        "effective_rank": round(median(map(_effective, values)), 2),
        **{
            f"rank_for_{p}": {"median": int(median(found)), "largest": max(found)}
            for p, found in ranks.items()
        },
        "share": {
            str(k): round(sum(float(c[min(k, c.numel()) - 1]) for c in shares) / len(shares), 4)
            for k in _FIRST
            if k < 2 * longest
        },
    }


def _effective(s: torch.Tensor) -> float:
    p = s.double() / s.double().sum()
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum()))
