"""Pushing pipelines, models, schedulers and folders of runs by the real client; what their cards say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, PriorTransformer
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from toy_clips import random_clip, save_clip
from toy_models import CONDITIONAL, TOY_AUTOENCODER_CONFIG, fill_randomly, random_classifier, random_unet, toy_tokenizer
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.data.autoencoder_record import save_autoencoder_record
from diffusers_adm.evaluation import ImageSetComparison
from diffusers_adm.hub import model_cards
from diffusers_adm.hub.model_cards import LoraAdapter, write_model_card
from diffusers_adm.hub.push import push_folder
from diffusers_adm.training import add_lora, save_id2label, save_lora


NONE = dict.fromkeys(("vae", "text_encoder", "tokenizer", "classifier"))
RECIPE = {
    "dataset_name": None,
    "data_files": ["/home/somebody/data/noto-emoji-32/train.parquet"],
    "output_dir": "/home/somebody/runs/emoji",
    "seed": 3,
}


def make_pipeline() -> ADMPipeline:
    names = {0: "cat", 1: "dog", 2: "fox", 3: "owl"}
    return ADMPipeline(
        unet=random_unet(**CONDITIONAL), scheduler=LearnedVarianceDDPMScheduler(), **NONE, id2label=names
    )


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder that a training script leaves behind, measured."""
    folder = tmp_path / "run"
    make_pipeline().save_pretrained(folder)
    (folder / "train_args.yaml").write_text(yaml.safe_dump(RECIPE))
    for name, colour in (("samples-0000100", "red"), ("samples-0000200", "blue"), ("loss_curves", "white")):
        Image.new("RGB", (4, 4), colour).save(folder / f"{name}.png")
    bits = {"num_images": 8, "num_timesteps": 50, "bits_per_dim": 4.95361, "bits_per_dim_standard_error": 0.145}
    bits["settings"] = {"dataset": ["/home/somebody/data/noto-emoji-32/test.parquet"]}
    (folder / "bits_per_dim.json").write_text(json.dumps(bits))
    compared = ImageSetComparison(
        num_samples=200,
        num_reference=163,
        feature_dim=64,
        frechet_distance=12.34567,
        kernel_distance=0.0625,
        kernel_distance_standard_error=0.01,
        precision=0.75,
        recall=0.5,
        diversity=1.0,
        diversity_standard_error=0.1,
        reference_diversity=1.0,
        inception_score=3.25,
        inception_score_std=0.1,
    ).to_dict()
    compared["settings"] = {
        "features": "classifier:/home/somebody/runs/judge",
        "samples": ["/home/somebody/samples"],
        "reference": ["/home/somebody/data/noto-emoji-32/test.parquet"],
    }
    (folder / "frechet.json").write_text(json.dumps(compared))
    (folder / "checkpoint-200").mkdir()
    (folder / "checkpoint-200" / "optimizer.bin").write_bytes(b"0" * 100)
    return folder


def make_prior() -> PriorTransformer:
    heads = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
    return PriorTransformer(**heads, embedding_dim=8, num_embeddings=12)


