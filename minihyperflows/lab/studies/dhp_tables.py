"""Tables of the claims about DHP: what identifies a run, the files, differences between runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from minihyperflows.lab.errors import UserError
from minihyperflows.lab.records import read_records, write_records
from minihyperflows.lab.studies.alternatives import Difference, paired_differences
from minihyperflows.lab.studies.dhp_runs import Widths
from minihyperflows.lab.studies.dhp_tasks import EXPERIMENTS, Experiment

CONTROLS = "controls"  # the part whose runs end with a trained network
DHP, DENSE = "dhp", "dense"

Row: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What identifies a run. The dense network has no target and no hypernetworks: "" for both."""

    part: str
    network: str
    hyper_bias: str
    variant: str
    target: float | str
    seed: int

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


class Tables:
    """Runs, looks and groups. What is in the table of runs is in the others completely."""

    def __init__(self, out: Path) -> None:
        parts = (out.with_name(f"{out.stem}-{part}.csv") for part in ("looks", "groups"))
        self.files = [*parts, out]  # the runs last
        tables = [read_records(file) if file.exists() else [] for file in self.files]
        self.runs = {identity(row): row for row in tables[-1]}
        self.tables = [[r for r in table if identity(r) in self.runs] for table in tables]

    def add(self, looks: Sequence[Row], groups: Sequence[Row], runs: Sequence[Row]) -> None:
        """Write the tables with more rows."""
        for file, table, rows in zip(self.files, self.tables, (looks, groups, runs), strict=True):
            table += rows
            if rows:
                write_records(file, table, digits=9)
        self.runs |= {identity(row): row for row in runs}

    def join(self, other: Path) -> None:
        """Take over the runs of another record that are not here.

        Raises:
            UserError: there is no such file.
        """
        if not other.exists():
            raise UserError(f"there is no file {other}")
        tables = Tables(other).tables
        self.add(*([r for r in table if identity(r) not in self.runs] for table in tables))


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
