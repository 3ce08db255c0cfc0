"""Models of transformers that read images and text: they expand prompts, and judge them.

They are loaded from safetensors that are there: no download, no pickle, no code of a repository.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flux.errors import UserError


def load_model(
    names: Sequence[str], folder: Path, device: torch.device, dtype: torch.dtype, advice: str
) -> Any:
    """Load the first of transformers' classes from a folder; the others will be needed too.

    UserError, with the advice, if that fails.
    """
    try:
        import transformers

        model_class, *_ = (getattr(transformers, name) for name in names)
    except (ImportError, AttributeError):
        raise UserError(
            f"{folder}: needs transformers. Run `pip install -U transformers accelerate`."
        ) from None
    try:
        with _without_progress(transformers.utils.logging):
            model, report = model_class.from_pretrained(
                folder,
                dtype=dtype,
                device_map=device,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # missing or damaged files, no accelerate, too little memory
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: cannot be loaded ({reason:.200}). {advice}") from None
    missing = report["missing_keys"]
    if missing:  # transformers would leave these random
        raise UserError(
            f"{folder}: {len(missing)} tensors are missing, such as {min(missing)}. {advice}"
        )
    return model


@contextmanager
def _without_progress(logging: Any) -> Iterator[None]:
    """Show no bars of transformers, which would go into the scripts' messages."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def image_inputs(image: Image.Image, model: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the tokens for an RGB image in the prompt of a model with Pixtral's vision tower.

    And the model's inputs.
    """
    from transformers import PixtralImageProcessorPil  # PixtralProcessor would need torchvision

    vision = model.config.vision_config
    # pixels on a side of a token; a LLaVA merges no patches
    patch = vision.patch_size * getattr(model.config, "spatial_merge_size", 1)
    least = -(-max(image.size) // vision.image_size)  # one pixel, after the longer side is shrunk
    if min(image.size) < least:
        image = image.resize((max(image.width, least), max(image.height, least)))
    processor = PixtralImageProcessorPil(patch_size=patch, size={"longest_edge": vision.image_size})
    inputs = processor(image, return_tensors="pt")
    lines, columns = (inputs["image_sizes"][0] // patch).tolist()
    line = "[IMG]" * columns
    tokens = "[IMG_BREAK]".join([line] * lines) + "[IMG_END]"
    return tokens, dict(inputs.to(model.device, model.dtype))
