"""The mistakes that ports of FLUX are known for, each as the few lines that make it.

A row says where a mistake can show, by the name of a tensor, and how that tensor comes out with it: a function of what was
recorded, or our own code, run again with something changed in it. A mistake that can be made in several ways has several rows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flux import autoencoder, clip, language_model, sampling, t5, transformer
from flux.autoencoder import AutoEncoder, Upsample
from flux.parity.rerun import Case
from flux.transformer import Flux, GatedSiLU, KVCache, Modulation, ModulationOut, Numerics, QKNorm


class Mistake(NamedTuple):
    name: str
    sentence: str  # what is done, and should not be
    where: str  # a regular expression: in the names of tensors in which it can show first
    wrong: Callable[[Case], Tensor]  # LookupError where the capture lacks what it takes


def changed(owner: object, attribute: str, wrong: Callable) -> Callable[[Case], Tensor]:
    """Our code with `wrong(original, *args)` in place of one function."""
    return lambda case: case.again((owner, attribute, wrong))


# ---------------------------------------------------------------- modulation and norms


def swapped(mod: ModulationOut) -> ModulationOut:
    return mod._replace(shift=mod.scale - 1, scale=1 + mod.shift)


def cut_by_kind(f: Callable, self: Modulation, vec: Tensor) -> list[ModulationOut]:
    branches = f(self, vec)
    chunks = [chunk for shift, scale, gate in branches for chunk in (shift, scale - 1, gate)]
    kinds = [chunks[number :: len(branches)] for number in range(len(branches))]
    return [ModulationOut(shift, 1 + scale, gate) for shift, scale, gate in kinds]


def with_eps(eps: float) -> Callable[[Case], Tensor]:
    """Of every norm; torch's take it last, after weight and bias."""

    def by_hand(f, self, x):
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=eps).to(x.dtype)

    return (
        lambda case: case.again(
            (F, "layer_norm", lambda f, *args, **named: f(*args[:4], **named | {"eps": eps})),
            (F, "group_norm", lambda f, *args, **named: f(*args[:4], **named | {"eps": eps})),
            (
                F,
                "batch_norm",
                lambda f, *args, **named: f(*args, **named | {"eps": eps}),
            ),  # group norms, of tensors channels last
            (F, "rms_norm", lambda f, *args, **named: f(*args[:3], **named | {"eps": eps})),
            (language_model.RMSNorm, "forward", by_hand),
            (t5.RMSNorm, "forward", by_hand),
        )
    )


def qk_norm_over(*axes: int) -> Callable[[Case], Tensor]:
    """Of (2, B, N, H, d), in a double block of each stream alone."""

    def wrong(case: Case) -> Tensor:
        text = len(case.ids[0]) if "double_blocks" in case.name else 0

        def norm(f: Callable, x: Tensor, numerics: Numerics) -> Tensor:
            streams = x.float().tensor_split([text], dim=2)
            return torch.cat(
                [s * torch.rsqrt(s.square().mean(axes, keepdim=True) + 1e-6) for s in streams],
                dim=2,
            ).to(x.dtype)

        return case.again((transformer, "unit_rms", norm))

    return wrong


def unscaled(f: Callable, self: QKNorm, unit: Tensor) -> Tensor:
    return unit.to(self.query_norm.scale.dtype)


def unnormed(case: Case) -> Tensor:
    called = []

    def nothing(f: Callable, x: Tensor, numerics: Numerics) -> Tensor:
        called.append(True)
        return x

    wrong = case.again((transformer, "unit_rms", nothing), (QKNorm, "forward", unscaled))
    if not called:
        raise LookupError("the norm lies before this run, which only scales")
    return wrong


def turned_too_early(case: Case) -> Tensor:
    """q and k as they go into their norm's scales, after RoPE."""
    rope = case.given(case.of_pass("rope"))
    length = case.truth.shape[2]
    return transformer.rotate(
        case.truth, rope[:length] if "txt_attn" in case.name else rope[-length:]
    )


