"""flux.parity.report and `parity.py report`: the page shows what the comparison found.

Captures are written by hand: small random tensors under the names of a run, with known errors.
"""

import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux.errors import UserError
from flux.image_io import output
from flux.parity import figures, report
from flux.parity.capture_file import Capture, Writer
from flux.parity.compare import Row, compare, first_over

pytest.importorskip("matplotlib")

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[2] / "scripts/parity.py"
TEXT, REFERENCES = 5, 2  # tokens
HEIGHT, WIDTH = 3, 4  # of the latent grid
RECIPE = {
    "model": "flux.2-tiny",
    "prompt": "a cat",
    "dtype": "float64",
    "versions": {"torch": "2.13.0"},
    "schedule": [1.0, 0.0],
}
TOLERANCE = 0.01


def a_run(steps: int = 2) -> dict[str, Tensor]:
    """Return tensors by name, in the order of execution, of a run with one reference."""
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
    image = torch.randint(60, 200, (24, 32, 3), generator=draw).byte()
    return out | {"decoder/decoder.conv_in/out": random(1, 6, 8, 10), "image": image}


class Pair:
    """Two captures of the same run; `b` is the reference."""

    def __init__(self, folder: Path):
        self.folder, self.a, self.b = folder, a_run(), a_run()
        self.recipes = [dict(RECIPE), dict(RECIPE)]

    def off(self, name: str, error: float) -> None:
        """Give the tensor of `a` a relative L2 of `error`."""
        self.a[name] = self.b[name] * (1 + error)

    def write(self, *kinds: str) -> tuple[Capture, Capture]:
        captures = []
        kinds = kinds or ("full", "full")
        for name, tensors, recipe, kind in zip("ab", (self.a, self.b), self.recipes, kinds):
            path = self.folder / f"{name}.safetensors"
            path.unlink(missing_ok=True)
            with Writer(path, recipe) as writer:
                for key, tensor in tensors.items():
                    writer.add(key, tensor, kind)
            captures.append(Capture(path))
        return tuple(captures)

    def page(self, *kinds: str) -> tuple[ElementTree.Element, list[Row]]:
        a, b = self.write(*kinds)
        rows = compare(a, b, TOLERANCE)
        return ElementTree.fromstring(report.page(a, b, rows)[0]), rows


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path)


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def all_rows(page: ElementTree.Element) -> list[ElementTree.Element]:
    tables = [table for table in page.iter("table") if table.get("class") == "rows"]
    return [row for table in tables for row in table.find("tbody")]


def marked(row: ElementTree.Element) -> bool:
    return row.get("class") == "over" and row[0].text == "◆"


# ---------------------------------------------------------------- the page


def test_page_is_self_contained(pair):
    pair.off("step.002/velocity", 0.5)
    pair.a["image"] = pair.b["image"] + 3
    page, _ = pair.page()
    tags = {element.tag for element in page.iter()}
    assert page.tag == "html" and not {"script", "link", "iframe", "object", "form"} & tags
    sources = [e.get("src") for e in page.iter("img")]
    assert len(sources) == 7  # four figures, two images and their difference
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert [e.get("href") for e in page.iter("a")] == ["#first"]
    assert [e.find("th").text for e in page.iter("tr") if e.get("id") == "first"] == [
        "step.002/velocity"
    ]
    text = ElementTree.tostring(page, encoding="unicode")
    text = re.sub(r"data:image/png;base64,[\w+/=]*", "", text)
    assert not re.search(r"https?:|url\(|@import|//\w", text)


