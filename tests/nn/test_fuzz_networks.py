"""Random networks: what the package finds out about them is what their builder knows.

Cutting is masking, costs are counts, a search's extraction is the masked network, pruners keep what
a dozen lines say, in every network that ``random_networks`` can draw. A few of each kind in CI, in
seconds; two thousand of each by hand::

    HYPOTHESIS_PROFILE=large pytest tests/nn/test_fuzz_networks.py
    FUZZ_CASES=20000 FUZZ_START=5000 pytest tests/nn/test_fuzz_networks.py -k cutting
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from support.random_networks import KINDS, Case, Facts, build, named, seeds

from minihyperflows import functional as F
from minihyperflows import nn, optim
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.counting import flops
from minihyperflows.related import dhp, pruners
from minihyperflows.related.channels import ChannelGroup, channel_groups
from minihyperflows.related.cutting import cut
from minihyperflows.related.derivatives import hessian_gradient_product
from minihyperflows.related.filters import fewest

Masks = dict[str, np.ndarray]
Groups = Mapping[str, ChannelGroup]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to round-off, in the precision of ``expected``."""
    assert np.isfinite(expected).all()
    tolerance = 1e-9 if expected.dtype == np.float64 else 2e-4
    limit = tolerance * max(abs(expected).max(initial=0), 1e-6)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=limit)


# -- groups, cutting, costs ------------------------------------------------------------------------


def test_groups_are_those_that_the_network_was_built_with() -> None:
    for seed in seeds(60):
        with named(seed):
            case = build(seed)
            found = channel_groups(case.net, case.image)
            described = {
                (
                    *(group.outputs, group.depthwise, group.norms),
                    *(frozenset(group.inputs.items()), group.removable),
                    *(group.stretched, group.tied),
                )
                for group in found.values()
            }
            assert described == case.facts.groups()
            assert len(found) == len(described)
            for name, group in found.items():
                assert name == group.name
                assert not group.outputs or name == group.outputs[0]


def random_keep(groups: Groups, rng: np.random.Generator, least: bool) -> Masks:
    """About half of the channels of every removable group, at least one, or ``fewest``."""
    keep = {}
    for name, group in groups.items():
        if group.removable:
            floor = min(fewest(group) if least else 1, group.size)
            count = int(rng.integers(floor, group.size + 1))
            keep[name] = rng.permutation(group.size) < count
    return keep


def unread(net: nn.Module, groups: Groups, keep: Masks) -> nn.Module:
    """A copy in which nobody reads what is not kept: the columns of the weights are zero."""
    deaf = copy.deepcopy(net)
    modules: dict[str, Any] = dict(deaf.named_modules())
    for name, mask in keep.items():
        for layer, repeats in groups[name].inputs.items():
            modules[layer].weight.data = modules[layer].weight.data * np.tile(mask, repeats)
    return deaf


def test_cutting_channels_is_masking_them() -> None:
    for seed in seeds(60):
        with named(seed):
            case, rng = build(seed), np.random.default_rng(seed)
            groups = channel_groups(case.net, case.image)
            keep = random_keep(groups, rng, least=False)
            narrow = copy.deepcopy(case.net)
            cut(narrow, groups, keep)
            deaf, x = unread(case.net, groups, keep), case.batch(3)
            for training in (False, True):
                found, expected = (net.train(training)(x).data for net in (narrow, deaf))
                assert found.dtype == expected.dtype
                assert_close(found, expected)


@pytest.mark.slow
def test_a_cut_network_has_the_same_groups() -> None:
    """As long as each keeps as many channels as it must."""
    for seed in seeds(40):
        with named(seed):
            case, rng = build(seed), np.random.default_rng(seed)
            groups = channel_groups(case.net, case.image)
            keep = random_keep(groups, rng, least=True)
            cut(case.net, groups, keep)
            after = channel_groups(case.net, case.image)
            assert list(after) == list(groups)
            for name, group in after.items():
                size = int(keep[name].sum()) if name in keep else groups[name].size
                assert (group.size, group.removable) == (size, groups[name].removable)


