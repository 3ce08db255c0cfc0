"""The recipe of the embedded models: losses, optimizers, checkpoints, batches, tokenizers, export.

test_embedded.py tests the product of the training.
"""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.load_script import script
from torch.nn.attention import SDPBackend, sdpa_kernel

import flux
from flux import sampling, toy, transformer
from flux.autoencoder import AutoEncoder
from flux.conditioning import reference_tokens
from flux.configs import MODELS, ModelSpec
from flux.parity.reference import randomise, relative_l2
from flux.text_encoder import TextFeatures
from flux.toy.scenes import LETTERS
from flux.training.checkpoint import load_tensors, save_tensors
from flux.training.distillation import make_student
from flux.training.loss import Batch, predict_velocity
from flux.weights import locate as models
from flux.weights.load import infer_config

train = script("toy/train")  # whose folder is where the recipe is found from now on
from recipe import autoencoder, reader
from recipe.attention import attention
from recipe.batches import BATCH, Batches, LatentFile
from recipe.images import to_images, to_pixels
from recipe.latents import CHANGES, EDITS, SCENES, THINGS, box, edits, images, shown
from recipe.muon import Muon
from recipe.neighbours import neighbours_loss
from recipe.networks import (
    CHANGED,
    EDGES,
    Networks,
    changed_loss,
    flow_loss,
    new_networks,
    shown_loss,
)
from recipe.reader import Reader, Readings, pick_rows, reading_loss, reading_spec
from recipe.reading import MOST, completed, places, reading
from recipe.text import NEAR, Tokenizer
from recipe.tokenizer import texts, train_tokenizers
from recipe.trainer import TimedTrainer, optimizers

pytestmark = pytest.mark.slow

