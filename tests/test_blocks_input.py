"""What the layers besides dense ones refuse, and models that hold a layer twice."""

import numpy as np
import pytest

from npnet import Dropout, LayerNorm, Linear, Residual, Sequential, Tanh
from npnet.layer import KindError


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_layer_norm_refuses_another_dtype_by_name(dtype):
    with pytest.raises(
        KindError, match=r"LayerNorm\(3\): the input is .*, the weights are float32 .*convert with x.astype"
    ):
        LayerNorm(3).forward(np.ones((2, 3), dtype))


def test_dropout_refuses_a_gradient_of_another_shape():
    layer = Dropout(0.5, rng=0)
    _, saved = layer.forward(np.ones((5, 3)))
    with pytest.raises(ValueError, match=r"Dropout\(0.5\): the gradient dy must have the output's shape"):
        layer.backward(np.ones((1, 5, 3)), saved)


def test_a_layer_may_stand_twice_in_a_model_and_its_places_are_told():
    shared, tanh = Linear(3, 3, rng=0), Tanh()
    for layers, place in (([shared, tanh, shared], "2"), ([shared, Residual(Sequential(tanh, shared))], "1.inner.1")):
        model = Sequential(*layers)
        assert model.shared_places() == {f"{place}.weight": "0.weight", f"{place}.bias": "0.bias"}
        assert list(model.named_parameters()) == ["0.weight", "0.bias"]
    assert Sequential(shared, tanh, Linear(3, 3, rng=1), tanh).shared_places() == {}
