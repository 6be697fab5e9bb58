"""A study that takes no time; its workers may die or fail where a file beside the table says so."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

from minihyperflows.errors import UserError
from minihyperflows.lab.sweep import parse_gammas
from minihyperflows.studies.frame import Bench, Study
from minihyperflows.studies.options import choice, one, parse_count, parse_fraction, seeds, values


@dataclasses.dataclass(frozen=True)
class Toy:
    letter: str = choice("a", "b")
    share: float = values(parse_fraction, 0.5, 0.25, others=("--shares",))
    length: int = one(parse_count, 3, identity=False)
    gammas: Any = one(parse_gammas)
    seed: int = seeds(2)


class Toys(Study[Toy]):
    """What a toy is worth."""

    name, Setting = "toys", Toy
    parts = ("steps",)
    shown = ("worth",)

    def shares(self, s: Toy) -> Any:
        return s.letter, s.seed

    def check(self, s: Toy, bench: Bench) -> None:
        if s.share > 0.9:
            raise UserError(f"{s.share} is too much")

    def run(self, s: Toy, bench: Bench) -> list[list[dict[str, Any]]]:
        made = bench.shared(("dense", s.letter, s.seed), lambda: _note(bench.out, "made", s))
        _note(bench.out, "done", s)
        for way in ("die", "fail"):
            order = bench.out.with_name(f"{way}-{s.letter}{s.share}")
            if order.exists():
                order.unlink()
                if way == "fail":
                    raise UserError("it is broken")
                os.kill(os.getpid(), signal.SIGKILL)
        bench.tick()
        row = {"worth": s.share * (1 + s.seed), "length": s.length, "made_by": made}
        if bench.plugins:
            row["images"] = len(bench.data("stripes").train_y)
        return [[{"step": k} for k in range(s.length)], [row]]


def _note(out: Path, what: str, s: Toy) -> str:
    """Write down that it was done; by whom is not said, as any process may do it."""
    with open(out.with_name(f"{what}.txt"), "a", encoding="utf-8") as file:
        file.write(f"{s.letter} {s.share} {s.seed}\n")
    return s.letter


STUDY = Toys()
