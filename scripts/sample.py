"""Text and pictures to picture with any FLUX model, or with one of the toys that are part of the package.

python scripts/sample.py "a small yellow star above a large blue ring on a white background"
python scripts/sample.py "a cat holding a sign that says hello world" --model flux.2-klein-4b
python scripts/sample.py "the cat of the first picture in the armchair of the second" --model flux.2-klein-4b \\
    --image cat.jpg --image chair.jpg
python scripts/sample.py "a red door" --model flux.1-fill-dev --image house.jpg --mask door.png
"""

import argparse
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from command_line import with_flags

from flux.errors import NonFiniteError, UserError
from flux.image_io.metadata import DTYPES, OPTIONS, describe, describe_files, recall, short

FLAGS = {
    "images": "--image",
    "mask": "--mask",
    "strength": "--strength",
    "outpaint": "--expand",
    "mask_threshold": "--mask-threshold",
    "composite=False": "--no-composite",
    "image_weights": "--image-weight",
    "match_image_size": "--match-image-size",
    "keep_input_size": "--keep-input-size",
    "reference_limit": "--reference-limit",
    "kv_cache=False": "--no-kv-cache",
    "kv_cache=True": "--kv-cache",
    "kv_cache": "--kv-cache",
    "preprocess_control": "--photo",
}
NUMERICS = ("exact", "bfl", "diffusers")
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")
DESCRIPTION, EPILOG = __doc__.split("\n", 1)[0], "examples:" + __doc__.split("\n", 1)[1]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = p.add_argument_group("what to make")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="one or more prompts")
    what.add_argument(
        "--prompt", action="append", default=[], help="the same, as a flag (repeatable)"
    )
    what.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="one prompt a line; - for standard input"
    )
    what.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="what to keep away from (with classifier-free guidance)",
    )
    what.add_argument(
        "--seed",
        type=int,
        help="of the first picture; the next ones count up (default: at random, and printed)",
    )
    what.add_argument(
        "--num-images",
        type=int,
        default=1,
        metavar="N",
        help="pictures of each prompt (default: 1)",
    )
    what.add_argument(
        "--width", type=int, help="in pixels, a multiple of 16 (default: the model's)"
    )
    what.add_argument(
        "--height", type=int, help="in pixels, a multiple of 16 (default: the model's)"
    )
    what.add_argument(
        "--remake",
        type=Path,
        metavar="PICTURE",
        help="make a picture again from the parameters that it carries",
    )
    what.add_argument(
        "--upsample",
        metavar="local|URL",
        help="have the prompt written out: by the text encoder of "
        "flux.2-dev (with --model flux.2-dev), or by a server that speaks OpenAI's protocol",
    )
    what.add_argument("--upsample-model", metavar="NAME", help="of the server's models")
    given = p.add_argument_group("pictures as input (README: which model does what with them)")
    given.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="repeatable, where a model takes several",
    )
    given.add_argument(
        "--mask", type=Path, metavar="FILE", help="white is what may change: filling in, inpainting"
    )
    given.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="image to image: the share of the steps that is run, to 1, "
        "which keeps nothing of the picture (default: 0.8)",
    )
    given.add_argument(
        "--expand", type=margins, metavar="L,T,R,B", help="fill: pixels of new canvas at each side"
    )
    given.add_argument(
        "--mask-threshold",
        type=float,
        metavar="X",
        help="fill: harden a soft mask, white from X on",
    )
    given.add_argument(
        "--no-composite",
        dest="composite",
        action="store_false",
        help="do not put the input's own pixels back where the mask is black",
    )
    given.add_argument(
        "--photo",
        action="store_true",
        help="canny, depth: --image is a photo, find the edges or the depth in it",
    )
    given.add_argument(
        "--save-control",
        type=Path,
        metavar="FILE",
        help="canny, depth: where to save the control picture",
    )
    given.add_argument(
        "--image-weight",
        type=float,
        action="append",
        metavar="W",
        help="redux: of each --image (default: they share 1)",
    )
    given.add_argument(
        "--match-image-size",
        type=int,
        metavar="K",
        help="make a picture of the size of the K-th --image",
    )
    given.add_argument(
        "--keep-input-size",
        action="store_true",
        help="kontext: do not resize to a preferred resolution",
    )
    given.add_argument(
        "--reference-limit",
        type=int,
        metavar="SIDE",
        help="FLUX.2: references have at most SIDE x SIDE pixels "
        "(default: 2024 for one, 1024 for several)",
    )
    given.add_argument(
        "--kv-cache",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="FLUX.2: compute references once; exact for klein-9b-kv, an approximation for others",
    )
    how = p.add_argument_group("how")
    how.add_argument(
        "--model", metavar="NAME", help="see --list-models (default: flux.2-tiny, an embedded toy)"
    )
    how.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    how.add_argument(
        "--guidance",
        type=values,
        metavar="G",
        help="a number, START:END, or one a step with commas (default: "
        "the model's; distilled models take none)",
    )
    how.add_argument(
        "--cfg-scale",
        type=values,
        metavar="S",
        help="classifier-free guidance for models that have none (1: off)",
    )
    how.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    how.add_argument("--dtype", choices=DTYPES, help="default: bfloat16; float32 for the toy")
    how.add_argument("--numerics", choices=NUMERICS, help="whose rounding (default: exact)")
    means = p.add_argument_group(
        "memory and speed (README: what is lossless, and what the rest costs)"
    )
    means.add_argument(
        "--offload",
        choices=("none", "stages", "stream"),
        help="weights on the device: all; those of one stage "
        "at a time; blocks one after another (default: the first that fits)",
    )
    means.add_argument(
        "--vram", type=float, metavar="GB", help="use no more of the device's memory"
    )
    means.add_argument(
        "--quantize",
        metavar="KIND",
        help="fp8, int8 or int4: round the large matrices when they are loaded",
    )
    means.add_argument(
        "--native-fp8",
        action="store_true",
        help="multiply float8 matrices in float8, where the GPU can",
    )
    means.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks: takes a minute, then saves time on a GPU",
    )
    means.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="decode in tiles of this side, if a picture is too large",
    )
    files = p.add_argument_group("files")
    files.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="where the models' files are; without it, in $FLUX_WEIGHTS, "
        "in the Hugging Face cache, or downloaded",
    )
    files.add_argument(
        "--transformer",
        type=Path,
        metavar="FILE",
        help="another one in BFL's layout: a fine-tune, for example",
    )
    files.add_argument(
        "--autoencoder",
        type=Path,
        metavar="FILE",
        help="another one: the FLUX.2 small decoder, for example",
    )
    files.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="repeatable; any common format, merged in their order",
    )
    files.add_argument(
        "--lora-partial",
        action="store_true",
        help="leave out what has no place in the model, where it is an error",
    )
    files.add_argument(
        "--check-weights",
        action="store_true",
        help="look for NaN and infinity in every tensor first",
    )
    files.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/flux.png"),
        metavar="FILE",
        help="PNG, JPEG or WebP by its "
        "suffix; never overwrites, but counts up (default: outputs/flux.png)",
    )
    files.add_argument(
        "--save-latents",
        action="store_true",
        help="also write the latents, as .safetensors beside the picture",
    )
    files.add_argument(
        "--list-models", action="store_true", help="show the table of models, and which are here"
    )
    return p


