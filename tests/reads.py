"""What a host waits for on a device that runs behind, counted."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    """Counts what a host waits for: values that are looked at, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.WAITING
        return func(*args, **(kwargs or {}))
