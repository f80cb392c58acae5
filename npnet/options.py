"""The commands and their options, each with its help."""

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import NoReturn

import npnet
from npnet.activations import ACTIVATIONS
from npnet.arguments import EXAMPLES, argument, number, parse_arch, parse_checkpoints, parse_file, parse_out, whole
from npnet.losses import LOSSES
from npnet.memory import parse_bytes
from npnet.optimizers import OPTIMIZERS
from npnet.report import describe_sizes
from npnet.settings import CLASSIC, MODERN


def default(name: str) -> str:
    """What an option of train is without being given, for its help."""
    modern, classic = getattr(MODERN, name), getattr(CLASSIC, name)
    if name == "arch":
        modern, classic = describe_sizes(modern), describe_sizes(classic)
    return f"(default {modern}; with --classic {classic})"


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="npnet",
        description="Neural networks in NumPy, trained in less memory by gradient checkpointing.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"npnet {npnet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | plan | compare | device | data")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(refuse=partial(refuse, sub))
        return sub

    train = command("train", "Train on MNIST, and measure time and memory of a step.")
    plan = command("plan", "What a training step will take, and the cheapest schedule for a budget.")
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
            "--checkpoint-every", "--every", type=argument(parse_checkpoints), metavar="{N,none,sqrt,revolve,offload}",
            help="N: so many layers between checkpoints; 0 or none: keep everything; sqrt (default): the depth's root; "
            "revolve: few checkpoints, layers run again several times; offload: activations leave memory and come back",
        )  # fmt: skip
        strategy.add_argument(
            "--memory-budget", type=argument(parse_bytes), metavar="SIZE",
            help="bytes, 20MB or 20MiB: the cheapest schedule with which a step never takes more",
        )  # fmt: skip
        sub.add_argument(
            "--offload", choices=["host", "disk"],
            help="nothing is run again: activations leave memory and come back, from a GPU to its host, or to a file; "
            "with --memory-budget as few as it allows",
        )  # fmt: skip
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
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
        "--capture", action=argparse.BooleanOptionalAction,
        help="record a step and replay it: the same numbers, faster on thin layers",
    )  # fmt: skip
    train.add_argument(
        "--measure", action=argparse.BooleanOptionalAction,
        help="time and memory of a step, before the training: some 20 seconds at most (default)",
    )  # fmt: skip
    train.add_argument(
        "--save-every", type=argument(whole("steps", 1)), metavar="N",
        help="save the training to save.npz in --out every N steps (also when it is interrupted, and at its end)",
    )  # fmt: skip
    train.add_argument(
        "--resume", action="store_true",
        help="go on with the training saved in --out, with its settings (what changes no number may be given anew: "
        "--checkpoint-every, --memory-budget, --capture, --backend, ...); if there is none, begin",
    )  # fmt: skip
    train.add_argument(
        "--stop-on-save-error", action=argparse.BooleanOptionalAction,
        help="end when a save cannot be written (default: warn, and go on)",
    )  # fmt: skip
    plan.add_argument("--measure", action="store_true", help="run steps on random data too, beside what is predicted")
    plan.add_argument(
        "--plot", type=argument(parse_file), metavar="FILE", help="draw timelines and the trade-off (.png, .svg)"
    )
    plan.add_argument(
        "--json", type=argument(parse_file), metavar="FILE", help="write the plan as JSON, timeline included"
    )
    compare = command("compare", "The lab exercise's report: accuracy, time, memory, with and without checkpointing.")
    compare.add_argument("--quick", action="store_true", help="a tenth of the data, and fewer rounds")
    for sub, results in (
        (train, 'write results, a picture and the model there: npnet.load("DIR/model.npz")'),
        (compare, "write results and pictures there"),
    ):
        sub.add_argument("--seed", type=argument(whole("seed", 0)), help="of all random numbers (default 0)")
        sub.add_argument("--data", metavar="PATH", help="MNIST file or its folder (default: searched, see npnet data)")
        sub.add_argument("--out", type=argument(parse_out), metavar="DIR", help=results)
    device = command("device", "What a GPU needs, and whether it is there; matrix products on CPU and GPU, timed.")
    device.add_argument("--size", type=argument(whole("size", 1)), default=5000, help="rows and columns (default 5000)")
    device.add_argument(
        "--repeats", type=argument(whole("repeats", 1)), default=3, help="median of so many (default 3)"
    )
    data = command("data", "Show, verify or fetch the MNIST file.")
    data.add_argument("action", nargs="?", choices=["show", "verify", "fetch"], default="show")
    data.add_argument("--data", metavar="PATH", help="MNIST file or its folder; for fetch the folder to fill")
    return parser


def refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """End with the usage of the command, and with the option that may be meant."""
    text, known = f"unrecognized arguments: {' '.join(unknown)}", re.findall(r"--[a-z][a-z-]+", parser.format_help())
    name = unknown[0].partition("=")[0]
    meant = [option for option in known if option.startswith(name)] or get_close_matches(name, known)
    parser.error(f"{text}; did you mean {meant[0]}?" if meant and name.startswith("--") else text)
