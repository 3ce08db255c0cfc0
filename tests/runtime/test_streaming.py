"""flux.runtime.streaming on the CPU, where copies are immediate: streaming changes no bit.

Buffers are filled with NaN when their block leaves, so a block that computes with another block's
weights, or too late, is seen in the result.
"""

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.parity.reference import FLUX1_TINY, KLEIN_TINY, TINY_QWEN, TINY_T5, randomise
from flux.runtime import streaming
from flux.runtime.streaming import (
    PrefetchRing,
    StreamedModuleList,
    all_tensors,
    choose_resident,
    end_of,
    stream,
    unstream,
)
from flux.t5 import T5
from flux.transformer import Flux, FluxConfig

FLUX_LISTS = ("double_blocks", "single_blocks")
either_family = pytest.mark.parametrize(
    "config", [FLUX1_TINY, KLEIN_TINY], ids=["flux.1", "flux.2"]
)


@pytest.fixture(autouse=True)
def stream_small_tensors_too(monkeypatch):
    monkeypatch.setattr(streaming, "MIN_STREAMED", 0)


@pytest.fixture(autouse=True)
def overwrite_released_buffers(monkeypatch):
    """Leave NaN, in any float type, in the buffer that a block leaves."""
    release = PrefetchRing._release

    @torch.inference_mode()
    def overwrite(self: PrefetchRing) -> None:
        buffer = self.current
        release(self)
        if buffer is not None:
            buffer.memory.fill_(0xFF)

    monkeypatch.setattr(PrefetchRing, "_release", overwrite)


def frozen(module: nn.Module) -> nn.Module:
    return randomise(module).requires_grad_(False).eval()


def streamed(module: nn.Module, lists=FLUX_LISTS, resident: int = 0) -> nn.Module:
    return stream(deepcopy(module), lists, "cpu", resident=resident)


def flux_inputs(config: FluxConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    axes = len(config.axes_dim)
    inputs = dict(
        img=torch.randn(2, 12, config.in_channels, dtype=dtype),
        txt=torch.randn(2, 5, config.context_dim, dtype=dtype),
        img_ids=torch.randint(0, 9, (12, axes)),
        txt_ids=torch.zeros(5, axes, dtype=torch.long),
        t=torch.tensor([0.9, 0.3]),
    )
    if config.guidance:
        inputs["guidance"] = torch.tensor([3.5, 2.5])
    if config.vector_dim is not None:
        inputs["vector"] = torch.randn(2, config.vector_dim, dtype=dtype)
    return inputs


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in all_tensors(module))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    return [block for path in FLUX_LISTS for block in module.get_submodule(path).children()]


def ring_of(module: nn.Module) -> PrefetchRing:
    return next(part.ring for part in module.modules() if isinstance(part, StreamedModuleList))


def addresses(module: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}


def in_buffer(block: nn.Module, ring: PrefetchRing) -> bool:
    """Return whether the weights of a block are in a buffer; either all are, or none."""
    inside = []
    for tensor in all_tensors(block):
        starts = [buffer.memory.data_ptr() for buffer in ring.buffers]
        size = ring.buffers[0].memory.nbytes
        inside.append(any(start <= tensor.data_ptr() < start + size for start in starts))
    assert all(inside) or not any(inside)
    return all(inside)


# ------------------------------------------------------------------ exactness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["streamed", "half resident", "resident"])
@either_family
@torch.inference_mode()
def test_streamed_transformer_equals_resident_transformer(config, share, dtype):
    """Three steps, equal to the bit; each block is on the device during its own turn only."""
    resident, inputs = frozen(Flux(config)).to(dtype), flux_inputs(config, dtype)
    budget = int(share * sum(nbytes(block) for block in blocks_of(resident)))
    ours = streamed(resident, resident=budget)
    for t in (0.9, 0.5, 0.1):
        inputs["t"] = torch.tensor([t, 1 - t])
        assert torch.equal(ours(**inputs), resident(**inputs))
    assert (len(ring_of(ours).buffers) == 0) == (share == 1)


