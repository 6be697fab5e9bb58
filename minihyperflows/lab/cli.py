"""The command line: ``minihyperflows`` and ``python -m minihyperflows``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import minihyperflows
from minihyperflows.engine import DeviceError
from minihyperflows.lab.bench import NETWORKS, BenchSettings, measure
from minihyperflows.lab.bench_table import table
from minihyperflows.lab.checkpoint import load_checkpoint, write_atomically, write_json
from minihyperflows.lab.data import NAMES
from minihyperflows.lab.errors import UserError
from minihyperflows.lab.recipes import RECIPES, Recipe, find
from minihyperflows.lab.records import collect
from minihyperflows.lab.runs import RunFolder, run, versions

DEFAULT_RECIPE = "lenet300-digits"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a user's error, 130 when interrupted."""
    options = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except (UserError, DeviceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last epoch", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="minihyperflows", description="Hyperflows pruning from scratch, in NumPy."
    )
    parser.add_argument("--version", action="version", version=minihyperflows.__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_prune(commands)
    _add_bench(commands)
    recipes = commands.add_parser("recipes", help="list the recipes")
    recipes.set_defaults(command=list_recipes)
    info = commands.add_parser("info", help="print versions and whether a GPU can be used")
    info.set_defaults(command=print_info)
    export = commands.add_parser(
        "export", help="write a checkpoint's pruned network as weights only"
    )
    export.add_argument(
        "checkpoint", type=Path, help="a run's checkpoint.safetensors, or its folder"
    )
    export.add_argument("out", type=Path, help="the .safetensors file to write")
    export.set_defaults(command=export_weights)
    collect_runs = commands.add_parser("collect", help="gather finished runs in one CSV file")
    collect_runs.add_argument("folders", type=Path, nargs="+", help="folders of finished runs")
    collect_runs.add_argument("--out", type=Path, required=True, metavar="FILE")
    collect_runs.set_defaults(command=collect_records)
    return parser


def _add_prune(commands: Any) -> None:
    prune = commands.add_parser("prune", help="train, prune and regrow a network")
    prune.add_argument(
        "recipe", nargs="?", default=DEFAULT_RECIPE, help=f"see `recipes`; default {DEFAULT_RECIPE}"
    )
    prune.add_argument(
        "--target-sparsity", type=float, metavar="S", help="fraction of the weights to remove"
    )
    prune.add_argument("--data-dir", type=Path, metavar="DIR", help="where MNIST or CIFAR lie")
    prune.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    prune.add_argument("--seed", type=_seed, default=0, metavar="N")
    prune.add_argument("--out", type=Path, metavar="DIR", help="default runs/RECIPE-S-seedN")
    prune.add_argument(
        "--epochs-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="make every stage X times as long",
    )
    prune.add_argument(
        "--dense-from",
        type=Path,
        metavar="FOLDER",
        help="begin with the dense network of this run (same settings and seed), not a new one",
    )
    prune.add_argument(
        "--no-resume", action="store_true", help="start over, replacing what is in the folder"
    )
    prune.set_defaults(command=prune_network)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="time training steps, beside PyTorch's")
    names = ", ".join(NETWORKS)
    bench.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {names}; default all")
    bench.add_argument("--layers", action="store_true", help="also time each convolution shape")
    bench.add_argument("--rounds", type=int, default=BenchSettings.rounds, metavar="N")
    bench.add_argument("--batch", type=int, metavar="N", help="default: each network's own")
    bench.add_argument("--width", type=float, default=1.0, metavar="X", help="scales the channels")
    bench.add_argument("--threads", type=int, metavar="N", help="default 2, or 1 on a single core")
    bench.add_argument("--no-torch", action="store_false", dest="torch", help="ours alone")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the record, samples too")
    bench.set_defaults(command=bench_networks)


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("a seed is a whole number from 0 on")
    return value


# -- the commands --------------------------------------------------------------------------------


def prune_network(options: argparse.Namespace) -> None:
    """``prune``: run a recipe, then print what came out."""
    recipe = find(options.recipe)
    if options.target_sparsity is not None:
        recipe = recipe.with_target(options.target_sparsity)
    if options.epochs_scale != 1:
        recipe = recipe.scaled(options.epochs_scale)
    out = options.out or default_folder(recipe, options.seed)
    folder = RunFolder(out)
    if folder.summary.exists() and not options.no_resume:
        print(f"{out} is finished already; --no-resume runs it again")
    else:
        print(describe(recipe, options.seed))
    summary = run(
        recipe,
        out,
        data_dir=options.data_dir,
        device=options.device,
        seed=options.seed,
        resume=not options.no_resume,
        dense_from=options.dense_from,
    )
    print(summary_table(summary))
    print(f"records and plots: {out}")


