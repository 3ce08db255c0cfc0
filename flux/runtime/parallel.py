"""One run on several processes: a mesh of four axes, applied to a pipeline from outside.

    data     images: each group makes some of a batch
    cfg      the two branches of classifier-free guidance
    context  the tokens of each pass (context_parallel.py)
    tensor   the weights of each block (tensor_parallel.py)

All processes call the same functions with the same arguments, and all get the whole results. Texts
and input images are encoded by the first process. Each process draws the noise of all tokens and
computes the whole schedule. Images are decoded in turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from math import gcd, prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import init_device_mesh

from flux.conditioning import text_to_image
from flux.errors import UserError
from flux.runtime import memory_plan
from flux.runtime.activation_memory import activations
from flux.runtime.context_parallel import METHODS, ContextParallel, Split
from flux.runtime.memory_plan import GB
from flux.runtime.processes import by_first, of_all, rank, world_size
from flux.runtime.shard_weights import ShardedWeights, shard_sizes
from flux.runtime.tensor_parallel import TensorParallel
from flux.runtime.tensor_parallel import check as check_tensor


class Sizes(NamedTuple):
    """Processes along each axis of the mesh; the last axis has neighbours."""

    data: int = 1
    cfg: int = 1
    context: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        """Return "cfg=2,context=4"."""
        return ",".join(f"{name}={n}" for name, n in zip(AXES, self) if n > 1) or "context=1"


AXES = Sizes._fields


def parse(text: str) -> dict[str, int]:
    """Parse "context=4,cfg=2": the sizes of some axes."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in AXES or name in sizes or not number.isdecimal() or not 0 < int(number) < 1e6:
            raise UserError(
                f"parallel: must name axes with their sizes, such as context=4,cfg=2 (got "
                f"{text!r:.60}). The axes are {', '.join(AXES)}."
            )
        sizes[name] = int(number)
    return sizes


def choose(
    given: dict[str, int], processes: int, *, use_cfg: bool, images: int, tokens: int
) -> Sizes:
    """Return the sizes of all axes, whose product is `processes`; UserError if there are none.

    An axis that is not given gets a share of the processes: data as many as divide the images,
    cfg two if there are two branches, context the rest. tokens: of the image, at most so many
    processes can share them.
    """
    sizes, rest = dict(given), processes // prod(given.values())
    if rest * prod(given.values()) != processes:
        needed = prod(given.values())
        raise UserError(
            f"parallel: {Sizes(**given)} needs {needed} processes or a multiple (got {processes}). "
            f"Start them with `torchrun --nproc-per-node {needed}`."
        )
    for name, wanted in (("data", images), ("cfg", 1 + use_cfg)):
        if name not in given:
            sizes[name] = gcd(rest, wanted)
            rest //= sizes[name]
    if "context" not in given:
        sizes["context"], rest = rest, 1
    if rest > 1:
        raise UserError(
            f"parallel: {Sizes(**given)} leaves {rest} times as many processes as it uses (got "
            f"{processes}). Leave an axis out, or start {processes // rest}."
        )
    chosen = Sizes(**sizes)
    if chosen.cfg > 1 + use_cfg:
        raise UserError(
            f"parallel: cfg={chosen.cfg} is more than the {1 + use_cfg} branches of this run. "
            f"Use `parallel=cfg={1 + use_cfg}`."
        )
    if chosen.data > images:
        raise UserError(
            f"parallel: data={chosen.data} is more than the images of this run ({images}). Make "
            "more, or divide the tokens: context."
        )
    if chosen.context > tokens:
        raise UserError(
            f"parallel: context={chosen.context} is more than the {tokens} tokens of the image. "
            "Make the image larger, or use fewer processes."
        )
    return chosen


