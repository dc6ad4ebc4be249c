"""UnCLIPProjectionModel: against diffusers' class with the same weights, and what else it may leave out."""

import pytest
import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from docstrings import check_documented_arguments
from tolerances import ONE_LAYER, rounding_errors
from toy_models import fill_randomly

from diffusers_adm import UnCLIPProjectionModel


BATCH, LENGTH, WIDTH, TIME, CROSS = 3, 5, 12, 16, 8
CONFIG = {"clip_embeddings_dim": WIDTH, "time_embed_dim": TIME, "cross_attention_dim": CROSS}


def random_projection(seed=0, **config) -> UnCLIPProjectionModel:
    return fill_randomly(UnCLIPProjectionModel(**{**CONFIG, **config}), seed)


def inputs(width=WIDTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"image_embeds": (BATCH, WIDTH), "text_states": (BATCH, LENGTH, width), "text_embeds": (BATCH, WIDTH)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"text_mask": torch.arange(LENGTH).expand(BATCH, -1) < torch.tensor([[5], [2], [1]])}


class TestAgainstDiffusers:
    @pytest.fixture(params=[4, 3])
    def theirs(self, request):
        return fill_randomly(UnCLIPTextProjModel(clip_extra_context_tokens=request.param, **CONFIG))

    def test_same_weights_give_the_same_numbers(self, theirs, tmp_path):
        theirs.save_pretrained(tmp_path)
        ours, info = UnCLIPProjectionModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        given = inputs()
        output = ours(**given)
        states, time_embeds = theirs(
            image_embeddings=given["image_embeds"],
            prompt_embeds=given["text_embeds"],
            text_encoder_hidden_states=given["text_states"],
            do_classifier_free_guidance=False,
        )
        assert rounding_errors(output.encoder_hidden_states, states) <= ONE_LAYER
        assert rounding_errors(output.time_embeds, time_embeds) <= ONE_LAYER
        number = theirs.clip_extra_context_tokens
        assert output.encoder_attention_mask[:, :number].all()
        assert torch.equal(output.encoder_attention_mask[:, number:], given["text_mask"])

    def test_dropped_embeddings_are_those_of_its_unconditional_pass(self, theirs):
        ours = UnCLIPProjectionModel(clip_extra_context_tokens=theirs.clip_extra_context_tokens, **CONFIG)
        ours.load_state_dict(theirs.state_dict())
        given = inputs()
        both = {name: torch.cat([value, 2 * value]) for name, value in given.items() if name.startswith("text_")}
        both["text_mask"] = torch.cat([given["text_mask"]] * 2)
        dropped = torch.arange(2 * BATCH) < BATCH
        output = ours(torch.cat([given["image_embeds"]] * 2), **both, dropped=dropped)
        states, time_embeds = theirs(
            image_embeddings=given["image_embeds"],
            prompt_embeds=both["text_embeds"],
            text_encoder_hidden_states=both["text_states"],
            do_classifier_free_guidance=True,
        )
        assert rounding_errors(output.encoder_hidden_states, states) <= ONE_LAYER
        assert rounding_errors(output.time_embeds, time_embeds) <= ONE_LAYER

    def test_its_folder_loads_there(self, theirs, tmp_path):
        """With the same parameters, the classes read each other's files."""
        fill_randomly(UnCLIPProjectionModel(**theirs.config), seed=3).save_pretrained(tmp_path)
        _, info = UnCLIPTextProjModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())


