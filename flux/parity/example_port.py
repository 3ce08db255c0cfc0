"""An example port, tested against a golden kit: one block, the first double-stream block.

Of FLUX 3, it is the first block of the image.

    python example_port.py [KIT [WEIGHTS]]

needs numpy alone. It prints one line a tensor with its relative L2 error, and exits with 1 if one
is wrong, with 2 if a file is damaged. KIT is this file's folder by default, WEIGHTS is
KIT/weights/transformer.safetensors. After each check the block goes on with the kit's own tensor,
so that an error shows only where it is made. To test your port, replace `double_block`, or
`flux3_block`.
"""

import json
import sys
from pathlib import Path

import numpy as np

READ = ("double_blocks.0", "double_stream_mod", "content_mode_blocks.image.0", "early_stream_mod")
TOLERANCE = 2e-6  # relative L2; this file computes in float64, the kit was rounded to float32


def double_block(w, img, txt, rope, vec, check):
    """Compute the first block from image tokens (1, L, D), text tokens (1, T, D) and vec (1, D).

    `check(name, ours)` compares a tensor with the kit's and returns the kit's.
    """
    block = "double_blocks.0"
    flux2 = "double_stream_modulation_img.lin.weight" in w
    mods, heads, out = {}, {}, {}

    # modulation, q, k and v of each stream
    for stream, x in (("img", img), ("txt", txt)):
        mod = f"double_stream_modulation_{stream}" if flux2 else f"{block}.{stream}_mod"
        chunks = np.split(linear(w, f"{mod}.lin", silu(vec))[:, None], 6, axis=-1)  # (1, 1, D) each
        mods[stream] = [check(f"{mod}/out.{i}", chunk) for i, chunk in enumerate(chunks)]
        shift, scale, *_ = mods[stream]

        attn = f"{block}.{stream}_attn"
        x = check(f"{attn}.qkv/in", modulate(x, shift, scale))
        qkv = linear(w, f"{attn}.qkv", x).reshape(1, x.shape[1], 3, -1, 2 * len(rope[0]))
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (1, H, N, d) each
        q = check(f"{attn}.norm/out.0", rms_norm(q) * w[f"{attn}.norm.query_norm.scale"])
        k = check(f"{attn}.norm/out.1", rms_norm(k) * w[f"{attn}.norm.key_norm.scale"])
        heads[stream] = q, k, v

    # joint attention, text first
    pairs = zip(heads["txt"], heads["img"])
    q, k, v = (np.concatenate(pair, axis=2) for pair in pairs)  # (1, H, T + L, d) each
    q = check(f"{block}/attention/q", apply_rope(q, rope))
    k = check(f"{block}/attention/k", apply_rope(k, rope))
    v = check(f"{block}/attention/v", v)
    x = check(f"{block}/attention/out", attention(q, k, v))
    x = x.swapaxes(1, 2).reshape(1, -1, img.shape[2])  # (1, T + L, D)
    out["txt"], out["img"] = np.split(x, [txt.shape[1]], axis=1)

    # residuals of each stream
    for i, (stream, x) in enumerate((("img", img), ("txt", txt))):
        _, _, gate, shift, scale, mlp_gate = mods[stream]
        mlp = f"{block}.{stream}_mlp"
        x = x + gate * linear(w, f"{block}.{stream}_attn.proj", out[stream])
        hidden = linear(w, f"{mlp}.0", check(f"{mlp}/in", modulate(x, shift, scale)))
        hidden = check(f"{mlp}.1/out", gated_silu(hidden) if flux2 else gelu(hidden))
        check(f"{block}/out.{i}", x + mlp_gate * linear(w, f"{mlp}.2", hidden))


