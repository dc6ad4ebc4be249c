"""The models of the Space without the page: recipes, limits, sampling, sketches, and the look inside."""

import copy
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from space_models import (
    MAX_PROMPT_LENGTH,
    SAMPLERS,
    Models,
    Recipe,
    Step,
    fit,
    fit_mask,
    make_scheduler,
    painted,
    stream,
)
from tolerances import levels_apart

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.schedulers.noise_schedules import check_same_noise


@pytest.fixture(scope="module")
def models(models_folder):
    return Models(models_folder, device="cpu")


def nothing(step):
    pass


def pixels(images):
    return np.stack([np.array(image) for image in images])


# Recipes


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"prompt": "x" * (MAX_PROMPT_LENGTH + 1)}, "has 201 characters"),
        ({"prompt": 5}, "must be text"),
        ({"steps": 101}, "Steps is 101"),
        ({"steps": 1}, "Steps is 1"),
        ({"steps": 2.5}, "an integer from 2 to 100"),
        ({"steps": True}, "an integer"),
        ({"num_images": 9}, "Images is 9"),
        ({"num_images": 0}, "Images is 0"),
        ({"seed": -1}, "Seed is -1"),
        ({"seed": 2**32}, "Seed is"),
        ({"seed": None}, "Seed is None"),
        ({"guidance_scale": float("nan")}, "Guidance is nan"),
        ({"guidance_scale": float("inf")}, "Guidance is inf"),
        ({"guidance_scale": "4"}, "Guidance is '4'"),
        ({"classifier_scale": 11, "category": "cats"}, "Classifier guidance is 11"),
        ({"classifier_scale": 1}, "needs a category. Choose one, or set the scale to 0"),
        ({"sampler": "Euler"}, "no sampler 'Euler'"),
        ({"category": None}, "category is None"),
        ({"upscale": "yes"}, "true or false"),
    ],
)
def test_recipe_refuses_values_out_of_range(entries, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**entries)


RECIPE = Recipe("a cat & a hat? 50%+", "cats", 2.5, 1.5, 7, "DDIM", 2**32 - 1, 3, True)


