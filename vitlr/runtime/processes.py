"""Several processes of one run, as torchrun starts them: which one this is, its share, and how all come to one answer.

Without a process group, everything here hands back what it was given and costs nothing. Whatever differs from process
to process (clocks, files, sums) is decided by process 0 or added up in a fixed order, so that all go the same way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitlr.errors import InputError, ProcessLost, VitlrError
from vitlr.runtime.launch import LOCAL_RANK, launched

T = TypeVar("T")
R = TypeVar("R")
_PATIENCE = timedelta(hours=2)  # with a process that is alive: one may solve large layers while the others wait
_WORDS = "vitlr/words"  # what a process that failed leaves for process 0 to say
_store: Any = None  # where; the launcher's, which outlives the process


def rank() -> int:
    """Which process this is, from 0."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def world() -> int:
    """How many there are."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def first() -> bool:
    """Whether this is the one that writes files, speaks and draws."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this process's: every `world()`-th."""
    return items if world() == 1 else items[rank() :: world()]


def gather(value: T) -> list[T]:
    """The values of all, in order of rank, everywhere; for what is small."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    _call("all_gather_object", found, value)
    return found


def from_rank(source: int, value: T) -> T:
    """The value that one process has, everywhere."""
    if world() == 1:
        return value
    box: list[Any] = [value if rank() == source else None]
    _call("broadcast_object_list", box, source)
    return value if rank() == source else box[0]


def agreed(decide: Callable[[], T]) -> T:
    """What process 0 decides, everywhere; for what depends on a clock."""
    return decide() if world() == 1 else from_rank(0, decide() if first() else None)  # type: ignore[return-value]


def shared_out(
    work: Callable[[Sequence[T]], Iterable[R]], items: Sequence[T], told: Callable[[int], None] = lambda done: None
) -> Iterator[R]:
    """`work(items)`, which answers each in its order: a process works on its share, and all get all answers.

    What one of them raises of our own errors, all raise. `told` hears of how many are done, about.
    """
    if world() == 1:
        yield from work(items)
        return
    own: list[tuple[bool, Any]] = []
    try:
        for answer in work(share(items)):
            own.append((True, answer))
            told(min(len(own) * world(), len(items)))
    except VitlrError as cause:
        own.append((False, cause))
    for place in range(len(items)):
        source, turn = place % world(), place // world()
        mine: Any = own[turn] if source == rank() else None
        fine, found = from_rank(source, mine)
        if not fine:
            raise found
        yield found


def sum_in_order(tensors: Iterable[Tensor], joins: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
    """In process 0, in place: `t_0 + (t_1 + (t_2 + …))`, whoever comes first; elsewhere what is left is part of it.

    Each adds what the next one sends to its own and hands that on: all links are busy as soon as there are as many
    tensors as processes, and none carries a tensor twice. `joins` may stand for the sum.
    """
    if world() == 1:
        return
    for own in tensors:
        sent = _on_wire(own)
        if rank() + 1 < world():
            received = torch.empty_like(sent)
            _call("recv", received, rank() + 1)
            sent = joins(sent, received)
            own.copy_(sent)
        if rank():
            _call("send", sent, rank() - 1)


def spread(tensors: Iterable[Tensor]) -> None:
    """Process 0's, everywhere, in place."""
    if world() == 1:
        return
    for own in tensors:
        sent = _on_wire(own)
        _call("broadcast", sent, 0)
        own.copy_(sent)


def total(tensor: Tensor) -> Tensor:
    """The sum of everyone's, everywhere the same to the bit."""
    if world() == 1:
        return tensor
    found = tensor.detach().clone()
    sum_in_order([found])
    spread([found])
    return found


def part(batch: Tensor) -> tuple[slice, float]:
    """Which rows of a batch `[images, ...]` are this process's, and their weight in a mean over all: parts sum to 1.

    Of fewer images than processes everyone takes all.
    """
    if len(batch) < world():
        return slice(None), 1 / world()
    own = slice(rank(), None, world())
    return own, len(batch[own]) / len(batch)


def check_same(what: str, fingerprint: object) -> None:
    """Raise `InputError` where processes begin with other weights: all must have the same from start to end."""
    if len(set(gather(fingerprint))) > 1:
        raise InputError(f"every process has a {what} of other weights; give all the same, from one file or one seed")


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """The group of the processes that a launcher started, for as long as this lasts: gloo on CPUs, NCCL on GPUs.

    Nothing where there was no launcher, or a group is there already.
    """
    global _store
    if not launched() or _group() is not None:
        yield
        return
    import torch.distributed as dist

    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    _store, number, count = next(dist.rendezvous("env://", timeout=_PATIENCE))
    dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=_PATIENCE)
    yield
    dist.destroy_process_group()  # only where all went well: it may wait for those that did not


def place(device: str | None) -> str | None:
    """The GPU of its own where a launcher started several processes and nobody named one by number."""
    if launched() and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get(LOCAL_RANK, '0')}"
    return device


def leave_words(message: str, status: int) -> None:
    """Leave what went wrong here for process 0 to say: others are silent."""
    if _store is not None and not first():
        _store.set(_WORDS, f"{status} {message} (process {rank()} of {world()})")


def words() -> tuple[int, str] | None:
    """The exit status and the message that a process left; None where none did, or died without."""
    try:
        if _store is None or not _store.check([_WORDS]):
            return None
        status, _, message = _store.get(_WORDS).decode().partition(" ")
        return int(status), message
    except (RuntimeError, ValueError):  # the store went with the launcher
        return None


def lost(cause: BaseException) -> ProcessLost:
    """The error of a process that waited for one that is not there any more."""
    status, message = words() or (ProcessLost.exit_status, "another process of this run died, so it cannot go on")
    error = ProcessLost(message)
    error.exit_status, error.__cause__ = status, cause
    return error


def _group() -> Any:
    """torch.distributed where it has a group; not imported for that."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _call(name: str, *given: Any) -> None:
    try:
        getattr(_group(), name)(*given)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as cause:
        raise lost(cause) from cause


def _on_wire(tensor: Tensor) -> Tensor:
    """The tensor, without gaps, on a device that the group's backends send from."""
    backends = dict(pair.split(":") for pair in _group().get_backend_config().split(","))
    tensor = tensor.detach().contiguous()
    if tensor.is_cuda and backends.get("cuda") != "nccl":
        return tensor.cpu()
    return tensor.cuda() if not tensor.is_cuda and backends.get("cpu") != "gloo" else tensor
