"""The folder that a merged folder becomes: which files are made anew, which are copied, which stay.

No weights of the unmerged model may be where a loader could take them for the merged one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regraft.errors import InputNotFound, OutputFailed
from regraft.files import TensorFile

#: Where a merged folder says what it is.
PROVENANCE = "regraft.json"
#: Ends of files that hold weights, in any framework.
_WEIGHTS: tuple[str, ...] = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".gguf",
    ".h5",
    ".msgpack",
)
_WEIGHTS += (".onnx", ".onnx_data", ".ot", ".tflite", ".pb", ".npz")
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass
class Layout:
    """Files by their path in the folder.

    Attributes
    ----------
    made : dict of str to TensorFile
        Weight files that are written anew.
    copied : dict of str to Path
    edited : dict of str to bytes
        Files with new content: JSON that speaks of dtypes or sizes, and what the merge adds.
    left_out : list of str
        Weight files that are neither: other copies of the unmerged model.
    """

    made: dict[str, TensorFile] = field(default_factory=dict)
    copied: dict[str, Path] = field(default_factory=dict)
    edited: dict[str, bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        return {*self.made, *self.copied, *self.edited}


def lay_out(
    folder: Path, used: Iterable[TensorFile], changed: Iterable[TensorFile], *, whole: bool
) -> Layout:
    """Sort the files of a base's folder.

    Parameters
    ----------
    folder : Path
    used : iterable of TensorFile
        Every file that the base was opened from.
    changed : iterable of TensorFile
        Those that hold a weight that changes.
    whole : bool
        All files of a component that changes are made anew, not only those that hold a change.
    """
    used_by_name = {_inside(f.path, folder): f for f in used}
    changed_names = {_inside(f.path, folder) for f in changed}
    components = {_parent(name) for name in changed_names}
    layout = Layout()
    for name in sorted(walk(folder)):
        path, parent = folder / name, _parent(name)
        if name in changed_names or (whole and name in used_by_name and parent in components):
            layout.made[name] = used_by_name[name]
        elif name in used_by_name or not is_weights(name):
            if not _stale_index(path, parent, used_by_name, components) and name != PROVENANCE:
                layout.copied[name] = path
        elif _belongs(folder, parent, components):
            layout.copied[name] = path
        else:
            layout.left_out.append(name)
    return layout


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def is_weights(name: str) -> bool:
    """Whether a file holds weights, by its name's end."""
    return name.endswith(_WEIGHTS)


def _belongs(folder: Path, parent: str, components: set[str]) -> bool:
    """Whether weights of a sub-folder are of another part of the model, not of one that changes."""
    own = bool(parent) and (folder / parent / "config.json").is_file()
    return own and parent not in components


def _stale_index(
    path: Path, parent: str, used: Mapping[str, TensorFile], components: set[str]
) -> bool:
    """Whether it is the index of other shards of a component that changes."""
    if parent not in components or not path.name.endswith(".json") or ".index" not in path.name:
        return False
    shards = _json(path).get("weight_map")
    if not isinstance(shards, dict):
        return False
    front = f"{parent}/" if parent else ""
    return not {f"{front}{shard}" for shard in shards.values()} <= set(used)


def walk(folder: Path) -> Iterator[str]:
    """Files by their path in the folder; hidden ones (caches, git) are not the model's.

    Links are followed, but not into a folder that holds them.

    Raises
    ------
    InputNotFound
        A link leads nowhere.
    """
    return _below(folder, "", (os.path.realpath(folder),))


def _below(folder: Path, front: str, above: tuple[str, ...]) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        real = os.path.realpath(path)
        if path.is_dir():
            if real not in above:
                yield from _below(path, f"{front}{path.name}/", (*above, real))
        elif path.is_file():
            yield f"{front}{path.name}"
        elif path.is_symlink():
            raise InputNotFound(
                f"A link in the folder leads nowhere: {front}{path.name}.",
                file=folder,
                fix="Download the file, or remove the link.",
            )


def edit_dtypes(layout: Layout, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """Let configs and indices of components that are written in another dtype say so.

    Parameters
    ----------
    sizes : mapping of str to int
        Made file → bytes of its tensors.
    """
    name = str(dtype).removeprefix("torch.")
    for parent in {_parent(made) for made in layout.made}:
        front = f"{parent}/" if parent else ""
        for file, path in list(layout.copied.items()):
            if _parent(file) != parent or not file.endswith(".json"):
                continue
            content = _json(path)
            if file == f"{front}config.json":
                edited = _with_dtype(content, name)
            elif ".index" in file and isinstance(content.get("metadata"), dict):
                total = sum(size for made, size in sizes.items() if _parent(made) == parent)
                edited = content | {"metadata": content["metadata"] | {"total_size": total}}
            else:
                continue
            if edited != content:
                text = json.dumps(edited, indent=2, ensure_ascii=False) + "\n"
                layout.edited[file] = text.encode()
                del layout.copied[file]


def _with_dtype(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        floats = ("float16", "bfloat16", "float32")
        return {
            k: name if k in _DTYPE_KEYS and v in floats else _with_dtype(v, name)
            for k, v in value.items()
        }
    return [_with_dtype(v, name) for v in value] if isinstance(value, list) else value


def check_space(where: Path, needed: int) -> None:
    """Raise :class:`OutputFailed` if the disk has not this many free bytes."""
    while not where.exists() and where != where.parent:
        where = where.parent
    try:
        free = shutil.disk_usage(where).free
    except OSError:
        return  # the write itself will tell
    if free < needed:
        raise OutputFailed(
            f"The output needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free.",
            file=where,
            fix="Free some space, or write to another disk.",
        )


def left_out(layout: Layout) -> list[str]:
    """A note on weights that are not copied."""
    if not layout.left_out:
        return []
    listed = ", ".join(layout.left_out[:5]) + (" …" if len(layout.left_out) > 5 else "")
    return [f"Not copied, since they hold the unmerged weights: {listed}."]


def lost_parts(folder: Path) -> list[str]:
    """Notes on what the folder names and lacks: parts of a pipeline, and code of a model's own."""
    index, notes = _json(folder / "model_index.json"), []
    wanted = [k for k, v in index.items() if isinstance(v, list) and v and v[0]]
    if lost := [name for name in wanted if not (folder / name).is_dir()]:
        notes.append(
            f"The base's folder lacks {', '.join(lost)}, which its model_index.json names; the "
            "output lacks them too."
        )
    named: set[str] = set()
    for file in ("config.json", "tokenizer_config.json"):
        classes = _json(folder / file).get("auto_map")
        for value in classes.values() if isinstance(classes, dict) else ():
            for name in value if isinstance(value, list) else [value]:
                # "module.Class"; "repository--module.Class" lies elsewhere
                if isinstance(name, str) and "--" not in name:
                    named.add(f"{name.partition('.')[0]}.py")
    if code := sorted(name for name in named if not (folder / name).is_file()):
        notes.append(
            f"The model has code of its own ({', '.join(code)}), which is neither fetched nor run; "
            "put it beside the output to load it with trust_remote_code."
        )
    return notes


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def finish(layout: Layout, folder: Path) -> int:
    """Put what is not made anew into the new folder; gives the size of all its files in bytes."""
    for name, source in layout.copied.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)  # the content, where the hub's cache has a link
    for name, content in layout.edited.items():
        (folder / name).write_bytes(content)
    return sum((folder / name).stat().st_size for name in layout.names)