def test_recipes_survive_json_and_links():
    assert Recipe.from_json(RECIPE.to_json("abc")) == (RECIPE, "abc")
    assert Recipe.from_query(RECIPE.query()) == RECIPE
    assert Recipe().query() == {"prompt": ""}
    assert Recipe.from_query({"prompt": ""}) == Recipe()
    assert Recipe.from_query({"__theme": "dark"}) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no recipe"),
        ("{", "not valid JSON"),
        ("[" * 1000, "not valid JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({"step": 5}), "unknown entry 'step'"),
        (json.dumps({"prompt": "x" * 3000}), "at most 2000"),
        ('{"steps": NaN}', "Steps is nan"),
    ],
)
def test_invalid_recipes(text, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(text)


def test_invalid_link():
    with pytest.raises(ValueError, match="steps is 'many'"):
        Recipe.from_query({"steps": "many"})


# Sampling


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_recipe_same_images(models, sampler):
    recipe = Recipe("red cat", "cats", steps=3, sampler=sampler, seed=5, num_images=2)
    first, second = models.generate(recipe, nothing), models.generate(recipe, nothing)
    assert levels_apart(pixels(first), pixels(second)) <= 1
    other = models.generate(Recipe("red cat", "cats", steps=3, sampler=sampler, seed=6, num_images=1), nothing)
    assert np.abs(pixels(other)[0].astype(int) - pixels(first)[1]).max() <= 1  # the seeds of the recipe were 5 and 6
    assert levels_apart(pixels(other)[0], pixels(first)[0]) > 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_last_preview_is_close_to_the_image(models, sampler):
    steps = []
    images = models.generate(Recipe(steps=5, sampler=sampler, num_images=2, guidance_scale=1.0), steps.append)
    assert [(step.done, step.total, step.task) for step in steps] == [(i, 5, "Generating") for i in range(1, 6)]
    assert len(steps[-1].previews) == 2
    if sampler != "UniPC":  # its corrector changes the predicted x_0
        difference = pixels(steps[-1].previews).astype(int) - pixels(images)
        assert np.abs(difference).max() <= 1


def test_upsampling(models):
    steps = []
    images = models.generate(Recipe(steps=2, num_images=2, upscale=True), steps.append)
    assert [image.size for image in images] == [(16, 16)] * 2
    assert {step.task for step in steps} == {"Generating", "Upsampling"}


def test_upsampling_with_another_noise_schedule_than_in_training(models_folder):
    models = Models(models_folder, device="cpu")
    models.upsampler.scheduler = LearnedVarianceDDPMScheduler(beta_schedule="cosine")
    with pytest.raises(ValueError, match="This upsampler was trained on the noise schedule linear"):
        models.generate(Recipe(steps=2, num_images=1, upscale=True), nothing)


def test_demonstration_models_carry_their_noise_schedule():
    """All of them were trained with the cosine schedule (spaces/model/README.md)."""
    folder = Path(__file__).parents[2] / "spaces" / "model"
    schedulers = [
        LearnedVarianceDDPMScheduler.from_pretrained(folder / name, subfolder="scheduler")
        for name in ("base", "upsampler")
    ]
    for path, scheduler in (
        ("base/classifier/config.json", schedulers[0]),
        ("controlnet/config.json", schedulers[0]),
        ("upsampler/model_index.json", schedulers[1]),
    ):
        noise_schedule = json.loads((folder / path).read_text())["noise_schedule"]
        assert noise_schedule == {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
        check_same_noise(path, noise_schedule, scheduler)


def test_inpainting_keeps_the_unmasked_part(models):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    steps = []
    (result,) = models.inpaint(Recipe(steps=8, num_images=1), image, mask, steps.append)
    assert np.array_equal(np.array(result)[:, 4:], np.array(image)[:, 4:])
    assert not np.array_equal(np.array(result)[:, :4], np.array(image)[:, :4])
    assert steps[-1].done == steps[-1].total > 8  # RePaint repeats steps


def test_strength_of_a_sketch(models):
    condition = Image.new("RGB", (8, 8))
    ImageDraw.Draw(condition).line((1, 1, 6, 6), fill="white")
    recipe = Recipe(steps=3, num_images=1)
    without, with_it = (pixels(models.sketch(recipe, condition, scale, nothing)) for scale in (0.0, 1.0))
    assert levels_apart(without, pixels(models.generate(recipe, nothing))) <= 1
    assert levels_apart(without, with_it) > 1
    with pytest.raises(ValueError, match="Strength of the sketch is 3"):
        models.sketch(recipe, condition, 3, nothing)


def picture(seed: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_variations(models, sampler):
    steps = []
    recipe = Recipe(sampler=sampler, steps=3, seed=5, num_images=2, guidance_scale=2.0)
    images = models.variations(recipe, picture(0), steps.append)
    assert [(step.done, step.total, len(step.previews)) for step in steps] == [(i, 3, 2) for i in (1, 2, 3)]
    assert [image.size for image in images] == [(8, 8)] * 2
    assert levels_apart(pixels(images), pixels(models.variations(recipe, picture(0), nothing))) <= 1
    assert levels_apart(pixels(images), pixels(models.variations(recipe, picture(1), nothing))) > 1
    # The pipeline itself, for the same embedding and noise.
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    pipe = copy.copy(models.unclip)
    pipe.scheduler = make_scheduler(pipe.scheduler, sampler)
    expected = pipe(
        image_embeds=pipe.encode_image(picture(0)),
        num_images_per_prompt=2,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=generators,
        eta=0.0 if sampler == "DDIM" else None,
    ).images
    assert levels_apart(pixels(images), pixels(expected)) <= 1


def test_interpolation_with_noise_of_the_seed(models):
    recipe, ends = Recipe(steps=3, seed=5, num_images=1, guidance_scale=1.0), (picture(0), picture(1))

    def at(position, ends=ends):
        return np.array(models.interpolate(recipe, ends, position, False, nothing))

    # The position reaches both ends, and moves between them.
    assert levels_apart(at(0), at(0, (ends[0], ends[0]))) <= 1
    assert levels_apart(at(1), at(0, (ends[1], ends[1]))) <= 1
    assert levels_apart(at(0.5), at(0)) > 1
    assert levels_apart(at(0.5), at(1)) > 1


def test_interpolation_that_keeps_the_pictures_at_its_ends(models_folder):
    models = Models(models_folder, device="cpu")
    models.unclip.unet.conv_out.weight.data *= 0.02  # changes little with its input, so that inversion converges
    recipe, ends, steps = Recipe(steps=3, num_images=1, guidance_scale=1.0), (picture(0), picture(1)), []
    found = [np.array(models.interpolate(recipe, ends, at, True, steps.append)) for at in (0, 0.5, 1)]
    # Two evaluations a step leave 6 levels; noise of a seed would lead to other pictures.
    assert levels_apart(found[0], np.array(ends[0])) <= 16
    assert levels_apart(found[2], np.array(ends[1])) <= 16
    assert levels_apart(found[1], found[0]) > 64
    assert levels_apart(np.array(models.interpolate(recipe, ends, 0, False, nothing)), np.array(ends[0])) > 64
    # Both are inverted once, in two evaluations a step.
    inverting = [(step.done, step.total, step.previews) for step in steps if step.task == "Inverting"]
    assert inverting == [(i, 6, []) for i in range(1, 7)] * 2
    assert len([step for step in steps if step.task == "Generating"]) == 9


def test_bad_input_of_interpolations(models):
    recipe, ends = Recipe(steps=2, num_images=1), (picture(0), picture(1))
    with pytest.raises(ValueError, match="Position between the images is 1.5. It must be a number from 0 to 1"):
        models.interpolate(recipe, ends, 1.5, False, nothing)
    with pytest.raises(ValueError, match="`keeps_ends` is 'yes'. It must be true or false"):
        models.interpolate(recipe, ends, 0.5, "yes", nothing)
    with pytest.raises(ValueError, match="There is no image. Upload one first"):
        models.read_variation(None)
    assert models.read_variation(Image.new("L", (20, 10))).size == (8, 8)


def test_variations_need_their_models(models, models_folder, tmp_path):
    shutil.copytree(models_folder / "base", tmp_path / "base")
    alone = Models(tmp_path, device="cpu")
    assert not alone.has_variations
    for call in (
        lambda: alone.read_variation(picture(0)),
        lambda: alone.variations(Recipe(), picture(0), nothing),
        lambda: alone.interpolate(Recipe(), (picture(0),) * 2, 0.5, False, nothing),
    ):
        with pytest.raises(ValueError, match="This Space has no decoder of image embeddings"):
            call()
    assert models.has_variations


def test_look_inside(models):
    inside = models.look_inside(Recipe("red cat", "cats", 2.0, 1.0, steps=6, seed=3, num_images=4), nothing)
    assert len(inside.timesteps) == 6
    assert inside.timesteps == sorted(inside.timesteps, reverse=True)
    assert (inside.timesteps[0], inside.timesteps[-1]) == (999, 0)
    # beta and beta_tilde of the chain of these six steps, anew from the definition.
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[inside.timesteps]
    previous = np.append(alphas_cumprod[1:], 1.0)
    betas = 1 - alphas_cumprod / previous
    posterior = betas * (1 - previous) / (1 - alphas_cumprod)
    posterior[-1] = posterior[-2]  # its own is 0, and has no log
    lower, upper = zip(*inside.bounds, strict=True)
    np.testing.assert_allclose(upper, np.log(betas), rtol=1e-5)
    np.testing.assert_allclose(lower, np.log(posterior), rtol=1e-5)
    assert inside.bits_per_dim == pytest.approx(sum(inside.terms) + inside.prior)
    assert all(low <= middle <= high for low, middle, high in inside.log_variances)


def test_bound_depends_on_the_condition(models):
    one, other = (models.look_inside(Recipe(prompt, steps=3, guidance_scale=1.0), nothing) for prompt in ("cat", "mat"))
    assert one.terms != other.terms


def test_recipes_that_these_models_cannot_follow(models, models_folder, tmp_path):
    with pytest.raises(ValueError, match="no category 'Cats'. Choose one of: any, cats"):
        models.check(Recipe(category="Cats"))
    shutil.copytree(models_folder / "base", tmp_path / "base")
    alone = Models(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="no upsampler"):
        alone.check(Recipe(upscale=True))
    with pytest.raises(ValueError, match="no ControlNet"):
        alone.sketch(Recipe(), Image.new("RGB", (8, 8)), 1.0, nothing)
    assert alone.weights != models.weights
    with pytest.raises(FileNotFoundError, match="ADM_SPACE_MODELS"):
        Models(tmp_path / "base")


# Streams


def test_stream_ends_with_the_result():
    def draw(on_step):
        for i in range(3):
            on_step(Step(i + 1, 3, "Generating"))
        return "image"

    events = list(stream(draw, seconds_between=0))
    assert [event.done for event in events[:-1]] == [1, 2, 3]
    assert events[-1] == "image"
    assert len(list(stream(draw, seconds_between=100))) == 2  # the first step, and always the result


def test_stream_raises_errors():
    def draw(on_step):
        raise ValueError("too much")

    with pytest.raises(ValueError, match="too much"):
        list(stream(draw))


def test_sampling_ends_when_the_visitor_leaves():
    steps, ended = [], threading.Event()

    def draw(on_step):
        try:
            for i in range(1000):
                steps.append(i)
                on_step(Step(i + 1, 1000, "Generating"))
                time.sleep(0.005)
        finally:
            ended.set()

    events = stream(draw)
    next(events)
    events.close()
    assert ended.wait(5)
    assert len(steps) < 1000


# Uploads and drawings


def test_uploads_become_small_squares_on_white():
    wide = Image.new("RGBA", (64, 32), (255, 0, 0, 255))
    fitted = np.array(fit(wide, 8))
    assert fitted.shape == (8, 8, 3)
    assert (fitted[:2] == 255).all()
    assert (fitted[2:6] == (255, 0, 0)).all()
    assert (np.array(fit(Image.new("LA", (5, 5), (0, 0)), 8)) == 255).all()  # fully transparent


def test_mask_is_where_the_paint_is():
    layers = [Image.new("RGBA", (32, 32)), Image.new("RGBA", (32, 32))]
    ImageDraw.Draw(layers[0]).rectangle((0, 0, 15, 15), fill="magenta")
    ImageDraw.Draw(layers[1]).rectangle((24, 24, 31, 31), fill="black")
    mask = np.array(fit_mask(painted(layers), 8, coverage=0.5)) > 0
    expected = np.zeros((8, 8), bool)
    expected[:4, :4] = expected[6:, 6:] = True
    assert np.array_equal(mask, expected)


def test_missing_and_unusable_drawings(models):
    for read in (models.read_mask, models.read_strokes):
        with pytest.raises(ValueError, match="Nothing is drawn yet"):
            read([])
    with pytest.raises(ValueError, match="Nothing is marked"):
        models.read_mask([Image.new("RGBA", (32, 32))])
    with pytest.raises(ValueError, match="sketch is empty"):
        models.read_strokes([Image.new("RGBA", (32, 32))])
    with pytest.raises(ValueError, match="no image"):
        models.read_image(None)
    with pytest.raises(ValueError, match="5000 x 10 pixels"):
        models.read_image(Image.new("L", (5000, 10)))
    with pytest.raises(ValueError, match="differ in size"):
        models.read_mask([Image.new("RGBA", (32, 32)), Image.new("RGBA", (16, 16))])


def test_strokes_become_lines_a_pixel_wide(models):
    pytest.importorskip("skimage")
    layer = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(layer).line((4, 28, 60, 28), fill="black", width=12)  # a pixel and a half of 8
    lines = np.array(models.read_strokes([layer]))[..., 0]
    assert set(np.unique(lines)) == {0, 255}
    assert (lines > 0).sum(axis=0).max() == 1
    assert (lines > 0).any(axis=0).sum() >= 5


def test_global_random_state_is_unchanged(models):
    state = torch.random.get_rng_state()
    models.generate(Recipe(steps=2, num_images=1), nothing)
    assert torch.equal(state, torch.random.get_rng_state())


def test_guidance_without_a_condition(models):
    """Guidance has no effect, so that the page can keep its default."""
    free, guided = (
        pixels(models.generate(Recipe(steps=2, num_images=1, guidance_scale=scale), nothing)) for scale in (1.0, 4.0)
    )
    assert levels_apart(free, guided) <= 1
