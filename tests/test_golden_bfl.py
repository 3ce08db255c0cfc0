"""`numerics="bfl"` in bfloat16 against Black Forest Labs' own code, to the bit.

Two kinds of golden files lie in tests/golden_bfl:
1) `code-*`: times, latents and pixels that BFL's code computed (scripts/dev/golden_bfl_code.py).
2) `flux.*`: every rounding of a run, from the equations (scripts/dev/golden_bfl.py). BFL's code
   gave the same latents. These runs show where a rounding is wrong.

Matrix products are summed in an order that depends on the processor, and this moves last bits. So
the files of the first kind must be equal where torch and processor are those that made the file,
and close elsewhere. The second script runs here as well, and must be equal everywhere. All is
computed on one thread.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from support.load_script import script
from support.tiny_repositories import write_tokenizers
from torch import Tensor

import flux
from flux.conditioning import Conditions, reference_tokens
from flux.configs import MODELS
from flux.parity.capture import Request, run
from flux.parity.compare import errors
from flux.parity.random_model import random_model
from flux.parity.reference import fingerprint, networks, write_weights
from flux.pipeline import Pipeline
from flux.sampling import schedule
from flux.text_encoder import TextFeatures
from flux.transformer import NUMERICS, Numerics
from flux.weights.files import read_header

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/dev/golden_bfl.py"
GOLDEN = Path(__file__).parent / "golden_bfl"
golden_bfl = script("dev/golden_bfl")
golden_bfl_code = script("dev/golden_bfl_code")

SETTINGS = dict(width=96, height=64, steps=4, guidance=3.5)
# Measured with the kernels of older processors (ATEN_CPU_CAPABILITY=default and avx2 with
# ONEDNN_MAX_CPU_ISA=SSE41 and AVX2): up to 0.0081 from the equations, 0.0148 from BFL's code, whose
# pixels and classifier-free guidance amplify. Every sum in float64: 0.0083. `exact` is off by 0.1
# and more for models with guidance input, and by 0.021 and more for klein.
OTHER_SUMS = 0.02


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- BFL's code


@pytest.mark.parametrize("name", golden_bfl_code.CASES)
def test_times_latents_and_pixels_equal_those_of_bfl_code(name, tmp_path, monkeypatch):
    path = GOLDEN / f"code-{name}.safetensors"
    metadata, golden = read_header(path)[1], load_file(path)
    case = golden_bfl_code.CASES[name]
    spec = golden_bfl_code.tiny_model(case)
    parts = networks(spec)
    drawn = fingerprint(parts["transformer"], parts["autoencoder"])
    expected = golden.pop("fingerprint")
    assert torch.allclose(drawn, expected, rtol=0, atol=1e-5), (
        f"torch {torch.__version__} draws other random weights than {metadata['torch']} did. "
        "Run scripts/dev/golden_bfl_code.py."
    )
    parts["transformer"].bfloat16()
    write_weights(tmp_path, spec, parts, sharded=False)
    write_tokenizers(tmp_path, case.row)
    monkeypatch.setitem(MODELS, case.row, spec)
    pipe = flux.load(case.row, tmp_path, "cpu", torch.bfloat16, "bfl")

    seen = sample_and_decode(pipe, golden_bfl_code.random_inputs(spec, case), case)
    assert seen.keys() == golden.keys() and len(golden) == golden_bfl_code.STEPS + 2
    same = all(metadata[key] == value for key, value in golden_bfl_code.summation().items())
    for tensor, value in golden.items():
        assert value.float().std() > 0.1, tensor
        if same:
            assert seen[tensor].float().equal(value.float()), tensor
        else:
            assert errors(seen[tensor], value).relative_l2 <= OTHER_SUMS, tensor


def sample_and_decode(pipe: Pipeline, inputs: dict[str, Tensor], case) -> dict[str, Tensor]:
    """Return times and latents after each step, as tokens (1, N, C), and the pixels."""
    seen, times = {}, []
    conditions = Conditions(golden_bfl_code.HEIGHT, golden_bfl_code.WIDTH)
    if case.references:
        references = [inputs[f"reference.{number}"][None] for number in range(case.references)]
        tokens, ids = reference_tokens(references, axes=4)
        conditions = replace(
            conditions, references=tokens, reference_ids=ids, kv_cache=case.kv_cache
        )

    def record(step: int, t: float, latents: Tensor) -> None:
        times.append(t)
        seen[f"step.{step:03}/latents"] = rearrange(latents, "b c h w -> b (h w) c").clone()

    negative = inputs.get("negative")
    takes_guidance = pipe.spec.transformer.guidance or pipe.spec.cfg
    latents = pipe.sample(
        TextFeatures(inputs["text"], inputs.get("pooled")),
        [golden_bfl_code.SEED],
        steps=golden_bfl_code.STEPS,
        guidance=golden_bfl_code.GUIDANCE if takes_guidance else None,
        negative=None if negative is None else TextFeatures(negative, None),
        callback=record,
        conditions=conditions,
    )
    seen["times"] = torch.tensor(times)
    with torch.inference_mode():
        seen["pixels"] = pipe._decode(latents)
    return seen


def test_golden_files_of_bfl_code_name_versions_and_commit():
    paths = sorted(GOLDEN.glob("code-*"))
    assert [path.stem for path in paths] == sorted(f"code-{n}" for n in golden_bfl_code.CASES)
    for path in paths:
        metadata = read_header(path)[1]
        assert {"torch", "cpu_capability", "processor", "commit"} <= metadata.keys()
        assert re.fullmatch("[0-9a-f]{40}", metadata["commit"]), path.name
        assert path.stat().st_size < 100_000, path.name


# ---------------------------------------------------------------- the equations


class Run(NamedTuple):
    load: Callable[[Numerics], Pipeline]
    weights: Path
    golden: dict[str, Tensor]  # in the order of execution

    @property
    def features(self) -> TextFeatures:
        return TextFeatures(self.golden["text/features"], self.golden.get("text/pooled"))


@pytest.fixture(scope="module", params=["flux.1", "flux.2"])
def equations(request, one_thread):
    with random_model(request.param) as (name, folder):
        weights = folder / MODELS[name].transformer_file

        def load(numerics: Numerics) -> Pipeline:
            return flux.load(name, folder, "cpu", torch.bfloat16, numerics)

        family, golden = golden_bfl.run(load_file(weights))
        assert family == request.param
        yield Run(load, weights, golden)


def all_tensors(equations: Run, numerics: Numerics) -> dict[str, Tensor]:
    """Return every tensor of the project's run, by name."""
    seen, pipe = {}, equations.load(numerics)
    pipe.text.encode_one = lambda prompt: equations.features

    def record(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.clone()

    run(pipe, Request("", **SETTINGS), record)
    seen["rope"] = seen["rope"][..., 0]  # the first column of each rotation: cosine and sine
    return seen


def differing(equations: Run, seen: dict[str, Tensor]) -> list[str]:
    return [n for n, tensor in equations.golden.items() if not seen[n].float().equal(tensor)]


def test_every_tensor_equals_the_equations_to_the_bit(equations):
    """Compare times, vec, inside attention, and after each block, at each step."""
    seen = all_tensors(equations, NUMERICS["bfl"])
    names = equations.golden.keys() - {"text/pooled"}
    assert len(names) == 3 + 4 * (1 + 2 * 6 + 3 * 5 + 2)
    assert differing(equations, seen) == []
    assert all(seen[name].dtype == torch.bfloat16 for name in names if name.startswith("step"))
    assert seen["schedule"].dtype == torch.float32
    latents = equations.load(NUMERICS["bfl"]).sample(equations.features, [0], **SETTINGS)
    assert latents.equal(equations.golden["step.004/latents"])  # without an observer
    assert latents.std() > 0.5


@pytest.mark.parametrize(
    "field, first",
    [
        ("time", "step.001/vec"),
        ("rope", "rope"),
        ("norm_scale", "step.001/double_blocks.0/attention/q"),
        ("state", "step.001/latents"),
    ],
)
def test_each_field_of_numerics_first_changes_its_own_tensor(equations, field, first):
    numerics = replace(NUMERICS["bfl"], **{field: getattr(NUMERICS["exact"], field)})
    differ = differing(equations, all_tensors(equations, numerics))
    assert differ[0] == first
    if field != "rope":  # which changes by 3e-8, less than bfloat16 shows
        assert "step.004/latents" in differ


@pytest.mark.parametrize("family, kind", [("flux.1", "linear"), ("flux.2", "empirical")])
def test_schedule_equals_the_equations_to_the_bit(family, kind, monkeypatch):
    tokens, differ = golden_bfl.ROWS * golden_bfl.COLUMNS, 0
    for steps in range(1, 60):
        monkeypatch.setattr(golden_bfl, "STEPS", steps)
        expected = torch.tensor(golden_bfl.schedule(family))
        assert schedule(kind, steps, tokens, "bfl").equal(expected), steps
        differ += not schedule(kind, steps, tokens).equal(expected)
    assert differ > 30  # from float64


def test_exact_numerics_differ_from_the_equations(equations):
    seen = all_tensors(equations, NUMERICS["exact"])
    for name, tensor in equations.golden.items():
        if re.search("blocks|vec|/out|step.004/latents", name):
            assert errors(seen[name], tensor).relative_l2 > 5 * OTHER_SUMS, name


def test_golden_files_of_the_equations_are_what_the_script_writes(equations, tmp_path, monkeypatch):
    threads, out = torch.get_num_threads(), tmp_path / "out"
    command = ["golden_bfl.py", str(equations.weights), "--output", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    try:
        assert golden_bfl.main() == 0
    finally:
        torch.set_num_threads(threads)
    (path,) = out.iterdir()
    now, then = load_file(path), load_file(GOLDEN / path.name)
    assert now.keys() == then.keys() == set(filter(golden_bfl.is_stored, equations.golden))
    for name, tensor in now.items():
        assert tensor.float().equal(equations.golden[name]), name
    measured = {name: errors(now[name], tensor).relative_l2 for name, tensor in then.items()}
    assert measured["text/features"] < 1e-3, (
        "torch draws other random numbers than it did. Run scripts/dev/golden_bfl.py."
    )
    assert max(measured.values()) <= OTHER_SUMS, measured
    assert (GOLDEN / path.name).stat().st_size < 150_000


def test_script_of_the_equations_imports_nothing_of_the_project():
    source = SCRIPT.read_text(encoding="utf-8")
    imported = re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE)
    of_arguments = {"argparse", "sys", "pathlib", "modules"}  # this one is the project's
    assert set(imported) == {"math", "torch", "safetensors"} | of_arguments
