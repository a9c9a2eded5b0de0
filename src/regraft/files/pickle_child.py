"""A program of its own: one pickled checkpoint in, a safetensors copy out.

:mod:`regraft.files.pickle_gate` runs it in a process that is thrown away. It unpickles with torch's
``weights_only`` reader and no other, under limits of memory, time and file size, and with an audit
hook that ends the process when anything tries to start a program, connect, or write elsewhere. It
imports nothing of Regraft: the less there is in this process, the less there is to misuse.

Standard input: one JSON object {path, out, sys_path, memory, seconds, written}, sizes in bytes.
Standard output: {"left": [names]} or {"refused": why} or {"malformed": why}.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import zipfile
from typing import Any

#: What the process must never do: prefixes of Python's audit events.
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod",
    "os.chown", "os.truncate", "subprocess.", "pty.", "shutil.", "socket.", "ctypes.", "urllib.",
    "ftplib.", "smtplib.", "webbrowser.", "sqlite3.", "winreg.", "cpython.run_",
)  # fmt: skip
#: Exit status when the audit hook ended the process.
CAUGHT = 13
#: Where the tensors lie in files that hold more; the first that fits is taken.
_WRAPPERS = ("state_dict", "model", "module", "params_ema", "params", "lora", "network")
#: Objects that trainers leave beside the tensors; each is read as an empty object.
_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.argparse.AttributeDict",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "uint16": "U16", "uint32": "U32",
    "uint64": "U64",
}  # fmt: skip


class Refused(Exception):
    """It asks for more than tensors."""


class Malformed(Exception):
    """It is no checkpoint."""


class Inert:
    """Stands for an object that is not needed: takes anything, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def load(path: str) -> Any:
    """What torch's ``weights_only`` reader makes of a file.

    Raises
    ------
    Refused, Malformed
    """
    import torch

    stand_ins: list[Any] = [(Inert, name) for name in _INERT]
    try:
        with torch.serialization.safe_globals(stand_ins):
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if name := re.search(r"GLOBAL (\S+)", text):
            raise Refused(f"it names {name[1][:200]}") from error
        if "Weights only load failed" in text or "Unsupported" in text:
            raise Refused("it holds an instruction that tensors do not need") from error
        raise Malformed(f"{type(error).__name__}: {text[:300]}") from error


def tensors_of(loaded: Any) -> tuple[dict[str, Any], list[str]]:
    """The tensors by name, and the names of tensors that lie elsewhere in the file.

    Raises
    ------
    Malformed
    """
    import torch

    left: list[str] = []
    for _ in range(4):
        if not isinstance(loaded, dict):
            break
        if any(isinstance(value, torch.Tensor) for value in loaded.values()):
            found = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
            if not all(isinstance(name, str) and name for name in found):
                raise Malformed("a tensor's name is not text")
            nested = [str(k) for k, v in loaded.items() if isinstance(v, dict | list)]
            return found, left + nested
        inner = next((k for k in _WRAPPERS if isinstance(loaded.get(k), dict)), None)
        if inner is None:
            break
        left += [str(k) for k, v in loaded.items() if k != inner and isinstance(v, dict | list)]
        loaded = loaded[inner]
    raise Malformed("it holds no tensors by name")


def write(tensors: dict[str, Any], out: str, most: int) -> None:
    """Write a safetensors file, tensor by tensor.

    Raises
    ------
    Malformed
        A tensor that the format cannot hold, or more than ``most`` bytes.
    """
    import torch

    header: dict[str, Any] = {}
    position = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        kind = str(tensor.dtype).removeprefix("torch.")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or kind not in _NAMES or len(name) > 1_024:
            raise Malformed(f"the tensor {name[:80]!r} is of a kind that is not read")
        size = math.prod(tensor.shape) * tensor.element_size()
        offsets = [position, position + size]
        header[name] = {
            "dtype": _NAMES[kind],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        position += size
        if position > most:
            raise Malformed("its tensors are far larger than the file")
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(out, "wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for _, tensor in ordered:
            if tensor.numel():
                flat = tensor.detach().contiguous().reshape(-1)
                stream.write(flat.view(torch.uint8).numpy().data)


def _limit(order: dict[str, Any]) -> None:
    """Memory, time, file size, processes. Windows has no such limits."""
    try:
        import resource
    except ImportError:
        return
    with (
        open("/proc/self/statm", encoding="ascii")
        if os.path.exists("/proc/self/statm")
        else open(os.devnull, encoding="ascii") as stream
    ):
        pages = stream.read().split()
    now = int(pages[0]) * resource.getpagesize() if pages else 8 << 30
    wanted = [
        (resource.RLIMIT_AS, now + order["memory"]),
        (resource.RLIMIT_CPU, order["seconds"]),
        (resource.RLIMIT_FSIZE, order["written"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ]
    for kind, most in wanted:
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _guard(out: str) -> None:
    """End the process when it tries what reading tensors never needs."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event: str, args: tuple[Any, ...]) -> None:
        elsewhere = event == "open" and (args[2] or 0) & writing and args[0] != out
        if elsewhere or event.startswith(_FORBIDDEN):
            os._exit(CAUGHT)

    sys.addaudithook(hook)


def main() -> None:
    order = json.load(sys.stdin)
    sys.path[:] = order["sys_path"]
    import numpy  # noqa: F401
    import torch
    import torch._weights_only_unpickler

    torch.set_num_threads(1)
    _limit(order)
    _guard(order["out"])
    try:
        found, left = tensors_of(load(order["path"]))
        write(found, order["out"], order["written"])
        answer: dict[str, Any] = {"left": left[:100]}
    except Refused as error:
        answer = {"refused": str(error)}
    except Malformed as error:
        answer = {"malformed": str(error)}
    except (MemoryError, RuntimeError) as error:
        answer = {"malformed": f"it needs more memory than its size explains ({error})"[:300]}
    except OSError as error:
        answer = {"malformed": f"it cannot be read or copied ({error.strerror})"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
