"""flux.lora.peft_config: an adapter_config.json counts for its own file, and each field counts.

The references: PEFT, which reads the same folder, and alpha/r · BA in float64.
"""

import copy
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.lora_files import random
from support.weight_files import refusal, saved
from torch import Tensor, nn

from flux.lora import peft_config
from flux.lora.formats import match_layers, read_lora
from flux.lora.merge import merge
from flux.lora.peft_config import PeftConfig
from flux.parity.reference import FLUX1_TINY, max_error, randomise
from flux.transformer import Flux

PROJ = "double_blocks.0.img_attn.proj"
KEY = f"base_model.model.{PROJ}"
A, B = random(4, 128, seed=1), random(128, 4, seed=2, size=0.1)
FACTORS = {f"{KEY}.lora_A.weight": A, f"{KEY}.lora_B.weight": B}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def network() -> Flux:
    return randomise(Flux(replace(FLUX1_TINY, depth=1, depth_single=1)))


def folder(path: Path, config: dict | None = CONFIG, tensors: dict[str, Tensor] = FACTORS) -> Path:
    path.mkdir(exist_ok=True, parents=True)
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return saved(path / ADAPTER, tensors)


def change(file: Path, network: Flux, layer: str = PROJ, strict: bool = True) -> Tensor:
    """Return what the file adds to the weight of a layer, which is the only one in the file."""
    (delta,) = match_layers(read_lora(file), {"transformer": network}, strict)
    assert delta.target.path == layer
    return delta.delta_weight(network.get_submodule(layer).weight.double())


BA = B.double() @ A.double()


