"""A merge is made again from its provenance, and compared."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import regraft
from regraft.files import TensorFile
from regraft.verify import replay
from tests import factories
from tests.merge.models import state, write
from tests.merge.test_files import Q, adapter, language
from tests.merge.test_quantised import adapter as grouped_adapter
from tests.merge.test_zeros import grouped_base


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base folder in two or more shards, and two adapters."""
    folder = tmp_path_factory.mktemp("made")
    language(folder / "base", max_shard_size="20kB")
    (folder / "base" / "README.md").write_text("mine")
    adapter(folder / "a.safetensors", (0,))
    adapter(folder / "b.safetensors", (0, 5), size=0.5)
    return folder


@pytest.fixture
def merged(made, tmp_path):
    """A folder merged of two adapters in bf16, and its inputs in another order."""
    adapters = [made / "a.safetensors", made / "b.safetensors"]
    out = tmp_path / "out"
    regraft.merge(adapters, base=made / "base", output=out, strength=[0.5, -2], dtype="bf16")
    return out, {"adapter": adapters[::-1], "base": made / "base"}


def edit(out, **changed):
    path = out / "regraft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def shard(out):
    """The one with a weight that both adapters change."""
    name = f"{Q.format(0)}.weight"
    return next(p for p in sorted(out.glob("*.safetensors")) if name in TensorFile(p))


def test_a_folder_passes_byte_for_byte_wherever_its_inputs_are(merged, made, tmp_path):
    out, inputs = merged
    found = regraft.verify(out, **inputs)
    assert (found.status, found.operation) == ("passed", "merge"), found.checks
    assert "byte for byte" in found.how
    names = [c.name for c in found.checks]
    assert names.count("adapter") == 2
    assert {"base", "files", "replay"} <= set(names)
    shutil.copytree(made / "base", tmp_path / "else")
    shutil.copy(made / "a.safetensors", tmp_path / "x.safetensors")
    (out / "README.md").write_text("edited")
    (out / "picture.png").write_bytes(b"added")
    moved = {"adapter": [tmp_path / "x.safetensors", made / "b.safetensors"]}
    assert regraft.verify(out, **moved, base=tmp_path / "else").status == "passed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_passes_and_a_flipped_byte_fails(made, tmp_path, dtype):
    weights = {k: v.to(dtype) for k, v in factories.llama().state_dict().items()}
    base = write(tmp_path / "base.safetensors", weights)
    out = tmp_path / "out.safetensors"
    regraft.merge(made / "a.safetensors", base=base, output=out)
    inputs = {"adapter": made / "a.safetensors", "base": base}
    found = regraft.verify(out, **inputs)
    assert (found.status, "byte for byte" in found.how) == ("passed", True), found.checks
    data = bytearray(out.read_bytes())
    info = TensorFile(out)["model.norm.weight"]  # nothing that the merge changes
    data[info.end - 1] ^= 1
    out.write_bytes(data)
    found = regraft.verify(out, **inputs)
    assert (found.status, "model.norm.weight" in found.how) == ("failed", True), found.checks


def test_a_quantised_base_whose_zero_points_moved(tmp_path):
    grouped_base(tmp_path / "base")
    file, _ = grouped_adapter(tmp_path / "a.safetensors", False)
    regraft.merge(file, base=tmp_path / "base", output=tmp_path / "out", lossy=True)
    inputs = {"adapter": file, "base": tmp_path / "base"}
    found = regraft.verify(tmp_path / "out", **inputs)
    assert (found.status, "byte for byte" in found.how) == ("passed", True), found.checks
    story = json.loads((tmp_path / "out" / "regraft.json").read_text())
    assert story["parameters"]["lossy"] is True
    edit(tmp_path / "out", parameters={"lossy": False, "allow_unknown": False})
    assert regraft.verify(tmp_path / "out", **inputs).status == "inconclusive"


