"""What became of a run, in one sentence: the first line of the card and the last ones of the terminal.

From what was measured and from nothing else: a run that changed no weight has erased nothing, whatever it was told to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastunlearn.evaluation.metrics.scores import clear_difference, headlines
from fastunlearn.export.changes import Changes

if TYPE_CHECKING:
    from fastunlearn.config import Config
    from fastunlearn.progress.stopping import Progress

ERASED_AT_MOST = 0.1
"""Share of the pictures in which a concept that counts as erased may still be recognised."""
TOLD_ROUNDING, TOLD_MOVED = 0.05, 0.01
"""Share of the moved weights from which on a loss to rounding is worth a sentence, where so many were moved at all."""


def erased_names(cfg: Config) -> str:
    """ "cat, neon style"."""
    return ", ".join(concept.name for concept in cfg.concepts)


def is_unchanged(metrics: Mapping[str, Any]) -> bool:
    """Whether the exported weights were compared, and are the base model's."""
    changes = metrics.get("changes")
    return changes is not None and changes["changed"] == 0


def recognised(metrics: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """(metric, share of pictures that showed the concept before, after); None: not measured."""
    evaluation = metrics.get("evaluation") or {}
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    for name in headlines(of_erased=True):
        if before.get(name) is not None and after.get(name) is not None:
            return name, 1.0 - before[name], 1.0 - after[name]
    return None


def verdict(metrics: Mapping[str, Any]) -> str:
    """One of "unchanged", "not measured", "not erased", "partly erased", "erased"."""
    if is_unchanged(metrics):
        return "unchanged"
    seen = recognised(metrics)
    if seen is None:
        return "not measured"
    name, before, after = seen
    counts = [metrics["evaluation"][when]["counts"][name] for when in ("before", "after")]
    if after >= before or not clear_difference(1.0 - before, 1.0 - after, *counts):
        return "not erased"
    return "erased" if after <= ERASED_AT_MOST else "partly erased"


def progress_outcome(cfg: Config, progress: Progress, updates: int) -> dict[str, Any]:
    """What ``metrics.json`` says of the probes: whether what was asked for held with the weights that remain, and why
    no more updates followed.

    ``ended``: "erased", "drift" (more than ``progress.max_drift``), "updates" (there were no more), or "edited" (there
    are none).
    """
    last = progress.readings[-1]
    kept = (progress.best or last) if progress.stops else last
    return {
        "erased": progress.all_hold(kept),
        "ended": progress.ended or ("updates" if cfg.trains else "edited"),
        "updates": updates,
        "at_most": cfg.max_train_steps if cfg.trains else 0,
        "update": kept.update,
        "concepts": {
            concept.name: {"pairs": len(kept.moved[i]), "share": kept.share(i), "low": kept.low(i)}
            for i, concept in enumerate(cfg.concepts)
        },
        "drift": kept.as_json()["drift"],
        "probes": [reading.as_json() for reading in progress.readings],
    }


def erased_by_probes(metrics: Mapping[str, Any]) -> bool | None:
    """Whether what was asked of the probes holds; None: nobody probed."""
    progress = metrics.get("progress")
    return None if progress is None else progress["erased"]


def why_it_ended(cfg: Config, progress: Mapping[str, Any]) -> str:
    """ "Erased: 100 % of 8 probes; 46 of at most 500 updates.", or that it is not."""
    found = progress["concepts"]
    several = len(found) > 1
    shares = ", ".join(
        f"{name + ' ' if several else ''}{one['share']:.0%} of {one['pairs']} probes" if one["pairs"]
        else f"{name} was never drawn, so that there is nothing to see" for name, one in found.items()
    )  # fmt: skip
    lows = ", ".join(f"{one['low']:.2f}" for one in found.values())
    goal = f"{cfg.progress.share:.0%}, the lowest fifth moved by {cfg.progress.quantile:g}"
    asked = "" if progress["erased"] else f" (asked for: {goal}; it moved by {lows})"
    if progress["ended"] == "edited":
        cost = "edited in closed form"
    else:
        cost = f"{progress['updates']} of at most {progress['at_most']} updates"
        if progress["update"] != progress["updates"]:
            cost += f", the weights after {progress['update']} remain"
    if progress["drift"] is not None:  # a glance does not look at it
        cost += f"; drift of what is kept {progress['drift']:.2f}"
    if progress["ended"] == "drift":
        cost += f", so it ended at progress.max_drift {cfg.progress.max_drift:g}"
    return f"{'Erased' if progress['erased'] else 'Not erased'}: {shares}{asked}; {cost}."


def title(base: str, cfg: Config, metrics: Mapping[str, Any]) -> str:
    """Of the card. ``base``: what the base model is called."""
    names = erased_names(cfg)
    titles = {"unchanged": f"{base}, unchanged", "erased": f"{base} without {names}"}
    return titles.get(verdict(metrics), f"{base}, edited to erase {names}")


def finding(cfg: Config, metrics: Mapping[str, Any]) -> str:
    """What became of it."""
    progress = metrics.get("progress")
    said = "" if progress is None or is_unchanged(metrics) else why_it_ended(cfg, progress) + " "
    return said + _measured(cfg, metrics)


def _measured(cfg: Config, metrics: Mapping[str, Any]) -> str:
    names, found = erased_names(cfg), verdict(metrics)
    if found == "unchanged":
        return f"Nothing was erased: no weight differs from the base model's.{_rounding(metrics)}"
    if found == "not measured":
        reason = metrics.get("not_evaluated") or (
            "it was switched off" if cfg.evaluation.mode == "off" else "no classifier looked at pictures"
        )
        what = "Whether" if metrics.get("progress") is None else "Beyond these probes, whether"
        return f"{what} {names} is gone was not measured: {reason}.{_size(metrics)}{_rounding(metrics)}"
    name, before, after = recognised(metrics) or ("", 0.0, 0.0)
    evaluation = metrics["evaluation"]["after"]
    low, high = (1.0 - bound for bound in reversed(evaluation["intervals"][name]))
    words = {"not erased": "Not erased", "partly erased": "Partly erased", "erased": "Erased"}[found]
    if metrics.get("progress") is not None:
        words = "By the classifier"
    return (
        f"{words}: {names} is recognised in {after:.0%} of {evaluation['counts'][name]} pictures that ask for it "
        f"(95 % interval {low:.0%} to {high:.0%}; before: {before:.0%}).{_size(metrics)}{_rounding(metrics)}"
    )


def _size(metrics: Mapping[str, Any]) -> str:
    changes = metrics.get("changes")
    if changes is None:
        return ""
    return (
        f" {changes['changed']:,} of {changes['weights']:,} weights differ from the base model's, by "
        f"{changes['relative_change']:.2%} of their length."
    )


def _rounding(metrics: Mapping[str, Any]) -> str:
    changes = metrics.get("changes")
    if changes is None:
        return ""
    share = Changes(**changes).lost_share
    if share < TOLD_ROUNDING or changes["lost_to_rounding"] < TOLD_MOVED * changes["weights"]:
        return ""
    return (
        f" Of the weights that training moved, {share:.0%} round back to the base model's in {changes['dtype']}; "
        'export.dtype "fp32" keeps them.'
    )
