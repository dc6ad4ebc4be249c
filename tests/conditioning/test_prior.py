"""The prior against a loop of diffusers' own classes; the choice among candidates; refusals."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from toy_models import MAX_PROMPT_LENGTH, toy_tokenizer
from transformers import CLIPTextModel
from unclip_models import EMBEDDING_WIDTH, generator, prior_scheduler, random_clip_text, random_prior

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.prior import PriorSampler


PROMPTS = ["a red cat", "the green dog on a mat with a hat"]


def sampler(**changes) -> PriorSampler:
    parts = {
        "prior": random_prior(),
        "scheduler": LearnedVarianceDDPMScheduler.from_config(prior_scheduler().config),
        "text_encoder": random_clip_text(),
        "tokenizer": toy_tokenizer(),
    }
    return PriorSampler(**{**parts, **changes})


@torch.no_grad()
def encode(prompts: list[str]):
    tokens = toy_tokenizer()(prompts, padding="max_length", max_length=MAX_PROMPT_LENGTH, return_tensors="pt")
    encoded = random_clip_text()(tokens.input_ids)
    return encoded.text_embeds, encoded.last_hidden_state, tokens.attention_mask.bool()


@torch.no_grad()
def reference(prompts: list[str], steps: int, scale: float, noise: torch.Tensor, source) -> torch.Tensor:
    """The reverse process written with `UnCLIPScheduler`, with a pass of its own for the empty prompts."""
    prior, scheduler = random_prior(), prior_scheduler()
    scheduler.set_timesteps(steps)
    timesteps = [*scheduler.timesteps, None]
    x = noise
    for t, previous in zip(timesteps, timesteps[1:], strict=False):
        cond, uncond = (
            prior(x, t, *encode(texts)).predicted_image_embedding for texts in (prompts, [""] * len(prompts))
        )
        x = scheduler.step(uncond + scale * (cond - uncond), t, x, previous, source).prev_sample
    return x * prior.clip_std + prior.clip_mean


def test_a_new_prior_is_named_in_the_log(caplog):
    prior = random_prior()
    torch.nn.init.zeros_(prior.clip_std)
    embeds = sampler(prior=prior).sample(PROMPTS, num_inference_steps=2)
    assert torch.equal(embeds, prior.clip_mean.expand_as(embeds))
    assert "`clip_std` of `prior` is 0" in caplog.text


class TestSteps:
    # Rounding of float32, which the random networks of several steps amplify.
    @pytest.mark.parametrize("scale", [1.0, 3.0])
    def test_equals_a_loop_of_unclip_scheduler(self, scale):
        noise = torch.randn(2, EMBEDDING_WIDTH, generator=generator(5))
        expected = reference(PROMPTS, 7, scale, noise, generator())
        found = sampler().sample(
            PROMPTS, num_inference_steps=7, guidance_scale=scale, latents=noise, generator=generator()
        )
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)

    def test_leaves_the_generator_where_unclip_scheduler_does(self):
        source, its = generator(), generator()
        noise = torch.randn(2, EMBEDDING_WIDTH, generator=its)
        expected = reference(PROMPTS, 7, 1.0, noise, its)
        found = sampler().sample(PROMPTS, num_inference_steps=7, generator=source)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        assert torch.equal(source.get_state(), its.get_state())

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
    def test_other_schedulers_find_the_embedding_of_a_prior_that_always_predicts_one(self, scheduler):
        # For a constant x_0 every consistent solver ends there, but for what its last step leaves.
        prior, config = random_prior(), LearnedVarianceDDPMScheduler.from_config(prior_scheduler().config).config
        torch.nn.init.zeros_(prior.proj_to_clip_embeddings.weight)
        prior.proj_to_clip_embeddings.bias.data = torch.linspace(-0.9, 0.9, EMBEDDING_WIDTH)
        expected = prior.proj_to_clip_embeddings.bias * prior.clip_std + prior.clip_mean
        parts = sampler(prior=prior, scheduler=scheduler.from_config(config, clip_sample=False))
        found = parts.sample("a cat", num_inference_steps=20, generator=generator())
        torch.testing.assert_close(found[0], expected[0], atol=0.02, rtol=0)

    def test_prompts_do_not_depend_on_each_other(self):
        noise = torch.randn(2, EMBEDDING_WIDTH, generator=generator())
        arguments = {"num_inference_steps": 3, "guidance_scale": 2.0}
        sources = [[generator(1), generator(2)], [generator(2)]]
        both = sampler().sample(PROMPTS, latents=noise, generator=sources[0], **arguments)
        second = sampler().sample(PROMPTS[1:], latents=noise[1:], generator=sources[1], **arguments)
        torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)


class TestCandidates:
    def test_keeps_the_one_closest_to_its_prompt(self):
        noise = torch.randn(4, EMBEDDING_WIDTH, generator=generator(5))
        # Without noise in the steps each candidate follows from its start alone.
        scheduler = DDIMScheduler.from_config(LearnedVarianceDDPMScheduler.from_config(prior_scheduler().config).config)
        arguments = {"num_inference_steps": 3}
        parts = sampler(scheduler=scheduler)
        each = torch.cat(
            [parts.sample(PROMPTS[n // 2], latents=noise[n : n + 1], **arguments) for n in range(4)]
        ).reshape(2, 2, -1)
        similarity = F.cosine_similarity(each, encode(PROMPTS)[0][:, None], dim=2)
        best = similarity.argmax(dim=1)
        expected = torch.stack([each[n, best[n]] for n in range(2)])
        found = parts.sample(PROMPTS, num_candidates=2, latents=noise, **arguments)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert best.tolist() != [0, 0]  # or the first would always do

    def test_the_first_is_the_one_of_a_single_candidate(self):
        one = sampler().sample(PROMPTS, num_inference_steps=3, generator=generator())
        two = sampler().sample(PROMPTS, num_inference_steps=3, num_candidates=2, generator=generator())
        target = encode(PROMPTS)[0]
        for row in range(2):
            is_first = torch.allclose(one[row], two[row], atol=1e-5)
            gain = F.cosine_similarity(two, target)[row] - F.cosine_similarity(one, target)[row]
            assert is_first or gain > 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
            ({"num_candidates": 0}, "`num_candidates` is 0"),
            ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
            ({"latents": torch.zeros(2, 3)}, r"`latents` has shape \(2, 3\)"),
            ({"latents": torch.full((2, EMBEDDING_WIDTH), float("inf"))}, "NaN or infinity in 2 of 2 rows"),
            ({"latents": torch.zeros(3, EMBEDDING_WIDTH), "num_candidates": 2}, "3 rows for `num_candidates` 2"),
            ({"latents": torch.zeros(4, EMBEDDING_WIDTH)}, "2 images with 1 candidates each need"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            sampler().sample(PROMPTS, **arguments)

    def test_components(self):
        parts = {"text_encoder": random_clip_text(width=8)}
        with pytest.raises(ValueError, match="`text_encoder` has `hidden_size=8`, but `prior` takes 16"):
            sampler(**parts)
        with pytest.raises(ValueError, match="Load a `CLIPTextModelWithProjection` from the same folder"):
            sampler(text_encoder=random_clip_text(cls=CLIPTextModel))
        with pytest.raises(ValueError, match="predicts no variance"):
            sampler(scheduler=LearnedVarianceDDPMScheduler())
        with pytest.raises(ValueError, match="pad prompts to 6 tokens"):
            sampler(tokenizer=toy_tokenizer(max_length=6))
        with pytest.raises(ValueError, match="without `tokenizer`"):
            sampler(tokenizer=None)
        with pytest.raises(ValueError, match="`prior_scheduler` is a UnCLIPScheduler"):
            sampler(scheduler=prior_scheduler(), prefix="prior_")
