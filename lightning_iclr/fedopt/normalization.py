"""Normalise any network in a way that clients with few or unlike examples can train."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def replace_batch_norm(net: nn.Module, num_groups: int = 2) -> nn.Module:
    """Replace every BatchNorm of a network by a GroupNorm with the same scale, shift and epsilon.

    Clients with few or unlike examples have no common batch statistics; GroupNorm needs none (Hsieh et al. 2020). The
    network is changed in place, its parameters stay the same objects, and the running statistics are dropped, so a
    trained network needs some more training.

    Args:
        net: Any network.
        num_groups: Groups of every norm; must divide the channels of all of them.

    Returns:
        ``net``, or the new norm if ``net`` is itself a BatchNorm.

    Raises:
        TypeError: A norm of a class derived from BatchNorm, which may do more than normalise.
        ValueError: ``num_groups`` is below 1 or does not divide a norm's channels.

    Examples:
        >>> type(replace_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))[1]).__name__
        'GroupNorm'
    """
    if num_groups < 1:
        raise ValueError(f"num_groups must be 1 or more, got {num_groups}")
    # All norms are checked before the first is replaced. One that stands at two places stays one.
    replacements: dict[nn.Module, nn.Module] = {}
    paths = [(path, m) for path, m in net.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)]
    for path, norm in paths:
        place = path or "net"
        if type(norm) not in _BATCH_NORMS:
            raise TypeError(
                f"{place} is a {type(norm).__name__}, which may do more than a BatchNorm; build the network with a "
                f"plain BatchNorm or with GroupNorm there"
            )
        if norm.num_features % num_groups:
            raise ValueError(f"num_groups must divide the {norm.num_features} channels of {place}, got {num_groups}")
        group_norm = nn.GroupNorm(num_groups, norm.num_features, norm.eps, norm.affine)
        group_norm.weight, group_norm.bias = norm.weight, norm.bias
        replacements[norm] = group_norm.train(norm.training)
    for path, norm in paths:
        if path:
            net.set_submodule(path, replacements[norm])
    return replacements.get(net, net)