def counted(facts: Facts, widths: dict[int, int], depthwise: set[str]) -> dict[str, int]:
    """The multiplications of each layer, from its uses: pixels, kernel, outputs, inputs."""
    counts: dict[str, int] = {}
    for layer, pixels, kernel in facts.uses:
        space, repeats = facts.read.get(layer, (-1, 1))
        read = 1 if layer in depthwise else widths[facts.root(space)] * repeats
        first = facts.tied.get(layer, layer)
        made = widths[facts.root(facts.made[layer])]
        counts[first] = counts.get(first, 0) + pixels * kernel * read * made
    return counts


def spaces(facts: Facts, groups: Groups, widths: Mapping[str, int]) -> dict[int, int]:
    """The widths by the builder's numbers of the spaces."""
    found = {}
    for name, group in groups.items():
        made = [facts.made[layer] for layer in group.outputs]
        read = [facts.read[layer][0] for layer in group.inputs]
        found[facts.root([*made, *read][0])] = widths[name]
    return found


@pytest.mark.slow
def test_costs_are_counts() -> None:
    """Of the network, of a cut one as predicted and as it is then, and of weights."""
    for seed in seeds(40):
        with named(seed):
            case, rng = build(seed), np.random.default_rng(seed)
            facts, net = case.facts, case.net
            groups = channel_groups(net, case.image)
            costs = dhp.layer_costs(net, case.image, groups)
            weights = dhp.layer_weights(net, groups)
            keep = random_keep(groups, rng, least=False)
            widths = {n: int(keep[n].sum()) if n in keep else g.size for n, g in groups.items()}
            predicted = {cost.layer: cost.macs(widths) for cost in costs}
            expected = counted(facts, spaces(facts, groups, widths), facts.depthwise)
            assert predicted == expected
            cut(net, groups, keep)
            layers = {p: m for m in nn.weighted_layers(net).values() for p in [m.weight]}
            assert dhp.macs(weights, widths) == sum(p.size for p in layers)
            found = flops(net, case.image)
            for name, layer in nn.weighted_layers(net).items():
                if name in found:  # K multiplications and K - 1 additions for each output
                    k = layer.weight[0].size
                    assert found[name] == expected[name] // k * (2 * k - 1)
            assert set(found) == set(expected)


# -- hypernetworks ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_extraction_is_the_generated_network_with_channels_masked() -> None:
    for seed in seeds(30):
        with named(seed):
            case, rng = build(seed), np.random.default_rng(seed)
            dense = flops(case.net, case.image)
            options = {"minimum": int(rng.integers(1, 4)), "hyper_bias": bool(rng.random() < 0.5)}
            network = dhp.HyperNetwork(
                case.net, case.image, classifier_keeps=float(rng.random()), rng=rng, **options
            )
            assert flops(network, case.image) == {f"net.{n}": k for n, k in dense.items()}
            for latent in network.latents.values():
                latent.data = latent.data * (rng.random(latent.size) < 0.5)
            keep = {n: mask for n, mask in network.kept().items() if network.groups[n].removable}
            for name, mask in keep.items():
                z, floor = abs(network.latents[name].data), network.floors[name]
                ranked = np.argsort(-z, kind="stable")
                expected = [z[i] >= 5e-3 or i in ranked[:floor] for i in range(z.size)]
                assert mask.tolist() == expected
            whole, found, x = dhp.generated(network), dhp.extract(network), case.batch(3)
            for training in (False, True):
                for net in (network, whole, found):
                    net.train(training)
                assert_close(network(x).data, whole(x).data)
                assert_close(found(x).data, unread(whole, network.groups, keep)(x).data)
            widths = {n: int(keep[n].sum()) if n in keep else k for n, k in network.sizes().items()}
            counts = [
                sum(counted(case.facts, spaces(case.facts, network.groups, w), depthwise).values())
                for depthwise in [case.facts.depthwise]
                for w in (widths, network.sizes())
            ]
            assert network.flops_ratio() == counts[0] / counts[1]


