"""ADMPipeline against loops written out by hand, against diffusers' own pipelines, and against wrong input."""

import inspect
import math
import re

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
)
from diffusers.callbacks import PipelineCallback
from docstrings import check_documented_arguments
from tolerances import SAMPLING, levels_apart, rounding_errors
from toy_models import CONDITIONAL, random_diffusers_unet, random_unet

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.guidance import guide, log_probability_gradient, shift_prediction, signal_and_std
from diffusers_adm.conditioning.text import encode_tokens, tokenize


SHAPE = (2, 3, 8, 8)


def make_pipeline(unet=None, scheduler=None, **config) -> ADMPipeline:
    pipe = ADMPipeline(
        unet=random_unet(**config) if unet is None else unet,
        scheduler=LearnedVarianceDDPMScheduler() if scheduler is None else scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        classifier=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


@pytest.fixture
def pipe() -> ADMPipeline:
    return make_pipeline()


@pytest.fixture
def conditional_pipe() -> ADMPipeline:
    return make_pipeline(**CONDITIONAL)


class Recorder:
    """What the network of a pipeline was called with."""

    def __init__(self, pipe: ADMPipeline):
        self.calls = []
        pipe.unet.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs):
        labels = kwargs.get("class_labels")
        self.calls.append((args[0].clone(), float(args[1]), None if labels is None else labels.tolist()))

    @property
    def labels(self) -> list:
        return [labels for _, _, labels in self.calls]


