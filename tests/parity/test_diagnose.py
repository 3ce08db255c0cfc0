"""flux.parity.diagnose: each known bug, made by hand in float64 from recorded tensors, is named.

Nothing of ours computes the port's tensors: attention, norms, RoPE and the rest are written out
here, wrongly, as a port might.
"""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from support.by_hand import (
    Hand,
    angles,
    attended,
    bf16,
    by_heads,
    causal,
    early,
    gated,
    gelu,
    guided,
    in_clip,
    in_halves,
    joint,
    last_modulated,
    level,
    modulated,
    moved,
    mu,
    normed,
    of_middle,
    of_upsampling,
    padded,
    positions,
    raw,
    raw_query,
    regrouped,
    rms,
    scale_of,
    scaled_query,
    shifted,
    spread_out,
    statistics,
    stepped,
    t_of,
    table,
    transposed,
    turned,
    waves,
)
from support.tiny_repositories import tiny_repositories
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flux
from flux import transformer
from flux.hooks import watching
from flux.image_io.request import ImageInputs
from flux.parity import compare_live
from flux.parity.bugs_in_blocks import BUGS_IN_BLOCKS
from flux.parity.capture import Request, Selection, capture
from flux.parity.capture_file import Capture, Writer
from flux.parity.compare import compare
from flux.parity.diagnose import Diagnosis, diagnose, format_diagnosis
from flux.parity.known_bugs import KNOWN_BUGS
from flux.parity.name_map import Gather, matches_of
from flux.parity.reference import diffusers_velocity
from flux.parity.rerun import reruns
from flux.runtime.devices import can_compile

