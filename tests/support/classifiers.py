"""Tiny NSFW classifiers in the layout of the released file."""

from pathlib import Path

import torch

SIZES = dict(image_size=32, patch_size=8, hidden_size=32, intermediate_size=64)
SIZES |= dict(num_attention_heads=4, num_hidden_layers=2, layer_norm_eps=1e-12)
LABELS = {0: "normal", 1: "nsfw"}


def transformers_classifier(**changes):
    """Return transformers' classifier with random weights: every parameter, biases too."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SIZES | dict(id2label=LABELS) | changes)
    model = ViTForImageClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def save_random_classifier(folder: Path, **changes):
    """Write config.json and model.safetensors as transformers does; return its model."""
    model = transformers_classifier(**changes)
    model.save_pretrained(folder)
    return model


def save_red_classifier(folder: Path) -> float:
    """Train a classifier that calls the toy's drawings with something red "nsfw", and save it.

    Return its accuracy on other drawings.
    """
    import json

    import numpy as np
    import torch.nn.functional as F
    from PIL import Image
    from safetensors.torch import save_file

    from flux import toy
    from flux.safety.classifier import ImageClassifier, ViTConfig, preprocess
    from flux.toy.scenes import arrange, scenes

    rng, pixels, labels = np.random.default_rng(0), [], []
    for scene, _ in zip(scenes(0, None), range(1400)):
        layout = arrange(scene, rng)
        colours = {item.thing.colour for item in layout.items} | {layout.background}
        pixels.append(preprocess(Image.fromarray(toy.draw(layout, 64, 64)), SIZES["image_size"]))
        labels.append(int("red" in colours))
    x, y = torch.cat(pixels), torch.tensor(labels)
    network = ImageClassifier(ViTConfig(**SIZES))
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.constant_(parameter, float("norm" in name and "weight" in name))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(400):
        rows = torch.randint(1200, (64,))
        weight = torch.tensor([1.0, 3.0])  # a third of the drawings shows something red
        loss = F.cross_entropy(network(x[rows]), y[rows], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    config = SIZES | dict(model_type="vit", id2label=LABELS)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    with torch.no_grad():
        return (network(x[1200:]).argmax(-1) == y[1200:]).float().mean().item()
