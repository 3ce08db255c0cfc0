"""Weights divided over two or four processes: tensor parallelism, and shards (FSDP2)."""

from functools import partial

import pytest
import torch
from support import parallel_images
from support.parallel_cases import CONFIGS, Case
from support.parallel_images import Run, toy_lora
from support.processes import Processes
from support.weight_cases import (
    MISTAKES,
    compare_all,
    compare_unequal_memory,
    messages_of_a_pass,
    messages_of_a_step,
    reason_for_shards,
    refusal,
)

from flux.configs import MODELS
from flux.errors import UserError
from flux.runtime.tensor_parallel import TensorParallel
from flux.transformer import Flux, mlp_widths
from flux.weights.load import init_empty

FLOAT32 = dict(dtype=torch.float32)
CASES = [
    Case("flux.1", **FLOAT32),
    Case("flux.1", mask=True, residuals=True, **FLOAT32),
    Case("flux.2", fast=True, **FLOAT32),
    Case("klein", references=((3, 4), (2, 3)), cached=True, **FLOAT32),
    Case("flux.3", references=((3, 4),), **FLOAT32),
]
TOY = "flux.2-tiny"
CFG = dict(negative_prompt="a green star", guidance=2.0)


def check_passes(processes: Processes, count: int) -> None:
    """Tensor: sums of `count` parts, seen were 3e-7; shards: the same weights, the same bits."""
    fit = [case for case in CASES if CONFIGS[case.config].num_heads % count == 0]
    cases = [(case, how) for case in fit for how in ("tensor", "shards")]
    cases += [(fit[0]._replace(dtype=torch.float64), "tensor")]
    for (case, how), outcomes in zip(cases, zip(*processes(compare_all, cases))):
        for outcome in outcomes:
            assert outcome.same_everywhere
            assert outcome.equal or (how == "tensor" and outcome.relative < 1e-6)
            assert outcome.share == pytest.approx(1 / count)
            assert case.dtype == torch.float32 or outcome.relative < 1e-14


def test_two_processes_equal_one(two):
    check_passes(two, 2)


@pytest.mark.slow
def test_four_processes_equal_one(four):
    check_passes(four, 4)


def test_mistakes_of_tensor_parallelism_are_large(two):
    """Each fails the test above by far."""
    cases = [(CASES[0], "tensor", mistake) for mistake in MISTAKES]
    for (*_, mistake), outcomes in zip(cases, zip(*two(compare_all, cases))):
        assert all(outcome.relative > 1e-3 for outcome in outcomes), mistake


# ------------------------------------------------------------------ images


def check_images(processes: Processes, *runs: Run) -> None:
    """Of shards they are equal to the byte; of sums in another order, to a level."""
    for run, of_run in zip(runs, zip(*processes(parallel_images.compare_all, list(runs)))):
        assert max(of_run) <= (not run.shard_weights), run


def test_images_of_divided_weights(two):
    shards = Run(TOY, "context=2", shard_weights=True)
    check_images(two, shards, Run("flux.1-tiny", "tensor=2"))


@pytest.mark.slow
def test_more_images_of_divided_weights(two, four, tmp_path):
    """With LoRAs, other axes, and networks that leave the device or are streamed."""
    model, block = dict(offload="model"), dict(offload="block")
    lora1, lora2 = (
        str(toy_lora(tmp_path / f"{name}.safetensors", name)) for name in ("flux.1-tiny", TOY)
    )
    batch, shards = dict(num_images=2), dict(shard_weights=True)
    check_images(
        two,
        Run("flux.1-tiny", "data=2", batch, lora=lora1, **shards),
        Run(TOY, "context=2", {}, block, lora=lora2, **shards),
        Run("flux.1-tiny", "tensor=2", {}, model, lora=lora1),
        Run(TOY, "tensor=2", {}, block, lora=lora2),
    )
    check_images(
        four,
        Run(TOY, "cfg=2,context=2", CFG, model, **shards),
        Run(TOY, "cfg=2,tensor=2", CFG),
        Run(TOY, "data=2,tensor=2", batch),
        Run(TOY, "context=2,tensor=2"),
    )


def test_what_cannot_be_divided_is_refused(two):
    int8, compiled = dict(quantize="int8"), dict(compile=True)
    for options, said in ((int8, "the quantized weights of"), (compiled, "compile: is not")):
        for run in (Run(TOY, "tensor=2"), Run(TOY, "context=2", shard_weights=True)):
            assert all(said in text for text in two(refusal, run._replace(load=options)))
    run = Run(TOY, "tensor=2", shard_weights=True)
    assert all("shard_weights: tensor=2 divides" in text for text in two(refusal, run))


