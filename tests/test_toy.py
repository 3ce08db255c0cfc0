"""The script that makes the toy: its loss, its optimizer, its checkpoints, and that what it exports is a model that loads.

Whether training works is shown by its product, in tests/test_embedded.py.
"""


import numpy as np
import pytest
import torch
from scripted import script

import flux
from flux import models
from flux.autoencoder import AutoEncoder


@pytest.fixture(scope="module")
def toy():
    return script("toy")


def test_the_loss_is_zero_for_the_true_velocity_and_only_for_it(toy):
    latents = torch.randn(4, 8, 2, 3, generator=torch.Generator().manual_seed(0))

    class Oracle:  # from x = (1 - t) · latents + t · noise follows noise - latents = (x - latents) / t
        def velocity(self, x, t, ids, mask):
            return (x - latents) / t[:, None, None, None]

    class Shy(Oracle):
        def velocity(self, *args):
            return 0.9 * super().velocity(*args)

    assert toy.rectified_flow_loss(Oracle(), latents, None, None) < 1e-9
    assert toy.rectified_flow_loss(Shy(), latents, None, None) > 1e-3


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_muon_makes_its_updates_nearly_orthogonal(toy, shape):
    spread = torch.diag(torch.linspace(0.1, 10, 16))  # singular values a hundredfold apart
    matrix = spread @ torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    singular = torch.linalg.svdvals(toy.orthogonal(matrix.reshape(16, 64) if shape[0] == 16 else matrix.T))
    assert singular.max() < 1.3 and singular.min() > 0.1
    assert singular.max() / singular.min() < 0.1 * torch.linalg.cond(matrix)


def test_a_stopped_run_goes_on_with_the_state_that_it_had(toy, tmp_path):
    def trainer(minutes):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        return toy.Trainer(
            model, toy.optimizers(model, 1e-2, 1e-2, plain=("1.",)), tmp_path / "model.safetensors", minutes, 0.9
        )

    def loss_of(trainer):
        return lambda step: trainer.model(torch.full((2, 4), 1.0 + step % 3)).square().mean()

    first = trainer(minutes=0.005)
    first.run(loss_of(first))
    second = trainer(minutes=1)
    assert second.step == first.step > 0 and second.seconds == first.seconds
    for name, value in second.ema.items():
        assert torch.equal(value, first.ema[name])
    for before, after in zip(first.optimizers, second.optimizers, strict=True):
        states = zip(before.state_dict()["state"].values(), after.state_dict()["state"].values(), strict=True)
        for a, b in states:
            assert a and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_what_it_exports_loads_strictly_and_makes_pictures(toy, tmp_path, monkeypatch):
    run, target = tmp_path / "run", tmp_path / "tiny"
    run.mkdir()
    toy.train_tokenizer(run)
    torch.manual_seed(0)
    toy.export(run, target, AutoEncoder(toy.SPEC.autoencoder), toy.Networks())
    monkeypatch.setattr(models, "EMBEDDED", target)
    (image,) = flux.load()("a red circle", steps=1)
    assert image.size == (toy.SPEC.size,) * 2
    assert np.asarray(image).dtype == np.uint8


def test_no_time_for_the_autoencoder_means_that_there_is_one(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["toy.py", str(tmp_path / "run"), "--autoencoder-minutes", "0"])
    with pytest.raises(SystemExit, match="2"):
        toy.main()
    assert "--start-from FOLDER" in capsys.readouterr().err and not (tmp_path / "run").exists()
