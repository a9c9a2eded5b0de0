"""The loop for everything the lab trains: resumable, the same however often it stops."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import Parameter

EMA_DECAY = 0.998


def train(
    parameters: Sequence[Parameter],
    loss_of: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    checkpoint: Path,
    weight_decay: float = 1e-3,
    warmup: int = 100,
    save_every: int = 250,
    ema: bool = True,
    stop: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train ``parameters`` with AdamW on a cosine schedule; resumes from ``checkpoint``.

    ``loss_of`` draws one batch from the generator it is given and returns its loss. The generator
    is seeded by (seed, step), so an interrupted run goes on exactly as it would have. ``stop``
    ends early on a schedule made for ``steps``. With ``ema`` the weights' running average is what
    remains at the end.
    Returns steps, seconds and the mean loss of each tenth of the run.
    """
    average = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(
        parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), foreach=True
    )
    losses: list[float] = []
    spent = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for p, a, kept, kept_average in zip(
            parameters, average, state["weights"], state["average"], strict=True
        ):
            p.data.copy_(kept)
            a.copy_(kept_average)
        optimiser.load_state_dict(state["optimiser"])
        losses, spent = state["losses"], state["seconds"]
    started = time.monotonic() - spent
    last = steps if stop is None else stop
    # a bar for people; where the output goes to a file, the lines of ``log`` are enough
    bar = track(range(len(losses), last), "training", disable=not sys.stdout.isatty())
    for step in bar:
        rate = lr * min(1.0, (step + 1) / warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.005
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = loss_of(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        decay = min(EMA_DECAY, (step + 1) / (step + 10)) if ema else 0.0
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        done = step + 1
        if done % save_every == 0 or done == last:
            _save(checkpoint, parameters, average, optimiser, losses, time.monotonic() - started)
        if done % 100 == 0 or done == last:
            recent = float(np.mean(losses[-100:]))
            seconds = time.monotonic() - started
            left = seconds / done * (last - done)
            log(f"step {done}/{last} loss {recent:.4f} {seconds:.0f} s, {left:.0f} s left")
    for p, a in zip(parameters, average, strict=True):
        p.data.copy_(a)
    parts = np.array_split(np.array(losses), min(10, len(losses)))
    return {
        "steps": last,
        "lr": lr,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "loss_by_tenth": [round(float(np.mean(part)), 4) for part in parts],
    }


def _save(
    checkpoint: Path,
    parameters: Sequence[Parameter],
    average: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
    losses: list[float],
    seconds: float,
) -> None:
    """Write the state beside its name, then rename: a kill leaves the last whole one."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "weights": [p.detach() for p in parameters],
        "average": list(average),
        "optimiser": optimiser.state_dict(),
        "losses": losses,
        "seconds": seconds,
    }
    torch.save(state, checkpoint.with_suffix(".tmp"))
    checkpoint.with_suffix(".tmp").replace(checkpoint)
