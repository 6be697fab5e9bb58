"""Is what the GPU computes right? Every operation, and training steps of every network.

The reference is NumPy in float64 on the same (rounded) inputs. Works on an emulated GPU as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from minihyperflows import flows, functional
from minihyperflows.bench.gpu_steps import OurTraining
from minihyperflows.bench.steps import GAMMA, LR, PRESENCE
from minihyperflows.data.datasets import Dataset, normalise
from minihyperflows.engine import (
    NonFiniteLossError,
    Tensor,
    apply,
    conv,
    no_grad,
    norm,
    ops,
    pooling,
)
from minihyperflows.engine.backend import cupy, to_device, to_numpy
from minihyperflows.engine.graph import Function
from minihyperflows.flows.gates import Gate, GatedWeight
from minihyperflows.flows.gpu.flat import FIRST_SCALE
from minihyperflows.flows.pressures import MeanPresence
from minihyperflows.lab.gpu_epochs import GpuEpochs
from minihyperflows.lab.recipes import find
from minihyperflows.lab.training import make_optimizer
from minihyperflows.nn import BatchNorm2d, Module, models

RECIPE = "vgg19-cifar10"  # whose optimisers and labels the training steps have
PRECISIONS = ("float32", "float16")


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: of what.
        error: how far off it is; NaN if it could not be computed.
        bound: how far it may be.
        note: what went wrong, if it could not be computed.
    """

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def line(self) -> str:
        """For people."""
        verdict = "ok  " if self.passed else "FAIL"
        note = f": {self.note}" * bool(self.note)
        return f"{verdict} {self.name:<48}{self.error:>10.1e} (bound {self.bound:.1e}){note}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types, which have no NaN."""
        error = float(self.error) if np.isfinite(self.error) else None
        return {"name": self.name, "error": error, "bound": self.bound, "note": self.note}


