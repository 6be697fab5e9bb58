"""The pruners beside Hyperflows: exact counts, schedules, scores, and masks that hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minihyperflows as mh
from minihyperflows import functional as F
from minihyperflows import models, nn, optim, testing
from minihyperflows.flows import stages
from minihyperflows.related import pruners
from minihyperflows.related.pruners import (
    Gradual,
    Iterative,
    Magnitude,
    Movement,
    Pruner,
    Random,
    RigL,
    cubic_sparsity,
    erdos_renyi_counts,
    largest,
)

STEPS = 40
EVERY = {"every": 4}
METHODS = {
    "random": lambda s: Random(s),
    "magnitude": lambda s: Magnitude(s),
    "iterative": lambda s: Iterative(s, rounds=5),
    "gradual": lambda s: Gradual(s, **EVERY),
    "movement": lambda s: Movement(s, **EVERY),
    "rigl": lambda s: RigL(s, **EVERY),
}
every_method = pytest.mark.parametrize("name", METHODS)


class Training:
    """A small network with a pruner, one batch after another."""

    def __init__(self, pruner: Pruner, steps: int = STEPS, lr: float = 1e-2) -> None:
        self.rng = np.random.default_rng(3)
        self.net = models.lenet300(20, 4, rng=self.rng, dtype=np.float64)
        self.optimizer = optim.Adam(self.net.parameters(), lr)
        self.pruner, self.steps, self.taken = pruner, steps, 0
        pruner.start(self.net, self.optimizer, steps, self.rng)

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        x = self.rng.standard_normal((16, 20))
        return x, x[:, :4].argmax(axis=1)

    def backward(self, batch: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        x, y = batch or self.batch()
        self.net.zero_grad()
        F.cross_entropy(self.net(mh.Tensor(x)), y).backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.taken += 1
        self.pruner.after_step(self.taken)

    def run(self) -> Training:
        for _ in range(self.steps):
            self.step()
        return self

    @property
    def present(self) -> np.ndarray:
        return np.concatenate([m.present.reshape(-1) for m in self.pruner.masks.values()])

    @property
    def weights(self) -> np.ndarray:
        return np.concatenate([m.weight.data.reshape(-1) for m in self.pruner.masks.values()])


# -- what all of them do ---------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.995])
def test_the_final_density_is_exact_to_the_weight(name: str, sparsity: float) -> None:
    training = Training(METHODS[name](sparsity)).run()
    wanted = stages.kept_weights(1 - sparsity, 36_400)
    assert training.pruner.total == 36_400
    assert training.present.sum() == training.pruner.kept == wanted
    assert training.pruner.density == pytest.approx(1 - sparsity, abs=1 / 36_400)
    densities = training.pruner.layer_density()
    sizes = {"fc1": 6_000, "fc2": 30_000, "fc3": 400}
    assert sum(densities[n] * sizes[n] for n in sizes) == pytest.approx(wanted)


@every_method
def test_masks_hold(name: str) -> None:
    """What is removed has no part in the output and no gradient, whatever the optimiser does."""
    training = Training(METHODS[name](0.9)).run()
    training.backward()
    for mask in training.pruner.masks.values():
        assert not mask.weight.grad[~mask.present].any()
    assert training.pruner.masks["fc2"].gradient[~training.pruner.masks["fc2"].present].any()
    x = mh.Tensor(training.batch()[0])
    before = training.net(x).data
    for mask in training.pruner.masks.values():
        mask.weight.data[~mask.present] += 100.0
    np.testing.assert_array_equal(training.net(x).data, before)
    training.pruner.finish()
    np.testing.assert_allclose(training.net(x).data, before, rtol=1e-12)
    assert np.count_nonzero(training.weights) == training.pruner.kept
    assert all(layer.weight_gate is None for layer in (training.net.fc1, training.net.fc3))


@every_method
def test_the_same_seed_gives_the_same_mask(name: str) -> None:
    one, other = (Training(METHODS[name](0.9)).run() for _ in range(2))
    np.testing.assert_array_equal(one.present, other.present)


@pytest.mark.parametrize("name", ["iterative", "gradual", "random", "magnitude"])
def test_what_is_removed_by_magnitude_stays_removed(name: str) -> None:
    training = Training(METHODS[name](0.9))
    for _ in range(STEPS):
        before = training.present
        training.step()
        assert not (training.present & ~before).any()


def test_a_pruner_that_does_nothing_removes_nothing() -> None:
    training = Training(Pruner(0.9)).run()
    assert training.pruner.density == 1


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Iterative, {"rounds": 0}, "rounds must be at least 1, not 0"),
        *((Iterative, {"end": end}, "fractions of the training") for end in (0.0, 1.2, -0.5)),
        *((Gradual, {"end": end}, "fractions of the training") for end in (0.0, 1.2, -0.5)),
        (Movement, {"end": 1.2}, "fractions of the training"),
        (Gradual, {"begin": 0.5, "end": 0.4}, "fractions of the training"),
        (Gradual, {"begin": -0.1}, "fractions of the training"),
        *((kind, {"every": 0}, "at least 1, not 0") for kind in (Gradual, Movement, RigL)),
        *((RigL, {"fraction": f}, "fraction is of the present weights") for f in (-0.1, 1.1)),
    ],
)
def test_settings_that_never_prune_are_refused(
    kind: Any, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(0.9, **settings)


@pytest.mark.parametrize("kind", [Iterative, Gradual, Movement])
@pytest.mark.parametrize(("steps", "end"), [(1, 0.8), (1, 0.1), (3, 0.1), (40, 0.01)])
def test_a_pruning_that_ends_within_the_first_step_comes_after_it(
    kind: Any, steps: int, end: float
) -> None:
    """Though the fraction of the training is nearer to step 0, where nothing is called."""
    settings = {} if kind is Iterative else {"begin": 0.0}
    training = Training(kind(0.9, end=end, **settings), steps)
    training.step()
    assert training.present.sum() == training.pruner.kept == 3640


@pytest.mark.parametrize("kind", [Iterative, Gradual, Movement])
def test_a_training_without_steps_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="a training of 0 steps ends before anything is pruned"):
        Training(kind(0.9), steps=0)


@pytest.mark.parametrize("kind", [Iterative, Gradual, Movement])
def test_pruning_may_last_until_the_end(kind: Any) -> None:
    training = Training(kind(0.9, end=1.0)).run()
    assert training.present.sum() == 3640


def test_a_network_is_pruned_by_one_pruner_at_a_time() -> None:
    training = Training(Random(0.9))
    with pytest.raises(ValueError, match="already"):
        Random(0.5).start(training.net, training.optimizer, 10, training.rng)
    with pytest.raises(ValueError, match="nothing to prune"):
        Random(0.5).start(nn.Sequential(nn.ReLU()), training.optimizer, 10, training.rng)
    with pytest.raises(ValueError, match="fraction removed"):
        Random(95)


def test_convolutions_are_pruned_too(rng: np.random.Generator) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, rng=rng, dtype=np.float64),
        nn.BatchNorm2d(4, dtype=np.float64),
        nn.Flatten(),
        nn.Linear(64, 3, rng=rng, dtype=np.float64),
    )
    pruner = Magnitude(0.8)
    pruner.start(net, optim.SGD(net.parameters(), 0.1), 10, rng)
    assert list(pruner.masks) == ["0", "3"]
    assert pruner.kept == (36 + 192) // 5
    assert net(rng.standard_normal((2, 4, 4, 1))).shape == (2, 3)


# -- the mask --------------------------------------------------------------------------------------


def test_the_masked_weight_is_checked_like_any_operation(rng: np.random.Generator) -> None:
    mask = pruners.Mask(nn.Parameter(rng.standard_normal((5, 3))))
    mask.present = rng.random((5, 3)) < 0.5
    testing.check_grad(lambda w: mask(w), mask.weight.data)


def test_the_mask_keeps_the_gradient_of_removed_weights() -> None:
    """It is the derivative of the loss by the weight in use: a finite difference from zero."""
    training = Training(Random(0.9))
    batch = training.batch()
    training.backward(batch)
    mask = training.pruner.masks["fc2"]
    gradient, removed = mask.gradient.copy(), np.argwhere(~mask.present)
    for i, j in removed[[0, 700, 5000]]:
        mask.present = mask.present.copy()
        mask.present[i, j] = True
        losses = []
        for value in (1e-5, -1e-5):
            mask.weight.data[i, j] = value
            x, y = batch
            losses.append(F.cross_entropy(training.net(mh.Tensor(x)), y).item())
        mask.present[i, j] = False
        assert gradient[i, j] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-9)


class Uses(nn.Module):
    """A square layer used ``uses`` times, and another one that shares its weight."""

    def __init__(self, uses: int, rng: np.random.Generator) -> None:
        self.uses = uses
        options: dict[str, Any] = {"rng": rng, "dtype": np.float64}
        self.a, self.b = nn.Linear(6, 6, **options), nn.Linear(6, 6, **options)
        self.never = nn.Linear(6, 6, **options)
        self.b.weight = self.a.weight

    def forward(self, x: mh.Tensor) -> mh.Tensor:
        for _ in range(self.uses):
            x = F.tanh(self.a(x))
        return self.b(x)


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_a_mask_keeps_the_gradient_of_all_uses(uses: int, rng: np.random.Generator) -> None:
    """With every weight present it is the weight's own; it adds up and is forgotten with that."""
    net = Uses(uses, rng)
    masks = pruners.attach_masks(net)
    x = mh.Tensor(rng.standard_normal((4, 6)))
    for passes in (1, 2):
        net.zero_grad()
        assert not masks["a"].gradient.any()
        for _ in range(passes):
            (net(x) ** 2).sum().backward()
        assert net.a.weight.grad is not None
        np.testing.assert_allclose(masks["a"].gradient, net.a.weight.grad, rtol=1e-12)
    assert not masks["never"].gradient.any()


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_share_a_weight_share_its_mask(name: str, rng: np.random.Generator) -> None:
    """It counts once, and the same function is left when the masks are taken off."""
    net, pruner = Uses(1, rng), METHODS[name](0.75)
    optimizer = optim.SGD(net.parameters(), 0.01)
    pruner.start(net, optimizer, 8, rng)
    assert list(pruner.masks) == ["a", "never"]
    assert (pruner.total, pruner.kept) == (72, 18)
    for step in range(1, 9):
        net.zero_grad()
        (net(mh.Tensor(rng.standard_normal((4, 6)))) ** 2).mean().backward()
        optimizer.step()
        pruner.after_step(step)
    assert sum(int(m.present.sum()) for m in pruner.masks.values()) == 18
    x = rng.standard_normal((4, 6))
    before = net(x).data
    pruner.finish()
    assert net.a.weight_gate is net.b.weight_gate is None
    np.testing.assert_allclose(net(x).data, before, rtol=1e-12)
    assert np.count_nonzero(net.a.weight.data) + np.count_nonzero(net.never.weight.data) <= 18


