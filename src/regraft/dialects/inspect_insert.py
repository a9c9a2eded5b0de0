"""What an adapter that changes no weight is, without any base."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from regraft.dialects.inserted import InsertFile
from regraft.dialects.told import claims, concepts, provenance, tags, training
from regraft.files import TensorFile
from regraft.files.finite import is_finite
from regraft.files.pickle_gate import original

_TABLE = "prompt_embeddings"
_BOTTLENECK = re.compile(r"(?P<module>.+)\.bottleneck_(down|up|norm)\.(weight|bias)")


def insert_facts(found: InsertFile, file: TensorFile) -> dict[str, Any]:
    """The facts of :func:`regraft.dialects.inspect.inspect_file`, less the hashes.

    Raises
    ------
    MalformedFile
    """
    meta = dict(file.metadata)
    own = [k for k in file if (_BOTTLENECK.fullmatch(k) if _is(found) else k == _TABLE)]
    unknown = [k for k in file if k not in own]
    nonfinite = [k for k in own if not is_finite(file.read(k))]
    warnings = []
    if nonfinite:
        warnings.append(f"{len(nonfinite)} tensor(s) hold NaN or infinity: the file is damaged.")
    if unknown:
        warnings.append(f"{len(unknown)} key(s) fit no known rule: transfer needs --allow-unknown.")
    if not own:
        warnings.append(f"It holds no tensors of a {found.family}.")
    modules = {m["module"] for k in own if (m := _BOTTLENECK.fullmatch(k))}
    dtypes = Counter(str(file[k].dtype).removeprefix("torch.") for k in own)
    return {
        "kind": "adapter",
        "file": str(original(file.path)),
        "readable": bool(own),
        "family": found.family,
        "changes": "activations, no weight",
        "dialect": "peft",
        "title": meta.get("modelspec.title", ""),
        **_sizes(found, file, own),
        "made_for_by_metadata": claims(meta, found.config),
        "sites": len(modules) or len(own),
        "dtypes": dict(dtypes.most_common()),
        "parameters": sum(math.prod(file[k].shape) for k in own),
        "bytes": original(file.path).stat().st_size,
        "nonfinite_tensors": nonfinite,
        "trigger_words": meta.get("modelspec.trigger_phrase", ""),
        "concepts": concepts(meta),
        "tags": tags(meta),
        "training": training(meta, found.config),
        "unknown_keys": unknown,
        "carried_by_regraft": "regraft" in meta,
        "provenance": provenance(meta),
        "warnings": warnings,
    }


def _is(found: InsertFile) -> bool:
    return found.family == "bottleneck"


def _sizes(found: InsertFile, file: TensorFile, own: list[str]) -> dict[str, Any]:
    """Virtual tokens, widths and layers, by the shapes where they tell."""
    said = found.config
    if _is(found):
        downs = [file[k].shape for k in own if k.endswith(".bottleneck_down.weight")]
        return {
            "width": sorted({shape[0] for shape in downs if shape}),
            "position": said.get("position"),
            "activation": said.get("activation"),
            "scale": said.get("scale"),
        }
    shape = file[_TABLE].shape if own else ()
    facts: dict[str, Any] = {"virtual_tokens": shape[0] if len(shape) == 2 else None}
    if found.family == "prompt":
        return facts | {"embedding_width": shape[1] if len(shape) == 2 else None}
    return facts | {
        "layers": said.get("num_layers"),
        "key_heads": said.get("num_attention_heads"),
        "key_width": said.get("token_dim"),
    }
