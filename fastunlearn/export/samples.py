"""The before/after picture: which prompts it shows, drawing them with both U-Nets, and the sheet itself.

samples/before_after.png, for eyes. Rows are prompts, columns seeds; each pair starts from the same noise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fastunlearn.evaluation.classifiers.minicanvas_grid import known_concepts
from fastunlearn.evaluation.pictures.drawing import generate
from fastunlearn.evaluation.pictures.grid import Erased
from fastunlearn.minicanvas.vocabulary import EVALUATION_TEMPLATE, OBJECTS, STYLES
from fastunlearn.minicanvas.words import article
from fastunlearn.models.loading import Pipeline
from fastunlearn.utils.files import atomic_file
from fastunlearn.utils.text import names_style

if TYPE_CHECKING:
    from fastunlearn.config import Config

GROUPS = {"erased": "erased", "neighbouring": "neighbouring, to be kept", "unrelated": "unrelated, to be kept"}
DEFAULT_UNRELATED = "a photograph of a mountain lake"
SHOWN_OF_EACH = 4


@dataclass(frozen=True)
class ValidationRow:
    """One row of the before/after picture: ``group`` is a key of `GROUPS`."""

    group: str
    prompt: str


@dataclass(frozen=True)
class SampleRow:
    """A row that has been drawn: ``before`` and ``after`` are (N, 3, H, W) in [0, 1], one image per seed."""

    group: str
    label: str
    before: Tensor
    after: Tensor


def choose_validation_rows(cfg: Config) -> list[ValidationRow]:
    """Prompts that show what went, what stands next to it and what has nothing to do with it.

    On MiniCanvas from its grid; otherwise from the concepts, the keep list and ``report.validation_prompts``. The
    user's prompts come last in their group in either case.
    """
    concepts = known_concepts([concept.name for concept in cfg.concepts]) if cfg.uses_minicanvas else None
    if concepts:
        rows = _minicanvas_rows(concepts)
    else:
        rows = [ValidationRow("erased", concept.name) for concept in cfg.concepts]
        rows += [ValidationRow("neighbouring", name) for name in _shown(cfg.keep)]
        if not cfg.report.validation_prompts:
            rows.append(ValidationRow("unrelated", DEFAULT_UNRELATED))
    words = [concept.name.lower() for concept in cfg.concepts]
    for prompt in cfg.report.validation_prompts:
        group = "erased" if any(word in prompt.lower() for word in words) else "unrelated"
        rows.append(ValidationRow(group, prompt))
    order = list(GROUPS)
    return sorted(dict.fromkeys(rows), key=lambda row: order.index(row.group))


def _shown(keep: Sequence[str]) -> list[str]:
    """All that is kept; of a long list, which a run may have chosen itself, some things and some styles."""
    if len(keep) <= 2 * SHOWN_OF_EACH:
        return list(keep)
    styles = [name for name in keep if names_style(name)]
    things = [name for name in keep if name not in styles]
    return [*things[:SHOWN_OF_EACH], *styles[:SHOWN_OF_EACH]]


def _minicanvas_rows(concepts: Sequence[Erased]) -> list[ValidationRow]:
    """Per concept two erased prompts (of many: one), the same pictures with a kept class, and unrelated ones."""
    share = 2 if len(concepts) <= 2 else 1
    objects = [name for name in OBJECTS if Erased(name, "object") not in concepts]
    styles = [name for name in STYLES if Erased(name, "style") not in concepts]
    rows = []
    for i, concept in enumerate(concepts):
        for turn in range(share * i, share * (i + 1)):
            thing, style = objects[turn % len(objects)], styles[turn % len(styles)]
            far_thing, far_style = objects[(turn + 3) % len(objects)], styles[(turn + 3) % len(styles)]
            erased = (thing, concept.name) if concept.kind == "style" else (concept.name, style)
            pairs = {"erased": erased, "neighbouring": (thing, style), "unrelated": (far_thing, far_style)}
            rows += [
                ValidationRow(group, article(EVALUATION_TEMPLATE.format(object=pair[0], style=pair[1])))
                for group, pair in pairs.items()
            ]
    return rows


def before_after(
    pipe: Pipeline,
    edited: nn.Module | Mapping[str, Tensor],
    rows: Sequence[ValidationRow],
    path: str | os.PathLike[str],
    *,
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 4.0,
    batch_size: int = 20,
    progress: bool = False,
) -> None:
    """Draw every row with the pipeline's own U-Net and with the edited one, from the same noise; write the picture.

    ``pipe`` is the base pipeline with its text encoders and VAE; its U-Net is put back. ``edited``: another U-Net, or
    the tensors that differ, which then go into the pipeline's own and stay there: one U-Net in memory.
    """
    prompts = [row.prompt for row in rows for _ in seeds]
    noise = list(seeds) * len(rows)
    own_unet = pipe.unet
    drawn = []
    try:
        for label in ("samples before", "samples after"):
            if label == "samples after" and isinstance(edited, nn.Module):
                pipe.unet = edited
            elif label == "samples after":
                own_unet.load_state_dict(edited, strict=False)
            bar = label if progress else False
            drawn.append(generate(pipe, prompts, noise, steps, guidance, batch_size, bar).split(len(seeds)))
    finally:
        pipe.unet = own_unet
    samples = [SampleRow(row.group, row.prompt, old, new) for row, old, new in zip(rows, *drawn, strict=True)]
    before_after_grid(samples, path, [f"seed {seed}" for seed in seeds])


SMALLEST_TILE, LARGEST_TILE = 128, 256
GAP, MARGIN, LABEL_WIDTH, HEADER, GROUP_HEIGHT = 6, 14, 190, 46, 30
INK, FAINT, PAPER = (30, 30, 34), (120, 120, 128), (252, 252, 250)


def before_after_grid(
    rows: Sequence[SampleRow], path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> None:
    """One PNG: per row a prompt, per seed a pair before | after, rows under the heading of their group.

    Images are doubled, within 128 and 256 px. ``columns`` names the seeds.
    """
    seeds = len(rows[0].before)
    tile = max(SMALLEST_TILE, min(LARGEST_TILE, 2 * rows[0].before.shape[-1]))
    names = columns or [f"seed {i + 1}" for i in range(seeds)]
    headings = len(list(dict.fromkeys(row.group for row in rows)))
    pair = 2 * tile + GAP
    width = MARGIN + LABEL_WIDTH + seeds * (pair + 2 * MARGIN)
    height = MARGIN + HEADER + headings * GROUP_HEIGHT + len(rows) * (tile + GAP) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN + LABEL_WIDTH + MARGIN + i * (pair + 2 * MARGIN) for i in range(seeds)]
    for left, name in zip(lefts, names, strict=True):
        draw.text((left + pair // 2, MARGIN), name, FAINT, _font(13), anchor="ma")
        for offset, word in ((0, "before"), (tile + GAP, "after")):
            draw.text((left + offset + tile // 2, MARGIN + 20), word, INK, _font(15), anchor="ma")
    top, group = MARGIN + HEADER, None
    for row in rows:
        if row.group != group:
            group = row.group
            draw.line((MARGIN, top + 6, width - MARGIN, top + 6), FAINT)
            draw.text((MARGIN, top + 11), GROUPS.get(group, group), FAINT, _font(13))
            top += GROUP_HEIGHT
        _draw_label(draw, row.label, top + tile // 2)
        for left, old, new in zip(lefts, row.before, row.after, strict=True):
            sheet.paste(_tile(old, tile), (left, top))
            sheet.paste(_tile(new, tile), (left + tile + GAP, top))
        top += tile + GAP
    with atomic_file(path) as partial:
        sheet.save(partial, format="PNG", optimize=True)


def _tile(image_CHW: Tensor, side: int) -> Image.Image:
    """A (3, H, W) image in [0, 1] as a square picture; lanczos keeps 64 px drawings smooth when doubled."""
    array = image_CHW.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array).resize((side, side), Image.Resampling.LANCZOS)


def _draw_label(draw: ImageDraw.ImageDraw, text: str, middle: int) -> None:
    """The prompt beside its row, wrapped to the margin; what does not fit beside one image is cut with an ellipsis."""
    font, lines = _font(15), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= LABEL_WIDTH:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > 6:
        lines = [*lines[:5], lines[5] + " ..."]
    draw.multiline_text((MARGIN, middle), "\n".join(lines), INK, font, anchor="lm", spacing=4)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
