"""Random numbers as a function of (seed, what for, where), never of history.

A counter-based generator: the mixing function of splitmix64 (Steele, Lea, Flood 2014, "Fast Splittable
Pseudorandom Number Generators", OOPSLA) applied to the key, one part after the other. Any number can be
computed alone, in any order, by any process; so resuming, another world size and loader workers
change nothing.
"""

import numpy as np

Key = int | np.ndarray

# What a number is for: two purposes never share their numbers.
ORDER, MASK_SELECTION, MASK_DECISION, MASK_REPLACEMENT, SPAN_LENGTH, DROPOUT = range(1, 7)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def random_bits(*key: Key) -> np.ndarray:
    """64 random bits for each element of the broadcast key parts (integers >= 0); uint64."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(state + _GOLDEN + np.asarray(part).astype(np.uint64))
    return np.asarray(state)


def uniform(*key: Key) -> np.ndarray:
    """A number in [0, 1) for each element of the broadcast key parts; float64, 53 random bits."""
    return (random_bits(*key) >> np.uint64(11)) * 2.0**-53


def permute(index: np.ndarray, size: Key, *key: Key) -> np.ndarray:
    """Where a random permutation of `range(size)` puts `index`; int64, elementwise, without storing it.

    A Feistel network over the next power of four, walked until the value falls inside the range
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 3): memory and time do not
    grow with `size`. `size` and the key parts broadcast against `index`.
    """
    size = np.broadcast_to(np.asarray(size, np.int64), index.shape)
    half_bits = np.maximum(1, (_bit_length(size - 1) + 1) // 2).astype(np.uint64)
    round_keys = [np.broadcast_to(random_bits(*key, i), index.shape) for i in range(_ROUNDS)]
    value = index.astype(np.uint64)
    outside = np.ones(index.shape, bool)
    while outside.any():
        keys = [k[outside] for k in round_keys]
        value[outside] = _feistel(value[outside], half_bits[outside], keys)
        outside = value >= size.astype(np.uint64)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half_bits: np.ndarray, round_keys: list[np.ndarray]) -> np.ndarray:
    low_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & low_mask
    for key in round_keys:
        with np.errstate(over="ignore"):
            left, right = right, left ^ (_mix(right + key) & low_mask)
    return (left << half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bit_length(x: np.ndarray) -> np.ndarray:
    # frexp is exact for integers below 2**53, and no corpus has more blocks.
    return np.frexp(x.astype(np.float64))[1]
