"""What follows from a row's measurement: utilisation, seconds per erased concept, the planner's error.

Arithmetic, done by the parent while the row itself is measured on the GPU, or before it on a CPU.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastunlearn.config import Config, resolved_scope
from fastunlearn.config.engine_rules import check_ranks
from fastunlearn.planning.plan import Plan, latent_side, make_plan
from update.baselines import named
from update.instruments.flops import Flops, unet_flops, utilisation
from update.ours import whole_of_ours
from update.rows import Row, config_of
from update.subjects.models import plan_model
from update.subjects.protocol import Whole

GIB = 2**30
SMALLEST_CPU_PEAK = GIB  # below, a process's own size drowns what the planner counts
PER_UPDATE = ("surgery", "meta", "optimizer", "step_in_backward", "other")


def known_before(row: Row, has_gpu: bool) -> dict[str, Any]:
    """What needs no measurement: FLOPs of a sample, the evaluations of a whole run, the planner's peak.

    Raises:
        UserError: the trainer refuses this configuration.
    """
    cfg = config_of(row, has_gpu, short=True)
    model, scope = plan_model(cfg), scope_of(row, cfg)
    flops = unet_flops(model.unet, scope, latent_side(cfg, model), model.tokens)
    whole = whole_of(row, has_gpu)
    found: dict[str, Any] = {
        "scope": scope,
        "resolution": latent_side(cfg, model) * model.factor,
        "flops": asdict(flops),
        "whole": {
            "updates": whole.updates, "restart": whole.restart, "pool": whole.pool,
            "evaluations": asdict(whole.evaluations), "total": whole.evaluations.total,
        },
    }  # fmt: skip
    if row["baseline"] == "ours":
        ranks = int(row["ranks"])
        check_ranks(cfg, ranks)
        found["plan"] = planned(make_plan(cfg, ranks, model))
    return found


def scope_of(row: Row, cfg: Config) -> str:
    """What a row trains; a baseline has its own default."""
    if row["baseline"] == "ours" or row["scope"] != "auto":
        return resolved_scope(cfg)
    return named.scope_of(row["baseline"], row["kind"])


def whole_of(row: Row, has_gpu: bool) -> Whole:
    """The run that erases one concept; with several ranks, one rank's share of it."""
    if row["baseline"] == "ours":
        return whole_of_ours(config_of(row, has_gpu, short=False))
    return named.whole_of(row["baseline"], row["kind"], int(row["batch"]))


def planned(plan: Plan) -> dict[str, int]:
    """The planner's peaks in bytes."""
    return {"device": plan.device, "host": plan.host}


def derived(row: Row, known: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """The rest of a row whose updates were timed."""
    found: dict[str, Any] = {}
    if "seconds" in measured:
        seconds, count = measured["seconds"], without_meta(measured)
        update = sum(seconds.values())
        flops, peak = Flops(**known["flops"]), measured["peak_flops"]
        model = count["student_forward"] * flops.forward + count["student_backward"] * flops.backward
        again = count["student_backward"] * flops.forward if row["checkpointing"] == "true" else 0.0
        passes = seconds.get("forward", 0.0) + seconds.get("backward", 0.0)
        everything = model + (count["teacher"] + count["rollout"]) * flops.forward
        found = {
            "update_total_seconds": update,
            "samples_per_second": int(row["batch"]) * int(row.get("ranks", "1")) / update,
            "mfu": utilisation(model, passes, peak),
            "mfu_with_recomputation": utilisation(model + again, passes, peak),
            "mfu_of_the_update": utilisation(everything, update, peak),
            "concept_seconds": concept_seconds(known["whole"], measured),
        }
    if "plan" in known and measured.get("peak_memory_bytes"):
        found["plan_error"] = plan_error(known["plan"], measured)
    return found


def concept_seconds(whole: dict[str, Any], measured: dict[str, Any]) -> dict[str, float]:
    """Seconds for a whole run: each kind of evaluation at its measured price, and what an update costs besides.

    Pictures that are drawn before training are guided pairs without a gradient, as a restart's: they get its price.
    """
    seconds, each = measured["seconds"], without_meta(measured)
    of_meta = measured.get("meta_evaluations", {})
    counts = {name: count - whole["updates"] * of_meta.get(name, 0) for name, count in whole["evaluations"].items()}
    # Where nothing walks, what is drawn before training costs about as much as the student's forward pass.
    restart = _price(measured["restart"]["seconds"], measured["restart"]["evaluations"]) or _price(
        seconds.get("forward", 0.0), each["student_forward"]
    )
    in_update = _price(seconds.get("rollout", 0.0), each["rollout"]) or restart
    teacher = _price(seconds.get("teacher", 0.0), each["teacher"])
    found = {
        "restart": whole["restart"] * restart,
        "pool": whole["pool"] * restart,
        "rollout": (counts["rollout"] - whole["restart"]) * in_update,
        "teacher": (counts["teacher"] - whole["pool"]) * teacher,
        "forward": counts["student_forward"] * _price(seconds.get("forward", 0.0), each["student_forward"]),
        "backward": counts["student_backward"] * _price(seconds.get("backward", 0.0), each["student_backward"]),
        "rest": whole["updates"] * sum(seconds.get(name, 0.0) for name in PER_UPDATE),
    }
    return found | {"total": sum(found.values())}


def without_meta(measured: dict[str, Any]) -> dict[str, float]:
    """Evaluations of an update, less those of the meta term, whose time is a phase of its own."""
    of_meta = measured.get("meta_evaluations", {})
    return {name: count - of_meta.get(name, 0) for name, count in measured["evaluations"].items()}


def _price(seconds: float, evaluations: float) -> float:
    return seconds / evaluations if evaluations else 0.0


def plan_error(plan: dict[str, int], measured: dict[str, Any]) -> float | None:
    """(planned - measured) / measured; None where the measurement is a small CPU process."""
    if measured["environment"]["device"] != "cpu":
        return plan["device"] / measured["peak_memory_bytes"] - 1
    above = measured["peak_memory_bytes"] - measured.get("bytes_before_the_model", 0)
    return (plan["device"] + plan["host"]) / above - 1 if above >= SMALLEST_CPU_PEAK else None
