"""Golden kits, and the example that reads them: what a port is told is true, and the example fails where it should.

The kits' tensors are checked against diffusers, with the kits' own weights and inputs, and against their README's equations
in numpy. The example runs where neither torch, safetensors nor flux can be imported, and copies of it with one mistake each.
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
from support.parity_requests import REQUESTS
from support.tiny_repositories import tiny_repositories

import flux
from flux.configs import EMBEDDED, MODELS
from flux.errors import UserError
from flux.image_io.request import ImageInputs
from flux.parity import example_port as consumer
from flux.parity import golden_kit as kit
from flux.parity import reference
from flux.parity.capture import Request
from flux.parity.capture_file import Capture

SOURCE = Path(consumer.__file__).read_text(encoding="utf-8")
FLUX1, FLUX2 = "flux.1-dev", "flux.2-klein-base-4b"
KITS = (FLUX1, FLUX2, "flux.2-tiny")
TINY = Request(kit.PROMPT, width=80, height=64, steps=2)
any_kit = pytest.mark.parametrize("name", KITS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* was distilled for", "ignore:.* was not trained with"
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Pipelines of tiny networks with random weights, of which the table's rows speak meanwhile, and the embedded one."""
    with tiny_repositories(tmp_path_factory.mktemp("weights"), REQUESTS) as folder:
        yield lambda name, dtype=torch.float32: flux.load(
            name, weights=folder, device="cpu", dtype=dtype
        )


@pytest.fixture(scope="module")
def kits(load, tmp_path_factory):
    """One of each family, with two passes each, and one of the embedded model."""
    out = tmp_path_factory.mktemp("kits")
    for name, request in (REQUESTS | {"flux.2-tiny": TINY}).items():
        kit.build(load(name), request, out / name)
    return {name: out / name for name in KITS}


def consume(script: Path, *arguments) -> tuple[int, str]:
    """Run the example in a process that has numpy, and none of what this project is made of."""
    barred = "torch safetensors flux einops tokenizers huggingface_hub PIL".split()
    code = f"import runpy, sys; sys.modules |= dict.fromkeys({barred}); sys.argv = sys.argv[1:]; "
    command = [
        sys.executable,
        "-c",
        code + "runpy.run_path(sys.argv[0], run_name='__main__')",
        script,
        *arguments,
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=script.parent
    )
    return done.returncode, done.stdout + done.stderr


def judged(output: str) -> dict[str, tuple[bool, float]]:
    """Name -> whether it is off, and by how much."""
    lines = re.findall(r"^(ok |OFF) (\S+)  (\S+) \(", output, re.MULTILINE)
    return {name: (mark == "OFF", float(error)) for mark, error, name in lines}


# ---------------------------------------------------------------- the example


@any_kit
def test_the_example_agrees(name, kits):
    """With float32's rounding, whose unit is 6e-8, and some sums: seen are up to 3.2e-7."""
    code, output = consume(kits[name] / "consumer.py")
    assert code == 0, output
    tensors = judged(output)
    assert output.endswith("\nall agree to 2e-06\n") and len(tensors) == 26
    assert all(error < 1e-6 for _, error in tensors.values())
    inside = (
        "double_blocks.0.img_attn.norm/out",
        "double_blocks.0.txt_attn.norm/out",
        "double_blocks.0/out.0",
    )
    inside += (
        *(f"double_blocks.0/attention/{tap}" for tap in ("q", "k", "v", "out")),
        "double_blocks.0/out.1",
    )
    own = (
        "double_blocks.0.img_mod/out.0"
        if name == "flux.1-dev"
        else "double_stream_modulation_img/out.0"
    )
    assert tensors.keys() >= {*inside, own}
    assert {f"step.001/{place}" for place in tensors} <= set(
        Capture(kits[name] / "expected.safetensors").names
    )


