"""Numbers and other people's text, as the page shows them."""

from __future__ import annotations

import json
import math
import re
from pathlib import PurePath, PureWindowsPath
from typing import Any

from markupsafe import Markup

from regraft.result import TransferResult

#: Control characters, direction overrides and lone surrogates: they hide or reorder text, or
#: cannot be written. Tab and newline are harmless in HTML.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_NONE = "–"


def clean(value: Any) -> Any:
    """A value as the page may show it: hidden characters become a visible mark.

    The template engine calls this on everything it prints, before it escapes.
    """
    if isinstance(value, Markup):
        return value
    return _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage that never rounds a loss away or a trace to nothing."""
    if value is None or not math.isfinite(value):
        return _NONE
    if abs(value - 1) < 1e-6:
        return "100%"
    step = 10.0**-digits
    if 1 - step / 200 < value < 1:
        return f">{100 - step:.{digits}f}%"
    if 1e-9 < value < step / 200:
        return f"<{step:.{digits}f}%"
    text = f"{value * 100:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


def number(value: float | None, digits: int = 3) -> str:
    """A plain figure with fixed decimals; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return _NONE
    if value >= 1e4:
        return f"{value:.1e}"
    # Adding zero turns "-0.000" into "0.000".
    return f"{round(value, digits) + 0.0:.{digits}f}"


def seconds(value: float) -> str:
    """A duration."""
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def plain(value: Any) -> str:
    """A setting's value: JSON, with a dash for "not given"."""
    if value is None or value in ("", [], (), {}):
        return _NONE
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False, default=str)


def file_name(path: str) -> str:
    """The last part of a path: a page that is passed on shall not tell where its maker works."""
    name = PureWindowsPath(path).name if "\\" in path else PurePath(path).name
    return name or path


def quoted(text: str) -> str:
    """A Python string literal with hidden characters spelt out, for code to be pasted."""
    return json.dumps(_HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text), ensure_ascii=False)


def inserts(result: TransferResult) -> bool:
    """Whether the adapter adds to activations instead of changing weights."""
    return result.adapter.get("changes") == "activations"


def size_of(result: TransferResult) -> str:
    """What the size of the adapter's parts is called."""
    if not inserts(result):
        return "Rank"
    return "Width" if result.adapter.get("family") == "bottleneck" else "Virtual tokens"
