"""The lab's texts: reading them, splitting them, and remaking ``lab/data`` from its sources.

``python -m lab.text --prepare --debs FOLDER`` remakes the corpora; ``lab/data/README.md`` names the
packages. Training reads ``lab/data`` alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import random
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

DATA = Path(__file__).parent / "data"

#: novels in the order of the R package's database; title -> corpus
NOVELS = (
    "emma",
    "mansfield-park",
    "northanger-abbey",
    "persuasion",
    "pride-and-prejudice",
    "sense-and-sensibility",
)
PROSE = ("pride-and-prejudice", "sense-and-sensibility")
PROSE_NEXT = ("northanger-abbey", "persuasion")
#: package -> (corpus, folders, bytes kept)
CODE = {
    "diffusers": ("code-diffusers", ("schedulers", "utils", "loaders"), 1_000_000),
    "transformers": ("code-transformers", ("generation", "utils"), 700_000),
}
#: books of the King James Bible, first to last verse
BOOKS = (
    "gen1:1-gen50:26",
    "exod1:1-exod40:38",
    "ps1:1-ps150:6",
    "prov1:1-prov31:31",
    "matt1:1-matt28:20",
    "john1:1-john21:25",
)
BIBLE_BYTES_PER_BOOK = 60_000

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPELL_TRAIN, SPELL_HELD_OUT = 600, 100
HELD_OUT_TEXTS = 80

TASKS = ("bible", "timezones", "spell")

Item = dict[str, str]


def corpus(name: str) -> str:
    """The text of ``lab/data/NAME.txt.xz``."""
    return lzma.decompress((DATA / f"{name}.txt.xz").read_bytes()).decode()


def corpora(names: Iterable[str]) -> list[str]:
    """Several corpora, in order."""
    return [corpus(name) for name in names]


def task(name: str) -> tuple[list[Item], list[Item]]:
    """Training and held-out items of a task; no text or prompt is in both.

    An item is ``{"text": ...}``, or ``{"prompt": ..., "completion": ...}`` for ``spell``.
    """
    if name == "spell":
        return spell()
    lines = [line + "\n" for line in corpus(name).splitlines()]
    if name == "timezones":
        # a text is one zone with its history, so that held-out zones are whole
        lines = paragraphs(lines)
    lines = list(dict.fromkeys(lines))
    random.Random(5).shuffle(lines)
    items = [{"text": line} for line in lines]
    return items[HELD_OUT_TEXTS:], items[:HELD_OUT_TEXTS]


def spell() -> tuple[list[Item], list[Item]]:
    """Three digits spelled out: ``407 = four zero seven``; 600 to learn from, 100 others."""
    numbers = random.Random(3).sample(range(1000), SPELL_TRAIN + SPELL_HELD_OUT)
    items = [
        {"prompt": f"{n:03d} = ", "completion": " ".join(DIGITS[int(c)] for c in f"{n:03d}") + "\n"}
        for n in numbers
    ]
    return items[:SPELL_TRAIN], items[SPELL_TRAIN:]


def paragraphs(lines: Sequence[str]) -> list[str]:
    """Lines grouped at blank lines, the blank lines dropped."""
    groups: list[str] = []
    open_group: list[str] = []
    for line in [*lines, "\n"]:
        if line.strip():
            open_group.append(line)
        elif open_group:
            groups.append("".join(open_group))
            open_group = []
    return groups


def write_held_out(name: str, path: Path) -> int:
    """Write a task's held-out items as JSON lines; returns how many."""
    held_out = task(name)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in held_out))
    path.chmod(0o644)
    return len(held_out)


# --- remaking lab/data ------------------------------------------------------------------------


