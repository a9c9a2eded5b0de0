"""Which tensors of a checkpoint are one quantised weight: every format is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from regraft.bases.quantised import (
    awq,
    bits_and_bytes,
    compressed,
    gguf_tensors,
    gptq,
    quanto,
    scaled,
    torch_ao,
)
from regraft.bases.quantised.packed import Names, Packed, malformed, settings, transposed
from regraft.bases.quantised.refused import refuse, refuse_unknown
from regraft.files.gguffile import GGUFFile

#: A format: names, dtypes, shapes and JSON in, its weights out.
Format = Callable[[Names], Iterator[Packed]]
#: Safetensors formats. No tensor is claimed by two.
_FORMATS: tuple[Format, ...] = (
    bits_and_bytes.find,
    torch_ao.find,
    quanto.find,
    compressed.find,
    scaled.find,
    gptq.find,
    awq.find,
)
#: Models whose Conv1D layers, stored (in, out), quantising libraries replace by linear ones.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt")
_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".q_attn.weight")
#: Ends of names that only parts of a quantised weight have. One left over is a damaged weight:
#: reading its neighbour as plain numbers would be wrong.
_MATES: tuple[str, ...] = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".SCB",
    ".qzeros",
)
_MATES += (".g_idx", ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
_MATES += (".weight._data", ".weight._scale", ".weight._shift", "._weight_qdata")
_MATES += (".scale_weight", ".weight_scale", ".weight_scale_inv", "__nf4", "__fp4")
_LINEAR_ONLY = ("bitsandbytes", "GPTQ", "AWQ")


@dataclass(frozen=True)
class Recognised:
    """``weights`` by the name of their codes; ``mates`` are tensors that are no parameters."""

    weights: dict[str, Packed]
    mates: frozenset[str]


def recognise(tensors: Names) -> Recognised:
    """The quantised weights of a checkpoint, and the tensors that belong to them.

    Reads names and headers, the JSON beside and in the file, and what little of the data holds a
    shape (bitsandbytes' quant_state, compressed-tensors' weight_shape).

    Raises
    ------
    MalformedFile
        Parts of a weight are missing or contradict each other.
    NotABase
        A format that is recognised but not read, or integers that are of no known format.
    """
    refuse(tensors)
    weights: dict[str, Packed] = {}
    mates = set(scaled.marks(tensors))
    ggufs = [f for f in tensors.values() if isinstance(f, GGUFFile)]
    for find in _FORMATS if not ggufs else (gguf_tensors.find,):
        for packed in find(tensors):
            claimed = {tensor for _, tensor in packed.stored} | set(packed.mates)
            twice = claimed & (mates | weights.keys())
            if twice:
                raise malformed(
                    packed.form, packed.file, min(twice), "another weight has this part as well"
                )
            weights[packed.tensor] = _as_the_model_has_it(packed)
            mates |= claimed - {packed.tensor}
    for tensor, file in tensors.items():
        info = file[tensor]
        if tensor.endswith(_MATES) and tensor not in mates and tensor not in weights:
            raise malformed("quantised", file, tensor, "the checkpoint lacks its codes")
        matrix = tensor.endswith((".weight", ".qweight")) and len(info.shape) >= 2
        known = tensor in weights or tensor in mates or isinstance(file, GGUFFile)
        if matrix and not known and not info.dtype.is_floating_point:
            refuse_unknown(file, tensor)
    return Recognised(weights, frozenset(mates))


def _as_the_model_has_it(packed: Packed) -> Packed:
    conv1d = packed.name.endswith(_CONV1D) and packed.form.startswith(_LINEAR_ONLY)
    if conv1d and settings(packed.file).get("model_type") in _CONV1D_MODELS:
        return transposed(packed)
    return packed
