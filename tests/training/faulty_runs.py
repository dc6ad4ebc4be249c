"""A small training script, and the faults that the tests of runs make happen in it."""

import contextlib
import json
import os

import torch
from runs import EMOJI, SHORT_RUN, flags, own_process_state, reset_accelerate
from scripts import load_script
from toy_models import TOY_CONFIG

from diffusers_adm.data.images import ImageDataset
from diffusers_adm.training import TrainingRun


def arguments_of(folder, **changes):
    """A toy diffusion model on 16 images, in batches of 4: four batches an epoch of one process."""
    folder.mkdir(exist_ok=True)
    config = folder / "model.json"
    config.write_text(json.dumps(TOY_CONFIG))
    return (
        SHORT_RUN
        | {
            "data_files": EMOJI,
            "max_train_samples": 16,
            "max_train_steps": 5,
            "train_batch_size": 4,
            "learning_rate": 1e-3,
            "checkpointing_steps": 100,
            "resolution": 8,
            "model_config_name_or_path": str(config),
            "output_dir": str(folder / "run"),
        }
        | changes
    )


def train(arguments, **functions):
    """Trains in this process, with other `functions` in place of those of the script; returns the exit code."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with own_process_state("train_adm"):
        reset_accelerate()
        script = load_script("train_adm")
        vars(script).update(functions)
        try:
            script.main(flags(**arguments))
        except SystemExit as stop:
            return stop.code
    return 0


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def poisoned(is_poisoned):
    """Images of NaN where `is_poisoned(epoch, index)`, as of a file that a decoder misreads."""
    read = ImageDataset.__getitem__

    def read_poisoned(self, index):
        example = read(self, index)
        if is_poisoned(self.epoch, index):
            example["images"] = torch.full_like(example["images"], torch.nan)
        return example

    return replaced(ImageDataset, "__getitem__", read_poisoned)


def without_update(steps):
    """The optimizer does not move in these steps, counted from 1; everything else is as ever."""
    take = TrainingRun.step_optimizer

    def step_optimizer(self):
        if self.progress.global_step + 1 not in steps:
            return take(self)
        self.optimizer.zero_grad()
        self.step_was_taken = False

    return replaced(TrainingRun, "step_optimizer", step_optimizer)


def fits(most, where="forward"):
    """A device whose memory suffices for `most` images at once. Returns the sizes of the batches that were tried."""
    from diffusers_adm import AdaGNUNet2DModel

    forward, sizes = AdaGNUNet2DModel.forward, []

    class Exhausted(torch.autograd.Function):
        @staticmethod
        def forward(context, values):
            return values.clone()

        @staticmethod
        def backward(context, gradient):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def limited(self, sample, *args, **kwargs):
        sizes.append(len(sample))
        output = forward(self, sample, *args, **kwargs)
        if len(sample) > most:
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            output.sample = Exhausted.apply(output.sample)
        return output

    @contextlib.contextmanager
    def limit():
        with replaced(AdaGNUNet2DModel, "forward", limited):
            yield sizes

    return limit()
