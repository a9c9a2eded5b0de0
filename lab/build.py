"""The whole lab: ``python -m lab.build``. Every step that is not done, then the manifest."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lab import diffusion_plan, emoji, encoder, families_plan, language_plan
from lab.steps import ASSETS, RUNS, Shop, Step, run_steps

PLANS: dict[str, Callable[[], list[Step]]] = {
    "diffusion": lambda: [*diffusion_plan.plan(), *families_plan.plan("diffusion")],
    "language": lambda: [*language_plan.plan(), *families_plan.plan("language")],
}
COMMANDS = {
    "all": "python -m lab.build",
    "diffusion": "python -m lab.diffusion_plan",
    "language": "python -m lab.language_plan",
    "families": "python -m lab.families_plan KIND",
    "encoder": "python -m lab.encoder",
}


def write_manifest(assets: Path, runs: Path) -> dict[str, Any]:
    """Hashes, recipes, seeds and training curves of everything under ``assets``."""
    steps = {}
    for kind, plan in PLANS.items():
        shop = Shop(kind, assets, runs)
        records = {step.name: shop.facts(step) for step in plan() if shop.done(step)}
        steps[kind] = {name: record for name, record in records.items() if record}
    apart = references(assets)
    manifest: dict[str, Any] = {
        "commands": COMMANDS,
        "pictures": {
            look: {"package": f"@iconify-json/{look}", "version": version, "sha256": digest}
            for look, (version, digest) in emoji.PACKAGES.items()
        },
        "texts": hashes(Path(__file__).parent / "data", "*.txt.xz"),
        "training_pictures": hashes(Path(__file__).parent / "data", "*.safetensors.xz"),
        "torch": torch.__version__,
        "files": {n: f for n, f in hashes(assets, "*").items() if n not in apart},
        "steps": steps,
    }
    manifest["total_bytes"] = sum(entry["bytes"] for entry in manifest["files"].values())
    (assets / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def references(assets: Path) -> set[str]:
    """Files of retrained adapters: not part of the repository, see ``.gitignore``."""
    found = (path for path in assets.glob("*/adapters/*/**/*") if path.is_file())
    names = [path.relative_to(assets) for path in found]
    return {name.as_posix() for name in names if name.parts[2] != "v1"}


def hashes(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file, the manifest apart."""
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and path.name != "manifest.json"
    }


def unfinished(assets: Path, runs: Path) -> list[str]:
    """Steps that are not done."""
    todo: list[str] = []
    for kind, plan in PLANS.items():
        shop = Shop(kind, assets, runs)
        steps: Sequence[Step] = plan()
        todo += [f"{kind}: {step.name}" for step in steps if not shop.done(step)]
    return todo


def main() -> None:
    """Run what is left of every plan, then write the manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where outputs go")
    parser.add_argument("--runs", type=Path, default=RUNS, help="checkpoints and records")
    parser.add_argument("--threads", type=int, default=1, help="2 on idle cores")
    parser.add_argument("--until", type=float, metavar="MINUTES", help="per plan, start none after")
    parser.add_argument("--manifest", action="store_true", help="train nothing, write the manifest")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.manifest:
        for kind, plan in PLANS.items():
            run_steps(Shop(kind, arguments.assets, arguments.runs), plan(), minutes=arguments.until)
        encoder.main([])
    manifest = write_manifest(arguments.assets, arguments.runs)
    megabytes = manifest["total_bytes"] / 1e6
    print(f"{len(manifest['files'])} files, {megabytes:.1f} MB")
    for name in unfinished(arguments.assets, arguments.runs):
        print(f"not done: {name}")


if __name__ == "__main__":
    main()
