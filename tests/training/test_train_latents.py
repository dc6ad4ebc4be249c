"""Training in the latents of an autoencoder: encoded in the loop or stored before, with the same losses."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from runs import (
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    flags,
    launch,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
)
from scripts import load_script
from tiny_autoencoders import SCALING, SHIFT, random_vae, save_vae
from tolerances import NETWORK, rounding_errors
from toy_models import TEXT_CONFIGS, TOY_CONFIG, random_unet

from diffusers_adm import AdaGNControlNetModel, ADMControlNetPipeline, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.data import encode_latents
from diffusers_adm.training import DIFFUSION_ARGUMENTS, load_diffusion, parse_run, start_run
from diffusers_adm.training import run as training_run


NAMES = ("train_adm", "train_controlnet", "train_image_to_image", "train_super_resolution")
SCRIPTS = {name: load_script(name) for name in NAMES}
SIZE = 8  # pixels; latents have half of it
RUN = SHORT_RUN | {
    "train_batch_size": 4,
    "max_train_samples": 12,
    "learning_rate": 1e-3,
    "num_validation_images": 1,
    "validation_num_inference_steps": 1,
    "label_column": "label",
    "resolution": SIZE,
}
UNET = {k: v for k, v in TOY_CONFIG.items() if k not in ("in_channels", "out_channels", "sample_size")}
LATENT_CHANNELS = {"in_channels": 4, "out_channels": 8, "sample_size": SIZE // 2}
# Of losses: the encoder's rounding errors, after some steps of Adam.
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)
    with own_process_state("train_adm"):
        yield


def run(script="train_adm", given=None, **arguments):
    arguments = (given or {}) | arguments
    reset_accelerate()
    try:
        SCRIPTS[script].main(flags(**{name: value for name, value in arguments.items() if value is not None}))
    finally:
        logging.getLogger(script).setLevel(logging.NOTSET)
    return Path(arguments["output_dir"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An autoencoder, float32 latents of the emoji with flips, and configs of U-Nets."""
    folder = tmp_path_factory.mktemp("latent_runs")
    save_vae(folder / "vae")
    (folder / "unet.json").write_text(json.dumps(UNET))
    encode(folder, folder / "stored", random_flip=True, conditioning_image_column="edges")
    return folder


def emoji(folder):
    """Some of them, with conditioning images in a column."""
    import datasets

    path = folder / "emoji.parquet"
    if not path.exists():
        data = datasets.Dataset.from_parquet(EMOJI).select(range(24))
        data.add_column("edges", data.with_format("arrow")["image"][:], feature=datasets.Image()).to_parquet(path)
    return str(path)


def encode(folder, output, **arguments):
    given = {"vae": folder / "vae", "data_files": emoji(folder), "resolution": SIZE, "dtype": "float32"}
    given |= {"label_column": "label", "caption_column": "text", "output_dir": output}
    encode_latents.main(flags(**given | arguments))
    return str(output)


def in_loop(made, **arguments):
    config = {"vae": str(made / "vae"), "model_config_name_or_path": str(made / "unet.json")}
    return RUN | config | {"data_files": emoji(made)} | arguments


def stored(made, **arguments):
    return in_loop(made, train_data_dir=str(made / "stored"), data_files=None, **arguments)


def save_latent_base(folder, vae=None, **config):
    ADMPipeline(
        unet=random_unet(**LATENT_CHANNELS, num_class_embeds=10, null_class_id=9, **config),
        scheduler=LearnedVarianceDDPMScheduler(clip_sample=False),
        vae=vae or random_vae(),
        text_encoder=None,
        tokenizer=None,
        classifier=None,
        image_format=ImageFormat(),
    ).save_pretrained(folder)
    return str(folder)


def assert_same_losses(first, second, steps):
    rows = [read_metrics(folder) for folder in (first, second)]
    assert [row["step"] for row in rows[0]] == list(range(1, steps + 1))
    for before, now in zip(*rows, strict=True):
        assert now == pytest.approx(before, rel=CLOSE)


