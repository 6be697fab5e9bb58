"""Other answers to the question which weights to keep, behind one small interface.

A pruner decides with which weights a network computes; training it stays the caller's business::

    pruner = Gradual(sparsity=0.98)
    pruner.start(net, optimizer, steps=7000, rng=rng)
    for step in range(1, 7001):
        net.zero_grad()
        loss = ...
        loss.backward()
        optimizer.step()
        pruner.after_step(step)
    pruner.finish()

``start`` gives every weight of a convolution or linear layer a :class:`Mask`. A method of your own
is a subclass of :class:`Pruner` that overrides :meth:`~Pruner.prepare` (before the first step),
:meth:`~Pruner.after_step`, or both. It finds what it needs on itself: ``masks`` by layer name, each
with the weights, with who is present, and with the gradient of *all* weights, removed ones too;
``kept``, the number of weights to end with; ``steps``, ``rng`` and ``optimizer``. Biases and
normalisation are never masked. Chapter 11 compares these methods with Hyperflows.

The pruners work on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minihyperflows.engine.graph import Function
from minihyperflows.engine.numbers import Arithmetic
from minihyperflows.engine.tensor import Tensor, apply
from minihyperflows.nn import Module, Parameter, counting, weight_groups, weighted_layers
from minihyperflows.nn.optim import Optimizer

# -- masks ---------------------------------------------------------------------------------------


class MaskedWeight(Function):
    """w' = w m, with a constant mask m of zeros and ones;  dL/dw = m dL/dw'.

    dL/dw' exists for a removed weight too: it says what the weight would do if it came back. The
    mask keeps it.
    """

    arithmetic = Arithmetic.FLOAT

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def forward(self, weight: np.ndarray) -> np.ndarray:
        self.present = self.mask.present
        return weight * self.present

    def backward(self, c: np.ndarray) -> np.ndarray:
        self.mask.receive(c)
        return c * self.present


class Mask:
    """The mask of one weight, and what a pruner wants to know of it.

    Layers that share the weight share the mask.

    Attributes:
        weight: the layer's weights, removed ones with the value they were removed with (and what
            the optimiser's momentum has made of it).
        present: True where the layer uses its weight. A pruner assigns a new array.
        gradient: dL/dw', of present and removed weights. Like ``weight.grad``, which it lives and
            dies with, it is the sum over all uses of the weight and all backward passes since the
            gradients were last forgotten; zeros without any.
    """

    def __init__(self, weight: Parameter) -> None:
        self.weight = weight
        self.present: np.ndarray = np.ones(weight.shape, dtype=bool)
        self.received: np.ndarray | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        return apply(MaskedWeight(self), weight)

    def receive(self, c: np.ndarray) -> None:
        """Add what one use of the weight contributes to the gradient."""
        first = self.weight.grad is None or self.received is None
        self.received = c if first else self.received + c

    @property
    def gradient(self) -> np.ndarray:
        if self.weight.grad is None or self.received is None:
            return np.zeros(self.weight.shape, self.weight.dtype)
        return self.received


def attach_masks(net: Module) -> dict[str, Mask]:
    """Give the weight of every convolution and linear layer a mask; all weights are present.

    Returns:
        The masks by layer name; of layers that share a weight, by the name of the first.

    Raises:
        ValueError: there is nothing to mask, or the layers have masks or gates already.
    """
    groups = weight_groups(net)
    if not groups:
        raise ValueError("nothing to prune: the network has no convolution or linear layer")
    if any(layer.weight_gate for layers in groups.values() for layer in layers):
        raise ValueError("the network is being pruned already: finish that first")
    masks = {name: Mask(layers[0].weight) for name, layers in groups.items()}
    for name, layers in groups.items():
        for layer in layers:
            layer.weight_gate = masks[name]
    return masks


# -- the interface -------------------------------------------------------------------------------


class Pruner:
    """Removes all but a given fraction of the weights; this one removes none.

    Args:
        sparsity: the fraction of weights to remove in the end, in [0, 1).

    Raises:
        ValueError: another sparsity; in subclasses, settings with which nothing would be removed.

    Attributes:
        masks: the masks by layer name, in the order of the layers; of layers that share a weight by
            the name of the first.
        kept: how many weights are to be present in the end.
        optimizer: the optimiser of the weights.
        steps: how many steps the training lasts.
        rng: for every random choice.
    """

    masks: dict[str, Mask]
    kept: int
    optimizer: Optimizer
    steps: int
    rng: np.random.Generator

    def __init__(self, sparsity: float) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity is the fraction removed, in [0, 1), not {sparsity}")
        self.sparsity = sparsity

    # Override one of these, or both.

    def prepare(self) -> None:
        """Called once before the first step, when everything but gradients is there."""

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step number ``step`` (from 1). The gradients are still those
        of the batch; the weights have moved."""

    # What the training loop calls, and what there is to help.

    def start(
        self, net: Module, optimizer: Optimizer, steps: int, rng: np.random.Generator
    ) -> None:
        """Mask ``net``, which is going to be trained by ``optimizer`` for ``steps`` steps."""
        self.masks, self._net = attach_masks(net), net
        self.optimizer, self.steps, self.rng = optimizer, steps, rng
        self.kept = kept_weights(self.sparsity, self.total)
        self.prepare()

    def finish(self) -> None:
        """Write the zeros into the weights and take the masks off: the same function."""
        for mask in self.masks.values():
            mask.weight.data = mask.weight.data * mask.present
        for layer in weighted_layers(self._net).values():
            layer.weight_gate = None

    @property
    def total(self) -> int:
        """The number of weights that have a mask."""
        return sum(mask.present.size for mask in self.masks.values())

    @property
    def density(self) -> float:
        """The fraction of weights that is present."""
        return sum(int(mask.present.sum()) for mask in self.masks.values()) / self.total

    def layer_density(self) -> dict[str, float]:
        """The fraction of each layer's weights that is present."""
        return {name: float(mask.present.mean()) for name, mask in self.masks.items()}

    def keep_largest(self, scores: Sequence[np.ndarray], count: int) -> None:
        """Make those ``count`` weights of the whole network present that score highest, and no
        others. ``scores``: an array for each mask, in order."""
        chosen = largest(np.concatenate([score.reshape(-1) for score in scores]), count)
        start = 0
        for mask in self.masks.values():
            part = chosen[start : start + mask.present.size]
            mask.present = part.reshape(mask.present.shape)
            start += part.size

    def gradients(self) -> dict[str, np.ndarray]:
        """dL/dw' of the batch, an array for each mask; zeros where the loss did not depend on it.

        Raises:
            ValueError: no weight has a gradient.
        """
        if all(mask.weight.grad is None for mask in self.masks.values()):
            raise ValueError("there are no gradients: call after_step before they are forgotten")
        return {name: mask.gradient for name, mask in self.masks.items()}

    def magnitudes(self) -> list[np.ndarray]:
        """|w| of every present weight, -1 for removed ones: by rank they stay removed."""
        return [np.where(m.present, abs(m.weight.data), -1) for m in self.masks.values()]


