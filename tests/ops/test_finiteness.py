"""Whoever gets NaN is told, with its reason: by pipelines of all kinds, whatever they return, and by measures."""

import math
import warnings

import numpy as np
import pytest
import torch
from toy_models import CONDITIONAL, fill_randomly, random_classifier, random_unet

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.evaluation.bits_per_dim import bits_per_dim
from diffusers_adm.evaluation.frechet import ClassifierFeatures, compare_image_sets
from diffusers_adm.ops.finiteness import explain_not_finite, not_finite


NAN_CLASS = 2


def make(pipeline_class, **parts):
    components = {**dict.fromkeys(ADMPipeline._optional_components), "scheduler": LearnedVarianceDDPMScheduler()}
    pipe = pipeline_class(**components, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_classes(**config):
    """A network that returns NaN only for images of `NAN_CLASS`."""
    unet = random_unet(**CONDITIONAL, **config)
    unet.class_embedding.weight.data[NAN_CLASS] = math.nan
    return unet


def plain(labels, **kwargs):
    return make(ADMPipeline, unet=of_classes())(class_labels=labels, **kwargs)


def inpainting(labels, **kwargs):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    return make(ADMInpaintPipeline, unet=of_classes())(
        torch.full((1, 3, 8, 8), 0.5), mask, class_labels=labels, **kwargs
    )


def upsampling(labels, **kwargs):
    pipe = make(ADMSuperResolutionPipeline, unet=of_classes(in_channels=6))
    return pipe(torch.full((1, 3, 4, 4), 0.5), class_labels=labels, **kwargs)


def controlled(labels, **kwargs):
    unet = of_classes()
    controlnet = fill_randomly(AdaGNControlNetModel.from_unet(random_unet(**CONDITIONAL)))
    pipe = make(ADMControlNetPipeline, unet=unet, controlnet=controlnet)
    return pipe(class_labels=labels, image=torch.full((1, 3, 8, 8), 0.5), **kwargs)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("draw", [plain, inpainting, upsampling, controlled])
def test_pipelines_tell_which_images_and_why(draw, output_type, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # NumPy's, of a cast that leads to anything
        images = draw([1, NAN_CLASS, 3], num_inference_steps=2, output_type=output_type).images
    messages = [record.message for record in caplog.records if "not finite" in record.message]
    assert len(messages) == (output_type in ("pil", "np"))
    for message in messages:
        assert "1 of 3 images hold values that are not finite (numbers 1)" in message
        assert "Weights of `unet` are not finite themselves, such as `class_embedding.weight`" in message
    finite = [np.isfinite(np.asarray(image, dtype=np.float32)).all() for image in images]
    assert finite == [True, output_type == "pil", True]
    if output_type == "pil":
        half = np.asarray(images[1])[:, :4]  # which the inpainter has painted
        assert (half == 0).all()


def test_every_call_tells_and_a_sound_one_does_not(caplog):
    pipe = make(ADMPipeline, unet=of_classes())
    for labels, times in (([NAN_CLASS, 1], 1), ([1, NAN_CLASS], 2), (1, 2)):
        pipe(class_labels=labels, num_inference_steps=1)
        assert caplog.text.count("not finite (numbers") == times


def test_no_black_images_alone(caplog):
    """Where nothing else is left, half precision says so in place of an image. The numbers show it by themselves."""
    unet = random_unet()
    unet.conv_in.weight.data[:] = 6e4  # within the range of float16, beyond which the products are
    pipe = make(ADMPipeline, unet=unet.half())
    with pytest.raises(ValueError, match="No value of the images is finite. `unet` ran in float16.*Use bfloat16 or"):
        pipe(batch_size=2, num_inference_steps=2)
    assert not np.isfinite(pipe(batch_size=2, num_inference_steps=2, output_type="np").images).any()
    assert "2 of 2 images hold values that are not finite" in caplog.text


class TestReason:
    def test_half_precision(self):
        unet, classifier = random_unet().half(), random_classifier()
        assert "`unet` ran in float16, where numbers above 65504 overflow" in explain_not_finite(
            {"unet": unet, "classifier": classifier}
        )
        with torch.autocast("cpu", dtype=torch.float16):
            assert "`unet` and `classifier` ran in float16" in explain_not_finite(
                {"unet": random_unet(), "classifier": classifier}
            )

    def test_neither(self):
        assert "All weights are finite" in explain_not_finite(
            {"unet": random_unet().bfloat16(), "none": torch.nn.ReLU()}
        )

    def test_rows(self):
        values = torch.zeros(4, 3, 2)
        values[1, 2, 0], values[3, 0, 1] = math.nan, math.inf
        assert not_finite(values) == [1, 3]
        assert not_finite(values[:1]) == []


def test_bound_stops_at_the_first_such_image():
    unet = random_unet()
    unet.conv_out.bias.data[0] = math.nan
    with pytest.raises(RuntimeError, match="bound of image 0 are not finite.* `unet` .* such as `conv_out.bias`"):
        bits_per_dim(unet, LearnedVarianceDDPMScheduler(), torch.zeros(2, 3, 8, 8), timestep_respacing="2")


def test_measures_name_the_set():
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"images": torch.full((3, 8, 8), index / 127.5 - 1)}

    classifier = random_classifier()
    classifier.conv_in.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="image 0 of the `samples` are not finite. .*`classifier`.* `conv_in.weight`"):
        compare_image_sets(ClassifierFeatures(classifier), Images(), Images(), k=1, splits=1, progress_bar=False)
