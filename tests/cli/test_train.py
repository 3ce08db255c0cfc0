"""scripts/train.py: from a folder of images to weights that load; kills, Ctrl-C, bad input.

Trained are the embedded toy, and tiny random models where a model reads references or channels.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.load_script import script
from support.tiny_repositories import home, write_tokenizers
from support.train_run import equal_files, train_script

import flux
from flux import toy
from flux.configs import MODELS
from flux.errors import NonFiniteError, WriteError
from flux.parity.reference import max_error, networks, randomise, tiny_models, write_weights
from flux.runtime.devices import FreeMemory
from flux.safety.verification import verify
from flux.text_encoder import TextFeatures
from flux.training import batches, dataset, loss, memory
from flux.training.checkpoint import load_tensors, save_tensors, strip_prefix
from flux.training.lora import add_lora
from flux.training.trainer import Trainer
from flux.transformer import Flux
from flux.weights import locate
from flux.weights.quantization.quantize import quantize_

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
TOY = locate.EMBEDDED / "flux.2-tiny" / "flux-2-tiny.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache for all runs: the names of its files are hashes of what they depend on."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(cache, monkeypatch, capsys):
    return train_script(cache, monkeypatch, capsys)


@pytest.fixture
def estimated_memory(train, monkeypatch):
    """Let `train` estimate the memory."""
    monkeypatch.setattr("modules.training_options.estimate_memory", memory.estimate_memory)


def draw(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> Path:
    """Draw an image in inverted colours, which the toy has not seen, and write its caption."""
    scene = next(toy.scenes(seed, held=None))
    pixels = 255 - toy.draw(scene, *size, np.random.default_rng(seed))
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text(str(scene))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five images with captions, one of another size."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        draw(folder / f"{number}.png", number, (96, 64) if number == 3 else (64, 64))
    return folder


SMALL = (
    *("--size", 64, "--batch-size", 2, "--warmup", 2),
    *("--sample-every", 0, "--lr", 3e-3, "--ema", 0.9),
)
LORA = (
    *SMALL,
    *("--lora-rank", 2, "--gradient-accumulation-steps", 2, "--steps", 4, "--save-every", 2),
)


@pytest.fixture(scope="module")
def finished(images, cache, tmp_path_factory):
    """The folder of a run of four steps that nothing stopped, with a chart of the loss."""
    run = tmp_path_factory.mktemp("finished")
    argv = ["train.py", images, run, *LORA, "--device", "cpu", "--cache", cache]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", list(map(str, argv)))
        assert script("train").main() == 0
    return run


def equal_runs(a: Path, b: Path) -> bool:
    files = ("checkpoint.safetensors", "lora.safetensors")
    return all(equal_files(a / name, b / name) for name in files)


def rows_of(run: Path) -> list[dict[str, str]]:
    """Return the rows of loss.csv."""
    with (run / "loss.csv").open() as file:
        return list(csv.DictReader(file))


def write_metadata(folder: Path, *lines: dict) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


# ------------------------------------------------------------------------------------------ weights


def velocity_of(network: Flux, batch: loss.Batch) -> torch.Tensor:
    with torch.no_grad():
        t = torch.tensor([0.3, 0.8])
        return loss.predict_velocity(network, batch, 1.0, batch.latents, t)


def random_batch(network: Flux) -> loss.Batch:
    torch.manual_seed(1)
    features = TextFeatures(torch.randn(2, 32, network.config.context_dim), None)
    return loss.Batch(torch.randn(2, 64, 4, 4), features)


def load_trained_lora(network: Flux, run: Path) -> None:
    """Add the averaged LoRA of a run's checkpoint to a network, as during training."""
    add_lora(network, 2)
    average = strip_prefix(load_tensors(run / "checkpoint.safetensors"), "ema.")
    assert len(average) == 64
    assert not network.load_state_dict(average, strict=False).unexpected_keys


def test_lora_file_loads_as_the_trained_weights(finished):
    pipe = flux.load(device="cpu")
    plain, network = pipe.transformer(), pipe.transformer.meta_module().to_empty(device="cpu")
    network.load_state_dict(plain.state_dict())
    load_trained_lora(network, finished)
    batch = random_batch(network)
    before = velocity_of(plain, batch)
    pipe.load_lora(finished / "lora.safetensors")
    after = velocity_of(pipe.transformer(), batch)
    assert max_error(after, velocity_of(network, batch)) < 1e-5  # sums in another order
    assert max_error(after, before) > 1e-3


def test_run_writes_log_and_chart(finished):
    rows = rows_of(finished)
    assert [row["step"] for row in rows] == list("1234")
    assert all(0 < float(row["loss"]) < 10 for row in rows)
    with Image.open(finished / "loss.png") as chart:
        assert chart.size == (1280, 600)


def test_missing_matplotlib_is_reported_once(train, images, tmp_path):
    code, _, err = train(images, tmp_path, *LORA, "--steps", 2, "--save-every", 1)
    assert code == 0 and err.count("pip install -e '.[plots]'") == 1
    assert len(rows_of(tmp_path)) == 2 and not (tmp_path / "loss.png").exists()


def test_full_weights_file_loads_as_the_trained_weights(train, images, tmp_path):
    flags = (
        *("--size", 64, "--batch-size", 2, "--steps", 3, "--warmup", 2, "--lr", 1e-3),
        *("--sample-every", 3, "--prompt", "a red circle", "--gradient-checkpointing"),
    )
    code, out, err = train(images, tmp_path, *flags)
    assert (code, out) == (0, str(tmp_path / "transformer.safetensors"))
    assert "trainable parameters, on cpu, matrix products in float32" in err
    trained = strip_prefix(load_tensors(tmp_path / "checkpoint.safetensors"), "model.")
    pipe = flux.load(transformer=tmp_path / "transformer.safetensors", device="cpu")
    loaded, before = pipe.transformer().state_dict(), load_file(TOY)
    assert loaded.keys() == trained.keys() == before.keys()
    for name, x in loaded.items():
        assert torch.equal(x, trained[name])
        assert max_error(x, before[name].float()) > 1e-4
    with Image.open(tmp_path / "samples" / "000003.png") as sheet:
        assert sheet.size == (64, 64)
        # drawn with the float32 weights of the run, not with the bfloat16 weights of the file
        (expected,) = pipe("a red circle", 64, 64, seed=0)
        assert np.abs(np.asarray(sheet).astype(int) - np.asarray(expected)).max() <= 1


