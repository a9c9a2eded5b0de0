"""Outputs appear whole or not at all: temporary sibling, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import os
import shutil
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


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise :class:`OutputExists` if ``path`` is taken and ``overwrite`` is false."""
    if path.exists() and not overwrite:
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
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        # mkstemp makes private files; give the output the mode any new file would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        _sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputFailed(
            f"The output could not be written: {error.strerror or error}.",
            file=path,
            fix="Check free space and permissions.",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(
    path: Path, *, overwrite: bool = False, replaceable: Iterable[str] = ()
) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; swap it into place when the block succeeds.

    An existing folder is replaced only if ``overwrite`` is true and it holds nothing but files
    named in ``replaceable``: other people's files are never deleted.
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    if path.exists():
        if not path.is_dir():
            raise OutputExists("The output is a file.", file=path, fix="Name a folder.")
        foreign = sorted({p.name for p in path.iterdir()} - set(replaceable))
        if foreign:
            raise OutputExists(
                f"The output folder holds other files ({', '.join(foreign[:5])}).",
                file=path,
                fix="Name a new folder.",
            )
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for file in temporary.iterdir():
            _sync(file)
        _sync_folder(temporary)
        if path.exists():
            retired = temporary.with_suffix(".old")
            os.replace(path, retired)
            os.replace(temporary, path)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputFailed(
            f"The output could not be written: {error.strerror or error}.",
            file=path,
            fix="Check free space and permissions.",
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
