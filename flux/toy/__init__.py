"""The world of the embedded models: a grammar of captions and edits, their drawing, and a check.

Nothing here learns or guesses. `draw` renders signed distances, and `check` measures an image with
thresholds, so that the same image always gets the same verdict.
"""

from flux.toy.checking import (
    ATTRIBUTES,
    check,
    check_edit,
    letters_right,
    score,
    score_edits,
    shows_a_whole_thing,
)
from flux.toy.drawing import draw, framed
from flux.toy.looking import look
from flux.toy.open_prompts import fixed_prompts, open_prompts, plain_words, strange_prompts
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
    alike,
    arrange,
    edits,
    families,
    held_out,
    scenes,
    shows_held_out,
    unknown_words,
)
from flux.toy.wording import describe, leave_open, reworded, strange, worded

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
    "alike",
    "arrange",
    "check",
    "check_edit",
    "describe",
    "draw",
    "edits",
    "families",
    "fixed_prompts",
    "framed",
    "held_out",
    "leave_open",
    "letters_right",
    "look",
    "open_prompts",
    "plain_words",
    "reworded",
    "scenes",
    "score",
    "score_edits",
    "shows_a_whole_thing",
    "shows_held_out",
    "strange",
    "strange_prompts",
    "unknown_words",
    "worded",
]
