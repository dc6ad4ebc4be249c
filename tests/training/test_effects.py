"""Arguments without effect: refused ones, those that the log names, and no words about defaults and recipes."""

import json

import pytest
from runs import CONFIGS, EMOJI, SHORT_RUN, flags, own_process_state, reset_accelerate, save_base
from scripts import REPOSITORY, load_script
from toy_models import CONDITIONAL, TOY_CONFIG, random_unet

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.conversion import openai
from diffusers_adm.evaluation.bits_per_dim.__main__ import Arguments as BoundArguments
from diffusers_adm.evaluation.data import find_dataset, read_images
from diffusers_adm.evaluation.sample.__main__ import Arguments as SampleArguments
from diffusers_adm.training import check_effects, load_noise_scheduler, parse_args
from diffusers_adm.training import run as training_run


SCRIPTS = {
    name: load_script(name)
    for name in (
        "train_adm",
        "train_autoencoder",
        "train_classifier",
        "train_clip",
        "train_controlnet",
        "train_image_to_image",
        "train_prior",
        "train_super_resolution",
    )
}
SCRATCH = {"model_config_name_or_path": "unet.json"}
PRETRAINED = {"pretrained_model_name_or_path": "somebody/model"}


def told(script, **arguments):
    return check_effects(*parse_args(SCRIPTS[script].ARGUMENT_TYPES, flags(**arguments)))


