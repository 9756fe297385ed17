import pytest
import torch
from torch import nn

from lightning_iclr.fedopt.optim import FedYogi
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.fedopt.federation import Module, loader, trainer


def fit(module, data, rounds=3, **options):
    strategy, extra = {}, {}
    for key, value in options.items():
        (extra if key in ("gradient_clip_val", "gradient_clip_algorithm", "precision") else strategy)[key] = value
    strategy = FedOptStrategy(lambda params: FedYogi(params, lr=0.05), **strategy)
    trainer(strategy, rounds, **extra).fit(module, data)
    return module.state_dict(), {name: float(value) for name, value in strategy.round_metrics.items()}


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ({}, {}),
        ({"momentum": 0.0}, {"gradient_clip_val": 0.2}),
        ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "proximal": 0.5}),
        ({"optimizer": lambda params: torch.optim.Adam(params, lr=0.01)}, {"weighting": "uniform"}),
        ({"optimizer": lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1)}, {}),
        ({}, {"precision": "bf16-mixed"}),
    ],
    ids=["momentum", "clip-norm", "clip-value-and-fedprox", "adam", "adagrad", "bf16"],
)
def test_clients_trained_at_once_equal_clients_trained_in_turn(module, options):
    module = {"norm": False, "dropout": 0.0, **module}
    loop, loop_metrics = fit(Module(**module), loader(local_epochs=2), **options)
    for size in (2, 5):
        once, metrics = fit(Module(**module), loader(local_epochs=2), vectorize_clients=size, **options)
        torch.testing.assert_close(once, loop, rtol=0, atol=1e-5 if "precision" not in options else 2e-2)
        assert metrics == pytest.approx(loop_metrics, rel=1e-4 if "precision" not in options else 0.1)


def test_each_client_has_its_own_dropout():
    class Dropped(Module):
        def training_step(self, batch, batch_idx):
            kept = nn.functional.dropout(torch.ones_like(batch[0][:, :1]).expand(-1, 64), 0.5, training=True)
            return self.net(batch[0]).mean() * 0 + self.net[0].weight.sum() * kept.mean()

    strategy = FedOptStrategy(vectorize_clients=4)
    data = loader(max_local_steps=1, clients_per_round=4, batch_size=2)
    trainer(strategy, 1).fit(Dropped(norm=False, schedule=None), data)
    # The gradient depends on the mask alone: with one mask for all, the four updates would have the same norm.
    assert len(set(strategy.round_norms.tolist())) == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": True}, "batch normalisation"),
        ({"norm": False, "schedule": "step"}, "its schedule is stepped within a client"),
        ({"norm": False, "optimizer": lambda params: torch.optim.Rprop(params)}, "its optimizer is none of SGD"),
    ],
)
def test_what_cannot_be_vectorized_is_refused_with_the_reason(options, reason):
    with pytest.raises(ValueError, match=f"vectorize_clients cannot train Module: {reason}"):
        fit(Module(**options), loader(), vectorize_clients=2)


def test_a_step_that_decides_on_values_is_refused():
    class Deciding(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if loss > 0 else -loss

    with pytest.raises(ValueError, match="does not run under torch.func.vmap"):
        fit(Deciding(norm=False), loader(), vectorize_clients=2)
