"""Known bugs of ports of FLUX 3 around its blocks: positions, text, noise, times, guidance, images.

Rows as in `known_bugs.py`; `known_bugs3.py` has the others.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import permutations

import torch
from torch import Tensor

from flux import language_model, sampling, transformer3
from flux.autoencoder import AutoEncoder
from flux.hooks import joined
from flux.parity.bugs_in_blocks import HALVES, variants
from flux.parity.capture3 import inputs_of_pass
from flux.parity.modules import Modules
from flux.parity.rerun import KnownBug, Rerun
from flux.text_encoder import TextFeatures

Ids = dict[str, Tensor]  # by mode: img, txt, references
MODES = {  # of lists of blocks
    "txt_mode_blocks": ("txt",),
    "content_mode_blocks.image": ("img",),
    "content_mode_blocks.image_cond": ("references",),
    "single_blocks": ("txt", "img", "references"),
}

# ---------------------------------------------------------------- positions


def ids_of(rerun: Rerun) -> Ids:
    """Recorded positions; the negative prompt has its own text."""
    negative = "negative" if "negative" in rerun.name.split("/") else ""
    names = {"img": "ids/img", "txt": joined(negative, "ids/txt"), "references": "ids/references"}
    records = rerun.reference.records
    return {mode: rerun.recorded(name) for mode, name in names.items() if name in records}


def with_table(table: Callable[[Rerun, Tensor], Tensor], ids: Callable[[Ids], Ids]) -> Callable:
    """Other positions, or another table of positions: ids, tables, or q and k rotated by them."""

    def compute(rerun: Rerun) -> Tensor:
        changed = ids(ids_of(rerun))
        found = re.fullmatch(r"(?:negative/)?(ids|rope)/(\w+)", rerun.name)
        if found:
            own = changed[found[2]]
            return own.to(rerun.expected) if found[1] == "ids" else table(rerun, own)
        used = next((MODES[each] for each in MODES if f"/{each}." in rerun.name), None)
        if used is None:
            raise LookupError(rerun.name)
        rope = torch.cat([table(rerun, changed[mode]) for mode in used if mode in changed])
        return rerun.compute((transformer3, "apply_rope", lambda f, x, _: f(x, rope)))

    return compute


def true_table(rerun: Rerun, ids: Tensor) -> Tensor:
    config = rerun.network.config
    return transformer3.rope_table(ids, config.axes_dim, config.theta)


def with_ids(**change: Callable[[Tensor], Tensor]) -> Callable:
    """Positions where change(ids) takes the place of a mode's; LookupError without the mode."""

    def changed(ids: Ids) -> Ids:
        return ids | {mode: f(ids[mode]) for mode, f in change.items()}

    return with_table(true_table, changed)


def with_theta(theta: float) -> Callable:
    def table(rerun: Rerun, ids: Tensor) -> Tensor:
        config = rerun.network.config
        return transformer3.rope_table(ids, config.axes_dim, int(theta * config.theta))

    return with_table(table, lambda ids: ids)


def rounded_table(dtype: torch.dtype, rerun: Rerun, ids: Tensor) -> Tensor:
    return true_table(rerun, ids).to(dtype).float()


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    """Rows and columns times a factor."""
    return lambda ids: ids * torch.tensor([1.0, factor, factor, 1.0])


def moved(row: float, column: float) -> Callable[[Tensor], Tensor]:
    return lambda ids: ids + torch.tensor([0.0, row, column, 0.0])


