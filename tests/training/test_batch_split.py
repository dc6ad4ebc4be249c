"""Batches that do not fit in memory: split, with the same gradient."""

import resource
import weakref
from pathlib import Path

import pytest
import torch
from faulty_runs import arguments_of, fits, replaced, train
from processes import run_distributed, start
from runs import read_metrics

from diffusers_adm.commands.errors import CommandError
from diffusers_adm.training import TrainingRun, training_losses
from diffusers_adm.training.batch_split import BatchSplitter, is_out_of_memory, release_graphs


def gradients(arguments, most=None, where="forward"):
    """The gradient of the first optimizer step, with noise and timesteps that depend on the image only."""
    found = []

    def keep(self):
        if self.accelerator.sync_gradients and not found:
            found.append([parameter.grad.clone() for parameter in self.parameters])
        return step(self)

    def losses(model, scheduler, samples, timesteps, **kwargs):
        timesteps.copy_((samples.sum(dim=(1, 2, 3)).abs() * 1000).long() % scheduler.config.num_train_timesteps)
        return training_losses(model, scheduler, samples, timesteps, noise=torch.sin(50 * samples), **kwargs)

    with replaced(TrainingRun, "step_optimizer", keep) as step, fits(most or 100, where) as sizes:
        assert train(arguments, training_losses=losses) == 0
    return found[0], sizes


@pytest.mark.parametrize(("most", "where", "accumulation"), [(3, "forward", 1), (1, "backward", 2)])
def test_the_same_gradient_in_parts(tmp_path, caplog, most, where, accumulation):
    """
    Of 5 images in parts of 3 and 2, or one by one; with two batches a step, also those before the one that did not fit.
    """
    changes = {
        "train_batch_size": 5,
        "gradient_accumulation_steps": accumulation,
        "max_train_steps": 1,
        "lr_warmup_steps": 0,
        "max_grad_norm": 1e9,
    }
    expected, whole = gradients(arguments_of(tmp_path / "whole", **changes))
    caplog.clear()
    found, sizes = gradients(arguments_of(tmp_path / "split", **changes), most, where)
    assert whole[:accumulation] == [5] * accumulation
    images = sum(size for size in sizes[: -len(whole[accumulation:]) or None] if size <= most)
    assert images >= 5 * accumulation
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for first, second in zip(expected, found, strict=True):
        # float32, summed in another order
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5 * scale)
    rows = [read_metrics(tmp_path / name / "run")[0] for name in ("whole", "split")]
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)  # each image counts once
    told = [record.getMessage() for record in caplog.records if "does not fit in memory" in record.getMessage()]
    assert len(told) == {3: 1, 1: 3}[most]
    size, parts = {3: (3, 2), 1: (1, 5)}[most]
    assert f"`--train_batch_size {size} --gradient_accumulation_steps {parts * accumulation}`" in told[-1]


def test_not_even_one_image(tmp_path):
    with fits(0), pytest.raises(CommandError, match="A batch of 4 images does not fit.*not even in parts of one image"):
        train(arguments_of(tmp_path))


def exhausted_process(arguments):
    with fits(1), pytest.raises(CommandError, match="does not fit in memory at step 1 .*`--train_batch_size 1 --grad"):
        train(arguments)


@pytest.mark.slow
def test_one_of_several_processes_cannot_try_again(tmp_path):
    assert run_distributed(exhausted_process, arguments_of(tmp_path, train_batch_size=2)) == [None, None]


def allocate_too_much():
    """An address space that is too small, as of a container without swap."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2**30)
    assert is_out_of_memory(caught.value)


def test_errors_of_memory():
    process = start(allocate_too_much, daemon=False)
    process.join(60)
    assert process.exitcode == 0
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not is_out_of_memory(RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"))


def test_an_optimizer_step_is_not_tried_again(tmp_path):
    """Some weights may have been updated."""
    calls = []

    def fail(self, closure=None):
        calls.append(self)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with (
        replaced(torch.optim.AdamW, "step", fail),
        pytest.raises(CommandError, match="The state of the optimizer does not fit in memory"),
    ):
        train(arguments_of(tmp_path))
    assert len(calls) == 1


def test_an_error_without_a_message():
    """Python's own has none."""
    splitter = BatchSplitter()
    assert len(list(splitter.give(0, {"images": torch.zeros(4, 3)}))) == 1
    assert "does not fit in memory at step 7 (MemoryError). From now on" in splitter.split(MemoryError(), 7)


def test_a_failed_backward_pass_releases_its_memory():
    """Although variables still refer to its graph, as those of a loop do."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(context, values):
            return values.clone()

        @staticmethod
        def backward(context, gradient):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Activations:
        """What the graph keeps for the backward pass."""

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(context, values):
            context.activations = Activations()
            seen.append(weakref.ref(context.activations))
            return values.exp()

        @staticmethod
        def backward(context, gradient):
            return gradient

    seen = []
    weight = torch.ones(4, requires_grad=True)
    hidden = Keeps.apply(weight * 2)
    loss = Fails.apply(hidden.square()).sum()
    del hidden
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    assert seen[0]() is not None
    release_graphs()
    assert seen[0]() is None
    assert loss.item() == pytest.approx(4 * torch.e**4, rel=1e-5)  # its value is still there


def test_parts_of_all_batches_of_a_step():
    """A batch that came whole before comes again in parts, each with its share; lists are cut as tensors are."""
    splitter = BatchSplitter()
    batches = [{"images": torch.arange(5 * n, 5 * n + 5), "names": list("abcde")} for n in range(2)]
    splitter.begin()
    assert [part.share for part in splitter.give(0, batches[0])] == [1.0]
    seen = []
    for part in splitter.give(1, batches[1]):
        seen.append(part)
        if len(seen) == 1:
            assert "split into 2 parts of at most 3 images" in splitter.split(MemoryError("none"), 1)
    assert [part.batch["images"].tolist() for part in seen[1:]] == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    assert [part.share for part in seen[1:]] == [0.6, 0.4, 0.6, 0.4]
    assert [part.micro_step for part in seen] == [1, 0, None, 1, None]
    assert [part.is_new for part in seen] == [True, False, False, False, False]
    assert [part.is_last for part in seen] == [True, False, False, False, True]
    assert seen[-1].batch["names"] == ["d", "e"]
