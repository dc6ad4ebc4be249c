"""Power-function averages: their profiles, tracking, snapshots and resumption; reconstruction of other lengths."""

import logging
import shutil

import numpy as np
import pytest
import torch
from runs import EMOJI, SHORT_RUN, assert_same_checkpoint, bit_by_bit, flags, own_process_state, reset_accelerate
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import load_script
from toy_models import TOY_CONFIG, random_unet

from diffusers_adm.training import parse_args
from diffusers_adm.training import run as training_run
from diffusers_adm.training.arguments import TrainingArguments
from diffusers_adm.training.power_ema import MAX_STD, PowerEMA, find_snapshots, gamma_of, std_of


# 1. Profiles


@pytest.mark.parametrize("std", [0.001, 0.01, 0.05, 0.1, 0.15, 0.25, MAX_STD])
def test_std_and_exponent(std):
    gamma = gamma_of(std)
    assert std_of(gamma) == pytest.approx(std, rel=1e-9)
    # The standard deviation of a density on [0, 1], by the midpoint rule.
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = (gamma + 1) * tau**gamma / len(tau)
    mean = (density * tau).sum()
    assert np.sqrt((density * (tau - mean) ** 2).sum()) == pytest.approx(std, rel=1e-5)


def test_values_of_the_paper():
    """Section 3.1: gamma of about 6.94 and 16.97 for 10 and 5 percent."""
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"power_ema_stds": [0.1, 0.3]}, "`power_ema_stds` is 0.3; it must be above 0 and at most 0.2887"),
        ({"power_ema_stds": [0.0]}, "`power_ema_stds` is 0.0; it must be above 0"),
        ({"power_ema_stds": [0.1, 0.1]}, "`power_ema_stds` is .*; its values must differ"),
        ({"power_ema_stds": [float("nan")]}, "`power_ema_stds` is nan"),
        ({"power_ema_snapshot_steps": 5}, "`power_ema_snapshot_steps` was given without `power_ema_stds`"),
        ({"power_ema_stds": [0.1], "power_ema_snapshot_steps": 0}, "`power_ema_snapshot_steps` is 0"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**arguments)


def test_command_line():
    (arguments,) = parse_args(TrainingArguments, ["--power_ema_stds", "0.05", "0.1"])
    assert arguments.power_ema_stds == [0.05, 0.1]


# 2. Tracking


def profile_weights(std, steps):
    """The integral of the profile over each step: the weight of the weights of that step, in float64."""
    edges = (np.arange(steps + 1) / steps) ** (gamma_of(std) + 1)
    return np.diff(edges)


def walk(steps, size, seed=0):
    """Weights after each step, (steps, size), of a random walk, in float64."""
    generator = np.random.default_rng(seed)
    return 0.5 + generator.normal(size=(steps, size)).cumsum(axis=0) / np.sqrt(steps)


def track(values, stds, output_dir=None, every=None):
    """Power-function averages of a layer that takes the rows of `values`, with snapshots."""
    network = torch.nn.Linear(values.shape[1], 1, bias=False)
    averages = PowerEMA({"unet": network}, stds)
    for step, row in enumerate(values, start=1):
        with torch.no_grad():
            network.weight.copy_(torch.from_numpy(row)[None])
        averages.step(network.parameters(), step)
        if output_dir is not None and (step % every == 0 or step == len(values)):
            averages.save_snapshots(output_dir, step)
    return [tensors[0][0].double().numpy() for tensors in averages.averages]


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, MAX_STD])
@pytest.mark.parametrize("steps", [1, 2, 500])
def test_the_recursion_is_the_integral(std, steps):
    values = walk(steps, 20)
    (tracked,) = track(values, [std])
    # Each step of float32 rounds by at most 2**-24 of the average, and the average forgets.
    np.testing.assert_allclose(tracked, profile_weights(std, steps) @ values, rtol=0, atol=3e-6)


def test_only_trained_weights_and_each_once():
    unet = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    other = torch.nn.ModuleDict({"shared": unet[1], "own": torch.nn.Linear(1, 1)})
    unet[0].bias.requires_grad_(False)
    averages = PowerEMA({"unet": unet, "": other}, [0.1])
    assert averages.names == ["unet/0.weight", "unet/1.weight", "unet/1.bias", "own.weight", "own.bias"]
    trained = torch.nn.ModuleList([unet, other])
    shapes = [p.shape for p in trained.parameters() if p.requires_grad]
    assert [average.shape for average in averages.averages[0]] == shapes


# 3. Snapshots and checkpoints of runs


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_adm"):
        yield


STDS = [0.05, 0.1]
TOY_RUN = SHORT_RUN | {
    "max_train_steps": 5,
    "checkpointing_steps": 2,
    "train_batch_size": 4,
    "max_train_samples": 8,
    "learning_rate": 1e-3,
    "num_validation_images": 1,
    "validation_num_inference_steps": 1,
    "data_files": EMOJI,
}
AVERAGED = {"power_ema_stds": STDS, "power_ema_snapshot_steps": 1}


def run(folder, script="train_adm", **arguments):
    reset_accelerate()
    module = load_script(script)
    try:
        module.main(flags(**{"output_dir": folder} | arguments))
    finally:
        logging.getLogger(script).setLevel(logging.NOTSET)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config")
    random_unet().save_config(path)
    assert TOY_CONFIG["sample_size"] == 8
    return {"model_config_name_or_path": str(path / "config.json")}


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("ACCELERATE_USE_CPU", "true")
    folder = run(tmp_path_factory.mktemp("unbroken"), **TOY_RUN, **config, **AVERAGED)
    patch.undo()
    return folder


