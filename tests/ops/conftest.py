"""The fixture `backend`: every test that takes it runs on each backend that this machine has."""

import pytest
from backends import skip_unless_available

from maskprune.ops.backend import Backend


def pytest_generate_tests(metafunc):
    """The names are those of the module's BACKENDS, or all."""
    if "backend" in metafunc.fixturenames:
        names = getattr(metafunc.module, "BACKENDS", [*Backend])
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request):
    skip_unless_available(request.param)
    return str(request.param)
