"""What every test of this folder gets: a fresh tiny UNet, and no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.helpers import tiny_unet


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def pristine_unet() -> UNet2DConditionModel:
    """Made once, never used: copies are cheaper to make."""
    return tiny_unet()


@pytest.fixture
def unet(pristine_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Of its own for every test, so that no test sees what another left on it."""
    return deepcopy(pristine_unet)
