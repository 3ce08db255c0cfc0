"""Counts of the stages of the released models, ours and diffusers', and the tables of them."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from modules.command_line import show
from torch import Tensor

from benchmarks.count import GPUS, Count, Counted, counted
from benchmarks.full import (
    Stage,
    decoding,
    encoding,
    stepping,
    their_decoding,
    their_encoding,
    their_stepping,
)
from benchmarks.stages import our_autoencoder, their_autoencoder
from benchmarks.steps import our_step
from flux import sampling
from flux.configs import MODELS, FLUX1Text, ModelSpec
from flux.parity import reference
from flux.transformer import KVCache
from flux.weights.quantization import FP8Linear, NVFP4Linear
from flux.weights.quantization.quantize import large_linears, quantize_

STORED = Path(__file__).with_name("counts.json")
SIDE = 1024  # pixels, of every image
# models that share sizes share the row of the first: let it be a model that is often run
NAMES = sorted(
    # FLUX 3 in 8 or 4 bits is not counted
    (name for name, spec in MODELS.items() if not spec.flux3 or spec.weight_format == "bfloat16"),
    key=lambda name: name not in ("flux.1-dev", "flux.2-klein-4b"),
)
HEADER = (
    "| model, stage | kernels | GB | fused GB | TFLOP | peak GB | floor ms | eager ms | "
    "of diffusers | compiled ms |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


class Row(NamedTuple):
    model: str
    stage: str
    ours: Counted
    theirs: Counted | None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.stage}"


# ------------------------------------------------------------------ stages


def image_encoding(spec: ModelSpec, side: int, device: str) -> Stage:
    model = our_autoencoder(spec.autoencoder, torch.device(device), torch.float32)
    pixels = torch.empty(1, 3, side, side, device=device)
    return Stage([model], dict(pixels=pixels), lambda: model.encode(pixels), torch.float32)


def their_image_encoding(spec: ModelSpec, ours: Stage) -> Stage:
    model = their_autoencoder(ours.modules[0])  # type: ignore[arg-type]
    pixels = ours.inputs["pixels"]
    return Stage([model], ours.inputs, lambda: reference.diffusers_encode(model, pixels))


def float8_stepping(spec: ModelSpec, side: int, device: str, matmul: bool) -> Stage:
    stage = stepping(spec, side, device)
    quantize_(stage.modules[0], "fp8")
    return multiplied_in_float8(stage) if matmul else stage


def multiplied_in_float8(stage: Stage) -> Stage:
    for layer in stage.modules[0].modules():
        if isinstance(layer, FP8Linear):
            layer.fp8_matmul = True
    return stage


def file_stepping(spec: ModelSpec, side: int, device: str, matmul: bool = False) -> Stage:
    """Build a step with the large matrices in the format of the model's file."""
    stage = stepping(spec, side, device)
    model = stage.modules[0]
    for path in large_linears(model):
        linear = model.get_submodule(path)
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        with torch.device(device):
            if spec.weight_format == "nvfp4":
                model.set_submodule(path, NVFP4Linear(*sizes, swizzled=True))
            else:
                model.set_submodule(path, FP8Linear(*sizes, scale=(), input_scale=()))
    return multiplied_in_float8(stage) if matmul else stage


def referring(spec: ModelSpec, side: int, device: str, count: int) -> Stage:
    """Build a step with reference images as large as the image, computed with it."""
    stage = stepping(spec, side, device)
    references, ids = reference_tokens(spec, side, device, count)
    if spec.flux3:
        tensors = stage.inputs | dict(references=references, reference_ids=ids)
        return stage._replace(inputs=tensors, run=our_step(stage.modules[0], tensors))
    tensors = stage.inputs | dict(
        img=torch.cat([stage.inputs["img"], references], dim=1),
        img_ids=torch.cat([stage.inputs["img_ids"], ids]),
    )
    return stage._replace(inputs=tensors, run=our_step(stage.modules[0], tensors))


