"""The families' plan: whole, fair to every family, and stale files are known for what they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lab import diffusion_plan, emoji, families_plan
from lab.build import PLANS
from lab.families_plan import INSERTS, RECIPES, Workshop, names, plan, settings, training_data
from regraft.demo.captions import HELD_OUT_SUBJECTS, STYLE_SUBJECTS
from regraft.running.data import read_pictures
from regraft.training import FAMILIES, Settings

KINDS = sorted(families_plan.TASKS)


def test_every_family_that_can_be_trained_is_in_it() -> None:
    trained = {recipe.family for recipe in RECIPES.values()}
    assert trained == set(FAMILIES)
    only_language = {name for name, family in FAMILIES.items() if family.language_only}
    assert not only_language & set(names("diffusion"))
    assert {RECIPES[name].family for name in INSERTS} == {"prompt", "prefix", "bottleneck"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_base_gets_every_family_by_the_same_budget(kind: str) -> None:
    steps = plan(kind)
    assert len({step.name for step in steps}) == len(steps)
    known = {step.name for step in PLANS[kind]()}
    by_base: dict[str, set[str]] = {}
    for step in steps:
        assert set(step.needs) <= known
        assert {k: step.recipe[k] for k in families_plan.SHARED[kind]} == families_plan.SHARED[kind]
        if step.recipe["seed"] == 0:
            by_base.setdefault(step.recipe["base"], set()).add(step.recipe["name"])
    assert set(by_base) == {"v1", *families_plan.TARGETS[kind]}
    assert all(found == set(names(kind)) for found in by_base.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_takes_every_recipe(kind: str) -> None:
    for name in names(kind):
        told = Settings.of(settings(kind, name, Path("base"), Path("data"), 0))
        assert told.rate == RECIPES[name].rate(kind)


def test_the_training_items_are_the_tasks_own(tmp_path: Path) -> None:
    held = (families_plan.ASSETS / "language" / "data" / "spell.jsonl").read_text().splitlines()
    items = training_data("language", tmp_path).read_text().splitlines()
    assert len(items) > 400
    assert not set(items) & set(held)
    pictures = read_pictures(training_data("diffusion", tmp_path), 32)
    assert list(pictures.captions) == list(STYLE_SUBJECTS)
    assert not set(pictures.captions) & set(HELD_OUT_SUBJECTS)


def test_the_packed_pictures_are_the_icon_sets(tmp_path: Path) -> None:
    look = diffusion_plan.STYLES[families_plan.TASKS["diffusion"]]
    version, _ = emoji.PACKAGES[look]
    if not (emoji.CACHE / f"iconify-json-{look}-{version}.tgz").exists():
        pytest.skip("the icon set is not here")
    packed = read_pictures(training_data("diffusion", tmp_path), 32)
    assert np.array_equal(packed.images, emoji.dataset(look, list(STYLE_SUBJECTS)))


def test_a_file_of_another_recipe_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop("language", families_plan.ASSETS, tmp_path)
    quick = {"language": {"steps": 4, "batch": 2}}
    monkeypatch.setattr(families_plan, "SHARED", quick)
    monkeypatch.setitem(families_plan.COMMON, "warmup", 0)
    assert not shop.there("v1", "lora-x", 0)
    facts = shop.make("v1", "lora-x", 0)
    assert shop.there("v1", "lora-x", 0)
    assert facts["loss_by_tenth"]
    assert facts["bytes"] == (
        (shop.folder("v1", "lora-x", 0) / "adapter_model.safetensors").stat().st_size
    )
    assert json.loads((shop.folder("v1", "lora-x", 0) / "training.json").read_text())
    changed = replace(RECIPES["lora-x"], language=1e-3)
    monkeypatch.setitem(RECIPES, "lora-x", changed)
    assert not shop.there("v1", "lora-x", 0)
