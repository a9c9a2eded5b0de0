"""Site by site on all cores: one site per worker, one thread per site.

A weight is too small to keep several cores busy inside one call, threads inside one call make the
last bits depend on how many there are, and OpenMP threads that wait for each other are very slow
on a busy machine. Whole sites in parallel avoid all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``work`` of each item, in order, several at a time.

    The first error is raised at its place, and what has not begun is dropped.
    """
    with single_threaded():
        pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)
