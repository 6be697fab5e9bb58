"""The command line: ``minihyperflows`` and ``python -m minihyperflows``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import minihyperflows
from minihyperflows.bench.gpu_steps import GpuBenchSettings, measure_on_gpu
from minihyperflows.bench.steps import NETWORKS, BenchSettings, measure
from minihyperflows.bench.table import gpu_table, table
from minihyperflows.engine.backend import require_gpu
from minihyperflows.errors import UserError
from minihyperflows.lab import registry
from minihyperflows.lab.checkpoint import (
    load_checkpoint,
    named_path,
    remove_temporary,
    write_atomically,
    write_json,
)
from minihyperflows.lab.console import Parser, run_command, warn
from minihyperflows.lab.folders import RunFolder, require_exportable, require_own_record
from minihyperflows.lab.grammar import add_changes, add_plugins, changed
from minihyperflows.lab.locks import locked_file
from minihyperflows.lab.plugins import load_plugins
from minihyperflows.lab.ranges import Range, number, shown, whole
from minihyperflows.lab.recipes import (
    NAMED,
    RECIPES,
    Recipe,
    fields_with_ranges,
    find_or_read,
    flat,
)
from minihyperflows.lab.records import collect, require_folder
from minihyperflows.lab.runs import run, versions
from minihyperflows.lab.sweep import SweepFolder, parse_gammas, run_sweep
from minihyperflows.studies import frame
from minihyperflows.studies.command import CONTINUES

DEFAULT_RECIPE = "lenet300-digits"
NOTHING = "nothing was written"
RESUMES = "the same command continues from the last epoch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a user's error, 130 when interrupted."""
    options = argparse.Namespace()

    def work() -> None:
        build_parser().parse_args(arguments, options)
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)

    return run_command(work, lambda: getattr(options, "after_interrupt", NOTHING))


def build_parser() -> Parser:
    """The commands and their options."""
    parser = Parser(prog="minihyperflows", description="Hyperflows pruning from scratch, in NumPy.")
    parser.add_argument("--version", action="version", version=minihyperflows.__version__)
    parser.set_defaults(after_interrupt=NOTHING)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_prune(commands)
    _add_sweep(commands)
    _add_study(commands)
    _add_bench(commands)
    recipes = commands.add_parser("recipes", help="list the recipes")
    recipes.add_argument(
        "--fields", action="store_true", help="list what every field of a recipe may be instead"
    )
    recipes.set_defaults(command=list_recipes)
    info = commands.add_parser("info", help="print versions and whether a GPU can be used")
    info.set_defaults(command=print_info)
    export = commands.add_parser(
        "export", help="write a checkpoint's pruned network as weights only"
    )
    export.add_argument(
        "checkpoint", type=Path, help="a run's checkpoint.safetensors, or its folder"
    )
    export.add_argument("out", type=named_path, help="the .safetensors file to write")
    export.set_defaults(command=export_weights)
    collect_runs = commands.add_parser("collect", help="gather finished runs in one CSV file")
    collect_runs.add_argument("folders", type=Path, nargs="+", help="folders of finished runs")
    collect_runs.add_argument("--out", type=named_path, required=True, metavar="FILE")
    collect_runs.set_defaults(command=collect_records)
    return parser


