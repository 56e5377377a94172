"""The one tolerance policy: an implementation may be twice as far from the truth as plain torch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to(out: Tensor, torch_out: Tensor, exact: Tensor) -> None:
    """`‖out - exact‖ <= 2 ‖torch_out - exact‖ + 1e-6` in the max norm; exact in fp64, the others in one dtype."""
    assert exact.dtype == torch.float64, exact.dtype
    assert out.dtype == torch_out.dtype, (out.dtype, torch_out.dtype)
    assert out.shape == torch_out.shape == exact.shape, (out.shape, torch_out.shape, exact.shape)
    assert torch.isfinite(out).all(), "NaN or Inf"
    if exact.numel():
        error = (out.double() - exact).abs().max().item()
        allowed = 2 * (torch_out.double() - exact).abs().max().item() + 1e-6
        assert error <= allowed, f"off by {error:.3e}, allowed {allowed:.3e}"
