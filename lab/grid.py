"""Sample grids for looking at the pair: ``python -m lab.grid OUT.png [--base base-v1] …``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from regraft.demo.captions import DEFAULT_CAPTIONS, HELD_OUT_SUBJECTS, STYLE_SUBJECTS
from regraft.demo.pair import assets_dir, load_pipeline
from regraft.demo.sampler import attach, detach, sample

GROUPS = {
    "default": DEFAULT_CAPTIONS,
    "held-out": HELD_OUT_SUBJECTS,
    "all": (*STYLE_SUBJECTS, *HELD_OUT_SUBJECTS),
}
ROWS = (
    ("v1", "base-v1", None),
    ("v1 + style", "base-v1", "style-v1.safetensors"),
    ("v2", "base-v2", None),
    ("v2 + copied", "base-v2", "style-v1.safetensors"),
    ("v2 + retrained", "base-v2", "style-v2-retrained.safetensors"),
)


def sheet(
    rows: list[tuple[str, np.ndarray]], captions: list[str], scale: int, columns: int
) -> Image.Image:
    """Rows of uint8 ``[n, 32, 32, 3]`` images, wrapped at ``columns``, captions below."""
    side = 32 * scale + 4
    blocks = -(-len(captions) // columns)
    block_height = side * len(rows) + 14
    image = Image.new("RGB", (side * columns + 90, block_height * blocks), "white")
    draw = ImageDraw.Draw(image)
    for i, caption in enumerate(captions):
        x, y = 90 + (i % columns) * side, (i // columns) * block_height
        for k, (name, pictures) in enumerate(rows):
            tile = Image.fromarray(pictures[i])
            size = (32 * scale, 32 * scale)
            image.paste(tile.resize(size, Image.Resampling.LANCZOS), (x, y + k * side))
            if i % columns == 0:
                draw.text((2, y + k * side + side // 2), name, fill="black")
        draw.text((x, y + side * len(rows)), caption[: 5 * scale], fill="black")
    return image


def main() -> None:
    """Draw the rows that the assets allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--assets", type=Path, default=assets_dir())
    parser.add_argument("--captions", choices=GROUPS, default="default")
    parser.add_argument("--rows", nargs="*", default=[row[0] for row in ROWS])
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=3)
    parser.add_argument("--columns", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    captions = list(GROUPS[arguments.captions])
    seeds = [arguments.seed + i for i in range(len(captions))]
    drawn = []
    for name, base, lora in ROWS:
        if name not in arguments.rows or not (arguments.assets / base).exists():
            continue
        pipeline = detach(load_pipeline(arguments.assets / base))
        if lora:
            attach(pipeline, arguments.assets / lora)
        pictures = sample(
            pipeline, captions, seeds, steps=arguments.steps, guidance=arguments.guidance
        )
        drawn.append((name, pictures))
    columns = min(arguments.columns, len(captions))
    sheet(drawn, captions, arguments.scale, columns).save(arguments.out)


if __name__ == "__main__":
    main()
