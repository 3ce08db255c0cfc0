"""Known bugs in weights, precision and the wiring of blocks: each, made by hand, is named.

Nothing of ours computes the port's tensors: they come from recorded tensors in float64.
"""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.by_hand import (
    Hand,
    angles,
    attended,
    causal,
    gelu,
    joint,
    modulated,
    normed,
    of_middle,
    positions,
    raw,
    rms,
    scale_of,
    shifted,
    t_of,
    table,
    turned,
    waves,
)
from support.tiny_repositories import tiny_repositories
from torch import Tensor

import flux
from flux.parity.bugs_in_blocks import BUGS_IN_BLOCKS
from flux.parity.capture import Request, Selection, capture
from flux.parity.capture_file import Capture
from flux.parity.compare import compare
from flux.parity.diagnose import diagnose, format_diagnosis
from flux.parity.modules import in_dtype

FLUX1, FLUX2 = "flux.1-dev", "flux.2-klein-4b"
# 30 image tokens; 24 and 64 text tokens; 4 heads of 32 channels
WIDE = Request("a photo of a cat", width=96, height=80, steps=2, seed=5)
REQUESTS = {FLUX1: replace(WIDE, guidance=3.3), FLUX2: WIDE}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* was distilled for", "ignore:.* was not trained with"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> a float32 capture and its pipeline."""
    out = tmp_path_factory.mktemp("captures")
    folder = tmp_path_factory.mktemp("weights")
    with tiny_repositories(folder, REQUESTS, depth=1, depth_single=2):
        pipes = {
            name: flux.load(name, folder, "cpu", dtype=torch.float32, fast=False)
            for name in REQUESTS
        }
        yield {
            name: (capture(pipe, REQUESTS[name], out / f"{name}.safetensors"), pipe)
            for name, pipe in pipes.items()
        }


def linear(h: Hand, layer: str, x: Tensor, bias: bool = True) -> Tensor:
    out = x @ h.weight(f"{layer}.weight").T
    return out + h.weight(f"{layer}.bias") if bias and h.config.bias else out


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def low(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def proj(h: Hand, matrix: Tensor) -> Tensor:
    return h(f"{PROJ}/in") @ matrix


def modulate(h: Hand, x: Tensor, number: int) -> Tensor:
    """Norm and modulate by the shift and scale that are recorded from arg.number on."""
    shift, scale = (h(f"/double_blocks.0/arg.{n}") for n in (number, number + 1))
    return (1 + scale) * x + shift


def after_attention(h: Hand) -> Tensor:
    return h("/double_blocks.0/in.0") + h("/double_blocks.0/arg.5") * h(f"{PROJ}/out")


def as_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 32)).transpose(1, 2)


def unbiased(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=1, keepdim=True) + 1e-6).sqrt()


def text_with(h: Hand, values: Tensor) -> Tensor:
    ids = h("ids/txt").clone()
    ids[:, -1] = values
    return ids


def axes_backwards(h: Hand) -> Tensor:
    """Angles where the first axis has the channels of the last one."""
    ids, dims = positions(h).double(), h.config.axes_dim[::-1]
    parts = [
        ids[:, [axis]] * 10_000 ** (-torch.arange(0, dim, 2).double() / dim)
        for axis, dim in enumerate(dims)
    ]
    return torch.cat(parts, dim=-1)


def of_more_tokens(h: Hand) -> Tensor:
    """The times of 120 tokens for 30."""
    mu = torch.tensor(0.5 + 0.65 * (120 - 256) / 3840).double()
    return shifted(h, mu.exp(), torch.tensor([1, 0.5, 0]).double())


def query_with_scales_of_the_image(h: Hand) -> Tensor:
    txt = rms(raw(h, 0, "txt")) * scale_of(h, "query")
    q = torch.cat([txt, h("/double_blocks.0.img_attn.norm/out.0")], dim=2)
    return turned(q, angles(h, positions(h)))


def single_block(h: Hand, number: int, x: Tensor) -> Tensor:
    """FLUX.1's block of this number on other tokens, with its own modulation."""
    block = f"single_blocks.{number}"
    shift, scale, gate = (h(f"/{block}/arg.{n}") for n in (2, 3, 4))
    columns = linear(h, f"{block}.linear1", (1 + scale) * normed(x) + shift)
    q, k, v = (as_heads(part) for part in columns[..., :384].chunk(3, dim=-1))
    norms = (h.weight(f"{block}.norm.{which}_norm.scale") for which in ("query", "key"))
    q, k = (turned(rms(y) * norm, angles(h, positions(h))) for y, norm in zip((q, k), norms))
    out = torch.softmax(q @ k.mT / 32**0.5, dim=-1) @ v
    hidden = F.gelu(columns[..., 384:], approximate="tanh")
    joined = torch.cat([out.transpose(1, 2).flatten(2), hidden], dim=-1)
    return x + gate * linear(h, f"{block}.linear2", joined)


