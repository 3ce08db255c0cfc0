"""Images that several processes make together are, to the byte, those of one process.

Each process computes both, in one gloo group. Sizes of the mesh are chosen without processes.
"""

import pytest
from support import flux3_model as flux3
from support.drawn_images import block_mask, photo
from support.model_zoo import BASE, FILL, KONTEXT, KV, REDUX
from support.parallel_images import Run, compare_all, toy_lora
from support.processes import Processes
from support.weight_cases import messages_of_a_run

import flux
from flux import ImageInputs
from flux.configs import MODELS
from flux.errors import UserError
from flux.runtime.parallel import Sizes, choose, distribute, parse

# ------------------------------------------------------------------ the mesh


def test_axes_are_parsed():
    assert parse("context=4,cfg=2") == {"context": 4, "cfg": 2}
    assert parse(" data=3") == {"data": 3}
    for text in (
        "",
        "context",
        "context=",
        "context=0",
        "context=-2",
        "context=2,context=2",
        "x=2",
    ):
        with pytest.raises(UserError, match="parallel: must name axes with their sizes"):
            parse(text)


@pytest.mark.parametrize(
    "given, processes, use_cfg, images, expected",
    [
        ("", 4, False, 1, Sizes(context=4)),
        ("", 4, True, 1, Sizes(cfg=2, context=2)),
        ("", 4, True, 8, Sizes(data=4)),
        ("", 8, True, 6, Sizes(data=2, cfg=2, context=2)),
        ("", 3, True, 1, Sizes(context=3)),
        ("", 1, True, 5, Sizes()),
        ("context=2", 8, True, 2, Sizes(data=2, cfg=2, context=2)),
        ("cfg=1", 4, True, 1, Sizes(context=4)),
        ("data=1,cfg=2", 2, True, 4, Sizes(cfg=2)),
    ],
)
def test_every_process_gets_work(given, processes, use_cfg, images, expected):
    given = parse(given) if given else {}
    assert choose(given, processes, use_cfg=use_cfg, images=images, tokens=64) == expected