FLUX1, FLUX2 = "flux.1-dev", "flux.2-klein-4b"
# 30 image tokens; 24 and 64 text tokens
WIDE = Request("a photo of a cat", width=96, height=80, steps=2, seed=5)
REQUESTS = {  # bfloat16 has no 3.3
    FLUX1: replace(WIDE, guidance=3.3, true_cfg_scale=2.5, negative_prompt="a dog"),
    FLUX2: WIDE,
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* was distilled for", "ignore:.* was not trained with"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with tiny_repositories(folder, REQUESTS, depth=1, depth_single=2):
        yield folder


@pytest.fixture(scope="module")
def pipes(folder):
    return {
        name: flux.load(name, weights=folder, device="cpu", fast=False, dtype=torch.float32)
        for name in REQUESTS
    }


@pytest.fixture(scope="module")
def captures(pipes, tmp_path_factory):
    out = tmp_path_factory.mktemp("captures")
    return {
        name: capture(pipes[name], request, out / f"{name}.safetensors")
        for name, request in REQUESTS.items()
    }


QKV = "/double_blocks.0.img_attn.qkv/in"
NORM = "/double_blocks.0.img_attn.norm/out.0"
Q = "/double_blocks.0/attention/q"
MOD = "/double_blocks.0.img_mod/out"
AXIS, PACKING = "QK-norm over the wrong axis", "packing order of latents"
BF16 = "t rounded to bfloat16"
NO = "step.001/negative"
T5 = "text/t5/encoder.block.0.layer"
CLIP = "text/clip/text_model.encoder.layers.0"
QWEN = "text/model/layers.0"
UP = "decoder.up.3.upsample"

# model, tensor, what a port has there, the bug's name, and a tolerance where it must be small
KNOWN = (
    (
        FLUX1,
        QKV,
        lambda h: (
            (1 + h("/double_blocks.0/arg.3")) * normed(h("/double_blocks.0/in.0"))
            + h("/double_blocks.0/arg.4")
        ),
        "shift and scale swapped",
    ),
    (FLUX1, f"{MOD}.0", lambda h: h(f"{MOD}.1"), "shift and scale swapped"),
    (FLUX2, "/final_layer.linear/in", last_modulated, "shift and scale swapped"),
    (
        FLUX2,
        "/single_blocks.0.linear1/in",
        lambda h: (
            h("/single_blocks.0/arg.3") * normed(h("/single_blocks.0/in.0"))
            + h("/single_blocks.0/arg.2")
        ),
        "1 + scale missing",
    ),
    (
        FLUX1,
        f"{MOD}.1",
        lambda h: h("/double_blocks.0.img_mod.lin/out").chunk(6, dim=-1)[2][:, None],
        "modulation split by kind",
    ),
    (FLUX1, "/double_blocks.0.img_mod.lin/in", lambda h: h("/vec"), "SiLU missing"),
    (FLUX1, QKV, lambda h: modulated(h, 0, 1e-5), "eps 1e-05", 1e-6),
    (FLUX2, "/double_blocks.0.txt_attn.qkv/in", lambda h: modulated(h, 1, 1e-5), "eps 1e-05", 1e-6),
    (FLUX2, NORM, lambda h: scaled_query(h, rms(raw_query(h), eps=1e-3)), "eps 0.001", 1e-6),
    (
        FLUX1,
        "text/t5/encoder.final_layer_norm/out",
        lambda h: (
            rms(h("text/t5/encoder.final_layer_norm/in"), eps=1e-3)
            * h.weight("encoder.final_layer_norm.weight", "t5")
        ),
        "eps 0.001",
        1e-6,
    ),
    (
        FLUX2,
        f"{QWEN}.input_layernorm/out",
        lambda h: (
            rms(h(f"{QWEN}.input_layernorm/in"), eps=1e-3)
            * h.weight("layers.0.input_layernorm.weight", "model")
        ),
        "eps 0.001",
        1e-6,
    ),
    (
        FLUX1,
        "decoder/decoder.mid.block_1.norm1/out",
        lambda h: F.group_norm(h("decoder/decoder.mid.block_1.norm1/in"), 16, *of_middle(h), 1e-3),
        "eps 0.001",
        1e-6,
    ),
    (FLUX1, NORM, raw_query, "QK-norm left out"),
    (FLUX2, NORM, lambda h: rms(raw_query(h)), "QK-norm without its scale"),
    (FLUX1, NORM, lambda h: rms(raw_query(h)) * scale_of(h, "key"), "QK-norm's scales swapped"),
    (FLUX1, NORM, lambda h: scaled_query(h, rms(raw_query(h), 2)), AXIS),
    (FLUX1, NORM, lambda h: scaled_query(h, rms(raw_query(h), (1, 3))), AXIS),
    (FLUX2, NORM, lambda h: scaled_query(h, rms(raw_query(h), 1)), AXIS),
    (
        FLUX2,
        "/single_blocks.0.norm/in.0",
        lambda h: turned(h("/single_blocks.0.norm/in.0"), angles(h, positions(h))),
        "QK-norm after RoPE",
    ),
    (FLUX1, Q, lambda h: early(h, 0), "QK-norm after RoPE"),
    (FLUX1, "/double_blocks.0/attention/k", lambda h: early(h, 1), "QK-norm after RoPE"),
    (FLUX1, Q, lambda h: in_halves(joint(h, 0), angles(h, positions(h))), "RoPE rotates halves"),
    (
        FLUX2,
        Q,
        lambda h: (
            turned(joint(h, 0), angles(h, positions(h))).unflatten(-1, (-1, 2)).mT.flatten(-2)
        ),
        "RoPE's pairs stored as halves",
    ),
    (FLUX2, Q, lambda h: turned(joint(h, 0), -angles(h, positions(h))), "RoPE rotates backwards"),
    (FLUX1, Q, lambda h: joint(h, 0), "RoPE left out"),
    (FLUX1, "rope", lambda h: table(angles(h, positions(h), 2000)), "RoPE's theta"),
    (FLUX2, "rope", lambda h: table(angles(h, positions(h), 10_000)), "RoPE's theta"),
    (FLUX1, "ids/img", transposed, "rows and columns swapped"),
    (
        FLUX2,
        "rope",
        lambda h: table(angles(h, torch.cat([h("ids/txt"), transposed(h)]))),
        "rows and columns swapped",
    ),
    (
        FLUX2,
        Q,
        lambda h: turned(joint(h, 0), angles(h, torch.cat([h("ids/txt"), transposed(h)]))),
        "rows and columns swapped",
    ),
    (FLUX1, "ids/img", lambda h: moved(h, 1, 0), "rows off by one"),
    (
        FLUX2,
        "rope",
        lambda h: table(angles(h, torch.cat([h("ids/txt"), moved(h, 0, 1)]))),
        "columns off by one",
    ),
    (
        FLUX1,
        Q,
        lambda h: turned(joint(h, 0), angles(h, torch.cat([h("ids/txt"), moved(h, 1, 1)]))),
        "rows and columns off by one",
    ),
    (FLUX2, "ids/txt", lambda h: 0 * h("ids/txt"), "text positions"),
    (FLUX1, "rope", lambda h: table(angles(h, positions(h).roll(30, 0))), "text and image order"),
    (
        FLUX2,
        "/single_blocks.0/in.0",
        lambda h: torch.cat(h("/single_blocks.0/in.0").split([64, 30], 1)[::-1], 1),
        "text and image order",
    ),
    (
        FLUX1,
        "/final_layer/in.0",
        lambda h: h("/single_blocks.1/out")[:, :30],
        "text and image order",
    ),
    (FLUX1, "/double_blocks.0.img_attn.norm/in.0", by_heads, "q, k, v split by heads"),
    (
        FLUX1,
        "/double_blocks.0.img_mlp.1/out",
        lambda h: gelu(h("/double_blocks.0.img_mlp.1/in")),
        "GELU by erf",
    ),
    (FLUX1, f"{CLIP}.mlp.fc2/in", lambda h: gelu(h(f"{CLIP}.mlp.fc1/out")), "GELU by erf"),
    (
        FLUX1,
        f"{T5}.1.DenseReluDense.wo/in",
        lambda h: gelu(h(f"{T5}.1.DenseReluDense.wi_0/out")) * h(f"{T5}.1.DenseReluDense.wi_1/out"),
        "GELU by erf",
    ),
    (FLUX2, "/double_blocks.0.img_mlp.1/out", gated, "gate and value swapped"),
    (
        FLUX2,
        "/double_blocks.0/attention/out",
        lambda h: attended(h, "/double_blocks.0", scale=32**0.5),
        "attention not scaled",
    ),
    (
        FLUX1,
        "/double_blocks.0/attention/out",
        lambda h: attended(h, "/double_blocks.0", hidden=padded(h, 54)),
        "padding of the prompt masked",
    ),
    (
        FLUX2,
        "/single_blocks.1/attention/out",
        lambda h: attended(h, "/single_blocks.1", hidden=padded(h, 94)),
        "padding of the prompt masked",
    ),
    (
        FLUX1,
        f"{T5}.0.SelfAttention/attention/out",
        lambda h: attended(
            h, f"{T5}.0.SelfAttention", 8**0.5, padded(h, 24), h(f"{T5}.0.SelfAttention/in.1")
        ),
        "padding of the prompt masked",
    ),
    (
        FLUX2,
        "text/features",
        lambda h: h("text/features") * ~padded(h, 64)[:, None],
        "padding of the prompt zeroed",
    ),
    (
        FLUX2,
        f"{QWEN}.self_attn/attention/out",
        lambda h: attended(h, f"{QWEN}.self_attn", hidden=causal(64)),
        "padding of the prompt seen",
    ),
    (FLUX2, f"{QWEN}/in.2", lambda h: ~causal(64)[None, None], "padding of the prompt seen"),
    (
        FLUX1,
        f"{NO}/double_blocks.0/attention/out",
        lambda h: attended(h, f"{NO}/double_blocks.0", hidden=padded(h, 54, "text/negative")),
        "padding of the prompt masked",
    ),
    (
        FLUX1,
        f"{NO}/double_blocks.0.img_attn.norm/out.0",
        lambda h: raw(h, 0, "img", NO),
        "QK-norm left out",
    ),
    (
        FLUX1,
        "negative/rope",
        lambda h: table(angles(h, torch.cat([h("negative/ids/txt"), transposed(h)]))),
        "rows and columns swapped",
    ),
    (FLUX1, "text/pooled", in_clip, "pooled at the last token"),
    (
        FLUX1,
        "text/negative/clip/out",
        lambda h: in_clip(h, "text/negative"),
        "pooled at the last token",
    ),
    (
        FLUX2,
        "text/model/out",
        lambda h: torch.cat(
            [h(f"text/model/{part}/out") for part in ("embed_tokens", "layers.0", "layers.2")],
            dim=-1,
        ),
        "hidden states off by one",
    ),
    (FLUX1, "step.002/time_in/in", lambda h: waves(t_of(h, 2)), "t not times 1000"),
    (FLUX1, "/guidance_in/in", lambda h: waves(3.3), "t not times 1000"),
    (FLUX1, "step.002/time_in/in", lambda h: waves(1000 * bf16(t_of(h, 2))), BF16),
    (FLUX2, "step.002/time_in/in", lambda h: waves(bf16(1000 * bf16(t_of(h, 2)))), BF16),
    (FLUX1, "step.002/time_in/in", lambda h: waves(bf16(1000 * t_of(h, 2))), BF16),
    (FLUX2, "/time_in/in", lambda h: waves(1000).roll(128, -1), "sines before cosines"),
    (FLUX2, "/time_in/in", lambda h: waves(1000, last=127), "frequencies off by one"),
    (FLUX2, "/time_in/in", lambda h: waves(1000 * t_of(h, 2)), "schedule off by one"),
    (
        FLUX1,
        "schedule",
        lambda h: shifted(h, math.exp(mu(h)), torch.tensor([2, 1, 0]).double() / 3),
        "schedule off by one",
    ),
    (
        FLUX1,
        "schedule",
        lambda h: shifted(h, math.exp(mu(h)), torch.tensor([3, 2, 1]).double() / 3),
        "schedule off by one",
    ),
    (FLUX2, "schedule", lambda h: torch.tensor([1, 0.5, 0]), "schedule unshifted"),
    (
        FLUX1,
        "schedule",
        lambda h: shifted(h, mu(h), torch.tensor([1, 0.5, 0]).double()),
        "schedule's mu",
    ),
    (
        FLUX2,
        "schedule",
        lambda h: shifted(h, math.exp(mu(h)), torch.tensor([1, 0.5, 0]).double()),
        "schedule's mu",
    ),
    (FLUX1, "schedule", lambda h: 1000 * h("schedule"), "t times 1000"),
    (FLUX1, "noise", lambda h: regrouped(h("noise"), 1, (1, 2, 0)), PACKING),
    (FLUX1, "noise", lambda h: regrouped(h("noise"), 1, (0, 2, 1)), PACKING),
    (FLUX2, "/in", lambda h: regrouped(h("/in"), 2, (1, 2, 0)), PACKING),
    (
        FLUX1,
        "decoder/decoder/in",
        lambda h: spread_out(
            h("step.002/latents") * statistics(h)[1] + statistics(h)[0], (1, 2, 0)
        ),
        PACKING,
    ),
    (
        FLUX2,
        "decoder/decoder/in",
        lambda h: spread_out(
            h("step.002/latents") * statistics(h)[1] + statistics(h)[0], (0, 2, 1)
        ),
        PACKING,
    ),
    (
        FLUX1,
        "/in",
        lambda h: h("/in").unflatten(1, (5, 6)).transpose(1, 2).flatten(1, 2),
        "image tokens column by column",
    ),
    (
        FLUX1,
        "noise",
        lambda h: torch.randn(1, 64, 5, 6, generator=torch.Generator().manual_seed(5)),
        "noise drawn in another layout",
    ),
    (FLUX1, "/out", lambda h: -h("/out"), "velocity's sign"),
    (FLUX2, "/latents", lambda h: stepped(h, t_of(h, 1) - t_of(h, 2)), "velocity's sign"),
    (FLUX1, "/latents", lambda h: stepped(h, t_of(h, 3) - t_of(h, 2)), "schedule off by one"),
    (FLUX1, "/velocity", lambda h: h("/out"), "guidance left out"),
    (
        FLUX1,
        "/velocity",
        lambda h: guided(h, lambda a, b: a + 2.5 * (b - a)),
        "guidance the wrong way",
    ),
    (
        FLUX1,
        "/velocity",
        lambda h: guided(h, lambda a, b: a + 2.5 * (a - b)),
        "guidance from the prompt",
    ),
    (
        FLUX2,
        "decoder/decoder/in",
        lambda h: spread_out(h("step.002/latents")),
        "latent normalisation missing",
    ),
    (
        FLUX1,
        "decoder/decoder/in",
        lambda h: spread_out(h("step.002/latents")),
        "latent normalisation missing",
    ),
    (
        FLUX1,
        "decoder/decoder/in",
        lambda h: spread_out(h("step.002/latents") / 0.3611),
        "latent normalisation half missing",
    ),
    (
        FLUX2,
        "decoder/decoder/in",
        lambda h: spread_out(h("step.002/latents") + statistics(h)[0]),
        "latent normalisation half missing",
    ),
    (
        FLUX1,
        "decoder/decoder/in",
        lambda h: spread_out((h("step.002/latents") + statistics(h)[0]) * statistics(h)[1]),
        "latent normalisation in the wrong order",
    ),
    (
        FLUX2,
        "decoder/decoder/in",
        lambda h: spread_out((h("step.002/latents") - statistics(h)[0]) / statistics(h)[1]),
        "latent normalisation inverted",
    ),
    (
        FLUX1,
        f"decoder/{UP}.conv/out",
        lambda h: F.conv2d(
            F.interpolate(h(f"decoder/{UP}/in"), scale_factor=2, mode="bilinear"),
            *of_upsampling(h),
            padding=1,
        ),
        "upsampling smooth",
    ),
    (FLUX1, "image", level, "pixels truncated", 1e-3),
    (FLUX2, "image", lambda h: h("image").flip(-1), "red and blue swapped"),
)


def write_port(folder: Path, tensors: dict[str, Tensor]) -> Capture:
    """Write the plain file that a port in another language writes."""
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "port.safetensors")
    return Capture(folder / "port.safetensors")


