"""Killed processes: no half-written file has a final name, and a second run mends everything.

Where a process is killed is drawn from a seed, the scenario's name and a number. Each scenario is
run without a kill first: killed and repeated runs must give the same files.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pytest
from fuzz.inputs import picture
from fuzz.kill import Ended, Kill, run
from fuzz.strict import read_safetensors
from PIL import Image

pytestmark = pytest.mark.slow

SMALL = "--width 64 --height 64 --steps 2 --seed 5".split()


@dataclass(frozen=True)
class Scenario:
    """A command that writes files below `out`, from those that `prepare` writes."""

    command: str
    kills: int
    after_kill: Callable[[Path, Path], str]  # folder, folder of the whole run -> what is wrong
    after_repeat: Callable[[Path, Path], str]  # likewise, when the command was repeated
    prepare: Callable[[Path], object] = lambda folder: None
    codes: tuple[int, ...] = (0,)  # of the repeated command


# ---------------------------------------------------------------- what files hold


def files(folder: Path) -> Iterator[str]:
    """Yield the files of a folder that have final names."""
    for path in sorted((folder / "out").rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and "/." not in name:
            yield name


def leftovers(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob(".*")]


def tensors(path: Path) -> dict:
    return read_safetensors(path)[0]


def same(path: Path, other: Path) -> bool:
    """Return whether two files hold the same; the safetensors library shuffles metadata."""
    if path.suffix == ".safetensors":
        return read_safetensors(path) == read_safetensors(other)
    return path.read_bytes() == other.read_bytes()


def all_same(folder: Path, whole: Path) -> str:
    """Every file with a final name is that of the whole run."""
    return ", ".join(
        f"{name} differs"
        for name in files(folder)
        if not (whole / name).exists() or not same(folder / name, whole / name)
    )


def missing(folder: Path, whole: Path) -> str:
    names = set(files(whole)) - set(files(folder))
    return ", ".join(f"{name} is missing" for name in names)


def complete(folder: Path, whole: Path) -> str:
    return all_same(folder, whole) or missing(folder, whole)


# ---------------------------------------------------------------- images


def seed_of(image: Path) -> int:
    with Image.open(image) as opened:
        return json.loads(opened.info["flux"])["seed"]


def contents_by_seed(folder: Path) -> dict[int, set[tuple[bytes, ...]]]:
    """Return, of each seed, the different contents of its image and latents."""
    found: dict[int, set[tuple[bytes, ...]]] = {}
    for name in files(folder):
        path = folder / name
        if path.suffix == ".png":
            latents = path.with_suffix(".safetensors")
            content = [path.read_bytes()]
            if latents.exists():
                content.append(tensors(latents)["latents"].data)
            found.setdefault(seed_of(path), set()).add(tuple(content))
    return found


def images_whole(folder: Path, whole: Path) -> str:
    """Every image and all latents are whole; only the last image may still lack its latents."""
    expected, lacking = contents_by_seed(whole), 0
    for seed, contents in contents_by_seed(folder).items():
        for content in contents:
            (sound,) = expected[seed]
            if content != sound[: len(content)]:
                return f"the image of seed {seed} differs"
            lacking += len(content) < len(sound)
    return "two images lack their latents" if lacking > 1 else ""


def images_complete(folder: Path, whole: Path) -> str:
    found = contents_by_seed(folder)
    for seed, contents in contents_by_seed(whole).items():
        if not contents <= found.get(seed, set()):
            return f"the image of seed {seed} is missing"
    return images_whole(folder, whole)


# ---------------------------------------------------------------- captures


@cache
def old_capture() -> bytes:
    """Return a capture without measured tolerances."""
    with tempfile.TemporaryDirectory() as folder:
        assert run(Path(folder), command_of(SCENARIOS["captures"])).code == 0
        return (Path(folder) / "out/a.safetensors").read_bytes()


def put_capture(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/a.safetensors").write_bytes(old_capture())


def old_or_new(folder: Path, whole: Path) -> str:
    """The capture is as before, or with all measurements."""
    content = (folder / "out/a.safetensors").read_bytes()
    known = old_capture(), (whole / "out/a.safetensors").read_bytes()
    return "" if content in known else "the capture is neither old nor new"


# ---------------------------------------------------------------- training


def write_images(folder: Path) -> None:
    (folder / "images").mkdir()
    for number in range(2):
        (folder / f"images/{number}.png").write_bytes(picture("PNG", number))
        (folder / f"images/{number}.txt").write_text("a red circle")


def csv_rows(path: Path) -> list[list[str]]:
    """Return the whole rows of loss.csv, without the columns that depend on the machine's speed."""
    *lines, _ = path.read_bytes().decode().split("\r\n")
    return [line.split(",")[:4] for line in lines]