@pytest.mark.parametrize("kind", [Movement, RigL])
def test_gradients_that_were_forgotten_are_missed(kind: Any) -> None:
    """Scores of zeros would rank the weights by their place."""
    training = Training(kind(0.9, every=1))
    training.backward()
    training.optimizer.step()
    training.net.zero_grad()
    with pytest.raises(ValueError, match="call after_step before they are forgotten"):
        training.pruner.after_step(1)


# -- choices ---------------------------------------------------------------------------------------


def test_largest_is_the_head_of_a_stable_sort(rng: np.random.Generator) -> None:
    values = rng.integers(0, 5, 60).astype(float)
    for count in (0, 1, 17, 59, 60):
        expected = np.zeros(60, bool)
        expected[np.argsort(-values, kind="stable")[:count]] = True
        np.testing.assert_array_equal(largest(values, count), expected)


def test_there_is_no_largest_where_a_value_is_not_a_number() -> None:
    """A training that has diverged ends with an error, not with an empty network."""
    with pytest.raises(ValueError, match="a score is NaN"):
        largest(np.array([np.nan, np.nan, 1.0]), 2)
    training = Training(Gradual(0.9, every=2))
    training.step()
    training.net.fc2.weight.data[0, 0] = np.nan
    before = training.present
    with pytest.raises(ValueError, match="has the training diverged"):
        training.pruner.after_step(2)
    np.testing.assert_array_equal(training.present, before)


