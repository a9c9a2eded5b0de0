"""What every tuner promises, run by every form of every tuner, PEFT's own ones among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from regraft.errors import BadOption
from tests import factories
from tests.tuners.cases import CASES, LAYERS, ODD, Case, One, fill, given, llama, trained

#: On whole models: the forms that differ in more than their numbers.
FORMS = [name for name in CASES if name not in ("lora-x energy", "foura dct", "foura frozen")]
#: Of those, the ones that differ from another of their tuner in numbers and in what is stored.
ALIKE = ("lora-x full", "lora-x unstored", "foura", "foura soft", "pfeiffer", "parallel")
every = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in FORMS]
)
PAIRS = [(name, kind) for name, case in CASES.items() for kind in LAYERS if kind in case.takes]
OTHERS = [
    (name, kind)
    for name, case in CASES.items()
    for kind in LAYERS
    if kind not in case.takes and (case.ours or kind not in ODD)
]


def pairs(found: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "kind"), found, ids=[" on ".join(p) for p in found])


placed = pairs(PAIRS)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    largest = max(1.0, float(b.detach().abs().max()))
    return float((a - b).detach().abs().max()) <= tolerance * largest


def on_one(case: Case, kind: str, adapter: str = "default") -> nn.Module:
    more = {"fan_in_fan_out": True} if kind == "gpt2" and not case.ours else {}
    torch.manual_seed(3)
    return peft.get_peft_model(One(kind), case.make("layer", **more), adapter).eval()


def on_llama(case: Case, adapter: str = "default", **more: object) -> nn.Module:
    torch.manual_seed(3)
    return peft.get_peft_model(llama(), case.on_llama(**more), adapter).eval()


def tokens() -> Tensor:
    return torch.arange(2, 10)[None]


def noise() -> tuple[Tensor, int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        3,
        torch.randn(1, 5, 16, generator=generator),
    )


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of the wrapped layers, as it is now."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".base_layer." in name
    }


# -- on one layer of each kind ---------------------------------------------------------------------


@placed
def test_a_new_adapter_changes_nothing_and_trains_only_itself(name: str, kind: str) -> None:
    case, x = CASES[name], given(kind)
    plain, model = One(kind)(x), on_one(CASES[name], kind)
    assert close(model(x), plain, 0 if case.ours else 1e-5)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(".default" in n for n in names)
    fill(model)
    model(x).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == names
    assert all(float(g.abs().max()) > 0 for g in grads.values())


@placed
def test_forward_is_merge_and_unmerging_restores(name: str, kind: str) -> None:
    case, x = CASES[name], given(kind)
    model = on_one(case, kind)
    fill(model)
    out, plain = model(x).detach(), One(kind)(x)
    assert not close(out, plain, 1e-2)
    if case.new_is_base:
        with model.disable_adapter():
            assert torch.equal(model(x), plain)
    before = base_of(model)
    if not case.merges:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(BadOption):
                merge()
        assert torch.equal(model(x), out)
        assert all(torch.equal(w, before[n]) for n, w in base_of(model).items())
        return
    model.merge_adapter()
    assert close(model(x), out)
    if case.ours:
        with model.disable_adapter():
            assert torch.equal(model(x), plain)
        model.merge_adapter()
    model.unmerge_adapter()
    after = base_of(model)
    assert all(
        torch.equal(w, before[n]) if case.exact else close(w, before[n]) for n, w in after.items()
    )
    assert torch.equal(model(x), out) if case.exact else close(model(x), out)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert close(merged(x), out)


@pairs([(name, kind) for name, kind in PAIRS if CASES[name].slopes])
def test_gradients(name: str, kind: str) -> None:
    """By finite differences, in double precision."""
    case = CASES[name]
    model = on_one(case, kind)
    fill(model)
    layer = model.base_model.model.layer.double()
    chosen = {
        n: p
        for n, p in layer.named_parameters()
        if p.requires_grad and any(word in n for word in case.slopes)
    }
    x = given(kind, torch.float64)

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(chosen, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, tuple(chosen.values()), fast_mode=True)


@pairs(OTHERS)
def test_layers_it_cannot_change_are_refused(name: str, kind: str) -> None:
    """With a reason; PEFT's LoRA runs on grouped convolutions, but cannot be merged there."""
    case = CASES[name]
    if not case.ours and kind in ("grouped", "depthwise"):
        with pytest.raises((NotImplementedError, ValueError), match=r"groups|Unknown init"):
            on_one(case, kind).merge_adapter()
        return
    with pytest.raises(BadOption if case.ours else ValueError) as caught:
        on_one(case, kind)
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("kind", sorted(ODD))
def test_peft_runs_another_convolution_than_it_merges(kind: str) -> None:
    """Its LoRA leaves out the base's dilation and padding mode. If this fails, PEFT was mended."""
    model, x = on_one(CASES["lora"], kind), given(kind)
    fill(model)
    try:
        out = model(x)
    except RuntimeError:  # not even of the same size
        return
    model.merge_adapter()
    assert not close(model(x), out, 1e-2)


