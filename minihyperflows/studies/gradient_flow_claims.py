"""The claims of the gradient-flow framework for pruning (Lubana & Dick 2021), measured.

    minihyperflows study gradient_flow_claims --part weights --dataset mnist \\
        --data-dir DIR --out FILE
    minihyperflows study gradient_flow_claims --part filters --dataset cifar10 \\
        --data-dir DIR --out FILE

removes single weights of LeNet-300, or filters of small VGG-13, ResNet-20 and MobileNet-V1, by
their scores: in 1, 5 or 25 rounds, from the initial network, after one epoch or late. All runs have
equally many epochs. :mod:`~minihyperflows.studies.gradient_flow_weights` and
:mod:`~minihyperflows.studies.gradient_flow_filters` say what the scores and controls are,
:mod:`~minihyperflows.studies.gradient_flow_runs` how a run goes and what its columns mean.

A row for each run, with ``score``, ``temperature``, ``start`` (epochs before the first round),
``rounds``, ``kept`` (the fraction that is to stay), ``seed``, ``control`` (filters: empty for the
score's own run), ``remaining`` of ``total`` weights or channels, and ``density_LAYER`` or
``widths``. Score "dense" is the training without pruning.

The default grid on MNIST takes about an hour of one core.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from minihyperflows.errors import UserError
from minihyperflows.studies import gradient_flow_filters as filters
from minihyperflows.studies import gradient_flow_weights as weights
from minihyperflows.studies.frame import Bench, Study, Tables, main
from minihyperflows.studies.gradient_flow_runs import (
    DTYPE,
    Build,
    Plan,
    Ranking,
    Row,
    Task,
    train_dense,
)
from minihyperflows.studies.options import (
    DIGITS,
    choice,
    one,
    parse_count,
    parse_fraction,
    parse_seed,
    values,
)

DENSE = "dense"
ROUNDS = (1, 5, 25)


@dataclasses.dataclass(frozen=True)
class Part:
    """What can be chosen from, and what is chosen by default."""

    networks: Mapping[str, Build]
    plans: Mapping[str, Plan]
    rankings: Mapping[str, Ranking]
    scores: tuple[str, ...]
    starts: tuple[int, ...]
    kept: tuple[float, ...]
    seeds: tuple[int, ...]
    controls: tuple[str, ...] = ()


PARTS = {
    "weights": Part(
        networks={weights.NETWORK: weights.build},
        plans=weights.PLANS,
        rankings=weights.RANKINGS,
        scores=(DENSE, *weights.RANKINGS),
        starts=weights.TIMES,
        kept=weights.KEPT,
        seeds=(0, 1, 2, 3),
    ),
    "filters": Part(
        networks=filters.NETWORKS,
        plans=filters.PLANS,
        rankings=filters.RANKINGS,
        scores=(DENSE, *filters.SCORES),
        starts=filters.TIMES,
        kept=filters.KEPT,
        seeds=(0, 1),
        controls=filters.CONTROLS,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run with its controls."""

    part: str = choice(*PARTS, default=["weights"])
    dataset: str = one(str, help="digits or mnist; for filters cifar10 or shapes32")
    images: int = one(parse_count, help="of the training set")
    epochs: int = one(parse_count, help="of the whole training")
    network: str = values(str, others=("--networks",), help="default: those of the part")
    score: str = values(str, others=("--scores",), help="default: those of the part")
    start: int = values(int, others=("--starts", "--times"), help="epochs before the first round")
    rounds: int = values(int, *ROUNDS)
    kept: float = values(partial(parse_fraction, whole=True), help="fractions that are to stay")
    controls: Any = values(
        str, None, several="*", identity=False, help="of filters: widths, uniform, or nothing"
    )
    seed: int = values(parse_seed, help="certain seeds; default: those of the part")