def flux3_block(w, x, rope, vec, check):
    """Compute FLUX 3's first block from image tokens (1, L, D) and vec (1, 1, D)."""
    block, mod = "content_mode_blocks.image.0", "early_stream_modulations.image"
    chunks = np.split(linear(w, f"{mod}.lin", silu(vec)), 3, axis=-1)  # (1, 1, D) each
    shift, scale, gate = (check(f"{mod}/out.{i}", chunk) for i, chunk in enumerate(chunks))
    y = check(f"{block}.q_proj/in", modulate(x, shift, scale))

    heads = (*x.shape[:2], -1, 2 * len(rope[0]))
    q, k, v = (linear(w, f"{block}.{i}_proj", y).reshape(heads).swapaxes(1, 2) for i in "qkv")
    q = check(f"{block}.norm/out.0", rms_norm(q) * w[f"{block}.norm.query_norm.scale"])
    k = check(f"{block}.norm/out.1", rms_norm(k) * w[f"{block}.norm.key_norm.scale"])
    q = check(f"{block}/attention/q", apply_rope(q, rope))
    k = check(f"{block}/attention/k", apply_rope(k, rope))
    v = check(f"{block}/attention/v", v)
    heads = check(f"{block}/attention/out", attention(q, k, v))  # (1, H, L, d)
    attended = linear(w, f"{block}.attn_out", heads.swapaxes(1, 2).reshape(x.shape))
    attended = check(f"{block}.attn_out/out", attended)

    # attention and MLP read the same input, and share a gate
    hidden = check(f"{block}.mlp_out/in", gated_silu(linear(w, f"{block}.mlp_in", y)))
    check(f"{block}/out", x + gate * (attended + linear(w, f"{block}.mlp_out", hidden)))


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)  # FLUX.2 has no biases


def rms_norm(x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def layer_norm(x):
    return rms_norm(x - x.mean(axis=-1, keepdims=True))


def modulate(x, shift, scale):
    return (1 + scale) * layer_norm(x) + shift


def apply_rope(x, rope):
    cos, sin = rope[:, :, 0, 0], rope[:, :, 1, 0]  # (T + L, d/2)
    x0, x1 = x[..., 0::2], x[..., 1::2]  # neighbouring channels
    return np.stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], axis=-1).reshape(x.shape)


def attention(q, k, v):
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])  # no mask: padding takes part
    weights = np.exp(scores)  # cannot overflow: q and k are normalised
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def gelu(x):  # FLUX.1: the tanh approximation
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gated_silu(x):  # FLUX.2
    gate, up = np.split(x, 2, axis=-1)
    return silu(gate) * up


def silu(x):
    return x / (1 + np.exp(-x))


class Tensors(dict):
    """The tensors of a file by name. A name that the file lacks ends the program."""

    def __init__(self, path):
        self.path = path

    def __missing__(self, name):
        stop(self.path, f"has no tensor {name}")


def stop(place, problem):
    print(f"{place}: {problem}", file=sys.stderr)
    sys.exit(2)


def read(path):
    """Read this block's tensors: 8 bytes of header length, a JSON header, then the data."""
    tensors, end = Tensors(path), 0
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("no plain file is there")
        raw = np.memmap(path, np.uint8, mode="r")
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(bytes(raw[8:start]))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, (offset, end) = end, entry["data_offsets"]
            if offset != begin:
                raise ValueError("a hole or an overlap")
            name = name.removeprefix("step.001/")
            if name != "vec" and not name.startswith(READ):
                continue
            data = raw[start + begin : start + end]
            if entry["dtype"] == "BF16":  # the upper half of a float32
                data = data.view("<u2").astype("<u4") << 16
            elif entry["dtype"] != "F32":
                raise ValueError(f"{name} is neither F32 nor BF16")
            tensors[name] = data.view("<f4").reshape(entry["shape"]).astype(np.float64)
        if start + end != len(raw):
            raise ValueError(f"{len(raw)} bytes instead of {start + end}")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        stop(path, f"cannot be read, or is damaged: {ascii(error):.200}")
    return tensors


def main(folder=Path(__file__).parent, weights=None):
    kit, wrong = read(Path(folder, "expected.safetensors")), []
    w = read(weights or Path(folder, "weights/transformer.safetensors"))

    def check(name, ours):
        theirs, error = kit[name], np.inf
        if ours.shape == theirs.shape:
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        if not error <= TOLERANCE:  # also NaN
            wrong.append(name)
        print("WRONG" if name in wrong else "ok   ", f"{error:.1e}  {name} {theirs.shape}")
        return theirs

    flux3 = "early_stream_modulations.image.lin.weight" in w
    block, taps = "double_blocks.0", ("in.0", "in.1", "arg.2")  # tokens and RoPE table
    if flux3:
        block, taps = "content_mode_blocks.image.0", ("in.0", "arg.1")
    inputs = [kit[f"{block}/{tap}"] for tap in taps]
    try:
        (flux3_block if flux3 else double_block)(w, *inputs, kit["vec"], check)
    except (ValueError, TypeError, IndexError, MemoryError) as error:
        line = error.__traceback__.tb_next.tb_lineno
        stop(f"line {line}", f"the kit, the weights and the port do not fit: {ascii(error):.200}")
    print(f"wrong: {', '.join(wrong)}" if wrong else f"all tensors agree to {TOLERANCE}")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
