"""flux.ip_adapter against diffusers' FluxTransformer2DModel with an IP-adapter, live."""

import pytest
import torch
from safetensors.torch import save_file

import flux
from flux.configs import MODELS
from flux.errors import UserError
from flux.ip_adapter import KEY, PROJECTION, load_ip_adapter
from flux.parity.reference import diffusers_transformer, loaded, max_error, transformer_to_diffusers
from flux.runtime.tensor_parallel import TensorParallel
from flux.sampling import image_ids, text_ids
from flux.weights.inspection import inspect

C, EMBEDDING, TOKENS = MODELS["flux.1-tiny"].transformer, 24, 4


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{PROJECTION}.proj": (TOKENS * C.context_dim, EMBEDDING)}
    for number in range(C.depth):
        shapes |= {KEY.format(number, part): (C.hidden_size, C.context_dim) for part in "kv"}
    out = {
        f"{PROJECTION}.norm.{name}": torch.rand(C.context_dim, generator=generator)
        for name in ("weight", "bias")
    }
    for layer, (rows, columns) in shapes.items():
        out[f"{layer}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        out[f"{layer}.bias"] = torch.randn(rows, generator=generator)
    return out


@pytest.fixture(scope="module")
def adapter_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "ip_adapter.safetensors"
    save_file(weights, path)
    return path


def by_diffusers(weights, pipe):
    """diffusers' transformer with our weights, and the adapter as its loader reads the file."""
    model = loaded(
        diffusers_transformer(C), transformer_to_diffusers(pipe.transformer().state_dict(), C)
    )
    state = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in weights.items():
        rest = name.partition(".")[2]
        part = "image_proj" if name.startswith(PROJECTION) else "ip_adapter"
        rest = rest.replace("processor.", "").replace("ip_adapter_double_stream_k_proj", "to_k_ip")
        state[part][rest.replace("ip_adapter_double_stream_v_proj", "to_v_ip")] = tensor
    model._load_ip_adapter_weights([state])
    for processor in model.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    return model.eval()


@pytest.mark.parametrize("fast", [False, True])
def test_velocity_with_an_adapter_equals_diffusers(weights, adapter_file, fast):
    pipe = flux.load("flux.1-tiny", device="cpu", fast=fast)
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(2, EMBEDDING, generator=generator)
    x = torch.randn(2, 64, 4, 6, generator=generator)
    features = pipe.encode(["a red circle", "a blue star"])
    velocity = pipe.velocity(features, 96, 64, guidance=3.0)
    plain = velocity(x, 0.7)
    with torch.no_grad():
        theirs = by_diffusers(weights, pipe)(
            hidden_states=x.flatten(2).mT,
            encoder_hidden_states=features.tokens,
            pooled_projections=features.pooled,
            timestep=torch.tensor([0.7, 0.7]),
            img_ids=image_ids(4, 6, 3),
            txt_ids=text_ids(features.tokens.shape[1], 3),
            guidance=torch.tensor([3.0, 3.0]),
            joint_attention_kwargs={"ip_adapter_image_embeds": [embedding[:, None]]},
            return_dict=False,
        )[0]
    end = load_ip_adapter(adapter_file, pipe).apply(embedding, scale=0.7)
    ours = velocity(x, 0.7)
    end()
    assert torch.equal(ours, theirs.mT.unflatten(2, (4, 6)))
    assert max_error(ours, plain) > 0.01 and torch.equal(velocity(x, 0.7), plain)


def test_wrong_files_and_models_are_refused(weights, adapter_file, tmp_path):
    pipe = flux.load("flux.1-tiny", device="cpu")
    path = tmp_path / "less.safetensors"
    name = f"{KEY.format(1, 'v')}.bias"
    save_file({key: x for key, x in weights.items() if key != name}, path)
    with pytest.raises(UserError, match=f"no IP-adapter in XLabs' layout .*{name}"):
        load_ip_adapter(path, pipe)
    with pytest.raises(UserError, match="of FLUX.1, not of flux.2-tiny"):
        load_ip_adapter(adapter_file, flux.load(device="cpu"))


def test_inspection_tells_the_models_that_an_adapter_fits(weights, adapter_file, tmp_path):
    found = dict(inspect(adapter_file).lines)
    assert found["kind"] == "an IP-adapter" and "refused" not in found
    assert found["fits"] == "flux.1-tiny; scripts/examples/ip_adapter.py reads it"
    save_file({name: x for name, x in weights.items() if "proj_model" not in name}, tmp_path / "x")
    assert "is no IP-adapter in XLabs' layout" in dict(inspect(tmp_path / "x").lines)["refused"]


def test_divided_heads_are_refused(adapter_file):
    pipe = flux.load("flux.1-tiny", device="cpu")
    pipe.transformer.set_divide(TensorParallel(None, 0, 2))
    load_ip_adapter(adapter_file, pipe).apply(torch.zeros(1, EMBEDDING))
    with pytest.raises(UserError, match="^parallel: tensor divides the heads, and an IP-adapter"):
        pipe.transformer()
