"""Writers: what was written is read back, the same bytes every time; metadata and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from regraft.adapters import Adapter, Dense, LowRank, Site, delta
from regraft.adapters.update import matrix_shape
from regraft.dialects import DIALECTS, holdable, load_adapter
from regraft.dialects.metadata import model_card
from regraft.dialects.writers import get_writer, writers
from regraft.dialects.writers.factors import folded, joined, with_alpha
from regraft.errors import BadOption
from tests.dialects.adapters import assert_close, changed, every_kind, layout_of, only
from tests.dialects.loaders import PROVENANCE, UNET, random_adapter, sites_of, write
from tests.factories import UNET_3X3, UNET_LINEAR

FORMS = [(w.name, form) for w in writers() for form in w.forms]


def path_for(dialect, folder):
    return folder / (dialect if get_writer(dialect).folder else f"{dialect}.safetensors")


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize(("dialect", "form"), FORMS)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_what_is_written_is_read_back(dialect, form, sd, tmp_path_factory, data):
    sites = [s for s in sd.weights if s.component == "unet"]
    chosen = data.draw(st.lists(st.sampled_from(sites), min_size=1, max_size=6, unique=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    updates = {}
    for site in chosen:
        shape = sd.at(site).shape
        (m, n), rank = matrix_shape(shape), data.draw(st.integers(1, 5))
        scale = data.draw(st.sampled_from([1.0, 0.5, 1 / 3, 2.0, -1.0, 7 / 49]))
        up, down = (torch.randn(*s, generator=generator) for s in ((m, rank), (rank, n)))
        updates[site] = LowRank(up, down, scale, shape, layout_of(shape))
    adapter = Adapter(updates, name="a", dialect="diffusers")
    out = path_for(dialect, tmp_path_factory.mktemp("out"))
    assert not write(adapter, sd, out, dialect, form=form).refused
    again = load_adapter(out, sd)
    assert set(again.updates) == set(updates)
    assert_close(changed(sd, again, "unet"), changed(sd, adapter, "unet"))
    if form == "lora" and dialect != "lora-x":
        assert {s: u.rank for s, u in again.updates.items()} == {
            s: u.rank for s, u in updates.items()
        }


@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.sampled_from([1.0, 0.5, 3.0])),
             min_size=1, max_size=4),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_joining_parts_is_exact(parts, seed):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(4, 6, generator=generator)
    made, wanted, start = [], [], 0
    for rank, same, scale in parts:
        down = shared[:rank] if same else torch.randn(rank, 6, generator=generator)
        update = LowRank(torch.randn(5, rank, generator=generator), down, scale, (5, 6))
        made.append((update, ((start + 2, start + 5), (start, start + 2))))
        change = delta(update)
        wanted += [change[3:], change[:3]]
        start += 5
    whole = joined(made, (start + 1, 6))  # a last row that is no part's
    assert torch.allclose(delta(whole), torch.cat([*wanted, torch.zeros(1, 6)]), atol=1e-5)
    once = max((rank for rank, same, _ in parts if same), default=0)
    assert whole.rank == once + sum(rank for rank, same, _ in parts if not same)


@pytest.mark.parametrize(("dialect", "form"), FORMS)
def test_every_kind_of_update_twice_gives_the_same_bytes(dialect, form, sd, tmp_path):
    adapter = every_kind(sd, share=0.15)
    components = {"unet"} if dialect == "peft" else {"unet", "text_encoder"}
    adapter = only(adapter, {s for s in adapter.updates if s.component in components})
    contents = set()
    for name in ("a", "b"):
        out = path_for(dialect, tmp_path / name)
        write(adapter, sd, out, dialect, form=form)
        files = sorted(out.iterdir()) if out.is_dir() else [out]
        contents.add(tuple((f.name, f.read_bytes()) for f in files))
    assert len(contents) == 1


@pytest.mark.parametrize(("dialect", "form"), FORMS)
def test_each_change_is_made_once(dialect, form, sd, tmp_path):
    made = []
    updates = {}
    for site in [s for s in sd.weights if s.component == "unet"][:5]:
        change = torch.randn(sd.at(site).shape)
        updates[site] = Dense(lambda s=site, c=change: made.append(s) or c, sd.at(site).shape)
    write(Adapter(updates, name="a"), sd, path_for(dialect, tmp_path), dialect, form=form)
    assert sorted(made) == sorted(updates)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "lora-x"])
def test_whole_changes_need_a_dialect_that_holds_them(dialect, sd, tmp_path):
    adapter = random_adapter(sd, {f"unet.{UNET_LINEAR}": 2})
    with pytest.raises(BadOption, match="'diff'") as caught:
        write(adapter, sd, tmp_path / "a", dialect, form="diff")
    assert "comfyui or kohya" in caught.value.fix
    with pytest.raises(BadOption):
        holdable(adapter, sd, dialect, "diff")
    assert list(tmp_path.iterdir()) == []


def test_nothing_left_is_an_error_with_the_reason(sd, tmp_path):
    norm = next(s for s in sd.others if s.component == "unet" and s.parameter == "weight")
    change = torch.ones(sd.at(norm).shape)
    adapter = Adapter({norm: Dense(lambda: change, tuple(change.shape))}, name="a")
    with pytest.raises(BadOption, match="normalisations") as caught:
        write(adapter, sd, tmp_path / "a.safetensors", "diffusers")
    assert "--dialect kohya" in caught.value.fix
    with pytest.raises(BadOption, match="changes nothing"):
        write(Adapter({}), sd, tmp_path / "a.safetensors", "kohya")


def test_refusals_are_known_before_any_number_is_made(sd):
    def never():
        raise AssertionError("a weight was read")

    adapter = Adapter({s: Dense(never, sd.at(s).shape) for s in (*sd.weights, *sd.others)})
    for dialect in set(DIALECTS) - {"peft"}:
        holdable(adapter, sd, dialect)
    biases = {str(s) for s in adapter.updates if s.parameter == "bias"}
    assert set(holdable(adapter, sd, "lora-x")) == biases


def test_a_norm_in_kohya_has_the_names_that_lycoris_gave_it(sd, tmp_path):
    norms = [s for s in sd.others if s.component == "unet" and s.parameter == "weight"]
    whole, weight, bias = norms[0], norms[1], norms[2].with_parameter("bias")
    sites = (whole, whole.with_parameter("bias"), weight, bias)
    change = {s: torch.randn(sd.at(s).shape) for s in sites}
    updates = {s: Dense(lambda s=s: change[s], tuple(change[s].shape)) for s in sites}
    write(Adapter(updates, name="a"), sd, tmp_path / "a.safetensors", "kohya")
    ends = sorted(k.rpartition(".")[2] for k in load_file(tmp_path / "a.safetensors"))
    assert ends == ["b_norm", "diff_b", "w_norm", "w_norm"]
    again = load_adapter(tmp_path / "a.safetensors", sd)
    assert set(again.updates) == set(sites)


# ---------------------------------------------------------------- metadata


def kept(adapter, base, tmp_path, dialect="kohya", form="lora", **metadata):
    adapter.metadata = {"ss_network_module": "lycoris.kohya", **metadata}
    write(adapter, base, tmp_path / "a.safetensors", dialect, form=form)
    return metadata_of(tmp_path / "a.safetensors")


def test_the_network_module_is_what_reads_the_output(sd, tmp_path):
    args = json.dumps({"algo": "lokr", "factor": "8", "conv_dim": "99", "dropout": "0.1",
                       "preset": "full", "loraplus_lr_ratio": "4"})  # fmt: skip
    adapter = random_adapter(sd, {f"unet.{UNET_LINEAR}": 4})
    meta = kept(adapter, sd, tmp_path, ss_network_args=args, ss_tag_frequency='{"a": 1}')
    assert meta["ss_network_module"] == "networks.lora"
    assert json.loads(meta["ss_network_args"]) == {"dropout": "0.1", "loraplus_lr_ratio": "4"}
    assert (meta["ss_network_dim"], meta["ss_network_alpha"]) == ("4", "3.0")
    assert meta["ss_tag_frequency"] == '{"a": 1}'


def test_convolutions_and_differing_ranks(sd, tmp_path):
    conv = random_adapter(sd, {f"unet.{UNET_LINEAR}": 4, f"unet.{UNET_3X3}": 4})
    meta = kept(conv, sd, tmp_path / "a", ss_network_args="not json")
    assert json.loads(meta["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "3.0"}
    mixed = random_adapter(sd, {f"unet.{UNET_LINEAR}": 4, f"unet.{UNET_3X3}": 2})
    meta = kept(mixed, sd, tmp_path / "b", ss_network_args='{"algo": "loha"}')
    assert meta["ss_network_dim"] == meta["ss_network_alpha"] == "Dynamic"
    assert "ss_network_args" not in meta


def test_whole_changes_are_what_lycoris_reads(sd, tmp_path):
    adapter = random_adapter(sd, {f"unet.{UNET_LINEAR}": 4})
    meta = kept(adapter, sd, tmp_path, form="diff", ss_network_dim="4", ss_network_alpha="2")
    assert meta["ss_network_module"] == "lycoris.kohya"
    assert json.loads(meta["ss_network_args"]) == {"algo": "full"}
    assert not {"ss_network_dim", "ss_network_alpha"} & set(meta)


def test_a_scale_in_the_factors_has_the_rank_for_its_alpha(sd, tmp_path):
    adapter = random_adapter(sd, sites_of(sd, UNET))
    meta = kept(adapter, sd, tmp_path, "diffusers", ss_network_alpha="99")
    assert (meta["ss_network_dim"], meta["ss_network_alpha"]) == ("3", "3.0")


def test_the_card_of_a_conversion(llama_base):
    site = Site("", "model.layers.0.self_attn.q_proj")
    adapter = Adapter(
        {site: LowRank(torch.ones(16, 2), torch.ones(2, 16), 1.0, (16, 16))}, name="x"
    )
    convert = {"adapter": {"sha256": "ab" * 32}, "base": {"name": "org/b"}, "parameters": {},
               "versions": {"regraft": "0.1.0"}, "method": "convert"}  # fmt: skip
    card = model_card(adapter, llama_base, convert)
    assert "as plain LoRA" in card
    assert "ab" * 32 in card
    assert "Energy" not in card
    assert "Carried" not in card
    assert "Carried from `org/source`" in model_card(adapter, llama_base, PROVENANCE)


def test_a_transformer_of_unknown_names_is_not_for_comfyui(tmp_path):
    from safetensors.torch import save_file

    from regraft.bases import open_base

    save_file({"odd.layer.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model.safetensors").rename(
        tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    )
    base = open_base(tmp_path)
    adapter = random_adapter(base, {"transformer.odd.layer": 2})
    with pytest.raises(BadOption, match="not known"):
        write(adapter, base, tmp_path / "a.safetensors", "comfyui")
    assert not write(adapter, base, tmp_path / "a.safetensors", "kohya").refused


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_small_scale_in_fp16_costs_no_digits(size, sign):
    g = torch.Generator().manual_seed(0)
    a = (0.04 * (2 * torch.rand(32, 64, generator=g) - 1)).half()
    b = (size * torch.randn(64, 32, generator=g)).half()
    update = LowRank(b, a, sign / 128, (64, 64))
    exact = b.double() @ a.double() * sign / 128
    kept_a, kept_b = folded(update, torch.float16)
    with_a, with_b = with_alpha(update, 16.0, torch.float16)
    for found in (kept_b.double() @ kept_a.double(), with_b.double() @ with_a.double() * 0.5):
        assert (found - exact).norm() < 2e-3 * exact.norm()
    if size > 1e-4:
        assert (kept_b.double() @ kept_a.double() - exact).norm() < 2e-4 * exact.norm()
