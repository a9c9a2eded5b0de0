"""The shipped rows keep what the pages promise."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.retention.evidence import read_evidence
from benchmarks.retention.pages import write_pages
from benchmarks.retention.prediction import drift_rows, observed
from benchmarks.retention.rows import UPGRADES, Row, read_rows, write_rows
from benchmarks.retention.summary import MAIN, curve, regrets, select, upgrades
from lab.steps import ASSETS
from regraft.methods.predict import CURVE
from regraft.retention.fit import judge

FOLDER = Path(__file__).parents[2] / "benchmarks"
ROWS = read_rows(FOLDER / "retention.json")
SEEN = read_evidence(FOLDER / "retention_evidence.json")

#: random updates of the same size move single rows by more
CHANCE = 0.1


def test_every_upgrade_of_both_families_has_rows_for_every_method() -> None:
    assert [f.name for f in fields(Row)][:5] == ["kind", "upgrade", "family", "adapter", "rank"]
    for kind in MAIN:
        mine = select(ROWS, kind=kind, rank=8)
        assert upgrades(mine) == [u for u in UPGRADES if u in {r.upgrade for r in mine}]
        for upgrade in upgrades(mine):
            here = [r for r in mine if r.upgrade == upgrade]
            assert {"auto", "copy", "lora-x", "prolora", "retrained"} <= {r.method for r in here}
            assert len({r.seed for r in here if r.method == "copy"}) >= 3
            assert {r.method for r in here if not r.refused} >= {"random", "retrained"}
    assert set(upgrades(select(ROWS, kind="language"))) == set(UPGRADES)
    assert set(upgrades(select(ROWS, kind="diffusion"))) == {*UPGRADES} - {"other-tokenizer"}


def test_r_is_what_its_parts_say() -> None:
    for row in ROWS:
        if row.retention is not None:
            assert row.transferred is not None
            assert row.retrained is not None
            gain = row.retrained - row.target
            assert row.retention == pytest.approx((row.transferred - row.target) / gain, abs=2e-3)


def test_negative_rows_stay() -> None:
    assert any(r.retention is not None and r.retention < 0 and r.method == "copy" for r in ROWS)


@pytest.mark.parametrize("kind", MAIN)
def test_auto_is_never_worse_than_copying_beyond_chance(kind: str) -> None:
    found = regrets(select(ROWS, kind=kind))
    assert len(found) > 30
    assert found[0][1] < CHANCE, found[0]
    by_upgrade: dict[str, list[float]] = {}
    for row, regret in found:
        by_upgrade.setdefault(row.upgrade, []).append(regret)
    assert all(fmean(values) < 0.02 for values in by_upgrade.values())


@pytest.mark.parametrize("kind", MAIN)
def test_copied_adapters_are_right_at_strength_one(kind: str) -> None:
    rows = select(ROWS, kind=kind, strength=None)
    for upgrade in ("fine-tune", "continued", "pruned"):
        found = curve(rows, "copy", upgrade)
        best = max(found, key=lambda s: found[s])
        assert abs(best - 1) <= 0.25 or found[best] - found[1.0] <= 0.02, (upgrade, found)


def test_the_shipped_curve_is_the_one_fitted_to_the_rows() -> None:
    judged = judge([*observed(ROWS, SEEN), *drift_rows(FOLDER / "retention_drift.json")])
    for name in ("decay", "harm", "energy"):
        fitted = getattr(judged.curve, name)
        assert getattr(CURVE, name) == pytest.approx(fitted, abs=0.02), name
    assert judged.spearman is not None
    assert judged.spearman > 0.7


def test_page_and_rows_agree(tmp_path: Path) -> None:
    write_rows(tmp_path / "retention.json", ROWS)
    assert (tmp_path / "retention.json").read_bytes() == (FOLDER / "retention.json").read_bytes()
    write_pages(tmp_path, ROWS, SEEN, FOLDER / "retention_drift.json", ASSETS / "manifest.json")
    page = (FOLDER.parent / "docs" / "retention.md").read_text()
    assert (tmp_path / "retention.md").read_text() == page