class TestSampling:
    @torch.no_grad()
    def loop(self, pipe: ADMPipeline, generator, class_labels=None, eta=None, **timesteps) -> torch.Tensor:
        """Ancestral or DDIM sampling, written out."""
        scheduler = LearnedVarianceDDPMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(**timesteps)
        sample = torch.randn(SHAPE, generator=generator)
        for t in scheduler.timesteps.tolist():
            output = pipe.unet(sample, t, class_labels).sample
            sample = scheduler.step(output, t, sample, generator=generator, eta=eta).prev_sample
        return sample

    def test_several_images_of_each_class(self, conditional_pipe):
        recorder = Recorder(conditional_pipe)
        arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
        generators = [seeded(i) for i in range(4)]
        images = conditional_pipe(
            class_labels=[3, 1], num_images_per_prompt=2, generator=generators, **arguments
        ).images
        assert recorder.labels == [[4, 4, 4, 4, 3, 3, 1, 1]] * 2
        generators = [seeded(i) for i in range(4)]
        assert (
            rounding_errors(
                images, conditional_pipe(class_labels=[3, 3, 1, 1], generator=generators, **arguments).images
            )
            <= SAMPLING
        )

    @pytest.mark.parametrize("eta", [None, 0.0, 0.5])
    @pytest.mark.parametrize("timesteps", [{"num_inference_steps": 7}, {"timestep_respacing": "3,2"}], ids=str)
    def test_equals_a_loop_written_by_hand(self, pipe, eta, timesteps):
        actual = pipe(batch_size=2, generator=seeded(), eta=eta, output_type="latent", **timesteps).images
        expected = self.loop(pipe, seeded(), eta=eta, **timesteps)
        assert rounding_errors(actual, expected) <= SAMPLING
        assert expected.std() > 0.1

    def test_respaced_by_ddim_stride(self, pipe):
        recorder = Recorder(pipe)
        pipe(timestep_respacing="ddim10", eta=0.0, output_type="latent")
        assert [t for _, t, _ in recorder.calls] == list(range(900, -1, -100))
        assert pipe.num_timesteps == 10

    def test_equals_the_unconditional_pipeline_of_diffusers(self, pipe):
        theirs = DDPMPipeline(unet=pipe.unet, scheduler=DDPMScheduler(variance_type="learned_range"))
        theirs.set_progress_bar_config(disable=True)
        expected = theirs(batch_size=2, num_inference_steps=6, generator=seeded(), output_type="np").images
        actual = pipe(batch_size=2, num_inference_steps=6, generator=seeded(), output_type="np").images
        # Their tables are float32 (log-variances off by up to 4e-4), and the first step multiplies errors by 157.
        np.testing.assert_allclose(actual, expected, atol=1e-3)

    @pytest.mark.parametrize(
        "class_labels, batch_size, expected",
        [
            (3, 2, [3, 3]),
            ([3, 1], 1, [3, 1]),
            ([3, 1], 2, [3, 1]),
            (torch.tensor([3, 1], dtype=torch.int32), 1, [3, 1]),
            (torch.tensor(3), 2, [3, 3]),
            (np.array([0, 4]), 1, [0, 4]),
        ],
        ids=str,
    )
    def test_class_labels(self, conditional_pipe, class_labels, batch_size, expected):
        kwargs = {"num_inference_steps": 3, "generator": seeded(), "output_type": "latent"}
        actual = conditional_pipe(class_labels=class_labels, batch_size=batch_size, **kwargs).images
        assert (
            rounding_errors(
                actual, self.loop(conditional_pipe, seeded(), torch.tensor(expected), num_inference_steps=3)
            )
            <= SAMPLING
        )

    def test_without_class_labels_the_null_class_is_drawn(self, conditional_pipe):
        kwargs = {"batch_size": 2, "num_inference_steps": 3, "output_type": "latent"}
        null = conditional_pipe(generator=seeded(), **kwargs).images
        assert rounding_errors(null, conditional_pipe(generator=seeded(), class_labels=4, **kwargs).images) <= SAMPLING
        assert rounding_errors(null, conditional_pipe(generator=seeded(), class_labels=3, **kwargs).images) > SAMPLING

    def test_labels_of_a_timestep_embedding_are_any_number(self):
        pipe = make_pipeline(class_embed_type="timestep")
        kwargs = {"num_inference_steps": 2, "output_type": "latent"}
        first = pipe(class_labels=[700], generator=seeded(), **kwargs).images
        assert rounding_errors(first, pipe(class_labels=[3], generator=seeded(), **kwargs).images) > SAMPLING

    def test_embeddings_as_class_labels(self):
        pipe = make_pipeline(class_embed_type="identity")
        embeddings = noise((2, 32))
        images = pipe(class_labels=embeddings, num_inference_steps=2, generator=seeded(), output_type="latent").images
        assert rounding_errors(images, self.loop(pipe, seeded(), embeddings, num_inference_steps=2)) <= SAMPLING

    def test_an_image_does_not_depend_on_its_batch(self, conditional_pipe):
        kwargs = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
        batch = conditional_pipe(class_labels=[0, 1, 2], generator=[seeded(i) for i in range(3)], **kwargs).images
        for i in range(3):
            single = conditional_pipe(class_labels=i, generator=seeded(i), **kwargs).images
            # Sums run in another order for another batch size; steps as in the loop above amplify that.
            torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-4, atol=1e-4)

    def test_the_global_random_state_is_left_alone(self, pipe):
        state = torch.get_rng_state()
        pipe(num_inference_steps=2, generator=seeded())
        assert torch.equal(torch.get_rng_state(), state)

    def test_latents(self, pipe):
        kwargs = {"batch_size": 2, "num_inference_steps": 3, "eta": 0.0, "output_type": "latent"}
        start = noise()
        assert (
            rounding_errors(pipe(latents=start, **kwargs).images, pipe(generator=seeded(), **kwargs).images) <= SAMPLING
        )
        assert torch.equal(start, noise())

    def test_nothing_in_the_loop_waits_for_the_device(self):
        """On the meta device no number can be read; whatever would stall a GPU raises an error."""
        pipe = make_pipeline(**CONDITIONAL).to("meta")
        kwargs = {"class_labels": [1, 2], "guidance_scale": 2.0, "guidance_rescale": 0.5, "output_type": "latent"}
        for eta in (None, 0.5):
            images = pipe(eta=eta, num_inference_steps=3, **kwargs).images
            assert (images.shape, images.device.type) == (SHAPE, "meta")

    def test_solvers_are_told_where_they_begin(self, monkeypatch):
        """Else they look for their first timestep among all timesteps, which waits for the device."""

        def search(*_):
            raise AssertionError("searched for a timestep")

        monkeypatch.setattr(EulerDiscreteScheduler, "index_for_timestep", search)
        make_pipeline(scheduler=EulerDiscreteScheduler())(num_inference_steps=3)

    def test_diffusers_unet(self):
        unet = random_diffusers_unet()
        ours = random_unet(seed=1)
        ours.load_state_dict(unet.state_dict())
        kwargs = {"num_inference_steps": 3, "output_type": "latent"}
        expected = make_pipeline(ours)(generator=seeded(), **kwargs).images
        actual = make_pipeline(unet)(generator=seeded(), **kwargs).images
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


