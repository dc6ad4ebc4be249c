"""
CLIP guidance: sampling follows the similarity of the image to a prompt, as a CLIP model sees both (GLIDE, Nichol et al.
2021, https://huggingface.co/papers/2112.10741, section 2.4). GLIDE trained a CLIP on noisy images for it; here any CLIP
of clean images looks at the predicted x_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import ModelMixin

from ..ops.integers import check_integer
from .condition import SamplingCall
from .image_guidance import PixelGuidance
from .steering import UnitGradients
from .text import max_prompt_length, tokenize


# Means and standard deviations of the pixels that OpenAI's CLIP was trained with, in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Sides of cutouts, as shares of the image's.
CUTOUT_SHARES = (0.5, 1.0)


class CLIPGuidance(PixelGuidance):
    r"""
    Guides by the cosine similarity of image and prompt under a CLIP model, times `scale`. A score.

    Args:
        clip_model ([`~transformers.CLIPModel`], or a pair of [`~transformers.CLIPTextModelWithProjection`] and
            [`~transformers.CLIPVisionModelWithProjection`]): On the device of the pipeline.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of its text model.
        prompt (`str` or list of `str`, *optional*): One for all images, or one for each. `None`: those of the call.
        scale (`float`, defaults to 100.0): Strength.
        num_cutouts (`int`, defaults to 0): Number of random square cutouts of the image, half its side or larger, whose
            similarities are averaged; 0: the whole image. CLIP is fooled less easily by many of them.
        through_unet (`bool`, defaults to `False`), vae (`ModelMixin`, *optional*): See [`PixelGuidance`].
        image_mean, image_std (sequence of `float`): Of the pixels that the CLIP was trained with, in [0, 1]: those of
            its image processor.
        seed (`int`, defaults to 0): Random seed of the cutouts.

    Raises:
        ValueError: For a model without projections, and arguments out of range.
    """

    def __init__(
        self,
        clip_model: Any,
        tokenizer: Any,
        prompt: str | Sequence[str] | None = None,
        scale: float = 100.0,
        *,
        num_cutouts: int = 0,
        through_unet: bool = False,
        vae: ModelMixin | None = None,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        seed: int = 0,
    ):
        super().__init__(scale, through_unet, vae)
        is_pair = isinstance(clip_model, (tuple, list)) and len(clip_model) == 2
        text, vision = clip_model if is_pair else (clip_model, clip_model)
        if not hasattr(text, "text_projection") or not hasattr(vision, "visual_projection"):
            names = " and ".join(type(model).__name__ for model in dict.fromkeys((text, vision)))
            raise ValueError(
                f"`clip_model` is {names}, which does not project text and image to one space. Pass a `CLIPModel`, or "
                "`CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection` of one CLIP."
            )
        widths = text.text_projection.out_features, vision.visual_projection.out_features
        if widths[0] != widths[1]:
            raise ValueError(
                f"`clip_model` projects text to {widths[0]} numbers, but images to {widths[1]}: these are towers of "
                "two different CLIPs. Pass those of one."
            )
        check_integer("num_cutouts", num_cutouts, 0, ", which takes the whole image")
        if len(image_mean) != 3 or len(image_std) != 3 or not all(std > 0 for std in image_std):
            raise ValueError(
                f"`image_mean` is {image_mean!r} and `image_std` is {image_std!r}; pass three numbers each, those of "
                "the CLIP's image processor."
            )
        self.text, self.vision, self.tokenizer, self.prompt = text, vision, tokenizer, prompt
        self.num_cutouts, self.seed = num_cutouts, seed
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (image_mean, image_std))
        self.image_size: int = getattr(vision.config, "vision_config", vision.config).image_size
        # Those of a call, see `for_call`.
        self.text_features: torch.Tensor | None = None
        self.generator: torch.Generator | None = None

    def for_call(self, call: SamplingCall, conditions: Mapping[str, Any]) -> Self:
        """Encodes the prompts; raises a `ValueError` without any, and for images that are no colours."""
        own, channels = super().for_call(call, conditions), self.image_shape(call)[1]
        prompts = conditions.get("prompt") if self.prompt is None else self.prompt
        if prompts is None:
            raise ValueError(
                f"{self.name} has no `prompt`, and the call has none either. Pass one to {self.name}."
                + " (`prompt_embeds` of the call are states of its own text encoder.)" * ("prompt_embeds" in conditions)
            )
        if channels not in (1, 3):
            raise ValueError(
                f"{self.name} looks at grey or RGB images, but these have {channels} channels.{self.vae_hint}"
            )
        device = next(self.vision.parameters()).device
        if device != call.noise.device:
            raise ValueError(
                f"The CLIP of {self.name} is on {device}, but the pipeline on {call.noise.device}. Move it: "
                f'`clip_model.to("{call.noise.device}")`.'
            )
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        own.text_features = self.rows(self._encode(prompts), "prompt", call)
        own.mean, own.std = self.mean.to(call.noise), self.std.to(call.noise)
        own.generator = torch.Generator().manual_seed(self.seed)
        return own

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        """Normalised text embeddings, `(len(prompts), width)`."""
        model = self.text.text_model
        length = max_prompt_length(self.tokenizer, model)
        input_ids, attention_mask = tokenize(self.tokenizer, prompts, max_length=length, pad_to_max=True)
        device = next(self.text.parameters()).device
        with torch.no_grad():
            pooled = model(input_ids.to(device), attention_mask.to(device)).pooler_output
            return F.normalize(self.text.text_projection(pooled).float(), dim=1)

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, pred_original_sample: torch.Tensor, **conditions: Any
    ) -> torch.Tensor:
        """The scaled similarity of each image."""
        pixels = (self.pixels(pred_original_sample) + 1) / 2
        views = [self._resize(view) for view in self._cutouts(pixels)]
        inputs = (torch.cat(views).expand(-1, 3, -1, -1) - self.mean) / self.std
        unit = UnitGradients()
        pooled = self.vision.vision_model(unit.enter(inputs).to(self.vision.dtype)).pooler_output
        features = F.normalize(unit.leave(self.vision.visual_projection(pooled).to(pixels.dtype)), dim=1)
        similarities = (features.unflatten(0, (len(views), -1)) * self.text_features).sum(dim=2)
        return self.scale * similarities.mean(dim=0)

    def _cutouts(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        if not self.num_cutouts:
            return [pixels]
        height, width = pixels.shape[2:]
        low, high = CUTOUT_SHARES
        cutouts = []
        for share, top, left in torch.rand(self.num_cutouts, 3, generator=self.generator).tolist():
            side = max(1, round((low + share * (high - low)) * min(height, width)))
            y, x = round(top * (height - side)), round(left * (width - side))
            cutouts.append(pixels[:, :, y : y + side, x : x + side])
        return cutouts

    def _resize(self, pixels: torch.Tensor) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        if tuple(pixels.shape[2:]) == size:
            return pixels
        return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
