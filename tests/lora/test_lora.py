"""flux.lora: every layout matches its layers, and merged weights equal W + scale · alpha/rank · BA.

The references: sums in float64 with the names that each trainer writes; diffusers' own loader with
the same file, for what it loads correctly; PEFT's adapters in our network, for DoRA, LoHa, LoKr and
rank-stabilized LoRA.
"""

import copy
import functools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.load_script import script
from support.lora_files import control_lora, random
from support.weight_files import entry, raw, refusal, saved
from torch import Tensor, nn

from flux import sampling
from flux.clip import CLIP
from flux.lora.formats import match_layers, read_lora
from flux.lora.merge import Target, merge
from flux.parity.reference import (
    FLUX1_TINY,
    FLUX2_TINY,
    KLEIN_TINY,
    TINY_CLIP,
    TINY_T5,
    diffusers_pipeline,
    diffusers_velocity,
    max_error,
    networks,
    randomise,
    tiny_models,
    transformer_to_diffusers,
)
from flux.runtime.lazy_module import LazyModule
from flux.t5 import T5
from flux.transformer import Flux, FluxConfig
from flux.weights.load import load_module
from flux.weights.quantization import QuantizedLinear

RANK, ALPHA, SCALE = 4, 6.0, 0.7
# float32 roundings: products and sums of BA, two scales, the last sum and slack, 2^-24 each.
TOLERANCE = (RANK + 4) * 2**-24
CONFIGS = {"flux.1": FLUX1_TINY, "flux.2": FLUX2_TINY}
Layers = dict[str, tuple[str, Tensor]]  # name in a file -> path of our module, indices of rows
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


@pytest.fixture(params=CONFIGS)
def network(request) -> Flux:
    return randomise(Flux(CONFIGS[request.param]))


# ------------------------------------------------------------------ layouts


def our_layers(module: nn.Module) -> Layers:
    linears = {
        path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)
    }
    return {path: (path, torch.arange(layer.out_features)) for path, layer in linears.items()}


