"""QLoRA and QA-LoRA: what is trained, what is said of the base, and what comes of it later."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("bitsandbytes")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("torchao")
pytest.importorskip("transformers")

from safetensors import safe_open

import regraft
from regraft.errors import BadOption
from regraft.running import open_model
from regraft.running.quantised import quantise, storage_of
from regraft.training import Settings, train
from regraft.training.items import objective_for
from regraft.training.quantised import ON_PACKED
from tests.running import bases
from tests.training.runs import Stop, contents, held_out, settings, stopping_at

TARGETS = r".*layers\.[01]\.(self_attn\.[qo]_proj|mlp\.down_proj)"
KEY = "regraft.base_quantised"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tiny language model with rows of 16 and 24 numbers, and a few sums to learn."""
    folder = tmp_path_factory.mktemp("words")
    bases.language_folder(folder / "base")
    items = [{"prompt": f"{a} + {b} =", "completion": f" {a}"} for a in "01234" for b in "0123"]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, items)))
    return {"base": str(folder / "base"), "data": str(folder / "sums.jsonl")}


def chosen(where, family, form, **more):
    usual = {"validation": 0.1, "steps": 6, "targets": TARGETS, "lr": 3e-2}
    if form is not None:
        usual |= {"quantise": form}
    if str(form).startswith("int") or family == "qa-lora":
        usual |= {"group": 8}
    return settings(where, family, **usual | more)


def tensors(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


CASES = [("lora", "nf4"), ("dora", "int4"), ("lora-x", "nf4"), ("foura", "int4")]
CASES += [("qa-lora", "int4"), ("qa-lora", None), ("lora", "fp4"), ("dora", "nf4")]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_a_family_learns_on_a_quantised_language_model(family, form, words, tmp_path):
    run = chosen(words, family, form)
    result = train(run, tmp_path / "out")
    assert result.loss_last < result.loss_first
    found, metadata = tensors(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.float32}
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    if form is None:
        assert "quantised" not in facts["base"]
        assert KEY not in metadata
    else:
        (name,) = facts["base"]["quantised"]["forms"]
        assert facts["base"]["quantised"]["quantised_by"] == "this run"
        assert metadata[KEY] == name
        assert f"the base was quantised ({name})" in card
    # As PEFT loads it onto the base quantised again, it is what was judged.
    from peft import PeftModel

    model = open_model(words["base"])
    module = model.modules[""]
    if form is not None:
        quantise(module, form, group=8, besides=[module.get_output_embeddings()])
    goal = objective_for(model, run)
    loaded = PeftModel.from_pretrained(module, tmp_path / "out").eval()
    loss = goal.held_out(loaded, held_out(goal, tmp_path / "out"))
    assert loss == pytest.approx(result.validation, rel=1e-5)


@pytest.mark.parametrize(("family", "form"), [("lora", "nf4"), ("qa-lora", "int4")])
def test_a_family_learns_on_a_quantised_u_net(family, form, tiny, tmp_path):
    run = chosen(tiny, family, form, targets=r"mid.*to_[qkv]", group=None, steps=4, save_every=50)
    if family == "qa-lora":
        run = chosen(tiny, family, form, targets=r"mid.*to_[qkv]", steps=4, save_every=50)
    result = train(run, tmp_path / "out")
    assert result.validation != result.validation_before
    assert tensors(tmp_path / "out")[1][KEY]


@pytest.mark.parametrize(("family", "form"), [("lora", "nf4"), ("qa-lora", "int4")])
def test_a_stopped_run_on_a_quantised_base_writes_the_same_bytes(family, form, words, tmp_path):
    run = chosen(words, family, form)
    train(run, tmp_path / "a" / "out")
    with pytest.raises(Stop):
        train(run, tmp_path / "b" / "out", progress=stopping_at(5))
    assert train(run, tmp_path / "b" / "out", resume=True).resumed_at == 3
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def quantised_folder(words, folder, form):
    """The tiny model as transformers saves it in a quantised form."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    if form == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    else:
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

        integers = IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=PerGroup(8),
            mapping_type=MappingType.ASYMMETRIC,
        )
        config = TorchAoConfig(integers)
    model = AutoModelForCausalLM.from_pretrained(
        words["base"], quantization_config=config, dtype=torch.float32
    )
    bases.language_folder(folder)
    model.save_pretrained(folder)
    return words | {"base": str(folder)}


@pytest.mark.parametrize(("family", "form"), [("lora", "nf4"), ("qa-lora", "int4")])
def test_a_base_that_is_quantised_already_trains_as_if_it_were_quantised_now(
    family, form, words, tmp_path
):
    stored = quantised_folder(words, tmp_path / "stored", form)
    model = open_model(stored["base"])
    assert storage_of(model.modules[""])
    base = regraft.open_base(stored["base"])
    assert storage_of(model.modules[""]).forms == base.quantised
    train(chosen(stored, family, None), tmp_path / "a")
    train(chosen(words, family, form), tmp_path / "b")
    found, metadata = tensors(tmp_path / "a")
    wanted, same = tensors(tmp_path / "b")
    assert metadata == same
    assert all(found[name].equal(wanted[name]) for name in wanted)
    facts = json.loads((tmp_path / "a" / "training.json").read_text())
    assert facts["base"]["quantised"]["quantised_by"] == "its file"
    with pytest.raises(BadOption, match="already"):
        train(chosen(stored, "lora", "nf4"), tmp_path / "c")


def test_a_transfer_says_that_the_source_is_not_what_the_adapter_was_trained_on(words, tmp_path):
    train(chosen(words, "lora", "nf4"), tmp_path / "adapter")
    said = "trained on a base quantised to bitsandbytes NF4"
    result = regraft.transfer(
        tmp_path / "adapter",
        source=words["base"],
        target=bases.language_folder(tmp_path / "target", seed=1),
        method="copy",
        output=tmp_path / "out.safetensors",
    )
    (note,) = [note for note in result.notes if said in note]
    assert "9.2 %" in note
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert KEY not in file.metadata()
    stored = quantised_folder(words, tmp_path / "stored", "nf4")
    result = regraft.transfer(
        tmp_path / "adapter", source=stored["base"], target=tmp_path / "target", method="copy"
    )
    assert not [note for note in result.notes if said in note]


def test_qlora_is_a_lora_on_nf4():
    given = {"base": "a", "data": "b", "family": "qlora"}
    run = Settings.of(given)
    assert (run.family, run.quantise, run.size) == ("lora", "nf4", 8)
    assert Settings.of({**given, "quantise": "int4", "group": 16}).quantise == "int4"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"quantise": "int5"}, "int5"),
        ({"group": 32}, "nothing here is in groups"),
        ({"quantise": "nf4", "group": 32}, "nothing here is in groups"),
        ({"quantise": "int4", "group": 0}, "group is 0"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(more, said):
    with pytest.raises(BadOption, match=said):
        Settings.of({"base": "a", "data": "b", **more})


@pytest.mark.parametrize("family", ["pissa", "svdiff", "loha", "lokr"])
def test_families_that_need_a_whole_weight_are_refused(family, words, tmp_path):
    assert family not in ON_PACKED
    with pytest.raises(BadOption, match="does not train on a quantised base"):
        train(chosen(words, family, "nf4"), tmp_path / "out")
