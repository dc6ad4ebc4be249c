"""ADMUnCLIPPipeline: where embeddings come from, paths between them, refusals, and the contract of a pipeline."""

import copy
import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from docstrings import check_documented_arguments
from PIL import Image
from toy_models import fill_randomly, random_text_encoder, random_unet, toy_tokenizer
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel
from unclip_models import (
    CONTEXT_WIDTH,
    EMBEDDING_WIDTH,
    LARGE_SIZE,
    SIZE,
    generator,
    gently,
    prior_scheduler,
    random_clip_text,
    random_clip_vision,
    random_karlo_upsampler,
    random_prior,
    toy_image_processor,
)

from diffusers_adm import ADMUnCLIPPipeline, LearnedVarianceDDPMScheduler, UnCLIPProjectionModel
from diffusers_adm.conditioning.guidance_functions import GuidanceFunction
from diffusers_adm.conditioning.interpolation import slerp, text_diff


ABSENT = dict.fromkeys(ADMUnCLIPPipeline._optional_components)
# Decoders: both inputs of the embedding and CLIP's text (Karlo); both and no text; only added to the timestep.
DECODERS = {
    "clip text": {"time_embed_dim": 32, "cross_attention_dim": CONTEXT_WIDTH, "text_conditioning": "clip"},
    "no text": {"time_embed_dim": 32, "cross_attention_dim": CONTEXT_WIDTH, "text_conditioning": None},
    "time only": {"time_embed_dim": 32, "cross_attention_dim": None, "text_conditioning": None},
    "tokens only": {"time_embed_dim": None, "cross_attention_dim": CONTEXT_WIDTH, "text_conditioning": None},
}
CROSS_ATTENTION = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": CONTEXT_WIDTH,
}


def decoder_parts(kind: str) -> dict[str, object]:
    config = DECODERS[kind]
    unet = {"class_embed_type": "identity"} if config["time_embed_dim"] else {}
    unet |= CROSS_ATTENTION if config["cross_attention_dim"] else {}
    projection = UnCLIPProjectionModel(clip_embeddings_dim=EMBEDDING_WIDTH, clip_extra_context_tokens=3, **config)
    texts = {"text_encoder": random_clip_text(), "tokenizer": toy_tokenizer()} if kind == "clip text" else {}
    return {
        "unet": gently(random_unet(4, **unet)),
        "scheduler": LearnedVarianceDDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "image_projection": fill_randomly(projection, 3),
        **texts,
    }


PRIOR = {
    "prior": random_prior(),
    "prior_scheduler": LearnedVarianceDDPMScheduler.from_config(prior_scheduler().config),
    "prior_text_encoder": random_clip_text(),
    "prior_tokenizer": toy_tokenizer(),
}
VISION = {"image_encoder": random_clip_vision(), "feature_extractor": toy_image_processor()}
UPSAMPLER = {
    "super_res_first": random_karlo_upsampler(5),
    "super_res_last": random_karlo_upsampler(6),
    "super_res_scheduler": LearnedVarianceDDPMScheduler(variance_type="fixed_small"),
}
ALL = {**PRIOR, **VISION, **UPSAMPLER}


