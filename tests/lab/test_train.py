"""The training loop: stages, switches, landing, determinism."""

import dataclasses
import itertools

import numpy as np
import pytest

from minihyperflows import (
    DoubtfulResultWarning,
    NonFiniteLossError,
    ShapeError,
    flows,
    lab,
    models,
    nn,
)
from minihyperflows.lab import UserError
from minihyperflows.lab.recipes import PresenceTraining, PressureSettings, Regrowth, WeightTraining
from minihyperflows.lab.training import trainable

TINY = lab.Recipe(
    name="tiny",
    model="lenet300",
    dataset="digits",
    batch_size=100,
    target_sparsity=0.8,
    dense=WeightTraining(epochs=1, lr=1e-3),
    pruning=WeightTraining(epochs=8, lr=1e-3),
    regrowth=Regrowth(epochs=4, lr=1e-3, end_lr=1e-6),
    presence=PresenceTraining(lr=2e-2),
)


@pytest.fixture(scope="module")
def data():
    """A quarter of the digits."""
    full = lab.load("digits")
    changes = {"train_x": full.train_x[::4], "train_y": full.train_y[::4]}
    return dataclasses.replace(full, **changes)


def run(recipe, data, seed=0):
    rng = np.random.default_rng(seed)
    net = lab.build_network(recipe, data, rng)
    return net, list(lab.train(net, data, recipe, rng=rng))


def new_trainer(recipe, data):
    rng = np.random.default_rng(0)
    return lab.Trainer(lab.build_network(recipe, data, rng), data, recipe, rng)


def without_time(records):
    return [dataclasses.replace(r, seconds=0.0) for r in records]


def same(*records):
    """Whether records are the same to the last bit, wall times aside (NaN equals NaN)."""
    return len(set(map(repr, without_time(records)))) == 1


def change(recipe, **parts):
    """``recipe`` with fields of its parts replaced, part={field: value}."""
    parts = {k: dataclasses.replace(getattr(recipe, k), **v) for k, v in parts.items()}
    return dataclasses.replace(recipe, **parts)


def test_one_record_per_epoch_and_nothing_printed(data, capsys):
    net, records = run(TINY, data)
    assert [r.epoch for r in records] == list(range(1, 14))
    assert [r.stage for r in records] == ["dense"] + 8 * ["pruning"] + 4 * ["regrowth"]
    assert capsys.readouterr() == ("", "")
    assert records[0]["density"] == records[0].density == 1.0
    assert records[1].gamma == 0.0  # nothing has been measured yet
    assert all(r.gamma == 0 for r in records if r.stage != "pruning")
    assert records[-1].density == flows.density(net)


def test_a_seed_determines_everything(data):
    one, two, other = (without_time(run(TINY, data, seed)[1]) for seed in (3, 3, 4))
    assert repr(one) == repr(two) != repr(other)


@pytest.mark.parametrize("target", [0.6, 0.75, 0.9, 0.95, 0.98, 0.99])
def test_it_lands_on_the_target(target, data):
    """Within 0.2 points; in fact within one weight."""
    net, records = run(TINY.with_target(target), data)
    weights = sum(p.size for p in flows.presences(net).values())
    assert abs(1 - records[-1].density - target) < 0.002
    assert abs(1 - records[-1].density - target) <= 1 / weights


def test_after_landing_the_topology_is_frozen(data):
    _, records = run(TINY, data)
    assert all(r.flips == 0 and r.lr_presence == 0 for r in records[-2:])
    assert records[-1].density == records[-2].density


def test_without_landing_regrowth_goes_its_own_way(data):
    recipe = change(TINY, regrowth={"land": False, "lr_scale": 5.0})
    _, records = run(recipe, data)
    assert records[-1].density != pytest.approx(0.2, abs=1e-4)
    assert records[-1].lr_presence > 0


