"""Small bases and adapters on disk for the method tests: square, wide, tall, convolution."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from regraft.adapters import LowRank, Site, Spectral, Update
from regraft.bases import Base, open_base
from regraft.methods import MethodOptions, SiteJob
from regraft.subspaces import Cache, Dimension, SubspaceLibrary

SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.square": (24, 24),
    "layers.0.wide": (16, 40),
    "layers.1.tall": (40, 16),
    "layers.1.conv": (12, 8, 3, 3),
}


def weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random weight with a falling spectrum, as trained weights have."""
    rows = torch.randn(shape[0], torch.Size(shape[1:]).numel(), generator=generator)
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    s = s * torch.arange(1, s.numel() + 1).float() ** -0.5
    return ((u * s) @ vh).reshape(shape)


def make_base(folder: Path, seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Base:
    generator = torch.Generator().manual_seed(seed)
    save_base(folder, {n: weight(s, generator) for n, s in shapes.items()})
    return open_base(folder)


def save_base(folder: Path, weights: dict[str, Tensor]) -> Base:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{n}.weight": w.contiguous() for n, w in weights.items()}, folder / "model.safetensors"
    )
    return open_base(folder)


def moved(base: Base, folder: Path, amount: float, seed: int = 9) -> Base:
    """The same base with every weight moved by ``amount`` of its norm."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for site in base.weights:
        w = base.read(site)
        noise = torch.randn(w.shape, generator=generator)
        weights[site.module] = w + amount * w.norm() / noise.norm() * noise
    return save_base(folder, weights)


def lora(shape: tuple[int, ...], rank: int, seed: int, scale: float = 2.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    n = torch.Size(shape[1:]).numel()
    up = torch.randn(shape[0], rank, generator=generator)
    down = torch.randn(rank, n, generator=generator)
    return LowRank(up, down, scale, shape, "conv" if len(shape) > 2 else "linear")


def lora_x(base: Base, site: Site, library: SubspaceLibrary, rank: int, *, full: bool) -> Spectral:
    """An adapter in LoRA-X form: the base's own top singular vectors and a random core."""
    space = library.subspace(base, site, Dimension(k=rank))
    generator = torch.Generator().manual_seed(rank)
    core = torch.randn((rank, rank) if full else (rank,), generator=generator)
    shape = base.weights[site].shape
    layout = "conv" if len(shape) > 2 else "linear"
    return Spectral(space.ut.mT, core, space.vt.mT, shape, layout)


def job(
    update: Update,
    source: Base,
    target: Base,
    library: SubspaceLibrary,
    module: str,
    options: MethodOptions | None = None,
) -> SiteJob:
    site = Site("", module)
    return SiteJob(update, source, site, target, site, library, options or MethodOptions())


def new_library(folder: Path) -> SubspaceLibrary:
    return SubspaceLibrary(Cache(folder), device="cpu")


def write_lora(
    path: Path, rank: int = 3, modules=SHAPES, metadata=None, dtype=torch.float32
) -> Path:
    """A single file with dotted names, as PEFT and diffusers write it."""
    g = torch.Generator().manual_seed(4)
    tensors = {}
    for name in modules:
        shape = SHAPES[name]
        ones = [1] * (len(shape) - 2)
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=g).to(dtype)
        tensors[f"{name}.lora_B.weight"] = torch.randn(shape[0], rank, *ones, generator=g).to(dtype)
    save_file(tensors, path, metadata or {"modelspec.trigger_phrase": "inkstyle"})
    return path


def make_world(folder: Path) -> Path:
    """v1, its close successor v2, an unrelated base, and a LoRA for v1, as files in ``folder``."""
    source = make_base(folder / "v1", 0)
    moved(source, folder / "v2", 0.2)
    make_base(folder / "stranger", 50)
    write_lora(folder / "lora.safetensors")
    return folder
