"""scripts/train.py: from a folder of pictures to weights that load, through kills, Ctrl-C and bad input.

The embedded toy is trained, and tiny models with random weights where there are references.
"""

import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.load_script import script
from support.tiny_repositories import home, write_tokenizers

import flux
from flux import toy as shapes
from flux.configs import MODELS
from flux.errors import NonFiniteError, WriteError
from flux.parity.reference import max_error, networks, randomise, tiny_models, write_weights
from flux.runtime.devices import FreeMemory
from flux.training import dataset
from flux.training import lora as adapters
from flux.training import trainer as training
from flux.transformer import Flux
from flux.weights import locate as models
from flux.weights.quantization.quantize import quantize_

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
TOY = models.EMBEDDED / "flux.2-tiny" / "flux-2-tiny.safetensors"


@pytest.fixture
def train(monkeypatch, capsys):
    """train(*flags) -> exit code, last line of the output, all that was said."""
    module = script("train")

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["train.py", "--device", "cpu", *map(str, flags)])
        code = module.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.strip(), err

    run.module = module
    return run


def draw(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> Path:
    scene = next(shapes.scenes(seed, held=None))
    Image.fromarray(255 - shapes.draw(scene, *size, np.random.default_rng(seed))).save(
        path
    )  # in colours that the toy has not seen
    path.with_suffix(".txt").write_text(str(scene))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        draw(folder / f"{number}.png", number, (96, 64) if number == 3 else (64, 64))
    return folder


SMALL = ("--size", 64, "--batch", 2, "--warmup", 2, "--sample-every", 0, "--lr", 3e-3, "--ema", 0.9)
LORA = (*SMALL, "--lora-rank", 2, "--accumulate", 2, "--steps", 6, "--save-every", 2)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run of six steps that nothing stopped, with its weights."""
    run = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["train.py", str(pictures), str(run), *map(str, LORA), "--device", "cpu"]
        )
        assert script("train").main() == 0
    return run


def equal(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_end(a: Path, b: Path) -> bool:
    return all(equal(a / name, b / name) for name in ("checkpoint.safetensors", "lora.safetensors"))


# ---------------------------------------------------------------------------------------------------------- weights


def velocity_of(network, batch, latents) -> torch.Tensor:
    with torch.no_grad():
        return training.velocity(network, batch, 1.0, latents, torch.tensor([0.3, 0.8]))


def a_batch(config) -> tuple:
    def make(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    batch = training.Batch(
        make(2, 64, 4, 4), training.TextFeatures(make(2, 32, config.context_dim), None)
    )
    return batch, batch.latents


def test_a_lora_loads_as_what_was_trained(whole):
    pipe = flux.load(device="cpu")
    plain, network = pipe.transformer(), pipe.transformer.meta_module().to_empty(device="cpu")
    network.load_state_dict(plain.state_dict())
    adapters.add_lora(network, 2)
    average = training.take(training.load(whole / "checkpoint.safetensors"), "average.")
    assert not network.load_state_dict(average, strict=False).unexpected_keys and len(average) == 64
    batch = a_batch(network.config)
    before = velocity_of(plain, *batch)
    pipe.load_lora(whole / "lora.safetensors")
    after = velocity_of(pipe.transformer(), *batch)
    assert (
        max_error(after, velocity_of(network, *batch)) < 1e-5
    )  # the same sums, rounded in another order
    assert max_error(after, before) > 1e-3
    rows = list(csv.DictReader((whole / "loss.csv").open()))
    assert [row["step"] for row in rows] == list("123456") and all(
        0 < float(row["loss"]) < 10 for row in rows
    )
    assert Image.open(whole / "loss.png").size == (1280, 600)


def test_all_weights_load_as_what_was_trained(train, pictures, tmp_path):
    flags = (
        *SMALL[:-2],
        "--steps",
        3,
        "--lr",
        1e-3,
        "--sample-every",
        3,
        "--checkpointing",
        "--prompt",
        "a red circle",
    )
    code, out, err = train(pictures, tmp_path, *flags)
    assert (code, out) == (0, str(tmp_path / "transformer.safetensors"))
    assert "note: --" not in err and "parameters to train, on cpu, products in float32" in err
    trained = training.take(training.load(tmp_path / "checkpoint.safetensors"), "model.")
    pipe = flux.load(transformer=tmp_path / "transformer.safetensors", device="cpu")
    loaded, before = pipe.transformer().state_dict(), load_file(TOY)
    assert loaded.keys() == trained.keys() == before.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert all(max_error(loaded[name], before[name].float()) > 1e-4 for name in before)
    with Image.open(
        tmp_path / "samples" / "000003.png"
    ) as sheet:  # of the weights as they are, not of the file's
        assert sheet.size == (64, 64)
        (expected,) = pipe("a red circle", 64, 64, seed=0)
        assert np.abs(np.asarray(sheet).astype(int) - np.asarray(expected)).max() <= 1


def test_training_learns(train, tmp_path):
    """One picture in inverted colours: what remains of the loss on draws that training never saw."""
    (tmp_path / "one").mkdir()
    draw(tmp_path / "one" / "0.png", 0)
    flags = (
        "--size",
        64,
        "--batch",
        8,
        "--warmup",
        5,
        "--sample-every",
        0,
        "--lr",
        1e-2,
        "--lora-rank",
        4,
        "--steps",
        40,
    )
    assert train(tmp_path / "one", tmp_path / "run", *flags, "--drop-captions", 0)[0] == 0
    pipe = flux.load(device="cpu")
    cache = dataset.Cache(tmp_path / "run" / "cache", pipe, 64)
    draws = dataset.Draws(
        [cache.example(item) for item in dataset.read_folder(tmp_path / "one")], 64, 999, 4, Path()
    )

    def loss() -> float:
        batch, normal, noise = draws(0)
        t = training.shifted_times(normal, 0.0)

        def predict(x, t):
            return training.velocity(pipe.transformer(), batch, 1.0, x, t)

        with torch.no_grad():
            return training.rectified_flow_loss(predict, batch.latents, t, noise).item()

    before = loss()
    pipe.load_lora(tmp_path / "run" / "lora.safetensors")
    assert loss() < 0.6 * before


def test_bfloat16_and_float32_train_alike(train, pictures, tmp_path):
    flags = (*SMALL, "--steps", 2, "--lora-rank", 2)
    losses = []
    for dtype in ("float32", "bfloat16"):
        assert (
            train(
                pictures, tmp_path / dtype, *flags, "--dtype", dtype, "--cache", tmp_path / "cache"
            )[0]
            == 0
        )
        losses.append(
            [float(row["loss"]) for row in csv.DictReader((tmp_path / dtype / "loss.csv").open())]
        )
        assert all(
            x.dtype == torch.float32
            for x in load_file(tmp_path / dtype / "checkpoint.safetensors").values()
        )
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.03)


# ---------------------------------------------------------------------------------------------------------- going on


def test_a_killed_run_goes_on_bit_for_bit(train, pictures, whole, tmp_path):
    """SIGKILL in the sixth step, of which the checkpoint knows four."""
    killer = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("train", {str(SCRIPT)!r})
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
update = train.training.Trainer.update
def dying(self, losses):
    if self.step == 5:
        next(iter(losses))().backward()
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, losses)
train.training.Trainer.update = dying
train.main()
"""
    flags = [str(flag) for flag in (pictures, tmp_path, *LORA, "--device", "cpu")]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }  # sums are in the order of the threads
    killed = subprocess.run(
        [sys.executable, "-c", killer, *flags],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == 6
    code, _, err = train(pictures, tmp_path, *LORA)
    assert code == 0 and "goes on at step 4" in err
    assert same_end(tmp_path, whole)
    assert [row[:4] for row in csv.reader((tmp_path / "loss.csv").open())] == [
        row[:4] for row in csv.reader((whole / "loss.csv").open())
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_first(train, pictures, whole, tmp_path, monkeypatch, number):
    update = training.Trainer.update

    def interrupted(self, losses):
        if self.step == 2:
            os.kill(os.getpid(), number)  # in the middle of a step, which is finished
        return update(self, losses)

    monkeypatch.setattr(training.Trainer, "update", interrupted)
    before = signal.getsignal(number)
    code, out, err = train(pictures, tmp_path, *LORA)
    assert (code, out) == (
        128 + number,
        "",
    ) and "stopped at step 3, and saved; the same command goes on" in err
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    monkeypatch.setattr(
        "sys.argv", ["train.py", str(pictures), str(tmp_path), *map(str, LORA), "--device", "cpu"]
    )
    assert train.module.main() == 0
    assert same_end(tmp_path, whole)


def test_a_finished_run_is_not_trained_further(train, pictures, whole, monkeypatch):
    before = (whole / "checkpoint.safetensors").read_bytes(), (whole / "loss.csv").read_text()
    monkeypatch.setattr(training.Trainer, "update", None)
    assert train(pictures, whole, *LORA)[0] == 0
    assert (
        (whole / "checkpoint.safetensors").read_bytes(),
        (whole / "loss.csv").read_text(),
    ) == before


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ("--lora-rank", 3),
            "its training is a LoRA of rank 2 on *, and now it is a LoRA of rank 3 on *",
        ),
        (("--seed", 1), "its --seed is 0, and now it is 1"),
        (("--transformer", "other.safetensors"), "its transformer is "),
        (("--batch", 1), "its --batch is 2, and now it is 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    train, pictures, whole, tmp_path, flags, told, monkeypatch
):
    tensors = load_file(TOY)
    tensors["img_in.weight"] = tensors["img_in.weight"] * 2
    training.write(tmp_path / "other.safetensors", tensors)
    monkeypatch.chdir(tmp_path)
    code, _, err = train(pictures, whole, *LORA, *flags)
    assert (
        code == 2 and f"error: {whole / 'checkpoint.safetensors'} is of another run: {told}" in err
    )


def test_other_pictures_are_another_run(train, whole, tmp_path):
    draw(tmp_path / "0.png", 77)
    code, _, err = train(tmp_path, whole, *LORA)
    assert code == 2 and "is of another run: its pictures is " in err


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(train, pictures, tmp_path, monkeypatch):
    loss = training.rectified_flow_loss
    calls = []

    def spoiled(*arguments):
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) == 7 else 1)  # in the fourth step

    monkeypatch.setattr(training, "rectified_flow_loss", spoiled)
    monkeypatch.setattr(training, "memory", lambda *_: training.Need(0, 0, 0))
    code, out, err = train(pictures, tmp_path, *LORA, "--save-every", 2)
    assert (code, out) == (
        1,
        "",
    ) and "error: at step 4 the loss is nan, and its gradient nan long" in err
    assert "the same command with a smaller --lr goes on from step 2" in err
    assert all(x.isfinite().all() for x in load_file(tmp_path / "checkpoint.safetensors").values())
    monkeypatch.undo()
    monkeypatch.setattr(
        "sys.argv",
        [
            "train.py",
            str(pictures),
            str(tmp_path),
            *map(str, LORA),
            "--lr",
            "1e-4",
            "--device",
            "cpu",
        ],
    )
    assert train.module.main() == 0
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == 7


