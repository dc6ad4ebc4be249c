"""
What the Space does with its models, without a line of Gradio: recipes, drawing step by step, drawings as conditions,
and the look inside.

A recipe holds everything that a picture depends on besides the weights, so that a link or a few lines of JSON make it
again. Everything that comes from a browser is checked here, whatever the sliders of the page allow.
"""

import functools
import hashlib
import json
import math
import queue
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from PIL import Image

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning.control_images import make_condition
from diffusers_adm.conditioning.guidance import signal_and_std


MAX_PROMPT_LENGTH = 200  # characters
MAX_STEPS = 100
MAX_IMAGES = 8
MAX_GUIDANCE_SCALE = 10.0
MAX_CLASSIFIER_SCALE = 10.0
MAX_CONTROLNET_SCALE = 2.0
MAX_SEED = 2**32 - 1
MAX_IMAGE_SIDE = 4096  # pixels, of what is uploaded
MAX_RECIPE_LENGTH = 2000  # characters
ANY_CATEGORY = "any"
SAMPLERS = ("DDPM", "DDIM", "DPM-Solver++", "UniPC")
UPSCALE_STEPS = 10  # of DPM-Solver++
# Share of a pixel that a stroke must cover. Edges of the training set are a pixel wide.
STROKE_COVERAGE = 0.25
BOUND_BATCH = 25  # timesteps whose terms of the bound are computed at once
SECONDS_BETWEEN_PREVIEWS = 1.0  # each is sent to the browser as files, at the cost of the drawing

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    r"""
    What a picture depends on besides the weights.

    Args:
        prompt (`str`): At most `MAX_PROMPT_LENGTH` characters; empty: none.
        category (`str`): Name of a class of the model, or "any".
        guidance_scale (`float`): Classifier-free guidance, from 1 (off) to `MAX_GUIDANCE_SCALE`.
        classifier_scale (`float`): Classifier guidance, from 0 (off) to `MAX_CLASSIFIER_SCALE`; needs a category.
        steps (`int`): From 2 to `MAX_STEPS`.
        sampler (`str`): One of `SAMPLERS`.
        seed (`int`): Of the first picture; those that follow take the next ones.
        num_images (`int`): From 1 to `MAX_IMAGES`.
        upscale (`bool`): Whether the pictures are enlarged by the upsampler.

    Raises:
        ValueError: For a value of another type or out of range.
    """

    prompt: str = ""
    category: str = ANY_CATEGORY
    guidance_scale: float = 4.0
    classifier_scale: float = 0.0
    steps: int = 25
    sampler: str = "DPM-Solver++"
    seed: int = 0
    num_images: int = 4
    upscale: bool = False

    def __post_init__(self):
        object.__setattr__(self, "prompt", check_prompt(self.prompt))
        object.__setattr__(self, "guidance_scale", check_number("Guidance", self.guidance_scale, 1, MAX_GUIDANCE_SCALE))
        classifier_scale = check_number("Classifier guidance", self.classifier_scale, 0, MAX_CLASSIFIER_SCALE)
        object.__setattr__(self, "classifier_scale", classifier_scale)
        for name, title, low, high in (
            ("steps", "Steps", 2, MAX_STEPS),
            ("seed", "Seed", 0, MAX_SEED),
            ("num_images", "Pictures", 1, MAX_IMAGES),
        ):
            object.__setattr__(self, name, check_integer(title, getattr(self, name), low, high))
        if self.sampler not in SAMPLERS:
            raise ValueError(f"There is no sampler {short(self.sampler)}. Choose one of: {', '.join(SAMPLERS)}.")
        if not isinstance(self.category, str):
            raise ValueError(f"The category is {short(self.category)}. Choose one by its name, or {ANY_CATEGORY!r}.")
        if not isinstance(self.upscale, bool):
            raise ValueError(f"Enlarging is {short(self.upscale)}. It is either true or false.")
        if self.classifier_scale > 0 and self.category == ANY_CATEGORY:
            raise ValueError("Classifier guidance steers towards a category. Choose one, or set the scale to 0.")

    def to_json(self, weights: str) -> str:
        """With `weights`, the fingerprint of the models, because others make other pictures."""
        return json.dumps({**asdict(self), "weights": weights}, indent=1, ensure_ascii=False)

    def query(self) -> dict[str, str]:
        """As the query of a link: the prompt, which tells that there is a recipe, and what is not as by default."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in entries.items()
            if name == "prompt" or value != getattr(Recipe, name)
        }

    @classmethod
    def from_json(cls, text: str) -> tuple["Recipe", str | None]:
        """The recipe, and the fingerprint of the weights it was made with, if it says so."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError("There is no recipe. Paste the JSON that came with a picture.")
        if len(text) > MAX_RECIPE_LENGTH:
            raise ValueError(f"The recipe has {len(text)} characters; at most {MAX_RECIPE_LENGTH} are allowed.")
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("The recipe is not valid JSON. Paste it as it came with a picture.") from error
        if not isinstance(entries, dict):
            raise ValueError("The recipe is not a JSON object. Paste it as it came with a picture.")
        weights = entries.pop("weights", None)
        cls._check_names(entries)
        return cls(**entries), weights

    @classmethod
    def from_query(cls, query: dict[str, str]) -> "Recipe | None":
        """From the query of a link, if it holds any entry of a recipe; other entries belong to somebody else."""
        known = {field.name: field for field in fields(cls)}
        entries: dict[str, Any] = {}
        for name, value in query.items():
            if name not in known:
                continue
            try:
                entries[name] = value if known[name].type is str else json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"The link says that {name} is {short(value)}, which cannot be read.") from error
        return cls(**entries) if entries else None

    @classmethod
    def _check_names(cls, entries: dict[str, Any]) -> None:
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(entries) - set(names))
        if unknown:
            raise ValueError(f"The recipe has an entry {short(unknown[0])}. It may have: {', '.join(names)}.")


