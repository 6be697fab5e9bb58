"""``minihyperflows bench``: the record, the table, and that both sides do the same work."""

import json
import subprocess
import sys

import numpy as np
import pytest
from support.lanes import large

from minihyperflows import flows, models
from minihyperflows.bench import layers as bench_layers
from minihyperflows.bench import machine
from minihyperflows.bench import steps as bench
from minihyperflows.bench.contenders import (
    FORMATS,
    faster_format,
    ratio,
    take_turns,
    torch_available,
)
from minihyperflows.bench.steps import BenchSettings, measure
from minihyperflows.bench.table import table
from minihyperflows.cli import main
from minihyperflows.engine import conv

needs_torch = pytest.mark.skipif(not torch_available(), reason="PyTorch is not installed")

HEAD = {
    *("date", "commit", "command", "versions", "threads", "cpu", "cores", "load", "blas"),
    *("environment", "networks", "layers"),
}
NETWORK = {
    *("network", "width", "batch", "milliseconds", "torch_format", "ratio", "samples", "memory"),
    "memory_ratio",
}
LAYER = {
    *("network", "count", "images", "weight", "stride", "padding", "groups", "way"),
    *("torch_format", "times"),
}
TORCH = {f"torch_{memory_format}" for memory_format in FORMATS}


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr("minihyperflows.bench.contenders.SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr("minihyperflows.bench.contenders.PAUSE_SECONDS", 0)


# -- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_our_figures_alone(tmp_path, capsys):
    file = tmp_path / "record.json"
    options = ["--no-torch", "--batch", "2", "--rounds", "2", "--width", "0.05", "--layers"]
    assert main(["bench", "lenet300", "vgg19", *options, "--json", str(file)]) == 0
    printed = capsys.readouterr()
    assert "lenet300, batch 2" in printed.out
    assert "(chosen)" in printed.out
    assert "torch" not in printed.out.lower()
    assert "vgg19, batch 2: round 2 of 2" in printed.err
    record = json.loads(file.read_text(encoding="utf-8"))
    assert set(record) == HEAD
    assert record["versions"]["torch"] is None
    assert record["command"].startswith("minihyperflows bench lenet300 vgg19 --rounds 2")
    assert set(record["environment"]) == set(machine.VARIABLES)
    assert {"library", "version", "core_type", "threads"} == set(record["blas"][0])
    lenet, vgg = record["networks"]
    assert set(lenet) == set(vgg) == NETWORK
    assert (lenet["width"], vgg["width"]) == (None, 0.05)
    for entry in (lenet, vgg):
        assert set(entry["milliseconds"]) == set(entry["samples"]) == {"ours"}
        assert len(entry["samples"]["ours"]) == 2
        assert entry["ratio"] is entry["torch_format"] is entry["memory_ratio"] is None
    assert all(set(layer) == LAYER for layer in record["layers"])
    assert {layer["network"] for layer in record["layers"]} == {"vgg19"}
    assert sum(layer["count"] for layer in record["layers"]) == 16  # VGG-19 has 16 convolutions


@pytest.mark.slow
@needs_torch
def test_beside_pytorch():
    lines = []
    settings = BenchSettings(("vgg19",), layers=True, rounds=1, batch=2, width=0.02)
    record = measure(settings, lines.append)
    (entry,) = record["networks"]
    assert set(entry["milliseconds"]) == set(entry["memory"]) == {"ours", *TORCH}
    rival = f"torch_{entry['torch_format']}"
    assert rival == min(TORCH, key=entry["milliseconds"].get)
    milliseconds = entry["milliseconds"]
    assert entry["ratio"] == pytest.approx(milliseconds[rival] / milliseconds["ours"])  # one round
    first, *_, last = record["layers"]
    assert set(first["times"]) == {*conv.WAYS, *TORCH}
    assert first["way"] in conv.WAYS
    assert last["times"][rival]["backward"]["gflops"] > 0
    assert lines[0] == "vgg19, batch 2: memory"
    assert "x" in table(record)
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["alexnet"], ["unknown network 'alexnet'", "lenet300, vgg19, resnet50"]),
        (["--rounds", "0"], ["--rounds: it is a whole number from 1"]),
        (["--batch", "-1"], ["batch"]),
        (["--width", "nan"], ["width"]),
        (["--threads", "0"], ["threads"]),
        (["--json", "nowhere/x.json"], ["no folder nowhere"]),
    ],
)
def test_mistakes_get_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.mark.slow
def test_the_table_says_what_spoils_or_misses_a_measurement(monkeypatch):
    monkeypatch.setattr("minihyperflows.bench.steps.torch_available", lambda: False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    record = measure(BenchSettings(("lenet300",), rounds=1, batch=2)) | {"load": 7.0, "cores": 2}
    text = table(record)
    assert "PyTorch is not installed" in text
    assert "warning: OPENBLAS_CORETYPE=Haswell is set" in text
    assert "warning: the machine is busy (load 7.0 on 2 cores)" in text
    quiet = table(record | {"load": None, "environment": {"OPENBLAS_CORETYPE": None}})
    assert "warning" not in quiet


@pytest.mark.slow
def test_the_command_line_does_not_load_pytorch():
    code = "import sys, minihyperflows.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- the clock and the memory --------------------------------------------------------------------


def test_contenders_take_turns():
    calls = []

    def contender(name, *seconds):
        def run():
            calls.append(name)
            return seconds

        return run

    samples = take_turns({"a": contender("a", 1.0, 2.0), "b": contender("b", 3.0)}, 2, print)
    assert calls == ["a", "a", "b", "b", "a", "b", "a", "b"]  # twice to warm up, then in turn
    np.testing.assert_array_equal(samples["a"], [[1000, 2000], [1000, 2000]])
    np.testing.assert_array_equal(samples["b"], [[3000], [3000]])


def test_the_ratio_is_the_median_of_the_ratios_within_rounds():
    samples = {"ours": np.array([[1.0], [2.0], [8.0]]), "torch_contiguous": np.full((3, 1), 4.0)}
    assert ratio(samples, "contiguous") == 2
    assert ratio(samples, None) is None
    assert faster_format({"ours": 1.0}) is None
    both = {"ours": 1.0, "torch_contiguous": 3.0, "torch_channels_last": 2.0}
    assert faster_format(both) == "channels_last"


@pytest.mark.slow
@pytest.mark.skipif(machine.peak_memory() is None, reason="this system does not tell")
def test_memory_of_a_step_is_that_of_a_fresh_process():
    ballast = np.ones(50_000_000)  # 400 MB, which a child on Linux inherits in getrusage's number
    found = bench.fresh_step_memory("ours", "lenet300", BenchSettings(batch=2))
    assert 3e6 < found["increase"] < found["peak"] < ballast.nbytes


@pytest.mark.slow
def test_a_process_that_fails_is_reported_in_one_line():
    with pytest.raises(bench.UserError, match=r"memory of nonsense \(ours\): AttributeError"):
        bench.fresh_step_memory("ours", "nonsense", BenchSettings(batch=2))


def test_systems_without_getrusage_have_no_memory_figures(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)  # makes its import fail
    assert machine.peak_memory() is None
    assert bench.step_memory("ours", "lenet300", BenchSettings(batch=2)) is None


def test_every_system_has_a_cpu():
    assert machine.cpu_model()


# -- the same work -------------------------------------------------------------------------------


def test_distinct_convolutions_of_the_networks():
    net = models.vgg19(width=0.05, rng=np.random.default_rng(0))
    shapes = bench_layers.distinct_convolutions(net, (8, 32, 32, 3))
    assert (len(shapes), sum(shapes.values())) == (9, 16)
    first = next(iter(shapes))
    assert first.first
    assert first.flops == (2 * 8 * 32 * 32 * 3 * 27, 2 * 8 * 32 * 32 * 3 * 27)
    net = models.resnet50(width=0.05, rng=np.random.default_rng(0))
    shapes = bench_layers.distinct_convolutions(net, (8, 32, 32, 3))
    assert sum(shapes.values()) == 53
    assert all(shape.flops[1] == 2 * shape.flops[0] for shape in [*shapes][1:])


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("network", ["lenet300", "vgg19", *large("resnet50")])
def test_both_sides_compute_the_same_step(network, memory_format):
    """The loss and the norms of gradients to 1e-4, and the loss after a step of both optimisers.

    ResNet-50's loss after a step depends on the order in which a sum is added up, in PyTorch too;
    see ``test_torch_networks.py``.
    """
    settings = BenchSettings(batch=8, width=0.25)
    ours = bench.our_step(network, settings)
    theirs = bench.torch_step(network, memory_format, settings)
    import torch

    state = {name: torch.from_numpy(value) for name, value in ours.net.state_dict().items()}
    theirs.net.load_state_dict(state)  # strict: the same names and shapes, presences too
    assert 0.4 < flows.density(ours.net) < 0.6
    assert ours.gradients() == pytest.approx(theirs.gradients(), rel=1e-4)
    found, expected = gradient_norms(ours), gradient_norms(theirs)
    assert found == pytest.approx(expected, rel=1e-4)
    ours()
    theirs()
    if network != "resnet50":
        assert ours.gradients() == pytest.approx(theirs.gradients(), rel=1e-4)


def gradient_norms(step):
    """Of the last layer's weight and presence: little round-off has gathered there."""
    parameters = dict(step.net.named_parameters())
    if isinstance(step, bench.TrainingStep):
        parameters |= flows.presences(step.net)
    names = [name.removesuffix(".presence") for name in parameters if name.endswith(".presence")]
    wanted = [f"{names[-1]}.weight", f"{names[-1]}.presence"]
    return [float(np.linalg.norm(np.asarray(parameters[name].grad))) for name in wanted]


@needs_torch
@pytest.mark.parametrize("memory_format", FORMATS)
def test_both_sides_compute_the_same_convolution(memory_format, rng):
    from minihyperflows.bench import torch_peers

    x, weight = rng.standard_normal((2, 8, 8, 4)), rng.standard_normal((6, 3, 3, 4))
    settings = (x, weight, (1, 1), (1, 1), 1, True)
    ours = bench_layers.Convolution(*settings, "im2col")
    theirs = torch_peers.Convolution(*settings, memory_format)
    y, twin = ours.forward(), theirs.forward()
    ours.backward(y)
    theirs.backward(twin)
    for found, expected in (
        (y.data, twin.detach()),
        (ours.x.grad, theirs.x.grad),
        (ours.weight.grad, theirs.weight.grad),
    ):
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), rtol=1e-9)


def test_an_interrupted_bench_does_not_promise_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("minihyperflows.cli.measure", interrupted)
    assert main(["bench", "lenet300"]) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line == "interrupted: run it again for the whole table"
