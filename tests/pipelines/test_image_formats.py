"""
Formats of images in pipelines: grey, alpha, many channels, more than 8 bits, numbers of any range, not square. Outputs
are compared with the samples that they are made from, by NumPy; inputs come back as outputs.
"""

import logging
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from PIL import Image
from tolerances import SAMPLING, levels_apart, rounding_errors
from toy_models import CONDITIONAL, fill_randomly, random_classifier, random_unet

from diffusers_adm import (
    AdaGNClassifierModel,
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning.image_format import ImageFormat


FORMATS = {
    "L": ImageFormat("L", 1),
    "L-12": ImageFormat("L", 1, (0, 4095), 4096),
    "L-16": ImageFormat("L", 1, (0, 65535), 65536),
    "L-mask": ImageFormat("L", 1, (0, 1), 2),
    "LA": ImageFormat("LA", 2),
    "RGB": ImageFormat("RGB", 3),
    "RGBA": ImageFormat("RGBA", 4),
    "RGB-16": ImageFormat("RGB", 3, (0, 65535), 65536),
    "bands": ImageFormat("array", 5, (0, 10000), 10001),
    "bytes": ImageFormat("array", 4, (0, 255), 256),
    "hounsfield": ImageFormat("L", 1, (-1024, 3071), 4096),
    "field": ImageFormat("array", 2, (-3.5, 12.3), None),
    "grey-field": ImageFormat("L", 1, (-0.1, 0.7), None),
}
CALLS = SAMPLING * 2**-23  # of two calls, as a share of the value range
PIL_MODES = {"L": "L", "L-12": "I;16", "L-16": "I;16", "L-mask": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA"}
ALL = pytest.mark.parametrize("name", FORMATS)
PICTURES = pytest.mark.parametrize("name", PIL_MODES)
OTHERS = pytest.mark.parametrize("name", ["bands", "bytes", "hounsfield", "field", "grey-field"])


def make(cls=ADMPipeline, image_format=None, unet=None, **components):
    channels = 3 if image_format is None else image_format.channels
    scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=20, beta_end=0.4)
    unet = random_unet(in_channels=channels, out_channels=2 * channels) if unet is None else unet
    parts = {**dict.fromkeys(("vae", "text_encoder", "tokenizer", "classifier")), **components}
    pipe = cls(unet=unet, scheduler=scheduler, image_format=image_format, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, output_type="pt", **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=2, generator=generator, output_type=output_type, **arguments).images


def fractions_of(pipe) -> np.ndarray:
    """The samples in [0, 1], `(batch_size, height, width, channels)`."""
    return np.clip(call(pipe, "latent").permute(0, 2, 3, 1).numpy() / 2 + 0.5, 0, 1)


def values_of(fractions: np.ndarray, image_format: ImageFormat) -> np.ndarray:
    low, high = image_format.value_range
    if image_format.num_levels is not None:
        fractions = np.round(fractions * (image_format.num_levels - 1)) / (image_format.num_levels - 1)
    return low + fractions.astype(np.float64) * (high - low)


def refused(pipe, message, **arguments):
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=re.escape(message)):
        call(pipe, **arguments)
    assert calls == []


