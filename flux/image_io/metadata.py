"""What a picture carries with it: the parameters that made it, to be told and to make it again."""

import hashlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from flux.errors import UserError

DTYPES = ("bfloat16", "float32")
REMADE = dict(  # what a picture's parameters must hold, and of what type, to make it again
    prompt=str,
    negative_prompt=str | None,
    width=int,
    height=int,
    steps=int,
    guidance=float | int | list | None,
    cfg_scale=float | int | list | None,
    seed=int,
    numerics=str,
    model=str,
    dtype=str,
    transformer=str | None,
    autoencoder=str | None,
    quantize=str | None,
    native_fp8=bool,
    compile=bool,
    tile=int | None,
)
OPTIONS = {  # of flux.ImageInputs -> flags; also what the metadata keep
    "strength": "strength",
    "outpaint": "expand",
    "mask_threshold": "mask_threshold",
    "composite": "composite",
    "image_weights": "image_weight",
    "match_image_size": "match_image_size",
    "keep_input_size": "keep_input_size",
    "reference_limit": "reference_limit",
    "kv_cache": "kv_cache",
    "preprocess_control": "photo",
}
REMADE_PICTURES = dict(  # of these types
    strength=float | int | None,
    outpaint=list | None,
    mask_threshold=float | int | None,
    composite=bool,
    image_weights=list | None,
    match_image_size=int | None,
    keep_input_size=bool,
    reference_limit=int | None,
    kv_cache=bool | None,
    preprocess_control=bool,
)


def recall(args: Namespace, metadata: dict, default: Callable[[str], object]) -> None:
    """Take from a picture what made it; what is typed beside --remake wins, and is told from `default`, of a flag."""
    if args.prompts or args.prompt or args.prompt_file:
        raise UserError("--remake brings its own prompt: leave the prompt out")
    if wrong := lacking(metadata, REMADE):
        raise UserError(
            f"{args.remake} lacks parameters that are needed to remake it: {', '.join(wrong)}"
        )
    if not args.dtype and metadata["dtype"] not in DTYPES:
        raise UserError(
            f"{args.remake} says that its dtype was {metadata['dtype']!r:.40}: give another with --dtype"
        )
    for part in ("transformer", "autoencoder"):
        if metadata[part] and not getattr(args, part):
            raise UserError(
                f"{args.remake} was made with another {part}, {metadata[part]}: give it with --{part}"
            )
    recall_files(args, metadata, default)
    args.prompts = [metadata["prompt"]] if metadata["prompt"] or not args.image else []
    for key in REMADE.keys() - {"prompt", "transformer", "autoencoder"}:
        typed = getattr(args, key)
        if typed is None or typed is False:  # a seed of 0 was typed
            setattr(args, key, metadata[key])


def lacking(metadata: dict, kinds: dict) -> list[str]:
    """The names whose values are missing, of another type, or beyond all measure; lists are of numbers."""

    def fits(key: str, kind) -> bool:
        if key not in metadata or not isinstance(value := metadata[key], kind):
            return False
        if isinstance(value, bool):  # which is an int to Python
            return kind in (bool, bool | None)
        numbers = value if isinstance(value, list) else [value] * isinstance(value, int | float)
        return all(type(x) in (int, float) and not abs(x) >= 2**64 for x in numbers)

    return [key for key, kind in kinds.items() if not fits(key, kind)]


def recall_files(args: Namespace, metadata: dict, default: Callable[[str], object]) -> None:
    """The same pictures and LoRAs, if they are where they were; given anew, they must still be the same."""
    kept = {
        flag: metadata.get(key)
        for flag, key in (("--image", "images"), ("--mask", "mask"), ("--lora", "loras"))
    }
    kept["--mask"] = [] if kept["--mask"] is None and "mask" in metadata else [kept["--mask"]]
    typed = {
        "--image": args.image,
        "--mask": [args.mask] if args.mask else [],
        "--lora": [path for path, _ in args.lora],
    }
    for flag, files in kept.items():
        if not isinstance(files, list) or not all(map(is_described, files)):
            raise UserError(f"{args.remake} does not say which files {flag} had")
        paths = typed[flag] or [Path(file["file"]) for file in files]
        if len(paths) != len(files):
            raise UserError(
                f"{args.remake} was made with {flag} given {len(files)} times, not {len(paths)}"
            )
        for path, file in zip(paths, files):
            if not path.is_file():
                raise UserError(
                    f"{path}, which {args.remake} was made with, is not there: give it with {flag}"
                )
            if describe_file(path)["sha256"] != file["sha256"]:
                raise UserError(
                    f"{path} is not the file that {args.remake} was made with: give that with {flag}"
                )
        typed[flag] = paths
    args.image, args.mask = typed["--image"], next(iter(typed["--mask"]), None)
    args.lora = args.lora or [
        (path, file.get("scale", 1.0)) for path, file in zip(typed["--lora"], kept["--lora"])
    ]
    args.lora_partial |= any(file.get("partial") for file in kept["--lora"])
    if not args.image:
        return
    options = metadata["pictures"] if isinstance(metadata.get("pictures"), dict) else {}
    wrong = lacking(options, REMADE_PICTURES)
    if (
        not wrong
        and options["outpaint"] is not None
        and [type(pixels) for pixels in options["outpaint"]] != [int] * 4
    ):
        wrong = ["outpaint"]
    if wrong:
        raise UserError(f"{args.remake} lacks what was done with its pictures: {', '.join(wrong)}")
    for option, flag in OPTIONS.items():
        if getattr(args, flag) == default(flag):
            setattr(args, flag, options[option])


def is_described(file: object) -> bool:
    """Whether this is what `describe_file` wrote, with the scale of a LoRA perhaps."""
    return isinstance(file, dict) and not lacking(
        {"scale": 1.0} | file, dict(file=str, sha256=str, scale=float | int)
    )


def describe(
    args: Namespace, pipe, prompt: str, width: int, height: int, steps: int, guidance, seed: int
) -> dict:
    """Everything that decides the picture, and what it ran on."""
    import torch

    import flux

    spec = pipe.spec
    return dict(
        model=spec.name,
        prompt=prompt,
        negative_prompt=args.negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance[0] if guidance and len(guidance) == 1 else guidance,
        cfg_scale=args.cfg_scale,
        seed=seed,
        numerics=args.numerics,
        dtype=short(pipe.dtype),
        device=pipe.device.type,
        transformer=args.transformer.name if args.transformer else None,
        autoencoder=args.autoencoder.name if args.autoencoder else None,
        quantize=args.quantize,
        native_fp8=args.native_fp8,
        compile=args.compile,
        tile=args.tile,
        pictures={option: getattr(args, flag) for option, flag in OPTIONS.items()}
        if args.image
        else None,
        note="made by an embedded toy model: shows the code at work, not what FLUX can do"
        if spec.embedded
        else None,
        licence=spec.licence.name,
        software=f"flux {flux.__version__}, torch {torch.__version__}",
    )


def describe_files(args: Namespace) -> dict:
    """The files that decide the picture beside the model's."""
    images, mask = (
        [describe_file(path) for path in args.image],
        describe_file(args.mask) if args.mask else None,
    )
    loras = [
        describe_file(path) | {"scale": scale, "partial": args.lora_partial}
        for path, scale in args.lora
    ]
    return dict(images=images, mask=mask, loras=loras)


def describe_file(path: Path) -> dict:
    """Enough to find it again, and to know that it is the same."""
    with path.open("rb") as file:
        return {"file": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")
