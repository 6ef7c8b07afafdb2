#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the kernels' tests, compute-sanitizer on a small case of each op, then the benchmarks;
# writes benchmarks/results/kernels_<gpu>.json and .md. `make gpu-kernels` calls it. KERNEL_SIZES chooses the sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${VENV:-.venv}/bin/python"
test -x "$python" || python=python3
unset TRITON_INTERPRET
export OMP_NUM_THREADS=1

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
test -n "$gpu" || { echo "error: no CUDA device; without one, make test proves what can be proven" >&2; exit 2; }
name=$(echo "$gpu" | tr 'A-Z ' 'a-z_' | tr -cd 'a-z0-9_-')
echo "== $gpu, driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1), commit $(git rev-parse --short HEAD 2>/dev/null || echo '?')"

echo "== tests"
"$python" -m pytest tests/ops/test_kernels_*.py

if command -v compute-sanitizer >/dev/null; then
	for tool in memcheck racecheck; do
		echo "== compute-sanitizer $tool"
		# The allocator of torch would hide what lies beyond a tensor, within its own blocks.
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
			"$python" tests/support/kernel_checks.py --case "1000 elements"
	done
else
	echo "== compute-sanitizer is not on PATH: memcheck and racecheck are left out"
fi

echo "== benchmarks"
mkdir -p benchmarks/results
"$python" -m pytest benchmarks/ops/test_kernels.py --benchmark-json="benchmarks/results/kernels_$name.json" --benchmark-disable-gc -q
"$python" benchmarks/ops/kernel_table.py "benchmarks/results/kernels_$name.json" --output "benchmarks/results/kernels_$name.md"
echo "== benchmarks/results/kernels_$name.md"
