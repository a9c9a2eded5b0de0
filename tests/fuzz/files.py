"""Valid adapter files of many families and dialects, and the ways in which cases spoil them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from regraft.files import serialize

#: Modules of the tiny base: (component, module) → the weight's shape.
UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (16, 12),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (24, 16),
    "mid_block.resnets.0.conv1": (12, 8, 3, 3),
    "mid_block.attentions.0.proj_in": (16, 16, 1, 1),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": (16, 16),
    "text_model.encoder.layers.1.mlp.fc1": (24, 16),
}
SITES = {("unet", m): s for m, s in UNET.items()} | {
    ("text_encoder", m): s for m, s in TEXT.items()
}


@dataclass
class Case:
    """The content of one adapter file, before it is written."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None

    def write(self, folder: Path) -> Path:
        """Write it; the path to give to Regraft."""
        folder.mkdir(exist_ok=True)
        path = folder / "adapter_model.safetensors"
        beside = folder / "adapter_config.json"
        beside.unlink(missing_ok=True)
        serialize(path, self.tensors, self.metadata)
        if self.config is not None:
            beside.write_text(json.dumps(self.config))
        return path


def save_base(folder: Path, seed: int) -> Path:
    """A tiny pipeline: the U-Net's and the text encoder's sites, with biases and a norm."""
    generator = torch.Generator().manual_seed(seed)
    for component, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        tensors = {}
        for (own, module), shape in SITES.items():
            if own == component:
                tensors[f"{module}.weight"] = torch.randn(shape, generator=generator)
                tensors[f"{module}.bias"] = torch.randn(shape[0], generator=generator)
        if component == "unet":
            tensors["mid_block.resnets.0.norm1.weight"] = torch.ones(8)
            tensors["mid_block.resnets.0.norm1.bias"] = torch.zeros(8)
        (folder / component).mkdir(parents=True)
        serialize(folder / component / f"{file}.safetensors", tensors, {})
    return folder


