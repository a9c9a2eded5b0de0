"""What PEFT writes: its folder, its file alone, a state dict saved by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.wild.case import Case, Made
from tests.wild.made import peft
from tests.wild.pieces import random
from tests.wild.places import SD, Q
from tests.wild.worlds import world

CASES: list[Case] = []


def add(
    family: str,
    layer: str,
    make: Any,
    outcome: str = "exact",
    what: str = "",
    dialect: str = "peft",
) -> None:
    CASES.append(Case(family, dialect, layer, "PEFT", make, outcome, what))


def config(kind: str, *targets: str, **options: Any) -> Callable[[], Any]:
    """A PEFT config by its class name, made when it is asked for."""

    def make() -> Any:
        import peft as library

        plain = {"target_modules": list(targets)} if targets else {}
        return getattr(library, kind)(**plain, **options)

    return make


FEED = "model.layers.1.mlp.up_proj"
HEAD = "model.layers.1.self_attn.q_proj"
CONV1D = "transformer.h.1.attn.c_attn"
#: Kind of layer → base, component, target.
ON: dict[str, tuple[str, str, str]] = {
    "linear": ("llama", "", FEED),
    "1×1 conv": ("sd", "unet", SD["1×1 conv"].name),
    "3×3 conv": ("sd", "unet", SD["3×3 conv"].name),
    "embedding": ("llama", "", "model.embed_tokens"),
    "norm": ("llama", "", FEED),
    "Conv1D": ("gpt2", "", CONV1D),
}


def on(
    family: str,
    kinds: tuple[str, ...],
    cls: str,
    what: str = "",
    *,
    form: str = "folder",
    outcome: str = "exact",
    dialect: str = "peft",
    **options: Any,
) -> None:
    """One case for each kind of layer."""
    for kind in kinds:
        base, component, target = ON[kind]
        more = {"fan_in_fan_out": True} if kind == "Conv1D" and cls in _TURNED else {}
        make = peft(base, config(cls, target, **options, **more), component=component, form=form)
        add(family, kind, make, outcome, what, dialect)


_TURNED = ("LoraConfig", "VeraConfig", "IA3Config", "AdaLoraConfig", "HiraConfig")
ALL = ("linear", "1×1 conv", "3×3 conv", "embedding", "Conv1D")
LAYERS = ("linear", "1×1 conv", "3×3 conv")
R = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}

on("lora", ALL, "LoraConfig", **R)
on("rslora", ALL, "LoraConfig", use_rslora=True, **R)
on("dora", ALL, "LoraConfig", use_dora=True, **R)
add(
    "lora bias",
    "linear",
    peft(
        "sd",
        config("LoraConfig", f"{Q.replace('to_q', 'to_out.0')}", lora_bias=True, **R),
        component="unet",
    ),
    what="a layer with a bias",
)
add(
    "lora",
    "linear",
    peft(
        "llama",
        config(
            "LoraConfig",
            "q_proj",
            "v_proj",
            rank_pattern={"v_proj": 2},
            alpha_pattern={"layers.1.self_attn.q_proj": 7},
            **R,
        ),
    ),
    what="patterns",
)
on("loha", LAYERS, "LoHaConfig", r=3, alpha=5, init_weights=False)
on(
    "loha",
    ("3×3 conv",),
    "LoHaConfig",
    "effective",
    r=3,
    alpha=5,
    init_weights=False,
    use_effective_conv2d=True,
)
on("lokr", LAYERS, "LoKrConfig", r=3, alpha=5, init_weights=False)
on(
    "lokr",
    LAYERS,
    "LoKrConfig",
    "both halves products",
    r=2,
    alpha=5,
    decompose_both=True,
    init_weights=False,
)
on("ia3", ("linear",), "IA3Config", "inputs", feedforward_modules=[FEED])
on("ia3", ("linear", "Conv1D"), "IA3Config", "outputs", feedforward_modules=[])
on("ia3", ("1×1 conv", "3×3 conv"), "IA3Config", "outputs", feedforward_modules=[])
on("oft", ("linear", "1×1 conv", "3×3 conv", "embedding"), "OFTConfig", oft_block_size=4)
on("oft", ("linear",), "OFTConfig", "exact Cayley", oft_block_size=4, use_cayley_neumann=False)
on("boft", LAYERS, "BOFTConfig", boft_block_size=4)
on(
    "adalora",
    ("linear", "Conv1D"),
    "AdaLoraConfig",
    init_r=4,
    target_r=2,
    total_step=10,
    lora_alpha=5,
)
on("vera", ("linear", "Conv1D"), "VeraConfig", r=4)
on("glora", ("linear",), "GloraConfig", r=3)
on("pissa", ("linear", "Conv1D"), "LoraConfig", r=3, lora_alpha=5, init_lora_weights="pissa")
on("olora", ("linear",), "LoraConfig", r=3, lora_alpha=5, init_lora_weights="olora")
on(
    "whole",
    ("norm",),
    "LoraConfig",
    "modules_to_save, by the end of a name",
    modules_to_save=["norm"],
    **R,
)
add("ln-tuning", "norm", peft("llama", config("LNTuningConfig", "input_layernorm")))
for name, cls, options in (
    ("waveft", "WaveFTConfig", {"n_frequency": 8}),
    ("delora", "DeloraConfig", {"r": 3}),
    ("miss", "MissConfig", {"r": 4}),
    ("road", "RoadConfig", {"group_size": 8}),
    ("c3a", "C3AConfig", {"block_size": 8}),
):
    on(name, ("linear",), cls, **options)

on("hra", LAYERS, "HRAConfig", r=4)
on("hira", (*LAYERS, "embedding"), "HiraConfig", r=3)
on("fourierft", ("linear",), "FourierFTConfig", n_frequency=8)

# Beside the factors.
add(
    "whole",
    "bias",
    peft("gpt2", config("LoraConfig", "c_attn", bias="all", fan_in_fan_out=True, **R)),
    what='bias="all"',
)
add(
    "whole",
    "bias",
    peft("sd", config("LoraConfig", "to_out.0", bias="lora_only", **R), component="unet"),
    what='bias="lora_only"',
)
add(
    "whole",
    "linear",
    peft("llama", config("LoraConfig", "q_proj", modules_to_save=["lm_head"], **R)),
    what="modules_to_save",
)
add(
    "whole",
    "embedding",
    peft("llama", config("LoraConfig", "q_proj", modules_to_save=["embed_tokens"], **R)),
    what="modules_to_save",
)
add(
    "whole",
    "embedding",
    peft(
        "llama",
        config("LoraConfig", "q_proj", trainable_token_indices={"embed_tokens": [0, 3, 7]}, **R),
    ),
    what="trained tokens",
)
add(
    "whole",
    "norm",
    peft(
        "gpt2", config("LoraConfig", "c_attn", modules_to_save=["ln_f"], fan_in_fan_out=True, **R)
    ),
    what="modules_to_save",
)

# The file alone, and a state dict saved by hand: no config, so alpha is taken as the rank.
ALPHA_R = {"r": 3, "lora_alpha": 3, "init_lora_weights": False}
on(
    "lora",
    ("linear", "embedding", "Conv1D"),
    "LoraConfig",
    form="file",
    dialect="peft file",
    outcome="note: alpha is taken as the rank",
    **ALPHA_R,
)
on(
    "lora",
    ("linear", "Conv1D"),
    "LoraConfig",
    "saved by hand",
    form="named",
    dialect="peft file",
    outcome="note: alpha is taken as the rank",
    **ALPHA_R,
)
on(
    "dora",
    ("linear",),
    "LoraConfig",
    form="file",
    dialect="peft file",
    use_dora=True,
    outcome="note: alpha is taken as the rank",
    **ALPHA_R,
)


on(
    "lora",
    ("1×1 conv", "3×3 conv"),
    "LoraConfig",
    form="file",
    dialect="peft file",
    outcome="note: alpha is taken as the rank",
    **ALPHA_R,
)
for name, cls, options in (
    ("loha", "LoHaConfig", {"r": 3, "alpha": 3, "init_weights": False}),
    ("lokr", "LoKrConfig", {"r": 3, "alpha": 3, "init_weights": False}),
    ("ia3", "IA3Config", {"feedforward_modules": [FEED]}),
    ("oft", "OFTConfig", {"oft_block_size": 4}),
    ("boft", "BOFTConfig", {"boft_block_size": 4}),
):
    on(
        name,
        ("linear",),
        cls,
        form="file",
        dialect="peft file",
        outcome="note: alpha is taken as the rank",
        **options,
    )


def _qalora(folder: Path) -> Made:
    """PEFT's QA-LoRA needs a GPTQ layer: its forward pass by hand, on inputs pooled in groups."""
    import json

    base = world("llama")
    weight = base.parameter(f"{HEAD}.weight")
    torch.manual_seed(5)
    group, (m, n), r = 4, weight.shape, 2
    a, b = random(r, n // group), random(m, r)
    eye = torch.eye(n, dtype=torch.float64)
    pooled = eye.reshape(n, n // group, group).mean(-1) * (n / group)
    change = (pooled @ a.double().mT @ b.double().mT).mT * (5 / r)
    path = folder / "adapter_model.safetensors"
    inside = f"base_model.model.{HEAD}"
    save_file({f"{inside}.lora_A.weight": a, f"{inside}.lora_B.weight": b}, path)
    settings = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 5,
        "use_qalora": True,
        "qalora_group_size": group,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return Made(folder, base.path, {HEAD: change})


add("qa-lora", "linear", _qalora)


def _mixture(kind: str, *, rslora: bool) -> Callable[[Path], Made]:
    """PEFT's merge into the stacked experts, cut as the checkpoint stores them."""
    names = {"Mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
    block, gate, up, down = names.get(kind, ("mlp", "gate_proj", "up_proj", "down_proj"))
    wanted_parameters = ["experts.gate_up_proj", "experts.down_proj"]
    saved = peft(
        kind,
        config("LoraConfig", target_parameters=wanted_parameters, use_rslora=rslora, **R),
    )

    def make(folder: Path) -> Made:
        made = saved(folder)
        wanted = {}
        for name, change in made.wanted.items():
            layer, _, parameter = name.partition(".mlp.experts.")
            for e, own in enumerate(change):
                inside = f"{layer}.{block}.experts.{e}"
                if parameter == "down_proj":
                    wanted[f"{inside}.{down}"] = own
                else:
                    wanted[f"{inside}.{gate}"], wanted[f"{inside}.{up}"] = own.chunk(2)
        return Made(made.adapter, made.base, wanted)

    return make


for kind in ("Mixtral", "Qwen3Moe"):
    add("lora", "fused", _mixture(kind, rslora=False), what=f"experts of {kind}")
add("rslora", "fused", _mixture("Mixtral", rslora=True), what="experts of Mixtral")
