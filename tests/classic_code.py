"""Where the classic exercise's code is: not part of the project, beside it or where NPNET_CLASSIC says."""

import importlib.util
import os
from pathlib import Path
from typing import Any

BESIDE_THE_PROJECT = Path(__file__).parents[2] / "shared" / "peers" / "classic.py"


def load_classic() -> Any:
    """The classic exercise as a module; FileNotFoundError says where it was looked for."""
    path = Path(os.environ.get("NPNET_CLASSIC") or BESIDE_THE_PROJECT)
    if not path.is_file():
        raise FileNotFoundError(f"the classic exercise's code is not at {path}; name its place in NPNET_CLASSIC")
    spec = importlib.util.spec_from_file_location("classic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