def test_config_is_beside_the_path_that_was_given(tmp_path, network):
    """Also in the Hugging Face cache, where both files are links into blobs/."""
    plain = folder(tmp_path / "plain")
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, blob in ((ADAPTER, "0123"), ("adapter_config.json", "4567")):
        (blobs / blob).write_bytes((tmp_path / "plain" / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    for file in (plain, plain.parent, snapshot / ADAPTER, snapshot):
        assert max_error(change(file, network), 4 * BA) < 1e-12
    (tmp_path / "link").symlink_to(snapshot)
    assert max_error(change(tmp_path / "link", network), 4 * BA) < 1e-12
    assert str(snapshot / ADAPTER) == str(read_lora(snapshot).path)


def test_config_is_for_no_other_file(tmp_path, network):
    folder(tmp_path)
    other = saved(tmp_path / "style.safetensors", FACTORS)
    assert max_error(change(other, network), BA) < 1e-12
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "style.safetensors").symlink_to(tmp_path / ADAPTER)  # not PEFT's name
    assert max_error(change(tmp_path / "away" / "style.safetensors", network), BA) < 1e-12


def test_missing_config_is_noted(tmp_path, network):
    file = folder(tmp_path, config=None)
    with pytest.warns(UserWarning, match=r"no adapter_config.json.*alpha = r"):
        assert max_error(change(file, network), BA) < 1e-12
    (tmp_path / "adapter_config.json").symlink_to("nowhere")
    assert "does not exist" in refusal(read_lora, file)


TRAINING_ONLY = {
    "lora_dropout": 0.5,
    "init_lora_weights": "gaussian",
    "inference_mode": True,
    "base_model_name_or_path": "black-forest-labs/FLUX.1-dev",
    "task_type": None,
    "fan_in_fan_out": True,  # PEFT itself sets it to false for a Linear
    "modules_to_save": None,
    "layer_replication": None,
    "bias": "none",
    "target_modules": ["img_attn.proj"],
    "rank_pattern": {},
    "alpha_pattern": None,
    "megatron_config": {"x": 1},
    "megatron_core": "megatron.core",
    "loftq_config": {"loftq_bits": 4},  # of init_lora_weights "loftq", which is refused
    "eva_config": {"rho": 2.0},
    "corda_config": {"x": 1},
    "lora_ga_config": {"x": 1},
    "velora_config": {"num_groups": 4},
    "qalora_group_size": 16,
    "ensure_weight_tying": True,
    "auto_mapping": {"base_model_class": "Flux"},
    "peft_version": "0.21.2",
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "rank_dropout": 0.5,
    "module_dropout": 0.5,
    "rank_dropout_scale": True,
    "use_effective_conv2d": True,
    "init_weights": False,
    "decompose_both": True,  # this field and the next ones are seen in the shapes
    "decompose_factor": 4,
    "block_share": False,
    "oft_block_size": 16,
    "boft_block_size": 8,
    "boft_block_num": 0,
    "boft_n_butterfly_factor": 2,
    "boft_dropout": 0.5,
    "eps": 1e-5,  # of coft, which is refused
    "enable_lora": None,
    "merge_weights": True,
    "a_field_of_later_versions": None,
}
READ = (  # tested one by one below
    *("lora_alpha", "alpha", "alpha_pattern", "use_rslora", "use_dora", "rank_pattern", "r"),
    *("use_cayley_neumann", "num_cayley_neumann_terms", "lora_bias"),
    *("target_modules", "exclude_modules", "layers_to_transform"),
)


@pytest.mark.parametrize("kind", ["Lora", "LoHa", "LoKr", "OFT", "BOFT"])
def test_every_field_of_peft_is_honoured_compared_refused_or_ignored(kind):
    """A field that a later version of PEFT adds fails here: it may change the result."""
    import peft

    known = {*READ, *UNSUPPORTED, *TRAINING_ONLY}
    fields = {field.name for field in dataclasses.fields(getattr(peft, f"{kind}Config"))}
    assert fields <= known, fields - known
    assert fields <= peft_config.READ | peft_config.IGNORED | set(peft_config.REFUSED)


def test_unknown_field_is_ignored_with_a_warning(tmp_path, network):
    file = folder(tmp_path, CONFIG | {"a_field_of_later_versions": [1], "another": {}})
    with pytest.warns(UserWarning, match="another version of PEFT.*: a_field_of_later_versions$"):
        assert max_error(change(file, network), 4 * BA) < 1e-12


def test_fields_that_change_nothing_are_ignored(tmp_path, network):
    for target in (["img_attn.proj"], ["proj"], [PROJ], "all-linear", r".*\.proj", None):
        file = folder(tmp_path, CONFIG | TRAINING_ONLY | {"target_modules": target})
        assert max_error(change(file, network), 4 * BA) < 1e-12


UNSUPPORTED = {
    "init_lora_weights": ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"),
    "peft_type": ("VERA", "IA3", "ADALORA", 3),
    "bias": ("all", "lora_only"),
    "modules_to_save": (["proj_out"],),
    "layer_replication": ([[0, 1]],),
    "alora_invocation_tokens": ([1],),
    "trainable_token_indices": ([1],),
    "target_parameters": (["w"],),
    "use_qalora": (True,),
    "use_bdlora": ({"x": 1},),
    "kasa_config": ({"x": 1},),
    "arrow_config": ({"x": 1},),
    "monteclora_config": ({"x": 1},),
    "coft": (True,),
    "r": (8, "4", True, None),
    "lora_alpha": ("16", [16], True, None),
    "use_dora": (True,),
    "target_modules": (["to_q"], [1], "(", 1),
    "exclude_modules": (["proj"], PROJ, [1], "(a+)+b"),
    "layers_pattern": (["blocks"],),
    "rank_pattern": ({PROJ: 8}, [1], {"(": 1}, {"(a+)+b": 4}, {".*" * 9: 4}, {"a?" * 9: 4}),
    "alpha_pattern": ({"(": 1}, "x", {PROJ: "16"}),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_field_that_is_not_supported_is_refused_by_name(tmp_path, network, field):
    for value in UNSUPPORTED[field]:
        for strict in (True, False):
            file = folder(tmp_path, CONFIG | {field: value})
            message = refusal(change, file, network, strict=strict)
            assert field in message and "adapter_config.json" in message, message
    prefixed = {f"transformer.{name}": x for name, x in (CONFIG | {field: value}).items()}
    if field not in ("target_modules", "exclude_modules"):
        file = saved(
            tmp_path / "x.safetensors", FACTORS, lora_adapter_metadata=json.dumps(prefixed)
        )
        assert field in refusal(change, file, network)


TARGETS = [
    dict(target_modules=["proj"]),
    dict(target_modules=["img_attn.proj", "linear1"]),
    dict(target_modules=["g_attn.proj"]),
    dict(target_modules=["0.img_attn.proj"]),
    dict(target_modules=[PROJ]),
    dict(target_modules=r".*attn\.proj"),
    dict(target_modules=r"img_attn\.proj"),
    dict(target_modules=["proj"], exclude_modules=["img_attn.proj"]),
    dict(target_modules=["proj"], exclude_modules=["txt_attn.proj"]),
    dict(target_modules=["proj"], exclude_modules=r".*img.*"),
    dict(target_modules=["proj"], layers_to_transform=0),
    dict(target_modules=["proj"], layers_to_transform=[1, 0]),
    dict(target_modules=["proj"], layers_to_transform=[]),
    dict(target_modules=[PROJ], layers_to_transform=[7]),
]


@pytest.mark.parametrize("fields", TARGETS, ids=str)
def test_layers_are_targets_where_peft_finds_them(tmp_path, network, fields):
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    file = folder(tmp_path, CONFIG | fields)
    if check_target_module_exists(peft.LoraConfig(**fields), PROJ):
        assert max_error(change(file, network), 4 * BA) < 1e-12
    else:
        assert "target_modules" in refusal(change, file, network)


@pytest.mark.parametrize("number", [0, 1])
def test_layers_to_transform_are_numbers_of_blocks(number):
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = dict(target_modules=["q_proj"], layers_to_transform=[number, 5])
    for layer in ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"):
        theirs = check_target_module_exists(peft.LoraConfig(**fields), layer)
        ours = PeftConfig("adapter_config.json", fields)
        if theirs:
            ours.require_target(layer)
        else:
            assert layer in refusal(ours.require_target, layer)
    assert bool(check_target_module_exists(peft.LoraConfig(**fields), f"model.{layer}")) == (
        number == 0
    )


def test_tensors_that_contradict_the_config_are_refused(tmp_path, network):
    magnitude = FACTORS | {f"{KEY}.lora_magnitude_vector": 1 + random(128).square()}
    assert "use_dora is False" in refusal(
        change, folder(tmp_path, CONFIG | {"use_dora": False}, magnitude), network
    )
    bias = FACTORS | {f"{KEY}.lora_B.bias": random(128)}
    assert "lora_bias is False" in refusal(
        change, folder(tmp_path, CONFIG | {"lora_bias": False}, bias), network
    )


@pytest.mark.parametrize(
    "pattern, layer_alpha",
    [
        ({PROJ: 8}, 8),
        ({"img_attn.proj": 8}, 8),
        ({"proj": 8}, 8),
        (f"^{PROJ}", 8),
        ({r"double_blocks\.\d+\.img_attn\.proj": 8}, 8),
        ({".*img_attn.*": 8}, 8),
        ({"^img_attn.proj": 8}, 16),
        ({"g_attn.proj": 8}, 16),
        ({"img_attn": 8}, 16),
        ({"txt_attn.proj": 2, "proj": 8, PROJ: 32}, 8),  # the first that matches
    ],
    ids=str,
)
def test_patterns_match_as_in_peft(tmp_path, network, pattern, layer_alpha):
    from peft.utils.other import get_pattern_key

    pattern = {pattern: 8} if isinstance(pattern, str) else pattern
    assert pattern.get(get_pattern_key(pattern.keys(), PROJ), 16) == layer_alpha
    file = folder(tmp_path, CONFIG | {"alpha_pattern": pattern})
    assert max_error(change(file, network), layer_alpha / 4 * BA) < 1e-12
    ranks = {key: 4 if value == layer_alpha else 3 for key, value in pattern.items()}
    for r, patterns in ((4 if layer_alpha == 16 else 5, ranks),):
        file = folder(tmp_path, CONFIG | {"r": r, "rank_pattern": patterns})
        assert max_error(change(file, network), 4 * BA) < 1e-12


# ------------------------------------------------------------------ folders that PEFT wrote


def peft_kinds() -> dict[str, object]:
    import peft

    layers = {"target_modules": ["img_attn.proj", "txt_mlp.0", "linear2"]}
    rank = {"r": 6, "rank_pattern": {"txt_mlp.0": 3}, **layers}
    return {
        "LoRA": peft.LoraConfig(lora_alpha=9, alpha_pattern={"linear2": 5}, **rank),
        "rsLoRA": peft.LoraConfig(lora_alpha=9, use_rslora=True, **rank),
        "DoRA": peft.LoraConfig(lora_alpha=9, use_dora=True, **rank),
        "fan_in": peft.LoraConfig(lora_alpha=9, fan_in_fan_out=True, **rank),
        "MiCA": peft.LoraConfig(lora_alpha=9, init_lora_weights="mica", **rank),
        "VeLoRA": peft.LoraConfig(lora_alpha=9, velora_config={"num_groups": 4}, **rank),
        "LoHa": peft.LoHaConfig(alpha=9, alpha_pattern={"linear2": 5}, **rank),
        "LoKr": peft.LoKrConfig(alpha=9, decompose_factor=4, **rank),
        "LoKr, full": peft.LoKrConfig(r=64, alpha=24, decompose_factor=4, **layers),
        "OFT": peft.OFTConfig(oft_block_size=16, r=0, **layers),
        "OFT, 3 terms": peft.OFTConfig(
            oft_block_size=16, r=0, num_cayley_neumann_terms=3, **layers
        ),
        "OFT, exact": peft.OFTConfig(oft_block_size=16, r=0, use_cayley_neumann=False, **layers),
        "OFT, shared": peft.OFTConfig(oft_block_size=16, r=0, block_share=True, **layers),
        "BOFT": peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, **layers),
        "BOFT, one stage": peft.BOFTConfig(boft_block_size=4, **layers),
    }


KINDS = (
    *("LoRA", "rsLoRA", "DoRA", "fan_in", "MiCA", "VeLoRA", "LoHa", "LoKr", "LoKr, full"),
    *("OFT", "OFT, 3 terms", "OFT, exact", "OFT, shared", "BOFT", "BOFT, one stage"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of fan_in_fan_out and CUDA
def test_folder_that_peft_wrote_gives_what_peft_merges(tmp_path, network, kind):
    import peft

    theirs = peft.get_peft_model(copy.deepcopy(network), peft_kinds()[kind])
    for i, (name, weight) in enumerate(theirs.named_parameters()):
        if any(part in name for part in ("lora_", "hada_", "lokr_", "oft_")):
            noise = random(*weight.shape, seed=i)
            if weight.ndim == 1 or "boft_s" in name:  # magnitudes, near their initial values
                weight.data.mul_(1 + 0.1 * noise)
            else:
                weight.data.copy_((0.03 if "oft_" in name else 0.2) * noise)
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(network), tmp_path)
    expected = again.merge_and_unload().state_dict()
    ours: nn.Module = copy.deepcopy(network)
    deltas = match_layers(read_lora(tmp_path), {"transformer": ours})
    merge(ours, [(delta, 1.0) for delta in deltas])
    before, changed = network.state_dict(), 0
    for name, tensor in ours.state_dict().items():
        assert max_error(tensor, expected[name]) < 2e-6, name
        changed += not torch.equal(tensor, before[name])
    assert changed == len(deltas) == 3
