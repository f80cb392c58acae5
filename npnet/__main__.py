"""python -m npnet: the same as the command npnet."""

from npnet.cli import run

run()
