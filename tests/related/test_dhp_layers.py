"""One hypernetwork: its formula, its gradients, its initial weights, its parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import minihyperflows as mh
from minihyperflows import testing
from minihyperflows.nn import Parameter
from minihyperflows.related.dhp import HyperLayer
from minihyperflows.related.dhp.layers import draw_latent

SHAPES = {
    "conv": (4, 3, 2, 3),
    "pointwise": (3, 1, 1, 4),
    "depthwise": (5, 3, 3, 1),
    "linear": (4, 3),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_bias = pytest.mark.parametrize("bias", [True, False])


def hyper_layer(shape: tuple[int, ...], bias: bool = True, embedding: int = 2) -> HyperLayer:
    """In float64, with biases that are not zero."""
    rng = np.random.default_rng(2)
    layer = HyperLayer(shape, embedding, bias, rng=rng, dtype=np.float64)
    for p in layer.parameters():
        p.data[...] = rng.standard_normal(p.shape)
    return layer


def latents(shape: tuple[int, ...]) -> tuple[Parameter, Parameter]:
    rng = np.random.default_rng(3)
    z_in, z_out = (draw_latent(n, rng=rng, dtype=np.float64) for n in (shape[-1], shape[0]))
    return z_in, z_out


def by_hand(layer: HyperLayer, z_in: np.ndarray, z_out: np.ndarray) -> np.ndarray:
    """The three steps for each pair of channels, in loops."""
    weight = np.zeros(layer.shape)
    w1, w2 = layer.w1.data, layer.W2.data
    for o in range(layer.shape[0]):
        for i in range(layer.shape[-1]):
            latent = z_out[o] * z_in[i]
            embedded = w1[:, o, i] * (latent if layer.B0 is None else latent + layer.B0.data[o, i])
            if layer.b1 is not None:
                embedded = embedded + layer.b1.data[:, o, i]
            weight[o, ..., i] = np.einsum("r...,r->...", w2[:, o, ..., i], embedded)
            if layer.b2 is not None:
                weight[o, ..., i] += layer.b2.data[o, ..., i]
    return weight


@every_bias
@every_shape
def test_the_three_steps(shape: tuple[int, ...], bias: bool) -> None:
    layer, (z_in, z_out) = hyper_layer(shape, bias), latents(shape)
    weight = layer.generate(z_in, z_out)
    assert weight.shape == shape
    np.testing.assert_allclose(weight.data, by_hand(layer, z_in.data, z_out.data), rtol=1e-12)


@every_bias
@every_shape
def test_the_collapsed_form_is_the_same_function(shape: tuple[int, ...], bias: bool) -> None:
    """U2: W = slope Z + offset, and the gradients agree as well."""
    layer, (z_in, z_out) = hyper_layer(shape, bias), latents(shape)
    cotangent = np.random.default_rng(4).standard_normal(shape)
    results = []
    for generate in (layer.generate, layer.generate_collapsed):
        tensors = [z_in, z_out, *layer.parameters()]
        weight = generate(z_in, z_out)
        weight.backward(cotangent)
        results.append([weight.data, *(t.grad for t in tensors)])
        for t in tensors:
            t.grad = None
    for simple, collapsed in zip(*results, strict=True):
        np.testing.assert_allclose(collapsed, simple, rtol=1e-12, atol=1e-13)


def with_tensors(layer: HyperLayer, shared: bool) -> Iterator[object]:
    """A function of latents and parameters, for the checker, and the arrays to check it at."""
    names = [name for name in ("w1", "W2", "B0", "b1", "b2") if getattr(layer, name) is not None]

    def f(*tensors: mh.Tensor) -> mh.Tensor:
        count = 1 if shared else 2
        for name, tensor in zip(names, tensors[count:], strict=True):
            vars(layer)[name] = tensor  # a plain tensor in a parameter's place: not by setattr
        return layer.generate(tensors[0], tensors[count - 1])

    z = [t.data for t in latents(layer.shape)][: 1 if shared else 2]
    yield f
    yield from (*z, *(getattr(layer, name).data for name in names))


@every_bias
@every_shape
def test_gradients(shape: tuple[int, ...], bias: bool) -> None:
    """U1: of both latents and of all tensors, by differences and by the complex step."""
    f, *arrays = with_tensors(hyper_layer(shape, bias), shared=False)
    testing.check_grad(f, *arrays, per_element=True)
    testing.check_complex_step(f, *arrays)


def test_a_latent_in_both_roles_gets_the_sum_of_its_gradients() -> None:
    """U1: the layer of a residual stream whose inputs and outputs are one group."""
    shape = (3, 3, 3, 3)
    f, *arrays = with_tensors(hyper_layer(shape), shared=True)
    testing.check_grad(f, *arrays, per_element=True)
    layer, z = hyper_layer(shape), latents(shape)[0]
    apart = [Parameter(z.data.copy()) for _ in range(2)]
    for pair in ([z, z], apart):
        layer.generate(*pair).backward(np.ones(shape))
    np.testing.assert_allclose(z.grad, apart[0].grad + apart[1].grad, rtol=1e-12)


def test_gradients_by_the_formulas() -> None:
    """db2 = G, dW2 = G E, dE = W2 G, db1 = dE, dw1 = dE Z, dZ = <dE, w1> = dB0, and so on."""
    shape = SHAPES["conv"]
    layer, (z_in, z_out) = hyper_layer(shape), latents(shape)
    g = np.random.default_rng(5).standard_normal(shape)
    layer.generate(z_in, z_out).backward(g)
    assert layer.B0 is not None
    assert layer.b1 is not None
    assert layer.b2 is not None
    z = np.outer(z_out.data, z_in.data) + layer.B0.data
    embedded = layer.w1.data * z + layer.b1.data
    d_embedded = np.einsum("rouvi,ouvi->roi", layer.W2.data, g)
    d_z = (d_embedded * layer.w1.data).sum(axis=0)
    for tensor, expected in [
        (layer.b2, g),
        (layer.W2, np.einsum("ouvi,roi->rouvi", g, embedded)),
        (layer.b1, d_embedded),
        (layer.w1, d_embedded * z),
        (layer.B0, d_z),
        (z_in, d_z.T @ z_out.data),
        (z_out, d_z @ z_in.data),
    ]:
        np.testing.assert_allclose(tensor.grad, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 3, 3, 16), (32, 1, 1, 64), (8, 3, 3, 1)])
def test_the_initial_variance_is_one_over_the_fan_in(shape: tuple[int, ...]) -> None:
    """U3: over many draws; a single draw is far off, because one latent scales a whole row."""
    rng = np.random.default_rng(0)
    fan_in = np.prod(shape[1:])
    draws = []
    for _ in range(300):
        layer = HyperLayer(shape, rng=rng, dtype=np.float64)
        z_in, z_out = (draw_latent(n, rng=rng, dtype=np.float64) for n in (shape[-1], shape[0]))
        draws.append(layer.generate(z_in, z_out).data)
    variances = np.var(draws, axis=tuple(range(1, len(shape) + 1))) * fan_in
    assert np.mean(variances) == pytest.approx(1, abs=4 * np.std(variances) / 300**0.5)
    assert np.std(variances) > 0.2
    assert np.mean(np.square(draws) ** 2) / np.var(draws) ** 2 > 6  # a normal's is 3


def test_the_biases_start_at_zero_and_the_latents_are_normal() -> None:
    rng = np.random.default_rng(0)
    layer = HyperLayer((4, 3, 3, 5), rng=rng)
    assert layer.B0 is not None
    assert layer.b1 is not None
    assert layer.b2 is not None
    assert not any(b.data.any() for b in (layer.B0, layer.b1, layer.b2))
    assert all(p.dtype == np.float32 for p in layer.parameters())
    z = draw_latent(10_000, rng=rng).data
    assert z.mean() == pytest.approx(0, abs=0.04)
    assert z.std() == pytest.approx(1, abs=0.03)
    assert np.mean(abs(z) < 1) == pytest.approx(0.683, abs=0.02)


@pytest.mark.parametrize(("shape", "each"), [((8, 3, 3, 6), 98), ((8, 1, 1, 6), 26), ((8, 6), 26)])
def test_numbers_for_each_pair_of_channels(shape: tuple[int, ...], each: int) -> None:
    layer = HyperLayer(shape, rng=np.random.default_rng(0))
    assert sum(p.size for p in layer.parameters()) == each * 48
    free = HyperLayer(shape, bias=False, rng=np.random.default_rng(0))
    kernel = int(np.prod(shape[1:-1]))
    assert sum(p.size for p in free.parameters()) == (each - 1 - 8 - kernel) * 48


@every_bias
@every_shape
def test_slices_of_the_weight_are_slices_of_the_hypernetwork(
    shape: tuple[int, ...], bias: bool
) -> None:
    """U5: cut, then generate; or generate, then cut."""
    layer, (z_in, z_out) = hyper_layer(shape, bias), latents(shape)
    rows, columns = np.arange(shape[0]) % 2 == 0, np.arange(shape[-1]) != 1
    whole = layer.generate(z_in, z_out).data[rows][..., columns]
    for name in ("B0", "w1", "b1", "W2", "b2"):
        if (tensor := getattr(layer, name)) is not None:
            # rows are axis 0, or 1 behind the embedding's
            data = tensor.data.compress(rows, axis=int(name in ("w1", "b1", "W2")))
            tensor.data = data.compress(columns, axis=-1)
    layer.shape = (int(rows.sum()), *shape[1:-1], int(columns.sum()))
    small = layer.generate(mh.Tensor(z_in.data[columns]), mh.Tensor(z_out.data[rows]))
    np.testing.assert_array_equal(small.data, whole)


def test_without_biases_a_zero_latent_makes_a_zero_slice() -> None:
    shape = SHAPES["conv"]
    z_in, z_out = latents(shape)
    z_in.data[1] = z_out.data[2] = 0
    for bias in (False, True):
        weight = hyper_layer(shape, bias).generate(z_in, z_out).data
        assert (abs(weight[2]).max() == 0) is not bias
        assert (abs(weight[..., 1]).max() == 0) is not bias
        assert weight[0, ..., 0].all()
