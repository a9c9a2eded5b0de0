"""The tiny real models that the catalogue's files are made for, saved once and shared."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lab.native_models import ARCHITECTURES
from lab.native_names import build
from tests.factories import TINY_SD, TINY_XL, clip, gpt2, llama, save, unet


@dataclass(frozen=True)
class World:
    """A saved base, its models by component ("" for a bare one), and all its parameters by site."""

    path: Path
    models: dict[str, nn.Module]

    def parameter(self, name: str) -> Tensor:
        """A parameter by its site's text and ``.weight`` or ``.bias``."""
        component = next((c for c in self.models if c and name.startswith(f"{c}.")), "")
        state = self.models[component].state_dict()
        inside = name.removeprefix(f"{component}.") if component else name
        found = state.get(inside)
        # transformers 5 leaves out CLIP's wrapper, adapter files keep it.
        found = state[inside.removeprefix("text_model.")] if found is None else found
        return found.detach().float()


@cache
def _room() -> Path:
    room = Path(tempfile.mkdtemp(prefix="regraft-wild-"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    return room


def t5(seed: int = 0) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        vocab_size=30,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def mixture(kind: str, seed: int = 0) -> nn.Module:
    """A language model whose experts are stacked in memory and stored one by one."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 40,
        "max_position_embeddings": 16,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    count = {"num_local_experts": 3} if kind == "Mixtral" else {"num_experts": 3, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(**sizes, **count)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def _filled(model: nn.Module) -> nn.Module:
    """No parameter is all zero, so that what multiplies one can be told from nothing."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data = torch.randn_like(parameter) * 0.1
    return model


def _language(model: nn.Module, name: str) -> World:
    _filled(model)
    return World(save(model, _room() / name), {"": model})


@cache
def world(name: str) -> World:
    """The base called ``name``: a U-Net pipeline, a language model, or a transformer pipeline."""
    folder = _room() / name
    if name in ("llama", "gpt2"):
        return _language({"llama": llama, "gpt2": gpt2}[name](), name)
    if name in ("Mixtral", "Qwen3Moe"):
        return _language(mixture(name), name)
    if name == "llama-tied":
        model = llama()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return _language(model, name)
    if name in ("sd", "xl"):
        models = {"unet": unet(TINY_XL if name == "xl" else TINY_SD), "text_encoder": clip()}
        if name == "xl":
            models["text_encoder_2"] = clip(1, projection=True)
    else:
        class_name, config = ARCHITECTURES[name].models[0]
        models = {"transformer": build(class_name, config)}
        if name in ("flux", "sd3"):
            models["text_encoder"] = clip()
        if name == "sd3":
            models |= {"text_encoder_2": clip(1, projection=True), "text_encoder_3": t5()}
        if name == "flux":
            models["text_encoder_2"] = t5()
    for component, model in models.items():
        save(_filled(model), folder / component)
    (folder / "model_index.json").write_text("{}")
    return World(folder, models)
