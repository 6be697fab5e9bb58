"""What users register: an example of each kind, what is refused, and runs that need plugins."""

import csv
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import moments, program

from minihyperflows import flows, lab, nn, optim, testing
from minihyperflows.cli import main
from minihyperflows.lab import plugins, registry, runs, sweep, workers
from minihyperflows.lab.plugins import load_plugins
from minihyperflows.lab.recipes import find, unknown_names
from minihyperflows.lab.training import make_optimizer, pressure_of, pressure_scheduler

EXAMPLES = Path(__file__).parent / "plugins"
ALL = sorted(str(file) for file in EXAMPLES.glob("*.py"))


@pytest.fixture(autouse=True)
def as_before():
    """Afterwards only what was there before is registered."""
    functions = {kind: dict(there) for kind, there in registry._functions.items()}
    sources, imported = dict(registry._sources), dict(plugins._imported)
    yield
    for kind, there in registry._functions.items():
        there.clear()
        there.update(functions[kind])
    for store, before in ((registry._sources, sources), (plugins._imported, imported)):
        store.clear()
        store.update(before)


@pytest.fixture
def examples():
    return load_plugins(ALL)


def write(file, text):
    file.write_text(text, encoding="utf-8")
    return file


# -- the examples ----------------------------------------------------------------------------------


def test_there_is_an_example_of_each_kind_in_about_ten_lines():
    assert {Path(file).stem for file in ALL} == set(registry.RESULTS)
    for file in ALL:
        code = Path(file).read_text(encoding="utf-8").split('"""', 2)[2]
        kinds = re.findall(r'@lab\.register\("(\w+)", ', code)
        assert kinds == [Path(file).stem]
        assert len([line for line in code.splitlines() if line.strip()]) <= 21


def test_the_model_the_data_set_and_the_recipe(examples):
    data = lab.load("stripes")
    assert data.train_x.shape == (240, 8, 8, 1)
    recipe = lab.RECIPES["quick"]
    assert (recipe.name, recipe.target_sparsity) == ("quick", 0.8)
    fields = {"model": "tallnet", "dataset": "stripes", "model_options.depth": 2}
    net = lab.build_network(recipe.with_fields(fields), data, np.random.default_rng(0))
    shapes = [p.shape for name, p in net.named_parameters().items() if name.endswith("weight")]
    assert shapes == [(24, 64), (24, 24), (2, 24)]


def test_the_optimizer(examples):
    def rule(theta, gradient, mean, step):
        mean = 0.0 * theta if mean is None else mean
        mean = mean + 0.1 * (gradient + 0.01 * theta - mean)
        return theta - 0.1 * np.sign(mean), mean

    kind = registry.find("optimizer", "sign")
    testing.check_optimizer(lambda params: kind(params, 0.1, 0.01), rule)
    fields = {"pruning.optimizer": "sign", "pruning.optimizer_options": {"beta": 0.5}}
    recipe = lab.RECIPES["quick"].with_fields(fields | {"pruning.weight_decay": 0.25})
    made = make_optimizer([nn.Parameter(np.ones(2))], recipe.pruning)
    assert (type(made), made.lr, made.beta, made.weight_decay) == (kind, 1e-3, 0.5, 0.25)


def test_the_scheduler(examples):
    fields = {"pressure.scheduler": "pi", "pressure.scheduler_options.p": 3.0}
    recipe = lab.RECIPES["quick"].with_fields(fields)
    scheduler = pressure_scheduler(recipe)
    assert isinstance(scheduler, registry.Scheduler)
    assert (scheduler.p, scheduler.i, scheduler.epochs) == (3.0, 5.0, 8 * 5)
    assert scheduler.target == pytest.approx(0.9 * 0.2)  # a tenth is left to regrowth
    assert scheduler.expected(40) == pytest.approx(0.9 * 0.2)


def test_the_pressure(examples):
    fields = {"pressure.kind": "layers", "pressure.kind_options": {"share": 0.5}}
    recipe, rng = lab.RECIPES["quick"].with_fields(fields), np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(4, 3, rng=rng), nn.Linear(3, 2, rng=rng))
    flows.attach(net, rng=rng)
    pressure_of(recipe, net)().backward()
    for t in flows.presences(net).values():
        testing.assert_close(t.grad, np.full(t.shape, 0.5 / 2 / t.size), rtol=1e-6)


