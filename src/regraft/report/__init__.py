"""Report: self-contained HTML pages that show what carried, and how well it works."""

from regraft.report.gallery import Gallery, GalleryRow, Measured
from regraft.report.measured import render_measured, write_measured
from regraft.report.page import render_report, write_report

__all__ = [
    "Gallery",
    "GalleryRow",
    "Measured",
    "render_measured",
    "render_report",
    "write_measured",
    "write_report",
]
