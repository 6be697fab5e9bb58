"""A run: one experiment in a folder of its own, that can be killed and continued at any moment.

The folder holds ``recipe.json``, ``metrics.csv`` (a row per epoch), ``layers.csv`` (a row per epoch
and layer), ``checkpoint.safetensors``, after the dense stage ``dense.safetensors``, at the end
``summary.json`` and ``plots/*.png``, and a lock while it runs.
See :class:`minihyperflows.lab.folders.RunFolder`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import operator
import os
import platform
import shlex
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minihyperflows import __version__
from minihyperflows.data.datasets import IMAGES, Dataset
from minihyperflows.engine import DoubtfulResultWarning, NonFiniteLossError
from minihyperflows.engine.backend import cupy
from minihyperflows.errors import OutOfTimeError, UserError
from minihyperflows.flows.gates import counts
from minihyperflows.flows.recorder import LayerFlow
from minihyperflows.flows.stages import DENSE, REGROWTH
from minihyperflows.lab import plots, plugins
from minihyperflows.lab.checkpoint import (
    load_checkpoint,
    named_path,
    save_checkpoint,
    to_json,
    write_atomically,
    write_json,
)
from minihyperflows.lab.checks import require_names, require_usable
from minihyperflows.lab.folders import RunFolder, locked, remove
from minihyperflows.lab.grammar import words_for
from minihyperflows.lab.locks import Lock
from minihyperflows.lab.networks import load
from minihyperflows.lab.plugins import Paths, Plugin, load_plugins
from minihyperflows.lab.recipes import Recipe, find, flat
from minihyperflows.lab.training import METRICS, EpochRecord, Trainer, build_network
from minihyperflows.nn import Module
from minihyperflows.nn.counting import flops, sparse_flops

# Short epochs share a checkpoint: a run that is killed repeats at most about this much work.
SECONDS_BETWEEN_CHECKPOINTS = 5.0

LAYER_FIELDS = tuple(f.name for f in dataclasses.fields(LayerFlow))


@dataclasses.dataclass
class _Run:
    """A run that is not finished: what defines it, and how far it has come."""

    folder: RunFolder
    lock: Lock
    trainer: Trainer
    seed: int
    device: str
    stop_at: float = math.inf  # a time of time.monotonic
    save_every: float = SECONDS_BETWEEN_CHECKPOINTS
    dense_from: str | None = None  # the folder of the run that trained the dense network
    observe: Callable[[EpochRecord], None] | None = None  # told of each epoch before it is saved
    records: list[EpochRecord] = dataclasses.field(default_factory=list)
    packages: list[str] = dataclasses.field(default_factory=lambda: [__version__])
    plugins: tuple[Plugin, ...] = ()

    def __post_init__(self) -> None:
        self.structure = structure(self.trainer.net)  # before it has gates


def run(
    recipe: Recipe | str,
    out: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
    dense_from: str | os.PathLike[str] | None = None,
    stop_at: float = math.inf,
    save_every: float | None = None,
    observe: Callable[[EpochRecord], None] | None = None,
    lock: Lock | None = None,
    plugins: Paths = (),
) -> dict[str, Any]:
    """Run ``recipe`` in the folder ``out`` and return its summary.

    A run that was interrupted continues from its last finished epoch and ends with the same metrics
    as an undisturbed one, bit for bit (wall times aside). A finished run is not repeated: its
    summary is read and returned. Nobody else can run in the folder meanwhile, and a folder with
    anything but a run in it is left alone.

    Args:
        recipe: a :class:`Recipe`, or the name of one.
        out: the run's folder; made if needed.
        data_dir: where MNIST or CIFAR lie; see :func:`minihyperflows.lab.load`.
        device: "cpu" or "cuda".
        seed: of the generator that all random numbers come from.
        resume: False starts over and replaces what is in the folder.
        progress: show a progress bar on standard error.
        dense_from: the folder of a run whose dense stage was trained with the same settings and
            seed. Its dense network and the metrics of its dense epochs are used instead of training
            another, with the same result, bit for bit. A run that is continued has its dense
            network already and does not look there.
        stop_at: a time of :func:`time.monotonic`; the run stops after the epoch in which it comes.
        save_every: seconds between checkpoints; None for ``SECONDS_BETWEEN_CHECKPOINTS``.
        observe: called with the record of each epoch, before anything of the epoch is saved. What
            it raises ends the run.
        lock: the folder's lock, if the caller holds it already.
        plugins: files that register what the recipe names. They are imported first, and a run that
            is continued must have the same.

    Raises:
        OutOfTimeError: ``stop_at`` has come; the same call goes on from there.
        InUseError: another process or thread runs in the folder.
        UserError: the folder holds another experiment or something else, ``dense_from`` another
            dense network, a file is damaged, the data are missing or damaged, the disk is full, or
            the loss is no longer finite. One line that says what to do.
    """
    known = load_plugins(plugins)
    recipe = recipe if isinstance(recipe, Recipe) else find(recipe)
    seed, folder = whole_seed(seed), RunFolder(named_path(os.fspath(out)))
    folder.require_ours()
    if resume and folder.is_finished:  # nothing will be written, so this needs no lock
        return _finished(folder, recipe, seed, device, known)
    with nullcontext(lock) if lock else locked(folder) as held:
        if resume and folder.is_finished:  # since then
            return _finished(folder, recipe, seed, device, known)
        trainer = _new_trainer(recipe, _load(recipe, device, data_dir), seed, device)
        save_every = SECONDS_BETWEEN_CHECKPOINTS if save_every is None else save_every
        state = _Run(folder, held, trainer, seed, device, stop_at, save_every, observe=observe)
        state.plugins = known
        if resume and folder.checkpoint.exists():
            _continue(state)
        else:
            _begin(state, dense_from)
        _train(state, progress)
        return _conclude(state)


def whole_seed(seed: Any) -> int:
    """The seed as a Python number.

    Raises:
        UserError: it is not a whole number from 0 on.
    """
    try:
        whole = operator.index(seed)
    except TypeError:
        whole = -1
    if whole < 0 or isinstance(seed, bool | np.bool_):
        raise UserError(f"a seed is a whole number from 0 on, not {seed!r}")
    return whole


def _load(recipe: Recipe, device: str, data_dir: str | os.PathLike[str] | None) -> Dataset:
    """The data set, after a look at whatever could end the run. (A registered one must be read
    first.)"""
    require_names(recipe, device)
    data = None if recipe.dataset in IMAGES else load(recipe.dataset, data_dir)
    require_usable(recipe, device, data)
    return load(recipe.dataset, data_dir) if data is None else data


def _finished(
    folder: RunFolder, recipe: Recipe, seed: int, device: str, here: tuple[Plugin, ...]
) -> dict[str, Any]:
    """The summary of the run that is there, if it is the one that is asked for."""
    summary = folder.read_summary()
    _require_same(folder, summary, recipe, seed, device)
    plugins.require_same(summary, here, f"of the run in {folder.path}, which is finished,")
    return summary


def _conclude(run: _Run) -> dict[str, Any]:
    summary = summarise(run)
    if len(run.packages) > 1:
        summary["versions"]["minihyperflows"] = ", ".join(run.packages)
    run.lock.check()
    _draw(run.folder, run.records)
    run.folder.write_summary(summary)  # last: its presence says that the run is finished
    return json.loads(to_json(summary))


# -- starting and continuing ---------------------------------------------------------------------


def _new_trainer(recipe: Recipe, data: Dataset, seed: int, device: str) -> Trainer:
    rng = np.random.default_rng(seed)
    return Trainer(build_network(recipe, data, rng).to(device), data, recipe, rng)


def _continue(run: _Run) -> None:
    """Go on from the folder's checkpoint."""
    arrays, values = load_checkpoint(run.folder.checkpoint)
    _require_same(run.folder, values, run.trainer.recipe, run.seed, run.device)
    _require_same_plugins(run, run.folder.path, values)
    _restore(run, run.folder.checkpoint, arrays, values)
    run.dense_from = values.get("dense_from")
    _write_recipe(run)
    _write_tables(run.folder, run.records)


