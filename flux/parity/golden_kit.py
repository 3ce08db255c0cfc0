"""A golden kit: a folder that a port in any language is tested against, with nothing but a reader of .safetensors.

    README.md             the equations, the order to port them in, the conventions
    expected.safetensors  a capture of a small run, in float32: each tensor under its own name, in the order of execution
    tensors.txt           its names, shapes and dtypes
    weights/              of each network, in float32, by the released files' names
    picture.png           what the run makes
    consumer.py           an example: one double block in numpy alone, checked against the tensors

Of the first step, every layer is there; of the later ones, what the sampler sees; inside the autoencoder, outputs alone.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from flux import sampling
from flux.configs import ModelSpec
from flux.errors import NonFiniteError, UserError
from flux.parity import example_port as consumer
from flux.parity.capture import Request, describe, run, without_weights
from flux.parity.capture_file import DTYPES, KEY, Capture, Writer, cannot_write, raw, readable
from flux.parity.hooks import check_patterns, matches
from flux.pipeline import Pipeline
from flux.runtime.checks import format_values
from flux.runtime.lazy_module import LazyModule
from flux.weights.files import read_header

PROMPT = "a small yellow star above a large blue ring on a white background"
STEPS = 4
CONSUMED = (
    r"step\.001/(vec$|double_blocks\.0[./]|double_stream_modulation)"  # what the example reads
)


def small(spec: ModelSpec, request: Request) -> Request:
    """What is not asked for, as a kit has it: few steps, and a picture that is not square, or rows could pass for columns."""
    width, height = (None, None) if request.pictures else (spec.size * 3 // 4, spec.size // 2)
    steps = min(spec.steps, STEPS) if request.steps is None else request.steps

    def given(asked, usual):
        return usual if asked is None else asked

    return replace(
        request,
        width=given(request.width, width),
        height=given(request.height, height),
        steps=steps,
    )


def build(
    pipe: Pipeline,
    request: Request,
    folder: str | Path,
    only: Sequence[str] = (),
    weights: bool = True,
    limit: float = 1e9,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Run the pipeline, which is in float32, and write the kit; `tell` hears its size in advance.

    `only`: patterns, as for a capture; what the example reads is there in any case. UserError, and no folder, if the kit would
    pass `limit` bytes, or if the run fails.
    """
    folder = Path(folder).resolve()
    check_possible(pipe, request, folder)
    networks = networks_of(pipe) if weights else {}
    part = folder.parent / f".{uuid4().hex}.part"
    try:
        part.mkdir(parents=True)
        check_size(pipe, request, only, networks, folder, limit, tell)
        write_run(pipe, request, only, part)
        for name, network in networks.items():
            write(part / f"weights/{name}.safetensors", network().state_dict())
            if not pipe.residency.keep:
                network.release()
        shutil.copyfile(consumer.__file__, part / "consumer.py")
        expected = Capture(part / "expected.safetensors")
        (part / "tensors.txt").write_text(listing(expected), encoding="utf-8")
        (part / "README.md").write_text(readme(pipe, expected, weights), encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # it is empty
        os.replace(part, folder)
    except NonFiniteError as error:
        raise UserError(f"no kit can be made of a run that fails: {error}") from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_possible(pipe: Pipeline, request: Request, folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"--output {folder}: is there already, and a kit is never written over; delete it, or choose another"
        )
    if pipe.dtype != torch.float32:
        raise UserError("a kit is made in float32, in which a port is judged: leave --dtype out")
    pictures = request.pictures
    if pictures and (
        pipe.spec.kv_cached_references if pictures.kv_cache is None else pictures.kv_cache
    ):
        raise UserError(
            "references that are computed once are no part of a kit: give --no-kv-cache"
        )


def networks_of(pipe: Pipeline) -> dict[str, LazyModule]:
    """By the names of their files in the kit."""
    text = {part: getattr(pipe.text, part) for part in pipe.spec.text.networks}
    return {"transformer": pipe.transformer, "autoencoder": pipe.autoencoder} | text


def kept(name: str, only: Sequence[str]) -> bool:
    """Whether a tensor of the run is part of the kit."""
    if re.match(CONSUMED, name):
        return True
    if re.match(r"step\.(?!001/)", name) and not re.search(r"/(velocity|latents)$", name):
        return False
    inside_autoencoder = re.match(r"(decoder|encoder\.\d+)/", name) and name != "decoder/decoder/in"
    return matches(name, only) and not (inside_autoencoder and re.search(r"/in(\.\d+)?$", name))


def check_size(
    pipe: Pipeline,
    request: Request,
    only: Sequence[str],
    networks: Mapping[str, LazyModule],
    folder: Path,
    limit: float,
    tell: Callable[[str], None],
) -> None:
    """How much it will be is found by a run on networks without weights."""
    names, sizes = [], []

    def see(name: str, tensor: Tensor) -> None:
        names.append(name)
        if kept(name, only):
            sizes.append(tensor.nbytes)

    with warnings.catch_warnings(action="ignore"):  # they come again in the run itself
        run(without_weights(pipe), request, see)
    check_patterns(only, names)
    size, held, free = (
        sum(sizes),
        sum(network.nbytes for network in networks.values()),
        shutil.disk_usage(folder.parent).free,
    )
    if 2 * size + held > free or size + held > limit:  # the tensors are there twice for a while
        most = (
            f"--limit is {limit / 1e9:g} GB"
            if size + held > limit
            else f"{readable(free)} are free on its disk"
        )
        raise UserError(
            f"{folder} would hold {readable(size)} of tensors and {readable(held)} of weights, and {most}: make a smaller "
            "picture with --width and --height, choose layers with --only, or leave the weights out with --without-weights"
        )
    tell(f"a kit of {len(sizes):,} tensors, {readable(size)}, and {readable(held)} of weights")


# ---------------------------------------------------------------- files


def write_run(pipe: Pipeline, request: Request, only: Sequence[str], folder: Path) -> None:
    """`expected.safetensors` and `picture.png`."""
    recipe = describe(pipe, request)
    with Writer(folder / "run.safetensors", recipe) as writer:

        def see(name: str, tensor: Tensor) -> None:
            if name == "schedule":
                recipe["schedule"] = tensor.tolist()
            if kept(name, only):
                writer.add(name, tensor)

        run(pipe, request, see).save(folder / "picture.png")
    short = Capture(writer.path)
    _, metadata = read_header(writer.path)
    document = json.loads(metadata[KEY])
    for record in document["tensors"].values():
        record.pop("same", None)  # every tensor under its own name: a port need not know of ours
    write(folder / "expected.safetensors", short.tensors, {KEY: json.dumps(document)})
    writer.path.unlink()


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A .safetensors file, whose header keeps the order of `tensors`, and whose data are aligned: the widest come first."""
    header, end = (
        {name: {"dtype": DTYPES[x.dtype], "shape": list(x.shape)} for name, x in tensors.items()},
        0,
    )
    by_width = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    for name in by_width:
        begin, end = end, end + tensors[name].nbytes
        header[name]["data_offsets"] = [begin, end]
    text = json.dumps({"__metadata__": metadata or {}, **header}).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in by_width:
            file.write(raw(tensors[name]))


def listing(expected: Capture) -> str:
    """A line a tensor, in the order of execution."""

    def shape(name):
        return "x".join(map(str, expected.records[name].shape))

    return "".join(
        f"{name} {shape(name)} {expected.records[name].dtype}\n" for name in expected.names
    )


# ---------------------------------------------------------------- to read


def readme(pipe: Pipeline, expected: Capture, weights: bool) -> str:
    """README.md: `README` and the family's parts of it, of this model and run."""
    spec, recipe, c = pipe.spec, expected.recipe, pipe.spec.transformer
    told = (
        "model",
        "prompt",
        "negative_prompt",
        "width",
        "height",
        "steps",
        "guidance",
        "cfg_scale",
        "seed",
        "numerics",
    )
    held = ", ".join(f"`{name}`" for name in networks_of(pipe))
    files = "; ".join(
        f"{file['file']}, sha256 {file['sha256']}"
        for some in recipe["files"].values()
        for file in some
    )
    rows, columns = recipe["height"] // 16, recipe["width"] // 16
    head_dim = c.hidden_size // c.num_heads
    values = dict(
        model=spec.name,
        count=f"{len(expected.names):,}",
        steps=recipe["steps"],
        last=f"step.{recipe['steps']:03}",
        run="\n".join(
            f"| {key.replace('_', ' ')} | {_shown(recipe[key])} |"
            for key in told
            if recipe[key] is not None
        ),
        weights=f"| `weights/` | of {held}: every weight, float32, by the released files' names |"
        if weights
        else f"| | the weights are left out: {files}. `python consumer.py . FILE` reads the transformer's |",
        axes=", ".join(map(str, c.axes_dim)),
        theta=c.theta,
        pairs=head_dim // 2,
        heads=c.num_heads,
        d=head_dim,
        D=c.hidden_size,
        text_length=spec.text_length,
        rows=rows,
        columns=columns,
        groups=spec.autoencoder.norm_groups,
        schedule=SCHEDULES[spec.schedule].format(mu=mu_of(spec, rows * columns, recipe["steps"])),
        guidance=GUIDANCE if c.guidance else "",
        guided=GUIDED if "step.001/negative/out" in expected.records else "",
        scale=spec.autoencoder.scale_factor,
        shift=spec.autoencoder.shift_factor,
        layers=None if spec.flux1 else ", ".join(map(str, spec.text.model.layers)),
    )
    parts = {name: text.format(**values) for name, text in (FLUX1 if spec.flux1 else FLUX2).items()}
    return README.format(**values, **parts)


def _shown(value) -> str:
    return format_values(value) if isinstance(value, list) else str(value)


def mu_of(spec: ModelSpec, tokens: int, steps: int) -> float:
    """How far the schedule is shifted."""
    if spec.schedule == "unshifted":
        return 0.0
    return {"linear": sampling.calculate_shift, "empirical": sampling.compute_empirical_mu}[
        spec.schedule
    ](tokens, steps)


README = """# A golden kit of {model}

The tensors of one small run, for a port to be tested against, layer by layer. All it takes is a reader of `.safetensors`.

| file | what it holds |
| --- | --- |
| `expected.safetensors` | {count} tensors: what goes into each layer, and what comes out, in float32 |
| `tensors.txt` | their names and shapes, in the order of execution |
{weights}
| `picture.png` | what the run makes |
| `consumer.py` | an example: one double block, in numpy alone. `python consumer.py` checks it, tensor by tensor |

| the run | |
| --- | --- |
{run}

## How to use it

Port in the order below. Give a layer the kit's own input, and compare its output with the kit's: so errors neither add up nor
hide. In float32 a layer that is right has a relative L2 error, |yours - kit| / |kit|, of about 1e-7, and at most 2e-6; the last
latents, after all layers of all steps, 1e-4. Judge by that: a correlation above 0.99 is also reached with shift and scale
swapped, with rows for columns, or without QK-norm. Whatever you save under the kit's names can be compared as a whole:
`python scripts/parity.py compare yours.safetensors expected.safetensors` names the first tensor that differs.

A name is where/module/tap, and the module is the weight's name: `double_blocks.0.img_mlp.0.weight` makes
`step.001/double_blocks.0.img_mlp.0/out` of `step.001/double_blocks.0.img_mlp.0/in`. Where there are several, they are numbered:
in.0, in.1. The first step is there layer by layer, the later ones by what they give to the sampler.

## Conventions

- Arrays are row-major, and the batch is 1: tokens (1, N, channels), heads (1, {heads}, N, {d}), latents and pixels
  (1, C, h, w).
- {linear} A convolution's weight is (out, in, height, width).
- Image tokens go row by row, here {rows} rows of {columns}. Where text and image are one sequence, the text comes first.
- The text is padded to {text_length} tokens, and the transformer attends to padding as to all else: there is no mask.
- The rows of a qkv weight make q, then k, then v, and each of these head by head.
- RoPE turns neighbouring channels, (0, 1), (2, 3), ..., and not halves; q and k are normalised first, and turned then.
- ModulationOut comes as shift, scale, gate: scale · norm(x) + shift, and x + gate · branch. The weights make the scale less 1.
- LayerNorm has no weights of its own. Its epsilon is 1e-6, and so is that of the RMS norms of q and k.
- Time t runs from 1 (noise) to 0 (picture), and is multiplied by 1000 before its sinusoids.

## The order to port in

1. **rope_table**: `ids/txt`, then `ids/img` -> `rope` (N, {pairs}, 2, 2), rotations, ((cos, -sin), (sin, cos)). {ids}
   The axes share the {d} channels of a head, {axes}: with n channels, angle = position · {theta}^(-2i/n) for i < n/2, which is
   best computed in float64.
2. **timestep_embedding**: the first t of `schedule` -> `step.001/time_in/in` (1, 256), 128 cosines, then 128 sines, of the angles
   1000 t · 10000^(-i/128).
3. **MLPEmbedder**: out_layer(silu(in_layer(x))) -> `step.001/time_in/out`.{guidance}{vector}
   Together they add up to `step.001/vec` (1, {D}).
4. **Modulation**: lin(silu(vec)), cut into shift, scale - 1, gate, in double blocks first for attention, then for the MLP.
   {modulators}
5. **img_in**, **txt_in**: `step.001/in` -> `step.001/img_in/out`, and `text/features` -> `step.001/txt_in/out`.
6. **DoubleStreamBlock**, as in `consumer.py`, of image tokens, `step.001/double_blocks.0/in.0`, and text tokens,
   `step.001/double_blocks.0/in.1`. What follows is the image's; the text's is the same, with txt for img.
   - modulate: `step.001/double_blocks.0.img_attn.qkv/in`
   - QKNorm, head by head, x / sqrt(mean(x²) + 1e-6) · scale: `step.001/double_blocks.0.img_attn.norm/out`, q, then k,
     (2, 1, N, {heads}, {d})
   - rotate, text and image together, (x0 cos - x1 sin, x0 sin + x1 cos): `step.001/double_blocks.0/attention/q`,
     `step.001/double_blocks.0/attention/k`; not so `step.001/double_blocks.0/attention/v`
   - attention, softmax(q kᵀ / sqrt({d})) v: `step.001/double_blocks.0/attention/out`
   - residuals, x + gate · proj(attention), then x + gate · mlp(modulate(x)): `step.001/double_blocks.0/out.0`, and of the text
     `step.001/double_blocks.0/out.1`
   - inside the MLP, {activation}:
     `step.001/double_blocks.0.img_mlp.1/out`
7. **SingleStreamBlock**, of text and image as one sequence, `step.001/single_blocks.0/in.0`, attention and MLP side by side.
   - modulate, then linear1, whose columns are q, k, v and the MLP's: `step.001/single_blocks.0.linear1/out`
   - norm, rotation and attention as before: `step.001/single_blocks.0.norm/out`, `step.001/single_blocks.0/attention/q`
   - x + gate · linear2 of attention, then activation: `step.001/single_blocks.0.linear2/in`, `step.001/single_blocks.0/out`
8. **FinalLayer**, of the image tokens, `step.001/final_layer/in.0`: adaLN_modulation.1(silu(vec)) is shift, then scale (in
   diffusers' files scale, then shift); modulate, then linear: `step.001/out`.{guided}
9. **schedule**: {schedule}:
   `schedule` ({steps} + 1).
10. **denoise**: x <- x + (t' - t) · velocity, in float32, from `noise` on: `step.001/velocity`, `step.001/latents`, and so to
    `{last}/latents`. Tokens (1, h·w, C) are latents (1, C, h, w), row by row. Take the noise from here: no two libraries draw
    the same from a seed.
11. **denormalise**: {denormalise}
    **unpack**: channel 4c + 2i + j of the token in row r and column s goes to channel c in row 2r + i and column 2s + j:
    `decoder/decoder/in`.
12. **Decoder**: {first}a residual around each two 3x3 convolutions, each of which follows a group norm ({groups} groups,
    epsilon 1e-6) and silu; one head of attention in the middle; nearest-neighbour doubling; up.0 works at full size, last:
    `decoder/decoder.conv_in/out`, `decoder/decoder.mid/out`, `pixels`.
13. **to_images**: round((clamp(pixels, -1, 1) + 1) / 2 · 255): `picture` (H, W, 3), which is `picture.png`.
14. **Text encoders** come last, as all of the above can do without. {text}
"""

EVEN = "t falls evenly from 1 to 0"
SHIFTED = (
    f"{EVEN}, then t -> e^mu / (e^mu + 1/t - 1), here with mu = {{mu:.9g}}. Of L image tokens,\n   "
)
SCHEDULES = {
    "unshifted": EVEN,
    "linear": f"{SHIFTED}mu = 0.5 + 0.65 · (L - 256) / 3840",
    "empirical": f"{SHIFTED}mu = b + (a - b) · (200 - steps) / 190, where a = 8.73809524e-05 L + 1.89833333 and\n"
    "   b = 0.00016927 L + 0.45666666; above 4300 tokens, mu = b",
}
GUIDANCE = "\n   The guidance, times 1000, goes the same way: `step.001/guidance_in/out`."
GUIDED = """
   Without the prompt, the same: `step.001/negative/out`. Guided, the velocity is without + scale · (with - without)."""
FLUX1 = dict(
    linear="A Linear is y = x Wᵀ + b, and W is (out, in).",
    ids="An id is (t, row, column), and 0 for text.",
    vector="\n   So does the pooled text, `text/pooled`: `step.001/vector_in/out`.",
    modulators="Each block has its own: `step.001/double_blocks.0.img_mod/out.0`, `step.001/single_blocks.0.modulation/out.0`.",
    activation="GELU in its approximation by tanh",
    denormalise="latents / {scale} + {shift}.",
    first="",
    text="T5 reads the padded prompt, `text/t5/in`,\n    without a mask: `text/features`. CLIP reads `text/clip/in`, and gives "
    "the vector at the end of the prompt: `text/pooled`.",
)
FLUX2 = dict(
    linear="A Linear is y = x Wᵀ, without bias in the transformer, and W is (out, in).",
    ids="An id is (t, row, column, l), of\n   which text has only l, its number.",
    vector="",
    modulators="All blocks of a kind share one: `step.001/double_stream_modulation_img/out.0`,\n"
    "   `step.001/single_stream_modulation/out.0`.",
    activation="the first half of what the first linear gives gates the second, silu(a) · b",
    denormalise="latents · sqrt(bn.running_var + 1e-4) + bn.running_mean, channel by channel; both are weights of the\n"
    "    autoencoder.",
    first="a 1x1 convolution, post_quant_conv; then ",
    text="The language model reads the padded\n    prompt, `text/model/in.0`, whose mask is `text/model/in.1`; its hidden "
    "states after layers {layers}, side by side, are\n    `text/features`.",
)
