"""The server's optimizers against algorithm 2 written out in numpy, against torch, and against Flower's numbers."""

import io

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser, OptimizerCallable

from lightning_iclr.fedopt.optim import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi

ADAPTIVE = [FedAdagrad, FedAdam, FedYogi]
ALL = [FedAvg, FedAvgM, *ADAPTIVE]

# Weights and changes of three parameters on three scales, and where flwr's strategies of the same names led in 20
# rounds: FedYogi, FedAdagrad and FedAdam with eta=0.1, beta_1=0.9, beta_2=0.99 and tau=1e-3, FedAvgM with rate 0.5 and
# momentum 0.9. Round t (from 1) called flwr.serverapp.strategy's aggregate_train(t, [reply]) with one reply that held
# the weights plus DELTAS[t - 1], and went on with what came back. flwr 1.41.0 and 1.42.0 gave the same numbers.
_rng = np.random.default_rng(0)
START = _rng.normal(size=3)
DELTAS = _rng.normal(size=(20, 3)) * [0.01, 0.1, 1.0]
FLWR = {
    FedYogi: [0.055419601136878285, -0.3699255419184092, 0.7165685892233683],
    FedAdagrad: [0.17976791467786313, -0.23518684022025071, 0.7909526877648081],
    FedAdam: [0.09721156110783426, -0.2670227174867724, 0.6846643305805562],
    FedAvgM: [0.11223416832101894, -0.21090802947758175, 7.03417493259813],
}


def algorithm_2(method, deltas, lr, betas=(0.9, 0.99), tau=1e-3, start=None, exponent=None):
    """Follow the paper's lines; ``exponent`` maps t (from 1) to that of the original code's bias correction."""
    x, m = START.copy(), np.zeros(3)
    v = np.full(3, tau**2 if start is None else start)
    beta_1, beta_2 = (0.0, None) if method is FedAdagrad else betas
    for t, delta in enumerate(deltas, start=1):
        m = beta_1 * m + (1 - beta_1) * delta
        if method is FedAdagrad:
            v = v + delta**2
        elif method is FedAdam:
            v = beta_2 * v + (1 - beta_2) * delta**2
        else:
            v = v - (1 - beta_2) * delta**2 * np.sign(v - delta**2)
        rate = lr
        if exponent is not None:
            rate *= np.sqrt(1 - beta_2 ** exponent(t)) / (1 - beta_1 ** exponent(t))
        x = x + rate * m / (np.sqrt(v) + tau)
    return x


def run(optimizer, parameter, deltas):
    for delta in deltas:
        parameter.grad = -torch.as_tensor(delta, dtype=parameter.dtype)
        optimizer.step()
    return parameter.detach().double().numpy()


def weights(dtype=torch.float64):
    return torch.nn.Parameter(torch.tensor(START, dtype=dtype))


@pytest.mark.parametrize("rounds", [1, 20])
@pytest.mark.parametrize("start", [None, 0.0, 0.25])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_paper_s_form_equals_algorithm_2(method, start, rounds):
    x = weights()
    got = run(method([x], lr=0.1, tau=0.01, initial_accumulator=start), x, DELTAS[:rounds])
    expected = algorithm_2(method, DELTAS[:rounds], 0.1, tau=0.01, start=start)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounds", [1, 20])
