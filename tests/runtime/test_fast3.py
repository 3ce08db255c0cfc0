"""flux.runtime.fast3 against FLUX 3's plain network: the same bits, fewer kernels, less memory."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.load_script import script
from support.transformer3_inputs import inputs

from flux.configs import KLEIN3_BASE, MODELS
from flux.parity.reference import FLUX3_TINY, randomise
from flux.runtime import fast
from flux.runtime.activation_memory import FusedKernels, Workload, activations, peak_bytes
from flux.runtime.fast3 import FastBlock, FastFlux3, Shared, fast_transformer3
from flux.transformer3 import Block, Flux3, ModulationOut, Stream

script("bench")  # which puts scripts/ on the path, where `benchmarks` is
from benchmarks.count import GPUS, counted

BF16 = torch.bfloat16
KERNELS = (1142, 1003)  # of the plain and of the fast network
FLOW_MAP = replace(FLUX3_TINY, flow_map=True)
MODES = {
    "text": (FLUX3_TINY, False),
    "references": (FLUX3_TINY, True),
    "flow map": (FLOW_MAP, True),
}
every_kind = pytest.mark.parametrize(("config", "references"), MODES.values(), ids=MODES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def both(config, dtype, modulation_dtype=torch.float32):
    plain = randomise(Flux3(config, modulation_dtype)).to(dtype)
    return plain, fast_transformer3(copy.deepcopy(plain))


@every_dtype
@every_kind
@pytest.mark.parametrize("device", ["cpu, in small chunks", "cuda"])
@torch.no_grad()
def test_fast_network_equals_plain_to_the_bit(config, references, dtype, device, monkeypatch):
    if device == "cuda":  # its branches, on this CPU
        monkeypatch.setattr(fast, "_counted", "cuda")
    else:  # two tokens
        monkeypatch.setattr(fast, "CPU", fast.Chunks(2 * 2 * 128, 2**13, 2, 2**10))
    chunks, pieces = [], Shared.pieces

    def counted(self, x):
        found = list(pieces(self, x))
        chunks.append(len(found))
        return iter(found)

    monkeypatch.setattr(Shared, "pieces", counted)
    plain, faster = both(config, dtype)
    given = inputs(config, dtype, references)
    expected = plain(**given)
    assert torch.equal(faster(**given), expected) and expected.float().std() > 0.1
    modes = 3 if references else 2
    assert len(chunks) == 2 * (config.depth * modes + config.depth_single)
    assert max(chunks) == modes if device == "cuda" else max(chunks) > 10


@torch.no_grad()
def test_modulation_in_the_dtype_of_the_network_equals_plain():
    plain, faster = both(FLUX3_TINY, torch.bfloat16, None)
    given = inputs(FLUX3_TINY, torch.bfloat16)
    assert torch.equal(faster(**given), plain(**given))


def test_classes_change_and_nothing_else():
    plain, faster = both(FLUX3_TINY, torch.float32)
    blocks = [x for x in faster.modules() if isinstance(x, Block)]
    assert type(faster) is FastFlux3 and {type(x) for x in blocks} == {FastBlock}
    assert faster.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "where", ["single_blocks.1", "txt_mode_blocks.0", "single_blocks.0.q_proj"]
)
@torch.no_grad()
def test_hooks_see_what_they_see_in_the_plain_network(where):
    seen = []
    given = inputs(FLUX3_TINY)
    for network in both(FLUX3_TINY, torch.float32):
        found = []
        network.get_submodule(where).register_forward_hook(
            lambda module, args, out, found=found: found.append((args, out))
        )
        velocity = network(**given)
        ((args, out),) = found
        seen.append([velocity, out, *torch.utils._pytree.tree_leaves(args)])
    assert len(seen[0]) == len(seen[1]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*seen))


def test_gradients_and_blocks_of_the_user_take_the_plain_way():
    plain, faster = both(FLUX3_TINY, torch.float32)
    given = inputs(FLUX3_TINY)
    for network in (plain, faster):
        network.requires_grad_(True)
        network(**given).square().mean().backward()
    grads = [{n: p.grad for n, p in network.named_parameters()} for network in (plain, faster)]
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())

    class Skipped(torch.nn.Module):
        def forward(self, x, rope, mod):
            shift, scale, gate = mod
            return x + 0 * shift * scale * gate

    with torch.no_grad():
        for network in (plain, faster):
            network.single_blocks[1] = Skipped()
        assert torch.equal(faster(**given), plain(**given))


@pytest.mark.slow
def test_step_takes_fewer_kernels_less_memory_and_less_traffic():
    """A step of a base model at 1024x1024, on the meta device, which stands for a GPU.

    A block of one mode takes 25 kernels in place of 32, and a single block 28: its two modes have
    a modulation each, which is written for no token.
    """
    with torch.device("meta"):
        networks = Flux3(KLEIN3_BASE).bfloat16(), fast_transformer3(Flux3(KLEIN3_BASE)).bfloat16()
        mod = ModulationOut(*torch.empty(3, 1, 1, 3072, dtype=BF16))
        text = Stream(torch.empty(1, 240, 3072, dtype=BF16), torch.empty(240, 64, 2, 2), mod)
        img, vec = torch.empty(1, 4096, 128, dtype=BF16), torch.empty(1, 1, 3072, dtype=BF16)
        rope = torch.empty(4096, 64, 2, 2)
    with fast.counted_for("cuda"):
        runs = (partial(network.denoise, img, rope, vec, text) for network in networks)
        plain, faster = (counted(run).totals(GPUS["H200"]) for run in runs)
    assert plain.flops == faster.flops
    assert (plain.kernels, faster.kernels) == KERNELS
    assert faster.elementwise < 0.75 * plain.elementwise and faster.peak < 0.85 * plain.peak


@pytest.mark.slow
@pytest.mark.parametrize("references", [0, 300])
@pytest.mark.parametrize("is_fast", [True, False], ids=["fast", "plain"])
def test_activations_are_bounded_closely(is_fast, references):
    """The bound is 1 to 1.5 times the peak of a step at full width, on the meta device."""
    spec = MODELS["flux.3-image-klein-base"]
    c = replace(spec.transformer, depth=1, depth_single=1)
    with torch.device("meta"):
        network = Flux3(c).bfloat16()
        network = fast_transformer3(network) if is_fast else network
        ropes = [torch.empty(n, 64, 2, 2) for n in (240, 4096, references)]

        def step() -> None:
            vec = network.vec(torch.empty(2))
            txt = torch.empty(2, 240, c.context_dim, dtype=BF16)
            streams = [network.stream("txt", txt, ropes[0].clone(), vec)]
            if references:
                tokens = torch.empty(2, references, 128, dtype=BF16)
                streams.append(network.stream("image_cond", tokens, ropes[2].clone(), vec))
            network.denoise(torch.empty(2, 4096, 128, dtype=BF16), ropes[1].clone(), vec, *streams)

        with fast.counted_for("cuda"), FusedKernels():
            peak = peak_bytes(step)
    work = Workload(1024, 1024, 2, references, fast=is_fast, text_tokens=240)
    bound = activations(replace(spec, transformer=c), work, "cuda")["transformer"]
    assert peak <= bound <= 1.5 * peak, f"{bound / peak:.3f}"