KINDS = {
    "all": ("--steps", "3"),
    "lora": ("--steps", "3", "--lora-rank", "2"),
    "bfloat16": ("--steps", "3", "--lora-rank", "2", "--dtype", "bfloat16"),
    "distilled": ("--steps", "3", "--distill", "flux.2-tiny"),
}
SHARED = (
    "--size",
    "64",
    "--batch",
    "2",
    "--sample-every",
    "0",
    "--ema",
    "0.9",
    "--checkpointing",
    "--lr",
    "3e-3",
)
BOTH = f"""
import runpy, sys
from flux.training import distributed as processes
pictures, runs = sys.argv[1:]
leave, processes.leave = processes.leave, lambda: None  # a second group would meet what the first one left with torchrun
for kind, flags in {KINDS!r}.items():
    sys.argv = ["train.py", pictures, runs + kind, *{SHARED!r}, "--device", "cpu", *flags]
    try:
        runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
    except SystemExit as end:
        assert not end.code
    processes.join = lambda device: device
leave()
"""


def apart(ours, truth, tolerance: float) -> np.ndarray:
    """Which numbers differ by more than a part of the largest: where a gradient is nearly zero, Adam makes a whole step of its
    rounding, so some do."""
    return ((ours - truth).abs() > tolerance * truth.abs().max()).flatten().numpy()


