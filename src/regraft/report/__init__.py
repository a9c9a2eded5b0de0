"""Report: one self-contained HTML page that shows what carried."""

from regraft.report.gallery import Gallery, GalleryRow, Measured
from regraft.report.page import render_report, write_report

__all__ = ["Gallery", "GalleryRow", "Measured", "render_report", "write_report"]
