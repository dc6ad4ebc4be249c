"""Arguments: recipes and command lines as people write them."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import pytest

from diffusers_adm.commands.arguments import arg, check_at_least, given_arguments, parse_args


@dataclass
class ModelArguments:
    output_dir: str = field(metadata={"help": "Where to write."})
    mixed_precision: Literal["no", "fp16", "bf16"] = field(default="no", metadata={"help": "Precision."})
    timestep_respacing: str | None = None
    snr_gamma: float | None = None
    objective: Literal["simple", "hybrid"] | None = None


@dataclass
class TrainingArguments:
    learning_rate: float = 1e-3
    train_batch_size: int = 16
    random_flip: bool = False
    use_ema: bool = True
    data_files: list[str] | None = None
    channels: list[int] = field(default_factory=lambda: [1, 2])
    seed: int = arg(-1, "Random seed.", anything="else")  # further metadata is for others


@pytest.fixture
def parse(tmp_path):
    def parse(recipe, *argv):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe, encoding="utf-8")
        return parse_args([ModelArguments, TrainingArguments], ["--config", str(path), *argv])

    return parse


def test_defaults_and_command_line_without_a_recipe():
    model, training = parse_args([ModelArguments, TrainingArguments], ["--output_dir", "out", "--random_flip"])
    assert model == ModelArguments(output_dir="out")
    assert training == TrainingArguments(random_flip=True)
    assert parse_args(ModelArguments, ["--output_dir", "out"]) == (model,)


def test_recipe_fills_every_kind_of_field(parse):
    model, training = parse(
        """
        output_dir: runs/one       # required, given here alone
        mixed_precision: no        # YAML 1.1 would read False
        timestep_respacing: 250    # text, though it looks like a number
        snr_gamma: 5
        objective: hybrid
        learning_rate: 1e-4        # YAML 1.1 would read text
        train_batch_size: 8
        random_flip: true
        use_ema: no
        data_files: [a.parquet, b.parquet]
        channels:
          - 3
          - 4
        seed: -7
        """
    )
    assert model == ModelArguments("runs/one", "no", "250", 5.0, "hybrid")
    assert training == TrainingArguments(1e-4, 8, True, False, ["a.parquet", "b.parquet"], [3, 4], -7)
    assert isinstance(model.snr_gamma, float)


def test_every_value_can_be_overridden(parse):
    recipe = """
        output_dir: a
        timestep_respacing: ddim50
        snr_gamma: 5
        objective: hybrid
        random_flip: true
        use_ema: false
        data_files: a.parquet
        channels: [1, 2, 3]
    """
    assert parse(recipe)[1].data_files == ["a.parquet"]
    model, training = parse(
        recipe,
        *["--output-dir", "b", "--timestep_respacing", "none", "--snr_gamma=none", "--objective", "none"],
        *["--random_flip", "false", "--use_ema", "--data_files", "c", "d", "--channels", "9", "--seed=-3"],
    )
    assert model == ModelArguments("b")
    assert training == TrainingArguments(random_flip=False, use_ema=True, data_files=["c", "d"], channels=[9], seed=-3)


def test_a_flag_that_is_true_by_default_can_be_turned_off(parse):
    assert parse("output_dir: a", "--no_use_ema")[1].use_ema is False
    assert parse("{output_dir: a, use_ema: true}", "--no_use_ema")[1].use_ema is False


@pytest.mark.parametrize("word", ["", "~", "null", "none"])
def test_null(parse, word):
    model, training = parse(f"output_dir: a\nsnr_gamma: {word}\ndata_files: {word}\nobjective: {word}")
    assert (model.snr_gamma, training.data_files, model.objective) == (None, None, None)


def test_recipes_do_not_leak_into_the_next_call(parse):
    parse("{output_dir: a, learning_rate: 1, channels: [7]}")
    assert parse("output_dir: a")[1] == TrainingArguments()


@pytest.mark.parametrize(
    "recipe,message",
    [
        ("learning_rat: 1", r"line 1: unknown key 'learning_rat'. Did you mean `learning_rate`"),
        ("seed: 1\nrandom-flip: yes", r"line 2: unknown key 'random-flip'. Did you mean `random_flip`"),
        ("config: other.yaml", r"unknown key 'config'"),
        ("seed: 1\nseed: 2", r"line 2: 'seed' is given twice"),
        ("learning_rate: fast", r"recipe.yaml', line 1: 'learning_rate': invalid float value: 'fast'"),
        ("seed: 1\ntrain_batch_size: 1.5", r"line 2: 'train_batch_size': invalid int value: '1.5'"),
        ("random_flip: maybe", r"'random_flip': invalid bool value: 'maybe'"),
        ("mixed_precision: fp8", r"'mixed_precision': invalid choice: 'fp8' \(choose from 'no', 'fp16', 'bf16'\)"),
        ("channels: [1, x]", r"'channels': invalid int value: 'x'"),
        ("channels: [[1]]", r"'channels': expected a list of plain values, got \[\['1'\]\]"),
        ("seed: [1]", r"'seed': expected a single value, got \['1'\]"),
        ("seed: {a: 1}", r"'seed': expected a single value, got {'a': '1'}"),
        ("output_dir:", r"'output_dir': a value is needed"),
        ("seed: null", r"'seed': a value is needed"),
        ("- seed", r"must hold `name: value` lines.*; got a sequence"),
        ("seed: [1", r"is not valid YAML"),
    ],
)
def test_recipe_errors_name_the_key_and_the_file(parse, recipe, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(recipe)
    assert "recipe.yaml" in str(caught.value)


def test_recipe_that_does_not_exist():
    with pytest.raises(ValueError, match="`--config` is 'nowhere.yaml', which is not a file"):
        parse_args(ModelArguments, ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--output_dir", "a", "--learning_rates", "1"], "Did you mean `--learning_rate`"),
        (["--output_dir", "a", "--learning-rates=1"], "Did you mean `--learning_rate`?"),
        (["--output_dir", "a", "--learn", "1"], "unrecognized arguments: --learn 1"),
        (["--learning_rate", "1"], "--output_dir"),
        (["--output_dir", "a", "--snr_gamma", "big"], "invalid float value: 'big'"),
        (["--output_dir", "a", "--objective", "vlb"], "invalid choice: 'vlb'"),
    ],
)
def test_command_line_errors(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        parse_args([ModelArguments, TrainingArguments], argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("end", ["", ".", "?"])
def test_errors_end_once(capsys, end):
    def refuse(word):
        raise ValueError(f"{word} is no size{end}")

    @dataclass
    class Arguments:
        size: object = arg(1, "Size.", parse=refuse)

    with pytest.raises(SystemExit):
        parse_args(Arguments, ["--size", "0x4"])
    assert f"0x4 is no size{end or '.'} See --help for all arguments.\n" in capsys.readouterr().err


def test_help_shows_the_recipe_the_defaults_and_the_choices(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args([ModelArguments, TrainingArguments], ["--help"], description="Trains a thing.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "Trains a thing.",
        "--config RECIPE ",
        "(default: no)",
        "{no,fp16,bf16}",
        "--no_use_ema",
        "Random seed. (default: -1)",
    ):
        assert words in text


def test_an_optional_list_of_the_recipe_can_be_unset(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data_files: a.parquet\n")
    (arguments,) = parse_args(TrainingArguments, ["--config", str(recipe), "--data_files", "none"])
    assert arguments.data_files is None


def test_what_was_given(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{learning_rate: 1e-3, channels: [3], snr_gamma: none}")  # the first is the default
    words = ["--config", str(recipe), "--output_dir", "a", "--channels", "4", "--no_use_ema", "--data_files", "none"]
    given = given_arguments([ModelArguments, TrainingArguments], words)
    assert given == {
        "learning_rate": 1e-3,
        "channels": [4],
        "snr_gamma": None,
        "output_dir": "a",
        "use_ema": False,
        "data_files": None,
    }
    assert given_arguments([TrainingArguments], []) == {}


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bounds_do_not_let_nan_and_infinity_pass(value):
    with pytest.raises(ValueError, match=f"`weight` is {value}; it must be .*at least 0"):
        check_at_least(SimpleNamespace(weight=value), 0, "weight")
