"""What an adapter file's metadata say of it: trigger words, training, where it comes from.

All of it is other people's text: it is shown, never trusted, and names no file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

#: Facts of the training → the metadata that hold them, the first that is there.
_TRAINING: dict[str, tuple[str, ...]] = {
    "network_module": ("ss_network_module",),
    "network_args": ("ss_network_args",),
    "dim": ("ss_network_dim",),
    "alpha": ("ss_network_alpha",),
    "steps": ("ss_steps", "step"),
    "epochs": ("ss_epoch", "epoch", "ss_num_epochs"),
    "learning_rate": ("ss_learning_rate", "ss_unet_lr"),
    "optimizer": ("ss_optimizer",),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "images": ("ss_num_train_images",),
    "seed": ("ss_seed",),
    "comment": ("ss_training_comment",),
    "software": ("software", "modelspec.implementation"),
}
_MOST_TAGS = 12


def read_json(text: str) -> Any:
    """A piece of metadata that should be JSON; None if it is not."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def training(metadata: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """The facts of the training that users look for, as the file spells them."""
    found = {
        fact: next(metadata[k] for k in keys if metadata.get(k))
        for fact, keys in _TRAINING.items()
        if any(metadata.get(k) for k in keys)
    }
    for key in ("peft_version", "task_type"):
        if isinstance(config.get(key), str):
            found[key] = config[key]
    return found


def tags(metadata: Mapping[str, str]) -> dict[str, int]:
    """The most frequent captions' tags (``ss_tag_frequency``), over all folders of the data set."""
    value = read_json(metadata.get("ss_tag_frequency", ""))
    counts: Counter[str] = Counter()
    for folder in value.values() if isinstance(value, dict) else ():
        if isinstance(folder, dict):
            counts.update({k.strip(): n for k, n in folder.items() if type(n) is int and n > 0})
    return dict(counts.most_common(_MOST_TAGS))


def concepts(metadata: Mapping[str, str]) -> list[str]:
    """What the folders of the data set were called: for many files, the trigger words.

    sd-scripts' folders are named ``10_concept``: repeats, then the concept.
    """
    names: dict[str, None] = {}
    for key in ("ss_dataset_dirs", "ss_tag_frequency"):
        value = read_json(metadata.get(key, ""))
        for folder in value if isinstance(value, dict) else ():
            repeats, _, rest = folder.partition("_")
            names[rest if repeats.isdigit() and rest else folder] = None
    return list(names)


def provenance(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """How Regraft made this file, if it did: operation, adapter, bases, method, version."""
    value = read_json(metadata.get("regraft", ""))
    if not isinstance(value, dict):
        return None
    found: dict[str, Any] = {"operation": str(value.get("operation", "transfer"))}
    for part in ("adapter", "source", "target", "base"):
        inner = value.get(part)
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            found[part] = inner["name"]
    for part in ("method", "dialect", "dtype", "energy_kept"):
        if isinstance(value.get(part), str | int | float):
            found[part] = value[part]
    refused, made_by = value.get("sites_refused"), value.get("versions")
    if isinstance(refused, dict):
        found["refused"] = len(refused)
    if isinstance(made_by, dict) and isinstance(made_by.get("regraft"), str):
        found["regraft"] = made_by["regraft"]
    return found


def claims(metadata: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """The base the file names, as it says it."""
    found = []
    if config.get("base_model_name_or_path"):
        found.append(str(config["base_model_name_or_path"]))
    for key in ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"):
        if metadata.get(key):
            found.append(f"{metadata[key]} ({key})")
    return found
