"""Tiny sound inputs of every kind, what flux does with them, and when a damaged one is sound.

`KINDS` maps a kind to a function that returns its `Input`s, for example one for each quantized
notation; the cases of a kind take turns with them. `use` reads a file as flux does and runs what
the file gives. `check` reads it a second time, without flux, and raises `Unsound` if flux should
have refused it.
"""

import atexit
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from fuzz import mutators
from fuzz.strict import Entry, Unsound, read_safetensors, require
from PIL import Image
from safetensors.torch import save
from support.load_script import script
from support.lora_files import control_lora, random
from support.quantized_files import (
    FORMATS,
    block_linears,
    random_state,
    save_gguf,
    save_gguf_q8_0,
    save_quantized,
)
from support.tokenizer_files import make_clip, make_mistral, make_qwen, make_t5
from support.transformer_inputs import inputs
from torch import Tensor, nn

import flux
from flux.autoencoder import AutoEncoder
from flux.clip import CLIP
from flux.errors import UserError
from flux.hooks import watching
from flux.image_io import input as image_input
from flux.image_io import output
from flux.language_model import LanguageModel
from flux.lora.formats import match_layers, read_lora
from flux.lora.merge import merge
from flux.parity import capture_file, compare, example_port, golden_kit, replay, report, tolerances
from flux.parity.reference import (
    FLUX1_TINY,
    FLUX2_TINY,
    TINY_AE1,
    TINY_AE2,
    TINY_CLIP,
    TINY_MISTRAL,
    TINY_QWEN,
    TINY_T5,
    autoencoder_to_diffusers,
    randomise,
    released_names,
    transformer_to_diffusers,
)
from flux.runtime.lazy_module import LazyModule
from flux.t5 import T5
from flux.text_encoder import (
    FLUX1TextEncoder,
    FLUX2TextEncoder,
    TextEncoder,
    clip_ignore_keys,
    language_model_ignore_keys,
    t5_ignore_keys,
)
from flux.training import batches, dataset
from flux.training.log import CSVLog
from flux.training.trainer import Trainer, make_optimizer, warmup_cosine
from flux.transformer import BLOCK_LISTS, Flux, FluxConfig
from flux.weights.diffusers_names import from_diffusers
from flux.weights.files import shard_files
from flux.weights.load import infer_config

CPU = torch.device("cpu")
LOADING = dict(device=CPU, dtype=torch.float32)
SMALL = dict(hidden_size=32, num_heads=1, depth=1, depth_single=1, context_dim=32)
CONFIGS = {
    "flux.1": replace(FLUX1_TINY, vector_dim=32, in_channels=16, out_channels=16, **SMALL),
    "flux.2": replace(FLUX2_TINY, **SMALL),
}


@dataclass(frozen=True)
class Input:
    """The files of a folder, one of which is damaged; who reads the folder; whether it is sound."""

    files: dict[str, bytes]
    damaged: str
    mutators: list[mutators.Mutator]
    use: Callable[[Path], object]  # takes the damaged file's path
    check: Callable[[Path], object] = lambda path: None  # raises Unsound


KINDS: dict[str, Callable[[], list[Input]]] = {}
CASES: dict[str, int] = {}  # of each kind in the fast run, where slower kinds have fewer


def kind(cases: int) -> Callable:
    """Register the inputs that a function returns, under its name."""

    def register(make: Callable[[], list[Input]]) -> Callable[[], list[Input]]:
        KINDS[make.__name__], CASES[make.__name__] = cache(make), cases
        return KINDS[make.__name__]

    return register


