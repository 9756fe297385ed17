"""The server's optimizers of "Adaptive Federated Optimization" (algorithm 2), as plain torch optimizers.

Each takes the pseudo-gradient -Delta from ``p.grad``, where Delta is the clients' mean change of the weights, so any
loop may use them: ``p.grad = -delta; optimizer.step()``. With eta = ``lr`` and (b1, b2) = ``betas``, round t of the
adaptive ones is

    m_t = b1 m_{t-1} + (1 - b1) Delta,                              m_{-1} = 0
    v_t = v_{t-1} + Delta^2                                         FedAdagrad, with b1 = 0
    v_t = b2 v_{t-1} + (1 - b2) Delta^2                             FedAdam
    v_t = v_{t-1} - (1 - b2) Delta^2 sign(v_{t-1} - Delta^2)        FedYogi
    x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau),                    v_{-1} = tau^2

without a bias correction, and with tau outside of the root. The paper's experiments ran something else, which the
arguments ``betas``, ``initial_accumulator`` and ``bias_correction`` select; each class says how.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import ParamsT


def _check(lr: float, **unit_interval: float) -> None:
    if not lr >= 0:
        raise ValueError(f"lr must not be negative, got {lr}")
    for name, value in unit_interval.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


class FedAvg(SGD):
    """Move the server's weights by ``lr`` times the clients' mean change; at 1 they become the clients' mean.

    ``torch.optim.SGD`` with a default rate.

    Args:
        params: Parameters, or groups of them.
        lr: Server rate eta, 0 or more.

    Raises:
        ValueError: ``lr`` is negative.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> weight.grad = -torch.tensor([0.25])  # the clients moved up by a quarter
        >>> FedAvg([weight]).step()
        >>> weight.item()
        1.25
    """

    def __init__(self, params: ParamsT, lr: float = 1.0) -> None:
        _check(lr)
        super().__init__(params, lr=lr)


class FedAvgM(SGD):
    """Average the clients' changes with heavy-ball momentum (Hsu et al. 2019): u = momentum u + Delta, x = x + lr u.

    ``torch.optim.SGD`` with other defaults. The original code's Keras form keeps lr u in place of u, which is the same
    as long as ``lr`` is constant.

    Args:
        params: Parameters, or groups of them.
        lr: Server rate eta, 0 or more.
        momentum: Share of the last step that is kept, in [0, 1).

    Raises:
        ValueError: ``lr`` is negative or ``momentum`` outside [0, 1).

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = FedAvgM([weight], momentum=0.5)
        >>> for _ in range(2):
        ...     weight.grad = -torch.tensor([1.0])
        ...     optimizer.step()
        >>> weight.item()
        2.5
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, momentum: float = 0.9) -> None:
        _check(lr, momentum=momentum)
        super().__init__(params, lr=lr, momentum=momentum)