@pytest.mark.slow
def test_the_switches_change_what_happens(data):
    constant = change(TINY, pressure={"gamma": 7.0})
    assert {r.gamma for r in run(constant, data)[1][1:9]} == {7.0}

    authors = dataclasses.replace(TINY, authors_timeline=True)
    assert [r.stage for r in run(authors, data)[1]].count("pruning") == 9

    # A high pressure carries t without flux far below the floor, or just to it.
    deep, shallow = (
        run(change(TINY, pressure={"gamma": 500.0, "floor": floor}), data)[0]
        for floor in (None, -0.1)
    )
    lowest = [min(p.data.min() for p in flows.presences(n).values()) for n in (deep, shallow)]
    assert lowest[0] < -0.3 < lowest[1]

    sgd = change(TINY, presence={"optimizer": "sgd", "lr": 50.0}, pressure={"gamma": 5.0})
    assert run(sgd, data)[1][8].density < 1


def test_several_updates_of_the_pressure_in_an_epoch(data, monkeypatch):
    """4 batches, 2 updates an epoch: one after the second batch, one after the fourth."""
    recipe = change(TINY, pressure={"updates_per_epoch": 2}, pruning={"epochs": 5})
    updates, steps = [], []

    def update(self, period, density):
        updates.append((len(steps), period, density))
        return real_update(self, period, density)

    def step(self):
        steps.append(self.stage)
        real_step(self)

    real_update, real_step = flows.PressureScheduler.update, lab.Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(flows.PressureScheduler, "update", update)
        patch.setattr(lab.Trainer, "step", step)
        _, records = run(recipe, data)
    pruning = [r for r in records if r.stage == "pruning"]
    assert [(n, period) for n, period, _ in updates] == [(4 + 2 * p, p) for p in range(1, 11)]
    assert [density for *_, density in updates][1::2] == [r.density for r in pruning]
    # the trajectory is that of ten periods, aimed at the same density as with five
    scheduler = flows.PressureScheduler(1 - 0.9 * (1 - recipe.target_sparsity), 10)
    expected = [scheduler.expected(period) for period in range(2, 11, 2)]
    assert [r.expected_density for r in pruning] == expected
    # gamma is the mean over the four batches
    gammas = [0.0] + [scheduler.update(period, density) for _, period, density in updates]
    means = [
        (first + second) / 2 for first, second in zip(gammas[:-1:2], gammas[1::2], strict=True)
    ]
    assert [r.gamma for r in pruning] == pytest.approx(means)


def test_updates_within_an_epoch_continue_from_their_state(data):
    recipe = change(TINY, pressure={"updates_per_epoch": 3}, pruning={"epochs": 4})
    one, other = new_trainer(recipe, data), new_trainer(recipe, data)
    for _ in range(3):
        one.run_epoch()
    other.load_state_dict(*one.state_dict())
    while not one.finished:
        assert same(one.run_epoch(), other.run_epoch())


def test_more_updates_than_batches_are_all_made(data):
    recipe = change(TINY, pressure={"updates_per_epoch": 6}, pruning={"epochs": 2})
    trainer = new_trainer(recipe, data)
    trainer.run_epoch()
    assert trainer.scheduler.epochs == 12
    trainer.run_epoch()
    rises = flows.PressureScheduler(recipe.target_sparsity, 12)
    assert trainer.scheduler.gamma == [rises.update(p, 1.0) for p in range(1, 7)][-1]


def test_batch_norm_scales_can_stay_frozen():
    rng = np.random.default_rng(0)
    recipe = lab.RECIPES["vgg19-cifar10"]
    net = models.vgg13(width=0.05, rng=rng)
    everything = trainable(net, recipe)
    frozen = trainable(net, dataclasses.replace(recipe, train_bn_scale=False))
    assert len(everything) - len(frozen) == 10  # one scale for each of ten convolutions
    assert everything == net.parameters()


def test_a_loss_that_is_not_finite_stops_with_the_place(data):
    recipe = change(TINY, dense={"lr": 1e30})
    with pytest.raises(NonFiniteLossError, match=r"epoch 1, step \d+: the loss is (nan|inf)"):
        run(recipe, data)


def test_pressure_settings_have_the_papers_defaults():
    assert PressureSettings() == PressureSettings(0.2, 1.5, 6.0, None, None)


