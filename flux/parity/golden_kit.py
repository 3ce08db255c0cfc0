"""Write a golden kit: a folder to test a port in any language against.

A port needs only a reader of .safetensors.

    README.md             the equations, the order to port them in, the conventions
    expected.safetensors  the tensors of a small float32 run, in the order of execution
    tensors.txt           their names, shapes and dtypes
    weights/              each network in float32, by the released files' names
    image.png             the image of the run
    example_port.py       an example: one block in numpy, tested against the tensors

The first step is stored layer by layer, later steps by velocity and latents. Inside the autoencoder
only outputs are stored.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux import sampling
from flux.atomic_files import make_folder, remove_leftovers, write_atomically
from flux.configs import FLUX2Text, ModelSpec
from flux.errors import NonFiniteError, UserError
from flux.hooks import check_patterns, matches
from flux.parity import example_port, golden_kit3
from flux.parity.capture import Request, describe, run, without_weights
from flux.parity.capture_file import KEY, Capture, Writer, cannot_write, raw, readable
from flux.parity.capture_metadata import DTYPES
from flux.pipeline import Pipeline
from flux.runtime.checks import format_values
from flux.runtime.lazy_module import LazyModule
from flux.transformer3 import Flux3Config
from flux.weights.files import read_header

PROMPT = "a small yellow star above a large blue ring on a white background"
STEPS = 4
# what the example reads
EXAMPLE = (r"step\.001/(vec$|double_blocks\.0[./]|double_stream_modulation)", golden_kit3.EXAMPLE)


def small_request(spec: ModelSpec, request: Request) -> Request:
    """Fill in a size and a number of steps. The image is not square: rows differ from columns."""
    width, height, steps = request.width, request.height, request.steps
    if not request.images:  # images determine the size
        width = spec.size * 3 // 4 if width is None else width
        height = spec.size // 2 if height is None else height
    if steps is None:
        steps = min(spec.steps, STEPS)
    return replace(request, width=width, height=height, steps=steps)


def build(
    pipe: Pipeline,
    request: Request,
    folder: str | Path,
    only: Sequence[str] = (),
    include_weights: bool = True,
    limit: float = 1e9,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Run a float32 pipeline and write the kit. `report` is called with its size before the run.

    `only`: patterns, as for a capture; what the example reads is always included. UserError, and no
    folder, if the kit would exceed `limit` bytes or the run fails.
    """
    folder = Path(folder).resolve()
    check_possible(pipe, request, folder)
    networks = networks_of(pipe) if include_weights else {}
    try:
        make_folder(folder.parent)
        with write_atomically(folder, overwrite=False) as unfinished:
            unfinished.mkdir()
            check_size(pipe, request, only, networks, folder, limit, report)
            write_kit(pipe, request, unfinished, only, networks)
    except NonFiniteError as error:
        raise UserError(f"the run failed, and no kit was written: {error}") from error
    except OSError as error:
        raise cannot_write(folder, error) from error


def check_possible(pipe: Pipeline, request: Request, folder: Path) -> None:
    remove_leftovers(folder.parent)  # of killed processes
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"output: {folder} exists already, and kits are never overwritten. "
            "Delete it, or choose another folder"
        )
    if pipe.dtype != torch.float32:
        raise UserError(f"dtype: a kit is in float32 (got {pipe.dtype}). Leave `dtype` out")
    images = request.images
    if images:
        cached = images.kv_cache
        if cached is None:
            cached = pipe.spec.kv_cached_references
        if cached:
            raise UserError("kv_cache: a kit cannot hold cached references. Pass `kv_cache=False`")


def networks_of(pipe: Pipeline) -> dict[str, LazyModule]:
    """Return the networks by the names of their files in the kit."""
    networks: dict[str, LazyModule] = {
        "transformer": pipe.transformer,
        "autoencoder": pipe.autoencoder,
    }
    for part in pipe.spec.text.networks:
        networks[part] = getattr(pipe.text, part)
    return networks


def is_included(name: str, only: Sequence[str]) -> bool:
    """Whether a tensor of the run is part of the kit."""
    if any(re.match(pattern, name) for pattern in EXAMPLE):
        return True
    if re.match(r"step\.(?!001/)", name) and not re.search(r"/(velocity|latents)$", name):
        return False
    in_autoencoder = re.match(r"(decoder|encoder\.\d+)/", name) and name != "decoder/decoder/in"
    if in_autoencoder and re.search(r"/in(\.\d+)?$", name):
        return False
    return matches(name, only)


