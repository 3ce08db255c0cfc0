"""The last steps of a call in Python: filters, watermark, record, signature."""

from collections.abc import Sequence
from typing import Any

from flux.errors import RefusedError
from flux.image_io.output import RecordedImage, recorded
from flux.image_io.request import ImageInputs
from flux.safety.filters import Filters, refusal
from flux.safety.provenance import Provenance, ingredients_of


def release(
    images: Sequence[RecordedImage],
    inputs: Sequence[Any],
    filters: Filters | None = None,
    provenance: Provenance | None = None,
    files: dict | None = None,
) -> list[RecordedImage]:
    """Return the images that the filters let pass, marked, and signed when they are saved.

    inputs: the input images of each, as they were passed. files: those of the pipeline, by part.
    RefusedError, with the images that pass, if one is refused.
    """
    finished: list[RecordedImage | None] = []
    verdicts, reasons = [], []
    for number, (image, used) in enumerate(zip(images, inputs, strict=True), start=1):
        verdicts.append(filters.judge_image(image) if filters else [])
        if reason := refusal(verdicts[-1]):
            reasons.append(f"image {number} is {reason}")
            finished.append(None)
            continue
        finished.append(marked := _marked(image, used, provenance, files))
        marked.verdicts = verdicts[-1]
    if reasons:
        raise RefusedError(
            f"prompts: {'; '.join(reasons)}. Change the prompt or the seed.", verdicts, finished
        )
    return [image for image in finished if image is not None]


def _marked(
    image: RecordedImage, used: Any, provenance: Provenance | None, files: dict | None
) -> RecordedImage:
    if provenance is None:
        return image
    metadata = image.metadata | provenance.metadata
    marked = recorded(provenance.mark(image, metadata), metadata)
    if provenance.signer is not None:
        marked.seal = provenance.seal(metadata, ingredients_of(_listed(used)), files)
    return marked


def _listed(used: Any) -> list[Any]:
    """Return the inputs of one prompt as a list, the mask at its end."""
    if used is None:
        return []
    given = used.images if isinstance(used, ImageInputs) else used
    listed = list(given) if isinstance(given, list | tuple) else [given]
    mask = used.mask if isinstance(used, ImageInputs) else None
    return listed if mask is None else [*listed, mask]
