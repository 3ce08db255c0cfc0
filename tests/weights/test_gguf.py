"""GGUF files are read like the `gguf` package, to the last bit; broken files are refused."""

import math
import os
import struct
import time
import tracemalloc
import warnings
from itertools import cycle
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantized_files import save_gguf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flux.errors import UserError
from flux.transformer import Flux, FluxConfig
from flux.weights.load import infer_config, init_empty, load_module
from flux.weights.quantization.gguf import (
    BLOCKS,
    NUMBERS,
    PLAIN,
    TYPES,
    GGUFLinear,
    decode,
    read_header,
    tensors,
)

FLOAT16_OFFSETS = {  # of the float16 numbers of a block, from ggml-common.h
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}


def random_blocks(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Return random bytes (rows, bytes per row) of type `kind`, with finite float16 numbers."""
    size = gguf.GGML_QUANT_SIZES[Type[kind]][1]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    raw[..., [position + 1 for position in FLOAT16_OFFSETS[kind]]] &= (
        0b10111111  # the exponent's first bit: not all are set
    )
    return raw.reshape(rows, blocks * size)


def oracle(raw: np.ndarray, kind: str) -> torch.Tensor:
    with np.errstate(
        invalid="ignore"
    ):  # infinity times zero, where a test makes the scales infinite
        return torch.from_numpy(gguf.dequantize(raw, Type[kind]).copy())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype == torch.float32 and torch.equal(
        one.view(torch.int32), other.view(torch.int32)
    )


def refusal(call, *arguments) -> str:
    """Return the message of a UserError; it must be one line that ends with a period."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_decoded_exactly(kind):
    raw = random_blocks(kind, 7, 3)
    expected = oracle(raw, kind)
    assert expected.isfinite().all() and expected.unique().numel() > 100
    assert same_bits(decode(torch.from_numpy(raw), kind, expected.shape), expected)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_byte_of_a_block_is_decoded_exactly(kind):
    """Block v has byte v at one place, zeros elsewhere, and scales of one."""
    size = gguf.GGML_QUANT_SIZES[Type[kind]][1]
    raw = np.zeros((size, 256, size), dtype=np.uint8)
    raw[..., [position + 1 for position in FLOAT16_OFFSETS[kind]]] = 0x3C  # 1.0 in float16
    for place in range(size):
        raw[place, :, place] = range(256)
    raw = raw.reshape(size, -1)
    expected, found = (
        oracle(raw, kind),
        decode(torch.from_numpy(raw), kind, (size, 256 * BLOCKS[kind].weights)),
    )
    finite = expected.isfinite()  # infinite scales are among them
    assert torch.equal(found.isfinite(), finite) and finite.float().mean() > 0.9
    assert same_bits(found[finite], expected[finite])


def test_block_sizes_and_type_numbers_equal_ggml():
    assert {kind: (block.weights, block.bytes) for kind, block in BLOCKS.items()} == {
        kind: gguf.GGML_QUANT_SIZES[Type[kind]] for kind in BLOCKS
    }
    assert {number: Type(number).name for number in TYPES} == TYPES
    assert set(TYPES.values()) == BLOCKS.keys() | PLAIN.keys()


@pytest.mark.parametrize("shape", [(64,), (3, 5, 32), (2, 32, 64)])
def test_tensors_with_1_2_or_3_dimensions_are_decoded(shape):
    weights = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    raw = gguf.quantize(weights, Type.Q8_0)
    assert same_bits(decode(torch.from_numpy(raw), "Q8_0", shape), oracle(raw, "Q8_0"))


# ---------------------------------------------------------------- linear


@pytest.mark.parametrize("kind", BLOCKS)
def test_linear_multiplies_with_the_decoded_weight(kind):
    bias = kind != "Q8_0"  # one type without
    in_features, out_features = 2 * BLOCKS[kind].weights, 6
    with torch.device("meta"):
        linear = GGUFLinear(in_features, out_features, bias, kind)
    raw = random_blocks(kind, out_features, 2)
    state = {"weight": torch.from_numpy(raw)} | (
        {"bias": torch.randn(out_features)} if bias else {}
    )
    linear.requires_grad_(False).load_state_dict(state, strict=True, assign=True)
    assert same_bits(linear.dequantize(), oracle(raw, kind))
    for dtype in (torch.float32, torch.bfloat16):
        linear.to(dtype)  # the bias, and not the bytes
        assert linear.weight.dtype == torch.uint8
        x = torch.randn(2, 5, in_features, dtype=dtype)
        expected = F.linear(
            x, oracle(raw, kind).to(dtype), state["bias"].to(dtype) if bias else None
        )
        with torch.inference_mode():
            assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("kind", ["Q5_1", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])  # every helper
def test_linear_compiles_without_a_graph_break(kind):
    linear = GGUFLinear(256, 4, False, kind).requires_grad_(False)
    linear.weight.copy_(torch.from_numpy(random_blocks(kind, 4, 256 // BLOCKS[kind].weights)))
    x = torch.randn(3, 256)
    torch.compiler.reset()
    with torch.inference_mode(), warnings.catch_warnings(action="error"):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), linear(x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_second_use_copies_no_constant_to_the_device(kind):
    """`lift_fresh` is what `torch.tensor(numbers)` does."""
    calls = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    raw = torch.from_numpy(random_blocks(kind, 2, 1))
    with torch.inference_mode():  # what is kept from there can be used outside
        first = decode(raw, kind, (2, BLOCKS[kind].weights))
    with Seen():
        assert same_bits(decode(raw, kind, (2, BLOCKS[kind].weights)), first)
    assert calls and torch.ops.aten.lift_fresh.default not in calls


def test_meta_linear_has_the_bytes_of_the_file():
    with torch.device("meta"):
        linear = GGUFLinear(512, 10, False, "Q4_K")
        assert linear(torch.empty(3, 512)).shape == (3, 10)
    assert linear.weight.nbytes == 10 * 2 * 144


# ---------------------------------------------------------------- files


def plain_arrays() -> dict[str, np.ndarray | tuple[np.ndarray, str]]:
    random = np.random.default_rng(1)
    numbers = {
        name: random.standard_normal(shape, dtype=np.float32)
        for name, shape in {"F32": (3, 5), "F16": (7,), "BF16": (2, 3, 4)}.items()
    }
    return {
        "model.diffusion_model.F32": numbers["F32"],
        "F16": numbers["F16"].astype(np.float16),
        "BF16": (gguf.quantize(numbers["BF16"], Type.BF16), "BF16"),
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A file with a tensor of each type, and one quantized vector."""
    arrays = plain_arrays() | {kind: (random_blocks(kind, 5, 2), kind) for kind in BLOCKS}
    arrays["vector"] = (gguf.quantize(np.arange(64, dtype=np.float32), Type.Q8_0), "Q8_0")
    return save_gguf(
        tmp_path_factory.mktemp("sound") / "x.gguf", arrays, string_a="text", array_a=["one", "two"]
    )


def test_header_equals_the_written_tensors(sound):
    infos, _ = read_header(sound)
    plain = {
        "model.diffusion_model.F32": ("F32", (3, 5)),
        "F16": ("F16", (7,)),
        "BF16": ("BF16", (2, 3, 4)),
    }
    quantised = {kind: (kind, (5, 2 * block.weights)) for kind, block in BLOCKS.items()} | {
        "vector": ("Q8_0", (64,))
    }
    assert {name: info[:2] for name, info in infos.items()} == plain | quantised
    assert all(info.name == name for name, info in infos.items())
    assert {info.file for info in infos.values()} == {sound}


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_tensors_equal_those_of_the_gguf_package(tmp_path, alignment):
    arrays = plain_arrays() | {kind: (random_blocks(kind, 5, 3), kind) for kind in BLOCKS}
    path = save_gguf(tmp_path / "x.gguf", arrays, alignment)
    infos, found = read_header(path)[0], tensors(path)
    reader = gguf.GGUFReader(path)
    assert list(found) == list(infos) == [tensor.name for tensor in reader.tensors] == list(arrays)
    for tensor in reader.tensors:
        assert infos[tensor.name].shape == tuple(map(int, tensor.shape))[::-1]
        assert (
            found[tensor.name].contiguous().view(torch.uint8).numpy().tobytes()
            == tensor.data.tobytes()
        )
        if infos[tensor.name].dtype in BLOCKS:
            whole = decode(found[tensor.name], infos[tensor.name].dtype, infos[tensor.name].shape)
            assert same_bits(whole, oracle(np.array(tensor.data), infos[tensor.name].dtype))
        else:
            assert found[tensor.name].dtype == PLAIN[infos[tensor.name].dtype]
            assert found[tensor.name].shape == infos[tensor.name].shape


def test_unquantized_tensors_equal_the_written_ones(sound):
    found, arrays = tensors(sound), plain_arrays()
    assert np.array_equal(
        found["model.diffusion_model.F32"].numpy(), arrays["model.diffusion_model.F32"]
    )
    assert np.array_equal(found["F16"].numpy(), arrays["F16"])
    assert torch.equal(found["BF16"].float(), oracle(arrays["BF16"][0], "BF16"))
    assert torch.equal(
        decode(found["vector"], "Q8_0", (64,)),
        oracle(gguf.quantize(np.arange(64, dtype="f4"), Type.Q8_0), "Q8_0"),
    )


def test_tensors_are_mapped_and_writes_do_not_reach_the_file(sound):
    before = sound.read_bytes()
    found = tensors(sound)
    addresses = [tensor.data_ptr() for tensor in found.values()]
    assert max(addresses) - min(addresses) < len(before)
    for tensor in found.values():
        tensor.zero_()
    assert sound.read_bytes() == before


def test_metadata_is_read_without_arrays(tmp_path):
    values = dict(
        uint8=7,
        int8=-7,
        uint16=65535,
        int16=-300,
        uint32=1 << 31,
        int32=-(1 << 30),
        float32=0.5,
        uint64=1 << 63,
        int64=-(1 << 62),
        float64=math.pi,
        bool=True,
        string="schön",
    )
    lists = dict(
        array_texts=["a", "bc", ""],
        array_numbers=[1, 2, 3],
        array_floats=[0.5, 1.5],
        array_truths=[True, False],
    )
    path = save_gguf(tmp_path / "x.gguf", plain_arrays(), **values, **lists)
    assert read_header(path)[1] == {"general.architecture": "flux"} | values
    assert tensors(path).keys() == plain_arrays().keys()


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    "flux2, prefix, plain", [(False, "", np.float32), (True, "model.diffusion_model.", np.float16)]
)
def test_quantized_transformer_equals_one_with_decoded_weights(tmp_path, flux2, prefix, plain):
    """Like city96's files: block matrices of mixed types, all else F32 or, in older files, F16."""
    family = (
        dict(theta=2000)
        if flux2
        else dict(vector_dim=24, bias=True, gated_mlp=False, shared_modulation=False, theta=10000)
    )
    axes = (8, 8, 8, 8) if flux2 else (4, 14, 14)
    sizes = dict(
        in_channels=64,
        out_channels=64,
        context_dim=48,
        hidden_size=64,
        num_heads=2,
        depth=1,
        depth_single=2,
    )
    config = FluxConfig(**sizes, axes_dim=axes, **family)
    reference, arrays, kinds = (
        Flux(config).requires_grad_(False).eval(),
        {},
        cycle(["Q8_0", "Q4_0", "Q5_1"]),
    )
    for name, tensor in reference.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape) / math.sqrt(tensor.shape[-1]))
        if "_blocks." in name and tensor.dim() == 2:
            kind = next(kinds)
            raw = gguf.quantize(tensor.numpy(), Type[kind])
            arrays[prefix + name] = raw, kind
            tensor.copy_(oracle(raw, kind))
        else:
            arrays[prefix + name] = tensor.numpy().astype(plain)
            tensor.copy_(torch.from_numpy(arrays[prefix + name]))
    path = save_gguf(tmp_path / "x.gguf", arrays)

    assert infer_config(path) == config
    with torch.device("meta"):
        model = Flux(config)
    load_module(model, [path], dtype=torch.float32)
    quantised = {
        f"{prefix}{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, GGUFLinear)
    }
    assert quantised == {name for name, array in arrays.items() if isinstance(array, tuple)}
    batch, length, text = 2, 6, 3
    inputs = dict(
        img=torch.randn(batch, length, 64),
        img_ids=torch.randint(0, 9, (length, len(axes))),
        txt=torch.randn(batch, text, 48),
        txt_ids=torch.randint(0, 9, (text, len(axes))),
        t=torch.rand(batch),
        guidance=torch.rand(batch),
        vector=None if flux2 else torch.randn(batch, 24),
    )
    with torch.inference_mode():
        assert torch.equal(model(**inputs), reference(**inputs))


# ---------------------------------------------------------------- broken files


def text(value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def header(
    *infos: bytes,
    values: tuple[bytes, ...] = (),
    version: int = 3,
    tensor_count=None,
    value_count=None,
) -> bytes:
    """Return a header, from ggml's docs/gguf.md, padded to 32 bytes."""
    counts = (
        len(infos) if tensor_count is None else tensor_count,
        len(values) if value_count is None else value_count,
    )
    content = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(infos)
    return content + bytes(-len(content) % 32)


def info(
    name: str | bytes = "a",
    shape=(2, 4),
    kind: int = 0,
    begin: int = 0,
    dimensions: int | None = None,
) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape[::-1], kind, begin)


def value(kind: int, content: bytes, key: str = "k") -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def alignment(number: int) -> bytes:
    return value(4, struct.pack("<I", number), "general.alignment")


def test_header_from_the_description_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    for version in (2, 3):
        path.write_bytes(
            header(info(), info("b", begin=32), values=(alignment(32),), version=version)
            + bytes(64)
        )
        assert {name: info[:2] for name, info in read_header(path)[0].items()} == {
            "a": ("F32", (2, 4)),
            "b": ("F32", (2, 4)),
        }
    path.write_bytes(
        header(info(shape=(3,)), info("b", shape=(3,), begin=32)) + bytes(32 + 12)
    )  # the last is not padded
    assert tensors(path)["b"].shape == (3,)
    path.write_bytes(header(info(shape=())) + struct.pack("<f", 2.5))
    assert tensors(path)["a"].shape == () and tensors(path)["a"] == 2.5


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "truncated"),
        (b"GGU", "truncated"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (header(info(), version=1) + bytes(32), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(info(), tensor_count=HUGE) + bytes(32), "download it again"),
        (header(info(), tensor_count=2) + bytes(32), "download it again"),
        (header(info(), info("b", begin=32), tensor_count=1) + bytes(64), "goes on after its end"),
        (header(info(), value_count=HUGE) + bytes(32), "download it again"),
        (header(tensor_count=HUGE), f"with {HUGE:,} tensors"),
        (
            header(info(), values=(value(8, struct.pack("<Q", 0), "a"),) * 2) + bytes(32),
            "value 'a' comes twice",
        ),
        (header(), "no tensors"),
        (header(struct.pack("<Q", HUGE) + b"a") + bytes(64), "truncated"),
        (header(struct.pack("<Q", 1 << 40) + b"a") + bytes(64), "truncated"),
        (header(info(dimensions=5)) + bytes(32), "has 5 dimensions"),
        (header(info(dimensions=0xFFFFFFFF)) + bytes(32), "has 4,294,967,295 dimensions"),
        (header(info(shape=(HUGE,) * 4)) + bytes(32), "truncated"),
        (header(info(shape=(1 << 40, 4))) + bytes(32), "truncated"),
        (header(info(shape=(0, HUGE))) + bytes(32), "whole blocks"),
        (
            header(info(shape=(2, 48), kind=8)) + bytes(128),
            "'a', Q8_0 of shape (2, 48), is not made of whole blocks",
        ),
        (header(info(shape=(), kind=8)) + bytes(64), "whole blocks"),
        (header(info(kind=18)) + bytes(32), "stores 'a' in ggml's type 18, which is not supported"),
        (header(info(kind=99)) + bytes(32), "stores 'a' in ggml's type 99, which is not supported"),
        (header(info(), info("b", begin=0)) + bytes(64), "'b' does not begin where"),
        (header(info(), info("b", begin=64)) + bytes(96), "'b' does not begin where"),
        (header(info(), info("b", begin=31)) + bytes(64), "'b' does not begin where"),
        (header(info(begin=HUGE)) + bytes(64), "'a' does not begin where"),
        (header(info(), info(begin=32)) + bytes(64), "'a' comes twice"),
        (header(info()) + bytes(31), "is truncated: 128 bytes expected, 127 found"),
        (header(info()) + bytes(33), "goes on after its end"),
        (header(info(), values=(alignment(0),)) + bytes(32), "alignment of 0"),
        (header(info(), values=(alignment(48),)) + bytes(32), "alignment of 48"),
        (header(info(), values=(alignment(1 << 31),)) + bytes(32), "truncated"),
        (
            header(info(), values=(value(8, text("x"), "general.alignment"),)) + bytes(32),
            "alignment of x",
        ),
        (
            header(info(), values=(value(9, struct.pack("<IQ", 4, 0), "general.alignment"),))
            + bytes(32),
            "alignment of None",
        ),
        (header(info(), values=(value(13, b""),)) + bytes(32), "value of type 13"),
        (
            header(info(), values=(value(9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0)),))
            + bytes(32),
            "value of type 9",
        ),
        (
            header(info(), values=(value(9, struct.pack("<IQ", 77, HUGE)),)) + bytes(32),
            "value of type 77",
        ),
        (header(info(), values=(value(9, struct.pack("<IQ", 4, HUGE)),)) + bytes(32), "truncated"),
        (header(info(), values=(value(9, struct.pack("<IQ", 8, HUGE)),)) + bytes(32), "truncated"),
        (header(info(), values=(value(8, struct.pack("<Q", HUGE)),)) + bytes(32), "truncated"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_broken_file_is_refused_in_one_sentence_and_little_memory(tmp_path, content, expected):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    message = refusal(read_header, path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert expected in message and message.startswith(str(path)) and len(message) < 300
    assert refusal(tensors, path) == message


def test_long_text_in_a_large_file_takes_little_memory(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(info(), values=(value(8, struct.pack("<Q", 1 << 35)),)))
    with path.open("r+b") as file:
        file.truncate(1 << 36)  # sparse: it takes no room either
    tracemalloc.start()
    assert "has no end within the first 100,000,000 bytes" in refusal(read_header, path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_long_array_of_numbers_is_skipped_at_once(tmp_path):
    path, count = tmp_path / "x.gguf", 90_000_000
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value(9, struct.pack("<IQ", 0, count))
    )
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + count)
    start = time.perf_counter()
    assert "holds no tensors" in refusal(read_header, path)
    assert time.perf_counter() - start < 10  # one by one, it would be a minute


def test_long_array_of_strings_is_refused_before_its_end(tmp_path):
    path, count = tmp_path / "x.gguf", 10_000_000
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value(9, struct.pack("<IQ", 8, count))
    )
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 8 * count)  # empty strings
    assert "more than 1,000,000 strings" in refusal(read_header, path)


def test_missing_file_and_folder_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device" in refusal(read_header, tmp_path / "pipe")
    assert "does not exist" in refusal(read_header, tmp_path / "none.gguf")
    assert "is a folder" in refusal(read_header, tmp_path)
    assert "cannot be read" in refusal(read_header, tmp_path / ("x" * 300))


def test_name_that_is_not_utf8_is_shown(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(info(b"\xff\n")) + bytes(32))
    assert read_header(path)[0].keys() == {"�\n"}
    path.write_bytes(header(info(b"\xff\n", kind=99)) + bytes(32))
    assert "'�\\n'" in refusal(read_header, path)


def test_scalar_types_have_the_sizes_of_the_specification():
    """Sizes in bytes, from ggml's docs/gguf.md."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    assert {kind: struct.calcsize("<" + code) for kind, code in NUMBERS.items()} == sizes


@settings(max_examples=150, deadline=2000)
@given(st.data())
def test_every_truncation_is_refused(sound, data):
    content = sound.read_bytes()
    padding = -(2 * 34) % 32  # after the last tensor, 64 weights in Q8_0; a file may lack it
    path = sound.with_name("cut.gguf")
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - padding - 1))])
    assert "truncated" in refusal(read_header, path)


@settings(max_examples=400, deadline=2000)
@given(st.data())
def test_damaged_bytes_are_refused_or_stay_local(sound, data):
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(
            st.integers(0, 40) | st.integers(0, 1200) | st.integers(0, len(content) - 1)
        )
        content[where] = data.draw(st.sampled_from([0, 1, 127, 255]) | st.integers(0, 255))
    path = sound.with_name("damaged.gguf")
    path.write_bytes(content)
    try:
        infos, _ = read_header(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        refusal(tensors, path)
        return
    for name, tensor in tensors(path).items():
        if infos[name].dtype in BLOCKS:
            assert decode(tensor, infos[name].dtype, infos[name].shape).shape == infos[name].shape


@settings(max_examples=200, deadline=2000)
@given(
    rest=st.binary(max_size=200), counts=st.tuples(*[st.integers(0, 3) | st.integers(0, HUGE)] * 2)
)
def test_random_bytes_are_refused(tmp_path_factory, rest, counts):
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest)
    refusal(read_header, path)


# ---------------------------------------------------------------- original shapes


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_matrix_in_another_shape_gets_its_own(tmp_path, kind):
    """ComfyUI-GGUF stores a matrix with rows of 64 in rows of 256; other arrays change nothing."""
    path, blocks = tmp_path / "x.gguf", kind in BLOCKS
    if blocks:
        raw = random_blocks(kind, 32, 256 // BLOCKS[kind].weights)
        expected = oracle(raw, kind)
    else:
        numbers = np.random.default_rng(0).standard_normal((32, 256), dtype=np.float32)
        raw = gguf.quantize(numbers, Type[kind])
        expected = oracle(raw, kind)
    vector = np.arange(5, dtype=np.float32)
    lists = {f"comfy.gguf.orig_shape.{name}": shape for name, shape in ORIGINAL.items()}
    writer = gguf.GGUFWriter(path, "flux")
    for key, value in lists.items():
        writer.add_array(key, value)
    writer.add_tensor("a.weight", raw, raw_dtype=Type[kind])
    writer.add_tensor("vector", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    infos, found = read_header(path)[0], tensors(path)
    assert infos["a.weight"].shape == (128, 64) and infos["vector"].shape == (5,)
    assert np.array_equal(found["vector"].numpy(), vector)
    if not blocks:
        assert torch.equal(found["a.weight"].float(), expected.view(128, 64))
        return
    assert same_bits(decode(found["a.weight"], kind, (128, 64)), expected.view(128, 64))
    module = init_empty(lambda: nn.ModuleDict({"a": nn.Linear(64, 128, bias=False)}))
    load_module(module, [path], ignore_keys=lambda name: name == "vector")
    assert isinstance(module["a"], GGUFLinear)
    assert same_bits(module["a"].dequantize(), expected.view(128, 64))
    table = init_empty(lambda: nn.ModuleDict({"a": nn.Embedding(128, 64)}))
    load_module(table, [path], ignore_keys=lambda name: name == "vector")
    ids = torch.tensor([[127, 0, 5]])
    assert same_bits(table["a"](ids), expected.view(128, 64)[ids])


ORIGINAL = {"a.weight": [128, 64], "vector": [5], "of.no.tensor": [1, 2]}


@pytest.mark.parametrize("shape", [[128, 65], [-128, -64], [0], [8192, 1, 1, 0], [1] * 40])
def test_impossible_original_shape_is_refused(tmp_path, shape):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("comfy.gguf.orig_shape.a", shape)
    writer.add_tensor("a", np.zeros((32, 256), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(read_header, path)
    assert "tensor 'a' of shape (32, 256) cannot have the comfy.gguf.orig_shape.*" in message
