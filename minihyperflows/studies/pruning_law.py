"""The neural pruning law: the smallest saliency that survives, against the density (chapter 10).

    minihyperflows study pruning_law --recipe lenet300-digits --out FILE

Five ways of pruning, each from the same dense network (for the same seed) and with the same loss,
optimiser and learning rate:

* ``magnitude``: each step removes the tenth of the remaining weights with the smallest |w|, of the
  whole network, then trains for some batches.
* ``magnitude-untrained``: the same without the training. The thresholds are then just the quantiles
  of the dense network's |w|, and show how much of the law is made by training.
* ``taylor``: like ``magnitude``, but with |w g|, where g is the mean gradient of the loss over
  TAYLOR_BATCHES random batches of the training set.
* ``taylor-batches``: the same with the mean of |w g_b| over these batches b. (Which of the two
  forms the authors took is not known.)
* ``pressure``: a staircase. The pressure gamma doubles again and again, each level lasts some
  epochs, and nothing else changes.

A row is a step, or a level of the staircase. Its columns:

``density``, ``remaining``: after the prune, or at the end of the level.
``saliency``: the largest that was removed in the step; for the pressure 4 gamma / N. The flux
-kappa w g holds a weight up against the push gamma / N, and the two balance where |w g| is
gamma / (kappa N), with kappa = 1/4. So the unit is that of ``taylor``: a change of the loss.
``smallest_surviving``: the smallest saliency among the weights that stayed.
``push``: gamma / N. ``flips``: weights that left or came back, over all steps of the level.
``density_halfway``: after half of the level's epochs, to judge whether the density has settled.
``accuracy_before_prune``: with the weights of the step before; ``accuracy_after_prune``: before any
training; ``test_accuracy``: after it, or at the end of the level.
``train_loss``: mean over the step's batches, or over the last epoch of the level.
``sparsest_layer``, ``sparsest_density``: where the smallest fraction of the weights is left.

An unfinished run goes on from a checkpoint beside the file.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from minihyperflows import flows
from minihyperflows import functional as F
from minihyperflows.analysis.summaries import means
from minihyperflows.data.datasets import Dataset
from minihyperflows.engine import Tensor
from minihyperflows.errors import UserError
from minihyperflows.flows.gates import gated_layers, is_present
from minihyperflows.flows.stages import PRUNING
from minihyperflows.lab.checkpoint import load_checkpoint, save_checkpoint
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import Row
from minihyperflows.lab.sweep import parse_gammas
from minihyperflows.lab.training import Trainer, build_network, evaluate
from minihyperflows.nn import Module
from minihyperflows.nn.counting import kept_weights
from minihyperflows.studies.frame import Bench, Study, Tables, main
from minihyperflows.studies.options import choice, one, parse_count, seeds

UNTRAINED = "magnitude-untrained"
ITERATIVE = ("magnitude", UNTRAINED, "taylor", "taylor-batches")
METHODS = (*ITERATIVE, "pressure")
SHARE = 0.1  # of the remaining weights that a step removes
TAYLOR_BATCHES = 40
SAVE_EVERY = 60.0  # seconds between checkpoints


@dataclasses.dataclass(frozen=True)
class Setting:
    """How long the parts of a run are.

    Attributes:
        recipe: its dense stage, and the training of its pruning stage at a constant rate.
        steps: of iterative pruning; 72 leave 0.05 % of the weights.
        batches: of training in each step.
        gammas: the levels of the staircase.
        epochs_per_level: an even number, so that there is a half.
    """

    recipe: Recipe
    steps: int
    batches: int
    gammas: tuple[float, ...]
    epochs_per_level: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batches < 1:
            raise UserError("a run needs at least one step, and one batch in it")
        if self.epochs_per_level < 2 or self.epochs_per_level % 2:
            raise UserError(
                "a level has an even number of epochs (its density is noted half-way), not "
                f"{self.epochs_per_level}"
            )
        if min(self.gammas) <= 0:
            raise UserError("the levels of the staircase are pressures above 0")

    def timed(self, method: str) -> Recipe:
        """The recipe of a run: constant rates, and as many pruning epochs as steps or levels."""
        pruning = self.recipe.pruning
        fields: dict[str, Any] = {
            "pruning.schedule": "constant",
            "pruning.lr": pruning.end_lr if pruning.schedule == "cosine" else pruning.lr,
            "pruning.epochs": len(self.gammas) * self.epochs_per_level,
        }
        if method == "pressure":
            return self.recipe.with_gamma(self.gammas[0]).with_fields(fields)
        fields |= {"pruning.epochs": self.steps, "presence.lr": 0.0}  # no gate moves by itself
        if method == UNTRAINED:
            fields["pruning.lr"] = 0.0
        return self.recipe.with_gamma(0.0).with_fields(fields)


SETTINGS = {
    name: Setting(find(name), steps, batches, parse_gammas(gammas), epochs)
    for name, steps, batches, gammas, epochs in (
        ("lenet300-digits", 72, 45, "2^-8:2^8", 20),
        ("lenet300-mnist", 72, 156, "2^-8:2^8", 4),
        ("vgg19-small-cifar10", 72, 196, "2^-6:2^4:2", 2),
    )
}

# -- iterative pruning ---------------------------------------------------------------------------


def prune_lowest(net: Module, saliency: dict[str, np.ndarray], keep: int) -> tuple[float, float]:
    """Close the gates of all present weights but the ``keep`` most salient of the whole network.

    Args:
        net: a network with gates.
        saliency: of every weight, by layer.
        keep: at least 1, and less than there are.

    Returns:
        The largest saliency that was removed and the smallest that stayed.
    """
    layers = gated_layers(net)
    mask = np.concatenate([is_present(m.presence.data).reshape(-1) for m in layers.values()])
    present = np.flatnonzero(mask)
    scores = np.concatenate([saliency[name].reshape(-1) for name in layers])[present]
    remove = present.size - keep
    order = np.argpartition(scores, (remove - 1, remove))
    mask[present[order[:remove]]] = False
    start = 0
    for layer in layers.values():
        t = layer.presence.data
        t[...] = np.where(mask[start : start + t.size].reshape(t.shape), 1.0, -1.0)
        start += t.size
    return float(scores[order[remove - 1]]), float(scores[order[remove]])


class IterativeTrainer(Trainer):
    """Prunes by a saliency before each "epoch" of the pruning stage, which has ``batches`` batches.

    The gates only hold the mask: t is +1 or -1 and does not move.
    """

    def __init__(
        self,
        net: Module,
        data: Dataset,
        recipe: Recipe,
        rng: np.random.Generator,
        method: str,
        batches: int,
    ) -> None:
        super().__init__(net, data, recipe, rng)
        self.method, self.in_a_step = method, batches
        self.cut: Row = {}  # what the last prune did

    def enter(self) -> None:
        super().enter()
        if self.stage == PRUNING:
            weights = sum(t.size for t in flows.presences(self.net).values())
            keep = kept_weights((1 - SHARE) ** self.stage_epoch, weights)
            removed, kept = prune_lowest(self.net, self._saliency(), keep)
            accuracy = evaluate(self.net, self.data)
            self.cut = {
                "saliency": removed,
                "smallest_surviving": kept,
                "accuracy_after_prune": accuracy,
            }

    def _saliency(self) -> dict[str, np.ndarray]:
        layers = gated_layers(self.net)
        if self.method in ("magnitude", UNTRAINED):
            return {name: abs(layer.weight.data) for name, layer in layers.items()}
        return taylor_saliency(
            self.net,
            islice(super().batches(), TAYLOR_BATCHES),
            self.recipe.pruning.label_smoothing,
            each=self.method == "taylor-batches",
        )

    def batches(self) -> Generator[tuple[Tensor, np.ndarray]]:
        yield from islice(super().batches(), self.in_a_step if self.stage == PRUNING else None)


def taylor_saliency(
    net: Module, batches: Any, label_smoothing: float, each: bool
) -> dict[str, np.ndarray]:
    """|w g| by layer, g the mean gradient over ``batches``; with ``each`` the mean of |w g_b|.

    The gradient of t without pressure is the flux kappa w g, so it is there already.
    """
    layers, count = gated_layers(net), 0
    totals = {name: np.zeros(layer.weight.shape) for name, layer in layers.items()}
    for x, y in batches:
        net.zero_grad()
        F.cross_entropy(net(x), y, label_smoothing).backward()
        count += 1
        for name, layer in layers.items():
            flux = np.asarray(layer.presence.grad)
            totals[name] += abs(flux) if each else flux
    net.zero_grad()
    return {name: abs(total) / (flows.KAPPA * count) for name, total in totals.items()}


# -- the staircase -------------------------------------------------------------------------------


class StaircaseTrainer(Trainer):
    """Trains under a pressure that goes to the next of ``gammas`` after every few epochs."""

    def __init__(
        self,
        net: Module,
        data: Dataset,
        recipe: Recipe,
        rng: np.random.Generator,
        gammas: Sequence[float],
        epochs_per_level: int,
    ) -> None:
        super().__init__(net, data, recipe, rng)
        self.gammas, self.epochs_per_level = gammas, epochs_per_level

    def gamma(self) -> float:
        if self.stage != PRUNING:
            return 0.0
        return self.gammas[(self.epoch - self.recipe.dense.epochs) // self.epochs_per_level]


# -- one run -------------------------------------------------------------------------------------


def new_trainer(setting: Setting, method: str, data: Dataset, seed: int) -> Trainer:
    """A run at its beginning; the dense stage is the same with all methods."""
    recipe, rng = setting.timed(method), np.random.default_rng(seed)
    net = build_network(recipe, data, rng)
    if method == "pressure":
        levels = setting.gammas, setting.epochs_per_level
        return StaircaseTrainer(net, data, recipe, rng, *levels)
    batches = 1 if method == UNTRAINED else setting.batches
    return IterativeTrainer(net, data, recipe, rng, method, batches)


def run(
    setting: Setting,
    method: str,
    data: Dataset,
    seed: int,
    checkpoint: Path | None = None,
    after_epoch: Callable[[int], Any] = lambda epoch: None,
) -> list[Row]:
    """Carry out a run, or the rest of it; returns its rows.

    Args:
        setting, method, seed: which run.
        data: the recipe's data set.
        checkpoint: a file for its state, if it takes long; removed at the end.
        after_epoch: called with the number of epochs (or steps) that are over.
    """
    trainer = new_trainer(setting, method, data, seed)
    history: list[Row] = []
    key = [setting.timed(method).to_json(), dataclasses.asdict(setting), method, seed]
    if checkpoint is not None and checkpoint.exists():
        arrays, values = load_checkpoint(checkpoint, advice="remove it to start over")
        if values["key"] != _plain(key):
            raise UserError(f"{checkpoint} belongs to a run with other settings: remove it")
        trainer.load_state_dict(arrays, values["trainer"])
        history = values["history"]
    saved = time.monotonic()
    while not trainer.finished:
        record = trainer.run_epoch()
        history.append(record.row() | _inside(trainer))
        after_epoch(trainer.epoch)
        late = time.monotonic() > saved + SAVE_EVERY
        if checkpoint is not None and late and not trainer.finished:
            arrays, values = trainer.state_dict()
            values = {"key": key, "trainer": values, "history": history}
            save_checkpoint(checkpoint, arrays, values)
            saved = time.monotonic()
    weights = sum(t.size for t in flows.presences(trainer.net).values())
    head = {"method": method, "recipe": setting.recipe.name, "dataset": data.name, "seed": seed}
    rows = levels(history, setting) if method == "pressure" else steps(history)
    return [head | _counted(row, weights) for row in rows]


def _plain(values: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(values, dict):
        return {k: _plain(v) for k, v in values.items()}
    return [_plain(v) for v in values] if isinstance(values, list | tuple) else values


def _inside(trainer: Trainer) -> Row:
    """What else an epoch's row needs."""
    if not flows.presences(trainer.net):
        return {}
    densities = flows.layer_density(trainer.net)
    name = min(densities, key=lambda layer: densities[layer])
    cut = trainer.cut if isinstance(trainer, IterativeTrainer) else {}
    return cut | {"sparsest_layer": name, "sparsest_density": densities[name]}


