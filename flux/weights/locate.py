"""A row of the table of models by its name or by the shapes in a file, and the files that it needs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from flux.autoencoder import AutoEncoderConfig
from flux.configs import EMBEDDED, MODELS, ModelSpec
from flux.errors import UserError
from flux.transformer import Flux, FluxConfig
from flux.weights.files import find_files, is_local, read_header
from flux.weights.load import infer_config, init_empty


def get_spec(name: str | None, transformer: str | Path | None = None) -> ModelSpec:
    """A row of the table by its name, with the shapes of another transformer file if one is given."""
    if name is not None and name.lower() not in MODELS:
        near = get_close_matches(name.lower(), MODELS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"--model {name}: there is no such model; {hint}The choices are {', '.join(MODELS)}"
        )
    if transformer is None:
        return MODELS[(name or "flux.2-tiny").lower()]
    config = infer_config(Path(transformer))
    if name is not None:
        spec = MODELS[name.lower()]
        if config.context_dim != spec.transformer.context_dim:
            raise UserError(
                f"--transformer {transformer} reads text of width {config.context_dim}, but the text encoder of {spec.name} "
                f"gives {spec.transformer.context_dim}: choose another --model, or leave it out"
            )
        if config.vector_dim != spec.transformer.vector_dim:
            reads, gives = (
                f"a pooled text of {c.vector_dim or 'no'} numbers"
                for c in (config, spec.transformer)
            )
            raise UserError(
                f"--transformer {transformer} reads {reads}, and {spec.name} gives {gives}: if no other --model "
                "does, it is of a kind that is not made here"
            )
        if config.in_channels != spec.transformer.in_channels:
            raise UserError(
                f"--transformer {transformer} takes {config.in_channels} channels and {spec.name} "
                f"{spec.transformer.in_channels}: choose another --model, or leave it out"
            )
        return with_transformer(spec, config)
    alike = [
        spec
        for spec in MODELS.values()
        if spec.transformer == config and spec.weight_format == "bfloat16"
    ]
    if not alike:
        raise UserError(
            f"--transformer {transformer} has the shape of no released model: name the one that it derives from with --model"
        )
    if len(alike) > 1:
        others = ", ".join(spec.name for spec in alike[1:])
        warnings.warn(
            f"{transformer} has the shape of {alike[0].name}, which is assumed; if it derives from {others}, "
            "say so with --model",
            stacklevel=3,
        )
    return alike[0]


def with_transformer(spec: ModelSpec, config: FluxConfig) -> ModelSpec:
    """A row with another transformer. It is told its guidance if that has an input for it, and else guided as the row is."""
    if config.guidance:
        usual = MODELS["flux.2-dev" if config.vector_dim is None else "flux.1-dev"].guidance
        return replace(spec, transformer=config, cfg=False, guidance=spec.guidance or usual)
    return replace(spec, transformer=config, guidance=spec.guidance if spec.cfg else None)


def with_decoder_of(config: AutoEncoderConfig, path: Path) -> AutoEncoderConfig:
    """FLUX.2 has a second, narrower decoder for the same latents: tell them apart by the width of its first layer."""
    infos, _ = read_header(path)
    shape = infos["decoder.conv_in.weight"].shape if "decoder.conv_in.weight" in infos else ()
    return replace(config, decoder_ch=shape[0] // config.ch_mult[-1] or None if shape else None)


def locate(
    spec: ModelSpec, weights: Path | None, given: Mapping[str, list[Path]]
) -> dict[str, list[Path] | Path]:
    """Every file that a row needs: lists of weights for networks, folders for tokenizers. What is `given` is not looked for."""
    files: dict[str, list[Path] | Path] = {
        part: given.get(part) or _find(spec, choices, weights)
        for part, choices in networks(spec).items()
    }
    for part, names in spec.text.tokenizers.items():
        files[part] = [locate_one(spec, name, weights) for name in names][0].parent
    if spec.addon:
        terms = spec.licence.name, spec.licence.gated
        for part, name in spec.addon.files:
            files[part] = given.get(part) or find_files(
                spec.addon.repository, name, weights, *terms
            )
    return files


def networks(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """The files of each network in the row's own repository, any of which will do."""
    own = {
        **spec.text.networks,
        "transformer": (spec.transformer_file,),
        "autoencoder": spec.autoencoder_files,
    }
    brought = {part for part, _ in spec.addon.files} if spec.addon else ()
    return {part: choices for part, choices in own.items() if part not in brought}


def is_available_locally(spec: ModelSpec, weights: Path | None = None) -> bool:
    """Whether a row could be loaded without a download."""
    needed = (
        *networks(spec).values(),
        *((name,) for names in spec.text.tokenizers.values() for name in names),
    )
    if spec.embedded:
        return all((EMBEDDED / spec.name / choices[0]).is_file() for choices in needed)
    adapter = [(spec.addon.repository, name) for _, name in spec.addon.files] if spec.addon else []
    try:
        ours = all(
            any(is_local(spec.repository, name, weights) for name in choices) for choices in needed
        )
        return ours and all(is_local(repository, name, weights) for repository, name in adapter)
    except UserError:  # a damaged index
        return False


def locate_one(spec: ModelSpec, name: str, weights: Path | None) -> Path:
    """One more file of a row's repository."""
    return _find(spec, (name,), weights)[0]


def _find(spec: ModelSpec, choices: Sequence[str], weights: Path | None) -> list[Path]:
    """The first of `choices` that is at hand, or else the first, downloaded."""
    if spec.embedded:
        path = EMBEDDED / spec.name / choices[0]
        if not path.is_file():
            raise UserError(
                f"{spec.name} has to be made first, in some hours (scripts/toy/train.py --model {spec.name} --export "
                f"{EMBEDDED / spec.name}): {path.name} is not there"
            )
        return [path]
    name = next((c for c in choices if is_local(spec.repository, c, weights)), choices[0])
    return find_files(spec.repository, name, weights, spec.licence.name, spec.licence.gated)


def count_parameters(spec: ModelSpec) -> int:
    """Of the transformer."""
    return sum(p.numel() for p in init_empty(lambda: Flux(spec.transformer)).parameters())
