"""flux.parity capture, its file and comparison, and `parity.py capture` and `compare`.

Expected values come from runs without hooks, from attention written out in float64, from numpy, and
from literals with their source. Networks are tiny and random, or the embedded model's.
"""

import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.parity_requests import REQUESTS, SMALL
from support.tiny_repositories import home, tiny_repositories
from torch import Tensor, nn

import flux
from flux.configs import MODELS
from flux.errors import UserError
from flux.hooks import matches, watching
from flux.image_io.request import ImageInputs
from flux.parity import capture_file as record
from flux.parity.capture import Request, Selection, _file, capture, plan
from flux.parity.capture_file import Capture, Writer, positions
from flux.parity.capture_metadata import Rounding
from flux.parity.compare import about_tolerances, compare, errors, first_over, table, to_json
from flux.parity.reference import FLUX1_TINY, KLEIN_TINY, randomise
from flux.parity.tolerances import store_rounding
from flux.transformer import Flux

PROMPT = "a photo of a cat"
either_family = pytest.mark.parametrize("name", REQUESTS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* was distilled for", "ignore:.* was not trained with"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with tiny_repositories(tmp_path_factory.mktemp("weights"), REQUESTS) as folder:
        yield folder


@pytest.fixture(scope="module")
def load(folder):
    return lambda name, dtype=torch.float32: flux.load(
        name, weights=folder, device="cpu", fast=False, dtype=dtype
    )


@pytest.fixture(scope="module")
def captures(load, tmp_path_factory):
    """One full float32 capture of each family."""
    out = tmp_path_factory.mktemp("captures")
    return {
        name: capture(load(name), request, out / f"{name}.safetensors")
        for name, request in REQUESTS.items()
    }


def make(pipe, request: Request) -> tuple[Image.Image, Tensor]:
    """Return the image and the last latents of a run without a capture."""
    kept, r = [], request
    (image,) = pipe(
        r.prompt,
        width=r.width,
        height=r.height,
        steps=r.steps,
        guidance=r.guidance,
        seed=r.seed,
        negative_prompt=r.negative_prompt,
        true_cfg_scale=r.true_cfg_scale,
        callback=lambda step, t, x: kept.append(x),
        images=r.images,
    )
    return image, kept[-1]


def callable_modules(network: nn.Module) -> set[str]:
    """Return the modules that have a forward, which lists have not."""
    return {
        path
        for path, module in network.named_modules()
        if type(module).forward is not nn.Module.forward
    }


def random_image(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


# ---------------------------------------------------------------- a run, recorded


@either_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_capture_leaves_the_run_equal_to_the_bit(name, dtype, load, tmp_path):
    pipe, request = load(name, dtype), REQUESTS[name]
    image, latents = make(pipe, request)
    taken = capture(pipe, request, tmp_path / "a.safetensors").tensors
    assert taken["step.002/latents"].equal(latents) and taken["image"].equal(
        torch.from_numpy(np.array(image))
    )
    again, once_more = make(pipe, request)
    assert once_more.equal(latents) and again.tobytes() == image.tobytes()
    for network in (pipe.transformer(), pipe.autoencoder(), *(n() for n in pipe.text.networks)):
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in network.modules()
        )
        replaced = {"denoise", "modulations", "vec", "rope", "encode", "decode", "forward"}
        assert not vars(network).keys() & replaced


@either_family
def test_every_module_is_recorded_in_every_pass(name, captures, load):
    pipe, names = load(name), captures[name].names
    where = {"step.001": pipe.transformer(), "step.002/negative": pipe.transformer()}
    where |= {f"text/{part}": getattr(pipe.text, part)() for part in pipe.spec.text.networks}
    where |= {"decoder": pipe.autoencoder()}
    for place, network in where.items():
        taps = (
            re.fullmatch(rf"{re.escape(place)}/(?!negative)(?:([^/]*)/)?(in|out)(\.\d+)?", name)
            for name in names
        )
        seen = {(tap[1] or "", tap[2]) for tap in taps if tap}
        called = {
            path
            for path in callable_modules(network)
            if place != "decoder" or path.startswith("decoder")
        }

        assert (
            {path for path, tap in seen if tap == "in"}
            == called
            == {path for path, tap in seen if tap == "out"}
        )
    steps = (
        "in",
        "vec",
        "out",
        "negative/in",
        "negative/vec",
        "negative/out",
        "velocity",
        "latents",
    )
    others = [
        "text/features",
        "text/negative/features",
        "noise",
        "ids/txt",
        "ids/img",
        "rope",
        "negative/rope",
        "schedule",
    ]
    others += [f"step.{step:03}/{tap}" for step in (1, 2) for tap in steps] + ["pixels", "image"]
    assert [n for n in names if n in others] == [
        "text/features",
        "text/negative/features",
        "noise",
        "ids/txt",
        "ids/img",
        "rope",
        "negative/rope",
        "schedule",
        *(
            f"step.{step:03}/{tap}"
            for step in (1, 2)
            for tap in (
                "vec",
                "in",
                "out",
                "negative/vec",
                "negative/in",
                "negative/out",
                "velocity",
                "latents",
            )
        ),
        "pixels",
        "image",
    ]
    assert ("text/pooled" in names) == (name == "flux.1-dev")


@either_family
def test_attention_inputs_and_output_equal_the_formula(name, captures, load):
    """In float64, from the outputs of the first double block's qkv layers and the ids."""
    t, state = captures[name].tensors, load(name).transformer().state_dict()
    config = load(name).spec.transformer

    def heads(stream: str) -> list[Tensor]:
        qkv = t[f"step.001/double_blocks.0.{stream}.qkv/out"].double()
        return [
            x.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)
        ]  # (1, H, N, d)

    def normed(x: Tensor, stream: str, which: str) -> Tensor:
        scale = state[f"double_blocks.0.{stream}.norm.{which}_norm.scale"].double()
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    ids = torch.cat([t["ids/txt"], t["ids/img"]]).double()
    angles = [
        ids[:, [i]] * config.theta ** (-torch.arange(0, dim, 2) / dim)
        for i, dim in enumerate(config.axes_dim)
    ]
    turn = torch.polar(
        torch.ones(()).double(), torch.cat(angles, dim=-1)
    )  # (N, d/2), complex: pairs are neighbours

    def turned(x):
        return torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn
        ).flatten(-2)

    (tq, tk, tv), (iq, ik, iv) = heads("txt_attn"), heads("img_attn")
    q = turned(torch.cat([normed(tq, "txt_attn", "query"), normed(iq, "img_attn", "query")], dim=2))
    k = turned(torch.cat([normed(tk, "txt_attn", "key"), normed(ik, "img_attn", "key")], dim=2))
    v = torch.cat([tv, iv], dim=2)
    out = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
    for tap, expected in dict(q=q, k=k, v=v, out=out).items():
        assert errors(t[f"step.001/double_blocks.0/attention/{tap}"], expected).relative_l2 < 3e-7
    attentions = [n for n in t if n.startswith("step.001/") and n.endswith("/attention/q")]
    blocks = [f"double_blocks.{i}" for i in range(config.depth)] + [
        f"single_blocks.{i}" for i in range(config.depth_single)
    ]
    assert [n for n in attentions if "negative" not in n] == [
        f"step.001/{block}/attention/q" for block in blocks
    ]