def test_reestimated_statistics_are_the_means_over_batches_and_uses() -> None:
    for seed in seeds(20):
        with named(seed):
            case = build(seed)
            batches = [case.batch(4, k) for k in range(3)]
            seen: dict[str, list[Any]] = {name: [] for name in case.facts.norms}
            net = copy.deepcopy(case.net).train()
            for x in batches:
                record_statistics(net, Tensor(x), seen)
            dhp.reestimate_norms(case.net, [Tensor(x) for x in batches])
            for name, statistics in seen.items():
                norm = getattr(case.net, name)
                mean, variance = np.mean(statistics, axis=0)
                assert_close(norm.running_mean.data, mean.astype(case.dtype))
                assert_close(norm.running_var.data, variance.astype(case.dtype))
                assert norm.num_batches_tracked.item() == len(statistics)
                assert norm.momentum == 0.1


def record_statistics(net: Any, x: Tensor, seen: dict[str, list[Any]]) -> None:
    """Mean and variance of what each norm receives, at every use."""
    values = [x]
    for step in net.steps:
        inputs = [values[i] for i in step.inputs]
        if step.layer in seen:
            rows = inputs[0].data.reshape(-1, inputs[0].shape[-1]).astype(np.float64)
            seen[step.layer].append((rows.mean(axis=0), rows.var(axis=0, ddof=1)))
        layer = getattr(net, step.layer) if step.layer else None
        values.append(KINDS[step.kind](layer, *inputs, step.option))


# -- derivatives -----------------------------------------------------------------------------------


def in_precision(net: nn.Module, dtype: Any) -> nn.Module:
    """A copy in another precision."""
    twin = copy.deepcopy(net)
    for tensor in twin.named_tensors().values():
        if tensor.dtype.kind == "f":
            tensor.data = tensor.data.astype(dtype)
    return twin


@pytest.mark.slow
def test_second_derivatives_of_single_precision_networks_are_those_of_their_doubles() -> None:
    for seed in seeds(15):
        with named(seed):
            case = build(seed)
            single = in_precision(case.net, np.float32)
            double = in_precision(single, np.float64)
            x, labels = case.batch(4), np.arange(4) % case.classes
            mode = ("eval", "train")[seed % 2]
            found, expected = (
                hessian_gradient_product(net, x, labels, mode=mode) for net in (single, double)
            )
            largest = max(abs(array).max() for array in expected.values())
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, rtol=1e-9, atol=1e-12 * largest)


# -- pruners ---------------------------------------------------------------------------------------


class Expected:
    """The masks that a pruner must have, by the formulas, weights and gradients in one vector."""

    def __init__(self, pruner: Any, sizes: list[int], steps: int, seed: int) -> None:
        self.pruner, self.sizes, self.steps = pruner, sizes, steps
        self.rng, self.total = np.random.default_rng(seed), sum(sizes)
        self.present, self.score = np.ones(self.total, bool), np.zeros(self.total)
        self.kept = math.floor((1 - Fraction(str(pruner.sparsity))) * self.total)
        if isinstance(pruner, pruners.Random):
            self.keep(self.rng.random(self.total), self.kept)

    def keep(self, scores: np.ndarray, count: int) -> None:
        self.present = np.zeros(self.total, bool)
        self.present[np.argsort(-scores, kind="stable")[:count]] = True

    def step(self, step: int, before: np.ndarray, after: np.ndarray, gradient: np.ndarray) -> None:
        """Weights before and after the optimiser's step, and the gradients in between."""
        p, magnitude = self.pruner, np.where(self.present, abs(after), -1)
        if isinstance(p, pruners.Iterative):
            for r in range(1, p.rounds + 1):
                at = round(r / p.rounds * p.end * self.steps)
                if step == (max(at, 1) if r == p.rounds else at):
                    count = int(self.total * (1 - p.sparsity) ** (r / p.rounds) + 1e-7)
                    self.keep(magnitude, self.kept if r == p.rounds else count)
        elif isinstance(p, pruners.Scheduled):
            first, last = round(p.begin * self.steps), max(1, round(p.end * self.steps))
            if step <= last:
                self.score -= before * gradient
            scores = self.score if isinstance(p, pruners.Movement) else magnitude
            if step == last:
                self.keep(scores, self.kept)
            elif first < step < last and step % p.every == 0:
                left = (1 - Fraction(step - first, last - first)) ** 3
                sparsity = Fraction(str(p.sparsity)) * (1 - left)
                self.keep(scores, math.floor((1 - sparsity) * self.total))
        elif isinstance(p, pruners.RigL):
            self.rewire(step, magnitude, gradient)

    def rewire(self, step: int, magnitude: np.ndarray, gradient: np.ndarray) -> None:
        last, p = self.pruner.until * self.steps, self.pruner
        if step % p.every or step >= last:
            return
        share = p.fraction / 2 * (1 + math.cos(math.pi * step / last))
        ends = np.cumsum(self.sizes)
        for part in (slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)):
            present = int(self.present[part].sum())
            count = int(share * present + 1e-9)
            stay = np.argsort(-magnitude[part], kind="stable")[: present - count]
            worth = abs(gradient[part])
            worth[stay] = -1
            self.present[part] = False
            self.present[part][stay] = True
            self.present[part][np.argsort(-worth, kind="stable")[:count]] = True