def _pair(shape: tuple[int, ...], r: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    ones = [1] * (len(shape) - 2)
    return torch.randn(r, *shape[1:], generator=g), torch.randn(shape[0], r, *ones, generator=g)


def family_tensors(family: str, shape: tuple[int, ...], g: torch.Generator) -> dict[str, Tensor]:
    """Suffix → tensor of one module (kohya's and LyCORIS's suffixes; PEFT's for LoRA)."""
    r, m = 2, shape[0]
    flat = torch.Size(shape[1:]).numel()

    def n(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    down, up = _pair(shape, r, g)
    alpha = {"alpha": torch.tensor(1.5)}
    lora = {"lora_down.weight": down, "lora_up.weight": up, **alpha}
    loha = {
        "hada_w1_a": n(m, r),
        "hada_w1_b": n(r, flat),
        "hada_w2_a": n(m, r),
        "hada_w2_b": n(r, flat),
        **alpha,
    }
    lokr = {"lokr_w1": n(4, 4), "lokr_w2": n(m // 4, shape[1] // 4, *shape[2:])}
    kinds: dict[str, dict[str, Tensor]] = {
        "lora": lora,
        "peft": {"lora_A.weight": down, "lora_B.weight": up},
        "locon": {
            "lora_down.weight": n(r, shape[1], *[1] * (len(shape) - 2)),
            "lora_mid.weight": n(r, r, *shape[2:]),
            "lora_up.weight": up,
            **alpha,
        }
        if len(shape) > 2
        else lora,
        "dora": {**lora, "dora_scale": n(m, *[1] * (len(shape) - 1)).abs()},
        "dora input": {**lora, "dora_scale": n(1, shape[1], *[1] * (len(shape) - 2)).abs()},
        "loha": loha,
        "lokr": lokr,
        "lokr factored": {
            "lokr_w1_a": n(4, r),
            "lokr_w1_b": n(r, 4),
            "lokr_w2_a": n(m // 4, r),
            "lokr_w2_b": n(r, shape[1] // 4 * (flat // shape[1])),
            **alpha,
        },
        "full": {"diff": n(*shape), "diff_b": n(m)},
        "bias": {"diff_b": n(m)},
        "lora and bias": {**lora, "diff_b": n(m)},
        "ia3": {"weight": n(m, *[1] * (len(shape) - 1)), "on_input": torch.tensor(False)},
        "oft": {"oft_blocks": n(4, m // 4, m // 4), "alpha": torch.tensor(0.1)},
        "glora": {
            "a1.weight": n(r, shape[1]),
            "a2.weight": n(shape[1], r),
            "b1.weight": n(r, shape[1]),
            "b2.weight": n(m, r),
            **alpha,
        },
        "lora-x": {"lora_x_U": n(m, r), "lora_x_S": n(r), "lora_x_V": n(flat, r)},
        "svdiff": {"delta": n(min(m, flat))},
    }
    return kinds[family]


FAMILIES = (
    "lora", "peft", "locon", "dora", "dora input", "loha", "lokr", "lokr factored", "full", "bias",
    "lora and bias", "ia3", "oft", "glora", "lora-x", "svdiff",
)  # fmt: skip
DIALECTS = ("kohya", "diffusers", "peft", "comfyui")


def name_in(dialect: str, component: str, module: str) -> str:
    """A module's name in a dialect."""
    if dialect == "kohya":
        front = "lora_unet_" if component == "unet" else "lora_te_"
        return front + module.replace(".", "_")
    if dialect == "comfyui":
        front = "diffusion_model." if component == "unet" else "text_encoders.clip_l.transformer."
        return front + module
    return ("base_model.model." if dialect == "peft" else f"{component}.") + module


def make(families: list[str], dialect: str, sites: list[int], seed: int) -> Case:
    """A valid file: the sites numbered, the families in turn."""
    g = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    places = list(SITES.items())
    for i, index in enumerate(dict.fromkeys(sites)):
        (component, module), shape = places[index % len(places)]
        if dialect == "peft" and component != "unet":
            continue
        name = name_in(dialect, component, module)
        for suffix, tensor in family_tensors(families[i % len(families)], shape, g).items():
            tensors[f"{name}.{suffix}"] = tensor
    config = None
    if dialect == "peft":
        kind = families[0].split()[0].upper()
        kind = kind if kind in ("LOHA", "LOKR", "OFT", "IA3") else "LORA"
        config = {"peft_type": kind, "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}
    metadata = {"ss_network_dim": "2", "modelspec.title": "x"}
    if dialect == "diffusers" and seed % 2:
        own = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {}}
        metadata["lora_adapter_metadata"] = json.dumps(own)
    return Case(tensors, metadata, config)


JUNK_TEXT = (
    "", "\x1b[31mred", "{", "[]", "null", "NaN", '{"r": {}}', "[" * 5000, "\u202e", "1e999",
    "x" * 9999,
    '{"unet.r": 2, "unet.lora_alpha": "a"}', '{"r": 2, "lora_alpha": NaN}', '{"a": {"b": [1]}}',
    '{"peft_type": "LORA", "r": 2, "alpha_pattern": {"(": 3}}', "lora-x/2",
)  # fmt: skip
META_KEYS = (
    "lora_adapter_metadata", "regraft", "regraft.format", "ss_tag_frequency", "ss_dataset_dirs",
    "ss_network_args", "ss_network_alpha", "ss_network_dim", "ss_network_module", "sshs_model_hash",
    "modelspec.architecture", "ss_base_model_version", "format", "modelspec.trigger_phrase",
)  # fmt: skip
CONFIG_KEYS = (
    "r", "lora_alpha", "alpha", "alpha_pattern", "rank_pattern", "target_modules", "peft_type",
    "use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "bias", "init_lora_weights",
    "task_type", "base_model_name_or_path", "exclude_modules", "lora_bias", "decompose_both",
)  # fmt: skip
JUNK_VALUES: tuple[Any, ...] = (
    None, 0, -1, 2, 2.5, 1e308, 10**400, "", "2", "nan", True, [], [1], {}, {"": 3}, {"(": 3},
    {"a": None},
    {".*to_q": 4}, {"(a+)+$": 4}, [["a"]], {"a": {"b": 1}}, "LOHA", "LOKR", "OFT", "IA3", "pissa",
)  # fmt: skip
SUFFIXES = (
    "lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "lora_mid.weight",
    "alpha",
    "dora_scale", "lora_magnitude_vector", "hada_w1_a", "lokr_w1", "lokr_w2", "lokr_t2", "diff",
    "diff_b", "w_norm", "on_input", "weight", "oft_blocks", "lora_x_S", "delta", "unheard_of",
    "set_weight", "lora_E", "reshape_weight", "bias", "lora_B.bias", "foura_mask",
    "boft_R", "rescale",
)  # fmt: skip
DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.int64,
)  # fmt: skip
ALPHAS = (
    torch.tensor(0.0), torch.tensor(float("nan")), torch.tensor(-3.0), torch.tensor(float("inf")),
    torch.ones(3), torch.ones(0), torch.tensor(4), torch.tensor(True), torch.tensor(1e38),
    torch.tensor(1e-45), torch.ones(1, 1), torch.tensor(200.0).to(torch.float8_e5m2),
)  # fmt: skip


def spoil(case: Case, rng: Random) -> None:
    """Change one thing in place."""
    kinds = [_drop, _rename, _second_role, _shape, _dtype, _alpha, _value, _meta, _config, _extra]
    if case.config is not None:
        kinds += [_config] * 4
    rng.choice(kinds)(case, rng)


def _key(case: Case, rng: Random) -> str:
    return rng.choice(sorted(case.tensors)) if case.tensors else ""


def _drop(case: Case, rng: Random) -> None:
    if len(case.tensors) > 1:
        case.tensors.pop(_key(case, rng))


def _rename(case: Case, rng: Random) -> None:
    if not (key := _key(case, rng)):
        return
    tensor, where = case.tensors.pop(key), rng.randrange(len(key))
    how = rng.randrange(5)
    if how == 0:
        key = key[:where] + rng.choice("._x0\x1b\u202e ") + key[where + 1 :]
    elif how == 1:
        key = key[:where] + key[where + 1 :]
    elif how == 2:
        key = key[where:]
    elif how == 3:
        key = f"{key.split('.')[0]}.{rng.choice(SUFFIXES)}"
    else:
        key = key.replace(rng.choice(["0", "attn1", "unet", "lora_"]), rng.choice(["9", "", "te_"]))
    case.tensors[key or "x"] = tensor


def _second_role(case: Case, rng: Random) -> None:
    if key := _key(case, rng):
        module = key
        for suffix in sorted(SUFFIXES, key=len, reverse=True):
            module = module.removesuffix(f".{suffix}")
        case.tensors[f"{module}.{rng.choice(SUFFIXES)}"] = case.tensors[key].clone()


def _shape(case: Case, rng: Random) -> None:
    if not (key := _key(case, rng)):
        return
    tensor = case.tensors[key]
    size = rng.choice([0, 1, 2, 3, 5, 16])
    options = [
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor[..., None, None],
        lambda: tensor.mT.contiguous() if tensor.ndim > 1 else tensor.reshape(-1, 1),
        lambda: tensor[:size].clone() if tensor.ndim else tensor.reshape(1),
        lambda: tensor[..., :size].clone() if tensor.ndim else tensor.reshape(1, 1),
        lambda: torch.ones(size, size),
        lambda: torch.ones([size] * rng.randrange(5)),
        lambda: torch.tensor(1.0),
    ]
    case.tensors[key] = rng.choice(options)().contiguous()


def _dtype(case: Case, rng: Random) -> None:
    if key := _key(case, rng):
        case.tensors[key] = case.tensors[key].to(rng.choice(DTYPES))


def _alpha(case: Case, rng: Random) -> None:
    keys = [k for k in case.tensors if k.endswith(".alpha")]
    key = rng.choice(keys) if keys else f"{_key(case, rng).split('.')[0]}.alpha"
    case.tensors[key] = rng.choice(ALPHAS).clone()


def _value(case: Case, rng: Random) -> None:
    if (key := _key(case, rng)) and case.tensors[key].is_floating_point():
        value = rng.choice([0.0, float("nan"), float("inf"), 1e30, 1e-30])
        tensor = case.tensors[key].float().clone()
        flat = tensor.view(-1)
        flat[: rng.choice([1, flat.numel()])] = value
        case.tensors[key] = tensor


def _meta(case: Case, rng: Random) -> None:
    case.metadata[rng.choice(META_KEYS)] = rng.choice(JUNK_TEXT)


def _config(case: Case, rng: Random) -> None:
    case.config = {**(case.config or {}), rng.choice(CONFIG_KEYS): rng.choice(JUNK_VALUES)}


def _extra(case: Case, rng: Random) -> None:
    front = rng.choice(
        ["lora_unet_x", "unet.none", "base_model.model.lm_head", "", "clip_l", "a.b"]
    )
    case.tensors[f"{front}.{rng.choice(SUFFIXES)}"] = torch.ones(2, 3)