def _add_prune(commands: Any) -> None:
    prune = commands.add_parser("prune", help="train, prune and regrow a network")
    prune.add_argument(
        "recipe",
        nargs="?",
        default=DEFAULT_RECIPE,
        help=f"see `recipes`, or a recipe.json; default {DEFAULT_RECIPE}",
    )
    _add_fields(prune)
    add_changes(prune, "prune")
    prune.add_argument("--seed", type=_seed, default=0, metavar="N")
    prune.add_argument("--out", type=named_path, metavar="DIR", help="default runs/RECIPE-S-seedN")
    prune.add_argument(
        "--dense-from",
        type=Path,
        metavar="FOLDER",
        help="begin with the dense network of this run (same settings and seed), not a new one",
    )
    prune.add_argument(
        "--no-resume", action="store_true", help="start over, replacing what is in the folder"
    )
    prune.set_defaults(command=prune_network, after_interrupt=RESUMES)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="run a recipe under many constant pressures")
    sweep.add_argument("recipe", help="see `recipes`; without its target and regrowth stage")
    sweep.add_argument(
        "--gammas", required=True, metavar="G", help="2^-6:2^6 in octaves, 2^-6:2^6:2, or 0.5,1,2"
    )
    sweep.add_argument("--seeds", type=_count, default=1, metavar="K", help="0 ... K-1; default 1")
    sweep.add_argument(
        "--workers", type=_count, metavar="N", help="processes; default one a core, 1 on a GPU"
    )
    sweep.add_argument("--threads", type=_count, default=1, metavar="N", help="of a run; default 1")
    sweep.add_argument(
        *("--dask", "--scheduler"), metavar="ADDRESS", help="of a Dask cluster to work instead"
    )
    sweep.add_argument(
        "--out", type=named_path, required=True, metavar="DIR", help="a folder for them"
    )
    sweep.add_argument(
        "--record",
        type=named_path,
        metavar="FILE",
        help="the table of results; default DIR/sweep.csv",
    )
    _add_fields(sweep)
    add_changes(sweep, "sweep")
    sweep.add_argument(
        "--no-resume", action="store_true", help="start over, replacing the runs in the folder"
    )
    sweep.set_defaults(command=sweep_gammas, after_interrupt=RESUMES)


def _add_study(commands: Any) -> None:
    study = commands.add_parser("study", help="do one of the book's long experiments, or list them")
    study.add_argument("name", nargs="?", metavar="NAME", help="without it: the list")
    study.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="...", help="see `minihyperflows study NAME -h`"
    )
    study.set_defaults(command=do_study, after_interrupt=CONTINUES)


def _add_fields(command: Any) -> None:
    """Options that prune and sweep share."""
    add_plugins(command)
    command.add_argument("--data-dir", type=Path, metavar="DIR", help="where MNIST or CIFAR lie")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="time training steps, beside PyTorch's")
    names = ", ".join(NETWORKS)
    bench.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {names}; default all")
    bench.add_argument("--layers", action="store_true", help="also time each convolution shape")
    bench.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: steps and whole epochs of VGG-19 and ResNet-50 on a GPU",
    )
    bench.add_argument(
        "--rounds",
        type=_count,
        metavar="N",
        help=f"default {BenchSettings.rounds}; of epochs on a GPU, {GpuBenchSettings.rounds}",
    )
    bench.add_argument(
        "--images", type=_count, metavar="N", help="of an epoch on a GPU; default all 50,000"
    )
    bench.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="CIFAR-10 for a GPU; default random images"
    )
    bench.add_argument("--batch", type=_count, metavar="N", help="default: each network's own")
    bench.add_argument(
        "--width", type=_factor, default=1.0, metavar="X", help="scales the channels"
    )
    bench.add_argument(
        "--threads", type=_count, metavar="N", help="default 2, or 1 on a single core"
    )
    bench.add_argument("--no-torch", action="store_false", dest="torch", help="ours alone")
    bench.add_argument(
        "--json", type=named_path, metavar="FILE", help="write the record, samples too"
    )
    bench.set_defaults(command=bench_networks, after_interrupt="run it again for the whole table")


def _of(range_: Range, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option whose values are those of ``range_``."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = text
        if not range_.holds(value):
            raise argparse.ArgumentTypeError(f"it is {range_.words}, not {shown(value)}")
        return value

    return parse


_seed = _of(whole(0, 2**64 - 1), int)
_count = _of(whole(1, 1_000_000), int)
_factor = _of(number(above=0), float)


# -- the commands --------------------------------------------------------------------------------


def prune_network(options: argparse.Namespace) -> None:
    """``prune``: run a recipe, then print what came out."""
    recipe = _chosen_recipe(options)
    if options.precision is not None and options.device == "cpu":
        raise UserError(f"--precision is for --device cuda: a CPU computes in {recipe.dtype}")
    out = options.out or default_folder(recipe, options.seed)
    folder = RunFolder(out)
    finished = folder.is_finished and not options.no_resume
    if finished:
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
        plugins=options.plugins,
    )
    if finished:  # of another one they were told when they came up
        for text in summary.get("warnings", ()):
            warn(text)
    print(summary_table(summary))
    print(f"records and plots: {out}")


