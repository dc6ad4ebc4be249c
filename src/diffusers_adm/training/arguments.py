"""
Command-line arguments of the training scripts: dataclasses, filled from a YAML recipe and the command line.

`--config recipe.yaml` is read first; anything given on the command line wins over it. The dataclasses below hold what
the scripts have in common; a script adds its own by subclassing them.
"""

import argparse
import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from ..command_line import add_debug_argument, fail


# The words for None in a recipe. The empty one is a key with nothing after its colon.
NULL_WORDS = ("", "~", "null", "none")
# Checked since the client's own error would show the token.
HUB_TOKEN = re.compile(r"[\w.|-]+", re.ASCII)


# 1. What the scripts have in common


def arg(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments, with what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"help": help})


def check_at_least(arguments: object, minimum: int, *names: str) -> None:
    """
    Raises:
        ValueError: If one of the named attributes is below `minimum`; None passes.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` is {value}; it must be at least {minimum}.")


@dataclass
class ModelArguments:
    """Where the weights come from, and how the network runs."""

    pretrained_model_name_or_path: str | None = arg(None, "Fine-tune: a pretrained model, on the Hub or in a folder.")
    revision: str | None = arg(None, "Of the pretrained model: a branch, a tag or a commit.")
    variant: str | None = arg(None, "Of the pretrained weights, e.g. fp16.")
    model_config_name_or_path: str | None = arg(
        None, "From scratch: the config of the network (a JSON file, or a folder or Hub repository that holds one)."
    )
    replace_classes: bool = arg(
        False,
        "Fine-tune: keep only the classes of the data, instead of adding new ones to those of the pretrained model. "
        "Classes of the same name keep their weights either way.",
    )
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass to save memory.")
    channels_last: bool = arg(False, "Keep weights and images in channels-last memory format.")

    def check_source(self) -> None:
        """
        Raises:
            ValueError: Unless exactly one of the two sources of a network is given, or if a network from scratch is to
                replace its classes.
        """
        if (self.pretrained_model_name_or_path is None) == (self.model_config_name_or_path is None):
            raise ValueError(
                "Pass either `--model_config_name_or_path` (from scratch) or `--pretrained_model_name_or_path` "
                "(fine-tune)."
            )
        if self.replace_classes and self.pretrained_model_name_or_path is None:
            raise ValueError(
                "`replace_classes` is for fine-tuning, but there is no `--pretrained_model_name_or_path`. A model from "
                "scratch has the classes of the data only; leave `replace_classes` out."
            )


@dataclass
class DataArguments:
    """The images, and what becomes of them."""

    dataset_name: str | None = arg(None, "A dataset on the Hub, or the path of a local copy.")
    dataset_config_name: str | None = arg(None, "Its configuration.")
    train_data_dir: str | None = arg(None, "A folder of images; the names of its subfolders are the labels.")
    data_files: list[str] | None = arg(None, "Parquet files.")
    split: str = arg("train", "The split to train on.")
    image_column: str = arg("image", "The column of the images.")
    label_column: str | None = arg(None, "The column of the labels; none: train without classes.")
    cache_dir: str | None = arg(None, "Where datasets and pretrained models are cached.")
    max_train_samples: int | None = arg(None, "Train on a random subset of this size.")
    resolution: int | None = arg(None, "Pixels; none: the `sample_size` of the model.")
    center_crop: bool = arg(False, "Crop at the centre instead of at random.")
    random_flip: bool = arg(False, "Mirror half of the images. Not for text, flags or anatomy.")
    class_balanced: bool = arg(False, "Draw the classes equally often, however many images they have.")
    min_image_size: int | None = arg(
        None, "Leave out images whose shorter side is below; none: half the resolution (upsamplers: all of it)."
    )
    dataloader_num_workers: int = arg(0, "Processes that load images; 0: the training process itself.")
    image_check_num_proc: int | None = arg(None, "Processes that check the images before training.")

    def __post_init__(self):
        check_at_least(self, 1, "resolution", "image_check_num_proc")
        check_at_least(self, 0, "min_image_size", "dataloader_num_workers")
        if self.class_balanced and self.label_column is None:
            raise ValueError("`class_balanced` was given without a `label_column`. Name the column of the classes.")

    def source(self) -> dict[str, Any]:
        """What `load_image_dataset` is to load: its keyword arguments, but for the seed."""
        names = ("dataset_name", "dataset_config_name", "train_data_dir", "data_files", "split")
        names += ("image_column", "label_column", "cache_dir", "max_train_samples")
        return {name: getattr(self, name) for name in names}


@dataclass
class NoiseArguments:
    """The noising chain. None: what the pretrained scheduler says, or the default in parentheses."""

    ddpm_num_steps: int | None = arg(None, "Length of the noising chain (1000).")
    ddpm_beta_schedule: (
        Literal["linear", "scaled_linear", "quadratic", "cosine", "squaredcos_cap_v2", "sigmoid"] | None
    ) = arg(None, "How the noise grows (linear); cosine and squaredcos_cap_v2 are the same.")
    beta_start: float | None = arg(None, "First beta (0.0001).")
    beta_end: float | None = arg(None, "Last beta (0.02).")

    def __post_init__(self):
        check_at_least(self, 1, "ddpm_num_steps")

    def given(self) -> dict[str, Any]:
        """What was given, by the names of `LearnedVarianceDDPMScheduler`'s arguments."""
        arguments = {
            "num_train_timesteps": self.ddpm_num_steps,
            "beta_schedule": self.ddpm_beta_schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
        }
        return {name: value for name, value in arguments.items() if value is not None}


