"""The LoRA files of trainers at the released sizes, by rule: names and shapes of all tensors.

A file is a model, the layers that the trainer changes, its names of them, and the tensors of each.
`tests/support/lora_layouts.py` has spellings with numbers, for small networks; this file has whole
files, with text encoders and with the kinds of factors that each trainer writes.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from support.lora_layouts import split
from torch import nn

from flux.parity.reference import transformer_to_diffusers
from flux.parity.reference3 import transformer3_to_diffusers
from flux.transformer3 import Flux3

RANK, FACTOR = 16, 4
Shape = tuple[int, ...]
Layer = tuple[str, str, int, int, int]  # name in the file, our path, first and last row, columns
Ends = Callable[[int, int], dict[str, Shape]]  # of rows and columns


def linears(network: nn.Module) -> dict[str, nn.Linear]:
    return {path: x for path, x in network.named_modules() if isinstance(x, nn.Linear)}


def bfl(network: nn.Module) -> Iterator[Layer]:
    for path, layer in linears(network).items():
        yield path, path, 0, layer.out_features, layer.in_features


def diffusers(network: nn.Module) -> Iterator[Layer]:
    """Send the numbers of rows through the reference's map of weights."""
    layers = list(linears(network).items())
    numbered = {
        f"{path}.weight": 1_000_000 * i + torch.arange(layer.out_features)
        for i, (path, layer) in enumerate(layers)
    }
    if isinstance(network, Flux3):
        theirs = transformer3_to_diffusers(numbered)
    else:
        theirs = transformer_to_diffusers(numbered, network.config)
    for name, numbers in theirs.items():
        path, layer = layers[int(numbers[0]) // 1_000_000]
        found = (numbers % 1_000_000).tolist()
        yield name.removesuffix(".weight"), path, min(found), max(found) + 1, layer.in_features


def onetrainer(network: nn.Module) -> Iterator[Layer]:
    for name, (path, rows) in split(network).items():
        layer = network.get_submodule(path)
        start, stop = rows or (0, layer.out_features)
        yield name, path, start, stop, layer.in_features


def fused(network: nn.Module) -> Iterator[Layer]:
    """diffusers' names after fuse_qkv_projections."""
    for name, path, start, stop, columns in diffusers(network):
        if name.endswith(("attn.to_q", "attn.add_q_proj")):
            width = network.config.hidden_size
            fused = name.replace("to_q", "to_qkv").replace("add_q_proj", "to_added_qkv")
            yield fused, path, 0, 3 * width, columns
        elif name.endswith(("attn.to_out.0", "attn.to_add_out")):
            yield name, path, start, stop, columns


def xlabs(network: nn.Module) -> Iterator[Layer]:
    for path, layer in linears(network).items():
        number, _, name = path.partition("double_blocks.")[2].partition(".")
        stream = {"img_attn": 1, "txt_attn": 2}.get(name.partition(".")[0])
        if stream:
            end = f"{name.partition('.')[2]}_lora{stream}"
            theirs = f"double_blocks.{number}.processor.{end}"
            yield theirs, path, 0, layer.out_features, layer.in_features


def flat(name: str) -> str:
    return name.replace(".", "_")


def half_flat(name: str) -> str:
    """musubi-tuner's converter leaves an underscore in the names of attention."""
    return name.replace("_attn.", "_attn_")


def ab(end: str = ".weight") -> Ends:
    return lambda rows, columns: {f"lora_A{end}": (RANK, columns), f"lora_B{end}": (rows, RANK)}


def down_up(rows: int, columns: int) -> dict[str, Shape]:
    return {"lora_down.weight": (RANK, columns), "lora_up.weight": (rows, RANK)}


def xlabs_ends(rows: int, columns: int) -> dict[str, Shape]:
    return {"down.weight": (RANK, columns), "up.weight": (rows, RANK)}


def lokr(rows: int, columns: int) -> dict[str, Shape]:
    small = rows // FACTOR, columns // FACTOR
    return {"lokr_w1": (FACTOR, FACTOR), "lokr_w2": small, "alpha": ()}


def plus(ends: Ends, **more: Callable[[int, int], Shape]) -> Ends:
    return lambda rows, columns: (
        ends(rows, columns) | {name: shape(rows, columns) for name, shape in more.items()}
    )


def difference(rows: int, columns: int) -> dict[str, Shape]:
    return {"diff": (rows,), "diff_b": (rows,)}


def number(rows: int, columns: int) -> Shape:
    return ()


def vector(rows: int, columns: int) -> Shape:
    return (rows,)


def column(rows: int, columns: int) -> Shape:
    return (rows, 1)


WITH_ALPHA, AB_ALPHA = plus(down_up, alpha=number), plus(ab(), alpha=number)
ALL = r".*"
BASE3 = "flux.3-image-klein-base"
BLOCKS = r".*blocks\..*"
MATRICES = r".*blocks\.(?!.*(mod|norm)).*"  # without modulation
ATTENTION = r".*blocks\.\d+\.attn\..*"
SOME = r"proj_out|.*blocks\.(?!.*(norm|net\.2)).*"


class File(NamedTuple):
    model: str  # of flux.MODELS
    names: Callable[[nn.Module], Iterator[Layer]]
    layers: str  # a regular expression of names
    prefix: str
    ends: Ends
    spelling: Callable[[str], str] = str
    text: dict[str, tuple[str, Ends]] = {}  # part -> prefix of its Linears, which are all changed
    differences: bool = False  # of all that is no matrix, in the text encoders too


CLIP, T5 = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
WITH_BIAS = plus(down_up, diff_b=vector)
DORA = plus(WITH_ALPHA, dora_scale=column)
FILES = {
    "ai-toolkit": File("flux.2-klein-4b", bfl, MATRICES, "diffusion_model.", ab()),
    "ai-toolkit, DoRA": File(
        "flux.2-klein-4b", bfl, MATRICES, "diffusion_model.", plus(ab(), magnitude=vector)
    ),
    "ai-toolkit, FLUX.1": File("flux.1-dev", diffusers, BLOCKS, "transformer.", ab()),
    "ai-toolkit, LoKr, FLUX.1": File("flux.1-dev", diffusers, BLOCKS, "transformer.", lokr),
    "ai-toolkit, LoKr": File("flux.2-klein-9b", bfl, MATRICES, "diffusion_model.", lokr),
    "ComfyUI, extracted": File(
        *("flux.1-dev", bfl, ALL, "diffusion_model.", WITH_BIAS),
        text={"clip": (CLIP, WITH_BIAS), "t5": (T5, WITH_BIAS)},
        differences=True,
    ),
    "DiffSynth": File("flux.2-klein-4b", diffusers, MATRICES, "", ab(".default.weight")),
    "diffusers": File("flux.1-dev", diffusers, ALL, "transformer.", ab()),
    "fal.ai": File("flux.1-dev", bfl, ALL, "base_model.model.", ab()),
    "kohya": File("flux.1-dev", bfl, BLOCKS, "lora_unet_", WITH_ALPHA, flat),
    "kohya, CLIP": File(
        *("flux.1-dev", bfl, BLOCKS, "lora_unet_", WITH_ALPHA, flat),
        text={"clip": ("lora_te1_", WITH_ALPHA)},
    ),
    "musubi-tuner": File("flux.2-klein-4b", bfl, MATRICES, "lora_unet_", WITH_ALPHA, flat),
    "musubi-tuner, converted": File(
        "flux.2-klein-4b", bfl, MATRICES, "diffusion_model.", ab(), half_flat
    ),
    "OneTrainer, ComfyUI": File("flux.2-klein-9b", bfl, ALL, "diffusion_model.", AB_ALPHA),
    "OneTrainer, diffusers": File("flux.1-dev", diffusers, ALL, "transformer.", ab()),
    "OneTrainer, legacy": File("flux.1-dev", diffusers, ALL, "lora_transformer_", WITH_ALPHA, flat),
    "OneTrainer, split": File("flux.1-dev", onetrainer, ALL, "transformer.", WITH_ALPHA),
    "OneTrainer, original": File("flux.2-dev", bfl, ALL, "", AB_ALPHA),
    "OneTrainer, DoRA": File(
        *("flux.1-dev", diffusers, ATTENTION, "lora_transformer_", DORA, flat),
        text={"clip": ("lora_te1_", DORA), "t5": ("lora_te2_", DORA)},
    ),
    "PEFT": File("flux.1-dev", diffusers, SOME, "base_model.model.", ab()),
    "SimpleTuner, fused": File("flux.1-dev", fused, ALL, "transformer.", ab()),
    "SimpleTuner, LoKr, FLUX.1": File("flux.1-dev", diffusers, BLOCKS, "lycoris_", lokr, flat),
    "SimpleTuner, LoKr": File("flux.2-klein-9b", diffusers, MATRICES, "lycoris_", lokr, flat),
    "XLabs": File("flux.1-dev", xlabs, ALL, "", xlabs_ends),
    # FLUX 3: by the trainers' rules for other models
    "ai-toolkit, FLUX 3": File(BASE3, bfl, BLOCKS, "diffusion_model.", ab()),
    "ai-toolkit, LoKr, FLUX 3": File(BASE3, bfl, BLOCKS, "diffusion_model.", lokr),
    "diffusers, FLUX 3": File(BASE3, diffusers, ALL, "transformer.", ab()),
    "kohya, FLUX 3": File(BASE3, bfl, ALL, "lora_unet_", WITH_ALPHA, flat),
    "OneTrainer, legacy, FLUX 3": File(
        BASE3, diffusers, ALL, "lora_transformer_", WITH_ALPHA, flat
    ),
    "OneTrainer, ComfyUI, FLUX 3": File(BASE3, bfl, ALL, "diffusion_model.", AB_ALPHA),
    "SimpleTuner, LoKr, FLUX 3": File(BASE3, diffusers, BLOCKS, "lycoris_", lokr, flat),
}


def tensors(
    file: File, networks: dict[str, nn.Module]
) -> tuple[dict[str, Shape], list[tuple[str, str, int, int]]]:
    """Return the shapes of a file's tensors, and the part, path and rows that each layer changes.

    `networks`: those of the model, on any device, by part.
    """
    found = [
        (
            "transformer",
            f"{file.prefix}{file.spelling(name)}",
            file.ends,
            path,
            start,
            stop,
            columns,
        )
        for name, path, start, stop, columns in file.names(networks["transformer"])
        if re.fullmatch(file.layers, name)
    ]
    for part, (prefix, ends) in file.text.items():
        for path, layer in networks[part].named_modules():
            weight = getattr(layer, "weight", None)
            if weight is None or not (isinstance(layer, nn.Linear) or file.differences):
                continue
            name = path if prefix.endswith(".") else flat(path)
            kind = ends if weight.ndim == 2 else difference
            columns = weight.shape[-1]
            found.append((part, f"{prefix}{name}", kind, path, 0, len(weight), columns))
    shapes, targets = {}, []
    for part, name, ends, path, start, stop, columns in found:
        biased = getattr(networks[part].get_submodule(path), "bias", None) is not None
        for end, shape in ends(stop - start, columns).items():
            if end != "diff_b" or biased:
                shapes[f"{name}.{end}"] = shape
        targets.append((part, path, start, stop))
    return shapes, targets
