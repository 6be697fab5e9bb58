"""The same training in PyTorch on a GPU, in the ways that PyTorch offers for speed.

The networks and gates are those of ``torch_peers``. Around them: mixed precision with a loss scale,
the data set in GPU memory, crops and flips there too, fused optimisers, no waiting for the GPU
within an epoch; and the step run as it is written, recorded as a CUDA graph, or compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn as tnn
import torch.nn.functional as tF

from minihyperflows.bench.torch_peers import FORMATS, _in_format, make_optimizer, presences, weights
from minihyperflows.data.datasets import Dataset
from minihyperflows.data.gpu.batches import PAD
from minihyperflows.lab.recipes import Recipe

EVALUATION_BATCH = 1000

# What autocast computes in, and whether it needs a loss scale to do so.
HALF = {"cuda": torch.float16, "cpu": torch.bfloat16}

WARM_UP = 3  # steps before one is recorded, as PyTorch's documentation has it


def configure() -> None:
    """Let cuDNN try out its algorithms; float32 is float32, as in our engine, not TF32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def versions() -> dict[str, str | None]:
    """Of PyTorch and the libraries it brings."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def release_memory() -> None:
    """Give back what PyTorch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Images:
    """A data set on a device, with an order, crops and flips for each epoch."""

    def __init__(self, data: Dataset, device: torch.device) -> None:
        margin = ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))
        self._padded = torch.from_numpy(np.pad(data.train_x, margin)).to(device)
        self._labels = torch.from_numpy(data.train_y).to(device)
        self.test_x = torch.from_numpy(data.test_x).to(device)
        self.test_y = torch.from_numpy(data.test_y).to(device)
        mean, std = (torch.tensor(v, device=device) for v in (data.mean, data.std))
        self._factor, self._offset = 1 / (255 * std), mean / std
        height, width = data.train_x.shape[1:3]
        self._rows, self._columns = (torch.arange(n, device=device) for n in (height, width))
        self._order, self._top, self._left, self._flip = (
            torch.zeros(len(self), dtype=torch.int64, device=device) for _ in range(4)
        )
        self._generator = torch.Generator(device).manual_seed(0)

    def __len__(self) -> int:
        return len(self._labels)

    def shuffle(self) -> None:
        """A new order, new crops and flips, in the memory of the old ones: a graph reads them."""
        options: dict[str, Any] = {
            "generator": self._generator,
            "device": self._labels.device,
        }
        self._order.copy_(torch.randperm(len(self), **options))
        for choice, number in (
            (self._top, 2 * PAD + 1),
            (self._left, 2 * PAD + 1),
            (self._flip, 2),
        ):
            choice.copy_(torch.randint(number, (len(self),), **options))

    def batch(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The images (B, C, H, W) at these places of the epoch, and their labels."""
        chosen = self._order[places]
        rows = self._rows + self._top[places, None]
        mirrored = torch.where(self._flip[places, None] > 0, self._columns.flip(0), self._columns)
        columns = mirrored + self._left[places, None]
        crops = self._padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return self.normalised(crops), self._labels[chosen]

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """(pixels / 255 - mean) / std of (B, H, W, C), as (B, C, H, W)."""
        x = images.float().mul_(self._factor).sub_(self._offset)
        return x.permute(0, 3, 1, 2)


class Training:
    """Hyperflows training of a gated network: call :meth:`epoch` to run one.

    Args:
        net: from ``torch_peers``, with presences.
        data: the data set.
        recipe: its pruning stage says which optimisers, and how smooth the labels.
        batch: images in a step; the last one of an epoch may be smaller.
        lr: of both optimisers.
        gamma: the pressure.
        memory_format: the name of one of ``FORMATS``.
        half: mixed precision, with a loss scale.
        way: "eager", "graph" (the whole step is a CUDA graph), "compile". A smaller last batch is
            always eager.
        device: where to train.
        compiler: ``torch.compile``'s settings.
    """

    def __init__(
        self,
        net: tnn.Module,
        data: Dataset,
        recipe: Recipe,
        batch: int,
        lr: float,
        gamma: float,
        memory_format: str,
        half: bool = True,
        way: str = "eager",
        device: str = "cuda",
        compiler: dict[str, Any] | None = None,
    ) -> None:
        self.device, self.half, self.batch, self.way = torch.device(device), half, batch, way
        self.memory_format = FORMATS[memory_format]
        self.net = _in_format(net.to(self.device), self.memory_format)
        self.smoothing = recipe.pruning.label_smoothing
        self.presences = presences(self.net)
        self.optimizers = [
            make_optimizer(weights(self.net), recipe.pruning, lr),
            make_optimizer(self.presences, recipe.presence, lr),
        ]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.total = torch.zeros((), device=self.device)
        self.position = torch.zeros((), dtype=torch.int64, device=self.device)
        self._offsets = torch.arange(batch, device=self.device)
        share = gamma / sum(t.numel() for t in self.presences)
        self._share = torch.full((), share, device=self.device)
        self._full_loss: Callable[..., torch.Tensor] = self.loss
        if way == "compile":
            self._full_loss = torch.compile(self.loss, dynamic=False, **(compiler or {}))
        if way == "graph":
            _allow_capture(self.optimizers)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.use(data)

    def use(self, data: Dataset) -> None:
        """Train on ``data`` from now on."""
        self._graph = None  # it reads the old images
        self.images = Images(data, self.device)

    # -- a step ----------------------------------------------------------------------------------

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy, without the pressure."""
        with torch.autocast(self.device.type, HALF[self.device.type], enabled=self.half):
            return tF.cross_entropy(self.net(x), labels, label_smoothing=self.smoothing)

    def gradients(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss; leaves the gradients, times the loss scale, of weights and presences.

        The pressure's gradient is one number, the same for every t. To add it to all at once is
        faster than to derive the sum of all t, layer by layer.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = (self._full_loss if len(labels) == self.batch else self.loss)(x, labels)
        self.scaler.scale(loss).backward()
        gradients = [t.grad for t in self.presences if t.grad is not None]
        torch._foreach_add_(gradients, self.scaler.scale(self._share))
        return loss.detach()

    def step(self, batch: int) -> None:
        """The next ``batch`` images, forward, backward, and both optimisers."""
        x, labels = self.images.batch(self._offsets[:batch] + self.position)
        x = x.contiguous(memory_format=self.memory_format)
        loss = self.gradients(x, labels)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.total += loss * batch
        self.position += batch

    def _full_step(self) -> None:
        if self.way == "compile":
            torch.compiler.cudagraph_mark_step_begin()
        if self._graph is None:
            self.step(self.batch)
        else:
            self._graph.replay()

    def _begin(self) -> None:
        self.net.train()
        self.images.shuffle()
        self.position.zero_()
        self.total.zero_()

    # -- an epoch --------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything that happens once: choosing algorithms, compiling, recording."""
        if self.way == "graph":
            self._record()
        else:
            self._warm_up()
        self.total.item()  # waits for the device

    def _warm_up(self) -> None:
        for _ in range(WARM_UP):
            self._begin()
            self._full_step()

    def _record(self) -> None:
        """Make the step a graph, on a stream of its own, as PyTorch's documentation has it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(self.batch)
        self._graph = graph

    def epoch(self) -> float:
        """One pass over the training set in a new order; returns the mean loss."""
        self._begin()
        whole, rest = divmod(len(self.images), self.batch)
        for _ in range(whole):
            self._full_step()
        if rest:
            self.step(rest)
        return float(self.total.item()) / len(self.images)

    def evaluate(self) -> float:
        """The fraction of the test set that the network classifies correctly."""
        self.net.eval()
        images, labels = self.images.test_x, self.images.test_y
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        half = HALF[self.device.type]
        with torch.no_grad(), torch.autocast(self.device.type, half, enabled=self.half):
            for start in range(0, len(labels), EVALUATION_BATCH):
                some = slice(start, start + EVALUATION_BATCH)
                x = self.images.normalised(images[some])
                scores = self.net(x.contiguous(memory_format=self.memory_format))
                correct += (scores.argmax(1) == labels[some]).sum()
        return float(correct.item()) / len(labels)


def _allow_capture(optimizers: list[torch.optim.Optimizer]) -> None:
    """Adam wants to be told that it is to be part of a graph."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