class Parallel:
    """This process's place in the mesh, and what it does of a pipeline's work."""

    def __init__(self, sizes: Sizes, device_type: str):
        if prod(sizes) != world_size():
            raise UserError(
                f"parallel: {sizes} needs {prod(sizes)} processes (got {world_size()}). Start them "
                f"with `torchrun --nproc-per-node {prod(sizes)}`."
            )
        self.sizes, self.has_rows = sizes, False
        self.mesh = init_device_mesh(device_type, tuple(sizes), mesh_dim_names=AXES)

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the processes that differ from this one on this axis alone."""
        return self.mesh.get_group(axis)

    # ---------------------------------------------------------------- data: rows of a batch

    def sample(self, plain: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Do what `Pipeline.sample` does, with the rows of this process's group of the data."""
        given = signature(plain).bind(*args, **kwargs).arguments
        seeds = list(given["seeds"])
        split = Split([len(seeds)], self.group("data"))
        # a group without a row repeats the last one: all groups encode the same texts
        rows = split.local(torch.arange(len(seeds)), 0).tolist() or [len(seeds) - 1]
        own = split.tokens[split.rank]

        def gather(x: Tensor) -> Tensor:
            return split.gather(x[:own], 0)

        given["seeds"] = [seeds[row] for row in rows]
        for name in ("features", "negative"):
            if given.get(name) is not None:
                given[name] = feature_rows(given[name], rows)
        if given.get("conditions") is not None:
            given["conditions"] = condition_rows(given["conditions"], rows)
        if (callback := given.get("callback")) is not None:
            given["callback"] = lambda step, t, x: callback(step, t, gather(x))
        self.has_rows = True
        try:
            return gather(plain(**given))
        finally:
            self.has_rows = False

    def workload(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what `Pipeline._workload` does, for the rows of one group."""
        work = plain(*args, **kwargs)
        return work if self.has_rows else replace(work, batch=-(-work.batch // self.sizes.data))

    # ---------------------------------------------------------------- cfg: branches

    def velocity(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what `Pipeline._velocity` does; the velocity's branches run on two groups."""
        velocity = plain(*args, **kwargs)
        velocity.run_branches = self.run_branches
        return velocity

    def run_branches(self, *branches: Callable[[], Tensor]) -> list[Tensor]:
        """Run one of the branches; return the velocities of all of them."""
        if len(branches) == 1:
            return [branches[0]()]
        split = Split([len(branches)], self.group("cfg"))
        return list(split.gather(branches[split.rank]()[None], 0))

    # ---------------------------------------------------------------- decoding

    def decode(self, plain: Callable[[Tensor], list], latents: Tensor) -> list:
        """Do what `Pipeline._decode_all` does: image k is decoded by process k, counted round."""
        if not isinstance(latents, Tensor) or latents.ndim != 4 or not len(latents):
            return plain(latents)  # which says what is wrong
        numbers = range(rank(), len(latents), world_size())
        own = {number: plain(latents[number : number + 1])[0] for number in numbers}
        images = {number: image for part in of_all(own) for number, image in part.items()}
        return [images[number] for number in range(len(latents))]


def distribute(
    pipe: Any, sizes: Sizes, method: str | None = None, shard_weights: bool = False
) -> Parallel | None:
    """Let a pipeline work on all processes, of which each has loaded its own; None if it is alone.

    method: of attention over the context, "allgather" or "ulysses"; None: the one that sends less.
    shard_weights: each process keeps a part of the transformer, and gathers a block when it runs.
    """
    if method not in (None, *METHODS):
        raise UserError(f"method: unknown (got {method!r:.40}, expected {' or '.join(METHODS)}).")
    if prod(sizes) == world_size() == 1:
        return None
    if shard_weights and sizes.tensor > 1:
        raise UserError(
            f"shard_weights: tensor={sizes.tensor} divides the weights already. Leave one out."
        )
    parallel = Parallel(sizes, pipe.device.type)
    if sizes.tensor > 1:
        tensor = parallel.mesh.get_local_rank("tensor")
        check_tensor(pipe.spec.transformer, sizes.tensor)
        pipe.transformer.set_divide(TensorParallel(parallel.group("tensor"), tensor, sizes.tensor))
    elif shard_weights:
        mesh = init_device_mesh(pipe.device.type, (world_size(),))
        pipe.transformer.set_divide(ShardedWeights(mesh))
        pipe._velocity = partial(load_alike, pipe.residency, pipe._velocity)
    encode_one, dtype, condition = pipe.text.encode_one, pipe.text.dtype, pipe._condition

    def encode(prompt: str) -> Any:
        return by_first(lambda: encode_one(prompt).to("cpu", dtype))

    pipe.text.encode_one = encode
    pipe._condition = lambda *args, **kwargs: by_first(lambda: condition(*args, **kwargs))
    pipe._decode_all = partial(parallel.decode, pipe._decode_all)
    if rank():
        pipe.residency.text = pipe.residency.encoders = ()  # are not loaded here
    if sizes.data > 1:
        pipe.sample = partial(parallel.sample, pipe.sample)
        pipe._workload = partial(parallel.workload, pipe._workload)
    if sizes.cfg > 1:
        pipe._velocity = partial(parallel.velocity, pipe._velocity)
    if sizes.context > 1:
        pipe.transformer.on_load(ContextParallel(parallel.group("context"), method))
    return parallel


def needs_shards(pipe: Any, width: int | None = None, height: int | None = None) -> str:
    """Return why `distribute` should shard the weights, with numbers; "" if it need not.

    All processes agree: the one with the least memory counts. Shards leave each image as it is, so
    they come before `tensor`; what cannot be divided is streamed, as by a single process.
    """
    transformer, options = pipe.transformer, pipe.residency.options
    if options.offload or transformer.is_quantized or transformer.compile:
        return ""
    free = min(of_all(pipe.residency.free_memory()), key=lambda each: each.device)
    if options.max_vram is not None:
        free = free._replace(device=min(free.device, options.max_vram * GB))
    work = pipe._workload(text_to_image(pipe.spec, width, height), None, 1)
    active = activations(pipe.spec, work, free.device_type)["transformer"]
    whole = transformer.weight_sizes
    return memory_plan.needs_shards(whole, shard_sizes(whole, world_size()), active, free)


def load_alike(residency: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Do what `Pipeline._velocity` does, with a transformer that all processes load, or have kept.

    Shards that one process loads anew, and another has kept, would be gathered at different times.
    The first process also has the text encoder, so that its plan may differ.
    """
    keeps, loaded = zip(*of_all((residency.keep, residency.transformer.module is not None)))
    residency.keep = all(keeps)
    if not all(loaded):
        residency.transformer.release()
    return plain(*args, **kwargs)


def feature_rows(features: Any, rows: Sequence[int]) -> Any:
    """Return the text features of some rows; those of a single prompt serve all rows."""
    if len(features.tokens) == 1:
        return features
    mask = features.mask
    if mask is not None and mask.ndim == 4 and len(mask) > 1:
        mask = mask[rows]
    return features.rows(rows)._replace(mask=mask)


def condition_rows(conditions: Any, rows: Sequence[int]) -> Any:
    """Return the conditions of some rows; tensors of batch 1 serve all rows."""
    tensors = {name: x[rows] for name, x in conditions.tensors.items() if len(x) > 1}
    return replace(conditions, **tensors)