class _Adaptive(Optimizer):
    """What algorithm 2's methods share: groups, checks and state. A subclass names its state and updates a batch."""

    state_names: ClassVar[tuple[str, ...]]  # the last one is v

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own.

        Raises:
            ValueError: A setting is outside its range.
        """
        settings = {**self.defaults, **param_group}
        tau, start, betas = settings["tau"], settings["initial_accumulator"], settings.get("betas", (0.0, 0.0))
        _check(settings["lr"], **{f"betas[{i}]": beta for i, beta in enumerate(betas)})
        if not tau > 0:
            raise ValueError(f"tau must be positive, got {tau}")
        if start is not None and not start >= 0:
            raise ValueError(f"initial_accumulator must be 0 or more, or None for tau ** 2; got {start}")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply one round's pseudo-gradients; parameters without one keep weights and state.

        Args:
            closure: Computes the loss and the gradients, and returns the loss.

        Raises:
            RuntimeError: A gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse or parameter.is_complex():
                    raise RuntimeError(f"{type(self).__name__} needs dense real gradients, got {parameter.grad.layout}")
                if not self.state[parameter]:
                    self.state[parameter].update(self._new_state(parameter, group))
                batches[parameter.device, parameter.dtype].append(parameter)
            for parameters in batches.values():
                self._update(parameters, [parameter.grad for parameter in parameters], group)
        return loss

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {name: torch.zeros_like(parameter) for name in self.state_names}
        start = group["initial_accumulator"]
        state[self.state_names[-1]].fill_(group["tau"] ** 2 if start is None else start)
        return state

    def _batch(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        return [self.state[parameter][name] for parameter in parameters]

    def _update(self, parameters: list[Tensor], gradients: list[Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class FedAdagrad(_Adaptive):
    """Step against the pseudo-gradient over the root of its summed squares (algorithm 2, FedAdagrad with b1 = 0).

    The same as ``torch.optim.Adagrad(eps=tau, initial_accumulator_value=tau**2)``. The paper's experiments ran
    ``FedAdagrad(params, lr, tau, initial_accumulator=0.0)``; Keras has since moved its epsilon into the root.

    Args:
        params: Parameters, or groups of them.
        lr: Server rate eta, 0 or more.
        tau: Adaptivity, above 0: the smaller, the more a step's size is independent of the gradient's.
        initial_accumulator: v before the first round, 0 or more; ``None`` for ``tau ** 2``.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([0.0]))
        >>> weight.grad = -torch.tensor([3.0])
        >>> FedAdagrad([weight], lr=1.0, tau=4.0).step()  # 3 / (sqrt(16 + 9) + 4)
        >>> round(weight.item(), 4)
        0.3333
    """

    state_names = ("sum",)

    def __init__(
        self, params: ParamsT, lr: float = 0.1, tau: float = 1e-3, initial_accumulator: float | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "tau": tau, "initial_accumulator": initial_accumulator})

    def _update(self, parameters: list[Tensor], gradients: list[Any], group: dict[str, Any]) -> None:
        v = self._batch(parameters, "sum")
        torch._foreach_addcmul_(v, gradients, gradients, 1.0)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_add_(denominator, group["tau"])
        torch._foreach_addcdiv_(parameters, gradients, denominator, -float(group["lr"]))


class _Moments(_Adaptive):
    """FedAdam and FedYogi, which differ in v."""

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float = 1e-3,
        initial_accumulator: float | None = None,
        bias_correction: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),  # a list in a recipe
            "tau": tau,
            "initial_accumulator": initial_accumulator,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = super()._new_state(parameter, group)
        return {"step": 0, **state} if group["bias_correction"] else state

    def _update(self, parameters: list[Tensor], gradients: list[Any], group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        m, v = (self._batch(parameters, name) for name in self.state_names)
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, gradients, alpha=1 - beta1)
        self._update_v(v, torch._foreach_mul(gradients, gradients), beta2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_add_(denominator, group["tau"])
        rates = [-lr] * len(parameters)
        if group["bias_correction"]:
            for i, parameter in enumerate(parameters):  # a parameter may have sat out some rounds
                t = self.state[parameter]["step"] = self.state[parameter]["step"] + 1
                rates[i] *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        torch._foreach_addcdiv_(parameters, m, denominator, rates)

    def _update_v(self, v: list[Tensor], square: list[Tensor] | tuple[Tensor, ...], beta2: float) -> None:
        raise NotImplementedError


class FedAdam(_Moments):
    """Step along the pseudo-gradient's running mean over the root of its running mean square (algorithm 2, FedAdam).

    Not ``torch.optim.Adam(eps=tau)``: that corrects m and v, so that its eps weighs ``sqrt(1 - b2 ** t)`` times as
    much, a tenth in the first round at b2 = 0.99.

    The paper states b2 = 0.99. Its experiments ran Keras' Adam with Keras' b2, which is
    ``FedAdam(params, lr, (0.9, 0.999), tau, initial_accumulator=0.0, bias_correction=True)``.

    Args:
        params: Parameters, or groups of them.
        lr: Server rate eta, 0 or more.
        betas: Decay b1 of the mean and b2 of the mean square, in [0, 1).
        tau: Adaptivity, above 0: the smaller, the more a step's size is independent of the gradient's.
        initial_accumulator: v before the first round, 0 or more; ``None`` for ``tau ** 2``.
        bias_correction: Whether to multiply ``lr`` by ``sqrt(1 - b2 ** t) / (1 - b1 ** t)`` in a parameter's round t,
            counted from 1, with the uncorrected v beside tau: the form of Keras and of the original code.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([0.0]))
        >>> weight.grad = -torch.tensor([3.0])
        >>> FedAdam([weight], lr=1.0, betas=(0.5, 0.0), tau=1.0).step()  # 0.5 * 3 / (sqrt(9) + 1)
        >>> weight.item()
        0.375
    """

    def _update_v(self, v: list[Tensor], square: list[Tensor] | tuple[Tensor, ...], beta2: float) -> None:
        torch._foreach_mul_(v, beta2)
        torch._foreach_add_(v, square, alpha=1 - beta2)


class FedYogi(_Moments):
    """Step as FedAdam does, but change v by at most (1 - b2) Delta^2, up or down (algorithm 2, FedYogi).

    Where v equals Delta^2, sign(0) = 0 leaves it as it is.

    The paper states b2 = 0.99. Its experiments ran a Yogi with Keras' bias correction and b2, which is
    ``FedYogi(params, lr, (0.9, 0.999), tau, initial_accumulator=0.0, bias_correction=True)``.

    Args:
        params: Parameters, or groups of them.
        lr: Server rate eta, 0 or more.
        betas: Decay b1 of the mean and rate 1 - b2 of v, in [0, 1).
        tau: Adaptivity, above 0: the smaller, the more a step's size is independent of the gradient's.
        initial_accumulator: v before the first round, 0 or more; ``None`` for ``tau ** 2``.
        bias_correction: Whether to multiply ``lr`` by ``sqrt(1 - b2 ** t) / (1 - b1 ** t)`` in a parameter's round t,
            counted from 1, with the uncorrected v beside tau: the form of the original code.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([0.0]))
        >>> weight.grad = -torch.tensor([3.0])
        >>> FedYogi([weight], lr=1.0, betas=(0.5, 0.0), tau=4.0).step()  # 0.5 * 3 / (sqrt(16 - 9) + 4)
        >>> round(weight.item(), 4)
        0.2257
    """

    def _update_v(self, v: list[Tensor], square: list[Tensor] | tuple[Tensor, ...], beta2: float) -> None:
        change = torch._foreach_sub(v, square)
        torch._foreach_sign_(change)
        torch._foreach_mul_(change, square)
        torch._foreach_add_(v, change, alpha=beta2 - 1)
