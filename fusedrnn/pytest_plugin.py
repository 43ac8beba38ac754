"""pytest: the fixture `assert_parity` and the option `--fusedrnn-backend`.

Ask for it where it is wanted, with ``-p fusedrnn.pytest_plugin`` or ``pytest_plugins`` in a
conftest.py: an entry point would import torch into every pytest run of the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("fusedrnn").addoption(
        "--fusedrnn-backend",
        metavar="NAME",
        help="the backend that fusedrnn runs on: native, reference, torch or auto (fusedrnn.use_backend)",
    )


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--fusedrnn-backend")
    if name is None:
        return
    # Here, not above: pytest loads plugins in runs that have nothing to do with torch.
    from .backends.select import use_backend

    try:
        use_backend(name)
    except ValueError as error:
        raise pytest.UsageError(f"--fusedrnn-backend: {error}") from error


def pytest_report_header(config: pytest.Config) -> str | None:
    name = config.getoption("--fusedrnn-backend")
    return None if name is None else f"fusedrnn backend: {name}"


@pytest.fixture
def assert_parity() -> Callable[..., Any]:
    """:func:`fusedrnn.testing.assert_parity`."""
    from .testing import assert_parity

    return assert_parity
