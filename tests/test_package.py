"""The package as a whole: which file imports which, what is documented, what importing it costs, the README's code."""

import ast
import configparser
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

import npnet

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "npnet").glob("*.py"))}
ORDER = [
    *(
        "launch",
        "backend",
        "checks",
        "attributes",
        "pools",
        "files",
        "archive",
        "idx",
        "savable",
        "random",
        "initializers",
        "stand_in",
        "parameter",
        "layer",
        "model_tree",
        "determinism",
        "layer_rules",
        "activations",
        "layers",
        "blocks",
        "losses",
        "optimizers",
        "device_ranks",
        "ranks",
        "symbols",
        "kernels",
        "fusing",
    ),
    *(
        "schedule",
        "schedules",
        "pricing",
        "chain_costs",
        "optimal",
        "memory",
        "plans",
        "transfers",
        "offload",
        "planner",
        "checkpoint",
        "failures",
        "precision",
        "gradient_sums",
        "step",
        "interrupts",
        "dual",
        "into",
        "refusal",
        "tracing",
        "replay",
        "capture",
        "curvature",
        "lending",
        "dense_chain",
        "network",
        "network_with_checkpointing",
        "storage",
    ),
    *(
        "datasets",
        "batching",
        "feeding",
        "run",
        "saver",
        "recipe",
        "training",
        "measuring",
        "report",
        "summary",
        "device",
        "drawing",
        "plan_drawing",
        "animation",
        "plots",
    ),
    *("compare", "settings", "mnist", "plan_report", "arguments", "options", "cli", "diagnosis", "labs"),
]
"""A file imports only from files before it in this list."""


def run_python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints for ``code``, run in ``folder``."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# The order of the files.


def imported_from_npnet(tree: ast.AST) -> Iterator[str]:
    """Each file of npnet that the code imports from, wherever in it; "npnet" for the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "npnet":
                    yield alias.name.partition(".")[2] or "npnet"
        elif isinstance(node, ast.ImportFrom):
            package, _, module = ("npnet." * node.level + (node.module or "")).partition(".")
            if package == "npnet":
                yield from [module] if module else [alias.name for alias in node.names]


def out_of_order(name: str, source: str, order: Sequence[str] = ORDER) -> list[str]:
    """What the file called ``name`` imports although it must not."""
    tree = ast.parse(source)
    wrong = [used for used in imported_from_npnet(tree) if used != "npnet" and used not in order[: order.index(name)]]
    versions = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "__version__"}
    names = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "npnet")
    return wrong + ["npnet" for n in names if id(n) not in versions]


def test_the_order_lists_every_file_once() -> None:
    assert sorted(ORDER) == sorted(set(FILES) - {"__init__", "__main__"})


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_before_it(name: str) -> None:
    assert not out_of_order(name, FILES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from npnet.b import f", []),
        ("import numpy\nfrom npnet import a, b", []),
        ("import npnet\nprint(npnet.__version__)", []),
        ("import npnet\nprint(npnet.fit)", ["npnet"]),
        ("from npnet.c import f", ["c"]),  # itself
        ("from npnet.d import f", ["d"]),
        ("from npnet import a, d", ["d"]),
        ("from npnet import fit", ["fit"]),  # by way of __init__, which imports everything
        ("import npnet.d", ["d"]),
        ("from . import d", ["d"]),
        ("from .d import f", ["d"]),
        ("def f():\n    if True:\n        from npnet.d import g", ["d"]),
        ("import npnet2.d\nfrom npnetty.d import f", []),
    ],
)
def test_an_import_out_of_order_is_found(source: str, wrong: list[str]) -> None:
    assert out_of_order("c", source, ["a", "b", "c", "d"]) == wrong


# What is public.


def undocumented(module: ModuleType, source: str) -> Iterator[str]:
    """Public functions, classes and methods without a docstring; an override may leave it to what it overrides."""

    def public(nodes: Iterable[ast.AST]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list):
                    continue  # a signature; what it stands for has the docstring
                yield node

    for node in public(ast.parse(source).body):
        if not ast.get_docstring(node):
            yield node.name
        if not isinstance(node, ast.ClassDef):
            continue
        bases = getattr(module, node.name).__mro__[1:]
        for method in public(node.body):
            setter = any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in method.decorator_list)
            inherited = any(vars(base)[method.name].__doc__ for base in bases if method.name in vars(base))
            if not (setter or inherited or ast.get_docstring(method)):
                yield f"{node.name}.{method.name}"


@pytest.mark.parametrize("name", sorted(set(FILES) - {"__main__"}))
def test_everything_public_has_a_docstring(name: str) -> None:
    module = npnet if name == "__init__" else importlib.import_module(f"npnet.{name}")
    assert module.__doc__
    assert not list(undocumented(module, FILES[name].read_text(encoding="utf-8")))


def test_a_missing_docstring_is_found() -> None:
    source = '''
from dataclasses import dataclass

@dataclass
class Data:  # dataclass writes a __doc__ of its own
    x: int

class Base:
    """Base."""
    def said(self):
        """Said."""
    def unsaid(self): ...
    def _private(self): ...
    @property
    def value(self): ...
    @value.setter
    def value(self, value): ...

class Child(Base):
    """Child."""
    def said(self): ...
    def unsaid(self): ...
    def new(self): ...

def function(): ...
def _private(): ...
'''
    module = ModuleType("made_up")
    module.__dict__["__name__"] = __name__  # dataclass looks its module up
    exec(source, module.__dict__)
    expected = ["Data", "Base.unsaid", "Base.value", "Child.unsaid", "Child.new", "function"]
    assert list(undocumented(module, source)) == expected


def test_all_lists_what_the_package_offers() -> None:
    offered = {name for name, value in vars(npnet).items() if not (name[0] == "_" or isinstance(value, ModuleType))}
    assert set(npnet.__all__) == offered | {"plots", "schedules"}
    assert len(npnet.__all__) == len(set(npnet.__all__))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_no_longer_than_400_lines(name: str) -> None:
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400


# What it needs.


@pytest.mark.parametrize("module", ["npnet", "npnet.cli"])
def test_importing_it_loads_only_what_everybody_needs(module: str, tmp_path: Path) -> None:
    heavy = {"matplotlib", "tqdm", "psutil", "pooch", "cupy", "cloudpickle", "torch"}
    printed = run_python(f"import sys, {module}, numpy; print(*sys.modules)", tmp_path)
    assert "numpy" in printed.split()
    assert not heavy & set(printed.split())


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_setup_takes_the_version_from_the_package() -> None:
    assert config()["metadata"]["version"] in ("attr: npnet.__version__", npnet.__version__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", npnet.__version__)


def test_every_package_that_is_imported_is_declared() -> None:
    options = config()["options"]["install_requires"] + "\n".join(config()["options.extras_require"].values())
    declared = {re.split(r"[><=-]", line)[0] for line in options.split()} | {"cupyx"}  # CuPy's
    assert {"numpy", "cupy", "pooch"} <= declared
    imported = set()
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    assert {"numpy", "cupy", "pooch"} <= imported
    assert imported - set(sys.stdlib_module_names) - {"npnet"} <= declared


# The README.


def python_blocks(text: str) -> list[str]:
    """The code between ```python and ```."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_are_found() -> None:
    assert python_blocks("a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny\nz\n```\n") == ["x = 1\n", "y\nz\n"]