SPEC, SPEC1 = MODELS["flux.2-tiny"], MODELS["flux.1-tiny"]
MATCH = "match_rms_adamw"  # the size of steps
every_model = pytest.mark.parametrize("spec", [SPEC, SPEC1], ids=["flux.2", "flux.1"])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train the tokenizers of each model into a folder."""
    folders = {spec.name: tmp_path_factory.mktemp(spec.name) for spec in (SPEC, SPEC1)}
    for name, folder in folders.items():
        train_tokenizers(folder, MODELS[name].text)
    return folders


def random_networks(spec: ModelSpec = SPEC) -> Networks:
    """Return new networks in which no parameter is 0 or 1."""
    torch.manual_seed(0)
    networks = new_networks(spec)
    with torch.no_grad():
        for p in networks.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return networks


# ------------------------------------------------------------------ losses


class Oracle:
    """The true velocity: x = (1 - t) latents + t noise, so noise - latents = (x - latents) / t."""

    def __init__(self, latents: torch.Tensor, factor: float = 1.0):
        self.latents, self.factor = latents, factor

    def velocity(self, features, x, t, references, corner):
        return self.factor * (x - self.latents) / t[:, None, None, None]


def test_flow_loss_is_zero_only_for_the_true_velocity():
    latents = drawn(4, 8, 2, 3)
    assert flow_loss(Oracle(latents), latents, None) < 1e-9
    assert flow_loss(Oracle(latents, 0.9), latents, None) > 1e-3


def test_hidden_states_are_those_of_the_middle_single_block():
    """Tokens of the image and of references are kept, as the middle block reads them."""
    networks = random_networks()
    blocks, seen = networks.transformer.single_blocks, []
    blocks[len(blocks) // 2].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    features = TextFeatures(drawn(2, 5, 384, seed=1), None)
    references = drawn(2, 1, 64, 3, 5, seed=3)
    networks.velocity(features, drawn(2, 64, 2, 3), torch.tensor([0.3, 0.9]), references)
    assert seen[0].shape[1] == 5 + 6 + 15
    assert torch.equal(networks.hidden, seen[0][:, 5:])
    assert networks.shown(networks.hidden).shape == (2, 6 + 15, len(THINGS) + 16 + 1)


def test_tokens_of_a_window_keep_their_coordinates():
    networks, features = random_networks(), TextFeatures(drawn(2, 5, 384, seed=1), None)
    x, t = drawn(2, 64, 2, 3), torch.tensor([0.3, 0.9])
    ids = sampling.image_ids(9, 8, 4).reshape(9, 8, -1)[4:6, 3:6].flatten(0, 1)
    txt_ids = sampling.text_ids(5, 4)
    expected = networks.transformer(x.flatten(2).mT, ids, features.tokens, txt_ids, t, None, None)
    moved = networks.velocity(features, x, t, corner=(4, 3))
    assert torch.equal(moved, expected.mT.unflatten(2, (2, 3)))
    full = predict_velocity(networks.transformer, Batch(x, features), 1.0, x, t)
    assert torch.equal(networks.velocity(features, x, t), full)


def test_windows_of_references_keep_their_coordinates():
    networks, others = random_networks(), [drawn(2, 64, 2, 3, seed=k) for k in (3, 4)]
    features = TextFeatures(drawn(2, 5, 384, seed=1), None)
    x, t = drawn(2, 64, 2, 3), torch.tensor([0.3, 0.9])
    tokens, ids = reference_tokens(others, 4)
    full = predict_velocity(networks.transformer, Batch(x, features, tokens, ids), 1.0, x, t)
    assert torch.equal(networks.velocity(features, x, t, torch.stack(others, dim=1)), full)
    ids = torch.cat([sampling.image_ids(2, 3, 4), ids]) + torch.tensor([0, 4, 3, 0])
    img = torch.cat([x.flatten(2).mT, tokens], dim=1)
    txt, txt_ids = features.tokens, sampling.text_ids(5, 4)
    expected = networks.transformer(img, ids, txt, txt_ids, t, None, None)[:, :6]
    moved = networks.velocity(features, x, t, torch.stack(others, dim=1), corner=(4, 3))
    assert torch.equal(moved, expected.mT.unflatten(2, (2, 3)))


def test_shown_loss_is_zero_for_right_predictions():
    """One token shows the third thing in its first part; the other shows the background."""
    things = torch.tensor([[2, 0]], dtype=torch.uint8)
    covered = torch.zeros(1, 2, 16, dtype=torch.uint8)
    covered[0, 0, 0] = 255
    kinds, parts = torch.full((1, 2, len(THINGS)), -30.0), torch.full((1, 2, 16), -30.0)
    kinds[0, 0, 2] = kinds[0, 1, 0] = parts[0, 0, 0] = 30
    rest = torch.full((1, 2, 1), 7.0)  # read by `changed_loss`

    def loss(kinds, parts):
        return shown_loss(torch.cat([kinds, parts, rest], -1), things, covered).item()

    assert loss(kinds, parts) < 1e-6
    assert loss(kinds.flip(1), parts) == pytest.approx(60)
    assert loss(kinds, parts.flip(1)) == pytest.approx(2 * 30 / 32)


def test_changed_loss_is_zero_for_right_predictions():
    """One of six tokens changes. Tokens of the result and of the reference predict the change."""
    before = drawn(1, 8, 2, 3)
    after = before + 0.2 * drawn(1, 8, 2, 3, seed=1)
    after[0, :, 1, 0] += 1
    logits = torch.full((1, 12, len(THINGS) + 17), 7.0)
    logits[..., -1] = -30
    logits[0, [3, 9], -1] = 30
    assert changed_loss(logits, after, before) < 1e-6
    for token in (3, 9, 4):
        wrong = logits.clone()
        wrong[0, token, -1] *= -1
        assert changed_loss(wrong, after, before).item() == pytest.approx(30 / 12)


def test_changed_tokens_are_those_of_the_recoloured_thing():
    """The latents are the shipped autoencoder's: nearly all tokens of the thing change."""
    encoder, hits, misses = flux.load("flux.2-tiny", device="cpu").image_encoder(), [], []

    def recolours_one_of_two(edit):
        return edit.kind == "colour" and len(edit.after.items) == 2

    for edit in itertools.islice(filter(recolours_one_of_two, toy.edits(5, held=None)), 3):
        layouts = edit.after, *edit.before
        pixels = to_pixels(np.stack([toy.draw(layout, 256, 256) for layout in layouts]))
        with torch.inference_mode():
            latents = encoder.encode(pixels)
        changed = (latents[0] - latents[1]).square().mean(0).sqrt() > CHANGED
        item = next(item for item in edit.after.items if item not in edit.before[0].items)
        covered = shown(replace(edit.after, items=(item,)), 256, 256)[1].mean(-1)
        hits.append(changed[covered > 128].double().mean())
        misses.append(changed[covered == 0].double().mean())
    assert np.mean(hits) > 0.9 and np.mean(misses) < 0.1


