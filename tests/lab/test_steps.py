"""The lab's steps: skipped when done, resumed when interrupted, the same either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import diffusion_plan
from lab.steps import Shop, Step, run_steps
from lab.training import train


def numbers(shop: Shop, step: Step) -> dict[str, Any]:
    (shop.assets / step.output).write_text(str(step.recipe["number"]))
    return {"doubled": 2 * step.recipe["number"]}


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop("numbers", tmp_path / "assets", tmp_path / "runs")


def steps(number: int = 1) -> list[Step]:
    return [
        Step("one", Path("one.txt"), {"number": number}, numbers),
        Step("two", Path("two.txt"), {"number": 2}, numbers, needs=("one",)),
    ]


def test_a_finished_step_is_not_run_again(shop: Shop) -> None:
    assert run_steps(shop, steps()) == ["one", "two"]
    assert run_steps(shop, steps()) == []
    assert shop.facts(steps()[1]) == {"step": "two", "recipe": {"number": 2}, "doubled": 4}


def test_a_changed_recipe_or_a_lost_output_runs_again(shop: Shop) -> None:
    run_steps(shop, steps())
    assert run_steps(shop, steps(number=5)) == ["one"]
    (shop.assets / "two.txt").unlink()
    assert run_steps(shop, steps(number=5)) == ["two"]


def test_redo_only_and_the_time_limit(shop: Shop) -> None:
    run_steps(shop, steps())
    assert run_steps(shop, steps(), redo=["two"]) == ["two"]
    assert run_steps(shop, steps(), redo=["one"], only=["two"]) == []
    (shop.assets / "two.txt").unlink()
    assert run_steps(shop, steps(), minutes=-1) == []


def test_a_step_waits_for_what_it_needs(shop: Shop) -> None:
    with pytest.raises(SystemExit, match="two needs one first"):
        run_steps(shop, steps(), only=["two"])
    with pytest.raises(SystemExit, match="no step 'three'"):
        run_steps(shop, steps(), only=["three"])


def test_a_fresh_checkout_knows_its_assets_by_their_manifest(shop: Shop, tmp_path: Path) -> None:
    run_steps(shop, steps())
    records = {step.name: shop.facts(step) for step in steps()}
    manifest = {"steps": {"numbers": records}}
    (tmp_path / "assets" / "manifest.json").write_text(json.dumps(manifest))
    fresh = Shop("numbers", tmp_path / "assets", tmp_path / "no-runs")
    assert run_steps(fresh, steps()) == []
    assert run_steps(fresh, steps(number=3)) == ["one"]


def test_training_is_the_same_however_often_it_stops(tmp_path: Path) -> None:
    def fit(checkpoint: Path, stops: list[int]) -> tuple[torch.Tensor, list[float]]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 1)
        facts: dict[str, Any] = {}

        def loss_of(draw: torch.Generator) -> torch.Tensor:
            x = torch.randn(8, 4, generator=draw)
            return (layer(x) - x.sum(dim=1, keepdim=True)).pow(2).mean()

        for stop in stops:
            facts = train(
                list(layer.parameters()),
                loss_of,
                steps=30,
                lr=0.05,
                seed=3,
                checkpoint=checkpoint,
                warmup=5,
                stop=stop,
                log=lambda line: None,
            )
        return layer.weight.detach().clone(), facts["loss_by_tenth"]

    straight, curve = fit(tmp_path / "a.pt", [30])
    halting, same_curve = fit(tmp_path / "b.pt", [7, 19, 30])
    assert torch.equal(straight, halting)
    assert curve == same_curve
    assert curve[-1] < curve[0] / 2


def test_the_plan_is_whole() -> None:
    plan = diffusion_plan.plan()
    names = [step.name for step in plan]
    assert len(set(names)) == len(names)
    for place, step in enumerate(plan):
        assert set(step.needs) <= set(names[:place]), step.name
    sources = {n.removeprefix("v1/") for n in names if n.startswith("v1/")}
    styles = diffusion_plan.STYLES
    assert sources == {f"{s}-r8-s{i}" for s in styles for i in range(3)} | {"line-r32-s0"}
    # one reference per style and rank
    references = {f"{s}-r8-s0" for s in styles} | {"line-r32-s0"}
    for target in diffusion_plan.TARGETS:
        assert {n.partition("/")[2] for n in names if n.startswith(f"{target}/")} == references