def check_size(
    pipe: Pipeline,
    request: Request,
    only: Sequence[str],
    networks: Mapping[str, LazyModule],
    folder: Path,
    limit: float,
    report: Callable[[str], None],
) -> None:
    """Find the size by a run of networks without weights. UserError if it is too large."""
    names, sizes = [], []

    def see(name: str, tensor: Tensor) -> None:
        names.append(name)
        if is_included(name, only):
            sizes.append(tensor.nbytes)

    with warnings.catch_warnings(action="ignore"):  # the run itself repeats them
        run(without_weights(pipe), request, see)
    check_patterns(only, names)
    tensors, weights = sum(sizes), sum(network.nbytes for network in networks.values())
    content = f"{readable(tensors)} of tensors and {readable(weights)} of weights"
    problem = None
    if tensors + weights > limit:
        problem = f"`limit` is {limit / 1e9:g} GB"
    elif 2 * tensors + weights > (free := shutil.disk_usage(folder.parent).free):
        problem = (
            f"{readable(free)} are free on its disk"  # the tensors are there twice for a while
        )
    if problem:
        raise UserError(
            f"{folder}: would hold {content}, and {problem}. Choose a smaller `width` and "
            "`height`, choose layers with `only`, or pass `include_weights=False`"
        )
    report(f"a kit of {len(sizes):,} tensors, {content}")


# ---------------------------------------------------------------- files


def write_kit(
    pipe: Pipeline,
    request: Request,
    folder: Path,
    only: Sequence[str],
    networks: Mapping[str, LazyModule],
) -> None:
    """Run the pipeline and write all files of the kit."""
    write_run(pipe, request, only, folder)
    for name, network in networks.items():
        write_tensors(folder / f"weights/{name}.safetensors", network().state_dict())
        if not pipe.residency.keep:
            network.release()
    shutil.copyfile(example_port.__file__, folder / "example_port.py")
    expected = Capture(folder / "expected.safetensors")
    (folder / "tensors.txt").write_text(list_tensors(expected), encoding="utf-8")
    text = format_readme(pipe, expected, include_weights=bool(networks))
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_run(pipe: Pipeline, request: Request, only: Sequence[str], folder: Path) -> None:
    """Run the pipeline. Write expected.safetensors and image.png."""
    recipe = describe(pipe, request)
    with Writer(folder / "run.safetensors", recipe) as writer:

        def see(name: str, tensor: Tensor) -> None:
            if name == "schedule":
                recipe["schedule"] = tensor.tolist()
            if is_included(name, only):
                writer.add(name, tensor)

        run(pipe, request, see).save(folder / "image.png")
    stored = Capture(writer.path)
    _, metadata = read_header(writer.path)
    document = json.loads(metadata[KEY])
    for record in document["tensors"].values():
        record.pop("same", None)  # each tensor is stored under its own name
    write_tensors(folder / "expected.safetensors", stored.tensors, {KEY: json.dumps(document)})
    writer.path.unlink()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file whose header keeps the order of `tensors`.

    The data are aligned: those with the widest elements come first.
    """
    header, end = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape)}
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


def list_tensors(expected: Capture) -> str:
    """Return one line a tensor, in the order of execution."""
    lines = []
    for name in expected.names:
        record = expected.records[name]
        lines.append(f"{name} {'x'.join(map(str, record.shape))} {record.dtype}\n")
    return "".join(lines)


# ---------------------------------------------------------------- README.md


def format_readme(pipe: Pipeline, expected: Capture, include_weights: bool) -> str:
    """Return README.md: its parts for the family, with the values of the run."""
    spec, recipe, c = pipe.spec, expected.recipe, pipe.spec.transformer
    rows, columns = recipe["height"] // 16, recipe["width"] // 16
    head_dim = c.hidden_size // c.num_heads
    values: dict[str, Any] = dict(
        model=spec.name,
        count=f"{len(expected.names):,}",
        steps=recipe["steps"],
        last=f"step.{recipe['steps']:03}",
        run=_run_table(recipe),
        weights=_weights_row(pipe, recipe, include_weights),
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
        scale=spec.autoencoder.scale_factor,
        shift=spec.autoencoder.shift_factor,
        layers=", ".join(map(str, spec.text.model.layers))
        if isinstance(spec.text, FLUX2Text)
        else "",
    )
    if isinstance(c, Flux3Config):
        example = "the first block of the image"
        parts = golden_kit3.parts3(pipe, expected)
        return (HEAD + golden_kit3.README3).format(example=example, **values, **parts)
    mu = mu_of(spec, rows * columns, recipe["steps"])
    values |= dict(
        example="one double-stream block",
        schedule=SCHEDULES[spec.schedule].format(mu=mu),
        guidance=GUIDANCE if c.guidance else "",
        cfg=CFG if "step.001/negative/out" in expected.records else "",
    )
    family = FLUX1 if spec.flux1 else FLUX2
    parts = {name: text.format(**values) for name, text in family.items()}
    return (HEAD + README).format(**values, **parts)


def _run_table(recipe: dict) -> str:
    fields = (
        "model",
        "prompt",
        "negative_prompt",
        "width",
        "height",
        "steps",
        "guidance",
        "true_cfg_scale",
        "seed",
        "numerics",
    )
    lines = []
    for field in fields:
        value = recipe[field]
        if isinstance(value, list):
            value = format_values(value)
        if value is not None:
            lines.append(f"| {field.replace('_', ' ')} | {value} |")
    return "\n".join(lines)


def _weights_row(pipe: Pipeline, recipe: dict, include_weights: bool) -> str:
    if include_weights:
        names = ", ".join(f"`{name}`" for name in networks_of(pipe))
        return f"| `weights/` | {names}: all weights in float32, by the released files' names |"
    files = []
    for some in recipe["files"].values():
        files += [f"{file['file']}, sha256 {file['sha256']}" for file in some]
    note = "`python example_port.py . FILE` reads the transformer's"
    return f"| | weights are not included: {'; '.join(files)}. {note} |"


def mu_of(spec: ModelSpec, tokens: int, steps: int) -> float:
    """Return the shift of the schedule."""
    if spec.schedule == "linear":
        return sampling.calculate_shift(tokens)
    if spec.schedule == "empirical":
        return sampling.compute_empirical_mu(tokens, steps)
    return 0.0


HEAD = """# A golden kit of {model}

