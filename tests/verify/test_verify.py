"""Verification: a replay passes; a change, another input, or a gap never does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import regraft
from regraft import errors
from regraft.dialects import DIALECTS
from regraft.files import data_sha256, serialize
from regraft.methods import methods
from tests.convert.files import kohya, lora, rand, save
from tests.methods.worlds import make_base, new_library

#: The small bases are no diffusion models, which is all that kohya's names and ComfyUI's are for.
HELD = [d for d in DIALECTS if d not in ("kohya", "comfyui")]


def story_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["regraft"])


def rewrite(path, tensors=None, *, rehash=True, story=None, **changed):
    """The same file with other tensors or metadata, and with a right hash of its data."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = tensors or load_file(path)
    if rehash:
        metadata["sshs_model_hash"] = data_sha256(tensors)
    if story is not None:
        metadata["regraft"] = json.dumps(story, sort_keys=True)
    metadata |= changed
    new = path.with_suffix(".new")  # the old one is mapped
    serialize(new, tensors, {k: v for k, v in metadata.items() if v is not None})
    new.replace(path)


@pytest.mark.parametrize("dialect", HELD)
@pytest.mark.parametrize("method", [*(m.name for m in methods()), "auto"])
def test_a_replay_passes_byte_for_byte(world, library, tmp_path, method, dialect):
    out = tmp_path / ("out" if dialect == "peft" else "out.safetensors")
    regraft.transfer(
        world / "lora.safetensors",
        source=world / "v1",
        target=world / "v2",
        output=out,
        method=method,
        dialect=dialect,
        dimension="0.9",
        rank_energy=0.9,
        pairing="name",
        seed=7,
        dtype="bf16",
        library=library,
    )
    found = regraft.verify(
        out,
        adapter=world / "lora.safetensors",
        source=world / "v1",
        target=world / "v2",
        library=library,
    )
    assert (found.status, found.operation) == ("passed", "transfer"), found.how
    assert "byte for byte" in found.how
    names = {c.name for c in found.checks}
    assert {"integrity", "adapter", "source", "target", "replay"} <= names


def test_names_and_places_of_the_inputs_do_not_matter(carried, world, tmp_path):
    out, inputs = carried
    shutil.copy(world / "lora.safetensors", tmp_path / "other name.safetensors")
    shutil.copytree(world / "v1", tmp_path / "source")
    shutil.copytree(world / "v2", tmp_path / "target")
    moved = {
        "adapter": tmp_path / "other name.safetensors",
        "source": tmp_path / "source",
        "target": tmp_path / "target",
        "library": inputs["library"],
    }
    assert "byte for byte" in regraft.verify(out, **moved).how


def test_a_flipped_byte_fails(carried):
    out, inputs = carried
    data = bytearray(out.read_bytes())
    data[-5] ^= 1
    out.write_bytes(data)
    found = regraft.verify(out, **inputs)
    assert found.status == "failed"
    assert "do not have the hash" in found.how


def test_other_tensors_fail_and_are_named_whatever_the_hash_says(carried):
    out, inputs = carried
    tensors = load_file(out)
    key = sorted(tensors)[1]
    tensors[key][0, 0] += tensors[key].abs().max()
    rewrite(out, tensors)
    found = regraft.verify(out, **inputs)
    assert found.status == "failed"
    assert key in found.how


def test_a_missing_tensor_fails(carried):
    out, inputs = carried
    tensors = load_file(out)
    key = sorted(tensors)[0]
    del tensors[key]
    rewrite(out, tensors)
    found = regraft.verify(out, **inputs)
    assert (found.status, f"{key} is missing" in found.how) == ("failed", True)


@pytest.mark.parametrize("change", [{"modelspec.trigger_phrase": "other"}, {"extra": "1"}])
def test_other_metadata_fail(carried, change):
    out, inputs = carried
    rewrite(out, **change)
    found = regraft.verify(out, **inputs)
    assert (found.status, next(iter(change)) in found.how) == ("failed", True)


def test_a_story_that_its_inputs_do_not_give_fails(carried):
    out, inputs = carried
    story = story_of(out)
    story["energy_kept"] = 1.0
    story["sites_refused"] = {}
    rewrite(out, story=story)
    assert regraft.verify(out, **inputs).status == "failed"


@pytest.mark.parametrize("which", ["source", "target"])
def test_another_base_is_inconclusive(carried, world, which):
    out, inputs = carried
    found = regraft.verify(out, **{**inputs, which: world / "stranger"})
    assert found.status == "inconclusive"
    assert "not the base that was used" in found.how


