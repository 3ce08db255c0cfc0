"""Print or check the name, dtype and shape of every tensor of the released files.

    python scripts/dev/manifest.py FILE [FILE ...]                        print a network's manifest
    python scripts/dev/manifest.py --check flux.2-klein-4b --weights DIR  check a model
    python scripts/dev/manifest.py --markdown                             print weights.md's tables
    python scripts/dev/manifest.py --rebuild                              rewrite tests/manifests

FILE is a .safetensors file, or the .safetensors.index.json of several. tests/manifests has one
manifest for each network, made from diffusers' and transformers' classes. Only headers are read,
except that --check computes the SHA-256 of files whose checksum is published.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from modules.command_line import Parser, exit_code, imports, show


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", type=Path, metavar="FILE", help="files of one network")
    p.add_argument("--check", metavar="MODEL", help="check the files of this model")
    p.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="folder of the files (default: $FLUX_WEIGHTS, or the Hugging Face cache)",
    )
    p.add_argument("--markdown", action="store_true", help="print the tables of weights.md")
    p.add_argument("--rebuild", action="store_true", help="write tests/manifests/*.json again")
    return p


with imports(__name__, parser):
    import torch
    from torch import nn

    from flux import configs
    from flux.autoencoder import AutoEncoder, AutoEncoderConfig
    from flux.clip import CLIP, CLIPConfig
    from flux.configs import EMBEDDED, MODELS, FLUX1Text, ModelSpec
    from flux.language_model import LanguageModel, LanguageModelConfig
    from flux.siglip import Redux, ReduxConfig, SigLIP, SigLIPConfig
    from flux.t5 import T5, T5Config
    from flux.text_encoder import clip_ignore_keys, language_model_ignore_keys, t5_ignore_keys
    from flux.transformer import Flux, FluxConfig
    from flux.transformer3 import Flux3, Flux3Config
    from flux.weights.checksums import PUBLISHED
    from flux.weights.diffusers_names import from_diffusers
    from flux.weights.files import BITS, find_files, is_local, read_header, shard_files
    from flux.weights.load import init_empty
    from flux.weights.locate import get_spec

FOLDER = ROOT / "tests" / "manifests"
FLAGS = {"name": "--check", "weights": "--weights"}
CONTROL = replace(configs.FLUX1, in_channels=128)  # channels of the noise and a control image


@dataclass(frozen=True)
class ControlLoraConfig:
    """A control LoRA of Black Forest Labs: the transformer it changes, and its rank.

    The rank is lower where a layer has fewer inputs or outputs.
    """

    transformer: FluxConfig = CONTROL
    rank: int = 128


@dataclass(frozen=True)
class QuantizedConfig:
    """A transformer quantized by Black Forest Labs: its blocks' matrices, except `skipped`.

    Of FLUX 3's files, it is not known which matrices stay in bfloat16: these manifests skip none.
    """

    transformer: FluxConfig | Flux3Config
    weight_format: Literal["fp8", "nvfp4", "fp8r", "comfy-int8-convrot"]
    skipped: str = ""  # a part of a layer's name


MANIFESTS = {
    "flux1-dev": configs.FLUX1,
    "flux1-schnell": replace(configs.FLUX1, guidance=False),
    "flux1-fill": replace(configs.FLUX1, in_channels=384),
    "flux1-control": CONTROL,
    "flux1-control-lora": ControlLoraConfig(),
    "flux2-dev": configs.FLUX2,
    "klein-4b": configs.KLEIN_4B,
    "klein-9b": configs.KLEIN_9B,
    "flux2-dev-nvfp4": QuantizedConfig(configs.FLUX2, "nvfp4", skipped="txt_attn"),
    "klein-4b-fp8": QuantizedConfig(configs.KLEIN_4B, "fp8"),
    "klein-4b-nvfp4": QuantizedConfig(configs.KLEIN_4B, "nvfp4"),
    "klein-9b-fp8": QuantizedConfig(configs.KLEIN_9B, "fp8"),
    "klein-9b-nvfp4": QuantizedConfig(configs.KLEIN_9B, "nvfp4"),
    "flux3-klein": configs.KLEIN3,
    "flux3-klein-base": configs.KLEIN3_BASE,
    "flux3-klein-fp8r": QuantizedConfig(configs.KLEIN3, "fp8r"),
    "flux3-klein-nvfp4": QuantizedConfig(configs.KLEIN3, "nvfp4"),
    "flux3-klein-int8-convrot": QuantizedConfig(configs.KLEIN3, "comfy-int8-convrot"),
    "flux3-klein-base-fp8r": QuantizedConfig(configs.KLEIN3_BASE, "fp8r"),
    "flux3-klein-base-nvfp4": QuantizedConfig(configs.KLEIN3_BASE, "nvfp4"),
    "flux3-klein-base-int8-convrot": QuantizedConfig(configs.KLEIN3_BASE, "comfy-int8-convrot"),
    "flux1-tiny": configs.TINY1,
    "flux2-tiny": configs.TINY,
    "ae-flux1": configs.AE1,
    "ae-flux2": configs.AE2,
    "ae-flux2-small-decoder": configs.AE2_SMALL_DECODER,
    "ae-flux1-tiny": configs.AE1_TINY,
    "ae-tiny": configs.AE_TINY,
    "t5-xxl": T5Config(),
    "clip-l": CLIPConfig(),
    "t5-tiny": configs.T5_TINY,
    "clip-tiny": configs.CLIP_TINY,
    "siglip": SigLIPConfig(),
    "redux": ReduxConfig(),
    "qwen3-4b": configs.QWEN3_4B,
    "qwen3-8b": configs.QWEN3_8B,
    "mistral-small": configs.MISTRAL,  # only the tensors that are read
    "qwen3-vl-4b": configs.QWEN3_VL_4B,  # likewise
    "qwen3-tiny": configs.QWEN3_TINY,
}
CONVROT = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
FLOAT32 = ("ae-flux1", "ae-flux2", "ae-flux2-small-decoder")  # all others were released in bfloat16
QWEN3_DEPTH = 36  # layers in the released files; 27 are read

NetworkConfig = (
    FluxConfig
    | Flux3Config
    | AutoEncoderConfig
    | T5Config
    | CLIPConfig
    | LanguageModelConfig
    | SigLIPConfig
    | ReduxConfig
)
Config = NetworkConfig | ControlLoraConfig | QuantizedConfig
Manifest = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype in safetensors' spelling, shape


def main() -> int:
    args = parser().parse_args()
    if not (args.files or args.check or args.markdown or args.rebuild):
        parser().error("give a FILE, --check, --markdown or --rebuild")
    return exit_code(lambda: run(args), FLAGS, FOLDER, "stopped")


def run(args: argparse.Namespace) -> int:
    if args.files:
        show(*dumps(from_files(args.files)).splitlines())
    elif args.check:
        return check(get_spec(args.check), args.weights)
    elif args.markdown:
        show(*"\n\n".join(tables()).splitlines())
    else:
        for name, config in MANIFESTS.items():
            (FOLDER / f"{name}.json").write_text(dumps(from_reference(config)))
    return 0


# ---------------------------------------------------------------- manifests


def from_files(files: Sequence[Path]) -> Manifest:
    infos = [read_header(shard)[0] for file in files for shard in shard_files(file)]
    return {name: (info.dtype, info.shape) for infos in infos for name, info in infos.items()}


def from_json(name: str) -> Manifest:
    tensors = json.loads((FOLDER / f"{name}.json").read_text())["tensors"]
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}


def dumps(manifest: Manifest) -> str:
    """Return JSON with a line for each tensor."""
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest.items()
    )
    return f'{{"count": {len(manifest)}, "bytes": {size(manifest)}, "tensors": {{\n{lines}\n}}}}\n'


def size(manifest: Manifest) -> int:
    """Return the bytes of the tensors; a file's header has about a hundred more for each."""
    return sum(prod(shape) * BITS[dtype] // 8 for dtype, shape in manifest.values())


def name_of(config: Config) -> str:
    return next(name for name, other in MANIFESTS.items() if other == config)


KINDS = {
    FluxConfig: Flux,
    Flux3Config: Flux3,
    AutoEncoderConfig: AutoEncoder,
    T5Config: T5,
    CLIPConfig: CLIP,
    LanguageModelConfig: LanguageModel,
    SigLIPConfig: SigLIP,
    ReduxConfig: Redux,
}


def on_meta(config: NetworkConfig) -> nn.Module:
    return init_empty(lambda: KINDS[type(config)](config))


# ---------------------------------------------------------------- the reference


def from_reference(config: Config) -> Manifest:
    """Build a manifest from diffusers' or transformers' class, under the released names."""
    from flux.parity import reference, reference3

    if isinstance(config, ControlLoraConfig):
        return lora_of(from_reference(config.transformer), config.rank)
    if isinstance(config, QuantizedConfig):
        return quantized(from_reference(config.transformer), config)
    if isinstance(config, (SigLIPConfig, ReduxConfig)):
        return listed(adapter(config), "BF16")
    if not isinstance(config, (FluxConfig, Flux3Config, AutoEncoderConfig)):
        return listed(text_encoder(config), "BF16")
    ours = on_meta(config).state_dict()
    if isinstance(config, Flux3Config):
        translated, theirs = (
            reference3.transformer3_to_diffusers(ours),
            reference3.diffusers_transformer3(config),
        )
    elif isinstance(config, FluxConfig):
        translated, theirs = (
            reference.transformer_to_diffusers(ours, config),
            reference.diffusers_transformer(config),
        )
    else:
        translated, theirs = (
            reference.autoencoder_to_diffusers(ours, config),
            reference.diffusers_autoencoder(config),
        )
    # The translated names and shapes must be exactly diffusers': they are the source of truth.
    assert reference.shapes(translated) == reference.shapes(theirs.state_dict()), (
        f"{name_of(config)} differs from diffusers"
    )
    return listed(ours, "F32" if name_of(config) in FLOAT32 else "BF16")


def text_encoder(config: T5Config | CLIPConfig | LanguageModelConfig) -> dict[str, torch.Tensor]:
    """Return transformers' names and tensors of the file.

    Of T5, Mistral and Qwen3-VL, only what is read.
    """
    from flux.parity import reference, reference3

    all_layers = config in (configs.QWEN3_4B, configs.QWEN3_8B)
    with torch.device("meta"):
        if isinstance(config, T5Config):
            state = reference.transformers_t5(config).state_dict()
            return {name: tensor for name, tensor in state.items() if not t5_ignore_keys(name)}
        if isinstance(config, CLIPConfig):
            state = reference.transformers_clip(config, eos_id=2).state_dict()
            return {f"text_model.{name}": tensor for name, tensor in state.items()}
        depth = QWEN3_DEPTH if all_layers else 1 + max(config.layers)
        if config.padding_position is not None:
            state = reference3.transformers_qwen_vl(config, depth).state_dict()
        else:
            state = reference.transformers_language_model(
                config, depth, mistral=not config.qk_norm
            ).state_dict()
    if config == configs.QWEN3_4B:
        del state["lm_head.weight"]  # tied to the embedding
    if not all_layers:
        state = {
            name: t
            for name, t in state.items()
            if not language_model_ignore_keys(bare(name), max(config.layers))
        }
    short = config in (configs.MISTRAL, configs.QWEN3_VL_4B)
    return {bare(name): t for name, t in state.items()} if short else state


def adapter(config: SigLIPConfig | ReduxConfig) -> dict[str, torch.Tensor]:
    """Return the networks of FLUX.1 Redux, with the pooling head of SigLIP, which is not read."""
    from flux.parity import reference

    with torch.device("meta"):
        if isinstance(config, ReduxConfig):
            return reference.diffusers_redux(config).state_dict()
        return {
            f"vision_model.{name}": tensor
            for name, tensor in reference.transformers_siglip(config).state_dict().items()
        }


def lora_of(transformer: Manifest, rank: int) -> Manifest:
    """Return a LoRA for every matrix of a transformer, with a bias after B, and new norm scales."""
    found = {}
    for name, (dtype, shape) in transformer.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "scale":
            found[name] = dtype, shape
        elif leaf == "weight":
            outputs, inputs = shape
            inner = min(rank, outputs, inputs)
            found[f"{layer}.lora_A.weight"] = dtype, (inner, inputs)
            found[f"{layer}.lora_B.weight"] = dtype, (outputs, inner)
            found[f"{layer}.lora_B.bias"] = dtype, (outputs,)
    return found


def quantized(transformer: Manifest, config: QuantizedConfig) -> Manifest:
    """Return the transformer with packed weights and their scales."""
    found = {}
    for name, (dtype, shape) in transformer.items():
        layer, _, leaf = name.rpartition(".")
        if (
            leaf != "weight"
            or "_blocks." not in layer
            or (config.skipped and config.skipped in layer)
        ):
            found[name] = dtype, shape
            continue
        rows, columns = shape
        if config.weight_format == "fp8r":
            found[name] = "F8_E4M3", shape
            found[f"{layer}.weight_scale"] = "F32", (rows,)
            continue
        if config.weight_format == "comfy-int8-convrot":
            found[name] = "I8", shape
            found[f"{layer}.weight_scale"] = "F32", (rows, 1)
            found[f"{layer}.comfy_quant"] = "U8", (len(CONVROT),)
            continue
        if config.weight_format == "fp8":
            found[name] = "F8_E4M3", shape
            found[f"{layer}.weight_scale"] = "F32", ()
        else:
            found[name] = "U8", (rows, columns // 2)
            found[f"{layer}.weight_scale"] = (
                "F8_E4M3",
                (rows, columns // 16),
            )  # no padding: these sizes are multiples of 128 and 4
            found[f"{layer}.weight_scale_2"] = "F32", ()
        found[f"{layer}.input_scale"] = "F32", ()
    return found


def listed(state: dict[str, torch.Tensor], dtype: str) -> Manifest:
    return {
        name: (dtype if t.is_floating_point() else "I64", tuple(t.shape))
        for name, t in state.items()
    }


def bare(name: str) -> str:
    """Remove the prefix; files of Mistral Small have one of two."""
    return re.sub(r"^(language_model\.)?model\.(language_model\.)?", "", name)


# ---------------------------------------------------------------- files against manifests


class Part(NamedTuple):
    config: Config
    repository: str
    files: tuple[str, ...]  # any one of them is enough


ADAPTERS = {
    "lora": ("LoRA", ControlLoraConfig()),
    "redux": ("Redux", ReduxConfig()),
    "siglip": ("SigLIP", SigLIPConfig()),
}


def parts(spec: ModelSpec) -> dict[str, Part]:
    """Return the networks of a model, and the possible files of each."""
    text = spec.text
    if isinstance(text, FLUX1Text):
        networks = {"T5": (text.t5, text.t5_files), "CLIP": (text.clip, text.clip_files)}
    else:
        networks = {"text encoder": (text.model, text.files)}
    networks |= {"transformer": (transformer_of(spec), (spec.transformer_file,))}
    networks |= {"autoencoder": (spec.autoencoder, spec.autoencoder_files)}
    found = {
        part: Part(config, spec.repository, files) for part, (config, files) in networks.items()
    }
    for name, file in spec.addon.files if spec.addon else ():
        part, config = ADAPTERS.get(name, (name, transformer_of(spec)))
        found[part] = Part(config, spec.addon.repository, (file,))
    return found


def transformer_of(spec: ModelSpec) -> Config:
    alike = (
        c
        for c in MANIFESTS.values()
        if isinstance(c, QuantizedConfig) and c.transformer == spec.transformer
    )
    return next(
        (config for config in alike if config.weight_format == spec.weight_format), spec.transformer
    )


def check(spec: ModelSpec, weights: Path | None) -> int:
    """Print the differences of each network; return 0 if there are none, else 1."""
    problems = 0
    for part, (config, repository, choices) in parts(spec).items():
        if spec.embedded:
            files = [EMBEDDED / spec.name / choices[0]]
        elif found := [name for name in choices if is_local(repository, name, weights)]:
            files = find_files(repository, found[0], weights)
        else:
            show(f"{part}: {choices[0]} of {repository} is not here")
            problems += 1
            continue
        lines = differences(comparable(from_files(files), config), from_json(name_of(config)))
        if not lines:
            lines = checksum_differences(files[0])
        show(f"{part}: {files[0]}: {'; '.join(lines) or 'as expected'}")
        problems += bool(lines)
    return 1 if problems else 0


def comparable(manifest: Manifest, config: Config) -> Manifest:
    """Return a file's manifest without the differences that files of one network may have."""
    match config:
        case AutoEncoderConfig():  # diffusers' names, and Linears for 1x1 convolutions
            expected = {
                name: tuple(tensor.shape) for name, tensor in on_meta(config).state_dict().items()
            }
            named = {from_diffusers(name): entry for name, entry in manifest.items()}
            return {
                n: (d, (*s, 1, 1) if (*s, 1, 1) == expected.get(n) else s)
                for n, (d, s) in named.items()
            }
        case T5Config():
            return {name: entry for name, entry in manifest.items() if not t5_ignore_keys(name)}
        case CLIPConfig():
            return {name: entry for name, entry in manifest.items() if not clip_ignore_keys(name)}
        case SigLIPConfig():  # Google's file has a text half too, and old files have position ids
            vision = {
                name: entry for name, entry in manifest.items() if name.startswith("vision_model.")
            }
            return {
                name: entry for name, entry in vision.items() if not name.endswith(".position_ids")
            }
        case LanguageModelConfig(qk_norm=False) | LanguageModelConfig(padding_position=1):
            named = {bare(name): entry for name, entry in manifest.items()}
            return {
                name: entry
                for name, entry in named.items()
                if not language_model_ignore_keys(name, max(config.layers))
            }
    return manifest


def differences(found: Manifest, expected: Manifest) -> list[str]:
    """Describe each kind of difference, with its first tensor as an example."""
    both = found.keys() & expected.keys()
    kinds = {
        "missing": expected.keys() - found.keys(),
        "unknown": found.keys() - expected.keys(),
        "of another type": {name for name in both if found[name][0] != expected[name][0]},
        "of another shape": {name for name in both if found[name][1] != expected[name][1]},
    }
    lines = []
    for kind, names in kinds.items():
        if names:
            first = min(names)
            seen, due = (
                "{} {}".format(*m[first]) if first in m else "nothing" for m in (found, expected)
            )
            lines.append(
                f"{len(names)} of {len(expected)} {kind}, first {first} ({seen} in place of {due})"
            )
    return lines


# ---------------------------------------------------------------- checksums


def checksum_differences(path: Path) -> list[str]:
    """Compare a file with its published size and then, which takes longer, its SHA-256.

    A file without a published checksum has no differences.
    """
    published = PUBLISHED.get(path.name)
    if published is None:
        return []
    size = path.stat().st_size
    if published.size is not None and size != published.size:
        return [f"{size:,} bytes in place of the published {published.size:,}"]
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != published.sha256:
        return [f"SHA-256 {sha256} in place of the published {published.sha256}"]
    return []


# ---------------------------------------------------------------- tables


def tables() -> list[str]:
    """Return the tables of weights.md, which a test compares with that page."""
    return [models_table(), files_table(), checksums_table(), memory_table()]


def models_table() -> str:
    rows = []
    for spec in MODELS.values():
        repositories = [spec.repository, *([spec.addon.repository] if spec.addon else [])]
        links = [f"[{name.split('/')[-1]}](https://huggingface.co/{name})" for name in repositories]
        home = "part of the package" if spec.embedded else " and ".join(links)
        guidance = (
            "none" if spec.guidance is None else f"{spec.guidance:g}" + ", by two passes" * spec.cfg
        )
        image = (
            spec.image_mode
            + f", {spec.control}" * bool(spec.control)
            + ", computed once" * spec.kv_cached_references
        )
        terms = (
            spec.licence.name,
            "yes" if spec.licence.commercial else "no",
            "yes" if spec.licence.gated else "no",
        )
        length = f"up to {spec.text_length}" if spec.flux3 else spec.text_length
        sizes = (f"{spec.size}x{spec.size}", length)
        rows.append((f"`{spec.name}`", home, *terms, image, spec.steps, guidance, *sizes))
    titles = (
        "model, repository, licence, commercial use, gated, image input, steps, guidance, size, "
        "text tokens"
    )
    return table(*titles.split(", "), rows=rows)


def files_table() -> str:
    used: dict[tuple[str, str], list[str]] = {}
    for spec in MODELS.values():
        for config, _, files in parts(spec).values():
            used.setdefault(
                (name_of(config), " or ".join(f"`{file}`" for file in files)), []
            ).append(f"`{spec.name}`")
    used["ae-flux2-small-decoder", "`full_encoder_small_decoder.safetensors`"] = ["none; optional"]
    rows = []
    for (name, files), models in sorted(
        used.items(), key=lambda item: list(MANIFESTS).index(item[0][0])
    ):
        manifest = from_json(name)
        elements = sum(prod(shape) for _, shape in manifest.values())
        link = f"[{name}](tests/manifests/{name}.json)"
        rows.append(
            (link, files, ", ".join(models), len(manifest), f"{elements:,}", f"{size(manifest):,}")
        )
    return table("manifest", "file", "models", "tensors", "elements", "bytes", rows=rows)


def checksums_table() -> str:
    rows = [(f"`{file}`", f"`{sha256}`") for file, (sha256, _) in PUBLISHED.items()]
    return table("file", "SHA-256", rows=rows)


def memory_table() -> str:
    rows = []
    for spec in MODELS.values():
        width = 4 if spec.embedded else 2
        sizes = {
            part: memory(config, width)
            for part, (config, *_) in parts(spec).items()
            if part != "LoRA"  # a LoRA is merged
        }
        transformer, autoencoder = sizes.pop("transformer"), sizes.pop("autoencoder")
        redux = sizes.pop("SigLIP", 0) + sizes.pop("Redux", 0)
        stages = (sum(sizes.values()), transformer, autoencoder, redux)
        columns = (*stages, max(stages), sum(stages))
        rows.append((f"`{spec.name}`", *(f"{n / 1e9:.3g}" if n else "none" for n in columns)))
    return table(
        "model",
        "text encoder",
        "transformer",
        "autoencoder",
        "adapter",
        "largest stage",
        "all",
        rows=rows,
    )


@cache
def memory(config: Config, width: int) -> int:
    """Return the bytes of a network with `width` bytes a number, or of the quantized file."""
    if isinstance(config, QuantizedConfig):
        return size(from_json(name_of(config)))
    return width * sum(p.numel() for p in on_meta(config).parameters())


def table(*titles: str, rows: Sequence[Sequence]) -> str:
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in (titles, ["---"] * len(titles), *rows)
    )


if __name__ == "__main__":
    sys.exit(main())