def written(write: Callable[[Path], object], name: str = "x.safetensors") -> bytes:
    """Return the bytes of the file that `write` writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def written_folder(write: Callable[[Path], object]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def half(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}


# ---------------------------------------------------------------- weights


@cache
def network(family: str) -> Flux:
    return randomise(Flux(CONFIGS[family]))


def same_tensors(content: bytes, optional: str = "$^") -> Callable[[Path], object]:
    """Return a check that a file has a sound one's names and shapes, but for optional names.

    Axes of length 1 do not count: they change nothing about the numbers.
    """

    def shapes(tensors: dict[str, Entry]) -> dict[str, list[int]]:
        return {name: [n for n in entry.shape if n != 1] for name, entry in tensors.items()}

    expected = shapes(strict(content)[0])

    def check(path: Path) -> None:
        found = shapes(read_safetensors(path)[0])
        for name in expected.keys() | found.keys():
            if not re.search(optional, name):
                require(expected.get(name) == found.get(name), f"{name} is missing or another")

    return check


def strict(content: bytes):
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        Path(file.name).write_bytes(content)
        return read_safetensors(Path(file.name))


def run_transformer(config: FluxConfig, path: Path) -> None:
    infer_config(path)
    lazy = LazyModule(Flux, config, shard_files(path), block_lists=BLOCK_LISTS, **LOADING)
    assert lazy()(**inputs(config)).shape == inputs(config)["img"].shape[:2] + (16,)


def transformer_input(config: FluxConfig, content: bytes, optional: str = "$^") -> Input:
    check = same_tensors(content, optional)
    use = partial(run_transformer, config)
    return Input({"x.safetensors": content}, "x.safetensors", mutators.SAFETENSORS, use, check)


@kind(cases=200)
def transformers() -> list[Input]:
    return [
        transformer_input(config, save(half(network(family)))) for family, config in CONFIGS.items()
    ]


@kind(cases=200)
def quantized() -> list[Input]:
    """All notations, of both families in turn. Scales of inputs and notes may be missing."""
    found = []
    for number, write in enumerate(FORMATS.values()):
        family = list(CONFIGS)[number % 2]
        layers, state = block_linears(network(family)), random_state(network(family))
        content = written(lambda path: save_quantized(path, write(layers, state)))  # noqa: B023
        optional = r"input_scale|scale_input|comfy_quant|scaled_fp8|^vae\.|^text_encoders\."
        found.append(transformer_input(CONFIGS[family], content, optional))
    return found


@kind(cases=200)
def gguf_files() -> list[Input]:
    def check(config: FluxConfig, path: Path) -> None:
        try:
            reader = gguf.GGUFReader(path)
        except UnicodeDecodeError:  # in metadata, of which flux reads none
            return
        except Exception as error:
            raise Unsound(str(error)) from None
        found = {x.name: tuple(map(int, reversed(x.shape))) for x in reader.tensors}
        with torch.device("meta"):
            expected = {name: tuple(x.shape) for name, x in Flux(config).state_dict().items()}
        require(found == expected, "other names or shapes")

    found = []
    for family, config in CONFIGS.items():
        layers, state = block_linears(network(family)), half(network(family))
        q8_0 = written(lambda path: save_gguf_q8_0(path, layers, state), "x.gguf")  # noqa: B023
        arrays = {}
        for name, tensor in state.items():
            array = tensor.float().numpy()
            is_large = name.removesuffix(".weight") in layers
            quantize = partial(gguf.quantize, array, gguf.GGMLQuantizationType.Q5_1)
            arrays[name] = (quantize(), "Q5_1") if is_large else array
        q5_1 = written(
            lambda path: save_gguf(path, arrays, string_a="text", uint32_b=3),  # noqa: B023
            "x.gguf",
        )
        use, check_this = partial(run_transformer, config), partial(check, config)
        found += [
            Input({"x.gguf": data}, "x.gguf", mutators.GGUF, use, check_this)
            for data in (q8_0, q5_1)
        ]
    return found


@kind(cases=200)
def index_files() -> list[Input]:
    config, state = CONFIGS["flux.2"], half(network("flux.2"))
    names = list(state)
    shards = {f"x-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    files = {shard: save({name: state[name] for name in part}) for shard, part in shards.items()}
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    name = "x.safetensors.index.json"
    files[name] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()

    def check(path: Path) -> None:
        named = set(json.loads(path.read_bytes().decode())["weight_map"].values())
        require(named == set(shards), "the index names other files")

    return [Input(files, name, mutators.JSON, partial(run_transformer, config), check)]


@kind(cases=200)
def autoencoders() -> list[Input]:
    found = []
    for config, diffusers in ((TINY_AE1, False), (TINY_AE2, False), (TINY_AE2, True)):
        config = replace(config, ch=8, ch_mult=(1, 1, 1, 1), norm_groups=8, num_res_blocks=0)
        state = randomise(AutoEncoder(config)).state_dict()
        if diffusers:
            state = autoencoder_to_diffusers(state, config)
        content = save({name: tensor.contiguous() for name, tensor in state.items()})

        def use(path: Path, config=config) -> None:
            lazy = LazyModule(AutoEncoder, config, [path], rename=from_diffusers, **LOADING)
            pixels = lazy().decode(torch.zeros(1, config.latent_channels, 2, 1))
            assert pixels.shape == (1, 3, 32, 16)

        check = same_tensors(content, "num_batches_tracked")
        files = {"ae.safetensors": content}
        found.append(Input(files, "ae.safetensors", mutators.SAFETENSORS, use, check))
    return found


# ---------------------------------------------------------------- text


@cache
def tokenizers() -> dict[str, dict[str, bytes]]:
    """Return the files of each tokenizer, trained on four sentences."""
    makers = dict(t5=make_t5, clip=make_clip, qwen=make_qwen, mistral=make_mistral)
    return {name: written_folder(make) for name, make in makers.items()}


@cache
def text_encoder_files() -> dict[str, bytes]:
    parts = {name: build(config) for name, (build, config) in text_networks().items()}
    states = {name: half(randomise(module)) for name, module in parts.items()}
    states["mistral"] = released_names(states["mistral"], mistral=True)
    return {name: save(state) for name, state in states.items()}


@cache
def text_networks() -> dict[str, tuple[Callable, Any]]:
    """Return the class and the configuration of each text encoder."""
    eos_id = len(json.loads(tokenizers()["clip"]["vocab.json"])) - 1
    return {
        "t5": (T5, replace(TINY_T5, depth=1)),
        "clip": (CLIP, replace(TINY_CLIP, depth=1, eos_id=eos_id)),
        "qwen": (LanguageModel, replace(TINY_QWEN, layers=(1, 2))),
        "mistral": (LanguageModel, replace(TINY_MISTRAL, layers=(1, 2))),
    }


def load_text_network(name: str, file: Path) -> LazyModule:
    build, config = text_networks()[name]
    options: dict[str, Any] = {"ignore_keys": t5_ignore_keys if name == "t5" else clip_ignore_keys}
    if build is LanguageModel:
        options = dict(ignore_keys=partial(language_model_ignore_keys, depth=2))
    return LazyModule(build, config, [file], **options, **LOADING)


@cache
def loaded_text_network(name: str) -> LazyModule:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(text_encoder_files()[name])
        lazy = load_text_network(name, path)
        lazy()  # maps the file, which may then go
        return lazy


@cache
def tokenizer_folder(name: str) -> Path:
    """Return a folder with a sound tokenizer."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    for file, content in tokenizers()[name].items():
        (folder / file).write_bytes(content)
    return folder


