"""How commands end: a mistake of the user with one sentence, a bug with its traceback."""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from diffusers_adm.commands import errors as command_line
from diffusers_adm.commands.errors import CommandError, run_command


REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "train_adm",
    "train_autoencoder",
    "train_classifier",
    "train_clip",
    "train_controlnet",
    "train_image_to_image",
    "train_prior",
    "train_super_resolution",
)
MODULES = (
    "evaluation.sample",
    "evaluation.frechet",
    "evaluation.bits_per_dim",
    "conversion.openai",
    "conversion.glide",
    "data.encode_embeddings",
    "data.encode_latents",
    "training.post_hoc_ema",
    "training.tokenizer",
    "hub",
)
EMOJI = str(REPOSITORY / "data" / "noto-emoji-32" / "test.parquet")
TRAINING = ["--model_config_name_or_path", str(REPOSITORY / "training" / "configs" / "unet_emoji_32.json")]


def script(name):
    return str(REPOSITORY / "training" / f"{name}.py")


def run(*command, **environment):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240, env=environment
    )


# 1. Real commands


class TestProcesses:
    def check(self, result, sentence):
        assert result.returncode == 2, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        (line,) = [line for line in result.stderr.splitlines() if "error" in line.lower()]
        assert line == result.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert sentence in line

    def test_a_column_that_is_not_there(self, tmp_path):
        arguments = [*TRAINING, "--data_files", EMOJI, "--label_column", "lable", "--report_to", "none"]
        result = run(script("train_adm"), *arguments, "--output_dir", tmp_path / "run")
        self.check(result, "`label_column` is 'lable', but ")
        assert "Pass one of them." in result.stderr

    def test_several_processes_say_it_once(self, tmp_path):
        """The launcher's own report follows, and holds the sentence; that of one process is left out by `--quiet`."""
        configs = REPOSITORY / "training" / "configs"
        launch = ["-m", "accelerate.commands.launch", "--config_file"]
        arguments = [script("train_adm"), *TRAINING, "--train_data_dir", tmp_path / "absent", "--report_to", "none"]
        two = run(*launch, configs / "accelerate_two_cpu_processes.yaml", *arguments, "--output_dir", tmp_path / "run")
        assert two.returncode != 0
        ours, _, report = two.stderr.partition("Traceback")  # the first one is the launcher's
        assert "Sending process" in report or "Sending process" in ours
        ours = ours[: ours.index("Check the path.\n") + len("Check the path.\n")]
        self.check(subprocess.CompletedProcess(two.args, 2, "", ours), "which is not a folder")
        assert (two.stderr.count("error: "), report.count("Check the path.")) == (1, 1)
        assert report.count("Traceback") == 0
        one = run(*launch, configs / "accelerate_single_process.yaml", "--quiet", *arguments)
        assert one.returncode == 1  # whatever the script returned
        self.check(subprocess.CompletedProcess(one.args, 2, "", one.stderr), "which is not a folder")


@contextlib.contextmanager
def ended_by(code):
    with pytest.raises(SystemExit) as end:
        yield
    assert end.value.code == code