BLOCK, QKV = "/double_blocks.0", "/double_blocks.0.img_attn.qkv"
PROJ, MLP, NORM = (f"/double_blocks.0.img_{x}" for x in ("attn.proj", "mlp", "attn.norm"))
T5 = "text/t5/encoder.block.0.layer.0.SelfAttention"
CLIP = "text/clip/text_model.encoder.layers.0.self_attn"
QWEN = "text/model/layers.0.self_attn"
WEIGHTS = "weights of another module"

# model, tensor, what a port has there, the bug's name, and a part of the description
CASES = (
    (
        FLUX1,
        "/double_blocks.0.txt_attn.qkv/out",
        lambda h: linear(h, "double_blocks.0.img_attn.qkv", h("/double_blocks.0.txt_attn.qkv/in")),
        WEIGHTS,
        "double_blocks.0.img_attn.qkv",
    ),
    (
        FLUX1,
        "/single_blocks.0.linear1/out",
        lambda h: linear(h, "single_blocks.1.linear1", h("/single_blocks.0.linear1/in")),
        WEIGHTS,
        "single_blocks.1.linear1",
    ),
    (
        FLUX2,
        f"{BLOCK}/attention/q",
        query_with_scales_of_the_image,
        WEIGHTS,
        "img_attn.norm for those of double_blocks.0.txt_attn.norm",
    ),
    (
        FLUX1,
        f"{QKV}/out",
        lambda h: linear(h, "double_blocks.0.img_attn.qkv", h(f"{QKV}/in"), bias=False),
        "bias left out",
        "",
    ),
    (
        FLUX2,
        f"{PROJ}/out",
        lambda h: proj(h, h.weight(f"{PROJ[1:]}.weight")),
        "weights transposed",
        "",
    ),
    (
        FLUX2,
        f"{PROJ}/out",
        lambda h: proj(h, low(h.weight(f"{PROJ[1:]}.weight").T)),
        "weights rounded",
        "to bfloat16",
    ),
    (
        FLUX2,
        f"{PROJ}/out",
        lambda h: low(low(h(f"{PROJ}/in")) @ low(h.weight(f"{PROJ[1:]}.weight").T)),
        "linear layers in low precision",
        "in bfloat16",
    ),
    (
        FLUX1,
        f"{QKV}/in",
        lambda h: modulate(h, low(normed(low(h(f"{BLOCK}/in.0")))), 3),
        "norm in low precision",
        "LayerNorm computes in bfloat16",
    ),
    (
        FLUX1,
        f"{BLOCK}/attention/out",
        lambda h: F.scaled_dot_product_attention(
            *(h(f"{BLOCK}/attention/{tap}").bfloat16() for tap in "qkv")
        ),
        "attention in low precision",
        "in bfloat16",
    ),
    (FLUX1, "/latents", lambda h: low(h("/latents")), "latents rounded", "to bfloat16"),
    (
        FLUX1,
        "/vec",
        lambda h: h("/vec") - h("/vector_in/out"),
        "conditioning vector",
        "pooled text is not added",
    ),
    (
        FLUX1,
        "/double_blocks.0.img_mod/in",
        lambda h: h("/vec") - h("/guidance_in/out"),
        "conditioning vector",
        "guidance is not added",
    ),
    (FLUX1, "/double_blocks.0.img_mod.lin/in", lambda h: silu(silu(h("/vec"))), "SiLU twice", ""),
    (FLUX1, "schedule", of_more_tokens, "schedule's number of tokens", "four times"),
    (
        FLUX1,
        "step.002/time_in/in",
        lambda h: waves(1000 * of_more_tokens(h)[1].item()),
        "schedule's number of tokens",
        "four times",
    ),
    (
        FLUX2,
        "step.002/time_in/in",
        lambda h: waves(1000 * (1 - t_of(h, 2))),
        "time reversed",
        "t is 1 - t",
    ),
    (
        FLUX1,
        f"{BLOCK}/attention/q",
        lambda h: turned(joint(h, 0), axes_backwards(h)),
        "order of RoPE's axes",
        "",
    ),
    (
        FLUX1,
        f"{BLOCK}/attention/k",
        lambda h: turned(joint(h, 1), angles(h, positions(h), 2000)),
        "RoPE's theta",
        "0.2 times",
    ),
    (
        FLUX1,
        "rope",
        lambda h: low(table(angles(h, positions(h)))),
        "RoPE in low precision",
        "rounded to bfloat16",
    ),
    (
        FLUX2,
        "ids/txt",
        lambda h: text_with(h, torch.arange(1, 65)),
        "text positions off by one",
        "on the last axis",
    ),
    (FLUX1, "ids/txt", lambda h: text_with(h, torch.arange(24)), "text positions counted", ""),
    (
        FLUX1,
        f"{BLOCK}/attention/v",
        lambda h: turned(h(f"{BLOCK}/attention/v"), angles(h, positions(h))),
        "RoPE of the wrong tensors",
        "values are rotated",
    ),
    (FLUX1, f"{NORM}/in.1", lambda h: raw(h, 2), "order of q, k and v", "as qvk"),
    (
        FLUX1,
        f"{PROJ}/in",
        lambda h: h(f"{BLOCK}/attention/out").permute(0, 2, 3, 1).flatten(2)[:, 24:],
        "heads merged the wrong way",
        "",
    ),
    (
        FLUX2,
        f"{BLOCK}/attention/out",
        lambda h: attended(h, BLOCK, scale=32**-0.5),
        "scale of attention",
        "the head's width, not",
    ),
    (
        FLUX2,
        "/single_blocks.0/attention/out",
        lambda h: attended(h, "/single_blocks.0", hidden=causal(94)),
        "attention masked",
        "attention is causal",
    ),
    (
        FLUX1,
        "/single_blocks.0/out",
        lambda h: h("/single_blocks.0/in.0") + h("/single_blocks.0.linear2/out"),
        "gate of a residual",
        "the gate is left out",
    ),
    (
        FLUX1,
        f"{BLOCK}/out.0",
        lambda h: after_attention(h) + h(f"{BLOCK}/arg.5") * h(f"{MLP}/out"),
        "gate of a residual",
        "the MLP has the gate of attention",
    ),
    (
        FLUX2,
        f"{MLP}/in",
        lambda h: modulate(h, normed(after_attention(h)), 3),
        "modulation of another branch",
        "the MLP has the modulation of attention",
    ),
    (
        FLUX2,
        f"{QKV}/in",
        lambda h: normed(h(f"{BLOCK}/in.0")),
        "modulation left out",
        "modulation is not applied",
    ),
    (
        FLUX1,
        f"{MLP}/in",
        lambda h: modulate(h, normed(h(f"{BLOCK}/in.0")), 6),
        "MLP on the block's input",
        "",
    ),
    (
        FLUX1,
        "/single_blocks.0.norm/in.0",
        lambda h: as_heads(h("/single_blocks.0.linear1/out")[..., 512:640]),
        "order in linear1",
        "",
    ),
    (
        FLUX1,
        "/single_blocks.0.linear2/in",
        lambda h: h("/single_blocks.0.linear2/in").roll(-128, dims=-1),
        "order in linear2",
        "",
    ),
    (
        FLUX2,
        f"{BLOCK}/out.1",
        lambda h: h(f"{BLOCK}/out.1") - h(f"{BLOCK}/in.1"),
        "residual left out",
        "",
    ),
    (FLUX1, "/single_blocks.1/in.0", lambda h: h("/single_blocks.0/in.0"), "block skipped", ""),
    (FLUX2, "/final_layer/in.0", lambda h: h("/single_blocks.1/in.0")[:, 64:], "block skipped", ""),
    (
        FLUX1,
        "/single_blocks.0/in.0",
        lambda h: single_block(h, 1, h("/single_blocks.0/in.0")),
        "order of blocks",
        "single_blocks.1 ran before",
    ),
    (
        FLUX1,
        f"{QKV}/in",
        lambda h: modulate(h, unbiased(h(f"{BLOCK}/in.0")), 3),
        "norm by another formula",
        "unbiased variance",
    ),
    (
        FLUX1,
        f"{MLP}.1/out",
        lambda h: h(f"{MLP}.1/in").clamp(min=0),
        "another activation",
        "ReLU is used",
    ),
    (
        FLUX2,
        f"{MLP}.1/out",
        lambda h: gelu(h(f"{MLP}.0/out")[..., :384]) * h(f"{MLP}.0/out")[..., 384:],
        "another activation",
        "the gate goes through GELU",
    ),
    (
        FLUX1,
        "decoder/decoder.mid.block_1.conv1/in",
        lambda h: h("decoder/decoder.mid.block_1.norm1/out").clamp(min=0),
        "activation of the autoencoder",
        "it is ReLU",
    ),
    (
        FLUX1,
        "decoder/decoder.mid.block_1.norm1/out",
        lambda h: F.group_norm(h("decoder/decoder.mid.block_1.norm1/in"), 8, *of_middle(h), 1e-6),
        "groups of the autoencoder's norms",
        "half",
    ),
    (
        FLUX1,
        f"{T5}/attention/out",
        lambda h: attended(h, T5, 8**0.5),
        "T5's position bias left out",
        "",
    ),
    (
        FLUX1,
        f"{T5}/attention/out",
        lambda h: attended(h, T5, bias=h(f"{T5}/in.1")),
        "T5's attention scaled",
        "",
    ),
    (FLUX1, f"{CLIP}/attention/out", lambda h: attended(h, CLIP), "CLIP not causal", ""),
    (
        FLUX1,
        "text/clip/text_model.final_layer_norm/out",
        lambda h: h("text/clip/text_model.final_layer_norm/in"),
        "CLIP's last norm left out",
        "",
    ),
    (
        FLUX2,
        f"{QWEN}/attention/k",
        lambda h: h(f"{QWEN}/attention/k")[:, [0, 2, 1, 3]],
        "language model's heads",
        "",
    ),
    (
        FLUX2,
        f"{QWEN}.q_norm/out",
        lambda h: h(f"{QWEN}.q_norm/in"),
        "language model's QK-norm left out",
        "",
    ),
)


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=[re.sub("^/", "", f"{case[1]} {case[3]}").replace("/", ":") for case in CASES],
)
def test_bug_in_a_block_is_named(case, runs, tmp_path):
    model, name, by_hand, expected, words = case
    (reference, pipe), full = runs[model], f"step.001{name}" if name.startswith("/") else name
    wrong, right = by_hand(Hand(reference, pipe)), reference.tensors[full]
    assert wrong.shape == right.shape
    save_file({full: wrong.to(right.dtype).contiguous()}, tmp_path / "port.safetensors")
    port = Capture(tmp_path / "port.safetensors")
    found = diagnose(compare(port, reference), port, reference, pipe)
    text = format_diagnosis(found)
    assert found.bug and found.bug.name == expected, text
    assert f"cause: {expected}: " in text and words in text.splitlines()[2], text


