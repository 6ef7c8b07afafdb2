"""Erasure methods, one file each: which denoising steps, which loss, which predictions feed the sampler.

What this is: the registry. What this is not: a training loop (``trainer.py``) or defaults (``config.py``).
To add a method: write a file with a class that has ``table`` and ``loss`` as in ``base.py``, and enter it here.
"""

from fastunlearn.config import Config
from fastunlearn.methods.base import Method
from fastunlearn.methods.doco import DoCo
from fastunlearn.methods.esd import ESD
from fastunlearn.methods.kscu import KSCU

METHODS: dict[str, type[Method]] = {"kscu": KSCU, "esd": ESD, "doco": DoCo}


def build_method(cfg: Config) -> Method:
    """The method that the configuration names."""
    return METHODS[cfg.method](cfg)


__all__ = ["METHODS", "Method", "build_method"]
