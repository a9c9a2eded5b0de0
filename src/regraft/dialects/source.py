"""An adapter file as written: its tensors grouped by module, before any base is known."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.dialects.families import refuse_other_config, refuse_other_family
from regraft.dialects.names import LORA_X_FORMAT, PEFT_PREFIX, split_key, split_kohya
from regraft.errors import (
    FamilyNotYet,
    InputNotFound,
    MalformedFile,
    NotAnAdapter,
    UnknownKeys,
)
from regraft.files import TensorFile, locate
from regraft.files.select import weight_files


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
    name : str
        What to call it: the hub repository's, folder's or file's own name.
    config_path : Path or None
        The ``adapter_config.json``, if there is one.
    """

    ref: str
    file: TensorFile
    dialect: str
    modules: dict[str, dict[str, str]]
    config: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = ""
    config_path: Path | None = None

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def family(self) -> str:
        return "lora-x" if self.dialect == "lora-x" else "lora"

    def rank(self, module: str) -> int:
        """The rank of one module, read off its factors' shapes."""
        roles = self.modules[module]
        key = next(r for r in ("down", "embedding_a", "u") if r in roles)
        shape = self.file[roles[key]].shape
        return shape[1 if key == "u" else 0] if len(shape) > 1 else 0

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
    except (ValueError, RecursionError, OSError) as error:
        raise MalformedFile(
            f"Not valid JSON ({error}).", file=path, fix="Save the adapter again with PEFT."
        ) from error
    if not isinstance(value, dict):
        raise MalformedFile("Not a JSON object.", file=path, fix="Save the adapter again.")
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
        if (path / "adapter_config.json").is_file():
            config = _read_json(path / "adapter_config.json")
            refuse_other_config(config, path / "adapter_config.json")
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
    if not config and beside.is_file() and path.name == "adapter_model.safetensors":
        config = _read_json(beside)
        refuse_other_config(config, beside)
    keys = list(file)
    if not keys:
        raise NotAnAdapter("The file holds no tensors.", file=path, fix="Check which file this is.")
    refuse_other_family(keys, path)
    dialect, modules, refused = _group(keys, file, config)
    if dialect == "lora-x":
        _check_lora_x_version(file)
    source = AdapterSource(str(ref), file, dialect, modules, config, refused)
    source.config_path = beside if config else None
    if located.repo:
        source.name = located.repo.rpartition("/")[2]
    else:
        generic = path.name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
        source.name = path.resolve().parent.name if generic else path.stem
    if not config and "lora_adapter_metadata" in file.metadata:
        source.config = _diffusers_metadata(file)
    return source


def _diffusers_metadata(file: TensorFile) -> dict[str, Any]:
    """The LoRA settings diffusers keeps in a file's metadata; flat, or per component."""
    try:
        value = json.loads(file.metadata["lora_adapter_metadata"])
    except (ValueError, RecursionError) as error:
        raise MalformedFile(
            "The metadata 'lora_adapter_metadata' is not valid JSON.",
            file=file.path,
            fix="Save the adapter again with diffusers.",
        ) from error
    if not isinstance(value, dict):
        raise MalformedFile(
            "The metadata 'lora_adapter_metadata' is not an object.",
            file=file.path,
            fix="Save the adapter again with diffusers.",
        )
    for component in {"", *(k.split(".")[0] + "." for k in value if "." in k)}:
        own = {k.removeprefix(component): v for k, v in value.items() if k.startswith(component)}
        refuse_other_config(own, file.path)
    return value


