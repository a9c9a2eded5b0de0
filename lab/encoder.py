"""The lab's image encoder: which look is a picture in, and what does it show.

``python -m lab.encoder`` trains it; ``load_encoder()`` reads the shipped one. No pretrained encoder
can be had offline at 32 pixels, so this one is trained on the emoji themselves: six looks of some
1,500 subjects, those that the battery measures left out. It judges pictures of this lab only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from regraft.demo.captions import HELD_OUT_SUBJECTS
from regraft.parallel import single_threaded

ASSETS = Path(__file__).parent / "assets" / "encoder"
FILE = ASSETS / "encoder.safetensors"
RUNS = Path(__file__).parent / ".cache" / "runs"
RENDERED = Path(__file__).parent / ".cache" / "encoder-looks.npz"

LOOK, SUBJECT = 32, 64  # dimensions of the two parts of a feature
SIZE = 32
SHARPNESS = 12.0  # logits are this times a cosine
TEMPERATURE = 0.1  # of the contrastive loss
STEPS, SUBJECTS_PER_BATCH, JUNK_PER_BATCH, RATE = 900, 64, 16, 3e-3


class EmojiNet(nn.Module):
    """A small convolutional network with two unit features: look and subject."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        widths = (12, 32, 48, 80, 96, 128)
        strides = (1, 1, 2, 1, 2)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=s, padding=1, bias=False), nn.GroupNorm(8, b), nn.SiLU()
            )
            for a, b, s in zip(widths, widths[1:], strides, strict=False)
        )
        # The look is a texture: channel means and spreads of a fine and a coarse layer, without
        # place. The subject keeps its places, 2 x 2.
        self.look = nn.Linear(2 * (widths[2] + widths[5]), LOOK)
        self.subject = nn.Linear(4 * widths[5], SUBJECT)
        self.prototypes = nn.Parameter(torch.randn(looks + 1, LOOK))

    def forward(
        self, x: Float[Tensor, "n 3 32 32"]
    ) -> tuple[Float[Tensor, "n look"], Float[Tensor, "n subject"]]:
        """Pixels in [-1, 1] to the two features, each of length 1."""
        x = functional.pixel_unshuffle(x, 2)
        kept = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in (1, 4):
                kept.append(x)
        texture = [part for k in kept for part in (k.mean((2, 3)), k.var((2, 3)).add(1e-5).sqrt())]
        look = self.look(torch.cat(texture, dim=1))
        subject = self.subject(functional.adaptive_avg_pool2d(x, 2).flatten(1))
        return functional.normalize(look, dim=1), functional.normalize(subject, dim=1)

    def look_logits(self, look: Float[Tensor, "n look"]) -> Float[Tensor, "n looks"]:
        """Scores of the looks; the last one means none of them."""
        return SHARPNESS * look @ functional.normalize(self.prototypes, dim=1).T


