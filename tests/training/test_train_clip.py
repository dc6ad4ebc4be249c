"""training/train_clip.py: what it saves, fine-tuning, resuming, augmentation, validation, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import (
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    flags,
    launch,
    own_process_state,
    read_metrics,
    reset_accelerate,
)
from safetensors.torch import load_file, save_file
from scripts import REPOSITORY, load_script
from toy_clips import TOY_CLIP_CONFIG, clip_processor, random_clip, save_clip
from toy_models import toy_tokenizer
from transformers import AutoTokenizer, CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.training import (
    build_optimizer,
    contrastive_loss,
    parse_args,
    post_hoc_ema,
    random_colors,
    random_motion,
    validate_clip,
)
from diffusers_adm.training.clip import CLIPTraining, HeldOut, embed_images, embed_texts
from diffusers_adm.training.resume import apply_optimizer_arguments


train_clip = load_script("train_clip")
TOKENIZER = str(REPOSITORY / "spaces" / "model" / "base")
SKIN_TONES = ", (light|medium-light|medium|medium-dark|dark) skin tone$"


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(train_clip, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_clip"):
        yield


def train(**arguments):
    reset_accelerate()
    train_clip.main(flags(**arguments))


def write_config(folder, **changes):
    """A config from scratch; a change of a tower is added to its entries."""
    config = json.loads(json.dumps(TOY_CLIP_CONFIG))
    for name, change in changes.items():
        config[name] = config[name] | change if isinstance(change, dict) else change
    path = folder / "clip.json"
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return str(path)


def save_parquet(path, captions, size=8):
    """Images of noise with these captions; the file."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in captions]
    text = datasets.Value("string")
    text = text if isinstance(captions[0], str) else datasets.List(text)
    features = datasets.Features({"image": datasets.Image(), "text": text})
    datasets.Dataset.from_dict({"image": images, "text": list(captions)}, features).to_parquet(path)
    return str(path)


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps on some of the embedded emoji."""
    arguments = {k: v for k, v in SHORT_RUN.items() if not k.endswith(("_images", "_inference_steps"))}
    return arguments | {
        "model_config_name_or_path": write_config(tmp_path),
        "tokenizer_name_or_path": TOKENIZER,
        "data_files": EMOJI,
        "caption_column": "text",
        "max_train_samples": 16,
        "learning_rate": 1e-3,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def pretrained(short, tmp_path):
    """The same, to fine-tune a CLIP in `tmp_path / "base"`."""
    arguments = {k: v for k, v in short.items() if k not in ("model_config_name_or_path", "tokenizer_name_or_path")}
    return arguments | {"pretrained_model_name_or_path": save_clip(tmp_path / "base")}


# 1. The result


def held_out_emoji():
    rows = datasets.load_dataset("parquet", data_files=EMOJI, split="train")
    return [image.convert("RGB") for image in rows["image"]], rows["text"][:], rows["label"][:], rows.features["label"]


def test_the_result_loads_with_transformers_alone(short):
    train(**short)
    folder = short["output_dir"]
    clip, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    assert (*processor.image_mean, *processor.image_std) == (0.5,) * 6
    pixel_values = processor(held_out_emoji()[0][:3], return_tensors="pt")["pixel_values"]
    ids = tokenizer(["fire", "red heart, dark skin tone"], padding=True, return_tensors="pt")["input_ids"]
    vision, text = (
        kind.from_pretrained(folder) for kind in (CLIPVisionModelWithProjection, CLIPTextModelWithProjection)
    )
    with torch.no_grad():
        images, texts = clip.get_image_features(pixel_values).pooler_output, clip.get_text_features(ids).pooler_output
        assert images.shape == (3, 6)
        assert texts.shape == (2, 6)
        assert torch.equal(vision(pixel_values).image_embeds, images)
        assert torch.equal(text(ids).text_embeds, texts)
    config = clip.config.text_config
    assert (config.vocab_size, config.max_position_embeddings) == (len(tokenizer), tokenizer.model_max_length)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.projection_dim == clip.config.vision_config.projection_dim == 6


def test_validation_is_that_of_transformers(short):
    """All measures once more, from the saved result with transformers' own preprocessing."""
    folder = short["output_dir"]
    train(
        **short | {"max_train_samples": 64, "max_train_steps": 8, "learning_rate": 1e-2},
        label_column="label",
        validation_data_files=EMOJI,
        variant_pattern=SKIN_TONES,
        zero_shot_template="an emoji of {}",
        validation_steps=4,
    )
    rows = [row for row in read_metrics(folder) if "validation_loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    found = {name.removeprefix("validation_"): value for name, value in rows[-1].items()}
    images, captions, labels, feature = held_out_emoji()
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pixel_values = CLIPImageProcessorPil.from_pretrained(folder)(
        images, size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():

        def embed(texts):
            ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
            return F.normalize(clip.get_text_features(ids).pooler_output, dim=-1)

        image_embeds = F.normalize(clip.get_image_features(pixel_values).pooler_output, dim=-1)
        logits = clip.logit_scale.exp() * image_embeds @ embed(captions).T
        classes = embed([f"an emoji of {name}" for name in feature.names])
    assert len(set(captions)) == len(captions) == 163
    own = torch.arange(163)
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)

    def recalls(logits):
        """Rank of the partner, one query at a time."""
        ranks = [int((row > row[index]).sum()) for index, row in enumerate(logits)]
        return [np.mean([rank < k for rank in ranks]) for k in (1, 5)]

    plain = [index for index, caption in enumerate(captions) if not caption.endswith("skin tone")]
    assert len(plain) == 103
    for prefix, scores in (("", logits), ("without_variants_", logits[plain][:, plain])):
        for direction, values in (("text_to_image", scores.T), ("image_to_text", scores)):
            for k, share in zip((1, 5), recalls(values), strict=True):
                # Two similarities may change places by rounding.
                assert found[f"{prefix}{direction}_recall_at_{k}"] == pytest.approx(share, abs=1.5 / len(scores))
    hits = (image_embeds @ classes.T).argmax(dim=1) == torch.tensor(labels)
    assert found["zero_shot_accuracy"] == pytest.approx(hits.float().mean().item(), abs=1.5 / 163)


def test_validation_of_captions_that_several_images_share(tmp_path):
    """The loss is that of training on all held-out images in one batch, where such images are no negatives."""
    captions = ["a cat", "a dog", "a cat", "cat", "a cat"]
    images, _ = load_image_dataset(data_files=save_parquet(tmp_path / "a.parquet", captions))
    held_out = HeldOut(ImageDataset(images, 8, center_crop=True), captions, None)
    clip = random_clip().eval()
    training = CLIPTraining(clip, toy_tokenizer(), clip_processor(), None, held_out, [])
    found = validate_clip(training, 2, 0)["loss"]
    number = torch.tensor([0, 1, 0, 2, 0])
    embeds = embed_images(training, held_out.images, 5, 0), embed_texts(training, captions, 5)
    alone = SimpleNamespace(num_processes=1, process_index=0, gather=lambda tensor: tensor)
    expected = contrastive_loss(*embeds, clip.logit_scale, number, number[:, None], alone).loss
    assert found == pytest.approx(expected.item(), rel=1e-5)  # the same sums in float32, in batches of other sizes
    # Known to fail: with these images as negatives.
    other = contrastive_loss(*embeds, clip.logit_scale, torch.arange(5), torch.arange(5)[:, None], alone).loss
    assert abs(found - other.item()) > 0.1


def test_fine_tuning_keeps_weights_tokenizer_and_preprocessing(pretrained, tmp_path):
    captions = ["a cat", "a dog", "cat", "dog a"] * 3
    pretrained |= {"data_files": save_parquet(tmp_path / "a.parquet", captions), "learning_rate": 1e-5}
    train(**pretrained)
    folder = Path(pretrained["output_dir"])
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Two steps of Adam move a weight by at most about twice the learning rate.
    assert max((before[name] - after[name]).abs().max().item() for name in before) < 1e-4
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    expected = clip_processor()
    assert [*processor.image_mean, *processor.image_std] == [*expected.image_mean, *expected.image_std]
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == toy_tokenizer("clip").get_vocab()


def test_pixel_values_are_those_of_the_image_processor(tmp_path):
    processor = CLIPImageProcessorPil.from_pretrained(save_clip(tmp_path / "base"))
    training = CLIPTraining(random_clip(), None, processor, None, None, [])
    image = held_out_emoji()[0][0].resize((8, 8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(training.pixel_values(pixels), expected, rtol=0, atol=1e-5)  # float32, values up to 3


# 2. Runs


AUGMENTED = {"random_zoom": 0.2, "random_shift": 0.1, "random_rotation": 10, "random_color": 0.2, "random_flip": True}


def test_resumed_bit_by_bit(short, tmp_path):
    lists = [["a cat", "cat"], ["a dog", "dog", "a"], ["cat dog"], ["dog cat", "cat"]] * 4
    short |= {
        "data_files": save_parquet(tmp_path / "a.parquet", lists),
        "train_batch_size": 4,
        "checkpointing_steps": 3,
    }
    short |= AUGMENTED | {"max_train_steps": 6, "gradient_accumulation_steps": 2, "adam_weight_decay": 0.1}
    short |= {"lr_scheduler": "cosine", "validation_split": "train", "validation_steps": 3}
    train(**short)
    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-6")
    train(output_dir=str(tmp_path / "broken"), resume_from_checkpoint="latest")
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-6", tmp_path / "broken" / "checkpoint-6")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "broken")


def test_how_the_network_runs_changes_nothing_that_is_learned(short, tmp_path):
    train(**short)
    train(**short | {"output_dir": str(tmp_path / "other")}, gradient_checkpointing=True, channels_last=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "other"))
    for name, value in first.items():
        if name.endswith("k_proj.bias"):
            # It adds one number to all scores of a query: its gradient is rounding errors, whose sign Adam follows.
            continue
        # Two steps of 1e-3, whose sign is that of tiny gradients in a few places.
        assert ((value - second[name]).abs() > 1e-5).float().mean() < 0.01, name


def test_two_processes(short, tmp_path):
    """
    The pairs of both are contrasted. The logits are the log of the number of pairs at most if they are all equal, which
    a temperature of 1 nearly makes them.
    """
    short |= {"train_batch_size": 4, "max_train_steps": 3, "checkpointing_steps": 2, "validation_data_files": EMOJI}
    short |= {"model_config_name_or_path": write_config(tmp_path, logit_scale_init_value=-5.0), "learning_rate": 1e-9}
    launch("train_clip", short, tmp_path)
    rows = read_metrics(short["output_dir"])
    losses = [row["loss"] for row in rows if "loss" in row]
    # Cosines differ by at most 2, and logits by 2 exp(-5) = 0.013; with the pairs of one process, it were log 4.
    assert losses == pytest.approx([np.log(8)] * 3, abs=0.02)
    assert sum("validation_loss" in row for row in rows) == 1
    CLIPModel.from_pretrained(short["output_dir"])


def test_an_average_of_another_length(short, tmp_path):
    train(**short | {"max_train_steps": 6, "power_ema_stds": [0.1, 0.2], "power_ema_snapshot_steps": 2})
    target = tmp_path / "0.15"
    post_hoc_ema.main(flags(run_dir=short["output_dir"], std=0.15, output_dir=target, max_error=1))
    clip, other = CLIPModel.from_pretrained(target), CLIPModel.from_pretrained(short["output_dir"])
    assert not torch.equal(clip.visual_projection.weight, other.visual_projection.weight)
    assert (clip.visual_projection.weight - other.visual_projection.weight).abs().max() < 6 * 2e-3  # 6 steps of 1e-3
    assert len(AutoTokenizer.from_pretrained(target)) == 2048
    assert CLIPImageProcessorPil.from_pretrained(target).crop_size["height"] == 8


def test_images_without_captions_are_left_out(pretrained, tmp_path, caplog):
    captions = ["a cat", "", "a dog", "cat"] * 3
    train(**pretrained | {"data_files": save_parquet(tmp_path / "a.parquet", captions)})
    assert "3 of 12 images have no caption in the column 'text' and are left out" in caplog.text
    assert "9 images with 1.0 captions each (3 distinct ones)" in caplog.text


def test_held_out_captions_of_another_column(pretrained, tmp_path):
    data = save_parquet(tmp_path / "a.parquet", [["cat", "a cat"], ["dog"], ["a"]] * 4)
    pretrained |= {"data_files": data, "validation_data_files": save_parquet(tmp_path / "b.parquet", ["cat", "dog"])}
    with pytest.raises(ValueError, match="`caption_column` is 'words', but .* has the columns image, text"):
        train(**pretrained, validation_caption_column="words")
    train(**pretrained, validation_caption_column="text")
    (row,) = (row for row in read_metrics(pretrained["output_dir"]) if "validation_loss" in row)
    assert row["validation_text_to_image_recall_at_5"] == 1  # two images
    assert "validation_zero_shot_accuracy" not in row


# 3. What it refuses


@pytest.mark.parametrize(
    "config, message",
    [
        ({"projection_dim": None}, "has no projection: `projection_dim` is None. Give the width"),
        ({"projection_dim": 0}, "has no projection: `projection_dim` is 0"),
        ({"model_type": "clip_vision_model"}, "of type 'clip_vision_model'; this script trains `CLIPModel`"),
        ({"vision_config": {"image_sizes": 8}}, "'image_sizes' in `vision_config`.*Did you mean `image_size`"),
        ({"text_config": {"vocab_size": 100}}, "has 2048 tokens, but `vocab_size` in the `text_config` is 100"),
        ({"text_config": {"eos_token_id": 7}}, "is 7, but the tokenizer ends texts with id 3"),
        ({"text_config": {"eos_token_id": 2}}, "is 2, with which transformers pools at the highest token id"),
        ({"vision_config": {"patch_size": 3}}, "8x8 pixels, which `patch_size` 3 .* does not divide"),
        ({"vision_config": {"num_channels": 1}}, "`num_channels` in the `vision_config` is 1"),
    ],
)
def test_configs_are_refused(short, tmp_path, config, message):
    config = {"model_config_name_or_path": write_config(tmp_path, **{"model_type": "clip"} | config)}
    with pytest.raises(ValueError, match=message):
        train(**short | config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_batch_size": 1}, "`train_batch_size` is 1: the contrastive loss tells a pair from the others"),
        ({"caption_column": None}, "with captions. Name their column with `--caption_column`"),
        ({"caption_column": "words"}, "`caption_column` is 'words', but .* has the columns image, text"),
        ({"tokenizer_name_or_path": None}, "has no tokenizer. Pass `tokenizer_name_or_path`"),
        ({"resolution": "8x16"}, "The resolution is 8x16; the images of a CLIP are square"),
        ({"resolution": 10}, "10x10 pixels, which `patch_size` 4"),
        ({"image_mode": "L"}, "RGB images of 8 bits"),
        ({"random_zoom": 1.5}, r"`random_zoom` is 1.5; it must lie in \[0, 1\]"),
        ({"random_rotation": 200}, "`random_rotation` is 200.0; it must lie in"),
        ({"variant_pattern": "("}, "`variant_pattern` is '\\(', which is no regular expression"),
        ({"variant_pattern": "tone$"}, "`variant_pattern` was given without held-out images"),
        ({"variant_pattern": "toned$", "validation_data_files": EMOJI}, "found in none of the 163 held-out captions"),
        ({"zero_shot_template": "a"}, "must hold {} once"),
        ({"replace_classes": True, "pretrained_model_name_or_path": "base"}, "either `--model_config"),
    ],
)
def test_arguments_are_refused(short, tmp_path, changes, message):
    short = {name: value for name, value in (short | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        train(**short)


def test_pretrained_ones_are_refused(pretrained, tmp_path):
    with pytest.raises(ValueError, match="The resolution is 16; the pretrained CLIP takes images of 8x8 pixels"):
        train(**pretrained, resolution=16)
    with pytest.raises(ValueError, match="`replace_classes` is True, which has no effect: a CLIP has no rows"):
        train(**pretrained, replace_classes=True)
    with pytest.raises(ValueError, match="has 2048 tokens, but `vocab_size` in the `text_config` is"):
        train(**pretrained, tokenizer_name_or_path=TOKENIZER)
    weights = tmp_path / "base" / "model.safetensors"
    state = load_file(weights)
    broken = state | {"text_projection.weight": torch.full_like(state["text_projection.weight"], math.nan)}
    save_file(broken, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="Weights of `pretrained_model_name_or_path` are not finite themselves"):
        train(**pretrained)
    del broken["text_projection.weight"]
    save_file(broken, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="holds no weights of the text tower's projection"):
        train(**pretrained)
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is .* cannot be read"):
        train(**pretrained)


def test_tokenizers_are_refused(pretrained, tmp_path):
    """One whose texts have no end, and one without padding."""
    toy_tokenizer("glide").save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no end token"):
        train(**pretrained, tokenizer_name_or_path=tmp_path / "endless")
    tokenizer = toy_tokenizer("glide")
    tokenizer.eos_token = "<unknown>"
    tokenizer.save_pretrained(tmp_path / "unended")
    with pytest.raises(ValueError, match="does not end texts with its end token '<unknown>'"):
        train(**pretrained, tokenizer_name_or_path=tmp_path / "unended")


# 4. Parts


def test_motion_without_amounts_returns_the_images():
    images = torch.rand(2, 3, 8, 8)
    assert random_motion(images, 0, 0, 0) is images
    assert random_colors(images, 0) is images


def test_motion_shifts_by_pixels(monkeypatch):
    """The largest shift, a quarter of 8 pixels: what was two pixels to the right and below, edges repeated."""
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.ones(*size if len(size) > 1 else size[0]))
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    expected = images[:, :, [2, 3, 4, 5, 6, 7, 7, 7]][:, :, :, [2, 3, 4, 5, 6, 7, 7, 7]]
    torch.testing.assert_close(random_motion(images, 0, 0.25, 0), expected, rtol=0, atol=1e-4)


def test_motion_rotates_and_zooms_about_the_middle(monkeypatch):
    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.ones(*size if len(size) > 1 else size[0]))
    quarter = random_motion(images, 0, 0, 90)
    assert min((quarter - torch.rot90(images, turns, (2, 3))).abs().max() for turns in (1, 3)) < 1e-5
    square = torch.zeros(1, 1, 8, 8)
    square[:, :, 3:5, 3:5] = 1
    assert random_motion(square, 1, 0, 0).sum() == pytest.approx(16, rel=0.05)  # twice as wide and as high


def test_each_image_moves_on_its_own():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 8)
    moved = random_motion(image.expand(4, -1, -1, -1), 0.2, 0.1, 10)
    assert len({tensor.sum().item() for tensor in moved}) == 4


