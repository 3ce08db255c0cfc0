"""prompt_upsampling3: questions, images and answers equal diffusers' with a tiny Qwen3.5.

Servers are tests/support/chat_server.py; what a server may do is in test_prompt_upsampling.py.
"""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from modules.prompt_upsampling3 import (
    EDIT_REQUEST,
    EDIT_REQUEST_WITH_BOXES,
    LAYOUT_REQUEST,
    MODES,
    OWN_INSTRUCTIONS,
    LocalUpsampler,
    PresencePenalty,
    ServerUpsampler,
    as_jpeg,
    fitted_size,
    question,
    read_instructions,
    write_caption,
)
from PIL import Image
from support.chat_server import chat_reply
from support.drawn_images import photo
from support.flux3_model import DISTILLED, both_models
from support.tokenizer_files import make_qwen
from support.weight_files import refusal

from flux.boxes import box_rows, split_caption
from flux.image_io import output
from flux.parity.reference import randomise

PROMPT = "a cat {0} holding a sign that says 'hello  world'"
IMAGES = (photo(70, 45, seed=5), photo(64, 40, seed=6))
BOXES = [{"id": "cat_1", "bbox": [0.1, 0.2, 0.5, 0.9], "desc": "gray"}]
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
# a size -> what one of 1, 2 and 3 images is scaled to: the sheet of diffusers' sizes
SIZES = {
    (512, 512): ((512, 512), (512, 512), (512, 512)),
    (1000, 750): ((992, 736), (832, 608), (576, 416)),
    (1023, 769): ((1024, 768), (832, 608), (576, 416)),
    (1920, 1080): ((1344, 768), (960, 512), (672, 384)),
    (2050, 2046): ((1024, 992), (704, 704), (512, 480)),
    (8000, 500): ((4096, 256), (2880, 160), (2048, 128)),
    (17, 1000): ((32, 992), (32, 992), (32, 992)),
    (10, 10): ((32, 32), (32, 32), (32, 32)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* was distilled for"),
    pytest.mark.filterwarnings("ignore:the upsampler's caption does not name"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The upsampler's repository, with a tiny model."""
    home = tmp_path_factory.mktemp("weights") / "flux-3-image-klein-pup"
    home.mkdir()
    make_qwen(home)
    tokenizer = transformers.Qwen2TokenizerFast.from_pretrained(home)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(home)
    sizes = dict(hidden_size=32, intermediate_size=48)
    rope = dict(
        rope_type="default", rope_theta=1e6, mrope_section=[2, 1, 1], mrope_interleaved=True
    )
    text = transformers.Qwen3_5TextConfig(
        **sizes,
        vocab_size=len(tokenizer),
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        rope_parameters=rope,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    config = transformers.Qwen3_5Config(
        text_config=text.to_dict(),
        vision_config=dict(
            **sizes, depth=1, num_heads=2, out_hidden_size=32, num_position_embeddings=16
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    model = randomise(transformers.Qwen3_5ForConditionalGeneration(config))
    model.save_pretrained(home)
    half = [0.5] * 3
    transformers.Qwen2VLImageProcessorPil(
        patch_size=16,
        image_mean=half,
        image_std=half,
        size={"shortest_edge": 1024, "longest_edge": 2**20},
    ).save_pretrained(home)
    released = {mode: f"instruction of {mode}" for mode in MODES}
    (home / "system_prompts.json").write_text(json.dumps(released))
    return home


class Processor:
    """transformers' Qwen3VLProcessor from its parts, since that class needs torchvision."""

    def __init__(self, upsampler: LocalUpsampler):
        self.tokenizer, self.images = upsampler.tokenizer, upsampler.processor
        self.decode = self.tokenizer.decode

    def apply_chat_template(self, messages, return_dict, return_tensors, **options):
        text = self.tokenizer.apply_chat_template(messages, **options | {"tokenize": False})
        found = [part["image"] for part in messages[1]["content"] if part["type"] == "image"]
        inputs = dict(self.images(found, return_tensors="pt")) if found else {}
        for grid in inputs.get("image_grid_thw", []):
            text = text.replace("<|image_pad|>", "<room>" * (int(grid.prod()) // 4), 1)
        text = text.replace("<room>", "<|image_pad|>")
        inputs |= self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == pad).long()
        return transformers.BatchFeature(inputs)


@pytest.mark.parametrize(
    "count, boxes",
    [(0, []), pytest.param(1, [], marks=pytest.mark.slow), (2, BOXES)],
    ids=["text", "image", "images and boxes"],
)
def test_local_inputs_and_caption_equal_diffusers(folder, monkeypatch, count, boxes):
    """With the released instructions of the file in place of those that diffusers holds."""
    from diffusers.modular_pipelines.flux3 import prompt_upsampler as theirs

    upsampler = LocalUpsampler(folder, dtype=torch.float32, penalty=0)
    seen, generate = [], type(upsampler.model).generate

    def record(model, **inputs):
        seen.append({n: x for n, x in inputs.items() if isinstance(x, torch.Tensor)})
        return generate(model, **inputs | {"max_new_tokens": 24})

    monkeypatch.setattr(type(upsampler.model), "generate", record)
    monkeypatch.setattr(theirs, "SYSTEM_PROMPTS", read_instructions(folder / "system_prompts.json"))
    edited = boxes and [{"id": "cat_1", "from": "target", "tgt_bbox": [0, 0, 0.5, 0.5]}]
    asked = question(PROMPT, IMAGES[:count], edited)
    ours = write_caption(asked, upsampler)
    references = theirs.prepare_references(list(IMAGES[:count]))
    processor = Processor(upsampler)
    expected = theirs.upsample_prompt(upsampler.model, processor, PROMPT, references, edited)
    first, second = seen
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert ours == "".join(c for c in expected if c.isprintable() or c in "\n\t").strip()
    assert len(ours) > 10


def test_penalty_is_for_what_the_answer_has():
    """By hand: the request is [3, 1], the answer so far [0, 2, 2]."""
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    penalised = PresencePenalty(2, 1.5)(torch.tensor([[3, 1, 0, 2, 2]]), scores)
    assert penalised.tolist() == [[-0.5, 2.0, 1.5, 4.0]] and scores[0, 0] == 1


def test_local_upsampling_refuses_wrong_files_and_endless_answers(folder, tmp_path, monkeypatch):
    asked = question("a cat")
    assert "system_prompts.json cannot be read" in refusal(LocalUpsampler, tmp_path)
    (tmp_path / "system_prompts.json").write_text('{"t2i": "x", "i2i": 3}')
    assert "has no text for i2i, t2i_bbox, i2i_bbox" in refusal(LocalUpsampler, tmp_path)
    (tmp_path / "system_prompts.json").write_bytes((folder / "system_prompts.json").read_bytes())
    assert "cannot be loaded" in refusal(LocalUpsampler, tmp_path)
    upsampler, model = LocalUpsampler(folder, dtype=torch.float32), "modules.prompt_upsampling3"
    assert upsampler.model.generation_config.eos_token_id is not None
    monkeypatch.setattr(f"{model}.NEW_TOKENS", 4)
    assert "was cut off after 4 tokens" in refusal(upsampler, asked)

    def silent(model, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([[model.generation_config.eos_token_id]])], 1)

    monkeypatch.setattr(type(upsampler.model), "generate", silent)
    assert "answered without text" in refusal(upsampler, asked)
    monkeypatch.setattr(f"{model}.MAX_TOKENS", 8)
    assert "is too long to upsample" in refusal(upsampler, asked)


# ------------------------------------------------------------------ questions


def test_requests_are_those_of_the_released_model():
    from diffusers.modular_pipelines.flux3 import prompt_upsampler as theirs

    assert EDIT_REQUEST.format("{instruction}") == theirs.I2I_SCAFFOLD[False]
    assert EDIT_REQUEST_WITH_BOXES.format("{instruction}") == theirs.I2I_SCAFFOLD[True]
    rows = box_rows(BOXES)
    text = LAYOUT_REQUEST.format("P", json.dumps(rows, ensure_ascii=False))
    assert text == theirs.format_layout_request("P", rows)
    assert [
        question(PROMPT, images, boxes).mode for images in ((), IMAGES[:1]) for boxes in ((), BOXES)
    ] == ["t2i", "t2i_bbox", "i2i", "i2i_bbox"]
    assert set(OWN_INSTRUCTIONS) == set(MODES) == set(theirs.SYSTEM_PROMPTS)
    assert question("a <|image_pad|>cat").text == "a cat"  # would stand for an image


@pytest.mark.parametrize("size", SIZES)
def test_images_have_the_sizes_of_the_training(size):
    from diffusers.modular_pipelines.flux3.prompt_upsampler import prepare_reference

    assert tuple(fitted_size(size, count) for count in (1, 2, 3)) == SIZES[size]
    if max(size) < 1000:
        image = photo(*size, seed=1)
        ours = as_jpeg(question("x", [image]).images[0])
        assert np.array_equal(ours, prepare_reference(image, 1))


def test_image_too_narrow_is_refused():
    narrow = Image.new("RGB", (16 * 201, 16))
    assert "3216x16 is too narrow" in refusal(question, "x", [narrow])


def test_finished_captions_pass_and_other_tables_are_locked():
    rows = box_rows(BOXES)
    assert question(f"a <cat_1> {json.dumps(rows)}") is None
    asked = question(f"a cat {json.dumps(rows)}")
    assert asked.locked == rows and asked.mode == "t2i_bbox"
    assert asked.text.startswith("ORIGINAL PROMPT:\na cat\n\n")
    assert question("numbers [1, 2]").locked == [] and question("a cat []").locked == []
    taken = f"a cat {json.dumps(rows)}"
    assert "ends in rows of its own" in refusal(question, taken, (), BOXES)
    box = {"bbox": [1, 2, 3, 4]}
    bad = [{"id": "a"}, {"id": "a", "bbox": [0, 0, 1, 1]}, {"id": "a", "bbox": "x"}]
    bad += [{"id": ["a"], **box}, {"id": "a b", **box}, {"id": "a", "desc": ["x"], **box}]
    for row in bad:
        assert "must have a name as `id`" in refusal(question, f"a cat {json.dumps([row])}")


# ------------------------------------------------------------------ answers


def test_answer_keeps_the_locked_boxes():
    asked = question("a cat", (), BOXES)
    table = [{"id": "x_1", "bbox": [100, 200, 500, 900], "desc": "a gray cat"}]
    text = write_caption(asked, lambda _: f"a fine <x_1> {json.dumps(table)}")
    assert text == f"a fine <cat_1> {json.dumps([asked.locked[0] | {'desc': 'a gray cat'}])}"
    with pytest.warns(UserWarning, match="does not name <cat_1>"):
        text = write_caption(asked, lambda _: "a fine cat")
    assert split_caption(text) == ("a fine cat", asked.locked)
    broken = 'a <cat_1> [{"id": "cat_1", "bbox": [1, 2'
    assert "table of boxes in the answer is damaged" in refusal(
        write_caption, asked, lambda _: broken
    )
    assert "has no caption before its table" in refusal(write_caption, asked, lambda _: "[]")
    long = refusal(write_caption, asked, lambda _: "a" * 70_000)
    assert "too long for a caption (got 70,000 characters" in long


def test_server_request(server):
    server.reply = 200, {}, chat_reply("<think>a cat?\n</think>\n a fluffy cat \n")
    ask = ServerUpsampler(server.url, "some/model", instructions=dict.fromkeys(MODES, "do"))
    assert write_caption(question(PROMPT), ask) == "a fluffy cat"
    write_caption(question(PROMPT, IMAGES), ask)
    (_, _, first), (_, _, second) = server.requests
    recipe = {"model": "some/model", "temperature": 0, "max_tokens": 3584}
    recipe["chat_template_kwargs"] = {"enable_thinking": False}
    system = {"role": "system", "content": "do"}
    messages = [system, {"role": "user", "content": PROMPT}]
    assert first == recipe | {"messages": messages, "presence_penalty": 1.5}
    *seen, said = second["messages"].pop()["content"]
    assert second == recipe | {"messages": [system]}  # no penalty for edits
    assert said == {"type": "text", "text": EDIT_REQUEST.format(PROMPT)}
    assert [part["image_url"]["url"][:23] for part in seen] == ["data:image/jpeg;base64,"] * 2


def test_server_that_knows_no_extension_is_asked_again(server):
    server.reply = 400, {}, json.dumps({"error": {"message": "unknown argument"}}).encode()
    said = refusal(write_caption, question(PROMPT), ServerUpsampler(server.url, "m"))
    assert "answered 400: unknown argument" in said
    (_, _, first), (_, _, second) = server.requests
    assert first.pop("chat_template_kwargs") and first == second


@pytest.mark.parametrize(
    "reply, fault",
    [
        (chat_reply(""), "answered without text"),
        (chat_reply("<think>hm</think>"), "answered without text"),
        (
            chat_reply("a cat").replace(b'{"message"', b'{"finish_reason": "length", "message"'),
            "cut",
        ),
        (b'{"choices": [' + b" " * 2**22 + b"]}", "answered more than 4,194,304 bytes"),
        (b"{", "answered something that is not JSON"),
    ],
    ids=["empty", "thoughts alone", "cut off", "endless", "JSON"],
)
def test_answers_that_are_none_are_refused(server, reply, fault):
    server.reply = 200, {}, reply
    assert fault in refusal(write_caption, question(PROMPT), ServerUpsampler(server.url, "m"))


# ------------------------------------------------------------------ sample.py


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    with both_models(home):
        yield home


def arguments(weights, server_url: str) -> tuple:
    sizes = ("--width", 64, "--height", 64, "--steps", 1, "--seed", 1, "--dtype", "float32")
    return ("--model", DISTILLED, "--weights", weights, "--upsample", server_url, *sizes)


@pytest.mark.slow
def test_caption_is_printed_and_kept_with_the_request(cli, weights, server):
    caption = 'A fluffy <cat> on a mat [{"id": "cat", "bbox": [1, 2, 3, 4], "desc": "gray"}]'
    server.reply = 200, {}, chat_reply(caption)
    given = arguments(weights, server.url)
    run = cli("a cat", "--box", "cat:0.2,0.1,0.9,0.5", *given, "--upsample-model", "m")
    assert run.code == 0, run.err
    rows = '[{"id": "cat", "bbox": [100, 200, 500, 900], "desc": "gray"}]'
    final = f"A fluffy <cat> on a mat {rows}"
    path = Path(run.out.strip())
    metadata = output.read_metadata(path)
    assert metadata["prompt"] == final and f"prompt: {final}" in run.err
    assert metadata["upsampled_from"] == "a cat"
    again = cli("--from-image", path, "--weights", weights)
    with Image.open(path) as first, Image.open(again.out.strip()) as second:
        assert first.tobytes() == second.tobytes()
    assert len(server.requests) == 1
    passed = cli(final, *given, "--upsample-model", "m")
    assert passed.code == 0 and "it is not upsampled" in passed.err and len(server.requests) == 1
    with Image.open(path) as first, Image.open(passed.out.strip()) as second:
        assert first.tobytes() == second.tobytes()


def test_upsamplers_that_fail_end_the_run_in_one_sentence(cli, weights, server, monkeypatch):
    given = (*arguments(weights, server.url), "--upsample-model", "m")
    server.reply = 200, {}, chat_reply(" ")
    cli("a cat", *given).fails_with("answered without text")
    server.reply = 200, {}, chat_reply("word " * 9000)
    cli("a cat", *given).fails_with("the answer has more than the", "tokens", DISTILLED)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        dead = arguments(weights, f"http://127.0.0.1:{port}")
        cli("a cat", *dead, "--upsample-model", "m").fails_with("cannot be reached")
    local = arguments(weights, "local")
    cli("a cat", *local).fails_with("--upsample", "hf download", "flux-3-image-klein-pup")
    cli("a cat", *local, "--upsample-model", "m").fails_with("--upsample", "--upsample-model")


@pytest.mark.slow
def test_local_answer_is_used(folder, weights, cli, monkeypatch):
    """One call for two prompts: the model is loaded once."""
    made, generate = [], transformers.Qwen3_5ForConditionalGeneration.generate

    def record(model, **inputs):
        made.append(model)
        return generate(model, **inputs | {"max_new_tokens": 12})

    monkeypatch.setattr(transformers.Qwen3_5ForConditionalGeneration, "generate", record)
    home = weights / folder.name
    if not home.exists():
        home.symlink_to(folder)
    run = cli("a cat", "a dog", *arguments(weights, "local"))
    home.unlink()
    assert run.code == 0, run.err
    assert len(made) == 2 and made[0] is made[1] and run.err.count("\nprompt: ") == 2
    for path, typed in zip(run.out.split(), ("a cat", "a dog")):
        metadata = output.read_metadata(Path(path))
        assert metadata["upsampled_from"] == typed and metadata["prompt"] != typed


def test_models_of_other_families_have_no_local_upsampler(cli):
    cli("a cat", "--upsample", "local").fails_with("--upsample", "flux.2-dev", "FLUX 3")
