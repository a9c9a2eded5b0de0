"""What the models of all tuners share: which modules are wrapped, and in what."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from regraft.errors import BadOption, WrongBase
from regraft.subspaces.reproducible import weight_hash
from regraft.tuners.config import TunerConfig
from regraft.tuners.layer import DeltaLayer, Kind, kind_of


class DeltaModel(BaseTuner):  # type: ignore[misc]
    """A model whose layers are :class:`DeltaLayer`; a subclass names its layer and its kinds."""

    tuner_layer_cls: type[DeltaLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    #: Which kinds of modules this tuner changes.
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "transposed", "conv")

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kw: Any) -> None:
        """As PEFT's, with a config of its own: what is noted there is of this model alone."""
        self.peft_config[adapter_name] = deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kw)

    def _check_merge_allowed(self) -> None:
        """As PEFT's.

        Raises
        ------
        BadOption
            Layers share a weight: each would run with the change of both, and unmerging would put
            back the wrong one.
        """
        super()._check_merge_allowed()
        layers = [m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls)]
        shared = Counter(id(layer.get_base_layer().weight) for layer in layers)
        if any(count > 1 for count in shared.values()):
            raise BadOption(
                "Layers with this adapter share one weight, so their changes cannot be merged.",
                fix="Untie them before training, or keep the adapter beside the base.",
            )

    def _create_and_replace(
        self,
        config: TunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            self._note_base(config, current_key, target)
            target.update_layer(adapter_name, config)
            return
        if isinstance(target, BaseTunerLayer) or kind_of(target) not in self.kinds:
            raise BadOption(
                f"{current_key} is a {type(target).__name__}, which {config.peft_type} does not "
                "change.",
                fix="Leave it out with target_modules or exclude_modules.",
            )
        layer = self.tuner_layer_cls(target, adapter_name)
        self._note_base(config, current_key, layer)
        layer.update_layer(adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def needs_hash(self, config: TunerConfig) -> bool:
        """Whether this adapter's file means something only on the very weights it was made on."""
        return False

    def _note_base(self, config: TunerConfig, module: str, layer: DeltaLayer) -> None:
        """Record the hash of the weight an adapter is made on; check it when it is loaded.

        Raises
        ------
        WrongBase
        """
        if not self.needs_hash(config) or not config.check_base:
            return
        found = weight_hash(layer.base_weight())
        said = config.base_hashes.get(module)
        if said is None or config.own_hashes:
            config.own_hashes = config.own_hashes or not config.base_hashes
            config.base_hashes[module] = found
        elif said != found:
            raise WrongBase(
                f"The weight of {module} is not the one that this {config.peft_type} adapter was "
                "trained on, and its file is meaningless on another (another precision counts as "
                "another).",
                fix="Load the base it was trained on, in the same dtype. check_base=False in the "
                "config loads it all the same, as an approximation.",
            )

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter in every layer; 1 is as trained."""
        for layer in self.model.modules():
            if isinstance(layer, self.tuner_layer_cls):
                layer.set_scale(adapter, scale)
