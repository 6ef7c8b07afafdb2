"""Before and after: draw the grid with the base and with the edited U-Net, let the judge look, return the figures.

What this is: `evaluate_pair` (any two U-Nets) and `evaluate_model` (what a run left in its output folder).
What this is not: the grid (`protocol.py`), the drawing (`generation.py`) or the definitions (`metrics.py`).

What the judge saw in the base model's pictures, which never change, is kept in ``~/.cache/fastunlearn`` (or
``$XDG_CACHE_HOME/fastunlearn``) under a hash of its weights, the judge and the grid. The folder may be deleted at any
time; without it, or where it cannot be written, the pictures are drawn again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastunlearn import minicanvas
from fastunlearn.errors import UserError
from fastunlearn.evaluation.drawing import generate
from fastunlearn.evaluation.grid import EvaluationGrid, build_grid, known_concepts
from fastunlearn.evaluation.scores import Label, score
from fastunlearn.minicanvas.vocabulary import OBJECTS, STYLES
from fastunlearn.models.loading import Pipeline, load_pipeline, resolve_model
from fastunlearn.utils.files import atomic_write_text, cache_folder
from fastunlearn.utils.run_folder import check_results

if TYPE_CHECKING:
    from fastunlearn.config import Config
    from fastunlearn.minicanvas import Judge

OBJECT_NAMES = (*OBJECTS, "other")  # the judge's object head has one class for everything else


def why_not_judged(cfg: Config) -> str | None:
    """None if the embedded judge can evaluate this run, else the reason in a few words."""
    names = [concept.name for concept in cfg.concepts]
    if known_concepts(names) is None:
        return f"the embedded judge knows the objects {', '.join(OBJECTS)} and the styles {', '.join(STYLES)} only"
    if not draws_minicanvas(resolve_model(cfg.model.pretrained_model_name_or_path)):
        return "the embedded judge looks at pictures of MiniCanvas models only"
    try:
        grid_of(cfg)
    except ValueError as error:
        return str(error)
    return None


def evaluate_pair(
    cfg: Config,
    base_path: str | os.PathLike[str],
    unet_dir: str | os.PathLike[str] | None,
    *,
    progress: bool = True,
    quick: bool = False,
) -> dict:
    """Evaluate the base model and, where ``unet_dir`` is given, the base with that U-Net: same prompts, same seeds.

    Returns:
        {"before": figures, "after": figures or None}, each as `metrics.score` gives them, with "protocol" added.

    Raises:
        UserError: the judge does not know the concepts or the model, or a model cannot be loaded.
    """
    reason = why_not_judged(cfg)
    if reason:
        raise UserError(f"evaluation: {reason}; look at samples/before_after.png instead")
    protocol = grid_of(cfg, quick=quick)
    judge = minicanvas.load_judge(_device())

    def draw() -> list[Label]:
        base = load_pipeline(base_path).to(_device())
        return label_samples(base, judge, protocol, cfg, "before" if progress else False)

    seen = remembered(resolve_model(str(base_path)), None, judge, protocol, draw)
    result: dict = {"before": _figures(protocol, seen), "after": None}
    if unet_dir is not None:
        edited = load_pipeline(base_path, unet_path=unet_dir).to(_device())
        seen = label_samples(edited, judge, protocol, cfg, "after" if progress else False)
        result["after"] = _figures(protocol, seen)
    return result


def evaluate_model(
    output_dir: str | os.PathLike[str], *, progress: bool = True, quick: bool = False
) -> tuple[Config, dict]:
    """Evaluate what a run left: its ``config.toml`` and ``unet/``. Returns the config and `evaluate_pair`'s result.

    Raises:
        UserError: the folder is not one that a run finished.
    """
    from fastunlearn.config import load_config

    folder = Path(output_dir)
    check_results(folder)
    cfg = load_config(str(folder / "config.toml"), [])
    base = cfg.model.pretrained_model_name_or_path
    return cfg, evaluate_pair(cfg, base, folder / "unet", progress=progress, quick=quick)


def grid_of(cfg: Config, quick: bool = False) -> EvaluationGrid:
    """The grid of a run whose concepts the judge knows.

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


