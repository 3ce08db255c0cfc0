"""Count the bytes of activations that each stage takes next to its weights.

The counts come from a forward pass of the networks themselves, on the CPU, with the branches of the
device and its fused kernels. Activations grow in
proportion to the width of a network and to the number of tokens or pixels. So a narrow copy with
one block of each type runs on a small input, and its peak is scaled up. (The meta device would
need no copy, but its kernels import torch's compiler, which takes seconds.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux.autoencoder import AutoEncoder, AutoEncoderConfig
from flux.configs import FLUX1Text, FLUX2Text, ModelSpec
from flux.language_model import LanguageModel
from flux.runtime import fast
from flux.runtime.fast3 import fast_transformer3
from flux.t5 import T5
from flux.transformer import Flux, FluxConfig
from flux.transformer3 import Flux3, Flux3Config, Stream
from flux.weights.load import skip_init

ALLOCATOR = 1.1  # allocators round up, by less than a tenth
# A convolution's workspace is not counted. On a GPU the library chooses a way that needs little, of
# the memory that plans reserve. The plain decoder of diffusers takes 1.6 times its count on a GPU.
FAST_CONVOLUTION, CONVOLUTION = 1.15, 5 / 3
TOKENS = 64  # about so many tokens pass through the narrow transformer
SIDE = 64  # pixels: side of the image that passes through the narrow autoencoder
T5_NARROWING = 4  # not more: the bucket of each pair of positions does not get narrower

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Workload:
    """The size of the work, as far as it decides how much memory the work takes."""

    width: int
    height: int
    batch: int = 1  # images that pass through the transformer at once
    reference_tokens: int = 0  # tokens of reference images, next to those of the image
    image_text_tokens: int = 0  # text tokens of images (FLUX.1 Redux)
    steps: int = 1  # steps whose modulation is precomputed
    itemsize: int = 2  # bytes of an activation
    tile: int | None = None  # pixels: side of the tiles of a tiled decode
    encoded_pixels: int = 0  # pixels of the largest image that is encoded
    decode_itemsize: int | None = None  # bytes of an activation of the decoder; default: `itemsize`
    fast: bool = False  # with the forwards of runtime/fast.py
    text_tokens: int | None = None  # of the longest prompt; default: the model's

    def fits_within(self, other: "Workload") -> bool:
        """Return whether no stage after the encoding of images takes more memory than `other`."""

        def sizes(work: Workload) -> tuple[int, ...]:
            pixels = work.width * work.height
            tokens = work.reference_tokens, work.image_text_tokens, work.text_tokens or 0
            return pixels, work.batch, *tokens, work.steps

        return all(mine <= theirs for mine, theirs in zip(sizes(self), sizes(other)))


def activations(spec: ModelSpec, work: Workload, device_type: str) -> dict[str, int]:
    """Return the bytes of activations of each stage, as an upper bound near the real peak."""
    ae, pixels = spec.autoencoder, work.width * work.height
    decoded = min(pixels, work.tile**2) if work.tile else pixels
    canvas = 12 * pixels if work.tile else 0  # the image that tiles are added to, in float32
    encoded = work.encoded_pixels or pixels
    decoding, encoding = work.decode_itemsize or work.itemsize, 4  # images are encoded in float32
    step = _step_bytes(spec, work, device_type)
    counted_for = device_type if work.fast else None
    decode = decoded * _decode_bytes_per_pixel(ae, decoding, decoded, counted_for)
    encode = encoded * _encode_bytes_per_pixel(ae, encoding, encoded, counted_for)
    if device_type == "mps":  # without fused attention: scores and probabilities
        step += (
            2 * work.batch * spec.transformer.num_heads * _tokens(spec, work) ** 2 * work.itemsize
        )
        decode = max(decode, 2 * (decoded // 64) ** 2 * decoding)
        encode = max(encode, 2 * (encoded // 64) ** 2 * encoding)
    return {
        "text encoder": _text_encoder_bytes(
            spec.text, _text_tokens(spec, work), work.itemsize, scores=device_type == "mps"
        ),
        "image encoder": int(encode),
        "transformer": int(step),
        "autoencoder": int(decode) + canvas,
    }


def _tokens(spec: ModelSpec, work: Workload) -> int:
    image = (work.width // 16) * (work.height // 16) + work.reference_tokens
    return _text_tokens(spec, work) + work.image_text_tokens + image


def _text_tokens(spec: ModelSpec, work: Workload) -> int:
    return work.text_tokens or spec.text_length


def _step_bytes(spec: ModelSpec, work: Workload, device_type: str) -> float:
    """Return the bytes of a step, the precomputed modulations and the cached references."""
    c = spec.transformer
    text = _text_tokens(spec, work) + work.image_text_tokens
    image = _tokens(spec, work) - text
    if isinstance(c, Flux3Config):
        prompts, image = 2 if spec.cfg else 1, image - work.reference_tokens
        return _step_bytes3(c, work, text, image, prompts, device_type if work.fast else None)
    counted_for = device_type if work.fast else None
    count = partial(_scaled_step, c, itemsize=work.itemsize, counted_for=counted_for)
    # latents, noise and text features in float32, which the pipeline keeps
    inputs = 4 * (text * c.context_dim + 2 * image * (c.in_channels + c.out_channels))
    rope = 4 * (text + image) * sum(c.axes_dim) // 2 * 4  # 2x2 matrices in float32
    if spec.kv_cached_references and work.reference_tokens:
        # a pass over the references alone; then steps that attend to keys and values of each block
        references, _ = count(0, work.reference_tokens)
        step, modulations = count(text, image - work.reference_tokens)
        one = 2 * work.reference_tokens * c.hidden_size * work.itemsize
        step = max(references / work.batch, step + one)
        cached = one * (c.depth + c.depth_single)
    else:
        step, modulations = count(text, image)
        cached = 0
    table = (2 if spec.cfg else 1) * work.steps * modulations
    return work.batch * (step + table + inputs) + rope + cached


def _step_bytes3(
    c: Flux3Config, work: Workload, text: int, image: int, prompts: int, counted_for: str | None
) -> float:
    """Return the bytes of a step of FLUX 3, and of what is kept between steps."""
    references = work.reference_tokens
    tokens = text + image + references
    scale = max(1, tokens // TOKENS)
    counts = (math.ceil(count / scale) for count in (text, image, references))
    step = ALLOCATOR * scale * _count_step3(c, *counts, work.itemsize, counted_for)
    # latents, noise and references in float32, which the pipeline keeps; and what it converts
    inputs = 4 * (2 * image + references) * c.in_channels
    inputs += work.itemsize * (prompts * text * c.context_dim + references * c.in_channels)
    # in a base model, those of each prompt
    streams = 0 if c.flow_map else prompts * (text + references) * c.hidden_size * work.itemsize
    rope = (prompts * text + image + references) * sum(c.axes_dim) // 2 * 4 * 4  # of the modes
    return work.batch * (step + inputs + streams) + rope


def _scaled_step(
    config: FluxConfig, text: int, image: int, itemsize: int, counted_for: str | None
) -> tuple[float, int]:
    """Return the peak of a step, and the modulations of all blocks for it."""
    scale = max(1, (text + image) // TOKENS)
    narrow = math.ceil(text / scale), math.ceil(image / scale)
    step, modulations = _count_step(config, *narrow, itemsize, counted_for)
    return ALLOCATOR * scale * step, modulations


# ------------------------------------------------------------------ networks


@lru_cache(maxsize=256)
def _count_step(
    config: FluxConfig, text: int, image: int, itemsize: int, counted_for: str | None
) -> tuple[int, int]:
    """Return the peak of a step with so many tokens, and the modulations of all blocks for it."""
    heads = config.num_heads
    narrow = replace(
        config,
        hidden_size=config.hidden_size // heads,
        num_heads=1,
        depth=1,
        depth_single=1,
        in_channels=math.ceil(config.in_channels / heads),
        out_channels=math.ceil(config.out_channels / heads),
        context_dim=math.ceil(config.context_dim / heads),
        vector_dim=config.vector_dim and math.ceil(config.vector_dim / heads),
    )
    dtype = _dtype(itemsize)
    network = _zeros(lambda: Flux(narrow), dtype)
    if counted_for:
        fast.fast_transformer(network)
    rope = torch.zeros(1, sum(config.axes_dim) // 2, 2, 2).expand(text + image, -1, -1, -1)
    # the table does not get narrower: not counted
    network.rope = lambda txt_ids, img_ids: rope  # type: ignore[method-assign, assignment]
    axes = len(config.axes_dim)
    times: dict[str, Any] = dict(
        t=torch.zeros(1),
        guidance=torch.zeros(1) if narrow.guidance else None,
        vector=torch.zeros(1, narrow.vector_dim, dtype=dtype) if narrow.vector_dim else None,
    )

    def step() -> None:
        network(
            img=torch.zeros(1, image, narrow.in_channels, dtype=dtype),
            img_ids=torch.zeros(image, axes),
            txt=torch.zeros(1, text, narrow.context_dim, dtype=dtype),
            txt_ids=torch.zeros(text, axes),
            **times,
        )

    with fast.counted_for(counted_for or "cpu"), FusedKernels():
        peak = peak_bytes(step)
    with torch.no_grad():
        (mods,) = network.modulations([network.vec(**times)])
    shared = config.shared_modulation
    double, single = (sum(x.nbytes for x in tree_leaves(m)) for m in (mods.double, mods.single))
    modulations = double * (1 if shared else config.depth)
    modulations += single * (1 if shared else config.depth_single)
    vec = 3 * narrow.hidden_size * itemsize  # the vector of each step, and what it is the sum of
    # the rotations as complex numbers, which do not get narrower either
    rotations = (text + image) * sum(config.axes_dim) // 2 * 8 if counted_for else 0
    return heads * (peak - rotations) + rotations, heads * (modulations + vec)


@lru_cache(maxsize=256)
def _count_step3(
    config: Flux3Config,
    text: int,
    image: int,
    references: int,
    itemsize: int,
    counted_for: str | None,
) -> int:
    """Return the peak of a step of FLUX 3 with so many tokens, without what is kept between steps.

    A base model's streams of text and references are kept.
    """
    heads = config.num_heads
    narrow = replace(
        config,
        hidden_size=config.hidden_size // heads,
        num_heads=1,
        depth=1,
        depth_single=1,
        in_channels=math.ceil(config.in_channels / heads),
        context_dim=math.ceil(config.context_dim / heads),
        flow_map=False,
    )
    dtype = _dtype(itemsize)
    network = _zeros(lambda: Flux3(narrow), dtype)
    if counted_for:
        fast_transformer3(network)
    half = sum(config.axes_dim) // 2
    # the tables do not get narrower: not counted
    tables = [torch.zeros(1, half, 2, 2).expand(n, -1, -1, -1) for n in (text, image, references)]

    tokens = {"txt": torch.zeros(1, text, narrow.context_dim, dtype=dtype)}
    if references:
        tokens["image_cond"] = torch.zeros(1, references, narrow.in_channels, dtype=dtype)

    def streams(vec: Tensor) -> list[Stream]:
        modes = zip(tokens, (tables[0], tables[2]))
        return [network.stream(mode, tokens[mode], table, vec) for mode, table in modes]

    def step(kept: list[Stream]) -> None:
        vec = network.vec(torch.zeros(1))
        x = torch.zeros(1, image, narrow.in_channels, dtype=dtype)
        network.denoise(x, tables[1], vec, *(kept or streams(vec)))

    # joined, and the rotations as complex numbers
    joined = (text + image + references) * half * (4 * 4 + (8 if counted_for else 0))
    with fast.counted_for(counted_for or "cpu"), FusedKernels(), torch.no_grad():
        kept = [] if config.flow_map else streams(network.vec(torch.zeros(1)))
        return heads * (peak_bytes(partial(step, kept)) - joined) + joined


@lru_cache(maxsize=64)
def _decode_bytes_per_pixel(
    config: AutoEncoderConfig, itemsize: int, pixels: int, counted_for: str | None
) -> float:
    network, narrow = _narrow_autoencoder(config, itemsize, counted_for)
    z = torch.zeros(1, narrow.latent_channels, SIDE // 16, SIDE // 16, dtype=_dtype(itemsize))
    narrowing = (config.decoder_ch or config.ch) / narrow.ch
    return _bytes_per_pixel(lambda: network.decode(z), narrowing, pixels, counted_for)


@lru_cache(maxsize=64)
def _encode_bytes_per_pixel(
    config: AutoEncoderConfig, itemsize: int, pixels: int, counted_for: str | None
) -> float:
    network, narrow = _narrow_autoencoder(config, itemsize, counted_for)
    x = torch.zeros(1, 3, SIDE, SIDE, dtype=_dtype(itemsize))
    return _bytes_per_pixel(lambda: network.encode(x), config.ch / narrow.ch, pixels, counted_for)


def _narrow_autoencoder(
    config: AutoEncoderConfig, itemsize: int, counted_for: str | None
) -> tuple[AutoEncoder, AutoEncoderConfig]:
    """Return an autoencoder with one channel per group of a norm."""
    narrow = replace(config, ch=config.norm_groups, decoder_ch=None)
    network = _zeros(lambda: AutoEncoder(narrow), _dtype(itemsize))
    if counted_for:
        with fast.counted_for(counted_for):
            fast.fast_autoencoder(network)
    return network, narrow


def _bytes_per_pixel(
    function: Callable[[], object], narrowing: float, pixels: int, counted_for: str | None
) -> float:
    smaller = max(1, round(narrowing * pixels / SIDE**2))
    with fast.counted_for(counted_for or "cpu", smaller), FusedKernels():
        peak = peak_bytes(function)
    factor = FAST_CONVOLUTION if counted_for == "cuda" else CONVOLUTION
    return factor * narrowing * peak / SIDE**2


@lru_cache(maxsize=64)
def _text_encoder_bytes(
    text: FLUX1Text | FLUX2Text, length: int, itemsize: int, scores: bool
) -> int:
    """Return the bytes to encode one prompt; `scores`: of an attention that is not fused."""
    ids = torch.zeros(1, length, dtype=torch.long)
    if isinstance(text, FLUX1Text):
        c = text.t5
        scale = math.gcd(c.num_heads, T5_NARROWING)
        narrow = replace(
            c,
            vocab_size=1,
            hidden_size=math.ceil(c.hidden_size / scale),
            mlp_size=math.ceil(c.mlp_size / scale),
            num_heads=c.num_heads // scale,
            depth=1,
        )
        t5 = _zeros(lambda: T5(narrow), _dtype(itemsize))
        with FusedKernels(scores):
            peak = peak_bytes(lambda: t5(ids))
    else:
        m = text.model
        scale = m.num_kv_heads
        small = replace(
            m,
            layers=tuple(range(1, len(m.layers) + 1)),  # as many hidden states
            vocab_size=1,
            hidden_size=math.ceil(m.hidden_size / scale),
            mlp_size=math.ceil(m.mlp_size / scale),
            num_heads=m.num_heads // scale,
            num_kv_heads=1,
        )
        model = _zeros(lambda: LanguageModel(small), _dtype(itemsize))
        with FusedKernels(scores):
            peak = peak_bytes(lambda: model(ids, torch.ones(1, length, dtype=torch.bool)))
    return int(ALLOCATOR * scale * peak)


def _zeros(build: Callable[[], Network], dtype: torch.dtype) -> Network:
    """Return a network whose weights are zeros; no random numbers are drawn."""
    with skip_init():
        network = build().to(dtype)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.zero_()
    return network


def _dtype(itemsize: int) -> torch.dtype:
    return torch.float32 if itemsize == 4 else torch.bfloat16


# ------------------------------------------------------------------ counting


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most bytes that tensors created in `function` take at one time, without gradients.

    The count is taken after each operation, so workspaces of an operation are not included.
    """
    with torch.no_grad(), _LiveBytes() as live:
        function()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports torch's compiler, which takes seconds

    def __init__(self) -> None:
        super().__init__()
        # Storages created elsewhere. A reference keeps the address from being used again.
        self.others: dict[int, StorageWeakRef] = {}
        self.created: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for key, ref, _ in _storages((args, kwargs)):
            if key not in self.created:
                self.others[key] = ref
        out = function(*args, **(kwargs or {}))
        for key, ref, size in _storages(out):
            if key not in self.others:
                self.created[key] = ref, size
        self.created = {k: entry for k, entry in self.created.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.created.values()))
        return out


def _storages(values: Any) -> list[tuple[int, StorageWeakRef, int]]:
    storages = []
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages.append((storage._cdata, StorageWeakRef(storage), storage.nbytes()))
    return storages


class FusedKernels(TorchFunctionMode):
    """Replace attention and RMS norm by their shapes: fused kernels make no intermediate tensor.

    Linears, which take most of the time, are not computed either.
    scores: of an attention with a mask, where such a kernel is missing.
    """

    def __init__(self, scores: bool = False) -> None:
        super().__init__()
        self.scores = scores

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        if function is F.rms_norm:
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        q, k = args[:2]
        mask = kwargs.get("attn_mask")
        if self.scores and mask is not None:
            scores = q.new_empty(*q.shape[:-1], k.shape[-2], dtype=torch.float32)
            probabilities = torch.empty_like(scores)
            del scores, probabilities
        return torch.zeros_like(q)  # in the order of q: its heads may be the third dimension
