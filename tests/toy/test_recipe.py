"""The recipe of the embedded models: its losses, optimizer and checkpoints, its batches, its tokenizer, the export.

Whether training works is shown by its product, in tests/test_embedded.py.
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
from flux.training.checkpoint import load_tensors, save_tensors
from flux.training.distillation import make_student
from flux.training.loss import Batch, predict_velocity
from flux.weights import locate as models
from flux.weights.load import infer_config

train = script("toy/train")  # whose folder is where the recipe is found from now on
from recipe import autoencoder
from recipe.attention import attention
from recipe.batches import Batches, Images
from recipe.images import to_images, to_pixels
from recipe.latents import CHANGES, EDITS, SCENES, THINGS, box, edits, images, shown
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
from recipe.text import NEAR, Tokenizer
from recipe.tokenizer import texts, train_tokenizers
from recipe.trainer import TimedTrainer, optimizers

pytestmark = pytest.mark.slow

SPEC, SPEC1 = MODELS["flux.2-tiny"], MODELS["flux.1-tiny"]
every_model = pytest.mark.parametrize("spec", [SPEC, SPEC1], ids=["flux.2", "flux.1"])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder for each model, with its tokenizers."""
    folders = {spec.name: tmp_path_factory.mktemp(spec.name) for spec in (SPEC, SPEC1)}
    for name, folder in folders.items():
        train_tokenizers(folder, MODELS[name].text)
    return folders


def random_networks(spec: ModelSpec = SPEC) -> Networks:
    """All that begins as zero, or as one, is something else."""
    torch.manual_seed(0)
    networks = new_networks(spec)
    with torch.no_grad():
        for p in networks.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return networks


# ---------------------------------------------------------------------------------------------------------- losses


class Oracle:
    """From x = (1 - t) · latents + t · noise follows noise - latents = (x - latents) / t."""

    def __init__(self, latents: torch.Tensor, factor: float = 1.0):
        self.latents, self.factor = latents, factor

    def velocity(self, features, x, t, references, corner):
        return self.factor * (x - self.latents) / t[:, None, None, None]


def test_the_loss_is_zero_for_the_true_velocity_and_only_for_it():
    latents = drawn(4, 8, 2, 3)
    assert flow_loss(Oracle(latents), latents, None) < 1e-9
    assert flow_loss(Oracle(latents, 0.9), latents, None) > 1e-3


def test_tokens_of_images_are_seen_half_way_through_the_single_blocks():
    """What is kept are the tokens that the fifth block reads, of the image and then of references, less those of the text."""
    networks = random_networks()
    blocks, seen = networks.transformer.single_blocks, []
    blocks[len(blocks) // 2].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    features, references = (
        TextFeatures(drawn(2, 5, 384, seed=1), None),
        drawn(2, 1, 64, 3, 5, seed=3),
    )
    networks.velocity(features, drawn(2, 64, 2, 3), torch.tensor([0.3, 0.9]), references)
    assert seen[0].shape[1] == 5 + 6 + 15
    assert torch.equal(networks.hidden, seen[0][:, 5:])
    assert networks.shown(networks.hidden).shape == (2, 6 + 15, len(THINGS) + 16 + 1)


def test_tokens_of_a_window_have_the_coordinates_that_they_have_in_the_image():
    networks, features = random_networks(), TextFeatures(drawn(2, 5, 384, seed=1), None)
    x, t = drawn(2, 64, 2, 3), torch.tensor([0.3, 0.9])
    ids, txt_ids = (
        sampling.image_ids(9, 8, 4).reshape(9, 8, -1)[4:6, 3:6].flatten(0, 1),
        sampling.text_ids(5, 4),
    )
    expected = networks.transformer(x.flatten(2).mT, ids, features.tokens, txt_ids, t, None, None)
    assert torch.equal(
        networks.velocity(features, x, t, corner=(4, 3)), expected.mT.unflatten(2, (2, 3))
    )
    whole = predict_velocity(networks.transformer, Batch(x, features), 1.0, x, t)
    assert torch.equal(networks.velocity(features, x, t), whole)


