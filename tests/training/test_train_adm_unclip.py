"""train_adm.py with image embeddings: a decoder of unCLIP, from every kind of model, and what its condition does."""

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    SHORT_RUN,
    assert_same_checkpoint,
    flags,
    launch,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
)
from safetensors.torch import load_file
from scripts import load_script
from tiny_autoencoders import save_vae
from toy_clips import CLIP_WIDTH, random_clip, save_clip
from toy_models import CONDITIONAL, TEXT_CONFIGS, TOY_CONFIG, random_text_unet, random_unet
from unclip_models import karlo_pipeline, karlo_variation_pipeline

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, ADMUnCLIPPipeline, GLIDETextModel, UnCLIPProjectionModel
from diffusers_adm.data import encode_embeddings, encode_latents
from diffusers_adm.training import run as training_run
from diffusers_adm.training.post_hoc_ema import write_average


train_adm = load_script("train_adm")
COUNT, SIZE = 12, 8
CAPTIONS = ["a cat", "a red dog on the mat", "the green hat"]
RUN = SHORT_RUN | {
    "train_batch_size": 4,
    "learning_rate": 1e-3,
    "num_validation_images": 1,
    "validation_num_inference_steps": 1,
}
CLOSE = 1e-4  # of losses: rounding errors of the encoder, after some steps of Adam


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_adm"):
        yield


def train(given=None, **arguments):
    arguments = (given or {}) | arguments
    reset_accelerate()
    try:
        train_adm.main(flags(**{name: value for name, value in arguments.items() if value is not None}))
    finally:
        logging.getLogger("train_adm").setLevel(logging.NOTSET)
    return Path(arguments["output_dir"])