def test_neighbours_loss_is_zero_for_right_predictions_and_ignores_pads():
    """The last of five tokens is a pad, and beyond both ends there are pads."""
    ids, d = torch.tensor([[3, 1, 2, 5, 0]]), 8
    table = 90 * torch.eye(d)  # a prediction of 1 gives the logit 90 / √8 = 31.8, the others 0
    t5 = SimpleNamespace(shared=torch.nn.Embedding(d, d, _weight=table))
    text = SimpleNamespace(t5=t5, near=torch.nn.Identity())
    predicted = torch.zeros(1, 5, len(NEAR), d)
    for place, offset in itertools.product(range(4), NEAR):
        inside = 0 <= place + offset < 5
        predicted[0, place, NEAR.index(offset), ids[0, place + offset] if inside else 0] = 1

    def loss(predicted):
        return neighbours_loss(text, predicted.flatten(2), ids).item()

    assert loss(predicted) < 1e-6
    assert loss(predicted.flip(2)) > 10  # before is not after
    predicted[0, 4] = torch.randn(len(NEAR), d)
    assert loss(predicted) < 1e-6
    predicted[0, 1, NEAR.index(2)] = torch.eye(d)[4]  # 5 is right: one of 24 is wrong
    assert loss(predicted) == pytest.approx(90 / 8**0.5 / 24, rel=1e-3)


def test_heads_of_t5_first_attend_back_and_ahead_near_and_far():
    torch.manual_seed(0)
    t5 = new_networks(SPEC1).text.t5
    bias = t5.encoder.position_bias(32, "cpu")[0].detach()
    weights = bias.softmax(-1)[:, 16]  # (heads, keys): by the bias alone
    centres = (weights * (torch.arange(32) - 16)).sum(-1).tolist()
    assert centres[2] < centres[0] < -0.4 and 0.4 < centres[1] < centres[3]


@pytest.mark.parametrize("size", [(256, 256), (320, 192)])
def test_shown_things_are_those_of_the_drawing(size):
    """A token that shows a thing has its colour in the image; the others have the background."""
    for layout in itertools.islice(images(*size), 30):
        things, covered = shown(layout, *size)
        names = set()
        for item in layout.items:
            names |= (
                set(item.thing.letters) if isinstance(item.thing, toy.Word) else {item.thing.shape}
            )
        assert {THINGS[number] for number in np.unique(things)} - {None} == names
        image = toy.draw(layout, *size).astype(float)
        ground = np.array(toy.COLOURS[layout.background], float)
        height, width = things.shape
        away = np.abs(image - ground).max(-1).reshape(height, 16, width, 16)
        assert np.array_equal(away.max((1, 3)) > 0, things > 0)
        cells = away.reshape(height, 4, 4, width, 4, 4).max((2, 5)).transpose(0, 2, 1, 3)
        cells = cells.reshape(height, width, 16)
        assert not covered[cells == 0].any()
        assert covered[cells > 0].mean() > 128


def test_box_of_an_image_holds_its_things():
    for layout in itertools.islice(images(256, 256), 20):
        things, covered = shown(layout, 256, 256)
        rows, columns = np.nonzero(things)
        assert (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1) == box(covered)


def test_most_edits_of_one_image_change_one_of_its_things():
    some = [edit for edit, _ in itertools.islice(edits("edits-1"), 300)]
    assert 0.6 < np.mean([edit.kind in CHANGES for edit in some]) < 0.76
    assert {edit.kind for edit in some} == {*CHANGES, "background", "add", "described"}
    two = {edit.kind for edit, _ in itertools.islice(edits("edits-2"), 30)}
    assert two == {"two images: background", "two images: colour"}
    assert {edit.kind for edit, _ in itertools.islice(edits("families"), 60)} == set(CHANGES)


def test_letters_of_a_word_are_shown_apart():
    word = toy.Layout((toy.Item(toy.Word("AZ", "red"), 0.5, 0.5, 0.0),), "blue")
    things, _ = shown(word, 256, 256)
    left, right = (np.argwhere(things == THINGS.index(letter))[:, 1] for letter in "AZ")
    assert left.max() < right.min() and len(left) >= 6 and len(right) >= 6


# ------------------------------------------------------------------ training


def test_training_attention_equals_the_transformers():
    """The bits are equal in float64. Under autocast the error is at most twice that of torch."""
    q, k, v = (drawn(2, 50, 4, 32, seed=seed).double().requires_grad_() for seed in range(3))
    upstream = drawn(2, 50, 128, seed=3)
    rope = transformer.rope_table(sampling.image_ids(5, 10, 4), (8, 8, 8, 8), 2000, torch.float64)

    def run(attention, *inputs, dtype=torch.bfloat16):
        with (
            torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16),
            sdpa_kernel(SDPBackend.MATH),
        ):
            out = attention(*inputs, rope, None)
        return [out, *torch.autograd.grad((out * upstream).sum(), inputs)]

    exact = run(transformer.attention, q, k, v, dtype=torch.float64)
    assert all(map(torch.equal, run(attention, q, k, v, dtype=torch.float64), exact))
    single = [x.detach().float().requires_grad_() for x in (q, k, v)]
    for ours, theirs, truth in zip(
        run(attention, *single), run(transformer.attention, *single), exact, strict=True
    ):
        assert relative_l2(ours.double(), truth) <= 2 * relative_l2(theirs.double(), truth) <= 0.02