def default_folder(recipe: Recipe, seed: int) -> Path:
    """Where a run goes that is not told where to go."""
    return Path("runs") / f"{recipe.name}-{recipe.target_sparsity:g}-seed{seed}"


def describe(recipe: Recipe, seed: int) -> str:
    """A line that says what is about to run."""
    stages = recipe.timeline
    return (
        f"{recipe.name}: {recipe.model} on {recipe.dataset} to sparsity "
        f"{recipe.target_sparsity:.2%}, "
        f"{stages.dense} dense + {stages.pruning} pruning + {stages.regrowth} regrowth epochs, "
        f"seed {seed}"
    )


def summary_table(summary: dict[str, Any]) -> str:
    """The figures of a finished run, dense beside pruned."""
    s = summary
    dense_accuracy = "" if s["dense_accuracy"] is None else f"{s['dense_accuracy']:.2%}"
    rows = [
        ("", "dense", "pruned"),
        ("test accuracy", dense_accuracy, f"{s['test_accuracy']:.2%}"),
        ("sparsity", f"{0:.2%}", f"{s['sparsity']:.2%}"),
        ("weights", f"{s['weights']:,}", f"{s['remaining']:,}"),
        ("FLOPs per image", f"{s['flops_dense']:,}", f"{s['flops_sparse']:,}"),
    ]
    lines = [f"{name:<16}{dense:>16}{pruned:>16}" for name, dense, pruned in rows]
    note = (
        f"target {s['target_sparsity']:.2%}; before regrowth {s['sparsity_before_regrowth']:.2%} "
        f"at {s['accuracy_before_regrowth']:.2%} accuracy; {s['seconds']:.0f} s"
    )
    return "\n".join(["", *lines, "", note])


def list_recipes(_: argparse.Namespace) -> None:
    """``recipes``: name, target and length of each, and how it departs from the authors' code."""
    for recipe in RECIPES.values():
        stages = recipe.timeline
        print(
            f"{recipe.name:<26}{recipe.model} on {recipe.dataset}, sparsity "
            f"{recipe.target_sparsity:g}, epochs {stages.dense}+{stages.pruning}+{stages.regrowth}"
        )
        for deviation in recipe.deviations:
            print(f"{'':<26}- {deviation}")


def print_info(_: argparse.Namespace) -> None:
    """``info``: what a report of a problem should contain."""
    for name, version in versions().items():
        print(f"{name:<16}{version}")
    gpu = "available" if minihyperflows.cuda_available() else "not available"
    print(f"{'GPU (CuPy)':<16}{gpu}")
    print(f"{'data sets':<16}{', '.join(NAMES)}")


def bench_networks(options: argparse.Namespace) -> None:
    """``bench``: time the pruning steps of networks, beside PyTorch's, and print a table."""
    settings = BenchSettings(
        networks=tuple(options.networks) or tuple(NETWORKS),
        layers=options.layers,
        rounds=options.rounds,
        batch=options.batch,
        width=options.width,
        threads=options.threads,
        torch=options.torch,
    )
    if options.json and not options.json.parent.is_dir():  # say so before minutes of work
        raise UserError(f"cannot write {options.json}: there is no folder {options.json.parent}")
    with tqdm(bar_format="{elapsed} {desc}", dynamic_ncols=True, leave=False) as line:
        record = measure(settings, progress=line.set_description_str)
    print(table(record))
    if options.json:
        write_json(options.json, record)


def collect_records(options: argparse.Namespace) -> None:
    """``collect``: one row per run, with its provenance."""
    print(f"{options.out}: {collect(options.folders, options.out)} runs")


def export_weights(options: argparse.Namespace) -> None:
    """``export``: the weights of a run with the zeros written in, under PyTorch's names."""
    from safetensors.numpy import save

    path = options.checkpoint
    path = RunFolder(path).checkpoint if path.is_dir() else path
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}: give a run's folder or its checkpoint")
    arrays, values = load_checkpoint(path)
    weights = pruned_weights(arrays)
    metadata = {"recipe": values["recipe"]["name"], "epoch": str(values["trainer"]["epoch"])}
    write_atomically(options.out, save(weights, metadata))
    print(f"{options.out}: {len(weights)} tensors")


def pruned_weights(arrays: dict[str, Any]) -> dict[str, Any]:
    """The network's tensors out of a checkpoint, weights multiplied by their gates."""
    net = {k.removeprefix("net."): v for k, v in arrays.items() if k.startswith("net.")}
    suffix = ".presence"
    masks = {k.removesuffix(suffix): v >= 0 for k, v in net.items() if k.endswith(suffix)}
    return {
        name: value * masks[name.removesuffix(".weight")]
        if name.removesuffix(".weight") in masks and name.endswith(".weight")
        else value
        for name, value in net.items()
        if not name.endswith(suffix)
    }


if __name__ == "__main__":
    sys.exit(main())
