"""GLIDETextModel: against a transformer written out in float64, and what padding is to it."""

import math

import pytest
import torch
from docstrings import check_documented_arguments
from tolerances import NETWORK, gradient_errors, rounding_errors
from toy_models import fill_randomly

from diffusers_adm import GLIDETextModel


CONFIG = {
    "vocab_size": 11,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 5,
    "projection_dim": 7,
}
INPUT_IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 10, 10, 10], [10, 10, 10, 10, 10]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


def random_model(**config) -> GLIDETextModel:
    return fill_randomly(GLIDETextModel(**{**CONFIG, **config}))


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def transformer(weights: dict, input_ids: torch.Tensor, mask: torch.Tensor, **config) -> tuple:
    """One caption, one position, one head at a time."""
    config = {"use_padding_embedding": True, "use_final_layer_norm": True, **CONFIG, **config}

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name, x):
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    width = config["hidden_size"] // config["num_attention_heads"]
    all_states = []
    for ids, kept in zip(input_ids.tolist(), mask.tolist(), strict=True):
        states = []
        for position, (token, is_word) in enumerate(zip(ids, kept, strict=True)):
            if is_word or not config["use_padding_embedding"]:
                word, place = weights["embeddings.token_embedding.weight"], weights["embeddings.position_embedding"]
                states.append(word[token] + place[position])
            else:
                states.append(weights["embeddings.padding_embedding"][position])
        for i in range(config["num_hidden_layers"]):
            normed = [norm(f"layers.{i}.norm1", x) for x in states]
            queries, keys, values = ([linear(f"layers.{i}.to_{n}", x) for x in normed] for n in "qkv")
            for position, query in enumerate(queries):
                heads = []
                for head in range(config["num_attention_heads"]):
                    part = slice(head * width, (head + 1) * width)
                    scores = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(width)
                    shares = scores.exp() / scores.exp().sum()
                    heads.append(sum(share * value[part] for share, value in zip(shares, values, strict=True)))
                states[position] = states[position] + linear(f"layers.{i}.to_out", torch.cat(heads))
            for position, x in enumerate(states):
                hidden = linear(f"layers.{i}.linear1", norm(f"layers.{i}.norm2", x))
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
                states[position] = x + linear(f"layers.{i}.linear2", hidden)
        if config["use_final_layer_norm"]:
            states = [norm("final_layer_norm", x) for x in states]
        all_states.append(torch.stack(states))
    return torch.stack(all_states), torch.stack([linear("text_projection", states[-1]) for states in all_states])


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class TestOutputs:
    @pytest.mark.parametrize("use_padding_embedding", [True, False])
    @pytest.mark.parametrize("use_final_layer_norm", [True, False])
    def test_states_pooled_text_and_gradients(self, use_padding_embedding, use_final_layer_norm):
        config = {"use_padding_embedding": use_padding_embedding, "use_final_layer_norm": use_final_layer_norm}
        model = random_model(**config).double()
        weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
        expected = transformer(weights, INPUT_IDS, MASK, **config)
        actual = model(INPUT_IDS, MASK)
        assert actual[0].shape == (3, 5, 12)
        assert actual[1].shape == (3, 7)
        assert all(largest_error(a, e) < 1e-12 for a, e in zip(actual, expected, strict=True))
        # Unequal weights, or the gradient of a normed state would be zero.
        for states, pooled in (actual, expected):
            (states.square() @ torch.arange(12.0).double() + pooled.sum(-1, keepdim=True).sin()).sum().backward()
        largest = max(value.grad.abs().max() for value in weights.values())
        for name, parameter in model.named_parameters():
            assert (parameter.grad - weights[name].grad).abs().max() < 1e-11 * largest, name
            assert parameter.grad.abs().max() > 0, name

    def test_float32(self):
        model = random_model()
        expected = transformer({k: v.double() for k, v in model.state_dict().items()}, INPUT_IDS, MASK)
        with torch.no_grad():
            actual = model(INPUT_IDS, MASK)
        assert all(largest_error(a, e) < 1e-5 for a, e in zip(actual, expected, strict=True))

    # A few roundings of 2**-11 and 2**-8 one after the other.
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
    def test_half_precision(self, dtype, tolerance):
        model = random_model()
        model.to(dtype)
        expected = transformer({k: v.double() for k, v in model.state_dict().items()}, INPUT_IDS, MASK)
        with torch.no_grad():
            actual = model(INPUT_IDS, MASK)
        assert all(a.dtype == dtype for a in actual)
        assert all(largest_error(a, e) < tolerance for a, e in zip(actual, expected, strict=True))

    def test_states_whose_squares_half_precision_does_not_hold(self):
        """As residual streams of deep transformers have them; 1000 ** 2 is far above 65504."""
        model = random_model().half()
        model.embeddings.padding_embedding.data *= 1000
        expected = transformer({k: v.double() for k, v in model.state_dict().items()}, INPUT_IDS, MASK)
        with torch.no_grad():
            actual = model(INPUT_IDS, MASK)
        assert all(largest_error(a, e) < 1e-2 for a, e in zip(actual, expected, strict=True))

    def test_gradient_checkpointing(self):
        models = [random_model().train() for _ in range(2)]
        models[1].enable_gradient_checkpointing()
        assert models[1].is_gradient_checkpointing
        calls = []
        models[1].layers[1].register_forward_pre_hook(lambda *_: calls.append(0))
        for model in models:
            states, pooled = model(INPUT_IDS, MASK)
            (states.sin().sum() + pooled.sin().sum()).backward()
        assert len(calls) == 2  # once more on the way back
        expected, actual = ({name: p.grad for name, p in model.named_parameters()} for model in models)
        assert gradient_errors(actual, expected) <= NETWORK