class TestOutputs:
    @ALL
    def test_arrays_and_tensors(self, name):
        pipe = make(image_format=FORMATS[name])
        fractions = fractions_of(pipe)
        is_viewable = name in PIL_MODES or name == "RGB-16"
        expected = fractions if is_viewable else values_of(fractions, FORMATS[name])
        size = np.ptp(FORMATS[name].value_range)
        actual = call(pipe, "np")
        assert actual.dtype == np.float32
        assert actual.shape == (1, 8, 8, FORMATS[name].channels)
        # Two calls of one network need not agree in their last bits, nor on the side of a boundary between levels.
        one_level = 0 if is_viewable or FORMATS[name].num_levels is None else 1
        atol = CALLS * size + one_level
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
        np.testing.assert_allclose(call(pipe, "pt").permute(0, 2, 3, 1).numpy(), actual, rtol=0, atol=atol)

    @PICTURES
    def test_pillow(self, name):
        pipe = make(image_format=FORMATS[name])
        (image,) = call(pipe, "pil")
        assert image.mode == PIL_MODES[name]
        expected = values_of(fractions_of(pipe), FORMATS[name])[0]
        # At most one level, by which values on a boundary of rounding differ, and the difference of two calls.
        size = FORMATS[name].value_range[1]
        np.testing.assert_allclose(np.asarray(image).reshape(8, 8, -1), expected.round(), rtol=0, atol=1 + CALLS * size)
        assert expected.max() > 0.8 * FORMATS[name].value_range[1]  # and not a fraction of the range

    @pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
    def test_8_bits_are_as_without_a_format(self, channels, mode):
        unet = random_unet(in_channels=channels, out_channels=2 * channels)
        old, new = make(unet=unet), make(unet=unet, image_format=ImageFormat(mode, channels))
        assert old.image_format == new.image_format
        assert old.config.image_format is None
        for output_type in ("np", "pt"):
            assert np.abs(np.asarray(call(old, output_type)) - np.asarray(call(new, output_type))).max() <= CALLS
        # diffusers' own conversion
        expected = old.image_processor.postprocess(call(old, "latent"), output_type="pil")[0]
        for pipe in (old, new):
            assert levels_apart(call(pipe, "pil")[0], expected) <= 1

    def test_16_bit_colours_have_8_in_pillow(self, caplog):
        pipe = make(image_format=FORMATS["RGB-16"])
        with caplog.at_level(logging.WARNING):
            images = [call(pipe, "pil")[0] for _ in range(2)]
        assert images[0].mode == "RGB"
        assert levels_apart(images[0], np.round(255 * fractions_of(pipe)[0]).astype(np.uint8)) <= 1
        warnings = [record.message for record in caplog.records if "reduces" in record.message]
        assert len(warnings) == 1
        assert "65536 levels" in warnings[0]
        assert "output_type='np'" in warnings[0]

    @pytest.mark.parametrize(
        "name, reason",
        [
            ("bands", "the model was trained on arrays of 5 channels, which are no colours to Pillow"),
            ("bytes", "the model was trained on arrays of 4 channels"),
            ("hounsfield", "the values range from -1024 to 3071, and Pillow's from 0 to 65535"),
            ("field", "arrays of 2 channels"),
            ("grey-field", "the model was trained on floating point numbers"),
        ],
    )
    def test_no_pictures(self, name, reason):
        pipe = make(image_format=FORMATS[name])
        refused(pipe, reason, output_type="pil")
        refused(pipe, "Pass `output_type='np'` or `output_type='pt'`.", output_type="pil")

    def test_a_fourth_channel_is_no_alpha_unless_said(self):
        pipe = make(unet=random_unet(in_channels=4, out_channels=8))
        refused(pipe, "images have 4 channels, whose meaning the pipeline's config does not tell", output_type="pil")
        refused(pipe, "of mode RGBA, load the pipeline with `image_format={'mode': 'RGBA'", output_type="pil")
        fractions = fractions_of(pipe)
        np.testing.assert_allclose(call(pipe, "np"), fractions, rtol=0, atol=CALLS)

    @pytest.mark.parametrize("name", ["L-12", "field"])
    def test_not_finite(self, name, caplog):
        pipe = make(image_format=FORMATS[name])

        def spoil(pipe, step, timestep, kwargs):
            if step == 1:  # the last one
                kwargs["latents"][:, :, 0, 0] = float("nan")
            return kwargs

        with caplog.at_level(logging.WARNING):
            images = call(pipe, "np", callback_on_step_end=spoil)
            assert np.isnan(images[0, 0, 0]).all()
            assert np.isnan(images).sum() == images.shape[-1]
            assert "1 of 1 images hold values that are not finite" in caplog.text
            if name == "L-12":
                assert np.asarray(call(pipe, "pil", callback_on_step_end=spoil)[0])[0, 0] == 0

    def test_decoded_images(self):
        vae = AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4, in_channels=1, out_channels=1
        )
        unet = random_unet(in_channels=4, out_channels=8)
        pipe = make(unet=unet, vae=fill_randomly(vae), image_format=FORMATS["L-12"])
        assert call(pipe, "pil")[0].mode == "I;16"
        with pytest.raises(ValueError, match="`image_format` has 4 channels, but the images of this model have 1"):
            make(unet=unet, vae=vae, image_format=FORMATS["RGBA"])


