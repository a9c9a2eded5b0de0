"""What a family is, and the list of all of them.

A family is how files parametrise ΔW. Each is one file here that opens with its paper and equation,
says which tensors make one module (by role; a dialect knows which key suffix is which role), and
builds the module's updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from regraft.adapters.update import Layout, Update
from regraft.errors import FamilyNotYet, ShapeMismatch


@dataclass(frozen=True)
class Module:
    """One module of an adapter file, and the weight it sits on.

    Attributes
    ----------
    name : str
        As the file has it.
    tensors : mapping of role to Tensor
        As stored. ``alpha`` is not among them: ``scale`` has read it.
    shape : tuple of int
        Of the weight, as the base stores it. Of a fused weight that the base holds in parts: of
        the whole.
    layout : str
        How the base stores the weight: "transposed" is (in, out).
    scale : function of rank
        alpha / rank by the file's convention (alpha / √rank for rsLoRA); 1 if it has none.
    alpha : float or None
        The alpha itself, for families that use it otherwise.
    weight, bias : function
        The base's weight and bias in fp32, read when asked for; ``bias`` gives None if there is
        none.
    settings : mapping
        What the file says of itself: PEFT's config, or network arguments from its metadata.
    """

    name: str
    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    layout: Layout
    scale: Callable[[int], float]
    alpha: float | None
    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, role: str, axis: int = 0) -> int:
        """The size of one axis of a factor that must be a matrix or a kernel.

        Raises
        ------
        ShapeMismatch
        """
        tensor = self.tensors[role]
        if tensor.ndim < 2 or 0 in tensor.shape:
            shape = tuple(tensor.shape)
            raise ShapeMismatch(f"The factor {role} of shape {shape} is empty or flat.")
        return tensor.shape[axis]


#: Parameter of the module ("weight", "bias") → its update.
Built = dict[str, Update]
Build = Callable[[Module], Built]


@dataclass(frozen=True)
class Family:
    """A registered family.

    Attributes
    ----------
    name : str
        In lower case; what ``inspect`` says.
    title, paper, equation : str
    needs : tuple of sets of roles
        A module is of this family if it has all roles of one of these sets, and no others than
        those in ``may``.
    may : set of roles
    marks : set of roles
        Any of them means this family, even where something is missing.
    needs_base : bool
        ΔW depends on the base's own weight.
    chosen : function of the settings, or None
        For families whose tensors look like another's: whether the file's settings mean this one.
    carried_as : function of a module's roles
        A sentence where ΔW is not simply what the file holds: what is carried in its place.
    rank : function of the roles' shapes
        The rank the file was trained at; None for families without one.
    """

    name: str
    title: str
    paper: str
    equation: str
    needs: tuple[frozenset[str], ...]
    build: Build
    may: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()
    needs_base: bool = False
    chosen: Callable[[Mapping[str, Any]], bool] | None = None
    carried_as: Callable[[Iterable[str]], str] = lambda roles: ""
    rank: Callable[[Mapping[str, tuple[int, ...]]], int | None] = lambda shapes: None

    def fits(self, roles: Iterable[str]) -> bool:
        """Whether a module with these roles is whole and of this family."""
        have = set(roles)
        return any(need <= have <= need | self.may for need in self.needs)


_FAMILIES: dict[str, Family] = {}


def family(
    *,
    needs: Iterable[Iterable[str]],
    may: Iterable[str] = (),
    marks: Iterable[str] = (),
    **facts: Any,
) -> Callable[[Build], Build]:
    """Register the decorated function as a family; ``facts`` are :class:`Family`'s fields."""

    def register(build: Build) -> Build:
        made = Family(
            build=build,
            needs=tuple(frozenset(n) for n in needs),
            may=frozenset(may) | {"alpha"},
            marks=frozenset(marks),
            **facts,
        )
        _FAMILIES[made.name] = made
        return build

    return register


def families() -> tuple[Family, ...]:
    """All families, by name."""
    return tuple(_FAMILIES[name] for name in sorted(_FAMILIES))


def get_family(name: str) -> Family:
    """The family called ``name``.

    Raises
    ------
    FamilyNotYet
    """
    if name not in _FAMILIES:
        raise FamilyNotYet(f"There is no family {name!r}.", fix=f"Known: {', '.join(_FAMILIES)}.")
    return _FAMILIES[name]


def family_of(roles: Iterable[str], settings: Mapping[str, Any]) -> Family | None:
    """The family of a whole module with these roles, or None.

    One that the settings choose comes before one that the roles alone fit.
    """
    have = set(roles)
    fitting = [f for f in families() if f.fits(have)]
    chosen = [f for f in fitting if f.chosen is not None and f.chosen(settings)]
    plain = [f for f in fitting if f.chosen is None]
    return next(iter([*chosen, *plain]), None)


def family_meant(roles: Iterable[str]) -> Family | None:
    """The family that a module with these roles, perhaps not whole, must be of."""
    have = set(roles)
    return next((f for f in families() if f.marks & have), None)
