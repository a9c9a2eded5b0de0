"""LoRA whose training changed the base itself: PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ.

They start from factors B0 A0 ≠ 0 and take them out of the base, W_res = W0 − s B0 A0, so against
the base that everyone has

    ΔW = s (B A − B0 A0)

which is of rank 2r, and plain LoRA's ΔW = s B A is far off. PEFT's config names the start
(``init_lora_weights``). Files may bring B0 and A0 (roles ``init_up``, ``init_down``); otherwise

* PiSSA (arXiv 2404.02948), "pissa": s B0 A0 is W0's best approximation of rank r, by an exact SVD.
  "pissa_niter_N" is a randomised SVD, whose start the file does not keep: refused.
* OLoRA (arXiv 2406.01775), "olora": B0 A0 = Q_r R_r from the QR decomposition of W0.
* CorDA (2406.05223) and LoRA-GA (2407.05000) start from data: refused. LoftQ (2310.08659) replaces
  the base by a quantised one: refused.

The other starts keep the base ("gaussian", "eva", "mica": one factor is zero; "orthogonal":
B0 A0 = 0), and are plain LoRA. PEFT writes a plain LoRA of rank 2r on request; its config then no
longer names the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from regraft.adapters.families import lora
from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.update import LowRank
from regraft.errors import FamilyNotYet

_FIX = (
    "Save it again as a plain LoRA, in the session or with the checkpoint it was trained from: "
    "save_pretrained(path, path_initial_model_for_weight_conversion=...)."
)
_NEEDS = (("down", "up"), ("embedding_a", "embedding_b"))
_START = ("init_down", "init_up")


def start(settings: Mapping[str, Any]) -> str:
    """How PEFT's config says the factors started, in lower case."""
    return str(settings.get("init_lora_weights", "")).lower()


def _starts(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda settings: start(settings).startswith(names)


def _minus(module: Module, found: Callable[[LowRank], tuple[torch.Tensor, torch.Tensor]]) -> Built:
    """Plain LoRA's update less the start (left, right), scale included."""
    factors = {r: t for r, t in module.tensors.items() if r not in _START}
    built = dict(lora.build(replace(module, tensors=factors)))
    plain = built["weight"]
    assert isinstance(plain, LowRank)
    if "embedding_a" in factors or len(module.shape) > 2:
        raise FamilyNotYet(
            f"{module.name} is no linear layer: PEFT starts only those from the base.", fix=_FIX
        )
    if all(role in module.tensors for role in _START):
        first = {"down": module.tensors["init_down"], "up": module.tensors["init_up"]}
        before = lora.build(replace(module, tensors=first))["weight"]
        left, right = before.factors()
    else:
        left, right = found(plain)
    up, down = plain.factors()
    built["weight"] = LowRank(
        torch.cat([up, -left], 1), torch.cat([down, right]), 1.0, plain.shape, plain.layout
    )
    return built


@family(
    name="pissa",
    title="PiSSA",
    paper="https://arxiv.org/abs/2404.02948",
    equation="ΔW = s B A − (W0)_r",
    needs=_NEEDS,
    may=("up_bias", *_START),
    needs_base=True,
    chosen=_starts("pissa"),
    rank=lora._rank,
)
def build_pissa(module: Module) -> Built:
    """ΔW in factors of rank 2r, through an SVD of the base's weight."""

    def found(plain: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        if start(module.settings) != "pissa":
            raise FamilyNotYet(
                f"This PiSSA started from a randomised SVD ({start(module.settings)}) that its "
                "file does not keep.",
                fix=_FIX,
            )
        u, s, vh = torch.linalg.svd(module.weight().float(), full_matrices=False)
        return u[:, : plain.rank] * s[: plain.rank], vh[: plain.rank].contiguous()

    return _minus(module, found)


@family(
    name="olora",
    title="OLoRA",
    paper="https://arxiv.org/abs/2406.01775",
    equation="ΔW = s (B A − Q_r R_r)",
    needs=_NEEDS,
    may=("up_bias", *_START),
    needs_base=True,
    chosen=_starts("olora"),
    rank=lora._rank,
)
def build_olora(module: Module) -> Built:
    """ΔW in factors of rank 2r, through a QR decomposition of the base's weight."""

    def found(plain: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        q, r = torch.linalg.qr(module.weight().float())
        return q[:, : plain.rank] * plain.scale, r[: plain.rank].contiguous()

    return _minus(module, found)


@family(
    name="mutated",
    title="LoRA from a changed base",
    paper="https://arxiv.org/abs/2406.05223",
    equation="ΔW = s (B A − B0 A0)",
    needs=_NEEDS,
    may=("up_bias", *_START),
    needs_base=True,
    chosen=_starts("corda", "lora_ga", "loftq"),
    rank=lora._rank,
)
def build(module: Module) -> Built:
    """ΔW in factors of rank 2r if the file brings the start; LoftQ never.

    Raises
    ------
    FamilyNotYet
    """
    said = start(module.settings)

    def found(plain: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        raise FamilyNotYet(
            f"Training with {said} changed the base, and the file does not keep how.", fix=_FIX
        )

    if said.startswith("loftq"):
        raise FamilyNotYet(
            "LoftQ trained on a quantised base of its own, which differs from this one.",
            fix="Merge the adapter into the base that LoftQ saved, and diff the merged checkpoint.",
        )
    return _minus(module, found)
