"""The shape of the package: which rooms it has, what may import what, and who may talk.

``pytest tests/book/test_layout.py -k picture -s`` prints the rooms, their sizes and their imports.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minihyperflows as mh
from minihyperflows import flows, functional, lab, models, nn, optim, related, testing

PACKAGE = Path(mh.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports from its own room and from lower floors; rooms of one floor do not know each
# other. __init__ is the package's own front door, which the rooms above may use (for the version).
FLOORS = {
    **{"errors": 0, "emulator": 0, "engine": 1, "functional": 2, "nn": 3, "flows": 4, "related": 4},
    **{"testing": 5, "data": 5, "analysis": 6, "__init__": 6, "lab": 7, "studies": 8, "bench": 8},
    **{"cli": 9, "__main__": 10},
}

# What one computes with: nothing there reads a file or prints. `data` reads files, without a word.
LIBRARY = {"engine", "functional", "nn", "flows", "related", "testing", "analysis", "__init__"}
QUIET = {*LIBRARY, "data", "errors"}

# Modules with which one talks to the world, and the functions that do it without any.
WORLD = {
    *("os", "sys", "io", "pathlib", "shutil", "tempfile", "subprocess", "socket", "urllib"),
    *("requests", "pooch", "pickle", "logging", "tqdm", "matplotlib", "safetensors", "time"),
}
TALKING = {"print", "open", "input", "exec", "eval", "breakpoint"}
STATELESS = {"Generator", "default_rng", "SeedSequence", "PCG64", "BitGenerator"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
every_module = pytest.mark.parametrize("name", MODULES)


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def floor(name: str) -> int:
    return FLOORS[part(name)]


def part(name: str) -> str:
    """The floor's name: "engine" for "minihyperflows.engine.ops", "__init__" for the package."""
    return name.split(".")[1] if "." in name else "__init__"


def modules_in(rooms: set[str]) -> list[str]:
    return [name for name in MODULES if part(name) in rooms]


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from runtime_nodes(child)


