"""flux.parity.table and `parity.py table`: the README shows what the command measures.

The command runs once, in this process. Figures are compared with the bounds of the networks' tests,
and rounding and agreement with literals.
"""

import contextlib
import io
import math
import os
import runpy
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import parity_rows

import flux
from flux.errors import UserError
from flux.parity import table
from flux.parity.reference import golden_networks
from flux.parity.table import BFloat16Row, Figures, Float32Row

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "flux/parity/README.md"


@pytest.fixture(scope="module")
def printed() -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["parity.py", "table"])
        patch.setattr(sys, "path", sys.path.copy())
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts/parity.py"), run_name="__main__")
    assert ended.value.code == 0
    return out.getvalue()


@pytest.fixture
def readme(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Naïve\n\n{table.BEGIN}\nold\n{table.END}\n\n| a | b |\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------- what is measured


def test_readme_shows_the_measured_tables(printed):
    shown = table.find(README)[1]
    assert table.differences(shown, printed) == []
    assert shown.count("\n") == printed.strip().count("\n")


def test_every_network_and_pipeline_is_measured(printed):
    """What their own tests demand holds here too, with other inputs."""
    found = table.cells(printed)
    for what in (*parity_rows.NETWORKS, *parity_rows.RUNS):
        own_numerics = what in parity_rows.RUNS or "transformer" in what
        assert (
            float(found[f"float32 {what}", "relative L2"]) <= 1e-5
            and found[f"float32 {what}", "PCC"] == "1"
        )
        halves = [
            f"bfloat16 {what} {numerics}"
            for numerics in (parity_rows.PRESETS if own_numerics else ["–"])
        ]
        ours, theirs = (
            [float(found[row, f"{whose} to float32"]) for row in halves]
            for whose in ("ours", "theirs")
        )
        assert all(1e-3 < a <= b for a, b in zip(ours, theirs, strict=True))
        if own_numerics and "FLUX 3" not in what:  # whose times every preset rounds to bfloat16
            assert ours[1] <= 0.01 and theirs[1] >= 3 * ours[1]
        if "transformer" in what or "text to image" in what:
            assert [found[halves[0], column] for column in ("max abs", "relative L2", "PCC")] == [
                "0",
                "0",
                "1",
            ]
        if "text to image" in what or what in list(parity_rows.NETWORKS)[:8]:
            assert float(found[f"float32 {what}", "golden: relative L2"]) <= 1e-5
    for what in (
        "FLUX.1 transformer, dev and schnell",
        "FLUX.2 transformer, dev and klein",
        "SigLIP",
        "Redux",
    ):
        assert found[f"float32 {what}", "max abs"] == "0"
    assert (
        f"torch {torch.__version__}" in printed
        and "diffusers 0." in printed
        and "transformers 5." in printed
    )


@torch.no_grad()
def test_fault_changes_the_figures():
    """Of one of the networks of a row: all tokens are given one place."""
    ours = {name: golden_networks()[name] for name in ("flux.1-dev", "flux.1-schnell")}
    right, *_ = parity_rows.of_networks("FLUX.1", ours)
    rope = ours["flux.1-schnell"].rope
    ours["flux.1-schnell"].rope = lambda txt_ids, img_ids: rope(0 * txt_ids, 0 * img_ids)
    wrong, *_ = parity_rows.of_networks("FLUX.1", ours)
    assert right.live.relative_l2 == 0 and wrong.live.relative_l2 > 0.01
    assert right.golden.relative_l2 <= 1e-5 and wrong.golden.relative_l2 > 0.01
    assert table.differences(*(table.markdown([line], "") for line in (right, wrong)))


def test_golden_tensors_of_other_weights_are_refused():
    other = golden_networks()["flux.1-schnell"]
    message = (
        r"draws other random weights for .* for flux\.2-klein\.safetensors\. "
        r"Run scripts/dev/golden\.py$"
    )
    with pytest.raises(UserError, match=message):
        parity_rows.inputs("flux.2-klein", other)


def test_figures_are_of_the_worst_tensor():
    ones, wave = torch.ones(4), torch.tensor([1.0, -1, 1, -1])
    found = table.figures(
        "it", [(ones, ones), (wave * 1.5, wave), (torch.tensor([1.0, -1, 1, -2]), wave)]
    )
    assert found == (
        1.0,
        pytest.approx(0.5),
        pytest.approx(5 / 27**0.5),
    )  # PCC of the last by hand: (4 + 1) / sqrt(27)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="^it: has NaN or infinity"):
            table.figures("it", [(ones, ones), (ones * bad, ones * bad)])


# ---------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    "x, text",
    [
        (0.0, "0"),
        (2e-7, "2e-7"),
        (2.0001e-7, "3e-7"),
        (3e-7, "3e-7"),
        (9.1e-7, "1e-6"),
        (1e-10, "1e-10"),
        (1.2e-4, "0.0002"),
        (0.0144, "0.02"),
        (0.95, "1"),
        (1.0, "1"),
        (1.01, "2"),
        (12.0, "20"),
    ],
)
def test_numbers_are_rounded_up_to_one_digit(x, text):
    assert table.number(x) == text