def test_a_network_with_gates_is_refused(data):
    rng = np.random.default_rng(0)
    net = lab.build_network(TINY, data, rng)
    flows.attach(net, rng=rng)
    with pytest.raises(ValueError, match="gates already"):
        next(lab.train(net, data, TINY, rng=rng))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg19-cifar10", "resnet50-cifar10"])
def test_convolutional_recipes_train_narrow_and_continue_from_their_state(name):
    """All three stages of the paper's recipes, with augmentation, on a few drawn images."""
    data = lab.make_shapes32(train=24, test=10)
    recipe = dataclasses.replace(
        lab.RECIPES[name].scaled(1e-9), batch_size=12, model_options={"width": 0.05}
    )
    recipe = change(recipe, dense={"lr": 0.01}, pruning={"lr": 0.01, "epochs": 2})

    one, other = new_trainer(recipe, data), new_trainer(recipe, data)
    records = [one.run_epoch() for _ in range(2)]
    other.load_state_dict(*one.state_dict())
    while not one.finished:
        records.append(one.run_epoch())
        assert same(records[-1], other.run_epoch())
    assert [r.stage for r in records] == ["dense", "pruning", "pruning", "regrowth"]
    assert records[-1].density == pytest.approx(0.02, abs=0.002)


# -- modes -----------------------------------------------------------------------------------------


def frozen_norm(rng):
    """A convolutional network whose batch norm its user has put into evaluation mode."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, rng=rng),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 10, rng=rng),
    )
    net[1].eval()
    return net


def test_evaluation_puts_every_mode_back(data):
    net = frozen_norm(np.random.default_rng(0))
    modes = [module.training for _, module in net.named_modules()]
    lab.evaluate(net, data)
    assert [module.training for _, module in net.named_modules()] == modes
    net.fails = nn.Linear(2, 2, rng=np.random.default_rng(0))  # after an error too
    with pytest.raises(ShapeError):
        lab.evaluate(net, data)
    assert [m.training for _, m in net.named_modules()][: len(modes)] == modes


def test_a_frozen_batch_norm_stays_frozen_through_a_training(data):
    rng = np.random.default_rng(0)
    net = frozen_norm(rng)
    statistics = net[1].running_mean.data.copy(), net[1].running_var.data.copy()
    list(lab.train(net, data, change(TINY, dense={"epochs": 2}, pruning={"epochs": 2}), rng=rng))
    assert not net[1].training
    np.testing.assert_array_equal(net[1].running_mean.data, statistics[0])
    np.testing.assert_array_equal(net[1].running_var.data, statistics[1])


def test_a_frozen_batch_norm_takes_a_batch_of_one(data):
    """1437 / 4 = 359 and one image left over; the norm does not need a variance of the batch."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm2d(64), nn.Linear(64, 10, rng=rng))
    recipe = dataclasses.replace(TINY, batch_size=len(data.train_y) - 1)
    with pytest.raises(lab.UserError, match="a batch of one"):
        lab.Trainer(net, data, recipe, rng)
    net[1].eval()
    assert lab.Trainer(net, data, recipe, rng).run_epoch().epoch == 1


def test_a_network_in_evaluation_mode_is_trained_all_the_same(data):
    """Its batch norms take the statistics of the batches, whenever ``eval`` was called."""
    states = []
    for evaluated in (False, True):
        rng = np.random.default_rng(0)
        net = nn.Sequential(nn.Flatten(), nn.BatchNorm2d(64), nn.Linear(64, 10, rng=rng))
        recipe = change(TINY, dense={"epochs": 2}, pruning={"epochs": 2}, regrowth={"epochs": 1})
        if evaluated:
            net.eval()
        for _ in lab.train(net, data, recipe, rng=rng):
            assert [m.training for _, m in net.named_modules()] == [True] * 4
            if evaluated:
                net.eval()  # as one does to look at it between two epochs
        states.append({name: a.tobytes() for name, a in net.state_dict().items()})
    assert states[0] == states[1]
    one_left = dataclasses.replace(TINY, batch_size=len(data.train_y) - 1)
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm2d(64), nn.Linear(64, 10, rng=rng))
    net.eval()
    with pytest.raises(lab.UserError, match="a batch of one"):
        lab.Trainer(net, data, one_left, rng)


