"""The bugs that ports of FLUX often have, each with the few lines that cause it.

A row says in which tensors a bug can show first, and how such a tensor comes out with the bug. The
tensor is computed from recorded tensors, or by our code with functions replaced (`Rerun.compute`).
A bug that can be made in several ways has several rows, or a row with several tensors. The rows
about weights, precision and the wiring of blocks are in `bugs_in_blocks.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flux import autoencoder, clip, language_model, sampling, t5, transformer
from flux.autoencoder import AutoEncoder
from flux.hooks import replaced
from flux.parity.bugs_in_blocks import BUGS_IN_BLOCKS
from flux.parity.rerun import KnownBug, Rerun, patched
from flux.transformer import Flux, GatedSiLU, KVCache, Modulation, ModulationOut, QKNorm, RMSNorm

# ---------------------------------------------------------------- modulation


def swap_shift_and_scale(mod: ModulationOut) -> ModulationOut:
    return mod._replace(shift=mod.scale, scale=mod.shift)


def swap_in_modulation(f: Callable, self: Modulation, vec: Tensor) -> list[ModulationOut]:
    return [swap_shift_and_scale(mod) for mod in f(self, vec)]


def split_by_kind(f: Callable, self: Modulation, vec: Tensor) -> list[ModulationOut]:
    """Split as (kind, branch) what is (branch, kind)."""
    branches = f(self, vec)
    chunks = [chunk for mod in branches for chunk in mod]
    return [ModulationOut(*chunks[number :: len(branches)]) for number in range(len(branches))]


# ---------------------------------------------------------------- norms


def norm_eps(eps: float) -> Callable[[Rerun], Tensor]:
    """Every norm with another epsilon."""

    def functional(f: Callable, *args, **kwargs) -> Tensor:
        return f(*args[:4], **kwargs | {"eps": eps})  # eps is the fifth argument

    def rms_norm(f: Callable, *args, **kwargs) -> Tensor:
        return f(*args[:3], **kwargs | {"eps": eps})  # eps is the fourth argument

    def module(f: Callable, self: t5.RMSNorm, x: Tensor) -> Tensor:
        original, self.eps = self.eps, eps
        try:
            return f(self, x)
        finally:
            self.eps = original

    return lambda rerun: rerun.compute(
        (F, "layer_norm", functional),
        (F, "group_norm", functional),
        (F, "rms_norm", rms_norm),
        (t5.RMSNorm, "forward", module),
        (language_model.RMSNorm, "forward", module),
    )


def qk_norm_eps(eps: float) -> Callable[[Rerun], Tensor]:
    """The norms of queries and keys with another epsilon."""

    def forward(f: Callable, self: RMSNorm, x: Tensor) -> Tensor:
        rms_norm = F.rms_norm
        with replaced(F, "rms_norm", lambda _: lambda x, shape, **__: rms_norm(x, shape, eps=eps)):
            return f(self, x)

    return patched(RMSNorm, "forward", forward)


def qk_norm_over(*axes: int) -> Callable[[Rerun], Tensor]:
    """Queries and keys (B, N, H, d) normalised over other axes."""

    def forward(f: Callable, self: RMSNorm, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(axes, keepdim=True)
        return (x.float() * torch.rsqrt(mean_square + 1e-6) * self.scale).to(x.dtype)

    return patched(RMSNorm, "forward", forward)


def no_qk_scale(f: Callable, self: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def rope_before_norm_input(rerun: Rerun) -> Tensor:
    """The norm's input, q or k, after RoPE."""
    rope, x = rerun.recorded(rerun.in_pass("rope")), rerun.expected.transpose(1, 2)  # (B, N, H, d)
    rows = rope[: x.shape[1]] if "txt_attn" in rerun.name else rope[-x.shape[1] :]
    return transformer.apply_rope(x, rows).transpose(1, 2)