@either_family
def test_plan_names_what_is_recorded(name, captures, load):
    expected = plan(load(name), REQUESTS[name])
    with safe_open(captures[name].path, "pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())
    assert expected.names == captures[name].names and expected.count == len(expected.names)
    assert stored <= expected.bytes < 1.3 * stored


@pytest.mark.parametrize("cached", [False, True], ids=["tokens", "KV cache"])
def test_reference_images_are_recorded(cached, load, tmp_path):
    pipe = load("flux.2-klein-base-4b")
    request = replace(
        SMALL,
        guidance=1.0,
        images=ImageInputs((random_image(), random_image(80, 64)), kv_cache=cached),
    )
    image, latents = make(pipe, request)
    taken = capture(pipe, request, tmp_path / "a.safetensors")
    assert taken.names == plan(pipe, request).names and taken.tensors["step.002/latents"].equal(
        latents
    )
    assert taken.tensors["encoder.2/pixels"].shape == (1, 3, 64, 80)
    assert taken.tensors["conditions/references"].shape == (
        1,
        16 + 20,
        pipe.spec.transformer.in_channels,
    )
    tokens = 24 if cached else 24 + 36
    assert taken.tensors["step.001/in"].shape[1] == tokens
    assert ("references/double_blocks.1/attention/q" in taken.names) == cached
    assert not [n for n in taken.names if "~" in n]


def test_recipe_describes_the_run(captures, load, folder):
    recipe, spec = captures["flux.1-dev"].recipe, MODELS["flux.1-dev"]
    asked = dict(
        model="flux.1-dev",
        mode="text",
        prompt=PROMPT,
        negative_prompt="a dog",
        width=96,
        height=64,
        steps=2,
        seed=5,
    )
    assert asked.items() <= recipe.items() and recipe["versions"]["torch"] == torch.__version__
    assert (recipe["dtype"], recipe["numerics"], recipe["device"]) == ("float32", "exact", "cpu")
    assert (
        recipe["guidance"] == [2.0]
        and recipe["true_cfg_scale"] == 2.5
        and recipe["schedule"][0] == 1
        and len(recipe["schedule"]) == 3
    )
    (file,) = recipe["files"]["transformer"]
    path = home(folder, spec.name) / spec.transformer_file
    assert file == {"file": path.name, "size": path.stat().st_size, "sha256": sha256(path)}


def test_hash_of_a_file_is_of_its_content_and_not_its_name(tmp_path):
    """The Hugging Face cache names files by the hash that they should have."""
    (rotten := tmp_path / ("a" * 64)).write_bytes(b"rotten")
    (link := tmp_path / "x.safetensors").symlink_to(rotten)
    stated = _file(link)
    assert stated == {"file": link.name, "size": 6, "sha256": sha256(rotten)}


def sha256(path: Path) -> str:
    import subprocess

    return subprocess.run(
        ["sha256sum", path], capture_output=True, text=True, check=True
    ).stdout.split()[0]


def test_tensors_before_a_nan_are_kept(load, tmp_path):
    pipe = load("flux.2-klein-base-4b")
    pipe.transformer().final_layer.linear.weight[0, 0] = torch.nan
    taken = capture(pipe, replace(SMALL, guidance=1.0), tmp_path / "a.safetensors")
    assert "after step 1 of 2" in taken.recipe["stopped"] and taken.names[-1] == "step.001/velocity"
    assert taken.records["step.001/velocity"].statistics["nan"] == 24


def test_selection_limits_names_and_steps(load, tmp_path):
    pipe = load("flux.1-dev")
    only = Selection(("double_blocks.1.*", "velocity"), at_steps=(2,))
    names = capture(pipe, REQUESTS["flux.1-dev"], tmp_path / "a.safetensors", only).names
    assert names and all(n.startswith("step.002/") for n in names)
    assert {re.sub(r"^step\.002/(negative/)?", "", n).split("/")[0] for n in names} >= {
        "velocity",
        "double_blocks.1.img_mlp.0",
    }
    assert not [n for n in names if "double_blocks.0" in n or "single" in n]


def test_patterns_match_names_and_parts():
    name = "step.001/double_blocks.3.img_attn.qkv/out.0"
    fit = [
        "*",
        name,
        "double_blocks.3.*",
        "*.img_attn",
        "double_blocks.3",
        "*.qkv",
        "out",
        "out.0",
        "step.001",
        "step.*/*/out*",
    ]
    assert [p for p in fit if not matches(name, [p])] == []
    assert not any(
        matches(name, [p])
        for p in ["in", "double_blocks.33", "img_attn", "step.002", "*.txt_attn", "blocks.3"]
    )
    assert matches(name, ()) and matches("noise", ["noise"])
    assert not any(matches(name, [f"!{p}"]) for p in fit)
    assert matches(name, ["!noise"]) and not matches("noise", ["!noise"])
    assert not matches(name, ["step.001", "!double_blocks.3"]) and matches(name, [fit[0], "!noise"])


@pytest.mark.parametrize("config", [FLUX1_TINY, KLEIN_TINY], ids=["flux.1", "flux.2"])
def test_hooks_are_removed_after_an_error(config):
    model = randomise(Flux(config))

    def fail(name, tensor):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watching({"": model}, fail):
        model.img_in(torch.zeros(1, 2, config.in_channels))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------- the file


def tensors() -> dict[str, Tensor]:
    """Return tensors of every dtype, and of sizes that are not multiples of 8 bytes."""
    g = torch.Generator().manual_seed(0)
    out = {
        f"floats/{i}": torch.randn(3, 5, generator=g).to(dtype)
        for i, dtype in enumerate(record.DTYPES)
    }
    return out | {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 6, generator=g).T,
    }