def _group(
    keys: list[str], file: TensorFile, config: dict[str, Any]
) -> tuple[str, dict[str, dict[str, str]], dict[str, str]]:
    modules: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}
    unknown: list[str] = []
    for key in keys:
        split = split_key(key)
        if split is None:
            reason = _not_an_update(key, config)
            if reason is None:
                unknown.append(key)
            else:
                refused[key] = reason
            continue
        name, role = split
        if role == "bias":
            refused[key] = "a trained bias of the LoRA; biases are not carried yet"
            continue
        others = modules.setdefault(name, {})
        if role in others:
            raise MalformedFile(
                f"The module {name} has two tensors for its {role}: {others[role]} and {key}.",
                file=file.path,
                tensor=key,
                fix="Remove one of them.",
            )
        others[role] = key
    if not modules:
        _maybe_textual_inversion(keys, file)
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
                f"The module {name} has {', '.join(sorted(roles))}: {missing}.",
                file=file.path,
                tensor=next(iter(roles.values())),
                fix="The file is incomplete; download it again or ask its author.",
            )
    return _dialect(modules, file.path, bool(config)), modules, refused


def _check_lora_x_version(file: TensorFile) -> None:
    """Refuse a LoRA-X file of a later version than this one writes."""
    said = file.metadata.get("regraft.format", LORA_X_FORMAT)
    if said != LORA_X_FORMAT:
        raise FamilyNotYet(
            f"This LoRA-X file is in the form {said[:40]!r}, which is not read yet.",
            file=file.path,
            fix=f"This version reads {LORA_X_FORMAT}; a newer regraft wrote it.",
        )


def _not_an_update(key: str, config: dict[str, Any]) -> str | None:
    """Why a tensor that PEFT saves beside its LoRA is not carried; None if it is unknown."""
    if not config or not key.startswith(PEFT_PREFIX):
        return None
    module = key.removeprefix(PEFT_PREFIX).rpartition(".")[0]
    saved = [str(name) for name in config.get("modules_to_save") or []]
    if any(f".{module}.".find(f".{name}.") >= 0 for name in saved):
        return "a whole trained weight (modules_to_save), not an update"
    if ".trainable_tokens_" in key:
        return "trained token rows (trainable_token_indices), not an update"
    if key.endswith(".bias") and config.get("bias", "none") != "none":
        return "a trained bias; biases are not carried yet"
    if module.endswith((".base_layer", "embed_tokens", "lm_head", "wte", "word_embeddings")):
        return "a copy of the base's own embedding, saved beside the adapter"
    return None


def _maybe_textual_inversion(keys: list[str], file: TensorFile) -> None:
    """A textual inversion may be one embedding under its own token's name."""
    widths = {file[key].shape[-1] for key in keys if len(file[key].shape) in (1, 2)}
    if len(keys) <= 2 and widths and widths <= {768, 1024, 1280, 4096} and "." not in keys[0]:
        raise FamilyNotYet(
            "This looks like a textual inversion embedding, which is not read yet.",
            file=file.path,
            tensor=keys[0],
            fix="This version carries ordinary LoRA (linear and convolution) and LoRA-X.",
        )


def _missing(roles: dict[str, str]) -> str:
    """What is wrong with the set of tensors of one module; empty if nothing is."""
    for group in (("down", "up"), ("embedding_a", "embedding_b"), ("u", "core", "v")):
        if roles.keys() & set(group):
            lost = [r for r in group if r not in roles]
            # LoRA-X has no alpha: U S Vᵀ is ΔW.
            own = {*group} if "core" in group else {*group, "alpha"}
            strange = sorted(roles.keys() - own)
            if lost:
                return f"it lacks {', '.join(lost)}"
            return f"{', '.join(strange)} do not belong with them" if strange else ""
    return "it lacks its factors"


def _dialect(modules: dict[str, dict[str, str]], path: Path, has_config: bool) -> str:
    first = next(iter(modules))
    spectral = ["core" in roles for roles in modules.values()]
    if any(spectral) and not all(spectral):
        raise MalformedFile(
            "Some modules are LoRA and some LoRA-X.",
            file=path,
            fix="Keep them in two files.",
        )
    if spectral[0]:
        return "lora-x"
    if has_config or first.startswith(PEFT_PREFIX):
        return "peft"
    if "." not in first and split_kohya(first):
        return "kohya"
    return "diffusers"