@pytest.mark.parametrize(
    "given, processes, words",
    [
        ("context=4,cfg=2", 4, ("cfg=2,context=4 needs 8 processes", "got 4")),
        ("context=3", 4, ("needs 3 processes", "got 4")),
        ("cfg=2", 2, ("cfg=2 is more than the 1 branches",)),
        ("data=2", 2, ("data=2 is more than the images of this run (1)",)),
        ("context=2,cfg=1,data=1", 4, ("leaves 2 times as many processes",)),
        ("context=128", 128, ("more than the 64 tokens",)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given, processes, words):
    with pytest.raises(UserError) as refused:
        choose(parse(given), processes, use_cfg=False, images=1, tokens=64)
    assert all(word in str(refused.value) for word in ("parallel: ", *words))


# ------------------------------------------------------------------ images

IMAGE, MASK = (photo(80, 64),), block_mask(80, 64)
CFG = dict(negative_prompt="a green star", guidance=2.0)
BATCH = CFG | dict(num_images=2)
TWO = [Run("flux.2-tiny", "context=2", CFG)]
MORE_OF_TWO = [
    Run("flux.1-tiny", "context=2", dict(true_cfg_scale=2.0, negative_prompt="a green star")),
    Run("flux.2-tiny", "cfg=2", CFG, dict(compile=True)),
    Run("flux.2-tiny", "data=2", dict(num_images=2, solver="dpmpp_2m_sde"), one_by_one=True),
    Run("flux.2-tiny", "context=2", dict(images=ImageInputs(IMAGE), num_images=2)),
    Run("flux.2-tiny", "context=2", dict(images=ImageInputs(IMAGE, kv_cache=True))),
    Run("flux.2-tiny", "context=2", dict(images=ImageInputs(IMAGE, MASK, strength=0.5))),
    Run("flux.1-tiny", "context=2", dict(images=ImageInputs(IMAGE, MASK, strength=0.5))),
    Run(
        "flux.1-tiny",
        "data=2",
        dict(images=ImageInputs(IMAGE, strength=0.5), num_images=2),
        one_by_one=True,
    ),
    Run("flux.2-tiny", "context=2", dict(solver="heun"), dict(quantize="int8")),
    Run("flux.2-tiny", "cfg=2", CFG, dict(offload="block")),
    Run("flux.2-tiny", "context=2", {}, dict(max_vram=1.0)),
    Run("flux.2-tiny", "context=2", {}, dict(fast=False, numerics="bfl"), method="ulysses"),
]
FOUR = [
    Run("flux.1-tiny", "context=4"),
    Run("flux.2-tiny", "context=4", dict(images=ImageInputs(IMAGE))),
    Run("flux.2-tiny", "cfg=2,context=2", CFG),
    Run("flux.2-tiny", "data=2,cfg=2", BATCH, dict(quantize="int8"), one_by_one=True),
    Run("flux.2-tiny", "data=4", dict(num_images=3), dict(offload="block"), one_by_one=True),
]


def check(processes: Processes, runs: list[Run]) -> None:
    """Each run makes the bytes of one process; tensor parallelism, sums in another order."""
    for run, of_run in zip(runs, zip(*processes(compare_all, runs))):
        assert max(of_run) <= ("tensor" in run.sizes), (run, of_run)


def test_two_processes_make_the_image_of_one(two):
    check(two, TWO)


def test_one_process_runs_the_same_code():
    """Nothing is changed in a pipeline that works alone, also under torchrun."""
    pipe = flux.load("flux.2-tiny", device="cpu")
    before = dict(vars(pipe)), dict(vars(pipe.text)), dict(pipe.transformer.loaders)
    assert distribute(pipe, Sizes()) is None
    assert before == (vars(pipe), vars(pipe.text), pipe.transformer.loaders)


@pytest.mark.slow
def test_a_group_of_one_sends_nothing(tmp_path):
    with Processes(1, tmp_path) as one:
        assert one(messages_of_a_run, Run("flux.2-tiny", "context=1", CFG)) == [(0, 0)]


@pytest.mark.slow
def test_two_processes_make_more_images_of_one(two):
    check(two, MORE_OF_TWO)


@pytest.mark.slow
def test_mistakes_of_a_run_change_the_image(two):
    runs = [
        Run("flux.2-tiny", "context=2", mistake="schedule of own tokens"),
        Run("flux.2-tiny", "context=2", mistake="own noise"),
        Run("flux.2-tiny", "cfg=2", CFG, mistake="branches exchanged"),
    ]
    for run, of_run in zip(runs, zip(*two(compare_all, runs))):
        assert min(of_run) > 0, run


@pytest.mark.slow
def test_two_processes_merge_a_lora(two, tmp_path):
    runs = []
    for name in ("flux.1-tiny", "flux.2-tiny"):
        path = toy_lora(tmp_path / f"{name}.safetensors", name)
        runs.append(Run(name, "context=2", lora=str(path)))
    check(two, runs)


@pytest.mark.slow
def test_two_processes_make_the_images_of_every_kind_of_model(two, zoo):
    """Channels, image tokens and text tokens of images; a KV cache; guidance; both branches."""
    runs = []

    def add(name: str, sizes: str, images: ImageInputs | None = None, **call) -> None:
        zoo.write(name)
        call |= {"images": images} if images else {}
        specs = {name: MODELS[name]}
        runs.append(Run(name, sizes, call, {"weights": zoo.folder}, specs=specs))

    add(FILL, "context=2", ImageInputs(IMAGE, MASK))
    add("flux.1-canny-dev", "context=2", ImageInputs(IMAGE), guidance=3.0)
    add(REDUX, "context=2", ImageInputs(IMAGE))
    add(KONTEXT, "context=2", ImageInputs(IMAGE, keep_input_size=True))
    add(KV, "context=2", ImageInputs(IMAGE * 2))
    add("flux.2-dev", "context=2", ImageInputs(IMAGE))
    add(BASE, "cfg=2", ImageInputs(IMAGE), guidance=2.0)
    check(two, runs)


@pytest.mark.slow
def test_two_processes_make_the_images_of_flux_3(two, tmp_path, monkeypatch):
    """The base model runs its early blocks once an image, the distilled one at every step."""
    runs = []
    for name, sizes, shard in (
        (flux3.BASE, "cfg=2", False),
        (flux3.BASE, "context=2", True),
        (flux3.BASE, "data=2", False),
        (flux3.BASE, "tensor=2", False),
        (flux3.DISTILLED, "context=2", False),
    ):
        folder = tmp_path / name
        if not folder.exists():
            flux3.Flux3Model(name, folder, monkeypatch)
        call = dict(images=ImageInputs(IMAGE), prompts="a red star")
        if sizes == "data=2":
            call |= dict(num_images=2)
        specs = {name: MODELS[name]}
        run = Run(name, sizes, call, {"weights": folder}, shard_weights=shard, specs=specs)
        runs.append(run._replace(one_by_one=sizes == "data=2"))
    check(two, runs)


@pytest.mark.slow
def test_four_processes_make_the_image_of_one(four):
    check(four, FOUR)
