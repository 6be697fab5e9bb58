"""Whole runs on a GPU: flat arrays, graphs, landing, resuming."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from minihyperflows import NonFiniteLossError, flows, lab, optim
from minihyperflows.cli import main
from minihyperflows.engine.backend import cupy, to_numpy
from minihyperflows.engine.gpu.capture import Replay, on_stream
from minihyperflows.lab import runs
from minihyperflows.lab.recipes import PresenceTraining, PressureSettings, Regrowth, WeightTraining
from minihyperflows.lab.training import evaluate

TINY = lab.Recipe(
    name="tiny",
    model="lenet300",
    dataset="digits",
    batch_size=50,
    target_sparsity=0.8,
    gpu_dtype="float32",
    dense=WeightTraining(epochs=1, lr=1e-3, label_smoothing=0.1),
    pruning=WeightTraining(epochs=3, lr=1e-3),
    regrowth=Regrowth(epochs=2, lr=1e-3, end_lr=1e-6),
    presence=PresenceTraining(init=(0.02, 0.05), lr=3e-3),
    pressure=PressureSettings(updates_per_epoch=2),
)
VGG = dataclasses.replace(
    TINY,
    model="vgg19",
    dataset="shapes32",
    model_options={"width": 0.03, "stem_stride": 2},
    gpu_dtype="float16",
    augment=True,
    dense=WeightTraining(epochs=1, lr=0.05, optimizer="sgd", nesterov=True, weight_decay=5e-4),
    pruning=WeightTraining(epochs=2, lr=0.05, optimizer="sgd"),
    regrowth=Regrowth(epochs=1, lr=1e-2, end_lr=1e-3),
    batch_size=8,
)


@pytest.fixture(scope="module")
def digits():
    """230 of the digits: four batches of 50 and one of 30."""
    full = lab.load("digits")
    train = {"train_x": full.train_x[:230], "train_y": full.train_y[:230]}
    return dataclasses.replace(full, **train, test_x=full.test_x[:90], test_y=full.test_y[:90])


@pytest.fixture(scope="module")
def shapes():
    return lab.make_shapes32(train=36, test=20)


def trainer_of(recipe, data, device="cuda", seed=0) -> lab.Trainer:
    rng = np.random.default_rng(seed)
    net = lab.build_network(recipe, data, rng).to(device)
    return lab.Trainer(net, data, recipe, rng)


def records_of(trainer) -> list:
    records = []
    while not trainer.finished:
        records.append(dataclasses.replace(trainer.run_epoch(), seconds=0.0))
    return records


@pytest.mark.slow
def test_a_run_in_single_precision_is_that_of_the_cpu(gpu, digits):
    on_cpu, on_gpu = (trainer_of(TINY, digits, device) for device in ("cpu", "cuda"))
    ours, theirs = records_of(on_gpu), records_of(on_cpu)
    for mine, reference in zip(ours[:4], theirs[:4], strict=True):  # until landing, which differs
        assert mine.gamma == reference.gamma
        assert mine.expected_density == reference.expected_density
        assert mine.train_loss == pytest.approx(reference.train_loss, rel=1e-3)
        assert mine.test_accuracy == pytest.approx(reference.test_accuracy, abs=0.025)
        assert mine.density == pytest.approx(reference.density, abs=0.002)
        assert mine.flips == pytest.approx(reference.flips, rel=0.01)
        for name, flow in mine.layers.items():
            wanted = reference.layers[name]
            assert flow.flux_present == pytest.approx(wanted.flux_present, rel=0.02)
            assert flow.regrowths == pytest.approx(wanted.regrowths, rel=0.05, abs=5)
    assert sum(r.flips for r in ours) > 1000
    assert flows.density(on_gpu.net) == flows.density(on_cpu.net)  # both landed


def subclass(*hooks) -> type[lab.Trainer]:
    """A trainer that overrides these, and does in them what it would do anyway."""
    return type("Mine", (lab.Trainer,), {n: _same(n) for n in hooks})


def _same(name):
    return lambda self, *arguments: getattr(lab.Trainer, name)(self, *arguments)


@pytest.mark.parametrize("hooks", [("batches",), ("backward",), ("step",), ("batches", "step")])
def test_a_hook_that_a_gpu_does_not_call_is_refused(gpu, digits, hooks):
    rng = np.random.default_rng(0)
    net = lab.build_network(TINY, digits, rng)
    kind = subclass(*hooks)
    kind(net, digits, TINY, rng)  # on the CPU it may
    with pytest.raises(lab.UserError, match=f"Mine overrides {', '.join(hooks)}, which a GPU does"):
        kind(net.to("cuda"), digits, TINY, rng)
    with pytest.raises(lab.UserError, match="Heir overrides"):
        type("Heir", (kind,), {})(net, digits, TINY, rng)


def test_the_other_hooks_are_called_on_a_gpu_too(gpu, digits):
    class Pressed(subclass("enter", "learning_rates")):
        def gamma(self):
            return 7.0 if self.stage == "pruning" else 0.0

    rng = np.random.default_rng(0)
    recipe = TINY.with_fields({"dense.epochs": 0})
    record = Pressed(
        lab.build_network(TINY, digits, rng).to("cuda"), digits, recipe, rng
    ).run_epoch()
    assert record.gamma == 7.0


@pytest.mark.slow
def test_evaluation_puts_every_mode_back(gpu, shapes):
    trainer = trainer_of(VGG, shapes)
    modules = [module for _, module in trainer.net.named_modules()]
    modules[-1].eval()  # frozen by its user
    modes = [module.training for module in modules]
    assert 0 <= trainer.loop.accuracy() <= 1
    assert [module.training for module in modules] == modes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [TINY, VGG], ids=["lenet300", "vgg19, float16"])
def test_one_seed_one_run_and_a_finished_network_is_an_ordinary_one(gpu, recipe, digits, shapes):
    data = digits if recipe is TINY else shapes
    first, second = (trainer_of(recipe, data) for _ in range(2))
    assert repr(records_of(first)) == repr(records_of(second))
    assert 1 - flows.density(first.net) == pytest.approx(0.8, abs=1e-3)
    for name, array in first.net.state_dict().items():
        assert (array == second.net.state_dict()[name]).all(), name
    on_gpu = evaluate(first.net, data)
    assert evaluate(first.net.to("cpu"), data) == pytest.approx(on_gpu, abs=0.06)


@pytest.mark.slow
def test_a_run_that_stops_after_any_epoch_goes_on_bit_for_bit(gpu, shapes):
    whole = trainer_of(VGG, shapes)
    records, states = [], [whole.state_dict()]
    while not whole.finished:
        records.append(dataclasses.replace(whole.run_epoch(), seconds=0.0))
        states.append(whole.state_dict())
    for epochs_done in (1, 2, 3):
        later = trainer_of(VGG, shapes, seed=5)
        arrays, values = states[epochs_done]
        later.load_state_dict(arrays, json.loads(json.dumps(values)))
        assert repr(records_of(later)) == repr(records[epochs_done:])
        for name, array in whole.net.state_dict().items():
            assert (array == later.net.state_dict()[name]).all(), name


def after_four_steps(data, replayed: bool) -> dict[str, np.ndarray]:
    """The state of a gated network, the last three of whose steps are replayed or not."""
    trainer = trainer_of(VGG, data)
    flows.attach(trainer.net, init=(-0.1, 0.1), rng=np.random.default_rng(1))
    trainer._start_pruning()
    loop = trainer.loop
    loop._prepare(trainer.weight_optimizer, trainer.presence_optimizer)
    loop._order.set(np.arange(36, dtype=np.int32))
    loop.flat.begin_epoch()
    loop.flat.set_rates(1.0)
    with on_stream(loop._stream):
        loop.training_step(8, 0.1)
        step = Replay(lambda: loop.training_step(8, 0.1)) if replayed else None
        for _ in range(3):
            step() if step else loop.training_step(8, 0.1)
    assert int(to_numpy(loop.flat.arrays.position)[0]) == 32
    return trainer.net.state_dict()


@pytest.mark.slow
def test_a_replayed_step_is_the_step_bit_for_bit(gpu, shapes):
    eager, replayed = (after_four_steps(shapes, replayed) for replayed in (False, True))
    for name, array in eager.items():
        assert (array == replayed[name]).all(), name


@pytest.mark.slow
def test_the_host_reads_nothing_within_an_epoch(gpu, shapes, monkeypatch):
    if gpu == "cuda":
        pytest.skip("a real GPU does not say when it is waited for")
    told: list[str] = []
    trainer = trainer_of(VGG, shapes)
    steps = trainer.loop._steps

    def observed(*arguments):
        monkeypatch.setattr("minihyperflows.emulator.array.forbid", told.append)
        monkeypatch.setattr("minihyperflows.emulator.recording.forbid", told.append)
        try:
            return steps(*arguments)
        finally:
            monkeypatch.undo()

    trainer.loop._steps = observed
    trainer.run_epoch()
    assert told  # something was looked at
    assert not [what for what in told if "reading" in what or "synchronize" in what]


@pytest.mark.slow
def test_the_count_of_batches_is_kept(gpu, shapes):
    trainer = trainer_of(VGG, shapes)
    trainer.run_epoch()
    assert int(trainer.net.features[1].num_batches_tracked.data) == 5


def test_a_loss_that_is_not_finite_stops_the_run(gpu, digits):
    trainer = trainer_of(TINY, digits)
    trainer.net.fc1.weight.data[0, 0] = np.nan
    with pytest.raises(NonFiniteLossError, match="epoch 1, step 1: the loss is not finite"):
        trainer.run_epoch()


@pytest.mark.slow
def test_runs_and_the_command_line(gpu, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "load", lambda name, root: shapes)
    monkeypatch.setitem(lab.RECIPES, "tiny", VGG)
    out = tmp_path / "run"
    command = ["prune", "tiny", "--device", "cuda", "--out", str(out)]
    assert main([*command, "--precision", "float32"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["device"] == "cuda"
    assert summary["dtype"] == "float32"
    assert summary["command"].endswith("--precision float32 --device cuda --seed 0")
    assert {"gpu", "cupy", "cuda"} <= set(summary["versions"])
    capsys.readouterr()
    assert main(command) == 2  # half precision is another run
    assert "gpu_dtype float32 there" in capsys.readouterr().err


def test_precision_is_for_a_gpu(tmp_path, capsys):
    assert main(["prune", "--precision", "float16", "--out", str(tmp_path)]) == 2
    assert "--precision is for --device cuda" in capsys.readouterr().err


def test_other_weights_than_single_precision_are_refused(gpu, digits):
    double = dataclasses.replace(TINY, dtype="float64")
    with pytest.raises(lab.UserError, match="float64 weights: a GPU trains float32"):
        trainer_of(double, digits)
    with pytest.raises(lab.UserError, match="'float16' or 'float32', not 'bfloat16'"):
        dataclasses.replace(TINY, gpu_dtype="bfloat16")


@pytest.mark.parametrize("make", [optim.Adam, lambda p, lr: optim.SGD(p, lr, momentum=0.9)])
def test_optimisers_follow_their_parameters(gpu, digits, make):
    nets = [lab.build_network(TINY, digits, np.random.default_rng(0)) for _ in range(2)]
    optimizers = [make(net.parameters(), lr=0.01) for net in nets]
    for k in range(4):
        if k == 2:
            nets[0].to("cuda")
        for net, optimizer in zip(nets, optimizers, strict=True):
            rng = np.random.default_rng(k)
            for p in net.parameters():
                gradient = rng.normal(0, 1, p.shape).astype(np.float32)
                p.grad = cupy().asarray(gradient) if p.device == "cuda" else gradient
            optimizer.step()
    assert nets[0].fc1.weight.device == "cuda"
    for name, array in nets[0].state_dict().items():
        np.testing.assert_allclose(array, nets[1].state_dict()[name], rtol=1e-6, err_msg=name)
    assert optimizers[0].state_dict().keys() == optimizers[1].state_dict().keys()