@either_family
@pytest.mark.parametrize("share", [0.5, 1])
@torch.inference_mode()
def test_blocks_that_stay_pinned_are_copied_from_the_host_once(config, share):
    """Three steps, equal to the bit. From the first step on, their pinned copies are read."""
    resident, inputs = frozen(Flux(config)), flux_inputs(config)
    ours = streamed(resident)
    needed = sum(1 << (end - 1).bit_length() for end in map(end_of, ring_of(ours).slices.values()))
    unstream(ours, FLUX_LISTS)
    ours = stream(ours, FLUX_LISTS, "cpu", pinned=int(share * needed))
    ring, expected = ring_of(ours), resident(**inputs)
    assert (len(ring.kept) == len(ring.slices)) == (share == 1) and ring.kept
    assert set(ring.kept.values()) == {None}  # pinned when they are used, not before
    for _ in range(3):
        assert torch.equal(ours(**inputs), expected)
    kept = [memory for memory in ring.kept.values() if memory is not None]
    assert len(kept) == len(ring.kept)
    assert sum(1 << (len(memory) - 1).bit_length() for memory in kept) <= share * needed
    saved = [memory.clone() for memory in kept]
    for memory in kept:
        memory.fill_(0xFF)
    for buffer in ring.buffers:  # else a block may still be in one
        buffer.block = None
    assert not torch.equal(ours(**inputs), expected)
    for memory, before in zip(kept, saved, strict=True):
        memory.copy_(before)
    for buffer in ring.buffers:
        buffer.block = None
    assert torch.equal(ours(**inputs), expected)


@torch.inference_mode()
def test_blocks_pass_through_the_shared_memory_where_no_more_can_be_pinned(monkeypatch):
    resident, inputs = frozen(Flux(KLEIN_TINY)), flux_inputs(KLEIN_TINY)
    ours = stream(deepcopy(resident), FLUX_LISTS, "cpu", pinned=2**40)
    ring, allocate, calls = ring_of(ours), streaming.pinned_memory, []

    def limited(size: int, device: torch.device) -> Tensor:
        calls.append(size)
        if len(calls) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return allocate(size, device)

    monkeypatch.setattr(streaming, "pinned_memory", limited)
    for _ in range(3):
        assert torch.equal(ours(**inputs), resident(**inputs))
    assert len(ring.kept) == 2 and len(calls) == 3 and len(ring.slices) > 3


def test_half_of_the_free_memory_is_pinned_for_a_gpu(monkeypatch):
    monkeypatch.setattr(streaming, "free_memory", lambda device: 21.0)
    assert streaming.pinned_budget(torch.device("cuda:1")) == 10
    assert streaming.pinned_budget(torch.device("cpu")) == 0


@torch.inference_mode()
def test_streamed_language_model_equals_resident_model():
    resident = frozen(LanguageModel(TINY_QWEN))
    ids = torch.randint(0, TINY_QWEN.vocab_size, (2, 10))
    mask = torch.arange(10) < torch.tensor([10, 4])[:, None]
    assert torch.equal(streamed(resident, ["layers"])(ids, mask), resident(ids, mask))


@torch.inference_mode()
def test_streamed_t5_keeps_its_position_table_on_the_device(monkeypatch):
    """All blocks read the table of the first block, which is too small to be streamed."""
    resident, ids = frozen(T5(TINY_T5)), torch.randint(0, TINY_T5.vocab_size, (2, 10))
    table = resident.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    monkeypatch.setattr(streaming, "MIN_STREAMED", table.nbytes + 1)
    ours = streamed(resident, ["encoder.block"])
    assert torch.equal(ours(ids), resident(ids))
    first = ours.encoder.block[0]
    parts = {id(part.tensor) for part in ring_of(ours).slices[first]}
    stays = {name for name, tensor in first.named_parameters() if id(tensor) not in parts}
    assert stays == {
        "layer.0.SelfAttention.relative_attention_bias.weight",
        "layer.0.layer_norm.weight",
        "layer.1.layer_norm.weight",
    }