def kept_weights(sparsity: float, total: int) -> int:
    """How many of ``total`` weights a sparsity leaves: rounded down."""
    return counting.kept_weights(1 - sparsity, total)


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """True at the ``count`` largest values; in a tie the earlier ones.

    The beginning of a stable argsort of -values, without sorting the rest.

    Raises:
        ValueError: a value is NaN, which is neither larger nor smaller than another.
    """
    if np.isnan(values).any():
        raise ValueError("a score is NaN, so none is largest: has the training diverged?")
    chosen = np.zeros(values.shape, dtype=bool)
    if count > 0:
        least = -np.partition(-values, count - 1)[count - 1]
        chosen[values > least] = True
        ties = np.flatnonzero(values == least)
        chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return chosen


# -- settings ------------------------------------------------------------------------------------


def _check_period(begin: float, end: float) -> None:
    """With another end the last step of pruning would never come."""
    if not (0 <= begin <= end <= 1 and end > 0):
        raise ValueError(
            "begin and end are fractions of the training, 0 <= begin <= end <= 1 and end > 0, "
            f"not {begin} and {end}"
        )


def _last_step(end: float, steps: int) -> int:
    """The step after which the pruning is done: at the fraction ``end`` of the training, but never
    before there was one."""
    if steps < 1:
        raise ValueError(f"a training of {steps} steps ends before anything is pruned")
    return max(1, round(end * steps))


