"""Importance scores and the products of the Hessian with the gradient that two of them need."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from support import GOLDEN

from minihyperflows import flows, models, nn
from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.models.vgg import VGG13
from minihyperflows.related.derivatives import (
    Landscape,
    gradient,
    hessian,
    hessian_gradient_product,
)
from minihyperflows.related.pruners import attach_masks
from minihyperflows.related.scores import SCORES, importance, layers_by_weight

SECOND_ORDER = [name for name, score in SCORES.items() if score.order == 2]


class Block(nn.Module):
    """A residual block, a pooling and a linear layer: a small network with everything in it."""

    def __init__(self, rng: np.random.Generator, dtype: Any = np.float64) -> None:
        options = {"rng": rng, "dtype": dtype}
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False, **options)
        self.bn1 = nn.BatchNorm2d(4, dtype=dtype)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False, **options)
        self.bn2 = nn.BatchNorm2d(4, dtype=dtype)
        self.fc = nn.Linear(16, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1.then_relu(self.conv1(x))
        y = self.bn2.then_relu(self.conv2(y), y)
        return self.fc(F.flatten(F.max_pool2d(y, 2)))


def batch(rng: np.random.Generator, n: int = 6) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal((n, 4, 4, 2)), rng.integers(0, 3, n)


class TanhNet(nn.Module):
    def __init__(self, rng: np.random.Generator) -> None:
        self.fc1 = nn.Linear(3, 4, rng=rng, dtype=np.float64)
        self.fc2 = nn.Linear(4, 3, rng=rng, dtype=np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.tanh(self.fc1(x)))


def worst_error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference in any array, relative to its largest entry."""
    assert list(found) == list(expected)
    return max(abs(found[k] - expected[k]).max() / abs(expected[k]).max() for k in expected)


def filter_sums(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1).sum(axis=1)


# -- the Hessian ---------------------------------------------------------------------------------


def test_hessian_gradient_product_is_that_of_pytorch_as_recorded() -> None:
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        golden = {k.removeprefix("hg."): v for k, v in arrays.items() if k.startswith("hg.")}
    net = Block(np.random.default_rng(0))
    for name, parameter in net.named_parameters().items():
        parameter.data = golden[f"parameter.{name}"]
    expected = {name: golden[f"product.{name}"] for name in net.named_parameters()}
    data = golden["x"], golden["labels"]
    product = hessian_gradient_product(net, *data, temperature=float(golden["temperature"]))
    assert worst_error(product, expected) < 1e-12


def twins(name: str, rng: np.random.Generator) -> tuple[nn.Module, Any, tuple[int, ...]]:
    peers = pytest.importorskip("minihyperflows.bench.torch_peers")
    if name == "lenet300":
        net = models.lenet300(in_features=48, rng=rng, dtype=np.float64)
        return net, peers.lenet300(in_features=48), (4, 4, 3)
    if name == "resnet20":
        net = models.resnet(20, width=0.25, rng=rng, dtype=np.float64)
        return net, peers.resnet20(width=0.25), (32, 32, 3)
    vgg = models.vgg13(width=0.125, rng=rng, dtype=np.float64)
    return vgg, peers.VGG(VGG13, 10, 0.125), (32, 32, 3)