def test_every_row_shows_the_numbers_of_the_comparison(pair):
    for number, name in enumerate(pair.a):
        if number % 3 and name not in ("ids/img", "image"):
            noise = torch.randn(pair.b[name].shape, dtype=torch.float64)
            pair.a[name] = pair.b[name] + noise * 10.0 ** -(number % 5)
    page, rows = pair.page()
    lines = all_rows(page)
    assert [line.find("th").text for line in lines] == list(pair.b) == [row.name for row in rows]
    assert any(row.over for row in rows) and not all(row.over for row in rows)
    for line, row in zip(lines, rows):
        e, cells = row.errors, [text_of(cell) for cell in line]
        assert marked(line) == row.over
        assert cells[2] == f"{'×'.join(map(str, row.shape))} {row.dtype}"
        expected = (e.relative_l2, row.tolerance, e.worst_token, e.max_abs, 1 - e.pcc)
        shown = [float(cells[column]) for column in (3, 4, 6, 8, 9)]
        assert shown == [float(f"{x:.2e}") for x in expected]
        assert float(cells[5]) == float(f"{row.ratio:.2g}")
        assert float(cells[7]) == float(f"{e.norm_ratio - 1:.1e}")


def test_header_names_the_first_tensor_over_tolerance(pair):
    pair.off("step.001/single_blocks.0/out", 0.05)
    pair.off("step.002/velocity", 0.03)
    page, rows = pair.page()
    header = next(page.iter("header"))
    assert header.find("h1").text == "Over tolerance"
    assert header.find("p/a/code").text == "step.001/single_blocks.0/out"
    assert f"2 of {len(rows)} tensors are over tolerance" in text_of(header)
    assert "relative L2 0.05 of 0.01" in text_of(header)


def test_all_numbers_of_the_first_tensor_over_tolerance(pair):
    name = "step.001/velocity"
    ramp = torch.linspace(0, 0.3, pair.b[name].numel(), dtype=torch.float64)
    pair.a[name] = pair.b[name] + ramp.view_as(pair.b[name])
    page, rows = pair.page()
    (part,) = [s for s in page.iter("section") if "first tensor over" in s.find("h2").text]
    e = first_over(rows).errors
    assert {row[0].text: row[1].text for row in part.iter("tr")} == {
        "shape": "1×12×4",
        "dtype": "F64",
        "stored": "full",
        "relative L2": f"{e.relative_l2:.2e}",
        "tolerance": "1.00e-02",
        "multiple of the tolerance": f"{e.relative_l2 / TOLERANCE:.3g}",
        "worst token": f"{e.worst_token:.2e} at {e.worst_token_at}",
        "|a| / |b|": f"{e.norm_ratio:.6g}",
        "largest |a − b|": "3.00e-01 at (0, 11, 3)",
        "cosine": f"{e.cosine:.9f}",
        "1 − PCC": f"{1 - e.pcc:.2e}",
        "ULP p50, p99, max": ", ".join(f"{n:,}" for n in e.ulp),
        "NaN or infinite": "0, misplaced 0",
    }


def test_equal_captures_have_no_mark(pair):
    page, _ = pair.page()
    text = text_of(page)
    assert "Within tolerance" in text and "The first tensor over tolerance" not in text
    assert not any(marked(row) for row in all_rows(page))
    assert "The images are equal in every pixel." in text
    assert "Lines that differ, marked with ≠: 0 of 5" in text


def test_nan_and_other_shapes_are_marked(pair):
    broken = pair.b["step.001/double_blocks.0/out.0"].clone()
    broken[0, 6, 2] = math.nan
    pair.a["step.001/double_blocks.0/out.0"] = broken
    pair.a["step.002/velocity"] = pair.b["step.002/velocity"][:, :2]
    page, rows = pair.page()
    lines = {line.find("th").text: line for line in all_rows(page)}
    assert "0 NaN or infinite, 1 misplaced" in text_of(lines["step.001/double_blocks.0/out.0"])
    assert "has shape (1, 2, 4) (expected (1, 12, 4))" in text_of(lines["step.002/velocity"])
    assert {name for name, line in lines.items() if marked(line)} == {
        "step.001/double_blocks.0/out.0",
        "step.002/velocity",
    }
    blocks, steps, ratios = figures.block_ratios(rows)
    infinite = {(blocks[row], steps[column]) for row, column in np.argwhere(np.isinf(ratios))}
    assert infinite == {("double_blocks.0", 1), ("velocity", 2)}