def diffusers_layers(network: Flux) -> Layers:
    """Return diffusers' layers, by row indices sent through the reference's map of weights."""
    layers = list(our_layers(network).values())
    numbered = {f"{path}.weight": 1_000_000 * i + rows for i, (path, rows) in enumerate(layers)}
    theirs = transformer_to_diffusers(numbered, network.config)
    return {
        name.removesuffix(".weight"): (layers[rows[0] // 1_000_000][0], rows % 1_000_000)
        for name, rows in theirs.items()
    }


def xlabs_layers(network: Flux) -> Layers:
    """Names in XLabs-AI/x-flux, src/flux/modules/layers.py: processors of FLUX.1's attention."""
    d, out = network.config.hidden_size, {}
    for n in range(network.config.depth):
        for number, stream in ((1, "img"), (2, "txt")):
            out[f"double_blocks.{n}.processor.qkv_lora{number}"] = (
                f"double_blocks.{n}.{stream}_attn.qkv",
                torch.arange(3 * d),
            )
            out[f"double_blocks.{n}.processor.proj_lora{number}"] = (
                f"double_blocks.{n}.{stream}_attn.proj",
                torch.arange(d),
            )
    for n in range(network.config.depth_single):
        out[f"single_blocks.{n}.processor.qkv_lora"] = (
            f"single_blocks.{n}.linear1",
            torch.arange(3 * d),
        )
        out[f"single_blocks.{n}.processor.proj_lora"] = (
            f"single_blocks.{n}.linear2",
            torch.arange(d),
        )
    return out


def flat(layers: Layers) -> Layers:
    return {name.replace(".", "_"): where for name, where in layers.items()}


FORMATS = {  # layers, prefix, ends of keys, whether there is an alpha, LoraFile.format
    "diffusers": (diffusers_layers, "transformer.", AB, False, "diffusers"),
    "diffusers, alpha": (diffusers_layers, "transformer.", AB, True, "diffusers"),
    "diffusers, old": (
        diffusers_layers,
        "transformer.",
        ("lora.down.weight", "lora.up.weight"),
        True,
        "diffusers",
    ),
    "diffusers, down": (diffusers_layers, "transformer.", DOWN_UP, True, "diffusers"),
    "diffusers, bare": (diffusers_layers, "", AB, False, "diffusers"),
    "diffusers, comfy": (diffusers_layers, "diffusion_model.", AB, True, "ComfyUI"),
    "PEFT": (our_layers, "base_model.model.", AB, False, "PEFT"),
    "PEFT, adapter": (
        our_layers,
        "base_model.model.",
        ("lora_A.default.weight", "lora_B.default.weight"),
        False,
        "PEFT",
    ),
    "kohya": (lambda network: flat(our_layers(network)), "lora_unet_", DOWN_UP, True, "kohya"),
    "OneTrainer": (
        lambda network: flat(diffusers_layers(network)),
        "lora_transformer_",
        DOWN_UP,
        True,
        "OneTrainer",
    ),
    "LyCORIS": (
        lambda network: flat(diffusers_layers(network)),
        "lycoris_",
        DOWN_UP,
        True,
        "LyCORIS",
    ),
    "ai-toolkit": (our_layers, "diffusion_model.", AB, False, "ComfyUI"),
    "ai-toolkit, transformer": (our_layers, "transformer.", AB, False, "BFL"),
    "ComfyUI": (our_layers, "diffusion_model.", DOWN_UP, True, "ComfyUI"),
    "ComfyUI, model": (our_layers, "model.diffusion_model.", DOWN_UP, True, "BFL"),
    "BFL": (our_layers, "", AB, False, "BFL"),
    "XLabs": (xlabs_layers, "", ("down.weight", "up.weight"), False, "XLabs"),
}
every_layout = pytest.mark.parametrize(
    "network, name",
    [
        (family, name)
        for family in CONFIGS
        for name in FORMATS
        if (family, name) != ("flux.2", "XLabs")  # it wrote for FLUX.1
    ],
    indirect=["network"],
)


def factors(module: nn.Module, path: str, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, columns) and B (rows, rank), whose product is as large as the weight."""
    columns = module.get_submodule(path).weight.shape[1]
    return random(RANK, columns, seed=seed), random(
        len(rows), RANK, seed=seed + 1, size=0.5 / columns**0.5
    )


def lora_file(
    path: Path, module: nn.Module, name: str, seed: int = 0, only: Layers | None = None
) -> Path:
    layers, prefix, (down, up), alpha, _ = FORMATS[name]
    tensors = {}
    for i, (layer, where) in enumerate((only if only is not None else layers(module)).items()):
        a, b = factors(module, *where, seed=seed + 10 * i)
        tensors |= {f"{prefix}{layer}.{down}": a, f"{prefix}{layer}.{up}": b}
        if alpha:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(ALPHA)
    return saved(path, tensors)


def by_hand(module: nn.Module, layers: Layers, scaling: float, seed: int = 0) -> dict[str, Tensor]:
    """Return the state after the merge, in float64."""
    state = {name: tensor.double().clone() for name, tensor in module.state_dict().items()}
    for i, (path, rows) in enumerate(layers.values()):
        a, b = factors(module, path, rows, seed=seed + 10 * i)
        state[f"{path}.weight"][rows] += scaling * (b.double() @ a.double())
    return state


def merged(module: nn.Module, *files: tuple[Path, float], part: str = "transformer"):
    return merge(
        module,
        [
            (delta, scale)
            for path, scale in files
            for delta in match_layers(read_lora(path), {part: module})
        ],
    )


@every_layout
def test_every_layout_gives_the_same_sum(tmp_path, network, name):
    layers, _, _, alpha, called = FORMATS[name]
    path = lora_file(tmp_path / "x.safetensors", network, name)
    expected = by_hand(network, layers(network), SCALE * (ALPHA / RANK if alpha else 1))
    before = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    assert read_lora(path).format == called
    merged(network, (path, SCALE))
    touched = {f"{path}.weight" for path, _ in layers(network).values()}
    for key, tensor in network.state_dict().items():
        assert (tensor.data_ptr() != before[key]) == (key in touched), key
        assert max_error(tensor.double(), expected[key]) < TOLERANCE, key
    if name != "XLabs":
        assert len(touched) == sum(isinstance(layer, nn.Linear) for layer in network.modules())


def test_layers_that_other_loaders_drop_or_swap_are_changed(tmp_path, network):
    """diffusers 0.42.1 drops kohya's layers outside blocks and does not swap the last halves."""
    lost = [path for path in our_layers(network) if "_blocks" not in path]
    assert len(lost) == (10 if network.config.vector_dim else 11)
    ours = copy.deepcopy(network)
    merged(ours, (lora_file(tmp_path / "kohya.safetensors", network, "kohya"), 1.0))
    for path in lost:
        assert (
            max_error(ours.get_submodule(path).weight, network.get_submodule(path).weight) > 0.1
        ), path

    # The same update under diffusers' name has its halves swapped.
    path, d = "final_layer.adaLN_modulation.1", network.config.hidden_size
    a, b = factors(network, path, torch.arange(2 * d), seed=0)
    scale_first = torch.cat([b[d:], b[:d]])
    states = []
    for number, (name, up) in enumerate(
        (("lora_unet_final_layer_adaLN_modulation_1", b), ("norm_out.linear", scale_first))
    ):
        keys = DOWN_UP if number == 0 else AB
        file = saved(
            tmp_path / f"{number}.safetensors", {f"{name}.{keys[0]}": a, f"{name}.{keys[1]}": up}
        )
        changed = copy.deepcopy(network)
        merged(changed, (file, 1.0))
        states.append(changed.get_submodule(path).weight)
    assert torch.equal(*states)


def test_block_diagonal_factors_are_three_loras(tmp_path, network):
    """sd-scripts may store separate q, k, v as one: A stacked, B block-diagonal, alpha summed."""
    path, d = "double_blocks.1.txt_attn.qkv", network.config.hidden_size
    parts = [factors(network, path, torch.arange(d), seed) for seed in (1, 11, 21)]
    stacked = {
        "lora_down.weight": torch.cat([a for a, _ in parts]),
        "lora_up.weight": torch.block_diag(*(b for _, b in parts)),
        "alpha": torch.tensor(3 * ALPHA),
    }
    file = saved(
        tmp_path / "x.safetensors",
        {f"lora_unet_{path.replace('.', '_')}.{end}": x for end, x in stacked.items()},
    )
    expected = network.get_submodule(path).weight.double() + ALPHA / RANK * torch.cat(
        [b.double() @ a.double() for a, b in parts]
    )
    merged(network, (file, 1.0))
    assert max_error(network.get_submodule(path).weight.double(), expected) < TOLERANCE


# ------------------------------------------------------------------ text encoders

# part, our path, keys without their end: of sd-scripts (te1 is CLIP, te2 or te3 is T5), ComfyUI,
# diffusers
TEXT = {
    "clip": (
        "text_model.encoder.layers.1.self_attn.q_proj",
        (
            "lora_te1_text_model_encoder_layers_1_self_attn_q_proj",
            "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj",
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
            "text_encoder.encoder.layers.1.self_attn.q_proj",
        ),
    ),
    "t5": (
        "encoder.block.1.layer.1.DenseReluDense.wi_0",
        (
            "lora_te2_encoder_block_1_layer_1_DenseReluDense_wi_0",
            "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0",
            "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wi_0",
            "text_encoder_2.encoder.block.1.layer.1.DenseReluDense.wi_0",
        ),
    ),
}
TEXT_KEYS = [(part, path, key) for part, (path, keys) in TEXT.items() for key in keys]


@pytest.mark.parametrize("part, path, key", TEXT_KEYS)
def test_lora_of_a_text_encoder_is_merged(tmp_path, part, path, key):
    modules = {
        "transformer": Flux(FLUX1_TINY),
        "clip": randomise(CLIP(TINY_CLIP)),
        "t5": randomise(T5(TINY_T5)),
    }
    weight = modules[part].get_submodule(path).weight
    a, b = factors(modules[part], path, torch.arange(len(weight)), seed=3)
    tensors = {
        f"{key}.lora_down.weight": a,
        f"{key}.lora_up.weight": b,
        f"{key}.alpha": torch.tensor(ALPHA),
    }
    lora = read_lora(saved(tmp_path / "x.safetensors", tensors))
    (delta,) = match_layers(lora, modules)
    assert delta.target == Target(part, path, ((0, len(weight)),))
    expected = weight.double() + SCALE * ALPHA / RANK * (b.double() @ a.double())
    merge(modules[part], [(delta, SCALE)])
    assert max_error(modules[part].get_submodule(path).weight.double(), expected) < TOLERANCE
    # Tensors of a part that is None are ignored; a part that is missing is an error.
    assert "changes nothing" in refusal(match_layers, lora, modules | {part: None})
    assert f"{key}.alpha" in refusal(
        match_layers, lora, {name: module for name, module in modules.items() if name != part}
    )


def test_parts_that_are_none_are_ignored(tmp_path):
    network = randomise(Flux(FLUX1_TINY))
    file = lora_file(tmp_path / "x.safetensors", network, "kohya")
    tensors = dict(read_lora(file).tensors)
    for _, _, key in TEXT_KEYS:
        tensors |= {
            f"{key}.lora_down.weight": random(RANK, 8),
            f"{key}.lora_up.weight": random(8, RANK),
        }
    lora = read_lora(saved(tmp_path / "y.safetensors", tensors))
    assert len(match_layers(lora, {"transformer": network, "clip": None, "t5": None})) == len(
        our_layers(network)
    )
    assert "10 tensors" in refusal(match_layers, lora, {"transformer": network, "t5": None})


# ------------------------------------------------------------------ diffusers


def inputs(config: FluxConfig) -> dict[str, Tensor]:
    axes = len(config.axes_dim)
    return dict(
        img=random(2, 12, config.in_channels),
        img_ids=sampling.image_ids(3, 4, axes),
        txt=random(2, 7, config.context_dim),
        txt_ids=sampling.text_ids(7, axes),
        t=torch.tensor([0.3, 0.8]),
        guidance=torch.tensor([2.0, 3.5]) if config.guidance else None,
        vector=random(2, config.vector_dim) if config.vector_dim else None,
    )


def blocks_only(layers: Layers) -> Layers:
    """Return what diffusers' converter of kohya files can load: not linear1, and blocks only."""
    return {
        name: where for name, where in layers.items() if "blocks" in name and "linear1" not in name
    }


THEIRS = {  # model, format, the layers that diffusers loads correctly, metadata
    "flux.1 diffusers": ("flux.1-dev", "diffusers", None, {}),
    "flux.1 diffusers, alpha": ("flux.1-dev", "diffusers, alpha", None, {}),
    "flux.1 diffusers, metadata": (
        "flux.1-dev",
        "diffusers",
        None,
        dict(r=RANK, lora_alpha=2 * RANK),
    ),
    "flux.1 diffusers, rslora": (
        "flux.1-dev",
        "diffusers",
        None,
        dict(
            r=RANK,
            lora_alpha=3,
            use_rslora=True,
            alpha_pattern={"transformer_blocks.1.attn.to_k": 9, "^x_embedder": 5},
        ),
    ),
    "flux.1 XLabs": ("flux.1-dev", "XLabs", None, {}),
    "flux.1 kohya": ("flux.1-dev", "kohya", blocks_only, {}),
    "flux.2 diffusers": ("flux.2-klein-4b", "diffusers", None, {}),
    "flux.2 diffusers, dev": ("flux.2-dev", "diffusers", None, {}),
    "flux.2 diffusers, metadata": (
        "flux.2-dev",
        "diffusers",
        None,
        dict(r=RANK, lora_alpha=2 * RANK),
    ),
    "flux.2 kohya": (
        "flux.2-klein-4b",
        "kohya",
        lambda layers: {n: w for n, w in layers.items() if "blocks" in n},
        {},
    ),
    "flux.2 ai-toolkit": (
        "flux.2-klein-4b",
        "ai-toolkit",
        lambda layers: {n: w for n, w in layers.items() if "adaLN" not in n},
        {},
    ),
    "flux.2 PEFT": (
        "flux.2-klein-4b",
        "PEFT",
        lambda layers: {n: w for n, w in layers.items() if "adaLN" not in n},
        {},
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_velocity_equals_diffusers_with_its_own_loader(tmp_path, case):
    model, name, some, config = THEIRS[case]
    spec = tiny_models(clip_eos=999)[model]
    parts = networks(spec)
    network, layers = parts["transformer"], FORMATS[name][0](parts["transformer"])
    file = lora_file(tmp_path / "x.safetensors", network, name, only=some(layers) if some else None)
    if config:
        config = {
            f"transformer.{key}": value
            for key, value in (config | {"target_modules": list(layers)}).items()
        }
        saved(
            file,
            dict(read_lora(file).tensors),
            format="pt",
            lora_adapter_metadata=json.dumps(config),
        )
    pipe, batch = diffusers_pipeline(spec, parts), inputs(spec.transformer)
    without = diffusers_velocity(pipe.transformer, **batch)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="it")
    pipe.set_adapters("it", SCALE)
    theirs = diffusers_velocity(pipe.transformer, **batch)
    merged(network, (file, SCALE))
    ours = network(**batch)
    assert max_error(theirs, without) > 0.05
    # diffusers adds B(Ax) to Wx, ours merges first: the sums are rounded in another order.
    assert max_error(ours, theirs) < 1e-5


# ------------------------------------------------------------------ PEFT


def adapters() -> dict[str, object]:
    import peft

    targets = dict(
        target_modules=r".*(_blocks\.\d+\..*(qkv|proj|lin|linear[12]|mlp\.[02])|img_in|adaLN_modulation\.1)"
    )
    return {
        "LoRA": peft.LoraConfig(r=RANK, lora_alpha=3, **targets),
        "LoRA with bias": peft.LoraConfig(r=RANK, lora_alpha=3, lora_bias=True, **targets),
        "DoRA": peft.LoraConfig(r=RANK, lora_alpha=3, use_dora=True, **targets),
        "LoHa": peft.LoHaConfig(r=RANK, alpha=RANK, **targets),
        "LoKr": peft.LoKrConfig(r=RANK, alpha=RANK, decompose_factor=4, **targets),
        "LoKr, both decomposed": peft.LoKrConfig(
            r=2, alpha=2, decompose_both=True, decompose_factor=8, **targets
        ),
    }


KINDS = ("LoRA", "LoRA with bias", "DoRA", "LoHa", "LoKr", "LoKr, both decomposed")


PATTERN = {"double_blocks.0.img_attn.qkv": 9, "img_in": 6}


@pytest.mark.parametrize(
    "kind, options",
    [
        ("Lora", dict(lora_alpha=16)),
        ("Lora", dict(lora_alpha=6, use_rslora=True)),
        ("LoHa", dict(alpha=6)),
        ("Lora", dict(lora_alpha=3, alpha_pattern=PATTERN)),
    ],
)
def test_folder_saved_by_peft_has_its_alpha(tmp_path, kind, options):
    """PEFT writes alpha to adapter_config.json."""
    import peft

    network = randomise(Flux(FLUX1_TINY))
    batch = inputs(network.config)
    config = getattr(peft, f"{kind}Config")(
        r=RANK, target_modules=["img_in", "qkv", "linear1"], **options
    )
    theirs = peft.get_peft_model(copy.deepcopy(network), config).eval()
    for i, (name, weight) in enumerate(theirs.named_parameters()):
        if "lora_" in name or "hada_" in name:
            weight.data.copy_((0.3 if "hada_" in name else 0.1) * random(*weight.shape, seed=i))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with torch.no_grad():
        without, expected = network(**batch), theirs(**batch)
        merged(network, (file, 1.0))
        assert max_error(expected, without) > 0.05
        assert max_error(network(**batch), expected) < 1e-5


def test_damaged_configuration_of_peft_is_refused(tmp_path):
    tensors = {f"base_model.model.{name.partition('.')[2]}": x for name, x in GOOD.items()}
    file, network = saved(tmp_path / "adapter_model.safetensors", tensors), Flux(FLUX1_TINY)
    too_large = b'{"lora_alpha": 1%s}' % (400 * b"0")
    twice = b'{"lora_alpha": 1, "lora_alpha": 2}'
    for damaged in (b"[1]", b"{", b"\xff", b'{"lora_alpha": 1e999}', too_large, twice):
        (tmp_path / "adapter_config.json").write_bytes(damaged)
        message = refusal(match_layers_of, file, network)
        assert "adapter_config.json: is damaged" in message or "lora_alpha of " in message
    (tmp_path / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "adapter_config.json")
    assert "is a pipe or a device" in refusal(read_lora, file)


@pytest.mark.parametrize(
    "network, kind",
    [
        (family, kind)
        for family in CONFIGS
        for kind in KINDS
        if (family, kind) != ("flux.2", "LoRA with bias")  # it has none
    ],
    indirect=["network"],
)
@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # PEFT, of a bias
def test_merge_equals_adapters_of_peft(tmp_path, network, kind):
    import peft

    config, batch = adapters()[kind], inputs(network.config)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(network)).eval()
    tensors = peft.get_peft_model_state_dict(theirs)
    for i, tensor in enumerate(tensors.values()):
        noise = random(*tensor.shape, seed=i)
        if tensor.ndim == 1 and "DoRA" in kind:  # magnitudes, near their initial values
            tensor.mul_(1 + 0.1 * noise)
        else:
            tensor.copy_(0.3 * noise)
    peft.set_peft_model_state_dict(theirs, tensors)
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 3})} if "oRA" in kind else {}
    file = saved(
        tmp_path / "x.safetensors",
        {f"base_model.model.{name}": x for name, x in tensors.items()},
        **metadata,
    )
    with torch.no_grad():
        without, expected = network(**batch), theirs(**batch)
        merged(network, (file, 1.0))
        assert max_error(expected, without) > 0.05
        assert max_error(network(**batch), expected) < 1e-5