def normed_too_late(case: Case) -> Tensor:
    """q, k and what comes of them, if they go into the norm after RoPE."""
    rope, rotate = case.given(case.of_pass("rope")), transformer.rotate
    of_text = [block.txt_attn.norm for block in case.network.double_blocks]

    def norm(f: Callable, self: QKNorm, unit: Tensor) -> Tensor:
        rows = (
            rope[: unit.shape[2]]
            if any(self is norm for norm in of_text)
            else rope[-unit.shape[2] :]
        )
        return f(self, rotate(unit, rows))

    return case.again((QKNorm, "forward", norm), (transformer, "rotate", lambda f, x, rope: x))


# ---------------------------------------------------------------- positions and attention


def halves(f: Callable, x: Tensor, rope: Tensor) -> Tensor:
    (a, b), (cos, sin) = x.float().chunk(2, dim=-1), rope[:, None, :, :, 0].unbind(-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def with_ids(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Case], Tensor]:
    """Other coordinates of text and image: those themselves, the table that is made of them, or what it turns."""

    def wrong(case: Case) -> Tensor:
        txt, img = change(*case.ids)
        if "ids/" in case.name:
            return txt if case.name.endswith("txt") else img
        rope = case.network.rope(txt, img)
        return (
            rope
            if case.name.endswith("rope")
            else case.again((transformer, "rotate", lambda f, x, _: f(x, rope)))
        )

    return wrong


def shifted_by(*offset: int) -> Callable[[Case], Tensor]:
    """(row, column) of the first image token."""
    return with_ids(
        lambda txt, img: (txt, img + F.pad(img.new_tensor(offset), (1, img.shape[-1] - 3)))
    )


def exchanged(case: Case) -> Tensor:
    """Image tokens before text tokens."""
    return case.truth.roll(-len(case.ids[0]), dims=-2)


def first_tokens(case: Case) -> Tensor:
    """As many as the image has, of the joint sequence that begins with the text."""
    last = len(case.network.single_blocks) - 1
    return case.given(f"{case.where}/single_blocks.{last}/out")[:, : len(case.ids[1])]


def pads(case: Case) -> Tensor:
    """(T,) True where a text token is padding."""
    if case.pipe.spec.flux1:
        return case.given(case.of_text("t5/in"))[0] == 0
    return ~case.given(case.of_text("model/in.1"))[0]


def padding_masked(case: Case) -> Tensor:
    """In the joint attention, as keys."""
    hidden = pads(case)

    def attention(
        f: Callable, q: Tensor, k: Tensor, v: Tensor, memory: KVCache | None = None
    ) -> Tensor:
        visible = F.pad(~hidden, (0, k.shape[1] - len(hidden)), value=True)
        q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
        return rearrange(
            F.scaled_dot_product_attention(q, k, v, visible[None, :]), "b h n d -> b n (h d)"
        )

    return case.again((transformer, "attention", attention))


def padding_masked_in_t5(case: Case) -> Tensor:
    hidden = pads(case)
    return case.again(
        (
            t5.SelfAttention,
            "forward",
            lambda f, self, x, bias: f(self, x, bias.masked_fill(hidden, -torch.inf)),
        )
    )


def padding_seen(
    f: Callable, self: language_model.Attention, x: Tensor, rope: Tensor, visible: Tensor
) -> Tensor:
    return f(self, x, rope, torch.ones_like(visible).tril())


def last_pooled(case: Case) -> Tensor:
    """CLIP's pooled vector of its last token, which is padding in all but the longest prompts."""
    text = case.network.text_model
    last = case.given(f"{case.where}/text_model.encoder.layers.{len(text.encoder.layers) - 1}/out")[
        :, -1
    ]
    return last if case.name.endswith("/in") else text.final_layer_norm(last)


def layers_before(case: Case) -> Tensor:
    """Hidden states counted from 0, where the embeddings are 0 and the first layer's output is 1."""
    read = [number - 2 for number in case.pipe.spec.text.model.layers]
    names = [f"layers.{number}" if number >= 0 else "embed_tokens" for number in read]
    return torch.cat([case.given(f"{case.where}/{name}/out") for name in names], dim=-1)


# ---------------------------------------------------------------- time


