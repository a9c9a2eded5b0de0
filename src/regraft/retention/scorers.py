"""Scores from weights that the user may have: CLIP score, CLIP-I, DINOv2, HPSv2, LPIPS diversity.

:func:`available_scorers` gives those that can run, and for each of the others the reason why not.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from regraft.errors import InputNotFound, MalformedFile, RegraftError
from regraft.retention.encoders import ClipEncoder, load_clip, load_dinov2, package
from regraft.retention.images import (
    Pictures,
    PicturesByPrompt,
    Scorer,
    StyleSimilarity,
    check_seeds,
)

CLIP_SCORE, CLIP_I, DINO = "CLIP score", "style similarity (CLIP)", "style similarity (DINOv2)"
HPS, LPIPS = "HPSv2", "LPIPS diversity"

#: What torchvision calls AlexNet's weights in torch's cache; LPIPS stands on them.
ALEXNET = "alexnet-owt-7be5be79.pth"
BATCH = 32


@dataclass(frozen=True)
class ClipScore:
    """100 times the cosine of picture and prompt, averaged over all pictures.

    Hessel et al. 2021 (arXiv:2104.08718) scale by 2.5 and cut negative values; the usual libraries
    scale by 100. Nothing is cut here: a mean of cut values would hide how bad the bad ones are.
    """

    clip: ClipEncoder
    name: str = CLIP_SCORE
    higher_is_better: bool = True

    def score(self, generated: PicturesByPrompt, real: Pictures) -> float:
        """In [-100, 100]; ``real`` is not used."""
        texts = self.clip.encode_text(list(generated))
        rows = [
            100 * (self.clip.encode(images) @ text)
            for images, text in zip(generated.values(), texts, strict=True)
        ]
        return float(torch.cat(rows).mean())


@dataclass(frozen=True)
class HpsScore:
    """Human Preference Score v2 (Wu et al. 2023, arXiv:2306.09341) through open_clip.

    A CLIP ViT-H/14 tuned on human choices; the score is the plain cosine of picture and prompt,
    about 0.2 to 0.35, as the authors' own package returns it (some tables print it times 100).
    """

    model: Any
    tokenizer: Callable[[Sequence[str]], Tensor]
    name: str = HPS
    higher_is_better: bool = True

    @torch.no_grad()
    def score(self, generated: PicturesByPrompt, real: Pictures) -> float:
        """Mean over all pictures; ``real`` is not used."""
        texts = self.model.encode_text(self.tokenizer(list(generated)), normalize=True)
        rows = []
        for images, text in zip(generated.values(), texts, strict=True):
            for low in range(0, len(images), BATCH):
                x = hps_pixels(images[low : low + BATCH], self.model.visual)
                rows.append(self.model.encode_image(x, normalize=True) @ text)
        return float(torch.cat(rows).mean())


@dataclass(frozen=True)
class LpipsDiversity:
    """LPIPS (Zhang et al. 2018, arXiv:1801.03924) between the seeds of a prompt.

    Mean over the pairs of one prompt, then over prompts: LoRA-X's diversity, which took 30 seeds of
    30 prompts. Which backbone the paper used is not given; AlexNet is the package's default.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    name: str = LPIPS
    higher_is_better: bool = True

    @torch.no_grad()
    def score(self, generated: PicturesByPrompt, real: Pictures) -> float:
        """At least 0; ``real`` is not used. BadOption for fewer than two seeds."""
        check_seeds(generated)
        means = []
        for images in generated.values():
            x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
            x = x / 127.5 - 1  # the range that LPIPS asks for
            first, second = torch.triu_indices(len(x), len(x), offset=1)
            rows = [
                self.distance(x[i], x[j]).flatten()
                for i, j in zip(first.split(BATCH), second.split(BATCH), strict=True)
            ]
            means.append(float(torch.cat(rows).mean()))
        return float(np.mean(means))


def hps_pixels(images: Pictures, visual: Any) -> Float[Tensor, "n 3 s s"]:
    """HPSv2's preprocessing: the longer side to the model's size, black around, CLIP's colours.

    Bicubic with antialiasing, as its reference code resizes tensors in [0, 1].
    """
    size = visual.image_size
    side = size[0] if isinstance(size, tuple | list) else size
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    height, width = x.shape[2:]
    scale = side / max(height, width)
    if scale != 1.0:
        new = (round(height * scale), round(width * scale))
        x = functional.interpolate(x, new, mode="bicubic", antialias=True)
        down, across = side - new[0], side - new[1]
        x = functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    return (x - mean) / std


