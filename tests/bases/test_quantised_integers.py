"""Scaled fp8 and int8, GPTQ, AWQ, compressed-tensors: packed here from their definitions."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from regraft.adapters import Site
from regraft.bases import open_base
from regraft.bases.quantised.integers import unpack

OUT, IN = 48, 64
SITE = Site("", "layer")


def opened(folder, tensors, config=None):
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return open_base(folder)


def packed(values: list[int], bits: int) -> list[int]:
    """One number behind the other, the lowest bits first, in words of 32 bits (signed)."""
    stream = sum(value << (bits * place) for place, value in enumerate(values))
    words = -(-len(values) * bits // 32)
    raw = stream.to_bytes(4 * words, "little")
    return [int.from_bytes(raw[4 * i : 4 * i + 4], "little", signed=True) for i in range(words)]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    return torch.tensor([packed(row, bits) for row in codes.tolist()], dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_is_the_inverse_of_packing(bits):
    codes = torch.randint(0, 2**bits, (5, 64))
    assert unpack(pack_rows(codes, bits), bits, 64).equal(codes.to(torch.uint8))


def random_groups(bits: int, groups: int):
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT, IN))
    zeros = torch.randint(1, 2**bits, (groups, OUT))
    scales = (torch.rand(groups, OUT) + 0.1).half()
    return codes, zeros, scales


def numbers(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """W[o, i] = scale · (q − z), number by number."""
    whole = torch.empty(OUT, IN)
    for o in range(OUT):
        for i in range(IN):
            g = group[i]
            whole[o, i] = scales[g, o].float() * (codes[o, i] - zeros[g, o])
    return whole


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
def test_gptq(tmp_path, bits, version):
    groups = 4
    codes, zeros, scales = random_groups(bits, groups)
    # desc_act: inputs are in groups by importance, not by place.
    group = torch.arange(IN)[torch.randperm(IN)] % groups
    tensors = {
        "layer.qweight": pack_rows(codes, bits).T,  # along the inputs
        "layer.qzeros": pack_rows(zeros - int(version != "gptq_v2"), bits),
        "layer.scales": scales,
        "layer.g_idx": group.int(),
        "layer.bias": torch.zeros(OUT),
    }
    config = {"quant_method": "gptq", "bits": bits}
    base = opened(tmp_path, tensors, config | ({"checkpoint_format": version} if version else {}))
    assert base.quantised == {f"GPTQ {bits}-bit": 1}
    assert base.at(SITE).shape == (OUT, IN)
    torch.testing.assert_close(
        base.read(SITE), numbers(codes, zeros, scales, group), atol=1e-6, rtol=1e-6
    )
    assert set(base.others) == {Site("", "layer", "bias")}


def test_gptq_without_g_idx_has_its_groups_in_order(tmp_path):
    codes, zeros, scales = random_groups(4, 4)
    tensors = {
        "layer.qweight": pack_rows(codes, 4).T,
        "layer.qzeros": pack_rows(zeros - 1, 4),
        "layer.scales": scales,
    }
    base = opened(tmp_path, tensors)
    expected = numbers(codes, zeros, scales, torch.arange(IN) // 16)
    torch.testing.assert_close(base.read(SITE), expected, atol=1e-6, rtol=1e-6)


def test_the_same_bytes_by_another_rule_are_another_weight(tmp_path):
    """GPTQ's two versions differ in the config alone; the cache must not mix them up."""
    from regraft.subspaces import Cache, SubspaceLibrary

    codes, zeros, scales = random_groups(4, 4)
    tensors = {
        "layer.qweight": pack_rows(codes, 4).T,
        "layer.qzeros": pack_rows(zeros - 1, 4),
        "layer.scales": scales,
    }
    library = SubspaceLibrary(Cache(tmp_path / "cache"))
    hashes = set()
    for version in ("gptq", "gptq_v2"):
        (tmp_path / version).mkdir()
        base = opened(tmp_path / version, tensors, {"checkpoint_format": version})
        hashes.add(library.content_hash(base, SITE))
    assert len(hashes) == 2


