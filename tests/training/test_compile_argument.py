"""The argument `compile`: the same run as without, validated uncompiled, resumed either way; what is refused."""

import json
import math
import os

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend
from faulty_runs import replaced
from processes import run_distributed
from runs import assert_same_checkpoint, own_process_state, read_metrics, reset_accelerate, save_base
from scripts import load_script
from test_failed_validation import arguments_of
from toy_models import TOY_CONFIG, random_unet

from diffusers_adm import AdaGNUNet2DModel
from diffusers_adm.compilation.cpu import find_compiler
from diffusers_adm.training import compiled
from diffusers_adm.training import run as training_run
from diffusers_adm.training.log import TrainingLog


pytestmark = pytest.mark.no_jitter("torch compiles nothing inside a dispatch mode")


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    torch.compiler.reset()
    with own_process_state("train_adm"):
        yield
    torch.compiler.reset()


@pytest.fixture
def batches(monkeypatch):
    """A backend that runs the graph as it is, and keeps the batch size of each graph."""
    found = []

    def backend(graph, inputs):
        found.append(next(x.shape[0] for x in inputs if x.ndim == 4 and not isinstance(x, torch.nn.Parameter)))
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    return found


def train(name="train_adm", **arguments):
    reset_accelerate()
    words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in arguments.items()]
    load_script(name).main(words)


@pytest.mark.parametrize(
    "case",
    ["class", "lora", "bf16", "train_classifier", "train_controlnet", "train_super_resolution", "train_image_to_image"],
)
def test_the_same_run(case, tmp_path, batches, monkeypatch):
    """With gradient accumulation, dropout, a sampler with a state, and validations of other batch sizes."""
    name = case if case.startswith("train") else "train_adm"
    arguments = arguments_of(name, tmp_path / "files") | {"gradient_accumulation_steps": 2, "train_batch_size": 4}
    if case == "class":
        (tmp_path / "dropout.json").write_text(json.dumps(TOY_CONFIG | {"dropout": 0.1}))
        arguments |= {"label_column": "label", "model_config_name_or_path": str(tmp_path / "dropout.json")}
        arguments |= {"timestep_sampler": "loss-second-moment", "max_train_steps": 2}
    if case == "train_image_to_image":
        (tmp_path / "grayscale.json").write_text(json.dumps(TOY_CONFIG | {"in_channels": 4}))
        arguments |= {"source": "grayscale", "model_config_name_or_path": str(tmp_path / "grayscale.json")}
    if case == "bf16":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    if case == "lora":
        del arguments["model_config_name_or_path"]
        arguments |= {"lora_rank": 2, "pretrained_model_name_or_path": save_base(tmp_path / "base", random_unet())}
    plain, compiles = (arguments | {"output_dir": str(tmp_path / folder)} for folder in ("plain", "compiled"))
    train(name, **plain)
    train(name, **compiles, compile=True)
    assert set(batches) == {4}  # and nothing of the validation, which has other sizes
    assert len(batches) == (2 if name == "train_controlnet" else 1)  # each network once, also after checkpoints
    assert operations(tmp_path / "compiled") == operations(tmp_path / "plain")
    rows = zip(read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "compiled"), strict=True)
    for row, other in rows:
        assert row.keys() == other.keys()
        # The graph runs the same kernels; autograd may add gradients in another order.
        assert all(math.isclose(row[key], other[key], rel_tol=1e-4, abs_tol=1e-6) for key in row)
    if case == "class":
        train(**compiles | {"max_train_steps": 3}, resume_from_checkpoint="latest")
        train(**compiles | {"max_train_steps": 4}, resume_from_checkpoint="latest", compile=True)


def operations(folder):
    """Operations of an image, as the rates of the log say, which must have one number; rounded as these are."""
    rows = [row for row in read_metrics(folder, without=()) if "loss" in row]
    (number,) = {round(row["tflops_per_second"] * 1e12 / row["images_per_second"]) for row in rows}
    assert number > 1e6
    return number


@pytest.mark.parametrize("compiles_again", [False, True])
def test_the_count_changes_no_bit(tmp_path, batches, monkeypatch, compiles_again):
    """Not even with dropout, and a sampler that learns from each loss."""
    (tmp_path / "dropout.json").write_text(json.dumps(TOY_CONFIG | {"dropout": 0.1}))
    arguments = arguments_of("train_adm", tmp_path / "files") | {"timestep_sampler": "loss-second-moment"}
    arguments |= {"model_config_name_or_path": str(tmp_path / "dropout.json"), "compile": True, "max_train_steps": 2}
    counted, other = (arguments | {"output_dir": str(tmp_path / folder)} for folder in ("counted", "not"))
    if compiles_again:  # and counts again
        train(**counted | {"max_train_steps": 1})
        train(**counted, resume_from_checkpoint="latest")
    else:
        train(**counted)
    monkeypatch.setattr(training_run.BatchSplitter, "give_one", None)  # would fail
    monkeypatch.setattr(training_run, "TrainingLog", LogWithoutCount)
    train(**other)
    assert operations(tmp_path / "counted")
    assert not any("tflops_per_second" in row for row in read_metrics(tmp_path / "not", without=()))
    assert read_metrics(tmp_path / "counted") == read_metrics(tmp_path / "not")
    assert_same_checkpoint(tmp_path / "counted" / "checkpoint-2", tmp_path / "not" / "checkpoint-2")


