"""Training of FLUX 3: gradients, LoRA files, times, and what only references reach.

Compared with: diffusers' transformer with the same weights and PEFT's LoRA, in float64.
"""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from support.training import network_loss, random, random_batch
from torch import Tensor, nn

from flux import sampling
from flux.configs import MODELS
from flux.parity.reference import FLUX3_TINY, loaded, max_error, randomise, relative_l2
from flux.parity.reference3 import (
    diffusers_transformer3,
    diffusers_velocity3,
    transformer3_to_diffusers,
)
from flux.training import loss
from flux.training.checkpoint import save_tensors
from flux.training.lora import add_lora, lora_state_dict
from flux.training.networks import freeze_unreached, round_times
from flux.training.trainer import Trainer, make_optimizer, trainable_parameters, warmup_cosine
from flux.transformer3 import Flux3, timestep_embedding
from flux.weights.diffusers_names3 import diffusers_layer

T, RANK = torch.tensor([0.3, 0.8], dtype=torch.float64), 3


def double_batch() -> loss.Batch:
    """Two samples, each at its own time, with references."""
    batch = random_batch(FLUX3_TINY, references=True)
    features = batch.features._replace(tokens=batch.features.tokens.double())
    return batch._replace(
        latents=batch.latents.double(), features=features, references=batch.references.double()
    )


def network() -> Flux3:
    return randomise(Flux3(FLUX3_TINY, modulation_dtype=None)).double()  # type: ignore[return-value]


def diffusers_twin(ours: Flux3) -> nn.Module:
    return loaded(diffusers_transformer3(ours.config), transformer3_to_diffusers(ours.state_dict()))


def our_loss(ours: Flux3, batch: loss.Batch, noise: Tensor) -> Tensor:
    velocity = partial(loss.predict_velocity, ours, batch, 1.0)
    return loss.rectified_flow_loss(velocity, batch.latents, T.to(noise), noise)


def their_loss(theirs: nn.Module, batch: loss.Batch, noise: Tensor) -> Tensor:
    """The loss written out, of diffusers' velocity."""

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(2).mT

    t, image, noise = T[:, None, None], tokens(batch.latents), tokens(noise)
    velocity = diffusers_velocity3(
        theirs,
        img=(1 - t) * image + t * noise,
        img_ids=sampling.flux3_image_ids(3, 4),
        txt=batch.features.tokens,
        txt_ids=sampling.text_ids(7, 4),
        t=T,
        references=batch.references,
        reference_ids=batch.reference_ids,
    )
    return (velocity - (noise - image)).square().mean()


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    assert all(x.norm() > 0 for x in theirs.values())  # every weight has a part in the loss
    return max(relative_l2(ours[name], theirs[name]) for name in ours)


def test_gradients_of_all_weights_equal_diffusers():
    """Queries and keys are float32 in both networks, and the velocity in our loss. Seen: 4e-7."""
    batch, noise, ours = double_batch(), random(2, 16, 3, 4, seed=5).double(), network()
    theirs = diffusers_twin(network()).requires_grad_(True)
    ours.requires_grad_(True)
    values = our_loss(ours, batch, noise), their_loss(theirs, batch, noise)
    for value in values:
        value.backward()
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    gradients = transformer3_to_diffusers({name: p.grad for name, p in ours.named_parameters()})
    assert largest_error(gradients, {n: p.grad for n, p in theirs.named_parameters()}) < 5e-6


def with_random_lora(ours: Flux3, references: bool = True) -> Flux3:
    add_lora(ours, RANK, references=references)
    for name, p in trainable_parameters(ours).items():
        p.data = 0.5 * random(*p.shape, seed=len(name)).to(next(ours.parameters()).dtype)
        p.data /= p.shape[1] ** 0.5
    return ours


def test_gradients_of_a_lora_equal_pefts():
    """The bound of the gradients of all weights."""
    from peft import LoraConfig

    batch, noise, ours = double_batch(), random(2, 16, 3, 4, seed=5).double(), network()
    theirs = diffusers_twin(network())
    with_random_lora(ours)
    paths = [name.removesuffix(".lora_A.weight") for name in trainable_parameters(ours)]
    paths = [path for path in paths if not path.endswith(".weight")]
    names = {path: diffusers_layer(path) for path in paths}
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(names.values())))
    pairs = {}
    for path, name in names.items():
        for kind in ("lora_A", "lora_B"):
            factor = getattr(ours.get_submodule(path), kind).weight
            twin = getattr(theirs.get_submodule(name), kind)["default"].weight
            twin.data = factor.data.clone()
            pairs[f"{path}.{kind}"] = factor, twin
    assert len(pairs) == 2 * 6 * (3 * FLUX3_TINY.depth + FLUX3_TINY.depth_single)
    for value in (our_loss(ours, batch, noise), their_loss(theirs, batch, noise)):
        value.backward()
    gradients = ({name: pair[side].grad for name, pair in pairs.items()} for side in (0, 1))
    assert largest_error(*gradients) < 5e-6


