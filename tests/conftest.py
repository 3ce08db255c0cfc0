"""Lets the tests import their common module, `from reference import ...`, whatever pytest's import mode; seeds each test."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)
