"""What changes between the forward and the backward pass is noticed, and what does not is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minihyperflows as mh
from minihyperflows import flows, models, nn, optim
from minihyperflows import functional as F
from minihyperflows.engine.changes import look
from minihyperflows.engine.errors import GraphError

CHANGED = r"was changed after the forward pass"


def leaf(*shape: int) -> mh.Tensor:
    return mh.Tensor(np.random.default_rng(0).standard_normal(shape), requires_grad=True)


def test_a_step_between_two_losses(rng: np.random.Generator) -> None:
    net = models.lenet300(in_features=20, num_classes=3, rng=rng)
    x, y = rng.standard_normal((8, 20)).astype(np.float32), np.arange(8) % 3
    first, second = F.cross_entropy(net(x), y), F.cross_entropy(net(2 * x), y)
    step = optim.SGD(net.parameters(), lr=0.1)
    first.backward()
    step.step()
    before = {name: p.grad.copy() for name, p in net.named_parameters().items()}
    with pytest.raises(GraphError, match=CHANGED):
        second.backward()
    for name, p in net.named_parameters().items():  # nothing was added before that was noticed
        np.testing.assert_array_equal(p.grad, before[name])


def test_a_step_that_changes_one_weight_of_many() -> None:
    """Which the sample of a large array would miss: the optimiser counts its changes."""
    w = nn.Parameter(np.ones((500, 500)))
    loss = (w * w).sum()
    w.grad = np.zeros(w.shape)
    w.grad[3, 4] = 1
    seen = look(w.data)
    optim.SGD([w], lr=0.1).step()
    assert look(w.data) == seen
    with pytest.raises(GraphError, match=CHANGED):
        loss.backward()


REFILLS: dict[str, tuple[Callable[..., mh.Tensor], Any]] = {
    "images": (lambda x, w: F.linear(mh.Tensor(x), w), np.zeros((5, 3))),
    "flattened images": (lambda x, w: F.linear(F.flatten(mh.Tensor(x)), w), np.zeros((5, 1, 3))),
    "a constant": (lambda x, w: x * w.sum(), np.zeros((5, 3))),
    "a transposed constant": (lambda x, w: F.linear(mh.Tensor(x.T), w), np.zeros((3, 5))),
    "labels": (lambda y, w: F.cross_entropy(w, y), np.zeros(4, int)),
    "an index": (lambda i, w: w[i], np.zeros(2, int)),
    "an index of several": (lambda i, w: w[i, 0], np.zeros(2, int)),
    "large images": (lambda x, w: F.linear(mh.Tensor(x), w), np.zeros((3000, 3))),
    "images to convolve": (
        lambda x, w: F.conv2d(mh.Tensor(x), w.reshape(4, 1, 1, 3)),
        np.zeros((2, 5, 5, 3)),
    ),
    "images to normalise": (
        lambda x, w: F.batch_norm(mh.Tensor(x), w[0], w[1], training=True),
        np.arange(12.0).reshape(4, 3),
    ),
}


@pytest.mark.parametrize("name", REFILLS)
def test_an_array_that_is_filled_again(name: str) -> None:
    function, array = REFILLS[name]
    array, w = array.copy(), leaf(4, 3)
    y = function(array, w)
    y.backward(np.ones(y.shape))  # unchanged, it works
    w.grad = None
    y = function(array, w)
    array += 1
    with pytest.raises(GraphError, match=CHANGED):
        y.backward(np.ones(y.shape))
    assert w.grad is None


@pytest.mark.parametrize("batch", [1, 10, 32, 50, 60, 64, 100, 128, 200, 250, 256, 500])
@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3)])
def test_a_batch_of_images_with_a_border(batch: int, shape: tuple[int, ...]) -> None:
    """The border stays zero, so it must not be the whole look; a fifth of the rest is ink."""
    rng, images = np.random.default_rng(0), np.zeros((batch, *shape), np.float32)
    inner = images[:, 4:-4, 4:-4]
    for _ in range(20):
        inner[...] = rng.random(inner.shape) < 0.2
        before = look(images)
        inner[...] = rng.random(inner.shape) < 0.2
        assert look(images) != before


def test_a_weight_that_is_changed_by_hand() -> None:
    for change in (
        lambda w: w.data.__isub__(0.1),
        lambda w: w.data.fill(3),
        lambda w: np.add(w.data, 1, out=w.data),
        lambda w: w.data[...].sort(axis=0),
    ):
        w = leaf(40, 30)
        loss = (w * w).sum()
        change(w)
        with pytest.raises(GraphError, match=CHANGED):
            loss.backward()


def test_the_presence_behind_a_gate(rng: np.random.Generator) -> None:
    """The mask is made in the forward pass, so a step of t alone changes no gradient of it."""
    net = models.lenet300(in_features=20, num_classes=3, rng=rng)
    flows.attach(net, rng=rng)
    x = rng.standard_normal((8, 20)).astype(np.float32)
    y = net(x).sum()
    presence = optim.SGD(flows.presences(net).values(), lr=0.1)
    flows.pressure(net).backward()
    presence.step()
    y.backward()
    assert all(p.grad is not None for p in net.parameters())


# -- what is right is not refused ------------------------------------------------------------------


def test_what_backward_does_not_need_may_change() -> None:
    a, b = leaf(3), leaf(3)
    y = (a + b - 2.0).mean()
    a.data += 1
    y.backward()
    np.testing.assert_allclose(a.grad, np.full(3, 1 / 3))


def test_a_new_array_leaves_the_old_one_in_the_graph() -> None:
    w = leaf(3)
    values = w.data.copy()
    loss = (w * w).sum()
    w.data = np.zeros(3)
    loss.backward()
    np.testing.assert_array_equal(w.grad, 2 * values)


def test_what_is_not_recorded_is_not_watched() -> None:
    w = leaf(3)
    with mh.no_grad():
        y = w * w
    w.data += 1
    assert not y.requires_grad
    x = np.ones(3)
    loss = (w * x).sum()
    del loss  # never differentiated, so nothing is wrong
    x += 1


def test_the_look_of_any_array() -> None:
    """It is that of the numbers, whatever the layout, and differs when all of them do."""
    rng = np.random.default_rng(0)
    for shape in [(), (1,), (127,), (128,), (129,), (1000,), (31, 41), (2, 3, 4, 5), (0, 3)]:
        for dtype in ("float32", "int64", "bool", "complex128"):
            array = np.array(rng.standard_normal(shape) > 0, dtype)
            before = look(array)
            assert before == look(array.copy())
            assert before == look(np.asfortranarray(array))
            array[...] = 1 - array if dtype != "bool" else ~array
            assert (look(array) != before) == (array.size > 0)