def examine(
    port: Capture, reference: Capture, pipe, tolerance: float | None = None
) -> Diagnosis | None:
    return diagnose(compare(port, reference, tolerance), port, reference, pipe)


@pytest.mark.parametrize(
    "case",
    KNOWN,
    ids=[re.sub("^/", "", f"{case[1]} {case[3]}").replace("/", ":") for case in KNOWN],
)
def test_known_bug_is_named(case, pipes, captures, tmp_path):
    model, name, by_hand, expected, *tolerance = case
    reference, full = captures[model], f"step.001{name}" if name.startswith("/") else name
    wrong, right = by_hand(Hand(reference, pipes[model])), reference.tensors[full]
    assert wrong.shape == right.shape
    port = write_port(tmp_path, {full: wrong.to(right.dtype)})
    found = examine(port, reference, pipes[model], *tolerance)
    assert found.bug and found.bug.name == expected, format_diagnosis(found)
    assert found.baseline_error is None
    assert f"cause: {expected}: {found.bug.description}" in format_diagnosis(found)


def test_every_known_bug_is_tested():
    tested = {case[3] for case in KNOWN}
    tested |= {"downsampling padded on all sides", "t kept in float32"}
    elsewhere = {bug.name for bug in BUGS_IN_BLOCKS}  # test_bugs_in_blocks.py
    untested = {bug.name for bug in KNOWN_BUGS} - tested - elsewhere
    assert untested == {"eps 1e-06", "eps 1e-08", "eps 0.0001"}  # like eps 1e-05 and 0.001