class TestPadding:
    def test_its_token_is_not_read(self):
        model, others = random_model(), INPUT_IDS.masked_fill(MASK == 0, 7)
        with torch.no_grad():
            expected, actual = model(INPUT_IDS, MASK), model(others, MASK)
            words = model(others, torch.ones_like(MASK))
        assert all(rounding_errors(a, e) <= NETWORK for a, e in zip(actual, expected, strict=True))
        assert (words[0][1:] - expected[0][1:]).abs().amax(dim=(1, 2)).min() > 0.1

    def test_words_see_it(self):
        """Each position has a vector of its own."""
        model = random_model()
        with torch.no_grad():
            before = model(INPUT_IDS, MASK)[0]
            model.embeddings.padding_embedding[3] *= -1
            after = model(INPUT_IDS, MASK)[0]
        assert rounding_errors(after[0], before[0]) <= NETWORK
        assert (after[1, :2] - before[1, :2]).abs().amax(dim=1).min() > 1e-3

    def test_gradient_reaches_the_vectors_of_padded_positions(self):
        model = random_model()
        model(INPUT_IDS[1:2], MASK[1:2])[1].sin().sum().backward()
        gradients = model.embeddings.padding_embedding.grad.abs().amax(dim=1)
        assert (gradients > 0).tolist() == [False, False, True, True, True]
        words = model.embeddings.token_embedding.weight.grad.abs().amax(dim=1) > 0
        assert words.nonzero().flatten().tolist() == [2, 9]
        positions = model.embeddings.position_embedding.grad.abs().amax(dim=1) > 0
        assert positions.tolist() == [True, True, False, False, False]

    def test_masks_that_mean_the_same(self):
        model = random_model()
        with torch.no_grad():
            for first, second in ((MASK, MASK.bool()), (torch.ones_like(MASK), None)):
                actual, expected = model(INPUT_IDS, first), model(INPUT_IDS, second)
                assert all(rounding_errors(a, e) <= NETWORK for a, e in zip(actual, expected, strict=True))


class TestConstruction:
    def test_arguments_are_documented(self):
        check_documented_arguments(GLIDETextModel.__doc__, GLIDETextModel.__init__)
        check_documented_arguments(GLIDETextModel.forward.__doc__, GLIDETextModel.forward)

    @pytest.mark.parametrize("config", [{}, {"use_padding_embedding": False, "use_final_layer_norm": False}])
    def test_saving_and_loading(self, config, tmp_path):
        model = random_model(**config)
        model.save_pretrained(tmp_path)
        loaded, info = GLIDETextModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        settings, expected = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (loaded, model))
        assert settings == expected
        with torch.no_grad():
            actual, expected = loaded(INPUT_IDS, MASK), model(INPUT_IDS, MASK)
        assert all(rounding_errors(a, e) <= NETWORK for a, e in zip(actual, expected, strict=True))

    @pytest.mark.parametrize("layers", [1, 24])
    def test_at_the_start_scales_do_not_depend_on_depth(self, layers):
        torch.manual_seed(0)
        model = GLIDETextModel(**{**CONFIG, "hidden_size": 96, "num_hidden_layers": layers, "projection_dim": 256})
        norm, model.final_layer_norm = model.final_layer_norm, None
        with torch.no_grad():
            states, _ = model(INPUT_IDS, MASK)
            pooled = model.text_projection(norm(states[:, -1]))
        # The residual stream, to which all layers together add about one unit of variance at most.
        assert 0.1 < states.std() < 1.5
        # A new time embedding has a standard deviation of about 0.14.
        assert 0.1 < pooled.std() < 0.3

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"num_attention_heads": 5}, "`num_attention_heads` is 5; it must divide `hidden_size`, 12"),
        ],
    )
    def test_bad_sizes(self, config, message):
        with pytest.raises(ValueError, match=message):
            GLIDETextModel(**{**CONFIG, **config})

    @pytest.mark.parametrize(
        ("input_ids", "mask", "message"),
        [
            (INPUT_IDS[:, :4], MASK[:, :4], r"`input_ids` has shape \(3, 4\); this model takes \(batch_size, 5\)"),
            (INPUT_IDS.repeat(1, 2), None, r"has shape \(3, 10\)"),
            (INPUT_IDS[0], MASK[0], r"has shape \(5,\)"),
            (INPUT_IDS, MASK[:, :1], r"`attention_mask` has shape \(3, 1\); this model takes \(3, 5\)"),
        ],
    )
    def test_bad_inputs(self, input_ids, mask, message):
        with pytest.raises(ValueError, match=message):
            random_model()(input_ids, mask)