def test_the_example_can_be_run_from_anywhere(kits, tmp_path):
    """Also with a file of BFL's, in bfloat16, in place of the kit's weights."""
    script = tmp_path / "port.py"
    script.write_text(SOURCE, encoding="utf-8")
    code, output = consume(
        script, kits["flux.2-tiny"], EMBEDDED / "flux.2-tiny" / "flux-2-tiny.safetensors"
    )
    assert code == 0 and output.endswith("\nall agree to 2e-06\n")
    for arguments, missing in (
        ((), "expected.safetensors"),
        ((kits["flux.2-tiny"], tmp_path / "none"), "none"),
    ):
        code, output = consume(script, *arguments)
        assert code == 1 and re.search(
            rf"No such file or directory: .*{tmp_path}/{missing}", output
        )


def test_the_example_is_short():
    """Lines of code: what is neither empty, nor a comment, nor a docstring."""
    code = re.sub(r'""".*?"""', "", SOURCE, flags=re.DOTALL).splitlines()
    assert len([line for line in code if line.strip() and not line.lstrip().startswith("#")]) <= 72
    assert set(re.findall(r"^(?:import|from) (\w+)", SOURCE, re.MULTILINE)) == {
        "json",
        "sys",
        "pathlib",
        "numpy",
    }


TURNED = "x.view(complex) * turn"
HALVES = "(x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]) * turn"
OF_QK = "x / np.sqrt((x**2).mean(axis={}, keepdims=True) + {}) *"
NORM = "double_blocks.0.img_attn.norm/out"
MISTAKES = {  # what is written -> what stands there then, and the first tensor that must be off
    "GELU erf": (
        {
            "np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))": "np.vectorize(__import__('math').erf)(x / np.sqrt(2))"
        },
        "double_blocks.0.img_mlp.1/out",
    ),
    "gate and value": ({"gate, up = np": "up, gate = np"}, "double_blocks.0.img_mlp.1/out"),
    "RoPE halves": (
        {
            f"({TURNED}).view(float)": f"(lambda z: np.concatenate([z.real, z.imag], axis=-1))({HALVES})"
        },
        "double_blocks.0/attention/q",
    ),
    "RoPE backwards": ({TURNED: f"{TURNED}.conj()"}, "double_blocks.0/attention/q"),
    "no RoPE for k": ({"rotate(k, rope)": "k"}, "double_blocks.0/attention/k"),
    "shift and scale": (
        {"shift, scale, *_ =": "scale, shift, *_ ="},
        "double_blocks.0.img_attn.qkv/in",
    ),
    "shift and scale of the MLP": (
        {"gate, shift, scale, mlp": "gate, scale, shift, mlp"},
        "double_blocks.0.img_mlp/in",
    ),
    "the two gates": (
        {"gate, shift, scale, mlp_gate)": "mlp_gate, shift, scale, gate)"},
        "double_blocks.0.img_mlp/in",
    ),
    "no 1 + scale": ({"1 + parts[1]": "parts[1]"}, "double_blocks.0.img_mod/out.1"),
    "no scale": ({"return scale * rms_norm": "return rms_norm"}, "double_blocks.0.img_attn.qkv/in"),
    "RMS for LayerNorm": (
        {"x - x.mean(axis=-1, keepdims=True)": "x"},
        "double_blocks.0.img_attn.qkv/in",
    ),
    "LayerNorm eps": ({"+ 1e-6": "+ 1e-5"}, "double_blocks.0.img_attn.qkv/in"),
    "RMSNorm eps": ({"rms_norm(x) *": OF_QK.format(-1, 1e-5)}, NORM),
    "RMSNorm over all heads": ({"rms_norm(x) *": OF_QK.format((2, 3), 1e-6)}, NORM),
    "q's scale is k's": ({'"query", "key"': '"key", "query"'}, NORM),
    "qkv head by head": (
        {
            "3, -1, 2 * len(rope[0]))": "-1, 3, 2 * len(rope[0]))",
            "transpose(2, 0, 1, 3, 4)": "transpose(3, 0, 1, 2, 4)",
        },
        NORM,
    ),
    "image first": (
        {'heads["txt"], heads["img"]': 'heads["img"], heads["txt"]'},
        "double_blocks.0/attention/q",
    ),
    "no scale of attention": ({" / np.sqrt(q.shape[-1])": ""}, "double_blocks.0/attention/out"),
    "heads not put back": (
        {".swapaxes(1, 2).reshape(1, -1": ".reshape(1, -1"},
        "double_blocks.0.img_mlp/in",
    ),
    "no bias": ({' + w.get(f"{name}.bias", 0)': ""}, "double_blocks.0.img_mod/out.0"),
    "no SiLU of vec": ({"silu(vec)": "vec"}, "double_blocks.0.img_mod/out.0"),
}
OF_ONE = {
    "GELU erf": FLUX1,
    "no bias": FLUX1,
    "gate and value": FLUX2,
}  # the others are of both families


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", [FLUX1, FLUX2])
def test_a_mistake_is_named(name, mistake, kits, monkeypatch, capsys):
    changes, first = MISTAKES[mistake]
    source, own = SOURCE, mistake not in OF_ONE or OF_ONE[mistake] == name
    for right, wrong in changes.items():
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    code, output = run_here(source, (kits[name],), monkeypatch, capsys)
    shared = first.replace("double_blocks.0.img_mod", "double_stream_modulation_img")
    verdict = (
        f"off by more than 2e-06: {first if name == FLUX1 else shared}"
        if own
        else "all agree to 2e-06"
    )
    assert code == own and output.splitlines()[-1].split(", ")[0] == verdict


