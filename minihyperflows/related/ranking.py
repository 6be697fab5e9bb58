"""How many to remove in each round, and which: a schedule, and one ranking of the whole network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from minihyperflows.related.pruners import largest

Masks = dict[str, np.ndarray]

# -- how many ------------------------------------------------------------------------------------


def round_fraction(k: int, rounds: int, sparsity: float) -> float:
    """p_k = P / (k P + n (1 - P)): the fraction of what is left that round k of n removes (15.14).

    P is the sparsity in the end. The product of all (1 - p_k) telescopes to 1 - P; see
    :func:`kept_fraction`. Source: the code of Lubana & Dick 2021.
    """
    _check_round(k, rounds, sparsity, first=1)
    return sparsity / (k * sparsity + rounds * (1 - sparsity))


def kept_fraction(k: int, rounds: int, sparsity: float) -> float:
    """R_k = (1 - p_1) ... (1 - p_k) = n (1 - P) / (k P + n (1 - P)), what k rounds leave (15.15).

    1 / R_k grows linearly from 1 to 1 / (1 - P): the first rounds remove the most.
    """
    _check_round(k, rounds, sparsity, first=0)
    return rounds * (1 - sparsity) / (k * sparsity + rounds * (1 - sparsity))


def fractions_between(sparsities: Sequence[float]) -> list[float]:
    """p_k = (t_k - t_(k-1)) / (1 - t_(k-1)): the fractions that lead from one sparsity t to the
    next, from 0."""
    before = [0.0, *sparsities[:-1]]
    if any(not 0 <= a <= b < 1 for a, b in zip(before, sparsities, strict=True)):
        raise ValueError(f"sparsities must rise and stay in [0, 1), not {list(sparsities)}")
    return [(b - a) / (1 - a) for a, b in zip(before, sparsities, strict=True)]


def _check_round(k: int, rounds: int, sparsity: float, first: int) -> None:
    if not first <= k <= rounds:
        raise ValueError(f"there is no round {k} of {rounds}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the fraction removed, in [0, 1), not {sparsity}")


# -- which ---------------------------------------------------------------------------------------


def keep_highest(
    scores: Mapping[str, np.ndarray],
    count: int,
    least: int | Mapping[str, int] = 0,
    present: Mapping[str, np.ndarray] | None = None,
) -> Masks:
    """True at the ``count`` highest scores of all arrays together; in a tie the earlier ones.

    Args:
        scores: arrays of any shapes.
        count: how many to keep in all.
        least: so many of each array stay in any case, its highest: one number, or one by name. With
            0 an array may lose everything.
        present: masks; what is not present cannot be kept, whatever its score. (A removed weight
            has score 0, and would come before one with a negative score.)

    Raises:
        ValueError: a score is NaN; ``least`` or what is present does not leave that choice.
    """
    safe, others = {}, {}  # the highest that stay in any case, and those in competition
    for name, score in scores.items():
        if np.isnan(score).any():
            raise ValueError(f"{name} has a score that is NaN")
        here = np.ones(score.shape, bool) if present is None else present[name]
        safe[name] = _highest(score, here, min(least_of(least, name), int(here.sum())))
        others[name] = here & ~safe[name]
    fixed, free = (int(_joined(masks).sum()) for masks in (safe, others))
    if not fixed <= count <= fixed + free:
        raise ValueError(f"{count} of {fixed + free} cannot be kept, if {fixed} must be")
    chosen = _joined(safe) | _highest(_joined(scores), _joined(others), count - fixed)
    ends = np.cumsum([mask.size for mask in safe.values()])
    parts = np.split(chosen, ends[:-1])
    return {n: part.reshape(scores[n].shape) for n, part in zip(scores, parts, strict=True)}


def least_of(least: int | Mapping[str, int], name: str) -> int:
    """How many of the array ``name`` stay in any case."""
    return least[name] if isinstance(least, Mapping) else least


def _highest(scores: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """True at the ``count`` highest scores of the places where ``among`` is True.

    The others are left out, rather than scored -inf: a score may itself be infinite.
    """
    places = np.flatnonzero(among)
    chosen = np.zeros(scores.size, bool)
    chosen[places[largest(scores.reshape(-1)[places].astype(float), count)]] = True
    return chosen.reshape(scores.shape)


def _joined(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """All arrays one after another, in one dimension."""
    return np.concatenate([array.reshape(-1) for array in arrays.values()])


def keep_within(
    scores: Mapping[str, np.ndarray],
    limit: float,
    cost: Callable[[Masks], float],
    least: int | Mapping[str, int] = 0,
    present: Mapping[str, np.ndarray] | None = None,
) -> Masks:
    """True at the highest scores of all arrays together, at as many as ``limit`` allows.

    :func:`keep_highest` with the largest count whose ``cost(masks)`` is at most ``limit``. For a
    cost that grows with what is kept: multiplications, weights, seconds.

    Args:
        scores, least, present: as for :func:`keep_highest`.
        limit: in the units of ``cost``.
        cost: of a choice.

    Raises:
        ValueError: even the least choice costs more.
    """
    here = {n: s.size if present is None else int(present[n].sum()) for n, s in scores.items()}
    low = sum(min(least_of(least, n), here[n]) for n in scores)
    high = sum(here.values())
    best = keep_highest(scores, low, least, present)
    if cost(best) > limit:
        raise ValueError(f"the least choice costs {cost(best):g}, more than {limit:g}")
    while low < high:  # the largest count is between low, which is cheap enough, and high
        middle = (low + high + 1) // 2
        keep = keep_highest(scores, middle, least, present)
        if cost(keep) <= limit:
            low, best = middle, keep
        else:
            high = middle - 1
    return best


def shuffled(keep: Mapping[str, np.ndarray], rng: np.random.Generator) -> Masks:
    """Masks that keep as many of each array, at random: what was chosen, without the choice.

    The control that separates the ranking within layers from the sizes of the layers.
    """
    return {
        name: rng.permutation(mask.reshape(-1)).reshape(mask.shape) for name, mask in keep.items()
    }
