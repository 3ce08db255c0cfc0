"""The flags of sample.py for content filters, and what they do in a run."""

import argparse
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
    add("--filter", choices=("nsfw",),
        help="refuse input images and results that a filter flags: write nothing of them, go on, "
        "and end with exit code 3")
    add("--filter-weights", type=Path, metavar="DIR",
        help="folder of the filter's files (default: as --weights, without a download)")
    add("--review", type=Path, metavar="DIR",
        help="put refused results into this folder, with their scores, for a person to review")
    add("--watermark", choices=("tile", "bfl"),
        help="mark the pixels invisibly. tile: 48 bits that name the record, and survive JPEG, "
        "scaling and crops; bfl: BFL's own mark, which JPEG erases (default: none)")
    add("--sign", type=Path, metavar="KEY",
        help="sign the images with this key, as C2PA (scripts/certificate.py makes one)")
    add("--certificate", type=Path, metavar="CHAIN", help="the certificates of that key")
# fmt: on


class Safety:
    """The filters of one run, loaded. UserError if one is asked for and not there.

    `size`: width and height of the images; `earlier`: the metadata of an image to make again.
    """

    def __init__(
        self, args: argparse.Namespace, licence: "Licence", size: tuple[int, int], earlier: dict
    ):
        from flux.errors import UserError
        from flux.image_io import output

        self.filters, self.refused = [], 0
        self.licence = licence
        self.review = args.review and args.review / args.output.name
        self.record = not args.no_metadata
        self.watermark = args.watermark or earlier.get("watermark")
        if self.watermark is not None:
            from flux.safety import marking

            if self.watermark not in marking.KINDS:
                raise UserError(
                    f"watermark: {self.watermark!r:.40} is unknown (expected "
                    f"{', '.join(marking.KINDS)})."
                )
            marking.check_size(self.watermark, *size)
        self.signer = None
        if (args.sign is None) != (args.certificate is None):
            raise UserError("sign: needs `certificate`, and the other way round.")
        if args.sign is not None:
            from flux.safety.signing import Signer

            self.signer = Signer(args.sign, args.certificate)
        if args.filter is None:
            for name in ("filter_weights", "review"):
                if getattr(args, name) is not None:
                    raise UserError(f"{name}: has no effect without `filter`. Add it.")
            return
        from flux.safety.filters import load_nsfw_filter

        if args.filter_weights and not args.filter_weights.is_dir():
            raise UserError(f"filter_weights: {args.filter_weights} is not a folder.")
        if self.review:
            output.check_output(self.review, name="review")
        self.filters = [load_nsfw_filter(args.filter_weights or args.weights)]

    def note_licence(self) -> None:
        """Say it if the licence of the weights asks for filters, and there is none."""
        if self.licence.requires_filters and not self.filters:
            say(
                f"note: the {self.licence.name} asks for content filters, or for a review of the "
                "images before you publish them; --filter is off"
            )

    def refuses_input(self, images) -> bool:
        """Return whether a filter refuses an input image; say which. `images`: ImageInputs."""
        given = [(f"image {n}", x) for n, x in enumerate(images.images if images else (), start=1)]
        if images and images.mask is not None:
            given.append(("the mask", images.mask))
        for name, image in given:
            for verdict in self.verdicts(image):
                if verdict.refused:
                    say(f"refused: {name}, by {verdict}")
                    self.refused += 1
        return self.refused > 0

    def seal(self, metadata: dict):
        """Return what signs the bytes of a file; None if nothing is to be signed."""
        if self.signer is None:
            return None
        return lambda data: self.signer.sign(data, metadata)

    @property
    def metadata(self) -> dict:
        """Return what the record says of the marks."""
        return {"watermark": self.watermark} if self.watermark else {}

    def mark(self, image, metadata: dict):
        """Return the image with its watermark, if there is to be one."""
        if self.watermark is None:
            return image
        from flux.safety import marking

        return marking.mark(image, self.watermark, metadata)

    def verdicts(self, image) -> list:
        """Return what each filter says of an image."""
        return [filter.judge(image) for filter in self.filters]

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
