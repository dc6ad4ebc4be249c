"""Resuming a run with other arguments or data: what is applied, what is refused, and the content of checkpoints."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from runs import (
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    flags,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
)
from safetensors.torch import load_file
from scripts import REPOSITORY, load_script
from tiny_autoencoders import random_vae, save_vae
from toy_clips import TOY_CLIP_CONFIG, save_clip
from toy_embeddings import save_embeddings, write_emoji_captions
from toy_models import TOY_AUTOENCODER_CONFIG, TOY_CLASSIFIER_CONFIG, TOY_CONFIG, random_text_unet, random_unet

from diffusers_adm import AdaGNClassifierModel, AdaGNControlNetModel, AdaGNUNet2DModel, ADMPipeline
from diffusers_adm.evaluation.sample.__main__ import main as sample
from diffusers_adm.training import autoencoders, check_effects, classifiers, clip, diffusion
from diffusers_adm.training import run as training_run
from diffusers_adm.training.arguments import APPLIED, FREE, NEVER, PROCESS, Verdict, resume_verdicts
from diffusers_adm.training.manifest import write_manifest
from diffusers_adm.training.resume import OF_ONE_START, apply_arguments, parse_run
from diffusers_adm.training.run_state import read_state


NAMES = (
    "train_adm",
    "train_autoencoder",
    "train_classifier",
    "train_clip",
    "train_controlnet",
    "train_image_to_image",
    "train_prior",
    "train_super_resolution",
)
SCRIPTS = {name: load_script(name) for name in NAMES}
WEIGHTS = "diffusion_pytorch_model.safetensors"
PREVIOUS = Path("tests", "training", "data", "previous_version")  # as its record has it: relative to the repository

VERDICTS = {}
for script in SCRIPTS.values():
    VERDICTS |= resume_verdicts(script.ARGUMENT_TYPES)
ALL_ARGUMENTS = {
    name: [f.name for types in script.ARGUMENT_TYPES for f in dataclasses.fields(types)]
    for name, script in SCRIPTS.items()
}


def with_verdict(*verdicts):
    return [
        pytest.param(script, name, id=f"{script}-{name}")
        for script, arguments in ALL_ARGUMENTS.items()
        for name in arguments
        if VERDICTS[name] in verdicts
    ]


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # Slow, and tested elsewhere.
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)
    monkeypatch.setattr(SCRIPTS["train_classifier"], "plot_classifier_curves", lambda *args: None)
    monkeypatch.setattr(SCRIPTS["train_prior"], "plot_loss_curves", lambda *args: None)
    monkeypatch.setattr(SCRIPTS["train_clip"], "plot_loss_curves", lambda *args: None)
    with own_process_state("train_adm"):
        yield


def run(name, **arguments):
    reset_accelerate()
    try:
        SCRIPTS[name].main(flags(**arguments))
    finally:
        logging.getLogger(name).setLevel(logging.NOTSET)


def parse(name, **arguments):
    return parse_run(SCRIPTS[name].ARGUMENT_TYPES, flags(**arguments), name)


def values_of(all_args):
    return {name: value for arguments in all_args for name, value in vars(arguments).items()}


def write_json(path, config, **changes):
    path.write_text(json.dumps({**config, **changes}))
    return str(path)


def weights(folder, component="unet"):
    return load_file(Path(folder, component, WEIGHTS))


# 1. All arguments of all scripts


def test_every_argument_has_a_verdict():
    for script in SCRIPTS.values():
        for types in script.ARGUMENT_TYPES:
            for field in dataclasses.fields(types):
                assert isinstance(field.metadata["resume"], Verdict), field.name
                assert field.metadata["resume"] is VERDICTS[field.name], f"{field.name} differs between scripts"
    assert set(VERDICTS.values()) == set(Verdict)


def test_the_page_names_what_is_applied_and_what_is_never_loaded():
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8").replace("`adam_*`", "`adam_beta1`")
    names = {name for name, verdict in VERDICTS.items() if verdict in (APPLIED, NEVER)}
    assert {name for name in names if f"`{name}`" not in page} <= {"adam_beta2", "adam_weight_decay", "adam_epsilon"}


# 2. One short run of each script, whose checkpoint the tests below resume


TOY_PRIOR = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
TOY_RUN = SHORT_RUN | {
    "train_batch_size": 4,
    "max_train_samples": 8,  # two batches an epoch
    "learning_rate": 1e-3,
    "num_validation_images": 1,
    "validation_num_inference_steps": 1,
    "ema_max_decay": 0.5,
    "data_files": EMOJI,
    "label_column": "label",
}


def write_embeddings(folder):
    """Embeddings of the CLIP in the folder."""
    data = write_emoji_captions(folder / "emoji.parquet", EMOJI, 12)
    return save_embeddings(folder / "embeddings", folder / "clip", data, random_flip=True)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Arguments of a run of two steps, by script."""
    folder = tmp_path_factory.mktemp("toys")
    classifier = {k: v for k, v in TOY_CLASSIFIER_CONFIG.items() if k != "num_classes"}
    base = save_base(folder / "base", random_unet(num_class_embeds=10, null_class_id=9))
    no_grids = ("num_validation_images", "validation_num_inference_steps")
    arguments = {
        "train_adm": TOY_RUN | {"model_config_name_or_path": write_json(folder / "unet.json", TOY_CONFIG)},
        "train_autoencoder": {k: v for k, v in TOY_RUN.items() if k != no_grids[1]}
        | {"model_config_name_or_path": write_json(folder / "autoencoder.json", TOY_AUTOENCODER_CONFIG)},
        "train_classifier": {k: v for k, v in TOY_RUN.items() if k not in no_grids}
        | {"model_config_name_or_path": write_json(folder / "classifier.json", classifier), "use_ema": True},
        "train_clip": {k: v for k, v in TOY_RUN.items() if k not in no_grids}
        | {"model_config_name_or_path": write_json(folder / "clip.json", TOY_CLIP_CONFIG)}
        | {"tokenizer_name_or_path": str(REPOSITORY / "spaces" / "model" / "base"), "caption_column": "text"},
        "train_controlnet": TOY_RUN | {"pretrained_model_name_or_path": base, "condition": "low_resolution"},
        "train_image_to_image": TOY_RUN
        | {"model_config_name_or_path": write_json(folder / "translator.json", TOY_CONFIG, in_channels=6)}
        | {"source": "low_resolution"},
        "train_prior": {k: v for k, v in TOY_RUN.items() if k not in (*no_grids, "data_files", "label_column")}
        | {"model_config_name_or_path": write_json(folder / "prior.json", TOY_PRIOR), "caption_column": "captions"}
        | {"clip": save_clip(folder / "clip"), "train_data_dir": write_embeddings(folder)},
        "train_super_resolution": TOY_RUN
        | {"model_config_name_or_path": write_json(folder / "upsampler.json", TOY_CONFIG, in_channels=6)}
        | {"low_res_size": 4, "max_noise_level": 0},
    }
    return {name: given | {"output_dir": str(folder / name)} for name, given in arguments.items()}


