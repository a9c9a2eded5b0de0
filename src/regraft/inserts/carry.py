"""Carrying an insert to another base, and which of its forms to take.

What an insert does is a change of what the model says, so its forms are judged by that, on texts or
pictures that need no labels. For a language model the *wanted change* is, over the tokens that both
bases have, with log-probabilities ℓ of the source bare (s), with its insert (s̃), and of the target
bare (t):

    wanted = softmax(ℓ_t + ℓ_s̃ − ℓ_s),    followed = 1 − KL(wanted ‖ carried) / KL(wanted ‖ bare)

For a denoiser, with its prediction y, followed = 1 − ‖(y_t̃ − y_t) − (y_s̃ − y_s)‖² / ‖y_s̃ − y_s‖².
It is 1 where the target changes as the source did, 0 where it stays as it is, below 0 where it
is led elsewhere. Where the two denoisers' predictions have different shapes it cannot be told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Any

import torch
from torch import Tensor

from regraft.adapters import Site
from regraft.errors import CannotRun
from regraft.inserts import bottleneck, prefix, prompt
from regraft.inserts.calibration import TEXTS, Tokens, aligned, noisy, own_texts, texts_of
from regraft.inserts.hooks import Parts
from regraft.inserts.insert import Insert, InsertAdapter, Prompt
from regraft.inserts.spaces import Side, site_at, virtual_tokens
from regraft.parallel import single_threaded
from regraft.running import Diffusion, Language, Model, Pictures, Texts
from regraft.tuners.bottleneck.parts import Bottleneck

#: A simpler form is taken if it makes almost as much of the wanted change as the best.
_MARGIN = 0.02
#: Rows of log-probabilities at a time: a vocabulary is wide.
_ROWS = 256
#: Told what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]


def silent(*_: object) -> None:
    """No progress."""


@dataclass
class Carried:
    """An insert on the target.

    Attributes
    ----------
    parts : dict of Site to Insert
        On the target's sites, in its own order of modules.
    sources : dict of Site to Site
        Target site → the source site that it takes after.
    kept : dict of Site to float
        Energy kept: 1 − ‖x − back(there(x))‖² / ‖x‖², in [0, 1], of what the insert adds.
    fit : dict of Site to float
        R² of the site's map on calibration that was kept back.
    refused : dict of str to str
        Source sites that are not carried, and why.
    notes : list of str
    form : str
        "as it is", "mapped" or "followed".
    followed : dict of str to float
        Form → how much of the wanted change it makes; empty where it cannot be told.
    """

    parts: dict[Site, Insert] = field(default_factory=dict)
    sources: dict[Site, Site] = field(default_factory=dict)
    kept: dict[Site, float] = field(default_factory=dict)
    fit: dict[Site, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    form: str = ""
    followed: dict[str, float] = field(default_factory=dict)


def carry(
    adapter: InsertAdapter,
    source: Model,
    target: Model,
    *,
    calibration: Pictures | Texts | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Carried:
    """Carry an insert to another base, in the form that changes it most as the source was changed.

    Parameters
    ----------
    adapter : InsertAdapter
        On the source's sites.
    source, target : Model
        Of one kind.
    calibration : Pictures or Texts, optional
        Items to fit maps on; no labels are used. Default the source's own samples.
    seed : int
        Of those samples.
    progress : callable

    Raises
    ------
    CannotRun
        The two bases are of different kinds, have nothing in common to fit a map on, or compute
        NaN; the insert sits on a part of a pipeline that is not its denoiser.
    BadOption
        The insert is of a form that no map carries.
    """
    if source.kind != target.kind:
        raise CannotRun(
            f"{source.ref} is a {source.kind} model and {target.ref} a {target.kind} model.",
            fix="Inserts are carried between bases of one kind.",
        )
    if source.kind == "diffusion" and any(site.component != "unet" for site in adapter.parts):
        raise CannotRun("Only what sits on the denoiser of a pipeline can be mapped.")
    with single_threaded():
        progress("calibrating", 0, 3)
        sides = calibrated(adapter.parts, source, target, calibration, seed)
        progress("fitting maps", 1, 3)
        forms, made = _forms(adapter, *sides)
        progress("comparing forms", 2, 3)
        made.followed = followed(adapter.parts, forms, *sides)
    made.form = _best(forms, made.followed)
    made.parts = dict(forms[made.form])
    used = {site.module for site in made.sources.values()}
    made.refused = {
        str(site): "no module of the target takes after it"
        for site in adapter.parts
        if site.module not in used
    }
    what = "own samples" if calibration is None else "the given items"
    made.notes.append(f"fitted on {what}, {_size(sides[0])}; {made.form}")
    progress("comparing forms", 3, 3)
    return made


def calibrated(
    parts: Parts, source: Model, target: Model, given: Pictures | Texts | None, seed: int
) -> tuple[Side, Side]:
    """Both bases and what they read: the given items, or the source's own samples.

    Raises
    ------
    CannotRun
    """
    if isinstance(source, Language) and isinstance(target, Language):
        if isinstance(given, Pictures):
            raise CannotRun("Pictures cannot calibrate a language model.", fix="Give texts.")
        room = virtual_tokens(parts)
        if given is not None:
            texts = texts_of(given)
        else:
            bare, adapted = (own_texts(source, on, TEXTS // 2, seed, room) for on in ({}, parts))
            texts = [text for pair in zip(bare, adapted, strict=True) for text in pair]
        here, there = aligned(source, target, texts, room)
        return Side(source, here), Side(target, there)
    if isinstance(source, Diffusion) and isinstance(target, Diffusion):
        if isinstance(given, Texts):
            raise CannotRun("Texts cannot calibrate a diffusion model.", fix="Give pictures.")
        first, second = noisy(source, target, given, seed)
        return Side(source, first), Side(target, second)
    raise CannotRun(f"Models such as {source.ref} cannot be calibrated.")


def _best(forms: Mapping[str, Parts], scores: Mapping[str, float]) -> str:
    """The first of the forms that are as good as the best; without scores the map that was fitted,
    as it is the map whose fit then speaks for it."""
    if not scores:
        return "mapped"
    best = max(scores.values())
    return next(form for form in forms if scores[form] >= best - _MARGIN)


def _size(side: Side) -> str:
    """How much calibration there is."""
    items = side.items
    if isinstance(items, Tokens):
        return f"{len(items.rows)} positions"
    return f"{len(items.x)} noisy pictures"


def _forms(adapter: InsertAdapter, source: Side, target: Side) -> tuple[dict[str, Parts], Carried]:
    """The insert in every form that there is, and the evidence."""
    if adapter.family == "prompt":
        assert isinstance(source.model, Language)
        assert isinstance(target.model, Language)
        return _prompts(adapter, source.model, target.model)
    found: Any = (prefix if adapter.family == "prefix" else bottleneck).carry(
        adapter.parts, source, target
    )
    kind = adapter.family

    def at(parts: Mapping[str, Any]) -> dict[Site, Any]:
        return {site_at(target, name, kind): part for name, part in parts.items()}

    forms: dict[str, Parts] = {"mapped": at(found.mapped), "followed": at(found.followed)}
    if copied := _copied(adapter.parts, found.mapped):
        forms = {"as it is": copied, **forms}
    sources = {
        site_at(target, name, kind): site_at(source, like, kind)
        for name, like in found.sources.items()
    }
    return forms, Carried(sources=sources, fit=at(found.fit), kept=at(found.kept))


def _copied(parts: Parts, mapped: Mapping[str, Any]) -> dict[Site, Insert]:
    """The insert as it is, where every part fits the module of its name; else nothing."""
    if {site.module for site in parts} != mapped.keys():
        return {}
    for site, part in parts.items():
        if _shapes(part) != _shapes(mapped[site.module]):
            return {}
    return dict(parts)


def _shapes(part: Insert) -> list[tuple[int, ...]]:
    if isinstance(part, Bottleneck):
        return [tuple(part.down.shape), tuple(part.up.shape)]
    return [tuple(value.shape) for value in vars(part).values() if isinstance(value, Tensor)]


def _prompts(
    adapter: InsertAdapter, source: Language, target: Language
) -> tuple[dict[str, Parts], Carried]:
    ((site, part),) = adapter.parts.items()
    assert isinstance(part, Prompt)
    found = prompt.carry(part.vectors, source, target)
    table = target.model.get_input_embeddings()
    name = next(n for n, module in target.model.named_modules() if module is table)
    there = Site("", name, "prompt")
    forms: dict[str, Parts] = {
        form: {there: replace(part, vectors=vectors)} for form, vectors in found.forms.items()
    }
    made = Carried(sources={there: site}, fit={there: found.fit}, kept={there: found.kept})
    return forms, made


def followed(
    parts: Parts, forms: Mapping[str, Parts], source: Side, target: Side
) -> dict[str, float]:
    """How much of the wanted change each form makes; empty where the predictions of two denoisers
    have different shapes.

    Raises
    ------
    CannotRun
        A base computes NaN.
    """
    if isinstance(source.model, Language) and isinstance(target.model, Language):
        scores = _by_words(parts, forms, source, target)
    else:
        scores = _by_pictures(parts, forms, source, target)
    if any(map(isnan, scores.values())):
        raise CannotRun(f"What {source.model.ref} or {target.model.ref} computes is not finite.")
    return scores


def _by_words(
    parts: Parts, forms: Mapping[str, Parts], source: Side, target: Side
) -> dict[str, float]:
    assert isinstance(source.model, Language)
    assert isinstance(target.model, Language)
    here, there = prompt.shared_tokens(source.model, target.model)

    def logs(side: Side, on: Parts, ids: Tensor) -> Tensor:
        return side.said(on)[:, ids].log_softmax(-1)

    s0, s1, t0 = logs(source, {}, here), logs(source, parts, here), logs(target, {}, there)
    wanted = (t0 + s1 - s0).log_softmax(-1)
    del s0, s1  # of a large vocabulary each is near a gigabyte
    whole = _divergence(wanted, t0)
    return {
        form: 1 - _divergence(wanted, logs(target, made, there)) / whole if whole else 0.0
        for form, made in forms.items()
    }


def _by_pictures(
    parts: Parts, forms: Mapping[str, Parts], source: Side, target: Side
) -> dict[str, float]:
    s0, s1, t0 = source.said({}), source.said(parts), target.said({})
    if s0.shape != t0.shape:
        return {}
    change = s1 - s0
    whole = float(change.square().sum())
    return {
        form: 1 - float((target.said(made) - t0 - change).square().sum()) / whole if whole else 0.0
        for form, made in forms.items()
    }


def _divergence(wanted: Tensor, got: Tensor) -> float:
    """Mean KL, from log-probabilities (r, v)."""
    some = [slice(low, low + _ROWS) for low in range(0, len(wanted), _ROWS)]
    rows = [(wanted[at].exp() * (wanted[at] - got[at])).sum(-1) for at in some]
    return float(torch.cat(rows).double().mean())