@given(st.floats(1e-30, 1e30))
def test_bound_is_between_a_number_and_its_double(x):
    assert x * (1 - 1e-8) <= table.bound(x) <= 2 * x * (1 + 1e-8)
    assert len(table.number(x).partition("e")[0].strip("0.")) == 1


@pytest.mark.parametrize(
    "pcc, text", [(1.0, "1"), (1 - 1e-13, "1"), (0.9999991, "0.999999"), (0.949, "0.94")]
)
def test_correlations_are_rounded_down(pcc, text):
    assert table.shown(Figures(0.0, 0.0, pcc))[2] == text


LINES = [
    Float32Row("CLIP", "transformers", Figures(0.0, 0.0, 1.0), Figures(5e-7, 2e-7, 1.0)),
    Float32Row("Redux", "diffusers", Figures(4e-6, 2e-6, 1.0), None),
    BFloat16Row("CLIP", "transformers", "", Figures(0.0, 0.0, 1.0), 0.006, 0.006),
    BFloat16Row("FLUX", "diffusers", "exact", Figures(1.4, 0.3, 0.949), 0.008, 0.3),
]


def test_markdown_has_one_table_for_each_precision():
    assert table.markdown(LINES, "a machine") == (
        "| float32 | against | max abs | relative L2 | PCC "
        "| golden: max abs | golden: relative L2 | golden: PCC |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| CLIP | transformers | 0 | 0 | 1 | 5e-7 | 2e-7 | 1 |\n"
        "| Redux | diffusers | 4e-6 | 2e-6 | 1 | – | – | – |\n"
        "\n"
        "| bfloat16 | against | numerics | max abs | relative L2 | PCC "
        "| ours to float32 | theirs to float32 |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| CLIP | transformers | – | 0 | 0 | 1 | 0.006 | 0.006 |\n"
        "| FLUX | diffusers | exact | 2 | 0.3 | 0.94 | 0.008 | 0.3 |\n"
        "\n"
        "(a machine.)"
    )


LIVE, RECORDED, ROUNDED, LARGE = (
    Figures(*x) for x in ((0, 0, 1), (5e-7, 2e-7, 1), (4e-6, 2e-6, 1), (1.4, 0.3, 0.949))
)