def test_two_processes_train_as_one(train, pictures, tmp_path):
    """All weights, a LoRA, also beside weights in bfloat16, and a student; and one process goes on where two were."""
    (tmp_path / "both.py").write_text(BOTH)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        tmp_path / "both.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    two = subprocess.run(
        [*command, pictures, f"{tmp_path}/two-"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert two.returncode == 0, two.stderr
    for kind, flags in KINDS.items():
        # products in bfloat16 are rounded otherwise in batches of another size
        loss, gradient, weights = (0.01, 0.03, 0.2) if kind == "bfloat16" else (2e-5, 1e-4, 5e-4)
        one, other = (tmp_path / f"{count}-{kind}" for count in ("one", "two"))
        assert train(pictures, one, *SHARED, *flags)[0] == 0
        for a, b in zip(
            *(csv.DictReader((run / "loss.csv").open()) for run in (one, other)), strict=True
        ):
            # velocities of about 1 are rounded to 1e-7: where a student is 1 % off, that is some 1e-9 of a loss of 1e-4
            assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=loss, abs=1e-8)
            assert float(b["gradient"]) == pytest.approx(float(a["gradient"]), rel=gradient)
        for name in (
            "checkpoint.safetensors",
            "lora.safetensors" if "--lora-rank" in flags else "transformer.safetensors",
        ):
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys()
            differ = [apart(b[key].double(), a[key].double(), weights) for key in a]
            # one in a hundred of each tensor, the smallest of which have 256; in bfloat16 two, but three in a thousand of all
            assert max(map(np.mean, differ)) <= (2e-2 if kind == "bfloat16" else 1e-2)
            assert kind != "bfloat16" or np.concatenate(differ).mean() <= 3e-3
        code, _, err = train(pictures, other, *SHARED, *flags, "--steps", 4)
        assert code == 0 and "goes on at step 3" in err


def test_two_processes_end_with_one_sentence(tmp_path):
    """That of the first, which alone looks at the pictures: the other does not wait for what never comes."""
    draw(tmp_path / "0.png", 0)
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        SCRIPT,
        tmp_path,
    ]
    flags = [tmp_path / "run", *SHARED, "--steps", "1", "--lora-rank", "2", "--device", "cpu"]
    two = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert two.returncode != 0 and two.stderr.count("0.png is damaged") == 1
    assert (
        "UserError" not in two.stderr
        and "Connection closed" not in two.stderr
        and "gloo" not in two.stderr
    )


# ---------------------------------------------------------------------------------------------------------- references


