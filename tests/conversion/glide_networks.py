"""Small networks of GLIDE's: the flags that they are trained with, and what these mean, said independently."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from openai_forward import Spec, TextSpec, Weights, glide


@dataclass(frozen=True)
class GLIDENetwork:
    kind: str
    flags: str
    spec: Spec

    def forward(self, weights, *args):
        return glide(weights, self.spec, *args)

    def inputs(self):
        """A batch of three: images, timesteps, and captions that are full, short and empty."""
        generator, text = torch.Generator().manual_seed(1), self.spec.text
        x = torch.randn(3, self.spec.in_channels, 16, 16, generator=generator)
        tokens = torch.randint(0, text.tokens, (3, text.length), generator=generator)
        mask = torch.arange(text.length) < torch.tensor([[text.length], [2], [0]])
        return x, torch.tensor([3, 500, 999]), tokens, mask

    @functools.cache  # noqa: B019 (networks are few, and live as long as the tests)
    def weights(self):
        """Random ones, always the same: a copy is to be changed, not these."""
        weights = Weights()
        with torch.no_grad():
            self.forward(weights, *self.inputs())
        return weights

    def save(self, folder: Path, dtype=torch.float32) -> Path:
        file = folder / "model.pt"
        torch.save({name: tensor.to(dtype) for name, tensor in self.weights().items()}, file)
        return file


FLAGS = (
    "--image_size 16 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --attention_resolutions 8"
    " --num_head_channels 16 --text_ctx 6 --xf_width 24 --xf_layers 2 --xf_heads 3"
)


def network(kind, flags="", in_channels=3, text=None, **spec):
    spec = {"head_channels": 16, **spec}
    text = TextSpec(**(text or {}))
    return GLIDENetwork(kind, f"{FLAGS} {flags}", Spec(**spec, in_channels=in_channels, **COMMON, text=text))


COMMON = {"out_channels": 6, "residual": True}
# Where a flag is given twice, the last one counts, as on every command line.
GLIDE_NETWORKS = {
    "base": network("base"),
    "base-inpaint": network("base-inpaint", "--inpaint True", in_channels=7),
    "upsample": network("upsample", "--super_res True", in_channels=6),
    "upsample-inpaint": network("upsample-inpaint", "--super_res True --inpaint True", in_channels=10),
    "heads": network(
        "base", "--num_head_channels -1 --num_heads 2 --num_heads_upsample 4", head_channels=None, heads=2, heads_up=4
    ),
    "bare-text": network(
        "base",
        "--xf_padding False --xf_final_ln False --xf_heads 2",
        text={"padding": False, "final_norm": False, "heads": 2},
    ),
    "deep": network(
        "base",
        "--use_scale_shift_norm False --attention_resolutions 16,8 --num_res_blocks 2 --xf_layers 3",
        scale_shift=False,
        attention=frozenset({1, 2}),
        layers=2,
        text={"layers": 3},
    ),
}