def make(kind: str = "no text", **parts) -> ADMUnCLIPPipeline:
    pipe = ADMUnCLIPPipeline(**{**ABSENT, **decoder_parts(kind), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 7, size: tuple[int, int] = (9, 11)) -> Image.Image:
    pixels = torch.randint(256, (*size, 3), generator=generator(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def run(pipe: ADMUnCLIPPipeline, *args, seed: int = 0, **arguments) -> np.ndarray:
    arguments = {"num_inference_steps": 3, "output_type": "np", "generator": generator(seed), **arguments}
    return pipe(*args, **arguments).images


def is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal up to rounding, which may differ from call to call, and which random networks amplify; measured: 1e-6."""
    return found.shape == expected.shape and np.abs(found - expected).max() < 1e-4


def embeds(number: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randn(number, EMBEDDING_WIDTH, generator=generator(seed))


class TestEmbeddings:
    @pytest.mark.parametrize("kind", DECODERS)
    def test_the_embedding_changes_the_image_and_guidance_acts_on_it(self, kind):
        pipe = make(kind)
        first, second = (run(pipe, image_embeds=embeds(seed=seed)) for seed in (1, 2))
        assert np.abs(first - second).max() > 1e-3
        guided = run(pipe, image_embeds=embeds(seed=1), guidance_scale=3.0)
        assert np.abs(first - guided).max() > 1e-3

    def test_the_learned_embedding_takes_the_place_of_none(self):
        pipe = make()
        learned = pipe.image_projection.learned_classifier_free_guidance_embeddings
        assert is_close(run(pipe), run(pipe, image_embeds=learned[None].detach()))

    def test_image_is_its_embedding(self):
        pipe = make(**VISION)
        pixels = toy_image_processor()(images=[picture()], return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = random_clip_vision()(pixels).image_embeds
        torch.testing.assert_close(pipe.encode_image(picture()).detach(), expected, atol=1e-5, rtol=0)
        assert is_close(run(pipe, image=picture()), run(pipe, image_embeds=expected))

    def test_arrays_tensors_and_pictures_are_the_same_images(self):
        pipe = make(**VISION)
        array = np.asarray(picture())
        forms = [array, array / 255, torch.from_numpy(array.copy()).permute(2, 0, 1), picture(), [picture()]]
        found = [pipe.encode_image(form).detach() for form in forms]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], atol=1e-5, rtol=0)
        several = pipe.encode_image([picture(), picture(8, (20, 16))])  # of two sizes
        torch.testing.assert_close(several[0].detach(), found[0][0], atol=1e-5, rtol=0)

    def test_prompt_is_the_embedding_of_the_prior(self):
        pipe = make(**PRIOR)
        source = generator()
        made = pipe._prior_sampler().sample(["a red cat"], num_inference_steps=4, guidance_scale=2.0, generator=source)
        expected = run(pipe, image_embeds=made, generator=source)
        found = run(pipe, "a red cat", prior_num_inference_steps=4, prior_guidance_scale=2.0)
        assert is_close(found, expected)

    def test_image_and_prompt_of_a_decoder_with_text(self):
        pipe = make("clip text", **VISION)
        first, second = (run(pipe, prompt, image=picture()) for prompt in ("a red cat", "the green dog"))
        assert np.abs(first - second).max() > 1e-3
        assert is_close(first, run(pipe, "a red cat", image_embeds=pipe.encode_image(picture()).detach()))

    def test_prompt_alone_of_a_decoder_with_text(self):
        pipe = make("clip text")
        learned = pipe.image_projection.learned_classifier_free_guidance_embeddings[None].detach()
        assert is_close(run(pipe, "a cat"), run(pipe, "a cat", image_embeds=learned))

    def test_encoded_prompts_are_those_of_the_prompt(self):
        parts = {name: part for name, part in PRIOR.items() if "text" not in name and "token" not in name}
        pipe = make("clip text", **parts)
        names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        names += ["prompt_attention_mask", "negative_prompt_attention_mask"]
        encoded = dict(zip(names, (x.detach() for x in pipe.encode_prompt("a cat", "a dog")), strict=True))
        arguments = {"prior_num_inference_steps": 3, "prior_guidance_scale": 2.0, "guidance_scale": 2.0}
        expected = run(pipe, "a cat", negative_prompt="a dog", **arguments)
        assert np.abs(run(pipe, **encoded, **arguments) - expected).max() < 1e-5

    def test_the_negative_prompt_reaches_the_prior(self):
        pipe = make(**PRIOR)
        arguments = {"prior_num_inference_steps": 3, "prior_guidance_scale": 3.0}
        first, second = (run(pipe, "a cat", negative_prompt=text, **arguments) for text in ("a dog", "the red hat"))
        assert np.abs(first - second).max() > 1e-4

    def test_functions_that_guide_get_the_prompt_of_the_prior(self):
        seen = []

        def guide(x_t, t, pred_original_sample, **conditions):
            seen.append(conditions)
            return torch.zeros_like(x_t)

        arguments = {"prior_num_inference_steps": 2, "num_inference_steps": 1, "num_images_per_prompt": 2}
        run(make(**PRIOR), ["a cat", "a dog"], guidance_fn=GuidanceFunction(guide, "score"), **arguments)
        assert seen[0]["prompt"] == ["a cat", "a cat", "a dog", "a dog"]
        assert seen[0]["image_embeds"].shape == (4, EMBEDDING_WIDTH)

    def test_candidates_come_before_the_noise_of_the_decoder(self):
        pipe = make(**PRIOR)
        noise = torch.randn(2, EMBEDDING_WIDTH, generator=generator(5))
        found = run(pipe, "a cat", prior_num_candidates=2, prior_latents=noise, prior_num_inference_steps=3)
        source = generator()
        made = pipe._prior_sampler().sample(
            "a cat", num_candidates=2, latents=noise, num_inference_steps=3, generator=source
        )
        assert is_close(found, run(pipe, image_embeds=made, generator=source))


class TestPaths:
    def test_interpolation_is_slerp_with_one_noise(self):
        pipe, ends = make(**VISION), embeds(2)
        path = pipe.interpolate(
            image_embeds=ends, weights=[0.0, 0.3, 1.0], generator=generator(), num_inference_steps=3, output_type="np"
        ).images
        seed = int(torch.randint(2**63 - 1, (), generator=generator()))
        for index, weight in enumerate((0.0, 0.3, 1.0)):
            vector = slerp(ends[:1], ends[1:], weight)
            expected = run(pipe, image_embeds=vector, generator=generator(seed))
            assert np.abs(path[index] - expected[0]).max() < 1e-5
        assert np.abs(path[0] - path[2]).max() > 1e-3

    def test_interpolation_of_images_and_of_their_noise(self):
        pipe = make(**VISION, scheduler=DDIMScheduler.from_config(decoder_parts("no text")["scheduler"].config))
        noise = torch.randn(2, 3, SIZE, SIZE, generator=generator(1))
        pictures = picture(1), picture(2)
        path = pipe.interpolate(
            *pictures, [0.0, 0.5, 1.0], latents=noise, num_inference_steps=3, output_type="np"
        ).images
        for index, end in ((0, 0), (2, 1)):  # both ends are those of the image and its noise
            expected = run(pipe, image=pictures[end], latents=noise[end : end + 1])
            assert np.abs(path[index] - expected[0]).max() < 1e-5
        middle = slerp(noise[:1], noise[1:], 0.5)
        vectors = pipe.encode_image(list(pictures)).detach()
        expected = run(pipe, image_embeds=slerp(vectors[:1], vectors[1:], 0.5), latents=middle)
        assert np.abs(path[1] - expected[0]).max() < 1e-5

    def test_edit_is_a_text_diff(self):
        pipe = make(**PRIOR, **VISION)
        changed = pipe.edit(
            picture(), "a red cat", "a green dog", [0.0, 0.4], latents=torch.zeros(1, 3, SIZE, SIZE), eta=0.0,
            num_inference_steps=3, output_type="np",
        ).images  # fmt: skip
        image = pipe.encode_image(picture()).detach()
        source, target = pipe.encode_text(["a red cat", "a green dog"]).detach()[:, None]
        for index, strength in enumerate((0.0, 0.4)):
            vector = text_diff(image, source, target, strength)
            expected = run(pipe, image_embeds=vector, latents=torch.zeros(1, 3, SIZE, SIZE), eta=0.0)
            assert np.abs(changed[index] - expected[0]).max() < 1e-5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"weights": [0.5, 1.2]}, r"`weights` holds 1.2; numbers must lie in \[0, 1\]"),
            ({"weights": -0.1}, r"`weights` holds -0.1"),
            ({"weights": []}, "`weights` is empty"),
            ({"image_embeds": embeds(3)}, "holds 3 embeddings; pass 2"),
            ({"image_embeds": embeds(2)[:, :5]}, r"`image_embeds` has shape \(2, 5\)"),
            ({"image_1": picture(), "image_2": picture()}, "Both images and `image_embeds`"),
            ({"image_embeds": None, "image_1": picture()}, "Two images are needed"),
            ({"image_embeds": None, "image_1": picture(), "image_2": [picture()] * 2}, "`image_2` holds 2 images"),
            ({"latents": torch.zeros(3, 3, SIZE, SIZE)}, r"`latents` has shape .* the noise of 1 or 2 images"),
            ({"latents": np.zeros((2, 3, SIZE, SIZE))}, "`latents` is a ndarray"),
            ({"generator": [generator()]}, "`generator` is a list"),
            ({"generator": 3}, "`generator` is or holds 3; pass a `torch.Generator`"),
            ({"num_images_per_prompt": 2}, "`num_images_per_prompt` cannot be passed here"),
        ],
    )
    def test_interpolation_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            make(**VISION).interpolate(**{"image_embeds": embeds(2), **arguments})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"strength": 1.5}, "`strength` holds 1.5"),
            ({"target_prompt": None}, "`target_prompt` is None; pass a string"),
            ({"target_prompt": "a cat"}, "no direction between them"),
            ({"image_embeds": embeds()}, "Both `image` and `image_embeds`"),
            ({"image": None}, "Neither `image` nor `image_embeds`"),
            ({"image": [picture()] * 2}, "`image` holds 2 images"),
        ],
    )
    def test_edit_refuses(self, arguments, message):
        given = {"image": picture(), "source_prompt": "a cat", "target_prompt": "a dog", **arguments}
        with pytest.raises(ValueError, match=message):
            make(**PRIOR, **VISION).edit(**given)

    def test_edit_needs_the_text_tower_of_clip(self):
        with pytest.raises(ValueError, match="no text tower of CLIP"):
            make(**VISION).edit(picture(), "a cat", "a dog")

    def test_the_text_encoder_of_glide_is_no_tower_of_clip(self):
        encoder = random_text_encoder("glide")
        pipe = make(**VISION, **PRIOR | {"prior_text_encoder": None}, text_encoder=encoder, tokenizer=toy_tokenizer())
        with pytest.raises(ValueError, match="no text tower of CLIP"):
            pipe.edit(picture(), "a cat", "a dog")
        with pytest.raises(ValueError, match="The prior has no text encoder and tokenizer. Pass `prior_text_encoder`"):
            run(pipe, "a cat")

    @pytest.mark.parametrize("prompt", [None, [], 3, ["a cat", None]])
    def test_texts_to_encode(self, prompt):
        with pytest.raises(ValueError, match="`prompt` is .*; pass a string, or a list of at least one"):
            make(**PRIOR).encode_text(prompt)


class TestInversion:
    """The inverse of a smooth network, by fixed-point iterations; of a trained one see docs/inversion.md."""

    @pytest.mark.parametrize("kind", ["no text", "clip text"])
    def test_a_variation_with_the_inverted_noise_is_the_image(self, kind):
        scheduler = LearnedVarianceDDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
        pipe = make(kind, **VISION, **UPSAMPLER, scheduler=scheduler)
        image = picture(size=(SIZE, SIZE))
        arguments = {"image": image, "num_inference_steps": 20, "guidance_scale": 1.5}
        latents = pipe.invert(image, num_fixed_point_iterations=10, **arguments)
        assert latents.shape == (1, 3, SIZE, SIZE)
        found = run(pipe, latents=latents, eta=0.0, super_res_num_inference_steps=0, **arguments)
        target = np.asarray(image) / 255
        # What ten iterations leave; measured: 57 dB and more.
        assert 10 * np.log10(1 / np.square(found[0] - target).mean()) > 40
        other = run(pipe, latents=-latents, eta=0.0, super_res_num_inference_steps=0, **arguments)
        assert np.abs(other[0] - target).max() > 0.1


class TestUpsampler:
    def test_its_size_and_its_steps(self):
        pipe = make(**UPSAMPLER)
        assert run(pipe).shape == (1, LARGE_SIZE, LARGE_SIZE, 3)
        assert run(pipe, super_res_num_inference_steps=0).shape == (1, SIZE, SIZE, 3)
        assert run(pipe, output_type="latent").shape == (1, 3, SIZE, SIZE)
        assert run(pipe, height=2 * SIZE, width=SIZE).shape == (1, 2 * LARGE_SIZE, LARGE_SIZE, 3)

    def test_the_last_step_has_a_network_of_its_own(self):
        calls = []
        pipe = make(**UPSAMPLER)
        hooks = [
            getattr(pipe, name).register_forward_hook(lambda *_, name=name: calls.append(name))
            for name in ("super_res_first", "super_res_last")
        ]
        run(pipe, super_res_num_inference_steps=3)
        for hook in hooks:
            hook.remove()
        assert calls == ["super_res_first", "super_res_first", "super_res_last"]

    def test_an_interrupted_call_interpolates(self):
        def stop(pipe, index, t, tensors):
            pipe._interrupt = True
            return tensors

        pipe = make(**UPSAMPLER)
        found = run(pipe, callback_on_step_end=stop)
        small = run(pipe, callback_on_step_end=stop, output_type="latent").clamp(-1, 1)
        expected = torch.nn.functional.interpolate(small, (LARGE_SIZE, LARGE_SIZE), mode="bicubic", antialias=True)
        expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(found - expected).max() < 1e-6


class TestRefusals:
    """All before any network runs."""

    @pytest.mark.parametrize(
        ("parts", "arguments", "message"),
        [
            (VISION, {"prompt": "a cat", "image": picture()}, "Both `prompt` and `image` were given, but the decoder"),
            ({}, {"prompt": "a cat", "image_embeds": embeds()}, "Both `prompt` and `image_embeds` were given"),
            (VISION, {"image": picture(), "image_embeds": embeds()}, "Both `image` and `image_embeds`"),
            ({}, {"prompt": "a cat"}, "this pipeline has no `prior`"),
            ({}, {"image": picture()}, "has no `image_encoder`"),
            ({}, {"image_embeds": embeds()[:, :4]}, r"`image_embeds` has shape \(1, 4\)"),
            ({}, {"image_embeds": embeds()[0]}, r"`image_embeds` has shape \(16,\)"),
            ({}, {"image_embeds": embeds() / 0}, "`image_embeds` holds NaN or infinity for 1 of 1"),
            ({}, {"negative_prompt": "a cat"}, "`negative_prompt` was given, but the decoder has no text"),
            ({}, {"pooled_prompt_embeds": embeds()}, "belong to `prompt_embeds`, which is missing"),
            (PRIOR, {"prompt": "a cat", "negative_prompt_attention_mask": embeds()}, "belong to `negative_prompt_embe"),
            (
                {
                    **PRIOR,
                    "prior_text_encoder": None,
                    "prior_tokenizer": None,
                    "text_encoder": random_clip_text(),
                    "tokenizer": toy_tokenizer(),
                },
                {"prompt": "a cat", "prompt_embeds": embeds()[None], "pooled_prompt_embeds": embeds()},
                "Both `prompt` and `prompt_embeds` were given",
            ),
            ({}, {"prior_guidance_scale": 2.0}, "`prior_guidance_scale` cannot have an effect: this pipeline has no"),
            (PRIOR, {"prior_num_candidates": 2}, "`prior_num_candidates` cannot have an effect: there is no `prompt`"),
            (
                PRIOR,
                {"image_embeds": embeds(), "prior_latents": embeds()},
                "`prior_latents` cannot have an effect: the image embedding is that of `image_embeds`",
            ),
            (PRIOR, {"prompt": "a cat", "prior_num_inference_steps": 1001}, "`prior_num_inference_steps` 1001"),
            (PRIOR, {"prompt": "a cat", "prior_latents": embeds(3)}, "`prior_latents` has shape"),
            (PRIOR, {"prompt": ["a cat"] * 2, "batch_size": 3}, "different numbers of images"),
            (
                {},
                {"super_res_latents": torch.zeros(1, 3, 8, 8)},
                "`super_res_latents` cannot have an effect: this pipeline has no",
            ),
            ({}, {"super_res_num_inference_steps": 3}, "`super_res_num_inference_steps` cannot have an effect"),
            (UPSAMPLER, {"super_res_num_inference_steps": -1}, "`super_res_num_inference_steps` is -1"),
            (
                UPSAMPLER,
                {"super_res_latents": torch.zeros(1, 3, 8, 8), "output_type": "latent"},
                "`output_type` is 'latent', which is not upsampled",
            ),
            (UPSAMPLER, {"super_res_latents": torch.zeros(1, 3, 8, 8)}, "`super_res_latents` has shape"),
            ({}, {"image_embeds": embeds(2), "batch_size": 3}, "different numbers of images"),
            ({}, {"class_labels": 1}, "this model is unconditional"),
            ({}, {"guidance_scale": 2.0}, "no `image_embeds` to guide towards"),
            (VISION, {"image": "a cat"}, "A prompt is passed by its name"),
            (VISION, {"image": []}, "`image` is empty"),
        ],
    )
    def test_calls(self, parts, arguments, message):
        pipe = make(**parts)
        networks = [pipe.unet, pipe.image_projection, pipe.prior, pipe.image_encoder, pipe.super_res_first]
        ran: list[str] = []
        hooks = [
            network.register_forward_pre_hook(lambda module, _: ran.append(type(module).__name__))
            for network in networks
            if network is not None
        ]
        try:
            with pytest.raises(ValueError, match=message):
                run(pipe, **arguments)
        finally:
            for hook in hooks:
                hook.remove()
        assert ran == []

    def test_encoded_prompts_of_another_encoder_are_refused(self):
        pipe = make("clip text", **PRIOR)
        states, _, pooled, _, mask, _ = pipe.encode_prompt("a cat")
        with pytest.raises(ValueError, match="the prior has a text encoder of its own"):
            run(pipe, prompt_embeds=states, pooled_prompt_embeds=pooled, prompt_attention_mask=mask)
        with pytest.raises(ValueError, match="`prompt_embeds` was given without `pooled_prompt_embeds`"):
            run(make("clip text"), prompt_embeds=states)

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            (
                {**PRIOR, "prior": random_prior(width=8)},
                "`prior_text_encoder` has `hidden_size=16`, but `prior` takes 8",
            ),
            (
                {**PRIOR, "prior": random_prior(width=8), "prior_text_encoder": random_clip_text(width=8)},
                r"`prior` has embeddings of width 8 \(`embedding_dim`\), but the decoder takes 16",
            ),
            ({**PRIOR, "prior_scheduler": None}, "Just one of `prior` and `prior_scheduler`"),
            ({**PRIOR, "prior_tokenizer": None}, "`prior_text_encoder` was given without `prior_tokenizer`"),
            ({**PRIOR, "prior_scheduler": prior_scheduler()}, "`prior_scheduler` is a UnCLIPScheduler"),
            (
                {**VISION, "image_encoder": random_clip_vision(width=8)},
                "`image_encoder` has embeddings of width 8",
            ),
            ({**VISION, "feature_extractor": None}, "`image_encoder` was given without `feature_extractor`"),
            (
                {**VISION, "image_encoder": random_clip_vision(cls=CLIPVisionModel)},
                "is a CLIPVisionModel, which gives no embedding.* Load a `CLIPVisionModelWithProjection`",
            ),
            (
                {**PRIOR, "prior_text_encoder": random_clip_text(cls=CLIPTextModel)},
                "is a CLIPTextModel, which gives no embedding.* Load a `CLIPTextModelWithProjection`",
            ),
            ({**UPSAMPLER, "super_res_scheduler": None}, "`super_res_first` was given without `super_res_scheduler`"),
            ({**UPSAMPLER, "super_res_first": None}, "was given without `super_res_first`"),
            ({**UPSAMPLER, "super_res_last": random_unet(out_channels=3)}, "`super_res_last` has `in_channels=3`"),
            (
                {**UPSAMPLER, "super_res_scheduler": LearnedVarianceDDPMScheduler()},
                "`super_res_scheduler` takes a learned variance, but `super_res_first` predicts none",
            ),
            ({"unet": random_unet(4)}, "`class_embed_type=None`"),
            ({"image_projection": None}, "`image_projection` is a NoneType; pass the `UnCLIPProjectionModel`"),
            ({"image_projection": random_unet(4)}, "`image_projection` is a AdaGNUNet2DModel"),
            ({**PRIOR, "prior": random_unet(4)}, "`prior` is a AdaGNUNet2DModel; pass a `PriorTransformer`"),
            (
                {"prior_text_encoder": random_clip_text(width=8), "prior_tokenizer": toy_tokenizer()},
                "`prior_text_encoder` has embeddings of width 8",
            ),
            (
                {
                    **PRIOR,
                    "prior_text_encoder": None,
                    "text_encoder": random_clip_text(width=8),
                    "tokenizer": toy_tokenizer(),
                },
                "`text_encoder` has `hidden_size=8`, but `prior` takes 16.* as `prior_text_encoder`",
            ),
        ],
    )
    def test_components(self, parts, message):
        with pytest.raises(ValueError, match=message):
            make(**parts)

    def test_a_whole_clip(self):
        config = {
            "text_config": random_clip_text().config.to_dict(),
            "vision_config": VISION["image_encoder"].config.to_dict(),
        }
        whole = CLIPModel(CLIPModel.config_class(**config, projection_dim=EMBEDDING_WIDTH))
        with pytest.raises(ValueError, match="is a CLIPModel, which holds both towers"):
            make(**{**VISION, "image_encoder": whole})

    def test_text_encoders_of_the_decoder(self):
        with pytest.raises(ValueError, match="`text_encoder` is a CLIPTextModel, which gives no embedding"):
            make("clip text", text_encoder=random_text_encoder("clip"))
        with pytest.raises(ValueError, match="no text encoder and tokenizer"):
            run(make("clip text", text_encoder=None, tokenizer=None), image_embeds=embeds())


class TestPipelineContract:
    def test_saving_and_loading(self, tmp_path):
        pipe = make("clip text", **ALL)
        pipe.save_pretrained(tmp_path)
        arguments = {"prior_num_inference_steps": 2, "super_res_num_inference_steps": 2}
        expected = run(pipe, "a cat", **arguments)
        for cls in (ADMUnCLIPPipeline, DiffusionPipeline):
            loaded = cls.from_pretrained(tmp_path)
            assert type(loaded) is ADMUnCLIPPipeline
            loaded.set_progress_bar_config(disable=True)
            assert is_close(run(loaded, "a cat", **arguments), expected)

    def test_saving_without_optional_components(self, tmp_path):
        make().save_pretrained(tmp_path)
        loaded = ADMUnCLIPPipeline.from_pretrained(tmp_path)
        assert all(getattr(loaded, name) is None for name in ADMUnCLIPPipeline._optional_components)
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"unet", "scheduler", "image_projection"}

    def test_images_do_not_depend_on_their_batch(self):
        pipe = make("clip text", **ALL)
        arguments = {"prior_num_inference_steps": 2, "super_res_num_inference_steps": 2, "guidance_scale": 2.0}
        prompts = ["a red cat", "the green dog on a mat with a hat"]
        both = run(pipe, prompts, generator=[generator(1), generator(2)], **arguments)
        second = run(pipe, prompts[1], generator=[generator(2)], **arguments)
        assert np.abs(both[1] - second[0]).max() < 1e-4

    def test_number_of_images_per_prompt(self):
        pipe = make(**PRIOR, **VISION)
        assert len(run(pipe, ["a cat", "a dog"], num_images_per_prompt=2, prior_num_inference_steps=2)) == 4
        assert len(run(pipe, image=[picture()] * 2, num_images_per_prompt=2)) == 4
        assert len(run(pipe, image=picture(), batch_size=3)) == 3
        several = [generator(n) for n in range(4)]
        found = run(pipe, image_embeds=embeds(2), num_images_per_prompt=2, generator=several)
        expected = run(pipe, image_embeds=embeds(2)[1:], generator=[generator(3)])
        assert np.abs(found[3] - expected[0]).max() < 1e-5

    def test_output_types(self):
        pipe = make(**UPSAMPLER)
        array = run(pipe)
        tensor = run(pipe, output_type="pt")
        assert is_close(tensor.permute(0, 2, 3, 1).numpy(), array)
        (image,) = run(pipe, output_type="pil")
        assert np.abs(np.asarray(image) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
        assert is_close(run(pipe, return_dict=True), array)
        assert is_close(
            pipe(num_inference_steps=3, output_type="np", generator=generator(), return_dict=False)[0], array
        )

    def test_callbacks_see_the_steps_of_the_decoder(self):
        seen = []

        def callback(pipe, index, t, tensors):
            seen.append((index, tuple(tensors["latents"].shape), pipe.num_timesteps))
            return {"latents": torch.zeros_like(tensors["latents"])}

        pipe = make(**ALL)
        found = run(pipe, "a cat", callback_on_step_end=callback, prior_num_inference_steps=2, output_type="latent")
        assert seen == [(index, (1, 3, SIZE, SIZE), 3) for index in range(3)]
        assert not found.any()

    def test_a_callback_may_turn_guidance_on(self):
        def guide(pipe, index, t, tensors):
            pipe.guidance_scale = 4.0
            return {}

        pipe = make()
        plain = run(pipe, image_embeds=embeds())
        assert np.abs(run(pipe, image_embeds=embeds(), callback_on_step_end=guide) - plain).max() > 1e-3

    def test_threads_do_not_disturb_each_other(self):
        pipe = make("clip text", **ALL)
        arguments = {"prior_num_inference_steps": 3, "super_res_num_inference_steps": 2, "prior_guidance_scale": 2.0}
        prompts = ["a cat", "the green dog", "a red hat"]
        expected = [run(pipe, prompt, seed=seed, **arguments) for seed, prompt in enumerate(prompts)]
        found: dict[int, np.ndarray] = {}

        def work(seed: int) -> None:
            found[seed] = run(pipe, prompts[seed], seed=seed, **arguments)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed in range(3):
            assert np.abs(found[seed] - expected[seed]).max() < 1e-5

    # Float32 has 24 bits and bfloat16 8, of which the steps of a random network lose two or three.
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.05)])
    def test_dtype(self, dtype, tolerance):
        pipe = make("clip text", **copy.deepcopy(VISION))
        arguments = {"latents": torch.randn(1, 3, SIZE, SIZE, generator=generator()), "eta": 0.0}
        expected = run(pipe, "a cat", image=picture(), guidance_scale=2.0, **arguments)
        found = run(pipe.to(dtype), "a cat", image=picture(), guidance_scale=2.0, **arguments)
        assert np.abs(found - expected).max() < tolerance

    def test_half_precision_of_all_networks(self):
        pipe = make("clip text", **copy.deepcopy(ALL)).to(torch.bfloat16)
        arguments = {"prior_num_inference_steps": 2, "super_res_num_inference_steps": 2, "guidance_scale": 2.0}
        found = run(pipe, "a cat", prior_guidance_scale=2.0, prior_num_candidates=2, **arguments)
        assert np.isfinite(found).all()

    def test_schedulers_of_the_pipeline_stay_as_they_are(self):
        pipe, names = make(**ALL), ("scheduler", "prior_scheduler", "super_res_scheduler")
        before = [getattr(pipe, name).timesteps.clone() for name in names]
        run(pipe, "a cat", prior_num_inference_steps=2, super_res_num_inference_steps=2)
        after = [getattr(pipe, name).timesteps for name in names]
        assert all(torch.equal(*each) for each in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["", "encode_image", "encode_text", "__call__"])
def test_documented_arguments(name):
    documented = getattr(ADMUnCLIPPipeline, name) if name else ADMUnCLIPPipeline
    function = getattr(documented, "__wrapped__", documented) if name else ADMUnCLIPPipeline.__init__
    check_documented_arguments(documented.__doc__, function)
