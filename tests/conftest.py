"""Settings for every test: one CPU thread, no network, no chatter. Set before torch or transformers is imported.

Without a GPU the Triton kernels are interpreted; that must be known before the first of them is imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Fuzzers look at a few cases, the same in every test run; `make fuzz` lets them look at as many new ones as it is told.
CASES = int(os.environ.get("FASTUNLEARN_FUZZ", "0"))
settings.register_profile("few", max_examples=40, derandomize=True, deadline=None, database=None)
settings.register_profile("many", max_examples=max(CASES, 1), deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("many" if CASES else "few")


# A worker of pytest-xdist that begins a long file when the others are done lets them wait: the longest come first.
LONGEST = (
    "test_surgery_matrix.py", "test_train.py", "test_plan_peak.py", "test_distributed.py", "test_planning.py",
    "test_meta.py", "test_kernels_mutations.py", "test_minicanvas.py", "test_finite_guard.py", "test_golden_losses.py",
    "test_kills.py", "test_throughput.py", "test_speed.py", "test_relearn.py", "test_sdd.py", "test_closed_form.py",
    "test_kernels_aot.py", "test_extensions.py", "test_wheel.py", "test_kernels_benchmark.py", "test_python.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files by how long they take, roughly; skip what is marked `gpu` where there is none."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers, alone or in company."""
    torch.manual_seed(0)