# -- in get_peft_model, on a language model --------------------------------------------------------


@every
def test_saved_loaded_saved_are_the_same_bytes(name: str, tmp_path) -> None:
    case = CASES[name]
    model = on_llama(case, modules_to_save=["lm_head"])
    fill(model)
    with torch.no_grad():
        model.base_model.model.lm_head.weight.add_(1)
    out = model(tokens()).logits
    kept = {"save_embedding_layers": False}
    model.save_pretrained(tmp_path / "a", **kept)
    ways = ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True})
    for more in ways if case.new_is_base else ways[::2]:  # PEFT cannot load PiSSA the cheap way
        base = llama()
        again = peft.PeftModel.from_pretrained(base, tmp_path / "a", **more).eval()
        assert close(again(tokens()).logits, out, 0 if case.new_is_base else 1e-5)
        if more.get("is_trainable"):
            continue  # its config says so
        again.save_pretrained(tmp_path / "b", **kept)
        names = ["adapter_model.safetensors", *(["adapter_config.json"] if case.ours else [])]
        for file in names:
            one, two = ((tmp_path / f / file).read_bytes() for f in "ab")
            assert one == two, file


@every
def test_several_adapters(name: str) -> None:
    case = CASES[name]
    model = on_llama(case, "one")
    fill(model, "one", seed=1)
    one = model(tokens()).logits
    if not case.new_is_base:  # PiSSA takes the base's weight apart: only one at a time
        return
    model.add_adapter("two", case.on_llama())
    fill(model, "two", seed=2)
    assert torch.equal(model(tokens()).logits, one)
    model.set_adapter("two")
    two = model(tokens()).logits
    assert not close(one, two, 1e-3)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(".two" in n for n in names)
    model.base_model.set_adapter(["one", "two"])
    both = model(tokens()).logits
    if case.merges:
        before = base_of(model)
        model.merge_adapter(["one"])
        model.merge_adapter(["two"])
        assert close(model(tokens()).logits, both) or name == "dora"  # DoRA's order matters
        model.unmerge_adapter()
        same = (close(w, before[n], 1e-6) for n, w in base_of(model).items())
        assert all(same) or name == "dora"
        if case.exact:
            assert all(torch.equal(w, before[n]) for n, w in base_of(model).items())
            assert torch.equal(model(tokens()).logits, both)
    model.base_model.set_adapter("one")
    model.delete_adapter("two")
    assert close(model(tokens()).logits, one)


# -- in diffusers ----------------------------------------------------------------------------------


def held(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """All that a file holds. safetensors writes two pieces of metadata in a random order."""
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k).contiguous().numpy().tobytes() for k in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