def at_next_time(case: Case) -> Tensor:
    later = case.times[case.step : case.step + 1]
    return case.again((Flux, "vec", lambda f, self, t, *args: f(self, later, *args)))


def spread(frequencies: int, f: Callable, t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoids whose last frequency is 1/10000, and not the one before it."""
    angle = t.float()[:, None] * torch.exp(
        -math.log(10_000) * torch.arange(dim // 2).to(t) / frequencies
    )
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def schedule(kind: str, case: Case) -> Tensor:
    return sampling.schedule(kind, len(case.times) - 1, case.tokens)


def other_schedule(case: Case) -> Tensor:
    return schedule("empirical" if case.pipe.spec.schedule == "linear" else "linear", case)


def reshifted(
    case: Case, shift: Callable[[float], float], times: Callable[[int], Tensor]
) -> Tensor:
    """The schedule again from its parts: t -> s / (s + 1/t - 1) with s = shift(mu), of times(steps)."""
    steps = len(case.times) - 1
    kinds = {"linear": sampling.calculate_shift, "empirical": sampling.compute_empirical_mu}
    s = shift(kinds[case.pipe.spec.schedule](case.tokens, steps))
    return (s / (s + 1 / times(steps).double() - 1)).float()


def even(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


# ---------------------------------------------------------------- latents


def packed_by_place(case: Case) -> Tensor:
    """The four places of a 2x2 patch outermost in the channels, and not innermost."""
    axis = 1 if case.truth.ndim == 4 else 2
    return case.truth.unflatten(axis, (-1, 4)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def packed_by_column(case: Case) -> Tensor:
    """The places of a 2x2 patch column by column."""
    axis = 1 if case.truth.ndim == 4 else 2
    return (
        case.truth.unflatten(axis, (-1, 2, 2)).transpose(axis + 1, axis + 2).flatten(axis, axis + 2)
    )


def unpacked(order: str) -> Callable[[Case], Tensor]:
    pattern = f"b ({order}) h w -> b c (h ph) (w pw)"
    return changed(autoencoder, "unpack", lambda f, x: rearrange(x, pattern, ph=2, pw=2))


def column_by_column(case: Case) -> Tensor:
    height, width = case.given("noise").shape[2:]
    return rearrange(case.truth, "b (h w) c -> b (w h) c", h=height, w=width)


def drawn_otherwise(case: Case) -> Tensor:
    """FLUX.1 draws before packing, and FLUX.2 after it."""
    _, channels, height, width = case.truth.shape
    drawn = sampling.noise(
        [case.reference.recipe["seed"]], channels, height, width, spatial=not case.pipe.spec.flux1
    )
    return drawn.to(case.truth)


def guided_by(formula: Callable[[Tensor, Tensor, float], Tensor], case: Case) -> Tensor:
    """Classifier-free guidance of the velocities with and without the prompt."""
    return formula(
        case.given(case.of_step("out")), case.given(case.of_step("negative/out")), case.cfg_scale
    )


def euler(case: Case, velocity_sign: int = 1, offset: int = 0) -> Tensor:
    """One step of Euler's method, over the interval that is `offset` later."""
    x, velocity, times = (
        case.latents(case.step - 1),
        case.given(case.of_step("velocity")),
        case.times.tolist(),
    )
    if case.step + offset >= len(times):
        raise LookupError("there is no later interval")
    dt = times[case.step + offset] - times[case.step - 1 + offset]
    return x + velocity_sign * dt * rearrange(
        velocity.float(), "b (h w) c -> b c h w", h=x.shape[2]
    )


def statistics(mean: bool, std: bool) -> Callable[[Case], Tensor]:
    """Normalise latents by their mean only, by their standard deviation only, or not at all."""

    def normalised(f, self, x):
        offset = f(self, torch.zeros_like(x))  # -mean / std
        slope = f(self, torch.ones_like(x)) - offset  # 1 / std
        return (x + offset / slope if mean else x) * (slope if std else 1)

    def denormalised(f, self, x):
        offset = f(self, torch.zeros_like(x))  # mean
        slope = f(self, torch.ones_like(x)) - offset  # std
        return x * (slope if std else 1) + (offset if mean else 0)

    changes = (AutoEncoder, "normalise", normalised), (AutoEncoder, "denormalise", denormalised)
    return lambda case: case.again(*changes)


def of_smooth(f: Callable, self: Upsample, x: Tensor) -> Tensor:
    return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))