def encode(**folders: Path) -> None:
    """Encode a prompt with the tokenizer in a folder, `t5`, `clip`, `qwen` or `mistral`."""
    (name,) = folders
    encoder: TextEncoder
    if name in ("t5", "clip"):
        parts = {part: folders.get(part, tokenizer_folder(part)) for part in ("t5", "clip")}
        encoder = FLUX1TextEncoder(*map(loaded_text_network, parts), *parts.values(), LENGTH)
    else:
        encoder = FLUX2TextEncoder(loaded_text_network(name), folders[name], LENGTH)
    assert encoder.encode(["a photo of a cat, 35mm"]).tokens.shape[:2] == (1, LENGTH)


LENGTH = 64  # tokens


@kind(cases=200)
def text_encoders() -> list[Input]:
    found = []
    for name, content in text_encoder_files().items():

        def use(path: Path, name=name) -> None:
            ids = torch.arange(1, 9)[None]
            inputs = (ids, ids > 0) if name in ("qwen", "mistral") else (ids,)
            load_text_network(name, path)()(*inputs)

        optional = r"^(model\.)?norm\.|lm_head|vision|position_ids|layers\.[2-9]\."
        check = same_tensors(content, optional)
        files = {"model.safetensors": content}
        found.append(Input(files, "model.safetensors", mutators.SAFETENSORS, use, check))
    return found