def double_backward(net: nn.Module, twin: Any, x: np.ndarray, labels: np.ndarray, mode: str) -> Any:
    """H g of PyTorch's twin with the same weights, in our layout."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    twin.double().train(mode == "train")
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in net.state_dict().items()})
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    images = images.permute(0, 2, 3, 1) if x.shape[1] == 4 else images
    parameters = dict(twin.named_parameters())
    logits = twin(images) / 2.0
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    inner = sum((g * g.detach()).sum() for g in gradients)
    products = torch.autograd.grad(inner, list(parameters.values()))
    torch.set_num_threads(threads)
    arrays = {k: p.numpy() for k, p in zip(parameters, products, strict=True)}
    return {k: a.transpose(0, 2, 3, 1) if a.ndim == 4 else a for k, a in arrays.items()}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["lenet300", "vgg13", "resnet20"])
def test_hessian_gradient_product_is_pytorchs_double_backward(name: str, mode: str) -> None:
    """To 1e-9 of the largest entry of each array (measured: 2e-13)."""
    rng = np.random.default_rng(7)
    net, twin, shape = twins(name, rng)
    x, labels = rng.standard_normal((4, *shape)), rng.integers(0, 10, 4)
    ours = hessian_gradient_product(net, x, labels, temperature=2.0, mode=mode)
    theirs = double_backward(net, twin, x, labels, mode)
    assert worst_error(ours, {name: theirs[name] for name in ours}) < 1e-9


def test_hessian_of_a_small_network(rng: np.random.Generator) -> None:
    """Symmetric, and what central differences of the gradient give, column by column."""
    landscape = Landscape(TanhNet(rng), rng.standard_normal((5, 3)), rng.integers(0, 3, 5))
    theta, h = landscape.weights, hessian(landscape)
    assert h.shape == (31, 31)
    np.testing.assert_allclose(h, h.T, atol=1e-16)
    differences = [
        (landscape.gradient(theta + 1e-5 * e) - landscape.gradient(theta - 1e-5 * e)) / 2e-5
        for e in np.eye(31)
    ]
    np.testing.assert_allclose(h, np.stack(differences, axis=1), atol=1e-10)
    v = rng.standard_normal(31)
    np.testing.assert_allclose(landscape.hessian_product(v), h @ v, atol=1e-15)
    np.testing.assert_array_equal(landscape.hessian_product(np.zeros(31)), np.zeros(31))
    for tiny in (1e-200, 1e200):
        np.testing.assert_allclose(landscape.hessian_product(tiny * v) / tiny, h @ v, atol=1e-15)


@pytest.mark.parametrize("name", ["mobilenet_v1", "resnet50"])
def test_hessian_product_of_other_networks(name: str, rng: np.random.Generator) -> None:
    """Symmetric, <u, H v> = <v, H u>, through depthwise layers and bottlenecks too."""
    net = getattr(models, name)(width=0.0625, rng=rng, dtype=np.float64)
    x, labels = rng.standard_normal((2, 32, 32, 3)), rng.integers(0, 10, 2)
    landscape = Landscape(net, x, labels, mode="eval")
    u, v = rng.standard_normal((2, len(landscape.weights)))
    products = u * landscape.hessian_product(v), v * landscape.hessian_product(u)
    assert products[0].sum() == pytest.approx(products[1].sum(), rel=1e-10)
    assert abs(products[0].sum()) > 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_networks_in_single_precision_have_exact_products(
    mode: str, rng: np.random.Generator
) -> None:
    """Those of the same network in double precision, to round-off: its statistics count too."""
    net, data = Block(rng, np.float32), batch(rng)
    twin = copy.deepcopy(net)
    for tensor in twin.named_tensors().values():
        if tensor.dtype == np.float32:
            if isinstance(tensor, nn.Buffer):
                values = rng.uniform(0.5, 2, tensor.shape).astype(np.float32)
                tensor.data = values.astype(np.float64)
            else:
                tensor.data = tensor.data.astype(np.float64)
    net.load_state_dict(twin.state_dict())
    before = {k: (t.data, t.data.copy()) for k, t in net.named_tensors().items()}
    single, double = (hessian_gradient_product(n, *data, mode=mode) for n in (net, twin))
    assert worst_error(single, double) < 1e-13
    for name, tensor in net.named_tensors().items():
        assert tensor.data is before[name][0]
        np.testing.assert_array_equal(tensor.data, before[name][1])


def test_float32_is_the_faster_and_coarser_way(rng: np.random.Generator) -> None:
    net, data = Block(rng, np.float32), batch(rng)
    exact = hessian_gradient_product(net, *data)
    coarse = hessian_gradient_product(net, *data, dtype=np.float32)
    assert {a.dtype for a in exact.values()} == {np.dtype(np.float64)}
    assert {a.dtype for a in coarse.values()} == {np.dtype(np.float32)}
    assert 1e-9 < worst_error(coarse, exact) < 1e-4


def test_weight_decay_adds_to_loss_gradient_and_hessian(rng: np.random.Generator) -> None:
    net, data = Block(rng), batch(rng)
    plain, decayed = Landscape(net, *data), Landscape(net, *data, weight_decay=0.1)
    theta, v = plain.weights, rng.standard_normal(len(plain.weights))
    assert decayed.loss() == pytest.approx(plain.loss() + 0.05 * theta @ theta, rel=1e-14)
    np.testing.assert_allclose(decayed.gradient(), plain.gradient() + 0.1 * theta, rtol=1e-13)
    expected = plain.hessian_product(v) + 0.1 * v
    np.testing.assert_allclose(decayed.hessian_product(v), expected, atol=1e-13)


@pytest.mark.parametrize("score", ["magnitude", "loss_preservation", "grasp"])
def test_a_network_on_a_gpu_has_the_same_scores(score: str, gpu: str) -> None:
    """In double precision, which the array library computes and no kernel of ours."""
    net, data = Block(np.random.default_rng(1), np.float32), batch(np.random.default_rng(2))
    expected = importance(net, *data, score)
    net.to("cuda")
    found = importance(net, *data, score)
    assert worst_error(found, expected) < 1e-10
    assert {p.device for p in net.named_tensors().values()} == {"cuda"}


# -- what is left as it was ----------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["dense", "masks", "presences"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("score", SCORES)
def test_the_network_is_left_as_it_was(
    score: str, mode: str, gates: str, rng: np.random.Generator
) -> None:
    net, (x, labels) = Block(rng, np.float32), batch(rng)
    masks = attach_masks(net) if gates == "masks" else {}
    if gates == "presences":
        flows.attach(net, rng=rng)
    net.conv2.weight.requires_grad = gates == "masks"
    net.eval()
    net.bn2.training = True
    F.cross_entropy(net(x.astype(np.float32)), labels).backward()
    tensors = net.named_tensors()
    before = {k: (t.data, t.data.copy(), t.grad) for k, t in tensors.items()}
    grads = {k: t.grad.copy() for k, t in tensors.items() if t.grad is not None}
    seen = {k: (mask.gradient, mask.gradient.copy()) for k, mask in masks.items()}
    initial = {k: np.zeros(p.shape) for k, p in net.named_parameters().items()}
    importance(net, x, labels, score, mode=mode, initial=initial, rng=rng)
    assert net.named_tensors() == tensors
    for name, tensor in tensors.items():
        data, copy, grad = before[name]
        assert tensor.data is data
        np.testing.assert_array_equal(data, copy)
        assert tensor.grad is grad
    for name, grad in grads.items():
        np.testing.assert_array_equal(tensors[name].grad, grad)
    for name, (gradient_of_all, copy) in seen.items():  # by which a pruner chooses who comes back
        assert masks[name].gradient is gradient_of_all
        np.testing.assert_array_equal(gradient_of_all, copy)
        assert gradient_of_all.any()
    frozen = [k for k, p in net.named_parameters().items() if not p.requires_grad]
    assert frozen == ([] if gates == "masks" else ["conv2.weight"])
    assert [m.training for _, m in net.named_modules()] == [False] * 4 + [True, False]


def test_it_is_left_so_after_an_error_too(rng: np.random.Generator) -> None:
    net, (x, labels) = Block(rng), batch(rng)
    state = net.state_dict()
    with pytest.raises(ValueError, match="classes"):
        importance(net, x, labels + 7, "grasp", mode="eval")
    assert net.training
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, state[name])


# -- the scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scores_are_their_formulas(mode: str, rng: np.random.Generator) -> None:
    """For weights and for filters, as tables in the field's code have them."""
    net, data = Block(rng), batch(rng)
    options: dict[str, Any] = {"temperature": 3.0, "mode": mode}
    g, hg = gradient(net, *data, **options), hessian_gradient_product(net, *data, **options)
    initial = {k: rng.standard_normal(p.shape) for k, p in net.named_parameters().items()}
    for name in ("conv1.weight", "conv2.weight", "fc.weight"):
        w = net.named_parameters()[name].data
        flow, curve, moved = w * g[name], w * hg[name], w - initial[name]
        expected = {
            "magnitude": (abs(w), np.sqrt(filter_sums(w**2))),
            "loss_preservation": (abs(flow), filter_sums(abs(flow))),
            "biased_loss_preservation": (abs(w**2 * g[name]), filter_sums(abs(w**2 * g[name]))),
            "grasp": (curve, filter_sums(curve)),
            "gradient_norm_preservation": (abs(curve), abs(filter_sums(curve))),
            "first_order": (abs(flow), abs(filter_sums(flow))),
            "distance": (abs(moved), np.sqrt(filter_sums(moved**2))),
        }
        for score, (weights, filters) in expected.items():
            given = {"initial": initial} if score == "distance" else {}
            found = importance(net, *data, score, "weight", **options, **given)
            np.testing.assert_allclose(found[name], weights, rtol=1e-12, atol=0)
            found = importance(net, *data, score, "filter", **options, **given)
            np.testing.assert_allclose(found[name], filters, rtol=1e-9, atol=1e-16)


