"""
ControlNets in an inpainting pipeline and with an upsampler, and a classifier that guides either or both: each against a
loop of this file, in which U-Net, ControlNet, classifier and scheduler are called by hand.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from tolerances import SAMPLING, rounding_errors
from toy_models import CONDITIONAL, fill_randomly, random_classifier, random_unet

from diffusers_adm import (
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    ADMInpaintPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)


ABSENT = {"vae": None, "text_encoder": None, "tokenizer": None}
CHAIN = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}
LABELS, NULL, STEPS, LEVEL = torch.tensor([1, 2]), 4, 4, 30
GUIDANCE, CLASSIFIER, CONTROL = 2.5, 3.0, 0.7


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bytes_as_floats(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=seeded(seed)).float() / 255


IMAGE, CONTROL_IMAGE = bytes_as_floats(2, 3, 8, 8, seed=1), bytes_as_floats(2, 3, 8, 8, seed=2)
SMALL = bytes_as_floats(2, 3, 4, 4, seed=3)
MASK = torch.zeros(8, 8)
MASK[2:6, 1:7] = 1
KEPT = MASK == 0


class Task:
    """A pipeline, its own arguments, and what the task adds to a sampling loop."""

    def __init__(self, kind: str, scheduler):
        channels = {"plain": 3, "trained to inpaint": 7, "upsampler": 6}[kind]
        level = {"time_cond_proj_dim": 8} if kind == "upsampler" else {}
        self.unet = random_unet(in_channels=channels, out_channels=6, **CONDITIONAL, **level)
        # Its zero convolutions are random, too, so that it makes a difference.
        self.controlnet = fill_randomly(AdaGNControlNetModel.from_unet(self.unet), seed=1)
        cls = ADMSuperResolutionPipeline if kind == "upsampler" else ADMInpaintPipeline
        self.kind, classifier = kind, random_classifier(num_classes=4)
        self.pipe = cls(self.unet, scheduler, **ABSENT, classifier=classifier, controlnet=self.controlnet)
        self.pipe.set_progress_bar_config(disable=True)
        if kind == "upsampler":
            self.arguments = {"image": SMALL, "noise_level": LEVEL}
        else:
            self.arguments = {"image": IMAGE, "mask_image": MASK, "jump_n_sample": 1}

    def call(self, **arguments) -> torch.Tensor:
        arguments = {"class_labels": LABELS, "num_inference_steps": STEPS, **self.arguments, **arguments}
        return self.pipe(**arguments, generator=seeded(), output_type="latent").images

    def loop(self, guidance_scale=1.0, classifier_scale=0.0, control_scale=CONTROL, guess_mode=False) -> torch.Tensor:
        scheduler, generator = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config), seeded()
        learned = isinstance(scheduler, LearnedVarianceDDPMScheduler)
        scheduler.set_timesteps(STEPS)
        alphas = scheduler.alphas_cumprod.double()
        x, original = torch.randn(2, 3, 8, 8, generator=generator), 2 * IMAGE - 1
        extra, kwargs = torch.zeros(2, 0, 8, 8), {}
        if self.kind == "trained to inpaint":
            extra = torch.cat([original * KEPT, KEPT.float().expand(2, 1, 8, 8)], dim=1)
        elif self.kind == "upsampler":
            alpha = alphas[LEVEL - 1].float()
            low_res = alpha**0.5 * (2 * SMALL - 1) + (1 - alpha) ** 0.5 * torch.randn(2, 3, 4, 4, generator=generator)
            extra = F.interpolate(low_res, (8, 8), mode="bilinear", align_corners=False)
            levels = torch.full((2,), LEVEL)
            kwargs = {"timestep_cond": get_timestep_embedding(levels, 8, flip_sin_to_cos=True, downscale_freq_shift=0)}
        for t in scheduler.timesteps:
            signal, std = alphas[t].sqrt().float(), (1 - alphas[t]).sqrt().float()
            if self.kind == "plain":
                noised = signal * original + std * torch.randn(2, 3, 8, 8, generator=generator)
                x = torch.where(KEPT, noised, x)

            def predict(labels, gets_residuals=True, x=x, t=t):
                inputs, residuals = torch.cat([x, extra], dim=1), {}
                if gets_residuals and control_scale:
                    down, mid = self.controlnet(
                        inputs,
                        t,
                        controlnet_cond=CONTROL_IMAGE,
                        class_labels=labels,
                        conditioning_scale=control_scale,
                        guess_mode=guess_mode,
                        return_dict=False,
                        **kwargs,
                    )
                    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
                return self.unet(inputs, t, class_labels=labels, **residuals, **kwargs).sample

            output = predict(LABELS)
            mean, variance = output.chunk(2, dim=1)
            if guidance_scale != 1.0:
                uncond = predict(torch.full_like(LABELS, NULL), gets_residuals=not guess_mode)[:, :3]
                mean = uncond + guidance_scale * (mean - uncond)
            options = {"generator": generator}
            if classifier_scale:
                with torch.enable_grad():
                    at = x.clone().requires_grad_()
                    log_p = self.pipe.classifier(at, t).logits.log_softmax(dim=1)[range(2), LABELS].sum()
                    score = classifier_scale * torch.autograd.grad(log_p, at)[0]
                if self.kind == "trained to inpaint" and learned:
                    score = score * ~KEPT
                if learned:
                    options["guidance_gradient"] = score
                else:
                    mean = mean - std * score
            if self.kind == "trained to inpaint":
                mean = torch.where(KEPT, (x - signal * original) / std, mean)
            x = scheduler.step(torch.cat([mean, variance], dim=1) if learned else mean, t, x, **options).prev_sample
        return x if self.kind == "upsampler" else torch.where(KEPT, original, x)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


KINDS = ("plain", "trained to inpaint", "upsampler")


@pytest.fixture(scope="module", params=KINDS)
def task(request):
    return Task(request.param, LearnedVarianceDDPMScheduler(**CHAIN))


CONTROLLED = {"control_image": CONTROL_IMAGE, "controlnet_conditioning_scale": CONTROL}


class TestAgainstALoop:
    def check(self, found: torch.Tensor, expected: torch.Tensor, *others: torch.Tensor):
        assert rounding_errors(found, expected) <= SAMPLING
        for other in others:
            assert (found - other).abs().max() > 0.01

    def test_controlnet(self, task):
        self.check(task.call(**CONTROLLED), task.loop(), task.call())

    def test_controlnet_and_guidance(self, task):
        found = task.call(**CONTROLLED, guidance_scale=GUIDANCE)
        self.check(found, task.loop(GUIDANCE), task.call(**CONTROLLED), task.call(guidance_scale=GUIDANCE))

    def test_guess_mode(self, task):
        found = task.call(**CONTROLLED, guidance_scale=GUIDANCE, guess_mode=True)
        self.check(found, task.loop(GUIDANCE, guess_mode=True), task.call(**CONTROLLED, guidance_scale=GUIDANCE))

    def test_classifier(self, task):
        found = task.call(classifier_guidance_scale=CLASSIFIER)
        self.check(found, task.loop(1.0, CLASSIFIER, control_scale=0.0), task.call())

    @pytest.mark.parametrize("guidance_scale", [1.0, GUIDANCE])
    def test_controlnet_and_classifier(self, task, guidance_scale):
        guided = {"guidance_scale": guidance_scale}
        found = task.call(**CONTROLLED, **guided, classifier_guidance_scale=CLASSIFIER)
        others = task.call(**CONTROLLED, **guided), task.call(**guided, classifier_guidance_scale=CLASSIFIER)
        self.check(found, task.loop(guidance_scale, CLASSIFIER), *others)

    @pytest.mark.parametrize("kind", KINDS)
    def test_with_a_scheduler_of_diffusers(self, kind):
        """The classifier's gradient then changes the prediction."""
        task = Task(kind, DDIMScheduler(**CHAIN, clip_sample=False))
        found = task.call(**CONTROLLED, guidance_scale=GUIDANCE, classifier_guidance_scale=CLASSIFIER)
        self.check(found, task.loop(GUIDANCE, CLASSIFIER))

    def test_controlnet_in_some_steps(self, task):
        calls = []
        handle = task.controlnet.register_forward_pre_hook(lambda _, args: calls.append(int(args[1])))
        task.call(**CONTROLLED, control_guidance_end=0.5)
        handle.remove()
        assert len(calls) == STEPS // 2