def label_samples(
    pipe: Pipeline, judge: Judge, protocol: EvaluationGrid, cfg: Config, progress: bool | str
) -> list[Label]:
    """Draw every cell and say what the judge sees, in the order of the cells."""
    images = generate(
        pipe,
        [cell.prompt for cell in protocol.cells],
        [cell.seed for cell in protocol.cells],
        steps=protocol.num_inference_steps,
        guidance=protocol.guidance_scale,
        batch_size=cfg.evaluation.batch_size,
        progress=progress,
    )
    return look(judge, images)


def look(judge: Judge, images: Tensor) -> list[Label]:
    """The judge's arg-max on each image. ``images``: (N, 3, H, W) in [0, 1]."""
    objects, styles = judge.classify(images)
    pairs = zip(objects.argmax(1).tolist(), styles.argmax(1).tolist(), strict=True)
    return [Label(OBJECT_NAMES[i], STYLES[j]) for i, j in pairs]


def _figures(protocol: EvaluationGrid, seen: Sequence[Label]) -> dict:
    figures = score(list(zip(protocol.cells, seen, strict=True)), protocol.concepts)
    return figures | {"protocol": protocol.describe()}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def draws_minicanvas(path: str) -> bool:
    """Whether a pipeline has the embedded model's U-Net architecture (itself, a rebuilt one, an edited one)."""
    keys = ("sample_size", "block_out_channels", "cross_attention_dim", "transformer_layers_per_block")
    try:
        theirs, ours = (
            json.loads((Path(folder) / "unet" / "config.json").read_text(encoding="utf-8"))
            for folder in (path, minicanvas.pipeline_path())
        )
        return all(theirs.get(key) == ours.get(key) for key in keys)
    except (OSError, ValueError):
        return False


def remembered(
    base: str, unet_dir: Path | None, judge: Judge, protocol: EvaluationGrid, draw: Callable[[], list[Label]]
) -> list[Label]:
    """What the judge saw of the base model, or of it with the U-Net in ``unet_dir``: as kept, else as drawn now."""
    file = _cache_file(base, unet_dir, judge, protocol)
    seen = _read_cache(file, len(protocol.cells))
    if seen is None:
        seen = draw()
        _write_cache(file, seen)
    return seen


def _cache_file(base: str, unet_dir: Path | None, judge: Judge, protocol: EvaluationGrid) -> Path:
    """Where the verdicts on a model's pictures are kept: named by everything that they depend on."""
    key = hashlib.sha256(protocol.digest().encode())
    key.update(f"{torch.__version__} {_device()}".encode())
    for file in sorted(Path(base).rglob("*.safetensors")):
        key.update(file.relative_to(base).as_posix().encode())
        key.update(file.read_bytes())
    for file in sorted(unet_dir.glob("*.safetensors")) if unet_dir else ():
        key.update(b"unet" + file.read_bytes())
    for name, tensor in judge.state_dict().items():
        key.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return cache_folder() / f"judged-{key.hexdigest()[:32]}.json"


def _read_cache(file: Path, count: int) -> list[Label] | None:
    """The verdicts kept in ``file``; None where there are none or they are damaged."""
    try:
        pairs = json.loads(file.read_text(encoding="utf-8"))
        seen = [Label(name, style) for name, style in pairs]
    except (OSError, ValueError, TypeError):
        return None
    known = all(verdict.object in OBJECT_NAMES and verdict.style in STYLES for verdict in seen)
    return seen if known and len(seen) == count else None


def _write_cache(file: Path, seen: Sequence[Label]) -> None:
    # Only a shortcut: a home that cannot be written costs time, not the evaluation.
    with suppress(UserError):
        atomic_write_text(file, json.dumps([[verdict.object, verdict.style] for verdict in seen]))