def values(text: str) -> float | list[float] | tuple[float, ...]:
    """4, or 4:1 for a straight line over the steps, or, as a tuple, 4,3,2,1 for a value at each."""
    try:
        numbers = [float(part) for part in text.replace(":", ",").split(",")]
        if ":" in text and len(numbers) != 2:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number, nor START:END, nor numbers with commas"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers if ":" in text else tuple(numbers)


def lora(text: str) -> tuple[Path, float]:
    path, colon, scale = text.rpartition(":")
    try:
        return (Path(path), float(scale)) if colon else (Path(text), 1.0)
    except ValueError:  # a colon in the name
        return Path(text), 1.0


def margins(text: str) -> tuple[int, ...]:
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM in pixels"
        ) from None
    return left, top, right, bottom


def main() -> int:
    args = parser().parse_args()
    show_warnings_once()
    if sys.stdout is not None:  # a name may have bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return list_models(args.weights) if args.list_models else run(args)
    except UserError as error:
        return fail(str(error), 2)
    except NonFiniteError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        return fail(
            f"the package {error.name!r} is missing: run `pip install -e .` in the repository"
        )
    except BrokenPipeError:  # `--list-models | head` has seen enough
        close_stdout()
        return 1
    except OSError as error:  # the disk is full, for example
        return fail(f"{error.filename or args.output}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail("stopped; the pictures that were finished are kept", 130)
    except MemoryError:
        return fail(
            "out of memory: make the picture smaller, or choose a smaller model (weights.md has what each needs)"
        )
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return fail(
            "out of memory: make the picture smaller, or choose a smaller model (weights.md has what each needs)"
        )


def show_warnings_once() -> None:
    """As notes: some are raised while the request is checked, and again in the work."""
    noted: set[str] = set()

    def note(message, *_, **__) -> None:
        if str(message) not in noted:
            noted.add(str(message))
            say(f"note: {with_flags(str(message), FLAGS)}")

    warnings.showwarning = note


def run(args: argparse.Namespace) -> int:
    # 1. everything that can be wrong with the request, before anything heavy is imported
    from flux.image_io import output as images

    if args.remake:
        recall(args, images.read_metadata(args.remake), parser().get_default)
    args.numerics = args.numerics or "exact"
    prompts = gather_prompts(args)
    images.check_output(args.output, [p + (args.negative_prompt or "") for p in prompts])
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed

    import torch
    from tqdm import tqdm

    from flux import sampling
    from flux.image_io import request
    from flux.runtime import checks as options
    from flux.weights import locate as models

    if args.lora:
        check_loras(args)
    options.check_count(len(prompts) * args.num_images, seed)
    spec = models.get_spec(args.model, args.transformer)
    pictures, files = gather_pictures(args, spec), describe_files(args)
    if prompts == [""] and spec.image_mode != "redux":
        raise UserError(
            f"there is no prompt, and {spec.name} needs one: say what the picture should show"
        )
    width, height = request.output_size(spec, pictures, args.width, args.height)
    options.check_size(height, width)
    steps = options.check_steps(spec, args.steps)
    for flag, asked in (("--guidance", args.guidance), ("--cfg-scale", args.cfg_scale)):
        if isinstance(asked, tuple) and len(asked) != steps:
            raise options.wrong_count(flag[2:].replace("-", "_"), len(asked), steps)
    guidance = options.check_guidance(spec, args.guidance, steps)
    if args.upsample == "local" and (spec.name != "flux.2-dev"):
        raise UserError(
            f"--upsample local works with flux.2-dev alone, whose text encoder can write, not with {spec.name}: give a URL"
        )
    if (args.upsample not in (None, "local")) != (args.upsample_model is not None):
        raise UserError("--upsample URL and --upsample-model NAME go together")
    cfg = options.check_cfg(spec, args.guidance, args.negative_prompt, args.cfg_scale, steps)

    # 2. the model
    torch.set_flush_denormal(
        True
    )  # SiLU's tails are denormal numbers, on which a CPU is ten times slower
    pipe = load(args)
    toy = ", an embedded toy" if spec.embedded else ""
    guided = "" if guidance is None else f", guidance {options.format_values(guidance)}"
    run = f"{steps} steps" + (
        f" at strength {pictures.strength:g}" if pictures and pictures.strength else ""
    )
    say(
        f"{spec.name}{toy}: {width}x{height}, {run}{guided}, on {pipe.device} in {short(pipe.dtype)}"
    )
    if spec.embedded:
        note_unknown_words(prompts)
    how = pipe.prepare(width, height, steps, pictured=width * height if pictures else 0)
    if not spec.embedded or any((args.offload, args.vram, args.quantize)):
        say(f"memory: {how.message}")

    # 3. the prompts written out, if that is asked for
    plain, prompts = prompts, [upsample(args, pipe, prompt, pictures, seed) for prompt in prompts]

    shown = [pair for pair in zip(prompts, plain) for _ in range(args.num_images)]
    recipes = [
        describe(args, pipe, prompt, width, height, steps, guidance, seed + number)
        | files
        | {"upsampled_from": short_prompt if args.upsample else None}
        for number, (prompt, short_prompt) in enumerate(shown)
    ]
    for metadata in recipes:
        images.check_metadata_fits(args.output, metadata)

    # 4. prompts to features, then picture by picture, so that each is the same whatever is made beside it
    conditions = pictures and pipe.condition(pictures, width, height)
    if conditions:
        pipe.prepare(steps=steps, conditions=conditions)  # now it is known how many tokens they are
    if args.save_control:
        say(f"control: {images.save(conditions.control, args.save_control, {})}")
    pipe.encode(prompts + [args.negative_prompt or ""] * cfg)
    total = (
        len(sampling.truncate_by_strength(range(steps + 1), conditions.strength)) - 1
        if conditions
        else steps
    )
    for metadata in recipes:
        prompt, name, kept = metadata["prompt"], f"seed {metadata['seed']}", []
        with tqdm(
            total=total,
            desc=name,
            unit="step",
            leave=False,
            disable=not (sys.stderr and sys.stderr.isatty()),
        ) as bar:

            def see(step: int, t: float, latents: torch.Tensor, bar=bar, kept=kept) -> None:
                bar.update()
                kept[:] = [latents]

            asked = dict(
                negative_prompt=args.negative_prompt,
                cfg_scale=args.cfg_scale,
                callback=see,
                pictures=conditions,
            )
            size = (None, None) if conditions else (width, height)
            (image,) = pipe(prompt, *size, steps, args.guidance, metadata["seed"], **asked)
        path = images.save(
            image, args.output, metadata, beside=[".safetensors"] * args.save_latents
        )
        if args.save_latents:
            save_latents(path, kept[0], metadata)
        say(f"{name}: {prompt}")
        tell(path)
    return 0


def load(args: argparse.Namespace):
    """The pipeline that the flags ask for, with its LoRAs."""
    import torch

    from flux import pipeline

    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipe = pipeline.load(
        args.model,
        args.weights,
        args.device,
        dtype,
        args.numerics or "exact",
        args.transformer,
        args.autoencoder,
        args.check_weights,
        {"stages": "model", "stream": "block"}.get(args.offload, args.offload),
        args.vram,
        args.quantize,
        args.native_fp8,
        args.compile,
        args.tile,
    )
    for path, scale in args.lora:
        pipe.load_lora(path, scale, args.lora_partial)
    return pipe


def upsample(args: argparse.Namespace, pipe, prompt: str, pictures, seed: int) -> str:
    """The prompt, written out by a language model if --upsample says by which."""
    if not args.upsample:
        return prompt
    import prompt_upsampling as upsampling

    from flux.weights import locate as models

    shown = pictures.images if pictures else ()
    if args.upsample == "local":
        models.locate_one(pipe.spec, "text_encoder/config.json", args.weights)
        written = upsampling.upsample_locally(
            prompt, pipe.files["tokenizer"].parent, shown, seed, pipe.device
        )
    else:
        written = upsampling.upsample_remotely(
            prompt, args.upsample, args.upsample_model, pictures=shown
        )
    say(f"prompt: {written}")
    return written


def gather_prompts(args: argparse.Namespace) -> list[str]:
    """From the command line and the file, in this order."""
    prompts = args.prompts + args.prompt
    if args.prompt_file:
        try:
            raw = from_stdin() if str(args.prompt_file) == "-" else args.prompt_file.read_bytes()
            lines = [line.strip() for line in re.split(r"\r\n|\r|\n", raw.decode("utf-8-sig"))]
            if b"\0" in raw:  # UTF-16 without its mark reads as UTF-8 with zeros
                raise ValueError
        except OSError as error:
            raise UserError(
                f"--prompt-file {args.prompt_file}: cannot be read ({error.strerror})"
            ) from None
        except ValueError:
            raise UserError(
                f"--prompt-file {args.prompt_file}: is not UTF-8 text; save it as UTF-8, one prompt a line"
            ) from None
        if not any(lines):
            raise UserError(f"--prompt-file {args.prompt_file}: holds no prompt; write one a line")
        prompts += filter(None, lines)
    if not prompts and args.image:  # FLUX.1 Redux needs none
        return [""]
    if not prompts:
        raise UserError(
            "there is no prompt: give one in quotes, or --prompt-file FILE, or --remake PICTURE"
        )
    if any(not p.strip() for p in prompts):
        raise UserError("a prompt is empty: say what the picture should show")
    for text in (*prompts, args.negative_prompt or ""):
        if "\0" in text or text != text.encode("utf-8", "ignore").decode("utf-8"):
            raise UserError(
                f"the prompt {text!r:.120} holds bytes that are no UTF-8 text: type it anew"
            )
    return prompts


def from_stdin() -> bytes:
    if sys.stdin is None:
        raise UserError("--prompt-file -: there is no standard input; name a file")
    return sys.stdin.buffer.read()


def gather_pictures(args: argparse.Namespace, spec):
    """Return the checked image inputs of the flags, or None without any."""
    from flux.image_io import input as inputs
    from flux.image_io import output as images
    from flux.image_io import request

    if args.save_control and spec.image_mode != "control":
        raise UserError(
            f"--save-control: {spec.name} takes no control image. Leave --save-control out."
        )
    if args.save_control:
        images.check_output(args.save_control, flag="--save-control")
    options = {option: getattr(args, flag) for option, flag in OPTIONS.items()}
    mask = inputs.read_mask(args.mask) if args.mask else None
    given = request.ImageInputs(tuple(map(inputs.read_image, args.image)), mask, **options)
    if given == request.ImageInputs(()):
        given = None
    try:
        request.check_images(spec, given)
    except UserError as error:
        raise UserError(with_flags(str(error), FLAGS)) from None
    return given


def check_loras(args: argparse.Namespace) -> None:
    """Refuse what is no LoRA before a model is looked for, which may take a download."""
    from flux.lora.formats import read

    for number, (path, scale) in enumerate(args.lora):
        read(path)
        if not math.isfinite(scale):
            raise UserError(f"--lora {path}:{scale}: the scale must be a finite number")
        if path in [other for other, _ in args.lora[:number]]:
            raise UserError(
                f"--lora {path} is given twice: give it once, with the sum of the scales"
            )


def note_unknown_words(prompts: list[str]) -> None:
    from flux import toy as shapes

    if unknown := [word for prompt in prompts for word in shapes.unknown_words(prompt)]:
        words = ", ".join(repr(word) for word in dict.fromkeys(unknown))
        say(
            f"note: the toy does not know {words}. It knows the shapes {', '.join(shapes.SHAPES)}; the colours "
            f"{', '.join(shapes.COLOURS)}; {', '.join(shapes.PATTERNS)}; {', '.join(shapes.SIZES)}; places such as 'at the top "
            "left'; above, below, to the left of, to the right of; '... background'; and 'the word \"ABCD\" in red'. --model "
            "names a real model."
        )


def save_latents(picture: Path, latents, metadata: dict) -> None:
    from safetensors.torch import save

    from flux.image_io.output import write_exclusive

    data = save({"latents": latents.cpu().contiguous()}, {"flux": json.dumps(metadata)})
    say(
        f"latents: {write_exclusive(picture.with_suffix('.safetensors'), lambda file: file.write(data))}"
    )


def list_models(weights: Path | None) -> int:
    from flux.configs import MODELS
    from flux.weights.files import weights_folder
    from flux.weights.locate import count_parameters, is_available_locally

    weights_folder(weights)
    print(f"{'name':28}{'parameters':>12}  {'steps':>5}  {'here':5} licence")
    for spec in MODELS.values():
        here = "yes" if is_available_locally(spec, weights) else "no"
        print(
            f"{spec.name:28}{count_parameters(spec) / 1e9:>10.3g} B  {spec.steps:>5}  {here:5} {spec.licence.name}"
        )
    return 0


def tell(path: Path) -> None:
    """On standard output, unless nobody reads it any more: the pictures are made all the same."""
    try:
        print(path, flush=True)
    except BrokenPipeError:
        close_stdout()


def close_stdout() -> None:
    """Where it leads nowhere any more: Python's own last flush would fail, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """On standard error, if there is one; without what would steer a terminal, since files from elsewhere have a part in it."""
    if sys.stderr is not None:
        print(CONTROL.sub("", text), file=sys.stderr, flush=True)


def fail(text: str, code: int = 1) -> int:
    say(f"error: {text}")
    return code


if __name__ == "__main__":
    sys.exit(main())
