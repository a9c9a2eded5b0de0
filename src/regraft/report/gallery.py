"""Pictures (and measurements) that a caller puts on the page: what the figures cannot show."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"


class GalleryRow(NamedTuple):
    """One row of pictures (PNG files as bytes), one per column; ``None`` leaves a gap.

    ``highlight`` marks the row the page is about.
    """

    label: str
    note: str
    images: Sequence[bytes | None]
    highlight: bool = False


class Measured(NamedTuple):
    """One measured figure: what, its value as text, and what it says."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """A table of pictures with captions above and labels at the left.

    Attributes
    ----------
    title : str
    columns : sequence of str
        Captions.
    rows : sequence of GalleryRow
        Plain tuples ``(label, note, images)`` do as well.
    measured : sequence of Measured
        Plain tuples ``(label, value, note)`` do as well.
    paragraph : str
        What the reader should see.
    rendering : "auto" or "pixelated"
        How browsers enlarge small pictures: smoothly, or as crisp squares.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[GalleryRow | tuple[str, str, Sequence[bytes | None]]]
    measured: Sequence[Measured | tuple[str, str, str]] = ()
    paragraph: str = ""
    rendering: Literal["auto", "pixelated"] = "auto"


@dataclass(frozen=True)
class Picture:
    uri: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class PictureRow:
    label: str
    note: str
    pictures: tuple[Picture | None, ...]
    highlight: bool


def picture_rows(gallery: Gallery) -> tuple[PictureRow, ...]:
    """The rows as the template needs them.

    Raises
    ------
    ValueError
        A row has not one picture per column, or a picture is not a PNG file.
    """
    rows = []
    for row in (GalleryRow(*r) for r in gallery.rows):
        if len(row.images) != len(gallery.columns):
            raise ValueError(
                f"The gallery row {row.label!r} has {len(row.images)} pictures for "
                f"{len(gallery.columns)} columns."
            )
        pictures = tuple(
            None if png is None else _picture(png, f"{row.label}: {caption}")
            for png, caption in zip(row.images, gallery.columns, strict=True)
        )
        rows.append(PictureRow(row.label, row.note, pictures, row.highlight))
    return tuple(rows)


def _picture(png: bytes, alt: str) -> Picture:
    # The size stands at a fixed place in every PNG: signature, length, "IHDR", width, height.
    if not png.startswith(_PNG) or len(png) < 24:
        raise ValueError(f"The picture {alt!r} is not a PNG file.")
    width, height = struct.unpack(">II", png[16:24])
    uri = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return Picture(uri, alt, width, height)
