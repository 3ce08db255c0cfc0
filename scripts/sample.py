"""Generate images from text, and from images, with any FLUX model or an embedded toy.

python scripts/sample.py "a small yellow star above a large blue ring on a white background"
python scripts/sample.py "a cat holding a sign that says hello world" --model flux.2-klein-4b
python scripts/sample.py "the cat of the first image in the armchair of the second" \\
    --model flux.2-klein-4b --image cat.jpg --image chair.jpg
python scripts/sample.py "a red door" --model flux.1-fill-dev --image house.jpg --mask door.png
"""

import argparse
import codecs
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from modules import several_processes
from modules.background import BackgroundWriter
from modules.command_line import (
    Once,
    Parser,
    add_hidden_alias,
    add_quiet,
    exit_code,
    say,
    set_quiet,
    show,
    with_flags,
)
from modules.other_programs import OTHERS
from modules.progress import Progress
from modules.safety_flags import REFUSED, Safety, add_safety, load_filters
from modules.upsampling_flags import check_upsampling, upsample

from flux.errors import UserError
from flux.image_io.metadata import (
    DTYPES,
    IMAGE_OPTIONS,
    describe,
    describe_files,
    other_environment,
    restore_args,
    short,
)

MAX_PROMPT_FILE = 2**26  # bytes
NUMERICS = ("exact", "bfl", "diffusers")
OLD_OFFLOAD = {"stages": "model", "stream": "block"}
ALIASES = {  # an older name of a flag, or the name in diffusers or BFL's command line -> the flag
    "--remake": "--from-image",
    "--expand": "--outpaint",
    "--photo": "--preprocess-control",
    "--cfg-scale": "--true-cfg-scale",
    "--vram": "--max-vram",
    "--native-fp8": "--fp8-matmul",
    "--tile": "--vae-tile",
    "--lora-partial": "--lora-ignore-unmatched",
    "--check-weights": "--check-finite",
    "--num-inference-steps": "--steps",
    "--num-steps": "--steps",
    "--guidance-scale": "--guidance",
    "--num-images-per-prompt": "--num-images",
    "--image-path": "--image",
    "--name": "--model",
}
FLAGS = {  # the library's arguments whose flag is not their name with dashes
    "name": "--model",
    "images": "--image",
    "image_weights": "--image-weight",
    "composite=False": "--no-composite",
    "kv_cache=True": "--kv-cache",
    "kv_cache=False": "--no-kv-cache",
    "preprocess_control=True": "--preprocess-control",
    "fp8_matmul=True": "--fp8-matmul",
    "compile=True": "--compile",
    "check_finite=True": "--check-finite",
    "dtype=torch.float32": "--dtype float32",
    "dtype=torch.bfloat16": "--dtype bfloat16",
    "decode_dtype=torch.float32": "--decode-dtype float32",
    "loras": "--lora",
    "load_lora": "--lora",
    "scale": "--lora",
    "strict=False": "--lora-ignore-unmatched",
}
DESCRIPTION, EPILOG = __doc__.split("\n", 1)[0], "examples:" + __doc__.split("\n", 1)[1]


# ------------------------------------------------------------------------------ flags


