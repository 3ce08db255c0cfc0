"""The bugs that ports of FLUX 3 often have: in its blocks, modulation, times and weights.

Rows as in `known_bugs.py`, for the functions of `flux/transformer3.py`. `bugs_around3.py` has those
of positions, text, noise, schedule and guidance. `KNOWN_BUGS3` also has the rows of the other
families that hold here: of the language model, precision, latents, autoencoder and pixels.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from flux import transformer3
from flux.hooks import replaced
from flux.parity.bugs_around3 import BUGS_AROUND3
from flux.parity.bugs_in_blocks import (
    ACTIVATIONS,
    HALVES,
    norm_in,
    patched_in,
    silu_twice,
    variants,
    weights_of,
)
from flux.parity.known_bugs import KNOWN_BUGS, SWAPPED
from flux.parity.modules import Modules
from flux.parity.replay import module_runs
from flux.parity.rerun import KnownBug, Rerun, patched
from flux.transformer3 import Block, Flux3, MLPEmbedder, Modulation, ModulationOut, QKNorm, RMSNorm

# names of rows for all families
SHARED = {
    "SiLU missing",
    "eps 1e-05",
    "eps 1e-06",
    "eps 1e-08",
    "eps 0.0001",
    "eps 0.001",
    "padding of the prompt zeroed",
    "padding of the prompt seen",
    "hidden states off by one",
    "t times 1000",
    "packing order of latents",
    "image tokens column by column",
    "velocity's sign",
    "guidance left out",
    "guidance the wrong way",
    "guidance from the prompt",
    "latent normalisation missing",
    "latent normalisation half missing",
    "latent normalisation in the wrong order",
    "latent normalisation inverted",
    "upsampling smooth",
    "downsampling padded on all sides",
    "pixels truncated",
    "red and blue swapped",
    "weights transposed",
    "weights rounded",
    "linear layers in low precision",
    "norm in low precision",
    "attention in low precision",
    "latents rounded",
    "norm by another formula",
    "activation of the autoencoder",
    "groups of the autoencoder's norms",
    "language model's heads",
    "language model's QK-norm left out",
}

# ---------------------------------------------------------------- weights


def other_modes(path: str) -> list[str]:
    """The same layer of the other modes, and of the other stage of modulations."""
    found = re.fullmatch(r"(txt_mode_blocks|content_mode_blocks\.\w+)(\..*)", path)
    if found:
        lists = ("txt_mode_blocks", "content_mode_blocks.image", "content_mode_blocks.image_cond")
        return [each + found[2] for each in lists if each != found[1]]
    found = re.fullmatch(r"(early|single)(_stream_modulations)\.(\w+)(.*)", path)
    if found:
        modes, stages = ("image", "image_cond", "txt"), ("early", "single")
        names = [f"{stage}{found[2]}.{mode}{found[4]}" for stage in stages for mode in modes]
        return [name for name in names if name != path]
    swaps = {"emb_in.image": "emb_in.image_cond", "time_in": "ref_time_in"}
    for a, b in [*swaps.items(), *((b, a) for a, b in swaps.items())]:
        if path == a or path.startswith(f"{a}."):
            return [b + path.removeprefix(a)]
    return []


def other_blocks(path: str) -> list[str]:
    """The same layer in every other block: numbers sorted as texts give 0, 1, 10, 11, ..., 2."""
    found = re.fullmatch(r"(\w+_blocks(?:\.[a-z_]+)?|layers)\.(\d+)(.*)", path)
    if found is None:
        return []
    return [f"{found[1]}.{number}{found[3]}" for number in range(64) if number != int(found[2])]


def other_projections(path: str) -> list[str]:
    """q, k and v, and their norms, in another order."""
    block, _, layer = path.rpartition(".")
    for group in (("q_proj", "k_proj", "v_proj", "attn_out"), ("query_norm", "key_norm")):
        if layer in group:
            return [f"{block}.{other}" for other in group if other != layer]
    return []


# ---------------------------------------------------------------- modulation


def order_of_modulation(rerun: Rerun) -> dict[str, Tensor]:
    """The three parts of a modulation in another order."""
    found = {}
    for order in permutations(("shift", "scale", "gate")):
        if order == ("shift", "scale", "gate"):
            continue

        def forward(f: Callable, self: Modulation, vec: Tensor, order=order) -> ModulationOut:
            return ModulationOut(**dict(zip(order, f(self, vec), strict=True)))

        found[", ".join(order)] = rerun.compute((Modulation, "forward", forward))
    return found


def final_halves_swapped(rerun: Rerun) -> Tensor:
    return rerun.expected.roll(rerun.expected.shape[-1] // 2, dims=-1)


def with_gates(gate: Callable[[Tensor], Tensor]) -> Callable[[Rerun], Tensor]:
    def forward(f: Callable, self: Block, x: Tensor, rope: Tensor, mod: ModulationOut) -> Tensor:
        return f(self, x, rope, mod._replace(gate=gate(mod.gate)))

    return patched(Block, "forward", forward)


def at_time(name: str) -> Callable[[Rerun], Tensor]:
    """Text or references with the conditioning vector of t, or the image with that of time 0."""

    def compute(rerun: Rerun) -> Tensor:
        vec = rerun.recorded(f"{rerun.place}/{name}")
        if re.search(r"/vec(_0)?$", rerun.name):
            return vec
        if rerun.name.endswith("final_layer.image/in.1"):
            return vec
        active = F.silu(vec)
        if re.search(r"_modulations\.\w+(\.lin)?/in$", rerun.name):
            return active
        return rerun.compute((Modulation, "forward", lambda f, self, _: f(self, active)))

    return compute


# ---------------------------------------------------------------- norms and attention


def no_qk_scale(f: Callable, self: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


def qk_norm_over(*axes: int) -> Callable[[Rerun], Tensor]:
    """Queries and keys (B, N, H, d) normalised over other axes."""

    def forward(f: Callable, self: RMSNorm, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(axes, keepdim=True)
        return x.float() * torch.rsqrt(mean_square + 1e-6) * self.scale

    return patched(RMSNorm, "forward", forward)


def rope_before_norm(rerun: Rerun) -> Tensor:
    """q and k rotated before they are normalised."""
    tables: list[Tensor] = []

    def block(f: Callable, self: Block, x: Tensor, rope: Tensor, mod: ModulationOut) -> Tensor:
        tables.append(rope)
        return f(self, x, rope, mod)

    def norm(f: Callable, self: QKNorm, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if not tables:
            raise LookupError(rerun.name)
        return f(self, rotate(q, tables[-1]), rotate(k, tables[-1]))

    rotate = transformer3.apply_rope
    return rerun.compute(
        (Block, "forward", block),
        (QKNorm, "forward", norm),
        (transformer3, "apply_rope", lambda f, x, rope: x),
    )


def rotate_halves(f: Callable, x: Tensor, rope: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = rope[:, None, :, 0, 0], rope[:, None, :, 1, 0]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def scaled(factor: Callable[[int, int], float]) -> Callable[[Rerun], Tensor]:
    """q·k divided by another number: factor(width of a head, number of heads)."""

    def attention(f: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return f(q * factor(q.shape[-1], q.shape[-2]), k, v)

    return patched(transformer3, "attention", attention)


def merge_heads(f: Callable, q: Tensor, *args: Tensor) -> Tensor:
    return f(q, *args).unflatten(-1, q.shape[2:]).mT.flatten(-2)


def masked(hidden: Callable[[Rerun, int], Tensor]) -> Callable[[Rerun], Tensor]:
    """Attention that hides what hidden(rerun, tokens) marks, (N,) or (N, N)."""

    def compute(rerun: Rerun) -> Tensor:
        def attend(f: Callable, q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
            rows = hidden(rerun, k.shape[2]).expand(q.shape[2], -1)
            return f(q, k, v, attn_mask=~rows)

        return rerun.compute((F, "scaled_dot_product_attention", attend))

    return compute


def padding(rerun: Rerun, tokens: int) -> Tensor:
    """Padded text tokens, which come first in the joint sequence."""
    text = ~rerun.recorded(rerun.in_text("model/in.1"))[0]
    if not re.search(r"/(txt_mode_blocks|single_blocks)", rerun.name):
        raise LookupError(rerun.name)
    return F.pad(text, (0, tokens - len(text)))


def later(rerun: Rerun, tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


# ---------------------------------------------------------------- blocks


def block_with(
    mlp: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up,
    in_sequence: bool = False,
) -> Callable[[Rerun], Tensor]:
    """A block with another activation, or whose MLP reads the sum after attention."""

    def forward(f: Callable, self: Block, x: Tensor, rope: Tensor, mod: ModulationOut) -> Tensor:
        t, dtype = transformer3, self.modulation_dtype or x.dtype
        y = t.modulate(x, mod.shift, mod.scale, dtype)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(y).unflatten(-1, (self.num_heads, -1)) for layer in projections)
        q, k = (t.apply_rope(part, rope).to(v.dtype) for part in self.norm(q, k))
        attended = self.attn_out(t.attention(q, k, v))
        if in_sequence:
            x = x + mod.gate * attended
            attended, y = torch.zeros_like(x), t.modulate(x, mod.shift, mod.scale, dtype)
        hidden = mlp(*self.mlp_in(y).chunk(2, dim=-1))
        return x + mod.gate * (attended + self.mlp_out(hidden))

    return patched(Block, "forward", forward)


def gated_by(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: activation(gate) * up


def without_residual(rerun: Rerun) -> Tensor:
    """The output of a block without its input."""
    return rerun.expected - rerun.recorded(rerun.name.removesuffix("/out") + "/in.0")


def streams_of(rerun: Rerun) -> list[Tensor]:
    """The outputs of the last mode blocks: text, image, references if any."""
    network, lists = rerun.network, ["txt_mode_blocks", "content_mode_blocks.image"]
    if "ids/references" in rerun.reference.records:
        lists.append("content_mode_blocks.image_cond")
    last = network.config.depth - 1
    return [rerun.recorded(f"{rerun.place}/{each}.{last}/out") for each in lists]


def other_joint_orders(rerun: Rerun) -> dict[str, Tensor]:
    """The modes in another order in the joint sequence, or in what follows from the sequence."""
    streams = streams_of(rerun)
    names, sizes = ("text", "image", "references")[: len(streams)], [x.shape[1] for x in streams]
    parts = rerun.expected.split(sizes, dim=1)
    return {
        ", ".join(names[i] for i in order): torch.cat([parts[i] for i in order], dim=1)
        for order in permutations(range(len(streams)))
        if list(order) != sorted(order)
    }


def other_output_tokens(rerun: Rerun) -> dict[str, Tensor]:
    """Tokens of the joint sequence that are not the image's, in the final layer."""
    last = len(rerun.network.single_blocks) - 1
    joint, count = rerun.recorded(f"{rerun.place}/single_blocks.{last}/out"), rerun.image_tokens
    return {"first": joint[:, :count], "last": joint[:, -count:]}


