"""The whole-step benchmark tests itself: rows, their resumption, counts against what is published, and its arithmetic.

No seconds are asserted. The published counts are those that the methods' own code makes for its defaults (one-sample
U-Net evaluations per run), written down here as numbers; what a baseline states is also held against what it calls.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from one_projection import Surgery
from torch import nn

from fastunlearn.config import SurgeryConfig
from fastunlearn.errors import UserError
from fastunlearn.gradients.shard import GradientShard
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from fastunlearn.models.parameter_names import trainable_names
from fastunlearn.planning.activations import build_unet
from update import report, sweep, worker
from update.baselines.named import BASELINES, build
from update.baselines.surgery_loop import surgery_loop
from update.figures import concept_seconds, derived, plan_error
from update.instruments.flops import utilisation
from update.ours import whole_of_ours
from update.rows import config_of, identity, normal, parse_sweep
from update.sweep import Limits, run_sweep

TINY = {"model": "tiny-sdxl-random", "resolution": "64"}
CPU = torch.device("cpu")
# baseline, kind -> updates, frozen, trajectories, student forward, student backward of a whole run
PUBLISHED = {
    ("paper_kscu", "style"): (500, 2_000, 36_804, 2_000, 2_000),
    ("paper_kscu", "object"): (750, 3_000, 48_668, 3_000, 3_000),
    ("quick_kscu", "style"): (500, 1_000, 992 + 960, 1_000, 1_000),
    ("quick_kscu", "object"): (750, 1_500, 656 + 1_456, 1_500, 1_500),
}


@pytest.mark.parametrize(("name", "kind"), PUBLISHED)
def test_a_baseline_states_the_published_evaluations(name: str, kind: str) -> None:
    updates, teacher, rollout, forward, backward = PUBLISHED[name, kind]
    whole = BASELINES[name].whole(kind, 1)
    assert whole.updates == updates
    assert asdict(whole.evaluations) == {
        "teacher": teacher, "rollout": rollout, "student_forward": forward, "student_backward": backward,
        "probe": 0,
    }  # fmt: skip


def test_esd_walks_half_the_sampler_on_average() -> None:
    whole = BASELINES["esd_sdxl"].whole("style", 1)
    assert (whole.updates, whole.evaluations.teacher, whole.evaluations.student_forward) == (200, 400, 200)
    # 200 uniform draws from 0..49: the mean is 24.5, its standard error 1.0, and each step is a guided pair
    assert whole.evaluations.rollout / 200 == pytest.approx(2 * 24.5, abs=2 * 3 * 1.02)


def test_doco_goes_back_through_samples_that_it_does_not_need() -> None:
    """8 + 8 pictures: 8 frozen, 16 forward, and in 999 of 2,000 updates 32 backward."""
    whole = BASELINES["doco_loop"].whole("style", 8)
    assert (whole.updates, whole.evaluations.rollout) == (2000, 0)
    assert whole.evaluations.teacher == 2000 * 8 and whole.evaluations.student_forward == 2000 * 16
    assert whole.evaluations.student_backward == 999 * 32


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_makes_the_calls_that_it_states(name: str) -> None:
    """Counted at the U-Nets' own doors, by samples, and at every gradient that comes back."""
    row = normal({**TINY, "baseline": name, "batch": "2"})
    subject = build(name, config_of(row, False, short=True), row, CPU)
    called = {"rows": 0}
    unets = {subject.backbone.unet, getattr(subject.models.teacher, "_module", subject.models.teacher)}
    for unet in unets:
        unet.register_forward_pre_hook(lambda _, args: called.update(rows=called["rows"] + len(args[0])))
    before = [p.detach().clone() for p in subject.trained]
    for step in subject.steps()[:2]:
        counted, seen = subject.models.evaluations.total, called["rows"]
        backward = subject.models.evaluations.student_backward
        if step.restart:
            subject.restart(step, 3)
        subject.update(step)
        stated = asdict(subject.stated(step))
        walked = 2 * 2 * 3 if step.restart and name != "doco_loop" else 0
        assert subject.models.evaluations.total - counted == 2 * sum(stated.values()) + walked
        assert subject.models.evaluations.student_backward - backward == 2 * stated["student_backward"]
        assert called["rows"] - seen == 2 * (sum(stated.values()) - stated["student_backward"]) + walked
    assert any(not torch.equal(a, b) for a, b in zip(before, subject.trained, strict=True)), "nothing was trained"


