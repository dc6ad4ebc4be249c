"""The training script with captions: text encoders of three kinds, trained or frozen, on the fly or precomputed."""

import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_distributed
from runs import (
    CONFIGS,
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    bit_by_bit,
    flags,
    launch,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
)
from safetensors.torch import load_file
from scripts import REPOSITORY, load_script
from tolerances import NETWORK, SAMPLING, rounding_errors
from toy_models import TEXT_CONFIGS, TEXT_WIDTH, TOY_CONFIG, random_text_encoder, random_text_unet, toy_tokenizer
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, GLIDETextModel, LearnedVarianceDDPMScheduler
from diffusers_adm.data import captions, tokenizer
from diffusers_adm.training import (
    CaptionEmbeddings,
    CaptionTokens,
    build_text_encoder,
    freeze_unused_parameters,
    load_text_encoder,
)
from diffusers_adm.training import run as training_run


train_adm = load_script("train_adm")

CAPTIONS = ["a cat", "a red dog on the mat", None, "the green hat", "a dog with a hat", "the cat on the red mat"]


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_adm"):
        yield


def write_images(path, texts, number=24):
    """Noise with captions in turn; the first image is too small and left out."""
    generator = np.random.default_rng(0)
    sizes = [1, *[8] * number]
    columns = {
        "image": [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for size in sizes],
        "text": [texts[index % len(texts)] for index in range(-1, number)],
        "label": [("round", "square")[index % 2] for index in range(-1, number)],
    }
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("string")}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def write_model_config(folder, kind="added_kv", **changes):
    path = folder / "model.json"
    path.write_text(json.dumps({**TOY_CONFIG, **TEXT_CONFIGS.get(kind, {}), **changes}))
    return str(path)