@pytest.mark.parametrize(
    "number, change, apart",
    [
        (
            0,
            dict(live=LIVE._replace(max_abs=1e-9)),
            ["float32 CLIP, max abs: 0 is shown, and 1e-9 found"],
        ),  # zero stays zero
        (
            1,
            dict(live=ROUNDED._replace(max_abs=0.0)),
            ["float32 Redux, max abs: 4e-6 is shown, and 0 found"],
        ),
        (
            1,
            dict(live=ROUNDED._replace(max_abs=2e-5, relative_l2=4e-7)),
            [],
        ),  # five times as much, and as little
        (
            1,
            dict(live=ROUNDED._replace(max_abs=2.1e-5)),
            ["float32 Redux, max abs: 4e-6 is shown, and 3e-5 found"],
        ),
        (
            1,
            dict(live=ROUNDED._replace(relative_l2=3e-7)),
            ["float32 Redux, relative L2: 2e-6 is shown, and 3e-7 found"],
        ),
        (
            1,
            dict(live=ROUNDED._replace(pcc=0.99999)),
            ["float32 Redux, PCC: 1 is shown, and 0.99999 found"],
        ),
        (
            0,
            dict(golden=RECORDED._replace(max_abs=0.0, relative_l2=1e-5)),
            [],
        ),  # what one processor recorded
        (
            0,
            dict(golden=RECORDED._replace(relative_l2=3e-5)),
            ["float32 CLIP, golden: relative L2: 2e-7 is shown, and 3e-5 found"],
        ),
        (
            0,
            dict(golden=None),
            [
                f"float32 CLIP, golden: {x} is shown, and – found"
                for x in ("PCC: 1", "max abs: 5e-7", "relative L2: 2e-7")
            ],
        ),
        (3, dict(ours=0.02), []),  # three times as much
        (
            3,
            dict(ours=0.021),
            ["bfloat16 FLUX exact, ours to float32: 0.008 is shown, and 0.03 found"],
        ),
        (3, dict(live=LARGE._replace(pcc=0.9)), []),
        (
            3,
            dict(live=LARGE._replace(pcc=0.79)),
            ["bfloat16 FLUX exact, PCC: 0.94 is shown, and 0.7 found"],
        ),
        (
            3,
            dict(against="others"),
            ["bfloat16 FLUX exact, against: diffusers is shown, and others found"],
        ),
    ],
)
def test_tables_agree_within_a_factor(number, change, apart):
    other = [replace(line, **change) if n == number else line for n, line in enumerate(LINES)]
    assert table.differences(*(table.markdown(lines, "") for lines in (LINES, other))) == apart


def test_row_of_one_table_only_is_reported():
    whole = table.markdown(LINES, "a machine")
    for lines in (LINES[:3], [*LINES[:3], replace(LINES[3], numerics="bfl")], []):
        lost = table.differences(whole, table.markdown(lines, ""))
        assert "bfloat16 FLUX exact, max abs: is in one table only" in lost
        assert lost == table.differences(table.markdown(lines, ""), whole)
    assert table.differences(whole, table.markdown(LINES, "another machine")) == []


# ---------------------------------------------------------------- in the README


def test_tables_are_written_in_their_place(readme):
    text = table.markdown(LINES, "a machine")
    readme.chmod(0o640)
    for _ in range(2):
        table.write(readme, text)
        assert (
            readme.read_text(encoding="utf-8")
            == f"# Naïve\n\n{table.BEGIN}\n\n{text}\n\n{table.END}\n\n| a | b |\n"
        )
    assert table.find(readme)[1] == text and stat.S_IMODE(readme.stat().st_mode) == 0o640


def test_failed_write_leaves_the_readme(readme, monkeypatch):
    before = readme.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        table.write(readme, "new")
    assert readme.read_bytes() == before and list(readme.parent.iterdir()) == [readme]


@pytest.mark.parametrize("mark", [table.BEGIN, table.END])
def test_readme_without_a_place_is_refused(readme, mark):
    readme.write_text(readme.read_text(encoding="utf-8").replace(mark, ""), encoding="utf-8")
    before = readme.read_bytes()
    with pytest.raises(
        UserError, match="README.md: has no place for the tables. Put the lines <!-- .* and <!-- "
    ):
        table.write(readme, "new")
    assert readme.read_bytes() == before


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_missing_library_is_named(parity, monkeypatch, library):
    monkeypatch.delitem(sys.modules, "support.parity_rows")
    monkeypatch.setitem(sys.modules, library, None)
    code, out, err = parity("table")
    assert (code, out) == (2, "")
    assert f"{library} is missing or too old" in err and err.count("\n") == 1


def test_command_writes_the_tables_on_request(parity, monkeypatch, readme):
    """To the README beside the script, but not in this test."""
    monkeypatch.setattr(parity_rows, "measure", lambda: iter(LINES))
    written, write = [], table.write
    monkeypatch.setattr(
        table, "write", lambda path, text: (written.append(path), write(readme, text))
    )
    code, out, _ = parity("table")
    assert code == 0 and written == [] and "old" in readme.read_text(encoding="utf-8")
    code, again, _ = parity("table", "--write")
    assert (
        (code, again) == (0, out) and written == [README] and table.find(readme)[1] == out.strip()
    )


def test_threads_are_restored():
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), parity_rows.one_quiet_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads and flux.MODELS["flux.1-dev"].transformer.depth == 19
