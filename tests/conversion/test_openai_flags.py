"""The flags of OpenAI's scripts: how they are read, and what networks and diffusion processes they mean."""

import pytest
import torch

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.conversion import PRESETS
from diffusers_adm.conversion.common import find_preset
from diffusers_adm.conversion.openai_flags import (
    default_flags,
    model_config,
    parse_flags,
    possible_kinds,
    scheduler_config,
)


# From guided-diffusion's README, the variables put in.
GUIDED_SAMPLING = (
    "python classifier_sample.py --attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1"
    " --image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64"
    " --num_res_blocks 3 --resblock_updown True --use_new_attention_order True --use_fp16 True"
    " --use_scale_shift_norm True --classifier_scale 1.0 --classifier_path models/64x64_classifier.pt"
    " --classifier_depth 4 --model_path models/64x64_diffusion.pt --batch_size 4 --num_samples 100"
    " --timestep_respacing 250"
)


def config_of(flags, kind="unet", code_base="guided-diffusion", out_channels=3):
    given, _, _ = parse_flags(flags, code_base)
    return model_config(
        default_flags(code_base, kind) | given,
        code_base,
        kind,
        in_channels=3,
        out_channels=out_channels,
        num_classes=10,
    )


def process_of(flags, code_base="guided-diffusion"):
    given, _, _ = parse_flags(flags, code_base)
    return LearnedVarianceDDPMScheduler(**scheduler_config(default_flags(code_base, "unet") | given))


@pytest.mark.parametrize(
    "flags",
    [
        "--image_size 32 --class_cond True --dropout 0.1",
        "--image_size=32 --class_cond=true --dropout=0.1",
        "--image_size 64 --class_cond no --dropout 0.1 --image_size 32 --class_cond yes",
        "mpiexec -n 8 python scripts/image_sample.py --image_size '32' --class_cond 1 --dropout 1e-1",
        {"image_size": 32, "class_cond": True, "dropout": 0.1},
        {"--image_size": "32", "class_cond": "T", "dropout": "0.1"},
    ],
)
def test_flags_are_read_as_the_scripts_read_them(flags):
    given, kind, ignored = parse_flags(flags, "guided-diffusion")
    assert given == {"image_size": 32, "class_cond": True, "dropout": 0.1}
    assert [type(value) for value in given.values()] == [int, bool, float]
    assert kind == "unet"
    assert ignored == []


def test_lists_become_the_words_of_the_scripts():
    given, _, _ = parse_flags({"channel_mult": (1, 2, 2), "attention_resolutions": [16, 8]}, "guided-diffusion")
    assert given == {"channel_mult": "1,2,2", "attention_resolutions": "16,8"}


def test_a_whole_command_line_can_be_pasted():
    given, kind, ignored = parse_flags(GUIDED_SAMPLING, "guided-diffusion")
    assert given["num_channels"] == 192
    assert given["classifier_depth"] == 4
    assert set(ignored) == {"classifier_scale", "classifier_path", "model_path", "batch_size", "num_samples"}
    # The file tells which of the two networks it holds.
    assert kind is None
    assert possible_kinds(given, "guided-diffusion") == ["unet", "classifier"]