def default_folder(recipe: Recipe, seed: int) -> Path:
    """Where a run goes that is not told where to go."""
    target, gamma = recipe.target_sparsity, recipe.pressure.gamma
    aim = f"gamma{gamma:g}" if target is None else f"{target:g}"
    return Path("runs") / f"{recipe.name}-{aim}-seed{seed}"


def _chosen_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that the options of prune and sweep name, with the fields they change."""
    load_plugins(options.plugins)
    return changed(find_or_read(options.recipe), options)


def _aim(recipe: Recipe) -> str:
    """What a recipe prunes to, or with."""
    if recipe.target_sparsity is None:
        return f"under constant pressure {recipe.pressure.gamma:g}"
    return f"to sparsity {recipe.target_sparsity:.2%}"


def sweep_gammas(options: argparse.Namespace) -> None:
    """``sweep``: run a recipe under many pressures, with several seeds each."""
    recipe, gammas = _chosen_recipe(options), parse_gammas(options.gammas)
    if options.dask and options.workers:
        raise UserError("a cluster has workers of its own: leave out --workers or --dask")
    print(
        f"{recipe.name}: {recipe.model} on {recipe.dataset}, {len(gammas)} pressures from "
        f"{gammas[0]:g} to {gammas[-1]:g}, seeds 0 to {options.seeds - 1}"
    )
    run_sweep(
        recipe,
        gammas,
        options.out,
        seeds=options.seeds,
        workers=_default_workers(options.device) if options.workers is None else options.workers,
        scheduler=options.dask,
        threads=options.threads,
        data_dir=options.data_dir,
        device=options.device,
        resume=not options.no_resume,
        record=options.record,
        plugins=options.plugins,
    )
    print(f"records: {options.record or SweepFolder(options.out).table}")


def do_study(options: argparse.Namespace) -> None:
    """``study``: do an experiment, or list them."""
    if options.name:
        frame.command(frame.find(options.name), options.words)
        return
    for name, study in frame.studies().items():
        print(f"{name:<24}{frame.title(study)}")


def _default_workers(device: str) -> int:
    return 1 if device == "cuda" else os.cpu_count() or 1


def describe(recipe: Recipe, seed: int) -> str:
    """A line that says what is about to run."""
    stages = recipe.timeline
    return (
        f"{recipe.name}: {recipe.model} on {recipe.dataset} {_aim(recipe)}, "
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
    if s["target_sparsity"] is None:
        note = f"constant pressure {s['recipe']['pressure']['gamma']:g}"
    else:
        note = f"target {s['target_sparsity']:.2%}"
    if s["recipe"]["regrowth"]["epochs"]:
        note += (
            f"; before regrowth {s['sparsity_before_regrowth']:.2%} "
            f"at {s['accuracy_before_regrowth']:.2%} accuracy"
        )
    return "\n".join(["", *lines, "", f"{note}; {s['seconds']:.0f} s"])


def list_recipes(options: argparse.Namespace) -> None:
    """``recipes``: name, target and length of each, and how it departs from the authors' code."""
    if options.fields:
        list_fields()
        return
    for recipe in RECIPES.values():
        stages = recipe.timeline
        print(
            f"{recipe.name:<26}{recipe.model} on {recipe.dataset} {_aim(recipe)}, "
            f"epochs {stages.dense}+{stages.pruning}+{stages.regrowth}"
        )
        for deviation in recipe.deviations:
            print(f"{'':<26}- {deviation}")


def list_fields() -> None:
    """``recipes --fields``: the values that ``--set`` takes, beside those of the main job."""
    values = flat(dataclasses.asdict(RECIPES[DEFAULT_RECIPE]))
    print(f"{'field':<28}{f'in {DEFAULT_RECIPE}':<22}what it may be")
    for name, words in fields_with_ranges().items():
        value = json.dumps(values[name]) if name in values and name != "deviations" else ""
        print(f"{name:<28}{value:<22}{words}")
    for field, kind in NAMED.items():
        for name in registry.names(kind) if kind in registry.DECIDED else ():
            for option, range_ in registry.options_of(kind, name).items():
                print(f"{f'{field}_options.{option}':<50}{range_.words} ({name})")


