"""Parameters that stand in several places: one parameter, the sum of its gradients, one update a step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npnet
from npnet import SGD, Adam, Dense, Linear, MeanSquaredError, Residual, Sequential, SoftmaxCrossEntropy, schedules
from npnet.checkpoint import checkpoint
from npnet.layer import needs_saved
from npnet.step import accumulated_step, lazy_gradient

WIDTH, X = 6, np.random.default_rng(0).standard_normal((12, 6))
Y = np.eye(6)[np.arange(12) % 6]
LOSS = SoftmaxCrossEntropy()


def dense(seed: int, activation: str = "tanh", dtype: Any = np.float64) -> Dense:
    return Dense(WIDTH, WIDTH, activation, dtype=dtype, rng=seed)


def weights_shared(**kw: Any) -> Sequential:
    """Six layers, one weight, six biases: assigned after construction."""
    model = Sequential(*(dense(seed, **kw) for seed in range(6)))
    for layer in model.layers[1:]:
        layer.weight = model.layers[0].weight
    return model


def layer_twice(**kw: Any) -> Sequential:
    """A layer that is put into the list once more, with another between its places."""
    model = Sequential(dense(0, **kw), dense(1, **kw), dense(2, **kw))
    model.layers.insert(2, model.layers[0])
    return model


def in_constructor(**kw: Any) -> Sequential:
    layer = dense(0, **kw)
    return Sequential(layer, dense(1, **kw), layer, layer, dense(2, **kw))


def inside(**kw: Any) -> Sequential:
    """Between a chain's layer, a residual block, a checkpointed part, and within a block."""
    a, b = dense(0, **kw), dense(1, **kw)
    model = Sequential(a, Residual(Sequential(b, a)), checkpoint(Sequential(b, dense(2, **kw), b)), dense(3, **kw))
    model.layers[3].bias = a.bias
    return model


class Listed(npnet.Layer):
    """A layer of one's own that uses one weight twice."""

    def __init__(self, seed: int = 0, dtype: Any = "float64") -> None:
        self.seed, self.dtype = seed, dtype
        self.parts = [dense(seed, dtype=dtype), dense(seed + 1, dtype=dtype)]
        self.parts[1].weight = self.parts[0].weight

    def forward(self, x: Any) -> Any:
        saved = []
        for part in self.parts:
            x, kept = part.forward(x)
            saved.append(kept)
        return x, saved

    def backward(self, dy: Any, saved: Any) -> Any:
        for part, kept in zip(reversed(self.parts), reversed(saved), strict=True):
            dy = part.backward(dy, kept)
        return dy


def own(dtype: Any = "float64") -> Sequential:
    model = Sequential(Listed(0, dtype), dense(5, dtype=dtype), Listed(7, dtype))
    model.layers[2].parts[0].bias = model.layers[1].bias
    return model


MODELS: dict[str, Callable[..., Sequential]] = {
    "weights": weights_shared,
    "layer twice": layer_twice,
    "constructor": in_constructor,
    "inside": inside,
    "own": own,
}
NAMES = ("none", "sqrt", "revolve")


def arrays(model: npnet.Layer) -> list[Any]:
    return [each.value.copy() for each in model.parameters()]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def expected_gradients(model: Sequential) -> dict[str, Any]:
    """By a model that shares nothing: the gradients of all places, added up."""
    places = dict(model.places())
    first = {each: path for path, each in reversed(places.items())}
    apart = Sequential(*(part for part in MODELS_APART(model)))
    for path, each in apart.places():
        each.value = places[path].value.copy()
    _, gradients = npnet.value_and_grad(apart, LOSS, X, Y)
    total: dict[str, Any] = {}
    for path, gradient in gradients.items():
        name = first[places[path]]
        total[name] = total.get(name, 0) + gradient
    return total


def MODELS_APART(model: Sequential) -> list[npnet.Layer]:  # noqa: N802
    """The model's layers with a copy in each place: none shares anything."""

    def apart(layer: npnet.Layer) -> npnet.Layer:
        if isinstance(layer, Dense):
            return dense(9, str(layer.activation))
        if isinstance(layer, Sequential):
            return Sequential(*map(apart, layer.layers))
        if isinstance(layer, Residual):
            return Residual(apart(layer.inner))
        if isinstance(layer, Listed):
            fresh = Listed()
            fresh.parts = [apart(part) for part in layer.parts]
            return fresh
        return checkpoint(apart(layer.inner))  # type: ignore[attr-defined]

    return [apart(layer) for layer in model.layers]


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_parameters_gradient_is_the_sum_over_its_places(name: str) -> None:
    model = MODELS[name]()
    expected = expected_gradients(model)
    for schedule in NAMES:
        _, found = npnet.value_and_grad(model, LOSS, X, Y, schedule=schedule)
        assert list(found) == list(expected)
        for path in found:
            np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [lambda: SGD(0.1, 0.9, 1e-3), lambda: Adam(0.01)], ids=["momentum", "Adam"])