def test_windows_of_references_have_their_coordinates_too():
    networks, others = random_networks(), [drawn(2, 64, 2, 3, seed=k) for k in (3, 4)]
    features, x, t = (
        TextFeatures(drawn(2, 5, 384, seed=1), None),
        drawn(2, 64, 2, 3),
        torch.tensor([0.3, 0.9]),
    )
    tokens, ids = reference_tokens(others, 4)
    whole = predict_velocity(networks.transformer, Batch(x, features, tokens, ids), 1.0, x, t)
    assert torch.equal(networks.velocity(features, x, t, torch.stack(others, dim=1)), whole)
    ids = torch.cat([sampling.image_ids(2, 3, 4), ids]) + torch.tensor([0, 4, 3, 0])
    img = torch.cat([x.flatten(2).mT, tokens], dim=1)
    expected = networks.transformer(
        img, ids, features.tokens, sampling.text_ids(5, 4), t, None, None
    )[:, :6]
    moved = networks.velocity(features, x, t, torch.stack(others, dim=1), corner=(4, 3))
    assert torch.equal(moved, expected.mT.unflatten(2, (2, 3)))


def test_what_is_shown_costs_nothing_where_it_is_known():
    """Two tokens: one of a third thing, covered in its first part alone; one of the background."""
    things, covered = (
        torch.tensor([[2, 0]], dtype=torch.uint8),
        torch.zeros(1, 2, 16, dtype=torch.uint8),
    )
    covered[0, 0, 0] = 255
    kinds, parts = torch.full((1, 2, len(THINGS)), -30.0), torch.full((1, 2, 16), -30.0)
    kinds[0, 0, 2] = kinds[0, 1, 0] = parts[0, 0, 0] = 30
    rest = torch.full((1, 2, 1), 7.0)  # what `changed_loss` reads
    assert shown_loss(torch.cat([kinds, parts, rest], -1), things, covered) < 1e-6
    assert shown_loss(
        torch.cat([kinds.flip(1), parts, rest], -1), things, covered
    ).item() == pytest.approx(60)
    assert shown_loss(
        torch.cat([kinds, parts.flip(1), rest], -1), things, covered
    ).item() == pytest.approx(2 * 30 / 32)


def test_what_an_edit_changes_costs_nothing_where_it_is_known():
    """Of two rows of three tokens one is another; that is asked of the result's tokens, and of those of the image before."""
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


def test_in_drawn_images_changes_are_told_from_what_is_beside_them():
    """By the shipped autoencoder: where a thing is recoloured, nearly all of its tokens change, and hardly any others do."""
    encoder, hits, misses = flux.load("flux.2-tiny", device="cpu").image_encoder(), [], []
    some = (
        edit
        for edit in toy.edits(5, held=None)
        if edit.kind == "colour" and len(edit.after.items) == 2
    )
    for edit in itertools.islice(some, 4):
        with torch.inference_mode():
            latents = encoder.encode(
                to_pixels(np.stack([toy.draw(x, 256, 256) for x in (edit.after, *edit.before)]))
            )
        changed = (latents[0] - latents[1]).square().mean(0).sqrt() > CHANGED
        item = next(item for item in edit.after.items if item not in edit.before[0].items)
        covered = shown(replace(edit.after, items=(item,)), 256, 256)[1].mean(-1)
        hits.append(changed[covered > 128].double().mean())
        misses.append(changed[covered == 0].double().mean())
    assert np.mean(hits) > 0.9 and np.mean(misses) < 0.1


def test_neighbours_cost_nothing_where_they_are_told_and_pads_need_not_tell_any():
    """Of five tokens, each with a vector of its own, the last is a pad; beyond both ends there are pads."""
    ids, d = torch.tensor([[3, 1, 2, 5, 0]]), 8
    table = 90 * torch.eye(
        d
    )  # told by 1, a token has the logit 90 / √8 = 31.8, and the other seven have 0
    text = SimpleNamespace(
        t5=SimpleNamespace(shared=torch.nn.Embedding(d, d, _weight=table)), near=lambda told: told
    )
    told = torch.zeros(1, 5, len(NEAR), d)
    for place, offset in itertools.product(range(4), NEAR):
        inside = 0 <= place + offset < 5
        told[0, place, NEAR.index(offset), ids[0, place + offset] if inside else 0] = 1

    def loss(told):
        return neighbours_loss(text, told.flatten(2), ids).item()

    assert loss(told) < 1e-6
    assert loss(told.flip(2)) > 10  # what comes before is not what comes after
    told[0, 4] = torch.randn(len(NEAR), d)
    assert loss(told) < 1e-6
    told[0, 1, NEAR.index(2)] = torch.eye(d)[4]  # 5 stands there: one of 24 is wrong
    assert loss(told) == pytest.approx(90 / 8**0.5 / 24, rel=1e-3)


