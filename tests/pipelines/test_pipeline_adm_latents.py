"""ADMPipeline with an autoencoder: a Stable Diffusion folder of reduced width, and what surrounds latents."""

import re
import threading
import time

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from tolerances import NETWORK, SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    fill_randomly,
    random_classifier,
    random_diffusers_text_unet,
    random_text_encoder,
    random_unet,
    toy_tokenizer,
)

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.latents import LatentSpace


def random_vae(**config) -> AutoencoderKL:
    """Four latent channels, each for 2 x 2 pixels."""
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return fill_randomly(AutoencoderKL(**{**defaults, **config}))


def make_pipeline(vae=None, unet=None, **components) -> ADMPipeline:
    absent = dict.fromkeys(ADMPipeline._optional_components)
    unet = random_unet(in_channels=4, out_channels=8) if unet is None else unet
    vae = random_vae() if vae is None else vae
    pipe = ADMPipeline(unet, **{"scheduler": LearnedVarianceDDPMScheduler(), **absent, "vae": vae, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pipe = StableDiffusionPipeline(
        vae=random_vae(),
        text_encoder=random_text_encoder("clip"),
        tokenizer=toy_tokenizer("clip"),
        unet=random_diffusers_text_unet(in_channels=4, out_channels=4, resnet_time_scale_shift="default"),
        # As published: no clipping, the last step ends at the first alpha, timesteps start at 1.
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("stable_diffusion")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipelines(folder) -> tuple[StableDiffusionPipeline, ADMPipeline]:
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    components = {name: getattr(theirs, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    unet = AdaGNUNet2DModel.from_pretrained(folder, subfolder="unet")
    return theirs, make_pipeline(unet=unet, **components)


class TestStableDiffusion:
    @pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
    @pytest.mark.parametrize("negative_prompt", [None, "a green mat"])
    def test_same_images(self, pipelines, guidance_scale, negative_prompt):
        arguments = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "num_inference_steps": 8}
        arguments["latents"] = torch.randn(1, 4, 8, 8, generator=seeded())
        expected, actual, other = (
            pipe(prompt, output_type="pt", **arguments).images
            for pipe, prompt in ((pipelines[0], "a red cat"), (pipelines[1], "a red cat"), (pipelines[1], "the dog"))
        )
        assert actual.shape == (1, 3, 16, 16)
        assert expected.std() > 0.03
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        assert (other - actual).abs().max() > 0.01

    def test_same_images_from_the_same_generators(self, pipelines):
        expected, actual = (
            pipe(
                ["a cat", "a dog"],
                num_images_per_prompt=2,
                guidance_scale=3.0,
                generator=[seeded(i) for i in range(4)],
                num_inference_steps=4,
                output_type="pt",
            ).images
            for pipe in pipelines
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
    @pytest.mark.parametrize(
        "name",
        [
            *("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
            *("PNDMScheduler", "LMSDiscreteScheduler"),
        ],
    )
    def test_same_images_from_images(self, pipelines, name, strength):
        """The latents are sampled with the generator, and then the noise that is added to them."""
        arguments = {"strength": strength, "guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "pt"}
        image = torch.rand((1, 3, 16, 16), generator=seeded(1))
        components = {name: part for name, part in pipelines[0].components.items() if name != "scheduler"}
        scheduler = getattr(diffusers, name).from_config(pipelines[0].scheduler.config, skip_prk_steps=True)
        theirs = StableDiffusionImg2ImgPipeline(**components, scheduler=scheduler, requires_safety_checker=False)
        ours = make_pipeline(**{**pipelines[1].components, "scheduler": scheduler})
        theirs.set_progress_bar_config(disable=True)
        if strength < 1 and name in ("PNDMScheduler", "LMSDiscreteScheduler"):
            # Theirs runs, but with the first steps of a chain in the middle of it: PNDM's are one timestep off, and LMS
            # applies the weights of four derivatives to one.
            with pytest.raises(ValueError, match=f"a {name} cannot start in the middle of its timesteps. Pass 1.0"):
                ours("a red cat", image=image, **arguments)
            return
        expected, actual = (
            pipe("a red cat", image=image, generator=seeded(), **arguments).images for pipe in (theirs, ours)
        )
        assert expected.std() > 0.03
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    def test_noise_of_latents_and_samples(self, pipelines):
        """Two generators give other latents of the image, also where the noise of the sample is given."""
        arguments = {"strength": 0.3, "num_inference_steps": 5, "output_type": "pt"}
        arguments |= {"image": torch.rand((1, 3, 16, 16), generator=seeded(1)), "latents": torch.zeros(1, 4, 8, 8)}
        one, other = (pipelines[1]("a red cat", generator=seeded(seed), **arguments).images for seed in (0, 1))
        assert (one - other).abs().max() > 0.01

    def test_same_images_from_several_images(self, pipelines):
        theirs = StableDiffusionImg2ImgPipeline(**pipelines[0].components, requires_safety_checker=False)
        theirs.set_progress_bar_config(disable=True)
        images = torch.rand((2, 3, 16, 16), generator=seeded(1))
        arguments = {"strength": 0.5, "guidance_scale": 3.0, "num_inference_steps": 6, "output_type": "pt"}
        for generators in (seeded, lambda: [seeded(3), seeded(4)]):
            expected, actual = (
                pipe(["a cat", "a dog"], image=images, generator=generators(), **arguments).images
                for pipe in (theirs, pipelines[1])
            )
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        alone = pipelines[1]("a dog", image=images[1], generator=[seeded(4)], **arguments).images
        torch.testing.assert_close(actual[1:], alone, rtol=0, atol=1e-4)

    def test_from_pipe(self, pipelines):
        """The same components in our pipeline; the network of diffusers serves as it is."""
        theirs, ours = pipelines
        pipe = ADMPipeline.from_pipe(theirs, classifier=None)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.unet is theirs.unet
        expected, actual = (
            p("a cat", guidance_scale=2.0, generator=seeded(), num_inference_steps=3, output_type="pt").images
            for p in (ours, pipe)
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    def test_round_trip(self, pipelines, tmp_path):
        ours = pipelines[1]
        ours.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is ADMPipeline
        actual, expected = (
            pipe("a cat", generator=seeded(), num_inference_steps=3, output_type="pt").images for pipe in (loaded, ours)
        )
        assert rounding_errors(actual, expected) <= SAMPLING


class TestLatents:
    ARGUMENTS = {"num_inference_steps": 3, "batch_size": 2}

    @pytest.mark.parametrize("shift", [None, 0.4])
    def test_decoding(self, shift):
        vae = random_vae(scaling_factor=0.5, shift_factor=shift)
        pipe = make_pipeline(vae)
        latents = pipe(generator=seeded(), output_type="latent", **self.ARGUMENTS).images
        assert latents.shape == (2, 4, 8, 8)
        images = pipe(generator=seeded(), output_type="pt", **self.ARGUMENTS).images
        with torch.no_grad():
            expected = vae.decode(2 * latents + (shift or 0.0)).sample
        assert rounding_errors(images, ((expected + 1) / 2).clamp(0, 1)) <= SAMPLING

    def test_clipping_is_warned_of(self, caplog):
        """`LearnedVarianceDDPMScheduler` clips by default; training in latents saves one that does not."""
        for clips in (True, False):
            caplog.clear()
            pipe = make_pipeline(scheduler=LearnedVarianceDDPMScheduler(clip_sample=clips))
            for _ in range(2):
                pipe(num_inference_steps=1, output_type="pt")
            assert len([text for text in caplog.messages if "clips the predicted x_0" in text]) == clips

    def test_mean_and_standard_deviation_by_channel(self):
        """As `StableDiffusionXLPipeline` decodes; encoding is the inverse."""
        mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 0.5, 2.0, 3.0]
        vae = random_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
        pipe = make_pipeline(vae)
        latents = pipe(generator=seeded(), output_type="latent", **self.ARGUMENTS).images
        images = pipe(generator=seeded(), output_type="pt", **self.ARGUMENTS).images
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
        with torch.no_grad():
            expected = vae.decode(latents * std / 0.5 + mean).sample
            encoded = vae.encode(expected).latent_dist.mode()
        assert rounding_errors(images, ((expected + 1) / 2).clamp(0, 1)) <= SAMPLING
        with torch.no_grad():
            samples = LatentSpace(vae).encode(expected)
        torch.testing.assert_close(samples, (encoded - mean) / std * 0.5, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "config",
        [
            {"latents_mean": [0.0] * 4},
            {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3},
            {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]},
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.5},
        ],
    )
    def test_bad_means_and_standard_deviations(self, config):
        with pytest.raises(ValueError, match="Set both lists, with 4 finite numbers each"):
            make_pipeline(random_vae(**config))

    def test_sizes_are_pixels(self):
        pipe = make_pipeline()
        assert pipe(output_type="pt", height=24, **self.ARGUMENTS).images.shape == (2, 3, 24, 16)
        assert pipe(output_type="latent", height=24, **self.ARGUMENTS).images.shape == (2, 4, 12, 8)
        (image, _) = pipe(**self.ARGUMENTS).images
        assert (image.mode, image.size) == ("RGB", (16, 16))
        with pytest.raises(ValueError, match="`height` and `width` are 18 and 16; both must be .* divisible by 4"):
            pipe(height=18)
        with pytest.raises(ValueError, match=re.escape("of shape (1, 4, 8, 8)")):
            pipe(latents=torch.zeros(1, 4, 16, 16))

    def test_half_precision(self, tmp_path):
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
        loaded.set_progress_bar_config(disable=True)
        actual, expected = (p(generator=seeded(), output_type="pt", **self.ARGUMENTS).images for p in (loaded, pipe))
        assert (actual - expected).abs().mean() < 0.05

    def test_classes_and_a_classifier_of_latents(self):
        pipe = make_pipeline(
            unet=random_unet(in_channels=4, out_channels=8, **CONDITIONAL),
            classifier=random_classifier(in_channels=4, num_classes=4),
        )
        arguments = {"class_labels": [1, 2], "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "pt"}
        steered, plain = (
            pipe(classifier_guidance_scale=scale, generator=seeded(), **arguments).images for scale in (1.0, 0.0)
        )
        assert steered.shape == (2, 3, 16, 16)
        assert (steered - plain).abs().max() > 1e-3
        with pytest.raises(ValueError, match="on samples of 8 x 8, and `height` and `width` ask for 12 x 8"):
            pipe(class_labels=1, classifier_guidance_scale=1.0, height=24)

    def test_another_number_of_channels(self):
        with pytest.raises(ValueError, match="latents of 4 channels, but `unet` has `in_channels=3`"):
            make_pipeline(unet=random_unet())


class TestPrecision:
    """A float16 autoencoder whose activations exceed 65504, as those of SDXL do."""

    def overflowing(self, **config) -> AutoencoderKL:
        vae = random_vae(**{"force_upcast": True, **config})
        # Weights that float16 holds, but not their sums; the norms behind them remove the factor again.
        for module in (vae.decoder.conv_in, vae.encoder.conv_in):
            module.weight.data *= 5e4 / module.weight.abs().max()
        return vae.half()

    def test_computes_in_float32(self):
        vae, plain = self.overflowing(), self.overflowing().float()
        before = {name: weight.clone() for name, weight in vae.state_dict().items()}
        samples, images = torch.randn((2, 4, 8, 8), generator=seeded()), torch.rand((2, 3, 16, 16), generator=seeded())
        with torch.no_grad():
            assert not self.overflowing().decode(samples.half()).sample.isfinite().all()
            decoded, expected = LatentSpace(vae).decode(samples), plain.decode(samples / 0.18215).sample
            encoded, distribution = LatentSpace(vae).posterior(images), plain.encode(images).latent_dist
        assert rounding_errors(decoded, expected) <= NETWORK
        assert rounding_errors(encoded.mean, distribution.mean) <= NETWORK
        assert rounding_errors(encoded.std, distribution.std) <= NETWORK
        assert vae.dtype == torch.float16
        assert all(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())

    def test_only_where_the_config_says_so(self):
        vae = self.overflowing(force_upcast=False)
        seen = []
        vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
        with torch.no_grad():
            assert LatentSpace(vae).decode(torch.randn((1, 4, 8, 8), generator=seeded())).dtype == torch.float32
        assert seen == [torch.float16]

    def test_float16_again_after_an_exception(self):
        vae = self.overflowing()
        with pytest.raises(RuntimeError), torch.no_grad():
            LatentSpace(vae).decode(torch.zeros(1, 5, 8, 8))
        assert vae.dtype == torch.float16
        with torch.no_grad():  # and no lock is held
            assert LatentSpace(vae).decode(torch.zeros(1, 4, 8, 8)).isfinite().all()

    def run_in_threads(self, vae, number: int) -> list[torch.Tensor]:
        results = [None] * number

        @torch.no_grad()
        def work(index):
            results[index] = LatentSpace(vae).decode(torch.randn((1, 4, 8, 8), generator=seeded(index)))

        threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    def test_threads(self):
        """One that ends must not take the float32 weights from another."""
        vae, plain = self.overflowing(), self.overflowing().float()
        seen = []

        def slowly(module, inputs):
            time.sleep(0.02)
            seen.append(next(module.parameters()).dtype)

        vae.decoder.register_forward_pre_hook(slowly)
        results = self.run_in_threads(vae, 4)
        assert seen == [torch.float32] * 4
        assert vae.dtype == torch.float16
        for index, result in enumerate(results):
            with torch.no_grad():
                expected = plain.decode(torch.randn((1, 4, 8, 8), generator=seeded(index)) / 0.18215).sample
            assert rounding_errors(result, expected) <= NETWORK

    def test_threads_do_not_wait_for_each_other_in_float32(self):
        vae, meeting = random_vae(force_upcast=True), threading.Barrier(2, timeout=30)

        def meet(module, inputs):
            meeting.wait()

        vae.decoder.register_forward_pre_hook(meet)
        assert all(result is not None for result in self.run_in_threads(vae, 2))

    def test_pipeline_in_half_precision(self, tmp_path):
        pipe = make_pipeline(self.overflowing().float())
        pipe.save_pretrained(tmp_path)
        loaded = ADMPipeline.from_pretrained(tmp_path, dtype={"vae": torch.float16, "default": torch.float32})
        loaded.set_progress_bar_config(disable=True)
        arguments = {"num_inference_steps": 2, "strength": 0.5, "image": torch.rand((1, 3, 16, 16), generator=seeded())}
        actual, expected = (
            p(generator=seeded(), output_type="pt", **arguments).images for p in (loaded, make_pipeline(pipe.vae))
        )
        assert loaded.vae.dtype == torch.float16
        assert rounding_errors(actual, expected) <= SAMPLING

    def test_offloading(self):
        """What a GPU would show: with hooks on the components, nothing reaches for a network but by its calls."""
        pipe = make_pipeline(self.overflowing())
        arguments = {"num_inference_steps": 2, "output_type": "pt"}
        arguments |= {"image": torch.rand((1, 3, 16, 16), generator=seeded())}
        expected = pipe(generator=seeded(), **arguments).images
        pipe.enable_model_cpu_offload(device="cpu")
        assert rounding_errors(pipe(generator=seeded(), **arguments).images, expected) <= SAMPLING
        assert pipe.vae.dtype == torch.float16
        pipe.remove_all_hooks()


class TestTiling:
    """`pipe.vae.enable_tiling()`, as diffusers recommends."""

    ARGUMENTS = {"num_inference_steps": 2, "height": 48, "width": 32}

    def test_large_images(self):
        pipe = make_pipeline()
        latents = pipe(generator=seeded(), output_type="latent", **self.ARGUMENTS).images
        plain = pipe(generator=seeded(), output_type="pt", **self.ARGUMENTS).images
        pipe.vae.enable_tiling()
        tiled = pipe(generator=seeded(), output_type="pt", **self.ARGUMENTS).images
        assert latents.shape[-2:] == (24, 16)  # tiles have 8 x 8
        assert tiled.shape == (1, 3, 48, 32)
        with torch.no_grad():
            expected = pipe.vae.tiled_decode(latents / 0.18215).sample
        assert rounding_errors(tiled, ((expected + 1) / 2).clamp(0, 1)) <= SAMPLING
        assert 1e-4 < (tiled - plain).abs().mean() < 0.2
        pipe.vae.disable_tiling()
        assert rounding_errors(pipe(generator=seeded(), output_type="pt", **self.ARGUMENTS).images, plain) <= SAMPLING

    def test_from_an_image(self):
        pipe = make_pipeline()
        pipe.vae.enable_tiling()
        image = torch.rand((1, 3, 48, 32), generator=seeded())
        images = pipe(image=image, strength=0.5, num_inference_steps=2, output_type="pt").images
        assert images.shape == image.shape

    def test_slices(self):
        pipe = make_pipeline()
        sizes = []
        pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        arguments = {"batch_size": 3, "num_inference_steps": 2, "output_type": "pt"}
        plain = pipe(generator=seeded(), **arguments).images
        pipe.vae.enable_slicing()
        sliced = pipe(generator=seeded(), **arguments).images
        assert sizes == [3, 1, 1, 1]
        assert rounding_errors(sliced, plain) <= SAMPLING


class TestTinyAutoencoder:
    def test_from_an_image(self):
        vae = fill_randomly(
            AutoencoderTiny(
                encoder_block_out_channels=(4, 4),
                decoder_block_out_channels=(4, 4),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            )
        )
        pipe = make_pipeline(vae)
        image = torch.rand((1, 3, 16, 16), generator=seeded())
        latents = pipe(image=image, generator=seeded(), num_inference_steps=2, output_type="latent").images
        assert latents.shape == (1, 4, 8, 8)
        images = pipe(image=image, generator=seeded(), num_inference_steps=2, output_type="pt").images
        with torch.no_grad():
            expected = vae.decode(latents / vae.config.scaling_factor).sample
        assert rounding_errors(images, ((expected + 1) / 2).clamp(0, 1)) <= SAMPLING


class TestRefusals:
    def test_without_a_scaling_factor(self):
        vae = random_vae()
        vae.register_to_config(scaling_factor=None)
        with pytest.raises(ValueError, match="`vae` has `scaling_factor` None and .* must be a positive number"):
            make_pipeline(vae)
        with pytest.raises(ValueError, match="`scaling_factor` -1"):
            make_pipeline(random_vae(scaling_factor=-1.0))

    def test_another_number_of_image_channels(self):
        with pytest.raises(ValueError, match=re.escape("`image_format`")):
            make_pipeline(random_vae(), image_format=ImageFormat("L", 1))

    def test_images_of_other_channels_than_results(self):
        pipe = make_pipeline(random_vae(in_channels=1))
        assert pipe(num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)
        with pytest.raises(ValueError, match="`vae` takes images of 1 channels and gives 3"):
            pipe(image=torch.zeros(1, 3, 16, 16))

    def test_sizes(self):
        pipe = make_pipeline()
        with pytest.raises(ValueError, match="are 18 and 16; .* by 4, .*: `vae` by 2, and `unet` by 2") as error:
            pipe(image=torch.zeros(1, 3, 18, 16))
        assert "That is the size of the given image: resize or crop it." in str(error.value)

    def test_latents_that_are_not_finite(self):
        """Of `vae`, which the message explains, and of the user."""
        vae = random_vae()
        vae.quant_conv.bias.data[0] = float("inf")
        pipe = make_pipeline(vae)
        with pytest.raises(
            ValueError, match=r"`image` to latents that are not finite \(numbers 0, 1 of 2, .*Weights of"
        ):
            pipe(image=torch.zeros(2, 3, 16, 16))
        latents = torch.zeros(2, 4, 8, 8)
        latents[1, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"`latents` holds NaN or infinity for 1 of 2 images \(numbers 1, counted"):
            pipe(latents=latents, batch_size=2)