def test_training_ends_with_the_same_bits_under_every_schedule(name: str, make: Callable[[], Any]) -> None:
    found = []
    for options in ({}, {"streaming": False}, {"clip_norm": 1e6}, {"accumulation_steps": 1}):
        for schedule in NAMES:
            model = MODELS[name]()
            npnet.fit(
                model, (X, Y), loss=LOSS, optimizer=make(), epochs=3, batch_size=4, rng=0, schedule=schedule, log=False,
                **options,
            )  # fmt: skip
            found.append(arrays(model))
    assert all(same(each, found[0]) for each in found)
    assert not same(found[0], arrays(MODELS[name]()))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "own"])
@pytest.mark.parametrize("schedule", NAMES)
def test_a_captured_step_gives_the_same_bits(name: str, schedule: str) -> None:
    models = [MODELS[name](), MODELS[name]()]
    for model, capture in zip(models, (False, True), strict=True):
        npnet.fit(
            model, (X, Y), loss=LOSS, optimizer=Adam(0.01), epochs=3, batch_size=4, rng=0, schedule=schedule,
            capture=capture, log=False,
        )  # fmt: skip
    assert same(*map(arrays, models))


@pytest.mark.parametrize("name", MODELS)
def test_accumulation_and_mixed_precision_do_not_depend_on_the_schedule(name: str) -> None:
    x, y, found = X.astype("f4"), Y.astype("f4"), []
    for schedule in NAMES:
        model = npnet.mixed_precision(MODELS[name](dtype="float32"))
        npnet.fit(
            model, (x, y), loss=LOSS, optimizer=Adam(0.01), epochs=3, batch_size=4, rng=0, schedule=schedule, log=False,
            accumulation_steps=2, scaler=npnet.GradScaler(),
        )  # fmt: skip
        found.append(arrays(model))
    assert all(same(each, found[0]) for each in found)
    assert len(found[0]) == len(MODELS[name]().parameters())


def test_a_step_without_the_engine_gives_the_same_gradients() -> None:
    model = inside()
    value, expected = npnet.value_and_grad(model, MeanSquaredError(), X, Y)
    y, saved = model.forward(X)
    loss, dy = MeanSquaredError().value_and_gradient(y, Y)
    model.backward(dy, saved)
    assert float(loss) == value
    assert all(np.array_equal(each.gradient, expected[path]) for path, each in model.named_parameters().items())


def test_two_halves_that_share_a_weight_update_it_once() -> None:
    whole, halves = weights_shared(), weights_shared()
    npnet.train_step(whole, LOSS, SGD(0.1), "none", X, Y)
    optimizer, calls = SGD(0.1), []

    def update(layer: npnet.Layer) -> None:
        calls.append(layer)
        optimizer.step(layer.parameters())

    lazy_gradient(Sequential(*halves.layers[:3]), Sequential(*halves.layers[3:]), LOSS, X, Y, after_backward=update)
    assert same(arrays(whole), arrays(halves))
    assert len(calls) == len({id(layer) for layer in calls}) == 6


def test_the_hook_is_called_with_a_layer_once_and_when_its_gradients_are_complete() -> None:
    model, seen = in_constructor(), []
    npnet.add_gradients(model, LOSS, X, Y, schedule="sqrt", after_backward=lambda layer: seen.append(layer))
    layers = model.layers
    assert [layers.index(layer) for layer in seen] == [4, 1, 0]


def test_updating_at_each_place_would_be_seen() -> None:
    """Negative control: the update that a layer's own backward pass would trigger gives other weights."""
    model, expected, optimizer = weights_shared(), weights_shared(), SGD(0.1)
    npnet.train_step(expected, LOSS, SGD(0.1), "none", X, Y)
    y, saved = model.forward(X)
    _, gradient = LOSS.value_and_gradient(y, Y)
    for layer, kept in zip(reversed(model.layers), reversed(saved), strict=True):
        gradient = layer.backward_(gradient, kept)
        optimizer.step(layer.parameters())
    assert not same(arrays(model), arrays(expected))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_tie_survives_saving_and_loading(name: str, ending: str, tmp_path: Any) -> None:
    model, path = MODELS[name](), tmp_path / f"m.{ending}"
    model.save(path)
    loaded = npnet.load(path, classes=[Listed])
    assert loaded.shared_places() == model.shared_places() != {}
    assert same(arrays(loaded), arrays(model))
    for each in (model, loaded):
        npnet.train_step(each, LOSS, SGD(0.1), "sqrt", X, Y)
    assert same(arrays(loaded), arrays(model))