def test_heads_of_t5_begin_with_looks_back_and_ahead_near_and_far():
    torch.manual_seed(0)
    t5 = new_networks(SPEC1).text.t5
    weights = (
        t5.encoder.position_bias(32, "cpu")[0].softmax(-1)[:, 16].detach()
    )  # (heads, keys): by the bias alone
    centres = (weights * (torch.arange(32) - 16)).sum(-1).tolist()
    assert centres[2] < centres[0] < -0.4 and 0.4 < centres[1] < centres[3]


@pytest.mark.parametrize("size", [(256, 256), (320, 192)])
def test_what_tokens_show_is_what_is_drawn(size):
    """Where a token shows a thing, it has its colour in the image, as much as is said; elsewhere there is background."""
    for scene, (layout,) in itertools.islice(images(*size), 60):
        things, covered = shown(layout, *size)
        names = {THINGS[number] for number in np.unique(things)} - {None}
        things_of = [item.thing for item in layout.items]
        assert names == {
            name
            for x in things_of
            for name in (x.letters if isinstance(x, toy.Word) else [x.shape])
        }
        image, ground = (
            toy.draw(layout, *size).astype(float),
            np.array(toy.COLOURS[layout.background], float),
        )
        height, width = things.shape
        away = np.abs(image - ground).max(-1).reshape(height, 16, width, 16)
        assert np.array_equal(away.max((1, 3)) > 0, things > 0)
        cells = (
            away.reshape(height, 4, 4, width, 4, 4)
            .max((2, 5))
            .transpose(0, 2, 1, 3)
            .reshape(height, width, 16)
        )
        assert not covered[cells == 0].any() and (covered[cells > 0]).mean() > 128 * (
            len(layout.items) > 0
        )


def test_the_box_of_a_image_holds_what_it_shows():
    for _, (layout,) in itertools.islice(images(256, 256), 20):
        things, covered = shown(layout, 256, 256)
        rows, columns = np.nonzero(things)
        assert (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1) == box(covered)


def test_most_edits_of_one_image_are_about_one_of_its_things():
    some = [edit for edit, _ in itertools.islice(edits("edits-1"), 300)]
    assert 0.6 < np.mean([edit.kind in CHANGES for edit in some]) < 0.76
    assert {edit.kind for edit in some} == {*CHANGES, "background", "add", "described"}
    two = {edit.kind for edit, _ in itertools.islice(edits("edits-2"), 30)}
    assert two == {"two images: background", "two images: colour"}
    assert {edit.kind for edit, _ in itertools.islice(edits("families"), 60)} == set(CHANGES)


def test_letters_are_told_apart():
    word = toy.Layout((toy.Item(toy.Word("AZ", "red"), 0.5, 0.5, 0.0),), "blue")
    things, _ = shown(word, 256, 256)
    left, right = (np.argwhere(things == THINGS.index(letter))[:, 1] for letter in "AZ")
    assert left.max() < right.min() and len(left) >= 6 and len(right) >= 6


# ---------------------------------------------------------------------------------------------------------- training


def test_training_attention_equals_the_transformers():
    """Bit for bit in float64; under autocast, with at most twice the error of torch's attention."""
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
def test_muon_is_for_the_blocks_matrices(spec):
    """With what tells of T5's neighbours, without what makes vectors of time and prompt into modulations, or is a table."""
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
        assert (
            p.ndim < 2
            or any(part in path for part in exempt)
            or not any(block in path for block in blocks)
        ), path


def test_a_stopped_run_goes_on_with_the_state_that_it_had(tmp_path):
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
        states = zip(
            before.state_dict()["state"].values(), after.state_dict()["state"].values(), strict=True
        )
        for a, b in states:
            assert a and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize(
    "cooling, rates", [(0.4, [1, 1, 0.51, 0.01]), (1.0, [1, 0.51, 0.21, 0.01])]
)
def test_the_learning_rate_follows_the_clock(tmp_path, cooling, rates):
    """At the start, half, four fifths and the end of a minute; the first steps are small."""
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


