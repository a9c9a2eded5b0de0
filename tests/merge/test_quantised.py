"""``merge`` on a base quantised with zero points: reported as any other merge."""

from __future__ import annotations

import json

import pytest
import torch

import regraft
from regraft.errors import BadOption, QuantisedWeight
from tests.merge.models import write
from tests.merge.test_zeros import IN, OUT, SITE, grouped_base


def adapter(path, by_group: bool):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, IN // 16 if by_group else IN, generator=generator)
    a = a.repeat_interleave(16, dim=1) if by_group else a
    b = torch.randn(OUT, 2, generator=generator)
    return write(path, {"layer.lora_A.weight": a, "layer.lora_B.weight": b}), b @ a


def test_a_change_of_whole_groups(tmp_path):
    base = grouped_base(tmp_path / "base")
    file, change = adapter(tmp_path / "a.safetensors", True)
    result = regraft.merge(file, base=tmp_path / "base", output=tmp_path / "out", strength=0.5)
    merged = regraft.open_base(tmp_path / "out")
    torch.testing.assert_close(merged.read(SITE), base.read(SITE) + 0.5 * change)
    (site,) = result.sites
    assert site.dtype == "torchao int4"
    relative = float(0.5 * change.norm() / base.read(SITE).norm())
    assert site.relative_change == pytest.approx(relative, rel=1e-5)
    assert result.lost_to_rounding < 1e-5
    assert result.notes == []
    story = json.loads((tmp_path / "out" / "regraft.json").read_text())
    assert story["base"]["sha256_of_used_weights"] == result.base["sha256_of_used_weights"]
    with pytest.raises(BadOption, match="keeps its form"):
        regraft.merge(file, base=base, output=tmp_path / "x", dtype="bf16")


def test_a_change_within_groups_needs_lossy(tmp_path):
    grouped_base(tmp_path / "base")
    file, _ = adapter(tmp_path / "a.safetensors", False)
    options = {"base": tmp_path / "base", "output": tmp_path / "out"}
    with pytest.raises(QuantisedWeight, match="differs within groups"):
        regraft.merge(file, **options)
    assert not (tmp_path / "out").exists()
    result = regraft.merge(file, **options, lossy=True)
    assert 0.1 < result.lost_to_rounding < 1
    assert len(result.notes) == 1
