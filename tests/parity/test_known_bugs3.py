"""flux.parity.diagnose for FLUX 3: each known bug, made by hand in float64, is named.

Nothing of ours computes the port's tensors. An honest port gets no diagnosis.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.by_hand import (
    Hand,
    attended,
    bf16,
    causal,
    gelu,
    in_halves,
    normed,
    rms,
    spread_out,
    table,
    turned,
    waves,
)
from support.flux3_captures import runs
from support.flux3_model import BASE, DISTILLED
from torch import Tensor

from flux import sampling
from flux.parity.bugs_around3 import every_nth_of_1000, layers_of_klein
from flux.parity.capture import Selection, capture
from flux.parity.capture_file import Capture
from flux.parity.compare import compare
from flux.parity.diagnose import diagnose, format_diagnosis
from flux.parity.known_bugs3 import KNOWN_BUGS3, SHARED
from flux.parity.modules import in_dtype

__all__ = ["runs"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* was distilled for")]

IMAGE, COND, TEXT = "content_mode_blocks.image", "content_mode_blocks.image_cond", "txt_mode_blocks"
SINGLE = "single_blocks"
QWEN = "text/model/layers.0"
RIGHT = torch.arange(80)


# ---------------------------------------------------------------- parts by hand


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def linear(h: Hand, layer: str, x: Tensor) -> Tensor:
    return x @ h.weight(f"{layer}.weight").T


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 32)).transpose(1, 2)


def modulate(h: Hand, block: str, x: Tensor, shift: int = 2, scale: int = 3) -> Tensor:
    return (1 + h(f"/{block}/arg.{scale}")) * x + h(f"/{block}/arg.{shift}")


def angle(h: Hand, ids: Tensor, theta: float = 10_000) -> Tensor:
    exponents = torch.arange(0, 8, 2).double() / 8
    return torch.cat([ids[:, [axis]].double() * theta**-exponents for axis in range(4)], dim=-1)


def of_block(h: Hand, block: str, tap: str = "query") -> Tensor:
    """Normalised queries or keys before RoPE, (B, H, N, d)."""
    return h(f"/{block}.norm/out.{('query', 'key').index(tap)}")


def with_ids(h: Hand, mode: str, *columns: float, add=(0, 0, 0, 0)) -> Tensor:
    """Positions of a mode with each axis times a number, plus a number."""
    return h(f"ids/{mode}").double() * torch.tensor(columns) + torch.tensor(add)


def joint_ids(h: Hand, **others: Tensor) -> Tensor:
    return torch.cat([others.get(m, h(f"ids/{m}").double()) for m in ("txt", "img", "references")])


def rest_of_block(h: Hand, block: str, hidden: Tensor, attention: bool = True) -> Tensor:
    """The output of a block, from the activation of its MLP."""
    out = linear(h, f"{block}.mlp_out", hidden)
    if attention:
        out = out + h(f"/{block}.attn_out/out")
    return h(f"/{block}/in.0") + h(f"/{block}/arg.4") * out


def single_block(h: Hand, number: int, x: Tensor) -> Tensor:
    """The block of this number on other tokens of text and image."""
    block, ids = f"{SINGLE}.{number}", torch.cat([h("ids/txt").double(), h("ids/img").double()])
    y = modulate(h, block, normed(x))
    q, k, v = (heads(linear(h, f"{block}.{name}_proj", y)) for name in "qkv")
    norms = [h.weight(f"{block}.norm.{name}_norm.scale") for name in ("query", "key")]
    q, k = (turned(rms(part) * norm, angle(h, ids)) for part, norm in zip((q, k), norms))
    out = torch.softmax(q @ k.mT / 32**0.5, dim=-1) @ v
    attended = linear(h, f"{block}.attn_out", out.transpose(1, 2).flatten(2))
    gate, up = linear(h, f"{block}.mlp_in", y).chunk(2, dim=-1)
    hidden = linear(h, f"{block}.mlp_out", silu(gate) * up)
    return x + h(f"/{block}/arg.4") * (attended + hidden)


def halves(h: Hand, block: str) -> tuple[Tensor, Tensor]:
    return h(f"/{block}.mlp_in/out").chunk(2, dim=-1)


def vec_of(h: Hand, t: float, target: float | None) -> Tensor:
    """The conditioning vector of any times."""
    out = torch.zeros(1, 1, 128).double()
    for name, time in (("time_in", t), ("ref_time_in", target)):
        if time is not None:
            hidden = silu(waves(1000 * time) @ h.weight(f"{name}.in_layer.weight").T)
            out = out + hidden @ h.weight(f"{name}.out_layer.weight").T
    return out


def time(h: Hand, index: int) -> float:
    return h("schedule")[index].item()


def language_rope(h: Hand, position: Tensor, theta: float = 5e6, frequency=lambda x: x) -> Tensor:
    """cos and sin of (L,) positions, (2, 1, 1, L, 16), as the layers get them."""
    waves = frequency(theta ** -(torch.arange(0, 16, 2).float() / 16)).double()
    half = position.double()[:, None] * waves
    both = torch.cat([half, half], dim=-1)
    return torch.stack([both.cos(), both.sin()])[:, None, None]


def real(h: Hand) -> int:
    return int(h("text/model/in.1").sum())


def positions(h: Hand, padding) -> Tensor:
    return torch.where(h("text/model/in.1")[0], RIGHT, padding)


def language_query(h: Hand, rope: Tensor) -> Tensor:
    q = h(f"{QWEN}.self_attn.q_norm/out").transpose(1, 2)  # (1, H, L, d)
    cos, sin = rope[0], rope[1]
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat([-b, a], dim=-1) * sin


def ids_of_text(h: Hand, text: str) -> Tensor:
    tokenizer = h.pipe.text.tokenizer.tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(text).ids
    end = tokenizer.token_to_id("<|endoftext|>")
    return torch.tensor([ids + [end] * (-len(ids) % 80)])


def times_of(shift: float, u: Tensor) -> Tensor:
    return shift * u / (1 + (shift - 1) * u)


def drawn(h: Hand, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def as_latents(h: Hand, tokens: Tensor) -> Tensor:
    rows, columns = h("noise").shape[2:]
    return tokens.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


def decoded(h: Hand, eps: float) -> Tensor:
    mean, var = (h.weight(f"bn.running_{key}", "autoencoder")[:, None, None] for key in MOMENTS)
    return spread_out(h("step.002/latents") * (var + eps).sqrt() + mean)


MOMENTS = ("mean", "var")
PROMPT = "a photo of a cat"
USER, ASSISTANT = f"<|im_start|>user\n{PROMPT}<|im_end|>\n", "<|im_start|>assistant\n"
EVEN = torch.tensor([1, 0.5, 0]).double()
Q = f"/{SINGLE}.0/attention/q"

# model, tensor, what a port has there, the bug's name, words of the description, and a tolerance
CASES = (
    # weights
    (BASE, f"/{COND}.0.q_proj/out",
     lambda h: linear(h, f"{IMAGE}.0.q_proj", h(f"/{COND}.0.q_proj/in")),
     "weights of another module", f"{IMAGE}.0.q_proj"),
    (BASE, "/emb_in.image_cond/out",
     lambda h: linear(h, "emb_in.image", h("/emb_in.image_cond/in")),
     "weights of another module", "emb_in.image are"),
    (DISTILLED, "/single_stream_modulations.txt.lin/out",
     lambda h: linear(h, "early_stream_modulations.txt.lin",
                      h("/single_stream_modulations.txt.lin/in")),
     "weights of another module", "early_stream_modulations.txt.lin"),
    (DISTILLED, f"/{SINGLE}.1.mlp_in/out",
     lambda h: linear(h, f"{SINGLE}.2.mlp_in", h(f"/{SINGLE}.1.mlp_in/in")),
     "weights of another module", "numbers sorted as texts?"),
    (DISTILLED, f"/{TEXT}.0.k_proj/out",
     lambda h: linear(h, f"{TEXT}.0.v_proj", h(f"/{TEXT}.0.k_proj/in")),
     "weights of another module", f"{TEXT}.0.v_proj"),
    (DISTILLED, "/ref_time_in.in_layer/out",
     lambda h: linear(h, "time_in.in_layer", h("/ref_time_in.in_layer/in")),
     "weights of another module", "time_in.in_layer"),

    # modulation
    (BASE, f"/{COND}.0.q_proj/in",
     lambda h: modulate(h, f"{COND}.0", normed(h(f"/{COND}.0/in.0")), 3, 2),
     "shift and scale swapped", "used as its scale"),
    (DISTILLED, "/final_layer.image.linear/in",
     lambda h: (lambda scale, shift: (1 + scale) * normed(h("/final_layer.image/in.0")) + shift)(
         *h("/final_layer.image.adaLN_modulation.1/out").chunk(2, dim=-1)),
     "shift and scale swapped", ""),
    (DISTILLED, "/final_layer.image.adaLN_modulation.1/out",
     lambda h: h("/final_layer.image.adaLN_modulation.1/out").roll(128, -1),
     "shift and scale swapped", "as in diffusers' files"),
    (DISTILLED, "/early_stream_modulations.image/out.0",
     lambda h: h("/early_stream_modulations.image/out.2"),
     "order of a modulation", ""),
    (DISTILLED, f"/{SINGLE}.0.q_proj/in",
     lambda h: h(f"/{SINGLE}.0/arg.3") * normed(h(f"/{SINGLE}.0/in.0")) + h(f"/{SINGLE}.0/arg.2"),
     "1 + scale missing", ""),
    (DISTILLED, f"/{IMAGE}.0.q_proj/in", lambda h: normed(h(f"/{IMAGE}.0/in.0")),
     "modulation left out", "modulation is not applied"),
    (DISTILLED, "/single_stream_modulations.image/in", lambda h: silu(silu(h("/vec"))),
     "SiLU twice", ""),
    (DISTILLED, "/early_stream_modulations.txt/in", lambda h: h("/vec_0"), "SiLU missing", ""),
    (DISTILLED, f"/{SINGLE}.0/out",
     lambda h: h(f"/{SINGLE}.0/in.0") + h(f"/{SINGLE}.0.attn_out/out")
     + h(f"/{SINGLE}.0.mlp_out/out"), "gate of a residual", "the gate is left out"),
    (BASE, "/early_stream_modulations.image_cond/in", lambda h: silu(h("/vec")),
     "time of another mode", "text or references are modulated by t"),
    (DISTILLED, "/single_stream_modulations.txt/out.1",
     lambda h: linear(h, "single_stream_modulations.txt.lin", silu(h("/vec"))).chunk(3, -1)[1],
     "time of another mode", "text or references are modulated by t"),
    (DISTILLED, "/final_layer.image/in.1", lambda h: h("/vec_0"),
     "time of another mode", "the image is modulated by time 0"),

    # time
    (DISTILLED, "step.002/time_in.in_layer/in", lambda h: waves(time(h, 1)),
     "t not times 1000", ""),
    (DISTILLED, "step.002/time_in.in_layer/in", lambda h: waves(1000 * bf16(time(h, 1))),
     "rounding of 1000 t", "t is rounded to bfloat16"),
    (DISTILLED, "step.001/ref_time_in.in_layer/in", lambda h: waves(bf16(1000 * bf16(time(h, 1)))),
     "rounding of 1000 t", "t and 1000 t"),
    (DISTILLED, "/time_in.in_layer/in", lambda h: waves(1000).roll(128, -1),
     "sines before cosines", ""),
    (DISTILLED, "/time_in.in_layer/in", lambda h: waves(1000, last=127),
     "frequencies off by one", ""),
    (DISTILLED, "/time_in/in", lambda h: torch.tensor([time(h, 1)]),
     "time of a step", "the time of the next one"),
    (DISTILLED, "/ref_time_in/in", lambda h: torch.ones(1), "target time", "the step's own time"),
    (DISTILLED, "/ref_time_in.in_layer/in", lambda h: waves(0), "target time", "is 0"),
    (DISTILLED, "/vec", lambda h: vec_of(h, 1, 1), "target time", "the step's own time"),
    (DISTILLED, "/vec_0", lambda h: vec_of(h, 0, None), "target time left out", ""),

    # norms and attention
    (DISTILLED, f"/{SINGLE}.0.norm.query_norm/out", lambda h: h(f"/{SINGLE}.0.norm.query_norm/in"),
     "QK-norm left out", ""),
    (BASE, f"/{COND}.1.norm/out.1", lambda h: rms(h(f"/{COND}.1.norm/in.1")),
     "QK-norm without its scale", ""),
    (DISTILLED, f"/{TEXT}.0.norm/out.0",
     lambda h: rms(h(f"/{TEXT}.0.norm/in.0")) * h.weight(f"{TEXT}.0.norm.key_norm.scale"),
     "QK-norm's scales swapped", ""),
    (DISTILLED, f"/{TEXT}.0.norm/out.0",
     lambda h: rms(h(f"/{TEXT}.0.norm/in.0"), 2) * h.weight(f"{TEXT}.0.norm.query_norm.scale"),
     "QK-norm over the wrong axis", "over tokens"),
    (DISTILLED, f"/{TEXT}.0.norm/out.1",
     lambda h: rms(h(f"/{TEXT}.0.norm/in.1"), (1, 3)) * h.weight(f"{TEXT}.0.norm.key_norm.scale"),
     "QK-norm over the wrong axis", "all heads together"),
    (DISTILLED, f"/{IMAGE}.0/attention/q",
     lambda h: rms(turned(h(f"/{IMAGE}.0.norm/in.0"), angle(h, h("ids/img"))))
     * h.weight(f"{IMAGE}.0.norm.query_norm.scale"), "QK-norm after RoPE", ""),
    (DISTILLED, f"/{IMAGE}.0/attention/q",
     lambda h: in_halves(of_block(h, f"{IMAGE}.0"), angle(h, h("ids/img"))),
     "RoPE rotates halves", ""),
    (DISTILLED, f"/{IMAGE}.0/attention/k",
     lambda h: turned(of_block(h, f"{IMAGE}.0", "key"), -angle(h, h("ids/img"))),
     "RoPE rotates backwards", ""),
    (DISTILLED, f"/{TEXT}.1/attention/q", lambda h: of_block(h, f"{TEXT}.1"), "RoPE left out", ""),
    (DISTILLED, f"/{SINGLE}.0/attention/out",
     lambda h: attended(h, f"/{SINGLE}.0", scale=32**-0.5), "scale of attention", "not its square"),
    (DISTILLED, f"/{IMAGE}.0.attn_out/in",
     lambda h: h(f"/{IMAGE}.0/attention/out").permute(0, 2, 3, 1).flatten(2),
     "heads merged the wrong way", ""),
    (DISTILLED, f"/{SINGLE}.0/attention/out",
     lambda h: attended(h, f"/{SINGLE}.0", hidden=F.pad(~h("text/model/in.1")[0], (0, 20))),
     "padding of the prompt masked", ""),
    (DISTILLED, f"/{TEXT}.0/attention/out",
     lambda h: attended(h, f"/{TEXT}.0", hidden=~h("text/model/in.1")[0]),
     "padding of the prompt masked", ""),
    (DISTILLED, f"/{IMAGE}.0/attention/out",
     lambda h: attended(h, f"/{IMAGE}.0", hidden=causal(20)), "attention masked", ""),

    # blocks
    (DISTILLED, f"/{SINGLE}.0.mlp_out/in",
     lambda h: (lambda gate, up: gate * silu(up))(*halves(h, f"{SINGLE}.0")),
     "gate and value swapped", ""),
    (BASE, f"/{COND}.0/out",
     lambda h: (lambda gate, up: rest_of_block(h, f"{COND}.0", gelu(gate) * up))(
         *halves(h, f"{COND}.0")), "another activation", "GELU"),
    (DISTILLED, f"/{IMAGE}.0.mlp_in/in",
     lambda h: modulate(h, f"{IMAGE}.0", normed(
         h(f"/{IMAGE}.0/in.0") + h(f"/{IMAGE}.0/arg.4") * h(f"/{IMAGE}.0.attn_out/out"))),
     "MLP after attention", ""),
    (DISTILLED, f"/{TEXT}.0/out", lambda h: h(f"/{TEXT}.0/out") - h(f"/{TEXT}.0/in.0"),
     "residual left out", ""),
    (DISTILLED, f"/{SINGLE}.2/in.0", lambda h: h(f"/{SINGLE}.1/in.0"), "block skipped", ""),
    (DISTILLED, f"/{SINGLE}.1/in.0", lambda h: single_block(h, 2, h(f"/{SINGLE}.1/in.0")),
     "order of blocks", f"{SINGLE}.2 ran before"),
    (DISTILLED, "/final_layer.image/in.0", lambda h: h(f"/{SINGLE}.2/in.0")[:, 80:100],
     "block skipped", ""),
    (BASE, f"/{SINGLE}.0/in.0",
     lambda h: torch.cat([h(f"/{each}.1/out") for each in (IMAGE, COND, TEXT)], dim=1),
     "order of the joint sequence", "image, references, text"),
    (DISTILLED, "/final_layer.image/in.0", lambda h: h(f"/{SINGLE}.2/out")[:, :20],
     "tokens of the output", "first"),
    (DISTILLED, f"/{SINGLE}.0/in.0",
     lambda h: torch.cat([h("/txt_in/out"), h("/emb_in.image/out")], dim=1),
     "mode blocks left out", ""),

    # positions
    (DISTILLED, "ids/img", lambda h: with_ids(h, "img", 1, 2, 2, 1),
     "rows and columns not halved", "positions are rows and columns"),
    (BASE, "rope/references", lambda h: table(angle(h, with_ids(h, "references", 1, 2, 2, 1))),
     "rows and columns not halved", "rows and columns"),
    (BASE, Q,
     lambda h: turned(of_block(h, f"{SINGLE}.0"), angle(h, joint_ids(
         h, img=with_ids(h, "img", 1, 2, 2, 1),
         references=with_ids(h, "references", 1, 2, 2, 1)))),
     "rows and columns not halved", "positions are rows and columns"),
    (DISTILLED, "ids/img", lambda h: h("ids/img")[:, [0, 2, 1, 3]],
     "rows and columns swapped", ""),
    (DISTILLED, "ids/img", lambda h: with_ids(h, "img", 1, 1, 1, 1, add=(0, 0.5, 0, 0)),
     "rows and columns off by one", "rows count"),
    (BASE, "ids/references", lambda h: with_ids(h, "references", 1, 1, 1, -1),
     "number of a reference", "references count 1, 2"),
    (BASE, "rope/references",
     lambda h: table(angle(h, with_ids(h, "references", 1, 1, 1, 1)[:, [3, 1, 2, 0]])),
     "number of a reference", "the number is on the first axis"),
    (BASE, f"/{COND}.0/attention/k",
     lambda h: turned(of_block(h, f"{COND}.0", "key"), angle(
         h, with_ids(h, "references", 1, 1, 1, 1, add=(0, 0, 0, 1)))),
     "number of a reference", "references count from 0"),
    (DISTILLED, "ids/txt", lambda h: 0 * h("ids/txt"), "text positions", "not counted"),
    (DISTILLED, f"/{TEXT}.0/attention/q",
     lambda h: turned(of_block(h, f"{TEXT}.0"), angle(
         h, with_ids(h, "txt", 1, 1, 1, 1, add=(0, 0, 0, 1)))),
     "text positions", "count from 1"),
    (DISTILLED, "ids/img", lambda h: h("ids/img")[:, [1, 0, 2, 3]], "order of RoPE's axes", ""),
    (DISTILLED, "rope/img", lambda h: table(angle(h, h("ids/img"), 2000)),
     "RoPE's theta", "0.2 times"),
    (DISTILLED, "rope/img", lambda h: table(angle(h, h("ids/img"))).bfloat16(),
     "RoPE in low precision", "bfloat16"),

    # text
    (DISTILLED, f"{QWEN}/in.1", lambda h: language_rope(h, RIGHT),
     "positions of padding", "counted on"),
    (DISTILLED, f"{QWEN}.self_attn/attention/q",
     lambda h: language_query(h, language_rope(h, positions(h, 0))),
     "positions of padding", "position 0"),
    (DISTILLED, f"{QWEN}.self_attn/attention/q",
     lambda h: language_query(h, language_rope(h, positions(h, real(h) - 1))),
     "positions of padding", "last real token"),
    (DISTILLED, f"{QWEN}/in.1", lambda h: language_rope(h, positions(h, 1), 1e6),
     "language model's theta", "1,000,000,"),
    (DISTILLED, f"{QWEN}/in.1",
     lambda h: language_rope(h, positions(h, 1), frequency=lambda x: x.bfloat16().float()),
     "language model's frequencies rounded", "bfloat16"),
    (DISTILLED, "text/model/in.0",
     lambda h: ids_of_text(h, f"{USER}{ASSISTANT}<think>\n\n</think>\n\n"),
     "template of the prompt", "think block"),
    (DISTILLED, "text/model/in.0", lambda h: ids_of_text(h, USER),
     "template of the prompt", "not opened"),
    (DISTILLED, "text/model/in.0",
     lambda h: F.pad(h("text/model/in.0"), (0, 432), value=int(h("text/model/in.0")[0, -1])),
     "padded length of the prompt", "to 512 tokens"),
    (DISTILLED, "text/features", lambda h: h("text/features")[:, : real(h)],
     "padded length of the prompt", "not at all"),
    (DISTILLED, "text/features",
     lambda h: h("text/features").unflatten(-1, (4, 48)).mT.flatten(-2),
     "order of hidden states", "(channel, layer)"),

    # noise, times, guidance
    (DISTILLED, "noise", lambda h: drawn(h, 1, 16, 4, 5),
     "noise drawn in another layout", "channel by channel, as by diffusers"),
    (DISTILLED, "/in", lambda h: drawn(h, 1, 16, 4, 5).flatten(2).mT,
     "noise drawn in another layout", "channel by channel, as by diffusers"),
    (DISTILLED, "schedule", lambda h: EVEN, "schedule", "even"),
    (DISTILLED, "schedule", lambda h: times_of(3, EVEN), "schedule", "shift is 3"),
    (DISTILLED, "schedule", lambda h: times_of(math.exp(6.93), EVEN), "schedule", "taken for mu"),
    (DISTILLED, "schedule", lambda h: 1 - h("schedule"), "schedule", "from 0 to 1"),
    (DISTILLED, "/latents",
     lambda h: h("noise") + (time(h, 2) - time(h, 1)) * as_latents(h, h("/velocity")),
     "schedule off by one", ""),
    (BASE, "/velocity",
     lambda h: h("/negative/out") + 5 * (h("/out") - h("/negative/out")),
     "scale of guidance", "the scale is 5"),
    (BASE, "/velocity", lambda h: h("/out") + 3 * (h("/out") - h("/negative/out")),
     "guidance from the prompt", ""),

    # input images
    (BASE, "encoder.1/pixels", lambda h: (h("encoder.1/pixels") + 1) / 2,
     "levels of an input image", "from 0 to 1"),
    (BASE, "encoder.2/pixels", lambda h: h("encoder.2/pixels").flip(1), "red and blue swapped", ""),
    (BASE, "conditions/references",
     lambda h: torch.cat(h("conditions/references").split([12, 8], 1)[::-1], 1),
     "order of references", ""),
    (DISTILLED, "decoder/decoder/in", lambda h: decoded(h, 1e-3),
     "eps of the latents' statistics", "0.001", 1e-5),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: re.sub(
    "^/", "", f"{CASES[n][1]} {CASES[n][3]}").replace("/", ":"))  # fmt: skip
def test_known_bug_is_named(number, runs, tmp_path):
    model, name, by_hand, expected, words, *tolerance = CASES[number]
    run = runs[model]
    full = f"step.001{name}" if name.startswith("/") else name
    right = run.taken.tensors[full]
    wrong = by_hand(Hand(run.taken, run.pipe)).to(right.dtype)
    save_file({full: wrong.contiguous()}, tmp_path / "port.safetensors")
    port = Capture(tmp_path / "port.safetensors")
    found = diagnose(compare(port, run.taken, *tolerance), port, run.taken, run.pipe)
    text = format_diagnosis(found)
    assert found.bug and found.bug.name == expected, text
    assert found.baseline_error is None
    assert f"cause: {expected}: " in text and words in text.splitlines()[2], text


def test_guidance_on_the_distilled_model_is_named(runs, tmp_path):
    run = runs[DISTILLED]
    pipe, t = run.pipe, run.taken.tensors
    network, features = pipe.transformer(), pipe.text.encode_one("").tokens
    with torch.inference_mode():
        ids = torch.zeros(features.shape[1], 4)
        ids[:, 3] = torch.arange(len(ids))
        times = t["schedule"][:1], t["schedule"][1:2]
        empty = network(t["step.001/in"], t["ids/img"], features, ids, times[0], target=times[1])
    wrong = empty + 3.5 * (t["step.001/out"] - empty)
    save_file({"step.001/velocity": wrong}, tmp_path / "port.safetensors")
    port = Capture(tmp_path / "port.safetensors")
    found = diagnose(compare(port, run.taken), port, run.taken, pipe)
    assert found.bug.name == "guidance on a distilled model"
    assert found.trials[0].variant == "3.5"


def test_times_of_comfyuis_simple_schedule():
    """Every 62.5th of 1000 entries, truncated: by hand in the last of 16 steps, off by 0.0018."""
    times, right = every_nth_of_1000(16, 1), sampling.schedule("constant", 16, 1)
    u = torch.tensor((1000 - int(15 * 62.5)) / 1000, dtype=torch.float64)  # 937 from the end
    assert times[15].item() == pytest.approx(times_of(6.93, u).item(), abs=1e-12)
    assert (times - right)[15].item() == pytest.approx(0.0018, abs=1e-4)
    assert (times - right).abs().max() < 0.0019 and times[0] == 1 and times[16] == 0


def test_layers_of_klein_are_9_18_and_27():
    """The tiny language model has five layers. A layer's output holds its number here."""

    class Recorded:
        place = "text/model"

        def recorded(self, name: str) -> Tensor:
            number = int(re.fullmatch(r"text/model/layers\.(\d+)/out", name)[1])
            return torch.full((1, 2, 3), float(number + 1))

    assert layers_of_klein(Recorded())[0, 0].tolist() == [9] * 3 + [18] * 3 + [27] * 3


