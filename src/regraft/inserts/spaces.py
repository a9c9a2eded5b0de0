"""A base as a space of activations: run on calibration, with an insert or without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from regraft.adapters import Site
from regraft.errors import CannotRun
from regraft.inserts.calibration import Noisy, Tokens
from regraft.inserts.hooks import Parts, Seen, Watch, attached
from regraft.inserts.insert import KeysValues, Prompt
from regraft.running import Diffusion, Language, Model

#: Texts or pictures at a time.
_CHUNK = 64
#: Numbers of logits at a time, at most: a vocabulary is wide.
_LOGITS = 2**28
#: Positions, up to twice as many, at which what a language model says is kept.
_SAID = 1000


class Side:
    """One base, and the calibration as it sees it."""

    def __init__(self, model: Model, items: Tokens | Noisy) -> None:
        self.model, self.items = model, items
        self.component = "unet" if isinstance(model, Diffusion) else ""
        self.root: Any = model.modules[self.component]

    def run(
        self,
        parts: Parts | None = None,
        *,
        inputs: Iterable[str] = (),
        outputs: Iterable[str] = (),
        attention: Iterable[str] = (),
    ) -> Seen:
        """Run all of the calibration; what a language model says at the end is not computed.

        Parameters
        ----------
        parts : mapping of Site to Insert
            What is put on.
        inputs, outputs : iterable of str
            Modules whose first input, or whose output without the bottleneck on it, is kept.
        attention : iterable of str
            Attentions to look into.
        """
        watch = Watch(set(inputs), set(outputs), set(attention))
        with torch.no_grad(), attached(self.root, parts or {}, watch):
            for call in self._chunks(parts or {}, watch):
                call()
        return watch.seen()

    def said(self, parts: Parts) -> Tensor:
        """The logits at one to two thousand positions, or the denoiser's prediction, (r, _)."""
        watch = Watch(set(), set(), set())
        with torch.no_grad(), attached(self.root, parts, watch):
            for call in self._chunks(parts, watch, says=True):
                watch.keep("result", "", call())
        found = watch.seen().result
        assert found is not None
        return found

    def _chunks(self, parts: Parts, watch: Watch, says: bool = False) -> Iterator[Any]:
        if isinstance(self.items, Tokens):
            tokens, shift = self.items, length_of(parts)
            prompt = prompt_of(parts)
            root, places, many = self.root.base_model, tokens.rows, _CHUNK
            if says:
                root, places = self.root, places[:: max(1, len(places) // _SAID)]
                words = len(root.get_input_embeddings().weight)
                many = min(_CHUNK, max(1, _LOGITS // (words * tokens.ids.shape[1])))
            for low in range(0, len(tokens.ids), many):
                rows = slice(low, low + many)
                inside = (places[:, 0] >= low) & (places[:, 0] < low + many)
                where = places[inside] - torch.tensor([low, 0])
                # A prompt has places of its own, in front.
                ahead = 0 if prompt is None else len(prompt)
                watch.where = (where[:, 0], where[:, 1] + ahead)
                yield lambda rows=rows: _read(
                    root, tokens.ids[rows], tokens.mask[rows], prompt, shift
                )
            return
        noisy = self.items
        model = self.model
        assert isinstance(model, Diffusion)
        watch.where = None
        for t in dict.fromkeys(noisy.t):
            at = [i for i, other in enumerate(noisy.t) if other == t]
            for low in range(0, len(at), model.batch):
                here = at[low : low + model.batch]
                told = {k: v[here] for k, v in noisy.condition.items()}
                x = noisy.x[here].to(model.device)
                yield lambda x=x, t=t, told=told: model.predict(x, t, told)


def site_at(side: Side, module: str, parameter: str) -> Site:
    """A module of a side as a site."""
    return Site(side.component, module, parameter)


def length_of(parts: Parts) -> int:
    """Virtual tokens that a prefix puts in front; 0 without one."""
    return max((p.keys.shape[1] for p in parts.values() if isinstance(p, KeysValues)), default=0)


def prompt_of(parts: Parts) -> Tensor | None:
    """The prompt among them."""
    return next((p.vectors for p in parts.values() if isinstance(p, Prompt)), None)


def virtual_tokens(parts: Parts) -> int:
    """Places of the context that an insert takes."""
    prompt = prompt_of(parts)
    return length_of(parts) + (0 if prompt is None else len(prompt))


def _read(root: Any, ids: Tensor, mask: Tensor, prompt: Tensor | None, shift: int) -> Tensor | None:
    """The logits of a batch, or None of a model without its head."""
    device = next(root.parameters()).device
    ids, mask = ids.to(device), mask.to(device).long()
    vectors = root.get_input_embeddings()(ids)
    if prompt is not None:
        front = prompt.to(vectors).expand(len(ids), -1, -1)
        vectors = torch.cat([front, vectors], dim=1)
        mask = torch.cat([mask.new_ones(front.shape[:2]), mask], dim=1)
    places = torch.arange(vectors.shape[1], device=device)[None] + shift
    output = root(
        inputs_embeds=vectors,
        attention_mask=mask,
        position_ids=places.expand(len(ids), -1),
        use_cache=False,
    )
    return getattr(output, "logits", None)


def written(
    model: Language, first: Tensor, parts: Parts, count: int, draw: torch.Generator
) -> Tensor:
    """Tokens that a model writes after ``first`` (n, 1), at temperature 1, without special ones.

    Returns
    -------
    Tensor of shape (n, 1 + count), on the CPU

    Raises
    ------
    CannotRun
        It computes NaN.
    """
    from transformers import DynamicCache

    root, device = model.model, model.device
    prompt, shift = prompt_of(parts), length_of(parts)
    special, known = list(set(model.tokenizer.all_special_ids)), len(model.tokenizer)
    ids, cache = first, DynamicCache()
    vectors = root.get_input_embeddings()(first.to(device))
    if prompt is not None:
        vectors = torch.cat([prompt.to(vectors).expand(len(first), -1, -1), vectors], dim=1)
    with torch.no_grad(), attached(root, parts, Watch(set(), set(), set())):
        for _ in range(count):
            seen = cache.get_seq_length()
            places = torch.arange(seen, seen + vectors.shape[1], device=device)[None] + shift
            logits = root(
                inputs_embeds=vectors,
                attention_mask=torch.ones(len(ids), seen + vectors.shape[1], device=device),
                position_ids=places.expand(len(ids), -1),
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            chances = logits.float().cpu()
            if chances.isnan().any():
                raise CannotRun(f"What {model.ref} computes is not finite, so it writes no text.")
            chances[:, special] = -torch.inf
            chances[:, known:] = -torch.inf
            chosen = torch.multinomial(chances.softmax(dim=-1), 1, generator=draw)
            ids = torch.cat([ids, chosen], dim=1)
            vectors = root.get_input_embeddings()(chosen.to(device))
    return ids


def attentions(model: Language) -> list[str]:
    """The attentions that a prefix stands at, in order."""
    root = model.model
    found = {
        int(part.layer_idx): name
        for name, part in root.named_modules()
        if isinstance(getattr(part, "layer_idx", None), int)
        and type(part).__name__.endswith("Attention")
    }
    return [found[i] for i in sorted(found)]
