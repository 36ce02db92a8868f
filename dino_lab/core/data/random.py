"""Counter-based randomness: every number is a pure function of what it is for.

There is no state to save, no stream to share between workers and no order to keep: an image gets the same
crops in any batch, process or run, before and after a resume.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

UInt32Array: TypeAlias = npt.NDArray[np.uint32]

NO_CROP = 2**32 - 1
"""The crop of draws that belong to no crop: the order of images."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


def philox(
    counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], key: tuple[int, int]
) -> tuple[UInt32Array, UInt32Array, UInt32Array, UInt32Array]:
    """Philox4x32-10: four random words for each counter of four words, which broadcast against each other.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 3.3.
    """
    # 64-bit words throughout, whose upper half is kept empty: a product needs no widening.
    words = (np.array(word, dtype=np.uint64) for word in counter)
    c0, c1, c2, c3 = np.broadcast_arrays(*words)
    for turn in range(10):
        k0, k1 = (np.uint64((part + turn * weyl) & 0xFFFFFFFF) for part, weyl in zip(key, _WEYL, strict=True))
        product0 = _MULTIPLIERS[0] * c0
        product2 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product2 >> _HIGH) ^ c1 ^ k0,
            product2 & _LOW,
            (product0 >> _HIGH) ^ c3 ^ k1,
            product0 & _LOW,
        )
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def uniform(
    seed: int, epoch: int, images: Int64[np.ndarray, "*N"], crop: npt.ArrayLike, draws: int
) -> Float64[Any, "*N draws"]:
    """Draws in [0, 1), in steps of 2^-32, each a pure function of (seed, epoch, image index, crop, draw).

    `images` and `crop` broadcast against each other. More draws leave the earlier ones as they are.
    """
    blocks = np.arange(-(-draws // 4))
    counter = (blocks, np.asarray(crop)[..., None], images[..., None], epoch)
    words = np.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)), axis=-1)
    return words.reshape(*words.shape[:-2], 4 * len(blocks))[..., :draws] * 2.0**-32


def order(seed: int, epoch: int, n: int) -> Int64[np.ndarray, "n"]:
    """The order of n images in an epoch: a permutation, a pure function of its arguments."""
    high, low, _, _ = philox((0, NO_CROP, np.arange(n), epoch), (seed & 0xFFFFFFFF, seed >> 32))
    return np.argsort(high.astype(np.uint64) << _HIGH | low, kind="stable")
