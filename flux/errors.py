"""The errors that a user sees. Scripts print each as one line, without a traceback."""


class UserError(ValueError):
    """A wrong argument or file. The message names the problem, where, and the fix. Exit code 2."""


class WriteError(UserError):
    """A file could not be written. Retrying with other inputs does not help."""


class NonFiniteError(ArithmeticError):
    """NaN or infinity in latents or pixels, found before an image is saved. Exit code 1."""
