"""A sentence, in place of a TypeError, for the argument names of diffusers."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from flux.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

OURS = {  # diffusers' name -> what to do here
    "prompt": "Pass the prompt first, or as `prompts`.",
    "num_inference_steps": "Pass `steps`.",
    "guidance_scale": "Pass `guidance`.",
    "num_images_per_prompt": "Pass `num_images`.",
    "generator": "Pass a number as `seed`.",
    "image": "Pass `images`.",
    "mask_image": "Pass `images=flux.ImageInputs(..., mask=...)`.",
    "strength": "Pass `images=flux.ImageInputs(..., strength=...)`.",
    "latents": "Pass noise and features to `velocity`, or a seed.",
    "prompt_embeds": "Pass features to `sample`, and its latents to `decode`.",
    "output_type": "Images are PIL's. `sample` returns latents, and `decode` takes them.",
    "return_dict": "Images are returned as a list.",
    "callback_on_step_end": "Pass `callback`.",
    "joint_attention_kwargs": "Load a LoRA by `load_lora`, with its scale.",
    "max_sequence_length": "Every prompt has the model's length.",
    "pretrained_model_name_or_path": "Pass the name first.",
    "torch_dtype": "Pass `dtype`.",
    "device_map": "Pass `device`, `offload` or `max_vram`.",
    "cache_dir": "Pass a folder as `weights`.",
    "quantization_config": 'Pass `quantize`, such as "int8".',
    "scheduler": "Pass `solver`, `sigmas` or `shift` to the pipeline.",
    "text_encoder_3": "No model here has a third text encoder.",
}


def explain_other_names(function: Callable[P, T]) -> Callable[P, T]:
    """Raise UserError for an argument that the function lacks, with the name that it has here."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                names = ", ".join(one for one in known if one != "self")
                fix = OURS.get(name, f"The arguments are {names}.")
                raise UserError(f"{name}: is not an argument of `{function.__name__}`. {fix}")
        return function(*args, **kwargs)

    return checked