@pytest.mark.parametrize(
    "script, arguments, sentence",
    [
        (
            "train_adm",
            {"class_dropout_prob": 0.2},
            "is 0.2, which has no effect: without `label_column`",
        ),
        ("train_super_resolution", {"caption_dropout_prob": 0.2}, "without `caption_column` there are no captions"),
        ("train_adm", {"image_embeds_dropout_prob": 0.2}, "without `image_embeds_column` and `image_encoder_name_or_p"),
        (
            "train_adm",
            {"class_dropout_prob": 0.2, "image_embeds_column": "clip", "label_column": "label", "class_balanced": True},
            "is 0.2, which has no effect: a decoder of image embeddings has no classes",
        ),
        ("train_adm", {"num_train_epochs": 5, "max_train_steps": 7}, "`max_train_steps` 7 says when training ends."),
        ("train_adm", {"lr_scheduler": "constant", "lr_warmup_steps": 10}, "'constant_with_warmup' has one."),
        (
            "train_adm",
            {"streaming": True, "no_check_images": True},
            "with `streaming`, images are never checked before",
        ),
        (
            "train_adm",
            {"use_ema": False, "ema_power": 0.5},
            "`ema_power` is 0.5, which has no effect: `use_ema`",
        ),
        ("train_classifier", {"ema_max_decay": 0.5}, "`use_ema` is false"),
        ("train_adm", {"overwrite_output_dir": True, "resume_from_checkpoint": "latest"}, "nothing is deleted"),
        ("train_adm", {"report_to": "none", "logging_dir": "here"}, "`report_to` is 'none'"),
        ("train_classifier", {"validation_steps": 5}, "no held-out images"),
        ("train_classifier", {"noised": False, "num_timestep_bins": 3}, "`noised` is false"),
        ("train_clip", {"validation_steps": 5}, "no held-out images"),
        ("train_clip", {"label_column": "label"}, "a CLIP only needs labels for zero-shot accuracy"),
        ("train_clip", {"zero_shot_template": "a {}", "validation_split": "test"}, "zero-shot accuracy needs"),
        ("train_autoencoder", {"label_column": "label"}, "an autoencoder has no classes"),
        ("train_autoencoder", {"discriminator_weight": 0.1}, "without `discriminator_start` there is no discriminator"),
        ("train_autoencoder", {"decoder_only": True, "kl_weight": 0.1}, "leaves the encoder, and so the KL divergence"),
        ("train_autoencoder", {"decoder_only": True, "standardize_channels": True}, "leaves the scale of the latents"),
        ("train_prior", {"validation_steps": 5}, "no held-out embeddings to validate on: name `validation_data_dir`"),
        ("train_prior", {"validation_candidates": 3}, "no held-out embeddings to validate on"),
        ("train_adm", {"report_to": "none", "tracker_project_name": "emoji"}, "`report_to` is 'none'"),
        ("train_adm", {"report_to": "mlflow", "logging_dir": "here"}, "`report_to` is 'mlflow'"),
    ],
)
def test_harmless_ones_are_told(script, arguments, sentence):
    (said,) = told(script, **SCRATCH, **arguments)
    assert sentence in said


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("train_adm", {"class_dropout_prob": 0}),  # off, as without classes
        ("train_adm", {"class_dropout_prob": 0.1}),  # the default
        ("train_adm", {"label_column": "label", "class_dropout_prob": 0.2}),
        ("train_adm", {"image_embeds_column": "clip", "image_embeds_dropout_prob": 0.2}),
        ("train_adm", {"num_train_epochs": 5}),
        ("train_adm", {"lr_scheduler": "constant", "lr_warmup_steps": 0}),
        ("train_adm", {"validation_steps": 5}),  # of samples
        ("train_classifier", {"validation_steps": 5, "validation_split": "test"}),
        ("train_clip", {"label_column": "label", "class_balanced": True}),
        ("train_clip", {"label_column": "label", "validation_split": "test", "zero_shot_template": "a {}"}),
        ("train_autoencoder", {"validation_steps": 5}),  # on training images
        ("train_autoencoder", {"label_column": "label", "class_balanced": True}),
        ("train_autoencoder", {"discriminator_weight": 0.1, "discriminator_start": 1}),
        ("train_adm", {"beta_start": 0.01, "ddpm_beta_schedule": "linear"}),
        ("train_prior", {"validation_steps": 5, "validation_data_dir": "runs/embeddings-test"}),
    ],
)
def test_nothing_is_said_of_what_acts(script, arguments):
    assert told(script, **SCRATCH, **arguments) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (SCRATCH | {"revision": "main"}, "`revision` is 'main', which has no effect: it belongs to a pretrained model"),
        (SCRATCH | {"variant": "fp16"}, "`variant` is 'fp16'.*Leave it out"),
        (SCRATCH | {"validation_bits_per_dim": 2}, "`validation_bits_per_dim` is 2.*no held-out images to measure"),
        (SCRATCH | {"validation_frechet_network": "x"}, "`validation_frechet_network` is 'x'.*no held-out images"),
        (PRETRAINED | {"pretrained_model_name_or_path": "{folder}", "revision": "v1"}, "a folder, which has no revis"),
        (SCRATCH | {"beta_start": 0.01, "ddpm_beta_schedule": "cosine"}, "`ddpm_beta_schedule` is 'cosine', which is"),
    ],
)
def test_mistakes_are_refused(arguments, message, tmp_path):
    arguments = {name: tmp_path if value == "{folder}" else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        told("train_adm", **arguments)


@pytest.mark.parametrize("recipe", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_published_recipes(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    keys = recipe.read_text()
    if "distributed_type" in keys:
        pytest.skip("of Accelerate")
    script = "train_classifier" if "classifier" in recipe.stem else "train_adm"
    script = "train_autoencoder" if "reconstruction_loss" in keys else script
    script = "train_clip" if "zoom" in keys else script
    script = "train_super_resolution" if "low_res_size" in keys else script
    script = "train_controlnet" if "\ncondition" in keys else script
    script = "train_image_to_image" if "\nsource" in keys else script
    script = "train_prior" if recipe.stem.startswith("prior") else script
    assert check_effects(*parse_args(SCRIPTS[script].ARGUMENT_TYPES, ["--config", str(recipe)])) == []


def test_a_run_tells(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)
    (tmp_path / "unet.json").write_text(json.dumps(TOY_CONFIG))
    arguments = SHORT_RUN | {
        "model_config_name_or_path": str(tmp_path / "unet.json"),
        "data_files": EMOJI,
        "resolution": 8,
        "max_train_samples": 16,
        "max_train_steps": 1,
        "num_train_epochs": 3,
        "output_dir": str(tmp_path / "run"),
    }
    with own_process_state("train_adm"):
        reset_accelerate()
        SCRIPTS["train_adm"].main(flags(**arguments))
    assert "`num_train_epochs` is 3, which has no effect: `max_train_steps` 1 says when training ends." in caplog.text


class TestPretrainedSchedule:
    """Betas that do not depend on what is given."""

    def load(self, tmp_path, scheduler, **given):
        scheduler.save_pretrained(tmp_path)
        types = SCRIPTS["train_adm"].ARGUMENT_TYPES
        model, data, noise, *_ = parse_args(types, flags(pretrained_model_name_or_path=tmp_path, **given))
        return load_noise_scheduler(model, data, noise)

    def test_cosine(self, tmp_path):
        cosine = LearnedVarianceDDPMScheduler(beta_schedule="cosine")
        with pytest.raises(ValueError, match="`beta_end` would have no effect: .* has the cosine schedule"):
            self.load(tmp_path, cosine, beta_end=0.1)
        assert self.load(tmp_path, cosine, beta_end=0.1, ddpm_beta_schedule="linear").betas[-1] == 0.1
        assert len(self.load(tmp_path, cosine, ddpm_num_steps=50)) == 50

    def test_betas_one_by_one(self, tmp_path):
        listed = LearnedVarianceDDPMScheduler(trained_betas=[0.1, 0.2, 0.3])
        with pytest.raises(ValueError, match="`ddpm_num_steps` and `ddpm_beta_schedule` would have no .* lists"):
            self.load(tmp_path, listed, ddpm_num_steps=50, ddpm_beta_schedule="cosine")
        assert len(self.load(tmp_path, listed)) == 3


# Other commands


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "test"}, "`split` is 'test', which has no effect: it belongs to a `dataset`"),
        ({"label_column": "kind"}, "`label_column` is 'kind'"),
        ({"negative_prompt": "dull"}, "`negative_prompt` is 'dull', .* is off: `guidance_scale` is None"),
        ({"guidance_rescale": 0.5, "guidance_scale": 1.0}, "`guidance_rescale` is 0.5, .*is off"),
        ({"guidance_end": 0.5}, "`guidance_end` is 0.5, .*nothing is guided without"),
        ({"classifier": "somebody/judge"}, "nothing is guided by it without `classifier_guidance_scale`"),
        ({"revision": "v1"}, "`model` is a folder, which has no revisions"),
    ],
)
def test_sampling(arguments, message, tmp_path):
    common = {"model": str(tmp_path), "num_images": 1, "output_dir": "x"}
    with pytest.raises(ValueError, match=message):
        SampleArguments(**common, **arguments)
    act = {"guidance_scale": 2.0, "classifier_guidance_scale": 1.0}
    act |= {"class_labels": "data", "dataset": ["x"]} if {"split", "label_column"} & set(arguments) else {}
    if "revision" in arguments:
        common["model"] = "somebody/model"
    SampleArguments(**common, **arguments | act)


