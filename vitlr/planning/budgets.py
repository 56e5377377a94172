"""What may be kept, as users write it: `params:40%`, `params:2.5M`, `macs:50%`, `bytes:10MB`, `latency:12ms`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitlr.errors import InputError
from vitlr.runtime.sizes import in_units

if TYPE_CHECKING:  # budgets are read before torch is there
    from vitlr.decomposition.spectra import Spectra

QUANTITIES = ("params", "macs", "bytes")  # counted; milliseconds are measured
LATENCY = "latency"
_MS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d{1,3}))?\s*(%|[uµm]?s|[kmg]i?b?|b)?", re.IGNORECASE)
_EXPECTED = "expected what is KEPT, as in params:40%, params:2.5M, macs:1.2G, bytes:10MB, latency:50% or latency:12ms"


class OutOfReach(InputError):
    """A budget below the smallest plan, which takes `least` of the quantity by these `spectra`."""

    def __init__(self, message: str, least: float, spectra: Spectra) -> None:
        super().__init__(message)
        self.least, self.spectra = least, spectra


@dataclass(frozen=True)
class Budget:
    """At most `amount` of `quantity` is kept: in units or, where `relative`, as a share of the dense model.

    The unit of latency is a millisecond for one batch.
    """

    quantity: str
    amount: float
    relative: bool

    def limit(self, total: float) -> float:
        """The budget in units, given the dense model's total."""
        return self.amount * total if self.relative else self.amount

    def __str__(self) -> str:
        if self.relative:
            return f"{self.quantity}:{self.amount * 100:.10g}%"
        return f"{self.quantity}:{self.amount:.10g}{'ms' * (self.quantity == LATENCY)}"


def is_timed(budget: str | Budget | None) -> bool:
    """Whether a budget counts milliseconds."""
    return budget is not None and parse_budget(budget).quantity == LATENCY


def counted(text: str | Budget) -> Budget:
    """Read a budget of what is counted; `InputError` for one of milliseconds, too."""
    budget = parse_budget(text)
    if budget.quantity == LATENCY:
        raise InputError(f"{budget} is measured, and one of many is not: give it to vitlr compress, or count macs here")
    return budget


def parse_budget(text: str | Budget) -> Budget:
    """Read a budget; raises `InputError` with what is expected where it cannot be read."""
    if isinstance(text, Budget):
        return text
    quantity, colon, rest = str(text).strip().partition(":")
    quantity = quantity.strip().lower()
    match = _NUMBER.fullmatch(rest.strip())
    if quantity not in (*QUANTITIES, LATENCY) or not colon or match is None:
        raise InputError(f"budget {text!r} cannot be read; {_EXPECTED}")
    unit = (match[3] or "").lower()
    number = float(f"{match[1]}e{match[2] or 0}")
    if unit == "%":
        amount, relative = number / 100, True
    elif (unit in _MS) != (quantity == LATENCY):
        what = f"{match[3]} is no unit of {quantity}" if unit else f"write latency:{number:g}ms or latency:{number:g}%"
        raise InputError(f"budget {text!r}: {what}; {_EXPECTED}")
    elif unit in _MS:
        amount, relative = number * _MS[unit], False
    else:
        if unit.endswith("b") and quantity != "bytes":
            raise InputError(f"budget {text!r}: {match[3]} is a unit of bytes, not of {quantity}; {_EXPECTED}")
        amount, relative = in_units(number, unit), False
    if not relative and not unit and 0 < amount <= 100:
        percent = number * 100 if number < 1 else number
        raise InputError(f"budget {text!r} would keep {number:g} {quantity}; for a share write {quantity}:{percent:g}%")
    if not 0 < amount < float("inf") or (relative and amount > 1):
        raise InputError(f"budget {text!r} is out of range: what is kept lies above 0 and up to 100 %")
    return Budget(quantity, amount, relative)
