"""
Passes of classifier-free guidance in one batch or in two, and how often networks run: never where they have no effect,
and once a call where the result does not depend on the step.
"""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from tolerances import SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    fill_randomly,
    random_classifier,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)
from unclip_models import EMBEDDING_WIDTH, gently, prior_scheduler, random_clip_text, random_prior

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
    LearnedVarianceDDPMScheduler,
    UnCLIPProjectionModel,
)
from diffusers_adm.conditioning.guidance import joins_passes
from diffusers_adm.conditioning.guidance_functions import GuidanceFunction


LABELS, NULL, STEPS = [1, 2], 4, 4
IMAGE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(8, 8)
MASK[2:6, 1:7] = 1
STATES = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))


def make(cls=ADMPipeline, unet=None, **components):
    components = {**dict.fromkeys(cls._optional_components), **components}
    components.setdefault("scheduler", LearnedVarianceDDPMScheduler())
    pipe = cls(unet=random_unet(**CONDITIONAL) if unet is None else unet, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def branch(unet, seed: int = 1, **options) -> AdaGNControlNetModel:
    return fill_randomly(AdaGNControlNetModel.from_unet(unet, **options), seed=seed)


def with_controlnet(number: int = 1, **components) -> ADMControlNetPipeline:
    unet = random_unet(**CONDITIONAL)
    nets = [branch(unet, seed) for seed in range(1, number + 1)]
    return make(ADMControlNetPipeline, unet, controlnet=nets if number > 1 else nets[0], **components)


def unclip() -> ADMUnCLIPPipeline:
    projection = UnCLIPProjectionModel(
        clip_embeddings_dim=EMBEDDING_WIDTH, time_embed_dim=32, cross_attention_dim=None, text_conditioning=None
    )
    return make(
        ADMUnCLIPPipeline,
        gently(random_unet(4, class_embed_type="identity")),
        image_projection=fill_randomly(projection, 3),
        prior=random_prior(),
        prior_scheduler=LearnedVarianceDDPMScheduler.from_config(prior_scheduler().config),
        prior_text_encoder=random_clip_text(),
        prior_tokenizer=toy_tokenizer(),
    )


def case(kind: str) -> tuple[ADMPipeline, dict]:
    """A pipeline, and the arguments of a guided call of two images."""
    labels = {"class_labels": LABELS}
    if kind == "classes":
        return make(), labels
    if kind == "rescaled, of diffusers' scheduler":
        return make(scheduler=DDIMScheduler()), {**labels, "guidance_rescale": 0.7}
    if kind in ("text", "glide"):
        unet = (
            random_text_unet("added_kv", addition_embed_type="text_embeds") if kind == "glide" else random_text_unet()
        )
        encoder = "glide" if kind == "glide" else "clip"
        pipe = make(unet=unet, text_encoder=random_text_encoder(encoder), tokenizer=toy_tokenizer(encoder))
        return pipe, {"prompt": ["a cat", "a dog"], "negative_prompt": "the mat"}
    if kind == "texts of two lengths":
        return make(unet=random_text_unet()), {"prompt_embeds": STATES, "negative_prompt_embeds": STATES[:1, :4]}
    if kind == "inpainter":
        unet = random_unet(in_channels=7, **CONDITIONAL)
        return make(ADMInpaintPipeline, unet), {**labels, "image": IMAGE, "mask_image": MASK}
    if kind == "upsampler":
        pipe = make(ADMSuperResolutionPipeline, random_unet(in_channels=6, **CONDITIONAL))
        return pipe, {**labels, "image": IMAGE[:, :, ::2, ::2]}
    if kind == "image to image":
        pipe = make(ADMImageToImagePipeline, random_unet(in_channels=6), source_dropout_prob=0.1)
        return pipe, {"image": IMAGE}
    if kind == "unclip":
        return unclip(), {"prompt": ["a cat", "a dog"], "prior_guidance_scale": 2.0, "prior_num_inference_steps": 2}
    control = {**labels, "image": IMAGE}
    if kind == "two controlnets":
        return with_controlnet(2), {**labels, "image": [IMAGE, IMAGE.flip(0)], "control_guidance_end": [0.5, 1.0]}
    if kind == "through the network":
        function = GuidanceFunction(lambda x_t, t, pred_original_sample, **_: pred_original_sample.sum(), "score", True)
        return with_controlnet(), {**control, "guidance_fn": function}
    return with_controlnet(), {**control, "guess_mode": kind == "guess mode"}


KINDS = [
    "classes",
    "rescaled, of diffusers' scheduler",
    "text",
    "glide",
    "texts of two lengths",
    "inpainter",
    "upsampler",
    "image to image",
    "unclip",
    "controlnet",
    "guess mode",
    "two controlnets",
    "through the network",
]


def draw(pipe, **arguments) -> torch.Tensor:
    options = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 2.5, **arguments}
    return pipe(generator=torch.Generator().manual_seed(0), **options).images


