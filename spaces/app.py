"""
The Space of diffusers-adm: generates and inpaints images, follows sketches, makes variations of images, and shows the
steps of a sample.

`python spaces/app.py` from a clone. `--models` or ADM_SPACE_MODELS names the folder of the models (see README.md).
"""

import argparse
import functools
import hashlib
import io
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
from gradio.utils import get_upload_folder
from huggingface_hub.constants import HF_HOME
from PIL import Image, ImageDraw, ImageFont
from space_models import (
    ANY_CATEGORY,
    BASE,
    LATENTS,
    LIMITS,
    MAX_CONTROLNET_SCALE,
    MAX_IMAGE_SIDE,
    MAX_PROMPT_LENGTH,
    SAMPLERS,
    VARIATION_GUIDANCE,
    Inside,
    Models,
    OnStep,
    Recipe,
    Step,
    stream,
)
from space_server import (
    CALLS_PER_MINUTE,
    KEEP_SECONDS,
    MAX_WAITING,
    PROXIES,
    Page,
    added_later,
    limit_drawings,
    readable_errors,
    serve,
)

from diffusers_adm import __version__
from diffusers_adm.commands.errors import CommandError, add_debug_argument, run_command


MODELS = Path(__file__).parent / "model"
STRIP_STEPS, SHEET_COLUMNS = 10, 10
TILE_SIDE, CAPTION_HEIGHT, CAPTION_SIZE = 128, 26, 20  # pixels
EDITOR_SIDE = 256  # pixels
CSS = """
/* The images are small; show their pixels. */
.pixels img { image-rendering: pixelated; object-fit: contain; width: 100%; height: 100%; }
/* Those of a gallery are up to 64 pixels wide and shown much larger: smooth. */
.smooth img { image-rendering: auto; }
/* All images of a gallery, without a scroll bar or empty space below. */
.pixels .grid-wrap { max-height: none; min-height: 0; }
@media (max-width: 768px) {
  /* One below the other: the button, its results, and then the finer settings. */
  .controls { display: contents; }
  .controls > *, .results { flex: 1 1 100%; }
  .results { order: 1; }
  .settings { order: 2; }
}
/* Wide images: below their buttons, with a scroll bar on small screens. */
.strip .image-container { padding-top: 36px; overflow-x: auto; }
.strip img { min-width: 640px; }
.curves img { max-width: min(100%, 640px); }
/* All tabs fit on a phone. */
@media (max-width: 480px) { .tab-container button { padding: 0 4px; font-size: 0.8em; } }
footer { display: none !important; }
"""
# The CPU cores are few, so there is one call at a time.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
CONTROLS: dict[str, Any] = {"min_width": 280, "elem_classes": "controls"}
RESULTS: dict[str, Any] = {"min_width": 280, "elem_classes": "results"}
PRIVATE: dict[str, Any] = {"api_visibility": "private", "queue": False}
TRACKER = gr.Progress()  # Gradio finds it as a default value and passes the progress bar of the call instead
# Their seeds are the defaults: nothing is picked.
EXAMPLES = (
    Recipe("grinning face", "Smileys & Emotion"),
    Recipe("fire"),
    Recipe("cat"),
    Recipe("red heart", "Smileys & Emotion"),
    Recipe("star"),
    Recipe("house", "Travel & Places"),
)
KINDS = {LATENTS: "in latents", BASE: "in pixels"}
INFO = {
    "guidance_scale": "How closely the images follow the prompt; 1 is off.",
    "classifier_scale": "How strongly a classifier guides towards the category; 0 is off.",
}
OTHER_WEIGHTS = "The recipe belongs to other weights than those of this Space, so the images will differ."
# Pillow refuses images with more than twice as many pixels before it decodes them. Gradio decodes uploads before the
# checks of `space_models`.
Image.MAX_IMAGE_PIXELS = MAX_IMAGE_SIDE**2 // 2
INTRODUCTION = """
# Emoji from small diffusion models
Type a word and get four new emoji. The models of diffusers-adm behind this page were trained on emoji only, so ask for
things that have one. Images are deleted from the server after a minute; their link makes the same ones again.
"""
ROUNDING = """
This Space compiles its models while it runs. With compiled code, a link makes the same images up to rounding: some
values differ, most by one 8-bit level.
"""