def test_training_learns(train, cache, tmp_path):
    """One image in inverted colours: the loss on unseen draws falls."""
    (tmp_path / "one").mkdir()
    draw(tmp_path / "one" / "0.png", 0)
    flags = (
        *("--size", 64, "--batch-size", 4, "--warmup", 5, "--steps", 25, "--lr", 1.5e-2),
        *("--lora-rank", 4, "--sample-every", 0, "--caption-dropout", 0),
    )
    assert train(tmp_path / "one", tmp_path / "run", *flags)[0] == 0
    pipe = flux.load(device="cpu")
    cached = dataset.Cache(cache, pipe, 64)
    samples = [cached.sample(sample) for sample in dataset.read_folder(tmp_path / "one")]
    batch, normal, noise = batches.BatchSampler(samples, 64, 999, 4, Path())(0)

    def value() -> float:
        def velocity(x, t):
            return loss.predict_velocity(pipe.transformer(), batch, 1.0, x, t)

        t = loss.shifted_times(normal, 0.0)
        with torch.no_grad():
            return loss.rectified_flow_loss(velocity, batch.latents, t, noise).item()

    before = value()
    pipe.load_lora(tmp_path / "run" / "lora.safetensors")
    assert value() < 0.6 * before


def test_bfloat16_and_float32_train_alike(train, images, tmp_path):
    flags = (*SMALL, "--steps", 2, "--lora-rank", 2)
    losses = []
    for dtype in ("float32", "bfloat16"):
        assert train(images, tmp_path / dtype, *flags, "--dtype", dtype)[0] == 0
        losses.append([float(row["loss"]) for row in rows_of(tmp_path / dtype)])
        tensors = load_file(tmp_path / dtype / "checkpoint.safetensors")
        assert all(x.dtype == torch.float32 for x in tensors.values())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.03)


# ----------------------------------------------------------------------------------------- resuming


def test_killed_run_resumes_bit_for_bit(train, images, finished, cache, tmp_path):
    """SIGKILL in the fourth step; the checkpoint holds two."""
    program = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("train", {str(SCRIPT)!r})
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
update = train.Trainer.update
def killed(self, losses):
    if self.step == 3:
        next(iter(losses))().backward()
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, losses)
train.Trainer.update = killed
train.main()
"""
    argv = (images, tmp_path, *LORA, "--device", "cpu", "--cache", cache)
    flags = list(map(str, argv))
    # sums are in the order of the threads
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", program, *flags]
    killed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(rows_of(tmp_path)) == 3
    code, _, err = train(images, tmp_path, *LORA)
    assert code == 0 and "resumed at step 2" in err
    assert equal_runs(tmp_path, finished)
    columns = ("step", "loss", "gradient", "rate")
    for ours, expected in zip(rows_of(tmp_path), rows_of(finished), strict=True):
        assert [ours[name] for name in columns] == [expected[name] for name in columns]


KILLS = 10
KILLED_RUNS = f"""
import os, random, signal, sys
sys.path[:0] = [{str(SCRIPT.parent)!r}]
import train

