import math

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_iclr.fedopt.optim import FedAvg
from lightning_iclr.fedopt.privacy import epsilon, gaussian_noise
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.fedopt.federation import Module, loader, plain_loop, trainer


class Still(LightningModule):
    """20,000 parameters that no client changes, so that a server's step is noise alone."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(20_000))

    def training_step(self, batch, batch_idx):
        return self.weight.sum() * 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_long_updates_are_cut_to_the_norm_and_short_ones_kept():
    module, data, norms = Module(norm=False), loader(shuffle=False), []

    def cut(client, changes):
        norm = torch.cat([change.flatten() for change in changes]).norm()
        norms.append(float(norm))
        return [change * min(1.0, 0.25 / float(norm)) for change in changes]

    expected = plain_loop(module, data, FedAvg, rounds=3, on_update=cut)
    strategy = FedOptStrategy(clip_norm=0.25)
    trainer(strategy, rounds=3).fit(module, data)
    assert min(norms) < 0.25 < max(norms)
    torch.testing.assert_close(module.state_dict(), expected, rtol=0, atol=1e-6)
    assert float(strategy.round_metrics["clipped_clients"]) == sum(norm > 0.25 for norm in norms[-3:])


@pytest.mark.parametrize("devices", [1, 2])
def test_the_noise_on_the_mean_has_the_standard_deviation_z_clip_over_the_weight(devices):
    module = Still()
    options = {"clip_norm": 0.5, "noise_multiplier": 1.5, "weighting": "uniform", "start_method": "fork"}
    trainer(FedOptStrategy(**options), rounds=1, devices=devices).fit(module, loader())
    noise, std = module.weight.detach().double(), 1.5 * 0.5 / 3
    assert abs(float(noise.mean())) < 4 * std / math.sqrt(20_000)
    assert abs(float(noise.std()) - std) < 4 * std / math.sqrt(2 * 20_000)


def test_rounds_draw_noise_of_their_own_and_a_rerun_the_same():
    first, second, again = (gaussian_noise(1000, 1.0, 0, index) for index in (0, 1, 0))
    assert torch.equal(first, again)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(1000)
    assert not torch.equal(first, gaussian_noise(1000, 1.0, 1, 0))


def test_the_privacy_spent_is_opacuss_for_the_same_rounds():
    accountants = pytest.importorskip("opacus.accountants")
    accountant = accountants.RDPAccountant()
    for _ in range(4):
        accountant.step(noise_multiplier=1.5, sample_rate=0.5)
    expected = accountant.get_epsilon(1e-5)
    assert epsilon(1.5, 0.5, 4, 1e-5) == pytest.approx(expected, rel=1e-12)
    assert epsilon(1.5, 0.5, 0, 1e-5) == 0.0
    strategy = FedOptStrategy(clip_norm=0.5, noise_multiplier=1.5, weighting="uniform", delta=1e-5)
    trainer(strategy, rounds=4).fit(Still(), loader())
    assert float(strategy.round_metrics["epsilon"]) == pytest.approx(expected, rel=1e-6)


def test_a_module_whose_buffers_would_leak_is_refused():
    options = {"clip_norm": 0.5, "noise_multiplier": 1.0, "weighting": "uniform"}
    with pytest.raises(ValueError, match="the module has float buffers, whose mean would leak"):
        trainer(FedOptStrategy(**options), rounds=1).fit(Module(norm=True), loader())
    trainer(FedOptStrategy(**options, buffers="keep"), rounds=1).fit(Module(norm=True), loader())