The tensors of one small run, to test a port against, layer by layer. A port needs only a reader of
`.safetensors`.

| file | content |
| --- | --- |
| `expected.safetensors` | {count} tensors: the inputs and outputs of each layer, in float32 |
| `tensors.txt` | their names and shapes, in the order of execution |
{weights}
| `image.png` | the image of the run |
| `example_port.py` | {example} in numpy. `python example_port.py` tests it |

| the run | |
| --- | --- |
{run}

## How to use it

Port in the order below. Give each layer the kit's own input and compare its output with the kit's.
So errors do not accumulate, and each shows where it is made. In float32 a correct layer has a
relative L2 error, |yours - kit| / |kit|, of about 1e-7 and at most 2e-6. The last latents, after
all steps, may differ by 1e-4. Do not judge by correlation: it stays above 0.99 with shift and scale
swapped, with rows and columns swapped, or without QK-norm.

With a clone of the repository that wrote this kit, save your tensors under the kit's names, as many
as you have, and run `python scripts/parity.py COMMAND`:

| command | what it does |
| --- | --- |
| `compare yours.safetensors expected.safetensors` | names the first tensor that differs |
| `diagnose yours.safetensors expected.safetensors` | looks for a known bug in that tensor |
| `report yours.safetensors expected.safetensors --output report.html` | draws all errors |
| `compare expected.safetensors --against yours:function` | calls your function for every module |
| `bisect expected.safetensors --module-fn yours:function` | finds the first wrong step and module |
| `calibrate expected.safetensors` | measures rounding, for a port in bfloat16 or float16 |
| `compare expected.safetensors --against diffusers` | shows that diffusers gives these tensors |
"""

README = """## Names

A name is place/module/tap. The module has the name of its weights in Black Forest Labs' files:
`double_blocks.0.img_mlp.0.weight` computes `step.001/double_blocks.0.img_mlp.0/out` from
`step.001/double_blocks.0.img_mlp.0/in`. These names are not of weights: `attention` (the joint
attention of a block), `mlp_act` (the activation of a single-stream block), and everything outside
the networks, such as `rope` or `latents`. The first step is stored layer by layer, later steps by
their velocity and latents. Each tensor is stored under its own name, also where two are equal.

A module with one input has in, one with several in.0, in.1, ...; so have outputs. A block's inputs
besides tokens are arg.N. A function of yours gets a module's inputs in this order, and returns its
outputs in theirs. It may return nothing for a module that you do not have.

