"""The errors that a user sees. Scripts print each as one line, without a traceback."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A wrong argument or file. The message names the problem, where, and the fix. Exit code 2."""


class RefusedError(UserError):
    """A filter refused a prompt or an image. Exit code 3.

    verdicts: what the filters say of the refused one, or of each image of a call.
    images: the images of a call, with None in the place of each that was refused.
    """

    def __init__(self, message: str, verdicts: Sequence[Any] = (), images: Sequence[Any] = ()):
        super().__init__(message)
        self.verdicts, self.images = list(verdicts), list(images)


class WriteError(UserError):
    """A file could not be written. Retrying with other inputs does not help."""


class NonFiniteError(ArithmeticError):
    """NaN or infinity in latents or pixels, found before an image is saved. Exit code 1."""


def install_command(extra: str = "") -> str:
    """Return the command that installs this project: from the clone, if the package lies in one."""
    is_clone = Path(__file__).parents[1].joinpath("pyproject.toml").is_file()
    name = "." if is_clone else "flux-ref"
    what = f"'{name}[{extra}]'" if extra else name
    return f"pip install -e {what}" if is_clone else f"pip install {what}"