class Rows(nn.Module):
    """A quantized layer: one-byte weights in a buffer, scales in float32, a bfloat16 bias."""

    def __init__(self, dtype: torch.dtype, size: int):
        super().__init__()
        codes = torch.randint(0, 100, (size, size), dtype=torch.uint8)  # finite as float8
        self.register_buffer("weight", codes if dtype == torch.uint8 else codes.view(dtype))
        self.register_buffer("weight_scale", torch.rand(size, 1))
        self.register_buffer("input_scale", torch.rand(()))
        self.bias = nn.Parameter(torch.randn(size, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() * self.weight_scale * self.input_scale
        return torch.tanh(nn.functional.linear(x, weight.to(x.dtype), self.bias))


class Chain(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("inference", [False, True])
@torch.no_grad()
def test_quantized_layers_of_every_dtype_stream(inference):
    dtypes = [torch.float8_e4m3fn, torch.uint8, torch.float8_e5m2, torch.uint8]
    x = torch.randn(3, 33, dtype=torch.bfloat16)
    with torch.inference_mode(inference):
        resident = Chain(*(Rows(dtype, 33) for dtype in dtypes)).requires_grad_(False)
        assert torch.equal(streamed(resident, ["layers"])(x), resident(x))


@torch.no_grad()
def test_blocks_of_different_sizes_share_the_buffers():
    sizes = [3, 200, 1, 50, 7, 129]
    linears = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:] + sizes[:1], strict=True)]
    resident, x = frozen(Chain(*linears)), torch.randn(4, 3)
    ours = streamed(resident, ["layers"])
    assert torch.equal(ours(x), resident(x)) and torch.equal(ours(x), resident(x))
    largest = max(nbytes(block) for block in linears)
    for buffer in ring_of(ours).buffers:
        assert buffer.memory.nbytes == buffer.pinned.nbytes
        assert largest <= buffer.memory.nbytes < largest + 2 * streaming.ALIGNMENT


@torch.no_grad()
def test_weights_that_are_not_contiguous_stream():
    """A merged LoRA may leave such weights."""
    layers = [nn.Linear(5, 5) for _ in range(3)]
    for layer in frozen(nn.ModuleList(layers)):
        layer.weight.data = layer.weight.data.T
    x = expected = torch.randn(2, 5)
    for layer in layers:
        expected = nn.functional.linear(expected, layer.weight.contiguous(), layer.bias)
    assert torch.equal(stream(Chain(*layers), ["layers"], "cpu")(x), expected)


@pytest.mark.slow
@either_family
@pytest.mark.parametrize("share", [0, 0.5])
def test_streaming_compiles_one_graph_per_type_of_block(config, share):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.inference_mode():  # as a pipeline does
        resident, inputs = frozen(Flux(config)), flux_inputs(config)
        ours = deepcopy(resident)
        for block in blocks_of(ours):
            block.compile(backend=backend, fullgraph=True)
    budget = int(share * sum(nbytes(block) for block in blocks_of(ours)))
    stream(ours, FLUX_LISTS, "cpu", resident=budget)
    with torch.inference_mode():
        for t in (0.9, 0.5, 0.1):
            inputs["t"] = torch.tensor([t, 1 - t])
            assert torch.equal(ours(**inputs), resident(**inputs))
    assert len(graphs) == 2


# ------------------------------------------------------------------ memory


@torch.no_grad()
def test_only_the_current_block_is_in_a_buffer():
    ours = streamed(frozen(Flux(FLUX1_TINY)))
    ring, blocks = ring_of(ours), blocks_of(ours)
    assert ours.double_blocks.ring is ours.single_blocks.ring and len(ring.buffers) == 2
    memory = [buffer.memory.data_ptr() for buffer in ring.buffers]
    for path in FLUX_LISTS:
        for block in ours.get_submodule(path):
            assert [other for other in blocks if in_buffer(other, ring)] == [block]
            assert [buffer.memory.data_ptr() for buffer in ring.buffers] == memory
    assert not any(in_buffer(block, ring) for block in blocks)


@torch.inference_mode()
def test_weights_between_uses_are_the_mapped_memory():
    """Names, values and addresses do not change, so no host memory is used next to the file."""
    resident = frozen(Flux(FLUX1_TINY))
    ours = deepcopy(resident)
    before = addresses(ours)
    stream(ours, FLUX_LISTS, "cpu")(**flux_inputs(FLUX1_TINY))
    assert addresses(ours) == before
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, resident.state_dict()[name])


@either_family
@torch.inference_mode()
def test_unstream_restores_the_module_without_a_copy(config):
    """Also while a loop is unfinished; then other blocks can stay."""
    ours, inputs = frozen(Flux(config)), flux_inputs(config)
    expected, before, shape = ours(**inputs), addresses(ours), repr(ours)
    total = sum(nbytes(block) for block in blocks_of(ours))
    for share in (0, 0.4, 1):
        stream(ours, FLUX_LISTS, "cpu", resident=int(share * total))
        assert torch.equal(ours(**inputs), expected)
        loop = iter(ours.double_blocks)
        next(loop)
        unstream(ours, FLUX_LISTS)
        assert repr(ours) == shape and addresses(ours) == before
        assert torch.equal(ours(**inputs), expected)


