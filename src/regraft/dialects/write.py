"""Writing an adapter: the dialect's writer makes the tensors, and the file appears whole or not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from regraft.adapters import Adapter
from regraft.bases import Base
from regraft.dialects.metadata import file_metadata, model_card
from regraft.dialects.writers import Form, Task, Writer, get_writer, writers
from regraft.dialects.writers.registry import Tensors, listed
from regraft.errors import BadOption, OutputFailed
from regraft.files import atomic_file, atomic_folder, serialize
from regraft.files.finite import is_finite

#: The second factor of a pair, or a change as a whole.
_SECOND = re.compile(r"\.(lora_up|lora_B|lora_embedding_B|lora_x_U|diff|diff_b|w_norm|b_norm)\b")
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass(frozen=True)
class Written:
    """What was written: the path, the SHA-256 of the weights file, and what it could not hold.

    ``refused`` is site → reason, the same as :func:`holdable` gives beforehand.
    """

    path: Path
    sha256: str
    refused: Mapping[str, str] = field(default_factory=dict)


def write_adapter(
    adapter: Adapter,
    target: Base,
    out: Path,
    *,
    dialect: str,
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    form: Form = "lora",
    same_base: bool = False,
) -> Written:
    """Write ``adapter`` (already on the target's sites) atomically, the same bytes every time.

    Parameters
    ----------
    adapter : Adapter
        On the target's sites.
    target : Base
        Gives names and shapes.
    out : Path
        A file, or for "peft" a folder.
    dialect : str
        One of :data:`regraft.dialects.DIALECTS`.
    dtype : torch.dtype
        Of the stored factors.
    provenance : mapping
        How the adapter was made; stored as one JSON value under ``regraft``.
    form : "lora" or "diff"
        Changes of weights as two factors, or whole (kohya and comfyui).
    same_base : bool
        The target is the base that the input was made for: what the input calls it is kept.

    Raises
    ------
    BadOption
        The dialect is unknown or can hold nothing of this adapter.
    OutputExists, OutputFailed
    """
    writer, task = _task(adapter, target, dialect, form, dtype)
    task = replace(task, same_base=same_base)
    refused = writer.refused(task)
    held = {s: u for s, u in adapter.updates.items() if s not in refused}
    if not held:
        raise _nothing(writer, set(refused.values()))
    task = replace(task, adapter=replace(adapter, updates=held))
    tensors = writer.tensors(task)
    check_range(tensors, dtype, out)
    metadata = file_metadata(task, dialect, tensors, provenance)
    said = {str(site): why for site, why in refused.items()}
    if writer.folder:
        with atomic_folder(out, overwrite=overwrite, replaceable=PEFT_FILES) as folder:
            sha = serialize(folder / "adapter_model.safetensors", tensors, metadata)
            settings = writer.config(task, tensors) if writer.config else {}
            config = json.dumps(settings, indent=2, sort_keys=True)
            (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
            card = model_card(task.adapter, target, provenance)
            (folder / "README.md").write_text(card, encoding="utf-8")
        return Written(out, sha, said)
    with atomic_file(out, overwrite=overwrite) as temporary:
        sha = serialize(temporary, tensors, metadata)
    return Written(out, sha, said)


def holdable(adapter: Adapter, target: Base, dialect: str, form: Form = "lora") -> dict[str, str]:
    """What a dialect cannot hold of an adapter: site → reason. Reads no weights.

    Raises
    ------
    BadOption
        The dialect is unknown, or can hold nothing of the adapter.
    """
    writer, task = _task(adapter, target, dialect, form, torch.float32)
    refused = writer.refused(task)
    if adapter.updates and len(refused) == len(adapter.updates):
        raise _nothing(writer, set(refused.values()))
    return {str(site): why for site, why in refused.items()}


def _nothing(writer: Writer, reasons: set[str]) -> BadOption:
    return BadOption(
        f"A {writer.name} file can hold nothing of this adapter: "
        f"{listed(reasons) or 'it changes nothing'}.",
        fix=f"Write it with --dialect {writer.instead}.",
    )


def _task(
    adapter: Adapter, target: Base, dialect: str, form: Form, dtype: torch.dtype
) -> tuple[Writer, Task]:
    writer = get_writer(dialect)
    if form not in writer.forms:
        able = " or ".join(w.name for w in writers() if form in w.forms)
        raise BadOption(
            f"The {dialect} dialect cannot hold changes in the form {form!r}.",
            fix=f"Write it with --dialect {able}, or as factors." if able else "Say lora or diff.",
        )
    return writer, Task(adapter, target, dtype, form)


def check_range(tensors: Tensors, dtype: torch.dtype, out: Path) -> None:
    """Raise :class:`OutputFailed` where the dtype is too small for a factor, or for all of them."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise OutputFailed(
                f"A factor does not fit {str(dtype).removeprefix('torch.')}.",
                file=out,
                tensor=name,
                fix="Write it with --dtype bf16 or fp32.",
            )
    # One factor of every pair is enough to make the file do nothing.
    last = [t for name, t in tensors.items() if _SECOND.search(name)]
    if last and not any(t.any() for t in last):
        raise OutputFailed(
            f"Every change is too small for {str(dtype).removeprefix('torch.')}: the file would "
            "change nothing.",
            file=out,
            fix="Write it with --dtype bf16 or fp32.",
        )
