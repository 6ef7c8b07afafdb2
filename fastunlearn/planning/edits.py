"""What an edit in closed form holds beside what its method reports, and the average of the weights.

The text encoders are not among the rows: they are on the device only while the prompts are embedded.
"""

from __future__ import annotations

from fastunlearn.config import Config
from fastunlearn.utils.memory_rows import FP32, Row, Sizes


def edit_rows(cfg: Config, sizes: Sizes, prompts: int, tokens: int, width: int) -> list[Row]:
    """On the device what the method says, and one projection at a time; ``prompts`` of ``tokens`` tokens, ``width``
    wide."""
    return [
        Row("U-Net weights (fp32, or as stored)", host=sizes.total * FP32),
        Row("edited keys and values (fp32)", host=sum(sizes.trained) * FP32),
        *(Row(name, size) for name, size in cfg.method_spec.edit_rows(cfg, prompts, tokens, width)),
        Row("the projection at hand", 2 * max(sizes.trained) * 2 * FP32),
    ]


def mean_rows(cfg: Config, sizes: Sizes) -> list[Row]:
    """The average of the weights in fp32, where the method has one, and its cast to bf16 where the model is."""
    if cfg.method_spec.average(cfg) is None:
        return []
    cast = 2 if cfg.bf16_weights else 0
    return [Row("running mean of what is trained (fp32)", sum(sizes.trained) * (FP32 + cast))]