def test_training_attention_reads_a_cache():
    """With cached references, the transformer's own attention runs."""
    q, k, v, cached_k, cached_v = (drawn(2, 10, 4, 32, seed=seed) for seed in range(5))
    rope = transformer.rope_table(sampling.image_ids(5, 2, 4), (8, 8, 8, 8), 2000, torch.float64)
    results = []
    for attend in (attention, transformer.attention):
        cache = transformer.KVCache(text_length=4)
        cache.update(cached_k, cached_v)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(attend(q, k, v, rope, cache))
    assert torch.equal(*results)


@every_model
def test_muon_gets_the_matrices_of_blocks(spec):
    """It also gets the projection to neighbours. Modulations and tables are for AdamW."""
    networks = random_networks(spec)
    names = {id(p): path for path, p in networks.named_parameters()}
    muon, adam = (o.param_groups[0]["params"] for o in optimizers(networks, 1e-3, 1e-3, EDGES))
    blocks = (
        "_blocks.",
        "text.model.layers.",
        "text.t5.encoder.block.",
        "text.clip.text_model.encoder.layers.",
        "text.near.",
    )
    assert all(p.ndim == 2 and any(block in names[id(p)] for block in blocks) for p in muon)
    assert len(muon) + len(adam) == len(names)
    for p in adam:
        path = names[id(p)]
        exempt = ("_mod.", ".modulation.", "relative_attention_bias")
        in_block = any(block in path for block in blocks)
        assert p.ndim < 2 or any(part in path for part in exempt) or not in_block, path


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (24, 24)])
def test_muon_steps_as_torchs_does(shape, monkeypatch):
    """Without torch's rounding to bfloat16. Steps of 0.01 are exact to 1e-5 in weights of 1."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)
    start = drawn(*shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    each = [Muon([ours], 1e-2, 0.01), torch.optim.Muon([theirs], 1e-2, 0.01, adjust_lr_fn=MATCH)]
    for number in range(1, 5):
        ours.grad, theirs.grad = drawn(*shape, seed=number), drawn(*shape, seed=number)
        for optimizer in each:
            optimizer.step()
        assert relative_l2(ours - start, theirs - start) < 2e-5
    assert (theirs - start).abs().min() > 0


def test_stopped_run_resumes_with_its_state(tmp_path):
    def trainer(minutes):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        return TimedTrainer(
            model,
            optimizers(model, 1e-2, 1e-2, ("1.",)),
            tmp_path / "model.safetensors",
            minutes,
            0.9,
        )

    def loss_of(trainer):
        return lambda step: trainer.module(torch.full((2, 4), 1.0 + step % 3)).square().mean()

    first = trainer(minutes=0.005)
    first.run(loss_of(first))
    second = trainer(minutes=1)
    assert second.step == first.step > 0 and second.seconds == first.seconds
    for name, value in second.ema.items():
        assert torch.equal(value, first.ema[name])
    for before, after in zip(first.optimizers, second.optimizers, strict=True):
        old, new = (each.state_dict()["state"].values() for each in (before, after))
        for a, b in zip(old, new, strict=True):
            assert a and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize(
    "cooling, rates", [(0.4, [1, 1, 0.51, 0.01]), (1.0, [1, 0.51, 0.21, 0.01])]
)
def test_learning_rate_follows_the_clock(tmp_path, cooling, rates):
    """Rates are those at the start, half, four fifths and the end of a minute, after a warm-up."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    trainer = TimedTrainer(
        model, optimizers(model, 0.5, 0.1, ("1.",)), tmp_path / "model.safetensors", 1, 0.9, cooling
    )

    def now():
        trainer.update([lambda: model(torch.ones(2, 4)).square().mean()])
        return [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]

    assert now() == pytest.approx([0.5 / 200, 0.1 / 200])
    trainer.step = 1000
    for trainer.seconds, rate in zip((0, 30, 48, 60), rates, strict=True):
        assert now() == pytest.approx([0.5 * rate, 0.1 * rate])


def test_run_of_no_minutes_takes_no_step(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8))
    before = model[0].weight.detach().clone()
    trainer = TimedTrainer(
        model, optimizers(model, 1e-2, 1e-2, ()), tmp_path / "model.safetensors", minutes=0, ema=0.9
    )
    trainer.run(lambda step: model(torch.ones(2, 4)).square().mean())
    assert (
        trainer.step == 0 and torch.equal(model[0].weight, before) and not any(tmp_path.iterdir())
    )


def digits(latents: torch.Tensor) -> torch.Tensor:
    """(..., 3, h, w) -> (..., h, w)"""
    return torch.tensordot(latents.long().movedim(-3, -1), torch.tensor([10_000, 100, 1]), dims=1)


