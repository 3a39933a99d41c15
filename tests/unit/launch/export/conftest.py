"""A file of weights to export."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from bitfleet.models import ModelConfig, create_model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of `OPTIONS` in the tests."""
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(
        create_model(ModelConfig(name="birealnet_small", width=8, num_classes=10)).state_dict(), path
    )
    return path
