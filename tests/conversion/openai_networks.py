"""Small networks of all kinds: the flags that they are trained with, and what these mean, said independently."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from openai_forward import Spec, Weights, classifier, unet


@dataclass(frozen=True)
class Network:
    """`size`: of the images that the tests send through it; `image_size` of the flags where only that will do."""

    kind: str
    code_base: str
    flags: str
    spec: Spec
    size: int = 16

    def forward(self, weights, *args):
        return (classifier if self.kind == "classifier" else unet)(weights, self.spec, *args)

    def inputs(self):
        """A batch of two: images, timesteps, and classes where it has any."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, self.spec.in_channels, self.size, self.size, generator=generator)
        t = torch.tensor([3, round(1000 / self.spec.time_scale) - 1])
        return (x, t) if self.spec.classes is None else (x, t, torch.tensor([0, self.spec.classes - 1]))

    @functools.cache  # noqa: B019 (networks are few, and live as long as the tests)
    def weights(self):
        """Random ones, always the same: a copy is to be changed, not these."""
        weights = Weights()
        with torch.no_grad():
            self.forward(weights, *self.inputs())
        return weights

    def save(self, folder: Path) -> Path:
        file = folder / "model.pt"
        torch.save(dict(self.weights()), file)
        return file


def guided(flags, size=16, **spec):
    flags = f"--image_size 16 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --attention_resolutions 8 {flags}"
    return Network("unet", "guided-diffusion", flags, Spec(**spec), size)


def noisy_classifier(flags, size=16, **spec):
    flags = f"--image_size 64 --classifier_width 64 --classifier_depth 1 {flags}"
    spec = {"width": 64, "multiples": (1, 2, 3, 4), "head_channels": 64, "out_channels": 1000, **spec}
    return Network("classifier", "guided-diffusion", flags, Spec(**spec), size)


