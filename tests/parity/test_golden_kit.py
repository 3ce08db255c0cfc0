"""Golden kits and the example port that reads them.

The kits' tensors are checked against diffusers, with the kits' own weights and inputs, and against
the README's equations in numpy. The example runs where neither torch, safetensors nor flux can be
imported. Copies of the example, each with one bug, must report the first wrong tensor.
"""

import errno
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.kit_commands import require_commands_work
from support.parity_requests import REQUESTS
from support.tiny_repositories import tiny_repositories

import flux
from flux.atomic_files import exclusive_lock
from flux.configs import EMBEDDED, MODELS
from flux.errors import UserError
from flux.image_io.request import ImageInputs
from flux.parity import example_port, golden_kit, reference
from flux.parity.capture import Request
from flux.parity.capture_file import Capture

SOURCE = Path(example_port.__file__).read_text(encoding="utf-8")
FLUX1, FLUX2 = "flux.1-dev", "flux.2-klein-base-4b"
KITS = (FLUX1, FLUX2, "flux.2-tiny")
TINY = Request(golden_kit.PROMPT, width=80, height=64, steps=2)
any_kit = pytest.mark.parametrize("name", KITS)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* was distilled for", "ignore:.* was not trained with"),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a tiny random model, or the embedded one."""
    with tiny_repositories(tmp_path_factory.mktemp("weights"), REQUESTS) as folder:
        yield lambda name, dtype=torch.float32: flux.load(
            name, weights=folder, device="cpu", fast=False, dtype=dtype
        )


@pytest.fixture(scope="module")
def kits(load, tmp_path_factory):
    """One kit of each family, with two passes a step, and one of the embedded model."""
    out = tmp_path_factory.mktemp("kits")
    for name, request in (REQUESTS | {"flux.2-tiny": TINY}).items():
        golden_kit.build(load(name), request, out / name)
    return {name: out / name for name in KITS}


def run_alone(script: Path, *arguments) -> tuple[int, str]:
    """Run the example in a process that has numpy, and none of this project's dependencies."""
    barred = "torch safetensors flux einops tokenizers huggingface_hub PIL".split()
    code = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({barred}); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent)
    return done.returncode, done.stdout + done.stderr


def run_here(source: str, arguments, monkeypatch, capsys) -> tuple[int, str]:
    """Run a copy of the example in this process, which is faster."""
    monkeypatch.setattr(sys, "argv", ["example_port.py", *map(str, arguments)])
    scope = {"__name__": "__main__", "__file__": "example_port.py"}
    with pytest.raises(SystemExit) as stopped:
        exec(compile(source, "example_port.py", "exec"), scope)
    return int(stopped.value.code), capsys.readouterr().out


def rows_of(output: str) -> dict[str, tuple[bool, float]]:
    """name -> whether it is wrong, and its error."""
    lines = re.findall(r"^(ok   |WRONG) (\S+)  (\S+) \(", output, re.MULTILINE)
    return {name: (mark == "WRONG", float(error)) for mark, error, name in lines}


# ---------------------------------------------------------------- the example


@any_kit
def test_example_agrees_with_the_kit(name, kits):
    """Float32 has a unit of 6e-8. Errors of sums were up to 3.2e-7."""
    code, output = run_alone(kits[name] / "example_port.py")
    assert code == 0, output
    rows = rows_of(output)
    assert output.endswith("\nall tensors agree to 2e-06\n") and len(rows) == 28
    assert all(error < 1e-6 for _, error in rows.values())
    block = "double_blocks.0"
    expected = {f"{block}/attention/{tap}" for tap in ("q", "k", "v", "out")}
    expected |= {f"{block}/out.0", f"{block}/out.1"}
    expected |= {f"{block}.{stream}_attn.norm/out.{i}" for stream in ("img", "txt") for i in (0, 1)}
    modulation = f"{block}.img_mod" if name == FLUX1 else "double_stream_modulation_img"
    expected.add(f"{modulation}/out.0")
    assert rows.keys() >= expected
    names = set(Capture(kits[name] / "expected.safetensors").names)
    assert {f"step.001/{row}" for row in rows} <= names