def _check_every(every: int) -> None:
    if every < 1:
        raise ValueError(f"every is a number of steps, at least 1, not {every}")


# -- all at once ---------------------------------------------------------------------------------


class Random(Pruner):
    """Remove weights of the whole network at random, before the first step.

    What any method has to beat: the network's size alone, without a choice of weights.
    """

    def prepare(self) -> None:
        self.keep_largest(
            [self.rng.random(m.present.shape) for m in self.masks.values()], self.kept
        )


class Magnitude(Pruner):
    """Remove the smallest |w| of the whole network, all before the first step.

    score = |w|. Source: Han, Pool, Tran, Dally 2015 (arXiv 1506.02626), there with a threshold for
    each layer; one ranking of all layers as in Renda, Frankle, Carbin 2020 (arXiv 2003.02389).
    """

    def prepare(self) -> None:
        self.keep_largest(self.magnitudes(), self.kept)


# -- little by little ----------------------------------------------------------------------------


class Iterative(Pruner):
    """Remove the smallest |w| in rounds, an equal fraction of the remaining weights in each.

    After round r of R the density is D^(r / R), D the density at the end
    (:func:`geometric_density`). The rounds are evenly spaced up to the fraction ``end`` of the
    training; between them the weights train on from where they are. Source: Han et al. 2015; equal
    fractions as in Renda, Frankle, Carbin 2020, who remove 20 % in each round and then retrain for
    as long as the dense network was trained. Here all rounds share one training.
    """

    def __init__(self, sparsity: float, rounds: int = 8, end: float = 0.8) -> None:
        super().__init__(sparsity)
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {rounds}")
        _check_period(0.0, end)
        self.rounds, self.end = rounds, end

    def round_ends(self) -> list[int]:
        """The steps after which a round removes weights; where several are one, its last round
        counts."""
        before = [round(r / self.rounds * self.end * self.steps) for r in range(1, self.rounds)]
        return [*before, _last_step(self.end, self.steps)]

    def prepare(self) -> None:
        _last_step(self.end, self.steps)  # there is one

    def after_step(self, step: int) -> None:
        for r, at in enumerate(self.round_ends(), start=1):
            if at == step:
                density = geometric_density(r / self.rounds, self.sparsity)
                last = r == self.rounds
                count = self.kept if last else kept_weights(1 - density, self.total)
                self.keep_largest(self.magnitudes(), count)


def geometric_density(progress: float, sparsity: float) -> float:
    """D^progress: falls from 1 to D = 1 - sparsity by the same factor in the same time."""
    return (1 - sparsity) ** progress


