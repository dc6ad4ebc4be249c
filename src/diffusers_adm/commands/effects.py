"""Arguments that have no effect: errors where they are surely mistakes, otherwise sentences for the log."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """
    States when arguments have an effect.

    Args:
        names (tuple of `str`): The arguments.
        act (callable): Maps the values of all arguments, by name, to whether these have an effect. Arguments that the
            command lacks are None.
        because (`str`): Why they have none, if so; it may contain the values of other arguments as `{name}`.
        refused (`bool`, defaults to `False`): Giving them without effect is an error. Otherwise it is logged, since the
            command line may switch off what a recipe configures.
    """

    names: tuple[str, ...]
    act: Callable[[Mapping[str, Any]], bool]
    because: str
    refused: bool = False


def check_effects(*all_args: Any, rules: Sequence[Rule], taken_over: Collection[str] = ()) -> list[str]:
    """
    Finds arguments that were given and have no effect. An argument counts as given if its value is neither the default
    nor off (None, 0, False).

    Args:
        all_args (dataclass instances): From [`parse_args`].
        rules (sequence of `Rule`): The rules of the command.
        taken_over (collection of `str`, *optional*): Arguments that were not given but take the values of the resumed
            run.

    Returns:
        list of `str`: One sentence per harmless argument, for the log.

    Raises:
        ValueError: For an argument of a rule with `refused`.
    """
    fields = {field.name: (args, field.default) for args in all_args for field in dataclasses.fields(args)}
    values = _Values({name: getattr(args, name) for name, (args, _) in fields.items()})
    sentences = []
    for rule in rules:
        for name in rule.names:
            value = values[name]
            if not value or value == fields[name][1] or name in taken_over or rule.act(values):
                continue
            sentence = f"`{name}` is {value!r}, which has no effect: {rule.because.format_map(values)}."
            if rule.refused:
                raise ValueError(f"{sentence} Leave it out.")
            sentences.append(sentence)
    return sentences


class _Values(dict):
    """Values by name, None for an argument that the command lacks."""

    def __missing__(self, name: str) -> None:
        return None
