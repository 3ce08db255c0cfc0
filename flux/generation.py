"""A checked call of a pipeline, whose stages run when they are asked to: see `Pipeline.prepare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flux import conditioning, text_encoder
from flux.conditioning import Conditions
from flux.image_io import request
from flux.image_io.output import RecordedImage, recorded
from flux.text_encoder import TextFeatures


@dataclass(frozen=True)
class Generation:
    """Images of prompts, in batches: the latents of a batch, and the images of latents.

    Image k is of prompt k // (images of a prompt), and has the k-th seed.
    """

    pipe: Any  # Pipeline
    prompts: Sequence[str]
    seeds: Sequence[int]  # of each image
    features: Sequence[TextFeatures]  # of each prompt
    conditions: Sequence[Conditions | None]  # of each prompt
    inputs: Sequence[Any]  # input images of each prompt, as they were passed
    records: Sequence[dict]  # metadata of each prompt's images, without prompt and seed
    settings: dict[str, Any]  # arguments of `Pipeline.sample`

    @property
    def batches(self) -> list[list[int]]:
        """Return the numbers of the images that can share a batch."""
        lengths = [features.tokens.shape[1] for features in self.features]
        num_images = len(self.seeds) // len(self.prompts)
        return conditioning.batches(self.conditions, lengths, num_images)

    def sample(self, numbers: Sequence[int], callback: Any = None) -> Tensor:
        """Return the latents of a batch, (B, C, h, w)."""
        rows = [self._row(number) for number in numbers]
        of_batch = [c for c in (self.conditions[row] for row in rows) if c is not None]
        return self.pipe.sample(
            text_encoder.concatenate([self.features[row] for row in rows]),
            [self.seeds[number] for number in numbers],
            callback=callback,
            conditions=conditioning.collate(of_batch) if of_batch else None,
            **self.settings,
        )

    def decode(self, numbers: Sequence[int], latents: Tensor) -> list[RecordedImage]:
        """Return the images of a batch's latents, with their metadata, before `release`."""
        images = []
        for number, image in zip(numbers, self.pipe._decode_all(latents), strict=True):
            row = self._row(number)
            own: dict[str, Any] = {"prompt": self.prompts[row], "seed": self.seeds[number]}
            if (used := self.conditions[row]) is not None:
                image = request.postprocess(image, used.init_image)
                if used.crop:
                    image = image.crop(used.crop)
                    own["cropped"] = True  # from the size that follows from the reference
            images.append(recorded(image, self.records[row] | own))
        return images

    def release(
        self, numbers: Sequence[int], images: Sequence[RecordedImage]
    ) -> Sequence[RecordedImage]:
        """Return images that the pipeline's filters let pass, marked and signed if it does so.

        RefusedError if one is refused.
        """
        filters, provenance = self.pipe.filters, self.pipe.provenance
        if filters is None and provenance is None:
            return images
        from flux.safety.release import release

        inputs = [self.inputs[self._row(number)] for number in numbers]
        return release(images, inputs, filters, provenance, self.pipe.files)

    def _row(self, number: int) -> int:
        """Return the number of an image's prompt."""
        return number * len(self.prompts) // len(self.seeds)
