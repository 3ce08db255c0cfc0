"""Text to picture with any FLUX model, or with the toy model that is part of the package.

python scripts/sample.py "a small yellow star above a large blue ring on a white background"
python scripts/sample.py "a cat holding a sign that says hello world" --model flux.2-klein-4b
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DTYPES, NUMERICS = ("bfloat16", "float32"), ("exact", "bfl", "diffusers")
DESCRIPTION, EPILOG = __doc__.split("\n", 1)[0], "examples:" + __doc__.split("\n", 1)[1]
REMADE = dict(  # what a picture's parameters must hold, and of what type, to make it again
    prompt=str, negative_prompt=str | None, width=int, height=int, steps=int, guidance=float | int | None,
    cfg_scale=float | int | None, seed=int, numerics=str, model=str, dtype=str, transformer=str | None, autoencoder=str | None,
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = p.add_argument_group("what to make")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="one or more prompts")
    what.add_argument("--prompt", action="append", default=[], help="the same, as a flag (repeatable)")
    what.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line; - for standard input")
    what.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from (with classifier-free guidance)")
    what.add_argument("--seed", type=int, help="of the first picture; the next ones count up (default: at random, and printed)")
    what.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    what.add_argument("--width", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    what.add_argument("--height", type=int, help="in pixels, a multiple of 16 (default: the model's)")
    what.add_argument("--remake", type=Path, metavar="PICTURE", help="make a picture again from the parameters that it carries")
    how = p.add_argument_group("how")
    how.add_argument("--model", metavar="NAME", help="see --list-models (default: the embedded toy, flux.2-tiny)")
    how.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    how.add_argument("--guidance", type=float, metavar="G", help="default: the model's; distilled models take none")
    how.add_argument("--cfg-scale", type=float, metavar="S", help="classifier-free guidance for models that have none (1: off)")
    how.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    how.add_argument("--dtype", choices=DTYPES, help="default: bfloat16; float32 for the toy")
    how.add_argument("--numerics", choices=NUMERICS, default="exact", help="whose rounding (default: exact)")
    files = p.add_argument_group("files")
    files.add_argument("--weights", type=Path, metavar="DIR", help="where the models' files are; without it, in $FLUX_WEIGHTS, "
                       "in the Hugging Face cache, or downloaded")  # fmt: skip
    files.add_argument("--transformer", type=Path, metavar="FILE", help="another one in BFL's layout: a fine-tune, for example")
    files.add_argument("--autoencoder", type=Path, metavar="FILE", help="another one: the FLUX.2 small decoder, for example")
    files.add_argument("--check-weights", action="store_true", help="look for NaN and infinity in every tensor first")
    files.add_argument("--output", type=Path, default=Path("outputs/flux.png"), metavar="FILE", help="PNG, JPEG or WebP by its "
                       "suffix; never overwrites, but counts up (default: outputs/flux.png)")  # fmt: skip
    files.add_argument("--save-latents", action="store_true", help="also write the latents, as .safetensors beside the picture")
    files.add_argument("--list-models", action="store_true", help="show the table of models, and which are here")
    return p


def main() -> int:
    args = parser().parse_args()
    noted: set[str] = set()  # some are raised while the request is checked, and again in the work

    def note(message, *_, **__) -> None:
        if str(message) not in noted:
            noted.add(str(message))
            say(f"note: {message}")

    warnings.showwarning = note
    from flux.errors import NonFiniteError, UserError

    try:
        return list_models(args.weights) if args.list_models else run(args)
    except UserError as error:
        return fail(str(error), 2)
    except NonFiniteError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        return fail(f"the package {error.name!r} is missing: run `pip install -e .` in the repository")
    except OSError as error:  # the disk is full, for example
        return fail(f"{error.filename or args.output}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail("stopped; the pictures that were finished are kept", 130)
    except MemoryError:
        return fail("out of memory: make the picture smaller, or choose a smaller model (weights.md has what each needs)")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return fail("out of memory: make the picture smaller, or choose a smaller model (weights.md has what each needs)")


def run(args: argparse.Namespace) -> int:
    # 1. everything that can be wrong with the request, before anything heavy is imported
    from flux import images

    if args.remake:
        recall(args, images.read_metadata(args.remake))
    prompts = gather_prompts(args)
    images.check_output(args.output, [p + (args.negative_prompt or "") for p in prompts])
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed

    import torch
    from tqdm import tqdm

    from flux import pipeline

    pipeline.check_count(len(prompts) * args.num_images, seed)
    spec = pipeline.find_spec(args.model, args.transformer)
    width, height = (spec.size if n is None else n for n in (args.width, args.height))
    pipeline.check_size(height, width)
    steps, guidance = pipeline.check_steps(spec, args.steps), pipeline.check_guidance(spec, args.guidance)
    cfg = pipeline.check_cfg(spec, args.guidance, args.negative_prompt, args.cfg_scale)

    # 2. the model
    torch.set_flush_denormal(True)  # SiLU's tails are denormal numbers, on which a CPU is ten times slower
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipe = pipeline.load(
        args.model, args.weights, args.device, dtype, args.numerics, args.transformer, args.autoencoder, args.check_weights
    )
    toy = ", the embedded toy" if spec.embedded else ""
    guided = "" if guidance is None else f", guidance {guidance:g}"
    say(f"{spec.name}{toy}: {width}x{height}, {steps} steps{guided}, on {pipe.device} in {short(pipe.dtype)}")
    if spec.embedded:
        note_unknown_words(prompts)

    # 3. prompts to features, then picture by picture, so that each is the same whatever is made beside it
    pipe.encode(prompts + [args.negative_prompt or ""] * cfg)
    for number, prompt in enumerate(p for p in prompts for _ in range(args.num_images)):
        kept: list[torch.Tensor] = []
        with tqdm(total=steps, desc=f"seed {seed + number}", unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:

            def see(step: int, t: float, latents: torch.Tensor, bar=bar, kept=kept) -> None:
                bar.update()
                kept[:] = [latents]

            asked = dict(negative_prompt=args.negative_prompt, cfg_scale=args.cfg_scale, callback=see)
            (image,) = pipe(prompt, width, height, steps, args.guidance, seed + number, **asked)
        metadata = describe(args, pipe, prompt, width, height, steps, guidance, seed + number)
        path = images.save(image, args.output, metadata)
        if args.save_latents:
            save_latents(path, kept[0], metadata)
        say(f"seed {seed + number}: {prompt}")
        print(path, flush=True)
    return 0


def gather_prompts(args: argparse.Namespace) -> list[str]:
    """From the command line and the file, in this order."""
    from flux.errors import UserError

    prompts = args.prompts + args.prompt
    if args.prompt_file:
        try:
            raw = sys.stdin.buffer.read() if str(args.prompt_file) == "-" else args.prompt_file.read_bytes()
            lines = [line.strip() for line in raw.decode("utf-8-sig").splitlines()]
            if b"\0" in raw:  # UTF-16 without its mark reads as UTF-8 with zeros
                raise ValueError
        except OSError as error:
            raise UserError(f"--prompt-file {args.prompt_file}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise UserError(
                f"--prompt-file {args.prompt_file}: is not UTF-8 text; save it as UTF-8, one prompt a line"
            ) from None
        if not any(lines):
            raise UserError(f"--prompt-file {args.prompt_file}: holds no prompt; write one a line")
        prompts += filter(None, lines)
    if not prompts:
        raise UserError("there is no prompt: give one in quotes, or --prompt-file FILE, or --remake PICTURE")
    if any(not p.strip() for p in prompts):
        raise UserError("a prompt is empty: say what the picture should show")
    for text in (*prompts, args.negative_prompt or ""):
        if "\0" in text or text != text.encode("utf-8", "ignore").decode("utf-8"):
            raise UserError(f"the prompt {text!r:.120} holds bytes that are no UTF-8 text: type it anew")
    return prompts


def recall(args: argparse.Namespace, metadata: dict) -> None:
    """Take from a picture what made it; what is typed beside --remake wins."""
    from flux.errors import UserError

    if args.prompts or args.prompt or args.prompt_file:
        raise UserError("--remake brings its own prompt: leave the prompt out")
    if wrong := [key for key, kind in REMADE.items() if key not in metadata or not isinstance(metadata[key], kind)]:
        raise UserError(f"{args.remake} lacks parameters that are needed to remake it: {', '.join(wrong)}")
    if not args.dtype and metadata["dtype"] not in DTYPES:
        raise UserError(f"{args.remake} says that its dtype was {metadata['dtype']!r:.40}: give another with --dtype")
    if metadata["transformer"] and not args.transformer:
        raise UserError(
            f"{args.remake} was made with another transformer, {metadata['transformer']}: give it with --transformer"
        )
    args.prompts = [metadata["prompt"]]
    for key in REMADE.keys() - {"prompt", "transformer", "autoencoder"}:
        if getattr(args, key) in (None, "exact"):
            setattr(args, key, metadata[key])


def describe(args, pipe, prompt: str, width: int, height: int, steps: int, guidance, seed: int) -> dict:
    """Everything that decides the picture, and what it ran on."""
    import torch

    import flux

    spec = pipe.spec
    return dict(
        model=spec.name, prompt=prompt, negative_prompt=args.negative_prompt, width=width, height=height, steps=steps,
        guidance=guidance, cfg_scale=args.cfg_scale, seed=seed, numerics=args.numerics,
        dtype=short(pipe.dtype), device=pipe.device.type,
        transformer=args.transformer.name if args.transformer else None,
        autoencoder=args.autoencoder.name if args.autoencoder else None,
        note="made by the embedded toy model: shows the code at work, not what FLUX can do" if spec.embedded else None,
        licence=spec.licence.name, software=f"flux {flux.__version__}, torch {torch.__version__}",
    )  # fmt: skip


def note_unknown_words(prompts: list[str]) -> None:
    from flux import shapes

    if unknown := [word for prompt in prompts for word in shapes.unknown_words(prompt)]:
        words = ", ".join(repr(word) for word in dict.fromkeys(unknown))
        say(f"note: the toy does not know {words}. It knows the shapes {', '.join(shapes.SHAPES)}; the colours "
            f"{', '.join(shapes.COLOURS)}; small and large; places such as 'at the top left'; above, below, to the left of, to "
            "the right of; and '... background'. --model names a real model.")  # fmt: skip


def save_latents(picture: Path, latents, metadata: dict) -> None:
    from safetensors.torch import save

    from flux.images import write_new

    data = save({"latents": latents.cpu().contiguous()}, {"flux": json.dumps(metadata)})
    say(f"latents: {write_new(picture.with_suffix('.safetensors'), lambda file: file.write(data))}")


def list_models(weights: Path | None) -> int:
    from flux.configs import MODELS
    from flux.pipeline import is_here, parameters

    print(f"{'name':24}{'parameters':>12}  {'steps':>5}  {'here':5} licence")
    for spec in MODELS.values():
        here = "yes" if is_here(spec, weights) else "no"
        print(f"{spec.name:24}{parameters(spec) / 1e9:>10.3g} B  {spec.steps:>5}  {here:5} {spec.licence.name}")
    return 0


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(text: str, code: int = 1) -> int:
    say(f"error: {text}")
    return code


if __name__ == "__main__":
    sys.exit(main())
