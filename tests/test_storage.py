"""A model that is saved and loaded is the same: its class, arguments, numbers, outputs, gradients."""

import hashlib
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import npnet
from npnet import Dense, Dropout, Linear, Network, Sequential, mlp
from npnet.layer import Layer, Parameter
from npnet.network_with_checkpointing import NetworkWithCheckpointing
from npnet.storage import KINDS
from tests.saved_models import every, half_of_each, is_same, networks, numbers, one_of_each, sequentials

ROOT = Path(__file__).parents[1]
SUFFIXES = (".npz", ".safetensors")
each_format = pytest.mark.parametrize("suffix", SUFFIXES)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def again(model: Any, folder: Path, suffix: str = ".npz", **options: Any) -> Any:
    """The model, saved and loaded."""
    model.save(folder / f"model{suffix}")
    return npnet.load(folder / f"model{suffix}", **options)


def equal_numbers(a: Any, b: Any) -> bool:
    with warnings.catch_warnings():  # in float16 some of these overflow, in both alike
        warnings.simplefilter("ignore", RuntimeWarning)
        (y, gradients), (y2, gradients2) = numbers(a), numbers(b)
    pairs = zip([y, *gradients], [y2, *gradients2], strict=True)
    return all(np.array_equal(ours, theirs, equal_nan=True) for ours, theirs in pairs)


@each_format
@given(model=sequentials())
@quick
def test_a_model_is_loaded_as_it_was(tmp_path: Path, suffix: str, model: Sequential) -> None:
    loaded = again(model, tmp_path, suffix)
    assert is_same(model, loaded, layout=suffix == ".npz")
    keys = [[layer.key for layer in every(each) if isinstance(layer, Dropout)] for each in (model, loaded)]
    assert keys[0] == keys[1]
    if suffix == ".npz":  # products round by the layout, too
        assert equal_numbers(model, loaded)


@each_format
@given(model=networks())
@quick
def test_a_network_is_loaded_with_its_schedule(tmp_path: Path, suffix: str, model: Network) -> None:
    loaded = again(model, tmp_path, suffix)
    assert is_same(model, loaded)
    assert loaded.dtype == model.dtype
    assert loaded.config() == model.config()
    assert equal_numbers(model, loaded)
    if isinstance(model, NetworkWithCheckpointing):
        assert loaded.schedule == model.schedule
        assert loaded.memory_budget == model.memory_budget
        assert loaded.checkpoint_every_nth_layer == model.checkpoint_every_nth_layer


def test_every_kind_that_a_file_may_name_is_among_these_models() -> None:
    kinds = {type(layer).__name__ for model in (one_of_each(), half_of_each()) for layer in every(model)}
    assert kinds | {"Network", "NetworkWithCheckpointing", "Sequential"} == set(KINDS)


@each_format
@pytest.mark.parametrize("make", [one_of_each, half_of_each])
def test_a_loaded_model_trains_on_as_the_other(tmp_path: Path, suffix: str, make: Any) -> None:
    model = make()
    loaded = again(model, tmp_path, suffix)
    rng = np.random.default_rng(0)
    data = rng.standard_normal((8, 6)).astype(np.float32), rng.standard_normal((8, 3)).astype(np.float32)
    for each in (model, loaded):
        npnet.set_seed(1)
        npnet.fit(
            each, data, loss=npnet.Quadratic(), optimizer=npnet.SGD(0.1), epochs=2, batch_size=4, rng=0, log=False
        )
    assert is_same(model, loaded)


# What PyTorch reads.


