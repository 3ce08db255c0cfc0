"""scripts/train.py with tiny random models of FLUX 3: runs, files, learning, what is refused."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.drawn_images import photo
from support.flux3_model import BASE, DISTILLED, Flux3Model, both_models
from support.train_run import Train, equal_files, train_script

import flux
from flux.configs import MODELS
from flux.parity.reference import max_error
from flux.training import batches, dataset, loss
from flux.training.checkpoint import load_tensors, save_tensors
from flux.training.trainer import Trainer
from flux.weights.quantization.quantize import quantize_

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LONG = "a very long caption, which needs more text tokens than eighty of them, " * 2


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[dict[str, Flux3Model]]:
    folder = tmp_path_factory.mktemp("weights")
    with both_models(folder) as found, pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, BASE, replace(MODELS[BASE], steps=4))  # previews take less time
        yield found


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(cache, monkeypatch, capsys) -> Train:
    return train_script(cache, monkeypatch, capsys)


@pytest.fixture(scope="module")
def edits(tmp_path_factory) -> Path:
    """Samples with no, one and two references, and captions of two lengths.

    The first image has the size of its only reference: both are put on a canvas of 80x64.
    """
    folder = tmp_path_factory.mktemp("edits")
    sizes = {"a": (70, 50), "b": (96, 64), "c": (64, 64), "d": (64, 64), "r": (70, 50)}
    for seed, (name, size) in enumerate(sizes.items()):
        photo(*size, seed).save(folder / f"{name}.png")
    lines = [
        {"image": "a.png", "caption": "night", "references": ["r.png"]},
        {"image": "b.png", "caption": LONG, "references": ["r.png", "c.png"]},
        {"image": "c.png", "caption": LONG},
        {"image": "d.png", "caption": "day"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two images without references."""
    folder = tmp_path_factory.mktemp("images")
    for seed, caption in enumerate(("a red square", "many green leaves in the wind")):
        photo(64, 64, 10 + seed).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(caption)
    return folder


def flags_of(models: dict[str, Flux3Model], *more) -> tuple:
    weights = ("--model", BASE, "--weights", models[BASE].folder, "--size", 64, "--warmup", 1)
    return (*weights, "--sample-every", 0, "--lr", 3e-3, *more)


FLOAT = ("--dtype", "float32")
LORA = (*FLOAT, "--lora-rank", 2, "--steps", 8, "--caption-dropout", 0.4, "--ema", 0.9)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "loss.csv").open() as file:
        return list(csv.DictReader(file))


def interrupt_at(monkeypatch, step: int) -> None:
    update = Trainer.update

    def interrupted(self, losses):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, losses)

    monkeypatch.setattr(Trainer, "update", interrupted)


# ------------------------------------------------------------------ runs


def test_lora_run_reads_all_samples_and_resumes_bit_for_bit(
    train, models, edits, tmp_path, monkeypatch
):
    seen, predict_velocity = [], loss.predict_velocity

    def recorded(network, batch, *rest):
        seen.append(batch)
        return predict_velocity(network, batch, *rest)

    monkeypatch.setattr(loss, "predict_velocity", recorded)
    flags = flags_of(models, *LORA, "--size", 96, "--sample-every", 8, "--gradient-checkpointing")
    code, out, err = train(edits, tmp_path / "whole", *flags)
    assert (code, out) == (0, str(tmp_path / "whole" / "lora.safetensors")), err

    kinds = set()
    for batch in seen:
        numbers = () if batch.references is None else batch.reference_ids[:, 3].unique().tolist()
        tokens = 0 if batch.references is None else batch.references.shape[1]
        kinds.add((*batch.latents.shape[2:], tokens, *numbers))
    assert kinds == {(4, 5, 20, -1), (5, 7, 28, -2, -1), (6, 6, 0)}
    assert {batch.features.tokens.shape[1] for batch in seen} == {80, 160}
    with Image.open(tmp_path / "whole" / "samples" / "000008.png") as sheet:
        assert sheet.size == (80 + 112 + 96 + 96, 96)

    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert train(edits, tmp_path / "parts", *flags)[0] == 128 + signal.SIGINT
    code, _, err = train(edits, tmp_path / "parts", *flags)
    assert code == 0 and "resumed at step 3" in err
    for name in ("checkpoint.safetensors", "lora.safetensors"):
        assert equal_files(tmp_path / "whole" / name, tmp_path / "parts" / name)
    pipe = models[BASE].load()
    before = pipe.transformer().single_blocks[0].q_proj.weight.clone()
    pipe.load_lora(out)
    assert not torch.equal(pipe.transformer().single_blocks[0].q_proj.weight, before)


