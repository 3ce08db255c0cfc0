"""Control images for FLUX.1 Canny and Depth, computed from a photo as Black Forest Labs' code does.

Needs the packages of `pip install -e '.[control]'`; a ready control image needs none of this. The
photo has the size of the output already. Source: black-forest-labs/flux,
src/flux/modules/image_embedders.py.
"""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from PIL import Image
from torch import Tensor

from flux.errors import UserError, install_command
from flux.image_io.output import to_pixels

DEPTH_MODEL = "LiheYoung/depth-anything-large-hf"
INSTALL = f"Run `{install_command('control')}`, or use a ready control image."


def check(kind: str | None) -> None:
    """Raise UserError unless the package that "canny" or "depth" needs is installed."""
    package, name = ("cv2", "OpenCV") if kind == "canny" else ("transformers", "transformers")
    if find_spec(package) is None:
        raise UserError(f"{kind}: needs {name}, which is not installed. {INSTALL}")


def control_pixels(kind: str | None, photo: Image.Image, bfl_levels: bool = False) -> Tensor:
    """Return the control pixels (1, 3, H, W) of an RGB photo; `kind`: "canny" or "depth".

    `bfl_levels`: lower some levels of the photo first, as BFL's code does.
    """
    if bfl_levels:
        photo = truncate_levels(photo)
    return depth(photo) if kind == "depth" else to_pixels(canny(photo))


def truncate_levels(image: Image.Image) -> Image.Image:
    """Return the bytes that BFL's code computes: (x / 127.5 - 1 + 1) * 127.5 in float32, cut off.

    63 of the 256 levels come out one lower, where the product is just below the level.
    """
    levels = ((to_pixels(image) + 1) * 127.5).byte()  # (1, 3, H, W)
    return Image.fromarray(levels[0].permute(1, 2, 0).contiguous().numpy())


def canny(image: Image.Image) -> Image.Image:
    """Return the edges of an RGB image, white on black, RGB."""
    check("canny")
    import cv2

    return Image.fromarray(cv2.Canny(np.asarray(image), 50, 200)).convert("RGB")


@torch.inference_mode()
def depth(
    image: Image.Image, model: str = DEPTH_MODEL, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the inverse depth of an RGB image as pixels (1, 3, H, W), float32; near is bright.

    `model`: a repository or a folder. The values stay on the network's scale: not normalized,
    not rounded, not clamped to [-1, 1].
    """
    processor, network = _depth_anything(model)
    x = processor(image, return_tensors="pt")["pixel_values"].to(device)  # (1, 3, 14h, 14w)
    predicted = repeat(network.to(device)(x).predicted_depth, "1 h w -> 1 3 h w")
    size = image.height, image.width
    resized = F.interpolate(predicted, size, mode="bicubic", antialias=True)  # (1, 3, H, W)
    return resized / 127.5 - 1


def _depth_anything(model: str) -> tuple[Any, Any]:
    """Load the processor and the network of a repository or a folder; UserError if incomplete."""
    check("depth")
    # This processor resizes with Pillow, as all did when FLUX.1 appeared; torchvision's differs.
    from transformers import DepthAnythingForDepthEstimation, DPTImageProcessorPil

    network: Any
    try:
        processor = DPTImageProcessorPil.from_pretrained(model)
        load: Any = DepthAnythingForDepthEstimation.from_pretrained
        network, report = load(
            model, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{model}: the depth model cannot be loaded ({reason:.200}). Use another model, or a "
            "ready control image."
        ) from None
    if missing := report["missing_keys"]:  # transformers would leave these random
        raise UserError(
            f"{model}: the depth model lacks {len(missing)} tensors ({min(missing)} is one). It is "
            "damaged, or not a Depth Anything model."
        )
    return processor, network.eval()