def test_no_minutes_are_no_steps(tmp_path):
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
    """As `encode_all` writes them, but a token's latents say where it is: in which image of an edit, row and column.

    What it shows is the number of its text in the file, and the same, in digits. The images are in no order.
    """
    rng = np.random.default_rng(seed)
    for name, (width, height), others in [
        *((f"latents-{w}x{h}", (w, h), 0) for w, h in SCENES),
        *((kind, (256, 256), 2 if kind == "edits-2" else 1) for kind in EDITS),
    ]:
        h, w = height // 16, width // 16
        axes = (torch.arange(n) for n in (1 + others, h, w))
        where = torch.stack(
            torch.meshgrid(*axes, indexing="ij"), dim=1
        ).half()  # (1 + others, 3, h, w)
        which = torch.from_numpy(rng.permutation(count * (1 + others))).view(count, -1)
        order = which.flatten().argsort()
        ids = torch.arange(1, count + 1)[:, None].expand(count, 3)
        first = np.stack([rng.integers(0, side - 3, len(order)) for side in (h, w)], axis=1)
        behind = np.stack(
            [rng.integers(first[:, axis] + 1, side + 1) for axis, side in enumerate((h, w))], axis=1
        )
        latents = where.repeat(count, 1, 1, 1)[order]
        things = 1_000_000 * ids[:, 0].repeat_interleave(1 + others)[order].view(-1, 1, 1) + digits(
            latents
        )
        save_tensors(
            run / f"{name}.safetensors",
            {
                "latents": latents,
                "ids": ids,
                "things": things,
                "covered": 2 * things[..., None],
                "boxes": torch.from_numpy(np.concatenate([first, behind], axis=1)),
                "images": which,
            },
        )


