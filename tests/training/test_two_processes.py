"""
Two processes train as one does that accumulates two batches: the losses of every script.

Batch number n of the one is batch n // 2 of process n % 2 of the two, which each script's loader gives out in turn. The
random numbers of a batch depend on process and number, so the single process is seeded as they are; the rest of the
script does not know. CLIPs compare all images of a step, so there the single process has batches of twice the size.
"""

import pytest
import torch
from accelerate import Accelerator
from golden_losses import SCRIPTS, arguments_of, without_plots
from processes import run_distributed, start
from runs import flags, read_metrics
from scripts import load_script

from diffusers_adm.data.seeding import seed_step
from diffusers_adm.training import DataArguments, TrainingArguments, build_dataloader, rest_of_epoch
from diffusers_adm.training import run as training_run
from diffusers_adm.training.checkpoints import TrainingProgress


STEPS = 50


def train(script, argv):
    module = load_script(script)
    with without_plots(module):
        module.main(argv)


def train_alone(script, argv):
    training_run.seed_step = lambda seed, _, micro_step: seed_step(seed, micro_step % 2, micro_step // 2)
    Accelerator(cpu=True)
    train(script, argv)


def losses_of(folder):
    return torch.tensor([row["loss"] for row in read_metrics(folder) if "loss" in row], dtype=torch.float64)


def train_both(script, folder, steps):
    arguments = arguments_of(script, folder) | {"max_train_steps": steps}
    run_distributed(train, script, flags(**arguments | {"output_dir": folder / "two"}), timeout=300)
    alone = {"gradient_accumulation_steps": 2}
    if script == "train_clip":
        alone = {"train_batch_size": 2 * arguments["train_batch_size"]}
    process = start(train_alone, script, flags(**arguments | alone | {"output_dir": folder / "one"}))
    process.join(timeout=300)
    assert process.exitcode == 0
    two, one = losses_of(folder / "two"), losses_of(folder / "one")
    assert len(two) == len(one) == steps
    return two, one


def test_same_losses_at_first(tmp_path):
    two, one = train_both("train_adm", tmp_path, 2)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_same_losses_of_a_run(script, tmp_path):
    two, one = train_both(script, tmp_path, STEPS)
    assert abs(two[0] - one[0]) <= 1e-6 * max(1, abs(one[0]))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert one.std() > 1e-4  # they are not all the same


class Numbers(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length, self.seed, self.epoch = length, 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


def numbers_of_epochs(length):
    accelerator = Accelerator(cpu=True)
    arguments = TrainingArguments(output_dir="unused", train_batch_size=4)
    loader = accelerator.prepare(build_dataloader(Numbers(length), DataArguments(), arguments))
    progress, epochs = TrainingProgress(), []
    for _ in range(3):
        epochs.append([])
        for batch in rest_of_epoch(loader, progress):
            progress.count_batch()
            epochs[-1] += batch.tolist()
    return epochs


# Of two processes and batches of 4: whole; a part of a batch; a batch for one of them; and a part of another.
@pytest.mark.parametrize(("length", "used"), [(16, 16), (19, 16), (21, 16), (23, 16)])
def test_an_epoch_shows_no_example_twice(length, used):
    first, second = run_distributed(numbers_of_epochs, length, timeout=300)
    for own, other in zip(first, second, strict=True):
        assert len(own) == len(other) == used // 2  # no process waits for the other
        assert len({*own, *other}) == used
    assert first[0] != first[1]
    left_out = [set(range(length)) - {*own, *other} for own, other in zip(first, second, strict=True)]
    assert left_out[0] != left_out[1] or length == used  # the order changes, so no example is lost for good