@kind(cases=200)
def tokenizer_files() -> list[Input]:
    """Each file by which a tokenizer is read; Qwen3's in both notations."""
    found = []
    for name, files in tokenizers().items():

        def use(path: Path, name=name) -> None:
            encode(**{name: path.parent})

        for file in files:
            rest = dict(files)
            if name == "qwen" and file != "tokenizer.json":
                del rest["tokenizer.json"]
            if file == "tokenizer_config.json" and name != "qwen":
                continue  # not read
            kinds = {".json": mutators.JSON, ".txt": mutators.LINES, ".model": mutators.GGUF}
            found.append(Input(rest, file, kinds[Path(file).suffix], use))
    return found


# ---------------------------------------------------------------- LoRA


def lora_layouts(family: str) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """Return tensors and metadata of LoRA files in other tools' layouts."""
    ours = network(family)
    linears = {path: x for path, x in ours.named_modules() if isinstance(x, nn.Linear)}
    shapes = {path: tuple(layer.weight.shape) for path, layer in linears.items()}
    weights = {f"{path}.weight": layer.weight for path, layer in linears.items()}
    theirs = transformer_to_diffusers(weights, ours.config)
    diffusers = {name.removesuffix(".weight"): tuple(x.shape) for name, x in theirs.items()}
    alpha = {"alpha": torch.tensor(3.0)}

    def layout(prefix: str, layers: dict, factors: Callable, flat: bool = False) -> dict:
        tensors = {}
        some = list(layers.items())[::3]
        for seed, (path, (rows, columns)) in enumerate(some):
            name = prefix + (path.replace(".", "_") if flat else path)
            parts = factors(rows, columns, seed)
            tensors |= {f"{name}.{end}": tensor.contiguous() for end, tensor in parts.items()}
        return tensors

    def pair(down: str, up: str, more: dict, rows: int, columns: int, seed: int) -> dict:
        a, b = random(4, columns, seed=seed, size=0.1), random(rows, 4, seed=seed, size=0.1)
        return {down: a, up: b} | {name: tensor.clone() for name, tensor in more.items()}

    ab = partial(pair, "lora_A.weight", "lora_B.weight", {})
    down_up = partial(pair, "lora_down.weight", "lora_up.weight", alpha)

    def dora(rows: int, columns: int, seed: int) -> dict:
        return ab(rows, columns, seed) | {"lora_magnitude_vector": 1 + random(rows).square()}

    def loha(rows: int, columns: int, seed: int) -> dict:
        return {
            f"hada_w{k}_{letter}": random(*shape, seed=seed + k, size=0.1)
            for k in (1, 2)
            for letter, shape in (("a", (rows, 4)), ("b", (4, columns)))
        } | {"alpha": torch.tensor(4.0)}

    def lokr(rows: int, columns: int, seed: int) -> dict:
        return {
            "lokr_w1": random(4, 4, seed=seed, size=0.1),
            "lokr_w2": random(rows // 4, columns // 4, seed=seed, size=0.1),
            "alpha": torch.tensor(4.0),
        }

    def full(rows: int, columns: int, seed: int) -> dict:
        return {"diff": random(rows, columns, seed=seed, size=0.01)}

    note = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    kohya = {"ss_network_dim": "4", "ss_network_alpha": "3", "ss_network_module": "networks.lora"}
    return {
        "diffusers": (layout("transformer.", diffusers, ab), note),
        "PEFT": (layout("base_model.model.", shapes, ab), {}),
        "kohya": (layout("lora_unet_", shapes, down_up, flat=True), kohya),
        "OneTrainer": (layout("lora_transformer_", diffusers, down_up, flat=True), {}),
        "LyCORIS": (layout("lycoris_", diffusers, lokr, flat=True), {}),
        "ai-toolkit": (layout("diffusion_model.", shapes, dora), {}),
        "ComfyUI": (layout("diffusion_model.", shapes, down_up), {}),
        "LoHa": (layout("lora_unet_", shapes, loha, flat=True), {}),
        "differences": (layout("diffusion_model.", shapes, full), {}),
    }


def run_lora(family: str, path: Path) -> None:
    ours = network(family)
    before = [(module, dict(module._parameters)) for module in ours.modules()]
    try:
        deltas = match_layers(read_lora(path), {"transformer": ours})
        merge(ours, [(delta, 0.7) for delta in deltas])
        ours(**inputs(ours.config))
    finally:  # merging replaces weights; a control LoRA makes img_in wider
        for module, parameters in before:
            module._parameters.update(parameters)
        ours.config, ours.img_in.in_features = CONFIGS[family], CONFIGS[family].in_channels


@kind(cases=200)
def loras() -> list[Input]:
    found = []
    for family in CONFIGS:
        use = partial(run_lora, family)
        contents = [save(*layout) for layout in lora_layouts(family).values()]
        if family == "flux.1":
            contents.append(written(partial(control_lora, network=network(family))))
        for content in contents:
            files = {"lora.safetensors": content}
            found.append(
                Input(files, "lora.safetensors", mutators.DOCUMENTS, use, read_safetensors)
            )
    return found


@kind(cases=200)
def adapter_configs() -> list[Input]:
    content = save(*lora_layouts("flux.2")["PEFT"])
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {"img_in": 2, "^double_blocks.0.img_attn.qkv": 16.0},
        "rank_pattern": {},
        "target_modules": "all-linear",
        "use_rslora": False,
        "use_dora": False,
    }
    files = {
        "adapter_model.safetensors": content,
        "adapter_config.json": json.dumps(config).encode(),
    }

    def use(path: Path) -> None:
        run_lora("flux.2", path.with_name("adapter_model.safetensors"))

    def check(path: Path) -> None:
        config = json.loads(path.read_bytes().decode())
        require(isinstance(config, dict), "no table")
        alpha = config.get("lora_alpha", 1)
        require(isinstance(alpha, int | float) and math.isfinite(alpha), "alpha is no number")

    return [Input(files, "adapter_config.json", mutators.JSON, use, check)]


