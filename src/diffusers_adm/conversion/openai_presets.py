"""
The checkpoints that OpenAI has published for guided-diffusion (July 2021) and improved-diffusion (March 2021).

Names are those of the files without `.pt`. Flags are from the READMEs of https://github.com/openai/guided-diffusion and
https://github.com/openai/improved-diffusion.
"""

from __future__ import annotations

from typing import NamedTuple

from .common import Flags, find_preset
from .openai_flags import CodeBase, Kind, default_flags, parse_flags


class Preset(NamedTuple):
    """Origin of a published checkpoint, and the flags that its network was built with."""

    code_base: CodeBase
    flags: str
    num_parameters: int

    def url(self, name: str) -> str:
        folder = "jul-2021" if self.code_base == "guided-diffusion" else "march-2021"
        return f"https://openaipublic.blob.core.windows.net/diffusion/{folder}/{name}.pt"

    def settle(self) -> tuple[Kind, Flags]:
        """The kind of network, and all flags of network and process."""
        given, kind, _ = parse_flags(self.flags, self.code_base)
        assert kind is not None  # every preset determines it
        return kind, default_flags(self.code_base, kind) | given


_ADM = "--learn_sigma True --resblock_updown True --use_scale_shift_norm True --diffusion_steps 1000"
_ADM_256 = f"{_ADM} --noise_schedule linear --attention_resolutions 32,16,8 --num_channels 256 --num_res_blocks 2"
_ADM_LSUN = f"{_ADM_256} --image_size 256 --class_cond False --num_head_channels 64"
_ADM_UPSAMPLER = f"{_ADM} --noise_schedule linear --class_cond True --num_channels 192 --num_res_blocks 2"
# The READMEs give no process for the classifiers; they see the noisy images of the network that they guide.
_CLASSIFIER = (
    "--classifier_attention_resolutions 32,16,8 --classifier_width 128 --classifier_pool attention"
    " --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
    " --learn_sigma True --diffusion_steps 1000"
)
_IDDPM_64 = "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True"
_IDDPM_CIFAR = "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3"
_IDDPM_COSINE = "--diffusion_steps 4000 --noise_schedule cosine"
_IDDPM_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True"
    " --use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear"
    " --rescale_learned_sigmas False --rescale_timesteps False"
)

PRESETS = {
    # guided-diffusion
    "64x64_diffusion": Preset(
        "guided-diffusion",
        f"{_ADM} --noise_schedule cosine --attention_resolutions 32,16,8 --image_size 64 --class_cond True"
        " --num_channels 192 --num_res_blocks 3 --num_head_channels 64 --use_new_attention_order True --dropout 0.1",
        295_904_454,
    ),
    "128x128_diffusion": Preset(
        "guided-diffusion", f"{_ADM_256} --image_size 128 --class_cond True --num_heads 4", 421_529_606
    ),
    "256x256_diffusion": Preset(
        "guided-diffusion", f"{_ADM_256} --image_size 256 --class_cond True --num_head_channels 64", 553_838_086
    ),
    "256x256_diffusion_uncond": Preset(
        "guided-diffusion", f"{_ADM_256} --image_size 256 --class_cond False --num_head_channels 64", 552_814_086
    ),
    "512x512_diffusion": Preset(
        "guided-diffusion", f"{_ADM_256} --image_size 512 --class_cond True --num_head_channels 64", 558_997_638
    ),
    "lsun_bedroom": Preset("guided-diffusion", f"{_ADM_LSUN} --dropout 0.1", 552_814_086),
    "lsun_cat": Preset("guided-diffusion", f"{_ADM_LSUN} --dropout 0.1", 552_814_086),
    "lsun_horse": Preset("guided-diffusion", f"{_ADM_LSUN} --dropout 0.1", 552_814_086),
    "lsun_horse_nodropout": Preset("guided-diffusion", f"{_ADM_LSUN} --dropout 0.0", 552_814_086),
    "64_256_upsampler": Preset(
        "guided-diffusion",
        f"{_ADM_UPSAMPLER} --attention_resolutions 32,16,8 --large_size 256 --small_size 64 --num_heads 4",
        311_795_910,
    ),
    "128_512_upsampler": Preset(
        "guided-diffusion",
        f"{_ADM_UPSAMPLER} --attention_resolutions 32,16 --large_size 512 --small_size 128 --num_head_channels 64",
        308_835_270,
    ),
    "64x64_classifier": Preset(
        "guided-diffusion", f"{_CLASSIFIER} --image_size 64 --classifier_depth 4 --noise_schedule cosine", 65_438_568
    ),
    "128x128_classifier": Preset(
        "guided-diffusion", f"{_CLASSIFIER} --image_size 128 --classifier_depth 2 --noise_schedule linear", 42_568_040
    ),
    "256x256_classifier": Preset(
        "guided-diffusion", f"{_CLASSIFIER} --image_size 256 --classifier_depth 2 --noise_schedule linear", 54_096_360
    ),
    "512x512_classifier": Preset(
        "guided-diffusion", f"{_CLASSIFIER} --image_size 512 --classifier_depth 2 --noise_schedule linear", 54_448_360
    ),
    # improved-diffusion
    "imagenet64_uncond_100M_1500K": Preset("improved-diffusion", f"{_IDDPM_64} {_IDDPM_COSINE}", 121_063_942),
    "imagenet64_uncond_vlb_100M_1500K": Preset(
        "improved-diffusion", f"{_IDDPM_64} {_IDDPM_COSINE} --use_kl True", 121_063_942
    ),
    "imagenet64_cond_270M_250K": Preset(
        "improved-diffusion",
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True"
        f" {_IDDPM_COSINE} --rescale_learned_sigmas False --rescale_timesteps False",
        273_049_350,
    ),
    "cifar10_uncond_50M_500K": Preset("improved-diffusion", f"{_IDDPM_CIFAR} {_IDDPM_COSINE}", 52_546_438),
    "cifar10_uncond_vlb_50M_500K": Preset(
        "improved-diffusion", f"{_IDDPM_CIFAR} {_IDDPM_COSINE} --use_kl True", 52_546_438
    ),
    "lsun_uncond_100M_1200K_bs128": Preset("improved-diffusion", _IDDPM_LSUN, 113_676_678),
    "lsun_uncond_100M_2400K_bs64": Preset("improved-diffusion", _IDDPM_LSUN, 113_676_678),
    "upsample_cond_500K": Preset(
        "improved-diffusion",
        "--large_size 256 --small_size 64 --num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True"
        " --diffusion_steps 4000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False",
        279_792_390,
    ),
}


def get_preset(name: str) -> Preset:
    """Looks up a published checkpoint by the name of its file, with or without `.pt`."""
    return find_preset(name.removesuffix(".pt"), PRESETS)