def mode_left_out(rerun: Rerun) -> Tensor:
    """The joint sequence before the mode blocks: they are not run."""
    modes = [("txt_in", "txt"), ("emb_in.image", "image"), ("emb_in.image_cond", "image_cond")]
    used = modes[: len(streams_of(rerun))]
    return torch.cat([rerun.recorded(f"{rerun.place}/{name}/out") for name, _ in used], dim=1)


BLOCK_INPUT = re.compile(r"((.+/(?:\w+_blocks(?:\.[a-z_]+)?))\.(\d+))/in\.0")


def block_skipped(rerun: Rerun) -> Tensor:
    """The input of a block as that of the block before, whose output is not used."""
    if rerun.name.endswith("/final_layer.image/in.0"):
        text = len(rerun.recorded(rerun.in_text("model/in.0"))[0])
        last = len(rerun.network.single_blocks) - 1
        joint = rerun.recorded(f"{rerun.place}/single_blocks.{last}/in.0")
        return joint[:, text : text + rerun.image_tokens]
    found = BLOCK_INPUT.fullmatch(rerun.name)
    if found is None or found[3] == "0":
        raise LookupError(rerun.name)
    return rerun.recorded(f"{found[2]}.{int(found[3]) - 1}/in.0")


def other_block_before(rerun: Rerun) -> dict[str, Tensor]:
    """The input of a block, if another block of its list ran between the one before and it."""
    found = BLOCK_INPUT.fullmatch(rerun.name)
    if found is None:
        raise LookupError(rerun.name)
    out = {}
    for run in module_runs(rerun.reference):
        if run.name == found[1] or not re.fullmatch(rf"{re.escape(found[2])}\.\d+", run.name):
            continue
        inputs = [rerun.recorded(each) for each in run.inputs]
        inputs[0] = rerun.expected
        out[run.name.rpartition("/")[2]] = Modules(rerun.pipe)(run.name, inputs)[0]
    return out


