"""PEFT's other tuners, computed by PEFT: one layer hosted there, loaded, merged, and subtracted.

For types whose tensors are all in the module: ΔW = merged − W0, Δb likewise. Their equations are
PEFT's own, so the versions must agree; nothing is approximated. Not here: types with tensors that
layers share (VB-LoRA, UniLoRA, RandLoRA, Tiny-LoRA, FRoD, Lily), whose ΔW depends on the input
(X-LoRA, Poly, prompts), or that change the base first (OSF, PSOFT, KaSA).

Roles are the ends of PEFT's keys, such as ``hra_u``. ``fourierft`` and ``waveft`` draw their
positions from the config's seed, so a config is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.update import Dense
from regraft.errors import FamilyNotYet, MissingDependency, ShapeMismatch

if TYPE_CHECKING:
    from torch import nn

#: PEFT type → name, title, paper, equation, roles it needs, roles it may have.
_HOSTED: dict[str, tuple[str, str, str, str, tuple[tuple[str, ...], ...], tuple[str, ...]]] = {
    "HRA": ("hra", "HRA", "2405.17484", "W = W0 Π (I − 2 u uᵀ)", (("hra_u",),), ()),
    "C3A": ("c3a", "C3A", "2407.19342", "ΔW block-circulant", (("c3a_kernel",),), ()),
    "DELORA": (
        "delora",
        "DeLoRA",
        "2503.18225",
        "ΔW = (λ / r) B Ξ A ‖W0‖",
        (("delora_A", "delora_B", "delora_lambda"),),
        ("delora_w_norm",),
    ),
    "HIRA": (
        "hira",
        "HiRA",
        "",
        "ΔW = W0 ⊙ (B A)",
        (("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")),
        (),
    ),
    "FOURIERFT": (
        "fourierft",
        "FourierFT",
        "2405.03003",
        "ΔW = α Re F⁻¹(sparse)",
        (("fourierft_spectrum",),),
        (),
    ),
    "WAVEFT": (
        "waveft",
        "WaveFT",
        "2505.12532",
        "ΔW = λ W⁻¹(sparse)",
        (("waveft_spectrum",),),
        (),
    ),
    "ROAD": ("road", "RoAd", "2409.00119", "W = R W0", (("road_theta", "road_alpha"),), ()),
    "MISS": ("miss", "MiSS", "2409.15371", "ΔW from shards", (("miss_block",),), ()),
    "GRALORA": (
        "gralora",
        "GraLoRA",
        "2505.20355",
        "ΔW of k × k low-rank blocks",
        (("gralora_A", "gralora_B"),),
        ("gralora_A_general.weight", "gralora_B_general.weight"),
    ),
    "SHIRA": (
        "shira",
        "SHiRA",
        "2406.13175",
        "ΔW sparse",
        (("shira_weight", "shira_indices"),),
        (),
    ),
    "DEFT": ("deft", "DEFT", "", "W = (I − P Pᵀ) W0 + P R", (("deft_P", "deft_R"),), ()),
}
#: Types that change a layer's whole output, bias included.
_OUTPUTS = {"ROAD"}
#: Settings that speak of the whole model, not of one layer.
_MODEL_WIDE = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "revision", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices",
}  # fmt: skip
_ADAPTER = "hosted"
#: Sites are worked on in threads; what warnings are shown is one setting for all of them.
_ONE_AT_A_TIME = Lock()


def host(module: Module, kind: str, tensors: Mapping[str, Tensor]) -> Built:
    """The updates of one module by PEFT's own merge.

    Parameters
    ----------
    module : Module
        ``settings`` is PEFT's config; its name matters to the config's patterns.
    kind : str
        The ``peft_type``.
    tensors : mapping of the ends of PEFT's keys to tensors

    Raises
    ------
    FamilyNotYet
        There is no config.
    MissingDependency
        PEFT is not installed.
    """
    if not module.settings.get("peft_type"):
        raise FamilyNotYet(
            f"A {kind} file means nothing without its config.",
            fix="Put its adapter_config.json beside it.",
        )
    held = {
        end: tensor.float() if tensor.is_floating_point() else tensor
        for end, tensor in tensors.items()
    }
    bias = module.bias()

    def make(parameter: str) -> Tensor:
        return _merged(module, kind, held)[parameter]

    stored = next(iter(tensors.values())).dtype
    built: Built = {
        "weight": Dense(
            lambda: make("weight"),
            module.shape,
            module.layout,
            _rank({end: tuple(t.shape) for end, t in tensors.items()}),
            stored,
        )
    }
    if bias is not None and kind in _OUTPUTS:
        built["bias"] = Dense(lambda: make("bias"), tuple(bias.shape), stored=stored)
    return built


def _merged(module: Module, kind: str, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ΔW and Δb."""
    try:
        import peft
        from torch import nn
    except ImportError as error:
        raise MissingDependency(
            f"{kind} adapters are computed by PEFT, which is not installed.",
            fix="Install it: pip install peft.",
        ) from error
    layer = _layer(module, embedding=any("embedding" in end for end in held))
    weight, bias = layer.weight.detach().clone(), layer.bias
    bias = None if bias is None else bias.detach().clone()
    path = module.name.removeprefix("base_model.model.").split(".")
    root = inner = nn.Module()
    for part in path[:-1]:
        inner.add_module(part, nn.Module())
        inner = inner.get_submodule(part)
    inner.add_module(path[-1], layer)
    config = _config(peft, kind, module.settings, ".".join(path))
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about one-layer models, and names of our own
        model = peft.get_peft_model(root, config, adapter_name=_ADAPTER)
        prefix = f"base_model.model.{'.'.join(path)}"
        states = {f"{prefix}.{end}": tensor for end, tensor in held.items()}
        try:
            found = peft.set_peft_model_state_dict(model, states, adapter_name=_ADAPTER)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ShapeMismatch(
                f"The tensors of {module.name} do not fit a weight {module.shape} ({error})."
            ) from error
        lost = [key for key in found.missing_keys if f".{_ADAPTER}" in key]
        if lost or found.unexpected_keys:
            raise ShapeMismatch(f"PEFT finds the tensors of {module.name} incomplete.")
        merged = model.merge_and_unload().get_submodule(".".join(path))
    change = {"weight": (merged.weight.detach() - weight).reshape(module.shape)}
    if bias is not None:
        change["bias"] = merged.bias.detach() - bias
    return change