def guarded(name: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """``checks()``; what they raise becomes a check that has failed."""
    try:
        yield from checks()
    except Exception as error:  # the others must go on
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield Check(name, float("nan"), 0.0, message)


# -- operations ----------------------------------------------------------------------------------

# Relative to the largest value. The kernels sum in float32; CuPy's functions, which compute what
# has no kernel, may round each of several operations to half precision.
OPERATION_BOUNDS = {"float32": 1e-5, "float16": 4e-3}


@dataclass(frozen=True)
class Case:
    """An operation and what to try it on.

    Attributes:
        factory: makes the Function; is given the array module, for indices and labels.
        inputs: for each input a shape, drawn from a standard normal, or an array.
        single: numbers of the inputs that are float32 in half precision too.
    """

    factory: Callable[[ModuleType], Function]
    inputs: tuple[Any, ...]
    single: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.factory(np).name


POSITIVE = np.linspace(0.5, 2.0, 15).reshape(3, 5)
LABELS = np.arange(24) * 7 % 10


def _case(factory: Callable[..., Function], *inputs: Any, single: tuple[int, ...] = ()) -> Case:
    """A case whose Function needs no array module."""
    return Case(lambda xp: factory(), inputs, single)


def _normalise(xp: ModuleType, relu: bool = False) -> Function:
    """Batch norm with given statistics of 24 channels."""
    mean, var = np.linspace(-1, 1, 24, dtype=np.float32), np.linspace(0.5, 2, 24, dtype=np.float32)
    return norm.Normalise(xp.asarray(mean), xp.asarray(var), relu=relu)


CASES: tuple[Case, ...] = (
    _case(ops.Add, (3, 5, 7), (3, 5, 7)),
    _case(ops.Add, (4, 64), (4, 64)),
    _case(ops.Add, (3, 5), (5,)),
    _case(ops.Subtract, (3, 5), (1,)),
    _case(ops.Multiply, (3, 5), (3, 1)),
    _case(ops.Divide, (3, 5), POSITIVE),
    _case(ops.Negate, (3, 5)),
    _case(partial(ops.Power, 2), (3, 5)),
    _case(partial(ops.Power, -0.5), POSITIVE),
    _case(ops.Exp, (3, 5)),
    _case(ops.Log, POSITIVE),
    _case(ops.Tanh, (3, 5)),
    _case(ops.Sigmoid, (3, 5)),
    _case(ops.ReLU, (3, 5, 7)),
    _case(ops.ReLU, (4, 512)),
    _case(ops.Sum, (3, 5)),
    _case(partial(ops.Sum, axis=(0, 2)), (3, 5, 7)),
    _case(ops.Mean, (3, 5)),
    _case(partial(ops.Mean, axis=(1, 2)), (3, 4, 4, 24)),
    _case(partial(ops.Max, axis=1), (3, 5)),
    _case(partial(ops.Reshape, (5, -1)), (3, 5, 2)),
    _case(partial(ops.Transpose, (1, 2, 0)), (3, 5, 7)),
    _case(partial(ops.GetItem, (slice(None, None, 2), 1)), (4, 3)),
    Case(lambda xp: ops.GetItem(xp.asarray(np.array([0, 2, 2]))), ((4, 3),)),
    _case(partial(ops.Concatenate, axis=-1), (3, 5), (3, 2)),
    _case(ops.MatMul, (3, 5), (5, 7)),
    _case(ops.Linear, (24, 77), (10, 77), (10,), single=(2,)),
    _case(ops.Linear, (5, 64), (128, 64)),
    _case(ops.Softmax, (24, 10)),
    _case(ops.LogSoftmax, (24, 10)),
    Case(lambda xp: ops.CrossEntropy(xp.asarray(LABELS), 0.1), ((24, 10),)),
    _case(partial(conv.Conv2d, padding=1), (3, 9, 7, 5), (11, 3, 3, 5), (11,), single=(2,)),
    _case(partial(conv.Conv2d, padding=1), (4, 8, 8, 32), (64, 3, 3, 32)),
    _case(partial(conv.Conv2d, stride=2, padding=1), (3, 8, 8, 24), (16, 3, 3, 24)),
    _case(conv.Conv2d, (3, 4, 4, 24), (40, 1, 1, 24)),
    _case(partial(conv.Conv2d, stride=2), (3, 8, 8, 24), (40, 1, 1, 24)),
    _case(partial(conv.Conv2d, padding=1, groups=24), (3, 8, 8, 24), (24, 3, 3, 1)),
    _case(partial(pooling.MaxPool2d, 2), (3, 8, 6, 24)),
    _case(partial(pooling.MaxPool2d, 3, stride=2), (3, 9, 7, 5)),
    _case(partial(pooling.AvgPool2d, 2), (3, 4, 4, 24)),
    _case(norm.BatchNorm, (6, 5, 7, 3), (3,), (3,), single=(1, 2)),
    _case(partial(norm.BatchNorm, relu=True), (8, 8, 8, 64), (64,), (64,), single=(1, 2)),
    _case(
        partial(norm.BatchNorm, relu=True),
        *((8, 4, 4, 24), (24,), (24,), (8, 4, 4, 24)),
        single=(1, 2),
    ),
    Case(_normalise, ((8, 4, 4, 24), (24,), (24,), (8, 4, 4, 24)), single=(1, 2)),
    Case(partial(_normalise, relu=True), ((8, 4, 4, 24), (24,), (24,)), single=(1, 2)),
    _case(Gate, (5, 7)),
    _case(GatedWeight, (5, 7), (5, 7)),
    _case(MeanPresence, (3, 5), (7,)),
)


def check_operations() -> Iterator[Check]:
    """Output and gradients of every case on the GPU, in both precisions."""
    for i, case in enumerate(CASES):
        for precision in PRECISIONS:
            name = f"{case.name} ({i}), {precision}"
            yield from guarded(name, lambda c=case, n=name, p=precision: _check_case(c, n, p))  # type: ignore[misc]


def _check_case(case: Case, name: str, precision: str) -> Iterator[Check]:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) if isinstance(s, tuple) else s for s in case.inputs]
    kinds = ["float32" if i in case.single else precision for i in range(len(arrays))]
    given = [a.astype(kind) for a, kind in zip(arrays, kinds, strict=True)]
    rounded = [a.astype(np.float64) for a in given]
    output = apply(case.factory(np), *map(Tensor, rounded))
    cotangent = rng.standard_normal(output.shape)
    if case.name != "CrossEntropy":  # whose loss is float32
        cotangent = cotangent.astype(precision).astype(np.float64)
    expected = _results(case, rounded, cotangent, "cpu")
    found = _results(case, given, cotangent, "cuda")
    errors = [_largest_error(f, e) for f, e in zip(found, expected, strict=True)]
    yield Check(name, max(errors), OPERATION_BOUNDS[precision])


