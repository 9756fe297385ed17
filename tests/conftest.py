"""Every test runs offline, on one thread and from a fixed seed."""

import os
import sys
from pathlib import Path

_OFFLINE = str(Path(__file__).parent / "offline")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    MPLBACKEND="agg",
    PYTHONPATH=os.pathsep.join(filter(None, [_OFFLINE, os.environ.get("PYTHONPATH")])),
)
sys.path.insert(0, _OFFLINE)
sys.modules.pop("sitecustomize", None)

import pytest  # noqa: E402
import sitecustomize  # noqa: E402, F401  (patches the sockets of this process)
import torch  # noqa: E402
from lightning.pytorch import seed_everything  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    seed_everything(0, verbose=False)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Run in an empty folder, so that no run writes into the checkout."""
    monkeypatch.chdir(tmp_path)
