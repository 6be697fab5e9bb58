"""Modules: what they find in themselves, how they save and load, and that they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minihyperflows as mh
from minihyperflows import flows, models, nn, testing
from minihyperflows import functional as F
from minihyperflows.nn.restore import in_mode


@pytest.fixture
def net(rng: np.random.Generator) -> nn.Module:
    """Convolution, batch norm, pooling, a linear layer: parameters, buffers and two layouts."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, rng=rng),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4, rng=rng),
    )


def images(n: int = 3, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((n, 4, 4, 2)).astype(dtype)


def assert_same(mine: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(mine) == list(other)
    for name in mine:
        np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


# -- what a module holds ---------------------------------------------------------------------------


def test_names_are_pytorchs(net: nn.Module) -> None:
    assert list(net.named_parameters()) == [
        *("0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias")
    ]
    assert list(net.state_dict()) == [
        *("0.weight", "0.bias", "1.weight", "1.bias"),
        *("1.running_mean", "1.running_var", "1.num_batches_tracked", "5.weight", "5.bias"),
    ]
    assert net.parameters() == list(net.named_parameters().values())


def test_parameters_presences_and_buffers_are_disjoint(
    net: nn.Module, rng: np.random.Generator
) -> None:
    flows.attach(net, rng=rng)
    parameters, presences = net.named_parameters(), flows.presences(net)
    buffers = {k: t for k, t in net.named_tensors().items() if isinstance(t, nn.Buffer)}
    assert list(presences) == ["0.presence", "5.presence"]
    assert len(buffers) == 3
    groups = [parameters, presences, buffers]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(net.state_dict())
    tensors = [id(t) for group in groups for t in group.values()]
    assert len(set(tensors)) == len(tensors)


class Holder(nn.Module):
    def __init__(self, rng: np.random.Generator) -> None:
        self.alone = nn.Linear(2, 2, rng=rng)
        self.blocks = [nn.Linear(2, 2, rng=rng), nn.ReLU(), nn.Linear(2, 2, rng=rng)]
        self.pair = (nn.Linear(2, 2, rng=rng), "not a module")
        self.table = {"a": nn.Linear(2, 2, bias=False, rng=rng), "b": 3}
        self.scales = [nn.Parameter(np.ones(2)), nn.Parameter(np.ones(2))]
        self.nothing = None


def test_modules_and_parameters_in_lists_tuples_and_dictionaries(rng: np.random.Generator) -> None:
    names = list(Holder(rng).named_parameters())
    assert names == [
        *("scales.0", "scales.1"),
        *("alone.weight", "alone.bias"),
        *("blocks.0.weight", "blocks.0.bias", "blocks.2.weight", "blocks.2.bias"),
        *("pair.0.weight", "pair.0.bias", "table.a.weight"),
    ]


class Nested(nn.Module):
    """Modules and parameters at any depth of containers; the lists contain themselves."""

    def __init__(self, rng: np.random.Generator) -> None:
        def linear() -> nn.Linear:
            return nn.Linear(2, 2, bias=False, rng=rng)

        self.blocks = [(linear(), nn.ReLU()), (linear(), [nn.BatchNorm2d(2)])]
        self.table = {"a": {"b": [linear()]}, 3: (linear(), "text", None, 1.5)}
        self.scales = [[nn.Parameter(np.ones(2))], {"deep": [[nn.Buffer(np.zeros(1))]]}]
        self.blocks.append(self.blocks)
        self.scales[1]["again"] = self.scales

    def forward(self, x: mh.Tensor) -> mh.Tensor:
        (first, _), (second, (norm,)) = self.blocks[:2]
        x = norm(second(first(x) * self.scales[0][0]))
        return self.table[3][0](self.table["a"]["b"][0](x))


def test_modules_and_parameters_at_any_depth_of_containers(rng: np.random.Generator) -> None:
    net = Nested(rng)
    assert list(net.state_dict()) == [
        *("scales.0.0", "scales.1.deep.0.0", "blocks.0.0.weight", "blocks.1.0.weight"),
        *(f"blocks.1.1.0.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        *("blocks.1.1.0.num_batches_tracked", "table.a.b.0.weight", "table.3.0.weight"),
    ]
    assert [n for n, m in net.named_modules() if isinstance(m, nn.ReLU)] == ["blocks.0.1"]
    net.eval()
    assert not net.blocks[1][1][0].training
    testing.check_module(net, (4, 2))  # gradients, saving, loading
    flows.attach(net, init=(-1, 1), rng=rng)
    assert len(flows.presences(net)) == 4
    x = rng.standard_normal((3, 2)).astype(np.float32)
    gated = net(x).data
    flows.to_dense(net)
    np.testing.assert_array_equal(net(x).data, gated)


def test_training_reaches_nested_parameters(rng: np.random.Generator) -> None:
    net = Nested(rng)
    before = net.state_dict()
    optimizer = mh.optim.SGD(net.parameters(), lr=0.5)
    F.cross_entropy(net(rng.standard_normal((4, 2)).astype(np.float32)), [0, 1, 1, 0]).backward()
    optimizer.step()
    moved = {k for k, v in net.state_dict().items() if not np.array_equal(v, before[k])}
    assert moved == set(before) - {"scales.1.deep.0.0"}  # a buffer that is not used


@pytest.mark.parametrize(
    "table",
    [
        {1: nn.Parameter(np.ones(1)), "1": nn.Parameter(np.ones(1))},
        {"a.b": nn.Parameter(np.ones(1)), "a": {"b": nn.Parameter(np.ones(1))}},
    ],
)
def test_two_parameters_of_one_name_are_refused(table: dict[Any, Any]) -> None:
    holder = nn.Module()
    holder.table = table
    with pytest.raises(ValueError, match=r"two parameters or buffers are called table\.(1|a\.b)"):
        holder.parameters()


def test_modules_in_a_set_are_refused(rng: np.random.Generator) -> None:
    holder = nn.Module()
    holder.numbers = {1, 2}
    assert holder.parameters() == []
    holder.inner = [{nn.ReLU()}]
    with pytest.raises(TypeError, match=r"inner\.0 is a set, .* use a list"):
        holder.parameters()


@pytest.mark.parametrize(
    "value", [np.ones((4, 12)), mh.Tensor(np.ones((4, 12)), True), 1.0, [[1.0]]], ids=repr
)
def test_a_parameter_is_not_replaced_by_what_would_not_be_trained(
    net: nn.Module, value: Any
) -> None:
    weight, mean = net[5].weight, net[1].running_mean
    with pytest.raises(
        TypeError, match=r"Linear\.weight is a Parameter: .*\.weight\.data = \.\.\."
    ):
        net[5].weight = value
    with pytest.raises(TypeError, match=r"BatchNorm2d\.running_mean is a Buffer: .*nn\.Buffer"):
        net[1].running_mean = value
    assert (net[5].weight, net[1].running_mean) == (weight, mean)


def test_a_parameter_is_replaced_by_a_parameter_or_nothing(net: nn.Module) -> None:
    net[5].weight = nn.Parameter(np.ones((4, 12), np.float32))
    assert net.named_parameters()["5.weight"] is net[5].weight
    net[5].bias = None
    assert "5.bias" not in net.state_dict()
    assert net(images()).shape == (3, 4)
    net[1].weight = nn.Buffer(np.ones(3, np.float32))  # saved, and not trained on purpose
    assert "1.weight" in net.state_dict()
    assert "1.weight" not in net.named_parameters()


def test_shared_modules_and_parameters_count_once(rng: np.random.Generator) -> None:
    net = nn.Sequential(nn.Linear(3, 3, rng=rng), nn.ReLU(), nn.Linear(3, 3, rng=rng))
    net[2].weight = net[0].weight  # a parameter in two modules
    shared = nn.Sequential(net, net)  # a module in two places
    assert list(shared.named_parameters()) == ["0.0.weight", "0.0.bias", "0.2.bias"]
    mh.optim.SGD(shared.parameters(), lr=0.1)  # would refuse a parameter that is there twice
    testing.check_module(shared, (4, 3))

    whole = nn.Sequential(net[0], net[0])
    flows.attach(whole, rng=rng)
    assert list(flows.presences(whole)) == ["0.presence"]


def test_a_module_that_contains_itself_is_walked_once(rng: np.random.Generator) -> None:
    layer = nn.Linear(2, 2, rng=rng)
    layer.parent = layer
    assert [name for name, _ in layer.named_modules()] == [""]


def test_modes_reach_every_module(net: nn.Module) -> None:
    net.eval()
    assert not any(module.training for _, module in net.named_modules())
    net.train()
    assert all(module.training for _, module in net.named_modules())


def test_a_mode_is_borrowed_from_every_module(net: nn.Module) -> None:
    net[1].eval()
    modes = [module.training for _, module in net.named_modules()]
    for training in (False, True):
        with in_mode(net, training):
            assert all(module.training is training for _, module in net.named_modules())
        assert [module.training for _, module in net.named_modules()] == modes
        with pytest.raises(mh.ShapeError), in_mode(net, training):
            net(np.ones((1, 2)))
        assert [module.training for _, module in net.named_modules()] == modes


def test_zero_grad_reaches_every_role(net: nn.Module, rng: np.random.Generator) -> None:
    flows.attach(net, rng=rng)
    (F.cross_entropy(net(images()), [0, 1, 2]) + flows.pressure(net)).backward()
    tensors = [*net.parameters(), *flows.presences(net).values()]
    assert all(p.grad is not None for p in tensors)
    net.zero_grad()
    assert all(p.grad is None for p in tensors)


def test_moving_to_a_gpu_that_is_not_there_changes_nothing(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minihyperflows.engine.backend.cuda_available", lambda: False)
    before = {name: tensor.data for name, tensor in net.named_tensors().items()}
    with pytest.raises(mh.DeviceError, match="no GPU is available"):
        net.to("cuda")
    assert all(tensor.data is before[name] for name, tensor in net.named_tensors().items())
    assert net.to("cpu") is net


def test_a_module_without_forward_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Module has no forward"):
        nn.Module()(np.ones(2))


# -- saving and loading ----------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_state_dict_round_trip(net: nn.Module, gated: bool, rng: np.random.Generator) -> None:
    if gated:
        flows.attach(net, init=(-0.5, 0.5), rng=rng)
    net(images())  # moves the running statistics
    other = copy.deepcopy(net)
    for tensor in other.named_tensors().values():
        tensor.data = tensor.data + 1
    other.load_state_dict(net.state_dict())
    assert_same(other.state_dict(), net.state_dict())
    np.testing.assert_array_equal(net.eval()(images()).data, other.eval()(images()).data)


def test_state_is_a_copy_in_pytorchs_layout(net: nn.Module, rng: np.random.Generator) -> None:
    flows.attach(net, rng=rng)
    state = net.state_dict()
    weight = net[0].weight.data  # (C_out, kH, kW, C_in)
    assert state["0.weight"].shape == state["0.presence"].shape == (3, 2, 3, 3)  # OIHW
    np.testing.assert_array_equal(state["0.weight"], weight.transpose(0, 3, 1, 2))
    state["0.weight"][...] = 0
    assert weight.all()
    net.load_state_dict(state)
    state["0.weight"][...] = 5
    assert not net[0].weight.data.any()
    assert net[0].weight.data.flags.c_contiguous


def test_loading_converts_to_the_dtype_of_the_net(net: nn.Module) -> None:
    state = net.state_dict()
    state["0.weight"] = state["0.weight"].astype(np.float64)
    state["5.bias"] = np.arange(4)
    net.load_state_dict(state)
    np.testing.assert_array_equal(net[5].bias.data, [0, 1, 2, 3])
    assert net[0].weight.dtype == net[5].bias.dtype == np.float32
    assert net[1].num_batches_tracked.dtype == np.int64


def changed(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        state = {k: v + 1 for k, v in state.items()} | values
        return {k: v for k, v in state.items() if v is not None}

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (changed(**{"5.bias": None}), KeyError, r"missing 5\.bias"),
        (changed(**{"6.bias": np.ones(3)}), KeyError, r"unknown 6\.bias"),
        (changed(**{"5.presence": np.ones((4, 12))}), KeyError, r"flows\.attach"),
        (
            changed(**{"5.bias": np.ones(5)}),
            mh.ShapeError,
            r"5\.bias has shape \(5,\) where \(4,\) is needed",
        ),
        (
            changed(**{"0.weight": np.ones((3, 3, 3, 2))}),
            mh.ShapeError,
            r"\(3, 3, 3, 2\) where \(3, 2, 3, 3\)",
        ),
        (changed(**{"5.bias": np.ones(4, complex)}), TypeError, "complex128 values where float32"),
        (changed(**{"5.bias": np.array(["a"] * 4)}), TypeError, "5.bias holds <U1"),
        (changed(**{"1.num_batches_tracked": np.array(0.5)}), TypeError, "float64 .* int64"),
    ],
)
def test_a_failed_load_changes_nothing(
    net: nn.Module, change: Callable, error: type[Exception], message: str
) -> None:
    before, arrays = net.state_dict(), [t.data for t in net.named_tensors().values()]
    with pytest.raises(error, match=message):
        net.load_state_dict(change(net.state_dict()))
    assert_same(net.state_dict(), before)
    assert all(t.data is a for t, a in zip(net.named_tensors().values(), arrays, strict=True))


def test_loading_into_a_gated_net_needs_presences(net: nn.Module, rng: np.random.Generator) -> None:
    dense = net.state_dict()
    flows.attach(net, rng=rng)
    with pytest.raises(KeyError, match=r"missing 0\.presence, 5\.presence; attach presence"):
        net.load_state_dict(dense)


# -- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_whole_net_is_right(
    net: nn.Module, training: bool, gated: bool, rng: np.random.Generator
) -> None:
    if gated:
        flows.attach(net, init=(-0.5, 0.5), rng=rng)
    testing.check_module(net.train(training), images())


def test_layers_alone(rng: np.random.Generator) -> None:
    testing.check_module(nn.Linear(4, 3, rng=rng), (5, 4))
    testing.check_module(nn.Linear(4, 3, bias=False, rng=rng), (5, 4))
    testing.check_module(nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, rng=rng), (2, 5, 6, 4))
    testing.check_module(nn.BatchNorm2d(3), (4, 2, 2, 3))
    testing.check_module(nn.AvgPool2d(2), (2, 4, 4, 3))
    testing.check_module(nn.MaxPool2d(3, stride=1), (2, 4, 4, 3))
    testing.check_module(nn.ReLU(), (3, 3), away_from=0.0)


def test_batch_norm_updates_running_statistics_in_training_only(rng: np.random.Generator) -> None:
    layer, x = nn.BatchNorm2d(3), rng.standard_normal((8, 2, 2, 3)).astype(np.float32)
    layer(x)
    rows = x.reshape(-1, 3)
    np.testing.assert_allclose(layer.running_mean.data, 0.1 * rows.mean(0), rtol=1e-5, atol=1e-7)
    unbiased = rows.var(0, ddof=1)
    np.testing.assert_allclose(layer.running_var.data, 0.9 + 0.1 * unbiased, rtol=1e-5)
    assert layer.num_batches_tracked.item() == 1
    before = layer.state_dict()
    layer.eval()(x)
    assert_same(layer.state_dict(), before)


def test_a_layer_takes_arrays_too(rng: np.random.Generator) -> None:
    layer, x = nn.Linear(4, 3, rng=rng), rng.standard_normal((2, 4)).astype(np.float32)
    np.testing.assert_array_equal(layer(x).data, layer(mh.Tensor(x)).data)
    assert layer(x.astype(np.uint8)).dtype == np.float32


def test_lenet300(rng: np.random.Generator) -> None:
    net = models.lenet300(rng=rng)
    shapes = {name: p.shape for name, p in net.named_parameters().items()}
    assert shapes == {
        **{"fc1.weight": (300, 784), "fc1.bias": (300,)},
        **{"fc2.weight": (100, 300), "fc2.bias": (100,)},
        **{"fc3.weight": (10, 100), "fc3.bias": (10,)},
    }
    assert sum(p.size for name, p in net.named_parameters().items() if "weight" in name) == 266_200
    assert net(np.zeros((5, 28, 28, 1), np.float32)).shape == (5, 10)  # flattens its input
    with pytest.raises(mh.ShapeError, match=r"Linear: input of shape \(5, 64\)"):
        net(np.zeros((5, 8, 8, 1), np.float32))


STEMS = [
    ("vgg19", 1, 2),
    ("vgg19", 2, 1),
    ("resnet50", 1, 4),
    ("resnet50", 2, 2),
    ("resnet50", 4, 1),
]


@pytest.mark.parametrize(("name", "stride", "last_map"), STEMS)
def test_a_stem_stride_changes_the_maps_and_not_the_weights(
    name: str, stride: int, last_map: int
) -> None:
    build = getattr(models, name)
    plain = build(width=0.05, rng=np.random.default_rng(1))
    net = build(width=0.05, stem_stride=stride, rng=np.random.default_rng(1))
    assert_same(net.state_dict(), plain.state_dict())
    x = np.random.default_rng(2).standard_normal((3, 32, 32, 3)).astype(np.float32)
    maps = map_sizes(net, x)
    assert maps[0] == 32 // stride
    assert maps[-1] == last_map
    assert maps == [size // stride for size in map_sizes(plain, x)]
    assert net(x).shape == (3, 10)
    loss = F.cross_entropy(net(x), [0, 1, 2])
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.ndim > 1)


def map_sizes(net: nn.Module, x: np.ndarray) -> list[int]:
    """The side of the map after each convolution, in the order of computation."""
    sizes = []

    def forward(layer: nn.Conv2d, x: mh.Tensor) -> mh.Tensor:
        y = convolve(layer, x)
        sizes.append(y.shape[1])
        return y

    convolve = nn.Conv2d.forward
    with pytest.MonkeyPatch.context() as patch, mh.no_grad():
        patch.setattr(nn.Conv2d, "forward", forward)
        net(x)
    return sizes


@pytest.mark.parametrize(
    ("name", "stride", "choices"),
    [("vgg19", 4, "1 or 2, not 4"), ("resnet50", 3, "1, 2 or 4, not 3"), ("resnet50", 0, "1, 2")],
)
def test_a_wrong_stem_stride_is_answered_with_the_choices(
    name: str, stride: int, choices: str, rng: np.random.Generator
) -> None:
    with pytest.raises(ValueError, match=f"stem_stride must be {choices}"):
        getattr(models, name)(width=0.05, stem_stride=stride, rng=rng)


def test_initial_values_do_not_depend_on_the_dtype() -> None:
    nets = [
        models.lenet300(64, rng=np.random.default_rng(3), dtype=dtype)
        for dtype in (np.float32, np.float64)
    ]
    for single, double in zip(*(n.parameters() for n in nets), strict=True):
        assert (single.dtype, double.dtype) == (np.float32, np.float64)
        np.testing.assert_array_equal(single.data, double.data.astype(np.float32))
        bound = 1 / np.sqrt(double.shape[-1]) if double.ndim > 1 else 1 / np.sqrt(64)
        assert abs(double.data).max() <= bound


def test_dtype_of_a_net(rng: np.random.Generator) -> None:
    net = models.lenet300(64, rng=rng, dtype=np.float64)
    assert net(np.zeros((2, 64))).dtype == np.float64
    net = models.lenet300(64, rng=rng)
    loss = F.cross_entropy(net(np.zeros((2, 64), np.float32)), [0, 1], label_smoothing=0.1)
    assert loss.dtype == np.float32
    loss.backward()
    assert all(p.grad.dtype == np.float32 for p in net.parameters())