def test_statistics_alone_leave_unknown_numbers_out(pair):
    pair.off("step.001/velocity", 0.5)
    page, _ = pair.page("statistics", "full")
    line = next(line for line in all_rows(page) if line.find("th").text == "step.001/velocity")
    assert "statistics" in text_of(line[2]) and text_of(line[8]) == text_of(line[9]) == "–"
    assert 'a.safetensors. Capture it with keep="full".' in text_of(page)


def test_text_of_files_is_escaped(pair):
    prompt = 'a <b>cat</b> & "dog"</table><script>alert(1)</script>$x_1$\0\x1b[31m'
    for recipe in pair.recipes:
        recipe["prompt"] = prompt
    name = 'step.001/double_blocks.0/<i>"$\\frac'
    pair.b[name] = pair.b["step.001/velocity"]
    pair.off(name, 0.5)
    page, _ = pair.page()
    assert not list(page.iter("script")) and not list(page.iter("b")) and not list(page.iter("i"))
    (table,) = [table for table in page.iter("table") if table.get("class") == "recipe"]
    line = next(line for line in table.iter("tr") if line[0].text == "prompt")
    assert line[2].text == line[3].text == re.sub("[\0\x1b]", "\ufffd", prompt)
    assert any(line.find("th").text == name for line in all_rows(page))
    assert report.escaped("\ud800") == "\ufffd"  # of a file's name; no capture holds it


def test_recipes_mark_what_differs(pair):
    pair.recipes[0] |= {"dtype": "bfloat16", "versions": {"torch": "2.12.0"}, "device": "cuda"}
    page, _ = pair.page()
    (table,) = [table for table in page.iter("table") if table.get("class") == "recipe"]
    lines = {}
    for line in table.find("tbody"):
        lines[line[0].text] = (line.get("class"), line[1].text, line[2].text, line[3].text)
    assert lines == {
        "model": (None, None, "flux.2-tiny", "flux.2-tiny"),
        "prompt": (None, None, "a cat", "a cat"),
        "dtype": ("over", "≠", "bfloat16", "float64"),
        "versions.torch": ("over", "≠", "2.12.0", "2.13.0"),
        "schedule": (None, None, "1.0, 0.0", "1.0, 0.0"),
        "device": ("over", "≠", "cuda", "–"),
    }


def test_notes_name_lost_tensors_and_stopped_runs(pair):
    del pair.a["noise"]
    pair.recipes[0]["stopped"] = "the latents are not finite after step 2"
    notes = [text_of(e) for e in pair.page()[0].iter("p") if e.get("class") == "note"]
    assert notes[1].endswith("a.safetensors stopped early: the latents are not finite after step 2")
    assert re.fullmatch(
        r"compared: 20 of the 21 tensors of .*b\.safetensors; "
        r"1 are not in .*a\.safetensors \(noise\)",
        notes[0],
    )


def test_plain_file_of_a_port_has_no_figures_by_step(pair):
    names = {
        "double_blocks.0/out.0": "step.001/double_blocks.0/out.0",
        "final_layer/out": "step.001/velocity",
    }
    captures = []
    for side, factor in (("a", 1.5), ("b", 1)):
        path = pair.folder / f"{side}.safetensors"
        save_file({ours: pair.b[theirs] * factor for ours, theirs in names.items()}, path)
        captures.append(Capture(path))
    a, b = captures
    text, pngs = report.page(a, b, compare(a, b, TOLERANCE))
    page = text_of(ElementTree.fromstring(text))
    assert list(pngs) == ["depth"]
    assert "Neither file has a recipe" in page and "No image is in" in page
    assert "Its tokens are not on the latent grid, or were not stored." in page


# ---------------------------------------------------------------- images and figures


def test_difference_of_the_images_is_amplified(pair):
    pair.a["image"] = pair.b["image"].clone()
    pair.a["image"][3, 5] += torch.tensor([0, 1, 2], dtype=torch.uint8)
    images, about = report.images_of(*pair.write())
    difference = np.array(images["difference"])
    assert difference[3, 5].tolist() == [0, 127, 254] and np.count_nonzero(difference) == 2
    assert "at most 2 of 255" in about and "127 times as bright" in about


