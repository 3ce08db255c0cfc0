"""Choose a row of the table of models, by name or by the shapes in a file, and find its files."""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from flux.autoencoder import AutoEncoderConfig
from flux.configs import EMBEDDED, MODELS, ModelSpec
from flux.errors import UserError
from flux.transformer import Flux, FluxConfig
from flux.transformer3 import Flux3, Flux3Config
from flux.weights.files import (
    find_files,
    is_local,
    missing_files,
    preview,
    shard_files,
    weights_folder,
)
from flux.weights.load import infer_config, init_empty, read_headers

Config = FluxConfig | Flux3Config
UNRELEASED = {"pro", "max", "ultra", "flex"}  # words of models that are a service alone

# ---------------------------------------------------------------- which model


def get_spec(name: str | None, transformer: str | Path | None = None) -> ModelSpec:
    """Return a row of `flux.MODELS`, with the shapes of another transformer file if there is one.

    Without a name, the shapes in the file choose the row; without either, it is flux.2-tiny.
    """
    name = None if name is None else find_name(name)
    if transformer is None:
        return MODELS[name or "flux.2-tiny"]
    config = infer_config(Path(transformer))
    if name is None:
        spec = _spec_of_shapes(config, Path(transformer))
    else:
        spec = MODELS[name]
        _check_inputs(config, spec, transformer)
    if spec.transformer == config:
        return spec
    adapted = with_transformer(spec, config)
    if adapted.cfg and not spec.cfg:
        warnings.warn(
            f"{transformer} lacks the guidance input of {spec.name}: it is taken for de-distilled, "
            f"with classifier-free guidance ({adapted.guidance} by default), which takes twice the "
            "time",
            stacklevel=3,
        )
    return adapted


def find_name(name: str) -> str:
    """Return the name in `flux.MODELS` that a name stands for.

    Names of repositories, of BFL's command line and of mflux have the same words in another order:
    "black-forest-labs/FLUX.1-Krea-dev", "flux-dev-krea", "krea-dev". So has the address of a
    repository. UserError if none agrees.
    """
    if name.lower() in MODELS:
        return name.lower()
    given, name = name, re.sub(r"^https?://[^/]+/([^/]+/[^/?#]+).*", r"\1", name)
    said, names = _words(name), {_words(known): known for known in reversed(MODELS)}
    for more in (set(), {"2"}, {"dev"}):
        if said and said | more in names:
            return names[said | more]
    near = _nearest(said) if said or "flux" not in name.lower() else ["flux.1-dev", "flux.2-dev"]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    if said & UNRELEASED:
        hint = f"Of pro, max, ultra and flex models, no weights are released. {hint}"
    raise UserError(
        f"name: there is no such model (got {given:.120}). {hint}"
        "All names are in flux.MODELS; `sample.py --list-models` prints them."
    )


def _nearest(said: frozenset[str]) -> list[str]:
    """Return the name of which a file's name adds words, such as GGUF; or up to three others.

    These have all of these words, or else similar ones.
    """
    words = {known: _words(known) for known in MODELS}
    versions = {"2", "3"}
    if within := [x for x in MODELS if words[x] < said and not (said - words[x]) & versions]:
        return [max(within, key=lambda known: len(words[known]))]
    if said and (whole := [known for known in MODELS if said < words[known]]):
        return whole[:3]
    spelled = {" ".join(sorted(words[known])): known for known in reversed(MODELS)}
    near = get_close_matches(" ".join(sorted(said)), spelled, n=3, cutoff=0.45)
    return [spelled[one] for one in near]


def _words(name: str) -> frozenset[str]:
    """Return the words and numbers of a model's name, but for those that most names share."""
    words = re.findall(r"[a-z]+|[0-9]+", name.lower())
    return frozenset(words) - {"black", "forest", "labs", "flux", "1"}


def _spec_of_shapes(config: Config, transformer: Path) -> ModelSpec:
    """Return the first row with these shapes or, for a pruned model, with other numbers of blocks.

    UserError if there is none. A warning names the other models that the file may derive from.
    """
    rows = [spec for spec in MODELS.values() if spec.weight_format == "bfloat16"]
    alike = [spec for spec in rows if spec.transformer == config] or _of_other_depth(rows, config)
    guided = []
    if isinstance(config, FluxConfig) and not config.guidance:
        # FLUX.1 [dev] without its guidance input has the shapes of FLUX.1 [schnell]
        guided = _of_other_depth(rows, replace(config, guidance=True))
    about = _describe(transformer) if guided else ""
    if guided and (not alike or re.search(r"(de|un)[-_ ]?distill", about)):
        alike, guided = guided, []
    if not alike:
        raise UserError(
            f"transformer: {transformer} has the shapes of no released model. "
            "Pass the model that it derives from as `name`."
        )
    row, others = alike[0], [spec.name for spec in alike[1:]]
    if guided and row.name.rpartition("-")[2] not in about:
        others.append(f"{guided[0].name} without distillation")
    notes = [f"has the shapes of {row.name}, which is assumed"]
    found, usual = _depths(config), _depths(row.transformer)
    if found != usual:
        notes[0] = f"is taken for a pruned {row.name}, with {found} in place of {usual}"
    if others:
        notes.append(f"if it derives from {', '.join(others)}, pass that model as `name`")
    if others or found != usual:
        warnings.warn(f"{transformer} {'; '.join(notes)}", stacklevel=4)
    return row


