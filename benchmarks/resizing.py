"""The measured ways of :mod:`benchmarks.resize_sdxl`, each in a process of its own.

``python -m benchmarks.resizing NAME`` reads its arguments as JSON from standard input and prints
one line of JSON. The others' ways are restated here from their sources, without their file
handling: sd-scripts' ``networks/resize_lora.py`` and ``networks/extract_lora_from_models.py``
(kohya-ss/sd-scripts, Apache-2.0). PEFT's own function is called.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.resize_inputs import (
    Answer,
    Factors,
    delta,
    factors,
    lora,
    make,
    read,
    read_weight,
    spectrum,
)
from benchmarks.tasks import peak_mb

CUT = "the exact cut"


def errors(
    adapter: str, outputs: dict[str, str], names: dict[str, str], rank: int, base: str | None
) -> Answer:
    """How far each output is from the exact ΔW cut to ``rank``, and from ΔW itself, in fp64.

    Parameters
    ----------
    outputs : dict
        Label → a kohya file with the modules.
    names : dict
        kohya name → module of the base.

    Returns
    -------
    dict
        Label → {"error": √(Σ‖out − cut‖² / Σ‖cut‖²) over the modules, "worst": ‖out − cut‖ / ‖cut‖
        of one module, "lost": √(Σ‖out − ΔW‖² / Σ‖ΔW‖²)}. The label "the exact cut" has only "lost".
    """
    cuts: list[float] = []
    off: dict[str, list[float]] = {label: [] for label in outputs}
    lost: dict[str, list[float]] = {label: [] for label in [*outputs, CUT, ""]}
    for name, module in names.items():
        t = {k: v.double() for k, v in read(adapter, name).items()}
        weight = read_weight(base, module).double() if base else None
        u, s, vh = spectrum(t, weight)
        cut = u[:, :rank] * s[:rank], vh[:rank]
        whole = u * s, vh
        cuts.append(float(s[:rank].norm()))
        lost[CUT].append(float(s[rank:].norm()))
        lost[""].append(float(s.norm()))
        for label, path in outputs.items():
            out = factors({k: v.double() for k, v in read(path, name).items()})
            off[label].append(apart(out, cut))
            lost[label].append(apart(out, whole))
    found: Answer = {
        label: {
            "error": _together(off[label]) / _together(cuts),
            "worst": max(x / size for x, size in zip(off[label], cuts, strict=True)),
            "lost": _together(lost[label]) / _together(lost[""]),
        }
        for label in outputs
    }
    return {**found, CUT: {"lost": _together(lost[CUT]) / _together(lost[""])}}


def apart(a: Factors, b: Factors) -> float:
    """‖a₀a₁ − b₀b₁‖. Through QR, without the products, where that is less work."""
    left, right = torch.cat([a[0], -b[0]], dim=1), torch.cat([a[1], b[1]])
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return float((a[0] @ a[1] - b[0] @ b[1]).norm())
    return float((torch.linalg.qr(left)[1] @ torch.linalg.qr(right.mT)[1].mT).norm())


def _together(norms: list[float]) -> float:
    return sum(x**2 for x in norms) ** 0.5


def regraft_way(adapter: str, output: str, rank: int, base: str | None = None) -> Answer:
    """Regraft, the whole adapter, from file to file."""
    import regraft

    started = time.perf_counter()
    regraft.convert(
        adapter, output=output, base=base, dialect="kohya", rank=rank, dtype="fp32", overwrite=True
    )
    return {"seconds": time.perf_counter() - started}


def each(
    adapter: str,
    output: str,
    names: dict[str, str],
    base: str | None,
    way: Callable[[Tensor], Factors],
    *,
    merging: bool,
) -> Answer:
    """One way on some modules; seconds per module, reading and writing left out.

    ``merging``: whether making ΔW in full is part of the way.
    """
    seconds, made = {}, {}
    way(torch.randn(64, 96))  # the first call of a process is slower
    for name, module in names.items():
        tensors = read(adapter, name)
        weight = read_weight(base, module) if base else None
        full = None if merging else delta(tensors, weight)
        started = time.perf_counter()
        up, down = way(delta(tensors, weight) if full is None else full)
        seconds[name] = time.perf_counter() - started
        made |= written(name, up, down)
    save_file(made, output)
    return {"seconds": seconds}


def written(name: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Factors under kohya's keys; scale 1."""
    return {
        f"{name}.lora_up.weight": up.contiguous(),
        f"{name}.lora_down.weight": down.contiguous(),
        f"{name}.alpha": torch.tensor(float(down.shape[0])),
    }


