"""The tensors of one module as a program writes them, and ΔW by an oracle that is not ours.

LyCORIS' modules are run: what they do to one-hot inputs is the weight. Layouts that no installed
library writes are built by hand and multiplied out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """The layer that a module of the file sits on: a whole (perhaps fused) weight and its bias."""

    kind: str
    weight: Tensor
    bias: Tensor | None

    def module(self) -> nn.Module:
        """A plain torch layer with these numbers."""
        out, inside = self.weight.shape[0], self.weight.shape[1] if self.weight.ndim > 1 else 0
        has_bias = self.bias is not None
        made: nn.Module
        if self.weight.ndim == 1:
            made = nn.GroupNorm(8, out)
        elif self.weight.ndim == 4:
            size = tuple(self.weight.shape[2:])
            made = nn.Conv2d(inside, out, size, padding=size[0] // 2, bias=has_bias)
        else:
            made = nn.Linear(inside, out, bias=has_bias)
        made.weight.data = self.weight.clone()
        if self.bias is not None:
            made.bias.data = self.bias.clone()
        return made


@dataclass(frozen=True)
class Piece:
    """The end of each key → its tensor; parameter → its change; what the file's metadata say."""

    tensors: Tensors
    change: Tensors
    metadata: dict[str, str] | None = None


Maker = Callable[[Layer], Piece]


def random(*shape: int, size: float = 0.3) -> Tensor:
    return torch.randn(*shape) * size


