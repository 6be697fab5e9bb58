"""The claims about DHP: closed form against search, the cut, controls at the same budget, files."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minihyperflows import lab
from minihyperflows.engine import Tensor
from minihyperflows.nn import Module
from minihyperflows.related import dhp
from minihyperflows.related.channels import channel_groups, sizes
from minihyperflows.related.ranking import shuffled
from minihyperflows.studies import dhp_claims, dhp_runs, frame
from minihyperflows.studies.dhp_runs import Settings
from minihyperflows.studies.dhp_tables import Run, Tables, differences, text_of, widths_of
from minihyperflows.studies.dhp_tasks import (
    EXPERIMENTS,
    Classification,
    Denoising,
    Experiment,
    Task,
    halved,
    luminance,
    psnr,
    random_patches,
    steps_of,
    with_noise,
)

STEPS = 22  # of an epoch of the digits


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few epochs of the digits."""
    for name, budget, search in (("mlp-digits", 8, 5), ("dncnn-digits", 2, 1)):
        brief = dataclasses.replace(EXPERIMENTS[name], budget=budget, search=search)
        monkeypatch.setitem(EXPERIMENTS, name, brief)


def study(out: Path, *words: str) -> Tables:
    frame.main(dhp_claims.STUDY, ["--out", str(out), *words], listed=True)
    return Tables(out)


def perceptron() -> tuple[Experiment, Task]:
    experiment = EXPERIMENTS["mlp-digits"]
    return experiment, experiment.load()


# -- the study -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_controls_have_the_same_budget_and_no_more_multiplications(tmp_path: Path) -> None:
    words = ["--parts", "controls", "--seeds", "1", "--targets", "0.5"]
    rows = study(tmp_path / "a.csv", *words).tables[-1]
    runs = {(r["hyper_bias"], r["variant"]): r for r in rows}
    assert len(runs) == 13
    for (bias, variant), row in runs.items():
        own = runs.get((bias, "dhp"), row)
        steps = row["search_steps"] + row["train_steps"]
        assert steps == (own["train_steps"] if variant == "short" else 8 * STEPS)
        assert 0.05 < row["score"] <= 1
        assert {"commit", "date", "device", "dtype", "numpy"} <= row.keys()
        assert f"--variant {variant} " in row["command"]
        if variant in ("permuted", "scratch", "short"):
            same = ("widths", "ratio", "parameters")
            assert [row[k] for k in same] == [own[k] for k in same]
        assert row["ratio"] <= own["ratio"]
    assert runs["", "dense"]["ratio"] == 1
    for bias in ("yes", "no"):
        dhp, random, uniform = (runs[bias, name] for name in ("dhp", "random", "uniform"))
        assert 0 < dhp["search_steps"] <= 5 * STEPS
        assert dhp["reached"] == (dhp["ratio"] <= 0.52)
        assert len({random["widths"], uniform["widths"], dhp["widths"]}) == 3
        hidden = [w for w in widths_of(uniform["widths"]).values() if w not in (10, 64)]
        assert len(set(hidden)) == 1
    assert runs["yes", "dhp"]["reached"]
    assert runs["yes", "permuted"]["full_score"] == runs["yes", "dhp"]["full_score"]