def parser() -> argparse.ArgumentParser:
    p = Parser(
        usage="%(prog)s [PROMPT ...] [FLAG ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_request(p.add_argument_group("what to generate"))
    add_images(p.add_argument_group("images as input (README: which model takes what)"))
    add_sampling(p.add_argument_group("model and sampling"))
    add_memory_and_speed(p.add_argument_group("memory and speed (README: what is lossless)"))
    add_safety(p.add_argument_group("filters, watermark, signature (flux/safety/README.md)"))
    add_files(p.add_argument_group("files"))
    for old, new in ALIASES.items():
        add_hidden_alias(p, old, new)
    p.others = OTHERS
    return p


# fmt: off
def add_request(group) -> None:
    add = group.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="one or more prompts")
    add("--prompt", action="append", default=[], help="a prompt, as a flag (repeatable)")
    add("--prompt-file", type=Path, metavar="FILE", help="one prompt a line; -: standard input")
    add("--negative-prompt", metavar="TEXT",
        help="what to move away from (with classifier-free guidance)")
    add("--seed", type=int, help="of the first image; the next count up (default: random)")
    add("--num-images", type=int, default=1, metavar="N",
        help="images per prompt, one after another: in a batch, their bits would change "
        "(default: 1)")
    add("--width", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    add("--height", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    add("--from-image", type=Path, metavar="FILE",
        help="make an image again from the metadata in its file")
    add("--upsample", metavar="local|URL",
        help="expand the prompt first: local, by the text encoder of flux.2-dev or the released "
        "upsampler of FLUX 3; or by a server with OpenAI's protocol")
    add("--upsample-model", metavar="NAME", help="model of that server")
    add("--box", action="append", default=[], metavar="NAME:X0,Y0,X1,Y1[:TEXT]",
        help="FLUX 3: where a thing is, in shares of the width and height; the prompt cites it as "
        "<NAME> (repeatable)")
    add("--boxes", type=Path, metavar="FILE",
        help="FLUX 3: boxes from a JSON file: a list of {id, bbox, desc}, with the y of each first")


def add_images(group) -> None:
    add = group.add_argument
    add("--image", type=Path, action="append", default=[], metavar="FILE",
        help="an input image (repeatable); --list-models NAME says what it is to a model")
    add("--mask", type=Path, action=Once, metavar="FILE",
        help="inpainting, Fill: white is what may change")
    add("--strength", type=float, metavar="S",
        help="image to image, inpainting: share of the steps that is run; all of them keep nothing "
        "of the image (default: 0.8, or 0.75 of 4 steps)")
    add("--outpaint", type=margins, metavar="L,T,R,B",
        help="Fill: pixels to add at the left, top, right and bottom")
    add("--mask-threshold", type=float, metavar="X",
        help="Fill: binarize a soft mask, white from X on")
    add("--no-composite", dest="composite", action="store_false",
        help="keep the model's pixels where the mask is black, instead of the input's")
    add("--preprocess-control", action="store_true",
        help="Canny, Depth: --image is a photo: find its edges or its depth first")
    add("--save-control", type=Path, metavar="FILE",
        help="Canny, Depth: write the control image to this file")
    add("--image-weight", dest="image_weights", type=float, action="append", metavar="W",
        help="Redux: weight of each --image (default: equal weights, with sum 1)")
    add("--match-image-size", type=int, metavar="K",
        help="references: generate at the size of the K-th --image")
    add("--keep-input-size", action="store_true",
        help="Kontext: do not resize references to a preferred resolution")
    add("--reference-limit", type=int, metavar="SIDE",
        help="FLUX.2, FLUX 3: scale references down to at most SIDE x SIDE pixels (default: 2024 "
        "for one, in FLUX 3 2048; 1024 for several)")
    add("--kv-cache", action=argparse.BooleanOptionalAction, default=None,
        help="FLUX.2: compute references once; exact for klein-9b-kv, else an approximation")


def add_sampling(group) -> None:
    add = group.add_argument
    add("--model", metavar="NAME", help="see --list-models (default: the toy flux.2-tiny)")
    add("--steps", type=int, metavar="N", help="default: the model's")
    add("--solver", metavar="NAME",
        help="euler, heun, midpoint, dpmpp_2m, dpmpp_2m_sde or res_2m (default: euler)")
    add("--sigmas", type=times, metavar="T,T,...",
        help="the times from 1 to 0, instead of the model's and of --steps")
    add("--shift", type=float, metavar="S",
        help="move even times, or --sigmas, towards the noise: t -> S t / (1 + (S - 1) t)")
    add("--guidance", type=values, metavar="G",
        help="a number, START:END, or a comma-separated value per step (default: the model's; "
        "distilled models take none)")
    add("--true-cfg-scale", type=values, metavar="S",
        help="classifier-free guidance for guidance-distilled models (1: off)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the fastest available)")
    add("--dtype", choices=DTYPES, help="default: bfloat16; float32 for the toy")
    add("--decode-dtype", choices=DTYPES, help="of the decoder (default: by --numerics)")
    add("--numerics", choices=NUMERICS, help="whose rounding to reproduce (default: exact)")


def add_memory_and_speed(group) -> None:
    add = group.add_argument
    add("--offload", type=offload_mode, choices=("none", "model", "block"),
        help="weights on the device: all; one network at a time; one block at a time (default: the "
        "first that fits)")
    add("--max-vram", type=float, metavar="GB", help="device memory to use at most")
    add("--quantize", metavar="KIND",
        help="fp8, int8 or int4: quantize large matrices as they are loaded")
    add("--fp8-matmul", action="store_true", help="multiply in float8, where the GPU can")
    add("--compile", action="store_true",
        help="compile the blocks: takes a minute, then saves time on a GPU")
    add("--vae-tile", type=int, metavar="PIXELS", help="decode in tiles of this side")
    add("--parallel", metavar="AXIS=N,...",
        help="with torchrun: how its processes share the work, by data, cfg, context and tensor, "
        "such as context=4,cfg=2 (default: images, then branches, then tokens)")
    add("--shard-weights", action="store_true",
        help="with torchrun: each process keeps a part of the transformer; slower, the same image "
        "(default: if the whole does not fit)")


def add_files(group) -> None:
    add = group.add_argument
    add("--weights", type=Path, metavar="DIR",
        help="folder of the models' files (default: $FLUX_WEIGHTS, the Hugging Face cache, or a "
        "download)")
    add("--transformer", type=Path, metavar="FILE",
        help="use this transformer: a fine-tune, for example; or a checkpoint of all networks")
    add("--autoencoder", type=Path, metavar="FILE",
        help="use this autoencoder: the FLUX.2 small decoder, for example")
    add("--text-encoder", type=Path, metavar="FILE",
        help="use this text encoder: CLIP for FLUX.1, Qwen3 or Mistral for FLUX.2, Qwen3-VL for "
        "FLUX 3")
    add("--text-encoder-2", type=Path, metavar="FILE", help="FLUX.1: use this T5")
    add("--tokenizer", type=Path, metavar="DIR",
        help="use the tokenizer's files in this folder; FLUX.1 has two tokenizers")
    add("--lora", type=lora, action="append", default=[], metavar="FILE[:SCALE]",
        help="repeatable; any common format, merged in order")
    add("--lora-ignore-unmatched", action="store_true",
        help="leave out, and list, LoRA tensors that match no layer, instead of stopping")
    add("--check-finite", action="store_true",
        help="look for NaN in the weights, and compare the files' SHA-256 where they are known")
    add("--output", type=Path, default=Path("outputs/flux.png"), metavar="FILE",
        help="PNG, JPEG or WebP, by its suffix; a number is added rather than overwrite a file "
        "(default: outputs/flux.png)")
    add("--no-metadata", action="store_true",
        help="leave the prompt and all settings out of the files: they only say that a model made "
        "the image, and --from-image cannot make it again")
    add("--latents", type=Path, metavar="FILE",
        help="decode what --save-latents wrote; with a prompt, start from it, with --strength")
    add("--preview", type=int, metavar="N",
        help="every N steps, write the image so far to OUTPUT.preview.png; the file is removed at "
        "the end")
    add("--save-latents", action="store_true", help="also write the latents, as .safetensors")
    add("--list-models", nargs="?", const="", metavar="NAME",
        help="print the models: steps, guidance, memory, what is missing; with NAME or a part of "
        "one, their files too")
    add("--inspect", type=Path, metavar="FILE",
        help="say what a file or folder is, what it fits, and why it would be refused")
    add_quiet(group)
# fmt: on


def values(text: str) -> float | list[float] | tuple[float, ...]:
    """Parse "4", "4:1" (a list: from the first step to the last), "4,3,2,1" (a tuple: per step)."""
    try:
        numbers = [float(part) for part in text.replace(":", ",").split(",")]
        if ":" in text and len(numbers) != 2:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number, START:END, or comma-separated numbers (got {text!r})"
        ) from None
    if len(numbers) == 1:
        return numbers[0]
    return numbers if ":" in text else tuple(numbers)


def times(text: str) -> list[float]:
    """Parse "1,0.9,0.7"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected comma-separated numbers (got {text!r})"
        ) from None


def offload_mode(text: str) -> str:
    """Return the mode; the older names stages and stream stay valid."""
    return OLD_OFFLOAD.get(text, text)


def lora(text: str) -> tuple[Path, float]:
    """Parse FILE or FILE:SCALE."""
    path, colon, scale = text.rpartition(":")
    try:
        return (Path(path), float(scale)) if colon else (Path(text), 1.0)
    except ValueError:  # the colon belongs to the name
        return Path(text), 1.0


def margins(text: str) -> tuple[int, ...]:
    """Parse LEFT,TOP,RIGHT,BOTTOM."""
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected LEFT,TOP,RIGHT,BOTTOM in pixels (got {text!r})"
        ) from None
    return left, top, right, bottom


def flags_of(p: argparse.ArgumentParser) -> dict[str, str]:
    """Return what `with_flags` takes: the library's argument names and their flags."""
    own = {action.dest: action.option_strings[0] for action in p._actions if action.option_strings}
    return own | FLAGS


# ------------------------------------------------------------------------------ running


def main() -> int:
    several_processes.start()
    p = parser()
    args, flags = p.parse_args(), flags_of(p)
    stopped = "stopped; finished images are kept"
    set_quiet(args.quiet)
    listed = args.list_models is not None
    if (listed or args.inspect) and not several_processes.is_first():
        return 0
    command = list_models if listed else inspect_file if args.inspect else run
    return exit_code(lambda: command(args), flags, args.output, stopped)


def run(
    args: argparse.Namespace, load_pipe=None, progress_of=Progress, filters_of=load_filters
) -> int:
    """Make the images; return the exit code.

    `load_pipe` and `filters_of`: `load` and `load_filters`, or functions that keep what they load.
    `progress_of(args)` returns what is told of steps and files, as a `Progress` is.
    """
    from flux.lora.peft_config import adapter_file

    several_processes.join(args)
    by_first = several_processes.by_first
    args.lora = [(adapter_file(path), scale) for path, scale in args.lora]
    if args.latents and not (args.prompts or args.prompt or args.prompt_file or args.from_image):
        from modules.saved_latents import decode

        return decode(args, load) if several_processes.is_first() else 0

    # 1. Check and judge the request, before any network loads.
    request = check_request(args)
    progress = progress_of(args)
    size = request.width, request.height
    safety = Safety(args, request.spec.licence, size, request.earlier, filters_of)
    if by_first(lambda: safety.refuses_inputs(request.shown, request.mask, args.negative_prompt)):
        return REFUSED
    refused = by_first(
        lambda: safety.refused_prompts(request.prompts, request.boxes, len(request.shown))
    )
    if len(refused) == len(request.prompts):
        return REFUSED

    # 2. Load the model.
    import torch

    torch.set_flush_denormal(True)  # SiLU's tails are denormal: ten times slower on a CPU
    tokens = request.width * request.height // 256
    sizes = several_processes.choose(args, request.cfg, request.count, tokens)
    pipe = (load_pipe or load)(args)
    several_processes.distribute(pipe, sizes, args.shard_weights, request.width, request.height)
    say(summary(pipe, request))
    safety.loaded(pipe)
    tell_about_run(args, pipe, request)
    progress.prepare(pipe)
    plan_memory(args, pipe, request)

    # 3. Encode the images, then some prompts at a time. No image depends on the others.
    if request.start and by_first(lambda: safety.filters is not None):
        decoded = pipe.decode(request.start.init)
        if by_first(lambda: safety.refuses_inputs(decoded)):
            return REFUSED
    conditions = encode_images(args, pipe, request)
    with BackgroundWriter() as writer, progress:
        for records in records_of_images(args, pipe, request, conditions, safety, refused):
            for batch in batches(records, sizes.data if sizes else 1, pipe):
                generate_files(
                    args, pipe, batch, request.steps, conditions, writer, safety, progress
                )
            writer.finish()
    return REFUSED if safety.refused else 0


@dataclass
class Request:
    """What a run makes, checked against the model."""

    spec: Any  # a ModelSpec
    prompts: Any  # Prompts
    seed: int  # of the first image
    count: int  # of images
    width: int
    height: int
    steps: int
    guidance: float | list[float] | None  # None: the model takes none
    cfg: bool  # whether there is an unconditional branch
    images: Any  # ImageInputs, or None
    start: Any  # Conditions: latents in the place of an image, or None
    strength: float | None  # of an image as the start
    boxes: list[dict]
    earlier: dict  # the record of an image to make again
    files: dict  # what records say of the files of the flags

    @property
    def shown(self) -> Sequence:
        """The input images."""
        return self.images.images if self.images else ()

    @property
    def mask(self):
        return self.images.mask if self.images else None

    @property
    def last_seed(self) -> int:
        return self.seed + self.count - 1


def check_request(args: argparse.Namespace) -> Request:
    """Return the request of the flags, some of which get the values that they stand for.

    UserError for what the model cannot make. Nothing is loaded or downloaded.
    """
    from flux.image_io import output

    earlier = {}
    if args.from_image:
        earlier = output.read_metadata(args.from_image)
        restore_args(args, earlier, parser().get_default)
    args.numerics = args.numerics or "exact"
    if args.numerics not in NUMERICS:
        raise UserError(
            f"numerics: {args.numerics!r:.40} is unknown (expected {', '.join(NUMERICS)})."
        )
    prompts = gather_prompts(args)
    texts = () if args.no_metadata else (p + (args.negative_prompt or "") for p in prompts)
    by_first = several_processes.by_first
    by_first(lambda: output.check_output(args.output, texts))
    seed = args.seed
    if seed is None:
        seed = by_first(lambda: int.from_bytes(os.urandom(4), "little"))

    # what follows imports torch
    from flux.image_io import request
    from flux.runtime import checks
    from flux.transformer import NUMERICS as PRESETS
    from flux.weights.locate import get_spec

    if args.lora:
        from flux.lora.manager import check_files

        check_files(args.lora)
    count = len(prompts) * args.num_images
    checks.check_count(count, seed)
    spec, preset = get_spec(args.model, args.transformer), PRESETS[args.numerics]
    start = None
    if args.latents:
        from modules.saved_latents import conditions as from_latents

        start = from_latents(args, spec)
    images, files = None if start else gather_images(args, spec), describe_files(args)
    if not any(prompts) and spec.image_mode != "redux":
        raise UserError(f"prompt: {spec.name} needs one. Say what the image should show.")
    width, height = request.output_size(spec, images, args.width, args.height)
    if start:
        width, height = start.width, start.height
    checks.check_size(height, width)
    args.steps, args.sigmas, args.shift = checks.check_times(
        spec, args.steps, args.sigmas, args.shift
    )
    steps = checks.check_steps(spec, args.steps)
    args.solver = args.solver or "euler"
    checks.check_solver(spec, args.solver, preset.state)
    strength = None
    if start:
        strength = request.start_strength(start.strength, steps, preset.images)
    elif images and spec.image_mode != "fill" and request.has_init_image(spec, images):
        strength = request.start_strength(images.strength, steps, preset.images)
    for name in ("guidance", "true_cfg_scale"):
        listed = getattr(args, name)
        if isinstance(listed, tuple) and len(listed) != steps:
            raise checks.wrong_count(name, len(listed), steps)
    guidance = checks.check_guidance(spec, args.guidance, steps)
    cfg = checks.check_cfg(spec, args.guidance, args.negative_prompt, args.true_cfg_scale, steps)
    check_upsampling(args, spec)
    return Request(
        spec,
        prompts,
        seed,
        count,
        width,
        height,
        steps,
        guidance,
        cfg,
        images,
        start,
        strength,
        boxes=gather_boxes(args, spec, images, prompts),
        earlier=earlier,
        files=files,
    )


def tell_about_run(args: argparse.Namespace, pipe, request: Request) -> None:
    """Print what is notable about a request."""
    if request.spec.embedded:
        note_unknown_words(request.prompts)
    if differences := other_environment(request.earlier, pipe.device.type):
        changes = "; ".join(differences)
        say(f"note: {args.from_image} was made with {changes}: some pixels may differ by a level")


def plan_memory(args: argparse.Namespace, pipe, request: Request) -> None:
    """Plan the memory of a run, and print the plan of a real model."""
    pixels = request.width * request.height
    plan = pipe.plan_memory(
        request.width, request.height, request.steps, encoded_pixels=pixels if request.images else 0
    )
    if not request.spec.embedded or args.offload or args.max_vram or args.quantize:
        say(f"memory: {plan.message}")
    if len(request.prompts) > pipe.prompts_ahead:
        size = pipe.prompts_ahead * pipe.feature_bytes / 1e9
        say(f"memory: the features of {pipe.prompts_ahead} prompts at a time, {size:.2g} GB")


def encode_images(args: argparse.Namespace, pipe, request: Request):
    """Return the `Conditions` of the input images, or of latents as the start; None without any."""
    from flux.image_io import output

    size = request.width, request.height
    # FLUX 3 crops a size that it chose
    given = (args.width, args.height) if request.spec.flux3 else size
    conditions = request.start or (request.images and pipe.condition(request.images, *given))
    if conditions:  # now the number of tokens is known
        pipe.plan_memory(steps=request.steps, conditions=conditions)
    if args.save_control:
        path = several_processes.by_first(
            lambda: output.save(conditions.control_image, args.save_control, {})
        )
        say(f"control: {path}")
    passes = request.count * run_steps(pipe, request.steps, conditions) * (1 + request.cfg)
    advise_compilation(args, pipe, size[0] * size[1], conditions, passes)
    return conditions


def records_of_images(
    args: argparse.Namespace, pipe, request: Request, conditions, safety: Safety, refused: set[int]
) -> Iterator[Iterable[dict]]:
    """Yield the records of the images to make, for some prompts at a time, which are encoded then.

    Prompts are expanded first, if the flags say so. `refused`: numbers of prompts to leave out.
    """
    from flux.image_io import output

    by_first = several_processes.by_first
    negative = [args.negative_prompt or ""] if request.cfg else []
    remaining = iter(enumerate(request.prompts))
    while some := list(itertools.islice(remaining, pipe.prompts_ahead)):
        some = [(number, prompt) for number, prompt in some if number not in refused]
        typed_prompts = [prompt for _, prompt in some]
        write_out = partial(upsample, args, pipe, typed_prompts)
        expanded = by_first(partial(write_out, request.shown, request.boxes, request.seed))
        refused = refused | by_first(partial(safety.refused_answers, some, expanded))
        recipes = []
        for (number, typed), prompt in zip(some, expanded):
            if number in refused:
                continue
            recipe = describe(
                args,
                pipe,
                prompt,
                request.width,
                request.height,
                request.steps,
                request.guidance,
                request.last_seed,
            )
            recipe |= request.files | safety.metadata
            recipe["upsampled_from"] = typed if args.upsample and typed != prompt else None
            if conditions and conditions.crop:
                recipe["cropped"] = True  # from the size that follows from the reference
            if not args.no_metadata:
                output.check_metadata_fits(args.output, recipe)
            recipes.append((number, recipe))
        if recipes:
            pipe.encode_ahead([recipe["prompt"] for _, recipe in recipes] + negative)
        yield (
            recipe | {"seed": request.seed + number * args.num_images + image}
            for number, recipe in recipes
            for image in range(args.num_images)
        )


def batches(jobs: Iterable[dict], size: int, pipe) -> Iterator[list[dict]]:
    """Group images that follow each other: one for each group of processes, of prompts as long.

    In a batch, seeds count up: a refused prompt leaves a gap, and ends it.
    """

    def kind(numbered: tuple[int, dict]) -> tuple[int, int]:
        number, metadata = numbered
        length = pipe.text.padded_length([metadata["prompt"]]) if size > 1 else 0
        return metadata["seed"] - number, length

    for _, some in itertools.groupby(enumerate(jobs), kind):
        while batch := [metadata for _, metadata in itertools.islice(some, size)]:
            yield batch


def generate_files(
    args: argparse.Namespace,
    pipe,
    batch: Sequence[dict],
    steps: int,
    conditions,
    writer: BackgroundWriter,
    safety: Safety,
    progress: Progress,
) -> None:
    """Generate the images of these records; write them in the background; print their names."""
    images, latents = generate(args, pipe, batch, steps, conditions, writer, progress)
    if several_processes.is_first():
        for metadata, image, own in zip(batch, images, latents):
            write_file(args, metadata, image, own, writer, safety, progress)


def write_file(
    args: argparse.Namespace,
    metadata: dict,
    image,
    latents,
    writer: BackgroundWriter,
    safety: Safety,
    progress: Progress,
) -> None:
    """Write an image and its latents in the background. What a filter refuses is not written."""
    from flux.image_io import output

    seed, prompt = metadata["seed"], metadata["prompt"]

    def write() -> tuple[Path, Path | None] | str:
        if refusal := safety.refusal(image, metadata):
            return refusal
        suffixes = [".safetensors"] if args.save_latents else []
        marked = safety.mark(image, metadata)
        seal, record = safety.seal(metadata), not args.no_metadata
        path = output.save(marked, args.output, metadata, suffixes, record, seal)
        if not args.save_latents:
            return path, None
        return path, save_latents(path, latents[None], None if args.no_metadata else metadata)

    def report(paths: tuple[Path, Path | None] | str) -> None:
        if isinstance(paths, str):
            say(f"seed {seed}: {paths}: {prompt}")
            return
        if paths[1] is not None:
            say(f"latents: {paths[1]}")
        say(f"seed {seed}: {prompt}")
        progress.finished(paths[0])

    writer.start(write, report)


def generate(
    args: argparse.Namespace,
    pipe,
    batch: Sequence[dict],
    steps: int,
    conditions,
    writer: BackgroundWriter,
    progress: Progress,
):
    """Generate images with seeds that count up, behind a progress bar; return them and the latents.

    The image before, which `writer` writes, is reported after the step in which it is finished.
    """
    from tqdm import tqdm

    from flux.runtime import compilation

    seed = batch[0]["seed"]
    total, compiled = run_steps(pipe, steps, conditions), compilation.compile_seconds()
    is_terminal = several_processes.is_first() and sys.stderr and sys.stderr.isatty()
    hidden = args.quiet or not is_terminal
    latents = None
    with tqdm(total=total, desc=f"seed {seed}", unit="step", leave=False, disable=hidden) as bar:

        def after_step(step: int, t: float, x) -> None:
            nonlocal latents
            latents = x
            if writer.is_ready:
                with tqdm.external_write_mode():
                    writer.finish()
            progress.update(step, total)
            bar.update()

        images = pipe(
            [metadata["prompt"] for metadata in batch],
            None if conditions else args.width,
            None if conditions else args.height,
            steps,
            args.guidance,
            seed,
            negative_prompt=args.negative_prompt,
            true_cfg_scale=args.true_cfg_scale,
            callback=after_step,
            images=conditions,
            solver=args.solver,
            sigmas=args.sigmas,
            shift=args.shift,
        )
    if (seconds := compilation.compile_seconds() - compiled) > 0:
        say(f"compile: took {seconds:.0f} s")
    return images, latents


def run_steps(pipe, steps: int, conditions) -> int:
    """Return the number of steps that are run: with an image as the start, not all of them."""
    from flux.image_io import request
    from flux.sampling import skipped_steps

    if not conditions or conditions.init is None:
        return steps
    rounding = pipe.numerics.images
    return steps - skipped_steps(
        steps, request.start_strength(conditions.strength, steps, rounding), rounding
    )


def advise_compilation(args, pipe, pixels: int, conditions, passes: int) -> None:
    """Say what --compile does, or that it would pay for so many passes of the transformer."""
    from flux.runtime import compilation
    from flux.runtime.devices import can_compile

    if args.compile:
        folder = compilation.keep_compiled() or "torch's own folder"
        say(
            "compile: each kind of block as it first runs, which takes about a minute; "
            f"kept for later runs in {folder}"
        )
    elif pipe.device.type == "cuda" and can_compile(pipe.device) and not pipe.spec.flux3:
        references = conditions.references if conditions else None
        tokens = pixels // 256 + pipe.text_tokens
        tokens += 0 if references is None else references.shape[1]
        saved = passes * compilation.saved_seconds(
            pipe.spec.transformer, tokens, compilation.measure_bandwidth(pipe.device)
        )
        if saved > compilation.SECONDS:
            say(
                f"note: --compile would save at least {saved:.0f} s of this run, and takes about "
                f"{compilation.SECONDS} s"
            )


def load(args: argparse.Namespace, fast: bool = True):
    """Load the pipeline that the flags name, with its LoRAs."""
    import torch

    import flux

    names = "weights device transformer autoencoder text_encoder text_encoder_2 tokenizer"
    names += " check_finite offload max_vram quantize fp8_matmul compile vae_tile"
    options = {name: getattr(args, name) for name in names.split()}
    for name in ("dtype", "decode_dtype"):
        options[name] = getattr(torch, getattr(args, name)) if getattr(args, name) else None
    pipe = flux.load(args.model, numerics=args.numerics or "exact", fast=fast, **options)
    for path, scale in args.lora:
        pipe.load_lora(path, scale, strict=not args.lora_ignore_unmatched)
    return pipe


# ------------------------------------------------------------------------------ input


class Prompts:
    """Prompts of the command line, then those of a file, whose lines are decoded one by one.

    A file of a million lines takes the memory of its bytes.
    """

    def __init__(self, typed: Sequence[str], lines: bytes = b""):
        self.typed, self.lines = typed, lines
        self.count = sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        yield from self.typed
        for line in re.finditer(rb"[^\r\n]+", self.lines):
            if prompt := line[0].decode().strip():
                yield prompt

    def __len__(self) -> int:
        return self.count


def gather_prompts(args: argparse.Namespace) -> Prompts:
    """Return the prompts of the command line and of the file, in this order."""
    typed = args.prompts + args.prompt
    for prompt in (*typed, args.negative_prompt or ""):
        if "\0" in prompt or prompt != prompt.encode("utf-8", "ignore").decode("utf-8"):
            raise UserError(f"prompt: {prompt!r:.120} has bytes that are not UTF-8 text.")
    if any(not prompt.strip() for prompt in typed):
        raise UserError("prompt: is empty. Say what the image should show.")
    if args.prompt_file:
        return Prompts(typed, read_prompts(args.prompt_file))
    if not typed and args.image:  # FLUX.1 Redux needs none
        return Prompts([""])
    if not typed:
        raise UserError(
            "prompt: is missing. Give one in quotes, or --prompt-file FILE, or --from-image FILE."
        )
    return Prompts(typed)


def read_prompts(path: Path) -> bytes:
    """Return the checked lines of a UTF-8 file, or of standard input for "-"."""
    try:
        lines = read_stdin() if str(path) == "-" else read_start(path)
    except OSError as error:
        raise UserError(f"prompt_file: {path} cannot be read ({error.strerror}).") from None
    if len(lines) > MAX_PROMPT_FILE:
        raise UserError(
            f"prompt_file: {path} has more than {MAX_PROMPT_FILE:,} bytes. Split the file."
        )
    lines = lines.removeprefix(codecs.BOM_UTF8)
    try:
        count = Prompts([], lines).count
        if b"\0" in lines:  # UTF-16 without its mark reads as UTF-8 with zeros
            raise ValueError
    except ValueError:
        raise UserError(
            f"prompt_file: {path} is not UTF-8 text. Save it as UTF-8, one prompt a line."
        ) from None
    if not count:
        raise UserError(f"prompt_file: {path} has no prompt. Write one a line.")
    return lines


def read_stdin() -> bytes:
    if sys.stdin is None:
        raise UserError("prompt_file: - needs a standard input. Name a file.")
    return sys.stdin.buffer.read(MAX_PROMPT_FILE + 1)


def read_start(path: Path) -> bytes:
    """Return all bytes of a file that is not too large. A device may have no end."""
    opened = path.absolute().parts[:2] in (("/", "dev"), ("/", "proc"))  # such as /dev/fd/63
    if path.is_fifo() and not opened:
        raise UserError(f"prompt_file: {path} is a pipe, which may never end. Pass it as -.")
    with path.open("rb") as file:
        return file.read(MAX_PROMPT_FILE + 1)


def gather_images(args: argparse.Namespace, spec):
    """Return the checked `ImageInputs` of the flags, or None without any."""
    from flux.image_io import input as inputs
    from flux.image_io import output, request

    if args.save_control:
        if spec.image_mode != "control":
            raise UserError(f"save_control: {spec.name} takes no control image. Leave it out.")
        output.check_output(args.save_control, name="save_control")
    mask = inputs.read_mask(args.mask) if args.mask else None
    options = {name: getattr(args, name) for name in IMAGE_OPTIONS}
    images = request.ImageInputs(tuple(map(inputs.read_image, args.image)), mask, **options)
    if images == request.ImageInputs(()):
        images = None
    request.check_images(spec, images)
    return images


def gather_boxes(args: argparse.Namespace, spec, images, prompts: Iterable[str]) -> list[dict]:
    """Return the checked boxes of the flags and of the file."""
    if not (args.box or args.boxes):
        return []
    from flux.boxes import box_rows, parse_box, read_boxes, refuse_rows

    if not spec.flux3:
        raise UserError(f"boxes: only FLUX 3 reads boxes (got {spec.name}). Leave them out.")
    if args.from_image:
        raise UserError("boxes: cannot be added to the prompt of `from_image`. Leave one out.")
    boxes = [parse_box(text) for text in args.box]
    boxes += read_boxes(args.boxes) if args.boxes else []
    box_rows(boxes, len(images.images) if images else 0)
    for prompt in prompts:
        refuse_rows(prompt)
    return boxes


# ------------------------------------------------------------------------------ output


def summary(pipe, request: Request) -> str:
    """Return one line: model, size, steps, strength, guidance, device, dtype."""
    from flux.runtime.checks import format_values

    name = f"{pipe.spec.name}, an embedded toy" if pipe.spec.embedded else pipe.spec.name
    text = f"{name}: {request.width}x{request.height}, {request.steps} steps"
    if request.strength is not None:
        text += f" at strength {request.strength:g}"
    if request.guidance is not None:
        text += f", guidance {format_values(request.guidance)}"
    return f"{text}, on {pipe.device} in {short(pipe.dtype)}"


def note_unknown_words(prompts: Iterable[str]) -> None:
    """Say which words of the first prompts the toy does not know, and which it knows."""
    from flux import toy

    first = itertools.islice(prompts, 1000)
    unknown = dict.fromkeys(word for prompt in first for word in toy.unknown_words(prompt))
    if unknown:
        words = ", ".join(map(repr, itertools.islice(unknown, 50)))
        known = "; ".join(map(", ".join, (toy.SHAPES, toy.COLOURS, toy.PATTERNS, toy.SIZES)))
        say(
            f"note: the toy does not know {words}. It knows {known}; places such as 'at the top "
            "left'; above, below, to the left of, to the right of; '... background'; and 'the word "
            '"ABCD" in red\'. --model names a real model.'
        )


def save_latents(image: Path, latents, metadata: dict | None) -> Path:
    """Write the latents next to the image, and return their path."""
    from safetensors.torch import save

    from flux.image_io.output import to_json, write_exclusive

    record = None if metadata is None else {"flux": to_json(metadata)}
    data = save({"latents": latents.cpu().contiguous()}, record)
    return write_exclusive(image.with_suffix(".safetensors"), lambda file: file.write(data))


def list_models(args: argparse.Namespace) -> int:
    """Print the table of models, or all about some."""
    from modules import model_table

    return model_table.list_models(args)


def inspect_file(args: argparse.Namespace) -> int:
    """Print what a file is. 2: it is not understood."""
    from flux.weights.inspection import inspect

    flags = flags_of(parser())
    found = inspect(args.inspect)
    show(*(f"{about}: {with_flags(text, flags)}" for about, text in found.lines))
    if found.refusal:
        raise UserError(found.refusal)
    return 0


if __name__ == "__main__":
    code = main()
    several_processes.leave()
    sys.exit(code)
