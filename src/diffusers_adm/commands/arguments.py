"""
Command-line arguments: dataclasses, filled from a YAML recipe and the command line.

`--config recipe.yaml` is read first; anything given on the command line wins over it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

from .errors import add_debug_argument, fail


# The words for None in a recipe. The empty one is a key with nothing after its colon.
NULL_WORDS = ("", "~", "null", "none")
# Checked since the client's own error would show the token.
HUB_TOKEN = re.compile(r"[\w.|-]+", re.ASCII)


def arg(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass of arguments, with its help text and whatever else is to be known of it."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def check_at_least(arguments: object, minimum: int, *names: str) -> None:
    """
    Raises:
        ValueError: If one of the named attributes is below `minimum`; None passes.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` is {value}; it must be at least {minimum}.")


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
