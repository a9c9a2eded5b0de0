"""Measuring on the embedded pair and a tiny language model: figures, and what they amount to."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from regraft.bases import open_base
from regraft.demo import pair
from regraft.demo.sampler import attach, denoising_loss, detach
from regraft.errors import BadData, BadOption, CannotRun, NothingCarried, UnknownMethod
from regraft.methods import MethodOptions, methods
from regraft.retention.drawn import Drawing
from regraft.retention.figure import StrengthCurve
from regraft.retention.measure import measure
from regraft.retention.measurement import Random, Way, figure_text, judge
from regraft.retention.ways import by_methods
from regraft.subspaces import Dimension
from tests.methods.worlds import make_world, new_library
from tests.running.bases import language_folder

FEW = {"limit": 4, "timesteps": 1, "strengths": (1.0,)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return measure(
            pair.ADAPTER,
            source=pair.SOURCE,
            target=pair.TARGET,
            retrained=pair.RETRAINED,
            data="demo",
            limit=4,
            timesteps=1,
            strengths=(0.5,),
        )


def losses(base, *adapters):
    """Denoising losses with diffusers' own loader, on the same items."""
    images, captions = pair.load_heldout()
    pipeline = pair.load_pipeline(base)
    for adapter in adapters:
        detach(pipeline) if adapter is None else attach(pipeline, *adapter)
        yield denoising_loss(pipeline, images[:4], captions[:4], timesteps=1)


def test_r_is_that_of_the_files_in_diffusers_own_loader(measured):
    bare, copied, weak, again = losses(
        pair.TARGET, None, (pair.ADAPTER,), (pair.ADAPTER, 0.5), (pair.RETRAINED,)
    )
    way = measured.way("copy")
    assert measured.figure == "R"
    assert way.figure == pytest.approx((bare - copied) / (bare - again), abs=1e-5)
    assert way.retention.value == pytest.approx(way.figure)
    assert way.curve.values[0] == pytest.approx((bare - weak) / (bare - again), abs=1e-5)
    assert measured.losses == pytest.approx({"target": bare, "retrained": again}, abs=1e-5)


def test_every_method_is_measured_and_copy_is_first(measured):
    assert measured.ways[0].name == "copy"
    names = {m.name for m in methods()}
    assert {way.name for way in measured.ways} | set(measured.refused) == names
    assert measured.verdict == "copy"
    assert measured.way("copy").figure > measured.way("lora-x").figure + 0.1
    assert measured.predicted["verdict"] == "copy"
    assert measured.way("lora-x").energy_kept < 0.6 < measured.way("copy").energy_kept


def test_random_updates_of_the_same_size_do_nothing(measured):
    assert len(measured.random.figures) == 3
    assert len(set(measured.random.figures)) == 3
    assert all(abs(figure) < 0.15 for figure in measured.random.figures)


def test_the_error_is_of_the_few_items_there_were(measured):
    way = measured.way("copy")
    assert measured.items == 4
    assert 0 < way.figure_error < 0.2
    assert 0 < way.gain_error < way.gain


def test_it_can_be_printed_as_json(measured):
    found = json.loads(json.dumps(measured.to_dict()))
    assert found["ways"][0]["curve"]["strengths"] == [0.5, 1.0]
    assert found["parameters"]["limit"] == 4


def test_without_a_retrained_adapter_r_is_never_said():
    found = measure(
        pair.ADAPTER, source=pair.SOURCE, target=pair.TARGET, data="demo", methods=["copy"], **FEW
    )
    v1, v1_styled = losses(pair.SOURCE, None, (pair.ADAPTER,))
    v2, v2_styled = losses(pair.TARGET, None, (pair.ADAPTER,))
    way = found.way("copy")
    assert found.figure == "relative gain"
    assert way.retention is None
    assert way.figure == pytest.approx((v2 - v2_styled) / (v1 - v1_styled), abs=1e-4)
    assert "R =" not in found.why


