"""An insert on a running base, for the length of a ``with`` block; and a random one for control.

PEFT hosts it: prompts and prefixes through its causal language model, bottlenecks through
:mod:`regraft.tuners`. What reads the base reads the hosted one the same way, token for token.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regraft.adapters import Site
from regraft.errors import BadData, BadOption, CannotRun, ShapeMismatch, SitesNotInBase
from regraft.inserts.insert import Insert, InsertAdapter, KeysValues, Prompt
from regraft.inserts.tables import of_one_width, prefix_table
from regraft.running import Language, Model, optional
from regraft.tuners.bottleneck.parts import Bottleneck, to_tensors

M = TypeVar("M", bound=Model)
_NAME = "default"


@contextmanager
def attached(model: M, adapter: InsertAdapter, strength: float = 1.0) -> Iterator[M]:
    """The model with the insert on it inside the block.

    After it the model is what it was: the same modules and weights, bit for bit, and nothing of
    PEFT; also after an error. Inside, a language model's logits have one row per token of the
    input: those of virtual tokens are cut off.

    Parameters
    ----------
    model : Model
    adapter : InsertAdapter
        On this base's sites.
    strength : float
        Of bottlenecks, 1.0 as trained. Prompts and prefixes have none but 1.

    Raises
    ------
    BadOption
        A strength other than 1 of a prompt or a prefix.
    CannotRun
        The model holds another insert already, or a prompt or prefix is put on a model that is no
        language model.
    SitesNotInBase, ShapeMismatch
        It does not fit the model.
    BadData
        Inside: an input is too long for the model's learned positions.
    MissingDependency
    """
    if adapter.family == "bottleneck":
        with _bottlenecks(model, adapter, strength):
            yield model
        return
    if strength != 1.0:
        raise BadOption(
            f"A {adapter.family} has no strength: it is there or it is not.",
            fix="Measure it at strength 1.",
        )
    if not isinstance(model, Language):
        raise CannotRun(
            f"A {adapter.family} sits on a language model, and {model.ref} is none.",
            fix="Is this the base that it was made for?",
        )
    base = model.model
    if isinstance(base, _Hosted):
        raise CannotRun(f"{model.ref} holds an insert already.", fix="Take it off first.")
    with _as_before(base):
        hosted = _Hosted(_prompted(base, adapter), own_rows=adapter.family == "prompt")
        try:
            model.model = model.modules[""] = hosted
            yield model
        finally:
            model.model = model.modules[""] = base


class _Hosted(nn.Module):
    """PEFT's model, with the face of the bare one."""

    def __init__(self, hosted: Any, own_rows: bool) -> None:
        super().__init__()
        self.hosted = hosted
        self._own_rows = own_rows
        self._tokens = int(hosted.active_peft_config.num_virtual_tokens)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "hosted":
                raise
            return getattr(self.hosted, name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        self._check_length(input_ids.shape[1])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output = self.hosted(input_ids=input_ids, attention_mask=mask, **more)
        if self._own_rows:
            output.logits = output.logits[:, self._tokens :]
        return output

    def generate(self, input_ids: Tensor, **more: Any) -> Any:
        """As the bare model's: the answer follows the input, without the virtual tokens."""
        self._check_length(input_ids.shape[1] + int(more.get("max_new_tokens") or 0))
        with warnings.catch_warnings():
            # Of positions that PEFT makes itself.
            warnings.simplefilter("ignore")
            return self.hosted.generate(input_ids=input_ids, **more)

    def _check_length(self, tokens: int) -> None:
        """Learned positions end; rotary ones do not."""
        base = self.hosted.get_base_model()
        context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        if context is None or tokens + self._tokens <= context:
            return
        words = base.get_input_embeddings()
        tables = (m for m in base.modules() if isinstance(m, nn.Embedding) and m is not words)
        if any(context <= table.num_embeddings <= context + 2 for table in tables):
            raise BadData(
                f"An input of {tokens} tokens and {self._tokens} virtual ones do not fit the "
                f"model's {context} positions.",
                fix="Give shorter texts.",
            )


def _prompted(base: Any, adapter: InsertAdapter) -> Any:
    """PEFT's model of a prompt or a prefix on a bare language model."""
    with optional("Putting an insert on a model"):
        from peft import PeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig

    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "inference_mode": True}
    config: Any
    if adapter.family == "prompt":
        (part,) = adapter.parts.values()
        assert isinstance(part, Prompt)
        table = part.vectors
        width = base.get_input_embeddings().weight.shape[1]
        if table.shape[1] != width:
            raise ShapeMismatch(
                f"The prompt is {table.shape[1]} wide and the embedding of the model {width}."
            )
        config = PromptTuningConfig(num_virtual_tokens=len(table), token_dim=width, **common)
    else:
        parts = [p for p in adapter.parts.values() if isinstance(p, KeysValues)]
        heads, tokens, width = parts[0].keys.shape
        table = prefix_table(parts)
        config = PrefixTuningConfig(
            num_virtual_tokens=tokens,
            token_dim=heads * width,
            num_attention_heads=heads,
            num_layers=len(parts),
            **common,
        )
    with warnings.catch_warnings():
        # PEFT asks transformers by an old name.
        warnings.simplefilter("ignore")
        hosted: Any = PeftModelForCausalLM(base, config, _NAME)
    held = hosted.prompt_encoder[_NAME].embedding.weight
    layers = base.config.get_text_config().num_hidden_layers
    if held.shape != table.shape or (adapter.family == "prefix" and len(adapter.parts) != layers):
        raise ShapeMismatch(
            f"The {adapter.family} has numbers {tuple(table.shape)}; the model takes "
            f"{tuple(held.shape)} for {layers} layers.",
            fix="Is this the base that it was made for?",
        )
    with torch.no_grad():
        held.copy_(table)
    held.requires_grad_(False)
    return hosted