def test_another_adapter_is_inconclusive(carried, tmp_path):
    out, inputs = carried
    other = kohya(tmp_path / "k.safetensors")
    found = regraft.verify(out, **{**inputs, "adapter": other})
    assert (found.status, "not the adapter" in found.how) == ("inconclusive", True)


@pytest.mark.parametrize("lost", ["adapter", "source", "target"])
def test_an_input_that_is_not_given_is_inconclusive(carried, lost):
    out, inputs = carried
    found = regraft.verify(out, **{**inputs, lost: None})
    assert (found.status, "name it with" in found.how) == ("inconclusive", True)


@pytest.mark.parametrize(
    ("story", "says"),
    [
        (None, "none"),
        ([], "not a JSON object"),
        ({"format": 2}, "format is 2"),
        ({"format": 1, "operation": "graft"}, "graft"),
        ({"format": 1, "operation": "merge"}, "not as this version writes"),
        ({"format": 1, "operation": "merge", "adapters": 3}, "not as this version writes"),
        ({"format": 1}, "not as this version writes"),
        ({"format": 1, "operation": "convert", "adapter": 3}, "not as this version writes"),
    ],
)
def test_a_story_that_cannot_be_followed_is_inconclusive(carried, story, says):
    out, inputs = carried
    if story is None:
        rewrite(out, regraft=None)
    else:
        rewrite(out, story=story)
    found = regraft.verify(out, **inputs)
    assert (found.status, says in found.how) == ("inconclusive", True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "magic"}, "magic"),
        ({"device": "cuda"}, "made on cuda"),
        ({"no_such_option": 1}, "not as this version writes"),
        ({"dimension": None}, "not as this version writes"),
    ],
)
def test_parameters_that_this_version_cannot_follow_are_inconclusive(carried, change, says):
    if "device" in change and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    out, inputs = carried
    story = story_of(out)
    story["parameters"] |= change
    rewrite(out, story=story)
    found = regraft.verify(out, **inputs)
    assert (found.status, says in found.how) == ("inconclusive", True), found.how


@pytest.mark.parametrize("operation", ["transfer", "convert"])
def test_provenance_cannot_name_a_path_to_write_to(carried, tmp_path, operation):
    out, inputs = carried
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    if operation == "transfer":
        more = {"report": str(mine), "overwrite": True}
    else:
        inputs = {"adapter": kohya(tmp_path / "in.safetensors")}
        out = tmp_path / "converted.safetensors"
        regraft.convert(inputs["adapter"], output=out)
        more = {"overwrite": True}
    story = story_of(out)
    story["parameters"] |= more
    rewrite(out, story=story)
    found = regraft.verify(out, **inputs)
    assert mine.read_text() == "mine"
    assert (found.status, "is no parameter" in found.how) == ("inconclusive", True), found.how


@pytest.mark.parametrize("which", ["torch", "engine", "regraft"])
def test_other_versions_compare_tensors_within_a_stated_tolerance(carried, which):
    out, inputs = carried
    story = story_of(out)
    story["versions"][which] = "0.0.1"
    tensors = {k: v * (1 + 1e-6) for k, v in load_file(out).items()}
    rewrite(out, tensors, story=story)
    found = regraft.verify(out, **inputs)
    assert found.status == "passed"
    assert "tensors within" in found.how
    assert f"{which} 0.0.1" in found.how
    rewrite(out, {k: v * 1.01 for k, v in tensors.items()}, story=story)
    assert regraft.verify(out, **inputs).status == "failed"


def test_metadata_of_another_regraft_are_not_judged(carried):
    out, inputs = carried
    story = story_of(out)
    story["versions"]["regraft"] = "0.0.1"
    rewrite(out, story=story, extra="1")
    assert regraft.verify(out, **inputs).status == "inconclusive"


def test_the_first_provenance_can_still_be_followed(carried):
    out, inputs = carried
    story = story_of(out)
    for key in ("operation", "dialect"):
        del story[key]
    for key in ("method", "device", "allow_unknown"):
        del story["parameters"][key]
    for key in ("repo", "revision", "config_sha256"):
        del story["adapter"][key]
    rewrite(out, story=story)
    found = regraft.verify(out, **inputs)
    assert found.status == "passed", found.checks


def test_a_file_without_a_hash_of_its_data_cannot_pass(carried):
    out, inputs = carried
    rewrite(out, rehash=False, sshs_model_hash=None)
    assert regraft.verify(out, **inputs).status != "passed"