def test_bugs_of_encoding_are_named(pipes, tmp_path):
    """Stride 2 with zeros on all sides: the encoder pads at the right and bottom only."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    pipe = pipes[FLUX2]
    request = replace(WIDE, images=ImageInputs((Image.fromarray(pixels),)))
    path = tmp_path / "reference.safetensors"
    reference = capture(pipe, request, path, Selection(("encoder.1",)))
    h, name = Hand(reference, pipe), "encoder.1/encoder.down.0.downsample"
    conv = "encoder.down.0.downsample.conv"
    weight, bias = (h.weight(f"{conv}.{key}", "image_encoder") for key in ("weight", "bias"))
    wrong = F.conv2d(h(f"{name}/in"), weight, bias, stride=2, padding=1)
    found = examine(write_port(tmp_path, {f"{name}/out": wrong.float()}), reference, pipe)
    assert found.bug.name == "downsampling padded on all sides"
    mean, std = statistics(h)
    latents = reference.tensors["encoder.1/latents"].double() * std + mean
    port = write_port(tmp_path, {"encoder.1/latents": latents.float()})
    assert examine(port, reference, pipe).bug.name == "latent normalisation missing"


def test_bug_in_cached_references_is_named(pipes, tmp_path):
    """Cached references have positions of their own."""
    images = ImageInputs((Image.new("RGB", (80, 64), "teal"),), kv_cache=True)
    path = tmp_path / "reference.safetensors"
    request = replace(WIDE, images=images)
    reference = capture(pipes[FLUX2], request, path, Selection(("references",)))
    h, place = Hand(reference, pipes[FLUX2]), "references/double_blocks.0"
    k = h(f"{place}.img_attn.norm/out.1")
    wrong = in_halves(k, angles(h, h("references/ids/img")))
    port = write_port(tmp_path, {f"{place}/attention/k": wrong.float()})
    found = examine(port, reference, pipes[FLUX2])
    assert found.bug.name == "RoPE rotates halves" and found.baseline_error is None


# ---------------------------------------------------------------- ports with other tensors


def test_output_of_a_block_is_enough(pipes, captures, tmp_path):
    reference, block = captures[FLUX1], pipes[FLUX1].transformer().single_blocks[0]
    x, rope, shift, scale, gate = (
        reference.tensors[f"step.001/single_blocks.0/{tap}"]
        for tap in ("in.0", "arg.1", "arg.2", "arg.3", "arg.4")
    )
    with torch.inference_mode():
        wrong = block(x, rope, transformer.ModulationOut(shift=scale, scale=shift, gate=gate))
    port = write_port(tmp_path, {"step.001/single_blocks.0/out": wrong})
    assert examine(port, reference, pipes[FLUX1]).bug.name == "shift and scale swapped"


def test_output_of_a_network_is_enough(pipes, captures, tmp_path):
    reference, network = captures[FLUX2], pipes[FLUX2].transformer()
    t = reference.tensors
    with torch.inference_mode():
        rope = network.rope(t["ids/txt"], transposed(Hand(reference, pipes[FLUX2])))
        (mods,) = network.modulations([t["step.001/vec"]])
        wrong = network.denoise(t["step.001/in"], t["text/features"], rope, mods)
    found = examine(write_port(tmp_path, {"step.001/out": wrong}), reference, pipes[FLUX2])
    assert found.bug.name == "rows and columns swapped" and found.baseline_error is None


def test_bug_in_one_place_of_several_is_named(pipes, captures, tmp_path):
    """Shift and scale are swapped in the MLP only; those of attention are right."""
    reference = captures[FLUX1]
    h, proj = Hand(reference, pipes[FLUX1]), "/double_blocks.0.img_attn.proj/out"
    gate, shift, scale = (h(f"/double_blocks.0/arg.{number}") for number in (5, 6, 7))
    x = h("/double_blocks.0/in.0") + gate * h(proj)
    wrong = {
        f"step.001{proj}": h(proj).float(),
        "step.001/double_blocks.0.img_mlp/in": ((1 + shift) * normed(x) + scale).float(),
    }
    found = examine(write_port(tmp_path, wrong), reference, pipes[FLUX1])
    assert found.row.name.endswith("img_mlp/in") and found.bug.name == "shift and scale swapped"


def test_bug_in_bfloat16_is_named(folder, tmp_path):
    """Rounding moves the tensor by about a hundredth, the bug by more."""
    pipe = flux.load(FLUX2, weights=folder, device="cpu", fast=False, dtype=torch.bfloat16)
    reference = capture(pipe, WIDE, tmp_path / "reference.safetensors", Selection(("step.001",)))
    h, block = Hand(reference, pipe), "/single_blocks.0"
    shift, scale = h(f"{block}/arg.2"), h(f"{block}/arg.3")
    wrong = ((1 + shift) * normed(h(f"{block}/in.0")) + scale).bfloat16()
    port = write_port(tmp_path, {f"step.001{block}.linear1/in": wrong})
    found = examine(port, reference, pipe)
    assert found.bug.name == "shift and scale swapped" and 1e-4 < found.trials[0].distance < 1e-2


def test_missing_rounding_is_named(folder, tmp_path):
    pipe = flux.load(
        FLUX2, weights=folder, device="cpu", fast=False, dtype=torch.bfloat16, numerics="bfl"
    )
    path = tmp_path / "reference.safetensors"
    reference = capture(pipe, WIDE, path, Selection(("time_in", "schedule")))
    wrong = waves(1000 * t_of(Hand(reference, pipe), 2)).bfloat16()
    found = examine(write_port(tmp_path, {"step.002/time_in/in": wrong}), reference, pipe)
    assert found.bug.name == "t kept in float32" and found.baseline_error is None


def test_probe_of_the_port_is_enough(pipes, captures, tmp_path):
    reference, name = captures[FLUX1], "step.001/double_blocks.0.img_mlp.1/out"
    wrong = gelu(reference.tensors[name.replace("out", "in")].double()).float()
    with Writer(tmp_path / "port.safetensors", {}) as writer:
        writer.add(name, wrong, "probe")
    port = Capture(tmp_path / "port.safetensors")
    assert port.kind(name) == "probe"
    assert examine(port, reference, pipes[FLUX1]).bug.name == "GELU by erf"


def test_equal_tensors_need_no_diagnosis(pipes, captures, tmp_path):
    reference = captures[FLUX1]
    port = write_port(tmp_path, {f"step.001{NORM}": reference.tensors[f"step.001{NORM}"]})
    assert examine(port, reference, pipes[FLUX1]) is None


def test_unknown_bug_matches_none(pipes, captures, tmp_path):
    reference, name = captures[FLUX1], f"step.001{QKV}"
    right = reference.tensors[name]
    noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(0))
    broken = right.clone()
    broken[0, 3, 7] = torch.nan
    for wrong in (noise, right + 0.01 * noise, 1.02 * right, broken):
        found = examine(write_port(tmp_path, {name: wrong}), reference, pipes[FLUX1])
        assert found.bug is None and found.baseline_error is None and len(found.trials) > 3
        assert f"none of the {len(KNOWN_BUGS)} known bugs matches" in format_diagnosis(found)
    found = examine(write_port(tmp_path, {name: right[:, :7]}), reference, pipes[FLUX1])
    assert found.bug is None and "(1, 7, 128)" in format_diagnosis(found)


def of_diffusers(pipe, reference: Capture, path: Path) -> Capture:
    """Run diffusers' transformer on the first step; its own attention would round as ours does."""
    kept, transformer = {}, pipe.transformer()
    theirs = compare_live.with_weights_of(transformer, pipe)
    wanted = {f"step.001/{name}": match for name, match in matches_of(transformer).items()}
    inputs = compare_live.inputs_of_pass(reference, "step.001", pipe)
    gather = Gather(wanted, kept.__setitem__)
    with torch.inference_mode(), watching({"": theirs}, gather), sdpa_kernel(SDPBackend.MATH):
        diffusers_velocity(theirs, **inputs)
    return write_port(path.parent, kept)


