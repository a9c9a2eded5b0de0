"""The shape of the weight that a module of a file changes, from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

Shapes = Mapping[str, tuple[int, ...]]


def weight_shape(shapes: Shapes) -> tuple[int, ...] | None:
    """The weight's shape, where the tensors alone decide it; else None.

    Parameters
    ----------
    shapes : mapping of role to shape

    >>> weight_shape({"down": (4, 320), "up": (640, 4)})
    (640, 320)
    >>> weight_shape({"lokr_w1": (4, 4), "lokr_w2_a": (80, 8), "lokr_w2_b": (8, 160)})
    (320, 640)
    """
    if any(0 in shape or not shape for role, shape in shapes.items() if role != "alpha"):
        return None
    for role in ("diff", "w_norm", "whole"):
        if role in shapes:
            return shapes[role]
    if {"down", "up"} <= shapes.keys():
        down, up = shapes["down"], shapes["up"]
        kernel = shapes["mid"][2:] if "mid" in shapes else down[2:]
        return (up[0], down[1], *kernel) if len(down) > 1 else None
    if {"embedding_a", "embedding_b"} <= shapes.keys():
        a, b = shapes["embedding_a"], shapes["embedding_b"]
        return (a[1], b[0]) if len(a) > 1 else None
    if {"u", "v"} <= shapes.keys():
        return (shapes["u"][0], shapes["v"][0])
    if {"hada_w1_a", "hada_w1_b"} <= shapes.keys():
        return _product(shapes, "hada_w1_a", "hada_w1_b", "hada_t1")
    first = shapes.get("lokr_w1") or _product(shapes, "lokr_w1_a", "lokr_w1_b", "lokr_t1")
    second = shapes.get("lokr_w2") or _product(shapes, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    if first and second and len(first) > 1 and len(second) > 1:
        return (first[0] * second[0], first[1] * second[1], *second[2:])
    return None


def _product(shapes: Shapes, a: str, b: str, core: str) -> tuple[int, ...] | None:
    """The shape of A B, or of the two around a Tucker core, where A is stored turned."""
    left, right = shapes.get(a, ()), shapes.get(b, ())
    if len(left) < 2 or len(right) < 2:
        return None
    if core in shapes:
        return (left[1], right[1], *shapes[core][2:])
    return (left[0], *right[1:])


def sizes(shapes: Shapes) -> tuple[int | None, int | None]:
    """(rows, columns) of the weight as a matrix; None where the tensors do not say."""
    whole = weight_shape(shapes)
    if whole is not None:
        return whole[0], (prod(whole[1:]) if len(whole) > 1 else None)
    if len(shapes.get("down", ())) > 1:
        return None, prod(shapes["down"][1:])
    return None, None
