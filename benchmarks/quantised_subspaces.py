"""What reading a base from quantised weights costs a carried adapter.

    python -m benchmarks.quantised_subspaces [--json FILE]

For every format: the relative error of W, the overlap ‖U_kᵀ Û_k‖² / k of the top-k left subspaces
with those of the 16-bit weights, and by how much ``lora-x`` changes when the source or the target
base is the quantised one. On random matrices of given spectra, and on the lab's language base with
an adapter trained on it. Needs gguf, bitsandbytes and the lab's assets; one thread, under two
minutes. Every quantised weight goes through a file and Regraft's own reader.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft.adapters import Site
from regraft.bases import Base, open_base
from regraft.dialects import load_adapter
from regraft.subspaces import Cache, Dimension, SubspaceLibrary, decompose
from regraft.transfer import transfer

ROOT = Path(__file__).parents[1]
LAB = ROOT / "lab" / "assets" / "language"
SIZE, POWERS, DIMENSIONS = 640, (0.3, 0.6, 1.0), (16, 64, 160, 320)
#: The lab's matrices have 96 inputs or outputs: the same shares of the smaller side.
LAB_DIMENSIONS = (2, 10, 24, 48)

State = dict[str, Tensor]


def _bitsandbytes(kind: str) -> Callable[[str, Tensor], State]:
    def pack(name: str, weight: Tensor) -> State:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight, quant_type=kind, compress_statistics=True)
        mates = {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        return {name: codes, **mates}

    return pack


def _int8(name: str, weight: Tensor) -> State:
    largest = weight.abs().amax(1)
    codes = (weight * 127 / largest[:, None]).round().to(torch.int8)
    return {name: codes, f"{name.removesuffix('weight')}SCB": largest}


def _fp8(name: str, weight: Tensor) -> State:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {name: codes, f"{name.removesuffix('weight')}scale_weight": scale}


def _int4(name: str, weight: Tensor) -> State:
    """compressed-tensors, symmetric groups, each number rounded to the nearest: no calibration,
    as GPTQ and AWQ have; they are no nearer to W itself."""
    module, (rows, columns) = name.removesuffix(".weight"), weight.shape
    group = 128 if columns % 128 == 0 else 32
    grouped = weight.reshape(rows, -1, group)
    scale = grouped.abs().amax(2) / 7.5
    codes = ((grouped / scale[..., None]).round().clamp(-8, 7) + 8).reshape(rows, -1, 8).long()
    words = (codes << torch.arange(0, 32, 4)).sum(2)
    return {
        f"{module}.weight_packed": words.where(words < 2**31, words - 2**32).int(),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor([rows, columns]),
    }


#: Form, as Regraft calls it → how to store one weight so. GGUF is written by its own library.
FORMATS: dict[str, Callable[[str, Tensor], State] | None] = {
    "bitsandbytes NF4": _bitsandbytes("nf4"),
    "bitsandbytes FP4": _bitsandbytes("fp4"),
    "compressed-tensors int4": _int4,
    "GGUF Q4_0": None,
    "GGUF Q5_1": None,
    "scaled fp8": _fp8,
    "bitsandbytes int8": _int8,
    "GGUF Q8_0": None,
}


def store(state: State, form: str, folder: Path) -> Base:
    """A checkpoint with every matrix in one format, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    pack = FORMATS[form]
    if pack is None:
        import gguf

        kind = gguf.GGMLQuantizationType[form.removeprefix("GGUF ")]
        writer = gguf.GGUFWriter(folder / "model.gguf", "native-names")
        for name, weight in state.items():
            if weight.ndim == 2:
                data = gguf.quants.quantize(weight.numpy(), kind)
                writer.add_tensor(name, data, raw_dtype=kind)
            else:
                writer.add_tensor(name, weight.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return open_base(folder / "model.gguf")
    stored: State = {}
    for name, weight in state.items():
        stored |= pack(name, weight) if weight.ndim == 2 else {name: weight}
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors")
    return open_base(folder)


def compared(whole: Tensor, read: Tensor, dimensions: tuple[int, ...]) -> dict[str, Any]:
    """Relative error, and overlap of the top-k left subspaces."""
    top = Dimension(k=max(dimensions))
    one, other = decompose(whole, top), decompose(read, top)
    cross = one.ut @ other.ut.mT
    overlap = {k: float(cross[:k, :k].square().sum() / k) for k in dimensions}
    return {"error": float((read - whole).norm() / whole.norm()), "overlap": overlap}


def synthetic(folder: Path) -> dict[str, dict[str, Any]]:
    """Random orthogonal factors around singular values i^−p, entries of the size models have."""
    torch.manual_seed(0)
    found: dict[str, dict[str, Any]] = {form: {} for form in FORMATS}
    for power in POWERS:
        left, right = (torch.linalg.qr(torch.randn(SIZE, SIZE))[0] for _ in "uv")
        weight = left * torch.arange(1, SIZE + 1).pow(-power) @ right
        weight *= 0.02 / weight.std()
        for form in FORMATS:
            base = store({"layer.weight": weight}, form, folder / f"{power}-{form}")
            read = base.read(Site("", "layer"))
            found[form][str(power)] = compared(weight, read, DIMENSIONS)
    return found


def changes(outputs: dict[str, Path], reference: Path, base: Base) -> dict[str, float]:
    """‖ΔW − ΔW₁₆‖ / ‖ΔW₁₆‖ over all sites, of every output against the 16-bit one."""
    own = load_adapter(reference, base).updates
    found = {}
    for what, path in outputs.items():
        updates = load_adapter(path, base).updates
        gap = total = 0.0
        for site, update in own.items():
            left, right = update.factors()
            l2, r2 = updates[site].factors()
            gap += float((left @ right - l2 @ r2).square().sum())
            total += float((left @ right).square().sum())
        found[what] = (gap / total) ** 0.5
    return found


def lab(folder: Path) -> dict[str, dict[str, Any]]:
    """The language base v1 in every format: subspaces, and an adapter carried from and to it."""
    library = SubspaceLibrary(Cache(folder / "cache"), device="cpu")
    adapter = LAB / "adapters" / "v1" / "bible-r8-s0"
    one, other = open_base(LAB / "bases" / "v1"), open_base(LAB / "bases" / "continued")
    raw = load_file(LAB / "bases" / "v1" / "model.safetensors")
    state = {name: tensor.float() for name, tensor in raw.items()}

    def carried(name: str, source: Base, target: Base) -> Path:
        output = folder / "out" / name
        transfer(
            adapter, source=source, target=target, output=output, method="lora-x",
            dimension=48, rank="full", dtype="fp32", library=library,
        )  # fmt: skip
        return output

    from_one, to_one = carried("from-16", one, other), carried("to-16", one, one)
    found: dict[str, dict[str, Any]] = {}
    for form in FORMATS:
        base = store(state, form, folder / form)
        sites = [s for s in one.weights if "proj" in s.module]
        each = [compared(one.read(s), base.read(s), LAB_DIMENSIONS) for s in sites]
        found[form] = {
            "error": mean(e["error"] for e in each),
            "overlap": {k: mean(e["overlap"][k] for e in each) for k in LAB_DIMENSIONS},
            "lowest": {k: min(e["overlap"][k] for e in each) for k in LAB_DIMENSIONS},
            "change": changes({"from": carried(f"from-{form}", base, other)}, from_one, other)
            | changes({"to": carried(f"to-{form}", one, base)}, to_one, one),
        }
    return found


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "quantised_subspaces.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made, real = synthetic(Path(folder) / "synthetic"), lab(Path(folder) / "lab")
    result = {"size": SIZE, "synthetic": made, "lab": real}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(
        f"Synthetic, {SIZE} × {SIZE}, spectra i^-{', '.join(map(str, POWERS))}",
        ["form", "error of W", *(f"k = {k}" for k in DIMENSIONS)],
        [
            [
                form,
                " ".join(f"{100 * made[form][str(p)]['error']:.1f}%" for p in POWERS),
                *(
                    " ".join(f"{made[form][str(p)]['overlap'][k]:.3f}" for p in POWERS)
                    for k in DIMENSIONS
                ),
            ]
            for form in FORMATS
        ],
    )
    show(
        "Language base v1: mean over its 28 matrices; ΔW of lora-x at dimension 48",
        ["form", "error of W", *(f"k = {k}" for k in LAB_DIMENSIONS), "from it", "to it"],
        [
            [
                form,
                f"{100 * row['error']:.1f}%",
                *(f"{row['overlap'][k]:.3f}" for k in LAB_DIMENSIONS),
                *(f"{100 * row['change'][w]:.1f}%" for w in ("from", "to")),
            ]
            for form, row in real.items()
        ],
    )


if __name__ == "__main__":
    main()
