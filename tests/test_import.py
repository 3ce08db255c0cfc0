"""`import flux` and what it offers must not wait for what a run may never need.

Deterministic facts only: which modules are loaded, never how long it took. Each is asked in a fresh interpreter.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def loaded_by(code: str, before: str = "pass") -> set[str]:
    """The modules that `code` adds to those that `before` has loaded."""
    script = f"import sys, json\n{before}\nseen = set(sys.modules)\n{code}\nprint(json.dumps(sorted(set(sys.modules) - seen)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_import_flux_loads_nothing_else():
    assert {
        name
        for name in loaded_by("import flux")
        if name.split(".")[0] not in sys.stdlib_module_names
    } == {"flux"}


def test_what_flux_offers_needs_little_beyond_torch():
    """No tokenizer, hub, progress bar, compiler of torch or other library before it is used: only small ones."""
    added = loaded_by(
        "import flux; flux.MODELS; flux.load; flux.Pipeline; flux.UserError", before="import torch"
    )
    outside = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert outside <= {"flux", "einops", "safetensors", "PIL"}
    assert "flux.pipeline" in added and not {
        name for name in added if name.startswith(("torch", "flux.toy"))
    }
    optional = {
        "flux.lora.formats",
        "flux.lora.merge",
        "benchmarks.lossy",
        "flux.training.trainer",
        "prompt_upsampling",
        "PIL.PngImagePlugin",
    }
    assert not added & optional  # few pictures need them, or only their end does


def test_a_first_picture_needs_no_compiler():
    """torch's takes as long to import as torch itself, which asks for it to draw an Embedding on the meta device."""
    picture = "import flux; flux.load()('a red circle', steps=1)"
    added = loaded_by(picture, before="import torch")
    outside = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert outside <= {"flux", "einops", "safetensors", "PIL", "tokenizers", "torch", "numpy"}
    assert not {
        name
        for name in added
        if name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed"))
    }
    assert (
        not {
            "flux.training.lora",
            "flux.lora.formats",
            "flux.lora.merge",
            "benchmarks.lossy",
            "flux.training.trainer",
        }
        & added
    )


def test_blank_modules_have_shapes_and_draw_nothing():
    import torch
    from torch import nn

    from flux.weights.load import init_empty

    before = torch.get_rng_state()
    module = init_empty(lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.LayerNorm(2)))
    assert all(p.is_meta for p in module.parameters()) and torch.equal(
        torch.get_rng_state(), before
    )
    assert [tuple(p.shape) for p in module.parameters()] == [(5, 3), (2, 3), (2,), (2,), (2,)]
    assert nn.Embedding(5, 3).weight.abs().sum() > 0  # outside, all is as it was


def test_public_names():
    import flux

    assert set(flux.__all__) == {"MODELS", "ImageInputs", "Pipeline", "UserError", "load"}
    assert all(map(flux.__getattr__, flux.__all__))
    assert flux.sampling.schedule("unshifted", 1, 1).tolist() == [
        1,
        0,
    ]  # a submodule, without its own import
    with pytest.raises(AttributeError, match="nonsense"):
        flux.nonsense  # noqa: B018
