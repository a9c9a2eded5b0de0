"""The main job on the embedded pair: carry the style adapter, judge it, show it on a page.

Judged twice: by eye, in a grid of pictures with the same captions and seeds, and by the retention
R = (loss of v2 − loss with the carried adapter) / (loss of v2 − loss with the retrained one), where
the loss is the denoising loss on style images of subjects that no adapter was trained on.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.compare import compare
from regraft.crossing import Progress, silent
from regraft.demo import pair
from regraft.demo.sampler import attach, denoising_loss, detach, sample
from regraft.errors import NothingCarried
from regraft.parallel import single_threaded
from regraft.report import Gallery, GalleryRow, Measured, write_report
from regraft.result import TransferResult
from regraft.subspaces import SubspaceLibrary
from regraft.transfer import transfer

SEED = 7
#: The ways tried beside plain copying: a name for the page, and options of ``transfer``.
WAYS: dict[str, dict[str, Any]] = {
    "lora-x": {"method": "lora-x"},
    "prolora": {"method": "prolora"},
    "prolora, cross terms kept": {"method": "prolora", "cross_terms": True},
}
#: Those of them that are as their papers print them.
PUBLISHED = ("lora-x", "prolora")


@dataclass(frozen=True)
class DemoResult:
    """Where the demo left its files, and what it measured.

    ``retention`` maps each way to R; ``losses`` holds the denoising losses behind it.
    """

    page: Path
    adapter: Path
    result: TransferResult
    losses: dict[str, float]
    retention: dict[str, float]


@single_threaded()
def run_demo(folder: str | Path = "regraft-demo", *, progress: Progress = silent) -> DemoResult:
    """Carry, measure, draw, report.

    Parameters
    ----------
    folder : str or Path
        Gets ``index.html`` and the adapters that were written.

    Returns
    -------
    DemoResult
    """
    folder = Path(folder)
    library = SubspaceLibrary()
    # Remembered, so that the page's heat map can show Φ.
    compare(pair.SOURCE, pair.TARGET, library=library, progress=progress)
    carried = folder / "style-on-v2.safetensors"
    result = transfer(
        pair.ADAPTER,
        source=pair.SOURCE,
        target=pair.TARGET,
        output=carried,
        overwrite=True,
        library=library,
        progress=progress,
    )
    # Judge the file that was written, not the one that came in.
    copied = carried if result.method == "copy" else pair.ADAPTER
    files = {"copy": copied, **_other_ways(folder, library, progress)}
    losses = _losses(files, progress)
    gain = losses["v2"] - losses["retrained"]
    retention = {name: (losses["v2"] - losses[name]) / gain for name in files}
    published = [n for n in files if n in PUBLISHED]
    best = max(published, key=lambda n: retention[n], default=None)
    rows = _draw(files, best, result.method, progress)
    gallery = Gallery(
        title="The same captions and seeds, six times",
        columns=pair.default_captions(),
        rows=rows,
        measured=_measured(losses, retention),
        paragraph=_paragraph(result, retention, best),
    )
    page = folder / "index.html"
    result.report = str(page)
    write_report(result, page, overwrite=True, gallery=gallery)
    return DemoResult(page, carried, result, losses, retention)


def _other_ways(folder: Path, library: SubspaceLibrary, progress: Progress) -> dict[str, Path]:
    """The same adapter by every projection, each in its own file."""
    files = {}
    for name, options in WAYS.items():
        path = folder / f"style-on-v2-by-{name.replace(', ', '-').replace(' ', '-')}.safetensors"
        try:
            transfer(
                pair.ADAPTER,
                source=pair.SOURCE,
                target=pair.TARGET,
                output=path,
                overwrite=True,
                library=library,
                progress=progress,
                **options,
            )
        except NothingCarried:
            continue
        files[name] = path
    return files


def _losses(files: dict[str, Path], progress: Progress) -> dict[str, float]:
    """Held-out style loss of v1 and v2, alone and with each adapter."""
    images, captions = pair.load_heldout()
    v1, v2 = pair.load_pipeline(pair.SOURCE), pair.load_pipeline(pair.TARGET)
    work: list[tuple[str, Callable[[], Any]]] = [
        ("v1", lambda: detach(v1)),
        ("v1 with adapter", lambda: attach(v1, pair.ADAPTER)),
        ("v2", lambda: detach(v2)),
        ("retrained", lambda: attach(v2, pair.RETRAINED)),
        *((n, lambda p=p: attach(v2, p)) for n, p in files.items()),
    ]
    losses = {}
    for done, (name, prepare) in enumerate(work, 1):
        losses[name] = denoising_loss(prepare(), images, captions)
        progress("measuring", done, len(work))
    return losses


def _draw(
    files: dict[str, Path], best: str | None, chosen: str, progress: Progress
) -> list[GalleryRow]:
    captions = pair.default_captions()
    seeds = [SEED + i for i in range(len(captions))]
    v1, v2 = pair.load_pipeline(pair.SOURCE), pair.load_pipeline(pair.TARGET)
    copied = "the file auto wrote" if chosen == "copy" else "the file as it is"
    plan = [
        ("v1", "the old base", v1, None),
        ("v1 + LoRA", "black-and-white style, trained here", v1, pair.ADAPTER),
        ("v2", "the new base", v2, None),
        ("v2 + copied LoRA", copied, v2, files["copy"]),
        *(
            [(f"v2 + LoRA by {best}", "the best of the published projections", v2, files[best])]
            if best
            else []
        ),
        ("v2 + retrained LoRA", "the goal: trained again on v2", v2, pair.RETRAINED),
    ]
    rows = []
    for done, (label, note, pipeline, adapter) in enumerate(plan, 1):
        attach(pipeline, adapter) if adapter else detach(pipeline)
        images = sample(pipeline, captions, seeds)
        highlight = label.startswith("v2 + ") and adapter == files.get(
            "copy" if chosen == "copy" else best or "copy"
        )
        rows.append(GalleryRow(label, note, [_png(i) for i in images], highlight))
        progress("drawing", done, len(plan))
    return rows


def _png(pixels: Any) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels).resize((128, 128), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _measured(losses: dict[str, float], retention: dict[str, float]) -> list[Measured]:
    rows = [
        Measured("v2 without adapter", f"loss {losses['v2']:.4f}", "R = 0 by definition"),
        Measured("v2 with the retrained adapter", f"loss {losses['retrained']:.4f}", "R = 1"),
    ]
    for name, value in sorted(retention.items(), key=lambda item: -item[1]):
        label = "plain copy" if name == "copy" else name
        excess = losses[name] / losses["retrained"] - 1
        note = f"loss {losses[name]:.4f}, {excess:.0%} above the retrained adapter's"
        rows.append(Measured(f"v2 with {label}", f"R = {value:.2f}", note))
    return rows


def _paragraph(result: TransferResult, retention: dict[str, float], best: str | None) -> str:
    text = (
        "Every row starts from the same noise. The subjects shown were never in the adapter's "
        "training data, so the style on them is not recalled. R is measured on "
        "held-out style pictures: 1 is as good as training the adapter again on v2, "
        "0 as good as no adapter."
    )
    if best is not None and result.method == "copy":
        verb = "keeps more than" if retention["copy"] >= retention[best] else "keeps less than"
        text += (
            f" Here plain copying (R = {retention['copy']:.2f}) {verb} the best published "
            f"projection ({best}, R = {retention[best]:.2f})."
        )
    return text


__all__ = ["DemoResult", "run_demo"]
