"""What a method is, and the list of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from regraft.adapters import Site, Update
from regraft.bases import Base
from regraft.errors import BadOption, UnknownMethod
from regraft.methods.inserts import insert_methods
from regraft.subspaces import Dimension, SubspaceLibrary


@dataclass(frozen=True)
class MethodOptions:
    """Parameters that methods share.

    Attributes
    ----------
    dimension : Dimension
        Of the singular subspaces (paper LoRA-X: 320).
    threshold : float or None
        Smallest min(Φ_l, Φ_r) a site may have; None is the method's own default.
    filter_blocks : tuple of str
        Regular expressions; sites that match one are left out (LoRA-X's filter blocks).
    cross_terms : bool
        ProLoRA: keep the parallel/null-space cross terms that the paper drops.
    align : "none" or "rank-order"
        LoRA-X on different shapes: refuse, or match singular vectors by rank order (§4.2.2).
    """

    dimension: Dimension = field(default_factory=lambda: Dimension(k=320))
    threshold: float | None = None
    filter_blocks: tuple[str, ...] = ()
    cross_terms: bool = False
    align: Literal["none", "rank-order"] = "none"

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise BadOption(f"The threshold {self.threshold} is not between 0 and 1.")
        if self.align not in ("none", "rank-order"):
            raise BadOption(f"No alignment {self.align!r}.", fix="Choose none or rank-order.")
        for pattern in self.filter_blocks:
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadOption(f"{pattern!r} is not a regular expression: {error}.") from error

    def filtered(self, site: Site) -> str | None:
        """The pattern that leaves ``site`` out, if any."""
        return next((p for p in self.filter_blocks if re.search(p, str(site))), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for provenance."""
        return {**asdict(self), "dimension": str(self.dimension)}


@dataclass(frozen=True)
class SiteJob:
    """Everything a method may look at for one target site."""

    update: Update
    source: Base
    source_site: Site
    target: Base
    target_site: Site
    library: SubspaceLibrary
    options: MethodOptions

    @property
    def source_shape(self) -> tuple[int, ...]:
        return self.source.at(self.source_site).shape

    @property
    def target_shape(self) -> tuple[int, ...]:
        return self.target.at(self.target_site).shape


@dataclass(frozen=True)
class Refusal:
    """Why a method does not carry one site."""

    reason: str


Carry = Callable[[SiteJob], Update | Refusal]


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes
    ----------
    exact_on_identical : "always" or "full"
        On an identical pair ΔW comes back exactly: always, or at full subspace dimension.
    never_gains : bool
        ‖ΔW_t‖ ≤ ‖ΔW_s‖ (true of projections).
    default_threshold : float
        Smallest Φ when the user gives none.
    keeps : function of (Φ_l, Φ_r, k_l/m, k_r/n, options) or None
        Expected share of energy kept for a ΔW with no preferred direction.
    uses : tuple of str
        The options of its own, beside the shared dimension and filter.
    """

    name: str
    carry: Carry
    title: str
    paper: str
    equations: str
    needs: tuple[str, ...]
    cost: str
    exact_on_identical: Literal["always", "full"]
    never_gains: bool
    default_threshold: float
    keeps: Callable[[float, float, float, float, MethodOptions], float]
    uses: tuple[str, ...] = ()

    def check(self, options: MethodOptions) -> None:
        """Raise :class:`BadOption` for an option this method would ignore."""
        plain = MethodOptions()
        for name in ("threshold", "cross_terms", "align"):
            if name not in self.uses and getattr(options, name) != getattr(plain, name):
                users = [m.name for m in methods() if name in m.uses]
                raise BadOption(
                    f"The method {self.name} has no option {name.replace('_', '-')}.",
                    fix=f"It belongs to {' and '.join(users)}.",
                )

    def describe(self) -> dict[str, Any]:
        """JSON form for ``regraft methods``."""
        keys = ("name", "title", "paper", "equations", "cost", "default_threshold")
        listed = {k: getattr(self, k) for k in keys}
        return {
            **listed,
            "needs": list(self.needs),
            "carries": ["weights"],
            "invariants": {
                "exact_on_identical": self.exact_on_identical,
                "never_gains": self.never_gains,
            },
        }


_METHODS: dict[str, Method] = {}


def method(**facts: Any) -> Callable[[Carry], Carry]:
    """Register the decorated function as a method; ``facts`` are :class:`Method`'s fields."""

    def register(carry: Carry) -> Carry:
        made = Method(carry=carry, **facts)
        _METHODS[made.name] = made
        return carry

    return register


def methods() -> tuple[Method, ...]:
    """All methods for changes of weights, by name."""
    return tuple(_METHODS[name] for name in sorted(_METHODS))


def get_method(name: str) -> Method:
    """The method for changes of weights called ``name``.

    Raises
    ------
    BadOption
        It is a method for inserts.
    UnknownMethod
    """
    if name not in _METHODS and name in {m.name for m in insert_methods()}:
        raise BadOption(
            f"The method {name} carries prompts, prefixes and bottlenecks; this adapter changes "
            "weights.",
            fix=f"Choose auto, {', '.join(sorted(_METHODS))}.",
        )
    if name not in _METHODS:
        raise UnknownMethod(
            f"There is no method {name!r}.", fix=f"Choose auto, {', '.join(sorted(_METHODS))}."
        )
    return _METHODS[name]


def below_threshold(job: SiteJob, default: float) -> Refusal | None:
    """Refuse a site whose weights' subspaces are too unlike (LoRA-X Eq. 4)."""
    limit = default if job.options.threshold is None else job.options.threshold
    if limit <= 0:
        return None
    found = job.library.phi(
        job.source, job.source_site, job.target, job.target_site, job.options.dimension
    )
    if found is not None and min(found) < limit:
        return Refusal(
            f"subspaces too unlike: min(Φ_l {found[0]:.2f}, Φ_r {found[1]:.2f}) is below {limit:g}"
        )
    return None


def shapes_differ(job: SiteJob) -> str:
    return f"shapes differ: source {job.source_shape}, target {job.target_shape}"
