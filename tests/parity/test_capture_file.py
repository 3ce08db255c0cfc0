"""Capture files that are damaged, hostile, of other programs, or used by several processes.

Each wrong field must end in one sentence that names the file and the field.
"""

import copy
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux
from flux import sampling
from flux.errors import UserError
from flux.parity import replay, tolerances
from flux.parity.capture_file import KEY, Capture, Writer, amend, statistics
from flux.parity.capture_metadata import DTYPES, Rounding
from flux.parity.compare import compare, first_over

ROOT = Path(__file__).resolve().parents[2]
FULL, SLICE, PROBE, STATISTICS = "step.001/out", "a slice", "a probe", "only statistics"
RECIPE = {
    "model": "flux.1-tiny",
    "mode": "text",
    "prompt": "a cat",
    "negative_prompt": None,
    "width": 64,
    "height": 64,
    "steps": 2,
    "guidance": [3.5],
    "true_cfg_scale": None,
    "seed": 2**63 - 1,
    "images": None,
    "dtype": "float32",
    "numerics": "exact",
    "device": "cpu",
    "threads": 1,
    "attention": ["math"],
    "versions": {"torch": "2"},
    "files": {"transformer": [{"file": "a.safetensors", "size": 1, "sha256": "0"}]},
    "loras": [{"file": "b.safetensors", "size": 1, "sha256": "0", "scale": -0.5}],
    "schedule": [1.0, 0.5, 0],
    "stopped": "",
    "of a later version": {"x": [1, None, True]},
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> tuple[dict, dict[str, Tensor]]:
    """The document of a capture with every kind of record, and its stored tensors."""
    path = tmp_path_factory.mktemp("valid") / "a.safetensors"
    x = torch.randn(90, 50, generator=torch.Generator().manual_seed(0))
    with Writer(path, RECIPE) as writer:
        writer.add(FULL, x)
        writer.add("equal", x)
        writer.add(SLICE, x + 1, "slice")
        writer.add(PROBE, x + 2, "probe")
        writer.add(STATISTICS, x + 3, "statistics")
        writer.add("empty", torch.zeros(0, 4))
    tolerances.store_rounding(path, {"bfloat16": {FULL: Rounding(None, 0.25)}})
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY]), load_file(path)


def write(path: Path, document: object, tensors: dict[str, Tensor]) -> Path:
    text = document if isinstance(document, str) else json.dumps(document)
    save_file(tensors, path, {KEY: text})
    return path


def refusal(path: Path) -> str:
    """Return the error of reading a file and all its tensors: one sentence with the file's name."""
    with pytest.raises(UserError) as caught:
        capture = Capture(path)
        for name in capture.tensors:
            capture.tensors[name]
    text = str(caught.value)
    assert text.startswith(f"{path}: ") or text.startswith(f"{path} ")
    assert len(text) < 500 + len(str(path)) and "\n" not in text
    return text


def test_valid_capture_is_read(valid, tmp_path):
    document, tensors = valid
    read = Capture(write(tmp_path / "a.safetensors", document, tensors))
    assert read.recipe == RECIPE
    assert [read.kind(name) for name in read.names] == [
        "full",
        "full",
        "slice",
        "probe",
        "statistics",
        "full",
    ]
    assert read.rounding == {"bfloat16": {FULL: (None, 0.25)}}
    assert {name: tuple(x.shape) for name, x in read.tensors.items()} == {
        FULL: (90, 50),
        "equal": (90, 50),
        SLICE: (16, 16),
        PROBE: (4096,),
        "empty": (0, 4),
    }


# ---------------------------------------------------------------- fields

