"""Shard a network's blocks over the processes of a device mesh (FSDP2)."""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


def shard_blocks(
    net: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh | None, methods: Sequence[str] = ()
) -> None:
    """Shard each block, then what is left of the network; do nothing without a mesh.

    To be called in ``LightningModule.configure_model`` with ``self.device_mesh``, which
    ``lightning.pytorch.strategies.ModelParallelStrategy`` sets (recipe ``trainer/fsdp``).

    Args:
        net: The network, changed in place.
        blocks: Its repeated layers; each is gathered only while it computes.
        mesh: Mesh of two dimensions: the network is replicated over the first and sharded over the second. By default
            ``ModelParallelStrategy`` makes the second a machine's devices and the first the machines.
        methods: Methods of ``net`` that are called from outside besides ``forward``, and gather its weights as well.
    """
    if mesh is None:
        return
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(net, method)
