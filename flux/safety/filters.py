"""Content filters: what judges prompts and images, and from which score on one is refused.

A filter that cannot be loaded, or that gives no number, lets nothing pass.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from flux import arguments
from flux.errors import RefusedError, UserError
from flux.plain_files import MAX_JSON, parse_json, read_plain_file
from flux.safety.classifier import ImageClassifier, ViTConfig, preprocess
from flux.safety.judge import Judge, load_judge
from flux.safety.verdict import Verdict
from flux.weights.files import find_file, is_local
from flux.weights.load import init_empty, load_module

NSFW_REPOSITORY = "Falconsai/nsfw_image_detection"
NSFW_THRESHOLD = 0.85  # of BFL's code, where one place refuses this very score and another does not
KINDS = ("nsfw", "judge", "all")


class Filters:
    """The filters of a run: the classifier looks at images; the judge, at images and prompts."""

    def __init__(self, nsfw: "NSFWFilter | None" = None, judge: Judge | None = None):
        self.nsfw, self.judge = nsfw, judge
        self._of_text = lru_cache(4096)(judge.judge_text) if judge else None

    def judge_text(self, text: str | None) -> list[Verdict]:
        """Return what is said of a prompt; nothing of one without words, or without a judge."""
        return [self._of_text(text)] if self._of_text and text and text.strip() else []

    def judge_image(self, image: Image.Image) -> list[Verdict]:
        """Return what is said of an image. The judge is asked if the classifier refuses nothing."""
        verdicts = [self.nsfw.judge(image)] if self.nsfw else []
        if self.judge and not any(verdict.refused for verdict in verdicts):
            verdicts.append(self.judge.judge(image))
        return verdicts

    def check_texts(self, texts: Sequence[str | None], name: str = "prompts") -> None:
        """Raise RefusedError for a prompt that is refused."""
        for number, text in enumerate(texts, start=1):
            if reason := refusal(verdicts := self.judge_text(text)):
                raise RefusedError(f"{name}: number {number} is {reason}.", verdicts)

    def check_images(
        self, images: Sequence[Image.Image], mask: Image.Image | None = None, name: str = "images"
    ) -> None:
        """Raise RefusedError for an image, or a mask, that is refused."""
        given = [(f"number {number}", image) for number, image in enumerate(images, start=1)]
        for which, image in [*given, *([("the mask", mask)] if mask else [])]:
            if reason := refusal(verdicts := self.judge_image(image)):
                raise RefusedError(f"{name}: {which} is {reason}.", verdicts)


def refusal(verdicts: Sequence[Verdict]) -> str | None:
    """Return which filters refused, with their scores; None if none did."""
    flagged = [verdict for verdict in verdicts if verdict.refused]
    return f"refused by {', '.join(map(str, flagged))}" if flagged else None


def load_filters(
    kind: str, weights: str | Path | None = None, judge_device: torch.device | str = "cpu"
) -> Filters:
    """Load the filters "nsfw", "judge" or "all" from the folder `weights`.

    Without it, from $FLUX_WEIGHTS or the Hugging Face cache. UserError if a file is missing.
    """
    if kind not in KINDS:
        raise UserError(f"filter: {kind!r:.40} is unknown (expected {', '.join(KINDS)}).")
    folder = arguments.optional(arguments.to_path, "weights", weights)
    nsfw = load_nsfw_filter(folder) if kind in ("nsfw", "all") else None
    judge = load_judge(folder, judge_device) if kind in ("judge", "all") else None
    return Filters(nsfw, judge)


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
    with warnings.catch_warnings(action="ignore"):  # which say that all is finite
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
