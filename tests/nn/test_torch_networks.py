"""Whole networks against PyTorch: same weights, same batch, same loss, the same gradients."""

import copy
import inspect

import numpy as np
import pytest
from support.lanes import large

from minihyperflows import functional as F
from minihyperflows import models

torch = pytest.importorskip("torch")
tF = torch.nn.functional  # noqa: N816 - as everybody writes it
peers = pytest.importorskip("minihyperflows.bench.torch_peers")


def twins(name, rng, dtype):
    """The package's network, PyTorch's, and the shape of an image."""
    if name == "lenet300":
        return models.lenet300(rng=rng, dtype=dtype), peers.lenet300(), (28, 28, 1)
    if name == "resnet20":
        return models.resnet(20, rng=rng, dtype=dtype), peers.resnet20(), (32, 32, 3)
    net = getattr(models, name)(width=0.25, rng=rng, dtype=dtype)
    return net, getattr(peers, name)(width=0.25), (32, 32, 3)


def to_torch(array):
    """(N, H, W, C) -> a torch tensor (N, C, H, W); a matrix stays one."""
    tensor = torch.from_numpy(array)
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def relative_error(found, expected):
    """The largest difference, relative to the largest entry."""
    return np.abs(found - expected).max() / np.abs(expected).max()


NETWORKS = ["lenet300", "vgg19", *large("resnet20", "resnet50")]


def load(twin, net):
    """The weights of this package's network in PyTorch's; strict: the same names and shapes."""
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in net.state_dict().items()})


def our_step(net, x, y):
    """Loss of one training step, with label smoothing, and its gradients, in PyTorch's layout."""
    loss = F.cross_entropy(net(x), y, label_smoothing=0.1)
    loss.backward()
    return loss.item(), {
        k: p.grad if p.torch_axes is None else p.grad.transpose(0, 3, 1, 2)
        for k, p in net.named_parameters().items()
    }


def their_step(twin, x, y):
    """The same of PyTorch's network, in its precision."""
    images = to_torch(x).to(next(twin.parameters()).dtype)
    loss = tF.cross_entropy(twin(images), torch.from_numpy(y), label_smoothing=0.1)
    loss.backward()
    return loss.item(), {k: p.grad.numpy() for k, p in twin.named_parameters()}


