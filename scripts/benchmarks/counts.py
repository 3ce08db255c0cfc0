"""Counts of the stages of the released models, ours and diffusers', and the tables of them."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from command_line import show

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
from flux.configs import MODELS, FLUX1Text, ModelSpec
from flux.parity import reference
from flux.weights.quantization.quantize import quantize_

STORED = Path(__file__).with_name("counts.json")
SIDE = 1024  # pixels, of every image
# models that share sizes share the row of the first: let it be a model that is often run
NAMES = sorted(MODELS, key=lambda name: name not in ("flux.1-dev", "flux.2-klein-4b"))
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
    if matmul:
        for layer in stage.modules[0].modules():
            if hasattr(layer, "fp8_matmul"):
                layer.fp8_matmul = True
    return stage


def their_language_model(spec: ModelSpec, ours: Stage) -> Stage:
    """Give the mask in the form that the layers read: a value on the meta device is not known."""
    if isinstance(spec.text, FLUX1Text):
        return their_encoding(spec, ours)
    length = ours.inputs["ids"].shape[1]
    mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")
    return their_encoding(spec, ours._replace(inputs=ours.inputs | dict(mask=mask)))


STAGES = {
    "text": (encoding, their_language_model),
    "step": (stepping, their_stepping),
    "decode, float32": (decoding, their_decoding),
    "decode, bfloat16": (partial(decoding, dtype=torch.bfloat16), their_decoding),
    "encode, float32": (image_encoding, their_image_encoding),
    "step, fp8, dequantized": (partial(float8_stepping, matmul=False), None),
    "step, fp8, multiplied": (partial(float8_stepping, matmul=True), None),
}


def rows(names: list[str], against: bool, stages: list[str] | None = None) -> Iterator[Row]:
    """Count each stage of each model, once for models that share its sizes."""
    seen: dict[tuple, str] = {}
    for name in names:
        spec = MODELS[name]
        for stage, (build, build_theirs) in STAGES.items():
            if stages is not None and stage not in stages:
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
    """Print the ten lines of code on which light kernels take the most time, of each stage."""
    for row in found:
        show("", f"{row.name}: the ten dearest lines beside products and attention", "")
        show("| line | kernels | GB | ms |", "|---|---|---|---|")
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