def run(folder, last):
    # Train in a process of its own, which is killed before its `last`-th change of a file.
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    changes = []
    def hook(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
            if folder in os.fsdecode(arguments[0]):
                changes.append(event)
                if len(changes) == last:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    train.can_plot, train.check_memory = lambda: False, lambda *_: None  # both take time
    sys.argv = ["train.py", sys.argv[1], folder, *sys.argv[4:]]
    os._exit(train.main())

whole, killed = sys.argv[2:4]
assert run(whole, None) == 0
draw = random.Random(0)
kills = [run(killed, draw.randrange(1, 28)) for _ in range({KILLS})]
print(kills, run(killed, None))
"""


def test_run_that_is_killed_ten_times_equals_one_that_is_not(images, tmp_path):
    """The kills come before changes of files: while encoding, logging, saving and drawing."""
    flags = (
        *(*SMALL, "--lora-rank", 2, "--steps", 4, "--save-every", 2, "--sample-every", 2),
        *("--prompt", "a red circle", "--device", "cpu"),
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUNS, images, whole, killed, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=500
    )
    assert result.returncode == 0, result.stderr
    codes, last = json.loads(result.stdout.splitlines()[-1].replace("] ", "], ").join("[]"))
    assert last == 0 and codes.count(-signal.SIGKILL) >= 8 and set(codes) <= {0, -signal.SIGKILL}
    assert equal_runs(whole, killed)
    columns = ("step", "loss", "gradient", "rate")
    for ours, expected in zip(rows_of(killed), rows_of(whole), strict=True):
        assert [ours[name] for name in columns] == [expected[name] for name in columns]
    sheets = sorted((whole / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == [f"{step:06}.png" for step in (2, 4)]
    for sheet in sheets:
        assert (killed / "samples" / sheet.name).read_bytes() == sheet.read_bytes()
    for file in (whole / "cache").iterdir():
        assert equal_files(file, killed / "cache" / file.name)
    names = [{path.relative_to(run) for path in run.rglob("*")} for run in (whole, killed)]
    assert names[0] == names[1]  # nothing is left over


def test_ctrl_c_and_sigterm_finish_the_step_and_save(
    train, images, finished, tmp_path, monkeypatch
):
    update = Trainer.update
    signals = {0: signal.SIGINT, 2: signal.SIGTERM}  # in the first step and in the third

    def interrupted(self, losses):
        if self.step in signals:
            os.kill(os.getpid(), signals[self.step])
        return update(self, losses)

    monkeypatch.setattr(Trainer, "update", interrupted)
    for step, number in signals.items():
        before = signal.getsignal(number)
        code, out, err = train(images, tmp_path, *LORA)
        assert (code, out) == (128 + number, "")
        assert f"stopped at step {step + 1} and saved; repeat the command to resume" in err
        assert signal.getsignal(number) == before
    assert train(images, tmp_path, *LORA)[0] == 0
    assert equal_runs(tmp_path, finished)


def test_finished_run_is_not_trained_further(train, images, finished, monkeypatch):
    files = (finished / "checkpoint.safetensors", finished / "loss.csv")
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(Trainer, "update", None)
    assert train(images, finished, *LORA)[0] == 0
    assert [file.read_bytes() for file in files] == before


def test_other_settings_or_images_are_another_run(train, images, finished, tmp_path, monkeypatch):
    tensors = load_file(TOY)
    tensors["img_in.weight"] = tensors["img_in.weight"] * 2
    save_tensors(tmp_path / "other.safetensors", tensors)
    changes = [
        (("--lora-rank", 3), "`training` was a LoRA of rank 2 on * and is now a LoRA of rank 3"),
        (("--seed", 1), "--seed was 0 and is now 1"),
        (("--transformer", tmp_path / "other.safetensors"), "--transformer was "),
        (("--batch-size", 1), "--batch-size was 2 and is now 1"),
    ]
    for flags, message in changes:
        code, _, err = train(images, finished, *LORA, *flags)
        error = f"error: {finished / 'checkpoint.safetensors'}: belongs to another run: {message}"
        assert code == 2 and error in err
    draw(tmp_path / "0.png", 77)
    code, _, err = train(tmp_path, finished, *LORA)
    assert code == 2 and "belongs to another run: `images` was " in err


def test_steps_behind_the_checkpoint_are_refused(train, images, finished):
    before = (finished / "lora.safetensors").read_bytes()
    code, _, err = train(images, finished, *LORA, "--steps", 3)
    assert code == 2
    path = finished / "checkpoint.safetensors"
    assert f"--steps: must be at least 4, the step of {path} (got 3). Or use another" in err
    assert (finished / "lora.safetensors").read_bytes() == before


def test_second_training_in_a_folder_is_refused(train, images, finished, tmp_path):
    command = [sys.executable, "-c", LOCK, str(finished)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    files = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    code, out, err = train(images, finished, *LORA)
    assert (code, out) == (2, "")
    assert f"error: {finished}: another training is running in this folder. Wait until" in err
    assert files == {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert train(images, tmp_path / "other", *LORA, "--steps", 1)[0] == 0  # the cache is shared
    holder.kill()
    holder.wait()
    assert train(images, finished, *LORA)[0] == 0
    assert not list(finished.glob(".*lock"))


LOCK = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parents[1])!r})
from flux.atomic_files import exclusive_lock
with exclusive_lock(Path(sys.argv[1]) / "training"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_foreign_log_is_refused_and_kept(train, images, tmp_path):
    (tmp_path / "loss.csv").write_text("my,own,table\n1,2,3\n")
    code, _, err = train(images, tmp_path, *LORA)
    assert code == 2 and f"error: {tmp_path / 'loss.csv'}: is not the log of a run" in err
    assert (tmp_path / "loss.csv").read_text() == "my,own,table\n1,2,3\n"


@pytest.mark.parametrize("content", [None, b"", "half", "a pipe"])
def test_sheet_that_is_missing_or_broken_is_drawn_again(train, images, tmp_path, content):
    """A process may be killed between its checkpoint and its sheet."""
    flags = (*LORA, "--sample-every", 2, "--prompt", "a red circle")
    assert train(images, tmp_path, *flags, "--steps", 2)[0] == 0
    path = tmp_path / "samples" / "000002.png"
    with Image.open(path) as image:
        expected = np.asarray(image)
    (mark,) = verify(path)
    assert mark.holds and mark.text == "trainedAlgorithmicMedia, unsigned"
    whole = path.read_bytes()
    if content is None:
        path.unlink()
    elif content == "a pipe":  # for whose writer nobody waits
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    left = path.with_name(".000001.png.unfinished")
    left.mkdir()
    (left / "000001.png").write_bytes(whole)
    assert train(images, tmp_path, *flags, "--steps", 2)[0] == 0
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), expected)
    assert list(path.parent.iterdir()) == [path]
    inode = path.stat().st_ino
    assert train(images, tmp_path, *flags, "--steps", 2)[0] == 0
    assert path.stat().st_ino == inode  # a whole sheet stays


def test_quiet_training_prints_the_weights_alone(train, images, tmp_path):
    code, out, err = train(images, tmp_path / "run", *LORA, "--steps", 1, "--quiet")
    assert (code, err) == (0, "") and out.strip() == str(tmp_path / "run/lora.safetensors")
    code, _, err = train(images, tmp_path / "run", *LORA, "--steps", 0, "--quiet")
    assert code == 2 and err.startswith("error: --steps")


def test_steps_are_reported_without_a_terminal(train, images, tmp_path, monkeypatch):
    line = re.compile(r"^step (\d) of 3: loss \d\.\d{4}, [\d.]+ images a second$", re.M)
    monkeypatch.setattr(train.module, "LOG_EVERY", 2)
    monkeypatch.setattr(train.module, "LOG_SECONDS", 1e9)
    assert line.findall(train(images, tmp_path, *LORA, "--steps", 3)[2]) == ["2", "3"]
    monkeypatch.setattr(train.module, "LOG_EVERY", 100)
    monkeypatch.setattr(train.module, "LOG_SECONDS", 0)  # steps are slower than that
    assert line.findall(train(images, tmp_path / "slow", *LORA, "--steps", 3)[2]) == ["1", "2", "3"]


def test_names_of_files_are_shown_escaped(train, tmp_path):
    name = "a\x1b]0;owned\x07\u202e.png"
    write_metadata(tmp_path, {"image": name, "caption": "a"})
    code, _, err = train(tmp_path, tmp_path / "run", *LORA)
    assert code == 2 and "a\\x1b]0;owned\\x07\\u202e.png" in err
    assert not set("\x1b\x07\u202e") & set(err)


# The names in a checkpoint's config before the flags were renamed, and the flags of that time.
OLD_NAMES = {
    "images": "pictures",
    "batch_size": "--batch",
    "gradient_accumulation_steps": "--accumulate",
    "ema": "--ema",
    "guidance": "--guidance",
    "caption_dropout": "--drop-captions",
    "seed": "--seed",
    "dtype": "--dtype",
    "distill": "--distill",
    "train_at_guidance": "--guided",
    "guidance_range": "--guidance-range",
}
OLD_LORA = (
    *("--size", 64, "--batch", 2, "--warmup", 2, "--sample-every", 0, "--lr", 3e-3, "--ema", 0.9),
    *("--lora-rank", 2, "--accumulate", 2, "--steps", 4, "--save-every", 2),
)


def test_run_of_an_older_version_resumes(train, images, finished, tmp_path):
    """The names of flags, of the config and of the tensors are the older ones."""
    assert train(images, tmp_path, *OLD_LORA, "--steps", 2)[0] == 0
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    config = {OLD_NAMES.get(name, name): value for name, value in config.items()}
    assert config.keys() == {
        *("model", "transformer", "training", "pictures", "--batch", "--accumulate", "--ema"),
        *("--guidance", "--drop-captions", "--seed", "--dtype"),
    }
    assert config["--batch"] == "2" and config["training"] == "a LoRA of rank 2 on *"
    tensors = {name.replace("ema.", "average.", 1): x for name, x in load_file(path).items()}
    save_file(tensors, path, {"step": "2", "about": json.dumps(config)})
    code, _, err = train(images, tmp_path, *OLD_LORA)
    assert code == 0 and "resumed at step 2" in err, err
    # the steps of a shorter cosine were smaller, so only the names are compared
    assert load_file(path).keys() == load_file(finished / "checkpoint.safetensors").keys()


def test_old_flags_are_accepted_and_hidden(train):
    options, flags = sys.modules["modules.training_options"], sys.modules["modules.training_flags"]
    for old, new in flags.OLD_FLAGS.items():
        assert old in flags.parser("")._option_string_actions
        assert f"{old} " not in flags.parser("").format_help().replace(new, "")
    assert set(options.OLD_CONFIG_NAMES) == set(OLD_NAMES.values())
    assert options.OLD_CONFIG_NAMES == {old: new for new, old in OLD_NAMES.items()}


@pytest.mark.parametrize(
    "step, saved, advice",
    [
        (1, 0, "Use --dtype float32, or other weights: --lr has no part in the first step."),
        (2, 0, "Repeat the command with a smaller --lr."),
        (3, 2, "Use a smaller --lr in another folder: this checkpoint leads here at any --lr."),
        (4, 2, "Repeat the command with a smaller --lr to resume at step 2."),
    ],
)
def test_nan_stops_the_run_and_keeps_the_last_checkpoint(
    train, images, tmp_path, monkeypatch, step, saved, advice
):
    flow_loss, calls = loss.rectified_flow_loss, []

    def spoiled(*arguments):
        calls.append(arguments)
        # two losses a step
        return flow_loss(*arguments) * (float("nan") if len(calls) == 2 * step - 1 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(loss, "rectified_flow_loss", spoiled)
        code, out, err = train(images, tmp_path, *LORA)
    assert (code, out) == (1, "")
    error = f"error: step {step}: not finite (loss nan, norm of the gradient nan). "
    assert error + f"The run was stopped. {advice}" in err
    path = tmp_path / "checkpoint.safetensors"
    assert path.exists() == bool(saved)
    assert not saved or all(x.isfinite().all() for x in load_file(path).values())
    code, _, err = train(images, tmp_path, *LORA, "--lr", "1e-4")
    assert code == 0 and ("resumed at step 2" in err) == bool(saved)
    assert len(rows_of(tmp_path)) == 4


def test_weights_that_are_not_finite_are_not_saved(train, images, tmp_path, monkeypatch):
    def spoil(self, losses, update=Trainer.update):
        result = update(self, losses)
        if self.step == 4:
            next(iter(self.parameters.values())).data.fill_(float("inf"))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", spoil)
        code, out, err = train(images, tmp_path, *LORA)
    assert (code, out) == (1, "")
    assert "error: step 4: weights are not finite: model." in err
    assert err.endswith("Repeat the command with a smaller --lr to resume at step 2.\n")
    assert not (tmp_path / "lora.safetensors").exists()
    code, _, err = train(images, tmp_path, *LORA, "--lr", "1e-4")
    assert code == 0 and "resumed at step 2" in err


# -------------------------------------------------------------------------------- several processes

KINDS = {
    "all": ("--steps", "2"),
    "lora": ("--steps", "2", "--lora-rank", "2"),
    "bfloat16": ("--steps", "2", "--lora-rank", "2", "--dtype", "bfloat16"),
    "distilled": ("--steps", "2", "--distill", "flux.2-tiny"),
}
SHARED = (
    *("--size", "64", "--batch-size", "2", "--sample-every", "0"),
    *("--ema", "0.9", "--gradient-checkpointing", "--lr", "3e-3"),
)
SHARED_TOKENS = (*KINDS["all"], "--context", "2")  # which two processes share
PROGRAM = f"""
import runpy, sys
from flux.runtime import context_parallel, processes
from flux.training import distributed, log, memory
calls, joint = [], context_parallel.METHODS["allgather"]
context_parallel.METHODS["allgather"] = lambda *rest: calls.append(kind) or joint(*rest)
images, broken, runs, cache = sys.argv[1:]
log.can_plot = lambda: False  # both save time
memory.estimate_memory = lambda *_, **__: memory.TrainingMemory(0, 0, 0)
leave, processes.leave = processes.leave, lambda: None  # one group for all runs
codes = []
kinds = [*{KINDS!r}.items(), ("context", {SHARED_TOKENS!r}), ("broken", ("--lora-rank", "2"))]
for kind, flags in kinds:
    folder = broken if kind == "broken" else images
    sys.argv = ["train.py", folder, runs + kind, "--cache", cache, "--device", "cpu"]
    sys.argv += [*{SHARED!r}, *flags]
    try:
        runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
    except SystemExit as end:
        codes.append(end.code or 0)
    distributed.init = lambda device: device
leave()
assert set(calls) == {{"context"}}, calls
assert codes == [0] * {len(KINDS) + 1} + [2], codes
"""


@pytest.fixture(scope="module")
def two_processes(images, cache, tmp_path_factory):
    """Runs of all KINDS, and one of a broken image, by two processes: their folder and stderr."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "broken").mkdir()
    draw(folder / "broken" / "0.png", 0)
    content = (folder / "broken" / "0.png").read_bytes()
    (folder / "broken" / "0.png").write_bytes(content[:60])
    (folder / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", folder / "program.py"]
    arguments = [images, folder / "broken", f"{folder}/two-", cache]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    result = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stderr


def different(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> np.ndarray:
    """Return which numbers differ by more than a share of the largest.

    Some do: where a gradient is nearly zero, Adam's first steps are as large as anywhere.
    """
    ours, expected = ours.double(), expected.double()
    return ((ours - expected).abs() > tolerance * expected.abs().max()).flatten().numpy()


def test_two_processes_train_as_one(train, images, two_processes, tmp_path):
    """All weights, a LoRA, also on bfloat16 weights, a student, and shares of each image's tokens;
    one process resumes the run.
    """
    for kind, flags in [*KINDS.items(), ("context", ())]:
        # bfloat16 products of batches of another size are rounded differently
        loss_tol, norm_tol, tolerance = 2e-5, 1e-4, 5e-4
        if kind == "bfloat16":
            loss_tol, norm_tol, tolerance = 0.01, 0.03, 0.2
        one, two = tmp_path / kind, two_processes[0] / f"two-{kind}"
        if kind == "context":
            one = tmp_path / "all"
        else:
            assert train(images, one, *SHARED, *flags)[0] == 0
        for a, b in zip(rows_of(one), rows_of(two), strict=True):
            # a velocity of about 1 is rounded to 1e-7: a student's loss of 1e-4 to 1e-9
            assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=loss_tol, abs=1e-8)
            assert float(b["gradient"]) == pytest.approx(float(a["gradient"]), rel=norm_tol)
        exported = "lora.safetensors" if "--lora-rank" in flags else "transformer.safetensors"
        for name in ("checkpoint.safetensors", exported):
            a, b = load_file(one / name), load_file(two / name)
            assert a.keys() == b.keys()
            masks = [different(b[key], a[key], tolerance) for key in a]
            # at most 1 % of each tensor; in bfloat16 2 %, but 0.3 % of all numbers
            assert max(map(np.mean, masks)) <= (2e-2 if kind == "bfloat16" else 1e-2)
            assert kind != "bfloat16" or np.concatenate(masks).mean() <= 3e-3
        if kind in ("all", "bfloat16"):
            code, _, err = train(images, two, *SHARED, *flags, "--steps", 3)
            assert code == 0 and "resumed at step 2" in err


def test_two_processes_report_one_error(two_processes):
    """Only the first process encodes images; the other one does not wait forever."""
    _, err = two_processes
    assert err.count("0.png") == 1 and "damaged" in err
    assert not any(word in err for word in ("UserError", "Connection closed", "gloo"))


# -------------------------------------------------------------------------- references and channels


@pytest.fixture(scope="module")
def editors(tmp_path_factory):
    """Tiny models that read references, in a folder of weights."""
    folder = tmp_path_factory.mktemp("weights")
    rows = {"flux.2-klein-4b": "flux.2-klein-4b", "flux.1-kontext-dev": "flux.1-dev"}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        for name, like in rows.items():
            tiny = tiny_models(write_tokenizers(home(folder, name), name))[like]
            fields = ("transformer", "text", "text_length", "autoencoder")
            parts = {field: getattr(tiny, field) for field in fields}
            patch.setitem(MODELS, name, replace(MODELS[name], **parts))
            write_weights(home(folder, name), MODELS[name], networks(tiny))
        yield folder


def record_batches(monkeypatch) -> list[loss.Batch]:
    """Return a list to which every batch of `predict_velocity` is appended."""
    batches, predict_velocity = [], loss.predict_velocity

    def recorded(network, batch, *rest):
        batches.append(batch)
        return predict_velocity(network, batch, *rest)

    monkeypatch.setattr(loss, "predict_velocity", recorded)
    return batches


@pytest.mark.parametrize(
    "model, references, times",
    [
        ("flux.2-klein-4b", 2, {10, 20}),
        ("flux.1-kontext-dev", 1, {1}),
        ("flux.1-kontext-dev", 0, None),
    ],
)
def test_references_are_read_in_training(
    train, editors, tmp_path, monkeypatch, model, references, times
):
    folder = tmp_path / "edits"
    folder.mkdir()
    lines = []
    for number in range(2):
        names = []
        for k in range(1 + references):
            names.append(draw(folder / f"{number}-{k}.png", 10 * number + k).name)
        line = {"image": names[0], "caption": f"edit {number}"}
        lines.append(line | ({"references": names[1:]} if references else {}))
    write_metadata(folder, *lines)
    batches = record_batches(monkeypatch)
    flags = (
        *("--model", model, "--weights", editors, "--dtype", "float32", "--size", 64),
        *("--batch-size", 2, "--lora-rank", 2, "--steps", 1, "--lr", 1e-2, "--sample-every", 1),
    )
    code, out, err = train(folder, tmp_path / "run", *flags)
    assert code == 0, err
    if references:
        assert batches[-1].references.shape[:2] == (2, 16 * references)
        assert set(batches[-1].reference_ids[:, 0].tolist()) == times
    else:
        assert batches[-1].references is None
    with Image.open(tmp_path / "run" / "samples" / "000001.png") as sheet:
        assert sheet.size == (128, 64)
    flux.load(model, weights=editors, device="cpu", dtype=torch.float32).load_lora(out)


@pytest.fixture(scope="module")
def channel_models(tmp_path_factory):
    """Tiny Canny and Fill models, in a folder of weights."""
    folder = tmp_path_factory.mktemp("channels")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        for name, mask_channels in (("flux.1-canny-dev", 0), ("flux.1-fill-dev", 256)):
            tiny = tiny_models(write_tokenizers(home(folder, name), name))["flux.1-dev"]
            width = 2 * tiny.transformer.out_channels + mask_channels
            row = replace(
                MODELS[name],
                transformer=replace(tiny.transformer, in_channels=width),
                text=tiny.text,
                text_length=tiny.text_length,
                autoencoder=tiny.autoencoder,
                steps=2,
                size=64,
            )
            patch.setitem(MODELS, name, row)
            write_weights(home(folder, name), row, networks(row))
        yield folder


def channel_flags(model: str, folder: Path) -> tuple:
    weights = ("--model", model, "--weights", folder, "--dtype", "float32")
    return (*weights, *SMALL, "--lora-rank", 2, "--steps", 1)


@pytest.mark.parametrize("model", ["flux.1-canny-dev", "flux.1-fill-dev"])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "computed"])
def test_channels_equal_the_samplers(train, channel_models, tmp_path, monkeypatch, model, listed):
    """Listed in metadata.jsonl, or computed: edges of the image, or a random rectangle."""
    folder, lines, requests = tmp_path / "images", [], []
    folder.mkdir()
    kind = "mask" if model == "flux.1-fill-dev" else "control"
    for number in range(2):
        path = draw(folder / f"{number}.png", number)
        other = folder / f"{number}-other.png"
        Image.effect_noise((64, 64), 90).point(lambda grey: 255 * (grey > 128)).save(other)
        line = {"image": path.name, "caption": f"image {number}"}
        lines.append(line | ({kind: other.name} if listed else {}))
        image, extra = Image.open(path), Image.open(other)  # RGB, and grey
        if kind == "mask":
            mask = extra if listed else None
            mask = mask or dataset.random_rect_mask((64, 64), dataset.file_sha256(path))
            requests.append(flux.ImageInputs((image,), mask=mask))
        elif listed:
            requests.append(flux.ImageInputs((extra.convert("RGB"),)))
        else:
            requests.append(flux.ImageInputs((image,), preprocess_control=True))
    write_metadata(folder, *lines)
    batches = record_batches(monkeypatch)
    flags = channel_flags(model, channel_models)
    code, out, err = train(folder, tmp_path / "run", *flags, "--sample-every", 1)
    assert code == 0, err
    with Image.open(tmp_path / "run" / "samples" / "000001.png") as sheet:
        assert sheet.size == (128, 64)
    pipe = flux.load(model, weights=channel_models, device="cpu", dtype=torch.float32)
    pipe.load_lora(out)
    expected = [pipe.condition(request).channels[0] for request in requests]
    assert not torch.equal(*expected)
    for row in batches[-1].channels:
        assert min((row - channels).abs().max() for channels in expected) == 0
    more = ("--steps", 2, "--prompt", "another", "--sample-every", 1)
    code, _, err = train(folder, tmp_path / "run", *flags, *more)
    assert code == 0 and "resumed at step 1" in err