def test_bits_per_dim(tmp_path):
    with pytest.raises(ValueError, match="`revision` is 'v1', which has no effect: `model` is a folder"):
        BoundArguments(model=str(tmp_path), dataset=["x"], revision="v1")


@pytest.mark.parametrize("source", [["a.parquet"], None])
def test_a_configuration_of_what_has_none(source, tmp_path):
    with pytest.raises(ValueError, match="`dataset_config_name` is 'large', but .* has no configurations"):
        find_dataset(source or [str(tmp_path)], "large", None)


@pytest.mark.parametrize("given", [{"split": "test"}, {"image_column": "picture"}, {"dataset_config_name": "large"}])
def test_a_reference_that_is_no_dataset(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"`{name}` would have no effect: x.npz is not a dataset"):
        read_images(["x.npz"], 8, **given)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--export", "a", "--output_file", "b.pt", "--preset", "lsun_cat"],
            "`--preset` goes with `--checkpoint`",
        ),
        (["--export", "a", "--output_file", "b.pt", "--output_dir", "c"], "`--output_dir` goes with `--checkpoint`"),
        (["--checkpoint", "a.pt", "--output_dir", "b", "--output_file", "c"], "`--output_file` goes with `--export`"),
        (
            ["--checkpoint", "a.pt", "--output_dir", "b", "--new_attention_order", "True"],
            "`--new_attention_order` goes with `--export` only",
        ),
    ],
)
def test_conversion(arguments, message, capsys):
    with pytest.raises(SystemExit):
        openai.main(arguments)
    assert message in capsys.readouterr().err


def test_prompts_that_no_grid_shows(tmp_path, monkeypatch, caplog):
    script = SCRIPTS["train_adm"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    base = save_base(tmp_path / "base", random_unet(**CONDITIONAL))
    arguments = SHORT_RUN | {
        "pretrained_model_name_or_path": base,
        "data_files": EMOJI,
        "caption_column": "text",
        "num_validation_images": 1,
        "output_dir": str(tmp_path / "run"),
        "validation_prompts": ["red heart", "bus"],
    }
    with own_process_state("train_adm"):
        reset_accelerate()
        with pytest.raises(ValueError, match="no cross-attention"):  # which comes later
            script.main(flags(**arguments))
    assert "`num_validation_images` is 1, so these of `validation_prompts` are not used: 'bus'." in caplog.text
