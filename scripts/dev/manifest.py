"""What the released files hold: the name, type and shape of every tensor, kept in tests/manifests/, one file a network.

    python scripts/dev/manifest.py FILE [FILE ...]                        the manifest of a network, from its files' headers alone
    python scripts/dev/manifest.py --check flux.2-klein-4b --weights DIR  whether the files of a model hold what they should
    python scripts/dev/manifest.py --markdown                             the tables of weights.md
    python scripts/dev/manifest.py --rebuild                              tests/manifests anew, from diffusers and transformers

FILE is a .safetensors file, or the .safetensors.index.json of several. No weights are read.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from flux import configs
from flux.autoencoder import AutoEncoder, AutoEncoderConfig
from flux.clip import CLIP, CLIPConfig
from flux.configs import EMBEDDED, MODELS, FLUX1Text, ModelSpec
from flux.errors import UserError
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.siglip import Redux, ReduxConfig, SigLIP, SigLIPConfig
from flux.t5 import T5, T5Config
from flux.text_encoder import clip_ignore_keys, language_model_ignore_keys, t5_ignore_keys
from flux.transformer import Flux, FluxConfig
from flux.weights.diffusers_names import from_diffusers
from flux.weights.files import BITS, find_files, is_local, read_header, shard_files
from flux.weights.locate import get_spec

FOLDER = ROOT / "tests" / "manifests"
CONTROL = replace(configs.FLUX1, in_channels=128)  # a control picture's channels beside the noise's


@dataclass(frozen=True)
class ControlLoraConfig:
    """What Black Forest Labs' control LoRAs change, and the rank at which they do, but for layers that have none so high."""

    transformer: FluxConfig = CONTROL
    rank: int = 128


@dataclass(frozen=True)
class QuantisedConfig:
    """A transformer as Black Forest Labs have quantised it: the large matrices of its blocks, but for those in `kept`."""

    transformer: FluxConfig
    storage: Literal["fp8", "nvfp4"]
    kept: str = ""


MANIFESTS = {
    "flux1-dev": configs.FLUX1,
    "flux1-schnell": replace(configs.FLUX1, guidance=False),
    "flux1-fill": replace(configs.FLUX1, in_channels=384),
    "flux1-control": CONTROL,
    "flux1-control-lora": ControlLoraConfig(),
    "flux2-dev": configs.FLUX2,
    "klein-4b": configs.KLEIN_4B,
    "klein-9b": configs.KLEIN_9B,
    "flux2-dev-nvfp4": QuantisedConfig(configs.FLUX2, "nvfp4", kept="txt_attn"),
    "klein-4b-fp8": QuantisedConfig(configs.KLEIN_4B, "fp8"),
    "klein-4b-nvfp4": QuantisedConfig(configs.KLEIN_4B, "nvfp4"),
    "klein-9b-fp8": QuantisedConfig(configs.KLEIN_9B, "fp8"),
    "klein-9b-nvfp4": QuantisedConfig(configs.KLEIN_9B, "nvfp4"),
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
    "mistral-small": configs.MISTRAL,  # of this file, only what is read: 30 of its 40 layers, no eyes, no head
    "qwen3-tiny": configs.QWEN3_TINY,
}
FLOAT32 = ("ae-flux1", "ae-flux2", "ae-flux2-small-decoder")  # all else was released in bfloat16
QWEN3_DEPTH = 36  # layers in the released files, of which 27 are read

NetworkConfig = (
    FluxConfig
    | AutoEncoderConfig
    | T5Config
    | CLIPConfig
    | LanguageModelConfig
    | SigLIPConfig
    | ReduxConfig
)
Config = NetworkConfig | ControlLoraConfig | QuantisedConfig
Manifest = dict[str, tuple[str, tuple[int, ...]]]  # name -> type as safetensors spells it, shape


