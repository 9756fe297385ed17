"""Run a function in several processes of one process group, for tests that two processes equal one.

Fork keeps the imports of the test's process, so a run takes tenths of a second; it is safe as long as this process has
used neither a GPU nor a pool of threads (tests run with one thread). A file is the meeting point, so no port is taken.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.plugins.environments import LightningEnvironment


def _worker(rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(fn(*args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_distributed(fn: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """Run ``fn(*args)`` in ``world_size`` processes and return each rank's result.

    The results go through a file that is read with ``weights_only=True``: tensors, numbers, strings and collections of
    them. An exception in a rank fails the test with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (fn, world_size, folder, args), nprocs=world_size, start_method="fork")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


class Ranks(LightningEnvironment):
    """Tell a Trainer inside of ``run_distributed`` which process it is in.

    ``Trainer(accelerator="cpu", devices=2, strategy=..., plugins=[Ranks()])`` joins the group that is there.
    """

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()
