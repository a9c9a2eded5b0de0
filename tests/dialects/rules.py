"""How sd-scripts, musubi-tuner and ComfyUI apply a file to a model, restated as rules.

A state dict of the model as the tool runs it goes in, and the changed one comes out. Every key of
the file must be used: a key that no rule takes fails the test, as it would be a silent loss there.

Facts from kohya-ss/sd-scripts and kohya-ss/musubi-tuner ``networks/lora*.py`` (names, alpha), and
from ComfyUI's ``comfy/lora.py``, ``comfy/weight_adapter/lora.py``, ``comfy/supported_models.py``
(names of HunyuanVideo). Nothing here imports Regraft.
"""

from __future__ import annotations

import re

from torch import Tensor

State = dict[str, Tensor]


def _split(key: str) -> tuple[str, str]:
    """(module, role) of a key."""
    known = r"(.+?)\.(lora_(?:down|up|A|B)\.weight|alpha|diff|diff_b|w_norm|b_norm)"
    match = re.fullmatch(known, key)
    assert match, f"no reader knows the end of {key}"
    return match[1], match[2]


def _modules(file: State) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.items():
        module, role = _split(key)
        found.setdefault(module, {})[role] = tensor
    return found


def _lora(roles: dict[str, Tensor], like: Tensor) -> Tensor | None:
    for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        if f"{down}.weight" in roles:
            a, b = roles.pop(f"{down}.weight"), roles.pop(f"{up}.weight")
            alpha = float(roles.pop("alpha", a.shape[0]))
            product = b.float().flatten(1) @ a.float().flatten(1)
            return (alpha / a.shape[0] * product).reshape(like.shape)
    return None


def _apply(file: State, state: State, names: dict[str, str]) -> State:
    """``names``: what the file may call a parameter → the parameter."""
    changed = dict(state)

    def add(key: str, change: Tensor) -> None:
        assert changed[key].shape == change.shape, key
        changed[key] = changed[key] + change.float()

    for name, roles in _modules(file).items():
        assert name in names, f"lora key not loaded: {name}"
        key = names[name]
        bias = key.removesuffix(".weight") + ".bias"
        change = _lora(roles, state[key])
        if change is not None:
            add(key, change)
        if "w_norm" in roles:
            add(key, roles.pop("w_norm"))
            if "b_norm" in roles:  # looked for only beside w_norm
                add(bias, roles.pop("b_norm"))
        if "diff" in roles:
            add(key, roles.pop("diff"))
        if "diff_b" in roles:
            assert key.endswith(".weight")
            add(bias, roles.pop("diff_b"))
        assert not roles, f"keys of {name} not loaded: {sorted(roles)}"
    return changed


def kohya(file: State, state: State, prefix: str = "lora_unet_") -> State:
    """The names that trainers give: the prefix, and the module's path with underscores.

    A normalisation's parameter may be called scale (ComfyUI's ``weight``).
    """
    names: dict[str, str] = {}
    for key in state:
        if key.endswith((".weight", ".scale")):
            name = prefix + key.rpartition(".")[0].replace(".", "_")
            assert name not in names, name
            names[name] = key
    return _apply(file, state, names)


_HUNYUAN = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.weight"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.weight"),
    (".q_norm.weight", ".norm.query_norm.weight"),
    (".k_norm.weight", ".norm.key_norm.weight"),
    ("_attn_proj.", "_attn.proj."),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
)
_HUNYUAN_OLD = (
    ("_mod.lin.", "_mod.linear."),
    ("_attn.qkv.", "_attn_qkv."),
    ("_attn.proj.", "_attn_proj."),
    ("mlp.0.", "mlp.fc1."),
    ("mlp.2.", "mlp.fc2."),
    (".modulation.lin.", ".modulation.linear."),
)


def _replaced(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def comfyui_names(keys: list[str], model: str) -> dict[str, str]:
    """A parameter of the original code → ComfyUI's own name for it."""
    if model == "hunyuan-video":
        return {k: _replaced(k, _HUNYUAN) for k in keys}
    flux = r"((?:query|key)_norm|distilled_guidance_layer\.norms\.\d+)\.scale$"
    return {k: re.sub(flux, r"\1.weight", k) for k in keys}


def comfyui(file: State, state: State, model: str = "", front: str = "diffusion_model.") -> State:
    """``front`` and the path without ``.weight``; other parameters of the denoiser in full."""
    own = comfyui_names(list(state), model)
    inside = {own[k]: v for k, v in state.items()}
    names: dict[str, str] = {}
    for key in inside:
        if key.endswith(".weight"):
            names[front + key.removesuffix(".weight")] = key
            names["lora_unet_" + key.removesuffix(".weight").replace(".", "_")] = key
            if model == "hunyuan-video":
                old = _replaced(key, _HUNYUAN_OLD).removesuffix(".weight")
                names[front + old] = key
        elif front == "diffusion_model.":
            names[front + key] = key
    changed = _apply(file, inside, names)
    return {k: changed[own[k]] for k in state}