def _layer(module: Module, *, embedding: bool) -> Any:
    """A layer of the kind that PEFT knows, around the base's weight."""
    from torch import nn

    weight, bias = module.weight().float(), module.bias()
    shape = weight.shape
    layer: nn.Module
    if embedding:
        layer = nn.Embedding(*shape)
        layer.bias = None  # type: ignore[assignment]
    elif weight.ndim > 2:
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.ndim - 3]
        layer = conv(shape[1], shape[0], tuple(shape[2:]), bias=bias is not None)
    elif module.layout == "transposed":
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(shape[1], shape[0])
        bias = torch.zeros(shape[1]) if bias is None else bias
    else:
        layer = nn.Linear(shape[1], shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.float().clone())
    return layer


def _config(peft: Any, kind: str, settings: Mapping[str, Any], target: str) -> Any:
    from dataclasses import fields

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    known = {f.name for f in fields(made) if f.init} - _MODEL_WIDE - {"peft_type"}
    own = {key: value for key, value in settings.items() if key in known}
    return made(target_modules=[target], **own)


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    for end, axis in (("hra_u", 1), ("delora_A", 0), ("hira_A", 0), ("miss_block", 0)):
        if len(shapes.get(end, ())) > axis:
            return shapes[end][axis]
    return None


def _register(kind: str) -> None:
    name, title, paper, equation, needs, may = _HOSTED[kind]

    @family(
        name=name,
        title=title,
        paper=f"https://arxiv.org/abs/{paper}" if paper else "",
        equation=equation,
        needs=needs,
        may=may,
        marks={role for need in needs for role in need} | set(may),
        needs_base=True,
        rank=_rank,
    )
    def build(module: Module) -> Built:
        return host(module, kind, module.tensors)


for _kind in _HOSTED:
    _register(_kind)