def test_the_readmes_picture_is_what_npnet_prints() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    call = re.search(r"every_nth\((\d+), (\d+)\)\.diagram\(\)", text)
    if not call:
        pytest.skip("the README shows no schedule")
    assert f"```text\n{npnet.schedules.every_nth(*map(int, call.groups())).diagram()}\n```" in text


def test_the_readme_runs(tmp_path: Path) -> None:
    """Its Python blocks, one after another in one fresh interpreter."""
    readme = ROOT / "README.md"
    blocks = python_blocks(readme.read_text(encoding="utf-8")) if readme.is_file() else []
    if not blocks:
        pytest.skip("the README has no ```python blocks")
    run_python("\n".join(blocks), tmp_path)


def test_the_readme_leads_to_every_file_and_the_core_stays_an_evening() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, core, around = re.split(r"## Reading the source|Around it, by", text.split("## Labs")[0])
    said = re.search(r"these (\d+) files, some ([\d,]+) lines", core)
    assert said
    names = re.findall(r"`(\w+)\.py`", core)
    assert names == sorted(names, key=ORDER.index)
    lines = sum(len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in names)
    assert len(names) == int(said[1])
    assert abs(lines - int(said[2].replace(",", ""))) < 100
    others = set(re.findall(r"`(\w+)\.py`", around)) - {"test_package"}
    assert others | set(names) == set(FILES) - {"__init__", "__main__"}
    assert not others & set(names)


# The promises.


def missing_tests(text: str) -> list[str]:
    """The tests that ``text`` names as `file.py::name`, and that are not there."""
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert named
    folder = ROOT / "tests"
    return [
        f"{file}::{name}"
        for file, name in named
        if not (folder / file).exists() or f"def {name}(" not in (folder / file).read_text(encoding="utf-8")
    ]


def test_the_tests_that_hold_the_promises_are_there() -> None:
    assert not missing_tests((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_a_test_that_is_gone_is_missed() -> None:
    there = "`test_package.py::test_a_test_that_is_gone_is_missed`"
    assert missing_tests(f"{there}, `test_package.py::test_that_was`") == ["test_package.py::test_that_was"]
