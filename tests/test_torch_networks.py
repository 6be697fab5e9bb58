"""Whole networks against PyTorch: same weights, same batch, same loss, the same gradients."""

import numpy as np
import pytest

from minihyperflows import functional as F
from minihyperflows import models
from minihyperflows.nn.models.resnet import BasicBlock, Bottleneck
from minihyperflows.nn.models.vgg import VGG19

torch = pytest.importorskip("torch")
tnn = torch.nn
tF = torch.nn.functional  # noqa: N816 - as everybody writes it


# -- the same networks in PyTorch, with torchvision's names -----------------------------------------


class TorchLeNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            tnn.Linear(784, 300),
            tnn.Linear(300, 100),
            tnn.Linear(100, 10),
        )

    def forward(self, x):
        x = torch.relu(self.fc1(x.permute(0, 2, 3, 1).flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


class TorchVGG(tnn.Module):
    def __init__(self, plan, width):
        super().__init__()
        layers, channels = [], 3
        for item in plan:
            if item == "M":
                layers.append(tnn.MaxPool2d(2))
                continue
            out = round(item * width)
            layers += [tnn.Conv2d(channels, out, 3, padding=1, bias=False)]
            layers += [tnn.BatchNorm2d(out), tnn.ReLU()]
            channels = out
        self.features = tnn.Sequential(*layers)
        self.classifier = tnn.Linear(channels, 10)

    def forward(self, x):
        return self.classifier(tF.avg_pool2d(self.features(x), 2).flatten(1))


def torch_block(expansion):
    class Block(tnn.Module):
        def __init__(self, channels, width, stride):
            super().__init__()
            out = width * expansion
            sizes = [(channels, width, 3, stride), (width, out, 3, 1)]
            if expansion == 4:
                sizes = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
            self.n = len(sizes)
            for i, (a, b, size, s) in enumerate(sizes, start=1):
                setattr(self, f"conv{i}", tnn.Conv2d(a, b, size, s, size // 2, bias=False))
                setattr(self, f"bn{i}", tnn.BatchNorm2d(b))
            self.downsample = None
            if stride != 1 or channels != out:
                projection = tnn.Conv2d(channels, out, 1, stride, bias=False)
                self.downsample = tnn.Sequential(projection, tnn.BatchNorm2d(out))

        def forward(self, x):
            y = x
            for i in range(1, self.n + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = torch.relu(y) if i < self.n else y
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    return Block


class TorchResNet(tnn.Module):
    def __init__(self, block, expansion, stages, width):
        super().__init__()
        channels = round(stages[0][1] * width)
        self.conv1 = tnn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = tnn.BatchNorm2d(channels)
        for number, (blocks, stage_channels) in enumerate(stages, start=1):
            out, layers = round(stage_channels * width), []
            for i in range(blocks):
                layers.append(block(channels, out, 2 if number > 1 and i == 0 else 1))
                channels = out * expansion
            setattr(self, f"layer{number}", tnn.Sequential(*layers))
        self.stages = len(stages)
        self.fc = tnn.Linear(channels, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


def twins(name, rng, dtype):
    """The package's network, PyTorch's, and the shape of an image."""
    if name == "lenet300":
        return models.lenet300(rng=rng, dtype=dtype), TorchLeNet(), (28, 28, 1)
    if name == "vgg19":
        return models.vgg19(width=0.25, rng=rng, dtype=dtype), TorchVGG(VGG19, 0.25), (32, 32, 3)
    if name == "resnet20":
        stages = ((3, 16), (3, 32), (3, 64))
        twin = TorchResNet(torch_block(BasicBlock.expansion), BasicBlock.expansion, stages, 1)
        return models.resnet(20, rng=rng, dtype=dtype), twin, (32, 32, 3)
    stages = ((3, 64), (4, 128), (6, 256), (3, 512))
    twin = TorchResNet(torch_block(Bottleneck.expansion), Bottleneck.expansion, stages, 0.25)
    return models.resnet50(width=0.25, rng=rng, dtype=dtype), twin, (32, 32, 3)


def to_torch(array):
    """(N, H, W, C) -> a torch tensor (N, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def torch_gradient(parameter):
    return parameter.grad.numpy()


def our_gradient(parameter):
    """In PyTorch's layout."""
    return parameter.grad if parameter.torch_axes is None else parameter.grad.transpose(0, 3, 1, 2)


def relative_error(found, expected):
    """The largest difference, relative to the largest entry."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", ["lenet300", "vgg19", "resnet20", "resnet50"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-4)])
def test_gradients_of_whole_networks_are_those_of_pytorch(name, dtype, tolerance):
    """Training mode, label smoothing, the state dict loaded as it is; then the running statistics."""
    rng = np.random.default_rng(7)
    net, twin, shape = twins(name, rng, dtype)
    state = {k: torch.from_numpy(v) for k, v in net.state_dict().items()}
    twin.to(torch.float64 if dtype == np.float64 else torch.float32)
    twin.load_state_dict(state)  # strict: the same names and shapes
    # Batches of 16: with fewer samples batch norm on the last maps of 2 x 2 pixels is ill
    # conditioned, and float32 rounding of either library shows.
    x, y = rng.standard_normal((16, *shape)).astype(dtype), rng.integers(0, 10, 16)

    loss = F.cross_entropy(net(x), y, label_smoothing=0.1)
    loss.backward()
    expected = tF.cross_entropy(twin(to_torch(x)), torch.from_numpy(y), label_smoothing=0.1)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    ours = net.named_parameters()
    assert set(ours) == {k for k, _ in twin.named_parameters()}
    errors = {
        k: relative_error(our_gradient(ours[k]), torch_gradient(p))
        for k, p in twin.named_parameters()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"
    for key, value in twin.state_dict().items():
        assert relative_error(net.state_dict()[key] + 1e-30, value.numpy() + 1e-30) < tolerance, key


def test_a_state_dict_of_pytorch_loads_as_it_is():
    """The other way: PyTorch's weights in our network give PyTorch's outputs."""
    net, twin, shape = twins("resnet20", np.random.default_rng(0), np.float32)
    net.load_state_dict(twin.state_dict())
    x = np.random.default_rng(1).standard_normal((4, *shape)).astype(np.float32)
    net.eval()
    twin.eval()
    with torch.no_grad():
        expected = twin(to_torch(x)).numpy()
    np.testing.assert_allclose(net(x).numpy(), expected, rtol=1e-3, atol=1e-4)
