"""Every family in the battery: from training to rows, on a lab base, and what the rows promise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.retention import families as module
from benchmarks.retention.families import Families
from benchmarks.retention.families_page import CLAIM, on_gain, on_metric, within
from benchmarks.retention.language import Language
from benchmarks.retention.references import References
from benchmarks.retention.rows import SHARED, Row, read_rows
from benchmarks.retention.summary import MAIN, regrets
from benchmarks.retention.variants import Variant
from lab import families_plan
from lab.families_plan import INSERTS, TASKS, Workshop, names, step_name
from lab.steps import ASSETS
from regraft.subspaces import Cache, SubspaceLibrary

FOLDER = Path(__file__).parents[2] / "benchmarks"
ROWS = [r for r in read_rows(FOLDER / "retention.json") if r.recipe == SHARED]
UPGRADES = {kind: families_plan.TARGETS[kind] for kind in TASKS}
#: random updates of the same size move single rows by more
CHANCE = 0.1


def test_a_family_goes_from_training_to_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families_plan, "SHARED", {"language": {"steps": 6, "batch": 4}})
    monkeypatch.setitem(families_plan.COMMON, "warmup", 0)
    two = (Variant("auto", "auto"), Variant("copy", "copy"))
    monkeypatch.setattr(module, "DELTAS", two)
    shop = Workshop("language", ASSETS, tmp_path / "runs")
    shop.make("fine-tune", "lokr", 0)
    language = Language(ASSETS / "language", quick=True)
    library = SubspaceLibrary(Cache(tmp_path / "cache"))
    known = References(tmp_path / "references.json")
    battery = Families(language, tmp_path / "work", library, known, shop, ["lokr"])
    (unit,) = battery.units()  # one reference, one unit; v1's adapter is not there yet
    assert (unit.upgrade, unit.family, unit.recipe) == ("fine-tune", "lokr", SHARED)
    rows = {r.method: r for r in battery.run(unit) if r.metric == MAIN["language"]}
    assert set(rows) == {"auto", "copy", "random", "retrained"}
    assert shop.there("v1", "lokr", 0)
    assert rows["retrained"].retention == 1.0
    assert rows["copy"].transferred is not None
    assert rows["copy"].transferred < rows["copy"].target
    assert rows["copy"].bytes
    assert (rows["auto"].chosen, rows["auto"].transferred) == ("copy", rows["copy"].transferred)

    monkeypatch.setattr(Families, "_measure", lambda *_: pytest.fail("measured again"))
    assert {r.method for r in battery.run(unit)} == set(rows)
    # scores are enough where the reference's file is not, and stale ones are not
    empty = Workshop("language", ASSETS, tmp_path / "elsewhere")
    known.write()
    others = [References(known.path) for _ in range(2)]
    entry = next(iter(others[1].entries))
    others[1].entries[entry]["key"] = "of another recipe"
    counts = []
    for kept in others:
        again = Families(language, tmp_path / "more", library, kept, empty, ["lokr"])
        counts.append(len(list(again.units())))
    assert counts == [1, 0]


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_every_family_meets_every_target_by_every_method(kind: str) -> None:
    for name in names(kind):
        for upgrade in UPGRADES[kind]:
            mine = [r for r in ROWS if (r.kind, r.family, r.upgrade) == (kind, name, upgrade)]
            methods = {r.method for r in mine}
            carriers = {"activation-map"} if name in INSERTS else {"lora-x", "prolora"}
            assert {"auto", "copy", "retrained", *carriers} <= methods, (name, upgrade)
            assert {r.metric for r in mine} > {MAIN[kind]}


def test_what_was_not_carried_says_why() -> None:
    assert ROWS
    for row in ROWS:
        if row.transferred is None:
            assert row.refused, row
    # whatever auto declines leaves the target as it is
    declined = [r for r in ROWS if r.method == "auto" and r.refused]
    assert declined
    assert all(r.transferred == r.target for r in declined)


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_auto_is_never_worse_than_copying_beyond_chance(kind: str) -> None:
    found = regrets([r for r in ROWS if r.kind == kind and r.metric == MAIN[kind]])
    assert len(found) > 30
    assert found[0][1] < CHANCE, found[0]
    by_family: dict[str, list[float]] = {}
    for row, regret in found:
        by_family.setdefault(row.family, []).append(regret)
    assert all(fmean(values) < 0.02 for values in by_family.values())


def test_sizes_are_those_of_the_records() -> None:
    steps = json.loads((ASSETS / "manifest.json").read_text())["steps"]
    page = (FOLDER.parent / "docs" / "retention.md").read_text()
    for kind in TASKS:
        for name in names(kind):
            record = steps[kind][step_name(kind, "v1", name, 0)]
            assert f"| {name} | {record['parameters']:,} |" in page


def test_the_claim_is_judged_by_the_worst_row() -> None:
    row = Row("language", "continued", "lora-x", "spell", 32, 0, "lora-x", "held-out loss", 1.0,
              3.0, 2.0, 1.08, 1.0, 0.92, 0.0, recipe=SHARED)  # fmt: skip
    far = dataclasses.replace(row, transferred=1.2, retention=0.8)
    assert on_metric(row) == pytest.approx(0.08)
    assert on_gain(row) == pytest.approx(0.08)
    assert within([row], on_metric)
    assert not within([row, far], on_metric)
    assert within([dataclasses.replace(row, retention=None)], on_gain) is None
    assert CLAIM == 0.1
