"""What every test of this folder gets: a fresh tiny UNet, and no gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.helpers import tiny_unet


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Of its own for every test, so that no test sees what another left on it."""
    return tiny_unet()