def test_the_unmerged_base_fails_within_any_versions(merged, made):
    """In bf16 a small change is less than the rounding that a transfer's numbers may show."""
    out, inputs = merged
    story = json.loads((out / "regraft.json").read_text())
    edit(out, versions=story["versions"] | {"torch": "0.0.1"})
    found = regraft.verify(out, **inputs)
    assert (found.status, "byte for byte" in found.how) == ("passed", True), found.checks
    path = shard(out)
    tensors, bare = load_file(path), state(made / "base")
    key = f"{Q.format(0)}.weight"
    one = {**tensors, key: tensors[key].clone()}
    one[key][0, 0] = torch.nextafter(one[key][0, 0], torch.tensor(9.0, dtype=torch.bfloat16))
    save_file(one, path, TensorFile(path).metadata)
    found = regraft.verify(out, **inputs)
    assert found.status == "passed", found.checks
    assert "tensors within" in found.how
    assert "torch 0.0.1" in found.how
    near = tensors[key] + 0.001 * (bare[key].bfloat16() - tensors[key]).sign() * tensors[key].abs()
    for wrong in (bare[key].bfloat16(), near, torch.nextafter(tensors[key], tensors[key] * 2)):
        save_file({**tensors, key: wrong}, path, {"format": "pt"})
        found = regraft.verify(out, **inputs)
        same = wrong.equal(tensors[key])
        assert same or (found.status, key in found.how) == ("failed", True), found.checks


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ("shard", "failed", "is missing"),
        ("foreign", "failed", "does not belong"),
        ("config", "failed", "config.json"),
        ("tokenizer", "failed", "generation_config.json"),
        ("story", "failed", "sites_refused"),
        ("strength", "failed", "differs"),
    ],
)
def test_what_is_not_as_it_was_made_fails(merged, change, status, says):
    out, inputs = merged
    story = json.loads((out / "regraft.json").read_text())
    if change == "shard":
        sorted(out.glob("*.safetensors"))[1].unlink()
    elif change == "foreign":
        write(out / "other.safetensors", {"x": torch.ones(1)})
    elif change == "config":
        (out / "config.json").write_text("{}")
    elif change == "tokenizer":
        (out / "generation_config.json").unlink()
    elif change == "story":
        edit(out, sites_refused={"x": "y"})
    else:
        edit(out, adapters=[story["adapters"][0] | {"strength": 1}, story["adapters"][1]])
    found = regraft.verify(out, **inputs)
    assert found.status == status, found.checks
    assert any(says in c.detail for c in found.checks if c.status == status), found.checks


def test_what_cannot_be_checked_is_inconclusive(merged, made, tmp_path):
    out, inputs = merged
    a, b = made / "a.safetensors", made / "b.safetensors"
    other = adapter(tmp_path / "c.safetensors", (1,))
    torch.manual_seed(1)
    different = factories.llama()
    with torch.no_grad():
        different.model.layers[0].self_attn.q_proj.weight.add_(1)
    factories.save(different, tmp_path / "different", max_shard_size="20kB")
    for given, says in (
        ({"adapter": None}, "name it with --adapter"),
        ({"adapter": a}, "not the adapter"),
        ({"adapter": [a, other]}, "not the adapter"),
        ({"adapter": [a, b, other]}, "none of those"),
        ({"base": None}, "name it with --base"),
        ({"base": tmp_path / "different"}, "not the base that was used"),
    ):
        found = regraft.verify(out, **(inputs | given))
        assert (found.status, says in found.how) == ("inconclusive", True), (given, found.checks)
    edit(out, parameters={"overwrite": True, "allow_unknown": False, "lossy": False})
    assert "is no parameter" in regraft.verify(out, **inputs).how
    for text in ("not json", "[]", json.dumps({"operation": "transfer", "format": 1})):
        (out / "regraft.json").write_text(text)
        assert regraft.verify(out, **inputs).status == "inconclusive"


def test_several_adapters_of_a_conversion_are_too_many(made, tmp_path):
    regraft.convert(made / "a.safetensors", output=tmp_path / "o.safetensors", rank=1)
    both = [made / "a.safetensors", made / "b.safetensors"]
    found = regraft.verify(tmp_path / "o.safetensors", adapter=both)
    assert (found.status, "several were given" in found.how) == ("inconclusive", True)


def test_inputs_from_the_hub_come_with_all_files_of_the_base(merged, made, monkeypatch):
    out, _ = merged
    story, asked = json.loads((out / "regraft.json").read_text()), []
    facts = [
        one | {"repo": f"org/{n}", "revision": "c0ffee"}
        for n, one in zip("ab", story["adapters"], strict=True)
    ]
    edit(out, adapters=facts, base=story["base"] | {"name": "org/base", "revision": "ba5e"})
    places = {"org/a": made / "a.safetensors", "org/b": made / "b.safetensors"}
    places["org/base"] = made / "base"

    def from_hub(repo, revision, **options):
        asked.append((repo, revision, options))
        return places[repo]

    monkeypatch.setattr(replay, "from_hub", from_hub)
    found = regraft.verify(out)
    assert found.status == "passed", found.checks
    assert asked[:2] == [("org/a", "c0ffee", {}), ("org/b", "c0ffee", {})]
    assert asked[2] == ("org/base", "ba5e", {"to_run": True})


def test_the_command_takes_several_adapters(merged, made, capsys, monkeypatch):
    from tests.cli.test_cli import call

    out, _ = merged
    a, b = made / "a.safetensors", made / "b.safetensors"
    args = ("verify", out, "--adapter", b, "--adapter", a, "--base", made / "base", "--json")
    code, text, _ = call(capsys, monkeypatch, *args)
    assert (code, json.loads(text)["status"]) == (0, "passed")
    assert call(capsys, monkeypatch, "verify", out, "--base", made / "base", "-q")[0] == 3