HUGE, DEEP = 10**4000, "deep"  # a number of 4,001 digits; a list in a list in a list ...
NOT_TEXT = (None, 1, [], {}, True)
NOT_COUNT = (None, -1, 1.5, "1", True, [], 2**63, HUGE)
NOT_NUMBER = ("1", [], {}, True, HUGE, float("nan"), float("inf"))
NOT_OBJECT = (None, 1, "x", [], True)
NOT_LIST = (1, "x", {}, True)
TENSOR = ("tensors", FULL)
FIELDS: dict[tuple, tuple] = {
    ("schema",): (None, 0, 3, "2", 2.0, True, [], HUGE),
    ("recipe",): NOT_OBJECT,
    ("tensors",): NOT_OBJECT,
    ("rounding",): NOT_OBJECT,
    TENSOR: NOT_OBJECT,
    (*TENSOR, "ordinal"): NOT_COUNT,
    (*TENSOR, "kind"): (None, 1, "Full", "all", [], {}, "statistic"),
    (*TENSOR, "dtype"): (None, 1, "float32", "F4", "U32", [], {}),
    (*TENSOR, "shape"): (None, 1, "9x5", {}, [-1], [1.0], [None], ["9"], [True], [[9]], [HUGE])
    + ([2**40, 2**40], [2**40, 0], [1] * 17),
    (*TENSOR, "sha256"): (None, 1, "0", "g" * 64, "A" * 64, "0" * 65, "0" * 64 + "\n", []),
    (*TENSOR, "same"): (1, [], {}, True),
    (*TENSOR, "budget"): (*NOT_NUMBER, -1e-9),
    (*TENSOR, "statistics"): (1, "x", [], True),
    (*TENSOR, "statistics", "nan"): NOT_COUNT,
    (*TENSOR, "statistics", "inf"): NOT_COUNT,
    (*TENSOR, "statistics", "min"): (None, *NOT_NUMBER),
    (*TENSOR, "statistics", "mean"): (None, *NOT_NUMBER),
    (*TENSOR, "statistics", "std"): (None, *NOT_NUMBER, -1),
    (*TENSOR, "statistics", "l2"): (None, *NOT_NUMBER, -1),
    (*TENSOR, "statistics", "histogram"): (None, *NOT_LIST, [], [1] * 31, [1.0] * 32, [-1] * 32),
    ("rounding", "bfloat16"): NOT_OBJECT,
    ("rounding", "bfloat16", FULL): (None, 1, {}, [], [1], [1, 2, 3], [1, -1], ["1", 1], [[], 1]),
    ("recipe", "model"): NOT_TEXT,
    ("recipe", "prompt"): NOT_TEXT,
    ("recipe", "negative_prompt"): NOT_TEXT[1:],
    ("recipe", "width"): (*NOT_COUNT, 0),
    ("recipe", "steps"): (*NOT_COUNT, 0),
    ("recipe", "seed"): NOT_COUNT,
    ("recipe", "guidance"): (3.5, "3.5", [], {}, [None], ["1"], [float("inf")], [HUGE]),
    ("recipe", "true_cfg_scale"): (*NOT_NUMBER, [None]),
    ("recipe", "images"): NOT_OBJECT[1:],
    ("recipe", "dtype"): (None, 3, "ones", "nothing", "float", "int64", "F32", [], {}),
    ("recipe", "numerics"): NOT_TEXT,
    ("recipe", "threads"): (*NOT_COUNT, 0),
    ("recipe", "attention"): (None, *NOT_LIST, [1]),
    ("recipe", "versions"): (*NOT_OBJECT, {"torch": 2}),
    ("recipe", "files"): (*NOT_OBJECT, {"t5": {}}, {"t5": ["a"]}, {"t5": [{"size": 1}]}),
    ("recipe", "loras"): (None, *NOT_LIST, ["a"], [{}], [{"file": "a", "scale": "1"}]),
    ("recipe", "schedule"): (None, *NOT_LIST, [], ["1"], [None], [float("nan")]),
    ("recipe", "stopped"): NOT_TEXT,
    ("recipe", "of a later version"): (HUGE, float("inf"), DEEP),
}
CASES = [(keys, value) for keys, values in FIELDS.items() for value in values]


@pytest.mark.parametrize(
    "keys, value", CASES, ids=[f"{'.'.join(keys)}={value!s:.20}" for keys, value in CASES]
)
def test_wrong_field_is_named(keys, value, valid, tmp_path):
    document, tensors = copy.deepcopy(valid[0]), valid[1]
    holder = document
    for key in keys[:-1]:
        holder = holder[key]
    if value is DEEP:
        value = 1
        for _ in range(100):
            value = [value]
    holder[keys[-1]] = value
    text = refusal(write(tmp_path / "a.safetensors", document, tensors))
    if not re.search("NaN|Infinity", json.dumps(value)):
        assert keys[-1] in text
        assert "got" in text or keys[-1] == "rounding"