class TestComponent:
    def test_without_an_image_it_does_not_run(self, task):
        calls = []
        handle = task.controlnet.register_forward_pre_hook(lambda *args: calls.append(args))
        assert rounding_errors(task.call(), task.loop(control_scale=0.0)) <= SAMPLING
        handle.remove()
        assert calls == []

    def test_an_image_needs_it(self, task):
        components = {**task.pipe.components, "controlnet": None}
        with pytest.raises(ValueError, match="`control_image` was given, but this pipeline has no `controlnet`"):
            type(task.pipe)(**components)(**task.arguments, **CONTROLLED)

    @pytest.mark.parametrize(
        "argument",
        [
            {"controlnet_conditioning_scale": 0.5},
            {"guess_mode": True},
            {"control_guidance_start": 0.2},
            {"control_guidance_end": 0.8},
        ],
        ids=lambda argument: next(iter(argument)),
    )
    def test_its_arguments_need_an_image(self, task, argument):
        (name,) = argument
        with pytest.raises(ValueError, match=f"`{name}` would have no effect, as there is no `control_image`"):
            task.pipe(**task.arguments, **argument)

    def test_it_is_saved_and_loaded(self, task, tmp_path):
        task.pipe.save_pretrained(tmp_path)
        found = []
        for controlnet in ({}, {"controlnet": None}):
            pipe = type(task.pipe).from_pretrained(tmp_path, **controlnet)
            pipe.set_progress_bar_config(disable=True)
            found.append(pipe)
        assert found[1].controlnet is None
        again = found[0](
            **task.arguments,
            **CONTROLLED,
            class_labels=LABELS,
            num_inference_steps=STEPS,
            generator=seeded(),
            output_type="latent",
        ).images
        assert rounding_errors(again, task.call(**CONTROLLED)) <= SAMPLING

    def test_folders_of_earlier_versions_name_none(self, task, tmp_path):
        type(task.pipe)(**{**task.pipe.components, "controlnet": None}).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index.pop("controlnet") == [None, None]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert type(task.pipe).from_pretrained(tmp_path).controlnet is None

    def test_several(self, task):
        """Two of half the strength are one."""
        nets = [task.controlnet, task.controlnet]
        pipe = type(task.pipe)(**{**task.pipe.components, "controlnet": nets})
        pipe.set_progress_bar_config(disable=True)
        assert isinstance(pipe.controlnet, AdaGNMultiControlNetModel)
        found = pipe(
            **task.arguments,
            control_image=[CONTROL_IMAGE, CONTROL_IMAGE],
            controlnet_conditioning_scale=[CONTROL / 2, CONTROL / 2],
            class_labels=LABELS,
            num_inference_steps=STEPS,
            generator=seeded(),
            output_type="latent",
        ).images
        assert rounding_errors(found, task.loop()) <= SAMPLING

    def test_one_of_another_network_is_refused(self, task):
        other = AdaGNControlNetModel.from_unet(random_unet(in_channels=5))
        with pytest.raises(ValueError, match="in_channels"):
            type(task.pipe)(**{**task.pipe.components, "controlnet": other})
        with pytest.raises(ValueError, match="`controlnet` is, or holds, a AdaGNUNet2DModel"):
            type(task.pipe)(**{**task.pipe.components, "controlnet": task.unet})

    def test_an_image_of_another_size_is_refused(self, task):
        with pytest.raises(ValueError, match="`control_image` is 8 x 16 .*, but 8 x 8 are generated. Resize"):
            task.call(control_image=torch.zeros(3, 8, 16))

    def test_names_in_messages_are_those_of_the_call(self, task):
        with pytest.raises(ValueError, match="`control_image` holds 3"):
            task.call(control_image=torch.zeros(3, 3, 8, 8))


def test_the_noise_of_a_low_resolution_image_is_told_to_the_controlnet():
    task = Task("upsampler", LearnedVarianceDDPMScheduler(**CHAIN))
    seen = []
    task.controlnet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["timestep_cond"]), with_kwargs=True
    )
    task.call(**CONTROLLED)
    task.call(**CONTROLLED, noise_level=0)
    assert not torch.equal(seen[0], seen[-1])