def pack(images: list[Image.Image], recipe: str) -> str:
    """Writes a ZIP file with the images and their recipe, which Gradio deletes later. Returns its path."""
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    path = folder / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(images):
            data = io.BytesIO()
            image.save(data, "PNG")
            archive.writestr(f"{number:02d}.png", data.getvalue())
        archive.writestr("recipe.json", recipe)
    return str(path)


def is_empty(layer: Image.Image) -> bool:
    """Whether an image is fully transparent."""
    return layer.convert("RGBA").getchannel("A").getextrema() == (0, 0)


def read_editor(editor: dict | None) -> tuple[Image.Image | None, list[Image.Image]]:
    """The background of an image editor (None if it is empty) and its layers."""
    editor = editor or {}
    background = editor.get("background")
    if background is not None and is_empty(background):
        background = None
    return background, [layer for layer in editor.get("layers") or [] if layer is not None]


def contact_sheet(images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Images row by row, with captions below them if there are any."""
    height = TILE_SIDE + (CAPTION_HEIGHT if captions else 0)
    canvas = Image.new("RGB", (columns * TILE_SIDE, -(-len(images) // columns) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(CAPTION_SIZE)
    for i, image in enumerate(images):
        x, y = i % columns * TILE_SIDE, i // columns * height
        canvas.paste(image.resize((TILE_SIDE, TILE_SIDE), Image.Resampling.NEAREST), (x, y))
        if captions:
            draw.text((x + 4, y + TILE_SIDE), captions[i], fill="black", font=font)
    return canvas


def strip(inside: Inside) -> Image.Image:
    """Some steps from noise to image: x_t above the predicted x_0."""
    last = len(inside.timesteps) - 1
    count = min(STRIP_STEPS, last + 1)
    chosen = [round(i * last / max(count - 1, 1)) for i in range(count)]
    return contact_sheet([images[i] for images in (inside.samples, inside.predictions) for i in chosen], count)


def plot(inside: Inside) -> Any:
    """Plots the learned variance with its bounds, and the terms of the variational bound, by timestep."""
    from matplotlib.figure import Figure  # slow to import; pyplot would keep all figures

    figure = Figure(figsize=(5.5, 7), dpi=150, layout="constrained")  # narrow, for phones
    top, bottom = figure.subplots(2)
    lower, upper = zip(*inside.bounds, strict=True)
    low, middle, high = zip(*inside.log_variances, strict=True)
    top.plot(inside.timesteps, upper, "--", label=r"upper bound, $\log\,\beta_t$")
    top.plot(inside.timesteps, lower, ":", label=r"lower bound, $\log\,\tilde\beta_t$")
    top.plot(inside.timesteps, middle, label="learned (median)")
    top.fill_between(inside.timesteps, low, high, alpha=0.3, label="learned (10% to 90% of the pixels)")
    top.set(xlabel="timestep", ylabel="log-variance", title="Learned variance")
    top.legend()
    bottom.plot(inside.timesteps, inside.terms, "o-", markersize=3)
    bottom.set_yscale("log")
    bottom.set(xlabel="timestep", ylabel="bits per dimension", title="Terms of the variational bound")
    return figure


def describe_bound(inside: Inside) -> str:
    """The variational bound and its parts, as Markdown."""
    decoder, others = inside.terms[-1], sum(inside.terms[:-1])
    return (
        f"At most **{inside.bits_per_dim:.3f} bits per dimension** for this image with {len(inside.terms)} steps: "
        f"{others:.3f} for the KL divergences, {decoder:.3f} for the decoder of the last step, {inside.prior:.2g} for "
        "the prior. (Estimated with one noise sample per step, without guidance.)"
    )


class Space:
    """The functions of the page. Parameter names are those of the API."""

    def __init__(self, models: Models):
        self.models = models
        self.nobody_waits = threading.Event()
        self.nobody_waits.set()

    def generate(
        self,
        prompt,
        category,
        guidance_scale,
        classifier_scale,
        steps,
        sampler,
        seed,
        num_images,
        upscale,
        model,
        progress=TRACKER,
    ):
        """Generates images from a prompt, a category or both. Also returns the recipe, as JSON and as a link."""
        with readable_errors():
            recipe = Recipe(
                prompt, category, guidance_scale, classifier_scale, steps, sampler, seed, num_images, upscale, model
            )
            self.models.check(recipe)
        yield from self._generate(recipe, progress)

    def reproduce(self, recipe, progress=TRACKER):
        """Generates the images of a recipe (JSON) again."""
        with readable_errors():
            recipe, weights = Recipe.from_json(recipe)
            self.models.check(recipe)
        if weights not in (None, self.models.weights):
            gr.Warning(OTHER_WEIGHTS)
        yield from self._generate(recipe, progress)

    def example(self, *values):
        """Generates the images of an example at the start of the app. Its steps wait while a visitor's call runs."""
        recipe = Recipe(*values)
        return self._outputs(recipe, self.models.generate(recipe, lambda step: self.nobody_waits.wait()))

    def _generate(self, recipe: Recipe, progress: gr.Progress) -> Iterator[tuple]:
        text = recipe.to_json(self.models.weights)
        for status, images, is_done in self._run(functools.partial(self.models.generate, recipe), progress):
            yield self._outputs(recipe, images) if is_done else (images, status, text, "", None)

    def _outputs(self, recipe: Recipe, images: list[Image.Image]) -> tuple:
        text = recipe.to_json(self.models.weights)
        link = f"[Link to these images](?{urlencode(recipe.query() | {'weights': self.models.weights})})"
        return images, "Done.", text, link, pack(images, text)

    def _run(self, work: Callable[[OnStep], Any], progress: gr.Progress) -> Iterator[tuple[str, Any, bool]]:
        """Yields the status, the previews or the result, and whether it is the result."""
        self.nobody_waits.clear()
        try:
            with readable_errors():
                for event in stream(work):
                    if isinstance(event, Step):
                        progress((event.done, event.total), desc=event.task, unit="steps")
                        yield f"{event.task}: step {event.done} of {event.total}", event.previews, False
                    else:
                        yield "Done.", event, True
        finally:
            self.nobody_waits.set()

    def edit(self, drawing, prompt, category, guidance_scale, steps, seed, num_images, model, progress=TRACKER):
        """Inpaints the painted part of an image (RePaint)."""
        with readable_errors():
            numbers = {"steps": steps, "seed": seed, "num_images": num_images}
            recipe = Recipe(prompt, category, guidance_scale, **numbers, model=model)
            self.models.check(recipe)
            background, layers = read_editor(drawing)
            image, mask = self.models.read_image(background, model), self.models.read_mask(layers, model)
        for status, images, _ in self._run(functools.partial(self.models.inpaint, recipe, image, mask), progress):
            yield images, status

    def sketch(self, drawing, prompt, category, strength, guidance_scale, steps, seed, num_images, progress=TRACKER):
        """Generates images that follow a sketch, or the edges of an uploaded image if nothing is drawn."""
        with readable_errors():
            recipe = Recipe(prompt, category, guidance_scale, steps=steps, seed=seed, num_images=num_images)
            self.models.check(recipe)
            background, layers = read_editor(drawing)
            use_edges = background is not None and all(is_empty(layer) for layer in layers)
            condition = self.models.find_edges(background) if use_edges else self.models.read_strokes(layers)
        shown = condition.resize((EDITOR_SIDE, EDITOR_SIDE), Image.Resampling.NEAREST)
        work = functools.partial(self.models.sketch, recipe, condition, strength)
        for status, images, _ in self._run(work, progress):
            yield shown, images, status

    def variations(self, image, guidance_scale, steps, seed, num_images, progress=TRACKER):
        """Generates variations of an image, from its CLIP embedding."""
        with readable_errors():
            recipe = Recipe("", ANY_CATEGORY, guidance_scale, steps=steps, seed=seed, num_images=num_images)
            image = self.models.read_variation(image)
        for status, images, _ in self._run(functools.partial(self.models.variations, recipe, image), progress):
            yield images, status

    def interpolate(self, image, other, position, keeps_ends, guidance_scale, steps, seed, progress=TRACKER):
        """Generates an image between two: position 0 is the first one, 1 the second one."""
        with readable_errors():
            recipe = Recipe("", ANY_CATEGORY, guidance_scale, steps=steps, seed=seed, num_images=1)
            images = self.models.read_variation(image), self.models.read_variation(other)
        work = functools.partial(self.models.interpolate, recipe, images, position, keeps_ends)
        for status, result, is_done in self._run(work, progress):
            if not is_done:  # while images are inverted, there is nothing to show
                result = result[0] if result else gr.skip()
            yield result, status

    def look_inside(self, prompt, category, guidance_scale, classifier_scale, steps, seed, progress=TRACKER):
        """Generates one image, and shows its steps, the learned variance and the bits per dimension."""
        with readable_errors():
            recipe = Recipe(prompt, category, guidance_scale, classifier_scale, steps, seed=seed, num_images=1)
            self.models.check(recipe)
        for status, result, is_done in self._run(functools.partial(self.models.look_inside, recipe), progress):
            if is_done:
                sheet = contact_sheet(result.predictions, SHEET_COLUMNS, [f"t = {t}" for t in result.timesteps])
                yield result.image, status, strip(result), sheet, plot(result), describe_bound(result)
            else:
                yield result[0], status, gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def fill_in(self, request: gr.Request):
        """The values of the controls from a link; without a recipe in the link, they stay unchanged."""
        unchanged = [gr.skip()] * len(fields(Recipe))
        try:
            recipe = Recipe.from_query(dict(request.query_params))
            if recipe is None:
                return unchanged
            self.models.check(recipe)
        except ValueError as error:
            gr.Warning(f"The link does not contain a valid recipe. {error}")
            return unchanged
        if request.query_params.get("weights") not in (None, self.models.weights):
            gr.Warning(OTHER_WEIGHTS)
        return list(astuple(recipe))


def first_image(gallery: list[tuple[str, str | None]] | None) -> dict:
    """The first image of a gallery for an image editor, upsampled for painting."""
    if not gallery:
        raise gr.Error("There is no image yet. Generate one first.", print_exception=False)
    with Image.open(gallery[0][0]) as image:
        large = image.convert("RGBA").resize((EDITOR_SIDE, EDITOR_SIDE), Image.Resampling.NEAREST)
    return {"background": large, "layers": [], "composite": large}


def prompt_and_category(models: Models, prompt: str = "") -> tuple[gr.Textbox, gr.Dropdown]:
    return (
        gr.Textbox(prompt, label="Prompt", max_length=MAX_PROMPT_LENGTH, placeholder="fire, red heart, dog face ..."),
        gr.Dropdown(models.categories, value=ANY_CATEGORY, label="Category"),
    )


def slider(name: str, value: float | None = None, info: str | None = None) -> gr.Slider:
    """A slider for a number of a recipe; the default value is that of `Recipe`."""
    label, low, high, number_type = LIMITS[name]
    value = getattr(Recipe, name) if value is None else value
    step = 0.5 if number_type is float else 1
    return gr.Slider(low, high, value, step=step, label=label, info=info or INFO.get(name))


def model_choice(models: Models) -> gr.Radio:
    """The last argument of its functions, so that calls from before there was a choice stay valid."""
    names = [(f"{models.size(name)} x {models.size(name)}, {KINDS[name]}", name) for name in models.pipelines]
    choice = gr.Radio(names, value=models.default_model, label="Model", visible=len(names) > 1)
    return added_later(choice)


def seed_box() -> gr.Number:
    label, low, high, _ = LIMITS["seed"]
    seed = gr.Number(0, label=label, precision=0, minimum=low, maximum=high)
    gr.Button("New seed", size="sm").click(lambda: secrets.randbelow(high + 1), None, seed, **PRIVATE)
    return seed


# The labels of images are hidden, because they would cover the first one.
SHOWN_IMAGES: dict[str, Any] = {
    "show_label": False,
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
}


def gallery() -> gr.Gallery:
    return gr.Gallery(
        label="Images", columns=2, object_fit="contain", elem_classes=["pixels", "smooth"], **SHOWN_IMAGES
    )


def image_box(label: str, elem_classes: Sequence[str] = ("pixels",), height: int | None = None) -> gr.Image:
    return gr.Image(label=label, height=height, elem_classes=list(elem_classes), **SHOWN_IMAGES)


def image_editor(label: str, elem_id: str, brush: gr.Brush) -> gr.ImageEditor:
    editor = gr.ImageEditor(
        type="pil",
        label=label,
        show_label=False,
        sources=("upload", "clipboard"),
        brush=brush,
        layers=False,
        transforms=(),
        canvas_size=(EDITOR_SIDE, EDITOR_SIDE),
        fixed_canvas=True,  # else that of an upload of 64 x 64 is as small, and one stroke of the brush covers it
        format="png",
        elem_id=elem_id,
    )
    return limit_drawings(editor)


def status_line() -> gr.Textbox:
    return gr.Textbox("Ready.", label="Status", interactive=False, max_lines=1)


def generate_tab(space: Space) -> tuple[Sequence[gr.components.Component], gr.Gallery]:
    """Returns the controls of a recipe, in its order, and the gallery."""
    with gr.Row():
        with gr.Column(**CONTROLS):
            prompt, category = prompt_and_category(space.models, "apple")
            button = gr.Button("Generate", variant="primary")
            with gr.Column(elem_classes="settings"):
                examples = gr.Column()
                guidance, images, seed = slider("guidance_scale"), slider("num_images"), seed_box()
                with gr.Accordion("More", open=False):
                    model, steps = model_choice(space.models), slider("steps")
                    sampler = gr.Dropdown(list(SAMPLERS), value=Recipe().sampler, label="Sampler")
                    size, has_choice = space.models.size(), len(space.models.pipelines) > 1
                    gr.Markdown(f"Only with the model of {size} x {size} pixels:", visible=has_choice)
                    classifier = slider("classifier_scale")
                    can_upsample = space.models.upsampler is not None
                    upscale = gr.Checkbox(False, label="Upsample to 64 x 64", interactive=can_upsample)
        with gr.Column(**RESULTS):
            status, results = status_line(), gallery()
            download = gr.DownloadButton("Download images and recipe", size="sm")
            link = gr.Markdown()
            with gr.Accordion("Reproduce", open=False):
                recipe = gr.Textbox(label="Recipe (JSON)", lines=6, elem_id="recipe")
                again = gr.Button("Generate from this recipe")
    controls = [prompt, category, guidance, classifier, steps, sampler, seed, images, upscale, model]
    outputs = [results, status, recipe, link, download]
    options: dict[str, Any] = {"outputs": outputs, "show_progress_on": status, **ONE_AT_A_TIME}
    gr.on([button.click, prompt.submit], space.generate, controls, api_name="generate", **options)
    again.click(space.reproduce, recipe, api_name="reproduce", **options)
    default = space.models.default_model
    recipes = [replace(recipe, model=default) for recipe in EXAMPLES if recipe.category in space.models.categories]
    with examples:
        gr.Examples(
            [list(astuple(recipe)) for recipe in recipes],
            controls,
            outputs,
            space.example,
            cache_examples=True,
            cache_mode="eager",
            example_labels=[recipe.prompt or recipe.category for recipe in recipes],
            api_visibility="private",
        )
    return controls, results


def edit_tab(space: Space, generated: gr.Gallery) -> None:
    gr.Markdown(
        "Upload an image, choose the brush and paint over the part to change. The prompt describes the whole image, as "
        "it should become. RePaint repeats parts of the sampling, so there are more steps than the slider says."
    )
    with gr.Row():
        with gr.Column(**CONTROLS):
            drawing = image_editor("Image and mask", "edit-drawing", gr.Brush(24, ["#ff00ff"], color_mode="fixed"))
            first = gr.Button("Use the first image of the Generate tab", size="sm")
            prompt, category = prompt_and_category(space.models)
            button = gr.Button("Inpaint", variant="primary")
            with gr.Column(elem_classes="settings"):
                guidance, steps = slider("guidance_scale"), slider("steps")
                images, seed = slider("num_images", 2), seed_box()
                model = model_choice(space.models)
        with gr.Column(**RESULTS):
            status, results = status_line(), gallery()
    first.click(first_image, generated, drawing, **PRIVATE)
    inputs, outputs = [drawing, prompt, category, guidance, steps, seed, images, model], [results, status]
    button.click(space.edit, inputs, outputs, api_name="edit", show_progress_on=status, **ONE_AT_A_TIME)


def sketch_tab(space: Space) -> None:
    size = space.models.size(space.models.sketch_model)
    gr.Markdown(
        "Choose the brush and draw outlines, or upload an image to use its edges. Then describe what it shows. This "
        f"uses the model of {size} x {size} pixels with a ControlNet."
    )
    with gr.Row():
        with gr.Column(**CONTROLS):
            drawing = image_editor("Sketch", "sketch-drawing", gr.Brush(4, ["#000000"], color_mode="fixed"))
            prompt, category = prompt_and_category(space.models)
            button = gr.Button("Generate from sketch", variant="primary")
            with gr.Column(elem_classes="settings"):
                strength = gr.Slider(0, MAX_CONTROLNET_SCALE, 1, step=0.1, label="Strength of the sketch")
                guidance, steps = slider("guidance_scale"), slider("steps")
                images, seed = slider("num_images", 2), seed_box()
        with gr.Column(**RESULTS):
            status = status_line()
            gr.Markdown("Input of the ControlNet:")
            condition, results = image_box("Input of the ControlNet", height=280), gallery()
    inputs = [drawing, prompt, category, strength, guidance, steps, seed, images]
    outputs = [condition, results, status]
    button.click(space.sketch, inputs, outputs, api_name="sketch", show_progress_on=status, **ONE_AT_A_TIME)


def picture_box(label: str, elem_id: str) -> gr.Image:
    return gr.Image(
        type="pil",
        label=label,
        sources=["upload", "webcam", "clipboard"],
        format="png",
        height=EDITOR_SIDE,
        elem_id=elem_id,
        elem_classes=["pixels"],
    )


def variations_tab(space: Space) -> None:
    gr.Markdown(
        "Upload a picture, or take one. Its CLIP embedding says what it shows, but not where each pixel is, so the "
        "model generates other pictures of the same kind. With a second picture, move the slider between them. "
        f"The images have {space.models.variation_size} x {space.models.variation_size} pixels."
    )
    with gr.Row():
        with gr.Column(**CONTROLS):
            image = picture_box("Picture", "first-picture")
            button = gr.Button("Generate variations", variant="primary")
            other = picture_box("Second picture", "second-picture")
            position = gr.Slider(0, 1, 0.5, step=0.05, label="Position between the pictures")
            between = gr.Button("Interpolate")
            with gr.Column(elem_classes="settings"):
                keeps_ends = gr.Checkbox(
                    False,
                    label="Keep the pictures at the ends",
                    info="From the noise that leads to each picture (DDIM inversion); slower for new pictures.",
                )
                info = "How closely the images follow the picture; 1 is off."
                guidance, steps = slider("guidance_scale", VARIATION_GUIDANCE, info), slider("steps")
                images, seed = slider("num_images"), seed_box()
        with gr.Column(**RESULTS):
            status, results = status_line(), gallery()
            gr.Markdown("Between the pictures:")
            middle = image_box("Between the pictures", height=280)
    inputs, outputs = [image, guidance, steps, seed, images], [results, status]
    options: dict[str, Any] = {"show_progress_on": status, **ONE_AT_A_TIME}
    button.click(space.variations, inputs, outputs, api_name="variations", **options)
    inputs, outputs = [image, other, position, keeps_ends, guidance, steps, seed], [middle, status]
    between.click(space.interpolate, inputs, outputs, api_name="interpolate", **options)
    # While the slider moves on, only its last position counts.
    position.release(
        space.interpolate, inputs, outputs, api_visibility="private", trigger_mode="always_last", **options
    )


def look_inside_tab(space: Space) -> None:
    size = space.models.size()
    gr.Markdown(
        f"How one image emerges from noise. This uses the model of {size} x {size} pixels, for which bits "
        "per dimension are defined."
    )
    with gr.Row():
        with gr.Column(**CONTROLS):
            prompt, category = prompt_and_category(space.models, "fire")
            button = gr.Button("Look inside", variant="primary")
            with gr.Column(elem_classes="settings"):
                settings = [slider("guidance_scale"), slider("classifier_scale"), slider("steps", 50), seed_box()]
        with gr.Column(**RESULTS):
            status, image = status_line(), image_box("Image", height=280)
    gr.Markdown("### From noise to image: x_t above the predicted x_0")
    film = image_box("From noise to image", ("pixels", "strip"))
    gr.Markdown("### Predicted x_0 of each step")
    predictions = image_box("Predicted x_0 of each step", ("pixels", "strip"))
    gr.Markdown("### Learned variance and bits per dimension")
    bound = gr.Markdown()
    curves = gr.Plot(label="By timestep", show_label=False, format="png", elem_classes="curves")
    inputs, outputs = [prompt, category, *settings], [image, status, film, predictions, curves, bound]
    button.click(space.look_inside, inputs, outputs, api_name="look_inside", show_progress_on=status, **ONE_AT_A_TIME)


def build(models: Models) -> Page:
    """Builds the page."""
    # Examples are generated at the start of the app, and cached by weights, recipes and version.
    key = hashlib.sha256(f"{models.weights} {EXAMPLES} {__version__}".encode()).hexdigest()[:12]
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(Path(HF_HOME) / "diffusers-adm-space" / key)
    space = Space(models)
    # Statistics of calls, which nobody reads, would grow and cost time.
    os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "100", "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000"}
    with Page(title="diffusers-adm") as page:
        gr.Markdown(INTRODUCTION + (ROUNDING if models.is_fast else ""))
        with gr.Tab("Generate"):
            controls, generated = generate_tab(space)
        with gr.Tab("Edit"):
            edit_tab(space, generated)
        if models.has_sketches:
            with gr.Tab("Sketch"):
                sketch_tab(space)
        if models.has_variations:
            with gr.Tab("Variations"):
                variations_tab(space)
        with gr.Tab("Look inside"):
            look_inside_tab(space)
        # Without a link nothing changes, so the controls need no sign of progress above them.
        page.load(space.fill_in, None, controls, api_visibility="private", show_progress="hidden")
    return page.queue(max_size=MAX_WAITING, api_open=False)  # no calls that skip the queue


