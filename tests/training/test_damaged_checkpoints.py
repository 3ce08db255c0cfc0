"""A checkpoint is what this run would save, in finite values, or one sentence.

The rule is tested on a table of tampered files: names, shapes, dtypes, values, metadata and bytes.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.training import RUN, equal, make_loss, make_trainer, state, take_steps
from support.weight_files import refusal
from torch import Tensor

from flux.errors import NonFiniteError
from flux.training.checkpoint import CHECKSUM
from flux.weights.files import read_header

Tensors = dict[str, Tensor]
Metadata = dict[str, str]
Change = Callable[[Tensors, Metadata], object]

STEP = 3
MOMENT, SQUARE = "optimizer.0.exp_avg", "optimizer.0.exp_avg_sq"
LACKS, HAS, OTHER = "it lacks {}", "it has '{}'", "has {} of another dtype or shape"
NO_STEP = "optimizer.0.step is not a step so far"
NO_CHECKPOINT, NOT_FINITE = "is not a checkpoint of a training run", "{} has values that are not f"


def drop(name: str) -> Change:
    return lambda tensors, _: tensors.pop(name)


def drop_all(prefix: str) -> Change:
    def change(tensors: Tensors, _) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


def put(name: str, edit: Callable[[Tensor], Tensor] = torch.clone, source: str = "") -> Change:
    """Set a tensor to an edited copy of itself, or of `source`."""

    def change(tensors: Tensors, _) -> None:
        tensors[name] = edit(tensors[source or name].clone())

    return change


def set_value(name: str, value: float) -> Change:
    def edit(x: Tensor) -> Tensor:
        x.view(-1)[-1] = value
        return x

    return put(name, edit)


def told(**values: str | None) -> Change:
    """Set texts of the metadata; None removes one."""

    def change(_, metadata: Metadata) -> None:
        metadata.update({name: value for name, value in values.items() if value is not None})
        for name in [name for name, value in values.items() if value is None]:
            del metadata[name]

    return change


def old_names(tensors: Tensors, metadata: Metadata) -> None:
    """Write one name of the average twice, as an older version and as this one."""
    tensors["average.0.weight"] = tensors["ema.0.weight"].clone()


WEIGHT = "model.0.weight"
CHANGES: dict[str, tuple[Change, str]] = {
    "a weight is missing": (drop(WEIGHT), LACKS.format(WEIGHT)),
    "all weights are missing": (drop_all("model."), LACKS.format("model.0.bias")),
    "an average is missing": (drop("ema.2.bias"), LACKS.format("ema.2.bias")),
    "all averages are missing": (drop_all("ema."), LACKS.format("ema.0.bias")),
    "a moment is missing": (drop(MOMENT), LACKS.format(MOMENT)),
    "an optimizer's step is missing": (drop("optimizer.3.step"), LACKS.format("optimizer.3.step")),
    "the optimizer is missing": (drop_all("optimizer."), LACKS.format("optimizer.0.exp_avg")),
    "everything is missing": (drop_all(""), LACKS.format("ema.0.bias")),
    "an unknown weight": (put("model.9.weight", source=WEIGHT), HAS.format("model.9.weight")),
    "an unknown average": (put("ema.9.weight", source=WEIGHT), HAS.format("ema.9.weight")),
    "an old average too": (old_names, LACKS.format("average.0.bias")),
    "an unknown prefix": (put("x", source=WEIGHT), HAS.format("x")),
    "an empty name": (put("", source=WEIGHT), HAS.format("")),
    "the state of no parameter": (
        put("optimizer.9999.exp_avg", source=MOMENT),
        HAS.format("optimizer.9999.exp_avg"),
    ),
    "the state of no number": (put("optimizer.x", source=MOMENT), HAS.format("optimizer.x")),
    "a negative number": (
        put("optimizer.-1.exp_avg", source=MOMENT),
        HAS.format("optimizer.-1.exp_avg"),
    ),
    "an unknown state": (
        put("optimizer.0.momentum_buffer", source=MOMENT),
        HAS.format("optimizer.0.momentum_buffer"),
    ),
    "a row that would be broadcast": (put(WEIGHT, lambda x: x[:1].clone()), OTHER.format(WEIGHT)),
    "a number that would be broadcast": (
        put(WEIGHT, lambda x: x[0, 0].clone()),
        OTHER.format(WEIGHT),
    ),
    "a matrix that is transposed": (put(WEIGHT, lambda x: x.T.contiguous()), OTHER.format(WEIGHT)),
    "a matrix without rows": (put(WEIGHT, lambda x: x[:0].clone()), OTHER.format(WEIGHT)),
    "a matrix of 16 dimensions": (
        put(WEIGHT, lambda x: x.view(*x.shape, *[1] * 14)),
        OTHER.format(WEIGHT),
    ),
    "a flat average": (put("ema.0.weight", torch.flatten), OTHER.format("ema.0.weight")),
    "a flat moment": (put(MOMENT, torch.flatten), OTHER.format(MOMENT)),
    "a moment of one number": (put(MOMENT, torch.mean), OTHER.format(MOMENT)),
    "a step of two numbers": (
        put("optimizer.0.step", lambda x: torch.stack([x, x])),
        OTHER.format("optimizer.0.step"),
    ),
    "integer weights": (put(WEIGHT, Tensor.long), OTHER.format(WEIGHT)),
    "bfloat16 weights": (put(WEIGHT, Tensor.bfloat16), OTHER.format(WEIGHT)),
    "float64 averages": (put("ema.0.weight", Tensor.double), OTHER.format("ema.0.weight")),
    "float16 moments": (put(SQUARE, Tensor.half), OTHER.format(SQUARE)),
    "float8 moments": (put(SQUARE, lambda x: x.to(torch.float8_e4m3fn)), OTHER.format(SQUARE)),
    "complex weights": (put(WEIGHT, lambda x: x.to(torch.complex64)), OTHER.format(WEIGHT)),
    "integer steps": (put("optimizer.0.step", Tensor.long), OTHER.format("optimizer.0.step")),
    "a weight of NaN": (set_value(WEIGHT, math.nan), NOT_FINITE.format(WEIGHT)),
    "an infinite weight": (set_value(WEIGHT, math.inf), NOT_FINITE.format(WEIGHT)),
    "an average of NaN": (set_value("ema.2.weight", math.nan), NOT_FINITE.format("ema.2.weight")),
    "a moment of NaN": (set_value(MOMENT, -math.inf), NOT_FINITE.format(MOMENT)),
    "a step of NaN": (
        set_value("optimizer.0.step", math.nan),
        NOT_FINITE.format("optimizer.0.step"),
    ),
    "a negative square": (set_value(SQUARE, -1), f"{SQUARE} has negative values"),
    "a negative step of the optimizer": (set_value("optimizer.0.step", -1), NO_STEP),
    "a later step of the optimizer": (set_value("optimizer.0.step", STEP + 1), NO_STEP),
    "step -5": (told(step="-5"), NO_CHECKPOINT),
    "step +3": (told(step="+3"), NO_CHECKPOINT),
    "step 3.0": (told(step="3.0"), NO_CHECKPOINT),
    "step in other digits": (told(step="\u0663"), NO_CHECKPOINT),
    "no step": (told(step=None), NO_CHECKPOINT),
    "step of 31 digits": (told(step=str(10**30)), NO_CHECKPOINT),
    "step of 5000 digits": (told(step="9" * 5000), NO_CHECKPOINT),
    "step 0 with the state of step 3": (told(step="0"), "it has 'optimizer.0.exp_avg'"),
    "step 1 with the state of step 3": (told(step="1"), NO_STEP),
    "seconds of NaN": (told(seconds="nan"), NO_CHECKPOINT),
    "infinite seconds": (told(seconds="inf"), NO_CHECKPOINT),
    "negative seconds": (told(seconds="-1"), NO_CHECKPOINT),
    "no number of seconds": (told(seconds="an hour"), NO_CHECKPOINT),
    "no config": (told(config=None), NO_CHECKPOINT),
    "config null": (told(config="null"), NO_CHECKPOINT),
    "config of a list": (told(config="[]"), NO_CHECKPOINT),
    "config of a text": (told(config='"a"'), NO_CHECKPOINT),
    "config of a number": (told(config="3"), NO_CHECKPOINT),
    "config without end": (told(config='{"model": "a"'), NO_CHECKPOINT),
    "config of deep lists": (told(config=100_000 * "["), NO_CHECKPOINT),
    "config with deep values": (
        told(config='{"model": ' + 100_000 * "[" + 100_000 * "]" + "}"),
        NO_CHECKPOINT,
    ),
    "config with a name twice": (
        told(config='{"model": "a", "batch_size": "3", "batch_size": "2"}'),
        NO_CHECKPOINT,
    ),
    "config of huge numbers": (told(config='{"model": ' + 5000 * "9" + "}"), NO_CHECKPOINT),
    "config with null": (told(config='{"model": null, "batch_size": "2"}'), NO_CHECKPOINT),
    "config with a list": (told(config='{"model": ["a"], "batch_size": "2"}'), NO_CHECKPOINT),
    "config without a name": (told(config='{"model": "a"}'), "`batch_size` was None and is now 2"),
    "config with another name": (
        told(config='{"model": "a", "batch_size": "2", "x": "1"}'),
        "`x` was 1 and is now None",
    ),
    "config of another run": (
        told(config='{"model": "b", "batch_size": "2"}'),
        "`model` was b and is now a",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The checkpoint of a run of three steps."""
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    trainer = make_trainer(path)
    take_steps(trainer, 0, STEP)
    trainer.save()
    return path


