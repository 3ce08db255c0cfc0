"""Make `tests/golden_bfl/flux.*`: bfloat16 runs that round where Black Forest Labs' code rounds.

    python scripts/parity.py golden-kit --random flux.1 --output kit1
    python scripts/parity.py golden-kit --random flux.2 --output kit2
    python scripts/dev/golden_bfl.py kit1/weights/transformer.safetensors \\
        kit2/weights/transformer.safetensors --output FOLDER

This program computes with nothing of the project, which reads its arguments alone. It computes a
run from the equations, in float32, and `r` rounds a number to bfloat16. So every rounding is
visible:

    R1   noise: float32 numbers, rounded                        F1 sampling.get_noise, F2 cli
    R2   times: float32; t and guidance: bfloat16               sampling.get_schedule, denoise
    R3   1000 t: bfloat16; its sinusoids: float32, rounded      F1 layers.timestep_embedding
    R4   vec: the sum after time, after guidance, after text    model.forward
    R5   RoPE: frequencies, angles, cos and sin: float32        F1 math.rope
    R6   q and k: x / rms, rounded, times scale, rounded        F1 layers.RMSNorm
    R7   q and k: rotated in float32, rounded                   F1 math.apply_rope
    R8   1 + scale; its product with LayerNorm; plus shift      F1 layers.DoubleStreamBlock
    R9   gate times branch; plus x                              F1 layers.DoubleStreamBlock
    R10  FLUX.2: silu of the gate; its product with the rest    F2 model.SiLUActivation
    R11  (t' - t), a Python float, times velocity; plus x       sampling.denoise

F1 is black-forest-labs/flux at 802fb47, F2 black-forest-labs/flux2 at ab7cca6. A line that names
neither holds for both. torch rounds once for each of its functions: linear layers, LayerNorm, SiLU,
GELU and attention (`in_bfloat16`). Their order of summation depends on the processor, and so do
their last bits.

A linear layer with a bias rounds twice if its input is strided. So tokens are contiguous here, as
einops' rearrange and torch.stack make them in BFL's code.

scripts/dev/golden_bfl_code.py compares the latents of these runs with those of BFL's own networks
and loops, at the commits above. They were equal to the bit.
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from modules.command_line import Parser, exit_code, imports, show


def parser():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", nargs="+", type=Path, metavar="FILE", help="of a kit's transformer")
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the files")
    p.add_argument("--overwrite", action="store_true", help="replace files in the folder")
    return p


with imports(__name__, parser):
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file, save

STEPS, GUIDANCE, SEED, TEXT, ROWS, COLUMNS = 4, 3.5, 0, 24, 4, 6
AXES = {"flux.1": (8, 12, 12), "flux.2": (8, 8, 8, 8)}  # those of flux/parity/reference.py
THETA = {"flux.1": 10_000, "flux.2": 2000}


def r(x):
    """Round float32 numbers to bfloat16 ones, held in float32."""
    return x.bfloat16().float()


def is_flux2(w):
    return "single_stream_modulation.lin.weight" in w


def in_bfloat16(function, *args, **options):
    """Call a function of torch on bfloat16 tensors. The function rounds once, at its end."""
    return function(*(x if x is None else x.bfloat16() for x in args), **options).float()


# ---------------------------------------------------------------- the run


def run(w):
    """Return the family and all tensors of a run, by the names that `parity.py` gives them.

    `w`: the tensors of a transformer's file.
    """
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
    for step, (t, t_next) in enumerate(zip(times, times[1:]), start=1):

        def see(name, value, step=step):
            out[f"step.{step:03}/{name}"] = value

        velocity = network(w, x, txt, pooled, rope, t, see)  # (1, N, C)
        x = r(x + r(torch.tensor(t_next - t) * velocity))  # R11
        see("latents", x.transpose(1, 2).reshape(1, -1, ROWS, COLUMNS))
    return family, out


def noise(family, channels):
    """R1. Return contiguous tokens (1, N, C), row by row.

    FLUX.1 draws the four numbers of a 2x2 patch next to each other, FLUX.2 whole tokens. BFL draws
    in bfloat16: in torch 2.13 these are float32 numbers, rounded.
    """
    generator = torch.Generator().manual_seed(SEED)
    if family == "flux.1":
        x = torch.randn(1, channels // 4, 2 * ROWS, 2 * COLUMNS, generator=generator)
        x = F.pixel_unshuffle(r(x), 2)  # (1, C, rows, columns)
    else:
        x = r(torch.randn(1, channels, ROWS, COLUMNS, generator=generator))
    return x.flatten(2).transpose(1, 2).contiguous()


def schedule(family):
    """R2. Return times from 1 to 0, in float32 arithmetic on the shift mu, a Python float.

    FLUX.1's mu is linear in the tokens. FLUX.2's is linear in the steps, between two lines.
    """
    tokens = ROWS * COLUMNS
    if family == "flux.1":
        slope = (1.15 - 0.5) / (4096 - 256)
        mu = slope * tokens + (0.5 - slope * 256)
    else:
        at_200, at_10 = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
        slope = (at_200 - at_10) / 190  # in the steps
        mu = slope * STEPS + (at_200 - 200 * slope)
    t = torch.linspace(1, 0, STEPS + 1)
    return (math.exp(mu) / (math.exp(mu) + (1 / t - 1))).tolist()


def rope_table(family):
    """R5. Return cosines and sines of text and image, (N, d/2, 2).

    The text's position is 0. FLUX.2 counts its tokens on the last axis.
    """
    positions = torch.zeros(TEXT + ROWS * COLUMNS, len(AXES[family]))
    if family == "flux.2":
        positions[:TEXT, 3] = torch.arange(TEXT)
    positions[TEXT:, 1] = torch.arange(ROWS).repeat_interleave(COLUMNS)
    positions[TEXT:, 2] = torch.arange(COLUMNS).repeat(ROWS)
    omegas = [
        1.0 / THETA[family] ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
        for n in AXES[family]
    ]
    angle = torch.cat(
        [positions[:, axis, None] * omega for axis, omega in enumerate(omegas)], dim=1
    )
    return torch.stack([angle.cos(), angle.sin()], dim=2)


# ---------------------------------------------------------------- the network


def network(w, x, txt, pooled, rope, t, see):
    """Return the velocity of the tokens x, (1, N, C).

    FLUX.2 has one modulation for all blocks of a kind, FLUX.1 has one in each block.
    """

    def blocks(kind):
        return sorted({".".join(name.split(".")[:2]) for name in w if name.startswith(kind)})

    vec = embedder(w, "time_in", timestep_embedding(t))
    vec = r(vec + embedder(w, "guidance_in", timestep_embedding(GUIDANCE)))  # R4
    if pooled is not None:
        vec = r(vec + embedder(w, "vector_in", pooled))
    see("vec", vec)

    def modulation(name, n):
        return linear(w, f"{name}.lin", in_bfloat16(F.silu, vec))[:, None].chunk(n, dim=-1)

    img, txt = linear(w, "img_in", x), linear(w, "txt_in", txt)
    for block in blocks("double_blocks"):
        shared = "double_stream_modulation_img", "double_stream_modulation_txt"
        names = shared if is_flux2(w) else (f"{block}.img_mod", f"{block}.txt_mod")
        img, txt = double(w, block, img, txt, rope, *(modulation(name, 6) for name in names), see)
    joint = torch.cat([txt, img], dim=1)
    for block in blocks("single_blocks"):
        name = "single_stream_modulation" if is_flux2(w) else f"{block}.modulation"
        joint = single(w, block, joint, rope, modulation(name, 3), see)
    final = linear(w, "final_layer.adaLN_modulation.1", in_bfloat16(F.silu, vec))
    shift, scale = final[:, None].chunk(2, dim=-1)
    velocity = linear(w, "final_layer.linear", modulate(joint[:, TEXT:], shift, scale))
    see("out", velocity)
    return velocity


def double(w, block, img, txt, rope, img_mod, txt_mod, see):
    parts = []
    for stream, x, (shift, scale, *_) in (("txt", txt, txt_mod), ("img", img, img_mod)):
        attn = f"{block}.{stream}_attn"
        parts.append(heads(w, f"{attn}.norm", linear(w, f"{attn}.qkv", modulate(x, shift, scale))))
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts))
    attended = attention(block, q, k, v, rope, see)
    out = []
    for stream, x, y, mod in (
        ("img", img, attended[:, TEXT:], img_mod),
        ("txt", txt, attended[:, :TEXT], txt_mod),
    ):
        _, _, gate, shift, scale, mlp_gate = mod
        x = r(x + r(gate * linear(w, f"{block}.{stream}_attn.proj", y)))  # R9
        hidden = activation(w, linear(w, f"{block}.{stream}_mlp.0", modulate(x, shift, scale)))
        out.append(r(x + r(mlp_gate * linear(w, f"{block}.{stream}_mlp.2", hidden))))
        see(f"{block}/out.{len(out) - 1}", out[-1])
    return out


def single(w, block, x, rope, mod, see):
    shift, scale, gate = mod
    wide = linear(w, f"{block}.linear1", modulate(x, shift, scale))
    qkv, hidden = wide.tensor_split([3 * x.shape[-1]], dim=-1)
    attended = attention(block, *heads(w, f"{block}.norm", qkv), rope, see)
    branch = linear(w, f"{block}.linear2", torch.cat([attended, activation(w, hidden)], dim=-1))
    x = r(x + r(gate * branch))  # R9
    see(f"{block}/out", x)
    return x


def heads(w, norm, qkv):
    """Return q and k, normalised, and v: (1, N, 3 H d) -> (1, H, N, d) each."""
    q_scale, k_scale = w[f"{norm}.query_norm.scale"], w[f"{norm}.key_norm.scale"]
    qkv = qkv.reshape(1, qkv.shape[1], 3, -1, len(q_scale))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return rms_norm(q, q_scale), rms_norm(k, k_scale), v


def rms_norm(x, scale):
    """R6"""
    return r(r(x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6)) * scale)


def attention(block, q, k, v, rope, see):
    q, k = rotate(q, rope), rotate(k, rope)
    out = in_bfloat16(F.scaled_dot_product_attention, q, k, v)
    for tap, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        see(f"{block}/attention/{tap}", tensor)
    return out.transpose(1, 2).flatten(2)  # (1, N, H d)


def rotate(x, rope):
    """R7"""
    cos, sin, even, odd = rope[..., 0], rope[..., 1], x[..., 0::2], x[..., 1::2]
    return r(torch.stack([cos * even + -sin * odd, sin * even + cos * odd], dim=-1).flatten(-2))


def modulate(x, shift, scale):
    """R8"""
    normed = in_bfloat16(F.layer_norm, x, normalized_shape=x.shape[-1:], eps=1e-6)
    return r(r(r(1 + scale) * normed) + shift)


def activation(w, hidden):
    if not is_flux2(w):
        return in_bfloat16(F.gelu, hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return r(in_bfloat16(F.silu, gate) * up)  # R10


def timestep_embedding(value):
    """R2 and R3. Return 256 sinusoids of t or of guidance, (1, 256)."""
    scaled = r(1000 * r(torch.tensor([value])))  # (1,)
    exponent = torch.arange(128, dtype=torch.float32)
    angle = scaled[:, None] * torch.exp(-math.log(10_000) * exponent / 128)
    return r(torch.cat([angle.cos(), angle.sin()], dim=-1))


def embedder(w, name, x):
    return linear(w, f"{name}.out_layer", in_bfloat16(F.silu, linear(w, f"{name}.in_layer", x)))


def linear(w, name, x):
    return in_bfloat16(F.linear, x, w[f"{name}.weight"], w.get(f"{name}.bias"))


# ---------------------------------------------------------------- files


def is_stored(name):
    """Store the blocks' outputs of the first step, and the network's output of every step."""
    return "/attention/" not in name and (name.startswith("step.001") or "blocks" not in name)


@torch.no_grad()
def main():
    args = parser().parse_args()
    return exit_code(lambda: write(args), {}, args.output, "stopped")


def write(args):
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    capability = torch.backends.cpu.get_cpu_capability()
    metadata = {"torch": torch.__version__, "cpu_capability": capability}
    for weights in args.weights:
        family, tensors = run(load_file(weights))
        stored = {}
        for name, x in tensors.items():
            if is_stored(name):
                x = x if name in ("rope", "schedule") else x.bfloat16()  # these two are float32
                stored[name] = x.contiguous()
        path = args.output / f"{family}.safetensors"
        if path.exists() and not args.overwrite:
            parser().error(f"--output: {path} exists. Choose another folder, or add --overwrite.")
        path.write_bytes(save(stored, metadata=metadata))
        show(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
