"""Which weight files of a repository or folder to take: one variant of each component."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from regraft.errors import InputNotFound
from regraft.files.pickle_gate import pickles_allowed, unpickled
from regraft.files.tensorfile import PICKLE_ENDINGS, refuse_pickle

#: Folders of a diffusers pipeline whose weights adapters change.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
#: Folders whose weights a pipeline needs to run.
RUNNING_COMPONENTS = (*COMPONENTS, "vae")

_USUAL = (
    "model",
    "diffusion_pytorch_model",
    "adapter_model",
    "pytorch_lora_weights",
    "pytorch_model",
)
_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.[a-z0-9_]+)?"
    r"\.(safetensors|gguf|bin|pt|pth)"
)
#: What weights end in; a folder's GGUF files are taken where it has no others.
_ENDINGS = (".safetensors", ".gguf")
#: Pickles that training leaves beside the weights.
_training_state = re.compile(
    r"(.*/)?((optimizer|scheduler|scaler|training_args|rng_state|openvino)\w*)\.(bin|pt|pth|pkl)"
).fullmatch
_VARIANT = re.compile(r"(?P<stem>.+)\.(?P<variant>[a-z][a-z0-9_]*)")  # model.fp16


def pick_weights(names: Iterable[str], components: Sequence[str] = COMPONENTS) -> list[str]:
    """Choose the weight files of a repository, one variant per component.

    Rules: inside a pipeline only the component folders, not the single-file copy at the root;
    of a sharded set all its shards; full-precision files before variants (``.fp16.``).

    Raises
    ------
    InputNotFound
        A folder holds several unlike files and nothing says which one is meant.
    """
    by_folder: dict[str, list[str]] = {}
    for name in sorted(_weights(names)):
        folder, _, _file = name.rpartition("/")
        by_folder.setdefault(folder, []).append(name)
    folders = [f for f in by_folder if f in components] or [""]
    return [n for folder in folders for n in one_variant(by_folder.get(folder, []))]


def _weights(names: Iterable[str]) -> list[str]:
    """The weight files among ``names``: safetensors, or GGUF where there are none.

    Pickles come last, and only where they are allowed.
    """
    kept = [n for n in names if not n.rpartition("/")[2].startswith("mmproj")]
    endings: list[str | tuple[str, ...]] = [*_ENDINGS]
    if pickles_allowed():
        endings.append(PICKLE_ENDINGS)
    by_ending = ([n for n in kept if n.endswith(e) and not _training_state(n)] for e in endings)
    return next(filter(None, by_ending), [])


def one_variant(names: list[str], *, adapter: bool = False) -> list[str]:
    """The files of one variant among the weight files of one folder.

    Parameters
    ----------
    names : list of str
    adapter : bool
        The folder has an ``adapter_config.json``, so ``adapter_model`` is meant.

    Raises
    ------
    InputNotFound
    """
    groups: dict[tuple[str, str], list[str]] = {}  # (stem, variant) → files
    for name in names:
        file = name.rpartition("/")[2]
        shard = _SHARD.fullmatch(file)
        stem = shard["stem"] if shard else file.rpartition(".")[0]
        variant = shard["variant"] or "" if shard else ""
        if not variant and (match := _VARIANT.fullmatch(stem)):
            stem, variant = match["stem"], match["variant"]
        groups.setdefault((stem, variant), []).append(name)
    if not groups:
        return []
    stems = dict.fromkeys(stem for stem, _ in groups)
    usual = [s for s in (("adapter_model", *_USUAL) if adapter else _USUAL) if s in stems]
    if not usual and len(stems) > 1:
        listed = ", ".join(n.rpartition("/")[2] for n in names[:5])
        raise InputNotFound(
            f"There are {len(names)} weight files here and nothing says which one is meant: "
            f"{listed}{', …' if len(names) > 5 else ''}.",
            file=names[0].rpartition("/")[0] or None,
            fix="Name the file itself (download it first if it is on the hub).",
        )
    chosen = usual[0] if usual else next(iter(stems))
    return groups[min((k for k in groups if k[0] == chosen), key=lambda k: _rank(k[1]))]


def _rank(variant: str) -> tuple[int, str]:
    precise = ("", "fp32", "bf16", "fp16")
    variant = variant.removeprefix(".")
    return (precise.index(variant) if variant in precise else len(precise), variant)


def _check_shards(folder: Path, chosen: list[str]) -> None:
    """A sharded set must be whole: by its own numbering, and by its index."""
    numbered = [m for m in map(_SHARD.fullmatch, chosen) if m]
    counts = {m["count"] for m in numbered}
    have = {int(m["number"]) for m in numbered}
    for count in counts:
        lost = sorted(set(range(1, int(count) + 1)) - have)[:1]
        if lost:
            wanted = chosen[0].replace(f"-{numbered[0]['number']}-", f"-{lost[0]:05d}-")
            raise _missing(folder, int(count) - len(have), wanted)
    kind = chosen[0].rpartition(".")[2] if chosen else "safetensors"
    for index in sorted(folder.glob(f"*.{kind}.index*.json")):
        try:
            mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = {str(shard) for shard in mapping.values()}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            continue
        lost_shards = sorted(s for s in shards if not (folder / s).is_file())
        # An index of another variant does not matter; one without any of its shards does if
        # there is nothing else to read.
        if lost_shards and (not chosen or set(chosen) & shards):
            raise _missing(index, len(lost_shards), lost_shards[0])


def _missing(place: Path, count: int, example: str) -> InputNotFound:
    return InputNotFound(
        f"{count} shard(s) of this checkpoint are not here, such as {example}.",
        file=place,
        fix="Download the missing files.",
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files of one local folder (not of its sub-folders).

    Raises
    ------
    InputNotFound
        A shard is missing, or several unlike files are there.
    PickleRefused
        The folder has only pickled weights.
    """
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
    except OSError as error:
        raise InputNotFound(
            f"The folder cannot be read: {error.strerror or error}.", file=folder
        ) from error
    try:
        chosen = one_variant(
            _weights(names),
            adapter="adapter_config.json" in names,
        )
    except InputNotFound as error:
        raise InputNotFound(error.what, file=folder, fix=error.fix) from None
    _check_shards(folder, chosen)
    if not chosen:
        pickles = [n for n in names if n.endswith(PICKLE_ENDINGS) and not _training_state(n)]
        if pickles:
            refuse_pickle(folder / pickles[0])
    paths = [folder / n for n in chosen]
    return [unpickled(p) if p.name.endswith(PICKLE_ENDINGS) else p for p in paths]