def to_pixels(images: UInt8[np.ndarray, "n h w 3"]) -> Float[Tensor, "n 3 32 32"]:
    """uint8 to [-1, 1] at 32 pixels; other sizes are resampled."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if pixels.shape[2:] != (SIZE, SIZE):
        pixels = functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
    return pixels


@dataclass
class EmojiEncoder:
    """The lab's encoder (``regraft.retention.images.Encoder``).

    ``part`` chooses the feature: ``look`` (32 numbers; for style similarity), ``subject`` (64; does
    it still show what it should) or ``both`` (96, half the squared length each; for diversity).
    """

    network: EmojiNet
    looks: list[str]
    part: str = "both"

    @property
    def name(self) -> str:
        """What reports call it."""
        return "emoji encoder" if self.part == "both" else f"emoji encoder ({self.part})"

    @torch.no_grad()
    @single_threaded()
    def encode(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[Tensor, "n d"]:
        """Unit features of the chosen part, float32."""
        rows = [self._features(images[i : i + 256]) for i in range(0, len(images), 256)]
        return torch.cat(rows) if rows else torch.zeros(0, self.dimension)

    @property
    def dimension(self) -> int:
        """Length of a feature."""
        return {"look": LOOK, "subject": SUBJECT}.get(self.part, LOOK + SUBJECT)

    @torch.no_grad()
    def look_of(self, images: UInt8[np.ndarray, "n h w 3"]) -> list[str]:
        """The look each image is taken for; ``none`` when it is like none of them."""
        look, _ = self.network(to_pixels(images))
        return [[*self.looks, "none"][i] for i in self.network.look_logits(look).argmax(1).tolist()]

    def _features(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[Tensor, "n d"]:
        look, subject = self.network(to_pixels(images))
        if self.part == "look":
            return look
        return subject if self.part == "subject" else torch.cat([look, subject], dim=1) / 2**0.5


def load_encoder(path: Path = FILE, part: str = "both") -> EmojiEncoder:
    """The trained encoder, in float32 on the CPU. ``part``: ``look``, ``subject`` or ``both``."""
    if part not in ("look", "subject", "both"):
        raise ValueError(f"part {part!r}: use look, subject or both")
    with safe_open(path, framework="pt") as file:
        looks = json.loads(file.metadata()["looks"])
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    network = EmojiNet(len(looks))
    network.load_state_dict(weights)
    return EmojiEncoder(network.eval(), looks, part)


# -- training ------------------------------------------------------------------------------------


def subjects() -> tuple[list[str], list[str]]:
    """Subjects that every vendor draws, to train on and held out; captions as the bases use them.

    Held out are the battery's own held-out subjects.
    """
    from lab import emoji

    common = set.intersection(*(set(emoji.icon_set(look)["icons"]) for look in emoji.PACKAGES))
    held_out = list(HELD_OUT_SUBJECTS)
    kept = [name.replace("-", " ") for name in sorted(common)]
    # "man dancing", "woman dancing" and their like are one drawing many times over
    kept = [name for name in kept if not {"man", "woman", "person"} & set(name.split())]
    return [name for name in kept if name not in held_out], held_out


def rendered() -> tuple[UInt8[np.ndarray, "looks n 32 32 3"], UInt8[np.ndarray, "looks m 32 32 3"]]:
    """All looks of the training and of the held-out subjects, rendered once and kept."""
    from lab import emoji

    if not RENDERED.exists():
        train, held_out = subjects()
        print(f"rendering {len(train)} + {len(held_out)} subjects in {len(emoji.LOOKS)} looks …")
        parts = {
            name: np.stack([emoji.dataset(look, captions) for look in emoji.LOOKS])
            for name, captions in (("train", train), ("held_out", held_out))
        }
        RENDERED.parent.mkdir(parents=True, exist_ok=True)
        np.savez(RENDERED, **parts)
    with np.load(RENDERED) as file:
        return file["train"], file["held_out"]


def disturb(x: Float[Tensor, "n 3 32 32"], draw: torch.Generator) -> Float[Tensor, "n 3 32 32"]:
    """Shift, zoom, mirror, blur, noise, contrast: what a small diffusion model's samples have."""
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=draw)

    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0] = uniform(0.87, 1.15) * (torch.rand(n, generator=draw) < 0.5).float().mul(
        2
    ).sub(1)
    affine[:, 1, 1] = affine[:, 0, 0].abs()
    affine[:, :, 2] = uniform(-0.15, 0.15, 2)
    grid = functional.affine_grid(affine, list(x.shape), align_corners=False)
    x = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    blurred = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, uniform(0.0, 1.0, 1, 1, 1) ** 2)
    x = x * uniform(0.9, 1.0, 1, 1, 1) + uniform(-0.06, 0.06, 3, 1, 1)
    noise = torch.randn(x.shape, generator=draw)
    return (x + noise * uniform(0.0, 0.35, 1, 1, 1) ** 2).clamp(-1, 1)


