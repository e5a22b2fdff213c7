"""The levels of the kernels that this CPU has."""

import pytest
from scans import NATIVE_LEVELS

from sparsessm import kernels


@pytest.fixture(params=NATIVE_LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every level of the native kernels."""
    monkeypatch.setattr(kernels, "LEVEL", request.param)
    return request.param


@pytest.fixture(params=kernels.LEVELS)
def any_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, and the reference."""
    monkeypatch.setattr(kernels, "LEVEL", request.param)
    return request.param
