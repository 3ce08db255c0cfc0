"""Compile the blocks of a network: what is kept for later runs, how long it takes, where it pays.

Text encoders and autoencoders stay as they are: compiled, a prompt would be encoded 1 to 2 ms
faster and an image decoded 5 to 8 ms faster, so a minute of compilation would pay after some
thousand images (`scripts/bench.py --count`).
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from flux.transformer import FluxConfig

MAX_GRAPHS = 64  # of one code object, over all models and dtypes of a process; torch's limit is 8
SECONDS = 60  # of the first compilation of a model, about
# A compiled block reads and writes (tokens, width) at least so many times less than an eager one,
# by the counts of scripts/benchmarks/counts.json.
SAVED_PASSES = 30


def compile_blocks(module: nn.Module, block_lists: Sequence[str]) -> None:
    """Compile each block on its own: blocks of a type share one graph.

    A second size or batch adds one graph, which then serves all other sizes.
    """
    import torch._dynamo.config as dynamo  # not at the top: it takes a second

    keep_compiled()
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
    for path in block_lists:
        for block in module.get_submodule(path).children():
            block.compile(fullgraph=True)


def keep_compiled() -> Path | None:
    """Let torch keep what it compiles for later runs. Return the folder, or None for torch's own.

    The folder is `$TORCHINDUCTOR_CACHE_DIR` or, for this user alone, `~/.cache/flux/compiled`.
    torch's own is in the folder for temporary files, which a restart may empty.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # it takes a second

    # torch sets the variable to its own folder when its compiler is imported
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        folder = cache / "flux" / "compiled"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)  # what is in it will be run
        except OSError:
            return None
        if not os.access(folder, os.W_OK):
            return None
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def compile_seconds() -> float:
    """Return the seconds that this process has compiled."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]


def saved_seconds(config: FluxConfig, tokens: int, bandwidth: float, itemsize: int = 2) -> float:
    """Return the seconds that compiled blocks save at least of a step of a batch of one.

    tokens: of text, image and references. bandwidth: of the GPU's memory, in bytes a second.
    """
    blocks = config.depth + config.depth_single
    return SAVED_PASSES * blocks * tokens * config.hidden_size * itemsize / bandwidth


def measure_bandwidth(device: torch.device, nbytes: int = 2**28) -> float:
    """Return the bytes a second that a copy reads and writes on `device`; the median of five."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    copy, seconds = torch.empty_like(source), []
    for _ in range(5):
        start = perf_counter()
        copy.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - start)
    return 2 * nbytes / sorted(seconds)[2]
