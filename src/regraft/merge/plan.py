"""What a merge changes: which rows of which stored tensors, by how much; and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from regraft.adapters import Adapter, Site, Update, same_matrix
from regraft.bases import Base
from regraft.dialects.inserted import insert_file
from regraft.errors import CannotMerge, QuantisedWeight, ShapeMismatch
from regraft.files import Located, TensorFile
from regraft.files.gguffile import GGUFFile
from regraft.files.pickle_gate import original
from regraft.merge.added import Part
from regraft.merge.stream import Changes
from regraft.merge.zero_points import has_zeros

#: Families that change activations → where they act.
_WHERE = {
    "bottleneck": "a bottleneck is a layer of its own, between those of the base",
    "prefix": "a prefix is keys and values in front of an attention's own",
    "prompt": "a prompt is vectors in front of the embedded tokens",
}
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output")


def refuse_insert(located: Located) -> None:
    """Raise :class:`CannotMerge` for an adapter that changes activations, not weights."""
    insert = insert_file(located.path)
    if insert is not None:
        raise CannotMerge(
            f"It has no ΔW, so no weight could hold it: {_WHERE[insert.family]}.",
            file=insert.folder,
            fix="Load it beside the base with PEFT.",
        )


def refuse_base(base: Base) -> None:
    """Raise :class:`CannotMerge` for a base in a form that is read but not written."""
    file = next(iter(base.weights.values())).file
    if isinstance(file, GGUFFile):
        raise CannotMerge(
            "The base is a GGUF file, which is read but not written.",
            file=file.path,
            fix="Merge into the safetensors checkpoint it was made from, then convert the result.",
        )
    pickled = original(file.path)
    if pickled != file.path:
        raise pickled_base(pickled)


def pickled_base(file: str | Path | None) -> CannotMerge:
    """The error for a base that is a pickle, whether pickles may be read or not."""
    return CannotMerge(
        "The base is a pickled checkpoint; merging writes safetensors alone.",
        file=file,
        fix="Get its .safetensors files, or save it as safetensors first.",
    )


def moves_zeros(base: Base, adapters: Sequence[Adapter]) -> bool:
    """Whether the changes go into zero points: every weight that changes is quantised with some."""
    quantised = any(base.at(s).quantised is not None for a in adapters for s in a.updates)
    return quantised and all(has_zeros(base, adapter) for adapter in adapters)


def changes_of(
    base: Base, adapters: Sequence[Adapter], strengths: Sequence[float]
) -> list[tuple[TensorFile, Changes]]:
    """By file: tensor → the sites in it that change, each with the terms of every adapter.

    Raises
    ------
    QuantisedWeight
        A weight is stored in a quantised form.
    ShapeMismatch
    """
    terms: dict[Site, list[tuple[float, Update]]] = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for site, update in adapter.updates.items():
            terms.setdefault(site, []).append((strength, update))
    parts: dict[int, dict[str, list[Part]]] = {}
    files: dict[int, TensorFile] = {}
    for site, own in terms.items():
        weight = base.at(site)
        if weight.quantised is not None:
            raise QuantisedWeight(
                f"The base holds {site} as {weight.quantised.form}. Rounding a merged weight to "
                "so few bits would lose much of the change, so it is not done.",
                file=weight.file.path,
                tensor=weight.tensor,
                fix="Merge into the 16-bit checkpoint it was made from, and quantise the result; "
                "or load the adapter beside the quantised base.",
            )
        for _, update in own:
            if not same_matrix(update.shape, weight.shape):
                raise ShapeMismatch(
                    f"A change {update.shape} does not fit {site}, which is {weight.shape}.",
                    fix="Is this the base that the adapter was made for?",
                )
        files[id(weight.file)] = weight.file
        here = parts.setdefault(id(weight.file), {})
        here.setdefault(weight.tensor, []).append(Part(site, weight.rows, tuple(own)))
    return [
        (files[key], {name: tuple(found) for name, found in here.items()})
        for key, here in parts.items()
    ]


def tied(base: Base, sites: Iterable[Site]) -> list[str]:
    """Notes on weights that are input embedding and output head at once."""
    if any(s.module.rpartition(".")[2] in _HEADS for s in base.weights):
        return []
    found = [s for s in sites if s.module.rpartition(".")[2] in _EMBEDDINGS]
    config = base.configs.get("", {})
    named = " ".join(str(n) for n in config.get("architectures") or [])
    if not found or ("LM" not in named and not config.get("tie_word_embeddings")):
        return []
    return [
        f"{found[0]} is the output head as well (the base ties them and stores one): merged, the "
        "change acts on both; an adapter beside the base may change the embedding alone."
    ]
