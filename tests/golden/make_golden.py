"""Write golden.npz: small numbers from PyTorch to compare with where it is not installed.

    python tests/golden/make_golden.py

Needs PyTorch. Everything is float64 and drawn from a NumPy generator, so the file is the same
wherever it is made, up to round-off. Images are stored as (N, H, W, C), convolution weights as
(C_out, kH, kW, C_in / groups): this package's layouts.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as tF

TARGET = Path(__file__).with_name("golden.npz")

# name -> (image, weight, stride, padding, groups)
CONVOLUTIONS = {
    "plain": ((2, 5, 6, 3), (4, 3, 3, 3), 1, 1, 1),
    "strided": ((2, 7, 6, 2), (3, 3, 2, 2), (2, 1), (0, 1), 1),
    "grouped": ((1, 5, 5, 4), (6, 3, 3, 2), 2, 1, 2),
    "depthwise": ((2, 4, 4, 3), (3, 3, 3, 1), 1, 1, 3),
    "pointwise": ((2, 3, 3, 4), (5, 1, 1, 4), 1, 0, 1),
}


def leaf(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).requires_grad_()


def image(array: np.ndarray) -> torch.Tensor:
    """(N, H, W, C) -> (N, C, H, W)."""
    return leaf(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def convolutions(rng: np.random.Generator) -> dict[str, np.ndarray]:
    out = {}
    for name, (shape, weight_shape, stride, padding, groups) in CONVOLUTIONS.items():
        x, w = rng.standard_normal(shape), rng.standard_normal(weight_shape)
        b = rng.standard_normal(weight_shape[0])
        tx, tw, tb = image(x), image(w), leaf(b)
        y = tF.conv2d(tx, tw, tb, stride, padding, groups=groups)
        c = rng.standard_normal(channels_last(y).shape)
        y.backward(torch.from_numpy(c.transpose(0, 3, 1, 2)))
        arrays = {"x": x, "w": w, "b": b, "c": c, "y": channels_last(y)}
        arrays |= {
            "dx": channels_last(tx.grad),
            "dw": channels_last(tw.grad),
            "db": tb.grad.numpy(),
        }
        out |= {f"conv.{name}.{k}": v for k, v in arrays.items()}
    return out


def batch_norm(rng: np.random.Generator) -> dict[str, np.ndarray]:
    x, scale, shift = rng.standard_normal((4, 3, 3, 5)), rng.random(5) + 0.5, rng.standard_normal(5)
    mean, var = rng.standard_normal(5), rng.random(5) + 0.5
    tx, ts, tb = image(x), leaf(scale), leaf(shift)
    new_mean, new_var = torch.from_numpy(mean.copy()), torch.from_numpy(var.copy())
    y = tF.batch_norm(tx, new_mean, new_var, ts, tb, training=True)
    c = rng.standard_normal(x.shape)
    y.backward(torch.from_numpy(c.transpose(0, 3, 1, 2)))
    arrays = {"x": x, "scale": scale, "shift": shift, "mean": mean, "var": var, "c": c}
    arrays |= {"y": channels_last(y), "dx": channels_last(tx.grad), "dscale": ts.grad.numpy()}
    arrays |= {"dshift": tb.grad.numpy(), "new_mean": new_mean.numpy(), "new_var": new_var.numpy()}
    return {f"bn.{k}": v for k, v in arrays.items()}


def pooling(rng: np.random.Generator) -> dict[str, np.ndarray]:
    out = {}
    for name, pool in (("max", tF.max_pool2d), ("avg", tF.avg_pool2d)):
        x = rng.integers(0, 4, (2, 5, 7, 3)).astype(float)  # with ties
        tx = image(x)
        y = pool(tx, 3, 2)
        c = rng.standard_normal(channels_last(y).shape)
        y.backward(torch.from_numpy(c.transpose(0, 3, 1, 2)))
        arrays = {"x": x, "c": c, "y": channels_last(y), "dx": channels_last(tx.grad)}
        out |= {f"{name}_pool.{k}": v for k, v in arrays.items()}
    return out


def cross_entropy(rng: np.random.Generator) -> dict[str, np.ndarray]:
    z, labels = rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
    tz = leaf(z)
    loss = tF.cross_entropy(tz, torch.from_numpy(labels), label_smoothing=0.1)
    loss.backward()
    arrays = {"z": z, "labels": labels, "loss": loss.detach().numpy(), "dz": tz.grad.numpy()}
    return {f"ce.{k}": v for k, v in arrays.items()}


def optimisers(rng: np.random.Generator) -> dict[str, np.ndarray]:
    theta, gradients = rng.standard_normal(7), rng.standard_normal((10, 7))
    out = {"optim.theta": theta, "optim.gradients": gradients}
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    }
    for name, make in makers.items():
        p = leaf(theta)
        optimiser = make([p])
        for gradient in gradients:
            p.grad = torch.from_numpy(gradient.copy())
            optimiser.step()
        out[f"optim.{name}"] = p.detach().numpy()
    return out


def hessian_gradient(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """H g of a residual block, a flattening and a linear layer, with batch norm in training mode.

    By differentiating twice. The names are those of the package's test network.
    """
    arrays = {
        "conv1.weight": rng.standard_normal((4, 3, 3, 2)) / 3,
        "bn1.weight": rng.random(4) + 0.5,
        "bn1.bias": rng.standard_normal(4),
        "conv2.weight": rng.standard_normal((4, 3, 3, 4)) / 4,
        "bn2.weight": rng.random(4) + 0.5,
        "bn2.bias": rng.standard_normal(4),
        "fc.weight": rng.standard_normal((3, 16)) / 4,
        "fc.bias": rng.standard_normal(3),
    }
    x, labels, temperature = rng.standard_normal((6, 4, 4, 2)), rng.integers(0, 3, 6), 2.0
    p = {k: image(v) if v.ndim == 4 else leaf(v) for k, v in arrays.items()}
    y = tF.conv2d(image(x), p["conv1.weight"], padding=1)
    y = torch.relu(tF.batch_norm(y, None, None, p["bn1.weight"], p["bn1.bias"], training=True))
    z = tF.conv2d(y, p["conv2.weight"], padding=1)
    z = tF.batch_norm(z, None, None, p["bn2.weight"], p["bn2.bias"], training=True)
    y = tF.max_pool2d(torch.relu(z + y), 2).permute(0, 2, 3, 1).flatten(1)
    logits = tF.linear(y, p["fc.weight"], p["fc.bias"])
    loss = tF.cross_entropy(logits / temperature, torch.from_numpy(labels))
    gradients = torch.autograd.grad(loss, list(p.values()), create_graph=True)
    inner = sum((g * g.detach()).sum() for g in gradients)
    products = torch.autograd.grad(inner, list(p.values()))
    out = {f"hg.parameter.{k}": v for k, v in arrays.items()}
    for name, product in zip(p, products, strict=True):
        out[f"hg.product.{name}"] = channels_last(product) if product.ndim == 4 else product.numpy()
    return out | {"hg.x": x, "hg.labels": labels, "hg.temperature": np.array(temperature)}


if __name__ == "__main__":
    generator = np.random.default_rng(20250406)
    parts = [convolutions, batch_norm, pooling, cross_entropy, optimisers, hessian_gradient]
    golden = {k: v for part in parts for k, v in part(generator).items()}
    np.savez_compressed(TARGET, torch_version=np.array(torch.__version__), **golden)
    print(f"{TARGET.name}: {len(golden)} arrays, {TARGET.stat().st_size:,} bytes")
