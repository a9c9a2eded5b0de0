"""The whole battery in its quick form, from the shipped assets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.retention.rows import read_rows
from benchmarks.retention.summary import MAIN, upgrades

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quick_battery_covers_every_upgrade_of_both_families(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.retention", "--quick"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path), "--docs", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    rows = read_rows(tmp_path / "retention.json")
    for kind, metric in MAIN.items():
        mine = [r for r in rows if r.kind == kind and r.metric == metric]
        lab = ROOT / "lab" / "assets" / kind / "bases"
        assert set(upgrades(mine)) == {p.name for p in lab.iterdir()} - {"v1"}
        near = [r for r in mine if r.upgrade == "fine-tune" and r.method == "copy"]
        assert near[0].retention is not None
        assert near[0].retention > 0.5
    assert "Not for quoting" in (tmp_path / "retention.md").read_text()
    assert (tmp_path / "images" / "retention.png").stat().st_size > 10_000
