"""The lab's images: emoji of several vendors, rendered with their names as captions.

Every vendor draws the same subjects, so a *style* is one vendor's look and a *subject* is one name.
The SVG bodies come from the permissively licensed ``@iconify-json`` packages (``noto`` and
``noto-v1``: Apache-2.0; ``fluent-emoji-*``: MIT), fetched at pinned versions and checked by hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from regraft.demo.captions import EXTRA_SUBJECTS, HELD_OUT_SUBJECTS, STYLE_SUBJECTS

CACHE = Path(__file__).parent / ".cache"

#: look -> (pinned version, SHA-256 of the package tarball)
PACKAGES: dict[str, tuple[str, str]] = {
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "fluent-emoji": ("1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "fluent-emoji-high-contrast": (
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
}

#: The bases and the style are one vendor's three renditions of the same drawings, so a style
#: adapter has a rule to learn (fill to line) and not new drawings by heart.
WARM_UP_LOOK = "noto"
BASE_LOOK = "fluent-emoji-flat"
SUCCESSOR_LOOK = "fluent-emoji"
STYLE_LOOK = "fluent-emoji-high-contrast"

#: Looks made from the base look by a rule, so that a style can be learnt from few drawings and
#: tried on others.
OUTLINED = "outlined"  # every shape of the drawing with a thick dark stroke
DUOTONE = "duotone"  # brightness mapped from one ink to one paper
DERIVED_LOOKS = (OUTLINED, DUOTONE)
LOOKS = (*PACKAGES, *DERIVED_LOOKS)

STROKE = 'stroke="#101018" stroke-width="1.6" stroke-linejoin="round"'
INK, PAPER = (28, 20, 92), (255, 196, 120)

SIZE = 32  # pixels per side of a training image
SUPERSAMPLE = 4  # render larger, then area-average: resvg's own 32 px edges are harsher


def fetch(look: str) -> Path:
    """Download the package of ``look`` into the cache once, check its hash, return the tarball."""
    version, digest = PACKAGES[look]
    CACHE.mkdir(exist_ok=True)
    tarball = CACHE / f"iconify-json-{look}-{version}.tgz"
    if not tarball.exists():
        command = ["npm", "pack", f"@iconify-json/{look}@{version}", "--silent"]
        subprocess.run(command, cwd=CACHE, check=True, capture_output=True)
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{tarball.name}: sha256 {found}, expected {digest}")
    return tarball


@cache
def icon_set(look: str) -> dict[str, Any]:
    """The package's ``icons.json``: SVG bodies by name, with default width and height."""
    with tarfile.open(fetch(look)) as archive:
        member = archive.extractfile("package/icons.json")
        if member is None:
            raise ValueError(f"{look}: no icons.json in the package")
        icons: dict[str, Any] = json.load(member)
    return icons


def has(look: str, caption: str) -> bool:
    """Whether the vendor draws this subject."""
    return caption.replace(" ", "-") in icon_set(look)["icons"]


def render(look: str, caption: str, size: int = SIZE) -> np.ndarray:
    """One subject in one look on white (duotone: on its paper): uint8 ``[size, size, 3]``."""
    if look == DUOTONE:
        return duotone(render(BASE_LOOK, caption, size))
    outlined = look == OUTLINED
    icons = icon_set(BASE_LOOK if outlined else look)
    icon = icons["icons"][caption.replace(" ", "-")]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    body = f"<g {STROKE}>{icon['body']}</g>" if outlined else icon["body"]
    side = size * SUPERSAMPLE
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side}" height="{side}" color="black">{body}</svg>'
    )
    raw = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
    image = Image.open(io.BytesIO(bytes(raw))).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    return np.asarray(flat.resize((size, size), Image.Resampling.BOX))


def duotone(image: np.ndarray) -> np.ndarray:
    """Brightness (Rec. 601 luma) as a mix of ink and paper: uint8 in, uint8 out, same shape."""
    luma = (image @ np.array([0.299, 0.587, 0.114]) / 255.0)[..., None]
    mixed = (1 - luma) * np.array(INK) + luma * np.array(PAPER)
    return mixed.round().astype(np.uint8)


def dataset(look: str, captions: list[str]) -> np.ndarray:
    """All ``captions`` in one look: uint8 ``[n, 32, 32, 3]``, in the given order."""
    return np.stack([render(look, caption) for caption in captions])


def base_captions() -> list[str]:
    """Subjects of base v1: the style's training half and its held-out half."""
    return list(STYLE_SUBJECTS) + list(HELD_OUT_SUBJECTS)


def successor_captions() -> list[str]:
    """Subjects of base v2: those of v1 and some more."""
    return base_captions() + list(EXTRA_SUBJECTS)


def check_subjects() -> None:
    """Fail early when a chosen subject is missing from a vendor or listed twice."""
    captions = successor_captions()
    if len(set(captions)) != len(captions):
        raise ValueError("a subject is listed twice")
    for look in PACKAGES:
        missing = [c for c in captions if not has(look, c)]
        if missing:
            raise ValueError(f"{look} lacks {missing}")
