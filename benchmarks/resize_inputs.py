"""The adapters that :mod:`benchmarks.resize_sdxl` resizes and bakes, and their exact ΔW.

Numbers are synthetic, names and shapes are SDXL's. ΔW is restated here in plain tensor algebra, so
that no way is judged by its own arithmetic.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.scales import SCALES, Scale
from benchmarks.synthetic import WEIGHTS, Shapes, adapted, unet_shapes, write_bases
from regraft.bases.unet_names import to_ldm

Answer = dict[str, Any]
Factors = tuple[Tensor, Tensor]

FAMILIES = ("lora", "loha", "lokr", "dora")
#: Singular values of the LoRA fall by this factor from one direction to the next.
DECAY = 0.93
#: Rank of LoHa and LoKr, and the small side of LoKr's Kronecker product: ΔW has rank 64.
SMALL_RANK = 8
#: The DoRA's magnitudes are ‖W + BA‖ of each row, changed by about this share.
MAGNITUDE = 0.005


def seeded(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def kohya_modules(shapes: Shapes) -> dict[str, tuple[str, tuple[int, int]]]:
    """kohya name → (module, shape) of all linear attention, feed-forward and projection weights."""
    sites = adapted(shapes)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.endswith((".proj_in", ".proj_out")) and name != module and len(shape) == 2:
            sites[module] = (shape[0], shape[1])
    ldm = to_ldm(name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    return {"lora_unet_" + ldm[m].replace(".", "_"): (m, sites[m]) for m in sorted(sites)}


@cache
def _orthonormal(size: int, rank: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, rank, generator=seeded("frame", size, rank)))[0]


def _frame(size: int, rank: int, own: torch.Generator) -> Tensor:
    """Orthonormal columns: one draw per size, its rows shuffled and their signs flipped."""
    signs = torch.randint(2, (size, 1), generator=own) * 2.0 - 1.0
    return _orthonormal(size, rank)[torch.randperm(size, generator=own)] * signs


def lora(name: str, m: int, n: int, rank: int) -> dict[str, Tensor]:
    """Orthonormal directions with a geometric spectrum; alpha is half the rank."""
    own = seeded("resize", "lora", name)
    rank = min(rank, m, n)
    sizes = DECAY ** torch.arange(rank)
    left, right = (_frame(size, rank, own) for size in (m, n))
    return {
        "lora_up.weight": left * sizes.sqrt(),
        "lora_down.weight": (right * sizes.sqrt()).mT.contiguous(),
        "alpha": torch.tensor(rank / 2),
    }


def loha(name: str, m: int, n: int, rank: int = SMALL_RANK) -> dict[str, Tensor]:
    own = seeded("resize", "loha", name)
    found = {}
    for half in ("w1", "w2"):
        found[f"hada_{half}_a"] = 0.1 * torch.randn(m, rank, generator=own)
        found[f"hada_{half}_b"] = 0.1 * torch.randn(rank, n, generator=own)
    return {**found, "alpha": torch.tensor(float(rank))}


def lokr(name: str, m: int, n: int, rank: int = SMALL_RANK) -> dict[str, Tensor]:
    own = seeded("resize", "lokr", name)
    return {
        "lokr_w1": torch.randn(SMALL_RANK, SMALL_RANK, generator=own),
        "lokr_w2_a": 0.1 * torch.randn(m // SMALL_RANK, rank, generator=own),
        "lokr_w2_b": 0.1 * torch.randn(rank, n // SMALL_RANK, generator=own),
        "alpha": torch.tensor(float(rank)),
    }


def dora(name: str, weight: Tensor, rank: int) -> dict[str, Tensor]:
    found = lora(name, *weight.shape, rank)
    merged = weight.float() + found["lora_up.weight"] @ found["lora_down.weight"] / 2
    change = torch.randn(weight.shape[0], 1, generator=seeded("resize", "dora", name))
    return {**found, "dora_scale": merged.norm(dim=1, keepdim=True) * (1 + MAGNITUDE * change)}


def write_inputs(folder: Path, wide: Shapes, narrow: Shapes, config: Answer, rank: int) -> Answer:
    """Write the four adapters, and the base of the DoRA.

    Parameters
    ----------
    wide, narrow : Shapes
        Of the U-Net that LoRA, LoHa and LoKr are for, and of the DoRA's.
    rank : int
        Of the LoRA; the DoRA has a quarter of it.

    Returns
    -------
    dict
        Family → kohya name → (module, shape).
    """
    write_bases(narrow, config, folder / "base", folder / "spare")
    shutil.rmtree(folder / "spare")
    plan: Answer = {f: kohya_modules(narrow if f == "dora" else wide) for f in FAMILIES}
    for family in ("loha", "lokr"):
        # their files do not tell a linear projection from a 1×1 convolution
        plan[family] = {
            k: v for k, v in plan[family].items() if not v[0].endswith((".proj_in", ".proj_out"))
        }
    with safe_open(folder / "base" / "unet" / WEIGHTS, "pt") as base:
        for family in FAMILIES:
            tensors = {}
            for name, (module, (m, n)) in plan[family].items():
                if family == "dora":
                    made = dora(name, base.get_tensor(f"{module}.weight"), max(1, rank // 4))
                elif family == "lora":
                    made = lora(name, m, n, rank)
                else:
                    made = {"loha": loha, "lokr": lokr}[family](name, m, n)
                tensors |= {f"{name}.{k}": v.half().contiguous() for k, v in made.items()}
            metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
            save_file(tensors, folder / f"{family}.safetensors", metadata)
    return plan


def make(scale: str, folder: str, rank: int) -> Answer:
    """Write everything. The DoRA's base has SDXL's shapes but fewer layers, and no upper half."""
    size, root = SCALES[scale], Path(folder)
    wide, _ = unet_shapes(size)
    few = {"layers_per_block": 1, "transformer_layers_per_block": (1, 1, 1)}
    fewer: Scale = replace(size, unet={**size.unet, **few})
    narrow, config = unet_shapes(fewer)
    narrow = {k: s for k, s in narrow.items() if not k.startswith("up_blocks.")}
    plan = write_inputs(root, wide, narrow, config, rank)
    (root / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return {"families": {f: len(plan[f]) for f in FAMILIES}}


def read(path: str | Path, name: str) -> dict[str, Tensor]:
    """The tensors of one module, in fp32."""
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(f"{name}.{k}").float() for k in _suffixes(file.keys(), name)}


def _suffixes(keys: Iterable[str], name: str) -> list[str]:
    return [k.removeprefix(f"{name}.") for k in keys if k.startswith(f"{name}.")]


def read_weight(base: str | Path, module: str) -> Tensor:
    with safe_open(Path(base) / "unet" / WEIGHTS, "pt") as file:
        return file.get_tensor(f"{module}.weight").float()


def factors(t: dict[str, Tensor]) -> Factors:
    """(left, right) with ΔW = left @ right, in the precision of the tensors; not for DoRA."""
    if "hada_w1_a" in t:
        left = torch.einsum("mi,mj->mij", t["hada_w1_a"], t["hada_w2_a"]).flatten(1)
        right = torch.einsum("in,jn->ijn", t["hada_w1_b"], t["hada_w2_b"]).flatten(0, 1)
        return left * (t["alpha"] / t["hada_w1_a"].shape[1]), right
    if "lokr_w1" in t:
        eye = torch.eye(t["lokr_w1"].shape[1], dtype=t["lokr_w1"].dtype)
        scale = t["alpha"] / t["lokr_w2_b"].shape[0]
        left = torch.kron(t["lokr_w1"], t["lokr_w2_a"]) * scale
        return left, torch.kron(eye, t["lokr_w2_b"])
    scale = t["alpha"] / t["lora_down.weight"].shape[0]
    return t["lora_up.weight"] * scale, t["lora_down.weight"]


def delta(t: dict[str, Tensor], weight: Tensor | None) -> Tensor:
    """ΔW in full."""
    left, right = factors(t)
    if "dora_scale" not in t:
        return left @ right
    assert weight is not None
    merged = weight + left @ right
    return merged * (t["dora_scale"] / merged.norm(dim=1, keepdim=True)) - weight


def spectrum(t: dict[str, Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of the exact ΔW, in the precision of the tensors."""
    if "dora_scale" in t:
        u, s, vh = torch.linalg.svd(delta(t, weight), full_matrices=False)
        return u, s, vh
    left, right = factors(t)
    (q1, r1), (q2, r2) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    return q1 @ u, s, vh @ q2.mT