class Scheduled(Pruner):
    """Every so many steps, keep as many weights as a schedule allows; how they are ranked is for
    the subclass to say.

    The sparsity follows :meth:`schedule` from the fraction ``begin`` of the training to the
    fraction ``end``; from there on the mask stays as it is.
    """

    def __init__(
        self, sparsity: float, begin: float = 0.0, end: float = 0.8, every: int = 100
    ) -> None:
        super().__init__(sparsity)
        _check_period(begin, end)
        _check_every(every)
        self.begin, self.end, self.every = begin, end, every

    def prepare(self) -> None:
        _last_step(self.end, self.steps)  # there is one

    def scores(self) -> list[np.ndarray]:
        """A score for each weight, an array for each mask; the highest stay."""
        raise NotImplementedError

    def schedule(self, progress: float) -> float:
        """The sparsity when the fraction ``progress`` of the time from begin to end is over."""
        return cubic_sparsity(progress, self.sparsity)

    def after_step(self, step: int) -> None:
        first, last = round(self.begin * self.steps), _last_step(self.end, self.steps)
        if first < step < last and step % self.every == 0:
            reached = self.schedule((step - first) / (last - first))
            self.keep_largest(self.scores(), kept_weights(reached, self.total))
        elif step == last:
            self.keep_largest(self.scores(), self.kept)


def cubic_sparsity(progress: float, sparsity: float) -> float:
    """S (1 - (1 - p)^3): from 0 to S as p goes from 0 to 1, fast at first, when many weights are
    superfluous, and slowly at the end.

    Source: Zhu & Gupta 2017 (arXiv 1710.01878), equation (1), with initial sparsity 0.
    """
    return sparsity * (1 - (1 - progress) ** 3)


class Gradual(Scheduled):
    """Gradual magnitude pruning (GMP): the smallest |w| go, at the pace of the cubic schedule.

    score = |w| while present; a removed weight stays removed. Source: Zhu & Gupta 2017, equation
    (1), who remove from every layer the same fraction; here all layers share one ranking.
    """

    def scores(self) -> list[np.ndarray]:
        return self.magnitudes()


class Movement(Scheduled):
    """Movement pruning: keep the weights that training moves away from zero.

    score = - sum over the steps of w dL/dw'. Under gradient descent a weight moves by -lr dL/dw',
    so the score rises where |w| grows. For a removed weight w stands still, and the score adds up
    what the first-order worth of its return is. So a weight can come back, unlike under magnitudes;
    it is the flux of chapter 06, summed from the beginning with equal weights and ranked, where
    Hyperflows lets Adam sum it against a pressure.

    Source: Sanh, Wolf, Rush 2020 (arXiv 2005.07683), table 1, hard movement pruning with the cubic
    schedule. There a learning rate for the scores multiplies them all, which changes no rank; the
    mask is renewed at every step to the end, here every ``every`` steps up to ``end``.

    Attributes:
        score: the sums so far, by layer name.
    """

    score: dict[str, np.ndarray]

    def __init__(
        self, sparsity: float, begin: float = 0.1, end: float = 0.8, every: int = 10
    ) -> None:
        super().__init__(sparsity, begin, end, every)

    def prepare(self) -> None:
        super().prepare()
        self.score = {name: np.zeros_like(m.weight.data) for name, m in self.masks.items()}
        self._before = self._copies()

    def scores(self) -> list[np.ndarray]:
        return list(self.score.values())

    def after_step(self, step: int) -> None:
        if step <= _last_step(self.end, self.steps):
            for name, gradient in self.gradients().items():  # it belongs to w before the step
                self.score[name] -= self._before[name] * gradient
            self._before = self._copies()
        super().after_step(step)

    def _copies(self) -> dict[str, np.ndarray]:
        return {name: mask.weight.data.copy() for name, mask in self.masks.items()}


# -- sparse from the beginning -------------------------------------------------------------------