def _results(
    case: Case, arrays: Sequence[np.ndarray], cotangent: np.ndarray, device: str
) -> list[np.ndarray]:
    """Output and gradients, as NumPy arrays."""
    leaves = [Tensor(to_device(a, device), requires_grad=True) for a in arrays]
    y = apply(case.factory(np if device == "cpu" else cupy()), *leaves)
    y.backward(to_device(cotangent.astype(y.dtype), device))
    return [to_numpy(array) for array in (y.data, *(leaf.grad for leaf in leaves))]


def _largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    difference = np.abs(found.astype(np.float64) - expected).max()
    return float(difference / max(np.abs(expected).max(), 1e-30))


# -- training steps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How large the networks are that are checked.

    Attributes:
        widths: of the convolutional ones.
        batch: images in a step.
        steps: of a training that is repeated.
        half_bound: the relative error (Euclidean norm over all tensors together) that the gradients
            of a step in half precision may have; more for networks with few channels and images.
    """

    widths: tuple[float, ...] = (1.0, 0.15)
    batch: int = 32
    steps: int = 8
    half_bound: float = 0.03


SMALL = Size(widths=(0.05,), batch=6, steps=3, half_bound=0.1)  # for the emulator


# Where the input of a ReLU is near 0, its rounding decides whether a gradient passes. In half
# precision that changes the gradients of a fresh VGG-19 by 20 %, in PyTorch as much as here. So the
# steps in half precision begin with batch norms that shift their outputs up by so many standard
# deviations: few are near 0 then.
HALF_SHIFT = 2.0

LOSS_SCALES = (FIRST_SCALE, FIRST_SCALE / 16, FIRST_SCALE / 256, FIRST_SCALE / 4096)


def _builders(width: float) -> dict[str, Callable[..., Module]]:
    return {
        "vgg13": partial(models.vgg13, width=width),
        "vgg19": partial(models.vgg19, width=width),
        "resnet20": partial(models.resnet, 20, width=width),
        "resnet50": partial(models.resnet50, width=width),
        "mobilenet_v1": partial(models.mobilenet_v1, width=width),
    }


NETWORKS = ("lenet300", *_builders(1.0))

# Relative errors of a step. In single precision 1e-4, or where that is beyond single precision
# itself, so many times NumPy's own error in it:
STEP_BOUND = 1e-4
TIMES_NUMPY = 4.0
HALF_BOUNDS = {"loss": 1e-2, "statistics": 1e-2}  # in half precision; see Size for the others


def build(network: str, width: float, dtype: Any = np.float32, shift: float = 0.0) -> Module:
    """A gated network; the same numbers every time, and ``shift`` for those of batch norms."""
    rng = np.random.default_rng(0)
    net = models.lenet300(rng=rng) if network == "lenet300" else _builders(width)[network](rng=rng)
    flows.attach(net, init=PRESENCE, rng=rng)
    for tensor in net.named_tensors().values():
        if tensor.dtype.kind == "f":
            tensor.data = tensor.data.astype(dtype)
    for _, module in net.named_modules():
        if isinstance(module, BatchNorm2d):
            module.bias.data += module.bias.dtype.type(shift)
    return net


def images_for(network: str, count: int) -> Dataset:
    """Random images of the size that the network takes."""
    rng = np.random.default_rng(1)
    shape = (28, 28, 1) if network == "lenet300" else (32, 32, 3)
    # Blocks of a few pixels, so that convolutions have something to see.
    coarse = rng.integers(0, 256, (count, shape[0] // 4, shape[1] // 4, shape[2]), np.uint8)
    x = coarse.repeat(4, axis=1).repeat(4, axis=2)
    y = rng.integers(0, 10, count)
    classes = tuple("0123456789")
    statistics = ((0.5,) * shape[2], (0.25,) * shape[2])
    return Dataset("random", x, y, x, y, classes, *statistics)


def check_steps(size: Size, networks: Sequence[str] = NETWORKS) -> Iterator[Check]:
    """One training step of every network on the GPU, in both precisions, against NumPy."""
    for network in networks:
        for width in size.widths if network != "lenet300" else (1.0,):
            name = network if network == "lenet300" else f"{network} x {width:g}"
            yield from guarded(name, lambda n=network, w=width, t=name: _check_step(n, w, t, size))  # type: ignore[misc]


def _check_step(network: str, width: float, name: str, size: Size) -> Iterator[Check]:
    data = images_for(network, size.batch)
    for precision, shift in (("float32", 0.0), ("float16", HALF_SHIFT)):
        expected = step_on_the_cpu(build(network, width, np.float64, shift), data)
        numpy32 = step_on_the_cpu(build(network, width, shift=shift), data)
        found = step_on_the_gpu(network, width, data, precision, shift)
        for what, value in found.items():
            bound = HALF_BOUNDS.get(what, size.half_bound)
            if precision == "float32":
                own = _relative_error(numpy32[what], expected[what])
                bound = max(STEP_BOUND, TIMES_NUMPY * own)
            error = _relative_error(value, expected[what])
            yield Check(f"{name}, {precision}: {what}", error, bound)
    yield _check_evaluation(network, width, name, data)


def _check_evaluation(network: str, width: float, name: str, data: Dataset) -> Check:
    """The logits in evaluation mode."""
    results = []
    for device, dtype in (("cpu", np.float64), ("cpu", np.float32), ("cuda", np.float32)):
        net = build(network, width, dtype).to(device).eval()
        with no_grad():
            images = to_device(normalise(data.test_x, data, dtype), device)
            results.append([to_numpy(net(Tensor(images)).data)])
    expected, numpy32, found = results
    bound = max(STEP_BOUND, TIMES_NUMPY * _relative_error(numpy32, expected))
    return Check(f"{name}, float32: evaluation", _relative_error(found, expected), bound)


def step_on_the_cpu(net: Module, data: Dataset) -> dict[str, list[np.ndarray]]:
    """What one step makes of ``net``, by the definition, in the precision of its parameters."""
    recipe = find(RECIPE)
    optimizers = (
        make_optimizer(net.parameters(), recipe.pruning),
        make_optimizer(list(flows.presences(net).values()), recipe.presence),
    )
    dtype = net.parameters()[0].dtype
    x = Tensor(normalise(data.train_x, data, dtype))
    loss = functional.cross_entropy(net(x), data.train_y, recipe.pruning.label_smoothing)
    (loss + GAMMA * flows.pressure(net)).backward()
    for optimizer in optimizers:
        optimizer.lr = LR
        optimizer.step()
    return _outcome(net, optimizers, loss.item())


def step_on_the_gpu(
    network: str, width: float, data: Dataset, precision: str, shift: float
) -> dict[str, list[np.ndarray]]:
    """The same by an epoch of one step on the GPU.

    In half precision a step that overflows is left out and the loss scale halved, which would take
    in this batch's statistics twice: so each attempt begins anew.
    """
    for scale in LOSS_SCALES:
        net = build(network, width, shift=shift)
        training = OurTraining(net, data, find(RECIPE), len(data.train_y), precision, augment=False)
        training.set_loss_scale(scale)
        try:
            loss = training.epoch()
        except NonFiniteLossError:
            continue
        return _outcome(net, (training.weights, training.presences), loss)
    raise NonFiniteLossError(f"the gradients are infinite with a loss scale of {scale:g}")


def _outcome(net: Module, optimizers: Sequence[Any], loss: float) -> dict[str, list[np.ndarray]]:
    """The loss, the gradients as the optimisers have received them (after one step their momenta
    are multiples of them), and the batches' statistics."""
    weights, presences = (
        [to_numpy(state[optimizer.slots[0]]) for state in optimizer.state]
        for optimizer in optimizers
    )
    statistics = {k: v for k, v in net.state_dict().items() if "running" in k}
    outcome = {"loss": [np.array(loss)], "gradients": weights, "fluxes": presences}
    return outcome | ({"statistics": list(statistics.values())} if statistics else {})


