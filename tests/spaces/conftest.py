"""Toy versions of the models of the Space; makes the app importable."""

import sys
from pathlib import Path

import pytest
from toy_models import (
    CONDITIONAL,
    fill_randomly,
    random_classifier,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)
from unclip_models import CONTEXT_WIDTH, EMBEDDING_WIDTH, random_clip_vision, toy_image_processor

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
    LearnedVarianceDDPMScheduler,
    UnCLIPProjectionModel,
)
from diffusers_adm.schedulers.noise_schedules import noise_schedule_of


SPACES = Path(__file__).parents[2] / "spaces"
CATEGORIES = {0: "cats", 1: "dogs", 2: "hats", 3: "mats"}
sys.path.insert(0, str(SPACES))


def toy_unclip() -> ADMUnCLIPPipeline:
    """Takes only the embedding of an image, in both places."""
    unet = random_text_unet("added_kv", seed=3, cross_attention_dim=CONTEXT_WIDTH, class_embed_type="identity")
    projection = UnCLIPProjectionModel(
        clip_embeddings_dim=EMBEDDING_WIDTH,
        time_embed_dim=4 * unet.config.block_out_channels[0],
        cross_attention_dim=CONTEXT_WIDTH,
        text_conditioning=None,
    )
    components = dict.fromkeys(ADMUnCLIPPipeline._optional_components)
    components |= {"image_encoder": random_clip_vision(), "feature_extractor": toy_image_processor()}
    return ADMUnCLIPPipeline(unet, LearnedVarianceDDPMScheduler(), fill_randomly(projection, seed=4), **components)


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    unet = random_text_unet("added_kv", **CONDITIONAL)
    parts = {"text_encoder": random_text_encoder(), "tokenizer": toy_tokenizer(), "vae": None}
    classifier = random_classifier(num_classes=len(CATEGORIES))
    scheduler = LearnedVarianceDDPMScheduler()
    ADMPipeline(unet, scheduler, classifier=classifier, id2label=CATEGORIES, **parts).save_pretrained(folder / "base")
    upsampler = ADMSuperResolutionPipeline(
        random_unet(seed=1, sample_size=16, in_channels=6),
        scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        classifier=None,
        low_res_size=8,
        noise_schedule=noise_schedule_of(scheduler),
    )
    upsampler.save_pretrained(folder / "upsampler")
    fill_randomly(AdaGNControlNetModel.from_unet(unet), seed=2).save_pretrained(folder / "controlnet")
    toy_unclip().save_pretrained(folder / "unclip")
    return folder