def test_example_runs_from_anywhere_with_released_files(kits, tmp_path):
    """With a bfloat16 file of BFL's layout instead of the kit's weights."""
    script = tmp_path / "port.py"
    script.write_text(SOURCE, encoding="utf-8")
    kit, weights = kits["flux.2-tiny"], EMBEDDED / "flux.2-tiny" / "flux-2-tiny.safetensors"
    code, output = run_alone(script, kit, weights)
    assert code == 0 and output.endswith("\nall tensors agree to 2e-06\n")
    for arguments, missing in (((), "expected.safetensors"), ((kit, tmp_path / "none"), "none")):
        code, output = run_alone(script, *arguments)
        assert code == 2 and output.count("\n") == 1
        assert output.startswith(f"{tmp_path}/{missing}: cannot be read")


def test_example_is_short_and_needs_numpy_alone():
    code = re.sub(r'""".*?"""', "", SOURCE, flags=re.DOTALL).splitlines()
    lines = [line for line in code if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) <= 145
    imports = set(re.findall(r"^(?:import|from) (\w+)", SOURCE, re.MULTILINE))
    assert imports == {"json", "sys", "pathlib", "numpy"}


BLOCK = "double_blocks.0"
NORM_Q, NORM_K = f"{BLOCK}.img_attn.norm/out.0", f"{BLOCK}.img_attn.norm/out.1"
QKV_IN, MLP_IN = f"{BLOCK}.img_attn.qkv/in", f"{BLOCK}.img_mlp/in"
MOD = f"{BLOCK}.img_mod/out"
ACTIVATED = f"{BLOCK}.img_mlp.1/out"
BUGS = {  # name -> (right, wrong) pieces of the source, and the first tensor that must be wrong
    "GELU by erf": (
        [
            (
                "np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))",
                "np.vectorize(__import__('math').erf)(x / np.sqrt(2))",
            )
        ],
        ACTIVATED,
    ),
    "gate and value swapped": ([("gate, up = np", "up, gate = np")], ACTIVATED),
    "RoPE rotates halves": (
        [
            ("x[..., 0::2], x[..., 1::2]", "np.split(x, 2, axis=-1)"),
            ("np.stack([x0 * cos", "np.concatenate([x0 * cos"),
        ],
        f"{BLOCK}/attention/q",
    ),
    "RoPE rotates backwards": ([("rope[:, :, 1, 0]", "rope[:, :, 0, 1]")], f"{BLOCK}/attention/q"),
    "no RoPE for k": ([("apply_rope(k, rope)", "k")], f"{BLOCK}/attention/k"),
    "shift and scale swapped": ([("shift, scale, *_ = ", "scale, shift, *_ = ")], QKV_IN),
    "shift and scale of the MLP swapped": (
        [("gate, shift, scale, mlp_gate = ", "gate, scale, shift, mlp_gate = ")],
        MLP_IN,
    ),
    "gates swapped": (
        [("gate, shift, scale, mlp_gate = ", "mlp_gate, shift, scale, gate = ")],
        MLP_IN,
    ),
    "1 + scale missing": ([("(1 + scale) *", "scale *")], QKV_IN),
    "scale missing": ([("(1 + scale) *", "")], QKV_IN),
    "RMS norm for LayerNorm": ([("x - x.mean(axis=-1, keepdims=True)", "x")], QKV_IN),
    "eps of LayerNorm": (
        [
            (
                "return rms_norm(x - x.mean(axis=-1, keepdims=True))",
                "mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)\n"
                "    return (x - mean) / np.sqrt(var + 1e-5)",
            )
        ],
        QKV_IN,
    ),
    "eps of QK-norm": (
        [("rms_norm(q) *", "q / np.sqrt((q**2).mean(axis=-1, keepdims=True) + 1e-5) *")],
        NORM_Q,
    ),
    "QK-norm over all heads": (
        [("rms_norm(q) *", "q / np.sqrt((q**2).mean(axis=(1, 3), keepdims=True) + 1e-6) *")],
        NORM_Q,
    ),
    "QK-norm's scales swapped": ([("query_norm.scale", "key_norm.scale")], NORM_Q),
    "qkv split by heads": (
        [
            ("3, -1, 2 * len(rope[0]))", "-1, 3, 2 * len(rope[0]))"),
            ("qkv.transpose(2, 0, 3, 1, 4)", "qkv.transpose(3, 0, 2, 1, 4)"),
        ],
        NORM_Q,
    ),
    "image before text": (
        [('heads["txt"], heads["img"]', 'heads["img"], heads["txt"]')],
        f"{BLOCK}/attention/q",
    ),
    "attention not scaled": ([(" / np.sqrt(q.shape[-1])", "")], f"{BLOCK}/attention/out"),
    "heads not moved back": ([("x.swapaxes(1, 2).reshape(1, -1", "x.reshape(1, -1")], MLP_IN),
    "bias missing": ([(' + w.get(f"{name}.bias", 0)', "")], f"{MOD}.0"),
    "SiLU of vec missing": ([("silu(vec)", "vec")], f"{MOD}.0"),
}
OF_ONE_FAMILY = {"GELU by erf": FLUX1, "bias missing": FLUX1, "gate and value swapped": FLUX2}