@every
@torch.no_grad()
def test_diffusers_own_calls(name: str, tmp_path) -> None:
    case, unet = CASES[name], factories.unet()
    plain = unet(*noise()).sample
    torch.manual_seed(3)
    unet.add_adapter(case.on_unet(), "style")
    fill(unet, "style")
    out = unet(*noise()).sample
    assert not close(out, plain, 1e-3)
    if case.new_is_base:
        unet.disable_adapters()
        assert torch.equal(unet(*noise()).sample, plain)
        unet.enable_adapters()
        unet.set_adapters("style", 0.0)
        assert close(unet(*noise()).sample, plain, 1e-6) or name == "dora"
    unet.set_adapters("style", 0.5)
    half = unet(*noise()).sample
    assert not close(half, out, 1e-3)
    unet.set_adapters("style", 1.0)
    assert close(unet(*noise()).sample, out, 1e-6)
    scaled = unet(*noise(), cross_attention_kwargs={"scale": 0.5}).sample
    assert close(scaled, half)
    assert close(unet(*noise()).sample, out, 1e-6)
    if case.merges:
        unet.fuse_lora(lora_scale=0.5, safe_fusing=True)
        assert close(unet(*noise()).sample, half)
        unet.unfuse_lora()
        unet.set_adapters("style", 1.0)
        unet.fuse_lora()
        assert close(unet(*noise()).sample, out)
        unet.unfuse_lora()
        assert close(unet(*noise()).sample, out, 0 if case.exact else 1e-5)
    else:
        with pytest.raises(BadOption):
            unet.fuse_lora()
    unet.save_lora_adapter(tmp_path / "a", "style")
    file = "pytorch_lora_weights.safetensors"
    if case.ours:
        from regraft.tuners import load_onto

        again = factories.unet()
        with pytest.raises(TypeError, match="LoraConfig"):  # diffusers itself loads LoRA only
            again.load_lora_adapter(tmp_path / "a", prefix=None, weight_name=file)
        assert torch.equal(again(*noise()).sample, plain)
        load_onto(again, tmp_path / "a", "loaded")
    else:
        again = factories.unet()
        again.load_lora_adapter(
            tmp_path / "a", prefix=None, adapter_name="loaded", weight_name=file
        )
    assert close(again(*noise()).sample, out, 0 if case.new_is_base else 1e-5)
    again.save_lora_adapter(tmp_path / "b", "loaded")
    if case.ours:
        assert held(tmp_path / "a" / file) == held(tmp_path / "b" / file)
    again.unload_lora()
    assert not any(isinstance(m, BaseTunerLayer) for m in again.modules())
    if case.new_is_base:
        assert torch.equal(again(*noise()).sample, plain)


# -- training --------------------------------------------------------------------------------------


def diffusion(case: Case) -> tuple[nn.Module, dict[str, object]]:
    unet = factories.unet()
    torch.manual_seed(3)
    unet.add_adapter(case.on_unet())
    sample, time, context = noise()
    return unet, {"sample": sample, "timestep": time, "encoder_hidden_states": context}


def language(case: Case) -> tuple[nn.Module, dict[str, object]]:
    return on_llama(case), {"input_ids": tokens(), "labels": tokens()}


SLOW = pytest.param(diffusion, id="diffusion", marks=pytest.mark.slow)
kinds = pytest.mark.parametrize("kind", [SLOW, pytest.param(language, id="language")])


def loss_of(model: nn.Module, batch: dict[str, object]) -> Tensor:
    out = model(**batch)
    return out.loss if "labels" in batch else (out.sample.float() - 1).square().mean()


@contextmanager
def accelerator(precision: str) -> Iterator[object]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(cpu=True, mixed_precision=precision)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@every
@kinds
@pytest.mark.parametrize("precision", [pytest.param("no", marks=pytest.mark.slow), "bf16"])
def test_the_loss_falls_under_accelerate(name: str, precision: str, kind) -> None:
    """With bf16 the base is bf16 too, as training scripts have it; what is trained is fp32."""
    case = CASES[name]
    model, batch = kind(case)
    fill(model, size=0.02)
    if precision == "bf16":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        batch = {
            k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in batch.items()
        }
    with accelerator(precision) as machine:
        before = [p.detach().clone() for p in trained(model)]
        optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
        model, optimiser = machine.prepare(model.train(), optimiser)
        losses = []
        for _ in range(3):
            with machine.autocast():
                loss = loss_of(model, batch)
            optimiser.zero_grad()
            machine.backward(loss)
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert not any(torch.equal(p, b) for p, b in zip(trained(model), before, strict=True))


@every
@kinds
def test_gradient_checkpointing_gives_the_same_gradients(name: str, kind) -> None:
    found = []
    for cheap in (False, True):
        model, batch = kind(CASES[name])
        fill(model)
        inner = model if kind is diffusion else model.base_model.model
        if cheap and kind is diffusion:
            inner.enable_gradient_checkpointing()
        elif cheap:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model.train(), batch).backward()
        found.append([p.grad for p in trained(model)])
    assert all(close(a, b, 1e-6) for a, b in zip(*found, strict=True))
    assert all(float(g.abs().max()) > 0 for g in found[0])
