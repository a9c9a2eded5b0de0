"""Which parameter of a diffusers transformer lies where in the original single-file checkpoint.

``python -m lab.native_names`` pushes tensors whose rows carry their own name and number through
diffusers' single-file converters, reads off where each row ended up, and writes one table per
architecture into ``src/regraft/bases/maps``. Nothing in those tables is written by hand.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.native_models import ARCHITECTURES, Architecture

MAPS = Path(__file__).parents[1] / "src" / "regraft" / "bases" / "maps"
#: Rows of a tensor whose size the converter does not tell: halves, thirds and 1 : 1 : 1 : 4.
_ROWS = 168

Checkpoint = dict[str, Tensor]
Converter = Callable[[Checkpoint], Checkpoint]
#: canonical parameter → ranges of the native parameter's rows; empty for all of them
Parts = dict[str, list[list[int]]]


def build(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A tiny model of the real class, with random weights."""
    import diffusers

    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, class_name)(**config)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    return model.eval()


def _resized(code: types.CodeType, sizes: Mapping[int, int]) -> types.CodeType:
    """The same code with other sizes in the place of those written into it."""

    def swap(constant: Any) -> Any:
        if isinstance(constant, types.CodeType):
            return _resized(constant, sizes)
        return sizes.get(constant, constant) if type(constant) is int else constant

    return code.replace(co_consts=tuple(swap(c) for c in code.co_consts))


def converter(architecture: Architecture) -> Converter:
    """diffusers' own converter, for the widths of the tiny models."""
    if not architecture.converter:
        return dict
    from diffusers.loaders import single_file_utils

    function = getattr(single_file_utils, architecture.converter)
    code = _resized(function.__code__, architecture.sizes)
    return types.FunctionType(code, function.__globals__, argdefs=function.__defaults__)


class _Tagged(Checkpoint):
    """A checkpoint that has whatever is asked of it; every row says where it comes from."""

    def __init__(self, seeds: Iterable[str] = ()) -> None:
        super().__init__(dict.fromkeys(seeds, torch.zeros(0)))
        self.names: list[str] = []

    def add(self, name: str, rows: int) -> Tensor:
        self.names.append(name)
        return torch.stack(
            [torch.full((rows,), len(self.names) - 1.0), torch.arange(rows, dtype=torch.float32)], 1
        )

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name) if name in self else torch.zeros(_ROWS, 2)

    def pop(self, name: str, default: object = None) -> Tensor:  # type: ignore[override]
        return super().pop(name) if name in self else self.add(name, _ROWS)