def imports(name: str) -> Iterator[str]:
    """The full names of all modules that ``name`` imports at run time."""
    for node in runtime_nodes(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import on line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


# -- imports ---------------------------------------------------------------------------------------


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {part(name) for name in MODULES} == set(FLOORS)


@every_module
def test_imports_go_down(name: str) -> None:
    for imported in imports(name):
        if imported.startswith(mh.__name__):
            allowed = part(name) == part(imported) or floor(imported) < floor(name)
            assert allowed, f"{name} imports {imported}"


def test_picture_of_the_rooms() -> None:
    """No room holds more than a quarter of the code; the picture is printed."""
    lines = {room: 0 for room in FLOORS}
    arrows: dict[str, set[str]] = {room: set() for room in FLOORS}
    for name, path in MODULES.items():
        lines[part(name)] += len(path.read_text(encoding="utf-8").splitlines())
        arrows[part(name)] |= {part(i) for i in imports(name) if i.startswith(mh.__name__)}
    for room in sorted(FLOORS, key=FLOORS.__getitem__, reverse=True):
        below = ", ".join(sorted(arrows[room] - {room}, key=FLOORS.__getitem__))
        print(f"{lines[room]:6,} {room:<11}<- {below}")
    assert max(lines.values()) <= sum(lines.values()) / 4


ENGINE_ON_GPU = "minihyperflows.engine.gpu"
# One imports CuPy, one finds the twins, and one, the room's front door, tells how they are found.
KNOW_THE_GPU = {"minihyperflows.engine" + name for name in (".backend", ".twins", "")}

GROUND = [name for name in MODULES if part(name) in {"engine", "functional", "nn"}]


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_floor_knows_neither_presences_nor_data_sets(name: str) -> None:
    """Not even in words: who reads the engine needs to know nothing of what it is used for."""
    text = MODULES[name].read_text(encoding="utf-8")
    found = re.findall(r"\b(?:presences?|flux|data ?sets?|recipes?)\b", text, re.IGNORECASE)
    assert not found


OPERATIONS = [n for n in MODULES if part(n) == "engine" and ENGINE_ON_GPU not in n]


@pytest.mark.parametrize("name", sorted({*OPERATIONS} - KNOW_THE_GPU))
def test_operations_do_not_know_that_a_gpu_exists(name: str) -> None:
    """Neither in code nor in words; but a tensor's documentation names its devices."""
    source = MODULES[name].read_text(encoding="utf-8")
    if name == "minihyperflows.engine.tensor":
        source = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    assert not re.findall(r".*(?:gpu|cuda|cupy).*", source, re.IGNORECASE)


def test_the_twins_import_the_operations_and_not_the_other_way() -> None:
    for name in OPERATIONS:
        assert not [i for i in imports(name) if i.startswith(ENGINE_ON_GPU)], name


def test_no_function_hides_a_module() -> None:
    """``flows.gate`` is a function, so its module has another name."""
    for name in MODULES:
        package, _, last = name.rpartition(".")
        if package and last != "__main__":
            found = getattr(importlib.import_module(package), last, None)
            assert found is None or inspect.ismodule(found), f"{package} hides its module {last}"


def test_there_are_no_circles() -> None:
    graph = {name: {i for i in imports(name) if i in MODULES} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # or CycleError


@every_module
def test_imports_are_explicit_and_at_the_top(name: str) -> None:
    module = tree(name)
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            assert [alias.name for alias in node.names] != ["*"], f"{name}: star import"
    if part(name) in QUIET:
        inside = [
            node.lineno
            for function in ast.walk(module)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert not inside, f"{name}: imports inside functions on lines {inside}"


@every_module
def test_cupy_is_named_in_the_backend_alone(name: str) -> None:
    if name == "minihyperflows.engine.backend":
        return
    assert not [i for i in imports(name) if i.partition(".")[0] in {"cupy", "cupyx"}]
    if part(name) in QUIET:
        constants = [n.value for n in ast.walk(tree(name)) if isinstance(n, ast.Constant)]
        assert "cupy" not in constants, f"{name} asks for cupy by name"


@pytest.mark.slow
def test_importing_the_package_loads_neither_cupy_nor_torch() -> None:
    code = "import sys, minihyperflows; print({'cupy', 'torch', 'sklearn'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "set()"
    assert result.stderr == ""


# -- behaviour -------------------------------------------------------------------------------------


HARMLESS = {
    "minihyperflows.engine.blas": {"os"},  # the number of threads and the pool of threads must
    "minihyperflows.engine.threads": {"os"},  # hear of a fork
    "minihyperflows.engine.memory": {"sys"},  # for the number of references to an array
}


def test_the_upper_rooms_are_there_when_they_are_asked_for() -> None:
    program = """
import sys, minihyperflows as mh
assert "lab" in dir(mh) and "minihyperflows.lab" not in sys.modules, "too early"
assert mh.lab.load("digits").name == "digits"
try:
    mh.laboratory
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "module 'minihyperflows' has no attribute 'laboratory'\n", done.stderr


def test_the_exceptions_read_no_environment_and_print_nothing() -> None:
    for name in HARMLESS:
        assert not re.search(r"environ|getenv|argv|stdout|stderr", ast.unparse(tree(name)))


@pytest.mark.parametrize("name", modules_in(LIBRARY))
def test_nothing_below_data_talks_to_the_world(name: str) -> None:
    imported = {i.partition(".")[0] for i in imports(name)}
    imported -= HARMLESS.get(name, set())
    assert not imported & WORLD, f"{name} imports {imported & WORLD}"


@pytest.mark.parametrize("name", modules_in(QUIET))
def test_nothing_below_lab_prints_or_reads_options(name: str) -> None:
    """But for the one variable that says where data sets lie."""
    text = ast.unparse(tree(name)).replace("os.environ.get(FOLDER_VARIABLE)", "")
    assert not re.search(r"environ|getenv|argv|stdout|stderr", text)
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            silent = node.func.id not in TALKING - ({"open"} if part(name) == "data" else set())
            assert silent, f"{name}, line {node.lineno}: {node.func.id}"


STUDIES = [name for name in MODULES if ".studies." in name and not name.endswith("__main__")]


@pytest.mark.parametrize("name", STUDIES)
def test_studies_override_public_names_only(name: str) -> None:
    """What a study changes about a class of another room, that room promises to call."""
    for kind in vars(importlib.import_module(name)).values():
        if inspect.isclass(kind) and kind.__module__ == name:
            private = {n for n in vars(kind) if n.startswith("_") and not n.startswith("__")}
            for base in kind.__mro__[1:]:
                if base.__module__.startswith(mh.__name__) and ".studies." not in base.__module__:
                    assert not private & set(vars(base)), f"{name}.{kind.__name__} of {base}"


@every_module
def test_randomness_is_handed_in(name: str) -> None:
    assert "random" not in set(imports(name))
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(".random"):
            assert node.attr in STATELESS, f"{name}, line {node.lineno}: random.{node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("default_rng"):
            assert node.args, f"{name}, line {node.lineno}: a generator without a seed"


# The kernels have their types; `numbers` is where the rule for dtypes is stated.
ENGINE = [n for n in MODULES if ".engine." in n and ".gpu." not in n and ".numbers" not in n]


@pytest.mark.parametrize("name", ENGINE)
def test_operations_name_no_dtype(name: str) -> None:
    """Any dtype flows through any operation."""
    floats = {"float16", "float32", "float64", "double", "single", "complex64", "complex128"}
    for node in ast.walk(tree(name)):
        assert not (isinstance(node, ast.Attribute) and node.attr in floats), (
            f"{name}, line {node.lineno}: {ast.unparse(node)}"
        )


# -- documentation ---------------------------------------------------------------------------------


def public_definitions(name: str) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree(name).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("name", modules_in(LIBRARY))
def test_public_names_are_documented(name: str) -> None:
    for node in public_definitions(name):
        assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


@pytest.mark.parametrize("name", [n for n, path in MODULES.items() if path.stat().st_size])
def test_modules_are_documented(name: str) -> None:
    assert ast.get_docstring(tree(name)), f"{name} has no docstring"


@every_module
def test_signatures_are_annotated(name: str) -> None:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef):
            where = f"{name}, line {node.lineno}: {node.name}"
            assert node.returns is not None, f"{where} has no return type"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [a for a in (node.args.vararg, node.args.kwarg) if a]
            for argument in arguments:
                if argument.arg not in {"self", "cls"}:
                    assert argument.annotation is not None, f"{where}({argument.arg})"


def test_every_operation_states_its_gradient() -> None:
    """The docstring of a Function gives the formula of its derivative."""
    functions = [
        (name, node)
        for name in modules_in(LIBRARY)
        for node in public_definitions(name)
        if isinstance(node, ast.ClassDef)
        and {"forward", "backward"} <= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        and node.name not in {"Function", "Elementwise"}
    ]
    assert len(functions) > 20
    for name, node in functions:
        assert "dL/d" in (ast.get_docstring(node) or ""), f"{name}.{node.name}"


def test_the_public_contract() -> None:
    """Names that chapters, graders and other people's code rely on."""
    names = {
        mh: ["Tensor", "no_grad", "cuda_available", "Function", "apply"],
        functional: [
            *("linear", "conv2d", "max_pool2d", "avg_pool2d", "relu", "tanh", "sigmoid"),
            *("softmax", "log_softmax", "batch_norm", "cross_entropy"),
        ],
        nn: ["Module", "Parameter", "Buffer", "Linear", "Conv2d", "BatchNorm2d", "Sequential"],
        models: ["lenet300"],
        optim: ["SGD", "Adam"],
        flows: [
            *("attach", "presences", "gate", "pressure", "density", "layer_density", "to_dense"),
            *("PressureScheduler", "FlowRecorder", "fit_power_law"),
        ],
        related: ["importance", "hessian_gradient_product", "dhp"],
        lab: ["load", "train", "run", "register", "Dataset", "Trainer"],
        testing: [
            *("assert_close", "numerical_gradient", "check_grad", "check_complex_step"),
            *("check_function", "check_module", "check_surrogate", "check_optimizer"),
            *("check_scheduler", "check_pruner", "check_score", "check_hessian_product"),
            *("check_proximal", "check_hypernetwork"),
        ],
    }
    for module, wanted in names.items():
        missing = [name for name in wanted if not hasattr(module, name)]
        assert not missing, f"{module.__name__} lost {missing}"
        undocumented = [name for name in wanted if not getattr(module, name).__doc__]
        assert not undocumented, f"{module.__name__}: {undocumented}"
    arguments = ["net", "x", "labels", "score", "level", "temperature", "mode"]
    assert list(inspect.signature(related.importance).parameters)[:7] == arguments
    arguments = ["net", "x", "labels", "temperature"]
    assert list(inspect.signature(related.hessian_gradient_product).parameters)[:4] == arguments
    parameters = inspect.signature(optim.SGD).parameters
    assert list(parameters) == ["params", "lr", "momentum", "weight_decay", "nesterov"]
    assert list(inspect.signature(optim.Adam).parameters) == [
        *("params", "lr", "betas", "eps", "weight_decay")
    ]
    assert list(inspect.signature(functional.conv2d).parameters) == [
        *("x", "weight", "bias", "stride", "padding", "groups")
    ]
