"""flux.solvers: convergence to known solutions, and the formulas at single steps."""

import math

import pytest
import torch
from torch import Tensor

from flux import sampling, solvers
from flux.errors import NonFiniteError
from flux.solvers import SOLVERS

ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "dpmpp_2m": 2, "res_2m": 2}
MULTISTEP = ("dpmpp_2m", "res_2m")
M, C = 0.7, 0.4  # mean and standard deviation of images


def square(x: Tensor, t: float) -> Tensor:
    """dx/dt = -x^2, with the solution 1 / x(t) = 1 / x(s) + t - s."""
    return -x * x


def normal(x: Tensor, t: float) -> Tensor:
    """E[noise - image | x_t = x] of normal images: the velocity of a flow that is linear in x."""
    a = 1 - t
    score = (x - a * M) / variance(t)
    return t * score - (M + a * C * C * score)


def variance(t: float) -> float:
    """Of x_t, for normal images."""
    return (1 - t) ** 2 * C * C + t * t


def even(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def shifted(steps: int) -> Tensor:
    return sampling.schedule("linear", steps, 1024).double()


def slope(errors: dict[int, float]) -> float:
    """Return the least-squares slope of -log(error) over log(steps)."""
    x = torch.tensor([math.log(steps) for steps in errors])
    y = -torch.tensor([math.log(error) for error in errors.values()])
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


@pytest.mark.parametrize("name", ORDERS)
def test_error_falls_with_the_order_of_the_solver(name):
    """Slopes seen: 0.97 of Euler, 1.92 to 2.05 of the others."""
    x, errors = torch.linspace(0.3, 0.6, 5, dtype=torch.float64), {}
    for steps in (16, 32, 64, 128):
        end = SOLVERS[name](square, x, even(0.9, 0.1, steps), None, None)
        errors[steps] = (end - 1 / (1 / x - 0.8)).abs().max().item()
    assert abs(slope(errors) - ORDERS[name]) < 0.2, errors
    assert errors[128] < (1e-2 if name == "euler" else 1e-4)


@pytest.mark.parametrize("name", ORDERS)
def test_solvers_follow_the_whole_flow_from_noise_to_image(name):
    """Where l is infinite at both ends, x(0) = M + C x(1)."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (128, 512):
        end = SOLVERS[name](normal, x, shifted(steps), None, None)
        errors.append((end - (M + C * x)).abs().max().item())
    assert errors[1] < (4e-3 if name == "euler" else 3e-4)
    assert errors[0] / errors[1] > (3.9 if name == "euler" else 9)  # 16 of order 2


def test_stochastic_solver_converges_to_the_reverse_diffusion():
    """x is linear in the start and in each step's noise: one run finds all the coefficients.

    Given x_t, an earlier x_s has the mean a_s M + r (x_t - a_t M), r = a_t S_s / (a_s S_t), and the
    variance S_s - r^2 S_t, where a = 1 - t and S is the variance. The predicted image is a
    martingale, so the mean is exact; the slope of the deviation that was seen is 1.0.
    """
    t, s = 0.9, 0.1
    r = (1 - t) / (1 - s) * variance(s) / variance(t)
    sd = math.sqrt(variance(s) - r * r * variance(t))
    deviations = {}
    for steps in (16, 32, 64, 128):
        count = iter(range(1, steps + 1))

        def unit(x: Tensor, count=count) -> Tensor:
            noise = torch.zeros_like(x)
            noise[next(count)] = 1
            return noise

        x = torch.zeros(steps + 1, dtype=torch.float64)
        x[0] = 1
        x = solvers.dpmpp_2m_sde(
            lambda x, t: normal(x, t) - normal(torch.zeros_like(x), t),
            x,
            even(t, s, steps),
            noise=unit,
        )
        assert x[0].item() == pytest.approx(r, rel=1e-12)
        deviations[steps] = abs(x[1:].norm().item() - sd)
    assert slope(deviations) > 0.9 and deviations[128] < 0.01, deviations


def test_drift_of_the_stochastic_solver_has_order_two():
    """Without noise and for x0 = sin(l): x e^l / sigma grows by the integral of 2 e^(2l) x0 dl."""
    l0, l1 = solvers.half_log_snr(0.9), solvers.half_log_snr(0.1)
    grid = torch.linspace(l0, l1, 100_001, dtype=torch.float64)
    integral = torch.trapezoid(2 * torch.exp(2 * grid) * grid.sin(), grid).item()
    truth = 0.1 * math.exp(-l1) * (1.5 / 0.9 * math.exp(l0) + integral)

    def velocity(x: Tensor, t: float) -> Tensor:
        return (x - math.sin(solvers.half_log_snr(t))) / t

    start, errors = torch.tensor([1.5], dtype=torch.float64), {}
    for steps in (16, 32, 64, 128):
        end = solvers.dpmpp_2m_sde(velocity, start, even(0.9, 0.1, steps), noise=torch.zeros_like)
        errors[steps] = abs(end.item() - truth)
    assert abs(slope(errors) - 2) < 0.25, errors


@pytest.mark.parametrize("name", SOLVERS)
def test_straight_flow_is_exact_in_any_number_of_steps(name):
    noise, image = torch.randn(2, 5, dtype=torch.float64)
    for steps in (1, 2, 3, 7):
        x = SOLVERS[name](lambda x, t: (x - image) / t, noise, shifted(steps), None, None)
        assert (x - image).abs().max() < 1e-6  # Euler's velocity is float32


@pytest.mark.parametrize("name", SOLVERS)
def test_single_step_from_noise_to_image_is_eulers(name):
    start = torch.tensor([0.3, -1.0], dtype=torch.float64)
    end = SOLVERS[name](normal, start, torch.tensor([1.0, 0.0]), None, None)
    difference = (end - (start - normal(start, 1.0))).abs().max()
    assert difference > 0.1 if name == "midpoint" else difference < 1e-6


@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_equals_its_integral(name):
    """Against the exact solution of a linear x0(l): res_2m is exact, dpmpp_2m nearly."""
    times = torch.tensor([0.9, 0.8, 0.65], dtype=torch.float64)

    def image(t: float) -> float:
        return 0.5 + 0.2 * solvers.half_log_snr(t)

    x = torch.tensor([1.3], dtype=torch.float64)
    found = []
    SOLVERS[name](
        lambda x, t: (x - image(t)) / t, x, times, lambda step, t, x: found.append(x.item()), None
    )
    t, s = 0.8, 0.65
    h = solvers.half_log_snr(s) - solvers.half_log_snr(t)
    u = torch.linspace(0, h, 20001, dtype=torch.float64)
    integral = torch.trapezoid(torch.exp(u - h) * (image(t) + 0.2 * u), u).item()
    truth = s / t * found[0] + (1 - s) * integral
    assert found[1] == pytest.approx(truth, abs=1e-8 if name == "res_2m" else 5e-3)
    assert abs(found[1] - truth) > (0 if name == "res_2m" else 1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_blend_then_call_back_and_ask_where_they_say(name):
    times, asked, seen = shifted(4), [], []

    def note(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return torch.ones_like(x)

    def blend(x: Tensor, t: float) -> Tensor:
        return torch.full_like(x, t)

    SOLVERS[name](note, torch.zeros(2), times, lambda *step: seen.append(step), blend)
    assert [(step, t) for step, t, _ in seen] == list(enumerate(times[1:].tolist(), start=1))
    assert all(x.tolist() == pytest.approx([t, t]) for _, t, x in seen)
    on_schedule = set(asked) <= set(times[:-1].tolist())
    assert on_schedule == (name in solvers.ON_SCHEDULE) and 0.0 not in asked


@pytest.mark.parametrize("name", SOLVERS)
def test_non_finite_state_raises(name):
    with pytest.raises(NonFiniteError, match="step 1 of 4"):
        SOLVERS[name](lambda x, t: x / 0, torch.ones(2), shifted(4), None, None)


def test_euler_by_name_is_denoise_to_the_bit():
    start = torch.randn(7)
    times = sampling.schedule("empirical", 9, 512)
    ours = solvers.euler(square, start, times)
    assert torch.equal(ours, sampling.denoise(square, start, times))