# ---------------------------------------------------------------- captures and kits

RECIPE = dict(
    model="flux.2-tiny",
    mode="text",
    prompt="a cat",
    negative_prompt=None,
    width=64,
    height=64,
    steps=2,
    guidance=None,
    true_cfg_scale=None,
    seed=0,
    images=None,
    dtype="float32",
    numerics="exact",
    schedule=[1.0, 0.5, 0.0],
    files={"transformer": [{"file": "x", "size": 3, "sha256": "0" * 64}]},
    loras=[],
)


def write_capture(path: Path, keep: capture_file.Kind) -> None:
    """Write a capture of every kind of tensor, with tolerances and measured rounding."""
    with capture_file.Writer(path, dict(RECIPE)) as writer:
        writer.add("text/ids", torch.arange(12)[None])
        writer.add("step.001/double_blocks.0/out", random(1, 80, 64), keep)
        writer.add("step.001/double_blocks.0/out.1", random(1, 80, 64), keep)  # equal bytes
        writer.add("step.001/latents", random(1, 16, 4, 4))
        writer.add("half", random(1, 7, 5).half())
        writer.add("image", torch.zeros(16, 16, 3, dtype=torch.uint8))
    rounding = {name: tolerances.Rounding(0.01, 0.02) for name in ("step.001/latents", "half")}
    tolerances.store_rounding(path, {"float32": rounding})


@kind(cases=200)
def captures() -> list[Input]:
    """Captures that keep all, slices, probes and statistics; and a plain file of a port."""
    kinds: tuple[capture_file.Kind, ...] = ("full", "slice", "probe", "statistics")
    contents = [written(partial(write_capture, keep=keep)) for keep in kinds]
    sound = contents[0]
    plain = {name: tensor.float() for name, tensor in {"half": random(1, 7, 5)}.items()}
    contents.append(save(plain | {"step.001/latents": random(1, 16, 4, 4)}))

    def use(path: Path) -> None:
        a, b = capture_file.Capture(path), capture_file.Capture(path.with_name("sound.safetensors"))
        for judged, reference in ((a, b), (b, a)):
            rows = compare.compare(judged, reference)
            compare.table(rows), compare.to_json(rows), compare.verdict(rows)
            page = report.heading(judged, reference, rows) + report.recipes(judged, reference)
            page += report.all_rows(rows)
            assert "<script" not in page and "\x1b" not in page, "not escaped"
            rounded = tolerances.stored_rounding(reference)
            for precision in rounded:
                tolerances.format_ratio(rows, reference, precision)
        if "model" in a.recipe:
            replay.request_of(a)
        for name in a.names:
            if a.kind(name) == "probe":
                a.tokens(name)

    files = {"sound.safetensors": sound}
    return [
        Input(
            files | {"a.safetensors": x}, "a.safetensors", mutators.DOCUMENTS, use, read_safetensors
        )
        for x in contents
    ]


