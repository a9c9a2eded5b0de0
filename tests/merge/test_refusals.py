"""What is not merged, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import regraft
from regraft.errors import (
    BadOption,
    CannotMerge,
    FamilyNotYet,
    InputNotFound,
    NonFiniteTensor,
    NothingCarried,
    OutputExists,
    OutputFailed,
    QuantisedWeight,
    ShapeMismatch,
    SitesNotInBase,
)
from regraft.merge import run
from tests import factories
from tests.merge.models import write
from tests.merge.test_files import Q, adapter, language


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return language(tmp_path_factory.mktemp("base") / "base")


def refused(kind, tmp_path, file, base, match=None, **options):
    out = options.pop("output", tmp_path / "out")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(kind, match=match) as caught:
        regraft.merge(file, base=base, output=out, **options)
    assert set(tmp_path.rglob("*")) == before, "something was left behind"
    return caught.value


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "BOTTLENECK"])
def test_what_has_no_change_of_a_weight_is_refused_before_the_base_is_read(kind, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", {"prompt_embeddings": torch.ones(2, 4)})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    error = refused(CannotMerge, tmp_path, folder, tmp_path / "no such base", "no ΔW")
    assert kind.split("_")[0].lower() in error.what
    (folder / "adapter_config.json").unlink()
    refused(FamilyNotYet, tmp_path, folder, tmp_path / "no such base", "prompt or prefix")


def test_nothing_that_would_change_nothing_is_written(base, tmp_path):
    file = adapter(tmp_path / "a.safetensors")
    refused(NothingCarried, tmp_path, file, base, "strength 0", strength=0)
    zero = adapter(tmp_path / "zero.safetensors", size=0.0)
    refused(NothingCarried, tmp_path, zero, base, "zero at every site")
    weights = {k: v.bfloat16() for k, v in factories.llama().state_dict().items()}
    coarse = write(tmp_path / "coarse.safetensors", weights)
    small = adapter(tmp_path / "small.safetensors", size=1e-8)
    out = tmp_path / "out.safetensors"
    error = refused(NothingCarried, tmp_path, small, coarse, "too small", output=out)
    assert "--dtype fp32" in error.fix
    regraft.merge(small, base=coarse, output=out, dtype="fp32")


def test_a_weight_beyond_its_dtype_is_named(tmp_path):
    weights = {k: v.half() for k, v in factories.llama().state_dict().items()}
    base = write(tmp_path / "base.safetensors", weights)
    file = adapter(tmp_path / "a.safetensors", (0, 5), size=1e5)
    out = tmp_path / "out.safetensors"
    error = refused(OutputFailed, tmp_path, file, base, "float16", output=out)
    assert error.tensor == f"{Q.format(0)}.weight"
    assert "bf16" in error.fix


def test_weights_that_are_not_finite_are_not_blamed_on_the_dtype(tmp_path):
    weights = factories.llama().state_dict()
    key = f"{Q.format(0)}.weight"
    weights[key] = weights[key].clone()
    weights[key][3, 3] = torch.nan
    base = write(tmp_path / "base.safetensors", weights)
    file = adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    error = refused(NonFiniteTensor, tmp_path, file, base, "of the base", output=out)
    assert error.tensor == key
    sound = write(tmp_path / "sound.safetensors", factories.llama().state_dict())
    huge = adapter(tmp_path / "huge.safetensors", size=1e38)
    refused(NonFiniteTensor, tmp_path, huge, sound, "beyond what fp32", output=out)


def test_another_base(base, tmp_path):
    factories.save(factories.gpt2(), tmp_path / "gpt2")
    file = adapter(tmp_path / "a.safetensors")
    refused(SitesNotInBase, tmp_path, file, tmp_path / "gpt2", "self_attn.q_proj")
    wide = {f"{Q.format(0)}.lora_{x}.weight": torch.ones(*s) for x, s in
            (("A", (2, 20)), ("B", (20, 2)))}  # fmt: skip
    refused(ShapeMismatch, tmp_path, write(tmp_path / "w.safetensors", wide), base)


def test_the_base_is_never_the_output(base, tmp_path):
    file = adapter(tmp_path / "a.safetensors")
    for out in (base, base / "merged"):
        refused(OutputExists, tmp_path, file, base, output=out, overwrite=True)
    refused(OutputExists, tmp_path, file, base, output=base.parent, overwrite=True)
    weights = write(tmp_path / "base.safetensors", factories.llama().state_dict())
    refused(OutputExists, tmp_path, file, weights, output=weights, overwrite=True)
    refused(OutputExists, tmp_path, file, weights, output=file, overwrite=True)


def test_names_and_options(base, tmp_path):
    file = adapter(tmp_path / "a.safetensors")
    refused(BadOption, tmp_path, file, base, "folder", output=tmp_path / "out.safetensors")
    refused(BadOption, tmp_path, file, base / "model.safetensors", "file")
    refused(BadOption, tmp_path, file, base, "dtype", dtype="fp8")
    refused(BadOption, tmp_path, file, base, "2 strength", strength=[1, 2])
    refused(BadOption, tmp_path, file, base, "finite", strength=float("nan"))
    refused(BadOption, tmp_path, [], base, "0 adapter")
    refused(InputNotFound, tmp_path, tmp_path / "none.safetensors", base)
    refused(InputNotFound, tmp_path, file, tmp_path / "none")


def test_an_output_that_is_there(base, tmp_path):
    file = adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out"
    regraft.merge(file, base=base, output=out)
    refused(OutputExists, tmp_path, file, base, "already exists")
    first = (out / "model.safetensors").read_bytes()
    regraft.merge(file, base=base, output=out, strength=0.5, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != first
    (out / "mine.txt").write_text("not regraft's")
    refused(OutputExists, tmp_path, file, base, "other files", overwrite=True)


def test_too_little_space(base, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    refused(OutputFailed, tmp_path, adapter(tmp_path / "a.safetensors"), base, "are free")


def test_quantised_and_pickled_bases(tmp_path):
    file = adapter(tmp_path / "a.safetensors")
    weights = factories.llama().state_dict()
    key = f"{Q.format(0)}.weight"
    weights[key] = weights[key].to(torch.float8_e4m3fn)
    weights[f"{Q.format(0)}.scale_weight"] = torch.ones(1)
    scaled = write(tmp_path / "scaled.safetensors", weights | {"scaled_fp8": torch.ones(2)})
    out = tmp_path / "out.safetensors"
    error = refused(QuantisedWeight, tmp_path, file, scaled, "scaled fp8", output=out)
    assert "16-bit" in error.fix
    torch.save(factories.llama().state_dict(), tmp_path / "base.bin")
    error = refused(CannotMerge, tmp_path, file, tmp_path / "base.bin", output=out)
    assert "safetensors" in error.fix


@pytest.mark.slow
def test_a_pickled_base_where_they_are_allowed(tmp_path):
    torch.save(factories.llama().state_dict(), tmp_path / "base.bin")
    file, out = adapter(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    with regraft.allow_pickles():
        error = refused(CannotMerge, tmp_path, file, tmp_path / "base.bin", output=out)
    assert "safetensors" in error.fix


@pytest.mark.slow
def test_an_adapter_may_be_a_pickle_where_they_are_allowed(base, tmp_path):
    from safetensors.torch import load_file

    torch.save(load_file(adapter(tmp_path / "a.safetensors")), tmp_path / "a.bin")
    with regraft.allow_pickles():
        result = regraft.merge(tmp_path / "a.bin", base=base, output=tmp_path / "out")
    assert len(result.sites) == 2


def test_a_head_tied_to_the_embedding(tmp_path):
    """The head alone has no weight to sit on; a change of the embedding changes both."""
    from transformers import LlamaForCausalLM

    model = factories.llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    base = factories.save(model, tmp_path / "base")
    name = "model.embed_tokens"
    tensors = {f"{name}.lora_embedding_A": torch.ones(2, 40), "lm_head.lora_A.weight":
               torch.ones(2, 16), f"{name}.lora_embedding_B": torch.ones(16, 2),
               "lm_head.lora_B.weight": torch.ones(40, 2)}  # fmt: skip
    folder = tmp_path / "adapter"
    folder.mkdir()
    prefixed = {f"base_model.model.{k}": v for k, v in tensors.items()}
    write(folder / "adapter_model.safetensors", prefixed)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    result = regraft.merge(folder, base=base, output=tmp_path / "out")
    assert any("ties this head" in why for why in result.sites_refused.values())
    assert any("output head as well" in note for note in result.notes)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("step", ["rewrite", "finish"])
def test_a_failure_on_the_way_leaves_what_was_there(step, base, tmp_path, monkeypatch):
    """A full disk, and somebody who presses Ctrl-C."""
    file = adapter(tmp_path / "a.safetensors")
    regraft.merge(file, base=base, output=tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    real = getattr(run, step)
    for error, kind in (
        (OSError(28, "No space left"), OutputFailed),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def failing(*args, error=error, **options):
            real(*args, **options)
            raise error

        monkeypatch.setattr(run, step, failing)
        refused(kind, tmp_path, file, base, strength=2, overwrite=True)
        refused(kind, tmp_path, file, base, output=tmp_path / "new")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


KILLED = """
import sys, time
import regraft
from regraft.merge import run
real = run.rewrite
def slow(*args, **options):
    real(*args, **options)
    print("writing", flush=True)
    time.sleep(60)
run.rewrite = slow
regraft.merge(sys.argv[1], base=sys.argv[2], output=sys.argv[3])
"""


@pytest.mark.slow
def test_a_kill_leaves_no_output(tmp_path):
    base = write(tmp_path / "base.safetensors", factories.llama().state_dict())
    file = adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", KILLED, file, base, out]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert not out.exists()
