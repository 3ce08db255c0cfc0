"""Make `tests/golden_bfl`: a small run of each family, rounded to bfloat16 where Black Forest Labs' own code rounds.

    python scripts/parity.py kit --random flux.1 --output kit1
    python scripts/parity.py kit --random flux.2 --output kit2
    python scripts/dev/golden_bfl.py kit1/weights/transformer.safetensors kit2/weights/transformer.safetensors

Their packages are called `flux`, too, and nothing of this one is used here: a run is written out from the equations. All
numbers are held in float32, and `r` rounds one to bfloat16, so that each rounding stands where it happens:

    R1   noise is drawn in bfloat16: the float32 numbers, rounded                    F1 sampling.get_noise, F2 cli
    R2   the schedule is float32; t and guidance are bfloat16                        sampling.get_schedule, denoise
    R3   1000 t is bfloat16, its sinusoids are float32, and then rounded             F1 layers.timestep_embedding
    R4   each sum in vec, of time, then guidance, then pooled text                   model.forward
    R5   RoPE's frequencies, angles, cosines and sines are float32, and stay so      F1 math.rope
    R6   of q and k: x / rms in float32, rounded, then times scale, rounded          F1 layers.RMSNorm
    R7   q and k are turned in float32, and then rounded                             F1 math.apply_rope
    R8   1 + scale; its product with the LayerNorm; the sum of that and shift        F1 layers.DoubleStreamBlock
    R9   gate times a branch; the sum of that and x                                  F1 layers.DoubleStreamBlock
    R10  FLUX.2: silu of the gate; its product with the other half                   F2 model.SiLUActivation
    R11  t' - t, a number of Python's, times velocity; the sum with the latents      sampling.denoise

F1 is black-forest-labs/flux at 802fb47, F2 black-forest-labs/flux2 at ab7cca6; where neither is named, both are meant. What
torch computes as one, it rounds once, at the end: `whole` hands it bfloat16, as they do, for linear layers, LayerNorm, SiLU,
GELU and attention. In which order these sum inside is the processor's affair, so that other machines may give other last bits.
One picture is made, as by their scripts: of several at once, attention's output is no longer one piece of memory for each
stream of FLUX.1, and torch rounds the product of such with a matrix once more before it adds the bias.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden_bfl"
STEPS, GUIDANCE, SEED, TEXT, ROWS, COLUMNS = 4, 3.5, 0, 24, 4, 6
AXES, THETA = (
    {"flux.1": (8, 12, 12), "flux.2": (8, 8, 8, 8)},
    {"flux.1": 10_000, "flux.2": 2000},
)  # as flux/parity/reference.py has


def r(x):
    return x.bfloat16().float()


def is_flux2(w):
    return "single_stream_modulation.lin.weight" in w


def whole(function, *args, **options):
    return function(*(x if x is None else x.bfloat16() for x in args), **options).float()


# ---------------------------------------------------------------- the run


def run(w):
    """Name -> tensor of a whole run, from a file's tensors; names as `parity.py` gives them."""
    w = {name: r(x) for name, x in w.items()}
    family = "flux.2" if is_flux2(w) else "flux.1"
    out, generator = {}, torch.Generator().manual_seed(1)
    txt = out["text/features"] = r(
        torch.randn(1, TEXT, w["txt_in.weight"].shape[1], generator=generator)
    )
    pooled = None
    if family == "flux.1":
        pooled = out["text/pooled"] = r(
            torch.randn(1, w["vector_in.in_layer.weight"].shape[1], generator=generator)
        )
    rope = out["rope"] = rope_table(family)
    x, times = noise(family, w["img_in.weight"].shape[1]), schedule(family)
    out["schedule"] = torch.tensor(times)
    for step, (now, after) in enumerate(zip(times, times[1:]), start=1):
        at = f"step.{step:03}"
        velocity = network(
            w, x, txt, pooled, rope, now, lambda name, value: out.update({f"{at}/{name}": value})
        )
        x = r(x + r(torch.tensor(after - now) * velocity))  # R11
        out[f"{at}/latents"] = x.transpose(1, 2).reshape(1, -1, ROWS, COLUMNS)
    return family, out


