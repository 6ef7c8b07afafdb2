#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the whole-step tables of full-size SDXL with random weights (no disk, no download).
#
#   bash benchmarks/gpu_whole_step.sh STEP     STEP: tables, levers, caps, baselines, wholes, profile; or all
#
# Each step stops well inside ten minutes (LIMIT, 540 s), keeps each row as it is done, and goes on where it stopped when
# it is started again. Rows: $OUT/whole_step_<gpu>.json (OUT: benchmarks/results), the report beside it as .md.
# WHEELS=folder installs the wheels that lie there first, for a machine without a network.
# Without a GPU, REHEARSE=1 runs the same rows on a tiny model: it tests the script and says nothing about a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-${VENV:-.venv}/bin/python}"
command -v "$python" >/dev/null || python=python3
unset TRITON_INTERPRET
export OMP_NUM_THREADS=1
test -z "${WHEELS:-}" || "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
model=(--model sdxl-random --updates 5 --warmup 2)
limit="${LIMIT:-540}"
out="${OUT:-benchmarks/results}"
small=()
if test -n "${REHEARSE:-}"; then
	gpu=${gpu:-cpu}
	model=(--model tiny-sdxl-random --updates 1 --warmup 1 --walk 1)
	out="${OUT:-output}"
	small=(resolution=64)
fi
test -n "$gpu" || { echo "error: no CUDA device; REHEARSE=1 tries the script on a tiny model" >&2; exit 2; }
file="$out/whole_step_$(echo "$gpu" | tr 'A-Z ' 'a-z_' | tr -cd 'a-z0-9_-')"

# Groups of rows, separated by "--": each becomes a --sweep.
run() {
	local arguments=(--sweep "${small[@]}") word
	for word in "$@"; do
		case $word in
		--) arguments+=(--sweep "${small[@]}") ;;
		cap=*) test -n "${REHEARSE:-}" || arguments+=("$word") ;; # a CPU process has no cap
		*) arguments+=("$word") ;;
		esac
	done
	echo "== $step: $gpu"
	"$python" benchmarks/update/throughput.py "${model[@]}" --time-limit "$limit" --json "$file.json" --markdown "$file.md" "${arguments[@]}"
}

one_step() {
	local eight=optimizer=adamw8bit fused=engine=fused
	case $step in
	tables) # scope, surgery, engine at batch 1
		run scope=attn2,noxattn,full engine=zero,fused surgery=off,int8,bf16 $eight ;;
	levers) # batch, attention, what is off by default, ZeRO's stages
		run scope=attn2,noxattn,full $fused $eight batch=2,4 -- \
			scope=attn2 $fused $eight attention=sdpa-flash,sdpa-cudnn,sdpa-efficient,xformers -- \
			scope=attn2 $fused $eight batch=4 model.channels_last=true -- \
			scope=attn2 $fused $eight batch=1,4 model.compile=regional -- \
			scope=attn2 $fused $eight batch=1,4 model.cuda_graphs=true -- \
			scope=attn2,noxattn $fused $eight model.cache_prompt_keys=true -- \
			scope=attn2 $fused $eight teacher.storage=int8,cached -- \
			scope=attn2 engine=zero $eight stage=0,2,3 ;;
	caps) # smaller cards: the allocator gets the cap less 1 GiB
		run scope=attn2 $fused $eight surgery=int8 checkpointing=true cap=10,12 -- \
			scope=full $fused $eight surgery=int8 checkpointing=true fused.offload_optimizer=cpu cap=12,16 -- \
			scope=full $fused $eight surgery=int8 checkpointing=true fused.offload_optimizer=cpu teacher.storage=int8 cap=12 -- \
			scope=full $fused $eight surgery=int8 checkpointing=true cap=18,24 -- \
			scope=full $fused $eight surgery=int8 checkpointing=true teacher.storage=int8 cap=18 -- \
			scope=full $fused $eight surgery=off checkpointing=true teacher.storage=exact,int8 cap=14,16 -- \
			scope=noxattn $fused $eight surgery=int8 checkpointing=true cap=12,16 -- \
			scope=attn2 engine=zero $eight surgery=int8 checkpointing=true cap=12,16 ;;
	baselines) # the same concepts the way others do it, and ours beside them; the object's fp32 row needs checkpointing
		run kind=style,object $fused $eight -- \
			method=esd scope=attn2 $fused $eight train.max_train_steps=200 -- \
			method=doco $eight batch=4 checkpointing=true -- \
			kind=style baseline=quick_kscu,esd_sdxl -- \
			kind=style baseline=paper_kscu precision=published,bf16 -- \
			kind=object baseline=quick_kscu -- \
			kind=object baseline=paper_kscu precision=published,bf16 checkpointing=true -- \
			baseline=doco_loop batch=4 checkpointing=true precision=published,bf16 ;;
	wholes) # by the wall clock, every update and restart
		run $fused $eight kind=style whole=true -- $fused $eight kind=object whole=true ;;
	profile)
		run scope=attn2 $fused $eight surgery=off,int8 profile=true -- scope=attn2 engine=zero $eight surgery=int8 profile=true -- \
			scope=full $fused $eight surgery=int8 profile=true ;;
	*)
		echo "error: step '$step' is unknown; allowed are tables, levers, caps, baselines, wholes, profile, all" >&2
		exit 2 ;;
	esac
}

test $# -gt 0 || { echo "error: which step? tables, levers, caps, baselines, wholes, profile, or all" >&2; exit 2; }
steps=("$@")
test "$1" != all || steps=(tables levers caps baselines wholes profile)
for step in "${steps[@]}"; do one_step; done
