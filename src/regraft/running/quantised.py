"""Quantised bases that run: quantising one that is loaded, and making a loaded one exact.

NF4 and FP4 are bitsandbytes' (blocks of 64, scales quantised again, as QLoRA has it); integers are
torchao's: s (q − z) with a scale and a zero point for each group of inputs, from its least and its
largest number.

bitsandbytes on a CPU does not always do what its files say. 0.50.2 unpacks 4-bit weights wrongly
where blocks cross rows, and its 8-bit layers round their inputs too: such layers hold the numbers
that their weights mean, unpacked. Its 4-bit kernel for bf16, which is used where the CPU has the
instructions, is switched off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from regraft.bases.quantised.bits_and_bytes import unpacked, unpacked_int8
from regraft.bases.quantised.cost import TRAINED_ON
from regraft.bases.quantised.packed import missing
from regraft.bases.quantised.torch_ao import quiet_import
from regraft.errors import BadOption

__all__ = [
    "FORMS",
    "TRAINED_ON",
    "USUAL_GROUP",
    "Storage",
    "quantise",
    "settle",
    "storage_of",
]

#: What ``quantise`` makes → what users call it.
FORMS = {
    "nf4": "bitsandbytes NF4",
    "fp4": "bitsandbytes FP4",
    "int8": "torchao intx",
    "int4": "torchao int4",
    "int3": "torchao int3",
    "int2": "torchao int2",
}
_BLOCK = 64
USUAL_GROUP = 32


class _Unpacked(nn.Linear):
    """A layer that holds the numbers of a quantised weight, and was of the form ``form``.

    As bitsandbytes' layers do, it computes in its own dtype and answers in its input's.
    """

    form: str

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


@dataclass(frozen=True)
class Storage:
    """How the weights of a module are stored.

    Attributes
    ----------
    forms : dict
        Form, as a base's files have it → how many weights.
    held : int
        How many of them are held unpacked, because the library would not compute with them exactly.
    group : int or None
        Inputs that share a zero point; None where weights have none, or not all the same.
    """

    forms: Mapping[str, int]
    held: int = 0
    group: int | None = None

    def __bool__(self) -> bool:
        return bool(self.forms)

    def __str__(self) -> str:
        return ", ".join(self.forms)


def storage_of(module: nn.Module) -> Storage:
    """How a module's weights are stored; falsy where none is quantised."""
    forms: Counter[str] = Counter()
    groups: set[int] = set()
    held = 0
    for part in module.modules():
        if isinstance(part, _Unpacked):
            forms[part.form] += 1
            held += 1
            continue
        if hasattr(part, "base_layer"):  # a tuner's, which shows its base's weight as its own
            continue
        weight: Any = getattr(part, "weight", None)
        kind = type(weight)
        if kind.__name__ == "Params4bit" and weight.quant_state is not None:
            forms[f"bitsandbytes {str(weight.quant_state.quant_type).upper()}"] += 1
        elif kind.__name__ == "Int8Params":
            forms["bitsandbytes int8"] += 1
        elif kind.__module__.startswith("torchao."):
            forms[_torchao_form(weight)] += 1
            if getattr(weight, "zero_point", None) is not None and weight.ndim == 2:
                groups.add(int(weight.block_size[1]))
    return Storage(dict(forms.most_common()), held, groups.pop() if len(groups) == 1 else None)


def _torchao_form(weight: Any) -> str:
    target = str(getattr(weight, "target_dtype", "")).removeprefix("torch.")
    name = {"Int8Tensor": "int8", "Float8Tensor": "fp8"}.get(type(weight).__name__, "intx")
    return f"torchao {target if target.startswith('int') and target != 'int8' else name}"


