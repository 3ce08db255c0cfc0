"""Golden kits of FLUX 3: random models, the example port, and every command on them.

diffusers gives the kits' tensors, with the kits' own weights and inputs.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.kit_commands import require_commands_work

from flux.configs import MODELS
from flux.parity import example_port, golden_kit, reference
from flux.parity.capture_file import Capture
from flux.parity.reference3 import (
    diffusers_transformer3,
    diffusers_velocity3,
    transformer3_to_diffusers,
)
from flux.transformer3 import Flux3
from flux.weights.load import infer_config

FAMILIES = ("flux.3", "flux.3-base")
BLOCK = "content_mode_blocks.image.0"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* was distilled for")]
any_kit = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def kits(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kits")


@pytest.fixture
def kit(family, kits, parity, tmp_path) -> Path:
    """A copy of the family's kit, which is made once."""
    made = kits / family
    if not made.exists():
        size = ("--width", 80, "--height", 64, "--steps", 2)
        code, out, err = parity("golden-kit", "--random", family, *size, "--output", made)
        assert (code, out) == (0, f"{made}\n") and "cut off" not in err, err
        assert f"{family}-random" not in MODELS
    return Path(shutil.copytree(made, tmp_path / "kit"))


def run_example(kit: Path, monkeypatch, capsys, source: str = "") -> tuple[int, str]:
    """Run the example, or a changed copy of it."""
    text = source or Path(kit / "example_port.py").read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["example_port.py", str(kit)])
    scope = {"__name__": "__main__", "__file__": "example_port.py"}
    with pytest.raises(SystemExit) as stopped:
        exec(compile(text, "example_port.py", "exec"), scope)
    return int(stopped.value.code), capsys.readouterr().out


MISTAKES = {  # a piece of the example, a wrong one, and the first tensor that is wrong
    "gate and value swapped": ("gate, up = np", "up, gate = np", f"{BLOCK}.mlp_out/in"),
    "shift and scale swapped": (
        "shift, scale, gate = (check",
        "scale, shift, gate = (check",
        f"{BLOCK}.q_proj/in",
    ),
    "gate left out": ("x + gate * (attended", "x + (attended", f"{BLOCK}/out"),
    "RoPE left out": ("apply_rope(k, rope))\n    v", "k)\n    v", f"{BLOCK}/attention/k"),
}


@any_kit
def test_kit_agrees_with_its_example_and_diffusers(family, kit, monkeypatch, capsys):
    """Float32 has a unit of 6e-8. Errors of sums were up to 3e-7."""
    code, output = run_example(kit, monkeypatch, capsys)
    assert code == 0 and output.endswith("\nall tensors agree to 2e-06\n"), output
    assert output.count("ok   ") == 13
    source = Path(example_port.__file__).read_text(encoding="utf-8")
    for right, wrong, first in MISTAKES.values():
        assert right in source
        code, output = run_example(kit, monkeypatch, capsys, source.replace(right, wrong))
        assert code == 1 and output.splitlines()[-1].startswith(f"wrong: {first}"), output

    t = load_file(kit / "expected.safetensors")
    file = kit / "weights/transformer.safetensors"
    config, state = infer_config(file), load_file(file)
    assert config.flow_map == (family == "flux.3")
    theirs = reference.loaded(diffusers_transformer3(config), transformer3_to_diffusers(state))
    with torch.inference_mode():
        velocity = diffusers_velocity3(
            theirs,
            t["step.001/in"],
            t["ids/img"],
            t["text/features"],
            t["ids/txt"],
            t["schedule"][:1],
            target=t["schedule"][1:2] if config.flow_map else None,
        )
    assert reference.relative_l2(velocity, t["step.001/out"]) < 1e-6
    assert not any(x.ndim and x.std() < 0.01 for x in state.values())
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in Flux3(config).state_dict().items()}
    assert {name: x.shape for name, x in state.items()} == shapes

    # README.md: its tensors exist, its schedule and positions give the kit's
    text = (kit / "README.md").read_text(encoding="utf-8")
    names = Capture(kit / "expected.safetensors").names
    quoted = [place for place in re.findall(r"`([\w./]+)`", text) if "/" in place]
    quoted = [place for place in quoted if not place.endswith("/")]
    assert len(quoted) > 40 and [place for place in quoted if place not in names] == []
    assert not re.search(r"[{}]|None", text) and max(map(len, text.splitlines())) <= 200
    assert ("ref_time_in" in text) == config.flow_map == ("negative/out" not in text)
    u = np.linspace(1, 0, 3)
    np.testing.assert_allclose(t["schedule"], 6.93 * u / (1 + 5.93 * u), rtol=1e-6, atol=1e-9)
    rows, columns = np.indices((4, 5)) / 2
    np.testing.assert_array_equal(
        t["ids/img"][:, 1:3], np.stack([rows, columns], -1).reshape(-1, 2)
    )


@any_kit
def test_every_command_works_on_a_random_kit(family, kit, parity, tmp_path):
    expected, block = "kit/expected.safetensors", "step.001/single_blocks.1"
    only = ("--filter", "single_blocks.1")
    require_commands_work(parity, expected, only)
    code, out, _ = parity("calibrate", expected, "--precision", "bfloat16", *only)
    rounding = Capture(tmp_path / expected).rounding["bfloat16"]
    assert code == 0 and rounding[f"{block}/out"].local > 0

    # references, or the text, at time t instead of 0
    tensors, name = load_file(kit / "expected.safetensors"), "early_stream_modulations.txt/in"
    vec = tensors["step.001/vec"]
    wrong = {f"step.001/{name}": torch.nn.functional.silu(vec)}
    save_file(tensors | wrong, tmp_path / "port.safetensors")
    code, out, _ = parity("diagnose", "port.safetensors", expected)
    assert code == 1 and "cause: time of another mode" in out, out
    code, _, err = parity("compare", expected, "--against", "bfl", "--bfl-path", ".")
    assert code == 2 and "--against: Black Forest Labs' code of FLUX 3 was not at hand" in err


def test_small_request_of_flux3_is_valid():
    for name in ("flux.3-image-klein", "flux.3-image-klein-base"):
        request = golden_kit.small_request(MODELS[name], golden_kit.Request("x"))
        assert (request.width, request.height, request.steps) == (768, 512, 4)
