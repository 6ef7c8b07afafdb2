"""``fastunlearn doctor``: what this machine has for a run, and models with random weights to try it with.

Versions, devices, memory, and which choices of attention and optimizer can be met here. Whether a run fits is said by
``fastunlearn plan``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any, get_args

from fastunlearn.errors import UserError, nearest
from fastunlearn.models.formats.folder_configs import PUBLIC_MODELS
from fastunlearn.registry import OPTIMIZERS
from fastunlearn.schema.fields import WeightDtype
from fastunlearn.utils.environment import prepare_environment
from fastunlearn.utils.machine import PACKAGES, host_memory_bytes, package_version
from fastunlearn.utils.text import GIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument(
        "--make-random", nargs=2, metavar=("KIND", "DIR"),
        help=f"write a diffusers folder with random weights; KIND: {', '.join(PUBLIC_MODELS)}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=get_args(WeightDtype), help="of the weights (fp16)")
    parser.add_argument("--seed", type=int, help="of the weights (0)")
    parser.add_argument("--small-text-encoders", action="store_true", help="two layers each, of the same widths")
    parser.add_argument("--single-file", metavar="FILE", help="write the same model as one .safetensors file too")


def run(args: argparse.Namespace) -> int:
    """Report, or write a random model.

    Raises:
        UserError: an option that does not fit.
    """
    prepare_environment()
    if args.make_random is not None:
        return make_random(args)
    for option in ("dtype", "seed", "small_text_encoders", "single_file"):
        if getattr(args, option) not in (None, False):
            raise UserError(f"--{option.replace('_', '-')}: goes with --make-random KIND DIR")
    found = examine()
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 0


def make_random(args: argparse.Namespace) -> int:
    """Write the folder, and the file where one is asked for.

    Raises:
        UserError: an unknown kind, or a place that is taken or too small.
    """
    kind, folder = args.make_random[0], Path(args.make_random[1]).expanduser()
    file = None if args.single_file is None else Path(args.single_file).expanduser()
    if kind not in PUBLIC_MODELS:
        raise UserError(
            f"--make-random: {kind!r} is unknown; allowed are {', '.join(PUBLIC_MODELS)}{nearest(kind, PUBLIC_MODELS)}"
        )
    seed = args.seed or 0
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed: {seed} is not allowed; a whole number from 0 to 2147483647 is needed")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--make-random: {str(folder)!r} exists; give a new folder")
    if file is not None:
        if file.suffix != ".safetensors":
            raise UserError(f"--single-file: {str(file)!r} must end in .safetensors")
        if file.exists():
            raise UserError(f"--single-file: {str(file)!r} exists; give a new name")
        if args.small_text_encoders:
            raise UserError("--small-text-encoders: readers of a single file expect whole text encoders; drop one")
    architecture = PUBLIC_MODELS[kind]
    if args.small_text_encoders:
        architecture = architecture.with_small_text_encoders()
    _check_space(folder, kind, args.dtype or "fp16", copies=1 if file is None else 2)
    from fastunlearn.models.formats.random_weights import write_file, write_folder
    from fastunlearn.utils.dtypes import DTYPES

    dtype = DTYPES[args.dtype or "fp16"]
    sizes = write_folder(architecture, folder, dtype, seed)
    if file is not None:
        write_file(architecture, file, dtype, seed)
    if args.json:
        print(json.dumps({"kind": kind, "folder": str(folder), "file": args.single_file, "parameters": sizes}))
        return 0
    print(f"{folder}: {architecture.title} with random weights in {args.dtype or 'fp16'}, seed {seed}; it draws noise")
    encoders = " of two layers (the widths are the real ones)" if args.small_text_encoders else ""
    for name, size in sizes.items():
        print(f"  {name:<15}{size:>14,} parameters{encoders if name.startswith('text') else ''}")
    print(f"  {'tokenizer':<15}{'':>14} CLIP's own vocabulary; predicts {architecture.scheduler['prediction_type']}")
    if file is not None:
        print(f"{file}: the same weights in one file")
    return 0


def _check_space(folder: Path, kind: str, dtype: str, copies: int) -> None:
    """Refuse a disk that is too small; text encoders and VAE come to less than half of a full-size U-Net."""
    parent = next(path for path in folder.absolute().parents if path.is_dir())
    needed = copies * PUBLIC_MODELS[kind].unet_parameters * (4 if dtype == "fp32" else 2) * 3 // 2
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"--make-random: {str(parent)!r} has {free / GIB:.1f} GiB free, and {kind} in {dtype} needs up to "
            f"{needed / GIB:.1f} GiB; free some space, or choose another disk"
        )


def examine() -> dict[str, Any]:
    """What is here: versions, GPUs, cores, memory, and what can be chosen."""
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    total, free = host_memory()
    return {
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "gpus": [
            {"name": gpu.name, "memory_gib": round(gpu.total_memory / GIB, 1), "sm": f"{gpu.major}{gpu.minor}"}
            for gpu in gpus
        ],
        "cuda": torch.version.cuda if gpus else None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": {"total": total, "available": free},
        "attention": attention(torch),
        "optimizers": optimizers(bool(gpus)),
        "compiler": shutil.which(os.environ.get("CXX", "c++")),
        "hub": {"offline": _flag("HF_HUB_OFFLINE"), "home": os.environ.get("HF_HOME", "~/.cache/huggingface")},
    }


def attention(torch: Any) -> dict[str, str]:
    """Each choice of ``model.attention`` in bf16: "yes", or why not."""
    from fastunlearn.schema.attention_rules import CHOICES, attention_refusal

    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if gpu else None
    reasons = {choice: attention_refusal(choice, "cuda" if gpu else "cpu", "bf16", capability) for choice in CHOICES}
    return {
        choice: "yes" if reason is None else f"no: {reason.removeprefix('model.attention: ')}"
        for choice, reason in reasons.items()
    }


def optimizers(gpu: bool) -> dict[str, str]:
    """Each choice of ``optimizer.name``: "yes", or why not."""
    return {name: spec.availability(gpu) for name, spec in OPTIMIZERS.items()}


def host_memory() -> tuple[float | None, float | None]:
    """(total, available) GiB of this machine, where the system tells."""
    found = host_memory_bytes()
    total, free = (found.get(name) for name in ("MemTotal", "MemAvailable"))
    return (round(total / GIB, 1), round(free / GIB, 1)) if total and free else (None, None)


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() in ("1", "true", "yes", "on")


def render(found: dict[str, Any]) -> str:
    """The report as lines."""
    versions = {"python": found["python"], **found["versions"]}
    rows = [("versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number))]
    missing = [name for name, number in found["versions"].items() if number is None]
    if missing:
        rows.append(("not installed", ", ".join(missing)))
    names = [f"{gpu['name']}, {gpu['memory_gib']} GiB, sm_{gpu['sm']}" for gpu in found["gpus"]]
    rows.append(("GPU", "; ".join(names) + f" (CUDA {found['cuda']})" if names else "none"))
    memory = found["memory_gib"]
    known = "not known" if memory["total"] is None else f"{memory['total']} GiB, {memory['available']} available"
    rows += [("cores", str(found["cores"])), ("memory", known)]
    for name in ("attention", "optimizers"):
        rows += [(f"{name}: {choice}", answer) for choice, answer in found[name].items()]
    rows.append(("C++ compiler", found["compiler"] or "none: DeepSpeed needs one on a CPU (or set CXX)"))
    offline = " (offline: HF_HUB_OFFLINE is set)" if found["hub"]["offline"] else ""
    rows.append(("hub cache", found["hub"]["home"] + offline))
    return "\n".join(f"{name:<28}{text}" for name, text in rows)