def response(run: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(weight, bias) of an affine layer, read off what it makes of one-hot inputs; in fp64."""
    if len(shape) == 2:
        eye = torch.eye(shape[1], dtype=torch.float64)
        bias = run(torch.zeros(1, shape[1], dtype=torch.float64))[0]
        return (run(eye) - bias).mT, bias
    n = math.prod(shape[1:])
    hot = torch.eye(n, dtype=torch.float64).reshape(n, *shape[1:])
    middle = (slice(None), slice(None), shape[2] // 2, shape[3] // 2)
    bias = run(torch.zeros(1, *shape[1:], dtype=torch.float64))[middle][0]
    return (run(hot)[middle] - bias).mT.reshape(shape), bias


def change_of(layer: Layer, run: Callable[[Tensor], Tensor]) -> Tensors:
    """ΔW and Δb of whatever ``run`` does in place of the layer."""
    weight, bias = response(run, tuple(layer.weight.shape))
    change = {"weight": weight - layer.weight.double()}
    if layer.bias is not None and not torch.allclose(bias, layer.bias.double(), atol=1e-6):
        change["bias"] = bias - layer.bias.double()
    return change


# ---------------------------------------------------------------- LyCORIS


def lycoris(kind: str, **options: Any) -> Maker:
    """A module of LyCORIS with random numbers, run by LyCORIS."""

    def make(layer: Layer) -> Piece:
        from lycoris import modules

        plain = layer.module()
        cls = getattr(modules, kind, None) or _module_class(kind)
        if kind == "NormModule":
            made = cls("m", plain, 1.0)
        else:
            made = cls("m", plain, 1.0, **{"lora_dim": 3, "alpha": 2.0, **options})
        if kind == "FullModule":
            made.apply_to()  # from now on it holds the weight itself
        for name, parameter in made.named_parameters():
            if "dora" in name:
                parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
            elif kind in ("FullModule", "TLoraModule"):
                parameter.data += random(*parameter.shape, size=0.05)
            elif not name.startswith("org_module"):
                parameter.data = random(*parameter.shape)
        made.eval()
        state = made.custom_state_dict() if hasattr(made, "custom_state_dict") else None
        state = state if state is not None else made.state_dict()
        tensors = {f".{k}": v.detach().clone() for k, v in state.items()}
        if kind == "NormModule":
            before = {n: p.detach().clone() for n, p in plain.named_parameters()}
            made.merge_to(1.0)
            change = {n: p.detach() - before[n] for n, p in plain.named_parameters()}
            return Piece(tensors, {n: c for n, c in change.items() if c.any()})
        if kind != "FullModule":
            made.apply_to()
        run = plain.forward
        if kind in _SINGLE:
            run = lambda x: plain.forward(x.float()).double()  # noqa: E731
        else:
            plain.double()
            made.double()
        with torch.no_grad():
            return Piece(tensors, change_of(layer, run))

    return make


#: Modules whose code mixes in fp32 numbers of its own.
_SINGLE = ("DiagOFTModule", "ButterflyOFTModule", "FullModule")


def _module_class(kind: str) -> Any:
    from importlib import import_module

    files = {"TLoraModule": "tlora", "DyLoraModule": "dylora", "GLoRAModule": "glora"}
    return getattr(import_module(f"lycoris.modules.{files[kind]}"), kind)


# ---------------------------------------------------------------- by hand

#: How a writer ends the keys of a pair of factors: A, B, and the alpha it keeps or None.
KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
AB = (".lora_A.weight", ".lora_B.weight", None)
AB_ALPHA = (".lora_A.weight", ".lora_B.weight", ".alpha")
BARE = (".lora_A", ".lora_B", None)
DOWN_UP = (".lora.down.weight", ".lora.up.weight", None)
OLD_ENCODER = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", None)
OLD = ("_lora.down.weight", "_lora.up.weight", None)
PLAIN = (".down.weight", ".up.weight", None)
NAMED = (".lora_A.default.weight", ".lora_B.default.weight", None)


def factors(layer: Layer, rank: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """A, B in the shapes files use, and B A as the weight's shape, by running both layers."""
    out, *inside = layer.weight.shape
    tail = (1,) * (layer.weight.ndim - 2)
    a, b = random(rank, *inside), random(out, rank, *tail)
    product = b.double().reshape(out, rank) @ a.double().reshape(rank, -1)
    return a, b, product.reshape(layer.weight.shape)


def lora(ends: tuple[str, str, str | None] = KOHYA, alpha: float = 2.0, bias: str = "") -> Maker:
    """Plain LoRA: the alpha kept where the writer keeps one, else 1."""

    def make(layer: Layer) -> Piece:
        a, b, product = factors(layer)
        tensors = {ends[0]: a, ends[1]: b}
        if ends[2]:
            tensors[ends[2]] = torch.tensor(alpha)
            product = product * (alpha / a.shape[0])
        change = {"weight": product}
        if bias:
            tensors[bias] = random(b.shape[0])
            change["bias"] = tensors[bias].double()
        return Piece(tensors, change)

    return make


def dora(ends: tuple[str, str, str | None], key: str, *, out: bool, flat: bool = False) -> Maker:
    """W' = g V / ‖V‖ with V = W0 + ΔW, the norm over each output, or over each input."""

    def make(layer: Layer) -> Piece:
        plain = lora(ends)(layer)
        direction = layer.weight.double() + plain.change["weight"]
        axes = [i for i in range(direction.ndim) if i != (0 if out else 1)]
        norm = torch.linalg.vector_norm(direction, dim=axes, keepdim=True)
        g = (norm * (0.7 + 0.6 * torch.rand_like(norm))).float()
        change = direction / norm * g.double() - layer.weight.double()
        return Piece({**plain.tensors, key: g.flatten() if flat else g}, {"weight": change})

    return make


def difference(weight: str | None, bias: str | None = None) -> Maker:
    """A whole change of the weight, the bias, or both."""

    def make(layer: Layer) -> Piece:
        tensors, change = {}, {}
        if weight:
            tensors[weight] = random(*layer.weight.shape)
            change["weight"] = tensors[weight]
        if bias:
            assert layer.bias is not None
            tensors[bias] = random(*layer.bias.shape)
            change["bias"] = tensors[bias]
        return Piece(tensors, change)

    return make


def new_value(key: str) -> Maker:
    """What the weight becomes."""

    def make(layer: Layer) -> Piece:
        value = random(*layer.weight.shape)
        return Piece({key: value}, {"weight": value - layer.weight})

    return make


def kron(*, alpha: bool = True, whole: bool = False) -> Maker:
    """LoKr by hand: with both halves whole the alpha means nothing."""

    def make(layer: Layer) -> Piece:
        m, n = layer.weight.shape
        w1 = random(4, 4)
        if whole:
            w2, scale, tensors = random(m // 4, n // 4), 1.0, {}
            tensors = {".lokr_w1": w1, ".lokr_w2": w2}
        else:
            a, b = random(m // 4, 2), random(2, n // 4)
            w2, scale = a @ b, 1.5 / 2
            tensors = {".lokr_w1": w1, ".lokr_w2_a": a, ".lokr_w2_b": b}
        if alpha:
            tensors[".alpha"] = torch.tensor(1.5)
        return Piece(tensors, {"weight": torch.kron(w1.double(), w2.double()) * scale})

    return make


def svdiff(layer: Layer) -> Piece:
    """A shift of each singular value, cut at zero."""
    flat = (
        layer.weight.double().flatten(1) if layer.weight.ndim > 1 else layer.weight.double()[None]
    )
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    shift = random(len(s), size=0.4)
    change = u @ torch.diag((s + shift).clamp_min(0) - s) @ vh
    return Piece({".delta": shift}, {"weight": change.reshape(layer.weight.shape)})


def foura(layer: Layer) -> Piece:
    """LoRA between a DCT of the inputs and its inverse on the outputs, masked, by scipy."""
    from scipy.fft import dct, idct

    a, b, _ = factors(layer, 4)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    core = b.double().numpy() @ (mask.double()[:, None] * a.double()).numpy()
    # z = F⁻¹ (core (F x)): the transform of each basis vector is a column.
    forward = dct(torch.eye(a.shape[1], dtype=torch.float64).numpy(), axis=0, norm="ortho")
    change = torch.from_numpy(idct(core @ forward, axis=0, norm="ortho"))
    return Piece(
        {".foura_A": a, ".foura_B": b, ".foura_mask": mask, ".alpha": torch.tensor(2.0)},
        {"weight": change * 0.5},
        {"transform": "dct"},
    )


def lora_x(layer: Layer) -> Piece:
    """U diag(S) Vᵀ in orthonormal bases."""
    flat = layer.weight.flatten(1)
    u, v = (torch.linalg.qr(random(size, 3))[0] for size in flat.shape)
    s = random(3)
    change = u.double() @ torch.diag(s.double()) @ v.double().mT
    return Piece(
        {".lora_x_U": u, ".lora_x_S": s, ".lora_x_V": v},
        {"weight": change.reshape(layer.weight.shape)},
    )