def write_rows(path, images, **columns):
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("string")}
    texts = [CAPTIONS[index % len(CAPTIONS)] for index in range(len(images))]
    rows = {"image": images, "text": texts, "label": ["round", "square"] * (len(images) // 2), **columns}
    vectors = datasets.List(datasets.Value("float32"))
    features = datasets.Features({name: features.get(name, vectors) for name in rows})
    datasets.Dataset.from_dict(rows, features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images, a CLIP, its embeddings of them, also mirrored, and models to fine-tune."""
    folder = tmp_path_factory.mktemp("unclip")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    write_rows(folder / "images.parquet", [Image.fromarray(values) for values in pixels])
    save_clip(folder / "clip")
    save_vae(folder / "vae")
    given = {"clip": folder / "clip", "data_files": folder / "images.parquet", "output_dir": folder / "embeddings"}
    encode_embeddings.main(flags(**given, random_flip=True))
    (folder / "unet.json").write_text(json.dumps(TOY_CONFIG))
    (folder / "text.json").write_text(json.dumps(TOY_CONFIG | TEXT_CONFIGS["added_kv"]))
    text_unet = random_text_unet("added_kv", addition_embed_type="text_embeds", **CONDITIONAL)
    save_base(folder / "text", text_unet, "glide", id2label={0: "round", 1: "square"})
    return folder


def column(made, **arguments):
    """With stored embeddings."""
    files = [str(path) for path in sorted((made / "embeddings").glob("*.parquet"))]
    given = {"model_config_name_or_path": str(made / "unet.json"), "data_files": files}
    return RUN | given | {"image_embeds_column": "image_embeds"} | arguments


def in_loop(made, **arguments):
    """Encoded in the loop."""
    encoder = {"image_embeds_column": None, "image_encoder_name_or_path": str(made / "clip")}
    return column(made) | {"data_files": str(made / "images.parquet")} | encoder | arguments


def text_model(made, **arguments):
    given = {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(made / "text")}
    return column(made, **given, caption_column="text", caption_dropout_prob=0.5) | arguments


def assert_same_losses(first, second, steps=2):
    rows = [read_metrics(folder) for folder in (first, second)]
    assert [row["step"] for row in rows[0]] == list(range(1, steps + 1))
    for before, now in zip(*rows, strict=True):
        assert now == pytest.approx(before, rel=CLOSE)


def weights(folder, component):
    return load_file(next(Path(folder, component).glob("*.safetensors")))


def load(folder):
    pipe = ADMUnCLIPPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# 1. Runs


class TestRuns:
    def test_a_text_model_becomes_a_decoder(self, made, tmp_path, caplog):
        """In bfloat16, with the text encoder, flips and guided validation images."""
        options = {"train_text_encoder": True, "random_flip": True, "mixed_precision": "bf16"}
        options |= {"image_encoder_name_or_path": str(made / "clip"), "validation_guidance_scale": 2.0}
        options |= {"num_validation_images": 5, "label_column": "label", "class_balanced": True}
        folder = train(text_model(made), output_dir=str(tmp_path), **options)
        assert "The U-Net loses its 5 classes: the image embedding takes their place" in caplog.text
        assert "image embeddings of 16 numbers, read from disk" in caplog.text
        pipe = load(folder)
        assert type(pipe.text_encoder) is GLIDETextModel
        assert pipe.id2label is None
        assert pipe.unet.config.class_embed_type == "identity"
        assert (pipe.unet.config.num_class_embeds, pipe.unet.config.null_class_id) == (None, None)
        config = pipe.image_projection.config
        assert (config.clip_embeddings_dim, config.clip_extra_context_tokens) == (CLIP_WIDTH, 4)
        assert (config.text_conditioning, config.time_embed_dim, config.cross_attention_dim) == ("states", 32, 16)
        # The image, and three samples, of two examples.
        assert Image.open(folder / "samples-0000002.png").height > 2 * 64
        image = Image.fromarray(np.zeros((SIZE, SIZE, 3), dtype=np.uint8))
        options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
        assert np.isfinite(pipe(image=image, prompt="a cat", **options).images).all()
        assert np.isfinite(pipe(prompt="a cat", **options).images).all()  # the learned embedding and the prompt
        # All of them were trained.
        for component in ("unet", "image_projection", "text_encoder"):
            trained = weights(folder / "checkpoint-2", component)
            assert trained.keys() == weights(folder, component).keys()
        before = weights(made / "text", "text_encoder")
        assert any(not torch.equal(value, before[name]) for name, value in weights(folder, "text_encoder").items())
        projection = weights(folder, "image_projection")
        assert projection["clip_image_embeddings_project_to_time_embeddings.weight"].any()  # which started at 0

    @pytest.mark.parametrize("random_flip", [False, True])
    def test_encoding_in_the_loop_is_reading_what_was_stored(self, made, tmp_path, random_flip):
        folders = [
            train(kind(made), random_flip=random_flip, max_train_steps=4, output_dir=str(tmp_path / kind.__name__))
            for kind in (column, in_loop)
        ]
        assert_same_losses(*folders, steps=4)
        pipe = load(folders[1])
        assert pipe.image_projection.config.text_conditioning is None
        assert pipe.image_projection.config.clip_extra_context_tokens == 0  # without cross-attention
        stored = datasets.Dataset.from_parquet(column(made)["data_files"])[0]
        embedding = torch.tensor(stored["image_embeds"])
        torch.testing.assert_close(pipe.encode_image(stored["image"])[0], embedding, rtol=1e-4, atol=1e-4)
        assert load(folders[0]).image_encoder is None

    def test_latents_in_the_loop_and_stored(self, made, tmp_path):
        given = {"vae": made / "vae", "data_files": column(made)["data_files"], "resolution": SIZE, "dtype": "float32"}
        given |= {"image_embeds_column": "image_embeds", "caption_column": "text", "random_flip": True}
        encode_latents.main(flags(**given, output_dir=tmp_path / "latents"))
        config = {k: v for k, v in TOY_CONFIG.items() if k not in ("in_channels", "out_channels", "sample_size")}
        (tmp_path / "unet.json").write_text(json.dumps(config | TEXT_CONFIGS["added_kv"]))
        options = {"vae": str(made / "vae"), "resolution": SIZE, "random_flip": True, "caption_column": "text"}
        options |= {"model_config_name_or_path": str(tmp_path / "unet.json")}
        options |= {"text_encoder_name_or_path": str(made / "text"), "image_encoder_name_or_path": str(made / "clip")}
        sources = {
            "loop": {},
            "stored": {"data_files": None, "train_data_dir": str(tmp_path / "latents")},
        }
        folders = [train(column(made, **options, **kind), output_dir=str(tmp_path / n)) for n, kind in sources.items()]
        assert_same_losses(*folders)
        image = Image.fromarray(np.zeros((SIZE, SIZE, 3), dtype=np.uint8))
        assert load(folders[1])(image=image, num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 3)
        with pytest.raises(ValueError, match="holds latents .*, but a CLIP encodes images; store its embeddings"):
            train(in_loop(made), **options | sources["stored"], output_dir=str(tmp_path / "no"))
        with pytest.raises(
            ValueError, match="`image_embeds_column` is 'text', but the latents in .* with 'image_embeds'"
        ):
            train(
                column(made, **options, **sources["stored"]),
                image_embeds_column="text",
                output_dir=str(tmp_path / "no"),
            )

    @pytest.mark.no_jitter("compares bit by bit")
    def test_resumed_it_ends_bit_by_bit_the_same(self, made, tmp_path):
        options = {"random_flip": True, "train_text_encoder": True, "checkpointing_steps": 1}
        options |= {"image_encoder_name_or_path": str(made / "clip")}
        whole = train(text_model(made), **options, max_train_steps=3, output_dir=str(tmp_path / "whole"))
        half = train(text_model(made), **options, max_train_steps=1, output_dir=str(tmp_path / "half"))
        train(output_dir=str(half), resume_from_checkpoint="latest", max_train_steps=3)
        assert_same_checkpoint(whole / "checkpoint-3", half / "checkpoint-3")
        assert read_metrics(whole) == read_metrics(half)
        # A checkpoint is a result, with the averaged weights.
        for name, value in weights(whole, "image_projection").items():
            assert torch.equal(value, weights(half / "checkpoint-3", "image_projection")[name])
        save_clip(tmp_path / "other", random_clip(seed=5))
        encoder = {"image_encoder_name_or_path": str(tmp_path / "other")}
        with pytest.raises(ValueError, match="the hash of the frozen image encoder is"):
            train(output_dir=str(half), resume_from_checkpoint="latest", max_train_steps=4, **encoder)

    @pytest.mark.slow
    def test_two_processes(self, made, tmp_path):
        """Each weight gets a gradient, for which distributed training waits; the projection is the same in both."""
        given = in_loop(made, random_flip=True, train_batch_size=2, max_train_steps=3, output_dir=str(tmp_path / "run"))
        given |= {"model_config_name_or_path": str(made / "text.json")}  # with tokens
        output = launch("train_adm", {name: value for name, value in given.items() if value is not None}, tmp_path)
        assert "Traceback" not in output
        assert "12 images, image embeddings of 16 numbers, encoded in the loop at 8 x 8, 4 per optimizer step" in output
        assert len(read_metrics(tmp_path / "run")) == 3
        assert load(tmp_path / "run").image_projection.config.clip_extra_context_tokens == 4

    def test_resuming_with_another_dropout(self, made, tmp_path, monkeypatch):
        folder = train(in_loop(made), output_dir=str(tmp_path))
        shown, forward = [], UnCLIPProjectionModel.forward

        def recorded(self, *args, **kwargs):
            if self.training:
                shown.append(args[4])
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(UnCLIPProjectionModel, "forward", recorded)
        arguments = {"image_embeds_dropout_prob": 1.0, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
        train(output_dir=str(folder), **arguments)
        assert len(shown) == 1
        assert shown[0].all()


class TestFineTuning:
    STILL = {"learning_rate": 1e-12, "lr_scheduler": "constant", "max_train_steps": 1}

    def test_a_decoder_stays_as_it_is_without_training(self, made, tmp_path, caplog):
        encoder = {"image_encoder_name_or_path": str(made / "clip")}
        base = train(text_model(made, **encoder), output_dir=str(tmp_path / "base"))
        given = {"pretrained_model_name_or_path": str(base), "image_encoder_name_or_path": None}
        folder = train(text_model(made), **given, **self.STILL, output_dir=str(tmp_path / "again"))
        for component in ("unet", "image_projection", "text_encoder", "image_encoder"):
            before, after = weights(base, component), weights(folder, component)
            assert before.keys() == after.keys()
            assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())
        assert "The result will hold the decoder only" not in caplog.text
        again = {"pretrained_model_name_or_path": str(base), "output_dir": str(tmp_path / "no")}
        for changes, message in (
            ({"num_image_tokens": 3}, "`num_image_tokens` is 3, but the pretrained decoder .* has 4. Leave it out"),
            (
                {"image_embeds_in_time": False},
                "`image_embeds_in_time` is False, but the pretrained decoder .* has True",
            ),
            (
                {"text_conditioning": "clip"},
                "`text_conditioning` is 'clip', but the pretrained decoder .* has 'states'",
            ),
            ({"caption_column": None, "caption_dropout_prob": None}, "but the U-Net adds a pooled text"),
            (
                {"image_embeds_column": None},
                "`class_embed_type='identity'`, as a decoder of unCLIP: .* `--image_embeds_c",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                train(text_model(made) | again | changes)
        save_clip(tmp_path / "wide", random_clip(width=20))
        with pytest.raises(ValueError, match="'image_embeds' have 16 numbers, but those of the CLIP have 20"):
            train(text_model(made) | again, image_encoder_name_or_path=str(tmp_path / "wide"))
        wide = in_loop(made, caption_column="text", image_encoder_name_or_path=str(tmp_path / "wide"))
        with pytest.raises(ValueError, match="have 20 numbers, but the pretrained decoder takes 16"):
            train(wide | again | {"model_config_name_or_path": None})

    @pytest.mark.parametrize("make", [karlo_pipeline, karlo_variation_pipeline])
    def test_karlo(self, made, tmp_path, caplog, make):
        """The layout of diffusers' pipelines, with the captions of a CLIP, encoded now or before."""
        theirs = make()
        theirs.save_pretrained(tmp_path / "karlo")
        given = {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(tmp_path / "karlo")}
        given |= {"caption_column": "text", "caption_dropout_prob": 0.5, "cache_dir": str(tmp_path / "cache")}
        # The CLIP of the embeddings: that of the pipeline, or none.
        kind = in_loop if make is karlo_variation_pipeline else column
        encoder = {"image_encoder_name_or_path": given["pretrained_model_name_or_path"]} if kind is in_loop else {}
        runs = [
            train(
                kind(made, **given, **self.STILL, **encoder),
                precompute_text_embeddings=stored,
                output_dir=str(tmp_path / name),
            )
            for name, stored in (("now", False), ("before", True))
        ]
        assert_same_losses(*runs, steps=1)
        folder = runs[0]
        for component, network in {"unet": theirs.decoder, "image_projection": theirs.text_proj}.items():
            before, after = network.state_dict(), weights(folder, component)
            assert before.keys() == after.keys()
            assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())
        pipe = load(folder)
        assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
        assert pipe.image_projection.config.text_conditioning == "clip"
        assert pipe.prior is None
        assert (pipe.image_encoder is not None) == (make is karlo_variation_pipeline)
        assert "The result will hold the decoder only, and not" in caplog.text
        ours = ADMUnCLIPPipeline.from_pretrained(tmp_path / "karlo")
        ours.set_progress_bar_config(disable=True)
        call = {"image_embeds": torch.randn(1, CLIP_WIDTH), "prompt": "a cat", "num_inference_steps": 2}
        call |= {"output_type": "latent", "guidance_scale": 2.0}
        images = [each(**call, generator=torch.Generator().manual_seed(0)).images for each in (pipe, ours)]
        torch.testing.assert_close(*images, rtol=0, atol=1e-3)  # learning rates of 1e-12 still move Adam's weights

    def test_a_new_unet_with_the_captions_of_the_clip(self, made, tmp_path):
        options = {"model_config_name_or_path": str(made / "text.json"), "caption_column": "text"}
        options |= {"text_encoder_name_or_path": str(made / "clip"), "text_conditioning": "clip"}
        options |= {"train_text_encoder": True}
        folder = train(column(made, **options), max_train_steps=5, output_dir=str(tmp_path / "run"))
        pipe = load(folder)
        assert pipe.text_encoder.config.projection_dim == CLIP_WIDTH
        before, after = (
            weights(tmp_path / "run", "text_encoder"),
            {name: value for name, value in random_clip().state_dict().items() if name.startswith("text_")},
        )
        assert before["text_projection.weight"].shape == after["text_projection.weight"].shape
        assert not torch.equal(before["text_projection.weight"], after["text_projection.weight"])  # it is trained

    def test_tokens_only(self, made, tmp_path):
        base = save_base(tmp_path / "base", random_text_unet("transformer", **CONDITIONAL), "clip")
        options = {"model_config_name_or_path": None, "pretrained_model_name_or_path": base}
        options |= {"image_embeds_in_time": False, "num_image_tokens": 2}
        options |= {"power_ema_stds": [0.05, 0.1], "power_ema_snapshot_steps": 1}
        pipe = load(train(column(made, **options), output_dir=str(tmp_path / "run")))
        assert pipe.text_encoder is None
        assert pipe.unet.config.class_embed_type is None
        assert pipe.unet.config.num_class_embeds == 5  # in its null class
        images = pipe(image_embeds=torch.randn(1, CLIP_WIDTH), num_inference_steps=1, output_type="np").images
        assert np.isfinite(images).all()
        # The average of another length is one of the projection, too.
        write_average(str(tmp_path / "run"), 0.1, str(tmp_path / "average"), None, 0.1)
        averaged, usual = (weights(tmp_path / name, "image_projection") for name in ("average", "run"))
        assert averaged.keys() == usual.keys()
        assert not all(torch.equal(value, usual[name]) for name, value in averaged.items())


# 2. What is refused, and when: before the first step


@pytest.mark.usefixtures("no_training")
class TestBadInput:
    @pytest.fixture
    def no_training(self, monkeypatch):
        def fail(*args, **kwargs):
            pytest.fail("training began")

        monkeypatch.setattr(train_adm, "training_losses", fail)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image_embeds_dropout_prob": 1.5}, "`image_embeds_dropout_prob` is 1.5; it must lie in"),
            ({"num_image_tokens": -1}, "`num_image_tokens` is -1; it must be at least 0"),
            ({"num_image_tokens": 0, "image_embeds_in_time": False}, "the image embedding would have no effect"),
            ({"num_image_tokens": 2}, "`num_image_tokens` is 2, but the U-Net has no cross-attention"),
            ({"image_embeds_in_time": False}, "`image_embeds_in_time` is False, and the U-Net has no cross-att"),
            (
                {"image_embeds_column": "vectors"},
                "`image_embeds_column` is 'vectors', but .* has the columns image, te",
            ),
            ({"image_embeds_column": "text"}, "'text' is of type .*; image embeddings are lists of floating point num"),
            ({"label_column": "label"}, "`label_column` is 'label', but a decoder has no classes.*--class_balanced"),
            ({"task": "inpaint"}, "`task` is 'inpaint', but a decoder of image embeddings"),
            (
                {"lora_rank": 2, "model_config_name_or_path": None, "pretrained_model_name_or_path": "x"},
                "`lora_rank` is 2, b",
            ),
            ({"caption_column": "text"}, "but the U-Net has no cross-attention. Change the block types"),
            ({"text_conditioning": "states"}, "`text_conditioning` is 'states', but there is no `caption_column`"),
            (
                {"image_embeds_column": None, "num_image_tokens": 2},
                "`num_image_tokens` is 2, but there are no image em",
            ),
            (
                {"image_encoder_name_or_path": "no/where"},
                "`image_encoder_name_or_path` is 'no/where', which is no file",
            ),
            (
                {"image_embeds_dropout_prob": 0, "validation_guidance_scale": 2.0},
                "there is no condition to guide towards",
            ),
        ],
    )
    def test_arguments(self, made, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            train(column(made), **changes, output_dir=str(tmp_path))

    def test_prompts(self, made, tmp_path):
        with pytest.raises(ValueError, match="`validation_prompts` has no use for a decoder"):
            train(text_model(made), validation_prompts=["a cat"], output_dir=str(tmp_path))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"class_embed_type": "timestep"}, "`class_embed_type='timestep'` and .* in its config to \"identity\""),
            (CONDITIONAL, "`num_class_embeds=5`, but the image embedding .*leave `num_class_embeds` out"),
        ],
    )
    def test_unets_without_a_place(self, made, tmp_path, config, message):
        (tmp_path / "unet.json").write_text(json.dumps(TOY_CONFIG | config))
        with pytest.raises(ValueError, match=message):
            train(column(made), model_config_name_or_path=str(tmp_path / "unet.json"), output_dir=str(tmp_path / "run"))

    def test_pretrained_unets_without_a_place(self, made, tmp_path):
        base = save_base(tmp_path / "base", random_unet(class_embed_type="timestep"))
        given = {"model_config_name_or_path": None, "pretrained_model_name_or_path": base}
        with pytest.raises(ValueError, match="`class_embed_type='timestep'`"):
            train(column(made, **given), output_dir=str(tmp_path / "run"))

    def test_embeddings_of_another_clip(self, made, tmp_path):
        save_clip(tmp_path / "other", random_clip(seed=5))
        options = {"image_encoder_name_or_path": str(tmp_path / "other"), "num_validation_images": COUNT}
        with pytest.raises(ValueError, match="'image_embeds' are not those of the CLIP: their mean cosine similarity"):
            train(column(made), **options, output_dir=str(tmp_path / "run"))

    def test_a_clip_without_a_projection(self, made, tmp_path):
        clip = random_clip()
        clip.vision_model.save_pretrained(tmp_path / "vision")
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (made / "clip" / name).is_file():
                (tmp_path / "vision" / name).write_text((made / "clip" / name).read_text())
        with pytest.raises(ValueError, match="no weights of the vision tower's projection"):
            train(in_loop(made), image_encoder_name_or_path=str(tmp_path / "vision"), output_dir=str(tmp_path / "run"))

    def test_embeddings_that_are_not_finite(self, made, tmp_path):
        images = [Image.new("RGB", (SIZE, SIZE))] * 4
        vectors = [[0.0, 1.0], [float("nan"), 0.0], [0.0, 1.0], [0.0, 1.0]]
        path = write_rows(tmp_path / "rows.parquet", images, vector=vectors)
        with pytest.raises(ValueError, match="1 of 4 embeddings in the column 'vector' are NaN or infinite: row 1"):
            train(column(made), data_files=path, image_embeds_column="vector", output_dir=str(tmp_path / "run"))

    def test_flips_without_embeddings_of_mirrored_images(self, made, tmp_path):
        images = [Image.new("RGB", (SIZE, SIZE))] * 4
        path = write_rows(tmp_path / "rows.parquet", images, vector=[[0.0, 1.0]] * 4)
        given = {"data_files": path, "image_embeds_column": "vector", "random_flip": True}
        with pytest.raises(
            ValueError, match="`random_flip` needs the embeddings of mirrored images, but there are none"
        ):
            train(column(made), **given, output_dir=str(tmp_path / "run"))

    def test_a_decoder_without_embeddings(self, made, tmp_path):
        base = save_base(tmp_path / "base", random_unet(class_embed_type="identity"))
        given = {"model_config_name_or_path": None, "pretrained_model_name_or_path": base}
        with pytest.raises(
            ValueError, match="as a decoder of unCLIP: it takes a vector in the place of a class. Train"
        ):
            train(column(made, **given), image_embeds_column=None, output_dir=str(tmp_path / "run"))


def test_what_remains_of_a_text_model(made, tmp_path):
    """The U-Net and the text encoder are those of the pretrained model: its pipeline is not changed by becoming one."""
    folder = train(text_model(made), **TestFineTuning.STILL, output_dir=str(tmp_path / "run"))
    before, after = weights(made / "text", "unet"), weights(folder, "unet")
    assert set(before) - set(after) == {"class_embedding.weight"}
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in after.items())
    bias = weights(folder, "image_projection")["clip_image_embeddings_project_to_time_embeddings.bias"]
    torch.testing.assert_close(bias, before["class_embedding.weight"][4], rtol=0, atol=1e-6)
    assert ADMPipeline.from_pretrained(made / "text").unet.config.num_class_embeds == 5
    assert AdaGNUNet2DModel.from_pretrained(folder, subfolder="unet").config.null_class_id is None
