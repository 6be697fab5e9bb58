"""Philox4x32-10: random numbers that are a function of where they are used (Salmon et al. 2011).

The generator has no state: a counter and a key, six 32-bit words in all, are mixed to four random
words by ten rounds of multiplication. So each thread of a GPU computes the numbers of its own
sample, in any order, and they stay the same for any size of batch. ``data/gpu/philox.cuh`` computes
the same on a GPU. NumPy's Philox is the 64-bit sibling and gives other numbers.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # for words 0 and 2 of the counter
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
WORD = 0xFFFFFFFF


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Four random words for each counter: (..., 4) of uint32 -> (..., 4) of uint32.

    A round takes (c0, c1, c2, c3) with the key (k0, k1) to

        (high(M1 c2) ^ c1 ^ k0,  low(M1 c2),  high(M0 c0) ^ c3 ^ k1,  low(M0 c0)),

    where high and low are the halves of a 64-bit product; then the key takes its step.

    Args:
        counter: (..., 4), uint32.
        key: (2,), uint32.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = (int(k) for k in key)
    for _ in range(ROUNDS):
        first, second = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1 = (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0), second & np.uint64(WORD)
        c2, c3 = (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1), first & np.uint64(WORD)
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def below(word: np.ndarray, n: int) -> np.ndarray:
    """Random words as integers 0 to n - 1: the whole part of n word / 2^32.

    The 2^32 words do not divide evenly among n numbers, so some numbers come from one word more
    than the others: for n = 9, four of them from 477,218,589 words and five from 477,218,588. A
    probability is off by less than the fraction n / 2^32 of itself.
    """
    return (word.astype(np.uint64) * np.uint64(n)) >> np.uint64(32)