def random_pruner(rng: np.random.Generator) -> pruners.Pruner:
    sparsity = float(rng.choice([0.0, 0.1, 0.5, 0.7, 0.9]))
    end = float(rng.choice([0.01, 0.3, 0.8, 1.0]))
    every = int(rng.integers(1, 4))
    choices = [
        lambda: pruners.Random(sparsity),
        lambda: pruners.Iterative(sparsity, int(rng.integers(1, 5)), end),
        lambda: pruners.Gradual(sparsity, end * float(rng.choice([0, 0.3])), end, every),
        lambda: pruners.Movement(sparsity, end * float(rng.choice([0, 0.3])), end, every),
        lambda: pruners.RigL(sparsity, every, float(rng.choice([0.3, 0.5, 1.0])), end),
    ]
    return choices[int(rng.integers(len(choices)))]()


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays])


def true_gradients(case: Case, weights: list[Any], x: np.ndarray, labels: Any) -> np.ndarray:
    """dL/dw' of every weight, removed ones too: that of a plain network with the zeros written."""
    plain = copy.deepcopy(case.net).train()
    for layer in nn.weighted_layers(plain).values():
        if layer.weight_gate is not None:
            present, layer.weight_gate = layer.weight_gate.present, None
            layer.weight.data = layer.weight.data * present
    plain.zero_grad()
    F.cross_entropy(plain(Tensor(x)), labels).backward()
    named_weights = plain.named_parameters()
    found = [named_weights[f"{name}.weight"] for name in weights]
    return flat([np.zeros(p.shape) if p.grad is None else p.grad for p in found])


@pytest.mark.slow
def test_pruners_keep_what_the_formulas_say_step_by_step() -> None:
    for seed in seeds(40):
        with named(seed):
            case, rng = build(seed), np.random.default_rng(seed)
            case = case._replace(net=in_precision(case.net, np.float64))
            pruner, steps = random_pruner(rng), int(rng.integers(1, 9))
            optimizer = optim.SGD(case.net.parameters(), 0.01, 0.9)
            pruner.start(case.net, optimizer, steps, np.random.default_rng(seed))
            names = list(pruner.masks)
            distinct = {m.weight for m in nn.weighted_layers(case.net).values()}
            assert {mask.weight for mask in pruner.masks.values()} == distinct
            assert len(names) == len(distinct)
            masks = list(pruner.masks.values())
            expected = Expected(pruner, [m.weight.size for m in masks], steps, seed)
            if isinstance(pruner, pruners.RigL):  # begins at random, with counts tested elsewhere
                expected.present = flat([m.present for m in masks]).copy()
            for step in range(1, steps + 1):
                x, labels = case.batch(4, step), rng.integers(case.classes, size=4)
                before = flat([m.weight.data for m in masks])
                gradient = true_gradients(case, names, x, labels)
                case.net.zero_grad()
                F.cross_entropy(case.net(Tensor(x)), labels).backward()
                assert_close(flat([m.gradient for m in masks]), gradient)
                optimizer.step()
                after = flat([m.weight.data for m in masks])
                pruner.after_step(step)
                expected.step(step, before, after, gradient)
                found = flat([m.present for m in masks])
                np.testing.assert_array_equal(found, expected.present)
            assert found.sum() == expected.kept
            x = case.batch(3)
            answers = case.net.eval()(x).data
            pruner.finish()
            assert_close(case.net(x).data, answers)
            assert sum(np.count_nonzero(w.data) for w in distinct) <= expected.kept