def truncated(case: Case) -> Tensor:
    return rearrange(
        (case.given("pixels").float().clamp(-1, 1) / 2 + 0.5) * 255, "1 c h w -> h w c"
    ).byte()


# ---------------------------------------------------------------- the table

STEP, TIME, TEXT, IDS = (
    r"^(step|references)",
    r"/(time|guidance)_in|/vec$",
    r"^text",
    r"^(negative/)?(ids|rope)|^step",
)
VELOCITY = r"^step\.\d+(/negative)?/(velocity|out|final_layer(\.linear)?/out)$"
CODER = r"^(decoder|pixels|encoder)"
PACKED = r"^noise$|^step\.\d+(/negative)?/(in|img_in/in|latents)$|^encoder\.\d+/latents$"
SWAPPED = (
    "shift and scale swapped",
    "a modulation's shift is used as its scale, and its scale as its shift",
)
LATE_NORM = (
    "QK-norm after RoPE",
    "queries and keys are turned first and normalised then, so that its scale meets mixed pairs",
)
ROWS = (
    "rows and columns swapped",
    "the second coordinate of an image token is its row, and the third its column",
)
PADS = (
    "padding of the prompt masked",
    "padded text tokens are hidden from attention; FLUX was trained to see them",
)
BF16 = (
    "t rounded to bfloat16",
    "t or guidance, or its thousandfold, is rounded to bfloat16, and should stay float32",
)
PLACES = (
    "packing order of latents",
    "a 2x2 patch is packed as (patch, channel), and should be (channel, row, column)",
)
COLUMNS = (
    "packing order of latents",
    "a 2x2 patch is packed column by column, and should be row by row",
)
SIGN = (
    "velocity's sign",
    "the sign of the velocity, which is noise - picture, or of dt, which is negative, is wrong",
)
NEXT = "schedule off by one", "a step is computed at the time of the next one"