def with_plain_attention(pipe, reference: Capture, path: Path) -> Capture:
    with sdpa_kernel(SDPBackend.MATH):
        return capture(pipe, WIDE, path)


def compiled(pipe, reference: Capture, path: Path) -> Capture:
    if not can_compile(pipe.device):
        pytest.skip("needs a compiler of C++")
    module = pipe.transformer().double_blocks[0].img_attn.norm.query_norm  # hooks are around it
    module.forward = torch.compile(module.forward, fullgraph=True)
    return capture(pipe, WIDE, path)


@pytest.mark.parametrize("port", [of_diffusers, with_plain_attention, compiled])
def test_honest_port_has_no_cause(port, folder, pipes, captures, tmp_path):
    """It passes. Where the tolerance is below its rounding, no bug is blamed for that."""
    pipe = flux.load(FLUX2, weights=folder, device="cpu", fast=False, dtype=torch.float32)
    reference = captures[FLUX2]
    taken = port(pipe, reference, tmp_path / "taken.safetensors")
    assert examine(taken, reference, pipes[FLUX2]) is None
    seen = [row.errors.relative_l2 for row in compare(taken, reference, 0.0) if row.over]
    assert seen, "the port rounds as the reference does: this tests nothing"
    for tolerance in (0.9 * seen[0], 0.9 * max(seen)):
        found = examine(taken, reference, pipes[FLUX2], tolerance)
        assert found.bug is None and found.baseline_error is None, format_diagnosis(found)


