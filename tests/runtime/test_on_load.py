"""LazyModule.on_load: what is done to a network is done again whenever the network is loaded."""

import warnings

import pytest
import torch
from torch import nn

import flux
from flux.configs import EMBEDDED

SIZE, STEPS = (64, 64), 1
LORA = EMBEDDED / "flux.2-tiny/framed.safetensors"
KEPT_WAYS = {
    "no offload": dict(),
    "model": dict(offload="model"),
    "block": dict(offload="block"),
    "little memory": dict(max_vram=0.06),
    "int8": dict(quantize="int8"),
}


def run(pipe, seed: int = 3):
    return pipe.sample(pipe.encode("a red circle"), [seed], *SIZE, STEPS, guidance=1.0)


class Count:
    """Registers a hook on each block; `calls` counts them."""

    def __init__(self):
        self.calls = 0

    def __call__(self, network):
        blocks = [*network.double_blocks.children(), *network.single_blocks.children()]
        return [block.register_forward_hook(self.hook) for block in blocks]

    def hook(self, *_):
        self.calls += 1


@pytest.mark.slow
@pytest.mark.parametrize("way", KEPT_WAYS)
def test_hooks_stay_however_weights_are_held(way):
    pipe, count = flux.load(device="cpu", **KEPT_WAYS[way]), Count()
    blocks = pipe.spec.transformer.depth + pipe.spec.transformer.depth_single
    end = pipe.transformer.on_load(count)
    with warnings.catch_warnings(action="error"):
        run(pipe)
        assert count.calls == STEPS * blocks
        pipe.load_lora(LORA)
        run(pipe)
    assert count.calls == 2 * STEPS * blocks
    end()
    end()  # a second time: nothing
    run(pipe)
    assert count.calls == 2 * STEPS * blocks


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True])
def test_replaced_functions_and_added_modules_come_back_and_go(loaded):
    pipe = flux.load(device="cpu", offload="model")
    plain = run(pipe)
    if loaded:
        pipe.transformer()

    def change(network):
        network.scale = nn.Linear(1, 1)
        first = network.img_in.forward
        network.img_in.forward = lambda x: 1.1 * first(x)

    end = pipe.transformer.on_load(change)
    with warnings.catch_warnings(action="error"):
        changed = run(pipe)
        assert torch.equal(changed, run(pipe)) and not torch.equal(changed, plain)
        end()
        assert torch.equal(plain, run(pipe))


def test_lost_changes_are_a_warning():
    pipe = flux.load(device="cpu", offload="model")
    pipe.transformer.on_load(Count())  # is kept, so no loss
    network = pipe.transformer()
    Count()(network)
    network.img_in.forward = network.img_in.forward
    network.extra = nn.Identity()
    with pytest.warns(
        UserWarning, match="anew, without 10 hooks and 1 replaced forward and 1 added"
    ):
        run(pipe)
    with warnings.catch_warnings(action="error"):
        run(pipe)


def test_a_hook_that_was_removed_is_no_loss():
    pipe = flux.load(device="cpu", offload="model")
    handles = Count()(pipe.transformer())
    pipe.transformer.release()
    for handle in handles:
        handle.remove()
    with warnings.catch_warnings(action="error"):
        run(pipe)


def test_a_network_loaded_in_inference_mode_serves_autograd():
    pipe = flux.load(device="cpu")
    with torch.inference_mode():
        network = pipe.transformer()
    assert not any(parameter.is_inference() for parameter in network.parameters())


def test_slices_of_streamed_blocks_are_streamed():
    pipe = flux.load(device="cpu", offload="block")
    pipe.plan_memory(*SIZE)
    network = pipe.transformer()
    part = network.double_blocks[1:]
    assert type(part) is type(network.double_blocks) and len(part) == 1
    block = network.double_blocks[1]
    host = block.img_mlp[0].weight.data_ptr()
    for each in part:
        assert each is block and each.img_mlp[0].weight.data_ptr() != host  # in a buffer
    assert block.img_mlp[0].weight.data_ptr() == host


def test_attributes_of_a_network_that_was_not_called_are_explained():
    pipe = flux.load(device="cpu")
    with pytest.raises(AttributeError, match=r"as in `pipe\.transformer\(\)\.double_blocks`"):
        pipe.transformer.double_blocks  # noqa: B018
    with pytest.raises(AttributeError, match="^a LazyModule has no attribute 'nonsense'$"):
        pipe.autoencoder.nonsense  # noqa: B018
    assert repr(pipe) == "<flux.Pipeline of flux.2-tiny, on cpu in float32>"


def test_autoencoder_of_the_other_family_is_told():
    other = EMBEDDED / "flux.1-tiny/ae.safetensors"
    with pytest.raises(flux.UserError, match="looks like FLUX.1's autoencoder, and that of FLUX.2"):
        flux.load(device="cpu", autoencoder=other)