def files(run, count: int = 400, seed: int = 0) -> None:
    """Write files as `encode_all` does, in which tokens encode their position.

    The latents of a token are its image in the edit, its row and its column. Its thing is, in
    digits, the number of its text and the same position. The images are in no order.
    """
    rng = np.random.default_rng(seed)
    for name, (width, height), others in [
        *((f"latents-{w}x{h}", (w, h), 0) for w, h in SCENES),
        *((kind, (256, 256), 2 if kind == "edits-2" else 1) for kind in EDITS),
    ]:
        h, w = height // 16, width // 16
        axes = (torch.arange(n) for n in (1 + others, h, w))
        where = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=1).half()  # (1 + R, 3, h, w)
        which = torch.from_numpy(rng.permutation(count * (1 + others))).view(count, -1)
        order = which.flatten().argsort()
        first = np.stack([rng.integers(0, side - 3, len(order)) for side in (h, w)], axis=1)
        behind = np.stack(
            [rng.integers(first[:, axis] + 1, side + 1) for axis, side in enumerate((h, w))], axis=1
        )
        latents = where.repeat(count, 1, 1, 1)[order]
        numbers = torch.arange(1, count + 1).repeat_interleave(1 + others)[order]
        things = 1_000_000 * numbers.view(-1, 1, 1) + digits(latents)
        tensors = {
            "latents": latents,
            "things": things,
            "covered": 2 * things[..., None],
            "boxes": torch.from_numpy(np.concatenate([first, behind], axis=1)),
            "images": which,
        }
        save_tensors(run / f"{name}.safetensors", tensors)