def main() -> int:
    what = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what.add_argument("files", nargs="*", type=Path, metavar="FILE", help="of one network")
    what.add_argument("--check", metavar="MODEL", help="a name of flux.MODELS")
    what.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="where they are (else $FLUX_WEIGHTS, or the Hugging Face cache)",
    )
    what.add_argument("--markdown", action="store_true", help="print the tables of weights.md")
    what.add_argument("--rebuild", action="store_true", help="write tests/manifests/*.json")
    args = what.parse_args()
    try:
        if args.files:
            print(dumps(from_files(args.files)), end="")
        elif args.check:
            return check(get_spec(args.check), args.weights)
        elif args.markdown:
            print("\n\n".join(tables()))
        elif args.rebuild:
            sys.path.insert(0, str(ROOT / "tests"))  # for its reference.py
            for name, config in MANIFESTS.items():
                (FOLDER / f"{name}.json").write_text(dumps(from_reference(config)))
        else:
            what.error("give a FILE, --check, --markdown or --rebuild")
    except UserError as error:
        print(f"manifest.py: {error}", file=sys.stderr)
        return 2
    return 0


# ---------------------------------------------------------------- manifests


def from_files(files: Sequence[Path]) -> Manifest:
    infos = [read_header(shard)[0] for file in files for shard in shard_files(file)]
    return {name: (info.dtype, info.shape) for infos in infos for name, info in infos.items()}


def from_json(name: str) -> Manifest:
    tensors = json.loads((FOLDER / f"{name}.json").read_text())["tensors"]
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}


def dumps(manifest: Manifest) -> str:
    """JSON with a tensor a line."""
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest.items()
    )
    return f'{{"count": {len(manifest)}, "bytes": {size(manifest)}, "tensors": {{\n{lines}\n}}}}\n'


