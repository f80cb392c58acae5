"""Make the notebooks of the labs from their one source each: ``python -m notebooks.build``.

``labs/<lab>.py`` (jupytext's percent format) becomes ``source/<lab>/<lab>.ipynb``, the instructor's version, executed,
and ``release/<lab>/<lab>.ipynb``, the students' version, made by ``nbgrader generate_assignment``. A lab that did not
change keeps its outputs. ``--check`` writes nothing, and says what is not as it would be made.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LABS = sorted(path.stem for path in (FOLDER / "labs").glob("lab*.py"))

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
DEFAULTS = {"grade": False, "locked": False, "schema_version": 3, "solution": False, "task": False}
"""nbgrader's metadata of a cell, where the source does not say otherwise; what is graded by tests is locked."""

MOST_SECONDS = 15  # a cell; students' machines are slower, and may take 30
MOST_OUTPUT = 400_000  # bytes a lab
OFFLINE = {
    "OPENBLAS_NUM_THREADS": "1",  # the same pictures on every machine, and no waiting for each other
    "NPNET_STATIC": "1",  # pictures in the place of sliders: see npnet.labs.slider
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def source_of(lab: str) -> Any:
    """The notebook that ``labs/<lab>.py`` stands for, without outputs: always the same bytes for the same text."""
    import jupytext

    notebook = jupytext.read(FOLDER / "labs" / f"{lab}.py", fmt="py:percent")
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    taken: set[str] = set()
    for cell in notebook.cells:
        given = cell.metadata.get("nbgrader")
        if given is not None:
            checked = given.get("grade") and not given.get("solution")
            cell.metadata["nbgrader"] = DEFAULTS | {"locked": bool(checked)} | given
            cell.metadata["nbgrader"].setdefault("cell_type", cell.cell_type)
        cell.id = _unused(given["grade_id"] if given else _digest(cell.source), taken)
        taken.add(cell.id)
    return notebook


def _digest(text: str) -> str:
    return "cell-" + hashlib.sha256(text.encode()).hexdigest()[:8]


def _unused(name: str, taken: set[str]) -> str:
    return name if name not in taken else _unused(f"{name}-again", taken)


def without_outputs(notebook: Any) -> str:
    """All of a notebook but what executing it adds."""
    cells = []
    for cell in notebook.cells:
        metadata = {name: value for name, value in cell.metadata.items() if name != "execution"}
        cells.append({"id": cell.id, "type": cell.cell_type, "source": cell.source, "metadata": metadata})
    return json.dumps([notebook.metadata, notebook.nbformat, notebook.nbformat_minor, cells], indent=1, sort_keys=True)


def execute(notebook: Any, folder: Path) -> list[float]:
    """Run all cells, which must not fail, and store their outputs; the seconds that each code cell took.

    Raises:
        CellExecutionError: a cell failed.
    """
    import nbclient

    client = nbclient.NotebookClient(
        notebook, timeout=120, coalesce_streams=True, resources={"metadata": {"path": folder}}
    )
    client.execute(env=os.environ | OFFLINE)
    seconds = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            times = cell.metadata.pop("execution")
            seconds.append(_seconds(times["shell.execute_reply"]) - _seconds(times["iopub.execute_input"]))
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    return seconds


def _seconds(stamp: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(stamp).timestamp()


def output_bytes(notebook: Any) -> int:
    """What the outputs take in the file, pictures and all."""
    return sum(len(json.dumps(cell.get("outputs", []))) for cell in notebook.cells)


def nbgrader(course: Path, *arguments: str) -> str:
    """Run a command of nbgrader in a course's folder; what it said.

    Raises:
        RuntimeError: it failed.
    """
    process = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=course,
        env=os.environ | OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"nbgrader {' '.join(arguments)}:\n{process.stdout}")
    return process.stdout


def make_course(course: Path, lab: str) -> Path:
    """A course in an empty folder, with this lab in it, released; the students' version."""
    import nbformat

    (course / "source" / lab).mkdir(parents=True)
    shutil.copy(FOLDER / "nbgrader_config.py", course)
    nbformat.write(source_of(lab), course / "source" / lab / f"{lab}.ipynb")
    nbgrader(course, "generate_assignment", lab)
    return course / "release" / lab / f"{lab}.ipynb"


def differences(lab: str, release: Path) -> list[str]:
    """What is not as it would be made; ``release`` is a fresh students' version."""
    import nbformat

    path, wrong = FOLDER / "source" / lab / f"{lab}.ipynb", []
    if not path.is_file():
        wrong.append(f"{path}: is not there")
    else:
        committed = nbformat.read(path, as_version=4)
        if without_outputs(committed) != without_outputs(source_of(lab)):
            wrong.append(f"{path}: is not what labs/{lab}.py stands for")
        if any(cell.cell_type == "code" and not cell.execution_count for cell in committed.cells):
            wrong.append(f"{path}: was not executed")
        if output_bytes(committed) > MOST_OUTPUT:
            wrong.append(f"{path}: its outputs take {output_bytes(committed)} bytes, more than {MOST_OUTPUT}")
    path = FOLDER / "release" / lab / f"{lab}.ipynb"
    if not path.is_file() or path.read_bytes() != release.read_bytes():
        wrong.append(f"{path}: is not what nbgrader makes of labs/{lab}.py")
    return wrong


def build(lab: str, release: Path, again: bool) -> None:
    """Write both versions; execute the instructor's if it changed, or ``again``."""
    import nbformat

    path = FOLDER / "source" / lab / f"{lab}.ipynb"
    notebook = source_of(lab)
    if again or not path.is_file() or without_outputs(nbformat.read(path, as_version=4)) != without_outputs(notebook):
        seconds = execute(notebook, FOLDER)
        print(f"{lab}: executed in {sum(seconds):.1f} s, the slowest cell took {max(seconds):.1f} s")
        if max(seconds) > MOST_SECONDS or output_bytes(notebook) > MOST_OUTPUT:
            raise SystemExit(f"{lab}: a cell takes too long, or outputs too many bytes ({output_bytes(notebook)})")
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    students = FOLDER / "release" / lab / f"{lab}.ipynb"
    students.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(release, students)
    print(f"{lab}: {path.stat().st_size / 1000:.0f} kB, students' version {students.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="*", metavar="lab", help="those whose names begin so, such as lab1; default: all")
    parser.add_argument("--again", action="store_true", help="execute labs that did not change, too")
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs")
    arguments = parser.parse_args()
    chosen = [lab for lab in LABS if not arguments.labs or lab.startswith(tuple(arguments.labs))]
    if not chosen:
        parser.error(f"no such lab; there are {', '.join(LABS)}")
    wrong = []
    for lab in chosen:
        with tempfile.TemporaryDirectory() as folder:
            release = make_course(Path(folder), lab)
            if arguments.check:
                wrong += differences(lab, release)
            else:
                build(lab, release, arguments.again)
    if wrong:
        raise SystemExit("\n".join([*wrong, "run `python -m notebooks.build`, and commit what it wrote"]))


if __name__ == "__main__":
    main()
