"""Very many images: workers share a folder, are killed, start again, and make the same bytes.

The right bytes are those of the pipeline, called with the values of a line.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support.judges import KINDS, probability, save_judge
from support.load_script import script

import flux
from flux.batch import claims, manifest, worker
from flux.batch.claims import claim
from flux.batch.manifest import BLOCK, Manifest, file_name
from flux.batch.records import Records
from flux.errors import UserError
from flux.safety import judge
from flux.safety.verdict import Verdict
from flux.safety.verification import verify

SCRIPT = Path(__file__).parents[2] / "scripts/batch.py"
SMALL = {"width": 64, "height": 64, "steps": 1}


def write(path: Path, lines: list) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def small(count: int) -> list[dict]:
    return [{"prompt": f"a red star {number}"} | SMALL for number in range(count)]


@pytest.fixture
def batch(tmp_path, monkeypatch, capsys):
    """Run scripts/batch.py here, on the CPU: arguments -> (exit code, what was said)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "FLUX_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    main = script("batch").main

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["batch.py", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as stop:  # argparse
            code = stop.code
        finally:
            torch.set_flush_denormal(False)
        return code, capsys.readouterr().err

    return run


def images(out: Path) -> dict[str, str]:
    """Return the hash of each image."""
    found = sorted(out.glob("0*/*.png"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------ images


def test_each_image_is_that_of_its_line_alone(batch, tmp_path):
    lines = small(3) + [{"prompt": "a moon", "seed": 7, "id": "moon", "guidance": 2} | SMALL]
    code, said = batch(write(tmp_path / "m.jsonl", lines), "out")
    assert code == 0 and "4 images, 0 wrong lines, 0 images left" in said
    pipe = flux.load(device="cpu")
    torch.set_flush_denormal(True)
    for number, line in enumerate(lines):
        values = dict(line)
        id_, values["seed"] = values.pop("id", None), manifest.seed_of(line)
        if "seed" in line:
            values["seed"] = line["seed"]
        image = pipe(values.pop("prompt"), **values)[0]
        image.save(tmp_path / "alone.png")
        name = f"out/000000/{number:09}{f'-{id_}' if id_ else ''}.png"
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone.png").read_bytes()
    # in another order, beside others, on another machine: the same seed
    assert manifest.seed_of(lines[0]) == manifest.seed_of(dict(reversed(lines[0].items())))
    assert batch("m.jsonl", "out", "--merge")[0] == 0
    assert [record["line"] for record in records(tmp_path / "out")] == [0, 1, 2, 3]


def test_wrong_lines_are_named_and_the_rest_goes_on(batch, tmp_path):
    wrong = [
        "not json",
        "[]",
        '{"prompt": "a", "prompt": "b"}',
        {"prompt": 5},
        {"seed": 1},
        {"prompt": "a", "promt": "b"},
        {"prompt": "a", "width": 10},
        {"prompt": "a", "id": "../a"},
        {"prompt": "a", "images": ["none.png"]},
        "",
        "[" * 100_000,
        {"prompt": "a\0b"},
    ]
    code, said = batch(write(tmp_path / "m.jsonl", [*small(1), *wrong, *small(1)]), "out")
    assert code == 2 and "2 images, 12 wrong lines, 0 images left" in said
    assert all(f"line {number}: " in said for number in range(2, 14)) and "Traceback" not in said
    assert batch("m.jsonl", "out", "--merge")[0] == 2
    found = records(tmp_path / "out")
    assert [("error" in record) for record in found] == [False, *[True] * 12, False]
    # a line that was wrong is tried again
    code, said = batch("m.jsonl", "out")
    assert code == 2 and said.count("line 5: prompt: must be a text (got 5).") == 1


@pytest.mark.parametrize(
    "lines, arguments, said",
    [
        (small(2), (), "was begun with another manifest"),
        (small(1), ("--guidance", 3), "was begun with another guidance"),
        (small(1), ("--model", "flux.1-tiny", "--steps", 2), "begun with another model, steps"),
        (["{" + " " * 2_000_000], (), "line 1 has more than 1,000,000 bytes"),
        ([], (), "is empty"),
        (small(1), ("--batch-size", 2), "was begun with another batch_size"),
        (small(1), ("--batch-size", 0), "--batch-size: must be at least 1 (got 0)"),
        (small(1), ("--shard", "2/2"), "expected I/N with 0 <= I < N"),
        (small(1), ("--merge", "--output", "x.png"), "--output: there is no such flag."),
    ],
)
def test_wrong_requests_end_with_one_sentence(batch, tmp_path, lines, arguments, said):
    assert batch(write(tmp_path / "m.jsonl", small(1)), "out")[0] == 0
    before = images(tmp_path / "out")
    code, error = batch(write(tmp_path / "other.jsonl", lines), "out", *arguments)
    assert code == 2 and said in error and "Traceback" not in error
    assert images(tmp_path / "out") == before
    assert batch("m.jsonl", "m.jsonl") == (2, "error: OUT: m.jsonl is a file. Choose a folder.\n")
    assert batch("m.jsonl", "none", "--merge")[0] == 2 and not (tmp_path / "none").exists()


def test_merge_finds_what_is_missing_or_changed(batch, tmp_path):
    assert batch(write(tmp_path / "m.jsonl", small(4)), "out")[0] == 0
    first, second, *_ = sorted((tmp_path / "out").glob("0*/*.png"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    code, said = batch("m.jsonl", "out", "--merge")
    assert code == 1 and "2 images, 0 wrong lines, 2 images left" in said
    assert "left: line 1, 2" in said


class Stub:
    """Refuses prompts with the word "forbidden", and images whose first pixel is red."""

    def judge_text(self, text):
        return Verdict("judge", 0.9 if "forbidden" in text else 0.1, 0.5)

    def judge(self, image):
        red = image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
        return Verdict("judge", 0.8 if red else 0.1, 0.5)


def test_filters_refuse_prompts_inputs_and_results(batch, tmp_path, monkeypatch):
    """Nothing is written of a refused line; the others go on; a missing filter ends the run."""
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
    forbidden = "a forbidden star"
    lines = small(1) + [
        {"prompt": forbidden} | SMALL,
        {"prompt": "a moon", "images": ["blue.png", "red.png"]} | SMALL,
        {"prompt": "a moon", "images": ["blue.png"]} | SMALL,
        {"prompt": "a moon", "negative_prompt": forbidden} | SMALL,
        {"prompt": "a sun"} | SMALL,
    ]
    write(tmp_path / "m.jsonl", lines)
    (tmp_path / "empty").mkdir()
    for kind in ("nsfw", "judge", "all"):
        code, said = batch("m.jsonl", "out", "--filter", kind, "--filter-weights", "empty")
        assert code == 2 and not (tmp_path / "out").exists()  # so that other flags may follow
    scores = iter([0.1, 0.1, 0.1, 0.9])  # results of lines 1 and 4, and the input; that of line 6
    classifier = SimpleNamespace(
        judge=lambda image: Verdict("nsfw", 0.1 if image.size == (8, 8) else next(scores), 0.85)
    )
    monkeypatch.setattr("flux.safety.filters.load_judge", lambda *_: Stub())
    code, said = batch("m.jsonl", "judged", "--filter", "judge")
    assert code == 3 and "3 images, 0 wrong lines, 0 images left, 3 refused by a filter" in said
    assert [name[8] for name in images(tmp_path / "judged")] == ["0", "3", "5"]
    assert "line 2: prompts: number 1 is refused by judge 0.900" in said
    assert "line 3: images: number 2 is refused by judge 0.800" in said
    assert "line 5: negative_prompt: number 1 is refused by judge 0.900" in said
    monkeypatch.setattr("flux.safety.filters.load_nsfw_filter", lambda folder: classifier)
    write(tmp_path / "m.jsonl", [lines[0], lines[3], lines[5]])
    code, said = batch("m.jsonl", "both", "--filter", "all")
    assert code == 3 and "2 images, 0 wrong lines, 0 images left, 1 refused by a filter" in said
    assert "line 3: prompts: image 1 is refused by nsfw 0.900" in said
    assert batch("m.jsonl", "both", "--merge")[0] == 3
    found = records(tmp_path / "both")
    passed = {"nsfw": 0.1, "judge": 0.1}
    assert [record.get("scores") for record in found] == [passed, passed, None]
    assert ["refused" in record for record in found] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_judge_equal_transformers(batch, tmp_path, kind):
    """Of prompts and of results; see tests/safety/test_judge.py."""
    (folder := tmp_path / "judge").mkdir()
    save_judge(folder, kind)
    lines = small(5)
    texts = [judge.OF_TEXT + line["prompt"] + judge.AFTER_TEXT for line in lines]
    scores = [probability(folder, text, None, "") for text in texts]
    assert len(set(scores)) == 5
    write(tmp_path / "m.jsonl", lines)
    assert batch("m.jsonl", "plain")[0] == 0  # the results, before they are judged
    batch("m.jsonl", "out", "--filter", "judge", "--filter-weights", "judge")
    assert batch("m.jsonl", "out", "--merge")[0] in (0, 3)
    for number, (score, record) in enumerate(zip(scores, records(tmp_path / "out"))):
        asked = "prompts: number 1"
        if score < 0.5:
            with Image.open(tmp_path / f"plain/000000/{number:09}.png") as image:
                shown = image.convert("RGB")
            score = probability(folder, judge.OF_IMAGE, shown, judge.AFTER_IMAGE)
            asked = "prompts: image 1"
        said = f"{asked} is refused by judge {score:.3f} (refused from 0.5 on)."
        assert ("refused" in record) == (score >= 0.5)
        assert record.get("refused", said).startswith(said)


def test_watermarks_are_the_same_after_a_restart_and_signatures_hold(batch, tmp_path):
    lines = [{"prompt": f"a red star {n}", "width": 256, "height": 256, "steps": 1} for n in (1, 2)]
    write(tmp_path / "m.jsonl", lines)
    for out in ("once", "again"):
        assert batch("m.jsonl", out, "--watermark", "tile")[0] == 0
    assert images(tmp_path / "once") == images(tmp_path / "again")
    code, said = batch("m.jsonl", "once")
    assert code == 2 and "was begun with another watermark" in said
    for name, data in script("certificate").make("My studio").items():
        (tmp_path / name).write_bytes(data)
    signed = ("--sign", "key.pem", "--certificate", "chain.pem")
    assert batch("m.jsonl", "signed", "--watermark", "tile", *signed)[0] == 0
    root = (tmp_path / "root.pem").read_bytes()
    for path in (tmp_path / "signed").glob("0*/*.png"):
        found = {finding.kind: finding.text for finding in verify(path, root) if finding.holds}
        assert found["signature"] == "trusted, by My studio" and "tile" in found["watermark"]
        with Image.open(path) as image, Image.open(tmp_path / "once/000000" / path.name) as other:
            assert image.tobytes() == other.tobytes()
    assert batch("m.jsonl", "signed", "--merge")[0] == 0
    code, said = batch("m.jsonl", "none", "--sign", "key.pem")
    assert code == 2 and "--sign: needs --certificate" in said


def test_merge_takes_the_record_that_fits_the_image(batch, tmp_path):
    """Two workers signed one line: the image on disk is that of either record."""
    assert batch(write(tmp_path / "m.jsonl", small(2)), "out")[0] == 0
    (file,) = (tmp_path / "out/records").glob("*.jsonl")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    other = first | {"sha256": "0" * 64}
    for name in ("a", "z"):  # read before and after the other file
        (extra := file.with_name(f"{name}.jsonl")).write_text(json.dumps(other) + "\n")
        assert batch("m.jsonl", "out", "--merge")[0] == 0
        assert records(tmp_path / "out") == [first, second]
        extra.unlink()
    file.write_text(json.dumps(other) + "\n" + json.dumps(second) + "\n")
    assert batch("m.jsonl", "out", "--merge")[0] == 1


# ------------------------------------------------------------------ stops


def test_damaged_last_record_is_made_again(batch, tmp_path):
    assert batch(write(tmp_path / "m.jsonl", small(3)), "out")[0] == 0
    (file,) = (tmp_path / "out/records").glob("*.jsonl")
    before, whole = images(tmp_path / "out"), file.read_bytes()
    for damaged in (whole[:-20], whole[: whole.index(b"\n") + 5], b"x\n" + whole[9:], b""):
        file.write_bytes(damaged)
        code, said = batch("m.jsonl", "out")
        assert code == 0 and "3 images, 0 wrong lines, 0 images left" in said
        assert batch("m.jsonl", "out", "--merge")[0] == 0
        assert images(tmp_path / "out") == before
        for other in (tmp_path / "out/records").glob("*.jsonl"):
            if other != file:
                other.unlink()


def test_full_disk_ends_the_worker_and_leaves_nothing_half_written(batch, tmp_path, monkeypatch):
    saved = worker.Worker._save

    def full(self, line, *rest):
        if line.number == 1:
            raise OSError(28, "No space left on device", "out")
        return saved(self, line, *rest)

    monkeypatch.setattr(worker.Worker, "_save", full)
    code, said = batch(write(tmp_path / "m.jsonl", small(3)), "out")
    assert code == 1 and "No space left on device" in said and "Traceback" not in said
    assert len(images(tmp_path / "out")) == 1 and not any((tmp_path / "out/claims").iterdir())
    monkeypatch.setattr(worker.Worker, "_save", saved)
    assert batch("m.jsonl", "out")[0] == 0 and len(images(tmp_path / "out")) == 3


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), "m.jsonl", "out", "--device", "cpu", *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_workers_and_other_numbers_of_workers_make_the_same_bytes(batch, tmp_path):
    """Of one worker, then of three, one is killed after some images; two then share the rest."""
    count = BLOCK + 10
    write(tmp_path / "m.jsonl", small(count))
    assert batch("m.jsonl", "once")[0] == 0
    out = tmp_path / "out"
    for shard in ("0/1", "2/3"):
        process, before = start(tmp_path, "--shard", shard), len(images(out))
        while len(images(out)) < before + 3 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 6 <= len(images(out)) < count
    workers = [start(tmp_path, "--shard", f"{number}/2") for number in range(2)]
    assert [process.wait() for process in workers] == [0, 0]
    code, said = batch("m.jsonl", "out", "--merge")
    assert code == 0 and f"{count} images, 0 wrong lines, 0" in said
    assert images(out) == images(tmp_path / "once")
    assert len(records(out)) == count == len(images(out))


# ------------------------------------------------------------------ claims and shards


def test_living_workers_keep_their_claims(tmp_path, monkeypatch):
    first = claim(tmp_path, 3)
    assert first and claim(tmp_path, 3) is None and (second := claim(tmp_path, 4))
    first.release()
    second.release()
    assert not any(tmp_path.iterdir()) and (again := claim(tmp_path, 3))
    again.release()


def test_claims_of_dead_workers_are_free(tmp_path, monkeypatch):
    """Here the kernel knows at once; of another machine, the file has no sign of life."""
    path = tmp_path / "000000003"
    path.write_text(socket.gethostname())
    ours = claim(tmp_path, 3)
    assert ours is not None
    ours.release()
    path.write_text("another-machine")
    assert claim(tmp_path, 3) is None
    os.utime(path, (time.time() - claims.STALE - 1,) * 2)
    stale = claim(tmp_path, 3)
    assert stale is not None and path.read_text() == socket.gethostname()
    stale.release()


def test_claims_show_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "TOUCH", 0.01)
    held = claim(tmp_path, 0)
    os.utime(held.path, (1, 1))
    while held.path.stat().st_mtime < 2:
        time.sleep(0.01)
    held.release()


def test_shards_and_gpus_come_from_torchrun_and_slurm():
    module = script("batch")
    shard_of, device_of = module.shard_of, module.device_of
    array = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_COUNT": "4"}
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert shard_of({}) == shard_of({"SLURM_NTASKS": "8"}) == (0, 1)
    assert shard_of({"RANK": "3", "WORLD_SIZE": "8"} | array) == (3, 8)
    assert shard_of(array | {"SLURM_ARRAY_TASK_MIN": "10"}) == (2, 4)
    assert shard_of(array)[0] < 4  # whose first number is unknown
    assert shard_of(srun) == (3, 8)
    assert shard_of(srun | array | {"SLURM_ARRAY_TASK_MIN": "10"}) == (19, 32)
    assert device_of({}, 4) == "cuda:0" and device_of({"LOCAL_RANK": "3"}, 4) == "cuda:3"
    assert device_of(srun, 2) == "cuda:1" and device_of(srun, 1) == "cuda:0"


def test_workers_begin_with_their_shard(tmp_path):
    some = Manifest(write(tmp_path / "m.jsonl", small(5 * BLOCK)))
    made = Records(tmp_path / "out", some, {})
    order = list(worker.Worker(None, some, made, (1, 2))._order())
    assert order == [1, 3, 0, 2, 4]


def test_long_block_is_reported_on_the_way_and_quiet_is_quiet(batch, tmp_path, monkeypatch):
    write(tmp_path / "m.jsonl", small(3))
    assert batch("m.jsonl", "quiet", "--quiet") == (0, "")
    monkeypatch.setattr(worker, "REPORT", -1.0)  # seconds
    code, said = batch("m.jsonl", "out")
    assert code == 0
    progress = [line.partition(" a second")[0] for line in said.splitlines() if "a second" in line]
    assert [line.partition(",")[0] for line in progress] == [
        "1 of 3 images", "2 of 3 images", "3 of 3 images"
    ]  # fmt: skip


# ------------------------------------------------------------------ a large manifest


@pytest.mark.slow
def test_manifest_of_a_million_lines_takes_constant_memory(tmp_path):
    """Lines stay on disk: 16,000 starts of blocks take 128 kB, and the states 1 MB."""
    path = tmp_path / "m.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"prompt": "a cat {number}"}}\n' for number in range(1_000_000))
    tracemalloc.start()
    some = Manifest(path)
    made = Records(tmp_path / "out", some, {})
    made.own.write_text("".join(f'{{"line": {n}, "file": "a"}}\n' for n in range(0, 10**6, 100)))
    tracemalloc.reset_peak()
    made.update()
    last = list(some.block(len(some.starts) - 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(some) == 1_000_000 and last[-1].request.prompt == "a cat 999999"
    assert made.count(1) == 10_000 and peak < 4e6


def test_names_of_files_are_safe_and_differ(tmp_path):
    lines = [{"prompt": "a", "id": id_} for id_ in ("a", "a", "b.c", "A-1_")]
    some = Manifest(write(tmp_path / "m.jsonl", lines))
    names = [file_name(line.number, line.request) for line in some.block(0)]
    assert len(set(names)) == 4 and names[2] == "000000/000000002-b.c.png"
    for wrong in ("", ".a", "a/b", "a b", "ä", "a" * 101, 5):
        with pytest.raises(UserError, match="^id: must"):
            manifest.to_id("id", wrong)
