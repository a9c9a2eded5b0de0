"""The shipped assets are those of the manifest, small, and complete enough for the battery."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from benchmarks.retention.battery import Battery
from benchmarks.retention.diffusion import Diffusion
from benchmarks.retention.family import Family
from benchmarks.retention.language import Language
from benchmarks.retention.references import References
from lab.build import PLANS, references
from lab.steps import ASSETS
from regraft.subspaces import Cache, SubspaceLibrary

MANIFEST: dict[str, Any] = json.loads((ASSETS / "manifest.json").read_text())
MEGABYTES = 40
ROOT = Path(__file__).parents[2]


def test_the_files_are_those_of_the_manifest() -> None:
    found = {
        path.relative_to(ASSETS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in ASSETS.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    # retrained references lie here only where they were trained
    found = {name: sha for name, sha in found.items() if name not in references(ASSETS)}
    assert found == {name: entry["sha256"] for name, entry in MANIFEST["files"].items()}
    assert sum(entry["bytes"] for entry in MANIFEST["files"].values()) < MEGABYTES * 1e6


def test_weights_are_half_precision() -> None:
    for path in ASSETS.rglob("*.safetensors"):
        if path.parent.name == "data":
            continue
        with safe_open(path, framework="pt") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert kinds == {"F16"}, path


@pytest.mark.parametrize("kind", PLANS)
def test_every_record_is_of_a_step_as_it_stands(kind: str) -> None:
    plan = {step.name: json.loads(json.dumps(step.recipe)) for step in PLANS[kind]()}
    for name, record in MANIFEST["steps"][kind].items():
        assert record["recipe"] == plan[name], name
        if name != "data":
            curve = record["loss_by_tenth"]
            assert curve[-1] < curve[0], name
            assert record["seconds"] > 0
            assert "seed" in record


@pytest.mark.parametrize("family", [Diffusion, Language])
def test_the_battery_has_what_it_needs(family: type[Family], tmp_path: Path) -> None:
    lab = family(ASSETS / family.kind)
    assert lab.present() == list(lab.upgrades)
    kept = References(ROOT / "benchmarks" / "retention_references.json")
    battery = Battery(lab, tmp_path, SubspaceLibrary(Cache(tmp_path / "cache")), kept)
    units = {(u.upgrade, u.task, u.rank, u.seed) for u in battery.units()}
    for upgrade in lab.upgrades:
        for task in lab.tasks:
            for seed in range(3):  # for the spread
                assert (upgrade, task, 8, seed) in units
        assert [u for u in units if u[0] == upgrade and u[2] == 32]


@pytest.mark.parametrize("kind", PLANS)
def test_every_adapter_helps_the_base_it_was_trained_on(kind: str) -> None:
    for name, record in MANIFEST["steps"][kind].items():
        if "/" not in name:
            continue
        if "validation" in record:  # of the families' plan: a tenth of the training items
            bare, adapted = record["validation_before"], record["validation"]
        elif kind == "diffusion":
            bare, adapted = record["heldout_bare"], record["heldout_adapted"]
        else:
            bare, adapted = record["bare"]["heldout_loss"], record["adapted"]["heldout_loss"]
        assert adapted < 0.9 * bare, name


def test_nothing_names_the_place_it_was_made() -> None:
    for path in ASSETS.rglob("*.json"):
        found = re.search(r'"/[a-z]+/[^"]*"', path.read_text(errors="replace"))
        assert found is None, f"{path}: {found}"


def test_no_file_is_private() -> None:
    for path in ASSETS.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o044 == 0o044, path


def test_the_texts_are_those_the_bases_were_trained_on() -> None:
    folder = ROOT / "lab" / "data"
    for name, entry in MANIFEST["texts"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"], name
