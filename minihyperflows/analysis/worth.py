"""What a single weight is worth, exactly (chapter 06).

The worth of weight i is the loss without it minus the loss with it, everything else as it is:

    v_i = L(w'_i = 0) - L(w'_i = w_i)

for a present weight the damage of removing it, for a removed one the gain of bringing it back.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minihyperflows.flows.gates import gated_layers, is_present
from minihyperflows.nn import Module

LAYERS = ("fc1", "fc2", "fc3")


class Probe:
    """A LeNet-300 on a fixed set of images, in float64, with the loss of every single flip.

    With z = W' a + b a layer's pre-activations, flipping weight (i, j) moves the one column z_i by
    -+ w_ij a_j, (6.7): only what depends on that column is computed again.

    Attributes:
        weight, present, used: by layer, w (out, in), its mask, and w' = w m.
        inputs, z: by layer, a (n, in) and z (n, out).
        loss: mean cross-entropy over the images.
    """

    def __init__(
        self, net: Module, x: np.ndarray, labels: np.ndarray, smoothing: float = 0.0
    ) -> None:
        layers = {name: getattr(net, name) for name in LAYERS}
        self.weight = {k: v.weight.data.astype(np.float64) for k, v in layers.items()}
        gated = gated_layers(net)
        self.present = {
            k: is_present(gated[k].presence.data) if k in gated else np.ones(w.shape, bool)
            for k, w in self.weight.items()
        }
        self.used = {k: w * self.present[k] for k, w in self.weight.items()}
        bias = {k: v.bias.data.astype(np.float64) for k, v in layers.items()}
        a = x.reshape(len(x), -1).astype(np.float64)
        self.inputs, self.z = {}, {}
        for name in LAYERS:
            self.inputs[name] = a
            self.z[name] = a @ self.used[name].T + bias[name]
            a = np.maximum(self.z[name], 0)
        self.q = _targets(labels, self.z["fc3"].shape[1], smoothing)  # (n, classes)
        self.p, losses = _softmax_loss(self.z["fc3"], self.q)
        self.loss = float(losses.mean())
        self._losses = losses

    def gradient(self, name: str, examples: bool = False) -> np.ndarray:
        """g = dL/dw' (out, in) of every weight of a layer, present or removed.

        With ``examples``, the cotangents dL_n/dz (n, out) of the single images instead:
        g = cotangents^T a / n.
        """
        c = self.p - self.q
        for above, here in zip(LAYERS[::-1], LAYERS[-2::-1], strict=False):
            if name == above:
                break
            c = (c @ self.used[above]) * (self.z[here] > 0)
        return c if examples else c.T @ self.inputs[name] / len(c)

    def curvature(self, name: str) -> np.ndarray:
        """d2L/dw'^2 (out, in), the diagonal of the Hessian, (6.9).

        The logits are piecewise linear in w', so it is mean_n a_j^2 J_i^T (diag p - p p^T) J_i with
        J_i = d logits / d z_i.
        """
        n, classes = self.p.shape
        jacobian = np.broadcast_to(np.eye(classes), (n, classes, classes))  # (n, classes, out)
        for above, here in zip(LAYERS[::-1], LAYERS[-2::-1], strict=False):
            if name == above:
                break
            jacobian = (jacobian @ self.used[above]) * (self.z[here] > 0)[:, None, :]
        mean = np.einsum("nc,nco->no", self.p, jacobian)
        variance = np.einsum("nc,nco->no", self.p, jacobian**2) - mean**2
        return variance.T @ self.inputs[name] ** 2 / n

    def second_order(self, name: str) -> np.ndarray:
        """The worth (out, in) of all weights of a layer to second order, (6.4)."""
        w = self.weight[name]
        bend = np.where(self.present[name], 0.5, -0.5) * w**2 * self.curvature(name)
        return bend - w * self.gradient(name)

    def flip(self, name: str, i: int, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flip the weights (i, j_1), (i, j_2), ... of a layer, each by itself.

        Returns the worth of each for every image (n, k), and the gradient g (k,) by it on the other
        side: at 0 for a present weight, at w for a removed one.
        """
        a = self.inputs[name][:, j]  # (n, k)
        sign = np.where(self.present[name][i, j], -1.0, 1.0)
        moved = self.z[name][:, i, None] + sign * self.weight[name][i, j] * a  # (n, k)
        if name == "fc3":
            p, change = self._changed_logit(i, moved)
            cotangent = p - self.q[:, i, None]
        else:
            before = self.z[name][:, i, None]
            cotangent, change = np.zeros_like(moved), np.zeros_like(moved)
            live = np.flatnonzero((moved > 0).any(axis=1) | (before[:, 0] > 0))
            hidden = np.maximum(moved[live], 0) - np.maximum(before[live], 0)
            cotangent[live], change[live] = self._changed_hidden(name, i, live, hidden)
            cotangent *= moved > 0
        return -sign * change, (cotangent * a).mean(axis=0)

    def _changed_logit(self, i: int, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p_i and the change of the loss (n, k) when logit i becomes ``moved``."""
        delta, p = moved - self.z["fc3"][:, i, None], self.p[:, i, None]
        growth = p * np.expm1(delta)  # sum of the exponentials: 1 -> 1 + growth
        return p * np.exp(delta) / (1 + growth), np.log1p(growth) - self.q[:, i, None] * delta

    def _changed_hidden(
        self, name: str, i: int, live: np.ndarray, change: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """dL_n/dh_i and the change of L_n (m, k) when hidden unit i does by ``change`` (m, k), for
        the m images at ``live``."""
        q, last, above = self.q[live, None], self.used["fc3"], self.used["fc2"]
        logits, losses = self.z["fc3"][live, None], self._losses[live, None]
        if name == "fc2":
            p, changed = _softmax_loss(logits + change[..., None] * last[:, i], q)
            return (p - q) @ last[:, i], changed - losses
        z2 = self.z["fc2"][live, None] + change[..., None] * above[:, i]  # (m, k, 100)
        difference = np.maximum(z2, 0) - self.inputs["fc3"][live, None]
        p, changed = _softmax_loss(logits + difference @ last.T, q)
        return ((p - q) @ last * (z2 > 0)) @ above[:, i], changed - losses


def worths(probe: Probe, name: str, places: np.ndarray) -> dict[str, np.ndarray]:
    """Of the weights at ``places`` (flat, ascending) (k,): the worth, the gradient on the other
    side, and the worth over every second image and over the others."""
    rows, columns = np.divmod(places, probe.weight[name].shape[1])
    parts: dict[str, list[np.ndarray]] = {"worth": [], "other": [], "even": [], "odd": []}
    for i, j in _by_row(rows, columns):
        worth, other = probe.flip(name, i, j)
        values = (worth.mean(axis=0), other, worth[::2].mean(axis=0), worth[1::2].mean(axis=0))
        for part, value in zip(parts.values(), values, strict=True):
            part.append(value)
    return {name: np.concatenate(part) for name, part in parts.items()}


def _by_row(rows: np.ndarray, columns: np.ndarray, most: int = 8) -> Iterator[tuple]:
    """Pairs (row, columns in it), at most ``most`` columns at a time."""
    for i in np.unique(rows):
        j = columns[rows == i]
        for start in range(0, len(j), most):
            yield i, j[start : start + most]


def _targets(labels: np.ndarray, classes: int, smoothing: float) -> np.ndarray:
    return (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes


def _softmax_loss(logits: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax and cross-entropy with the targets q over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(axis=-1, keepdims=True)
    losses = np.log(total[..., 0]) - (q * shifted).sum(axis=-1)
    return exponentials / total, losses
