"""
The Space of diffusers-adm: draw, repaint and follow sketches with small models in pixels, and look inside them.

`python spaces/app.py` from a clone; ADM_SPACE_MODELS or `--models` names the folder of the models (see README.md).
"""

import argparse
import contextlib
import hashlib
import io
import os
import secrets
import sys
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
from gradio.utils import get_upload_folder
from huggingface_hub.constants import HF_HOME
from PIL import Image, ImageDraw, ImageFont
from space_models import (
    ANY_CATEGORY,
    MAX_CLASSIFIER_SCALE,
    MAX_CONTROLNET_SCALE,
    MAX_GUIDANCE_SCALE,
    MAX_IMAGE_SIDE,
    MAX_IMAGES,
    MAX_PROMPT_LENGTH,
    MAX_SEED,
    MAX_STEPS,
    SAMPLERS,
    Finished,
    Inside,
    Models,
    OnStep,
    Recipe,
    stream,
)

from diffusers_adm import __version__
from diffusers_adm.commands.errors import add_debug_argument, run_command


MODELS = Path(__file__).parent / "model"
MAX_QUEUE = 20  # visitors who wait; more are told to come back
CACHE_SECONDS = 3600
STRIP_PICTURES = 10
SHEET_COLUMNS = 10
STRIP_SIDE, CAPTION_HEIGHT, CAPTION_SIZE = 128, 26, 20  # pixels
# The models draw few pixels, which shall be seen as they are.
CSS = """
.pixels img { image-rendering: pixelated; object-fit: contain; }
.pixels img { width: 100%; height: 100%; }
/* All pictures in sight, with no bar to scroll them, and no empty space below. */
.pixels .grid-wrap { max-height: none; min-height: 0; }
@media (max-width: 768px) {
  /* One below the other: the button, what it makes, and then the finer settings. */
  .controls { display: contents; }
  .controls > *, .results { flex: 1 1 100%; }
  .results { order: 1; }
  .settings { order: 2; }
}
/* Strips of many pictures: below their buttons, and to be scrolled rather than tiny. */
.strip .image-container { padding-top: 36px; overflow-x: auto; }
.strip img { min-width: 640px; }
.curves img { max-width: min(100%, 640px); }
/* All tabs in sight on a phone. */
@media (max-width: 480px) { .tab-container button { padding: 0 7px; font-size: 0.9em; } }
footer { display: none !important; }
"""
# One drawing after the other: the cores are few.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
DRAWING_SIDE = 256  # pixels
EXAMPLES = (
    Recipe("fire", num_images=2),
    Recipe("red heart", "Smileys & Emotion", seed=1, num_images=2),
    Recipe("grinning face", "Smileys & Emotion", sampler="DDPM", seed=2, num_images=2),
    Recipe("", "Flags", seed=3, num_images=2),
)
OTHER_WEIGHTS = "The recipe was made with other weights than this Space has, so the pictures will differ."
# Pillow refuses twice as many before it decodes them, and uploads are decoded before anything here sees them.
Image.MAX_IMAGE_PIXELS = MAX_IMAGE_SIDE**2 // 2
INTRODUCTION = """
# Small pictures from noise
Models of diffusers-adm that draw emoji, pixel by pixel, and were trained for
this page. They know things that have an emoji, and little else.
"""


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """What a visitor did wrong is told on the page; anything else is an error of ours, and goes to the log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def pack(pictures: list[Image.Image], recipe: str) -> str:
    """A ZIP file with the pictures as they are and their recipe; the file is deleted by Gradio."""
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    path = folder / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, picture in enumerate(pictures):
            data = io.BytesIO()
            picture.save(data, "PNG")
            archive.writestr(f"{number:02d}.png", data.getvalue())
        archive.writestr("recipe.json", recipe)
    return str(path)


def drawn_on(editor: dict | None) -> tuple[Image.Image | None, list[Image.Image]]:
    """The picture and the layers of an image editor, some of which may be missing."""
    editor = editor or {}
    background = editor.get("background")
    if background is not None and background.convert("RGBA").getchannel("A").getextrema() == (0, 0):
        background = None  # an empty board
    return background, [layer for layer in editor.get("layers") or [] if layer is not None]


def strip(inside: Inside) -> Image.Image:
    """x_t above the predicted x_0, from noise to picture."""
    last = len(inside.timesteps) - 1
    count = min(STRIP_PICTURES, last + 1)
    chosen = [round(i * last / max(count - 1, 1)) for i in range(count)]
    canvas = Image.new("RGB", (count * STRIP_SIDE, 2 * STRIP_SIDE), "white")
    for column, i in enumerate(chosen):
        for row, pictures in enumerate((inside.samples, inside.predictions)):
            enlarged = pictures[i].resize((STRIP_SIDE, STRIP_SIDE), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (column * STRIP_SIDE, row * STRIP_SIDE))
    return canvas


def sheet(inside: Inside) -> Image.Image:
    """The predicted x_0 of every step, each with its timestep."""
    rows = -(-len(inside.timesteps) // SHEET_COLUMNS)
    height = STRIP_SIDE + CAPTION_HEIGHT
    canvas = Image.new("RGB", (SHEET_COLUMNS * STRIP_SIDE, rows * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(CAPTION_SIZE)
    for i, (picture, timestep) in enumerate(zip(inside.predictions, inside.timesteps, strict=True)):
        x, y = i % SHEET_COLUMNS * STRIP_SIDE, i // SHEET_COLUMNS * height
        canvas.paste(picture.resize((STRIP_SIDE, STRIP_SIDE), Image.Resampling.NEAREST), (x, y))
        draw.text((x + 4, y + STRIP_SIDE), f"t = {timestep}", fill="black", font=font)
    return canvas


def plot(inside: Inside) -> Any:
    """The learned variance between its bounds, and the terms of the variational bound, by timestep."""
    from matplotlib.figure import Figure  # slow to import, and not pyplot, which keeps figures

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


class Space:
    """The functions behind the page, around models that are loaded once."""

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
        progress=gr.Progress(),  # noqa: B008  (Gradio finds it by its default)
    ):
        """Draws pictures of a prompt, a category or both. The last value is what made them, as JSON and as a link."""
        with readable_errors():
            recipe = Recipe(
                prompt, category, guidance_scale, classifier_scale, steps, sampler, seed, num_images, upscale
            )
            self.models.check(recipe)
        yield from self._generate(recipe, progress)

    def reproduce(self, recipe, progress=gr.Progress()):  # noqa: B008
        """Draws the pictures of a recipe (JSON) again, exactly."""
        with readable_errors():
            recipe, weights = Recipe.from_json(recipe)
            self.models.check(recipe)
        if weights not in (None, self.models.weights):
            gr.Warning(OTHER_WEIGHTS)
        yield from self._generate(recipe, progress)

    def example(self, *values):
        """The pictures of an example, which is drawn when nobody else wants to draw: its steps wait for visitors."""
        recipe = Recipe(*values)
        return self._outputs(recipe, self.models.generate(recipe, lambda step: self.nobody_waits.wait()))

    def _generate(self, recipe: Recipe, progress: gr.Progress) -> Iterator[tuple]:
        text = recipe.to_json(self.models.weights)
        for status, pictures, is_done in self._run(lambda on_step: self.models.generate(recipe, on_step), progress):
            yield self._outputs(recipe, pictures) if is_done else (pictures, status, text, "", None)

    def _outputs(self, recipe: Recipe, pictures: list[Image.Image]) -> tuple:
        text = recipe.to_json(self.models.weights)
        return (
            pictures,
            "Done.",
            text,
            f"[Link to these pictures](?{urlencode(recipe.query() | {'weights': self.models.weights})})",
            pack(pictures, text),
        )

    def _run(self, draw: Callable[[OnStep], Any], progress: gr.Progress) -> Iterator[tuple[str, Any, bool]]:
        """Status, preview or result, and whether it is the result. Never twice at once: see `ONE_AT_A_TIME`."""
        self.nobody_waits.clear()
        try:
            with readable_errors():
                for event in stream(draw):
                    if isinstance(event, Finished):
                        yield "Done.", event.result, True
                        return
                    progress((event.done, event.total), desc=event.task, unit="steps")
                    yield f"{event.task}: step {event.done} of {event.total}", event.previews, False
        finally:
            self.nobody_waits.set()

    def edit(
        self,
        drawing,
        prompt,
        category,
        guidance_scale,
        steps,
        seed,
        num_images,
        progress=gr.Progress(),  # noqa: B008
    ):
        """Draws the painted part of a picture anew (RePaint)."""
        with readable_errors():
            recipe = Recipe(prompt, category, guidance_scale, steps=steps, seed=seed, num_images=num_images)
            self.models.check(recipe)
            picture, layers = drawn_on(drawing)
            picture = self.models.read_picture(picture)
            mask = self.models.read_mask(layers)

        def draw(on_step: OnStep) -> list[Image.Image]:
            return self.models.inpaint(recipe, picture, mask, on_step)

        for status, pictures, _ in self._run(draw, progress):
            yield pictures, status

    def sketch(
        self,
        drawing,
        prompt,
        category,
        strength,
        guidance_scale,
        steps,
        seed,
        num_images,
        progress=gr.Progress(),  # noqa: B008
    ):
        """Draws pictures that follow strokes or, where there are none, the edges of an uploaded picture."""
        with readable_errors():
            recipe = Recipe(prompt, category, guidance_scale, steps=steps, seed=seed, num_images=num_images)
            self.models.check(recipe)
            condition = self._condition(drawing)
        shown = condition.resize((DRAWING_SIDE, DRAWING_SIDE), Image.Resampling.NEAREST)

        def draw(on_step: OnStep) -> list[Image.Image]:
            return self.models.sketch(recipe, condition, strength, on_step)

        for status, pictures, _ in self._run(draw, progress):
            yield shown, pictures, status

    def _condition(self, drawing: dict | None) -> Image.Image:
        picture, layers = drawn_on(drawing)
        is_drawn = any(layer.convert("RGBA").getchannel("A").getextrema() != (0, 0) for layer in layers)
        if picture is not None and not is_drawn:
            return self.models.find_edges(picture)
        return self.models.read_strokes(layers)

    def look_inside(
        self,
        prompt,
        category,
        guidance_scale,
        classifier_scale,
        steps,
        seed,
        progress=gr.Progress(),  # noqa: B008
    ):
        """Draws one picture, and shows each prediction, the learned variance and the bits per dimension."""
        with readable_errors():
            recipe = Recipe(prompt, category, guidance_scale, classifier_scale, steps, seed=seed, num_images=1)
            self.models.check(recipe)
        for status, result, is_done in self._run(lambda on_step: self.models.look_inside(recipe, on_step), progress):
            if is_done:
                yield result.picture, status, strip(result), sheet(result), plot(result), describe_bound(result)
            else:
                yield result[0], status, gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def fill_in(self, request: gr.Request):
        """The controls as a link says; as they are where it says nothing."""
        unchanged = [gr.skip()] * len(fields(Recipe))
        try:
            recipe = Recipe.from_query(dict(request.query_params))
            if recipe is None:
                return unchanged
            self.models.check(recipe)
            if request.query_params.get("weights") not in (None, self.models.weights):
                gr.Warning(OTHER_WEIGHTS)
        except ValueError as error:
            gr.Warning(f"The link does not hold a recipe. {error}")
            return unchanged
        return recipe_values(recipe)


def recipe_values(recipe: Recipe) -> list:
    """As the controls of the page hold them."""
    return [getattr(recipe, field.name) for field in fields(recipe)]


def describe_bound(inside: Inside) -> str:
    decoder, others = inside.terms[-1], sum(inside.terms[:-1])
    return (
        f"At most **{inside.bits_per_dim:.3f} bits per dimension** for this picture and a chain of {len(inside.terms)} "
        f"steps: {others:.3f} for the steps, {decoder:.3f} for the decoder of the last one, {inside.prior:.2g} for the "
        "prior. (One draw of the noise; without guidance.)"
    )


def take_first(pictures: list[tuple[str, str | None]] | None) -> dict:
    """For an image editor, large enough to be painted on."""
    if not pictures:
        raise gr.Error("There is no picture yet. Generate one first.", print_exception=False)
    with Image.open(pictures[0][0]) as picture:
        enlarged = picture.convert("RGBA").resize((DRAWING_SIDE, DRAWING_SIDE), Image.Resampling.NEAREST)
    return {"background": enlarged, "layers": [], "composite": enlarged}


def new_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


def prompt_and_category(models: Models, prompt: str = "") -> tuple[gr.Textbox, gr.Dropdown]:
    return (
        gr.Textbox(prompt, label="Prompt", max_length=MAX_PROMPT_LENGTH, placeholder="fire, red heart, dog face ..."),
        gr.Dropdown(models.categories, value=ANY_CATEGORY, label="Category"),
    )


def seed_box() -> gr.Number:
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
    gr.Button("New seed", size="sm").click(new_seed, None, seed, api_visibility="private", queue=False)
    return seed


def guidance_slider() -> gr.Slider:
    return gr.Slider(1, MAX_GUIDANCE_SCALE, 4, step=0.5, label="Guidance", info="How closely the prompt is followed.")


def classifier_slider() -> gr.Slider:
    return gr.Slider(
        0, MAX_CLASSIFIER_SCALE, 0, step=0.5, label="Classifier guidance", info="Towards the category; 0 is off."
    )


def steps_slider(value: int = 25) -> gr.Slider:
    return gr.Slider(2, MAX_STEPS, value, step=1, label="Steps")


def images_slider(value: int) -> gr.Slider:
    return gr.Slider(1, MAX_IMAGES, value, step=1, label="Pictures")


def gallery(label: str = "Pictures") -> gr.Gallery:
    # No label is shown: it would lie on the first picture.
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=2,
        format="png",
        object_fit="contain",
        elem_classes="pixels",
        interactive=False,
        buttons=["download", "fullscreen"],
    )


def picture_box(label: str, elem_classes: str = "pixels", height: int | None = None) -> gr.Image:
    return gr.Image(
        label=label,
        show_label=False,
        format="png",
        height=height,
        elem_classes=elem_classes.split(),
        interactive=False,
        buttons=["download", "fullscreen"],
    )


def drawing_board(label: str, elem_id: str, brush: gr.Brush) -> gr.ImageEditor:
    return gr.ImageEditor(
        type="pil",
        label=label,
        show_label=False,
        sources=("upload", "clipboard"),
        brush=brush,
        layers=False,
        transforms=(),
        canvas_size=(DRAWING_SIDE, DRAWING_SIDE),
        format="png",
        elem_id=elem_id,
    )


def status_line() -> gr.Textbox:
    return gr.Textbox("Ready.", label="Status", interactive=False, max_lines=1)


def generate_tab(space: Space) -> tuple[Sequence[gr.components.Component], gr.Gallery]:
    """The controls that make up a recipe, and the pictures."""
    with gr.Row():
        with gr.Column(min_width=280, elem_classes="controls"):
            prompt, category = prompt_and_category(space.models, "fire")
            button = gr.Button("Generate", variant="primary")
            with gr.Column(elem_classes="settings"):
                examples = gr.Column()
                guidance = guidance_slider()
                images = images_slider(4)
                seed = seed_box()
                with gr.Accordion("More", open=False):
                    classifier = classifier_slider()
                    steps = steps_slider()
                    sampler = gr.Dropdown(list(SAMPLERS), value=Recipe().sampler, label="Sampler")
                    can_enlarge = space.models.upsampler is not None
                    upscale = gr.Checkbox(False, label="Enlarge to 64 x 64", interactive=can_enlarge)
        with gr.Column(min_width=280, elem_classes="results"):
            status = status_line()
            pictures = gallery()
            download = gr.DownloadButton("Download all, with their recipe", size="sm")
            link = gr.Markdown()
            with gr.Accordion("Reproduce", open=False):
                recipe = gr.Textbox(label="Recipe (JSON)", lines=6, elem_id="recipe")
                again = gr.Button("Draw this recipe")
    controls = [prompt, category, guidance, classifier, steps, sampler, seed, images, upscale]
    outputs = [pictures, status, recipe, link, download]
    options: dict[str, Any] = {"outputs": outputs, "show_progress_on": status, **ONE_AT_A_TIME}
    gr.on([button.click, prompt.submit], space.generate, controls, api_name="generate", **options)
    again.click(space.reproduce, recipe, api_name="reproduce", **options)
    recipes = [recipe for recipe in EXAMPLES if recipe.category in space.models.categories]
    with examples:
        gr.Examples(
            [recipe_values(recipe) for recipe in recipes],
            controls,
            outputs,
            space.example,
            cache_examples=True,
            cache_mode="eager",
            example_labels=[recipe.prompt or recipe.category for recipe in recipes],
            api_visibility="private",
        )
    return controls, pictures


def edit_tab(space: Space, generated: gr.Gallery) -> None:
    gr.Markdown("Upload a picture, paint over what shall change, and say what shall be there.")
    with gr.Row():
        with gr.Column(min_width=280, elem_classes="controls"):
            drawing = drawing_board("Picture and mask", "edit-drawing", gr.Brush(24, ["#ff00ff"], color_mode="fixed"))
            gr.Button("Take the first picture of Generate", size="sm").click(
                take_first, generated, drawing, api_visibility="private", queue=False
            )
            prompt, category = prompt_and_category(space.models)
            button = gr.Button("Repaint", variant="primary")
            with gr.Column(elem_classes="settings"):
                guidance, steps, images = guidance_slider(), steps_slider(), images_slider(2)
                seed = seed_box()
        with gr.Column(min_width=280, elem_classes="results"):
            status = status_line()
            pictures = gallery()
    button.click(
        space.edit,
        [drawing, prompt, category, guidance, steps, seed, images],
        [pictures, status],
        api_name="edit",
        show_progress_on=status,
        **ONE_AT_A_TIME,
    )


def sketch_tab(space: Space) -> None:
    gr.Markdown("Draw outlines, or upload a picture to take the edges of; then say what it is.")
    with gr.Row():
        with gr.Column(min_width=280, elem_classes="controls"):
            drawing = drawing_board("Sketch", "sketch-drawing", gr.Brush(4, ["#000000"], color_mode="fixed"))
            prompt, category = prompt_and_category(space.models)
            button = gr.Button("Draw it", variant="primary")
            with gr.Column(elem_classes="settings"):
                strength = gr.Slider(0, MAX_CONTROLNET_SCALE, 1, step=0.1, label="Strength of the sketch")
                guidance, steps, images = guidance_slider(), steps_slider(), images_slider(2)
                seed = seed_box()
        with gr.Column(min_width=280, elem_classes="results"):
            status = status_line()
            gr.Markdown("What the ControlNet sees:")
            condition = picture_box("What the ControlNet sees", height=280)
            pictures = gallery()
    button.click(
        space.sketch,
        [drawing, prompt, category, strength, guidance, steps, seed, images],
        [condition, pictures, status],
        api_name="sketch",
        show_progress_on=status,
        **ONE_AT_A_TIME,
    )


def look_inside_tab(space: Space) -> None:
    with gr.Row():
        with gr.Column(min_width=280, elem_classes="controls"):
            prompt, category = prompt_and_category(space.models, "fire")
            button = gr.Button("Look inside", variant="primary")
            with gr.Column(elem_classes="settings"):
                guidance, classifier, steps = guidance_slider(), classifier_slider(), steps_slider(50)
                seed = seed_box()
        with gr.Column(min_width=280, elem_classes="results"):
            status = status_line()
            picture = picture_box("Picture", height=280)
    gr.Markdown("### From noise to picture: x_t above the predicted x_0")
    film = picture_box("From noise to picture", "pixels strip")
    gr.Markdown("### Predicted x_0 by step")
    predictions = picture_box("Predicted x_0 by step", "pixels strip")
    gr.Markdown("### Learned variance and bits per dimension")
    bound = gr.Markdown()
    curves = gr.Plot(label="By timestep", show_label=False, format="png", elem_classes="curves")
    button.click(
        space.look_inside,
        [prompt, category, guidance, classifier, steps, seed],
        [picture, status, film, predictions, curves, bound],
        api_name="look_inside",
        show_progress_on=status,
        **ONE_AT_A_TIME,
    )


def build(models: Models) -> gr.Blocks:
    """The page."""
    # Examples are drawn at the start, unless those of the same weights, recipes and version lie here.
    key = hashlib.sha256(f"{models.weights} {EXAMPLES} {__version__}".encode()).hexdigest()[:12]
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(Path(HF_HOME) / "diffusers-adm-space" / key)
    space = Space(models)
    with gr.Blocks(title="diffusers-adm", delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Generate"):
            controls, generated = generate_tab(space)
        with gr.Tab("Edit"):
            edit_tab(space, generated)
        if models.controlnet is not None:
            with gr.Tab("Sketch"):
                sketch_tab(space)
        with gr.Tab("Look inside"):
            look_inside_tab(space)
        page.load(space.fill_in, None, controls, api_visibility="private")
    return page.queue(max_size=MAX_QUEUE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    default = Path(os.environ.get("ADM_SPACE_MODELS", MODELS))
    parser.add_argument("--models", type=Path, default=default, help="The folder of the models.")
    parser.add_argument("--port", type=int, help="By default GRADIO_SERVER_PORT, or the first free one from 7860.")
    add_debug_argument(parser)
    args = parser.parse_args()
    # Seconds that a thread may keep the interpreter: the one that draws asks for it after every operation, and would
    # wait five times as long for those that serve the page.
    sys.setswitchinterval(0.001)
    page = build(Models(args.models))
    page.launch(server_port=args.port, max_file_size="5mb", css=CSS, theme=gr.themes.Soft(), ssr_mode=False)


if __name__ == "__main__":
    run_command(main)
