"""What is drawn to measure an erasure: prompts and seeds, by the part of the question that they answer.

Which they are says the classifier that looks at them; a part's name is what its metrics ask for. Nothing here imports
torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Erased:
    """An erased concept in the classifier's words: ``kind`` is "style" or "object"."""

    name: str
    kind: str


@dataclass(frozen=True)
class EvaluationSample:
    """One image to draw: what is asked, and what an unedited model is expected to show.

    ``concept`` is the erased concept that the prompt asks for, None where it asks for none.
    """

    part: str
    prompt: str
    seed: int
    object: str
    style: str
    concept: Erased | None = None


@dataclass(frozen=True)
class EvaluationGrid:
    """All samples of an evaluation and how they are sampled."""

    name: str
    """With a version: figures of two grids can be compared where it is the same."""
    concepts: tuple[Erased, ...]
    samples: tuple[EvaluationSample, ...]
    num_inference_steps: int
    guidance_scale: float
    quick: bool = False
    parts: tuple[str, ...] = ()
    """Those that are counted also where they are empty, in this order."""
    wording: Mapping[str, Any] = field(default_factory=dict)
    """How its prompts are worded, JSON-ready: ``template``, ``paraphrases``; nothing where there is no rule."""

    def counts(self) -> dict[str, int]:
        """Number of images per part."""
        names = dict.fromkeys((*self.parts, *(sample.part for sample in self.samples)))
        return {part: sum(sample.part == part for sample in self.samples) for part in names}

    def describe(self) -> dict:
        """What a reader needs to repeat or to distrust the figures; JSON-ready."""
        return {
            "name": self.name,
            "concepts": [asdict(concept) for concept in self.concepts],
            **self.wording,
            "images": self.counts(),
            "sampler": "DDIM, eta 0",
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seeds": sorted({sample.seed for sample in self.samples}),
            "quick": self.quick,
        }

    def digest(self) -> str:
        """A hash over everything that decides which pictures are drawn."""
        drawn = [(sample.prompt, sample.seed) for sample in self.samples]
        key = [self.name, drawn, self.num_inference_steps, self.guidance_scale]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()