def training_whole(folder: Path, whole: Path) -> str:
    """All files are those of the whole run; checkpoint and log may be those of an earlier step."""
    for name in files(folder):
        path, expected = folder / name, whole / name
        if not expected.exists():
            return f"{name} is no file of the run"
        if path.name == "checkpoint.safetensors":
            step, ours, theirs = read_safetensors(path)[1]["step"], tensors(path), tensors(expected)
            sound = ours.keys() == theirs.keys() if step == "2" else ours == theirs
        elif path.name == "loss.csv":
            rows = csv_rows(path)
            sound = rows == csv_rows(expected)[: len(rows)]
        else:
            sound = same(path, expected)
        if not sound:
            return f"{name} differs"
    return ""


def training_complete(folder: Path, whole: Path) -> str:
    if csv_rows(folder / "out/loss.csv") != csv_rows(whole / "out/loss.csv"):
        return "loss.csv differs"
    name = "out/checkpoint.safetensors"
    if tensors(folder / name) != tensors(whole / name):
        return f"{name} differs"
    return training_whole(folder, whole) or missing(folder, whole)


# ---------------------------------------------------------------- scenarios

PROMPT = "a red circle"
TRAIN = "--device cpu --size 64 --batch-size 2 --steps 4 --save-every 2 --sample-every 2"
SCENARIOS = {
    "images": Scenario(
        f"sample|{PROMPT}|--num-images|3|--save-latents|--output|out/x.png",
        10, images_whole, images_complete,
    ),
    "captures": Scenario(
        f"parity|capture|{PROMPT}|--only|step.*|--output|out/a.safetensors",
        6, all_same, complete, codes=(0, 2),
    ),
    "measured tolerances": Scenario(
        "parity|calibrate|out/a.safetensors|--precision|bfloat16",
        5, old_or_new, complete, put_capture,
    ),
    "kits": Scenario(
        "parity|golden-kit|--output|out/kit",
        6, all_same, complete, codes=(0, 2),
    ),
    "training": Scenario(
        f"train|images|out|--lora-rank|2|{TRAIN.replace(' ', '|')}",
        10, training_whole, training_complete, write_images,
    ),
}  # fmt: skip


def command_of(scenario: Scenario) -> list[str]:
    script, *arguments = scenario.command.split("|")
    runs = script == "sample" or arguments[0] in ("capture", "golden-kit")
    return [script, *arguments, *(SMALL if runs else ())]


def draw(random: Random, number: int, whole: Ended, sizes: list[int]) -> Kill:
    """Draw where to kill: in half of the cases, before a change of a file."""
    if number % 4 == 3:
        return Kill(seconds=random.uniform(0, whole.seconds))
    if number % 4 == 2:
        return Kill(byte=random.randrange(1, random.choice(sizes)))
    return Kill(change=random.randrange(1, whole.changes + 1))


def problem_after(scenario: Scenario, folder: Path, whole: Path) -> str:
    """Return what is wrong after a kill, or after the command was repeated; "" if nothing is."""
    if problem := scenario.after_kill(folder, whole):
        return problem
    again = run(folder, command_of(scenario))
    if again.code not in scenario.codes:
        return f"the second run ended with {again.code}: {again.output[-200:]}"
    if problem := scenario.after_repeat(folder, whole):
        return f"after the second run, {problem}"
    return ", ".join(f"{file} is left" for file in leftovers(folder))


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_run_leaves_whole_files_and_is_mended(name, tmp_path, request):
    scenario, seed = SCENARIOS[name], request.config.getoption("fuzz_seed")
    whole = tmp_path / "whole"
    whole.mkdir()
    scenario.prepare(whole)
    first = run(whole, command_of(scenario))
    assert first.code == 0 and first.changes > 3 and leftovers(whole) == []
    sizes = [(whole / file).stat().st_size for file in files(whole)]
    problems, killed = [], 0
    for number in range(scenario.kills):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        scenario.prepare(folder)
        kill = draw(Random(f"{seed} {name} {number}"), number, first, sizes)
        killed += run(folder, command_of(scenario), kill).code < 0
        if problem := problem_after(scenario, folder, whole):
            problems.append(f"kill {number} of seed {seed}, {kill}: {problem}")
        shutil.rmtree(folder)
    assert problems == []
    assert killed >= scenario.kills * 2 // 3, "most kills came too late"