def noise(family, channels):
    """R1. Tokens, row by row: FLUX.1 draws four numbers a token side by side, FLUX.2 all of a token's.

    BFL draws in bfloat16: in torch 2.13 that is float32, rounded; in 2.11 it was other numbers, which nothing here repeats.
    """
    generator = torch.Generator().manual_seed(SEED)
    if family == "flux.2":
        return r(torch.randn(1, channels, ROWS, COLUMNS, generator=generator)).flatten(2).mT
    drawn = r(torch.randn(1, channels // 4, 2 * ROWS, 2 * COLUMNS, generator=generator))
    return F.pixel_unshuffle(drawn, 2).flatten(2).mT


def schedule(family):
    """R2. FLUX.1's mu is on a line in the tokens; FLUX.2's on one in the steps, between two that are lines in the tokens."""
    tokens = ROWS * COLUMNS
    if family == "flux.1":
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    else:
        few, many = (
            8.73809524e-05 * tokens + 1.89833333,
            0.00016927 * tokens + 0.45666666,
        )  # at 10 and at 200 steps
        mu = few + (many - few) * (STEPS - 10) / 190
    t = torch.linspace(1, 0, STEPS + 1)
    return (math.exp(mu) / (math.exp(mu) + (1 / t - 1))).tolist()


def rope_table(family):
    """R5. Cosines and sines (N, d/2, 2) of text and image: text lies at 0, and FLUX.2 counts it on its last axis."""
    places = torch.zeros(TEXT + ROWS * COLUMNS, len(AXES[family]))
    if family == "flux.2":
        places[:TEXT, 3] = torch.arange(TEXT)
    places[TEXT:, 1] = torch.arange(ROWS).repeat_interleave(COLUMNS)
    places[TEXT:, 2] = torch.arange(COLUMNS).repeat(ROWS)
    omegas = [
        1.0 / THETA[family] ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
        for n in AXES[family]
    ]
    angle = torch.cat([places[:, axis, None] * omega for axis, omega in enumerate(omegas)], dim=1)
    return torch.stack([angle.cos(), angle.sin()], dim=2)


# ---------------------------------------------------------------- the network


def network(w, x, txt, pooled, rope, t, see):
    """Velocity of the tokens x. FLUX.2 has one modulation for all blocks of a kind, and FLUX.1 one in each."""

    def blocks(kind):
        return sorted({".".join(name.split(".")[:2]) for name in w if name.startswith(kind)})

    vec = embedder(w, "time_in", timestep_embedding(t))
    vec = r(vec + embedder(w, "guidance_in", timestep_embedding(GUIDANCE)))  # R4
    if pooled is not None:
        vec = r(vec + embedder(w, "vector_in", pooled))
    see("vec", vec)

    def modulation(name, n):
        return linear(w, f"{name}.lin", whole(F.silu, vec))[:, None].chunk(n, dim=-1)

    img, txt = linear(w, "img_in", x), linear(w, "txt_in", txt)
    for block in blocks("double_blocks"):
        shared = "double_stream_modulation_img", "double_stream_modulation_txt"
        names = shared if is_flux2(w) else (f"{block}.img_mod", f"{block}.txt_mod")
        img, txt = double(w, block, img, txt, rope, *(modulation(name, 6) for name in names), see)
    joint = torch.cat([txt, img], dim=1)
    for block in blocks("single_blocks"):
        name = "single_stream_modulation" if is_flux2(w) else f"{block}.modulation"
        joint = single(w, block, joint, rope, modulation(name, 3), see)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", whole(F.silu, vec))[:, None].chunk(
        2, dim=-1
    )
    velocity = linear(w, "final_layer.linear", modulated(joint[:, TEXT:], shift, scale))
    see("out", velocity)
    return velocity


def double(w, block, img, txt, rope, img_mod, txt_mod, see):
    parts = []
    for stream, x, (shift, scale, *_) in (("txt", txt, txt_mod), ("img", img, img_mod)):
        attn = f"{block}.{stream}_attn"
        parts.append(heads(w, f"{attn}.norm", linear(w, f"{attn}.qkv", modulated(x, shift, scale))))
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts))
    attended = attention(block, q, k, v, rope, see)
    out = []
    for stream, x, y, mod in (
        ("img", img, attended[:, TEXT:], img_mod),
        ("txt", txt, attended[:, :TEXT], txt_mod),
    ):
        _, _, gate, shift, scale, mlp_gate = mod
        x = r(x + r(gate * linear(w, f"{block}.{stream}_attn.proj", y)))  # R9
        hidden = activation(w, linear(w, f"{block}.{stream}_mlp.0", modulated(x, shift, scale)))
        out.append(r(x + r(mlp_gate * linear(w, f"{block}.{stream}_mlp.2", hidden))))
        see(f"{block}/out.{len(out) - 1}", out[-1])
    return out