def test_unusable_channels_are_refused(train, channel_models, tmp_path):
    draw(tmp_path / "0.png", 0)
    Image.new("L", (80, 64)).save(tmp_path / "other.png")
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    rows = [
        (
            "flux.1-canny-dev",
            "mask",
            "other",
            "a mask, which flux.1-canny-dev does not read. Use f",
        ),
        ("flux.1-fill-dev", "control", "other", "a control, which flux.1-fill-dev does not read."),
        ("flux.1-canny-dev", "control", "other", "other.png: must have the size of "),
        ("flux.1-fill-dev", "mask", "other", "other.png: must have the size of "),
        ("flux.1-fill-dev", "mask", "black", "black.png: is all black"),
    ]
    for model, kind, name, message in rows:
        write_metadata(tmp_path, {"image": "0.png", "caption": "a", kind: f"{name}.png"})
        code, _, err = train(tmp_path, tmp_path / "run", *channel_flags(model, channel_models))
        assert code == 2 and message in err.splitlines()[-1]


@pytest.mark.usefixtures("estimated_memory")
def test_lora_of_a_quantized_file(train, images, tmp_path):
    """The LoRA learns, and the weights of the file stay quantized."""
    file = tmp_path / "fp8.safetensors"
    network = flux.load(device="cpu").transformer()
    quantize_(network, "fp8")
    save_tensors(file, network.state_dict())
    flags = (*SMALL, "--transformer", file, "--gradient-checkpointing", "--steps", 2)
    code, out, err = train(images, tmp_path / "run", *flags, "--lora-rank", 2)
    assert code == 0, err
    weights = float(re.search("weights ([0-9.e-]+)", err)[1])
    assert weights == pytest.approx(file.stat().st_size / 1e9, rel=0.1)
    pipe = flux.load(transformer=file, device="cpu")
    batch = random_batch(network)
    load_trained_lora(network, tmp_path / "run")
    before = velocity_of(pipe.transformer(), batch)
    pipe.load_lora(out)
    after = velocity_of(pipe.transformer(), batch)
    assert max_error(after, velocity_of(network, batch)) < 1e-5  # sums in another order
    assert max_error(after, before) > 1e-3
    code, _, err = train(images, tmp_path / "full", *flags)
    assert (
        code == 2 and f"{file}: is quantized" in err and "Or train a LoRA with --lora-rank" in err
    )


