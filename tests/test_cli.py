"""The command line: what it takes, what it refuses and how it says so, and where the data are."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import npnet
from npnet import cli, datasets
from npnet.arguments import parse_arch
from npnet.options import build_parser
from tests.scenarios import fresh_registry as fresh_registry
from tests.small_mnist import first_digits, random_digits, write

ROOT = Path(__file__).parents[1]
COMMANDS = ("train", "plan", "compare", "device", "data")


def npnet_command(*arguments: Any) -> int:
    """The exit code of the command, run in this process."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small MNIST file."""
    return write(tmp_path_factory.mktemp("small"), first_digits(200, 100)).parent


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command writes without being told where, it writes there."""
    monkeypatch.chdir(tmp_path)


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_work(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert npnet_command(command, "--help") == 0
    out = capsys.readouterr().out
    examples = re.findall(rf"^  npnet ({command}.*?)(?:  .*)?$", out.partition("examples:")[2], re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        assert build_parser().parse_args(shlex.split(example)).command == command
    options = {
        "data": ["--data"],
        "device": ["--size", "--repeats"],
        "plan": ["--memory-budget", "--plot", "--json", "--measure"],
    }
    for option in options.get(command, ["--data", "--out", "--seed"]):
        assert option in out


def test_help_and_version_of_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert npnet_command("--help") == 0
    assert re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE) == [*COMMANDS]
    assert npnet_command("--version") == 0
    assert capsys.readouterr().out == f"npnet {npnet.__version__}\n"


def test_the_commands_in_the_readme_are_commands() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [part for block in blocks for line in block.splitlines() for part in re.split(r"&&|\|", line)]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.split()[:1] == ["npnet"]]
    if not commands:
        pytest.skip("the README has no npnet commands")
    for command in commands:
        assert build_parser().parse_args(command).command in COMMANDS


def test_python_m_npnet_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for arguments, code in ((["--version"], 0), (["fly"], 2)):
        process = subprocess.run(
            [sys.executable, "-m", "npnet", *arguments], capture_output=True, text=True, check=False
        )
        assert process.returncode == code
    assert "invalid choice: 'fly'" in process.stderr


# What is refused.

BAD: dict[str, tuple[str, str]] = {
    "no command": ("", "the following arguments are required: train | plan | compare | device | data"),
    "unknown command": ("fly", "invalid choice: 'fly'"),
    "unknown option": ("train --gpu", "unrecognized arguments: --gpu"),
    "surplus": ("train now", "unrecognized arguments: now"),
    "unknown action": ("data steal", "argument action: invalid choice: 'steal'"),
    "arch in words": ("train --arch deep", "--arch: 'deep': expected sizes such as 784,30x4,10, but 'deep' is none"),
    "empty arch": ("train --arch ''", "--arch: '': expected sizes such as 784,30x4,10"),
    "arch of one": ("train --arch 784", "--arch: sizes: expected the sizes of at least two layers"),
    "arch with a hole": ("train --arch 784,,10", "--arch: '784,,10': expected sizes such as"),
    "arch with zero": ("train --arch 784,0,10", "--arch: sizes[1]: expected a whole number, at least 1, got 0"),
    "arch with a minus": ("train --arch 784,-5,10", "--arch: sizes[1]: expected a whole number, at least 1, got -5"),
    "arch with a fraction": ("train --arch 784,1.5,10", "'1.5' is none"),
    "arch times nothing": ("train --arch 784,30x,10", "'30x' is none"),
    "arch times zero": ("train --arch 784,30x0,10", "'30x0' is none"),
    "arch times minus one": ("train --arch 784,30x-1,10", "'30x-1' is none"),
    "arch of other images": ("train --arch 64,10", "MNIST needs 784 inputs and 10 outputs, the network is 64,10"),
    "arch of other classes": ("train --arch 784,9", "MNIST needs 784 inputs and 10 outputs, the network is 784,9"),
    "activation": ("train --activation step", "--activation: invalid choice: 'step' (choose from"),
    "loss": ("train --loss hinge", "--loss: invalid choice: 'hinge' (choose from"),
    "optimizer": ("train --optimizer lbfgs", "--optimizer: invalid choice: 'lbfgs' (choose from"),
    "decay": ("train --decay cosine", "--decay: invalid choice: 'cosine' (choose from"),
    "dtype": ("train --dtype float16", "--dtype: invalid choice: 'float16' (choose from"),
    "no epochs": ("train --epochs 0", "--epochs: epochs: expected a whole number, at least 1, got 0"),
    "half an epoch": ("train --epochs 0.5", "--epochs: epochs: expected a whole number, at least 1, got '0.5'"),
    "epochs squared": ("train --epochs ²", "--epochs: epochs: expected a whole number, at least 1, got '²'"),
    "no samples in a batch": ("train --batch-size 0", "--batch-size: batch size: expected a whole number, at least 1"),
    "large batch": ("train --data {small} --batch-size 201", "batch size 201 is more than the 200 training samples"),
    "few samples": ("train --data {small} --samples 99 --batch-size 100", "batch size 100 is more than the 99"),
    "no samples": ("train --samples 0", "--samples: samples: expected a whole number, at least 1, got 0"),
    "negative rate": ("train --learning-rate -1", "the learning rate: expected a finite number, "),
    "rate of NaN": ("train --eta nan", "the learning rate: expected a finite number, "),
    "infinite rate": ("train --learning-rate inf", "the learning rate: expected a finite number, "),
    "rate in words": ("train --learning-rate fast", "the learning rate: expected a finite number, "),
    "negative interval": ("train --checkpoint-every -1", "the number of layers: expected a whole number, at least 0"),
    "interval in words": (
        "train --checkpoint-every two",
        "expected a whole number of layers (0: off), or one of none, sqrt, revolve, offload, got 'two'",
    ),
    "two schedules": ("train --every 2 --offload disk", "give --offload or --checkpoint-every, not both"),
    "offload to itself": ("plan --offload host", "offload: activations are in the host's memory already; 'disk' moves"),
    "negative seed": ("compare --seed -3", "--seed: seed: expected a whole number, at least 0, got -3"),
    "unknown backend": ("train --backend tpu", "unknown backend 'tpu'; choose one of 'numpy', 'cupy'"),
    "no CuPy": ("train --backend cupy", "backend 'cupy': the package is missing"),
    "out below a file": ("train --out {file}/below", "--out: cannot write to the folder {file}/below: Not a directory"),
    "out is a file": ("compare --out {file}", "--out: cannot write to the folder {file}: it is a file; name another"),
    "out without a name": ("train --out ''", "--out: expected the name of a folder, got an empty text"),
    "file without a name": ("plan --json ''", "--json: expected a file to write, got an empty text"),
    "many samples": ("train --data {small} --samples 201", "samples: 201 is more than the 200 training samples; leave"),
    "misspelt": ("train --checkpoint-evry 2", "--checkpoint-evry 2; did you mean --checkpoint-every?"),
    "abbreviated": ("plan --memory=8MB", "unrecognized arguments: --memory=8MB; did you mean --memory-budget?"),
    "save without a folder": ("train --resume", "--save-every and --resume need --out DIR, where the save is"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_with_what_was_wrong(
    name: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    file = tmp_path / "file"
    file.write_text("")
    command, message = (text.format(small=small, file=file) for text in BAD[name])
    assert npnet_command(*shlex.split(command)) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.splitlines()[-1].startswith("npnet")
    assert "error: " in err.splitlines()[-1]
    assert "Traceback" not in err
    assert "accuracy" not in out


def test_the_usage_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert npnet_command("train", "--checkpoint-evry", "2") == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: npnet train [")
    assert "npnet train: error: unrecognized arguments: --checkpoint-evry 2" in err
    assert npnet_command("--versoin") == 2
    assert capsys.readouterr().err.startswith("usage: npnet [")


@pytest.mark.parametrize(("command", "advice"), [("device", "--size"), ("plan", "--arch"), ("train", "--batch-size")])
def test_out_of_memory_the_advice_is_an_option_of_the_command(
    command: str, advice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(_: Any) -> int:
        raise MemoryError("4 TB")

    monkeypatch.setitem(cli.RUN, command, exhausted)
    assert npnet_command(command) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"npnet {command}: out of memory (4 TB); try a smaller --")
    assert advice in err
    assert npnet_command(command, "--help") == 0
    assert set(re.findall(r"--[\w-]+", err)) <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


@pytest.mark.parametrize("name", ["tpu", "cupy"])
def test_a_bad_backend_in_the_environment_is_refused(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setenv("NPNET_BACKEND", name)
    assert npnet_command("train") == 2
    err = capsys.readouterr().err
    assert f"backend '{name}'" in err
    assert "NPNET_BACKEND" in err


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert npnet_command("train", "--out", tmp_path) == 2
    assert f"cannot write to the folder {tmp_path}: Permission denied" in capsys.readouterr().err


def test_architectures_in_short() -> None:
    assert parse_arch("784,30x4,10") == (784, 30, 30, 30, 30, 10)
    assert parse_arch("784,128x2,64x1,10x2") == (784, 128, 128, 64, 10, 10)
    assert parse_arch("784, 10") == (784, 10)


# Data.


@pytest.mark.parametrize("command", ["train", "compare", "data", "data verify"])
def test_a_missing_file_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert npnet_command(*command.split(), "--data", tmp_path / "none.npz") == 1
    err = capsys.readouterr().err
    assert f"no MNIST file at {tmp_path / 'none.npz'}; get it with `npnet data fetch`" in err
    assert err.startswith(f"npnet {command.split()[0]}: ")


@pytest.mark.parametrize("command", ["train", "compare", "data verify"])
def test_a_truncated_file_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, random_digits())
    os.truncate(file, 3000)
    assert npnet_command(*command.split(), "--data", tmp_path) == 1
    err = capsys.readouterr().err
    assert f"{file}: truncated, damaged or not an .npz file" in err
    assert "npnet data fetch" in err
    assert "Traceback" not in err


def test_data_shows_the_folders_and_the_file(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert npnet_command("data") == 0
    out = capsys.readouterr().out
    assert all(f"  {folder}\n" in out for folder in datasets.data_folders())
    assert f"found at {datasets.find_mnist()}" in out
    assert npnet_command("data", "show", "--data", small) == 0
    assert capsys.readouterr().out.endswith(f"  {small}\nand found at {small / 'mnist.npz'}\n")


def test_data_verify(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert npnet_command("data", "verify", "--data", ROOT / "data") == 0
    assert capsys.readouterr().out == f"{ROOT / 'data' / 'mnist.npz'}: every byte is as it should be\n"
    assert npnet_command("data", "verify", "--data", small) == 1
    assert "x_train is not MNIST's" in capsys.readouterr().err


def test_data_fetch(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(folder: str | None) -> Path:
        asked.append(folder)
        if len(asked) > 2:
            raise asked_for_too_much
        return tmp_path / "mnist.npz"

    monkeypatch.setattr(datasets, "fetch_mnist", fetch)
    assert npnet_command("data", "fetch") == 0
    assert npnet_command("data", "fetch", "--data", tmp_path) == 0
    assert asked == [None, str(tmp_path)]
    assert capsys.readouterr().out == f"MNIST is at {tmp_path / 'mnist.npz'}\n" * 2
    for asked_for_too_much in (OSError("no network"), ImportError("pip install 'npnet[data]'")):
        assert npnet_command("data", "fetch") == 1
        assert capsys.readouterr().err == f"npnet data: {asked_for_too_much}\n"
