"""compile: few graphs serve all blocks, sizes, batches and models, and change no bit.

The backend runs the graphs as they are, without fusing anything.
"""

import re

import pytest
import torch
from support.loaded_weights import generate, load
from support.model_zoo import KLEIN
from support.sample_run import PROMPT, QUICK, image_of, pixels
from torch import nn

from flux.image_io.output import read_metadata

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* was distilled for")]
DEV = "flux.1-dev"
SIZES = [(64, 64, 1), (80, 64, 1), (80, 64, 2), (112, 96, 1), (64, 144, 2)]  # and the batch


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that blocks are compiled to."""
    found, compile = [], nn.Module.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    def compile_with_backend(module: nn.Module, **options) -> None:
        compile(module, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_with_backend)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name, options",
    [
        (DEV, {}),
        (KLEIN, dict(quantize="int8")),
        (KLEIN, dict(offload="model")),
        (DEV, dict(offload="block")),
    ],
    ids=str,
)
def test_one_graph_serves_all_blocks_of_a_type(zoo, graphs, name, options):
    """In every step and the next image; at most one more graph serves all other sizes."""
    plain, compiled = (load(zoo, name, compile=compile, **options) for compile in (False, True))
    assert generate(compiled) == generate(plain) and len(graphs) == 2
    assert generate(compiled, prompts="a dog", steps=1) == generate(plain, prompts="a dog", steps=1)
    assert len(graphs) == 2
    counts = []
    for width, height in ((96, 64), (64, 128), (80, 64)):
        request = dict(width=width, height=height, steps=1)
        assert generate(compiled, **request) == generate(plain, **request)
        counts.append(len(graphs))
    assert counts[0] <= 4 and counts[-1] == counts[0], counts


def test_many_sizes_of_several_models_take_few_graphs(zoo, graphs):
    """For each type of block: one graph for the first size, one for all others; so for batches."""
    models = [(DEV, torch.float32), (KLEIN, torch.float32), (KLEIN, torch.bfloat16)]
    for number, (name, dtype) in enumerate(models, start=1):
        pipe, counts = load(zoo, name, dtype, compile=True), []
        for width, height, batch in SIZES:
            pipe("a cat", width, height, 1, num_images=batch)
            counts.append(len(graphs))
        assert counts[-1] <= 8 * number and counts[-1] == counts[2], counts


def test_compilation_is_told_and_in_the_metadata_and_not_repeated(
    cli, graphs, monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = (PROMPT, *QUICK, "--seed", 7)
    plain, run = image_of(cli(*flags)), cli(*flags, "--compile")
    compiled = image_of(run)
    assert pixels(plain) == pixels(compiled) and len(graphs) == 2
    said = [line for line in run.err.splitlines() if line.startswith("compile: ")]
    assert len(said) == 2 and str(tmp_path / "cache") in said[0]
    assert re.fullmatch(r"compile: took \d+ s", said[1])
    # a compiler that fuses rounds in its own way
    assert read_metadata(compiled) == read_metadata(plain) | {"compile": True}
    torch._dynamo.reset()
    assert pixels(image_of(cli("--from-image", compiled))) == pixels(plain) and len(graphs) == 4
