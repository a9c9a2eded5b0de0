"""An adapter file as written: its tensors grouped by module, before any base is known."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.adapters.families import family_meant, family_of, get_family
from regraft.dialects.keys import BESIDE, PEFT_PREFIX, by_module
from regraft.dialects.names import LORA_X_FORMAT, split_dotted, split_kohya
from regraft.dialects.refused import (
    beside,
    refuse_other_config,
    refuse_other_family,
    refuse_unchosen,
    said_twice,
)
from regraft.dialects.scale import component_config
from regraft.dialects.wrote import writer_of
from regraft.errors import (
    FamilyNotYet,
    InputNotFound,
    MalformedFile,
    NotAnAdapter,
    UnknownKeys,
)
from regraft.files import TensorFile, locate
from regraft.files.pickle_gate import original
from regraft.files.select import weight_files


@dataclass
class AdapterSource:
    """One adapter file, its keys sorted into modules and roles.

    Attributes
    ----------
    modules : dict
        Module name as written → {role: tensor name}; roles are those of ``keys.SUFFIXES``.
    families : dict
        Module name → the name of its family.
    refused : dict
        Tensor name → reason, for keys that are understood but not carried.
    config : dict
        ``adapter_config.json``, or the ``lora_adapter_metadata`` of a diffusers file.
    writer : str
        The program that wrote it, as far as the file tells; "unknown" if it does not.
    name : str
        What to call it: the hub repository's, folder's or file's own name.
    config_path : Path or None
        The ``adapter_config.json``, if there is one.
    """

    ref: str
    file: TensorFile
    dialect: str
    modules: dict[str, dict[str, str]]
    families: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = ""
    config_path: Path | None = None
    writer: str = "unknown"

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def family(self) -> str:
        """The families of its modules, the most frequent first."""
        return " + ".join(name for name, _ in Counter(self.families.values()).most_common())

    def settings(self, module: str) -> dict[str, Any]:
        """What the file says of itself that speaks of a module.

        Its config; the metadata and the trainer's network arguments where it has none.
        """
        if self.config:
            return _own_config(self.config, module)
        return network_settings(self.file.metadata)

    def rank(self, module: str) -> int | None:
        """The rank one module was trained at, by the shapes of its tensors."""
        shapes = {role: self.file[t].shape for role, t in self.modules[module].items()}
        return get_family(self.families[module]).rank(shapes)

    def sha256(self) -> str:
        """SHA-256 of the weights file; of a pickle, not of its copy."""
        digest = hashlib.sha256()
        with open(original(self.path), "rb") as stream:
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


def open_source(ref: str | Path, *, allow_unknown: bool = False) -> AdapterSource:
    """Open an adapter: hub id, PEFT folder, or single ``.safetensors`` file.

    Parameters
    ----------
    ref : str or Path
    allow_unknown : bool
        Record tensors that fit no rule in ``refused`` instead of raising.

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
    at_its_side = path.parent / "adapter_config.json"
    if not config and at_its_side.is_file() and path.name == "adapter_model.safetensors":
        config = _read_json(at_its_side)
        refuse_other_config(config, at_its_side)
    keys = list(file)
    if not keys:
        raise NotAnAdapter("The file holds no tensors.", file=path, fix="Check which file this is.")
    if not config and "lora_adapter_metadata" in file.metadata:
        settings = _diffusers_metadata(file)
    else:
        settings = config
    refuse_other_family(keys, path)
    grouped = _group(keys, file, config, allow_unknown)
    dialect = _dialect(grouped.modules, bool(config))
    general = settings or network_settings(file.metadata)
    told = at_its_side if config else path
    families = {
        name: _family(name, roles, general, file, told) for name, roles in grouped.modules.items()
    }
    if "lora-x" in families.values():
        dialect = _lora_x(families, file)
    source = AdapterSource(
        str(ref), file, dialect, grouped.modules, families, settings, grouped.refused
    )
    source.config_path = at_its_side if config else None
    source.writer = writer_of(keys, file.metadata, config)
    if located.repo:
        source.name = located.repo.rpartition("/")[2]
    else:
        generic = path.name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
        source.name = path.resolve().parent.name if generic else path.stem
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


@dataclass
class _Grouped:
    modules: dict[str, dict[str, str]]
    refused: dict[str, str]


def _group(
    keys: list[str], file: TensorFile, config: dict[str, Any], allow_unknown: bool
) -> _Grouped:
    """Keys by module and role; every key is in one, refused with a reason, or an error."""
    found, rest = by_module(keys)
    modules: dict[str, dict[str, str]] = {}
    for name, pairs in found.items():
        roles = modules.setdefault(name, {})
        for role, key in pairs:
            if role in roles:
                raise MalformedFile(
                    f"The module {name} has two tensors for its {role}: {roles[role]} and {key}.",
                    file=file.path,
                    tensor=key,
                    fix="Remove one of them.",
                )
            roles[role] = key
    refused: dict[str, str] = {}
    unknown: list[str] = []
    for key in rest:
        meant = beside(key, config)
        if isinstance(meant, tuple):
            roles = modules.setdefault(meant[0], {})
            first = roles.setdefault(meant[1], key)
            if first != key:
                refused[key] = said_twice(file, first, key)
        elif meant is None:
            unknown.append(key)
        else:
            refused[key] = meant
    _share(modules, unknown)
    if not modules:
        _maybe_textual_inversion(keys, file)
        raise NotAnAdapter(
            f"None of its {len(keys)} tensors belongs to an adapter (first: {keys[0][:80]}).",
            file=file.path,
            fix="If this is a base model, give it as --from or --to.",
        )
    if unknown and not allow_unknown:
        listed = ", ".join(unknown[:5]) + (
            f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        )
        raise UnknownKeys(
            f"{len(unknown)} tensor(s) fit no known rule: {listed}.",
            file=file.path,
            fix="To carry the rest and have these recorded, pass --allow-unknown.",
        )
    refused |= dict.fromkeys(unknown, "fits no known rule; left out as --allow-unknown asks")
    return _Grouped(modules, refused)