def test_full_run_trains_what_its_samples_reach(train, models, images, tmp_path, monkeypatch):
    """Float32 weights, multiplied in bfloat16; the references' weights stay the file's."""
    flags = flags_of(models, "--dtype", "bfloat16", "--steps", 3, "--gradient-checkpointing")
    more = ("--sample-every", 3, "--prompt", "a red square")
    code, out, err = train(images, tmp_path / "whole", *flags, *more)
    assert code == 0, err
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert train(images, tmp_path / "parts", *flags)[0] == 128 + signal.SIGINT
    assert train(images, tmp_path / "parts", *flags)[0] == 0
    assert equal_files(Path(out), tmp_path / "parts" / "transformer.safetensors")
    before, after = load_file(models[BASE].home / "model.safetensors"), load_file(out)
    assert before.keys() == after.keys()
    trained = load_tensors(tmp_path / "whole" / "checkpoint.safetensors")
    for name, x in after.items():
        assert x.dtype == torch.bfloat16
        if ".image_cond." in f".{name}":
            assert f"model.{name}" not in trained and torch.equal(x, before[name].bfloat16())
        else:
            assert max_error(trained[f"model.{name}"], before[name].float()) > 1e-4
    options = dict(weights=models[BASE].folder, device="cpu", transformer=out)
    pipe = flux.load(BASE, dtype=torch.bfloat16, **options)
    with Image.open(tmp_path / "whole" / "samples" / "000003.png") as sheet:
        (expected,) = pipe("a red square", 64, 64, seed=0)
        # with times that are not rounded to bfloat16, they differ by 14 levels
        assert np.abs(np.asarray(sheet).astype(int) - np.asarray(expected)).mean() < 4


def test_lora_of_a_quantized_file(train, models, images, tmp_path):
    network = models[BASE].load().transformer()
    quantize_(network, "fp8")
    file = tmp_path / "fp8.safetensors"
    save_tensors(file, network.state_dict())
    flags = flags_of(models, *FLOAT, "--transformer", file, "--lora-rank", 2, "--steps", 2)
    code, out, err = train(images, tmp_path / "run", *flags)
    assert code == 0, err
    assert any(x.norm() > 0 for name, x in load_file(out).items() if ".lora_B." in name)


SHARED = ("--batch-size", "2", "--gradient-checkpointing", "--ema", "0.9", *FLOAT)
KINDS = {"all": ("--steps", "2"), "lora": ("--steps", "4", "--lora-rank", "2")}
PROGRAM = f"""
import runpy, sys
from flux.configs import MODELS
from flux.parity.reference3 import tiny_models3
from flux.runtime import processes
from flux.training import distributed, log, memory
MODELS.update(tiny_models3())
log.can_plot = lambda: False  # both save time
memory.estimate_memory = lambda *_, **__: memory.TrainingMemory(0, 0, 0)
leave, processes.leave = processes.leave, lambda: None  # one group for all runs
folders, runs, flags = sys.argv[1:3], sys.argv[3], sys.argv[4:]
for folder, (kind, more) in zip(folders, {KINDS!r}.items()):
    sys.argv = ["train.py", folder, runs + kind, *flags, *more]
    try:
        runpy.run_path({str(ROOT / "scripts" / "train.py")!r}, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (kind, end.code)
    distributed.init = lambda device: device
leave()
"""


def test_two_processes_train_as_one(train, models, images, edits, cache, tmp_path):
    """All weights without references, and a LoRA with them; one process resumes the first run."""
    (tmp_path / "program.py").write_text(PROGRAM)
    flags = flags_of(models, *SHARED)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = (*launcher, "--nproc-per-node", 2, tmp_path / "program.py", images, edits)
    command += (tmp_path / "two-", "--device", "cpu", "--cache", cache, *flags)
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    for folder, (kind, more) in zip((images, edits), KINDS.items()):
        one, two = tmp_path / kind, tmp_path / f"two-{kind}"
        assert train(folder, one, *flags, *more)[0] == 0
        for a, b in zip(rows_of(one), rows_of(two), strict=True):
            assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=2e-5)
            assert float(b["gradient"]) == pytest.approx(float(a["gradient"]), rel=1e-4)
    code, _, err = train(images, tmp_path / "two-all", *flags, "--steps", 3)
    assert code == 0 and "resumed at step 2" in err


# ------------------------------------------------------------------ learning