def test_other_weights_than_the_reference_are_reported(pipes, captures, folder, tmp_path):
    pipe = flux.load(FLUX2, weights=folder, device="cpu", fast=False, dtype=torch.float32)
    pipe.transformer().single_blocks[0].linear1.weight.mul_(1.1)
    reference, name = captures[FLUX2], "step.001/single_blocks.0.linear1/out"
    port = write_port(tmp_path, {name: 2 * reference.tensors[name]})
    found = examine(port, reference, pipe)
    assert found.bug is None and found.baseline_error == pytest.approx(0.1, rel=1e-3)
    assert "They are not the weights that the reference was captured with" in format_diagnosis(
        found
    )


def test_smallest_run_around_a_tensor_comes_first(pipes, captures):
    name = "step.001/double_blocks.0.img_attn.norm/out.0"
    found = reruns(name, captures[FLUX1], pipes[FLUX1], previous=None)
    assert found[0].unpatched.equal(captures[FLUX1].tensors[name])
    assert [rerun.late for rerun in found[:2]] == [False, True]
    assert not any(rerun.run.is_network for rerun in found)


# ---------------------------------------------------------------- the command


def test_command_diagnose(parity, pipes, captures, folder, tmp_path):
    reference = captures[FLUX1]
    port = write_port(tmp_path, {"ids/img": transposed(Hand(reference, pipes[FLUX1]))})
    files = port.path, reference.path
    for command in ("diagnose", "doctor"):  # the old name
        code, out, _ = parity(command, *files, "--weights", folder, "--device", "cpu")
        assert code == 1 and "the first is ids/img" in out
        assert "cause: rows and columns swapped: an image token's position" in out
    copy = shutil.copy(reference.path, tmp_path / "copy.safetensors")
    code, out, err = parity("diagnose", copy, reference.path)
    assert code == 0 and out.startswith("all ") and "shows nothing about a port" in err
    code, _, err = parity("diagnose", reference.path, reference.path)
    assert code == 2 and "is the same file as" in err
    code, _, err = parity("diagnose", reference.path, port.path)
    assert code == 2 and "is a plain file" in err
