import io
import math

import pytest
import torch

from lightning_iclr.schedules import WarmupConstant, WarmupCosine, WarmupLinear, WarmupRsqrt

WARMUP, TOTAL = 10, 50
BASES = (3e-3, 2e-6)  # the second lies below WarmupLinear's end
STEPS = [0, 1, 5, 9, 10, 11, 30, 49, 50, 51, 200]  # start, warm-up, its end, middle, end, beyond the end


def new_optimizer(bases=BASES):
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": base} for base in bases])


def rates(schedule, steps):
    found = []
    for _ in range(steps + 1):
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return found


# Written out by cases, from the papers' definitions, and not by the code's product form.
def constant(base, step):
    return base * step / WARMUP if step <= WARMUP else base


def linear(base, step):
    if step <= WARMUP:
        return base * step / WARMUP
    return 1e-5 if step >= TOTAL else (base * (TOTAL - step) + 1e-5 * (step - WARMUP)) / (TOTAL - WARMUP)


def cosine(base, step):
    if step <= WARMUP:
        return base * step / WARMUP
    return 0.0 if step >= TOTAL else base * math.cos(math.pi / 2 * (step - WARMUP) / (TOTAL - WARMUP)) ** 2


def rsqrt(base, step):
    return base * WARMUP**0.5 * min(step**-0.5, step * WARMUP**-1.5) if step else 0.0


CASES = {
    "constant": (lambda optimizer: WarmupConstant(optimizer, WARMUP), constant),
    "linear": (lambda optimizer: WarmupLinear(optimizer, WARMUP, TOTAL), linear),
    "cosine": (lambda optimizer: WarmupCosine(optimizer, WARMUP, TOTAL), cosine),
    "rsqrt": (lambda optimizer: WarmupRsqrt(optimizer, WARMUP), rsqrt),
}


@pytest.mark.parametrize("name", CASES)
def test_every_group_follows_the_closed_form_from_its_own_base(name):
    build, formula = CASES[name]
    found = rates(build(new_optimizer()), max(STEPS))
    for step in STEPS:
        expected = [formula(base, step) for base in BASES]
        assert found[step] == pytest.approx(expected, rel=1e-12, abs=1e-20), step


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda optimizer: WarmupConstant(optimizer), [1, 1, 1, 1, 1]),
        (lambda optimizer: WarmupLinear(optimizer, 0, 4, end=0.0), [1, 0.75, 0.5, 0.25, 0]),
        (lambda optimizer: WarmupCosine(optimizer, 0, 4), [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
        (lambda optimizer: WarmupRsqrt(optimizer, 0), [1, 1, 2**-0.5, 3**-0.5, 0.5]),
    ],
)
def test_without_warm_up_the_first_step_has_the_full_rate(build, expected):
    found = rates(build(new_optimizer([1.0])), 4)
    assert [rate for (rate,) in found] == pytest.approx(expected, abs=1e-15)


def test_a_group_with_rate_zero_stays_frozen():
    assert rates(WarmupLinear(new_optimizer([0.0]), 2, 5), 8) == [[0.0]] * 9


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_resumes_from_a_checkpoint_of_plain_numbers(name):
    build, formula = CASES[name]
    optimizer = new_optimizer()
    schedule = build(optimizer)
    rates(schedule, 22)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    optimizer = new_optimizer()
    schedule = build(optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    found = rates(schedule, 40)
    assert found[0] == pytest.approx([formula(base, 23) for base in BASES], rel=1e-12)
    assert found[40] == pytest.approx([formula(base, 63) for base in BASES], rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("build", [WarmupConstant, WarmupRsqrt])
def test_a_negative_warm_up_is_refused(build):
    with pytest.raises(ValueError, match="warmup_steps must not be negative, got -1"):
        build(new_optimizer(), -1)


@pytest.mark.parametrize("build", [WarmupLinear, WarmupCosine])
@pytest.mark.parametrize("total", [9, 10])
def test_a_decay_that_ends_within_the_warm_up_is_refused(build, total):
    with pytest.raises(ValueError, match=f"total_steps must exceed warmup_steps, got {total} and 10"):
        build(new_optimizer(), 10, total)


def test_other_arguments_are_refused():
    with pytest.raises(TypeError, match=r"warmup_steps must be an integer, got 0\.1"):
        WarmupCosine(new_optimizer(), 0.1, 100)
    with pytest.raises(TypeError, match=r"total_steps must be an integer, got 10\.0"):
        WarmupLinear(new_optimizer(), 1, 10.0)
    with pytest.raises(ValueError, match="end must not be negative, got -1"):
        WarmupLinear(new_optimizer(), 1, 10, end=-1)