def run_here(source: str, arguments, monkeypatch, capsys) -> tuple[int, str]:
    """Run a copy of the example in this process, which is quicker."""
    monkeypatch.setattr(sys, "argv", ["consumer.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        exec(
            compile(source, "consumer.py", "exec"),
            {"__name__": "__main__", "__file__": "consumer.py"},
        )
    return stopped.value.code, capsys.readouterr().out


WEIGHTS = {  # a weight, a row of it, and the only tensors in which it shows
    "double_blocks.0.img_attn.qkv.weight": (0, [NORM]),
    "double_blocks.0.txt_attn.qkv.weight": (-1, ["double_blocks.0/attention/v"]),
    "double_blocks.0.txt_attn.norm.key_norm.scale": (3, ["double_blocks.0.txt_attn.norm/out"]),
    "double_blocks.0.img_attn.proj.weight": (
        5,
        ["double_blocks.0.img_mlp/in", "double_blocks.0/out.0"],
    ),
    "double_blocks.0.txt_mlp.0.weight": (2, ["double_blocks.0.txt_mlp.1/out"]),
    "double_blocks.0.img_mlp.2.weight": (7, ["double_blocks.0/out.0"]),
}


@any_kit
def test_a_wrong_weight_shows_where_it_is_used(name, kits, tmp_path, monkeypatch, capsys):
    state, file = (
        load_file(kits[name] / "weights/transformer.safetensors"),
        tmp_path / "wrong.safetensors",
    )
    for factor in (1.01, math.nan):
        for weight, (row, places) in WEIGHTS.items():
            wrong = state[weight].clone()
            wrong[row] *= factor
            save_file(state | {weight: wrong}, file)
            code, output = run_here(SOURCE, (kits[name], file), monkeypatch, capsys)
            off = [tensor for tensor, (is_off, _) in judged(output).items() if is_off]
            assert output.endswith(f"\noff by more than 2e-06: {', '.join(places)}\n")
            assert (code, off) == (1, places), weight


# ---------------------------------------------------------------- the tensors


@any_kit
def test_each_tensor_is_there_under_its_own_name(name, kits):
    """Its bytes are what was computed, by the hash of it; and any reader finds it, in the order of execution."""
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
        assert begin % stored[tensor].itemsize == 0  # so that it can be mapped
    assert sum(file.stat().st_size for file in kits[name].rglob("*.*")) < 64e6


@any_kit
def test_diffusers_gives_the_same(name, kits):
    """The kit's weights and inputs, in diffusers' networks: the velocity and the pixels."""
    spec, t = MODELS[name], load_file(kits[name] / "expected.safetensors")
    state, ae = (
        load_file(kits[name] / f"weights/{part}.safetensors")
        for part in ("transformer", "autoencoder")
    )
    c = spec.transformer
    theirs = reference.loaded(
        reference.diffusers_transformer(c), reference.transformer_to_diffusers(state, c)
    )
    time, guidance = (
        t["schedule"][:1],
        torch.tensor([2.0]) if c.guidance else None,
    )  # as in REQUESTS
    vector = t["text/pooled"] if c.vector_dim else None
    with torch.inference_mode():
        velocity = reference.diffusers_velocity(
            theirs,
            t["step.001/in"],
            t["ids/img"],
            t["text/features"],
            t["ids/txt"],
            time,
            guidance,
            vector,
        )
        vae = reference.loaded(
            reference.diffusers_autoencoder(spec.autoencoder),
            reference.autoencoder_to_diffusers(ae, spec.autoencoder),
        )
        pixels = reference.diffusers_decode(vae, t["step.002/latents"])
    assert reference.relative_l2(velocity, t["step.001/out"]) < 1e-6
    assert reference.relative_l2(pixels, t["pixels"]) < 5e-6  # convolutions in another order


@any_kit
def test_the_equations_of_the_readme(name, kits):
    """Those around the network, in numpy; the block's are the example's."""
    text, t = (kits[name] / "README.md").read_text(encoding="utf-8"), {}
    for tensor, value in load_file(kits[name] / "expected.safetensors").items():
        t[tensor] = value.numpy().astype(np.float64)
    times = np.linspace(1, 0, 3)
    (mu,) = map(float, re.findall(r"with mu = ([\d.]+)\.", text))
    with np.errstate(divide="ignore"):
        times = math.exp(mu) / (math.exp(mu) + 1 / times - 1)
    np.testing.assert_allclose(t["schedule"], times, rtol=1e-7)

    ids = np.concatenate([t["ids/txt"], t["ids/img"]])
    theta, axes = (
        int(re.search(r"position · (\d+)\^", text)[1]),
        re.search(r"channels of a head, ([\d, ]+): ", text)[1].split(", "),
    )
    angle = [
        np.outer(ids[:, a], float(theta) ** (-np.arange(0, int(n), 2) / int(n)))
        for a, n in enumerate(axes)
    ]
    angle = np.concatenate(angle, axis=1)
    rows = (
        np.stack([np.cos(angle), -np.sin(angle)], axis=-1),
        np.stack([np.sin(angle), np.cos(angle)], axis=-1),
    )
    np.testing.assert_allclose(t["rope"], np.stack(rows, axis=-2), atol=1e-7)

    angle = 1000 * t["schedule"][0] * 10000 ** (-np.arange(128) / 128)
    timestep_embedding = np.concatenate([np.cos(angle), np.sin(angle)])[None]
    np.testing.assert_allclose(
        t["step.001/time_in/in"], timestep_embedding, atol=1e-4
    )  # of 1000, float32 keeps 6e-5
    x = t["noise"]
    first = "step.001"
    if f"{first}/negative/out" in t:
        with_prompt, without = t[f"{first}/out"], t[f"{first}/negative/out"]
        scale = 2.5 if name == FLUX1 else 3.0 if name == FLUX2 else MODELS[name].guidance
        np.testing.assert_allclose(
            t[f"{first}/velocity"], without + scale * (with_prompt - without), atol=1e-5
        )
    for step in (1, 2):
        v = t[f"step.{step:03}/velocity"].reshape(1, *x.shape[2:], -1).transpose(0, 3, 1, 2)
        x = x + (t["schedule"][step] - t["schedule"][step - 1]) * v
        np.testing.assert_allclose(t[f"step.{step:03}/latents"], x, atol=1e-6)

    weights = load_file(kits[name] / "weights/autoencoder.safetensors")
    if name == FLUX1:
        scale, shift = map(float, re.search(r"latents / ([\d.]+) \+ ([\d.]+)\.\n", text).groups())
        x = x / scale + shift
    else:
        mean, var = (
            weights[f"bn.running_{what}"].numpy().astype(np.float64)[:, None, None]
            for what in ("mean", "var")
        )
        x = x * np.sqrt(var + 1e-4) + mean
    _, channels, height, width = x.shape
    unpacked = np.empty((1, channels // 4, 2 * height, 2 * width))
    for c, i, j in np.ndindex(channels // 4, 2, 2):
        unpacked[:, c, i::2, j::2] = x[:, 4 * c + 2 * i + j]
    np.testing.assert_allclose(t["decoder/decoder/in"], unpacked, rtol=1e-5, atol=1e-5)
    picture = np.round((t["pixels"][0].clip(-1, 1) + 1) / 2 * 255).transpose(1, 2, 0)
    assert (
        np.abs(picture - t["picture"]).max() <= 1 and (picture != t["picture"]).mean() < 1e-3
    )  # halves, in float32
    np.testing.assert_array_equal(np.array(Image.open(kits[name] / "picture.png")), t["picture"])


@any_kit
def test_the_readme_speaks_of_what_is_there(name, kits):
    text, names = (
        (kits[name] / "README.md").read_text(encoding="utf-8"),
        Capture(kits[name] / "expected.safetensors").names,
    )
    quoted = [
        place
        for place in re.findall(r"`([\w./]+)`", text)
        if "/" in place and not place.endswith("/")
    ]
    assert len(quoted) > 40 and [place for place in quoted if place not in names] == []
    assert not re.search(r"[{}]|None", text) and max(map(len, text.splitlines())) <= 200
    assert {"noise", "schedule", "pixels", "picture"} <= set(names)
    assert ("negative/out" in text) == MODELS[name].cfg or name == FLUX1
    assert ("guidance_in" in text) == ("CLIP" in text) == (name == FLUX1)
    assert "| guidance | 3 |" in text or name != FLUX2
    state = load_file(kits[name] / "weights/transformer.safetensors")
    with torch.device("meta"):
        assert {n: x.shape for n, x in state.items()} == {
            n: x.shape
            for n, x in flux.transformer.Flux(MODELS[name].transformer).state_dict().items()
        }
    assert all(x.dtype == torch.float32 for x in state.values())


def test_the_small_run_of_every_model():
    """Not square, of sizes that are possible, and of few steps; what is asked for stays."""
    for spec in MODELS.values():
        request = kit.small(spec, Request("x"))
        assert request.width != request.height and request.width % 16 == request.height % 16 == 0
        assert min(request.width, request.height) >= 64 and request.steps == 4
    asked = Request("x", width=64, height=64, steps=2)
    assert kit.small(spec, asked) == asked
    pictured = kit.small(spec, Request("x", pictures=ImageInputs((Image.new("RGB", (64, 64)),))))
    assert (pictured.width, pictured.height) == (None, None)  # theirs


# ---------------------------------------------------------------- what is asked for


def test_the_command(parity, tmp_path, monkeypatch):
    """Of the embedded model by default; without its weights and with few layers, the example can still be run."""
    small = (
        "--width",
        80,
        "--height",
        64,
        "--steps",
        1,
        "--only",
        "latents",
        "--without-weights",
        "--output",
        "out/kit",
    )
    code, out, err = parity("kit", *small)
    assert (code, out) == (0, "out/kit\n") and re.fullmatch(
        r"a kit of [\d,]+ tensors, [\d.]+ [KM]B, and 0 bytes of weights\n", err
    )
    folder = tmp_path / "out/kit"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "consumer.py",
        "expected.safetensors",
        "picture.png",
        "tensors.txt",
    ]
    assert (folder / "consumer.py").read_text(encoding="utf-8") == SOURCE
    weights = EMBEDDED / "flux.2-tiny" / "flux-2-tiny.safetensors"
    assert consume(folder / "consumer.py", folder, weights)[0] == 0
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"flux-2-tiny.safetensors, sha256 {digest}" in (folder / "README.md").read_text(
        encoding="utf-8"
    )
    assert Capture(folder / "expected.safetensors").recipe["prompt"] == kit.PROMPT

    for wrong, says in (
        (small, "is there already"),
        (("--output", "b", "--dtype", "bfloat16"), "leave --dtype out"),
        (("--output", "b", "--limit", "0.001"), "--limit is 0.001 GB"),
        (("--output", "b", "--only", "doubel_blocks"), "double_blocks"),
        (("--output", "b", "--model", "nosuch"), "there is no such model"),
        ((), "--output"),
    ):
        code, _, err = parity("kit", *wrong)
        assert code == 2 and says in err.splitlines()[-1], wrong
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", ["flux.1", "flux.2"])
def test_of_random_weights(family, parity, tmp_path):
    """Nothing in them is left at a value that would hide a mistake, and no word of the prompt is lost."""
    code, out, err = parity(
        "kit", "--random", family, "--width", 80, "--height", 64, "--steps", 2, "--output", "kit"
    )
    assert (code, out) == (0, "kit\n") and "cut off" not in err, err
    code, output = consume(tmp_path / "kit/consumer.py")
    assert code == 0 and len(judged(output)) == 26, output
    recipe, text = (
        Capture(tmp_path / "kit/expected.safetensors").recipe,
        {"flux.1": ["clip", "t5"], "flux.2": ["model"]},
    )
    assert (recipe["model"], recipe["steps"]) == (f"{family}-random", 2) and recipe["guidance"][
        0
    ] > 1
    files = {path.stem: load_file(path) for path in (tmp_path / "kit/weights").iterdir()}
    assert sorted(files) == sorted(["transformer", "autoencoder", *text[family]])
    assert all(
        x.std() > 0.01 for state in files.values() for x in state.values() if x.ndim
    )  # a count of batches has none
    assert (
        "guidance_in.in_layer.weight" in files["transformer"] and f"{family}-random" not in MODELS
    )

    for wrong, says in (
        (("--random", family, "--model", "flux.1-dev"), "leave out --model"),
        (("--random", "flux.3"), "invalid choice: 'flux.3'"),
    ):
        code, _, err = parity("kit", *wrong, "--output", "b")
        assert code == 2 and says in err.splitlines()[-1] and not (tmp_path / "b").exists(), wrong


def test_what_cannot_be_made(load, tmp_path, monkeypatch):
    pipe = load(FLUX2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").touch()
    with pytest.raises(UserError, match="is there already, and a kit is never written over"):
        kit.build(pipe, TINY, tmp_path / "full")
    with pytest.raises(UserError, match="made in float32"):
        kit.build(load(FLUX2, torch.bfloat16), TINY, tmp_path / "kit")
    cached = replace(TINY, pictures=ImageInputs((Image.new("RGB", (64, 64)),), kv_cache=True))
    with pytest.raises(UserError, match="give --no-kv-cache"):
        kit.build(pipe, cached, tmp_path / "kit")
    with pytest.raises(UserError, match="KB of tensors|MB of tensors"):
        kit.build(pipe, TINY, tmp_path / "kit", limit=1e5)
    nothing = shutil.disk_usage(tmp_path)._replace(free=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: nothing)
        with pytest.raises(UserError, match="1 MB are free on its disk: make a smaller picture"):
            kit.build(pipe, TINY, tmp_path / "kit")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kit, "listing", full)
        with pytest.raises(UserError, match="the disk is full"):
            kit.build(pipe, TINY, tmp_path / "kit", only=("noise",))
    pipe.transformer().final_layer.linear.weight[0] = math.nan
    with pytest.raises(
        UserError,
        match="no kit can be made of a run that fails: the latents are not finite after step 1",
    ):
        kit.build(pipe, TINY, tmp_path / "kit")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_empty_folder_is_filled(load, tmp_path):
    kit.build(load("flux.2-tiny"), TINY, tmp_path, only=("noise",))
    assert (tmp_path / "weights/transformer.safetensors").exists()
