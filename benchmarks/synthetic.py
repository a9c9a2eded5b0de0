"""Synthetic bases and adapters with the names and shapes of Stable Diffusion XL's U-Net.

Module names and shapes come from diffusers, on the meta device. The numbers are made here, tensor
by tensor, and go straight to disk; only one draw per shape and the current weight are held.

* A weight is a Gaussian bulk plus spikes that fall as i^-1/2 from four times the bulk's edge down
  into it: a slowly falling spectrum, the hard case for approximate decompositions.
* The bulk of each shape is drawn once. Each weight is that draw with rows and columns rolled and
  their signs flipped by its own seed, which costs a copy instead of a draw and gives every weight
  its own bytes and its own singular vectors.
* The second base is the first plus Gaussian noise of 5 % of each weight's norm.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from benchmarks.scales import Scale
from regraft.bases.unet_names import to_ldm
from regraft.files import atomic_file, serialize

#: ‖second − first‖ / ‖first‖ of every weight.
CHANGE = 0.05
#: Raise it when the same scale gives other bytes: kept work folders are then made again.
VERSION = 1
_SPIKES = 24
_ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
WEIGHTS = "diffusion_pytorch_model.safetensors"

Shapes = dict[str, tuple[int, ...]]


def unet_shapes(scale: Scale) -> tuple[Shapes, dict[str, Any]]:
    """(parameter name → shape, config.json) of the U-Net, without allocating it."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**scale.unet)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    return shapes, {"_class_name": "UNet2DConditionModel", **config}


def adapted(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Module → (rows, columns) of every attention and feed-forward weight the adapter changes."""
    found = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        inner = ".transformer_blocks." in module and module.endswith(_ADAPTED)
        if inner and name.endswith(".weight") and len(shape) == 2:
            found[module] = (shape[0], shape[1])
    return found


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


class _Bulk:
    """Gaussian matrices of any shape with unit entries: one draw per shape, varied per name."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def matrix(self, name: str, m: int, n: int) -> Tensor:
        if (m, n) not in self._drawn:
            made = torch.randn(m, n, generator=_generator(self._kind, m, n))
            self._drawn[m, n] = made.half()
        own = _generator(self._kind, name)
        shift = [int(torch.randint(size, (), generator=own)) for size in (m, n)]
        rows, columns = (torch.randint(2, (size,), generator=own) * 2.0 - 1.0 for size in (m, n))
        rolled = self._drawn[m, n].roll(shift, dims=(0, 1)).float()
        return rolled.mul_(rows[:, None]).mul_(columns)


def _weight(bulk: _Bulk, name: str, m: int, n: int, *, spikes: bool) -> Tensor:
    spread = n**-0.5
    made = bulk.matrix(name, m, n).mul_(spread)
    if spikes:
        own = _generator("spikes", name)
        edge = spread * (m**0.5 + n**0.5)
        count = min(_SPIKES, m, n)
        size = 4 * edge * torch.arange(1, count + 1).pow(-0.5) / (m * n) ** 0.5
        left = torch.randn(m, count, generator=own)
        right = torch.randn(count, n, generator=own)
        made.addmm_(left * size, right)
    return made


def _tensors(shapes: Shapes) -> Iterator[tuple[Tensor, Tensor]]:
    """Per parameter, in file order: its values in the first and in the second base, fp16."""
    bulk, noise = _Bulk("bulk"), _Bulk("noise")
    sites = adapted(shapes)
    for name in sorted(shapes):
        shape = shapes[name]
        if len(shape) == 1:
            centre = 1.0 if name.endswith("weight") else 0.0
            first = centre + 0.02 * torch.randn(shape, generator=_generator("vector", name))
            yield first.half(), first.half()
            continue
        m, n = shape[0], prod(shape[1:])
        spikes = name.removesuffix(".weight") in sites
        first = _weight(bulk, name, m, n, spikes=spikes)
        step = CHANGE * float(first.norm()) / (m * n) ** 0.5
        second = noise.matrix(name, m, n).mul_(step).add_(first)
        yield first.half(), second.half()


def _header(shapes: Shapes) -> bytes:
    position, entries = 0, {}
    for name in sorted(shapes):
        size = 2 * prod(shapes[name])
        entries[name] = {
            "dtype": "F16",
            "shape": list(shapes[name]),
            "data_offsets": [position, position + size],
        }
        position += size
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _put(stream: BinaryIO, tensor: Tensor) -> None:
    stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def write_bases(shapes: Shapes, config: dict[str, Any], first: Path, second: Path) -> None:
    """Write both bases as diffusers folders (``unet/config.json`` and its weights)."""
    for folder in (first, second):
        (folder / "unet").mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "unet" / "config.json").write_text(text, encoding="utf-8")
    header = _header(shapes)
    with (
        atomic_file(first / "unet" / WEIGHTS, overwrite=True) as path_a,
        atomic_file(second / "unet" / WEIGHTS, overwrite=True) as path_b,
        open(path_a, "wb") as stream_a,
        open(path_b, "wb") as stream_b,
    ):
        for stream in (stream_a, stream_b):
            stream.write(header)
        for one, other in _tensors(shapes):
            _put(stream_a, one)
            _put(stream_b, other)


def write_adapter(scale: Scale, shapes: Shapes, path: Path, *, seed: int) -> int:
    """Write a LoRA as kohya's trainer does for SDXL; returns the number of its sites."""
    ldm = to_ldm(name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    tensors: dict[str, Tensor] = {}
    sites = adapted(shapes)
    for module, (m, n) in sites.items():
        own = _generator("adapter", seed, module)
        name = "lora_unet_" + ldm[module].replace(".", "_")
        down = 0.01 * torch.randn(scale.rank, n, generator=own)
        up = 0.01 * torch.randn(m, scale.rank, generator=own)
        tensors[f"{name}.lora_down.weight"] = down.half()
        tensors[f"{name}.lora_up.weight"] = up.half()
        tensors[f"{name}.alpha"] = torch.tensor(float(scale.alpha)).half()
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(scale.rank),
        "ss_network_alpha": f"{scale.alpha:.1f}",
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    with atomic_file(path, overwrite=True) as temporary:
        serialize(temporary, tensors, metadata)
    return len(sites)
