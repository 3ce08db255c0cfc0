"""Control pictures for FLUX.1 Canny and Depth, made from a photo as Black Forest Labs' code makes them.

Needs the packages of `pip install -e '.[control]'`; a control picture that is at hand needs none of this. The photo is first
resized to the size that is to be generated. Source: black-forest-labs/flux, src/flux/modules/image_embedders.py. That code
takes its bytes from [-1, 1] by truncation, whereby levels 1 to 63 lose one; here they are the photo's own.
"""

from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from PIL import Image
from torch import Tensor

from flux.errors import UserError

DEPTH_MODEL = "LiheYoung/depth-anything-large-hf"
INSTALL = "run `pip install -e '.[control]'`, or give a ready control picture"


def check(kind: str) -> None:
    """UserError unless the package that "canny" or "depth" needs is installed."""
    package, name = ("cv2", "OpenCV") if kind == "canny" else ("transformers", "transformers")
    if find_spec(package) is None:
        raise UserError(f"{kind} needs {name}, which is not installed: {INSTALL}")


def canny(picture: Image.Image) -> Image.Image:
    """An RGB picture -> its edges, white on black, RGB."""
    check("canny")
    import cv2

    return Image.fromarray(cv2.Canny(np.asarray(picture), 50, 200)).convert("RGB")


@torch.inference_mode()
def depth(
    picture: Image.Image, model: str = DEPTH_MODEL, device: torch.device | str = "cpu"
) -> Tensor:
    """An RGB picture -> its inverse depth as pixels (1, 3, H, W), float32; near is bright. `model`: a repository or a folder.

    They are to be used as they are, on the network's own scale, neither normalised nor rounded, nor bound to [-1, 1]; the
    picture that `to_images` makes of them is to look at.
    """
    processor, network = _depth_anything(model)
    inputs = processor(picture, return_tensors="pt")["pixel_values"].to(
        device
    )  # (1, 3, 14·h, 14·w)
    predicted = repeat(network.to(device)(inputs).predicted_depth, "1 h w -> 1 3 h w")
    size = picture.height, picture.width
    return (
        F.interpolate(predicted, size, mode="bicubic", antialias=True) / 127.5 - 1
    )  # (1, 3, H, W)


def _depth_anything(model: str):
    """The processor and the network of a repository or a folder, complete."""
    check("depth")
    # this processor resizes with Pillow, as all did at the time of FLUX.1; torchvision's pixels differ
    from transformers import DepthAnythingForDepthEstimation, DPTImageProcessorPil

    try:
        processor = DPTImageProcessorPil.from_pretrained(model)
        network, report = DepthAnythingForDepthEstimation.from_pretrained(
            model, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the depth model {model} cannot be loaded ({reason:.200}): name another, or give a ready map"
        ) from None
    if report["missing_keys"]:  # transformers would leave these random
        lacks = f"{len(report['missing_keys'])} tensors, {min(report['missing_keys'])} among them"
        raise UserError(
            f"the depth model {model} lacks {lacks}: it is not a Depth Anything model, or damaged"
        )
    return processor, network.eval()