def test_awq(tmp_path):
    codes, zeros, scales = random_groups(4, 4)

    def gemm(rows: Tensor) -> Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight outputs each nibble holds
        return pack_rows(rows.reshape(len(rows), -1, 8)[..., order].flatten(1), 4)

    tensors = {
        "layer.qweight": gemm(codes.T),
        "layer.qzeros": gemm(zeros),
        "layer.scales": scales,
    }
    base = opened(tmp_path, tensors, {"quant_method": "awq", "version": "gemm"})
    assert base.quantised == {"AWQ 4-bit": 1}
    expected = numbers(codes, zeros, scales, torch.arange(IN) // 16)
    torch.testing.assert_close(base.read(SITE), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
def test_compressed_tensors(tmp_path, bits, zero):
    codes, zeros, scales = random_groups(bits, 4)
    middle = 2 ** (bits - 1)
    tensors = {
        "layer.weight_packed": pack_rows(codes, bits),  # q + middle
        "layer.weight_scale": scales.T.bfloat16(),
        "layer.weight_shape": torch.tensor([OUT, IN]),
    }
    if zero:
        tensors["layer.weight_zero_point"] = pack_rows(zeros, bits).T  # along the outputs
    base = opened(tmp_path, tensors)
    assert base.quantised == {f"compressed-tensors int{bits}": 1}
    scales = scales.bfloat16()
    zeros = zeros if zero else torch.full_like(zeros, middle)
    expected = numbers(codes, zeros, scales, torch.arange(IN) // 16)
    torch.testing.assert_close(base.read(SITE), expected, atol=1e-6, rtol=1e-6)


def blocked(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp8 codes, a scale per block, and the numbers they stand for, block by block."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    whole = torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            whole[block] = codes[block].float() * scales[i, j]
    return codes, scales, whole


SCALED = {
    "ComfyUI": ("scale_weight", (200, 300), lambda s: s.reshape(()), None),
    "ComfyUI, newer": ("weight_scale", (200, 300), lambda s: s.reshape(()), None),
    "by row": ("weight_scale", (1, 300), lambda s: s, None),
    "by row, flat": ("scale_weight", (1, 300), lambda s: s.reshape(-1), None),
    "DeepSeek": ("weight_scale_inv", (128, 128), lambda s: s, None),
    "of its config": ("weight_scale_inv", (64, 32), lambda s: s, [64, 32]),
    "musubi's blocks": ("scale_weight", (1, 60), lambda s: s[..., None], None),
}


@pytest.mark.parametrize("case", SCALED)
def test_scaled_fp8(tmp_path, case):
    name, block, shaped, config = SCALED[case]
    torch.manual_seed(0)
    codes, scales, whole = blocked(torch.randn(200, 300), *block)
    tensors = {
        "layer.weight": codes,
        f"layer.{name}": shaped(scales),
        "layer.scale_input": torch.ones(1),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "norm.weight": torch.ones(200),
    }
    base = opened(tmp_path, tensors, {"weight_block_size": config} if config else None)
    assert base.quantised == {"scaled fp8": 1}
    assert base.at(SITE).dtype == torch.float8_e4m3fn
    assert base.read(SITE).equal(whole)
    assert set(base.others) == {Site("", "norm")}


def test_float8_without_a_scale_is_a_float(tmp_path):
    codes = torch.randn(8, 8).to(torch.float8_e4m3fn)
    base = opened(tmp_path, {"layer.weight": codes})
    assert base.quantised == {}
    assert base.read(SITE).equal(codes.float())


def test_int8_by_row(tmp_path):
    codes = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
    scale = torch.rand(8, 1).bfloat16()
    base = opened(tmp_path, {"layer.weight": codes, "layer.weight_scale": scale})
    assert base.quantised == {"scaled int8": 1}
    assert base.read(SITE).equal(codes.float() * scale.float())
