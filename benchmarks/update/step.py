"""What surgery or a meta term costs per update: seconds, U-Net evaluations, peak memory and bytes sent, by ZeRO stage
and world size.

Beside each other in one run: no surgery, surgery with the retain gradient as it comes and in 8 bits, and "literal": the
projection as published, a Python loop over tensors that asks the device about each. The loop needs whole gradients, so
it stands at stage 0 on one rank only.

    python benchmarks/update/step.py --stages 0 2 --worlds 1 2 --updates 20 --json output/step.json
    python benchmarks/update/step.py --modes off meta "meta published" "meta literal" --stages 0 1 --json meta.json

"meta published" is the term with the published loss and attack, "meta literal" the same with a copy of the model in
every update.

Each row is a process group of its own on MiniCanvas (--config, --set change that). On a CPU the seconds say little
about a GPU; evaluations and bytes do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks" / "update")]
MODES = ("off", "surgery", "surgery int8", "literal", "meta", "meta published", "meta literal")
SURGERY_MODES = MODES[:4]
COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor",
    "reduce_scatter",
)  # fmt: skip
WARMUP = 2
# Ascent after a fresh attack of three steps, with the losses on what is kept as differences.
PUBLISHED = [
    "--meta.forbidden_loss", "ascent", "--meta.negative_guidance", "0", "--meta.forbidden_weight", "0.1",
    "--meta.restart_every", "1", "--meta.inner_steps", "3",
]  # fmt: skip


def overrides(mode: str) -> list[str]:
    pool = ["--retain.num_images", "8", "--retain.num_inference_steps", "4"]  # drawn before the first update
    if mode == "off":
        return []
    if mode.startswith("meta"):
        return ["--meta.enabled", "true", "--meta.num_images", "8", *pool, *(PUBLISHED if mode != "meta" else [])]
    dtype = "int8" if mode == "surgery int8" else "auto"
    return ["--surgery.enabled", "true", "--surgery.rho", "1.0", "--surgery.retain_dtype", dtype, *pool]


def worker(args: argparse.Namespace) -> None:
    """One row, on every rank; rank 0 writes it."""
    from fastunlearn.utils.environment import prepare_environment

    prepare_environment(cpu_threads=1)
    from baselines.deep_copy_meta import DeepCopyMeta

    from fastunlearn.config import load_config
    from fastunlearn.training.setup import prepare
    from fastunlearn.training.trainer import one_update
    from fastunlearn.utils.distributed import disconnect, init_distributed
    from fastunlearn.utils.memory import peak_memory_bytes

    sent, asked = count_bytes(), count_decisions()  # before DeepSpeed looks its collectives up
    world = init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        options = [*overrides(args.mode), "--zero.stage", str(args.stage), "--output_dir", folder, *args.set]
        run = prepare(load_config(args.config, options), world)
        spent: list[float] = []
        if run.surgery is not None:
            if args.mode == "literal":
                run.surgery.project = literal(run.surgery)  # type: ignore[method-assign]
            run.surgery.project = timed(run.surgery.project, spent)  # type: ignore[method-assign]
        if run.meta is not None:
            if args.mode == "meta literal":
                run.meta.window = DeepCopyMeta(run).window  # type: ignore[method-assign]
            run.meta.window = timed(run.meta.window, spent)  # type: ignore[method-assign]
        seconds, before = [], 0
        for number, step in enumerate(run.table[: WARMUP + args.updates]):
            if step.restart:
                run.rollout.restart(step)
            if number == WARMUP:
                sent[0], asked[0], before = 0, 0, run.models.evaluations.total
                spent.clear()
            started = time.perf_counter()
            one_update(run, step)
            if world.device.type == "cuda":
                import torch

                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    row = {
        "mode": args.mode, "stage": args.stage, "world_size": world.world_size, "device": str(world.device),
        "seconds": statistics.median(seconds[WARMUP:]), "extra_seconds": statistics.median(spent) if spent else 0.0,
        "unet_evaluations": (run.models.evaluations.total - before) / args.updates,
        "peak_memory_bytes": peak_memory_bytes(world.device), "bytes_sent": sent[0] / args.updates,
        "host_decisions": asked[0] / args.updates,
    }  # fmt: skip
    if world.is_main:
        Path(args.row).write_text(json.dumps(row), encoding="utf-8")
    disconnect()


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments, **options)
        spent.append(time.perf_counter() - started)
        return result

    return call


def literal(surgery: Any) -> Callable[..., Any]:
    """The published loop: norms and dot of each tensor, an `if` on the device's answer, then torch's clipping."""
    import torch

    from fastunlearn.gradients.projection import Figures
    from fastunlearn_kernels import Plan

    def project(pieces: list[Any], *_: Any) -> Figures:
        table = torch.zeros(len(pieces), 3, dtype=torch.float64)
        for i, (piece, retain) in enumerate(zip(pieces, surgery.kept._kept, strict=True)):
            u, r = piece.tensor, retain.to(piece.tensor.dtype)
            dot = torch.dot(u, r)
            if dot < 0:
                u.sub_(r * (dot / torch.dot(r, r)))
            u.add_(r, alpha=surgery.cfg.rho)
            table[i] = torch.stack([torch.dot(u, u), dot, torch.dot(r, r)])
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(piece.tensor) for piece in pieces]))
        one, zero = torch.ones(()), torch.zeros(())
        return Figures(table, Plan(zero.expand(len(pieces)), one, zero, norm))

    return project


def count_bytes() -> list[int]:
    """A counter of the bytes of the collectives that this rank takes part in, from now on."""
    import torch.distributed as dist

    total = [0]

    def size(argument: Any) -> int:
        if isinstance(argument, list | tuple):
            return sum(map(size, argument))
        return argument.numel() * argument.element_size() if hasattr(argument, "element_size") else 0

    def counting(name: str) -> None:
        real = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if dist.get_world_size() > 1:
                total[0] += max(map(size, (*arguments, *options.values())))
            return real(*arguments, **options)

        setattr(dist, name, call)

    for name in COLLECTIVES:
        counting(name)
    return total


def count_decisions() -> list[int]:
    """A counter of how often Python asks a tensor for its value, from now on. On a GPU what surgery adds to "off" waits
    for the device; most of the rest are AdamW's step counts, which lie on the host."""
    import torch

    total = [0]

    def counting(name: str) -> None:
        real = getattr(torch.Tensor, name)

        def call(tensor: Any) -> Any:
            total[0] += 1
            return real(tensor)

        setattr(torch.Tensor, name, call)

    for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
        counting(name)
    return total