def test_the_largest_may_be_infinite() -> None:
    values = np.array([-np.inf, 1, np.inf, -np.inf, -np.inf])
    for count, expected in ((1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])):
        np.testing.assert_array_equal(np.flatnonzero(largest(values, count)), expected)


def test_magnitude_keeps_the_largest_of_the_whole_network() -> None:
    training = Training(Magnitude(0.9))
    magnitude = abs(training.weights)
    threshold = np.sort(magnitude)[-training.pruner.kept]
    np.testing.assert_array_equal(training.present, magnitude >= threshold)
    densities = training.pruner.layer_density()
    assert densities["fc1"] > 2 * densities["fc2"]  # fewer inputs, larger weights: one ranking


def test_random_ignores_the_weights() -> None:
    densities = Training(Random(0.9)).pruner.layer_density()
    assert densities["fc1"] == pytest.approx(0.1, abs=0.02)
    assert densities["fc2"] == pytest.approx(0.1, abs=0.02)
    training = Training(Random(0.9))
    kept = abs(training.weights[training.present]).mean()
    assert kept == pytest.approx(abs(training.weights).mean(), rel=0.05)


def test_the_rounds_remove_equal_fractions() -> None:
    training = Training(Iterative(0.99, rounds=4, end=0.8))
    assert training.pruner.round_ends() == [8, 16, 24, 32]
    counts = []
    for _ in range(STEPS):
        training.step()
        counts.append(training.present.sum())
    root = 0.01**0.25  # 0.3162
    assert counts[6] == 36_400
    for r, step in enumerate((8, 16, 24), start=1):
        assert counts[step - 1] == int(root**r * 36_400)
    assert counts[31] == counts[-1] == 364