def test_the_score_and_the_pruner(examples):
    testing.check_score(registry.find("score", "relative"))
    testing.check_pruner(registry.find("pruner", "two-cuts"))


def test_the_built_in_ones_are_found_in_the_same_way():
    for kind, name in [("model", "vgg19"), ("dataset", "mnist"), ("recipe", "vgg19-cifar10")]:
        assert name in registry.names(kind)
    assert registry.find("optimizer", "adam") is optim.Adam
    assert registry.find("scheduler", "trajectory") is flows.PressureScheduler
    assert registry.find("pressure", "mean") is flows.pressure
    for name in registry.names("pruner"):
        testing.check_pruner(registry.find("pruner", name))
    testing.check_score(registry.find("score", "magnitude"))


def test_a_registered_part_that_does_what_the_built_in_one_does_changes_no_bit():
    """The same run, whether its parts are looked up under one name or another."""
    registry.register("optimizer", "adam too")(lambda params, lr: optim.Adam(params, lr))
    registry.register("scheduler", "again")(
        lambda target_sparsity, epochs, step: flows.PressureScheduler(target_sparsity, epochs, step)
    )
    registry.register("pressure", "mean too")(lambda net, floor: flows.pressure(net, floor))
    registry.register("model", "lenet")(lambda **given: registry.make("model", "lenet300", **given))
    plain = lab.RECIPES["lenet300-digits"].scaled(1e-9).with_fields({"model_options": {}})
    names = {"dense.optimizer": "adam too", "pruning.optimizer": "adam too"}
    names |= {"presence.optimizer": "adam too", "pressure.scheduler": "again"}
    named = plain.with_fields(names | {"pressure.kind": "mean too"})
    ends = []
    for recipe in (plain, named):
        rng, data = np.random.default_rng(0), lab.load("digits")
        net = lab.build_network(recipe, data, rng)
        losses = [record.train_loss for record in lab.train(net, data, recipe, rng=rng)]
        ends.append((losses, {name: a.tobytes() for name, a in net.state_dict().items()}))
    assert ends[0] == ends[1]


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", registry.RESULTS)
def test_an_unknown_name_is_answered_with_those_there_are(kind):
    known = registry.names(kind)
    with pytest.raises(lab.UserError) as error:
        registry.find(kind, known[0] + "x")
    said = f"unknown {kind} '{known[0]}x': choose one of {', '.join(known)} (did you mean "
    assert str(error.value).startswith(said)


def test_names_that_are_taken_or_none():
    @lab.register("score", "mine")
    def one(net, x, labels):
        return {}

    assert lab.register("score", "mine")(one) is one  # the very same
    with pytest.raises(lab.UserError, match=r"a score 'mine' already, .*test_plugins.py, line \d+"):
        lab.register("score", "mine")(lambda net, x, labels: {})
    for kind, name in [("model", "vgg19"), ("dataset", "digits"), ("recipe", "lenet300-digits")]:
        with pytest.raises(lab.UserError, match=f"there is a {kind} '{name}' already"):
            lab.register(kind, name)(one)
    with pytest.raises(lab.UserError, match=r"as 'pressures': .*did you mean 'pressure'"):
        lab.register("pressures", "mine")
    for name in ("", "a/b", 3, None):
        with pytest.raises(lab.UserError, match="a model's name is a text without"):
            lab.register("model", name)


def test_a_cell_that_is_run_again_replaces_its_function():
    cell = compile(
        "@lab.register('pressure', 'cell')\ndef cell(net):\n    return value", "cell", "exec"
    )
    for value in (1, 2):
        exec(cell, {"__name__": "__main__", "lab": lab, "value": value})
        assert registry.find("pressure", "cell")(None) == value