class TestSameLosses:
    def test_of_latents_in_the_loop_and_stored(self, made, tmp_path):
        options = {"random_flip": True, "max_train_steps": 5, "class_balanced": True}
        folders = [
            run(**arguments(made, **options, output_dir=str(tmp_path / arguments.__name__)))
            for arguments in (in_loop, stored)
        ]
        assert_same_losses(*folders, steps=5)
        for folder in folders:
            assert (folder / "samples-0000005.png").is_file()
            pipe = ADMPipeline.from_pretrained(folder)
            assert (pipe.unet.config.sample_size, pipe.unet.config.in_channels) == (SIZE // 2, 4)
            assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (SCALING, SHIFT)
            assert pipe.image_format == ImageFormat()
            assert not pipe.scheduler.config.clip_sample  # latents may have any value
            pipe.set_progress_bar_config(disable=True)
            assert pipe(class_labels=[1], num_inference_steps=2, output_type="np").images.shape == (1, SIZE, SIZE, 3)

    @pytest.mark.no_jitter("compares bit by bit")
    def test_of_a_resumed_run(self, made, tmp_path):
        for arguments in (in_loop, stored):
            kind = {"random_flip": True, "checkpointing_steps": 1}
            whole = run(**arguments(made, **kind, max_train_steps=3, output_dir=str(tmp_path / arguments.__name__)))
            half = tmp_path / f"half {arguments.__name__}"
            run(**arguments(made, **kind, max_train_steps=1, output_dir=str(half)))
            run(output_dir=str(half), resume_from_checkpoint="latest", max_train_steps=3)
            records = [folder / "checkpoint-3" / "run_record.json" for folder in (whole, half)]
            assert "autoencoder" in json.loads(records[0].read_text())["facts"]["frozen"]
            assert_same_checkpoint(whole / "checkpoint-3", half / "checkpoint-3")

    @pytest.mark.slow
    def test_of_two_processes(self, made, tmp_path):
        folders = []
        for arguments in (in_loop, stored):
            folders.append(tmp_path / arguments.__name__)
            given = arguments(made, random_flip=True, output_dir=str(folders[-1]))
            launch("train_adm", {name: value for name, value in given.items() if value is not None}, tmp_path)
        assert_same_losses(*folders, steps=2)

    def test_of_text(self, made, tmp_path):
        base = save_base(tmp_path / "text", random_unet(**TEXT_CONFIGS["transformer"]), "clip")
        (tmp_path / "unet.json").write_text(json.dumps(UNET | TEXT_CONFIGS["transformer"]))
        config = {"model_config_name_or_path": str(tmp_path / "unet.json"), "caption_column": "text"}
        config |= {"text_encoder_name_or_path": base, "label_column": None}
        folders = [
            run(**arguments(made, output_dir=str(tmp_path / arguments.__name__)) | config)
            for arguments in (in_loop, stored)
        ]
        assert_same_losses(*folders, steps=2)
        assert ADMPipeline.from_pretrained(folders[0]).text_encoder is not None

    def test_of_a_controlnet(self, made, tmp_path):
        """Conditioning images keep the size of the images."""
        base = save_latent_base(tmp_path / "base")
        config = {"pretrained_model_name_or_path": base, "model_config_name_or_path": None, "vae": None}
        config |= {"conditioning_image_column": "edges", "random_flip": True}
        folders = [
            run("train_controlnet", **arguments(made, output_dir=str(tmp_path / arguments.__name__)) | config)
            for arguments in (in_loop, stored)
        ]
        assert_same_losses(*folders, steps=2)
        for folder in folders:
            assert (folder / "samples-0000002.png").is_file()
            controlnet = AdaGNControlNetModel.from_pretrained(folder)
            assert controlnet.config.conditioning_downsampling_factor == 2
            pipe = ADMControlNetPipeline.from_pretrained(base, controlnet=controlnet)
            pipe.set_progress_bar_config(disable=True)
            image = torch.rand(1, 3, SIZE, SIZE)
            result = pipe(image=image, class_labels=[1], num_inference_steps=1, output_type="np").images
            assert result.shape == (1, SIZE, SIZE, 3)
        # The trained one again; and one for samples of the size of the images.
        again = in_loop(made) | config | {"output_dir": str(tmp_path / "again"), "max_train_steps": 1}
        run("train_controlnet", again, controlnet_model_name_or_path=str(folders[0]))
        AdaGNControlNetModel.from_unet(ADMPipeline.from_pretrained(base).unet).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="1 times as large as the samples; .* sides 2 times as long"):
            run(
                "train_controlnet",
                again,
                controlnet_model_name_or_path=str(tmp_path / "other"),
                output_dir=str(tmp_path),
            )


