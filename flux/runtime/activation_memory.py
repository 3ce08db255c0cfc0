"""Count the bytes of activations that each stage takes next to its weights."""

from dataclasses import dataclass

from flux.configs import FLUX1Text, ModelSpec


@dataclass(frozen=True)
class Workload:
    """The size of the work, as far as it decides how much memory the work takes."""

    width: int
    height: int
    batch: int = 1  # images that pass through the transformer at once
    reference_tokens: int = 0  # tokens of reference images, next to those of the image
    image_text_tokens: int = 0  # text tokens made from images (FLUX.1 Redux)
    steps: int = 1  # steps whose modulation is precomputed
    itemsize: int = 2  # bytes of an activation
    tile: int | None = None  # pixels: side of the tiles of a tiled decode
    encoded_pixels: int = 0  # pixels of the largest image that is encoded

    def fits_within(self, other: "Workload") -> bool:
        """Return whether no stage after the encoding of images takes more memory than `other`."""

        def sizes(work: Workload) -> tuple[int, ...]:
            pixels = work.width * work.height
            return pixels, work.batch, work.reference_tokens, work.image_text_tokens, work.steps

        return all(mine <= theirs for mine, theirs in zip(sizes(self), sizes(other)))


def activations(spec: ModelSpec, work: Workload, kind: str) -> dict[str, int]:
    """Bytes that each stage takes beside its weights, at the most: sums of the largest tensors that are there at once."""
    decoder, pixels = spec.autoencoder, work.width * work.height
    width = decoder.ch_mult[1] * (decoder.decoder_ch or decoder.ch)
    decoded = min(pixels, work.tile**2) if work.tile else pixels
    whole = 12 * pixels if work.tile else 0  # what the tiles are put together in, in float32
    return {
        "text encoder": _text_activations(spec, work),
        "image encoder": _picture_activations(
            work.encoded_pixels or pixels, decoder.ch, 4, kind
        ),  # always in float32
        "transformer": _transformer_activations(spec, work, kind),
        "autoencoder": _picture_activations(decoded, width, work.itemsize, kind) + whole,
    }


def _transformer_activations(spec: ModelSpec, work: Workload, kind: str) -> int:
    c, e = spec.transformer, work.itemsize
    image = (work.width // 16) * (work.height // 16) + work.reference_tokens
    text = spec.text_length + work.image_text_tokens
    tokens = work.batch * (text + image)
    hidden = tokens * c.hidden_size  # one tensor as wide as the residual stream, in elements
    mlp = (2 if c.gated_mlp else 1) * c.mlp_ratio  # first layer of the MLP, in such tensors
    # a double block turns q and k: x twice; q, k, v of each stream and of both; q and k normed; in float32, q and k five times
    turning = hidden * ((2 + 3 + 3 + 2) * e + 5 * 2 * 4)
    # its MLP: x, q, k, v as above, q and k normed and turned, attention's, whole and in two; what the MLP's layers make
    feeding = hidden * ((2 + 3 + 3 + 2 + 2 + 2 + 2 * mlp) * e + 2 * 4)
    # a single block ends: x twice, linear1's output, q and k, attention's, activation's, both side by side, and linear2's twice
    joining = hidden * (2 + 3 + mlp + 2 + 1 + c.mlp_ratio + 1 + c.mlp_ratio + 2) * e
    given = work.batch * (text * c.context_dim + 2 * image * (c.in_channels + c.out_channels)) * 4
    rope = (text + image) * c.hidden_size // c.num_heads * 2 * 4
    per_step = 9 if c.shared_modulation else 12 * c.depth + 3 * c.depth_single
    table = (2 if spec.cfg else 1) * work.steps * work.batch * (per_step + 3) * c.hidden_size * e
    memories = (
        2 * work.reference_tokens * c.hidden_size * (c.depth + c.depth_single) * e
        if spec.kv_cached_references
        else 0
    )
    scores = (
        2 * work.batch * c.num_heads * (text + image) ** 2 * e if kind == "mps" else 0
    )  # no fused attention
    return int(1.1 * max(turning, feeding, joining)) + given + rope + table + memories + scores


def _picture_activations(pixels: int, width: int, itemsize: int, kind: str) -> int:
    """Of an autoencoder, one picture at a time: five maps of `width` channels and full size; or the attention in its middle."""
    middle = (
        2 * (pixels // 64) ** 2 * itemsize if kind == "mps" else 0
    )  # one head, each place with each
    return max(5 * width * pixels * itemsize, middle)


def _text_activations(spec: ModelSpec, work: Workload) -> int:
    """Of one prompt at a time: ten tensors as wide as the residual stream, three of the MLP; scores, since there is a mask."""
    c = spec.text.t5 if isinstance(spec.text, FLUX1Text) else spec.text.model
    length = spec.text_length
    kept = 0 if isinstance(spec.text, FLUX1Text) else 2 * c.features
    streams = (
        length
        * (10 * max(c.hidden_size, c.num_heads * c.head_dim) + 3 * c.mlp_size + kept)
        * work.itemsize
    )
    return streams + 2 * c.num_heads * length**2 * 4