class TestConfig:
    @pytest.mark.parametrize("name", ["L-16", "RGBA", "field"])
    def test_saved_and_loaded(self, name, tmp_path):
        pipe = make(image_format=FORMATS[name])
        pipe.save_pretrained(tmp_path)
        loaded = ADMPipeline.from_pretrained(tmp_path)
        assert loaded.image_format == pipe.image_format == FORMATS[name]
        other = FORMATS[name].to_config() | {"value_range": [0, 7], "num_levels": 8}
        assert ADMPipeline.from_pretrained(tmp_path, image_format=other).image_format.value_range == (0, 7)

    @pytest.mark.parametrize("pipeline_class", [ADMPipeline, ADMInpaintPipeline])
    def test_from_pipe(self, pipeline_class):
        """As README.md does: with the format, classes and networks of the other one, and a scheduler of its own."""
        pipe = make(unet=random_unet(in_channels=1, out_channels=2, **CONDITIONAL), image_format=FORMATS["L-16"])
        pipe.register_to_config(id2label={0: "cats", 1: "dogs"})
        again, scheduler = pipeline_class.from_pipe(pipe), pipe.scheduler
        assert type(again) is pipeline_class
        assert again.image_format == pipe.image_format == FORMATS["L-16"]
        assert {int(number): name for number, name in again.config.id2label.items()} == {0: "cats", 1: "dogs"}
        assert again.unet is pipe.unet
        again.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
        assert pipe.scheduler is scheduler

    @pytest.mark.parametrize(
        "image_format, message",
        [
            (ImageFormat("L", 1), "`image_format` has 1 channels, but the images of this model have 3"),
            ({"mode": "RGB"}, "`image_format` is {'mode': 'RGB'}; it must be a dict with the entries mode, channels"),
            ("RGB", "`image_format` is 'RGB'; it must be a dict"),
            (ImageFormat().to_config() | {"value_range": 255}, "it must be a dict with the entries"),
            (ImageFormat().to_config() | {"mode": "CMYK"}, "The image mode is 'CMYK'"),
            (ImageFormat().to_config() | {"value_range": [3, 3]}, "The value range is 3 to 3"),
        ],
        ids=["channels", "entries", "type", "range", "mode", "empty-range"],
    )
    def test_refused(self, image_format, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            ADMPipeline(
                unet=random_unet(),
                scheduler=LearnedVarianceDDPMScheduler(),
                **dict.fromkeys(("vae", "text_encoder", "tokenizer", "classifier")),
                image_format=image_format,
            )

    def test_classifier_of_another_range(self):
        unet = random_unet(in_channels=1, out_channels=2, **CONDITIONAL)

        def classifier(image_format):
            return random_classifier(
                in_channels=1, num_classes=4, image_format=image_format and image_format.to_config()
            )

        grey = FORMATS["L-12"]
        for known in (None, grey):
            pipe = make(unet=unet, classifier=classifier(known), image_format=grey)
            call(pipe, class_labels=1, classifier_guidance_scale=1.0)
        make(unet=unet, classifier=classifier(grey))  # the pipeline's is not recorded
        with pytest.raises(ValueError, match=r"`classifier` was trained on grey images from 0 to 65535 .* 0 to 4095"):
            make(unet=unet, classifier=classifier(FORMATS["L-16"]), image_format=grey)

    @pytest.mark.parametrize("channels", [(5, 2), (4, 2), (4, 3)])
    def test_more_channels_than_a_sample(self, channels):
        unet = random_unet(in_channels=channels[0], out_channels=channels[1])
        with pytest.raises(ValueError, match="an image to start from, load it with `ADMImageToImagePipeline`"):
            make(unet=unet)

    def test_half_of_the_channels(self):
        with pytest.raises(ValueError, match=r"`ADMSuperResolutionPipeline`; .* with `ADMImageToImagePipeline`"):
            make(unet=random_unet(in_channels=6, out_channels=6))


def given_images(image_format: ImageFormat, size=(8, 8)) -> np.ndarray:
    """Random values of the data, `(height, width, channels)`, the extremes among them."""
    (low, high), rng = image_format.value_range, np.random.default_rng(0)
    shape = (*size, image_format.channels)
    if image_format.num_levels is None:
        values = rng.uniform(low, high, shape).astype(np.float32).clip(np.float32(low), np.float32(high))
    else:
        values = rng.integers(low, high, shape, endpoint=True)
    values[0, 0], values[-1, -1] = low, high
    return values.astype(image_format.dtype)


class TestKeptPixels:
    """What an inpainter keeps comes back as it was given, in every form."""

    MASK = np.arange(64).reshape(8, 8) % 8 < 4

    def kept(self, name, image, output_type):
        pipe = make(ADMInpaintPipeline, FORMATS[name])
        return call(pipe, output_type, image=image, mask_image=self.MASK, jump_n_sample=1)

    @ALL
    def test_values_of_the_data(self, name):
        image_format = FORMATS[name]
        given = given_images(image_format)
        high, is_viewable = image_format.value_range[1], image_format.is_viewable
        expected = given / np.float32(high) if is_viewable and high > 1 else given
        for image in (given, torch.from_numpy(given.astype(np.int32 if high > 255 else given.dtype)).movedim(-1, 0)):
            if is_viewable and isinstance(image, torch.Tensor) and image_format.num_levels is None:
                continue
            found = self.kept(name, image, "np")[0]
            np.testing.assert_array_equal(found[~self.MASK], expected[~self.MASK].astype(np.float32))
            assert (found[self.MASK] != expected[self.MASK]).any()

    @ALL
    def test_outputs_are_inputs(self, name):
        pipe = make(image_format=FORMATS[name])
        images = call(pipe, "pt")
        keep = torch.from_numpy(~self.MASK)
        assert torch.equal(self.kept(name, images, "pt")[:, :, keep], images[:, :, keep])

    @pytest.mark.parametrize("name", [*PIL_MODES, "RGB-16"])
    def test_pillow(self, name):
        image_format = FORMATS[name]
        (image,) = call(make(image_format=image_format), "pil")
        (found,) = self.kept(name, image, "pil")
        assert found.mode == image.mode
        np.testing.assert_array_equal(np.asarray(found)[~self.MASK], np.asarray(image)[~self.MASK])

    @OTHERS
    def test_outside_of_the_range(self, name):
        image_format = FORMATS[name]
        low, high = image_format.value_range
        given = given_images(image_format).astype(np.float32)
        given[3, 3] = high + 0.1 * (high - low)
        with pytest.raises(ValueError, match=re.escape(f"they must lie in [{low:g}, {high:g}], the value range")):
            self.kept(name, given, "np")
        given[3, 3] = np.nan
        with pytest.raises(ValueError, match="`image` has values from nan to nan"):
            self.kept(name, given, "np")

    @pytest.mark.parametrize(
        "name, image, message",
        [
            ("L-12", np.full((8, 8), 4096, np.uint16), "values from 4096 to 4096; they must lie in [0, 4095], the"),
            ("L-12", np.full((8, 8), -1, np.int16), "values from -1 to -1; they must lie in [0, 4095]"),
            ("L-12", np.full((8, 8), 17.0), "Pass values from 0 to 4095 as integers, such as `uint16`, or divided by"),
            ("L-12", np.zeros((8, 8), np.uint8), "of 8 bits, but this model's images have values from 0 to 4095"),
            ("bands", np.zeros((8, 8, 5), np.uint8), "to 10000 (`image_format`). Pass such values as `uint16`;"),
            ("L-12", Image.new("L", (8, 8)), "has mode L, of 8 bits, but this model's images have values"),
            ("L-12", Image.new("RGB", (8, 8)), "has mode RGB, but this model's images have 1 channels. Pass grey"),
            ("bands", Image.new("RGB", (8, 8)), "5 channels (5-channel images from 0 to 10000 (10001 levels)). Pass"),
            ("LA", Image.new("RGBA", (8, 8)), "has mode RGBA, but this model's images have 2 channels"),
            ("bands", np.zeros((5, 8, 8)), "These are (channels, height, width): pass `np.moveaxis(array, -3, -1)`"),
            ("bands", torch.zeros(8, 8, 5), "These are (height, width, channels): pass `tensor.movedim(-1, -3)`"),
            ("field", np.full((8, 8, 2), None), "is an array of type object; pass one of numbers"),
            ("field", np.zeros((8, 8, 2), bool), "is of type torch.bool; pass integers, or floating point numbers"),
        ],
    )  # fmt: skip
    def test_refused(self, name, image, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            self.kept(name, image, "np")

    def test_opaque_images_for_models_with_alpha(self):
        colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        for image in (Image.fromarray(colours), Image.fromarray(colours).convert("RGBA")):
            found = np.asarray(self.kept("RGBA", image, "pil")[0])[~self.MASK]
            np.testing.assert_array_equal(found[:, :3], colours[~self.MASK])
            assert (found[:, 3] == 255).all()

    def test_big_endian_files(self):
        given = given_images(FORMATS["L-16"])
        found = self.kept("L-16", given.astype(">u2"), "pil")[0]
        np.testing.assert_array_equal(np.asarray(found)[~self.MASK], given[~self.MASK][:, 0])


class TestNotSquare:
    """Height 8 and width 16; a square config with the size in each call gives the same."""

    SIZE = [8, 16]

    def unets(self, **config):
        return [random_unet(sample_size=size, **config) for size in (self.SIZE, 16)]

    def same_in_both(self, pipes, output_type="pt", **arguments):
        images = call(pipes[0], output_type, **arguments)
        assert rounding_errors(images, call(pipes[1], output_type, height=8, width=16, **arguments)) <= SAMPLING
        return images

    def test_unconditional(self):
        pipes = [make(unet=unet) for unet in self.unets()]
        assert self.same_in_both(pipes).shape == (1, 3, 8, 16)
        assert call(pipes[0], "pil")[0].size == (16, 8)

    def test_inpainting(self):
        image, mask = torch.rand(3, 8, 16), torch.zeros(8, 16)
        mask[2:5, 3:11] = 1
        for channels in (3, 7):
            pipes = [make(ADMInpaintPipeline, unet=unet) for unet in self.unets(in_channels=channels, out_channels=6)]
            found = self.same_in_both(pipes, image=image, mask_image=mask)
            assert torch.equal(found[0][:, mask == 0], image[:, mask == 0])
            assert (found[0][:, mask == 1] != image[:, mask == 1]).any()
            refused(pipes[0], "`image` is 8 x 16 pixels (width x height)", image=image.mT, mask_image=mask.T)

    def test_controlnet(self):
        image = torch.rand(3, 8, 16)
        unets = self.unets()
        controlnet = fill_randomly(AdaGNControlNetModel.from_unet(unets[0]))
        pipes = [make(ADMControlNetPipeline, unet=unet, controlnet=controlnet) for unet in unets]
        found = self.same_in_both(pipes, image=image)
        assert not torch.equal(found, call(pipes[0], image=image.flip(-1)))

    def test_super_resolution(self):
        image = torch.rand(3, 4, 8)
        unets = self.unets(in_channels=6, out_channels=6)
        pipes = [
            make(ADMSuperResolutionPipeline, unet=unets[0], low_res_size=(4, 8)),
            make(ADMSuperResolutionPipeline, unet=unets[1], low_res_size=8),
        ]
        assert pipes[0].config.low_res_size == [4, 8]
        assert pipes[1].config.low_res_size == 8
        found = self.same_in_both(pipes, "latent", image=image, back_projection=True)
        means = found.reshape(1, 3, 4, 2, 8, 2).mean(dim=(3, 5))
        torch.testing.assert_close(means[0], 2 * image - 1, rtol=0, atol=1e-6)
        refused(
            pipes[0],
            "4 x 4 pixels (width x height) and would become 16 x 8, but this model was trained to upsample 2 times, "
            "from 4 x 8 to 8 x 16. Resize the image, or pass `height=8` and `width=8`",
            image=torch.rand(3, 4, 4),
        )

    @pytest.mark.parametrize("low_res_size", [4, [8, 4], [4, 16], [16, 32]])
    def test_another_factor_along_each_side(self, low_res_size):
        with pytest.raises(ValueError, match="the factor must be the same along both sides.*`low_res_size="):
            make(
                ADMSuperResolutionPipeline,
                unet=random_unet(sample_size=self.SIZE, in_channels=6, out_channels=6),
                low_res_size=low_res_size,
            )

    def test_saved_and_loaded(self, tmp_path):
        unet = random_unet(sample_size=self.SIZE, in_channels=6, out_channels=6)
        make(ADMSuperResolutionPipeline, unet=unet, low_res_size=[4, 8]).save_pretrained(tmp_path)
        loaded = ADMSuperResolutionPipeline.from_pretrained(tmp_path)
        assert loaded.config.low_res_size == [4, 8]
        assert list(loaded.unet.config.sample_size) == self.SIZE

    @pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
    def test_classifier(self, pool):
        """A classifier of transposed images: transposed kernels, and positions in the other order."""
        wide = random_classifier(sample_size=self.SIZE, pool=pool, down_block_types=("DownBlock2D", "AttnDownBlock2D"))
        tall = AdaGNClassifierModel.from_config({**wide.config, "sample_size": self.SIZE[::-1]}).eval()
        weights = {name: value.mT if value.ndim == 4 else value for name, value in wide.state_dict().items()}
        for name, value in weights.items():
            if name.endswith("positional_embedding"):
                positions = value[1:].unflatten(0, (4, 8)).transpose(0, 1).flatten(0, 1)
                weights[name] = torch.cat([value[:1], positions])
        tall.load_state_dict(weights)
        images = torch.randn(2, 3, *self.SIZE, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits, transposed = wide(images, 3).logits, tall(images.mT.contiguous(), 3).logits
        assert logits.shape == (2, 5)
        assert logits.std() > 0.01
        torch.testing.assert_close(logits, transposed, rtol=1e-4, atol=1e-4)

    def test_classifier_guidance(self):
        unet = random_unet(sample_size=self.SIZE, **CONDITIONAL)
        pipe = make(unet=unet, classifier=random_classifier(sample_size=tuple(self.SIZE), num_classes=4))
        guided, plain = (call(pipe, class_labels=1, classifier_guidance_scale=scale) for scale in (5.0, 0.0))
        assert guided.shape == (1, 3, 8, 16)
        assert not torch.equal(guided, plain)
        with pytest.raises(ValueError, match=re.escape("`classifier` has `sample_size=8`, but `unet` has")):
            make(unet=unet, classifier=random_classifier(sample_size=8, num_classes=4))


class TestControlNets:
    def test_conditions_of_a_recorded_format(self):
        """Five bands as a condition, in values of the data: as their fractions for a ControlNet without a format."""
        unet, bands = random_unet(), FORMATS["bands"]
        controlnet = fill_randomly(AdaGNControlNetModel.from_unet(unet, conditioning_channels=5))
        given = given_images(bands)
        pipe = make(ADMControlNetPipeline, unet=unet, controlnet=controlnet)
        expected = call(pipe, image=(given / np.float32(10000)).astype(np.float32))
        assert not torch.equal(expected, call(pipe, image=np.zeros((8, 8, 5), np.float32)))
        with pytest.raises(ValueError, match=re.escape("they must lie in [0, 1]")):
            call(pipe, image=given.astype(np.float32))
        controlnet.register_to_config(condition_format=bands.to_config())
        for image in (given, given.astype(np.float32)):
            torch.testing.assert_close(call(pipe, image=image), expected, rtol=0, atol=1e-5)

    def test_saved_and_loaded(self, tmp_path):
        net = AdaGNControlNetModel.from_unet(random_unet(), conditioning_channels=1)
        net.register_to_config(condition_format=FORMATS["L-12"].to_config())
        net.save_pretrained(tmp_path)
        loaded = AdaGNControlNetModel.from_pretrained(tmp_path)
        assert ImageFormat.from_config(loaded.config.condition_format, 1) == FORMATS["L-12"]

    def test_format_of_other_channels(self):
        unet = random_unet()
        net = AdaGNControlNetModel.from_unet(unet)
        net.register_to_config(condition_format=FORMATS["bands"].to_config())
        with pytest.raises(ValueError, match="`condition_format` has 5 channels, but the images of this model have 3"):
            make(ADMControlNetPipeline, unet=unet, controlnet=net)
