"""The commands: what `diffusers-adm` calls them, and the modules that they are."""

from __future__ import annotations

from typing import Literal, NamedTuple


# "here": runs in this process only. "both": also in several, with `--`. "launched": always by `accelerate launch`.
Start = Literal["here", "both", "launched"]


class Command(NamedTuple):
    """
    A command.

    Attributes:
        name: One or two words.
        module: The module with its function `main`.
        summary: One line for `--help`.
        start: How it is started.
        first_arguments: Arguments that `main` gets before those of the user.
    """

    name: str
    module: str
    summary: str
    start: Start = "here"
    first_arguments: tuple[str, ...] = ()

    @property
    def run_name(self) -> str:
        """What `python -m` and `accelerate launch -m` call it."""
        return self.module.removesuffix(".__main__")


def _scripts() -> list[Command]:
    summaries = {
        "adm": "a diffusion model: from scratch, fine-tuned, LoRA, inpainting, decoders of unCLIP",
        "autoencoder": "an autoencoder, for diffusion in its latents",
        "classifier": "a classifier, of noisy images for guidance or of clean ones for evaluation",
        "clip": "a CLIP, which embeds images and texts in one space",
        "controlnet": "a ControlNet for a trained model",
        "image-to-image": "a model of images given other images, from pairs",
        "prior": "a prior of unCLIP, from captions to image embeddings",
        "super-resolution": "an upsampler",
    }
    return [
        Command(f"train {name}", f"diffusers_adm.scripts.train_{name.replace('-', '_')}", f"Train {what}.", "launched")
        for name, what in summaries.items()
    ]


COMMANDS = (
    *_scripts(),
    Command("train tokenizer", "diffusers_adm.data.tokenizer", "Train a tokenizer on captions."),
    Command(
        "train text-encoder",
        "diffusers_adm.training.text_pretraining",
        "Pretrain a text encoder by predicting latents from captions.",
    ),
    Command(
        "post-hoc-ema",
        "diffusers_adm.training.post_hoc_ema",
        "Write the result of a run with an average of the weights of another length.",
    ),
    Command("encode latents", "diffusers_adm.data.encode_latents", "Encode images with an autoencoder, for training."),
    Command(
        "encode embeddings", "diffusers_adm.data.encode_embeddings", "Encode images with a CLIP, for priors and unCLIP."
    ),
    Command("sample", "diffusers_adm.evaluation.sample.__main__", "Generate many images with a saved model.", "both"),
    Command(
        "evaluate frechet",
        "diffusers_adm.evaluation.frechet.__main__",
        "Compare samples with images: Frechet distance, precision, recall and others.",
        "both",
    ),
    Command(
        "evaluate bits-per-dim",
        "diffusers_adm.evaluation.bits_per_dim.__main__",
        "Measure the variational bound of a model on images.",
        "both",
    ),
    Command(
        "convert openai",
        "diffusers_adm.conversion.openai",
        "Convert a checkpoint of guided-diffusion or improved-diffusion, or export one.",
    ),
    Command("convert glide", "diffusers_adm.conversion.glide", "Convert a checkpoint of GLIDE."),
    Command(
        "push",
        "diffusers_adm.hub.__main__",
        "Push a pipeline, a model or an adapter to the Hugging Face Hub.",
        first_arguments=("push",),
    ),
    Command(
        "push-space",
        "diffusers_adm.hub.__main__",
        "Push the Space to the Hub, from a clone of the repository.",
        first_arguments=("push-space",),
    ),
)