def test_a_changed_scale_beside_a_peft_file_fails(world, library, tmp_path):
    inputs = {"source": world / "v1", "target": world / "v2"}
    regraft.transfer(
        world / "lora.safetensors", output=tmp_path / "o", dialect="peft", library=library, **inputs
    )
    config = tmp_path / "o" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
    found = regraft.verify(
        tmp_path / "o", adapter=world / "lora.safetensors", library=library, **inputs
    )
    assert (found.status, "adapter_config" in found.how) == ("failed", True)


def test_a_changed_scale_beside_a_peft_input_is_inconclusive(tmp_path):
    name, folder = "base_model.model.q", tmp_path / "a"
    folder.mkdir()
    save(
        folder / "adapter_model.safetensors",
        {f"{name}.lora_A.weight": rand(2, 8), f"{name}.lora_B.weight": rand(6, 2)},
    )
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    regraft.convert(folder, output=tmp_path / "o", rank=1)
    assert regraft.verify(tmp_path / "o", adapter=folder).status == "passed"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    found = regraft.verify(tmp_path / "o", adapter=folder)
    assert (found.status, "adapter_config" in found.how) == ("inconclusive", True)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"rank": "sv_ratio=4,max=3", "dtype": "fp16"},
        {"rank": 0.9},
        {"form": "diff"},
        {"allow_unknown": True},
    ],
)
def test_a_conversion_passes(tmp_path, options):
    tensors = load_file(kohya(tmp_path / "k.safetensors"))
    if options.get("allow_unknown"):
        tensors["strange"] = rand(2)
    path = save(tmp_path / "a.safetensors", tensors)
    regraft.convert(path, output=tmp_path / "o.safetensors", **options)
    found = regraft.verify(tmp_path / "o.safetensors", adapter=path)
    assert (found.status, found.operation) == ("passed", "convert"), found.how
    assert "byte for byte" in found.how


def test_a_conversion_on_its_base_is_held_to_that_base(tmp_path):
    library = new_library(tmp_path / "cache")
    make_base(tmp_path / "base", 0)
    make_base(tmp_path / "other", 1)
    name = "layers.0.wide"
    tensors = {f"{name}.lora_A.weight": rand(2, 40), f"{name}.lora_B.weight": rand(16, 2)}
    path = save(tmp_path / "a.safetensors", {**tensors, f"{name}.dora_scale": rand(16, 1).abs()})
    out = tmp_path / "o.safetensors"
    regraft.convert(path, output=out, base=tmp_path / "base", rank=4, library=library)
    good = regraft.verify(out, adapter=path, base=tmp_path / "base", library=library)
    assert good.status == "passed", good.how
    bad = regraft.verify(out, adapter=path, base=tmp_path / "other", library=library)
    assert (bad.status, "not the base" in bad.how) == ("inconclusive", True)
    assert regraft.verify(out, adapter=path, library=library).status == "inconclusive"


def test_inputs_from_the_hub_are_found_again(carried, monkeypatch):
    """Recorded with repository and revision, they are asked for by these."""
    from regraft.verify import replay

    out, inputs = carried
    story, asked = story_of(out), []
    story["adapter"] |= {"repo": "org/style", "revision": "c0ffee"}
    story["source"] |= {"name": "org/base", "revision": "ba5e"}
    rewrite(out, story=story)
    places = {"org/style": inputs["adapter"], "org/base": inputs["source"]}

    def from_hub(repo, revision):
        asked.append((repo, revision))
        return places[repo]

    monkeypatch.setattr(replay, "from_hub", from_hub)
    found = regraft.verify(out, target=inputs["target"], library=inputs["library"])
    assert asked == [("org/style", "c0ffee"), ("org/base", "ba5e")]
    assert "byte for byte" in found.how, found.checks


def test_what_cannot_be_read_is_an_error(carried, tmp_path):
    out, inputs = carried
    with pytest.raises(errors.InputNotFound):
        regraft.verify(tmp_path / "nothing.safetensors", **inputs)
    with pytest.raises(errors.InputNotFound):
        regraft.verify(out, **{**inputs, "source": tmp_path / "nothing"})
    with pytest.raises(errors.InputNotFound):
        regraft.verify(out, **{**inputs, "adapter": tmp_path / "nothing"})
    out.write_bytes(out.read_bytes()[:100])
    with pytest.raises(errors.MalformedFile):
        regraft.verify(out, **inputs)


def test_it_leaves_the_output_and_the_folder_alone(tmp_path):
    path = save(tmp_path / "a.safetensors", lora("lora_unet_x_to_q", 8, 8, 2, 1.0))
    regraft.convert(path, output=tmp_path / "o.safetensors", rank=1)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    regraft.verify(tmp_path / "o.safetensors", adapter=path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
