"""flux.clip against transformers' CLIPTextModel: equal numbers on tiny random weights, equal tensors at full size."""

import pytest
import torch
from torch import Tensor

from flux.clip import CLIP, CLIPConfig
from flux.parity.reference import clip_to_transformers, max_error, relative_l2, transformers_clip

# An eps large enough to be missed.
TINY = CLIPConfig(
    vocab_size=100, hidden_size=48, num_heads=4, mlp_size=80, depth=3, eos_id=99, eps=1e-3
)
BOS, EOS = 98, 99


def random_state(config: CLIPConfig, seed: int = 0) -> dict[str, Tensor]:
    """A value of sensible size for every tensor: logits of a few units, norms around one, biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CLIP(config).state_dict().items()}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
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
    """Made as the loader makes it: no memory until the checkpoint's tensors are assigned."""
    with torch.device("meta"):
        model = CLIP(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def prompts() -> Tensor:
    """Padded with the end of text: an empty prompt, a short one, a full one, and one with tokens after its end."""
    ids = torch.randint(0, BOS, (4, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    ids[0, 1:] = EOS
    ids[1, 9:] = EOS
    ids[2, 76] = EOS
    ids[3, 20], ids[3, 40:] = EOS, EOS
    return ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("eos_id", [2, EOS])
@torch.no_grad()
def test_float32_equals_transformers(eos_id: int, attention: str):
    """Both ways in which transformers finds the end: the largest id (the released config), the first `eos_id`."""
    state, ids = random_state(TINY), prompts()
    theirs = transformers_clip(TINY, eos_id, attention)
    theirs.load_state_dict(clip_to_transformers(state), strict=True)
    expected = theirs(ids)
    first = torch.stack(
        [hidden[end] for hidden, end in zip(expected.last_hidden_state, (1, 9, 76, 20))]
    )
    assert torch.equal(expected.pooler_output, first)
    ours = build(TINY, state)(ids)
    for row in range(len(ids)):
        assert max_error(ours[row], expected.pooler_output[row]) <= 1e-6


@torch.no_grad()
def test_shorter_rows_equal_transformers():
    state, ids = random_state(TINY), prompts()[:2, :10]
    theirs = transformers_clip(TINY, EOS)
    theirs.load_state_dict(clip_to_transformers(state), strict=True)
    assert max_error(build(TINY, state)(ids), theirs(ids).pooler_output) <= 1e-6


@torch.no_grad()
def test_bfloat16_rounds_no_worse_than_transformers():
    """Both against float32 arithmetic on the same bfloat16 weights; the reference uses the same fused attention."""
    state = {name: tensor.bfloat16() for name, tensor in random_state(TINY).items()}
    ids = torch.randint(0, BOS, (64, 77), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(64), torch.arange(64) + 1] = EOS
    theirs = transformers_clip(TINY, EOS).bfloat16()
    theirs.load_state_dict(clip_to_transformers(state), strict=True)
    truth = build(TINY, {name: tensor.float() for name, tensor in state.items()})(ids)
    ours, theirs = build(TINY, state)(ids), theirs(ids).pooler_output
    assert ours.dtype == torch.bfloat16
    assert 1e-3 < relative_l2(ours, truth) <= 1.1 * relative_l2(theirs, truth)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch():
    model, ids = build(TINY, random_state(TINY)), prompts()
    batch = model(ids)
    for row in range(len(ids)):
        assert max_error(batch[row : row + 1], model(ids[row : row + 1])) <= 1e-6


def test_full_size_tensors_equal_transformers():
    with torch.device("meta"):
        ours, theirs = (
            CLIP(CLIPConfig()).state_dict(),
            transformers_clip(CLIPConfig(), eos_id=2).state_dict(),
        )
    assert {name: tensor.shape for name, tensor in clip_to_transformers(ours).items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert len(ours) == 196
    assert sum(tensor.numel() for tensor in ours.values()) == 123_060_480
    assert all(name.startswith("text_model.") for name in ours)


def test_defaults_that_no_shape_shows():
    """From the text part of config.json of openai/clip-vit-large-patch14, and its tokenizer's end of text."""
    config = CLIPConfig()
    assert (config.num_heads, config.eps, config.eos_id) == (12, 1e-5, 49407)