@dataclass(frozen=True)
class Step:
    """A step is done: `done` of `total`, and the predicted x_0 as pictures."""

    done: int
    total: int
    task: str
    previews: list[Image.Image]


@dataclass(frozen=True)
class Finished(Generic[T]):
    result: T


@dataclass(frozen=True)
class Inside:
    r"""
    What happened inside while one picture was drawn. Lists by step, from noise to picture.

    `log_variances` are natural logs, the 10th, 50th and 90th percentile over the picture; `bounds` those of the least
    and the greatest variance that the network could choose. `terms` of the variational bound and `prior` are in bits
    per dimension; their sum, `bits_per_dim`, is the bound of the chain that was stepped through.
    """

    picture: Image.Image
    timesteps: list[int]
    samples: list[Image.Image]
    predictions: list[Image.Image]
    log_variances: list[tuple[float, float, float]]
    bounds: list[tuple[float, float]]
    terms: list[float]
    prior: float
    bits_per_dim: float


OnStep = Callable[[Step], None]


class Models:
    r"""
    The networks of the Space, loaded once. Pipelines are made anew for each call, around the same networks: they and
    their schedulers hold state, networks do not.

    Args:
        folder (`Path`): With the pipeline `base/` and, where they are to be had, the pipeline `upsampler/` and the
            ControlNet `controlnet/`.
        device (`str`, *optional*): `None`: the GPU, where there is one.

    Raises:
        FileNotFoundError: Without `base/model_index.json`.
    """

    def __init__(self, folder: Path, device: str | None = None):
        folder = Path(folder)
        if not (folder / "base" / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no pipeline in `base/`. Set ADM_SPACE_MODELS to a folder that does; spaces/README.md "
                "says what is in it."
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.base = ADMPipeline.from_pretrained(folder / "base", **_load_options(folder / "base")).to(device)
        self.upsampler = self.controlnet = None
        if (folder / "upsampler").is_dir():
            options = _load_options(folder / "upsampler")
            self.upsampler = ADMSuperResolutionPipeline.from_pretrained(folder / "upsampler", **options).to(device)
        if (folder / "controlnet").is_dir():
            options = _load_options(folder / "controlnet")
            self.controlnet = AdaGNControlNetModel.from_pretrained(folder / "controlnet", **options).to(device)
        self.weights = fingerprint(folder)

    @property
    def size(self) -> int:
        """Side of the pictures of the base model, in pixels."""
        return self.base.unet.config.sample_size

    @property
    def categories(self) -> list[str]:
        return [ANY_CATEGORY, *(self.base.id2label or {}).values()]

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError for what these models, as opposed to others, cannot do."""
        if recipe.category not in self.categories:
            names = ", ".join(self.categories)
            raise ValueError(f"There is no category {short(recipe.category)}. Choose one of: {names}.")
        if recipe.upscale and self.upsampler is None:
            raise ValueError("This Space has no upsampler, so pictures cannot be enlarged.")
        if recipe.classifier_scale > 0 and self.base.classifier is None:
            raise ValueError("This Space has no classifier. Set classifier guidance to 0.")

    def generate(self, recipe: Recipe, on_step: OnStep) -> list[Image.Image]:
        """Pictures of the base model, enlarged if the recipe says so."""
        self.check(recipe)
        pipe = self._pipeline(ADMPipeline, recipe.sampler)
        images = self._draw(pipe, recipe, on_step, classifier_guidance_scale=recipe.classifier_scale)
        return self._upscale(images, recipe, on_step) if recipe.upscale else images

    def inpaint(self, recipe: Recipe, picture: Image.Image, mask: Image.Image, on_step: OnStep) -> list[Image.Image]:
        """Repaints the white part of the mask by RePaint, which asks for ancestral steps."""
        self.check(recipe)
        pipe = self._pipeline(ADMInpaintPipeline, "DDPM")
        return self._draw(pipe, recipe, on_step, image=picture, mask_image=mask)

    def sketch(self, recipe: Recipe, condition: Image.Image, scale: float, on_step: OnStep) -> list[Image.Image]:
        """Pictures that follow white lines on black."""
        self.check(recipe)
        scale = check_number("Strength of the sketch", scale, 0, MAX_CONTROLNET_SCALE)
        if self.controlnet is None:
            raise ValueError("This Space has no ControlNet, so it cannot follow sketches.")
        pipe = self._pipeline(ADMControlNetPipeline, recipe.sampler, controlnet=self.controlnet)
        return self._draw(pipe, recipe, on_step, image=condition, controlnet_conditioning_scale=scale)

    @torch.no_grad()
    def look_inside(self, recipe: Recipe, on_step: OnStep) -> Inside:
        """One picture of ancestral steps, and what the network said on the way."""
        recipe = replace(recipe, num_images=1, upscale=False, sampler="DDPM")
        self.check(recipe)
        pipe = self._pipeline(ADMPipeline, recipe.sampler)
        record: list[tuple] = []
        watch(pipe.scheduler, lambda *step: record.append(step))
        # Distributions and bound are asked for the same chain, which is named in this way.
        chain = {"timestep_respacing": str(recipe.steps)}
        (picture,) = self._draw(pipe, recipe, on_step, chain, classifier_guidance_scale=recipe.classifier_scale)
        log_variances, bounds = [], []
        for output, t, sample, _ in record:
            log_variance = self.base.scheduler.predicted_distribution(output, t, sample, **chain)[1]
            log_variances.append(_percentiles(log_variance))
            bounds.append(self._variance_bounds(output, t, sample, chain))
        timesteps = [int(t) for _, t, _, _ in record]
        terms, prior = self._bound(recipe, picture, timesteps, chain)
        return Inside(
            picture=picture,
            timesteps=timesteps,
            samples=[_to_pictures(sample)[0] for _, _, sample, _ in record],
            predictions=[_to_pictures(x_0)[0] for _, _, _, x_0 in record],
            log_variances=log_variances,
            bounds=bounds,
            terms=terms,
            prior=prior,
            bits_per_dim=sum(terms) + prior,
        )

    def read_picture(self, picture: Image.Image | None) -> Image.Image:
        """A picture of any size and mode as the models take it: square, on white, of their size."""
        return fit(check_picture(picture), self.size)

    def read_mask(self, layers: list[Image.Image]) -> Image.Image:
        """White where anything was painted on a picture."""
        mask = fit_mask(paint_of(layers), self.size, coverage=0.5)
        if mask.getextrema() == (0, 0):
            raise ValueError("Nothing is marked. Paint over the part of the picture that shall be drawn anew.")
        return mask

    def read_strokes(self, layers: list[Image.Image]) -> Image.Image:
        """Strokes as the ControlNet knows edges: white lines on black, a pixel wide."""
        strokes = fit_mask(paint_of(layers), self.size, coverage=STROKE_COVERAGE)
        if strokes.getextrema() == (0, 0):
            raise ValueError("The sketch is empty. Draw something, or upload a picture to take the edges of.")
        return thin(strokes).convert("RGB")

    def find_edges(self, picture: Image.Image | None) -> Image.Image:
        """The edges of a picture, as the ControlNet was trained on."""
        return make_condition(self.read_picture(picture), "edges")

    def _pipeline(self, pipeline_class: type[ADMPipeline], sampler: str, **components: Any) -> ADMPipeline:
        parts = {**self.base.components, "scheduler": make_scheduler(self.base.scheduler, sampler), **components}
        pipe = pipeline_class(**parts, id2label=self.base.config.id2label)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _draw(
        self, pipe: ADMPipeline, recipe: Recipe, on_step: OnStep, chain: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Image.Image]:
        has_condition = bool(recipe.prompt) or recipe.category != ANY_CATEGORY  # else nothing to guide towards
        return run_pipeline(
            pipe,
            recipe,
            on_step,
            "Drawing",
            prompt=recipe.prompt or None,
            class_labels=None if recipe.category == ANY_CATEGORY else recipe.category,
            num_images_per_prompt=recipe.num_images,
            guidance_scale=recipe.guidance_scale if has_condition else 1.0,
            **(chain or {"num_inference_steps": recipe.steps}),
            **kwargs,
        )

    def _upscale(self, images: list[Image.Image], recipe: Recipe, on_step: OnStep) -> list[Image.Image]:
        scheduler = make_scheduler(self.upsampler.scheduler, "DPM-Solver++")
        names = ("low_res_size", "max_noise_level", "noise_level", "noise_schedule", "id2label")
        config = {name: self.upsampler.config[name] for name in names}
        pipe = ADMSuperResolutionPipeline(**{**self.upsampler.components, "scheduler": scheduler}, **config)
        pipe.set_progress_bar_config(disable=True)
        known = (self.upsampler.id2label or {}).values()
        return run_pipeline(
            pipe,
            recipe,
            on_step,
            "Enlarging",
            image=images,
            class_labels=recipe.category if recipe.category in known else None,
            num_inference_steps=UPSCALE_STEPS,
        )

    def _variance_bounds(
        self, output: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, chain: dict[str, str]
    ) -> tuple[float, float]:
        """What variance channels of -1 and of 1, everywhere, would mean at this timestep."""
        mean = output[:, : sample.shape[1]]
        lower, upper = (
            self.base.scheduler.predicted_distribution(
                torch.cat([mean, torch.full_like(mean, choice)], dim=1), t, sample, **chain
            )[1]
            for choice in (-1.0, 1.0)
        )
        return lower.mean().item(), upper.mean().item()

    def _bound(
        self, recipe: Recipe, picture: Image.Image, timesteps: list[int], chain: dict[str, str]
    ) -> tuple[list[float], float]:
        """The variational bound of a picture under the prompt and category that it was drawn with."""
        unet, scheduler = self.base.unet, self.base.scheduler
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
        generator = torch.Generator().manual_seed(recipe.seed)
        terms = []
        for t in torch.tensor(timesteps).split(BOUND_BATCH):
            original = pixels.expand(len(t), -1, -1, -1)
            noise = torch.randn(original.shape, generator=generator)
            original, noise, t = (x.to(unet.device) for x in (original, noise, t))
            noisy = scheduler.add_noise(original, noise, t)
            output = unet(noisy, t, **self._conditions(recipe, len(t))).sample
            terms += scheduler.variational_bound(output, original, noisy, t, **chain).tolist()
        prior = scheduler.prior_bits_per_dim(pixels[None].to(unet.device), **chain)
        return terms, prior.item()

    def _conditions(self, recipe: Recipe, count: int) -> dict[str, Any]:
        """The U-Net's own arguments for prompt and category."""
        conditions: dict[str, Any] = {}
        if recipe.category != ANY_CATEGORY:
            label = next(label for label, name in self.base.id2label.items() if name == recipe.category)
            conditions["class_labels"] = torch.full((count,), label, device=self.base.unet.device)
        if self.base.reads_text:
            states, _, pooled, _, mask, _ = self.base.encode_prompt([recipe.prompt] * count)
            conditions |= {"encoder_hidden_states": states, "encoder_attention_mask": mask}
            if pooled is not None:
                conditions["added_cond_kwargs"] = {"text_embeds": pooled}
        return conditions


def run_pipeline(pipe: ADMPipeline, recipe: Recipe, on_step: OnStep, task: str, **kwargs: Any) -> list[Image.Image]:
    """Calls a pipeline with one generator a picture, and tells of each step what x_0 it predicted."""
    latest: list[torch.Tensor] = []
    watch(pipe.scheduler, lambda *step: latest.append(step[-1]))

    def call_back(pipe: ADMPipeline, index: int, timestep: torch.Tensor, kwargs: dict) -> dict:
        # RePaint goes up and down the chain, and says itself how many steps that takes.
        on_step(Step(index + 1, max(pipe.num_timesteps, index + 1), task, _to_pictures(latest.pop())))
        latest.clear()
        return kwargs

    generators = [torch.Generator().manual_seed(recipe.seed + i) for i in range(recipe.num_images)]
    return pipe(generator=generators, callback_on_step_end=call_back, return_dict=False, **kwargs)[0]


def stream(draw: Callable[[OnStep], T], seconds_between: float = SECONDS_BETWEEN_PREVIEWS) -> Iterator[Step | Finished]:
    r"""
    Runs `draw` in a thread of its own; yields some of its steps, and at last what it returns. Where nobody reads on
    (the visitor has left), `draw` ends at its next step.

    Args:
        draw (`Callable`): Takes what it shall call after each step.
        seconds_between (`float`): Least time between two steps that are yielded.

    Raises:
        Exception: What `draw` raises.
    """
    events: queue.Queue = queue.Queue()
    unread = threading.Event()

    def on_step(step: Step) -> None:
        if unread.is_set():
            raise InterruptedError("nobody waits for this picture any more")
        events.put(step)

    def work() -> None:
        try:
            events.put(Finished(draw(on_step)))
        except Exception as error:
            events.put(error)  # raised again below, where the page can show it

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    last = -math.inf
    try:
        while True:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finished):
                yield event
                return
            if time.monotonic() - last >= seconds_between:
                last = time.monotonic()
                yield event
    finally:
        unread.set()
        worker.join()