SIX_TO_SIX = {"in_channels": 6, "out_channels": 6}
# Where a flag is given twice, the last one counts, as on every command line.
NETWORKS = {
    "defaults": guided(""),
    "new-order": guided("--use_new_attention_order True", qkv_first=True),
    "one-head": guided("--num_heads 1", heads=1),
    "more-heads-up": guided("--num_heads 2 --num_heads_upsample 8", heads=2, heads_up=8),
    "fewer-heads-up-new-order": guided(
        "--num_heads 4 --num_heads_upsample 1 --use_new_attention_order True", heads_up=1, qkv_first=True
    ),
    "head-channels": guided(
        "--num_heads 1 --num_heads_upsample 2 --num_head_channels 16 --learn_sigma True",
        head_channels=16,
        out_channels=6,
    ),
    "residual": guided(
        "--resblock_updown True --learn_sigma True --class_cond True", residual=True, out_channels=6, classes=1000
    ),
    "residual-without-scale-shift": guided(
        "--resblock_updown True --use_scale_shift_norm False", residual=True, scale_shift=False
    ),
    "without-scale-shift": guided("--use_scale_shift_norm False", scale_shift=False),
    "attention-everywhere": guided("--attention_resolutions 16,8", attention=frozenset({1, 2})),
    # The original rounds: 16 // 5 = 3 and 16 // 32 = 0 are the factors of no level, 16 // 7 = 2 is.
    "attention-in-the-middle-alone": guided("--attention_resolutions 5,32", attention=frozenset()),
    "attention-rounded": guided("--attention_resolutions 7,7"),
    "one-level": guided("--channel_mult 2 --num_res_blocks 2", multiples=(2,), layers=2),
    "narrowing": guided("--channel_mult 3,1,2 --resblock_updown True", multiples=(3, 1, 2), residual=True),
    "three-layers": guided("--num_res_blocks 3", layers=3),
    "rescaled-timesteps": guided("--diffusion_steps 4000 --rescale_timesteps True", time_scale=0.25),
    "grey-five-classes": guided("--learn_sigma True --class_cond True", in_channels=1, out_channels=2, classes=5),
    "four-channels": guided("", in_channels=4, out_channels=4),
    # U-Nets that take further channels behind the noisy image, or in front of it: conditions of whatever kind.
    "mask-of-four-modalities": guided("--learn_sigma True", in_channels=5, out_channels=2),
    "mask-of-an-rgb-image": guided("--learn_sigma True", in_channels=4, out_channels=2),
    "image-to-image": guided("--learn_sigma True --use_new_attention_order True", qkv_first=True, **SIX_TO_SIX),
    "image-to-image-without-variance": guided("", in_channels=6, out_channels=3),
    "image-and-mask-without-variance": guided("--resblock_updown True", in_channels=4, out_channels=3, residual=True),
    "inpainter": guided("--learn_sigma True --class_cond True", in_channels=7, out_channels=6, classes=1000),
    "six-channels": guided("--learn_sigma False", **SIX_TO_SIX),
    "as-512": Network(
        "unet",
        "guided-diffusion",
        "--image_size 512 --num_channels 64 --num_res_blocks 1 --num_head_channels 32 --attention_resolutions 32,16,8"
        " --resblock_updown True --learn_sigma True",
        Spec(
            width=64,
            multiples=(0.5, 1, 1, 2, 2, 4, 4),
            attention=frozenset({16, 32, 64}),
            head_channels=32,
            residual=True,
            out_channels=6,
        ),
        size=64,
    ),
    "improved-32": Network(
        "unet",
        "improved-diffusion",
        "--image_size 32 --num_channels 32 --num_res_blocks 1 --learn_sigma True --diffusion_steps 4000",
        Spec(multiples=(1, 2, 2, 2), attention=frozenset({2, 4}), out_channels=6, time_scale=0.25),
        size=16,
    ),
    "improved-upsampler": Network(
        "upsampler",
        "improved-diffusion",
        "--large_size 64 --small_size 16 --num_channels 32 --num_res_blocks 1 --learn_sigma True --class_cond True"
        " --rescale_timesteps False --num_heads_upsample 1",
        Spec(
            multiples=(1, 2, 3, 4), attention=frozenset({4, 8}), in_channels=6, out_channels=6, heads_up=1, classes=1000
        ),
    ),
    "upsampler": Network(
        "upsampler",
        "guided-diffusion",
        "--large_size 512 --small_size 128 --num_channels 32 --num_res_blocks 1 --resblock_updown True"
        " --attention_resolutions 16 --num_head_channels 32",
        Spec(
            multiples=(1, 1, 2, 2, 4, 4),
            attention=frozenset({32}),
            in_channels=6,
            out_channels=3,
            head_channels=32,
            residual=True,
        ),
        size=32,
    ),
    "grey-upsampler": Network(
        "upsampler",
        "guided-diffusion",
        "--large_size 64 --num_channels 32 --num_res_blocks 1 --learn_sigma True",
        Spec(multiples=(1, 2, 3, 4), attention=frozenset({4, 8}), in_channels=2, out_channels=2),
    ),
    "latent-upsampler": Network(
        "upsampler",
        "guided-diffusion",
        "--large_size 64 --num_channels 32 --num_res_blocks 1",
        Spec(multiples=(1, 2, 3, 4), attention=frozenset({4, 8}), in_channels=8, out_channels=4),
    ),
    "attention-pool": noisy_classifier(
        "--classifier_attention_resolutions 8", size=64, attention=frozenset({8}), residual=True, pool="attention"
    ),
    "adaptive-pool": noisy_classifier(
        "--classifier_pool adaptive --classifier_use_scale_shift_norm False --classifier_attention_resolutions 16",
        attention=frozenset({4}),
        residual=True,
        scale_shift=False,
        pool="adaptive",
    ),
    "spatial-pool": noisy_classifier(
        "--classifier_pool spatial --classifier_resblock_updown False --classifier_attention_resolutions 8"
        " --rescale_timesteps True --diffusion_steps 100",
        attention=frozenset({8}),
        pool="spatial",
        time_scale=10.0,
    ),
    "four-channel-classifier": noisy_classifier(
        "--classifier_pool adaptive --classifier_resblock_updown False --classifier_attention_resolutions 8",
        attention=frozenset({8}),
        pool="adaptive",
        in_channels=4,
        out_channels=5,
    ),
    "spatial-v2-pool-seven-classes": noisy_classifier(
        "--classifier_pool spatial_v2 --classifier_resblock_updown False --classifier_use_scale_shift_norm False"
        " --classifier_attention_resolutions 32,16",
        attention=frozenset({2, 4}),
        scale_shift=False,
        pool="spatial_v2",
        out_channels=7,
    ),
}
