"""Content filters: what judges an image, and from which score on an image is refused.

A filter that cannot be loaded, or that gives no number, lets nothing pass.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn

from flux.errors import UserError
from flux.plain_files import MAX_JSON, parse_json, read_plain_file
from flux.safety.classifier import ImageClassifier, ViTConfig, preprocess
from flux.weights.files import find_file, is_local
from flux.weights.load import init_empty, load_module

NSFW_REPOSITORY = "Falconsai/nsfw_image_detection"
NSFW_THRESHOLD = 0.85  # of BFL's code, where one place refuses this very score and another does not


class Verdict(NamedTuple):
    """What a filter says of one image."""

    filter: str
    score: float
    threshold: float

    @property
    def refused(self) -> bool:
        return not self.score < self.threshold  # refuses NaN, too

    def __str__(self) -> str:
        return f"{self.filter} {self.score:.3f} (refused from {self.threshold:g} on)"


@dataclass
class NSFWFilter:
    """The classifier with its weights, on the CPU in float32."""

    network: nn.Module
    config: ViTConfig
    label: int  # which logit is "nsfw"

    @torch.inference_mode()
    def judge(self, image: Image.Image) -> Verdict:
        """Score an image; 1 is NSFW."""
        pixels = preprocess(image.convert("RGB"), self.config.image_size)
        score = self.network(pixels).softmax(-1)[0, self.label].item()
        return Verdict("nsfw", score, NSFW_THRESHOLD)


def load_nsfw_filter(weights: Path | None = None) -> NSFWFilter:
    """Load the classifier from the folder `weights`, or from the Hugging Face cache.

    The folder is that of the two files, or above the repository's. Nothing is downloaded. UserError
    if a file is missing or damaged, or if a weight is not finite.
    """
    if not is_local(NSFW_REPOSITORY, "model.safetensors", weights):
        raise UserError(
            f"filter_weights: model.safetensors of {NSFW_REPOSITORY} is not there. Get it and "
            f"config.json from https://huggingface.co/{NSFW_REPOSITORY}: filters are not "
            "downloaded by themselves."
        )
    file = find_file(NSFW_REPOSITORY, "model.safetensors", weights)
    config, labels = _read_config(file.with_name("config.json"))
    network = init_empty(lambda: ImageClassifier(config, len(labels)))
    load_module(network, [file], dtype=torch.float32, check_finite=True)
    return NSFWFilter(network, config, labels.index("nsfw"))


def _read_config(path: Path) -> tuple[ViTConfig, list[str]]:
    """Return the sizes and the labels in the order of the logits."""
    text = read_plain_file(path, MAX_JSON, "the classifier's config.json")
    try:
        values = parse_json(text)
        sizes = {
            field.name: field.type(values.get(field.name, field.default))  # type: ignore[operator]
            for field in fields(ViTConfig)
        }
        names = values["id2label"]
        labels = [names[str(index)] for index in range(len(names))]
        config = ViTConfig(**sizes)
        if values["model_type"] != "vit" or values.get("hidden_act", "gelu") != "gelu":
            raise ValueError
        if not values.get("qkv_bias", True) or labels.count("nsfw") != 1:
            raise ValueError
        if not all(0 < size <= 2**16 for size in sizes.values()):
            raise ValueError
        if config.hidden_size % config.num_attention_heads or config.num_hidden_layers > 200:
            raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        raise UserError(
            f"filter_weights: {path} does not describe a ViT with the label nsfw. Get the "
            f"config.json of {NSFW_REPOSITORY}."
        ) from None
    return config, labels