def size(manifest: Manifest) -> int:
    """Bytes of the tensors; a file has about a hundred more for each, in its header."""
    return sum(prod(shape) * BITS[dtype] // 8 for dtype, shape in manifest.values())


def name_of(config: Config) -> str:
    return next(name for name, other in MANIFESTS.items() if other == config)


KINDS = {
    FluxConfig: Flux,
    AutoEncoderConfig: AutoEncoder,
    T5Config: T5,
    CLIPConfig: CLIP,
    LanguageModelConfig: LanguageModel,
    SigLIPConfig: SigLIP,
    ReduxConfig: Redux,
}


def on_meta(config: NetworkConfig) -> nn.Module:
    with torch.device("meta"):
        return KINDS[type(config)](config)


# ---------------------------------------------------------------- the reference


def from_reference(config: Config) -> Manifest:
    """The manifest that diffusers' or transformers' class gives at these sizes, under the released names."""
    from flux.parity import reference

    if isinstance(config, ControlLoraConfig):
        return lora_of(from_reference(config.transformer), config.rank)
    if isinstance(config, QuantisedConfig):
        return quantised(from_reference(config.transformer), config)
    if isinstance(config, (SigLIPConfig, ReduxConfig)):
        return listed(adapter(config), "BF16")
    if not isinstance(config, (FluxConfig, AutoEncoderConfig)):
        return listed(text_encoder(config), "BF16")
    ours = on_meta(config).state_dict()
    if isinstance(config, FluxConfig):
        translated, theirs = (
            reference.transformer_to_diffusers(ours, config),
            reference.diffusers_transformer(config),
        )
    else:
        translated, theirs = (
            reference.autoencoder_to_diffusers(ours, config),
            reference.diffusers_autoencoder(config),
        )
    # Translated, ours are exactly theirs: it is they who vouch for the released names and shapes.
    assert reference.shapes(translated) == reference.shapes(theirs.state_dict()), (
        f"{name_of(config)} is not diffusers'"
    )
    return listed(ours, "F32" if name_of(config) in FLOAT32 else "BF16")


def text_encoder(config: T5Config | CLIPConfig | LanguageModelConfig) -> dict[str, torch.Tensor]:
    """transformers' names and tensors: of the whole file or, where no more is known, of what is read of it."""
    from flux.parity import reference

    whole = config in (configs.QWEN3_4B, configs.QWEN3_8B)
    with torch.device("meta"):
        if isinstance(config, T5Config):
            state = reference.transformers_t5(config).state_dict()
            return {name: tensor for name, tensor in state.items() if not t5_ignore_keys(name)}
        if isinstance(config, CLIPConfig):
            state = reference.transformers_clip(config, eos_id=2).state_dict()
            return {f"text_model.{name}": tensor for name, tensor in state.items()}
        depth = QWEN3_DEPTH if whole else 1 + max(config.layers)
        state = reference.transformers_language_model(
            config, depth, mistral=not config.qk_norm
        ).state_dict()
    if config == configs.QWEN3_4B:
        del state["lm_head.weight"]  # tied to the embedding
    if not whole:
        state = {
            name: t
            for name, t in state.items()
            if not language_model_ignore_keys(bare(name), max(config.layers))
        }
    return {bare(name): t for name, t in state.items()} if config == configs.MISTRAL else state


def adapter(config: SigLIPConfig | ReduxConfig) -> dict[str, torch.Tensor]:
    """FLUX.1 Redux's networks in transformers and diffusers; the image encoder with the pooling head that is never read."""
    from flux.parity import reference

    with torch.device("meta"):
        if isinstance(config, ReduxConfig):
            return reference.diffusers_redux(config).state_dict()
        return {
            f"vision_model.{name}": tensor
            for name, tensor in reference.transformers_siglip(config).state_dict().items()
        }


def lora_of(transformer: Manifest, rank: int) -> Manifest:
    """A LoRA, with a bias after B, for every matrix of a transformer, and its norms anew."""
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


def quantised(transformer: Manifest, config: QuantisedConfig) -> Manifest:
    """The same transformer with packed weights, and the scales that they need."""
    found = {}
    for name, (dtype, shape) in transformer.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or "_blocks." not in layer or (config.kept and config.kept in layer):
            found[name] = dtype, shape
            continue
        rows, columns = shape
        if config.storage == "fp8":
            found[name] = "F8_E4M3", shape
            found[f"{layer}.weight_scale"] = "F32", ()
        else:
            found[name] = "U8", (rows, columns // 2)
            found[f"{layer}.weight_scale"] = (
                "F8_E4M3",
                (rows, columns // 16),
            )  # whole tiles of 128x4, at all these sizes
            found[f"{layer}.weight_scale_2"] = "F32", ()
        found[f"{layer}.input_scale"] = "F32", ()
    return found


def listed(state: dict[str, torch.Tensor], dtype: str) -> Manifest:
    return {
        name: (dtype if t.is_floating_point() else "I64", tuple(t.shape))
        for name, t in state.items()
    }


def bare(name: str) -> str:
    """Without the prefix, of which Mistral Small's files have one or another."""
    return re.sub(r"^(language_model\.)?model\.(language_model\.)?", "", name)


# ---------------------------------------------------------------- files against manifests


class Part(NamedTuple):
    config: Config
    repository: str
    files: tuple[str, ...]  # any of which will do


ADAPTERS = {
    "lora": ("LoRA", ControlLoraConfig()),
    "redux": ("Redux", ReduxConfig()),
    "siglip": ("SigLIP", SigLIPConfig()),
}


def parts(spec: ModelSpec) -> dict[str, Part]:
    """The networks of a model, and the files that each may lie in."""
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
        if isinstance(c, QuantisedConfig) and c.transformer == spec.transformer
    )
    return next(
        (config for config in alike if config.storage == spec.weight_format), spec.transformer
    )


def check(spec: ModelSpec, weights: Path | None) -> int:
    """Prints what differs, network by network; 0 if nothing does."""
    faults = 0
    for part, (config, repository, choices) in parts(spec).items():
        if spec.embedded:
            files = [EMBEDDED / spec.name / choices[0]]
        elif found := [name for name in choices if is_local(repository, name, weights)]:
            files = find_files(repository, found[0], weights)
        else:
            print(f"{part}: {choices[0]} of {repository} is not here")
            faults += 1
            continue
        lines = differences(comparable(from_files(files), config), from_json(name_of(config)))
        print(f"{part}: {files[0]}: {'; '.join(lines) or 'as it should be'}")
        faults += bool(lines)
    return 1 if faults else 0


def comparable(manifest: Manifest, config: Config) -> Manifest:
    """A file's manifest, less the ways in which files of the same network may rightly differ."""
    match config:
        case AutoEncoderConfig():  # diffusers' names, and Linears for 1x1 convolutions
            wanted = {
                name: tuple(tensor.shape) for name, tensor in on_meta(config).state_dict().items()
            }
            named = {from_diffusers(name): entry for name, entry in manifest.items()}
            return {
                n: (d, (*s, 1, 1) if (*s, 1, 1) == wanted.get(n) else s)
                for n, (d, s) in named.items()
            }
        case T5Config():
            return {name: entry for name, entry in manifest.items() if not t5_ignore_keys(name)}
        case CLIPConfig():
            return {name: entry for name, entry in manifest.items() if not clip_ignore_keys(name)}
        case SigLIPConfig():  # Google's file has a text half too, and early versions of transformers count the positions
            seen = {
                name: entry for name, entry in manifest.items() if name.startswith("vision_model.")
            }
            return {
                name: entry for name, entry in seen.items() if not name.endswith(".position_ids")
            }
        case LanguageModelConfig(qk_norm=False):
            named = {bare(name): entry for name, entry in manifest.items()}
            return {
                name: entry
                for name, entry in named.items()
                if not language_model_ignore_keys(name, max(config.layers))
            }
    return manifest


def differences(found: Manifest, expected: Manifest) -> list[str]:
    """One clause for each way in which they differ, with its first tensor for an example."""
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


# ---------------------------------------------------------------- tables


def tables() -> list[str]:
    """The tables of weights.md, which a test compares with it: models, files, memory."""
    return [models_table(), files_table(), memory_table()]


def models_table() -> str:
    rows = []
    for spec in MODELS.values():
        repositories = [spec.repository, *([spec.addon.repository] if spec.addon else [])]
        links = [f"[{name.split('/')[-1]}](https://huggingface.co/{name})" for name in repositories]
        home = "part of the package" if spec.embedded else " and ".join(links)
        guidance = (
            "none" if spec.guidance is None else f"{spec.guidance:g}" + ", by two passes" * spec.cfg
        )
        picture = (
            spec.image_mode
            + f", {spec.control}" * bool(spec.control)
            + ", computed once" * spec.kv_cached_references
        )
        terms = (
            spec.licence.name,
            "yes" if spec.licence.commercial else "no",
            "yes" if spec.licence.gated else "no",
        )
        sizes = (f"{spec.size}x{spec.size}", spec.text_length)
        rows.append((f"`{spec.name}`", home, *terms, picture, spec.steps, guidance, *sizes))
    titles = "model, repository, licence, commercial use, gated, picture, steps, guidance, size, text tokens"
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


def memory_table() -> str:
    rows = []
    for spec in MODELS.values():
        width = 4 if spec.embedded else 2
        networks = {
            part: config for part, (config, *_) in parts(spec).items() if part != "LoRA"
        }  # which is merged
        sizes = {part: memory(config, width) for part, config in networks.items()}
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


def memory(config: Config, width: int) -> int:
    """Bytes of a network with `width` bytes a number, but for what is quantised."""
    if isinstance(config, QuantisedConfig):
        return size(from_json(name_of(config)))
    return width * sum(p.numel() for p in on_meta(config).parameters())


def table(*titles: str, rows: Sequence[Sequence]) -> str:
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in (titles, ["---"] * len(titles), *rows)
    )


if __name__ == "__main__":
    sys.exit(main())
