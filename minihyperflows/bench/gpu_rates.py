"""How fast each kernel is on a GPU, against what the card can do at most.

The ceilings are measured: bytes a second of a large copy, operations a second of large matrix
products. Then a training step is watched: every kernel that it starts, and every product, is run by
itself on its own shapes, many times in a graph. The bytes are those that the kernel must move, each
array read once or written once, as the kernels' headers count them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np

from minihyperflows.bench.contenders import Progress
from minihyperflows.bench.gpu_steps import RECIPES, OurTraining, cifar_like, our_network
from minihyperflows.data.gpu.batches import advance
from minihyperflows.engine.backend import Array, cupy
from minihyperflows.engine.gpu.capture import Replay, new_stream, on_stream
from minihyperflows.engine.gpu.gemm import DATA_TYPES, TRANSPOSE, Cublas, multiply
from minihyperflows.engine.gpu.launch import Source
from minihyperflows.flows.gpu.update import Counter as Counts
from minihyperflows.lab.recipes import find

MIB = 1 << 20


@dataclass(frozen=True)
class Clock:
    """Times work that only starts kernels.

    Attributes:
        sample: seconds; a sample repeats the work until it takes about so long.
        samples: how many; the median counts.
        most: repetitions in a graph.
        flush: bytes of the copy that pushes arrays out of the caches.
        batches: in the data set; more than the steps that are run, since what comes after the last
            one is not training.
    """

    sample: float = 5e-3
    samples: int = 5
    most: int = 50
    flush: int = 256 * MIB
    batches: int = 100

    def seconds(self, work: Callable[[], Any], cold: bool = False) -> float:
        """Of one ``work`` among many in a graph.

        Args:
            work: starts kernels.
            cold: a large copy runs before each, whose time is subtracted: ``work`` then finds
                nothing in the caches. Without, arrays of up to some 50 MB stay there.
        """
        if not cold:
            return self._seconds(work)
        large = cupy().zeros(self.flush, np.uint8)

        def both() -> None:
            large.copy()
            work()

        return max(0.0, self._seconds(both) - self._seconds(large.copy))

    def _seconds(self, work: Callable[[], Any]) -> float:
        stream = new_stream()
        with on_stream(stream):
            work()  # compiles
            once = self._time(work, 1)
        repeats = max(1, min(self.most, round(self.sample / max(once, 1e-9))))

        def repeated() -> None:
            for _ in range(repeats):
                work()

        replay = Replay(repeated)
        with on_stream(stream):
            self._time(replay, 1)
            once = self._time(replay, 1)
            replays = max(1, min(1000, round(self.sample / max(once, 1e-9))))
            samples = [self._time(replay, replays) for _ in range(self.samples)]
        return float(np.median(samples)) / repeats

    def _time(self, work: Callable[[], Any], times: int) -> float:
        """Mean seconds; the host waits for the end once."""
        stream = cupy().cuda.get_current_stream()
        stream.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            work()
        stream.synchronize()
        return (time.perf_counter() - started) / times


QUICK = Clock(sample=1e-6, samples=1, most=2, flush=MIB, batches=8)  # for the emulator


# -- the ceilings --------------------------------------------------------------------------------


def measure_bandwidth(clock: Clock, size: int = 1024 * MIB) -> dict[str, float]:
    """Of a copy within the GPU's memory, reading and writing counted: 10^9 bytes a second; and the
    microseconds that a kernel with nothing to do takes in a graph."""
    x = cupy().zeros(size // 4, np.float32) + np.float32(1)
    seconds = clock.seconds(x.copy)
    position = cupy().zeros(1, np.int64)
    empty = replace(clock, most=20 * clock.most).seconds(lambda: advance(position, 1))
    return {"gigabytes": 2 * x.nbytes / seconds / 1e9, "empty_kernel": 1e6 * empty}


@dataclass(frozen=True)
class Product:
    """A product of matrices op(a) (M, K) and op(b) (K, N), as ``gemm.multiply`` computes it."""

    m: int
    n: int
    k: int
    transpose_a: bool = False
    transpose_b: bool = False
    accumulate: bool = False
    dtype: str = "float16"
    out_dtype: str = "float16"
    leading: tuple[int, int] | None = None  # distances of the rows of a and b

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        size, out = (np.dtype(d).itemsize for d in (self.dtype, self.out_dtype))
        return (self.m + self.n) * self.k * size + self.m * self.n * out * (1 + self.accumulate)

    def prepared(self) -> Callable[[], Any]:
        """The product of random matrices, ready to be computed."""
        rng = np.random.default_rng(0)
        a = self._matrix(rng, self.m, self.k, self.transpose_a, 0)
        b = self._matrix(rng, self.k, self.n, self.transpose_b, 1)
        out = cupy().zeros((self.m, self.n), self.out_dtype)
        return lambda: multiply(a, b, out, self.transpose_a, self.transpose_b, self.accumulate)

    def _matrix(
        self, rng: np.random.Generator, rows: int, columns: int, transposed: bool, which: int
    ) -> Array:
        """op(X) is (rows, columns); X may be a part of wider rows."""
        if transposed:
            rows, columns = columns, rows
        wide = max(columns, self.leading[which]) if self.leading else columns
        # A large matrix repeats a smaller one: random enough, and quickly made.
        few = rng.uniform(-1, 1, (min(rows, 512), wide)).astype(self.dtype)
        whole = np.tile(few, (-(-rows // len(few)), 1))[:rows]
        return cupy().asarray(whole)[:, :columns]

    def measured(self, clock: Clock) -> dict[str, Any]:
        """Its shape, microseconds, and 10^12 operations a second."""
        seconds = clock.seconds(self.prepared())
        return {
            **{"m": self.m, "n": self.n, "k": self.k, "dtype": self.dtype},
            **{"out_dtype": self.out_dtype, "transpose_a": self.transpose_a},
            **{"transpose_b": self.transpose_b},
            "microseconds": 1e6 * seconds,
            "teraflops": self.flops / max(seconds, 1e-12) / 1e12,
        }


def measure_products(clock: Clock, sizes: tuple[int, ...] = (2048, 4096, 8192)) -> list[Any]:
    """Square products in both precisions: the arithmetic's ceilings."""
    return [
        Product(size, size, size, dtype=dtype, out_dtype=dtype).measured(clock)
        for dtype in ("float16", "float32")
        for size in sizes
    ]