class TestSchedulersOfDiffusers:
    """Swapped in with `from_config`. Each of them: test_pipeline_adm_samplers.py."""

    @pytest.mark.parametrize("cls", [DDPMScheduler, DDPMParallelScheduler])
    def test_ddpm_with_learned_range_gets_all_channels(self, pipe, cls):
        ours = pipe(num_inference_steps=5, generator=seeded(), output_type="np").images
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        theirs = pipe(num_inference_steps=5, generator=seeded(), output_type="np").images
        np.testing.assert_allclose(theirs, ours, atol=1e-3)  # their tables are float32
        pipe.scheduler = cls.from_config(pipe.scheduler.config, variance_type="fixed_large")
        fixed = pipe(num_inference_steps=5, generator=seeded(), output_type="np").images
        assert np.abs(fixed - ours).max() > 0.01

    def test_eta_of_ddim(self, pipe):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        kwargs = {"num_inference_steps": 4, "latents": noise((1, 3, 8, 8)), "output_type": "latent"}
        default, zero, one = (pipe(generator=seeded(1), eta=eta, **kwargs).images for eta in (None, 0.0, 1.0))
        assert rounding_errors(default, zero) <= SAMPLING
        assert rounding_errors(zero, one) > SAMPLING


class TestGuidance:
    @torch.no_grad()
    def test_formula(self, conditional_pipe):
        """Two separate passes, the formula in float64, the variance of the conditional pass."""
        labels, null = torch.tensor([1, 2]), torch.tensor([4, 4])
        scheduler = LearnedVarianceDDPMScheduler()
        scheduler.set_timesteps(5)
        generator = seeded()
        sample = torch.randn(SHAPE, generator=generator)
        for t in scheduler.timesteps:
            cond, uncond = (conditional_pipe.unet(sample, t, x).sample.double() for x in (labels, null))
            mean = (1 - 3.0) * uncond[:, :3] + 3.0 * cond[:, :3]
            output = torch.cat([mean, cond[:, 3:]], dim=1).float()
            sample = scheduler.step(output, t, sample, generator=generator).prev_sample
        actual = conditional_pipe(
            class_labels=[1, 2], guidance_scale=3.0, num_inference_steps=5, generator=seeded(), output_type="latent"
        ).images
        torch.testing.assert_close(actual, sample, rtol=1e-4, atol=1e-4)

    def test_both_passes_are_one_batch(self, conditional_pipe):
        recorder = Recorder(conditional_pipe)
        conditional_pipe(class_labels=[1, 2], guidance_scale=3.0, num_inference_steps=3)
        assert recorder.labels == [[4, 4, 1, 2]] * 3
        assert all(torch.equal(sample[:2], sample[2:]) for sample, _, _ in recorder.calls)
        assert conditional_pipe.guidance_scale == 3.0

    def test_scale_one_is_off(self, conditional_pipe):
        recorder = Recorder(conditional_pipe)
        conditional_pipe(class_labels=[1, 2], guidance_scale=1.0, num_inference_steps=2)
        assert recorder.labels == [[1, 2]] * 2

    def test_scale_zero_is_the_null_class(self, conditional_pipe):
        """By DDIM, which looks at no variance: that one stays the conditional pass's."""
        kwargs = {"num_inference_steps": 4, "eta": 0.0, "output_type": "latent"}
        actual = conditional_pipe(class_labels=1, guidance_scale=0.0, generator=seeded(), **kwargs).images
        expected = conditional_pipe(class_labels=4, generator=seeded(), **kwargs).images
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "start, end, guided", [(0.0, 1.0, "yyyyy"), (0.2, 0.8, ".yyy."), (0.0, 0.4, "yy..."), (0.3, 1.0, "..yyy")]
    )
    def test_interval(self, conditional_pipe, start, end, guided):
        recorder = Recorder(conditional_pipe)
        conditional_pipe(
            class_labels=1, guidance_scale=2.0, guidance_start=start, guidance_end=end, num_inference_steps=5
        )
        assert recorder.labels == [[4, 1] if mark == "y" else [1] for mark in guided]

    def test_rescale(self):
        """Lin et al. 2023, eqs. 15 and 16, by example, in NumPy."""
        cond, uncond = noise(seed=1).double(), 2 * noise(seed=2).double()
        guided = (uncond + 4 * (cond - uncond)).numpy()
        expected = np.empty_like(guided)
        for i in range(len(guided)):
            rescaled = guided[i] * np.std(cond[i].numpy(), ddof=1) / np.std(guided[i], ddof=1)
            expected[i] = 0.7 * rescaled + 0.3 * guided[i]
        np.testing.assert_allclose(guide(cond, uncond, 4.0, 0.7).numpy(), expected, rtol=1e-12)

    def test_rescale_reaches_the_network_output(self, conditional_pipe):
        kwargs = {"class_labels": 1, "guidance_scale": 5.0, "num_inference_steps": 3, "output_type": "latent"}
        plain, rescaled = (
            conditional_pipe(generator=seeded(), guidance_rescale=rescale, **kwargs).images for rescale in (0.0, 1.0)
        )
        assert rounding_errors(plain, rescaled) > SAMPLING

    def test_rescale_of_an_untrained_model(self):
        """It predicts 0 everywhere, so there is no standard deviation to divide by."""
        unet = random_unet(**CONDITIONAL)
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.zeros_(unet.conv_out.bias)
        images = make_pipeline(unet)(
            class_labels=1, guidance_scale=2.0, guidance_rescale=0.7, num_inference_steps=2, output_type="latent"
        ).images
        assert torch.isfinite(images).all()