@pytest.mark.parametrize("bug", BUGS)
def test_example_reports_the_first_wrong_tensor(bug, kits, monkeypatch, capsys):
    pieces, first = BUGS[bug]
    source = SOURCE
    for right, wrong in pieces:
        assert right in source, right
        source = source.replace(right, wrong)
    for name in (FLUX1, FLUX2):
        code, output = run_here(source, (kits[name],), monkeypatch, capsys)
        verdict = output.splitlines()[-1].split(", ")[0]
        expected = first
        if name == FLUX2:
            expected = first.replace(f"{BLOCK}.img_mod", "double_stream_modulation_img")
        if OF_ONE_FAMILY.get(bug, name) == name:
            assert (code, verdict) == (1, f"wrong: {expected}")
        else:
            assert (code, verdict) == (0, "all tensors agree to 2e-06")


WEIGHTS = {  # a weight, a row of it, and the only tensors in which the row shows
    f"{BLOCK}.img_attn.qkv.weight": (0, [NORM_Q]),
    f"{BLOCK}.txt_attn.qkv.weight": (-1, [f"{BLOCK}/attention/v"]),
    f"{BLOCK}.txt_attn.norm.key_norm.scale": (3, [f"{BLOCK}.txt_attn.norm/out.1"]),
    f"{BLOCK}.img_attn.proj.weight": (5, [MLP_IN, f"{BLOCK}/out.0"]),
    f"{BLOCK}.txt_mlp.0.weight": (2, [f"{BLOCK}.txt_mlp.1/out"]),
    f"{BLOCK}.img_mlp.2.weight": (7, [f"{BLOCK}/out.0"]),
}


@any_kit
def test_wrong_weight_shows_only_where_it_is_used(name, kits, tmp_path, monkeypatch, capsys):
    state = load_file(kits[name] / "weights/transformer.safetensors")
    file = tmp_path / "wrong.safetensors"
    for factor in (1.01, math.nan):
        for weight, (row, places) in WEIGHTS.items():
            wrong = state[weight].clone()
            wrong[row] *= factor
            save_file(state | {weight: wrong}, file)
            code, output = run_here(SOURCE, (kits[name], file), monkeypatch, capsys)
            marked = [tensor for tensor, (is_wrong, _) in rows_of(output).items() if is_wrong]
            assert output.endswith(f"\nwrong: {', '.join(places)}\n")
            assert (code, marked) == (1, places), weight