@pytest.fixture(scope="module")
def begun(toys):
    """The folder of the finished run, by script; made when first asked for."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ACCELERATE_USE_CPU", "true")
    done = {}

    def folder(name):
        if name not in done:
            run(name, **toys[name])
            done[name] = Path(toys[name]["output_dir"])
        return done[name]

    yield folder
    patch.undo()


def resumed(begun, tmp_path, name="train_adm", **changes):
    """One step more, in a folder of its own; the folder."""
    run(
        name,
        **{"max_train_steps": 3, "output_dir": str(tmp_path)} | changes,
        resume_from_checkpoint=str(begun(name) / "checkpoint-2"),
    )
    return tmp_path


# Another value for each argument, which no other argument contradicts.
OTHERS = {
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-3,
    "adam_weight_decay": 0.1,
    "allow_tf32": True,
    "beta_end": 0.03,
    "beta_start": 0.001,
    "cache_dir": "elsewhere",
    "caption_column": "words",
    "caption_dropout_prob": 0.7,
    "center_crop": True,
    "channels_last": True,
    "checkpointing_steps": 7,
    "checkpoints_total_limit": 3,
    "class_balanced": True,
    "class_dropout_prob": 0.7,
    "class_names": "elsewhere.txt",
    "clip_sample_range": 7.0,
    "compile": True,
    "condition": "edges",
    "condition_dropout_prob": 0.7,
    "condition_value_range": [0.0, 1.0],
    "conditioning_embedding_out_channels": [8, 8],
    "conditioning_image_column": "image",
    "controlnet_width": 0.5,
    "data_files": ["elsewhere.parquet"],
    "dataloader_num_workers": 1,
    "dataset_config_name": "other",
    "decoder_only": True,
    "discriminator_channels": 16,
    "discriminator_layers": 2,
    "discriminator_start": 0,
    "discriminator_weight": 0.7,
    "dataset_name": "somebody/else",
    "ddpm_beta_schedule": "scaled_linear",  # neither the default of images nor that of priors
    "ddpm_num_steps": 100,
    "dry_run": True,
    "ema_inv_gamma": 2.0,
    "ema_max_decay": 0.25,
    "ema_power": 0.5,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "hub_model_id": "alice/toy",
    "hub_private_repo": True,
    "hub_token": "token",
    "image_check_num_proc": 2,
    "image_embeds_column": "clip",
    "image_embeds_dropout_prob": 0.7,
    "image_embeds_in_time": False,
    "image_encoder_name_or_path": "elsewhere",
    "image_column": "picture",
    "image_mode": "array",
    "inpainting_layout": "glide",
    "keep_best": "validation_loss",
    "kl_weight": 0.5,
    "label_column": None,
    "learning_rate": 2e-3,
    "logging_dir": "elsewhere",
    "logging_steps": 2,
    "lora_alpha": 3.0,
    "lora_rank": 2,
    "lora_target_modules": ["conv1"],
    "low_res_size": 2,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 6,
    "max_grad_norm": 1e-9,
    "max_noise_level": 3,
    "max_skipped_steps": 3,
    "max_time": "1:00:00",
    "max_train_samples": 12,
    "max_train_steps": 4,
    "max_validation_samples": 3,
    "min_image_size": 7,
    "mixed_precision": "bf16",
    "no_check_images": True,
    "noised": False,
    "num_image_tokens": 2,
    "num_timestep_bins": 2,
    "num_train_epochs": 2,
    "num_validation_images": 2,
    "objective": "simple",
    "output_dir": "elsewhere",
    "pair_column": ["text"],
    "overwrite_output_dir": True,
    "perceptual_weight": 0.5,
    "power_ema_snapshot_steps": 1,
    "power_ema_stds": [0.05, 0.1],
    "precompute_text_embeddings": True,
    "prediction_type": "v_prediction",
    "preview_channels": [2],
    "push_to_hub": True,
    "random_color": 0.5,
    "random_flip": True,
    "random_rotation": 5.0,
    "random_shift": 0.5,
    "random_zoom": 0.5,
    "reconstruction_loss": "l2",
    "report_to": "tensorboard",
    "replace_classes": True,
    "resolution": 16,
    "rfid_network": "elsewhere",
    "seed": 5,
    "shuffle_buffer_size": 5,
    "snr_gamma": 5.0,
    "source": "noise",
    "source_column": "picture",
    "source_data_dir": "elsewhere",
    "source_data_files": ["elsewhere.parquet"],
    "source_dropout_prob": 0.7,
    "source_mode": "RGB",
    "source_value_range": [0.0, 1.0],
    "split": "test",
    "standardize_channels": True,
    "streaming": True,
    "task": "inpaint",
    "text_conditioning": "clip",
    "timestep_bias_begin": 1,
    "timestep_bias_end": 3,
    "timestep_bias_multiplier": 2.0,
    "timestep_bias_portion": 0.5,
    "timestep_bias_strategy": "later",
    "timestep_sampler": "loss-second-moment",
    "tracker_project_name": "emoji",
    "train_batch_size": 2,
    "train_data_dir": "elsewhere",
    "train_text_encoder": True,
    "use_ema": False,
    "validation_bits_per_dim": 2,
    "validation_candidates": 3,
    "validation_caption_column": "words",
    "validation_data_dir": "elsewhere",
    "validation_data_files": [EMOJI],
    "validation_frechet_network": "elsewhere",
    "validation_frechet_samples": 3,
    "validation_guidance_scale": 2.0,
    "validation_num_inference_steps": 2,
    "validation_prompts": ["a cat"],
    "validation_source_data_files": [EMOJI],
    "validation_split": "test",
    "validation_steps": 3,
    "value_range": [0.0, 100.0],
    "variance_type": "learned_log",
    "variant_pattern": "tone$",
    "zero_shot_template": "a {}",
}
# Further arguments that an argument needs.
NEEDED = {
    "caption_column": {},
    "keep_best": {"validation_steps": 3},
    "validation_bits_per_dim": {"validation_split": "test"},
    "validation_frechet_network": {"validation_split": "test"},
    "validation_frechet_samples": {"validation_split": "test", "validation_frechet_network": "elsewhere"},
    "hub_model_id": {"push_to_hub": True},
    "hub_private_repo": {"push_to_hub": True},
    "hub_token": {"push_to_hub": True},
    "inpainting_layout": {"task": "inpaint"},
    "lora_alpha": {"lora_rank": 2},
    "lora_target_modules": {"lora_rank": 2},
    "max_validation_samples": {"validation_split": "test"},
    "pair_column": {"source_data_files": EMOJI},
    "source_mode": {"source_column": "picture"},
    "source_value_range": {"source_column": "picture"},
    "timestep_bias_begin": {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2.0},
    "timestep_bias_end": {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2.0},
    "timestep_bias_multiplier": {"timestep_bias_strategy": "later"},
    "timestep_bias_portion": {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0},
    "timestep_bias_strategy": {"timestep_bias_multiplier": 2.0},
    ("train_prior", "validation_caption_column"): {"validation_data_dir": "elsewhere"},
    ("train_prior", "max_validation_samples"): {"validation_data_dir": "elsewhere"},
}


def needed(script, name):
    return NEEDED.get((script, name), NEEDED.get(name, {}))


# Arguments that this script always refuses.
REFUSED_ANYWAY = {
    ("train_controlnet", name) for name in ("ddpm_num_steps", "ddpm_beta_schedule", "beta_start", "beta_end")
}
REFUSED_ANYWAY |= {("train_prior", name) for name in ("beta_start", "beta_end")}
REFUSED_ANYWAY |= {("train_controlnet", name) for name in ("prediction_type", "variance_type", "train_text_encoder")}


@pytest.mark.parametrize(("script", "name"), with_verdict(FREE))
def test_free_arguments_are_used(begun, script, name):
    needs_others = ("precompute_text_embeddings", "validation_prompts", "validation_source_data_files")
    if name in (*OF_ONE_START, *needs_others, "power_ema_snapshot_steps"):
        return  # of one start; the others need captions, see below, other pairs of images, or test_power_ema.py
    changes = {name: OTHERS[name], "resume_from_checkpoint": str(begun(script) / "checkpoint-2"), "max_train_steps": 3}
    all_args, record = parse(script, **needed(script, name) | changes)
    assert values_of(all_args)[name] == OTHERS[name]
    assert not record.forced


@pytest.mark.parametrize(("script", "name"), with_verdict(PROCESS))
def test_another_process_is_refused_by_name(begun, tmp_path, script, name):
    before = yaml.safe_load((begun(script) / "train_args.yaml").read_text())
    changes = needed(script, name) | {name: OTHERS[name], "max_train_steps": 3, "output_dir": str(tmp_path)}
    changes["resume_from_checkpoint"] = str(begun(script) / "checkpoint-2")
    if (script, name) in REFUSED_ANYWAY:
        with pytest.raises(ValueError, match=f"drop .*`{name}`"):
            run(script, **changes)
        return
    with pytest.raises(ValueError, match=f"`{name}` is .*, and was .* for checkpoint-2.*`--force_resume`") as caught:
        run(script, **changes)
    assert f"--{name} " in str(caught.value) or before["pretrained_model_name_or_path"] is not None
    assert not list(tmp_path.iterdir())  # before data or a folder of the run


@pytest.mark.parametrize(("script", "name"), with_verdict(NEVER))
def test_what_could_not_be_loaded_is_refused_even_if_forced(begun, tmp_path, script, name):
    if name == "lora_target_modules" or (script, name) in REFUSED_ANYWAY:
        return  # compared once the layers are known, see test_train_adm_lora.py
    changes = {name: OTHERS[name], "max_train_steps": 3, "output_dir": str(tmp_path), "force_resume": True}
    with pytest.raises(ValueError, match=f"`{name}` is .*, and was .*checkpoint-2, which cannot be loaded otherwise"):
        run(
            script,
            **needed(script, name) | changes,
            resume_from_checkpoint=str(begun(script) / "checkpoint-2"),
        )
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_is_compared_by_its_content(begun, tmp_path):
    """More in test_train_latents.py."""
    vae = save_vae(tmp_path / "vae", random_vae(latent_channels=3))
    with pytest.raises(ValueError, match="hash of the frozen autoencoder is '.*', and was None for checkpoint-2"):
        resumed(begun, tmp_path / "run", vae=vae, resolution=8)


# 3. Applied arguments


@pytest.fixture(scope="module")
def unchanged(begun, tmp_path_factory):
    return resumed(begun, tmp_path_factory.mktemp("unchanged"))


def moments(folder, step=3):
    (state,) = read_state(Path(folder, f"checkpoint-{step}"), "run_state")["optimizers"]
    names = [name for name, _ in AdaGNUNet2DModel.from_pretrained(folder, subfolder="unet").named_parameters()]
    return {name: state["state"][index] for index, name in enumerate(names)}, state["param_groups"][0]


def trained(folder, step):
    return load_file(Path(folder, f"checkpoint-{step}", "model.safetensors"))


# A product and a sum of float32 numbers, of the same run.
CLOSE = {"rtol": 1e-4, "atol": 1e-7}


def assert_mostly_close(first, second, rtol, atol):
    """
    Of two runs: where a gradient is 0 but for its last bits, which are not the same for every allocation of memory,
    Adam's step goes either way.
    """
    close = [torch.isclose(first[name], second[name], rtol=rtol, atol=atol).flatten() for name in first]
    assert torch.cat(close).float().mean() > 0.95


class TestApplied:
    def test_learning_rate(self, begun, unchanged, tmp_path):
        folder = resumed(begun, tmp_path, learning_rate=2e-3)
        before, usual, fast = trained(begun("train_adm"), 2), trained(unchanged, 3), trained(folder, 3)
        # The moments are kept: the same direction, twice as far.
        once, twice = ({name: after[name] - before[name] for name in before} for after in (usual, fast))
        assert_mostly_close(twice, {name: 2 * step for name, step in once.items()}, rtol=1e-2, atol=1e-6)
        assert max(float(step.abs().max()) for step in once.values()) > 5e-4
        assert read_metrics(folder)[-1]["lr"] == 2e-3
        assert moments(folder)[1]["lr"] == moments(folder)[1]["initial_lr"] == 2e-3
        assert yaml.safe_load((folder / "train_args.yaml").read_text())["learning_rate"] == 2e-3

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            # After step 3: the end of the line; and half of the warm-up.
            ({"lr_scheduler": "linear"}, 0.0),
            ({"lr_warmup_steps": 6}, 0.5e-3),
            ({"lr_warmup_steps": 6, "learning_rate": 4e-3}, 2e-3),
        ],
    )
    def test_the_curve_of_the_learning_rate(self, begun, tmp_path, changes, expected):
        folder = resumed(begun, tmp_path, **changes)
        assert read_metrics(folder)[-1]["lr"] == pytest.approx(expected)

    @pytest.mark.parametrize("changes", [{"max_train_steps": 4}, {"num_train_epochs": 2}])
    def test_length(self, begun, tmp_path, changes):
        arguments = {"output_dir": str(tmp_path), "resume_from_checkpoint": str(begun("train_adm") / "checkpoint-2")}
        run("train_adm", **arguments, **changes)
        assert (tmp_path / "checkpoint-4").is_dir()
        assert [row["step"] for row in read_metrics(tmp_path)] == [3, 4]

    @pytest.mark.parametrize(("name", "moment"), [("adam_beta1", "exp_avg"), ("adam_beta2", "exp_avg_sq")])
    def test_adam_betas(self, begun, unchanged, tmp_path, name, moment):
        """m = beta m + (1 - beta) g, with the same gradient g (or its square) as without the change."""
        old, new = {"adam_beta1": (0.9, 0.5), "adam_beta2": (0.999, 0.9)}[name]
        folder = resumed(begun, tmp_path, **{name: new})
        before, usual, other = moments(begun("train_adm"), 2)[0], moments(unchanged)[0], moments(folder)[0]
        gradients = [
            {weight: (after[weight][moment] - beta * before[weight][moment]) / (1 - beta) for weight in before}
            for after, beta in ((usual, old), (other, new))
        ]
        # Clipped to a norm of 1; of the squares, float32 leaves 1e-7 / (1 - 0.999) of the largest.
        assert_mostly_close(*gradients, rtol=1e-2, atol=1e-6)
        assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 1e-3

    def test_adam_weight_decay(self, begun, unchanged, tmp_path):
        folder = resumed(begun, tmp_path, adam_weight_decay=0.1)
        before, usual, decayed = trained(begun("train_adm"), 2), trained(unchanged, 3), trained(folder, 3)
        expected = {name: usual[name] - 1e-3 * 0.1 * before[name] for name in before}
        # A weight of 1 loses 1e-4.
        assert_mostly_close(decayed, expected, rtol=0, atol=1e-6)
        assert max(float((decayed[name] - usual[name]).abs().max()) for name in before) > 5e-5

    def test_adam_epsilon(self, begun, tmp_path):
        folder = resumed(begun, tmp_path, adam_epsilon=1e6)
        before, after = trained(begun("train_adm"), 2), trained(folder, 3)
        assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-8

    def test_max_grad_norm(self, begun, tmp_path):
        folder = resumed(begun, tmp_path, max_grad_norm=1e-9)
        before, after = moments(begun("train_adm"), 2)[0], moments(folder)[0]
        for name in before:  # no gradient is left
            torch.testing.assert_close(after[name]["exp_avg"], 0.9 * before[name]["exp_avg"], **CLOSE)

    def test_mixed_precision(self, begun, tmp_path, monkeypatch):
        dtypes = set()
        forward = AdaGNUNet2DModel.forward

        def recorded(self, *args, **kwargs):
            if self.training:
                dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(AdaGNUNet2DModel, "forward", recorded)
        resumed(begun, tmp_path, mixed_precision="bf16")
        assert dtypes == {torch.bfloat16}

    def test_tf32(self, begun, tmp_path):
        try:
            resumed(begun, tmp_path, allow_tf32=True)
            assert torch.backends.cuda.matmul.allow_tf32
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    @pytest.mark.parametrize(("name", "value"), [("ema_max_decay", 0.25), ("ema_inv_gamma", 8.0), ("ema_power", 0.25)])
    def test_ema(self, begun, tmp_path, name, value):
        """a = d a + (1 - d) w, where d = 1 - (1 + step / inv_gamma) ** -power, at most max_decay; step 2 of its own."""
        folder = resumed(begun, tmp_path, **{name: value})
        settings = {"ema_max_decay": 0.5, "ema_inv_gamma": 1.0, "ema_power": 0.75} | {name: value}
        decay = 1 - (1 + 2 / settings["ema_inv_gamma"]) ** -settings["ema_power"]
        decay = min(decay, settings["ema_max_decay"])
        before, now = weights(begun("train_adm") / "checkpoint-2"), trained(folder, 3)
        for weight, average in weights(folder / "checkpoint-3").items():
            torch.testing.assert_close(average, decay * before[weight] + (1 - decay) * now[weight], **CLOSE)

    def test_class_dropout_prob(self, begun, tmp_path):
        folder = resumed(begun, tmp_path, class_dropout_prob=1.0)
        before, after = (
            state["class_embedding.weight"]["exp_avg"]
            for state in (moments(begun("train_adm"), 2)[0], moments(folder)[0])
        )
        torch.testing.assert_close(after[:9], 0.9 * before[:9], **CLOSE)  # only the null class has a gradient
        assert not torch.allclose(after[9], 0.9 * before[9], **CLOSE)

    def test_condition_dropout_prob(self, begun, tmp_path, monkeypatch):
        begun("train_controlnet")  # without the recording below
        shown = []
        forward = AdaGNControlNetModel.forward

        def recorded(self, *args, **kwargs):
            if self.training:
                shown.append(kwargs["controlnet_cond"])
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(AdaGNControlNetModel, "forward", recorded)
        resumed(begun, tmp_path, "train_controlnet", condition_dropout_prob=1.0)
        assert not torch.cat(shown).any()

    def test_source_dropout_prob(self, begun, tmp_path, monkeypatch):
        begun("train_image_to_image")  # without the recording below
        shown = []
        training_losses = SCRIPTS["train_image_to_image"].training_losses

        def recorded(*args, extra_channels, **kwargs):
            shown.append(extra_channels)
            return training_losses(*args, extra_channels=extra_channels, **kwargs)

        monkeypatch.setattr(SCRIPTS["train_image_to_image"], "training_losses", recorded)
        resumed(begun, tmp_path, "train_image_to_image", source_dropout_prob=1.0)
        assert not torch.cat(shown).any()

    def test_caption_dropout_prob_and_what_is_free_with_captions(self, tmp_path, monkeypatch):
        base = save_base(tmp_path / "text", random_text_unet("added_kv"), "clip")
        arguments = {k: v for k, v in TOY_RUN.items() if k != "label_column"}
        arguments |= {"pretrained_model_name_or_path": base, "caption_column": "text", "output_dir": tmp_path / "run"}
        run("train_adm", **arguments)
        shown = []
        training_losses = SCRIPTS["train_adm"].training_losses

        def recorded(*args, model_kwargs, **kwargs):
            shown.append(model_kwargs["encoder_hidden_states"])
            return training_losses(*args, model_kwargs=model_kwargs, **kwargs)

        monkeypatch.setattr(SCRIPTS["train_adm"], "training_losses", recorded)
        changes = {"caption_dropout_prob": 1.0, "precompute_text_embeddings": True, "validation_prompts": ["a cat"]}
        folder = {"cache_dir": tmp_path / "cache", "output_dir": tmp_path / "run"}
        run("train_adm", **changes, **folder, max_train_steps=3, resume_from_checkpoint="latest")
        assert all(torch.equal(states, states[:1].expand_as(states)) for states in shown)  # all of them the empty one

    def test_there_is_a_test_of_each(self):
        tested = {name for name in dir(self) if name.startswith("test_")}
        covered = {"learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "num_train_epochs"}
        covered |= {"adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "mixed_precision"}
        covered |= {"allow_tf32", "ema_max_decay", "ema_inv_gamma", "ema_power", "class_dropout_prob"}
        covered |= {"condition_dropout_prob", "caption_dropout_prob", "source_dropout_prob"}
        covered |= {"image_embeds_dropout_prob"}  # in test_train_adm_unclip.py
        assert covered == {name for name, verdict in VERDICTS.items() if verdict == APPLIED}
        assert len(tested) > 10


def test_values_are_applied_to_all_groups():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in weights], lr=1.0)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    lr_scheduler.step()
    (training_args,) = [args for args in parse("train_adm", learning_rate=8.0)[0] if hasattr(args, "learning_rate")]
    apply_arguments(training_args, optimizer, lr_scheduler, None)
    assert [group["lr"] for group in optimizer.param_groups] == [4.0, 4.0] == lr_scheduler.get_last_lr()
    optimizer.step()
    lr_scheduler.step()
    assert lr_scheduler.get_last_lr() == [2.0, 2.0]


# 4. Arguments left out, forced, or taken from elsewhere


@pytest.mark.parametrize("script", NAMES)
def test_what_is_left_out_is_that_of_the_run(begun, script, toys):
    all_args, _ = parse(script, resume_from_checkpoint=str(begun(script) / "checkpoint-2"), max_train_steps=3)
    expected = values_of(SCRIPTS[script].parse_run(SCRIPTS[script].ARGUMENT_TYPES, flags(**toys[script]), script)[0])
    values = values_of(all_args)
    assert {name for name in values if values[name] != expected[name]} == {"max_train_steps", "resume_from_checkpoint"}


def test_a_run_is_resumed_by_its_folder_alone(toys, tmp_path, caplog):
    arguments = toys["train_adm"] | {"max_train_steps": 4, "checkpointing_steps": 2, "lr_scheduler": "cosine"}
    run("train_adm", **arguments | {"output_dir": str(tmp_path / "unbroken")})
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    caplog.clear()
    run("train_adm", output_dir=str(tmp_path / "broken"), resume_from_checkpoint="latest")
    assert_same_checkpoint(tmp_path / "unbroken" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    assert read_metrics(tmp_path / "unbroken") == read_metrics(tmp_path / "broken")
    assert "Not given, so taken from the run: model_config_name_or_path" in caplog.text
    assert "lr_scheduler cosine" in caplog.text


def test_what_is_free_changes_nothing_that_is_learned(begun, unchanged, tmp_path, caplog):
    arguments = {"dataloader_num_workers": 1, "gradient_checkpointing": True, "logging_steps": 3}
    arguments |= {"num_validation_images": 3, "validation_steps": 1, "report_to": "tensorboard"}
    folder = resumed(begun, tmp_path, **arguments, overwrite_output_dir=True)
    assert caplog.text.count("`overwrite_output_dir` is True, which has no effect") == 1
    assert caplog.text.count("overwrite_output_dir") == 1
    assert_mostly_close(trained(folder, 3), trained(unchanged, 3), rtol=0, atol=1e-6)  # a step is 1e-3 long


def test_forced_the_new_value_is_used_and_named(begun, tmp_path, caplog):
    changes = {"ddpm_beta_schedule": "cosine", "timestep_sampler": "loss-second-moment", "train_batch_size": 2}
    folder = resumed(begun, tmp_path, **changes, force_resume=True)
    assert ADMPipeline.from_pretrained(folder).scheduler.config.beta_schedule == "squaredcos_cap_v2"
    recorded = yaml.safe_load((folder / "checkpoint-3" / "train_args.yaml").read_text())
    for name, value in changes.items():
        assert recorded[name] == value
    for told in ("`ddpm_beta_schedule` is 'squaredcos_cap_v2', and was 'linear'", "`train_batch_size` is 2, and was 4"):
        assert f"--force_resume: {told} for checkpoint-2" in caplog.text
    # The next resume continues with the forced values.
    assert parse("train_adm", output_dir=str(folder), resume_from_checkpoint="latest", max_train_steps=4)


def test_forcing_is_for_one_start(begun, tmp_path):
    """`train_args.yaml` can be passed to `--config` again, and must not force whatever differs then."""
    folder = resumed(begun, tmp_path / "run", train_batch_size=2, force_resume=True)
    for record in (folder / "train_args.yaml", folder / "checkpoint-3" / "train_args.yaml"):
        settings = yaml.safe_load(record.read_text())
        assert (settings["train_batch_size"], settings["force_resume"]) == (2, False)
    again = {"config": folder / "train_args.yaml", "resume_from_checkpoint": "latest", "max_train_steps": 4}
    with pytest.raises(ValueError, match="`seed` is 1, and was 0 for checkpoint-3"):
        parse("train_adm", **again, seed=1)


def test_force_resume_without_a_checkpoint():
    with pytest.raises(ValueError, match="`force_resume` was given without `resume_from_checkpoint`"):
        parse("train_adm", force_resume=True)


@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "cosine"])
def test_names_of_one_schedule(toys, tmp_path, name):
    arguments = toys["train_adm"] | {"output_dir": str(tmp_path)}
    run("train_adm", **arguments | {"ddpm_beta_schedule": "cosine", "max_train_steps": 1})
    changes = {"ddpm_beta_schedule": name, "prediction_type": "epsilon"}
    run("train_adm", output_dir=str(tmp_path), resume_from_checkpoint="latest", max_train_steps=2, **changes)
    assert (tmp_path / "checkpoint-2").is_dir()


class TestSources:
    @pytest.fixture
    def tuned(self, toys, tmp_path):
        arguments = {k: v for k, v in toys["train_adm"].items() if k != "model_config_name_or_path"}
        base = save_base(tmp_path / "base", random_unet(num_class_embeds=10, null_class_id=9))
        arguments |= {"pretrained_model_name_or_path": base, "output_dir": str(tmp_path / "run"), "max_train_steps": 1}
        run("train_adm", **arguments)
        return {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest", "max_train_steps": 2}

    def test_moved(self, tuned, tmp_path):
        (tmp_path / "base").rename(tmp_path / "moved")
        run("train_adm", **tuned, pretrained_model_name_or_path=tmp_path / "moved")
        assert (tmp_path / "run" / "checkpoint-2").is_dir()

    def test_the_scheduler_there_has_changed(self, tuned, tmp_path):
        path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.05}))
        with pytest.raises(
            ValueError, match="`beta_end` is 0.05, and was 0.02 for checkpoint-1.*restore the scheduler"
        ):
            run("train_adm", **tuned)

    def test_the_network_there_has_changed(self, begun, tmp_path):
        path = write_json(tmp_path / "unet.json", TOY_CONFIG, dropout=0.3)
        with pytest.raises(ValueError, match="`dropout` in the config of the network is 0.3, and was 0.0 for checkp"):
            resumed(begun, tmp_path / "run", model_config_name_or_path=path)
        path = write_json(tmp_path / "unet.json", TOY_CONFIG, block_out_channels=[8, 8])
        with pytest.raises(ValueError, match=r"holds the weights of another network: .* such as '.*', of shape \("):
            resumed(begun, tmp_path / "run", model_config_name_or_path=path, force_resume=True)

    def test_the_base_of_an_adapter_has_changed(self, toys, tmp_path):
        arguments = {k: v for k, v in toys["train_adm"].items() if k != "model_config_name_or_path"}
        base = save_base(tmp_path / "base", random_unet(num_class_embeds=10, null_class_id=9))
        arguments |= {"pretrained_model_name_or_path": base, "lora_rank": 2, "output_dir": str(tmp_path / "run")}
        run("train_adm", **arguments)
        save_base(tmp_path / "base", random_unet(seed=1, num_class_embeds=10, null_class_id=9))
        resume = {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest", "max_train_steps": 3}
        with pytest.raises(
            ValueError, match="the hash of the frozen U-Net is .[0-9a-f]{32}., and was .[0-9a-f]{32}. for"
        ):
            run("train_adm", **resume)


def test_nothing_to_resume_and_nothing_to_begin_with(tmp_path):
    """For instance, a mistyped folder: arguments left out cannot be taken from the run."""
    with pytest.raises(ValueError, match="There is no checkpoint in .*run.*`--output_dir`"):
        parse("train_adm", output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")


def test_another_script(begun):
    with pytest.raises(ValueError, match=r"was written by train_adm\.py, and this is train_super_resolution\.py"):
        parse("train_super_resolution", resume_from_checkpoint=str(begun("train_adm") / "checkpoint-2"))


@pytest.mark.parametrize("script", NAMES)
def test_where_results_go_is_looked_at_before_the_data(begun, toys, tmp_path, monkeypatch, script):
    begun(script)
    for module in (autoencoders, classifiers, clip, diffusion):
        monkeypatch.setattr(module, "load_image_dataset", lambda **kwargs: pytest.fail("the data was read"))
    with pytest.raises(ValueError, match="holds checkpoint-2 of another run"):
        run(script, **toys[script])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`output_dir` is .* but .*file is not a directory"):
        run(script, **toys[script] | {"output_dir": str(tmp_path / "file" / "run")})


def test_a_resume_that_fails_leaves_the_record_of_the_run(begun, tmp_path):
    shutil.copytree(begun("train_adm"), tmp_path / "run")
    record = (tmp_path / "run" / "train_args.yaml").read_bytes()
    arguments = {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest", "max_train_steps": 3}
    (tmp_path / "run" / "checkpoint-2" / "run_state.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is sound: .*run_state.safetensors is missing"):
        run("train_adm", **arguments, learning_rate=7.0)
    assert (tmp_path / "run" / "train_args.yaml").read_bytes() == record


def test_fewer_steps_than_the_checkpoint_has(begun):
    with pytest.raises(ValueError, match="ends at step 1 .*trained for 2 steps already.*can be loaded from"):
        run("train_adm", max_train_steps=1, resume_from_checkpoint=str(begun("train_adm") / "checkpoint-2"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("changes", [{}, {"max_train_steps": 2}])
def test_as_many_steps_as_the_checkpoint_has(begun, tmp_path, script, changes):
    """Killed between the last checkpoint and the end: the same command, once more, saves the result."""
    shutil.copytree(begun(script) / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    run(script, **changes, output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    result = list((tmp_path / "run").rglob("*.safetensors"))
    saved = [path.relative_to(tmp_path / "run") for path in result if "checkpoint-2" not in str(path)]
    assert saved
    for path in saved:
        expected, found = (load_file(tmp_path / "run" / folder / path) for folder in ("checkpoint-2", "."))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)  # copies of the average


@pytest.fixture
def with_record(begun, tmp_path):
    """A checkpoint whose record has other arguments; its path."""

    def copy(**changes):
        path = shutil.copytree(begun("train_adm") / "checkpoint-2", tmp_path / "changed" / "checkpoint-2")
        settings = yaml.safe_load((path / "train_args.yaml").read_text())
        (path / "train_args.yaml").write_text(yaml.safe_dump(settings | changes))
        write_manifest(path)
        return str(path)

    return copy


class TestTakenOver:
    """Arguments taken over from the checkpoint are not treated as given on the command line."""

    def test_nothing_is_said_of_what_has_no_effect(self, with_record):
        path = with_record(num_train_epochs=7, class_dropout_prob=0.2)
        all_args, record = parse("train_adm", resume_from_checkpoint=path, max_train_steps=5)
        assert values_of(all_args)["num_train_epochs"] == 7
        assert check_effects(*all_args, taken_over=record.left_out) == []
        all_args, record = parse("train_adm", resume_from_checkpoint=path, max_train_steps=5, num_train_epochs=3)
        (said,) = check_effects(*all_args, taken_over=record.left_out)
        assert said.startswith("`num_train_epochs` is 3, which has no effect")

    def test_betas_end_with_the_schedule_that_they_belong_to(self, begun, with_record, tmp_path):
        path = with_record(ddpm_beta_schedule="linear", beta_end=0.03)
        assert values_of(parse("train_adm", resume_from_checkpoint=path, max_train_steps=3)[0])["beta_end"] == 0.03
        out = tmp_path / "out"
        arguments = {"resume_from_checkpoint": path, "max_train_steps": 3, "output_dir": str(out)}
        run("train_adm", **arguments, ddpm_beta_schedule="cosine", force_resume=True)
        assert yaml.safe_load((out / "train_args.yaml").read_text())["beta_end"] is None
        assert ADMPipeline.from_pretrained(out).scheduler.config.beta_end == 0.02  # the default
        with pytest.raises(ValueError, match="`beta_end` is 0.04, which has no effect"):
            run("train_adm", **arguments, ddpm_beta_schedule="cosine", beta_end=0.04, force_resume=True)

    def test_a_revision_ends_with_the_repository_that_it_belongs_to(self, with_record, tmp_path):
        path = with_record(model_config_name_or_path=None, pretrained_model_name_or_path="a/model", revision="v1")
        assert values_of(parse("train_adm", resume_from_checkpoint=path, max_train_steps=3)[0])["revision"] == "v1"
        moved = {"resume_from_checkpoint": path, "max_train_steps": 3, "pretrained_model_name_or_path": str(tmp_path)}
        all_args, record = parse("train_adm", **moved)
        assert values_of(all_args)["revision"] is None
        assert check_effects(*all_args, taken_over=record.left_out) == []

    @pytest.mark.parametrize("script", NAMES)
    def test_scripts_say_nothing_of_it(self, script, begun, tmp_path, caplog):
        path = shutil.copytree(begun(script) / "checkpoint-2", tmp_path / "changed" / "checkpoint-2")
        caplog.clear()  # of the first run, if this test is the first to need it
        settings = yaml.safe_load((path / "train_args.yaml").read_text())
        (path / "train_args.yaml").write_text(yaml.safe_dump(settings | {"num_train_epochs": 7}))
        write_manifest(path)
        run(script, resume_from_checkpoint=str(path), max_train_steps=3, output_dir=str(tmp_path / "out"))
        assert "has no effect" not in caplog.text


def test_pushing_is_not_taken_to_another_folder(begun, tmp_path):
    """Otherwise a run that branches off would overwrite the pushed result of the first one."""
    shutil.copytree(begun("train_adm"), tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / "train_args.yaml"
    path.write_text(path.read_text().replace("push_to_hub: false", "push_to_hub: true"))
    write_manifest(path.parent)
    arguments = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2"), "max_train_steps": 3}
    assert values_of(parse("train_adm", **arguments)[0])["push_to_hub"]
    assert not values_of(parse("train_adm", **arguments, output_dir=tmp_path / "other")[0])["push_to_hub"]


# 5. Data that has changed


class TestData:
    @pytest.fixture
    def folders(self, tmp_path, toys):
        generator = np.random.default_rng(0)
        for name in ("blue", "red"):
            (tmp_path / "images" / name).mkdir(parents=True)
            for index in range(4):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
        arguments = {k: v for k, v in toys["train_adm"].items() if k not in ("data_files", "max_train_samples")}
        arguments |= {"train_data_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "run")}
        run("train_adm", **arguments | {"max_train_steps": 1})
        return tmp_path / "images"

    def resume(self, tmp_path, **changes):
        run("train_adm", output_dir=tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=2, **changes)

    def test_a_class_renamed(self, folders, tmp_path, caplog):
        (folders / "red").rename(folders / "rose")
        with pytest.raises(ValueError, match="class 1 of the data is 'rose', and was 'red' for checkpoint-1.*--force_"):
            self.resume(tmp_path)
        self.resume(tmp_path, force_resume=True)
        assert "--force_resume: class 1 of the data is 'rose', and was 'red'" in caplog.text
        assert ADMPipeline.from_pretrained(tmp_path / "run").id2label == {0: "blue", 1: "rose"}

    def test_a_class_added_or_removed(self, folders, tmp_path):
        shutil.copytree(folders / "red", folders / "green")
        with pytest.raises(ValueError, match="has 3 classes, and had 2 for checkpoint-1; added: 'green'"):
            self.resume(tmp_path, force_resume=True)
        shutil.rmtree(folders / "green")
        shutil.rmtree(folders / "blue")
        with pytest.raises(ValueError, match="has 1 classes, and had 2 for checkpoint-1; removed: 'blue'"):
            self.resume(tmp_path, force_resume=True)

    def test_an_image_less(self, folders, tmp_path):
        (folders / "red" / "0.png").unlink()
        with pytest.raises(
            ValueError, match="the number of usable images is 7, and was 8 for checkpoint-1.*--force_resume"
        ):
            self.resume(tmp_path)
        self.resume(tmp_path, force_resume=True)
        assert (tmp_path / "run" / "checkpoint-2").is_dir()


class TestClassesThatFineTuningAdds:
    """The rows of the network are planned again from the pretrained model at each start."""

    @pytest.fixture
    def tune(self, toys, tmp_path):
        def tune(folder, unet=None, id2label=None, script="train_adm", **arguments):
            if unet is not None:
                base = save_base(tmp_path / "base", unet, id2label=id2label)
                start = {k: v for k, v in toys[script].items() if k != "model_config_name_or_path"}
                arguments = start | {"pretrained_model_name_or_path": base, "checkpointing_steps": 1} | arguments
            run(script, **arguments | {"output_dir": str(tmp_path / folder)})
            return tmp_path / folder

        return tune

    @pytest.mark.parametrize(
        "config, id2label, arguments",
        [
            ({}, None, {}),
            ({"num_class_embeds": 3, "null_class_id": 2}, {0: "other", 1: "Flags"}, {}),
            ({"num_class_embeds": 3, "null_class_id": 2}, {0: "other", 1: "Flags"}, {"replace_classes": True}),
            ({"num_class_embeds": 2}, {0: "other", 1: "Flags"}, {}),
        ],
        ids=["unconditional", "more", "replaced", "null-class"],
    )
    def test_resumed_as_if_unbroken(self, tune, tmp_path, config, id2label, arguments):
        unbroken = tune("unbroken", random_unet(**config), id2label, **arguments)
        shutil.copytree(unbroken, tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken" / "checkpoint-2")
        broken = tune("broken", resume_from_checkpoint="latest")
        assert_same_checkpoint(unbroken / "checkpoint-2", broken / "checkpoint-2")

    def test_the_names_there_have_changed(self, tune, tmp_path, caplog):
        """A class would be trained in the row of another one."""
        tune("run", random_unet(num_class_embeds=3, null_class_id=2), {0: "other", 1: "Flags"}, max_train_steps=1)
        path = tmp_path / "base" / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "Flags", "1": "other"}}))
        resume = {"resume_from_checkpoint": "latest", "max_train_steps": 2}
        with pytest.raises(ValueError, match="class 0 of the network is 'Flags', and was 'other'; .*Restore the names"):
            tune("run", **resume)
        tune("run", **resume, force_resume=True)
        assert "--force_resume: class 1 of the network is 'other', and was 'Flags' for checkpoint-1" in caplog.text


def test_captions_have_changed(toys, tmp_path, caplog):
    table, path = pq.read_table(EMOJI), tmp_path / "data.parquet"
    pq.write_table(table, path)
    run("train_clip", **toys["train_clip"] | {"data_files": path, "output_dir": tmp_path / "run"})
    texts = pa.array([f"{text}!" for text in table["text"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("text"), "text", texts), path)
    resume = {"output_dir": tmp_path / "run", "resume_from_checkpoint": "latest", "max_train_steps": 3}
    message = "the hash of the captions is '.*', and was '.*' for checkpoint-2.*Give the run the former captions"
    with pytest.raises(ValueError, match=message):
        run("train_clip", **resume)
    run("train_clip", **resume, force_resume=True)
    assert "--force_resume: the hash of the captions is" in caplog.text


def test_embeddings_have_changed(begun, toys, tmp_path):
    path = Path(toys["train_prior"]["train_data_dir"], "embeddings.json")
    resume = {"resume_from_checkpoint": str(begun("train_prior") / "checkpoint-2"), "max_train_steps": 3}
    content = path.read_text()
    path.write_text(content.replace('"image_column": "image"', '"image_column": "other"'))
    try:
        with pytest.raises(ValueError, match="the hash of the stored latents or embeddings is '.*', and was"):
            run("train_prior", **resume, output_dir=tmp_path / "run")
    finally:
        path.write_text(content)


# 6. Checkpoints are models


class TestCheckpointsAreModels:
    @pytest.mark.parametrize("pipeline_class", [ADMPipeline, DiffusionPipeline])
    def test_pipelines(self, begun, pipeline_class):
        folder = begun("train_adm")
        pipeline = pipeline_class.from_pretrained(folder / "checkpoint-2")
        assert isinstance(pipeline, ADMPipeline)
        assert pipeline.id2label == ADMPipeline.from_pretrained(folder).id2label
        raw = trained(folder, 2)
        for name, weight in pipeline.unet.state_dict().items():
            assert torch.equal(weight, weights(folder)[name]), name
        assert any(not torch.equal(raw[name], weight) for name, weight in weights(folder).items())

    def test_on_the_way_as_if_the_run_had_ended(self, begun, toys, tmp_path):
        run("train_adm", **toys["train_adm"] | {"output_dir": tmp_path, "max_train_steps": 3, "checkpointing_steps": 2})
        ended = weights(begun("train_adm"))  # the learning rate is constant
        assert_mostly_close(weights(tmp_path / "checkpoint-2"), ended, rtol=0, atol=1e-6)  # a step is 1e-3 long

    def test_no_pickle_holds_the_average(self, begun):
        folder = begun("train_adm") / "checkpoint-2"
        objects = read_state(folder, "run_state")["objects"]
        assert len(objects) == 3
        assert not any("shadow_params" in state for state in objects)
        counters = json.loads((folder / "run_record.json").read_text())["ema"]
        assert counters["optimization_step"] == 2
        assert counters["decay"] == 0.5

    def test_upsamplers_classifiers_and_branches(self, begun):
        assert (
            DiffusionPipeline.from_pretrained(begun("train_super_resolution") / "checkpoint-2").config.low_res_size == 4
        )
        folder = begun("train_classifier")
        classifier = AdaGNClassifierModel.from_pretrained(folder / "checkpoint-2", subfolder="classifier")
        for name, weight in weights(folder, "classifier").items():
            assert torch.equal(weight, classifier.state_dict()[name]), name
        for name in ("classifier/id2label.json", "scheduler/scheduler_config.json"):
            assert (folder / "checkpoint-2" / name).read_bytes() == (folder / name).read_bytes()
        folder = begun("train_controlnet")
        branch = AdaGNControlNetModel.from_pretrained(folder / "checkpoint-2")
        for name, weight in load_file(folder / WEIGHTS).items():
            assert torch.equal(weight, branch.state_dict()[name]), name

    def test_adapters(self, toys, tmp_path):
        arguments = {k: v for k, v in toys["train_adm"].items() if k != "model_config_name_or_path"}
        arguments |= {"pretrained_model_name_or_path": toys["train_controlnet"]["pretrained_model_name_or_path"]}
        run("train_adm", **arguments | {"lora_rank": 2, "output_dir": tmp_path})
        pipelines = [ADMPipeline.from_pretrained(arguments["pretrained_model_name_or_path"]) for _ in range(2)]
        for pipeline, folder in zip(pipelines, (tmp_path, tmp_path / "checkpoint-2"), strict=True):
            pipeline.load_lora_weights(folder)
        first, second = (pipeline.unet.state_dict() for pipeline in pipelines)
        assert [name for name in first if not torch.equal(first[name], second[name])] == []

    def test_the_sampling_command(self, begun, tmp_path):
        words = {
            "num_images": 2,
            "num_inference_steps": 1,
            "class_labels": "uniform",
            "output_dir": tmp_path / "images",
        }
        sample(flags(model=begun("train_adm") / "checkpoint-2", **words))
        assert len(list((tmp_path / "images").glob("*.png"))) == 2


# 7. Checkpoints of the first version: the average in a pickle, no record


class TestPreviousVersion:
    @pytest.fixture(autouse=True)
    def in_the_repository(self, monkeypatch):
        monkeypatch.chdir(REPOSITORY)

    def resume(self, tmp_path, **changes):
        arguments = {"output_dir": tmp_path, "resume_from_checkpoint": str(PREVIOUS / "checkpoint-2")}
        run("train_adm", **arguments, max_train_steps=3, **changes)

    def test_it_is_resumed_with_its_average(self, tmp_path, caplog):
        self.resume(tmp_path)
        assert "written by an earlier version, without a record of its arguments. They are taken from" in caplog.text
        before = torch.load(PREVIOUS / "checkpoint-2" / "custom_checkpoint_3.pkl")
        assert before["optimization_step"] == 2
        names = [name for name, _ in AdaGNUNet2DModel.from_pretrained(tmp_path, subfolder="unet").named_parameters()]
        now, average = trained(tmp_path, 3), weights(tmp_path / "checkpoint-3")
        for name, old in zip(names, before["shadow_params"], strict=True):  # the third step decays by 0.5
            torch.testing.assert_close(average[name], 0.5 * old + 0.5 * now[name], **CLOSE)
        assert json.loads((tmp_path / "checkpoint-3" / "run_record.json").read_text())["ema"]["optimization_step"] == 3

    def test_its_arguments_are_compared(self, tmp_path):
        for changes, message in (
            ({"train_batch_size": 2}, "`train_batch_size` is 2, and was 4 for checkpoint-2"),
            ({"ddpm_beta_schedule": "linear"}, "`ddpm_beta_schedule` is 'linear', and was 'squaredcos_cap_v2' for"),
            ({"model_config_name_or_path": "other.json"}, "`model_config_name_or_path` is 'other.json', and was"),
            ({"use_ema": False}, "`use_ema` is False, and was True for checkpoint-2, which cannot be loaded otherwise"),
        ):
            with pytest.raises(ValueError, match=message):
                self.resume(tmp_path, **changes)

    def test_without_any_record(self, tmp_path, caplog):
        shutil.copytree(PREVIOUS / "checkpoint-2", tmp_path / "checkpoint-2")
        given = yaml.safe_load((PREVIOUS / "train_args.yaml").read_text())
        names = ("model_config_name_or_path", "data_files", "label_column", "max_train_samples", "train_batch_size")
        arguments = {name: given[name] for name in (*names, "ddpm_beta_schedule", "num_validation_images", "report_to")}
        arguments |= {"output_dir": tmp_path / "run", "resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
        arguments |= {"max_train_steps": 3, "validation_num_inference_steps": 1}
        with pytest.raises(ValueError, match="holds the state of 4 objects besides the networks, but this run has 3"):
            run("train_adm", **arguments, use_ema=False)
        run("train_adm", **arguments)
        assert "holds no record of its arguments" in caplog.text


# 8. Divergence


class TestDivergence:
    def test_it_is_told_when_it_happens_and_at_the_end(self, toys, tmp_path, caplog):
        run("train_adm", **toys["train_adm"] | {"output_dir": tmp_path, "learning_rate": 1e6, "max_train_steps": 2})
        assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path))
        messages = [record.getMessage() for record in caplog.records if "The run " in record.getMessage()]
        assert "The run seems to have diverged at step 2: its mse is" in messages[0]
        assert "The run has diverged: its mse is" in messages[-1]
        assert "Resume an earlier checkpoint with a lower `--learning_rate`" in messages[-1]
        assert (tmp_path / "model_index.json").is_file()

    def test_what_the_message_recommends_works(self, begun, tmp_path, caplog):
        message = "The loss of step 4 is not finite.*resume with a lower `--learning_rate`"
        with pytest.raises(RuntimeError, match=message):
            resumed(begun, tmp_path, max_train_steps=4, learning_rate=1e30, max_skipped_steps=1)
        assert not list(tmp_path.glob("checkpoint-*"))
        folder = resumed(begun, tmp_path, max_train_steps=4, learning_rate=1e-4)
        assert [row["step"] for row in read_metrics(folder)] == [3, 4]
        assert read_metrics(folder)[-1]["lr"] == 1e-4
        assert read_metrics(folder)[-1]["mse"] < 2
        assert "diverged" not in caplog.text
