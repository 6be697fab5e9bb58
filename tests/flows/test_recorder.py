"""Flux, flips and regrowths as the recorder counts them."""

import numpy as np
import pytest

from minihyperflows import flows, models, nn
from minihyperflows import functional as F


@pytest.fixture
def net():
    rng = np.random.default_rng(0)
    net = models.lenet300(in_features=6, num_classes=3, rng=rng, dtype=np.float64)
    flows.attach(net, init=(-0.5, 0.5), rng=rng)
    return net


def test_flips_and_regrowths_by_hand(net):
    t = net.fc3.presence.data
    t[...] = 1.0
    t[0, :4] = -1.0
    recorder = flows.FlowRecorder(net)
    t[0, :3] = 0.0  # three come back
    t[1, :2] = -1e-9  # two leave
    recorder.observe_step()
    t[1, 0] = 2.0  # one of them returns
    recorder.observe_step()
    recorder.observe_step()  # nothing
    layer = recorder.take()["fc3"]
    assert (layer.flips, layer.regrowths) == (6, 4)
    assert layer.density == (300 - 2) / 300
    assert recorder.density == pytest.approx(flows.density(net))
    assert recorder.take()["fc3"].flips == 0


@pytest.mark.parametrize("floor", [None, 0.1, -0.2])
@pytest.mark.parametrize("gamma", [0.0, 3.0])
def test_flux_is_a_quarter_of_w_times_the_gradient_of_the_weight_in_use(net, gamma, floor):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((5, 6)), rng.integers(0, 3, 5)
    # the gradient with respect to the weight in use, from a dense copy of the pruned network
    dense = models.lenet300(in_features=6, num_classes=3, rng=rng, dtype=np.float64)
    masks = {k.removesuffix(".presence"): p.data >= 0 for k, p in flows.presences(net).items()}
    weights = {k: p for k, p in net.named_parameters().items()}
    for name, p in dense.named_parameters().items():
        mask = masks[name.removesuffix(".weight")] if name.endswith(".weight") else 1
        p.data = weights[name].data * mask
    F.cross_entropy(dense(x), y).backward()

    loss = F.cross_entropy(net(x), y)
    (loss + gamma * flows.pressure(net, floor)).backward()
    recorder = flows.FlowRecorder(net)
    recorder.observe_flux(gamma, floor)
    report = recorder.take()
    for name, mask in masks.items():
        gradient = dict(dense.named_parameters())[f"{name}.weight"].grad
        flux = np.abs(0.25 * weights[f"{name}.weight"].data * gradient)
        assert report[name].flux_present == pytest.approx(flux[mask].mean(), rel=1e-9)
        assert report[name].flux_removed == pytest.approx(flux[~mask].mean(), rel=1e-9)


def test_an_unused_layer_has_no_flux():
    rng = np.random.default_rng(0)
    net = models.lenet300(in_features=6, num_classes=3, rng=rng, dtype=np.float64)
    net.unused = nn.Linear(4, 4, rng=rng, dtype=np.float64)
    net.frozen = nn.Linear(4, 4, rng=rng, dtype=np.float64)
    flows.attach(net, init=(-0.5, 0.5), rng=rng)
    net.frozen.presence.requires_grad = False
    recorder = flows.FlowRecorder(net)
    F.cross_entropy(net(rng.standard_normal((5, 6))), [0, 1, 2, 0, 1]).backward()
    recorder.observe_flux()
    report = recorder.take()
    assert (report["unused"].flux_present, report["unused"].flux_removed) == (0, 0)
    assert np.isnan(report["frozen"].flux_present)
    assert report["fc1"].flux_present > 0 < report["fc1"].flux_removed


def test_misuse(net):
    with pytest.raises(ValueError, match="after backward"):
        flows.FlowRecorder(net).observe_flux()
    flows.detach(net)
    with pytest.raises(ValueError, match="no gates"):
        flows.FlowRecorder(net)