def block_tensors(family: str) -> dict[str, Tensor]:
    """Run the network; return the tensors of its first block that a kit's example computes with."""
    found: dict[str, Tensor] = {}
    with watching({"step.001": network(family)}, found.__setitem__), torch.no_grad():
        network(family)(**one_sample(CONFIGS[family]))
    found["step.001/vec"] = next(x for name, x in found.items() if re.search(r"mod\w*/in$", name))
    return {name: tensor for name, tensor in found.items() if re.fullmatch(IN_EXAMPLE, name)}


IN_EXAMPLE = r"step\.001/(vec|double_blocks\.0/(in\.[01]|arg\.2|out\.[01]|attention/\w+)|"
IN_EXAMPLE += r"(double_blocks\.0\.|double_stream_)\w+(mod|ulation_\w+)/out\.\d|"
IN_EXAMPLE += r"double_blocks\.0\.\w+(attn\.qkv/in|attn\.norm/out\.\d|mlp/in|mlp\.1/out))"


def one_sample(config: FluxConfig) -> dict[str, Tensor]:
    """Return the first sample of a batch of inputs; ids have no batch."""
    found = inputs(config).items()
    return {name: x if name.endswith("ids") else x[:1] for name, x in found}


@kind(cases=200)
def kits() -> list[Input]:
    """The tensors and the weights of a golden kit. The kit's example must judge neither wrongly."""

    def use(path: Path) -> None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
            try:
                wrong = example_port.main(path.parent, path.with_name("weights.safetensors"))
            except SystemExit as stopped:
                assert stopped.code == 2 and errors.getvalue().count("\n") == 1
                raise UserError(f"{path}: {errors.getvalue()[:-1]}") from None
        if wrong:
            raise UserError(f"{path}: the example finds wrong tensors")

    def check(sound: dict[str, Entry], path: Path) -> None:
        """Of a kit that agrees, each tensor must be near the sound one."""
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for name, (dtype, shape, data) in sound.items():
            require(name in header, f"{name} is missing")
            found, offsets = header[name], header[name]["data_offsets"]
            require([n for n in found["shape"] if n != 1] == [n for n in shape if n != 1], name)
            require(found["dtype"] == dtype, f"{name} has another dtype")
            x, y = (
                np.frombuffer(part, np.float32).astype(float)
                for part in (content[start:][slice(*offsets)], data)
            )
            require(np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y), f"{name} has other values")

    found = []
    for family in CONFIGS:
        weights = network(family).state_dict()
        block = ("double_blocks.0.", "double_stream_modulation")
        states = {
            "expected.safetensors": block_tensors(family),
            "weights.safetensors": {k: x for k, x in weights.items() if k.startswith(block)},
        }
        files = {
            name: written(partial(golden_kit.write_tensors, tensors=state))
            for name, state in states.items()
        }
        for name, content in files.items():
            damage = [*mutators.SAFETENSORS]
            check_this = partial(check, strict(content)[0])
            found.append(Input(files, name, damage, use, check_this))
    return found


# ---------------------------------------------------------------- training


def trainer_at(path: Path) -> Trainer:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = make_optimizer("adamw", module.parameters(), 0.05)
    return Trainer(module, path, {"a": 1}, [optimizer], warmup_cosine(60), ema_decay=0.9)


@torch.enable_grad()
def take_step(trainer: Trainer) -> None:
    trainer.update([lambda: trainer.module(random(5, 4)).square().mean()])


