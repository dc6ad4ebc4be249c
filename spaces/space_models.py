"""
The models of the Space, without Gradio: recipes, sampling with previews, sketches as conditions, variations of images,
and a look inside.

A recipe holds everything, except the weights, that an image depends on, so that a link or some JSON reproduces it. All
input from a browser is checked here, whatever the limits of the page.
"""

import copy
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
from typing import Any, TypeVar

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
    ADMUnCLIPPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning.control_images import make_condition
from diffusers_adm.conditioning.guidance import signal_and_std
from diffusers_adm.conditioning.latents import LatentSpace


MAX_PROMPT_LENGTH = 200  # characters
MAX_CONTROLNET_SCALE = 2
MAX_IMAGE_SIDE = 4096  # pixels, for uploads
MAX_RECIPE_LENGTH = 2000  # characters
ANY_CATEGORY = "any"
# Folders of the models that generate from prompts and categories. The first one that is there is the page's choice;
# recipes that name none, because they are older than the second model, mean the last one.
LATENTS, BASE = MODEL_NAMES = ("latents", "base")
# Folders of their ControlNets.
CONTROLNETS = {LATENTS: "controlnet_latents", BASE: "controlnet"}
SAMPLERS = {
    "DDPM": LearnedVarianceDDPMScheduler,
    "DDIM": LearnedVarianceDDPMScheduler,  # with eta = 0
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
# Numbers of a recipe: the name on the page, the lowest and the highest value, and the type.
LIMITS: dict[str, tuple[str, int, int, type]] = {
    "guidance_scale": ("Guidance", 1, 10, float),
    "classifier_scale": ("Classifier guidance", 0, 10, float),
    "steps": ("Steps", 2, 100, int),
    "seed": ("Seed", 0, 2**32 - 1, int),
    "num_images": ("Images", 1, 8, int),
}
UPSCALE_STEPS = 10  # with DPM-Solver++
# Share of a pixel that a stroke must cover. Edges of the training set are one pixel wide.
STROKE_COVERAGE = 0.25
VARIATION_GUIDANCE = 3.0
MAX_INVERSIONS = 16  # kept for the next position of the slider
BOUND_BATCH = 25  # timesteps whose terms of the bound are computed at once
SECONDS_BETWEEN_PREVIEWS = 1.0  # each preview is sent to the browser as files, which slows sampling down

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    r"""
    Everything, except the weights, that an image depends on. `LIMITS` has the ranges of the numbers.

    Args:
        prompt (`str`): At most `MAX_PROMPT_LENGTH` characters; empty for none.
        category (`str`): Name of a class of the model, or "any".
        guidance_scale (`float`): Classifier-free guidance; 1 is off.
        classifier_scale (`float`): Classifier guidance; 0 is off. Requires a category.
        steps (`int`): Number of sampling steps.
        sampler (`str`): One of `SAMPLERS`.
        seed (`int`): Random seed of the first image; the other images have the next seeds.
        num_images (`int`): Number of images.
        upscale (`bool`): Whether to upsample the images.
        model (`str`): One of `MODEL_NAMES`.

    Raises:
        ValueError: If a value has the wrong type or is out of range.
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
    model: str = BASE

    def __post_init__(self):
        prompt = "" if self.prompt is None else self.prompt
        if not isinstance(prompt, str):
            raise ValueError(f"The prompt is {short(prompt)}. It must be text.")
        if len(prompt) > MAX_PROMPT_LENGTH:
            raise ValueError(f"The prompt has {len(prompt)} characters; at most {MAX_PROMPT_LENGTH} are allowed.")
        object.__setattr__(self, "prompt", prompt.strip())
        for name, limits in LIMITS.items():
            object.__setattr__(self, name, check_number(getattr(self, name), *limits))
        check_choice(self.sampler, "sampler", list(SAMPLERS))
        check_choice(self.model, "model", list(MODEL_NAMES))
        if not isinstance(self.category, str):
            raise ValueError(f"The category is {short(self.category)}. Choose one by its name, or {ANY_CATEGORY!r}.")
        if not isinstance(self.upscale, bool):
            raise ValueError(f"`upscale` is {short(self.upscale)}. It must be true or false.")
        if self.classifier_scale > 0 and self.category == ANY_CATEGORY:
            raise ValueError("Classifier guidance needs a category. Choose one, or set the scale to 0.")

    def to_json(self, weights: str) -> str:
        """As JSON, with the fingerprint of the weights, because other weights generate other images."""
        return json.dumps({**asdict(self), "weights": weights}, indent=1, ensure_ascii=False)

    def query(self) -> dict[str, str]:
        """As the query of a link: all values that are not the defaults, and always the prompt."""
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in asdict(self).items()
            if name == "prompt" or value != getattr(Recipe, name)
        }

    @classmethod
    def from_json(cls, text: str) -> tuple["Recipe", str | None]:
        """The recipe, and the fingerprint of its weights if there is one."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError("There is no recipe. Paste the JSON of an image.")
        if len(text) > MAX_RECIPE_LENGTH:
            raise ValueError(f"The recipe has {len(text)} characters; at most {MAX_RECIPE_LENGTH} are allowed.")
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("The recipe is not valid JSON. Paste it unchanged.") from error
        if not isinstance(entries, dict):
            raise ValueError("The recipe is not a JSON object. Paste it unchanged.")
        weights = entries.pop("weights", None)
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(entries) - set(names))
        if unknown:
            raise ValueError(f"The recipe has an unknown entry {short(unknown[0])}. Allowed are: {', '.join(names)}.")
        return cls(**entries), weights

    @classmethod
    def from_query(cls, query: dict[str, str]) -> "Recipe | None":
        """From the query of a link, or None if it has no entry of a recipe; other entries are ignored."""
        entries: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in query:
                value = query[field.name]
                try:
                    entries[field.name] = value if field.type is str else json.loads(value)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"In the link, {field.name} is {short(value)}, which is not valid.") from error
        return cls(**entries) if entries else None


