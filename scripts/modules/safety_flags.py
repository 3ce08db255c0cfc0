"""The flags of sample.py for content filters, and what they do in a run."""

import argparse
import warnings
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from modules.command_line import say

if TYPE_CHECKING:
    from flux.configs import Licence

REFUSED = 3  # exit code: a filter refused an image


# fmt: off
def add_safety(group) -> None:
    add = group.add_argument
    add("--filter", choices=("nsfw", "judge", "all"),
        help="refuse what a filter flags: write nothing of it, go on, and end with exit code 3. "
        "nsfw: a classifier looks at input images and results; judge: a vision-language model "
        "looks at prompts, too, for characters, brands and public persons")
    add("--filter-weights", type=Path, metavar="DIR",
        help="folder of the filters' files (default: as --weights, without a download)")
    add("--judge-device", metavar="DEVICE", help="where the judge runs (default: cpu)")
    add("--review", type=Path, metavar="DIR",
        help="put refused results into this folder, with their scores, for a person to review")
    add("--watermark", choices=("tile", "bfl"),
        help="mark the pixels invisibly. tile: 48 bits that name the record, and survive JPEG, "
        "scaling and crops; bfl: BFL's own mark, which JPEG erases (default: none)")
    add("--sign", type=Path, metavar="KEY",
        help="sign the images with this key, as C2PA (scripts/certificate.py makes one)")
    add("--certificate", type=Path, metavar="CHAIN", help="the certificates of that key")
    add("--sign-prompt", action="store_true",
        help="state the prompt in what is signed, and not only its hash")
# fmt: on


FILTER = ("filter", "filter_weights", "judge_device")  # arguments
PROVENANCE = ("watermark", "sign", "certificate", "sign_prompt")


def load_filters(args: argparse.Namespace):
    """Return the filters that are asked for, None without. UserError if one is not there."""
    from flux.errors import UserError

    if args.filter is None:
        for name in ("filter_weights", "review"):
            if getattr(args, name, None) is not None:
                raise UserError(f"{name}: has no effect without `filter`. Add it.")
        if args.judge_device is not None:
            raise UserError("judge_device: has no effect without `filter=judge`. Add it.")
        return None
    from flux.runtime.devices import choose_device
    from flux.safety.filters import load_filters

    if args.filter_weights and not args.filter_weights.is_dir():
        raise UserError(f"filter_weights: {args.filter_weights} is not a folder.")
    if args.judge_device is not None and args.filter == "nsfw":
        raise UserError("judge_device: has no effect without `filter=judge`. Add it.")
    device = choose_device(args.judge_device or "cpu")
    return load_filters(args.filter, args.filter_weights or args.weights, device)


def load_provenance(args: argparse.Namespace, watermark: str | None = None):
    """Return the marks that are asked for. `watermark`: that of an image to make again."""
    from flux.safety.provenance import Provenance

    return Provenance(
        args.watermark or watermark, args.sign, args.certificate, sign_prompt=args.sign_prompt
    )


def licence_note(licence: "Licence", filters) -> str | None:
    """Return what to say if the licence of the weights asks for filters, and there is none."""
    if not licence.requires_filters or filters is not None:
        return None
    return (
        f"note: the {licence.name} asks for content filters, or for a review of the images before "
        "you publish them; --filter is off"
    )