def test_batches_are_of_images_and_of_edits(tmp_path):
    files(tmp_path)

    def words(texts):
        return {"ids": torch.tensor([[int(text or 0)] * 3 for text in texts])}

    words.first_that_fits = lambda texts: words([next(texts)])
    batches = Batches(tmp_path, words, torch.device("cpu"))
    for kind in batches.kinds:
        kind.text = lambda row, rng: str(row + 1)
    seen, empty, windows = set(), 0.0, 0
    for step in range(60):
        batch, again = batches(step), batches(step)
        assert torch.equal(again.latents, batch.latents)
        assert torch.equal(again.words["ids"], batch.words["ids"])
        ids, things, (top, left) = batch.words["ids"], batch.things, batch.corner
        number = 0 if batch.references is None else batch.references.shape[1]
        h, w = batch.latents.shape[2:]
        dropped = (ids == 0).all(1)
        assert torch.equal(2 * things[..., None], batch.covered)
        # all images of a text are its own
        assert (ids[~dropped, :1] == things[~dropped] // 1_000_000).all()
        axes = top + torch.arange(h), left + torch.arange(w)
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        images = [batch.latents, *(batch.references.unbind(1) if number else ())]
        for place, latents in enumerate(images):  # the result, then the references in their order
            assert (latents[:, 0] == place).all() and (latents[:, 1:] == coordinates).all()
        shown = torch.cat([digits(latents).flatten(1) for latents in images], dim=1)
        assert torch.equal(things % 1_000_000, shown)  # in the order of the tokens
        seen.add(number)
        empty += dropped.double().mean().item() / 60
        windows += (16 * w, 16 * h) not in SCENES
    assert seen == {0, 1, 2} and windows > 20
    assert 0.05 < empty < 0.15  # one caption in ten is dropped


def test_windows_hold_all_things_with_a_margin(tmp_path):
    files(tmp_path)
    rng, corners = np.random.default_rng(0), set()
    for size in ("256x256", "320x192"):
        some = LatentFile(tmp_path / f"latents-{size}.safetensors", str)
        for _ in range(200):
            rows, corner, size = some.some(8, rng)
            boxes, end = some.boxes[rows], np.add(corner, size)
            assert len(rows) == 8 and (boxes[:, :2] >= corner).all() and (boxes[:, 2:] <= end).all()
            assert min(corner) >= 0 and (end <= some.sides).all()
            assert (np.minimum(boxes[:, 2:] - boxes[:, :2] + 2, some.sides) <= size).all()
            corners.add(corner)
    assert len(corners) > 20


class Coloured(torch.nn.Module):
    """An autoencoder that shows each latent as a colour, and keeps the latents it decodes."""

    def __init__(self):
        super().__init__()
        self.decoder, self.decoded = torch.nn.Conv2d(1, 3, 1), []

    def decode(self, latents):
        self.decoded.append(int(latents[0, 0, 0, 0]))
        return self.decoder(latents.expand(-1, 1, 256, 256))


def test_decoder_is_trained_on_the_images_of_its_latents(tmp_path, monkeypatch):
    latents, numbers = torch.arange(8).half().view(8, 1, 1, 1), torch.arange(8).flip(0)[:, None]
    tensors = {"latents": latents, "images": numbers}
    save_tensors(tmp_path / "latents-256x256.safetensors", tensors)
    torch.manual_seed(0)
    model, wanted = Coloured(), []
    before = {name: p.detach().clone() for name, p in model.decoder.named_parameters()}
    image_loss = autoencoder.image_loss

    def recorded_loss(decoded, pixels):
        wanted.append(pixels)
        return image_loss(decoded, pixels)

    monkeypatch.setattr(autoencoder, "image_loss", recorded_loss)
    autoencoder.train_decoder(tmp_path, 0.01, torch.device("cpu"), model, count=5)
    drawn = [toy.draw(layout, 256, 256) for layout in itertools.islice(images(256, 256), 5)]
    assert len(model.decoded) == len(wanted) > 0 and set(model.decoded) <= set(range(3, 8))
    for row, pixels in zip(model.decoded, wanted, strict=True):
        assert np.array_equal(to_images(pixels)[0], drawn[7 - row])
    assert all(
        not p.requires_grad and not torch.equal(p, before[name])
        for name, p in model.decoder.named_parameters()
    )


# ------------------------------------------------------------------ captions


@every_model
def test_captions_fit_and_have_known_ids(spec, run):
    networks = random_networks(spec)
    rng = np.random.default_rng(0)
    scenes = list(itertools.islice(toy.scenes(5, held=None, complete=True), 500))
    tokenizer = Tokenizer(run[spec.name], spec)
    natural = (toy.worded(scene, rng) for scene in scenes)
    fitting = [tokenizer.first_that_fits(natural) for _ in range(251)]
    words = tokenizer(list(map(str, scenes)))  # raises UserError if one does not fit
    words = {name: torch.cat([x, *(some[name] for some in fitting)]) for name, x in words.items()}
    features = networks.text(**{part: x[:4] for part, x in words.items()})
    assert features.tokens.shape == (4, spec.text_length, spec.transformer.context_dim)
    if spec is SPEC:
        assert features.pooled is None
        tables = {"ids": SPEC.text.model.vocab_size}
    else:
        assert features.pooled.shape == (4, 128)
        tables = {"t5": SPEC1.text.t5.vocab_size, "clip": SPEC1.text.clip.vocab_size}
    for name, size in tables.items():
        assert 0 <= words[name].min() and words[name].max() < size


@every_model
def test_each_word_of_the_grammar_and_each_letter_is_one_token(spec, run):
    """CLIP's tokens are in lower case and may hold two letters: T5 reads the letters of a word."""
    space = {"tokenizer": " Ġ", "t5_tokenizer": " ▁", "clip_tokenizer": "</w> "}
    some = [str(scene) for scene in itertools.islice(toy.scenes(6, held=None), 400)]
    some = [text for text in some if '"' not in text]
    assert len(some) > 250

    def tokens_of(tokenizer, text):
        return tokenizer.tokenizer.encode(text, add_special_tokens=False).tokens

    for part, tokenizer in Tokenizer(run[spec.name], spec).parts.items():
        for text in some:
            joined = " ".join(tokens_of(tokenizer, text)).replace(space[part], " ")
            assert joined.strip("▁").removesuffix("</w>") == text
        if part != "clip_tokenizer":
            mark = space[part][1]
            tokens = [t.strip(mark) for t in tokens_of(tokenizer, 'the word "QXZA" in red')]
            assert tokens == ["the", "word", '"', "Q", "X", "Z", "A", '"', "in", "red"]


def test_end_of_text_has_the_id_that_clip_reads(run):
    ids = Tokenizer(run[SPEC1.name], SPEC1)(["a red circle"])["clip"][0]
    assert (ids == SPEC1.text.clip.eos_id).nonzero()[0] == 4  # after a start and three words


def test_t5_pieces_equal_those_of_sentencepiece(run):
    import sentencepiece

    truth = sentencepiece.SentencePieceProcessor(str(run[SPEC1.name] / SPEC1.text.t5_tokenizer[0]))
    ours = Tokenizer(run[SPEC1.name], SPEC1).parts["t5_tokenizer"]
    for text in (*texts()[::400], 'the word "QXZA" in red', "a photo of 12 cats?"):
        expected = [*truth.encode(text), 1]
        assert ours([text], 64).ids[0].tolist() == expected + [0] * (64 - len(expected))


# ------------------------------------------------------------------ reading


def test_completed_scene_keeps_what_is_said_and_names_the_rest():
    """The place of one thing stays open where all else is said."""
    rng, open_places = np.random.default_rng(0), 0
    for layout in itertools.islice(images(256, 256), 300):
        scene = toy.leave_open(toy.describe(layout), rng)
        whole = completed(scene)
        things = scene.objects * (1 if scene.count == 1 else 2)
        assert whole.count == 1 and completed(whole) == whole
        assert whole.background == (scene.background or whole.background) is not None
        for said, thing in zip(things, whole.objects, strict=True):
            for name, value in vars(thing).items():
                assert value == getattr(said, name) or not getattr(said, name), name
                assert value or name in ("pattern", "place"), name
            assert thing.colour != whole.background
        if len(things) == 2:
            named = scene.relation in toy.RELATIONS
            assert whole.relation == (scene.relation if named else "to the left of")
        elif whole.objects[0].place is None:
            open_places += 1
            assert scene == whole
    assert open_places > 0


def test_kinds_of_words_have_their_places():
    first = places(
        "a large striped red circle to the left of a small blue star on a white background"
    )
    assert first == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert places("a red circle on a white background") == [0, 3, 4, 14, 15, 16, 17]
    assert places('the word "AB" in red at the top') == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert places("make the ring red") == [0, 1, 2, 3] and places("") == []
    for _, meant in itertools.islice(reading(edited=True), 300):
        found = places(meant)
        assert found == sorted(set(found)) and (not found or found[-1] < MOST), meant


@every_model
def test_reading_loss_is_zero_only_for_the_completed_captions(spec, run):
    """The right features and tokens, those of other captions, and those in other rows."""
    home = models.EMBEDDED / spec.name
    networks, words = train.begin(spec, home), Tokenizer(home, spec)
    new = Tokenizer(run[spec.name], replace(reading_spec(spec), text=spec.text))
    readings = Readings(networks, words, new)
    batch = readings(list(itertools.islice(readings.that_fit(reading(edited=False)), 4)))
    table, letters = readings.table, readings([("", f'the word "{a}" in red') for a in LETTERS])
    assert letters.numbers[:, readings.before + 3].unique().numel() == len(LETTERS) == 26

    def loss(rows, tokens, numbers, pooled):
        features = batch.padding.repeat(1, new.spec.text_length, 1)
        halfway = torch.zeros(4, new.spec.text_length, table.shape[1])
        for target, values in ((features, tokens), (halfway, table[numbers])):
            target.scatter_(1, rows[..., None].expand_as(values), values)
        fake = SimpleNamespace(text=lambda **_: TextFeatures(features, pooled), halfway=halfway)
        fake.logits = partial(Reader.logits, fake)
        assert torch.equal(pick_rows(features, rows), tokens)
        with torch.no_grad():
            return reading_loss(fake, networks.transformer, table, batch).item()

    right = batch.rows, batch.tokens, batch.numbers, batch.pooled
    assert loss(*right) < 0.02  # a few tokens have similar embeddings
    others = [x if x is None else x.roll(1, 0) for x in right[1:]]
    assert loss(batch.rows, *others) > 0.5
    assert loss(batch.rows.flip(1), *right[1:]) > 0.5


@every_model
def test_reader_of_a_model_is_exported_with_its_transformer(spec, tmp_path, monkeypatch):
    home, target = models.EMBEDDED / spec.name, tmp_path / "tiny" / spec.name
    monkeypatch.setattr(reader, "TEXTS", 400)
    monkeypatch.setattr(toy, "open_prompts", partial(tuple, toy.open_prompts()[:3]))
    flags = f"--model {spec.name} --reader-of {home} --reading-minutes 0.001 --device cpu"
    arguments = f"train.py {tmp_path}/run {flags} --export {target}"
    monkeypatch.setattr("sys.argv", arguments.split())
    assert train.main() == 0
    for name in ("ae.safetensors", spec.transformer_file):
        assert (target / name).read_bytes() == (home / name).read_bytes()
    monkeypatch.setattr(models, "EMBEDDED", tmp_path / "tiny")
    monkeypatch.setitem(MODELS, spec.name, reading_spec(spec))
    pipe = flux.load(spec.name, device="cpu")
    features = pipe.encode("a red circle").tokens
    assert features.shape == (1, reading_spec(spec).text_length, spec.transformer.context_dim)
    (image,) = pipe("a red circle", steps=1)
    assert image.size == (256, 256)


# ------------------------------------------------------------------ the script


@every_model
def test_export_loads_strictly_and_makes_images(spec, run, tmp_path, monkeypatch):
    networks = random_networks(spec).to(torch.bfloat16).float()  # as the files have them
    network = networks.transformer
    if spec.transformer.guidance:
        network = make_student(network)
    home = tmp_path / spec.name
    train.export(home, run[spec.name], spec, AutoEncoder(spec.autoencoder), network, networks.text)
    assert infer_config(home / spec.transformer_file) == spec.transformer
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    pipe = flux.load(spec.name, device="cpu")
    (image,) = pipe("a red circle", steps=1)
    assert image.size == (256, 256) and np.asarray(image).dtype == np.uint8
    features = networks.text(**Tokenizer(run[spec.name], spec)(["a red circle"]))
    for ours, exported in zip(features, pipe.text.encode(["a red circle"]), strict=True):
        assert ours is exported or relative_l2(exported, ours) < 1e-5  # the padding differs
    begun = train.begin(spec, home)
    for name, x in begun.text.state_dict().items():
        assert torch.equal(x, networks.text.state_dict()[name]), name


def train_quickly(options: str, monkeypatch) -> None:
    """Run train.py on a few images, with a step or more of each training, without sheets."""
    monkeypatch.setattr(train.Sampler, "sheet", lambda *_: None)
    stages = "text", "transformer", "student", "decoder"
    minutes = " ".join(f"--{stage}-minutes 0.001" for stage in stages)
    flags = f"{options} --autoencoder-minutes 0 {minutes} --device cpu"
    monkeypatch.setattr("sys.argv", ["train.py", *flags.split()])
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "attention", transformer.attention)  # which training replaces
        assert train.main() == 0