def refused_and_untouched(path: Path, **options) -> str:
    """Return the sentence; the parameters and the file must stay as they were."""
    before = path.read_bytes()
    message = refusal(make_trainer, path, **options)
    assert message.startswith(f"{path}"), message
    assert path.read_bytes() == before
    return message


@pytest.mark.parametrize("name", CHANGES)
def test_tampered_checkpoint_is_refused(saved, tmp_path, name):
    change, expected = CHANGES[name]
    tensors, metadata = load_file(saved), dict(read_header(saved)[1])
    del metadata[CHECKSUM]  # whoever tampers can write the checksum too
    change(tensors, metadata)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata)
    assert expected in refused_and_untouched(path)


def cut(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


REPLACED: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "empty": (lambda path, _: path.touch(), "is empty. "),
    "without end": (cut, "is truncated: at least [0-9,]+ bytes expected, [0-9,]+ found. "),
    "zeros": (lambda path, content: path.write_bytes(bytes(len(content))), "is not a safetensors "),
    "a pickle": (lambda path, _: torch.save({}, path), "is not a safetensors file: it is a zip or"),
    "a pipe": (lambda path, _: os.mkfifo(path), "is a pipe or a device, not a plain file. "),
    "endless": (lambda path, _: path.symlink_to("/dev/zero"), "is a pipe or a device, not a plain"),
    "a folder": (lambda path, _: path.mkdir(), "is a folder, not a plain file. "),
    "a broken link": (lambda path, _: path.symlink_to("nothing"), "does not exist. "),
    "a link to itself": (lambda path, _: path.symlink_to(path), "cannot be read (.*). "),
}


