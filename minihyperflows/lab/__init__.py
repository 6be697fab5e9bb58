"""Running experiments: recipes, training, runs, sweeps, plots."""

from minihyperflows.data.datasets import Dataset, make_shapes32, normalise
from minihyperflows.errors import UserError
from minihyperflows.lab.networks import load
from minihyperflows.lab.recipes import RECIPES, Recipe
from minihyperflows.lab.registry import register
from minihyperflows.lab.runs import run
from minihyperflows.lab.sweep import run_sweep
from minihyperflows.lab.training import EpochRecord, Trainer, build_network, evaluate, train

__all__ = [
    "RECIPES",
    "Dataset",
    "EpochRecord",
    "Recipe",
    "Trainer",
    "UserError",
    "build_network",
    "evaluate",
    "load",
    "make_shapes32",
    "normalise",
    "register",
    "run",
    "run_sweep",
    "train",
]