def test_batches_are_of_images_and_of_edits(tmp_path):
    files(tmp_path)
    batches = Batches(tmp_path, {"ids": torch.zeros(1, 3, dtype=torch.int64)})
    seen, empty, windows = set(), 0.0, 0
    for step in range(60):
        batch, again = batches(step), batches(step)
        assert torch.equal(again.latents, batch.latents) and torch.equal(
            again.words["ids"], batch.words["ids"]
        )
        ids, things, (top, left) = batch.words["ids"], batch.things, batch.corner
        number, (h, w) = (
            0 if batch.references is None else batch.references.shape[1],
            batch.latents.shape[2:],
        )
        dropped = (ids == 0).all(1)
        assert torch.equal(2 * things[..., None], batch.covered)
        assert (
            ids[~dropped, :1] == things[~dropped] // 1_000_000
        ).all()  # all images of a text are its own
        coordinates = torch.stack(
            torch.meshgrid(top + torch.arange(h), left + torch.arange(w), indexing="ij")
        )
        images = [batch.latents, *(batch.references.unbind(1) if number else ())]
        for place, latents in enumerate(
            images
        ):  # the result first, then those before in their order
            assert (latents[:, 0] == place).all() and (latents[:, 1:] == coordinates).all()
        shown = torch.cat([digits(latents).flatten(1) for latents in images], dim=1)
        assert torch.equal(things % 1_000_000, shown)  # in the order of the tokens
        seen.add(number)
        empty += dropped.double().mean().item() / 60
        windows += (h, w) not in [(height // 16, width // 16) for width, height in SCENES]
    assert seen == {0, 1, 2} and 0.05 < empty < 0.15  # a tenth of the captions is left out
    assert windows > 20


def test_windows_hold_all_that_a_image_shows_with_room_to_spare(tmp_path):
    files(tmp_path)
    rng, corners = np.random.default_rng(0), set()
    for some in (
        Images(tmp_path / "latents-256x256.safetensors"),
        Images(tmp_path / "latents-320x192.safetensors"),
    ):
        for _ in range(200):
            rows, corner, size = some.some(8, rng)
            boxes, end = some.boxes[rows], np.add(corner, size)
            assert len(rows) == 8 and (boxes[:, :2] >= corner).all() and (boxes[:, 2:] <= end).all()
            assert min(corner) >= 0 and (end <= some.sides).all()
            assert (np.minimum(boxes[:, 2:] - boxes[:, :2] + 2, some.sides) <= size).all()
            corners.add(corner)
    assert len(corners) > 20


class Coloured(torch.nn.Module):
    """An autoencoder that shows each latent as a colour, and keeps what it was asked for."""

    def __init__(self):
        super().__init__()
        self.decoder, self.asked = torch.nn.Conv2d(1, 3, 1), []

    def decode(self, latents):
        self.asked.append(int(latents[0, 0, 0, 0]))
        return self.decoder(latents.expand(-1, 1, 256, 256))


def test_the_decoder_learns_from_the_images_that_its_latents_are_of(tmp_path, monkeypatch):
    save_tensors(
        tmp_path / "latents-256x256.safetensors",
        {
            "latents": torch.arange(8).half().view(8, 1, 1, 1),
            "images": torch.arange(8).flip(0)[:, None],
        },
    )
    torch.manual_seed(0)
    model, wanted = Coloured(), []
    before = {name: p.detach().clone() for name, p in model.decoder.named_parameters()}
    straight = autoencoder.image_loss
    monkeypatch.setattr(
        autoencoder,
        "image_loss",
        lambda made, pixels: wanted.append(pixels) or straight(made, pixels),
    )
    autoencoder.train_decoder(tmp_path, 0.01, torch.device("cpu"), model, count=5)
    drawn = [toy.draw(layout, 256, 256) for _, (layout,) in itertools.islice(images(256, 256), 5)]
    assert len(model.asked) == len(wanted) > 0 and set(model.asked) <= set(range(3, 8))
    for row, pixels in zip(model.asked, wanted, strict=True):
        assert np.array_equal(to_images(pixels)[0], drawn[7 - row])
    assert all(
        not p.requires_grad and not torch.equal(p, before[name])
        for name, p in model.decoder.named_parameters()
    )


# ---------------------------------------------------------------------------------------------------------- captions


@every_model
def test_captions_fit_and_have_ids_that_the_encoder_knows(spec, run):
    networks = random_networks(spec)
    captions = [
        str(scene) for scene in itertools.islice(toy.scenes(5, held=None, complete=True), 500)
    ]
    words = Tokenizer(run[spec.name], spec)(captions)  # UserError, if one does not fit
    features = networks.text(**{part: x[:4] for part, x in words.items()})
    assert features.tokens.shape == (4, 32, spec.transformer.context_dim)
    assert (features.pooled is None) if spec is SPEC else features.pooled.shape == (4, 128)
    tables = (
        {"ids": 512}
        if spec is SPEC
        else {"t5": SPEC1.text.t5.vocab_size, "clip": SPEC1.text.clip.vocab_size}
    )
    for name, size in tables.items():
        assert 0 <= words[name].min() and words[name].max() < size


@every_model
def test_a_word_of_the_grammar_is_one_token_and_written_letters_are_one_each(spec, run):
    """CLIP reads letters in lower case, and two of them may be one token there: what is written comes from T5."""
    space = {"tokenizer": " Ġ", "t5_tokenizer": " ▁", "clip_tokenizer": "</w> "}
    some = [
        text for text in texts() if '"' not in text and not {"it", "plain"} & set(text.split())
    ][::20]
    assert len(some) > 300
    for part, tokenizer in Tokenizer(run[spec.name], spec).parts.items():
        read = lambda text: [
            t for t in tokenizer.tokenizer.encode(text, add_special_tokens=False).tokens
        ]
        for text in some:
            assert (
                " ".join(read(text)).replace(space[part], " ").strip("▁").removesuffix("</w>")
                == text
            )
        if part != "clip_tokenizer":
            mark = space[part][1]
            tokens = [token.strip(mark) for token in read('the word "QXZA" in red')]
            assert tokens == ["the", "word", '"', "Q", "X", "Z", "A", '"', "in", "red"]


def test_an_end_of_text_has_the_number_that_clip_looks_for(run):
    ids = Tokenizer(run[SPEC1.name], SPEC1)(["a red circle"])["clip"][0]
    assert (ids == SPEC1.text.clip.eos_id).nonzero()[0] == 4  # after a start and three words


def test_t5s_pieces_are_those_that_sentencepiece_finds(run):
    import sentencepiece

    truth = sentencepiece.SentencePieceProcessor(str(run[SPEC1.name] / SPEC1.text.t5_tokenizer[0]))
    ours = Tokenizer(run[SPEC1.name], SPEC1).parts["t5_tokenizer"]
    for text in (*texts()[::400], 'the word "QXZA" in red', "a photo of 12 cats?"):
        assert ours([text], 64).ids[0].tolist() == [*truth.encode(text), 1] + [0] * (
            63 - len(truth.encode(text))
        )


# ---------------------------------------------------------------------------------------------------------- the script


@every_model
def test_what_it_exports_loads_strictly_and_makes_images(spec, run, tmp_path, monkeypatch):
    networks = random_networks(spec).to(torch.bfloat16).float()  # as the files have them
    network = (
        make_student(networks.transformer) if spec.transformer.guidance else networks.transformer
    )
    home = tmp_path / spec.name
    train.export(home, run[spec.name], spec, AutoEncoder(spec.autoencoder), network, networks.text)
    assert infer_config(home / spec.transformer_file) == spec.transformer
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    pipe = flux.load(spec.name, device="cpu")
    (image,) = pipe("a red circle", steps=1)
    assert image.size == (256, 256) and np.asarray(image).dtype == np.uint8
    features = networks.text(**Tokenizer(run[spec.name], spec)(["a red circle"]))
    for ours, exported in zip(features, pipe.text.encode(["a red circle"]), strict=True):
        assert (
            ours is exported or relative_l2(exported, ours) < 1e-5
        )  # batches, and padding, differ
    begun = train.begin(spec, home)
    for name, x in begun.text.state_dict().items():
        assert torch.equal(x, networks.text.state_dict()[name]), name


def made_by(options: str, monkeypatch) -> None:
    """What toy.py makes of a few images, in a step or more of each training, without a look at it."""
    monkeypatch.setattr(train.Sampler, "sheet", lambda *_: None)
    stages = "text", "transformer", "student", "decoder"
    minutes = " ".join(
        ["--autoencoder-minutes 0", *(f"--{stage}-minutes 0.001" for stage in stages)]
    )
    monkeypatch.setattr(
        "sys.argv", ["train.py", *options.split(), *minutes.split(), "--device", "cpu"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            transformer, "attention", transformer.attention
        )  # training puts its own there
        assert train.main() == 0


@every_model
def test_all_stages_make_a_model_of_another_one(spec, tmp_path, monkeypatch):
    """flux.2-tiny of the shipped one; flux.1-tiny of that one's autoencoder, and another one of what was made."""
    for sizes in (SCENES, EDITS):
        for size in sizes:
            monkeypatch.setitem(sizes, size, 3)
    few = partial(autoencoder.train_autoencoder, count=215)  # 129 of them are scenes
    monkeypatch.setattr(train, "train_autoencoder", few)
    before, made = models.EMBEDDED / SPEC.name, tmp_path / "tiny" / spec.name
    if spec is SPEC1:
        before, file = tmp_path / "first", before / "ae.safetensors"
        made_by(
            f"{tmp_path}/run --model {spec.name} --autoencoder {file} --export {before}",
            monkeypatch,
        )
    made_by(
        f"{tmp_path}/more --model {spec.name} --start-from {before} --export {made}", monkeypatch
    )
    for name in train.files_of(spec):
        if name.endswith(".safetensors"):
            old, new = (load_tensors(folder / name) for folder in (before, made))
            assert old.keys() == new.keys() and any(
                not torch.equal(old[key], new[key]) for key in old
            ), name
        else:
            assert (before / name).read_bytes() == (made / name).read_bytes()
    monkeypatch.setattr(models, "EMBEDDED", tmp_path / "tiny")
    (image,) = flux.load(spec.name, device="cpu")("a red circle", steps=1)
    assert image.size == (256, 256)


def test_an_autoencoder_of_flux2_makes_the_same_images_in_flux1s_layout():
    """All parameters random; then latents are made normal, and the images are still the same."""
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
    "options, told",
    [
        ("--autoencoder-minutes 0", "--autoencoder FILE"),
        ("--autoencoder nowhere", "there is no such file"),
        ("--student-minutes -1", "0 or more"),
        ("--text-minutes inf", "0 or more"),
        ("--model flux.1-dev", "invalid choice"),
        ("--transformer-minutes -1", "0 or more"),
        ("--decoder-minutes nan", "0 or more"),
        ("--start-from nowhere", "ae.safetensors is not there"),
        ("--device abacus", "abacus is not available"),
    ],
)
def test_what_cannot_be_made_is_refused_before_it_begins(
    options, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["train.py", str(tmp_path / "run"), *options.split()])
    try:
        code = train.main()
    except SystemExit as refused:
        code = refused.code
    assert code == 2 and told in capsys.readouterr().err and not (tmp_path / "run").exists()