def worst_error(found, expected):
    return max(relative_error(found[k], expected[k]) for k in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_in_float64_are_those_of_pytorch(name):
    """To 1e-9 of the largest entry of each gradient; running statistics too."""
    rng = np.random.default_rng(7)
    net, twin, shape = twins(name, rng, np.float64)
    x, y = rng.standard_normal((16, *shape)), rng.integers(0, 10, 16)
    load(twin.to(torch.float64), net)
    loss, ours = our_step(net, x, y)
    twin_loss, theirs = their_step(twin, x, y)
    assert loss == pytest.approx(twin_loss, rel=1e-12)
    assert set(ours) == set(theirs)
    assert worst_error(ours, theirs) < 1e-9
    state = net.state_dict()
    for key, value in twin.state_dict().items():
        np.testing.assert_allclose(state[key], value.numpy(), rtol=1e-9, atol=1e-12, err_msg=key)


class Switches:
    """Notes which entries each ReLU and each max pooling lets through, in the order of the calls.

    Round-off can move an activation near 0 across the ReLU's kink, and one such switch changes the
    gradients below it by far more than round-off: in ResNet-50 by 10 %, on every batch, in PyTorch
    as here. So float32 gradients are compared with the exact ones *of the piece of the network they
    were taken on*: :meth:`replay` runs PyTorch's network with the switches that were noted.
    """

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def note_ours(self, run):
        """The switches of this package's network while ``run()`` runs, and what it returns."""
        noted, relu, batch_norm, max_pool2d = [], F.relu, F.batch_norm, F.max_pool2d

        def let_through(y):
            noted.append(to_torch(y.data) > 0)
            return y

        def batch_norm_noting(*args):
            relu_too = args[BATCH_NORM_ARGUMENTS.index("relu")]
            return let_through(batch_norm(*args)) if relu_too else batch_norm(*args)

        def max_pool_noting(x, size, stride):
            noted.append(windows(to_torch(x.data)).argmax(-1, keepdim=True))
            return max_pool2d(x, size, stride)

        with self.monkeypatch.context() as patch:
            patch.setattr(F, "relu", lambda x: let_through(relu(x)))
            patch.setattr(F, "batch_norm", batch_norm_noting)
            patch.setattr(F, "max_pool2d", max_pool_noting)
            return noted, run()

    def note_theirs(self, run):
        """The same for PyTorch's."""
        noted = []

        def note(switch):
            noted.append(switch)
            return switch

        def relu(x):
            return x * note(x.detach() > 0)

        def max_pool2d(x):
            return chosen(x, note(windows(x.detach()).argmax(-1, keepdim=True)))

        return noted, self.with_switches(relu, max_pool2d, run)

    def replay(self, noted, run):
        """``run()`` with PyTorch's network letting through what was noted, whatever the values."""
        left = iter(noted)
        gradients = self.with_switches(
            lambda x: x * next(left), lambda x: chosen(x, next(left)), run
        )
        assert next(left, None) is None  # every switch had its place
        return gradients

    def with_switches(self, relu, max_pool2d, run):
        with self.monkeypatch.context() as patch:
            patch.setattr(torch, "relu", relu)
            patch.setattr(torch.nn.ReLU, "forward", lambda module, x: relu(x))
            patch.setattr(torch.nn.MaxPool2d, "forward", lambda module, x: max_pool2d(x))
            return run()


BATCH_NORM_ARGUMENTS = list(inspect.signature(F.batch_norm).parameters)


def windows(x):
    """The 2 x 2 windows of a map: (N, C, H, W) -> (N, C, H/2, W/2, 4)."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)


def chosen(x, place):
    """The entry at ``place`` of each window."""
    return windows(x).gather(-1, place).squeeze(-1)


# about five times what this package was seen to lose; the loss grows with the depth
ROUND_OFF = {"lenet300": 2e-6, "vgg19": 1e-4, "resnet20": 5e-5, "resnet50": 5e-4}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_in_float32_are_exact_up_to_round_off(name, seed, monkeypatch):
    """This package's, and PyTorch's by a wider bound: it adds up in an order that depends on the
    machine and the number of threads. See :class:`Switches` for what is exact."""
    rng = np.random.default_rng(seed)
    net, twin, shape = twins(name, rng, np.float32)
    x, y = rng.standard_normal((16, *shape)).astype(np.float32), rng.integers(0, 10, 16)
    load(twin, net)
    switches = Switches(monkeypatch)

    def exact():
        return their_step(copy.deepcopy(twin).to(torch.float64), x, y)[1]

    noted, (_, ours) = switches.note_ours(lambda: our_step(net, x, y))
    assert worst_error(ours, switches.replay(noted, exact)) < ROUND_OFF[name]
    noted, (_, theirs) = switches.note_theirs(lambda: their_step(copy.deepcopy(twin), x, y))
    assert worst_error(theirs, switches.replay(noted, exact)) < 4 * ROUND_OFF[name]


def test_a_state_dict_of_pytorch_loads_as_it_is():
    """The other way: PyTorch's weights in our network give PyTorch's outputs."""
    net, twin, shape = twins("resnet20", np.random.default_rng(0), np.float32)
    net.load_state_dict(twin.state_dict())
    x = np.random.default_rng(1).standard_normal((16, *shape)).astype(np.float32)
    net.eval()
    twin.eval()
    with torch.no_grad():
        expected = twin(to_torch(x)).numpy()
    np.testing.assert_allclose(net(x).numpy(), expected, rtol=1e-3, atol=1e-4)
