"""What a run is built from: data loader, optimizer, learning rate, average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from diffusers.optimization import get_scheduler

from ..data.embeddings import EmbeddingDataset
from ..data.images import ImageDataset
from ..data.samplers import BalancedClassSampler, EpochShuffleSampler
from ..data.streaming import StreamDataset
from .arguments import DataArguments, TrainingArguments
from .ema import WeightAverage
from .interruption import keep_to_parent
from .sharding import base_optimizer, local_parameters


def build_dataloader(
    train_dataset: ImageDataset | EmbeddingDataset | StreamDataset,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> torch.utils.data.DataLoader:
    """
    Batches in an order that depends only on the seed and the epoch of `train_dataset`; with `class_balanced`, the
    classes equally often (unlabelled images count as one more). Incomplete batches are dropped. Streamed data have an
    order of their own, see `StreamOrder`.
    """
    sampler: torch.utils.data.Sampler[int] | None
    if isinstance(train_dataset, StreamDataset):
        sampler = None
    elif data_args.class_balanced:
        sampler = BalancedClassSampler(train_dataset, train_dataset.dataset["label"][:])
    else:
        sampler = EpochShuffleSampler(train_dataset)
    return torch.utils.data.DataLoader(
        train_dataset,
        batch_size=training_args.train_batch_size,
        sampler=sampler,
        num_workers=data_args.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        worker_init_fn=keep_to_parent,
    )


def prepare_stream(accelerator: Accelerator, dataloader: torch.utils.data.DataLoader) -> torch.utils.data.DataLoader:
    """
    Prepares a loader of a `StreamDataset`, which reads the examples of its process only: Accelerate puts batches on the
    device and follows the epoch. Its `prepare` would read all examples on the main process and send them to the others.
    """
    return prepare_data_loader(
        dataloader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    training_args: TrainingArguments,
    decays_vectors: bool = True,
    fused: bool = False,
) -> torch.optim.AdamW:
    """
    AdamW for these weights.

    Args:
        decays_vectors (`bool`): Whether the weight decay applies to gains, biases and scalars, too. Otherwise they are
            in a group of their own.
        fused (`bool`): Use PyTorch's kernel for the whole update of a weight. On a CPU it takes a third of the time.
            Not for GPUs: the gradient scaler of fp16 would not say which steps it has skipped.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    if not decays_vectors:
        vectors = [parameter for parameter in groups[0]["params"] if parameter.ndim < 2]
        matrices = [parameter for parameter in groups[0]["params"] if parameter.ndim >= 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "undecayed": True}]
    return torch.optim.AdamW(
        groups,
        lr=training_args.learning_rate,
        betas=(training_args.adam_beta1, training_args.adam_beta2),
        weight_decay=training_args.adam_weight_decay,
        eps=training_args.adam_epsilon,
        fused=fused or None,
    )


def build_lr_scheduler(
    optimizer: Any, training_args: TrainingArguments, max_train_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """
    The learning rate schedule for a prepared optimizer, to be stepped once per optimizer step. Do not prepare it:
    Accelerate would step it once per process.
    """
    return get_scheduler(
        training_args.lr_scheduler,
        optimizer=base_optimizer(optimizer),
        num_warmup_steps=training_args.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )


def build_ema(parameters: Iterable[torch.nn.Parameter], training_args: TrainingArguments) -> WeightAverage | None:
    """
    The moving average of these weights (of models not wrapped for distribution), or of the parts of them that this
    process has; None without `use_ema`.
    """
    if not training_args.use_ema:
        return None
    return WeightAverage(
        local_parameters(parameters),
        decay=training_args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=training_args.ema_inv_gamma,
        power=training_args.ema_power,
        foreach=True,  # when weights are swapped
    )
