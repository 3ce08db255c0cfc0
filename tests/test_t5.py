"""flux.t5 equals transformers' T5EncoderModel: results to the bit, and tensors at full size."""

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from flux.parity.reference import (
    max_error,
    relative_l2,
    shapes,
    t5_to_transformers,
    transformers_t5,
)
from flux.t5 import T5, T5Config, relative_position_bucket

# Heads that do not add up to the hidden size, and an eps large enough to change results.
TINY = T5Config(
    vocab_size=100, hidden_size=48, head_dim=8, num_heads=4, mlp_size=80, depth=3, eps=1e-3
)
PAD, EOS = 0, 1


def random_state(config: T5Config, seed: int = 0) -> dict[str, Tensor]:
    """Return values of realistic size: logits of a few units, a bias of one, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        empty = T5(config).state_dict()
    state = {name: torch.randn(x.shape, generator=generator) for name, x in empty.items()}
    for name, tensor in state.items():
        if name.endswith("layer_norm.weight"):
            tensor.mul_(0.3).add_(1)
        elif tensor.ndim == 2 and "shared" not in name and "bias" not in name:
            tensor.mul_(tensor.shape[1] ** -0.5)
        if name.endswith("SelfAttention.q.weight"):
            tensor.mul_(2 * config.head_dim**-0.5)
    return state


def build(config: T5Config, state: dict[str, Tensor]) -> T5:
    """Build as the loader does: without memory until the checkpoint's tensors are assigned."""
    with torch.device("meta"):
        model = T5(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def prompts(batch: int, length: int, seed: int = 1) -> Tensor:
    """Return rows of random tokens, an end of text and padding; each is shorter than the last."""
    ids = torch.randint(
        2, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )
    for row in range(batch):
        end = max(length - 1 - row * length // 3, 0)
        ids[row, end], ids[row, end + 1 :] = EOS, PAD
    return ids


def both(dtype: torch.dtype, length: int, attention: str) -> tuple[Tensor, Tensor]:
    """Return our result and the reference's."""
    state = {name: tensor.to(dtype) for name, tensor in random_state(TINY).items()}
    theirs = transformers_t5(TINY, attention).to(dtype)
    theirs.load_state_dict(t5_to_transformers(state), strict=True)
    ids = prompts(3, length)
    return build(TINY, state)(ids), theirs(ids).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 2, 17, 128, 300])
@torch.no_grad()
def test_equals_transformers_to_the_bit(length: int, dtype: torch.dtype):
    ours, theirs = both(dtype, length, "sdpa")
    assert ours.dtype == dtype and torch.equal(ours, theirs)


@torch.no_grad()
def test_float32_is_near_attention_written_out():
    """Attention without a fused kernel adds in another order: 6e-6 apart at length 300."""
    for length in (1, 17, 300):
        assert max_error(*both(torch.float32, length, "eager")) <= 1e-5


@torch.no_grad()
def test_bfloat16_rounds_little():
    """Against float32 arithmetic with the same bfloat16 weights."""
    state = {name: tensor.bfloat16() for name, tensor in random_state(TINY).items()}
    wide = {name: tensor.float() for name, tensor in state.items()}
    ids = prompts(4, 200)
    error = relative_l2(build(TINY, state)(ids), build(TINY, wide)(ids))
    assert 1e-3 < error < 2e-2


@torch.no_grad()
def test_row_does_not_depend_on_batch():
    model, ids = build(TINY, random_state(TINY)), prompts(3, 64)
    batch = model(ids)
    for row in range(len(ids)):
        assert max_error(batch[row : row + 1], model(ids[row : row + 1])) <= 1e-6


@pytest.mark.parametrize(
    "num_buckets, max_distance", [(32, 128), (32, 256), (16, 128), (8, 20), (14, 50)]
)
def test_relative_position_bucket_equals_transformers(num_buckets: int, max_distance: int):
    offset = torch.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(
        offset, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(relative_position_bucket(offset, num_buckets, max_distance), expected)


def test_full_size_tensors_equal_transformers():
    with torch.device("meta"):
        ours, theirs = T5(T5Config()).state_dict(), transformers_t5(T5Config()).state_dict()
    assert shapes(t5_to_transformers(ours)) == shapes(theirs)
    assert len(ours) == 219
    assert sum(tensor.numel() for tensor in ours.values()) == 4_762_310_656


def test_defaults_that_no_shape_shows():
    """From config.json of google/t5-v1_1-xxl."""
    c = T5Config()
    assert (c.num_heads, c.head_dim, c.max_distance, c.eps) == (64, 64, 128, 1e-6)
