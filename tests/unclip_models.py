"""The networks of unCLIP at toy size, filled with random numbers; and Karlo's two pipelines, of diffusers' classes."""

import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline, UnCLIPTextProjModel
from toy_models import MAX_PROMPT_LENGTH, fill_randomly, toy_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)


EMBEDDING_WIDTH = 16
CONTEXT_WIDTH = 12
SIZE = 8
LARGE_SIZE = 16


def random_clip_text(seed: int = 0, width: int = EMBEDDING_WIDTH, cls: type = CLIPTextModelWithProjection):
    """For `toy_tokenizer()`."""
    config = CLIPTextConfig(
        vocab_size=len(toy_tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=MAX_PROMPT_LENGTH,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return fill_randomly(cls(config), seed)


def random_clip_vision(seed: int = 1, width: int = EMBEDDING_WIDTH, cls: type = CLIPVisionModelWithProjection):
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        projection_dim=width,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=SIZE,
        patch_size=4,
    )
    return fill_randomly(cls(config), seed)


def toy_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def random_prior(seed: int = 2, width: int = EMBEDDING_WIDTH, **config) -> PriorTransformer:
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=width,
        num_embeddings=MAX_PROMPT_LENGTH,
        **config,
    )
    fill_randomly(prior, seed)
    prior.clip_std.data = 0.5 + prior.clip_std.data.abs()
    return prior


def random_text_projection(seed: int = 3, width: int = EMBEDDING_WIDTH) -> UnCLIPTextProjModel:
    # With 4 tokens there are as many states as pixels in the middle, for which diffusers does not pad the mask.
    projection = UnCLIPTextProjModel(
        clip_extra_context_tokens=3, clip_embeddings_dim=width, time_embed_dim=32, cross_attention_dim=CONTEXT_WIDTH
    )
    return fill_randomly(projection, seed)


KARLO_CONFIG = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": CONTEXT_WIDTH,
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
    "class_embed_type": "identity",
    "norm_num_groups": 4,
}


def gently(unet: torch.nn.Module, scale: float = 0.1) -> torch.nn.Module:
    """
    Scales the output of a random network: with outputs of unit size that have nothing to do with its input, sampling
    amplifies rounding errors a hundredfold and more.
    """
    unet.conv_out.weight.data *= scale
    unet.conv_out.bias.data *= scale
    return unet


def random_karlo_decoder(seed: int = 4, **config) -> UNet2DConditionModel:
    return gently(fill_randomly(UNet2DConditionModel(**{**KARLO_CONFIG, **config}), seed))


def random_karlo_upsampler(seed: int) -> UNet2DModel:
    unet = UNet2DModel(
        sample_size=LARGE_SIZE,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=4,
    )
    return gently(fill_randomly(unet, seed))


def prior_scheduler() -> UnCLIPScheduler:
    return UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)


def karlo_components(variation: bool = False) -> dict[str, object]:
    """The components of Karlo's text-to-image pipeline, or those of its image variation pipeline."""
    components = {
        "decoder": random_karlo_decoder(),
        "text_encoder": random_clip_text(),
        "tokenizer": toy_tokenizer(),
        "text_proj": random_text_projection(),
        "super_res_first": random_karlo_upsampler(5),
        "super_res_last": random_karlo_upsampler(6),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }
    if variation:
        return {**components, "image_encoder": random_clip_vision(), "feature_extractor": toy_image_processor()}
    return {**components, "prior": random_prior(), "prior_scheduler": prior_scheduler()}


def karlo_pipeline() -> UnCLIPPipeline:
    pipe = UnCLIPPipeline(**karlo_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def karlo_variation_pipeline() -> UnCLIPImageVariationPipeline:
    pipe = UnCLIPImageVariationPipeline(**karlo_components(variation=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
