"""training/configs/openai/: the published training runs, on the meta device."""

import json

import pytest
import torch
import yaml
from scripts import REPOSITORY, load_script

from diffusers_adm import AdaGNClassifierModel, AdaGNUNet2DModel, LearnedVarianceDDPMScheduler
from diffusers_adm.conversion import PRESETS
from diffusers_adm.conversion.openai_flags import model_config, scheduler_config
from diffusers_adm.training import build_unet, load_noise_scheduler, load_unet_config, low_res_channels, parse_args
from diffusers_adm.training.classifiers import build_classifier, load_classifier_config


train_adm, train_classifier = load_script("train_adm"), load_script("train_classifier")
train_super_resolution = load_script("train_super_resolution")
SCRIPTS = {"unet": train_adm, "classifier": train_classifier, "upsampler": train_super_resolution}
CONFIGS = REPOSITORY / "training" / "configs" / "openai"


def test_every_published_checkpoint_has_a_recipe_and_every_network_is_used():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PRESETS)
    used = {yaml.safe_load(path.read_text())["model_config_name_or_path"] for path in CONFIGS.glob("*.yaml")}
    assert used == {path.relative_to(REPOSITORY).as_posix() for path in CONFIGS.glob("*.json")}


@pytest.mark.parametrize("name", PRESETS)
def test_the_network_is_that_of_the_published_checkpoint(name):
    preset = PRESETS[name]
    kind, flags = preset.settle()
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config = json.loads((REPOSITORY / recipe["model_config_name_or_path"]).read_text())
    cls = AdaGNClassifierModel if kind == "classifier" else AdaGNUNet2DModel
    in_channels = 6 if kind == "upsampler" else 3
    out_channels = 1000 if kind == "classifier" else 6
    with torch.device("meta"):
        network = cls.from_config(config)
        published = cls(
            **model_config(
                flags,
                preset.code_base,
                kind,
                in_channels=in_channels,
                out_channels=out_channels,
                num_classes=1000,
            )
        )
    assert config["_class_name"] == cls.__name__
    assert network.to_json_string() == published.to_json_string()
    assert sum(parameter.numel() for parameter in network.parameters()) == preset.num_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_the_training_script_takes_it(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # their paths are relative to it
    preset = PRESETS[name]
    kind, flags = preset.settle()
    arguments = parse_args(SCRIPTS[kind].ARGUMENT_TYPES, ["--config", str(CONFIGS / f"{name}.yaml")])
    model, data, diffusion, training, *rest = arguments
    assert (data.label_column is not None) == (kind == "classifier" or flags["class_cond"])
    process = LearnedVarianceDDPMScheduler(**scheduler_config(flags))
    scheduler = load_noise_scheduler(model, data, diffusion)
    torch.testing.assert_close(scheduler.betas, process.betas, rtol=1e-9, atol=0)
    if kind != "classifier":
        assert scheduler.config.variance_type == process.config.variance_type
        extra_channels = {"extra_channels": low_res_channels} if kind == "upsampler" else {}
        config, channels = load_unet_config(model, data, scheduler, **extra_channels)
        assert channels == 3
        with torch.device("meta"):
            unet = build_unet(model, data, config, 1000 if data.label_column else None)
        assert sum(parameter.numel() for parameter in unet.parameters()) == preset.num_parameters
    if kind == "classifier":
        config = load_classifier_config(model, data)
        with torch.device("meta"):
            classifier = build_classifier(model, data, config, dict.fromkeys(range(1000), ""))
        assert sum(parameter.numel() for parameter in classifier.parameters()) == preset.num_parameters
        assert training.noised
        assert not training.use_ema
        with pytest.raises(ValueError, match="the config of a classifier; this script trains U-Nets"):
            load_unet_config(model, data, scheduler)
    if kind == "upsampler":
        *_, super_resolution = rest
        assert super_resolution.low_res_size == flags["small_size"]
        super_resolution.inherit({})  # trained from scratch
        super_resolution.check(flags["large_size"], scheduler, None)
        with pytest.raises(ValueError, match="takes 6 channels and has 6 output channels; this"):
            load_unet_config(model, data, scheduler)
    if kind != "classifier":
        # LossType of the original: RESCALED_KL, RESCALED_MSE or MSE.
        expected = "vlb" if flags["use_kl"] else "hybrid" if flags["rescale_learned_sigmas"] else "hybrid_unscaled"
        assert diffusion.objective == expected
        assert training.ema_max_decay == 0.9999