class TestSamples:
    @pytest.mark.parametrize("arguments", [in_loop, stored])
    def test_are_those_of_the_autoencoder(self, made, tmp_path, arguments):
        """mean + std x noise, less the shift, times the scale: by diffusers' own class."""
        given = {k: v for k, v in arguments(made, output_dir=str(tmp_path)).items() if v is not None}
        args, record = parse_run(DIFFUSION_ARGUMENTS, flags(**given), "train_adm")
        reset_accelerate()
        diffusion = load_diffusion(start_run("train_adm", args, record), record, args)
        train_dataset, validation_dataset = diffusion.datasets()
        pixels, _ = load_diffusion_of_pixels(made, tmp_path)
        batch = torch.utils.data.default_collate([train_dataset[index] for index in range(4)])
        with torch.no_grad():
            posterior = (
                AutoencoderKL.from_pretrained(made / "vae")
                .encode(torch.stack([pixels[index]["images"] for index in range(4)]))
                .latent_dist
            )
        expected = (posterior.mean + posterior.std * batch["latent_noise"] - SHIFT) * SCALING
        samples = diffusion.samples(batch)
        assert rounding_errors(samples, expected) <= NETWORK
        assert not samples.requires_grad
        assert diffusion.num_levels is None
        assert diffusion.resolution == SIZE
        examples = diffusion.examples(validation_dataset, 2)
        assert all(tensors["images"].shape == (3, SIZE, SIZE) for tensors, _ in examples)


def load_diffusion_of_pixels(made, tmp_path):
    (tmp_path / "pixels.json").write_text(json.dumps(UNET))
    given = in_loop(made, output_dir=str(tmp_path), model_config_name_or_path=str(tmp_path / "pixels.json"))
    del given["vae"]
    args, record = parse_run(
        DIFFUSION_ARGUMENTS, flags(**{k: v for k, v in given.items() if v is not None}), "train_adm"
    )
    reset_accelerate()
    return load_diffusion(start_run("train_adm", args, record), record, args).datasets()


