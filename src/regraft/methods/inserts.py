"""The methods that carry inserts: what an adapter adds to activations instead of to a weight.

They take a whole adapter and both bases as models, not one site and its weights, so they are no
:class:`~regraft.methods.registry.Method`; :mod:`regraft.inserts` runs them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from regraft.errors import BadOption, UnknownMethod


@dataclass(frozen=True)
class InsertMethod:
    """A way to carry prompt vectors, prefixes and bottlenecks; fields as in ``Method``."""

    name: str
    title: str
    paper: str
    equations: str
    needs: tuple[str, ...]
    cost: str

    def describe(self) -> dict[str, Any]:
        """JSON form for ``regraft methods``."""
        return {**asdict(self), "needs": list(self.needs), "carries": ["inserts"]}


COPY = InsertMethod(
    name="copy",
    title="Copy the numbers as they are",
    paper="https://arxiv.org/abs/2111.06719",
    equations="P_t = P_s",
    needs=("equal widths",),
    cost="reading and writing the adapter",
)
ACTIVATION_MAP = InsertMethod(
    name="activation-map",
    title="Map between the two bases' activations",
    paper="https://arxiv.org/abs/2106.07682",
    equations="A = Q + argmin_D Σ ‖D x + a − (y − Q x)‖² + λ‖D‖²; values and W_up by least squares",
    needs=("both bases run", "calibration data, or samples of the source"),
    cost="a few hundred forward passes of both bases, then least squares per site",
)
_METHODS = {m.name: m for m in (ACTIVATION_MAP, COPY)}


def insert_methods() -> tuple[InsertMethod, ...]:
    """All methods for inserts, by name."""
    return tuple(_METHODS[name] for name in sorted(_METHODS))


def get_insert_method(name: str, known: tuple[str, ...]) -> InsertMethod:
    """The method for inserts called ``name``; ``known`` are the names of those for weights.

    Raises
    ------
    BadOption
        It is a method for changes of weights.
    UnknownMethod
    """
    if name in _METHODS:
        return _METHODS[name]
    listed = f"Choose auto, {', '.join(sorted(_METHODS))}."
    if name in known:
        raise BadOption(
            f"The method {name} carries changes of weights, and this adapter changes none.",
            fix=listed,
        )
    raise UnknownMethod(f"There is no method {name!r}.", fix=listed)