def rows_of(module: torch.nn.Module) -> list[int]:
    """The batch sizes of its forward passes from now on."""
    rows = []

    def hook(_, args, kwargs):
        rows.append(len(args[0] if args else kwargs["sample"]))

    module.register_forward_pre_hook(hook, with_kwargs=True)
    return rows


class TestJointAndSeparate:
    @pytest.mark.parametrize("kind", KINDS)
    def test_same_samples(self, kind):
        pipe, arguments = case(kind)
        arguments["num_inference_steps"] = 2
        rows, of_prior = rows_of(pipe.unet), rows_of(pipe.prior) if kind == "unclip" else []
        pipe.set_guidance_passes("joint")
        joint = draw(pipe, **arguments)
        assert rows == [4] * 2
        assert set(of_prior) <= {4}
        rows.clear(), of_prior.clear()
        pipe.set_guidance_passes("separate")
        separate = draw(pipe, **arguments)
        assert rows == [2] * 4
        assert set(of_prior) <= {2}
        assert len(of_prior) in (0, 4)
        assert rounding_errors(separate, joint) <= SAMPLING

    def test_the_controlnet_runs_in_the_conditional_pass_only_in_guess_mode(self):
        pipe, arguments = case("guess mode")
        pipe.set_guidance_passes("separate")
        seen, of_branch = [], rows_of(pipe.controlnet)

        def see(_, args, kwargs):
            seen.append((kwargs["class_labels"].tolist(), "mid_block_additional_residual" in kwargs))

        pipe.unet.register_forward_pre_hook(see, with_kwargs=True)
        draw(pipe, **arguments)
        assert seen == [([NULL] * 2, False), (LABELS, True)] * STEPS
        assert of_branch == [2] * STEPS

    def test_the_variance_is_that_of_the_conditional_pass(self):
        """With a scale of 0 the mean is that of the unconditional pass, whose samples have another variance."""
        pipe, arguments = case("classes")
        noise = {}
        for passes in ("joint", "separate"):
            pipe.set_guidance_passes(passes)
            noise[passes] = draw(pipe, guidance_scale=0.0, **arguments)
        assert rounding_errors(noise["separate"], noise["joint"]) <= SAMPLING
        assert (noise["joint"] - draw(pipe, guidance_scale=1.0, class_labels=[NULL] * 2)).abs().max() > 1e-3

    def test_a_controlnet_without_guess_mode_runs_in_both(self):
        pipe, arguments = case("controlnet")
        rows = rows_of(pipe.controlnet)
        for passes, expected in (("joint", [4]), ("separate", [2, 2])):
            rows.clear()
            pipe.set_guidance_passes(passes)
            draw(pipe, **arguments)
            assert rows == expected * STEPS


class TestSetting:
    def test_words(self):
        pipe = make()
        assert pipe.guidance_passes == "auto"
        pipe.set_guidance_passes("separate")
        assert pipe.guidance_passes == "separate"
        with pytest.raises(ValueError, match=r"`passes` is 'both'; it must be one of \['auto', 'joint', 'separate'\]"):
            pipe.set_guidance_passes("both")
        assert pipe.guidance_passes == "separate"

    def test_other_pipelines_of_the_same_components_keep_it(self):
        pipe = make()
        pipe.set_guidance_passes("separate")
        made = [
            ADMInpaintPipeline.from_pipe(pipe),
            ADMControlNetPipeline.from_pipe(pipe, controlnet=branch(pipe.unet)),
            copy.copy(pipe),  # as `invert` calls
        ]
        assert [other.guidance_passes for other in made] == ["separate"] * 3
        assert ADMPipeline.from_pipe(made[0]).guidance_passes == "separate"

    def test_inversion(self):
        pipe = make(scheduler=DDIMScheduler(clip_sample=False))
        pipe.set_guidance_passes("separate")
        rows = rows_of(pipe.unet)
        pipe.invert(IMAGE, num_inference_steps=2, class_labels=LABELS, guidance_scale=2.0)
        assert set(rows) == {2}

    def test_by_itself_it_joins_small_batches_of_the_cpu_and_all_of_other_devices(self):
        for device, number, size, joins in (
            ("cpu", 1, 64, True),
            ("cpu", 4, 32, True),
            ("cpu", 4, 64, False),
            ("cpu", 1, 256, False),
            ("meta", 16, 64, True),
        ):
            samples = torch.empty(number, 3, size, size, device=device)
            assert joins_passes("auto", samples) is joins
            assert joins_passes("joint", samples)
            assert not joins_passes("separate", samples)