class TestStates:
    """The states of any encoder, as in the paper."""

    def test_states_follow_the_tokens_as_they_are(self):
        given = inputs(CROSS)
        del given["text_embeds"]
        model = random_projection(text_conditioning="states")
        output = model(**given)
        assert torch.equal(output.encoder_hidden_states[:, 4:], given["text_states"])
        weight, bias = model.clip_extra_context_tokens_proj.weight.double(), model.clip_extra_context_tokens_proj.bias
        flat = given["image_embeds"].double() @ weight.T + bias.double()
        # The numbers of all tokens alternate, as in the published weights.
        expected = torch.stack([flat[:, token::4] for token in range(4)], dim=1)
        assert rounding_errors(output.encoder_hidden_states[:, :4], expected.float()) <= ONE_LAYER
        assert model.embedding_proj is None

    def test_states_of_another_width_are_projected(self):
        given = inputs(20)
        del given["text_embeds"]
        model = random_projection(text_conditioning="states", text_states_dim=20)
        expected = given["text_states"].double() @ model.encoder_hidden_states_proj.weight.T.double()
        expected += model.encoder_hidden_states_proj.bias.double()
        assert rounding_errors(model(**given).encoder_hidden_states[:, 4:], expected.float()) <= ONE_LAYER

    @pytest.mark.parametrize("tokens", [0, 2])
    def test_without_text(self, tokens):
        model = random_projection(text_conditioning=None, clip_extra_context_tokens=tokens)
        output = model(inputs()["image_embeds"])
        assert output.time_embeds.shape == (BATCH, TIME)
        assert output.encoder_attention_mask is None
        states = output.encoder_hidden_states
        assert states is None if tokens == 0 else states.shape == (BATCH, 2, CROSS)

    def test_without_time(self):
        model = random_projection(text_conditioning="states", time_embed_dim=None)
        given = inputs(CROSS)
        output = model(given["image_embeds"], given["text_states"])
        assert output.time_embeds is None
        assert output.encoder_hidden_states.shape == (BATCH, 4 + LENGTH, CROSS)
        assert output.encoder_attention_mask is None

    def test_without_tokens_the_mask_is_that_of_the_text(self):
        given = inputs(CROSS)
        del given["text_embeds"]
        output = random_projection(text_conditioning="states", clip_extra_context_tokens=0)(**given)
        assert torch.equal(output.encoder_hidden_states, given["text_states"])
        assert torch.equal(output.encoder_attention_mask, given["text_mask"])

    @pytest.mark.parametrize("config", [{}, {"time_embed_dim": None}, {"cross_attention_dim": None}])
    def test_every_weight_is_trained_whatever_is_dropped(self, config):
        """Distributed training waits for the gradient of each weight."""
        has_states = "cross_attention_dim" not in config
        kind = {"text_conditioning": "states" if has_states else None}
        model, given = random_projection(**config, **kind), inputs(CROSS)
        for dropped in (torch.zeros(BATCH).bool(), torch.ones(BATCH).bool()):
            text = {"text_states": given["text_states"]} if has_states else {}
            output = model(given["image_embeds"], **text, dropped=dropped)
            sum(value.sum() for value in output if value is not None).backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            is_learned = bool(model.learned_classifier_free_guidance_embeddings.grad.abs().sum() > 0)
            assert is_learned == bool(dropped.all())
            model.zero_grad()


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"clip_embeddings_dim": 0}, "`clip_embeddings_dim` is 0; it must be at least 1"),
            ({"time_embed_dim": -1}, "`time_embed_dim` is -1; it must be at least 1"),
            ({"clip_extra_context_tokens": -1}, "`clip_extra_context_tokens` is -1; it must be at least 0"),
            ({"text_conditioning": "glide"}, "`text_conditioning` is 'glide'; it must be None or one of"),
            ({"time_embed_dim": None, "clip_extra_context_tokens": 0}, "the image embedding would have no effect"),
            ({"cross_attention_dim": None}, "but `cross_attention_dim` is None. Set it"),
        ],
    )
    def test_configs(self, config, message):
        with pytest.raises(ValueError, match=message):
            UnCLIPProjectionModel(**{**CONFIG, **config})

    @pytest.mark.parametrize(
        ("config", "changes", "message"),
        [
            ({}, {"image_embeds": torch.zeros(BATCH, 7)}, r"`image_embeds` has shape \(3, 7\); this model takes"),
            ({}, {"text_embeds": None}, "`text_embeds` is missing.*'clip'.*Pass it"),
            ({}, {"text_states": None}, "`text_states` is missing"),
            ({"text_conditioning": None}, {}, "`text_states` is given.*None.*Leave it out"),
            ({"text_conditioning": "states"}, {}, "`text_embeds` is given"),
        ],
    )
    def test_inputs(self, config, changes, message):
        with pytest.raises(ValueError, match=message):
            random_projection(**config)(**inputs() | changes)


def test_documentation():
    check_documented_arguments(UnCLIPProjectionModel.__doc__, UnCLIPProjectionModel.__init__)
    check_documented_arguments(UnCLIPProjectionModel.forward.__doc__, UnCLIPProjectionModel.forward)
