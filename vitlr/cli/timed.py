"""Throughput for commands: batch size after batch size, and compilers that fail say so in a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from vitlr.errors import RunError
from vitlr.measuring import timing
from vitlr.runtime.progress import bar


def throughputs(
    runners: Mapping[str, nn.Module], sizes: Sequence[int], input_size: Sequence[int], repeats: int, flag: str
) -> list[dict[str, dict[str, float]]]:
    """`timing.throughput` of each batch size. Raises `RunError` where compiling fails: `flag` is to be left out."""
    found = []
    with bar("measuring", len(sizes), "batch sizes") as progress:
        for size in sizes:
            try:
                found.append(timing.throughput(runners, size, input_size=input_size, repeats=repeats))
            except Exception as cause:
                if type(cause).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    first = str(cause).strip().splitlines()[0]
                    raise RunError(f"torch.compile failed: {first}; leave {flag} out") from cause
                raise
            progress(len(found), len(sizes))
    return found
