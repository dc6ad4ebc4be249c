"""
A CLIP image embedding as the condition of an unCLIP decoder, together with the text (Ramesh et al. 2022,
https://huggingface.co/papers/2204.06125, section 2.1): the embedding is replaced by a learned one, and the text by the
empty one, in some training examples, and in the unconditional pass of classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..models.unclip_projection import UnCLIPProjectionModel
from ..ops.finiteness import count_not_finite
from .condition import Condition, PreparedCondition, SamplingCall, UNetInputs
from .text import TextCondition, TextConditioning, cross_attention_width, pad_texts, text_model_kwargs


# Makes the embeddings of a call, `(num_images, width)`, such as a prior. It may draw noise from the call's generators.
EmbeddingSource = Callable[[SamplingCall], torch.Tensor]
# Makes the embeddings of training images, `(batch_size, channels, height, width)` in [-1, 1].
ImageEncoder = Callable[[torch.Tensor], torch.Tensor]


def check_projection(projection_config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> None:
    """Raises a `ValueError` if a U-Net does not take what a projection of image embeddings gives it."""
    width, kind = projection_config["time_embed_dim"], unet_config.get("class_embed_type")
    if (width is not None) != (kind == "identity"):
        fix = (
            '`class_embed_type="identity"`, and leave `num_class_embeds` out'
            if width is not None
            else "`class_embed_type` to null, or give the projection a `time_embed_dim`"
        )
        raise ValueError(
            f"The projection has `time_embed_dim={width}`, but the U-Net has `class_embed_type={kind!r}`, which must "
            f"be 'identity' for vectors that are added to the embedding of the timestep, and only then. Set {fix}."
        )
    time_embed_dim = unet_config.get("time_embedding_dim") or 4 * unet_config["block_out_channels"][0]
    if width not in (None, time_embed_dim):
        raise ValueError(
            f"The projection has `time_embed_dim={width}`, but the U-Net's embedding of the timestep has "
            f"{time_embed_dim} numbers. Use a projection that was made for this U-Net."
        )
    given = projection_config["cross_attention_dim"]
    if not projection_config["clip_extra_context_tokens"] and projection_config["text_conditioning"] is None:
        given = None
    wanted = cross_attention_width(unet_config)
    if given != wanted:
        has = "has no cross-attention" if wanted is None else f"attends to states of width {wanted}"
        gives = "gives no states" if given is None else f"gives states of width {given} (`cross_attention_dim`)"
        raise ValueError(f"The projection {gives}, but the U-Net {has}. Use a projection that was made for this U-Net.")


class ImageEmbeddingCondition(Condition):
    """
    The image embedding, and the text if the decoder has one, which this condition joins: the text's own condition is
    not a further one of the call.

    Args:
        projection (`UnCLIPProjectionModel`): May be wrapped for distributed training.
        text (`TextCondition`, *optional*): The text, if the projection has `text_conditioning`. After `read` in a call.
        dropout_prob (`float`, defaults to 0.0): Share of the embeddings that training replaces by the learned one.
        image_encoder (callable, *optional*): For training: makes the embeddings of batches that do not hold them.

    Attributes:
        image_embeds (`torch.Tensor` of shape `(num_images, width)`, *optional*): Those of the call, after
            `before_noise`.
    """

    argument = "image_embeds"
    is_droppable = True

    def __init__(
        self,
        projection: UnCLIPProjectionModel | torch.nn.Module,
        text: TextCondition | None = None,
        *,
        dropout_prob: float = 0.0,
        image_encoder: ImageEncoder | None = None,
    ):
        super().__init__()
        self.projection, self.text, self.dropout_prob = projection, text, dropout_prob
        self.image_encoder = image_encoder
        self.given: torch.Tensor | None = None
        self.source: EmbeddingSource | None = None
        self.image_embeds: torch.Tensor | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """Config of the projection."""
        unwrapped: Any = getattr(self.projection, "module", self.projection)
        return unwrapped.config

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """
        Reads `image_embeds` `(batch_size, clip_embeddings_dim)`, or encodes the `images` of the batch without them; and
        the captions of the text's condition.
        """
        image_embeds = batch.get("image_embeds")
        if image_embeds is None:
            image_embeds = self.image_encoder(batch["images"])
        text = None if self.text is None else self.text.training_text(batch)
        dropped = torch.rand(len(image_embeds), device=image_embeds.device) < self.dropout_prob
        return self._inputs(image_embeds, text, dropped)

    def read(
        self, image_embeds: torch.Tensor | None = None, source: EmbeddingSource | None = None
    ) -> ImageEmbeddingCondition:
        """
        Takes the embeddings of a call: given ones, `(number, width)`, what makes them, or neither, for the learned one.
        Raises a `ValueError` for embeddings of another shape, or that are not finite.
        """
        self.given, self.source = image_embeds, source
        if image_embeds is not None:
            width = self.config["clip_embeddings_dim"]
            if not torch.is_tensor(image_embeds):
                raise ValueError(
                    f"`image_embeds` is a {type(image_embeds).__name__}; pass a `torch.Tensor` of shape "
                    f"`(number, {width})`."
                )
            if image_embeds.ndim != 2 or image_embeds.shape[1] != width or not len(image_embeds):
                raise ValueError(
                    f"`image_embeds` has shape {tuple(image_embeds.shape)}; this decoder takes `(number, {width})`, "
                    "the width of the image embeddings of the CLIP that it was trained with."
                )
            bad = count_not_finite(image_embeds, "images")
            if bad is not None:
                raise ValueError(f"`image_embeds` holds NaN or infinity for {bad}. Encode these images again.")
            if len(image_embeds) > 1:
                self.counts = {"image_embeds": len(image_embeds)}
        if self.text is not None:
            self.counts |= self.text.counts
        self.is_given = image_embeds is not None or source is not None or (self.text is not None and self.text.is_given)
        return self

    def before_noise(self, call: SamplingCall) -> None:
        """Makes the embeddings, with the noise of a prior if there is one."""
        if self.given is not None:
            self.image_embeds = call.rows(self.given.to(call.noise.device, call.unet_dtype))
        elif self.source is not None:
            self.image_embeds = self.source(call).to(call.unet_dtype)

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """The joined embeddings and texts; in the unconditional pass the learned embedding and the negative text."""
        number, device = len(call.noise), call.noise.device
        image_embeds = self.image_embeds
        if image_embeds is None:
            width = self.config["clip_embeddings_dim"]
            image_embeds = torch.zeros(number, width, device=device, dtype=call.unet_dtype)
        is_null = torch.full((number,), self.image_embeds is None, device=device)
        text, negative = (None, None) if self.text is None else self.text.texts(call)
        if self.text is not None and negative is None:
            return PreparedCondition(self._inputs(image_embeds, text, is_null), None)
        if text is not None:
            text, negative = pad_texts(text, negative)
        unconditional = self._inputs(image_embeds, negative, torch.ones_like(is_null))
        return PreparedCondition(self._inputs(image_embeds, text, is_null), unconditional)

    def for_guidance(self, call: SamplingCall) -> dict[str, Any]:
        """`image_embeds`, and the text: that of the decoder, or that of the prior for a decoder without text."""
        given: dict[str, Any] = {} if self.image_embeds is None else {"image_embeds": self.image_embeds}
        source = self.source if self.text is None else self.text
        return given | source.for_guidance(call) if hasattr(source, "for_guidance") else given

    def without_effect(self, num_steps: int, may_guide: bool, uses_classifier: bool) -> list[str]:
        """Those of the text, unless the prior uses the negative one."""
        if self.text is None or getattr(self.source, "uses_negative_prompt", False):
            return []
        return self.text.without_effect(num_steps, may_guide, uses_classifier)

    def _inputs(self, image_embeds: torch.Tensor, text: TextConditioning | None, dropped: torch.Tensor) -> UNetInputs:
        is_clip = self.config["text_conditioning"] == "clip"
        output = self.projection(
            image_embeds,
            None if text is None else text.hidden_states,
            None if text is None else text.attention_mask,
            text.pooled if is_clip and text is not None else None,
            dropped,
        )
        inputs = {
            "class_labels": output.time_embeds,
            "encoder_hidden_states": output.encoder_hidden_states,
            "encoder_attention_mask": output.encoder_attention_mask,
        }
        if text is not None:  # a pooled text that the U-Net itself adds to its embedding of the timestep, as GLIDE's
            inputs["added_cond_kwargs"] = text_model_kwargs(text, self.text.unet_config).get("added_cond_kwargs")
        return UNetInputs({name: value for name, value in inputs.items() if value is not None})
