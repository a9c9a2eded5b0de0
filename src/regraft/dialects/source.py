"""An adapter file as written: its tensors grouped by module, before any base is known."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.dialects.families import refuse_other_config, refuse_other_family
from regraft.dialects.names import PEFT_PREFIX, split_key, split_kohya
from regraft.errors import InputNotFound, MalformedFile, NotAnAdapter, UnknownKeys
from regraft.files import TensorFile, locate
from regraft.files.locate import weight_files


@dataclass
class AdapterSource:
    """One adapter file, its keys sorted into modules and roles.

    Attributes
    ----------
    modules : dict
        Module name as written → {role: tensor name}; roles are in ``names.SUFFIXES``.
    refused : dict
        Tensor name → reason, for keys that are understood but not carried.
    config : dict
        ``adapter_config.json``, or the ``lora_adapter_metadata`` of a diffusers file.
    """

    ref: str
    file: TensorFile
    dialect: str
    modules: dict[str, dict[str, str]]
    config: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def family(self) -> str:
        return "lora-x" if self.dialect == "lora-x" else "lora"

    def sha256(self) -> str:
        """SHA-256 of the weights file."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFile(f"Not valid JSON ({error}).", file=path) from error
    if not isinstance(value, dict):
        raise MalformedFile("Not a JSON object.", file=path)
    return value


def open_source(ref: str | Path) -> AdapterSource:
    """Open an adapter: hub id, PEFT folder, or single ``.safetensors`` file.

    Raises
    ------
    InputNotFound, HubUnavailable, PickleRefused, MalformedFile
    NotAnAdapter
        No key looks like an adapter's.
    FamilyNotYet
        The family is recognised but not read by this version.
    UnknownKeys
        Some keys fit no rule.
    """
    located = locate(ref)
    path, config = located.path, {}
    if path.is_dir():
        files = weight_files(path)
        if not files:
            raise InputNotFound(
                "The folder holds no .safetensors adapter.",
                file=path,
                fix="A PEFT folder has adapter_config.json and adapter_model.safetensors.",
            )
        path = files[0]
    file = TensorFile(path)
    beside = path.parent / "adapter_config.json"
    if beside.is_file() and (located.path.is_dir() or path.name == "adapter_model.safetensors"):
        config = _read_json(beside)
        refuse_other_config(config, beside)
    keys = list(file)
    if not keys:
        raise NotAnAdapter("The file holds no tensors.", file=path)
    refuse_other_family(keys, path)
    dialect, modules, refused = _group(keys, file, bool(config))
    source = AdapterSource(str(ref), file, dialect, modules, config, refused)
    if not config and "lora_adapter_metadata" in file.metadata:
        source.config = _diffusers_metadata(file)
    return source


def _diffusers_metadata(file: TensorFile) -> dict[str, Any]:
    """The LoRA settings diffusers keeps in a file's metadata; flat, or per component."""
    try:
        value = json.loads(file.metadata["lora_adapter_metadata"])
    except ValueError as error:
        raise MalformedFile(
            "The metadata 'lora_adapter_metadata' is not valid JSON.", file=file.path
        ) from error
    if not isinstance(value, dict):
        raise MalformedFile("'lora_adapter_metadata' is not an object.", file=file.path)
    for component in {"", *(k.split(".")[0] + "." for k in value if "." in k)}:
        own = {k.removeprefix(component): v for k, v in value.items() if k.startswith(component)}
        refuse_other_config(own, file.path)
    return value


def _group(
    keys: list[str], file: TensorFile, has_config: bool
) -> tuple[str, dict[str, dict[str, str]], dict[str, str]]:
    modules: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}
    unknown: list[str] = []
    for key in keys:
        split = split_key(key)
        if split is None:
            if has_config and key.startswith(PEFT_PREFIX):
                # PEFT's modules_to_save: whole replaced weights, which have no ΔW to carry.
                refused[key] = "a whole trained weight (modules_to_save), not an update"
            else:
                unknown.append(key)
            continue
        name, role = split
        if role == "bias":
            refused[key] = "a trained bias of the LoRA; biases are not carried yet"
            continue
        modules.setdefault(name, {})[role] = key
    if not modules:
        raise NotAnAdapter(
            f"None of its {len(keys)} tensors belongs to an adapter (first: {keys[0][:80]}).",
            file=file.path,
            fix="If this is a base model, give it as --from or --to.",
        )
    if unknown:
        listed = ", ".join(unknown[:5]) + (
            f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        )
        raise UnknownKeys(
            f"{len(unknown)} tensor(s) fit no known rule: {listed}.",
            file=file.path,
            fix="Nothing is dropped in silence; please report the file's origin.",
        )
    for name, roles in modules.items():
        missing = _missing(roles)
        if missing:
            raise MalformedFile(
                f"The module {name} has {', '.join(sorted(roles))} but no {missing}.",
                file=file.path,
                tensor=next(iter(roles.values())),
            )
    return _dialect(modules, has_config), modules, refused


def _missing(roles: dict[str, str]) -> str:
    for group in (("down", "up"), ("embedding_a", "embedding_b"), ("u", "core", "v")):
        if roles.keys() & set(group):
            return ", ".join(r for r in group if r not in roles)
    return "factors"


def _dialect(modules: dict[str, dict[str, str]], has_config: bool) -> str:
    first = next(iter(modules))
    if "core" in modules[first]:
        return "lora-x"
    if has_config or first.startswith(PEFT_PREFIX):
        return "peft"
    if "." not in first and split_kohya(first):
        return "kohya"
    return "diffusers"