@kind(cases=200)
def checkpoints() -> list[Input]:
    def write(path: Path) -> None:
        trainer = trainer_at(path)
        take_step(trainer)
        trainer.save()

    content = written(write)
    expected = same_tensors(content)

    def use(path: Path) -> None:
        trainer = trainer_at(path)
        take_step(trainer)
        trainer.save()

    def check(path: Path) -> None:
        expected(path)
        tensors, metadata = read_safetensors(path)
        require(0 <= int(metadata["step"]) <= 60, "a step outside of the run")
        for name, entry in tensors.items():
            require(entry.dtype == "F32", f"{name} is no float32")
            require(np.isfinite(np.frombuffer(entry.data, np.float32)).all(), f"{name} has NaN")

    name = "checkpoint.safetensors"
    return [Input({name: content}, name, mutators.DOCUMENTS, use, check)]


class EncodedOnce(dataset.Cache):
    """A cache whose one image and one caption are encoded once for all cases."""

    def _encode(self, pixels: Tensor) -> Tensor:
        return encoded()["latents"]

    def features(self, caption: str, source: str = "prompt") -> Path:
        self.pipe.text.cache[caption] = encoded()["features"]
        return super().features(caption, source)


@cache
def toy() -> flux.Pipeline:
    return flux.load("flux.2-tiny", device="cpu")


@cache
def encoded() -> dict:
    return {"latents": random(1, 64, 4, 5), "features": toy().text.encode(["a red circle"])}


@kind(cases=200)
def caches() -> list[Input]:
    """Cached latents and text features, which are made again if they are damaged."""

    def fill(folder: Path) -> dataset.CachedSample:
        image = folder.with_suffix(".png")  # its content, not its place, names the files
        image.write_bytes(picture("PNG"))
        sample = dataset.Sample(image, "a red circle")
        return EncodedOnce(folder, toy(), 64).sample(sample)

    files = written_folder(fill)
    expected = {name: strict(content)[0] for name, content in files.items()}

    def use(path: Path) -> None:
        batches.collate([fill(path.parent)], axes=4)
        assert read_safetensors(path)[0] == expected[path.name], "other tensors"

    return [Input(files, name, mutators.DOCUMENTS, use) for name in files]


COLUMNS = ("step", "loss", "seconds")


@kind(cases=200)
def loss_logs() -> list[Input]:
    content = "step,loss,seconds\r\n" + "".join(f"{k},0.{k}5,1.5\r\n" for k in range(1, 30))

    def use(path: Path) -> None:
        log = CSVLog(path, COLUMNS, step=20)
        log.add(21, 0.5, 1.0)
        assert log.column("loss")[-1] == 0.5

    def check(path: Path) -> None:
        head, *lines, last = path.read_bytes().decode().split("\r\n")
        require(head == ",".join(COLUMNS), "other columns")
        require(last == "", "the last line has no end")
        steps = []
        for line in lines:
            require(re.fullmatch(r"\d+(,\s*[\d.e+-]+\s*){2}", line), f"no row: {line}")
            steps.append(int(line.split(",")[0]))
        require(steps == sorted(set(steps)) and steps[-1] == 21, f"steps {steps}")

    return [Input({"loss.csv": content.encode()}, "loss.csv", mutators.LINES, use, check)]


@kind(cases=200)
def training_folders() -> list[Input]:
    """Captions, in files and in metadata.jsonl."""
    images = {f"{name}.png": picture("PNG", seed) for seed, name in enumerate("abc")}
    lines = [
        {"image": "b.png", "caption": "it is night", "references": ["a.png", "c.png"]},
        {"image": "a.png", "caption": "day", "control": "b.png"},
        {"image": "c.png", "caption": "dé", "mask": "b.png"},
    ]
    listed = images | {"metadata.jsonl": "\n".join(map(json.dumps, lines)).encode()}
    captions = {f"{name}.txt": f"a caption of {name}, é\n".encode() for name in "abc"}

    def use(path: Path) -> None:
        for sample in dataset.read_folder(path.parent):
            assert sample.caption.strip() and isinstance(sample.caption, str)
            for file in (sample.image, *sample.references, sample.control, sample.mask):
                assert file is None or file.is_file()

    return [
        Input(listed, "metadata.jsonl", mutators.JSON_LINES, use),
        Input(images | captions, "b.txt", mutators.BYTES, use),
    ]