# -- what a step consists of ---------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One kernel as it was started."""

    source: Source
    kernel: str
    blocks: Any
    threads: Any
    arguments: tuple[Any, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """Without the template's arguments."""
        return self.kernel.partition("<")[0]

    @property
    def key(self) -> tuple[Any, ...]:
        """What two launches share that take the same time."""
        shapes = tuple((a.shape, str(a.dtype)) if _is_array(a) else None for a in self.arguments)
        return self.kernel, self.blocks, self.threads, shapes

    @property
    def bytes(self) -> int:
        """That the kernel must move."""
        arrays = [a for a in self.arguments if _is_array(a)]
        return BYTES.get(self.name, _all_bytes)(arrays)

    def __call__(self) -> None:
        """Start it again."""
        self.source.launch(self.kernel, self.blocks, self.threads, *self.arguments)


def _is_array(argument: Any) -> bool:
    return hasattr(argument, "nbytes") and not isinstance(argument, np.generic)


def _all_bytes(arrays: list[Array]) -> int:
    """Every array once."""
    return sum(a.nbytes for a in arrays)


def _batch_bytes(arrays: list[Array]) -> int:
    """load_batch reads one byte and writes one number per pixel, not the whole data set."""
    x = next(a for a in arrays if a.dtype.kind == "f" and a.ndim == 4)
    return int(x.nbytes + x.size)


def _window_bytes(arrays: list[Array]) -> int:
    """im2col of windows with gaps between them does not read all of x."""
    x, columns = arrays
    return int(min(x.nbytes, columns.nbytes) + columns.nbytes)


def _update_bytes(arrays: list[Array]) -> int:
    """Parameters and what optimisers keep are read and written, the gradient is read, the weights
    in use are written."""
    _, theta, gradient, first, second, t, t_first, t_second, in_use, *_ = arrays
    both = sum(a.nbytes for a in (theta, first, second, t, t_first, t_second))
    return int(2 * both + gradient.nbytes + in_use.nbytes)


def _first_twice(arrays: list[Array]) -> int:
    """The first array is changed in place."""
    return _all_bytes(arrays) + int(arrays[0].nbytes)


# The kernels that do more, or less, than read or write each of their arrays once.
BYTES: Mapping[str, Callable[[list[Array]], int]] = {
    "load_batch": _batch_bytes,
    "im2col": _window_bytes,
    "update": _update_bytes,
    "add_bias": _first_twice,
}


@dataclass
class Work:
    """What a training step starts, and how often."""

    launches: dict[tuple[Any, ...], Launch] = field(default_factory=dict)
    products: Counter[Product] = field(default_factory=Counter)
    counts: Counter[tuple[Any, ...]] = field(default_factory=Counter)


@contextmanager
def watched() -> Iterator[Work]:
    """Context that notes which kernels and products are started in it."""
    work, launch, gemm = Work(), Source.launch, Cublas.gemm
    names = {number: name for name, number in DATA_TYPES.items()}

    def noting_launch(
        self: Source, kernel: str, blocks: Any, threads: Any, *arguments: Any
    ) -> None:
        noted = Launch(self, kernel, blocks, threads, arguments)
        work.launches.setdefault(noted.key, noted)
        work.counts[noted.key] += 1
        launch(self, kernel, blocks, threads, *arguments)

    def noting_gemm(self: Cublas, *arguments: Any, words: str) -> None:
        # out^T = op(b)^T op(a)^T: see gemm.multiply
        op_b, op_a, n, m, k, _, _, dtype, row_b, _, _, row_a, beta, _, out_dtype, _ = arguments
        transposed = op_a == TRANSPOSE, op_b == TRANSPOSE, beta.value != 0
        types = names[dtype], names[out_dtype]
        work.products[Product(m, n, k, *transposed, *types, (row_a, row_b))] += 1
        gemm(self, *arguments, words=words)

    with (
        mock.patch.object(Source, "launch", noting_launch),
        mock.patch.object(Cublas, "gemm", noting_gemm),
    ):
        yield work


class _Watched(OurTraining):
    """Training whose steps can be run one by one."""

    def one_step(self) -> Callable[[], None]:
        """The training step of a full batch, at the beginning of an epoch."""
        self.epoch()
        assert self.epochs
        epochs, batch, smoothing = self.epochs, self.batch, self.smoothing
        epochs.flat.begin_epoch()
        return lambda: epochs.training_step(batch, smoothing)


def measure_kernels(
    network: str, dtype: str, batch: int, width: float, clock: Clock, progress: Progress
) -> dict[str, Any]:
    """Every kernel and every product of a training step.

    Returns:
        ``step``, the milliseconds of the step as a graph; ``good_steps``, how many of them all
        were not left out because a gradient was infinite; ``kernels`` and ``products``, a row for
        each distinct one: how often it occurs (``count``), ``microseconds`` in a graph of its own
        (``cold``: with nothing in the caches), ``bytes`` and ``gigabytes`` a second (of the cold
        time), or ``teraflops``.
    """
    data, recipe = cifar_like(clock.batches * batch), find(RECIPES[network])
    training = _Watched(our_network(network, width), data, recipe, batch, dtype)
    step = training.one_step()
    with on_stream(new_stream()), watched() as work:
        step()
    answer: dict[str, Any] = {
        **{"network": network, "dtype": dtype, "batch": batch, "width": width},
        "step": 1000 * replace(clock, most=1).seconds(step),
        "kernels": [],
        "products": [],
    }
    assert training.epochs
    answer["good_steps"] = int(training.epochs.flat.counter(Counts.GOOD_STEPS))
    for number, (key, launch) in enumerate(work.launches.items(), start=1):
        progress(f"{network} {dtype}: kernel {number} of {len(work.launches)}, {launch.name}")
        warm, size = clock.seconds(launch), launch.bytes
        cold = max(warm, clock.seconds(launch, cold=True))  # or the subtraction's error shows
        answer["kernels"].append(
            {
                "kernel": launch.kernel,
                "shapes": [list(a.shape) for a in launch.arguments if _is_array(a)],
                "count": work.counts[key],
                "microseconds": 1e6 * warm,
                "cold": 1e6 * cold,
                "bytes": size,
                "gigabytes": size / max(cold, 1e-9) / 1e9,
            }
        )
    for number, (product, count) in enumerate(work.products.items(), start=1):
        progress(f"{network} {dtype}: product {number} of {len(work.products)}")
        answer["products"].append({"count": count, **product.measured(clock)})
    return answer


# -- tables --------------------------------------------------------------------------------------


def ceilings_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Gigabytes a second and teraflops by dtype, as far as they were measured."""
    best: dict[str, float | None] = {"gigabytes": record.get("bandwidth", {}).get("gigabytes")}
    for row in record.get("gemm", []):
        best[row["dtype"]] = max(row["teraflops"], best.get(row["dtype"]) or 0.0)
    return best


def kernel_table(entry: Mapping[str, Any], ceilings: Mapping[str, float | None]) -> list[str]:
    """A line for each kernel by name and one for the products: its share of the step, and what it
    achieves of the ceilings."""
    groups: dict[str, list[Any]] = {}
    for row in entry["kernels"]:
        groups.setdefault(row["kernel"].partition("<")[0], []).append(row)
    lines = [f"{entry['network']} {entry['dtype']}: a step takes {entry['step']:.3f} ms"]
    total = 0.0
    for name, rows in sorted(groups.items(), key=lambda item: -_microseconds(item[1])):
        spent = _microseconds(rows)
        cold = sum(r["count"] * r["cold"] for r in rows)
        rate = sum(r["count"] * r["bytes"] for r in rows) / max(cold, 1e-9) / 1e3
        share = _fraction(rate, ceilings.get("gigabytes"))
        lines.append(_row(name, rows, spent, f"{rate:>8.0f} GB/s{share}"))
        total += spent
    products = entry["products"]
    spent = _microseconds(products)
    flops = sum(2 * r["count"] * r["m"] * r["n"] * r["k"] for r in products)
    rate = flops / max(spent, 1e-9) / 1e6
    share = _fraction(rate, ceilings.get(entry["dtype"]))
    lines.append(_row("products (cuBLAS)", products, spent, f"{rate:>8.1f} TFLOP/s{share}"))
    count = sum(r["count"] for r in (*entry["kernels"], *products))
    lines.append(f"  {'all, one after another':<28}{count:>6}{(total + spent) / 1000:>12.3f} ms")
    return lines


def _microseconds(rows: list[Any]) -> float:
    return float(sum(r["count"] * r["microseconds"] for r in rows))


def _row(name: str, rows: list[Any], spent: float, rate: str) -> str:
    count = sum(r["count"] for r in rows)
    return f"  {name:<28}{count:>6}{spent / 1000:>12.3f} ms{rate}"


def _fraction(rate: float, ceiling: float | None) -> str:
    return f"{rate / ceiling:>7.0%}" if ceiling else ""
