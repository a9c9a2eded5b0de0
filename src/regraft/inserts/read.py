"""From a PEFT folder and its base to an :class:`InsertAdapter`, every tensor accounted for.

What PEFT 0.21 saves of prompts and prefixes is one table, ``prompt_embeddings``, whatever encoder
made it in training: P-tuning's encoder and a prefix's projection are run once when it saves.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from regraft.adapters import Site
from regraft.bases import Base, open_base
from regraft.dialects.inserted import InsertFile, insert_file
from regraft.errors import (
    FamilyNotYet,
    MalformedFile,
    NotAnAdapter,
    ShapeMismatch,
    SitesNotInBase,
    UnknownKeys,
)
from regraft.files import TensorFile, locate
from regraft.files.pickle_gate import original
from regraft.inserts.copied import misfit
from regraft.inserts.insert import Insert, InsertAdapter, Prompt
from regraft.inserts.places import attentions, embedding, in_order, weights_in
from regraft.inserts.tables import prefix_parts
from regraft.tuners.bottleneck.config import POSITIONS
from regraft.tuners.bottleneck.parts import ACTIVATIONS, Bottleneck, from_tensors, is_key

_TABLE = "prompt_embeddings"


def load_insert(
    ref: str | Path, base: str | Path | Base, *, allow_unknown: bool = False
) -> InsertAdapter:
    """Read prompt vectors, a prefix or bottlenecks against the base they were made for.

    Parameters
    ----------
    ref : str or Path
        Hub id, PEFT folder, or the weights file in one.
    base : str, Path or Base
        The base it was trained on: names and widths come from it.
    allow_unknown : bool
        Leave out tensors that fit no rule, and record them in ``refused``; else they are an error.

    Returns
    -------
    InsertAdapter
        Its numbers in fp32.

    Raises
    ------
    NotAnAdapter
        It is of another family, or nothing says which.
    FamilyNotYet
        It is for a model of another kind, such as an encoder with a decoder.
    SitesNotInBase, ShapeMismatch
        It does not fit the base.
    UnknownKeys, MalformedFile, NonFiniteTensor
    InputNotFound, HubUnavailable, PickleRefused, NotABase
    """
    located = locate(ref)
    found = insert_file(located.path)
    if found is None:
        raise NotAnAdapter(
            "This is no folder of prompt vectors, of a prefix or of bottlenecks.",
            file=located.path,
            fix="Give the folder that PEFT saved, with its adapter_config.json.",
        )
    base = open_base(base) if isinstance(base, str | Path) else base
    _refuse_other_models(found)
    file = found.open()
    own = [k for k in file if (is_key(k) if found.family == "bottleneck" else k == _TABLE)]
    if not own:
        raise MalformedFile(
            f"The file holds no tensors of a {found.family}.",
            file=file.path,
            fix="The file is incomplete; get it again.",
        )
    refused = _unknown(file, own, allow_unknown)
    tensors = {k: _numbers(file, k) for k in own}
    read = {"prompt": _prompt, "prefix": _prefix, "bottleneck": _bottlenecks}[found.family]
    name = located.repo.rpartition("/")[2] if located.repo else found.name
    dtypes = Counter(file[k].dtype for k in own)
    return InsertAdapter(
        family=found.family,
        parts=read(found, file, tensors, base),
        config=found.config,
        metadata=dict(file.metadata),
        refused=refused,
        notes=_notes(found),
        sha256=_sha256(file.path),
        name=name,
        dtype=dtypes.most_common(1)[0][0],
    )


def _refuse_other_models(found: InsertFile) -> None:
    """Raise :class:`FamilyNotYet` for settings that mean more than one table or another model."""
    if found.family == "bottleneck":
        return
    if found.config.get("num_transformer_submodules") not in (None, 1):
        raise FamilyNotYet(
            f"This {found.family} is for an encoder and a decoder, which is not read yet.",
            file=found.config_path,
            fix="docs/families.md lists what this version reads.",
        )


def _unknown(file: TensorFile, own: list[str], allow_unknown: bool) -> dict[str, str]:
    rest = [key for key in file if key not in own]
    if rest and not allow_unknown:
        listed = ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")
        raise UnknownKeys(
            f"{len(rest)} tensor(s) fit no known rule: {listed}.",
            file=file.path,
            tensor=rest[0],
            fix="To carry the rest and have these recorded, pass --allow-unknown.",
        )
    return dict.fromkeys(rest, "fits no known rule; left out as --allow-unknown asks")


def _numbers(file: TensorFile, key: str) -> Tensor:
    tensor = file.read(key, finite=True)
    if not tensor.is_floating_point():
        raise MalformedFile(
            f"It is stored as {str(tensor.dtype).removeprefix('torch.')}, not as real numbers.",
            file=file.path,
            tensor=key,
            fix="Save the adapter again with PEFT.",
        )
    return tensor.float()


def _prompt(
    found: InsertFile, file: TensorFile, tensors: Mapping[str, Tensor], base: Base
) -> dict[Site, Insert]:
    table = _table(found, file, tensors)
    site = embedding(base)
    if site is None:
        raise _no_language_model(file, base)
    width = base.at(site).shape[1]
    if table.shape[1] != width:
        raise ShapeMismatch(
            f"The prompt is {table.shape[1]} wide, and the embedding {site} of {base.ref} {width}.",
            file=file.path,
            tensor=_TABLE,
            fix="Is this the right source base?",
        )
    return {site.with_parameter("prompt"): Prompt(table)}


def _prefix(
    found: InsertFile, file: TensorFile, tensors: Mapping[str, Tensor], base: Base
) -> dict[Site, Insert]:
    table = _table(found, file, tensors)
    here = attentions(base)
    if not here.modules:
        raise _no_language_model(file, base)
    said = _whole(found, "num_attention_heads")
    heads = here.heads or said or 0
    width = here.width or _whole(found, "token_dim") or 0
    layers = len(here.modules)
    fits = heads > 0 and width % max(heads, 1) == 0 and table.shape[1] == 2 * layers * width
    if not fits or said not in (None, heads):
        raise ShapeMismatch(
            f"The prefix has {table.shape[1]} numbers per token, for "
            f"{_whole(found, 'num_layers')} layers of {said} key heads; {base.ref} has {layers} "
            f"layers of {heads}, {width} wide together.",
            file=file.path,
            tensor=_TABLE,
            fix="Is this the right source base?",
        )
    parts = prefix_parts(table, layers, heads)
    names = here.modules
    return {Site("", name, "prefix"): part for name, part in zip(names, parts, strict=True)}


def _table(found: InsertFile, file: TensorFile, tensors: Mapping[str, Tensor]) -> Tensor:
    table = tensors[_TABLE]
    said = _whole(found, "num_virtual_tokens")
    if table.ndim != 2 or 0 in table.shape or said not in (None, table.shape[0]):
        raise MalformedFile(
            f"The table is {tuple(table.shape)}; the settings say {said} virtual tokens.",
            file=file.path,
            tensor=_TABLE,
            fix="The file is damaged; get it again.",
        )
    return table


def _whole(found: InsertFile, name: str) -> int | None:
    value: Any = found.config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _no_language_model(file: TensorFile, base: Base) -> SitesNotInBase:
    return SitesNotInBase(
        f"A prompt or a prefix sits on a language model, and {base.ref} is none that is known.",
        file=file.path,
        fix="Give the language model that it was trained on.",
    )


def _bottlenecks(
    found: InsertFile, file: TensorFile, tensors: Mapping[str, Tensor], base: Base
) -> dict[Site, Insert]:
    _check_settings(found)
    try:
        read = from_tensors(tensors, found.config)
    except MalformedFile as error:
        raise MalformedFile(
            error.what, file=file.path, tensor=error.tensor, fix=error.fix
        ) from None
    placed: dict[Site, Insert] = {}
    lost: list[str] = []
    for name, part in read.items():
        site = _site_of(name, base)
        if site is None:
            lost.append(name)
            continue
        _check_sizes(part, site, base, file)
        placed[site] = part
    if lost:
        raise SitesNotInBase(
            f"{len(lost)} module(s) of the adapter are not in {base.ref}.",
            file=file.path,
            tensor=lost[0],
            fix="Is this the right source base?",
        )
    return {site: placed[site] for site in in_order(placed)}


def _check_settings(found: InsertFile) -> None:
    told = found.config
    scale: Any = told.get("scale")
    good = {
        "position": told.get("position") in POSITIONS,
        "activation": told.get("activation") in ACTIVATIONS,
        "scale": isinstance(scale, int | float) and abs(scale) < float("inf"),
    }
    for name, fine in good.items():
        if not fine:
            raise MalformedFile(
                f"The settings say {str(told.get(name))[:40]!r} for the {name} of these "
                "bottlenecks.",
                file=found.config_path,
                fix="Restore the adapter_config.json that was saved with them.",
            )


def _site_of(module: str, base: Base) -> Site | None:
    """The one place of a module in a base, whose parts PEFT does not name."""
    places = (Site(part, module, "bottleneck") for part in base.components)
    return next((site for site in places if weights_in(site, base)), None)


def _check_sizes(part: Bottleneck, site: Site, base: Base, file: TensorFile) -> None:
    if why := misfit(part, site, base):
        raise ShapeMismatch(
            f"The bottleneck at {site} does not fit {base.ref}: {why}.",
            file=file.path,
            tensor=f"{site.module}.bottleneck_down.weight",
            fix="Is this the right source base?",
        )


def _notes(found: InsertFile) -> list[str]:
    if str(found.config.get("peft_type")).upper() == "P_TUNING":
        return ["P-tuning's encoder is not in the file: what it made is read as a plain prompt."]
    return []


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(original(path), "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