def test_images_of_different_size_have_no_difference(pair):
    pair.a["image"] = pair.b["image"][:, :16]
    images, about = report.images_of(*pair.write())
    assert list(images) == ["image-a", "image-b"] and "16×24 and 32×24 pixels" in about


def test_block_ratios_are_the_largest_multiples_of_the_tolerance(pair):
    pair.off("step.001/single_blocks.0/attention/q", 0.002)
    pair.off("step.001/single_blocks.0/out", 0.001)
    pair.off("step.002/double_blocks.0/out.1", 0.05)
    a, b = pair.write()
    blocks, steps, ratios = figures.block_ratios(compare(a, b, TOLERANCE))
    assert blocks == ["img_in", "double_blocks.0", "single_blocks.0", "velocity", "latents"]
    expected = np.zeros((5, 2))
    expected[2, 0], expected[1, 1] = 0.2, 5
    assert steps == [1, 2] and ratios == pytest.approx(expected, rel=1e-6)


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
def test_token_errors_are_on_the_image_grid(name, token, kinds, pair):
    """Token 6 of the image is row 1, column 2; text precedes it in single blocks."""
    pair.a[name] = pair.b[name].clone()
    pair.a[name][..., token + 6, :] *= 1.5
    a, b = pair.write(*kinds)
    row = first_over(compare(a, b, TOLERANCE))
    errors = report.token_errors(a, b, row)
    expected = np.zeros((HEIGHT, WIDTH))
    expected[1, 2] = 0.5
    assert row.name == name and errors == pytest.approx(expected, abs=1e-6)
    assert errors.max() == pytest.approx(row.errors.worst_token, rel=1e-6)


def test_token_errors_of_a_decoder_and_of_latents(pair):
    places = {"decoder/decoder.conv_in/out": (8, 10), "step.001/latents": (HEIGHT, WIDTH)}
    for name, shape in places.items():
        pair.a = a_run()
        pair.a[name][0, :, 2, 3] *= 1.25
        a, b = pair.write()
        errors = report.token_errors(a, b, first_over(compare(a, b, 1e-4)))
        assert errors.shape == shape and np.argwhere(errors).tolist() == [[2, 3]]
        assert errors.max() == pytest.approx(0.25)


def test_text_and_ids_have_no_token_errors(pair):
    for name in (
        "text/model/layers.0/out",
        "step.001/double_blocks.0/out.1",
        "ids/img",
        "step.001/double_blocks.0.txt_attn.qkv/out",
    ):
        pair.a = a_run()
        pair.a[name] = pair.b[name] * 2
        a, b = pair.write()
        assert report.token_errors(a, b, first_over(compare(a, b, TOLERANCE))) is None, name


# ---------------------------------------------------------------- files


def test_files_are_never_overwritten_or_left_in_part(pair, monkeypatch):
    a, b = pair.write()
    rows, path = compare(a, b, TOLERANCE), pair.folder / "out/report.html"
    written = report.write(a, b, rows, path, pair.folder / "plots")
    names = ["depth", "blocks", "steps", "image-a", "image-b"]
    assert written == [path, *(pair.folder / f"plots/{name}.png" for name in names)]
    before = path.read_bytes()
    second = report.write(a, b, rows, pair.folder / "out")  # a folder gets report.html
    assert second == [pair.folder / "out/report-2.html"] and path.read_bytes() == before

    files, link = [], output.os.link

    def full(part, path):
        files.append(path)
        if len(files) > room:
            raise OSError(28, "No space left on device", str(part))
        link(part, path)

    monkeypatch.setattr(output.os, "link", full)
    monkeypatch.setattr(output.os, "replace", full)
    for room in (0, 1, 3):
        files.clear()
        with pytest.raises(
            UserError, match=r"output: .*/report\.html cannot be written \(No space"
        ):
            report.write(a, b, rows, pair.folder / "new/report.html", pair.folder / "figures")
        assert len(files) > room
        assert not list((pair.folder / "new").iterdir())
        assert not list((pair.folder / "figures").iterdir())


