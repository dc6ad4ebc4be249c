"""Checks of arguments that count something."""

from numbers import Integral
from typing import Any


def check_integer(name: str, value: Any, minimum: int, note: str = "", maximum: int | None = None) -> None:
    """
    Raises a `ValueError` unless a value is an integer of at least `minimum`, and at most `maximum` if there is one.
    `note` ends the message's sentence.
    """
    if not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"`{name}` is {value!r}; pass an integer of at least {minimum}{note}.")
    if maximum is not None and value > maximum:
        raise ValueError(f"`{name}` is {value!r}; pass an integer of at most {maximum}{note}.")