def on_axis(axis: int, number: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Put number(what is on the last axis) on another axis, and 0 on the last."""

    def change(ids: Tensor) -> Tensor:
        out = ids.clone().float()
        out[:, 3] = 0
        out[:, axis] = number(ids[:, 3].float())
        return out

    return change


def swap_rows_and_columns(ids: Tensor) -> Tensor:
    return ids[:, [0, 2, 1, 3]]


def orders_of_axes(rerun: Rerun) -> dict[str, Tensor]:
    """The positions on other axes."""
    found = {}
    for order in permutations(range(4)):
        if list(order) == sorted(order):
            continue

        def moved(ids: Ids, order=order) -> Ids:
            return {mode: each[:, list(order)] for mode, each in ids.items()}

        found[", ".join(map(str, order))] = with_table(true_table, moved)(rerun)
    return found


# ---------------------------------------------------------------- text


def with_positions(
    positions: Callable[[Tensor], Tensor] | None = None,
    theta: float | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[[Rerun], Tensor]:
    """The language model with other positions(mask), theta, or rounded frequencies.

    They show in the table that each layer gets as `in.1`, and in all that follows.
    """

    def compute(rerun: Rerun) -> Tensor:
        config = rerun.network.config
        mask = rerun.recorded(rerun.in_text("model/in.1"))  # (1, L)
        counted = torch.arange(mask.shape[1])
        right = counted.where(mask, config.padding_position)  # (1, L)
        position = right if positions is None else positions(mask).expand_as(right)
        exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        frequency = 1 / (config.theta if theta is None else theta) ** exponent
        frequency = frequency.to(dtype).float() if dtype else frequency
        half = position[:, None].float()[..., None] * frequency  # (1, 1, L, d/2)
        angle = torch.cat([half, half], dim=-1)
        table = torch.stack([angle.cos(), angle.sin()])
        if re.search(r"/model/layers\.\d+(\.self_attn)?/in\.1$", rerun.name):
            return table.to(rerun.expected)

        def attention(f: Callable, self, x: Tensor, rope: Tensor, *masks: Tensor) -> Tensor:
            return f(self, x, table.to(rope), *masks)

        return rerun.compute((language_model.Attention, "forward", attention))

    return compute


def last_real(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1]).clamp(max=int(mask.sum()) - 1)


POSITIONS = {
    "it is counted on, as in FLUX.2": with_positions(lambda mask: torch.arange(mask.shape[1])),
    "it has position 0": with_positions(lambda mask: torch.arange(mask.shape[1]).where(mask, 0)),
    "it has the position of the last real token": with_positions(last_real),
}


def prompt_of(rerun: Rerun) -> str:
    key = "negative_prompt" if "negative" in rerun.name.split("/") else "prompt"
    return rerun.reference.recipe[key] or ""


def with_template(before: str, after: str) -> Callable[[Rerun], Tensor]:
    """The prompt's ids in another chat template, padded in the same way."""

    def compute(rerun: Rerun) -> Tensor:
        tokenizer = rerun.pipe.text.tokenizer  # type: ignore[attr-defined]
        tokenizer.tokenizer.no_truncation()
        tokenizer.tokenizer.no_padding()
        ids = tokenizer.tokenizer.encode(before + prompt_of(rerun) + after).ids
        length = -(-len(ids) // tokenizer.multiple) * tokenizer.multiple
        return torch.tensor([ids + [tokenizer.pad_id] * (length - len(ids))])

    return compute


USER, END = "<|im_start|>user\n", "<|im_end|>\n"
TEMPLATES = {
    "an empty think block follows, as in FLUX.2": with_template(
        USER, f"{END}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "the prompt stands alone": with_template("", ""),
    "the assistant's turn is not opened": with_template(USER, END),
    "a system turn comes first": with_template(
        f"<|im_start|>system\nYou are a helpful assistant.{END}{USER}",
        f"{END}<|im_start|>assistant\n",
    ),
    "padding is on the left": lambda rerun: rerun.expected.roll(
        int((~rerun.recorded(rerun.in_text("model/in.1"))).sum()), dims=1
    ),
}


def padded_to(length: Callable[[Rerun], int]) -> Callable[[Rerun], Tensor]:
    """Ids, mask or features of another padded length. All padding rows are equal in FLUX 3."""

    def compute(rerun: Rerun) -> Tensor:
        wanted, x = length(rerun), rerun.expected
        more = wanted - x.shape[1]
        if more <= 0:
            return x[:, :wanted]
        if bool(rerun.recorded(rerun.in_text("model/in.1"))[0, -1]):
            raise LookupError("without padding, its row is not known")
        return torch.cat([x, x[:, -1:].expand(-1, more, *x.shape[2:])], dim=1)

    return compute


def real_tokens(rerun: Rerun) -> int:
    return int(rerun.recorded(rerun.in_text("model/in.1")).sum())


LENGTHS = {
    "to 512 tokens, as in FLUX.2": padded_to(lambda rerun: 512),
    "not at all": padded_to(real_tokens),
    "to a multiple of 64": padded_to(lambda rerun: -(-real_tokens(rerun) // 64) * 64),
}


def channels_by_layer(rerun: Rerun) -> Tensor:
    """Channels (channel, layer) for (layer, channel)."""
    layers = len(rerun.pipe.spec.text.model.layers)  # type: ignore[union-attr]
    return rerun.expected.unflatten(-1, (layers, -1)).mT.flatten(-2)


def layers_backwards(rerun: Rerun) -> Tensor:
    layers = len(rerun.pipe.spec.text.model.layers)  # type: ignore[union-attr]
    return rerun.expected.unflatten(-1, (layers, -1)).flip(-2).flatten(-2)


def layers_of_klein(rerun: Rerun) -> Tensor:
    """The hidden states after the layers that FLUX.2 [klein] reads, of Qwen3 with 36 layers."""
    layers = [rerun.recorded(f"{rerun.place}/layers.{number - 1}/out") for number in (9, 18, 27)]
    return torch.cat(layers, dim=-1)


# ---------------------------------------------------------------- noise, times, guidance


def noise_as(spatial: bool, tokens: bool) -> Callable[[Rerun], Tensor]:
    def compute(rerun: Rerun) -> Tensor:
        _, channels, height, width = rerun.recorded("noise").shape
        drawn = sampling.noise(
            [rerun.reference.recipe["seed"]], channels, height, width, spatial, tokens
        )
        drawn = drawn.to(rerun.pipe.dtype)
        return drawn.to(rerun.expected) if rerun.expected.ndim == 4 else as_tokens(drawn)

    return compute


def as_tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).mT


def times_by(times: Callable[[int, int], Tensor]) -> Callable[[Rerun], Tensor]:
    """times(steps, image tokens)."""
    return lambda rerun: times(len(rerun.times) - 1, rerun.image_tokens).float()


def shifted(shift: float, steps: int) -> Tensor:
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


def every_nth_of_1000(steps: int, tokens: int) -> Tensor:
    """ComfyUI's "simple" scheduler: entries of a table of 1000 times, truncated; then 0."""
    table = shifted(sampling.SHIFT, 1000)[:-1].flip(0)  # from 1/1000 to 1
    chosen = [table[-(1 + int(step * 1000 / steps))] for step in range(steps)]
    return torch.stack([*chosen, torch.zeros((), dtype=torch.float64)])


def with_zero_twice(steps: int, tokens: int) -> Tensor:
    """The times of one step less, and 0 once more: the last step has no length."""
    return torch.cat([shifted(sampling.SHIFT, steps - 1), torch.zeros(1, dtype=torch.float64)])


def without_zero(steps: int, tokens: int) -> Tensor:
    return shifted(sampling.SHIFT, steps + 1)[:-1]


TIMES = {
    "the times are even, not shifted": lambda steps, tokens: shifted(1, steps),
    "the shift is 3, as in Stable Diffusion 3": lambda steps, tokens: shifted(3, steps),
    "the shift follows from the size, as in FLUX.2": lambda steps, tokens: sampling.schedule(
        "empirical", steps, tokens
    ),
    "the shift follows from the size, as in FLUX.1": lambda steps, tokens: sampling.schedule(
        "linear", steps, tokens
    ),
    "6.93 is taken for mu": lambda steps, tokens: shifted(
        float(torch.tensor(sampling.SHIFT).double().exp()), steps
    ),
    "every n-th of 1000 times is taken, truncated, as by ComfyUI's simple scheduler": (
        every_nth_of_1000
    ),
    "0 comes twice": with_zero_twice,
    "0 is left out": without_zero,
    "the first time is left out": lambda steps, tokens: shifted(sampling.SHIFT, steps + 1)[1:],
    "times run from 0 to 1": lambda steps, tokens: 1 - shifted(sampling.SHIFT, steps),
}


def next_step(rerun: Rerun) -> Tensor:
    """Euler's step, as long as the next one."""
    x, velocity = rerun.latents(rerun.step - 1), rerun.recorded(rerun.in_step("velocity"))
    if rerun.step + 1 >= len(rerun.times):
        raise LookupError("there is no later interval")
    dt = rerun.times[rerun.step + 1] - rerun.times[rerun.step]
    return x + dt * velocity.float().mT.reshape(x.shape)


SCALES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 7.5)


def other_scales(rerun: Rerun) -> dict[str, Tensor]:
    """Guidance with another scale than the recipe's; one more is "guidance from the prompt"."""
    conditional = rerun.recorded(rerun.in_step("out"))
    unconditional = rerun.recorded(rerun.in_step("negative/out"))
    known = rerun.cfg_scale, rerun.cfg_scale + 1
    difference = conditional - unconditional
    scales = [scale for scale in SCALES if scale not in known]
    return {f"{scale:g}": unconditional + scale * difference for scale in scales}


def guided_flow_map(rerun: Rerun) -> dict[str, Tensor]:
    """Classifier-free guidance on the distilled model, against an empty prompt."""
    place, text = f"step.{rerun.step:03}", rerun.pipe.text
    if rerun.pipe.spec.cfg:
        raise LookupError("not distilled")
    with torch.inference_mode():
        empty: TextFeatures = text.encode_one("")
        ids = sampling.text_ids(empty.tokens.shape[1], 4)
        names = inputs_of_pass(place, "ids/references" in rerun.reference.records)
        replaced = {f"{place}/txt_in/in": empty.tokens, "rope/txt": rerun.network.rope(ids)}
        inputs = [replaced[name] if name in replaced else rerun.recorded(name) for name in names]
        (unconditional,) = Modules(rerun.pipe)(place, inputs)
    difference = rerun.recorded(f"{place}/out") - unconditional
    return {f"{scale:g}": unconditional + scale * difference for scale in SCALES}


# ---------------------------------------------------------------- input images


def references_backwards(rerun: Rerun) -> Tensor:
    """The tokens, or ids, of several references in the opposite order."""
    numbers = rerun.recorded("ids/references")[:, 3]
    axis = 0 if rerun.expected.ndim == 2 else 1
    order = torch.cat([(numbers == n).nonzero()[:, 0] for n in numbers.unique()])
    return rerun.expected.index_select(axis, order)


def eps_of_statistics(eps: float) -> Callable[[Rerun], Tensor]:
    def statistics(f: Callable, self: AutoEncoder) -> tuple[Tensor, Tensor]:
        mean, std = f(self)
        return mean, (std**2 - self.bn.eps + eps).sqrt()

    return lambda rerun: rerun.compute((AutoEncoder, "statistics", statistics))


# ---------------------------------------------------------------- the table

STEP = r"^step"
IDS = r"^(negative/)?(ids|rope)/|^step.*_blocks"
PLACES = r"^(negative/)?(ids|rope)/(img|references)|^step.*(single_blocks|content_mode_blocks)"
OF_TEXT = r"^(negative/)?(ids|rope)/txt|^step.*(single_blocks|txt_mode_blocks)"
OF_REFERENCES = r"^(ids|rope)/references|^step.*(single_blocks|image_cond)"
PIXELS = r"^encoder\.\d+/pixels$"
CODER = r"^(decoder|pixels|encoder)"


def both(change: Callable[[Tensor], Tensor]) -> Callable[[Rerun], Tensor]:
    """Change the positions of the image and of references, if there are any."""

    def compute(rerun: Rerun) -> Tensor:
        modes = [mode for mode in ("img", "references") if mode in ids_of(rerun)]
        return with_ids(**dict.fromkeys(modes, change))(rerun)

    return compute


# fmt: off
BUGS_AROUND3: tuple[KnownBug, ...] = (
    # positions
    KnownBug("rows and columns not halved", "{}, expected half of each", PLACES, variants({
        "positions are rows and columns": both(scaled(2)),
        "positions are a quarter of rows and columns": both(scaled(0.5)),
        "the image's positions are rows and columns": with_ids(img=scaled(2)),
        "the references' positions are rows and columns": with_ids(references=scaled(2))})),
    KnownBug("rows and columns swapped",
        "a position is (0, column, row, number), expected (0, row, column, number)",
        PLACES, both(swap_rows_and_columns)),
    KnownBug("rows and columns off by one", "{} count from 1, expected from 0", PLACES, variants({
        "rows": both(moved(0.5, 0)), "columns": both(moved(0, 0.5)),
        "rows and columns": both(moved(0.5, 0.5))})),
    KnownBug("number of a reference", "{}; expected -1, -2, ... on the last axis",
        OF_REFERENCES, variants({
            "references count 1, 2, ...": with_ids(references=on_axis(3, torch.neg)),
            "references have 0, as the image has": with_ids(
                references=on_axis(3, torch.zeros_like)),
            "references count from 0": with_ids(references=lambda ids: ids + torch.tensor(
                [0.0, 0, 0, 1])),
            "all references have -1": with_ids(references=on_axis(
                3, lambda number: torch.full_like(number, -1))),
            "the number is on the first axis": with_ids(references=on_axis(0, lambda n: n)),
            "1, 2, ... are on the first axis": with_ids(references=on_axis(0, torch.neg)),
            "10, 20, ... are on the first axis, as in FLUX.2": with_ids(
                references=on_axis(0, lambda number: -10 * number))})),
    KnownBug("text positions", "{}; expected 0, 1, 2, ... on the last axis", OF_TEXT, variants({
        "text tokens are not counted": with_ids(txt=torch.zeros_like),
        "text tokens count from 1": with_ids(txt=lambda ids: ids + torch.tensor([0, 0, 0, 1])),
        "text tokens are counted by halves": with_ids(txt=lambda ids: ids / 2),
        "text tokens are counted on the first axis": with_ids(txt=on_axis(0, lambda n: n)),
        "text tokens are counted backwards": with_ids(txt=lambda ids: -ids)})),
    KnownBug("order of RoPE's axes", "the axes are taken in another order: {}",
        IDS, orders_of_axes),
    KnownBug("RoPE's theta", "theta is {} times FLUX 3's, which is 10000",
        IDS, variants({f"{x:g}": with_theta(x) for x in (0.2, 5, 0.1, 10, 100, 500)})),
    KnownBug("RoPE in low precision", "the table is rounded to {}",
        IDS, variants({n: with_table(partial(rounded_table, d), lambda ids: ids)
            for n, d in HALVES.items()})),

    # text
    KnownBug("positions of padding", "{}; every padding token has position 1 in FLUX 3",
        r"/model/|/features$|/txt_in/in$", variants(POSITIONS)),
    KnownBug("language model's theta", "theta is {}, expected 5,000,000",
        r"/model/|/features$", variants({
            f"{x:,}": with_positions(theta=x)
            for x in (1_000_000, 10_000, 1_000_000_000)})),
    KnownBug("language model's frequencies rounded",
        "RoPE's frequencies are rounded to {}, as when all buffers are cast",
        r"/model/|/features$", variants({n: with_positions(dtype=d) for n, d in HALVES.items()})),
    KnownBug("template of the prompt", "{}; expected a user's turn, then an open assistant's",
        r"^text/(negative/)?model(/embed_tokens)?/in(\.0)?$", variants(TEMPLATES)),
    KnownBug("padded length of the prompt", "prompts are padded {}, expected to a multiple of 80",
        r"^text/.*(model(/embed_tokens)?/in(\.[01])?|model/out|features)$|/txt_in/in$",
        variants(LENGTHS)),
    KnownBug("order of hidden states", "{}; expected layer by layer",
        r"/model/out$|features$|/txt_in/in$", variants({
            "channels are (channel, layer)": channels_by_layer,
            "the last layer comes first": layers_backwards})),

    KnownBug("layers of hidden states",
        "the language model is read after layers 9, 18 and 27, as in FLUX.2; expected 4, 8, ... 32",
        r"/model/out$|features$|/txt_in/in$", layers_of_klein),

    # noise, times, guidance
    KnownBug("noise drawn in another layout", "noise is drawn {}",
        r"^noise$|^step\.001(/negative)?/(in|emb_in\.image/in)$", variants({
            "channel by channel, as by diffusers; expected token by token": noise_as(False, False),
            "token by token; expected channel by channel, as by diffusers": noise_as(False, True),
            "before 2x2 patches are packed, as in FLUX.1": noise_as(True, False)})),
    KnownBug("schedule", "{}; expected 6.93 u / (1 + 5.93 u), u from 1 to 0",
        r"^schedule$", variants({text: times_by(times) for text, times in TIMES.items()})),
    KnownBug("schedule off by one", "Euler's step is as long as the next one",
        r"^step.*/latents$", next_step),
    KnownBug("scale of guidance", "the scale is {}, expected the recipe's",
        r"^step.*/velocity$", other_scales),
    KnownBug("guidance on a distilled model",
        "classifier-free guidance of scale {} is applied; the distilled model takes none",
        r"^step.*/velocity$", guided_flow_map),

    # input images
    KnownBug("levels of an input image", "{}; expected -1 to 1", PIXELS, variants({
        "pixels are from 0 to 1": lambda rerun: rerun.expected / 2 + 0.5,
        "pixels are from 0 to 255": lambda rerun: (rerun.expected / 2 + 0.5) * 255})),
    KnownBug("red and blue swapped", "the channels of an input image are blue, green, red",
        PIXELS, lambda rerun: rerun.expected.flip(1)),
    KnownBug("order of references", "references come in the opposite order",
        r"references$|/emb_in\.image_cond/(in|out)$", references_backwards),
    KnownBug("eps of the latents' statistics", "{} is added to the variance, expected 1e-4",
        CODER, variants({f"{eps:g}": eps_of_statistics(eps) for eps in (1e-5, 1e-6, 0, 1e-3)})),
)
# fmt: on