def _share(modules: dict[str, dict[str, str]], unknown: list[str]) -> None:
    """Give VeRA's two matrices, which its file holds once, to every module that needs them."""
    found = {}
    for key in list(unknown):
        if match := re.fullmatch(r"base_model\.vera_([AB])(\.\w+)?", key):
            found[f"vera_{match[1].lower()}"] = key
            unknown.remove(key)
    for roles in modules.values():
        if "vera_lambda_b" in roles:
            roles |= found


def network_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """A file's metadata as settings, the arguments a trainer gave its network among them."""
    settings: dict[str, Any] = {k: v for k, v in metadata.items() if len(v) < 1000}
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        arguments = {}
    return settings | arguments if isinstance(arguments, dict) else settings


def _own_config(config: dict[str, Any], module: str) -> dict[str, Any]:
    split = split_dotted(module.removeprefix(PEFT_PREFIX))
    return component_config(config, split[0].rstrip(".")) if split else config


def _family(
    name: str, roles: dict[str, str], general: dict[str, Any], file: TensorFile, told: Path
) -> str:
    """The family of one module.

    Raises
    ------
    MalformedFile
        Its tensors make no whole update.
    FamilyNotYet
        The settings mean a family that is not read.
    """
    settings = _own_config(general, name)
    family = family_of(roles, settings) or family_of(roles.keys() - BESIDE.keys(), settings)
    if family is not None:
        refuse_unchosen(family, settings, told)
        if settings.get("use_dora") and family.name == "lora" and "down" in roles:
            raise MalformedFile(
                f"The config says DoRA, but the module {name} has no magnitude.",
                file=file.path,
                tensor=next(iter(roles.values())),
                fix="Some tools strip it; get the file as it was saved.",
            )
        return family.name
    if "vera_lambda_b" in roles and "vera_a" not in roles:
        raise FamilyNotYet(
            "This VeRA file does not hold the random matrices that its layers share.",
            file=file.path,
            tensor=roles["vera_lambda_b"],
            fix="Save it again with save_projection=True.",
        )
    meant = family_meant(roles.keys() - {"alpha"})
    if meant is None:
        why = "it lacks its factors"
    else:
        odd = {need: len(roles.keys() - need - meant.may) for need in meant.needs}
        need = min(odd, key=lambda need: (odd[need], len(need - roles.keys()), sorted(need)))
        lost = sorted(need - roles.keys())
        strange = ", ".join(sorted(roles.keys() - need - meant.may))
        why = f"it lacks {', '.join(lost)}" if lost else f"{strange} do not belong with them"
    raise MalformedFile(
        f"The module {name} has {', '.join(sorted(roles))}: {why}.",
        file=file.path,
        tensor=next(iter(roles.values())),
        fix="The file is incomplete; download it again or ask its author.",
    )


def _lora_x(families: dict[str, str], file: TensorFile) -> str:
    found = set(families.values())
    if found == {"lora-x", "whole"}:  # PEFT's modules_to_save beside it; a LoRA-X file has none
        return "peft"
    if found != {"lora-x"}:
        raise MalformedFile(
            "Some modules are of another family and some LoRA-X.",
            file=file.path,
            fix="Keep them in two files.",
        )
    _check_lora_x_version(file)
    return "lora-x"


def _check_lora_x_version(file: TensorFile) -> None:
    """Refuse a LoRA-X file of a later version than this one writes."""
    said = file.metadata.get("regraft.format", LORA_X_FORMAT)
    if said != LORA_X_FORMAT:
        raise FamilyNotYet(
            f"This LoRA-X file is in the form {said[:40]!r}, which is not read yet.",
            file=file.path,
            fix=f"This version reads {LORA_X_FORMAT}; a newer regraft wrote it.",
        )


def _maybe_textual_inversion(keys: list[str], file: TensorFile) -> None:
    """A textual inversion may be one embedding under its own token's name."""
    widths = {file[key].shape[-1] for key in keys if len(file[key].shape) in (1, 2)}
    if len(keys) <= 2 and widths and widths <= {768, 1024, 1280, 4096} and "." not in keys[0]:
        raise FamilyNotYet(
            "This looks like a textual inversion embedding, which is not read yet.",
            file=file.path,
            tensor=keys[0],
            fix="docs/formats.md lists the families that this version reads.",
        )


def _dialect(modules: dict[str, dict[str, str]], has_config: bool) -> str:
    first = next(iter(modules))
    if has_config or first.startswith(PEFT_PREFIX):
        return "peft"
    if first.startswith(("diffusion_model.", "text_encoders.")):
        return "comfyui"
    return "kohya" if split_kohya(first) else "diffusers"
