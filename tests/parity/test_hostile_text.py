"""Text from files stays text: on a terminal, in a page, in JSON, in figures.

A file that someone else made may have anything in its tensor names, its recipe and its own name.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux.parity import figures, report
from flux.parity.capture_file import Capture, Writer
from flux.parity.compare import Row, compare, coverage, first_over, table, to_json, verdict

HOSTILE = {
    "markup": "</table><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;",
    "escape": "\x1b]0;pwned\x07\x1b[2J\x9b31m",
    "newline": "x\r\nall 9 tensors are equal to the bit\n",
    "direction": "\u202eevil\u2066\u200b\ufeff",
    "formula": "=HYPERLINK(0)+@-1,2\t;",
    "mathematics": "$\\frac{1}{0}$ \\n %s {0} \\u202e",
    "long": "n" * 5000,
    "large step": f"step.{'9' * 5000}/x",
    "other digits": "step.\u0661\u0662/latents",
}
NAMES = ("step.001/{}", "{}", "{}/out", "double_blocks.0{}/in")
FORBIDDEN = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\u2066\ufeff\ud800-\udfff]")


def names_of(text: str) -> list[str]:
    return [name.format(text) for name in NAMES]


@pytest.fixture(params=HOSTILE.values(), ids=HOSTILE)
def text(request) -> str:
    return request.param


@pytest.fixture
def pair(text, tmp_path) -> tuple[Capture, Capture]:
    """Two captures with the text in every field that takes text; some tensors differ."""
    recipe = {
        "model": text,
        "prompt": text,
        "versions": {text: text},
        "files": {text: [{"file": text, "sha256": text}]},
        text: [text, {text: text}],
    }
    captures = []
    for side in range(2):
        name = re.sub("[/\0]", "_", text)[:100]  # of the file
        path = tmp_path / str(side) / f"{name}.safetensors"
        with Writer(path, recipe | {"stopped": f"{side} {text}"}) as writer:
            writer.add("alone" + text, torch.ones(3 + side))
            for number, tensor_name in enumerate(names_of(text)):
                writer.add(tensor_name, torch.full((1, 4, 3), 1.0 + side * (number % 2)))
            writer.add(f"{side}{text}", torch.ones(2))
        captures.append(Capture(path))
    return captures[0], captures[1]


def test_terminal(pair, text):
    a, b = pair
    rows = compare(a, b)
    assert [row.over for row in rows] == [True, False, True, False, True]
    lines = table(rows, coverage(rows, b, a)).split("\n")
    assert len(lines) == 6 + len(rows)  # verdict, coverage, legend, columns
    assert not FORBIDDEN.search("".join(lines))
    assert lines[0].startswith("3 of 5 tensors are over tolerance; the first is alone")


def test_json(pair, text):
    rows = json.loads(to_json(compare(*pair)), parse_constant=pytest.fail)
    assert [row["name"] for row in rows] == ["alone" + text, *names_of(text)]


def test_json_has_no_nan():
    row = Row("x", (1,), "F32", "full", float("inf"), None)
    assert json.loads(to_json([row]), parse_constant=pytest.fail)[0]["tolerance"] is None


def test_command(pair, text, parity):
    """The whole command: one line a row, and no more on standard error than it has to say."""
    a, b = pair
    code, out, err = parity("compare", a.path, b.path, "--json", "rows.json")
    assert code == 1 and out.count("\n") == 6 + 5 and err == "rows: rows.json\n"
    assert not FORBIDDEN.search(out.replace("\n", ""))


@pytest.mark.slow
def test_page(pair, text):
    pytest.importorskip("matplotlib")
    a, b = pair
    html, pngs = report.page(a, b, compare(a, b))
    page = ElementTree.fromstring(html)
    elements = {element.tag for element in page.iter()}
    assert not elements & {"script", "iframe", "object"} and "table" in elements
    for element in page.iter():
        assert not [name for name in element.keys() if name.startswith("on")]
        for name in ("src", "href"):
            value = element.get(name)
            assert value is None or value == "#first" or value.startswith("data:image/png;base64,")
    cells = {cell.text for row in page.iter("tr") for cell in row}
    allowed = re.sub("[\0-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", text)
    same_newlines = {(cell or "").replace("\r\n", "\n").replace("\r", "\n") for cell in cells}
    assert allowed.replace("\r\n", "\n") in same_newlines
    assert all(png.startswith(b"\x89PNG") for png in pngs.values())


@pytest.mark.slow
def test_page_escapes_shapes_and_dtypes(tmp_path):
    """A reader that lets a text pass for a number makes no script of it."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2)}, path)
    script = "<script>alert(1)</script>"
    row = Row("x", (script,), script, "full", 0.0, None, script)  # type: ignore[arg-type]
    html, _ = report.page(Capture(path), Capture(path), [row])
    assert not list(ElementTree.fromstring(html).iter("script"))


@pytest.mark.slow
def test_figures_of_many_names(tmp_path):
    """Thousands of parts and steps neither fail nor fill the memory."""
    pytest.importorskip("matplotlib")
    tensors = {f"step.{n:03}/part{n}.{n}/out": torch.ones(1) for n in range(2000)}
    save_file(tensors, tmp_path / "b.safetensors")
    save_file({name: 2 * x for name, x in tensors.items()}, tmp_path / "a.safetensors")
    rows = compare(Capture(tmp_path / "a.safetensors"), Capture(tmp_path / "b.safetensors"))
    assert first_over(rows) is rows[0] and "2,000 of 2,000" in verdict(rows)
    for draw in (figures.along_run, figures.by_step):
        assert len(draw(rows)) < 1e6
    assert figures.by_block(rows) is None


def test_path_is_named_not_its_temporary_file(pair, parity):
    a, b = pair
    Path("file").write_text("")
    code, out, err = parity("compare", a.path, b.path, "--json", "file/rows.json")
    assert (code, out) == (2, "") and err.startswith("error: --json: file/rows.json cannot be")
    assert ".part" not in err
