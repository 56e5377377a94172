"""One task a thread, for calls that gain little from threads of their own, such as LAPACK's on small matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`[function(item) for item in items]` on torch's thread count, each call on one thread, in the caller's modes."""
    return list(each_in_threads(function, items))


def each_in_threads(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """The same one by one, in their order, as they are done."""
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        yield from map(function, items)
        return
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def call(item: T) -> R:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return function(item)

    try:
        with ThreadPoolExecutor(min(threads, len(items)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(call, items)
    finally:
        torch.set_num_threads(threads)  # what threads to come start with is set by whoever set it last
