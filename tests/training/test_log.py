"""flux.training.log: the CSV file of a run that is resumed, and the chart of the loss."""

import os
import re

import pytest
from PIL import Image
from support.weight_files import refusal

from flux.training.log import CSVLog, plot_loss, report

COLUMNS = ("step", "loss", "rate")


def test_csv_log_drops_the_rows_that_are_repeated(tmp_path):
    path = tmp_path / "loss.csv"
    log = CSVLog(path, COLUMNS)
    for step in range(1, 5):
        log.add(step, 1 / step, 0.5)
    log = CSVLog(path, COLUMNS, step=2)
    log.add(3, 7, 0.25)
    assert path.read_text().split() == ["step,loss,rate", "1,1,0.5", "2,0.5,0.5", "3,7,0.25"]
    assert log.column("loss") == [1, 0.5, 7]


HEADER = "step,loss,rate\r\n"
FOREIGN = [
    ("name,size\n1,2\n", "is not the log of a run, which begins with step,loss,rate"),
    ("step,loss\n1,2\n", "is not the log of a run"),
    ("\n", "is not the log of a run"),
    ("a text without an end", "is not the log of a run"),
    ("\0\0\0\0", "is not the log of a run"),
    (HEADER + "1,2,3\r\n1,2,3\r\n", ", line 3: is no step, or no later step than"),
    (HEADER + "2,2,3\r\n1,2,3\r\n", ", line 3: is no step, or no later step than"),
    (HEADER + "1.0,2,3\r\n", ", line 2: is no step"),
    (HEADER + "-1,2,3\r\n", ", line 2: is no step"),
    (HEADER + "1,2\r\n", ", line 2: is no step"),
    (HEADER + "1,2,3,4\r\n", ", line 2: is no step"),
    (HEADER + "1,nan,3\r\n", ", line 2: is no step"),
    (HEADER + "1,1e999,3\r\n", ", line 2: is no step"),
    (HEADER + "1,,3\r\n", ", line 2: is no step"),
    (HEADER + "\r\n", ", line 2: is no step"),
    (HEADER + "1,2,3\r\n=cmd(),1,1\r\n", ", line 3: is no step"),
    (HEADER + "\xff,1,1\r\n", ", line 2: is no step"),
    (HEADER + "9" * 5000 + ",1,1\r\n", ", line 2: is no step"),
]


@pytest.mark.parametrize("text, message", FOREIGN)
def test_foreign_csv_file_is_refused_and_kept(tmp_path, text, message):
    path = tmp_path / "loss.csv"
    path.write_bytes(text.encode("latin-1"))
    assert message in refusal(CSVLog, path, COLUMNS, 9)
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("end", ["", "step,lo", HEADER, HEADER + "1,0.5,2\r\n2,0.2"])
def test_half_a_row_is_what_a_killed_process_leaves(tmp_path, end):
    path = tmp_path / "loss.csv"
    path.write_bytes(end.encode())
    log = CSVLog(path, COLUMNS, 9)
    rows = 1 if "0.5" in end else 0
    assert log.column("loss") == [0.5] * rows
    log.add(5, 7, 0.25)
    lines = ["step,loss,rate", *["1,0.5,2"] * rows, "5,7,0.25"]
    assert path.read_text().split() == lines and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "broken link"])
def test_special_file_is_refused(tmp_path, kind):
    path = tmp_path / "loss.csv"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    assert re.match(f"{path}: (is a|does not exist)", refusal(CSVLog, path, COLUMNS))


def test_report_shows_control_characters_escaped(capsys):
    report("a\x1b]0;b\x07c\nerror: d")
    assert capsys.readouterr().err == "a\\x1b]0;b\\x07c\\nerror: d\n"


def test_csv_log_renames_the_columns_of_an_older_file(tmp_path):
    path = tmp_path / "loss.csv"
    path.write_text("step,loss,pictures_a_second\n1,0.5,3\n")
    CSVLog(path, ("step", "loss", "images_per_second"), step=1)
    assert path.read_text().split() == ["step,loss,images_per_second", "1,0.5,3"]


def test_loss_is_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    log = CSVLog(tmp_path / "loss.csv", COLUMNS)
    for step in range(1, 4):
        log.add(step, 1 / step, 0.5)
    plot_loss(log, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1280, 600)
        assert len(image.convert("RGB").getcolors(2**24)) > 10