# ----------------------------------------------------------------------------------------- guidance


@pytest.fixture(scope="module")
def flux1(tmp_path_factory):
    """A tiny FLUX.1 [dev] in a folder of weights, and teacher.safetensors without guidance."""
    folder, name = tmp_path_factory.mktemp("flux.1"), "flux.1-dev"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        tiny = tiny_models(write_tokenizers(home(folder, name), name))[name]
        # the axes that are inferred from a file
        transformer = replace(tiny.transformer, axes_dim=(4, 14, 14))
        row = replace(tiny, transformer=transformer, size=64, steps=2)
        patch.setitem(MODELS, name, row)
        parts = networks(row)
        write_weights(home(folder, name), row, parts)
        tensors = parts["transformer"].state_dict()
        teacher = {key: x for key, x in tensors.items() if not key.startswith("guidance_in.")}
        save_tensors(folder / "teacher.safetensors", teacher)
        yield folder


def flux1_file(folder: Path) -> Path:
    return home(folder, "flux.1-dev") / MODELS["flux.1-dev"].transformer_file


def distill_flags(folder: Path, *flags) -> tuple:
    model = ("--model", "flux.1-dev", "--weights", folder)
    return (*model, "--distill", folder / "teacher.safetensors", *SMALL, *flags)


@pytest.mark.usefixtures("estimated_memory")
def test_student_is_distilled_resumed_and_guided(train, images, flux1, tmp_path, monkeypatch):
    flags = distill_flags(
        flux1, *("--dtype", "float32", "--steps", 3, "--sample-every", 3), *("--prompt", "a")
    )
    code, out, err = train(images, tmp_path / "full", *flags)
    assert (code, out) == (0, str(tmp_path / "full" / "transformer.safetensors")), err
    student, teacher = load_file(out), load_file(flux1 / "teacher.safetensors")
    assert {name for name in student if name not in teacher} == {
        f"guidance_in.{layer}.{kind}"
        for layer in ("in_layer", "out_layer")
        for kind in ("weight", "bias")
    }
    # float32 weights, and a gradient, two moments and an average; next to the teacher's weights
    count = sum(x.numel() for x in student.values())
    frozen = sum(x.numel() for x in teacher.values())
    weights, states = 4 * (count + frozen) / 1e9, 16 * count / 1e9
    assert f"weights {weights:.3g}, gradients and optimizer {states:.3g}" in err
    update = Trainer.update

    def interrupted(self, losses):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, losses)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        assert train(images, tmp_path / "parts", *flags)[0] == 128 + signal.SIGINT
    code, _, err = train(images, tmp_path / "parts", *flags)
    assert code == 0 and "resumed at step 2" in err
    for name in ("checkpoint.safetensors", "transformer.safetensors"):
        assert equal_files(tmp_path / "full" / name, tmp_path / "parts" / name)
    with Image.open(tmp_path / "parts" / "samples" / "000003.png") as sheet:
        assert sheet.size == (64, 64)
    options = dict(weights=flux1, device="cpu", dtype=torch.float32, transformer=out)
    pipe = flux.load("flux.1-dev", **options)
    weak, strong = (
        np.asarray(pipe("a red circle", guidance=guidance)[0]).astype(int) for guidance in (1, 5)
    )
    assert np.abs(weak - strong).max() > 3


