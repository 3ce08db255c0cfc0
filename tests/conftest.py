"""Seeds each test; lets test modules import their common ones."""

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (TESTS, *TESTS.glob("*/")) if folder.is_dir()]


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)
