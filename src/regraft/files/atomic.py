"""Outputs appear whole or not at all: temporary sibling, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from regraft.errors import OutputExists, OutputFailed


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    # Windows cannot open folders; there the rename itself is all that can be had.
    with contextlib.suppress(OSError):
        _sync(folder)


def _failed(path: Path, error: OSError) -> OutputFailed:
    return OutputFailed(
        f"The output could not be written: {error.strerror or error}.",
        file=path,
        fix="Check the path, free space and permissions.",
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise :class:`OutputExists` if ``path`` is taken and ``overwrite`` is false.

    Raises :class:`OutputFailed` if it is no possible path (too long, a NUL in it).
    """
    if "\0" in str(path):
        raise OutputFailed("The output's path holds a NUL.", file=path, fix="Choose another name.")
    try:
        taken = path.exists()
    except OSError as error:
        raise _failed(path, error) from error
    if taken and not overwrite:
        raise OutputExists(
            "The output already exists.", file=path, fix="Choose another name or pass --overwrite."
        )


@contextlib.contextmanager
def atomic_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place when the block succeeds.

    Raises
    ------
    OutputExists
        ``path`` exists and ``overwrite`` is false, or it is a folder.
    OutputFailed
        The system refused to write (read-only folder, full disk). No temporary file stays.
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    if path.is_dir():
        raise OutputExists("The output is a folder.", file=path, fix="Name a file.")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent
        )
        temporary = Path(name)
        os.close(descriptor)
        yield temporary
        # mkstemp makes private files; give the output the mode any new file would have.
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux); say whether it did."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _swap_in(temporary: Path, path: Path) -> None:
    """Put ``temporary`` where ``path`` is; the old folder is put back if that fails."""
    if _exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)  # the old one, now under the other name
        return
    retired = temporary.with_suffix(".old")
    os.replace(path, retired)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(retired, path)
        raise
    shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(
    path: Path, *, overwrite: bool = False, replaceable: Iterable[str] = ()
) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; swap it into place when the block succeeds.

    An existing folder is replaced only if ``overwrite`` is true and it holds nothing but files
    named in ``replaceable`` ("a.txt", "folder/b.txt"): other people's files are never deleted.

    Raises
    ------
    OutputExists
        ``path`` exists and ``overwrite`` is false, it is a file, or it holds other files.
    OutputFailed
        The system refused to write. What was there before is there still.
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    temporary: Path | None = None
    try:
        if path.exists():
            if not path.is_dir():
                raise OutputExists("The output is a file.", file=path, fix="Name a folder.")
            _only(path, replaceable)
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.resolve().name[:40]
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=path.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            (_sync_folder if file.is_dir() else _sync)(file)
        _sync_folder(temporary)
        if path.exists():
            _only(path, replaceable)  # again: the block may have run for an hour
            _swap_in(temporary, path)
        else:
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _only(folder: Path, replaceable: Iterable[str]) -> None:
    foreign = sorted(_foreign(folder, set(replaceable)))
    if foreign:
        raise OutputExists(
            f"The output folder holds other files ({', '.join(foreign[:5])}).",
            file=folder,
            fix="Name a new folder.",
        )


def _foreign(folder: Path, known: set[str], before: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        name = before + path.name
        inner = any(other.startswith(name + "/") for other in known)
        if path.is_dir() and not path.is_symlink() and inner:
            yield from _foreign(path, known, name + "/")
        elif path.is_dir() or name not in known:
            yield name