def load_hps(path: str | Path, *, architecture: str = "ViT-H-14") -> HpsScore:
    """HPSv2 from ``HPS_v2_compressed.pt`` or ``HPS_v2.1_compressed.pt``, float32 on the CPU.

    The file is a pickle. It is read by torch's restricted unpickler, which builds tensors and
    nothing else.

    Raises
    ------
    MissingDependency
        open_clip is not installed.
    InputNotFound
        No such file.
    MalformedFile
        It holds more than tensors, or not the weights of ``architecture``.
    """
    if not Path(path).is_file():
        raise InputNotFound(
            "There is no HPSv2 checkpoint here.",
            file=path,
            fix="Fetch it once: hf download xswu/HPSv2 HPS_v2.1_compressed.pt",
        )
    open_clip = package("open_clip", "open_clip_torch")
    weights = _tensors_only(Path(path)).get("state_dict")
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of random weights, which are replaced next
    try:
        model = open_clip.create_model(
            architecture, pretrained=None, precision="fp32", device="cpu"
        )
    finally:
        logging.disable(quiet)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise MalformedFile(
            f"These are not the weights of a {architecture}.",
            file=path,
            fix="Use HPSv2's own file.",
        ) from error
    return HpsScore(model.eval(), open_clip.get_tokenizer(architecture))


def load_lpips(backbone: str | Path | None = None) -> LpipsDiversity:
    """LPIPS on AlexNet from the ``lpips`` package; its calibration is part of the package.

    ``backbone`` is AlexNet's weights as torchvision publishes them; without it, torch's cache is
    looked into. Nothing is downloaded, and the file is read as tensors only.

    Raises
    ------
    MissingDependency
        lpips or torchvision is not installed.
    InputNotFound
        AlexNet's weights are not there.
    MalformedFile
        The file is not AlexNet's.
    """
    lpips = package("lpips", "lpips")
    path = (
        Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET if backbone is None else Path(backbone)
    )
    if not path.is_file():
        raise InputNotFound(
            "LPIPS needs AlexNet's weights, which are not in torch's cache.",
            file=path,
            fix=f"Put https://download.pytorch.org/models/{ALEXNET} there.",
        )
    weights = _tensors_only(path)
    with warnings.catch_warnings():  # lpips still calls torchvision by arguments it renamed
        warnings.simplefilter("ignore")
        # pnet_rand: build the backbone without torchvision's download, then fill it from the file
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    slots = network.net.state_dict()
    try:
        # torchvision's "features.3.weight" is lpips' "slice2.3.weight": the number is the layer
        found = {slot: weights["features." + slot.split(".", 1)[1]] for slot in slots}
        network.net.load_state_dict(found)
    except (KeyError, RuntimeError) as error:
        raise MalformedFile(
            "These are not AlexNet's weights.", file=path, fix=f"Use torchvision's {ALEXNET}."
        ) from error
    return LpipsDiversity(network.eval())


def available_scorers(
    clip: str | None = None,
    dinov2: str | None = None,
    hps: str | None = None,
    lpips: bool = True,
) -> tuple[list[Scorer], dict[str, str]]:
    """The scorers that can run here, and name -> reason for those that cannot.

    ``clip`` and ``dinov2`` are folders or hub ids in the local cache, ``hps`` is a checkpoint file,
    ``lpips`` says whether it is wanted. Nothing is downloaded. Every known scorer is in exactly one
    of the two results.
    """
    ready: list[Scorer] = []
    skipped: dict[str, str] = {}

    def offer(names: Sequence[str], ref: str | None, load: Callable[[str], list[Scorer]]) -> None:
        if ref is None:
            skipped.update(dict.fromkeys(names, "no weights were named"))
            return
        try:
            ready.extend(load(ref))
        except RegraftError as error:
            skipped.update(dict.fromkeys(names, str(error)))

    def with_clip(ref: str) -> list[Scorer]:
        encoder = load_clip(ref)
        return [ClipScore(encoder), StyleSimilarity(encoder)]

    offer((CLIP_SCORE, CLIP_I), clip, with_clip)
    offer((DINO,), dinov2, lambda ref: [StyleSimilarity(load_dinov2(ref))])
    offer((HPS,), hps, lambda ref: [load_hps(ref)])
    if lpips:
        offer((LPIPS,), "", lambda _: [load_lpips()])
    else:
        skipped[LPIPS] = "not asked for"
    return ready, skipped


def _tensors_only(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise MalformedFile(
            "The file is damaged, or holds more than tensors and is not loaded.",
            file=path,
            fix="Fetch it again from its authors.",
        ) from error
    if not isinstance(found, dict):
        raise MalformedFile("The file holds no named tensors.", file=path)
    return found