@pytest.mark.parametrize(
    "keys, words",
    [
        (("schema",), "unknown schema .got None"),
        (("recipe",), "recipe must be an object .got None"),
        (("tensors",), "tensors must be an object .got None"),
        ((*TENSOR, "ordinal"), "tensor 'step.001/out' has no ordinal"),
        ((*TENSOR, "kind"), "tensor 'step.001/out' has no kind"),
        ((*TENSOR, "dtype"), "tensor 'step.001/out' has no dtype"),
        ((*TENSOR, "shape"), "tensor 'step.001/out' has no shape"),
        ((*TENSOR, "statistics", "nan"), "statistics of tensor 'step.001/out' has no nan"),
        (("tensors", PROBE, "statistics"), "tensor 'a probe' has no statistics"),
        (("tensors", STATISTICS, "statistics"), "tensor 'only statistics' has no statistics"),
        (("tensors", SLICE), "say nothing about tensor 'a slice'"),
        (("tensors", "equal", "same"), "tensor 'equal' is not in the file"),
    ],
    ids=str,
)
def test_missing_field_is_named(keys, words, valid, tmp_path):
    document, tensors = copy.deepcopy(valid[0]), valid[1]
    holder = document
    for key in keys[:-1]:
        holder = holder[key]
    del holder[keys[-1]]
    assert re.search(words, refusal(write(tmp_path / "a.safetensors", document, tensors)))


@pytest.mark.parametrize(
    "name, change, words",
    [
        (FULL, {"other": 1}, "has an unknown field 'other'"),
        (FULL, {"statistics": {"nan": 4500, "inf": 1}}, "of more values than the tensor has"),
        (FULL, {"statistics": {"nan": 0, "inf": 0, "x": 1}}, "has an unknown field 'x'"),
        (FULL, {"dtype": "I32"}, "is F32 of shape .90, 50. in the file, and I32"),
        (FULL, {"shape": [50, 90]}, r"is F32 of shape .90, 50. in the file, and F32 of shape .50"),
        (FULL, {"kind": "slice"}, r"'step.001/out' is F32 .* and F32 of shape .16, 16."),
        (FULL, {"kind": "probe"}, r"'step.001/out' is F32 .* and F32 of shape .4096,"),
        (FULL, {"same": "nothing"}, "tensor 'nothing' is not in the file"),
        ("equal", {"same": SLICE}, "'a slice' is F32 of shape .16, 16. in the file"),
        (SLICE, {"kind": "full"}, "'a slice' is F32 of shape .16, 16. in the file"),
        (SLICE, {"kind": "statistics"}, "say nothing about tensor 'a slice'"),
        (PROBE, {"shape": [0, 50]}, "is a probe of no values|more values than the tensor"),
        (PROBE, {"shape": [90, 2, 50]}, "'a probe/tokens' is F32 of shape .90,. in the file"),
        (STATISTICS, {"kind": "full"}, "tensor 'only statistics' is not in the file"),
    ],
    ids=str,
)
def test_contradiction_is_named(name, change, words, valid, tmp_path):
    document, tensors = copy.deepcopy(valid[0]), valid[1]
    document["tensors"][name] |= change
    assert re.search(words, refusal(write(tmp_path / "a.safetensors", document, tensors)))


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not a JSON text"),
        ("{", "not a JSON text"),
        ("null", "its metadata must be an object .got None"),
        ("[]", "its metadata must be an object .got"),
        ('"text"', "its metadata must be an object .got"),
        ("NaN", "has NaN, which is no number"),
        (
            '{"schema": 2, "recipe": {"x": -Infinity}, "tensors": {}}',
            "has -Infinity, which is no number",
        ),
        ("[" * 100_000 + "]" * 100_000, "not a JSON text .*too deep"),
        ("[" + 4_000_000 * "[]," + "[]]", "hold more than 8,000,000 values"),
        ('{"schema": ' + "1" * 5000 + "}", "not a JSON text .*4300 digits"),
        ('{"a": "' + 5_000_000 * "x" + '"}', "unknown schema"),  # long, as of many tensors
        ('{"schema": 2, "schema": 2, "recipe": {}, "tensors": {}}', "has the name '.*' twice"),
        ('{"schema": 2, "recipe": {"a": 1, "a": 1}, "tensors": {}}', "has the name '.*' twice"),
        (r'{"schema": 2, "recipe": {"\ud800": 1}, "tensors": {}}', "half of a surrogate"),
        (r'{"schema": 2, "recipe": {"prompt": "\udfff"}, "tensors": {}}', "half of a surrogate"),
        ('{"schema": 2, "recipe": {}, "tensors": {}}', "say nothing about tensor"),
        ('{"schema": 1, "recipe": {"pictures": null, "images": null}, "tensors": {}}', "older"),
    ],
    ids=lambda text: text[:40],
)
def test_text_that_is_no_document_is_refused(text, words, valid, tmp_path):
    assert re.search(words, refusal(write(tmp_path / "a.safetensors", text, valid[1])))