def test_a_training_with_ties_is_resumed_and_one_without_is_another(tmp_path: Any) -> None:
    def run(make: Callable[[], Sequential], epochs: int, path: str) -> list[Any]:
        model = make()
        npnet.fit(
            model, (X, Y), loss=LOSS, optimizer=Adam(0.01), epochs=epochs, batch_size=4, rng=0, log=False,
            saver=npnet.Saver(tmp_path / path, resume=True),
        )  # fmt: skip
        return arrays(model)

    run(weights_shared, 1, "a.npz")
    assert same(run(weights_shared, 3, "a.npz"), run(weights_shared, 3, "b.npz"))
    untied = lambda: Sequential(*(dense(seed) for seed in range(6)))  # noqa: E731
    with pytest.raises(ValueError, match=r"another training: shared is \{'1.weight': '0.weight'"):
        run(untied, 3, "a.npz")


@pytest.mark.parametrize(
    "shared",
    [{"1.weight": "9.weight"}, {"9.weight": "0.weight"}, {"1.weight": "1.bias"}, ["1.weight"], {"1.weight": 3}],
)
def test_a_file_whose_ties_make_no_sense_is_refused(shared: Any, tmp_path: Any) -> None:
    from npnet.archive import write_archive

    model = Sequential(dense(0), dense(1))
    arrays = {name: each.value for name, each in model.named_parameters().items() if name != "1.weight"}
    write_archive(tmp_path / "m.npz", {"model": model.description(), "shared": shared}, arrays)
    with pytest.raises(npnet.SaveError):
        npnet.load(tmp_path / "m.npz")


def test_a_state_names_every_place_and_takes_one_or_all() -> None:
    model, other = weights_shared(), weights_shared()
    npnet.train_step(other, LOSS, SGD(0.1), "none", X, Y)
    state = other.state_dict()
    assert [name for name in state if name.endswith("weight")] == [f"{number}.weight" for number in range(6)]
    model.load_state_dict(state)
    assert same(arrays(model), arrays(other))
    fewer = {name: array for name, array in state.items() if name == "3.weight" or name.endswith("bias")}
    model = weights_shared()
    model.load_state_dict(fewer)
    assert same(arrays(model), arrays(other))
    with pytest.raises(ValueError, match=r"4\.weight is a shared parameter, and another path gives other numbers"):
        model.load_state_dict(state | {"4.weight": state["4.weight"] + 1})
    assert same(arrays(model), arrays(other))
    with pytest.raises(ValueError, match=r"lacks 0\.weight$"):
        model.load_state_dict({name: array for name, array in fewer.items() if name != "3.weight"})


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("schedule", ["none", "sqrt", "revolve"])
@pytest.mark.parametrize("tied", ["weight", "block", "ends"])
def test_a_plan_counts_a_shared_parameter_once_and_its_gradient_from_first_to_last(
    tied: str, schedule: str, streaming: bool
) -> None:
    width, batch = 256, 64

    def made() -> Sequential:
        layers = [Dense(width, width, "sigmoid", rng=seed) for seed in range(8)]
        if tied == "block":
            return Sequential(*layers[:2], *[Sequential(layers[2], layers[3])] * 3, *layers[4:])
        for layer in layers[1:7] if tied == "weight" else layers[7:]:
            layer.weight = layers[0].weight
        return Sequential(*layers)

    model, optimizer = made(), SGD(0.1)
    x, y = np.ones((batch, width), np.float32), np.zeros((batch, width), np.float32)
    args = {"loss": MeanSquaredError(), "optimizer": optimizer, "streaming": streaming}
    plan = npnet.plan(model, batch, strategy=schedule, **args)
    assert plan.chain.parameters == sum(each.value.nbytes for each in model.parameters())
    step = lambda: accumulated_step(  # noqa: E731
        model, args["loss"], optimizer, plan.schedule, [(x, y)], batch, streaming=streaming
    )
    step()
    measured = npnet.measure_peak(step).increase_bytes + plan.chain.parameters
    if tied == "block":  # its layers' gradients are taken to stay until the block's backward pass is done
        assert 0.99 * measured <= plan.peak_bytes <= measured + 2 * width * width * 4
    else:
        assert measured == pytest.approx(plan.peak_bytes, rel=0.01)


