"""A start-up without noise: log levels and thread counts, set before the heavy libraries are imported.

Environment variables and logger levels silence messages that the user can do nothing about. Errors still show, and
warnings about the run itself are ours and are printed.

Import and call ``prepare_environment`` before torch, deepspeed, transformers or diffusers. It imports none of them.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from fastunlearn.utils.processes.ranks import free_port, place

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
}
CACHES = {"TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib"}
NOISY_LOGGERS = (
    "DeepSpeed",
    "deepspeed",
    "bitsandbytes",
    "torch.distributed",
    "diffusers",
    "transformers",
    "kernels",
    "huggingface_hub",
)


def prepare_environment(cpu_threads: int = 0) -> None:
    """Silence library start-up, choose the CPU threads of this rank, and make a lone process its own world.

    Two-thread convolution backward on a busy machine can be ten times slower than one thread, so a rank takes its share
    of the cores, never all of them twice. OMP_NUM_THREADS overrides the choice, and ``cpu_threads`` that.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    _find_room_for_caches()
    # What torch.compile builds with, such as ninja, lies beside this interpreter, activated or not.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": nested, the outer one
    share = int(asked) if asked.isdecimal() and int(asked) else (os.cpu_count() or 1) // max(1, ranks_here)
    threads = cpu_threads or max(1, share)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["MKL_NUM_THREADS"] = str(threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|deepspeed|diffusers|transformers|bitsandbytes)\b"
    )
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "RANK" not in os.environ:
        _single_process_world()


def _find_room_for_caches() -> None:
    """Where the home folder cannot be written, compiled kernels and fonts go to the system's temporary folder.

    Code is loaded from there, so what somebody else has put under that name, or may write, is not used.
    """
    if os.access(os.path.expanduser("~"), os.W_OK):
        return
    try:
        folder = Path(tempfile.gettempdir()) / f"fastunlearn-caches-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    except OSError:  # no temporary folder either: the libraries do without
        return
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(folder / name))


def _single_process_world() -> None:
    """What a launcher would have set for one rank."""
    os.environ |= place(0, 1, free_port())
