"""scripts/sample.py under torchrun, with two processes: the files of one process, and how it fails.

What a run prints comes from the first process alone, an error from one process.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.classifiers import transformers_classifier
from support.drawn_images import photo
from support.parallel_images import toy_lora
from support.sample_run import (
    PROMPT,
    QUICK,
    TOY,
    files_in,
    image_of,
    pixels,
    subprocess_environment,
)

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).resolve().parents[1] / "support/several_samples.py"
SECONDS = 60  # to the end of all after one has failed, on a busy machine; 5 on a quiet one
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = (PROMPT, "--width", "80", "--height", "64", "--steps", "3", "--seed", "7")
NEGATIVE = ("--negative-prompt", "a green star", "--true-cfg-scale", "2")


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    folder: Path
    codes: list[list[int]]  # of each process

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def run(folder: Path, launcher: tuple, *runs: dict) -> Ended:
    """Run sample.py several times in an empty folder: see `several_samples`."""
    folder.mkdir()
    request = folder.with_suffix(".json")
    request.write_text(json.dumps(runs, default=str))
    done = subprocess.run(
        [sys.executable, *launcher, PROGRAM, request],
        cwd=folder,
        env=subprocess_environment(folder),
        capture_output=True,
        text=True,
        timeout=400,
    )
    files = sorted(folder.glob("codes.*.json"))
    codes = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return Ended(done.returncode, done.stdout, done.stderr, folder, codes)


def test_two_processes_write_the_files_of_one(tmp_path):
    photo(80, 64).save(tmp_path / "photo.png")
    lora = toy_lora(tmp_path / "lora.safetensors", "flux.2-tiny")
    classifier = transformers_classifier()
    classifier.classifier.bias.data = torch.tensor([-99.0, 99.0])  # which refuses everything
    classifier.save_pretrained(tmp_path / "classifier")
    filtered = ("--filter", "nsfw", "--filter-weights", tmp_path / "classifier", "--review", "no")
    runs = [
        [*SMALL, "--num-images", 2, *filtered],
        [*SMALL, "--num-images", 3, "--save-latents"],
        [*SMALL, *NEGATIVE, "--model", "flux.1-tiny"],
        [*SMALL, "--image", tmp_path / "photo.png", "--lora", f"{lora}:0.7", "--offload", "block"],
    ]
    divided = [
        runs[0],
        [*runs[1], "--parallel", "data=2", "--max-vram", "0.012"],  # too little for one process
        [*runs[2], "--shard-weights"],
        [*runs[3], "--parallel", "context=2"],
    ]
    one = run(tmp_path / "one", (), *(dict(arguments=arguments) for arguments in runs))
    two = run(tmp_path / "two", TORCHRUN, *(dict(arguments=arguments) for arguments in divided))
    assert one.code == two.code == 0, (one.err, two.err)
    assert one.codes == [[3, 0, 0, 0]] and two.codes == [[3, 0, 0, 0], [0, 0, 0, 0]]
    assert one.err.count("refused by nsfw") == two.err.count("refused by nsfw") == 2
    assert one.out == two.out and len(one.out.splitlines()) == 5  # the paths
    names = files_in(one.folder)
    assert names == files_in(two.folder) and len([n for n in names if n.endswith(".png")]) == 7
    for name in names:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name
    said = [line for line in two.err.splitlines() if line.startswith("parallel: ")]
    numbers = "(0.013 GB whole, 0.012 GB sharded, 0.012 GB are free)"
    assert said == [
        "parallel: data=2, on 2 processes",
        f"parallel: data=2, on 2 processes, with sharded weights {numbers}",
        "parallel: cfg=2, on 2 processes, with sharded weights",
        "parallel: context=2, on 2 processes",
    ]


def test_one_process_of_torchrun_makes_no_group(cli, monkeypatch):
    """No collective and no process group: every step is that of a plain run."""
    plain = pixels(image_of(cli(PROMPT, *QUICK, "--seed", "7")))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", pytest.fail)
    monkeypatch.setattr(torch.distributed, "rendezvous", pytest.fail)
    ran = cli(PROMPT, *QUICK, "--seed", "7")
    assert pixels(image_of(ran)) == plain and "parallel:" not in ran.err
    assert not torch.distributed.is_initialized()


def ended(done: Ended, *sentences: str) -> None:
    """Assert that one process said each of these, that no file was written, and that all ended."""
    assert len(done.errors) == len(sentences), done.err
    assert all(said in error for said, error in zip(sentences, done.errors)), done.err
    assert "Traceback" not in done.err.partition("ChildFailedError")[0].partition("torch/")[0]
    assert done.out == "" and not [n for n in files_in(done.folder) if n.endswith(".png")]
    assert time.time() - (done.folder / "failed").stat().st_mtime < SECONDS
    assert done.code == 1  # torchrun's own


def test_failures_end_all_with_one_sentence(tmp_path):
    """What is wrong in all processes, what differs between them, and what one of them raises."""
    weights = load_file(TOY)
    for number in ("0", "1/0"):  # files of one name, each in the folder of a process
        (tmp_path / number).mkdir(parents=True)
        weights["img_in.weight"] = weights["img_in.weight"] + 0.1
        save_file(weights, tmp_path / number / "t.safetensors")
    (tmp_path / "1/run").mkdir()
    own = ("--model", "flux.2-tiny", "--transformer", "../0/t.safetensors")
    done = run(
        tmp_path / "run",
        TORCHRUN,
        dict(arguments=[*SMALL, "--parallel", "context=3"]),
        dict(arguments=SMALL, of_process_1=dict(arguments=[*SMALL, "--guidance", "2"])),
        dict(arguments=[*SMALL, *own], of_process_1=dict(folder=tmp_path / "1/run")),
        dict(arguments=[*SMALL, "--max-vram", "0.011"]),
        dict(arguments=SMALL, of_process_1=dict(fails="raise")),
    )
    ended(
        done,
        "--parallel: context=3 needs 3 processes or a multiple (got 2)",
        "--parallel: process 1 has other arguments than process 0: guidance.",
        "--parallel: process 1 has other files than process 0: transformer t.",
        "0.1 GB (got 0.011). Use --quantize fp8 or an -fp8 file or more processes.",
        "process 1: --latents: not finite here",
    )
    assert [codes[:4] for codes in done.codes] == [[2, 2, 2, 2]] * 2


def test_lost_process_ends_all_with_one_sentence(tmp_path):
    done = run(tmp_path / "run", TORCHRUN, dict(arguments=SMALL, of_process_1=dict(fails="kill")))
    ended(done, "another process has ended; torchrun says which, and how.")
