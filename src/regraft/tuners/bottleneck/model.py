"""Bottleneck adapters as a PEFT tuner: where they sit, and reading them off a model."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from regraft.errors import BadOption
from regraft.tuners.bottleneck.config import SITES, BottleneckConfig
from regraft.tuners.bottleneck.layer import BottleneckLayer, refuse_merging
from regraft.tuners.bottleneck.parts import Bottleneck


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """Wraps output projections (houlsby, pfeiffer) or feed-forward blocks (parallel)."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {k: v["houlsby"] for k, v in SITES.items()}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kw: Any) -> None:
        """As PEFT's; a diffusers model is known by its class, which PEFT does not look at."""
        config = self.peft_config[adapter_name]
        if config.target_modules is None and type(model).__name__ in SITES:
            config.target_modules = SITES[type(model).__name__][config.position]
        super().inject_adapter(model, adapter_name, *args, **kw)

    def _prepare_adapter_config(
        self, config: BottleneckConfig, model_config: dict[str, Any]
    ) -> BottleneckConfig:
        if config.target_modules is None:
            kind = model_config.get("model_type")
            found = SITES.get(str(kind), {}).get(config.position)
            if found is None:
                raise BadOption(
                    f"On which modules of a model of type {kind!r} a {config.position} adapter "
                    "sits is not known.",
                    fix="Name them in target_modules: output projections; for parallel, blocks "
                    "from the input of feed-forward to its output.",
                )
            config.target_modules = found if isinstance(found, str) else set(found)
        return config

    def _create_and_replace(
        self,
        config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
            return
        layer = BottleneckLayer(target, adapter_name)
        layer.update_layer(adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is set
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(
            child, BottleneckLayer
        ):  # unloading; PEFT's expects a weight, blocks have none
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> NoReturn:
        refuse_merging()


def bottlenecks(model: nn.Module, adapter_name: str = "default") -> dict[str, Bottleneck]:
    """The adapters that sit on a model, by module, detached.

    Parameters
    ----------
    model : nn.Module
        A ``PeftModel``, or a model they were injected into.
    adapter_name : str

    Returns
    -------
    dict of module name to Bottleneck
        Names as in the bare base.
    """
    return {
        (plain := name.removeprefix("base_model.model.")): layer.part(adapter_name, plain)
        for name, layer in model.named_modules()
        if isinstance(layer, BottleneckLayer) and adapter_name in layer.scaling
    }
