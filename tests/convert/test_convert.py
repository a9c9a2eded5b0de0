"""Conversions against plain linear algebra, and the account of them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import regraft
from regraft import errors
from regraft.dialects.source import open_source
from tests.convert.files import CONV, TEXT, Q, best, deltas, kohya, lora, rand, save
from tests.methods.worlds import SHAPES, make_base, new_library, write_lora


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def close(got, want):
    return float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_resized_lora_is_the_best_approximation_of_that_rank(tmp_path, rank):
    path = kohya(tmp_path / "a.safetensors")
    result = regraft.convert(path, output=tmp_path / "o.safetensors", rank=rank)
    before, after = deltas(load_file(path)), deltas(load_file(tmp_path / "o.safetensors"))
    want = {name: best(matrix, rank) for name, matrix in before.items()}
    assert all(close(after[name], want[name]) for name in want)
    whole = sum(float(m.square().sum()) for m in before.values())
    held = sum(float(m.square().sum()) for m in want.values())
    assert result.energy_kept == pytest.approx(held / whole, rel=1e-5)
    assert {s.rank_out for s in result.sites} == {min(rank, s.rank_in) for s in result.sites}
    assert result.parameters_out < result.parameters_in


def test_what_is_not_changed_is_copied_number_by_number(tmp_path):
    path = kohya(tmp_path / "a.safetensors")
    regraft.convert(path, output=tmp_path / "o.safetensors")
    before, after = load_file(path), load_file(tmp_path / "o.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # rank 4 cuts two of the three
    result = regraft.convert(path, output=tmp_path / "p.safetensors", rank=4)
    after = load_file(tmp_path / "p.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith(CONV))
    assert [s.kept == 1 for s in result.sites] == [s.rank_in == 4 for s in result.sites]


def test_metadata_of_the_file_and_its_base_stay_and_those_of_its_bytes_do_not(tmp_path):
    regraft.convert(kohya(tmp_path / "a.safetensors"), output=tmp_path / "o.safetensors", rank=2)
    found = metadata(tmp_path / "o.safetensors")
    assert found["ss_sd_model_name"] == "sd15.safetensors"
    assert (found["ss_sd_model_hash"], found["ss_output_name"]) == ("abc", "ink")
    assert found["ss_network_dim"] == "2"
    assert found["sshs_model_hash"] != "of the input"


def loha_file(path):
    t = {f"{Q}.hada_w{i}_{x}": rand(*s, seed=i) for i in (1, 2) for x, s in ab(24, 20, 3).items()}
    return save(
        path, {**t, f"{Q}.alpha": torch.tensor(1.5)}, {"ss_network_module": "lycoris.kohya"}
    )


def ab(m, n, r):
    return {"a": (m, r), "b": (r, n)}


def test_a_loha_becomes_a_lora_without_the_base(tmp_path):
    path = loha_file(tmp_path / "a.safetensors")
    t = {k.rpartition(".")[2]: v.double() for k, v in load_file(path).items()}
    want = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * 0.5
    result = regraft.convert(path, output=tmp_path / "o.safetensors")
    assert close(deltas(load_file(tmp_path / "o.safetensors"))[Q], want)
    assert result.energy_kept == 1
    assert result.families["loha"]["rank_out"] == [9, 9]
    # no reader shall take the result for LyCORIS'
    assert "lycoris" not in metadata(tmp_path / "o.safetensors").get("ss_network_module", "")
    regraft.convert(path, output=tmp_path / "p.safetensors", rank="sv_fro=0.9,max=4")
    got = deltas(load_file(tmp_path / "p.safetensors"))[Q]
    assert close(got, best(want, torch.linalg.matrix_rank(got).item()))


def test_a_lokr_becomes_a_lora_without_the_base(tmp_path):
    t = {"lokr_w1": rand(4, 5), "lokr_w2": rand(6, 4)}
    path = save(tmp_path / "a.safetensors", {f"{Q}.{k}": v for k, v in t.items()})
    result = regraft.convert(path, output=tmp_path / "o.safetensors", rank="exact")
    got = deltas(load_file(tmp_path / "o.safetensors"))[Q]
    assert close(got, torch.kron(t["lokr_w1"].double(), t["lokr_w2"].double()))
    assert (result.energy_kept, result.sites[0].rank_out) == (1.0, 16)


def test_a_tucker_locon_becomes_a_lora_with_a_kernel(tmp_path):
    t = {"lora_down.weight": rand(3, 8, 1, 1), "lora_mid.weight": rand(3, 3, 3, 3)}
    t |= {"lora_up.weight": rand(16, 3, 1, 1), "alpha": torch.tensor(3.0)}
    path = save(tmp_path / "a.safetensors", {f"{CONV}.{k}": v for k, v in t.items()})
    regraft.convert(path, output=tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    assert found[f"{CONV}.lora_down.weight"].shape == (3, 8, 3, 3)
    down, mid, up = (t[f"lora_{x}.weight"].double() for x in ("down", "mid", "up"))
    want = torch.einsum("oj,jkxy,ki->oixy", up[..., 0, 0], mid, down[..., 0, 0])
    assert close(deltas(found)[CONV], want.flatten(1))


def test_the_99_per_cent_of_a_full_difference_is_said(tmp_path):
    change = rand(24, 20)
    path = save(tmp_path / "a.safetensors", {f"{Q}.diff": change})
    result = regraft.convert(path, output=tmp_path / "o.safetensors")
    assert 0.99 <= result.energy_kept < 1
    got = deltas(load_file(tmp_path / "o.safetensors"))[Q]
    share = 1 - float((got - change.double()).square().sum() / change.double().square().sum())
    assert result.energy_kept == pytest.approx(share, rel=1e-5)
    assert result.sites[0].rank_out < 20


def test_full_differences_when_asked_for(tmp_path):
    path = kohya(tmp_path / "a.safetensors")
    regraft.convert(path, output=tmp_path / "o.safetensors", form="diff")
    found = load_file(tmp_path / "o.safetensors")
    assert found[f"{CONV}.diff"].shape == (16, 8, 3, 3)
    want = deltas(load_file(path))
    assert found.keys() == {f"{name}.diff" for name in want}
    assert all(close(deltas(found)[name], want[name]) for name in want)


def peft_folder(folder, config, tensors):
    folder.mkdir()
    save(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


@pytest.mark.parametrize("turned", [False, True])
def test_rslora_becomes_plain_lora_in_a_peft_folder(tmp_path, turned):
    name = "base_model.model.transformer.h.0.attn.c_attn"
    tensors = {f"{name}.lora_A.weight": rand(4, 12), f"{name}.lora_B.weight": rand(30, 4)}
    config = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "fan_in_fan_out": turned,
        "base_model_name_or_path": "org/base",
        "target_modules": ["c_attn"],
        "task_type": "CAUSAL_LM",
    }
    folder = peft_folder(tmp_path / "a", config, tensors)
    result = regraft.convert(folder, output=tmp_path / "o")
    written = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert (written["use_rslora"], written["fan_in_fan_out"]) == (False, turned)
    assert written["base_model_name_or_path"] == "org/base"
    found = load_file(tmp_path / "o" / "adapter_model.safetensors")
    a, b = found[f"{name}.lora_A.weight"].double(), found[f"{name}.lora_B.weight"].double()
    scale = written["lora_alpha"] / written["r"]
    A, B = (tensors[f"{name}.lora_{x}.weight"].double() for x in "AB")
    assert close(scale * b @ a, 8 / 2 * B @ A)
    assert result.energy_kept == 1


def test_dora_needs_the_base_and_says_so(tmp_path):
    base = make_base(tmp_path / "base", 0)
    weight = base.read(next(s for s in base.weights if s.module == "layers.0.wide"))
    m, n = weight.shape
    A, B, g = rand(2, n), rand(m, 2), rand(m).abs() + 1
    name = "layers.0.wide"
    path = save(
        tmp_path / "dora.safetensors",
        {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B, f"{name}.dora_scale": g[:, None]},
    )
    with pytest.raises(errors.BadOption, match=r"DoRA .*--base"):
        regraft.convert(path, output=tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()
    result = regraft.convert(
        path,
        output=tmp_path / "o.safetensors",
        base=tmp_path / "base",
        rank="exact",
        library=new_library(tmp_path / "cache"),
    )
    v = weight.double() + B.double() @ A.double()
    want = g.double()[:, None] * v / v.norm(dim=1, keepdim=True) - weight.double()
    found = load_file(tmp_path / "o.safetensors")
    got = found[f"{name}.lora_B.weight"].double() @ found[f"{name}.lora_A.weight"].double()
    assert close(got, want)
    assert len(result.base["sha256_of_used_weights"]) == 64


def test_names_alone_do_not_use_the_base_weights(tmp_path):
    make_base(tmp_path / "base", 0)
    result = regraft.convert(
        write_lora(tmp_path / "a.safetensors"),
        output=tmp_path / "o",
        base=tmp_path / "base",
        dialect="peft",
    )
    assert result.base["sha256_of_used_weights"] is None
    assert len(result.sites) == len(SHAPES)


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "lora-x"])
def test_flat_names_are_not_guessed_apart(tmp_path, dialect):
    out = tmp_path / ("o" if dialect == "peft" else "o.safetensors")
    with pytest.raises(errors.BadOption, match="--base"):
        regraft.convert(kohya(tmp_path / "a.safetensors"), output=out, dialect=dialect)
    assert not out.exists()


def test_a_flattened_kernel_needs_the_base_and_a_known_one_does_not(tmp_path):
    t = {f"{CONV}.hada_w{i}_{x}": rand(*s) for i in (1, 2) for x, s in ab(16, 72, 2).items()}
    path = save(tmp_path / "a.safetensors", t)
    with pytest.raises(errors.BadOption, match="kernel"):
        regraft.convert(path, output=tmp_path / "o.safetensors")
    # around attention, the width of the text condition tells: 768 is Stable Diffusion 1.x
    near = "lora_unet_mid_block_attentions_0_proj_in"
    text = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, kernel in ((768, (1, 1)), (2048, ())):
        t = {f"{near}.hada_w{i}_{x}": rand(*s) for i in (1, 2) for x, s in ab(16, 16, 2).items()}
        path = save(tmp_path / "b.safetensors", t | lora(text, 8, width, 2, 1.0))
        regraft.convert(path, output=tmp_path / "o.safetensors", overwrite=True)
        found = load_file(tmp_path / "o.safetensors")
        assert found[f"{near}.lora_down.weight"].shape[2:] == kernel


def test_dotted_names_become_a_peft_folder_and_lora_x_and_come_back(tmp_path):
    names = ("unet.mid_block.attn1.to_q", "unet.mid_block.attn1.to_k")
    tensors = {}
    for i, name in enumerate(names):
        tensors[f"{name}.lora_A.weight"] = rand(3, 10, seed=i)
        tensors[f"{name}.lora_B.weight"] = rand(8, 3, seed=i)
    path = save(tmp_path / "a.safetensors", tensors)
    x, back = tmp_path / "x.safetensors", tmp_path / "b.safetensors"
    regraft.convert(path, output=x, dialect="lora-x")
    regraft.convert(x, output=back, dialect="diffusers")
    regraft.convert(path, output=tmp_path / "p", dialect="peft")
    peft = load_file(tmp_path / "p" / "adapter_model.safetensors")
    for name in names:
        want = tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
        for found, own in (
            (load_file(back), name),
            (peft, name.replace("unet.", "base_model.model.")),
        ):
            a, b = (found[f"{own}.lora_{y}.weight"].double() for y in "AB")
            assert close(b @ a, want)


def test_a_fused_layer_stays_fused(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    path = save(tmp_path / "a.safetensors", lora(name, 36, 12, 4, 2.0))
    regraft.convert(path, output=tmp_path / "o.safetensors", rank=2)
    found = deltas(load_file(tmp_path / "o.safetensors"))
    assert close(found[name], best(deltas(load_file(path))[name], 2))


def test_old_key_forms_keep_theirs(tmp_path):
    t = {"unet.a.to_q.lora.down.weight": rand(4, 10), "unet.a.to_q.lora.up.weight": rand(8, 4)}
    path = save(tmp_path / "a.safetensors", t)
    regraft.convert(path, output=tmp_path / "o.safetensors", rank=2)
    assert load_file(tmp_path / "o.safetensors").keys() == t.keys()


def test_unknown_keys_are_an_error_or_on_the_record(tmp_path):
    t = lora(Q, 8, 8, 2, 1.0) | {"what.is.this": rand(3)}
    path = save(tmp_path / "a.safetensors", t)
    with pytest.raises(errors.UnknownKeys, match=r"what\.is\.this"):
        regraft.convert(path, output=tmp_path / "o.safetensors")
    result = regraft.convert(path, output=tmp_path / "o.safetensors", allow_unknown=True)
    assert "what.is.this" in result.sites_refused
    story = json.loads(metadata(tmp_path / "o.safetensors")["regraft"])
    assert "what.is.this" in story["sites_refused"]
    assert story["parameters"]["allow_unknown"] is True


def test_the_same_work_gives_the_same_bytes_without_paths(tmp_path):
    shas, first = set(), kohya(tmp_path / "a.safetensors")
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        path = shutil.copy(first, tmp_path / place)
        out = tmp_path / place / f"out-{place}.safetensors"
        shas.add(regraft.convert(path, output=out, rank="sv_cumulative=0.8").sha256)
    assert len(shas) == 1
    story = metadata(out)["regraft"]
    assert str(tmp_path) not in story
    assert json.loads(story)["parameters"]["rank"] == "sv_cumulative=0.8"
    assert json.loads(story)["base"] is None


def test_one_whole_change_is_alive_at_a_time(tmp_path, monkeypatch):
    import gc

    from regraft import parallel

    monkeypatch.setattr(parallel, "WORKERS", 1)
    shape = (37, 41)
    t = {f"lora_unet_mid_{i}_to_q.hada_w{h}_{x}": rand(*s, seed=i)
         for i in range(12) for h in (1, 2) for x, s in ab(*shape, 8).items()}  # fmt: skip
    path = save(tmp_path / "a.safetensors", t)
    most = 0

    def count(stage, done, total):
        nonlocal most
        alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == shape]
        most = max(most, len(alive))

    regraft.convert(path, rank=4, dry_run=True, progress=count)
    assert most <= 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": "lots"}, errors.BadOption),
        ({"rank": 0}, errors.BadOption),
        ({"dialect": "latin"}, errors.BadOption),
        ({"form": "round"}, errors.BadOption),
        ({"dtype": "int3"}, errors.BadOption),
        ({"dialect": "peft"}, errors.BadOption),
        ({"base": "nowhere"}, errors.InputNotFound),
    ],
)
def test_bad_options_are_named(tmp_path, options, error):
    with pytest.raises(error):
        regraft.convert(
            kohya(tmp_path / "a.safetensors"), output=tmp_path / "o.safetensors", **options
        )
    assert not (tmp_path / "o.safetensors").exists()


def test_zeros_and_overflow_are_errors_and_write_nothing(tmp_path):
    t = {k: torch.zeros_like(v) for k, v in lora(Q, 8, 8, 2, 1.0).items()}
    out = tmp_path / "o.safetensors"
    with pytest.raises(errors.NothingCarried, match="zero"):
        regraft.convert(save(tmp_path / "a.safetensors", t), output=out)
    t = lora(Q, 8, 8, 2, 1.0)
    t[f"{Q}.lora_up.weight"] *= 1e10
    path = save(tmp_path / "a.safetensors", t)
    with pytest.raises(errors.OutputFailed, match="bf16"):
        regraft.convert(path, output=out, dtype="fp16")
    t[f"{Q}.lora_up.weight"] *= 1e20
    with pytest.raises(errors.NonFiniteTensor, match="beyond what fp32"):
        regraft.convert(save(path, t), output=out)
    assert not out.exists()


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_a_full_difference_of_any_size_is_cut_by_its_share(tmp_path, size):
    change = rand(400, 4) @ rand(4, 400) + 0.1 * rand(400, 400)
    path = save(tmp_path / "a.safetensors", {f"{Q}.diff": change * size})
    plain = save(tmp_path / "b.safetensors", {f"{Q}.diff": change})
    found, expected = (
        regraft.convert(p, output=tmp_path / "o.safetensors", rank=4, overwrite=True)
        for p in (path, plain)
    )
    assert found.energy_kept == pytest.approx(expected.energy_kept, rel=1e-4)


def test_an_existing_output_is_kept(tmp_path):
    path = kohya(tmp_path / "a.safetensors")
    with pytest.raises(errors.OutputExists):
        regraft.convert(path, output=path, rank=2)
    assert TEXT + ".alpha" in load_file(path)


def test_normalisations_and_biases_alone_are_kept(tmp_path):
    norm = "lora_te_text_model_encoder_layers_0_layer_norm1"
    t = {f"{norm}.w_norm": rand(6), f"{norm}.b_norm": rand(6), f"{Q}.diff_b": rand(8)}
    path = save(tmp_path / "a.safetensors", t | lora(CONV, 8, 8, 2, 1.0))
    regraft.convert(path, output=tmp_path / "o.safetensors", rank=1)
    found = load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(found[key], t[key]) for key in t)


def test_at_equal_counts_the_files_alpha_is_that_of_the_first_module_kept(tmp_path):
    names = [Q.replace("blocks_1", f"blocks_{i}", 1) for i in range(12)]
    tensors = {}
    for i, name in enumerate(names):
        tensors |= lora(name, 16, 16, 4, 12.5 - i)
    tensors |= lora(TEXT, 16, 16, 8, 20.0)
    path = save(tmp_path / "a.safetensors", tensors)
    found = regraft.convert(path, output=tmp_path / "o.safetensors", rank=4)
    first = next(name for name in open_source(path).modules if name in names)
    assert found.energy_kept < 1
    written = load_file(tmp_path / "o.safetensors")
    assert written[f"{TEXT}.alpha"] == tensors[f"{first}.alpha"]


def test_a_change_too_small_for_the_dtype_is_an_error_not_a_file(tmp_path):
    name = "unet.mid_block.attentions.0.proj_in"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    save(tmp_path / "a.safetensors", {key: value * 1e-9 for key, value in factors.items()})
    with pytest.raises(errors.OutputFailed, match="change nothing"):
        regraft.convert(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors", dtype="fp16")
    assert not (tmp_path / "b.safetensors").exists()
    regraft.convert(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors", dtype="bf16")
