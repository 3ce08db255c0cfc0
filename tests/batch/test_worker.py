"""A worker: groups of lines, networks that take turns on the device, other workers beside it."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
from PIL import Image

import flux
from flux.batch import worker
from flux.batch.claims import claim
from flux.batch.manifest import Manifest, seed_of
from flux.batch.records import DONE, Records, merge
from flux.batch.worker import Worker, grouped
from flux.errors import UserError

SMALL = {"width": 64, "height": 64, "steps": 1}


@pytest.fixture(scope="module")
def pipe():
    return flux.load(device="cpu")


def manifest_of(folder: Path, lines: list[dict]) -> Manifest:
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Manifest(path)


def small(count: int, **more) -> list[dict]:
    return [{"prompt": f"a blue ring {number}"} | SMALL | more for number in range(count)]


def run(pipe, some: Manifest, out: Path, **options) -> dict[str, str]:
    """Run a worker; return the hash of each image."""
    Worker(pipe, some, Records(out, some, {}), **options).run()
    return hashes(out)


def hashes(out: Path) -> dict[str, str]:
    found = sorted(out.glob("0*/*.png"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


# ------------------------------------------------------------------ groups


def test_lines_of_equal_settings_share_a_group(tmp_path):
    lines = [*small(3), *small(1, steps=2), {"prompt": "a", "images": ["a.png"]} | SMALL, *small(2)]
    some = manifest_of(tmp_path, lines)

    def numbers(batch_size: int) -> list[list[int]]:
        return [[x.number for x in each.lines] for each in grouped(some.block(0), batch_size)]

    assert numbers(1) == [[0], [1], [2], [3], [4], [5], [6]]
    assert numbers(2) == [[0, 1], [2, 5], [3], [4], [6]]
    assert numbers(9) == [[0, 1, 2, 5, 6], [3], [4]]


def test_a_group_is_one_batch_and_keeps_its_bits_after_a_stop(pipe, tmp_path):
    """Of a group that is partly done, the open lines alone are written, with the same bytes."""
    lines = [*small(3), {"prompt": "a\0b"} | SMALL, *small(1, seed=9)]
    some, out = manifest_of(tmp_path, lines), tmp_path / "out"
    first = run(pipe, some, out, batch_size=3)
    prompts = [line["prompt"] for line in lines]
    call = pipe.prepare(prompts[:3], seed=[seed_of(line) for line in lines[:3]], **SMALL)
    for number, image in enumerate(call.decode([0, 1, 2], call.sample([0, 1, 2]))):
        image.save(tmp_path / "batch.png")
        assert (out / f"000000/{number:09}.png").read_bytes() == (
            tmp_path / "batch.png"
        ).read_bytes()
    assert len(first) == 4  # the wrong line does not stop those that share its group
    (record,) = (out / "records").iterdir()
    kept = [line for line in record.read_text().splitlines() if '"line": 1,' not in line]
    record.write_text("".join(f"{line}\n" for line in kept))
    (out / "000000/000000001.png").unlink()
    written = []
    save = Worker._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_save", lambda *a: written.append(a[1].number) or save(*a))
        assert run(pipe, some, out, batch_size=3) == first
    assert written == [1]


def test_a_batch_that_does_not_fit_ends_the_worker(pipe, tmp_path, monkeypatch):
    """A smaller batch would make other images than those of workers with more memory."""
    some, plan = manifest_of(tmp_path, small(2)), pipe.plan_memory

    def small_machine(*args):
        if args[3:4] == (2,):
            raise UserError("flux.2-tiny, 2 at a time, needs more memory.")
        return plan(*args)

    monkeypatch.setattr(pipe, "plan_memory", small_machine)
    with pytest.raises(UserError, match="2 at a time"):
        run(pipe, some, tmp_path / "out", batch_size=2)
    assert not hashes(tmp_path / "out") and len(run(pipe, some, tmp_path / "alone")) == 2


def test_input_images_are_those_of_the_line(pipe, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    lines = [{"prompt": "a moon", "images": ["red.png"], "seed": 3} | SMALL, *small(1)]
    run(pipe, manifest_of(tmp_path, lines), tmp_path / "out", batch_size=4)
    inputs = flux.ImageInputs((tmp_path / "red.png",))
    pipe("a moon", images=inputs, seed=3, **SMALL)[0].save(tmp_path / "alone.png")
    written = (tmp_path / "out/000000/000000000.png").read_bytes()
    assert written == (tmp_path / "alone.png").read_bytes()


def test_seeds_of_a_call_may_be_a_list(pipe):
    images = pipe.prepare(["a", "b"], seed=(5, 2), **SMALL)
    assert [image.metadata["seed"] for image in images.decode([0, 1], images.sample([0, 1]))] == [
        5,
        2,
    ]
    for wrong, said in (([1], "one for each image"), ([1, -1], "from 0 to"), ([1, "a"], "whole")):
        with pytest.raises(UserError, match=f"^seed: .*{said}"):
            pipe.prepare(["a", "b"], seed=wrong, **SMALL)


# ------------------------------------------------------------------ networks that take turns


def test_networks_that_take_turns_are_loaded_once_a_block(pipe, tmp_path, monkeypatch):
    """The images are those of networks that stay; a limit of time bounds what a kill loses."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    lines = [*small(2), {"prompt": "a moon", "images": ["red.png"]} | SMALL, *small(1, width=96)]
    some, loads = manifest_of(tmp_path, lines), []
    stays = run(pipe, some, tmp_path / "stays")
    turns = flux.load(device="cpu", offload="model")
    parts = dict(text=turns.text.networks[0], transformer=turns.transformer)
    parts |= dict(decoder=turns.autoencoder, encoder=turns.image_encoder)
    for name, network in parts.items():
        prepare = network._prepare
        monkeypatch.setattr(
            network, "_prepare", lambda name=name, make=prepare: loads.append(name) or make()
        )
    assert run(turns, some, tmp_path / "turns") == stays
    assert loads == ["text", "encoder", "transformer", "decoder"]
    assert all(network.module is None for network in turns.residency.networks)
    monkeypatch.setattr(worker, "DECODE", 0.0)
    loads.clear()
    assert run(turns, some, tmp_path / "often") == stays
    assert loads.count("transformer") == loads.count("decoder") == len(lines)


