"""flux/parity/{plots,charts,report}.py and `parity.py report`: the page says what the comparison says, and nothing is fetched.

Captures are written by hand: small random tensors under the names of a run, so that each error is known in closed form.
Coordinates on logarithmic axes are worked out in the tests.
"""

import base64
import io
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux.errors import UserError
from flux.image_io import output as images
from flux.parity import charts, report
from flux.parity.capture_file import Capture, Writer
from flux.parity.compare import Row, compare, first_over
from flux.parity.page import STYLE
from flux.parity.plots import (
    DARK,
    EDGES,
    LIGHT,
    WITHIN,
    Box,
    Diamond,
    Dots,
    Drawing,
    Label,
    Line,
    LogScale,
    shade,
)

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/parity.py"
TEXT, HEIGHT, WIDTH, REFERENCES = (
    5,
    3,
    4,
    2,
)  # tokens of text, rows and columns of the latent grid, tokens of a reference
RECIPE = {
    "model": "flux.2-tiny",
    "prompt": "a cat",
    "dtype": "float64",
    "versions": {"torch": "2.13.0"},
    "schedule": [1.0, 0.0],
}
BUDGET = 0.01


def a_run(steps: int = 2) -> dict[str, Tensor]:
    """Tensors by name, in the order of execution, of a run with one reference."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    own = [[0, row, column] for row in range(HEIGHT) for column in range(WIDTH)]
    ids = torch.tensor(own + [[10, 0, column] for column in range(REFERENCES)])
    out = {
        "text/model/layers.0/out": random(1, TEXT, 8),
        "noise": random(1, 4, HEIGHT, WIDTH),
        "ids/img": ids,
    }
    for step in range(1, steps + 1):
        out |= {
            f"step.{step:03}/img_in/out": random(1, len(ids), 8),
            f"step.{step:03}/double_blocks.0.txt_attn.qkv/out": random(1, TEXT, 24),
            f"step.{step:03}/double_blocks.0/out.0": random(1, len(ids), 8),
            f"step.{step:03}/double_blocks.0/out.1": random(1, TEXT, 8),
            f"step.{step:03}/single_blocks.0/attention/q": random(1, 2, TEXT + len(ids), 4),
            f"step.{step:03}/single_blocks.0/out": random(1, TEXT + len(ids), 8),
            f"step.{step:03}/velocity": random(1, HEIGHT * WIDTH, 4),
            f"step.{step:03}/latents": random(1, 4, HEIGHT, WIDTH),
        }
    picture = torch.randint(60, 200, (24, 32, 3), generator=draw).byte()
    return out | {"decoder/decoder.conv_in/out": random(1, 6, 8, 10), "picture": picture}


def off_by(error: float) -> float:
    """A factor that makes a relative L2 of `error`."""
    return 1 + error


class Pair:
    """Two captures of the same run; `b` is the reference."""

    def __init__(self, folder: Path):
        self.folder, self.a, self.b, self.recipes = (
            folder,
            a_run(),
            a_run(),
            [dict(RECIPE), dict(RECIPE)],
        )

    def write(self, *kinds: str) -> tuple[Capture, Capture]:
        captures = []
        for name, tensors, recipe, kind in zip(
            "ab", (self.a, self.b), self.recipes, kinds or ("full", "full")
        ):
            path = self.folder / f"{name}.safetensors"
            path.unlink(missing_ok=True)
            with Writer(path, recipe) as writer:
                for key, tensor in tensors.items():
                    writer.add(key, tensor, kind)
            captures.append(Capture(path))
        return tuple(captures)

    def page(self, *kinds: str) -> tuple[ElementTree.Element, list[Row]]:
        a, b = self.write(*kinds)
        rows = compare(a, b, BUDGET)
        return ElementTree.fromstring(report.page(a, b, rows)[0]), rows


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path)


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def all_rows(page: ElementTree.Element) -> list[ElementTree.Element]:
    return [
        row
        for table in page.iter("table")
        if table.get("class") == "rows"
        for row in table.find("tbody")
    ]


def marked(row: ElementTree.Element) -> bool:
    return row.get("class") == "over" and row[0].text == "◆"


# ---------------------------------------------------------------- the page


def test_nothing_comes_from_elsewhere(pair):
    pair.a["step.002/velocity"] = pair.b["step.002/velocity"] * 1.5
    pair.a["picture"] = pair.b["picture"] + 3
    page, _ = pair.page()
    assert page.tag == "html"
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "use", "image"} & {
        e.tag for e in page.iter()
    }
    sources = [
        (e.tag, e.get(key))
        for e in page.iter()
        for key in e.keys()
        if key in ("src", "href", "srcset", "data", "action")
    ]
    pictures = [value for tag, value in sources if tag == "img"]
    assert len(pictures) == 3 and all(
        value.startswith("data:image/png;base64,") for value in pictures
    )
    assert [source for source in sources if source[0] != "img"] == [("a", "#first")]
    assert [e.find("th").text for e in page.iter() if e.get("id") == "first"] == [
        "step.002/velocity"
    ]
    assert not [e for e in page.iter() for key in e.keys() if key.startswith("on")]
    text = re.sub(
        r"data:image/png;base64,[\w+/=]*", "", ElementTree.tostring(page, encoding="unicode")
    )
    assert not re.search(r"https?:|url\(|@import|//\w", text)


def test_every_row_with_the_numbers_of_the_comparison(pair):
    for number, name in enumerate(pair.a):
        if number % 3 and name not in ("ids/img", "picture"):
            pair.a[name] = pair.b[name] + torch.randn(
                pair.b[name].shape, dtype=torch.float64
            ) * 10.0 ** -(number % 5)
    page, rows = pair.page()
    lines = all_rows(page)
    assert [line.find("th").text for line in lines] == list(pair.b) == [row.name for row in rows]
    assert any(row.over for row in rows) and not all(row.over for row in rows)
    for line, row in zip(lines, rows):
        e, cells = row.errors, [text_of(cell) for cell in line]
        assert marked(line) == row.over
        assert cells[2] == f"{'×'.join(map(str, row.shape))} {row.dtype}"
        shown = [float(cell) for cell in (cells[3], cells[4], cells[6], cells[8])]
        assert shown == [
            float(f"{x:.2e}") for x in (e.relative_l2, row.budget, e.worst_token, e.max_abs)
        ]
        assert float(cells[5]) == float(f"{row.ratio:.2g}") and float(cells[7]) == float(
            f"{e.norm_ratio - 1:.1e}"
        )
        assert float(cells[9]) == float(f"{1 - e.pcc:.2e}") and [
            float(n.replace(",", "")) for n in cells[10].split(" / ")
        ] == [n if n < 10_000 else float(f"{n:.0e}") for n in e.ulp]


def test_the_verdict_is_on_top(pair):
    pair.a["step.001/single_blocks.0/out"] = pair.b["step.001/single_blocks.0/out"] * off_by(0.05)
    pair.a["step.002/velocity"] = pair.b["step.002/velocity"] * off_by(0.03)
    page, rows = pair.page()
    header = text_of(next(page.iter("header")))
    (where,) = [p for p in page.iter("p") if p.get("class") == "where"]
    assert "Over budget" in header and where.find("a/code").text == "step.001/single_blocks.0/out"
    assert (
        f"2 of {len(rows)} tensors are over budget" in header
        and "relative L2 0.05 of 0.01" in header
    )
    assert text_of(page).index("Over budget") < text_of(page).index("Error against depth")
    tiles = {d.find("dt").text: d.find("dd").text for d in next(page.iter("header")).iter("div")}
    assert tiles == {
        "tensors compared": str(len(rows)),
        "over budget": "2",
        "equal": str(len(rows) - 2),
        "largest multiple of a budget": "5×",
    }


def test_all_that_is_known_of_the_first(pair):
    name = "step.001/velocity"
    pair.a[name] = pair.b[name] + torch.linspace(
        0, 0.3, pair.b[name].numel(), dtype=torch.float64
    ).view_as(pair.b[name])
    page, rows = pair.page()
    (card,) = [e for e in page.iter("div") if e.get("class") == "card split"]
    facts = {d.find("dt").text: d.find("dd").text for d in card.find("dl")}
    e = first_over(rows).errors
    assert facts == {
        "relative L2": f"{e.relative_l2:.2e}",
        "budget": "1.00e-02",
        "multiple of it": f"{e.relative_l2 / BUDGET:.3g}",
        "worst token": f"{e.worst_token:.2e} at {e.worst_token_at}",
        "|a| / |b|": f"{e.norm_ratio:.6g}",
        "largest |a − b|": "3.00e-01 at (0, 11, 3)",
        "cosine": f"{e.cosine:.9f}",
        "1 − PCC": f"{1 - e.pcc:.2e}",
        "ULP p50, p99, max": ", ".join(f"{n:,}" for n in e.ulp),
        "NaN or infinite": "0, misplaced 0",
        "shape": "1×12×4",
        "dtype": "F64",
        "kept": "full",
    }


def test_equal_captures(pair):
    page, rows = pair.page()
    assert "Within budget" in text_of(page) and "The first tensor over budget" not in text_of(page)
    assert not any(marked(row) for row in all_rows(page)) and not [
        p for p in page.iter("polygon") if len(p)
    ]
    assert "The pictures are equal in every pixel." in text_of(
        page
    ) and "They are the same in every line." in text_of(page)
    drawing, y = charts.depth(rows), 432 - 74
    dots = [
        point
        for shape in drawing.shapes
        if isinstance(shape, Dots)
        for point in shape.points
        if point[1] > 20
    ]
    assert {point[1] for point in dots} == {y + 18}  # the rail of zero: no logarithm


def test_a_comparison_of_nothing_is_refused(pair):
    a, b = pair.write()
    with pytest.raises(
        UserError, match="no tensor was compared, so that there is nothing to report"
    ):
        report.write(a, b, [], pair.folder / "report.html")
    assert not (pair.folder / "report.html").exists()


def test_nan_and_other_shapes_are_shown_and_not_hidden(pair):
    broken = pair.b["step.001/double_blocks.0/out.0"].clone()
    broken[0, 6, 2] = math.nan
    pair.a["step.001/double_blocks.0/out.0"] = broken
    pair.a["step.002/velocity"] = pair.b["step.002/velocity"][:, :2]
    page, rows = pair.page()
    lines = {line.find("th").text: line for line in all_rows(page)}
    assert "0 NaN or infinite, 1 misplaced" in text_of(lines["step.001/double_blocks.0/out.0"])
    assert "is (1, 2, 4) and should be (1, 12, 4)" in text_of(lines["step.002/velocity"])
    assert {name for name, line in lines.items() if marked(line)} == {
        "step.001/double_blocks.0/out.0",
        "step.002/velocity",
    }
    diamonds = [
        shape for shape in charts.depth(rows).shapes if isinstance(shape, Diamond) and shape.title
    ]
    assert {shape.y for shape in diamonds} == {82 - 18}  # the rail above the axis
    cells = {
        shape.title: shape.colour
        for shape in charts.blocks(rows).shapes
        if isinstance(shape, Box) and shape.title
    }
    worst = [
        colour
        for title, colour in cells.items()
        if title.startswith(("step.001/double_blocks.0/out.0", "step.002/velocity"))
    ]
    assert worst == [shade(math.inf)] * 2
    frame = [shape for shape in page.iter("rect") if shape.get("stroke") == "var(--over)"]
    assert (
        frame[0].get("x") == f"{1 + 2 * 36:.1f}" and frame[0].get("y") == f"{1 + 1 * 36:.1f}"
    )  # token 6: row 1, column 2


def test_statistics_alone(pair):
    pair.a["step.001/velocity"] = pair.b["step.001/velocity"] * off_by(0.5)
    page, rows = pair.page("statistics", "full")
    line = next(line for line in all_rows(page) if line.find("th").text == "step.001/velocity")
    assert (
        "statistics" in text_of(line[2]) and text_of(line[8]) == text_of(line[9]) == "–"
    )  # not known, and not zero
    assert "capture it with --keep full" in text_of(page) and "a.safetensors" in text_of(page)


def test_markup_and_control_characters_in_a_recipe(pair):
    prompt = 'a <b>cat</b> & "dog"</table><script>alert(1)</script>\0\x1b[31m\ud800'
    for recipe in pair.recipes:
        recipe["prompt"] = prompt
    page, _ = pair.page()
    assert not list(page.iter("script")) and not list(page.iter("b"))
    line = next(
        line
        for table in page.iter("table")
        if table.get("class") == "recipe"
        for line in table.iter("tr")
        if line[1].text == "prompt"
    )
    assert line[2].text == line[3].text == re.sub("[\0\x1b\ud800]", "\ufffd", prompt)


def test_recipes_mark_what_differs_and_nothing_else(pair):
    pair.recipes[0] |= {"dtype": "bfloat16", "versions": {"torch": "2.12.0"}, "device": "cuda"}
    page, _ = pair.page()
    (table,) = [table for table in page.iter("table") if table.get("class") == "recipe"]
    lines = {
        line[1].text: (line.get("class"), line[0].text, line[2].text, line[3].text)
        for line in table.find("tbody")
    }
    assert lines == {
        "model": (None, None, "flux.2-tiny", "flux.2-tiny"),
        "prompt": (None, None, "a cat", "a cat"),
        "dtype": ("differs", "≠", "bfloat16", "float64"),
        "versions.torch": ("differs", "≠", "2.12.0", "2.13.0"),
        "schedule": (None, None, "1.0, 0.0", "1.0, 0.0"),
        "device": ("differs", "≠", "cuda", "–"),
    }
    assert "marked with ≠: 3 of 6" in text_of(page)


def test_what_only_one_has_and_what_stopped_is_said(pair):
    del pair.a["noise"]
    pair.recipes[0]["stopped"] = "the latents are not finite after step 2"
    notes = [text_of(e) for e in pair.page()[0].iter("p") if e.get("class") == "note"]
    assert notes[0].endswith("a.safetensors stopped early: the latents are not finite after step 2")
    assert re.fullmatch(r"1 tensor in .*b\.safetensors alone: noise", notes[1])


def test_a_plain_file_of_a_port(pair):
    """No recipe, no steps, no ids, no picture: what there is, is shown."""
    names = {
        "double_blocks.0/out.0": "step.001/double_blocks.0/out.0",
        "final_layer/out": "step.001/velocity",
    }
    for side in "ab":
        save_file(
            {ours: pair.b[theirs] * (1.5 if side == "a" else 1) for ours, theirs in names.items()},
            pair.folder / f"{side}.safetensors",
        )
    a, b = (Capture(pair.folder / f"{side}.safetensors") for side in "ab")
    text, drawings, pictures = report.page(a, b, compare(a, b, BUDGET))
    page = text_of(ElementTree.fromstring(text))
    assert list(drawings) == ["depth"] and not pictures
    assert "Neither file has a recipe" in page and "No whole picture is in" in page
    assert "Its tokens do not lie on the latent grid, or were not kept." in page


# ---------------------------------------------------------------- pictures


def test_the_difference_of_the_pictures_is_amplified(pair):
    pair.a["picture"] = pair.b["picture"].clone()
    pair.a["picture"][3, 5] += torch.tensor([0, 1, 2], dtype=torch.uint8)
    pair.a["picture"][20, 1, 0] -= 2
    page, _ = pair.page()
    data = [base64.b64decode(img.get("src").partition(",")[2]) for img in page.iter("img")]
    a, b, difference = (np.array(Image.open(io.BytesIO(each))) for each in data)
    assert (a == pair.a["picture"].numpy()).all() and (b == pair.b["picture"].numpy()).all()
    expected = np.zeros((24, 32, 3), np.uint8)
    expected[3, 5], expected[20, 1, 0] = [0, 127, 2 * 127], 2 * 127  # 255 // 2 = 127
    assert (difference == expected).all()
    psnr = 10 * math.log10(255**2 * 24 * 32 * 3 / (1 + 4 + 4))
    about = f"2 levels of 255 at most, in {3 / (24 * 32 * 3):.2g} of the values; PSNR {psnr:.1f} dB"
    assert about in text_of(page) and "|A − B|, 127 times as bright" in text_of(page)


def test_pictures_of_different_size_are_refused_in_a_sentence(pair):
    pair.a["picture"] = pair.b["picture"][:16]
    page, rows = pair.page()
    assert (
        "The pictures are 32×16 and 32×24 pixels: pictures of different size have no difference to show."
        in text_of(page)
    )
    assert len(list(page.iter("img"))) == 2 and first_over(rows).name == "picture"
    assert "It is (16, 32, 3) and should be (24, 32, 3)." in text_of(page)


# ---------------------------------------------------------------- drawings


def test_the_logarithmic_axis():
    """From 1e-6, the power of ten below the least value, at 400, to 1e-1 at 100: 60 pixels a power."""
    y = LogScale.around([2e-6, 0.0, 3e-2, math.inf, math.nan], top=100, bottom=400)
    assert (y.low, y.high) == (-6, -1) and y.ticks() == pytest.approx(
        [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    )
    points = {
        1e-6: 400,
        1e-1: 100,
        1e-3: 220,
        10**-3.5: 250,
        2e-6: 400 - 60 * 0.30103,
        0.0: 418,
        math.inf: 82,
    }
    assert [y(value) for value in points] == pytest.approx(list(points.values()), abs=1e-3)
    assert len(LogScale.around([1e-20, 1e5], 0, 1).ticks()) <= 9
    assert LogScale.around([], 0, 1).ticks()


def test_points_of_the_depth_chart_follow_from_the_values(pair):
    """Errors 2e-3 and 1e-1, budget 1e-2: the axis goes from 1e-3 at 358 to 1e-1 at 82, 138 pixels a power of ten."""
    pair.a["noise"] = pair.b["noise"] * off_by(2e-3)
    pair.a["step.001/velocity"] = pair.b["step.001/velocity"] * off_by(0.1 - 1e-9)
    rows = compare(*pair.write(), BUDGET)
    drawing = charts.depth(rows)
    places = list(dict.fromkeys(re.sub(r"step\.\d+", "", name) for name in pair.b))

    def x(name):
        return 62 + (1080 - 16 - 62) * (places.index(re.sub(r"step\.\d+", "", name)) + 0.5) / len(
            places
        )

    dots = [point for shape in drawing.shapes if isinstance(shape, Dots) for point in shape.points]
    assert any(
        point == pytest.approx((x("noise"), 358 - 138 * 0.30103), abs=1e-3) for point in dots
    )
    (diamond,) = [shape for shape in drawing.shapes if isinstance(shape, Diamond) and shape.title]
    assert (diamond.x, diamond.y) == pytest.approx((x("step.001/velocity"), 82), abs=1e-3)
    assert diamond.title == "step.001/velocity: 1.00e-01, 10 of its budget"
    allowed = [
        shape.points
        for shape in drawing.shapes
        if isinstance(shape, Line) and shape.dashed and shape.points[0][1] > 20
    ]
    assert [[y for _, y in line] for line in allowed] == [pytest.approx([220, 220])]
    assert (allowed[0][0][0], allowed[0][-1][0]) == pytest.approx((62, 1080 - 16))
    assert [
        label.text
        for label in drawing.shapes
        if isinstance(label, Label) and "first over" in label.text
    ] == ["first over budget: step.001/velocity"]


def test_points_of_the_step_chart(pair):
    """Of three steps, 2e-4, 2e-3, 2e-2 in the latents, and 9e-2 elsewhere in the third: the axis is from 1e-4 to 1e-1."""
    pair.a, pair.b = a_run(3), a_run(3)
    for step in (1, 2, 3):
        pair.a[f"step.00{step}/latents"] = pair.b[f"step.00{step}/latents"] * off_by(
            2 * 10.0 ** (step - 5)
        )
    pair.a["step.003/img_in/out"] = pair.b["step.003/img_in/out"] * off_by(0.09)
    drawing = charts.over_steps(compare(*pair.write(), 5e-3))
    top, bottom, left, end = 60, 330 - 62, 62 + 24, 1080 - 150

    def height(power):
        return bottom - (power + 4) / 3 * (bottom - top)

    first, second, third, worst = (
        height(power) for power in (-3.69897, -2.69897, -1.69897, -1.04576)
    )
    centre = (left + end) / 2
    lines = {
        shape.colour: shape.points
        for shape in drawing.shapes
        if isinstance(shape, Line) and not shape.dashed
    }
    assert lines["first"] == [
        pytest.approx(p, abs=1e-3) for p in ((left, first), (centre, second), (end, third))
    ]
    assert lines["muted"] == [
        pytest.approx(p, abs=1e-3) for p in ((left, first), (centre, second), (end, worst))
    ]
    diamonds = [
        (shape.x, shape.y) for shape in drawing.shapes if isinstance(shape, Diamond) and shape.title
    ]
    assert sorted(diamonds) == [pytest.approx(p, abs=1e-3) for p in ((end, worst), (end, third))]
    budget = [
        shape.points
        for shape in drawing.shapes
        if isinstance(shape, Line) and shape.dashed and shape.points[0][1] > 20
    ]
    assert [y for line in budget for _, y in line] == pytest.approx(
        [height(-2.30103)] * 2, abs=1e-3
    )


def test_the_budget_line_has_corners_and_gaps():
    """Budgets 1e-2 twice, 1e-3, nothing, 1e-2: two lines, of which the first has a step."""
    rows = [
        Row(str(i), (1,), "F32", "full", budget, None)
        for i, budget in enumerate((1e-2, 1e-2, 1e-3, 0.0, 1e-2))
    ]
    lines = charts.budget_line(rows, lambda row: 10 * int(row.name), 5, LogScale(-4, 0, 0, 400))
    assert [line.points for line in lines] == [
        [(-5, 200), (15, 200), (15, 300), (25, 300)],
        [(35, 200), (45, 200)],
    ]


def test_blocks_over_steps(pair):
    pair.a["step.001/single_blocks.0/attention/q"] = pair.b[
        "step.001/single_blocks.0/attention/q"
    ] * off_by(0.002)
    pair.a["step.002/double_blocks.0/out.1"] = pair.b["step.002/double_blocks.0/out.1"] * off_by(
        0.05
    )
    drawing = charts.blocks(compare(*pair.write(), BUDGET))
    cells = [shape for shape in drawing.shapes if isinstance(shape, Box) and shape.title]
    names = [
        s.text
        for s in drawing.shapes
        if isinstance(s, Label) and s.anchor == "end" and s.text != "step"
    ]
    assert (
        names == ["img_in", "double_blocks.0", "single_blocks.0", "velocity", "latents"]
        and len(cells) == 5 * 2
    )
    columns, lines = sorted({cell.x for cell in cells}), sorted({cell.y for cell in cells})
    above = {
        s.text: s.x
        for s in drawing.shapes
        if isinstance(s, Label) and s.y == 68 and s.anchor == "middle"
    }
    assert [above["1"], above["2"]] == [x + (cells[0].width + 1) / 2 for x in columns]
    found = {
        (names[lines.index(cell.y)], columns.index(cell.x) + 1): cell.colour
        for cell in cells
        if cell.colour != "equal"
    }
    assert (
        found == {("single_blocks.0", 1): shade(0.2), ("double_blocks.0", 2): shade(5.0)}
        and shade(5.0) == "o1"
    )
    (diamond,) = [shape for shape in drawing.shapes if isinstance(shape, Diamond) and shape.title]
    assert diamond.title == "step.002/double_blocks.0/out.1: 5.00e-02, 5 of its budget"


def test_shades_turn_at_the_budget():
    assert shade(0.0) == "equal" and shade(0.0, over=True) == shade(1.0001) == shade(3) == "o0"
    assert (
        shade(1.0) == shade(0.31) == f"w{WITHIN - 1}"
        and shade(1e-9) == "w0"
        and shade(math.inf) == f"o{len(EDGES) - WITHIN}"
    )
    for colours in (LIGHT, DARK):
        ours = [colours[name] for name in colours if re.fullmatch(r"equal|[wo]\d+", name)]
        assert len(ours) == len(set(ours)) == len(EDGES) + 2


@pytest.mark.parametrize(
    "kinds", [("full", "full"), ("probe", "full"), ("probe", "probe")], ids=str
)
@pytest.mark.parametrize(
    "name, token",
    [
        ("step.001/img_in/out", 0),
        ("step.001/double_blocks.0/out.0", 0),
        ("step.001/velocity", 0),
        ("step.001/single_blocks.0/out", TEXT),
        ("step.001/single_blocks.0/attention/q", TEXT),
    ],
)
def test_the_map_of_the_first_failing_tensor(name, token, kinds, pair):
    """Token 6 of the picture is row 1, column 2, of four columns; text comes before it in a single block."""
    pair.a[name] = pair.b[name].clone()
    pair.a[name][..., token + 6, :] *= 1.5
    a, b = pair.write(*kinds)
    row = first_over(compare(a, b, BUDGET))
    errors = report.token_errors(a, b, row)
    assert row.name == name and errors.shape == (HEIGHT, WIDTH)
    expected = np.zeros((HEIGHT, WIDTH))
    expected[1, 2] = 0.5
    assert errors == pytest.approx(expected, abs=1e-6) and errors.max() == pytest.approx(
        row.errors.worst_token, rel=1e-6
    )
    boxes = [shape for shape in charts.tokens(errors).shapes if isinstance(shape, Box)]
    assert {(box.x, box.y) for box in boxes if box.title and box.colour != "equal"} == {
        (1 + 2 * 36, 1 + 36)
    }
    assert [(box.x, box.y) for box in boxes if box.outline][0] == (1 + 2 * 36, 1 + 36)


def test_the_map_of_a_decoder_and_of_latents(pair):
    for name, shape in (
        ("decoder/decoder.conv_in/out", (8, 10)),
        ("step.001/latents", (HEIGHT, WIDTH)),
    ):
        pair.a = a_run()
        pair.a[name][0, :, 2, 3] *= 1.25
        a, b = pair.write()
        errors = report.token_errors(a, b, first_over(compare(a, b, 1e-4)))
        assert (
            errors.shape == shape
            and np.argwhere(errors).tolist() == [[2, 3]]
            and errors.max() == pytest.approx(0.25)
        )


@pytest.mark.parametrize(
    "name",
    [
        "text/model/layers.0/out",
        "step.001/double_blocks.0/out.1",
        "ids/img",
        "step.001/double_blocks.0.txt_attn.qkv/out",
    ],
)
def test_no_map_of_what_is_no_image(name, pair):
    pair.a[name] = pair.b[name] * 2
    a, b = pair.write()
    assert report.token_errors(a, b, first_over(compare(a, b, BUDGET))) is None


def test_both_renderings_have_one_geometry():
    shapes = [
        Box(10, 20, 30, 10, "first"),
        Dots([(70, 25)], "last", 8),
        Diamond(100, 25, "here", 6),
        Diamond(130, 25, "", 6, hollow=True),
        Line([(10, 50), (90, 50)], "ink", 2),
        Line([(100, 50), (190, 50)], "ink", 2, dashed=True),
        Box(150, 15, 20, 20, "over", outline=True),
        Label(10, 80, "text", "ink", 12),
    ]
    drawing = Drawing("shapes", 200, 90, shapes)
    picture = Image.open(io.BytesIO(drawing.png()))
    assert picture.size == (400, 180)
    places = {
        (25, 25): "first",
        (70, 25): "last",
        (100, 25): "over",
        (130, 25): "surface",
        (50, 50): "ink",
        (102, 50): "ink",
        (107, 50): "surface",
        (111, 50): "ink",
        (160, 25): "surface",
        (150, 25): "over",
        (45, 25): "surface",
        (190, 80): "surface",
    }
    for (x, y), name in places.items():
        assert "#%02x%02x%02x" % picture.getpixel((2 * x, 2 * y)) == LIGHT[name], (x, y)
    svg = ElementTree.fromstring(drawing.svg())
    assert svg.get("viewBox") == "0 0 200 90" and svg.get("aria-label") == "shapes"
    assert svg[0].attrib == {
        "x": "10.0",
        "y": "20.0",
        "width": "30.0",
        "height": "10.0",
        "fill": "var(--first)",
    }
    assert (
        svg[1].get("d") == "M70.0 25.0h0"
        and svg[1].get("stroke-width") == "8"
        and svg[1].get("stroke-linecap") == "round"
    )
    assert (
        svg[2].get("points") == "100.0,19.0 106.0,25.0 100.0,31.0 94.0,25.0"
        and svg[2][0].text == "here"
    )
    assert svg[4].get("points") == "10.0,50.0 90.0,50.0" and svg[5].get("stroke-dasharray") == "5 4"
    used = set(re.findall(r"var\(--(\w+)\)", drawing.svg() + STYLE))
    assert used <= LIGHT.keys() == DARK.keys()


def every_drawing(pair) -> ElementTree.Element:
    """A page on which each kind of drawing is, with the longest labels, and something on each rail and edge."""
    pair.a["step.001/single_blocks.0/attention/q"] = pair.b[
        "step.001/single_blocks.0/attention/q"
    ] * off_by(1e-13)
    pair.a["step.001/velocity"] = pair.b["step.001/velocity"] * off_by(3)
    pair.a["step.002/velocity"] = pair.b["step.002/velocity"][:, :2]
    pair.a["step.002/double_blocks.0/out.1"] = pair.b["step.002/double_blocks.0/out.1"] * math.nan
    pair.a["picture"] = pair.b["picture"] + 3
    return pair.page()[0]


def test_every_drawing_lies_within_its_frame(pair):
    """Points, corners and the middle of lines of text; and no label is written over another."""
    drawings = list(every_drawing(pair).iter("svg"))
    assert len(drawings) == 4
    for drawing in drawings:
        left, top, width, height = map(float, drawing.get("viewBox").split())
        assert (
            (left, top) == (0, 0)
            and 100 < height < width <= 1260
            and drawing.get("style") == f"max-width:{width:g}px"
        )
        assert (
            "width" not in drawing.attrib and "height" not in drawing.attrib
        )  # it is as wide as there is room
        points, labels = [], []
        for shape in drawing.iter():
            values = {
                key: float(shape.get(key))
                for key in ("x", "y", "width", "height")
                if shape.get(key)
            }
            if shape.tag == "rect":
                points += [
                    (values["x"], values["y"]),
                    (values["x"] + values["width"], values["y"] + values["height"]),
                ]
            elif shape.tag == "text":
                labels.append((values["x"], values["y"], shape.text))
            pairs = re.findall(
                r"(-?[\d.]+)[ ,](-?[\d.]+)",
                shape.get("points") or re.sub("h0", "", shape.get("d") or ""),
            )
            points += [(float(x), float(y)) for x, y in pairs]
        assert points and all(-1 <= x <= width + 1 and -1 <= y <= height + 1 for x, y in points), (
            drawing.get("aria-label")
        )
        assert all(0 <= x <= width and 0 < y <= height for x, y, _ in labels)
        assert len({(x, y) for x, y, _ in labels}) == len(labels)


def test_the_page_is_html_and_not_only_xml(pair):
    """What XML allows and browsers read otherwise: `<p/>`, which opens a paragraph; and what HTML asks for besides."""
    every_drawing(pair)
    a, b = pair.write()
    text = report.page(a, b, compare(a, b, BUDGET))[0]
    assert (
        text.startswith('<!DOCTYPE html>\n<html lang="en">')
        and text.index('<meta charset="utf-8"/>') < 1024
    )
    for svg in re.findall("<svg.*?</svg>", text, re.DOTALL):
        text = text.replace(svg, "")  # there, XML's short form is read as it is meant
    assert set(re.findall(r"<(\w+)[^<>]*/>", text)) <= {"meta", "br", "img", "hr", "col", "wbr"}
    page = ElementTree.fromstring(text)
    known = "html head meta title style body main header section figure figcaption div p h1 h2 code span b i a br dl dt dd".split()
    assert {e.tag for e in page.iter()} <= {
        *known,
        *"img table thead tbody tr th td details summary".split(),
    }
    ids = [e.get("id") for e in page.iter() if e.get("id")]
    assert len(ids) == len(set(ids)) and {f"#{name}" for name in ids} >= {
        e.get("href") for e in page.iter("a")
    }
    assert all(e.get("alt") for e in page.iter("img")) and page.find("head/title").text
    styles = page.find("head/style").text
    assert styles.count("{") == styles.count("}") and "@media (prefers-color-scheme:dark)" in styles
    assert all(
        f"--{name}:{colours[name]}" in styles for colours in (LIGHT, DARK) for name in colours
    )
    used = {name for e in page.iter() for name in (e.get("class") or "").split()}
    assert used <= set(re.findall(r"\.([a-z]\w*)", styles)), "a class without a style"


# ---------------------------------------------------------------- files


def test_files_are_whole_or_not_there_and_never_overwritten(pair, monkeypatch):
    a, b = pair.write()
    rows, path = compare(a, b, BUDGET), pair.folder / "out/report.html"
    written = report.write(a, b, rows, path, pair.folder / "plots")
    names = ["depth", "steps", "blocks", "picture-a", "picture-b"]
    assert written == [path, *(pair.folder / f"plots/{name}.png" for name in names)]
    assert all(Image.open(file).size[0] >= 32 for file in written[1:])
    before = path.read_bytes()
    assert (
        report.write(a, b, rows, path) == [pair.folder / "out/report-2.html"]
        and path.read_bytes() == before
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.os, "link", full)
    monkeypatch.setattr(images.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(a, b, rows, pair.folder / "new/report.html")
    assert list((pair.folder / "new").iterdir()) == []


@pytest.mark.parametrize(
    "name, png, message",
    [
        (
            "report.pdf",
            None,
            "--output .*report.pdf: a report is a web page; give it the suffix .html",
        ),
        ("a.safetensors/report.html", None, "--output .*a.safetensors: cannot be written there"),
        ("report.html", "a.safetensors", "--png .*a.safetensors: cannot be written there"),
    ],
)
def test_where_it_cannot_be_written(name, png, message, pair):
    a, b = pair.write()
    with pytest.raises(UserError, match=message):
        report.write(a, b, compare(a, b), pair.folder / name, png and pair.folder / png)
    assert sorted(file.name for file in pair.folder.iterdir()) == ["a.safetensors", "b.safetensors"]


def cli(folder: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "report", *args]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )


def test_the_command(pair):
    pair.a["step.001/velocity"] = pair.b["step.001/velocity"] * off_by(0.02)
    pair.write()
    files = ("a.safetensors", "b.safetensors", "--output", "report.html")
    over = cli(pair.folder, *files, "--budget", "0.01", "--png", "plots")
    assert (
        over.returncode == 1
        and "the first is step.001/velocity: relative L2 0.02 of 0.01" in over.stderr
    )
    names = ["depth", "tokens", "steps", "blocks", "picture-a", "picture-b"]
    assert over.stdout.split()[0] == "report.html" and sorted(over.stdout.split()[1:]) == sorted(
        f"plots/{name}.png" for name in names
    )
    within = cli(pair.folder, *files, "--budget", "0.1")
    assert within.returncode == 0 and within.stdout == "report-2.html\n"
    save_file({"other": torch.zeros(1)}, pair.folder / "other.safetensors")
    nothing = cli(pair.folder, "other.safetensors", "b.safetensors", "--output", "report-3.html")
    assert (
        nothing.returncode == 2
        and "have no tensor in common" in nothing.stderr
        and not (pair.folder / "report-3.html").exists()
    )


# ---------------------------------------------------------------- a browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
ARTEFACTS = Path(__file__).parents[1] / "artefacts"  # screenshots, kept to be looked at


@pytest.mark.skipif(
    not BROWSER,
    reason=f"a screenshot takes a browser, and none of {', '.join(NAMES)} is on the PATH",
)
@pytest.mark.parametrize("mode, colours", [("light", LIGHT), ("dark", DARK)], ids=["light", "dark"])
def test_in_a_browser(mode, colours, pair):
    """A screenshot has the page's colours: the variables reach the SVG, in both modes; and nothing is wider than the window."""
    for number, name in enumerate(name for name in pair.b if "blocks" in name):  # within budget
        pair.a[name] = pair.b[name] * off_by(2e-6 * 2**number)
    pair.a["step.001/velocity"] = pair.b["step.001/velocity"] * off_by(0.02)
    a, b = pair.write()
    (path,) = report.write(a, b, compare(a, b, BUDGET), pair.folder / "report.html")
    measured = path.with_name("measured.html")
    script = (
        "<script>document.title = document.documentElement.scrollWidth - innerWidth</script></body>"
    )
    measured.write_text(path.read_text().replace("</body>", script))
    flags = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={pair.folder}/profile"] + [
        "--blink-settings=preferredColorScheme=0"
    ] * (mode == "dark")
    picture = ARTEFACTS / f"report-{mode}.png"
    ARTEFACTS.mkdir(exist_ok=True)
    picture.unlink(missing_ok=True)
    size = "--window-size=1240,3000"
    subprocess.run(
        [*flags, size, f"--screenshot={picture}", path.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = np.array(Image.open(picture).convert("RGB")).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    seen = {"#%02x%02x%02x" % tuple(value): count for value, count in zip(values, counts)}
    assert max(seen, key=seen.get) in (colours["page"], colours["surface"])
    for name in ("page", "surface", "ink", "grid", "over", "equal", shade(2.0), "t8"):
        assert seen.get(colours[name], 0) > 20, name
    other = DARK if colours is LIGHT else LIGHT
    assert other["page"] not in seen
    for width in (1240, 700):
        dump = subprocess.run(
            [*flags, f"--window-size={width},900", "--dump-dom", measured.as_uri()],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        assert re.search(r"<title>(-?\d+)</title>", dump)[1] == "0", width