def test_processes_agree_on_shards(two):
    """The process with the least memory decides. What the user chose stays as it is."""
    toy = "0.013 GB whole, 0.012 GB sharded, 0.012 GB are free"
    run = Run(TOY, "context=2")
    assert two(reason_for_shards, run, (1.0, 0.012)) == [toy, toy]
    assert two(reason_for_shards, run, (1.0, 1.0)) == ["", ""]
    assert two(reason_for_shards, run, (1.0, 0.011)) == ["", ""]  # shards do not fit either
    limited = run._replace(load=dict(max_vram=0.012))
    assert two(reason_for_shards, limited, (1.0, 1.0)) == [toy, toy]
    for options in (dict(offload="block"), dict(quantize="int8"), dict(compile=True)):
        assert two(reason_for_shards, run._replace(load=options), (1.0, 0.012)) == ["", ""]


def test_processes_of_unequal_memory_gather_alike(two):
    """Weights that one process alone releases between calls would be gathered at other times."""
    shards = Run(TOY, "cfg=2", CFG, shard_weights=True)
    assert two(compare_unequal_memory, shards) == [[True, True, False]] * 2
    whole = shards._replace(sizes="context=2", shard_weights=False)
    assert two(compare_unequal_memory, whole) == [[True, True, False], [True, True, True]]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="tensor=4 does not divide the 6 heads"):
        TensorParallel(None, 0, 4)(init_empty(partial(Flux, CONFIGS["klein"])))


# ------------------------------------------------------------------ messages


@pytest.mark.parametrize("how", ["allgather", "ulysses", "tensor", "shards"])
def test_messages_of_a_pass_are_those_of_the_arithmetic(two, how):
    check_messages_of_a_pass(two, how, 2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["allgather", "ulysses", "tensor", "shards"])
def test_messages_of_four_processes_are_those_of_the_arithmetic(four, how):
    check_messages_of_a_pass(four, how, 4)


def check_messages_of_a_pass(processes: Processes, how: str, p: int) -> None:
    """N tokens of width D in B images: every process sends so many numbers, of four bytes."""
    case = Case("flux.1", text=16, grid=(4, 8), **FLOAT32)
    c, batch, text, image = CONFIGS["flux.1"], 2, 16, 32
    size, blocks = batch * (text + image) * c.hidden_size, c.depth + c.depth_single
    velocity = batch * image * c.out_channels * (p - 1) / p  # gathered at the end
    if how == "allgather":  # keys and values
        expected = blocks + 1, blocks * 2 * size * (p - 1) / p + velocity
    elif how == "ulysses":  # q, k, v there, and the output back
        expected = 2 * blocks + 1, blocks * 4 * size / p * (p - 1) / p + velocity
    elif how == "tensor":  # attention and MLP of two streams; single blocks sum once
        sums = 2 * c.depth + c.depth_single
        expected = 4 * c.depth + c.depth_single, sums * size * 2 * (p - 1) / p
    else:  # every weight, once; the root has the embedders and the final layer
        whole = sum(weight.numel() for weight in Flux(c).parameters())
        units = 1 + blocks + 2 * c.depth + c.depth_single
        expected = units, whole * (p - 1) / p
    for found in processes(messages_of_a_pass, case, how):
        assert found == (expected[0], 4 * expected[1])


def test_messages_of_a_step_are_those_of_the_arithmetic(two):
    """Two branches exchange a velocity (B, L, C); two groups of images exchange nothing."""
    run = Run(TOY, "cfg=2", dict(guidance=2.0))
    assert two(messages_of_a_step, run) == [(1, 16 * MODELS[TOY].transformer.out_channels * 4)] * 2
    run = Run(TOY, "data=2", dict(num_images=2, guidance=2.0))
    assert two(messages_of_a_step, run) == [(0, 0)] * 2


def test_full_size_networks_are_divided():
    """On the meta device: every slice of FLUX.1's and FLUX.2's matrices, on up to 8 processes."""
    for name in ("flux.1-dev", "flux.2-dev", "flux.2-klein-9b"):
        c = MODELS[name].transformer
        inner, outer = mlp_widths(c)
        for p in (2, 4, 8):
            net = init_empty(partial(Flux, c))
            TensorParallel(None, p - 1, p)(net)
            single, double = net.single_blocks[0], net.double_blocks[0]
            d = c.hidden_size
            assert single.linear1.weight.shape == ((3 * d + inner) // p, d)
            assert single.linear2.weight.shape == (d, (d + outer) // p)
            assert double.txt_attn.qkv.weight.shape == (3 * d // p, d)
            assert double.img_mlp[2].weight.shape == (d, outer // p)
            assert single.num_heads * p == double.img_attn.num_heads * p == c.num_heads
