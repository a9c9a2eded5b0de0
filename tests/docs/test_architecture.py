"""docs/architecture.md is the code's own map: the rooms, their order, and every arrow."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "regraft"
LONGEST = 400
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
#: Packages that only one room, or one module, may import.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "diffusers": ("demo/", "running/"),
    "transformers": (
        "demo/",
        "inserts/",
        "running/",
        "tuners/",
        "retention/encoders.py",
        "adapters/families/peft_other.py",
    ),
    "peft": (
        "demo/",
        "inserts/attached.py",
        "tuners/",
        "training/",
        "adapters/families/peft_other.py",
    ),
    "gguf": ("bases/quantised/", "files/gguffile.py"),
    "torchao": ("bases/quantised/", "running/"),
    "PIL": ("demo/", "retention/", "running/data.py", "training/"),
    "accelerate": ("demo/", "training/"),
    "huggingface_hub": ("files/hub.py",),
    "ot": ("subspaces/atc.py",),
    "scipy": ("retention/fit.py",),
    "lpips": ("retention/scorers.py",),
    "open_clip": ("retention/scorers.py",),
}


def room_of(path: Path) -> str:
    """The folder in ``src/regraft`` that a file is in, or its own name."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


ROOMS = {
    room_of(p)
    for p in SOURCE.iterdir()
    if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))
}


def documented() -> dict[str, set[str]]:
    """Room → the rooms it may import, in the order of the page's table."""
    section = PAGE.partition("## Rooms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|$", section, flags=re.MULTILINE)
    return {room: set(re.findall(r"\w+", imports)) for room, imports in rows}


def imported(tree: ast.AST) -> set[str]:
    """Every absolute module name that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[Path, set[str]]:
    return {
        p: imported(ast.parse(p.read_text(encoding="utf-8"))) for p in sorted(SOURCE.rglob("*.py"))
    }


def arrows() -> dict[str, dict[str, str]]:
    """Room → {room it imports: a file that does}."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path, names in modules().items():
        room = room_of(path)
        for name in names:
            first, *rest = name.split(".")
            if first == "regraft":
                other = rest[0] if rest and rest[0] in ROOMS else "__init__"
                if other != room:
                    found[room][other] = str(path.relative_to(ROOT))
    return found


def test_every_room_is_in_the_table_and_the_table_has_no_others():
    assert set(documented()) == ROOMS


def test_rooms_import_only_rooms_below_them():
    order = list(documented())
    for room, imports in documented().items():
        above = {other for other in imports if order.index(other) <= order.index(room)}
        assert not above, f"{room} would import {above}, which are not below it"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_the_imports_are_those_of_the_table(room):
    real, listed = arrows().get(room, {}), documented()[room]
    extra = {other: file for other, file in real.items() if other not in listed}
    assert not extra, f"{room} imports rooms that docs/architecture.md does not list: {extra}"
    gone = listed - set(real)
    assert not gone, f"docs/architecture.md says that {room} imports {gone}; it does not (any more)"


def test_optional_packages_stay_in_their_place():
    for path, names in modules().items():
        place = path.relative_to(SOURCE).as_posix()
        for package in {name.split(".")[0] for name in names} & set(OPTIONAL):
            assert place.startswith(OPTIONAL[package]), f"{place} imports {package}"


def test_no_source_file_is_too_long():
    long = {}
    for path in SOURCE.rglob("*"):
        if path.suffix in (".py", ".css", ".j2", ".js") and "assets" not in path.parts:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > LONGEST:
                long[str(path.relative_to(ROOT))] = lines
    assert not long
