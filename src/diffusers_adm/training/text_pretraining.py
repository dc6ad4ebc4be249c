"""
Pretrains a text encoder by predicting latents from captions, before a U-Net is trained with it.

    python -m diffusers_adm.training.text_pretraining --train_data_dir runs/latents --caption_column text \
        --text_encoder_config_name_or_path training/configs/text_encoder_glide_emoji.json \
        --tokenizer_name_or_path runs/emoji-tokenizer --output_dir runs/emoji-text
    accelerate launch training/train_adm.py --text_encoder_name_or_path runs/emoji-text --train_text_encoder ...

At the last timesteps, x_t is noise, and all that the U-Net can predict is the mean of the images with the caption,
E[x_0 | caption]. This is where the captions of different images must be told apart, and a text encoder that starts
from random weights learns it slowly through the U-Net: it sees as many captions a step as the U-Net sees images. Here
two linear layers predict the latents from the pooled text and from the mean of the token states, without a U-Net, so
that a step of 128 captions takes a fraction of a second on a CPU. The layers are thrown away afterwards. It runs in one
process, and is not resumed.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from ..commands.arguments import arg, check_at_least, parse_args
from ..commands.errors import run_command
from ..conditioning.text import check_tokenizer, encode_captions, pads_to_max
from ..data.captions import CaptionTokens
from ..data.latents import PLAIN, LatentDataset, check_latents, find_stored_latents, load_latents
from ..data.samplers import BalancedClassSampler, EpochShuffleSampler
from ..data.seeding import derive_seed
from ..data.stored_rows import prepare_folder
from ..data.text_encoders import build_text_encoder, load_text_encoder, load_tokenizer


logger = logging.getLogger("diffusers_adm.training.text_pretraining")

MEASURED_AT_ONCE = 4096  # latents


@dataclass
class TextPretrainingArguments:
    train_data_dir: str = arg("latents", "Folder of latents that `diffusers_adm.data.encode_latents` wrote.")
    caption_column: str = arg("text", "Column of the captions: texts, or lists of which each epoch draws one text.")
    label_column: str | None = arg(None, "Column of labels, for `class_balanced`.")
    class_balanced: bool = arg(False, "Draw all classes equally often.")
    text_encoder_name_or_path: str | None = arg(None, "Text encoder to start from, or a pipeline with one.")
    text_encoder_config_name_or_path: str | None = arg(
        None, "Config of a text encoder to train from scratch: see the same argument of train_adm."
    )
    tokenizer_name_or_path: str | None = arg(None, "Tokenizer; none: that of `text_encoder_name_or_path`.")
    cache_dir: str | None = arg(None, "Cache folder of datasets and pretrained models.")
    train_batch_size: int = arg(128, "Captions a step.")
    max_train_steps: int = arg(4000, "Number of steps.")
    learning_rate: float = arg(1e-3, "Peak learning rate, which decreases to 0 (cosine).")
    lr_warmup_steps: int = arg(100, "Number of steps over which the learning rate rises.")
    max_grad_norm: float = arg(1.0, "Maximum gradient norm of the text encoder.")
    logging_steps: int = arg(200, "Log every this many steps.")
    seed: int = arg(0, "Random seed.")
    output_dir: str = arg("text-encoder", "New folder for the text encoder and its tokenizer.")

    def __post_init__(self):
        check_at_least(self, 1, "train_batch_size", "max_train_steps", "logging_steps")
        check_at_least(self, 0, "lr_warmup_steps")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` is {value}; it must be a positive number.")
        if (self.text_encoder_name_or_path is None) == (self.text_encoder_config_name_or_path is None):
            raise ValueError("Pass one of `text_encoder_name_or_path` and `text_encoder_config_name_or_path`.")
        if self.text_encoder_name_or_path is None and self.tokenizer_name_or_path is None:
            raise ValueError(
                "A text encoder from scratch (`text_encoder_config_name_or_path`) has no tokenizer. Pass "
                "`tokenizer_name_or_path`; `python -m diffusers_adm.training.tokenizer` makes one."
            )
        if self.class_balanced != (self.label_column is not None):
            raise ValueError(
                f"`label_column` is {self.label_column!r} and `class_balanced` {self.class_balanced}: labels serve to "
                "draw all classes equally often. Pass both, or neither."
            )
        if self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"`lr_warmup_steps` is {self.lr_warmup_steps} and `max_train_steps` {self.max_train_steps}, so the "
                "learning rate would never reach its peak. Pass fewer warm-up steps."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("This command runs in one process. Start it with `python -m`, not with several processes.")


class UnexplainedVariance(NamedTuple):
    """
    Mean square errors of the predicted latents, as fractions of their variance: near 1 at the start, near 0 for
    captions that each name one image.

    Attributes:
        pooled (`torch.Tensor` of shape `()`, *optional*): From the pooled text, where the encoder gives one.
        states (`torch.Tensor` of shape `()`): From the mean of the token states.
    """

    pooled: torch.Tensor | None
    states: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        return self.states if self.pooled is None else self.pooled + self.states


class LatentPredictor(nn.Module):
    """
    A text encoder with linear layers that predict standardised latents, `E[x_0 | caption]`.

    Args:
        text_encoder (`nn.Module`): See `encode_captions`.
        example (mapping of `torch.Tensor`): Tokens of captions, which tell the widths.
        mean (`torch.Tensor` of shape `(numbers of a latent,)`): Mean of the latents.
        std (`float`): Their standard deviation around it, over all numbers.
        pad_to_max (`bool`): See `pads_to_max`.
    """

    def __init__(
        self,
        text_encoder: nn.Module,
        example: Mapping[str, torch.Tensor],
        mean: torch.Tensor,
        std: float,
        pad_to_max: bool,
    ):
        super().__init__()
        self.text_encoder, self.pad_to_max, self.std = text_encoder, pad_to_max, std
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        with torch.no_grad():
            encoded = encode_captions(text_encoder, example, pad_to_max=pad_to_max)
        self.from_states = nn.Linear(encoded.hidden_states.shape[-1], len(mean))
        self.from_pooled = None if encoded.pooled is None else nn.Linear(encoded.pooled.shape[-1], len(mean))

    def forward(self, batch: Mapping[str, torch.Tensor]) -> UnexplainedVariance:
        """The errors for `input_ids` and `caption_mask` `(B, length)` and `latent_mean` `(B, C, H, W)`."""
        encoded = encode_captions(self.text_encoder, batch, pad_to_max=self.pad_to_max)
        targets = (batch["latent_mean"].flatten(1) - self.mean) / self.std
        weights = batch["caption_mask"][..., None].float()
        states = (encoded.hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)  # (B, width)
        pooled = None
        if self.from_pooled is not None and encoded.pooled is not None:
            pooled = (self.from_pooled(encoded.pooled) - targets).square().mean()
        return UnexplainedVariance(pooled, (self.from_states(states) - targets).square().mean())


def latent_moments(dataset: LatentDataset) -> tuple[torch.Tensor, float]:
    """
    Mean of the latents, float32 of shape `(numbers of a latent,)`, and their standard deviation around it. In two
    passes over parts of the data, in float64.
    """
    latents = dataset.latents.with_format("numpy")

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, len(latents), MEASURED_AT_ONCE):
            yield np.asarray(latents[start : start + MEASURED_AT_ONCE][PLAIN[0]], dtype=np.float64)

    mean = sum(part.sum(axis=0) for part in parts()) / len(latents)
    variance = sum(np.square(part - mean).sum(axis=0) for part in parts()) / len(latents)
    return torch.from_numpy(mean).float(), float(np.sqrt(variance.mean()))


def endless_batches(dataset: LatentDataset, labels: Sequence[int] | None, batch_size: int) -> Iterator[dict]:
    """Batches of one epoch after the other, which draws the captions anew."""
    sampler = EpochShuffleSampler(dataset) if labels is None else BalancedClassSampler(dataset, labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size, sampler=sampler, drop_last=len(dataset) >= batch_size)
    epoch = 0
    while True:
        dataset.set_epoch(epoch)
        yield from loader
        epoch += 1


def pretrain(
    predictor: LatentPredictor, batches: Iterator[dict], args: TextPretrainingArguments
) -> UnexplainedVariance:
    """Trains text encoder and linear layers. Returns the mean errors of the steps since the last line of the log."""
    device = predictor.mean.device
    optimizer = torch.optim.AdamW(predictor.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    sums, count = torch.zeros(2, device=device), 0
    for step, batch in zip(range(1, args.max_train_steps + 1), batches, strict=False):
        errors = predictor({name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)})
        optimizer.zero_grad()
        errors.loss.backward()
        nn.utils.clip_grad_norm_(predictor.text_encoder.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        sums += torch.stack([errors.states if part is None else part for part in errors]).detach()
        count += 1
        if step % args.logging_steps == 0 or step == args.max_train_steps:
            pooled, states = (sums / count).tolist()
            has_pooled = errors.pooled is not None
            if not math.isfinite(pooled + states):
                raise ValueError(
                    f"The loss is not finite at step {step}. Pass a smaller `learning_rate` than {args.learning_rate}."
                )
            from_pooled = f"{pooled:.4f} from the pooled text, " if has_pooled else ""
            logger.info(f"Step {step}: unexplained share {from_pooled}{states:.4f} from the states")
            last = UnexplainedVariance(torch.tensor(pooled) if has_pooled else None, torch.tensor(states))
            sums, count = torch.zeros_like(sums), 0
    return last


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    (args,) = parse_args(TextPretrainingArguments, argv, description=__doc__)
    partial = prepare_folder(args.output_dir)
    stored = find_stored_latents(args.train_data_dir)
    if stored is None:
        raise ValueError(
            f"`train_data_dir` {args.train_data_dir!r} holds no latents. `python -m diffusers_adm.data.encode_latents` "
            "makes them."
        )

    # 1. Text encoder
    name, hub = args.text_encoder_name_or_path, {"cache_dir": args.cache_dir}
    if args.tokenizer_name_or_path is not None:
        tokenizer = load_tokenizer("tokenizer_name_or_path", args.tokenizer_name_or_path, **hub)
    else:
        tokenizer = load_tokenizer("text_encoder_name_or_path", name, **hub)
    if name is None:
        text_encoder = build_text_encoder(args.text_encoder_config_name_or_path, tokenizer, args.seed)
    else:
        text_encoder = load_text_encoder("text_encoder_name_or_path", name, trained=True, **hub)
    check_tokenizer(text_encoder, tokenizer)
    pad_to_max = pads_to_max(text_encoder, {})

    # 2. Latents and captions
    rows, _ = load_latents(
        args.train_data_dir,
        stored,
        label_column=args.label_column,
        caption_column=args.caption_column,
        cache_dir=args.cache_dir,
    )
    rows = check_latents(rows, stored, args.train_data_dir, allow_unlabelled=not args.class_balanced)
    captions = CaptionTokens(rows["caption"][:], tokenizer, text_encoder, pad_to_max)
    dataset = LatentDataset(rows, stored.resolution, stored=stored, seed=args.seed, captions=captions)
    mean, std = latent_moments(dataset)
    if std == 0:
        raise ValueError(f"All {len(dataset)} latents in {args.train_data_dir} are equal: nothing can be learned.")

    # 3. Training
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(derive_seed(args.seed, "linear layers"))
    example = {key: value[None] for key, value in captions.empty.items()}
    predictor = LatentPredictor(text_encoder, example, mean, std, pad_to_max).to(device).train()
    labels = rows["label"][:] if args.class_balanced else None
    last = pretrain(predictor, endless_batches(dataset, labels, args.train_batch_size), args)

    # 4. The result
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    text_encoder.cpu().eval().save_pretrained(partial / "text_encoder")
    tokenizer.save_pretrained(partial / "tokenizer")
    os.replace(partial, args.output_dir)  # at once: a folder of this name is complete
    print(
        f"Text encoder and tokenizer in {args.output_dir}: the token states of a caption leave "
        f"{100 * float(last.states):.1f} % of the variance of {len(dataset)} latents unexplained."
    )


if __name__ == "__main__":
    run_command(main)