def _relative_error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """‖found - expected‖ / ‖expected‖ over all the arrays together."""
    pairs = [(f.astype(np.float64), e) for f, e in zip(found, expected, strict=True)]
    off = sum(float(((f - e) ** 2).sum()) for f, e in pairs)
    return float(np.sqrt(off / sum(float((e.astype(np.float64) ** 2).sum()) for _, e in pairs)))


# -- the same bits -------------------------------------------------------------------------------


class EagerEpochs(GpuEpochs):
    """Epochs without recordings: every step runs as it is written."""

    def _step(self, batch: int, smoothing: float) -> None:
        self.training_step(batch, smoothing)


class EagerTraining(OurTraining):
    """Training without recordings."""

    def epochs_on(self, data: Dataset) -> GpuEpochs:
        return EagerEpochs(self.net, data, self.batch, self.augment, self.dtype)


def check_bits(size: Size, networks: Sequence[str] = ("vgg19", "resnet50")) -> Iterator[Check]:
    """Replayed graphs against steps as they are written, and a run against its repetition: not a
    bit may differ."""
    for network in networks:
        yield from guarded(f"{network}: bits", lambda n=network: _check_bits(n, size))  # type: ignore[misc]


def _check_bits(network: str, size: Size) -> Iterator[Check]:
    width = size.widths[0]
    # the last batch is smaller
    data = images_for(network, size.batch * size.steps - size.batch // 2)
    for precision in PRECISIONS:
        first, second, eager = (
            _trained(kind, build(network, width), data, size.batch, precision)
            for kind in (OurTraining, OurTraining, EagerTraining)
        )
        name = f"{network} x {width:g}, {precision}"
        yield Check(f"{name}: graph differs from eager", _different(first, eager), 0)
        yield Check(f"{name}: second run differs", _different(first, second), 0)


def _trained(
    kind: type[OurTraining], net: Module, data: Dataset, batch: int, precision: str
) -> dict[str, np.ndarray]:
    """Everything that two epochs leave behind."""
    training = kind(net, data, find(RECIPE), batch, precision)
    training.set_loss_scale(LOSS_SCALES[-1])
    losses = np.array([training.epoch() for _ in range(2)])
    optimizers = {"weights": training.weights, "presences": training.presences}
    state = {f"{role}.{k}": v for role, o in optimizers.items() for k, v in o.state_dict().items()}
    return training.net.state_dict() | state | {"losses": losses}


def _different(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """How many bytes differ."""
    different = 0
    for name, array in a.items():
        pair = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (array, b[name]))
        different += int(np.not_equal(*pair).sum())
    return float(different)


# -- all of it -----------------------------------------------------------------------------------


def check_everything(size: Size) -> Iterator[Check]:
    """All checks, one by one."""
    yield from check_operations()
    yield from check_steps(size)
    yield from check_bits(size)