@torch.inference_mode()
def test_unstream_restores_what_was_moved_to_the_device():
    ours = frozen(Flux(KLEIN_TINY))
    before = addresses(ours)
    budget = sum(nbytes(block) for block in ours.double_blocks)
    ring = ring_of(stream(ours, FLUX_LISTS, "cpu", resident=budget))
    assert len(ring.rest) > len(list(ours.img_in.parameters()))
    for tensor, _ in ring.rest:  # as a copy to a device would
        tensor.data = tensor.data.clone()
    assert addresses(ours) != before
    unstream(ours, FLUX_LISTS)
    assert addresses(ours) == before


def test_resident_blocks_never_move():
    network = frozen(Flux(KLEIN_TINY))
    budget = sum(nbytes(block) for block in blocks_of(network)) // 2
    ours = streamed(network, resident=budget)
    ring = ring_of(ours)
    stay = [block for block in blocks_of(ours) if block not in ring.slices]
    assert 0 < sum(nbytes(block) for block in stay) <= budget
    before = [addresses(block) for block in stay]
    for path in FLUX_LISTS:
        for block in ours.get_submodule(path):
            assert in_buffer(block, ring) == (block in ring.slices)
            assert [addresses(block) for block in stay] == before


# a compiled module of another test may flush subnormal numbers to zero in the whole process
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=60),
    st.floats(0, 1.2, allow_subnormal=False),
)
def test_choose_resident_uses_its_budget(sizes, share):
    budget = int(share * sum(sizes))
    stays = choose_resident(sizes, budget)
    kept = sum(size for size, stay in zip(sizes, stays, strict=True) if stay)
    assert kept <= budget and kept > min(budget, sum(sizes)) - max(sizes)
    assert all(stays) == (share >= 1 or kept == sum(sizes))


def test_choose_resident_spaces_blocks_evenly():
    assert choose_resident([5] * 9, 15) == [False, False, True] * 3
    assert choose_resident([5] * 4, 0) == [False] * 4
    assert choose_resident([5] * 4, 20) == [True] * 4


def test_trainable_network_is_refused():
    with pytest.raises(UserError, match="cannot be trained"):
        stream(Flux(KLEIN_TINY), FLUX_LISTS, "cpu")


# ------------------------------------------------------------------ order of copies


@pytest.fixture
def log(monkeypatch):
    """The copies, in order; a test adds the uses."""
    events, fill = [], PrefetchRing._fill

    def logged(self, buffer, block):
        events.append(f"copy {block.name}")
        fill(self, buffer, block)

    monkeypatch.setattr(PrefetchRing, "_fill", logged)
    return events


def named_blocks(lists: str, resident: str = "") -> nn.Module:
    """Return streamed lists of blocks: "ab cd" has two lists of two blocks. Weights hold the name.

    The blocks named in `resident` stay on the device.
    """
    module, paths = nn.Module(), []
    for number, names in enumerate(lists.split()):
        blocks = []
        for name in names:
            block = nn.Linear(4, 4, bias=False)
            block.name = name
            block.weight = nn.Parameter(torch.full((4, 4), float(ord(name))), requires_grad=False)
            blocks.append(block)
        paths.append(f"list{number}")
        module.register_module(paths[-1], nn.ModuleList(blocks))
    with pytest.MonkeyPatch.context() as patch:
        stays = [name in resident for name in lists.replace(" ", "")]
        answers = iter([stays])  # then: which blocks stay pinned
        none = [False] * len(stays)
        patch.setattr(
            streaming, "choose_resident", lambda sizes, _: next(answers, none[: len(sizes)])
        )
        return stream(module, paths, "cpu")


def use(log: list[str], module: nn.Module, block: nn.Module) -> None:
    ring = ring_of(module)
    assert (block.weight == ord(block.name)).all()
    assert in_buffer(block, ring) == (block in ring.slices)
    log.append(f"use {block.name}")


def run(log: list[str], module: nn.Module) -> None:
    for blocks in module.children():
        for block in blocks:
            use(log, module, block)


def test_next_block_is_copied_while_one_is_used(log):
    module = named_blocks("ab cd")
    run(log, module)
    run(log, module)
    step = "use a, copy c, use b, copy d, use c, copy a, use d"
    assert ", ".join(log) == f"copy a, copy b, {step}, copy b, {step}"


