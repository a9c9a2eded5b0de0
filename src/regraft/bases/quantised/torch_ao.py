"""torchao: tensor subclasses taken apart, as transformers and diffusers save them.

A weight ``M.weight`` is stored as ``M._weight_qdata``, ``M._weight_scale``, …; the file's metadata
holds JSON under the weight's own name: its class, its attributes, and which parts it has. Class
names are looked up in torchao's list of allowed ones.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from regraft.bases.quantised.packed import Names, Packed, Parts, files, malformed, missing
from regraft.errors import NotABase
from regraft.files import TensorFile

_importing = threading.Lock()
#: Class → what users call it. Those with one code for each number, in the weight's shape.
_CLASSES = {
    "Int8Tensor": "torchao int8",
    "IntxUnpackedToInt8Tensor": "torchao intx",
    "Float8Tensor": "torchao fp8",
}
#: Kinds of integers below eight bits, which torchao keeps in a byte each.
_FEWER = tuple(f"int{bits}" for bits in range(1, 8))


def find(tensors: Names) -> Iterator[Packed]:
    """Every torchao weight of a checkpoint.

    Raises
    ------
    MalformedFile
    NotABase
        A class that cannot be read on a CPU.
    """
    seen: set[str] = set()
    for file in files(tensors):
        for name, text in file.metadata.items():
            if '"_type"' not in text or name in seen:
                continue
            about = _about(text)
            kind = str(about.get("_type", ""))
            if kind in ("", "Tensor") or "_tensor_data_names" not in about:
                continue
            seen.add(name)
            packed = _packed(tensors, file, name, kind, about)
            if packed is not None:
                yield packed


def _about(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _packed(
    tensors: Names, file: TensorFile, name: str, kind: str, about: dict[str, Any]
) -> Packed | None:
    module, _, parameter = name.rpartition(".")
    front, words = f"{module}._{parameter}_", about["_tensor_data_names"]
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise malformed("torchao", file, name, "its metadata do not list its parts")
    here = [w for w in words if front + w in tensors]
    if not here:
        return None  # another component's, or another shard's metadata
    if kind not in _CLASSES:
        raise NotABase(
            f"This checkpoint holds torchao's {kind[:40]}, which is not read.",
            file=file.path,
            tensor=front + here[0],
            fix="Give the 16-bit checkpoint it was made from, or one in torchao int8 or fp8.",
        )
    form = _form(kind, about)
    if len(here) < len(words) or "qdata" not in words:
        lost = next((w for w in words if w not in here), "qdata")
        raise malformed(form, file, front + here[0], f"the checkpoint lacks {front}{lost}")
    words = ["qdata", *(w for w in words if w != "qdata")]
    parts = {w: (tensors[front + w], front + w) for w in words}
    shape = tensors[f"{front}qdata"][f"{front}qdata"].shape
    return Packed(name, form, shape, parts, partial(_decode, form, json.dumps(about)))


def _form(kind: str, about: dict[str, Any]) -> str:
    """What users call it, with its bits where they are fewer than eight."""
    data = about.get("_data")
    target = data.get("target_dtype") if isinstance(data, dict) else None
    bits = str(target.get("_data")) if isinstance(target, dict) else ""
    fewer = kind == "IntxUnpackedToInt8Tensor" and bits in _FEWER
    return f"torchao {bits}" if fewer else _CLASSES[kind]


@contextmanager
def quiet_import(form: str) -> Iterator[None]:
    """Import torchao inside, without its log lines about kernels this machine lacks.

    Raises
    ------
    MissingDependency
    """
    with _importing:
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        except ImportError as error:
            raise missing(form, "torchao") from error
        finally:
            logging.disable(before)


def _put_together(form: str) -> Any:
    """torchao's own function."""
    with quiet_import(form):
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    return unflatten_tensor_state_dict


def _decode(form: str, about: str, parts: Parts) -> Tensor:
    flat = {f"m._weight_{word}": part for word, part in parts.items()}
    found, _ = _put_together(form)(flat, {"m.weight": about, "tensor_names": '["m.weight"]'})
    whole: Tensor = found["m.weight"].dequantize()
    return whole