def test_fields_that_name_something(examples):
    recipe = lab.RECIPES["lenet300-digits"]
    for field, words in {
        "pressure.scheduler": "pressure.scheduler is 'trajectory' or 'pi', not 'nonsense'",
        "pressure.kind": "pressure.kind is 'mean' or 'layers', not 'nonsense'",
        "dense.optimizer": "dense.optimizer is 'adam', 'sgd' or 'sign', not 'nonsense'",
    }.items():
        with pytest.raises(lab.UserError, match=words):
            recipe.with_fields({field: "nonsense"})
    for fields, words in [
        (
            {"pressure.kind": "layers", "pressure.kind_options.x": 1},
            "layers has no option 'x', but",
        ),
        ({"pressure.kind_options.floor": 1}, r"kind_options\.floor cannot be set: the rest of"),
        ({"dense.optimizer_options": 3}, "dense.optimizer_options is names with JSON's values"),
        (
            {"pressure.kind": "layers", "pressure.kind_options.share": "much"},
            "pressure.kind_options.share is a finite number, not 'much'",
        ),
    ]:
        with pytest.raises(lab.UserError, match=words):
            recipe.with_fields(fields)
    assert recipe.with_fields({"dense.optimizer_options.eps": 1e-6}).dense.optimizer_options


def test_what_recipes_did_not_always_have_is_not_written_unless_it_is_set(examples):
    for recipe in lab.RECIPES.values():
        text = json.dumps(recipe.to_json())
        assert not re.search(r'"(scheduler|kind|optimizer_options|kind_options)"', text)
    fields = {"pressure.scheduler": "pi", "dense.optimizer_options": {"eps": 1e-6}}
    recipe = lab.RECIPES["quick"].with_fields(fields)
    values = json.loads(json.dumps(recipe.to_json()))
    assert values["pressure"]["scheduler"] == "pi"
    assert "optimizer_options" not in values["pruning"]
    assert lab.Recipe.from_json(values) == recipe
    registry.forget(str(EXAMPLES / "scheduler.py"))
    assert lab.Recipe.from_json(values) == recipe  # it can be read without
    assert len(list(unknown_names(values))) == 1


@pytest.mark.parametrize(
    ("kind", "function", "words"),
    [
        ("model", lambda **given: None, "the model 'bad' .* returned None: it must be a Module"),
        ("model", lambda rng: None, "the model 'bad' .* cannot be called: got an unexpected"),
        ("dataset", lambda: None, "the dataset 'bad' .* cannot be called: got an unexpected"),
        ("dataset", lambda root: [1], r"the dataset 'bad' .* returned \[1\]: it must be a Dataset"),
        ("optimizer", lambda params, lr: params, "'bad' .* returned .*: it must be a Optimizer"),
        ("scheduler", lambda target_sparsity, epochs: 3, "returned 3: it must be a Scheduler"),
        ("pressure", lambda net: 1.0, "the pressure 'bad' .* returned 1: it must be a Tensor"),
        ("pressure", lambda net: next(iter(flows.presences(net).values())), "must be a scalar"),
        ("recipe", lambda: "text", "the recipe 'bad' is not a lab.Recipe, but 'text'"),
    ],
)
def test_what_a_registered_function_may_not_do(kind, function, words):
    lab.register(kind, "bad")(function)
    base = lab.RECIPES["lenet300-digits"].scaled(1e-9)
    fields = {"optimizer": "dense.optimizer", "scheduler": "pressure.scheduler"}
    fields |= {"pressure": "pressure.kind"}

    def use():
        if kind == "recipe":
            find("bad")
        recipe = base.with_fields({fields.get(kind, kind): "bad"})
        if kind == "pressure":
            recipe = recipe.with_fields({"dense.epochs": 0}).with_gamma(1.0)
        data, rng = lab.load("digits" if kind != "dataset" else "bad"), np.random.default_rng(0)
        list(lab.train(lab.build_network(recipe, data, rng), data, recipe, rng=rng))

    with pytest.raises(lab.UserError, match=words):
        use()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state_dict": lambda self: {"a": np.zeros(2)}}, "ndarray is not JSON serializable"),
        ({"gamma": lambda self: 1.0}, "not 'method'"),
        ({"expected": lambda self, epoch: None}, "not 'NoneType'"),
    ],
)
def test_a_scheduler_that_does_not_keep_to_the_protocol(changes, words):
    lab.register("scheduler", "bad")(type("Bad", (flows.PressureScheduler,), changes))
    recipe = lab.RECIPES["lenet300-digits"].with_fields({"pressure.scheduler": "bad"})
    with pytest.raises(lab.UserError, match=f"the scheduler 'bad' has .*{words}"):
        pressure_scheduler(recipe)


