"""``regraft demo``: the main job on the embedded pair."""

from __future__ import annotations


def demo_command() -> None:
    """Carry a real adapter between the two embedded bases and show what carried."""