def test_the_cubic_schedule() -> None:
    assert cubic_sparsity(0, 0.96) == 0
    assert cubic_sparsity(0.5, 0.96) == pytest.approx(0.84)  # 0.96 (1 - 1/8)
    assert cubic_sparsity(0.75, 0.64) == pytest.approx(0.63)  # 0.64 (1 - 1/64)
    assert cubic_sparsity(1, 0.96) == 0.96


def test_gradual_pruning_keeps_to_the_schedule() -> None:
    training = Training(Gradual(0.96, begin=0.2, end=0.8, every=4))
    counts = []
    for _ in range(STEPS):
        training.step()
        counts.append(training.present.sum())
    assert counts[7] == counts[10] == 36_400  # begins after step 8
    assert counts[19] == round((1 - 0.84) * 36_400)  # step 20 is half way from 8 to 32
    assert counts[31] == counts[-1] == 1_456


def test_gradual_pruning_removes_the_smallest() -> None:
    training = Training(Gradual(0.96, every=10))
    for _ in range(9):
        training.step()
    training.backward()
    training.optimizer.step()
    magnitude, before = abs(training.weights), training.present
    training.pruner.after_step(10)
    removed = before & ~training.present
    assert removed.sum() > 1000
    assert magnitude[removed].max() <= magnitude[training.present].min()


# -- movement --------------------------------------------------------------------------------------


def test_movement_scores_add_up_weight_times_gradient() -> None:
    """Also for removed weights; with the weights of the time, not those after the step."""
    training = Training(Movement(0.9, begin=0.1, every=2))
    masks, steps = training.pruner.masks, 20
    expected = {name: np.zeros(mask.weight.shape) for name, mask in masks.items()}
    for step in range(1, steps + 1):
        training.backward()
        for name, mask in masks.items():
            expected[name] -= mask.weight.data * mask.gradient
        training.optimizer.step()
        training.pruner.after_step(step)
    assert training.pruner.density < 0.5
    for name, mask in masks.items():
        np.testing.assert_allclose(training.pruner.score[name], expected[name], rtol=1e-12)
        removed, present = (expected[name][m] for m in (~mask.present, mask.present))
        assert removed.std() > 0
        assert present.size == mask.present.sum()
    scores = np.concatenate([s.reshape(-1) for s in expected.values()])
    assert scores[training.present].min() >= scores[~training.present].max()


def test_the_movement_score_says_where_gradient_descent_moves_a_weight() -> None:
    """With plain SGD the score is, to first order in lr, what w^2 / 2 has gained, over lr."""
    training = Training(Movement(0.0, end=1.0), steps=30)
    training.optimizer = optim.SGD(training.net.parameters(), 1e-6)
    before = training.weights**2 / 2
    training.run()
    gained = (training.weights**2 / 2 - before) / 1e-6
    scores = np.concatenate([s.reshape(-1) for s in training.pruner.score.values()])
    np.testing.assert_allclose(scores, gained, rtol=1e-2, atol=1e-4 * abs(gained).max())


def test_movement_scores_stop_with_the_pruning() -> None:
    training = Training(Movement(0.9, end=0.5)).run()
    scores = {name: score.copy() for name, score in training.pruner.score.items()}
    present = training.present
    training.step()
    np.testing.assert_array_equal(training.present, present)
    for name, score in scores.items():
        np.testing.assert_array_equal(training.pruner.score[name], score)


def test_movement_lets_weights_come_back() -> None:
    training = Training(Movement(0.9, begin=0.0, every=1), lr=3e-2)
    returned = 0
    for _ in range(STEPS):
        before = training.present
        training.step()
        returned += (training.present & ~before).sum()
    assert returned > 0


