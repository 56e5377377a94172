"""What can go wrong, told apart by what the user can do about it."""


class VitlrError(Exception):
    """Base of every error vitlr raises on purpose: one line that says what came, what was expected, what to do."""

    exit_status = 2


class InputError(VitlrError, ValueError):
    """The input or the usage is wrong (exit status 2): another input will work."""


class RunError(VitlrError, RuntimeError):
    """A run on good input failed (exit status 1): the disk is full, a file could not be written."""

    exit_status = 1


class NumericalError(RunError):
    """The numbers failed (exit status 1): NaN, Inf or no convergence; the message names the layer."""


class Interrupted(KeyboardInterrupt):
    """An interrupt whose message says what was kept."""
