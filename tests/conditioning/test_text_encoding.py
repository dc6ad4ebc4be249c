"""Captions to conditioning: what is padded, masked, cut and refused."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tolerances import NETWORK, rounding_errors
from toy_models import MAX_PROMPT_LENGTH, TEXT_CONFIGS, TEXT_WIDTH, random_text_encoder, toy_tokenizer
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from diffusers_adm.conditioning.text import (
    DEFAULT_MAX_LENGTH,
    check_text_encoder,
    cross_attention_width,
    encode_tokens,
    max_prompt_length,
    pads_to_max,
    text_model_kwargs,
    tokenize,
)


LONG = "a red cat on a green mat with a hat on the dog"


@pytest.mark.parametrize(("kind", "expected"), [("clip", True), ("t5", False), ("bert", False)])
def test_who_reads_padding(kind, expected):
    encoder = random_text_encoder(kind)
    assert pads_to_max(encoder, {}) is expected
    assert pads_to_max(encoder, {"addition_embed_type": "text"}) is True
    assert pads_to_max(encoder, {"cross_attention_norm": "group_norm"}) is True
    assert pads_to_max(encoder, {"cross_attention_norm": "layer_norm"}) is expected
    encoder.attends_to_padding = True
    assert pads_to_max(encoder, {}) is True
    assert pads_to_max(random_text_encoder("glide"), {}) is True


@pytest.mark.parametrize("pad_to_max", [True, False])
@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_tokens_and_mask(kind, pad_to_max):
    tokenizer = toy_tokenizer(kind)
    prompts = ["a cat", "", "the red dog on a mat"]
    input_ids, mask = tokenize(tokenizer, prompts, max_length=MAX_PROMPT_LENGTH, pad_to_max=pad_to_max)
    alone = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    length = MAX_PROMPT_LENGTH if pad_to_max else max(map(len, alone))
    assert input_ids.shape == mask.shape == (3, length)
    for row, kept, expected in zip(input_ids, mask, alone, strict=True):
        assert row.tolist() == expected + [tokenizer.pad_token_id] * (length - len(expected))
        assert kept.tolist() == [1] * len(expected) + [0] * (length - len(expected))


def test_a_prompt_that_is_too_long_is_cut_and_named(caplog):
    tokenizer = toy_tokenizer("clip")
    with caplog.at_level(logging.WARNING):
        input_ids, _ = tokenize(tokenizer, ["a cat", LONG], max_length=8, pad_to_max=True)
    assert tokenizer.decode(input_ids[1], skip_special_tokens=True) == "a red cat on a green"
    (record,) = caplog.records
    assert LONG in record.message
    assert "more than 8 tokens" in record.message
    assert "'mat with a hat on the dog'" in record.message
    caplog.clear()
    tokenize(tokenizer, [LONG], max_length=8, pad_to_max=True, warn=False)
    # Six words and both special tokens fit exactly.
    tokenize(tokenizer, ["a red cat on a green"], max_length=8, pad_to_max=True)
    assert not caplog.records


def test_padding_is_on_the_right_whatever_the_tokenizer_says():
    """On the left it would move the words of a prompt by the length of the others."""
    tokenizer = toy_tokenizer("bert")
    expected = tokenize(tokenizer, ["a cat", "the red dog"], max_length=8, pad_to_max=False)
    tokenizer.padding_side = "left"
    actual = tokenize(tokenizer, ["a cat", "the red dog"], max_length=8, pad_to_max=False)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("prompts", [["", ""], ["", "a cat"]])
def test_something_is_seen_of_an_empty_prompt_without_special_tokens(prompts):
    tokenizer = toy_tokenizer("bert")
    tokenizer.backend_tokenizer.post_processor = None
    input_ids, mask = tokenize(tokenizer, prompts, max_length=8, pad_to_max=False)
    assert input_ids.shape == mask.shape
    assert (input_ids[0] == tokenizer.pad_token_id).all()
    assert mask.sum(dim=1).tolist() == [len(prompt.split()) for prompt in prompts]
    encoder = random_text_encoder("bert")
    with torch.no_grad():
        conditioning = encode_tokens(encoder, input_ids, mask, pad_to_max=False)
        alone = encoder(torch.tensor([[tokenizer.pad_token_id]])).last_hidden_state[0, 0]
    assert conditioning.attention_mask.sum(dim=1).tolist() == [max(1, len(prompt.split())) for prompt in prompts]
    torch.testing.assert_close(conditioning.hidden_states[0, 0], alone, rtol=1e-5, atol=1e-5)
    assert mask.sum(dim=1).tolist() == [len(prompt.split()) for prompt in prompts]  # not changed in place


def test_nothing_but_padding_is_seen_of_an_empty_prompt_by_an_encoder_that_attends_to_it():
    """As GLIDE was trained: its first padding vector, not the first padding token."""
    tokenizer, encoder = toy_tokenizer("glide"), random_text_encoder("glide")
    prompts = ["a cat", ""]
    input_ids, mask = tokenize(tokenizer, prompts, max_length=MAX_PROMPT_LENGTH, pad_to_max=True)
    assert mask.sum(dim=1).tolist() == [2, 0]
    with torch.no_grad():
        conditioning = encode_tokens(encoder, input_ids, mask, pad_to_max=True)
        states, pooled = encoder(input_ids, torch.tensor([[1, 1, *[0] * 10], [0] * 12]))
        wrong, _ = encoder(input_ids, torch.tensor([[1, 1, *[0] * 10], [1, *[0] * 11]]))
    assert conditioning.attention_mask is None
    assert rounding_errors(conditioning.hidden_states, states) <= NETWORK
    assert rounding_errors(conditioning.pooled, pooled) <= NETWORK
    assert (wrong[1] - states[1]).abs().max() > 0.1


def test_no_padding_token():
    tokenizer = toy_tokenizer("bert")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"has no padding token.*tokenizer\.pad_token = tokenizer\.eos_token"):
        tokenize(tokenizer, ["a cat"], max_length=8, pad_to_max=False)


def test_the_shorter_limit_counts():
    def limit(of_tokenizer, of_encoder):
        encoder = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=of_encoder))
        return max_prompt_length(SimpleNamespace(model_max_length=of_tokenizer), encoder)

    assert limit(77, 512) == limit(512, 77) == limit(int(1e30), 77) == limit(77, None) == 77
    assert limit(int(1e30), None) == DEFAULT_MAX_LENGTH


@pytest.mark.parametrize("of_tokenizer", [5, 512, int(1e30)])
def test_an_encoder_of_one_length_sets_it(of_tokenizer):
    tokenizer, encoder = toy_tokenizer("glide", max_length=of_tokenizer), random_text_encoder("glide")
    assert max_prompt_length(tokenizer, encoder) == MAX_PROMPT_LENGTH
    encoder.register_to_config(max_position_embeddings=None)
    assert max_prompt_length(tokenizer, encoder) == min(of_tokenizer, DEFAULT_MAX_LENGTH)


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_states_are_those_of_the_prompt_alone(kind):
    """Against the encoder called by hand, on one prompt, padded only where Stable Diffusion pads."""
    tokenizer, encoder = toy_tokenizer(kind), random_text_encoder(kind)
    pad_to_max = pads_to_max(encoder, {})
    prompts = ["a cat", "", "the red dog on a mat"]
    input_ids, mask = tokenize(tokenizer, prompts, max_length=MAX_PROMPT_LENGTH, pad_to_max=pad_to_max)
    with torch.no_grad():
        conditioning = encode_tokens(encoder, input_ids, mask, pad_to_max=pad_to_max)
        for i, prompt in enumerate(prompts):
            padding = {"padding": "max_length", "max_length": MAX_PROMPT_LENGTH} if kind == "clip" else {}
            alone = encoder(tokenizer(prompt, return_tensors="pt", **padding)["input_ids"]).last_hidden_state[0]
            seen = conditioning.hidden_states[i][: len(alone)]
            torch.testing.assert_close(seen, alone, rtol=1e-5, atol=1e-5)
            if kind == "clip":
                assert conditioning.attention_mask is None
            else:
                assert conditioning.attention_mask[i].sum() == len(alone)


class TestPooled:
    def test_it_is_the_projected_one(self):
        config = CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, eos_token_id=3)
        config.num_attention_heads, config.projection_dim = 2, 6
        encoder = CLIPTextModelWithProjection(config).eval()
        ids = torch.tensor([[1, 5, 3]])
        conditioning = encode_tokens(encoder, ids, torch.ones_like(ids), pad_to_max=True)
        assert rounding_errors(conditioning.pooled, encoder(ids).text_embeds) <= NETWORK
        kwargs = text_model_kwargs(conditioning, {"addition_embed_type": "text_embeds"})
        assert kwargs["added_cond_kwargs"]["text_embeds"] is conditioning.pooled
        assert "added_cond_kwargs" not in text_model_kwargs(conditioning, {})

    def test_an_encoder_that_returns_a_tuple(self):
        class Encoder(torch.nn.Module):
            config = SimpleNamespace(hidden_size=4)
            attends_to_padding = True

            def forward(self, input_ids, attention_mask):
                assert attention_mask is not None
                return torch.ones(*input_ids.shape, 4), torch.zeros(len(input_ids), 6)

        ids = torch.ones(2, 3, dtype=torch.long)
        conditioning = encode_tokens(Encoder(), ids, torch.ones_like(ids), pad_to_max=True)
        assert conditioning.hidden_states.shape == (2, 3, 4)
        assert conditioning.pooled.shape == (2, 6)
        assert conditioning.attention_mask is None

    def test_an_encoder_without(self):
        encoder, ids = random_text_encoder("t5"), torch.tensor([[1, 2]])
        conditioning = encode_tokens(encoder, ids, torch.ones_like(ids), pad_to_max=False)
        with pytest.raises(ValueError, match="only states of the text are given. Pass `pooled_prompt_embeds`"):
            text_model_kwargs(conditioning, {"addition_embed_type": "text_embeds"})


class TestCheck:
    config = TEXT_CONFIGS["added_kv"]

    def test_what_fits(self):
        check_text_encoder(random_text_encoder("clip"), toy_tokenizer("clip"), self.config)
        projected = {**self.config, "cross_attention_dim": 5, "encoder_hid_dim": TEXT_WIDTH}
        check_text_encoder(random_text_encoder("clip"), toy_tokenizer("clip"), projected)

    def test_width(self):
        with pytest.raises(ValueError, match=rf"states of width {TEXT_WIDTH}, but `unet` takes 24.*encoder_hid_dim="):
            check_text_encoder(
                random_text_encoder("t5"), toy_tokenizer("t5"), {**self.config, "cross_attention_dim": 24}
            )

    def test_a_tokenizer_without_words(self, tmp_path):
        encoder = random_text_encoder("bert")
        encoder.save_pretrained(tmp_path)
        made_up = AutoTokenizer.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has 5 tokens, all of them special.*Were its files missing"):
            check_text_encoder(encoder, made_up, self.config)

    def test_no_tokenizer(self):
        with pytest.raises(ValueError, match="without a `tokenizer`"):
            check_text_encoder(random_text_encoder("t5"), None, self.config)

    def test_no_cross_attention(self):
        config = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "mid_block_type": None}
        with pytest.raises(ValueError, match="`unet` has no cross-attention"):
            check_text_encoder(random_text_encoder("t5"), toy_tokenizer("t5"), config)

    def test_a_tokenizer_with_more_tokens_than_the_encoder_has_rows(self):
        tokenizer = toy_tokenizer("t5")
        rows = len(tokenizer)
        tokenizer.add_tokens(["more", "words"])
        with pytest.raises(ValueError, match=rf"`tokenizer` has {rows + 2} tokens, .* has {rows} rows"):
            check_text_encoder(random_text_encoder("t5"), tokenizer, self.config)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"cross_attention_dim": 24}, 24),
        ({"cross_attention_dim": [24, 24]}, 24),
        ({"cross_attention_dim": 24, "encoder_hid_dim": 40}, 40),
        ({}, 1280),
        ({"down_block_types": ["DownBlock2D"]}, None),
    ],
)
def test_width_that_a_config_asks_for(config, width):
    assert cross_attention_width({"down_block_types": ["CrossAttnDownBlock2D"], **config}) == width


def test_width_that_a_config_leaves_to_its_class():
    assert cross_attention_width({"_class_name": "UNet2DConditionModel"}) == 1280
    assert cross_attention_width({"_class_name": "AdaGNUNet2DModel"}) is None
