"""The on-disk cache: content hashes of weights, singular bases, and pair evidence.

* Everything is keyed by content (SHA-256 of a weight's bytes, dtype and shape), the engine and its
  version, so a changed file or a new engine can never meet an old result.
* Hashing a base means reading it, so hashes are remembered by path, size, inode and modification
  time, as git remembers its index.
* Files are written whole or not at all; a damaged one counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import platformdirs

from regraft.errors import OutputFailed, RegraftError
from regraft.files import TensorFile, atomic_file, serialize
from regraft.subspaces.engine import ENGINE, Dimension, Subspace, wanted

#: A file changed this recently may change again within one tick of its clock (git's "racy" rule).
_SETTLED_AFTER = 2.0


def cache_folder() -> Path:
    """``REGRAFT_CACHE``, or the user's cache folder for regraft."""
    chosen = os.environ.get("REGRAFT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("regraft"))


class Cache:
    """One cache folder. Safe for several processes: SQLite locks, files appear by rename.

    Parameters
    ----------
    folder : Path, optional
        Default :func:`cache_folder`.

    Raises
    ------
    OutputFailed
        The folder cannot be made or written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder()
        self._lock = threading.Lock()
        self._hashes: dict[str, dict[str, str]] = {}
        #: id → (file, its key): one stat per opened file, kept alive so that its id stays its own.
        self._keys: dict[int, tuple[TensorFile, str, float]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.folder / "index.sqlite", timeout=60, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS content"
                " (file TEXT, tensor TEXT, sha TEXT, PRIMARY KEY (file, tensor))"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS evidence (key TEXT PRIMARY KEY, value TEXT)"
            )
            self._db.commit()
        except (OSError, sqlite3.Error) as error:
            raise OutputFailed(
                f"The cache folder cannot be used: {error}.",
                file=self.folder,
                fix="Set REGRAFT_CACHE to a folder you can write.",
            ) from error

    def close(self) -> None:
        """Close the index. Without this, Python closes it at exit."""
        self._db.close()

    def content_hash(self, file: TensorFile, tensor: str) -> str:
        """SHA-256 of one tensor's dtype, shape and bytes, remembered while its file is the same."""
        key, modified = self._file_key(file)
        with self._lock:
            if key not in self._hashes:
                rows = self._db.execute("SELECT tensor, sha FROM content WHERE file=?", (key,))
                self._hashes[key] = dict(rows.fetchall())
            known = self._hashes[key].get(tensor)
        if known is not None:
            return known
        info = file[tensor]
        digest = hashlib.sha256(f"{info.dtype}{list(info.shape)}".encode())
        digest.update(file.read_bytes(tensor))
        sha = digest.hexdigest()
        with self._lock:
            self._hashes[key][tensor] = sha
            if time.time() - modified > _SETTLED_AFTER:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute(
                        "INSERT OR REPLACE INTO content VALUES (?, ?, ?)", (key, tensor, sha)
                    )
        return sha

    def _file_key(self, file: TensorFile) -> tuple[str, float]:
        """What names a file's present content, and when it last changed."""
        known = self._keys.get(id(file))
        if known is None:
            stat = file.path.stat()
            key = f"{file.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
            known = self._keys[id(file)] = (file, key, stat.st_mtime)
        return known[1], known[2]

    def commit(self) -> None:
        """Make what was remembered so far durable."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.commit()

    def evidence(self, key: str) -> Any:
        """A remembered small result, or None."""
        with self._lock:
            row = self._db.execute("SELECT value FROM evidence WHERE key=?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def remember(self, key: str, value: Any) -> None:
        """Remember a small result."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.execute(
                "INSERT OR REPLACE INTO evidence VALUES (?, ?)", (key, json.dumps(value))
            )

    def _path(self, sha: str) -> Path:
        name = hashlib.sha256(f"{ENGINE}|{sha}".encode()).hexdigest()
        return self.folder / "subspaces" / name[:2] / f"{name}.safetensors"

    def load_subspace(self, sha: str, dimension: Dimension) -> Subspace | None:
        """The remembered singular bases of a weight, if they hold ``dimension``."""
        path = self._path(sha)
        if not path.is_file():
            return None
        try:
            file = TensorFile(path, trusted=True)
            s = file.read("s")
            stored, complete = file["ut"].shape[0], file.metadata.get("complete") == "yes"
            k = wanted(s, dimension)
            if k > stored and not complete:
                return None
            k = min(k, stored)
            return Subspace(
                file.read("ut", rows=k),
                file.read("vt", rows=k),
                s,
                file.metadata["engine"],
                float(file.metadata["deviation"]),
            )
        except (RegraftError, KeyError, ValueError):
            return None

    def store_subspace(self, sha: str, subspace: Subspace, asked: Dimension) -> None:
        """Remember singular bases; a full disk only costs the memory of them."""
        # The weight's rank ended the list before the number asked for: there is no more to have.
        complete = asked.k is not None and subspace.k < asked.k
        metadata = {
            "engine": subspace.engine,
            "deviation": repr(subspace.deviation),
            "complete": "yes" if complete else "no",
        }
        tensors = {"ut": subspace.ut, "vt": subspace.vt, "s": subspace.s}
        with (
            contextlib.suppress(OutputFailed),
            atomic_file(self._path(sha), overwrite=True) as path,
        ):
            serialize(path, tensors, metadata)
