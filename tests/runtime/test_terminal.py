"""printable: what steers a terminal or hides is escaped, and everything else stays."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux.runtime.terminal import printable


@pytest.mark.parametrize(
    "text, shown",
    [
        (
            "a cat, 猫, кот, naïve, \U0001f431, 100 %\\n",
            "a cat, 猫, кот, naïve, \U0001f431, 100 %\\n",
        ),
        ("no\xa0break, full\u3000width", "no\xa0break, full\u3000width"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("\x9b31m", r"\x9b31m"),  # CSI in one character
        ("red\nerror: the disk is full\r\n", r"red\nerror: the disk is full\r\n"),
        ("a\tb\v\f\x08\x7f\0", r"a\tb\x0b\x0c\x08\x7f\x00"),
        ("\u202egnp.exe\u202c", r"\u202egnp.exe\u202c"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),  # line separators
        ("a\u200bb\u200db\ufeff\u00ad", r"a\u200bb\u200db\ufeff\xad"),
        ("\U000e0041\ue000\U0010ffff", r"\U000e0041\ue000\U0010ffff"),
        ("\ud800 \udcff.png", r"\ud800 \udcff.png"),  # of a file name with the byte ff
        ("\u3164\u115f\u034f\ufe0f\U000e0100", r"\u3164\u115f\u034f\ufe0f\U000e0100"),
    ],
)
def test_escapes(text, shown):
    assert printable(text) == shown


def test_every_format_character_and_no_letter_is_escaped():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        category = unicodedata.category(character)
        escaped = printable(character) != character
        if category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            assert escaped, hex(code)
        elif category[0] in "PSN" or category == "Zs":
            assert not escaped, hex(code)


@given(st.text())
def test_result_is_one_line_of_text(text):
    shown = printable(text)
    assert len(shown.splitlines()) == bool(text)
    shown.encode()  # has no surrogates
    assert printable(shown) == shown