- `double_blocks.N`: in.0 image, in.1 text, arg.2 RoPE table, then shift, scale and gate: arg.3 to
  arg.5 of the image's attention, arg.6 to arg.8 of its MLP, arg.9 to arg.11 of the text's
  attention, arg.12 to arg.14 of its MLP -> out.0 image, out.1 text
- `single_blocks.N`: in.0 text and image, arg.1 RoPE table, arg.2 shift, arg.3 scale, arg.4 gate ->
  out
- {modulators}: vec -> out.0 shift, out.1 scale, out.2 gate; in
  double-stream blocks out.3 to out.5, those of the MLP
- `*.norm`: in.0 q, in.1 k, before the norm -> out.0 q, out.1 k
- `*/attention`: q, k, v, after RoPE -> out
- `final_layer`: in.0 image, in.1 vec -> out
- every other module: in -> out

A scale is stored as the linear layer gives it: modulate with 1 + scale.

## Conventions

- Arrays are row-major. The batch is 1: tokens (1, N, channels), heads (1, {heads}, N, {d}), latents
  and pixels (1, C, h, w).
- {linear} A convolution's weight is (out, in, height, width).
- Image tokens follow the rows, here {rows} rows of {columns}. In the joint sequence text is first.
- The text is padded to {text_length} tokens. The transformer has no mask: it attends to padding.
- The rows of a qkv weight give q, then k, then v; each of these, head by head.
- RoPE rotates neighbouring channels, (0, 1), (2, 3), ..., not halves. q and k are normalised first.
- A modulation gives shift, scale, gate: (1 + scale) · norm(x) + shift, and x + gate · branch.
- LayerNorm has no weights. Its epsilon is 1e-6, and so is that of the RMS norms of q and k.
- Time t runs from 1 (noise) to 0 (image). It is multiplied by 1000 before the sinusoids.

## The order to port in

1. **rope_table**: `ids/txt`, then `ids/img` -> `rope` (N, {pairs}, 2, 2), rotation matrices
   ((cos, -sin), (sin, cos)). {ids}
   The axes share the {d} channels of a head, {axes}: an axis with n channels has
   angle = position · {theta}^(-2i/n) for i < n/2, computed in float64.
2. **timestep_embedding**: the first t of `schedule` -> `step.001/time_in/in` (1, 256): 128 cosines,
   then 128 sines, of the angles 1000 t · 10000^(-i/128).
3. **MLPEmbedder**: out_layer(silu(in_layer(x))) -> `step.001/time_in/out`.{guidance}{vector}
   Their sum is `step.001/vec` (1, {D}).
4. **Modulation**: lin(silu(vec)), split into shift, scale, gate. In double-stream blocks there are
   two such triples: of attention, then of the MLP. {modulation}
5. **img_in**, **txt_in**: `step.001/in` -> `step.001/img_in/out`, and `text/features` ->
   `step.001/txt_in/out`.
6. **DoubleStreamBlock**, as in `example_port.py`, of image tokens, `step.001/double_blocks.0/in.0`,
   and text tokens, `step.001/double_blocks.0/in.1`. The names below are the image's; the text's
   have txt for img.
   - modulate: `step.001/double_blocks.0.img_attn.qkv/in`
   - QKNorm, head by head, x / sqrt(mean(x²) + 1e-6) · scale, (1, {heads}, N, {d}): q,
     `step.001/double_blocks.0.img_attn.norm/out.0`, and k,
     `step.001/double_blocks.0.img_attn.norm/out.1`
   - apply_rope, text and image together, (x0 cos - x1 sin, x0 sin + x1 cos):
     `step.001/double_blocks.0/attention/q`, `step.001/double_blocks.0/attention/k`; v is not
     rotated: `step.001/double_blocks.0/attention/v`
   - attention, softmax(q kᵀ / sqrt({d})) v: `step.001/double_blocks.0/attention/out`
   - residuals, x + gate · proj(attention), then x + gate · mlp(modulate(x)):
     `step.001/double_blocks.0/out.0`, and of the text `step.001/double_blocks.0/out.1`
   - inside the MLP, {activation}:
     `step.001/double_blocks.0.img_mlp.1/out`
