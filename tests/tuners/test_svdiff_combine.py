"""Adding and interpolating saved shifts; and those of vectors."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import regraft
from regraft.adapters.update import delta
from regraft.errors import (
    BadOption,
    NotAnAdapter,
    OutputExists,
    RegraftError,
    ShapeMismatch,
    SitesNotInBase,
    WrongBase,
)
from regraft.tuners import SVDiffConfig
from regraft.tuners.svdiff import combine_shifts, interpolate_shifts
from tests import factories
from tests.tuners.nets import Net, fill, ids

FILE = "adapter_model.safetensors"


def folder(path, seed, net=0, **options):
    """A trained adapter as PEFT saves it."""
    model = peft.get_peft_model(Net(seed=net), SVDiffConfig(**options))
    fill(model, seed=seed, size=1.0)  # large enough for the ReLU to bite
    model.save_pretrained(path)
    return path


@settings(max_examples=10, deadline=None)
@given(st.floats(-1, 2))
def test_files_are_combined_as_a_model_combines_adapters(tmp_path_factory, share):
    tmp = tmp_path_factory.mktemp("shifts")
    one, two = folder(tmp / "one", 1), folder(tmp / "two", 2)
    made = interpolate_shifts(one, two, share, tmp / "made")
    model = peft.PeftModel.from_pretrained(Net(), one, "one")
    model.load_adapter(two, "two")
    model.base_model.add_weighted_adapter(["one", "two"], [1 - share, share], "both")
    model.base_model.set_adapter("both")
    again = peft.PeftModel.from_pretrained(Net(), made)
    assert torch.allclose(again(ids()), model(ids()), atol=1e-5)


def test_the_ends_are_the_files_themselves(tmp_path):
    one, two = folder(tmp_path / "one", 1), folder(tmp_path / "two", 2)
    for share, end in ((0, one), (1, two)):
        made = interpolate_shifts(one, two, share, tmp_path / f"made{share}")
        assert (made / FILE).read_bytes() == (end / FILE).read_bytes()
        assert json.loads((made / "adapter_config.json").read_text()) == json.loads(
            (end / "adapter_config.json").read_text()
        )


def test_files_of_svdiff_pytorch_are_added(tmp_path):
    for i in (1, 2):
        torch.manual_seed(i)
        save_file({"a.delta": torch.randn(5), "norm.delta": torch.randn(1)}, tmp_path / f"{i}.st")
    made = combine_shifts([tmp_path / "1.st", tmp_path / "2.st"], tmp_path / "sum.safetensors")
    one, two, total = (load_file(p) for p in (tmp_path / "1.st", tmp_path / "2.st", made))
    assert total.keys() == one.keys()
    assert all(torch.allclose(total[k], one[k] + two[k]) for k in total)
    with pytest.raises(OutputExists):
        combine_shifts([tmp_path / "1.st"], made)
    combine_shifts([tmp_path / "1.st"], made, overwrite=True)
    assert made.read_bytes() == (tmp_path / "1.st").read_bytes()


def test_what_does_not_belong_together_is_refused(tmp_path):
    one, other = folder(tmp_path / "one", 1), folder(tmp_path / "other", 2, net=1)
    few = folder(tmp_path / "few", 2, target_modules=["linear"])
    whole = folder(tmp_path / "whole", 3, modules_to_save=["head"])
    file = tmp_path / "file.safetensors"
    save_file(load_file(one / FILE), file)
    short = tmp_path / "short.safetensors"
    save_file({k: t[:1].clone() for k, t in load_file(one / FILE).items()}, short)
    output = tmp_path / "out"
    for sources, error, words in (
        ([one, other], WrongBase, "different weights of"),
        ([one, few], SitesNotInBase, "different modules"),
        ([one, whole], NotAnAdapter, "other than spectral"),
        ([one, file], BadOption, "different forms"),
        ([file, short], ShapeMismatch, "different bases"),
        ([], BadOption, "0 sources"),
    ):
        with pytest.raises(error, match=words) as caught:
            combine_shifts(sources, output)
        assert caught.value.fix
        assert not output.exists()
    with pytest.raises(BadOption, match="1 weights for 2"):
        combine_shifts([one, one], output, [1.0])
    with pytest.raises(BadOption, match="not finite"):
        interpolate_shifts(one, one, float("nan"), output)
    assert not output.exists()


def test_vectors_are_read_trained_and_carried_or_refused(tmp_path):
    """1-D weights have one singular value, their length; the shift scales them."""
    factories.save(factories.unet(), tmp_path / "unet")
    model = peft.get_peft_model(factories.unet(), SVDiffConfig(target_modules=["conv_norm_out"]))
    layer = model.base_model.model.conv_norm_out
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    layer(torch.randn(2, 16, 3, 3)).square().mean().backward()
    optimiser.step()
    shift = layer.delta["default"].detach()
    assert float(shift) != 0
    model.save_pretrained(tmp_path / "adapter")
    base = {"source": tmp_path / "unet", "target": tmp_path / "unet"}
    output = tmp_path / "out.safetensors"
    result = regraft.transfer(tmp_path / "adapter", **base, output=output, dialect="kohya")
    assert (result.sites_carried, result.sites_refused) == (1, {})
    (update,) = regraft.load_adapter(output, tmp_path / "unet").updates.values()
    weight = factories.unet().conv_norm_out.weight.detach()
    assert torch.allclose(delta(update), weight * shift / weight.norm(), atol=1e-6)
    # A PEFT folder holds matrices only, and says so.
    with pytest.raises(RegraftError, match=r"conv_norm_out|one dimension|PEFT"):
        regraft.transfer(tmp_path / "adapter", **base, output=tmp_path / "peft", dialect="peft")
