"""Files whose checksums are right and whose content was chosen to do harm."""

import io
import json
import random
import zipfile
from typing import Any

import numpy as np

from npnet.archive import _seal

Arrays = dict[str, np.ndarray]
DEEP = 10**5
RAW = (
    "1e400",
    "-1e400",
    "NaN",
    "9" * 5000,
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
    "-",
    '"\\ud800"',
)
"""What json.dumps would not write."""
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        0.5,
        -0.5,
        1e308,
        5e-324,
        2**31,
        10**6,
        10**12,
        2**63 - 1,
        2**63,
        2**64,
        10**40,
    ),
    *(
        "",
        "x",
        "relu",
        "os.system",
        "float16",
        "object",
        "__class__",
        "9" * 40,
        "a" * 3000,
        " " * 10**5 + "!",
        "1e400 MB",
    ),
    *([], {}, [[]], [0] * 50, [10**6, 10**6], [3, 4, 2], {"": 1}, {"kind": "ReLU", "config": {}}),
    *({"dtype": name} for name in ("float16", "float64", "float128", "object", "O", ">f4", "V8", "bfloat16", 3, None)),
    {"kind": "Dense", "config": {"in_features": 10**6, "out_features": 10**6}},
    {"kind": "Dense", "config": {"in_features": 3, "out_features": 4, "sizes": [1, 1]}},
    {"kind": "LayerNorm", "config": {"features": 10**12}},
    {"kind": "Network", "config": {"sizes": [10**5, 10**5]}},
    {"kind": "NetworkWithCheckpointing", "config": {"sizes": [3, 4, 2], "schedule": "revolve"}},
    {"kind": "Sequential", "config": {"layers": []}},
    {"kind": "Residual", "config": {"inner": {"kind": "Residual", "config": {"inner": 3}}}},
    {"kind": "Stored", "config": {"inner": {"kind": "ReLU", "config": {}}, "dtype": 3, "single": "x"}},
    {"actions": [["forward", 1], ["backward", 1]], "depth": 10**12, "name": "", "needs_saved": []},
    {"actions": [["forward", 10**9]], "depth": 1, "name": [], "needs_saved": [[]]},
    {"actions": [["drop", 1]] * 100, "depth": -1, "name": "x", "needs_saved": [-1]},
)
KEYS = ("layers", "kind", "config", "rng", "backend", "initializer", "dtype", "sizes", "self", "", "features", "format")


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything inside."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in inside for found in _paths(value, (*path, key)))]


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _copy(tree: Any) -> Any:
    return json.loads(json.dumps(tree))


def description(text: str, rng: random.Random) -> str:
    """JSON in which something is something else, gone, there twice, or somebody else's."""
    tree = {"": json.loads(text)}
    raw: dict[str, str] = {}
    for _ in range(rng.choice((1, 1, 2))):
        if not tree:  # all of it is gone
            break
        *path, key = rng.choice(_paths(tree)[1:])
        parent, what = _at(tree, tuple(path)), rng.random()
        if what < 0.5:
            parent[key] = _copy(rng.choice(VALUES))
        elif what < 0.6:
            parent[key] = mark = f"@{len(raw)}@"
            raw[json.dumps(mark)] = rng.choice(RAW)
        elif what < 0.7:
            del parent[key]
        elif what < 0.8 and isinstance(parent, dict):
            parent[rng.choice(KEYS)] = _copy(rng.choice(VALUES))
        elif what < 0.9 and isinstance(parent, list):
            parent[key:key] = [_copy(parent[key]) for _ in range(rng.choice((1, 2, 50)))]
        else:
            parent[key] = _copy(_at(tree, rng.choice(_paths(tree))))
    said = json.dumps(tree[""]) if tree else ""
    for mark, token in raw.items():
        said = said.replace(mark, token)
    return said


