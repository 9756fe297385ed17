"""Import what only some users need."""

from importlib import import_module
from types import ModuleType


def optional_import(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency, at the place where it is used.

    Args:
        module: Dotted name of the module.
        extra: The extra of lightning-iclr that installs it.

    Raises:
        ModuleNotFoundError: It is not installed; the message says what to run.

    Examples:
        >>> optional_import("json", "text").dumps([1])
        '[1]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # installed, but broken inside: hide nothing
        message = f"{module} is needed here and is not installed; run: pip install 'lightning-iclr[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