# -- RigL ------------------------------------------------------------------------------------------


def test_erdos_renyi_counts_by_hand() -> None:
    """LeNet-300: the densities are as 1084/235200 to 400/30000 to 110/1000."""
    shapes = [(300, 784), (100, 300), (10, 100)]
    counts = erdos_renyi_counts(shapes, 1331)
    assert counts == [905, 334, 92]  # 1331 / 1594 of 1084, 400, 110
    assert erdos_renyi_counts(shapes, 26_620) == [18_714, 6_906, 1_000]  # fc3 is full
    assert erdos_renyi_counts(shapes, 266_200) == [235_200, 30_000, 1_000]
    assert erdos_renyi_counts(shapes, 0) == [0, 0, 0]
    for count in range(0, 266_200, 7_919):
        assert sum(erdos_renyi_counts(shapes, count)) == count
    with pytest.raises(ValueError, match="do not fit"):
        erdos_renyi_counts(shapes, 266_201)


def test_rigl_begins_with_a_random_mask_of_these_counts() -> None:
    training = Training(RigL(0.9))
    counts = [int(m.present.sum()) for m in training.pruner.masks.values()]
    assert counts == erdos_renyi_counts([(300, 20), (100, 300), (4, 100)], 3_640)
    assert not training.weights[~training.present].any()


def test_rigl_drops_the_smallest_and_grows_the_steepest() -> None:
    """Against a slow list of pairs, layer by layer."""
    training = Training(RigL(0.9, every=10))
    for _ in range(9):
        training.step()
    training.backward()
    training.optimizer.step()
    masks = training.pruner.masks
    for mask in masks.values():  # as if all had been present once
        removed, slots = ~mask.present, training.optimizer.state[_index(training.optimizer, mask)]
        for array in (mask.weight.data, slots["m"], slots["v"]):
            array[removed] = 7
    before = {n: (m.present.copy(), m.weight.data.copy()) for n, m in masks.items()}
    training.pruner.after_step(10)
    for name, mask in masks.items():
        present, weight = before[name]
        count = int(present.sum()) * 9 // 40  # 0.15 (1 + cos(pi / 3)) is 9 / 40
        assert count > 0
        places = [tuple(p) for p in np.argwhere(present)]
        stay = set(sorted(places, key=lambda p: -abs(weight[p]))[: len(places) - count])
        others = [p for p in np.ndindex(*present.shape) if p not in stay]
        grown = set(sorted(others, key=lambda p: -abs(mask.gradient[p]))[:count])
        assert {tuple(p) for p in np.argwhere(mask.present)} == stay | grown
        new = grown - set(places)
        state = training.optimizer.state[_index(training.optimizer, mask)]
        assert bool(new) == (name != "fc3")  # which is full
        for place in new:
            assert mask.weight.data[place] == 0
            assert state["m"][place] == state["v"][place] == 0
        for place in stay:
            assert mask.weight.data[place] == weight[place]
        assert any(state["v"][place] > 0 for place in stay)


def _index(optimizer: optim.Optimizer, mask: pruners.Mask) -> int:
    return next(i for i, p in enumerate(optimizer.params) if p is mask.weight)


def test_rigl_rewires_until_three_quarters_and_keeps_the_layer_densities() -> None:
    training = Training(RigL(0.9, every=5))
    densities, changed = training.pruner.layer_density(), []
    for step in range(1, STEPS + 1):
        before = training.present
        training.step()
        assert training.pruner.layer_density() == densities
        if (training.present != before).any():
            changed.append(step)
    assert changed == [5, 10, 15, 20, 25]


def test_the_fraction_follows_a_cosine() -> None:
    assert pruners.cosine_fraction(0, 0.3) == 0.3
    assert pruners.cosine_fraction(0.5, 0.3) == pytest.approx(0.15)
    assert pruners.cosine_fraction(1, 0.3) == pytest.approx(0)


# -- do the methods differ where they should? ------------------------------------------------------


@pytest.mark.slow
def test_a_choice_beats_chance() -> None:
    """After the same training, the weights chosen by magnitude fit the batches better."""
    losses = {}
    for name in ("random", "gradual"):
        training = Training(METHODS[name](0.98), steps=200).run()
        x, y = training.batch()
        losses[name] = F.cross_entropy(training.net(mh.Tensor(x)), y).item()
    assert losses["gradual"] < losses["random"]
