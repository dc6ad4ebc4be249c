"""ADMPipeline with GLIDE's text transformer, whose padding is read and whose pooled text is added to the time."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from tolerances import SAMPLING, rounding_errors
from toy_models import MAX_PROMPT_LENGTH, WORDS, random_text_encoder, random_text_unet, toy_tokenizer

from diffusers_adm import ADMPipeline, GLIDETextModel, LearnedVarianceDDPMScheduler


ARGUMENTS = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture
def pipe() -> ADMPipeline:
    pipe = ADMPipeline(
        unet=random_text_unet("added_kv", addition_embed_type="text_embeds"),
        scheduler=LearnedVarianceDDPMScheduler(),
        vae=None,
        text_encoder=random_text_encoder("glide"),
        tokenizer=toy_tokenizer("glide"),
        classifier=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def conditioning(encoder: GLIDETextModel, prompt: str, first_is_seen: bool = False) -> dict:
    """Numbers and mask put together by hand: there are two special tokens, padding (0) first, then the words."""
    words = [2 + WORDS.index(word) for word in prompt.split()]
    padding = MAX_PROMPT_LENGTH - len(words)
    mask = [1] * len(words) + [0] * padding
    mask[0] |= first_is_seen
    states, pooled = encoder(torch.tensor([words + [0] * padding]), torch.tensor([mask]))
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled}}


@torch.no_grad()
def sample(pipe: ADMPipeline, cond: dict, uncond: dict, scale: float) -> torch.Tensor:
    """Ancestral steps, two passes of their own in each; the formula of guidance in float64."""
    scheduler, generator = LearnedVarianceDDPMScheduler(), seeded()
    scheduler.set_timesteps(3)
    image = torch.randn((1, 3, 8, 8), generator=generator)
    for t in scheduler.timesteps:
        output, null = (pipe.unet(image, t, **kwargs).sample.double() for kwargs in (cond, uncond))
        mean = null[:, :3] + scale * (output[:, :3] - null[:, :3])
        output = torch.cat([mean, output[:, 3:]], dim=1).float()
        image = scheduler.step(output, t, image, generator=generator).prev_sample
    return image


@torch.no_grad()
def test_equals_a_loop_written_by_hand(pipe):
    cond, uncond = (conditioning(pipe.text_encoder, prompt) for prompt in ("a red cat", ""))
    expected = sample(pipe, cond, uncond, 3.0)
    actual = pipe("a red cat", guidance_scale=3.0, generator=seeded(), **ARGUMENTS).images
    # The first of these steps multiplies errors by 157, guidance by 3.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    # As long as one padding of the empty prompt passed for a word, this is what was guided away from.
    wrong = conditioning(pipe.text_encoder, "", first_is_seen=True)
    assert (sample(pipe, cond, wrong, 3.0) - expected).abs().max() > 0.03


@torch.no_grad()
def test_prompts_do_not_depend_on_each_other(pipe):
    prompts = ["a cat", "", "the red dog with a green hat on the mat a cat a cat"]
    together = pipe(prompts, guidance_scale=2.0, generator=[seeded() for _ in prompts], **ARGUMENTS).images
    for image, prompt in zip(together, prompts, strict=True):
        alone = pipe(prompt, guidance_scale=2.0, generator=seeded(), **ARGUMENTS).images[0]
        torch.testing.assert_close(image, alone, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_embeddings_made_before(pipe):
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    *embeddings, mask, negative_mask = pipe.encode_prompt(["a cat", "a dog"], "a mat")
    assert mask is None
    assert negative_mask is None
    expected = pipe(["a cat", "a dog"], negative_prompt="a mat", guidance_scale=2.0, generator=seeded(), **ARGUMENTS)
    given = dict(zip(names, embeddings, strict=True))
    actual = pipe(**given, guidance_scale=2.0, generator=seeded(), **ARGUMENTS)
    assert rounding_errors(actual.images, expected.images) <= SAMPLING


def test_saving_and_loading(pipe, tmp_path):
    arguments = {"prompt": "a cat", "guidance_scale": 2.0, **ARGUMENTS}
    expected = pipe(generator=seeded(), **arguments).images
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["diffusers_adm", "GLIDETextModel"]
    for cls in (DiffusionPipeline, ADMPipeline):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is ADMPipeline
        assert type(loaded.text_encoder) is GLIDETextModel
        loaded.set_progress_bar_config(disable=True)
        assert rounding_errors(loaded(generator=seeded(), **arguments).images, expected) <= SAMPLING
    again = ADMPipeline.from_pipe(loaded)
    assert again.text_encoder is loaded.text_encoder


def test_adapters_of_the_unet(pipe):
    """What handles adapters asks all models of a pipeline, the text transformer included."""
    arguments = {"prompt": "a cat", **ARGUMENTS}
    plain = pipe(generator=seeded(), **arguments).images
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="style")
    adapted = pipe(generator=seeded(), **arguments).images
    assert (adapted - plain).abs().max() > 1e-3

    pipe.disable_lora()
    assert rounding_errors(pipe(generator=seeded(), **arguments).images, plain) <= SAMPLING
    pipe.enable_lora()
    pipe.set_adapters("style", 0.0)
    assert rounding_errors(pipe(generator=seeded(), **arguments).images, plain) <= SAMPLING
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    torch.testing.assert_close(pipe(generator=seeded(), **arguments).images, adapted, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe(generator=seeded(), **arguments).images, plain, rtol=1e-3, atol=1e-3)
