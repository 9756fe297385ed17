import pytest
import torch

from lightning_iclr.fedopt.optim import FedYogi
from lightning_iclr.fedopt.privacy import epsilon
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.fedopt.federation import Module, loader, plain_loop, trainer

pytestmark = pytest.mark.filterwarnings("ignore:round . leaves the server as it was")


def yogi(params):
    return FedYogi(params, lr=0.05)


def sparse():
    """Nobody takes part in the second of four rounds."""
    data = loader(shuffle=False, client_dropout=0.5, seed=147)
    assert [bool(data.plan(index).cohort) for index in range(4)] == [True, False, True, True]
    return data


@pytest.mark.parametrize("vectorize", [None, 2], ids=["in turn", "at once"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_round_without_clients_is_as_if_it_had_not_been(devices, vectorize):
    module = Module(norm=vectorize is None, dropout=0.0)
    expected = plain_loop(module, sparse(), yogi, rounds=4)
    strategy = FedOptStrategy(yogi, vectorize_clients=vectorize, start_method="fork")
    federated = trainer(strategy, 4, devices=devices)
    federated.fit(module, sparse())
    torch.testing.assert_close(module.state_dict(), expected, rtol=0, atol=1e-5 if vectorize else 1e-6)
    assert float(federated.callback_metrics["fedopt/skipped_rounds"]) == 1
    assert float(federated.callback_metrics["fedopt/clients"]) == len(sparse().plan(3).cohort)


@pytest.mark.parametrize("vectorize", [None, 2], ids=["in turn", "at once"])
@pytest.mark.parametrize("devices", [1, 2])
def test_rounds_in_which_every_client_drops_out_leave_the_weights_alone(devices, vectorize):
    module, before = Module(norm=vectorize is None), Module(norm=vectorize is None).state_dict()
    data = loader(client_dropout=0.9999)
    assert not any(data.plan(index).cohort for index in range(3))
    strategy = FedOptStrategy(yogi, vectorize_clients=vectorize, start_method="fork")
    federated = trainer(strategy, 3, devices=devices)
    federated.fit(module, data)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    numbers = {name: float(federated.callback_metrics[f"fedopt/{name}"]) for name in ("clients", "skipped_rounds")}
    assert numbers == {"clients": 0, "skipped_rounds": 3}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_counts_the_rounds_without_clients_before_it(tmp_path):
    def fit(rounds, ckpt_path=None):
        strategy = FedOptStrategy(yogi, weighting="uniform", clip_norm=0.5, noise_multiplier=1.5, delta=1e-5)
        federated = trainer(strategy, rounds)
        federated.fit(Module(norm=False), sparse(), ckpt_path=ckpt_path)
        federated.save_checkpoint(tmp_path / f"{rounds}.ckpt")
        return {name: float(value) for name, value in federated.callback_metrics.items()}

    fit(2)
    metrics = fit(4, tmp_path / "2.ckpt")
    assert metrics["fedopt/skipped_rounds"] == 1
    # A round without clients spends nothing, and half of the six clients are drawn in each.
    assert metrics["fedopt/epsilon"] == pytest.approx(epsilon(1.5, 0.5, 3, 1e-5), rel=1e-6)