@dataclass(frozen=True)
class Step:
    """Step `done` of `total` is finished. `make_previews` makes images of the predicted x_0."""

    done: int
    total: int
    task: str
    make_previews: Callable[[], list[Image.Image]] = list

    @functools.cached_property
    def previews(self) -> list[Image.Image]:
        """The predicted x_0. Made when they are first asked for, since decoding those of all steps would take long."""
        return self.make_previews()


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Inside:
    r"""
    The steps of one sample, from noise to image. All lists have one entry per step.

    `log_variances` are natural logs: the 10th, 50th and 90th percentile over the pixels. `bounds` are the lower and
    upper bound of the learned log-variance. `terms` of the variational bound and `prior` are in bits per dimension;
    their sum, `bits_per_dim`, is the bound for the chain of these steps.
    """

    image: Image.Image
    timesteps: list[int]
    samples: list[Image.Image]
    predictions: list[Image.Image]
    log_variances: list[tuple[float, float, float]]
    bounds: list[tuple[float, float]]
    terms: list[float]
    prior: float
    bits_per_dim: float


class Models:
    r"""
    The networks of the Space, loaded once. Each call makes its own pipeline and scheduler, which hold state.

    Args:
        folder (`Path`): With the pipeline `base/` and optionally the pipelines `latents/`, `upsampler/` and `unclip/`
            and ControlNets for sketches: `controlnet_latents/` and `controlnet/`, for `latents/` and `base/`.
        device (`str`, *optional*): The default is the GPU if there is one, otherwise the CPU.
        fast (`bool`): Whether to compile the U-Nets in the background, each number of images at its first call.

    Raises:
        FileNotFoundError: If there is no `base/model_index.json`, or a ControlNet for latents without `latents/`.
        ValueError: If `fast` is set and a network cannot be compiled, or the device is not the CPU.
        RuntimeError: If `fast` is set and there is neither a C++ compiler nor code from before.
    """

    def __init__(self, folder: Path, device: str | None = None, fast: bool = False):
        folder = Path(folder)
        if not (folder / "base" / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no pipeline in `base/`. Set ADM_SPACE_MODELS to a folder of models, as described in "
                "spaces/README.md."
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")

        def load(model_class: type[ADMPipeline] | type[AdaGNControlNetModel], name: str) -> Any:
            if not (folder / name).is_dir():
                return None
            # Half precision saves space in the repository; on a CPU float32 is faster.
            variant = "fp16" if any((folder / name).rglob("*.fp16.safetensors")) else None
            options = {"dtype": torch.float32, "local_files_only": True, "variant": variant}
            return model_class.from_pretrained(folder / name, **options).to(device)

        self.base: ADMPipeline = load(ADMPipeline, BASE)
        latents: ADMPipeline | None = load(ADMPipeline, LATENTS)
        # By name, the page's choice first.
        self.pipelines = {BASE: self.base} if latents is None else {LATENTS: latents, BASE: self.base}
        self.upsampler = load(ADMSuperResolutionPipeline, "upsampler")
        if latents is None and (folder / CONTROLNETS[LATENTS]).is_dir():
            raise FileNotFoundError(f"{folder} has `{CONTROLNETS[LATENTS]}/`, but not its model, `{LATENTS}/`.")
        self._sketch_model = next((name for name in self.pipelines if (folder / CONTROLNETS[name]).is_dir()), None)
        self.controlnet = load(AdaGNControlNetModel, CONTROLNETS[self._sketch_model]) if self.has_sketches else None
        self.unclip: ADMUnCLIPPipeline | None = load(ADMUnCLIPPipeline, "unclip")
        self.weights = fingerprint(folder)
        self._inversions: dict[tuple, torch.Tensor] = {}
        self.is_fast = fast
        if fast:
            self._enable_fast()

    def _enable_fast(self) -> None:
        folders = {**self.pipelines, "upsampler": self.upsampler, "unclip": self.unclip}
        for name, pipe in folders.items():
            if pipe is None:
                continue
            if pipe.unet.device.type != "cpu":
                raise ValueError(
                    f"`{name}/` is on {pipe.unet.device}. Networks are compiled in the background on CPUs only: start "
                    "without --fast (and without ADM_SPACE_FAST)."
                )
            try:
                # In the dtype of the network: the default may be bfloat16, in which links would make other images.
                pipe.enable_fast(None, background=True)
            except ValueError as error:
                raise ValueError(f"`{name}/` cannot be compiled. {error}") from error

    def close(self) -> None:
        """Ends compilers that are still at work; the networks run as they are."""
        for pipe in (*self.pipelines.values(), self.upsampler, self.unclip):
            if pipe is not None:
                pipe.disable_fast()

    @property
    def has_variations(self) -> bool:
        """Whether there is a decoder of image embeddings, and what encodes images to them."""
        return self.unclip is not None and self.unclip.image_encoder is not None

    @property
    def variation_size(self) -> int:
        """Height and width of variations, in pixels."""
        return self.unclip.unet.config.sample_size * self.unclip.vae_scale_factor

    @property
    def default_model(self) -> str:
        """Name of the model that the page chooses."""
        return next(iter(self.pipelines))

    def size(self, model: str = BASE) -> int:
        """Height and width of the images of a model, in pixels."""
        pipe = self._model(model)
        return pipe.unet.config.sample_size * pipe.vae_scale_factor

    @property
    def sketch_model(self) -> str:
        """Name of the model that follows sketches: the page's choice, if it has a ControlNet."""
        if self._sketch_model is None:
            raise ValueError("This Space has no ControlNet, so it cannot follow sketches.")
        return self._sketch_model

    @property
    def has_sketches(self) -> bool:
        """Whether there is a ControlNet for a model."""
        return self._sketch_model is not None

    @property
    def categories(self) -> list[str]:
        """Names of the classes, and "any"."""
        return [ANY_CATEGORY, *(self.base.id2label or {}).values()]

    def _model(self, name: str) -> ADMPipeline:
        check_choice(name, "model", list(self.pipelines))
        return self.pipelines[name]

    def check(self, recipe: Recipe) -> None:
        """Raises a ValueError if these models cannot follow the recipe."""
        pipe = self._model(recipe.model)
        check_choice(recipe.category, "category", [ANY_CATEGORY, *(pipe.id2label or {}).values()])
        if recipe.upscale and self.upsampler is None:
            raise ValueError("This Space has no upsampler. Switch upsampling off.")
        if recipe.classifier_scale > 0 and self.base.classifier is None:
            raise ValueError("This Space has no classifier. Set classifier guidance to 0.")
        if recipe.model != BASE and (recipe.upscale or recipe.classifier_scale > 0):
            what = "Upsampling" if recipe.upscale else "Classifier guidance"
            size = f"{self.size()} x {self.size()}"
            raise ValueError(
                f"{what} needs the model of {size} pixels ({BASE!r}). Choose it, or switch {what.lower()} off."
            )

    def generate(self, recipe: Recipe, on_step: OnStep) -> list[Image.Image]:
        """Generates images, and upsamples them if the recipe says so."""
        self.check(recipe)
        pipe = self._pipeline(ADMPipeline, recipe)
        images = self._sample(pipe, recipe, on_step, classifier_guidance_scale=recipe.classifier_scale)
        return self._upsample(images, recipe, on_step) if recipe.upscale else images

    def inpaint(self, recipe: Recipe, image: Image.Image, mask: Image.Image, on_step: OnStep) -> list[Image.Image]:
        """Inpaints the white part of the mask with RePaint, which requires ancestral steps."""
        recipe = replace(recipe, sampler="DDPM")
        self.check(recipe)
        pipe = self._pipeline(ADMInpaintPipeline, recipe)
        return self._sample(pipe, recipe, on_step, image=image, mask_image=mask)

    def sketch(self, recipe: Recipe, condition: Image.Image, scale: float, on_step: OnStep) -> list[Image.Image]:
        """Generates images that follow a sketch of white lines on black, with `sketch_model`."""
        recipe = replace(recipe, model=self.sketch_model)
        self.check(recipe)
        scale = check_number(scale, "Strength of the sketch", 0, MAX_CONTROLNET_SCALE, float)
        pipe = self._pipeline(ADMControlNetPipeline, recipe, controlnet=self.controlnet)
        return self._sample(pipe, recipe, on_step, image=condition, controlnet_conditioning_scale=scale)

    def variations(self, recipe: Recipe, image: Image.Image, on_step: OnStep) -> list[Image.Image]:
        """Generates variations of an image, from its CLIP embedding."""
        pipe = self._variation_pipeline(recipe.sampler)
        return run_pipeline(
            pipe,
            recipe,
            on_step,
            "Generating",
            image=image,
            num_images_per_prompt=recipe.num_images,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance_scale,
            eta=0.0 if recipe.sampler == "DDIM" else None,
        )

    def interpolate(
        self,
        recipe: Recipe,
        images: tuple[Image.Image, Image.Image],
        weight: float,
        keeps_ends: bool,
        on_step: OnStep,
    ) -> Image.Image:
        """
        Generates an image between two: 0 is the first one, 1 the second one. `keeps_ends`: from the noise that leads to
        the images themselves, found by DDIM inversion, in place of noise of the seed of the recipe.
        """
        weight = check_number(weight, "Position between the images", 0, 1, float)
        if not isinstance(keeps_ends, bool):
            raise ValueError(f"`keeps_ends` is {short(keeps_ends)}. It must be true or false.")
        pipe = self._variation_pipeline("DDIM" if keeps_ends else recipe.sampler)
        noise: dict[str, Any] = {"generator": torch.Generator().manual_seed(recipe.seed)}
        if keeps_ends:
            # Clipping has no inverse.
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
            inverted = [self._invert(pipe, recipe, image, on_step) for image in images]
            noise |= {"latents": torch.cat(inverted), "eta": 0.0}
        (image,) = pipe.interpolate(
            *images,
            weights=weight,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance_scale,
            callback_on_step_end=previews_of(pipe, on_step, "Generating"),
            **noise,
        ).images
        return image

    def _variation_pipeline(self, sampler: str) -> ADMUnCLIPPipeline:
        if not self.has_variations:
            raise ValueError("This Space has no decoder of image embeddings, so it cannot make variations.")
        pipe = copy.copy(self.unclip)
        pipe.scheduler = make_scheduler(pipe.scheduler, sampler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _invert(self, pipe: ADMUnCLIPPipeline, recipe: Recipe, image: Image.Image, on_step: OnStep) -> torch.Tensor:
        """The noise that leads to an image. The latest ones are kept."""
        key = (image.tobytes(), recipe.steps, recipe.guidance_scale)
        if key not in self._inversions:

            def report(pipe: ADMPipeline, index: int, timestep: torch.Tensor, kwargs: dict) -> dict:
                on_step(Step(index + 1, pipe.num_timesteps, "Inverting"))
                return kwargs

            latents = pipe.invert(
                image,
                num_inference_steps=recipe.steps,
                image=image,
                guidance_scale=recipe.guidance_scale,
                callback_on_step_end=report,
            )
            while len(self._inversions) >= MAX_INVERSIONS:
                self._inversions.pop(next(iter(self._inversions)))  # the oldest one
            self._inversions[key] = latents
        return self._inversions[key]

    @torch.no_grad()
    def look_inside(self, recipe: Recipe, on_step: OnStep) -> Inside:
        """Generates one image with ancestral steps of the base model and records each of them."""
        recipe = replace(recipe, num_images=1, upscale=False, sampler="DDPM", model=BASE)
        self.check(recipe)
        pipe = self._pipeline(ADMPipeline, recipe)
        record: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        watch(pipe.scheduler, lambda *step: record.append(step))
        # In this form, the sampler, the distributions and the bound all use the same timesteps.
        chain = {"timestep_respacing": str(recipe.steps)}
        (image,) = self._sample(pipe, recipe, on_step, chain, classifier_guidance_scale=recipe.classifier_scale)
        log_variances, bounds = [], []
        for output, timestep, sample, _ in record:
            learned, lower, upper = self._log_variances(output, timestep, sample, chain)
            percentiles = torch.quantile(learned.flatten(), torch.tensor([0.1, 0.5, 0.9], device=learned.device))
            log_variances.append(tuple(percentiles.tolist()))
            bounds.append((lower.mean().item(), upper.mean().item()))
        timesteps = [int(timestep) for _, timestep, _, _ in record]
        terms, prior = self._variational_bound(recipe, image, timesteps, chain)
        return Inside(
            image=image,
            timesteps=timesteps,
            samples=[_to_images(sample)[0] for _, _, sample, _ in record],
            predictions=[_to_images(x_0)[0] for _, _, _, x_0 in record],
            log_variances=log_variances,
            bounds=bounds,
            terms=terms,
            prior=prior,
            bits_per_dim=sum(terms) + prior,
        )

    def read_image(self, image: Image.Image | None, model: str = BASE) -> Image.Image:
        """Converts an image of any size and mode to the size of a model, square on white."""
        return fit(check_image(image), self.size(model))

    def read_variation(self, image: Image.Image | None) -> Image.Image:
        """Converts an image of any size and mode to the size of variations, square on white."""
        if not self.has_variations:
            raise ValueError("This Space has no decoder of image embeddings, so it cannot make variations.")
        return fit(check_image(image), self.variation_size)

    def read_mask(self, layers: list[Image.Image], model: str = BASE) -> Image.Image:
        """The mask of the painted pixels, white where the image is inpainted."""
        mask = fit_mask(painted(layers), self.size(model), coverage=0.5)
        if mask.getextrema() == (0, 0):
            raise ValueError("Nothing is marked. Paint over the part of the image to inpaint.")
        return mask

    def read_strokes(self, layers: list[Image.Image]) -> Image.Image:
        """Converts strokes to edges as in the training of the ControlNet: white lines on black, one pixel wide."""
        from skimage.morphology import skeletonize  # slow to import

        size = self.size(self.sketch_model)
        strokes = np.array(fit_mask(painted(layers), size, coverage=STROKE_COVERAGE)) > 0
        if not strokes.any():
            raise ValueError("The sketch is empty. Draw something, or upload an image to use its edges.")
        return Image.fromarray(np.where(skeletonize(strokes), 255, 0).astype(np.uint8)).convert("RGB")

    def find_edges(self, image: Image.Image | None) -> Image.Image:
        """The edges of an image, as in the training of the ControlNet."""
        return make_condition(self.read_image(image, self.sketch_model), "edges")

    def _pipeline(self, pipeline_class: type[ADMPipeline], recipe: Recipe, **components: Any) -> ADMPipeline:
        model = self._model(recipe.model)
        scheduler = make_scheduler(model.scheduler, recipe.sampler)
        parts = {**model.components, "scheduler": scheduler, **components}
        pipe = pipeline_class(**parts, id2label=model.config.id2label)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _sample(
        self, pipe: ADMPipeline, recipe: Recipe, on_step: OnStep, chain: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Image.Image]:
        has_condition = bool(recipe.prompt) or recipe.category != ANY_CATEGORY  # required for guidance
        return run_pipeline(
            pipe,
            recipe,
            on_step,
            "Generating",
            prompt=recipe.prompt or None,
            class_labels=None if recipe.category == ANY_CATEGORY else recipe.category,
            num_images_per_prompt=recipe.num_images,
            guidance_scale=recipe.guidance_scale if has_condition else 1.0,
            eta=0.0 if recipe.sampler == "DDIM" else None,
            **(chain or {"num_inference_steps": recipe.steps}),
            **kwargs,
        )

    def _upsample(self, images: list[Image.Image], recipe: Recipe, on_step: OnStep) -> list[Image.Image]:
        pipe = copy.copy(self.upsampler)
        pipe.scheduler = make_scheduler(pipe.scheduler, "DPM-Solver++")
        pipe.set_progress_bar_config(disable=True)
        return run_pipeline(
            pipe,
            recipe,
            on_step,
            "Upsampling",
            image=images,
            class_labels=recipe.category if recipe.category in (pipe.id2label or {}).values() else None,
            num_inference_steps=UPSCALE_STEPS,
        )

    def _log_variances(
        self, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, chain: dict[str, str]
    ) -> torch.Tensor:
        """
        Log-variances `(3, channels, height, width)` of a step: learned, lower bound and upper bound (variance channels
        of -1 and of 1).
        """
        mean = output[:, : sample.shape[1]]
        bounds = [torch.cat([mean, torch.full_like(mean, choice)], dim=1) for choice in (-1.0, 1.0)]
        samples = sample.expand(3, -1, -1, -1)
        return self.base.scheduler.predicted_distribution(torch.cat([output, *bounds]), timestep, samples, **chain)[1]

    def _variational_bound(
        self, recipe: Recipe, image: Image.Image, timesteps: list[int], chain: dict[str, str]
    ) -> tuple[list[float], float]:
        """Terms and prior of the variational bound of an image, given its prompt and category."""
        unet, scheduler = self.base.unet, self.base.scheduler
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
        generator = torch.Generator().manual_seed(recipe.seed)
        terms = []
        for t in torch.tensor(timesteps).split(BOUND_BATCH):
            original = pixels.expand(len(t), -1, -1, -1)
            noise = torch.randn(original.shape, generator=generator)
            original, noise, t = (x.to(unet.device) for x in (original, noise, t))
            noisy = scheduler.add_noise(original, noise, t)
            # `forward` itself: code would be compiled for each number of timesteps in the last part.
            output = unet.forward(noisy, t, **self._conditions(recipe, len(t))).sample
            terms += scheduler.variational_bound(output, original, noisy, t, **chain).tolist()
        prior = scheduler.prior_bits_per_dim(pixels[None].to(unet.device), **chain)
        return terms, prior.item()

    def _conditions(self, recipe: Recipe, batch_size: int) -> dict[str, Any]:
        """The U-Net's arguments for prompt and category."""
        conditions: dict[str, Any] = {}
        if recipe.category != ANY_CATEGORY:
            label = next(label for label, name in self.base.id2label.items() if name == recipe.category)
            conditions["class_labels"] = torch.full((batch_size,), label, device=self.base.unet.device)
        if self.base.has_cross_attention:
            states, _, pooled, _, mask, _ = self.base.encode_prompt([recipe.prompt] * batch_size)
            conditions |= {"encoder_hidden_states": states, "encoder_attention_mask": mask}
            if pooled is not None:
                conditions["added_cond_kwargs"] = {"text_embeds": pooled}
        return conditions


def run_pipeline(pipe: ADMPipeline, recipe: Recipe, on_step: OnStep, task: str, **kwargs: Any) -> list[Image.Image]:
    """Calls a pipeline with one generator per image, and reports the predicted x_0 of each step."""
    generators = [torch.Generator().manual_seed(recipe.seed + i) for i in range(recipe.num_images)]
    callback = previews_of(pipe, on_step, task)
    return pipe(generator=generators, callback_on_step_end=callback, return_dict=False, **kwargs)[0]


def previews_of(pipe: ADMPipeline, on_step: OnStep, task: str) -> Callable[..., dict]:
    """A callback for the steps of one call of a pipeline, which reports the predicted x_0."""
    latest: list[torch.Tensor] = []
    watch(pipe.scheduler, lambda *step: latest.append(step[-1]))

    def report(pipe: ADMPipeline, index: int, timestep: torch.Tensor, kwargs: dict) -> dict:
        x_0 = latest.pop()
        latest.clear()

        @torch.no_grad()
        def make_previews() -> list[Image.Image]:
            return _to_images(x_0 if pipe.vae is None else LatentSpace(pipe.vae).decode(x_0))

        # With RePaint, `num_timesteps` includes the resampling.
        on_step(Step(index + 1, max(pipe.num_timesteps, index + 1), task, make_previews))
        return kwargs

    return report


@functools.cache
def sampling_jobs() -> queue.SimpleQueue:
    """
    Jobs for the one thread that samples. A thread of its own for each call would leave memory behind: torch and the
    allocator of the system keep some for each thread that ever computed.
    """
    jobs: queue.SimpleQueue = queue.SimpleQueue()

    def work_forever() -> None:
        while True:
            job = jobs.get()
            job()
            del job  # it holds images

    threading.Thread(target=work_forever, name="sampling", daemon=True).start()
    return jobs


def stream(work: Callable[[OnStep], T], seconds_between: float = SECONDS_BETWEEN_PREVIEWS) -> Iterator[Step | T]:
    r"""
    Runs `work` in the thread of `sampling_jobs`. Yields some of its steps and finally its result. If the iterator is
    closed (the visitor has left), `work` ends at its next step, and the next job starts then.

    Args:
        work (`Callable`): Takes a function that it must call after each step.
        seconds_between (`float`): Minimum time between two steps that are yielded.

    Raises:
        Exception: Any exception of `work`.
    """
    events: queue.Queue = queue.Queue()
    is_closed = threading.Event()
    last = -math.inf

    def on_step(step: Step) -> None:
        nonlocal last
        if is_closed.is_set():
            raise InterruptedError("The visitor has left.")
        if time.monotonic() - last >= seconds_between:
            step.previews  # noqa: B018 - made here, in the thread that samples
            events.put(step)
            last = time.monotonic()

    def run() -> None:
        try:
            if not is_closed.is_set():
                events.put(work(on_step))
        except Exception as error:
            events.put(error)  # raised again below, so that the page can show it

    sampling_jobs().put(run)
    try:
        while isinstance(event := events.get(), Step):
            yield event
        if isinstance(event, Exception):
            raise event
        yield event
    finally:
        is_closed.set()  # Gradio closes the iterator in the thread that serves everybody, so nothing waits here


def make_scheduler(scheduler: LearnedVarianceDDPMScheduler, sampler: str) -> SchedulerMixin:
    """A new scheduler with the noise schedule of `scheduler`."""
    scheduler_class = SAMPLERS[sampler]
    # The solvers of diffusers have no learned variance.
    options = {} if scheduler_class is LearnedVarianceDDPMScheduler else {"variance_type": None}
    return scheduler_class.from_config(scheduler.config, **options)


def watch(scheduler: SchedulerMixin, report: Callable[..., None]) -> None:
    """
    Makes a scheduler, and each copy that a pipeline makes of it, report the model output, the timestep, x_t and the
    predicted x_0 before each step.
    """
    step = scheduler.step.__func__

    @functools.wraps(step)  # including its signature, which pipelines inspect
    def watched(self, model_output, timestep, sample, *args, **kwargs):
        report(model_output, timestep, sample, predict_original(self, model_output, timestep, sample))
        return step(self, model_output, timestep, sample, *args, **kwargs)

    scheduler.step = types.MethodType(watched, scheduler)  # in a copy, bound to the copy


def predict_original(
    scheduler: SchedulerMixin, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """The predicted x_0, not clipped, for any scheduler whose samples are signal * x_0 + std * noise."""
    mean = model_output[:, : sample.shape[1]]
    signal, std = signal_and_std(scheduler, torch.as_tensor(timestep), scheduler.alphas_cumprod)
    signal, std = signal.to(sample), std.to(sample)
    predictions = {
        "epsilon": (sample - std * mean) / signal,
        "sample": mean,
        "v_prediction": signal * sample - std * mean,
    }
    return predictions[scheduler.config.prediction_type]


def check_number(value: Any, title: str, low: float, high: float, number_type: type) -> Any:
    """The value as a `number_type`. Raises a ValueError if it is not a number from `low` to `high`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or number_type(value) != value:
        kind = "an integer" if number_type is int else "a number"
        raise ValueError(f"{title} is {short(value)}. It must be {kind} from {low} to {high}.")
    return number_type(value)


def check_choice(value: Any, title: str, choices: list[str]) -> None:
    """Raises a ValueError if the value is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"There is no {title.lower()} {short(value)}. Choose one of: {', '.join(choices)}.")


def check_image(image: Image.Image | None) -> Image.Image:
    """The image. Raises a ValueError if there is none or if it is too large."""
    if image is None:
        raise ValueError("There is no image. Upload one first.")
    if max(image.size) > MAX_IMAGE_SIDE:
        width, height = image.size
        raise ValueError(f"The image has {width} x {height} pixels; at most {MAX_IMAGE_SIDE} per side are allowed.")
    return image


def short(value: Any) -> str:
    """The `repr` of a value for an error message, at most 60 characters long and without HTML tags."""
    # Gradio shows messages as HTML, and a link can carry any value.
    text = repr(value if not isinstance(value, str) else value[:60]).replace("<", "\\x3c")
    return text if len(text) <= 60 else text[:57] + "..."


def fit(image: Image.Image, size: int) -> Image.Image:
    """Centers an image on a white square and resizes it to `size`, as RGB."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.NEAREST)


def painted(layers: list[Image.Image]) -> Image.Image:
    """The opacity of the paint in each pixel, over all layers of an image editor (mode L)."""
    if not layers:
        raise ValueError("Nothing is drawn yet. Draw with the mouse or a finger first.")
    alphas = [np.array(check_image(layer).convert("RGBA").getchannel("A")) for layer in layers]
    if len({alpha.shape for alpha in alphas}) > 1:
        raise ValueError("The layers of the drawing differ in size. Clear it and draw again.")
    return Image.fromarray(np.max(alphas, axis=0))


def fit_mask(paint: Image.Image, size: int, coverage: float) -> Image.Image:
    """A mask (mode L), white where more than `coverage` of a pixel is painted; centered and resized like `fit`."""
    side = max(paint.size)
    square = Image.new("L", (side, side))
    square.paste(paint, ((side - paint.width) // 2, (side - paint.height) // 2))
    share = np.array(square.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
    return Image.fromarray(np.where(share > coverage, 255, 0).astype(np.uint8))


def fingerprint(folder: Path) -> str:
    """A hash of the weights and configs in a folder: twelve hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _to_images(samples: torch.Tensor) -> list[Image.Image]:
    """Converts samples `(batch_size, 3, height, width)` to images, clipped to [-1, 1]."""
    levels = ((samples.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in levels]