def test_a_plan_that_ignored_the_ties_would_be_wrong() -> None:
    """Negative control: without them, gradients are thought to be freed early."""
    model = Sequential(*(Dense(256, 256, rng=seed) for seed in range(8)))
    free = npnet.plan(model, 16, loss=MeanSquaredError())
    for layer in model.layers[1:]:
        layer.weight = model.layers[0].weight
    assert npnet.plan(model, 16, loss=MeanSquaredError()).peak_bytes - free.peak_bytes < -6 * 256 * 256 * 4
    waiting = npnet.plan(model, 16, loss=MeanSquaredError()).chain.waiting
    assert waiting is not None
    assert max(waiting) >= 256 * 256 * 4


def test_a_budget_is_kept_with_shared_parameters() -> None:
    model = weights_shared()
    for share in (0.6, 0.8, 1.0):
        budget = int(share * npnet.plan(model, 500).peak_bytes)
        plan = npnet.plan(model, 500, memory_budget=budget)
        assert plan.peak_bytes <= budget


def test_a_summary_counts_a_shared_parameter_once() -> None:
    assert str(npnet.summary(weights_shared())).startswith("72 parameters")  # 36 + 6 x 6


def test_the_product_with_the_hessian_is_the_central_difference() -> None:
    model, rng = inside(), np.random.default_rng(1)
    vector = {name: rng.standard_normal(each.value.shape) for name, each in model.named_parameters().items()}
    found = npnet.hessian_vector_product(model, LOSS, X, Y, vector).product
    ends = []
    for sign in (1, -1):
        moved = inside()
        for name, each in moved.named_parameters().items():
            each.value = each.value + sign * 1e-5 * vector[name]
        ends.append(npnet.value_and_grad(moved, LOSS, X, Y)[1])
    for name, product in found.items():
        np.testing.assert_allclose(product, (ends[0][name] - ends[1][name]) / 2e-5, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.data())
def test_any_arrangement_gives_the_sum_under_any_schedule(order: list[int], data: st.DataObject) -> None:
    layers = [dense(seed) for seed in range(4)]
    model = Sequential(*(layers[number] for number in order))
    depth = len(order)
    chosen = data.draw(st.sets(st.integers(1, depth)))
    schedule = schedules.selective(depth, chosen, needs_saved(model.layers))
    _, found = npnet.value_and_grad(model, LOSS, X, Y, schedule=schedule)
    expected = expected_gradients(model)
    assert found.keys() == expected.keys()
    assert all(np.allclose(found[path], expected[path], rtol=0, atol=1e-12) for path in found)
    updated, steps = arrays(model), []
    npnet.add_gradients(model, LOSS, X, Y, schedule=schedule, after_backward=steps.append)
    assert len(steps) == len(set(order))
    assert same(updated, arrays(model))


@pytest.mark.parametrize("name", ["weights", "layer twice", "constructor"])
def test_torch_with_tied_weights_trains_the_same(name: str) -> None:
    torch = pytest.importorskip("torch")
    model = MODELS[name]()
    twins: dict[int, Any] = {}
    leaves: dict[int, Any] = {}

    def leaf(parameter: npnet.Parameter) -> Any:
        return leaves.setdefault(id(parameter), torch.nn.Parameter(torch.tensor(parameter.value.copy())))

    for layer in model.layers:
        twin = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        twin.weight, twin.bias = leaf(layer.weight), leaf(layer.bias)
        twins.setdefault(id(layer), twin)
    chain = torch.nn.Sequential(*(each for layer in model.layers for each in (twins[id(layer)], torch.nn.Tanh())))
    optimizer, ours = torch.optim.Adam(chain.parameters(), 0.01), Adam(0.01)
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(chain(torch.tensor(X)), torch.tensor(Y))
        loss.backward()
        optimizer.step()
        assert npnet.train_step(model, LOSS, ours, "sqrt", X, Y) == pytest.approx(loss.item(), abs=1e-10)
    for parameter in model.parameters():
        np.testing.assert_allclose(parameter.value, leaves[id(parameter)].detach().numpy(), rtol=0, atol=1e-10)


def test_an_output_layer_tied_to_the_first() -> None:
    """The tie of embedding and output, as far as shapes allow: first and last layer."""
    model = Sequential(Linear(WIDTH, WIDTH, dtype=np.float64, rng=0), dense(1), Linear(WIDTH, WIDTH, dtype=np.float64))
    model.layers[2].weight = model.layers[0].weight
    found = []
    for schedule in NAMES:
        _, gradients = npnet.value_and_grad(model, LOSS, X, Y, schedule=schedule)
        found.append(list(gradients.values()))
    assert all(same(each, found[0]) for each in found)
