"""The cache: warm runs decompose nothing, changed files never meet old results."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from regraft.adapters import Site
from regraft.errors import OutputFailed
from regraft.subspaces import Cache, Dimension, SubspaceLibrary
from tests.methods.worlds import make_base, save_base

SITE = Site("", "layers.0.wide")


def library(folder: Path) -> SubspaceLibrary:
    return SubspaceLibrary(Cache(folder), device="cpu")


def test_a_warm_run_decomposes_nothing(tmp_path):
    base = make_base(tmp_path / "a", 0)
    cold = library(tmp_path / "cache")
    first = cold.subspace(base, SITE, Dimension(k=6))
    cold.cache.commit()
    warm = library(tmp_path / "cache")
    again = warm.subspace(base, SITE, Dimension(k=6))
    assert (cold.decompositions, warm.decompositions) == (1, 0)
    assert torch.equal(first.ut, again.ut)
    assert torch.equal(first.vt, again.vt)


def test_a_smaller_dimension_is_a_part_of_a_larger_one(tmp_path):
    base, lib = make_base(tmp_path / "a", 0), library(tmp_path / "cache")
    large = lib.subspace(base, SITE, Dimension(k=9))
    small = lib.subspace(base, SITE, Dimension(k=4))
    assert lib.decompositions == 1
    assert torch.equal(small.ut, large.ut[:4])
    lib.subspace(base, SITE, Dimension(k=12))
    assert lib.decompositions == 2


def test_asking_for_more_than_the_rank_is_remembered(tmp_path):
    base, lib = make_base(tmp_path / "a", 0), library(tmp_path / "cache")
    assert lib.subspace(base, SITE, Dimension(k=320)).k == 16
    assert lib.subspace(base, SITE, Dimension(k=500)).k == 16
    assert lib.decompositions == 1


def test_the_same_weight_in_another_file_is_the_same_weight(tmp_path):
    a, b = make_base(tmp_path / "a", 0), make_base(tmp_path / "b", 0)
    lib = library(tmp_path / "cache")
    lib.subspace(a, SITE, Dimension(k=5))
    lib.subspace(b, SITE, Dimension(k=5))
    assert lib.decompositions == 1


def test_a_changed_file_is_seen(tmp_path):
    base, lib = make_base(tmp_path / "a", 0), library(tmp_path / "cache")
    old = lib.content_hash(base, SITE)
    lib.cache.commit()
    changed = make_base(tmp_path / "a", 1)
    assert library(tmp_path / "cache").content_hash(changed, SITE) != old


def test_hashes_are_remembered_without_reading_the_file_again(tmp_path, monkeypatch):
    base = make_base(tmp_path / "a", 0)
    file = tmp_path / "a" / "model.safetensors"
    os.utime(file, (1, 1))  # settled long ago
    lib = library(tmp_path / "cache")
    sha = lib.content_hash(base, SITE)
    lib.cache.commit()
    warm = library(tmp_path / "cache")

    def unread(*_args):
        raise AssertionError("the file was read again")

    monkeypatch.setattr("regraft.files.TensorFile._read_into", unread)
    assert warm.content_hash(base, SITE) == sha


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_entry_counts_as_absent(tmp_path, damage):
    base, lib = make_base(tmp_path / "a", 0), library(tmp_path / "cache")
    good = lib.subspace(base, SITE, Dimension(k=5))
    (entry,) = (tmp_path / "cache" / "subspaces").rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-7] if damage is None else damage)
    again = lib.subspace(base, SITE, Dimension(k=5))
    assert lib.decompositions == 2
    assert torch.equal(good.ut, again.ut)


def test_a_cache_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed, match="REGRAFT_CACHE"):
        Cache(tmp_path / "file" / "cache")


def test_closeness_of_equal_opposite_and_zero_weights(tmp_path):
    w = torch.randn(6, 6)
    weights = {"x": w, "y": -w, "z": torch.zeros(6, 6), "q": 2 * w}
    base = save_base(tmp_path / "a", weights)
    lib = library(tmp_path / "cache")

    def close(a, b):
        return lib.closeness(base, Site("", a), base, Site("", b))

    assert (close("x", "x").cosine, close("x", "x").difference) == (1.0, 0.0)
    assert close("x", "y").cosine == pytest.approx(-1)
    assert close("x", "q").cosine == pytest.approx(1)
    assert close("x", "q").difference == pytest.approx(1)
    assert close("z", "x").cosine == 0.0