KEPT = ("density", "test_accuracy", "train_loss", "sparsest_layer", "sparsest_density", "seconds")
COLUMNS = (
    *("step", "density", "remaining", "weights", "saliency", "smallest_surviving", "gamma", "push"),
    *("density_halfway", "flips", "accuracy_before_prune", "accuracy_after_prune"),
    *("test_accuracy", "train_loss", "sparsest_layer", "sparsest_density", "seconds"),
)  # those of the other methods are empty


def steps(history: Sequence[Row]) -> list[Row]:
    """A row for each step of iterative pruning."""
    rows: list[Row] = []
    for before, now in pairwise(history):
        if now["stage"] == PRUNING:
            row = {
                "step": len(rows) + 1,
                "saliency": now["saliency"],
                "smallest_surviving": now["smallest_surviving"],
                "accuracy_before_prune": before["test_accuracy"],
                "accuracy_after_prune": now["accuracy_after_prune"],
            }
            rows.append(row | {name: now[name] for name in KEPT})
    return rows


def levels(history: Sequence[Row], setting: Setting) -> list[Row]:
    """A row for each level of the staircase."""
    rows: list[Row] = []
    pruning, length = [r for r in history if r["stage"] == PRUNING], setting.epochs_per_level
    for start in range(0, len(pruning), length):
        level = pruning[start : start + length]
        row = {
            "step": len(rows) + 1,
            "gamma": level[-1]["gamma"],
            "density_halfway": level[length // 2 - 1]["density"],
            "flips": sum(epoch["flips"] for epoch in level),
        }
        last = {name: level[-1][name] for name in KEPT}
        rows.append(row | last | {"seconds": sum(epoch["seconds"] for epoch in level)})
    return rows


def _counted(row: Row, weights: int) -> Row:
    """All columns, with those that depend on the number of weights."""
    row = row | {"weights": weights, "remaining": round(row["density"] * weights)}
    if "gamma" in row:
        push = row["gamma"] / weights
        row |= {"push": push, "saliency": push / flows.KAPPA}
    return {name: row.get(name, "") for name in COLUMNS}


# -- the study -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What tells a run from all others; None: not for this method, or as the recipe has it."""

    recipe: str = choice(*SETTINGS, default=["lenet300-digits"])
    method: str = choice(*METHODS, others=("--methods",))
    dense_epochs: int | None = one(parse_count, help="default: the recipe's")
    steps: int | None = one(parse_count, help="of iterative pruning")
    batches: int | None = one(parse_count, help="of training in a step")
    gammas: Any = one(parse_gammas, help="levels of the staircase, as for minihyperflows sweep")
    epochs_per_level: int | None = one(parse_count, help="an even number")
    seed: int = seeds(1)


ITERATIVE_ONLY, STAIRS_ONLY = ("steps", "batches"), ("gammas", "epochs_per_level")


def setting_of(run: Run) -> Setting:
    """How long its parts are.

    Raises:
        UserError: something is impossible.
    """
    setting = SETTINGS[run.recipe]
    given = {name: getattr(run, name) for name in (*ITERATIVE_ONLY, *STAIRS_ONLY)}
    changes = {name: value for name, value in given.items() if value is not None}
    if run.dense_epochs is not None:
        changes["recipe"] = setting.recipe.with_fields({"dense.epochs": run.dense_epochs})
    return dataclasses.replace(setting, **changes)


class PruningLaw(Study[Run]):
    """The neural pruning law: the smallest saliency that survives, against the density."""

    name, Setting, digits = "pruning_law", Run, 6
    later = ("dense_epochs", *ITERATIVE_ONLY, *STAIRS_ONLY)

    def plan(self, chosen: dict[str, tuple[Any, ...]]) -> Iterable[Run]:
        return [self._whole(run) for run in super().plan(chosen)]

    def _whole(self, run: Run) -> Run:
        """With everything that matters to its method, and nothing else."""
        setting = setting_of(run)
        own, other = ITERATIVE_ONLY, STAIRS_ONLY
        if run.method == "pressure":
            own, other = other, own
        fields = {name: getattr(setting, name) for name in own} | dict.fromkeys(other)
        return dataclasses.replace(run, dense_epochs=setting.recipe.dense.epochs, **fields)

    def added(self, row: Row, column: str) -> Any:
        """Records of the past are of the recipes' own lengths."""
        run = Run(row["recipe"], row["method"], None, None, None, None, None, row["seed"])
        return getattr(self._whole(run), column)

    def dataset(self, s: Run) -> str:
        return SETTINGS[s.recipe].recipe.dataset

    def dtype(self, s: Run) -> str:
        return SETTINGS[s.recipe].recipe.dtype

    def check(self, s: Run, bench: Bench) -> None:
        bench.data(self.dataset(s))

    def run(self, s: Run, bench: Bench) -> Tables:
        data, file = bench.data(self.dataset(s)), self.checkpoint(s, bench.out)
        return [run(setting_of(s), s.method, data, s.seed, file, lambda epoch: bench.tick())]

    def checkpoint(self, s: Run, out: Path) -> Path:
        """The state of an unfinished run."""
        return out.with_name(f"{out.stem}-{s.recipe}-{s.method}-{s.seed}.safetensors")

    def recorded(self, s: Run, out: Path) -> None:
        self.checkpoint(s, out).unlink(missing_ok=True)

    def order(self, row: Row) -> Any:
        return row["recipe"], METHODS.index(row["method"]), row["seed"], row["step"]

    def report(self, rows: Sequence[Row]) -> str:
        return means(rows, ("recipe", "method", "step"), ("density", "saliency", "test_accuracy"))


STUDY = PruningLaw()

if __name__ == "__main__":
    main(STUDY, listed=True)
