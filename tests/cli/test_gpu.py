"""scripts/benchmarks/gpu.py: every check runs on a CPU in tiny sizes; one that fails is told."""

import json
import sys

import pytest
from support.load_script import script

gpu = script("benchmarks/gpu")


@pytest.mark.slow
def test_every_check_runs_dry_without_diffusers(tmp_path, monkeypatch, capsys):
    for name in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.setattr(gpu, "installed", lambda name: None)
    path = tmp_path / "a.json"
    assert gpu.main(["--dry", "--json", str(path)]) == 0
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]
    printed = capsys.readouterr().out
    for row in rows:
        if row["limit"] is not None:  # an error; a time decides nothing here
            assert row["reached"], row["name"]
        assert f"| {row['name']} |" in printed
    against = {row["against"] for row in rows if row["theirs"] is not None}
    assert against == {"predicted", "floor", "needed", "PCIe", "expected", "plain", "first"}
    limits = [row["name"] for row in rows if row["limit"] is not None]
    assert len(limits) == 17 and "streamed step, values that differ" in limits


def test_failed_and_late_checks_leave_a_row(monkeypatch, capsys, tmp_path):
    def wrong(machine):
        yield gpu.Row("first", "s", 1.0, 1.0, "predicted")
        raise RuntimeError("no kernel |")

    def other(machine):
        yield gpu.Row("other", "s", 1.0, 1.0, "predicted")

    monkeypatch.setattr(gpu, "CHECKS", (wrong, other))
    assert gpu.main(["--dry"]) == 0
    printed = capsys.readouterr().out
    assert "| first |" in printed and "| wrong: RuntimeError: no kernel / |" in printed
    assert "| other |" in printed and "1 of 1 goals reached" not in printed
    assert gpu.main(["--dry", "--minutes", "-1"]) == 0
    printed = capsys.readouterr().out
    assert "other: not started in time" in printed and "| first |" not in printed


def test_a_trial_without_a_gpu_must_be_asked_for(capsys):
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "--dry: missing" in capsys.readouterr().err