def test_file_round_trip_keeps_bytes_and_recipe(tmp_path):
    path, recipe = tmp_path / "a.safetensors", {"prompt": "naïve \u2028 \U0001f600", "seed": 2**62}
    with Writer(path, recipe, reserve=0) as writer:
        for name, tensor in tensors().items():
            writer.add(name, tensor)
        recipe["late"] = [1.0]
    read, plain = Capture(path), load_file(path)
    assert (
        read.recipe == recipe and read.names == list(tensors()) and plain.keys() == set(read.names)
    )
    for name, tensor in tensors().items():
        for got in (read.tensors[name], plain[name]):
            assert (
                got.dtype == tensor.dtype
                and got.shape == tensor.shape
                and bytes(record.raw(got)) == bytes(record.raw(tensor))
            )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with path.open("rb") as file:  # every tensor lies where its dtype needs it to
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    assert not [
        k
        for k, v in header.items()
        if k != "__metadata__" and v["data_offsets"][0] % sizes.get(v["dtype"], 1)
    ]


@pytest.mark.parametrize("reserve", [0, 2**16], ids=["header moves the data", "header fits"])
def test_equal_tensors_are_stored_once(reserve, tmp_path):
    x = torch.randn(100, 100)
    with Writer(tmp_path / "a.safetensors", {}, reserve=reserve) as writer:
        for name in ("out", "in", "in"):
            writer.add(name, x)
        x.zero_()  # what was recorded does not change with it
        writer.add("zeros", x)
    read = Capture(tmp_path / "a.safetensors")
    assert read.names == ["out", "in", "in~2", "zeros"] and load_file(read.path).keys() == {
        "out",
        "zeros",
    }
    assert (
        read.tensors["in"].equal(read.tensors["in~2"])
        and read.tensors["in"].any()
        and not read.tensors["zeros"].any()
    )
    assert read.path.stat().st_size < 2 * x.nbytes + 2**16 + 8192


