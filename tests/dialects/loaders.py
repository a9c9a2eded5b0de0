"""The judges: what PEFT's and diffusers' own loaders make of a file."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.adapters import Adapter, LowRank, Site, delta, matrix_shape
from regraft.bases import Base
from regraft.dialects import write_adapter
from regraft.dialects.write import Written
from tests.factories import UNET_1X1, UNET_3X3, UNET_LINEAR

#: diffusers recognises a text encoder's kohya names only if an out_proj is among them.
TEXTS = [f"text_model.encoder.layers.1.{m}" for m in ("self_attn.q_proj", "self_attn.out_proj",
                                                     "mlp.fc1")]  # fmt: skip
UNET = (UNET_LINEAR, UNET_1X1, UNET_3X3, "down_blocks.0.downsamplers.0.conv", "conv_in",
        "up_blocks.0.upsamplers.0.conv", "time_embedding.linear_1")  # fmt: skip


def sites_of(base, modules, *components):
    return {
        **{f"unet.{m}": 3 for m in modules},
        **{f"{c}.{m}": 2 for c in components for m in TEXTS},
    }


PROVENANCE = {
    "adapter": {"sha256": "ab" * 32, "name": "style"},
    "source": {"name": "org/source"},
    "target": {"name": "org/target"},
    "method": "copy",
    "energy_kept": 1.0,
    "versions": {"regraft": "0.1.0"},
}


def deltas_in(model: nn.Module) -> dict[str, Tensor]:
    """Module name → ΔW, by PEFT's own ``get_delta_weight``, of every LoRA layer of a model."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                if adapter in module.r:
                    found[name] = module.get_delta_weight(adapter).detach()
    return found


def with_deltas(model: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    """A copy of a plain model with ΔW added to its weights."""
    changed = copy.deepcopy(model)
    for name, value in deltas.items():
        changed.get_submodule(name).weight.data += value
    return changed


def judge_peft(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Load a PEFT folder on a copy of ``model`` and give its ΔW."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # A warning about missing or unexpected keys must fail the test.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found)")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    return deltas_in(loaded.base_model.model)


def pipeline(unet: nn.Module, *encoders: nn.Module) -> Any:
    """A diffusers pipeline without VAE and tokenizer, from copies of the models."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    rest = {
        "vae": None,
        "tokenizer": None,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    models = [copy.deepcopy(m) for m in (unet, *encoders)]
    if len(encoders) == 2:
        return StableDiffusionXLPipeline(
            unet=models[0], text_encoder=models[1], text_encoder_2=models[2], tokenizer_2=None,
            add_watermarker=False, **rest,
        )  # fmt: skip
    return StableDiffusionPipeline(
        unet=models[0],
        text_encoder=models[1],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **rest,
    )


def judge_diffusers(pipe: Any, file: Path) -> dict[str, Tensor]:
    """Load a LoRA file with the pipeline's own loader and give ΔW by component and module."""
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    found = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, value in (deltas_in(model) if model is not None else {}).items():
            found[f"{component}.{canonical(component, name)}"] = value
    return found


def canonical(component: str, name: str) -> str:
    """transformers 5 leaves out CLIP's wrapper, adapter files keep it."""
    bare = component.startswith("text_encoder") and not name.startswith("text_model.")
    return f"text_model.{name}" if bare else name


def random_adapter(
    base: Base,
    modules: dict[str, int],
    *,
    scale: float = 0.75,
    layouts: dict[str, str] | None = None,
    **fields: Any,
) -> Adapter:
    """An adapter with random factors; ``modules`` gives the rank of each site by its text."""
    generator = torch.Generator().manual_seed(0)
    updates = {}
    sites = {str(site): site for site in base.weights}
    for i, (text, rank) in enumerate(modules.items()):
        site: Site = sites[text]
        shape = base.weights[site].shape
        m, n = matrix_shape(shape)
        layout: Any = (layouts or {}).get(text, "conv" if len(shape) > 2 else "linear")
        up = torch.randn(m, rank, generator=generator) * 0.3
        down = torch.randn(rank, n, generator=generator) * 0.3
        updates[site] = LowRank(up, down, scale * (1 + i), shape, layout)
    return Adapter(updates, name="style", sha256="ab" * 32, **fields)


def deltas_of(adapter: Adapter, *, component: bool = True) -> dict[str, Tensor]:
    """Site (with or without its component) → ΔW, as Regraft has it."""
    return {
        str(site) if component else site.module: delta(update)
        for site, update in adapter.updates.items()
    }


def write(adapter: Adapter, base: Base, out: Path, dialect: str, **options: Any) -> Written:
    """``write_adapter`` with the usual arguments."""
    options.setdefault("dtype", torch.float32)
    options.setdefault("provenance", PROVENANCE)
    return write_adapter(adapter, base, out, dialect=dialect, **options)


def assert_same(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Same names, same ΔW."""
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        error = float((found[name].float() - value.float()).abs().max())
        assert error <= tolerance, f"{name}: {error}"
        assert float(value.abs().max()) > 1e-3, f"{name}: nothing to compare"