def test_wrong_outputs_are_refused(pair, monkeypatch):
    a, b = pair.write()
    rows, file = compare(a, b), pair.folder / "a.safetensors"
    for path, png, message in (
        ("report.pdf", None, "output: must be an .html file or a folder"),
        (file / "report.html", None, "output: cannot write to .*a.safetensors"),
        ("report.html", file, "png: cannot write to .*a.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            report.write(a, b, rows, pair.folder / path, png)
    with pytest.raises(UserError, match="no tensor was compared"):
        report.write(a, b, [], pair.folder / "report.html")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="A report needs matplotlib .* Run `pip install"):
        report.write(a, b, rows, pair.folder / "report.html")
    assert sorted(path.name for path in pair.folder.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.slow
def test_command_writes_the_report(pair):
    pair.off("step.001/velocity", 0.02)
    pair.write()

    def run(*args: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(SCRIPT), "report", "a.safetensors", "b.safetensors", *args]
        env = os.environ | {"PYTHONWARNINGS": "ignore"}
        return subprocess.run(command, cwd=pair.folder, capture_output=True, text=True, env=env)

    over = run("--output", "report.html", "--tolerance", "0.01", "--png", "plots")
    assert over.returncode == 1
    assert "the first is step.001/velocity: relative L2 0.02 of 0.01" in over.stderr
    names = {"depth", "tokens", "steps", "blocks", "image-a", "image-b"}
    page, *pngs = over.stdout.split()
    assert page == "report.html" and set(pngs) == {f"plots/{name}.png" for name in names}
    within = run("--output", "report.html", "--tolerance", "0.1")
    assert within.returncode == 0 and within.stdout == "report-2.html\n"
    wrong = run("--output", "report.pdf")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ")


def test_page_fits_a_small_screen(pair):
    """What is wider than 390 pixels scrolls in its own box: charts and tables."""
    pair.off("step.002/velocity", 0.5)
    page, _ = pair.page()
    metas = {meta.get("name"): meta.get("content") for meta in page.iter("meta")}
    assert metas["viewport"].startswith("width=device-width")
    boxes = {"scroll", "chart", "images"}
    parents = {child: parent for parent in page.iter() for child in parent}

    def boxed(element: ElementTree.Element) -> bool:
        while element in parents:
            if boxes & set((element.get("class") or "").split()):
                return True
            element = parents[element]
        return False

    wide = [*page.iter("table"), *page.iter("img")]
    assert len(wide) > 4 and all(map(boxed, wide))
    assert ".chart { overflow-x: auto }" in "".join(page.find("head").itertext())


def test_positions_of_flux3_are_on_the_image_grid():
    """Rows and columns are halved, references follow the image, and text precedes both."""
    rows, columns = torch.arange(HEIGHT) / 2, torch.arange(WIDTH) / 2
    ids = torch.zeros(HEIGHT * WIDTH, 4)
    ids[:, 1:3] = torch.cartesian_prod(rows, columns)
    references = ids[:8].clone()
    references[:, 3] = -1
    joint = torch.arange(5 + len(ids) + len(references)).double()[None]  # 5 text tokens
    places = report.image_positions({"ids/img": ids, "ids/references": references})
    grid = report.on_grid(joint, "step.001/single_blocks.0/out", places)
    assert grid.tolist() == joint[0, 5 : 5 + len(ids)].unflatten(0, (HEIGHT, WIDTH)).tolist()
    alone = torch.arange(len(ids)).double()[None]
    grid = report.on_grid(alone, "step.001/content_mode_blocks.image.0/out", places)
    assert grid.flatten().tolist() == alone[0].tolist()
    assert report.on_grid(alone, "step.001/content_mode_blocks.image_cond.0/out", places) is None


@pytest.mark.parametrize(
    "name, block",
    [
        ("content_mode_blocks.image_cond.0.q_proj/out", "content_mode_blocks.image_cond.0"),
        ("negative/txt_mode_blocks.4/out", "negative/txt_mode_blocks.4"),
        ("final_layer.image.linear/in", "final_layer"),
    ],
)
def test_blocks_of_flux3_have_a_row_each(name, block):
    assert figures.block_of(Row(f"step.002/{name}", (), "F32", "full", 0.0, None)) == block
