"""``python -m minihyperflows.bench.gpu_check``: is the GPU's code right, and how fast is it?

Parts, one after another: is every operation and every network's training step right
(``correctness``); what the card can do at most (``bandwidth``, ``gemm``); what each kernel of a
training step achieves of that (``kernels``); and steps and epochs of Hyperflows training beside
PyTorch's (``steps``, ``epochs``). Everything is printed, and written to ``gpu-check.json`` as soon
as it is known, so nothing is lost if a later part fails or the time is over.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from minihyperflows.bench.gpu_correctness import SMALL, Size, check_everything
from minihyperflows.bench.gpu_rates import (
    MIB,
    QUICK,
    Clock,
    ceilings_of,
    kernel_table,
    measure_bandwidth,
    measure_kernels,
    measure_products,
)
from minihyperflows.bench.gpu_steps import (
    OURS,
    RECIPES,
    GpuBenchSettings,
    head,
    measure_on_gpu,
)
from minihyperflows.bench.gpu_steps import (
    PARTS as BENCH_PARTS,
)
from minihyperflows.bench.machine import gpu_state
from minihyperflows.bench.table import gpu_table
from minihyperflows.emulator import CompilerMissingError, emulated_gpu
from minihyperflows.engine.backend import require_gpu
from minihyperflows.errors import UserError
from minihyperflows.lab.checkpoint import write_json
from minihyperflows.lab.console import Parser, run_command

PARTS = ("correctness", "bandwidth", "gemm", "kernels", *BENCH_PARTS)
FILE = "gpu-check.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for.

    Returns:
        The exit status: 0; 1 if a check or a whole part failed; 2 without a GPU; 130, interrupted.
    """
    return run_command(
        lambda: _check(_parser().parse_args(arguments)),
        lambda: "what was found is printed above, and recorded",
    )


def _check(options: argparse.Namespace) -> int:
    try:
        with emulated_gpu() if options.emulate else nullcontext():
            return Report(options).run()
    except CompilerMissingError as error:
        raise UserError(str(error)) from error


def _parser() -> Parser:
    parser = Parser(
        prog="python -m minihyperflows.bench.gpu_check",
        description="Check that a GPU computes what the CPU does, and measure how fast.",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR")
    parser.add_argument("--only", type=_parts, default=PARTS, metavar="PART,...",
                        help=f"of {', '.join(PARTS)}; default all")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="N",
                        help="begin nothing new after so many seconds")  # fmt: skip
    parser.add_argument("--networks", type=lambda text: tuple(text.split(",")),
                        default=tuple(RECIPES), metavar="NAME,...")  # fmt: skip
    parser.add_argument("--batch", type=int, default=128, metavar="N")
    parser.add_argument("--data-dir", type=Path, metavar="DIR",
                        help="with CIFAR-10; default: random images of its shape")  # fmt: skip
    parser.add_argument("--no-torch", action="store_false", dest="torch", help="ours alone")
    parser.add_argument("--emulate", action="store_true",
                        help="on an emulated GPU, with tiny networks")  # fmt: skip
    return parser


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {part!r}: choose of {','.join(PARTS)}")
    return parts


