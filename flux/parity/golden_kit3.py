"""What a golden kit of FLUX 3 says: its README.md after the table of commands. See `golden_kit`."""

from typing import Any

from flux.parity.capture_file import Capture
from flux.pipeline import Pipeline

EXAMPLE = r"step\.001/(vec$|content_mode_blocks\.image\.0[./]|early_stream_modulations\.image[./])"


def parts3(pipe: Pipeline, expected: Capture) -> dict[str, Any]:
    """Return the values of `README3` that the other families do not have."""
    config: Any = pipe.spec.transformer
    has_references = "ids/references" in expected.records
    return dict(
        tokens=expected.records["text/features"].shape[1],
        target=TARGET if config.flow_map else "",
        target_time=", and the target" if config.flow_map else "",
        references=REFERENCES if has_references else "",
        and_references=", then references" if has_references else "",
        reference_ids=" References count -1, -2, ... in l." if has_references else "",
        cfg=CFG if "step.001/negative/out" in expected.records else "",
        last_mode=config.depth - 1,
    )


README3 = """## Names

A name is place/module/tap. The module has the name of its weights in Black Forest Labs' files:
`single_blocks.0.mlp_in.weight` computes `step.001/single_blocks.0.mlp_in/out` from
`step.001/single_blocks.0.mlp_in/in`. These names are not of weights: `attention` (the attention of
a block), and everything outside the networks, such as `latents`. The first step is stored layer by
layer, later steps by their velocity and latents. Each tensor is stored under its own name, also
where two are equal. `time_in` runs for t, then for time 0: the second tensors end in ~2.

A module with one input has in, one with several in.0, in.1, ...; so have outputs. A block's inputs
besides tokens are arg.N. A function of yours gets a module's inputs in this order, and returns its
outputs in theirs. It may return nothing for a module that you do not have.

- a block (`*_blocks.N`, `content_mode_blocks.*.N`): in.0 tokens, arg.1 RoPE table, arg.2 shift,
  arg.3 scale, arg.4 gate -> out
- `*_stream_modulations.*`: silu(vec) -> out.0 shift, out.1 scale, out.2 gate
- `*.norm`: in.0 q, in.1 k, before the norm -> out.0 q, out.1 k
- `*/attention`: q, k, v, after RoPE -> out
- `final_layer.image`: in.0 tokens, in.1 vec -> out
- every other module: in -> out

A scale is stored as the linear layer gives it: modulate with 1 + scale.

## Conventions

- Arrays are row-major. The batch is 1: tokens (1, N, channels), heads (1, {heads}, N, {d}), latents
  and pixels (1, C, h, w).
- A Linear is y = x Wᵀ, without bias, and W is (out, in). A convolution's weight is (out, in,
  height, width).
- Image tokens follow the rows, here {rows} rows of {columns}. In the joint sequence text is first,
  then the image{and_references}.
- The text is padded to a multiple of 80 tokens, here {tokens}. The transformer has no mask: it
  attends to padding.
- RoPE rotates neighbouring channels, (0, 1), (2, 3), ..., not halves. q and k are normalised first.
- LayerNorm has no weights. Its epsilon is 1e-6, and so is that of the RMS norms of q and k.
- Time t runs from 1 (noise) to 0 (image). Image tokens have time t; text and references have 0.

## The order to port in

1. **rope_table**: `ids/img` -> `rope/img` (N, {pairs}, 2, 2), rotation matrices
   ((cos, -sin), (sin, cos)), and `ids/txt` -> `rope/txt`. An id is (0, row / 2, column / 2, l).
   Text has only l, the number of the token.{reference_ids}
   The axes share the {d} channels of a head, {axes}: an axis with n channels has
   angle = position · {theta}^(-2i/n) for i < n/2, computed in float64.
2. **timestep_embedding**: the first t of `schedule` -> `step.001/time_in.in_layer/in` (1, 256): 128
   cosines, then 128 sines, of the angles 1000 t · 10000^(-i/128).
3. **MLPEmbedder**: out_layer(silu(in_layer(x))) -> `step.001/time_in/out`.{target}
   The result is `step.001/vec`, and with time 0 for t `step.001/vec_0` (1, 1, {D}).
4. **Modulation**: lin(silu(vec)), split into shift, scale, gate, once a mode and stage:
   `step.001/early_stream_modulations.image/out.0` for the blocks of the image alone,
   `step.001/single_stream_modulations.image/out.0` for the joint blocks. Those of the text read
   vec_0: `step.001/early_stream_modulations.txt/out.0`.
5. **emb_in**, **txt_in**: `step.001/in` -> `step.001/emb_in.image/out`, and `text/features` ->
   `step.001/txt_in/out`.{references}
6. **Block**, as in `example_port.py`, of image tokens, `step.001/content_mode_blocks.image.0/in.0`;
   those of the text are `step.001/txt_mode_blocks.0/in.0`. Attention and MLP run in parallel.
   - modulate, (1 + scale) · norm(x) + shift: `step.001/content_mode_blocks.image.0.q_proj/in`
   - QKNorm, head by head, x / sqrt(mean(x²) + 1e-6) · scale, (1, {heads}, N, {d}): q,
     `step.001/content_mode_blocks.image.0.norm/out.0`, and k,
     `step.001/content_mode_blocks.image.0.norm/out.1`
   - apply_rope, (x0 cos - x1 sin, x0 sin + x1 cos):
     `step.001/content_mode_blocks.image.0/attention/q`; v is not rotated
   - attention, softmax(q kᵀ / sqrt({d})) v: `step.001/content_mode_blocks.image.0/attention/out`
   - the MLP, mlp_out(silu(a) · b), where a and b are the halves of mlp_in's output:
     `step.001/content_mode_blocks.image.0.mlp_out/in`
   - x + gate · (attn_out + mlp_out): `step.001/content_mode_blocks.image.0/out`
7. **single_blocks**, blocks of the same kind, of all tokens as one sequence,
   `step.001/single_blocks.0/in.0`: after the last blocks of each mode,
   `step.001/txt_mode_blocks.{last_mode}/out` and
   `step.001/content_mode_blocks.image.{last_mode}/out`. Each token keeps its mode's modulation and
   position: `step.001/single_blocks.0/arg.2`, `step.001/single_blocks.0/out`.
8. **FinalLayer**, of the image tokens, `step.001/final_layer.image/in.0`:
   adaLN_modulation.1(silu(vec)) is shift, then scale (in diffusers' files scale, then shift);
   modulate, then linear: `step.001/out`.{cfg}
9. **schedule**: u falls evenly from 1 to 0, then u -> 6.93 u / (1 + 5.93 u):
   `schedule` ({steps} + 1).
10. **denoise**: x <- x + (t' - t) · velocity, in float32, from `noise` on: `step.001/velocity`,
    `step.001/latents`, up to `{last}/latents`. Tokens (1, h·w, C) are latents (1, C, h, w), row by
    row. Use the kit's noise: no two libraries draw the same from a seed.
11. **denormalise**: latents · sqrt(bn.running_var + 1e-4) + bn.running_mean, channel by channel;
    both are weights of the autoencoder.
    **unpack**: channel 4c + 2i + j of the token in row r and column s goes to channel c in row
    2r + i and column 2s + j: `decoder/decoder/in`.
12. **Decoder**: a 1x1 convolution, post_quant_conv; then a residual around each two 3x3
    convolutions, each after a group norm ({groups} groups, epsilon 1e-6) and silu; attention with
    one head in the middle; upsampling repeats the nearest value; up.0 has the full resolution and
    runs last: `decoder/decoder.conv_in/out`, `decoder/decoder.mid/out`, `pixels`.
13. **to_images**: round((clamp(pixels, -1, 1) + 1) / 2 · 255): `image` (H, W, 3), which is
    `image.png`.
14. **Text encoder**, last: the steps above can use the recorded features. The language model reads
    the padded prompt, `text/model/in.0`, with the mask `text/model/in.1`. Every padding token has
    position 1. The hidden states after layers {layers}, concatenated, are `text/features`.
"""
TARGET = """
   The target, the time after t in `schedule`, is embedded in the same way, by `ref_time_in`:
   `step.001/ref_time_in/out` is added."""
REFERENCES = """
   References: `conditions/references` -> `step.001/emb_in.image_cond/out`, with the table
   `rope/references`. They have blocks of their own,
   `step.001/content_mode_blocks.image_cond.0/in.0`, and read vec_0."""
CFG = """
   Without the prompt, the same: `step.001/negative/out`. Classifier-free guidance gives the
   velocity without + scale · (with - without)."""