@pytest.fixture(scope="module")
def editors(tmp_path_factory):
    """Tiny models that take references, in a folder of weights."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        for name, like in (
            ("flux.2-klein-4b", "flux.2-klein-4b"),
            ("flux.1-kontext-dev", "flux.1-dev"),
        ):
            tiny = tiny_models(write_tokenizers(home(folder, name), name))[like]
            parts = dict(
                transformer=tiny.transformer,
                text=tiny.text,
                text_length=tiny.text_length,
                autoencoder=tiny.autoencoder,
            )
            patch.setitem(MODELS, name, replace(MODELS[name], **parts))
            write_weights(home(folder, name), MODELS[name], networks(tiny))
        yield folder


@pytest.mark.parametrize(
    "model, references, times",
    [
        ("flux.2-klein-4b", 2, {10, 20}),
        ("flux.1-kontext-dev", 1, {1}),
        ("flux.1-kontext-dev", 0, None),
    ],
)
def test_pairs(train, editors, tmp_path, monkeypatch, model, references, times):
    folder = tmp_path / "edits"
    folder.mkdir()
    lines = []
    for number in range(2):
        names = [
            draw(folder / f"{number}-{k}.png", 10 * number + k).name for k in range(1 + references)
        ]
        lines.append(
            {"image": names[0], "caption": f"edit {number}"}
            | ({"references": names[1:]} if references else {})
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen, velocity = [], training.velocity
    monkeypatch.setattr(
        training,
        "velocity",
        lambda network, batch, *rest: seen.append(batch) or velocity(network, batch, *rest),
    )
    flags = (
        "--model",
        model,
        "--weights",
        editors,
        "--dtype",
        "float32",
        "--size",
        64,
        "--batch",
        2,
        "--lora-rank",
        2,
        "--steps",
        2,
    )
    code, out, err = train(folder, tmp_path / "run", *flags, "--lr", 1e-2, "--sample-every", 2)
    assert code == 0, err
    batch = seen[-1]
    if references:
        assert batch.references.shape[:2] == (2, 16 * references)
        assert set(batch.reference_ids[:, 0].tolist()) == times
    else:
        assert batch.references is None
    assert Image.open(tmp_path / "run" / "samples" / "000002.png").size == (128, 64)
    pipe = flux.load(model, weights=editors, device="cpu", dtype=torch.float32)
    pipe.load_lora(out)


@pytest.fixture(scope="module")
def needy(tmp_path_factory):
    """Tiny models that read a picture beside the latents, in a folder of weights."""
    folder = tmp_path_factory.mktemp("needy")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        for name, masks in (("flux.1-canny-dev", 0), ("flux.1-fill-dev", 256)):
            tiny = tiny_models(write_tokenizers(home(folder, name), name))["flux.1-dev"]
            width = tiny.transformer.out_channels
            transformer = replace(tiny.transformer, in_channels=2 * width + masks)
            parts = dict(
                text=tiny.text,
                text_length=tiny.text_length,
                autoencoder=tiny.autoencoder,
                steps=2,
                size=64,
            )
            patch.setitem(MODELS, name, replace(MODELS[name], transformer=transformer, **parts))
            write_weights(home(folder, name), MODELS[name], networks(MODELS[name]))
        yield folder


@pytest.mark.parametrize(
    "model, kind",
    [
        ("flux.1-canny-dev", "control"),
        ("flux.1-canny-dev", None),
        ("flux.1-fill-dev", "mask"),
        ("flux.1-fill-dev", None),
    ],
)
def test_what_is_read_beside_the_latents_is_what_the_sampler_takes(
    train, needy, tmp_path, monkeypatch, model, kind
):
    """Given, or made: edges of the picture itself, and a rectangle that depends on nothing but the picture."""
    folder, lines, asked = tmp_path / "pictures", [], []
    folder.mkdir()
    for number in range(2):
        path = draw(folder / f"{number}.png", number)
        other = folder / f"{number}-other.png"
        Image.effect_noise((64, 64), 90).point(lambda grey: 255 * (grey > 128)).save(other)
        lines.append(
            {"image": path.name, "caption": f"picture {number}"}
            | ({kind: other.name} if kind else {})
        )
        picture, other = Image.open(path), Image.open(other)  # RGB, and grey
        if model == "flux.1-fill-dev":
            mask = other if kind else dataset.a_mask((64, 64), dataset.content_of(path))
            asked.append(flux.ImageInputs((picture,), mask=mask))
        else:
            asked.append(
                flux.ImageInputs(
                    (other.convert("RGB") if kind else picture,), preprocess_control=not kind
                )
            )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen, velocity = [], training.velocity
    monkeypatch.setattr(
        training,
        "velocity",
        lambda network, batch, *rest: seen.append(batch) or velocity(network, batch, *rest),
    )
    flags = (
        "--model",
        model,
        "--weights",
        needy,
        "--dtype",
        "float32",
        *SMALL,
        "--lora-rank",
        2,
        "--steps",
        2,
    )
    code, out, err = train(folder, tmp_path / "run", *flags, "--sample-every", 2)
    assert code == 0, err
    assert Image.open(tmp_path / "run" / "samples" / "000002.png").size == (128, 64)
    pipe = flux.load(model, weights=needy, device="cpu", dtype=torch.float32)
    pipe.load_lora(out)
    expected = [pipe.condition(pictures).channels[0] for pictures in asked]
    assert not torch.equal(*expected)
    for row in seen[-1].channels:
        assert min((row - one).abs().max() for one in expected) == 0
    code, _, err = train(
        folder, tmp_path / "run", *flags, "--steps", 3, "--prompt", "another", "--sample-every", 1
    )
    assert code == 0 and "goes on at step 2" in err


def test_rectangles_to_fill_in_are_of_all_sizes_and_anywhere():
    masks = [np.asarray(dataset.a_mask((90, 60), f"{number:012x}")) for number in range(200)]
    assert all(set(np.unique(mask)) <= {0, 255} for mask in masks)
    shares = [mask.mean() / 255 for mask in masks]
    assert (
        min(shares) > 0.1
        and max(shares) > 0.8
        and np.mean(shares) == pytest.approx(4 / 9, abs=0.05)
    )
    assert (np.mean(masks, axis=0) > 0).all()  # no place is never asked for


@pytest.mark.parametrize(
    "model, kind, told",
    [
        (
            "flux.1-canny-dev",
            "mask",
            "has items with a mask, which means nothing to flux.1-canny-dev; choose from flux.1-fill",
        ),
        (
            "flux.1-fill-dev",
            "control",
            "has items with a control, which means nothing to flux.1-fill-dev; choose from flux.1-ca",
        ),
        ("flux.1-canny-dev", "control", "other.png is 80x64, and "),
        ("flux.1-fill-dev", "mask", "other.png is 80x64, and "),
    ],
)
def test_pictures_beside_that_do_not_fit_are_told(train, needy, tmp_path, model, kind, told):
    draw(tmp_path / "0.png", 0)
    Image.new("L", (80, 64)).save(tmp_path / "other.png")
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"image": "0.png", "caption": "a", kind: "other.png"})
    )
    flags = (
        "--model",
        model,
        "--weights",
        needy,
        "--dtype",
        "float32",
        *SMALL,
        "--lora-rank",
        2,
        "--steps",
        2,
    )
    code, _, err = train(tmp_path, tmp_path / "run", *flags)
    assert code == 2 and told in err


def test_a_mask_with_nothing_to_fill_in_is_told(train, needy, tmp_path):
    draw(tmp_path / "0.png", 0)
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"image": "0.png", "caption": "a", "mask": "black.png"})
    )
    flags = (
        "--model",
        "flux.1-fill-dev",
        "--weights",
        needy,
        "--dtype",
        "float32",
        *SMALL,
        "--lora-rank",
        2,
        "--steps",
        2,
    )
    code, _, err = train(tmp_path, tmp_path / "run", *flags)
    assert code == 2 and "black.png: is all black" in err


def test_a_lora_of_a_quantised_file(train, pictures, tmp_path):
    """It learns, its file is what was trained, and the matrices stay as they are in theirs."""
    network = flux.load(device="cpu").transformer()
    quantize_(network, "fp8")
    training.write(tmp_path / "fp8.safetensors", network.state_dict())
    flags = (*SMALL, "--transformer", tmp_path / "fp8.safetensors", "--checkpointing", "--steps", 3)
    code, out, err = train(pictures, tmp_path / "run", *flags, "--lora-rank", 2)
    assert code == 0, err
    size = (tmp_path / "fp8.safetensors").stat().st_size
    assert float(re.search("weights ([0-9.e-]+)", err)[1]) == pytest.approx(size / 1e9, rel=0.1)
    pipe = flux.load(transformer=tmp_path / "fp8.safetensors", device="cpu")
    batch = a_batch(network.config)
    adapters.add_lora(network, 2)
    average = training.take(training.load(tmp_path / "run" / "checkpoint.safetensors"), "average.")
    assert not network.load_state_dict(average, strict=False).unexpected_keys
    before = velocity_of(pipe.transformer(), *batch)
    pipe.load_lora(out)
    after = velocity_of(pipe.transformer(), *batch)
    assert (
        max_error(after, velocity_of(network, *batch)) < 1e-5
    )  # the same sums, rounded in another order
    assert max_error(after, before) > 1e-3
    code, _, err = train(pictures, tmp_path / "whole", *flags)
    assert code == 2 and "is quantised" in err and "or train a LoRA, with --lora-rank" in err


# ---------------------------------------------------------------------------------------------------------- guidance


@pytest.fixture(scope="module")
def flux1(tmp_path_factory):
    """FLUX.1 [dev], tiny, in a folder of weights, and beside it teacher.safetensors, which is not told its guidance."""
    folder, name = tmp_path_factory.mktemp("flux.1"), "flux.1-dev"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        tiny = tiny_models(write_tokenizers(home(folder, name), name))[name]
        # the shares that are read from a file
        row = replace(
            tiny, transformer=replace(tiny.transformer, axes_dim=(4, 14, 14)), size=64, steps=2
        )
        patch.setitem(MODELS, name, row)
        parts = networks(row)
        write_weights(home(folder, name), row, parts)
        teacher = {
            key: x
            for key, x in parts["transformer"].state_dict().items()
            if not key.startswith("guidance_in.")
        }
        training.write(folder / "teacher.safetensors", teacher)
        yield folder


def from_teacher(folder: Path, *flags) -> tuple:
    return (
        "--model",
        "flux.1-dev",
        "--weights",
        folder,
        "--distill",
        folder / "teacher.safetensors",
        *SMALL,
        *flags,
    )


def drawn_by(folder: Path, transformer: Path, guidance: float) -> np.ndarray:
    pipe = flux.load(
        "flux.1-dev", weights=folder, device="cpu", dtype=torch.float32, transformer=transformer
    )
    return np.asarray(pipe("a red circle", guidance=guidance)[0]).astype(int)


def test_a_student_is_distilled_goes_on_and_is_guided(
    train, pictures, flux1, tmp_path, monkeypatch
):
    flags = from_teacher(
        flux1,
        "--dtype",
        "float32",
        "--steps",
        4,
        "--sample-every",
        4,
        "--prompt",
        "a",
        "--cache",
        tmp_path,
    )
    code, out, err = train(pictures, tmp_path / "whole", *flags)
    assert (code, out) == (0, str(tmp_path / "whole" / "transformer.safetensors")), err
    student, teacher = load_file(out), load_file(flux1 / "teacher.safetensors")
    assert {name for name in student if name not in teacher} == {
        f"guidance_in.{layer}.{kind}"
        for layer in ("in_layer", "out_layer")
        for kind in ("weight", "bias")
    }
    # weights in float32, and a gradient, two moments and an average; the teacher beside them
    count, frozen = (sum(x.numel() for x in tensors.values()) for tensors in (student, teacher))
    assert (
        f"weights {4 * (count + frozen) / 1e9:.3g}, gradients and the optimizer {16 * count / 1e9:.3g}"
        in err
    )
    update = training.Trainer.update

    def interrupted(self, losses):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, losses)

    monkeypatch.setattr(training.Trainer, "update", interrupted)
    assert train(pictures, tmp_path / "parts", *flags)[0] == 128 + signal.SIGINT
    monkeypatch.setattr(training.Trainer, "update", update)
    code, _, err = train(pictures, tmp_path / "parts", *flags)
    assert code == 0 and "goes on at step 2" in err
    for name in ("checkpoint.safetensors", "transformer.safetensors"):
        assert equal(tmp_path / "whole" / name, tmp_path / "parts" / name)
    assert Image.open(tmp_path / "parts" / "samples" / "000004.png").size == (64, 64)
    weak, strong = (drawn_by(flux1, Path(out), guidance) for guidance in (1.0, 5.0))
    assert np.abs(weak - strong).max() > 3


def test_teacher_and_student_are_asked_of_the_same_pictures(train, pictures, tmp_path, monkeypatch):
    """The teacher with and without captions, and the student, who is told a guidance of its own for each picture."""
    asked, velocity = [], training.velocity
    monkeypatch.setattr(
        training,
        "velocity",
        lambda *given: asked.append((*given[:3], torch.is_grad_enabled())) or velocity(*given),
    )
    monkeypatch.setattr(training, "memory", lambda *_: training.Need(0, 0, 0))
    flags = (
        "--distill",
        "flux.2-tiny",
        "--guidance-range",
        2,
        3,
        *SMALL,
        "--steps",
        2,
        "--drop-captions",
        0,
    )
    assert (
        train(pictures, tmp_path, *flags, "--sample-every", 2, "--prompt", "a red circle")[0] == 0
    )
    drawn = []
    for (teacher, batch, _, a), (same, blank, _, b), (student, given, guidance, c) in (
        asked[:3],
        asked[3:],
    ):
        assert teacher is same and (teacher.config.guidance, student.config.guidance) == (
            False,
            True,
        )
        assert (
            (a, b, c) == (False, False, True) and given is batch and blank.latents is batch.latents
        )
        assert torch.equal(blank.features.tokens[0], blank.features.tokens[1])
        assert not torch.equal(batch.features.tokens[0], blank.features.tokens[0])
        drawn += guidance.tolist()
    assert len(set(drawn)) == 4 and all(2 <= guidance <= 3 for guidance in drawn)
    with Image.open(
        tmp_path / "samples" / "000002.png"
    ) as sheet:  # the student's: guided as the model's row says
        pipe = flux.load(
            "flux.2-tiny", transformer=tmp_path / "transformer.safetensors", device="cpu"
        )
        (expected,), (toys,) = (
            each("a red circle", 64, 64, seed=0) for each in (pipe, flux.load(device="cpu"))
        )
        assert np.abs(np.asarray(sheet).astype(int) - np.asarray(expected)).max() <= 1
        assert np.abs(np.asarray(sheet).astype(int) - np.asarray(toys)).max() > 3


def test_a_student_goes_on_from_another(train, pictures, flux1, tmp_path):
    """--transformer: where it begins. At a rate of next to nothing, it ends there."""
    own = home(flux1, "flux.1-dev") / MODELS["flux.1-dev"].transformer_file
    flags = from_teacher(
        flux1, "--transformer", own, "--dtype", "float32", "--steps", 1, "--lr", 1e-12
    )
    code, out, err = train(pictures, tmp_path, *flags)
    assert code == 0, err
    before, after = load_file(own), load_file(out)
    assert before.keys() == after.keys() and all(
        max_error(after[name], before[name]) < 1e-9 for name in before
    )
    code, _, err = train(
        pictures, tmp_path, *from_teacher(flux1, "--dtype", "float32", "--steps", 1)
    )
    assert code == 2 and "is of another run: its student is " in err


def test_the_toy_is_distilled_and_loads(train, pictures, tmp_path):
    """As its own teacher: what comes out is told its guidance, and needs one pass a step."""
    code, out, err = train(
        pictures,
        tmp_path,
        "--distill",
        "flux.2-tiny",
        *SMALL,
        "--steps",
        1,
        "--guidance-range",
        2,
        3,
    )
    assert code == 0, err
    pipe = flux.load("flux.2-tiny", transformer=out, device="cpu")
    calls, velocity = [], pipe.transformer().velocity
    pipe.transformer().velocity = lambda *given: calls.append(1) or velocity(*given)
    pipe("a red circle", 64, 64, steps=2, guidance=3)
    assert len(calls) == 2


def test_guided_training_goes_at_the_guidance_of_use(train, pictures, flux1, tmp_path, monkeypatch):
    """The first loss is as by hand; a checkpoint of it is no other's."""
    told, velocity = [], training.velocity
    monkeypatch.setattr(
        training,
        "velocity",
        lambda network, batch, g, *x: told.append((batch, g)) or velocity(network, batch, g, *x),
    )
    flags = (
        "--model",
        "flux.1-dev",
        "--weights",
        flux1,
        "--dtype",
        "float32",
        *SMALL,
        "--lora-rank",
        2,
        "--steps",
        1,
    )
    monkeypatch.setattr(training, "memory", lambda *_: training.Need(0, 0, 0))
    code, _, err = train(pictures, tmp_path / "run", *flags, "--guided")
    assert code == 0, err
    (blank, one), (batch, given) = told
    assert one == 1 and given.tolist() == [3.5, 3.5]  # FLUX.1 [dev]'s own
    assert torch.equal(batch.latents, blank.latents) and not torch.equal(
        batch.features.tokens, blank.features.tokens
    )
    assert torch.equal(blank.features.tokens[0], blank.features.tokens[1])
    losses = [float(next(csv.DictReader((tmp_path / "run" / "loss.csv").open()))["loss"])]
    for name, more in (("one", ("--guided", "--guidance", 1)), ("plain", ())):
        assert (
            train(pictures, tmp_path / name, *flags, *more, "--cache", tmp_path / "run" / "cache")[
                0
            ]
            == 0
        )
        losses.append(float(next(csv.DictReader((tmp_path / name / "loss.csv").open()))["loss"]))
    assert losses[1] == pytest.approx(losses[2], rel=1e-5) and abs(losses[0] / losses[2] - 1) > 0.01
    code, _, err = train(pictures, tmp_path / "one", *flags, "--cache", tmp_path / "run" / "cache")
    assert code == 2 and "is of another run: its --guided is True, and now it is None" in err


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ("--distill", "flux.2-tiny", "--guidance-range", 5, 1),
            "--guidance-range 5 1: must be the lowest and the highest",
        ),
        (
            ("--distill", "flux.2-tiny", "--guidance-range", 0, 1),
            "--guidance-range 0 1: must be the lowest and the highest",
        ),
        (
            ("--distill", "flux.2-tiny", "--guidance-range", 1, "nan"),
            "--guidance-range 1 nan: must be the lowest and the highest",
        ),
        (
            ("--distill", "flux.2-tiny", "--guidance", 3),
            "--guidance is one value, where a range is drawn from",
        ),
        (("--distill", "flux.2-tiny", "--guided"), "leave --guided out"),
        (("--distill", "flux.2-tiny", "--lora-rank", 2), "leave --lora-rank out"),
        (("--distill", "flux.2-tiny", "--model", "flux.2-tiny"), "leave --model flux.2-tiny out"),
        (
            ("--distill", "flux.9"),
            "--distill flux.9: there is no such file, and no such model; the models are flux.1-schnell, ",
        ),
        (
            ("--distill", "flux.2-tiny", "--transformer", TOY),
            f"{TOY} is no student of flux.2-tiny: it has no input for guidance",
        ),
        (("--guidance-range", 1, 5), "--guidance-range is for --distill and --guided"),
        (("--guided",), "--guided: flux.2-tiny has no such input; leave it out"),
        (("--guided", "--drop-captions", 0.1), "leave --drop-captions out"),
    ],
)
def test_wrong_requests_of_guidance_are_told(train, pictures, tmp_path, flags, told):
    refused(train, pictures, tmp_path / "run", flags, told)