def test_colors_stay_in_range_and_grey_stays_grey():
    torch.manual_seed(0)
    images = 2 * torch.rand(8, 3, 8, 8) - 1
    changed = random_colors(images, 0.5)
    assert changed.abs().max() <= 1
    assert not torch.equal(changed, images)
    grey = random_colors((2 * torch.rand(8, 1, 8, 8) - 1).expand(-1, 3, -1, -1), 0.5)
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6)


def test_gains_biases_and_the_temperature_do_not_decay():
    (training_args,) = parse_args((train_clip.CLIP_ARGUMENTS[2],), flags(adam_weight_decay=0.5, learning_rate=0.1))
    clip = random_clip()
    optimizer = build_optimizer(clip.parameters(), training_args, decays_vectors=False)
    before = {name: parameter.detach().clone() for name, parameter in clip.named_parameters()}
    for parameter in clip.parameters():
        parameter.grad = torch.zeros_like(parameter)
    apply_optimizer_arguments(training_args, optimizer)  # as for a resumed run
    optimizer.step()
    for name, parameter in clip.named_parameters():
        factor = 0.95 if parameter.ndim >= 2 else 1.0  # 1 - lr * weight decay
        assert torch.allclose(parameter, factor * before[name], rtol=1e-6), name
    assert clip.logit_scale.item() == before["logit_scale"].item()
