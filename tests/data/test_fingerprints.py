"""Hashes of parts: the same for the same part, and another one for whatever changes what it does."""

import pytest
import torch
from toy_models import random_classifier, random_text_encoder, random_unet, toy_tokenizer
from transformers import AutoTokenizer, BertModel

from diffusers_adm.data.fingerprints import hash_config, hash_tensors, hash_tokenizer


def test_tensors():
    values = torch.arange(6, dtype=torch.float32)
    tensors = {"a": values.view(2, 3), "flag": torch.tensor(True)}
    hashed = hash_tensors(tensors)
    assert len(hashed) == 32
    assert hash_tensors({"a": values.view(2, 3).T.contiguous().T, "flag": torch.tensor(True)}) == hashed
    others = [
        {"b": tensors["a"], "flag": tensors["flag"]},
        {**tensors, "a": values.view(3, 2)},
        {**tensors, "a": tensors["a"].view(torch.int32)},
        {**tensors, "a": tensors["a"].bfloat16()},
        {**tensors, "a": torch.nextafter(tensors["a"], torch.tensor(9.0))},
        {**tensors, "flag": torch.tensor(False)},
    ]
    assert len({hash_tensors(other) for other in others} - {hashed}) == len(others)


@pytest.mark.parametrize("make", [random_unet, lambda: random_text_encoder("bert")])
def test_config_as_saved(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    assert hash_config(type(model).from_pretrained(tmp_path)) == hash_config(model)


def test_other_configs():
    bert = random_text_encoder("bert")
    hashed = {hash_config(model) for model in (bert, random_unet(), random_unet(dropout=0.1))}
    bert.config.layer_norm_eps = 1e-3
    assert len(hashed | {hash_config(bert), hash_config(type("Other", (BertModel,), {})(bert.config))}) == 5


def test_the_noise_schedule_of_the_training_is_no_setting():
    """It is checked elsewhere. Hashes are those of configs from before there was such an entry."""
    classifier = random_classifier()
    hashed = hash_config(classifier)
    classifier.register_to_config(noise_schedule={"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"})
    assert hash_config(classifier) == hashed
    older = type("AdaGNClassifierModel", (), {})()
    older.config = {name: value for name, value in classifier.config.items() if name != "noise_schedule"}
    assert hash_config(older) == hashed


@pytest.mark.parametrize("kind", ["clip", "bert", "t5"])
def test_tokenizer(kind, tmp_path):
    tokenizer = toy_tokenizer(kind)
    hashed = hash_tokenizer(tokenizer)
    tokenizer(["a cat", "a"], padding="max_length", truncation=True, max_length=3)
    assert hash_tokenizer(tokenizer) == hashed
    tokenizer.save_pretrained(tmp_path)
    assert hash_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == hashed
    tokenizer.add_tokens("dragon")
    assert len({hash_tokenizer(other) for other in (tokenizer, toy_tokenizer(kind, max_length=11))} - {hashed}) == 2


def test_a_compiled_network_is_the_same():
    unet = random_unet()
    assert hash_config(torch.compile(unet, backend="eager")) == hash_config(unet)