@pytest.mark.parametrize("method", [FedAdam, FedYogi])
def test_the_original_code_s_form_corrects_the_rate_and_leaves_v_uncorrected_beside_tau(method, rounds):
    x = weights()
    optimizer = method([x], lr=0.1, betas=(0.9, 0.999), tau=0.01, initial_accumulator=0.0, bias_correction=True)
    expected = algorithm_2(method, DELTAS[:rounds], 0.1, (0.9, 0.999), 0.01, 0.0, exponent=lambda t: t)
    np.testing.assert_allclose(run(optimizer, x, DELTAS[:rounds]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [FedAdam, FedYogi])
def test_betas_at_zero_are_the_sign_of_each_change(method):
    x = weights()
    got = run(method([x], lr=0.5, betas=(0.0, 0.0), tau=1e-12, initial_accumulator=0.0), x, DELTAS[:1])
    np.testing.assert_allclose(got, START + 0.5 * np.sign(DELTAS[0]), atol=1e-8)


def test_fedadagrad_equals_torch_s_adagrad_with_tau_as_eps():
    ours, theirs = weights(), weights()
    got = run(FedAdagrad([ours], lr=0.3, tau=0.01), ours, DELTAS)
    adagrad = torch.optim.Adagrad([theirs], lr=0.3, eps=0.01, initial_accumulator_value=0.01**2)
    np.testing.assert_allclose(got, run(adagrad, theirs, DELTAS), rtol=0, atol=2e-15)


def test_fedadam_s_tau_weighs_ten_times_torch_s_eps_in_the_first_round_at_099():
    ours, theirs = weights(), weights()
    delta = DELTAS[:1]
    got = run(FedAdam([ours], lr=1.0, tau=0.01, initial_accumulator=0.0, bias_correction=True), ours, delta)
    smaller = torch.optim.Adam([theirs], lr=1.0, betas=(0.9, 0.99), eps=0.01 / np.sqrt(1 - 0.99))
    np.testing.assert_allclose(got, run(smaller, theirs, delta), rtol=0, atol=1e-12)
    theirs = weights()
    same = torch.optim.Adam([theirs], lr=1.0, betas=(0.9, 0.99), eps=0.01)
    assert np.abs(got - run(same, theirs, delta)).max() > 0.1


@pytest.mark.parametrize("method", ADAPTIVE)
def test_tau_stands_outside_of_the_root(method):
    # With v = 0 after a change of 0, a tau inside of the root would give steps sqrt(tau) / tau times smaller.
    x = weights()
    arguments = {} if method is FedAdagrad else {"betas": (0.0, 0.99)}
    tiny = np.full((1, 3), 1e-9)
    got = run(method([x], lr=1.0, tau=1e-4, initial_accumulator=0.0, **arguments), x, tiny)
    np.testing.assert_allclose(got - START, 1e-9 / 1e-4, rtol=1e-4)


def test_fedavg_with_rate_one_lands_on_the_clients_mean():
    x = weights()
    np.testing.assert_allclose(run(FedAvg([x]), x, DELTAS[:1]), START + DELTAS[0], rtol=0, atol=1e-15)


def test_fedavg_sums_changes_and_fedavgm_sums_them_with_geometric_weights():
    plain, heavy = weights(), weights()
    np.testing.assert_allclose(run(FedAvg([plain], lr=0.3), plain, DELTAS), START + 0.3 * DELTAS.sum(0), atol=1e-13)
    # The change of round s acts in all 20 - s rounds from there, with 0.9 ** 0, 0.9 ** 1, ...
    reach = (1 - 0.9 ** np.arange(20, 0, -1)) / (1 - 0.9)
    expected = START + 0.3 * (reach[:, None] * DELTAS).sum(0)
    np.testing.assert_allclose(run(FedAvgM([heavy], lr=0.3), heavy, DELTAS), expected, atol=1e-13)


def test_yogi_leaves_v_alone_where_it_equals_the_squared_change():
    x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = FedYogi([x], betas=(0.9, 0.5), initial_accumulator=4.0)
    x.grad = torch.tensor([2.0, -2.0, 1.0], dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[x]["exp_avg_sq"].tolist() == [4.0, 4.0, 3.5]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (FedYogi, {"lr": 0.1, "initial_accumulator": 0.0}),
        (FedAdagrad, {"lr": 0.1, "initial_accumulator": 0.0}),
        (FedAvgM, {"lr": 0.5}),
    ],
)
def test_twenty_rounds_end_where_flower_s_do(method, arguments):
    x = weights()
    np.testing.assert_allclose(run(method([x], **arguments), x, DELTAS), FLWR[method], rtol=0, atol=5e-15)