def _write_recipe(run: _Run) -> None:
    write_json(run.folder.recipe, run.trainer.recipe.to_json() | plugins.as_json(run.plugins))


def _require_same_plugins(run: _Run, path: Path, values: dict[str, Any]) -> None:
    """Raise unless the plugins of a checkpoint in the folder ``path`` are those of ``run``."""
    epoch = values["trainer"]["epoch"]
    plugins.require_same(values, run.plugins, f"of the run in {path}, until epoch {epoch},")


def _begin(run: _Run, dense_from: str | os.PathLike[str] | None) -> None:
    """Start a run, replacing what is in its folder, with another run's dense network or without.

    Killed anywhere in between, it leaves a folder that says by its recipe that it is a run's, and
    the dense network that it is to begin with, which may be this folder's own.
    """
    checkpoint = None if dense_from is None else _dense_checkpoint(run, Path(dense_from))
    run.folder.create()
    run.folder.forget()
    _write_recipe(run)
    if dense_from is not None and checkpoint is not None:
        _restore(run, RunFolder(Path(dense_from)).dense, *checkpoint)
        run.dense_from = os.fspath(dense_from)
        _save(run)
    else:
        remove(run.folder.dense)
    _write_tables(run.folder, run.records)


def _restore(run: _Run, file: Path, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
    """Bring the trainer and the records to the state of a checkpoint, which ``file`` holds.

    Raises:
        UserError: it is of another network, though of one of the same name.
    """
    there = values.get("structure", run.structure)  # older checkpoints do not have it
    if difference := first_difference(there, run.structure):
        raise UserError(
            f"{file} is of another network of the name {run.trainer.recipe.model} ({difference}): "
            "go on with the code that began it, or start over with --no-resume"
        )
    try:
        run.trainer.load_state_dict(arrays, values["trainer"])
        run.records = [_record_from_json(r) for r in values["records"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} does not fit the network of this version ({error}): "
            "go on with the code that began it, or start over with --no-resume"
        ) from error
    run.packages = list(dict.fromkeys([*values.get("packages", ()), __version__]))
    if run.packages != values.get("packages", run.packages):
        warnings.warn(
            f"{file} was written by version {run.packages[-2]} of minihyperflows, this is "
            f"{__version__}: the run goes on, but may end otherwise than with one version",
            DoubtfulResultWarning,
            stacklevel=2,
        )


def structure(net: Module) -> dict[str, str]:
    """What a network is built of, in words: the kinds and settings of its modules, by name, and the
    shapes of its parameters. Not what its own code makes of them.
    """
    found = {name: f"{t.shape} {t.dtype}" for name, t in net.named_tensors().items()}
    for name, module in net.named_modules():
        settings = {k: v for k, v in sorted(vars(module).items()) if _is_setting(k, v)}
        words = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in settings.items())
        found[f"module {name}"] = f"{type(module).__name__}({words})"
    return found


