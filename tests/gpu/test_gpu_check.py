"""``bench.gpu_check`` and ``bench --device cuda``: on an emulated GPU, PyTorch's on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from support.functions import functions_of_the_package
from support.gpu import needs_compiler, needs_gpu

import minihyperflows as mh
from minihyperflows.bench import contenders, gpu_check, gpu_correctness
from minihyperflows.bench import gpu_rates as rates
from minihyperflows.bench import gpu_steps as gpu_bench
from minihyperflows.bench import table as bench_table
from minihyperflows.bench.gpu_correctness import SMALL, Check, Size, check_bits, check_steps
from minihyperflows.bench.gpu_steps import GpuBenchSettings
from minihyperflows.cli import main as cli
from minihyperflows.emulator import emulated_gpu
from minihyperflows.engine import ops, pooling
from minihyperflows.engine.gpu import loss
from minihyperflows.errors import UserError
from minihyperflows.related.pruners import MaskedWeight

needs_torch = pytest.mark.skipif(
    not contenders.torch_available(), reason="PyTorch is not installed"
)

TINY = {"batch": 4, "images": 10, "width": 1 / 32, "rounds": 1}


@pytest.fixture
def emulator():
    with emulated_gpu():
        yield


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(gpu_bench, "STEP_ROUNDS", 1)


# -- is it right? --------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
def test_operations_are_right(emulator):
    checks = list(gpu_correctness.check_operations())
    assert [check.line() for check in checks if not check.passed] == []
    assert len(checks) == 2 * len(gpu_correctness.CASES)


def test_every_operation_has_a_case():
    """But for those of experiments."""
    abstract = {ops.Elementwise, ops.Reduction, pooling.Pool2d, MaskedWeight}  # or for the CPU only
    known = {type(case.factory(np)) for case in gpu_correctness.CASES}
    rooms = {"engine", "functional", "nn", "flows", "related", "testing", "analysis"}
    defined = {f for f in functions_of_the_package() if f.__module__.split(".")[1] in rooms}
    assert defined - abstract == known


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("network", ["lenet300", "vgg19", "resnet20"])
def test_training_steps_are_right(emulator, network):
    checks = list(check_steps(SMALL, [network]))
    assert [check.line() for check in checks if not check.passed] == []
    assert {check.name.partition(": ")[2] for check in checks} >= {"loss", "gradients", "fluxes"}


@pytest.mark.slow
@needs_compiler
def test_graphs_and_repetitions_have_the_same_bits(emulator):
    checks = list(check_bits(replace(SMALL, batch=4, steps=2), ["vgg19"]))
    assert [(check.error, check.bound) for check in checks] == [(0, 0)] * 4


@pytest.mark.gpu
@needs_gpu
def test_everything_on_a_gpu():
    checks = list(gpu_correctness.check_everything(Size()))
    assert [check.line() for check in checks if not check.passed] == []


@needs_compiler
def test_a_wrong_kernel_is_found(emulator, monkeypatch):
    right = loss.cross_entropy_gradient

    def wrong(*arguments):
        return right(*arguments) * np.float32(1.001)

    monkeypatch.setattr(loss, "cross_entropy_gradient", wrong)
    cases = [c for c in gpu_correctness.CASES if c.name in ("CrossEntropy", "Negate")]
    monkeypatch.setattr(gpu_correctness, "CASES", cases)
    verdicts = {check.name: check.passed for check in gpu_correctness.check_operations()}
    assert verdicts["Negate (0), float32"]
    assert not verdicts["CrossEntropy (1), float32"]


def test_what_cannot_be_computed_has_failed():
    def raises():
        yield Check("first", 0.0, 1.0)
        raise ValueError("no\nsuch kernel")

    first, second = gpu_correctness.guarded("name", raises)
    assert first.passed
    assert not second.passed
    assert "FAIL name" in second.line()
    assert second.line().endswith("ValueError: no")
    assert second.to_json()["error"] is None


# -- how fast? -----------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
def test_the_command(emulator, tmp_path, capsys, monkeypatch):
    checks = [Check("good", 0.0, 0.0), Check("bad", 1.0, 0.5)]
    monkeypatch.setattr(gpu_check, "check_everything", lambda size: iter(checks))
    monkeypatch.setattr(gpu_check, "OURS", {"ours": "float16"})
    options = ["--emulate", "--no-torch", "--networks", "vgg19", "--out", str(tmp_path)]
    assert gpu_check.main(options) == 1  # one check is bad
    printed = capsys.readouterr().out
    for words in ("FAIL bad", "2 checks, 1 failed", "GB/s", "TFLOP/s", "here, float16", "update"):
        assert words in printed
    record = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))
    assert set(record["parts"]) == {*gpu_check.PARTS[:4], "training"}
    assert [check["passed"] for check in record["correctness"]] == [True, False]
    kernels = {row["kernel"].partition("<")[0]: row for row in record["kernels"][0]["kernels"]}
    assert {"load_batch", "channel_statistics", "im2col", "max_pool", "update"} <= set(kernels)
    (network,) = record["training"]["networks"]
    assert set(network["steps"]["medians"]) == set(network["contenders"]) == set(gpu_bench.OURS)
    assert network["epochs"]["medians"]["ours"]["seconds"] > 0


@needs_compiler
def test_a_part_that_fails_does_not_stop_the_others(emulator, tmp_path, capsys, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu_check, "measure_bandwidth", fails)
    options = ["--emulate", "--no-torch", "--out", str(tmp_path), "--only", "bandwidth,gemm"]
    assert gpu_check.main(options) == 1
    assert "FAIL bandwidth: RuntimeError: out of luck" in capsys.readouterr().out
    record = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))
    assert record["gemm"][0]["teraflops"] > 0
    assert gpu_check.main([*options, "--seconds", "0"]) == 0
    assert "gemm: skipped" in capsys.readouterr().out


@pytest.mark.skipif(mh.cuda_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [
        lambda: gpu_check.main([]),
        lambda: cli(["bench", "--device", "cuda"]),
    ],
)
def test_without_a_gpu_there_is_one_line_and_status_2(command, capsys):
    assert command() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no GPU is available: install CuPy")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda", "--layers"], "--layers is for --device cpu"),
        (["--data-dir", "x"], "--data-dir is for --device cuda"),
        (["lenet300", "--device", "cuda"], "unknown network 'lenet300' on a GPU"),
        (["--device", "cuda", "--rounds", "0"], "--rounds: it is a whole number from 1"),
        (["--device", "cuda", "--images", "5"], "5 images are less than a batch of 128"),
    ],
)
def test_mistakes_get_one_line(arguments, words, capsys):
    assert cli(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.slow
@needs_compiler
def test_bench_on_a_gpu(emulator, tmp_path, capsys):
    file = tmp_path / "record.json"
    options = ["--batch", "4", "--images", "10", "--width", "0.03125", "--rounds", "1"]
    command = ["bench", "vgg19", "--device", "cuda", "--no-torch", *options, "--json", str(file)]
    assert cli(command) == 0
    assert "vgg19, batch 4, width 0.03125" in capsys.readouterr().out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["command"].startswith("minihyperflows bench vgg19 --device cuda --rounds 1")
    assert len(record["networks"][0]["epochs"]["samples"]["ours"]["seconds"]) == 1


def test_ratios_are_medians_within_rounds():
    samples = {"ours": {"seconds": [1.0, 2.0, 8.0]}, "torch_graph": {"seconds": [4.0, 4.0, 4.0]}}
    found = gpu_bench.summary(samples)
    assert found["ratios"] == {"torch_graph": 2.0}
    assert found["medians"]["ours"] == {"seconds": 2.0}


def test_bytes_of_kernels():
    def array(*shape, dtype=np.float16):
        return np.zeros(shape, dtype)

    x, columns = array(2, 8, 8, 4), array(2 * 4 * 4, 4)
    launch = rates.Launch(None, "im2col<__half, 4>", 1, 1, (x, columns, 8, np.int64(3)))
    assert launch.bytes == 2 * columns.nbytes  # a quarter of x
    assert replace(launch, kernel="normalise<float, 1>").bytes == x.nbytes + columns.nbytes
    flat, table = array(6, dtype=np.float32), array(1, dtype=np.int32)
    arguments = (table, *[flat] * 7, array(6), table)
    update = rates.Launch(None, "update<__half, 0, 1>", 1, 1, arguments)
    assert update.bytes == 6 * (6 * 8 + 4 + 2)
    product = rates.Product(2, 3, 5, out_dtype="float32")
    assert (product.flops, product.bytes) == (60, 2 * 25 + 4 * 6)


# -- PyTorch's side, on the CPU ------------------------------------------------------------------


@pytest.fixture
def one_thread():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


@pytest.mark.slow
@needs_torch
@needs_compiler
def test_beside_pytorch(emulator, one_thread):
    lines, saved = [], []
    names = ("ours", "torch_amp_channels_last", "torch_graph", "torch_compile")
    options = {"torch_device": "cpu", "compiler": {"backend": "eager"}, "contenders": names}
    settings = GpuBenchSettings(("vgg19",), **TINY, **options)
    record = gpu_bench.measure_on_gpu(settings, lines.append, lambda r: saved.append(str(r)))
    (entry,) = record["networks"]
    errors = {name: c["error"] for name, c in entry["contenders"].items() if "error" in c}
    if not one_thread.cuda.is_available():  # the others go on
        assert list(errors) == ["torch_graph"]
    assert set(entry["epochs"]["medians"]) == set(names) - set(errors)
    assert json.loads(json.dumps(record)) == record
    assert len(saved) > len(names)
    assert "PyTorch AMP, compiled" in bench_table.gpu_table(record)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("memory_format", contenders.FORMATS)
def test_pytorchs_gradients_are_those_of_the_cpu_benchmark(one_thread, memory_format):
    from minihyperflows.bench import steps as bench
    from minihyperflows.bench import torch_gpu_peers, torch_peers

    settings = bench.BenchSettings(batch=4, width=1 / 16)
    cpu = bench.torch_step("vgg19", memory_format, settings)
    twin = torch_peers.vgg19(width=1 / 16)
    torch_peers.attach(twin, bench.PRESENCE)
    twin.load_state_dict(cpu.net.state_dict())
    data = gpu_bench.cifar_like(8)
    options = {"half": False, "device": "cpu"}
    recipe = gpu_bench.find("vgg19-cifar10")
    other = torch_gpu_peers.Training(
        twin, data, recipe, 4, bench.LR, bench.GAMMA, memory_format, **options
    )
    loss = cpu.gradients()
    pressure = bench.GAMMA * torch_peers.pressure(cpu.presences).item()
    assert other.gradients(cpu.x, cpu.labels).item() == pytest.approx(loss - pressure, rel=1e-5)
    for expected, found in zip(cpu.net.parameters(), twin.parameters(), strict=True):
        np.testing.assert_allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-9)


@needs_torch
def test_pytorch_crops_and_flips(one_thread):
    from minihyperflows.bench import torch_gpu_peers

    data = gpu_bench.cifar_like(20)
    images = torch_gpu_peers.Images(data, one_thread.device("cpu"))
    images.shuffle()
    x, labels = images.batch(one_thread.arange(20))
    order, top, left, flip = (
        a.numpy() for a in (images._order, images._top, images._left, images._flip)
    )
    assert sorted(order) == list(range(20))
    assert set(flip) == {0, 1}
    for n in range(20):
        padded = np.pad(data.train_x[order[n]], ((4, 4), (4, 4), (0, 0)))
        crop = padded[top[n] : top[n] + 32, left[n] : left[n] + 32]
        crop = crop[:, ::-1] if flip[n] else crop
        expected = (crop / 255 - 0.5) / 0.25
        np.testing.assert_allclose(x[n].permute(1, 2, 0), expected, atol=1e-5)
    np.testing.assert_array_equal(labels, data.train_y[order])


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("half", [False, True])
def test_pytorch_learns(one_thread, half):
    import torch

    from minihyperflows.bench import torch_gpu_peers, torch_peers

    torch.manual_seed(0)  # the first weights; with any of six seeds the loss fell by 0.17 or more
    data = gpu_bench.cifar_like(20)
    brightness = (data.train_y * 20).astype(np.uint8)[:, None, None, None]
    data = replace(data, train_x=data.train_x // 8 + brightness)  # there is something to learn
    net = torch_peers.vgg19(width=1 / 16)
    torch_peers.attach(net, (0.2, 0.5))
    recipe = gpu_bench.find("vgg19-cifar10")
    training = torch_gpu_peers.Training(
        net, data, recipe, 8, 0.01, 1.0, "channels_last", half, device="cpu"
    )
    training.prepare()
    losses = [training.epoch() for _ in range(10)]  # with a smaller last batch
    assert losses[-1] < losses[0]
    assert 0 <= training.evaluate() <= 1


def test_unknown_names():
    with pytest.raises(UserError, match="unknown contender 'nobody'"):
        GpuBenchSettings(contenders=("nobody",))