def test_fedadam_ends_elsewhere_than_flower_s_which_counts_one_round_too_many():
    paper, code = weights(), weights()
    arguments = {"lr": 0.1, "initial_accumulator": 0.0}
    assert np.abs(run(FedAdam([paper], **arguments), paper, DELTAS) - FLWR[FedAdam]).max() > 0.1
    corrected = run(FedAdam([code], **arguments, bias_correction=True), code, DELTAS)
    assert np.abs(corrected - FLWR[FedAdam]).max() > 0.01
    off_by_one = algorithm_2(FedAdam, DELTAS, 0.1, start=0.0, exponent=lambda t: t + 1)
    np.testing.assert_allclose(off_by_one, FLWR[FedAdam], rtol=0, atol=5e-15)


@pytest.mark.parametrize("method", ALL)
def test_a_schedule_steps_the_rate(method):
    halved, by_hand = weights(), weights()
    optimizer, other = method([halved], lr=0.2), method([by_hand], lr=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    run(optimizer, halved, DELTAS[:2])
    schedule.step()
    got = run(optimizer, halved, DELTAS[2:4])
    run(other, by_hand, DELTAS[:2])
    other.param_groups[0]["lr"] = 0.1
    np.testing.assert_array_equal(got, run(other, by_hand, DELTAS[2:4]))
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("method", ALL)
def test_a_reloaded_state_goes_on_identically(method, bias_correction):
    arguments = {"bias_correction": True} if bias_correction and method in (FedAdam, FedYogi) else {}
    whole = weights()
    optimizer = method([whole], **arguments)
    run(optimizer, whole, DELTAS[:7])
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "x": whole.detach()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = torch.nn.Parameter(saved["x"])
    again = method([resumed], lr=0.77)  # the rate comes from the state
    again.load_state_dict(saved["optimizer"])
    np.testing.assert_array_equal(run(optimizer, whole, DELTAS[7:]), run(again, resumed, DELTAS[7:]))


@pytest.mark.parametrize(
    ("method", "arguments", "names"),
    [
        (FedAdagrad, {}, {"sum"}),
        (FedAdam, {}, {"exp_avg", "exp_avg_sq"}),
        (FedYogi, {"bias_correction": True}, {"step", "exp_avg", "exp_avg_sq"}),
    ],
)
def test_the_state_holds_what_the_method_needs_and_no_more(method, arguments, names):
    x = weights(torch.bfloat16)
    optimizer = method([x], **arguments)
    run(optimizer, x, DELTAS[:1])
    state = optimizer.state[x]
    assert set(state) == names
    assert {value.dtype for name, value in state.items() if name != "step"} == {torch.bfloat16}


@pytest.mark.parametrize("method", ADAPTIVE)
def test_groups_have_rates_and_taus_of_their_own_and_dtypes_may_differ(method):
    first, second, single = weights(), weights(), weights(torch.float32)
    groups = [
        {"params": [first, single], "lr": 0.5, "tau": 0.1},
        {"params": [second], "initial_accumulator": 0.0},
    ]
    optimizer = method(groups, lr=0.2)
    for delta in DELTAS:
        for parameter in (first, second, single):
            parameter.grad = -torch.tensor(delta, dtype=parameter.dtype)
        optimizer.step()
    np.testing.assert_allclose(first.detach().numpy(), algorithm_2(method, DELTAS, 0.5, tau=0.1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(second.detach().numpy(), algorithm_2(method, DELTAS, 0.2, start=0.0), rtol=0, atol=1e-12)
    # Twenty rounds of a few roundings each, of numbers below 8.
    np.testing.assert_allclose(single.detach().numpy(), first.detach().numpy(), rtol=0, atol=20 * 8 * 6e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ALL)
def test_lower_precision_follows_double_precision(method, dtype):
    low, double = weights(dtype), weights()
    got = run(method([low], lr=0.1), low, DELTAS[:3])
    expected = run(method([double], lr=0.1), double, DELTAS[:3])
    # Three rounds, each rounding the change, m, v, their quotient and the weights by at most eps / 2, and the start.
    scale = np.abs(START).max() + np.abs(expected - START).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=16 * torch.finfo(dtype).eps / 2 * scale)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_parameter_without_a_gradient_keeps_weights_and_gets_no_state(method):
    frozen, moved = weights(), weights()
    optimizer = method([frozen, moved])
    run(optimizer, moved, DELTAS[:3])
    np.testing.assert_array_equal(frozen.detach().numpy(), START)
    assert frozen not in optimizer.state


@pytest.mark.parametrize("method", [FedAdam, FedYogi])
def test_a_parameter_that_sits_out_rounds_counts_its_own_for_the_bias_correction(method):
    late, always = weights(), weights()
    arguments = {"lr": 0.1, "initial_accumulator": 0.0, "bias_correction": True}
    optimizer = method([late, always], **arguments)
    run(optimizer, always, DELTAS[:5])
    for delta in DELTAS[:3]:
        always.grad = late.grad = -torch.tensor(delta)
        optimizer.step()
    expected = algorithm_2(method, DELTAS[:3], 0.1, start=0.0, exponent=lambda t: t)
    np.testing.assert_allclose(late.detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ALL)
def test_a_closure_may_compute_gradients_and_its_loss_is_returned(method):
    x = weights()
    optimizer = method([x])

    def closure():
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == pytest.approx((START**2).sum())
    other = weights()
    expected = run(method([other]), other, [-2 * START])
    np.testing.assert_allclose(x.detach().numpy(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_sparse_and_complex_gradients_are_refused(method):
    x = torch.nn.Parameter(torch.zeros(3))
    x.grad = torch.zeros(3).to_sparse()
    with pytest.raises(RuntimeError, match=f"{method.__name__} needs dense real gradients, got torch.sparse_coo"):
        method([x]).step()
    z = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    z.grad = torch.zeros_like(z)
    with pytest.raises(RuntimeError, match="needs dense real gradients"):
        method([z]).step()


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, "lr must not be negative, got -0.1"),
        ({"lr": float("nan")}, "lr must not be negative, got nan"),
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"tau": -1e-3}, "tau must be positive, got -0.001"),
        ({"initial_accumulator": -1.0}, "initial_accumulator must be 0 or more, or None for tau \\*\\* 2; got -1.0"),
    ],
)
def test_bad_settings_are_named_for_the_whole_and_for_a_group(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method([weights()], **arguments)
    optimizer = method([weights()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weights()], **arguments})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("method", [FedAdam, FedYogi])