def read_switch(name: str) -> bool:
    """Whether an environment variable is 1. Raises a ValueError if it is neither 1, 0 nor empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} is {value!r}. It must be 1 (on) or 0 (off).")
    return value == "1"


def leave(models: Models, folder: str, signal_number: int, frame: Any) -> None:
    """Ends the process at once, without the files of visitors."""
    models.close()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + signal_number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    default = os.environ.get("ADM_SPACE_MODELS", MODELS)
    parser.add_argument("--models", type=Path, default=default, help="Folder of the models. Default: %(default)s.")
    parser.add_argument("--port", type=int, help="Port. Default: GRADIO_SERVER_PORT, or the first free one from 7860.")
    parser.add_argument(
        "--keep_seconds",
        type=float,
        default=KEEP_SECONDS,
        help="Uploads and results are deleted at most this long after their request. Default: %(default)s.",
    )
    parser.add_argument(
        "--calls_per_minute",
        type=float,
        default=CALLS_PER_MINUTE,
        help="Calls that one client may make on average. Default: %(default)s.",
    )
    parser.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        default=read_switch("ADM_SPACE_FAST"),
        help="Compile the U-Nets in the background, which needs a C++ compiler; see docs/fast_sampling.md. The images "
        "of a link may then differ by rounding. Default: ADM_SPACE_FAST (1 or 0), or else off.",
    )
    add_debug_argument(parser)
    args = parser.parse_args()
    for name in ("keep_seconds", "calls_per_minute"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name} is {getattr(args, name)}. It must be a number above 0.")
    # Seconds that a thread may keep the interpreter. The sampling thread requests it after every operation and must not
    # wait long for the threads that serve the page.
    sys.setswitchinterval(0.001)
    os.environ.setdefault("FORWARDED_ALLOW_IPS", PROXIES)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        models = Models(args.models, fast=args.fast)
    except RuntimeError as error:
        if not args.fast:
            raise
        raise CommandError(f"--fast: {error}") from error  # such as: there is no compiler
    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="diffusers-adm-space-", dir=parent, ignore_cleanup_errors=True) as folder:
        # By default, Gradio shares one folder among all apps, and leaves parts of uploads in that of the system.
        os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = folder
        signal.signal(signal.SIGTERM, functools.partial(leave, models, folder))
        serve(
            build(models),
            keep_seconds=args.keep_seconds,
            calls_per_minute=args.calls_per_minute,
            server_port=args.port,
            css=CSS,
            theme=gr.themes.Soft(),
        )


if __name__ == "__main__":
    run_command(main)
