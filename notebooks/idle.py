"""See that no cell of tests gives points to a function that does nothing: ``python -m notebooks.idle lab1``.

In each place where students write, the right solution is replaced by nothing (``pass``), None, 0, the function's own
input, and the right answer with 0 for all its numbers. That costs the points of the task, and no others, and the cell
says why. These mistakes are made from the lab's source, and are planted beside those of ``mistakes/<lab>.py``. They are
many, so no kernel runs them, but ``exec`` in this process, and cells that show pictures are left out.

Several are made by one student, in different cells; with ``--alone`` each is made on its own.
"""

import argparse
import ast
import contextlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from notebooks.build import LABS, OFFLINE, source_of

_REGION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION\n?", re.DOTALL | re.MULTILINE)
_UNSAID = "no test said it, but "
_SHOWS = ("plt.show()", "labs.slider(", "labs.play(")


class Idle(NamedTuple):
    """A mistake: one place of a solution cell does nothing, and the rest of the cell is right."""

    name: str
    cell: str
    source: str
    """Of the whole cell."""
    loses: frozenset[str]
    """The cells of tests that give no points: those of the task that use what does nothing."""


class Cell(NamedTuple):
    """A code cell of a lab."""

    name: str
    source: str
    solution: bool
    graded: bool


def cells_of(lab: str) -> list[Cell]:
    """The code cells of a lab, with its right solutions."""
    cells = []
    for cell in source_of(lab).cells:
        if cell.cell_type == "code":
            told = cell.metadata.get("nbgrader", {})
            name, solution = told.get("grade_id", cell.id), bool(told.get("solution"))
            cells.append(Cell(name, cell.source, solution, bool(told.get("grade"))))
    return cells