def refused(train, pictures: Path, run: Path, flags: tuple, told: str) -> None:
    code, out, err = train(pictures, run, *flags)
    assert (
        (code, out) == (2, "")
        and told in err.splitlines()[-1]
        and err.splitlines()[-1].startswith("error: ")
    )
    assert not run.exists()


def test_wrong_teachers_and_students_are_told(train, pictures, flux1, tmp_path):
    own, run = home(flux1, "flux.1-dev") / MODELS["flux.1-dev"].transformer_file, tmp_path / "run"
    dev = ("--model", "flux.1-dev", "--weights", flux1)
    refused(
        train,
        pictures,
        run,
        (*dev, "--distill", own),
        f"--distill {own}: it is told its guidance, which was distilled already",
    )
    refused(
        train,
        pictures,
        run,
        (*dev, "--distill", TOY),
        f"--distill {TOY} reads text of width 384, but the text encoder of ",
    )
    other = {key: x for key, x in load_file(own).items() if not key.startswith("single_blocks.2.")}
    training.write(tmp_path / "other.safetensors", other)
    told = f"--transformer {tmp_path / 'other.safetensors'} is no student of "
    refused(
        train,
        pictures,
        run,
        from_teacher(flux1, "--transformer", tmp_path / "other.safetensors"),
        told,
    )
    quantised = randomise(Flux(MODELS["flux.1-dev"].transformer))
    quantize_(quantised, "fp8")
    training.write(tmp_path / "fp8.safetensors", quantised.state_dict())
    told = f"{tmp_path / 'fp8.safetensors'} is quantised, and weights are trained in float32 or beside bfloat16"
    refused(
        train,
        pictures,
        run,
        from_teacher(flux1, "--transformer", tmp_path / "fp8.safetensors"),
        told,
    )
    refused(
        train,
        pictures,
        run,
        (*dev, "--guided", "--guidance", 0.5),
        "--guided --guidance 0.5: must be at least 1",
    )


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_broken_picture_is_named_and_skipped_only_if_asked(train, tmp_path):
    for number in range(3):
        draw(tmp_path / f"{number}.png", number)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    code, _, err = train(tmp_path, tmp_path / "run", *LORA)
    assert code == 2 and f"error: {tmp_path / '1.png'} is damaged" in err and "--skip-broken" in err
    code, _, err = train(tmp_path, tmp_path / "run", *LORA, "--steps", 1, "--skip-broken")
    assert (
        code == 0
        and f"note: left out: {tmp_path / '1.png'} is damaged" in err
        and "2 pictures: 2 of 64x64" in err
    )