def test_list_that_runs_once_is_not_copied_again(log):
    """FLUX 3 [klein] base runs its text blocks once an image: the last block's next one is learned.

    `a` and `b` are copied once in vain, then each block once a run, and in time.
    """
    module = named_blocks("ab cde")
    run(log, module)
    for _ in range(3):
        for block in module.list1:
            use(log, module, block)
    later = ", ".join(log[log.index("use e") + 1 :])
    step = "use c, copy e, use d, copy c, use e"
    assert later.endswith(f"{step}, copy d, {step}")
    assert "copy a" not in later and "copy b" not in later and log.count("copy a") == 2


def test_both_buffers_are_filled_while_a_resident_block_is_used(log):
    module = named_blocks("RaSbTc", resident="RST")
    run(log, module)
    expected = "copy a, copy b, use R, use a, copy c, use S, use b, copy a, use T, use c"
    assert ", ".join(log) == expected


@pytest.mark.parametrize("lists, resident", [("a", ""), ("Ra", "R"), ("ab", "")])
def test_fewer_blocks_than_buffers(log, lists, resident):
    module = named_blocks(lists, resident)
    for _ in range(3):
        run(log, module)
    assert [log.count(f"use {name}") for name in lists] == [3] * len(lists)


@pytest.mark.parametrize("leave", ["break", "exception", "zip"])
def test_unfinished_loop_leaves_nothing_on_the_device(log, leave):
    module = named_blocks("abcd")
    ring = ring_of(module)
    if leave == "break":
        for block in module.list0:
            if block.name == "c":
                break
    elif leave == "zip":
        list(zip(module.list0, [1]))
    else:
        with pytest.raises(ZeroDivisionError):
            for _ in module.list0:
                raise ZeroDivisionError
    assert ring.current is None
    assert not any(in_buffer(block, ring) for block in module.list0.children())
    run(log, module)
    assert ", ".join(log).endswith("copy d, use c, copy a, use d")


def test_new_loop_takes_over_from_an_unfinished_one(log):
    """A traceback may keep the unfinished iterators; they can even go on later."""
    module = named_blocks("abcd")
    kept = [iter(module.list0) for _ in range(3)]
    for number, iterator in enumerate(kept):
        for _ in range(1 + number):
            use(log, module, next(iterator))
    run(log, module)
    run(log, module)
    for iterator in kept:
        use(log, module, next(iterator))
    iterator = kept.clear()
    assert ring_of(module).current is None


def test_interrupted_copy_leaves_nothing_behind(log, monkeypatch):
    """Ctrl-C while the next block is copied."""
    module, fill = named_blocks("abc"), PrefetchRing._fill

    def interrupted(self, buffer, block):
        if block.name == "b":
            raise KeyboardInterrupt
        fill(self, buffer, block)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PrefetchRing, "_fill", interrupted)
        list(module.list0)
    assert ring_of(module).current is None
    run(log, module)


# ------------------------------------------------------------------ events


class Recorder:
    """Stands in for torch.cuda: records the order of events, copies and uses."""

    def __init__(self):
        self.log, self.computing = [], "compute"
        recorder = self

        class Stream:
            def __init__(self, device=None, name="copies"):
                self.name = name

            def wait_event(self, event):
                recorder.log.append((self.name, "wait", event))

        class Event:
            def record(self, stream):
                recorder.log.append((stream.name, "record", self))

            def synchronize(self):
                recorder.log.append(("host", "wait", self))

        self.Stream, self.Event = Stream, Event
        self.compute = Stream(name="compute")

    def current_stream(self, device):
        return self.compute

    def stream(self, stream):
        return torch.autograd.profiler.record_function("copies")  # any context manager


def test_every_copy_and_every_use_waits_for_its_event(monkeypatch):
    """Without one of these waits, a block on a GPU could find other weights."""
    recorder = Recorder()
    monkeypatch.setattr(torch, "cpu", recorder)
    module = named_blocks("abc")
    ring = ring_of(module)
    for _ in range(2):
        for _block in module.list0:
            recorder.log.append(("compute", "use", ring.current))
    fills = 0
    for index, (queue, action, subject) in enumerate(recorder.log):
        before = recorder.log[:index]
        if (queue, action) == ("copies", "record"):  # `filled`: the copies came before
            buffer = next(buffer for buffer in ring.buffers if buffer.filled is subject)
            assert before[-2:] == [("host", "wait", subject), ("copies", "wait", buffer.free)]
            fills += 1
        if action == "use":
            waits = [entry for entry in before if entry[0] == "compute" and entry[1] != "record"]
            assert waits[-1] == ("compute", "wait", subject.filled)
            assert recorder.log[index + 1] == ("compute", "record", subject.free)
    assert fills >= 6
