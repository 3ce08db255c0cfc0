"""`quantize_`: which layers are rounded, how far, to what, and how much memory that takes."""

import copy
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks import lossy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.quantized_files import NF4_VALUES, e4m3_value
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flux.configs import MODELS, QWEN3_4B
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.lora.formats import match_layers, read_lora
from flux.lora.merge import merge
from flux.parity.reference import FLUX1_TINY, KLEIN_TINY, TINY_QWEN, TINY_T5, randomise, relative_l2
from flux.t5 import T5
from flux.transformer import Flux
from flux.weights.quantization import quantize as lib
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.quantize import SCHEMES, dequantized, quantize_, quantize_linear

FEW = settings(max_examples=20, deadline=None)
FINITE = [byte for byte in range(256) if byte & 127 != 127]  # of the float8 numbers
GRIDS = {  # every number that a scale can be multiplied by
    "fp8": np.array(sorted({e4m3_value(byte) for byte in FINITE})),
    "int8": np.arange(-127.0, 128.0),
    "int4": np.arange(-8.0, 8.0),
}
BYTES = {"fp8": 1.0, "int8": 1.0, "int4": 0.5625}  # a weight
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    state = {"weight": weight} | ({} if bias is None else {"bias": bias})
    layer.requires_grad_(False).load_state_dict(state, strict=True, assign=True)
    return layer.eval()


def scales(layer: QuantizedLinear) -> Tensor:
    """That of every weight: (out, in)."""
    repeats = -(-layer.in_features // layer.weight_scale.shape[1])
    return layer.weight_scale.float().repeat_interleave(repeats, dim=1)[:, : layer.in_features]


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    return {
        path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLinear)
    }


# ---------------------------------------------------------------- rounding


