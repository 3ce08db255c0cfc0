"""Which networks of a pipeline are in memory, and when.

A run has stages: the prompt is encoded, input images are encoded, the transformer runs, latents are
decoded. Before the first, `plan` decides which weights stay on the device: all, those of the stage
that runs, or some of its blocks. After each stage, `done` releases what must go.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add

import torch

from flux.configs import ModelSpec
from flux.runtime.activation_memory import Workload
from flux.runtime.devices import FreeMemory, available_memory
from flux.runtime.lazy_module import LazyModule
from flux.runtime.memory_plan import MemoryPlan, WeightSizes, plan_memory
from flux.runtime.options import RuntimeOptions
from flux.runtime.processes import world_size


class Residency:
    """Plans which networks are in memory when, and releases those that must go."""

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        options: RuntimeOptions,
        text: Sequence[LazyModule],
        transformer: LazyModule,
        autoencoder: LazyModule,
        encoders: Sequence[LazyModule],  # of input images
    ):
        self.spec, self.device, self.options = spec, device, options
        self.text, self.encoders = tuple(text), tuple(encoders)
        self.transformer, self.autoencoder = transformer, autoencoder
        self.keep = options.offload in (None, "none")  # networks stay loaded after their stage
        self.planned: Workload | None = None  # the largest workload of the current plan
        self.pinned = False
        self.held: tuple[LazyModule, ...] = ()  # stay loaded after their stage

    @property
    def networks(self) -> tuple[LazyModule, ...]:
        return *self.text, self.transformer, self.autoencoder, *self.encoders

    def plan(self, work: Workload) -> MemoryPlan | None:
        """Decide what is in memory when. Raise UserError, with numbers, if `work` cannot fit.

        Return None after `keep_loaded`, which leaves nothing to decide.
        """
        if self.pinned:
            return None
        for network in self.networks:
            if network.resident is not None:  # an interrupted run left it streaming
                network.release()
        sizes = {
            "text encoder": total_size(self.text),
            "transformer": self.transformer.weight_sizes,
            "autoencoder": self.autoencoder.weight_sizes,
        }
        if work.encoded_pixels:
            sizes["image encoder"] = total_size(self.encoders)
        decided = plan_memory(
            self.spec,
            sizes,
            work,
            self.free_memory(),
            self.options.offload,
            self.options.max_vram,
            quantizable=not (self.transformer.is_quantized or self.transformer.divide),
            dividable=world_size() > 1 and not self.transformer.is_quantized,
        )
        self.keep = decided.offload == "none"
        if not self.keep:  # an earlier plan, or a stage that ran alone, may have loaded them
            self.done(*self.networks)
        self.transformer.stream(decided.resident["transformer"])
        for network in self.text:
            network.stream(decided.resident["text encoder"] if network.block_lists else None)
        self.planned = work
        return decided

    def free_memory(self) -> FreeMemory:
        """Return the memory for all stages: what is free, and what they hold already."""
        free = available_memory(self.device)
        stages = (*self.text, self.transformer, self.autoencoder)
        return free._replace(device=free.device + sum(network.device_bytes for network in stages))

    def covers(self, work: Workload) -> bool:
        """Return whether the current plan has memory for `work`."""
        planned = self.planned
        return self.pinned or (planned is not None and work.fits_within(planned))

    def keep_loaded(self) -> None:
        """Keep all networks loaded from now on, for example while one of them is trained."""
        self.keep = self.pinned = True

    @contextmanager
    def hold(self, *networks: LazyModule) -> Iterator[None]:
        """Load these networks once for all stages of a `with` block, which run no others."""
        before, self.held = self.held, networks
        try:
            yield
        finally:
            self.held = before
            self.done(*networks)

    def keeps(self, network: LazyModule) -> bool:
        """Return whether a network stays loaded after its stage."""
        return self.keep or any(network is held for held in self.held)

    def done(self, *networks: LazyModule) -> None:
        """Release the networks of a finished stage, unless they are kept."""
        for network in networks:
            if not self.keeps(network):
                network.release()


def total_size(networks: Sequence[LazyModule]) -> WeightSizes:
    return reduce(add, (network.weight_sizes for network in networks), WeightSizes(0))
