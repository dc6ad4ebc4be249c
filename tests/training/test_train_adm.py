"""The training script as it is used: launched, killed with -9 and resumed, fine-tuning, recipes, wrong arguments."""

import hashlib
import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from processes import kill_distributed, run_distributed
from runs import (
    CONFIGS,
    EMOJI,
    accelerate_launch,
    assert_same_checkpoint,
    assert_same_state,
    flags,
    own_process_state,
    read_metrics,
    reset_accelerate,
)
from safetensors.torch import load_file
from scripts import REPOSITORY, load_script
from toy_models import CONDITIONAL, TOY_CONFIG, random_diffusers_unet, random_unet, toy_tokenizer

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.text import check_text_encoder
from diffusers_adm.training import (
    build_scheduler,
    build_text_encoder,
    build_unet,
    find_latest_checkpoint,
    load_text_encoder,
    load_tokenizer,
    load_unet_config,
    parse_args,
)
from diffusers_adm.training import run as training_run


# Those that train with what a clone holds. (Upsamplers, inpainters and ControlNets: test_train_super_resolution.py,
# test_train_adm_inpaint.py, test_train_controlnet.py; small.yaml has no data: test_own_images.py.)
RECIPES = sorted(
    path
    for path in CONFIGS.glob("*.yaml")
    if not path.name.startswith(("accelerate_", "autoencoder_", "classifier_", "clip_", "noto_to_", "prior_"))
    and not path.stem.endswith(("_inpaint", "_upsampler", "_edges", "_popular", "_colorize", "small"))
)


train_adm = load_script("train_adm")


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with own_process_state("train_adm"):
        yield


def train(**arguments):
    """One run in this process."""
    reset_accelerate()
    train_adm.main(flags(**arguments))