class TestOutput:
    def test_types(self, pipe):
        kwargs = {"batch_size": 2, "num_inference_steps": 2}
        latent, pt, np_, pil = (
            pipe(generator=seeded(), output_type=kind, **kwargs).images for kind in ("latent", "pt", "np", "pil")
        )
        assert latent.shape == SHAPE
        assert rounding_errors(pt, ((latent + 1) / 2).clamp(0, 1)) <= SAMPLING
        assert rounding_errors(np_, pt.permute(0, 2, 3, 1)) <= SAMPLING
        assert all(isinstance(image, PIL.Image.Image) and image.mode == "RGB" for image in pil)
        assert levels_apart(np.stack(pil), (np_ * 255).round().astype(np.uint8)) <= 1

    def test_grey_images(self):
        (image,) = make_pipeline(in_channels=1, out_channels=2)(num_inference_steps=2).images
        assert (image.mode, image.size) == ("L", (8, 8))

    def test_tuple(self, pipe):
        expected = pipe(num_inference_steps=2, generator=seeded(), output_type="np").images
        (images,) = pipe(num_inference_steps=2, generator=seeded(), output_type="np", return_dict=False)
        assert rounding_errors(images, expected) <= SAMPLING

    @pytest.mark.parametrize(
        "sample_size, asked, expected",
        [
            ((4, 12), {}, (4, 12)),
            (8, {"height": 16}, (16, 8)),
            (None, {"height": 6, "width": 10}, (6, 10)),
        ],
        ids=str,
    )
    def test_size(self, sample_size, asked, expected):
        pipe = make_pipeline(sample_size=sample_size)
        assert pipe(num_inference_steps=1, output_type="pt", **asked).images.shape == (1, 3, *expected)

    def test_progress_bar(self, pipe, capsys):
        pipe.set_progress_bar_config(disable=False)
        pipe(num_inference_steps=3)
        assert "3/3" in capsys.readouterr().err
        assert pipe.num_timesteps == 3