def flipped(path):
    """The style adapter with its sign turned: it makes everything worse."""
    with safe_open(str(pair.ADAPTER), framework="pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    turned = {k: -v if "lora_B" in k else v for k, v in tensors.items()}
    save_file(turned, path, metadata)
    return path


def test_an_adapter_for_the_target_is_measured_as_it_is(tmp_path):
    found = measure(pair.ADAPTER, target=pair.TARGET, data=pair.HELDOUT, **FEW)
    assert [way.name for way in found.ways] == ["as it is"]
    assert (found.verdict, found.figure, found.source) == ("carry", "loss removed", None)
    harm = measure(flipped(tmp_path / "f.safetensors"), target=pair.TARGET, data="demo", **FEW)
    assert harm.verdict == "don't"
    assert harm.way("as it is").gain < 0


def test_where_retraining_harmed_r_is_not_defined(tmp_path):
    worse = flipped(tmp_path / "worse.safetensors")
    found = measure(pair.ADAPTER, target=pair.TARGET, retrained=worse, data="demo", **FEW)
    assert found.figure == "loss removed"
    way = found.way("as it is")
    assert way.retention.value is None
    assert way.retention.reason
    assert "No R" in found.notes[0]


def test_the_same_work_gives_the_same_figures():
    one, two = (
        measure(pair.ADAPTER, target=pair.TARGET, data="demo", **FEW).to_dict() for _ in range(2)
    )
    one.pop("seconds"), two.pop("seconds")
    assert one == two


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"methods": ["copy"]}, BadOption),
        ({"strengths": (0.0,)}, BadOption),
        ({"strengths": (float("nan"),)}, BadOption),
        ({"limit": 0}, BadOption),
        ({"timesteps": 0}, BadOption),
        ({"source": pair.SOURCE, "methods": ["none"]}, UnknownMethod),
        ({"target": pair.TARGET / "unet"}, CannotRun),
        ({"data": pair.MANIFEST}, BadData),
    ],
)
def test_what_cannot_be_measured_is_an_error(change, error):
    given = {"target": pair.TARGET, "data": "demo", **FEW, **change}
    with pytest.raises(error):
        measure(pair.ADAPTER, **given)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tiny Llama, a random adapter of great size on it, and sums to solve."""
    from peft import LoraConfig, get_peft_model

    from tests import factories

    folder = tmp_path_factory.mktemp("language")
    language_folder(folder / "base")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"])
    wrapped = get_peft_model(factories.llama(), config)
    torch.manual_seed(3)
    for name, weight in wrapped.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.5)
    wrapped.save_pretrained(folder / "adapter")
    sums = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in (0, 1, 2)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    (folder / "texts.txt").write_text("a b c d\n\nd c b\n")
    return folder


def test_a_language_model_is_measured_in_nats_per_byte(language):
    from regraft.retention.text import held_out_loss
    from regraft.running import open_model

    model = open_model(language / "base")
    found = measure(
        language / "adapter",
        source=language / "base",
        target=language / "base",
        data=language / "texts.txt",
        methods=["copy"],
        strengths=(1.0,),
    )
    alone = [held_out_loss(model.model, model.tokenizer, [t]) for t in ("a b c d", "d c b")]
    assert found.losses["target"] == pytest.approx(sum(alone) / 2, rel=1e-4)
    assert (found.metric, found.items, found.answers) == ("held-out loss", 2, {})
    assert found.data["kind"] == "texts"
    assert found.parameters["timesteps"] is None


def test_a_language_model_draws_no_pictures(language):
    with pytest.raises(BadOption, match="draws no pictures"):
        measure(
            language / "adapter",
            target=language / "base",
            data=language / "texts.txt",
            drawing=Drawing(2),
        )


def test_answers_to_prompts_are_counted(language):
    given = {"target": language / "base", "data": language / "sums.jsonl", "strengths": (1.0,)}
    found = measure(language / "adapter", retrained=language / "adapter", **given)
    way = found.way("as it is")
    assert 0 <= way.answers.score <= 1
    assert set(found.answers) == {"target", "retrained"}
    assert found.answers["retrained"] == way.answers.score


def test_texts_too_long_for_the_model_are_left_out_and_said(language):
    prompt = " ".join("a" for _ in range(40))
    rows = [{"prompt": prompt, "completion": " b"}, {"text": "a b c"}]
    data = language / "long.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    found = measure(language / "adapter", target=language / "base", data=data, strengths=(1.0,))
    assert found.items == 1
    assert any("1 text(s) left out" in note for note in found.notes)
    data.write_text(json.dumps(rows[0]))
    with pytest.raises(BadData, match="context"):
        measure(language / "adapter", target=language / "base", data=data)


def test_a_method_that_carries_nothing_is_listed_with_the_reason(tmp_path):
    world = make_world(tmp_path)
    found = by_methods(
        world / "lora.safetensors",
        open_base(world / "v1"),
        open_base(world / "stranger"),
        names=["lora-x"],
        options=MethodOptions(dimension=Dimension(k=4), threshold=1.0),
        library=new_library(tmp_path / "cache"),
        progress=lambda *_: None,
    )
    assert set(found.carried) == {"copy"}
    assert "Φ" in found.refused["lora-x"]
    assert found.predicted["verdict"] == "don't"


def test_an_adapter_of_zeros_is_refused(tmp_path):
    world = make_world(tmp_path)
    with safe_open(str(world / "lora.safetensors"), framework="pt") as file:
        zeros = {k: torch.zeros_like(file.get_tensor(k)) for k in file.keys()}  # noqa: SIM118
    save_file(zeros, world / "zero.safetensors")
    with pytest.raises(NothingCarried):
        measure(world / "zero.safetensors", source=world / "v1", target=world / "v2", data="demo")


def way(name, items, bare, *, values=(0.1, 0.5)):
    """A way from its losses per item, where the bare target's are ``bare`` and retraining's 0."""
    gains = [b - a for a, b in zip(items, bare, strict=True)]
    gain = sum(gains) / len(gains)
    spread = (max(gains) - min(gains)) / len(gains)
    curve = StrengthCurve((0.5, 1.0), values)
    return Way(name, 0.0, gain, spread, gain, spread, None, curve, None, 1)


def verdict(random=0.0, curve=(0.1, 0.5), **items):
    bare = [1.0, 1.0, 1.0, 1.0]
    ways = [way(name.replace("_", "-"), items[name], bare, values=curve) for name in items]
    loss = {w.name: sum(i) / 4 for w, i in zip(ways, items.values(), strict=True)}
    ways = [Way(**{**vars(w), "loss": loss[w.name]}) for w in ways]
    per_item = dict(zip((w.name for w in ways), items.values(), strict=True))
    return judge(ways, per_item, "R", Random(1.0, (random, random)))


GOOD, SAME, BETTER = [0.2, 0.21, 0.2, 0.21], [0.21, 0.2, 0.21, 0.2], [0.0, 0.01, 0.0, 0.01]
BAD = [1.1, 1.2, 1.1, 1.0]


def test_the_verdict_is_copy_when_nothing_is_better():
    assert verdict(copy=GOOD, lora_x=BAD)[:2] == ("copy", "copy")
    word, best, why = verdict(copy=SAME, lora_x=[s - 0.001 for s in GOOD])
    assert (word, best) == ("copy", "lora-x")
    assert "as good" in why


def test_the_verdict_is_carry_when_another_way_is_better():
    word, best, why = verdict(copy=GOOD, lora_x=BETTER)
    assert (word, best) == ("carry", "lora-x")
    assert "plain copying has R = 0.795" in why


def test_the_verdict_is_dont_when_nothing_helps():
    word, _, why = verdict(copy=BAD, lora_x=BAD)
    assert word == "don't"
    assert "None of 2 ways" in why


def test_a_figure_is_printed_as_finely_as_it_is_known():
    assert figure_text("R", 0.8734, 0.021) == "R = 0.87 ± 0.02"
    assert figure_text("R", 0.8734, 0.0021) == "R = 0.873 ± 0.002"
    assert figure_text("relative gain", -0.1) == "relative gain = -0.10"
    assert figure_text("loss removed", 0.12, 0.004) == "12.0 ± 0.4 % of the loss removed"


def test_doubts_are_said():
    assert "Random updates" in verdict(copy=GOOD, random=0.9)[2]
    assert "strength 0.5" in verdict(copy=GOOD, curve=(0.9, 0.5))[2]
    noisy = [0.0, 1.9, 0.1, 1.8]
    assert "more items" in verdict(copy=noisy)[2]
    assert verdict(copy=GOOD)[2].startswith("Plain copying helps: R = 0.795 ± 0.00")