MISTAKES = (
    Mistake(*SWAPPED, STEP, changed(transformer, "modulate", lambda f, x, mod: f(x, swapped(mod)))),
    Mistake(
        *SWAPPED,
        STEP,
        changed(Modulation, "forward", lambda f, self, vec: [*map(swapped, f(self, vec))]),
    ),
    Mistake(
        "1 + scale missing",
        "a norm is multiplied by scale, and should be by 1 + scale",
        STEP,
        changed(transformer, "modulate", lambda f, x, m: f(x, m._replace(scale=m.scale - 1))),
    ),
    Mistake(
        "modulation cut by kind",
        "a modulator's output is cut into (kind, branch), and should be into (branch, kind): "
        "shift, scale and gate of attention, then those of the MLP",
        STEP,
        changed(Modulation, "forward", cut_by_kind),
    ),
    Mistake(
        "SiLU missing",
        "a SiLU is left out; what modulators read goes through one",
        STEP,
        changed(F, "silu", lambda f, x, inplace=False: x),
    ),
    *(
        Mistake(
            f"eps {eps:g}",
            f"a norm adds {eps:g} to the variance; FLUX adds 1e-6, CLIP and Mistral 1e-5",
            "",
            with_eps(eps),
        )
        for eps in (1e-5, 1e-6, 1e-8, 1e-4, 1e-3)
    ),
    *(
        Mistake(
            f"eps {eps:g}",
            f"QK-norm adds {eps:g} to the mean square; FLUX adds 1e-6",
            STEP,
            changed(
                transformer,
                "unit_rms",
                lambda f, x, _, eps=eps: F.rms_norm(x, x.shape[-1:], eps=eps),
            ),
        )
        for eps in (1e-5, 1e-8, 1e-4, 1e-3)
    ),
    Mistake("QK-norm left out", "queries and keys are not normalised", STEP, unnormed),
    Mistake(
        "QK-norm without its scale",
        "queries and keys are normalised, but not scaled",
        STEP,
        changed(QKNorm, "forward", unscaled),
    ),
    Mistake(
        "QK-norm's scales swapped",
        "the query's scale is used for keys, and the key's for queries",
        STEP,
        changed(QKNorm, "forward", lambda f, self, unit: f(self, unit.flip(0)).flip(0)),
    ),
    Mistake(
        "QK-norm over the wrong axis",
        "they are normalised over tokens, and should be over each head's channels",
        STEP,
        qk_norm_over(2),
    ),
    Mistake(
        "QK-norm over the wrong axis",
        "they are normalised over all heads together, and should be head by head",
        STEP,
        qk_norm_over(3, 4),
    ),
    Mistake(
        "QK-norm over the wrong axis",
        "they are normalised over heads, and should be over each head's channels",
        STEP,
        qk_norm_over(3),
    ),
    Mistake(*LATE_NORM, r"norm/in", turned_too_early),
    Mistake(*LATE_NORM, STEP, normed_too_late),
    Mistake(
        "RoPE turns halves",
        "channel i is turned with channel i + d/2, and should be with its neighbour",
        STEP,
        changed(transformer, "rotate", halves),
    ),
    Mistake(
        "RoPE's pairs stored as halves",
        "q and k are turned well, and kept in another order; attention is the same",
        STEP,
        changed(
            transformer,
            "rotate",
            lambda f, x, rope: f(x, rope).unflatten(-1, (-1, 2)).mT.flatten(-2),
        ),
    ),
    Mistake(
        "RoPE turns backwards",
        "the sign of the angles is wrong",
        STEP,
        changed(transformer, "rotate", lambda f, x, rope: f(x, rope.mT)),
    ),
    Mistake(
        "RoPE left out",
        "queries and keys are not turned",
        STEP,
        changed(transformer, "rotate", lambda f, x, rope: x),
    ),
    Mistake(
        "RoPE's theta",
        "theta is the other family's: 10000 in FLUX.1, 2000 in FLUX.2",
        "^(negative/)?rope",
        changed(
            transformer,
            "rope_table",
            lambda f, ids, axes, theta, dtype: f(ids, axes, 12_000 - theta, dtype),
        ),
    ),
    Mistake(
        *ROWS,
        IDS,
        with_ids(
            lambda txt, img: (txt, torch.cat([img[:, :1], img[:, [2, 1]], img[:, 3:]], dim=1))
        ),
    ),
    Mistake(
        "rows off by one",
        "rows of image tokens are counted from 1, and should be from 0",
        IDS,
        shifted_by(1, 0),
    ),
    Mistake(
        "columns off by one",
        "columns of image tokens are counted from 1, and should be from 0",
        IDS,
        shifted_by(0, 1),
    ),
    Mistake(
        "rows and columns off by one",
        "both are counted from 1, and should be from 0",
        IDS,
        shifted_by(1, 1),
    ),
    Mistake(
        "text coordinates",
        "text tokens are not counted on the fourth axis, as FLUX.2 wants it",
        IDS,
        with_ids(lambda txt, img: (torch.zeros_like(txt), img)),
    ),
    Mistake(
        "text and image order",
        "coordinates of image tokens come before those of text tokens",
        IDS,
        with_ids(lambda txt, img: (img, txt) if len(txt) else (txt, img)),
    ),
    Mistake(
        "text and image order",
        "image tokens come before text tokens in the joint sequence",
        r"/single_blocks|/attention/",
        exchanged,
    ),
    Mistake(
        "text and image order",
        "the first tokens of the joint sequence, which are text, are taken for the image's",
        r"/final_layer/in(\.0)?$",
        first_tokens,
    ),
    Mistake(
        "q, k, v cut by heads",
        "the rows of qkv are taken as (head, q k v, channel), and are (q k v, head, channel)",
        STEP,
        changed(
            transformer,
            "split_heads",
            lambda f, qkv, heads: rearrange(
                qkv, "b n (h three d) -> three b n h d", three=3, h=heads
            ),
        ),
    ),
    Mistake(
        "GELU by erf",
        "GELU is computed exactly, and should be by its tanh approximation",
        "",
        changed(F, "gelu", lambda f, x, approximate="none": f(x)),
    ),
    Mistake(
        "GELU by erf",
        "GELU is computed exactly, and should be by its tanh approximation",
        TEXT,
        changed(t5, "gelu_new", lambda f, x: F.gelu(x)),
    ),
    Mistake(
        "GELU by erf",
        "CLIP's GELU is computed exactly, and should be x · sigmoid(1.702 x)",
        TEXT,
        changed(clip.MLP, "forward", lambda f, self, x: self.fc2(F.gelu(self.fc1(x)))),
    ),
    Mistake(
        "gate and value swapped",
        "the second half of a gated MLP goes through SiLU, and the first should",
        STEP,
        changed(
            GatedSiLU, "forward", lambda f, self, x: f(self, x.roll(x.shape[-1] // 2, dims=-1))
        ),
    ),
    Mistake(
        "attention not scaled",
        "q·k is not divided by the square root of the head's width",
        STEP,
        changed(transformer, "attention", lambda f, q, *args: f(q * q.shape[-1] ** 0.5, *args)),
    ),
    Mistake(*PADS, STEP, padding_masked),
    Mistake(*PADS, TEXT, padding_masked_in_t5),
    Mistake(
        "padding of the prompt zeroed",
        "features of padded tokens are set to zero, and should be as computed",
        r"^text/(negative/)?features|/txt_in/in$",
        lambda case: case.truth * ~pads(case)[:, None],
    ),
    Mistake(
        "padding of the prompt seen",
        "the language model attends to padding, which its mask should hide",
        TEXT,
        changed(language_model.Attention, "forward", padding_seen),
    ),
    Mistake(
        "padding of the prompt seen",
        "the language model's mask is causal only, and should hide padding too",
        r"/model/layers\.\d+(\.self_attn)?/in\.2",
        lambda case: torch.ones_like(case.truth).tril(),
    ),
    Mistake(
        "pooled at the last token",
        "CLIP is read at its last token, and should be at the first end of text",
        "clip|pooled",
        last_pooled,
    ),
    Mistake(
        "hidden states off by one",
        "the language model is read one layer too early",
        r"/model/out$|text/.*features",
        layers_before,
    ),
    Mistake(
        "t not times 1000",
        "the sinusoids are of t or of guidance, and should be of its thousandfold",
        TIME,
        changed(transformer, "scale_time", lambda f, t, *_: t.float()),
    ),
    Mistake(
        *BF16,
        TIME,
        changed(transformer, "scale_time", lambda f, t, *_: 1000 * t.bfloat16().float()),
    ),
    Mistake(
        *BF16,
        TIME,
        changed(transformer, "scale_time", lambda f, t, *_: f(t, "bfl", torch.bfloat16)),
    ),
    Mistake(
        *BF16,
        TIME,
        changed(transformer, "scale_time", lambda f, t, *_: (1000 * t.float()).bfloat16().float()),
    ),
    Mistake(
        *BF16,
        TIME,
        changed(transformer, "scale_time", lambda f, t, *_: f(t, "diffusers", torch.bfloat16)),
    ),
    Mistake(
        "t kept in float32",
        "t or guidance is not rounded, and the numerics of the reference round it",
        TIME,
        changed(transformer, "scale_time", lambda f, t, _, dtype: f(t, "float32", dtype)),
    ),
    Mistake(
        "sines before cosines",
        "time's sinusoids are sines, then cosines, and should be the other way round",
        TIME,
        changed(transformer, "timestep_embedding", lambda f, t: f(t).roll(128, dims=-1)),
    ),
    Mistake(
        "frequencies off by one",
        "the frequencies are 10000^(-i/127), and should be 10000^(-i/128)",
        TIME,
        changed(transformer, "timestep_embedding", partial(spread, 127)),
    ),
    Mistake(*NEXT, TIME, at_next_time),
    Mistake(
        "schedule off by one",
        "the first time, which is 1, is left out",
        "^schedule$",
        lambda case: reshifted(case, math.exp, lambda steps: even(steps + 1)[1:]),
    ),
    Mistake(
        "schedule off by one",
        "the last time, which is 0, is left out",
        "^schedule$",
        lambda case: reshifted(case, math.exp, lambda steps: even(steps + 1)[:-1]),
    ),
    Mistake(
        "schedule unshifted",
        "the times are even, and should be shifted by mu",
        "^schedule$",
        partial(schedule, "unshifted"),
    ),
    Mistake(
        "schedule's mu",
        "the shift is mu, and should be e^mu",
        "^schedule$",
        lambda case: reshifted(case, lambda mu: mu, even),
    ),
    Mistake("schedule's mu", "mu is the other family's", "^schedule$", other_schedule),
    Mistake(
        "t times 1000",
        "times run from 1000 to 0, and should from 1 to 0",
        "^schedule$",
        lambda case: 1000 * case.times,
    ),
    Mistake(*PLACES, PACKED, packed_by_place),
    Mistake(*COLUMNS, PACKED, packed_by_column),
    Mistake(*PLACES, CODER, unpacked("ph pw c")),
    Mistake(*COLUMNS, CODER, unpacked("c pw ph")),
    Mistake(
        "image tokens column by column",
        "tokens go down the columns of latents, and should go along the rows",
        r"^step\.\d+(/negative)?/(in|img_in/in)$",
        column_by_column,
    ),
    Mistake(
        "noise drawn in another layout",
        "FLUX.1's noise is drawn before it is packed, and FLUX.2's in its packed form",
        "^noise$",
        drawn_otherwise,
    ),
    Mistake(*SIGN, VELOCITY, lambda case: -case.truth),
    Mistake(*SIGN, r"^step.*/latents$", partial(euler, velocity_sign=-1)),
    Mistake(
        "schedule off by one",
        "Euler's step is as long as the next one",
        r"^step.*/latents$",
        partial(euler, offset=1),
    ),
    Mistake(
        "guidance left out",
        "the velocity without the prompt is not used",
        r"^step.*/velocity$",
        partial(guided_by, lambda prompt, empty, scale: prompt),
    ),
    Mistake(
        "guidance the wrong way",
        "velocities with and without the prompt are swapped",
        r"^step.*/velocity$",
        partial(guided_by, lambda prompt, empty, scale: prompt + scale * (empty - prompt)),
    ),
    Mistake(
        "guidance from the prompt",
        "the scaled difference is added to the velocity with the prompt, not without it",
        r"^step.*/velocity$",
        partial(guided_by, lambda prompt, empty, scale: prompt + scale * (prompt - empty)),
    ),
    Mistake(
        "latent normalisation missing",
        "latents are decoded, or encoded, as they are",
        CODER,
        statistics(False, False),
    ),
    Mistake(
        "latent normalisation half missing",
        "the mean of latents is left out",
        CODER,
        statistics(False, True),
    ),
    Mistake(
        "latent normalisation half missing",
        "the scale of latents is left out",
        CODER,
        statistics(True, False),
    ),
    Mistake(
        "latent normalisation inverted",
        "latents are normalised before decoding; what encoding did is to be undone",
        CODER,
        changed(AutoEncoder, "denormalise", lambda f, self, latents: self.normalise(latents)),
    ),
    Mistake(
        "upsampling smooth",
        "the decoder's upsampling interpolates, and should repeat the nearest value",
        CODER,
        changed(Upsample, "forward", of_smooth),
    ),
    Mistake(
        "downsampling padded on all sides",
        "the encoder pads at the left and top too, and should not",
        CODER,
        changed(F, "pad", lambda f, x, *_, **__: f(x, (1, 1, 1, 1))),
    ),
    Mistake(
        "pixels truncated",
        "pixels are cut down to whole levels, and should be rounded",
        "^picture$",
        truncated,
    ),
    Mistake(
        "red and blue swapped",
        "the channels are blue, green, red",
        "^picture$",
        lambda case: case.truth.flip(-1),
    ),
)
