from __future__ import annotations
from pathlib import Path
from regraft.files import atomic_file
from regraft.result import TransferResult

def write_report(result: TransferResult, path: Path, *, overwrite: bool = False) -> None:
    with atomic_file(path, overwrite=overwrite) as temporary:
        temporary.write_text("<html></html>", encoding="utf-8")
