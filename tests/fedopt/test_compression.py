import pytest
import torch

from lightning_iclr.fedopt.compression import EightBit, TopK
from lightning_iclr.fedopt.optim import FedAvg
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.fedopt.federation import Module, loader, plain_loop, trainer


def top_k(update, sizes):
    order = sorted(range(len(update)), key=lambda place: -abs(float(update[place])))
    kept = torch.zeros_like(update)
    for place in order[: -(-3 * len(update) // 10)]:
        kept[place] = update[place]
    return kept


def eight_bit(update, sizes):
    received, start = [], 0
    for size in sizes:
        part = update[start : start + size]
        start += size
        level = max(abs(float(value)) for value in part) / 127
        received += [round(float(value) / level) * level if level else 0.0 for value in part]
    return torch.tensor(received, dtype=update.dtype)


@pytest.mark.parametrize(("compressor", "twin"), [(TopK(0.3), top_k), (EightBit(), eight_bit)], ids=["top-k", "8 bit"])
@pytest.mark.parametrize("devices", [1, 2])
def test_the_strategy_sends_what_is_left_over_in_the_clients_next_round(compressor, twin, devices):
    module, data, left = Module(norm=False), loader(shuffle=False), {}

    def send(client, changes):
        flat, sizes = torch.cat([change.flatten() for change in changes]), [change.numel() for change in changes]
        wanted = flat + left.get(client, 0.0)
        sent = twin(wanted, sizes)
        left[client] = wanted - sent
        return [part.view(change.shape) for part, change in zip(sent.split(sizes), changes, strict=True)]

    expected = plain_loop(module, data, FedAvg, rounds=5, on_update=send)
    strategy = FedOptStrategy(compression=compressor, start_method="fork")
    trainer(strategy, rounds=5, devices=devices).fit(module, data)
    torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=0, atol=1e-6)


def test_top_k_keeps_exactly_the_largest_share():
    update = torch.randn(1000, dtype=torch.float64)
    torch.testing.assert_close(TopK(0.3)(update, [1000]), top_k(update, [1000]), rtol=0, atol=0)
    assert TopK(1e-9)(update, [1000]).count_nonzero() == 1
    assert TopK(0.3).num_bytes([600, 400]) == 300 * 8


def test_eight_bits_err_by_half_a_level_at_most_and_keep_zero_and_the_largest():
    update = torch.cat([torch.randn(500, dtype=torch.float64) * 10, torch.randn(500, dtype=torch.float64)])
    received = EightBit()(update, [500, 500])
    for part, own in zip(received.split(500), update.split(500), strict=True):
        level = own.abs().max() / 127
        assert ((part - own).abs() <= level / 2 + 1e-12).all()
        assert part.unique().numel() <= 255
        torch.testing.assert_close(part.abs().max(), own.abs().max())
    assert EightBit()(torch.zeros(3), [3]).tolist() == [0.0, 0.0, 0.0]
    assert EightBit().num_bytes([600, 400]) == 1008


def test_the_error_fed_back_vanishes_in_the_long_run():
    # A constant update of 1 everywhere: after n rounds of sending a tenth, the server has n minus a bounded rest.
    update, left, received = torch.linspace(0.5, 1.5, 100), torch.zeros(100), torch.zeros(100)
    for _ in range(400):
        sent = TopK(0.1)(update + left, [100])
        left = update + left - sent
        received += sent
    assert ((received / 400 - update).abs() < 0.1).all()


def test_a_bad_fraction_is_named():
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0.0"):
        TopK(0.0)
