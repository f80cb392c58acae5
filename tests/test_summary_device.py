"""Models as tables; what a GPU is worth, and what is said where there is none."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

import npnet
from npnet import Dense, Dropout, LayerNorm, Linear, Residual, Sequential, device, mlp
from npnet.backend import BackendUnavailable, available_backends
from npnet.checkpoint import checkpoint
from npnet.cli import main
from npnet.device import compare_devices
from npnet.summary import summary

COLUMNS = ["path", "layer", "output", "parameters", "output bytes", "saved bytes"]


def nested():
    inner = Sequential(Linear(6, 6, rng=0), npnet.GELU("tanh"), checkpoint(Dense(6, 6, "tanh", rng=0)))
    return Sequential(Linear(4, 6, rng=0), LayerNorm(6), Residual(inner), Dropout(0.5), Dense(6, 3, rng=0))


def test_every_layer_of_a_nested_model_is_listed_under_its_path():
    table = summary(nested(), 10)
    assert [list(row) for row in table.rows] == [COLUMNS] * len(table.rows)
    assert [tuple(row.values()) for row in table.rows] == [
        ("0", "Linear(4, 6)", "(10, 6)", 30, 240, 0),
        ("1", "LayerNorm(6)", "(10, 6)", 12, 240, 80),
        ("2", "Residual", "(10, 6)", 84, 240, 480),
        ("2.inner", "Sequential", "(10, 6)", 84, 240, 480),
        ("2.inner.0", "Linear(6, 6)", "(10, 6)", 42, 240, 0),
        ("2.inner.1", "GELU('tanh')", "(10, 6)", 0, 240, 0),
        ("2.inner.2", "Checkpoint", "(10, 6)", 42, 240, 0),
        ("2.inner.2.inner", "Dense(6, 6, tanh)", "(10, 6)", 42, 240, 0),
        ("3", "Dropout(0.5)", "(10, 6)", 0, 240, 60),
        ("4", "Dense(6, 3, relu)", "(10, 3)", 21, 120, 0),
    ]
    paths = {name.rsplit(".", 1)[0] for name in nested().named_parameters()}
    assert paths <= {row["path"] for row in table.rows}
    assert str(table).splitlines()[0] == "147 parameters of 588 B; batch size 10"
    assert table.name == "summary"


def test_what_is_saved_is_what_a_forward_pass_keeps():
    model, x = nested(), np.ones((10, 4), np.float32)
    for layer, row in zip(model.layers[:2], summary(model, 10).rows[:2], strict=True):
        y, saved = layer.forward(x)
        kept = {id(array): array.nbytes for array in saved if array is not x and array is not y}
        assert sum(kept.values()) == row["saved bytes"]
        assert y.nbytes == row["output bytes"]
        x = y


def test_evaluation_and_half_precision_show():
    assert [row["saved bytes"] for row in summary(nested().eval(), 10).rows if row["layer"].startswith("Drop")] == [0]
    half = summary(npnet.mixed_precision(mlp([4, 6, 3], rng=0)), 10)
    assert [(row["layer"], row["output bytes"]) for row in half.rows] == [
        ("Dense(4, 6, relu) [float16]", 120),
        ("Dense(6, 3, identity)", 120),
    ]
    assert str(half).startswith("51 parameters of 204 B")


def test_a_network_and_a_chain_without_sizes_have_a_summary_too():
    net = npnet.Network([4, 3, 2], rng=0)
    assert [row["parameters"] for row in summary(net).rows] == [15, 8]
    assert summary(net).rows[0]["output bytes"] == 24  # float64
    table = summary(Sequential(npnet.Tanh(), npnet.GELU()), 2, features=5)
    assert [row["output"] for row in table.rows] == ["(2, 5)", "(2, 5)"]
    assert table.title == "0 parameters of 0 B; batch size 2"


class Silent(npnet.Layer):
    """Says no cost."""


@pytest.mark.parametrize(
    ("network", "options", "error", "message"),
    [
        (Linear(2, 3), {}, TypeError, r"network: expected a Network or a Sequential, got Linear\(2, 3\)"),
        ([Linear(2, 3)], {}, TypeError, "network: expected a Network"),
        (Sequential(npnet.Tanh()), {}, ValueError, "features: no layer tells"),
        (Sequential(Linear(2, 3), Sequential(Linear(4, 5))), {}, ValueError, r"layer 1\.0, Linear.*4 features, got 3"),
        (Sequential(Linear(2, 3), Silent()), {}, NotImplementedError, "does not say what it costs"),
        (nested(), {"batch_size": 0}, ValueError, "batch_size: expected a whole number, at least 1, got 0"),
        (nested(), {"batch_size": 1.5}, TypeError, "batch_size: expected a whole number"),
        (nested(), {"features": 5}, ValueError, "expected rows of 4 features, got 5"),
    ],
)
def test_a_network_that_has_no_summary_is_refused(network, options, error, message):
    with pytest.raises(error, match=message):
        summary(network, **options)


# Devices.

DEVICE_COLUMNS = ["device", "create ms", "multiply ms", "transfer ms", "speed-up", "with transfer"]


def unavailable(name):
    raise BackendUnavailable("backend 'cupy': the reason")


def fake_gpu(slow=()):
    """A module like cupy that works on the host; what it does with ``slow`` functions takes 20 ms longer."""
    calls = []

    def named(name, f):
        def call(*args):
            calls.append(name)
            if name in slow:
                time.sleep(0.02)
            return f(*args)

        return call

    runtime = SimpleNamespace(getDevice=lambda: 3, getDeviceProperties=lambda number: {"name": b"Fake %d" % number})
    stream = SimpleNamespace(null=SimpleNamespace(synchronize=named("wait", lambda: None)))
    random = SimpleNamespace(random=named("random", lambda shape, dtype: np.ones(shape, dtype)))
    xp = SimpleNamespace(
        asarray=named("asarray", np.array), asnumpy=named("asnumpy", np.array), random=random, float32=np.float32
    )
    xp.cuda = SimpleNamespace(Stream=stream, runtime=runtime)
    return SimpleNamespace(xp=xp), calls


def test_without_a_gpu_there_is_a_row_for_the_cpu_and_the_title_says_why(monkeypatch):
    monkeypatch.setattr(device, "get_backend", unavailable)
    table = compare_devices(20, 2)
    assert table.title == "Two random matrices 20 x 20, float32, and their product; no GPU (backend 'cupy': the reason)"
    assert [list(row) for row in table.rows] == [DEVICE_COLUMNS]
    row = table.rows[0]
    assert (row["device"], row["transfer ms"], row["speed-up"], row["with transfer"]) == ("cpu", None, 1.0, None)
    assert 0 < row["create ms"] < 1000 > row["multiply ms"] >= 0
    assert str(table).splitlines()[-1].split()[0] == "cpu"
    assert table.name == "device"


@pytest.mark.parametrize("repeats", [1, 4])
def test_a_gpu_has_a_row_and_is_waited_for_before_and_after_each_run(monkeypatch, repeats):
    backend, calls = fake_gpu(slow=["wait"])
    monkeypatch.setattr(device, "get_backend", lambda name: {"cupy": backend}[name])
    table = compare_devices(30, repeats)
    assert table.title.endswith("product; GPU: Fake 3")
    cpu, gpu = table.rows
    assert (cpu["device"], gpu["device"], list(gpu)) == ("cpu", "gpu", DEVICE_COLUMNS)
    assert min(gpu["create ms"], gpu["multiply ms"], gpu["transfer ms"]) >= 20 > 10 > cpu["multiply ms"]
    assert 0 <= gpu["with transfer"] <= gpu["speed-up"] < 1
    runs = repeats + 1  # one to warm up
    assert calls == ["asarray"] * 2 + ["wait", "random", "wait"] * runs + ["wait", "wait"] * runs + [
        "wait", "asarray", "asarray", "asnumpy", "wait",
    ] * runs  # fmt: skip


def test_times_are_in_milliseconds_medians_and_ratios(monkeypatch):
    backend, _ = fake_gpu()
    monkeypatch.setattr(device, "get_backend", lambda name: backend)
    # start and end of each run: the CPU's two kinds, then the GPU's three; the first of each is warming up
    took = [[9, 1, 5, 2], [9, 4, 8, 6], [9, 1, 1, 1], [9, 2, 2, 3], [9, 1, 1, 1]]
    clock = iter([now for runs in took for seconds in runs for now in (100.0, 100.0 + seconds)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    cpu, gpu = compare_devices(2, 3).rows
    assert list(cpu.values()) == ["cpu", 2000, 6000, None, 1, None]
    assert list(gpu.values()) == ["gpu", 1000, 2000, 1000, 3, 2]


@pytest.mark.skipif("cupy" not in available_backends(), reason="no GPU")
@pytest.mark.gpu
def test_the_gpu_of_this_machine_has_a_row():
    assert [row["device"] for row in compare_devices(100, 1).rows] == ["cpu", "gpu"]


@pytest.mark.parametrize("arguments", [(0,), (5, 0), (1.5,), ("5",), (5, True)])
def test_sizes_and_repeats_are_whole_numbers_from_1(arguments):
    with pytest.raises((TypeError, ValueError), match=r"(size|repeats): expected a whole number, at least 1, got"):
        compare_devices(*arguments)


def test_the_command_prints_the_table(monkeypatch, capsys):
    monkeypatch.setattr(device, "get_backend", unavailable)
    assert main(["device", "--size", "50"]) == 0
    text = capsys.readouterr().out
    assert "Two random matrices 50 x 50, float32" in text
    assert "no GPU (backend 'cupy': the reason)" in text
    assert all(column in text for column in DEVICE_COLUMNS)
    with pytest.raises(SystemExit, match="2"):
        main(["device", "--size", "0"])
    assert "size: expected a whole number, at least 1" in capsys.readouterr().err