def test_diffusers_loads_the_trained_lora(tmp_path: Path):
    """Its loader of FLUX 3 takes the file, and leaves out no layer."""
    from diffusers.loaders.lora_pipeline import Flux3LoraLoaderMixin

    batch, x, ours = double_batch(), random(2, 16, 3, 4).double(), network()
    theirs = diffusers_twin(network())
    tensors = lora_state_dict(with_random_lora(ours))
    save_tensors(tmp_path / "lora.safetensors", tensors, {"format": "pt"})

    def velocity() -> Tensor:
        ids = dict(img_ids=sampling.flux3_image_ids(3, 4), txt_ids=sampling.text_ids(7, 4))
        given = dict(references=batch.references, reference_ids=batch.reference_ids)
        img, txt = x.flatten(2).mT, batch.features.tokens
        return diffusers_velocity3(theirs, img=img, txt=txt, t=T, **ids, **given).detach()

    before = velocity()
    state, metadata = Flux3LoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name="lora.safetensors", return_lora_metadata=True
    )
    Flux3LoraLoaderMixin.load_lora_into_transformer(state, theirs, metadata=metadata)
    expected = loss.predict_velocity(ours, batch, 1.0, x, T).flatten(2).mT.detach()
    assert max_error(velocity(), before) > 0.05
    assert max_error(velocity(), expected) < 1e-5  # queries and keys are float32


# ------------------------------------------------------------------ references


def test_nothing_that_only_references_reach_is_trained_without_them():
    ours = randomise(Flux3(FLUX3_TINY)).requires_grad_(True)
    freeze_unreached(ours)
    batch, noise = random_batch(FLUX3_TINY), random(2, 16, 3, 4)
    our_loss(ours, batch, noise).backward()
    for name, p in ours.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (".image_cond." not in name), name
    paths = add_lora(randomise(Flux3(FLUX3_TINY)), RANK, references=False)
    assert paths and not any(".image_cond." in path for path in paths)


def test_run_resumes_before_its_first_sample_with_references(tmp_path: Path):
    """Each checkpoint has an optimizer's state of all weights, whichever samples came so far."""

    def trainer() -> Trainer:
        ours = with_random_lora(randomise(Flux3(FLUX3_TINY)))
        optimizer = make_optimizer("adamw", trainable_parameters(ours).values(), 0.01)
        path = tmp_path / "checkpoint.safetensors"
        return Trainer(ours, path, {}, [optimizer], warmup_cosine(4))

    def step(trainer: Trainer, references: bool) -> None:
        batch, noise = random_batch(FLUX3_TINY, references=references), random(2, 16, 3, 4)
        trainer.update([lambda: our_loss(trainer.module, batch, noise)])

    whole = trainer()
    step(whole, False)
    whole.save()
    step(whole, True)
    resumed = trainer()
    assert resumed.step == 1
    step(resumed, True)
    for name, p in whole.parameters.items():
        assert torch.equal(p, resumed.parameters[name]), name


# ------------------------------------------------------------------ times


def test_training_times_have_the_samplers_shift():
    spec = MODELS["flux.3-image-klein-base"]
    for tokens in (256, 4096):
        mu = loss.schedule_mu(spec, tokens)
        t = loss.shifted_times(torch.tensor([0.0, 1.0]).double(), mu)
        even = 1 / (1 + torch.exp(-torch.tensor([0.0, 1.0]).double()))
        assert max_error(t, 6.93 * even / (1 + 5.93 * even)) < 1e-12
    assert mu == pytest.approx(math.log(6.93))


def test_float32_weights_see_the_times_of_bfloat16():
    """Literals: 1000 t of the sampler's 16 steps, as bfloat16 rounds them."""
    ours, seen = randomise(Flux3(FLUX3_TINY)), []
    ours.time_in.in_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    times = torch.tensor([0.9904717, 0.9798021, 0.9677731, 0.9541074, 0.6978852, 0.3160055])
    round_times(ours, torch.float32)
    ours.vec(times)
    round_times(ours, torch.bfloat16)
    ours.vec(times)
    rounded = torch.tensor([992.0, 980, 968, 952, 700, 316])
    # 1000 (992 / 1000) is rounded to float32
    assert max_error(seen[1], timestep_embedding(rounded)) < 1e-4
    assert torch.equal(seen[0], timestep_embedding(1000 * times))


def test_bfloat16_products_keep_the_loss():
    """The products of the toys' other families differ as much. Seen: 0.4 %."""
    value = network_loss(randomise(Flux3(FLUX3_TINY)))
    rounded = network_loss(randomise(Flux3(FLUX3_TINY)), dtype=torch.bfloat16)
    assert rounded != value and abs(rounded / value - 1) < 0.02
