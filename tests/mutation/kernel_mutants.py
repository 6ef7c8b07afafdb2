"""Breaks the kernels on purpose, one line at a time, and says whether the checks notice.

A mutant is a copy of the package with one piece of text replaced, loaded by a child process that has torch already. As
a script: `TRITON_INTERPRET=1 python tests/mutation/kernel_mutants.py --folder TMP --json FILE`; MUTANTS has the list.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "fastunlearn_kernels"
BROKEN = "not a mutant"  # a verdict that begins so says nothing about the checks
SECONDS = 60  # of the processor's time, for one mutant; one that never ends is noticed too


@dataclass(frozen=True)
class Mutant:
    """`old`, which occurs once in `file`, becomes `new`; then the checks of `op` must fail.

    case: the one that notices it, where that is one of the last: it is tried first, which saves the time of the others.
    """

    op: str
    what: str
    file: str
    old: str
    new: str
    case: str = ""


def _of(file: str, *mutants: tuple[str, ...], op: str = "") -> list[Mutant]:
    """Each mutant as (what, old, new) or (what, old, new, case)."""
    return [Mutant(op or Path(file).name, what, f"{file}.py", *rest) for what, *rest in mutants]


MUTANTS: list[Mutant] = [
    *_of(
        "latent/add_noise",
        ("the mask covers too much", "mask = o_n < n", "mask = o_n < n + BLOCK"),
        ("the tail is dropped", "mask = o_n < n", "mask = o_n + 1 < n"),
        ("the root of 1 - A is missing", "tl.sqrt(1.0 - alpha) * noise", "(1.0 - alpha) * noise"),
        ("the noise has the wrong sign", "* x0 + tl.sqrt(1.0", "* x0 - tl.sqrt(1.0"),
        ("every sample has the first one's timestep", "timesteps_ptr + i_b * PER_SAMPLE", "timesteps_ptr"),
        ("each sample has the first one's noise", "tl.load(noise_ptr + o,", "tl.load(noise_ptr + o_n,"),
        ("the table is indexed by the sample", "tl.load(table_ptr + step,", "tl.load(table_ptr + i_b,"),
        ("backward mixes up the factors", "(signal * wide).to(of_x0)", "(noise_level * wide).to(of_x0)"),
    ),
    *_of(
        "latent/guided_noise_loss",
        ("the mask covers one element too many", "mask = o_n < n", "mask = o_n <= n"),
        ("the tail is dropped", "mask = o_n < n", "mask = o_n + 1 < n"),
        ("the guidance has the wrong sign", "anchor - coefficient(guidance,", "anchor + coefficient(guidance,"),
        ("the gradient lacks its factor", "step = 2.0 * k /", "step = 2.0 /", "v prediction"),
        ("the gradient lacks lambda2", "residual *= uncond_weight", "pass"),
        ("the loss lacks lambda2", "errors += uncond_weight * (", "errors += ("),
        ("a part of the sum is left out", "+ b * chunks, chunks, BLOCK", "+ b * chunks, chunks - 1, BLOCK"),
        ("the ticket is not set back", "tl.store(ticket_ptr, 0)", "pass"),
        (
            "the flag is never raised",
            "tl.where(loss - loss == 0, 0.0, 1.0)",
            "tl.where(loss - loss == 0, 0.0, 0.0)",
            "NaN in a sample that counts",
        ),
        ("the anchor is the empty prompt", "if HAS_TEACHER_UNCOND:", "if not HAS_TEACHER_UNCOND:"),
        ("samples overlap", "o = i_b * n + o_n", "o = i_b * (n - 1) + o_n"),
        (
            "the unconditional gradient is not written",
            "tl.store(grad_uncond_ptr + o, step * residual, mask=mask)",
            "pass",
        ),
        ("backward ignores its cotangent", "grad_loss * grad", "grad"),
    ),
    *_of(
        "latent/weighted_noise_loss",
        ("the mask covers too much", "mask = o_n < n", "mask = o_n < n + BLOCK"),
        ("the tail is dropped", "mask = o_n < n", "mask = o_n + 1 < n"),
        ("each sample has the first one's set", "i_set = tl.load(set_ptr + i_b)", "i_set = tl.load(set_ptr)"),
        ("the target is added", ".to(tl.float32) - target", ".to(tl.float32) + target"),
        (
            "the gradient lacks the number of samples",
            "(count.to(tl.float32) * (1.0 * n))",
            "(1.0 * n)",
            "several chunks",
        ),
        (
            "masked samples are read",
            "    total = 0.0\n    if w != 0:",
            "    total = 0.0\n    if w == w:",
            "masked samples",
        ),
        ("the loss lacks the weights", "loss += w * mean", "loss += mean"),
        ("the gradient is not written", "tl.store(grad_ptr + o,", "tl.store(grad_ptr + o + n * batch,"),
        ("the ticket is not set back", "tl.store(ticket_ptr, 0)", "pass"),
    ),
    *_of(
        "latent/guided_step",
        ("the mask covers too much", "mask = o_n < n", "mask = o_n < n + BLOCK"),
        ("the tail is dropped", "mask = o_n < n", "mask = o_n + 1 < n"),
        ("guidance starts from the wrong prediction", "output = base + coefficient", "output = output + coefficient"),
        ("the update has the wrong sign", "+ h * output\n    tl.store", "- h * output\n    tl.store"),
        ("the rules are mixed up", "if EULER:", "if not EULER:"),
        ("each sample has the first one's level", "coefficient(level, i_b, KIND_L)", "coefficient(level, 0, KIND_L)"),
        ("each sample goes to the first one's level", "coefficient(next_level, i_b,", "coefficient(next_level, 0,"),
    ),
    *_of(
        "gradients/surgery_dots",
        ("u.r is u.u", "ur += tl.sum(u * r, 1)", "ur += tl.sum(u * u, 1)"),
        ("only the last tile counts", "rr += tl.sum(r * r, 1)", "rr = tl.sum(r * r, 1)", "several chunks"),
        (
            "the mask covers too much",
            "u = tl.load(u_ptr + o, mask=o < length,",
            "u = tl.load(u_ptr + o, mask=o < length + 8,",
        ),
        (
            "the preconditioner lacks eps",
            "length, V, ALIGNED) + eps)",
            "length, V, ALIGNED) + 0 * eps)",
            "1 element, v",
        ),
        (
            "the preconditioner is squared",
            "weighted_u, weighted_r = u * weight",
            "weighted_u, weighted_r = u * weight * eps",
            "1 element, v",
        ),
        (
            "a segment takes the next one's chunk",
            "tl.load(first_ptr + i_segment + 1)",
            "tl.load(first_ptr + i_segment + 1) + 1",
        ),
        (
            "a segment's last chunk is dropped",
            "mask=o_c < end, other=0.0).to(tl.float64)",
            "mask=o_c + 1 < end, other=0.0).to(tl.float64)",
        ),
        (
            "the last tile is dropped",
            "for first in range(0, length, ROWS * WIDTH):",
            "for first in range(0, length - 1, ROWS * WIDTH):",
        ),
    ),
    Mutant(
        "surgery_dots",
        "a block takes its neighbour's scale",
        "common/tiles.py",
        "((phase + o) >> 8), mask=o < length",
        "((phase + o + 1) >> 8), mask=o < length",
        "flat, cut, 8-bit retain",
    ),
    Mutant(
        "surgery_dots", "codes are not divided by 127", "common/tiles.py", "1.0 / 127.0", "1.0 / 128.0", "8-bit retain"
    ),
    Mutant("surgery_dots", "chunks overlap", "gradients/segments.py", "begin = cut", "begin = max(cut - 1, begin + 1)"),
    *_of(
        "gradients/surgery_coefficients",
        ("conflict has the wrong sign", "tl.where(inner > 0, 0.0, inner)", "tl.where(inner < 0, 0.0, inner)"),
        ("rho is added", "1.0), 0.0) - rho", "1.0), 0.0) + rho", "rho"),
        ("the strength is missing", "strength * inner / tl", "inner / tl"),
        ("the clip is missing", "scale = tl.where(clip < 1.0, clip, 1.0)", "pass"),
        ("the clip also raises", "scale = tl.where(clip < 1.0, clip, 1.0)", "scale = clip"),
        ("the norm is that before surgery", "uu - 2 * c * ur + c * c * rr, (sums", "uu, (sums"),
        (
            "the flag is never raised",
            "tl.store(found_inf_ptr, tl.where(finite, 0.0, 1.0))",
            "tl.store(found_inf_ptr, 0.0)",
            "NaN",
        ),
        ("the plain columns decide", "square = tl.load(p_row + 5,", "square = tl.load(p_row + 2,", "preconditioned"),
    ),
    *_of(
        "gradients/surgery_apply",
        ("the correction has the wrong sign", "(u - coef * r) * scale", "(u + coef * r) * scale"),
        ("the clip is missing", "(u - coef * r) * scale", "(u - coef * r)"),
        ("the flag is ignored", "if (found_inf == 0) & (", "if (found_inf == found_inf) & (", "NaN in r, found_inf"),
        ("the scale is ignored where nothing conflicts", "((coef != 0) | (scale != 1))", "(coef != 0)", "clip only"),
        (
            "each segment has the first one's coefficient",
            "tl.load(coef_ptr + segment)",
            "tl.load(coef_ptr)",
            "in groups",
        ),
        ("stores are not masked", "corrected.to(U), mask=o < length)", "corrected.to(U))"),
        ("the last element is dropped", "corrected.to(U), mask=o < length)", "corrected.to(U), mask=o + 1 < length)"),
        ("copies are not written back", "tensor.copy_(ordered.view(tensor.shape))", "pass", "8-bit retain, transposed"),
    ),
    *_of(
        "quantize/blockwise_quantize",
        ("the scale is 128", "127.0 / tl.where(absmax > 0", "128.0 / tl.where(absmax > 0"),
        ("absmax is the largest value, without its sign", "tl.max(tl.abs(x).to(", "tl.max(tl.maximum(x, 0.0).to("),
        ("stores are not masked", "code, mask=o_row[:, None] < length)", "code)"),
        ("the last element is dropped", "x = tl.load(x_ptr + o, mask=o <", "x = tl.load(x_ptr + o, mask=o + 1 <"),
        ("the last block is dropped", "code, mask=o_row[:, None] < length)", "code, mask=o_row[:, None] + 9 < length)"),
        ("NaN is not noticed", 'tl.where(finite, absmax, float("nan"))', "absmax", "special blocks"),
        ("stochastic rounding is off by a half", "* _UNIT + _HALF_DOWN", "* _UNIT", "stochastic"),
        (
            "small blocks are not scaled up",
            "tl.where(absmax < _SMALL, _UP, 1.0)",
            "tl.where(absmax < 0, _UP, 1.0)",
            "special blocks",
        ),
    ),
    *_of(
        "quantize/blockwise_quantize",
        (
            "each block has the chunk's first scale",
            "absmax_ptr + (o_row >> 8), mask=o_row < length, other",
            "absmax_ptr + o_row * 0, mask=o_row < length, other",
        ),
        ("the scale is not applied", "x = (code * _PER_CODE) * absmax[:, None]", "x = code * _PER_CODE"),
        ("the tail is dropped", "tl.load(code_ptr + o, mask=o <", "tl.load(code_ptr + o, mask=o + 1 <"),
        ("tensors are mixed up", "tl.load(addresses_ptr + tensors + tensor)", "tl.load(addresses_ptr + tensors)"),
        op="blockwise_dequantize",
    ),
    *_of(
        "adamw8bit/kernel",
        (
            "the correction has the wrong sign",
            "g = g - coef * retain_tile",
            "g = g + coef * retain_tile",
            "flat, cut anywhere",
        ),
        ("the clip is missing", "                g = g * scale\n", "", "clip only"),
        ("the flag is ignored", "if found_inf == 0:", "if found_inf == found_inf:", "skipped"),
        (
            "the first moment's rest is not the gradient",
            "old1[:, None] + g * one_minus_beta1",
            "old1[:, None] + g * one_minus_beta2",
        ),
        (
            "the second moment is not squared",
            "old2[:, None] + (g * one_minus_beta2) * g",
            "old2[:, None] + g * one_minus_beta2",
        ),
        ("weight decay is missing", "p = p * decay - ", "p = p - "),
        ("the step has the wrong sign", "p = p * decay - ", "p = p * decay + "),
        ("eps is missing", "tl.sqrt(v) * inv_sqrt_bias2 + eps)", "tl.sqrt(v) * inv_sqrt_bias2)", "first step"),
        ("bias correction is missing", "tl.sqrt(v) * inv_sqrt_bias2 + eps)", "tl.sqrt(v) + eps)"),
        ("the copy is not written", "tl.store(c_ptr + o, p.to(C), mask=mask)", "pass", "master and copies"),
        ("lanes beyond the end count for absmax", "mask=mask, other=_ZERO_CODE)", "mask=mask, other=255)"),
        (
            "every chunk rounds with the same bits",
            "seed, element + o_row, WIDTH",
            "seed, element * 0 + o_row, WIDTH",
            "int8 retain, transposed",
        ),
        ("the second absmax is not written", "tl.store(vs_ptr + o_block,", "tl.store(ms_ptr + o_block,"),
        ("the tail is dropped", "mask, row_mask, o_block = o < length,", "mask, row_mask, o_block = o + 1 < length,"),
        ("no mask at all", "mask, row_mask, o_block = o < length,", "mask, row_mask, o_block = o < length + WIDTH,"),
        (
            "a segment reaches one element too far",
            "(place < tl.load(piece_ptr + 1))",
            "(place <= tl.load(piece_ptr + 1))",
            "flat, cut anywhere",
        ),
        op="adamw8bit_step",
    ),
]


def build(mutant: Mutant | None, folder: Path) -> Path:
    """A copy of the package below `folder`, broken by the mutant. Raises ValueError if the text is not there once."""
    target = folder / "fastunlearn_kernels"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        path = target / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times; it must be there once")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return folder


def judge(op: str, case: str, folder: Path) -> list[str]:
    """What the checks say about one op of the copy in `folder`, with that case first; the package must not have been
    imported before."""
    sys.path[:0] = [str(folder), str(ROOT / "tests" / "support")]
    sys.dont_write_bytecode = True
    try:
        import kernel_checks as checks

        from fastunlearn_kernels.testing import all_specs
    except Exception as error:
        return [f"{BROKEN}: {type(error).__name__}: {error}"]
    if not Path(all_specs.__file__).is_relative_to(folder):
        return [f"{BROKEN}: {all_specs.__file__} is not the copy"]
    spec = next(spec for spec in all_specs.ALL_SPECS if spec.name == op)
    if case and case not in {known.name for known in spec.cases}:
        return [f"{BROKEN}: {op} has no case {case!r}"]
    return checks.failures(spec, checks.device(), quick=True, first_case=case)


def in_child(op: str, case: str, folder: Path) -> tuple[int, int]:
    """(pid, file descriptor to read the verdict from)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            found = judge(op, case, folder)
        except BaseException as error:
            found = [f"{type(error).__name__}: {str(error)[:200]}"]
        os.write(writer, json.dumps(found).encode()[:60000])
        os._exit(0)
    os.close(writer)
    return pid, reader