def make_scheduler(scheduler: LearnedVarianceDDPMScheduler, sampler: str) -> SchedulerMixin:
    """A scheduler of its own for one call."""
    if sampler == "DDPM":
        return LearnedVarianceDDPMScheduler.from_config(scheduler.config)
    # Solvers and DDIM take the mean alone.
    solver = {"DPM-Solver++": DPMSolverMultistepScheduler, "UniPC": UniPCMultistepScheduler}
    if sampler in solver:
        return solver[sampler].from_config(scheduler.config, variance_type=None)
    return DeterministicDDIM.from_config(scheduler.config)


class DeterministicDDIM(LearnedVarianceDDPMScheduler):
    """DDIM without noise, also where the caller says nothing of `eta`."""

    def step(self, model_output, timestep, sample, *, generator=None, guidance_gradient=None, return_dict=True):
        return super().step(
            model_output,
            timestep,
            sample,
            generator=generator,
            eta=0.0,
            guidance_gradient=guidance_gradient,
            return_dict=return_dict,
        )


def watch(scheduler: SchedulerMixin, tell: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]):
    """
    Has a scheduler, and the copy of it that a pipeline steps, tell of each step before it is made: the model's output,
    the timestep, x_t and the predicted x_0.
    """
    step = scheduler.step.__func__

    @functools.wraps(step)  # with its signature, which pipelines read
    def watched(self, model_output, timestep, sample, *args, **kwargs):
        tell(model_output, timestep, sample, predict_original(self, model_output, timestep, sample))
        return step(self, model_output, timestep, sample, *args, **kwargs)

    scheduler.step = types.MethodType(watched, scheduler)  # a method of a copy is one of that copy


