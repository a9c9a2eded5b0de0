"""Fetching from the hub through ``huggingface_hub``: only the files that will be read, never code.

It honours HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Offline, or when the
hub cannot be reached, what is in the cache is used.
"""

from __future__ import annotations

from pathlib import Path

from regraft.errors import HubUnavailable
from regraft.files.select import COMPONENTS, RUNNING_COMPONENTS, pick_weights
from regraft.files.tensorfile import PICKLE_ENDINGS, refuse_pickle

#: Ends of the small files beside the weights: always, and also to run (tokenizers, chat templates).
_SMALL = (".json",)
_SMALL_TO_RUN = (".json", ".txt", ".model", ".jinja")


def from_hub(repo: str, revision: str | None, *, to_run: bool = False) -> Path:
    """The local snapshot of a hub repository, downloaded if need be.

    ``to_run`` adds what running it needs beside the weights of its sites: VAE, tokenizer files
    and chat templates. Code (``.py``) is never fetched.

    Raises
    ------
    HubUnavailable
        Unreachable, no such repository or revision, gated, or not wholly cached while offline.
    InputNotFound
        It holds no weights, or several unlike ones.
    PickleRefused
        It holds only pickled weights.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    ref = repo if revision is None else f"{repo}@{revision}"
    try:
        find = _cached if constants.HF_HUB_OFFLINE else _download
        return find(repo, revision, to_run)
    except GatedRepoError as error:
        raise HubUnavailable(
            f"The hub repository {repo} is gated.",
            fix="Accept its terms on the hub and set HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise HubUnavailable(
            f"The hub repository {repo} has no revision {revision or 'main'!r}.",
            fix="Check the part after '@'.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubUnavailable(
            f"There is no file or folder {ref!r} here, and no such repository on the hub.",
            fix="Check the spelling; for a private repository set HF_TOKEN.",
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise HubUnavailable(
            f"There is no file or folder {ref!r} here, it is not in the hub cache, and {why}.",
            fix="Download it while online, or give a local path.",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubUnavailable(
            f"The hub did not give {ref}: {first}",
            fix="Check the connection, HF_ENDPOINT and the free space, or give a local path.",
        ) from error
    except Exception as error:
        if not _unreachable(error):
            raise
        raise HubUnavailable(
            f"The hub connection broke while {ref} was fetched ({type(error).__name__}).",
            fix="Run it again, or give a local path.",
        ) from error


def _unreachable(error: Exception) -> bool:
    """Whether the hub could not be talked to at all (as opposed to: it said no)."""
    # The HTTP client's errors are not OSErrors, and which client it is (httpx, httpx2) is the
    # hub library's business.
    client = type(error).__module__.split(".")[0].startswith(("httpx", "httpcore"))
    status = getattr(getattr(error, "response", None), "status_code", 0) or 0
    return client or isinstance(error, ConnectionError | TimeoutError) or status >= 500


def _download(repo: str, revision: str | None, to_run: bool = False) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        # One request without retries; list_repo_files would wait half a minute for a dead hub.
        siblings = HfApi().model_info(repo, revision=revision).siblings or []
        names = [sibling.rfilename for sibling in siblings]
    except Exception as error:
        if not _unreachable(error):
            raise
        return _cached(repo, revision, to_run)
    weights = pick_weights(names, RUNNING_COMPONENTS if to_run else COMPONENTS)
    if not weights:
        pickles = [n for n in names if n.endswith(PICKLE_ENDINGS)]
        if pickles:
            refuse_pickle(Path(repo) / pickles[0])
        raise HubUnavailable(
            f"The hub repository {repo} holds no .safetensors weights.", fix="Check its name."
        )
    ends = _SMALL_TO_RUN if to_run else _SMALL
    small = [n for n in names if n.endswith(ends) and n.count("/") <= 1]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=small + weights))


def _cached(repo: str, revision: str | None, to_run: bool = False) -> Path:
    """The snapshot in the cache. Which of its files are whole is checked when they are opened."""
    import huggingface_hub

    # The empty pattern asks for no file in particular: the cache usually holds one variant only,
    # and the library would call that incomplete.
    folder = Path(
        huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=[], local_files_only=True
        )
    )
    tree = getattr(huggingface_hub, "get_cached_repo_tree", None)  # new in huggingface_hub 2
    try:
        names = [file.path for file in tree(repo, revision=revision)] if tree else []
    except Exception as error:
        if type(error).__name__ != "CachedRepoTreeNotFoundError":
            raise
        names = []  # nothing known of the whole: open what is there
    here = [n for n in names if (folder / n).exists()]
    parts = RUNNING_COMPONENTS if to_run else COMPONENTS
    lost = {n.rpartition("/")[0] for n in pick_weights(names, parts)} - {
        n.rpartition("/")[0] for n in pick_weights(here, parts)
    }
    if lost:
        raise HubUnavailable(
            f"The cached copy of {repo} lacks the weights of {', '.join(sorted(lost)) or 'it'}, "
            "and the hub cannot be asked.",
            fix="Download it while online.",
        )
    return folder