def arrays(given: Arrays, rng: random.Random) -> Arrays:
    """An array is gone, there under another name, of another shape or dtype, or holds other numbers."""
    changed = dict(given)
    name = rng.choice(list(changed))
    array = changed.pop(name)
    dtype = rng.choice(("<f2", "<f4", "<f8", "<i8", "|u1", "<u8", "|b1", ">f4", "<c8", "<U3", "<f16"))
    other = rng.choice(list(given))
    with np.errstate(all="ignore"):
        changed |= rng.choice(
            (
                dict,
                lambda: {other: array},
                lambda: {name + rng.choice(("x", "/", ".0", "\0", "é", "a" * 300)): array},
                lambda: {name: array.astype(dtype)},
                lambda: {name: array.reshape(-1)},
                lambda: {name: array.T},
                lambda: {name: array[..., None]},
                lambda: {name: array.ravel()[:0]},
                lambda: {name: np.concatenate([array.ravel()] * 3)},
                lambda: {name: np.full(array.shape, rng.choice((0, -1, 3))).astype(array.dtype)},
                lambda: {name: np.full(array.shape, rng.choice((np.nan, np.inf)))},
                lambda: {name: 0 - array},
                lambda: {name: np.asfortranarray(array)},
                lambda: {name: array, "run/losses": np.ones(rng.randrange(9))},
                lambda: {name: np.zeros((0, 10**12))},
                lambda: {name: np.array(2**64 - 1)},
            )
        )()
    return changed


SHAPES = (
    "(1000000000000,)",
    "(10, 100000000000)",
    "(-1,)",
    "(0, 9" + "9" * 30 + ")",
    "(" + "9" * 5000 + ",)",
    "(2,",
    "3",
)
SHAPES += ("(3L, 4L)", "(" + "(" * 3000, "(True,)", "(1e5,)", "('3',)", "()", "(1,) * 10**9", "(" + "1, " * 70 + ")")
DESCRS = ("'|O'", "'<f8'", "'<U1000000000'", "[('a', '<f4')]", "'<M8[ns]'", "'<f3'", "None", "'\\d'", "'|V0'", "'|S0'")
DESCRS += ("'|a5'", "__import__('os').abort()", "'>f4'", "'<U3'", "'float32'", "3", "'O'")


def npy(array: np.ndarray, rng: random.Random) -> bytes:
    """An .npy file whose header was changed."""
    np.lib.format.write_array(stream := io.BytesIO(), array, version=(1, 0))
    content = stream.getvalue()
    length = int.from_bytes(content[8:10], "little")
    said, body = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    shape, descr = str(array.shape), f"'{array.dtype.str}'"
    what = rng.random()
    if what < 0.4:
        said = said.replace(shape, rng.choice(SHAPES))
    elif what < 0.8:
        said = said.replace(descr, rng.choice(DESCRS))
    elif what < 0.9:
        said = said.replace("False", rng.choice(("True", "0", "None", "1 if 1 else 2", "0or 1")))
    else:
        said, body = rng.choice(
            (("", body), (said, body[:-1]), (said, body + b"\0"), ("[" * 9999, body), (said * 9, body))
        )
    version = rng.choice((b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\0\1"))
    return b"\x93NUMPY" + version + min(65535, len(said)).to_bytes(2, "little") + said.encode("latin1")[:65535] + body


def npz(given: Arrays, rng: random.Random | None = None) -> bytes:
    """A zip of arrays with the right checksums; with ``rng`` one of them, or the zip, is not what it seems."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        wrong = rng.choice(list(given)) if rng else None
        for name, array in given.items():
            if name == wrong and rng:
                content = npy(array, rng)
            else:
                np.lib.format.write_array(stream := io.BytesIO(), array)
                content = stream.getvalue()
            kinds = (*[zipfile.ZIP_STORED] * 30, *[zipfile.ZIP_DEFLATED] * 10, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content, rng.choice(kinds) if rng else zipfile.ZIP_STORED)
    return file.getvalue()


def bomb(size: int, given: Arrays) -> bytes:
    """A zip that also holds an array of ``size`` zeros, in a thousandth of that."""
    with zipfile.ZipFile(file := io.BytesIO(npz(given)), "a", zipfile.ZIP_DEFLATED) as archive:
        said = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}"
        with archive.open("bomb.npy", "w") as stream:
            stream.write(b"\x93NUMPY\1\0\x76\0" + said.encode().ljust(118))
            for _ in range(0, size, 10**6):
                stream.write(bytes(10**6))
    return file.getvalue()


def safetensors(text: str, given: Arrays) -> bytes:
    """A .safetensors file with the seal that npnet looks for."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in given.items()}
    text = f"[]\n{text}"
    return save(contiguous, {"npnet": f"{_seal(text, contiguous)}\n{text}"})


def tensor_header(content: bytes, rng: random.Random) -> bytes:
    """A .safetensors file whose header says something else."""
    length = int.from_bytes(content[:8], "little")
    said = description(content[8 : 8 + length].decode(), rng).encode()
    return len(said).to_bytes(8, "little") + said + content[8 + length :]
