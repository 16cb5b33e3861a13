import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a change is judged by what it changes; `random` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test models and data that lies beside the checkout and is not part of it."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("SPECQD_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the shared models and data; {folder} is not a folder (set SPECQD_SHARED)")
    return folder