def write_model_config(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps({"dropout": 0.1, **TOY_CONFIG, **changes}))
    return str(path)


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps on the embedded emoji."""
    return {
        "model_config_name_or_path": write_model_config(tmp_path),
        "data_files": EMOJI,
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 2,
        "train_batch_size": 4,
        "lr_warmup_steps": 0,
        "logging_steps": 1,
        "num_validation_images": 2,
        "validation_num_inference_steps": 2,
        "report_to": "none",
    }


def fine_tuning(arguments, folder):
    return {k: v for k, v in arguments.items() if k != "model_config_name_or_path"} | {
        "pretrained_model_name_or_path": str(folder)
    }


def save_pipeline(folder, unet, id2label=None, **scheduler):
    ADMPipeline(
        unet=unet,
        scheduler=LearnedVarianceDDPMScheduler(**scheduler),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        classifier=None,
        id2label=id2label,
    ).save_pretrained(folder)
    return folder


def saved_weights(folder):
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_run(first, second, step):
    """The checkpoints of `step` (weights, optimizer, learning rate, sampler, EMA), the metrics and the result."""
    assert_same_checkpoint(*(Path(folder) / f"checkpoint-{step}" for folder in (first, second)))
    assert read_metrics(first) == read_metrics(second)
    assert_same_state(saved_weights(first), saved_weights(second))
    grids = [(Path(folder) / f"samples-{step:07d}.png").read_bytes() for folder in (first, second)]
    assert grids[0] == grids[1]


# 1. Two processes, started by `accelerate launch`, on a folder as people have it


LAUNCHED = {
    "label_column": "label",
    "resolution": 8,
    "random_flip": True,
    "dataloader_num_workers": 1,
    "ddpm_num_steps": 4,  # few, so that the loss-second-moment sampler has seen each often enough to use its history
    "ddpm_beta_schedule": "cosine",
    "timestep_sampler": "loss-second-moment",
    # 25 usable images are 3 batches of 4 for each process: 2 optimizer steps an epoch, the second of one batch.
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 11,
    "checkpointing_steps": 3,  # in the middle of an epoch, or at its end, and of a row of the metrics
    "logging_steps": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 4,
    "validation_steps": 5,
    "num_validation_images": 6,
    "validation_num_inference_steps": 2,
    "validation_guidance_scale": 2.0,
}


def write_messy_folder(root):
    generator = np.random.default_rng(0)

    def noise(*shape):
        return generator.integers(0, 256, shape, dtype=np.uint8)

    for name in ("blue", "red"):
        (root / name).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(noise(12, 14, 3)).save(root / name / f"{index}.png")
    Image.fromarray(noise(8, 9)).save(root / "red" / "grey.png")
    Image.fromarray(noise(8, 9, 4)).save(root / "red" / "rgba.png")
    Image.fromarray(noise(8, 9)).convert("1").save(root / "blue" / "black_and_white.png")
    Image.fromarray(noise(8, 9, 3)).convert("P").save(root / "blue" / "palette.png")
    Image.fromarray(noise(8, 9, 3)).save(root / "in_the_root.png")
    Image.new("RGB", (1, 1)).save(root / "blue" / "tiny.png")
    (root / "blue" / "text.png").write_text("not a picture")
    whole = (root / "red" / "0.png").read_bytes()
    (root / "red" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    return str(root)


PUSHED = {"push_to_hub": True, "hub_model_id": "alice/launched", "hub_private_repo": True}


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def launched(hub, tmp_path_factory):
    """The finished run, what it printed, and its arguments besides those of the push at its end."""
    folder = tmp_path_factory.mktemp("launched")
    arguments = LAUNCHED | {
        "model_config_name_or_path": write_model_config(folder),
        "train_data_dir": write_messy_folder(folder / "images"),
        "output_dir": str(folder / "run"),
    }
    pushed = PUSHED | {"hub_token": "token-of-alice"}
    output = accelerate_launch("train_adm", arguments | pushed, folder, hub.environment(folder / "cache"))
    return folder / "run", output, arguments


class TestLaunched:
    def test_what_it_prints(self, launched):
        folder, output, _ = launched
        assert "Num processes: 2" in output
        assert output.count("Machine: ") == 1
        assert "25 images in 2 classes at 8 x 8, 16 per optimizer step; steps 0 to 11, 2 an epoch" in output
        assert output.count("3 of 28 images are left out: 2 unreadable, 1 too small.") == 1  # on one process
        assert "1 of the remaining images have no label and stay unlabelled." in output
        assert "11/11" in output
        assert re.search(r"loss=\d\.\d{4}, images_per_s=\d+\.\d", output)
        assert f"Saved the pipeline to {folder}" in output
        for noise in ("Traceback", "Warning:", "accelerate.checkpointing"):
            assert noise not in output

    def test_skipped_images_are_reported(self, launched):
        lines = (launched[0] / "skipped_images.txt").read_text().splitlines()
        skipped = {Path(name).name: reason for reason, name, _ in (line.split("\t") for line in lines)}
        assert skipped == {"text.png": "unreadable", "truncated.png": "unreadable", "tiny.png": "too small"}

    def test_metrics_and_pictures(self, launched):
        folder = launched[0]
        rows = read_metrics(folder, without=())
        assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9, 10, 11]
        assert all({"loss", "mse", "vb", "lr", "images_per_second"} <= set(row) for row in rows)
        assert {f"loss_q{quarter}" for quarter in range(4)} <= set().union(*rows)
        assert all(np.isfinite(value) for row in rows for value in row.values())
        with Image.open(folder / "loss_curves.png") as curves:
            curves.load()
            assert min(curves.size) > 400
        assert sorted(path.name for path in folder.glob("samples-*.png")) == [
            f"samples-{step:07d}.png" for step in (5, 10, 11)
        ]
        with Image.open(folder / "samples-0000011.png") as grid:
            grid.load()
            # Two classes in rows of three; 8 pixels, enlarged to 64; room for the labels to the left.
            assert grid.size[1] == 2 * 66 + 2
            assert grid.size[0] > 3 * 66 + 2

    def test_tensorboard(self, launched):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(launched[0] / "logs" / "train")).Reload()
        rows = read_metrics(launched[0], without=())
        for name in ("loss", "mse", "vb", "lr"):
            logged = {event.step: event.value for event in events.Scalars(f"train/{name}")}
            assert logged == pytest.approx({row["step"]: row[name] for row in rows}, rel=1e-6)
        assert [image.step for image in events.Images("samples")] == [5, 10, 11]

    @pytest.mark.parametrize("pipeline_class", [ADMPipeline, DiffusionPipeline])
    def test_the_pipeline_loads_and_samples(self, launched, pipeline_class):
        pipeline = pipeline_class.from_pretrained(launched[0])
        assert isinstance(pipeline, ADMPipeline)
        assert isinstance(pipeline.unet, AdaGNUNet2DModel)
        assert pipeline.unet.config.num_class_embeds == 3
        assert pipeline.unet.config.null_class_id == 2
        assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
        assert pipeline.id2label == {0: "blue", 1: "red"}
        images = pipeline(class_labels=[0, 1], num_inference_steps=2, guidance_scale=2.0).images
        assert [image.size for image in images] == [(8, 8)] * 2

    def test_the_result_is_the_average(self, launched):
        weights = saved_weights(launched[0])
        trained = load_file(launched[0] / "checkpoint-11" / "model.safetensors")
        names = [name for name in trained if not torch.equal(trained[name], weights[name])]
        assert len(names) > len(trained) / 2

    def test_its_arguments_read_back_as_a_recipe(self, launched):
        folder, _, arguments = launched
        direct = parse_args(train_adm.ARGUMENT_TYPES, flags(**arguments, **PUSHED))
        assert parse_args(train_adm.ARGUMENT_TYPES, ["--config", str(folder / "train_args.yaml")]) == direct

    def test_the_result_is_on_the_hub(self, launched, hub):
        folder, output, _ = launched
        assert hub.repositories["alice/launched"].private
        assert f"Pushed the result: {hub.endpoint}/alice/launched/commit/{hub.commit('alice/launched')}" in output
        files = hub.files("alice/launched")
        for name in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
            assert files[name] == (folder / name).read_bytes()
        assert files["images/samples.png"] == (folder / "samples-0000011.png").read_bytes()
        assert not [name for name in files if "checkpoint" in name or name.startswith("logs")]
        card = ModelCard(files["README.md"].decode())
        assert "lr_warmup_steps: 4" in card.text
        assert "hub_model_id" not in card.text  # others are not to push there
        assert card.data.pipeline_tag == "unconditional-image-generation"

    def test_neither_token_nor_paths_get_out(self, launched, hub):
        folder, output, _ = launched
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert any("tfevents" in path.name for path in kept)
        for content in (output.encode(), *kept.values(), *hub.files("alice/launched").values()):
            assert b"token-of-alice" not in content
        for name, content in hub.files("alice/launched").items():
            assert str(folder.parent).encode() not in content, name

    @pytest.mark.slow
    def test_killed_and_resumed_it_ends_bit_by_bit_the_same(self, launched, tmp_path):
        folder, _, arguments = launched
        arguments = arguments | {"output_dir": str(tmp_path / "run")}
        # Anywhere in the steps that follow the first checkpoint; at 0.2 seconds a batch they take some three seconds.
        kill_distributed(
            train_slowly,
            flags(**arguments),
            once=lambda: find_latest_checkpoint(tmp_path / "run") is not None,
            within=1.5,
        )
        assert not (tmp_path / "run" / "model_index.json").exists()

        states = run_distributed(train_and_fingerprint, flags(**arguments, resume_from_checkpoint="latest"))
        assert_same_run(folder, tmp_path / "run", 11)
        # Parameters, average and sampler history are the same on both, though each saw other images and noise.
        assert states[0] == states[1]

    def test_resuming_with_other_batches(self, launched, tmp_path, caplog):
        """One process in place of two, and fewer batches in an epoch than the checkpoint has consumed of one."""
        folder, _, arguments = launched
        changes = {"output_dir": str(tmp_path), "train_batch_size": 16, "max_train_steps": 4, "report_to": "none"}
        changes["force_resume"] = True
        checkpoint = str(folder / "checkpoint-3")
        train(**arguments | changes | {"resume_from_checkpoint": checkpoint, "dataloader_num_workers": 0})
        assert "was written by 2 processes and is resumed by 1" in caplog.text
        assert [row["step"] for row in read_metrics(tmp_path)] == [4]


def fork_workers():
    """As in a launched run; children of the fork server start theirs by it as well, with all imports in each epoch."""
    multiprocessing.set_start_method("fork", force=True)


def train_slowly(argv):
    """The whole run, in a process group of its own, so that its workers are killed with it."""
    os.setsid()
    fork_workers()
    seed_step = training_run.seed_step

    def slow_seed_step(*arguments):
        time.sleep(0.2)
        seed_step(*arguments)

    training_run.seed_step = slow_seed_step
    train_adm.main(argv)


def train_and_fingerprint(argv):
    """A hash of everything that must be equal on all processes, taken when the last checkpoint is written."""
    fork_workers()
    hashes, runs = [], []
    save_checkpoint, prepare = training_run.save_checkpoint, training_run.TrainingRun._resume

    def keep(run, *arguments):
        runs.append(run)
        prepare(run, *arguments)

    training_run.TrainingRun._resume = keep

    def hash_and_save(accelerator, *arguments):
        tensors = list(accelerator.unwrap_model(accelerator._models[0]).parameters())
        tensors += runs[-1].ema.shadow_params
        for registered in accelerator._custom_objects:
            state = registered.state_dict()
            tensors += [x for value in state.values() for x in (value if isinstance(value, list) else [value])]
        digest = hashlib.sha256()
        for value in tensors:
            digest.update(value.detach().numpy().tobytes() if torch.is_tensor(value) else repr(value).encode())
        hashes.append(digest.hexdigest())
        return save_checkpoint(accelerator, *arguments)

    training_run.save_checkpoint = hash_and_save
    train_adm.main(argv)
    return hashes


# 2. One process


class TestSingleProcess:
    def test_a_run_that_failed_is_resumed_exactly(self, short, monkeypatch, caplog):
        arguments = short | {
            "max_train_steps": 9,
            "train_batch_size": 32,  # 5 batches an epoch
            "checkpointing_steps": 3,
            "checkpoints_total_limit": 2,
            "logging_steps": 2,
            "lr_scheduler": "linear",
            "lr_warmup_steps": 2,
            "resolution": 16,
            "use_ema": False,
            "report_to": "tensorboard",
        }
        folder, other = short["output_dir"], short["output_dir"] + "-resumed"
        train(**arguments)
        assert sorted(path.name for path in Path(folder).glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]

        seed_step = training_run.seed_step

        def fail_after_step_8(seed, process_index, micro_step):
            if micro_step == 8:
                raise RuntimeError("the machine is gone")
            seed_step(seed, process_index, micro_step)

        monkeypatch.setattr(training_run, "seed_step", fail_after_step_8)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(**arguments | {"output_dir": other})
        monkeypatch.setattr(training_run, "seed_step", seed_step)
        caplog.clear()
        train(**arguments | {"output_dir": other, "resume_from_checkpoint": "latest"})
        assert "steps 6 to 9" in caplog.text
        assert_same_run(folder, other, 9)

        # Step 8 is in the files of both starts; TensorBoard shows it once.
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(Path(other, "logs", "train"))).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [2, 3, 4, 6, 8, 9]

    def test_a_new_run_in_the_folder_of_an_old_one(self, short):
        train(**short, max_train_samples=20)
        record = Path(short["output_dir"], "train_args.yaml").read_text(encoding="utf-8")
        with pytest.raises(ValueError, match="holds checkpoint-2 of another run"):
            train(**short, max_train_samples=24)
        assert Path(short["output_dir"], "train_args.yaml").read_text(encoding="utf-8") == record
        train(**short | {"max_train_steps": 1}, overwrite_output_dir=True)
        assert [path.name for path in Path(short["output_dir"]).glob("checkpoint-*")] == ["checkpoint-1"]
        assert [row["step"] for row in read_metrics(short["output_dir"])] == [1]

    def test_fixed_variance_and_the_simple_objective(self, short, tmp_path):
        config = write_model_config(tmp_path, out_channels=3)
        train(
            **short | {"model_config_name_or_path": config, "objective": "simple", "variance_type": "fixed_small"},
            snr_gamma=5.0,
            max_train_samples=20,
        )
        assert all("mse" in row and "vb" not in row for row in read_metrics(short["output_dir"]))
        pipeline = ADMPipeline.from_pretrained(short["output_dir"])
        assert pipeline.scheduler.config.variance_type == "fixed_small"
        assert pipeline.unet.config.num_class_embeds is None
        assert pipeline.unet.config.sample_size == 8
        assert pipeline.id2label is None

    def test_vlb_in_bfloat16_channels_last_with_checkpointed_gradients(self, short):
        train(
            **short | {"logging_steps": 2},
            label_column="label",
            objective="vlb",
            mixed_precision="bf16",
            channels_last=True,
            gradient_checkpointing=True,
        )
        row = read_metrics(short["output_dir"])[0]
        assert row["loss"] == pytest.approx(row["vb"])
        pipeline = ADMPipeline.from_pretrained(short["output_dir"])
        assert pipeline.unet.dtype == torch.float32  # mixed precision concerns the arithmetic
        assert pipeline.unet.config.num_class_embeds == 10

    def test_a_loss_that_is_not_finite_ends_the_run(self, short):
        with pytest.raises(RuntimeError, match=r"The loss of step 3 is not finite; .* 2 steps in a row were skipped"):
            train(**short | {"learning_rate": 1e30, "max_train_steps": 9, "max_skipped_steps": 2})


class TestFineTuning:
    # So small that float32 weights do not change: the result equals the pretrained weights.
    STILL = {"learning_rate": 1e-12, "resolution": 8}

    def test_unconditional(self, short, tmp_path):
        unet = random_unet()
        folder = save_pipeline(tmp_path / "base", unet, num_train_timesteps=100, beta_schedule="scaled_linear")
        train(**fine_tuning(short, folder) | self.STILL, beta_end=0.01)
        for name, weight in saved_weights(short["output_dir"]).items():
            assert torch.allclose(weight, unet.state_dict()[name], atol=1e-6), name
        scheduler = ADMPipeline.from_pretrained(short["output_dir"]).scheduler
        assert scheduler.config.num_train_timesteps == 100  # as saved
        assert scheduler.config.beta_schedule == "scaled_linear"
        assert scheduler.config.beta_end == 0.01  # as given

    def test_class_conditional_at_another_resolution(self, short, tmp_path):
        unet = random_unet(num_class_embeds=10, null_class_id=9)
        folder = save_pipeline(tmp_path / "base", unet)
        train(**fine_tuning(short, folder) | self.STILL | {"resolution": 16}, label_column="label")
        assert torch.allclose(
            saved_weights(short["output_dir"])["class_embedding.weight"], unet.class_embedding.weight, atol=1e-6
        )
        pipeline = ADMPipeline.from_pretrained(short["output_dir"])
        assert pipeline.unet.config.sample_size == 16
        assert len(pipeline.id2label) == 9
        assert pipeline(class_labels=3, num_inference_steps=2).images[0].size == (16, 16)

    def test_half_precision_weights_are_trained_in_float32(self, short, tmp_path):
        folder = save_pipeline(tmp_path / "base", random_unet().half())
        train(**fine_tuning(short, folder) | self.STILL)
        assert {weight.dtype for weight in saved_weights(short["output_dir"]).values()} == {torch.float32}

    def test_a_pipeline_of_diffusers(self, short, tmp_path):
        unet = random_diffusers_unet(out_channels=3)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "base")
        train(**fine_tuning(short, tmp_path / "base") | self.STILL, objective="simple")
        for name, weight in saved_weights(short["output_dir"]).items():
            assert torch.allclose(weight, unet.state_dict()[name], atol=1e-6), name

    def test_a_repository_without_subfolders(self, short, tmp_path):
        """Like google/ddpm-cifar10-32."""
        unet = random_diffusers_unet(out_channels=3)
        unet.save_pretrained(tmp_path / "base")
        DDPMScheduler(num_train_timesteps=200).save_pretrained(tmp_path / "base")
        train(**fine_tuning(short, tmp_path / "base") | self.STILL, objective="simple")
        for name, weight in saved_weights(short["output_dir"]).items():
            assert torch.allclose(weight, unet.state_dict()[name], atol=1e-6), name
        assert ADMPipeline.from_pretrained(short["output_dir"]).scheduler.config.num_train_timesteps == 200


# 3. Recipes


class TestRecipes:
    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
    def test_each_parses_and_its_model_builds(self, recipe, monkeypatch):
        monkeypatch.chdir(REPOSITORY)  # their paths are relative to it
        model, data, diffusion, _, text, *_ = parse_args(train_adm.ARGUMENT_TYPES, ["--config", str(recipe)])
        scheduler = build_scheduler(model, data, diffusion)
        config, _ = load_unet_config(model, data, scheduler)
        with torch.device("meta"):
            unet = build_unet(model, data, config, 9 if data.label_column else None)
        assert (data.resolution or unet.config.sample_size) % 2 ** (len(unet.config.block_out_channels) - 1) == 0
        for path in data.data_files or []:
            assert Path(path).is_file()
        assert (text.caption_column is not None) == unet.has_cross_attention
        if (
            unet.has_cross_attention and model.pretrained_model_name_or_path is None
        ):  # else it brings its text encoder along
            tokenizer, name = toy_tokenizer("clip"), text.text_encoder_name_or_path
            if name is not None:
                text_encoder = load_text_encoder("text_encoder_name_or_path", name, trained=True)
                tokenizer = load_tokenizer("text_encoder_name_or_path", name)
            else:
                text_encoder = build_text_encoder(text.text_encoder_config_name_or_path, tokenizer, 0)
            check_text_encoder(text_encoder, tokenizer, unet.config)

    def test_the_command_line_wins(self):
        recipe = ["--config", str(CONFIGS / "emoji_32.yaml")]
        given = yaml.safe_load((CONFIGS / "emoji_32.yaml").read_text())
        plain, changed = (
            parse_args(train_adm.ARGUMENT_TYPES, words) for words in (recipe, [*recipe, "--max_train_steps", "7"])
        )
        assert plain[3].max_train_steps == given["max_train_steps"]
        assert changed[3].max_train_steps == 7
        assert vars(changed[3]) == vars(plain[3]) | {"max_train_steps": 7}
        assert changed[:3] == plain[:3]

    def test_unknown_keys_are_refused(self, tmp_path):
        (tmp_path / "recipe.yaml").write_text("learning_rat: 1e-4\n")
        with pytest.raises(ValueError, match="unknown key 'learning_rat'. Did you mean `learning_rate`"):
            train_adm.main(["--config", str(tmp_path / "recipe.yaml")])


# 4. What is refused, and when: before the first step


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("training began")

    monkeypatch.setattr(train_adm, "training_losses", fail)


@pytest.mark.usefixtures("no_training")
class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"pretrained_model_name_or_path": "some/where"}, "Pass either `--model_config_name_or_path`"),
            ({"train_batch_size": 0}, "`train_batch_size` is 0; it must be at least 1"),
            ({"max_train_steps": 0}, "`max_train_steps` is 0; it must be at least 1"),
            ({"checkpoints_total_limit": 0}, "`checkpoints_total_limit` is 0"),
            ({"ddpm_num_steps": 0}, "`ddpm_num_steps` is 0"),
            ({"resolution": 0}, "`resolution` is .0.; pass the side of a square"),
            ({"lr_warmup_steps": -1}, "`lr_warmup_steps` is -1; it must be at least 0"),
            ({"learning_rate": 0}, "`learning_rate` is 0.0; it must be positive"),
            ({"max_grad_norm": 0}, "`max_grad_norm` is 0.0; it must be positive"),
            ({"ema_max_decay": 1.0}, "`ema_max_decay` is 1.0; it must lie in"),
            ({"class_dropout_prob": 1.5}, "`class_dropout_prob` is 1.5; it must lie in"),
            ({"variance_type": "fixed_small"}, "objective='hybrid'.*Pass `objective='simple'`"),
            ({"objective": "vlb", "snr_gamma": 5.0}, "`snr_gamma` weights the squared error"),
            (
                {"variance_type": "fixed_small", "objective": "simple"},
                "has 6 output channels.*3 channels and `variance_type` 'fixed_small' need 3 output",
            ),
            ({"ddpm_num_steps": 1}, "`validation_num_inference_steps` is 2; the noise schedule .* allows 1 at most"),
            ({"resolution": 9}, "The resolution is 9; .* divisible by 2. Pass e.g. `--resolution 10`"),
            ({"train_batch_size": 164}, "There are 163 usable images, but one step takes 164"),
            ({"min_image_size": 100}, "None of the 163 images can be used: 163 too small"),
            (
                {"validation_guidance_scale": 2.0},
                "and a `caption_column` there is no condition to guide",
            ),
            ({"label_column": "category"}, "`label_column` is 'category', but .* has the columns image, text, label"),
            ({"image_column": "picture"}, "`image_column` is 'picture', but .* has the columns image, text, label"),
            ({"train_data_dir": "pictures"}, "Got `train_data_dir` and `data_files`"),
            (
                {"label_column": "label", "class_dropout_prob": 0, "validation_guidance_scale": 2.0},
                "`validation_guidance_scale` is 2.0, but the U-Net has no null class",
            ),
            (
                {"resume_from_checkpoint": "checkpoint-7"},
                "`resume_from_checkpoint` is 'checkpoint-7', which is neither",
            ),
            ({"model_config_name_or_path": "no/such/file.json"}, "`model_config_name_or_path` is 'no/such/file.json'"),
        ],
    )
    def test_arguments(self, short, changes, message):
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    @pytest.mark.parametrize(
        ("name", "value"), [("ddpm_beta_schedule", "cosinus"), ("variance_type", "learned"), ("prediction_type", "x0")]
    )
    def test_unknown_words_on_the_command_line(self, short, name, value, capsys):
        with pytest.raises(SystemExit):
            train(**short | {name: value})
        assert re.search(rf"argument --{name}/.*: invalid choice: '{value}' \(choose from", capsys.readouterr().err)

    def test_no_model_and_no_data(self, short):
        for name, message in (
            ("model_config_name_or_path", "Pass either `--model_config_name_or_path`"),
            ("data_files", "Got no data source"),
        ):
            with pytest.raises(ValueError, match=message):
                train(**{k: v for k, v in short.items() if k != name})

    @pytest.mark.parametrize(
        ("config", "changes", "message"),
        [
            (
                {"out_channels": 3},
                {},
                "has 3 output channels. .*3 channels and `variance_type` 'learned_range' need 6",
            ),
            ({"in_channels": 6}, {}, "takes 6 .*script trains U-Nets of 3.*Those of 6 are trained by train_super_res"),
            ({"in_channels": 1, "out_channels": 2}, {}, r"The network has 1 channel.*RGB images.*`--image_mode L`"),
            ({"num_class_embeds": 9}, {}, "class-conditional .9 classes, no null class.. Pass `label_column`"),
            (
                {"num_class_embeds": 9},
                {"label_column": "label"},
                "`class_dropout_prob` is 0.1, but the U-Net has no null",
            ),
            (CONDITIONAL, {"label_column": "label"}, "The data has 9 classes, but the U-Net has room for 4"),
            ({"sample_size": None}, {}, "no `sample_size`, so the resolution is not known. Pass `--resol"),
            ({"block_out_channel": [8, 16]}, {}, "'block_out_channel'.*Did you mean `block_out_channels`"),
        ],
    )
    def test_models(self, short, tmp_path, config, changes, message):
        short["model_config_name_or_path"] = write_model_config(tmp_path, **config)
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    def test_pretrained_models(self, short, tmp_path):
        with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is .*is no file or folder here and"):
            train(**fine_tuning(short, tmp_path / "nowhere"))
        folder = save_pipeline(tmp_path / "base", random_unet(class_embed_type="timestep"))
        with pytest.raises(ValueError, match=r"no table of classes \(`class_embed_type` 'timestep'\)"):
            train(**fine_tuning(short, folder), label_column="label")
