"""Real networks of toy size, filled with random numbers: as constructed they predict 0, and no test could fail."""

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from diffusers_adm import AdaGNClassifierModel, AdaGNUNet2DModel, GLIDETextModel


TOY_CONFIG = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "attention_head_dim": 8,
}
CONDITIONAL = {"num_class_embeds": 5, "null_class_id": 4}
TOY_CLASSIFIER_CONFIG = {
    "sample_size": 8,
    "num_classes": 5,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
# `AutoencoderKL` with latents of half the size.
TOY_AUTOENCODER_CONFIG = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 4,
    "latent_channels": 2,
}
# Both kinds of cross-attention; text states are `TEXT_WIDTH` wide.
TEXT_WIDTH = 16
TEXT_CONFIGS = {
    "transformer": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    },
    "added_kv": {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
    },
}
WORDS = ("a", "the", "red", "green", "cat", "dog", "on", "mat", "with", "hat")
MAX_PROMPT_LENGTH = 12


def fill_randomly(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Outputs of about unit size that depend on every input."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim <= 1:
            parameter.data = 0.1 * noise + ("norm" in name.lower() and name.endswith("weight"))
        elif "class_embedding" in name:
            parameter.data = noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    return model.eval()


def random_unet(seed: int = 0, **config) -> AdaGNUNet2DModel:
    return fill_randomly(AdaGNUNet2DModel(**{**TOY_CONFIG, **config}), seed)


def random_classifier(seed: int = 0, **config) -> AdaGNClassifierModel:
    return fill_randomly(AdaGNClassifierModel(**{**TOY_CLASSIFIER_CONFIG, **config}), seed)


def random_diffusers_unet(seed: int = 0, **config) -> UNet2DModel:
    return fill_randomly(UNet2DModel(**{**TOY_CONFIG, **config}), seed)


def random_text_unet(kind: str = "transformer", seed: int = 0, **config) -> AdaGNUNet2DModel:
    return random_unet(seed, **{**TEXT_CONFIGS[kind], **config})


def random_diffusers_text_unet(kind: str = "transformer", seed: int = 0, **config) -> UNet2DConditionModel:
    config = {**TOY_CONFIG, **TEXT_CONFIGS[kind], **config}
    del config["attn_norm_num_groups"]
    return fill_randomly(UNet2DConditionModel(**config), seed)


def toy_tokenizer(kind: str = "clip", max_length: int = MAX_PROMPT_LENGTH) -> PreTrainedTokenizerFast:
    """One token a word of `WORDS`, between the special tokens of CLIP, BERT or T5; GLIDE has none but padding."""
    before, after, padding = {
        "clip": ("<start>", "<end>", "<end>"),
        "bert": ("[CLS]", "[SEP]", "[PAD]"),
        "t5": (None, "</s>", "<pad>"),
        "glide": (None, None, "<end>"),
    }[kind]
    special = [token for token in dict.fromkeys((padding, before, after, "<unknown>")) if token]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (before, "$A", after) if part),
        special_tokens=[(token, vocabulary[token]) for token in (before, after) if token],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token=padding,
        bos_token=before,
        eos_token=after,
        unk_token="<unknown>",
    )


def random_text_encoder(kind: str = "clip", seed: int = 0, width: int = TEXT_WIDTH) -> PreTrainedModel | GLIDETextModel:
    """For `toy_tokenizer(kind)`: states that depend on every token they see."""
    size = len(toy_tokenizer(kind))
    common = {"vocab_size": size, "hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
    common |= {"num_hidden_layers": 2, "max_position_embeddings": MAX_PROMPT_LENGTH}
    if kind == "clip":
        model = CLIPTextModel(CLIPTextConfig(**common, bos_token_id=1, eos_token_id=0, pad_token_id=0))
    elif kind == "bert":
        model = BertModel(BertConfig(**common))
    elif kind == "glide":
        del common["intermediate_size"]
        time_embed_dim = 4 * TOY_CONFIG["block_out_channels"][0]
        model = GLIDETextModel(**common, projection_dim=time_embed_dim)
    else:
        config = T5Config(vocab_size=size, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
        model = T5EncoderModel(config)
    return fill_randomly(model, seed)
