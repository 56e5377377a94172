"""A linear layer of which whole input or output channels are gone, between neighbours that keep their width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._weightless import Weightless
from vitlr.nn.lowrank_linear import LowRankLinear

INDEX_BYTES = 8  # of one channel number that a checkpoint stores


class SelectedLinear(Weightless):
    """`y[o] = linear(x[i])`, zero elsewhere: x [..., K] -> y [..., N], i and o the channels that are left.

    `linear` (an `nn.Linear` or a `LowRankLinear`) has only the weights that are left. `inputs` [K'] and `outputs` [N']
    are increasing channel numbers, kept as buffers; None where all are left. Selecting inputs suits a layer behind the
    residual stream, which keeps its width; zeros in the output suit an attention that splits it into heads.
    Raises InputError for channels that are none, repeated or out of range.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations
        inputs: Tensor | None
        outputs: Tensor | None

    def __init__(
        self,
        linear: nn.Module,
        in_features: int,
        out_features: int,
        inputs: Sequence[int] | Tensor | None = None,
        outputs: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        _check(linear)
        self.in_features, self.out_features = in_features, out_features
        self.linear = linear
        first = next(linear.parameters())
        for name, chosen, has, size in (
            ("inputs", inputs, linear.in_features, in_features),
            ("outputs", outputs, linear.out_features, out_features),
        ):
            index = None if chosen is None else _index(name, chosen, size).to(first.device)
            if (size if index is None else len(index)) != has:
                raise InputError(f"{name}: the linear has {has}, expected {size if index is None else len(index)}")
            self.register_buffer(name, index)
        self.training = linear.training

    @property
    def bias(self) -> Any:
        """That of the linear, of the channels that are left, or None: a parent may ask whether there is one."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = x.index_select(-1, self.inputs)
        y = self.linear(x)
        if self.outputs is None:
            return y
        full = y.new_zeros(list(y.shape[:-1]) + [self.out_features])  # noqa: RUF005 (TorchScript knows no stars)
        return full.index_copy_(-1, self.outputs, y)  # in place: the zeros are nobody else's

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Module,
        inputs: Sequence[int] | Tensor | None = None,
        outputs: Sequence[int] | Tensor | None = None,
    ) -> SelectedLinear:
        """Keep the named channels of an `nn.Linear` or a `LowRankLinear` (its factors B and A lose theirs).

        The result is the same function of the inputs that are left, with zeros in place of the outputs that are not.
        A rank that no longer fits what is left is multiplied out.
        """
        _check(linear)
        K, N = int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
        columns = None if inputs is None else _index("inputs", inputs, K)
        rows = None if outputs is None else _index("outputs", outputs, N)
        small: nn.Module
        if isinstance(linear, LowRankLinear):
            small = _select_factors(linear, columns, rows)
        else:
            assert isinstance(linear, nn.Linear)
            small = _select(linear, columns, rows)
        return cls(small.train(linear.training), K, N, columns, rows)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer of the same function: zero columns and rows where channels are gone."""
        linear: Any = self.linear if isinstance(self.linear, nn.Linear) else self.linear.to_linear()  # type: ignore[operator]
        weight, bias = linear.weight, linear.bias
        dense = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        rows = torch.arange(self.out_features, device=weight.device) if self.outputs is None else self.outputs
        columns = torch.arange(self.in_features, device=weight.device) if self.inputs is None else self.inputs
        W = weight.new_zeros(self.out_features, self.in_features)
        W[rows[:, None], columns] = weight
        dense.weight = nn.Parameter(W)
        if bias is not None:
            b = bias.new_zeros(self.out_features)
            b[rows] = bias
            dense.bias = nn.Parameter(b)
        return dense.train(self.training)

    def describe(self) -> dict[str, Any]:
        """Sizes, and how many channels are left (None where all are), as plain values."""
        up = getattr(self.linear, "up", self.linear)
        counts = {name: None if (i := getattr(self, name)) is None else len(i) for name in ("inputs", "outputs")}
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**counts, **sizes, "bias": up.bias is not None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, size in (("inputs", self.in_features), ("outputs", self.out_features)):
            index = state_dict.get(f"{prefix}{name}")
            if index is not None and not index.is_meta:
                _index(f"{prefix}{name}", index, size)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _check(linear: nn.Module) -> None:
    if not isinstance(linear, (nn.Linear, LowRankLinear)):
        raise InputError(f"SelectedLinear holds a linear or a LowRankLinear, got {type(linear).__name__}")


def _index(name: str, chosen: Sequence[int] | Tensor, size: int) -> Tensor:
    index = torch.as_tensor(chosen)
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32) or not len(index):
        raise InputError(f"{name}: expected at least one channel number, got {index.dtype} {list(index.shape)}")
    index = index.long()
    if index[0] < 0 or index[-1] >= size or bool((index[1:] <= index[:-1]).any()):
        raise InputError(f"{name}: expected increasing channel numbers from 0 to {size - 1}")
    return index.clone()


def _select(linear: nn.Linear, columns: Tensor | None, rows: Tensor | None) -> nn.Linear:
    W, b = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if columns is not None:
        W = W[:, columns.to(W.device)]
    if rows is not None:
        W = W[rows.to(W.device)]
        b = None if b is None else b[rows.to(b.device)]
    small = nn.Linear(W.shape[1], W.shape[0], b is not None, device="meta")
    small.weight = nn.Parameter(W.clone(), linear.weight.requires_grad)
    if b is not None:
        small.bias = nn.Parameter(b.clone(), linear.bias.requires_grad)
    return small


def _select_factors(linear: LowRankLinear, columns: Tensor | None, rows: Tensor | None) -> nn.Module:
    down, up = _select(linear.down, columns, None), _select(linear.up, None, rows)
    if linear.rank > min(down.in_features, up.out_features):
        dense = nn.Linear(down.in_features, up.out_features, up.bias is not None, device="meta")
        dense.weight = nn.Parameter((up.weight.double() @ down.weight.double()).to(up.weight.dtype))
        if up.bias is not None:
            dense.bias = up.bias
        return dense
    small = LowRankLinear(down.in_features, up.out_features, linear.rank, up.bias is not None, device="meta")
    small.down, small.up = down, up
    return small