@every_model
def test_all_stages_train_a_model_from_another(spec, tmp_path, monkeypatch):
    """flux.2-tiny starts from the shipped one, flux.1-tiny from its autoencoder and from itself."""
    for sizes in (SCENES, EDITS):
        for size in sizes:
            monkeypatch.setitem(sizes, size, 3)
    for references in BATCH:
        monkeypatch.setitem(BATCH, references, 2)
    few = partial(autoencoder.train_autoencoder, count=215)  # 129 of them are scenes
    monkeypatch.setattr(train, "train_autoencoder", few)
    before, after = models.EMBEDDED / SPEC.name, tmp_path / "tiny" / spec.name
    if spec is SPEC1:
        before, file = tmp_path / "first", before / "ae.safetensors"
        train_quickly(
            f"{tmp_path}/run --model {spec.name} --autoencoder {file} --export {before}",
            monkeypatch,
        )
    train_quickly(
        f"{tmp_path}/more --model {spec.name} --start-from {before} --export {after}", monkeypatch
    )
    for name in train.files_of(spec):
        if name.endswith(".safetensors"):
            old, new = (load_tensors(folder / name) for folder in (before, after))
            assert old.keys() == new.keys(), name
            assert any(not torch.equal(old[key], new[key]) for key in old), name
        else:
            assert (before / name).read_bytes() == (after / name).read_bytes()
    monkeypatch.setattr(models, "EMBEDDED", tmp_path / "tiny")
    (image,) = flux.load(spec.name, device="cpu")("a red circle", steps=1)
    assert image.size == (256, 256)