def test_statistics_equal_numpy(tmp_path):
    x = torch.linspace(-1, 3, 6400).reshape(64, 100)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf
    with Writer(tmp_path / "a.safetensors", {}) as writer:
        writer.add("x", x, "statistics")
    read = Capture(tmp_path / "a.safetensors")
    finite = x.numpy()[np.isfinite(x.numpy())].astype(np.float64)
    got = read.records["x"].statistics
    assert (got["nan"], got["inf"], sum(got["histogram"]), len(got["histogram"])) == (
        1,
        2,
        6397,
        32,
    )
    expected = dict(
        min=finite.min(), max=3, mean=finite.mean(), std=finite.std(), l2=np.linalg.norm(finite)
    )
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert got["histogram"] == np.histogram(finite, 32)[0].tolist()
    assert len(read.tensors) == 0 and read.records["x"].shape == (64, 100)


def test_probe_positions_equal_the_published_generators():
    """FNV-1a and splitmix64 in Python's integers, confirmed by their published test vectors."""

    def fnv1a(text: str) -> int:
        h = 14695981039346656037
        for byte in text.encode():
            h = ((h ^ byte) * 1099511628211) & (2**64 - 1)
        return h

    def splitmix64(seed: int, count: int) -> list[int]:
        out = []
        for _ in range(count):
            seed = (seed + 0x9E3779B97F4A7C15) & (2**64 - 1)
            z = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
            z = ((z ^ z >> 27) * 0x94D049BB133111EB) & (2**64 - 1)
            out.append(z ^ z >> 31)
        return out

    assert fnv1a("foobar") == 0x85944171F73967E8  # draft-eastlake-fnv, test vectors
    assert splitmix64(1234567, 2) == [
        6457827717110365317,
        3203168211198807973,
    ]  # Rosetta Code, "splitmix64"
    name = "step.001/double_blocks.0/out.0"
    assert positions(name, 10**7).tolist() == [h % 10**7 for h in splitmix64(fnv1a(name), 4096)]


def test_tolerances_are_stored(tmp_path):
    path = tmp_path / "a.safetensors"
    with Writer(path, {"seed": 1}, reserve=0) as writer:
        for name, tensor in tensors().items():
            writer.add(name, tensor)
    store_rounding(path, {"bfloat16": {"floats/1": Rounding(None, 0.5)}})
    store_rounding(path, {"bfloat16": {"turned": Rounding(0.1, None)}, "float16": {}})
    read = Capture(path)
    assert read.rounding == {"bfloat16": {"floats/1": (None, 0.5), "turned": (0.1, None)}}
    assert read.recipe == {"seed": 1} and all(
        read.tensors[n].equal(x) for n, x in tensors().items() if x.itemsize > 1
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_capture_of_schema_1_is_read_without_what_changed(tmp_path):
    """Made by the code before schema 2: its modulations gave 1 + scale, its blocks took them."""
    names = {
        "conditions/start": False,
        "step.001/vec": False,
        "step.001/double_stream_modulation_img/in": True,
        "step.001/double_stream_modulation_img/out.1": True,
        "step.001/double_stream_modulation_img.lin/out": False,
        "step.001/double_blocks.0.img_mod/out.4": True,
        "step.001/double_blocks.0/in.3": True,
        "step.001/double_blocks.0/out.0": False,
        "step.001/single_blocks.0.modulation/out.1": True,
        "references/double_blocks.0/out": True,
        "text/model/layers.0.self_attn.q_norm/in": True,
        "text/model/layers.0.self_attn.q_proj/in": False,
        "decoder/decoder.up.3.upsample.conv/in": True,
        "picture": False,
    }
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}
    written(path, tensors, cfg_scale=2.5, pictures=None)

    def to_schema_1(document: dict) -> None:
        document["schema"] = 1

    with pytest.warns(UserWarning, match="captured by an older version"):
        record.amend(path, to_schema_1)
    with pytest.warns(UserWarning, match=r"captured by an older version\. 8 tensors"):
        read = Capture(path)
    renamed = {"conditions/start": "conditions/init", "picture": "image"}
    assert read.names == [renamed.get(name, name) for name, lost in names.items() if not lost]
    for name in names:
        if not names[name]:
            assert read.tensors[renamed.get(name, name)].equal(tensors[name])
    assert read.recipe == {"true_cfg_scale": 2.5, "images": None}


# ---------------------------------------------------------------- two tensors