@pytest.mark.parametrize(("name", "walks_itself"), [("paper_kscu", True), ("esd_sdxl", False)])
def test_whose_trajectories_are_walked(name: str, walks_itself: bool) -> None:
    """KSCU's are the student's; those of ESD's script are the original's."""
    row = normal({**TINY, "baseline": name})
    subject = build(name, config_of(row, False, short=True), row, CPU)
    walked: list[str] = []
    subject.backbone.unet.register_forward_pre_hook(lambda *_: walked.append("student"))
    assert isinstance(subject.models.teacher, nn.Module)
    subject.models.teacher.register_forward_pre_hook(lambda *_: walked.append("original"))
    subject.restart(subject.steps()[0], 1)
    assert walked == ["student" if walks_itself else "original"]


def test_ours_needs_a_fraction_of_the_evaluations() -> None:
    """At the published settings: one restart for each traversal, as the quick trainer, and no pair beside training."""
    ours = whole_of_ours(config_of(normal(TINY), False, short=False))
    assert (ours.updates, ours.restart, ours.evaluations.teacher) == (500, 992, 1_000)
    assert ours.evaluations.student_forward == ours.evaluations.student_backward == 500
    # 480 updates go on and need the unconditional half; of those in the last 25, the conditional half too.
    assert 992 + 480 < ours.evaluations.rollout <= 992 + 480 + 25


def test_two_rows_on_a_cpu_and_the_second_time_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    field = "train.gradient_accumulation_steps"  # which the fused engine refuses
    rows = parse_sweep([["engine=fused", "surgery=int8"], ["engine=fused", f"{field}=2"]], TINY)
    limits = Limits(updates=1, warmup=1, walk=2)
    found, late = run_sweep(rows, file, limits, "the command")
    assert not late and [row["status"] for row in found] == ["measured", "refused"]
    assert json.loads(file.read_text(encoding="utf-8"))["rows"] == found
    row, refused = found
    assert field in refused["reason"]
    # Per update: 1 window of the concept with the sampler's other half, and 1 retain sample with its target.
    expected = {"teacher": 2 + 1, "rollout": 1, "student_forward": 2, "student_backward": 2, "probe": 0}
    assert row["evaluations"] == expected
    assert row["restart"]["evaluations"] == 2 * 2
    assert {"teacher", "rollout", "forward", "backward", "step_in_backward"} <= row["seconds"].keys()
    assert all(seconds >= 0 for seconds in row["seconds"].values())
    assert row["update_total_seconds"] == pytest.approx(sum(row["seconds"].values()))
    assert row["concept_seconds"]["total"] > 0 and row["mfu"] > 0 and row["peak_memory_bytes"] > 0
    assert row["whole"]["pool"] == 64 * 25 * 2, "the pictures of a real run, not those of the measured one"
    assert row["plan"]["device"] > 0 and row["environment"]["versions"]["torch"] == torch.__version__

    monkeypatch.setattr(sweep, "one_row", lambda *_, **__: pytest.fail("a row was measured again"))
    again, _ = run_sweep(rows, file, limits, "the command")
    assert again == found
    text = report.markdown(found)
    assert f"refused: {field}" in text and f"{row['whole']['total']:,}" in text and "the command" in text


def test_a_row_of_two_ranks_counts_what_they_send() -> None:
    row = normal({**TINY, "ranks": "2", "stage": "0", "surgery": "int8"})
    found = sweep.one_row(row, Limits(updates=1, warmup=1, walk=1), None, has_gpu=False)
    assert found["status"] == "measured", found.get("log", found)
    # The retain gradient and the unlearning one are averaged over the ranks, each as a whole, in fp32.
    unet = build_unet(dict(PUBLIC_MODELS["tiny-sdxl"].unet))
    names = set(trainable_names(unet, "attn2"))
    trained = sum(parameter.numel() for name, parameter in unet.named_parameters() if name in names)
    assert found["bytes_sent"] >= 2 * 4 * trained
    assert found["samples_per_second"] == pytest.approx(2 / found["update_total_seconds"])