@every_scheme
@FEW
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 32) | st.sampled_from([64, 96]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-4, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_weight_is_rounded_to_the_nearest_number_of_its_scale(
    scheme, rows, columns, dtype, size, seed
):
    """Search all numbers of the scheme in float64."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, columns, generator=generator).exp() * size
    weight = (
        (spread * torch.randn(rows, columns, generator=generator)).clamp(-60000, 60000).to(dtype)
    )
    weight[torch.rand(rows, generator=generator) < 0.1] = 0  # whole rows
    layer = quantize_linear(linear(weight), scheme)
    exact, scale, made = (
        weight.double().numpy(),
        scales(layer).double().numpy(),
        layer.dequantize().double().numpy(),
    )
    possible = GRIDS[scheme][:, None, None] * scale  # (numbers, rows, columns)
    least = np.abs(possible - exact).min(axis=0)
    assert layer.dequantize().dtype == torch.float32 and made.shape == exact.shape
    assert (
        np.abs(made - exact) <= least + 4e-7 * np.abs(exact) + 1e-30
    ).all()  # a rounding or two in float32


@every_scheme
def test_error_is_within_the_bounds_of_the_scheme(scheme):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    layer = quantize_linear(linear(weight), scheme)
    error, scale = (layer.dequantize() - weight).abs(), scales(layer).abs()
    if (
        scheme == "fp8"
    ):  # three bits of mantissa, and below the smallest normal number steps of 2^-9
        assert (error <= 1.000001 * torch.maximum(weight.abs() / 16, scale * 2**-10)).all()
        assert (scale * 448 - weight.abs().amax(dim=1, keepdim=True)).abs().max() < 1e-6
    elif scheme == "int8":
        assert (error <= 1.000001 * scale / 2).all()
        assert (scale * 127 - weight.abs().amax(dim=1, keepdim=True)).abs().max() < 1e-6
    else:
        # Half a scale, except what would be 8 and becomes 7; the scale itself has 8 bits.
        cut = weight / scales(layer) > 7.5
        assert (error[~cut] <= 1.000001 * scale[~cut] / 2).all() and (
            error <= (1 + 8 * 2**-8) * scale
        ).all()
        assert 0 < cut.sum() < 0.02 * cut.numel()


@pytest.mark.parametrize("scheme, expected", [("fp8", 0.0265), ("int8", 0.0084), ("int4", 0.0860)])
def test_error_on_normal_weights_equals_a_simulation(scheme, expected):
    """Simulated in numpy. int8: the largest of 3072 is 3.7, and 3.7/127/sqrt(12) is 0.0084."""
    weight = torch.randn(512, 3072, generator=torch.Generator().manual_seed(2))
    assert relative_l2(
        quantize_linear(linear(weight), scheme).dequantize(), weight
    ) == pytest.approx(expected, rel=0.02)


@every_scheme
def test_numbers_of_the_scheme_are_kept_exactly(scheme):
    """Every number of the scheme, times scales of 8 bits."""
    generator, grid = torch.Generator().manual_seed(3), torch.from_numpy(GRIDS[scheme]).float()
    width = -(-len(grid) // 32) * 32
    codes = torch.stack([grid[torch.randperm(len(grid), generator=generator)] for _ in range(50)])
    codes = torch.cat([codes, torch.zeros(50, width - len(grid))], dim=1)
    if scheme == "int4":
        codes[:, 16:] = codes[:, :16]
    scale = torch.randn(50, 1, generator=generator).bfloat16().float()
    scale = scale if scheme == "int4" else scale.abs()
    weight = codes * scale
    bias = torch.randn(50, generator=generator).bfloat16()
    layer = quantize_linear(linear(weight, bias), scheme)
    assert torch.equal(layer.dequantize(), weight)
    assert torch.equal(layer.weight_scale.float(), scale)
    assert torch.equal(layer.bias, bias) and layer.bias.dtype == torch.bfloat16
    again = quantize_linear(dequantized(layer, torch.float32), scheme)
    assert all(
        torch.equal(a.float(), b.float())
        for a, b in zip(layer.buffers(), again.buffers(), strict=True)
    )


def test_int4_packs_two_numbers_a_byte_high_half_first():
    with torch.device("meta"):
        layer = lib.Int4Linear(256 * 2, 3, bias=False)
    packed = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    scale = torch.randn(3, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    layer.load_state_dict({"weight": packed, "weight_scale": scale}, strict=True, assign=True)
    by_hand = [
        [
            ((b >> 4 if half == 0 else b & 15) - 8) * scale[row, b // 16].item()
            for b in range(256)
            for half in (0, 1)
        ]
        for row in range(3)
    ]
    assert torch.equal(layer.dequantize(), torch.tensor(by_hand))


def test_fp8_equals_diffusers():
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(5))
    theirs, scale = utils.quantize_fp8r(weight)
    ours = quantize_linear(linear(weight), "fp8")
    assert torch.equal(ours.weight.view(torch.uint8), theirs.view(torch.uint8)) and torch.equal(
        ours.weight_scale[:, 0], scale
    )


def test_int4_equals_gguf_q4_0():
    """The scale, float16 in GGUF, is one that bfloat16 can hold too."""
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(6)).clamp(-3.9, 3.9)
    weight[:, ::32] = weight[:, ::32].sign() * 4  # the largest of each group; its scale is 1/2
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
    theirs = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(
        quantize_linear(linear(weight), "int4").dequantize(), torch.from_numpy(theirs)
    )


# ---------------------------------------------------------------- networks

# Black Forest Labs' FP8 files
BLOCKS = (
    r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12]"
)


@pytest.mark.parametrize(
    "name, scheme, count",
    [
        ("flux.1-dev", "fp8", 228),
        ("flux.2-dev", "int8", 160),
        ("flux.2-klein-4b", "int4", 80),
        ("flux.2-klein-9b", "fp8", 112),
    ],
)
def test_layers_of_black_forest_labs_fp8_files_are_quantized(name, scheme, count):
    with torch.device("meta"):
        model = Flux(MODELS[name].transformer)
    numbers = {
        path: layer.weight.numel()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    quantize_(model, scheme)
    found = quantized_layers(model)
    assert found.keys() == {path for path in numbers if re.fullmatch(BLOCKS, path)}
    assert len(found) == count
    weights = sum(tensor.nbytes for layer in found.values() for tensor in layer.buffers())
    bytes_a_weight = weights / sum(numbers[path] for path in found)
    assert bytes_a_weight == pytest.approx(BYTES[scheme], rel=0.002)  # scales of rows
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_all_linears_of_text_encoders_are_quantized():
    with torch.device("meta"):
        qwen, t5 = LanguageModel(QWEN3_4B), T5(MODELS["flux.1-dev"].text.t5)
    for model, count, scheme in ((qwen, 27 * 7, "fp8"), (t5, 24 * 7, "int4")):
        quantize_(model, scheme)
        assert len(quantized_layers(model)) == count
        assert not any(isinstance(layer, nn.Linear) for layer in model.modules())


@pytest.mark.parametrize("scheme, error", [("fp8", 0.0265), ("int8", 0.0084), ("int4", 0.086)])
@pytest.mark.parametrize("config", [FLUX1_TINY, KLEIN_TINY], ids=["flux1", "flux2"])
def test_velocity_error_is_near_the_weight_error(config, scheme, error):
    """The ratio is 0.4 to 1.4 over four seeds."""
    model = randomise(Flux(config))
    g = torch.Generator().manual_seed(8)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    axes = len(config.axes_dim)

    def ids(n):
        return torch.arange(n)[:, None].expand(n, axes).float()

    inputs = [
        draw(2, 12, config.in_channels),
        ids(12),
        draw(2, 6, config.context_dim),
        ids(6),
        torch.tensor([0.3, 0.8]),
    ]
    inputs += [
        torch.tensor([2.0, 4.0]) if config.guidance else None,
        draw(2, config.vector_dim) if config.vector_dim else None,
    ]
    with torch.inference_mode():
        right = model(*inputs)
        quantize_(model, scheme)
        assert len(quantized_layers(model)) == 2 * 8 + 3 * 2
        assert error / 4 < relative_l2(model(*inputs), right) < 1.6 * error


def test_quantized_text_encoders_have_small_errors(monkeypatch):
    monkeypatch.setattr(lib, "SMALL", 1)
    ids = torch.randint(0, 200, (1, 9), generator=torch.Generator().manual_seed(9))
    mask = torch.ones(1, 9, dtype=torch.bool)
    for model, more in (
        (randomise(LanguageModel(TINY_QWEN)), [mask]),
        (randomise(T5(TINY_T5)), []),
    ):
        with torch.inference_mode():
            right = model(ids, *more)
            quantize_(model, "int8")
            assert quantized_layers(model) and 0 < relative_l2(model(ids, *more), right) < 0.03


def test_skipped_and_small_layers_stay():
    model = randomise(Flux(KLEIN_TINY))
    quantize_(model, "int8", skip=frozenset({"double_blocks", "final_layer", "linear2"}))
    found = {re.sub(r"\d+", "N", path) for path in quantized_layers(model)}
    assert found == {  # and not img_in (2048 numbers), txt_in (5120), norms
        "time_in.in_layer",
        "time_in.out_layer",
        "single_blocks.N.linearN",
        "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.lin",
        "single_stream_modulation.lin",
    }
    assert "single_blocks.0.linear2" not in quantized_layers(model)


@every_scheme
def test_meta_device_gives_the_same_shapes_and_dtypes(scheme):
    real = randomise(Flux(FLUX1_TINY)).bfloat16()
    meta = Flux(FLUX1_TINY).bfloat16().to("meta")
    quantize_(real, scheme)
    quantize_(meta, scheme)
    shapes = [
        {name: (x.shape, x.dtype) for name, x in model.state_dict().items()}
        for model in (real, meta)
    ]
    assert shapes[0] == shapes[1] and all(x.is_meta for x in meta.state_dict().values())


@every_scheme
def test_only_quantized_layers_go_to_the_device(scheme):
    model = randomise(Flux(FLUX1_TINY))
    quantize_(model, scheme, device="meta")
    on_meta = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    assert on_meta == {
        f"{path}.{name}"
        for path in quantized_layers(model)
        for name in ("weight", "weight_scale", "bias")
    }
    assert all(tensor.is_meta for tensor in model.to("meta").state_dict().values())


# ---------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensors that were created inside this context."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() not in self.known and storage.nbytes():
            self.known.add(storage.data_ptr())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage.data_ptr(), storage.nbytes())

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


@every_scheme
def test_layers_are_quantized_one_by_one(scheme, monkeypatch):
    """Peak memory is the network before, one quantized layer, and float32 copies of some rows."""
    monkeypatch.setattr(lib, "ROWS", 64)
    config = replace(KLEIN_TINY, depth_single=12)
    live = LiveBytes()
    with live:
        model = Flux(config).bfloat16().requires_grad_(False)
        before, live.peak = live.now, live.now
        # what Linears keep alive elsewhere would be seen here: nothing
        assert before == sum(p.nbytes for p in model.parameters())
        quantize_(model, scheme)
        after = live.now
    largest = max(
        layer.in_features * layer.out_features for layer in quantized_layers(model).values()
    )
    assert after == sum(tensor.nbytes for tensor in model.state_dict().values()) < 0.75 * before
    assert (
        live.peak - before < 2.5 * largest + 64 * 512 * 40
    )  # the new one, in pieces and in one, and 64 rows of it in float32
    assert largest < before / 15


# ---------------------------------------------------------------- use


@every_scheme
def test_merged_layers_are_quantized_one_by_one(scheme, tmp_path, monkeypatch):
    """Peak memory holds no merged layer in bfloat16; the result equals merging, then quantizing."""
    monkeypatch.setattr(lib, "ROWS", 64)
    config = replace(KLEIN_TINY, depth_single=12)
    model, tensors = randomise(Flux(config)).bfloat16().requires_grad_(False), {}
    mapped, in_turn = copy.deepcopy(model), copy.deepcopy(model)
    g = torch.Generator().manual_seed(10)
    for path in lib.large_linears(model):
        rows, columns = model.get_submodule(path).weight.shape
        tensors |= {f"{path}.lora_A.weight": torch.randn(4, columns, generator=g)}
        tensors |= {f"{path}.lora_B.weight": torch.randn(rows, 4, generator=g) / 10}
    save_file(tensors, tmp_path / "x.safetensors")
    patches = [
        (patch, 0.5)
        for patch in match_layers(read_lora(tmp_path / "x.safetensors"), {"transformer": model})
    ]
    merge(in_turn, patches)
    quantize_(in_turn, scheme)
    live = LiveBytes()
    with live:
        quantize_(model, scheme, transform=lambda module, each: merge(module, patches, each))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), in_turn.state_dict().values(), strict=True)
    )
    held = sum(buffer.nbytes for buffer in model.buffers())
    largest = max(
        layer.in_features * layer.out_features for layer in quantized_layers(model).values()
    )
    assert held < live.peak < held + 14 * largest < sum(p.nbytes for p in mapped.parameters())


@every_scheme
def test_lora_merges_into_dequantized_weights(scheme, tmp_path):
    """Quantize, dequantize, merge, quantize again."""
    model, path = randomise(Flux(KLEIN_TINY)), "double_blocks.1.img_attn.proj"
    g = torch.Generator().manual_seed(10)
    down, up = torch.randn(4, 128, generator=g), torch.randn(128, 4, generator=g)
    file = tmp_path / "lora.safetensors"
    save_file(
        {
            f"diffusion_model.{path}.lora_A.weight": down,
            f"diffusion_model.{path}.lora_B.weight": up,
        },
        file,
    )
    patches = [(patch, 0.5) for patch in match_layers(read_lora(file), {"transformer": model})]
    quantize_(model, scheme)
    rounded = model.get_submodule(path).dequantize()
    model.set_submodule(path, dequantized(model.get_submodule(path), torch.float32))
    merge(model, patches)
    expected = rounded.double() + 0.5 * (up.double() @ down.double())
    assert relative_l2(model.get_submodule(path).weight, expected) < 2e-7
    model.set_submodule(path, quantize_linear(model.get_submodule(path), scheme))
    assert relative_l2(model.get_submodule(path).dequantize(), expected.float()) < 0.11


@every_scheme
def test_quantized_mlp_compiles_without_a_graph_break(scheme):
    torch._dynamo.reset()
    model = randomise(Flux(FLUX1_TINY)).bfloat16()
    quantize_(model, scheme)
    mlp = model.double_blocks[0].img_mlp
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(11)).bfloat16()
    with torch.inference_mode():
        assert torch.equal(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))
        weight, bias = mlp[0].dequantize().bfloat16(), mlp[0].bias
        assert torch.equal(mlp[0](x), nn.functional.linear(x, weight, bias))  # rounded once
    assert not any(p.requires_grad for p in model.parameters()) and not mlp[0].training


def test_unknown_scheme_and_quantized_module_are_refused():
    model = randomise(Flux(KLEIN_TINY))
    with pytest.raises(
        UserError, match=r"quantize: unknown scheme \(got nf4\). Choose from fp8, int8, int4"
    ):
        quantize_(model, "nf4")
    assert not quantized_layers(model)
    quantize_(model, "fp8")
    with pytest.raises(UserError, match=r'already \(FP8Linear\). Leave `quantize="int8"` out'):
        quantize_(model, "int8")


# ---------------------------------------------------------------- losses


def test_lossy_nvfp4_equals_diffusers():
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(12))
    assert (
        relative_l2(lossy.nvfp4(weight), utils.dequantize_nvfp4(*utils.quantize_nvfp4(weight)))
        < 1e-6
    )


def test_lossy_nf4_rounds_to_the_nearest_value():
    assert (lossy.nf4_values() - torch.tensor(NF4_VALUES)).abs().max() < 1e-6
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(13)).double()
    largest = weight.view(16, 64).abs().amax(dim=1).repeat_interleave(64).view(8, 128)
    possible = torch.tensor(NF4_VALUES).double()[:, None, None] * largest
    least = (possible - weight).abs().amin(dim=0)
    assert ((lossy.nf4(weight.float()) - weight).abs() - least).abs().max() < 1e-5


def test_lossy_fp8_rounds_to_the_nearest_value():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(14))
    made, grid = lossy.fp8_blocks(weight), torch.from_numpy(GRIDS["fp8"])
    for row in (0, 128):
        for column in (0, 128, 256):
            block = weight[row : row + 128, column : column + 128]
            assert torch.equal(lossy.fp8(block), made[row : row + 128, column : column + 128])
    scale = weight.abs().max().double() / 448
    least = (grid[:, None, None] * scale - weight[:20].double()).abs().amin(dim=0)
    assert ((lossy.fp8(weight)[:20] - weight[:20].double()).abs() - least).abs().max() < 1e-6


@pytest.mark.slow
def test_losses_are_in_the_order_of_the_bits(monkeypatch):
    """Quantizing and rounding give the same; `quantize_` chooses the layers in both."""
    wanted = {"float32", "--quantize int8", "--quantize int4", "NVFP4"}
    chosen = [mode for mode in lossy.modes() if mode.name in wanted]

    def rounded(w):
        return quantize_linear(linear(w), "int4").dequantize()

    monkeypatch.setattr(
        lossy, "modes", lambda: [*chosen, lossy.Mode("again", 0.5625, lossy.rounding(rounded))]
    )
    config = replace(KLEIN_TINY, hidden_size=256, num_heads=4, axes_dim=(16, 16, 16, 16))
    rows = {row.mode: row for row in lossy.losses(3, config)}
    assert rows["float32"][2:] == (0, float("inf"), 1, 0)
    assert rows["again"][2:] == pytest.approx(rows["--quantize int4"][2:], rel=1e-4)
    for measure in ("velocity", "block"):
        right, int8, int4 = (
            getattr(rows[name], measure)
            for name in ("float32", "--quantize int8", "--quantize int4")
        )
        assert right < 5 * int8 < int4 < 0.12
    assert rows["--quantize int8"].psnr > rows["--quantize int4"].psnr + 5
    assert rows["NVFP4"].velocity == pytest.approx(rows["--quantize int4"].velocity, rel=0.5)


@pytest.mark.slow
def test_lossy_modes_change_only_the_large_layers():
    for mode in lossy.modes():
        model, before = randomise(Flux(KLEIN_TINY)), randomise(Flux(KLEIN_TINY)).state_dict()
        large = {f"{path}.weight" for path in lib.large_linears(model)}
        mode.change(model)
        changed = {
            n
            for n, x in model.state_dict().items()
            if n not in before or not torch.equal(x.float(), before[n])
        }
        assert {name for name in changed if not name.endswith("weight_scale")} == (
            large if mode.name != "float32" else set()
        )