def run_here(monkeypatch, name, *arguments):
    """The command, as `__main__` of this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    if name in SCRIPTS:
        runpy.run_path(script(name), run_name="__main__")
    elif name in ("demo", "app"):
        monkeypatch.syspath_prepend(str(REPOSITORY / "spaces"))
        runpy.run_path(script(name) if name == "demo" else str(REPOSITORY / "spaces" / "app.py"), run_name="__main__")
    else:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # that it was imported before
            runpy.run_module(f"diffusers_adm.{name}", run_name="__main__", alter_sys=True)


@pytest.mark.parametrize(
    "name, arguments, sentence",
    [
        *((name, ["--config", "absent.yaml"], "`--config` is 'absent.yaml', which is not a file.") for name in SCRIPTS),
        ("train_adm", ["--config", "{recipe}"], "line 2: unknown key 'learning_rat'. Did you mean `learning_rate`?"),
        ("train_adm", ["--learning_rat", "1"], "unrecognized arguments: --learning_rat 1. Did you mean"),
        ("train_adm", ["--learning_rate", "-1"], "`learning_rate` is -1.0; it must be positive."),
        (
            "evaluation.sample",
            ["--model", "{recipe}", "--num_images", "1", "--output_dir", "x"],
            "`model` is '{recipe}', which cannot be read",
        ),
        (
            "evaluation.frechet",
            ["--samples", "x", "--reference", "x", "--features", "cnn"],
            "`features` is 'cnn'; it must be classifier:PATH, inception or inception:FILE.",
        ),
        ("evaluation.bits_per_dim", ["--model", "{recipe}", "--dataset", "x"], "`model` is '{recipe}', which cannot"),
        ("conversion.openai", ["--checkpoint", "{recipe}", "--output_dir", "{recipe}/out"], "{recipe}"),
        (
            "conversion.openai",
            ["--checkpoint", "absent.pt", "--output_dir", "out"],
            "absent.pt is not a file",
        ),
        (
            "conversion.glide",
            ["--checkpoint", "absent.pt", "--output_dir", "out"],
            "absent.pt is not a file",
        ),
        (
            "data.encode_embeddings",
            ["--clip", "{recipe}", "--data_files", "absent.parquet", "--output_dir", "{tmp}/out"],
            "`clip` is '{recipe}', which is a file. Name the folder of the CLIP.",
        ),
        (
            "training.post_hoc_ema",
            ["--run_dir", "absent", "--std", "0.1", "--output_dir", "out"],
            "`run_dir` is 'absent', which is not a folder",
        ),
        (
            "training.tokenizer",
            ["--data_files", "absent.parquet"],
            "`data_files` cannot be read as parquet: Unable to find",
        ),
        ("hub", ["push", "{recipe}", "a/b"], "{recipe}"),
        ("hub", ["push", "{tmp}", "a/b"], "holds neither a model_index.json nor a config.json"),
    ],
)
def test_a_mistake_is_one_sentence(name, arguments, sentence, monkeypatch, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\nlearning_rat: 1\n")
    fill = {"{recipe}": str(recipe), "{tmp}": str(tmp_path)}
    for place, value in fill.items():
        arguments, sentence = [argument.replace(place, value) for argument in arguments], sentence.replace(place, value)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with ended_by(2):
        run_here(monkeypatch, name, *arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert "usage" not in error
    with pytest.raises((ValueError, OSError, CommandError, SystemExit)) as caught:
        run_here(monkeypatch, name, *arguments, "--debug")
    if "unrecognized" not in sentence:  # which argparse says, wherever it happens
        assert not isinstance(caught.value, SystemExit)
        assert not capsys.readouterr().err


@pytest.mark.parametrize("name", [*SCRIPTS, *MODULES, "demo", "app"])
def test_help_lists_the_flag(name, monkeypatch, capsys):
    if name == "app":
        pytest.importorskip("gradio")
    with ended_by(0):
        run_here(monkeypatch, name, *(["push"] if name == "hub" else []), "--help")
    assert "--debug" in capsys.readouterr().out


# 2. What is a mistake, and what a bug


def of_ours(source):
    """A `main` in a module of this package."""
    module = {"__name__": "diffusers_adm.example"}
    exec(f"def main():\n    {source}", module)
    return module["main"]


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError('Pass another.')",
        "raise TypeError('Pass another.') from KeyError('x')",
        "raise FileNotFoundError('Pass another.')",
        "raise ImportError('Pass another.')",
    ],
)
def test_raised_in_words(source, capsys):
    with ended_by(2):
        run_command(of_ours(source))
    assert capsys.readouterr().err == "error: Pass another.\n"


@pytest.mark.parametrize(
    "source, kind",
    [
        ("int('x')", ValueError),
        ("first, second = [1]", ValueError),
        ("len(3)", TypeError),
        ("open('/absent')", FileNotFoundError),
        ("raise RuntimeError('x')", RuntimeError),
        ("raise KeyError('x')", KeyError),
        ("import json; json.loads('{')", ValueError),  # raised by a `raise`, but of another package
    ],
)
def test_a_bug_keeps_its_traceback(source, kind, capsys):
    with pytest.raises(kind):
        run_command(of_ours(source))
    assert not capsys.readouterr().err


def test_debug_keeps_the_traceback_of_a_mistake(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "--debug"])
    with pytest.raises(ValueError, match="another"):
        run_command(of_ours("raise ValueError('Pass another.')"))


def test_an_error_of_a_library_that_is_said_in_words(capsys):
    def main():
        raise CommandError("The Hub is not there.", exit_code=1)

    with ended_by(1):
        run_command(main)
    assert capsys.readouterr().err == "error: The Hub is not there.\n"


def test_other_processes_give_the_main_one_time(monkeypatch, capsys):
    """So that the launcher ends them before they repeat its error, or report that it has gone."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for rank, waited in (("0", []), ("1", [command_line.WAIT_FOR_MAIN_PROCESS])):
        monkeypatch.setenv("RANK", rank)
        for source, kind in (("raise ValueError('Pass another.')", SystemExit), ("len(3)", TypeError)):
            waits.clear()
            with pytest.raises(kind):
                run_command(of_ours(source))
            assert waits == waited
    assert capsys.readouterr().err == 2 * "error: Pass another.\n"


def test_success():
    assert run_command(lambda: None) is None


def test_ctrl_c_is_one_word(monkeypatch, capsys):
    def main():
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with ended_by(130):
            run_command(main)
        assert capsys.readouterr().err == "interrupted\n"
        monkeypatch.setattr(sys, "argv", ["command", "--debug"])
        with pytest.raises(KeyboardInterrupt):
            run_command(main)
    finally:
        signal.signal(signal.SIGINT, before)