@pytest.mark.parametrize(("betas", "message"), [((1.0, 0.9), "betas\\[0\\]"), ((0.9, -0.1), "betas\\[1\\]")])
def test_bad_betas_are_named(method, betas, message):
    value = betas[0] if "0" in message else betas[1]
    with pytest.raises(ValueError, match=f"{message} must be in \\[0, 1\\), got {value}"):
        method([weights()], betas=betas)


def test_bad_settings_of_the_plain_ones_are_named():
    with pytest.raises(ValueError, match="lr must not be negative, got -1"):
        FedAvg([weights()], lr=-1)
    with pytest.raises(ValueError, match="momentum must be in \\[0, 1\\), got 1.0"):
        FedAvgM([weights()], momentum=1.0)


@pytest.mark.parametrize("method", ALL)
def test_a_recipe_builds_each_by_its_class_path(method):
    parser = LightningArgumentParser()
    parser.add_argument("--server_optimizer", type=OptimizerCallable)
    arguments = {"lr": 0.3, **({"betas": [0.8, 0.9], "tau": 0.1} if method in (FedAdam, FedYogi) else {})}
    config = {"class_path": f"lightning_iclr.fedopt.optim.{method.__name__}", "init_args": arguments}
    build = parser.instantiate_classes(parser.parse_object({"server_optimizer": config})).server_optimizer
    optimizer = build([weights()])
    assert type(optimizer) is method
    assert optimizer.defaults["lr"] == 0.3
    assert optimizer.defaults.get("betas", (0.8, 0.9)) == (0.8, 0.9)
