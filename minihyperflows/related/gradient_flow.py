"""Gradient flow: gradient descent with a step that goes to 0, and what it says about pruning.

The parameters theta follow the negative gradient g of the loss L, and H is its Hessian:

    dtheta/dt = -g                                                                          (15.1)

Then the loss, the norm of the parameters and that of the gradient change at rates that are sums
over the parameters, and the terms of these sums are what pruning scores are made of:

    dL/dt           = -sum g^2                          loss_rate                           (15.2)
    d|theta|^2/dt   = -2 sum theta g                    norm_rate                           (15.3)
    d|g|^2/dt       = -2 sum g (Hg)                     gradient_norm_rate                  (15.4)
    d(theta.g)/dt   = -sum g^2 - sum theta (Hg)         overlap_rate                        (15.5)
    d^2|theta|^2/dt^2 = 2 sum g^2 + 2 sum theta (Hg)    norm_acceleration                   (15.6)

Each function here is one equation. It takes arrays of one shape, vectors of all parameters or the
weights of a layer, and returns the terms; ``.sum()`` gives the network's number, and
:func:`per_group` that of each filter or layer. Lubana & Dick 2021 (arXiv 2009.11839) put the
families of scores in this order; the equations follow from (15.1) by the chain rule.

Two kinds of networks have laws of their own. Batch norm right behind a convolution, in training
mode and with eps = 0, makes L independent of the scale of each filter f. Differentiating that once
along theta_f, and the result once along g, gives

    theta_f.g_f = 0        theta_f.(Hg)_f = -|g_f|^2                                        (15.11)

so that the norm of a filter stands still, and GraSP's score of a filter is minus the square of its
gradient. In a network with ReLU and without biases or batch norm, scaling layer l by a and another
by 1 / a changes nothing, so that

    theta_l.g_l is the same for all layers l,                                               (15.12)

and for the weights into and out of one hidden unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from minihyperflows.related.derivatives import Arrays, Landscape

Vector: TypeAlias = np.ndarray

# -- the flow ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowState:
    """A moment of the flow.

    Attributes:
        time: t.
        weights: theta(t), a vector.
        gradient: g(theta(t)).
        loss_reduction: C, for each parameter p the integral of g_p^2 from 0 to t. By (15.2) the sum
            of any group's is what the group has taken off the loss; that of all, L(0) - L(t).
    """

    time: float
    weights: Vector
    gradient: Vector
    loss_reduction: Vector


def integrate(
    gradient: Callable[[Vector], Vector], start: Vector, time: float, steps: int
) -> Iterator[FlowState]:
    """The flow (15.1) from ``start``: its state at 0 and after each of ``steps`` equal steps.

    By the classical method of Runge and Kutta, of order 4, which costs four gradients a step and
    has an error of about (time / steps)^4; dC/dt = g^2 is integrated with the same points. The time
    may be negative: backwards.

    Where L has a kink with slopes towards it on both sides, as networks with ReLU have many, a flow
    that arrives there stays there, and moves along it. No gradient says so: it jumps between the
    two sides, theta follows their mean, and C sums their squares, which is too much, however small
    the steps (some tenths of a per cent of the loss in small examples).

    Args:
        gradient: g as a function of theta, for example ``Landscape(...).gradient``.
        start: theta(0).
        time: the whole time.
        steps: how many steps.
    """
    dt = time / steps
    weights, reduction = start, np.zeros_like(start)
    g = gradient(weights)
    yield FlowState(0.0, weights, g, reduction)
    for step in range(1, steps + 1):
        g_2 = gradient(weights - dt / 2 * g)
        g_3 = gradient(weights - dt / 2 * g_2)
        g_4 = gradient(weights - dt * g_3)
        weights = weights - dt / 6 * (g + 2 * g_2 + 2 * g_3 + g_4)
        reduction = reduction + dt / 6 * (g**2 + 2 * g_2**2 + 2 * g_3**2 + g_4**2)
        g = gradient(weights)
        yield FlowState(step * dt, weights, g, reduction)


# -- rates along the flow ------------------------------------------------------------------------


def loss_rate(gradient: Vector) -> Vector:
    """dL/dt = -sum g^2 (15.2): every parameter takes its own part off the loss, at no one's cost.

    Second derivative: see :func:`loss_acceleration`.
    """
    return -(gradient**2)


def norm_rate(weights: Vector, gradient: Vector, weight_decay: float = 0.0) -> Vector:
    """d|theta|^2/dt = -2 sum theta g (15.3), with weight decay -2 sum theta g - 2 lambda theta^2.

    ``gradient`` is that of the loss without the decay. The absolute values of the terms are twice
    the scores of loss preservation.
    """
    return -2 * weights * gradient - 2 * weight_decay * weights**2


def gradient_norm_rate(gradient: Vector, curvature: Vector) -> Vector:
    """d|g|^2/dt = -2 sum g (Hg) (15.4); ``curvature`` is Hg."""
    return -2 * gradient * curvature


def loss_acceleration(gradient: Vector, curvature: Vector) -> Vector:
    """d^2L/dt^2 = 2 sum g (Hg), by (15.2) and (15.4)."""
    return 2 * gradient * curvature


def overlap_rate(weights: Vector, gradient: Vector, curvature: Vector) -> Vector:
    """d(theta.g)/dt = -sum g^2 - sum theta (Hg) (15.5)."""
    return -(gradient**2) - weights * curvature


def norm_acceleration(weights: Vector, gradient: Vector, curvature: Vector) -> Vector:
    """d^2|theta|^2/dt^2 = 2 sum g^2 + 2 sum theta (Hg) (15.6): the term GraSP ranks, and |g|^2."""
    return 2 * (gradient**2 + weights * curvature)


def norm_step(weights: Vector, gradient: Vector, lr: float) -> Vector:
    """The change of |theta|^2 by one step of gradient descent, exactly (15.7):

    |theta - lr g|^2 - |theta|^2 = -2 lr sum theta g + lr^2 sum g^2.

    The second term is what a finite step adds to the flow. Behind batch norm, where theta_f.g_f =
    0 for every filter, it is all there is: norms of filters only grow.
    """
    return -2 * lr * weights * gradient + lr**2 * gradient**2


# -- removing a group of parameters --------------------------------------------------------------


def loss_change(weights: Vector, gradient: Vector) -> Vector:
    """What removing each parameter does to the loss, to first order (15.8): -theta g.

    Half of :func:`norm_rate`. It is 0 at a minimum, where only the second order is left
    (:func:`loss_change_to_second_order`).
    """
    return -weights * gradient


def loss_change_to_second_order(landscape: Landscape, weights: Vector, members: Vector) -> float:
    """-theta_p.g_p + 1/2 theta_p.H theta_p for the group p of the parameters where ``members`` is
    True (15.8), up to third order in theta_p."""
    removed = np.where(members, weights, 0)
    g, curvature = landscape.gradient(weights), landscape.hessian_product(removed, weights)
    return float(removed @ curvature / 2 - removed @ g)


def gradient_norm_change(weights: Vector, curvature: Vector) -> Vector:
    """What removing each parameter does to |g|^2, to first order (15.9): -2 theta (Hg).

    Where theta (Hg) is most negative, which is what GraSP removes first, |g|^2 grows the most.
    """
    return -2 * weights * curvature


def without(weights: Vector, members: Vector, fraction: float = 1.0) -> Vector:
    """theta with the group where ``members`` is True removed, or made smaller by ``fraction``."""
    return np.where(members, (1 - fraction) * weights, weights)


# -- distance, homogeneity, temperature ----------------------------------------------------------


def reduction_bound(start: Vector, weights: Vector, time: float) -> Vector:
    """|theta(t) - theta(0)|^2 / t, which no C is below (15.10), for a parameter or any group.

    By the inequality of Cauchy and Schwarz: (integral of g)^2 <= t times the integral of g^2. So a
    parameter that has moved far has taken at least so much off the loss.
    """
    return (weights - start) ** 2 / time


def curvature_ratio(weights: Vector, gradient: Vector, curvature: Vector) -> float:
    """theta.(Hg) / |g|^2, summed over all parameters.

    At a high temperature the loss is linear in the logits. If these are homogeneous in theta of
    degree D, as in a network of D layers with ReLU and without biases, H theta = (D - 1) g, and the
    ratio tends to D - 1 (15.13): almost everything has a positive GraSP score. Behind batch norm in
    training mode it is -1 for the weights of every filter (15.11), if the sums are the filter's.
    """
    return float((weights * curvature).sum() / (gradient**2).sum())


# -- sums over groups ----------------------------------------------------------------------------


def per_group(terms: Mapping[str, np.ndarray], level: str) -> Arrays:
    """The sums of ``terms`` over groups, keyed like them.

    Args:
        terms: arrays by the names of parameters, as ``Landscape.arrays`` gives them.
        level: "weight": as they are; "filter": one for each filter or neuron (C_out,), and for each
            entry of a vector; "layer": one for each array, ().

    Raises:
        ValueError: another level.
    """
    if level == "weight":
        return dict(terms)
    if level == "filter":
        return {name: a.reshape(len(a), -1).sum(axis=1) for name, a in terms.items()}
    if level == "layer":
        return {name: a.sum() for name, a in terms.items()}
    raise ValueError(f"level must be weight, filter or layer, not {level!r}")