# ---------------------------------------------------------------- the tensors


@any_kit
def test_each_tensor_is_stored_under_its_own_name(name, kits):
    """The bytes have the recorded hash, and any reader finds them, in the order of execution."""
    file = kits[name] / "expected.safetensors"
    expected, stored, raw = Capture(file), load_file(file), file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert list(header)[1:] == expected.names and stored.keys() == set(expected.names)
    assert (kits[name] / "tensors.txt").read_text().split()[::3] == expected.names
    for tensor, record in expected.records.items():
        begin, end = (start + offset for offset in header[tensor]["data_offsets"])
        assert record.kind == "full" and record.same is None
        assert hashlib.sha256(raw[begin:end]).hexdigest() == record.sha256
        assert begin % stored[tensor].itemsize == 0  # aligned, to be mapped
    assert sum(file.stat().st_size for file in kits[name].rglob("*.*")) < 64e6


@any_kit
def test_diffusers_gives_the_kits_velocity_and_pixels(name, kits):
    spec, t = MODELS[name], load_file(kits[name] / "expected.safetensors")
    c = spec.transformer
    state = load_file(kits[name] / "weights/transformer.safetensors")
    theirs = reference.loaded(
        reference.diffusers_transformer(c), reference.transformer_to_diffusers(state, c)
    )
    ae = load_file(kits[name] / "weights/autoencoder.safetensors")
    vae = reference.loaded(
        reference.diffusers_autoencoder(spec.autoencoder),
        reference.autoencoder_to_diffusers(ae, spec.autoencoder),
    )
    with torch.inference_mode():
        velocity = reference.diffusers_velocity(
            theirs,
            t["step.001/in"],
            t["ids/img"],
            t["text/features"],
            t["ids/txt"],
            t["schedule"][:1],
            torch.tensor([2.0]) if c.guidance else None,  # as in REQUESTS
            t["text/pooled"] if c.vector_dim else None,
        )
        pixels = reference.diffusers_decode(vae, t["step.002/latents"])
    assert reference.relative_l2(velocity, t["step.001/out"]) < 1e-6
    assert reference.relative_l2(pixels, t["pixels"]) < 5e-6