def test_pytorch_reads_safetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    model = Sequential(Linear(6, 5, rng=0), npnet.Tanh(), Linear(5, 3, rng=1))
    model.save(tmp_path / "model.safetensors")
    state = safetensors.load_file(tmp_path / "model.safetensors")
    assert list(state) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    for name, parameter in model.named_parameters().items():
        assert np.array_equal(state[name].numpy(), parameter.value)
        assert state[name].dtype == torch.float32
    theirs = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    theirs.load_state_dict(state)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    np.testing.assert_allclose(theirs(torch.from_numpy(x)).detach().numpy(), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pytorch_reads_every_precision_and_every_layout(tmp_path: Path, dtype: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = mlp([6, 5, 3], dtype=dtype, rng=0)
    model.layers[0].weight.value = model.layers[0].weight.value.copy(order="C")
    model.layers[1].weight.value = np.arange(60, dtype=dtype).reshape(6, 10)[::2, ::2].copy()[:, :5].T[:, :3].T
    model.save(tmp_path / "model.safetensors")
    state = safetensors.load_file(tmp_path / "model.safetensors")
    assert all(np.array_equal(state[name].numpy(), each.value) for name, each in model.named_parameters().items())
    assert is_same(model, npnet.load(tmp_path / "model.safetensors"), layout=False)


# Classes of one's own.


class Scale(Layer):
    """y = factor * scale * x: keeps its arguments in attributes of their names."""

    def __init__(self, size: int, factor: float = 1.0, *, dtype: Any = np.float32, rng: Any = None) -> None:
        self.size, self.factor = size, factor
        self.scale = Parameter(np.random.standard_normal(size).astype(dtype))  # from the global stream

    def __repr__(self) -> str:
        return f"Scale({self.size}, {self.factor})"

    def forward(self, x: Any) -> Any:
        return x * self.scale.value * self.factor, x


class Forgetful(Scale):
    def __init__(self, size: int, power: int = 2) -> None:
        super().__init__(size)
        self._power = power


class Told(Forgetful):
    def config(self) -> dict[str, Any]:
        return {"size": self.size, "power": self._power}


class Lab(NetworkWithCheckpointing):
    """As in a notebook: another constructor, another cost."""

    def __init__(self, sizes: Any, n: int = 2) -> None:
        super().__init__(sizes, n)
        self.n = n

    def cost_derivative(self, output_activations: Any, y: Any) -> Any:
        return 2 * (output_activations - y)


class Passed(Network):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def config(self) -> dict[str, Any]:
        return {"sizes": self.sizes, "dtype": self.dtype}


def test_layers_of_ones_own(tmp_path: Path) -> None:
    model = Sequential(Linear(3, 3, rng=0), Scale(3, factor=2.5), Told(3, power=5))
    with pytest.raises(npnet.SaveError, match=r"needs a class Scale that is not npnet's.*classes=\[Scale\]"):
        again(model, tmp_path)
    loaded = again(model, tmp_path, classes=[Scale, Told])
    assert is_same(model, loaded)
    assert (loaded.layers[1].factor, loaded.layers[2]._power) == (2.5, 5)


def test_an_argument_that_is_not_kept_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"Forgetful cannot be saved: keep its argument 'power'.*or give it a method config\(\)"
    ):
        Sequential(Forgetful(3)).save(tmp_path / "model.npz")
    assert not list(tmp_path.iterdir())


def test_an_argument_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    for argument in (print, 1j, float("nan"), {1: 2}, {"a": {2}}, np.dtype(">f4"), np.dtype("longdouble")):
        with pytest.raises(TypeError, match=r"Scale\.factor.* cannot be saved; expected numbers"):
            Sequential(Scale(3, argument)).save(tmp_path / "model.npz")
    kept = {"a": [1, 2.5, None, True, "text"], "dtype of": np.float32}
    assert again(Scale(3, kept), tmp_path, classes=[Scale]).factor == kept | {"dtype of": np.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_networks_of_ones_own(tmp_path: Path, dtype: str) -> None:
    for model in (Lab([3, 4, 2], 1), Passed([3, 4, 2], dtype=dtype, rng=0)):
        with pytest.raises(npnet.SaveError, match=f"needs a class {type(model).__name__} that is not npnet's"):
            again(model, tmp_path)
        loaded = again(model, tmp_path, classes=[Lab, Passed])
        assert is_same(model, loaded)
        assert equal_numbers(model, loaded)


def test_a_class_of_ones_own_with_npnets_name_is_not_taken_for_npnets(tmp_path: Path) -> None:
    own = type("Network", (Network,), {"__module__": "__main__"})
    model = own([3, 2])
    with pytest.raises(npnet.SaveError, match=r"needs a class Network that is not npnet's"):
        again(model, tmp_path)
    assert type(again(model, tmp_path, classes=[own])) is own
    assert type(again(Network([3, 2]), tmp_path, classes=[own])) is Network


# What loading leaves alone.


@each_format
def test_loading_draws_from_nobodys_stream(tmp_path: Path, suffix: str) -> None:
    models = [one_of_each(), Network([3, 4, 2]), Sequential(Scale(3)), Lab([3, 4, 2])]
    for number, model in enumerate(models):
        model.save(tmp_path / f"{number}{suffix}")
    npnet.set_seed(5)
    expected = np.random.standard_normal(3), npnet.random.as_generator().standard_normal(3)
    npnet.set_seed(5)
    for number in range(len(models)):
        npnet.load(tmp_path / f"{number}{suffix}", classes=[Scale, Lab])
    assert np.array_equal(np.random.standard_normal(3), expected[0])
    assert np.array_equal(npnet.random.as_generator().standard_normal(3), expected[1])


@each_format
def test_equal_models_make_equal_files(tmp_path: Path, suffix: str) -> None:
    """In each process: the order of sets and of Rust's maps is another in each."""
    code = (
        "import sys, hashlib, pathlib, tests.saved_models as s\nfile = pathlib.Path(sys.argv[1])\n"
        "for model in (s.one_of_each(), s.half_of_each(), s.Network([3, 4, 2], rng=0)):\n"
        "    model.save(file)\n    print(hashlib.sha256(file.read_bytes()).hexdigest())\n"
    )
    file = tmp_path / f"model{suffix}"
    run = [sys.executable, "-c", code, str(file)]
    printed = [subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(4)]
    assert len(set(printed)) == 1
    Network([3, 4, 2], rng=0).save(file)
    assert printed[0].split()[-1] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_environment_chooses_where_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sequential(Dense(3, 2, rng=0))
    monkeypatch.setenv("NPNET_BACKEND", "numpy")
    assert is_same(model, again(model, tmp_path))
    assert is_same(model, again(model, tmp_path, backend="numpy"))
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        again(model, tmp_path, backend="abacus")
    monkeypatch.setattr(npnet.backend, "_loaders", {"numpy": npnet.backend._load_numpy, "cupy": missing})
    with pytest.raises(npnet.BackendUnavailable):
        again(model, tmp_path, backend="cupy")


def missing() -> Any:
    raise npnet.BackendUnavailable("no GPU")