@pytest.fixture
def parts(tmp_path) -> Path:
    """Folders of the other kinds of runs: a classifier, a branch, an adapter, an autoencoder, a CLIP and a prior."""
    folder = tmp_path / "parts"
    random_classifier(num_classes=4).save_pretrained(folder / "judge" / "classifier")
    save_id2label(folder / "judge" / "classifier", {0: "cat", 1: "dog", 2: "fox", 3: "owl"})
    LearnedVarianceDDPMScheduler(num_train_timesteps=500).save_pretrained(folder / "judge" / "scheduler")
    unet = random_unet(**CONDITIONAL)
    AdaGNControlNetModel.from_unet(unet).save_pretrained(folder / "edges")
    add_lora(unet, 4)
    (folder / "lora").mkdir()
    save_lora(unet, folder / "lora")
    autoencoder = fill_randomly(AutoencoderKL(**TOY_AUTOENCODER_CONFIG, scaling_factor=0.5, shift_factor=0.25))
    autoencoder.save_pretrained(folder / "vae")
    save_autoencoder_record(folder / "vae", {"image_format": ImageFormat("L", 1).to_config()})
    fill_randomly(make_prior()).save_pretrained(folder / "prior" / "prior")
    scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_small", prediction_type="sample")
    scheduler.save_pretrained(folder / "prior" / "prior_scheduler")
    text = CLIPTextConfig(vocab_size=14, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
    text.projection_dim = 8
    CLIPTextModelWithProjection(text).save_pretrained(folder / "prior" / "prior_text_encoder")
    toy_tokenizer().save_pretrained(folder / "prior" / "prior_tokenizer")
    save_clip(folder / "clip", random_clip(in_towers=True))
    for name in ("judge", "edges", "lora", "vae", "clip", "prior"):
        recipe = RECIPE | {"pretrained_model_name_or_path": "alice/pushed"}
        (folder / name / "train_args.yaml").write_text(yaml.safe_dump(recipe))
    return folder


class TestCard:
    @pytest.fixture(autouse=True)
    def no_remote_card(self, monkeypatch):
        monkeypatch.setattr(model_cards, "_existing_card", self.local_card)

    @staticmethod
    def local_card(path: Path, repo_id: str, token: str | None) -> ModelCard | None:
        return ModelCard.load(path) if path.is_file() else None

    def test_of_an_autoencoder(self, parts):
        folder = parts / "vae"
        measures = {"psnr": 27.5, "ssim": 0.75, "rfid": 1.5, "rfid_network": "spaces/model/base", "num_images": 16}
        (folder / "reconstruction.json").write_text(json.dumps(measures | {"held_out": True, "step": 2}))
        (folder / "train_args.yaml").write_text(
            yaml.safe_dump(RECIPE | {"validation_data_files": ["/home/a/noto-emoji/test.parquet"]})
        )
        card = ModelCard.load(write_model_card(AutoencoderKL.from_pretrained(folder), folder, "alice/vae"))
        assert card.data.license == "apache-2.0"
        assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
            "psnr": 27.5,
            "ssim": 0.75,
            "rfid": 1.5,
        }
        means = "means over 16 held-out images: PSNR (dB) 27.5, SSIM 0.75, Frechet distance (rFID) 1.5."
        assert f"{means} The Frechet distance has the features of the classifier spaces/model/base." in card.text
        assert "`AutoencoderKL` of diffusers, trained with diffusers-adm." in card.text
        assert "Images of 8x8 pixels, grey images from 0 to 255 (256 levels), become latents of 1/2" in card.text
        assert "`(latents - 0.25) * 0.5`" in card.text
        assert "from diffusers import AutoencoderKL" in card.text
        assert "training/train_autoencoder.py" in card.text
        assert "It does not generate images" in card.text
        autoencoder = AutoencoderKL.from_pretrained(folder)
        autoencoder.register_to_config(latents_mean=[0.5, 0.0], latents_std=[2.0, 1.0], shift_factor=None)
        card = ModelCard.load(write_model_card(autoencoder, folder, "alice/vae"))
        assert "`(latents - latents_mean) / latents_std * scaling_factor` by channel" in card.text
        assert "`(latents - 0" not in card.text

    def test_of_a_prior(self, parts):
        folder = parts / "prior"
        measures = {"similarity": 0.75, "text_similarity": 0.25, "shuffled_similarity": 0.5, "best_similarity": 0.8}
        # A single image would have no standard error.
        errors = {f"{name}_error": 0.0125 for name in measures if name != "text_similarity"}
        settings = {"num_images": 163, "num_inference_steps": 25, "guidance_scale": 1.0, "candidates": 2}
        (folder / "prior_similarity.json").write_text(json.dumps(measures | errors | settings))
        recipe = RECIPE | {"clip": "/home/somebody/runs/clip", "validation_data_dir": "/home/somebody/held/out"}
        (folder / "train_args.yaml").write_text(yaml.safe_dump(recipe))
        prior = PriorTransformer.from_pretrained(folder / "prior")
        card = ModelCard.load(write_model_card(prior, folder, "alice/prior"))
        assert card.data.pipeline_tag == "feature-extraction"
        assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
            "cosine_similarity": 0.75,
            "cosine_text_similarity": 0.25,
            "cosine_shuffled_similarity": 0.5,
        }
        assert (
            "`PriorTransformer` of diffusers, trained with diffusers-adm. It predicts the CLIP embedding" in card.text
        )
        assert "embeddings of 163 held-out images, mean and standard error (25 sampling steps, guidance" in card.text
        assert "- of the prediction: 0.7500 ± 0.0125" in card.text
        assert "- of the text embedding: 0.2500\n" in card.text
        assert "- of the best of several predictions (2): 0.8000 ± 0.0125" in card.text
        assert "mean of the training data" not in card.text
        assert "Embeddings of width 8 of the CLIP .../runs/clip" in card.text
        assert 'PriorTransformer.from_pretrained(repository, subfolder="prior").eval()' in card.text
        assert "training/train_prior.py" in card.text
        assert "somebody/" not in card.text

    def test_of_a_clip(self, parts):
        folder = parts / "clip"
        recalls = {f"{way}_recall_at_{k}": k / 8 for way in ("text_to_image", "image_to_text") for k in (1, 5)}
        recalls |= {"zero_shot_accuracy": 0.5, "without_variants_text_to_image_recall_at_5": 0.75}
        measures = recalls | {f"{name}_error": 0.03125 for name in recalls}
        measures |= {"num_images": 16, "num_images_without_variants": 8, "held_out": True, "step": 2, "loss": 1.5}
        (folder / "retrieval.json").write_text(json.dumps(measures))
        card = ModelCard.load(write_model_card(CLIPModel.from_pretrained(folder), folder, "alice/clip"))
        assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
        assert "ablated-diffusion-model" not in card.data.tags
        found = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert found["text_to_image_recall_at_5"] == 0.625
        assert "`CLIPModel` of transformers, trained with diffusers-adm. Embeds images and texts" in card.text
        assert "Images of 8x8 pixels and texts of up to 12 tokens become embeddings of width 16." in card.text
        assert "On 16 held-out images, with standard errors: text to image recall at 1 12.5% ± 3.1%" in card.text
        assert "Without variants, 8 images: text to image recall at 5 75.0% ± 3.1%." in card.text
        assert "training/train_clip.py" in card.text
        code = re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1].replace(
            '"alice/clip"', repr(str(folder))
        )
        namespace = {}
        exec(code, namespace)
        assert namespace["clip"].config.projection_dim == 16

    @pytest.mark.parametrize("held_out", [True, False])
    def test_of_an_image_to_image_model(self, held_out, tmp_path):
        folder = tmp_path / "run"
        unet = random_unet(in_channels=4)
        ADMImageToImagePipeline(unet, LearnedVarianceDDPMScheduler(), **NONE).save_pretrained(folder)
        files = {"data_files": ["/home/a/twemoji/train.parquet"], "source_data_files": ["/home/a/noto-emoji/x.parquet"]}
        files |= {"validation_data_files": ["/home/a/twemoji/test.parquet"]} if held_out else {}
        (folder / "train_args.yaml").write_text(yaml.safe_dump(files))
        measures = {"psnr": 17.25, "ssim": 0.5, "num_images": 16, "held_out": held_out, "num_inference_steps": 25}
        (folder / "image_to_image.json").write_text(json.dumps(measures))
        pipe = ADMImageToImagePipeline.from_pretrained(folder)
        card = ModelCard.load(write_model_card(pipe, folder, "alice/style"))
        assert card.data.pipeline_tag == "image-to-image"
        results = {result.metric_type: (result.metric_name, result.metric_value) for result in card.data.eval_results}
        kind = "held-out" if held_out else "training"
        assert results == {
            "psnr": (f"PSNR (dB) of 16 {kind} images", 17.25),
            "ssim": (f"SSIM of 16 {kind} images", 0.5),
        }
        data = ".../twemoji/test.parquet" if held_out else "training images"
        assert {result.dataset_name for result in card.data.eval_results} == {data}
        assert f"means over 16 {kind} images (25 sampling steps): PSNR (dB) 17.25, SSIM 0.5." in card.text
        assert "training/train_image_to_image.py" in card.text
        assert "Its source images are grey images from 0 to 255" in card.text
        assert "Noto Emoji" in card.text
        assert "Twemoji" in card.text
        assert card.data.license is None  # of two data sets

    def test_of_a_run(self, run, tmp_path):
        pipe = ADMPipeline.from_pretrained(run)
        folder = tmp_path / "pushed"
        folder.mkdir()
        card = ModelCard.load(write_model_card(pipe, folder, "alice/emoji"))
        data = card.data
        assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
        assert data.license == "apache-2.0"
        assert "ADMPipeline" in data.tags
        assert data.model_name == "emoji"
        measured = {result.metric_type: result.metric_value for result in data.eval_results}
        assert measured == {
            "bits_per_dim": 4.9536,
            "frechet_distance": 12.3457,
            "kernel_distance": 0.0625,
            "inception_score": 3.25,
            "precision": 0.75,
            "recall": 0.5,
        }
        assert data.metrics == list(measured)
        assert {result.dataset_name for result in data.eval_results} == {".../noto-emoji-32/test.parquet"}
        assert "Frechet distance (200 samples, features of the classifier .../runs/judge)" in {
            result.metric_name for result in data.eval_results
        }
        assert "the classifier .../runs/judge, for 200 samples against 163 images of .../noto-emoji-32" in card.text
        measures = ("frechet distance: 12.35", "kernel distance: 0.0625", "inception score: 3.25", "precision: 0.75")
        assert "".join(f"- {line}\n" for line in (*measures, "recall: 0.5")) in card.text
        assert 'DiffusionPipeline.from_pretrained("alice/emoji")' in card.text
        assert "trust_remote_code" not in card.text
        assert "accelerate launch training/train_adm.py --config train_args.yaml" in card.text
        assert "4.954 ± 0.145 bits per dimension" in card.text
        assert "0 cat, 1 dog, 2 fox, 3 owl" in card.text
        assert "Noto Emoji" in card.text
        assert "seed: 3" in card.text
        assert "/home/somebody" not in card.content  # nothing of the machine it was trained on
        assert Image.open(folder / "images" / "samples.png").getpixel((0, 0)) == (0, 0, 255)  # the last ones
        assert (folder / "images" / "loss_curves.png").is_file()

    def test_fid_is_of_inception_alone(self, run, tmp_path):
        path = run / "frechet.json"
        path.write_text(path.read_text().replace("classifier:/home/somebody/runs/judge", "inception"))
        (run / "bits_per_dim.json").unlink()
        card = ModelCard.load(write_model_card(ADMPipeline.from_pretrained(run), tmp_path, "alice/emoji"))
        assert card.data.metrics == ["fid", "kernel_distance", "inception_score", "precision", "recall"]
        assert "bits per dimension" not in card.text

    @pytest.mark.parametrize(
        "base, named", [("alice/base", "alice/base"), ("/home/somebody/runs/base", ".../runs/base")]
    )
    def test_of_what_stands_beside_its_base(self, base, named, run, tmp_path):
        (run / "train_args.yaml").write_text(yaml.safe_dump(RECIPE | {"pretrained_model_name_or_path": base}))
        AdaGNControlNetModel.from_unet(random_unet(**CONDITIONAL)).save_pretrained(run)
        branch = AdaGNControlNetModel.from_pretrained(run)
        for number, (pushed, line) in enumerate(
            (
                (branch, f'ADMControlNetPipeline.from_pretrained("{named}", controlnet=controlnet)'),
                (LoraAdapter(run), 'pipe.load_lora_weights("alice/part")'),
            )
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            card = ModelCard.load(write_model_card(pushed, folder, "alice/part"))
            assert f"its base, `{named}`" in card.text
            assert line in card.text
            relation = (card.data.base_model, card.data.get("base_model_relation"))
            assert relation == (("alice/base", "adapter") if base == named else (None, None))
            assert "/home/somebody" not in card.content

    @pytest.mark.parametrize(
        "noise_schedule, words",
        [
            (
                {"num_train_timesteps": 40, "beta_schedule": "cosine"},
                "on the noise schedule cosine with 40 timesteps",
            ),
            ({}, "It was trained on clean images, to evaluate samples. It can neither guide"),
            (None, "not to classify photographs."),
        ],
    )
    def test_tells_the_noise_schedule(self, noise_schedule, words, tmp_path):
        classifier = random_classifier(noise_schedule=noise_schedule)
        card = ModelCard.load(write_model_card(classifier, tmp_path, "alice/classifier"))
        assert words in card.text
        assert ("made to guide" in card.text) == (noise_schedule != {})
        assert ("noise schedule" in card.text) == bool(noise_schedule)

    def test_tells_size_and_format_of_the_images(self, run, tmp_path):
        bands = ImageFormat("array", 5, (-1.5, 2.5), None)
        unet = random_unet(in_channels=5, out_channels=10, sample_size=[8, 16])
        pipe = ADMPipeline(unet, LearnedVarianceDDPMScheduler(), **NONE, image_format=bands.to_config())
        pipe.save_pretrained(run)
        (run / "train_args.yaml").write_text(yaml.safe_dump(RECIPE | {"preview_channels": [5, 4, 2]}))
        card = ModelCard.load(write_model_card(ADMPipeline.from_pretrained(run), tmp_path, "alice/bands"))
        assert "\n8x16 pixels, 5-channel images from -1.5 to 2.5 (continuous).\n" in card.text
        assert (
            "The samples are shown as: channels 5, 4, 2 as red, green, blue, from -1.5 (0) to 2.5 (255)." in card.text
        )
        assert 'images = pipe(output_type="np").images  # (batch_size, height, width, channels)\n```' in card.text
        assert "which return values of the data, from -1.5 to 2.5." in card.text
        code = "\n".join(re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL))
        loaded = code.replace('"alice/bands"', repr(str(run)))
        namespace = {}
        exec(loaded.replace("output_type=", "num_inference_steps=2, output_type="), namespace)
        assert namespace["images"].shape == (1, 8, 16, 5)

    @pytest.mark.parametrize(
        ("image_format", "line"),
        [
            (ImageFormat("L", 1, (0, 4095), 4096), "8x8 pixels, grey images from 0 to 4095 (4096 levels)."),
            (None, "8x8 pixels."),
        ],
    )
    def test_pictures_need_no_other_output(self, image_format, line, run, tmp_path):
        unet = random_unet(in_channels=1, out_channels=2)
        ADMPipeline(unet, LearnedVarianceDDPMScheduler(), **NONE, image_format=image_format).save_pretrained(run)
        card = ModelCard.load(write_model_card(ADMPipeline.from_pretrained(run), tmp_path, "alice/scans"))
        assert line in card.text
        assert "output_type" not in card.text
        assert ("The samples are shown as" in card.text) == (image_format is not None)

    def test_the_size_in_latents_is_that_of_the_images(self, run, tmp_path):
        vae = fill_randomly(AutoencoderKL(**TOY_AUTOENCODER_CONFIG))
        unet = random_unet(in_channels=vae.config.latent_channels, out_channels=2 * vae.config.latent_channels)
        ADMPipeline(unet, LearnedVarianceDDPMScheduler(), **NONE | {"vae": vae}).save_pretrained(run)
        card = ModelCard.load(write_model_card(ADMPipeline.from_pretrained(run), tmp_path, "alice/latent"))
        assert "\n16x16 pixels, decoded from latents.\n" in card.text

    @pytest.mark.parametrize("kind", ["translation", "scan", "inpainting", "super-resolution", "controlnets"])
    def test_the_call_runs(self, kind, run, tmp_path, monkeypatch):
        """Of pipelines that take images, on files of such images."""
        bands, scan = ImageFormat("array", 5, (-1.5, 2.5), None), ImageFormat("L", 1, (0, 4095), 4096)
        shapes, parts, channels = {"image": (8, 8, 5)}, {"image_format": bands.to_config()}, 5
        if kind == "translation":
            cls, extra, parts = ADMImageToImagePipeline, 5, {"image_format": None, "source_format": bands.to_config()}
            channels = 3
        elif kind == "scan":
            cls, extra, shapes, parts = ADMImageToImagePipeline, 1, {}, parts | {"source_format": scan.to_config()}
            Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "image.png")
        elif kind == "inpainting":
            cls, extra = ADMInpaintPipeline, 0
            Image.new("L", (8, 8), "white").save(tmp_path / "mask.png")
        elif kind == "super-resolution":
            cls, extra, shapes = ADMSuperResolutionPipeline, 5, {"image": (4, 4, 5)}
        else:
            cls, extra, shapes = ADMControlNetPipeline, 0, {"image_0": (8, 8, 5), "image_1": (8, 8, 5)}
            net = AdaGNControlNetModel.from_unet(random_unet(in_channels=5, out_channels=10), conditioning_channels=5)
            net.register_to_config(condition_format=bands.to_config())
            parts["controlnet"] = [net, net]
        unet = random_unet(in_channels=channels + extra, out_channels=2 * channels)
        pipe = cls(unet=unet, scheduler=LearnedVarianceDDPMScheduler(), **NONE, **parts)
        pipe.save_pretrained(run)
        for name, shape in shapes.items():
            np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).uniform(-1.5, 2.5, shape).astype(np.float32))
        card = ModelCard.load(write_model_card(pipe, tmp_path, "alice/model"))
        code = "\n".join(re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL))
        code = code.replace('"alice/model"', repr(str(run))).replace("pipe(image", "pipe(num_inference_steps=2, image")
        assert "num_inference_steps" in code
        monkeypatch.chdir(tmp_path)
        namespace = {}
        exec(code, namespace)
        images = namespace["images"]
        assert images[0].mode == "RGB" if kind == "translation" else images.shape == (1, 8, 8, 5)

    def test_tells_the_formats_of_other_models(self, tmp_path):
        deep, flow = ImageFormat("L", 1, (0, 4095), 4096), ImageFormat("array", 2, (-3, 3), None)
        classifier = random_classifier(in_channels=1, image_format=deep.to_config())
        card = ModelCard.load(write_model_card(classifier, tmp_path, "alice/classifier"))
        assert "It classifies grey images from 0 to 4095 (4096 levels), 8x8 pixels." in card.text
        controlnet = AdaGNControlNetModel.from_unet(random_unet(in_channels=1), conditioning_channels=2)
        controlnet.register_to_config(image_format=deep.to_config(), condition_format=flow.to_config())
        (tmp_path / "README.md").unlink()
        card = ModelCard.load(write_model_card(controlnet, tmp_path, "alice/flow"))
        assert "Its base generates grey images from 0 to 4095 (4096 levels)." in card.text
        assert "Its conditioning images are 2-channel images from -3 to 3 (continuous)," in card.text

    def test_of_a_fine_tuned_pipeline(self, run, tmp_path):
        (run / "train_args.yaml").write_text(yaml.safe_dump(RECIPE | {"pretrained_model_name_or_path": "alice/base"}))
        card = ModelCard.load(write_model_card(ADMPipeline.from_pretrained(run), tmp_path, "alice/emoji"))
        assert (card.data.base_model, card.data.base_model_relation) == ("alice/base", "finetune")
        assert "license" not in card.data.to_dict()  # that of the base counts, too

    def test_claims_nothing_unknown(self, tmp_path):
        card = ModelCard.load(write_model_card(make_pipeline(), tmp_path, "alice/emoji"))
        assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
        assert "## Training" not in card.text
        assert "## Data" not in card.text

    def test_keeps_what_somebody_wrote(self, run, tmp_path):
        folder = tmp_path / "pushed"
        folder.mkdir()
        (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# My own words\n")
        card = ModelCard.load(write_model_card(ADMPipeline.from_pretrained(run), folder, "alice/emoji"))
        assert card.text.strip() == "# My own words"
        assert card.data.license == "mit"
        assert card.data.library_name == "diffusers"

    def test_follows_the_model_and_keeps_metadata(self, run, tmp_path):
        folder = tmp_path / "pushed"
        folder.mkdir()
        path = write_model_card(make_pipeline(), folder, "alice/emoji")
        path.write_text(path.read_text().replace("library_name: diffusers", "library_name: diffusers\nlicense: mit"))
        card = ModelCard.load(write_model_card(ADMPipeline.from_pretrained(run), folder, "alice/emoji"))
        assert card.data.license == "mit"
        assert "## Training" in card.text

    @pytest.mark.parametrize("name, tag", [("unet", "unconditional-image-generation"), ("scheduler", None)])
    def test_of_a_component(self, name, tag, tmp_path):
        component = getattr(make_pipeline(), name)
        card = ModelCard.load(write_model_card(component, tmp_path, "alice/part"))
        assert card.data.pipeline_tag == tag
        assert f'{type(component).__name__}.from_pretrained("alice/part")' in card.text


class TestPush:
    CLIENT = """
import sys
import diffusers_adm
from diffusers import AutoencoderKL, DiffusionPipeline, PriorTransformer
from transformers import AutoTokenizer, CLIPTextModelWithProjection
from diffusers_adm.data.autoencoder_record import load_autoencoder_record
from diffusers_adm import ADMPipeline, AdaGNUNet2DModel, LearnedVarianceDDPMScheduler
from diffusers_adm.hub.__main__ import main
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from diffusers_adm import AdaGNControlNetModel, ADMControlNetPipeline
from diffusers_adm.evaluation.data import load_classifier
from transformers import AutoTokenizer, CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
run, copy, parts = sys.argv[1:]
pipe = ADMPipeline.from_pretrained(run)
mine = {"token": "token-of-alice"}
pipe.push_to_hub("alice/pushed", commit_message="First", private=True, include_code=True, **mine)
pipe.save_pretrained(copy, push_to_hub=True, repo_id="saved", commit_message="Second", **mine)
pull = pipe.push_to_hub("alice/saved", create_pr=True, include_code=True, token="token-of-bob")
assert pull.pr_revision == "refs/pr/1", pull
pipe.unet.push_to_hub("alice/unet", variant="fp16", **mine)
pipe.scheduler.push_to_hub("alice/scheduler", **mine)
pipe.scheduler.save_pretrained(copy + "/scheduler", push_to_hub=True, repo_id="alice/scheduler2", **mine)
hub = HfApi(token="token-of-alice")
words = b"---\\nlicense: mit\\n---\\n\\n# My own words\\n"
hub.upload_file(path_or_fileobj=words, path_in_repo="README.md", repo_id="alice/unet")
pipe.unet.push_to_hub("alice/unet", **mine)
main(["push", run, "alice/run", "--token", "token-of-alice", "--include_code"])
for part in ("judge", "edges", "lora", "vae", "clip", "prior"):
    main(["push", f"{parts}/{part}", f"alice/{part}", "--token", "token-of-alice"])
classifier, names = load_classifier("classifier", "alice/judge", None)
assert (classifier.config.num_classes, names[1]) == (4, "dog")
noise = LearnedVarianceDDPMScheduler.from_pretrained("alice/judge", subfolder="scheduler")
assert noise.config.num_train_timesteps == 500
assert AutoencoderKL.from_pretrained("alice/vae").config.scaling_factor == 0.5
assert load_autoencoder_record("alice/vae")["image_format"]["mode"] == "L"
assert load_autoencoder_record("alice/edges") is None
assert PriorTransformer.from_pretrained("alice/prior", subfolder="prior").config.embedding_dim == 8
noise = LearnedVarianceDDPMScheduler.from_pretrained("alice/prior", subfolder="prior_scheduler")
assert noise.config.prediction_type == "sample"
text = CLIPTextModelWithProjection.from_pretrained("alice/prior", subfolder="prior_text_encoder")
assert text.config.hidden_size == 8
assert len(AutoTokenizer.from_pretrained("alice/prior", subfolder="prior_tokenizer")) == 13
for kind in (CLIPModel, CLIPVisionModelWithProjection, CLIPTextModelWithProjection):
    assert kind.from_pretrained("alice/clip").config.projection_dim == 16
assert "cat" in AutoTokenizer.from_pretrained("alice/clip").get_vocab()
assert CLIPImageProcessorPil.from_pretrained("alice/clip").image_mean[0] == 0.48145466
branch = AdaGNControlNetModel.from_pretrained("alice/edges")
ADMControlNetPipeline.from_pretrained("alice/pushed", controlnet=branch, **mine).load_lora_weights("alice/lora")
for token in (None, "wrong", "token-of-bob"):
    try:
        pipe.push_to_hub("alice/refused", token=token)
    except HfHubHTTPError as error:
        print("refused", error.response.status_code)
    else:
        raise SystemExit(f"{token} was taken")
loaded = DiffusionPipeline.from_pretrained("alice/saved", revision="refs/pr/1")
assert type(loaded.unet) is AdaGNUNet2DModel
assert AdaGNUNet2DModel.from_pretrained("alice/unet", variant="fp16").config.in_channels == 3
assert LearnedVarianceDDPMScheduler.from_pretrained("alice/scheduler").config.num_train_timesteps == 1000
assert DiffusionPipeline.from_pretrained("alice/pushed", **mine).id2label[1] == "dog"
"""

    def test_all_that_can_be_pushed(self, run, parts, tmp_path):
        with HubServer() as hub:
            said = hub.run_client(self.CLIENT, run, tmp_path / "copy", parts, cache=tmp_path / "cache")
        for repo in hub.repositories:
            for name, content in hub.files(repo).items():
                assert str(tmp_path).encode() not in content, (repo, name)
                assert b"/home/somebody" not in content, (repo, name)
        assert {name for name in hub.files("alice/lora") if name[0] != "."} == {
            "README.md",
            "pytorch_lora_weights.safetensors",
        }
        assert {"config.json", "autoencoder.json"} < set(hub.files("alice/vae"))
        assert {"config.json", "id2label.json", "scheduler/scheduler_config.json"} < set(hub.files("alice/judge"))
        assert said.count("refused") == 3
        assert "refused 401" in said
        assert "refused 403" in said
        assert "alice/refused" not in hub.repositories
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert hub.files("alice/pushed")[weights] == (run / weights).read_bytes()
        assert len(hub.uploads) == len(set(hub.uploads))  # what lies on the Hub is not sent again
        pushed = hub.repositories["alice/pushed"]
        assert pushed.private
        assert pushed.commits[pushed.refs["main"]].message == "First"
        saved = hub.repositories["alice/saved"]
        assert saved.commits[saved.refs["main"]].message == "Second"
        assert not saved.private
        assert "pipeline.py" not in hub.files("alice/saved")
        assert "pipeline.py" in hub.files("alice/saved", "refs/pr/1")
        kept = ModelCard(hub.files("alice/unet")["README.md"].decode())
        assert kept.text.strip() == "# My own words"
        assert (kept.data.license, kept.data.library_name) == ("mit", "diffusers")
        for repo in ("pushed", "saved", "scheduler", "scheduler2", "run", "judge", "edges", "lora", "vae"):
            card = ModelCard(hub.files(f"alice/{repo}")["README.md"].decode())
            assert card.data.library_name == "diffusers"
            assert model_cards.MARK in card.text
        card = ModelCard(hub.files("alice/clip")["README.md"].decode())
        assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
        assert "train_args.yaml" not in hub.files("alice/clip")
        run_files = hub.files("alice/run")
        assert {"pipeline.py", "images/samples.png", "images/loss_curves.png"} < set(run_files)
        assert not [name for name in run_files if "checkpoint" in name]
        assert b"trust_remote_code=True" in run_files["README.md"]
        assert b"trust_remote_code=True" not in hub.files("alice/saved")["README.md"]


class TestLoad:
    ONLINE = """
import sys, torch
import diffusers_adm
from diffusers import DiffusionPipeline
from diffusers_adm import ADMPipeline
load = DiffusionPipeline.from_pretrained
first, second, branch, result = sys.argv[1:]
steps = lambda pipe: pipe.scheduler.config.num_train_timesteps
assert steps(load("alice/adm")) == 1000
assert steps(load("alice/adm", revision=first)) == 500
assert steps(load("alice/adm", revision=branch)) == 500
half = ADMPipeline.from_pretrained("alice/adm", variant="fp16", torch_dtype=torch.float16)
assert half.unet.dtype == torch.float16
torch.save(half.unet.state_dict(), result)
mapped = load("alice/adm", device_map="cpu")
assert mapped.unet.device.type == "cpu"
"""
    OFFLINE = """
import sys
import diffusers_adm
from diffusers import DiffusionPipeline
first, = sys.argv[1:]
assert DiffusionPipeline.from_pretrained("alice/adm").scheduler.config.num_train_timesteps == 1000
assert DiffusionPipeline.from_pretrained("alice/adm", revision=first).scheduler.config.num_train_timesteps == 500
try:
    DiffusionPipeline.from_pretrained("alice/other")
except OSError as error:
    print(error)
else:
    raise SystemExit("loaded what was never downloaded")
"""

    def test_online_then_offline(self, tmp_path):
        pipe = make_pipeline()
        for number, steps in enumerate((500, 1000)):
            pipe.scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=steps)
            pipe.save_pretrained(tmp_path / f"adm{number}")
        half = {name: tensor.half() for name, tensor in pipe.unet.state_dict().items()}
        pipe.unet.float().save_pretrained(tmp_path / "adm1" / "unet")
        pipe.unet.half().save_pretrained(tmp_path / "adm1" / "unet", variant="fp16")
        with HubServer() as hub:
            first = hub.add_commit("alice/adm", tmp_path / "adm0")
            hub.add_commit("alice/adm", tmp_path / "adm0", ref="older")
            second = hub.add_commit("alice/adm", tmp_path / "adm1")
            cache = tmp_path / "cache"
            hub.run_client(self.ONLINE, first, second, "older", tmp_path / "half.pt", cache=cache)
            asked = len(hub.requests)
            said = hub.run_client(self.OFFLINE, first, cache=cache, env={"HF_HUB_OFFLINE": "1"})
            assert len(hub.requests) == asked
        assert "alice/other" in said
        loaded = torch.load(tmp_path / "half.pt")
        assert loaded.keys() == half.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in half.items())


def test_a_wrong_repository_name_is_found_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="Repo id must"):
        push_folder(tmp_path / "nowhere", "not a name")