def test_numbers_of_numpy_in_a_scheduler_do_not_reach_the_records(tmp_path):
    class Numpy(flows.PressureScheduler):
        gamma = property(lambda self: np.float32(2))

        def expected(self, epoch):
            return np.float64(super().expected(epoch))

    lab.register("scheduler", "numpy")(Numpy)
    recipe = QUICK.with_fields({"pressure.scheduler": "numpy"})
    lab.run(recipe, tmp_path / "run", progress=False, save_every=0)
    assert [row["gamma"] for row in rows(tmp_path / "run")] == ["0.0", "2.0", "2.0", "0.0"]


# -- files -----------------------------------------------------------------------------------------


def said(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read the plugin .*: No such file or directory"),
        ("folder", "cannot read the plugin .*: (Is a directory|Permission denied)"),
        ("x = = 1\n", r"SyntaxError: invalid syntax \(line 1\)"),
        ("x = 1\n  y = 2\n", r"IndentationError: unexpected indent \(line 2\)"),
        ("x = 1\n\nraise KeyError('no')\n", r"KeyError: 'no' \(.*my plugin ü.py, line 3\)"),
        ("import nonsense_42\n", r"ModuleNotFoundError: .*nonsense_42.*\(.*, line 1\)"),
        ("import sys; sys.exit(3)", r"SystemExit: 3 \(.*, line 1\)"),
        ("import json\n\njson.loads('a\\nb')\n", r"JSONDecodeError: .*\(.*, line 3\)"),
        ("\0", "SyntaxError|ValueError"),
        ("# -*- coding: nonsense -*-\n", "SyntaxError"),
    ],
)
def test_plugins_that_cannot_be_imported(text, words, tmp_path, capsys):
    file = tmp_path / "my plugin ü.py"
    if text == "folder":
        file.mkdir()
    elif text is not None:
        write(file, text)
    before = {kind: registry.names(kind) for kind in registry.RESULTS}
    out = tmp_path / "out"
    assert main(["prune", "--plugin", str(file), "--out", str(out)]) == 2
    line = said(capsys)
    assert re.search(words, line), line
    assert str(file) in line
    assert not out.exists()
    assert {kind: registry.names(kind) for kind in registry.RESULTS} == before


def test_half_a_plugin_registers_nothing(tmp_path):
    file = write(
        tmp_path / "half.py",
        "from minihyperflows import lab\nlab.register('model', 'half')(print)\n1 / 0\n",
    )
    with pytest.raises(lab.UserError, match=r"ZeroDivisionError: .*half.py, line 3"):
        load_plugins([file])
    assert "half" not in registry.names("model")
    write(file, "from minihyperflows import lab\nlab.register('model', 'half')(print)\n")
    load_plugins([file])
    assert "half" in registry.names("model")


def pressure_file(file, value, name="mine"):
    return write(
        file,
        "from minihyperflows import flows, lab\n\n\n"
        f"@lab.register('pressure', {name!r})\n"
        f"def mine(net):\n    return {value} * flows.pressure(net)\n",
    )


def test_a_plugin_that_was_edited_is_imported_anew(tmp_path):
    file = pressure_file(tmp_path / "p.py", 2)
    (first,) = load_plugins([file])
    assert load_plugins([file, str(file), first]) == (first,)
    pressure_file(file, 3, "other")
    assert load_plugins([file]) != (first,)
    assert "mine" not in registry.names("pressure")
    assert "other" in registry.names("pressure")
    with pytest.raises(lab.UserError, match="has changed since this command began"):
        load_plugins([first])


