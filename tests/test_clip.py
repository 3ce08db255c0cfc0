"""flux.clip equals transformers' CLIPTextModel: results to the bit, and tensors at full size."""

import pytest
import torch
from torch import Tensor

from flux.clip import CLIP, CLIPConfig
from flux.parity.reference import (
    clip_to_transformers,
    max_error,
    relative_l2,
    shapes,
    transformers_clip,
)

# An eps large enough to change results.
TINY = CLIPConfig(
    vocab_size=100, hidden_size=48, num_heads=4, mlp_size=80, depth=3, eos_id=99, eps=1e-3
)
BOS, EOS = 98, 99


def random_state(config: CLIPConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return values of realistic size: logits of a few units, norms around one, large biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        empty = CLIP(config).state_dict()
    state = {name: torch.randn(x.shape, generator=generator) for name, x in empty.items()}
    for name, tensor in state.items():
        if "embedding" in name:
            continue
        tensor.mul_(tensor.shape[1] ** -0.5 if tensor.ndim == 2 else 0.3)
        if "norm" in name and name.endswith("weight"):
            tensor.add_(1)
        if "q_proj" in name:
            tensor.mul_(2)
    return state


def build(config: CLIPConfig, state: dict[str, Tensor]) -> CLIP:
    """Build as the loader does: without memory until the checkpoint's tensors are assigned."""
    with torch.device("meta"):
        model = CLIP(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def prompts() -> Tensor:
    """Return an empty prompt, a short one, a full one, and one with tokens after its end."""
    ids = torch.randint(0, BOS, (4, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    ids[0, 1:] = EOS
    ids[1, 9:] = EOS
    ids[2, 76] = EOS
    ids[3, 20], ids[3, 40:] = EOS, EOS
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("eos_id", [2, EOS])
@torch.no_grad()
def test_equals_transformers_to_the_bit(eos_id: int, dtype: torch.dtype):
    """With both ways in which transformers finds the end: the largest id, or the first `eos_id`."""
    state = {name: tensor.to(dtype) for name, tensor in random_state(TINY).items()}
    theirs = transformers_clip(TINY, eos_id).to(dtype)
    theirs.load_state_dict(clip_to_transformers(state), strict=True)
    for ids in (prompts(), prompts()[:2, :10]):
        ours = build(TINY, state)(ids)
        assert ours.dtype == dtype and torch.equal(ours, theirs(ids).pooler_output)


@torch.no_grad()
def test_pooled_vector_is_the_first_end_of_text():
    state = random_state(TINY)
    theirs = transformers_clip(TINY, EOS, "eager")
    theirs.load_state_dict(clip_to_transformers(state), strict=True)
    hidden = theirs(prompts()).last_hidden_state
    first = torch.stack([row[end] for row, end in zip(hidden, (1, 9, 76, 20))])
    assert max_error(build(TINY, state)(prompts()), first) <= 1e-6


@torch.no_grad()
def test_bfloat16_rounds_little():
    """Against float32 arithmetic with the same bfloat16 weights."""
    state = {name: tensor.bfloat16() for name, tensor in random_state(TINY).items()}
    wide = {name: tensor.float() for name, tensor in state.items()}
    error = relative_l2(build(TINY, state)(prompts()), build(TINY, wide)(prompts()))
    assert 1e-3 < error < 2e-2


@torch.no_grad()
def test_row_does_not_depend_on_batch():
    model, ids = build(TINY, random_state(TINY)), prompts()
    batch = model(ids)
    for row in range(len(ids)):
        assert max_error(batch[row : row + 1], model(ids[row : row + 1])) <= 1e-6


def test_full_size_tensors_equal_transformers():
    with torch.device("meta"):
        ours = CLIP(CLIPConfig()).state_dict()
        theirs = transformers_clip(CLIPConfig(), eos_id=2).state_dict()
    assert shapes(clip_to_transformers(ours)) == shapes(theirs)
    assert len(ours) == 196
    assert sum(tensor.numel() for tensor in ours.values()) == 123_060_480
    assert all(name.startswith("text_model.") for name in ours)


def test_defaults_that_no_shape_shows():
    """From config.json of openai/clip-vit-large-patch14, and its tokenizer's end of text."""
    config = CLIPConfig()
    assert (config.num_heads, config.eps, config.eos_id) == (12, 1e-5, 49407)
