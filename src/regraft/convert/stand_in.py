"""A stand-in for the base, made of the adapter file itself: its modules, and their shapes."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from regraft.adapters import Site
from regraft.adapters.families import get_family
from regraft.bases import Base
from regraft.bases.base import Weight
from regraft.convert.shapes import Shape, may_be_convolution, weight_shapes
from regraft.dialects.keys import PEFT_PREFIX
from regraft.dialects.names import split_dotted, split_kohya
from regraft.dialects.source import AdapterSource
from regraft.errors import BadOption
from regraft.files.select import COMPONENTS

FIX = "Add --base with the base this adapter was trained on."


class StandIn(Base):
    """A base whose sites are an adapter's own modules. Its weights cannot be read.

    ``names`` maps each site to the module's name in the file.
    """

    names: dict[Site, str]
    _called: str

    @property
    def components(self) -> tuple[str, ...]:
        """Also those of which the file changes only normalisations or biases."""
        return tuple(dict.fromkeys(site.component for site in self.names))

    @property
    def name(self) -> str:
        """The base that a PEFT config names; empty if none."""
        return self._called

    def read(self, site: Site) -> Tensor:
        """A stand-in has no weights.

        Raises
        ------
        BadOption
            Always.
        """
        raise BadOption(
            f"What changes at {site} depends on the base's own weights, and no base was given.",
            fix=FIX,
        )


def stand_in(source: AdapterSource) -> StandIn:
    """The stand-in for an adapter's base.

    Raises
    ------
    BadOption
        A family or a shape asks for the base.
    """
    _check_families(source)
    shapes = weight_shapes(source)
    unknown = [name for name, shape in shapes.items() if shape is None]
    if unknown:
        _refuse(
            source,
            f"the file does not tell the weights' shapes of {len(unknown)} modules, such as "
            f"{unknown[0]} (the kernel of a convolution, for one)",
        )
    sites = _sites(source)
    weights: dict[Site, Weight] = {}
    others: dict[Site, Weight] = {}
    for name, site in sites.items():
        shape: Shape = shapes[name] or ()
        roles = source.modules[name]
        tensor = next(iter(roles.values()))
        dtype = source.file[tensor].dtype
        for role in ("diff_b", "b_norm", "up_bias"):
            if role in roles:
                own = site.with_parameter("bias")
                size = source.file[roles[role]].shape
                others[own] = Weight(own, size, dtype, source.file, roles[role], own.module)
        if roles.keys() - {"diff_b", "b_norm", "alpha"}:
            held = weights if len(shape) > 1 else others
            held[site] = Weight(site, shape, dtype, source.file, tensor, site.module)
    found = StandIn(str(source.path), Path(source.path), weights, {}, others)
    found.names = {site: name for name, site in sites.items()}
    said = source.config.get("base_model_name_or_path")
    found._called = said if isinstance(said, str) else ""
    revision = source.config.get("revision")
    found.revision = revision if isinstance(revision, str) else None
    return found


def _refuse(source: AdapterSource, why: str) -> NoReturn:
    raise BadOption(f"This conversion needs the base: {why}.", file=source.path, fix=FIX)


def _check_families(source: AdapterSource) -> None:
    needy = sorted({f for f in source.families.values() if get_family(f).needs_base})
    if needy:
        titles = ", ".join(get_family(f).title for f in needy)
        _refuse(source, f"what a {titles} adapter changes depends on the base's own weights")


def _sites(source: AdapterSource) -> dict[str, Site]:
    """Module name → site. Dots cannot be put back, so kohya names stay flat."""
    plain = {name: name.removeprefix(PEFT_PREFIX) for name in source.modules}
    splits = {name: split_kohya(p) for name, p in plain.items()}
    if not any(splits.values()) and source.dialect != "peft":
        dotted = {name: split_dotted(p) for name, p in plain.items()}
        if all(s and s[0].rstrip(".") in COMPONENTS for s in dotted.values()):
            splits = dotted
    found = {}
    for name, split in splits.items():
        found[name] = Site("", plain[name]) if split is None else Site(split[1][0], split[2])
    return found


def check_dialect(source: AdapterSource, base: StandIn, dialect: str) -> None:
    """Whether the names of the output's dialect can be told from those of the input.

    Raises
    ------
    BadOption
    """
    if dialect == source.dialect:
        return
    kohya = any(split_kohya(name) for name in source.modules)
    components = {site.component for site in base.names}
    if kohya:
        why = f"kohya's names cannot be turned into {dialect} names without the base's"
    elif dialect == "kohya":
        why = "kohya files name modules as the base's original checkpoint does"
    elif "" in components and dialect != "peft":
        why = "the file does not say which part of a pipeline its modules belong to"
    elif source.dialect == "lora-x" and _open_kernels(base):
        why = "a LoRA-X file does not say the kernels of its convolutions"
    else:
        return
    _refuse(source, why)


def _open_kernels(base: StandIn) -> bool:
    return any(may_be_convolution(site.module) for site in base.weights)


def parameters(source: AdapterSource) -> int:
    """How many numbers the file stores, alphas left out."""
    return sum(
        prod(source.file[t].shape)
        for roles in source.modules.values()
        for role, t in roles.items()
        if role not in ("alpha", "on_input")
    )
