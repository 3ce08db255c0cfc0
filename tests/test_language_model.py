"""flux.language_model equals transformers' Qwen3, Qwen3-VL and Mistral3 to the bit.

The reference attends with PyTorch's SDPA, its default: padding that sees no token attends to
nothing.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux.language_model import LanguageModel, LanguageModelConfig
from flux.parity.reference import (
    language_model_to_transformers,
    max_error,
    randomise,
    relative_l2,
    shapes,
    transformers_features,
    transformers_language_model,
    with_trunk,
)
from flux.parity.reference3 import (
    QWEN_VL_PREFIX,
    qwen_vl_features,
    qwen_vl_with,
    transformers_qwen_vl,
)

# Heads that do not add up to the hidden size, two query heads for each key head.
QWEN = LanguageModelConfig(
    layers=(2, 4, 6),
    vocab_size=100,
    hidden_size=48,
    mlp_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
MISTRAL = replace(QWEN, layers=(1, 3, 5), theta=1e9, eps=1e-5, qk_norm=False)
QWEN_VL = replace(QWEN, layers=(1, 3, 4, 6), theta=5e6, padding_position=1)
DEPTH, LENGTH = 8, 20
either_model = pytest.mark.parametrize("config", [QWEN, MISTRAL], ids=["qwen", "mistral"])


def prompts() -> Tensor:
    return torch.randint(
        0, QWEN.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(0)
    )


def mask(side: str) -> Tensor:
    """Return rows of 20, 13, 6 and 1 real tokens; without padding, of 20 each."""
    real = torch.arange(LENGTH) < torch.tensor([20, 13, 6, 1])[:, None]
    return {"right": real, "left": real.flip(1), "no": torch.ones_like(real)}[side]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["right", "left", "no"])
@either_model
@torch.no_grad()
def test_every_row_equals_transformers(config, side, dtype):
    """Rows of padding too, since the FLUX transformer attends to them."""
    ours = randomise(LanguageModel(config)).to(dtype)
    mistral = not config.qk_norm
    theirs = with_trunk(
        transformers_language_model(config, DEPTH, mistral), ours.state_dict(), mistral
    )
    inputs = prompts(), mask(side)
    features, expected = ours(*inputs), transformers_features(theirs, *inputs, config.layers)
    assert features.shape == (4, LENGTH, config.features) and features.dtype == dtype
    assert expected.std() > 0.5 and torch.equal(features, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_every_row_equals_qwen_vl(dtype):
    """With the positions of FLUX 3: padding tokens have position 1, and so are all alike."""
    ours = randomise(LanguageModel(QWEN_VL)).to(dtype)
    theirs = qwen_vl_with(transformers_qwen_vl(QWEN_VL, DEPTH), ours.state_dict())
    ids = prompts().masked_fill(~mask("right"), 7)  # one token pads
    features = ours(ids, mask("right"))
    expected = qwen_vl_features(theirs, ids, mask("right"), QWEN_VL.layers)
    assert features.dtype == dtype and expected.std() > 0.5
    assert torch.equal(features, expected)
    padding = features[3, 1:]
    assert max_error(padding, padding[:1].expand_as(padding)) <= (
        0.01 if dtype.itemsize == 2 else 1e-5
    )
    counted = LanguageModel(replace(QWEN_VL, padding_position=None)).to(dtype)
    counted.load_state_dict(ours.state_dict())
    other = counted(ids, mask("right"))
    assert torch.equal(other[mask("right")], features[mask("right")])
    assert relative_l2(other[~mask("right")], features[~mask("right")]) > 0.05


@either_model
@torch.no_grad()
def test_bfloat16_rounds_little(config):
    """Against float32 arithmetic with the same bfloat16 weights."""
    ours = randomise(LanguageModel(config)).bfloat16()
    narrow = ours(prompts(), mask("left"))
    assert 1e-3 < relative_l2(narrow, ours.float()(prompts(), mask("left"))) <= 0.015


@either_model
@torch.no_grad()
def test_short_model_equals_the_first_layers_of_a_long_one(config):
    longer = randomise(LanguageModel(replace(config, layers=(*config.layers, DEPTH))))
    shorter = LanguageModel(config)
    shorter.load_state_dict({name: longer.state_dict()[name] for name in shorter.state_dict()})
    assert len(shorter.layers) == max(config.layers) < len(longer.layers)
    features, more = shorter(prompts(), mask("left")), longer(prompts(), mask("left"))
    assert torch.equal(features, more[..., : config.features]) and more.shape[-1] > config.features


@either_model
@torch.no_grad()
def test_padding_on_the_left_attends_to_nothing(config):
    """Padding sees no token, not even itself: only the MLPs change its embedding."""
    ours, padding = randomise(LanguageModel(config)), ~mask("left")
    x, hidden_states = ours.embed_tokens(prompts()), []
    for number, layer in enumerate(ours.layers, start=1):
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        if number in config.layers:
            hidden_states.append(x)
    expected = torch.cat(hidden_states, dim=-1)
    assert max_error(ours(prompts(), mask("left"))[padding], expected[padding]) <= 1e-6


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=str)
@torch.no_grad()
def test_padding_on_the_left_is_zero_on_each_backend_of_a_cpu(backend):
    ours = randomise(LanguageModel(MISTRAL))
    padding, seen = ~mask("left"), []
    for layer in ours.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out))
    with sdpa_kernel(backend):
        ours(prompts(), mask("left"))
    assert len(seen) == len(ours.layers)
    for out in seen:
        assert (out[padding] == 0).all() and (out[~padding] != 0).any(-1).all()


@torch.no_grad()
def test_padding_on_the_left_is_zero_where_a_backend_gives_nan(monkeypatch):
    """A softmax over no key is 0 / 0. Some kernels of GPUs return this quotient."""
    ours = randomise(LanguageModel(MISTRAL))
    expected = ours(prompts(), mask("left"))
    attend = F.scaled_dot_product_attention

    def with_nan(q, k, v, attn_mask):
        empty = ~attn_mask.any(-1, keepdim=True)
        assert empty.any()
        return attend(q, k, v, attn_mask=attn_mask).masked_fill(empty, float("nan"))

    monkeypatch.setattr(F, "scaled_dot_product_attention", with_nan)
    assert torch.equal(ours(prompts(), mask("left")), expected)


@pytest.mark.parametrize("side", ["right", "left"])
@either_model
@torch.no_grad()
def test_padding_is_seen_by_itself_only(config, side):
    ours, ids, row = randomise(LanguageModel(config)), prompts(), 2  # 6 real tokens
    column = 3 if side == "left" else LENGTH - 3
    other = ids.clone()
    other[row, column] = (ids[row, column] + 1) % config.vocab_size
    changed = (ours(ids, mask(side)) != ours(other, mask(side))).any(-1)
    assert changed.nonzero().tolist() == [[row, column]]


@either_model
@torch.no_grad()
def test_padding_on_the_right_does_not_change_real_tokens(config):
    ours, ids = randomise(LanguageModel(config)), prompts()
    padded = ours(ids, mask("right"))
    for row, length in enumerate((20, 13, 6, 1)):
        alone = ours(ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool))
        assert max_error(padded[row : row + 1, :length], alone) <= 1e-6


# ------------------------------------------------------------------ full size

QWEN_4B = LanguageModelConfig()
QWEN_8B = replace(QWEN_4B, hidden_size=4096, mlp_size=12288)
MISTRAL_SMALL = LanguageModelConfig(
    layers=(10, 20, 30),
    vocab_size=131072,
    hidden_size=5120,
    mlp_size=32768,
    theta=1e9,
    eps=1e-5,
    qk_norm=False,
)


@pytest.mark.parametrize(
    "config, depth, tied, published, tensors, parameters",
    [
        (QWEN_4B, 36, True, 4_022_468_096, 298, 3_114_088_192),
        (QWEN_8B, 36, False, 8_190_735_360, 298, 5_831_883_520),
        (MISTRAL_SMALL, 40, False, 23_572_403_200, 271, 17_343_754_240),
    ],
    ids=["qwen-4b", "qwen-8b", "mistral-small"],
)
def test_full_size_tensors_equal_transformers(config, depth, tied, published, tensors, parameters):
    """`published`: parameters of the language model, final norm and head included."""
    mistral = not config.qk_norm
    with torch.device("meta"):
        ours = LanguageModel(config).state_dict()
        full = LanguageModel(replace(config, layers=(depth,))).state_dict()
        theirs = shapes(transformers_language_model(config, depth, mistral).state_dict())
    no_trunk = ("lm_head.", "norm.weight", "vision_tower.", "multi_modal_projector.")
    trunk = {
        name: shape
        for name, shape in theirs.items()
        if not name.removeprefix("model.").startswith(no_trunk)
    }
    trunk.pop("model.language_model.norm.weight", None)
    assert shapes(language_model_to_transformers(full, mistral)) == trunk
    assert shapes(ours).items() < shapes(full).items()

    assert (len(ours), sum(tensor.numel() for tensor in ours.values())) == (tensors, parameters)
    head = 0 if tied else config.vocab_size * config.hidden_size
    assert sum(tensor.numel() for tensor in full.values()) + config.hidden_size + head == published


def test_full_size_tensors_are_those_of_qwen_vl():
    """Counts of the released file: with its image encoder, and what FLUX 3 reads."""
    config = replace(QWEN_4B, layers=tuple(range(4, 33, 4)), theta=5_000_000.0, padding_position=1)
    with torch.device("meta"):
        ours = LanguageModel(config).state_dict()
        theirs = shapes(transformers_qwen_vl(config, 36).state_dict())
    assert (len(ours), sum(tensor.numel() for tensor in ours.values())) == (353, 3_618_742_272)
    assert config.features == 20_480
    assert {
        QWEN_VL_PREFIX + name: shape for name, shape in shapes(ours).items()
    }.items() <= theirs.items()
