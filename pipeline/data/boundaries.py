"""Where documents begin inside windows: every document ends in EOD, so one begins after each.

A window that begins inside a document continues it; for the model that rest is a document of its own, since the tokens
before it are not there.
"""

import numpy as np
import numpy.typing as npt


def cumulative_lengths(inputs_bs: npt.NDArray[np.integer], eod_id: int) -> npt.NDArray[np.int32]:
    """`cu_seqlens` of the documents of a batch, its sequences laid one after the other.

    Args:
        inputs_bs: [b, s] input tokens; labels are not part of it.
        eod_id: token that ends every document.

    Returns:
        [documents + 1] int32 from 0 to b * s; a document never goes on in the next sequence.
    """
    s = inputs_bs.shape[1]
    begins = inputs_bs.reshape(-1) == eod_id
    begins[s - 1 :: s] = True  # the last position of a sequence ends its document as well
    return np.concatenate(([0], np.flatnonzero(begins) + 1)).astype(np.int32)