def test_the_biased_score_can_count_from_the_beginning(rng: np.random.Generator) -> None:
    net, data = Block(rng), batch(rng)
    initial = {k: rng.standard_normal(p.shape) for k, p in net.named_parameters().items()}
    found = importance(net, *data, "biased_loss_preservation", initial=initial)["fc.weight"]
    w, g = net.fc.weight.data, gradient(net, *data)["fc.weight"]
    np.testing.assert_allclose(found, abs(w - initial["fc.weight"]) * abs(w * g), rtol=1e-12)


@pytest.mark.parametrize("level", ["weight", "filter"])
@pytest.mark.parametrize("name", ["lenet300", "resnet20", "mobilenet_v1"])
def test_keys_and_shapes(name: str, level: str, rng: np.random.Generator) -> None:
    if name == "lenet300":
        net, shape = models.lenet300(48, rng=rng), (4, 4, 3)
    elif name == "resnet20":
        net, shape = models.resnet(20, width=0.25, rng=rng), (32, 32, 3)
    else:
        net, shape = models.mobilenet_v1(width=0.0625, rng=rng), (32, 32, 3)
    x, labels = rng.standard_normal((2, *shape)), rng.integers(0, 10, 2)
    parameters = net.named_parameters()
    scores = importance(net, x, labels, level=level, mode="eval")
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Weighted)]
    assert list(scores) == [f"{layer}.weight" for layer in layers]
    for key, score in scores.items():
        shape = parameters[key].shape
        assert score.shape == (shape if level == "weight" else shape[:1])
        assert np.isfinite(score).all()