def quantise(
    module: nn.Module, form: str, *, group: int = USUAL_GROUP, besides: Iterable[nn.Module] = ()
) -> Storage:
    """Quantise the linear layers of a loaded model, in place.

    Parameters
    ----------
    module : nn.Module
        A model of transformers or diffusers, weights in fp32, fp16 or bf16.
    form : str
        A key of :data:`FORMS`.
    group : int
        Inputs that share a scale and a zero point; integers only. Layers whose inputs do not divide
        into such groups stay as they are.
    besides : iterable of Module
        Layers that stay as they are, such as the output's.

    Raises
    ------
    BadOption
        An unknown form, a group below 1, a base that is quantised already or in fp64, or one with
        no layer to quantise.
    MissingDependency
    """
    if form not in FORMS:
        raise BadOption(f"{form!r} is no form to quantise to.", fix=f"Known: {', '.join(FORMS)}.")
    if group < 1:
        raise BadOption(f"Groups of {group} inputs.", fix="32 and 64 are usual.")
    if already := storage_of(module):
        raise BadOption(
            f"The base is quantised already ({already}).", fix="Leave out the quantisation."
        )
    kept = {id(part) for part in besides}
    layers = {
        name: part
        for name, part in module.named_modules()
        if type(part) is nn.Linear and id(part) not in kept and name
    }
    integers = form.startswith("int")
    if integers:
        layers = {n: part for n, part in layers.items() if part.in_features % group == 0}
    if not layers:
        raise BadOption(
            "The base has no linear layer that could be quantised"
            + (f" in groups of {group}." if integers else "."),
            fix="Give another group size, or train on the base as it is.",
        )
    if any(part.weight.dtype == torch.float64 for part in layers.values()):
        raise BadOption("The base is in fp64.", fix="Cast it to fp32 first.")
    if integers:
        _to_integers(module, int(form[3:]), group, layers)
    else:
        _to_four_bits(module, form, layers)
    return storage_of(module)


def _to_integers(module: nn.Module, bits: int, group: int, layers: Mapping[str, nn.Module]) -> None:
    with quiet_import("torchao int"):
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group),
        mapping_type=MappingType.ASYMMETRIC,
    )
    quantize_(module, config, filter_fn=lambda _, name: name in layers)


def _to_four_bits(module: Any, form: str, layers: Mapping[str, nn.Linear]) -> None:
    bnb = _bits_and_bytes()
    for name, layer in layers.items():
        weight = layer.weight.detach()
        made = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=weight.dtype,
            quant_type=form,
            device="meta",
        )
        made.weight = bnb.nn.Params4bit(
            weight.cpu().contiguous(),
            requires_grad=False,
            blocksize=_BLOCK,
            compress_statistics=True,
            quant_type=form,
        ).to(weight.device)
        made.bias = layer.bias
        module.set_submodule(name, made.train(layer.training))
    module.is_loaded_in_4bit = True  # what PEFT asks before it wraps such layers
    settle(module)


def _bits_and_bytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise missing("bitsandbytes", "bitsandbytes") from error
    return bitsandbytes


def settle(module: nn.Module) -> None:
    """Make a model that was loaded from quantised files compute with the numbers they mean.

    In place: what bitsandbytes would compute with inexactly on this device is held unpacked, and
    torchao's weights give numbers in the model's dtype, whatever they were saved from.
    """
    dtype = getattr(module, "dtype", torch.float32)
    for name, layer in list(module.named_modules()):
        weight: Any = getattr(layer, "weight", None)
        kind = type(weight).__name__
        if type(weight).__module__.startswith("torchao.") and weight.dtype != dtype:
            layer.weight = nn.Parameter(_torchao_in(weight, dtype), requires_grad=False)
        if kind not in ("Params4bit", "Int8Params") or weight.device.type != "cpu":
            continue
        # With it, the first run without gradients rounds the layer's scales to bf16 for good.
        layer.support_avx512bf16_for_cpu = False
        form, exact = _exact(layer, weight, kind)
        if exact is not None:
            module.set_submodule(name, _holding(layer, exact, form, dtype))


def _torchao_in(weight: Any, dtype: torch.dtype) -> Any:
    """A torchao weight that unpacks to ``dtype``; scales and zero points as they are, if it can."""
    if not hasattr(weight, "target_dtype"):
        return weight.to(dtype)
    names = [*weight.tensor_data_names, *weight.tensor_attribute_names]
    return type(weight)(**{name: getattr(weight, name) for name in names} | {"dtype": dtype})


def _exact(layer: Any, weight: Any, kind: str) -> tuple[str, Tensor | None]:
    """The form of a weight, and the numbers it means if its layer would use others."""
    if kind == "Int8Params":
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return "bitsandbytes int8", unpacked_int8(weight.data, scale)
    state = weight.quant_state
    if state is None:  # not quantised yet
        return "", None
    meant = unpacked(weight.data, state)
    used = _bits_and_bytes().functional.dequantize_4bit(weight.data, state)
    form = f"bitsandbytes {str(state.quant_type).upper()}"
    return form, None if used.equal(meant) else meant


def _holding(layer: Any, numbers: Tensor, form: str, dtype: torch.dtype) -> _Unpacked:
    """The layer in the place of one with a packed weight."""
    made = _Unpacked(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    numbers = numbers.to(getattr(layer, "compute_dtype", None) or dtype)
    made.weight = nn.Parameter(numbers, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    made.form = form
    return made.train(layer.training)
