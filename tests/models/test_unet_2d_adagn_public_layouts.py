"""
Layouts of public `UNet2DModel` repositories: names, shapes and number of weights at full width; at reduced width the
outputs, from folders as diffusers saves them today and as it saved them in 2022.
"""

import json

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from toy_models import fill_randomly

from diffusers_adm import AdaGNUNet2DModel


# Each comment says where a config comes from. "As published": the values of the repository's `config.json`. Files of
# diffusers are named relative to its repository.

# google/ddpm-cifar10-32, as published (the repository says `null` for `attention_head_dim`: one head).
DDPM_CIFAR10_32 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
# google/ddpm-cat-256, as published. google/ddpm-church-256, -bedroom-256, -celebahq-256 and their ddpm-ema- twins are
# reconstructed: one architecture for all images of 256 pixels (DDPM, appendix B), so one config.
DDPM_256 = {
    **DDPM_CIFAR10_32,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "sample_size": 256,
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
# CompVis/ldm-celebahq-256, folder `unet`, as published.
LDM_CELEBAHQ_256 = {
    **DDPM_CIFAR10_32,
    "attention_head_dim": 32,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-05,
    "sample_size": 64,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
}
# What people train with diffusers, anton-l/ddpm-butterflies-128 among them: docs/source/en/tutorials/basic_training.md
# and examples/unconditional_image_generation/train_unconditional.py.
BUTTERFLIES_128 = {
    "sample_size": 128,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
# openai/diffusers-cd_imagenet64_l2, -cd_imagenet64_lpips, -ct_imagenet64: scripts/convert_consistency_to_diffusers.py.
CONSISTENCY_IMAGENET_64 = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "block_out_channels": [192, 384, 576, 768],
    "attention_head_dim": 64,
    "down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "upsample_type": "resnet",
    "downsample_type": "resnet",
}
# openai/diffusers-cd_bedroom256_l2, -ct_bedroom256, -cd_cat256_l2, -ct_cat256 and the others of LSUN: the same script.
CONSISTENCY_LSUN_256 = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "num_class_embeds": None,
    "block_out_channels": [256, 256, 512, 512, 1024, 1024],
    "attention_head_dim": 64,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3,
    "resnet_time_scale_shift": "default",
    "upsample_type": "resnet",
    "downsample_type": "resnet",
}
# diffusers/consistency-models-test, folders `test_unet_class_cond` and (without classes) `test_unet`: the same script.
CONSISTENCY_TEST = {
    **CONSISTENCY_IMAGENET_64,
    "sample_size": 32,
    "layers_per_block": 2,
    "block_out_channels": [32, 64],
    "attention_head_dim": 8,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
# kakaobrain/karlo-v1-alpha, folder `super_res_first`: scripts/convert_kakao_brain_unclip_to_diffusers.py.
KARLO_SUPER_RESOLUTION = {
    "sample_size": 256,
    "layers_per_block": 3,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
    "block_out_channels": [320, 640, 960, 1280],
    "in_channels": 6,
    "out_channels": 3,
    "add_attention": False,
}
# openai/consistency-decoder: scripts/convert_consistency_decoder.py.
CONSISTENCY_DECODER = {
    "in_channels": 7,
    "out_channels": 6,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
    "block_out_channels": [320, 640, 1024, 1024],
    "layers_per_block": 3,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "learned",
    "num_train_timesteps": 1024,
    "add_attention": False,
}

# Config, divisor of the widths in the tests of numbers, millions of weights where a paper or model card says them.
LAYOUTS = {
    "google/ddpm-cifar10-32": (DDPM_CIFAR10_32, 8, 35.7),  # DDPM, appendix B
    "google/ddpm-cat-256": (DDPM_256, 8, 114),  # DDPM, appendix B
    "CompVis/ldm-celebahq-256": (LDM_CELEBAHQ_256, 14, 274),  # Latent diffusion, table 12
    "anton-l/ddpm-butterflies-128": (BUTTERFLIES_128, 8, None),
    "openai/diffusers-cd_imagenet64_l2": (CONSISTENCY_IMAGENET_64, 8, 296),  # ADM, table 4, the same architecture
    "openai/diffusers-ct_bedroom256": (CONSISTENCY_LSUN_256, 8, None),
    "diffusers/consistency-models-test/test_unet_class_cond": (CONSISTENCY_TEST, 1, None),
    "diffusers/consistency-models-test/test_unet": ({**CONSISTENCY_TEST, "num_class_embeds": None}, 1, None),
    "kakaobrain/karlo-v1-alpha/super_res_first": (KARLO_SUPER_RESOLUTION, 10, None),
    "openai/consistency-decoder": (CONSISTENCY_DECODER, 8, None),
}
GOOGLE = ["google/ddpm-cifar10-32", "google/ddpm-cat-256", "CompVis/ldm-celebahq-256"]


def reduced(name: str) -> dict:
    """The layout with fewer channels, groups, classes and pixels; everything else is as in the repository."""
    config, divisor, _ = LAYOUTS[name]
    smallest = 2 ** (len(config["block_out_channels"]) - 1)
    return {
        **config,
        "block_out_channels": [channels // divisor for channels in config["block_out_channels"]],
        "norm_num_groups": 4,
        "attn_norm_num_groups": config.get("attn_norm_num_groups") and 4,
        "attention_head_dim": config.get("attention_head_dim", 8) and 8,
        "num_class_embeds": config.get("num_class_embeds") and 10,
        # Twice the smallest size, so that a wrong padding or resampling meets more than one pixel at the bottom.
        "sample_size": 2 * smallest,
    }


def save_by_diffusers(name: str, folder) -> UNet2DModel:
    model = fill_randomly(UNet2DModel(**reduced(name)))
    model.save_pretrained(folder)
    return model


def load(folder) -> AdaGNUNet2DModel:
    model, info = AdaGNUNet2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model


def relative_error(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    config = theirs.config
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    labels = torch.tensor([1, 7]) if config.num_class_embeds else None
    with torch.no_grad():
        expected = theirs(sample, torch.tensor([3, 801]), class_labels=labels).sample
        output = ours(sample, torch.tensor([3, 801]), class_labels=labels).sample
    assert expected.std() > 0.1
    return ((output - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_names_and_shapes_at_full_width(name):
    config, _, millions = LAYOUTS[name]
    with torch.device("meta"):
        ours, theirs = AdaGNUNet2DModel(**config), UNet2DModel(**config)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    if millions is not None:
        assert count / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("name", LAYOUTS)
def test_folder_loads_and_gives_the_same_numbers(name, tmp_path):
    theirs = save_by_diffusers(name, tmp_path)
    assert relative_error(load(tmp_path), theirs) <= 1e-5


@pytest.mark.parametrize("name", GOOGLE)
def test_folder_of_2022_loads(name, tmp_path):
    """Attention named `query/key/value/proj_attn`, and a config without the arguments added to diffusers since."""
    theirs = save_by_diffusers(name, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for key, value in load_file(file).items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = value
    assert "mid_block.attentions.0.proj_attn.bias" in renamed
    assert not any(".to_" in key for key in renamed)
    save_file(renamed, file, metadata={"format": "pt"})
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    old = {key: config[key] for key in LAYOUTS[name][0]}
    file.write_text(json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", **old}))
    assert relative_error(load(tmp_path), theirs) <= 1e-5


@pytest.mark.parametrize("class_labels", [None, [1, 7]], ids=["test_unet", "test_unet_class_cond"])
def test_consistency_pipeline_generates_the_same(class_labels, tmp_path):
    """Its timesteps are fractions and can be negative: 250 log(sigma)."""
    name = "diffusers/consistency-models-test/test_unet" + ("_class_cond" if class_labels is not None else "")
    theirs = save_by_diffusers(name, tmp_path)
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    images = []
    for unet in (theirs, load(tmp_path)):
        pipe = ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        arguments = {"num_inference_steps": None, "timesteps": [22, 0], "class_labels": class_labels}
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(batch_size=2, generator=generator, output_type="np", **arguments).images)
    assert images[0].std() > 0.1
    torch.testing.assert_close(torch.from_numpy(images[1]), torch.from_numpy(images[0]), rtol=0, atol=1e-4)
