"""The manifest of the embedded pair: hashes, recipes and what was measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from lab import emoji
from regraft.demo.pair import load_heldout, load_pipeline
from regraft.demo.sampler import attach, denoising_loss, detach


def weight_change(source: Path, target: Path) -> dict[str, float]:
    """How far the U-Net weights moved: overall and per-weight relative difference and cosine."""
    old = load_pipeline(source).unet.state_dict()
    new = load_pipeline(target).unet.state_dict()
    relative, cosine = [], []
    for name, before in old.items():
        if before.ndim < 2:
            continue
        after = new[name]
        relative.append(float((after - before).norm() / before.norm()))
        cosine.append(float(torch.cosine_similarity(after.flatten(), before.flatten(), dim=0)))
    moved = sum(float((new[n] - old[n]).pow(2).sum()) for n in old)
    size = sum(float(old[n].pow(2).sum()) for n in old)
    return {
        "relative_difference": round((moved / size) ** 0.5, 4),
        "relative_difference_per_weight_median": round(float(torch.tensor(relative).median()), 4),
        "relative_difference_per_weight_max": round(max(relative), 4),
        "cosine_per_weight_median": round(float(torch.tensor(cosine).median()), 4),
        "cosine_per_weight_min": round(min(cosine), 4),
    }


def style_losses(assets: Path) -> dict[str, float]:
    """Held-out denoising loss of the style on both bases, bare and with each adapter.

    ``recovery_of_copying`` is (base - copy) / (base - retrained), all on v2: 1 is as good as
    retraining, 0 is no adapter at all.
    """
    images, captions = load_heldout(assets / "heldout.safetensors")
    rows = (
        ("v1", "base-v1", None),
        ("v1_with_style", "base-v1", "style-v1.safetensors"),
        ("v2", "base-v2", None),
        ("v2_with_copied_style", "base-v2", "style-v1.safetensors"),
        ("v2_with_retrained_style", "base-v2", "style-v2-retrained.safetensors"),
    )
    losses: dict[str, float] = {}
    for name, base, lora in rows:
        pipeline = detach(load_pipeline(assets / base))
        if lora:
            attach(pipeline, assets / lora)
        losses[name] = round(denoising_loss(pipeline, images, captions), 5)
    gain = losses["v2"] - losses["v2_with_copied_style"]
    best = losses["v2"] - losses["v2_with_retrained_style"]
    return {**losses, "recovery_of_copying": round(gain / best, 4)}


def write_manifest(assets: Path, runs: Path, plan: dict[str, dict[str, Any]]) -> None:
    """Measure the finished pair and write ``manifest.json`` beside it."""
    steps = {}
    for step in ("warm-up", "base-v1", "base-v2", "style-v1", "style-v2", "heldout"):
        record = runs / f"{step}.json"
        if record.exists():
            steps[step] = json.loads(record.read_text())
    files: dict[str, dict[str, Any]] = {
        path.relative_to(assets).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(assets.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", ".gitkeep")
    }
    manifest: dict[str, Any] = {
        "command": "python -m lab.train_pair",
        "data": {
            look: {"package": f"@iconify-json/{look}", "version": version, "sha256": digest}
            for look, (version, digest) in emoji.PACKAGES.items()
        },
        "plan": plan,
        "steps": steps,
        "change_v1_to_v2": weight_change(assets / "base-v1", assets / "base-v2"),
        "heldout_style_loss": style_losses(assets),
        "torch": torch.__version__,
        "total_bytes": sum(entry["bytes"] for entry in files.values()),
        "files": files,
    }
    (assets / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(json.dumps({k: manifest[k] for k in ("change_v1_to_v2", "heldout_style_loss")}, indent=1))
