"""Random numbers per window, the same whoever computes the window.

    one rank         draw(B)                                     rows 0 ... B-1
    rank r of N      draw(total)[first : first + B]              its own rows of the same numbers

Every rank draws for the whole batch from a generator in the same state and keeps its rows, so N ranks learn what one
would learn from the same batch, and their generators stay in step. The numbers are small beside the images.
"""

from collections.abc import Callable

from torch import Tensor

from sop.core.experience import Share


def draw_rows(count: int, share: Share | None, draw: Callable[[int], Tensor]) -> Tensor:
    """Random numbers for the `count` windows of a batch, [count, ...].

    Args:
        count: B.
        share: `Batch.share`; None when the batch is whole.
        draw: gives numbers for so many windows, the first dimension; it is asked once.
    """
    return draw(count) if share is None else draw(share.total)[share.first : share.first + count]