class RigL(Pruner):
    """Train a sparse network from the beginning, and rewire it now and then.

    The first mask is random, with the layer densities of :func:`erdos_renyi_counts`. Every
    ``every`` steps, up to the fraction ``until`` of the training, each layer with k present weights
    drops the floor(f k) smallest |w| and grows as many where |dL/dw'| of the last batch is largest,

        f(step) = fraction / 2 (1 + cos(pi step / (until steps))).    (:func:`cosine_fraction`)

    A weight that was just dropped may be among those that grow; it then stays as it is. All others
    start at zero, and so does their state in the optimiser. The density never changes.

    Source: Evci, Gale, Menick, Castro, Elsen 2020 (arXiv 1911.11134), section 3 and algorithm 1,
    with the defaults given there (every 100 steps, 0.3, until 3/4, layer densities ERK). They
    rewire in place of a step, here it happens after one.
    """

    def __init__(
        self, sparsity: float, every: int = 100, fraction: float = 0.3, until: float = 0.75
    ) -> None:
        super().__init__(sparsity)
        _check_every(every)
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is of the present weights, in [0, 1], not {fraction}")
        self.every, self.fraction, self.until = every, fraction, until

    def prepare(self) -> None:
        shapes = [mask.present.shape for mask in self.masks.values()]
        counts = erdos_renyi_counts(shapes, self.kept)
        for mask, count in zip(self.masks.values(), counts, strict=True):
            mask.present = largest(self.rng.random(mask.present.size), count).reshape(
                mask.present.shape
            )
            mask.weight.data = mask.weight.data * mask.present

    def after_step(self, step: int) -> None:
        last = self.until * self.steps
        if step % self.every == 0 and step < last:
            share = cosine_fraction(step / last, self.fraction)
            gradients = self.gradients()
            for name, mask in self.masks.items():
                count = counting.floor_of(share, int(mask.present.sum()))
                self._rewire(mask, gradients[name], count)

    def _rewire(self, mask: Mask, gradient: np.ndarray, count: int) -> None:
        """Drop ``count`` weights of a layer and grow as many."""
        present, shape = mask.present.reshape(-1), mask.present.shape
        staying = int(present.sum()) - count
        magnitude = np.where(present, abs(mask.weight.data).reshape(-1), -1)
        stay = largest(magnitude, staying)
        grown = largest(np.where(stay, -1, abs(gradient).reshape(-1)), count)
        mask.present = (stay | grown).reshape(shape)
        self._begin_at_zero(mask, (grown & ~present).reshape(shape))

    def _begin_at_zero(self, mask: Mask, new: np.ndarray) -> None:
        mask.weight.data[new] = 0
        for parameter, state in zip(self.optimizer.params, self.optimizer.state, strict=True):
            if parameter is mask.weight:
                for kept in state.values():
                    kept[new] = 0


def cosine_fraction(progress: float, fraction: float) -> float:
    """fraction / 2 (1 + cos(pi p)): from ``fraction`` to 0 along half a cosine."""
    return fraction / 2 * (1 + math.cos(math.pi * progress))


def erdos_renyi_counts(shapes: Sequence[tuple[int, ...]], count: int) -> list[int]:
    """How many of ``count`` weights each layer gets, the large layers being the sparser ones (ERK).

    The density of a layer is proportional to the sum of its dimensions over their product, (784 +
    300) / (784 * 300) for 784 inputs and 300 outputs: a weight is dear where there are few. Layers
    that would have more weights than places are dense. Counts are rounded down, and what is left
    goes to the largest remainders. Source: Evci et al. 2020, section 3 (1); for kernels, the
    dimensions are (C_out, kH, kW, C_in).

    Raises:
        ValueError: there are fewer places than weights.
    """
    sizes = np.array([math.prod(shape) for shape in shapes])
    wishes = np.array([sum(shape) for shape in shapes], dtype=float)  # density times size
    if not 0 <= count <= sizes.sum():
        raise ValueError(f"{count} weights do not fit into layers with {sizes.sum()}")
    full = np.zeros(len(sizes), dtype=bool)
    while True:
        left = count - sizes[full].sum()
        exact = np.where(full, sizes, wishes * left / max(wishes[~full].sum(), 1e-300))
        if not (over := ~full & (exact > sizes)).any():
            break
        full |= over
    counts = np.floor(exact + 1e-9).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: count - counts.sum()]:
        counts[i] += 1
    return [int(n) for n in counts]
