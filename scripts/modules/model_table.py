"""`sample.py --list-models`: a row for each model; with a name, all about the models it fits."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

from modules.command_line import as_typed, show

from flux.configs import MODELS, ModelSpec
from flux.errors import UserError
from flux.weights.files import weights_folder
from flux.weights.inventory import ModelFile, inventory, memory_sizes
from flux.weights.locate import count_parameters, find_name

WIDE = 110  # columns that the table needs with the names of licences
WITHOUT_TERMINAL = 120
NAMES = 26  # columns of names; longer ones have a line of their own
IMAGES = {  # what --image is
    "start": "the start of img2img or, with --mask, of inpainting",
    "reference": "a reference, or the image to edit; up to 10",
    "control": "a control image",
    "fill": "filled in where --mask is white, or outpainted",
    "redux": "an image to vary; 1 to 10",
}


def list_models(args: argparse.Namespace) -> int:
    """Print the table, or all about the models that --list-models NAME fits."""
    weights_folder(args.weights)
    width = shutil.get_terminal_size((WITHOUT_TERMINAL, 24)).columns
    if args.list_models:
        details = [line for name in matching(args.list_models) for line in about(name, args)]
        show(*details)
        return 0
    show(*table(args.weights, wide=width >= WIDE))
    return 0


def matching(text: str) -> list[str]:
    """Return the model of this name, or those whose names have this text."""
    if text.lower() in MODELS:
        return [text.lower()]
    if found := [name for name in MODELS if text.lower() in name]:
        return found
    try:
        return [find_name(text)]  # "flux-dev", or a repository
    except UserError as error:
        raise UserError(str(error).replace("name:", "list_models:", 1)) from None


def table(weights: Path | None, wide: bool) -> Iterator[str]:
    """Yield the lines of the table, of at most 80 columns unless `wide`."""
    licence_title = "licence" if wide else "terms"
    yield (
        f"{'name':{NAMES}}{'steps':>5} {'guidance':>8} {'size':>5} {'memory':>7} {'to get':>7}  "
        f"{'--image':10}{licence_title}"
    )
    for spec in MODELS.values():
        files = inventory(spec, weights)
        total, _ = memory_sizes(spec, files)
        guidance = "-" if spec.guidance is None else f"{spec.guidance:g}{' (x2)' * spec.cfg}"
        terms = "free" if spec.licence.commercial else "n.c."
        name = spec.name
        if len(name) > NAMES:
            yield name
            name = ""
        yield (
            f"{name:{NAMES}}{spec.steps:>5} {guidance:>8} {spec.size:>5} {gigabytes(total):>7} "
            f"{to_get(files):>7}  {spec.image_mode:10}{spec.licence.name if wide else terms}"
            f"{' *' if spec.unconfirmed else ''}"
        )
    yield "memory: all weights; to get: missing files; in GB; +: and some of unknown size"
    free = "" if wide else "; terms: free, or n.c.: not for commercial use"
    yield f"(x2): two passes a step{free}"
    yield "*: not all is known of this file, which was not at hand"
    yield as_typed("sample.py --list-models NAME: each file, and what --image is.")


def about(name: str, args: argparse.Namespace) -> Iterator[str]:
    """Yield what is known of a model: settings, memory, licence, and each file."""
    spec = MODELS[name]
    files = inventory(spec, args.weights)
    total, largest = memory_sizes(spec, files)
    guidance = "none" if spec.guidance is None else f"{spec.guidance:g}"
    if spec.cfg:
        guidance += ", by two passes a step"
    control = f", {spec.control}" if spec.control else ""
    yield name
    yield f"  sampling     {spec.steps} steps, guidance {guidance}, {spec.size}x{spec.size}"
    yield f"  transformer  {count_parameters(spec) / 1e9:.3g} B parameters, {spec.weight_format}"
    yield f"  memory       {gigabytes(total)} GB of weights, {gigabytes(largest)} GB at a time"
    yield f"  --image      {IMAGES[spec.image_mode]}{control}"
    yield f"  licence      {spec.licence.name}"
    if spec.licence.gated:
        yield "               to be accepted on the page below, before a download"
    if spec.licence.requires_filters:
        yield "               non-commercial; asks to filter or review images (--filter nsfw)"
    for number, line in enumerate(textwrap.wrap(spec.unconfirmed, 64)):
        yield f"  {'' if number else 'not known':13}{line}"
    for repository in dict.fromkeys(file.repository for file in files):
        yield f"  files        {page(spec, repository)}"
        for file in files:
            if file.repository == repository:
                yield from file_lines(file)


def page(spec: ModelSpec, repository: str) -> str:
    return "part of this package" if spec.embedded else f"https://huggingface.co/{repository}"


def file_lines(file: ModelFile) -> Iterator[str]:
    size = f"{gigabytes(file.size)} GB" if file.size and file.size > 1e6 else ""
    for name in file.missing or (file.name,):
        state = "missing" if file.missing else "here"
        yield f"    {state:8}{size:>9}  {name}"
        size = ""  # that of all shards stands at the first


def to_get(files: list[ModelFile]) -> str:
    """Return the GB of all missing files, as far as they are known; "-" if none is missing."""
    if not any(file.missing for file in files):
        return "-"
    known = sum(file.size or 0 for file in files if file.missing)
    unknown = any(file.missing and not file.size for file in files if "tokenizer" not in file.part)
    return f"{gigabytes(known)}{'+' if unknown else ''}"


def gigabytes(size: int | None) -> str:
    """Return a size in GB, with two or three digits."""
    value = (size or 0) / 1e9
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
