"""The world of the embedded models: a grammar of captions and edits, their drawing, and a check.

Nothing here learns or guesses. `draw` renders signed distances, and `check` measures an image with
thresholds, so that the same image always gets the same verdict.
"""

from flux.toy.checking import ATTRIBUTES, check, check_edit, letters_right, score, score_edits
from flux.toy.drawing import draw, framed
from flux.toy.looking import look
from flux.toy.scenes import (
    COLOURS,
    PATTERNS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Edit,
    Item,
    Layout,
    Object,
    Scene,
    Word,
    arrange,
    edits,
    families,
    held_out,
    scenes,
    shows_held_out,
    unknown_words,
)

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "PATTERNS",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Edit",
    "Item",
    "Layout",
    "Object",
    "Scene",
    "Word",
    "arrange",
    "check",
    "check_edit",
    "draw",
    "edits",
    "families",
    "framed",
    "held_out",
    "letters_right",
    "look",
    "scenes",
    "score",
    "score_edits",
    "shows_held_out",
    "unknown_words",
]