def table(rows: list[dict[str, Any]]) -> str:
    head = "| mode | stage | ranks | s | of it extra | against off | U-Net evaluations | peak MB | MB sent |"
    lines = [head, "|" + "---|" * 9]
    off = {(row["stage"], row["world_size"]): row["seconds"] for row in rows if row["mode"] == "off"}
    for row in rows:
        base = off.get((row["stage"], row["world_size"]))
        cells = [row["mode"], row["stage"], row["world_size"], f"{row['seconds']:.3f}"]
        cells += [f"{row['extra_seconds'] / row['seconds']:.1%}"]
        cells += ["-" if base is None else f"{row['seconds'] / base:.2f}x"]
        cells += [f"{row['unet_evaluations']:.1f}", f"{row['peak_memory_bytes'] / 2**20:.0f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['bytes_sent'] / 2**20:.2f}"])) + " |")
    return "\n".join(lines)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Run every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "minicanvas_style.toml"))
    parser.add_argument("--modes", nargs="+", default=list(SURGERY_MODES), choices=MODES)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--set", nargs=argparse.REMAINDER, default=[], help="overrides of the configuration, last")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    for hidden in ("--mode", "--stage", "--row", "--local_rank"):
        parser.add_argument(hidden, type=int if hidden in ("--stage", "--local_rank") else str, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return worker(args)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in args.stages:
            for world in args.worlds:
                for mode in args.modes:
                    if "literal" in mode and (stage, world) != (0, 1):
                        continue
                    row = Path(folder) / "row.json"
                    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
                    command += ["--master_port", str(free_port()), __file__]
                    command += ["--mode", mode, "--stage", str(stage), "--row", str(row), "--config", args.config]
                    command += ["--updates", str(args.updates), "--set", *args.set]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        sys.exit(f"{mode}, stage {stage}, {world} ranks failed:\n{done.stderr[-2000:]}")
                    rows.append(json.loads(row.read_text(encoding="utf-8")))
                    print(table(rows).splitlines()[-1], file=sys.stderr)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
