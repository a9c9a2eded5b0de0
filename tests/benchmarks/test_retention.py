"""The battery's arithmetic: rows kept whole, cells with their spread, auto held against copying."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.retention.rows import Row, read_rows, write_rows
from benchmarks.retention.summary import cell, curve, grid, regrets, select, upgrades

ROW = Row(
    kind="diffusion",
    upgrade="continued",
    family="lora",
    adapter="line",
    rank=8,
    seed=0,
    method="copy",
    metric="denoising loss",
    strength=1.0,
    base=2.0,
    target=2.5,
    transferred=1.0,
    retrained=0.5,
    retention=0.75,
    seconds=0.1,
)


def test_rows_come_back_and_do_not_depend_on_their_order(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, seed=1, retention=None, transferred=None, refused="no such shape")]
    write_rows(tmp_path / "a.json", rows)
    write_rows(tmp_path / "b.json", rows[::-1])
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(read_rows(tmp_path / "a.json"), key=lambda r: r.seed) == rows


def test_a_cell_is_the_mean_over_adapters_of_the_mean_over_seeds() -> None:
    rows = [replace(ROW, seed=s, retention=r) for s, r in enumerate((0.7, 0.8, 0.9))]
    rows.append(replace(ROW, adapter="duotone", retention=0.2))
    found = cell(rows)
    assert found.mean == pytest.approx(0.5)  # (0.8 + 0.2) / 2, not 2.6 / 4
    assert found.seeds_sd == pytest.approx(0.1)
    assert (found.low, found.high, found.count) == (0.2, 0.9, 4)
    assert found.text() == "0.50 ± 0.10 (0.20…0.90)"


def test_refusals_are_shown_not_averaged() -> None:
    refusal = replace(ROW, retention=None, transferred=None, refused="widths differ")
    assert cell([refusal]).text() == "refused"
    both = cell([refusal, ROW])
    assert (both.mean, both.refused, both.reason) == (0.75, 1, "widths differ")


def test_selecting_leaves_other_strengths_metrics_and_ranks_out() -> None:
    rows = [
        ROW,
        replace(ROW, strength=0.5),
        replace(ROW, metric="diversity"),
        replace(ROW, rank=32),
        replace(ROW, kind="language", metric="held-out loss"),
    ]
    assert select(rows, kind="diffusion", rank=8) == [ROW]
    assert len(select(rows, kind="diffusion", strength=None)) == 3
    assert upgrades([replace(ROW, upgrade="bigger"), replace(ROW, upgrade="fine-tune")]) == [
        "fine-tune",
        "bigger",
    ]
    assert list(grid([replace(ROW, method="random"), ROW])) == ["copy", "random"]


def test_a_curve_holds_only_adapters_that_were_scaled() -> None:
    rows = [
        ROW,
        replace(ROW, strength=0.5, retention=0.5),
        replace(ROW, seed=1, retention=0.1),  # no curve: would pull down the value at 1.0
    ]
    assert curve(rows, "copy", "continued") == {0.5: 0.5, 1.0: 0.75}


def test_regret_is_what_auto_loses_against_copying() -> None:
    rows = [
        ROW,
        replace(ROW, method="auto", retention=0.0, refused="don't"),
        replace(ROW, seed=1, retention=-0.4),
        replace(ROW, seed=1, method="auto", retention=0.0, refused="don't"),
    ]
    found = regrets(rows)
    assert [round(regret, 6) for _, regret in found] == [0.75, -0.4]