def test_parts_by_hand_are_right_without_a_bug(runs):
    """Else a wrong formula in this file would be taken for a bug's effect."""
    for reference, pipe in runs.values():
        h = Hand(reference, pipe)
        for ours, name in (
            (modulated(h, 0), f"{QKV}/in"),
            (modulate(h, normed(after_attention(h)), 6), f"{MLP}/in"),
            (proj(h, h.weight(f"{PROJ[1:]}.weight").T), f"{PROJ}/out"),
            (turned(joint(h, 0), angles(h, positions(h))), f"{BLOCK}/attention/q"),
        ):
            bias = h.weight(f"{PROJ[1:]}.bias") if name.startswith(PROJ) and h.config.bias else 0
            torch.testing.assert_close(ours + bias, h(name), rtol=0, atol=2e-5)
    h = Hand(*runs[FLUX1])
    block = single_block(h, 0, h("/single_blocks.0/in.0"))
    torch.testing.assert_close(block, h("/single_blocks.0/out"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", REQUESTS)
def test_no_cause_is_named_for_an_honest_port(name, runs, tmp_path):
    """A port in bfloat16 rounds everywhere. Its first tensor over a small tolerance is no bug."""
    reference, pipe = runs[name]
    only = (
        "double_blocks.0",
        "time_in",
        "single_blocks.1",
        "latents",
        "vec",
        "rope",
        "final_layer",
    )
    path = tmp_path / "half.safetensors"
    half = capture(in_dtype(pipe, torch.bfloat16), REQUESTS[name], path, Selection(only))
    tensors = {name: tensor.clone() for name, tensor in half.tensors.items()}
    save_file(tensors, tmp_path / "plain.safetensors")
    for port in (half, Capture(tmp_path / "plain.safetensors")):
        for tolerance in (1e-3, 5e-3, 1e-2):
            found = diagnose(compare(port, reference, tolerance), port, reference, pipe)
            assert found is None or found.bug is None, format_diagnosis(found)
    in_other_order = {}  # float32 sums in another order: every output in float64, rounded once
    for layer in ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"):
        x = Hand(reference, pipe)(f"/double_blocks.0.{layer}/in")
        out = linear(Hand(reference, pipe), f"double_blocks.0.{layer}", x).float()
        in_other_order[f"step.001/double_blocks.0.{layer}/out"] = out
    save_file(in_other_order, tmp_path / "sums.safetensors")
    port = Capture(tmp_path / "sums.safetensors")
    assert diagnose(compare(port, reference), port, reference, pipe) is None
    found = diagnose(compare(port, reference, 1e-9), port, reference, pipe)
    assert found.bug is None, format_diagnosis(found)


def test_every_bug_in_blocks_is_tested():
    assert {bug.name for bug in BUGS_IN_BLOCKS} == {case[3] for case in CASES}
