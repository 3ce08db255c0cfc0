"""Whole LoRA files of trainers, at the released sizes, are placed completely.

The files are sparse: true headers, and no numbers. The right places are those of the rule that
made the names.
"""

from functools import cache

import pytest
from support.trainer_files import FILES, tensors
from support.weight_files import hollow
from torch import nn

from flux.clip import CLIP
from flux.configs import MODELS
from flux.language_model import LanguageModel
from flux.lora.formats import match_layers, read_lora
from flux.t5 import T5
from flux.training.networks import new_network
from flux.weights.load import init_empty


@cache
def networks(model: str) -> dict[str, nn.Module]:
    spec = MODELS[model]
    found = {"transformer": init_empty(lambda: new_network(spec.transformer))}
    if model.startswith("flux.1"):
        found["clip"] = init_empty(lambda: CLIP(spec.text.clip))
        return found | {"t5": init_empty(lambda: T5(spec.text.t5))}
    return found | {"language_model": init_empty(lambda: LanguageModel(spec.text.model))}


def placed(tmp_path, name: str) -> None:
    modules = networks(FILES[name].model)
    shapes, expected = tensors(FILES[name], modules)
    path = hollow(tmp_path / "x.safetensors", shapes)
    deltas = match_layers(read_lora(path), modules)
    found = [
        (target.part, target.path, target.rows[0][0] if len(target.rows) == 1 else 0,
         max(stop for _, stop in target.rows))
        for target in (delta.target for delta in deltas)
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)


def test_file_of_a_trainer_is_placed_completely(tmp_path):
    placed(tmp_path, "ai-toolkit, DoRA")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_trainer_is_placed_completely(tmp_path, name):
    placed(tmp_path, name)
