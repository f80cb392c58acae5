# PYTHON_ARGCOMPLETE_OK
"""The command line: npnet train | plan | compare | device | data."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from npnet import compare, datasets, mnist
from npnet.archive import SaveError
from npnet.arguments import LESS_MEMORY
from npnet.backend import BackendUnavailable, get_backend
from npnet.device import compare_devices, diagnose
from npnet.device_ranks import take_device
from npnet.failures import OutOfMemory
from npnet.files import write_text
from npnet.launch import launched, supervise
from npnet.losses import TrainingDiverged
from npnet.options import build_parser
from npnet.plan_report import plan_report
from npnet.plans import InfeasibleBudget
from npnet.ranks import RankFailed, Ranks, world
from npnet.report import Table, write_json
from npnet.saver import Saver
from npnet.settings import CLASSIC, FREE, MODERN, Settings


def settings_of(options: argparse.Namespace) -> Settings:
    """The defaults, with what was given in place of parts of them."""
    if options.offload is not None and options.checkpoint_every is not None:
        raise ValueError("give --offload or --checkpoint-every, not both")
    settings = CLASSIC if options.classic else MODERN
    return replace(settings, **_given(options))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings among the options that were given."""
    given = {field.name: getattr(options, field.name, None) for field in fields(Settings)}
    return {name: value for name, value in given.items() if value is not None}


def resumed_settings(options: argparse.Namespace, save: Path) -> tuple[Settings, int]:
    """The save's settings, and how many epochs are done; options must say the same, but for what changes no number.

    Raises:
        ValueError: it is not.
    """
    saved, done = Settings.of_save(save)
    given = _given(options) | ({"exercise": True} if options.classic else {})
    for name, value in given.items():
        if name in FREE or getattr(saved, name) == value or (name == "epochs" and saved.decay == "none"):
            continue
        why = ", over which the learning rate falls to zero" if name == "epochs" else ""
        raise ValueError(
            f"--resume: {save} was saved with {name.replace('_', ' ')} {getattr(saved, name)}{why}, not {value}; leave "
            "the option out, or train anew in another --out"
        )
    if "checkpoint_every" in given:
        given |= {"memory_budget": None, "offload": None}
    return replace(saved, **given), done


def run_train(options: argparse.Namespace) -> None:
    """npnet train."""
    ranks = Ranks(world())
    with ranks.guard():
        with ranks.together():
            pass  # where the arguments of another rank were refused: see _parsed
        own = ("refuse", "memory_budget")  # a budget is each rank's own
        ranks.alike({name: repr(each) for name, each in vars(options).items() if name not in own})
        with ranks.together():
            settings, saver, done = _begun(options)
        settings = ranks.broadcast(settings)  # a save may be where rank 0 is alone
        if options.memory_budget is not None:
            settings = replace(settings, memory_budget=options.memory_budget)
        with ranks.together():
            if settings.capture and ranks.size > 1:
                raise ValueError(
                    "--capture works in one process only: leave it out (--no-capture, where the save has it), or start "
                    "npnet without mpiexec"
                )
            backend = get_backend(settings.backend)
            take_device(backend, launched())
        mnist.train(
            settings,
            backend,
            data=options.data,
            out=options.out,
            saver=saver,
            done=done,
            ranks=ranks,
            log=not options.quiet,
        )


def _begun(options: argparse.Namespace) -> tuple[Settings, Saver | None, int]:
    """How to train, what saves it, and how many epochs are done: anew, or as the save says.

    Raises:
        ValueError, OSError, SaveError: the options contradict the save, or it cannot be read.
    """
    settings, done, saving = settings_of(options), 0, options.save_every is not None or options.resume
    save = options.out and options.out / "save.npz"
    if save is None:
        if saving:
            raise ValueError("--save-every and --resume need --out DIR, where the save is")
    elif not save.exists():
        settings.check_report(options.out / "metrics.json")
    elif options.resume:
        settings, done = resumed_settings(options, save)
    else:
        raise ValueError(f"{save} is the save of a training: go on with it (--resume), or train in another --out")
    every = settings.save_every or 100
    settings = replace(settings, backend=get_backend(settings.backend).name, save_every=every if saving else None)
    if not saving:
        return settings, None, done
    saver = Saver(
        save,
        every,
        resume=options.resume,
        stop_on_error=settings.stop_on_save_error,
        about={"settings": asdict(settings)},
    )
    return settings, saver, done