def _read(tagged: Tensor, names: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """(native name, ranges of its rows in order) that a converted tensor is made of."""
    source, rows = tagged[:, 0].long(), tagged[:, 1].long().tolist()
    if len(set(source.tolist())) != 1:
        raise ValueError("one parameter out of two native ones")
    ranges: list[tuple[int, int]] = []
    for row in rows:
        if ranges and ranges[-1][1] == row:
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    return names[int(source[0])], ranges


def _parts(
    out: Mapping[str, Tensor], names: list[str], rows: Mapping[str, int]
) -> dict[str, Parts]:
    """native name → its parts, in shares of its rows."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for canonical, tagged in out.items():
        native, ranges = _read(tagged, names)
        found.setdefault(native, {})[canonical] = ranges
    shares: dict[str, Parts] = {}
    for native, parts in found.items():
        total = rows.get(native, _ROWS)
        if sum(last - first for ranges in parts.values() for first, last in ranges) != total:
            raise ValueError(f"{native}: rows lost or used twice")
        unit = math.gcd(total, *(cut for ranges in parts.values() for r in ranges for cut in r))
        whole = [(0, total)]
        shares[native] = {
            c: [] if r == whole else [[first // unit, last // unit] for first, last in r]
            for c, r in sorted(parts.items(), key=lambda part: part[1])
        }
    return shares


def _instances(architecture: Architecture) -> tuple[dict[str, Parts], set[str]]:
    """native name → parts, for every parameter of the tiny models; and diffusers' names of those
    that all of the models have."""
    found: dict[str, Parts] = {}
    always: set[str] | None = None
    for class_name, config in architecture.models:
        state = build(class_name, config).state_dict()
        tagged = _Tagged(architecture.seeds)
        rows: dict[str, int] = {}
        if not architecture.seeds:
            for name, tensor in state.items():
                if not re.search(architecture.ignored, name):
                    native = architecture.native_of(name)
                    rows[native] = rows.get(native, 0) + tensor.shape[0]
            for native, count in rows.items():
                tagged[native] = tagged.add(native, count)
        out = converter(architecture)(tagged)
        lost = [n for n in state if n not in out and not re.search(architecture.ignored, n)]
        extra = [] if architecture.seeds else [n for n in out if n not in state]
        if lost or extra:
            raise ValueError(f"{class_name}: not made: {lost}; made but not there: {extra}")
        tagged.names = [n.removeprefix(architecture.inside) for n in tagged.names]
        rows = {n.removeprefix(architecture.inside): count for n, count in rows.items()}
        found |= _parts(out, tagged.names, rows)
        always = set(state) & (set(state) if always is None else always)
    return found, always or set()


def _numbered(names: list[str]) -> str | None:
    """The names of blocks 0, 1, … as one pattern, or None if they are not alike."""
    pieces = [re.split(r"(\d+)", name) for name in names]
    if len({len(p) for p in pieces}) != 1:
        return None
    pattern = []
    for column in zip(*pieces, strict=True):
        if len(set(column)) == 1:
            pattern.append(column[0])
        elif list(column) == [str(i) for i in range(len(column))]:
            pattern.append("#")
        else:
            return None
    return "".join(pattern)


def table(architecture: Architecture) -> dict[str, Any]:
    """The table of one architecture, as it is written.

    Returns
    -------
    dict
        ``classes``: diffusers' names for it. ``names``: native pattern → the canonical pattern, or
        canonical patterns with the shares of its rows, in order. ``optional``: native patterns
        that some of its variants lack. ``#`` stands for a block's number, ``$`` for the number of
        the last block, where that is another.
    """
    stacks = [re.compile(re.escape(s).replace(r"\#", r"(\d+)")) for s in architecture.stacks]
    blocks: dict[str, dict[int, Parts]] = {}
    found: dict[str, Parts] = {}
    instances, always = _instances(architecture)
    optional: set[str] = set()
    for native, parts in instances.items():
        match = next((m for m in (s.match(native) for s in stacks) if m), None)
        if match is None:
            found[native] = parts
            optional |= set() if always.issuperset(parts) else {native}
            continue
        pattern = f"{native[: match.start(1)]}#{native[match.end(1) :]}"
        optional |= set() if always.issuperset(parts) else {pattern}
        blocks.setdefault(pattern, {})[int(match[1])] = parts
    for pattern, by_number in blocks.items():
        if len(by_number) == 1:  # one block has it, whatever the depth
            number = str(*by_number)
            found[pattern.replace("#", number)] = by_number[int(number)]
            optional |= {pattern.replace("#", number)} & {p.replace("#", number) for p in optional}
            continue
        every = [by_number[i] for i in sorted(by_number)]
        alike = _together(every)
        if alike is None:  # the last block is another
            last = len(every) - 1
            alike = _together(every[:-1])
            found[pattern.replace("#", "$")] = {
                c.replace(f".{last}.", ".$.", 1): r for c, r in every[-1].items()
            }
        if alike is None:
            raise ValueError(f"{pattern}: the blocks have nothing in common")
        found[pattern] = alike
    return {
        "classes": sorted({c for c, _ in architecture.models}),
        "optional": sorted(optional),
        "names": {native: _as_written(parts) for native, parts in sorted(found.items())},
    }


def _as_written(parts: Parts) -> str | dict[str, str]:
    """The name alone where it is all of the rows; else ranges like "1:2 0:1"."""
    if [*parts.values()] == [[]]:
        return next(iter(parts))
    return {c: " ".join(f"{first}:{last}" for first, last in r) for c, r in parts.items()}


def _together(every: list[Parts]) -> Parts | None:
    if len({json.dumps([*parts.values()]) for parts in every}) != 1:
        return None
    merged: Parts = {}
    for names in zip(*every, strict=True):
        pattern = _numbered(list(names))
        if pattern is None:
            return None
        merged[pattern] = every[0][names[0]]
    return merged


def written(architecture: Architecture) -> str:
    """The table as its file holds it."""
    return json.dumps(table(architecture), indent=1) + "\n"


def main() -> None:
    """Write every table."""
    MAPS.mkdir(exist_ok=True)
    for name, architecture in ARCHITECTURES.items():
        (MAPS / f"{name}.json").write_text(written(architecture), encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