def test_a_run_among_its_pictures_is_told(train, pictures):
    code, _, err = train(pictures, pictures / "." / "", *LORA)
    assert code == 2 and "holds the pictures: name another folder" in err


def test_a_full_disk_is_no_broken_picture(train, pictures, tmp_path, monkeypatch):
    def full(path, tensors, metadata=None):
        raise WriteError(f"{path} could not be written")

    monkeypatch.setattr(dataset, "write", full)
    code, _, err = train(pictures, tmp_path / "run", *LORA, "--skip-broken")
    assert (
        code == 2
        and "could not be written" in err.splitlines()[-1]
        and "left out" not in err
        and "--skip" not in err
    )


def test_lines_that_are_alike_count_as_often_as_they_stand(train, tmp_path):
    draw(tmp_path / "a.png", 1)
    (tmp_path / "metadata.jsonl").write_text(3 * '{"image": "a.png", "caption": "a"}\n')
    assert "3 pictures: 3 of 64x64" in train(tmp_path, tmp_path / "run", *LORA, "--steps", 1)[2]


def test_a_log_of_something_else_does_not_stop_a_run(train, pictures, tmp_path):
    (tmp_path / "loss.csv").write_bytes(b"step\n1.0,2,3,4,5,6\n\xff,nan\n")
    assert train(pictures, tmp_path, *LORA, "--steps", 2)[0] == 0
    assert [line.split(",")[0] for line in (tmp_path / "loss.csv").read_text().splitlines()] == [
        "step",
        "1",
        "2",
    ]


