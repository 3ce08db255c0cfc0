"""flux.training.log: the CSV file of a run that is resumed, and the chart of the loss."""

import pytest
from PIL import Image

from flux.training.log import CSVLog, plot_loss

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


def test_csv_log_drops_what_is_not_a_row_of_numbers(tmp_path):
    path = tmp_path / "loss.csv"
    path.write_bytes(b"step\n1.0,2,3\n1,2,3\n2,nan,3\n3,4\n\xff,1,1\n")
    log = CSVLog(path, COLUMNS, step=9)
    assert log.rows == [["1", "2", "3"]]
    assert path.read_text().split() == ["step,loss,rate", "1,2,3"]


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