@pytest.mark.parametrize("model", [BASE, DISTILLED])
def test_no_cause_is_named_for_an_honest_port(model, runs, tmp_path):
    """A port in bfloat16 rounds everywhere. Its first tensor over a small tolerance is no bug."""
    run = runs[model]
    only = Selection(("txt_mode_blocks.1", "single_blocks.0", "time_in", "vec", "latents", "rope"))
    half = capture(
        in_dtype(run.pipe, torch.bfloat16), run.request, tmp_path / "half.safetensors", only
    )
    save_file(
        {name: tensor.clone() for name, tensor in half.tensors.items()},
        tmp_path / "plain.safetensors",
    )
    for port in (half, Capture(tmp_path / "plain.safetensors")):
        for tolerance in (1e-3, 1e-2):
            found = diagnose(compare(port, run.taken, tolerance), port, run.taken, run.pipe)
            assert found is None or found.bug is None, format_diagnosis(found)
    again = capture(run.pipe, run.request, tmp_path / "again.safetensors", only)
    assert diagnose(compare(again, run.taken), again, run.taken, run.pipe) is None


@pytest.mark.parametrize("model", [BASE, DISTILLED])
def test_parts_by_hand_are_right_without_a_bug(model, runs):
    """Else a wrong formula in this file would be taken for a bug's effect."""
    run = runs[model]
    h = Hand(run.taken, run.pipe)
    target = time(h, 1) if run.model.spec.name == DISTILLED else None
    gate, up = halves(h, f"{SINGLE}.0")
    for ours, name in (
        (modulate(h, f"{SINGLE}.0", normed(h(f"/{SINGLE}.0/in.0"))), f"/{SINGLE}.0.q_proj/in"),
        (turned(of_block(h, f"{IMAGE}.0"), angle(h, h("ids/img"))), f"/{IMAGE}.0/attention/q"),
        (attended(h, f"/{TEXT}.0"), f"/{TEXT}.0/attention/out"),
        (rest_of_block(h, f"{SINGLE}.0", silu(gate) * up), f"/{SINGLE}.0/out"),
        (vec_of(h, 1, target), "/vec"),
        (vec_of(h, 0, target), "/vec_0"),
        (language_rope(h, positions(h, 1)), f"{QWEN}/in.1"),
        (ids_of_text(h, USER + ASSISTANT), "text/model/in.0"),
        (decoded(h, 1e-4), "decoder/decoder/in"),
        (as_latents(h, h("/in")), "noise"),
        (times_of(6.93, EVEN), "schedule"),
    ):
        torch.testing.assert_close(ours.double(), h(name).double(), rtol=0, atol=2e-5)


def test_every_bug_is_tested():
    tested = {case[3] for case in CASES}
    tested |= {"guidance on a distilled model", "layers of hidden states"}
    assert {bug.name for bug in KNOWN_BUGS3} - tested - SHARED == set()