class TestCallback:
    def test_is_called_after_each_step(self, pipe):
        seen = []

        def callback(pipeline, step, timestep, kwargs):
            assert pipeline is pipe
            seen.append((step, int(timestep), kwargs["latents"].clone()))
            return kwargs

        final = pipe(num_inference_steps=4, callback_on_step_end=callback, output_type="latent").images
        assert [(step, t) for step, t, _ in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
        assert torch.equal(seen[-1][2], final)

    def test_replaces_the_sample(self, pipe):
        def callback(pipeline, step, timestep, kwargs):
            return {"latents": torch.zeros_like(kwargs["latents"])} if step == 2 else {}

        images = pipe(num_inference_steps=3, callback_on_step_end=callback, output_type="latent").images
        assert torch.equal(images, torch.zeros(1, 3, 8, 8))

    def test_interrupts(self, pipe):
        recorder = Recorder(pipe)

        def callback(pipeline, step, timestep, kwargs):
            pipeline._interrupt = step == 1
            return kwargs

        pipe(num_inference_steps=5, callback_on_step_end=callback)
        assert len(recorder.calls) == 2
        assert pipe.interrupt
        pipe(num_inference_steps=5)
        assert len(recorder.calls) == 7
        assert not pipe.interrupt

    # The second is what callbacks written for pipelines of diffusers set.
    @pytest.mark.parametrize("name", ["guidance_scale", "_guidance_scale"])
    def test_switches_guidance_on_and_off(self, conditional_pipe, name):
        def switch_to(scale):
            def callback(pipeline, step, timestep, kwargs):
                setattr(pipeline, name, scale)
                return kwargs

            return callback

        kwargs = {"class_labels": 1, "num_inference_steps": 3, "output_type": "latent"}
        recorder = Recorder(conditional_pipe)
        on = conditional_pipe(callback_on_step_end=switch_to(2.0), generator=seeded(), **kwargs).images
        assert recorder.labels == [[1], [4, 1], [4, 1]]
        assert conditional_pipe.guidance_scale == 2.0
        expected = conditional_pipe(guidance_scale=2.0, guidance_start=0.3, generator=seeded(), **kwargs).images
        assert rounding_errors(on, expected) <= SAMPLING

        recorder.calls.clear()
        kwargs["guidance_scale"] = 2.0
        off = conditional_pipe(callback_on_step_end=switch_to(1.0), generator=seeded(), **kwargs).images
        assert recorder.labels == [[4, 1], [1], [1]]
        assert rounding_errors(off, conditional_pipe(guidance_end=0.4, generator=seeded(), **kwargs).images) <= SAMPLING

    def test_without_tensors(self, pipe):
        seen = []
        pipe(
            num_inference_steps=1,
            callback_on_step_end=lambda pipeline, step, timestep, kwargs: seen.append(dict(kwargs)) or kwargs,
            callback_on_step_end_tensor_inputs=[],
        )
        assert seen == [{}]

    def test_callback_object_names_its_tensors(self, pipe):
        class Zero(PipelineCallback):
            tensor_inputs = ["latents"]

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                return {"latents": 0 * callback_kwargs["latents"]}

        images = pipe(num_inference_steps=2, callback_on_step_end=Zero(), output_type="latent").images
        assert not images.any()


class TestSaveAndLoad:
    def draw(self, pipe: DiffusionPipeline) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            class_labels=[1, 2], guidance_scale=2.0, num_inference_steps=3, generator=seeded(), output_type="pt"
        ).images

    @pytest.mark.parametrize("cls", [ADMPipeline, DiffusionPipeline])
    def test_round_trip(self, conditional_pipe, tmp_path, cls):
        conditional_pipe.save_pretrained(tmp_path)
        weights = [path.name for path in tmp_path.rglob("*") if path.suffix in (".bin", ".safetensors")]
        assert weights == ["diffusion_pytorch_model.safetensors"]
        loaded = cls.from_pretrained(tmp_path, use_safetensors=True)
        assert type(loaded) is ADMPipeline
        assert type(loaded.unet) is AdaGNUNet2DModel
        assert type(loaded.scheduler) is LearnedVarianceDDPMScheduler
        assert not loaded.unet.training
        assert loaded.vae is loaded.text_encoder is loaded.tokenizer is loaded.classifier is None
        assert rounding_errors(self.draw(loaded), self.draw(conditional_pipe)) <= SAMPLING

    # float32 and half-precision weights; the bound is a few roundings of the weights (2**-11 and 2**-8) on pixels in
    # [0, 1], through three steps whose first multiplies errors. Both draw the same noise.
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.03), (torch.bfloat16, 0.2)])
    def test_half_precision(self, conditional_pipe, tmp_path, dtype, tolerance):
        conditional_pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
        assert loaded.unet.dtype == dtype
        images, expected = self.draw(loaded), self.draw(conditional_pipe)
        assert (images - expected).abs().mean() < tolerance / 4
        assert (images - expected).abs().max() < tolerance

    def test_the_sample_is_not_rounded_between_steps(self):
        """Half precision is for the network alone: the roundings of a thousand steps would add up."""
        pipe = make_pipeline(random_unet().to(torch.bfloat16))
        seen = []

        def callback(pipeline, step, timestep, kwargs):
            seen.append(kwargs["latents"])
            return kwargs

        images = pipe(num_inference_steps=2, callback_on_step_end=callback, output_type="pt").images
        assert images.dtype == torch.float32
        assert all((latents.bfloat16().float() != latents).any() for latents in seen)

    def test_half_precision_weights_are_saved_as_such(self, tmp_path):
        pipe = make_pipeline()
        pipe.unet.to(torch.bfloat16)
        pipe.save_pretrained(tmp_path)
        loaded = ADMPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        for name, tensor in pipe.unet.state_dict().items():
            assert torch.equal(tensor, loaded.unet.state_dict()[name]), name

    def test_double_precision_stays(self):
        pipe = make_pipeline(random_unet().double())
        assert pipe(num_inference_steps=2, output_type="latent").images.dtype == torch.float64

    def test_another_scheduler(self, conditional_pipe, tmp_path):
        conditional_pipe.scheduler = DDIMScheduler.from_config(conditional_pipe.scheduler.config)
        conditional_pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert type(loaded.scheduler) is DDIMScheduler
        assert rounding_errors(self.draw(loaded), self.draw(conditional_pipe)) <= SAMPLING

    def test_components_given_to_the_base_class_win(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        unet = random_unet(seed=7)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, unet=unet, classifier=None)
        assert loaded.unet is unet

    def test_no_component_of_the_constructor_has_a_default(self):
        parameters = inspect.signature(ADMPipeline.__init__).parameters.values()
        assert [p.name for p in parameters if p.default is not p.empty] == ["id2label", "image_format"]  # no components

    def test_from_pipe(self, conditional_pipe):
        again = ADMPipeline.from_pipe(conditional_pipe)
        assert again.unet is conditional_pipe.unet
        theirs = DDPMPipeline(unet=random_diffusers_unet(out_channels=3), scheduler=DDPMScheduler())
        absent = dict.fromkeys(ADMPipeline._optional_components)
        assert ADMPipeline.from_pipe(theirs, **absent).unet is theirs.unet


