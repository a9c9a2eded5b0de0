"""One piece of work in a process of its own, so that its peak memory is its own.

``python -m benchmarks.tasks NAME`` reads its arguments as JSON from standard input and prints one
line of JSON. :mod:`benchmarks.transfer_sdxl` starts these; nobody else has to.
"""

from __future__ import annotations

import gc
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.scales import SCALES
from regraft.adapters import Site
from regraft.adapters.update import matrix_shape
from regraft.bases import open_base
from regraft.files import TensorFile, atomic_file, data_sha256, serialize
from regraft.subspaces import Dimension, decompose
from regraft.transfer import transfer
from regraft.versions import versions

Answer = dict[str, Any]


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes).

    ``VmHWM`` where the system has it: ``ru_maxrss`` can start at what the parent held.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def make(scale: str, folder: str) -> Answer:
    """Write two bases and two adapters, unless the folder has them already."""
    from benchmarks import synthetic

    root, size = Path(folder), SCALES[scale]
    mark = root / "made.json"
    if mark.is_file():
        known: Answer = json.loads(mark.read_text(encoding="utf-8"))
        if (known.get("scale"), known.get("version")) == (scale, synthetic.VERSION):
            return {**known, "made": False}
    mark.unlink(missing_ok=True)
    shapes, config = synthetic.unet_shapes(size)
    started = time.perf_counter()
    synthetic.write_bases(shapes, config, root / "base-a", root / "base-b")
    bases = time.perf_counter() - started
    for seed, name in enumerate(("adapter-1", "adapter-2")):
        sites = synthetic.write_adapter(size, shapes, root / f"{name}.safetensors", seed=seed)
    table = synthetic.adapted(shapes).values()
    facts = {
        "scale": scale,
        "version": synthetic.VERSION,
        "parameters": sum(torch.Size(s).numel() for s in shapes.values()),
        "tensors": len(shapes),
        "base_bytes": (root / "base-a" / "unet" / synthetic.WEIGHTS).stat().st_size,
        "adapter_bytes": (root / "adapter-1.safetensors").stat().st_size,
        "sites": sites,
        "site_bytes": 2 * sum(m * n for m, n in table),
        "subspace_bytes": 4 * sum(min(size.dimension, m, n) * (m + n) for m, n in table),
        "seconds_to_write_both_bases": bases,
    }
    mark.write_text(json.dumps(facts), encoding="utf-8")
    time.sleep(2.5)  # hashes of files changed within two seconds are not remembered
    return {**facts, "made": True}


def floor(adapter: str, output: str) -> Answer:
    """Read the adapter and write its bytes as an output: what no transfer can do without.

    ``seconds`` counts one hash, of the file written. ``seconds_three_hashes`` adds the two others
    that an output states: the input file's, and that of the data part (``sshs_model_hash``).
    """
    started = time.perf_counter()
    file = TensorFile(adapter)
    tensors = {name: file.read(name) for name in file}
    read = time.perf_counter() - started
    with atomic_file(Path(output), overwrite=True) as temporary:
        serialize(temporary, tensors, file.metadata)
    seconds = time.perf_counter() - started
    digest = hashlib.sha256()
    with open(adapter, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    data_sha256(tensors)
    return {
        "seconds": seconds,
        "seconds_reading": read,
        "seconds_three_hashes": time.perf_counter() - started,
    }


def carry(
    adapter: str, source: str, target: str, output: str, method: str, dimension: int
) -> Answer:
    """One transfer, from opening the files to the renamed output."""
    started = time.perf_counter()
    result = transfer(
        adapter,
        source=source,
        target=target,
        output=output,
        method=method,
        dimension=dimension,
        device="cpu",
        overwrite=True,
    )
    return {
        "seconds": time.perf_counter() - started,
        "decompositions": result.decompositions,
        "sites_carried": len(result.sites),
        "sites_refused": len(result.sites_refused),
        "energy_kept": result.energy_kept,
        "output_sha256": result.sha256,
        "output_bytes": Path(output).stat().st_size,
    }


def svd(adapter: str, source: str, target: str, dimension: int, sample: int) -> Answer:
    """Full SVD against :func:`regraft.subspaces.decompose`, interleaved, per distinct shape.

    One thread each, as transfers decompose: whole sites in parallel, one thread per site.
    """
    from regraft.dialects import load_adapter

    torch.set_num_threads(1)

    base = open_base(target)
    by_shape: dict[tuple[int, int], list[Site]] = {}
    for site in load_adapter(adapter, open_base(source)).updates:
        by_shape.setdefault(matrix_shape(base.weights[site].shape), []).append(site)
    warming = torch.randn(256, 512)
    decompose(warming, Dimension(k=32))
    torch.linalg.svd(warming, full_matrices=False)
    started = time.perf_counter()
    rows = []
    for (m, n), sites in sorted(by_shape.items()):
        step = max(1, len(sites) // sample)
        pairs = [_against_svd(base.matrix(s), dimension) for s in sites[::step][:sample]]
        ours = sum(p["decompose"] for p in pairs) / len(pairs)
        theirs = sum(p["svd"] for p in pairs) / len(pairs)
        # torch.linalg.svd as the field's tools call it: complete bases, which nobody then uses.
        default = _seconds_default_svd(base.matrix(sites[0]))
        rows.append(
            {
                "shape": [m, n],
                "sites": len(sites),
                "sampled": len(pairs),
                "seconds_decompose": ours,
                "seconds_svd": theirs,
                "seconds_svd_default": default,
                "ratio": theirs / ours,
                "ratio_default": default / pairs[0]["decompose"],
                "same_subspace_left": min(p["left"] for p in pairs),
                "same_subspace_right": min(p["right"] for p in pairs),
                "engines": sorted({p["engine"] for p in pairs}),
            }
        )
    return {"seconds": time.perf_counter() - started, "shapes": rows}


def _seconds_default_svd(matrix: torch.Tensor) -> float:
    gc.collect()
    started = time.perf_counter()
    torch.linalg.svd(matrix)
    return time.perf_counter() - started


def _against_svd(matrix: torch.Tensor, dimension: int) -> Answer:
    started = time.perf_counter()
    found = decompose(matrix, Dimension(k=dimension))
    ours = time.perf_counter() - started
    gc.collect()
    started = time.perf_counter()
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    theirs = time.perf_counter() - started

    def mean_cos2(rows: torch.Tensor, exact: torch.Tensor) -> float:
        ours, svds = (torch.linalg.qr(x.double())[0] for x in (rows.mT, exact))
        return float((ours.mT @ svds).square().sum()) / found.k

    return {
        "decompose": ours,
        "svd": theirs,
        "left": mean_cos2(found.ut, u[:, : found.k]),
        "right": mean_cos2(found.vt, vh[: found.k].mT),
        "engine": found.engine,
    }


def about() -> Answer:
    """Versions and threads."""
    return {"versions": versions(), "threads": torch.get_num_threads()}


TASKS: dict[str, Callable[..., Answer]] = {
    "make": make,
    "floor": floor,
    "carry": carry,
    "svd": svd,
    "about": about,
}


def main() -> None:
    before = peak_mb()
    answer = TASKS[sys.argv[1]](**json.load(sys.stdin))
    print(json.dumps({**answer, "peak_mb": peak_mb(), "peak_mb_after_imports": before}))


if __name__ == "__main__":
    main()