def test_whole_characters_in_two_halves_are_read(valid, tmp_path):
    document, tensors = copy.deepcopy(valid[0]), valid[1]
    document["recipe"]["prompt"] = "\U0001f600"
    assert r"\ud83d\ude00" in json.dumps(document)
    read = Capture(write(tmp_path / "a.safetensors", document, tensors))
    assert read.recipe["prompt"] == "\U0001f600"


# ---------------------------------------------------------------- bytes


def test_changed_values_are_refused_where_they_are_read(valid, tmp_path):
    """The metadata state the SHA-256 of each tensor; a copy of them proves nothing."""
    document, tensors = valid
    changed = tensors | {FULL: torch.zeros_like(tensors[FULL])}
    capture = Capture(write(tmp_path / "a.safetensors", document, changed))
    for name in (FULL, "equal"):  # both have the same bytes
        with pytest.raises(UserError, match=rf"tensor '{name}' has not the sha256"):
            capture.tensors[name]
    assert capture.tensors[SLICE].equal(tensors[SLICE])


def test_hash_is_that_of_the_stored_bytes(valid):
    document, tensors = valid
    stated = document["tensors"][FULL]["sha256"]
    assert stated == hashlib.sha256(tensors[FULL].numpy().tobytes()).hexdigest()


def test_tensor_without_a_stated_hash_is_read(valid, tmp_path):
    document, tensors = copy.deepcopy(valid[0]), valid[1]
    document["tensors"][FULL]["sha256"] = ""
    capture = Capture(write(tmp_path / "a.safetensors", document, tensors))
    assert capture.tensors[FULL].equal(tensors[FULL])


def safetensors(path: Path, header: str | dict, data: bytes) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"__metadata__": {"x": 1}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"__metadata__": null, "__metadata__": {}, '
        '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_header_that_safetensors_itself_refuses_is_refused(header, tmp_path):
    refusal(safetensors(tmp_path / "a.safetensors", header, bytes(4)))


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device", "folder"])
def test_file_that_never_ends_is_refused(kind, tmp_path):
    path = tmp_path / "a.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    refusal(path)


# ---------------------------------------------------------------- files of other programs

IDS = [[0, 1, 2], [30000, 40000, 65535]]
NUMBERS = {
    "U8": torch.tensor([[0, 1, 2], [3, 200, 255]], dtype=torch.uint8),
    "U16": torch.tensor(IDS, dtype=torch.uint16),
    "U32": torch.tensor([[0, 1, 2], [3, 4, 2**32 - 1]], dtype=torch.uint32),
    "U64": torch.tensor([[0, 1, 2], [3, 4, 2**63 - 1]], dtype=torch.uint64),
    "C64": torch.tensor([[1 + 2j, -3j], [0.5, 1e30]], dtype=torch.complex64),
    "F8_E8M0": torch.tensor([[0, 1, 127], [128, 253, 254]], dtype=torch.uint8).view(
        torch.float8_e8m0fnu
    ),
    "F8_E4M3": torch.tensor([[0, 0.5], [1, 448]]).to(torch.float8_e4m3fn),
    "F8_E5M2": torch.tensor([[0, 0.5], [1, 57344]]).to(torch.float8_e5m2),
    "BOOL": torch.tensor([[True, False]]),
    "I8": torch.tensor([[-128, 127]], dtype=torch.int8),
}


