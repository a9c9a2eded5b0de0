"""One argument, three meanings: a file, a folder, or a hub id ``org/name[@revision]``.

What exists on disk is taken from disk. What can only be a path is never sent to the hub.
The hub is asked through ``huggingface_hub``, which honours HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import HubUnavailable, InputNotFound
from regraft.files.tensorfile import PICKLE_ENDINGS, refuse_pickle

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
#: Folders of a diffusers pipeline whose weights adapters change.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Located:
    """Where an input lies on this disk, and what it was called.

    ``revision`` is the hub commit, when the input came from the hub.
    """

    ref: str
    path: Path
    repo: str | None = None
    revision: str | None = None


def _local(ref: str) -> Path | None:
    path = Path(ref).expanduser()
    if path.exists():
        if path.is_file() and path.suffix.lower() in PICKLE_ENDINGS:
            refuse_pickle(path)
        return path
    return None


def locate(ref: str | Path) -> Located:
    """Find an adapter or a base.

    Parameters
    ----------
    ref : str or Path
        A file, a folder, or a hub id ``org/name`` with an optional ``@revision``.

    Raises
    ------
    InputNotFound
        Nothing on disk has this name and it cannot be a hub id.
    HubUnavailable
        It reads as a hub id, but the hub did not give it.
    PickleRefused
        It is a pickled checkpoint.
    """
    text = str(ref)
    found = _local(text)
    if found is not None:
        return Located(text, found)
    if isinstance(ref, Path) or text.endswith(".safetensors") or not _HUB_ID.fullmatch(text):
        raise InputNotFound(
            "No such file or folder.",
            file=text,
            fix="Give a file, a folder, or a hub id such as org/name or org/name@revision.",
        )
    return _from_hub(text)


def _from_hub(ref: str) -> Located:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = ref.partition("@")
    try:
        wanted = _hub_files(repo, revision or None)
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=wanted)
    except GatedRepoError as error:
        raise HubUnavailable(
            f"The hub repository {repo} is gated.",
            fix="Accept its terms on the hub and set HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise HubUnavailable(
            f"The hub repository {repo} has no revision {revision!r}.",
            fix="Check the part after '@'.",
        ) from error
    except RepositoryNotFoundError as error:
        raise HubUnavailable(
            f"There is no file or folder {ref!r} here, and no such repository on the hub.",
            fix="Check the spelling; for a private repository set HF_TOKEN.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubUnavailable(
            f"There is no file or folder {ref!r} here, it is not in the hub cache, "
            "and the hub cannot be reached.",
            fix="Download it while online, or give a local path.",
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubUnavailable(
            f"The hub could not be asked for {repo}: {first}",
            fix="Check the connection and HF_ENDPOINT, or give a local path.",
        ) from error
    except Exception as error:  # httpx errors are not OSErrors, and are not part of our API
        if type(error).__module__.split(".")[0] not in {"httpx", "httpcore", "huggingface_hub"}:
            raise
        raise HubUnavailable(
            f"There is no file or folder {ref!r} here, and the hub cannot be reached "
            f"({type(error).__name__}).",
            fix="Check the connection, or give a local path.",
        ) from error
    path = Path(folder)
    return Located(ref, path, repo, path.name)


def _hub_files(repo: str, revision: str | None) -> list[str] | None:
    """The files worth downloading, or None (everything cached) when the hub is offline."""
    import huggingface_hub.constants as constants
    from huggingface_hub import HfApi

    if constants.HF_HUB_OFFLINE:
        return None
    names = HfApi().list_repo_files(repo, revision=revision)
    weights = pick_weights(names)
    if not weights and any(n.endswith(PICKLE_ENDINGS) for n in names):
        refuse_pickle(Path(repo) / next(n for n in names if n.endswith(PICKLE_ENDINGS)))
    small = [n for n in names if n.endswith(".json") and n.count("/") <= 1]
    return small + weights


def pick_weights(names: Iterable[str]) -> list[str]:
    """Choose the weight files of a repository or folder, one variant per component.

    Rules: inside a pipeline only the component folders, not the single-file copy at the root;
    in a folder with a shard index only its shards; full-precision files before variants
    (``.fp16.``); no ONNX, Flax or OpenVINO exports.
    """
    names = sorted(n for n in names if n.endswith(".safetensors"))
    by_folder: dict[str, list[str]] = {}
    for name in names:
        folder, _, _file = name.rpartition("/")
        if folder.count("/") == 0:
            by_folder.setdefault(folder, []).append(name)
    components = [f for f in by_folder if f in COMPONENTS]
    folders = components if components else [""]
    return [n for folder in folders for n in _one_variant(by_folder.get(folder, []))]


_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<variant>\.[a-z0-9_]+)?\.safetensors")


def _one_variant(names: list[str]) -> list[str]:
    if not names:
        return []
    groups: dict[str, list[str]] = {}
    for name in names:
        shard = _SHARD.fullmatch(name)
        key = f"{shard['stem']}{shard['variant'] or ''}.safetensors" if shard else name
        groups.setdefault(key, []).append(name)

    def rank(key: str) -> tuple[int, int, int, str]:
        file = key.rsplit("/", 1)[-1]
        usual = file.startswith(
            ("model.", "diffusion_pytorch_model.", "adapter_model.", "pytorch_lora_weights.")
        )
        variant = file.count(".") - 1  # model.fp16.safetensors
        return (variant, 0 if usual else 1, len(file), key)

    return groups[min(groups, key=rank)]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of one local folder (not of its sub-folders).

    A ``*.safetensors.index.json`` is believed: its shards must all be there.

    Raises
    ------
    InputNotFound
        A shard named by the index is missing.
    PickleRefused
        The folder has only pickled weights.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    chosen = _one_variant([n for n in names if n.endswith(".safetensors")])
    for index in (n for n in names if n.endswith(".safetensors.index.json")):
        try:
            shards = set(json.loads((folder / index).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        missing = sorted(str(s) for s in shards if not (folder / str(s)).is_file())
        if missing and (not chosen or set(chosen) & {str(s) for s in shards}):
            raise InputNotFound(
                f"The index lists {len(missing)} shard(s) that are not here, such as {missing[0]}.",
                file=folder / index,
                fix="Download the missing files.",
            )
    if not chosen:
        pickles = [n for n in names if n.endswith(PICKLE_ENDINGS)]
        if pickles:
            refuse_pickle(folder / pickles[0])
    return [folder / n for n in chosen]