def print_info(_: argparse.Namespace) -> None:
    """``info``: what a report of a problem should contain."""
    for name, version in versions().items():
        print(f"{name:<16}{version}")
    gpu = "available" if minihyperflows.cuda_available() else "not available"
    print(f"{'GPU (CuPy)':<16}{gpu}")
    print(f"{'data sets':<16}{', '.join(registry.names('dataset'))}")


def bench_networks(options: argparse.Namespace) -> None:
    """``bench``: time training beside PyTorch's, and print a table."""
    if options.json:
        require_folder(options.json)  # before minutes of work
        require_own_record(options.json)
    if options.device == "cuda":
        bench_on_gpu(options)
        return
    _require_unset(options, "cuda", "images", "data_dir")
    settings = BenchSettings(
        networks=tuple(options.networks) or tuple(NETWORKS),
        layers=options.layers,
        rounds=BenchSettings.rounds if options.rounds is None else options.rounds,
        batch=options.batch,
        width=options.width,
        threads=options.threads,
        torch=options.torch,
    )
    with tqdm(bar_format="{elapsed} {desc}", dynamic_ncols=True, leave=False) as line:
        record = measure(settings, progress=line.set_description_str)
    print(table(record))
    if options.json:
        write_json(options.json, record)


def bench_on_gpu(options: argparse.Namespace) -> None:
    """``bench --device cuda``; the record is written whenever something was added to it."""
    _require_unset(options, "cpu", "layers", "threads")
    given = {
        "networks": tuple(options.networks),
        **{name: getattr(options, name) for name in ("rounds", "batch", "images", "data_dir")},
    }
    settings = GpuBenchSettings(
        **{name: value for name, value in given.items() if value not in (None, ())},
        width=options.width,
        torch=options.torch,
    )

    def save(record: dict[str, Any]) -> None:
        if options.json:
            write_json(options.json, record)

    require_gpu()
    with tqdm(bar_format="{elapsed} {desc}", dynamic_ncols=True, leave=False) as line:
        record = measure_on_gpu(settings, line.set_description_str, save)
    print(gpu_table(record))
    save(record)


def _require_unset(options: argparse.Namespace, device: str, *names: str) -> None:
    for name in names:
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} is for --device {device}")


def collect_records(options: argparse.Namespace) -> None:
    """``collect``: one row per run, with its provenance."""
    print(f"{options.out}: {collect(options.folders, options.out)} runs")


def export_weights(options: argparse.Namespace) -> None:
    """``export``: the weights of a run with the zeros written in, under PyTorch's names."""
    from safetensors.numpy import save

    path = options.checkpoint
    path = RunFolder(path).checkpoint if os.path.isdir(path) else path
    if not os.path.lexists(path):
        raise UserError(f"there is no checkpoint at {path}: give a run's folder or its checkpoint")
    require_exportable(options.out, path)
    arrays, values = load_checkpoint(path, advice="give another one")
    weights = pruned_weights(arrays)
    metadata = {"recipe": values["recipe"]["name"], "epoch": str(values["trainer"]["epoch"])}
    with locked_file(options.out):
        remove_temporary(options.out.parent, [options.out.name])
        write_atomically(options.out, save(weights, metadata))
    print(f"{options.out}: {len(weights)} tensors")


def pruned_weights(arrays: dict[str, Any]) -> dict[str, Any]:
    """The network's tensors out of a checkpoint, weights multiplied by their gates.

    Gates go by name: "<layer>.presence" belongs to "<layer>.weight". Layers that share a weight
    share its presence, and have both under each of their names.
    """
    net = {k.removeprefix("net."): v for k, v in arrays.items() if k.startswith("net.")}
    gates = {_beside(k, "weight"): t >= 0 for k, t in net.items() if _last_part(k) == "presence"}
    return {
        name: value * gates[name] if name in gates else value
        for name, value in net.items()
        if _last_part(name) != "presence"
    }


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _beside(name: str, other: str) -> str:
    """The dotted name of another attribute of the same module."""
    path, dot, _ = name.rpartition(".")
    return f"{path}{dot}{other}"


if __name__ == "__main__":
    sys.exit(main())