def test_teacher_and_student_see_the_same_images(train, images, tmp_path, monkeypatch):
    """The teacher with and without captions, and the student with one guidance for each image."""
    calls, predict_velocity = [], loss.predict_velocity

    def recorded(network, batch, guidance, *rest):
        calls.append((network, batch, guidance, torch.is_grad_enabled()))
        return predict_velocity(network, batch, guidance, *rest)

    monkeypatch.setattr(loss, "predict_velocity", recorded)
    flags = (
        *("--distill", "flux.2-tiny", "--guidance-range", 2, 3, *SMALL, "--steps", 2),
        *("--caption-dropout", 0, "--sample-every", 2, "--prompt", "a red circle"),
    )
    code, out, err = train(images, tmp_path, *flags)
    assert code == 0, err
    scales = []
    for conditional, unconditional, student in (calls[:3], calls[3:]):
        assert conditional[0] is unconditional[0] and not conditional[0].config.guidance
        assert student[0].config.guidance
        assert [call[3] for call in (conditional, unconditional, student)] == [False, False, True]
        batch, uncaptioned = conditional[1], unconditional[1]
        assert student[1] is batch and uncaptioned.latents is batch.latents
        tokens = uncaptioned.features.tokens
        assert torch.equal(tokens[0], tokens[1])
        assert not torch.equal(batch.features.tokens[0], tokens[0])
        scales += student[2].tolist()
    assert len(set(scales)) == 4 and all(2 <= guidance <= 3 for guidance in scales)

    pipe, passes = flux.load("flux.2-tiny", transformer=out, device="cpu"), []
    hook = pipe.transformer().final_layer.register_forward_hook(lambda *_: passes.append(1))
    (expected,) = pipe("a red circle", 64, 64, seed=0)
    assert len(passes) == pipe.spec.steps  # one pass a step
    hook.remove()
    (toys,) = flux.load(device="cpu")("a red circle", 64, 64, seed=0)
    with Image.open(tmp_path / "samples" / "000002.png") as sheet:  # the student's
        pixels = np.asarray(sheet).astype(int)
    assert np.abs(pixels - np.asarray(expected)).max() <= 1
    assert np.abs(pixels - np.asarray(toys)).max() > 3


def test_student_starts_from_a_file(train, images, flux1, tmp_path):
    """With a learning rate of nearly nothing, the exported student equals the file."""
    start, flags = flux1_file(flux1), ("--dtype", "float32", "--steps", 1)
    more = ("--transformer", start, "--lr", 1e-12)
    code, out, err = train(images, tmp_path, *distill_flags(flux1, *flags, *more))
    assert code == 0, err
    before, after = load_file(start), load_file(out)
    assert before.keys() == after.keys()
    assert all(max_error(after[name], before[name]) < 1e-9 for name in before)
    code, _, err = train(images, tmp_path, *distill_flags(flux1, *flags))
    assert code == 2 and "belongs to another run: `student` was " in err


