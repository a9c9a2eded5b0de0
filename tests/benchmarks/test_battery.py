"""The battery from end to end on the embedded pair: one adapter, every method, page, picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.retention import battery as module
from benchmarks.retention.battery import Battery, Unit
from benchmarks.retention.diffusion import Diffusion
from benchmarks.retention.evidence import gather
from benchmarks.retention.pages import write_pages
from benchmarks.retention.references import References
from benchmarks.retention.rows import Row
from regraft.demo import pair
from regraft.subspaces import Cache, SubspaceLibrary


class Embedded(Diffusion):
    """The embedded pair as a battery of one upgrade and one adapter."""

    upgrades = ("continued",)
    tasks = ("line",)

    def base(self, name: str) -> Path:
        return {"v1": pair.SOURCE, "continued": pair.TARGET}[name]

    def adapter(self, base: str, task: str, rank: int, seed: int) -> Path:
        if (rank, seed) != (8, 0):
            return self.assets / "none"
        return pair.ADAPTER if base == "v1" else pair.RETRAINED

    @property
    def data(self) -> list[Path]:
        return [pair.HELDOUT]

    def costly_scores(self, model: object, task: str) -> dict[str, float]:
        return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Battery, list[Row]]:
    work = tmp_path_factory.mktemp("battery")
    family = Embedded(work / "diffusion", quick=True)
    library = SubspaceLibrary(Cache(work / "cache"))
    battery = Battery(family, work, library, References(work / "references.json"))
    assert list(battery.units()) == [Unit("continued", "line", 8, 0)]
    return battery, battery.run(Unit("continued", "line", 8, 0))


def by_method(rows: list[Row]) -> dict[str, Row]:
    return {row.method: row for row in rows}


def test_every_method_stands_beside_its_controls(run: tuple[Battery, list[Row]]) -> None:
    rows = by_method(run[1])
    assert {"copy", "lora-x", "prolora", "auto", "random", "retrained"} <= set(rows)
    assert rows["retrained"].retention == 1.0
    copied = rows["copy"].retention
    assert copied is not None
    assert copied > 0.7
    projected, control = rows["lora-x"].retention, rows["random"].retention
    assert projected is not None
    assert control is not None
    assert control < projected < copied
    assert rows["copy"].energy_kept == 1.0
    assert rows["lora-x"].energy_kept is not None
    assert rows["lora-x"].energy_kept < 1.0
    assert rows["auto"].retention == pytest.approx(copied)
    for row in run[1]:
        assert row.target > row.retrained  # type: ignore[operator]


def test_a_finished_unit_is_not_measured_again(
    run: tuple[Battery, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    battery, rows = run
    unit = Unit("continued", "line", 8, 0)
    monkeypatch.setattr(Battery, "_measure", lambda *_: pytest.fail("measured again"))
    assert battery.run(unit) == rows
    monkeypatch.undo()
    monkeypatch.setattr(module, "VERSION", -1)
    monkeypatch.setattr(Battery, "_measure", lambda *_: iter(()))
    assert battery.run(unit) == []


def test_references_are_known_by_their_scores_where_their_files_are_not(
    run: tuple[Battery, list[Row]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    battery, rows = run
    battery.known.write()
    kept = References(battery.known.path)
    monkeypatch.setattr(pair, "RETRAINED", tmp_path / "gone.safetensors")
    other = Battery(battery.family, tmp_path, battery.library, kept)
    unit = Unit("continued", "line", 8, 0)
    scores = other.references(unit)
    assert scores[0]["denoising loss"] == pytest.approx(rows[0].retrained, abs=1e-6)
    name = next(iter(kept.entries))
    kept.entries[name]["key"] = "of another base"
    assert list(other.units()) == []


def test_the_page_and_the_picture_show_it(run: tuple[Battery, list[Row]], tmp_path: Path) -> None:
    battery, rows = run
    seen = [gather(battery.family, "continued", battery.library)]
    assert seen[0].facts["verdict"] == "copy"
    assert 0 < seen[0].facts["atc"] < seen[0].facts["atc"] / seen[0].facts["atc_relative"]
    assert 0.3 < seen[0].facts["cka"] <= 1.0
    nothing = tmp_path / "nothing.json"
    write_pages(tmp_path, rows, seen, nothing, nothing, quick=True)
    page = (tmp_path / "retention.md").read_text()
    copied = by_method(rows)["copy"].retention
    assert f"| copy | {copied:.2f} " in page
    assert "Not for quoting" in page
    assert (tmp_path / "images" / "retention.png").read_bytes().startswith(b"\x89PNG")