class GradientFlowClaims(Study[Run]):
    """The claims of the gradient-flow framework for pruning (Lubana & Dick 2021), measured."""

    name, Setting, digits = "gradient_flow_claims", Run, DIGITS
    identity = (
        *("part", "dataset", "images", "epochs", "network", "score", "start", "rounds", "kept"),
        *("seed", "control"),
    )
    shown = ("test_accuracy", "train_loss")

    def plan(self, chosen: dict[str, tuple[Any, ...]]) -> Iterator[Run]:
        """Combinations in an order in which few dense networks are needed at a time."""
        for name in chosen["part"]:
            part, (dataset,) = PARTS[name], chosen["dataset"]
            networks = _known("network", chosen["network"] or tuple(part.networks), part.networks)
            scores = _known("score", chosen["score"] or part.scores, (DENSE, *part.rankings))
            controls = chosen["controls"]
            controls = part.controls if controls == (None,) else tuple(dict.fromkeys(controls))
            _known("controls", controls, part.controls)
            (dataset,) = _known("dataset", (dataset or next(iter(part.plans)),), part.plans)
            plan = part.plans[dataset]
            images, epochs = chosen["images"][0], chosen["epochs"][0]
            head = name, dataset, images or plan.images, epochs or plan.epochs
            seeds = chosen["seed"] or part.seeds
            choices = chosen["start"] or part.starts, chosen["rounds"], chosen["kept"] or part.kept
            for network, seed, score in itertools.product(networks, seeds, scores):
                times = [(0, 0, 1.0)] if score == DENSE else itertools.product(*choices)
                for start, rounds, kept in times:
                    yield Run(*head, network, score, start, rounds, kept, controls, seed)

    def keys(self, s: Run) -> list[tuple[Any, ...]]:
        controls = [""] if s.score == DENSE else ["", *s.controls]
        head = tuple(getattr(s, name) for name in self.identity[:-1])
        return [(*head, control) for control in controls]

    def key(self, s: Run) -> tuple[Any, ...]:
        return self.keys(s)[0]

    def shares(self, s: Run) -> tuple[str, int]:
        return s.network, s.seed

    def dataset(self, s: Run) -> str:
        return s.dataset

    def dtype(self, s: Run) -> str:
        return DTYPE.__name__

    def command(self, s: Run, device: str = "cpu") -> str:
        given = s if PARTS[s.part].controls else dataclasses.replace(s, controls=None)
        return super().command(given, device)

    def plan_of(self, s: Run) -> Plan:
        """How the training goes."""
        plan = PARTS[s.part].plans[s.dataset]
        return dataclasses.replace(plan, images=s.images, epochs=s.epochs)

    def task(self, s: Run, bench: Bench) -> Task:
        """The data, the plan and the network, with the dense networks that runs share."""
        key = ("task", s.dataset, s.images, s.epochs, s.network)
        build = PARTS[s.part].networks[s.network]
        return bench.shared(key, lambda: Task(bench.data(s.dataset), self.plan_of(s), build))

    def check(self, s: Run, bench: Bench) -> None:
        task = self.task(s, bench)
        if s.score != DENSE:
            self.plan_of(s).check(s.start, s.rounds)
            if s.part == "filters":
                filters.require_possible(task, s.kept, s.network)

    def run(self, s: Run, bench: Bench) -> Tables:
        task, ranking = self.task(s, bench), PARTS[s.part].rankings.get(s.score)
        asked = s.score, s.start, s.rounds, s.kept, s.seed
        if s.score == DENSE:
            found: Iterable[Row] = [train_dense(task, s.seed)]
        elif s.part == "weights":
            found = [weights.run(task, *asked)]
        else:
            found = filters.run(task, *asked, s.controls)
        temperature = ranking.temperature if ranking else ""
        return [[{"temperature": temperature, "control": ""} | row for row in found]]

    def order(self, row: Row) -> Any:
        return self.key_of(row)


def _known(option: str, given: Sequence[str], known: Collection[str]) -> Sequence[str]:
    for name in given:
        if name not in known:
            there = f"choose from {', '.join(known)}" if known else "there are none in this part"
            raise UserError(f"--{option}: there is no {name!r}; {there}")
    return given


STUDY = GradientFlowClaims()

if __name__ == "__main__":
    main(STUDY, listed=True)
