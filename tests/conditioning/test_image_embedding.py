"""The image embedding of a decoder: what training drops, the two passes of guidance, and what is refused."""

import math

import pytest
import torch
from tolerances import ONE_LAYER, rounding_errors
from toy_models import TEXT_CONFIGS, TEXT_WIDTH, TOY_CONFIG, fill_randomly, random_text_encoder, toy_tokenizer

from diffusers_adm import AdaGNUNet2DModel, LearnedVarianceDDPMScheduler, UnCLIPProjectionModel
from diffusers_adm.conditioning.condition import MergedConditions, SamplingCall, number_of_prompts
from diffusers_adm.conditioning.image_embedding import ImageEmbeddingCondition, check_projection
from diffusers_adm.conditioning.text import TextCondition, TextConditioning


WIDTH, TIME = 12, 4 * TOY_CONFIG["block_out_channels"][0]
UNET = TOY_CONFIG | TEXT_CONFIGS["added_kv"] | {"class_embed_type": "identity"}
GLIDE_UNET = UNET | {"addition_embed_type": "text_embeds"}
NO_TEXT = TextConditioning(None, None, None)


def random_projection(kind="states", **config):
    given = {"clip_embeddings_dim": WIDTH, "time_embed_dim": TIME, "cross_attention_dim": TEXT_WIDTH}
    return fill_randomly(UnCLIPProjectionModel(**{**given, "text_conditioning": kind, **config}))


def embeddings(number):
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(7))


def text_condition(unet=UNET, kind="clip", **options):
    return TextCondition(unet, random_text_encoder(kind), toy_tokenizer(kind), **options)


def call_of(number, guidance_scale=1.0, per_prompt=1):
    noise = torch.empty(number * per_prompt, 3, 8, 8)
    scheduler = LearnedVarianceDDPMScheduler()
    return SamplingCall(number, (8, 8), scheduler, None, noise, torch.float32, guidance_scale)


@torch.no_grad()
def prepared(condition, call):
    condition.before_noise(call)
    return condition.prepare(call)


class TestTraining:
    def test_dropped_ones_are_the_learned_embedding(self):
        projection, given = random_projection(None), embeddings(64)
        condition = ImageEmbeddingCondition(projection, dropout_prob=0.3)
        torch.manual_seed(0)
        seen = condition.for_training({"image_embeds": given})
        torch.manual_seed(0)
        dropped = torch.rand(64) < 0.3
        assert 0 < dropped.sum() < 64
        learned = projection.learned_classifier_free_guidance_embeddings
        expected = projection(torch.where(dropped[:, None], learned, given))
        assert set(seen.kwargs) == {"class_labels", "encoder_hidden_states"}
        assert rounding_errors(seen.kwargs["class_labels"], expected.time_embeds) <= ONE_LAYER
        assert rounding_errors(seen.kwargs["encoder_hidden_states"], expected.encoder_hidden_states) <= ONE_LAYER

    def test_embedding_and_text_are_dropped_independently_at_their_rates(self):
        """Of 4000 examples, each of the four cases is within 5 standard deviations of its binomial share."""
        number, states = 4000, torch.ones(4000, 2, TEXT_WIDTH)
        empty = {"caption_states": torch.zeros(2, TEXT_WIDTH)}
        text = TextCondition(UNET, empty_caption=empty, dropout_prob=0.5)
        condition = ImageEmbeddingCondition(random_projection(), text, dropout_prob=0.1)
        torch.manual_seed(0)
        batch = {"image_embeds": torch.zeros(number, WIDTH), "caption_states": states}
        seen = condition.for_training(batch).kwargs
        null = condition.projection(torch.zeros(1, WIDTH), states[:1], dropped=torch.tensor([True]))
        has_embedding = (seen["class_labels"] - null.time_embeds).abs().amax(dim=1) > 1e-3
        has_text = seen["encoder_hidden_states"][:, 4:].flatten(1).amax(dim=1) == 1
        for image, prompt, share in ((1, 1, 0.45), (1, 0, 0.45), (0, 1, 0.05), (0, 0, 0.05)):
            count = ((has_embedding == image) & (has_text == prompt)).sum().item()
            assert abs(count - number * share) < 5 * math.sqrt(number * share * (1 - share))

    def test_images_are_encoded_where_embeddings_are_missing(self):
        images, shown = torch.randn(4, 3, 8, 8), []

        def encode(batch):
            shown.append(batch)
            return batch.flatten(1)[:, :WIDTH]

        condition = ImageEmbeddingCondition(random_projection(None), image_encoder=encode)
        encoded = condition.for_training({"images": images}).kwargs
        given = condition.for_training({"images": images, "image_embeds": images.flatten(1)[:, :WIDTH]}).kwargs
        assert len(shown) == 1
        assert shown[0] is images
        assert rounding_errors(encoded["class_labels"], given["class_labels"]) <= ONE_LAYER

    def test_a_pooled_text_goes_to_the_unet_as_without_embeddings(self):
        empty = {"input_ids": torch.zeros(12).long(), "caption_mask": torch.zeros(12).long()}
        batch = {"input_ids": torch.randint(2, 9, (5, 12)), "caption_mask": torch.ones(5, 12).long()}
        text = text_condition(GLIDE_UNET, "glide", empty_caption=empty)
        expected = text.for_training(batch).kwargs
        seen = ImageEmbeddingCondition(random_projection(), text).for_training(batch | {"image_embeds": embeddings(5)})
        assert seen.kwargs["added_cond_kwargs"].keys() == {"text_embeds"}
        pooled = seen.kwargs["added_cond_kwargs"]["text_embeds"]
        assert rounding_errors(pooled, expected["added_cond_kwargs"]["text_embeds"]) <= ONE_LAYER
        states = seen.kwargs["encoder_hidden_states"]
        assert rounding_errors(states[:, 4:], expected["encoder_hidden_states"]) <= ONE_LAYER
        unet = fill_randomly(AdaGNUNet2DModel(**GLIDE_UNET))
        assert unet(torch.randn(5, 3, 8, 8), 3, **seen.kwargs).sample.isfinite().all()  # it takes these inputs


