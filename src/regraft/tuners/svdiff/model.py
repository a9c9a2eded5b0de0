"""SVDiff on a whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from regraft.errors import BadOption
from regraft.tuners.config import TunerConfig, exactly
from regraft.tuners.layer import Kind, kind_of
from regraft.tuners.model import DeltaModel
from regraft.tuners.svdiff.layer import SVDiffLayer


class SVDiffModel(DeltaModel):
    """A model with SVDiff adapters: ``get_peft_model(model, SVDiffConfig())``."""

    prefix = "delta"
    tuner_layer_cls = SVDiffLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "transposed", "conv", "embedding", "vector")

    def needs_hash(self, config: TunerConfig) -> bool:
        return True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kw: Any) -> None:
        """As PEFT's; no target modules means all that can be changed."""
        config = self.peft_config[adapter_name]
        if config.target_modules is None:
            config = self.peft_config[adapter_name] = deepcopy(config)
            config.target_modules = exactly(self._all(model, config.modules_to_save or []))
        super().inject_adapter(model, adapter_name, *args, **kw)

    def _all(self, model: nn.Module, besides: Sequence[str]) -> list[str]:
        """The names of all modules with a weight of their own that this tuner changes.

        Not those that are trained whole, and not those that share a weight with another: each would
        change it for itself, and a merge cannot.
        """
        found: dict[str, int] = {}
        inside = tuple(f".{name}." for name in besides)
        for name, module in model.named_modules():
            if any(part in f".{name}." for part in inside):
                continue
            if isinstance(module, BaseTunerLayer):
                found[name] = id(module.weight)
                inside += (f".{name}.base_layer.",)
            elif name and kind_of(module) in self.kinds:
                found[name] = id(module.weight)
        shared = Counter(found.values())
        return [name for name, weight in found.items() if shared[weight] == 1]

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Make an adapter of the weighted sum of others' shifts, δ = Σ wᵢ δᵢ.

        Weights (1, 1) add two concepts, (1 − α, α) go from one to the other.

        Raises
        ------
        BadOption
            Unequal lengths, an unknown adapter, a name already taken, or adapters on different
            modules.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or len(adapters) != len(weights):
            raise BadOption(
                f"{len(weights)} weights for the adapters {', '.join(adapters)}"
                + (f", of which {', '.join(unknown)} is not loaded." if unknown else "."),
                fix="Give one weight for each adapter that is on the model.",
            )
        if adapter_name in self.peft_config:
            raise BadOption(f"There is an adapter {adapter_name} already.", fix="Name another.")
        layers = [m for m in self.model.modules() if isinstance(m, SVDiffLayer)]
        for layer in layers:
            have = [name in layer.delta for name in adapters]
            if any(have) != all(have):
                raise BadOption(
                    "The adapters change different modules.", fix="Combine those that agree."
                )
        config = deepcopy(self.peft_config[adapters[0]])
        config.inference_mode = False
        self.peft_config[adapter_name] = config
        for layer in layers:
            if adapters[0] in layer.delta:
                layer.update_layer(adapter_name, config)
                shifts = [layer.delta[name] * w for name, w in zip(adapters, weights, strict=True)]
                layer.delta[adapter_name].copy_(torch.stack(shifts).sum(dim=0))