def single(w, block, x, rope, mod, see):
    shift, scale, gate = mod
    wide = linear(w, f"{block}.linear1", modulated(x, shift, scale))
    qkv, hidden = wide.tensor_split([3 * x.shape[-1]], dim=-1)
    attended = attention(block, *heads(w, f"{block}.norm", qkv), rope, see)
    branch = linear(w, f"{block}.linear2", torch.cat([attended, activation(w, hidden)], dim=-1))
    x = r(x + r(gate * branch))  # R9
    see(f"{block}/out", x)
    return x


def heads(w, norm, qkv):
    """(1, N, 3 H d) -> q, k and v, each (1, H, N, d), q and k normalised."""
    q, k, v = qkv.reshape(1, qkv.shape[1], 3, -1, len(w[f"{norm}.query_norm.scale"])).permute(
        2, 0, 3, 1, 4
    )
    scaled = lambda x, scale: r(r(x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6)) * scale)  # noqa: E731  R6
    return scaled(q, w[f"{norm}.query_norm.scale"]), scaled(k, w[f"{norm}.key_norm.scale"]), v


def attention(block, q, k, v, rope, see):
    q, k = turned(q, rope), turned(k, rope)
    out = whole(F.scaled_dot_product_attention, q, k, v)
    for tap, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        see(f"{block}/attention/{tap}", tensor)
    return out.transpose(1, 2).flatten(2)  # (1, N, H d)


def turned(x, rope):
    """R7"""
    cos, sin, even, odd = rope[..., 0], rope[..., 1], x[..., 0::2], x[..., 1::2]
    return r(torch.stack([cos * even + -sin * odd, sin * even + cos * odd], dim=-1).flatten(-2))


def modulated(x, shift, scale):
    """R8"""
    return r(
        r(r(1 + scale) * whole(F.layer_norm, x, normalized_shape=x.shape[-1:], eps=1e-6)) + shift
    )


def activation(w, hidden):
    if not is_flux2(w):
        return whole(F.gelu, hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return r(whole(F.silu, gate) * up)  # R10


def timestep_embedding(value):
    """R3, and R2: 256 of t or of guidance."""
    thousandfold = r(1000 * r(torch.tensor([value])))
    angle = thousandfold[:, None] * torch.exp(
        -math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128
    )
    return r(torch.cat([angle.cos(), angle.sin()], dim=-1))


def embedder(w, name, x):
    return linear(w, f"{name}.out_layer", whole(F.silu, linear(w, f"{name}.in_layer", x)))


def linear(w, name, x):
    return whole(F.linear, x, w[f"{name}.weight"], w.get(f"{name}.bias"))


# ---------------------------------------------------------------- files


def kept(name):
    """Of the first step, what each block gives; of the others, what they give as a whole."""
    return "/attention/" not in name and (name.startswith("step.001") or "blocks" not in name)


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for path in sys.argv[1:]:
        family, tensors = run(load_file(path))
        exact = ("rope", "schedule")  # float32 with them, too
        tensors = {
            name: x.contiguous() if name in exact else x.bfloat16().contiguous()
            for name, x in tensors.items()
        }
        found = {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}
        save_file(
            {name: x for name, x in tensors.items() if kept(name)},
            GOLDEN / f"{family}.safetensors",
            metadata=found,
        )


if __name__ == "__main__":
    main()
