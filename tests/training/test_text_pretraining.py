"""Pretraining of a text encoder: what it can and cannot learn is known from the captions."""

import json
import logging

import datasets
import numpy as np
import pytest
import torch
from toy_models import MAX_PROMPT_LENGTH, random_text_encoder, toy_tokenizer

from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.text import encode_tokens, pads_to_max, tokenize
from diffusers_adm.data.latents import StoredLatents
from diffusers_adm.data.text_encoders import load_text_encoder, load_tokenizer
from diffusers_adm.training import text_pretraining


SHAPE = (2, 2, 2)
STEPS = 300
GLIDE = {"_class_name": "GLIDETextModel", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def store(folder, latents, captions, labels=None):
    """A folder as `encode_latents` leaves it."""
    folder.mkdir()
    rows = {
        "latent_mean": [row.ravel().tolist() for row in latents],
        "latent_std": np.zeros((len(latents), latents[0].size)).tolist(),
        "image_name": [f"image {number}" for number in range(len(latents))],
        "text": captions,
    }
    numbers = datasets.List(datasets.Value("float32"), length=latents[0].size)
    features = {"latent_mean": numbers, "latent_std": numbers, "image_name": datasets.Value("string")}
    several = isinstance(captions[0], list)
    features["text"] = datasets.List(datasets.Value("string")) if several else datasets.Value("string")
    if labels is not None:
        rows["label"], features["label"] = labels, datasets.ClassLabel(names=["first", "second"])
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(folder / "latents-00000-of-00001.parquet")
    StoredLatents(
        autoencoder="toy",
        vae="toy",
        scaling_factor=1.0,
        shift_factor=0.0,
        channels=SHAPE[0],
        size=SHAPE[1:],
        resolution=4,
        dtype="float32",
        image_format=ImageFormat(),
        condition_format=None,
        random_flip=False,
        num_cropped=0,
        num_images=len(latents),
        label_column=None if labels is None else "label",
        caption_column="text",
        conditioning_image_column=None,
    ).write(folder)
    return folder


def random_latents(number, seed=0):
    return list(3 * np.random.default_rng(seed).standard_normal((number, *SHAPE)).astype(np.float32) + 1)


def save_text(folder, kind):
    random_text_encoder(kind).save_pretrained(folder / "text_encoder")
    toy_tokenizer(kind).save_pretrained(folder / "tokenizer")
    return str(folder)


def run(folder, **arguments):
    defaults = {"train_data_dir": folder / "latents", "output_dir": folder / "result", "max_train_steps": STEPS}
    defaults |= {"train_batch_size": 8, "learning_rate": 0.01, "lr_warmup_steps": 10, "logging_steps": 20}
    given = [f"--{name}={value}" for name, value in (defaults | arguments).items() if value is not True]
    text_pretraining.main(given + [f"--{name}" for name, value in arguments.items() if value is True])


def last_shares(caplog):
    """The shares of the last line of the log: from the pooled text (if there is one) and from the states."""
    words = [record.getMessage() for record in caplog.records if "unexplained" in record.getMessage()][-1].split()
    return [float(word) for word in words if word[0].isdigit() and "." in word]


@pytest.mark.parametrize("kind", ["clip", "glide", "t5"])
def test_loss_falls_to_the_variance_within_captions(kind, tmp_path, caplog):
    """Two images share a caption, whose best prediction is their mean; the others can be told apart."""
    latents = random_latents(4)
    store(tmp_path / "latents", latents, ["a red cat", "a red cat", "a dog", "a green hat"])
    rows = np.stack(latents).reshape(4, -1).astype(np.float64)
    within = 2 * np.square((rows[0] - rows[1]) / 2).sum() / np.square(rows - rows.mean(axis=0)).sum()
    run(tmp_path, text_encoder_name_or_path=save_text(tmp_path / "text", kind))
    # The mean of the last 20 steps: the smaller the rest, the slower it is learned.
    assert last_shares(caplog) == pytest.approx([within] * (1 if kind == "t5" else 2), abs=0.04)


def test_captions_that_say_nothing_teach_nothing(tmp_path, caplog):
    store(tmp_path / "latents", random_latents(8), ["a cat"] * 8)
    run(tmp_path, text_encoder_name_or_path=save_text(tmp_path / "text", "clip"))
    assert last_shares(caplog) == pytest.approx([1, 1], abs=0.02)


def test_each_epoch_draws_one_of_the_captions(tmp_path, caplog):
    """Either caption of an image tells it apart only if both were trained."""
    store(tmp_path / "latents", random_latents(2), [["a cat", "red"], ["a dog", "green"]])
    source = save_text(tmp_path / "text", "glide")
    run(tmp_path, text_encoder_name_or_path=source, train_batch_size=2)
    assert max(last_shares(caplog)) < 0.02
    result = str(tmp_path / "result")
    encoder, tokenizer = load_text_encoder("name", result, trained=True), load_tokenizer("name", result)
    ids, mask = tokenize(tokenizer, ["a cat", "red", "a dog", "green"], max_length=MAX_PROMPT_LENGTH, pad_to_max=True)
    with torch.no_grad():
        pooled = encode_tokens(encoder.eval(), ids, mask, pad_to_max=pads_to_max(encoder, {})).pooled
    apart = torch.cdist(pooled, pooled)
    assert max(apart[0, 1], apart[2, 3]) < 0.5 * min(apart[0, 2], apart[1, 3], apart[0, 3], apart[1, 2])


def test_classes_are_drawn_equally_often(tmp_path, caplog):
    """Seven equal images of one class and one of the other: drawn equally often, their mean is halfway."""
    zero, one = np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)
    store(tmp_path / "latents", [zero] * 7 + [one], ["a cat"] * 8, labels=[0] * 7 + [1])
    source = save_text(tmp_path / "text", "clip")
    run(tmp_path, text_encoder_name_or_path=source, label_column="label", class_balanced=True)
    # Variance by the data: 1/8 * 7/8; the mean square distance of equally many zeros and ones to their mean: 1/4.
    assert last_shares(caplog) == pytest.approx([0.25 / (7 / 64)] * 2, rel=0.05)