class LogWithoutCount(TrainingLog):
    """The log of a run whose operations are not counted."""

    def __init__(self, *args):
        super().__init__(*args)
        self.flop_meter.give_up()


def test_the_count_out_of_memory(tmp_path, batches):
    """What does not fit uncompiled may fit compiled: the run goes on without the measure."""
    arguments = arguments_of("train_adm", tmp_path / "files") | {"compile": True, "max_train_steps": 2}
    forward, sizes = AdaGNUNet2DModel.forward, []

    def limited(self, sample, *args, **kwargs):
        if not torch.compiler.is_compiling():
            sizes.append(len(sample))
            if len(sizes) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, sample, *args, **kwargs)

    with replaced(AdaGNUNet2DModel, "forward", limited):
        train(**arguments)
    assert sizes[0] == 1  # the others are those of the validation
    rows = read_metrics(tmp_path / "files" / "run", without=())
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert not any("tflops_per_second" in row for row in rows)


def trained_compiled(arguments):
    """In a process of its own: a run whose compiler runs the graphs as they are; the operations that it has counted."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    compiled.BACKEND = "eager"
    train(**arguments)
    return None if PartialState().process_index else operations(arguments["output_dir"])


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each counts its own batch, without waiting for the gradients of the other."""
    arguments = arguments_of("train_adm", tmp_path / "files") | {"timestep_sampler": "loss-second-moment"}
    arguments |= {"max_train_steps": 2, "num_validation_images": 1}
    plain, compiles = (arguments | {"output_dir": str(tmp_path / folder)} for folder in ("plain", "compiled"))
    number, _ = run_distributed(trained_compiled, plain, timeout=120)
    assert run_distributed(trained_compiled, compiles | {"compile": True}, timeout=120) == [number, None]
    rows = zip(read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "compiled"), strict=True)
    assert all(math.isclose(row["loss"], other["loss"], rel_tol=1e-4) for row, other in rows if "loss" in row)


def test_a_dry_run(tmp_path, batches):
    train(**arguments_of("train_adm", tmp_path), compile=True, dry_run=True)
    assert set(batches) == {8}


class TestRefused:
    def test_scripts_that_cannot(self, tmp_path):
        for name in ("train_autoencoder", "train_clip"):
            words = {"model_config_name_or_path": "x", "data_files": "x", "output_dir": str(tmp_path)}
            words |= {"tokenizer_name_or_path": "x", "caption_column": "x"} if name == "train_clip" else {}
            with pytest.raises(ValueError, match="`compile` was given, but .*Leave it out"):
                train(name, **words, compile=True)

    def test_with_the_compilation_of_accelerate(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", DynamoBackend.EAGER.value)
        with pytest.raises(ValueError, match="`dynamo_backend` eager: .*twice"):
            train(**arguments_of("train_adm", tmp_path), compile=True)

    def test_without_a_compiler(self, tmp_path, monkeypatch):
        def fail():
            raise RuntimeError("No working C++ compiler found")

        monkeypatch.setattr(torch._inductor.cpp_builder, "get_cpp_compiler", fail)
        with pytest.raises(ValueError, match="cannot compile for cpu here .*No working C.. compiler.*Install a C"):
            train(**arguments_of("train_adm", tmp_path), compile=True)
        assert not list((tmp_path / "run").glob("*"))  # before data or files of the run


@pytest.mark.slow
def test_losses_by_inductor(tmp_path):
    """Fused kernels round otherwise than eager ones, hence a tolerance."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    arguments = arguments_of("train_adm", tmp_path / "files") | {"learning_rate": 1e-3, "validation_steps": 3}
    for folder, more in (("plain", {}), ("compiled", {"compile": True})):
        train(**arguments | {"output_dir": str(tmp_path / folder)} | more)
    rows = [
        [row["loss"] for row in read_metrics(tmp_path / folder) if "loss" in row] for folder in ("plain", "compiled")
    ]
    assert operations(tmp_path / "compiled") == operations(tmp_path / "plain")
    assert len(rows[0]) == 3
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