@pytest.mark.parametrize("replace, words", REPLACED.values(), ids=REPLACED)
def test_other_file_in_place_of_a_checkpoint_is_told(replace, words, saved, tmp_path):
    """A run wrote the file: there is nothing to download."""
    path = tmp_path / "x.safetensors"
    replace(path, saved.read_bytes())
    message = refusal(make_trainer, path)
    advice = "Put back a sound checkpoint, or use another folder."
    assert re.fullmatch(rf"{re.escape(str(path))}:? {words}.*", message)
    assert message.endswith(f". {advice}")
    assert not re.search("download|get it|Name a", message)


def test_whole_file_is_restored_and_its_table_is_not_vacuous(saved):
    """The same file, read and written again without a change, is restored."""
    tensors, metadata = load_file(saved), dict(read_header(saved)[1])
    save_file(tensors, saved.with_name("same.safetensors"), metadata)
    trainer = make_trainer(saved.with_name("same.safetensors"))
    assert trainer.step == trainer.saved_step == STEP
    assert equal(state(trainer), state(make_trainer(saved)))
    assert len(CHANGES) >= 60


def test_average_without_ema_and_the_reverse_are_refused(saved, tmp_path):
    assert "it has 'ema.0.bias'" in refused_and_untouched(saved, ema=None)
    plain = tmp_path / "x.safetensors"
    trainer = make_trainer(plain, ema=None)
    take_steps(trainer, 0, STEP)
    trainer.save()
    assert "it lacks ema.0.bias" in refused_and_untouched(plain)


