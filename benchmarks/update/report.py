"""The rows as Markdown: what was measured, on what, with which command; then how the baselines compare.

Text from the JSON of a sweep, and no figure that is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from markdown_table import markdown_table as table
from update.baselines import named
from update.rows import DEFAULTS, identity

GIB = 2**30
PHASE_TITLES = {
    "rollout": "rollout", "teacher": "teacher", "forward": "forward", "backward": "backward", "surgery": "surgery",
    "meta": "meta term", "optimizer": "optimizer", "step_in_backward": "step in backward", "other": "other",
}  # fmt: skip
ADDED = {"surgery": "off", "meta": "off", "ranks": "1"}
NOTES = """\
Times are medians per update in ms, without restarts of trajectories; phases do not overlap. "Step in backward": the
fused engine's hooks, which put the retain gradient aside, project, clip and step while the backward pass runs, and
whose time is not in "backward". MFU: the student's forward and backward FLOPs, counted, over their time and the
device's own rate in a large matrix product, measured in the same process; recomputation under checkpointing is not
counted. Seconds per concept: the measured price of each kind of U-Net evaluation, times the exact number that the whole
run makes, restarts included, plus what an update costs besides; pictures to be kept, where surgery draws them first,
are among them ("of it pictures"). "Meta term" holds all that the term does, its U-Net calls too. "MiB sent": the
largest argument of each collective, added up on the first rank; "values asked": how often Python asked a tensor for its
value. Peak: what the allocator handed out at most; "planned": `fastunlearn plan` without its allowance for the CUDA
context."""
CPU_NOTE = "**Measured on a CPU: the seconds say nothing about a GPU, and little on a busy machine.** "


def markdown(rows: Sequence[dict[str, Any]], late: Sequence[dict[str, str]] = ()) -> str:
    """The whole report: a table for each machine, model, kind and resolution."""
    parts = ["# Whole-step throughput"]
    for key, group in grouped(rows).items():
        parts += [f"## {key}", _environment(group), _table(group)]
        sections = (_phase_peaks, additions, comparison, _profiles, _wholes)
        parts += [text for section in sections if (text := section(group))]
    parts.append(NOTES)
    if late:
        parts.append("Not run, for lack of time:\n\n" + "\n".join(f"* {name_of(row)}" for row in late))
    return "\n\n".join(parts) + "\n"


def grouped(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that may be compared with each other."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        device = row.get("environment", {}).get("device", row["machine"]["gpu"])
        pixels = f", {row['resolution']} px" if row.get("resolution") else ""
        found.setdefault(f"{row['row']['model']}{pixels} on {device}", []).append(row)
    return found


def name_of(row: dict[str, str]) -> str:
    """A row in the words of its sweep: engine and surgery, or the baseline; and what is not as by default."""
    always = ("engine", "surgery") if row["baseline"] == "ours" else ("baseline",)
    said = [n for n, value in row.items() if n != "model" and (n in always or DEFAULTS.get(n) != value)]
    return " ".join(f"{name}={row[name]}" for name in said)


def _environment(rows: Sequence[dict[str, Any]]) -> str:
    row = next((row for row in rows if "environment" in row), None)
    machine = rows[-1]["machine"]
    known = row["environment"]["versions"] if row else {}
    versions = ", ".join(f"{name} {version}" for name, version in known.items()) or "versions unknown"
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    commits = sorted({r["machine"]["commit"] + (" with changes" if r["machine"]["changed"] else "") for r in rows})
    peak = next((r for r in rows if r.get("peak_flops")), None)
    rate = f" {peak['peak_product']}: {peak['peak_flops'] / 1e12:,.2f} TFLOP/s." if peak else ""
    commands = "\n".join(f"    {command}" for command in dict.fromkeys(r["command"] for r in rows))
    cpu = CPU_NOTE if machine["gpu"] == "cpu" else ""
    return f"{cpu}{driver}{versions}; commit {', '.join(commits)}.{rate}\n\n{commands}"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    phases = [p for p in PHASE_TITLES if any(p in row.get("seconds", {}) for row in rows)]
    titles = ["row", "update ms", *(PHASE_TITLES[p] for p in phases), "samples/s", "MFU", "peak GiB", "planned GiB",
              "error", "U-Net evaluations per concept", "s per concept", "of it pictures"]  # fmt: skip
    lines = []
    for row in rows:
        label = name_of(row["row"])
        if row["status"] != "measured" or "seconds" not in row:
            said = row["status"] + (f": {row['reason']}" if row.get("reason") else "")
            plan = _gib(row.get("plan", {}).get("device"))
            peak = _gib(row.get("peak_memory_bytes"))
            said = said if row["status"] != "measured" else "whole run, below"
            lines.append([label, said, *[""] * len(phases), "", "", peak, plan, "", "", "", ""])
            continue
        lines.append([
            label, _ms(row["update_total_seconds"]), *(_ms(row["seconds"].get(phase)) for phase in phases),
            f"{row['samples_per_second']:.3g}", _share(row["mfu"]), _gib(row.get("peak_memory_bytes")),
            _gib(row.get("plan", {}).get("device")), _share(row.get("plan_error"), signed=True),
            f"{row['whole']['total']:,}", f"{row['concept_seconds']['total']:,.1f}",
            f"{row['concept_seconds']['pool']:,.1f}" if row["concept_seconds"]["pool"] else "",
        ])  # fmt: skip
    return table(titles, lines)


def additions(rows: Sequence[dict[str, Any]]) -> str:
    """What surgery, a meta term and more ranks cost: each row of ours against the one like it that has neither of the
    first two; nothing where no row has any of them."""
    rows = [row for row in rows if row["row"]["baseline"] == "ours" and "update_total_seconds" in row]
    if all(row["row"].get(name, none) == none for row in rows for name, none in ADDED.items()):
        return ""
    plain = {_without(row["row"]): row["update_total_seconds"] for row in rows if is_plain(row["row"])}
    lines = []
    for row in rows:
        update, base = row["update_total_seconds"], plain.get(_without(row["row"]))
        extra = sum(row["seconds"].get(phase, 0.0) for phase in ("surgery", "meta"))
        lines.append([
            name_of(row["row"]), f"{sum(row['evaluations'].values()):.1f}", _ms(update),
            "" if base is None else f"{update / base:.2f}x", _share(extra / update),
            f"{row['peak_memory_bytes'] / 2**20:,.0f}", f"{row.get('bytes_sent', 0.0) / 2**20:.2f}",
            f"{row.get('values_asked', 0.0):.1f}",
        ])  # fmt: skip
    titles = ["row", "U-Net evaluations", "update ms", "against off", "of it surgery and meta", "peak MiB", "MiB sent",
              "values asked"]  # fmt: skip
    return "### What surgery, the meta term and more ranks add to an update\n\n" + table(titles, lines)


def is_plain(row: dict[str, str]) -> bool:
    """Neither surgery nor a meta term."""
    return row.get("surgery", "off") == row.get("meta", "off") == "off"


def _without(row: dict[str, str]) -> str:
    return identity({name: value for name, value in row.items() if name not in ("surgery", "meta")})


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """Each baseline against ours: the quickest row of the trainer for the same kind, with the same batch; and, where
    the baseline is another method than KSCU, the quickest row of that method."""
    lines = []
    for row in (r for r in rows if r["row"]["baseline"] != "ours" and "concept_seconds" in r):
        cells = [row["row"]["baseline"], named.BASELINES[row["row"]["baseline"]].SUMMARY, row["row"]["kind"],
                 row["row"]["precision"], f"{row['whole']['updates']:,}", f"{row['whole']['total']:,}",
                 f"{row['concept_seconds']['total']:,.1f}"]  # fmt: skip
        same = named.counterpart(row["row"]["baseline"])
        # DoCo's samples are pictures that it draws beforehand, at a batch of 8: only DoCo compares with that.
        kscu = None if same == "doco" else quickest(rows, row, "kscu")
        cells += [*_ratios(row, kscu), *_ratios(row, None if same == "kscu" else quickest(rows, row, same))]
        lines.append(cells)
    titles = ["baseline", "what it does", "kind", "precision", "updates", "U-Net evaluations", "s per concept",
              "evaluations, x vs our KSCU", "seconds, x vs our KSCU", "evaluations, x vs same method",
              "seconds, x vs same method"]  # fmt: skip
    return "### Baselines\n\n" + table(titles, lines) if lines else ""


def quickest(rows: Sequence[dict[str, Any]], row: dict[str, Any], method: str) -> dict[str, Any] | None:
    """The quickest measured run of the trainer without surgery (DoCo: with, it is part of it) and without a cap."""

    def comparable(other: dict[str, Any]) -> bool:
        said = other["row"]
        same = all(said[name] == row["row"][name] for name in ("kind", "batch"))
        surgery = is_plain(said) or (method == "doco" and said.get("meta", "off") == "off")
        ours = said["baseline"] == "ours" and said.get("method") == method and said["cap"] == "none"
        ours = ours and said.get("ranks", "1") == "1"
        return ours and same and surgery and "concept_seconds" in other

    seconds: Callable[[dict[str, Any]], float] = lambda other: other["concept_seconds"]["total"]  # noqa: E731
    return min(filter(comparable, rows), key=seconds, default=None)


def _ratios(row: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    if ours is None:
        return ["", ""]
    evaluations = row["whole"]["total"] / ours["whole"]["total"]
    seconds = row["concept_seconds"]["total"] / ours["concept_seconds"]["total"]
    return [f"{evaluations:.1f}x", f"{seconds:.1f}x"]


def _phase_peaks(rows: Sequence[dict[str, Any]]) -> str:
    rows = [row for row in rows if row.get("phase_peak_bytes")]
    phases = list(dict.fromkeys(phase for row in rows for phase in row["phase_peak_bytes"]))
    lines = [[name_of(r["row"]), *(_gib(r["phase_peak_bytes"].get(p)) for p in phases)] for r in rows]
    return "### Peak memory of each phase, GiB\n\n" + table(["row", *phases], lines) if rows else ""


def _profiles(rows: Sequence[dict[str, Any]]) -> str:
    parts = []
    for row in (row for row in rows if "profile" in row):
        profile = row["profile"]
        waits = ", ".join(f"{name} {count}" for name, count in profile["waits"].items())
        sites = ", ".join(f"`{site}` {count}x" for site, count in profile.get("wait_sites", {}).items()) or "none"
        lines = [[kind, _ms(seconds)] for kind, seconds in profile["by_kind"].items()]
        text = (
            f"`{name_of(row['row'])}`: host {_ms(profile['host_seconds'])} ms, device busy "
            f"{_ms(profile['device_busy_seconds'])} of {_ms(profile['device_span_seconds'])} ms, "
            f"{profile['launches']:,} launches. Waits: {waits}; copies to the host {profile['copies_to_host']}; values "
            f"that Python asked for {profile['values_asked']}; lines that wait: {sites}."
        )
        parts.append(text + ("\n\n" + table(["kernels", "ms"], lines) if lines else ""))
    return "### One update under the profiler\n\n" + "\n\n".join(parts) if parts else ""


def _wholes(rows: Sequence[dict[str, Any]]) -> str:
    rows = [row for row in rows if "whole_run" in row]
    lines = [
        [name_of(r["row"]), f"{r['whole_run']['updates']:,}", f"{sum(r['whole_run']['evaluations'].values()):,}",
         f"{r['whole_run']['seconds']:,.1f}"] for r in rows
    ]  # fmt: skip
    titles = ["row", "updates", "U-Net evaluations", "s by the wall clock"]
    return "### Whole runs\n\n" + table(titles, lines) if rows else ""


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.1f}"


def _gib(count: int | None) -> str:
    return "" if not count else f"{count / GIB:.2f}"


def _share(value: float | None, signed: bool = False) -> str:
    return "" if value is None else f"{value:+.1%}" if signed else f"{value:.1%}"
