"""
Stand-ins for components in the file of a pipeline that is shipped with its repository.

There, each component has a file of its own, and diffusers makes new classes whenever it loads one. So the pipeline's
file knows a component by the name of its class. The exporter puts this module into that file; nothing else uses it.
"""

import sys
from typing import Any


class StandIn(type):
    """
    Metaclass of classes that stand for one of the same name, from the file `_file`, in `isinstance`, `issubclass`, type
    annotations and diffusers' comparison of types. Calls and attributes are those of the class that was loaded last.
    """

    _file: str

    def __subclasscheck__(cls, other: type) -> bool:
        return any(base.__name__ == cls.__name__ for base in other.__mro__)

    def __instancecheck__(cls, instance: object) -> bool:
        return cls.__subclasscheck__(type(instance))

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, type) and other.__name__ == cls.__name__

    def __hash__(cls) -> int:
        return hash(cls.__name__)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._loaded()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._loaded(), name)

    def _loaded(cls) -> type:
        for name, module in reversed(sys.modules.items()):
            if name.rpartition(".")[2] == cls._file and hasattr(module, cls.__name__):
                return getattr(module, cls.__name__)
        raise RuntimeError(
            f"No {cls._file}.py has been loaded, which defines `{cls.__name__}`. Load a component first."
        )