def test_train_at_guidance_uses_the_inference_guidance(train, images, flux1, tmp_path, monkeypatch):
    calls, predict_velocity = [], loss.predict_velocity

    def recorded(network, batch, guidance, *rest):
        calls.append((batch, guidance))
        return predict_velocity(network, batch, guidance, *rest)

    flags = (
        *("--model", "flux.1-dev", "--weights", flux1, "--dtype", "float32", *SMALL),
        *("--lora-rank", 2, "--steps", 1),
    )
    with monkeypatch.context() as patch:
        patch.setattr(loss, "predict_velocity", recorded)
        code, _, err = train(images, tmp_path / "run", *flags, "--train-at-guidance")
    assert code == 0, err
    (uncaptioned, one), (batch, guidance) = calls
    assert one == 1 and guidance.tolist() == [3.5, 3.5]  # FLUX.1 [dev]'s
    assert torch.equal(batch.latents, uncaptioned.latents)
    assert not torch.equal(batch.features.tokens, uncaptioned.features.tokens)
    assert torch.equal(uncaptioned.features.tokens[0], uncaptioned.features.tokens[1])

    # at guidance 1 the loss is the plain loss
    at_one = ("--train-at-guidance", "--guidance", 1)
    assert train(images, tmp_path / "one", *flags, *at_one)[0] == 0
    assert train(images, tmp_path / "plain", *flags)[0] == 0
    value, one, plain = (
        float(rows_of(tmp_path / name)[0]["loss"]) for name in ("run", "one", "plain")
    )
    assert one == pytest.approx(plain, rel=1e-5) and abs(value / plain - 1) > 0.01
    code, _, err = train(images, tmp_path / "one", *flags)
    assert code == 2
    assert "belongs to another run: --train-at-guidance was True and is now None" in err


# ---------------------------------------------------------------------------------------- bad input


def refused(train, images: Path, run: Path, flags: Sequence, message: str) -> None:
    """Check that a request ends with one line of error, exit code 2 and without a folder."""
    code, out, err = train(images, run, *flags)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and message in last, (flags, last)
    assert not run.exists()


DISTILL = ("--distill", "flux.2-tiny")
WRONG_REQUESTS = [
    (("--model", "flux.9"), "flux.9"),
    (("--seed", 2**64), "--seed: must be at most 2^63 - 1"),
    (
        ("--model", "flux.1-tiny", "--guidance", "nan"),
        "--guidance: must be from 0 to 100 (got nan)",
    ),
    (("--steps", 0), "--steps: must be at least 1 (got 0)"),
    (("--steps", 2**62), "--steps: must be at most 1,000,000,000 (got 4611686018427387904)"),
    (("--batch-size", 2**62), "--batch-size: must be at most 65,536 (got 4611686018427387904)"),
    (
        ("--gradient-accumulation-steps", 2**62),
        "--gradient-accumulation-steps: must be at most 65,536 (got 4611686018427387904)",
    ),
    (("--context", 2), "--context: must divide the number of processes, 1 (got 2)"),
    (("--lora-rank", 2**62), "--lora-rank: must be at most 1"),
    (("--lora-rank", 2**63), "--lora-rank: must be at most 2^63 - 1 (got 9223372036854775808)"),
    (("--save-every", 2**63), "--save-every: must be at most 2^63 - 1"),
    (("--sample-every", 2**63), "--sample-every: must be at most 2^63 - 1"),
    (("--batch-size", 65_536, "--lora-rank", 2), "not enough memory: training flux.2-tiny needs"),
    (("--warmup", -1), "--warmup: must be at least 0 (got -1)"),
    (("--target-modules", "*"), "Add --lora-rank"),
    (("--lora-rank", 2, "--target-modules", "nothing"), "--target-modules: nothing matches none"),
    (("--ema", 1), "--ema: must be between 0 and 1 (got 1)"),
    (("--lr", 3), "--lr: must be between 0 and 1 (got 3)"),
    (("--caption-dropout", 2), "--caption-dropout: must be from 0 to 1 (got 2)"),
    (("--size", 100), "--size: must be a multiple of 16 from 64 to 2048 (got 100)"),
    (("--guidance", 2), "--guidance: flux.2-tiny has no guidance embedding"),
    (("--device", "abacus"), "abacus"),
    ((*DISTILL, "--guidance-range", 5, 1), "--guidance-range: must be the lowest and the highest"),
    ((*DISTILL, "--guidance-range", 0, 1), "--guidance-range: must be the lowest and the highest"),
    ((*DISTILL, "--guidance-range", 1, "nan"), "--guidance-range: must be the lowest and the "),
    ((*DISTILL, "--guidance", 3), "--guidance: is one value"),
    ((*DISTILL, "--train-at-guidance"), "Leave --train-at-guidance out"),
    ((*DISTILL, "--lora-rank", 2), "Leave --lora-rank out"),
    ((*DISTILL, "--model", "flux.2-tiny"), "Leave --model flux.2-tiny out"),
    (("--distill", "flux.9"), "--distill: no model or file is called flux.9. Models: flux.1-sch"),
    (
        (*DISTILL, "--transformer", TOY),
        f"{TOY}: is not a student of flux.2-tiny: it has no guidance embedding",
    ),
    (("--guidance-range", 1, 5), "--guidance-range: needs --distill or --train-at-guidance"),
    (("--train-at-guidance",), "--train-at-guidance: flux.2-tiny has no guidance embedding"),
    (("--train-at-guidance", "--caption-dropout", 0.1), "Leave --caption-dropout out"),
]


@pytest.mark.usefixtures("estimated_memory")  # builds the network, with its LoRA
def test_wrong_requests_are_refused(train, images, tmp_path):
    for flags, message in WRONG_REQUESTS:
        refused(train, images, tmp_path / "run", flags, message)


def test_wrong_teachers_and_students_are_refused(train, images, flux1, tmp_path):
    start, dev = flux1_file(flux1), ("--model", "flux.1-dev", "--weights", flux1)
    other, fp8 = tmp_path / "other.safetensors", tmp_path / "fp8.safetensors"
    tensors = load_file(start)
    save_tensors(other, {k: x for k, x in tensors.items() if not k.startswith("single_blocks.2.")})
    quantized = randomise(Flux(MODELS["flux.1-dev"].transformer))
    quantize_(quantized, "fp8")
    save_tensors(fp8, quantized.state_dict())
    rows = [
        ((*dev, "--distill", start), f"--distill: {start} has a guidance embedding"),
        ((*dev, "--distill", TOY), "--distill"),
        (distill_flags(flux1, "--transformer", other), f"{other}: is not a student of "),
        (distill_flags(flux1, "--transformer", fp8), f"{fp8}: is quantized"),
        ((*dev, "--train-at-guidance", "--guidance", 0.5), "--guidance: must be at least 1 with"),
    ]
    for flags, message in rows:
        refused(train, images, tmp_path / "run", flags, message)


