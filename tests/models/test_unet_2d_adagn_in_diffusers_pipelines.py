"""Our U-Net in the pipelines of diffusers: the same pictures as with diffusers' own U-Net of the same weights."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from toy_models import random_diffusers_unet, random_unet


# Both networks agree within 1e-5; the first steps multiply that by up to sqrt(1 / bar alpha_T - 1) = 157.
TOLERANCE = 2e-4


def both_unets(out_channels: int):
    theirs = random_diffusers_unet(out_channels=out_channels)
    ours = random_unet(seed=1, out_channels=out_channels)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def sample(pipeline_class, unet, scheduler, **kwargs) -> torch.Tensor:
    pipe = pipeline_class(unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, generator=generator, num_inference_steps=8, output_type="np", **kwargs).images
    return torch.from_numpy(images)


@pytest.mark.parametrize(
    "pipeline_class, scheduler, out_channels",
    [
        (DDPMPipeline, DDPMScheduler(), 3),
        (DDPMPipeline, DDPMScheduler(variance_type="learned_range"), 6),
        (DDIMPipeline, DDIMScheduler(), 3),
    ],
    ids=["ddpm", "ddpm-learned-range", "ddim"],
)
def test_same_images_as_with_diffusers_unet(pipeline_class, scheduler, out_channels):
    ours, theirs = both_unets(out_channels)
    expected = sample(pipeline_class, theirs, scheduler)
    assert expected.std() > 0.1  # not a flat picture, which anything would reproduce
    torch.testing.assert_close(sample(pipeline_class, ours, scheduler), expected, rtol=0, atol=TOLERANCE)


def test_other_weights_give_other_images():
    ours, _ = both_unets(3)
    first = sample(DDPMPipeline, ours, DDPMScheduler())
    second = sample(DDPMPipeline, random_unet(seed=2, out_channels=3), DDPMScheduler())
    assert (first - second).abs().max() > 0.1