def test_flux2_autoencoder_makes_the_same_images_in_flux1_layout():
    """All parameters are random. Normalising the latents does not change the images either."""
    first = randomise(AutoEncoder(SPEC.autoencoder))
    first.bn.running_var.abs_().add_(0.1)
    second = autoencoder.in_flux1(first.state_dict(), SPEC1.autoencoder)
    pixels = drawn(2, 3, 32, 48)
    expected = first.decode(first.encode(pixels))
    assert relative_l2(second.decode(second.encode(pixels)), expected) < 1e-5
    images = np.random.default_rng(0).integers(0, 256, (128, 32, 32, 3), np.uint8)
    autoencoder.measure_statistics(second, images)
    assert relative_l2(second.decode(second.encode(pixels)), expected) < 1e-5
    latents = second.encode(autoencoder.to_pixels(images))
    assert latents.std().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--autoencoder-minutes 0", "--autoencoder FILE"),
        ("--autoencoder nowhere", "there is no such file"),
        ("--student-minutes -1", "0 or more"),
        ("--text-minutes inf", "0 or more"),
        ("--model flux.1-dev", "is unknown (got 'flux.1-dev', expected"),
        ("--transformer-minutes -1", "0 or more"),
        ("--decoder-minutes nan", "0 or more"),
        ("--start-from nowhere", "ae.safetensors is missing"),
        ("--reader-of nowhere", "--reader-of: ae.safetensors is missing"),
        ("--device abacus", "abacus is not available"),
    ],
)
def test_wrong_flags_are_refused_before_training(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", str(tmp_path / "run"), *options.split()])
    try:
        code = train.main()
    except SystemExit as refused:
        code = refused.code
    assert code == 2 and message in capsys.readouterr().err and not (tmp_path / "run").exists()
