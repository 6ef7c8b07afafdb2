"""The whole-step benchmark tests itself: rows, their resumption, counts against what is published, and its arithmetic.

No seconds are asserted. The published counts are those that the methods' own code makes for its defaults (one-sample
U-Net evaluations per run), written down here as numbers; what a baseline states is also held against what it calls.
"""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "update"))

from baselines import BASELINES, build  # noqa: E402
from whole_step import report, sweep, worker  # noqa: E402
from whole_step.clock import Clock, medians  # noqa: E402
from whole_step.figures import concept_seconds, derived, plan_error  # noqa: E402
from whole_step.flops import unet_flops, utilisation  # noqa: E402
from whole_step.profiling import kind_of, read_trace  # noqa: E402
from whole_step.rows import config_of, identity, normal, parse_sweep  # noqa: E402
from whole_step.subjects import whole_of_ours  # noqa: E402
from whole_step.sweep import Limits, run_sweep  # noqa: E402

from fastunlearn.errors import UserError  # noqa: E402
from fastunlearn.models.formats.architectures import ARCHITECTURES  # noqa: E402

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
    expected = {"teacher": 2 + 1, "rollout": 1, "student_forward": 2, "student_backward": 2}
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


def test_flops_of_stable_diffusion_are_those_known() -> None:
    """SD 1.x at 512 px: 0.803 TFLOP forward; to train all attn2 layers, 1.11 times that back."""
    flops = unet_flops(json.dumps(dict(ARCHITECTURES["sd15"].unet)), "attn2", 64, 77)
    assert flops.forward / 1e12 == pytest.approx(0.803, abs=0.001)
    assert flops.backward / flops.forward == pytest.approx(1.11, abs=0.01)


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


def test_the_clock_counts_no_second_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"t": 0.0}
    monkeypatch.setattr("whole_step.clock.time.perf_counter", lambda: now["t"])

    def spend(seconds: float) -> None:
        now["t"] += seconds

    class Thing(nn.Module):
        def inner(self) -> None:
            spend(3.0)

        def outer(self) -> None:
            spend(1.0)
            self.inner()
            spend(1.0)

        def watch(self, clock: Clock) -> None:
            clock.watch(self, "inner", "teacher")
            clock.watch(self, "outer", "backward")

    thing, clock = Thing(), Clock(CPU)
    unwatch = clock.watch_all(thing)
    for clock.update in range(3):
        spend(10.0)
        clock.enter("other")
        thing.outer()
        spend(0.5)
        clock.leave()
    clock.enter("restart")
    thing.inner()
    clock.leave()
    unwatch()
    found = clock.seconds()
    assert found[0] == {"other": 0.5, "backward": 2.0, "teacher": 3.0} == found[1]
    assert found[2] == {"other": 0.5, "backward": 2.0, "teacher": 3.0, "restart": 3.0}
    assert medians([found[0], found[1], {"other": 9.0}]) == {"teacher": 3.0, "backward": 2.0, "other": 0.5}
    thing.outer()
    assert clock.seconds() == found, "the methods are the class's own again"


def test_the_clock_gives_a_peak_to_the_phase_that_reached_it(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = {"bytes": 0}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: peak["bytes"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: peak.update(bytes=0))
    clock = Clock(torch.device("cuda", 0), memory=True)
    peak["bytes"] = 5
    clock.enter("other")
    peak["bytes"] = 7
    clock.enter("backward")
    peak["bytes"] = 40
    clock.enter("step_in_backward")
    peak["bytes"] = 20
    clock.leave()
    peak["bytes"] = 30
    clock.leave()
    peak["bytes"] = 3
    clock.leave()
    assert clock.peaks == {"outside": 5, "other": 7, "backward": 40, "step_in_backward": 20}


def test_a_trace_is_read_by_what_the_update_launched(tmp_path: Path) -> None:
    """Two kernels that overlap, launched in the update though they run after it; one of before; one wait of two."""

    def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, Any]:
        args = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        event("user_annotation", "one update", 100, 50),
        event("cuda_runtime", "cudaLaunchKernel", 90, 1, 1), event("kernel", "old_gemm", 95, 40, 1),
        event("cuda_runtime", "cudaLaunchKernel", 110, 1, 2), event("kernel", "flash_fwd", 160, 20, 2),
        event("cuda_driver", "cuLaunchKernelEx", 120, 1, 3), event("kernel", "surgery_dots_chunk_kernel", 170, 30, 3),
        event("cuda_runtime", "cudaMemcpyAsync", 125, 1, 4), event("gpu_memcpy", "Memcpy DtoH (Device)", 210, 10, 4),
        event("cuda_runtime", "cudaStreamSynchronize", 126, 2), event("cuda_runtime", "cudaStreamSynchronize", 300, 2),
        event("cpu_op", "aten::_local_scalar_dense", 124, 5), {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    found = read_trace(events)
    assert found["waits"]["cudaStreamSynchronize"] == 1 and found["copies_to_host"] == 1 == found["values_asked"]
    assert found["launches"] == 2
    assert found["by_kind"] == pytest.approx({"ours (Triton)": 30e-6, "attention": 20e-6, "copies and fills": 10e-6})
    assert found["device_busy_seconds"] == pytest.approx(50e-6)
    assert found["device_span_seconds"] == pytest.approx(60e-6)
    assert kind_of("sm90_xmma_gemm_bf16") == "matrix products" and kind_of("who knows") == "other"


def test_a_profiled_update_counts_the_values_that_python_asks_for() -> None:
    from whole_step.profiling import profile_update

    x = torch.ones(4)

    def update() -> None:
        (x * 2).sum().item()
        bool(x[0] > 0)

    found = profile_update(update, CPU)
    assert found["values_asked"] == 2 and found["launches"] == 0 and found["by_kind"] == {}


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


def test_gzip_is_what_the_profiler_writes(tmp_path: Path) -> None:
    """Pinned, because the reader relies on the file's ending."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(2).sum()
    profiler.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    with gzip.open(tmp_path / "trace.json.gz", "rt", encoding="utf-8") as stream:
        assert json.load(stream)["traceEvents"]
