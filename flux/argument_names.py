"""A sentence, in place of a bare TypeError or AttributeError, for the names of diffusers."""

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
    "prompt_2": "Both encoders of FLUX.1 read the one prompt.",
    "negative_prompt_2": "Both encoders of FLUX.1 read the one `negative_prompt`.",
    "pooled_prompt_embeds": "Pass features to `sample`, and its latents to `decode`.",
    "negative_prompt_embeds": "Pass features to `sample`, and its latents to `decode`.",
    "negative_pooled_prompt_embeds": "Pass features to `sample`, and its latents to `decode`.",
    "prompt_embeds_scale": "Pass `images=flux.ImageInputs(..., image_weights=...)`.",
    "pooled_prompt_embeds_scale": "Pass `images=flux.ImageInputs(..., image_weights=...)`.",
    "control_image": "Pass `images`; or see flux.controlnet, for a ControlNet.",
    "control_mode": "See flux.controlnet.",
    "controlnet_conditioning_scale": "See flux.controlnet.",
    "control_guidance_start": "See flux.controlnet.",
    "control_guidance_end": "See flux.controlnet.",
    "ip_adapter_image": "See flux.ip_adapter.",
    "ip_adapter_image_embeds": "See flux.ip_adapter.",
    "negative_ip_adapter_image": "See flux.ip_adapter.",
    "negative_ip_adapter_image_embeds": "See flux.ip_adapter.",
    "image_reference": "Pass all as `images`, the start first.",
    "masked_image_latents": "Pass `images=flux.ImageInputs(..., mask=...)`.",
    "padding_mask_crop": "Crop the image and the mask before the call.",
    "max_area": "Pass `images=flux.ImageInputs(..., keep_input_size=True)`, or a size.",
    "_auto_resize": "Pass `images=flux.ImageInputs(..., keep_input_size=True)`.",
    "attention_kwargs": "Load a LoRA by `load_lora`, with its scale.",
    "callback_on_step_end_tensor_inputs": "`callback` gets the latents.",
    "caption_upsample_temperature": "Write the prompt out first.",
    "text_encoder_out_layers": "The model's own layers are read.",
    "num_steps": "Pass `steps`.",
    "seeds": "Pass a list as `seed`.",
}
ATTRIBUTES = {  # diffusers' name of a method or a part -> what to do here
    "to": "Pass `device` or `dtype` to flux.load.",
    "from_pretrained": "Use flux.load(name).",
    "enable_model_cpu_offload": 'Pass `offload="model"` to flux.load.',
    "enable_sequential_cpu_offload": 'Pass `offload="block"` to flux.load.',
    "enable_group_offload": 'Pass `offload="block"` to flux.load.',
    "enable_vae_tiling": "Pass `vae_tile` to flux.load.",
    "enable_vae_slicing": "Batches are decoded in parts that fit.",
    "load_lora_weights": "Use `load_lora`.",
    "set_adapters": "Use `set_lora_scale`.",
    "unload_lora_weights": "Use `unload_loras`.",
    "encode_prompt": "Use `encode`.",
    "vae": "Use `autoencoder`.",
    "text_encoder": "Use `text`.",
    "scheduler": "Pass `solver`, `sigmas` or `shift` to a call.",
}


def explain_other_attribute(name: str) -> str:
    """Return what to say of an attribute that a pipeline lacks."""
    return f"the pipeline has no {name!r}. {ATTRIBUTES.get(name, '')}".rstrip()


def explain_other_names(function: Callable[P, T]) -> Callable[P, T]:
    """Raise UserError for an argument that the function lacks, with the name that it has here."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                names = ", ".join(one for one in known if one != "self")
                fix = OURS.get(name, f"The arguments are {names}.")
                called = "the pipeline" if function.__name__ == "__call__" else function.__name__
                raise UserError(f"{name}: is not an argument of {called}. {fix}")
        return function(*args, **kwargs)

    return checked
