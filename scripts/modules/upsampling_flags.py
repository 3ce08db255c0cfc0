"""`--upsample`: which language model writes the prompts out, and what is kept of its answers."""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.command_line import say

from flux.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from flux.configs import ModelSpec


def check_upsampling(args: argparse.Namespace, spec: "ModelSpec") -> None:
    if args.upsample == "local" and spec.name != "flux.2-dev" and not spec.flux3:
        raise UserError(
            "upsample: local needs the text encoder of flux.2-dev, or the upsampler of FLUX 3 (got "
            f"{spec.name}). Give a URL."
        )
    by_server = args.upsample not in (None, "local")
    if by_server != (args.upsample_model is not None):
        raise UserError("upsample: a URL needs `upsample_model`, and the other way round.")
    if args.upsample == "local" and spec.flux3:
        released_upsampler(args.weights)


def released_upsampler(weights: Path | None, needed: bool = True) -> Path | None:
    """Return the folder of FLUX 3's upsampler. UserError if it is needed, and not here.

    Its 19 GB are not downloaded unasked.
    """
    from modules.prompt_upsampling3 import INSTRUCTIONS, REPOSITORY

    from flux.weights.files import find_file, is_local

    if is_local(REPOSITORY, INSTRUCTIONS, weights):
        return find_file(REPOSITORY, INSTRUCTIONS, weights, "Apache-2.0", False).parent
    if needed:
        raise UserError(
            f"upsample: {REPOSITORY} is not here. Run `hf download {REPOSITORY}` (19 GB), or give "
            "a URL."
        )
    return None


def upsample(
    args: argparse.Namespace,
    pipe: Any,
    prompts: Sequence[str],
    images: "Sequence[Image.Image]",
    boxes: Sequence[Mapping[str, Any]],
    seed: int,
) -> list[str]:
    """Return the prompts as a language model writes them out, with the boxes of FLUX 3."""
    if not args.upsample:
        if not boxes:
            return list(prompts)
        from flux.boxes import add_boxes

        return [add_boxes(prompt, boxes, len(images)) for prompt in prompts]
    write = partial(_for_flux3 if pipe.spec.flux3 else _for_flux2, args, pipe)
    return write(prompts, images, boxes, seed)


def _for_flux2(
    args: argparse.Namespace, pipe: Any, prompts: Sequence[str], images: Any, _: Any, seed: int
) -> list[str]:
    import modules.prompt_upsampling as upsampling

    from flux.weights import locate

    written = []
    for prompt in prompts:
        if args.upsample == "local":
            config = locate.locate_one(pipe.spec, "text_encoder/config.json", args.weights)
            folder = config.parent.parent
            text = upsampling.upsample_locally(prompt, folder, images, seed, pipe.device)
        else:
            text = upsampling.upsample_remotely(
                prompt, args.upsample, args.upsample_model, images=images
            )
        say(f"prompt: {text}")
        written.append(text)
    return written


def _for_flux3(
    args: argparse.Namespace, pipe: Any, prompts: Sequence[str], images: Any, boxes: Any, _: int
) -> list[str]:
    import modules.prompt_upsampling3 as upsampling

    asked = [upsampling.question(prompt, images, boxes) for prompt in prompts]
    ask: upsampling.Ask | None = None  # loaded if there is a question, and for this call alone
    written = []
    for prompt, question in zip(prompts, asked):
        if question is None:
            say("note: the prompt ends in boxes, and cites them: it is not upsampled")
            written.append(prompt)
            continue
        ask = ask or _upsampler(args, pipe)
        text = upsampling.write_caption(question, ask)
        say(f"prompt: {text}")
        if any(pipe.text.tokenizer([text], pipe.text.length).truncated):
            raise UserError(
                f"upsample: the answer has more than the {pipe.text.length} tokens that "
                f"{pipe.spec.name} reads. Try another prompt or model."
            )
        written.append(text)
    return written


def _upsampler(args: argparse.Namespace, pipe: Any) -> Any:
    """Return what answers FLUX 3's questions."""
    import modules.prompt_upsampling3 as upsampling

    local = args.upsample == "local"
    folder = released_upsampler(args.weights, needed=local)
    if local:
        penalty = 0.0 if args.numerics == "diffusers" else upsampling.PENALTY
        return upsampling.LocalUpsampler(folder, pipe.device, penalty=penalty)
    more = {}
    if folder is not None:
        more["instructions"] = upsampling.read_instructions(folder / upsampling.INSTRUCTIONS)
    return upsampling.ServerUpsampler(args.upsample, args.upsample_model, **more)
