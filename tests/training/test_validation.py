"""Validation images: the examples that they show, and noise that depends only on the place of an image."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from toy_models import CONDITIONAL, random_unet

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.training import DiffusionTrainingArguments, ImageDataset, choose_examples, generate


def numbered(**columns):
    """Ten images; that of number n is of the colour n."""
    images = [Image.new("RGB", (8, 8), (number,) * 3) for number in range(10)]
    features = {name: datasets.Value("string" if name == "caption" else "int64") for name in columns}
    return ImageDataset(
        datasets.Dataset.from_dict(
            {"image": images, **columns}, features=datasets.Features({"image": datasets.Image(decode=False)} | features)
        ),
        resolution=8,
    )


def toy_pipeline(**config):
    return ADMPipeline(
        unet=random_unet(**config),
        scheduler=LearnedVarianceDDPMScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        classifier=None,
    )


@pytest.mark.parametrize(("number", "shown"), [(4, [0, 2, 5, 7]), (1, [0]), (10, range(10)), (99, range(10))])
def test_examples_are_evenly_spaced(number, shown):
    chosen = choose_examples(numbered(), number)
    assert [round((float(tensors["images"][0, 0, 0]) + 1) * 127.5) for tensors, _ in chosen] == list(shown)
    assert all(told == {} for _, told in chosen)


def test_what_is_told_of_them():
    dataset = numbered(label=[-1, 1] * 5, caption=[f"number {number}" for number in range(10)])
    assert [told for _, told in choose_examples(dataset, 2, null_class_id=7)] == [
        {"prompt": "number 0", "class_labels": 7},
        {"prompt": "number 5", "class_labels": 1},
    ]


def test_samples_that_are_not_finite_are_reported(caplog):
    pipeline = toy_pipeline()
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, torch.nan)
    arguments = DiffusionTrainingArguments(train_batch_size=1, validation_num_inference_steps=2)
    (image,) = generate(pipeline, [{}], arguments)
    assert "not finite" in caplog.text
    assert image.getextrema() == ((0, 0),) * 3


def test_images_do_not_depend_on_the_batch():
    pipeline = toy_pipeline(**CONDITIONAL)
    wanted = [{"class_labels": number % 4} for number in range(5)]
    grids = []
    for batch_size in (2, 5):
        arguments = DiffusionTrainingArguments(
            train_batch_size=batch_size, validation_num_inference_steps=2, validation_guidance_scale=3.0, seed=7
        )
        grids.append(np.stack([np.asarray(image, dtype=int) for image in generate(pipeline, wanted, arguments)]))
    assert grids[0].shape == (5, 8, 8, 3)
    assert abs(grids[0] - grids[1]).max() <= 1  # rounding of other batches
    alone = pipeline(
        class_labels=2, guidance_scale=3.0, num_inference_steps=2, generator=torch.Generator().manual_seed(7 + 2)
    ).images[0]
    assert abs(grids[0][2] - np.asarray(alone, dtype=int)).max() <= 1


def test_nothing_to_guide_towards():
    arguments = DiffusionTrainingArguments(validation_num_inference_steps=2, validation_guidance_scale=3.0)
    assert len(generate(toy_pipeline(), [{}] * 3, arguments)) == 3