class Report:
    """What has been found so far, on paper and on the screen."""

    def __init__(self, options: argparse.Namespace) -> None:
        require_gpu()
        self.options, self.started = options, time.monotonic()
        self.failed = False
        self.emulated: bool = options.emulate
        self.clock = QUICK if self.emulated else Clock()
        self.settings = self._bench_settings()
        options.out.mkdir(parents=True, exist_ok=True)
        self.file: Path = options.out / FILE
        words = ["python -m minihyperflows.bench.gpu_check", "--only", ",".join(options.only)]
        self.record = {**head(options.torch), "command": " ".join(words), "parts": {}}

    def _bench_settings(self) -> GpuBenchSettings:
        options = self.options
        shared = {"networks": options.networks, "torch": options.torch}
        if self.emulated:
            tiny: dict[str, Any] = {"batch": 4, "images": 10, "width": 1 / 32, "rounds": 1}
            tiny |= {"torch_device": "cpu", "compiler": {"backend": "eager"}}
            return GpuBenchSettings(**shared, **tiny, seconds=1.0)
        return GpuBenchSettings(
            **shared,
            batch=options.batch,
            data_dir=options.data_dir,
            seconds=max(1.0, options.seconds),
        )

    @property
    def seconds_left(self) -> float:
        return float(self.options.seconds - (time.monotonic() - self.started))

    def run(self) -> int:
        """All parts; the exit status."""
        self.print(f"{self.record['gpu']['name']}; records: {self.file}")
        works: dict[str, Callable[[], Any]] = {
            "correctness": self.correctness,
            "bandwidth": self.bandwidth,
            "gemm": self.gemm,
            "kernels": self.kernels,
        }
        for name in PARTS[: len(works)]:
            if name in self.options.only:
                self.part(name, works[name])
        timed = tuple(p for p in BENCH_PARTS if p in self.options.only)
        if timed:
            self.part("training", lambda: self.training(timed))
        self.save()
        self.print(f"{'FAILED' if self.failed else 'done'}; records: {self.file}")
        return int(self.failed)

    def part(self, name: str, work: Callable[[], None]) -> None:
        """One part; if it fails the others still run."""
        if self.seconds_left < 0:
            self.record["parts"][name] = {"skipped": "the time was over"}
            self.print(f"-- {name}: skipped, the time is over")
            return
        self.print(f"-- {name}")
        started = time.monotonic()
        part: dict[str, Any] = {"gpu_before": gpu_state()}
        self.record["parts"][name] = part
        try:
            work()
        except Exception as error:  # what is measured already must be kept
            self.failed = True
            part["error"] = f"{type(error).__name__}: {error}"
            self.print(f"FAIL {name}: {part['error']}")
        part |= {"seconds": time.monotonic() - started, "gpu_after": gpu_state()}
        self.save()

    # -- the parts -------------------------------------------------------------------------------

    def correctness(self) -> None:
        checks: list[dict[str, Any]] = []
        self.record["correctness"] = checks
        failures = 0
        for number, check in enumerate(check_everything(SMALL if self.emulated else Size())):
            self.print(check.line())
            checks.append(check.to_json() | {"passed": check.passed})
            failures += not check.passed
            if number % 20 == 0:
                self.save()
            if self.seconds_left < 0:
                self.print("the time is over: the other checks are skipped")
                break
        self.print(f"{len(checks)} checks, {failures} failed")
        self.failed |= failures > 0

    def bandwidth(self) -> None:
        found = measure_bandwidth(self.clock, MIB if self.emulated else 1024 * MIB)
        self.record["bandwidth"] = found
        self.print(f"copy: {found['gigabytes']:.0f} GB/s, reading and writing counted")
        self.print(f"a kernel with nothing to do, in a graph: {found['empty_kernel']:.2f} us")

    def gemm(self) -> None:
        sizes = (64,) if self.emulated else (2048, 4096, 8192)
        self.record["gemm"] = measure_products(self.clock, sizes)
        for row in self.record["gemm"]:
            shape = f"{row['m']} x {row['n']} x {row['k']}"
            self.print(f"{row['dtype']} {shape:<22}{row['teraflops']:>8.1f} TFLOP/s")

    def kernels(self) -> None:
        found: list[Any] = []
        self.record["kernels"] = found
        for network in self.options.networks:
            for dtype in OURS.values():
                if self.seconds_left < 0:
                    self.print(f"{network} {dtype}: skipped, the time is over")
                    continue
                size = (self.settings.batch, self.settings.width)
                found.append(measure_kernels(network, dtype, *size, self.clock, self.note))
                self.save()
                for line in kernel_table(found[-1], ceilings_of(self.record)):
                    self.print(line)

    def training(self, parts: tuple[str, ...]) -> None:
        values = vars(self.settings) | {"parts": parts}
        if not self.emulated:
            values["seconds"] = max(1.0, self.seconds_left)

        def keep(record: dict[str, Any]) -> None:
            self.record["training"] = record
            self.save()

        keep(measure_on_gpu(GpuBenchSettings(**values), self.print, keep))
        self.print(gpu_table(self.record["training"]))
        for entry in self.record["training"]["networks"]:
            self.failed |= any("error" in entry["contenders"].get(name, {}) for name in OURS)

    # -- words -----------------------------------------------------------------------------------

    def save(self) -> None:
        write_json(self.file, self.record)

    def print(self, line: str) -> None:
        """With the time, so that a log says what took how long."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {line}", flush=True)

    def note(self, line: str) -> None:
        """What is not worth a line in a log."""


if __name__ == "__main__":
    sys.exit(main())
