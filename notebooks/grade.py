"""See what nbgrader gives to the right solution of a lab, to the blank, and to each planted mistake.

``python -m notebooks.grade lab1`` prints who lost which points, and what was said to them. A student makes several of
the mistakes, in different cells, so that there are fewer to grade; with ``--alone`` each makes one.
"""

import argparse
import functools
import importlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from notebooks.build import LABS, differences, make_course, nbgrader, source_of
from notebooks.mistake import Mistake

RIGHT, BLANK = "right", "blank"
_HIDDEN = re.compile(r"\s*### (BEGIN|END) SOLUTION")


def mistakes_in(lab: str) -> list[Mistake]:
    """The mistakes planted in a lab."""
    planted: list[Mistake] = importlib.import_module(f"notebooks.mistakes.{lab}").MISTAKES
    return planted


def solutions_of(lab: str) -> dict[str, str]:
    """The right solutions, by grade_id, without the marks around them."""
    solutions = {}
    for cell in source_of(lab).cells:
        metadata = cell.metadata.get("nbgrader", {})
        if metadata.get("solution"):
            lines = cell.source.splitlines()
            solutions[metadata["grade_id"]] = "\n".join(line for line in lines if not _HIDDEN.match(line))
    return solutions


def with_mistake(solutions: dict[str, str], mistake: Mistake) -> dict[str, str]:
    """The solutions of a student who makes this mistake.

    Raises:
        ValueError: what it replaces is not there, or more than once.
    """
    right = solutions[mistake.cell]
    if right.count(mistake.old) != 1:
        raise ValueError(f"{mistake.name}: {mistake.cell} has {mistake.old!r} {right.count(mistake.old)} times")
    return solutions | {mistake.cell: right.replace(mistake.old, mistake.new)}


def students_of(lab: str, alone: bool = False) -> list[list[Mistake]]:
    """Who makes which mistakes: each is made once, nobody makes two in one cell, and all make about as many."""
    mistakes = mistakes_in(lab)
    if alone:
        return [[each] for each in mistakes]
    cells = [each.cell for each in mistakes]
    students: list[list[Mistake]] = [[] for _ in range(max(map(cells.count, cells)))]
    for mistake in mistakes:
        free = [own for own in students if mistake.cell not in [each.cell for each in own]]
        min(free, key=len).append(mistake)
    return students


def hand_in(course: Path, lab: str, released: Path, student: str, solutions: dict[str, str]) -> None:
    """A student's notebook: the released one, with these solutions."""
    import nbformat

    notebook = nbformat.read(released, as_version=4)
    for cell in notebook.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = solutions.get(grade_id, cell.source)
    folder = course / "submitted" / student / lab
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / f"{lab}.ipynb")


def grade(lab: str, course: Path, alone: bool = False) -> dict[str, Any]:
    """Grade the students in an empty folder; student -> grade_id of each graded cell -> score, most, says.

    ``says`` is the error in the cell; ``score`` is None where a person has to grade.
    """
    import nbformat

    released, solutions = make_course(course, lab), solutions_of(lab)
    students = {RIGHT: solutions, BLANK: {}}
    for i, mistakes in enumerate(students_of(lab, alone)):
        students[f"student{i}"] = functools.reduce(with_mistake, mistakes, solutions)
    for student, own in students.items():
        hand_in(course, lab, released, student, own)
    # No cell may take 30 s, and none does: so this must end well.
    nbgrader(course, "autograde", lab, "--Execute.timeout=30")
    results = {}
    for student in students:
        notebook = nbformat.read(course / "autograded" / student / lab / f"{lab}.ipynb", as_version=4)
        results[student] = {
            cell.metadata.nbgrader["grade_id"]: _result(cell)
            for cell in notebook.cells
            if cell.metadata.get("nbgrader", {}).get("grade")
        }
    return results


def _result(cell: Any) -> dict[str, Any]:
    from nbgrader.utils import determine_grade

    score, most = determine_grade(cell)
    errors = [output.get("evalue") or output.get("ename", "") for output in cell.get("outputs", [])]
    return {"score": score, "most": most, "says": " ".join(errors) if score == 0 else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", help="its name, or how it begins")
    parser.add_argument("--alone", action="store_true", help="a student for each mistake")
    parser.add_argument(
        "--json", action="store_true", help="print all results, and what build --check says, for programs"
    )
    arguments = parser.parse_args()
    lab = next((lab for lab in LABS if lab.startswith(arguments.lab)), None)
    if lab is None:
        parser.error(f"no such lab; there are {', '.join(LABS)}")
    with tempfile.TemporaryDirectory() as folder:
        results = grade(lab, Path(folder), arguments.alone)
        wrong = differences(lab, Path(folder) / "release" / lab / f"{lab}.ipynb")
    if arguments.json:
        json.dump({"students": results, "differences": wrong}, sys.stdout)
        return
    students = enumerate(students_of(lab, arguments.alone))
    names = {f"student{i}": ", ".join(each.name for each in mistakes) for i, mistakes in students}
    for student, cells in results.items():
        lost = [f"{name}: {each['says']}" for name, each in cells.items() if each["score"] == 0]
        scores = [each["score"] for each in cells.values() if each["score"] is not None]
        print(f"{names.get(student, student)}: {sum(scores):g} points", *lost, sep="\n    ")


if __name__ == "__main__":
    main()
