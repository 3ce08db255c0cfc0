"""Processes that work together in a gloo group; a module starts them once."""

import pytest
from support.processes import Processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with Processes(2, tmp_path_factory.mktemp("two")) as processes:
        yield processes


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    with Processes(4, tmp_path_factory.mktemp("four")) as processes:
        yield processes
