"""Where inserts stand in a base, and the weights that make the space they live in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.adapters import Site
from regraft.bases import Base

#: Ends of a token embedding's name.
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
#: Names of the weights that make keys and values, in one attention: apart, or in one.
_KEYS_VALUES = (
    ("k_proj", "v_proj"),
    ("key", "value"),
    ("c_attn",),
    ("qkv_proj",),
    ("query_key_value",),
    ("Wqkv",),
)


@dataclass(frozen=True)
class Attentions:
    """The attentions of a language model, in order, and the shape of what they cache.

    Attributes
    ----------
    modules : tuple of str
    heads : int
        Key heads; 0 where the base does not say.
    width : int
        Of all key heads together; 0 where it is not known.
    """

    modules: tuple[str, ...]
    heads: int
    width: int


def natural(name: str) -> tuple[Any, ...]:
    """A key that sorts module names with their numbers as numbers."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split("."))


def embedding(base: Base) -> Site | None:
    """The token embedding's weight of a bare language model; None if there is none.

    An encoder with a decoder has two places for a prompt, and is not known either.
    """
    if _has_decoder(base):
        return None
    found = [
        site
        for site, weight in base.weights.items()
        if site.component == "" and site.module.endswith(_EMBEDDINGS) and len(weight.shape) == 2
    ]
    return min(found, key=lambda site: (site.module.count("."), site)) if found else None


def attentions(base: Base) -> Attentions:
    """The attentions of a bare language model; none of another base, or of an encoder with a
    decoder."""
    if _has_decoder(base):
        return Attentions((), 0, 0)
    weights: dict[str, set[str]] = defaultdict(set)
    for site in base.weights:
        parent, _, own = site.module.rpartition(".")
        if site.component == "" and parent:
            weights[parent].add(own)
    for names in _KEYS_VALUES:
        found = sorted((m for m, own in weights.items() if own >= set(names)), key=natural)
        if found:
            break
    else:
        return Attentions((), 0, 0)
    heads, width = _cached(_text_config(base.configs.get("", {})))
    if len(names) == 2:
        width = base.at(Site("", f"{found[0]}.{names[0]}")).shape[0]
    return Attentions(tuple(found), heads, width)


def _has_decoder(base: Base) -> bool:
    return base.configs.get("", {}).get("is_encoder_decoder") is True


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _cached(config: Mapping[str, Any]) -> tuple[int, int]:
    """(key heads, width of all of them) as a model's config says; zeros for what it does not."""

    def number(*names: str) -> int:
        return next((int(v) for n in names if isinstance(v := config.get(n), int)), 0)

    heads = number("num_attention_heads", "n_head", "num_heads")
    own = number("num_key_value_heads") or heads
    hidden = number("hidden_size", "n_embd", "d_model")
    each = number("head_dim") or (hidden // heads if heads else 0)
    return own, own * each


def space_of(site: Site, base: Base) -> list[Site]:
    """The weights that make the space an insert at ``site`` lives in.

    The token embedding; the weights of an attention's keys and values; the weight of the module
    that a bottleneck sits on, or all weights of a block.
    """
    if site.parameter == "prompt":
        return [own] if (own := site.with_parameter("weight")) in base.weights else []
    if site.parameter == "prefix":
        for names in _KEYS_VALUES:
            found = [Site(site.component, f"{site.module}.{name}") for name in names]
            if all(own in base.weights for own in found):
                return found
        return []
    return weights_in(site, base)


def weights_in(site: Site, base: Base) -> list[Site]:
    """The weights of a module, its own or those of what is in it, in order."""
    own = site.with_parameter("weight")
    if own in base.weights:
        return [own]
    front = f"{site.module}."
    inside = (s for s in base.weights if s.component == site.component)
    return in_order(s for s in inside if s.module.startswith(front))


def pattern_of(module: str) -> str:
    """A module's name with every number as ``#``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", module)


def in_order(sites: Iterable[Site]) -> list[Site]:
    """Sites as data flows through a stack of layers."""
    return sorted(sites, key=lambda s: (s.component, natural(s.module)))
