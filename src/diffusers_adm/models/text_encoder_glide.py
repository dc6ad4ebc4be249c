"""
GLIDETextModel: the text transformer of GLIDE, trained together with the U-Net that it conditions.

GLIDE (Nichol et al. 2021, https://huggingface.co/papers/2112.10741), section 3.1: a transformer over the tokens of a
caption. The states of its last layer go to every attention layer of the U-Net as added keys and values, and the state
of the last token, projected, is added to the time embedding.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from .config_checks import check_counts
from .input_checks import check_shape
from .loading import WholeModelMixin


# Those of CLIP's text transformer (https://huggingface.co/papers/2103.00020), the basis of GLIDE's; GPT-2's are alike.
TOKEN_STD, POSITION_STD = 0.02, 0.01
# That of all layers of GPT-2. CLIP's (width ** -0.5) would give the pooled text unit variance, several times that of a
# new time embedding, to which it is added: at the start the caption would dominate the timestep.
PROJECTION_STD = 0.02


class GLIDETextEmbeddings(nn.Module):
    """Embedding of a word and its position, or the padding vector of that position."""

    def __init__(self, vocab_size: int, hidden_size: int, length: int, use_padding_embedding: bool):
        super().__init__()
        self.length = length
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=TOKEN_STD)
        self.position_embedding = nn.Parameter(POSITION_STD * torch.randn(length, hidden_size))
        # As large as the embedding of a word with its position.
        std = (TOKEN_STD**2 + POSITION_STD**2) ** 0.5
        self.padding_embedding = nn.Parameter(std * torch.randn(length, hidden_size)) if use_padding_embedding else None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        check_shape("input_ids", input_ids, ("batch_size", self.length))
        if attention_mask is not None:
            check_shape("attention_mask", attention_mask, tuple(input_ids.shape))
        hidden_states = self.token_embedding(input_ids) + self.position_embedding  # (B, L, C)
        if self.padding_embedding is not None and attention_mask is not None:
            hidden_states = torch.where(attention_mask.bool()[..., None], hidden_states, self.padding_embedding)
        return hidden_states


class GLIDETextLayer(nn.Module):
    """
    Self-attention over all positions (neither causal nor masked), then two linear layers; each after a layer norm and
    added to its input. With half-precision states, `nn.LayerNorm` computes mean and variance in float32, and the
    attention functions their softmax.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, num_layers: int):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.norm1 = nn.LayerNorm(hidden_size)
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.linear1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.act = nn.GELU()  # exact, not the tanh or sigmoid approximations of GPT-2 and CLIP
        self.linear2 = nn.Linear(4 * hidden_size, hidden_size)

        # As in CLIP: outputs keep the scale of their inputs, and the two additions of each layer to the residual stream
        # sum up to that scale for any number of layers.
        std = hidden_size**-0.5
        residual_std = std * (2 * num_layers) ** -0.5
        for linear in (self.to_q, self.to_k, self.to_v):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.linear1.weight, std=(2 * hidden_size) ** -0.5)
        for linear in (self.to_out, self.linear2):
            nn.init.normal_(linear.weight, std=residual_std)
        for linear in (self.to_q, self.to_k, self.to_v, self.to_out, self.linear1, self.linear2):
            nn.init.zeros_(linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(hidden_states)  # (B, L, C)
        query, key, value = (
            linear(normed).unflatten(-1, (self.num_attention_heads, -1)) for linear in (self.to_q, self.to_k, self.to_v)
        )
        hidden_states = hidden_states + self.to_out(dispatch_attention_fn(query, key, value).flatten(2))
        return hidden_states + self.linear2(self.act(self.linear1(self.norm2(hidden_states))))


# `PeftAdapterMixin`: pipelines call `set_adapters`, `fuse_lora` and so on for each of their diffusers models.
class GLIDETextModel(WholeModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    The text transformer of GLIDE (Nichol et al. 2021, https://huggingface.co/papers/2112.10741). The defaults are those
    of the published base model.

    All captions have the same length, and padding is attended to like words: each padded position has a learned vector.
    So cross-attention to the states takes no mask.

    Args:
        vocab_size (`int`, defaults to 50257): Number of tokens.
        hidden_size (`int`, defaults to 512): Width of the states.
        num_hidden_layers (`int`, defaults to 16): Transformer layers.
        num_attention_heads (`int`, defaults to 8): Heads of each layer; divides `hidden_size`.
        max_position_embeddings (`int`, defaults to 128): Length of all captions, padding included.
        projection_dim (`int`, defaults to 768): Width of the pooled text: that of the U-Net's time embedding, usually
            `4 * block_out_channels[0]`.
        use_padding_embedding (`bool`, defaults to `True`): Learn the vectors of padded positions. `False`: padding is
            the tokenizer's padding token, embedded like any other, and `attention_mask` has no effect.
        use_final_layer_norm (`bool`, defaults to `True`): A layer norm after the last layer.

    Raises:
        ValueError: If `num_attention_heads` does not divide `hidden_size`.
    """

    # Tells `diffusers_adm.conditioning.text` to pad captions to full length and to give the U-Net no mask.
    attends_to_padding = True
    _supports_gradient_checkpointing = True
    _no_split_modules = ["GLIDETextEmbeddings", "GLIDETextLayer"]
    _repeated_blocks = ["GLIDETextLayer"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 50257,
        hidden_size: int = 512,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 128,
        projection_dim: int = 768,
        use_padding_embedding: bool = True,
        use_final_layer_norm: bool = True,
    ):
        super().__init__()
        check_counts(self.config)
        for name in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            if self.config[name] < 1:  # torch builds a network without them
                raise ValueError(f"`{name}` is {self.config[name]}; it must be at least 1.")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` is {num_attention_heads}; it must divide `hidden_size`, {hidden_size}."
            )
        self.embeddings = GLIDETextEmbeddings(vocab_size, hidden_size, max_position_embeddings, use_padding_embedding)
        self.layers = nn.ModuleList(
            GLIDETextLayer(hidden_size, num_attention_heads, num_hidden_layers) for _ in range(num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(hidden_size) if use_final_layer_norm else None
        self.text_projection = nn.Linear(hidden_size, projection_dim)
        nn.init.normal_(self.text_projection.weight, std=PROJECTION_STD)
        nn.init.zeros_(self.text_projection.bias)
        self.gradient_checkpointing = False

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Encode captions.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, max_position_embeddings)`): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, max_position_embeddings)`, *optional*): 1 or `True`
                for words, 0 or `False` for padding; all may be padding. `None`: all are words.

        Returns:
            `tuple` of two `torch.Tensor`: the states, `(batch_size, max_position_embeddings, hidden_size)`, those of
            padding included, and the pooled text, `(batch_size, projection_dim)`: the state of the last position,
            projected.

        Raises:
            ValueError: If the captions have another length, or the mask has another shape than the tokens.
        """
        hidden_states = self.embeddings(input_ids, attention_mask)  # (B, L, C)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states)
            else:
                hidden_states = layer(hidden_states)
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states, self.text_projection(hidden_states[:, -1])
