"""
Command-line arguments: dataclasses, filled from a YAML recipe and the command line.

`--config recipe.yaml` is read first; the command line overrides it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from .errors import add_debug_argument, did_you_mean, fail
from .recipes import check_clone, find_recipe, locate


# The words for None in a recipe. The empty one is a key with nothing after its colon.
NULL_WORDS = ("", "~", "null", "none")
BOOLEAN_WORDS = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(
    ("no", "false", "f", "n", "0"), False
)
# Checked here because the client's own error would print the token.
HUB_TOKEN = re.compile(r"[\w.|-]+", re.ASCII)


def arg(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass of arguments, with its help text and further metadata; see [`parse_args`] for `parse`."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def program_name(module: str) -> str:
    """The command line that runs a module: `diffusers-adm ...` if it was started so, otherwise `python -m module`."""
    started = os.path.basename(sys.argv[0])
    return started if started.startswith("diffusers-adm") else f"python -m {module}"


def check_at_least(arguments: object, minimum: int, *names: str) -> None:
    """Checks that the named attributes are None, or finite and at least `minimum`; raises a `ValueError` otherwise."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not minimum <= value < math.inf:  # NaN compares as False
            raise ValueError(f"`{name}` is {value}; it must be {'finite and ' * math.isinf(value)}at least {minimum}.")


