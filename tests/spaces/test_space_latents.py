"""The Space with two models: one in latents, which is the page's choice, and the base model in pixels."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from app import EXAMPLES, build
from PIL import Image, ImageDraw
from space_models import BASE, LATENTS, SAMPLERS, Models, Recipe
from space_server import with_defaults
from tiny_autoencoders import random_vae
from tolerances import levels_apart
from toy_models import CONDITIONAL, fill_randomly, random_text_encoder, random_text_unet, toy_tokenizer

from diffusers_adm import AdaGNControlNetModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.latents import LatentSpace


CATEGORIES = {0: "cats", 1: "dogs", 2: "hats", 3: "mats"}


@pytest.fixture(scope="module")
def models(models_folder, tmp_path_factory):
    """The base model has 8x8 pixels, the one in latents 16x16."""
    folder = tmp_path_factory.mktemp("both")
    for name in ("base", "upsampler"):
        shutil.copytree(models_folder / name, folder / name)
    unet = random_text_unet("added_kv", seed=5, in_channels=4, out_channels=8, **CONDITIONAL)
    controlnet = AdaGNControlNetModel.from_unet(unet, conditioning_downsampling_factor=2)
    fill_randomly(controlnet, seed=6).save_pretrained(folder / "controlnet_latents")
    ADMPipeline(
        unet,
        LearnedVarianceDDPMScheduler(clip_sample=False),
        vae=random_vae(),
        text_encoder=random_text_encoder(),
        tokenizer=toy_tokenizer(),
        classifier=None,
        id2label=CATEGORIES,
    ).save_pretrained(folder / "latents")
    return Models(folder, device="cpu")


def pixels(images):
    return np.stack([np.array(image) for image in images])


def nothing(step):
    pass


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_recipe_same_images(models, sampler):
    recipe = Recipe("red cat", "cats", steps=3, sampler=sampler, num_images=2, model=LATENTS)
    first, again = models.generate(recipe, nothing), models.generate(recipe, nothing)
    assert [image.size for image in first] == [(16, 16)] * 2
    assert levels_apart(pixels(first), pixels(again)) <= 1


def test_a_recipe_without_a_model_means_the_base_model(models):
    """Recipes from before there was a choice."""
    recipe, _ = Recipe.from_json('{"prompt": "red cat", "steps": 2, "num_images": 1, "weights": "old"}')
    assert recipe == Recipe.from_query({"prompt": "red cat", "steps": "2", "num_images": "1"})
    (image,) = models.generate(recipe, nothing)
    assert image.size == (8, 8)


def test_recipes_and_links_name_the_model(models):
    recipe = Recipe("red cat", model=LATENTS)
    assert recipe.query() == {"prompt": "red cat", "model": LATENTS}
    assert Recipe.from_query(recipe.query()) == recipe
    assert Recipe.from_json(recipe.to_json(models.weights)) == (recipe, models.weights)
    with pytest.raises(ValueError, match="There is no model '64'. Choose one of: latents, base"):
        Recipe(model="64")


def test_the_page_chooses_the_model_in_latents(models, models_folder):
    assert (models.default_model, models.size(LATENTS), models.size()) == (LATENTS, 16, 8)
    alone = Models(models_folder, device="cpu")
    assert alone.default_model == BASE
    with pytest.raises(ValueError, match="There is no model 'latents'. Choose one of: base"):
        alone.check(Recipe(model=LATENTS))


@pytest.mark.parametrize(
    "option, message",
    [
        ({"upscale": True}, r"Upsampling needs the model of 8 x 8 pixels \('base'\)"),
        (
            {"classifier_scale": 1, "category": "cats"},
            r"Classifier guidance needs the model of 8 x 8 pixels \('base'\)",
        ),
    ],
)
def test_options_of_the_base_model_only(models, option, message):
    models.check(Recipe(**option))
    with pytest.raises(ValueError, match=message):
        models.check(Recipe(**option, model=LATENTS))


def test_previews_are_decoded_only_when_asked_for(models, monkeypatch):
    decode, decoded, steps = LatentSpace.decode, [], []
    monkeypatch.setattr(LatentSpace, "decode", lambda *args: decoded.append(args) or decode(*args))
    (image,) = models.generate(Recipe(steps=6, num_images=1, guidance_scale=1.0, model=LATENTS), steps.append)
    assert (len(steps), len(decoded)) == (6, 1)  # the result
    # The last one is the result. (It is decoded again, since the previous steps of a solver can differ.)
    assert levels_apart(pixels(steps[-1].previews), pixels([image])) <= 1
    assert steps[-1].previews is steps[-1].previews
    assert len(decoded) == 2


def test_inpainting_in_latents_keeps_the_unmasked_part(models):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    (result,) = models.inpaint(Recipe(steps=4, num_images=1, model=LATENTS), image, mask, nothing)
    assert np.array_equal(pixels([result])[0, :, 8:], np.array(image)[:, 8:])
    assert levels_apart(pixels([result])[0, :, :8], np.array(image)[:, :8]) > 1


def test_sketches_are_followed_by_the_model_in_latents(models, models_folder, tmp_path):
    layer = Image.new("RGBA", (32, 32))
    ImageDraw.Draw(layer).line((4, 4, 28, 28), fill="black", width=3)
    condition = models.read_strokes([layer])
    assert condition.size == models.find_edges(Image.new("RGB", (9, 9))).size == (16, 16)
    recipe = Recipe(steps=3, num_images=1)  # of the base model: sketches have no link
    without, with_it = (pixels(models.sketch(recipe, condition, scale, nothing)) for scale in (0.0, 1.0))
    assert levels_apart(without, pixels(models.generate(replace(recipe, model=LATENTS), nothing))) <= 1
    assert levels_apart(without, with_it) > 1
    # With a ControlNet for the base model only, that one follows them.
    for name in ("base", "controlnet"):
        shutil.copytree(models_folder / name, tmp_path / name)
    assert (Models(tmp_path, device="cpu").sketch_model, models.sketch_model) == (BASE, LATENTS)


def test_uploads_get_the_size_of_the_model(models):
    assert models.read_image(Image.new("L", (40, 40)), LATENTS).size == (16, 16)
    layer = Image.new("RGBA", (32, 32), "black")
    assert models.read_mask([layer], LATENTS).size == (16, 16)
    assert models.read_mask([layer]).size == (8, 8)


def test_look_inside_uses_the_base_model(models):
    assert models.look_inside(Recipe(steps=2, model=LATENTS), nothing).image.size == (8, 8)


def test_calls_from_before_there_was_a_choice(models):
    """They have one value less and get the page's choice; other values may not be missing."""
    functions = {function.api_name: function for function in build(models).fns.values()}
    for name in ("generate", "edit"):
        inputs = functions[name].inputs
        sent = [component.value for component in inputs[:-1]]
        assert with_defaults(inputs, sent) == [*sent, LATENTS]
        assert with_defaults(inputs, [*sent, BASE])[-1] == BASE
        assert with_defaults(inputs, sent[:-1]) == sent[:-1]


def test_seeds_of_the_examples_are_not_picked():
    assert {recipe.seed for recipe in EXAMPLES} == {0}
