"""`import flux` and its public names import only what every run needs.

The tests list the modules that a new interpreter has imported.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def loaded_by(code: str, before: str = "pass") -> set[str]:
    """Return the modules that `code` imports after `before`."""
    script = "\n".join(
        [
            "import sys, json",
            before,
            "earlier = set(sys.modules)",
            code,
            "print(json.dumps(sorted(set(sys.modules) - earlier)))",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_import_flux_imports_nothing_else():
    added = loaded_by("import flux")
    assert {name for name in added if name.split(".")[0] not in sys.stdlib_module_names} == {"flux"}


def test_public_names_import_little_beyond_torch():
    """Only small libraries: no tokenizer, hub, progress bar or torch compiler before its use."""
    added = loaded_by(
        "import flux; flux.MODELS; flux.load; flux.Pipeline; flux.UserError", before="import torch"
    )
    outside = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert outside <= {"flux", "einops", "safetensors", "PIL"}
    assert "flux.pipeline" in added
    assert not {name for name in added if name.startswith(("torch", "flux.toy"))}
    optional = {
        "flux.lora.formats",
        "flux.lora.merge",
        "benchmarks.lossy",
        "flux.training.trainer",
        "modules.prompt_upsampling",
        "PIL.PngImagePlugin",
    }
    assert not added & optional


def test_first_image_imports_no_compiler():
    """torch imports its compiler, as large as itself, to draw an Embedding on the meta device."""
    code = "import flux; flux.load()('a red circle', steps=1)"
    added = loaded_by(code, before="import torch")
    outside = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert outside <= {"flux", "einops", "safetensors", "PIL", "tokenizers", "torch", "numpy"}
    compiler = ("torch._dynamo", "torch._inductor", "torch.distributed")
    assert not {name for name in added if name.startswith(compiler)}
    optional = {
        "flux.training.lora",
        "flux.lora.formats",
        "flux.lora.merge",
        "benchmarks.lossy",
        "flux.training.trainer",
    }
    assert not added & optional


def test_empty_modules_have_shapes_but_draw_no_random_numbers():
    import torch
    from torch import nn

    from flux.weights.load import init_empty

    before = torch.get_rng_state()
    module = init_empty(lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.LayerNorm(2)))
    assert all(p.is_meta for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(p.shape) for p in module.parameters()] == [(5, 3), (2, 3), (2,), (2,), (2,)]
    assert nn.Embedding(5, 3).weight.abs().sum() > 0  # modules outside draw weights


def test_public_names_and_submodules_are_found_without_an_import():
    import flux

    names = {
        "MODELS",
        "ImageInputs",
        "Pipeline",
        "Preview",
        "RefusedError",
        "TextEncoder",
        "TextFeatures",
        "UserError",
        "load",
    }
    assert set(flux.__all__) == names and names < set(dir(flux))
    assert all(getattr(flux, name) is not None for name in dir(flux))
    assert all(map(flux.__getattr__, flux.__all__))
    assert flux.sampling.schedule("unshifted", 1, 1).tolist() == [1, 0]
    with pytest.raises(AttributeError, match="nonsense"):
        flux.nonsense  # noqa: B018
