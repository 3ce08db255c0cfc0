"""Which files a model needs, which of them are missing, and how large they are.

Sizes in bytes are those of the tensors in tests/manifests; headers add some kilobytes.
"""

from pathlib import Path
from typing import NamedTuple

from flux.autoencoder import AutoEncoderConfig
from flux.clip import CLIPConfig
from flux.configs import (
    AE1,
    AE2,
    EMBEDDED,
    FLUX2,
    KLEIN3,
    KLEIN3_BASE,
    KLEIN_4B,
    KLEIN_9B,
    MISTRAL,
    QWEN3_4B,
    QWEN3_8B,
    QWEN3_VL_4B,
    VAE,
    ModelSpec,
)
from flux.errors import UserError
from flux.t5 import T5Config
from flux.weights.files import local_file, missing_files, shard_files
from flux.weights.locate import Config, count_parameters, needed_files, networks

# fmt: off
TEXT_ENCODERS: dict[object, tuple[int | None, int]] = {  # bytes of files, of layers that are read
    T5Config(): (9_524_621_312, 9_524_621_312),
    CLIPConfig(): (246_120_960, 246_120_960),
    QWEN3_4B: (8_044_936_192, 6_228_176_384),
    QWEN3_8B: (16_381_470_720, 11_663_767_040),
    MISTRAL: (48_000_000_000, 34_687_508_480),
    QWEN3_VL_4B: (None, 7_237_484_544),  # the released file was not at hand
}
AUTOENCODERS: dict[AutoEncoderConfig, int] = {AE1: 335_278_732, AE2: 336_185_492}  # in float32
QUANTIZED: dict[tuple[Config, str], int] = {  # transformers
    (KLEIN_4B, "fp8"): 4_070_588_032, (KLEIN_4B, "nvfp4"): 2_460_368_512,
    (KLEIN_9B, "fp8"): 9_433_011_072, (KLEIN_9B, "nvfp4"): 5_616_194_432,
    (FLUX2, "nvfp4"): 21_035_517_056,
    (KLEIN3, "fp8r"): 5_827_790_336, (KLEIN3, "nvfp4"): 3_513_998_864,
    (KLEIN3, "comfy-int8-convrot"): 5_827_808_912,
    (KLEIN3_BASE, "fp8r"): 5_807_343_104, (KLEIN3_BASE, "nvfp4"): 3_493_551_632,
    (KLEIN3_BASE, "comfy-int8-convrot"): 5_807_361_680,
}
ADDONS = {"lora": 1_244_252_288, "siglip": 856_451_200, "redux": 129_007_616}
# fmt: on


class ModelFile(NamedTuple):
    """A file of a model, or an index with its shards."""

    part: str  # a network, or a tokenizer
    repository: str
    name: str  # the one that was found, else the one to get
    missing: tuple[str, ...]  # files to get: the file itself, or some shards
    size: int | None  # bytes on the disk, or of the whole file to get; None: unknown


def inventory(spec: ModelSpec, weights: Path | None = None) -> list[ModelFile]:
    """Return every file that a row needs. `weights`: the folder to look in, as for `find_file`."""
    return [_look(spec, *needed, weights) for needed in needed_files(spec)]


def _look(
    spec: ModelSpec, part: str, repository: str, choices: tuple[str, ...], weights: Path | None
) -> ModelFile:
    """Return the first choice that is complete, else the first that is there, else the first."""
    if spec.embedded:
        path = EMBEDDED / spec.name / choices[0]
        there = path.is_file()
        size = path.stat().st_size if there else None
        return ModelFile(part, repository, choices[0], () if there else choices, size)
    states = []
    for name in choices:
        try:
            lacking = tuple(missing_files(repository, name, weights))
        except UserError:  # a damaged index
            lacking = (name,)
        states.append((name in lacking, len(lacking), name, lacking))
    _, _, name, lacking = min(states, key=lambda state: state[:2])
    if lacking:
        return ModelFile(part, repository, name, lacking, file_size(spec, part))
    found = local_file(repository, name, weights)
    size = sum(file.stat().st_size for file in shard_files(found)) if found else None
    return ModelFile(part, repository, name, (), size)


def file_size(spec: ModelSpec, part: str) -> int | None:
    """Return the bytes of a released file, with all shards; None if unknown or a tokenizer's."""
    if part == "transformer":
        return transformer_bytes(spec)
    if part == "autoencoder":  # the klein repositories have it in bfloat16
        size = AUTOENCODERS.get(spec.autoencoder)
        return size // 2 if size and spec.autoencoder_files[0] == VAE else size
    if part in spec.text.networks:
        return TEXT_ENCODERS.get(getattr(spec.text, part), (None, None))[0]
    return ADDONS.get(part)


def transformer_bytes(spec: ModelSpec) -> int | None:
    """Return the bytes of a row's transformer as its file holds it; None if unknown."""
    if spec.weight_format in ("bfloat16", "comfy-bf16"):
        return 2 * count_parameters(spec)
    return QUANTIZED.get((spec.transformer, spec.weight_format))


def memory_sizes(spec: ModelSpec, files: list[ModelFile]) -> tuple[int, int]:
    """Return the bytes of all weights in memory, as far as known, and those of the largest stage.

    The networks are in bfloat16 or in their file's quantized format; the toys in float32.
    """
    if spec.embedded:
        sizes = [2 * (file.size or 0) for file in files if file.part in networks(spec)]
        return sum(sizes), max(sizes)
    encoders = [getattr(spec.text, part) for part in spec.text.networks]
    text = sum(TEXT_ENCODERS.get(config, (0, 0))[1] for config in encoders)
    autoencoder = AUTOENCODERS.get(spec.autoencoder, 0) // 2
    redux = sum(ADDONS[file.part] for file in files if file.part in ("siglip", "redux"))
    stages = (text, transformer_bytes(spec) or 0, autoencoder, redux)
    return sum(stages), max(stages)