def junk(x: Float[Tensor, "n 3 32 32"], draw: torch.Generator) -> Float[Tensor, "n 3 32 32"]:
    """Pictures of nothing: shuffled blocks, heavy noise, soft clouds; a third each."""
    n = len(x)
    blocks = functional.unfold(x, 4, stride=4)
    order = torch.rand(n, 1, blocks.shape[2], generator=draw).argsort(dim=2)
    shuffled = functional.fold(blocks.gather(2, order.expand_as(blocks)), SIZE, 4, stride=4)
    noisy = x + torch.randn(x.shape, generator=draw) * (
        0.5 + torch.rand(n, 1, 1, 1, generator=draw)
    )
    clouds = torch.randn(n, 3, 5, 5, generator=draw)
    clouds = functional.interpolate(clouds, (SIZE, SIZE), mode="bicubic")
    kind = torch.randint(3, (n, 1, 1, 1), generator=draw)
    return torch.where(kind == 0, shuffled, torch.where(kind == 1, noisy, clouds)).clamp(-1, 1)


def batch_loss(network: EmojiNet, pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Soft cross entropy of the look, and NT-Xent of the subject (Chen et al. 2020, eq. 1).

    ``pixels`` is ``[looks, subjects, 3, 32, 32]``. Each subject comes in two looks; a third of the
    pictures are blends of two looks of the same drawing, with the blend as their label, so that a
    half-styled sample lies between the looks and not in one of them.
    """
    looks, n = pixels.shape[:2]
    who = torch.randperm(n, generator=draw)[:SUBJECTS_PER_BATCH].repeat(2)
    first, second = torch.randint(looks, (2, len(who)), generator=draw)
    share = torch.rand(len(who), generator=draw)
    share = torch.where(torch.rand(len(who), generator=draw) < 0.33, share, torch.ones(()))
    x = torch.lerp(pixels[second, who], pixels[first, who], share[:, None, None, None])
    one_hot = torch.eye(looks + 1)
    labels = torch.lerp(one_hot[second], one_hot[first], share[:, None])
    spoilt = junk(x[:JUNK_PER_BATCH], draw)
    look, subject = network(torch.cat([disturb(x, draw), spoilt]))
    labels = torch.cat([labels, one_hot[-1:].expand(JUNK_PER_BATCH, -1)])
    look_loss = functional.cross_entropy(network.look_logits(look), labels)
    subject = subject[: len(who)]
    closeness = (subject @ subject.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    twin = (torch.arange(len(who)) + SUBJECTS_PER_BATCH) % len(who)
    return look_loss + 0.5 * functional.cross_entropy(closeness, twin)


@torch.no_grad()
def judge(network: EmojiNet, images: UInt8[np.ndarray, "looks n 32 32 3"]) -> dict[str, float]:
    """Accuracy on held-out subjects: looks as drawn and disturbed, junk, subjects across looks."""
    looks, n = images.shape[:2]
    x = to_pixels(images.reshape(-1, *images.shape[2:]))
    truth = torch.arange(looks).repeat_interleave(n)
    draw = torch.Generator().manual_seed(0)
    clean, subject = network(x)
    hit = network.look_logits(clean).argmax(1) == truth
    disturbed = network.look_logits(network(disturb(x, draw))[0]).argmax(1) == truth
    none = network.look_logits(network(junk(x, draw))[0]).argmax(1) == looks
    subject = subject.view(looks, n, -1)
    found = [
        float((subject[a] @ subject[b].T).argmax(1).eq(torch.arange(n)).float().mean())
        for a in range(looks)
        for b in range(looks)
        if a != b
    ]
    return {
        "look": round(float(hit.float().mean()), 4),
        "look_disturbed": round(float(disturbed.float().mean()), 4),
        "junk": round(float(none.float().mean()), 4),
        "subject_across_looks": round(float(np.mean(found)), 4),
    }


def behaviour(
    encoder: EmojiEncoder, images: UInt8[np.ndarray, "looks n 32 32 3"]
) -> dict[str, Any]:
    """Style similarity on held-out subjects: one half is the real set, the other is scored.

    ``similarity`` has a row per style of the real set and a column per look that is scored;
    ``blend`` follows the base look turning into the line look. ``look_by_look`` is the share of all
    held-out subjects whose look is named rightly.
    """
    from regraft.retention.images import style_similarity

    half = images.shape[1] // 2
    real, scored = images[:, :half], images[:, half:]
    names = encoder.looks
    table = {
        name: {
            other: round(style_similarity(scored[j], real[i], encoder), 4)
            for j, other in enumerate(names)
        }
        for i, name in enumerate(names)
    }
    base, line = names.index("fluent-emoji-flat"), names.index("fluent-emoji-high-contrast")
    right = {name: encoder.look_of(images[i]).count(name) for i, name in enumerate(names)}
    blend = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        mixed = (1 - share) * scored[base].astype(float) + share * scored[line]
        value = style_similarity(mixed.round().astype(np.uint8), real[line], encoder)
        blend[str(share)] = round(value, 4)
    return {
        "look_by_look": {name: n / images.shape[1] for name, n in right.items()},
        "similarity": table,
        "blend_flat_to_line": blend,
    }


def train_encoder(*, steps: int = STEPS, seed: int = 0, redo: bool = False) -> dict[str, Any]:
    """Train, judge on held-out subjects ten times on the way, write the weights and the record."""
    from lab import emoji
    from lab.training import train

    checkpoint, judged = RUNS / "encoder.pt", RUNS / "encoder-curve.json"
    if redo:
        for kept in (checkpoint, judged, RENDERED):
            kept.unlink(missing_ok=True)
    train_images, held_out = rendered()
    pixels = to_pixels(train_images.reshape(-1, SIZE, SIZE, 3))
    pixels = pixels.view(*train_images.shape[:2], 3, SIZE, SIZE)
    torch.manual_seed(seed)
    network = EmojiNet(len(emoji.LOOKS))
    curve: list[dict[str, float]] = json.loads(judged.read_text()) if judged.exists() else []
    record: dict[str, Any] = {}
    for stop in range(steps // 10, steps + 1, steps // 10):
        record = train(
            list(network.parameters()),
            lambda draw: batch_loss(network, pixels, draw),
            steps=steps,
            stop=stop,
            lr=RATE,
            seed=seed,
            checkpoint=checkpoint,
            weight_decay=1e-2,
        )
        if stop not in [point["step"] for point in curve]:
            curve.append({"step": stop, **judge(network, held_out)})
            judged.write_text(json.dumps(curve))
            print(curve[-1])
    weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    ASSETS.mkdir(parents=True, exist_ok=True)
    save_file(weights, FILE, metadata={"looks": json.dumps(list(emoji.LOOKS))})
    found = {
        "command": "python -m lab.encoder",
        "parameters": sum(p.numel() for p in network.parameters()),
        "looks": list(emoji.LOOKS),
        "subjects": train_images.shape[1],
        "held_out_subjects": held_out.shape[1],
        "batch": {"pictures": 2 * SUBJECTS_PER_BATCH, "junk": JUNK_PER_BATCH},
        "recipe": record,
        "curve": curve,
        "held_out": judge(load_encoder().network, held_out),
        **behaviour(load_encoder(part="look"), held_out),
    }
    (ASSETS / "encoder.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Train unless the encoder is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redo", action="store_true", help="train again from the start")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    if FILE.exists() and not chosen.redo:
        print(f"{FILE.name} is there; --redo trains it again")
        return
    torch.set_num_threads(chosen.threads)
    found = train_encoder(redo=chosen.redo)
    print(
        json.dumps(
            {k: found[k] for k in ("held_out", "similarity", "blend_flat_to_line")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