# ---------------------------------------------------------------- images and prompts


def picture(format: str, seed: int = 0, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode).save(file, format, **options)
    return file.getvalue()


@kind(cases=300)
def images() -> list[Input]:
    """Images and masks in the formats that flux reads."""

    def use(path: Path) -> None:
        image = image_input.read_image(path)
        assert image.mode == "RGB" and np.asarray(image).shape[2] == 3

    def use_mask(path: Path) -> None:
        assert image_input.read_mask(path).mode == "L"

    found = []
    encodings = [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("TIFF", {}), ("BMP", {}), ("AVIF", {})]
    encodings += [("JPEG", {"progressive": True}), ("WEBP", {"lossless": True}), ("GIF", {})]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    encodings += [("PNG", {"exif": exif}), ("JPEG", {"exif": exif}), ("JPEG2000", {}), ("TGA", {})]
    for format, options in encodings:
        file = f"image.{format.lower()}"
        kinds = mutators.PNG if format == "PNG" else mutators.IMAGE
        found.append(Input({file: picture(format, **options)}, file, kinds, use))
        if format in ("PNG", "WEBP"):
            gray = picture(format, mode="L", **options)
            found.append(Input({file: gray}, file, kinds, use_mask))
            found.append(Input({file: picture(format, mode="RGBA", **options)}, file, kinds, use))
    return found


class Accepted(Exception):
    """The request was accepted: the model would be loaded now."""


@cache
def sample():
    """Return scripts/sample.py, which stops where it would load the model."""
    module = script("sample")

    def load(args, fast: bool = True):
        raise Accepted(args)

    module.load = load
    return module


def request(*arguments: object) -> object:
    """Let sample.py check a request; return the arguments that it would run with."""
    module = sample()
    args = module.parser().parse_args(list(map(str, arguments)))
    try:
        module.run(args)
    except Accepted:
        return args
    raise AssertionError("the model was not loaded")


RECORD = dict(
    model="flux.2-tiny",
    prompt="a red circle",
    negative_prompt=None,
    width=64,
    height=64,
    steps=4,
    guidance=None,
    true_cfg_scale=None,
    seed=7,
    numerics="exact",
    dtype="float32",
    decode_dtype=None,
    solver="heun",
    sigmas=None,
    shift=1.5,
    transformer=None,
    autoencoder=None,
    quantize=None,
    fp8_matmul=False,
    compile=False,
    vae_tile=None,
    image_options=None,
    images=[],
    mask=None,
    loras=[],
)


@kind(cases=200)
def image_records() -> list[Input]:
    """Images that hold the request by which they were made."""

    def use(path: Path) -> None:
        args = request("--from-image", path, "--output", path.with_name("new.png"))
        assert isinstance(args.prompts[0], str) and type(args.seed) is int, "a record's types"
        for number in (args.width, args.height, args.steps):
            assert type(number) is int and 0 < number < 2**31, "a record's sizes"
        assert args.dtype in ("float32", "bfloat16")

    found = []
    for suffix in ("png", "jpg", "webp"):

        def write(path: Path) -> None:
            output.save(Image.new("RGB", (16, 16)), path, RECORD)

        file = f"made.{suffix}"
        kinds = mutators.RECORD if suffix == "png" else [*mutators.BYTES]
        found.append(Input({file: written(write, file)}, file, kinds, use))
    return [found[0], found[0], found[0], *found]


@kind(cases=200)
def prompt_files() -> list[Input]:
    lines = ["a red circle", "", "a café — 35mm", "  two rings  ", "x" * 300]

    def use(path: Path) -> None:
        request("--prompt-file", path, "--output", path.with_name("new.png"))

    def check(path: Path) -> None:
        text = path.read_bytes().decode("utf-8-sig", "strict") if path.exists() else ""
        require(text.strip() and "\0" not in text, "no prompts")

    content = "\n".join(lines).encode()
    return [Input({"prompts.txt": content}, "prompts.txt", mutators.LINES, use, check)]