def test_temperature_divides_the_logits(rng: np.random.Generator) -> None:
    net, data = Block(rng), batch(rng)
    hot = gradient(net, *data, temperature=5.0)
    for parameter in (net.fc.weight, net.fc.bias):
        parameter.data = parameter.data / 5
    scaled = gradient(net, *data)
    np.testing.assert_allclose(hot["conv1.weight"], scaled["conv1.weight"], atol=1e-16)
    np.testing.assert_allclose(hot["fc.weight"], scaled["fc.weight"] / 5, atol=1e-16)


def test_batches_change_nothing_unless_batch_norm_couples_the_images(
    rng: np.random.Generator,
) -> None:
    """A gradient of uneven batches is that of all images; with train-mode batch norm, the mean of
    the batches' own."""
    net, (x, labels) = Block(rng), batch(rng, 7)
    whole = hessian_gradient_product(net, x, labels, mode="eval")
    parts = hessian_gradient_product(net, x, labels, mode="eval", batch_size=3)
    assert worst_error(parts, whole) < 1e-12
    mlp, images = TanhNet(rng), rng.standard_normal((7, 3))
    whole = hessian_gradient_product(mlp, images, labels)
    assert worst_error(hessian_gradient_product(mlp, images, labels, batch_size=3), whole) < 1e-12

    whole, parts = gradient(net, x, labels), gradient(net, x, labels, batch_size=3)
    assert worst_error(parts, whole) > 1e-3
    ends = [(0, 3), (3, 6), (6, 7)]
    batches = [(gradient(net, x[i:j], labels[i:j]), (j - i) / 7) for i, j in ends]
    mean = {k: sum(g[k] * share for g, share in batches) for k in parts}
    np.testing.assert_allclose(parts["conv1.weight"], mean["conv1.weight"], rtol=1e-12, atol=1e-16)


def test_batches_in_training_mode_count_by_size_in_the_loss(rng: np.random.Generator) -> None:
    net, (x, labels) = Block(rng), batch(rng, 6)
    first, last = (Landscape(net, x[s], labels[s]).loss() for s in (slice(0, 4), slice(4, 6)))
    both = Landscape(net, x, labels, batch_size=4).loss()
    assert both == pytest.approx((4 * first + 2 * last) / 6, rel=1e-14)


