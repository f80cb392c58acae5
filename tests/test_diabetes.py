"""The diabetes data, points near a line, whole batches; and the exercise that takes every technique at once."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npnet
from npnet import Linear, ReLU, Sequential
from npnet.checkpoint import checkpoint
from npnet.datasets import DataError, load_diabetes, make_linear
from npnet.initializers import calculate_gain, kaiming_normal, normal, xavier_uniform

FILE = Path(__file__).parents[1] / "data" / "diabetes.csv"
LINES = FILE.read_text(encoding="utf-8").splitlines()


def test_the_data_are_the_files_numbers_and_zeros_stay_zeros() -> None:
    x, y = load_diabetes()
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((768, 8), (768, 1), np.float64, np.float64)
    assert [f"{value:g}" for value in (*x[0], *y[0])] == [f"{float(cell):g}" for cell in LINES[0].split(",")]
    assert [f"{value:g}" for value in (*x[-1], *y[-1])] == [f"{float(cell):g}" for cell in LINES[-1].split(",")]
    assert (x[:, 1:6] == 0).sum(axis=0).tolist() == [5, 35, 227, 374, 11]
    assert (set(y.ravel()), y.sum()) == ({0.0, 1.0}, 268)


@pytest.mark.parametrize("path", [FILE, str(FILE), FILE.parent])
def test_it_is_found_by_its_name_or_that_of_its_folder(path: Any) -> None:
    assert np.array_equal(load_diabetes(path)[0], load_diabetes()[0])


def test_the_folder_that_the_environment_names_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ["9" + line[1:] for line in LINES]
    (tmp_path / "diabetes.csv").write_text("\n".join(other), encoding="utf-8")
    monkeypatch.setenv("NPNET_DATA", str(tmp_path))
    assert {f"{pregnancies:g}"[0] for pregnancies in load_diabetes()[0][:, 0]} == {"9"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_standardized_features_have_mean_0_and_deviation_1(dtype: Any) -> None:
    raw, (x, y) = load_diabetes()[0], load_diabetes(dtype=dtype, standardize=True)
    assert x.dtype == y.dtype == dtype
    np.testing.assert_allclose(x.mean(axis=0, dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(x.std(axis=0, dtype=np.float64), 1, rtol=1e-6)
    np.testing.assert_allclose(x * raw.std(axis=0) + raw.mean(axis=0), raw, rtol=1e-4, atol=1e-3)
    assert np.array_equal(y, load_diabetes()[1])


DAMAGED = {
    "truncated": (LINES[:700], r"expected 768 rows of 8 features and a 0 or 1, got shape \(700, 9\)"),
    "within a row": ([*LINES[:-1], LINES[-1][:9]], "damaged, or not a table of numbers"),
    "a column less": ([line.rsplit(",", 1)[0] for line in LINES], r"got shape \(768, 8\)"),
    "a header": (["a,b,c,d,e,f,g,h,i", *LINES], "damaged, or not a table of numbers"),
    "another target": ([*LINES[:-1], LINES[-1][:-1] + "2"], "a 0 or 1, got"),
    "no number": (["nan" + LINES[0][1:], *LINES[1:]], "expected 768 rows"),
    "bytes": (["\x00\x01"], "damaged, or not a table of numbers"),
}


@pytest.mark.parametrize(("lines", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    file = tmp_path / "other.csv"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=rf"{re.escape(str(file))}: .*{message}"):
        load_diabetes(file)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "diabetes.csv").write_bytes(b"\xff\xfe\x80,1")
    with pytest.raises(DataError, match=r"diabetes\.csv: damaged, or not a table of numbers"):
        load_diabetes(tmp_path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "diabetes.csv").write_text("")
    with pytest.raises(DataError, match=r"diabetes\.csv: "):
        load_diabetes(tmp_path)


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no diabetes file at \S*diabetes\.csv; copy data/diabetes\.csv from"):
        load_diabetes(tmp_path)


# A line.


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-5, 20)])
@pytest.mark.parametrize("noise", [0, 0.1, 2])
def test_points_lie_near_the_line(noise: float, low: float, high: float) -> None:
    x, y = make_linear(20000, noise, low=low, high=high, rng=0)
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((20000, 1), (20000, 1), np.float64, np.float64)
    assert low <= x.min() < low + 0.01 * (high - low)
    assert high > x.max() > high - 0.01 * (high - low)
    assert x.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert (y - 2 * x - 3).std() == pytest.approx(noise, rel=0.02, abs=1e-12)
    assert (y - 2 * x - 3).mean() == pytest.approx(0, abs=0.05 * noise + 1e-12)


def test_the_seed_says_which_points_and_dtype_of_which_kind() -> None:
    first, second, other = make_linear(5, rng=1), make_linear(5, rng=1), make_linear(5, rng=2)
    assert all(map(np.array_equal, first, second))
    assert not np.array_equal(first[0], other[0])
    assert {array.dtype for array in make_linear(5, dtype=np.float32)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("arguments", "name"), [((0,), "n"), ((1.5,), "n"), ((5, -1), "noise"), ((5, "1"), "noise")])
def test_a_line_of_no_points_or_no_noise_is_refused(arguments: Any, name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a"):
        make_linear(*arguments)


def test_second_order_steps_fit_a_line() -> None:
    (x, y), loss = make_linear(100, noise=0.1, rng=0), npnet.MeanSquaredError()
    line, net = (
        Sequential(Linear(1, 1, rng=1, dtype=np.float64)),
        npnet.mlp([1, 16, 1], "tanh", rng=1, dtype=np.float64),
    )
    for _ in range(200):
        npnet.second_order_step(line, loss, x, y, 0.2, 0.005)
    slope, offset = (parameter.value.item() for parameter in line.parameters())
    assert (slope, offset) == (pytest.approx(2, abs=0.1), pytest.approx(3, abs=0.05))
    values = [npnet.second_order_step(net, loss, x, y, 0.05, 0.0002) for _ in range(400)]
    assert values[0] > 1 > 0.015 > values[-1]  # the noise has a variance of 0.01


# Batches.


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (10, 5), (10, 10), (10, 11), (3, 1), (768, 128), (0, 2)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_last_batch_is_dropped_where_it_is_not_full(rows: int, size: int, shuffle: bool) -> None:
    x = np.arange(float(rows)).reshape(-1, 1)
    whole, short = (list(npnet.batches(x, -x, size, 0, shuffle, drop_last=last)) for last in (True, False))
    assert [len(part) for part, _ in whole] == [size] * (rows // size)
    assert len(short) == -(-rows // size)
    for (ours, target), (theirs, _) in zip(whole, short, strict=False):
        assert np.array_equal(ours, theirs)
        assert np.array_equal(ours, -target)


# The exercise.


def network() -> Sequential:
    """8-32-16-1, each layer initialized in its own way, two blocks checkpointed."""
    rng, relu = np.random.default_rng(0), partial(xavier_uniform, gain=calculate_gain("relu"))
    first = Sequential(Linear(8, 32, initializer=relu, rng=rng), ReLU())
    second = Sequential(Linear(32, 16, initializer=kaiming_normal, rng=rng), ReLU())
    last = Linear(16, 1, initializer=partial(normal, std=0.02), rng=rng)
    return npnet.mixed_precision(Sequential(checkpoint(first), checkpoint(second), last))


def test_the_network_of_the_exercise_has_the_weights_that_were_asked_for() -> None:
    first, second, last = (parameter.value for parameter in network().parameters()[::2])
    limit = np.sqrt(2) * np.sqrt(6 / 40)
    assert 0.9 * limit < np.abs(first).max() <= limit
    assert second.std() == pytest.approx(np.sqrt(2 / 32), rel=0.15)
    assert 0.005 < last.std() < 0.04


@pytest.mark.parametrize("init_scale", [2.0**16, 2.0**40])
def test_the_exercise_learns_in_mixed_precision_with_parts_accumulation_and_a_scaler(init_scale: float) -> None:
    data, model = load_diabetes(dtype=np.float32, standardize=True), network()
    loss, scaler, optimizer = npnet.BCEWithLogits(), npnet.GradScaler(init_scale, growth_interval=50), npnet.Adam(0.01)
    start = float(loss(model.predict(data[0]), data[1]))
    history = npnet.fit(
        model, data, loss=loss, optimizer=optimizer, epochs=30, batch_size=128, accumulation_steps=4, scaler=scaler,
        rng=0, log=False,
    )  # fmt: skip
    assert start == pytest.approx(np.log(2), abs=0.05)
    assert [epoch.steps for epoch in history.epochs] == [2] * 30
    assert history.epochs[-1].loss < 0.5 < 0.6 < history.epochs[0].loss
    assert {parameter.value.dtype for parameter in model.parameters()} == {np.dtype(np.float32)}
    assert all(np.isfinite(parameter.value).all() for parameter in model.parameters())
    assert np.isfinite([epoch.loss for epoch in history.epochs]).all()
    assert scaler.skipped_steps == 0
    assert scaler.get_scale() == init_scale * 2
    right = (model.predict(data[0]) > 0) == (data[1] > 0.5)
    assert right.mean() > 0.75