def test_lora_overfits_an_image_and_moves_the_sample_to_it(train, models, images, tmp_path):
    """Distances are mean squared errors of latents; 1.03 lies between the two images' latents."""
    folder = tmp_path / "one"
    folder.mkdir()
    Image.new("RGB", (64, 64), (250, 10, 20)).save(folder / "red.png")
    (folder / "red.txt").write_text("a red square")
    flags = flags_of(models, *FLOAT, "--lora-rank", 16, "--steps", 50, "--batch-size", 2)
    code, out, err = train(folder, tmp_path, *flags, "--caption-dropout", 0, "--lr", 1e-2)
    assert code == 0, err
    losses = [float(row["loss"]) for row in rows_of(tmp_path)]
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:5])

    pipe = models[BASE].load()
    files = (folder / "red.png", images / "0.png")
    own, other = (pipe.to_latents(Image.open(file)) for file in files)
    features = pipe.encode("a red square")

    def distances() -> list[float]:
        latents = pipe.sample(features, [3], 64, 64, steps=12, guidance=1)
        return [(latents - target).square().mean().item() for target in (own, other)]

    before = distances()
    pipe.load_lora(out)
    after = distances()
    assert after[0] < 0.3 * before[0] and after[0] < 0.8 * after[1], (before, after)


# ------------------------------------------------------------------ what is refused


def test_what_flux3_cannot_be_trained_for_is_refused(train, models, images, tmp_path):
    distilled = models[DISTILLED].home / "model.safetensors"
    weights = ("--weights", models[BASE].folder)
    flow_map = f"{DISTILLED} is a flow map: it predicts a whole step"
    cases = [
        (("--model", DISTILLED), flow_map),
        (("--transformer", distilled), flow_map),
        (("--model", BASE, "--transformer", distilled), "`ref_time_in`, so it is a flow map"),
        (("--distill", BASE), f"--distill: {BASE} is FLUX 3, which has no guidance embedding"),
        (("--model", BASE, "--guidance", 2), f"--guidance: {BASE} has no guidance embedding"),
        (("--model", BASE, "--train-at-guidance"), "--train-at-guidance: "),
        (("--model", BASE, "--lora-rank", 2, "--target-modules", "*qkv"), "content_mode_blocks"),
    ]
    for flags, message in cases:
        code, out, err = train(images, tmp_path / "run", *weights, "--size", 64, *flags)
        last = err.splitlines()[-1]
        assert (code, out) == (2, "") and last.startswith("error: ") and message in last, last
        assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_references_that_flux3_does_not_take_are_refused(train, models, tmp_path):
    photo(64, 64).save(tmp_path / "a.png")
    photo(20, 10).save(tmp_path / "small.png")
    flags = flags_of(models, *LORA)
    for names, message in (
        (["a.png"] * 11, "11 references"),
        (["small.png"], "small.png is 20x10"),
    ):
        line = {"image": "a.png", "caption": "a", "references": names}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
        code, _, err = train(tmp_path, tmp_path / "run", *flags)
        assert code == 2 and message in err.splitlines()[-1], err


def test_batches_drop_captions_of_another_length_together(models, cache, edits):
    """The share of dropped captions stays; rows of one batch have one length."""
    pipe = models[BASE].load()
    store = dataset.Cache(cache, pipe, 64)
    samples = [store.sample(sample) for sample in dataset.read_folder(edits)[2:]]
    assert [sample.text_tokens for sample in samples] == [160, 80]
    sampler = batches.BatchSampler(samples, 2, 7, 4, store.features(""), 0.5, flux3=True)
    empty = load_tensors(sampler.empty)["tokens"]
    dropped: dict[int, list[int]] = {0: [], 1: []}
    for number in range(120):
        batch, _, _ = sampler(number)
        place = sampler._batches(number // 2)[number % 2][0]
        rows = [torch.equal(row, empty) for row in batch.features.tokens if len(row) == len(empty)]
        dropped[place].append(sum(rows))
    assert set(dropped[0]) == {0, 2} and set(dropped[1]) == {0, 1, 2}
    for counts in dropped.values():
        assert 0.3 < np.mean(counts) / 2 < 0.7  # three standard deviations of 60 draws


def test_references_equal_the_samplers(models, cache, edits):
    """One reference on its canvas, with its edit beside it; two references, cropped."""
    pipe, folder = models[BASE].load(), dataset.read_folder(edits)[:2]
    for sample in folder:
        cached = dataset.Cache(cache, pipe, 96).sample(sample)
        images = tuple(Image.open(path) for path in sample.references)
        expected = pipe.condition(flux.ImageInputs(images, reference_limit=96))
        tokens, ids = batches.load_references(cached, 4, flux3=True)
        assert torch.equal(tokens, expected.references)
        assert torch.equal(ids, expected.reference_ids)
    edit = dataset.Cache(cache, pipe, 96).sample(folder[0])
    edited = pipe.condition(flux.ImageInputs((Image.open(folder[0].image),), reference_limit=96))
    latents = load_tensors(edit.latents)["latents"]
    assert torch.equal(latents.flatten(1).mT[None], edited.references)
    assert (16 * latents.shape[2], 16 * latents.shape[1]) == (edited.width, edited.height)