7. **SingleStreamBlock**, of text and image as one sequence, `step.001/single_blocks.0/in.0`, with
   attention and MLP in parallel.
   - modulate, then linear1, whose columns are q, k, v and the MLP's:
     `step.001/single_blocks.0.linear1/out`
   - norm, RoPE and attention as before: `step.001/single_blocks.0.norm/out.0`,
     `step.001/single_blocks.0/attention/q`
   - x + gate · linear2 of attention and activation: `step.001/single_blocks.0.linear2/in`,
     `step.001/single_blocks.0/out`
8. **FinalLayer**, of the image tokens, `step.001/final_layer/in.0`: adaLN_modulation.1(silu(vec))
   is shift, then scale (in diffusers' files scale, then shift); modulate, then linear:
   `step.001/out`.{cfg}
9. **schedule**: {schedule}:
   `schedule` ({steps} + 1).
10. **denoise**: x <- x + (t' - t) · velocity, in float32, from `noise` on: `step.001/velocity`,
    `step.001/latents`, up to `{last}/latents`. Tokens (1, h·w, C) are latents (1, C, h, w), row by
    row. Use the kit's noise: no two libraries draw the same from a seed.
11. **denormalise**: {denormalise}
    **unpack**: channel 4c + 2i + j of the token in row r and column s goes to channel c in row
    2r + i and column 2s + j: `decoder/decoder/in`.
12. **Decoder**: {first}a residual around each two 3x3 convolutions, each after a group norm
    ({groups} groups, epsilon 1e-6) and silu; attention with one head in the middle; upsampling
    repeats the nearest value; up.0 has the full resolution and runs last:
    `decoder/decoder.conv_in/out`, `decoder/decoder.mid/out`, `pixels`.
13. **to_images**: round((clamp(pixels, -1, 1) + 1) / 2 · 255): `image` (H, W, 3), which is
    `image.png`.
14. **Text encoders** come last: the steps above can use the recorded features. {text}
"""

EVEN = "t falls evenly from 1 to 0"
SHIFTED = (
    EVEN + ", then t -> e^mu / (e^mu + 1/t - 1), here with mu = {mu:.9g}. Of L image tokens,\n   "
)
SCHEDULES = {
    "unshifted": EVEN,
    "linear": f"{SHIFTED}mu = 0.5 + 0.65 · (L - 256) / 3840",
    "empirical": f"{SHIFTED}mu = b + (a - b) · (200 - steps) / 190, where\n"
    "   a = 8.73809524e-05 L + 1.89833333 and b = 0.00016927 L + 0.45666666; above 4300 tokens,\n"
    "   mu = b",
}
GUIDANCE = "\n   Guidance, times 1000, is embedded in the same way: `step.001/guidance_in/out`."
CFG = """
   Without the prompt, the same: `step.001/negative/out`. Classifier-free guidance gives the
   velocity without + scale · (with - without)."""
FLUX1 = dict(
    linear="A Linear is y = x Wᵀ + b, and W is (out, in).",
    modulators="`*_mod`, `*.modulation`",
    ids="An id is (t, row, column), and 0 for text.",
    vector="\n   The pooled text, `text/pooled`, has an embedder too: `step.001/vector_in/out`.",
    modulation="Each block has\n   its own: `step.001/double_blocks.0.img_mod/out.0`, "
    "`step.001/single_blocks.0.modulation/out.0`.",
    activation="GELU in its tanh approximation",
    denormalise="latents / {scale} + {shift}.",
    first="",
    text="T5\n    reads the padded prompt, `text/t5/in`, without a mask: `text/features`. CLIP\n"
    "    reads `text/clip/in` and gives the vector at the end of the prompt: `text/pooled`.",
)
FLUX2 = dict(
    linear="A Linear is y = x Wᵀ, without bias in the transformer, and W is (out, in).",
    modulators="`*_stream_modulation*`",
    ids="An id is (t, row, column, l). Text has only l,\n   the number of the token.",
    vector="",
    modulation="All blocks\n   of a kind share one: "
    "`step.001/double_stream_modulation_img/out.0`,\n   `step.001/single_stream_modulation/out.0`.",
    activation="silu(a) · b, where a and b are the halves of the first linear's output",
    denormalise="latents · sqrt(bn.running_var + 1e-4) + bn.running_mean, channel by channel;\n"
    "    both are weights of the autoencoder.",
    first="a 1x1 convolution, post_quant_conv; then ",
    text="The\n    language model reads the padded prompt, `text/model/in.0`, with the mask\n"
    "    `text/model/in.1`. Its hidden states after layers {layers}, concatenated, are\n"
    "    `text/features`.",
)
