"""A device that is lost ends the file of tests: in its process nothing can be told any more."""

from __future__ import annotations

import pytest
import torch
from gpu_models import ON_CUDA


@pytest.fixture(autouse=True)
def _device_is_there():
    yield
    if ON_CUDA and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device is lost: {error}", returncode=3)