def _of_other_depth(rows: Sequence[ModelSpec], config: Config) -> list[ModelSpec]:
    """Return the rows of this shape but for the numbers of blocks."""
    depth, single = config.depth, config.depth_single
    return [
        spec
        for spec in rows
        if replace(spec.transformer, depth=depth, depth_single=single) == config
    ]


def _depths(config: Config) -> str:
    kind = "mode" if isinstance(config, Flux3Config) else "double"
    return f"{config.depth} {kind} and {config.depth_single} single blocks"


def _family(config: Config) -> str:
    if isinstance(config, Flux3Config):
        return "FLUX 3"
    return "FLUX.2" if config.vector_dim is None else "FLUX.1"


def _describe(transformer: Path) -> str:
    """Return what a file says of itself: its name and its metadata, in lower case."""
    _, metadata = read_headers(shard_files(transformer))
    return " ".join([transformer.name, *map(str, metadata.values())])[:100_000].lower()


def _check_inputs(config: Config, spec: ModelSpec, transformer: str | Path) -> None:
    """Raise UserError unless the transformer takes the text features and channels of `spec`."""
    expected = spec.transformer
    if spec.flux3 != isinstance(config, Flux3Config):
        raise UserError(
            f"transformer: {transformer} is a {_family(config)} transformer, but {spec.name} is "
            f"{_family(expected)}. Choose another `name`, or leave `name` out."
        )
    if config.context_dim != expected.context_dim:
        raise UserError(
            f"transformer: {transformer} reads text of width {config.context_dim}, but the text "
            f"encoder of {spec.name} gives {expected.context_dim}. Choose another `name`, or leave "
            "`name` out."
        )
    if isinstance(config, Flux3Config):
        _check_flow_map(config, spec, transformer)
    elif config.vector_dim != spec.pooled_dim:
        raise UserError(
            f"transformer: {transformer} reads a pooled text vector of "
            f"{config.vector_dim or 'no'} numbers, but {spec.name} gives "
            f"{spec.pooled_dim or 'none'}. Choose another `name`; if no model of flux.MODELS "
            "fits, this kind of transformer is not supported."
        )
    if config.in_channels != expected.in_channels:
        raise UserError(
            f"transformer: {transformer} takes {config.in_channels} channels, but {spec.name} "
            f"takes {expected.in_channels}. Choose another `name`, or leave `name` out."
        )


def _check_flow_map(config: Flux3Config, spec: ModelSpec, transformer: str | Path) -> None:
    """Raise UserError for a base model that is called distilled, and the other way round."""
    if spec.flux3 and config.flow_map != bool(spec.distilled):
        fits = [s.name for s in MODELS.values() if s.flux3 and bool(s.distilled) == config.flow_map]
        has, kind = ("has", "a flow map") if config.flow_map else ("has no", "a base model")
        raise UserError(
            f"transformer: {transformer} {has} `ref_time_in`, so it is {kind}, unlike {spec.name}. "
            f"Use `name={fits[0]}`, or leave `name` out."
        )


def with_transformer(spec: ModelSpec, config: Config) -> ModelSpec:
    """Return the row with another transformer.

    A transformer with a guidance input gets the guidance as a number, and runs once a step.
    A transformer that lacks the row's guidance input was de-distilled: its guidance is
    classifier-free. Any other transformer is guided as the row says.
    """
    if isinstance(config, Flux3Config):
        return replace(spec, transformer=config)
    usual = MODELS["flux.2-dev" if config.vector_dim is None else "flux.1-dev"].guidance
    if spec.flux_config.guidance and not config.guidance:
        return replace(spec, transformer=config, cfg=True, guidance=usual)
    if config.guidance:
        return replace(spec, transformer=config, cfg=False, guidance=spec.guidance or usual)
    return replace(spec, transformer=config, guidance=spec.guidance if spec.cfg else None)


def with_decoder_of(config: AutoEncoderConfig, path: Path) -> AutoEncoderConfig:
    """Return the configuration with the decoder of this file: FLUX.2 has a second, narrower one.

    The width of the decoder's first layer tells them apart.
    """
    infos, _ = read_headers([path])
    for name, info in infos.items():
        if f".{name}".endswith(".decoder.conv_in.weight") and info.shape:
            width = info.shape[0] // config.ch_mult[-1]
            # of any other width, the decoder is another model's, as the loader reports
            return replace(config, decoder_ch=None if width % config.norm_groups else width or None)
    return replace(config, decoder_ch=None)


def build_transformer(config: Config) -> Flux | Flux3:
    """Return the network of a configuration, with the default numerics."""
    return Flux3(config) if isinstance(config, Flux3Config) else Flux(config)