def write_text_encoder(folder, kind, **changes):
    """As a pipeline keeps them; the folder of both."""
    random_text_encoder(kind, **changes).save_pretrained(folder / "text_encoder")
    toy_tokenizer(kind).save_pretrained(folder / "tokenizer")
    return str(folder)


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps, which still need a text encoder."""
    return SHORT_RUN | {
        "model_config_name_or_path": write_model_config(tmp_path),
        "data_files": write_images(tmp_path / "images.parquet", CAPTIONS),
        "caption_column": "text",
        "output_dir": str(tmp_path / "run"),
        "learning_rate": 1e-3,
    }


def train(**arguments):
    reset_accelerate()
    train_adm.main(flags(**arguments))


def states(folder, component="text_encoder"):
    return load_file(next(Path(folder, component).glob("*.safetensors")))


def assert_equal_states(first, second):
    assert list(first) == list(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# 1. Text encoder, class and text together, in two processes


def resume(argv):
    load_script("train_adm").main(argv)


class TestLaunched:
    @pytest.mark.slow
    def test_a_text_encoder_from_scratch_is_trained_with_the_unet(self, tmp_path):
        """BERT, because its pooler has weights that get no gradient, for which distributed training would wait."""
        config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        (tmp_path / "text.json").write_text(json.dumps({**config, "intermediate_size": 16}))
        toy_tokenizer("bert").save_pretrained(tmp_path / "tokenizer")
        arguments = {
            "model_config_name_or_path": write_model_config(tmp_path),
            "data_files": write_images(tmp_path / "images.parquet", CAPTIONS),
            "caption_column": "text",
            "label_column": "label",
            "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
            "text_encoder_config_name_or_path": str(tmp_path / "text.json"),
            "train_text_encoder": True,
            "output_dir": str(tmp_path / "run"),
            "train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 4,
            "checkpointing_steps": 2,
            "lr_warmup_steps": 0,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "num_validation_images": 4,
            "validation_num_inference_steps": 2,
            "validation_guidance_scale": 2.0,
            "validation_prompts": ["a cat", "green mat"],
            "report_to": "none",
        }
        output = launch("train_adm", arguments, tmp_path)
        assert "24 images in 2 classes with 5 captions at 8 x 8, 16 per optimizer step" in output
        assert output.count("4 of 25 captions are missing and count as empty.") == 1  # on one process
        assert "Traceback" not in output

        # Killed after step 2, and resumed.
        other = tmp_path / "resumed"
        shutil.copytree(tmp_path / "run" / "checkpoint-2", other / "checkpoint-2")
        rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (other / "metrics.jsonl").write_text("".join(rows[:2]))
        arguments |= {"output_dir": str(other), "resume_from_checkpoint": "latest"}
        run_distributed(resume, flags(**arguments))
        assert_same_checkpoint(tmp_path / "run" / "checkpoint-4", other / "checkpoint-4")
        assert read_metrics(tmp_path / "run") == read_metrics(other)
        for component in ("unet", "text_encoder"):
            assert_equal_states(states(tmp_path / "run", component), states(other, component))
        assert (tmp_path / "run" / "samples-0000004.png").read_bytes() == (other / "samples-0000004.png").read_bytes()

        # The averages of both networks are what is saved, and all that is read has moved.
        untrained = build_text_encoder(str(tmp_path / "text.json"), toy_tokenizer("bert"), seed=0).state_dict()
        trained = states(other)
        unmoved = {name for name in trained if torch.equal(trained[name], untrained[name])}
        assert {name for name in unmoved if not name.startswith("pooler")} <= {
            "embeddings.token_type_embeddings.weight"
        }
        assert {name for name in trained if name.startswith("pooler")} <= unmoved
        pipeline = ADMPipeline.from_pretrained(other)
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline.text_encoder).__name__ == "BertModel"
        arguments = {"num_inference_steps": 2, "class_labels": 1, "output_type": "pt"}
        images = [
            pipeline(prompt=prompt, generator=torch.Generator().manual_seed(0), **arguments).images
            for prompt in ("a cat", "a cat", "the red hat")
        ]
        assert rounding_errors(images[0], images[1]) <= SAMPLING
        # Four steps teach little: guidance amplifies the effect of captions above rounding errors.
        arguments |= {"guidance_scale": 1000.0, "output_type": "latent"}
        guided = [
            pipeline(prompt=prompt, generator=torch.Generator().manual_seed(0), **arguments).images
            for prompt in ("a cat", "the red hat")
        ]
        assert rounding_errors(*guided) > SAMPLING


class TestTextEncoders:
    @pytest.mark.parametrize("kind", ["clip", "t5", "bert", "glide"])
    def test_frozen(self, short, tmp_path, kind):
        source = write_text_encoder(tmp_path / "text", kind)
        train(**short, text_encoder_name_or_path=source)
        assert_equal_states(states(source), states(short["output_dir"]))
        weights = load_file(Path(short["output_dir"]) / "checkpoint-2" / "model.safetensors")
        assert not any("encoder.layer" in name or "text_model" in name for name in weights)  # only the U-Net's
        pipeline = ADMPipeline.from_pretrained(short["output_dir"])
        pipeline.set_progress_bar_config(disable=True)
        assert len(pipeline(prompt=["a cat", "the red hat"], num_inference_steps=1, guidance_scale=2.0).images) == 2

    def test_trained(self, short, tmp_path):
        source = write_text_encoder(tmp_path / "text", "t5")
        # Not at once: layers that are initially zero keep gradients from the encoder for two steps.
        short |= {"text_encoder_name_or_path": source, "max_train_steps": 4, "checkpointing_steps": 3}
        train(**short, train_text_encoder=True)
        before, after = states(source), states(short["output_dir"])
        assert [name for name in before if torch.equal(before[name], after[name])] == []
        # T5 has its embedding under two names, of which checkpoints hold one.
        train(
            **short | {"output_dir": str(tmp_path / "resumed")},
            train_text_encoder=True,
            resume_from_checkpoint=str(Path(short["output_dir"]) / "checkpoint-3"),
        )
        with bit_by_bit():
            assert_equal_states(states(tmp_path / "resumed"), after)

    def test_a_frozen_one_keeps_its_dtype(self, short, tmp_path):
        source = tmp_path / "text"
        write_text_encoder(source, "clip")
        CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.bfloat16).save_pretrained(
            source / "text_encoder"
        )
        train(**short, text_encoder_name_or_path=str(source))
        assert {value.dtype for value in states(short["output_dir"]).values()} == {torch.bfloat16}
        train(
            **short | {"output_dir": str(tmp_path / "trained")},
            text_encoder_name_or_path=str(source),
            train_text_encoder=True,
        )
        assert {value.dtype for value in states(tmp_path / "trained").values()} == {torch.float32}

    def test_fine_tuning_takes_those_of_the_pipeline(self, short, tmp_path):
        del short["model_config_name_or_path"]
        base = save_base(tmp_path / "base", random_text_unet("transformer"), "bert")
        train(**short, pretrained_model_name_or_path=base)
        assert_equal_states(states(tmp_path / "base"), states(short["output_dir"]))
        assert len(AutoTokenizer.from_pretrained(Path(short["output_dir"]) / "tokenizer")) == len(toy_tokenizer("bert"))

    def test_the_class_that_reads_text_is_found(self, tmp_path):
        config = random_text_encoder("clip").config
        CLIPTextModelWithProjection(config).save_pretrained(tmp_path / "projected")
        random_text_encoder("t5").save_pretrained(tmp_path / "t5")
        random_text_encoder("glide").save_pretrained(tmp_path / "glide" / "text_encoder")
        classes = {"projected": CLIPTextModelWithProjection, "t5": T5EncoderModel, "glide": GLIDETextModel}
        for folder, expected in classes.items():
            assert type(load_text_encoder("x", str(tmp_path / folder), trained=False)) is expected

    @pytest.mark.parametrize(("kind", "subfolder"), [("glide", "text_encoder"), ("bert", "")])
    def test_weights_in_half_precision_only(self, tmp_path, kind, subfolder):
        """Folders such as spaces/model/base, which a recipe names: `--variant` belongs to a pretrained pipeline."""
        random_text_encoder(kind).half().save_pretrained(tmp_path / subfolder, variant="fp16")
        assert load_text_encoder("x", str(tmp_path), trained=True).dtype == torch.float32

    def test_unused_weights_are_frozen(self):
        encoder = random_text_encoder("bert")
        tokens = CaptionTokens(["a cat"], toy_tokenizer("bert"), encoder, pad_to_max=False)
        assert freeze_unused_parameters(encoder, tokens, {}) == ["pooler.dense.weight", "pooler.dense.bias"]
        assert [name for name, p in encoder.named_parameters() if not p.requires_grad] == [
            "pooler.dense.weight",
            "pooler.dense.bias",
        ]
        encoder.requires_grad_(True)
        assert freeze_unused_parameters(encoder, tokens, {"addition_embed_type": "text_embeds"}) == []


class TestFromScratch:
    def test_the_config_is_completed_by_the_tokenizer(self, tmp_path):
        path = tmp_path / "text.json"
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        path.write_text(json.dumps({"model_type": "clip_text_model", **sizes}))
        words = tokenizer.train_tokenizer(["red cat", "a hat"], vocab_size=30, model_max_length=8)
        first, second, other = (build_text_encoder(str(path), words, seed) for seed in (0, 0, 1))
        assert first.config.vocab_size == len(words)
        assert first.config.eos_token_id == words.eos_token_id
        assert_equal_states(first.state_dict(), second.state_dict())
        assert not torch.equal(next(first.parameters()), next(other.parameters()))
        # CLIP pools at the end of the caption, which must be found with these numbers.
        batch = words(["a red cat", "hat"], padding=True, return_tensors="pt")
        output = first(**batch)
        ends = batch["attention_mask"].sum(1) - 1
        assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(2), ends])

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ('{"hidden_size": 16}', "does not say its `model_type`"),
            ('{"model_type": "bert", "hiden_size": 16}', "holds 'hiden_size'.*Did you mean `hidden_size`"),
            ('{"model_type": "vit"}', "of type 'vit' is not a text encoder"),
            ("{", "cannot be read: Expecting property name"),
            (
                '{"_class_name": "GLIDETextModel", "num_layers": 2}',
                "'num_layers', which `GLIDETextModel` does not take. Did you mean `num_hidden_layers`",
            ),
            ('{"_class_name": "GLIDETextModel", "max_position_embeddings": 0}', "is 0; it must be at least 1"),
        ],
    )
    def test_bad_configs(self, tmp_path, config, message):
        (tmp_path / "text.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            build_text_encoder(str(tmp_path / "text.json"), toy_tokenizer("bert"), 0)


class TestGLIDE:
    """Its own transformer, all of it new."""

    CONFIG = {"_class_name": "GLIDETextModel", "hidden_size": TEXT_WIDTH, "num_hidden_layers": 1, "projection_dim": 32}

    def write_config(self, folder, **changes):
        path = folder / "text.json"
        path.write_text(json.dumps({**self.CONFIG, "num_attention_heads": 2, **changes}))
        return str(path)

    def test_trained_with_the_unet(self, short, tmp_path):
        toy_tokenizer("glide").save_pretrained(tmp_path / "tokenizer")
        short |= {
            "model_config_name_or_path": write_model_config(tmp_path, addition_embed_type="text_embeds"),
            "text_encoder_config_name_or_path": self.write_config(tmp_path),
            "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
            "train_text_encoder": True,
            "caption_dropout_prob": 0.3,
            # Not at once: layers that are initially zero keep gradients from the encoder for two steps.
            "max_train_steps": 4,
            "ema_max_decay": 0.5,
            "validation_guidance_scale": 2.0,
            "validation_prompts": ["a cat"],
        }
        train(**short)
        folder = Path(short["output_dir"])
        trained = states(folder)
        untrained = build_text_encoder(short["text_encoder_config_name_or_path"], toy_tokenizer("glide"), seed=0)
        assert [name for name, value in untrained.state_dict().items() if torch.equal(value, trained[name])] == []

        # One optimizer and one average for both: what is saved as the component is the average.
        last = load_file(folder / "checkpoint-4" / "model_1.safetensors")  # model.safetensors: the U-Net
        assert set(last) == set(trained)
        assert not torch.equal(last["embeddings.padding_embedding"], trained["embeddings.padding_embedding"])

        pipeline = ADMPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline.text_encoder) is GLIDETextModel
        assert_equal_states(dict(sorted(pipeline.text_encoder.state_dict().items())), trained)
        assert len(pipeline(prompt=["a cat", ""], num_inference_steps=1, guidance_scale=2.0).images) == 2

        # Fine-tuning goes on from there.
        del short["model_config_name_or_path"], short["text_encoder_config_name_or_path"]
        del short["tokenizer_name_or_path"]
        train(**short | {"pretrained_model_name_or_path": str(folder), "output_dir": str(tmp_path / "tuned")})
        tuned = states(tmp_path / "tuned")
        assert list(tuned) == list(trained)
        assert not torch.equal(tuned["text_projection.weight"], trained["text_projection.weight"])

    def test_the_config_is_completed_by_the_tokenizer(self, tmp_path):
        words = toy_tokenizer("glide", max_length=8)
        encoder = build_text_encoder(self.write_config(tmp_path), words, 0)
        assert (encoder.config.vocab_size, encoder.config.max_position_embeddings) == (len(words), 8)
        other = build_text_encoder(self.write_config(tmp_path, vocab_size=40, max_position_embeddings=5), words, 0)
        assert (other.config.vocab_size, other.config.max_position_embeddings) == (40, 5)
        words = toy_tokenizer("glide", max_length=int(1e30))
        with pytest.raises(ValueError, match="lacks `max_position_embeddings`, and the tokenizer sets no limit"):
            build_text_encoder(self.write_config(tmp_path), words, 0)

    def test_the_recipe_fits_the_tokenizers_of_the_other(self):
        """24 tokens, as `training/configs/emoji_32_text.yaml` says, for a U-Net whose first level has 64 channels."""
        encoder = build_text_encoder(str(CONFIGS / "text_encoder_glide_emoji.json"), toy_tokenizer("glide", 24), 0)
        assert (encoder.config.max_position_embeddings, encoder.config.projection_dim) == (24, 4 * 64)
        assert sum(parameter.numel() for parameter in encoder.layers.parameters()) == 4 * (12 * 128 + 13) * 128

    def test_its_weights_depend_on_the_seed_alone(self, tmp_path):
        path = self.write_config(tmp_path)
        first, second, other = (build_text_encoder(path, toy_tokenizer("glide"), seed) for seed in (0, 0, 1))
        assert_equal_states(first.state_dict(), second.state_dict())
        assert not torch.equal(next(first.parameters()), next(other.parameters()))

    def test_what_is_saved_can_be_built_anew(self, tmp_path):
        random_text_encoder("glide").save_pretrained(tmp_path)
        encoder = build_text_encoder(str(tmp_path / "config.json"), toy_tokenizer("glide"), 0)
        assert encoder.config.projection_dim == 32

    def test_a_projection_of_another_width(self, short, tmp_path):
        toy_tokenizer("glide").save_pretrained(tmp_path / "tokenizer")
        short |= {
            "model_config_name_or_path": write_model_config(tmp_path, addition_embed_type="text_embeds"),
            "text_encoder_config_name_or_path": self.write_config(tmp_path, projection_dim=24),
            "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
        }
        with pytest.raises(
            ValueError, match=r"`added_cond_kwargs\[\"text_embeds\"\]` has shape \(8, 24\); this model takes \(8, 32\)"
        ):
            train(**short, train_text_encoder=True)


# 2. Captions


class TestCaptions:
    def test_dropping_all_is_training_on_empty_ones(self, short, tmp_path):
        short["text_encoder_name_or_path"] = write_text_encoder(tmp_path / "text", "clip")
        # Only the image that is left out has a caption: none at all would be refused.
        empty = write_images(tmp_path / "empty.parquet", [*[""] * 24, "a cat"])
        rows = {}
        for name, changes in (
            ("dropped", {"caption_dropout_prob": 1.0}),
            ("empty", {"caption_dropout_prob": 0.0, "data_files": empty}),
            ("kept", {"caption_dropout_prob": 0.0}),
        ):
            folder = str(tmp_path / name)
            train(**short | {"output_dir": folder, "validation_prompts": ["a cat"], "max_train_steps": 3} | changes)
            rows[name] = read_metrics(folder)
        for dropped, expected in zip(rows["dropped"], rows["empty"], strict=True):
            assert dropped == pytest.approx(expected, rel=1e-5)
        # After three steps captions count little: 6e-6 of the loss, which has rounding errors of some 1e-7.
        losses = {name: of_steps[-1]["loss"] for name, of_steps in rows.items()}
        assert losses["dropped"] == pytest.approx(losses["empty"], rel=1e-6)
        assert losses["dropped"] != pytest.approx(losses["kept"], rel=2e-6)

    def test_captions_and_classes_are_dropped_independently(self, short, tmp_path, monkeypatch):
        seen = Counter()
        training_losses = train_adm.training_losses

        def count(*args, model_kwargs, **kwargs):
            no_class = (model_kwargs["class_labels"] == 2).tolist()
            no_text = (model_kwargs["encoder_attention_mask"].sum(1) == 2).tolist()  # of "", [CLS] and [SEP] are left
            seen.update(zip(no_class, no_text, strict=True))
            return training_losses(*args, model_kwargs=model_kwargs, **kwargs)

        monkeypatch.setattr(train_adm, "training_losses", count)
        short["data_files"] = write_images(tmp_path / "all.parquet", [text for text in CAPTIONS if text])
        train(
            **short | {"max_train_steps": 12, "train_batch_size": 24},
            text_encoder_name_or_path=write_text_encoder(tmp_path / "text", "bert"),
            label_column="label",
            class_dropout_prob=0.5,
            caption_dropout_prob=0.25,
        )
        # 288 draws; standard deviations of at most 8.2 around 108 and 5.6 around 36.
        assert sum(seen.values()) == 288
        for no_class in (False, True):
            assert 75 < seen[no_class, False] < 141
            assert 10 < seen[no_class, True] < 62

    def test_missing_and_long_ones_are_reported(self, short, tmp_path, caplog):
        short["data_files"] = write_images(tmp_path / "long.parquet", [*CAPTIONS, "a red cat on the green mat " * 2])
        train(**short, text_encoder_name_or_path=write_text_encoder(tmp_path / "text", "clip"))
        assert "4 of 25 captions are missing and count as empty." in caplog.text
        assert "1 of 7 distinct captions have more than 12 tokens and are cut." in caplog.text
        assert "which loses 'on the green mat'" in caplog.text
        assert "it is not read" not in caplog.text  # by `tokenize`, once more

    @pytest.mark.parametrize("kind", ["clip", "t5", "glide"])
    def test_precomputed_embeddings_give_the_same_losses(self, short, tmp_path, monkeypatch, kind):
        del short["model_config_name_or_path"]
        unet = random_text_unet("added_kv", addition_embed_type="text_embeds" if kind == "glide" else None)
        short |= {
            # From scratch it would not read the text yet, right or wrong.
            "pretrained_model_name_or_path": save_base(tmp_path / "base", unet, kind),
            "cache_dir": str(tmp_path / "cache"),
            "caption_dropout_prob": 0.3,
            "max_train_steps": 3,
        }
        train(**short)
        train(**short | {"output_dir": str(tmp_path / "stored")}, precompute_text_embeddings=True)
        stored = list((tmp_path / "cache").glob("caption-embeddings-*.arrow"))
        assert len(stored) == 1

        # A second run reads what the first has stored: what is encoded is one empty caption, for its shape.
        encoded = []
        encode_captions = captions.encode_captions

        def count(text_encoder, batch, **kwargs):
            encoded.append(len(batch["input_ids"]))
            return encode_captions(text_encoder, batch, **kwargs)

        monkeypatch.setattr(captions, "encode_captions", count)
        train(
            **short | {"output_dir": str(tmp_path / "again"), "dataloader_num_workers": 1},
            precompute_text_embeddings=True,
        )
        assert encoded == [1]
        assert list((tmp_path / "cache").glob("caption-embeddings-*.arrow")) == stored
        rows, stored, again = (
            read_metrics(path) for path in (short["output_dir"], tmp_path / "stored", tmp_path / "again")
        )
        # The same sums in float32, of batches of other captions; Adam amplifies their rounding.
        for row, other, another in zip(rows, stored, again, strict=True):
            assert other == pytest.approx(row, rel=1e-4)
            assert another == pytest.approx(other, rel=1e-4)
        assert_equal_states(states(tmp_path / "base"), states(tmp_path / "again"))

    @pytest.mark.parametrize("trained", [False, True])
    def test_mixed_precision_is_for_what_is_trained(self, short, tmp_path, monkeypatch, trained):
        """A frozen encoder gives the stored states, in training and in validation."""
        recorded, states = {"encoder": [], "unet": []}, []

        def record(name, module_class):
            forward = module_class.forward

            def recording_forward(self, *args, **kwargs):
                recorded[name].append(torch.is_autocast_enabled("cpu"))
                if name == "unet":
                    states.append(
                        kwargs["encoder_hidden_states"].detach() * kwargs["encoder_attention_mask"][..., None]
                    )
                return forward(self, *args, **kwargs)

            monkeypatch.setattr(module_class, "forward", recording_forward)

        record("encoder", T5EncoderModel)
        record("unet", AdaGNUNet2DModel)
        arguments = short | {
            "text_encoder_name_or_path": write_text_encoder(tmp_path / "text", "t5"),
            "cache_dir": str(tmp_path / "cache"),
            "mixed_precision": "bf16",
        }
        train(**arguments, train_text_encoder=trained)
        assert len(recorded["unet"]) == 4  # two steps, and two of validation images
        assert all(recorded["unet"])
        if trained:
            # All but the first, which finds the weights with gradients.
            assert recorded["encoder"] == [False, True, True, True]
            return
        assert len(recorded["encoder"]) == 3
        assert not any(recorded["encoder"])
        on_the_fly, states[:] = states[:], []
        train(**arguments | {"output_dir": str(tmp_path / "stored")}, precompute_text_embeddings=True)
        for first, second in zip(on_the_fly, states, strict=True):
            assert rounding_errors(first, second) <= NETWORK

    def test_a_subset_without_captions(self, short, tmp_path):
        """Validation images use the empty prompt."""
        short |= {
            "text_encoder_name_or_path": write_text_encoder(tmp_path / "text", "clip"),
            # Only the image that is left out has a caption: none at all would be refused.
            "data_files": write_images(tmp_path / "empty.parquet", [*[""] * 24, "a cat"]),
        }
        train(**short | {"max_train_steps": 1}, label_column="label")
        assert (Path(short["output_dir"]) / "samples-0000001.png").is_file()
        ADMPipeline.from_pretrained(short["output_dir"])

    def test_stored_embeddings(self, tmp_path):
        """Against the encoder on single captions; other weights and other captions are stored under other names."""
        encoder, words = random_text_encoder("t5"), toy_tokenizer("t5")
        texts = [text or "" for text in CAPTIONS]
        tokens = CaptionTokens(texts, words, encoder, pad_to_max=False)
        stored = CaptionEmbeddings(tokens, encoder, str(tmp_path))
        for index, text in enumerate(texts):
            example = stored[index]
            ids = words([text], return_tensors="pt")["input_ids"]
            length = ids.shape[1]
            assert example["caption_mask"].tolist() == [1] * length + [0] * (stored.length - length)
            expected = encoder(ids).last_hidden_state[0]
            assert rounding_errors(example["caption_states"][:length], expected) <= NETWORK
        CaptionEmbeddings(tokens, random_text_encoder("t5", seed=1), str(tmp_path))
        CaptionEmbeddings(CaptionTokens(texts[:2], words, encoder, pad_to_max=False), encoder, str(tmp_path))
        assert len(list(tmp_path.glob("*.arrow"))) == 3


# 3. The tokenizer command


class TestTokenizer:
    @pytest.mark.parametrize("algorithm", ["wordpiece", "bpe"])
    def test_command(self, tmp_path, capsys, algorithm):
        arguments = {"data_files": EMOJI, "vocab_size": 200, "model_max_length": 10, "output_dir": str(tmp_path)}
        tokenizer.main(flags(**arguments, algorithm=algorithm))
        words = AutoTokenizer.from_pretrained(tmp_path)
        assert len(words) == 200
        assert words.model_max_length == 10
        assert "200 tokens from 163 captions" in capsys.readouterr().out
        assert (words.pad_token_id, words.bos_token_id, words.eos_token_id) == (0, 2, 3)
        ids = words("Woman, DARK skin tone")["input_ids"]
        assert ids[0] == words.bos_token_id
        assert ids[-1] == words.eos_token_id
        assert words.unk_token_id not in ids
        assert words.decode(ids, skip_special_tokens=True).replace(" ,", ",") == "woman, dark skin tone"
        assert words("\u4e16")["input_ids"][1] == words.unk_token_id
        batch = words(["woman", "man with dark skin tone and a very long description"], padding=True, truncation=True)
        assert [len(row) for row in batch["input_ids"]] == [10, 10]
        assert batch["input_ids"][1][-1] == words.eos_token_id

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 10}, "`vocab_size` is 10, but .* already need .* tokens"),
            ({"vocab_size": 3}, "`vocab_size` is 3; it must be at least 5"),
            ({"caption_column": "caption"}, "`caption_column` is 'caption', but .* has the columns image, text, label"),
            ({"caption_column": "label"}, "`caption_column` 'label' .* which is not text"),
        ],
    )
    def test_bad_input(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            tokenizer.main(flags(**{"data_files": EMOJI, "output_dir": str(tmp_path), **changes}))


# 4. What is refused, before the first step


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        def fail(*args, **kwargs):
            pytest.fail("training began")

        monkeypatch.setattr(train_adm, "training_losses", fail)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, "`caption_column` is 'text', but there is no text encoder"),
            ({"caption_dropout_prob": 1.5}, "`caption_dropout_prob` is 1.5; it must lie in"),
            ({"text_encoder_name_or_path": "no/where"}, "`text_encoder_name_or_path` is 'no/where'"),
            ({"text_encoder_config_name_or_path": "a.json"}, "Pass `tokenizer_name_or_path`"),
            (
                {"text_encoder_config_name_or_path": "a.json", "tokenizer_name_or_path": "b"},
                "random weights. Pass `--train_text_encoder`",
            ),
            (
                {"text_encoder_config_name_or_path": "a.json", "text_encoder_name_or_path": "b"},
                "Pass either `text_encoder_name_or_path` or",
            ),
            (
                {"text_encoder_name_or_path": "b", "train_text_encoder": True, "precompute_text_embeddings": True},
                "exclude each other",
            ),
            (
                {"caption_column": "none", "train_text_encoder": True},
                "was given without `caption_column`",
            ),
            ({"caption_column": "none"}, "`caption_column` is None, but the U-Net has cross-attention"),
        ],
    )
    def test_arguments(self, short, monkeypatch, changes, message):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    def test_a_unet_without_cross_attention(self, short, tmp_path):
        short["model_config_name_or_path"] = write_model_config(tmp_path, kind=None)
        with pytest.raises(ValueError, match="the U-Net has no cross-attention"):
            train(**short, text_encoder_name_or_path=write_text_encoder(tmp_path / "text", "clip"))

    def test_an_encoder_of_another_width(self, short, tmp_path):
        with pytest.raises(ValueError, match="states of width 24, but `unet` takes 16"):
            train(**short, text_encoder_name_or_path=write_text_encoder(tmp_path / "text", "clip", width=24))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"caption_column": "caption"}, "`caption_column` is 'caption', but .* has the columns image, text, label"),
            ({"caption_column": "image"}, "`caption_column` and `image_column` are both 'image'"),
            (
                {"label_column": "label", "class_dropout_prob": 0, "validation_prompts": ["a bird"]},
                "'a bird', which is no caption of the data, .* no null class",
            ),
        ],
    )
    def test_data(self, short, tmp_path, changes, message):
        short["text_encoder_name_or_path"] = write_text_encoder(tmp_path / "text", "clip")
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    def test_no_caption_at_all(self, short, tmp_path):
        short["data_files"] = write_images(tmp_path / "none.parquet", [None, ""])
        with pytest.raises(ValueError, match="holds no caption at all"):
            train(**short, text_encoder_name_or_path=write_text_encoder(tmp_path / "text", "clip"))

    def test_a_pretrained_pipeline_without_text_encoder(self, short, tmp_path):
        random_text_unet("added_kv").save_pretrained(tmp_path / "base" / "unet")
        LearnedVarianceDDPMScheduler().save_pretrained(tmp_path / "base" / "scheduler")
        del short["model_config_name_or_path"]
        with pytest.raises(
            ValueError, match="`pretrained_model_name_or_path` is .* holds a tokenizer that can be read"
        ):
            train(**short, pretrained_model_name_or_path=str(tmp_path / "base"))


def test_a_text_encoder_in_float16_only():
    """The demonstration models hold such weights; `from_pretrained` alone would need `variant="fp16"`."""
    folder = REPOSITORY / "spaces/model/base"
    text_encoder = load_text_encoder("text_encoder_name_or_path", str(folder), trained=True)
    expected = GLIDETextModel.from_pretrained(folder, subfolder="text_encoder", variant="fp16")
    assert text_encoder.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(text_encoder.parameters(), expected.parameters(), strict=True))