def test_samples_are_those_of_what_is_trained_however_little_memory_there_is(
    train, pictures, tmp_path, monkeypatch
):
    """Where there is too little for all networks at once, a pipeline lets one go when the next comes; but not this one."""
    monkeypatch.setattr(training, "memory", lambda *_: training.Need(0, 0, 0))
    monkeypatch.setattr(
        "flux.runtime.residency.available_memory", lambda device: FreeMemory("cpu", 1.2e7)
    )
    steps = ("--lora-rank", 4, "--lr", 5e-2, "--warmup", 1, "--steps", 8, "--sample-every", 8)
    assert train(pictures, tmp_path, "--size", 64, *steps, "--prompt", "a red circle")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "samples" / "000008.png")).astype(int)
    monkeypatch.undo()
    pipe = flux.load(device="cpu")
    plain, trained = [], []
    for made in (plain, trained):
        made += pipe("a red circle", 64, 64)
        if made is plain:
            pipe.load_lora(tmp_path / "lora.safetensors")
    off = [abs(np.asarray(made[0]).astype(int) - sheet).mean() for made in (plain, trained)]
    assert off[1] < 1 < 10 < off[0]


def test_samples_that_are_not_finite_are_no_end(train, pictures, tmp_path, monkeypatch):
    def denoise(*_):
        raise NonFiniteError("the latents are not finite")

    monkeypatch.setattr("flux.sampling.denoise", denoise)
    code, _, err = train(pictures, tmp_path, *LORA, "--sample-every", 3)
    assert code == 0 and "note: no samples of step 3: their latents are not finite" in err


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--model", "flux.9"), "there is no such model"),
        (("--seed", 2**64), f"--seed {2**64}: must be at most 2^63 - 1"),
        (("--model", "flux.1-tiny", "--guidance", "nan"), "--guidance nan: must be from 0 to 100"),
        (("--steps", 0), "--steps 0: must be at least 1"),
        (("--warmup", -1), "--warmup -1: must be at least 0"),
        (("--targets", "*"), "give --lora-rank too"),
        (("--lora-rank", 2, "--targets", "nothing"), "--targets nothing: none of the "),
        (("--ema", 1), "--ema 1: must be between 0 and 1"),
        (("--lr", 3), "--lr 3: must be between 0 and 1"),
        (("--drop-captions", 2), "--drop-captions 2: must be from 0 to 1"),
        (("--size", 100), "--size 100: must be a multiple of 16 from 64 to 2048"),
        (("--guidance", 2), "--guidance 2: flux.2-tiny has no such input"),
        (("--device", "abacus"), "there is no such device"),
    ],
)
def test_wrong_requests_are_told(train, pictures, tmp_path, flags, told):
    code, out, err = train(pictures, tmp_path / "run", *flags)
    assert (
        (code, out) == (2, "")
        and told in err.splitlines()[-1]
        and err.splitlines()[-1].startswith("error: ")
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_without_captions_is_told(train, tmp_path):
    draw(tmp_path / "0.png", 0).with_suffix(".txt").unlink()
    code, _, err = train(tmp_path, tmp_path / "run")
    assert code == 2 and "1 of 1 pictures have no caption (0.png)" in err


def test_references_for_a_model_without_are_told(train, tmp_path, flux1):
    draw(tmp_path / "0.png", 0)
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"image": "0.png", "caption": "a", "references": ["0.png"]})
    )
    code, _, err = train(tmp_path, tmp_path / "run", "--model", "flux.1-dev", "--weights", flux1)
    assert (
        code == 2
        and "has references, and flux.1-dev takes none in training; choose from flux.1-kontext-dev, "
        in err
    )