def count_parameters(spec: ModelSpec) -> int:
    """Return the number of parameters of the row's transformer."""
    return _count(spec.transformer)


@cache
def _count(config: Config) -> int:
    network = init_empty(lambda: build_transformer(config))
    return sum(p.numel() for p in network.parameters())


# ---------------------------------------------------------------- which files


def locate(
    spec: ModelSpec, weights: Path | None, local_files: Mapping[str, Any], with_text: bool = True
) -> dict[str, list[Path] | Path]:
    """Return every file of a row: a list of weight files by network, a folder by tokenizer.

    `local_files` replace the row's files of a network, or its folder of a tokenizer, which then
    need not exist. `with_text=False`: leave out the text encoders and their tokenizers.
    UserError that names all missing files, if there is a folder: then nothing is downloaded.
    """
    if weights_folder(weights) and not spec.embedded:
        text = {} if with_text else {*spec.text.networks, *spec.text.tokenizers}
        _require_all(spec, weights, {*local_files, *text})
    files: dict[str, list[Path] | Path] = {}
    for part, choices in networks(spec).items():
        if with_text or part not in spec.text.networks:
            files[part] = local_files.get(part) or _locate(spec, choices, weights)
    for part, names in spec.text.tokenizers.items() if with_text else ():
        files[part] = local_files.get(part) or _locate_tokenizer(spec, names, weights)
    if spec.addon:
        terms = spec.licence.name, spec.licence.gated
        for part, name in spec.addon.files:
            files[part] = local_files.get(part) or find_files(
                spec.addon.repository, name, weights, *terms
            )
    return files


def _require_all(spec: ModelSpec, weights: Path | None, others: Collection[str]) -> None:
    """Raise UserError that names the missing files of all parts but `others`, if several are."""
    lacking: dict[str, list[str]] = {}  # of each repository
    for part, repository, choices in needed_files(spec):
        states = [missing_files(repository, name, weights) for name in choices]
        if part not in others and all(states):
            # shards, if an index is there without them
            shards = [state for name, state in zip(choices, states) if name not in state]
            lacking.setdefault(repository, []).extend((shards or states)[0])
    names = [name for found in lacking.values() for name in found]
    if len(names) > 1:
        pages = " and ".join(f"https://huggingface.co/{repository}" for repository in lacking)
        raise UserError(
            f"weights: {weights_folder(weights)} and the Hugging Face cache lack {len(names)} "
            f"files of {spec.name}: {preview(names, 6)}. Get them from {pages} under "
            f"{spec.licence.name}, or leave `weights` and $FLUX_WEIGHTS out to download them."
        )


def needed_files(spec: ModelSpec) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return the files of a row: (part, repository, names, any one of which is enough)."""
    needed = [(part, spec.repository, choices) for part, choices in networks(spec).items()]
    for part, names in spec.text.tokenizers.items():
        needed += [(part, spec.repository, (name,)) for name in names]
    if spec.addon:
        needed += [(part, spec.addon.repository, (name,)) for part, name in spec.addon.files]
    return needed


def networks(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Return the files of each network in the row's repository; any one of them is enough."""
    files = {
        **spec.text.networks,
        "transformer": (spec.transformer_file,),
        "autoencoder": spec.autoencoder_files,
    }
    from_addon = {part for part, _ in spec.addon.files} if spec.addon else set()
    return {part: choices for part, choices in files.items() if part not in from_addon}


def is_available_locally(spec: ModelSpec, weights: Path | None = None) -> bool:
    """Return whether a row can be loaded without a download."""
    needed = needed_files(spec)
    if spec.embedded:
        return all((EMBEDDED / spec.name / choices[0]).is_file() for _, _, choices in needed)
    try:
        return all(
            any(is_local(repository, name, weights) for name in choices)
            for _, repository, choices in needed
        )
    except UserError:  # a damaged index
        return False


def locate_one(spec: ModelSpec, name: str, weights: Path | None) -> Path:
    """Return one more file of the row's repository."""
    return _locate(spec, (name,), weights)[0]


def _locate_tokenizer(spec: ModelSpec, names: Sequence[str], weights: Path | None) -> Path:
    """Return the folder of a tokenizer of the row's repository."""
    try:
        paths = [locate_one(spec, name, weights) for name in names]
    except UserError as error:
        raise UserError(f"{error} A folder with it may also be passed as `tokenizer`.") from error
    return paths[0].parent


def _locate(spec: ModelSpec, choices: Sequence[str], weights: Path | None) -> list[Path]:
    """Return the first of `choices` that is available locally, or else download the first one."""
    if spec.embedded:
        path = EMBEDDED / spec.name / choices[0]
        if not path.is_file():
            raise UserError(
                f"{path.name} of {spec.name} does not exist: train the model first, which takes "
                f"some hours (scripts/toy/train.py --model {spec.name} --export "
                f"{EMBEDDED / spec.name})."
            )
        return [path]
    name = next((name for name in choices if is_local(spec.repository, name, weights)), choices[0])
    return find_files(spec.repository, name, weights, spec.licence.name, spec.licence.gated)
