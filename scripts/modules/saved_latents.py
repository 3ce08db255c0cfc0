"""What `sample.py --latents FILE` does: decode the latents that --save-latents wrote, or go on."""

import argparse
from pathlib import Path

from modules.command_line import say, show
from modules.safety_flags import REFUSED, Safety

from flux.errors import UserError
from flux.weights.files import read_header

MODES = ("start", "reference")  # image modes of models that can start from latents


def read(path: Path):
    """Return latents (B, C, h, w) float32, and the metadata of the image that they became."""
    from safetensors import safe_open

    from flux.plain_files import parse_json, require_plain_file

    infos, header = read_header(require_plain_file(path, "a file of latents"))
    info = infos.get("latents")
    if info is None or len(info.shape) != 4 or 0 in info.shape:
        raise UserError(f"latents: {path} has no latents (B, C, height / 16, width / 16).")
    try:
        metadata = parse_json(header.get("flux", "{}"))
    except ValueError:
        metadata = {}
    with safe_open(path, "pt") as file:
        latents = file.get_tensor("latents").float()
    if not latents.isfinite().all():
        raise UserError(f"latents: {path} has NaN or infinity.")
    return latents, metadata if isinstance(metadata, dict) else {}


def conditions(args: argparse.Namespace, spec):
    """Return the start of an image-to-image run: the latents in the place of an image."""
    from flux.conditioning import Conditions

    if args.image or args.mask:
        raise UserError("latents: stand in the place of `images` and `mask`. Leave those out.")
    if spec.image_mode not in MODES:
        raise UserError(f"latents: {spec.name} does not start from an image. Decode them alone.")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UserError(f"strength: must be above 0 and at most 1 (got {args.strength:g}).")
    latents, _ = read(args.latents)
    channels, (height, width) = latents.shape[1], latents.shape[2:]
    if channels != spec.autoencoder.latent_channels or len(latents) != 1:
        raise UserError(
            f"latents: {args.latents} has the shape {tuple(latents.shape)} (expected one image of "
            f"{spec.autoencoder.latent_channels} channels for {spec.name})."
        )
    for name, side in (("width", 16 * width), ("height", 16 * height)):
        if getattr(args, name) not in (None, side):
            raise UserError(f"{name}: is {side} in {args.latents} (got {getattr(args, name)}).")
    return Conditions(16 * height, 16 * width, init=latents, strength=args.strength)


def decode(args: argparse.Namespace, load) -> int:
    """Write the images of saved latents, with the metadata that the latents carry.

    What a filter refuses is not written.
    """
    from flux.image_io import output
    from flux.weights.locate import get_spec

    output.check_output(args.output)
    latents, metadata = read(args.latents)
    for name in ("model", "numerics", "decode_dtype", "autoencoder"):
        if getattr(args, name) is None and metadata.get(name) is not None:
            if name == "autoencoder":
                raise UserError(
                    f"{args.latents}: was made for the autoencoder {metadata[name]!s:.80}. Pass it "
                    "as `autoencoder`."
                )
            setattr(args, name, metadata[name])
    licence = get_spec(args.model, args.transformer).licence
    safety = Safety(args, licence, (16 * latents.shape[3], 16 * latents.shape[2]), metadata)
    texts = [metadata.get(name) for name in ("prompt", "negative_prompt", "upsampled_from")]
    if any(safety.refuses_prompt(text) for text in texts if isinstance(text, str)):
        return REFUSED
    pipe = load(args)
    safety.loaded(pipe)
    has_record = len(latents) == 1 and "model" in metadata and not metadata.get("mask")
    if metadata.get("mask"):
        say("note: what the mask protected is in the input image, and is not put back")
    if not has_record:
        metadata = {"model": pipe.spec.name}  # of which there is at least IPTC's mark
    metadata |= safety.metadata
    safety.record = has_record and not args.no_metadata
    for image in pipe.decode(latents):
        if refusal := safety.refusal(image, metadata):
            say(refusal)
            continue
        image = safety.mark(image, metadata)
        seal = safety.seal(metadata)
        show(output.save(image, args.output, metadata, record=safety.record, seal=seal))
    return REFUSED if safety.refused else 0
