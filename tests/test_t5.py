"""flux.t5 against transformers' T5EncoderModel: equal numbers on tiny random weights, equal tensors at full size."""

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from flux.parity.reference import max_error, relative_l2, t5_to_transformers, transformers_t5
from flux.t5 import T5, T5Config, relative_position_bucket

# Heads that do not add up to the hidden size, and an eps large enough to be missed.
TINY = T5Config(
    vocab_size=100, hidden_size=48, head_dim=8, num_heads=4, mlp_size=80, depth=3, eps=1e-3
)
PAD, EOS = 0, 1


def random_state(config: T5Config, seed: int = 0) -> dict[str, Tensor]:
    """A value of sensible size for every tensor: logits of a few units, bias of one, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in T5(config).state_dict().items()}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in state.items():
        if name.endswith("layer_norm.weight"):
            tensor.mul_(0.3).add_(1)
        elif tensor.ndim == 2 and "shared" not in name and "bias" not in name:
            tensor.mul_(tensor.shape[1] ** -0.5)
        if name.endswith("SelfAttention.q.weight"):
            tensor.mul_(2 * config.head_dim**-0.5)
    return state


def build(config: T5Config, state: dict[str, Tensor]) -> T5:
    """Made as the loader makes it: no memory until the checkpoint's tensors are assigned."""
    with torch.device("meta"):
        model = T5(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def prompts(batch: int, length: int, seed: int = 1) -> Tensor:
    """Rows of random tokens, an end of text and pads; row k is shorter than row k-1, and the first is full."""
    ids = torch.randint(
        2, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )
    for row in range(batch):
        end = max(length - 1 - row * length // 3, 0)
        ids[row, end], ids[row, end + 1 :] = EOS, PAD
    return ids


@pytest.mark.parametrize("attention, tolerance", [("sdpa", 1e-6), ("eager", 1e-5)])
@pytest.mark.parametrize("length", [1, 2, 17, 128, 300])
@torch.no_grad()
def test_float32_equals_transformers(length: int, attention: str, tolerance: float):
    """The written-out attention sums in another order: at length 300 it is 6e-6 from transformers' own fused one."""
    state, ids = random_state(TINY), prompts(3, length)
    theirs = transformers_t5(TINY, attention)
    theirs.load_state_dict(t5_to_transformers(state), strict=True)
    assert max_error(build(TINY, state)(ids), theirs(ids).last_hidden_state) <= tolerance


@torch.no_grad()
def test_bfloat16_rounds_no_worse_than_transformers():
    """Both against float32 arithmetic on the same bfloat16 weights; the reference uses the same fused attention."""
    state = {name: tensor.bfloat16() for name, tensor in random_state(TINY).items()}
    ids = prompts(4, 200)
    theirs = transformers_t5(TINY).bfloat16()
    theirs.load_state_dict(t5_to_transformers(state), strict=True)
    truth = build(TINY, {name: tensor.float() for name, tensor in state.items()})(ids)
    ours, theirs = build(TINY, state)(ids), theirs(ids).last_hidden_state
    assert ours.dtype == torch.bfloat16
    assert 1e-3 < relative_l2(ours, truth) <= 1.1 * relative_l2(theirs, truth)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch():
    model, ids = build(TINY, random_state(TINY)), prompts(3, 64)
    batch = model(ids)
    for row in range(len(ids)):
        assert max_error(batch[row : row + 1], model(ids[row : row + 1])) <= 1e-6


@pytest.mark.parametrize(
    "num_buckets, max_distance", [(32, 128), (32, 256), (16, 128), (8, 20), (14, 50)]
)
def test_relative_buckets_equal_transformers(num_buckets: int, max_distance: int):
    offset = torch.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(
        offset, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(relative_position_bucket(offset, num_buckets, max_distance), expected)


def test_full_size_tensors_equal_transformers():
    with torch.device("meta"):
        ours, theirs = T5(T5Config()).state_dict(), transformers_t5(T5Config()).state_dict()
    assert {name: tensor.shape for name, tensor in t5_to_transformers(ours).items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert len(ours) == 219
    assert sum(tensor.numel() for tensor in ours.values()) == 4_762_310_656


def test_defaults_that_no_shape_shows():
    """From config.json of google/t5-v1_1-xxl."""
    config = T5Config()
    assert (config.num_heads, config.head_dim, config.max_distance, config.eps) == (
        64,
        64,
        128,
        1e-6,
    )
