"""The pages of the project, and what is in them: commands, links, code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
#: Pages by the name that tests show.
BY_NAME = {p.relative_to(ROOT).as_posix(): p for p in PAGES}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", flags=re.DOTALL)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [body for kind, body in _FENCE.findall(text(page)) if kind == language]


def prose(page: Path) -> str:
    """The page without fenced blocks and comments."""
    return _FENCE.sub("", _COMMENT.sub("", text(page)))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every ``regraft …`` line in the page's console blocks."""
    found = []
    for body in blocks(page, "console"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["regraft"]:
                found.append(words[1:])
    return found
