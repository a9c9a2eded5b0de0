"""The page: safe, self-contained, the same every time, whole for every verdict."""

from __future__ import annotations

import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_results import Make, site

from regraft.errors import OutputExists
from regraft.report import Gallery, GalleryRow, Measured, render_report, write_report
from regraft.result import TransferResult

SECTIONS = ("similarity", "energy", "refused", "loading", "provenance", "meaning")
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[2J\u202e"
VOID = {"meta", "img", "line", "rect", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects tags, checks that they nest, and lists what would be loaded or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.loads.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")
            if name == "style":
                assert "url(" not in (value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def png(width: int = 2, height: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + b"\xff\0\0" * width for _ in range(height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gallery() -> Gallery:
    rows = [GalleryRow("source", EVIL, [png(), png()]), ("carried", "", [png(32, 32), None])]
    return Gallery("Look", ["pizza", EVIL], rows, [Measured("loss", "0.1", EVIL)], EVIL)


def evil(make: Make) -> TransferResult:
    return make(
        verdict="carry",
        why=EVIL,
        method="lora-x",
        parameters={EVIL: EVIL},
        adapter={"name": EVIL, "trigger_words": EVIL, "family": EVIL},
        source={"name": EVIL},
        target={"name": EVIL},
        pairing=EVIL,
        sites=[site(EVIL, source="other" + EVIL), site(f"unet.down_blocks.0.{EVIL}", cosine=None)],
        sites_refused={
            EVIL: EVIL,
            f"unet.down_blocks.1.resnets.0.{EVIL}": f"shapes differ: {EVIL}",
        },
        output=f"out/{EVIL}",
        dtype=EVIL,
        notes=[EVIL],
        versions={EVIL: EVIL},
    )


def test_every_section_is_there(make: Make) -> None:
    page = Reader(render_report(make(sites_refused={"a.b": "the target has no such module"})))
    assert tuple(page.ids) == SECTIONS
    for words in (
        "style",
        "org/base-b",
        "Copy",
        "80%",
        "style-b.safetensors",
        "d" * 64,
        "1 refused",
    ):
        assert words in page.text


def test_text_from_files_is_escaped(make: Make) -> None:
    text = render_report(evil(make), gallery=gallery())
    page = Reader(text)
    assert "script" not in page.tags
    assert page.handlers == []
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert page.tags.count("img") == len(page.loads) == 3
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert "<script>alert(1)</script>" in page.text


def test_nothing_is_loaded(make: Make) -> None:
    for result in (make(), make(method="lora-x"), evil(make)):
        text = render_report(result)
        page = Reader(text)
        assert page.loads == []
        assert not {"link", "script", "iframe", "object", "a"} & set(page.tags)
        assert "@import" not in text
        assert "url(" not in text
        assert "default-src 'none'" in text


def test_same_result_same_bytes(make: Make, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(make(), tmp_path / name, gallery=gallery())
    first, second = ((tmp_path / n).read_bytes() for n in ("a.html", "b.html"))
    assert first == second
    assert b"\r" not in first


def test_written_whole_and_not_over_another(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_report(make(), path)
    with pytest.raises(OutputExists):
        write_report(make(), path)
    write_report(make(verdict="carry"), path, overwrite=True)
    assert "Carry" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_the_dont_page(make: Make) -> None:
    result = make(
        verdict="don't",
        why="The two bases' weights are not related.",
        method="none",
        sites=[],
        evidence={"method": None, "coverage": 1.0, "cosine": 0.003, "difference": 1.41},
        energy_kept=0.0,
        output=None,
        sha256=None,
        dialect="",
        dtype="",
    )
    page = Reader(render_report(result))
    assert {"similarity", "provenance", "meaning"} <= set(page.ids)
    assert "Don’t" in page.text
    assert "Nothing was written" in page.text
    assert "Energy kept, site by site" not in page.text
    assert "0.003" in page.text


def test_a_dont_that_was_overruled_says_so(make: Make) -> None:
    text = render_report(make(verdict="don't", evidence={"method": None}))
    assert "because it was asked for" in text


def test_a_dry_run_and_no_refusals(make: Make) -> None:
    page = Reader(render_report(make(dry_run=True, output=None, sha256=None)))
    assert "dry run" in page.text
    assert "Nothing to load" in page.text
    assert "found its place" in page.text


def test_no_path_of_the_maker_is_told(make: Make) -> None:
    adapter = {"name": "", "ref": "/home/someone/style.safetensors"}
    text = render_report(make(adapter=adapter, target={"ref": "/home/someone/base-b"}))
    assert "/home/" not in text
    assert "base-b" in text


def test_refused_sites_are_grouped_by_reason(make: Make) -> None:
    refused = {f"m.{i}": f"shapes differ: source ({i},), target (9,)" for i in range(3)}
    text = render_report(make(sites_refused={**refused, "n": "the target has no such module"}))
    assert text.count('class="reason"') == 2
    assert text.index("shapes differ") < text.index("the target has no such module")
    assert "source (2,), target (9,)" in text


def test_the_gallery_comes_first(make: Make) -> None:
    page = Reader(render_report(make(), gallery=gallery()))
    assert page.ids[0] == "gallery"
    assert "loss" in page.text


def test_a_gallery_that_does_not_fit_is_an_error(make: Make) -> None:
    short = Gallery("x", ["a", "b"], [GalleryRow("r", "", [png()])])
    with pytest.raises(ValueError, match="1 pictures for 2 columns"):
        render_report(make(), gallery=short)
    wrong = Gallery("x", ["a"], [GalleryRow("r", "", [b"GIF89a"])])
    with pytest.raises(ValueError, match="not a PNG"):
        render_report(make(), gallery=wrong)


def test_hundreds_of_sites(make: Make) -> None:
    sites = [
        site(f"unet.up_blocks.0.attentions.{a}.transformer_blocks.{b}.attn{n}.to_{q}")
        for a in range(3) for b in range(10) for n in (1, 2) for q in "qkv"
    ]  # fmt: skip
    page = Reader(render_report(make(sites=sites)))
    assert page.tags.count("rect") == 3 * len(sites)