# ------------------------------------------------------------------ other workers


def test_a_worker_waits_for_the_claim_of_another(pipe, tmp_path, monkeypatch):
    """The second makes nothing twice, and ends when the first has made what is left."""
    some, out = manifest_of(tmp_path, small(2)), tmp_path / "out"
    monkeypatch.setattr(worker, "POLL", 0.01)
    second = Worker(pipe, some, Records(out, some, {}))
    held, first = claim(out / "claims", 0), Worker(pipe, some, Records(out, some, {}))
    thread = threading.Thread(target=second.run)
    thread.start()
    first._work(0)
    held.release()
    thread.join(60)
    assert not thread.is_alive() and not second.records.own.exists()
    assert first.records.count(DONE) == second.records.count(DONE) == 2


def test_two_workers_on_one_block_write_the_same_bytes(pipe, tmp_path):
    """As when a claim counts as stale while its worker lives."""
    some, out = manifest_of(tmp_path, small(2)), tmp_path / "out"
    workers = [Worker(pipe, some, Records(out, some, {})) for _ in range(2)]
    workers[0]._work(0)
    before = hashes(out)
    workers[1]._work(0)
    assert hashes(out) == before and all(each.records.own.exists() for each in workers)
    records = Records(out, some, {})
    assert merge(records)[:4] == (2, 0, 0, 0)
    assert len((out / "images.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_under_the_records_leaves_a_line_open(tmp_path, monkeypatch):
    """A part of a record may be written: it does not count, and the next start goes on."""
    some = manifest_of(tmp_path, small(2))
    records, write = Records(tmp_path / "out", some, {}), os.write
    records.append({"line": 0, "file": "a"})
    monkeypatch.setattr("os.write", lambda descriptor, data: write(descriptor, data[:9]))
    with pytest.raises(OSError, match="No space left"):
        records.append({"line": 1, "file": "b"})
    monkeypatch.undo()
    again = Records(tmp_path / "out", some, {})
    assert list(again.states) == [1, 0]
    again.append({"line": 1, "file": "b"})
    assert list(Records(tmp_path / "out", some, {}).states) == [1, 1]


def test_progress_counts_all_workers(tmp_path, monkeypatch):
    some, said = manifest_of(tmp_path, small(1000)), []
    ours = Worker(None, some, Records(tmp_path / "out", some, {}), report=said.append)
    other = Records(tmp_path / "out", some, {})
    for line in range(10):
        other.append({"line": line, "file": "a"})
    monkeypatch.setattr(worker.time, "monotonic", lambda: ours.began + 20)
    ours._report_progress()
    assert said == ["10 of 1,000 images, 0.5 a second, 33 min left"]