class TestSampling:
    def test_both_passes(self):
        projection, given = random_projection(), embeddings(2)
        text = text_condition().read(["a cat", "a dog"], NO_TEXT, "the mat", NO_TEXT)
        condition = ImageEmbeddingCondition(projection, text).read(given)
        assert number_of_prompts([condition], 1) == 2
        call = call_of(2, guidance_scale=2.0, per_prompt=3)
        inputs = prepared(condition, call)
        assert condition.is_given
        assert inputs.can_guide
        encoded, negative = text.encode(["a cat", "a dog"], "the mat", "cpu")
        rows = torch.tensor([0, 0, 0, 1, 1, 1])
        with torch.no_grad():
            expected = projection(given[rows], encoded.hidden_states[rows])
            null = projection.null_image_embeds(6)
            unconditional = projection(null, negative.hidden_states[rows])
        for got, wanted in (
            (inputs.conditional.kwargs, expected),
            (inputs.unconditional.kwargs, unconditional),
        ):
            assert rounding_errors(got["encoder_hidden_states"], wanted.encoder_hidden_states) <= ONE_LAYER
            assert rounding_errors(got["class_labels"], wanted.time_embeds) <= ONE_LAYER

    def test_without_guidance_and_negative_prompt_the_text_encoder_runs_once(self):
        """With embeddings of the text alone, nothing is left to encode; with guidance, the empty prompt."""
        states = torch.randn(1, 12, TEXT_WIDTH)
        text = text_condition().read(None, TextConditioning(states, None, None), None, NO_TEXT)
        text.encode = lambda *args: pytest.fail("encoded")
        condition = ImageEmbeddingCondition(random_projection(), text).read(embeddings(1))
        inputs = prepared(condition, call_of(1))
        assert inputs.unconditional is None
        assert MergedConditions([condition], call_of(1)).unconditional is None

    def test_no_embedding_is_the_learned_one_in_both(self):
        projection = random_projection()
        text = text_condition().read("a cat", NO_TEXT, None, NO_TEXT)
        condition = ImageEmbeddingCondition(projection, text).read()
        assert condition.is_given
        inputs = prepared(condition, call_of(1, guidance_scale=2.0))
        with torch.no_grad():
            learned = projection.clip_image_embeddings_project_to_time_embeddings(projection.null_image_embeds(1))
        passes = (inputs.unconditional.kwargs, inputs.conditional.kwargs)
        for kwargs in passes:
            assert rounding_errors(kwargs["class_labels"], learned) <= ONE_LAYER
        uncond, cond = (kwargs["encoder_hidden_states"][0] for kwargs in passes)
        assert rounding_errors(uncond[:4], cond[:4]) <= ONE_LAYER
        assert not torch.allclose(uncond[4:], cond[4:])

    def test_without_text(self):
        condition = ImageEmbeddingCondition(random_projection(None)).read(embeddings(1))
        assert condition.counts == {}  # one for all images
        inputs = prepared(condition, call_of(3, guidance_scale=2.0))
        assert inputs.conditional.kwargs["class_labels"].shape == (3, TIME)
        assert inputs.unconditional.kwargs["class_labels"].shape == (3, TIME)
        assert not condition.without_effect(10, False, False)
        assert not ImageEmbeddingCondition(random_projection(None)).read().is_given

    def test_a_source_runs_after_the_checks_and_before_the_noise(self):
        calls = []

        def source(call):
            calls.append(call)
            return embeddings(4).double()

        condition = ImageEmbeddingCondition(random_projection(None)).read(source=source)
        assert not calls
        call = call_of(2, per_prompt=2)
        condition.before_noise(call)
        assert calls == [call]
        given = ImageEmbeddingCondition(condition.projection).read(embeddings(4))
        with torch.no_grad():
            expected = prepared(given, call_of(4)).conditional.kwargs
            seen = condition.prepare(call).conditional.kwargs
        assert rounding_errors(seen["class_labels"], expected["class_labels"]) <= ONE_LAYER

    def test_clips_text_embedding_is_added_and_its_padding_hidden(self):
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        config = random_text_encoder("clip").config
        config = CLIPTextConfig(**{**config.to_dict(), "projection_dim": WIDTH})
        encoder = fill_randomly(CLIPTextModelWithProjection(config))
        text = TextCondition(UNET, encoder, toy_tokenizer(), masks_padding=True)
        projection = random_projection("clip", text_states_dim=TEXT_WIDTH)
        text.read("a red cat", NO_TEXT, None, NO_TEXT)
        condition = ImageEmbeddingCondition(projection, text).read(embeddings(1))
        kwargs = prepared(condition, call_of(1)).conditional.kwargs
        ids = toy_tokenizer()(["a red cat"], padding="max_length", max_length=12, return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids)
            mask = (torch.arange(12) < 5).long()[None]  # start, three words, end
            expected = projection(embeddings(1), output.last_hidden_state, mask, output.text_embeds)
        assert rounding_errors(kwargs["class_labels"], expected.time_embeds) <= ONE_LAYER
        assert rounding_errors(kwargs["encoder_hidden_states"], expected.encoder_hidden_states) <= ONE_LAYER
        assert kwargs["encoder_attention_mask"].tolist() == [[1] * 4 + [1] * 5 + [0] * 7]


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([[0.0] * WIDTH], "`image_embeds` is a list; pass a `torch.Tensor` of shape"),
            (torch.zeros(WIDTH), r"has shape \(12,\); this decoder takes `\(number, 12\)`"),
            (torch.zeros(2, 1, WIDTH), r"has shape \(2, 1, 12\)"),
            (torch.zeros(2, 13), r"has shape \(2, 13\); .* the CLIP that it was trained with"),
            (torch.zeros(0, WIDTH), r"has shape \(0, 12\)"),
            (torch.full((2, WIDTH), math.nan), r"NaN or infinity for 2 of 2 images \(numbers 0, 1, counted"),
            (torch.full((20, WIDTH), math.inf), r"for 20 of 20 images \(numbers 0, .*, 9, \.\.\., counted"),
        ],
    )
    def test_embeddings(self, given, message):
        with pytest.raises(ValueError, match=message):
            ImageEmbeddingCondition(random_projection(None)).read(given)

    def test_other_numbers_of_embeddings_and_prompts(self):
        text = text_condition().read(["a cat", "a dog"], NO_TEXT, None, NO_TEXT)
        condition = ImageEmbeddingCondition(random_projection(), text).read(embeddings(3))
        with pytest.raises(ValueError, match="`image_embeds` holds 3, `prompt` holds 2"):
            number_of_prompts([condition], 1)

    @pytest.mark.parametrize(
        ("projection", "unet", "message"),
        [
            (
                {},
                {"class_embed_type": None},
                "`class_embed_type=None`, which must be 'identity'.*Set `class_embed_type=",
            ),
            ({}, {"class_embed_type": "timestep"}, "`class_embed_type='timestep'`, which must be 'identity'"),
            ({"time_embed_dim": None}, {}, "`time_embed_dim=None`, but the U-Net has `class_embed_type='identity'`"),
            ({"time_embed_dim": 7}, {}, "`time_embed_dim=7`, but the U-Net's embedding of the timestep has 32 numbers"),
            ({"cross_attention_dim": 9}, {}, "states of width 9 .*attends to states of width 16"),
            (
                {"clip_extra_context_tokens": 0, "text_conditioning": None},
                {},
                "gives no states, but the U-Net attends to states of width 16",
            ),
            (
                {},
                {name: TOY_CONFIG[name] for name in ("down_block_types", "up_block_types")} | {"mid_block_type": None},
                "states of width 16 .*but the U-Net has no cross-attention",
            ),
        ],
    )
    def test_other_unets(self, projection, unet, message):
        check_projection(random_projection().config, UNET)
        with pytest.raises(ValueError, match=message):
            check_projection(random_projection(**projection).config, UNET | unet)