@pytest.mark.slow
def test_the_other_parts_tell_how_a_search_went(tmp_path: Path) -> None:
    words = ["--parts", "search", "rules", "decay", "--seeds", "0", "--hyper-bias", "yes"]
    looks, groups, runs = study(tmp_path / "a.csv", *words).tables
    assert len(runs) == 10
    assert len(looks) == 10 * (1 + 5 * STEPS // 10)
    assert len(groups) == 30
    by_run: dict[str, list[Any]] = {r["part"] + r["variant"]: [] for r in runs}
    for row in looks:
        by_run[row["part"] + row["variant"]].append(row)
    for course in by_run.values():
        first = course[0]
        assert (first["step"], first["ratio"]) == (0, first["free_ratio"])
        assert all(row["zero"] <= row["below"] for row in course)
        free = [row["free_ratio"] for row in course]
        assert free == sorted(free, reverse=True)
    last = {name: course[-1] for name, course in by_run.items()}
    assert last["searchx4"]["ratio"] < last["searchx1"]["ratio"] < last["searchx0.25"]["ratio"]
    assert last["searchx1"]["ratio"] < 0.5
    same = ("ratio", "below", "zero", "loss")
    assert [last["searchx1"][k] for k in same] == [last["rulesproximal"][k] for k in same]
    assert last["rulesproximal"]["zero"] > 0.2
    assert last["rulesloss"]["zero"] < 0.02
    assert last["decayneither"]["free_below"] < 0.02 < last["decayl1"]["free_below"]
    assert last["decayboth"]["free_below"] > last["decayl1"]["free_below"]
    assert last["decayboth"]["below"] > last["decayl1"]["below"] + last["decaydecay"]["below"]
    for row in groups:
        assert row["floor"] <= row["width"] <= row["size"] == 64
        assert math.isnan(row["auc"]) == (row["width"] == 64)


@pytest.mark.slow
def test_going_on_where_it_stopped(tmp_path: Path) -> None:
    """Each run by itself comes to what it comes to after others; rows of two files are joined."""
    words = ["--parts", "controls", "--seeds", "2", "--targets", "0.5", "--hyper-bias", "yes"]
    variants = ["dhp", "permuted", "uniform", "dense"]
    whole = study(tmp_path / "a.csv", *words, "--variants", *variants)
    before = whole.files[-1].read_bytes()
    study(tmp_path / "a.csv", *words, "--variants", "permuted")
    assert whole.files[-1].read_bytes() == before
    for variant in variants[::-1]:
        study(tmp_path / "b.csv", *words, "--variants", variant)
    pieces = Tables(tmp_path / "b.csv")
    assert pieces.runs.keys() == whole.runs.keys()
    same = ("search_steps", "train_steps", "ratio", "widths", "score", "cut_score")
    for run, row in whole.runs.items():
        assert [pieces.runs[run].get(k, "") for k in same] == [row[k] for k in same]
    study(tmp_path / "c.csv", *words, "--variants", "dense", "--join", str(tmp_path / "a.csv"))
    for file, other in zip(whole.files, Tables(tmp_path / "c.csv").files, strict=True):
        assert file.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_run_is_recognised_by_its_row(tmp_path: Path) -> None:
    """Whatever digits its target has, and however often it is asked for."""
    words = ["--parts", "search", "search", "--variants", "x4", "x4", "--hyper-bias", "no", "no"]
    words += ["--seeds", "0", "0", "--targets", "0.3333333333333333"]
    done = study(tmp_path / "a.csv", *words)
    assert [run.target for run in done.runs] == [row["target"] for row in done.tables[-1]]
    assert [run.target for run in done.runs] == [0.333333]
    before = done.files[-1].read_bytes()
    study(tmp_path / "a.csv", *words)
    assert done.files[-1].read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--targets", "50"], "is not a fraction"),
        (["--join", "nowhere.csv"], "no file nowhere.csv"),
        (["--networks", "mlp-mnist", "--data-dir", "nowhere"], "nowhere"),
        (["--networks", "dncnn-digits", "--parts", "rules"], "for SGD"),
        (["--seeds", "-1"], "'-1' is not a seed"),
        (["--targets", "0.5", "0.001"], "mlp-digits: 0.0"),
        (["--targets", "0.5", "0.001"], "stays in any case, so choose a larger target than 0.001"),
        (["--parts", "search", "--variants", "uniform"], "no run was asked for"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        study(tmp_path / "a.csv", *words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if not line.startswith("this is now")]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_denoising_is_measured_in_the_same_way(tmp_path: Path) -> None:
    words = [
        "--networks",
        "dncnn-digits",
        "--parts",
        "controls",
        "--seeds",
        "0",
        "--targets",
        "0.4",
    ]
    words += ["--variants", "dhp", "uniform", "dense", "--hyper-bias", "yes"]
    runs = {r["variant"]: r for r in study(tmp_path / "a.csv", *words).tables[-1]}
    assert all(row["metric"] == "psnr" for row in runs.values())
    assert runs["dense"]["score"] > 11.5  # the noisy images have 11.2 unclipped
    assert runs["uniform"]["score"] > 11.5
    assert runs["uniform"]["ratio"] <= runs["dhp"]["ratio"] < 0.6
    assert runs["dhp"]["widths"].startswith("tail 1, head ")


def test_the_course_of_a_search_is_thinned() -> None:
    """To multiples of the same step in all searches of an experiment, and the end."""
    looks = [dhp_runs.Look(step, 1.0, 1.0, 0.0, 0.0, 0.0, 0.5) for step in range(0, 640, 10)]
    network = dhp_runs.new_network(*perceptron(), True, seed=0)
    found = dhp_runs.Searched(network, {}, dhp_runs.dhp.FreeShrinkage(0.1), looks)
    run = Run("controls", "mlp-digits", "yes", "dhp", 0.5, 0)
    steps = [row["step"] for row in dhp_claims.rows_of_looks(run, found, 660)]
    assert steps == [*range(0, 601, 30), 630]
    assert len(dhp_claims.rows_of_looks(run, found, 300)) == 64
    found.looks = looks[:-1]
    assert [row["step"] for row in dhp_claims.rows_of_looks(run, found, 660)][-2:] == [600, 620]


# -- searching -------------------------------------------------------------------------------------


class Indifferent(Classification):
    """A loss without a gradient."""

    def loss(self, output: Tensor, wanted: Any) -> Tensor:
        return 0.0 * super().loss(output, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, 0.0, 0.005])
def test_without_gradients_latents_go_the_way_of_the_closed_form(decay: float | None) -> None:
    experiment, task = perceptron()
    settings = Settings(0.5, latent_decay=decay, stops=False)
    found = dhp_runs.search(experiment, Indifferent(task.data), settings, seed=0)
    assert found.looks[-1].free_ratio < 0.4
    for now in found.looks:
        assert now.ratio == pytest.approx(now.free_ratio, abs=0.05)
        assert now.below == pytest.approx(now.free_below, abs=0.03)


@pytest.mark.slow
def test_all_rules_pull_equally_hard() -> None:
    """On latents that are far from zero; there only the proximal step stops."""
    experiment, task = perceptron()
    for rule in dhp_runs.RULES:
        settings = Settings(0.5, rule=rule, stops=False)
        found = dhp_runs.search(experiment, Indifferent(task.data), settings, seed=0)
        free, zeros = dhp_runs.free_latents(found), 0
        for name in dhp_runs.prunable(found.network):
            z, far = abs(found.network.latents[name].data), found.initial[name] > 1.2
            assert far.any()
            np.testing.assert_allclose(z[far], free[name][far], atol=0.1)
            zeros += int((z == 0).sum())
        assert (zeros > 80) is (rule == "proximal")


def test_lambda_is_the_one_that_comes_to_the_target_in_half_of_the_time() -> None:
    experiment, task = perceptron()
    for bias in (True, False):
        network = dhp_runs.new_network(experiment, task, bias, seed=0)
        l1 = dhp_runs.chosen_l1(experiment, network, Settings(0.3, bias), 400)
        free = dhp_runs.dhp.FreeShrinkage(l1 if bias else l1 / experiment.bias_free)
        kept = round(64 * (1 - free.fraction_lost(200)))
        widths = network.sizes() | dict.fromkeys(dhp_runs.prunable(network), kept)
        assert dhp_runs.ratio_of(network, widths) == pytest.approx(0.3, abs=0.02)
    given = dataclasses.replace(experiment, l1=2e-4)
    assert dhp_runs.chosen_l1(given, network, Settings(0.3, pull=4.0), 400) == 8e-4


def test_the_strong_decay_is_that_of_twenty_epochs() -> None:
    experiment, task = perceptron()
    decay = dhp_runs.strong_decay(experiment, task)
    free = dhp_runs.dhp.FreeShrinkage(0.0, weight_decay=decay)
    authors = dhp_runs.dhp.FreeShrinkage(0.0)
    after = free.size_after(steps_of(experiment.search, task), 1.0)
    assert (
        after == pytest.approx(authors.size_after(781 * 20, 1.0)) == pytest.approx(0.21, abs=0.01)
    )


def test_runs_of_a_seed_begin_alike() -> None:
    experiment, task = perceptron()
    one, other = (dhp_runs.new_network(experiment, task, bias, seed=3) for bias in (True, False))
    for name, z in one.latents.items():
        np.testing.assert_array_equal(z.data, other.latents[name].data)
    batches = [next(task.batches(dhp_runs.stream(3, dhp_runs.TRAINING))) for _ in range(2)]
    np.testing.assert_array_equal(batches[0][0].data, batches[1][0].data)
    other_seed = next(task.batches(dhp_runs.stream(4, dhp_runs.TRAINING)))
    assert (batches[0][0].data != other_seed[0].data).any()


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_the_gap(bias: bool) -> None:
    """Without biases nothing is lost with channels whose latent is zero, as long as those that the
    classifier reads stay; a random choice of as many loses something in any case."""
    experiment, task = perceptron()
    experiment = dataclasses.replace(experiment, classifier_keeps=1.0)
    found = dhp_runs.search(experiment, task, Settings(0.999, bias, pull=0.0, stops=False), seed=0)
    for name in dhp_runs.prunable(found.network):
        z = found.network.latents[name].data
        z[:40] = 0
        z[abs(z) < found.network.threshold] = 0  # or the cut would remove more than zeros
    keep = found.network.kept()
    reestimate(found, task)
    _, gap = dhp_runs.finish(found, keep, experiment, task, seed=0)
    assert (gap.cut == gap.full) is not bias
    assert gap.trained > 0.8
    chance = shuffled(keep, np.random.default_rng(0))
    assert {k: m.sum() for k, m in chance.items()} == {k: m.sum() for k, m in keep.items()}
    assert any((chance[k] != keep[k]).any() for k in keep)
    _, other = dhp_runs.finish(found, chance, experiment, task, seed=0)
    assert other.full == gap.full
    assert other.cut < gap.full


@pytest.mark.slow
def test_scores_after_the_cut_by_hand(tmp_path: Path) -> None:
    """With the statistics of the search, then with those of twenty batches, then trained."""
    words = ["--parts", "controls", "--variants", "dhp", "--hyper-bias", "yes", "--seeds", "0"]
    (row,) = study(tmp_path / "a.csv", *words, "--targets", "0.3").tables[-1]
    experiment, task = perceptron()
    found = dhp_runs.search(experiment, task, Settings(0.3), seed=0)
    net = dhp.extract(found.network)
    scores = [task.score(found.network), task.score(net)]
    batches = itertools.islice(task.batches(dhp_runs.stream(0, dhp_runs.SEARCH)), 20)
    dhp.reestimate_norms(net, [x for x, _ in batches])
    scores.append(task.score(net))
    dhp_runs.train(net, experiment, task, 8 * STEPS - found.steps, seed=0)
    scores.append(task.score(net))
    names = ("full_score", "cut_score", "reestimated_score", "score")
    assert [row[name] for name in names] == pytest.approx(scores)
    assert len({*scores}) == 4


def test_the_whole_schedule_lies_in_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the rate after half of the steps, a hundredth after three quarters, whatever
    network it is that is trained then."""
    experiment, task = perceptron()
    optimizers, make = [], dhp_runs.make_optimizer
    monkeypatch.setattr(
        dhp_runs, "make_optimizer", lambda *given: optimizers.append(make(*given)) or optimizers[-1]
    )
    course, rates = dhp_runs.Course(experiment, task, 8, seed=0), []
    for until in (3, 5, 8):
        net = experiment.build(np.random.default_rng(0))
        course.advance(net, until, after_step=lambda step: rates.append(optimizers[-1].lr))
    assert len(optimizers) == 3
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def reestimate(found: dhp_runs.Searched, task: Task) -> None:
    """Statistics of the network whose latents were changed by hand."""
    dhp_runs.reestimate(found.network, task, seed=0)


def test_auc() -> None:
    kept = np.array([True, False, True, False])
    assert dhp_runs.survival_auc(np.array([2.0, 1.0, 3.0, 0.0]), kept) == 1
    assert dhp_runs.survival_auc(np.array([2.0, 2.0, 2.0, 2.0]), kept) == 0.5
    assert dhp_runs.survival_auc(np.array([0.0, 1.0, 3.0, 2.0]), kept) == 0.5
    assert math.isnan(dhp_runs.survival_auc(np.ones(4), np.ones(4, bool)))


@pytest.mark.slow
def test_on_a_gpu_the_same_happens(gpu: str) -> None:
    experiment = dataclasses.replace(EXPERIMENTS["mlp-digits"], images=128, budget=4, search=2)
    found = {}
    for device in ("cpu", "cuda"):
        task = experiment.load(device=device)
        x, y = task.data.test_x[:50], task.data.test_y[:50]
        task.data = dataclasses.replace(task.data, test_x=x, test_y=y)
        searched = dhp_runs.search(experiment, task, Settings(0.5, stops=False), seed=0)
        gap = dhp_runs.finish(searched, searched.network.kept(), experiment, task, seed=0)[1]
        found[device] = (searched.network.widths(), gap.full, gap.trained)
    assert found["cpu"][0] == found["cuda"][0]
    assert found["cpu"][1:] == pytest.approx(found["cuda"][1:], abs=0.1)


# -- tasks and tables ------------------------------------------------------------------------------


def test_batches_are_of_equal_size_and_go_through_all_images() -> None:
    _, task = perceptron()
    ticks: list[int] = []
    task.tick = lambda: ticks.append(1)
    batches = task.batches(np.random.default_rng(0))
    labels = [next(batches)[1] for _ in range(STEPS)]
    assert {len(y) for y in labels} == {64}
    counts = np.bincount(np.concatenate(labels))
    assert (counts <= np.bincount(task.data.train_y)).all()
    assert len(ticks) == STEPS == task.epoch
    assert len(next(batches)[1]) == 64


class Same(Module):
    """Gives back what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_psnr() -> None:
    """Of images that are wrong by a tenth, 20 dB; of noise alone what its deviation says."""
    clean = np.full((2, 4, 4, 1), 0.5)
    np.testing.assert_allclose(
        psnr(clean + np.array([0.1, -0.01]).reshape(2, 1, 1, 1), clean), [20, 40]
    )
    np.testing.assert_allclose(psnr(np.full_like(clean, 7.0), clean), 20 * np.log10(2))
    noisy = with_noise(np.full((50, 32, 32, 1), 0.5), np.random.default_rng(0))
    assert np.std(noisy) == pytest.approx(70 / 255, rel=0.01)
    task = Denoising(lab.load("digits"), patch=8)
    score = task.score(Same())
    assert score == task.score(Same())
    assert 20 * math.log10(255 / 70) < score < 15  # clipping helps


def test_patches_and_their_noise() -> None:
    rng = np.random.default_rng(0)
    images = np.arange(2 * 6 * 6 * 3, dtype=np.uint8).reshape(2, 6, 6, 3)
    patches = random_patches(images, 4, rng)
    assert patches.shape == (2, 4, 4, 3)
    for patch, image in zip(patches, images, strict=True):
        i, j = np.argwhere((image == patch[0, 0]).all(axis=-1))[0]
        np.testing.assert_array_equal(patch, image[i : i + 4, j : j + 4])
    grey = luminance(images)
    assert grey[1, 2, 3, 0] == pytest.approx(
        images[1, 2, 3] @ [0.299, 0.587, 0.114] / 255, rel=1e-5
    )
    np.testing.assert_allclose(luminance(images[..., :1]), images[..., :1] / 255, rtol=1e-6)
    digits, x = lab.load("digits"), np.tile(images, (32, 1, 1, 1))
    y = np.zeros(len(x), int)
    task = Denoising(
        lab.Dataset("two", x, y, x, y, digits.classes, digits.mean * 3, digits.std * 3)
    )
    task.patch = 4
    x, clean = next(task.batches(rng))
    assert x.shape == clean.shape == (64, 4, 4, 1)
    assert np.std(x.data - clean.data) == pytest.approx(70 / 255, rel=0.1)


def test_halved_images() -> None:
    data = lab.load("digits")
    small = halved(data)
    assert small.train_x.shape == (1437, 4, 4, 1)
    expected = data.train_x[7, 2:4, 6:8, 0].astype(float).mean()
    assert abs(small.train_x[7, 1, 3, 0] - expected) <= 0.5
    assert small.mean == pytest.approx(data.mean, abs=1e-3)


def test_widths_as_text() -> None:
    widths = {"input": 3, "layer1.0.conv1": 12}
    assert widths_of(text_of(widths)) == widths


def test_differences_are_paired_with_the_dense_network_too() -> None:
    def row(variant: str, seed: int, score: float, bias: str = "yes", target: Any = 0.5) -> dict:
        head = {"part": "controls", "network": "n", "hyper_bias": bias, "variant": variant}
        return head | {"target": target, "seed": seed, "score": score}

    rows = [row("dhp", s, 0.9 + s / 100) for s in (0, 1, 2)]
    rows += [row("uniform", s, 0.8 + s / 100) for s in (0, 1, 2)]
    rows += [row("dense", s, 0.95, "", "") for s in (0, 1)]
    rows += [row("dhp", 0, 0.1, "no"), row("uniform", 0, 0.3, "no")]
    found = {d.method: d for d in differences(rows, "n")}
    assert found["uniform"].mean == pytest.approx(0.1)
    assert found["whole"].mean == pytest.approx(-0.045)
    assert found["whole"].seeds == 2
    (free,) = differences(rows, "n", "no")[:1]
    assert free.mean == pytest.approx(-0.2)


@pytest.mark.slow
def test_every_experiment_can_be_searched() -> None:
    """Its network has latents, lambda comes out, and its targets can be reached, for data of the
    right size, all black."""
    for name, experiment in EXPERIMENTS.items():
        shape = {"mnist": (14, 14, 1), "cifar10": (32, 32, 3)}.get(experiment.dataset, (8, 8, 1))
        count = experiment.images or (50_000 if experiment.dataset == "cifar10" else 1437)
        nothing = np.broadcast_to(np.zeros((), np.uint8), (count, *shape))
        labels, channels = np.zeros(count, int), shape[-1]
        digits = lab.load("digits")
        statistics = digits.mean * channels, digits.std * channels
        data = lab.Dataset(
            *("black", nothing, labels, nothing, labels, digits.classes), *statistics
        )
        task = experiment.task(data, **dict(experiment.options))
        run, found = dhp_runs.begin(experiment, task, Settings(experiment.targets[0]), seed=0)
        assert 0 < run.l1 * run.lr * steps_of(experiment.search, task) < 5, name
        assert dhp_runs.prunable(found.network), name
        for target in experiment.targets:
            dhp_claims.require_possible(name, target, task)


@pytest.mark.parametrize(
    ("name", "side"), [("conv-mnist", (14, 14, 1)), ("conv-cifar10", (32, 32, 3))]
)
def test_what_is_left_of_a_wide_network_costs_no_more_than_the_plain_one(name, side) -> None:
    """And it costs nearly as much, so that the two can be compared."""
    wide, plain = EXPERIMENTS[f"{name}-wide"], EXPERIMENTS[name]
    costs = []
    for experiment in (plain, wide):
        net = experiment.build(np.random.default_rng(0))
        groups = channel_groups(net, side)
        costs.append(dhp.macs(dhp.layer_costs(net, side, groups), sizes(groups)))
    most = wide.targets[0] + dhp_runs.STOP_LIMIT
    assert 0.95 < most * costs[1] / costs[0] < 1
    assert (plain.budget, plain.images) == (wide.budget, wide.images)