def test_two_plugins_of_one_name(tmp_path):
    """Files may share a name; what they register may not."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    load_plugins([pressure_file(tmp_path / "a" / "p.py", 2, "one")])
    load_plugins([pressure_file(tmp_path / "b" / "p.py", 3, "two")])
    assert {"one", "two"} <= set(registry.names("pressure"))
    pressure_file(tmp_path / "b" / "p.py", 3, "one")
    with pytest.raises(lab.UserError, match=r"there is a pressure 'one' already, .*a.p\.py, line"):
        load_plugins([tmp_path / "b" / "p.py"])
    lambdas = "for _ in 'ab': lab.register('model', 'm')(lambda: 0)\n"
    functions = "@lab.register('model', 'm')\ndef m():\n    pass\n" * 2
    for twice in (lambdas, functions):
        file = write(tmp_path / "twice.py", f"from minihyperflows import lab\n{twice}")
        with pytest.raises(lab.UserError, match="there is a model 'm' already"):
            load_plugins([file])


# -- runs ------------------------------------------------------------------------------------------


FOUR = [EXAMPLES / f"{kind}.py" for kind in ("model", "dataset", "scheduler", "pressure")]
SHORT = ["--epochs-scale", "0.05", "--set", "pressure.updates_per_epoch=3"]
COMMAND = ["lenet300-digits", *SHORT, "--set", "model=tallnet", "--set", "dataset=stripes"]
COMMAND += ["--set", "pressure.scheduler=pi", "--set", "pressure.kind=layers"]
COMMAND += ["--set", "model_options.depth=2", "--set", "target_sparsity=0.7"]


def given(files):
    return [word for file in files for word in ("--plugin", str(file))]


def rows(folder):
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def state(folder):
    """All that must not depend on what happened on the way."""
    arrays, values = runs.load_checkpoint(folder / "checkpoint.safetensors")
    return rows(folder), {k: v.tobytes() for k, v in arrays.items()}, values["trainer"]


def process(program, out, files=FOUR, **options):
    environment = {"OPENBLAS_NUM_THREADS": "1"} | os.environ
    command = [sys.executable, *program, "prune", *COMMAND, *given(files), "--out", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("plugins") / "whole"
    done = process(("-m", "minihyperflows"), out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_four_kinds_from_the_command_line_killed_and_resumed(undisturbed, tmp_path):
    """Killed twice, and continued elsewhere with plugins that have moved: the same to the bit."""
    moved = shutil.copytree(EXAMPLES, tmp_path / "moved ü")
    files = [moved / file.name for file in FOUR]
    relative = [os.path.relpath(file, EXAMPLES.parent) for file in FOUR]
    for number, (given_files, cwd) in enumerate([(relative, EXAMPLES.parent), (files, tmp_path)]):
        what = json.dumps({"die": [("checkpoint.safetensors", "summary.json")[number], 2 - number]})
        died = process((*program("moments"), what), tmp_path / "run", given_files, cwd=cwd)
        assert died.returncode == (moments.KILL if os.name == "nt" else -moments.KILL), died.stderr
    done = process(("-m", "minihyperflows"), tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert state(tmp_path / "run") == state(undisturbed)
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text(encoding="utf-8"))
    assert [Path(p["path"]).name for p in recipe["plugins"]] == [file.name for file in FOUR]
    for plugin, file in zip(recipe["plugins"], FOUR, strict=True):
        assert os.path.isabs(plugin["path"])
        assert plugin["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["plugins"] == recipe["plugins"]
    assert summary["command"].count("--plugin") == 4


@pytest.mark.slow
def test_the_command_of_a_record_repeats_the_run(undisturbed, tmp_path):
    summary = json.loads((undisturbed / "summary.json").read_text(encoding="utf-8"))
    program, *words = shlex.split(summary["command"])
    assert program == "minihyperflows"
    assert main([*words, "--out", str(tmp_path / "again")]) == 0
    assert rows(tmp_path / "again") == rows(undisturbed)
    file = str(undisturbed / "recipe.json")  # so does its recipe
    assert main(["prune", file, *given(FOUR), "--out", str(tmp_path / "file")]) == 0
    assert rows(tmp_path / "file") == rows(undisturbed)


def test_a_recipe_file_without_its_plugins(undisturbed, tmp_path, capsys):
    file = str(undisturbed / "recipe.json")
    assert main(["prune", file, "--out", str(tmp_path / "out")]) == 2
    line = said(capsys)
    assert "recipe.json: model is 'lenet300'" in line
    assert "not 'tallnet'" in line
    for text, words in [
        ("{", "cannot read .*bad.json: .*; give a recipe.json"),
        ("[]", r"bad\.json: this recipe is not one of this version"),
        ('{"name": "x", "nonsense": 1}', r"bad\.json: .*unknown field nonsense"),
    ]:
        bad = write(tmp_path / "bad.json", text)
        assert main(["prune", str(bad), "--out", str(tmp_path / "out")]) == 2
        assert re.search(words, said(capsys))
    assert main(["prune", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")]) == 2
    assert "cannot read" in said(capsys)
    assert not (tmp_path / "out").exists()


QUICK = lab.RECIPES["lenet300-digits"].scaled(0.02)  # 1 + 2 + 1 epochs


class Stop(BaseException):
    pass


def begun(file, folder, epochs=2):
    """A run with this plugin that was stopped after so many epochs."""

    def stop(record):
        if record.epoch > epochs:
            raise Stop

    plugin = load_plugins([file])
    recipe = QUICK.with_fields({"pressure.kind": "mine"})
    with pytest.raises(Stop):
        lab.run(recipe, folder, progress=False, observe=stop, save_every=0, plugins=plugin)
    return recipe


@pytest.mark.slow
def test_a_changed_or_missing_plugin_is_refused(tmp_path, monkeypatch):
    file, folder = pressure_file(tmp_path / "p.py", 2), tmp_path / "run"
    recipe = begun(file, folder)
    text = file.read_text(encoding="utf-8")
    sha = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    with pytest.raises(lab.UserError) as error:
        lab.run(recipe, folder, progress=False)
    assert str(error.value) == (
        f"the plugin {file} is missing: the one of the run in {folder}, until epoch 2, has SHA-256 "
        f"{sha}; give it with --plugin"
    )
    pressure_file(file, 3)
    with pytest.raises(lab.UserError, match=f"p.py has changed: the one .*until epoch 2,.* {sha};"):
        lab.run(recipe, folder, progress=False, plugins=[file])
    elsewhere = tmp_path / "other" / "renamed.py"
    elsewhere.parent.mkdir()
    file.unlink()
    registry.forget(str(file))
    summary = lab.run(recipe, folder, progress=False, plugins=[write(elsewhere, text)])
    assert [p["path"] for p in summary["plugins"]] == [str(elsewhere)]
    with pytest.raises(lab.UserError, match="which is finished, has SHA-256"):
        lab.run(recipe, folder, progress=False)
    other = recipe.with_target(0.9)
    with pytest.raises(lab.UserError, match=r"until epoch 1,.*give it with --plugin"):
        lab.run(other, tmp_path / "dense", progress=False, dense_from=folder)


def test_an_exception_of_a_plugin_is_a_line(tmp_path, capsys):
    file = write(
        tmp_path / "broken.py",
        "from minihyperflows import lab\n\n\n@lab.register('pressure', 'broken')\n"
        "def broken(net):\n    values = {}\n    return values['no']\n",
    )
    command = ["prune", "--plugin", str(file), "--set", "pressure.kind=broken", "--gamma", "1"]
    command += ["--set", "dense.epochs=0", "--epochs-scale", "0.01", "--out", str(tmp_path / "r")]
    assert main(command) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"error: KeyError: 'no' ({file}, line 7)"


@pytest.mark.parametrize("gamma", ["nan", "inf", "-inf"])
def test_a_pressure_that_is_no_number_is_the_schedulers(gamma, tmp_path):
    class Bad(flows.PressureScheduler):
        def update(self, period, density):
            self.broken = True

        @property
        def gamma(self):
            return float(gamma) if hasattr(self, "broken") else 1.0

    lab.register("scheduler", "bad")(Bad)
    recipe = QUICK.with_fields({"pressure.scheduler": "bad"})
    with pytest.raises(lab.UserError, match=f"the scheduler 'bad' asks for a gamma of {gamma}"):
        lab.run(recipe, tmp_path / "run", progress=False)


def test_the_place_in_a_plugin_is_told_in_one_line(tmp_path):
    text = "from minihyperflows import lab\ndef f():\n    raise RuntimeError('two\\nlines')\n"
    text += "lab.register('score', 'f')(lambda a, b, c: f())\n"
    file = write(tmp_path / "two lines.py", text)
    load_plugins([file])
    with pytest.raises(RuntimeError) as error:
        registry.find("score", "f")(None, None, None)
    assert plugins.blame(error.value) == f"RuntimeError: two lines ({file}, line 3)"
    assert workers.describe(error.value) == plugins.blame(error.value)
    with pytest.raises(ZeroDivisionError) as ours:
        1 / 0  # noqa: B018
    assert plugins.blame(ours.value) is None


def test_the_options_of_a_class_are_those_of_its_beginning():
    recipe = lab.RECIPES["lenet300-digits"]
    with pytest.raises(lab.UserError, match=r"optimizer_options\.eps is a finite number, not 'x'"):
        recipe.with_fields({"dense.optimizer_options.eps": "x"})


def test_an_exception_of_ours_is_not_blamed_on_a_plugin(tmp_path, monkeypatch):
    load_plugins(ALL)

    def broken(self):
        raise KeyError("ours")

    monkeypatch.setattr(lab.Trainer, "step", broken)
    command = ["prune", *given(FOUR), *COMMAND[1:], "--out", str(tmp_path / "r")]
    with pytest.raises(KeyError, match="ours"):
        main(command)


@pytest.mark.slow
def test_workers_of_a_sweep_import_plugins_first(tmp_path, monkeypatch, capsys):
    """Spawned processes, which know nothing but what they are handed; then a changed plugin."""
    file = pressure_file(tmp_path / "my p.py", 2)
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "lenet300-digits-gamma", "--gammas", "4,8", "--epochs-scale", "0.025"]
    command += ["--plugin", "my p.py", "--set", "pressure.kind=mine", "--workers", "2"]
    assert main([*command, "--out", "s"]) == 0
    capsys.readouterr()
    doubled = run_alone(tmp_path / "alone")  # the mean, at twice the gamma
    assert [r["density"] for r in rows(tmp_path / "s" / "gamma-4-seed0")] == [
        r["density"] for r in doubled
    ]
    pressure_file(file, 3)
    assert main([*command, "--out", "s"]) == 2
    assert re.search(r"my p\.py has changed: the one of the sweep in .*s has SHA-256", said(capsys))
    assert (
        main(["sweep", "lenet300-digits", "--gammas", "1", "--plugin", "no.py", "--out", "t"]) == 2
    )
    assert "cannot read the plugin" in said(capsys)


def run_alone(folder):
    recipe = lab.RECIPES["lenet300-digits-gamma"].scaled(0.025).with_gamma(8.0)
    lab.run(recipe, folder, progress=False)
    return rows(folder)


@pytest.mark.slow
def test_workers_of_a_cluster_import_plugins_first(tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    file = pressure_file(tmp_path / "p.py", 2)
    recipe = lab.RECIPES["lenet300-digits-gamma"].scaled(0.025)
    load_plugins([file])
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        (row,) = sweep.run_sweep(
            recipe.with_fields({"pressure.kind": "mine"}),
            (4,),
            tmp_path / "s",
            scheduler=cluster.scheduler_address,
            progress=False,
            plugins=[file],
        )
    assert row["density"] == float(run_alone(tmp_path / "alone")[-1]["density"])


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "name", "words"),
    [
        ("dense.optimizer", "sign", "no GPU kernel for the optimizer 'sign': choose adam or sgd"),
        ("presence.optimizer", "sign", "no GPU kernel for the optimizer 'sign'"),
        ("pressure.kind", "layers", "no GPU kernel for the pressure 'layers': choose mean"),
    ],
)
def test_what_has_no_kernel_is_refused_on_a_gpu(gpu, examples, field, name, words, tmp_path):
    recipe = QUICK.with_fields({field: name})
    data, rng = lab.load("digits"), np.random.default_rng(0)
    net = lab.build_network(recipe, data, rng).to("cuda")
    with pytest.raises(lab.UserError, match=words):
        lab.Trainer(net, data, recipe, rng)
    with pytest.raises(lab.UserError, match=words):
        lab.run(recipe, tmp_path / "run", device="cuda", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_a_data_set_and_a_scheduler_of_ones_own_run_on_a_gpu(gpu, examples):
    fields = {"model": "tallnet", "dataset": "stripes", "pressure.scheduler": "pi"}
    recipe = QUICK.with_fields(fields | {"gpu_dtype": "float32", "target_sparsity": 0.5})
    densities = []
    for device in ("cuda", "cpu"):
        data, rng = lab.load("stripes"), np.random.default_rng(0)
        net = lab.build_network(recipe, data, rng).to(device)
        trainer = lab.Trainer(net, data, dataclasses.replace(recipe), rng)
        while not trainer.finished:
            trainer.run_epoch()
        densities.append(flows.density(net))
    assert densities[0] == densities[1] == pytest.approx(0.5, abs=1e-3)