# ---------------------------------------------------------------- time


def time_rounded(rounding: Callable[[Tensor], Tensor]) -> Callable[[Rerun], Tensor]:
    """The sinusoids of a product 1000 t that is rounded otherwise: rounding(t in float32)."""

    def forward(f: Callable, self: MLPEmbedder, t: Tensor) -> Tensor:
        wave = transformer3.timestep_embedding
        with replaced(transformer3, "timestep_embedding", lambda _: lambda _: wave(rounding(t))):
            return f(self, t)

    return patched(MLPEmbedder, "forward", forward)


def low(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def frequencies_to_the_end(f: Callable, t: Tensor, dim: int = 256, *_) -> Tensor:
    exponent = torch.arange(dim // 2).to(t.device).float() / (dim // 2 - 1)
    angle = t.float()[:, None] * 10_000.0**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def with_times(
    t: Callable[[Rerun], Tensor] | None = None, target: Callable[[Rerun], Tensor] | None = None
) -> Callable[[Rerun], Tensor]:
    """The conditioning vector of another time, or of another target; both are (1,) tensors."""

    def compute(rerun: Rerun) -> Tensor:
        if target is not None and not rerun.network.config.flow_map:
            raise LookupError("no flow map")
        if t is not None and rerun.at_zero:
            raise LookupError("of time 0")
        new_t, new_target = t and t(rerun), target and target(rerun)
        found = re.fullmatch(r".+/(ref_)?time_in/in(~2)?", rerun.name)
        if found:  # the time itself
            value = new_target if found[1] else new_t
            if value is None:
                raise LookupError(rerun.name)
            return value
        embedded = re.search(r"/(ref_)?time_in[./]", rerun.name)
        if embedded:
            value = new_target if embedded[1] else new_t
            if value is None:
                raise LookupError(rerun.name)
            return rerun.compute((MLPEmbedder, "forward", lambda f, self, _: f(self, value)))

        def vec(f: Callable, self: Flux3, t: Tensor, target: Tensor | None = None) -> Tensor:
            return f(
                self, t if new_t is None else new_t, target if new_target is None else new_target
            )

        return rerun.compute((Flux3, "vec", vec))

    return compute


def time_at(offset: int) -> Callable[[Rerun], Tensor]:
    """The schedule's time, `offset` after the one at which this step begins."""

    def time(rerun: Rerun) -> Tensor:
        index = rerun.step - 1 + offset
        if not 0 <= index < len(rerun.times):
            raise LookupError("there is no such time")
        return rerun.times[index : index + 1]

    return time


TARGETS = {
    "the step's own time": time_at(0),
    "0": lambda rerun: torch.zeros(1),
    "the time before": time_at(-1),
    "the time after the next": time_at(2),
    "the length of the step": lambda rerun: time_at(0)(rerun) - time_at(1)(rerun),
}


def without_target(rerun: Rerun) -> Tensor:
    """A flow map that leaves its target out, of vec or of vec_0."""

    def vec(f: Callable, self: Flux3, t: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            raise LookupError("no flow map")
        return self.time_in(t)[:, None]

    return rerun.compute((Flux3, "vec", vec))


# ---------------------------------------------------------------- the table

STEP = r"^step"
MODULATION = r"_modulations\."
VEC = r"/vec(_0)?$|/final_layer\.image/in\.1$"
TIME = r"/(ref_)?time_in|/vec(_0)?$"
BLOCKS = r"_blocks\."
WRONG_WEIGHTS = "weights of another module"
AXIS = "QK-norm over the wrong axis"
AT_TIME = ("time of another mode", "{}; expected t for the image, 0 for text and references")

# fmt: off
OWN: tuple[KnownBug, ...] = (
    # weights
    KnownBug(WRONG_WEIGHTS, "the weights of {} are used", STEP, weights_of(other_modes)),
    KnownBug(WRONG_WEIGHTS,
        "the weights of {} are used: those of another block (numbers sorted as texts?)",
        "", weights_of(other_blocks)),
    KnownBug(WRONG_WEIGHTS, "the weights of {} are used", STEP, weights_of(other_projections)),

    # modulation
    KnownBug(*SWAPPED, STEP, patched(
        transformer3, "modulate", lambda f, x, shift, scale, dtype: f(x, scale, shift, dtype))),
    KnownBug(SWAPPED[0],
        "the final modulation is scale, then shift, as in diffusers' files; here shift is first",
        r"/final_layer\.image\.adaLN_modulation(\.1)?/out$", final_halves_swapped),
    KnownBug("order of a modulation", "a modulation is read as {}; expected shift, scale, gate",
        STEP, order_of_modulation),
    KnownBug("1 + scale missing", "a norm is multiplied by scale, expected 1 + scale",
        STEP, patched(transformer3, "modulate",
            lambda f, x, shift, scale, dtype: f(x, shift, scale - 1, dtype))),
    KnownBug("modulation left out", "{} is not applied after a norm",
        STEP, patched_in(transformer3, "modulate", {
            "shift": lambda f, x, shift, scale, dtype: f(x, 0 * shift, scale, dtype),
            "scale": lambda f, x, shift, scale, dtype: f(x, shift, 0 * scale, dtype),
            "modulation": lambda f, x, shift, scale, dtype: f(x, 0 * shift, 0 * scale, dtype)})),
    KnownBug("SiLU twice", "SiLU is applied twice; a modulation reads it applied once to vec",
        STEP, patched(F, "silu", silu_twice)),
    KnownBug("gate of a residual", "{}", BLOCKS, variants({
        "the gate is left out": with_gates(torch.ones_like),
        "the gate is 1 + gate": with_gates(lambda gate: 1 + gate),
        "the gate goes through tanh": with_gates(torch.tanh),
        "the gate goes through a sigmoid": with_gates(torch.sigmoid)})),
    KnownBug(AT_TIME[0], AT_TIME[1].replace("{}", "text or references are modulated by t"),
        rf"{MODULATION}(txt|image_cond)|/vec_0$", at_time("vec")),
    KnownBug(AT_TIME[0], AT_TIME[1].replace("{}", "the image is modulated by time 0"),
        rf"{MODULATION}image[./]|/vec$|/final_layer\.image", at_time("vec_0")),

    # time
    KnownBug("t not times 1000", "the sinusoids are of t, expected of 1000 t",
        TIME, patched(transformer3, "timestep_embedding", lambda f, t: f(t / 1000))),
    KnownBug("rounding of 1000 t",
        "{}; expected t and 1000 t, both in the network's dtype",
        TIME, variants({
            "1000 t is computed in float32": time_rounded(lambda t: 1000 * t.float()),
            "t is rounded to bfloat16": time_rounded(lambda t: 1000 * low(t)),
            "1000 t is rounded to bfloat16, but not t": time_rounded(lambda t: low(1000 * t)),
            "t and 1000 t are rounded to bfloat16": time_rounded(lambda t: low(1000 * low(t)))})),
    KnownBug("sines before cosines",
        "the sinusoids of time are sines, then cosines, expected the other order",
        TIME, patched(transformer3, "timestep_embedding",
            lambda f, t: f(t).roll(128, dims=-1))),
    KnownBug("frequencies off by one",
        "the frequencies are 10000^(-i/127), expected 10000^(-i/128)",
        TIME, patched(transformer3, "timestep_embedding", frequencies_to_the_end)),
    KnownBug("time of a step", "a step is computed at {}", TIME, variants({
        "the time of the next one": with_times(time_at(1)),
        "1 - t": with_times(lambda rerun: 1 - time_at(0)(rerun)),
        "the time of the one before": with_times(time_at(-1))})),
    KnownBug("target time", "the target of a flow map is {}, expected the next time",
        TIME, variants({name: with_times(None, time) for name, time in TARGETS.items()})),
    KnownBug("target time left out", "the embedded target is not added to the embedded time",
        VEC, without_target),

    # norms and attention
    KnownBug("QK-norm left out", "queries and keys are not normalised",
        STEP, patched(RMSNorm, "forward", lambda f, self, x: x.float())),
    KnownBug("QK-norm without its scale", "queries and keys are normalised, but not scaled",
        STEP, patched(RMSNorm, "forward", no_qk_scale)),
    KnownBug("QK-norm's scales swapped", "queries get the scale of keys, and keys that of queries",
        STEP, patched(QKNorm, "forward", lambda f, self, q, k: f(self, k, q)[::-1])),
    KnownBug(AXIS, "queries and keys are normalised over tokens, expected over a head's channels",
        STEP, qk_norm_over(1)),
    KnownBug(AXIS, "queries and keys are normalised over all heads together, expected each alone",
        STEP, qk_norm_over(2, 3)),
    KnownBug("QK-norm after RoPE", "queries and keys are rotated before they are normalised",
        BLOCKS, rope_before_norm),
    KnownBug("norm in low precision", "RMSNorm of queries and keys computes in {}",
        STEP, patched_in(F, "rms_norm", {n: norm_in(d) for n, d in HALVES.items()})),
    KnownBug("RoPE rotates halves",
        "channel i is rotated with channel i + d/2, expected with its neighbour",
        STEP, patched(transformer3, "apply_rope", rotate_halves)),
    KnownBug("RoPE rotates backwards", "the angles have the wrong sign",
        STEP, patched(transformer3, "apply_rope", lambda f, x, rope: f(x, rope.mT))),
    KnownBug("RoPE left out", "queries and keys are not rotated",
        STEP, patched(transformer3, "apply_rope", lambda f, x, rope: x)),
    KnownBug("scale of attention", "q·k is divided by {}", STEP, variants({
        "nothing": scaled(lambda d, heads: d**0.5),
        "the square root of all channels": scaled(lambda d, heads: heads**-0.5),
        "the head's width, not its square root": scaled(lambda d, heads: d**-0.5)})),
    KnownBug("heads merged the wrong way",
        "the channels of attention's output are (channel, head), expected (head, channel)",
        STEP, patched(transformer3, "attention", merge_heads)),
    KnownBug("padding of the prompt masked",
        "attention hides padded text tokens; FLUX was trained to attend to them",
        STEP, masked(padding)),
    KnownBug("attention masked", "attention is causal; every token attends to every other in FLUX",
        STEP, masked(later)),

    # blocks
    KnownBug("gate and value swapped",
        "the second half of a gated MLP goes through SiLU, expected the first",
        BLOCKS, block_with(lambda gate, up: gate * F.silu(up))),
    KnownBug("another activation", "the gate goes through {}, expected SiLU",
        BLOCKS, variants({
            name: block_with(gated_by(each))
            for name, each in (ACTIVATIONS | {
                "GELU": F.gelu, "tanh GELU": partial(F.gelu, approximate="tanh")}).items()
            if name != "SiLU"})),
    KnownBug("MLP after attention",
        "a block's MLP reads the sum after attention, expected the block's input, in parallel",
        BLOCKS, block_with(in_sequence=True)),
    KnownBug("residual left out", "a block's input is not added to its output",
        rf"{BLOCKS}.*\d/out$", without_residual),
    KnownBug("block skipped", "the block before this tensor is not run, or its output is not used",
        r"/in\.0$", block_skipped),
    KnownBug("order of blocks", "{} ran before this block (numbers sorted as texts?)",
        rf"{BLOCKS}.*\d/in\.0$", other_block_before),
    KnownBug("order of the joint sequence",
        "the sequence is {}; expected text, image, references. Attention gives the same in any "
        "order, so compare such a port after a permutation",
        r"/single_blocks\.\d+/(in\.0|out)$", other_joint_orders),
    KnownBug("tokens of the output",
        "the {} tokens of the joint sequence are used as the image's",
        r"/final_layer\.image/in\.0$", other_output_tokens),
    KnownBug("mode blocks left out", "tokens join without the blocks of their modes",
        r"/single_blocks\.0/in\.0$", mode_left_out),
)
# fmt: on

KNOWN_BUGS3: Sequence[KnownBug] = (
    *OWN,
    *BUGS_AROUND3,
    *(bug for bug in KNOWN_BUGS if bug.name in SHARED),
)