@pytest.mark.parametrize(
    "flags, kinds",
    [
        ("--image_size 64 --num_channels 128", ["unet"]),
        ("--channel_mult 1,2", ["unet"]),
        ("--classifier_width 128 --image_size 64", ["classifier"]),
        ("--large_size 256 --num_channels 128", ["upsampler"]),
        ("--num_channels 128", ["unet", "upsampler"]),
        ("--image_size 64 --learn_sigma True", ["unet", "classifier"]),
        ("--noise_schedule cosine", ["unet", "classifier", "upsampler"]),
        ("", ["unet", "classifier", "upsampler"]),
    ],
)
def test_the_kind_of_network_follows_from_the_flags(flags, kinds):
    given, kind, _ = parse_flags(flags, "guided-diffusion")
    assert possible_kinds(given, "guided-diffusion") == kinds
    assert kind == (kinds[0] if len(kinds) == 1 else None)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image_sise 64", r"hold --image_sise, which guided-diffusion does not have. Did you mean `image_size`\?"),
        ("--image_size", "every flag needs one value .* '--image_size' does not fit"),
        ("--image_size --class_cond True", "'--image_size' does not fit"),
        ("--image_size 64 $DIFFUSION_FLAGS", r"'\$DIFFUSION_FLAGS' does not fit"),
        ("image_size 64", "'image_size' does not fit"),
        ("--image_size 64 '", "this is not a command line"),
        ("--image_size big", "`--image_size` is 'big'; it takes a value like 64"),
        ({"image_size": 64.5}, "`--image_size` is 64.5; it takes a value like 64"),
        ("--class_cond maybe", "`--class_cond` is 'maybe'; it takes True or False"),
        ("--large_size 256 --image_size 64", "more than one network: --large_size .* do not have --image_size"),
        ("--large_size 256 --classifier_width 64", "more than one network"),
    ],
)
def test_flags_that_cannot_be_read(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_flags(flags, "guided-diffusion")


def test_flags_of_the_other_code_base():
    assert parse_flags("--sigma_small True", "improved-diffusion")[0] == {"sigma_small": True}
    assert parse_flags("--use_fp16 True", "improved-diffusion")[0] == {"use_fp16": True}
    with pytest.raises(ValueError, match="--sigma_small, which guided-diffusion does not have"):
        parse_flags("--sigma_small True", "guided-diffusion")
    for flag in ("--resblock_updown True", "--classifier_width 64", "--channel_mult 1,2"):
        with pytest.raises(ValueError, match="which improved-diffusion does not have"):
            parse_flags(flag, "improved-diffusion")


def test_channels_of_each_level():
    assert config_of("--image_size 512 --num_channels 64")["block_out_channels"] == (32, 64, 64, 128, 128, 256, 256)
    assert config_of("--image_size 128 --num_channels 32")["block_out_channels"] == (32, 32, 64, 96, 128)
    assert config_of("--image_size 24 --num_channels 32 --channel_mult 1,3")["block_out_channels"] == (32, 96)
    upsampler = config_of("--large_size 512 --num_channels 32", kind="upsampler")
    assert upsampler["block_out_channels"] == (32, 32, 64, 64, 128, 128)
    improved = config_of("--image_size 32 --num_channels 32", code_base="improved-diffusion")
    assert improved["block_out_channels"] == (32, 64, 64, 64)


@pytest.mark.parametrize(
    "flags, kind, code_base, message",
    [
        (
            "--image_size 32",
            "unet",
            "guided-diffusion",
            "`--image_size` is 32, .* for 64, 128, 256, 512. Pass `--channel_",
        ),
        ("--image_size 128", "unet", "improved-diffusion", "has no channels per level; it has them for 32, 64, 256"),
        ("--large_size 128", "upsampler", "guided-diffusion", "`--large_size` is 128"),
        ("--channel_mult one,two", "unet", "guided-diffusion", "takes one number for each level"),
        ("--attention_resolutions all", "unet", "guided-diffusion", "takes sizes of feature maps"),
        ("--classifier_attention_resolutions 0", "classifier", "guided-diffusion", "takes sizes of feature maps"),
        ("--num_head_channels 48", "unet", "guided-diffusion", "Heads of 48 channels do not divide"),
        ("--classifier_width 32", "classifier", "guided-diffusion", "Heads of 64 channels do not divide"),
    ],
)
def test_flags_that_describe_no_network(flags, kind, code_base, message):
    with pytest.raises(ValueError, match=message):
        config_of(flags, kind, code_base)


def test_linear_betas_are_stretched_over_the_steps():
    betas = process_of("--diffusion_steps 250").betas
    # Nichol & Dhariwal train with 4000 steps; the betas of Ho et al. (2020) are for 1000, from 1e-4 to 0.02.
    torch.testing.assert_close(betas, torch.linspace(4e-4, 0.08, 250, dtype=torch.float64), rtol=1e-9, atol=0)


def test_cosine_betas():
    betas = process_of("--noise_schedule cosine --diffusion_steps 4000").betas
    t = torch.arange(4001, dtype=torch.float64) / 4000
    bar = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2  # Nichol & Dhariwal 2021, eq. 17
    torch.testing.assert_close(betas, (1 - bar[1:] / bar[:-1]).clamp(max=0.999), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "flags, code_base, expected",
    [
        ("", "guided-diffusion", {"variance_type": "fixed_large", "prediction_type": "epsilon", "clip_sample": True}),
        ("--learn_sigma True", "guided-diffusion", {"variance_type": "learned_range"}),
        ("--sigma_small True", "improved-diffusion", {"variance_type": "fixed_small"}),
        ("--sigma_small True --learn_sigma True", "improved-diffusion", {"variance_type": "learned_range"}),
        ("--predict_xstart True", "guided-diffusion", {"prediction_type": "sample"}),
        ("--clip_denoised False", "guided-diffusion", {"clip_sample": False}),
    ],
)
def test_the_diffusion_process(flags, code_base, expected):
    config = process_of(flags, code_base).config
    assert {key: config[key] for key in expected} == expected


def test_a_process_that_does_not_exist():
    with pytest.raises(ValueError, match="'quadratic'; it must be one of .'linear', 'cosine'"):
        process_of("--noise_schedule quadratic")
    with pytest.raises(ValueError, match="`--diffusion_steps` is 0"):
        process_of("--diffusion_steps 0")


@pytest.mark.parametrize(
    "flags, code_base, scale",
    [
        ("", "guided-diffusion", None),
        ("--rescale_timesteps True", "guided-diffusion", None),  # 1000 steps of 1000
        ("--rescale_timesteps True --diffusion_steps 4000", "guided-diffusion", 0.25),
        ("--diffusion_steps 4000", "guided-diffusion", None),
        ("--diffusion_steps 4000", "improved-diffusion", 0.25),
        ("--diffusion_steps 100", "improved-diffusion", 10.0),
        ("--diffusion_steps 4000 --rescale_timesteps False", "improved-diffusion", None),
    ],
)
def test_rescaled_timesteps(flags, code_base, scale):
    assert config_of(flags, code_base=code_base).get("timestep_scale") == scale


def test_presets():
    assert len(PRESETS) == 23
    assert find_preset("lsun_cat.pt", PRESETS) is PRESETS["lsun_cat"]
    assert PRESETS["lsun_cat"].url("lsun_cat").endswith("/diffusion/jul-2021/lsun_cat.pt")
    assert PRESETS["upsample_cond_500K"].url("upsample_cond_500K").endswith("/march-2021/upsample_cond_500K.pt")
    with pytest.raises(ValueError, match="`preset` is 'lsun_cats'; .* Did you mean `lsun_cat`"):
        find_preset("lsun_cats", PRESETS)
    with pytest.raises(ValueError, match="must be one of 64x64_diffusion"):
        find_preset("?", PRESETS)


@pytest.mark.parametrize(
    "name, kind, steps, schedule, time_scale",
    [
        ("64x64_diffusion", "unet", 1000, "squaredcos_cap_v2", None),
        ("512x512_diffusion", "unet", 1000, "linear", None),
        ("lsun_horse_nodropout", "unet", 1000, "linear", None),
        ("128_512_upsampler", "upsampler", 1000, "linear", None),
        ("64x64_classifier", "classifier", 1000, "squaredcos_cap_v2", None),
        ("256x256_classifier", "classifier", 1000, "linear", None),
        ("imagenet64_uncond_vlb_100M_1500K", "unet", 4000, "squaredcos_cap_v2", 0.25),
        ("imagenet64_cond_270M_250K", "unet", 4000, "squaredcos_cap_v2", None),
        ("cifar10_uncond_50M_500K", "unet", 4000, "squaredcos_cap_v2", 0.25),
        ("lsun_uncond_100M_1200K_bs128", "unet", 1000, "linear", None),
        ("upsample_cond_500K", "upsampler", 4000, "linear", None),
    ],
)
def test_processes_of_the_published_checkpoints(name, kind, steps, schedule, time_scale):
    """From the two READMEs. All of them learn the variance (of a classifier: the network that it guides does)."""
    preset = PRESETS[name]
    found_kind, flags = preset.settle()
    assert found_kind == kind
    config = scheduler_config(flags)
    assert config["variance_type"] == "learned_range"
    assert (config["num_train_timesteps"], config["beta_schedule"]) == (steps, schedule)
    network = model_config(flags, preset.code_base, kind, in_channels=3, out_channels=3, num_classes=1000)
    assert network.get("timestep_scale") == time_scale
