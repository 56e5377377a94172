"""What can go wrong, told apart by what the user can do about it."""

from __future__ import annotations

_MOST = 1200  # letters of a message


class VitlrError(Exception):
    """Base of every error vitlr raises on purpose: one line that says what came, what was expected, what to do."""

    exit_status = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(_short(message))


def _short(message: str) -> str:
    """The message, without its middle where a name in it is long: whoever made a file may have made that up."""
    return message if len(message) <= _MOST else f"{message[: _MOST - 300]} ... {message[-290:]}"


class InputError(VitlrError, ValueError):
    """The input or the usage is wrong (exit status 2): another input will work."""


class RunError(VitlrError, RuntimeError):
    """A run on good input failed (exit status 1): the disk is full, a file could not be written."""

    exit_status = 1


class NumericalError(RunError):
    """The numbers failed (exit status 1): NaN, Inf or no convergence; the message names the layer."""


class ProcessLost(RunError):
    """Another process of the run failed or died (exit status 1, or its own); the message is what it said."""

    def and_then(self, advice: str) -> ProcessLost:
        """The same error, which also says how to go on."""
        error = ProcessLost(f"{self}; {advice}")
        error.exit_status = self.exit_status
        return error


class Interrupted(KeyboardInterrupt):
    """An interrupt whose message says what was kept."""
