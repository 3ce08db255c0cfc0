"""Images of whole pipelines, alone and over all processes: see `parallel_cases`."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from pytest import MonkeyPatch
from safetensors.torch import save_file
from support.model_zoo import TINY_REDUX, TINY_SIGLIP
from support.parallel_cases import draw
from torch import nn

import flux
from flux import loading, sampling
from flux.configs import MODELS
from flux.runtime import parallel
from flux.runtime.processes import rank, world_size
from flux.transformer import Flux

PROMPT = "a small red circle above a large blue ring on a white background"


class Run(NamedTuple):
    """A call of a pipeline, and how it is divided."""

    name: str
    sizes: str
    call: dict[str, Any] = {}
    load: dict[str, Any] = {}
    lora: str | None = None
    one_by_one: bool = False  # alone, images are made in calls of their own
    method: str | None = None
    shard_weights: bool = False
    mistake: str | None = None  # of MISTAKES, in the run over all processes
    specs: dict[str, Any] = {}  # rows of the table that the tests made


def toy_lora(path: Path, name: str) -> Path:
    """Write a LoRA of rank 4 for all Linears of a toy's blocks."""
    tensors = {}
    with torch.device("meta"):
        layers = dict(Flux(MODELS[name].transformer).named_modules())
    for number, (layer, module) in enumerate(layers.items()):
        if isinstance(module, nn.Linear) and "_blocks." in layer:
            down = draw(4, module.in_features, seed=number)
            up = draw(module.out_features, 4, seed=number + 1)
            tensors[f"{layer}.lora_A.weight"] = down.float() * module.in_features**-0.5
            tensors[f"{layer}.lora_B.weight"] = 0.1 * up.float()
    save_file(tensors, path)
    return path


def load(run: Run) -> flux.Pipeline:
    MODELS.update(run.specs)
    if "flux.1-redux-dev" in run.specs:
        loading.SigLIPConfig, loading.ReduxConfig = lambda: TINY_SIGLIP, lambda: TINY_REDUX
    pipe = flux.load(run.name, **{"device": "cpu", "dtype": torch.float32} | run.load)
    if run.lora:
        pipe.load_lora(run.lora, 0.7)
    return pipe


def images_of(pipe: flux.Pipeline, run: Run) -> list[bytes]:
    call: dict[str, Any] = dict(prompts=PROMPT, width=80, height=64, steps=2, seed=3) | run.call
    if isinstance(call.get("images"), flux.ImageInputs):
        del call["width"], call["height"]
    count = call.pop("num_images", 1)
    if not run.one_by_one:
        return [x.tobytes() for x in pipe(num_images=count, **call)]
    seed = call.pop("seed")
    return [pipe(seed=seed + number, **call)[0].tobytes() for number in range(count)]


def levels(image: bytes) -> np.ndarray:
    return np.frombuffer(image, np.uint8)


def images_of_one(run: Run) -> list[bytes]:
    """Return the images of a process alone, in all processes."""
    images = [images_of(load(run), run) if rank() == 0 else None]
    dist.broadcast_object_list(images)
    assert any(len(set(image)) > 8 for image in images[0]), "the images are flat"
    return images[0]


def compare(run: Run) -> int:
    """Return by how many levels images over all processes differ from those of one, at most."""
    with MonkeyPatch.context() as patch:
        if run.load.get("compile"):  # the graphs as they are, without a minute of compilation
            plain = nn.Module.compile
            patch.setattr(nn.Module, "compile", lambda *a, **b: plain(*a, backend="eager", **b))
        alone = images_of_one(run)
        pipe = load(run._replace(lora=None))
        of_first = *pipe.residency.text, *pipe.residency.encoders
        sizes = parallel.Sizes(**parallel.parse(run.sizes))
        parallel.distribute(pipe, sizes, run.method, run.shard_weights)
        if run.lora:
            pipe.load_lora(run.lora, 0.7)
        with MISTAKES[run.mistake]() if run.mistake else nullcontext():
            ours = images_of(pipe, run._replace(one_by_one=False))
    assert rank() == 0 or all(network.module is None for network in of_first)
    pairs = zip(map(levels, alone), map(levels, ours), strict=True)
    return max(int(abs(a.astype(int) - b).max()) for a, b in pairs)


# ------------------------------------------------------------------ mistakes of pipelines

schedule, noise, run_branches = sampling.schedule, sampling.noise, parallel.Parallel.run_branches


def schedule_of_own_tokens(kind, steps, tokens, *rest):
    return schedule(kind, steps, tokens // world_size(), *rest)


def own_noise(seeds, *args, **kwargs):
    return noise([seed + rank() for seed in seeds], *args, **kwargs)


def branches_exchanged(self, *branches):
    return run_branches(self, *branches)[::-1]


MISTAKES = {
    "schedule of own tokens": partial(patch.object, sampling, "schedule", schedule_of_own_tokens),
    "own noise": partial(patch.object, sampling, "noise", own_noise),
    "branches exchanged": partial(
        patch.object, parallel.Parallel, "run_branches", branches_exchanged
    ),
}


def compare_all(runs: list[Run]) -> list[int]:
    assert world_size() > 1
    return [compare(run) for run in runs]
