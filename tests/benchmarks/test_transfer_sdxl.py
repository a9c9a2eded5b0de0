"""The benchmark runs end to end at its small scale, and its own checks hold there."""

from __future__ import annotations

import pytest
from rich.console import Console

pytest.importorskip("diffusers")

from benchmarks.scales import SCALES
from benchmarks.transfer_sdxl import measure


@pytest.mark.slow
def test_the_small_scale_runs(tmp_path):
    found = measure(SCALES["small"], tmp_path, Console(quiet=True))
    assert found["warm_decompositions"] == 0
    assert all(found["same_bytes_every_time"].values())
    assert found["runs"]["lora-x, first"]["decompositions"] == found["inputs"]["sites"]
    for run in found["runs"].values():
        assert run["peak_mb"] < 2000
        assert run.get("sites_refused", 0) == 0
    for row in found["svd"]["shapes"]:
        assert min(row["same_subspace_left"], row["same_subspace_right"]) > 0.9999
