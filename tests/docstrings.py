"""Whether a docstring documents the arguments that there are."""

import ast
import inspect
import re


def documented_arguments(docstring):
    """`{name: text of its types}` of the Args section; one entry may document several names."""
    section = re.search(
        r"(?:^|\n) *Args:\n(.*?)(?:\n *(?:Returns|Raises):|\Z)", inspect.cleandoc(docstring), re.DOTALL
    )[1]
    indent = re.match(r" +", section)[0]
    entries = re.split(rf"\n{indent}(?=\S)", section.removeprefix(indent))
    documented = {}
    for entry in entries:
        entry = " ".join(entry.split())
        # `a (types), b (types): text` or `a, b (types): text`
        while not entry.startswith(":"):
            names, types, entry = re.match(r"([\w, ]+) \(((?:`[^`]*`|[^()`])*)\)(?:, )?(.*)", entry).groups()
            documented |= dict.fromkeys((name.strip() for name in names.split(",")), types)
    return documented


def parameters_of(function):
    return {n: p for n, p in inspect.signature(function).parameters.items() if n != "self"}


def check_documented_arguments(docstring, function):
    """Asserts that names, order and stated defaults are those of the signature, and that what may be `None` says so."""
    documented, parameters = documented_arguments(docstring), parameters_of(function)
    assert list(documented) == list(parameters)
    for name, types in documented.items():
        default = parameters[name].default
        stated = re.search(r"defaults? to `?([^`]+)`?$", types)
        if stated:
            assert ast.literal_eval(stated[1]) == default, name
        if default is None:
            assert "*optional*" in types, name