class TestPretrained:
    """A pipeline with an autoencoder is trained in its latents."""

    @pytest.fixture
    def base(self, tmp_path):
        return save_latent_base(tmp_path / "base")

    @staticmethod
    def arguments(made, tmp_path, base, **arguments):
        given = in_loop(made, output_dir=str(tmp_path / "run"), pretrained_model_name_or_path=base, **arguments)
        return given | {"model_config_name_or_path": None, "resolution": None}

    @pytest.mark.parametrize("vae", [None, "own"])
    def test_its_own_is_used(self, made, tmp_path, base, vae):
        """The resolution is that of the U-Net's latents, times the factor; an adapter is trained alike."""
        given = self.arguments(made, tmp_path, base, lora_rank=2) | {"vae": vae and str(made / "vae")}
        folder = run(given=given, max_train_steps=1)
        facts = json.loads((folder / "checkpoint-1" / "run_record.json").read_text())["facts"]
        assert facts["resolution"] == SIZE
        assert {"U-Net", "autoencoder"} <= set(facts["frozen"])

    def test_another_decoder_of_the_same_latents(self, made, tmp_path, base, caplog):
        """As `train_autoencoder.py --decoder_only` leaves it: the weights stay usable, and it is what decodes."""
        vae = random_vae()
        vae.decoder.conv_in.bias.data.add_(0.5)
        given = self.arguments(made, tmp_path, base) | {"vae": save_vae(tmp_path / "other", vae)}
        folder = run(given=given, max_train_steps=1)
        saved = AutoencoderKL.from_pretrained(folder / "vae")
        assert torch.equal(saved.decoder.conv_in.bias, vae.decoder.conv_in.bias)
        assert "has another one" not in caplog.text
        run(given=given, max_train_steps=1, lora_rank=2, output_dir=str(tmp_path / "adapter"))

    def test_another_one_needs_new_weights(self, made, tmp_path, base, caplog):
        other = save_vae(tmp_path / "other", random_vae(seed=1))
        given = self.arguments(made, tmp_path, base) | {"vae": other}
        with pytest.raises(ValueError, match="has another one, and `lora_rank` leaves the pretrained weights"):
            run(**given, lora_rank=2)
        with pytest.raises(ValueError, match="has another one, and a ControlNet leaves its base model"):
            run("train_controlnet", **given, condition="low_resolution")
        run(given=given, max_train_steps=1)
        assert "has another one: its weights are trained anew" in caplog.text

    def test_of_pixels(self, made, tmp_path, caplog):
        base = save_base(tmp_path / "base", random_unet(**LATENT_CHANNELS, num_class_embeds=10, null_class_id=9))
        with pytest.raises(ValueError, match="has no autoencoder: its U-Net was trained in pixels, and `lora_rank`"):
            run(**self.arguments(made, tmp_path, base, lora_rank=2))
        run(given=self.arguments(made, tmp_path, base), max_train_steps=1)
        assert "its U-Net was trained in pixels: its weights are trained anew" in caplog.text

    def test_a_text_of_the_card_has_the_size_of_the_images(self, base):
        from diffusers_adm.hub.model_cards import _format_variables, _Run

        pipe = ADMPipeline.from_pretrained(base)
        card = _format_variables(pipe, Path(base), _Run.find(pipe, Path(base)))
        assert card["size"] == f"{SIZE}x{SIZE}"


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"resolution": 10}, "autoencoder downsamples by 2 and this U-Net by 2, so it must be divisible by 4"),
            ({"vae": "nowhere"}, "`vae` is 'nowhere', which is no file or folder"),
            ({"value_range": [0, 300]}, None),
        ],
    )
    def test_in_the_loop(self, made, tmp_path, changes, message):
        given = in_loop(made, output_dir=str(tmp_path / "run")) | changes
        if message is None:  # the format that is recorded with the autoencoder
            given["vae"] = save_vae(tmp_path / "vae", image_format=ImageFormat())
            message = "trained on RGB images from 0 to 255.*and the autoencoder stays as it is"
        with pytest.raises(ValueError, match=message):
            run(**given)
        assert not list(tmp_path.glob("run/checkpoint-*"))

    def test_other_channels(self, made, tmp_path):
        (tmp_path / "unet.json").write_text(json.dumps(UNET | {"in_channels": 3, "out_channels": 6}))
        with pytest.raises(ValueError, match="U-Net is for samples of 3 channels, but the latents .* have 4"):
            run(**in_loop(made, model_config_name_or_path=str(tmp_path / "unet.json"), output_dir=str(tmp_path)))
        vae = save_vae(tmp_path / "vae", random_vae(in_channels=1))
        with pytest.raises(ValueError, match="encodes images of 1 channels and decodes to 3"):
            run(**in_loop(made, vae=vae, output_dir=str(tmp_path)))

    def test_a_script_for_pixels(self, made, tmp_path):
        (tmp_path / "unet.json").write_text(json.dumps(UNET | {"in_channels": 6, "out_channels": 6}))
        given = in_loop(made, model_config_name_or_path=str(tmp_path / "unet.json"), output_dir=str(tmp_path / "run"))
        with pytest.raises(ValueError, match=r"`vae` is .*, but train_image_to_image.py trains in pixels"):
            run("train_image_to_image", **given, source="low_resolution")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vae": None}, "holds latents .*Pass it as `--vae`"),
            ({"task": "inpaint"}, "holds latents .*, but masked images cannot be made from latents"),
            ({"resolution": 12}, "The resolution is 12, but the latents in .* are those of images of 8"),
            ({"min_image_size": 4}, "`min_image_size` is 4, which has no effect on stored latents"),
            ({"image_mode": "L"}, "`--image_mode` is L, but the model was trained on RGB"),
            ({"value_range": [0, 300]}, "`value_range` is 0.0 300.0, but the latents in .* are those of RGB"),
            ({"label_column": "unified"}, "`label_column` is 'unified', but the latents .* were encoded with 'label'"),
        ],
    )
    def test_stored(self, made, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            run(**stored(made, output_dir=str(tmp_path / "run")) | changes)

    def test_stored_by_another_autoencoder(self, made, tmp_path):
        for name, vae, details in (
            ("weights", random_vae(seed=1), ""),
            ("scale", random_vae(scaling_factor=0.5), r" \(scaling_factor is 0.5, and was 0.8\)"),
        ):
            other = save_vae(tmp_path / name, vae)
            with pytest.raises(ValueError, match=f"those of another autoencoder, .*{details}"):
                run(**stored(made, vae=other, output_dir=str(tmp_path / "run")))

    def test_stored_without_what_is_asked_for(self, made, tmp_path):
        bare = encode(made, tmp_path / "bare", resolution=f"{SIZE}x{2 * SIZE}")
        given = stored(made, output_dir=str(tmp_path / "run")) | {"train_data_dir": bare}
        given["resolution"] = f"{SIZE}x{2 * SIZE}"
        with pytest.raises(ValueError, match="`random_flip` needs the latents of mirrored images"):
            run(**given, random_flip=True)
        with pytest.raises(ValueError, match="24 of 24 images .* were cropped at the centre.*--center_crop"):
            run(**given)
        run(given=given, center_crop=True, max_train_steps=1)
        base = save_latent_base(tmp_path / "base")
        control = stored(made, pretrained_model_name_or_path=base, output_dir=str(tmp_path / "control"))
        control |= {"model_config_name_or_path": None}
        with pytest.raises(ValueError, match="`condition` 'low_resolution' is made from the pixels"):
            run("train_controlnet", **control, condition="low_resolution")
        with pytest.raises(ValueError, match="`conditioning_image_column` is 'image', but .* encoded with 'edges'"):
            run("train_controlnet", **control, conditioning_image_column="image")


class TestResumedWith:
    @pytest.fixture(scope="class")
    @staticmethod
    def begun(made, tmp_path_factory):
        folder = tmp_path_factory.mktemp("begun")
        patch = pytest.MonkeyPatch()
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(training_run, "plot_loss_curves", lambda *args: None)
        run(**in_loop(made, max_train_steps=1, output_dir=str(folder)))
        patch.undo()
        return folder / "checkpoint-1"

    def test_the_same_autoencoder_in_another_folder(self, made, begun, tmp_path):
        shutil.copytree(made / "vae", tmp_path / "copy")
        run(
            vae=str(tmp_path / "copy"),
            resume_from_checkpoint=str(begun),
            output_dir=str(tmp_path / "run"),
            max_train_steps=2,
        )
        assert (tmp_path / "run" / "checkpoint-2").is_dir()

    @pytest.mark.parametrize("config", [{"seed": 1}, {"scaling_factor": 0.5}])
    def test_another_one(self, made, begun, tmp_path, config):
        other = save_vae(tmp_path / "other", random_vae(**config))
        given = {"vae": other, "resume_from_checkpoint": str(begun), "output_dir": str(tmp_path / "run")}
        with pytest.raises(ValueError, match=r"hash of the frozen autoencoder is .*former autoencoder \(`vae`\)"):
            run(**given, max_train_steps=2)
        run(**given, max_train_steps=2, force_resume=True)
