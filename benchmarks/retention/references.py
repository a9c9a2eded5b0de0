"""Scores of the retrained adapters, kept: their files stay with whoever trained them.

The references would weigh more than the rest of the lab together, and only their scores are needed.
A run that has the files measures them and renews the scores; a run that does not uses what is kept.
"""

from __future__ import annotations

import json
from pathlib import Path

Scores = dict[str, float]


class References:
    """What ``benchmarks/retention_references.json`` holds.

    Each entry has a key: the hash of all that the scores depend on. One whose base, data or
    metrics have changed since counts as absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, object]] = {}
        if path.exists():
            self.entries = json.loads(path.read_text())

    def get(self, name: str, key: str) -> Scores | None:
        """The scores kept under ``name``, if nothing they depend on has changed."""
        entry = self.entries.get(name)
        if entry is None or entry["key"] != key:
            return None
        scores = entry["scores"]
        assert isinstance(scores, dict)
        return dict(scores)

    def keep(self, name: str, key: str, scores: Scores) -> None:
        """Remember scores."""
        rounded = {metric: round(value, 8) for metric, value in scores.items()}
        self.entries[name] = {"key": key, "scores": rounded}

    def seeds(self, start: str) -> list[int]:
        """Seeds under names that begin with ``start``."""
        found = [name.removeprefix(start) for name in self.entries if name.startswith(start)]
        return sorted(int(rest) for rest in found if rest.isdigit())

    def write(self) -> None:
        """Renew the file, entries in order of name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(n)}: {json.dumps(self.entries[n])}" for n in sorted(self.entries)]
        self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
