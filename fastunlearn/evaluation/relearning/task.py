"""What a relearning test is about to do, checked before any weights are loaded.

The run's configuration, the prompts and folders of the test, and every refusal that needs no model. The values of the
options are checked in ``attacks/settings.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastunlearn.config import Config, load_config
from fastunlearn.errors import UserError
from fastunlearn.evaluation.attacks.settings import Settings, check_size
from fastunlearn.evaluation.classifiers.minicanvas import draws_minicanvas
from fastunlearn.evaluation.classifiers.minicanvas_grid import known_concepts
from fastunlearn.evaluation.evaluate import why_not_evaluated
from fastunlearn.evaluation.pictures.grid import Erased
from fastunlearn.evaluation.relearning.prompts import forbidden_prompts, other_prompts
from fastunlearn.models.checks import check_model
from fastunlearn.models.loading import resolve_model
from fastunlearn.prompts.captions import read_captions
from fastunlearn.registry import ATTACKS
from fastunlearn.sampling.pictures import check_pictures
from fastunlearn.utils.run_folder import CONFIG, check_results
from fastunlearn.utils.text import without_style


@dataclass
class Task:
    """What is known before anything is loaded."""

    cfg: Config
    settings: Settings
    folders: dict[str, Path]
    """The run under test and, where asked for, the baseline."""
    minicanvas: bool
    concepts: tuple[Erased, ...] | None
    """In MiniCanvas' words; None for other models and concepts."""
    not_evaluated: str | None
    forbidden: list[str]
    attacking: list[str]
    """Prompts of the attacker's pictures, or their captions."""
    captions: list[tuple[Path, str]] | None

    @property
    def words(self) -> list[str]:
        """The words that textual inversion learns."""
        if self.concepts is not None:
            return [concept.name for concept in self.concepts]
        return [without_style(concept.name) for concept in self.cfg.concepts]


def check(output_dir: str | Path, settings: Settings, baseline: str | Path | None = None) -> Task:
    """Read the configuration of the run and refuse what cannot be attacked; no weights are loaded.

    Raises:
        UserError: the first problem.
    """
    folder = Path(output_dir)
    check_results(folder)
    cfg = load_config(str(folder / CONFIG), [])
    check_model(cfg)
    folders = {"model": folder}
    if baseline is not None:
        _check_baseline(cfg, Path(baseline))
        folders["baseline"] = Path(baseline)
    like_minicanvas = draws_minicanvas(resolve_model(cfg.model.pretrained_model_name_or_path))
    concepts = known_concepts([concept.name for concept in cfg.concepts]) if like_minicanvas else None
    not_evaluated = why_not_evaluated(cfg)
    captions = None
    forbidden = forbidden_prompts(cfg, concepts)
    attacking = forbidden if settings.data == "forbidden" else other_prompts(settings.data, cfg, concepts)
    if settings.images is not None:
        captions = read_captions(Path(settings.images), "--images")
        check_pictures(captions, "--images")
        attacking = [caption for _, caption in captions]
        check_size(len(captions), settings.batch_size)
    task = Task(cfg, settings, folders, like_minicanvas, concepts, not_evaluated, forbidden, attacking, captions)
    if ATTACKS[settings.attack].learns_words:
        _check_words(task)
    return task


def _check_baseline(cfg: Config, folder: Path) -> None:
    try:
        check_results(folder)
    except UserError as error:
        raise UserError(str(error).replace("--model", "--baseline", 1)) from None
    other = load_config(str(folder / CONFIG), [])
    ours, theirs = (
        (run.model.pretrained_model_name_or_path, sorted(concept.name for concept in run.concepts))
        for run in (cfg, other)
    )
    if ours != theirs:
        raise UserError(
            f"--baseline: {str(folder)!r} erased {', '.join(theirs[1])} from {theirs[0]!r}; one that erased "
            f"{', '.join(ours[1])} from {ours[0]!r} is needed"
        )


def _check_words(task: Task) -> None:
    for text in task.attacking:
        if not any(word.lower() in text.lower() for word in task.words):
            raise UserError(
                f"--attack: {task.settings.attack!r} learns the words {', '.join(task.words)}, which the caption "
                f"{text!r} does not hold; use another attack, or captions with them"
            )
