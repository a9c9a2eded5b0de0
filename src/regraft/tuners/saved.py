"""Putting a saved adapter onto a bare model, where its own loader knows LoRA only (diffusers)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import set_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from regraft.errors import (
    InputNotFound,
    MalformedFile,
    NotAnAdapter,
    ShapeMismatch,
    SitesNotInBase,
)
from regraft.files import TensorFile
from regraft.files.select import weight_files

_PREFIX = "base_model.model."


def load_onto(
    model: nn.Module, path: str | Path, adapter_name: str = "default", *, trainable: bool = False
) -> None:
    """Load an adapter that PEFT or diffusers saved onto a model that is not a ``PeftModel``.

    Parameters
    ----------
    model : nn.Module
        A diffusers or transformers model, or any other.
    path : str or Path
        A PEFT folder, or a file of ``save_lora_adapter`` or its folder.
    adapter_name : str
    trainable : bool
        Train it on.

    Raises
    ------
    InputNotFound, MalformedFile, NonFiniteTensor
    NotAnAdapter
        Nothing says which method it is of.
    SitesNotInBase
        The model lacks modules of the adapter.
    ShapeMismatch, WrongBase
        The model is not the one that the adapter is for. Layers that were put on it stay.
    """
    path = Path(path)
    files = weight_files(path) if path.is_dir() else [path]
    if not files:
        raise InputNotFound("The folder holds no .safetensors adapter.", file=path)
    file = TensorFile(files[0])
    settings = settings_of(file)
    method = str(settings.get("peft_type", "")).upper()
    if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise NotAnAdapter(
            f"PEFT has no method {method or 'for it'}.",
            file=file.path,
            fix="Give the folder that PEFT saved, with its adapter_config.json.",
        )
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    known = {field.name for field in fields(config_cls)}
    if later := sorted(settings.keys() - known):
        warnings.warn(f"Settings of a later version are ignored: {', '.join(later)}", stacklevel=2)
    with _understood(file.path):
        config = config_cls(**{k: v for k, v in settings.items() if k in known})
    tensors = {k: file.read(k, finite=True) for k in file}
    put(model, config, tensors, adapter_name, file.path, trainable)


def put(
    model: nn.Module,
    config: Any,
    tensors: Mapping[str, Tensor],
    adapter_name: str,
    path: Path,
    trainable: bool = False,
) -> None:
    """Wrap the modules that ``config`` names and fill them with ``tensors``, all or an error.

    Raises
    ------
    SitesNotInBase, MalformedFile, ShapeMismatch, WrongBase
    """
    config.inference_mode = not trainable
    with _understood(path):
        inject_adapter_in_model(config, model, adapter_name)
    plain = {k.removeprefix(_PREFIX): v for k, v in tensors.items()}
    try:
        result = set_peft_model_state_dict(model, plain, adapter_name)
    except RuntimeError as error:  # what torch says of sizes
        raise ShapeMismatch(
            f"The adapter does not fit the model: {str(error).splitlines()[-1].strip()}",
            file=path,
            fix="Load it on the kind of model it was trained on.",
        ) from error
    if result.unexpected_keys:
        raise SitesNotInBase(
            f"The model has no place for {len(result.unexpected_keys)} tensor(s) of the adapter.",
            file=path,
            tensor=result.unexpected_keys[0],
            fix="Load it on the kind of model it was trained on.",
        )
    own = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    lost = [k for k in result.missing_keys if f".{own}" in k and f".{adapter_name}." in f"{k}."]
    if lost:
        raise MalformedFile(
            f"The file lacks {len(lost)} tensor(s) that its settings name.",
            file=path,
            tensor=f"{lost[0]}.".replace(f".{adapter_name}.", ".").removesuffix("."),
            fix="The file is incomplete; get it again.",
        )
    known: Any = model
    if hasattr(known, "_hf_peft_config_loaded"):  # how diffusers and transformers know
        known._hf_peft_config_loaded = True


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Settings are unchecked JSON, and PEFT has no errors of its own for most of what is wrong."""
    try:
        yield
    except NoMatchingPeftModuleError as error:
        raise SitesNotInBase(
            f"The model has none of the adapter's modules ({error})",
            file=path,
            fix="Load it on the kind of model it was trained on.",
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise MalformedFile(
            f"Its settings do not make an adapter: {error}.",
            file=path,
            fix="Restore the adapter_config.json that was saved with it.",
        ) from error


def settings_of(file: TensorFile) -> dict[str, Any]:
    """What PEFT wrote beside the file, or diffusers into it."""
    beside = file.path.parent / "adapter_config.json"
    try:
        if "lora_adapter_metadata" in file.metadata:
            found = json.loads(file.metadata["lora_adapter_metadata"])
        else:
            found = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except (ValueError, RecursionError, OSError) as error:
        raise MalformedFile(
            f"Its settings are not valid JSON ({error}).", file=file.path
        ) from error
    if not isinstance(found, dict):
        raise MalformedFile("Its settings are not a JSON object.", file=file.path)
    return found
