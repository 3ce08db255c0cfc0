"""The first test of a port: one double block of FLUX.1 or FLUX.2, in numpy alone, against the tensors of a golden kit.

    python consumer.py [KIT [WEIGHTS]]

prints a line for each tensor in the order of execution, with its relative L2 error, and exits with 1 if one is off. KIT is
the folder that this file lies in, and WEIGHTS its weights/transformer.safetensors, unless others are given. Every line goes
on from the kit's own tensor, so that a mistake shows where it is made. To test a port, put it in place of `double_block`.
"""

import json
import sys
from pathlib import Path

import numpy as np

STEP, BLOCK = "step.001", "double_blocks.0"
TOLERANCE = 2e-6  # relative L2: all is computed in float64 here, and what is left is the rounding of the kit's float32


def double_block(w, img, txt, rope, vec, see):
    """Image (1, L, D) and text tokens (1, T, D) meet in one attention. `see(name, ours)` is the kit's tensor of that name."""
    flux2 = "double_stream_modulation_img.lin.weight" in w
    modulator = "double_stream_modulation_{}" if flux2 else f"{BLOCK}.{{}}_mod"  # one for all blocks, or one in each
    tokens, modulation, qkv = {"img": img, "txt": txt}, {}, {}
    for stream in ("img", "txt"):
        name = modulator.format(stream)
        parts = np.split(linear(w, f"{name}.lin", silu(vec))[:, None], 6, axis=-1)  # 6 of (1, 1, D)
        modulation[stream] = [see(f"{name}/out.{number}", part) for number, part in enumerate(parts)]

    for stream in ("img", "txt"):
        attn, (shift, scale, *_) = f"{BLOCK}.{stream}_attn", modulation[stream]
        q_scale, k_scale = w[f"{attn}.norm.query_norm.scale"], w[f"{attn}.norm.key_norm.scale"]  # (d,)
        x = see(f"{attn}.qkv/in", modulate(tokens[stream], shift, scale))
        q, k, v = split_heads(linear(w, f"{attn}.qkv", x), len(q_scale))  # each (1, H, N, d)
        q = see(f"{attn}.norm/out.0", rms_norm(q, q_scale))
        k = see(f"{attn}.norm/out.1", rms_norm(k, k_scale))
        qkv[stream] = q, k, v

    q, k, v = (np.concatenate(pair, axis=2) for pair in zip(qkv["txt"], qkv["img"]))  # text first: (1, H, T + L, d)
    q = see(f"{BLOCK}/attention/q", rotate(q, rope))
    k = see(f"{BLOCK}/attention/k", rotate(k, rope))
    v = see(f"{BLOCK}/attention/v", v)
    out = see(f"{BLOCK}/attention/out", attention(q, k, v)).transpose(0, 2, 1, 3).reshape(1, -1, img.shape[-1])
    attended = {"txt": out[:, : txt.shape[1]], "img": out[:, txt.shape[1] :]}

    for number, stream in enumerate(("img", "txt")):
        mlp, (_, _, gate, shift, scale, mlp_gate) = f"{BLOCK}.{stream}_mlp", modulation[stream]
        x = tokens[stream] + gate * linear(w, f"{BLOCK}.{stream}_attn.proj", attended[stream])
        hidden = linear(w, f"{mlp}.0", see(f"{mlp}/in", modulate(x, shift, scale)))
        hidden = see(f"{mlp}.1/out", gated_silu(hidden) if flux2 else gelu(hidden))
        see(f"{BLOCK}/out.{number}", x + mlp_gate * linear(w, f"{mlp}.2", hidden))


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].T  # (out, in)
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y  # FLUX.1 has biases


def modulate(x, shift, scale):
    normal = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return (1 + scale) * normal + shift


def rms_norm(x, scale):
    return scale * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def split_heads(qkv, d):
    return qkv.reshape(1, qkv.shape[1], 3, -1, d).transpose(2, 0, 3, 1, 4)  # (1, N, 3·H·d) -> (3, 1, H, N, d)


def rotate(x, rope):
    x0, x1, cos, sin = x[..., 0::2], x[..., 1::2], rope[..., 0], rope[..., 1]  # neighbouring channels are a pair
    return np.stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], axis=-1).reshape(x.shape)


def attention(q, k, v):
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])  # no mask: padding takes part
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def gelu(x):  # FLUX.1: its approximation by tanh
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gated_silu(x):  # FLUX.2
    gate, up = np.split(x, 2, axis=-1)
    return silu(gate) * up


def silu(x):
    return x / (1 + np.exp(-x))


class Safetensors:
    """A .safetensors file: the length of its header in 8 bytes, the header in JSON, and then the tensors, row by row."""

    def __init__(self, path):
        self.raw = np.memmap(path, np.uint8, mode="r")
        self.start = 8 + int.from_bytes(self.raw[:8], "little")
        self.header = json.loads(bytes(self.raw[8 : self.start]))

    def __contains__(self, name):
        return name in self.header

    def __getitem__(self, name):
        begin, end = self.header[name]["data_offsets"]
        data = self.raw[self.start + begin : self.start + end]
        if self.header[name]["dtype"] == "BF16":  # the upper half of a float32
            data = data.view("<u2").astype("<u4") << 16
        return data.view("<f4").reshape(self.header[name]["shape"]).astype(np.float64)


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    weights = Path(sys.argv[2]) if len(sys.argv) > 2 else folder / "weights/transformer.safetensors"
    for path in (folder / "expected.safetensors", weights):
        if not path.is_file():
            print(f"error: there is no {path}; usage: python consumer.py [KIT [WEIGHTS]]", file=sys.stderr)
            return 2
    kit, seen, off = Safetensors(folder / "expected.safetensors"), [], []

    def see(name, ours):
        name = f"{STEP}/{name}"
        theirs = kit[name]
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) if ours.shape == theirs.shape else np.inf
        seen.append(name)
        if not error <= TOLERANCE:  # NaN is off, too
            off.append(name)
        print(f"{'OFF' if name in off else 'ok '} {error:.1e}  {name} {theirs.shape}")
        return theirs

    img, txt, rope = (kit[f"{STEP}/{BLOCK}/in.{number}"] for number in range(3))
    double_block(Safetensors(weights), img, txt, rope, kit[f"{STEP}/vec"], see)
    if off:
        print(f"{len(off)} of {len(seen)} tensors are off by more than {TOLERANCE}; the first is {off[0]}")
        return 1
    print(f"all {len(seen)} tensors agree to {TOLERANCE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
