"""The device is a property of the data: networks, gates and flows on a GPU, and clear errors."""

from __future__ import annotations

import numpy as np
import pytest
from support.lanes import large

import minihyperflows as mh
from minihyperflows import Tensor, flows, models, nn
from minihyperflows import functional as F
from minihyperflows.engine.backend import device_of, to_device, to_numpy
from minihyperflows.flows.stages import land

MODELS = {
    "lenet300": lambda rng: models.lenet300(in_features=48, rng=rng),
    "vgg13": lambda rng: models.vgg13(width=0.05, rng=rng),
    "vgg19": lambda rng: models.vgg19(width=0.05, rng=rng),
    "resnet20": lambda rng: models.resnet(20, width=0.2, rng=rng),
    "resnet50": lambda rng: models.resnet50(width=0.03, stem_stride=4, rng=rng),
    "mobilenet_v1": lambda rng: models.mobilenet_v1(width=0.1, rng=rng),
}


def build(name: str) -> nn.Module:
    net = MODELS[name](np.random.default_rng(0))
    flows.attach(net, init=(-0.2, 0.5), rng=np.random.default_rng(1))
    return net


def batch_for(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng, size = np.random.default_rng(2), 4 if name == "lenet300" else 32
    x = rng.normal(0, 1, (4, size, size, 3)).astype(np.float32)
    return x, rng.integers(0, 10, 4)


def backward(net: nn.Module, x: np.ndarray, y: np.ndarray, device: str) -> float:
    loss = F.cross_entropy(net(to_device(x, device)), to_device(y, device), 0.1)
    (loss + 3.0 * flows.pressure(net, floor=-0.1)).backward()
    return loss.item()


@pytest.mark.parametrize("name", ["lenet300", *large(*sorted({*MODELS} - {"lenet300"}))])
def test_every_model_and_its_gates_run_on_both(gpu, name):
    x, y = batch_for(name)
    ours, theirs = build(name).to("cuda"), build(name)
    assert {t.device for t in ours.named_tensors().values()} == {"cuda"}
    losses = [backward(net, x, y, d) for net, d in ((ours, "cuda"), (theirs, "cpu"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    on_cpu, pairs = theirs.named_tensors(), []
    for key, tensor in ours.named_tensors().items():
        assert (tensor.grad is None) == (on_cpu[key].grad is None)
        if tensor.grad is not None:
            assert device_of(tensor.grad) == "cuda"
            pairs.append((to_numpy(tensor.grad).ravel(), on_cpu[key].grad.ravel()))
    found, wanted = (np.concatenate(side) for side in zip(*pairs, strict=True))
    # Single precision: where a ReLU's input is next to 0, the two may differ about its sign.
    assert np.linalg.norm(found - wanted) < 2e-3 * np.linalg.norm(wanted)


def test_what_flows_measures_and_does_is_the_same_on_both(gpu):
    results = []
    for device in ("cpu", "cuda"):
        net = build("lenet300").to(device)
        recorder = flows.FlowRecorder(net)
        x, y = batch_for("lenet300")
        backward(net, x, y, device)
        recorder.observe_flux(3.0, -0.1)
        for t in flows.presences(net).values():
            t.data -= 0.05
        recorder.observe_step()
        report = recorder.take()
        measured = [flows.density(net), *flows.layer_density(net).values()]
        measured += [v for layer in report.values() for v in vars(layer).values()]
        measured += [land(net, 0.4), flows.density(net)]
        flows.to_dense(net)
        measured += [float((w.numpy() == 0).mean()) for w in net.parameters()]
        results.append(measured)
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4)


def test_gates_can_be_attached_on_a_gpu(gpu):
    ours, theirs = (MODELS["lenet300"](np.random.default_rng(0)) for _ in range(2))
    ours.to("cuda")
    for net in (ours, theirs):
        flows.attach(net, rng=np.random.default_rng(1))
    for name, t in flows.presences(ours).items():
        assert t.device == "cuda"
        assert (t.numpy() == flows.presences(theirs)[name].data).all()
    ours.load_state_dict(theirs.state_dict())
    assert {t.device for t in ours.named_tensors().values()} == {"cuda"}


def test_mixing_devices_is_one_sentence(gpu):
    net, (x, y) = build("lenet300").to("cuda"), batch_for("lenet300")
    with pytest.raises(mh.DeviceError, match=r"Linear: inputs on different devices .*: move one"):
        net(x)
    with pytest.raises(mh.DeviceError, match="labels and logits lie on different devices"):
        F.cross_entropy(net(to_device(x, "cuda")), y)
    leaf = Tensor(np.ones(3), requires_grad=True)
    with pytest.raises(mh.DeviceError, match="Multiply: inputs on different devices"):
        leaf * leaf.to("cuda")
    images = to_device(x, "cuda")
    with pytest.raises(mh.DeviceError, match="batch_norm: running_mean lies on the cpu device"):
        F.batch_norm(Tensor(images), running_mean=np.zeros(3), training=True)


def test_there_and_back(gpu):
    net = build("vgg13")
    before = net.state_dict()
    net.to("cuda").to("cuda").to("cpu")
    for name, array in net.state_dict().items():
        assert (array == before[name]).all()
        assert array.dtype == before[name].dtype
    x = Tensor(np.arange(3.0), requires_grad=True)
    (x.to("cuda") * 2.0).sum().backward()
    assert x.grad is None  # a copy is a leaf of its own