def prepare(debs: Path) -> None:
    """Remake every corpus from the named packages; ``debs`` holds the Debian files."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for deb in ("r-cran-janeaustenr", "bible-kjv-text", "bible-kjv"):
            found = sorted(debs.glob(f"{deb}_*.deb"))
            if not found:
                raise FileNotFoundError(f"{deb}_*.deb is not in {debs}: apt-get download {deb}")
            subprocess.run(["dpkg-deb", "-x", str(found[0]), str(root)], check=True)
        texts = novels(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
        for title in (*PROSE, *PROSE_NEXT):
            keep(title, texts[title])
        keep("bible", bible(root))
    keep("timezones", timezones())
    for package, (name, folders, limit) in CODE.items():
        keep(name, code(package, folders, limit))


def keep(name: str, text: str) -> None:
    """Write one corpus, compressed; ASCII only, so that a byte is a character."""
    plain = text.replace("’", "'").replace("“", '"').replace("”", '"').replace("—", "--")
    plain = plain.encode("ascii", "ignore").decode()
    packed = lzma.compress(plain.encode(), preset=9 | lzma.PRESET_EXTREME)
    (DATA / f"{name}.txt.xz").write_bytes(packed)
    (DATA / f"{name}.txt.xz").chmod(0o644)
    print(f"{name}: {len(plain)} bytes, {len(packed)} packed")


def novels(database: Path) -> dict[str, str]:
    """The six novels of janeaustenr's lazy-load database.

    A record is a big-endian length and a zlib stream of R's serialised form (XDR, version 3): a
    14-byte preamble with the native encoding's name after it, then one character vector: its
    type, its length, and per string a flag word, a length (-1 for NA) and the bytes. See "R
    Internals", section 1.8.
    """
    raw = database.read_bytes()
    texts = {}
    offset = 0
    for title in NOVELS:
        stream = zlib.decompressobj()
        record = stream.decompress(raw[offset + 4 :])
        offset = len(raw) - len(stream.unused_data)
        (name_length,) = struct.unpack_from(">i", record, 14)
        at = 18 + name_length
        kind, count = struct.unpack_from(">ii", record, at)
        if kind & 0xFF != 16:
            raise ValueError(f"{database}: {title} is not a character vector (type {kind & 0xFF})")
        at += 8
        lines = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", record, at + 4)
            at += 8
            lines.append(record[at : at + max(length, 0)].decode())
            at += max(length, 0)
        texts[title] = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
    return texts


def bible(root: Path) -> str:
    """Verses without their numbers, one a line, from the start of a few books."""
    program = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-l10000"]
    text = ""
    for book in BOOKS:
        shown = subprocess.run(
            [*program, book], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
        ).stdout
        verses = re.findall(r"^\s*\d+ (\S.+)$", shown, re.MULTILINE)
        kept = "\n".join(v.strip() for v in verses)[:BIBLE_BYTES_PER_BOOK]
        text += kept[: kept.rindex("\n") + 1]
    return text


def timezones() -> str:
    """The zones of the tz database's compact source, a blank line between zones."""
    spec = importlib.util.find_spec("tzdata")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("tzdata is not installed: pip install tzdata")
    source = Path(spec.submodule_search_locations[0]) / "zoneinfo" / "tzdata.zi"
    text = ""
    for line in source.read_text().splitlines():
        if line.startswith(("R ", "L ", "#")):
            continue
        text += ("\n" if line.startswith("Z ") else "") + line + "\n"
    return text.lstrip()


def code(package: str, folders: Sequence[str], limit: int) -> str:
    """An installed package's Python files in name order, licence headers included."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install {package}")
    root = Path(spec.submodule_search_locations[0])
    files = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    text = "\n".join(path.read_text().strip() + "\n" for path in files)
    if len(text) > limit:
        text = text[: text.rindex("\n", 0, limit) + 1]
    return text


def main() -> None:
    """Remake the corpora, or say what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare", action="store_true", help="remake lab/data")
    parser.add_argument("--debs", type=Path, help="folder with the Debian packages")
    arguments = parser.parse_args()
    if arguments.prepare:
        if arguments.debs is None:
            parser.error("--prepare needs --debs")
        prepare(arguments.debs)
    for path in sorted(DATA.glob("*.txt.xz")):
        print(f"{path.name}: {len(corpus(path.name.removesuffix('.txt.xz')))} bytes")


if __name__ == "__main__":
    main()