def test_a_rerun_repeats_what_failed_and_other_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, ran = tmp_path / "rows.json", []
    here = {"gpu": "cpu", "driver": "", "commit": "a", "changed": False}
    monkeypatch.setattr(sweep, "machine", lambda: here)
    outcome = {"batch=1": "failed", "batch=2": "does not fit"}

    def one_row(row: dict[str, str], *_: Any, **__: Any) -> dict[str, Any]:
        ran.append(row["batch"])
        return {"status": outcome[f"batch={row['batch']}"], "reason": "because"}

    monkeypatch.setattr(sweep, "one_row", one_row)
    rows = parse_sweep([["batch=1,2"]], TINY)
    run_sweep(rows, file, Limits(), "c")
    found, _ = run_sweep(rows, file, Limits(), "c")
    assert ran == ["1", "2", "1"] and len(found) == 2
    assert "does not fit: because" in report.markdown(found)
    here = here | {"commit": "b"}
    run_sweep(rows, file, Limits(), "c")
    assert ran == ["1", "2", "1", "1", "2"]


def test_no_row_starts_after_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 6.0, 9.0, 9.0])  # the first takes 5 s; for the third there is 1 s left
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sweep, "one_row", lambda *_, **__: {"status": "measured"})
    rows = parse_sweep([["batch=1,2,4"]], TINY)
    found, late = run_sweep(rows, tmp_path / "rows.json", Limits(seconds=10), "c")
    assert [row["row"]["batch"] for row in found] == ["1", "2"] and [row["batch"] for row in late] == ["4"]
    assert "batch=4" in report.markdown(found, late)


def test_a_worker_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time; time.sleep(600)", encoding="utf-8")
    monkeypatch.setattr(sweep, "PROGRAM", sleeper)
    monkeypatch.setattr(sweep, "known_before", lambda *_: {})
    found = sweep.one_row(normal(TINY), Limits(), 0.5, has_gpu=False)
    assert found["status"] == "out of time"