def idle_in(cells: list[Cell]) -> list[Idle]:
    """All answers that do nothing, in the order of the lab."""
    every = [node for cell in cells for node in ast.parse(cell.source).body]
    bodies = {node.name: node for node in every if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found = []
    for number, cell in enumerate(cells):
        if not cell.solution:
            continue
        later = itertools.takewhile(lambda other: not other.solution, cells[number + 1 :])
        used_in = {test.name: _names_behind(test, bodies) for test in later if test.graded}
        for place, words, source in _answers(cell.source):
            used = place.split(".")[0]  # a method is used by way of its class
            loses = frozenset(name for name, names in used_in.items() if used in names)
            found.append(Idle(f"{place}: {words}", cell.name, source, loses))
    return found


def students_of(cells: list[Cell], alone: bool = False) -> list[list[Idle]]:
    """Who does nothing where.

    Each answer is given once, and nobody gives two in one cell. Each cell is right with one student, who does nothing
    elsewhere: that shows whether a task costs the points of another.
    """
    every = idle_in(cells)
    if alone:
        return [[each] for each in every]
    of_cell = [[each for each in every if each.cell == cell.name] for cell in cells if cell.solution]
    count = max(map(len, of_cell), default=0) + 1
    return [[own[(i + j) % count] for j, own in enumerate(of_cell) if (i + j) % count < len(own)] for i in range(count)]


def run_cells(cells: list[Cell], made: list[Idle]) -> dict[str, str]:
    """Run a notebook with these mistakes: the cells of tests that give no points, and what they say.

    As in nbgrader, an error ends its cell and not the notebook, and whatever is written to stderr costs the points.
    """
    space: dict[str, Any] = {"__name__": "__main__"}
    sources, lost = {each.cell: each.source for each in made}, {}
    for cell in cells:
        source, said = sources.get(cell.name, cell.source), io.StringIO()
        if not (cell.solution or cell.graded) and any(word in source for word in _SHOWS):
            source = _definitions(source)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                exec(compile(source, cell.name, "exec"), space)  # as a kernel does
        except AssertionError as error:
            lost[cell.name] = str(error)
        except Exception as error:  # whatever students' code may raise
            lost[cell.name] = f"{_UNSAID}{type(error).__name__}: {error}"
        if said.getvalue():
            lost[cell.name] = f"{_UNSAID}{said.getvalue()}"
    return {cell.name: lost[cell.name] for cell in cells if cell.graded and cell.name in lost}


def faults_in(cells: list[Cell], alone: bool = False) -> list[str]:
    """What is wrong with a lab's cells of tests, in sentences."""
    every = idle_in(cells)
    tested = frozenset().union(*(each.loses for each in every))
    wrong = [f"{each.name}: no cell of tests uses it" for each in every if not each.loses]
    wrong += [f"{cell.name}: it uses no solution" for cell in cells if cell.graded and cell.name not in tested]
    for made in [[], *students_of(cells, alone)]:
        lost, names = run_cells(cells, made), ", ".join(each.name for each in made) or "all is right"
        for name in sorted(tested):
            own = [each.name for each in made if name in each.loses]
            if own and name not in lost:
                wrong.append(f"{name} gives points to {own[0]}")
            elif own and lost[name].startswith(_UNSAID):
                wrong.append(f"{name} does not say in words what is wrong with {own[0]}: {lost[name]}")
            elif name in lost and not own:
                wrong.append(f"{name} gives no points, though what it tests is right ({names}): {lost[name]}")
    return wrong


def _answers(source: str) -> Iterator[tuple[str, str, str]]:
    """Where nothing is done, what is answered instead, and the source of the whole cell."""
    for region in _REGION.finditer(source):
        after = f"{source}\nfrom notebooks.idle import with_zeros, zeros\n"
        first = source.count("\n", 0, region.start()) + 1
        place, function = _function_at(ast.parse(source), first)
        if function is None:  # students write names: a list of moves, say
            for name in _assigned(ast.parse(region.group())):
                for answer in ("None", "0.0", "[]", f"zeros({name})"):
                    yield name, answer, f"{after}{name} = {answer}\n"
            continue
        returns = [node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
        answers = ["pass"]
        if returns:
            behind = first + region.group().count("\n")
            if max(node.lineno for node in returns) >= behind:  # students are given a `return`
                answers.append("return None")
            given = [each.arg for each in function.args.args if each.arg != "self"][:1]
            counts = {len(node.value.elts) for node in returns if isinstance(node.value, ast.Tuple)}
            answers += [
                "return 0.0",
                *(f"return {', '.join(given * count)}" for count in (1, *sorted(counts)) if given),
            ]
        for answer in answers:
            yield place, answer, f"{source[: region.start()]}{region[1]}{answer}\n{source[region.end() :]}"
        if returns:
            yield place, "zeros", f"{after}{place} = with_zeros({place})\n"


def _function_at(tree: ast.Module, line: int) -> tuple[str, ast.FunctionDef | None]:
    """The function or method that this line is in."""
    for node in tree.body:
        for each in (node, *(node.body if isinstance(node, ast.ClassDef) else [])):
            if isinstance(each, ast.FunctionDef) and each.lineno <= line <= (each.end_lineno or 0):
                return (f"{node.name}.{each.name}" if isinstance(node, ast.ClassDef) else each.name), each
    return "", None


def _assigned(tree: ast.Module) -> list[str]:
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _defines(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.ClassDef))


def _definitions(source: str) -> str:
    return "\n".join(ast.unparse(node) for node in ast.parse(source).body if _defines(node))


def _names_behind(test: Cell, bodies: dict[str, ast.AST]) -> set[str]:
    """The names that a cell uses, and those that the functions use that it calls."""
    names: set[str] = set()
    new = set().union(*(_names_in(node) for node in ast.parse(test.source).body if not _defines(node)))
    while new:
        names |= new
        new = set().union(*(_names_in(bodies[name]) for name in new if name in bodies)) - names
    return names


def _names_in(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def zeros(answer: Any) -> Any:
    """Arrays, lists and numbers of the same form, with 0 for each number; None for whatever has none."""
    import numpy as np

    if isinstance(answer, np.ndarray) and answer.dtype.kind in "biufc":
        return np.zeros(answer.shape, answer.dtype)
    if isinstance(answer, (list, tuple)):
        inside = map(zeros, answer)
        return type(answer)(*inside) if hasattr(answer, "_fields") else type(answer)(inside)
    if isinstance(answer, dict):
        return {key: zeros(value) for key, value in answer.items()}
    return type(answer)() if isinstance(answer, (bool, int, float, str, np.generic)) else None


def with_zeros(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with all its calls and its memory, but for the numbers of its answer."""
    return lambda *args, **kwargs: zeros(function(*args, **kwargs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="*", metavar="lab", help="those whose names begin so, such as lab1; default: all")
    parser.add_argument("--alone", action="store_true", help="a student for each mistake")
    parser.add_argument("--json", action="store_true", help="print what is wrong with each lab, for programs")
    arguments = parser.parse_args()
    chosen = [lab for lab in LABS if not arguments.labs or lab.startswith(tuple(arguments.labs))]
    os.environ.update(OFFLINE, NBGRADER_EXECUTION="autograde", MPLBACKEND="Agg")
    wrong = {lab: faults_in(cells_of(lab), arguments.alone) for lab in chosen}
    if arguments.json:
        print(json.dumps(wrong))
        return
    for lab in chosen:
        print(f"{lab}: {len(idle_in(cells_of(lab)))} answers do nothing", *wrong[lab], sep="\n    ")
    if any(wrong.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