class TestWhatDoesNotRun:
    INTERVAL = {"guidance_start": 0.25, "guidance_end": 0.75}

    @pytest.mark.parametrize("passes, guided", [("joint", [4]), ("separate", [2, 2])])
    def test_the_unconditional_pass_outside_of_the_interval(self, passes, guided):
        pipe = make()
        pipe.set_guidance_passes(passes)
        rows = rows_of(pipe.unet)
        draw(pipe, class_labels=LABELS, **self.INTERVAL)
        assert rows == [2, *guided * 2, 2]

    @pytest.mark.parametrize("passes, guided", [("joint", [4]), ("separate", [2, 2])])
    def test_the_unconditional_pass_once_a_callback_turns_it_off(self, passes, guided):
        pipe = make()
        pipe.set_guidance_passes(passes)
        rows = rows_of(pipe.unet)

        def turn_off(pipe, index, timestep, kwargs):
            pipe.guidance_scale = 2.5 if index < 1 else 1.0
            return kwargs

        draw(pipe, class_labels=LABELS, callback_on_step_end=turn_off)
        assert rows == [*guided * 2, 2, 2]

    @pytest.mark.parametrize("passes", ["joint", "separate"])
    def test_controlnets_outside_of_their_intervals_and_with_scale_0(self, passes):
        pipe = with_controlnet(3)
        pipe.set_guidance_passes(passes)
        rows = [rows_of(net) for net in pipe.controlnet.nets]
        draw(
            pipe,
            class_labels=LABELS,
            image=[IMAGE] * 3,
            controlnet_conditioning_scale=[1.0, 0.5, 0.0],
            control_guidance_start=[0.0, 0.5, 0.0],
            control_guidance_end=[0.25, 1.0, 1.0],
        )
        assert [sum(each) for each in rows] == [4, 8, 0]

    def test_classifier_and_functions_outside_of_the_interval_and_with_scale_0(self):
        pipe = make(classifier=random_classifier(num_classes=4))
        of_classifier, of_function = rows_of(pipe.classifier), []

        def function(x_t, t, pred_original_sample, **conditions):
            of_function.append(len(x_t))
            return pred_original_sample.sum()

        options = {"class_labels": LABELS, "guidance_fn": GuidanceFunction(function, "score", False), **self.INTERVAL}
        draw(pipe, classifier_guidance_scale=2.0, **options)
        assert of_classifier == of_function == [2, 2]
        of_classifier.clear()
        draw(pipe, classifier_guidance_scale=0.0, **options)
        assert of_classifier == []


class TestOnceACall:
    @pytest.mark.parametrize("passes", ["joint", "separate"])
    def test_control_images_are_embedded_once(self, passes):
        """Both passes share the embedding; that of a scale of 0 is not needed."""
        pipe = with_controlnet(2)
        pipe.set_guidance_passes(passes)
        rows = [rows_of(net.controlnet_cond_embedding) for net in pipe.controlnet.nets]
        for scales in ([1.0, 1.0], [1.0, 0.0], [0.0, 0.0]):
            draw(pipe, class_labels=LABELS, image=[IMAGE] * 2, controlnet_conditioning_scale=scales)
        assert rows == [[2, 2], [2]]

    def test_texts_are_encoded_once(self):
        pipe, arguments = case("text")
        calls = []
        pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
        draw(pipe, **arguments)
        assert len(calls) == 1

    @pytest.mark.parametrize("number", [1, 2])
    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_offloading_brings_the_weights_of_the_embedding(self, number, offload_type, tmp_path):
        pipe = with_controlnet(number)
        arguments = {"class_labels": LABELS, "image": [IMAGE] * 2 if number > 1 else IMAGE, "num_inference_steps": 1}
        expected = draw(pipe, **arguments)
        pipe.controlnet.enable_group_offload(
            torch.device("cpu"),
            offload_type=offload_type,
            num_blocks_per_group=1 if offload_type == "block_level" else None,
            offload_to_disk_path=str(tmp_path),
        )
        assert rounding_errors(draw(pipe, **arguments), expected) <= SAMPLING
