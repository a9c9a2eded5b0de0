"""Report: one self-contained HTML page that shows what carried."""

from regraft.report.page import write_report

__all__ = ["write_report"]
