"""The editions of the embedded model: all in which one recipe differs from another, as data."""

from fastunlearn.minicanvas.build.editions.canvas import CANVAS
from fastunlearn.minicanvas.build.editions.edition import Edition, FitPlan, TextShape, UNetShape
from fastunlearn.minicanvas.build.editions.v import V

EDITIONS: dict[str, Edition] = {edition.name: edition for edition in (CANVAS, V)}

__all__ = ["CANVAS", "EDITIONS", "Edition", "FitPlan", "TextShape", "UNetShape", "V"]
