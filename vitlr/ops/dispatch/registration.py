"""Operations made known to torch and to dispatch, from their schema and a few functions of their own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.autocast import compute_dtype, register_autocast

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_lib = torch.library.Library("vitlr", "FRAGMENT")


def define(
    schema: str, *, fake: Callable[..., Any], run: Callable[..., Any], flops: Callable[..., int]
) -> torch._ops.OpOverload:
    """Makes `torch.ops.vitlr.<name>` of a schema: `fake` gives shapes, `run` values, `flops` counts.

    All three take what the schema says. It has no defaults: the dispatcher would strip them, and autograd would see
    calls of several lengths. Calls without a tensor that the schema asks for, with one that is not dense, or with
    another first dtype than `DTYPES` end with `InputError`.
    """
    name = schema.partition("(")[0]
    _lib.define(schema)
    torch.library.register_fake(f"vitlr::{name}", _checked(name, fake), lib=_lib)
    _lib.impl(name, _checked(name, run), "CompositeExplicitAutograd")
    packet = getattr(torch.ops.vitlr, name)
    register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None, **_: flops(*args))
    return packet.default


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of an op, after what all ops ask of their tensors."""
    arguments: list[tuple[str, bool]] = []  # name, and whether it must be a tensor: the schema takes µs to say so

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        if not arguments:
            schema = getattr(torch.ops.vitlr, name).default._schema
            arguments.extend((said.name, str(said.type) == "Tensor") for said in schema.arguments)
        for (said, must), value in zip(arguments, args, strict=True):
            if value is None and must:
                raise InputError(f"{name}: {said} is None, expected a tensor")
            if isinstance(value, Tensor) and value.layout != torch.strided:
                raise InputError(f"{name}: {said} has layout {value.layout}, expected a dense tensor")
        if args[0].dtype not in DTYPES:
            first = arguments[0][0]
            raise InputError(f"{name}: {first} is {args[0].dtype}, expected one of {', '.join(map(str, DTYPES))}")
        return function(*args)

    return checked


def short_way(op: torch._ops.OpOverload, run: Callable[..., Any]) -> Callable[..., Any]:
    """Calls of `op` that leave out torch's dispatcher where it would do nothing but pass them on to `run`.

    It takes 30 to 60 µs for lists of tensors, as long as the products of a hundred rows of bytes.
    """
    checked = _checked(op._schema.name.partition("::")[2], run)

    def call(x: Tensor, *rest: Any) -> Any:
        return checked(x, *rest) if unwatched(x) else op(x, *rest)

    return call