@any_kit
def test_readme_equations_give_the_tensors(name, kits):
    """The equations outside the blocks, in numpy; the example has those of a block."""
    text = (kits[name] / "README.md").read_text(encoding="utf-8")
    t = {}
    for tensor, value in load_file(kits[name] / "expected.safetensors").items():
        t[tensor] = value.numpy().astype(np.float64)

    # schedule
    (mu,) = map(float, re.findall(r"with mu = ([\d.]+)\.", text))
    with np.errstate(divide="ignore"):
        times = math.exp(mu) / (math.exp(mu) + 1 / np.linspace(1, 0, 3) - 1)
    np.testing.assert_allclose(t["schedule"], times, rtol=1e-7)

    # rope_table
    ids = np.concatenate([t["ids/txt"], t["ids/img"]])
    theta = float(re.search(r"position · (\d+)\^", text)[1])
    axes = re.search(r"channels of a head, ([\d, ]+): ", text)[1].split(", ")
    angles = []
    for axis, n in enumerate(map(int, axes)):
        angles.append(np.outer(ids[:, axis], theta ** (-np.arange(0, n, 2) / n)))
    angle = np.concatenate(angles, axis=1)
    first_row = np.stack([np.cos(angle), -np.sin(angle)], axis=-1)
    second_row = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    rope = np.stack([first_row, second_row], axis=-2)
    np.testing.assert_allclose(t["rope"], rope, atol=1e-7)

    # timestep_embedding; float32 has a unit of 6e-5 at 1000
    angle = 1000 * t["schedule"][0] * 10000 ** (-np.arange(128) / 128)
    embedding = np.concatenate([np.cos(angle), np.sin(angle)])[None]
    np.testing.assert_allclose(t["step.001/time_in/in"], embedding, atol=1e-4)

    # classifier-free guidance and Euler's method
    if "step.001/negative/out" in t:
        conditional, unconditional = t["step.001/out"], t["step.001/negative/out"]
        scale = {FLUX1: 2.5, FLUX2: 3.0}.get(name, MODELS[name].guidance)
        velocity = unconditional + scale * (conditional - unconditional)
        np.testing.assert_allclose(t["step.001/velocity"], velocity, atol=1e-5)
    x = t["noise"]
    for step in (1, 2):
        v = t[f"step.{step:03}/velocity"].reshape(1, *x.shape[2:], -1).transpose(0, 3, 1, 2)
        x = x + (t["schedule"][step] - t["schedule"][step - 1]) * v
        np.testing.assert_allclose(t[f"step.{step:03}/latents"], x, atol=1e-6)

    # denormalise and unpack
    if name == FLUX1:
        scale, shift = map(float, re.search(r"latents / ([\d.]+) \+ ([\d.]+)\.\n", text).groups())
        x = x / scale + shift
    else:
        weights = load_file(kits[name] / "weights/autoencoder.safetensors")
        mean = weights["bn.running_mean"].numpy().astype(np.float64)[:, None, None]
        var = weights["bn.running_var"].numpy().astype(np.float64)[:, None, None]
        x = x * np.sqrt(var + 1e-4) + mean
    _, channels, height, width = x.shape
    unpacked = np.empty((1, channels // 4, 2 * height, 2 * width))
    for c, i, j in np.ndindex(channels // 4, 2, 2):
        unpacked[:, c, i::2, j::2] = x[:, 4 * c + 2 * i + j]
    np.testing.assert_allclose(t["decoder/decoder/in"], unpacked, rtol=1e-5, atol=1e-5)

    # to_images; halves may be rounded either way
    image = np.round((t["pixels"][0].clip(-1, 1) + 1) / 2 * 255).transpose(1, 2, 0)
    assert np.abs(image - t["image"]).max() <= 1 and (image != t["image"]).mean() < 1e-3
    np.testing.assert_array_equal(np.array(Image.open(kits[name] / "image.png")), t["image"])


@any_kit
def test_readme_names_existing_tensors(name, kits):
    text = (kits[name] / "README.md").read_text(encoding="utf-8")
    names = Capture(kits[name] / "expected.safetensors").names
    quoted = re.findall(r"`([\w./]+)`", text)
    quoted = [place for place in quoted if "/" in place and not place.endswith("/")]
    assert len(quoted) > 40 and [place for place in quoted if place not in names] == []
    assert not re.search(r"[{}]|None", text) and max(map(len, text.splitlines())) <= 200
    assert {"noise", "schedule", "pixels", "image"} <= set(names)
    assert ("negative/out" in text) == MODELS[name].cfg or name == FLUX1
    assert ("guidance_in" in text) == ("CLIP" in text) == (name == FLUX1)
    assert "| guidance | 3 |" in text or name != FLUX2
    assert "`mlp_act`" in text  # a module without weights
    state = load_file(kits[name] / "weights/transformer.safetensors")
    with torch.device("meta"):
        network = flux.transformer.Flux(MODELS[name].transformer)
    shapes = {n: x.shape for n, x in network.state_dict().items()}
    assert {n: x.shape for n, x in state.items()} == shapes
    assert all(x.dtype == torch.float32 for x in state.values())


def test_small_request_of_every_model_is_valid():
    """The image is not square, and the steps are few. Given values stay."""
    for spec in MODELS.values():
        request = golden_kit.small_request(spec, Request("x"))
        assert request.width != request.height and request.width % 16 == request.height % 16 == 0
        assert min(request.width, request.height) >= 64 and request.steps == 4
    given = Request("x", width=64, height=64, steps=2)
    assert golden_kit.small_request(spec, given) == given
    images = ImageInputs((Image.new("RGB", (64, 64)),))
    request = golden_kit.small_request(spec, Request("x", images=images))
    assert (request.width, request.height) == (None, None)  # the images' size


# ---------------------------------------------------------------- the command, and errors


SMALL_KIT = ("--width", 80, "--height", 64, "--steps", 1, "--filter", "latents")


def test_command_golden_kit(parity, tmp_path):
    """The embedded model is the default. The example needs no other layers than its own."""
    arguments = (*SMALL_KIT, "--without-weights", "--output", "out/kit")
    code, out, err = parity("golden-kit", *arguments)
    assert (code, out) == (0, "out/kit\n")
    assert re.fullmatch(
        r"a kit of [\d,]+ tensors, [\d.]+ [KM]B of tensors and 0 bytes of weights\n", err
    )
    folder = tmp_path / "out/kit"
    files = "README.md example_port.py expected.safetensors image.png tensors.txt".split()
    assert sorted(path.name for path in folder.iterdir()) == files
    assert (folder / "example_port.py").read_text(encoding="utf-8") == SOURCE
    weights = EMBEDDED / "flux.2-tiny" / "flux-2-tiny.safetensors"
    assert run_alone(folder / "example_port.py", folder, weights)[0] == 0
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"flux-2-tiny.safetensors, sha256 {digest}" in text
    recipe = Capture(folder / "expected.safetensors").recipe
    assert recipe["prompt"] == golden_kit.PROMPT

    for wrong, words in (
        (arguments, "exists already"),
        (("--output", "b", "--dtype", "bfloat16"), "--dtype: a kit is in float32"),
        (("--output", "b", "--limit", "0.001"), "--limit is 0.001 GB"),
        (("--output", "b", "--filter", "doubel_blocks"), "double_blocks"),
        ((), "--output"),
    ):
        code, _, err = parity("kit", *wrong)  # the old name
        assert code == 2 and words in err.splitlines()[-1], wrong
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", ["flux.1", "flux.2"])
def test_command_golden_kit_with_random_weights(family, parity, tmp_path):
    """No weight has a value that would hide a bug, and no word of the prompt is lost."""
    size = ("--width", 80, "--height", 64, "--steps", 2)
    code, out, err = parity("golden-kit", "--random", family, *size, "--output", "kit")
    assert (code, out) == (0, "kit\n") and "truncated" not in err and "cut off" not in err, err
    code, output = run_alone(tmp_path / "kit/example_port.py")
    assert code == 0 and len(rows_of(output)) == 28, output
    recipe = Capture(tmp_path / "kit/expected.safetensors").recipe
    assert (recipe["model"], recipe["steps"]) == (f"{family}-random", 2)
    assert recipe["guidance"][0] > 1 and f"{family}-random" not in MODELS
    files = {path.stem: load_file(path) for path in (tmp_path / "kit/weights").iterdir()}
    text = ["clip", "t5"] if family == "flux.1" else ["model"]
    assert sorted(files) == sorted(["transformer", "autoencoder", *text])
    # BFL's autoencoders normalise in 32 groups: each must have several channels, or it is constant
    assert Capture(tmp_path / "kit/expected.safetensors").records["pixels"].shape == (1, 3, 64, 80)
    assert len(files["autoencoder"]["decoder.norm_out.weight"]) == 32
    for state in files.values():
        assert all(x.std() > 0.01 for x in state.values() if x.ndim)  # a batch count has no axis
    assert "guidance_in.in_layer.weight" in files["transformer"]

    for wrong, words in (
        (("--random", family, "--model", "flux.1-dev"), "Leave out --model"),
        (("--random", "flux.4"), "is unknown (got 'flux.4', expected"),
    ):
        code, _, err = parity("golden-kit", *wrong, "--output", "b")
        assert code == 2 and words in err.splitlines()[-1] and not (tmp_path / "b").exists()


@pytest.mark.parametrize("family", ["flux.1", "flux.2"])
def test_every_command_works_on_a_random_kit(family, parity, tmp_path):
    """The random model is made again, with the kit's weights: other ones give other tensors."""
    size = ("--width", 64, "--height", 80, "--steps", 2)
    assert parity("golden-kit", "--random", family, *size, "--output", "kit")[0] == 0
    kit, block = "kit/expected.safetensors", "step.001/double_blocks.1"
    expected = load_file(tmp_path / kit)
    only = ("--filter", "double_blocks.1")
    require_commands_work(parity, kit, only)
    code, out, _ = parity("calibrate", kit, "--precision", "bfloat16", *only)
    assert code == 0 and Capture(tmp_path / kit).rounding["bfloat16"][f"{block}/out.0"].local > 0

    # QK-norm without its scale, in the block's queries of the image
    name = f"{block}.img_attn.norm/out.0"
    weights = load_file(tmp_path / "kit/weights/transformer.safetensors")
    scale = weights["double_blocks.1.img_attn.norm.query_norm.scale"]
    save_file(expected | {name: expected[name] / scale}, tmp_path / "port.safetensors")
    code, out, _ = parity("diagnose", "port.safetensors", kit)
    assert code == 1 and "cause: QK-norm without its scale" in out
    code, _, err = parity("replay", kit, "--weights", "kit/weights")
    assert code == 2 and "--weights: the kit of a random model has its own" in err

    weights["img_in.weight"] *= 2
    save_file(weights, tmp_path / "kit/weights/transformer.safetensors")
    code, out, _ = parity("replay", kit, "--filter", "step.001/img_in/out")
    assert code == 1 and "the first is step.001/img_in/out" in out
    save_file({"x": scale}, tmp_path / "kit/weights/transformer.safetensors")
    code, _, err = parity("replay", kit)
    assert code == 2 and "has other tensors than the random model" in err
    assert f"{family}-random" not in MODELS


def test_impossible_kits_are_refused(load, tmp_path, monkeypatch):
    pipe, output = load(FLUX2), tmp_path / "kit"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").touch()
    (tmp_path / ".full.unfinished").mkdir()  # of a process that was killed at its end
    with pytest.raises(
        UserError, match="output: .* exists already, and kits are never overwritten"
    ):
        golden_kit.build(pipe, TINY, tmp_path / "full")
    assert list(tmp_path.iterdir()) == [tmp_path / "full"]
    with exclusive_lock(output):
        with pytest.raises(UserError, match="kit: another process is using this file"):
            golden_kit.build(pipe, TINY, output)
    with pytest.raises(UserError, match="dtype: a kit is in float32"):
        golden_kit.build(load(FLUX2, torch.bfloat16), TINY, output)
    images = ImageInputs((Image.new("RGB", (64, 64)),), kv_cache=True)
    with pytest.raises(UserError, match="Pass `kv_cache=False`"):
        golden_kit.build(pipe, replace(TINY, images=images), output)
    with pytest.raises(UserError, match="[KM]B of tensors"):
        golden_kit.build(pipe, TINY, output, limit=1e5)
    almost_full = shutil.disk_usage(tmp_path)._replace(free=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: almost_full)
        with pytest.raises(UserError, match="1 MB are free on its disk. Choose a smaller `width`"):
            golden_kit.build(pipe, TINY, output)

    def disk_is_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(golden_kit, "list_tensors", disk_is_full)
        with pytest.raises(UserError, match="the disk is full"):
            golden_kit.build(pipe, TINY, output, only=("noise",))
    pipe.transformer().final_layer.linear.weight[0] = math.nan
    with pytest.raises(
        UserError, match="the run failed, and no kit was written: latents: not fini"
    ):
        golden_kit.build(pipe, TINY, output)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_empty_folder_is_filled(load, tmp_path):
    golden_kit.build(load("flux.2-tiny"), TINY, tmp_path, only=("noise",))
    assert (tmp_path / "weights/transformer.safetensors").exists()