@dataclass
class DiffusionArguments(NoiseArguments):
    """The noising chain, what the network predicts, and the loss."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = arg(None, "What is predicted (epsilon).")
    variance_type: Literal["learned_range", "learned_log", "fixed_small", "fixed_large"] | None = arg(
        None, "The variance of a reverse step (learned_range)."
    )
    objective: Literal["simple", "hybrid", "hybrid_unscaled", "vlb"] = arg(
        "hybrid", "The loss: simple (squared error), hybrid (with the bound, for the variance), or vlb (the bound)."
    )
    snr_gamma: float | None = arg(None, "Min-SNR weighting of the squared error; 5.0 is usual.")
    timestep_sampler: Literal["uniform", "loss-second-moment"] = arg(
        "uniform", "How timesteps are drawn; loss-second-moment is meant for vlb."
    )

    def given(self) -> dict[str, Any]:
        arguments = {"prediction_type": self.prediction_type, "variance_type": self.variance_type}
        return super().given() | {name: value for name, value in arguments.items() if value is not None}


@dataclass
class TrainingArguments:
    """Steps, optimizer, average, checkpoints and logs."""

    output_dir: str = arg("adm-model", "Where the result, checkpoints and curves go.")
    seed: int = arg(0, "Of everything random.")
    train_batch_size: int = arg(16, "Images per process and forward pass.")
    num_train_epochs: int = arg(100, "Passes over the images, unless `max_train_steps` is given.")
    max_train_steps: int | None = arg(None, "Optimizer steps.")
    gradient_accumulation_steps: int = arg(1, "Forward passes per optimizer step.")
    learning_rate: float = arg(1e-4, "After warm-up.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = arg(
        "constant_with_warmup", "How the learning rate changes."
    )
    lr_warmup_steps: int = arg(500, "Optimizer steps of warm-up.")
    adam_beta1: float = arg(0.9, "Of AdamW.")
    adam_beta2: float = arg(0.999, "Of AdamW.")
    adam_weight_decay: float = arg(0.0, "Of AdamW.")
    adam_epsilon: float = arg(1e-8, "Of AdamW.")
    max_grad_norm: float = arg(1.0, "Gradients are scaled down to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = arg(None, "None: as configured for Accelerate.")
    allow_tf32: bool = arg(False, "Let float32 matrix products run in TF32, as PyTorch's convolutions do anyway.")
    use_ema: bool = arg(True, "Keep an exponential moving average of the weights; validation and the result use it.")
    ema_max_decay: float = arg(0.9999, "The decay that the average warms up to.")
    ema_inv_gamma: float = arg(1.0, "Of the warm-up, decay = 1 - (1 + step / inv_gamma) ** -power.")
    ema_power: float = arg(3 / 4, "Of the warm-up.")
    checkpointing_steps: int = arg(1000, "Optimizer steps between checkpoints.")
    checkpoints_total_limit: int | None = arg(None, "Keep this many; none: all.")
    resume_from_checkpoint: str | None = arg(
        None, "`latest`, or a checkpoint folder. Arguments that are left out are those of the run."
    )
    force_resume: bool = arg(
        False, "Resume even where an argument or the data would make it another training; the new value is used."
    )
    overwrite_output_dir: bool = arg(False, "Start anew where another run left checkpoints, and delete those.")
    logging_steps: int = arg(20, "Optimizer steps between rows of the curves.")
    logging_dir: str = arg("logs", "For TensorBoard, below `output_dir`.")
    report_to: Literal["tensorboard", "none"] = arg("tensorboard", "Where curves go beside the files.")
    validation_steps: int | None = arg(None, "Optimizer steps between validations; none: only at the end.")
    push_to_hub: bool = arg(False, "Push the result to the Hub at the end, with a model card.")
    hub_model_id: str | None = arg(None, "The repository, `user/name`; none: the name of `output_dir`, for yourself.")
    hub_token: str | None = dataclasses.field(
        default=None,
        repr=False,
        metadata={"help": "To write there; none: that of `hf auth login` or $HF_TOKEN, which other users cannot see."},
    )
    hub_private_repo: bool = arg(False, "Make the repository a private one, if it is not there yet.")

    def __post_init__(self):
        for name in ("hub_model_id", "hub_token", "hub_private_repo"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"`{name}` was given without `push_to_hub`, so nothing would be pushed. Pass both.")
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)
        if self.hub_token is not None and not HUB_TOKEN.fullmatch(self.hub_token):
            raise ValueError(
                "`hub_token` holds other characters than letters, digits, `_`, `-`, `.` and `|`, so it is no token."
            )
        if self.force_resume and self.resume_from_checkpoint is None:
            raise ValueError(
                "`force_resume` was given without `resume_from_checkpoint`, so nothing is resumed. Pass both."
            )
        check_at_least(self, 1, "train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
        check_at_least(self, 1, "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps")
        check_at_least(self, 1, "validation_steps")
        check_at_least(self, 0, "lr_warmup_steps")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be positive.")
        if not 0 <= self.ema_max_decay < 1:
            raise ValueError(f"`ema_max_decay` is {self.ema_max_decay}; it must lie in [0, 1).")


@dataclass
class UNetArguments(ModelArguments):
    """
    For U-Nets: `pretrained_model_name_or_path` names a pipeline, of which `unet` and `scheduler` are read, and with
    captions also `text_encoder` and `tokenizer`.
    """

    class_dropout_prob: float = arg(
        0.1, "Share of the labels replaced by the null class, so that the model can be guided without a classifier."
    )

    def __post_init__(self):
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` is {self.class_dropout_prob}; it must lie in [0, 1].")


@dataclass
class TextArguments:
    """Captions, and what reads them."""

    caption_column: str | None = arg(None, "The column of the captions; none: train without text.")
    text_encoder_name_or_path: str | None = arg(
        None, "A text encoder of transformers (CLIP, T5, BERT, ...) on the Hub or in a folder, or a pipeline's."
    )
    tokenizer_name_or_path: str | None = arg(None, "Its tokenizer; none: that of the same repository.")
    text_encoder_config_name_or_path: str | None = arg(
        None, "A JSON file with sizes and `model_type` (or `_class_name` GLIDETextModel), for one trained from scratch."
    )
    train_text_encoder: bool = arg(False, "Train the text encoder together with the U-Net.")
    caption_dropout_prob: float = arg(
        0.1, "Share of the captions replaced by the empty one, so that the model can be guided; independent of classes."
    )
    precompute_text_embeddings: bool = arg(
        False, "Encode each distinct caption once, before training, and keep the result on disk."
    )

    def __post_init__(self):
        if not 0 <= self.caption_dropout_prob <= 1:
            raise ValueError(f"`caption_dropout_prob` is {self.caption_dropout_prob}; it must lie in [0, 1].")
        if self.caption_column is None:
            needing = ("text_encoder_name_or_path", "tokenizer_name_or_path", "text_encoder_config_name_or_path")
            needing += ("train_text_encoder", "precompute_text_embeddings")
            for name in needing:
                if getattr(self, name):
                    raise ValueError(f"`{name}` was given without a `caption_column`. Name the column of the captions.")
        if self.text_encoder_config_name_or_path is not None:
            if self.text_encoder_name_or_path is not None:
                raise ValueError("Pass either `text_encoder_name_or_path` or `text_encoder_config_name_or_path`.")
            if self.tokenizer_name_or_path is None:
                raise ValueError(
                    "`text_encoder_config_name_or_path` builds a text encoder from scratch, for which there is no "
                    "tokenizer. Pass `tokenizer_name_or_path`; `python -m diffusers_adm.training.tokenizer` makes one."
                )
            if not self.train_text_encoder:
                raise ValueError(
                    "`text_encoder_config_name_or_path` gives a text encoder random weights. Pass "
                    "`--train_text_encoder`, or name a trained one with `text_encoder_name_or_path`."
                )
        if self.precompute_text_embeddings and self.train_text_encoder:
            raise ValueError(
                "`precompute_text_embeddings` and `train_text_encoder` exclude each other: the embeddings change while "
                "their encoder is trained. Drop one."
            )


@dataclass
class DiffusionTrainingArguments(TrainingArguments):
    """Validation is a grid of samples."""

    num_validation_images: int = arg(16, "Images in a grid.")
    validation_num_inference_steps: int = arg(50, "Sampling steps of a grid.")
    validation_guidance_scale: float = arg(1.0, "Classifier-free guidance of a grid; 1 is off.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "num_validation_images", "validation_num_inference_steps")


# 2. From recipe and command line to dataclasses


def parse_args(
    dataclass_types: type | Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """
    Fills dataclasses from `--config recipe.yaml` and the command line.

    Every field is an argument of the same name (see transformers' `HfArgumentParser`); a recipe is a flat mapping from
    field names to values, and may give required ones. A value in a recipe means what the same words would mean on the
    command line: `1e-4` is a number and `no` a word, which plain YAML reads the other way round. `none` stands for None
    where a field is optional. Paths are taken as they are given, relative to the working directory.

    Args:
        dataclass_types (a dataclass, or a sequence of them): Field names must be unique over all of them.
        argv (sequence of `str`, *optional*): The arguments; None means those of this process.
        description (`str`, *optional*): Shown by `--help`.

    Returns:
        `tuple`: One instance of each dataclass, in the order given.

    Raises:
        ValueError: If the recipe cannot be read, names an unknown field, or holds a value that does not fit its field.
        SystemExit: As `argparse` does, with a message, for errors on the command line, and for `--help`.
    """
    types = [dataclass_types] if isinstance(dataclass_types, type) else dataclass_types
    return build_arguments(types, given_arguments(types, argv, description))


def build_arguments(dataclass_types: Sequence[type], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """One instance of each dataclass, of the values that its fields have; fields without one take their default."""
    return tuple(
        dataclass_type(**{f.name: values[f.name] for f in dataclasses.fields(dataclass_type) if f.name in values})
        for dataclass_type in dataclass_types
    )


def given_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> dict[str, Any]:
    """
    The arguments that a recipe or the command line give, by name; without those left at their default.

    Arguments and errors are those of [`parse_args`]. The checks of the dataclasses are not made.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Abbreviations would turn into other arguments, or errors, the day a similar field is added.
    parser = _Parser(dataclass_types, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="A YAML recipe, read before the other arguments.")
    add_debug_argument(parser)
    # argparse has no public way to change an argument once it is made, and these are made by transformers.
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config", "debug")}
    # A field that is true by default has a second action, `--no_<name>`, which takes no value: keep the first.
    actions |= {action.dest: action for action in parser._actions if action.dest in actions and action.nargs != 0}

    optional_fields = set()
    for dataclass_type in dataclass_types:
        hints = get_type_hints(dataclass_type)
        optional_fields |= {f.name for f in dataclasses.fields(dataclass_type) if type(None) in get_args(hints[f.name])}
    for name in optional_fields & set(actions):
        action = actions[name]
        action.type = _accept_none(action.type)
        if action.choices is not None:
            action.choices = (*action.choices, None)

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    recipe = finder.parse_known_args(argv)[0].config
    defaults: dict[str, Any] = {}
    if recipe is not None:
        defaults = {
            key: _convert(actions[key], key, value, key in optional_fields, recipe)
            for key, value in _read_recipe(recipe, actions).items()
        }
        parser.set_defaults(**defaults)
        for key in defaults:
            actions[key].required = False

    _, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        flags = [word for word in unknown if word.startswith("--")]
        hints = [_close_matches(flag.split("=")[0], options) for flag in flags]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{''.join(hints)} See --help for all.")
    # Once more, without defaults: what is found now was given.
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = defaults | vars(parser.parse_known_args(argv)[0])
    # Of an optional list, `none` is converted like an entry of it.
    unset = {name: None for name in optional_fields if given.get(name) == [None]}
    return {name: value for name, value in (given | unset).items() if name in actions}


class _Parser(HfArgumentParser):
    """Ends with one sentence, without a list of all arguments before it."""

    def error(self, message: str) -> NoReturn:
        fail(message if "--help" in message else f"{message}. See --help for all arguments.")


def _accept_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert_or_none(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    # argparse puts this name into its error messages.
    convert_or_none.__name__ = getattr(convert, "__name__", "value")
    return convert_or_none


def _close_matches(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known)
    return f" Did you mean {' or '.join(f'`{match}`' for match in matches)}?" if matches else ""


def _read_recipe(recipe: str, known: Collection[str]) -> dict[str, Any]:
    """The recipe as a mapping from known keys to strings, or lists of strings."""
    # PyYAML comes with the `train` extra; the losses beside this module must be importable without it.
    import yaml

    if not Path(recipe).is_file():
        raise ValueError(f"`--config` is {recipe!r}, which is not a file. Pass the path of a YAML recipe.")
    with open(recipe, encoding="utf-8") as file:
        try:
            # The base loader leaves every scalar a string, so that the field's type decides what it means, not YAML
            # 1.1.
            node = yaml.compose(file, Loader=yaml.BaseLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"`--config` {recipe!r} is not valid YAML: {error}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"`--config` {recipe!r} must hold `name: value` lines, one per argument; got a {node.id}.")
    construct = functools.partial(yaml.BaseLoader("").construct_object, deep=True)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = construct(key_node), key_node.start_mark.line + 1
        if key not in known:
            raise ValueError(
                f"`--config` {recipe!r}, line {line}: unknown key {key!r}.{_close_matches(str(key), list(known))} "
                "Keys are the names of the command line's arguments, with underscores and without dashes in front."
            )
        if key in values:
            raise ValueError(f"`--config` {recipe!r}, line {line}: {key!r} is given twice. Keep one.")
        values[key] = construct(value_node)
    return values


def _convert(action: argparse.Action, key: str, value: Any, optional: bool, recipe: str) -> Any:
    def fail(expected: str) -> ValueError:
        return ValueError(f"`--config` {recipe!r}: {key!r} is {value!r}, but {expected}.")

    if isinstance(value, str) and value.lower() in NULL_WORDS and (optional or value.lower() != "none"):
        if not optional:
            raise fail("it needs a value (quote the word if it is meant as text, or drop the key to use the default)")
        return None
    is_list = action.nargs == "+"
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items) or (isinstance(value, list) and not is_list):
        raise fail("it takes " + ("a list of plain values" if is_list else "a single value"))
    converted = []
    for item in items:
        try:
            converted.append(action.type(item))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            name = getattr(action.type, "__name__", "value")
            kind = {"string_to_bool": "true or false"}.get(name, name)
            raise fail(f"it must be of type {kind}") from error
        if action.choices is not None and converted[-1] not in action.choices:
            raise fail(f"it must be one of {', '.join(repr(choice) for choice in action.choices)}")
    return converted if is_list else converted[0]