@pytest.mark.parametrize("dtype", NUMBERS)
def test_plain_file_of_any_dtype_is_compared_exactly(dtype, tmp_path):
    """The reference has the same numbers in a dtype that numpy computes in."""
    tensor = NUMBERS[dtype]
    save_file({"x": tensor}, tmp_path / "port.safetensors")
    port = Capture(tmp_path / "port.safetensors")
    values = torch.view_as_real(tensor) if dtype == "C64" else tensor
    values = values.float() if dtype.startswith("F8") else values
    expected = np.array(values.tolist(), dtype=np.float64)
    assert np.array_equal(port.tensors["x"].double().numpy(), expected)
    assert port.records["x"].dtype == DTYPES[port.tensors["x"].dtype]
    assert port.records["x"].shape == tuple(port.tensors["x"].shape)
    wide = torch.tensor(values.tolist(), dtype=torch.int64 if dtype[0] in "UI" else torch.float32)
    if dtype == "BOOL":
        wide = tensor
    with Writer(tmp_path / "truth.safetensors", {}) as writer:
        writer.add("x", wide)
        writer.add("x", tensor)  # the tensor itself can be recorded too
    truth = Capture(tmp_path / "truth.safetensors")
    assert first_over(compare(port, truth)) is None
    assert compare(port, truth)[0].errors.relative_l2 == 0
    assert truth.tensors["x~2"].double().equal(port.tensors["x"].double())
    turned = compare(replay.as_capture({"x": wide.flip(-1)}), port)
    assert first_over(turned) is not None


@pytest.mark.parametrize("dtype, size", [("F4", 1), ("F6_E2M3", 3), ("F8_E4M3FNUZ", 2)])
def test_dtype_that_torch_cannot_compute_in_is_named(dtype, size, tmp_path):
    shape = [size * 8 // {"F4": 4, "F6_E2M3": 6}.get(dtype, 8)]
    header = {"weird": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    text = refusal(safetensors(tmp_path / "a.safetensors", header, bytes(size)))
    assert f"tensor 'weird' has the dtype {dtype}, which cannot be compared. Save" in text


def test_numbers_beyond_int64_are_named(tmp_path):
    save_file({"ids": torch.tensor([2**63], dtype=torch.uint64)}, tmp_path / "a.safetensors")
    assert "tensor 'ids' of dtype U64 has numbers from 2^63 on" in refusal(
        tmp_path / "a.safetensors"
    )


def test_tensor_of_many_axes_is_named(tmp_path):
    header = {"x": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}}
    text = refusal(safetensors(tmp_path / "a.safetensors", header, bytes(4)))
    assert "tensor 'x'" in text


def test_statistics_that_overflow_are_left_out(tmp_path):
    x = torch.tensor([1.5e308, -1.5e308, 1.0], dtype=torch.float64)
    assert {"min", "max"} <= statistics(x).keys() and "l2" not in statistics(x)
    with Writer(tmp_path / "a.safetensors", {}) as writer:
        writer.add("x", x)
    assert Capture(tmp_path / "a.safetensors").tensors["x"].equal(x)


def test_recipe_without_a_request_cannot_be_replayed(valid, tmp_path):
    document, tensors = copy.deepcopy(valid[0]), valid[1]
    del document["recipe"]["seed"]
    capture = Capture(write(tmp_path / "a.safetensors", document, tensors))
    with pytest.raises(UserError, match=r"a\.safetensors: has no seed in its recipe"):
        replay.request_of(capture)


def test_recorded_noise_of_another_shape_is_named(tmp_path):
    pipe = flux.load("flux.1-tiny", device="cpu")
    with Writer(tmp_path / "a.safetensors", RECIPE) as writer:
        writer.add("noise", torch.zeros(1, 64, 4, 5))
    with replay.start_from_recorded(Capture(tmp_path / "a.safetensors"), pipe):
        with pytest.raises(UserError, match=r"noise has shape \(1, 64, 4, 5\) .*\(1, 64, 4, 4\)"):
            sampling.noise([0], 64, 4, 4, spatial=True)
        assert not sampling.noise([0], 64, 4, 5, spatial=True).any()


# ---------------------------------------------------------------- several processes


def python(code: str, *args: object) -> subprocess.Popen:
    """Start a process that runs `code`. Its output is a pipe."""
    imports = "import sys, time, torch\nfrom flux.parity.capture_file import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", imports + code, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


CAPTURE = """
with Writer(sys.argv[1], {}) as writer:
    writer.add("x", torch.full((1000, 100), 7.0))
    print("writing", flush=True)
    time.sleep(60)
"""


def test_second_capture_of_one_name_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with Writer(path, {}) as writer:
        with pytest.raises(UserError, match="another process is using this file"):
            Writer(path, {})
        writer.add("x", torch.ones(3))
    (tmp_path / ".a.safetensors.unfinished").mkdir()  # of a process that was killed at its end
    with pytest.raises(UserError, match="the file exists, and captures are never overwritten"):
        Writer(path, {})
    assert list(tmp_path.iterdir()) == [path]
    assert Capture(path).tensors["x"].equal(torch.ones(3))


@pytest.mark.slow
def test_second_capture_of_one_name_is_refused_and_a_killed_one_leaves_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    first = python(CAPTURE, path)
    try:
        assert first.stdout.readline() == "writing\n"
        with pytest.raises(UserError, match="another process is using this file"):
            Writer(path, {})
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
    assert not path.exists()
    assert next(tmp_path.glob(".*.unfinished")).is_dir()
    with Writer(path, {}) as writer:
        writer.add("x", torch.ones(3))
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
    assert Capture(path).tensors["x"].equal(torch.ones(3))


def test_capture_that_appears_during_another_is_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"a\.safetensors: exists already"):
        with Writer(path, {}) as writer:
            writer.add("x", torch.ones(3))
            path.write_bytes(b"of another program")
    assert path.read_bytes() == b"of another program"
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_header_tells_a_safetensors_reader_how_to_find_every_name(tmp_path):
    """The rule in the header is run as it stands there, before and after `amend`."""
    path = tmp_path / "a.safetensors"
    x = torch.arange(3.0)
    with Writer(path, {}) as writer:
        for name in ("first", "second"):
            writer.add(name, x)
    for _ in range(2):
        with safe_open(path, "pt") as file:
            assert file.keys() == ["first"]
            found = {"json": json, "file": file, "name": "second"}
            exec(file.metadata()["read"], found)
            assert found["x"].equal(x) and list(found["tensors"]) == ["first", "second"]
        tolerances.store_rounding(path, {"bfloat16": {"second": Rounding(None, 0.1)}})


