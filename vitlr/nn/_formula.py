"""What a forward computes, written as a formula: `fc2(act(fc1(x)))`, `fc2(act(fc1(x)[0]) * fc1(x)[1])`.

Attributes alone do not tell (a residual, a gate); the traced graph does, on any device and without running it.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import fx, nn

from vitlr.nn._plain import does_nothing


class Untraceable(Exception):
    """The forward cannot be traced; says so in one line."""


class Formula:
    """Reads the forward of a module step by step, in the names of the children that are `kept`; the input is `x`.

    Others are left out if they do nothing. `E.chunk(2, dim=-1)` gives `halves of E`, one of them is `E[0]` or `E[1]`;
    of a product the activated factor comes first.
    """

    def __init__(self, module: nn.Module, kept: tuple[str, ...] = ()) -> None:
        self.module, self.kept = module, kept
        self.values: dict[fx.Node, str] = {}

    def read(self) -> str:
        """The formula of what is returned; other inputs than x stand before it. Raises `Untraceable`."""
        nodes = self._nodes()
        for node in nodes:
            args = [self._written(arg) for arg in node.args]
            args += [f"{key}={self._written(arg)}" for key, arg in node.kwargs.items()]
            if node.op == "placeholder":
                self.values[node] = self.input(node, first=node is nodes[0])
            else:
                self.values[node] = (self.call if node.op == "call_module" else self.step)(node, args)
        inputs = [self.values[node] for node in nodes if node.op == "placeholder"]
        returned = self.values[nodes[-1]]
        return returned if len(inputs) == 1 else f"{', '.join(inputs)} -> {returned}"

    def input(self, node: fx.Node, first: bool) -> str:
        """What an input is called."""
        return "x" if first else node.name

    def call(self, node: fx.Node, args: list[str]) -> str:
        """What a call of the child `node.target` comes to."""
        if node.target in self.kept:
            return f"{node.target}({', '.join(args)})"
        nothing = args and does_nothing(self.module.get_submodule(str(node.target)))
        return args[0] if nothing else str(node)

    def step(self, node: fx.Node, args: list[str]) -> str:
        """What any other node comes to."""
        if node.op == "output":
            return args[0]
        if node.op == "call_method" and (node.target, args[1:]) == ("chunk", ["2", "dim=-1"]):
            return f"halves of {args[0]}"
        if node.op == "call_function" and node.target is operator.getitem and args[0].startswith("halves of "):
            return f"{args[0].removeprefix('halves of ')}[{args[1]}]"
        if node.op == "call_function" and node.target is operator.mul:
            return " * ".join(sorted(args))  # "act" sorts before "fc1"
        return f"{node.target}({', '.join(args)})"

    def _written(self, arg: Any) -> str:
        return self.values[arg] if isinstance(arg, fx.Node) else str(arg)

    def _nodes(self) -> list[fx.Node]:
        try:
            return list(_LeafTracer().trace(_apart(self.module)).nodes)
        except Exception as error:  # whatever its author wrote: control flow on values, missing arguments ...
            raise Untraceable(f"its forward cannot be traced ({type(error).__name__})") from error


def _apart(module: nn.Module) -> nn.Module:
    """The module with what it keeps of its own: a forward that keeps an activation would leave the tracer's there."""
    twin = copy.copy(module)
    twin.__dict__.update({k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, (dict, list, set))})
    return twin


class _LeafTracer(fx.Tracer):
    """Records calls of children without looking into them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True