@contextmanager
def _bottlenecks(model: Model, adapter: InsertAdapter, strength: float) -> Iterator[None]:
    with optional("Putting an insert on a model"):
        from regraft.tuners import BottleneckConfig
        from regraft.tuners.bottleneck import BottleneckLayer
        from regraft.tuners.config import exactly
        from regraft.tuners.saved import put

    component = next(iter(adapter.parts)).component
    module = model.modules.get(component, nn.Module())
    here = dict(module.named_modules())
    for site in adapter.parts:
        if site.module not in here:
            raise SitesNotInBase(
                f"{model.ref} has no module for the adapter's site {site}.",
                fix="Is this the base that the adapter was made for?",
            )
    if any(isinstance(found, BottleneckLayer) for found in here.values()):
        raise CannotRun(f"{model.ref} holds an insert already.", fix="Take it off first.")
    held = of_one_width(
        {s.module: p for s, p in adapter.parts.items() if isinstance(p, Bottleneck)}
    )
    first = next(iter(held.values()))
    config = BottleneckConfig(
        target_modules=exactly(held),
        position=first.position,
        activation=first.activation,
        scale=first.scale,
        norm=first.norm is not None,
        width=len(first.down),
    )
    with _as_before(module):
        try:
            put(module, config, to_tensors(held), _NAME, Path(adapter.name or "adapter"))
            for layer in module.modules():
                if isinstance(layer, BottleneckLayer):
                    layer.set_scale(_NAME, strength)
                    layer.requires_grad_(False)
            module.eval()
            yield
        finally:
            for name, layer in list(module.named_modules()):
                if isinstance(layer, BottleneckLayer):
                    parent, _, child = name.rpartition(".")
                    setattr(module.get_submodule(parent), child, here[name])


@contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """Attributes that PEFT leaves on a model (its configs, hooks of generation) go again."""
    before = [(part, dict(part.__dict__)) for part in module.modules()]
    config: Any = getattr(module, "config", None)
    settings = dict(vars(config)) if hasattr(config, "__dict__") else None
    try:
        yield
    finally:
        for part, attributes in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)
        if settings is not None:
            vars(config).clear()
            vars(config).update(settings)


def random_insert(adapter: InsertAdapter, seed: int) -> InsertAdapter:
    """An insert of random numbers: the control that says what mere inserting of that size does.

    Every tensor is Gaussian with the Frobenius norm of its own. A site's draw depends on the seed
    and the site's name only.
    """
    parts = {site: _random(site, part, seed) for site, part in adapter.parts.items()}
    return replace(adapter, parts=parts, name=f"random-{seed}")


def _random(site: Site, part: Insert, seed: int) -> Insert:
    digest = hashlib.sha256(f"{seed} {site}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    tensors: Mapping[str, Any] = {
        name: value for name, value in vars(part).items() if isinstance(value, Tensor)
    }
    drawn = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=draw)
        drawn[name] = noise * (tensor.float().norm() / noise.norm().clamp_min(1e-30))
    return replace(part, **drawn)
