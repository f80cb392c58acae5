"""The labs: they run, grade themselves, and cannot be passed empty. Skipped without the extra `labs`."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from notebooks.build import FOLDER, LABS, MOST_OUTPUT, OFFLINE
from notebooks.grade import BLANK, RIGHT, mistakes_in, students_of
from notebooks.idle import Cell, cells_of, faults_in, idle_in

pytest.importorskip("nbgrader", reason="needs the extra labs")
pytest.importorskip("jupytext", reason="needs the extra labs")

ROOT = Path(__file__).parents[1]
LOCAL = """
import os, socket
allowed, connect = ("127.", "localhost", "::1"), socket.socket.connect
def local(self, address):
    if self.family != getattr(socket, "AF_UNIX", None) and not str(address[0]).startswith(allowed):
        raise OSError(f"the labs need no network, and this is {address}")
    return connect(self, address)
socket.socket.connect = local
"""
SLOWEST = 30  # seconds a cell
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"

every_lab = pytest.mark.parametrize("lab", LABS)
every_mistake = pytest.mark.parametrize(
    ("lab", "mistake"),
    [pytest.param(lab, each, id=f"{lab}-{each.name.replace(' ', '_')}") for lab in LABS for each in mistakes_in(lab)],
)


def run(folder: Path, *arguments: str) -> str:
    """What Python prints, in a process of its own, without a network."""
    (folder / "sitecustomize.py").write_text(LOCAL, encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | OFFLINE | {"PYTHONPATH": path, "IPYTHONDIR": str(folder / "ipython")}
    process = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise RuntimeError(process.stdout + process.stderr)
    return process.stdout


class Work(NamedTuple):
    """What is worked out for a lab, once."""

    graded: "Future[str]"
    """What `notebooks.grade --json` printed."""
    executed: "Future[str]"
    """The seconds of each cell, as a whole, measurements and all."""
    idle: "Future[str]"
    """What `notebooks.idle --json` printed, for all labs chosen."""

    @property
    def students(self) -> dict[str, Any]:
        return json.loads(self.graded.result())["students"]


@pytest.fixture(scope="session")
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Work]]:
    """For each lab of the tests chosen; two processes at a time, or as many as NPNET_LABS_PROCESSES says."""
    chosen = {item.callspec.params.get("lab") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(int(os.environ.get("NPNET_LABS_PROCESSES", "2"))) as pool:
        works, labs = {}, [lab for lab in LABS if lab in chosen]
        idle = pool.submit(run, tmp_path_factory.mktemp("idle"), "-m", "notebooks.idle", *labs, "--json")
        for lab in labs:
            folder = tmp_path_factory.mktemp(lab)
            code = f"from notebooks.build import *\nprint(*execute(source_of({lab!r}), Path({str(folder)!r})))"
            graded = pool.submit(run, folder, "-m", "notebooks.grade", lab, "--json")
            works[lab] = Work(graded, pool.submit(run, folder, "-c", code), idle)
        yield works


# They grade.


@every_lab
def test_the_right_solution_gets_full_points(work, lab):
    results = work[lab].students[RIGHT]
    assert all(each["score"] in (each["most"], None) for each in results.values()), results
    assert sum(each["score"] or 0 for each in results.values()) >= 10


@every_lab
def test_the_blank_gets_nothing(work, lab):
    results = work[lab].students[BLANK]
    assert results
    assert all(each["score"] == 0 for each in results.values()), results


@every_mistake
def test_a_mistake_costs_its_points_and_is_named(work, lab, mistake):
    number, made = next((i, made) for i, made in enumerate(students_of(lab)) if mistake in made)
    results = work[lab].students[f"student{number}"]
    lost = {name for name, each in results.items() if each["score"] == 0}
    assert lost == {each.loses for each in made}, results
    assert all(each["score"] in (each["most"], None) for name, each in results.items() if name not in lost)
    assert mistake.says in results[mistake.loses]["says"]


@every_lab
def test_what_does_nothing_costs_its_points_and_is_named(work, lab):
    assert json.loads(work[lab].idle.result())[lab] == []


@every_lab
def test_every_solution_is_made_to_do_nothing_in_four_ways_at_least(lab):
    places = re.findall(r"^ *### BEGIN SOLUTION", (FOLDER / "labs" / f"{lab}.py").read_text(encoding="utf-8"), re.M)
    planted = [each.name.split(": ")[0] for each in idle_in(cells_of(lab))]
    without_answer = {"LossScaler.update"}  # it has an effect, and nothing to return
    assert len(set(planted)) == len(places)
    assert all(planted.count(place) >= 4 for place in set(planted) - without_answer)


PEAK = "labs.check_peak(lambda: total(x), 1e9, 'the peak of total', like=1.0)"


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("labs.check_array(total(x), x.sum(), 'total')", []),
        (PEAK, []),
        ("npnet.measure_peak(total, x)", ["gives points to total: "] * 4),
        ("assert total(x) is not None, 'return it'", ["to total: return 0.0", "to total: return x", "to total: zeros"]),
        ("total(x) + 0", ["does not say in words what is wrong with total: pass"]),
        ("labs.check_number(total(x), 6.0, 'total'); later", ["no points, though what it tests is right"]),
        ("pass", ["total: pass: no cell of tests uses it", "test_total: it uses no solution"]),
    ],
)
def test_a_cell_that_gives_points_to_what_does_nothing_is_found(test, found):
    cells = [
        Cell("setup", "import npnet, numpy as np\nfrom npnet import labs\nx = np.arange(4.0)", False, False),
        Cell("total", f"def total(x):\n    {BEGIN}\n    return x.sum()\n    {END}\n", True, False),
        Cell("test_total", test, False, True),
    ]
    said = faults_in(cells)
    assert bool(said) == bool(found)
    assert all(any(words in each for each in said) for words in found), said


def test_where_students_are_given_a_return_nothing_and_none_are_two_answers():
    given = f"def f(x):\n    {BEGIN}\n    y = 2 * x\n    {END}\n    return y, x\n"
    answers = [each.name for each in idle_in([Cell("f", given, True, False)])]
    assert answers == ["f: pass", "f: return None", "f: return 0.0", "f: return x", "f: return x, x", "f: zeros"]


def test_a_task_that_costs_the_points_of_another_is_found():
    cells = [
        Cell("f", f"def f():\n    {BEGIN}\n    return 1\n    {END}\n", True, False),
        Cell("test_f", "assert f() == 1, 'return 1'", False, True),
        Cell("g", f"def g():\n    {BEGIN}\n    return 1 + f()\n    {END}\n", True, False),
        Cell("test_g", "assert g() == 2, 'return 2'", False, True),
    ]
    assert any("test_g gives no points, though what it tests is right (f: " in each for each in faults_in(cells))
    right = "f = lambda: 1\n"
    cells[-1] = cells[-1]._replace(source=right + cells[-1].source)
    assert not faults_in(cells)


@every_lab
def test_there_are_four_mistakes_at_least(lab):
    assert len({each.name for each in mistakes_in(lab)}) == len(mistakes_in(lab)) >= 4


# They run.


@every_lab
def test_it_runs_from_top_to_bottom(work, lab):
    assert max(map(float, work[lab].executed.result().split())) < SLOWEST


def test_without_a_network_others_cannot_be_reached(tmp_path):
    with pytest.raises(RuntimeError, match="the labs need no network"):
        run(tmp_path, "-c", "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)")


# What is committed.


@every_lab
def test_what_is_committed_is_what_is_generated(work, lab):
    assert not json.loads(work[lab].graded.result())["differences"]


def test_notebooks_that_were_changed_by_hand_are_noticed(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "notebooks")
    for version in ("source", "release"):
        path = tmp_path / "notebooks" / version / LABS[0] / f"{LABS[0]}.ipynb"
        path.write_text(path.read_text(encoding="utf-8").replace("backprop", "backdrop", 1), encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import notebooks.build as build; build.main()"
    with pytest.raises(RuntimeError) as caught:
        run(tmp_path, "-c", code, LABS[0], "--check")
    assert f"source/{LABS[0]}/{LABS[0]}.ipynb: is not what labs/" in str(caught.value)
    assert f"release/{LABS[0]}/{LABS[0]}.ipynb: is not what nbgrader makes" in str(caught.value)


def regions(source: str) -> list[str]:
    """The lines of solutions and hidden tests that could not stand anywhere else."""
    found = re.findall(r"### BEGIN (?:SOLUTION|HIDDEN TESTS)\n(.*?)### END", source, flags=re.DOTALL)
    assert found
    elsewhere = re.sub(r"### BEGIN (SOLUTION|HIDDEN TESTS)\n.*?### END \1", "", source, flags=re.DOTALL)
    outside = {line.strip() for line in elsewhere.splitlines()}
    return [
        line.strip() for text in found for line in text.splitlines() if line.strip() not in outside and line.strip()
    ]


def given_away(lab: str, version: str) -> list[str]:
    """The lines of solutions and hidden tests that are in this version of the lab."""
    notebook = json.loads((FOLDER / version / lab / f"{lab}.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    lines = {line.strip() for line in text.splitlines()}
    source = (FOLDER / "labs" / f"{lab}.py").read_text(encoding="utf-8")
    secret = [re.sub(r"^# ?", "", line) for line in regions(source)] + regions(source)
    return [line for line in secret if line in lines] + re.findall("BEGIN SOLUTION|HIDDEN TESTS", text)


@every_lab
def test_students_are_given_no_solution_and_no_hidden_test(lab):
    assert not given_away(lab, "release")
    assert len(given_away(lab, "source")) > 20  # in the instructor's they would be found


@every_lab
def test_the_instructors_version_is_executed_and_small(lab):
    notebook = json.loads((FOLDER / "source" / lab / f"{lab}.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert len(json.dumps(outputs)) <= MOST_OUTPUT
    assert str(ROOT) not in json.dumps(notebook)