class Safety:
    """Filters and marks of one run of sample.py. UserError if one is asked for and not there.

    `size`: width and height of the images; `earlier`: the metadata of an image to make again;
    `filters_of`: `load_filters`, or a function that keeps filters.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        licence: "Licence",
        size: tuple[int, int],
        earlier: dict,
        filters_of: Callable = load_filters,
    ):
        from flux.errors import UserError
        from flux.image_io import output

        self.licence, self.refused = licence, 0
        self.record = not args.no_metadata
        self.review = args.review and args.review / args.output.name
        self.inputs = [*args.image, args.mask, args.latents]
        self.files: dict = {}  # of the pipeline
        self.provenance = load_provenance(args, earlier.get("watermark"))
        self.provenance.check_sizes([size])
        if self.provenance.watermark == "bfl" and args.output.suffix.lower() != ".png":
            say("note: JPEG and WebP often erase BFL's watermark; PNG, and the tile mark, do not")
        self.filters = filters_of(args)
        if self.review:
            if self.review.resolve() == args.output.resolve():
                raise UserError(
                    f"review: {args.review} is the folder of `output`, too. Choose another: there, "
                    "refused images would lie among the others."
                )
            output.check_output(self.review, name="review")
        self.refused_texts: set[str] = set()

    def loaded(self, pipe) -> None:
        """Note the files of the model, and what its licence asks for."""
        self.files = pipe.files
        if note := licence_note(self.licence, self.filters):
            say(note)

    # ------------------------------------------------------------------ what goes in

    def refuses_inputs(self, images, mask=None, negative_prompt: str | None = None) -> bool:
        """Return whether a filter refuses what all images are made from; say which."""
        given = [(f"image {number}", image) for number, image in enumerate(images, start=1)]
        given += [("the mask", mask)] if mask is not None else []
        refused = [self._refuses(name, self.verdicts(image)) for name, image in given]  # tell all
        refused.append(self.refuses_prompt(negative_prompt or "", "negative prompt"))
        return any(refused)

    def refuses_prompt(self, prompt: str, about: str = "prompt") -> bool:
        """Return whether a filter refuses a prompt; say so once."""
        if prompt in self.refused_texts:
            return True
        if not self._refuses(about, self._of_text(prompt), f": {prompt}"):
            return False
        self.refused_texts.add(prompt)
        return True

    def refused_prompts(self, prompts, boxes: list[dict], images: int) -> set[int]:
        """Return the numbers of the prompts that a filter refuses with their boxes; say which."""
        if self.filters is None:
            return set()
        from flux.boxes import add_boxes

        refused = set()
        with warnings.catch_warnings():  # a box that is not cited is told later
            warnings.simplefilter("ignore")
            for number, prompt in enumerate(prompts):
                if self.refuses_prompt(add_boxes(prompt, boxes, images) if boxes else prompt):
                    refused.add(number)
        return refused

    def refused_answers(self, typed: list[tuple[int, str]], answers: list[str]) -> set[int]:
        """Return the numbers of the prompts whose expanded form a filter refuses; say which."""
        return {
            number
            for (number, prompt), answer in zip(typed, answers)
            if answer != prompt and self.refuses_prompt(answer, "expanded prompt")
        }

    def _refuses(self, name: str, verdicts: list, more: str = "") -> bool:
        flagged = [verdict for verdict in verdicts if verdict.refused]
        if flagged:
            self.refused += 1
            say(f"refused: {name}, by {', '.join(map(str, flagged))}{more}")
        return bool(flagged)

    def _of_text(self, text: str | None) -> list:
        return self.filters.judge_text(text) if self.filters else []

    def verdicts(self, image) -> list:
        """Return what the filters say of an image."""
        return self.filters.judge_image(image) if self.filters else []

    # ------------------------------------------------------------------ what comes out

    @property
    def metadata(self) -> dict:
        """Return what the record says of the marks."""
        return self.provenance.metadata

    def mark(self, image, metadata: dict):
        """Return the image with its watermark, if there is to be one."""
        return self.provenance.mark(image, metadata)

    def seal(self, metadata: dict):
        """Return what signs the bytes of a file; None if nothing is to be signed."""
        from flux.safety.provenance import recorded_ingredients

        ingredients = recorded_ingredients(metadata, self.inputs)
        return self.provenance.seal(metadata, ingredients, self.files)

    def refusal(self, image, metadata: dict) -> str | None:
        """Return why a result is refused, None if it is not; write it for a review, if asked to."""
        from flux.image_io import output

        verdicts = self.verdicts(image)
        flagged = [verdict for verdict in verdicts if verdict.refused]
        if not flagged:
            return None
        self.refused += 1
        told = f"refused by {', '.join(map(str, flagged))}"
        if self.review:
            image = self.mark(image, metadata)
            path = output.save(
                image, self.review, metadata, [".json"], self.record, self.seal(metadata)
            )
            scores = [x._asdict() | {"refused": x.refused} for x in verdicts]
            for score in scores:
                score["score"] = score["score"] if isfinite(score["score"]) else None  # no NaN
            text = output.to_json({"image": path.name, "verdicts": scores}).encode()
            output.write_exclusive(path.with_suffix(".json"), lambda file: file.write(text))
            told += f", put into {path}"
        return told
