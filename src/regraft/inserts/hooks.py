"""Putting an insert on a running base by hooks, and keeping what its modules see meanwhile.

Each part can be there or not: bottlenecks are added by hooks on their modules, a prefix by a
function in place of the model's attention. Nothing of the model is changed, and all is off again
afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regraft.adapters import Site
from regraft.errors import CannotRun, SitesNotInBase
from regraft.inserts.insert import Insert, KeysValues
from regraft.tuners.bottleneck.parts import Bottleneck

Parts = Mapping[Site, Insert]
#: Under this name transformers finds the attention function that looks on.
_NAME = "regraft_watched"
#: What that function does now. What transformers is given it keeps for good: a function of its own
#: for each model would keep the model, too.
_ATTEND: list[Callable[..., tuple[Tensor, None]]] = []
#: What some attentions do besides, and this one does not.
_BESIDES = {"softcap": "caps its scores", "s_aux": "has sinks"}
#: Positions of a picture that are kept: a grid of so many a side at most.
_GRID = 8
_WRAPPER = "text_model."


@dataclass
class Attention:
    """What one attention did at r positions.

    Attributes
    ----------
    scaling : float
        Of the scores.
    queries : Tensor of shape (r, h, e)
        After their rotation.
    keys, values : Tensor of shape (r, g, e)
        Of the position itself, for g ≤ h key heads.
    own : Tensor of shape (r, h, e)
        What each head would give without a prefix.
    total : Tensor of shape (r, h)
        log Σ exp of the scores, without those of the prefix.
    """

    scaling: float
    queries: Tensor
    keys: Tensor
    values: Tensor
    own: Tensor
    total: Tensor


@dataclass
class Seen:
    """What was kept of a run: one row per position that corresponds."""

    inputs: dict[str, Float[Tensor, "r _"]] = field(default_factory=dict)
    outputs: dict[str, Float[Tensor, "r _"]] = field(default_factory=dict)
    attention: dict[str, Attention] = field(default_factory=dict)
    result: Tensor | None = None


def module_at(root: nn.Module, name: str) -> nn.Module:
    """A module by its canonical name.

    Raises
    ------
    SitesNotInBase
    """
    for spelled in (name, name.removeprefix(_WRAPPER), _WRAPPER + name):
        try:
            return root.get_submodule(spelled)
        except AttributeError:
            continue
    raise SitesNotInBase(
        f"The base has no module {name}.", fix="Is this the base that the adapter was made for?"
    )


class Watch:
    """Collects rows over the calls of a run."""

    def __init__(self, inputs: set[str], outputs: set[str], attention: set[str]) -> None:
        self.wanted = {"inputs": inputs, "outputs": outputs, "attention": attention}
        self.where: tuple[Tensor, Tensor] | None = None
        self.rows: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self.looked: dict[str, list[Attention]] = defaultdict(list)

    def keep(self, kind: str, name: str, state: Tensor) -> None:
        self.rows[kind, name].append(self._rows(state))

    def _rows(self, state: Tensor) -> Tensor:
        if self.where is not None:
            picked = state[self.where[0].to(state.device), self.where[1].to(state.device)]
        else:
            grid = state if state.ndim == 4 else _as_grid(state)
            picked = _picked(grid)
        return picked.float().cpu()

    def look(self, name: str, parts: tuple[Tensor, ...], scaling: float) -> None:
        assert self.where is not None
        found = [part[self.where[0], :, self.where[1]].float().cpu() for part in parts]
        self.looked[name].append(Attention(scaling, *found))

    def seen(self) -> Seen:
        made = Seen()
        for (kind, name), rows in self.rows.items():
            if kind == "result":
                made.result = torch.cat(rows)
            else:
                getattr(made, kind)[name] = torch.cat(rows)
        for name, parts in self.looked.items():
            joined = [
                torch.cat([getattr(part, key) for part in parts])
                for key in ("queries", "keys", "values", "own", "total")
            ]
            made.attention[name] = Attention(parts[0].scaling, *joined)
        return made


def _as_grid(state: Tensor) -> Tensor:
    """(b, n, c) as (b, c, √n, √n), where n is a square."""
    side = round(state.shape[1] ** 0.5) if state.ndim == 3 else 0
    if side * side != (state.shape[1] if state.ndim == 3 else -1):
        raise CannotRun("The states of this module are not those of a picture's places.")
    return state.mT.reshape(len(state), -1, side, side)


def _picked(grid: Tensor) -> Tensor:
    """Rows of at most 8 × 8 even places of each picture."""
    picks = []
    for size in grid.shape[2:]:
        few = min(size, _GRID)
        picks.append(((torch.arange(few) + 0.5) * size / few).long())
    return grid[:, :, picks[0]][:, :, :, picks[1]].flatten(2).mT.flatten(0, 1)


@contextmanager
def attached(root: Any, parts: Parts, watch: Watch) -> Iterator[None]:
    """The insert on the model, and the watch on both."""
    with ExitStack() as stack:
        on = {s.module: p for s, p in parts.items() if isinstance(p, Bottleneck)}
        for name in watch.wanted["inputs"]:
            stack.enter_context(_hook_input(module_at(root, name), name, watch))
        for name in watch.wanted["outputs"] | on.keys():
            stack.enter_context(_hook_output(module_at(root, name), name, watch, on.get(name)))
        prefixes = {s.module: p for s, p in parts.items() if isinstance(p, KeysValues)}
        if prefixes or watch.wanted["attention"]:
            stack.enter_context(_watched_attention(root, prefixes, watch))
        yield


@contextmanager
def _hook_input(module: nn.Module, name: str, watch: Watch) -> Iterator[None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        watch.keep("inputs", name, args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hook_output(
    module: nn.Module, name: str, watch: Watch, part: Bottleneck | None
) -> Iterator[None]:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        if name in watch.wanted["outputs"]:
            watch.keep("outputs", name, state)
        if part is None:
            return None
        first = args[0] if args else next(iter(kwargs.values()))
        read = first if part.position == "parallel" else state
        made = state + on_device(part, state)(read.float()).to(state.dtype)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def on_device(part: Bottleneck, like: Tensor) -> Bottleneck:
    """The same bottleneck in fp32 where ``like`` is."""
    moved: dict[str, Any] = {
        f.name: value.to(like.device, torch.float32)
        for f in fields(part)
        if isinstance(value := getattr(part, f.name), Tensor)
    }
    return replace(part, **moved)


@contextmanager
def _watched_attention(
    root: Any, prefixes: Mapping[str, KeysValues], watch: Watch
) -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    names = {part: name for name, part in root.named_modules()}

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        for option, does in _BESIDES.items():
            if more.get(option) is not None:
                raise CannotRun(f"This model's attention {does}, and cannot be looked into.")
        name = names[module]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        groups = query.shape[1] // key.shape[1]
        own_key, own_value = _repeated(key, groups), _repeated(value, groups)
        scores = (query @ own_key.mT).float() * scale
        if attention_mask is None:
            gap = torch.full(scores.shape[-2:], -torch.inf, device=scores.device)
            gap = gap.triu(1 + scores.shape[-1] - scores.shape[-2])
            scores = scores + gap
        else:
            scores = scores + attention_mask[..., : scores.shape[-1]].float()
        total = scores.logsumexp(dim=-1)
        own = (scores - total[..., None]).exp().to(value.dtype) @ own_value
        if name in watch.wanted["attention"]:
            watch.look(name, (query, key, value, own, total), scale)
        result = own
        if name in prefixes:
            weights = prefix_weights(query, prefixes[name].keys, total, scale)
            values = prefixes[name].values.to(value).repeat_interleave(groups, dim=0)
            result = own * (1 - weights.sum(-1, keepdim=True)) + weights.to(value.dtype) @ values
        return result.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = root.config._attn_implementation
    _ATTEND.append(attend)
    try:
        root.set_attn_implementation(_NAME)
        if root.config._attn_implementation != _NAME:
            raise CannotRun("This model's attention cannot be looked into.")
        yield
    finally:
        root.set_attn_implementation(before)
        _ATTEND.pop()


def _attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _ATTEND[-1](*args, **kwargs)


def prefix_weights(queries: Tensor, keys: Tensor, total: Tensor, scaling: float) -> Tensor:
    """The attention that goes to a prefix, (…, h, r, l).

    Parameters
    ----------
    queries : Tensor of shape (…, h, r, e)
    keys : Tensor of shape (g, l, e)
        Each for h / g heads.
    total : Tensor of shape (…, h, r)
        log Σ exp of all other scores.
    """
    keys = keys.to(queries).repeat_interleave(queries.shape[-3] // len(keys), dim=0)
    scores = (queries @ keys.mT).to(total.dtype) * scaling
    everything = torch.logaddexp(scores.logsumexp(dim=-1), total)
    return (scores - everything[..., None]).exp()


def _repeated(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
