"""Hidden states after each block of a model, gathered with forward hooks.

Models with other resolutions or tokenizers have other positions, so by default each input becomes
one row per block: the mean over its positions. The n-th row is then the n-th input in every model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regraft.errors import BadOption

Pool = Literal["mean", "positions"]

#: Lists of a U-Net whose members are opened: their own lists (resnets, attentions, samplers)
#: hold the blocks that hand states on.
_OPENED = ("down_blocks", "up_blocks")


def block_names(model: nn.Module) -> list[str]:
    """The blocks of a model: the members of its outermost ``ModuleList``s.

    For transformers models those are the layers; for a diffusers U-Net, each resnet, attention and
    resampler of its down, mid and up blocks. A list inside a block is part of that block.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.rpartition(".")[2] in _OPENED:
            continue
        if not any(name.startswith(f"{block}.") for block in found):
            found += [f"{name}.{i}" for i in range(len(module))]
    return found


def gather(
    model: nn.Module,
    run: Callable[[nn.Module], object],
    *,
    blocks: Sequence[str] | None = None,
    pool: Pool = "mean",
) -> dict[str, Float[Tensor, "n _"]]:
    """Run a model and keep the hidden states after each block.

    Parameters
    ----------
    model : nn.Module
        Put in eval mode meanwhile; its hooks and mode are as before afterwards, also on error.
    run : callable
        Is given the model and calls it as often as it likes; rows are appended call by call, so the
        inputs must come in the same order for models that will be compared.
    blocks : sequence of str, optional
        Module names. Default :func:`block_names`.
    pool : str
        "mean": one row per input, the mean over positions. "positions": one row per position, for
        models whose positions correspond (the same tokens, the same image size).

    Returns
    -------
    dict of str to Tensor of shape (n, features)
        fp32, on the CPU, in the order in which the blocks first ran; blocks that did not run are
        left out.

    Raises
    ------
    BadOption
        No block by these names, an unknown ``pool``, or an output that is no hidden state.

    Notes
    -----
    States of shape (batch, positions, features) and (batch, channels, height, width) are pooled;
    (batch, features) is taken as it is. Padding counts for nothing when the model is called with
    ``attention_mask=`` (1 = a real position, shape (batch, positions)).
    """
    if pool not in ("mean", "positions"):
        raise BadOption(f"No pooling {pool!r}.", fix="Choose mean or positions.")
    names = block_names(model) if blocks is None else list(blocks)
    modules = dict(model.named_modules())
    absent = [name for name in names if name not in modules]
    if absent or not names:
        what = f"The model has no module {absent[0]!r}." if absent else "The model has no blocks."
        raise BadOption(what, fix="Name the modules whose outputs are wanted.")
    rows: dict[str, list[Tensor]] = defaultdict(list)
    mask: list[Tensor | None] = [None]

    def remember_mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("attention_mask")
        mask[0] = given if isinstance(given, Tensor) and given.ndim == 2 else None

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            rows[name].append(_rows(_state(output, name), mask[0], pool).float().cpu())

        return hook

    handles = [model.register_forward_pre_hook(remember_mask, with_kwargs=True)]
    handles += [modules[name].register_forward_hook(keep(name)) for name in names]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _state(output: Any, name: str) -> Tensor:
    """The hidden state in a block's output: itself, or the first of a tuple or model output."""
    first = output
    if isinstance(output, dict):
        first = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        first = output[0] if output else None
    if not isinstance(first, Tensor) or first.ndim not in (2, 3, 4):
        raise BadOption(
            f"The module {name!r} does not return a hidden state.",
            fix="Name modules that return a tensor of 2, 3 or 4 dimensions, batch first.",
        )
    return first


def _rows(state: Tensor, mask: Tensor | None, pool: Pool) -> Float[Tensor, "n _"]:
    if state.ndim == 2:
        return state
    grid = state.flatten(2).mT if state.ndim == 4 else state
    real = torch.ones(grid.shape[:2], dtype=torch.bool, device=grid.device)
    if mask is not None and mask.shape == grid.shape[:2]:
        real = mask.to(grid.device).bool()
    if pool == "positions":
        return grid[real]
    # fp32 before the sum: half precision overflows over many positions.
    total = (grid.float() * real[..., None]).sum(dim=1)
    return total / real.sum(dim=1, keepdim=True).clamp_min(1)
