"""The command `diffusers-adm`: names, help, suggestions, and how commands are started."""

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import diffusers_adm
from diffusers_adm_cli import main as command_line
from diffusers_adm_cli.main import find_command, main, split_arguments
from diffusers_adm_cli.table import COMMANDS, Command


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def started(monkeypatch):
    """Records what would be started, in place of starting it."""
    calls = []
    monkeypatch.setattr(command_line, "run_here", lambda *call: calls.append(("here", *call)))
    monkeypatch.setattr(command_line, "launch", lambda *call: calls.append(("launch", *call)))

    def started(*words):
        calls.clear()
        main(words)
        (call,) = calls
        return call[0], call[1].name, *map(list, call[2:])

    return started


# 1. Names


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_main(command):
    code = Path(importlib.util.find_spec(command.module).origin).read_text(encoding="utf-8")
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(code).body)
    assert 'if __name__ == "__main__":\n    run_command(main)' in code  # so `python -m` runs the same
    assert command.summary.endswith(".")


def test_every_command_has_a_name():
    named, modules = {command.run_name for command in COMMANDS}, set()
    for folder, package in (("src/diffusers_adm", "diffusers_adm"), ("training", "diffusers_adm.scripts")):
        for path in (REPOSITORY / folder).rglob("*.py"):
            if 'if __name__ == "__main__":\n    run_command(' in path.read_text(encoding="utf-8"):
                parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
                modules.add(".".join((package, *parts)).removesuffix(".__main__"))
    # An old name of data.tokenizer, and what is for clones.
    without = {"diffusers_adm.training.tokenizer", "diffusers_adm.scripts.demo", "diffusers_adm.scripts.example_images"}
    assert modules == named | (modules & without)


def test_dashes_and_underscores():
    for words in (["train", "image_to_image", "--x_y"], ["train", "image-to-image", "--x_y"]):
        command, arguments = find_command(words)
        assert (command.name, arguments) == ("train image-to-image", ["--x_y"])


def test_one_word_and_two_words(started):
    assert started("sample", "train", "--model", "x") == ("here", "sample", ["train", "--model", "x"])
    assert started("evaluate", "frechet", "--k", "3") == ("here", "evaluate frechet", ["--k", "3"])


# 2. Help and mistakes


@pytest.fixture
def ended(capsys):
    def ended(*words):
        with pytest.raises(SystemExit) as end:
            main(words)
        return end.value.code, *capsys.readouterr()

    return ended


def test_help_lists_all_commands(ended):
    code, out, err = ended("--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for command in COMMANDS:
        assert any(line.split() == [*command.name.split(), *command.summary.split()] for line in lines)
    assert max(map(len, lines)) <= 120
    assert ended() == (2, out, "")
    code, out, _ = ended("convert", "-h")
    assert code == 0
    assert "convert glide" in out
    assert "train" not in out
    assert ended("convert") == (2, out, "")


@pytest.mark.parametrize(
    "words, message",
    [
        (["trian"], "error: `diffusers-adm trian` is not a command. Did you mean `diffusers-adm train`?"),
        (["frechet", "--k"], "Did you mean `diffusers-adm evaluate frechet`?"),
        (["train", "controlnett"], "is not a command. Did you mean `diffusers-adm train controlnet`?"),
        (["train", "--config", "x"], "`diffusers-adm train --config` is not a command. See `diffusers-adm train --h"),
        (["zzz"], "error: `diffusers-adm zzz` is not a command. See `diffusers-adm --help` for all.\n"),
    ],
)
def test_unknown_commands(words, message, ended):
    code, out, err = ended(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_starts_without_torch():
    """Importing it takes seconds, which `--help` and mistakes must not wait for."""
    code = "import sys; from diffusers_adm_cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'numpy', 'diffusers', 'diffusers_adm', 'accelerate'} & sys.modules.keys())"
    for word in ("--help", "--version", "trian"):
        result = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, timeout=120)
        assert result.stdout.splitlines()[-1] == "set()", result.stderr


def test_version_and_entry_point(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"diffusers-adm {diffusers_adm.__version__}\n"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"diffusers-adm": "diffusers_adm_cli.main:main"}


# 3. Started here


def test_runs_the_command_with_its_messages(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusers-adm"])
    with pytest.raises(SystemExit) as end:
        main(["convert", "openai", "--checkpoint", "absent.pt", "--output_dir", "out"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: `checkpoint` absent.pt is not a file.\n"
    with pytest.raises(SystemExit) as end:
        main(["push"])
    assert capsys.readouterr().err.startswith("usage: diffusers-adm push [-h]")
    main(["convert", "openai", "--list_presets"])
    assert "lsun_cat (" in capsys.readouterr().out


# 4. Started by Accelerate


def test_options_of_accelerate_come_first(started):
    assert started("train", "adm", "--config", "x") == ("launch", "train adm", [], ["--config", "x"])
    assert started("train", "adm", "--num_processes", "2", "--", "--config", "x") == (
        "launch",
        "train adm",
        ["--num_processes", "2"],
        ["--config", "x"],
    )
    assert started("sample", "--", "--model", "x") == ("launch", "sample", [], ["--model", "x"])
    assert started("train", "tokenizer", "--", "x")[0] == "here"
    assert started("train", "adm", "--help") == ("here", "train adm", ["--help"])  # once, and not in each process
    command = Command("a", "b", "c.")
    assert split_arguments(command, ["--", "x"]) == (None, ["--", "x"])


TINY = """
import os, pathlib, signal, sys, time

def leave(number, frame):
    sys.exit(75)

signal.signal(signal.SIGUSR1, leave)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(f"ready-{os.environ.get('RANK', 0)}").touch()
if sys.argv[1:] == ["wait"]:
    time.sleep(120)
sys.exit(75)
"""
LAUNCH = """
import sys
from diffusers_adm_cli.main import Command, launch
launch(Command("tiny", "tiny", "Tiny."), sys.argv[1].split(), sys.argv[2:])
"""


def start(folder, options, *arguments):
    (folder / "tiny.py").write_text(TINY)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LAUNCH, options, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(process, *files):
    deadline = time.monotonic() + 240
    while not all(file.exists() for file in files):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 here")
def test_passes_signals_on_and_exit_codes_back(tmp_path):
    with start(tmp_path, "--num_processes 1", "wait") as process:
        wait_for(process, tmp_path / "ready-0")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 75
        assert "Traceback" not in process.stderr.read()


def test_exit_code_of_two_processes(tmp_path):
    with start(tmp_path, "--config_file accelerate_two_cpu_processes --main_process_port 0") as process:
        assert process.wait(240) == 75
        assert "Traceback" not in process.stderr.read()
    assert list(tmp_path.glob("ready-*"))


def test_what_is_no_option_of_accelerate(tmp_path):
    with start(tmp_path, "--num_processes 1 oops") as process:
        assert process.wait(240) == 2
        assert process.stderr.read().endswith(
            "error: `--num_processes 1 oops` are not options of `accelerate launch`; only these come before `--`.\n"
        )
