"""Tables of the claims about DHP: what identifies a run, the files, differences between runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from minihyperflows.analysis import Difference, paired_differences
from minihyperflows.lab.records import Record
from minihyperflows.studies.dhp_runs import RULES, Widths
from minihyperflows.studies.dhp_tasks import EXPERIMENTS, Experiment
from minihyperflows.studies.options import choice, parse_fraction, seeds, values

CONTROLS = "controls"  # the part whose runs end with a trained network
DHP, DENSE = "dhp", "dense"
SEARCHED = (DHP, "permuted")  # begin with a search
PULLS = {"x0.25": 0.25, "x1": 1.0, "x4": 4.0}
PARTS: dict[str, tuple[str, ...]] = {
    "search": tuple(PULLS),
    "rules": tuple(RULES),
    "decay": ("neither", "decay", "l1", "both"),
    CONTROLS: (*SEARCHED, "scratch", "short", "uniform", "random", DENSE),
}
VARIANTS = [name for variants in PARTS.values() for name in variants]
BIAS = {"yes": True, "no": False}

Row: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What identifies a run. The dense network has no target and no hypernetworks: "" for both."""

    part: str = choice(*PARTS, default=(), others=("--parts",), help="all by default")
    network: str = choice(*EXPERIMENTS, default=["mlp-digits"], others=("--networks",))
    hyper_bias: str = choice(*BIAS)
    variant: str = choice(*VARIANTS, default=(), others=("--variants",), help="all by default")
    target: float | str = values(
        parse_fraction, others=("--targets",), help="fractions of the multiplications to keep"
    )
    seed: int = seeds(5)

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS[self.network]

    @property
    def epochs(self) -> int:
        """How many it has, or at most."""
        return self.experiment.budget if self.part == CONTROLS else self.experiment.search

    def variation(self, variant: str) -> Run:
        """The same with another variant."""
        return dataclasses.replace(self, variant=variant)


COLUMNS = tuple(field.name for field in dataclasses.fields(Run))


def identity(row: Row) -> Run:
    """The run that a row belongs to."""
    return Run(*(row[name] for name in COLUMNS))


def text_of(widths: Widths) -> str:
    """Of every group, as text for a table: "input 64, 1 41"."""
    return ", ".join(f"{name} {width}" for name, width in widths.items())


def widths_of(text: str) -> Widths:
    """What :func:`text_of` wrote down."""
    return {name: int(width) for name, width in (part.split() for part in text.split(", "))}


# -- the files -----------------------------------------------------------------------------------


class Tables(Record):
    """Looks, groups and runs."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, ("looks", "groups"), identity, COLUMNS, digits=9)

    @property
    def runs(self) -> dict[Run, Row]:
        """The rows of the runs."""
        return {identity(row): row for row in self.tables[-1]}


# -- reading the tables --------------------------------------------------------------------------


def differences(rows: Sequence[Row], network: str, hyper_bias: str = "yes") -> list[Difference]:
    """How much better DHP scores than each control, over the seeds that both have."""
    rows = [r for r in rows if (r["part"], r["network"]) == (CONTROLS, network)]
    found = [r for r in rows if r["hyper_bias"] == hyper_bias]
    targets = sorted({r["target"] for r in found})
    dense = [r | {"target": t} for t in targets for r in rows if r["variant"] == DENSE]
    return paired_differences(
        [
            {
                "method": "whole" if r["variant"] == DENSE else r["variant"],
                "target_sparsity": r["target"],
                "seed": r["seed"],
                "test_accuracy": r["score"],
            }
            for r in found + dense
        ],
        reference=DHP,
    )
