"""What an edit in closed form holds, and the running mean of SDD: the rows of the base methods.

What this is: arithmetic that follows ``concept_edit.py``, ``closed_form.py`` and ``ema.py``.
What this is not: the text encoders, which are on the device only while the prompts are embedded; the pipeline's size on
the host says how large all of it is.
"""

from __future__ import annotations

from fastunlearn.config import Config
from fastunlearn.methods.parts.closed_form import MATRICES
from fastunlearn.planning.states import FP32, Row, Sizes

FP64 = 8


def edit_rows(cfg: Config, sizes: Sizes, prompts: int, tokens: int, width: int) -> list[Row]:
    """UCE and RECE: on the device the tokens of all prompts, the matrices between them, and one projection at a time.

    ``prompts`` of ``tokens`` tokens enter, ``width`` wide.
    """
    rows = prompts * (tokens if cfg.uce.tokens == "all" else tokens // 2 if cfg.uce.tokens == "tail" else 1)
    derived = cfg.rece.rounds if cfg.method == "rece" else 0
    return [
        Row("U-Net weights (fp32, or as stored)", host=sizes.total * FP32),
        Row("edited keys and values (fp32)", host=sum(sizes.trained) * FP32),
        Row("tokens of the prompts (fp64)", (3 + 2 * derived) * rows * width * FP64),
        Row("matrices of the edit (fp64)", MATRICES * width * width * FP64),
        Row("the projection at hand", 2 * max(sizes.trained) * FP64),
    ]


def mean_rows(cfg: Config, sizes: Sizes) -> list[Row]:
    """SDD's running mean in fp32, and its cast to bf16 where the model is."""
    if cfg.method != "sdd":
        return []
    cast = 2 if cfg.bf16_weights else 0
    return [Row("running mean of what is trained (fp32)", sum(sizes.trained) * (FP32 + cast))]