def rope_before_norm(rerun: Rerun) -> Tensor:
    """Whatever follows the norm, if RoPE comes before it."""
    rope, apply_rope = rerun.recorded(rerun.in_pass("rope")), transformer.apply_rope
    text_norms = [block.txt_attn.norm for block in rerun.network.double_blocks]

    def norm(f: Callable, self: QKNorm, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        length = q.shape[1]
        is_text = any(self is text_norm for text_norm in text_norms)
        rows = rope[:length] if is_text else rope[len(rope) - length :]
        return f(self, apply_rope(q, rows), apply_rope(k, rows))

    return rerun.compute(
        (QKNorm, "forward", norm), (transformer, "apply_rope", lambda f, x, rope: x)
    )


# ---------------------------------------------------------------- positions and attention


def rotate_halves(f: Callable, x: Tensor, rope: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = rope[:, None, :, 0, 0], rope[:, None, :, 1, 0]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def store_as_halves(f: Callable, x: Tensor, rope: Tensor) -> Tensor:
    return f(x, rope).unflatten(-1, (-1, 2)).mT.flatten(-2)


def with_ids(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable:
    """Other positions of text and image: the ids, the RoPE table or the rotated q and k."""

    def compute(rerun: Rerun) -> Tensor:
        txt, img = change(*rerun.ids)
        if "ids/" in rerun.name:
            return txt if rerun.name.endswith("txt") else img
        rope = rerun.network.rope(txt, img)
        if rerun.name.endswith("rope"):
            return rope
        return rerun.compute((transformer, "apply_rope", lambda f, x, _: f(x, rope)))

    return compute


def swap_rows_and_columns(txt: Tensor, img: Tensor) -> tuple[Tensor, Tensor]:
    return txt, torch.cat([img[:, :1], img[:, [2, 1]], img[:, 3:]], dim=1)


def ids_from(row: int, column: int) -> Callable[[Rerun], Tensor]:
    """Rows and columns of image tokens that do not count from 0."""

    def change(txt: Tensor, img: Tensor) -> tuple[Tensor, Tensor]:
        return txt, img + F.pad(img.new_tensor([row, column]), (1, img.shape[-1] - 3))

    return with_ids(change)


def image_before_text(rerun: Rerun) -> Tensor:
    return rerun.expected.roll(-len(rerun.ids[0]), dims=-2)


def first_tokens(rerun: Rerun) -> Tensor:
    """The first tokens of the joint sequence, as many as the image has."""
    last = len(rerun.network.single_blocks) - 1
    joint = rerun.recorded(f"{rerun.place}/single_blocks.{last}/out")
    return joint[:, : len(rerun.ids[1])]


def split_by_heads(f: Callable, x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """In place of `Tensor.unflatten`: (head, 3, d) for (3, head, d)."""
    if sizes[0] != 3:
        return f(x, dim, sizes)
    return f(x, dim, (sizes[1], 3, sizes[2])).transpose(-3, -2)


def is_padding(rerun: Rerun) -> Tensor:
    """(T,) True where a text token is padding."""
    if rerun.pipe.spec.flux1:
        return rerun.recorded(rerun.in_text("t5/in"))[0] == 0
    return ~rerun.recorded(rerun.in_text("model/in.1"))[0]


def mask_padding(rerun: Rerun) -> Tensor:
    """The joint attention without padded keys."""
    padding = is_padding(rerun)

    def attention(
        f: Callable, q: Tensor, k: Tensor, v: Tensor, rope: Tensor, cache: KVCache | None, *_
    ) -> Tensor:
        q, k = transformer.apply_rope(q, rope), transformer.apply_rope(k, rope)
        if cache is not None:
            k, v = cache.update(k, v)
        visible = F.pad(~padding, (0, k.shape[1] - len(padding)), value=True)
        q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, visible[None, :])
        return rearrange(out, "b h n d -> b n (h d)")

    return rerun.compute((transformer, "attention", attention))


def mask_padding_in_t5(rerun: Rerun) -> Tensor:
    padding = is_padding(rerun)

    def forward(f: Callable, self: t5.SelfAttention, x: Tensor, bias: Tensor) -> Tensor:
        return f(self, x, bias.masked_fill(padding, -torch.inf))

    return rerun.compute((t5.SelfAttention, "forward", forward))


def causal_mask_only(
    f: Callable, self, x: Tensor, rope: Tensor, visible: Tensor, blind: Tensor
) -> Tensor:
    return f(self, x, rope, torch.ones_like(visible).tril(), torch.zeros_like(blind))


def last_pooled(rerun: Rerun) -> Tensor:
    """CLIP's pooled vector of the last token, which is padding in all but the longest prompts."""
    text = rerun.network.text_model
    last = len(text.encoder.layers) - 1
    x = rerun.recorded(f"{rerun.place}/text_model.encoder.layers.{last}/out")[:, -1]
    return x if rerun.name.endswith("/in") else text.final_layer_norm(x)


def one_layer_early(rerun: Rerun) -> Tensor:
    """Hidden states counted from 0, where 0 is the embeddings and 1 is the first layer's output."""
    states = []
    spec: Any = rerun.pipe.spec.text  # FLUX.2's
    for number in spec.model.layers:
        layer = f"layers.{number - 2}" if number >= 2 else "embed_tokens"
        states.append(rerun.recorded(f"{rerun.place}/{layer}/out"))
    return torch.cat(states, dim=-1)


# ---------------------------------------------------------------- time


def at_next_time(rerun: Rerun) -> Tensor:
    later = rerun.times[rerun.step : rerun.step + 1]
    return rerun.compute((Flux, "vec", lambda f, self, t, *args: f(self, later, *args)))


def frequencies_to_the_end(f: Callable, t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoids whose last frequency is 1/10000; in FLUX the next one would be."""
    exponent = torch.arange(dim // 2).to(t) / (dim // 2 - 1)
    angle = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def schedule(kind: str, rerun: Rerun) -> Tensor:
    return sampling.schedule(kind, len(rerun.times) - 1, rerun.image_tokens)


def other_schedule(rerun: Rerun) -> Tensor:
    return schedule("empirical" if rerun.pipe.spec.schedule == "linear" else "linear", rerun)


def shift_times(
    rerun: Rerun, times: Callable[[int], Tensor], shift: Callable[[float], float] = math.exp
) -> Tensor:
    """t -> s / (s + 1/t - 1), where s = shift(mu) and t are times(steps)."""
    steps = len(rerun.times) - 1
    if rerun.pipe.spec.schedule == "linear":
        mu = sampling.calculate_shift(rerun.image_tokens)
    else:
        mu = sampling.compute_empirical_mu(rerun.image_tokens, steps)
    s = shift(mu)
    return (s / (s + 1 / times(steps).double() - 1)).float()


def even_times(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def without_first_time(steps: int) -> Tensor:
    return even_times(steps + 1)[1:]


def without_last_time(steps: int) -> Tensor:
    return even_times(steps + 1)[:-1]


# ---------------------------------------------------------------- latents and pixels


def pack_by_place(rerun: Rerun) -> Tensor:
    """Channels (patch, channel) for (channel, patch)."""
    axis = 1 if rerun.expected.ndim == 4 else 2
    return rerun.expected.unflatten(axis, (-1, 4)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def pack_by_column(rerun: Rerun) -> Tensor:
    """Channels (channel, column, row) for (channel, row, column)."""
    axis = 1 if rerun.expected.ndim == 4 else 2
    patches = rerun.expected.unflatten(axis, (-1, 2, 2))
    return patches.transpose(axis + 1, axis + 2).flatten(axis, axis + 2)


def unpack_as(order: str) -> Callable[[Rerun], Tensor]:
    pattern = f"b ({order}) h w -> b c (h ph) (w pw)"
    return patched(autoencoder, "unpack", lambda f, x: rearrange(x, pattern, ph=2, pw=2))


def column_by_column(rerun: Rerun) -> Tensor:
    height, width = rerun.recorded("noise").shape[2:]
    return rearrange(rerun.expected, "b (h w) c -> b (w h) c", h=height, w=width)


def other_noise_layout(rerun: Rerun) -> Tensor:
    _, channels, height, width = rerun.expected.shape
    seeds, spatial = [rerun.reference.recipe["seed"]], not rerun.pipe.spec.flux1
    return sampling.noise(seeds, channels, height, width, spatial=spatial).to(rerun.expected)


def cfg(formula: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Rerun], Tensor]:
    """Classifier-free guidance by a wrong formula(with prompt, without prompt, scale)."""

    def compute(rerun: Rerun) -> Tensor:
        conditional = rerun.recorded(rerun.in_step("out"))
        unconditional = rerun.recorded(rerun.in_step("negative/out"))
        return formula(conditional, unconditional, rerun.cfg_scale)

    return compute


def euler_step(rerun: Rerun, sign: int = 1, offset: int = 0) -> Tensor:
    """One Euler step over the interval that is `offset` steps later."""
    x, velocity = rerun.latents(rerun.step - 1), rerun.recorded(rerun.in_step("velocity"))
    times, end = rerun.times.tolist(), rerun.step + offset
    if end >= len(times):
        raise LookupError("there is no later interval")
    dt = sign * (times[end] - times[end - 1])
    return x + dt * rearrange(velocity.float(), "b (h w) c -> b c h w", h=x.shape[2])


def latent_statistics(ae: AutoEncoder) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation of packed latents."""
    c = ae.config
    if c.scale_factor is not None and c.shift_factor is not None:
        return c.shift_factor, 1 / c.scale_factor
    return ae.statistics()


def normalised_with(use_mean: bool, use_std: bool) -> Callable[[Rerun], Tensor]:
    """Latents normalised, or denormalised, by some of their statistics."""

    def chosen(ae: AutoEncoder) -> tuple[Tensor | float, Tensor | float]:
        mean, std = latent_statistics(ae)
        return (mean if use_mean else 0.0), (std if use_std else 1.0)

    def normalise(f: Callable, self: AutoEncoder, latents: Tensor) -> Tensor:
        mean, std = chosen(self)
        return (latents - mean) / std

    def denormalise(f: Callable, self: AutoEncoder, latents: Tensor) -> Tensor:
        mean, std = chosen(self)
        return latents * std + mean

    return lambda rerun: rerun.compute(
        (AutoEncoder, "normalise", normalise), (AutoEncoder, "denormalise", denormalise)
    )


def shifted_first(rerun: Rerun) -> Tensor:
    """Latents whose mean is added before the division by the scale, or taken off after it."""

    def normalise(f: Callable, self: AutoEncoder, latents: Tensor) -> Tensor:
        mean, std = latent_statistics(self)
        return latents / std - mean

    def denormalise(f: Callable, self: AutoEncoder, latents: Tensor) -> Tensor:
        mean, std = latent_statistics(self)
        return (latents + mean) * std

    return rerun.compute(
        (AutoEncoder, "normalise", normalise), (AutoEncoder, "denormalise", denormalise)
    )


def bilinear(f: Callable, x: Tensor, **kwargs) -> Tensor:
    return f(x, **kwargs | {"mode": "bilinear"})


def truncated(rerun: Rerun) -> Tensor:
    levels = (rerun.recorded("pixels").float().clamp(-1, 1) / 2 + 0.5) * 255
    return rearrange(levels, "1 c h w -> h w c").byte()


# ---------------------------------------------------------------- the table

# where a bug can show first
STEP = r"^(step|references)"
TIME = r"/(time|guidance)_in|/vec$"
TEXT = r"^text"
IDS = r"^(negative/)?(ids|rope)|^step"
JOINT = r"/single_blocks|/attention/"
QK_INPUT = r"^(step|references).*\.(norm|query_norm|key_norm)/in"
SCHEDULE = r"^schedule$"
VELOCITY = r"^step\.\d+(/negative)?/(velocity|out|final_layer(\.linear)?/out)$"
GUIDED = r"^step.*/velocity$"
LATENTS = r"^step.*/latents$"
TOKENS = r"^step\.\d+(/negative)?/(in|img_in/in)$"
PACKED = r"^noise$|^step\.\d+(/negative)?/(in|img_in/in|latents)$|^encoder\.\d+/latents$"
CODER = r"^(decoder|pixels|encoder)"
FEATURES = r"^text/(negative/)?features|/txt_in/in$"

# bugs with several rows
SWAPPED = ("shift and scale swapped",
           "a modulation's shift is used as its scale, and its scale as its shift")  # fmt: skip
LATE_NORM = ("QK-norm after RoPE",
             "queries and keys are rotated before they are normalised")  # fmt: skip
ROWS = ("rows and columns swapped",
        "an image token's position is (t, column, row), expected (t, row, column)")  # fmt: skip
PADDING = ("padding of the prompt masked",
           "attention hides padded text tokens; FLUX was trained to attend to them")  # fmt: skip
BF16 = ("t rounded to bfloat16",
        "t, guidance or 1000 times either is rounded to bfloat16, expected float32")  # fmt: skip
PLACES = ("packing order of latents",
          "a 2x2 patch is packed as (patch, channel), expected (channel, row, column)")  # fmt: skip
COLUMNS = ("packing order of latents",
           "a 2x2 patch is packed column by column, expected row by row")  # fmt: skip
SIGN = ("velocity's sign",
        "the velocity (noise - image) or dt (negative) has the wrong sign")  # fmt: skip

# fmt: off
KNOWN_BUGS: tuple[KnownBug, ...] = (
    # modulation
    KnownBug(*SWAPPED, STEP, patched(
        transformer, "modulate", lambda f, x, shift, scale: f(x, scale, shift))),
    KnownBug(*SWAPPED, STEP, patched(Modulation, "forward", swap_in_modulation)),
    KnownBug("1 + scale missing", "a norm is multiplied by scale, expected 1 + scale",
        STEP, patched(transformer, "modulate", lambda f, x, shift, scale: f(x, shift, scale - 1))),
    KnownBug("modulation split by kind",
        "a modulation's output is split as (kind, branch), expected (branch, kind): shift, scale "
        "and gate of attention, then those of the MLP",
        STEP, patched(Modulation, "forward", split_by_kind)),
    KnownBug("SiLU missing", "a SiLU is left out; a modulation applies one to vec",
        STEP, patched(F, "silu", lambda f, x, inplace=False: x)),

    # norms
    *(KnownBug(f"eps {eps:g}",
        f"a norm adds {eps:g} to the variance; FLUX adds 1e-6, CLIP and Mistral add 1e-5",
        "", norm_eps(eps)) for eps in (1e-5, 1e-6, 1e-8, 1e-4, 1e-3)),
    *(KnownBug(f"eps {eps:g}", f"QK-norm adds {eps:g} to the mean square, expected 1e-6",
        STEP, qk_norm_eps(eps)) for eps in (1e-5, 1e-8, 1e-4, 1e-3)),
    KnownBug("QK-norm left out", "queries and keys are not normalised",
        STEP, patched(RMSNorm, "forward", lambda f, self, x: x)),
    KnownBug("QK-norm without its scale", "queries and keys are normalised, but not scaled",
        STEP, patched(RMSNorm, "forward", no_qk_scale)),
    KnownBug("QK-norm's scales swapped", "queries get the scale of keys, and keys that of queries",
        STEP, patched(QKNorm, "forward", lambda f, self, q, k: f(self, k, q)[::-1])),
    KnownBug("QK-norm over the wrong axis",
        "queries and keys are normalised over tokens, expected over each head's channels",
        STEP, qk_norm_over(1)),
    KnownBug("QK-norm over the wrong axis",
        "queries and keys are normalised over all heads together, expected head by head",
        STEP, qk_norm_over(2, 3)),
    KnownBug("QK-norm over the wrong axis",
        "queries and keys are normalised over heads, expected over each head's channels",
        STEP, qk_norm_over(2)),
    KnownBug(*LATE_NORM, QK_INPUT, rope_before_norm_input),
    KnownBug(*LATE_NORM, STEP, rope_before_norm),

    # positions
    KnownBug("RoPE rotates halves",
        "channel i is rotated with channel i + d/2, expected with its neighbour",
        STEP, patched(transformer, "apply_rope", rotate_halves)),
    KnownBug("RoPE's pairs stored as halves",
        "q and k are rotated correctly, but stored in another order; attention is the same",
        STEP, patched(transformer, "apply_rope", store_as_halves)),
    KnownBug("RoPE rotates backwards", "the angles have the wrong sign",
        STEP, patched(transformer, "apply_rope", lambda f, x, rope: f(x, rope.mT))),
    KnownBug("RoPE left out", "queries and keys are not rotated",
        STEP, patched(transformer, "apply_rope", lambda f, x, rope: x)),
    KnownBug("RoPE's theta", "theta is the other family's: 10000 in FLUX.1, 2000 in FLUX.2",
        r"^(negative/)?rope", patched(transformer, "rope_table",
            lambda f, ids, axes, theta, dtype: f(ids, axes, 12_000 - theta, dtype))),
    KnownBug(*ROWS, IDS, with_ids(swap_rows_and_columns)),
    KnownBug("rows off by one", "rows of image tokens count from 1, expected from 0",
        IDS, ids_from(1, 0)),
    KnownBug("columns off by one", "columns of image tokens count from 1, expected from 0",
        IDS, ids_from(0, 1)),
    KnownBug("rows and columns off by one", "rows and columns count from 1, expected from 0",
        IDS, ids_from(1, 1)),
    KnownBug("text positions", "text tokens are not counted on the fourth axis, as FLUX.2 does",
        IDS, with_ids(lambda txt, img: (torch.zeros_like(txt), img))),
    KnownBug("text and image order", "positions of image tokens precede those of text tokens",
        IDS, with_ids(lambda txt, img: (img, txt) if len(txt) else (txt, img))),
    KnownBug("text and image order", "image tokens precede text tokens in the joint sequence",
        JOINT, image_before_text),
    KnownBug("text and image order",
        "the first tokens of the joint sequence, which are text, are used as the image's",
        r"/final_layer/in(\.0)?$", first_tokens),

    # attention and MLP
    KnownBug("q, k, v split by heads",
        "the rows of qkv are read as (head, q k v, channel), expected (q k v, head, channel)",
        STEP, patched(Tensor, "unflatten", split_by_heads)),
    KnownBug("GELU by erf", "GELU is computed exactly, expected its tanh approximation",
        "", patched(F, "gelu", lambda f, x, approximate="none": f(x))),
    KnownBug("GELU by erf", "T5's GELU is computed exactly, expected its tanh approximation",
        TEXT, patched(t5, "gelu_new", lambda f, x: F.gelu(x))),
    KnownBug("GELU by erf", "CLIP's GELU is computed exactly, expected x * sigmoid(1.702 x)",
        TEXT, patched(clip.MLP, "forward", lambda f, self, x: self.fc2(F.gelu(self.fc1(x))))),
    KnownBug("gate and value swapped",
        "the second half of a gated MLP goes through SiLU, expected the first",
        STEP, patched(GatedSiLU, "forward",
            lambda f, self, x: f(self, x.roll(x.shape[-1] // 2, dims=-1)))),
    KnownBug("attention not scaled", "q·k is not divided by the square root of the head's width",
        STEP, patched(transformer, "attention",
            lambda f, q, *args: f(q * q.shape[-1] ** 0.5, *args))),
    KnownBug(*PADDING, STEP, mask_padding),
    KnownBug(*PADDING, TEXT, mask_padding_in_t5),

    # text
    KnownBug("padding of the prompt zeroed",
        "the features of padded tokens are set to zero, expected as computed",
        FEATURES, lambda rerun: rerun.expected * ~is_padding(rerun)[:, None]),
    KnownBug("padding of the prompt seen",
        "the language model attends to padding, which its mask should hide",
        TEXT, patched(language_model.Attention, "forward", causal_mask_only)),
    KnownBug("padding of the prompt seen",
        "the language model's mask is causal only, expected to hide padding too",
        r"/model/layers\.\d+(\.self_attn)?/in\.2",
        lambda rerun: torch.ones_like(rerun.expected).tril()),
    KnownBug("pooled at the last token",
        "CLIP is read at the last token, expected at the first end of text",
        "clip|pooled", last_pooled),
    KnownBug("hidden states off by one", "the language model is read one layer too early",
        r"/model/out$|text/.*features", one_layer_early),

    # time
    KnownBug("t not times 1000",
        "the sinusoids are of t or guidance, expected of 1000 times it",
        TIME, patched(transformer, "scale_time", lambda f, t, *_: t.float())),
    KnownBug(*BF16, TIME, patched(
        transformer, "scale_time", lambda f, t, *_: 1000 * t.bfloat16().float())),
    KnownBug(*BF16, TIME, patched(
        transformer, "scale_time", lambda f, t, *_: f(t, "bfl", torch.bfloat16))),
    KnownBug(*BF16, TIME, patched(
        transformer, "scale_time", lambda f, t, *_: (1000 * t.float()).bfloat16().float())),
    KnownBug(*BF16, TIME, patched(
        transformer, "scale_time", lambda f, t, *_: f(t, "diffusers", torch.bfloat16))),
    KnownBug("t kept in float32",
        "t or guidance is not rounded, but the reference's numerics round it",
        TIME, patched(transformer, "scale_time", lambda f, t, _, dtype: f(t, "float32", dtype))),
    KnownBug("sines before cosines",
        "the sinusoids of time are sines, then cosines, expected the other order",
        TIME, patched(transformer, "timestep_embedding", lambda f, t: f(t).roll(128, dims=-1))),
    KnownBug("frequencies off by one",
        "the frequencies are 10000^(-i/127), expected 10000^(-i/128)",
        TIME, patched(transformer, "timestep_embedding", frequencies_to_the_end)),
    KnownBug("schedule off by one", "a step is computed at the time of the next one",
        TIME, at_next_time),
    KnownBug("schedule off by one", "the first time, which is 1, is left out",
        SCHEDULE, partial(shift_times, times=without_first_time)),
    KnownBug("schedule off by one", "the last time, which is 0, is left out",
        SCHEDULE, partial(shift_times, times=without_last_time)),
    KnownBug("schedule unshifted", "the times are even, expected shifted by mu",
        SCHEDULE, partial(schedule, "unshifted")),
    KnownBug("schedule's mu", "the shift is mu, expected e^mu",
        SCHEDULE, partial(shift_times, times=even_times, shift=lambda mu: mu)),
    KnownBug("schedule's mu", "mu is the other family's", SCHEDULE, other_schedule),
    KnownBug("t times 1000", "times run from 1000 to 0, expected from 1 to 0",
        SCHEDULE, lambda rerun: 1000 * rerun.times),

    # latents
    KnownBug(*PLACES, PACKED, pack_by_place),
    KnownBug(*COLUMNS, PACKED, pack_by_column),
    KnownBug(*PLACES, CODER, unpack_as("ph pw c")),
    KnownBug(*COLUMNS, CODER, unpack_as("c pw ph")),
    KnownBug("image tokens column by column",
        "tokens follow the columns of latents, expected the rows",
        TOKENS, column_by_column),
    KnownBug("noise drawn in another layout",
        "FLUX.1's noise is drawn before it is packed, FLUX.2's is drawn packed",
        r"^noise$", other_noise_layout),
    KnownBug(*SIGN, VELOCITY, lambda rerun: -rerun.expected),
    KnownBug(*SIGN, LATENTS, partial(euler_step, sign=-1)),
    KnownBug("schedule off by one", "Euler's step is as long as the next one",
        LATENTS, partial(euler_step, offset=1)),
    KnownBug("guidance left out", "the velocity without the prompt is not used",
        GUIDED, cfg(lambda prompt, empty, scale: prompt)),
    KnownBug("guidance the wrong way", "the velocities with and without the prompt are swapped",
        GUIDED, cfg(lambda prompt, empty, scale: prompt + scale * (empty - prompt))),
    KnownBug("guidance from the prompt",
        "the scaled difference is added to the velocity with the prompt, expected without it",
        GUIDED, cfg(lambda prompt, empty, scale: prompt + scale * (prompt - empty))),

    # autoencoder and pixels
    KnownBug("latent normalisation missing", "latents are decoded, or encoded, without it",
        CODER, normalised_with(use_mean=False, use_std=False)),
    KnownBug("latent normalisation half missing", "the mean of latents is left out",
        CODER, normalised_with(use_mean=False, use_std=True)),
    KnownBug("latent normalisation half missing", "the scale of latents is left out",
        CODER, normalised_with(use_mean=True, use_std=False)),
    KnownBug("latent normalisation in the wrong order",
        "the mean of latents is added before they are scaled, expected after",
        CODER, shifted_first),
    KnownBug("latent normalisation inverted",
        "latents are normalised before decoding, expected denormalised",
        CODER, patched(AutoEncoder, "denormalise", lambda f, self, x: self.normalise(x))),
    KnownBug("upsampling smooth",
        "the decoder's upsampling interpolates, expected to repeat the nearest value",
        CODER, patched(F, "interpolate", bilinear)),
    KnownBug("downsampling padded on all sides",
        "the encoder pads at the left and top too, expected at the right and bottom only",
        CODER, patched(F, "pad", lambda f, x, *_, **__: f(x, (1, 1, 1, 1)))),
    KnownBug("pixels truncated", "pixels are truncated to integers, expected rounded",
        r"^image$", truncated),
    KnownBug("red and blue swapped", "the channels are blue, green, red",
        r"^image$", lambda rerun: rerun.expected.flip(-1)),
    *BUGS_IN_BLOCKS,
)
# fmt: on