def test_a_worker_that_dies_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('the kernel is wrong')", encoding="utf-8")
    monkeypatch.setattr(sweep, "PROGRAM", broken)
    monkeypatch.setattr(sweep, "known_before", lambda *_: {"scope": "attn2"})
    found = sweep.one_row(normal(TINY), Limits(), None, has_gpu=True)
    assert found["status"] == "failed" and "the kernel is wrong" in found["reason"] and found["scope"] == "attn2"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "does not fit"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "does not fit"),
        (UserError("zero.stage: 3 is refused"), "refused"),
    ],
)
def test_what_a_worker_writes_where_it_cannot_measure(
    error: Exception, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(worker, "measure", fail)
    worker.work(normal(TINY), 1, 0, 1, tmp_path / "row.json")
    found = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    assert found["status"] == status and found["reason"] in str(error)


def test_a_worker_does_not_hide_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(worker, "measure", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        worker.work(normal(TINY), 1, 0, 1, tmp_path / "row.json")


def test_a_memory_cap_needs_a_gpu(tmp_path: Path) -> None:
    worker.work(normal({**TINY, "cap": "12"}), 1, 0, 1, tmp_path / "row.json")
    if not torch.cuda.is_available():
        found = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
        assert found["status"] == "refused" and "needs a GPU" in found["reason"]


def test_a_sweep_is_the_union_of_products_without_repetition() -> None:
    rows = parse_sweep([["engine=zero,fused", "stage=1,2"], ["batch=2"], ["engine=fused"]], TINY)
    said = [(row["engine"], row.get("stage"), row["batch"]) for row in rows]
    # The fused engine has no stage: its two rows are one, and the third group names it again.
    assert said == [("zero", "1", "1"), ("zero", "2", "1"), ("fused", None, "1"), ("zero", None, "2")]
    (baseline,) = parse_sweep([["baseline=paper_kscu", "engine=zero,fused", "surgery=off,int8"]], TINY)
    assert "engine" not in baseline and "surgery" not in baseline
    assert identity(dict(reversed(rows[0].items()))) == identity(rows[0])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("scoop=full", "scoop.*unknown.*nearest: scope"),
        ("batch=two", "whole number"),
        ("surgery=int4", "allowed are off"),
        ("cap=12gb", "GiB such as 12"),
        ("batch", "name=value"),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_line(entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_sweep([[entry]], TINY)
    assert "\n" not in str(error.value)


def test_a_dotted_name_is_a_field_of_the_configuration() -> None:
    cfg = config_of(normal({**TINY, "kscu.start": "30", "optimizer": "adamw8bit"}), False, short=True)
    assert (cfg.kscu.start, cfg.optimizer.name, cfg.train.resolution) == (30, "adamw8bit", 64)
    with pytest.raises(UserError, match=r"model\.compil"):
        config_of(normal({**TINY, "model.compil": "no"}), False, short=True)


def test_the_meta_term_and_the_published_parts_are_values_of_a_row() -> None:
    said = {meta: config_of(normal({**TINY, "meta": meta}), False, short=True).meta for meta in ("off", "on", "copy")}
    assert [meta.enabled for meta in said.values()] == [False, True, True]
    assert said["on"].forbidden_loss == "erased" and said["copy"].forbidden_loss == "ascent"
    loop = config_of(normal({**TINY, "surgery": "loop"}), False, short=True)
    assert (loop.surgery.enabled, loop.surgery.retain_dtype, loop.zero.stage) == (True, "auto", 0)
    wrong: tuple[dict[str, str], ...]
    wrong = {"surgery": "loop", "engine": "fused"}, {"surgery": "loop", "stage": "1"}, {"meta": "copy", "ranks": "2"}
    for values in wrong:
        with pytest.raises(UserError, match="needs whole gradients"):
            config_of(normal({**TINY, **values}), False, short=True)
    with pytest.raises(UserError, match="at least 1"):
        parse_sweep([["ranks=0"]], TINY)


def test_the_published_loop_does_what_surgery_does() -> None:
    names, draw = ["a", "b", "c"], torch.Generator().manual_seed(0)
    gradients = [[torch.randn(6, generator=draw) for _ in names] for _ in range(2)]
    found = []
    for loop in (False, True):
        surgery = Surgery(SurgeryConfig(rho=0.5), names)
        unlearn, retain = ([GradientShard(n, g.clone()) for n, g in zip(names, of)] for of in gradients)
        surgery.keep(retain)
        transforms = surgery.transforms
        (figures,) = (surgery_loop(transforms) if loop else transforms.apply)(unlearn, None, 1e-8)
        found.append((torch.stack([piece.tensor for piece in unlearn]), figures.plan.norm, figures.conflicting_share))
    (ours, norm, conflicts), (published, norm_published, conflicts_published) = found
    assert 0 < conflicts == conflicts_published < 1
    assert torch.allclose(ours, published, atol=1e-6) and norm_published == pytest.approx(float(norm), rel=1e-5)


def test_utilisation_and_price_of_a_run_worked_out_by_hand() -> None:
    """F = 4, B = 6 FLOP, peak 100 FLOP/s; forward 0.2 s, backward 0.3 s for 2 samples each: 20 / 0.5 / 100 = 40 %."""
    assert utilisation(20, 0.5, 100) == pytest.approx(0.4) and utilisation(20, 0.0, 100) is None
    measured = {
        "seconds": {"rollout": 0.1, "teacher": 0.4, "forward": 0.2, "backward": 0.3, "optimizer": 0.05, "other": 0.05},
        "evaluations": {"teacher": 4, "rollout": 2, "student_forward": 2, "student_backward": 2},
        "restart": {"seconds": 1.2, "evaluations": 8}, "peak_flops": 100.0, "peak_memory_bytes": 3 * 2**30,
        "environment": {"device": "some GPU"},
    }  # fmt: skip
    whole = {
        "updates": 10, "restart": 40, "pool": 20, "total": 160,
        "evaluations": {"teacher": 60, "rollout": 60, "student_forward": 20, "student_backward": 20},
    }  # fmt: skip
    plan = {"device": 33 * 2**30 // 10, "host": 0}
    known: dict[str, Any] = {"flops": {"forward": 4, "backward": 6}, "whole": whole, "plan": plan}
    found = derived(normal({**TINY, "batch": "2", "checkpointing": "true"}), known, measured)
    assert found["mfu"] == pytest.approx(0.4)
    assert found["mfu_with_recomputation"] == pytest.approx((20 + 8) / 0.5 / 100)
    assert found["mfu_of_the_update"] == pytest.approx((20 + 6 * 4) / 1.1 / 100)
    assert found["samples_per_second"] == pytest.approx(2 / 1.1)
    assert found["plan_error"] == pytest.approx(0.1)
    assert concept_seconds(whole, measured) == pytest.approx({
        "restart": 40 * 0.15, "pool": 20 * 0.15, "rollout": 20 * 0.05, "teacher": 40 * 0.1, "forward": 20 * 0.1,
        "backward": 20 * 0.15, "rest": 10 * 0.1, "total": 6 + 3 + 1 + 4 + 2 + 3 + 1,
    })  # fmt: skip
    small = measured | {"environment": {"device": "cpu"}, "peak_memory_bytes": 2**29}
    assert plan_error(known["plan"], small) is None


def test_a_baseline_is_compared_with_our_quickest_like_row() -> None:
    def row(seconds: float, total: int, **said: str) -> dict[str, Any]:
        return {
            "row": normal({**TINY, **said}), "status": "measured", "whole": {"total": total, "updates": 500},
            "concept_seconds": {"total": seconds},
        }  # fmt: skip

    rows = [
        row(20.0, 4, engine="zero"), row(10.0, 4, engine="fused"), row(1.0, 4, engine="fused", cap="12"),
        row(1.0, 4, kind="object"), row(2.0, 4, surgery="int8"), row(5.0, 2, method="esd"),
        row(80.0, 40, baseline="paper_kscu"), row(30.0, 8, baseline="esd_sdxl"),
    ]  # fmt: skip
    lines = report.comparison(rows).splitlines()
    paper, esd = (next(line for line in lines if f"| {name} |" in line) for name in ("paper_kscu", "esd_sdxl"))
    assert paper.endswith("| 10.0x | 8.0x |  |  |") and esd.endswith("| 2.0x | 3.0x | 4.0x | 6.0x |")


def test_what_is_added_is_compared_with_the_row_that_lacks_it() -> None:
    def row(seconds: float, **said: str) -> dict[str, Any]:
        return {
            "row": normal({**TINY, **said}), "status": "measured", "update_total_seconds": seconds,
            "seconds": {"meta": 0.5, "backward": 0.5}, "evaluations": {"teacher": 4.0, "rollout": 1.0},
            "peak_memory_bytes": 2**20, "bytes_sent": 2.0**21,
        }  # fmt: skip

    plain, other = row(1.0), row(4.0, stage="2")
    assert report.additions([plain, other]) == ""
    lines = report.additions([plain, other, row(2.0, meta="on", surgery="int8"), row(2.0, ranks="2")]).splitlines()
    assert "| 5.0 | 2,000.0 | 2.00x | 25.0% | 1 | 2.00 |" in next(line for line in lines if "meta=on" in line)
    assert "| 1.00x |" in next(line for line in lines if "ranks=2" in line)


def test_the_meta_term_has_a_price_of_its_own() -> None:
    """An update of 1 + 2 evaluations outside the term and 30 in it, which took 6 s."""
    measured = {
        "seconds": {"forward": 0.2, "teacher": 0.2, "meta": 6.0},
        "evaluations": {"teacher": 12, "rollout": 0, "student_forward": 21, "student_backward": 0},
        "meta_evaluations": {"teacher": 10, "rollout": 0, "student_forward": 20, "student_backward": 0},
        "restart": {"seconds": 0.0, "evaluations": 0},
    }  # fmt: skip
    whole = {
        "updates": 2, "restart": 0, "pool": 0,
        "evaluations": {"teacher": 24, "rollout": 0, "student_forward": 42, "student_backward": 0},
    }  # fmt: skip
    found = concept_seconds(whole, measured)
    assert found["forward"] == pytest.approx(0.4) and found["teacher"] == pytest.approx(0.4)
    assert found["rest"] == pytest.approx(12.0) and found["total"] == pytest.approx(12.8)