def unwatched(x: Tensor) -> bool:
    """Whether x is a plain dense tensor on the CPU, and no gradient, graph, mode or profiler asks for the call."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    if x.layout != torch.strided:
        return False
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    graphs = torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return not (modes or graphs or torch.autograd._profiler_enabled())


@dataclass(frozen=True)
class Ready:
    """Calls of an op of bytes, for x of one shape and dtype, of which all but x and the residual stay as they are.

    To look at a dozen tensors in every call takes as long as the products of fifty rows. Whether they did stay is for
    the caller to know, who holds them.
    """

    name: str
    circumstances: tuple[object, str | None]
    asked: object
    prepared: registry.Prepared

    def holds(self) -> bool:
        """Whether dispatch would do the same now."""
        return registry.circumstances(self.name) == self.circumstances and self.prepared.asked() == self.asked

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.prepared(x, residual)


class RunningOp:
    """An op of bytes, called by the short way: `op(x, *rest)`."""

    def __init__(self, name: str, call: Callable[..., Any], describe: Callable[..., Any]) -> None:
        self._name, self._call, self._describe = name, call, describe

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        return self._call(x, *rest)

    def ready(self, x: Tensor, *rest: Any) -> Ready | None:
        """Calls with this x, or another of its shape and dtype; None where the candidate has no short way for them."""
        circumstances = registry.circumstances(self._name)
        chosen = registry.select(self._name, self._describe(math.prod(x.shape[:-1]), x, *rest))
        if chosen.prepare is None:
            return None
        prepared = chosen.prepare(x, *rest)
        return Ready(self._name, circumstances, prepared.asked(), prepared)


def register_running_op(
    schema: str,
    reference: Callable[..., Tensor],
    *,
    key: type,
    describe: Callable[..., Any],
    roofline: Callable[[Any, registry.Ceilings | None], registry.Roofline],
) -> RunningOp:
    """Makes an op of bytes known, that has no gradient, and gives what calls it by the short way.

    `describe(M, x, *rest)` checks the arguments, x [..., K] first, and returns the `key` of a call of M rows, whose
    last width is that of y; None: they are not known.
    """
    name = schema.partition("(")[0]

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], describe(None, x, *rest).widths[-1]))

    def run(x: Tensor, *rest: Any) -> Tensor:
        return registry.select(name, describe(math.prod(x.shape[:-1]), x, *rest)).run(x, *rest).contiguous()

    def flops(x: Tensor, *rest: Any) -> int:
        return roofline(describe(math.prod(x.shape[:-1]), x, *rest), None).flops

    def refuse(ctx: Any, g: Tensor) -> None:
        why = "layers of bytes are for running; train the model before it gets them"
        raise InputError(f"{name} has no gradient: {why}")

    op = define(schema, fake=fake, run=run, flops=flops)
    torch.library.register_autograd(f"vitlr::{name}", refuse, lib=_lib)
    known = registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",))
    registry.register_op(name, key, roofline, known)
    return RunningOp(name, short_way(op, run), describe)


def register_layer_op(
    schema: str,
    reference: Callable[..., Tensor],
    *,
    key: type,
    describe: Callable[..., Any],
    roofline: Callable[[Any, registry.Ceilings | None], registry.Roofline],
    saved: Callable[..., tuple[Any, ...]],
    backward: Callable[..., tuple[Any, ...]],
    out: Callable[..., tuple[int, ...]] = lambda key, x, *_: (*x.shape[:-1], key.N),
    floor: Callable[[Any, registry.Ceilings], float | None] | None = None,
) -> None:
    """Makes a layer op known: to torch with shapes, autograd, autocast and FLOPs, to dispatch with its reference.

    Arguments of the schema: tensors first, the input x [..., K] before all others, then options.
    `describe(M, *arguments)` checks them and returns the `key` of a call of M rows; None: they are not known, and no
    tensor holds values. `out(key, *arguments)`: the shape of the result. `saved(needs, *arguments)`: the tensors that
    the gradients ask for. `backward(g, needs, *saved, *options)`: a gradient, or None, for every tensor.
    `floor`: of the reference.
    """
    name = schema.partition("(")[0]

    def fake(*args: Any) -> Tensor:
        return args[0].new_empty(out(describe(None, *args), *args))

    def run(*args: Any) -> Tensor:
        return registry.select(name, describe(math.prod(args[0].shape[:-1]), *args)).run(*args).contiguous()

    def flops(*args: Any) -> int:
        return roofline(describe(None, *args)._replace(M=math.prod(args[0].shape[:-1])), None).flops

    op = define(schema, fake=fake, run=run, flops=flops)
    tensors = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)
    rest = (None,) * (len(op._schema.arguments) - tensors)

    def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*saved(ctx.needs_input_grad, *inputs))
        ctx.options = inputs[tensors:]

    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(g, ctx.needs_input_grad, *ctx.saved_tensors, *ctx.options), *rest)

    torch.library.register_autograd(f"vitlr::{name}", gradients, setup_context=setup, lib=_lib)
    register_autocast(_lib, op)
    known = registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",), floor=floor)
    registry.register_op(name, key, roofline, known)


def kernel_chosen(op: str, x: Tensor, *fields: Any) -> bool:
    """Whether dispatch takes a kernel rather than plain torch for x [..., K]; a constant where a graph is traced.

    `fields`: those of the op's key between M and the dtype.
    """
    rows = None if torch.compiler.is_compiling() else math.prod(x.shape[:-1])
    return registry.kernel_chosen(op, rows, *fields, compute_dtype(x), x.device)