def run_plan(options: argparse.Namespace) -> None:
    """npnet plan."""
    plan_report(
        settings_of(options),
        measure=options.measure,
        json=options.json,
        picture=options.plot,
        log=not options.quiet,
    )


def run_compare(options: argparse.Namespace) -> None:
    """npnet compare."""
    print("loading MNIST", flush=True)
    tables: list[Table] = []
    try:
        for table in compare.report(*datasets.load_mnist(options.data), options.quick, options.seed or 0):
            tables.append(table)
            print(f"\n{table}", flush=True)
    finally:
        if options.out is not None and tables:
            write_text(options.out / "report.txt", "\n\n".join(map(str, tables)) + "\n")
            write_json(options.out / "report.json", {table.name: table.rows for table in tables})
            for table in tables:
                table.write(options.out)
            print(f"\nresults in {options.out}")


def run_device(options: argparse.Namespace) -> int:
    """npnet device: 1 if something is there, but broken; that there is no GPU is no failure."""
    checks = diagnose()
    print("\n".join(map(str, checks)), flush=True)
    if any(each.state == "broken" for each in checks):
        return 1
    print(f"\n{compare_devices(options.size, options.repeats)}")
    return 0


def run_data(options: argparse.Namespace) -> None:
    """npnet data."""
    if options.action == "fetch":
        print(f"MNIST is at {datasets.fetch_mnist(options.data)}")
    elif options.action == "verify":
        print(f"{datasets.verify_mnist(options.data)}: every byte is as it should be")
    else:
        print("MNIST is looked for in")
        for folder in [Path(options.data)] if options.data else datasets.data_folders():
            print(f"  {folder}")
        print(f"and found at {datasets.find_mnist(options.data)}")


RUN: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": run_train,
    "plan": run_plan,
    "compare": run_compare,
    "device": run_device,
    "data": run_data,
}


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; if they are refused on this rank alone, the others get to know."""
    try:
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            options.refuse(unknown)
        if launched() is not None and options.command != "train":
            parser.error(f"npnet {options.command} runs in one process, without mpiexec; npnet train runs in many")
        return options
    except SystemExit as error:
        if error.code and launched() is not None:
            with suppress(ImportError, ValueError), Ranks(world()).together():
                raise ValueError("its arguments are wrong") from None
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0, 1 for what went wrong, 2 for bad arguments, 130 for Ctrl-C, 143 for SIGTERM."""
    parser = build_parser()
    try:
        import argcomplete

        argcomplete.autocomplete(parser)
    except ImportError:
        pass
    options = _parsed(parser, arguments)
    try:
        return RUN[options.command](options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (InfeasibleBudget, OutOfMemory, OSError, datasets.DataError, TrainingDiverged, ImportError) as error:
        print(f"npnet {options.command}: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"npnet {options.command}: out of memory ({error}); {LESS_MEMORY[options.command]}", file=sys.stderr)
        return 1
    except RankFailed as error:
        print(f"npnet {options.command}: {error}", file=sys.stderr)
        return 0  # mpiexec joins the exit codes: the rank that failed says its own
    except SaveError as error:
        print(f"npnet {options.command}: {error}; to begin anew, name another --out", file=sys.stderr)
        return 1
    except (TypeError, ValueError, BackendUnavailable) as error:
        print(f"npnet {options.command}: error: {error}", file=sys.stderr)
        return 2


def run() -> NoReturn:
    """The console script; of several ranks the first one alone speaks."""
    launch = launched()
    if launch is not None:
        supervise(launch)
    if launch is None or not launch.rank:
        sys.exit(main())
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        sys.exit(main())
