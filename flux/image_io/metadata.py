"""The metadata of an image: everything that decides its pixels, to show and to make it again."""

import hashlib
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import UnionType

from flux.errors import UserError
from flux.lora.peft_config import config_file

DTYPES = ("bfloat16", "float32")
Types = dict[str, type | UnionType]
REQUIRED: Types = dict(  # metadata of every image -> type; a list is of numbers
    prompt=str,
    negative_prompt=str | None,
    width=int,
    height=int,
    steps=int,
    guidance=float | int | list | None,
    true_cfg_scale=float | int | list | None,
    seed=int,
    numerics=str,
    model=str,
    dtype=str,
    decode_dtype=str | None,
    transformer=str | None,
    autoencoder=str | None,
    text_encoder=str | None,
    text_encoder_2=str | None,
    tokenizer=str | None,
    quantize=str | None,
    fp8_matmul=bool,
    compile=bool,
    vae_tile=int | None,
    solver=str | None,
    sigmas=list | None,
    shift=float | int | None,
)
IMAGE_OPTIONS: Types = dict(  # of `flux.ImageInputs`, in the metadata's `image_options`
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
PARTS = ("transformer", "autoencoder", "text_encoder", "text_encoder_2", "tokenizer")  # by flags
SHOWN = {"prompt", "negative_prompt", "width", "height", "steps", "guidance", "true_cfg_scale"}
SHOWN |= {"seed", "model", "transformer"}  # what `parameters` speaks of
SAMPLERS = {  # solver -> its name in the web UIs of Stable Diffusion
    "euler": "Euler",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "res_2m": "Res Multistep",
}
OLD_NAMES = {  # in images of version 0.1.0 -> today
    "cfg_scale": "true_cfg_scale",
    "native_fp8": "fp8_matmul",
    "tile": "vae_tile",
    "pictures": "image_options",
}
OLD_OPTION_NAMES = {
    "expand": "outpaint",
    "weights": "image_weights",
    "match": "match_image_size",
    "keep_size": "keep_input_size",
    "limit": "reference_limit",
    "cached": "kv_cache",
    "photo": "preprocess_control",
}


# ------------------------------------------------------------------------------ writing


def describe(
    args: Namespace, pipe, prompt: str, width: int, height: int, steps: int, guidance, seed: int
) -> dict:
    """Return all that determines an image, except its files, and the environment of the run."""
    import torch

    spec = pipe.spec
    options = None
    if args.image or args.latents:
        options = {name: getattr(args, name) for name in IMAGE_OPTIONS}
    note = None
    if spec.embedded:
        note = "made by an embedded toy model: shows the code at work, not what FLUX can do"
    return dict(
        model=spec.name,
        prompt=prompt,
        negative_prompt=args.negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance[0] if guidance and len(guidance) == 1 else guidance,
        true_cfg_scale=args.true_cfg_scale,
        seed=seed,
        numerics=args.numerics,
        dtype=short(pipe.dtype),
        decode_dtype=args.decode_dtype,
        device=pipe.device.type,
        threads=torch.get_num_threads(),
        **{part: path.name if (path := getattr(args, part)) else None for part in PARTS},
        quantize=args.quantize,
        fp8_matmul=args.fp8_matmul,
        compile=args.compile,
        vae_tile=args.vae_tile,
        solver=args.solver,
        sigmas=args.sigmas,
        shift=args.shift,
        image_options=options,
        note=note,
        licence=spec.licence.name,
        software=software(),
    )


def other_environment(metadata: dict, device: str) -> list[str]:
    """Return what differs between the run that made an image and this one: "threads 2, now 1".

    The same environment gives the same bytes. Another sums matrix products in another order, which
    may change some pixels by a level, and more in bfloat16. Threads matter on a CPU only.
    """
    import torch

    now: dict[str, object] = {"device": device, "software": software()}
    if device == "cpu":
        now["threads"] = torch.get_num_threads()
    return [
        f"{name} {metadata[name]!s:.60}, now {value}"
        for name, value in now.items()
        if name in metadata and metadata[name] != value
    ]


def software() -> str:
    import torch

    import flux

    return f"flux {flux.__version__}, torch {torch.__version__}"


def describe_files(args: Namespace) -> dict:
    """Return the user's files that decide an image: input images, mask, LoRAs.

    A LoRA's configuration decides its strength, so its hash is kept with the LoRA's.
    """
    loras = []
    for path, scale in args.lora:
        config = config_file(path)
        merged = {"scale": scale, "ignore_unmatched": args.lora_ignore_unmatched}
        merged["config_sha256"] = describe_file(config)["sha256"] if config else None
        loras.append(describe_file(path) | merged)
    mask = describe_file(args.mask) if args.mask else None
    latents = {"latents": describe_file(args.latents)} if args.latents else {}
    images = [describe_file(path) for path in args.image]
    return dict(images=images, mask=mask, loras=loras) | latents


def describe_file(path: Path) -> dict:
    """Return the name and the SHA-256 of a file."""
    name = os.fsencode(path).decode(errors="replace")  # JSON has no bytes that are not UTF-8
    with path.open("rb") as file:
        return {"file": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------ for other programs


def source_type(metadata: dict) -> str | None:
    """Return IPTC's term for where an image comes from; None for one that no model generated.

    https://cv.iptc.org/newscodes/digitalsourcetype: media by a trained model, or composed of such
    media and others, as where the pixels outside a mask are the input's.
    """
    if "model" not in metadata:
        return None
    options = metadata.get("image_options")
    options = options if isinstance(options, dict) else {}  # of a foreign file, perhaps not
    partly = metadata.get("mask") or options.get("outpaint")
    term = "trainedAlgorithmicMedia"
    if partly and options.get("composite"):
        term = "compositeWithTrainedAlgorithmicMedia"
    return f"http://cv.iptc.org/newscodes/digitalsourcetype/{term}"


def parameters(metadata: dict) -> str:
    """Return the text that the web UIs of Stable Diffusion keep in an image, and many tools show.

    The prompt, the negative prompt, and one line of settings. "" if the metadata are not complete.
    """
    from flux.configs import MODELS

    if not SHOWN <= metadata.keys():
        return ""
    spec, options = MODELS.get(metadata["model"]), metadata.get("image_options") or {}
    by_cfg = spec is not None and spec.cfg
    guidance, scale = metadata["guidance"], metadata["true_cfg_scale"]
    settings = {
        "Steps": metadata["steps"],
        "Sampler": SAMPLERS.get(solver := metadata.get("solver") or "euler", solver),
        "CFG scale": guidance if by_cfg else 1 if scale is None else scale,
        "Distilled CFG Scale": None if by_cfg else guidance,
        "Seed": metadata["seed"],
        "Size": f"{metadata['width']}x{metadata['height']}",
        "Model": Path(metadata["transformer"] or metadata["model"]).name,
        "Denoising strength": options.get("strength"),
        "Version": str(metadata.get("software", "flux")).partition(",")[0],
    }
    lines = [metadata["prompt"]]
    if metadata["negative_prompt"]:
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    named = [f"{name}: {_setting(x)}" for name, x in settings.items() if x is not None]
    return "\n".join([*lines, ", ".join(named)])


def _setting(value: object) -> str:
    """Return a value as text, in quotes if the text would end early without them."""
    if isinstance(value, list):
        value = (":" if len(value) == 2 else ",").join(map(str, value))
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search('[,:\n"]', text) else text


# ------------------------------------------------------------------------------ reading


def restore_args(args: Namespace, metadata: dict, default: Callable[[str], object]) -> None:
    """Fill `args` with the metadata of the image `args.from_image`.

    A typed argument wins over the metadata. `default(name)` is an argument's value when not typed.
    """
    source, metadata = args.from_image, with_current_names(metadata)
    if args.prompts or args.prompt or args.prompt_file:
        raise UserError("from_image: the image brings its own prompt. Leave the prompt out.")
    if wrong := wrong_values(metadata, REQUIRED):
        raise UserError(f"{source}: metadata are missing or wrong: {', '.join(wrong)}.")
    for name in ("dtype", "decode_dtype"):
        if not getattr(args, name) and metadata[name] not in (*DTYPES, None):
            raise UserError(
                f"{source}: was made with the unknown {name} {metadata[name]!r:.40}. "
                f"Pass another `{name}`."
            )
    for part in PARTS:
        if metadata[part] and not getattr(args, part):
            raise UserError(
                f"{source}: was made with the {part} {metadata[part]}. Pass it as `{part}`."
            )
    restore_files(args, metadata)
    if args.image or args.latents:
        restore_image_options(args, metadata, default)
    args.prompts = [metadata["prompt"]] if metadata["prompt"] or not args.image else []
    chosen = {"width", "height"} if metadata.get("cropped") else set()  # by the reference
    for name in REQUIRED.keys() - {"prompt", *PARTS} - chosen:
        if getattr(args, name) is None or getattr(args, name) is False:  # 0 is a typed seed
            setattr(args, name, metadata[name])


def with_current_names(metadata: dict) -> dict:
    """Rename what older versions wrote, and fill in what they did not have."""
    later = ["decode_dtype", "text_encoder", "text_encoder_2", "tokenizer"]
    later += ["solver", "sigmas", "shift"]
    current = dict.fromkeys(later) | _renamed(metadata, OLD_NAMES)
    if isinstance(options := current.get("image_options"), dict):
        current["image_options"] = _renamed(options, OLD_OPTION_NAMES)
    if isinstance(loras := current.get("loras"), list):
        renamed = {"partial": "ignore_unmatched"}
        current["loras"] = [_renamed(x, renamed) if isinstance(x, dict) else x for x in loras]
    return current


def _renamed(values: dict, names: dict[str, str]) -> dict:
    return {names.get(name, name): value for name, value in values.items()}


def wrong_values(values: dict, types: Types) -> list[str]:
    """Return the names whose values are missing, of another type, or not of a usable size."""
    return [name for name, kind in types.items() if not _fits(values, name, kind)]


def _fits(values: dict, name: str, kind: type | UnionType) -> bool:
    if name not in values or not isinstance(value := values[name], kind):
        return False
    if isinstance(value, bool):  # which is an int to Python
        return kind in (bool, bool | None)
    if isinstance(value, int | float):
        value = [value]
    if not isinstance(value, list):
        return True
    return all(type(number) in (int, float) and not abs(number) >= 2**64 for number in value)


def restore_files(args: Namespace, metadata: dict) -> None:
    """Set `args.image`, `args.mask` and `args.lora` to the metadata's files; check typed ones."""
    mask = metadata.get("mask", False)  # None: the image had no mask
    args.image = _restore_paths(args, "images", args.image, metadata.get("images"))
    masks = _restore_paths(
        args, "mask", [args.mask] if args.mask else [], [] if mask is None else [mask]
    )
    args.mask = masks[0] if masks else None
    latents = [args.latents] if args.latents else []
    latents = _restore_paths(
        args, "latents", latents, [metadata["latents"]] if "latents" in metadata else []
    )
    args.latents = latents[0] if latents else None
    loras = metadata.get("loras")
    paths = _restore_paths(args, "loras", [path for path, _ in args.lora], loras)
    for path, lora in zip(paths, loras or []):
        _check_config(args.from_image, path, lora)
    if not args.lora:
        args.lora = [(path, lora.get("scale", 1.0)) for path, lora in zip(paths, loras or [])]
    if any(lora.get("ignore_unmatched") for lora in loras or []):
        args.lora_ignore_unmatched = True


def _restore_paths(args: Namespace, name: str, typed: list[Path], files: object) -> list[Path]:
    """Return typed paths, or those of the metadata; UserError unless the files are the same."""
    source = args.from_image
    if not isinstance(files, list) or not all(map(is_described, files)):
        raise UserError(f"{source}: the metadata do not say which files `{name}` had.")
    paths = typed or [Path(file["file"]) for file in files]
    if len(paths) != len(files):
        raise UserError(
            f"{source}: was made with {len(files)} files for `{name}` (got {len(paths)})."
        )
    for path, file in zip(paths, files):
        if not path.is_file():
            raise UserError(
                f"{path}: does not exist, but {source} was made with it. Pass it in `{name}`."
            )
        if describe_file(path)["sha256"] != file["sha256"]:
            raise UserError(
                f"{path}: is not the file that {source} was made with. Pass that in `{name}`."
            )
    return paths


def _check_config(source: Path, path: Path, lora: dict) -> None:
    """UserError unless a LoRA has the configuration, or none, that `source` was made with."""
    config = config_file(path)
    found = describe_file(config)["sha256"] if config else None
    if found != lora.get("config_sha256", found):  # older images do not have it
        what = "is not the configuration" if config else "lacks the adapter_config.json"
        raise UserError(
            f"{config or path}: {what} that {source} was made with. Pass the LoRA with its own "
            "configuration in `loras`."
        )


def is_described(file: object) -> bool:
    """Return whether `describe_file` may have written this; a LoRA has more fields."""
    types: Types = dict(file=str, sha256=str, scale=float | int, config_sha256=str | None)
    more = {"scale": 1.0, "config_sha256": None}
    return isinstance(file, dict) and not wrong_values(more | file, types)


def restore_image_options(
    args: Namespace, metadata: dict, default: Callable[[str], object]
) -> None:
    """Set the options of the input images that were not typed."""
    options = metadata.get("image_options")
    options = options if isinstance(options, dict) else {}
    wrong = wrong_values(options, IMAGE_OPTIONS)
    margins = options.get("outpaint")
    if not wrong and margins is not None and [type(pixels) for pixels in margins] != [int] * 4:
        wrong = ["outpaint"]
    if wrong:
        raise UserError(
            f"{args.from_image}: image options are missing or wrong: {', '.join(wrong)}."
        )
    for name in IMAGE_OPTIONS:
        if getattr(args, name) == default(name):
            setattr(args, name, options[name])
