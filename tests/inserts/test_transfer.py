"""The insert line: copying is exact, the same work gives the same bytes, nothing goes missing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from regraft.bases import open_base
from regraft.cli.main import app
from regraft.convert import convert
from regraft.errors import BadOption, FamilyNotYet, NothingCarried, NotRecommended, UnknownMethod
from regraft.files import TensorFile
from regraft.inserts import transfer as line
from regraft.inserts.carry import Carried
from regraft.inserts.choose import FIT, FOLLOWED, RELATED, MapEvidence, from_map, from_weights
from regraft.inserts.pair import pair_inserts
from regraft.inserts.read import load_insert
from regraft.methods.choose import PairFacts
from regraft.report.page import render_report
from regraft.transfer import transfer
from regraft.verify import verify
from tests.inserts import made

ALL = pytest.mark.parametrize("family", made.FAMILIES)
IDS = torch.tensor([[0, 3, 7, 9, 4]])


def carried_with(fit, kept=0.5):
    """In place of the map: everything as it is, of this fit."""

    def carry(adapter, source, target, *, calibration=None, seed=0, progress=None):
        same = {site: site for site in adapter.parts}
        return Carried(
            parts=dict(adapter.parts),
            sources=same,
            kept=dict.fromkeys(same, kept),
            fit=dict.fromkeys(same, fit),
            notes=[f"fitted on {'the user' if calibration else 'own samples'}"],
        )

    return carry


def run(world, family, target="same", **options):
    target = world["base"] if target == "same" else world[target]
    return transfer(world[family], source=world["base"], target=target, device="cpu", **options)


@ALL
def test_on_the_same_base_it_is_the_same_adapter(world, family, tmp_path):
    result = run(world, family, output=tmp_path / "out")
    assert (result.verdict, result.method) == ("copy", "copy")
    assert result.energy_kept == result.energy_kept_by_copy == 1.0
    assert not result.sites_refused
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (world[family], tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    expected = made.logits(world["base"], world[family], IDS)
    assert torch.equal(made.logits(world["base"], tmp_path / "out", IDS), expected)
    assert not torch.allclose(expected, made.logits(world["base"], None, IDS), atol=1e-2)


@ALL
def test_the_same_work_gives_the_same_bytes(world, family, tmp_path):
    for name in "ab":
        run(world, family, "near", output=tmp_path / name)
    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files
    )


@ALL
def test_near_relatives_are_copied_and_strangers_are_not(world, family):
    found = run(world, family, "near")
    assert (found.verdict, found.method) == ("copy", "copy")
    assert found.evidence["cosine"] > 0.9
    assert all(0.9 < site.cosine < 1 for site in found.sites)
    assert abs(sum(site.share for site in found.sites) - 1) < 1e-9


@ALL
@pytest.mark.parametrize("fit", [0.9, FIT - 0.1])
def test_between_strangers_the_map_decides(world, family, fit, monkeypatch, tmp_path):
    monkeypatch.setattr(line, "carry", carried_with(fit))
    options = {"output": tmp_path / "out", "report": tmp_path / "page.html"}
    if fit < FIT:
        with pytest.raises(NotRecommended) as caught:
            run(world, family, "other", **options)
        assert not (tmp_path / "out").exists()
        assert caught.value.result.evidence["fit"] == pytest.approx(fit)
        assert f"{fit:.2f}" in caught.value.result.why
        return
    result = run(world, family, "other", **options)
    assert (result.verdict, result.method) == ("carry", "activation-map")
    assert result.energy_kept == pytest.approx(0.5)
    assert result.energy_kept_by_copy == 1.0
    assert result.evidence["cosine"] < RELATED
    assert "fitted on own samples" in result.notes
    page = (tmp_path / "page.html").read_text()
    assert "changes no weight" in page
    assert "Fit of the map" in page
    assert ("Width in → out" if family == "bottleneck" else "Virtual tokens in → out") in page
    assert "Rank" not in page
    assert "‖ΔW" not in page


def test_a_base_that_does_not_run_gives_a_verdict_not_an_error(world, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).write_bytes((world["other"] / name).read_bytes())
    with pytest.raises(NotRecommended, match="no map between them can be fitted"):
        transfer(world["prompt"], source=world["base"], target=tmp_path / "bare", device="cpu")


def test_a_copy_that_was_asked_for_is_made_and_the_verdict_kept(world, tmp_path):
    result = run(world, "prompt", "other", method="copy", output=tmp_path / "out")
    assert (result.verdict, result.method) == ("don't", "copy")
    assert "--method activation-map" in result.why


@ALL
def test_a_target_of_other_widths_takes_no_copy(world, family):
    with pytest.raises(NothingCarried) as caught:
        transfer(world["wide-" + family], source=world["wide"], target=world["base"], method="copy")
    assert "wide" in caught.value.what or "gives" in caught.value.what


@ALL
def test_a_target_with_fewer_layers_takes_the_blocks_it_resembles(world, family, tmp_path):
    result = run(world, family, "short", output=tmp_path / "out")
    assert result.method == "copy"
    source = open_base(world["base"])
    paired = pair_inserts(load_insert(world[family], source), source, open_base(world["short"]))
    if family == "prompt":
        return
    for pair in paired.pairs:
        was, now = (int(site.module.split(".")[2]) for site in (pair.source, pair.target))
        assert was == made.KEPT[now]
    assert result.verdict == "carry"
    assert len(result.sites) + len(result.sites_refused) == len(
        load_insert(world[family], source).parts
    )
    assert torch.isfinite(made.logits(world["short"], tmp_path / "out", IDS)).all()


def test_the_output_says_how_it_was_made(world, tmp_path):
    run(world, "prefix", "near", output=tmp_path / "out", dtype="bf16")
    file = TensorFile(tmp_path / "out" / "adapter_model.safetensors")
    assert {file[k].dtype for k in file} == {torch.bfloat16}
    story = json.loads(file.metadata["regraft"])
    assert story["adapter"]["family"] == "prefix"
    assert story["adapter"]["changes"] == "activations"
    assert story["method"] == "copy"
    settings = made.config(tmp_path / "out")
    assert settings["base_model_name_or_path"] == "near"
    assert (settings["num_layers"], settings["num_attention_heads"], settings["token_dim"]) == (
        12,
        1,
        8,
    )


def test_p_tuning_becomes_a_prompt(world, tmp_path):
    folder = made.saved(world["base"], tmp_path / "p", "p-tuning")
    transfer(folder, source=world["base"], target=world["base"], output=tmp_path / "out")
    assert made.config(tmp_path / "out")["peft_type"] == "PROMPT_TUNING"
    expected = made.logits(world["base"], folder, IDS)
    assert torch.allclose(made.logits(world["base"], tmp_path / "out", IDS), expected, atol=1e-5)


@ALL
def test_verify_does_it_again(world, family, tmp_path):
    run(world, family, "near", output=tmp_path / "out", method="copy")
    inputs = {"adapter": world[family], "source": world["base"], "target": world["near"]}
    found = verify(tmp_path / "out", **inputs)
    assert found.status == "passed", found.checks
    assert "byte for byte" in found.how
    other = verify(tmp_path / "out", **{**inputs, "target": world["other"]})
    assert other.status != "passed"


def test_verify_wants_the_calibration_data_that_were_used(world, tmp_path, monkeypatch):
    monkeypatch.setattr(line, "carry", carried_with(0.9))
    for name, text in (("data", "a b c 0 1"), ("others", "d e 2 3 4")):
        (tmp_path / f"{name}.txt").write_text(text)
    run(world, "prompt", "other", output=tmp_path / "out", calibration=tmp_path / "data.txt")
    inputs = {"adapter": world["prompt"], "source": world["base"], "target": world["other"]}
    assert verify(tmp_path / "out", **inputs, calibration=tmp_path / "data.txt").status == "passed"
    for given in (None, tmp_path / "others.txt"):
        found = verify(tmp_path / "out", **inputs, calibration=given)
        assert found.status == "inconclusive"
        assert found.checks[-1].name == "calibration"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "lora-x"}, "changes none"),
        ({"rank": 4}, "rank"),
        ({"rank_energy": 0.9}, "rank-energy"),
        ({"dimension": 16}, "dimension"),
        ({"threshold": 0.5}, "threshold"),
        ({"filter_blocks": ["x"]}, "filter-blocks"),
        ({"cross_terms": True}, "cross-terms"),
        ({"align": "rank-order"}, "align"),
        ({"dialect": "kohya"}, "dialect"),
        ({"pairing": "similarity"}, "pairing"),
        ({"output": "x.safetensors"}, "folder"),
    ],
)
def test_options_for_weights_are_errors(world, options, says):
    with pytest.raises(BadOption, match=says) as caught:
        run(world, "prompt", "near", **options)
    assert caught.value.fix


def test_an_unknown_method_is_named(world):
    with pytest.raises(UnknownMethod, match="activation-map"):
        run(world, "prompt", "near", method="magic")


def test_the_map_is_not_for_changes_of_weights(world, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(world["base"]),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "lora")
    for options in ({"method": "activation-map"}, {"calibration": "x.txt"}):
        with pytest.raises(BadOption, match="changes weights"):
            transfer(tmp_path / "lora", source=world["base"], target=world["near"], **options)


@ALL
def test_convert_has_nothing_to_multiply_out(world, family, tmp_path):
    with pytest.raises(FamilyNotYet, match="changes no weight"):
        convert(world[family], output=tmp_path / "x.safetensors", base=world["base"])


def test_bottlenecks_that_add_nothing_are_not_carried(world, tmp_path):
    def silent(held):
        return {k: v * ("bottleneck_up" not in k) for k, v in held.items()}

    folder = made.rewrite(world["bottleneck"], tmp_path / "silent", {}, silent)
    with pytest.raises(NothingCarried, match="adds zero"):
        transfer(folder, source=world["base"], target=world["near"])


@ALL
def test_the_page_and_the_json_speak_of_activations(world, family, tmp_path):
    result = run(world, family, "near", output=tmp_path / "out")
    assert json.loads(json.dumps(result.to_dict()))["adapter"]["changes"] == "activations"
    page = render_report(result)
    assert "changes no weight" in page
    assert ("import regraft.tuners" in page) == (family == "bottleneck")
    assert "Predicted R" not in page


def facts(cosine, **more):
    return PairFacts(**{"share": 1.0, "cosine": cosine, "difference": 0.5, "identical": False,
                        "by_similarity": False, **more})  # fmt: skip


def test_the_verdict_follows_weights_then_map():
    assert from_weights([facts(1.0, identical=True)]).why.endswith("two bases.")
    assert from_weights([facts(RELATED + 0.1)]).method == "copy"
    assert from_weights([facts(RELATED + 0.1, by_similarity=True)]).word == "carry"
    assert from_weights([facts(RELATED - 0.1)]) is None
    assert from_weights([facts(None)]) is None
    assert from_weights([]).method is None
    for good, bad in ((FIT + 0.1,), (FIT - 0.1,)), ((0.0, FOLLOWED), (1.0, FOLLOWED - 0.1)):
        assert from_map([facts(None)], MapEvidence(*good)).method == "activation-map"
        assert from_map([facts(None)], MapEvidence(*bad)).word == "don't"
    assert from_map([facts(None)], None, "it does not run").why.endswith("it does not run.")


def test_methods_lists_what_carries_inserts():
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    carries = {(m["name"], *m["carries"]) for m in listed}
    assert {("activation-map", "inserts"), ("copy", "inserts"), ("copy", "weights")} <= carries
    assert all(m["paper"].startswith("https://arxiv.org/abs/") and m["needs"] for m in listed)