def test_dora_equals_formula_in_the_shapes_of_kohya_and_lycoris(tmp_path, network):
    """`dora_scale` is (rows, 1) in PEFT and (1, columns) in early LyCORIS."""
    path = "double_blocks.0.img_attn.proj"
    weight = network.get_submodule(path).weight.double()
    a, b = factors(network, path, torch.arange(len(weight)), seed=2)
    changed = weight + ALPHA / RANK * (b.double() @ a.double())
    for shape, dim in (((len(weight), 1), 1), ((1, weight.shape[1]), 0)):
        magnitude = 1 + random(*shape, seed=5).abs()
        ends = {
            "lora_down.weight": a,
            "lora_up.weight": b,
            "alpha": torch.tensor(ALPHA),
            "dora_scale": magnitude,
        }
        tensors = {
            f"lora_unet_{path.replace('.', '_')}.{end}": tensor for end, tensor in ends.items()
        }
        file = saved(tmp_path / f"{dim}.safetensors", tensors)
        expected = magnitude.double() * changed / changed.norm(dim=dim, keepdim=True)
        for scale in (0.0, 0.4, 1.0):  # from W to DoRA's
            ours = copy.deepcopy(network)
            merged(ours, (file, scale))
            assert (
                max_error(
                    ours.get_submodule(path).weight.double(), weight + scale * (expected - weight)
                )
                < 3e-7
            )


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr without ranks", "difference"])
def test_lycoris_products_equal_formula_with_alpha(tmp_path, network, kind):
    path = "single_blocks.1.linear2"
    weight = network.get_submodule(path).weight.double()
    rows, columns = weight.shape
    alpha = {"alpha": torch.tensor(ALPHA)}
    if kind == "LoHa":
        x = [
            random(rows, RANK),
            random(RANK, columns, seed=1),
            random(rows, RANK, seed=2),
            random(RANK, columns, seed=3),
        ]
        ends = (
            dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), x, strict=True)) | alpha
        )
        w1a, w1b, w2a, w2b = (tensor.double() for tensor in x)
        change = ALPHA / RANK * (w1a @ w1b) * (w2a @ w2b)
    elif kind == "LoKr":
        x = [random(8, 4), random(rows // 8, RANK, seed=1), random(RANK, columns // 4, seed=2)]
        ends = dict(zip(("lokr_w1", "lokr_w2_a", "lokr_w2_b"), x, strict=True)) | alpha
        change = ALPHA / RANK * torch.kron(x[0].double(), x[1].double() @ x[2].double())
    elif kind == "LoKr without ranks":  # LyCORIS writes this placeholder for alpha
        ends = {
            "lokr_w1": random(8, 4),
            "lokr_w2": random(rows // 8, columns // 4),
            "alpha": torch.tensor(9999220736.0),
        }
        change = torch.kron(ends["lokr_w1"].double(), ends["lokr_w2"].double())
    else:
        ends = {"diff": random(rows, columns)}
        change = ends["diff"].double()
    file = saved(
        tmp_path / "x.safetensors",
        {f"lycoris_{path.replace('.', '_')}.{end}": x for end, x in ends.items()},
    )
    merged(network, (file, SCALE))
    assert max_error(network.get_submodule(path).weight.double(), weight + SCALE * change) < 3e-7


def test_differences_of_biases_and_norms_are_added(tmp_path):
    network = randomise(Flux(FLUX1_TINY))
    bias, scale = (
        network.img_in.bias.double(),
        network.single_blocks[0].norm.key_norm.scale.double(),
    )
    tensors = {
        "diffusion_model.img_in.diff_b": random(len(bias)),
        "diffusion_model.single_blocks.0.norm.key_norm.diff": random(len(scale)),
    }
    merged(network, (saved(tmp_path / "x.safetensors", tensors), SCALE))
    expected = [
        x + SCALE * tensor.double()
        for x, tensor in zip((bias, scale), tensors.values(), strict=True)
    ]
    assert max_error(network.img_in.bias.double(), expected[0]) < 1e-7
    assert max_error(network.single_blocks[0].norm.key_norm.scale.double(), expected[1]) < 1e-7


# ------------------------------------------------------------------ control LoRA


def hooked(network: Flux, tensors: dict[str, Tensor], scale: float) -> Flux:
    """Return a copy that computes Wx + b + scale · (B(Ax) + b'), like Black Forest Labs' code."""
    wide = Flux(replace(network.config, in_channels=2 * network.config.in_channels))
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["img_in.weight"] = torch.cat(
        [state["img_in.weight"], torch.zeros_like(state["img_in.weight"])], dim=1
    )
    state |= {name: tensor for name, tensor in tensors.items() if name.endswith(".scale")}
    wide.load_state_dict(state, strict=True)

    def add(name: str):
        a, b, bias = (
            tensors[f"{name}.{end}"] for end in ("lora_A.weight", "lora_B.weight", "lora_B.bias")
        )
        return lambda module, args, out: out + scale * (args[0] @ a.T @ b.T + bias)

    for name, layer in wide.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(add(name))
    return wide.requires_grad_(False)


@pytest.mark.parametrize("scale", [0.85, 0.0])
def test_control_lora_equals_black_forest_labs(tmp_path, scale):
    network = randomise(Flux(FLUX1_TINY))
    file = control_lora(tmp_path / "x.safetensors", network)
    config = network.config
    batch = inputs(config) | {"img": random(2, 12, 128)}
    expected = hooked(network, read_lora(file).tensors, scale)(**batch)
    merged(network, (file, scale))
    assert read_lora(file).format == "BFL control"
    assert network.config == replace(config, in_channels=128)
    assert network.img_in.in_features == 128 and network.img_in.weight.shape == (
        config.hidden_size,
        128,
    )
    assert max_error(network(**batch), expected) < 1e-5


def test_new_columns_of_img_in_start_at_zero(tmp_path):
    network = randomise(Flux(FLUX1_TINY))
    a, b = random(RANK, 128), random(128, RANK)
    old = network.img_in.weight.double()
    file = saved(tmp_path / "x.safetensors", {"img_in.lora_A.weight": a, "img_in.lora_B.weight": b})
    merged(network, (file, SCALE))
    expected = SCALE * (b.double() @ a.double())
    expected[:, :64] += old
    assert max_error(network.img_in.weight.double(), expected) < TOLERANCE


def test_control_lora_and_a_plain_one_share_img_in(tmp_path):
    """A LoRA for 64 channels adds to the first 64, also in a model with more channels."""
    network = randomise(Flux(FLUX1_TINY))
    control, plain = (
        control_lora(tmp_path / "c.safetensors", network),
        lora_file(tmp_path / "p.safetensors", network, "BFL"),
    )
    a, b = factors(network, *our_layers(network)["img_in"], seed=0)
    change = 0.5 * (b.double() @ a.double())
    merged(network, (control, 1.0))
    with_control = network.img_in.weight.double()
    network = randomise(Flux(FLUX1_TINY))
    merged(network, (plain, 0.5), (control, 1.0))
    expected = with_control.clone()
    expected[:, :64] += change
    assert max_error(network.img_in.weight.double(), expected) < TOLERANCE
    wide = randomise(Flux(replace(FLUX1_TINY, in_channels=384)))
    expected = wide.img_in.weight.double()
    expected[:, :64] += change
    merged(wide, (plain, 0.5))
    assert wide.config.in_channels == 384
    assert max_error(wide.img_in.weight.double(), expected) < TOLERANCE
    two = [
        (delta, 1.0)
        for _ in "ab"
        for delta in match_layers(read_lora(control), {"transformer": randomise(Flux(FLUX1_TINY))})
    ]
    assert "both replace double_blocks.0.img_attn.norm." in refusal(
        merge, randomise(Flux(FLUX1_TINY)), two
    )


# ------------------------------------------------------------------ merging


def test_merge_keeps_old_tensors_and_module_paths(tmp_path, network):
    files = [
        lora_file(tmp_path / f"{n}.safetensors", network, name, seed=n)
        for n, name in enumerate(("kohya", "diffusers"))
    ]
    before = dict(network.named_parameters())
    values = {name: tensor.clone() for name, tensor in before.items()}
    paths = [path for path, _ in network.named_modules()]
    merged(network, (files[0], 0.3), (files[1], -1.5))
    assert [path for path, _ in network.named_modules()] == paths
    assert all(not parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in values.items())


def test_undone_merge_leaves_the_weights_of_the_files(tmp_path, network):
    """Also after a failed merge."""
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    loaded = LazyModule(
        Flux,
        network.config,
        [tmp_path / "w.safetensors"],
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    deltas = match_layers(
        read_lora(lora_file(tmp_path / "x.safetensors", network, "kohya")), {"transformer": network}
    )
    original, changed = loaded(), deltas[0].target.path
    for scale in (1.0, math.inf, 1.0, None):
        loaded.set_transform(
            None
            if scale is None
            else functools.partial(merge, deltas=[(delta, scale) for delta in deltas])
        )
        if scale == math.inf:
            for _ in range(2):
                assert "exceeds" in refusal(loaded)
        else:
            equal = torch.equal(
                loaded().get_submodule(changed).weight, original.get_submodule(changed).weight
            )
            assert equal == (scale is None)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded().parameters(), network.parameters(), strict=True)
    )
    same = loaded()
    loaded.set_transform(None)
    assert loaded() is same  # nothing to undo


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_two_files_are_summed_before_the_one_rounding(tmp_path, dtype):
    network = Flux(FLUX1_TINY)
    files = [lora_file(tmp_path / f"{n}.safetensors", network, "kohya", seed=n) for n in range(2)]
    randomise(network).to(dtype)
    layers = our_layers(network)
    wide = copy.deepcopy(network).double()
    first, second = (
        by_hand(wide, layers, scale * ALPHA / RANK, seed=n) for n, scale in ((0, 0.3), (1, -1.5))
    )
    merged(network, (files[0], 0.3), (files[1], -1.5))
    for path in layers:
        key = f"{path}.weight"
        expected = first[key] + second[key] - wide.state_dict()[key]
        ours = network.state_dict()[key]
        assert ours.dtype == dtype
        # The nearest number of the dtype; of two at nearly the same distance, either.
        error, best = (
            (ours.double() - expected).abs(),
            (expected.to(dtype).double() - expected).abs(),
        )
        assert (error <= best + 1e-6 * expected.abs().max()).all(), path
        assert (ours.float() == expected.to(dtype).float()).double().mean() > 0.999, path


def test_scale_zero_changes_no_bit(tmp_path, network):
    file = lora_file(tmp_path / "x.safetensors", network, "diffusers")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    merged(network, (file, 0.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_float64_stays_float64(tmp_path, network):
    file = lora_file(tmp_path / "x.safetensors", network, "diffusers")
    network.double()
    expected = by_hand(network, diffusers_layers(network), SCALE)
    merged(network, (file, SCALE))
    assert all(
        max_error(tensor, expected[name]) < 1e-15 for name, tensor in network.state_dict().items()
    )


def test_matching_needs_no_weights(tmp_path, network):
    file = lora_file(tmp_path / "x.safetensors", network, "diffusers")
    with torch.device("meta"):
        deltas = match_layers(read_lora(file), {"transformer": Flux(network.config)})
    expected = by_hand(network, diffusers_layers(network), SCALE)
    merge(network, [(delta, SCALE) for delta in deltas])
    assert all(
        max_error(tensor.double(), expected[name]) < TOLERANCE
        for name, tensor in network.state_dict().items()
    )


# ------------------------------------------------------------------ quantized weights


def quantized(path: Path, network: Flux, dtype: torch.dtype) -> Flux:
    """Load the network from a file like Black Forest Labs': float8 and a scale per block matrix."""
    tensors, notes = {name: tensor.bfloat16() for name, tensor in network.state_dict().items()}, {}
    for layer in [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if "_blocks." in name and tensor.ndim == 2
    ]:
        weight = tensors[f"{layer}.weight"].float()
        tensors[f"{layer}.weight_scale"] = weight.abs().max() / 448
        tensors[f"{layer}.weight"] = (weight / tensors[f"{layer}.weight_scale"]).to(
            torch.float8_e4m3fn
        )
        notes[layer] = {"format": "float8_e4m3fn"}
    saved(path, tensors, _quantization_metadata=json.dumps({"layers": notes}))
    with torch.device("meta"):
        loaded = Flux(network.config)
    load_module(loaded, [path], dtype=dtype)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_quantized_layer_becomes_a_linear_and_others_stay(tmp_path, network, dtype):
    loaded = quantized(tmp_path / "model.safetensors", network, dtype)
    dequantized = {
        path: layer.dequantize()
        for path, layer in loaded.named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    matrices = ("img_attn.qkv", "linear2", "txt_in")
    changed = {
        path: where for path, where in our_layers(network).items() if path.endswith(matrices)
    }
    file = lora_file(tmp_path / "x.safetensors", network, "BFL", only=changed)
    merge(
        loaded,
        [(delta, SCALE) for delta in match_layers(read_lora(file), {"transformer": network})],
    )
    assert len(dequantized) > len(changed) > 3
    for i, path in enumerate(changed):
        a, b = factors(network, *changed[path], seed=10 * i)
        before = dequantized.get(path, network.state_dict()[f"{path}.weight"].bfloat16()).double()
        expected, layer = before + SCALE * (b.double() @ a.double()), loaded.get_submodule(path)
        assert (
            type(layer) is nn.Linear
            and layer.weight.dtype == dtype
            and not layer.weight.requires_grad
        )
        error, best = (
            (layer.weight.double() - expected).abs(),
            (expected.to(dtype).double() - expected).abs(),
        )
        assert (error <= best + 1e-6 * expected.abs().max()).all(), path  # rounded once
        assert layer(torch.ones(1, layer.in_features, dtype=dtype)).shape == (1, layer.out_features)
    for path in dequantized.keys() - changed.keys():
        layer = loaded.get_submodule(path)
        assert isinstance(layer, QuantizedLinear) and torch.equal(
            layer.dequantize(), dequantized[path]
        )


def test_quantized_layer_with_a_merged_bias_stays(tmp_path):
    loaded = quantized(tmp_path / "model.safetensors", randomise(Flux(FLUX1_TINY)), torch.float32)
    layer = loaded.double_blocks[0].img_attn.proj
    bias, change = layer.bias.double(), random(len(layer.bias))
    merged(
        loaded,
        (
            saved(tmp_path / "x.safetensors", {"double_blocks.0.img_attn.proj.diff_b": change}),
            SCALE,
        ),
    )
    assert loaded.double_blocks[0].img_attn.proj is layer and isinstance(layer, QuantizedLinear)
    assert max_error(layer.bias.double(), bias + SCALE * change.double()) < 1e-7


# ------------------------------------------------------------------ bad input

TO_K = "transformer.transformer_blocks.0.attn.to_k"
GOOD = {f"{TO_K}.lora_A.weight": random(4, 128), f"{TO_K}.lora_B.weight": random(128, 4)}
NORM = "double_blocks.0.img_attn.norm.query_norm"


def match_layers_of(file: Path, network: Flux) -> list:
    return match_layers(read_lora(file), {"transformer": network})


def with_value(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[5] = value
    return tensor


def bad() -> Iterator[tuple[str, dict[str, Tensor], tuple[str, ...]]]:
    """Yield the fault, the tensors of the file, and parts of the message."""
    a, b = GOOD
    yield "rank mismatch", GOOD | {b: random(128, 5)}, (a, b, "(4, 128)", "(128, 5)", "multiplied")
    yield (
        "another architecture",
        GOOD | {a: random(4, 96)},
        (a, b, "(4, 96)", "takes (128, 128)", "double_blocks.0.img_attn.qkv"),
    )
    yield "too many rows", GOOD | {b: random(384, 4)}, ("(384, 4)", "takes (128, 128)")
    yield "no B", {a: GOOD[a]}, (a, "(4, 128)", "without its up")
    yield "no A", {b: GOOD[b]}, (b, "without its down")
    yield (
        "only alpha",
        GOOD | {"img_in.alpha": torch.tensor(1.0)},
        ("'img_in.alpha'", "without its"),
    )
    yield "half of LoKr", {"img_in.lokr_w1": random(4, 4)}, ("without its lokr_w2",)
    yield (
        "half of LoHa",
        {"img_in.hada_w1_a": random(128, 4), "img_in.hada_w1_b": random(4, 64)},
        ("hada_w2_a and hada_w2_b",),
    )
    yield "mixture", GOOD | {f"{TO_K}.diff": random(128, 128)}, ("do not belong together",)
    yield (
        "scalar difference",
        {"img_in.diff": random()},
        ("img_in.diff' of shape ()", "takes (128, 64)"),
    )
    yield (
        "vectors",
        {"img_in.lora_down.weight": random(4), "img_in.lora_up.weight": random(4)},
        ("(4,)", "takes (128, 64)"),
    )
    yield (
        "scalars of LoKr",
        {"img_in.lokr_w1": random(), "img_in.lokr_w2": random()},
        ("lokr_w1", "takes (128, 64)"),
    )
    yield "NaN", GOOD | {a: with_value(GOOD[a], math.nan)}, ("NaN or infinity", a)
    yield "infinity", GOOD | {b: with_value(GOOD[b], math.inf)}, ("NaN or infinity", b)
    yield (
        "NaN alpha",
        GOOD | {f"{TO_K}.alpha": torch.tensor(math.nan)},
        ("NaN or infinity", "alpha"),
    )
    yield "alphas", GOOD | {f"{TO_K}.alpha": torch.ones(4)}, ("alpha' of shape (4,)",)
    complex_alpha = torch.tensor(4, dtype=torch.complex64)
    yield "complex alpha", GOOD | {f"{TO_K}.alpha": complex_alpha}, ("alpha", "complex64")
    yield "alpha of bits", GOOD | {f"{TO_K}.alpha": torch.tensor(True)}, ("alpha", "torch.bool")
    yield "16 dimensions", GOOD | {a: torch.ones((1,) * 16)}, (a, "(1, 1,")
    yield "empty", {a: torch.zeros(0, 128), b: torch.zeros(128, 0)}, ("(0, 128)",)
    yield "integers", GOOD | {a: torch.ones(4, 128, dtype=torch.int8)}, (a, "int8")
    yield "twice", GOOD | {f"{TO_K}.lora_down.weight": GOOD[a].clone()}, ("twice", a, "lora_down")
    yield (
        "unknown layer",
        GOOD | {"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": random(4, 128)},
        ("1 tensors, of 3", "transformer_blocks.9.attn.to_q.lora_A.weight", "strict=False"),
    )
    yield (
        "unknown kind",
        GOOD | {f"img_in.hra_u.{i}": random(4, 4) for i in range(5)},
        ("5 tensors, of 7", "hra_u", "and 2 more"),
    )
    yield (
        "weight of a Linear",
        GOOD | {"img_in.weight": random(128, 64)},
        ("1 tensors, of 3", "img_in.weight"),
    )
    yield (
        "norm of another size",
        GOOD | {f"{NORM}.scale": random(64)},
        (f"{NORM}.scale", "(64,)", "takes (32,)"),
    )
    yield "dora of another size", GOOD | {f"{TO_K}.dora_scale": random(64)}, ("dora_scale", "(64,)")
    yield (
        "bias of another size",
        GOOD | {f"{TO_K}.lora_B.bias": random(384)},
        ("lora_B.bias", "(384,)"),
    )
    yield (
        "img_in of odd width",
        {"img_in.lora_A.weight": random(4, 100), "img_in.lora_B.weight": random(128, 4)},
        ("(4, 100)", "takes (128, 64)"),
    )


BAD = {fault: rest for fault, *rest in bad()}


@pytest.mark.parametrize("fault", BAD)
def test_bad_file_is_refused(tmp_path, fault):
    tensors, parts = BAD[fault]
    file = saved(tmp_path / "x.safetensors", tensors)
    message = refusal(match_layers_of, file, Flux(FLUX1_TINY))
    assert str(file) in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "dtype, shape, size, problem",
    [
        ("F32", [1] * 70, 4, "is not understood"),
        ("F4", [4, 128], 256, "in F4, which torch lacks"),
        ("F4", [3, 1], 1, "damaged header"),
        ("F6_E2M3", [4, 4], 12, "in F6_E2M3, which torch lacks"),
        ("F8_E8M0", [4, 128], 512, "float8_e8m0fnu, expected floating-point numbers"),
        ("C64", [4, 128], 4096, "complex64, expected floating-point numbers"),
        ("U32", [4, 128], 2048, "uint32, expected floating-point numbers"),
    ],
)
def test_shape_or_dtype_that_no_lora_has_is_refused(tmp_path, dtype, shape, size, problem):
    a, b = GOOD
    entries = {a: entry(dtype, shape, 0, size), b: entry("F32", [128, 4], size, size + 2048)}
    file = raw(tmp_path / "x.safetensors", entries, b"\x3f" * (size + 2048))
    assert problem in refusal(match_layers_of, file, Flux(FLUX1_TINY))


def test_bias_for_a_model_without_biases_is_refused(tmp_path):
    file = saved(tmp_path / "x.safetensors", GOOD | {f"{TO_K}.lora_B.bias": random(128)})
    assert "takes no bias" in refusal(
        match_layers, read_lora(file), {"transformer": Flux(KLEIN_TINY)}
    )


def test_lora_of_the_other_family_is_refused(tmp_path):
    flux1, flux2 = (randomise(Flux(config)) for config in CONFIGS.values())
    for trained, other in ((flux1, flux2), (flux2, flux1)):
        for name in ("kohya", "diffusers"):
            lora = read_lora(lora_file(tmp_path / "x.safetensors", trained, name))
            assert "match no layer of Flux" in refusal(match_layers, lora, {"transformer": other})
            assert "does not fit Flux" in refusal(
                match_layers, lora, {"transformer": other}, strict=False
            )


def test_unmatched_tensors_are_ignored_if_not_strict(tmp_path):
    network = Flux(FLUX1_TINY)
    stray = {
        "lora_te1_text_projection.lora_down.weight": random(4, 8),
        "bundle_emb.cat.string_to_param.*": random(3),
    }
    file = saved(tmp_path / "x.safetensors", GOOD | stray)
    assert "2 tensors, of 4" in refusal(match_layers, read_lora(file), {"transformer": network})
    with pytest.warns(UserWarning, match="left out 2 of 4 tensors.*string_to_param.*text_proj"):
        (delta,) = match_layers(read_lora(file), {"transformer": network}, strict=False)
    assert delta.target == Target("transformer", "double_blocks.0.img_attn.qkv", ((128, 256),))
    file = saved(tmp_path / "y.safetensors", stray)
    assert "changes nothing" in refusal(
        match_layers, read_lora(file), {"transformer": network}, strict=False
    )


def test_file_that_is_not_safetensors_is_refused(tmp_path):
    for content, part in (
        (b"<html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 80, "pickle"),
        (b"", "empty"),
        (b"GGUF" + b"\0" * 80, "GGUF"),
    ):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert part in refusal(read_lora, tmp_path / "x.safetensors")
    assert "does not exist" in refusal(read_lora, tmp_path / "nowhere.safetensors")


def test_truncated_file_is_refused(tmp_path):
    file = saved(tmp_path / "x.safetensors", GOOD)
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refusal(read_lora, file)


def test_full_model_is_refused(tmp_path, network):
    file = saved(tmp_path / "x.safetensors", network.state_dict())
    message = refusal(read_lora, file)
    assert "is not a LoRA" in message and "`transformer`" in message


def test_damaged_metadata_is_refused(tmp_path):
    network = Flux(FLUX1_TINY)
    for number, config in enumerate(
        (
            "[1]",
            "{",
            '{"transformer.alpha_pattern": [1]}',
            '{"transformer.lora_alpha": "x"}',
            '{"transformer.lora_alpha": NaN}',
        )
    ):
        file = saved(tmp_path / f"{number}.safetensors", GOOD, lora_adapter_metadata=config)
        message = refusal(match_layers_of, file, network)
        assert "lora_adapter_metadata: " in message


@pytest.mark.parametrize("kind, copies", [("LoRA", 2), ("DoRA", 3)])
def test_merge_holds_few_copies_of_a_matrix(tmp_path, kind, copies):
    """`copies` in float32, and the result in bfloat16."""
    layer = nn.ModuleDict({"img_in": nn.Linear(384, 1536, dtype=torch.bfloat16)}).requires_grad_(
        False
    )
    tensors = {"img_in.lora_A.weight": random(4, 384), "img_in.lora_B.weight": random(1536, 4)}
    more = {"img_in.dora_scale": random(1536, 1)} if kind == "DoRA" else {}
    deltas = match_layers(
        read_lora(saved(tmp_path / "x.safetensors", tensors | more)), {"transformer": layer}
    )
    layer.config = Flux(FLUX1_TINY).config
    peak = script("benchmarks/measure").peak_bytes(
        lambda: merge(layer, [(delta, 0.5) for delta in deltas])
    )
    assert peak <= 1.05 * layer["img_in"].weight.numel() * max(4 * copies, 4 + 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_overflow_is_refused_and_changes_nothing(tmp_path, dtype):
    network = randomise(Flux(FLUX1_TINY)).to(dtype)
    file, before = (
        lora_file(tmp_path / "x.safetensors", network, "kohya"),
        dict(network.named_parameters()),
    )
    message = refusal(merged, network, (file, 1e9))
    assert str(dtype) in message and "smaller scales" in message
    for scale in (math.nan, math.inf):
        assert "exceeds" in refusal(merged, network, (file, scale))
    assert all(parameter is before[name] for name, parameter in network.named_parameters())