def test_integers_of_numpy():
    pipe = make_pipeline(random_unet())
    images = [
        pipe(
            batch_size=number(2),
            num_images_per_prompt=number(2),
            num_inference_steps=number(3),
            height=number(8),
            generator=seeded(),
            output_type="np",
        ).images
        for number in (int, np.int64)
    ]
    assert rounding_errors(*images) <= SAMPLING


class TestBadInput:
    """Each is refused before the network is called."""

    def refused(self, pipe: ADMPipeline, message: str, **kwargs):
        recorder = Recorder(pipe)
        with pytest.raises(ValueError, match=re.escape(message)):
            pipe(**kwargs)
        assert recorder.calls == []

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"batch_size": 0}, "`batch_size` is 0"),
            ({"batch_size": 2.0}, "`batch_size` is 2.0"),
            ({"class_labels": 1}, "this model is unconditional"),
            ({"guidance_scale": math.inf}, "`guidance_scale` is inf; it must be a finite number"),
            ({"guidance_scale": 2.0}, "has no null class (`null_class_id` in its config) and no cross-attention"),
            ({"prompt": "a cat"}, "`prompt` was given, but this model is not conditioned on text"),
            (
                {"negative_prompt_embeds": noise()},
                "`negative_prompt_embeds` was given, but this model is not conditioned on text",
            ),
            ({"classifier_guidance_scale": 1.0}, "but this pipeline has no classifier"),
            ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
            ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
            ({"num_inference_steps": 1001}, "`num_inference_steps` is 1001"),
            ({"num_inference_steps": None}, "`num_inference_steps` is None"),
            ({"num_inference_steps": 10, "timestep_respacing": "10"}, "both choose the steps"),
            ({"timestep_respacing": "ddim37"}, "no integer stride"),
            ({"timestep_respacing": "600,1"}, "cannot be taken from it"),
            ({"guidance_rescale": 1.5}, "`guidance_rescale` is 1.5"),
            ({"guidance_start": 0.6, "guidance_end": 0.4}, "`guidance_start` is 0.6 and `guidance_end` is 0.4"),
            ({"guidance_end": 1.1}, "`guidance_end` is 1.1"),
            ({"eta": -0.5}, "`eta` is -0.5"),
            ({"height": 9}, "`height` and `width` are 9 and 8; both must be positive and divisible by 2"),
            ({"width": 0}, "`height` and `width` are 8 and 0"),
            ({"generator": [seeded()], "batch_size": 2}, "`generator` is a list of 1 for 2 images"),
            ({"generator": 3}, "`generator` is or holds 3; pass a `torch.Generator`"),
            ({"generator": [None]}, "`generator` is or holds None"),
            ({"latents": noise()}, "`latents` has shape (2, 3, 8, 8)"),
            ({"output_type": "jpeg"}, "`output_type` is 'jpeg'"),
            ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "is ['prompt_embeds']; pass a list of names"),
        ],
        ids=lambda value: None if isinstance(value, str) else ",".join(value),
    )
    def test_arguments(self, pipe, kwargs, message):
        self.refused(pipe, message, **kwargs)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"class_labels": 5}, "`class_labels` range from 5 to 5; this model has the classes 0 to 4"),
            ({"class_labels": [0, -1]}, "`class_labels` range from -1 to 0"),
            ({"class_labels": [0, 1, 2], "batch_size": 2}, "`class_labels` holds 3, `batch_size` is 2"),
            ({"class_labels": [1], "batch_size": 2}, "`class_labels` holds 1, `batch_size` is 2"),
            ({"class_labels": []}, "`class_labels` has shape (0,)"),
            ({"class_labels": [[1, 2]]}, "`class_labels` has shape (1, 2)"),
            ({"class_labels": 1.0}, "class numbers are integers"),
            ({"class_labels": True}, "class numbers are integers"),
            ({"guidance_scale": 2.0}, "no `class_labels` to guide towards"),
        ],
        ids=str,
    )
    def test_class_labels(self, conditional_pipe, kwargs, message):
        self.refused(conditional_pipe, message, **kwargs)

    def test_missing_labels_without_a_null_class(self):
        with pytest.raises(ValueError, match="`class_labels` is missing"):  # by the network
            make_pipeline(num_class_embeds=5)()

    def test_missing_vectors(self):
        pipe = make_pipeline(class_embed_type="identity")
        self.refused(pipe, "a vector for each image. Pass them. A decoder of unCLIP")

    def test_guidance_without_a_null_class(self):
        self.refused(make_pipeline(num_class_embeds=5), "has no null class", class_labels=1, guidance_scale=2.0)

    def test_one_label_in_place_of_an_embedding(self):
        self.refused(make_pipeline(class_embed_type="identity"), "pass one embedding for each image", class_labels=1)

    def test_unknown_size(self):
        self.refused(make_pipeline(sample_size=None), "no `sample_size`", height=8)

    @pytest.mark.parametrize(
        "scheduler", [LearnedVarianceDDPMScheduler(), DDPMScheduler(variance_type="learned_range")]
    )
    def test_learned_variance_scheduler_with_a_plain_model(self, scheduler):
        message = "needs a learned variance, but `unet` predicts none"
        with pytest.raises(ValueError, match=message):
            make_pipeline(scheduler=scheduler, out_channels=3)
        pipe = make_pipeline(scheduler=DDPMScheduler(), out_channels=3)
        pipe.scheduler = scheduler
        self.refused(pipe, message)

    def test_fixed_variance_scheduler_with_a_learned_variance_model(self, pipe):
        message = "which does not use it. Make the scheduler with `variance_type='learned_range'`"
        scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_small")
        with pytest.raises(ValueError, match=message):
            make_pipeline(scheduler=scheduler)
        pipe.scheduler = scheduler
        self.refused(pipe, message)

    def test_variance_as_diffusers_understands_learned(self):
        with pytest.raises(ValueError, match="which takes a variance where models of this family predict"):
            make_pipeline(scheduler=DDPMScheduler(variance_type="learned"))

    def test_other_numbers_of_channels(self):
        with pytest.raises(ValueError, match="`in_channels=3` and `out_channels=4`"):
            make_pipeline(out_channels=4)


