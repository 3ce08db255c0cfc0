"""The first test of a port: one double block of FLUX.1 or FLUX.2, in numpy alone, against the tensors of a golden kit.

    python consumer.py [KIT [WEIGHTS]]

prints a line for each tensor, with its relative L2 error, and exits with 1 if one is off. KIT is the folder that this file
lies in, and WEIGHTS its weights/transformer.safetensors, unless others are given. Every line goes on from the kit's own
tensor, so that a mistake shows where it is made. To test a port, put it in place of `double_block`.
"""

import json
import sys
from pathlib import Path

import numpy as np

TOLERANCE = 2e-6  # relative L2: all is computed in float64 here, and what is left is the rounding of the kit's float32


def double_block(w, img, txt, rope, vec, check):
    """Image (1, L, D) and text tokens (1, T, D) meet in one attention. `check(name, ours)` gives the kit's tensor."""
    flux2 = "double_stream_modulation_img.lin.weight" in w
    tokens, mods, heads = {"img": img, "txt": txt}, {}, {}
    for stream, x in tokens.items():
        name = (
            f"double_stream_modulation_{stream}" if flux2 else f"double_blocks.0.{stream}_mod"
        )  # of all blocks, or its own
        parts = np.split(linear(w, f"{name}.lin", silu(vec))[:, None], 6, axis=-1)  # 6 of (1, 1, D)
        parts[1], parts[4] = 1 + parts[1], 1 + parts[4]  # the scales
        mods[stream] = shift, scale, *_ = [
            check(f"{name}/out.{i}", part) for i, part in enumerate(parts)
        ]
        attn = f"double_blocks.0.{stream}_attn"
        x = check(f"{attn}.qkv/in", modulate(x, shift, scale))
        qkv = linear(w, f"{attn}.qkv", x).reshape(
            *x.shape[:2], 3, -1, 2 * len(rope[0])
        )  # (1, N, 3, H, d)
        *qk, v = qkv.transpose(2, 0, 1, 3, 4)  # each (1, N, H, d)
        qk = [
            rms_norm(x) * w[f"{attn}.norm.{name}_norm.scale"]
            for x, name in zip(qk, ("query", "key"))
        ]
        heads[stream] = *check(f"{attn}.norm/out", np.stack(qk)), v

    # text first; each is now (1, H, T + L, d)
    q, k, v = (
        np.concatenate(pair, axis=1).swapaxes(1, 2) for pair in zip(heads["txt"], heads["img"])
    )
    turned = zip("qkv", (rotate(q, rope), rotate(k, rope), v))
    q, k, v = (check(f"double_blocks.0/attention/{tap}", x) for tap, x in turned)
    out = (
        check("double_blocks.0/attention/out", attention(q, k, v))
        .swapaxes(1, 2)
        .reshape(1, -1, img.shape[2])
    )
    attended = {"img": out[:, txt.shape[1] :], "txt": out[:, : txt.shape[1]]}

    for number, (stream, x) in enumerate(tokens.items()):
        mlp, (_, _, gate, shift, scale, mlp_gate) = f"double_blocks.0.{stream}_mlp", mods[stream]
        x = x + gate * linear(w, f"double_blocks.0.{stream}_attn.proj", attended[stream])
        hidden = linear(w, f"{mlp}.0", check(f"{mlp}/in", modulate(x, shift, scale)))
        hidden = check(f"{mlp}.1/out", gated_silu(hidden) if flux2 else gelu(hidden))
        check(f"double_blocks.0/out.{number}", x + mlp_gate * linear(w, f"{mlp}.2", hidden))


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)  # FLUX.1 has biases


def rms_norm(x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def modulate(x, shift, scale):
    return (
        scale * rms_norm(x - x.mean(axis=-1, keepdims=True)) + shift
    )  # LayerNorm is the RMS norm of what has no mean


def rotate(x, rope):
    turn = rope[..., 0, 0] + 1j * rope[..., 1, 0]  # (T + L, d/2), cosine and sine
    return (x.view(complex) * turn).view(float)  # two neighbouring channels are one complex number


def attention(q, k, v):
    weights = np.exp(
        q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    )  # no overflow: q and k are normalised. No mask
    return weights @ v / weights.sum(axis=-1, keepdims=True)


def gelu(x):  # FLUX.1: its approximation by tanh
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gated_silu(x):  # FLUX.2
    gate, up = np.split(x, 2, axis=-1)
    return silu(gate) * up


def silu(x):
    return x / (1 + np.exp(-x))


def read(path):
    """What is read of a .safetensors file: the length of its header in 8 bytes, the header in JSON, and then the data."""
    raw = np.memmap(path, np.uint8, mode="r")
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(bytes(raw[8:start])).items():
        if "double_blocks.0" in name or "double_stream_modulation" in name or name.endswith("/vec"):
            data = raw[start:][slice(*entry["data_offsets"])]
            if entry["dtype"] == "BF16":  # the upper half of a float32
                data = data.view("<u2").astype("<u4") << 16
            yield (
                name.removeprefix("step.001/"),
                data.view("<f4").reshape(entry["shape"]).astype(np.float64),
            )


def main(folder=Path(__file__).parent, weights=None):
    kit = dict(read(Path(folder, "expected.safetensors")))
    w, off = dict(read(weights or Path(folder, "weights/transformer.safetensors"))), []

    def check(name, ours):
        theirs = kit[name]
        error = (
            np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            if ours.shape == theirs.shape
            else np.inf
        )
        off.extend([] if error <= TOLERANCE else [name])  # NaN is off, too
        print("OFF" if name in off else "ok ", f"{error:.1e}  {name} {theirs.shape}")
        return theirs

    double_block(
        w, *(kit[f"double_blocks.0/in.{number}"] for number in range(3)), kit["vec"], check
    )
    print(f"off by more than {TOLERANCE}: {', '.join(off)}" if off else f"all agree to {TOLERANCE}")
    return len(off) > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
