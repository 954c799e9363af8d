"""The advantage indicator as the policy reads it: which row of its tables, which words in its sentence.

    Batch.advantage_indicator / Conditioning    row of the tables    text instead of the instruction
    +1, True                                    2  POSITIVE          template with "positive"
    -1, False                                   1  NEGATIVE          template with "negative"
     0, None, dropped                           0  NULL              the instruction alone

The indicator is dropped in a share of the windows so that one network holds both branches of classifier-free
guidance (pi*0.6, arXiv 2511.14759, equation 3 and section V; Ho and Salimans 2022).
"""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sop.core.experience import Share
from sop.core.policy import Conditioning
from sop.policies.draws import draw_rows

NULL, NEGATIVE, POSITIVE = 0, 1, 2
NUM_ROWS = 3
PLACEHOLDERS = ("{instruction}", "{advantage}")

_WORDS = {NEGATIVE: "negative", POSITIVE: "positive"}
_PLACEHOLDER = re.compile(r"\{(instruction|advantage)\}")


def zero_table(width: int) -> nn.Embedding:
    """A trainable table [3, width] of zeros; takes no random number."""
    table: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
        torch.zeros(NUM_ROWS, width), freeze=False
    )
    return table


def conditioning_row(conditioning: Conditioning) -> int:
    """The row that is asked for; NULL without an indicator and at guidance 0, where the other branch has no part."""
    if conditioning.advantage_indicator is None or conditioning.guidance == 0:
        return NULL
    return POSITIVE if conditioning.advantage_indicator else NEGATIVE


def indicator_rows(indicator: npt.NDArray[np.int8], count: int) -> Tensor:
    """Rows of `Batch.advantage_indicator`, int64 [B].

    Raises:
        ValueError: not one value of -1, 0, 1 per window.
    """
    if indicator.shape != (count,):
        raise ValueError(f"advantage_indicator: must hold one value per window ({count}), got {indicator.shape}")
    if not np.isin(indicator, (-1, 0, 1)).all():
        raise ValueError(f"advantage_indicator: must be -1, 0 or 1, got {np.unique(indicator).tolist()}")
    return torch.from_numpy(np.where(indicator > 0, POSITIVE, np.where(indicator < 0, NEGATIVE, NULL)))


def drop_out(rows: Tensor, probability: float, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """Rows [B] with each one set to NULL with this probability. One uniform draw per window, also at probability 0.

    `share` is the batch's.
    """
    uniform = draw_rows(
        len(rows), share, lambda count: torch.rand(count, generator=generator, device=generator.device)
    ).to(rows.device)
    return rows.masked_fill(uniform < probability, NULL)


def sentences(template: str, instructions: Sequence[str], rows: Sequence[int]) -> list[str]:
    """What a policy that reads the indicator as text is told: N sentences for N instructions and rows.

    Nothing in the template but its placeholders is interpreted, and nothing in an instruction.
    """
    return [_sentence(template, instruction, row) for instruction, row in zip(instructions, rows, strict=True)]


def _sentence(template: str, instruction: str, row: int) -> str:
    if row == NULL:
        return instruction
    values = {"instruction": instruction, "advantage": _WORDS[row]}
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)
