"""Text of unknown origin, made safe to show on a terminal."""

import re
import unicodedata

# Characters without a shape that Unicode counts as letters or marks: fillers, variation selectors.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def printable(text: object) -> str:
    r"""Return str(text) in one line that shows all of its characters, for a terminal or a log.

    Escaped as in Python's literals: control characters, among them ESC and the newline; marks of
    text direction; characters of no width; unassigned and private characters; surrogates, which
    stand for the undecodable bytes of a file name. "a\x1b[2J\u202eb" becomes r"a\x1b[2J\u202eb".
    """
    text = str(text)
    if text.isprintable() and not INVISIBLE.search(text):
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    """Return the character, or its escape sequence."""
    shown = character.isprintable() or unicodedata.category(character) == "Zs"  # a space
    if shown and not INVISIBLE.match(character):
        return character
    return character.encode("unicode_escape").decode("ascii")