def cached_referring(spec: ModelSpec, side: int, device: str, count: int) -> Stage:
    """Build a step with reference images whose keys and values were computed before."""
    stage = stepping(spec, side, device)
    model, tensors = stage.modules[0], stage.inputs
    references, ids = reference_tokens(spec, side, device, count)
    caches = [KVCache(spec.text_length) for _ in (*model.double_blocks, *model.single_blocks)]
    nothing = dict(img=references, img_ids=ids, txt=tensors["txt"][:, :0], txt_ids=ids[:0])
    run = our_step(model, tensors, caches)
    our_step(model, tensors | nothing, caches)()
    return stage._replace(inputs=tensors | dict(references=references, ids=ids), run=run)


def reference_tokens(spec: ModelSpec, side: int, device: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of `count` images, (1, R, C), and their positions, (R, axes)."""
    tokens, axes = side // 16, len(spec.transformer.axes_dim)
    if spec.flux3:
        ids = [sampling.flux3_image_ids(tokens, tokens, k) for k in range(1, count + 1)]
    else:
        ids = [sampling.image_ids(tokens, tokens, axes, t=10 * k) for k in range(1, count + 1)]
    shape = 1, count * tokens**2, spec.transformer.in_channels
    return torch.empty(shape, dtype=torch.bfloat16, device=device), torch.cat(ids)


def their_cached_referring(spec: ModelSpec, ours: Stage) -> Stage:
    """Build diffusers' step, with the cache that its first step made."""
    from diffusers.models.transformers import transformer_flux2 as theirs

    tensors = dict(ours.inputs)
    references, ids = tensors.pop("references"), tensors.pop("ids")
    stage = their_stepping(spec, ours._replace(inputs=tensors))
    model = stage.modules[0]
    for block in model.transformer_blocks:
        block.attn.set_processor(theirs.Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(theirs.Flux2KVParallelSelfAttnProcessor())
    call = dict(
        encoder_hidden_states=tensors["txt"],
        txt_ids=tensors["txt_ids"].to("meta"),
        timestep=tensors["t"].to(torch.bfloat16),
        return_dict=False,
    )
    _, cache = model(
        hidden_states=torch.cat([references, tensors["img"]], dim=1),
        img_ids=torch.cat([ids, tensors["img_ids"]]).to("meta"),
        kv_cache_mode="extract",
        num_ref_tokens=references.shape[1],
        **call,
    )

    def run() -> Tensor:
        return model(
            hidden_states=tensors["img"],
            img_ids=tensors["img_ids"].to("meta"),
            kv_cache=cache,
            kv_cache_mode="cached",
            **call,
        )[0]

    return stage._replace(run=run)


def their_language_model(spec: ModelSpec, ours: Stage) -> Stage:
    """Give the mask in the form that the layers read: a value on the meta device is not known."""
    if isinstance(spec.text, FLUX1Text):
        return their_encoding(spec, ours)
    length = ours.inputs["ids"].shape[1]
    mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")
    return their_encoding(spec, ours._replace(inputs=ours.inputs | dict(mask=mask)))


class Counting(NamedTuple):
    build: Callable[[ModelSpec, int, str], Stage]
    build_theirs: Callable[[ModelSpec, Stage], Stage] | None = None
    has: Callable[[ModelSpec], bool] = lambda spec: True  # whether a model has this stage


def in_format(weight_format: str) -> Callable[[ModelSpec], bool]:
    return lambda spec: spec.weight_format == weight_format


def reads_references(spec: ModelSpec) -> bool:
    return spec.image_mode == "reference" and spec.weight_format == "bfloat16"


def caches_references(spec: ModelSpec) -> bool:
    return spec.kv_cached_references and spec.weight_format == "bfloat16"


STAGES = {
    "text": Counting(encoding, their_language_model),
    "step": Counting(stepping, their_stepping),
    "decode, float32": Counting(decoding, their_decoding),
    "decode, bfloat16": Counting(partial(decoding, dtype=torch.bfloat16), their_decoding),
    "encode, float32": Counting(image_encoding, their_image_encoding),
    "step, fp8, dequantized": Counting(partial(float8_stepping, matmul=False)),
    "step, fp8, multiplied": Counting(partial(float8_stepping, matmul=True)),
    "step, fp8 file, dequantized": Counting(file_stepping, has=in_format("fp8")),
    "step, fp8 file, multiplied": Counting(
        partial(file_stepping, matmul=True), has=in_format("fp8")
    ),
    "step, nvfp4 file": Counting(file_stepping, has=in_format("nvfp4")),
}
for _count, _noun in ((1, "reference"), (4, "references")):
    STAGES[f"step, {_count} {_noun}"] = Counting(
        partial(referring, count=_count), their_stepping, reads_references
    )
    STAGES[f"step, {_count} cached {_noun}"] = Counting(
        partial(cached_referring, count=_count), their_cached_referring, caches_references
    )


def rows(names: list[str], against: bool, stages: list[str] | None = None) -> Iterator[Row]:
    """Count each stage of each model, once for models that share its sizes."""
    seen: dict[tuple, str] = {}
    for name in names:
        spec = MODELS[name]
        for stage, (build, build_theirs, has) in STAGES.items():
            if not has(spec) or (stages is not None and stage not in stages):
                continue
            sizes = stage, *decisive(spec, stage)
            if sizes in seen:
                continue
            seen[sizes] = name
            ours = build(spec, SIDE, "meta")
            theirs = None
            if against and build_theirs is not None:
                theirs = counted(build_theirs(spec, ours).run)
            yield Row(name, stage, counted(ours.run), theirs)


def decisive(spec: ModelSpec, stage: str) -> tuple:
    """Return what a stage's counts depend on."""
    if stage == "text":
        return spec.text, spec.text_length
    if stage.startswith("step"):
        return spec.transformer, spec.text_length
    return (spec.autoencoder,)


# ------------------------------------------------------------------ tables


def print_counts(names: list[str], gpu_name: str, against: bool) -> list[Row]:
    """Print a line for each stage, and for diffusers' stage."""
    found = []
    show(f"Counted for 1024x1024, batch 1; times on one {gpu_name}.", "", *HEADER)
    for row in rows(names, against):
        found.append(row)
        ours = row.ours.totals(GPUS[gpu_name])
        theirs = row.theirs.totals(GPUS[gpu_name]) if row.theirs else None
        ratio = f"{ours.eager / theirs.eager:.2f}" if theirs else ""
        show(f"| {' | '.join([row.name, *figures(ours, ratio)])} |")
        if theirs:
            show(f"| {' | '.join([f'{row.name}: diffusers', *figures(theirs, '1')])} |")
    return found


def figures(count: Count, ratio: str) -> list[str]:
    return [
        f"{count.kernels:,}",
        f"{count.elementwise / 1e9:.1f}",
        f"{count.fused / 1e9:.1f}",
        f"{count.flops / 1e12:.2f}",
        f"{count.peak / 1e9:.2f}",
        f"{1e3 * count.floor:.1f}",
        f"{1e3 * count.eager:.1f}",
        ratio,
        f"{1e3 * count.compiled:.1f}",
    ]


def print_sites(found: list[Row], gpu_name: str) -> None:
    """Print the ten functions whose light kernels take the most time, of each stage."""
    for row in found:
        show("", f"{row.name}: the ten dearest functions beside products and attention", "")
        show("| function | kernels | GB | ms |", "|---|---|---|---|")
        for site, kernels, nbytes, seconds in row.ours.dearest_sites(GPUS[gpu_name]):
            show(f"| {site} | {kernels:,} | {nbytes / 1e9:.2f} | {1e3 * seconds:.2f} |")


# ------------------------------------------------------------------ what is stored


def stored() -> dict[str, dict[str, Count]]:
    """Return the stored counts: name of the row -> "ours" or "diffusers" -> Count."""
    content = json.loads(STORED.read_text())
    return {
        name: {side: Count(**count) for side, count in sides.items()}
        for name, sides in content.items()
    }


def as_json(found: list[Row], gpu_name: str) -> str:
    content = {}
    for row in found:
        sides = {"ours": row.ours, "diffusers": row.theirs}
        content[row.name] = {
            side: count.totals(GPUS[gpu_name])._asdict() for side, count in sides.items() if count
        }
    return json.dumps(content, indent=1) + "\n"
