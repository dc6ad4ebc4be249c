"""Power-function averages: their profiles, tracking, snapshots and resumption; reconstruction of other lengths."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from runs import (
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    bit_by_bit,
    flags,
    own_process_state,
    reset_accelerate,
    save_base,
)
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import load_script
from toy_models import TOY_CLASSIFIER_CONFIG, TOY_CONFIG, random_text_unet, random_unet

from diffusers_adm import AdaGNClassifierModel, AdaGNControlNetModel, ADMPipeline
from diffusers_adm.training import parse_args
from diffusers_adm.training import run as training_run
from diffusers_adm.training.arguments import TrainingArguments
from diffusers_adm.training.manifest import write_manifest
from diffusers_adm.training.post_hoc_ema import main as post_hoc_ema
from diffusers_adm.training.power_ema import (
    MAX_STD,
    PowerEMA,
    find_snapshots,
    gamma_of,
    plan_reconstruction,
    profile_products,
    reconstruct,
    std_of,
)


STDS = [0.05, 0.1]
LORA = "pytorch_lora_weights.safetensors"


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
        ({"power_ema_stds": [0.1, 0.3]}, "`power_ema_stds` is 0.3; it must be above 0 and at most 0.28867"),
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


# 3. Reconstruction, compared with averages that were tracked directly over the same random walk of weights

STEPS, EVERY, SIZE = 1600, 50, 200
OTHERS = [0.04, 0.075, 0.12, 0.15, 0.2]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder with 32 snapshots of each of 0.05 and 0.1, and averages of all lengths at the end and halfway."""
    folder, values = tmp_path_factory.mktemp("walk"), walk(STEPS, SIZE)
    ends = dict(zip(STDS, track(values, STDS, folder, EVERY), strict=True))
    ends |= dict(zip(OTHERS, track(values, OTHERS), strict=True))
    halves = dict(zip(OTHERS, track(values[: STEPS // 2], OTHERS), strict=True))
    return folder, ends, halves, values


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


def read(state):
    return state["unet/weight"][0].double().numpy()


def products_by_brute_force(first, second):
    """The inner product of two profiles (step, std), by the midpoint rule."""
    end = max(first[0], second[0])
    tau = (np.arange(400_000) + 0.5) / 400_000 * end
    product = np.ones_like(tau)
    for step, std in (first, second):
        gamma = gamma_of(std)
        product *= (gamma + 1) * tau**gamma / step ** (gamma + 1) * (tau <= step)
    return float(product.mean() * end)


@pytest.mark.parametrize(
    "pair", [((1, 0.1), (1, 0.1)), ((1, 0.05), (1, 0.2)), ((0.6, 0.05), (1, 0.2)), ((1, 0.05), (0.6, 0.2))]
)
def test_inner_products(pair):
    (step, std), (other_step, other_std) = pair
    product = profile_products(*map(np.float64, (step, gamma_of(std), other_step, gamma_of(other_std))))
    assert float(product) == pytest.approx(products_by_brute_force(*pair), rel=1e-4)


@pytest.mark.parametrize("std", [*STDS, *OTHERS])
def test_reconstruction(walked, std):
    """
    Within 1 % of the difference between the averages of 0.05 and 0.1 (for 0.04, 2 %), nearly all of it the rounding of
    the snapshots to float16.
    """
    folder, ends, _, _ = walked
    difference = rms(ends[0.05] - ends[0.1])
    result = read(reconstruct(find_snapshots(folder), std))
    assert rms(result - ends[std]) < (0.02 if std < 0.05 else 0.01) * difference
    assert rms(result - ends[0.05 if std != 0.05 else 0.1]) > 0.1 * difference


@pytest.mark.parametrize("std", OTHERS)
def test_without_rounding_to_float16(walked, std):
    """The same combination of averages in float64, by the closed form: 0.1 % of the difference (0.2: 1 %)."""
    folder, _, _, values = walked
    plan = plan_reconstruction(find_snapshots(folder), std)
    exact = [profile_weights(snapshot.std, snapshot.step) @ values[: snapshot.step] for snapshot in plan.snapshots]
    direct = profile_weights(std, STEPS) @ values
    difference = rms(exact[-1] - exact[-2])
    error = rms(np.array(plan.coefficients) @ np.array(exact) - direct)
    assert error < (1e-2 if std == 0.2 else 1e-3) * difference
    assert sum(plan.coefficients) == pytest.approx(1, abs=1e-9)
    # The error in the plan is that of the profiles, here by the weights of each step.
    combined = sum(
        coefficient * np.pad(profile_weights(snapshot.std, snapshot.step), (0, STEPS - snapshot.step))
        for snapshot, coefficient in zip(plan.snapshots, plan.coefficients, strict=True)
    )
    expected = np.linalg.norm(combined - profile_weights(std, STEPS)) / np.linalg.norm(profile_weights(std, STEPS))
    assert plan.error == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("std", STDS)
def test_tracked_averages_are_their_snapshots(walked, std):
    folder, ends, _, _ = walked
    result = read(reconstruct(find_snapshots(folder), std))
    saved = load_file(max(s for s in find_snapshots(folder) if s.std == std).path)["unet/weight"][0].double().numpy()
    np.testing.assert_allclose(result, saved, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result, ends[std], rtol=2**-11, atol=1e-6)  # half a unit in the last place of float16


def test_an_earlier_step(walked):
    folder, ends, halves, _ = walked
    difference = rms(ends[0.05] - ends[0.1])
    result = read(reconstruct(find_snapshots(folder), 0.075, step=STEPS // 2))
    assert rms(result - halves[0.075]) < 0.01 * difference < rms(result - ends[0.075])


def test_constant_weights_stay(tmp_path):
    """Without the condition that coefficients sum to 1, few snapshots would change them."""
    track(np.full((20, 3), 0.5), STDS, tmp_path, every=4)
    for std in (0.04, 0.075, 0.15):
        np.testing.assert_allclose(read(reconstruct(find_snapshots(tmp_path), std)), 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": 0.0}, "`std` is 0.0; it must be above 0 and at most 0.28867"),
        ({"std": 0.29}, "`std` is 0.29; it must be"),
        ({"std": 0.1, "step": 1650}, "`step` is 1650, but the last snapshot is of step 1600"),
        ({"std": 0.1, "step": 120}, "no snapshot of that step. .*; the nearest are 100 and 150"),
        ({"std": 0.1, "step": 0}, "no snapshot of that step. .*; the nearest are 50 and 100"),
        ({"std": 0.2, "step": 100}, r"The 4 snapshots up to step 100 \(of `std` 0.05, 0.1\) are too few for `std` 0.2"),
        ({"std": 0.003}, "The 64 snapshots .* too few for `std` 0.003: .* misses its profile by .*%, and `max_error`"),
    ],
)
def test_refused_reconstructions(walked, arguments, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(find_snapshots(walked[0]), **arguments)


def test_snapshots_that_cannot_be_combined(tmp_path):
    with pytest.raises(ValueError, match="There are no snapshots of power-function averages. Train with `--power_ema_"):
        reconstruct(find_snapshots(tmp_path), 0.1)
    track(walk(4, 3), STDS, tmp_path / "a", every=2)
    (_, _, *last) = find_snapshots(tmp_path / "a")
    track(walk(2, 5), STDS, tmp_path / "a", every=2)  # overwrites those of step 2
    with pytest.raises(ValueError, match="step-00000002.*of different networks; they differ, for example in 'unet/wei"):
        reconstruct(find_snapshots(tmp_path / "a"), 0.1)
    last[1].path.replace(last[1].path.with_name(last[1].path.name.replace("04", "06")))
    with pytest.raises(ValueError, match="was renamed: it is of step 4 and of `std` 0.1"):
        reconstruct(find_snapshots(tmp_path / "a")[-1:], 0.1)
    last[0].path.write_bytes(b"")
    with pytest.raises(ValueError, match="step-00000004-std-0.05.safetensors cannot be read"):
        reconstruct(find_snapshots(tmp_path / "a")[2:3], 0.05)


# 4. Snapshots and checkpoints of runs


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_adm"):
        yield


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
    write_manifest(tmp_path / "run" / "checkpoint-2")
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


# 5. The command


def write(run_dir, output_dir, std=0.07, **arguments):
    post_hoc_ema(flags(run_dir=run_dir, std=std, output_dir=output_dir, **arguments))
    return output_dir


def assert_reconstructed(network, run_dir, std, prefix="unet/", step=None):
    """Its trained weights are the reconstruction; those of the run's result are others."""
    expected = reconstruct(find_snapshots(run_dir), std, step)
    parameters = dict(network.named_parameters())
    names = {name.removeprefix(prefix) for name in expected if name.startswith(prefix)}
    assert names
    for name in names:
        assert torch.equal(parameters[name], expected[prefix + name]), name
    return names


def test_the_command_writes_a_pipeline(unbroken, tmp_path, capsys):
    folder = write(unbroken, tmp_path / "out")
    assert "the average of std 0.07 after step 5, from 10 snapshots; " in capsys.readouterr().out
    pipeline = ADMPipeline.from_pretrained(folder)
    names = assert_reconstructed(pipeline.unet, unbroken, 0.07)
    assert names == {name for name, _ in pipeline.unet.named_parameters()}
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2).images[0].size == (8, 8)
    # The layout of the result, without curves and validation images.
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    layout = {str(path.relative_to(unbroken)) for part in ("unet", "scheduler") for path in (unbroken / part).iterdir()}
    assert files == layout | {"model_index.json", "train_args.yaml", "post_hoc_ema.json"}
    for name in files - {"unet/diffusion_pytorch_model.safetensors", "post_hoc_ema.json"}:
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name
    record = json.loads((folder / "post_hoc_ema.json").read_text())
    assert (record["std"], record["step"], record["num_snapshots"], record["tracked_stds"]) == (0.07, 5, 10, STDS)
    assert 0 < record["profile_error"] < 0.1


def test_a_run_that_is_going_on(unbroken, tmp_path):
    going = tmp_path / "going"
    going.mkdir()
    for name in ("power_ema", "checkpoint-2", "checkpoint-4"):
        shutil.copytree(unbroken / name, going / name)
    folder = write(going, tmp_path / "out", std=0.1, step=3)
    assert_reconstructed(ADMPipeline.from_pretrained(folder).unet, unbroken, 0.1, step=3)
    for checkpoint in going.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match=r"neither a result nor a checkpoint with the networks .* \(unet\). Wait"):
        write(going, tmp_path / "none")


def test_the_command_refuses(unbroken, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="`output_dir` .* exists and is not empty"):
        write(unbroken, tmp_path / "full")
    with pytest.raises(ValueError, match="`run_dir` .* is not a folder"):
        write(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="`run_dir` .* holds no snapshots of power-function averages in power_ema"):
        write(tmp_path / "full", tmp_path / "out")
    with pytest.raises(ValueError, match="`std` is 0.3"):
        write(unbroken, tmp_path / "out", std=0.3)
    with pytest.raises(ValueError, match="`max_error` is 0.0; it must be positive"):
        write(unbroken, tmp_path / "out", max_error=0.0)
    with pytest.raises(ValueError, match="are too few for `std` 0.01"):
        write(unbroken, tmp_path / "out", std=0.01)
    shutil.copytree(unbroken / "power_ema", tmp_path / "other" / "power_ema")
    save_base(tmp_path / "other", random_unet(block_out_channels=(8, 8)))
    with pytest.raises(
        ValueError, match="The snapshots are of another network than .*unet: .* tensors differ, such as"
    ):
        write(tmp_path / "other", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "other"]  # nothing unfinished is left


FEW = TOY_RUN | AVERAGED | {"max_train_steps": 2}


def test_controlnets_and_frozen_parts(tmp_path):
    base = save_base(tmp_path / "base", random_unet())
    arguments = FEW | {"pretrained_model_name_or_path": base, "condition": "low_resolution"}
    folder = run(tmp_path / "run", "train_controlnet", **arguments)
    out = write(folder, tmp_path / "out", std=0.1)
    assert_reconstructed(AdaGNControlNetModel.from_pretrained(out), folder, 0.1, prefix="")
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_classifiers(tmp_path):
    config = {key: value for key, value in TOY_CLASSIFIER_CONFIG.items() if key != "num_classes"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = {k: v for k, v in FEW.items() if k not in ("num_validation_images", "validation_num_inference_steps")}
    arguments |= {"model_config_name_or_path": tmp_path / "config.json", "label_column": "label"}
    folder = run(tmp_path / "run", "train_classifier", **arguments)
    out = write(folder, tmp_path / "out", std=0.1)
    classifier = AdaGNClassifierModel.from_pretrained(out, subfolder="classifier")
    assert_reconstructed(classifier, folder, 0.1, prefix="classifier/")
    for name in ("classifier/id2label.json", "scheduler/scheduler_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_text_encoders_that_are_trained(tmp_path):
    base = save_base(tmp_path / "base", random_text_unet("added_kv"), "clip")
    arguments = FEW | {"pretrained_model_name_or_path": base, "caption_column": "text", "train_text_encoder": True}
    folder = run(tmp_path / "run", **arguments)
    pipeline = ADMPipeline.from_pretrained(write(folder, tmp_path / "out", std=0.1))
    assert_reconstructed(pipeline.unet, folder, 0.1)
    assert_reconstructed(pipeline.text_encoder, folder, 0.1, prefix="text_encoder/")
    # What the result does not train is that of the run.
    expected = ADMPipeline.from_pretrained(folder).text_encoder.state_dict()
    frozen = expected.keys() - {name.partition("/")[2] for name in reconstruct(find_snapshots(folder), 0.1)}
    assert all(torch.equal(pipeline.text_encoder.state_dict()[name], expected[name]) for name in frozen)


def test_adapters(tmp_path):
    base = save_base(tmp_path / "base", random_unet())
    folder = run(tmp_path / "run", **FEW, pretrained_model_name_or_path=base, lora_rank=2)
    out = write(folder, tmp_path / "out", std=0.1)
    assert sorted(path.name for path in out.iterdir()) == ["post_hoc_ema.json", LORA, "train_args.yaml"]
    with safe_open(out / LORA, "pt") as file, safe_open(folder / LORA, "pt") as result:
        assert file.metadata() == result.metadata()
    pipeline = ADMPipeline.from_pretrained(base)
    pipeline.load_lora_weights(out)
    loaded = {name.replace(".default_0.", ".default."): p for name, p in pipeline.unet.named_parameters()}
    for name, average in reconstruct(find_snapshots(folder), 0.1).items():
        assert torch.equal(loaded[name.removeprefix("unet/")], average), name
