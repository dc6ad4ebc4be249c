"""Arguments that were given and have no effect: refused where that is a mistake, named in the log otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """
    When arguments act.

    Args:
        names (tuple of `str`): The arguments.
        act (callable): From the values of all arguments by name to whether these act. Arguments that the command does
            not have are None.
        because (`str`): Why they do not, if they do not; it may name other arguments as `{name}`.
        refused (`bool`, defaults to `False`): Giving them is an error. Otherwise the log names them: a recipe may hold
            what an argument on the command line has switched off.
    """

    names: tuple[str, ...]
    act: Callable[[Mapping[str, Any]], bool]
    because: str
    refused: bool = False


def check_effects(*all_args: Any, rules: Sequence[Rule], taken_over: Collection[str] = ()) -> list[str]:
    """
    Looks for arguments that were given and have no effect. Given means: neither the default nor off (None, 0, False).

    Args:
        all_args (dataclass instances): From [`parse_args`].
        rules (sequence of `Rule`): Those of the command.
        taken_over (collection of `str`, *optional*): Arguments that were not given, but have the values of the run that
            is resumed.

    Returns:
        list of `str`: One sentence for each that is harmless, to be logged.

    Raises:
        ValueError: For one that is surely a mistake.
    """
    values: dict[str, Any] = {name: None for rule in rules for name in rule.names}
    fields = [(arguments, field) for arguments in all_args for field in dataclasses.fields(arguments)]
    values |= {field.name: getattr(arguments, field.name) for arguments, field in fields}
    is_given = {field.name for _, field in fields if values[field.name] and values[field.name] != field.default}
    is_given -= set(taken_over)
    sentences = []
    for rule in rules:
        for name in rule.names:
            if name not in is_given or rule.act(_Values(values)):
                continue
            sentence = f"`{name}` is {values[name]!r}, which has no effect: {rule.because.format(**values)}."
            if rule.refused:
                raise ValueError(f"{sentence} Leave it out.")
            sentences.append(sentence)
    return sentences


class _Values(dict):
    """None for an argument that the command does not have."""

    def __missing__(self, name: str) -> None:
        return None
