"""The ways in which a run is refused. Scripts print either as one line, without a traceback."""


class UserError(ValueError):
    """A mistake in what was asked for: one sentence that names what is wrong, where, and what to do. Exit code 2."""


class WriteError(UserError):
    """What was asked for is in order, but a file could not be written: nothing that leaving out an input would mend."""


class NonFiniteError(ArithmeticError):
    """NaN or infinity in latents or pixels: names the step, so that no black picture is ever written. Exit code 1."""