def parse_args(
    dataclass_types: type | Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """
    Fills dataclasses from `--config recipe.yaml` and the command line.

    Every field is an argument of the same name. Its type is `str`, `int`, `float`, `bool`, a `Literal` of strings, a
    list of one of these, or one of these `| None`; or any type, with a function `parse=` in its metadata (see `arg`)
    that converts one word, or raises a `ValueError`. A boolean `flag` is given as `--flag` or `--flag false`, and as
    `--no_flag` if it is True by default. `none` stands for None where a field is optional.

    A recipe is a flat mapping from field names to values, required ones included. A value in a recipe means what the
    same words mean on the command line: `1e-4` is a number and `no` a word, which plain YAML reads the other way round.
    Paths are relative to the working directory; those of network configs in `training/configs/` that are not there are
    looked up in the installed package. In place of a path, `--config` takes the name of a recipe that is installed with
    the package, such as `emoji_32`.

    Args:
        dataclass_types (a dataclass, or a sequence of them): Field names must be unique over all of them.
        argv (sequence of `str`, *optional*): The arguments. Defaults to those of this process.
        description (`str`, *optional*): Shown by `--help`.

    Returns:
        `tuple`: One instance of each dataclass, in the order given.

    Raises:
        ValueError: If the recipe cannot be read, names an unknown field, or holds a value of the wrong type.
        SystemExit: With a message, for errors on the command line; for `--help`.
    """
    types = [dataclass_types] if isinstance(dataclass_types, type) else dataclass_types
    return build_arguments(types, given_arguments(types, argv, description))


def build_arguments(dataclass_types: Sequence[type], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Builds one instance of each dataclass from values by field name; fields without a value take their default."""
    return tuple(
        dataclass_type(**{f.name: values[f.name] for f in dataclasses.fields(dataclass_type) if f.name in values})
        for dataclass_type in dataclass_types
    )


def given_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> dict[str, Any]:
    """
    Returns the arguments that a recipe or the command line gives, by name, without those left at their default.

    Arguments and errors are those of [`parse_args`]. The checks of the dataclasses do not run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = {}
    for dataclass_type in dataclass_types:
        hints = get_type_hints(dataclass_type)
        arguments |= {field.name: _Argument(field, hints[field.name]) for field in dataclasses.fields(dataclass_type)}

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    recipe = finder.parse_known_args(argv)[0].config
    from_recipe, is_installed = ({}, False) if recipe is None else _read_recipe(recipe, arguments)
    given = dict(from_recipe)

    # Abbreviations would turn into other arguments, or errors, the day a similar field is added.
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for argument in arguments.values():
        argument.add_to(parser, given)
    parser.add_argument("--config", metavar="RECIPE", help="A YAML file of arguments, or the name of an installed one.")
    add_debug_argument(parser)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = ["--" + word[2:].split("=")[0].replace("-", "_") for word in unknown if word.startswith("--")]
        hints = [did_you_mean(flag, [f"--{name}" for name in (*arguments, "config", "debug")]) for flag in flags]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{''.join(hints)} See --help for all.")
    passed = {name: value for name, value in vars(found).items() if name in arguments}
    if is_installed:
        check_clone(recipe, {name: value for name, value in from_recipe.items() if name not in passed})
    given |= passed
    # In an optional list, `none` was converted like any other entry.
    return {name: None if value == [None] else value for name, value in given.items()}


class _Argument:
    """A field of a dataclass as an argument: converts its words and adds it to a parser."""

    def __init__(self, field: dataclasses.Field, hint: Any):
        self.name, self.help = field.name, field.metadata.get("help", "")
        self.default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        self.parse: Callable[[str], Any] | None = field.metadata.get("parse")
        self.is_optional = type(None) in get_args(hint)
        if self.is_optional:
            hint, *others = (option for option in get_args(hint) if option is not type(None))
            if others and self.parse is None:
                raise TypeError(f"The field {self.name} has several types; it needs a `parse`.")
        self.is_list = get_origin(hint) is list
        self.kind = get_args(hint)[0] if self.is_list else hint
        self.choices = get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def convert(self, text: str) -> Any:
        """Converts one word. Raises an `argparse.ArgumentTypeError`, whose message argparse shows."""
        if self.is_optional and text.lower() == "none":
            return None
        if self.choices:
            if text not in self.choices:
                choices = ", ".join(map(repr, self.choices))
                raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {choices})")
            return text
        if self.parse is not None:
            try:
                return self.parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error
        try:
            return BOOLEAN_WORDS[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"invalid {self.kind.__name__} value: {text!r}") from error

    def convert_yaml(self, value: Any) -> Any:
        """Converts a value of a recipe, whose scalars are strings. Raises an `argparse.ArgumentTypeError`."""
        if isinstance(value, str) and value.lower() in NULL_WORDS and (self.is_optional or value.lower() != "none"):
            if self.is_optional:
                return None
            raise argparse.ArgumentTypeError("a value is needed (quote the word for text, or drop the key)")
        items = value if isinstance(value, list) and self.is_list else [value]
        if not all(isinstance(item, str) for item in items):
            expected = "a list of plain values" if self.is_list else "a single value"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {value!r}")
        converted = [self.convert(item) for item in items]
        return converted if self.is_list else converted[0]

    def add_to(self, parser: argparse.ArgumentParser, recipe: Mapping[str, Any]) -> None:
        """Adds the argument to `parser`. It is not required, and `--help` shows its value, if `recipe` holds it."""
        default, dashed = recipe.get(self.name, self.default), self.name.replace("_", "-")
        shown = "" if default in (dataclasses.MISSING, None) else f" (default: {default})".replace("%", "%%")
        is_flag = self.kind is bool
        words = ("true", "false") if is_flag else self.choices
        parser.add_argument(
            *dict.fromkeys((f"--{self.name}", f"--{dashed}")),
            type=self.convert,
            required=default is dataclasses.MISSING,
            metavar=f"{{{','.join(words)}}}" if words else self.name.upper(),
            help=self.help + shown,
            nargs="+" if self.is_list else "?" if is_flag else None,
            const=True if is_flag else None,
        )
        if is_flag and self.default is True:
            names = dict.fromkeys((f"--no_{self.name}", f"--no-{dashed}"))
            parser.add_argument(
                *names, action="store_false", dest=self.name, help=f"The same as `--{self.name} false`."
            )


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without a list of all arguments."""

    def error(self, message: str) -> NoReturn:
        message += "" if message.endswith((".", "?")) else "."
        fail(message if "--help" in message else f"{message} See --help for all arguments.")


def _read_recipe(recipe: str, arguments: Mapping[str, _Argument]) -> tuple[dict[str, Any], bool]:
    """Reads the values of a recipe, by argument; and whether it is installed with the package."""
    # PyYAML comes with the `train` extra; the losses must be importable without it.
    import yaml

    path, is_installed = find_recipe(recipe)
    with open(path, encoding="utf-8") as file:
        try:
            # The base loader keeps every scalar a string, so that the type of the field decides what it means, not
            # YAML 1.1.
            node = yaml.compose(file, Loader=yaml.BaseLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"`--config` {recipe!r} is not valid YAML: {error}") from error
    if node is None:
        return {}, is_installed
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"`--config` {recipe!r} must hold `name: value` lines, one per argument; got a {node.id}.")
    construct = functools.partial(yaml.BaseLoader("").construct_object, deep=True)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, place = construct(key_node), f"`--config` {recipe!r}, line {key_node.start_mark.line + 1}"
        if not isinstance(key, str) or key not in arguments:
            raise ValueError(
                f"{place}: unknown key {key!r}.{did_you_mean(str(key), arguments)} Keys are the names of the "
                "command line's arguments, with underscores and without dashes in front."
            )
        if key in values:
            raise ValueError(f"{place}: {key!r} is given twice. Keep one.")
        try:
            values[key] = arguments[key].convert_yaml(construct(value_node))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{place}: {key!r}: {error}.") from error
    return {name: locate(value) for name, value in values.items()}, is_installed