def test_too_little_memory_is_told(train, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flux.training.options.available_memory", lambda device: FreeMemory("cpu", 1_000_000)
    )
    code, _, err = train(pictures, tmp_path / "run", "--batch", 64)
    assert (
        code == 2
        and "GB, and 0.001 GB are free: use --checkpointing or a smaller --size or a smaller --batch or --lora-rank"
        in err
    )


def test_an_optimizer_with_moments_of_a_byte_each(train, pictures, tmp_path):
    flags = (*SMALL, "--optimizer", "adamw8bit", "--steps")
    code, _, err = train(pictures, tmp_path, *flags, 2)
    plain = train(pictures, tmp_path / "plain", *SMALL, "--steps", 1)[2]
    large, small = (float(re.search("the optimizer ([0-9.e-]+)", told)[1]) for told in (plain, err))
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert code == 0 and any(name.endswith(".absmax1") for name in kept)
    assert (
        0.6 < small / large < 0.65
    )  # gradient, average and two moments: 4 + 4 + 1 + 1 bytes in place of 16
    assert train(pictures, tmp_path, *flags, 3)[0] == 0
    code, _, err = train(pictures, tmp_path, *SMALL, "--steps", 4)
    assert (
        code == 2 and "its training is all weights, by adamw8bit, and now it is all weights" in err
    )


def test_an_optimizer_that_is_not_installed(train, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    code, _, err = train(pictures, tmp_path / "run", *SMALL, "--optimizer", "adamw8bit")
    assert code == 2 and "pip install -e '.[adamw8bit]'" in err and not (tmp_path / "run").exists()


def test_a_full_disk_is_told_and_keeps_the_last_checkpoint(train, pictures, tmp_path):
    """Of a full disk there is a limit on the size of files, which is told in the same way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert train(pictures, tmp_path, *LORA, "--steps", 2)[0] == 0
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, out, err = train(pictures, tmp_path, *LORA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        (code, out) == (2, "")
        and "checkpoint.safetensors could not be written (" in err
        and "File too large" in err
    )
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_ctrl_c_while_pictures_are_encoded(train, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(
        dataset.Cache, "features", lambda *_: signal.default_int_handler(signal.SIGINT, None)
    )
    code, out, err = train(pictures, tmp_path, *LORA)
    assert (code, out) == (130, "") and "stopped; what was encoded and saved is kept" in err
    assert list((tmp_path / "cache").glob("latents-*"))


@pytest.mark.parametrize(
    "model, beside", [("flux.1-redux-dev", "an image encoder"), ("flux.1-canny-dev-lora", "a LoRA")]
)
def test_models_with_something_beside_them_are_refused(
    train, pictures, tmp_path, monkeypatch, model, beside
):
    pipe = SimpleNamespace(
        spec=MODELS[model], transformer=SimpleNamespace(shapes=torch.nn.Identity())
    )
    monkeypatch.setattr(train.module.flux, "load", lambda *_, **__: pipe)
    code, _, err = train(pictures, tmp_path)
    assert (
        code == 2
        and f"{model} is flux.1-dev with {beside} beside it, which is not trained here" in err
    )


def test_a_folder_that_cannot_be_written_is_told(train, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = train(pictures, tmp_path / "file", *LORA)
    assert code == 2 and f"error: {tmp_path / 'file'}: " in err
