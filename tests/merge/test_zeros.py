"""QA-LoRA's merge: zero points move, nothing else does, and what rounding takes is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft.adapters import Adapter, LowRank, Site
from regraft.bases import open_base
from regraft.bases.quantised.integers import pack, unpack
from regraft.errors import BadOption, NothingCarried, QuantisedWeight, ShapeMismatch
from regraft.merge.zero_points import has_zeros
from regraft.merge.zeros import merge_into_zeros

OUT, IN, GROUPS = 32, 64, 4
SITE = Site("", "layer")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 10, 64])
def test_packing_is_the_inverse_of_unpacking(bits, count):
    values = torch.randint(0, 2**bits, (3, count))
    assert unpack(pack(values, bits), bits, count).equal(values.to(torch.uint8))


def integer_base(folder, form: str, bits: int = 4):
    """A base of one GPTQ or AWQ weight, its groups out of order, and the group of each input."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (IN, OUT), generator=generator)
    zeros = torch.randint(2, 2**bits - 1, (GROUPS, OUT), generator=generator)
    scales = (torch.rand(GROUPS, OUT, generator=generator) + 0.5).half()
    if form == "awq":
        group = torch.arange(IN) // (IN // GROUPS)
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def gemm(rows: Tensor) -> Tensor:
            return pack(rows.reshape(len(rows), -1, 8)[..., order].flatten(1), 4)

        tensors = {"qweight": gemm(codes), "qzeros": gemm(zeros)}
        config = {"quant_method": "awq", "version": "gemm"}
    else:
        group = torch.randperm(IN, generator=generator) % GROUPS
        stored = zeros - int(form == "gptq")
        tensors = {"qweight": pack(codes.T, bits).T, "qzeros": pack(stored, bits)}
        tensors["g_idx"] = group.int()
        config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": form}
    tensors |= {"scales": scales, "bias": torch.zeros(OUT)}
    folder.mkdir()
    save_file(
        {f"layer.{k}": v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    (folder / "tokenizer.json").write_text("{}")
    return open_base(folder), group, scales.float().T


def adapter_of(change: Tensor) -> Adapter:
    """An adapter whose ΔW is ``change``."""
    update = LowRank(change, torch.eye(IN), 1.0, (OUT, IN))
    return Adapter({SITE: update}, family="qa-lora", dialect="peft")


INTEGERS = [("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8), ("gptq_v2", 4), ("awq", 4)]


@pytest.mark.parametrize(("form", "bits"), INTEGERS)
def test_whole_steps_of_integer_zero_points_are_exact(form, bits, tmp_path):
    base, group, scales = integer_base(tmp_path / "base", form, bits)
    steps = torch.randint(-1, 2, (OUT, GROUPS), generator=torch.Generator().manual_seed(0))
    change = (scales * steps)[:, group]
    assert has_zeros(base, adapter_of(change))
    result = merge_into_zeros([(adapter_of(change), 1.0)], base, tmp_path / "out")
    assert (result.sites, result.cut_off) == (1, 0)
    assert result.error < 1e-6
    merged = open_base(tmp_path / "out")
    torch.testing.assert_close(merged.read(SITE), base.read(SITE) + change, atol=1e-5, rtol=1e-5)
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {k for k in before if not before[k].equal(after[k])} == {"layer.qzeros"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(("form", "bits"), INTEGERS)
def test_what_rounding_takes_is_refused_or_measured(form, bits, tmp_path):
    base, group, scales = integer_base(tmp_path / "base", form, bits)
    share = torch.rand(OUT, GROUPS, generator=torch.Generator().manual_seed(1)) * 0.9
    change = (scales * share)[:, group]
    pairs = [(adapter_of(change), 0.5), (adapter_of(change), 0.5)]
    with pytest.raises(QuantisedWeight, match="rounding"):
        merge_into_zeros(pairs, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = merge_into_zeros(pairs, base, tmp_path / "out", lossy=True)
    merged = open_base(tmp_path / "out").read(SITE) - base.read(SITE)
    assert ((merged - change).abs() <= scales[:, group] / 2 + 1e-5).all()
    error = float((merged - change).norm() / change.norm())
    assert result.error == pytest.approx(error, rel=1e-4)
    assert f"{100 * error:.3g} %" in " ".join(result.notes)


def test_zero_points_stop_at_the_end_of_their_range(tmp_path):
    base, group, scales = integer_base(tmp_path / "base", "gptq", 4)
    change = (scales * 40.0)[:, group]
    result = merge_into_zeros([(adapter_of(change), 1.0)], base, tmp_path / "out", lossy=True)
    assert result.cut_off == 1
    assert 0.5 < result.error < 1
    assert "end of their range" in result.notes[0]


def grouped_base(folder, dtype=torch.float32, names=("layer",)):
    """A base of torchao weights with groups of 16 inputs."""
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(IN, OUT).to(dtype) for name in names})
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=torchao.PerGroup(16),
        mapping_type=torchao.MappingType.ASYMMETRIC,
    )
    torchao.quantize_(model, config)
    flat, metadata = flatten_tensor_state_dict(model.state_dict())
    folder.mkdir()
    save_file(flat, folder / "model.safetensors", metadata=metadata)
    return open_base(folder)


def test_torchaos_zero_points_take_a_change_exactly(tmp_path):
    base = grouped_base(tmp_path / "base")
    assert base.quantised == {"torchao int4": 1}
    change = torch.randn(OUT, 2).repeat_interleave(32, dim=1)  # two groups of the base each
    result = merge_into_zeros([(adapter_of(change), -0.5)], base, tmp_path / "out")
    assert result.error < 1e-6
    assert result.notes == []
    merged = open_base(tmp_path / "out")
    torch.testing.assert_close(merged.read(SITE), base.read(SITE) - 0.5 * change)
    again = merge_into_zeros([(adapter_of(change), 0.5)], merged, tmp_path / "back")
    assert again.error < 1e-6
    torch.testing.assert_close(open_base(tmp_path / "back").read(SITE), base.read(SITE))


def test_a_change_within_groups_is_refused_or_averaged(tmp_path):
    base = grouped_base(tmp_path / "base")
    change = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    with pytest.raises(QuantisedWeight, match="differs within groups"):
        merge_into_zeros([(adapter_of(change), 1.0)], base, tmp_path / "out")
    result = merge_into_zeros([(adapter_of(change), 1.0)], base, tmp_path / "out", lossy=True)
    means = change.unflatten(1, (-1, 16)).mean(dim=2, keepdim=True).expand(-1, -1, 16).flatten(1)
    merged = open_base(tmp_path / "out").read(SITE)
    torch.testing.assert_close(merged, base.read(SITE) + means)
    lost = float((means - change).norm() / change.norm())
    assert result.error == pytest.approx(lost, rel=1e-5)
    assert result.outside_groups == pytest.approx(lost, rel=1e-5)


def test_a_whole_model_with_merged_zero_points_is_the_adapter_on_its_base(tmp_path):
    pytest.importorskip("peft")
    torchao = pytest.importorskip("torchao.quantization")
    pytest.importorskip("transformers")
    import peft
    from transformers import AutoModelForCausalLM, TorchAoConfig

    from regraft.dialects import load_adapter
    from regraft.running import open_model
    from regraft.tuners import QALoraConfig
    from tests.running import bases
    from tests.tuners.nets import fill

    bases.language_folder(tmp_path / "plain")
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=torchao.PerGroup(8),
        mapping_type=torchao.MappingType.ASYMMETRIC,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(config), dtype=torch.float32
    )
    bases.language_folder(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    where = r".*layers\.\d+\.self_attn\.[qkvo]_proj"
    made = peft.get_peft_model(model, QALoraConfig(r=2, target_modules=where)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    fill(made)
    made.save_pretrained(tmp_path / "adapter")
    base = open_base(tmp_path / "base")
    adapter = load_adapter(tmp_path / "adapter", base)
    assert has_zeros(base, adapter)
    result = merge_into_zeros([(adapter, 1.0)], base, tmp_path / "out")
    assert result.error < 1e-6
    merged = open_model(tmp_path / "out")
    ids = torch.randint(3, 15, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = made(input_ids=ids).logits
        found = merged.modules[""](input_ids=ids).logits
        bare = open_model(tmp_path / "base").modules[""](input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - bare).abs().max() > 1e-2


def test_bases_without_zero_points_are_refused(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"layer.weight": torch.zeros(OUT, IN)}, tmp_path / "base" / "model.safetensors")
    base = open_base(tmp_path / "base")
    adapter = adapter_of(torch.ones(OUT, IN))
    assert not has_zeros(base, adapter)
    with pytest.raises(QuantisedWeight, match="not quantised"):
        merge_into_zeros([(adapter, 1.0)], base, tmp_path / "out")
    single = open_base(tmp_path / "base" / "model.safetensors")
    with pytest.raises(BadOption, match="single file"):
        merge_into_zeros([(adapter, 1.0)], single, tmp_path / "out")


def test_changes_that_do_not_fit_are_refused(tmp_path):
    base = grouped_base(tmp_path / "base")
    ones = adapter_of(torch.ones(OUT, IN))
    lost = replace(ones, updates={Site("", "other"): ones.updates[SITE]})
    assert not has_zeros(base, lost)
    with pytest.raises(QuantisedWeight, match="no quantised weight"):
        merge_into_zeros([(lost, 1.0)], base, tmp_path / "out")
    narrow = LowRank(torch.ones(8, 2), torch.ones(2, IN), 1.0, (8, IN))
    with pytest.raises(ShapeMismatch):
        merge_into_zeros([(replace(ones, updates={SITE: narrow}), 1.0)], base, tmp_path / "out")
    with pytest.raises(NothingCarried, match="zero at every site"):
        merge_into_zeros([(adapter_of(torch.zeros(OUT, IN)), 1.0)], base, tmp_path / "out")