def test_refused_checkpoint_leaves_the_module_alone(saved, tmp_path):
    tensors, metadata = load_file(saved), dict(read_header(saved)[1])
    tensors["optimizer.3.exp_avg"] += math.nan  # the last tensor that is read
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    trainer = make_trainer(tmp_path / "none.safetensors")
    before = state(trainer)
    trainer.path = tmp_path / "x.safetensors"
    assert "not finite" in refusal(trainer.restore)
    after = state(trainer)
    assert all(torch.equal(after[name], x) for name, x in before.items()) and trainer.step == 0


def test_other_finite_values_than_those_saved_are_refused(saved, tmp_path):
    tensors, metadata = load_file(saved), dict(read_header(saved)[1])
    path = tmp_path / "x.safetensors"
    save_file(tensors | {WEIGHT: tensors[WEIGHT] + 0.5}, path, metadata)
    assert "its tensors differ from its checksum" in refused_and_untouched(path)
    save_file(tensors, path, metadata | {CHECKSUM: 64 * "0"})
    assert "its tensors differ from its checksum" in refused_and_untouched(path)


@pytest.mark.parametrize("kind", ["flipped", "cut", "longer", "empty", "header", "text"])
def test_rotten_bytes_are_refused(saved, tmp_path, kind):
    content = bytearray(saved.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    if kind == "flipped":
        content[8 + length + 5] ^= 1
    elif kind == "cut":
        del content[-1:]
    elif kind == "longer":
        content += b"\0"
    elif kind == "empty":
        content.clear()
    elif kind == "header":
        content[20] ^= 255
    else:
        content[:] = b"not a checkpoint"
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused_and_untouched(path)


def test_duplicate_names_in_the_header_are_refused(saved, tmp_path):
    content = saved.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].decode().strip()
    name, entry = next(iter(json.loads(header).items()))
    first = json.dumps({name: entry})[1:-1]
    text = ("{" + first + "," + header[1:]).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    refused_and_untouched(path)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "broken link"])
def test_special_file_is_refused(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")  # of a disk that is not mounted, for example
    assert re.match(rf"{path}: (is a|does not exist)", refusal(make_trainer, path))


# ------------------------------------------------------------------------------- weights not finite


@pytest.mark.parametrize("where", ["weight", "average", "moment"])
def test_state_that_is_not_finite_is_not_saved(saved, tmp_path, where):
    path = tmp_path / "x.safetensors"
    path.write_bytes(saved.read_bytes())
    trainer = make_trainer(path)
    trainer.update([make_loss(trainer, 1)])
    parameter = trainer.parameters["2.bias"]
    spoiled = {
        "weight": parameter,
        "average": trainer.ema["2.bias"],
        "moment": trainer.optimizers[0].state[parameter]["exp_avg"],
    }
    with torch.no_grad():
        spoiled[where].fill_(math.inf)
    with pytest.raises(NonFiniteError, match="step 4: weights are not finite: .*2.bias|3.exp_avg"):
        trainer.save()
    assert trainer.saved_step == STEP and path.read_bytes() == saved.read_bytes()
    assert make_trainer(path).step == STEP


def test_older_checkpoint_has_no_checksum(saved, tmp_path):
    tensors, metadata = load_file(saved), dict(read_header(saved)[1])
    del metadata[CHECKSUM]
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    assert equal(state(make_trainer(tmp_path / "x.safetensors")), state(make_trainer(saved)))
    assert metadata["config"] == json.dumps({name: str(value) for name, value in RUN.items()})