def test_errors_equal_numpy():
    g = torch.Generator().manual_seed(1)
    b = torch.randn(2, 7, 11, generator=g)
    a = b + 1e-3 * torch.randn(2, 7, 11, generator=g)
    a[1, 3, 5] += 0.5
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    e = errors(a, b)
    tokens = np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)
    assert e.relative_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-12)
    assert e.worst_token == pytest.approx(tokens.max(), rel=1e-6) and e.worst_token_at == (1, 3)
    assert e.norm_ratio == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert e.max_abs == pytest.approx(abs(x - y).max(), rel=1e-12) and e.worst_index == (1, 3, 5)
    assert e.pcc == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1], rel=1e-12)
    assert e.cosine == pytest.approx(
        (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12
    )
    assert (e.nonfinite, e.misplaced) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ulp_counts_representable_numbers(dtype):
    """Three steps up from each of 100 numbers, also through zero; and one number far off."""
    b = torch.linspace(-1, 1, 100).to(dtype)
    a = b
    for _ in range(3):
        a = torch.nextafter(a, torch.full_like(a, torch.inf))
    assert errors(a, b).ulp == (3, 3, 3)
    assert errors(torch.zeros(1).to(dtype), -torch.zeros(1).to(dtype)).ulp == (0, 0, 0)
    a[7] = 100
    assert errors(a, b).ulp[:2] == (3, 3) and errors(a, b).ulp[2] > 100
    assert errors(a.double(), b).ulp == errors(a, b).ulp


def test_keyword_attention_and_complex_tensors_are_recorded(tmp_path):
    """diffusers names attention's arguments; some RoPE tables are complex."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query=x, key=2 * x, value=3 * x)

    x, seen = torch.randn(1, 2, 5, 4), {}
    net = nn.Sequential(Attention())
    with watching({"net": net}, seen.__setitem__, only=["attention"]):
        out = net(x)
    assert {n: y.tolist() for n, y in seen.items()} == {
        "net/0/attention/q": x.tolist(),
        "net/0/attention/k": (2 * x).tolist(),
        "net/0/attention/v": (3 * x).tolist(),
        "net/0/attention/out": out.tolist(),
    }
    read = written(tmp_path / "a.safetensors", {"rope": torch.view_as_complex(x.view(1, 5, 4, 2))})
    assert read.tensors["rope"].flatten().equal(x.flatten())


def test_relative_l2_sees_scale_and_offset_unlike_correlation():
    b = torch.randn(1, 64, 32)
    scaled, shifted = errors(1.05 * b, b), errors(b + 0.3, b)
    assert 1 - scaled.pcc < 1e-9 and 1 - shifted.pcc < 1e-9
    assert (
        scaled.norm_ratio == pytest.approx(1.05)
        and scaled.relative_l2 == pytest.approx(0.05)
        and scaled.over(0.02)
    )
    assert shifted.relative_l2 == pytest.approx(0.3 / b.square().mean().sqrt().item(), rel=1e-4)


def test_worst_token_sees_one_bad_token():
    b = torch.randn(1, 4608, 32)
    a = b.clone()
    a[0, 4321] = 0
    e = errors(a, b)
    assert (
        e.relative_l2 < 0.02
        and e.worst_token == pytest.approx(1, rel=1e-6)
        and e.worst_token_at == (0, 4321)
    )
    assert e.over(0.02)  # which the relative L2 alone allows


@pytest.mark.parametrize("dtype", record.DTYPES, ids=str)
def test_every_dtype_is_compared(dtype):
    b = torch.tensor([[0.0, 1, 2], [0, 1, 4]]).to(dtype)
    a = b.clone()
    a[1, 2] = 0
    assert (
        errors(b, b).relative_l2 == 0
        and errors(a, b).worst_index == (1, 2)
        and errors(a, b).over(0.1)
    )


def test_zero_tensors_are_compared():
    z, x = torch.zeros(2, 3), torch.full((2, 3), 0.5)
    assert (
        errors(z, z).relative_l2,
        errors(z, z).norm_ratio,
        errors(z, z).pcc,
        errors(z, z).cosine,
    ) == (0, 1, 1, 1)
    assert errors(x, z).relative_l2 == pytest.approx(1.5**0.5) and errors(x, z).over(1)
    assert errors(x, x).pcc == 1 and not errors(x, x).over(0)
    assert errors(torch.zeros(0), torch.zeros(0)).relative_l2 == 0
    assert errors(torch.tensor(2.0), torch.tensor(1.0)).relative_l2 == 1


def test_nan_and_infinity_must_be_in_the_same_places():
    b = torch.randn(1, 5, 8)
    b[0, 1, 2], b[0, 3, 4], b[0, 3, 5] = torch.nan, torch.inf, -torch.inf
    a = b.clone()
    assert (errors(a, b).nonfinite, errors(a, b).misplaced, errors(a, b).relative_l2) == (3, 0, 0)
    assert not errors(a, b).over(1e-4)
    a[0, 0, 0] += 0.1
    assert errors(a, b).max_abs == pytest.approx(
        0.1, rel=1e-6
    )  # the rest is compared, not masked away
    for place, value in (
        ((0, 1, 2), 0.0),
        ((0, 3, 4), -torch.inf),
        ((0, 3, 5), torch.nan),
        ((0, 4, 4), torch.nan),
    ):
        a = b.clone()
        a[place] = value
        assert errors(a, b).misplaced == 1 and errors(a, b).over(1e9)


# ---------------------------------------------------------------- two captures


def written(path: Path, values: dict[str, Tensor], kind="full", **recipe) -> Capture:
    with Writer(path, recipe) as writer:
        for name, tensor in values.items():
            writer.add(name, tensor, kind)
    return Capture(path)


def noisy(values: dict[str, Tensor], size: float, only: str = "") -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(9)
    return {
        n: x + size * (only in n) * torch.randn(x.shape, generator=g) for n, x in values.items()
    }


@pytest.fixture
def truth():
    g = torch.Generator().manual_seed(8)
    return {
        f"step.001/double_blocks.{i}/out": torch.randn(1, 300, 128, generator=g) for i in range(4)
    }


def test_compare_finds_the_first_difference(truth, tmp_path):
    late = noisy(noisy(truth, 1e-2, "blocks.3"), 1e-1, "blocks.2")
    a, b = written(tmp_path / "a.safetensors", late), written(tmp_path / "b.safetensors", truth)
    rows = compare(a, b)
    assert [row.over for row in rows] == [False, False, True, True] and first_over(
        rows
    ).name == "step.001/double_blocks.2/out"
    assert table(rows).startswith(
        "2 of 4 tensors are over tolerance; the first is step.001/double_blocks.2/out: "
        "relative L2 0.1 "
    )
    assert table(rows).index("double_blocks.0") < table(rows).index("double_blocks.1")
    assert first_over(compare(a, b, tolerance=0.2)) is None and "comes nearest" in table(
        compare(a, b, tolerance=0.2)
    )
    assert (
        first_over(compare(a, b, tolerance={"step.001/double_blocks.2/out": 0.2})).name
        == "step.001/double_blocks.3/out"
    )
    listed = json.loads(to_json(rows))
    assert [row["over"] for row in listed] == [False, False, True, True] and listed[2]["errors"][
        "relative_l2"
    ] > 0.09


@pytest.mark.parametrize(
    "kinds", [("probe", "probe"), ("probe", "full"), ("full", "probe")], ids="-".join
)
@pytest.mark.parametrize("size", [1e-5, 1e-2])
def test_probe_estimates_the_errors(kinds, size, truth, tmp_path):
    far = noisy(truth, size)
    a = written(tmp_path / "a.safetensors", far, kinds[0])
    b = written(tmp_path / "b.safetensors", truth, kinds[1])
    for row, name in zip(compare(a, b), truth, strict=True):
        whole = errors(far[name], truth[name])
        assert row.kind == "probe" and row.errors.relative_l2 == pytest.approx(
            whole.relative_l2, rel=0.05
        )
        assert row.errors.norm_ratio == pytest.approx(whole.norm_ratio, abs=1e-7)
        there = row.errors.worst_index
        assert (far[name][there] - truth[name][there]).abs().item() == row.errors.max_abs > 0
    sizes = {kind: x.path.stat().st_size for kind, x in zip(kinds, (a, b))}
    assert sizes["probe"] < 4 * (4096 + 300) * 4 + 2**17


def test_probe_shows_a_bad_token(truth, tmp_path):
    far = {name: x.clone() for name, x in truth.items()}
    for x, value in zip(far.values(), (0.0, 1e3, torch.nan, torch.inf)):
        x[0, 123] = value
    rows = compare(
        written(tmp_path / "a.safetensors", far, "probe"),
        written(tmp_path / "b.safetensors", truth, "probe"),
    )
    assert all(row.over for row in rows)
    assert [row.errors.worst_token_at for row in rows[:2]] == [(0, 123)] * 2 and all(
        r.errors.misplaced for r in rows[2:]
    )


def test_statistics_and_slices_are_compared(truth, tmp_path):
    scaled = {name: 1.05 * x for name, x in truth.items()}
    b = written(tmp_path / "b.safetensors", truth)
    for kind in ("statistics", "slice"):
        a = written(tmp_path / f"{kind}.safetensors", scaled, kind)
        row = first_over(compare(a, b))
        assert row.kind == kind and row.errors.relative_l2 == pytest.approx(0.05, rel=1e-5)
        assert json.loads(to_json([row]))[0]["kind"] == kind and table([row])
        same = written(tmp_path / f"same-{kind}.safetensors", truth, kind)
        assert all(r.errors.relative_l2 == 0 and not r.over for r in compare(same, b, tolerance=0))
    assert a.tensors["step.001/double_blocks.0/out"].shape == (1, 16, 16)
    both = compare(a, written(tmp_path / "probe.safetensors", truth, "probe"))
    assert both[0].kind == "statistics" and both[0].errors.relative_l2 == pytest.approx(
        0.05, rel=1e-5
    )


def test_plain_file_is_read_as_a_capture(truth, tmp_path):
    save_file(noisy(truth, 1e-2, "blocks.1"), tmp_path / "port.safetensors")
    a, b = (
        Capture(tmp_path / "port.safetensors"),
        written(tmp_path / "b.safetensors", truth, model="flux.1-dev"),
    )
    assert a.recipe == {} and first_over(compare(a, b)).name == "step.001/double_blocks.1/out"
    assert sum(row.over for row in compare(a, b)) == 1


def test_tolerance_follows_the_coarser_dtype(truth, tmp_path):
    """A float32 tensor of a bfloat16 run is not more exact than the run."""
    a = written(tmp_path / "a.safetensors", noisy(truth, 1e-2), dtype="bfloat16")
    b = written(tmp_path / "b.safetensors", truth, dtype="float32")
    assert {row.tolerance for row in compare(a, b)} == {2e-2} and first_over(compare(a, b)) is None
    assert {row.tolerance for row in compare(b, b)} == {1e-4}


def test_measured_tolerances_belong_to_a_precision(truth, tmp_path):
    """What bfloat16 is allowed does not excuse float32; a file says or shows its precision."""
    b = written(tmp_path / "b.safetensors", truth, dtype="float32")
    coarse = {name: Rounding(None, 2e-2) for name in truth}
    store_rounding(b.path, {"bfloat16": coarse, "float16": dict.fromkeys(truth, Rounding(0, 1e-3))})
    b, bad = Capture(b.path), noisy(truth, 3e-3)
    allowed = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 4e-2}
    for dtype, tolerance in allowed.items():
        a = written(tmp_path / f"{dtype}.safetensors", bad, dtype=dtype)
        rows = compare(a, b)
        assert {row.tolerance for row in rows} == {tolerance}
        assert all(row.over for row in rows) == (dtype != "bfloat16")
    save_file(bad, tmp_path / "plain.safetensors")
    plain = Capture(tmp_path / "plain.safetensors")
    assert all(row.over for row in compare(plain, b))
    assert first_over(compare(plain, b, precision="bfloat16")) is None
    one, *others = bad
    # one tensor that a bfloat16 run keeps in float32, and one bfloat16 tensor of a float32 run
    save_file({n: bad[n].bfloat16() for n in others} | {one: bad[one]}, tmp_path / "h.safetensors")
    half = compare(Capture(tmp_path / "h.safetensors"), b)
    assert {row.tolerance for row in half} == {4e-2}
    save_file({n: bad[n] for n in others} | {one: bad[one].bfloat16()}, tmp_path / "f.safetensors")
    mixed = compare(Capture(tmp_path / "f.safetensors"), b)
    assert {row.name: row.tolerance for row in mixed} == dict.fromkeys(others, 1e-4) | {one: 4e-2}


def test_a_missing_measurement_is_said(truth, tmp_path):
    """A correct run in bfloat16 may exceed the flat tolerance: the caution says what to do."""
    b = written(tmp_path / "b.safetensors", truth, dtype="float32")
    a = written(tmp_path / "a.safetensors", noisy(truth, 1e-2), dtype="bfloat16")
    assert "has no measured tolerances of bfloat16" in about_tolerances(compare(a, b), a, b)
    store_rounding(b.path, {"bfloat16": {name: Rounding(0.0, 1e-2) for name in truth}})
    b = Capture(b.path)
    assert about_tolerances(compare(a, b), a, b) == ""


def test_bfloat16_is_near_its_tolerance_and_a_fault_is_found(captures, load, tmp_path):
    """Against bfloat16, and against another activation in one block."""
    name = "flux.2-klein-base-4b"
    half = capture(
        load(name, torch.bfloat16),
        REQUESTS[name],
        tmp_path / "half.safetensors",
        Selection(("double_blocks.0",)),
    )
    assert max(row.ratio for row in compare(half, captures[name])) < 2
    pipe = load(name)
    gelu = torch.nn.functional.gelu
    pipe.transformer().double_blocks[1].img_mlp[1].forward = lambda x: (
        gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    )
    wrong = capture(pipe, REQUESTS[name], tmp_path / "wrong.safetensors", Selection(("out",)))
    assert (
        first_over(compare(wrong, captures[name])).name == "step.001/double_blocks.1.img_mlp.1/out"
    )


# ---------------------------------------------------------------- refusals


def test_captures_of_different_runs_are_refused(truth, tmp_path):
    made = dict(model="flux.1-dev", width=64, height=64, steps=4, prompt="a cat")
    b = written(tmp_path / "b.safetensors", truth, **made)
    for number, (key, other) in enumerate(
        dict(model="flux.2-dev", width=96, steps=8, prompt="a dog").items()
    ):
        a = written(tmp_path / f"{number}.safetensors", truth, **made | {key: other})
        with pytest.raises(UserError, match=rf"{key} is {other!r} and {made[key]!r}"):
            compare(a, b)
    few = written(tmp_path / "c.safetensors", {"x": torch.ones(1)})
    with pytest.raises(UserError, match="has no tensor in common"):
        compare(few, b)
    with pytest.raises(
        UserError, match=r"only: double_block\.0 matches no name\. .* double_blocks\.0"
    ):
        compare(b, b, only=["double_block.0"])
    reshaped = written(tmp_path / "d.safetensors", {n: x.mT for n, x in truth.items()})
    assert (
        first_over(compare(reshaped, b)).fault == "has shape (1, 128, 300) (expected (1, 300, 128))"
    )
    assert "expected (1, 300, 128)" in table(compare(reshaped, b)) and json.loads(
        to_json(compare(reshaped, b))
    )


def test_damaged_files_are_refused(truth, tmp_path):
    whole = written(tmp_path / "a.safetensors", truth).path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"is truncated: .* capture it again"):
        Capture(tmp_path / "cut.safetensors")
    for number, wrong in enumerate(
        ('{"schema": 3}', "{", "[]", '{"schema": 2, "recipe": {}, "tensors": {"x": {"kind": 1}}}')
    ):
        save_file(truth, tmp_path / f"{number}.safetensors", {record.KEY: wrong})
        with pytest.raises(UserError, match="unknown schema|is a damaged capture"):
            Capture(tmp_path / f"{number}.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        Capture(tmp_path / "none.safetensors")


class FullDisk:
    def __init__(self, file):
        self.file, self.left = file, 2

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def close(self):
        self.file.close()


def test_full_disk_leaves_no_file(truth, tmp_path):
    with pytest.raises(
        UserError, match=r"a\.safetensors: cannot be written, the disk is full. Make room"
    ):
        with Writer(tmp_path / "a.safetensors", {}) as writer:
            writer._file = FullDisk(writer._file)
            for name, tensor in truth.items():
                writer.add(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_failed_run_leaves_no_file(load, tmp_path, monkeypatch):
    pipe = load("flux.1-dev")
    monkeypatch.setattr(pipe.text, "encode_one", lambda prompt: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture(pipe, SMALL, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_limit_and_free_space_are_checked(load, tmp_path, monkeypatch):
    pipe, path = load("flux.1-dev"), tmp_path / "a.safetensors"
    with pytest.raises(
        UserError, match=r"would hold up to [\d.]+ MB in [\d,]+ tensors, and `limit` is 0.001 GB"
    ):
        capture(pipe, SMALL, path, Selection(limit=1e6))
    with (
        pytest.raises(UserError, match=r"would be larger than its limit of 1 KB at x. Select"),
        Writer(path, {}, 1000) as writer,
    ):
        writer.add("x", torch.zeros(300))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 10**6))
    with pytest.raises(UserError, match="1 MB are free on its disk"):
        capture(pipe, SMALL, path)
    assert list(tmp_path.iterdir()) == []
    reports = []
    capture(pipe, SMALL, path, Selection(only=("noise",)), reports.append)
    assert reports and reports[0].startswith("recording 1 of ")


@pytest.mark.parametrize(
    "only, near", [("double_block.0.*", "double_blocks.0"), ("velocty", "velocity"), ("QKV", "qkv")]
)
def test_unmatched_pattern_suggests_near_names(only, near, load, tmp_path):
    with pytest.raises(
        UserError,
        match=rf"only: {re.escape(only)} matches no name. The nearest .*{re.escape(near)}",
    ):
        capture(load("flux.1-dev"), SMALL, tmp_path / "a.safetensors", Selection((only,)))


@pytest.mark.slow
def test_wrong_requests_are_refused(load, tmp_path):
    pipe, path = load("flux.1-dev"), tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"steps: there are 2 steps, counted from 1 \(got 3\)"):
        capture(pipe, SMALL, path, Selection(at_steps=(1, 3)))
    with pytest.raises(UserError, match="width: must be a multiple of 16"):
        capture(pipe, replace(SMALL, width=100), path)
    with pytest.raises(UserError, match="must be a .safetensors file"):
        capture(pipe, SMALL, tmp_path / "a.pt")
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="the file exists"):
        capture(pipe, SMALL, path)
    assert path.read_bytes() == b"precious"


# ---------------------------------------------------------------- the command


QUICK = (
    "a small red circle",
    "--width",
    64,
    "--height",
    64,
    "--steps",
    2,
    "--only",
    "step.002",
    "--only",
    "latents",
)


@pytest.mark.slow
def test_command_captures_and_compares(parity, tmp_path):
    code, out, err = parity("capture", *QUICK, "--output", "a.safetensors")
    assert (code, out) == (0, "a.safetensors\n") and re.match(
        r"recording [\d,]+ of [\d,]+ tensors, up to [\d.]+ MB\n", err
    )
    assert Capture("a.safetensors").recipe["seed"] == 0
    assert parity("capture", *QUICK, "--keep", "probe", "--output", "b.safetensors")[0] == 0
    code, out, _ = parity("compare", "b.safetensors", "a.safetensors", "--budget", 0)
    assert code == 0 and out.startswith("all ") and "step.001/latents" in out
    assert (
        parity(
            "capture",
            *QUICK,
            "--dtype",
            "bfloat16",
            "--numerics",
            "bfl",
            "--output",
            "c.safetensors",
        )[0]
        == 0
    )
    code, out, _ = parity(
        "compare", "c.safetensors", "a.safetensors", "--budget", 1e-6, "--json", "rows.json"
    )
    assert (
        code == 1
        and "tensors are over tolerance; the first is step.001/latents:" in out.splitlines()[0]
    )
    rows = json.loads(Path("rows.json").read_text())
    assert (
        rows[0]["name"] == "step.001/latents"
        and rows[0]["over"]
        and rows[0]["errors"]["relative_l2"] > 1e-6
    )


def test_command_refuses_wrong_arguments(parity, tmp_path):
    def say(code, *words):
        return lambda got: (
            (got[0], [w for w in words if w not in got[2].splitlines()[-1]]) == (code, [])
        )

    assert say(2, "nosuch", "there is no such model")(
        parity("capture", "x", "--model", "nosuch", "--output", "a.safetensors")
    )
    assert say(2, "is missing")(parity("capture", "--output", "a.safetensors"))
    assert say(2, "one capture has one prompt (got 2)")(
        parity("capture", "x", "y", "--output", "a.safetensors")
    )
    assert say(2, "'1,x'")(parity("capture", "x", "--steps-of", "1,x", "--output", "a.safetensors"))
    assert say(2, "--output")(parity("capture", "x"))
    assert say(2, "does not exist")(parity("compare", "a.safetensors", "b.safetensors"))
    assert list(tmp_path.iterdir()) == []
