"""Inserts as the tensors that PEFT saves, and back; and what they measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, stack
from torch.nn import functional

from regraft.inserts.insert import Insert, KeysValues, Prompt
from regraft.tuners.bottleneck.parts import Bottleneck


def tensors_of(part: Insert) -> dict[str, Tensor]:
    """The numbers of one insert, by field."""
    return {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}


def energy(part: Insert) -> float:
    """‖x‖², the sum of the squares of all its numbers."""
    return sum(float(t.double().square().sum()) for t in tensors_of(part).values())


def size_of(part: Insert) -> int:
    """Its virtual tokens, or the width of a bottleneck."""
    if isinstance(part, Prompt):
        return part.vectors.shape[0]
    return part.keys.shape[1] if isinstance(part, KeysValues) else part.down.shape[0]


def shape_of(part: Insert) -> tuple[int, ...]:
    """(l, d) of a prompt, (h, l, e) of keys and of values, (n, w, m) of a bottleneck."""
    if isinstance(part, Prompt):
        return tuple(part.vectors.shape)
    if isinstance(part, KeysValues):
        return tuple(part.keys.shape)
    return (part.down.shape[1], part.down.shape[0], part.up.shape[0])


def prefix_table(parts: Sequence[KeysValues]) -> Float[Tensor, "l w"]:
    """A prefix as one row per virtual token: PEFT's ``prompt_embeddings``.

    Parameters
    ----------
    parts : sequence of L KeysValues of (h, l, e)
        In order of layers.

    Returns
    -------
    Tensor of shape (l, 2 L h e)
        Of each layer its keys, then its values; of each of these, head after head.
    """
    both = stack([side for part in parts for side in (part.keys, part.values)])
    return both.permute(2, 0, 1, 3).flatten(1).contiguous()


def prefix_parts(table: Float[Tensor, "l w"], layers: int, heads: int) -> list[KeysValues]:
    """What :func:`prefix_table` was made of.

    Parameters
    ----------
    table : Tensor of shape (l, 2 L h e)
    layers, heads : int
        L and h; their product times two divides the width.
    """
    tokens = len(table)
    both = table.reshape(tokens, 2 * layers, heads, -1).permute(1, 2, 0, 3)
    return [
        KeysValues(both[2 * i].contiguous(), both[2 * i + 1].contiguous()) for i in range(layers)
    ]


def of_one_width(adapters: Mapping[str, Bottleneck]) -> dict[str, Bottleneck]:
    """The same functions in one width, which is all that a config can say.

    Narrower ones get rows of zeros in W_down and b_down and columns of zeros in W_up: what comes
    out of such a row, f(0), is multiplied by zero.
    """
    width = max((len(part.down) for part in adapters.values()), default=0)
    return {name: _padded(part, width - len(part.down)) for name, part in adapters.items()}


def _padded(part: Bottleneck, more: int) -> Bottleneck:
    if not more:
        return part
    return replace(
        part,
        down=functional.pad(part.down, (0, 0, 0, more)),
        down_bias=functional.pad(part.down_bias, (0, more)),
        up=functional.pad(part.up, (0, more)),
    )