class TestSignature:
    def test_names_of_diffusers_testers(self):
        assert ADMPipeline._callback_tensor_inputs == ["latents"]
        assert isinstance(ADMPipeline.num_timesteps, property)
        assert isinstance(ADMPipeline.guidance_scale, property)


def test_class_names_are_saved_and_select_classes(tmp_path):
    names = {0: "cat", 1: "dog", 2: "owl"}
    components = make_pipeline(**CONDITIONAL).components
    pipe = ADMPipeline(**components, id2label=names)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.id2label == names
    pipe.save_pretrained(tmp_path)
    arguments = {"num_inference_steps": 3, "output_type": "pt"}
    by_number = pipe(class_labels=[1, 0], generator=[seeded(0), seeded(1)], **arguments).images
    for cls in (ADMPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.id2label == names
        by_name = loaded(class_labels=["dog", 0], generator=[seeded(0), seeded(1)], **arguments).images
        assert rounding_errors(by_name, by_number) <= SAMPLING
    with pytest.raises(ValueError, match=r"'cow'.*\['cat', 'dog', 'owl'\]"):
        pipe(class_labels="cow")
    with pytest.raises(ValueError, match="not named"):
        make_pipeline(**CONDITIONAL)(class_labels=["dog"])


@pytest.mark.parametrize(
    ("docstring", "function"),
    [
        (ADMPipeline.__doc__, ADMPipeline.__init__),
        (ADMPipeline.__call__.__doc__, ADMPipeline.__call__),
        (ADMPipeline.encode_prompt.__doc__, ADMPipeline.encode_prompt),
        *((function.__doc__, function) for function in (guide, log_probability_gradient, signal_and_std)),
        *((function.__doc__, function) for function in (shift_prediction, tokenize, encode_tokens)),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_docstring_documents_the_arguments(docstring, function):
    check_documented_arguments(docstring, function)
