"""What a model is called where others read it: on the card, in a delta's header, in measured figures.

A hub id says all; a path says where somebody keeps it, and who that is. So of a path only the last part stays, and the
hash of its files tells which model it was.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from fastunlearn.models.formats.headers import is_hub_id
from fastunlearn.models.identity import model_digest
from fastunlearn.schema.sections import ModelConfig

HASH_DIGITS = 12


def public_name(model: ModelConfig) -> str:
    """The hub id, "minicanvas", or the last part of the path."""
    return _public(model.pretrained_model_name_or_path)


@cache
def _public(name: str) -> str:
    """Once in a process, as long as its files are there: without them a folder reads like a hub id."""
    if name == "minicanvas" or (is_hub_id(name) and not Path(name).exists()):
        return name
    last = Path(name).resolve().name
    return last if last and last != Path(os.path.expanduser("~")).name else "model"


def public_hash(model: ModelConfig) -> str:
    """The first digits of the hash of its files; "" where they cannot be read."""
    return (model_digest(model) or "")[:HASH_DIGITS]