def test_from_scratch_by_seed_with_a_result_that_training_takes(tmp_path):
    store(tmp_path / "latents", random_latents(4), ["a cat", "a dog", "red", "a green hat"])
    config = tmp_path / "text.json"
    config.write_text(json.dumps(GLIDE))
    toy_tokenizer("glide").save_pretrained(tmp_path / "tokenizer")
    given = {"text_encoder_config_name_or_path": config, "tokenizer_name_or_path": tmp_path / "tokenizer"}
    weights = []
    for name in ("first", "second"):
        run(tmp_path, **given, output_dir=tmp_path / name, max_train_steps=3, lr_warmup_steps=0)
        encoder = load_text_encoder("name", str(tmp_path / name), trained=True)
        weights.append(encoder.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=name)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["text_encoder", "tokenizer"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "Pass one of `text_encoder_name_or_path` and"),
        ({"text_encoder_config_name_or_path": "x"}, "has no tokenizer"),
        (
            {"text_encoder_name_or_path": "x", "class_balanced": True},
            "`label_column` is None and `class_balanced` True",
        ),
        ({"text_encoder_name_or_path": "x", "label_column": "label"}, "Pass both, or neither"),
        ({"text_encoder_name_or_path": "x", "max_train_steps": 5}, "would never reach its peak"),
        ({"text_encoder_name_or_path": "x", "learning_rate": 0}, "`learning_rate` is 0.0"),
        ({"text_encoder_name_or_path": "x", "max_train_steps": 0}, "`max_train_steps`"),
        ({"text_encoder_name_or_path": "x", "train_data_dir": "images"}, "holds no latents"),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        run(tmp_path, **arguments)


def test_loss_that_is_not_finite_leaves_no_result(tmp_path):
    store(tmp_path / "latents", random_latents(4), ["a cat", "a dog", "red", "a green hat"])
    with pytest.raises(ValueError, match="not finite"):
        run(tmp_path, text_encoder_name_or_path=save_text(tmp_path / "text", "glide"), learning_rate=1e30)
    assert not (tmp_path / "result").exists()


def test_a_tokenizer_of_another_encoder(tmp_path):
    store(tmp_path / "latents", random_latents(4), ["a cat", "a dog", "red", "a green hat"])
    source = save_text(tmp_path / "text", "glide")
    tokenizer = toy_tokenizer("glide")
    tokenizer.add_tokens(["bird", "fish"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`tokenizer` has .* tokens, but the embedding of `text_encoder`"):
        run(tmp_path, text_encoder_name_or_path=source, tokenizer_name_or_path=tmp_path / "other")


def test_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        run(tmp_path, text_encoder_name_or_path="x")


def test_equal_latents_are_refused(tmp_path):
    store(tmp_path / "latents", [np.ones(SHAPE, np.float32)] * 4, ["a cat"] * 4)
    with pytest.raises(ValueError, match="are equal"):
        run(tmp_path, text_encoder_name_or_path=save_text(tmp_path / "text", "glide"))


@pytest.fixture(autouse=True)
def quiet():
    yield
    logging.getLogger("diffusers_adm.training.text_pretraining").setLevel(logging.NOTSET)