def judge_all(jobs: list[tuple[str, str, str, Path]], workers: int) -> dict[str, list[str]]:
    """Name of the job -> failures found; each job is (name, op, case to try first, folder)."""
    verdicts: dict[str, list[str]] = {}
    running: dict[int, tuple[str, int]] = {}
    waiting = list(jobs)
    while waiting or running:
        while waiting and len(running) < workers:
            name, op, case, folder = waiting.pop(0)
            pid, reader = in_child(op, case, folder)
            running[pid] = (name, reader)
        pid, status = os.wait()
        name, reader = running.pop(pid)
        with os.fdopen(reader) as file:
            text = file.read()
        verdicts[name] = json.loads(text) if text else [f"the child ended with status {status}"]
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description="break the kernels, one line at a time")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for the copies")
    parser.add_argument("--json", type=Path, help="write {name: [failures]} here")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("ops", nargs="*", help="names; all if none is given")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1: the mutants are interpreted")
    # Before the children start, so that none of them has to load these; the first call of any op loads dynamo.
    import torch
    import torch._dynamo
    import triton  # noqa: F401

    torch.set_num_threads(1)
    began = time.perf_counter()
    mutants = [mutant for mutant in MUTANTS if not options.ops or mutant.op in options.ops]
    intact = options.folder.resolve() / "intact"
    build(None, intact)
    jobs = [(f"intact {op}", op, "", intact) for op in dict.fromkeys(mutant.op for mutant in mutants)]
    verdicts: dict[str, list[str]] = {}
    for i, mutant in enumerate(mutants):
        try:
            folder = build(mutant, options.folder.resolve() / str(i))
        except ValueError as error:
            verdicts[f"{mutant.op}: {mutant.what}"] = [f"{BROKEN}: {error}"]
            continue
        jobs.append((f"{mutant.op}: {mutant.what}", mutant.op, mutant.case, folder))
    verdicts |= judge_all(jobs, options.workers)
    if options.json:
        options.json.write_text(json.dumps(verdicts, indent=1) + "\n", encoding="utf-8")
    for name, found in verdicts.items():
        print(f"{name}: {found[0] if found else 'passes'}")
    print(f"{len(mutants)} mutants, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