def numbered(path: Path) -> Path:
    with Writer(path, {}, reserve=0) as writer:
        for number in range(40):
            writer.add(f"x.{number}", torch.full((3,), float(number)))
    return path


def store_number(path: Path | str, number: int) -> None:
    rounding = {f"x.{number}": Rounding(None, number / 10)}
    tolerances.store_rounding(path, {"bfloat16": rounding})


def has_rounding_of_each(path: Path) -> bool:
    read = Capture(path)
    assert all(float(x[0]) == n for n, x in enumerate(read.tensors.values()))
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    stored = read.rounding["bfloat16"]
    return {name: stored[name] for name in read.names} == {
        f"x.{n}": (None, n / 10) for n in range(40)
    }


def test_tolerances_stored_at_the_same_time_are_all_kept(tmp_path):
    path = numbered(tmp_path / "a.safetensors")

    def store(start: int) -> None:
        for number in range(start, 40, 4):
            store_number(path, number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(store, range(4)))
    assert has_rounding_of_each(path)


@pytest.mark.slow
def test_tolerances_of_several_processes_are_all_kept(tmp_path):
    path = numbered(tmp_path / "a.safetensors")
    code = """
from flux.parity import tolerances
for number in range(int(sys.argv[2]), 40, 4):
    tolerances.store_rounding(
        sys.argv[1], {"bfloat16": {f"x.{number}": tolerances.Rounding(None, number / 10)}}
    )
"""
    for process in [python(code, path, start) for start in range(4)]:
        assert process.communicate()[1] == ""
    assert has_rounding_of_each(path)


@pytest.mark.parametrize("distance", [float("nan"), float("inf"), -1.0, "1"])
def test_rounding_that_could_not_be_read_is_not_stored(distance, valid, tmp_path):
    path = write(tmp_path / "a.safetensors", *valid)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"'step\.001/out' in 'bfloat16' of rounding must be"):
        tolerances.store_rounding(path, {"bfloat16": {FULL: Rounding(None, distance)}})
    with pytest.raises(UserError, match="has no tensor unknown to store rounding for"):
        tolerances.store_rounding(path, {"bfloat16": {"unknown": Rounding(None, 1.0)}})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_capture_of_schema_1_takes_no_tolerances(valid, tmp_path):
    document = valid[0] | {"schema": 1}
    path = write(tmp_path / "a.safetensors", document, valid[1])
    with pytest.raises(UserError, match="captured by an older version and cannot store"):
        amend(path, lambda document: None)
