"""Every pipeline at toy size, with arguments of a call that works."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from toy_models import (
    CONDITIONAL,
    TOY_AUTOENCODER_CONFIG,
    fill_randomly,
    random_classifier,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)
from unclip_models import (
    gently,
    karlo_pipeline,
    random_clip_vision,
    toy_image_processor,
)

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
    LearnedVarianceDDPMScheduler,
)


Call = tuple[Callable[..., Any], dict[str, Any], tuple[int, ...]]
SIZE = 8
NOTHING = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
STEPS = {"num_inference_steps": 2, "output_type": "pt"}
CHAIN = {"num_train_timesteps": 50, "beta_start": 0.002, "beta_end": 0.4}
IMAGE = Image.new("RGB", (SIZE, SIZE), "red")
MASK = Image.new("L", (SIZE, SIZE))
MASK.paste(255, (0, 0, 4, 8))


def pipeline(cls: type, unet: torch.nn.Module, variance_type: str = "learned_range", **components: Any) -> ADMPipeline:
    scheduler = LearnedVarianceDDPMScheduler(**CHAIN, variance_type=variance_type)
    pipe = cls(gently(unet), scheduler, **{**NOTHING, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_class() -> Call:
    components = {"classifier": random_classifier(num_classes=4), "id2label": {0: "a", 1: "b"}}
    pipe = pipeline(ADMPipeline, random_unet(**CONDITIONAL), **components)
    return pipe, {"class_labels": [0, 1], "guidance_scale": 2.0, **STEPS}, (2, 3, 8, 8)


def by_text() -> Call:
    text = {"text_encoder": random_text_encoder(), "tokenizer": toy_tokenizer()}
    pipe = pipeline(ADMPipeline, random_text_unet(), **text)
    return pipe, {"prompt": "a red cat", "guidance_scale": 2.0, **STEPS}, (1, 3, 8, 8)


def in_latents() -> Call:
    vae = fill_randomly(AutoencoderKL(**TOY_AUTOENCODER_CONFIG))
    unet = random_unet(in_channels=2, out_channels=4, sample_size=4)
    return pipeline(ADMPipeline, unet, vae=vae), {"image": IMAGE, "strength": 0.5, **STEPS}, (1, 3, 8, 8)


def inversion() -> Call:
    pipe = pipeline(ADMPipeline, random_unet(**CONDITIONAL))
    pipe.scheduler.register_to_config(clip_sample=False)
    invert = lambda image, num_inference_steps=2, num_fixed_point_iterations=2: pipe.invert(  # noqa: E731
        image, num_inference_steps, num_fixed_point_iterations
    )
    return invert, {"image": IMAGE}, (1, 3, 8, 8)


def repaint() -> Call:
    return (
        pipeline(ADMInpaintPipeline, random_unet()),
        {"image": IMAGE, "mask_image": MASK, "jump_length": 1, "jump_n_sample": 2, **STEPS},
        (1, 3, 8, 8),
    )


def inpaint() -> Call:
    pipe = pipeline(ADMInpaintPipeline, random_unet(in_channels=7, **CONDITIONAL))
    return pipe, {"image": IMAGE, "mask_image": MASK, "class_labels": 1, **STEPS}, (1, 3, 8, 8)


def super_resolution() -> Call:
    unet = random_unet(in_channels=6, time_cond_proj_dim=6)
    pipe = pipeline(ADMSuperResolutionPipeline, unet, max_noise_level=20)
    return pipe, {"image": IMAGE.resize((4, 4)), "noise_level": 5, **STEPS}, (1, 3, 8, 8)


def controlnet() -> Call:
    unet = random_unet(**CONDITIONAL)
    pipe = pipeline(ADMControlNetPipeline, unet, controlnet=fill_randomly(AdaGNControlNetModel.from_unet(unet)))
    return pipe, {"image": IMAGE, "class_labels": 0, "guidance_scale": 2.0, **STEPS}, (1, 3, 8, 8)


def image_to_image() -> Call:
    pipe = pipeline(ADMImageToImagePipeline, random_unet(in_channels=6), source_dropout_prob=0.1)
    return pipe, {"image": IMAGE, "guidance_scale": 2.0, **STEPS}, (1, 3, 8, 8)


def unclip_pipeline() -> ADMUnCLIPPipeline:
    pipe = ADMUnCLIPPipeline.from_pipe(
        karlo_pipeline(), image_encoder=random_clip_vision(), feature_extractor=toy_image_processor()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unclip() -> Call:
    arguments = {"prompt": "a red cat", "prior_num_inference_steps": 2, "super_res_num_inference_steps": 2, **STEPS}
    return unclip_pipeline(), arguments, (1, 3, 16, 16)


def unclip_variation() -> Call:
    return unclip_pipeline(), {"image": IMAGE, "super_res_num_inference_steps": 2, **STEPS}, (1, 3, 16, 16)


def interpolation() -> Call:
    arguments = {"image_1": IMAGE, "image_2": MASK.convert("RGB"), "weights": 0.5, "super_res_num_inference_steps": 0}
    return unclip_pipeline().interpolate, {**arguments, **STEPS}, (1, 3, 8, 8)


def editing() -> Call:
    arguments = {"image": IMAGE, "source_prompt": "a red cat", "target_prompt": "a green dog"}
    return unclip_pipeline().edit, {**arguments, "super_res_num_inference_steps": 0, **STEPS}, (1, 3, 8, 8)


CALLS: dict[str, Callable[[], Call]] = {
    function.__name__: function
    for function in (
        by_class,
        by_text,
        in_latents,
        inversion,
        repaint,
        inpaint,
        super_resolution,
        controlnet,
        image_to_image,
        unclip,
        unclip_variation,
        interpolation,
        editing,
    )  # fmt: skip
}