def sd_resize(
    adapter: str, output: str, rank: int, names: dict[str, str], base: str | None = None
) -> Answer:
    """sd-scripts' resizing: the product, its SVD with complete bases, the first directions.

    Above 2048 on both sides newer versions take ``torch.svd_lowrank``; no linear weight of SDXL
    is as large.
    """

    def way(full: Tensor) -> Factors:
        u, s, vh = torch.linalg.svd(full)
        return u[:, :rank] @ torch.diag(s[:rank]), vh[:rank]

    return each(adapter, output, names, base, way, merging=True)


def sd_lowrank(
    adapter: str, output: str, rank: int, names: dict[str, str], base: str | None = None
) -> Answer:
    """The same with what newer versions do to larger weights, on every weight."""
    torch.manual_seed(0)

    def way(full: Tensor) -> Factors:
        u, s, v = torch.svd_lowrank(full, q=min(2 * rank, *full.shape), niter=2)
        return u[:, :rank] @ torch.diag(s[:rank]), v.mT[:rank]

    return each(adapter, output, names, base, way, merging=True)


def sd_extract(
    adapter: str, output: str, rank: int, names: dict[str, str], base: str | None = None
) -> Answer:
    """sd-scripts' extraction from two models, given their difference: SVD, and the clamp."""

    def way(full: Tensor) -> Factors:
        u, s, vh = torch.linalg.svd(full)
        u, vh = u[:, :rank] @ torch.diag(s[:rank]), vh[:rank]
        high = torch.quantile(torch.cat([u.flatten(), vh.flatten()]), 0.99)
        return u.clamp(-high, high), vh.clamp(-high, high)

    return each(adapter, output, names, base, way, merging=False)


def peft(
    adapter: str, output: str, rank: int, names: dict[str, str], base: str | None = None
) -> Answer:
    """``peft.convert_to_lora`` on a model with one of the modules at a time."""
    from peft import convert_to_lora

    warnings.simplefilter("ignore")
    seconds, made = {}, {}
    convert_to_lora(peft_model("first", lora("first", 64, 96, 8), None), rank=8)
    for name, module in names.items():
        tensors = read(adapter, name)
        model = peft_model(name, tensors, read_weight(base, module) if base else None)
        started = time.perf_counter()
        _, found = convert_to_lora(model, rank=rank)
        seconds[name] = time.perf_counter() - started
        down, up = (found[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        made |= written(name, up, down)
    save_file(made, output)
    return {"seconds": seconds}


def peft_model(name: str, t: dict[str, Tensor], weight: Tensor | None) -> torch.nn.Module:
    """A model of one Linear with this adapter on it, as PEFT holds it."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

    m, n = (x.shape[i] for i, x in zip((0, 1), factors(t), strict=True))
    linear = torch.nn.utils.skip_init(torch.nn.Linear, n, m, bias=False)
    if weight is not None:
        linear.weight.data.copy_(weight)
    alpha: Any = t["alpha"].item()
    common: Any = {"target_modules": [name]}
    if "hada_w1_a" in t:
        config: Any = LoHaConfig(r=t["hada_w1_a"].shape[1], alpha=alpha, **common)
    elif "lokr_w1" in t:
        small = t["lokr_w1"].shape[0]
        config = LoKrConfig(
            r=t["lokr_w2_b"].shape[0], alpha=alpha, decompose_factor=small, **common
        )
    else:
        own = t["lora_down.weight"].shape[0]
        config = LoraConfig(r=own, lora_alpha=alpha, use_dora="dora_scale" in t, **common)
    model = get_peft_model(torch.nn.ModuleDict({name: linear}), config)
    layer = model.base_model.model[name]
    for parameter, value in peft_parameters(layer, t):
        parameter.data.copy_(value)
    return model


def peft_parameters(layer: Any, t: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """PEFT's parameters and their values."""
    for key, value in t.items():
        if key == "lora_up.weight":
            yield layer.lora_B["default"].weight, value
        elif key == "lora_down.weight":
            yield layer.lora_A["default"].weight, value
        elif key == "dora_scale":
            yield layer.lora_magnitude_vector["default"].weight, value[:, 0]
        elif key == "lokr_w2_a" and "default" in layer.lokr_w2:  # PEFT keeps small ones whole
            yield layer.lokr_w2["default"], value @ t["lokr_w2_b"]
        elif key != "alpha" and "default" in getattr(layer, key):
            yield getattr(layer, key)["default"], value


TASKS: dict[str, Callable[..., Answer]] = {
    "make": make,
    "regraft": regraft_way,
    "sd-resize": sd_resize,
    "sd-lowrank": sd_lowrank,
    "sd-extract": sd_extract,
    "peft": peft,
    "errors": errors,
}


def main() -> None:
    before = peak_mb()
    answer = TASKS[sys.argv[1]](**json.load(sys.stdin))
    print(json.dumps({**answer, "peak_mb": peak_mb(), "peak_mb_after_imports": before}))


if __name__ == "__main__":
    main()
