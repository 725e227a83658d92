"""Derived seeds: one for each purpose and key, so that no two uses share a stream of random numbers."""

from __future__ import annotations

import numpy as np

# What a derived seed is for: the first number of its key.
SAMPLE, ORDER, MIX, STREAM, STREAM_SAMPLE, REPLACEMENT, POISONED, POISON_NOISE, FEATURE_LAYERS = range(9)
SHARE, NOISE, GENERATOR, SHOWN = range(12, 16)  # a share of the images; of MEKD: noise, phase 1, images that are shown


def derive_seed(*key: int) -> int:
    """A 64-bit seed from a key of non-negative integers; any change of the key gives an unrelated seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
