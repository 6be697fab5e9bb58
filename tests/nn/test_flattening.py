"""Weights behind flattened maps: PyTorch's order and ours."""

import warnings

import numpy as np
import pytest

from minihyperflows import DoubtfulResultWarning, ShapeError, nn
from minihyperflows.engine import Tensor, no_grad


def network(rng, bias=True):
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=bias, rng=rng, dtype=np.float64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 3 * 4, 7, rng=rng, dtype=np.float64),
        nn.ReLU(),
        nn.Linear(7, 3, rng=rng, dtype=np.float64),
    )


def test_each_weight_goes_with_its_pixel(rng):
    """Element by element: PyTorch's column c H W + h W + w is our column h W C + w C + c."""
    channels, height, width = 3, 4, 5
    theirs = rng.standard_normal((2, channels * height * width))
    ours = nn.from_torch_flatten(theirs, channels)
    for c, h, w in np.ndindex(channels, height, width):
        column = (c * height + h) * width + w
        assert (ours[:, (h * width + w) * channels + c] == theirs[:, column]).all()
    assert (nn.to_torch_flatten(ours, channels) == theirs).all()


@pytest.mark.parametrize(("shape", "channels"), [((2, 7), 3), ((6,), 3), ((2, 6), 0)])
def test_what_reads_no_maps(shape, channels):
    for turn in (nn.from_torch_flatten, nn.to_torch_flatten):
        with pytest.raises(ShapeError, match="does not read flattened maps"):
            turn(np.zeros(shape), channels)


def test_a_state_of_pytorch_with_a_flattened_map(rng):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(2, 5, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(5 * 3 * 4, 7),
        torch.nn.ReLU(),
        torch.nn.Linear(7, 3),
    ).double()
    x = rng.standard_normal((4, 5, 6, 2))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    ours, state = network(rng), theirs.state_dict()
    with pytest.warns(DoubtfulResultWarning, match=r"^3\.weight .*channels=5\)") as told:
        ours.load_state_dict(state)
    assert len(told) == 1
    with no_grad():
        assert abs(ours(Tensor(x)).data - expected).max() > 0.01  # what the warning is about
    right = state | {"3.weight": nn.from_torch_flatten(state["3.weight"], channels=5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(right)
    with no_grad():
        np.testing.assert_allclose(ours(Tensor(x)).data, expected, rtol=1e-12)


@pytest.mark.filterwarnings("error")
def test_no_word_where_the_orders_agree(rng):
    torch = pytest.importorskip("torch")
    net = network(rng)
    net.load_state_dict(net.state_dict())  # ours
    one_pixel = nn.Sequential(
        nn.Conv2d(2, 5, 3, rng=rng),
        nn.Flatten(),
        nn.Linear(5, 4, rng=rng),
        nn.Linear(4, 8, rng=rng),
    )
    state = {name: torch.from_numpy(array) for name, array in one_pixel.state_dict().items()}
    one_pixel.load_state_dict(state)
    for name in ("vgg19", "resnet50", "mobilenet_v2"):
        model = getattr(nn.models, name)(width=0.05, rng=rng)
        model.load_state_dict({k: torch.from_numpy(v) for k, v in model.state_dict().items()})
    lenet = nn.models.lenet300(rng=rng)
    lenet.load_state_dict({k: torch.from_numpy(v) for k, v in lenet.state_dict().items()})
