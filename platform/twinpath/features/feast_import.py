"""Feast's import in a sixth of its time, for processes that read and write features.

Of the ten seconds that ``import feast`` takes, Feast 0.67 spends one and a half on itself. The rest
is torch, which a module of its imports wherever it is installed and two of its methods use, and
typeguard, which parses the sources of its classes and compiles them anew with checks. A replica
that starts because there is load should not wait for either.
"""

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

from twinpath.errors import MissingExtraError

_TORCH = "feast.torch_wrapper"
_importing = threading.Lock()


def feast_(*, checked: bool = False) -> Any:
    """The package ``feast``, ``checked`` for those who write definitions: its checks name an
    argument of a wrong type. Whoever imports it first in a process has decided that. Meanwhile
    no module that another thread imports is checked either. Raises MissingExtraError."""
    with _importing:
        try:
            if "feast" not in sys.modules:
                with nullcontext() if checked else _unchecked(), _without_torch():
                    importlib.import_module("feast")
            return importlib.import_module("feast")
        except ImportError as error:
            if error.name not in ("feast", "typeguard"):
                raise
            raise MissingExtraError("feast", "features") from None


@contextmanager
def _unchecked() -> Iterator[None]:
    """Meanwhile ``@typechecked`` gives back what it is given."""
    import typeguard

    def unchanged(target: Any = None, **_: Any) -> Any:
        return unchanged if target is None else target

    checked = typeguard.typechecked
    typeguard.typechecked = unchanged
    try:
        yield
    finally:
        typeguard.typechecked = checked


@contextmanager
def _without_torch() -> Iterator[None]:
    """Feast's own module about torch is imported when somebody asks it for torch."""
    placeholder = ModuleType(_TORCH)

    def get_torch() -> Any:
        with _importing:
            if sys.modules.get(_TORCH) is placeholder:
                del sys.modules[_TORCH]
            return importlib.import_module(_TORCH).get_torch()

    placeholder.get_torch = get_torch  # type: ignore[attr-defined]
    sys.modules[_TORCH] = placeholder
    try:
        yield
    except BaseException:
        sys.modules.pop(_TORCH, None)
        raise
