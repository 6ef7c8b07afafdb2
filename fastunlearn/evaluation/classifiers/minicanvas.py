"""The embedded classifier: MiniCanvas' ten objects and eight styles, on pictures of MiniCanvas models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastunlearn import minicanvas
from fastunlearn.errors import UserError
from fastunlearn.evaluation.classifiers.base import Classifier, Label, LoadedClassifier
from fastunlearn.evaluation.classifiers.minicanvas_grid import build_grid, known_concepts
from fastunlearn.evaluation.pictures.grid import EvaluationGrid
from fastunlearn.minicanvas.vocabulary import OBJECTS, STYLES
from fastunlearn.models.formats.configurations import read_config

if TYPE_CHECKING:
    from torch import Tensor

    from fastunlearn.config import Config
    from fastunlearn.minicanvas.judge import Judge

OBJECT_NAMES = (*OBJECTS, "other")  # the object head has one class for everything else


class MiniCanvasClassifier(Classifier):
    """What the classifier says of itself, and its grid."""

    title = "the embedded classifier"
    limits = "The classifier knows 10 objects and 8 styles; damage outside them goes unseen."

    def why_not(self, cfg: Config) -> str | None:
        """Other concepts, or another architecture."""
        from fastunlearn.models.loading import resolve_model

        names = [concept.name for concept in cfg.concepts]
        if known_concepts(names) is None:
            objects, styles = ", ".join(OBJECTS), ", ".join(STYLES)
            return f"the embedded classifier knows the objects {objects} and the styles {styles} only"
        if not draws_minicanvas(resolve_model(cfg.model.pretrained_model_name_or_path)):
            return "the embedded classifier looks at pictures of MiniCanvas models only"
        try:
            self.grid(cfg)
        except ValueError as error:
            return str(error)
        return None

    def grid(self, cfg: Config, quick: bool = False) -> EvaluationGrid:
        """The grid of a run whose concepts it knows.

        Raises:
            ValueError: nothing is left to compare.
        """
        return build_grid(
            known_concepts([concept.name for concept in cfg.concepts]) or (),
            num_inference_steps=cfg.evaluation.num_inference_steps,
            guidance_scale=cfg.evaluation.guidance_scale,
            seeds=cfg.evaluation.seeds,
            target_seeds=cfg.evaluation.target_seeds,
            retain_seeds=cfg.evaluation.retain_seeds,
            quick=quick,
        )

    def load(self, device: str) -> LoadedClassifier:
        """In fp32."""
        return LoadedMiniCanvas(minicanvas.load_judge(device))


class LoadedMiniCanvas(LoadedClassifier):
    """The network, which MiniCanvas calls its judge, with its weights."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def look(self, images: Tensor) -> list[Label]:
        """The arg-max on each image."""
        objects, styles = self.judge.classify(images)
        pairs = zip(objects.argmax(1).tolist(), styles.argmax(1).tolist(), strict=True)
        return [Label(OBJECT_NAMES[i], STYLES[j]) for i, j in pairs]

    def knows(self, label: Label) -> bool:
        """Both names are of its heads."""
        return label.object in OBJECT_NAMES and label.style in STYLES

    def digest(self) -> bytes:
        """Its weights."""
        state = self.judge.state_dict()
        return b"".join(n.encode() + t.detach().cpu().contiguous().numpy().tobytes() for n, t in state.items())


CLASSIFIER = MiniCanvasClassifier()


def draws_minicanvas(path: str) -> bool:
    """Whether a pipeline has the embedded model's U-Net architecture (itself, a rebuilt one, an edited one)."""
    keys = ("sample_size", "block_out_channels", "cross_attention_dim", "transformer_layers_per_block")
    try:
        theirs, ours = (
            read_config(Path(folder) / "unet" / "config.json") for folder in (path, minicanvas.pipeline_path())
        )
        return all(theirs.get(key) == ours.get(key) for key in keys)
    except UserError:
        return False
