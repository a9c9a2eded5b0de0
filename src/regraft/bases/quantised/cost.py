"""What it costs to take subspaces from quantised weights, as measured.

``python -m benchmarks.quantised_subspaces`` measures it, and a test holds these figures against
what it wrote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from regraft.bases.base import Base


@dataclass(frozen=True)
class Measured:
    """Of one form, against the 16-bit weights.

    ``error`` is ‖Ŵ − W‖ / ‖W‖ in percent; ``top64`` and ``top320`` the lowest and highest overlap
    ‖U_kᵀ Û_k‖² / k of the left subspaces of 640 × 640 matrices over three spectra; ``change`` is
    by how many percent an adapter differs that lora-x carries to such a base (a small language
    model, half of the directions).
    """

    error: float
    top64: tuple[float, float]
    top320: tuple[float, float]
    change: float


MEASURED = {
    "bitsandbytes FP4": Measured(12.1, (0.88, 0.98), (0.68, 0.88), 25.2),
    "compressed-tensors int4": Measured(10.9, (0.92, 0.99), (0.69, 0.89), 20.5),
    "bitsandbytes NF4": Measured(9.2, (0.94, 0.99), (0.72, 0.91), 19.3),
    "GGUF Q4_0": Measured(8.5, (0.95, 0.99), (0.73, 0.92), 17.9),
    "GGUF Q5_1": Measured(3.8, (0.99, 1.00), (0.85, 0.97), 9.4),
    "scaled fp8": Measured(2.6, (1.00, 1.00), (0.89, 0.98), 6.0),
    "bitsandbytes int8": Measured(0.7, (1.00, 1.00), (0.98, 1.00), 1.8),
    "GGUF Q8_0": Measured(0.5, (1.00, 1.00), (0.99, 1.00), 1.4),
}
#: The key of an adapter's metadata that names the form of the base it was trained on.
TRAINED_ON = "regraft.base_quantised"
#: Forms that were not measured → the measured one with as many bits.
_LIKE = (
    (r"GGUF (TQ|Q[123]_|IQ[123]).*|.*(GPTQ|int)\s?[123](-bit)?", ""),
    (r"GGUF (Q4|IQ4|MXFP4).*", "GGUF Q4_0"),
    (r"GGUF Q[56].*|.* int[567]", "GGUF Q5_1"),
    (r"(GPTQ|AWQ) 4-bit|.* int4", "compressed-tensors int4"),
    (r".* fp8", "scaled fp8"),
    (r".* (int8|8-bit|intx)|.*int8", "bitsandbytes int8"),
)


def like(form: str) -> str:
    """The measured form that stands for this one; "" if it has fewer bits than all of them."""
    if form in MEASURED:
        return form
    return next((near for pattern, near in _LIKE if re.fullmatch(pattern, form)), "")


def cost(base: Base) -> str | None:
    """What subspaces taken from this base are worth, in words; None for a base in 16 bits or more.

    Where its weights are in several forms, the figures are of the one that costs most.
    """
    forms = base.quantised
    if not forms:
        return None
    stored = ", ".join(f"{count} in {form}" for form, count in forms.items())
    advice = "Prefer the 16-bit checkpoint it was made from, if there is one."
    near = {form: like(form) for form in forms}
    if not all(near.values()):
        low = next(form for form in forms if not near[form])
        return (
            f"Weights are quantised ({stored}). {low} has fewer bits than any form whose cost was "
            f"measured; at 4 bits an adapter carried by lora-x changes by a fifth. {advice}"
        )
    form = max(forms, key=lambda f: MEASURED[near[f]].change)
    found = MEASURED[near[form]]
    of = near[form] if near[form] == form else f"{near[form]}, which has about as many bits"
    return (
        f"Weights are quantised ({stored}). Measured for {of}: weights are off by "
        f"{found.error:g} %, top-64 subspaces overlap {_range(found.top64)} with those of the "
        f"16-bit weights, top-320 of 640 {_range(found.top320)}, and an adapter that lora-x "
        f"carries to such a base changes by {found.change:g} %. {advice}"
    )


def _range(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.2f}" if pair[0] == pair[1] else f"{pair[0]:.2f}–{pair[1]:.2f}"


def _unlike(form: str, source: Base) -> str:
    """On an adapter for weights that the source given does not have."""
    first = form.split(",")[0]
    found = MEASURED.get(like(first))
    off = f", which are off by {found.error:g} % (measured for {like(first)})" if found else ""
    given = (
        f"is quantised to {', '.join(source.quantised)}" if source.quantised else "is not quantised"
    )
    return (
        f"The adapter was trained on a base quantised to {form}: the faithful source is its "
        f"dequantised weights{off}. The source base given {given}. Where a family or a method "
        "reads the source's weights, it reads other ones than the adapter was trained on; to be "
        "exact, give the quantised base as the source."
    )


def notes(source: Base, target: Base, trained_on: str | None = None) -> list[str]:
    """What a reader of a transfer between these bases should know of their storage.

    Parameters
    ----------
    source, target : Base
    trained_on : str, optional
        The form that the adapter's file says its base was quantised to (:data:`TRAINED_ON`).
    """
    said = []
    if trained_on and not set(trained_on.split(", ")) <= set(source.quantised):
        said.append(_unlike(trained_on, source))
    if source.quantised:
        forms = ", ".join(source.quantised)
        said.append(
            f"The source base is quantised ({forms}): the evidence is measured on those weights, "
            "and so is ΔW of families that depend on the base (DoRA and its like)."
        )
    if (found := cost(target)) is not None:
        said.append(f"The target base: {found}")
    return said