def steps_of(folder):
    return [snapshot.step for snapshot in find_snapshots(folder) if snapshot.std == STDS[0]]


@bit_by_bit()
def assert_same_snapshots(first, second):
    names = [snapshot.path.name for snapshot in find_snapshots(first)]
    assert names == [snapshot.path.name for snapshot in find_snapshots(second)]
    for name in names:
        states = [load_file(folder / "power_ema" / name) for folder in (first, second)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name


def test_files(unbroken):
    assert steps_of(unbroken) == [1, 2, 3, 4, 5]
    assert {snapshot.std for snapshot in find_snapshots(unbroken)} == set(STDS)
    assert len(list((unbroken / "power_ema").iterdir())) == 10  # and nothing half-written
    snapshot = find_snapshots(unbroken)[-1]
    with safe_open(snapshot.path, "pt") as file:
        assert file.metadata() == {"step": "5", "sigma_rel": "0.1", "networks": '["unet"]'}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    # The average after the first step is that of its weights; later ones are in between.
    weights = load_file(unbroken / "checkpoint-4" / "model.safetensors")
    state = load_file(unbroken / "checkpoint-4" / "power_ema.safetensors")
    saved = load_file(find_snapshots(unbroken)[7].path)
    assert {name.removeprefix("unet/") for name in saved} == set(weights)
    for name, tensor in saved.items():
        assert torch.equal(state[f"0.1/{name}"].half(), tensor)


def test_the_run_itself_stays_as_it_is(unbroken, config, tmp_path):
    run(tmp_path, **TOY_RUN, **config)
    assert not (tmp_path / "power_ema").exists()
    (unbroken_copy := tmp_path / "copy").mkdir()
    shutil.copytree(unbroken / "checkpoint-4", unbroken_copy / "checkpoint-4")
    (unbroken_copy / "checkpoint-4" / "power_ema.safetensors").unlink()
    assert_same_checkpoint(unbroken_copy / "checkpoint-4", tmp_path / "checkpoint-4")


def test_resumed_as_if_unbroken(unbroken, tmp_path, caplog):
    shutil.copytree(unbroken, broken := tmp_path / "broken")
    shutil.rmtree(broken / "checkpoint-5")
    shutil.rmtree(broken / "checkpoint-4")
    for snapshot in find_snapshots(broken):
        if snapshot.step > 2:  # of an abandoned run
            snapshot.path.write_bytes(b"")
    (broken / "power_ema" / ".writing-step-00000003-std-0.1.safetensors").write_bytes(b"")
    run(broken, resume_from_checkpoint="latest", power_ema_snapshot_steps=1)
    assert "Deleted 6 snapshots of steps 3 to 5" in caplog.text
    assert_same_snapshots(unbroken, broken)
    assert len(list((broken / "power_ema").iterdir())) == 10
    assert_same_checkpoint(unbroken / "checkpoint-5", broken / "checkpoint-5")


def test_a_branch_starts_with_the_earlier_snapshots(unbroken, tmp_path):
    run(tmp_path, resume_from_checkpoint=unbroken / "checkpoint-2", power_ema_snapshot_steps=4)
    assert steps_of(tmp_path) == [1, 2, 4, 5]


def test_at_the_last_step_only_the_last_snapshot_is_written(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "power_ema")
    run(tmp_path / "broken", resume_from_checkpoint="latest")
    assert steps_of(tmp_path / "broken") == [5]


def test_checkpoints_without_averages(config, tmp_path):
    run(tmp_path / "run", **TOY_RUN | {"max_train_steps": 2}, **config)
    resume = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    with pytest.raises(ValueError, match="`power_ema_stds` is .*, and was None for checkpoint-2, which cannot be load"):
        run(tmp_path / "run", **resume, power_ema_stds=STDS)
    (tmp_path / "run" / "checkpoint-2" / "train_args.yaml").unlink()
    with pytest.raises(ValueError, match="holds no power-function averages: its run had no `power_ema_stds`"):
        run(tmp_path / "run", **TOY_RUN | resume, **config, power_ema_stds=STDS)


def test_snapshots_of_another_run(unbroken, config, tmp_path):
    shutil.copytree(unbroken / "power_ema", tmp_path / "power_ema")
    with pytest.raises(ValueError, match="holds snapshots of another run in power_ema. Pass `--overwrite_output_dir`"):
        run(tmp_path, **TOY_RUN, **config)
    run(tmp_path, **TOY_RUN | {"max_train_steps": 2}, **config, overwrite_output_dir=True)
    assert steps_of(tmp_path) == []


def test_values_that_are_not_finite(tmp_path):
    network = torch.nn.Linear(2, 1)
    averages = PowerEMA({"": network}, [0.1])
    with torch.no_grad():
        network.weight.fill_(1e6)  # above the range of float16
    averages.step(network.parameters(), 1)
    with pytest.raises(RuntimeError, match="not finite in float16 at step 1, so no snapshot of them is saved"):
        averages.save_snapshots(tmp_path, 1)
    assert find_snapshots(tmp_path) == []
