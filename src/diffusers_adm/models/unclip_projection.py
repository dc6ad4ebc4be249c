"""
UnCLIPProjectionModel: projects a CLIP image embedding to the inputs of an unCLIP decoder.

Ramesh et al. 2022 (unCLIP, https://huggingface.co/papers/2204.06125, section 2.1): the embedding is added to the
embedding of the timestep, and becomes further tokens of context next to the states of the text. Parameters and config
keys have the names of diffusers' `UnCLIPTextProjModel`, so that the `text_proj` of Karlo's repositories loads with
`from_pretrained`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from .config_checks import check_counts
from .input_checks import check_shape
from .loading import WholeModelMixin


TextConditioningType = Literal["clip", "states"]


# Not a `BaseOutput` of diffusers: Accelerate rebuilds outputs under mixed precision, which those lose a missing first
# entry by.
class UnCLIPProjectionOutput(NamedTuple):
    """
    The inputs of a decoder.

    Attributes:
        time_embeds (`torch.Tensor` of shape `(batch_size, time_embed_dim)`, *optional*): Added to the embedding of the
            timestep: the `class_labels` of a U-Net with `class_embed_type="identity"`.
        encoder_hidden_states (`torch.Tensor` of shape `(batch_size, length, cross_attention_dim)`, *optional*): The
            tokens of the embedding and, after them, the states of the text.
        encoder_attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): 1 for states to attend to.
    """

    time_embeds: torch.Tensor | None = None
    encoder_hidden_states: torch.Tensor | None = None
    encoder_attention_mask: torch.Tensor | None = None


class UnCLIPProjectionModel(WholeModelMixin, ConfigMixin):
    r"""
    Projects image embeddings, and joins them with a text.

    Args:
        clip_extra_context_tokens (`int`, defaults to 4): Tokens of context made of each embedding; 0: none.
        clip_embeddings_dim (`int`, defaults to 768): Width of the embeddings.
        time_embed_dim (`int`, *optional*): Width of the U-Net's embedding of the timestep, 4 times its first
            `block_out_channels`. `None`: nothing is added to it.
        cross_attention_dim (`int`, *optional*): Width of the states that the U-Net takes. `None`: it takes none.
        text_conditioning (`str`, *optional*, defaults to `"clip"`): `"clip"`: the states of CLIP's text encoder are
            projected and normalised, and its text embedding is added to the embedding of the timestep (Karlo).
            `"states"`: the states of any encoder follow the tokens as they are, projected if their width is another one
            (the paper, whose encoder is that of GLIDE). `None`: there is no text.
        text_states_dim (`int`, *optional*): Width of the states of the text. `None`: `clip_embeddings_dim` for
            `"clip"`, `cross_attention_dim` for `"states"`.

    Raises:
        ValueError: For numbers below 1 (0 for the tokens), an unknown `text_conditioning`, or if neither time
            embedding nor tokens are left.
    """

    @register_to_config
    def __init__(
        self,
        clip_extra_context_tokens: int = 4,
        clip_embeddings_dim: int = 768,
        time_embed_dim: int | None = None,
        cross_attention_dim: int | None = None,
        text_conditioning: TextConditioningType | None = "clip",
        text_states_dim: int | None = None,
    ):
        super().__init__()
        check_counts(self.config)
        numbers = {
            "clip_embeddings_dim": clip_embeddings_dim,
            "time_embed_dim": time_embed_dim,
            "cross_attention_dim": cross_attention_dim,
            "text_states_dim": text_states_dim,
        }
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"`{name}` is {number}; it must be at least 1.")
        if clip_extra_context_tokens < 0:
            raise ValueError(f"`clip_extra_context_tokens` is {clip_extra_context_tokens}; it must be at least 0.")
        if text_conditioning not in (None, *get_args(TextConditioningType)):
            raise ValueError(
                f"`text_conditioning` is {text_conditioning!r}; it must be None or one of "
                f"{list(get_args(TextConditioningType))}."
            )
        if time_embed_dim is None and (cross_attention_dim is None or clip_extra_context_tokens == 0):
            raise ValueError(
                "`time_embed_dim` is None, and there are no tokens (`cross_attention_dim` "
                f"{cross_attention_dim}, `clip_extra_context_tokens` {clip_extra_context_tokens}): the image embedding "
                "would have no effect. Set one of them."
            )
        if text_conditioning is not None and cross_attention_dim is None:
            raise ValueError(
                f"`text_conditioning` is {text_conditioning!r}, but `cross_attention_dim` is None. Set it to the width "
                "of the U-Net's states, or `text_conditioning` to None."
            )
        has_clip_text = text_conditioning == "clip"
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(clip_embeddings_dim))
        self.clip_image_embeddings_project_to_time_embeddings = self.embedding_proj = None
        if time_embed_dim is not None:
            self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(clip_embeddings_dim, time_embed_dim)
            if has_clip_text:
                self.embedding_proj = nn.Linear(clip_embeddings_dim, time_embed_dim)
        self.clip_extra_context_tokens_proj = None
        if cross_attention_dim is not None and clip_extra_context_tokens > 0:
            self.clip_extra_context_tokens_proj = nn.Linear(
                clip_embeddings_dim, clip_extra_context_tokens * cross_attention_dim
            )
        self.encoder_hidden_states_proj = self.text_encoder_hidden_states_norm = None
        if text_conditioning is not None:
            states_dim = self.states_width
            if has_clip_text or states_dim != cross_attention_dim:
                self.encoder_hidden_states_proj = nn.Linear(states_dim, cross_attention_dim)
            if has_clip_text:
                self.text_encoder_hidden_states_norm = nn.LayerNorm(cross_attention_dim)

    @property
    def states_width(self) -> int | None:
        """Width of the states of the text; `None`: the projection takes none."""
        config = self.config
        if config.text_conditioning is None:
            return None
        default = config.clip_embeddings_dim if config.text_conditioning == "clip" else config.cross_attention_dim
        return config.text_states_dim or default

    def null_image_embeds(self, batch_size: int) -> torch.Tensor:
        """The learned embedding in the place of a dropped one, `(batch_size, clip_embeddings_dim)`."""
        return self.learned_classifier_free_guidance_embeddings.expand(batch_size, -1)

    def forward(
        self,
        image_embeds: torch.Tensor,
        text_states: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
    ) -> UnCLIPProjectionOutput:
        r"""
        Args:
            image_embeds (`torch.Tensor` of shape `(batch_size, clip_embeddings_dim)`): As CLIP gives them, not
                normalised.
            text_states (`torch.Tensor` of shape `(batch_size, length, text_states_dim)`, *optional*): One state a
                token, if there is a text.
            text_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): 1 for tokens, 0 for padding; `None`:
                the U-Net attends to all.
            text_embeds (`torch.Tensor` of shape `(batch_size, clip_embeddings_dim)`, *optional*): CLIP's text
                embedding, for `text_conditioning="clip"`.
            dropped (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): Image embeddings to replace by the
                learned one.

        Raises:
            ValueError: For embeddings of another width, or if text is missing or given without need.
        """
        check_shape("image_embeds", image_embeds, ("batch_size", self.config.clip_embeddings_dim))
        kind, batch_size = self.config.text_conditioning, len(image_embeds)
        for name, value, wanted in (
            ("text_states", text_states, kind is not None),
            ("text_embeds", text_embeds, kind == "clip"),
        ):
            if (value is not None) != wanted:
                raise ValueError(
                    f"`{name}` is {'given' if value is not None else 'missing'}, but this projection has "
                    f"`text_conditioning={kind!r}`. {'Pass it' if wanted else 'Leave it out'}."
                )
        if dropped is not None:
            null = self.null_image_embeds(batch_size).to(image_embeds.dtype)
            image_embeds = torch.where(dropped[:, None], null, image_embeds)
        time_embeds = tokens = None
        if self.clip_image_embeddings_project_to_time_embeddings is not None:
            time_embeds = self.clip_image_embeddings_project_to_time_embeddings(image_embeds)
            if self.embedding_proj is not None:
                time_embeds = time_embeds + self.embedding_proj(text_embeds)
        if self.clip_extra_context_tokens_proj is not None:
            # Width first, tokens last, as in the published weights.
            tokens = self.clip_extra_context_tokens_proj(image_embeds)
            tokens = tokens.reshape(batch_size, -1, self.config.clip_extra_context_tokens).transpose(1, 2)
        if text_states is not None and self.encoder_hidden_states_proj is not None:
            text_states = self.encoder_hidden_states_proj(text_states)
        if text_states is not None and self.text_encoder_hidden_states_norm is not None:
            text_states = self.text_encoder_hidden_states_norm(text_states)
        states = [part for part in (tokens, text_states) if part is not None]
        if text_mask is not None and tokens is not None:
            text_mask = F.pad(text_mask, (self.config.clip_extra_context_tokens, 0), value=1)
        return UnCLIPProjectionOutput(
            time_embeds=time_embeds,
            encoder_hidden_states=torch.cat(states, dim=1) if states else None,
            encoder_attention_mask=text_mask,
        )