@pytest.mark.parametrize("score", [s for s in SCORES if s != "random"])
def test_removed_weights_score_zero_and_do_not_count(score: str, rng: np.random.Generator) -> None:
    """A mask is as good as zeros in the weights for what is left: g and H g of the rest only."""
    net, data = Block(rng), batch(rng)
    initial = {k: p.data + 1 for k, p in net.named_parameters().items()}
    masks = attach_masks(net)
    for mask in masks.values():
        mask.present = rng.random(mask.present.shape) < 0.6
    scores = importance(net, *data, score, initial=initial)
    for name, mask in masks.items():
        found = scores[f"{name}.weight"]
        assert not found[~mask.present].any()
        assert found[mask.present].all()
    if score in SECOND_ORDER:
        return
    for layer in layers_by_weight(net).values():
        layer.weight.data = layer.weight.data * layer.weight_gate.present
        layer.weight_gate = None
    dense = importance(net, *data, score, initial=initial)
    for name, mask in masks.items():
        kept = mask.present
        np.testing.assert_allclose(scores[f"{name}.weight"][kept], dense[f"{name}.weight"][kept])


def test_curvature_of_a_masked_network_is_that_of_the_weights_left(
    rng: np.random.Generator,
) -> None:
    """With the mask M: M H M g at the masked weights, in every precision of bookkeeping."""
    net, data = Block(rng), batch(rng)
    masks = attach_masks(net)
    for mask in masks.values():
        mask.present = rng.random(mask.present.shape) < 0.6
    found = hessian_gradient_product(net, *data)
    for layer in layers_by_weight(net).values():
        layer.weight.data = layer.weight.data * layer.weight_gate.present
        layer.weight_gate = None
    landscape = Landscape(net, *data)
    ones = {k: np.ones(p.shape) for k, p in net.named_parameters().items()}
    m = landscape.vector(ones | {f"{n}.weight": k.present * 1.0 for n, k in masks.items()})
    expected = landscape.arrays(m * landscape.hessian_product(m * landscape.gradient()))
    assert worst_error(found, expected) < 1e-12


def test_gates_count_like_masks(rng: np.random.Generator) -> None:
    net, data = Block(rng), batch(rng)
    flows.attach(net, init=(-0.5, 0.5), rng=rng)
    for score in ("magnitude", "loss_preservation", "grasp"):
        found = importance(net, *data, score)
        assert list(found) == ["conv1.weight", "conv2.weight", "fc.weight"]
        for name, t in flows.presences(net).items():
            layer = name.removesuffix(".presence")
            np.testing.assert_array_equal(found[f"{layer}.weight"] != 0, t.data >= 0)
    assert all(t.grad is None for t in flows.presences(net).values())


@pytest.mark.parametrize("score", ["loss_preservation", "grasp"])
def test_frozen_parameters_score_like_others(score: str, rng: np.random.Generator) -> None:
    """Whether training moves a weight says nothing about what the loss would do without it."""
    net, data = Block(rng), batch(rng)
    expected = importance(net, *data, score)
    for parameters in ([net.conv1.weight, net.fc.bias], net.parameters()):
        for parameter in parameters:
            parameter.requires_grad = False
        found = importance(net, *data, score)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_random_scores_come_from_the_generator(rng: np.random.Generator) -> None:
    net, data = Block(rng), batch(rng)
    draws = [
        importance(net, *data, "random", "filter", rng=np.random.default_rng(s))["conv1.weight"]
        for s in (1, 1, 2)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).all()
    assert ((draws[0] >= 0) & (draws[0] < 1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "snap"}, "score must be one of magnitude, loss_preservation"),
        ({"level": "layer"}, "level must be one of weight, filter"),
        ({"mode": "test"}, "mode must be one of train, eval"),
        ({"temperature": 0.0}, "temperature"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": -2}, "batch_size must be at least 1"),
        ({"score": "random"}, "rng"),
        ({"score": "distance"}, "initial"),
    ],
)
def test_mistakes_are_named(
    options: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(ValueError, match=message):
        importance(Block(rng), *batch(rng), **options)


def test_images_and_labels_must_fit(rng: np.random.Generator) -> None:
    x, labels = batch(rng)
    with pytest.raises(ValueError, match="5 images and 6 labels"):
        importance(Block(rng), x[:5], labels)
