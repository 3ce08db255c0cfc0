"""Arguments as Python programs pass them: numbers of numpy and torch, numbers as text, prompts.

Each function returns a plain Python value. UserError names the argument of any other value.
"""

import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flux.errors import UserError

T = TypeVar("T")


def to_integer(name: str, value: Any) -> int:
    """Return an integer of Python, numpy or torch, or the one that a text spells."""
    try:
        number = _single(value)
        if isinstance(number, str):
            return int(number)
        if not isinstance(number, bool | np.bool_):
            return operator.index(number)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UserError(f"{name}: must be a whole number (got {shown(value)}).")


def to_number(name: str, value: Any) -> float:
    """Return a number of Python, numpy or torch, or the one that a text spells, as a float."""
    try:
        number = _single(value)
        if not isinstance(number, bool | np.bool_ | bytes):
            return float(number)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise UserError(f"{name}: must be a number (got {shown(value)}).")


def _single(value: Any) -> Any:
    """Return the value in an array or tensor of one value; any other value as it is."""
    if isinstance(value, np.ndarray) and value.size == 1:
        return value.reshape(())[()]
    if hasattr(value, "numel") and value.numel() == 1:
        return value.item()
    return value


def to_list(value: Any) -> list:
    """Return the items of a sequence, an array or an iterator; [value] for a text or a scalar."""
    if isinstance(value, str) or getattr(value, "ndim", None) == 0:
        return [value]
    try:
        return list(value)
    except TypeError:
        return [value]


def to_integers(name: str, values: Any) -> list[int]:
    return [to_integer(name, value) for value in to_list(values)]


def to_numbers(name: str, values: Any) -> list[float]:
    return [to_number(name, value) for value in to_list(values)]


def to_flag(name: str, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise UserError(f"{name}: must be True or False (got {shown(value)}).")


def to_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise UserError(f"{name}: must be a text (got {shown(value)}).")


def to_texts(name: str, values: Any) -> list[str]:
    """Return one text or several as a list."""
    texts = to_list(values)
    if all(isinstance(text, str) for text in texts):
        return texts
    raise UserError(f"{name}: must be a text, or a list of texts (got {shown(values)}).")


def to_path(name: str, value: Any) -> Path:
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise UserError(f"{name}: must be the path of a file (got {shown(value)}).")


def optional(convert: Callable[[str, Any], T], name: str, value: Any) -> T | None:
    """Return None, or the converted value."""
    return None if value is None else convert(name, value)


def shown(value: Any) -> str:
    """Return a value as one short line; an array by its type and shape."""
    if getattr(value, "ndim", 0):
        return f"{type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}"
    return f"{' '.join(repr(value).split()):.60}"
