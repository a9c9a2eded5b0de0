"""The picture: methods × upgrades, one panel per kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.retention.rows import Row
from benchmarks.retention.summary import grid, select, two, upgrades

TITLES = {"diffusion": "Text to image", "language": "Language"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG of mean R (rank 8, main metric); refused cells are grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import TwoSlopeNorm

    kinds = [kind for kind in TITLES if select(rows, kind=kind, rank=8)]
    if not kinds:
        return
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(6.2 * len(kinds), 4.4), squeeze=False, layout="constrained"
    )
    norm = TwoSlopeNorm(0.0, vmin=-1.0, vmax=1.0)
    for kind, panel in zip(kinds, panels[0], strict=True):
        chosen = select(rows, kind=kind, rank=8)
        found, columns = grid(chosen), upgrades(chosen)
        means = [[cells[u].mean for u in columns] for cells in found.values()]
        numbers = [[float("nan") if m is None else m for m in line] for line in means]
        panel.set_facecolor("#d9d9d9")
        image = panel.imshow(numbers, cmap="RdYlGn", norm=norm, aspect="auto")
        for y, line in enumerate(means):
            for x, mean in enumerate(line):
                text = two(mean)
                ink = "#ffffff" if mean is not None and abs(mean) > 0.6 else "#222222"
                panel.text(x, y, text, ha="center", va="center", fontsize=9, color=ink)
        panel.set_xticks(range(len(columns)), columns, rotation=25, ha="right")
        panel.set_yticks(range(len(found)), list(found))
        panel.set_title(TITLES[kind])
    figure.colorbar(image, ax=panels[0].tolist(), label="retention R", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
