"""The trajectory and the controller against the published schedule."""

import pytest

from minihyperflows import testing
from minihyperflows.flows.scheduler import (
    PressureScheduler,
    base_after_rises,
    density_trajectory,
    survival_factors,
)

# T, sparsity in per cent -> per cent of the weights left after each epoch (the authors' schedule).
EPOCHS = (1, 2, 5, 10, 20, 25, 30, 40, 50, 60, 75, 90)
TRAJECTORIES = {
    (100, 90): (95.75, 91.69, 80.58, 65.21, 43.45, 35.90, 29.96, 21.70, 16.71, 13.75, 11.43, 10.38),
    (100, 95): (94.47, 89.26, 75.37, 57.12, 33.58, 26.16, 20.66, 13.56, 9.649, 7.494, 5.912, 5.233),
    (100, 98): (
        92.793, 86.125, 68.970, 47.919, 23.859, 17.192, 12.615, 7.268, 4.663, 3.357, 2.471, 2.116,
    ),
    (100, 99): (91.54, 83.82, 64.47, 41.93, 18.41, 12.50, 8.677, 4.531, 2.688, 1.827, 1.277, 1.067),
    (100, 99.5): (
        90.30, 81.57, 60.26, 36.68, 14.19, 9.083, 5.963, 2.821, 1.548, 0.994, 0.660, 0.538,
    ),
    (80, 96.5): (92.28, 85.18, 67.14, 45.56, 22.02, 15.84, 11.75, 7.197, 5.141, 4.187, 3.596),
}  # fmt: skip
# (T, sparsity) -> s, f(1), f(T)
FACTORS = {
    (100, 90): (0.955273, 0.95747, 0.99693),
    (100, 98): (0.924170, 0.92793, 0.99545),
    (100, 99.5): (0.897945, 0.90302, 0.99421),
    (80, 96.5): (0.918680, 0.92277, 0.99519),
}


@pytest.mark.parametrize(("epochs", "sparsity"), TRAJECTORIES)
def test_the_trajectory_is_the_published_one(epochs, sparsity):
    scheduler = PressureScheduler(sparsity / 100, epochs)
    for epoch, left in zip(EPOCHS, TRAJECTORIES[epochs, sparsity], strict=False):
        assert 100 * scheduler.expected(epoch) == pytest.approx(left, abs=0.006, rel=6e-4)
    assert scheduler.expected(0) == 1
    assert scheduler.expected(epochs) == pytest.approx(1 - sparsity / 100, abs=1e-9)
    assert scheduler.expected(10 * epochs) == scheduler.expected(epochs)


@pytest.mark.parametrize(("epochs", "sparsity"), FACTORS)
def test_the_survival_factors_are_the_published_ones(epochs, sparsity):
    floor, first, last = FACTORS[epochs, sparsity]
    factors = survival_factors(floor, epochs, 6.0, 0.999)
    assert factors[0] == pytest.approx(first, abs=6e-6)
    assert factors[-1] == pytest.approx(last, abs=6e-6)
    assert density_trajectory(1 - sparsity / 100, epochs)[1] == pytest.approx(first, abs=6e-6)


@pytest.mark.parametrize("density", [1.0, 0.999, 0.98, 0.9])
def test_dense_targets_are_reached_too(density):
    """Where even the ceiling would prune too much over 30 epochs, the ceiling rises."""
    assert density_trajectory(density, 30)[-1] == pytest.approx(density, abs=1e-9)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 6, 10])
def test_short_schedules_reach_their_target(epochs):
    trajectory = density_trajectory(0.02, epochs)
    assert trajectory[-1] == pytest.approx(0.02, abs=1e-9)
    assert (trajectory[1:] < trajectory[:-1]).all()


@pytest.mark.parametrize(
    ("rises", "base"), [(1, 0.2), (3, 0.75), (5, 1.5), (10, 4.25), (20, 13.5), (30, 27.75)]
)
def test_rises_in_a_row(rises, base):
    scheduler = PressureScheduler(0.98, 100)
    for epoch in range(1, rises + 1):
        gamma = scheduler.update(epoch, density=1.0)
    assert scheduler.base == pytest.approx(base) == pytest.approx(base_after_rises(rises, 0.2))
    assert gamma == pytest.approx(base**1.5)


def test_lowering_accelerates_and_ends_at_exactly_zero():
    scheduler = PressureScheduler(0.9, 100)
    for epoch in range(1, 6):
        scheduler.update(epoch, 1.0)  # b = 1.5
    bases = []
    for epoch in range(6, 11):
        scheduler.update(epoch, 0.0)
        bases.append(scheduler.base)
    # steps of 0.2, 0.25, 0.3, 0.35 and then what is left
    assert bases == pytest.approx([1.3, 1.05, 0.75, 0.4, 0.0])
    assert scheduler.gamma == 0.0


def test_a_change_of_direction_forgets_the_inertia():
    scheduler = PressureScheduler(0.9, 100)
    for density in (1.0, 1.0, 1.0, 0.0, 1.0):
        scheduler.update(1, density)
    assert scheduler.base == pytest.approx(0.75 - 0.2 + 0.2)


def test_from_the_last_epoch_on_the_pressure_stays():
    scheduler = PressureScheduler(0.9, 10)
    gamma = scheduler.update(9, 1.0)
    assert scheduler.update(10, 1.0) == gamma
    assert scheduler.update(11, 0.0) == gamma


def test_state_round_trip_continues_alike():
    one, other = PressureScheduler(0.95, 40), PressureScheduler(0.95, 40)
    for epoch in range(1, 8):
        one.update(epoch, 1 - epoch / 20)
    other.load_state_dict(one.state_dict())
    for epoch in range(8, 40):
        density = (epoch * 37 % 40) / 40
        assert one.update(epoch, density) == other.update(epoch, density)


def test_it_passes_the_check_that_students_schedulers_must_pass():
    testing.check_scheduler(PressureScheduler(0.98, 40))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 98])
def test_a_sparsity_is_a_fraction(sparsity):
    with pytest.raises(ValueError, match=f"not {sparsity}"):
        PressureScheduler(sparsity, 10)


def test_other_misuse():
    with pytest.raises(ValueError, match="must be positive"):
        PressureScheduler(0.9, 0)
    scheduler = PressureScheduler(0.9, 10)
    with pytest.raises(ValueError, match="fraction"):
        scheduler.update(1, 98.0)
    with pytest.raises(ValueError, match="from 0"):
        scheduler.expected(-1)