# -- hooks -----------------------------------------------------------------------------------------


def test_the_hooks_are_called_in_their_order(data):
    """Each once where the class says so, and a pressure of one's own counts."""
    calls = []

    class Told(lab.Trainer):
        def gamma(self):
            return 3.0 if self.stage == "pruning" else 0.0

        def batches(self):
            calls.append("batches")
            yield from super().batches()

    def telling(name):
        def hook(self, *arguments):
            calls.append(name)
            return getattr(super(Told, self), name)(*arguments)

        return hook

    for name in ("enter", "learning_rates", "backward", "step"):
        setattr(Told, name, telling(name))
    rng = np.random.default_rng(0)
    recipe = change(TINY, dense={"epochs": 1}, pruning={"epochs": 1})
    trainer = Told(lab.build_network(recipe, data, rng), data, recipe, rng)
    assert (trainer.stage, trainer.stage_epoch) == ("dense", 1)
    trainer.run_epoch()
    assert calls == ["enter", "learning_rates", "batches", *["backward", "step"] * 4]
    assert trainer.run_epoch().gamma == 3.0
    assert (trainer.stage, trainer.stage_epoch) == ("regrowth", 1)


def test_the_mean_loss_is_over_the_images_that_were_seen(data):
    class Fewer(lab.Trainer):
        def batches(self):
            yield from itertools.islice(super().batches(), 2)

        def backward(self, x, y):
            losses.append(super().backward(x, y))
            return losses[-1]

    losses, rng = [], np.random.default_rng(0)
    trainer = Fewer(lab.build_network(TINY, data, rng), data, TINY, rng)
    assert trainer.run_epoch().train_loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert len(losses) == 2


# -- what goes wrong quietly -----------------------------------------------------------------------


def test_a_landing_from_afar_is_warned_of(data):
    recipe = change(TINY, pruning={"epochs": 1}, dense={"epochs": 0}, regrowth={"epochs": 1})
    trainer = new_trainer(recipe, data)
    trainer.run_epoch()
    with pytest.warns(DoubtfulResultWarning, match=r"landing removed [\d,]+ of 50,200 weights"):
        trainer.run_epoch()
    (kept,) = trainer.warnings
    assert kept.startswith(f"landing removed {-trainer.landed_by:,} of")
    again = new_trainer(recipe, data)
    again.load_state_dict(*trainer.state_dict())
    assert again.warnings == trainer.warnings


@pytest.mark.filterwarnings("ignore:landing")
def test_targets_that_leave_a_layer_empty(data):
    recipe = change(TINY, pruning={"epochs": 1}, dense={"epochs": 0}, regrowth={"epochs": 1})
    recipe = recipe.with_target(1 - 2.5 / 50_200)
    with pytest.warns(DoubtfulResultWarning, match="leaves 2 weights for 3 layers"):
        trainer = new_trainer(recipe, data)
    trainer.run_epoch()
    with pytest.warns(DoubtfulResultWarning, match="no weight is left in fc"):
        trainer.run_epoch()
    assert len(trainer.warnings) == 3
    with pytest.raises(UserError, match="leaves none of the 50,200 weights"):
        new_trainer(recipe.with_target(1 - 0.5 / 50_200), data)


def test_a_batch_of_one_image(data):
    """Batch norm over maps of one pixel has one value a channel then, and no variance."""
    recipe = dataclasses.replace(lab.RECIPES["vgg19-small-shapes32"], batch_size=7)
    shapes, rng = lab.make_shapes32(train=8, test=4), np.random.default_rng(0)
    net = lab.build_network(recipe, shapes, rng)
    before = net.state_dict()
    with pytest.raises(UserError, match="the last of 8 images are a batch of one"):
        lab.Trainer(net, shapes, recipe, rng)
    assert all((net.state_dict()[name] == value).all() for name, value in before.items())
    new_trainer(dataclasses.replace(TINY, batch_size=1), data)  # no batch norm: it may
