"""`ADMPipeline` and `ADMControlNetPipeline` under the common pipeline tests of diffusers' repository."""

import unittest
import unittest.mock

import diffusers_checkout
import torch
from toy_models import CONDITIONAL, fill_randomly, random_text_encoder, random_text_unet, random_unet, toy_tokenizer

from diffusers_adm import AdaGNControlNetModel, ADMControlNetPipeline, ADMPipeline, LearnedVarianceDDPMScheduler


mixins = diffusers_checkout.load("pipelines.testing_utils")
legacy = diffusers_checkout.load("pipelines.test_pipelines_common")

OFFLOADING_TESTS = (
    "test_cpu_offload_forward_pass_twice",
    "test_model_cpu_offload_forward_pass",
    "test_sequential_cpu_offload_forward_pass",
    "test_sequential_offload_forward_pass_twice",
)
NEEDS_ACCELERATOR = "offloads from an accelerator to the CPU"


def components(**config) -> dict:
    absent = dict.fromkeys(ADMPipeline._optional_components)
    return {"unet": random_unet(**config), "scheduler": LearnedVarianceDDPMScheduler(), **absent}


class ClassConditional(mixins.BasePipelineTesterConfig):
    pipeline_class = ADMPipeline
    required_input_params_in_call_signature = frozenset(["class_labels", "height", "width", "guidance_scale"])
    batch_input_params = frozenset(["class_labels"])
    output_shape = (3, 8, 8)

    def get_dummy_components(self) -> dict:
        return components(**CONDITIONAL)

    def get_dummy_inputs(self) -> dict:
        return {
            "class_labels": 1,
            "guidance_scale": 2.0,
            "num_inference_steps": 2,
            "generator": self.get_generator(0),
            "output_type": "pt",
        }


class Unconditional(ClassConditional):
    required_input_params_in_call_signature = frozenset(["batch_size"])
    batch_input_params = frozenset()

    def get_dummy_components(self) -> dict:
        return components()

    def get_dummy_inputs(self) -> dict:
        return {
            "batch_size": 1,
            "num_inference_steps": 2,
            "generator": self.get_generator(0),
            "output_type": "pt",
        }


class TextConditional(ClassConditional):
    required_input_params_in_call_signature = frozenset(
        ["prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds", "height", "width", "guidance_scale"]
    )
    batch_input_params = frozenset(["prompt", "negative_prompt"])

    def get_dummy_components(self) -> dict:
        text = {"text_encoder": random_text_encoder(), "tokenizer": toy_tokenizer()}
        return {**components(), "unet": random_text_unet(), **text}

    def get_dummy_inputs(self) -> dict:
        return {
            "prompt": "a red cat",
            "guidance_scale": 2.0,
            "num_inference_steps": 2,
            "generator": self.get_generator(0),
            "output_type": "pt",
        }


class Controlled(ClassConditional):
    pipeline_class = ADMControlNetPipeline
    required_input_params_in_call_signature = frozenset(
        ["image", "controlnet_conditioning_scale", "guess_mode", "control_guidance_start", "control_guidance_end"]
    )
    batch_input_params = frozenset(["class_labels", "image"])

    def get_dummy_components(self) -> dict:
        base = components(**CONDITIONAL)
        controlnet = fill_randomly(AdaGNControlNetModel.from_unet(base["unet"]), seed=1)
        return {**base, "controlnet": controlnet}

    def get_dummy_inputs(self) -> dict:
        image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return {"image": image, **super().get_dummy_inputs()}


IN_ISOLATION = diffusers_checkout.skip(
    "test_encode_prompt_works_in_isolation", reason="no pipeline without a U-Net, which says how prompts are padded"
)


@IN_ISOLATION
class TestClassConditional(ClassConditional, mixins.PipelineTesterMixin):
    pass


@IN_ISOLATION
@diffusers_checkout.skip("test_cfg", "test_callback_cfg", reason="guidance without classes is refused")
@diffusers_checkout.skip("test_num_images_per_prompt", reason="it goes through lists of prompts or classes")
class TestUnconditional(Unconditional, mixins.PipelineTesterMixin):
    pass


@IN_ISOLATION
@diffusers_checkout.skip("test_save_load_optional_components", reason="a prompt needs the text encoder")
class TestTextConditional(TextConditional, mixins.PipelineTesterMixin):
    pass


@IN_ISOLATION
class TestControlled(Controlled, mixins.PipelineTesterMixin):
    pass


@diffusers_checkout.skip(*OFFLOADING_TESTS, reason=NEEDS_ACCELERATOR, only_without_accelerator=True)
class TestMemoryTextConditional(TextConditional, mixins.MemoryTesterMixin):
    pass


@diffusers_checkout.skip(*OFFLOADING_TESTS, reason=NEEDS_ACCELERATOR, only_without_accelerator=True)
class TestMemoryClassConditional(ClassConditional, mixins.MemoryTesterMixin):
    pass


@diffusers_checkout.skip(*OFFLOADING_TESTS, reason=NEEDS_ACCELERATOR, only_without_accelerator=True)
class TestMemoryControlled(Controlled, mixins.MemoryTesterMixin):
    pass


@diffusers_checkout.skip(*OFFLOADING_TESTS, reason=NEEDS_ACCELERATOR, only_without_accelerator=True)
@IN_ISOLATION
@diffusers_checkout.skip("test_multi_vae", reason="there is no VAE")
@diffusers_checkout.skip(
    "test_group_offloading_inference",
    reason="would offload the text encoder, which is None; the newer mixin's test of that name knows None",
)
class TestLegacy(
    legacy.PipelineTesterMixin,
    legacy.PipelineLatentTesterMixin,
    legacy.PipelineKarrasSchedulerTesterMixin,
    unittest.TestCase,
):
    """The older testers, which most pipelines of diffusers still have."""

    pipeline_class = ADMPipeline
    params = ClassConditional.required_input_params_in_call_signature
    required_optional_params = ClassConditional.optional_input_params
    batch_params = ClassConditional.batch_input_params
    image_params = image_latents_params = frozenset()
    test_layerwise_casting = test_group_offloading = True

    def get_dummy_components(self) -> dict:
        return components(**CONDITIONAL)

    def get_dummy_inputs(self, device, seed: int = 0) -> dict:
        return {
            "class_labels": 1,
            "guidance_scale": 2.0,
            "num_inference_steps": 2,
            "generator": self.get_generator(seed),
            "output_type": "np",
        }

    def test_karras_schedulers_shape(self):
        """All but one: `EDMEulerScheduler` has no betas, so it reverses another process, and is refused."""
        kept = [e for e in legacy.KarrasDiffusionSchedulers if e.name != "EDMEulerScheduler"]
        with unittest.mock.patch.object(legacy, "KarrasDiffusionSchedulers", kept):
            super().test_karras_schedulers_shape()