def test_broken_image_is_named_and_skipped_on_request(train, tmp_path):
    for number in range(3):
        draw(tmp_path / f"{number}.png", number)
    broken = tmp_path / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    code, _, err = train(tmp_path, tmp_path / "run", *LORA)
    assert code == 2 and f"error: {broken}" in err and "--skip-broken" in err
    code, _, err = train(tmp_path, tmp_path / "run", *LORA, "--steps", 1, "--skip-broken")
    assert code == 0 and f"note: left out: {broken}" in err and "2 images: 2 of 64x64" in err


def test_full_disk_is_not_reported_as_a_broken_image(train, images, tmp_path, monkeypatch):
    def full(path, *_, **__):
        raise WriteError(f"{path}: cannot be written")

    monkeypatch.setattr(dataset, "save_tensors", full)
    flags = ("--cache", tmp_path / "cache", "--skip-broken")
    code, _, err = train(images, tmp_path / "run", *LORA, *flags)
    assert code == 2 and "cannot be written" in err.splitlines()[-1]
    assert "left out" not in err and "--skip" not in err


def test_unusable_folders_are_refused(train, images, tmp_path):
    code, _, err = train(images, images / "." / "", *LORA)
    assert code == 2 and "holds the training images. Name another folder" in err
    (tmp_path / "file").write_text("")
    code, _, err = train(images, tmp_path / "file", *LORA)
    assert code == 2 and f"error: {tmp_path / 'file'}: " in err


def test_repeated_lines_of_metadata_count_repeatedly(train, tmp_path):
    draw(tmp_path / "a.png", 1)
    write_metadata(tmp_path, *[{"image": "a.png", "caption": "a"}] * 3)
    assert "3 images: 3 of 64x64" in train(tmp_path, tmp_path / "run", *LORA, "--steps", 1)[2]


def test_samples_show_the_trained_weights_with_little_memory(train, images, tmp_path, monkeypatch):
    """With little memory a pipeline drops the transformer to decode; a training run keeps it."""
    with monkeypatch.context() as patch:
        little, much = FreeMemory("cpu", 1.2e7), FreeMemory("cpu", 1e12)
        patch.setattr("flux.runtime.residency.available_memory", lambda device: little)
        patch.setattr("modules.training_options.available_memory", lambda device: much)
        steps = ("--lora-rank", 4, "--lr", 5e-2, "--warmup", 1, "--steps", 8, "--sample-every", 8)
        run = (tmp_path, "--size", 64, *steps, "--prompt", "a red circle")
        assert train(images, *run)[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "samples" / "000008.png")).astype(int)
    pipe = flux.load(device="cpu")
    (plain,) = pipe("a red circle", 64, 64)
    pipe.load_lora(tmp_path / "lora.safetensors")
    (trained,) = pipe("a red circle", 64, 64)
    errors = [np.abs(np.asarray(image).astype(int) - sheet).mean() for image in (plain, trained)]
    assert errors[1] < 1 < 10 < errors[0]


def test_non_finite_samples_do_not_stop_the_run(train, images, tmp_path, monkeypatch):
    def denoise(*_):
        raise NonFiniteError("the latents are not finite")

    monkeypatch.setattr("flux.sampling.denoise", denoise)
    code, _, err = train(images, tmp_path, *LORA, "--steps", 2, "--sample-every", 1)
    assert code == 0 and "note: no samples at step 1: latents are not finite" in err


def test_references_of_a_model_without_them_are_refused(train, tmp_path, flux1):
    draw(tmp_path / "0.png", 0)
    write_metadata(tmp_path, {"image": "0.png", "caption": "a", "references": ["0.png"]})
    code, _, err = train(tmp_path, tmp_path / "run", "--model", "flux.1-dev", "--weights", flux1)
    assert code == 2
    assert "has references, which cannot be used to train flux.1-dev. Use flux.1-kontext-dev" in err


@pytest.mark.usefixtures("estimated_memory")
def test_too_little_memory_lists_what_would_help(train, images, tmp_path, monkeypatch):
    free = FreeMemory("cpu", 1_000_000)
    monkeypatch.setattr("modules.training_options.available_memory", lambda device: free)
    code, _, err = train(images, tmp_path / "run", "--batch-size", 64)
    assert code == 2
    assert (
        "GB, and 0.001 GB are free. Use --gradient-checkpointing or a smaller --size or a smaller "
        "--batch-size or --lora-rank or --optimizer adamw8bit." in err
    )


@pytest.mark.usefixtures("estimated_memory")
def test_adamw8bit_takes_less_memory_and_resumes(train, images, tmp_path):
    flags = (*SMALL, "--optimizer", "adamw8bit", "--steps")
    code, _, err = train(images, tmp_path, *flags, 1)
    assert code == 0
    small = float(re.search("optimizer ([0-9.e-]+)", err)[1])
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert any(name.endswith(".absmax1") for name in kept)
    assert train(images, tmp_path, *flags, 2)[0] == 0
    code, _, err = train(images, tmp_path, *SMALL, "--steps", 3)
    large = float(re.search("optimizer ([0-9.e-]+)", err)[1])
    # a gradient, an average and two moments: 4 + 4 + 1 + 1 bytes instead of 16
    assert 0.6 < small / large < 0.65
    assert code == 2 and "was all weights, by adamw8bit and is now all weights" in err


def test_missing_bitsandbytes_is_reported(train, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    flags = (*SMALL, "--optimizer", "adamw8bit")
    refused(train, images, tmp_path / "run", flags, "--optimizer: adamw8bit needs bitsandbytes.")


def test_ctrl_c_while_encoding_keeps_the_cache(train, images, tmp_path, monkeypatch):
    def interrupted(*_):
        signal.default_int_handler(signal.SIGINT, None)

    monkeypatch.setattr(dataset.Cache, "features", interrupted)
    code, out, err = train(images, tmp_path, *LORA, "--cache", tmp_path / "cache")
    assert (code, out) == (130, "")
    assert "stopped; everything encoded and saved so far is kept" in err
    assert list((tmp_path / "cache").glob("latents-*"))


def test_addon_models_are_refused(train, images, tmp_path, monkeypatch):
    addons = {"flux.1-redux-dev": "an image encoder", "flux.1-canny-dev-lora": "a LoRA"}
    for model, addon in addons.items():
        transformer = SimpleNamespace(shapes=torch.nn.Identity())
        pipe = SimpleNamespace(spec=MODELS[model], transformer=transformer)
        monkeypatch.setattr(flux, "load", lambda *_, pipe=pipe, **__: pipe)
        code, _, err = train(images, tmp_path)
        assert code == 2
        assert f"{model} is flux.1-dev with {addon}, which cannot be trained here" in err