def predict_original(
    scheduler: SchedulerMixin, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """The predicted x_0, clipped to [-1, 1], for every scheduler whose samples are signal * x_0 + std * noise."""
    mean = model_output[:, : sample.shape[1]]
    signal, std = signal_and_std(scheduler, torch.as_tensor(timestep), scheduler.alphas_cumprod)
    signal, std = signal.to(sample), std.to(sample)
    kind = scheduler.config.prediction_type
    if kind == "sample":
        x_0 = mean
    elif kind == "v_prediction":
        x_0 = signal * sample - std * mean
    elif kind == "epsilon":
        x_0 = (sample - std * mean) / signal
    else:
        raise ValueError(f"The model predicts {kind!r}; x_0 follows from epsilon, sample and v_prediction.")
    return x_0.clamp(-1, 1)


def check_number(title: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # NaN too
        raise ValueError(f"{title} is {short(value)}. It must be a number from {low:g} to {high:g}.")
    return float(value)


def check_integer(title: str, value: Any, low: int, high: int) -> int:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value != int(value):
        raise ValueError(f"{title} is {short(value)}. It must be a whole number from {low} to {high}.")
    return int(value)


def check_prompt(prompt: Any) -> str:
    if prompt is None:
        return ""
    if not isinstance(prompt, str):
        raise ValueError(f"The prompt is {short(prompt)}. It must be text.")
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise ValueError(f"The prompt has {len(prompt)} characters; at most {MAX_PROMPT_LENGTH} are allowed.")
    return prompt.strip()


def check_picture(picture: Image.Image | None) -> Image.Image:
    if picture is None:
        raise ValueError("There is no picture. Upload one first.")
    if max(picture.size) > MAX_IMAGE_SIDE:
        width, height = picture.size
        raise ValueError(f"The picture has {width} x {height} pixels; a side may have {MAX_IMAGE_SIDE} at most.")
    return picture


def short(value: Any) -> str:
    """A value in an error, however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fit(picture: Image.Image, size: int) -> Image.Image:
    """RGB on white, in the middle of a white square, resized to `size`."""
    picture = picture.convert("RGBA")
    square = Image.new("RGBA", (max(picture.size),) * 2, "white")
    offset = tuple((max(picture.size) - side) // 2 for side in picture.size)
    square.alpha_composite(picture, offset)
    return square.convert("RGB").resize((size, size), Image.Resampling.BOX if max(picture.size) > size else 0)


def paint_of(layers: list[Image.Image]) -> Image.Image:
    """How much each pixel is painted on, over all layers of an editor: mode L."""
    if not layers:
        raise ValueError("Nothing is drawn yet. Draw with a finger or the mouse first.")
    for layer in layers:
        check_picture(layer)
    alphas = [np.array(layer.convert("RGBA").getchannel("A")) for layer in layers]
    if len({alpha.shape for alpha in alphas}) > 1:
        raise ValueError("The layers of the drawing differ in size. Clear it and draw again.")
    return Image.fromarray(np.max(alphas, axis=0))


def fit_mask(paint: Image.Image, size: int, coverage: float) -> Image.Image:
    """Black and white (mode L): white where more than `coverage` of a pixel is painted; fitted as `fit` does."""
    square = Image.new("L", (max(paint.size),) * 2, 0)
    square.paste(paint, ((max(paint.size) - paint.width) // 2, (max(paint.size) - paint.height) // 2))
    share = np.array(square.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
    return Image.fromarray(np.where(share > coverage, 255, 0).astype(np.uint8))


def thin(lines: Image.Image) -> Image.Image:
    """Lines a pixel wide (mode L)."""
    from skimage.morphology import skeletonize  # slow to import

    return Image.fromarray(np.where(skeletonize(np.array(lines) > 127), 255, 0).astype(np.uint8))


def fingerprint(folder: Path) -> str:
    """Of the weights and configs in a folder: twelve hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _load_options(folder: Path) -> dict[str, Any]:
    # Half precision saves space in the repository; on a CPU float32 is faster.
    is_half = any(Path(folder).rglob("*.fp16.safetensors"))
    return {"dtype": torch.float32, "local_files_only": True, "variant": "fp16" if is_half else None}


def _to_pictures(samples: torch.Tensor) -> list[Image.Image]:
    """(N, 3, height, width) in [-1, 1], or beyond, as pictures."""
    levels = ((samples.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in levels]


def _percentiles(log_variance: torch.Tensor) -> tuple[float, float, float]:
    points = torch.tensor([0.1, 0.5, 0.9], device=log_variance.device)
    return tuple(torch.quantile(log_variance.float().flatten(), points).tolist())
