"""Site by site on all cores: one site per worker, one thread per site.

A weight is too small to keep several cores busy inside one call, threads inside one call make the
last bits depend on how many there are, and OpenMP threads that wait for each other are very slow
on a busy machine. Whole sites in parallel avoid all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


#: Threads torch was given at the start (OMP_NUM_THREADS sets it), but no more than keep memory
#: small: each worker holds one weight and its decomposition.
WORKERS = min(torch.get_num_threads(), 8)


@contextmanager
def single_threaded() -> Iterator[None]:
    """torch on one thread per call inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _settle() -> None:
    """Let the math libraries choose their code for this CPU before several threads call them.

    Their first calls, if made at the same time, may take another path and differ in the last bit.
    """
    for dtype in (torch.float32, torch.float64):
        a = torch.arange(64 * 64, dtype=dtype).reshape(64, 64).sin()
        torch.linalg.eigh(a @ a.mT)
        torch.linalg.svd(torch.linalg.qr(a)[0])
        torch.linalg.solve_triangular(
            torch.linalg.cholesky(a @ a.mT + a.new_ones(64).diag()), a, upper=False
        )


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``work`` of each item, in order, several at a time.

    The first error is raised at its place, and what has not begun is dropped.
    """
    with single_threaded():
        _settle()
        pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)
