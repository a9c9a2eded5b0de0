"""The sizes of published transformers, by which a base or an adapter's key set is known.

Read from ``published.json``, which ``lab/published.py`` writes from the real classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources

from regraft.bases.native_tables import Table, module_of, name_pattern, shape_of_name, table_of

Shape = tuple[int, int]

#: Tables of names → what all models with these names are called together.
FAMILIES = {
    "flux": "Flux.1",
    "flux-2": "Flux.2",
    "flux-3": "Flux.3",
    "chroma": "Chroma",
    "sd3": "Stable Diffusion 3",
    "hunyuan-video": "HunyuanVideo",
    "wan": "Wan",
    "qwen-image": "Qwen-Image",
    "qwen-image-2.1": "Qwen-Image 2.1",
    "krea-2": "Krea 2",
    "z-image": "Z-Image",
    "ltx-video": "LTX-Video",
    "ltx-2": "LTX-2",
    "auraflow": "AuraFlow",
    "lumina-2": "Lumina-Image 2.0",
    "hidream": "HiDream",
    "cosmos-2": "Cosmos-Predict2",
    "mochi": "Mochi",
    "sana": "Sana",
}


@dataclass(frozen=True)
class Published:
    """One published transformer.

    ``names`` is its table of names. ``depths`` is the number of blocks of each stack; ``shapes``
    are the (rows, columns) of each weight's matrix, the block's number written ``#``, several where
    its blocks differ.
    """

    label: str
    names: str
    modelspec: str
    kohya: str
    depths: Mapping[str, int]
    shapes: Mapping[str, frozenset[Shape]]

    @property
    def together(self) -> str:
        """What it and those an adapter of it fits as well are called."""
        if self.names == "wan":
            return f"Wan {self.label.split()[-1].removeprefix('A')}"
        if self.names in ("flux", "hunyuan-video") and self.label != "FramePack":
            return FAMILIES[self.names]
        return self.label

    @cached_property
    def _patterns(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for pattern in self.shapes:
            found.setdefault(shape_of_name(pattern), []).append(pattern)
        return found

    def pattern_of(self, module: str) -> str | None:
        """The module's name with its block's number written ``#``, if this model has it."""
        options = self._patterns.get(shape_of_name(module), [])
        return next((p for p in options if name_pattern(p).fullmatch(module)), None)

    @cached_property
    def flat(self) -> Flat:
        """The shapes by flattened name, diffusers' or native."""
        return Flat(self, table_of(self.names))


@dataclass(frozen=True)
class Place:
    """A layer of a published model: the shapes it may have, and where it stands.

    ``stack`` is empty outside of the numbered blocks; ``depth`` is the number of its blocks.
    """

    shapes: frozenset[Shape]
    stack: str = ""
    depth: int = 0
    number: int = 0


class Flat:
    """Names with underscores for dots, of either set → the layer of a published model."""

    def __init__(self, model: Published, table: Table) -> None:
        places = {pattern: self._place(model, [pattern]) for pattern in model.shapes}
        for entry in table.entries:
            if entry.native.endswith(".weight"):
                held = [module_of(c).replace("$", "#") for c, _ in entry.parts]
                if all(h in model.shapes for h in held):
                    native = module_of(entry.native).replace("$", "#")
                    places[native] = self._place(model, held)
        self._by_shape: dict[str, list[tuple[str, Place]]] = {}
        for pattern, place in places.items():
            flat = pattern.replace(".", "_")
            self._by_shape.setdefault(shape_of_name(flat), []).append((flat, place))

    @staticmethod
    def _place(model: Published, held: list[str]) -> Place:
        """Of one layer, or of one that fuses several."""
        stack = held[0].partition(".#")[0] if "#" in held[0] else ""
        if len(held) == 1:
            return Place(model.shapes[held[0]], stack, model.depths.get(stack, 0))
        rows = sum(max(r for r, _ in model.shapes[h]) for h in held)
        columns = {c for h in held for _, c in model.shapes[h]}
        return Place(frozenset((rows, c) for c in columns), stack, model.depths.get(stack, 0))

    def find(self, name: str) -> Place | None:
        """The layer with this flattened name."""
        for pattern, place in self._by_shape.get(shape_of_name(name), []):
            if match := name_pattern(pattern).fullmatch(name):
                return replace(place, number=int(match[1])) if match.groups() else place
        return None


@cache
def published() -> tuple[Published, ...]:
    """Every one of them, in the order of the file."""
    text = (resources.files("regraft.bases") / "published.json").read_text(encoding="utf-8")
    return tuple(
        Published(
            p["label"],
            p["names"],
            p["modelspec"],
            p["kohya"],
            p["depths"],
            {m: frozenset(map(_shape, sizes.split())) for m, sizes in p["shapes"].items()},
        )
        for p in json.loads(text)
    )


def _shape(text: str) -> Shape:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)