def _is_setting(name: str, value: Any) -> bool:
    if name == "training" or name.startswith("_"):
        return False
    if isinstance(value, tuple):
        return all(_is_setting(name, item) for item in value)
    plain = isinstance(value, bool | int | float | str | None)
    return plain or (
        callable(value) and not isinstance(value, Module) and hasattr(value, "__name__")
    )


def _dense_checkpoint(run: _Run, path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What the run in the folder ``path`` kept at the end of its dense stage.

    Raises:
        UserError: it kept nothing, or its dense stage was not what the one of ``run`` would be.
    """
    recipe, file = run.trainer.recipe, RunFolder(path).dense
    if not recipe.dense.epochs:
        raise UserError(f"{recipe.name} has no dense stage: leave out --dense-from")
    if not file.exists():
        raise UserError(
            f"there is no {file}: a run writes it at the end of its dense stage; "
            "give the folder of one, or leave out --dense-from"
        )
    arrays, values = load_checkpoint(file, advice="leave out --dense-from")
    there = Recipe.from_json(values["recipe"]).dense_settings()
    there |= {"seed": values["seed"], "device": values["device"]}
    here = recipe.dense_settings() | {"seed": run.seed, "device": run.device}
    if difference := first_difference(there, here):
        raise UserError(
            f"{path} has another dense network ({difference}): give the folder of a run with the "
            "same settings, or leave out --dense-from"
        )
    _require_same_plugins(run, path, values)
    return arrays, values


def _require_same(
    folder: RunFolder, found: dict[str, Any], recipe: Recipe, seed: int, device: str
) -> None:
    """Raise unless the folder's run is the one that is asked for."""
    try:
        there = _identity(Recipe.from_json(found["recipe"]), found["seed"], found["device"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder.path} holds a run that cannot be understood ({error}): choose another folder "
            "with --out, or start over with --no-resume"
        ) from error
    if difference := first_difference(there, _identity(recipe, seed, device)):
        raise UserError(
            f"{folder.path} holds another run ({difference}): choose another folder with --out, "
            "or start over with --no-resume"
        )


def _identity(recipe: Recipe, seed: int, device: str) -> dict[str, Any]:
    """What makes a run this run and no other."""
    return as_json(recipe) | {"seed": seed, "device": device}


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it looks once it has been through a JSON file (lists for tuples)."""
    return json.loads(to_json(recipe.to_json()))


def first_difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first value, by dotted name, in which two nested dictionaries differ; None if equal."""
    ours, theirs = flat(here), flat(there)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            return f"{name} {theirs.get(name)} there, {name} {ours.get(name)} here"
    return None


# -- the epochs ----------------------------------------------------------------------------------


def _train(run: _Run, progress: bool) -> None:
    """Run the remaining epochs, saving every few seconds and at the end."""
    trainer = run.trainer
    bar = tqdm(
        total=trainer.recipe.timeline.epochs,
        initial=trainer.epoch,
        disable=not progress,
        unit="epoch",
        dynamic_ncols=True,
    )
    saved = time.monotonic()
    with bar:
        while not trainer.finished:
            try:
                run.records.append(trainer.run_epoch())
            except NonFiniteLossError as error:
                raise UserError(_divergence_message(error, run.folder)) from error
            if run.observe:
                run.observe(run.records[-1])
            out_of_time = time.monotonic() >= run.stop_at
            at_the_end = trainer.finished or trainer.epoch == trainer.recipe.timeline.dense
            if at_the_end or out_of_time or time.monotonic() - saved > run.save_every:
                _save(run)
                saved = time.monotonic()
            bar.set_postfix_str(_progress_text(run.records[-1]), refresh=False)
            bar.update()
            if out_of_time and not trainer.finished:
                raise OutOfTimeError(f"{run.folder.path} stopped after epoch {trainer.epoch}")


def _progress_text(record: EpochRecord) -> str:
    return (
        f"{record.stage}, accuracy {record.test_accuracy:.2%}, "
        f"density {record.density:.2%}, pressure {record.gamma:.3g}"
    )


def _divergence_message(error: NonFiniteLossError, folder: RunFolder) -> str:
    if not folder.checkpoint.exists():
        return f"{error}; no checkpoint was written yet"
    epoch = load_checkpoint(folder.checkpoint)[1]["trainer"]["epoch"]
    return f"{error}; the last good checkpoint is {folder.checkpoint}, after epoch {epoch}"


def _save(run: _Run) -> None:
    """The checkpoint first: it holds the records too, so the tables can always be made from it.

    Before it, at the end of the dense stage, the same under another name: a run that is killed in
    between goes back to an earlier checkpoint and comes through here again.
    """
    run.lock.check()
    arrays, state = run.trainer.state_dict()
    values = {
        "recipe": as_json(run.trainer.recipe),
        "seed": run.seed,
        "device": run.device,
        "dense_from": run.dense_from,
        "packages": run.packages,
        "structure": run.structure,
        "trainer": state,
        "records": [dataclasses.asdict(r) for r in run.records],
        **plugins.as_json(run.plugins),
    }
    if run.trainer.epoch == run.trainer.recipe.timeline.dense:
        save_checkpoint(run.folder.dense, arrays, values)
    save_checkpoint(run.folder.checkpoint, arrays, values)
    _write_tables(run.folder, run.records)


def _record_from_json(values: dict[str, Any]) -> EpochRecord:
    layers = {name: LayerFlow(**flow) for name, flow in values["layers"].items()}
    return EpochRecord(**values | {"layers": layers})


# -- what a run leaves ---------------------------------------------------------------------------


def _write_tables(folder: RunFolder, records: list[EpochRecord]) -> None:
    _write_csv(folder.metrics, METRICS, (record.row() for record in records))
    rows = (
        {"epoch": record.epoch, "layer": name, **dataclasses.asdict(flow)}
        for record in records
        for name, flow in record.layers.items()
    )
    _write_csv(folder.layers, ("epoch", "layer", *LAYER_FIELDS), rows)


def _write_csv(path: Path, names: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode("utf-8"), durable=False)


def _draw(folder: RunFolder, records: list[EpochRecord]) -> None:
    for name, figure in plots.run_figures(records).items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        write_atomically(folder.plots / f"{name}.png", image.getvalue(), durable=False)


def summarise(run: _Run) -> dict[str, Any]:
    """What came out of a finished run, and what it was run with. Fractions, not per cent."""
    trainer, records, seed, device = run.trainer, run.records, run.seed, run.device
    per_layer = counts(trainer.net)
    remaining = sum(present for present, _ in per_layer.values())
    weights = sum(total for _, total in per_layer.values())
    dense = flops(trainer.net, trainer.data.train_x.shape[1:])
    density = {name: present / total for name, (present, total) in per_layer.items()}
    dense_epochs = [r for r in records if r.stage == DENSE]
    pruned = [r for r in records if r.stage != REGROWTH][-1]
    return {
        "recipe": as_json(trainer.recipe),
        "seed": seed,
        "device": device,
        "dtype": trainer.recipe.dtype if device == "cpu" else trainer.recipe.gpu_dtype,
        "dense_from": run.dense_from,
        "dense_accuracy": dense_epochs[-1].test_accuracy if dense_epochs else None,
        "test_accuracy": records[-1].test_accuracy,
        "sparsity": 1 - remaining / weights,
        "target_sparsity": trainer.recipe.target_sparsity,
        "sparsity_before_regrowth": 1 - pruned.density,
        "accuracy_before_regrowth": pruned.test_accuracy,
        "landed_by": trainer.landed_by,
        "warnings": trainer.warnings,
        "weights": weights,
        "remaining": remaining,
        "flops_dense": sum(dense.values()),
        "flops_sparse": sum(sparse_flops(dense, density).values()),
        "seconds": math.fsum(r.seconds for r in records),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_for(trainer.recipe, seed, device, run.plugins),
        "versions": versions() | (gpu_versions() if device == "cuda" else {}),
        "commit": commit(),
        **plugins.as_json(run.plugins),
    }


def command_for(recipe: Recipe, seed: int, device: str, plugins: Sequence[Plugin] = ()) -> str:
    """The command line that repeats a run (give --data-dir where the data set needs one)."""
    options = words_for(recipe, device)
    if options is None:
        return f"lab.run(recipe, out, device={device!r}, seed={seed}) with the recipe of this file"
    options += ["--device", device, "--seed", str(seed)]
    options += [word for plugin in plugins for word in ("--plugin", plugin.path)]
    return shlex.join(["minihyperflows", "prune", recipe.name, *options])


def versions() -> dict[str, str]:
    """The versions that a number may depend on."""
    return {
        "minihyperflows": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def gpu_versions() -> dict[str, str]:
    """CuPy's version, the GPU's name and CUDA's versions (of the runtime and the driver)."""
    xp = cupy()
    runtime = xp.cuda.runtime
    name = runtime.getDeviceProperties(xp.cuda.Device().id)["name"]
    return {
        "cupy": xp.__version__,
        "gpu": name.decode(),
        "cuda": f"{runtime.runtimeGetVersion()} (driver {runtime.driverGetVersion()})",
    }


def provenance(dtype: str, command: str) -> dict[str, Any]:
    """Where a row of a study's table, measured on the CPU, comes from; ``command`` repeats it."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    head = {"device": "cpu", "dtype": dtype, "date": date, "commit": commit()}
    return head | {"command": command, **versions()}


def commit() -> str | None:
    """The commit of the source tree that this package runs from; None if it is installed."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True
        )
        if tracked.returncode:
            return None
        answer = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return answer.stdout.strip() or None
