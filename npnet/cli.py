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

import npnet
from npnet import compare, datasets, mnist
from npnet.activations import ACTIVATIONS
from npnet.archive import SaveError
from npnet.arguments import EXAMPLES, argument, number, parse_arch, parse_checkpoints, parse_file, parse_out, whole
from npnet.backend import BackendUnavailable, get_backend
from npnet.device import compare_devices, diagnose
from npnet.device_ranks import take_device
from npnet.failures import OutOfMemory
from npnet.files import write_text
from npnet.launch import launched, supervise
from npnet.losses import LOSSES, TrainingDiverged
from npnet.memory import parse_bytes
from npnet.optimizers import OPTIMIZERS
from npnet.plan_report import plan_report
from npnet.plans import InfeasibleBudget
from npnet.ranks import RankFailed, Ranks, world
from npnet.report import Table, describe_sizes, write_json
from npnet.saver import Saver


def default(name: str) -> str:
    """What an option of train is without being given, for its help."""
    modern, classic = getattr(mnist.MODERN, name), getattr(mnist.CLASSIC, name)
    if name == "arch":
        modern, classic = describe_sizes(modern), describe_sizes(classic)
    return f"(default {modern}; with --classic {classic})"


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="npnet", description="Neural networks in NumPy, trained in less memory by gradient checkpointing."
    )
    parser.add_argument("--version", action="version", version=f"npnet {npnet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | plan | compare | device | data")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, examples: str) -> Any:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    train = command("train", run_train, "Train on MNIST, and measure time and memory of a step.", EXAMPLES["train"])
    plan = command(
        "plan", run_plan, "What a training step will take, and the cheapest schedule for a budget.", EXAMPLES["plan"]
    )
    for sub in (train, plan):
        sub.add_argument(
            "--classic", action="store_true", help="the lab exercise's set-up; options override parts of it"
        )
        sub.add_argument(
            "--arch", type=argument(parse_arch), help=f"layer sizes, 128x20 for twenty of 128 {default('arch')}"
        )
        sub.add_argument("--activation", choices=ACTIVATIONS, help=f"of the hidden layers {default('activation')}")
        sub.add_argument("--loss", choices=LOSSES, help=default("loss"))
        sub.add_argument("--optimizer", choices=OPTIMIZERS, help=default("optimizer"))
        sub.add_argument(
            "--batch-size", type=argument(whole("batch size", 1)), help=f"samples a step {default('batch_size')}"
        )
        sub.add_argument("--dtype", choices=["float32", "float64"], help=default("dtype"))
        strategy = sub.add_mutually_exclusive_group()
        strategy.add_argument(
            "--checkpoint-every", "--every", type=argument(parse_checkpoints), default="sqrt", metavar="N",
            help="layers between checkpoints; 0: keep everything; sqrt (default): the depth's root; revolve; offload",
        )  # fmt: skip
        strategy.add_argument(
            "--memory-budget", type=argument(parse_bytes), metavar="SIZE",
            help="bytes, 20MB or 20MiB: the cheapest schedule with which a step never takes more",
        )  # fmt: skip
    train.add_argument(
        "--learning-rate", "--lr", "--eta", type=argument(number("the learning rate")), help=default("learning_rate")
    )
    train.add_argument(
        "--decay", choices=["none", "linear"], help=f"linear: the learning rate falls to zero {default('decay')}"
    )
    train.add_argument("--epochs", type=argument(whole("epochs", 1)), help=f"passes over the data {default('epochs')}")
    train.add_argument("--backend", help="numpy or cupy (default: $NPNET_BACKEND, else numpy)")
    train.add_argument("--samples", type=argument(whole("samples", 1)), help="train on the first SAMPLES images only")
    train.add_argument(
        "--capture", action="store_true", help="record a step and replay it: the same numbers, faster on thin layers"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bars")
    train.add_argument(
        "--save-every", type=argument(whole("steps", 1)), metavar="N",
        help="save the training to save.npz in --out every N steps (also when it is interrupted, and at its end)",
    )  # fmt: skip
    train.add_argument(
        "--resume", action="store_true",
        help="go on with the training saved in --out, with its settings; if there is none, begin",
    )  # fmt: skip
    train.add_argument(
        "--stop-on-save-error", action="store_true", help="end when a save cannot be written (default: warn, and go on)"
    )
    plan.add_argument("--measure", action="store_true", help="run steps on random data too, beside what is predicted")
    plan.add_argument(
        "--plot", type=argument(parse_file), metavar="FILE", help="draw timelines and the trade-off (.png, .svg)"
    )
    plan.add_argument(
        "--json", type=argument(parse_file), metavar="FILE", help="write the plan as JSON, timeline included"
    )
    compare = command(
        "compare", run_compare, "The lab exercise's report: accuracy, time, memory, with and without checkpointing.",
        EXAMPLES["compare"],
    )  # fmt: skip
    compare.add_argument("--quick", action="store_true", help="a tenth of the data, and fewer rounds")
    for sub in (train, compare):
        sub.add_argument("--seed", type=argument(whole("seed", 0)), help="of all random numbers (default 0)")
        sub.add_argument("--data", metavar="PATH", help="MNIST file or its folder (default: searched, see npnet data)")
        sub.add_argument("--out", type=argument(parse_out), metavar="DIR", help="write results and pictures there")
    device = command(
        "device", run_device, "What a GPU needs, and whether it is there; matrix products on CPU and GPU, timed.",
        EXAMPLES["device"],
    )  # fmt: skip
    device.add_argument("--size", type=argument(whole("size", 1)), default=5000, help="rows and columns (default 5000)")
    device.add_argument(
        "--repeats", type=argument(whole("repeats", 1)), default=3, help="median of so many (default 3)"
    )
    data = command(
        "data", run_data, "Show, verify or fetch the MNIST file.",
        EXAMPLES["data"],
    )  # fmt: skip
    data.add_argument("action", nargs="?", choices=["show", "verify", "fetch"], default="show")
    data.add_argument("--data", metavar="PATH", help="MNIST file or its folder; for fetch the folder to fill")
    return parser


def settings_of(options: argparse.Namespace) -> mnist.Settings:
    """The defaults, with what was given in place of parts of them."""
    settings = mnist.CLASSIC if options.classic else mnist.MODERN
    return replace(settings, **_given(options))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings among the options that were given."""
    given = {field.name: getattr(options, field.name, None) for field in fields(mnist.Settings)}
    return {name: value for name, value in given.items() if value is not None}


def resumed_settings(options: argparse.Namespace, save: Path) -> mnist.Settings:
    """Those of the save; what was given must be the same, but for the number of epochs.

    Raises:
        ValueError: it is not.
    """
    saved = mnist.Settings.of_save(save)
    given = _given(options) | ({"exercise": True} if options.classic else {})
    for name, value in given.items():
        if name != "epochs" and getattr(saved, name) != value:
            raise ValueError(
                f"--resume: {save} was saved with {name.replace('_', ' ')} {getattr(saved, name)}, not {value}; leave "
                "the option out, or train anew in another --out"
            )
    return replace(saved, epochs=given.get("epochs", saved.epochs))


def run_train(options: argparse.Namespace) -> int:
    """npnet train."""
    ranks = Ranks(world())
    with ranks.guard():
        with ranks.together():
            pass  # where the arguments of another rank were refused: see _parsed
        own = ("run", "memory_budget")  # a budget is each rank's own
        ranks.alike({name: repr(each) for name, each in vars(options).items() if name not in own})
        with ranks.together():
            if options.capture and ranks.size > 1:
                raise ValueError("--capture works in one process only: leave it out, or start npnet without mpiexec")
            settings, saver = _begun(options)
        with ranks.together():
            backend = get_backend(options.backend)
            take_device(backend, launched())
        mnist.train(
            ranks.broadcast(settings),  # a save may be where rank 0 is alone
            options.checkpoint_every,
            backend,
            memory_budget=options.memory_budget,
            capture=options.capture,
            data=options.data,
            out=options.out,
            saver=saver,
            ranks=ranks,
            log=not options.quiet,
        )
    return 0


def _begun(options: argparse.Namespace) -> tuple[mnist.Settings, Saver | None]:
    """How to train, and what saves it: anew, or as the save says.

    Raises:
        ValueError, OSError, SaveError: the options contradict the save, or it cannot be read.
    """
    settings, saver = settings_of(options), None
    if options.save_every is not None or options.resume:
        if options.out is None:
            raise ValueError("--save-every and --resume need --out DIR, where the save is")
        save = options.out / "save.npz"
        if options.resume and save.exists():
            settings = resumed_settings(options, save)
        elif save.exists():
            raise ValueError(f"{save} is the save of a training: go on with it (--resume), or train in another --out")
        about = {"settings": asdict(settings)}
        saver = Saver(
            save,
            options.save_every or 100,
            resume=options.resume,
            stop_on_error=options.stop_on_save_error,
            about=about,
        )
    return settings, saver


def run_plan(options: argparse.Namespace) -> int:
    """npnet plan."""
    plan_report(
        settings_of(options),
        options.checkpoint_every,
        options.memory_budget,
        measure=options.measure,
        json=options.json,
        picture=options.plot,
    )
    return 0


def run_compare(options: argparse.Namespace) -> int:
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
    return 0


def run_device(options: argparse.Namespace) -> int:
    """npnet device: 1 if something is there, but broken; that there is no GPU is no failure."""
    checks = diagnose()
    print("\n".join(map(str, checks)), flush=True)
    if any(each.state == "broken" for each in checks):
        return 1
    print(f"\n{compare_devices(options.size, options.repeats)}")
    return 0


def run_data(options: argparse.Namespace) -> int:
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
    return 0


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; if they are refused on this rank alone, the others get to know."""
    try:
        options = parser.parse_args(arguments)
        if launched() is not None and options.run is not run_train:
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
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (InfeasibleBudget, OutOfMemory) as error:
        print(f"npnet {options.command}: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(
            f"npnet {options.command}: out of memory ({error}); try a smaller --arch or --batch-size", file=sys.stderr
        )
        return 1
    except RankFailed as error:
        print(f"npnet {options.command}: {error}", file=sys.stderr)
        return 0  # mpiexec joins the exit codes: the rank that failed says its own
    except (OSError, datasets.DataError, SaveError, TrainingDiverged, ImportError) as error:
        print(f"npnet {options.command}: {error}", file=sys.stderr)
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
