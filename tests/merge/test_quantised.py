"""``merge`` on a base quantised with zero points: reported as any other merge."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import regraft
from regraft.adapters import Site
from regraft.errors import BadOption, OutputFailed, QuantisedWeight
from regraft.merge import zeros
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


def test_what_is_lost_is_told_of_each_site(tmp_path):
    base = grouped_base(tmp_path / "base", names=("layer", "other"))
    file, even = adapter(tmp_path / "a.safetensors", True)
    tensors, own = load_file(file), torch.zeros(OUT, IN)
    own[0, 0] = 4.0  # alone in its group of 16
    tensors |= {"other.lora_A.weight": torch.eye(1, IN), "other.lora_B.weight": own[:, :1]}
    write(file, tensors)
    out = tmp_path / "out"
    result = regraft.merge(file, base=base, output=out, lossy=True)
    sites = {s.site: s for s in result.sites}
    assert sites["layer"].lost_to_rounding < 1e-5
    assert sites["other"].lost_to_rounding == pytest.approx((15 / 16) ** 0.5, rel=1e-4)
    energy = float(even.square().sum())
    assert result.lost_to_rounding == pytest.approx((15 / (energy + 16)) ** 0.5, rel=1e-4)
    merged = regraft.open_base(out)
    for name in ("layer", "other"):
        assert sites[name].moved == (
            not merged.read(Site("", name)).equal(base.read(Site("", name)))
        )
    stored = [load_file(f / "model.safetensors") for f in (tmp_path / "base", out)]
    moved = {k for k in stored[0] if not stored[0][k].equal(stored[1][k])}
    assert len(moved) == 2
    assert all("zero" in k for k in moved)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch, error):
    grouped_base(tmp_path / "base")
    file, _ = adapter(tmp_path / "a.safetensors", True)
    before = set(tmp_path.rglob("*"))
    real = zeros.finish

    def failing(*args):
        real(*args)
        raise error

    monkeypatch.setattr(zeros, "finish", failing)
    with pytest.raises(OutputFailed if isinstance(error, OSError) else KeyboardInterrupt):
        regraft.merge(file, base=tmp_path / "base", output=tmp_path / "out")
    assert set(tmp_path.rglob("*")) == before


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
