#!/usr/bin/env bash
# One session on GPUs that are there for minutes: tests, tuning and measurements in one command.
#
#     OUT=results PARTS="tests orthogonalize deepspeed step fsdp megatron training" launch/bench/gpu_session.sh
#
# Run in the repository's root, with torch, triton and pytest installed. Peers are used where they
# can be imported: gram-newton-schulz, quack, dion (also from .carry/dion), deepspeed, megatron-core.
# Every part has a limit in seconds (TESTS_S, ORTHOGONALIZE_S, DEEPSPEED_S, STEP_S, MORE_S, FSDP_S,
# MEGATRON_S, TRAINING_S), writes JSON lines into OUT and ends with a line that says when. Where
# there are fewer than four GPUs, tests and Megatron run four ranks on them, for their results.
set -u
OUT=${OUT:-results} PARTS=${PARTS:-tests orthogonalize step}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 NCCL_NVLS_ENABLE=0
export FLASHNS_DIST_CACHE=${FLASHNS_DIST_CACHE:-/tmp/flashns-dist} PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD
mkdir -p "$OUT"
# Where the package is not installed: what installing maps there.
python3 -c 'import flashns_dist.integrations' 2>/dev/null || ln -sfn ../integrations flashns_dist/integrations
GPUS=$(nvidia-smi -L | wc -l)
SHARE=$((GPUS < 4))
begin=$(date +%s)
say() { echo "[$(($(date +%s) - begin)) s] $*"; }
has() { [[ " $PARTS " == *" $1 "* ]]; }
ranks() { # seconds, ranks, port, program and arguments
  timeout "$1" python3 -m torch.distributed.run --nproc-per-node "$2" --rdzv-backend c10d \
    --rdzv-endpoint "127.0.0.1:$3" "${@:4}"
}
log() { grep -v -i -E 'warn|^ *$' | tail -"${1:-30}" | cut -c1-300; }
# Every result in a line of its own: the names of failures are there even if the time runs out.
PYTEST="python3 -m pytest -v --tb=short -p no:cacheprovider -n ${WORKERS:-4}"
results() { tee "$OUT/$1.log" | grep -E 'FAILED|ERROR|^E  |passed|failed' | tail -40 | cut -c1-220; grep -c PASSED "$OUT/$1.log"; }

if has tests; then
  timeout "${TESTS_S:-240}" $PYTEST tests/orthogonalize tests/optim/test_graph.py \
    tests/optim/test_fused.py tests/optim/test_rules.py tests/optim/test_overlap.py \
    tests/optim/test_speculation.py tests/optim/test_calibration.py 2>&1 | results tests
  say "tests of the kernels and the step"
fi
if has invariance; then # one process start takes 10 to 15 s on such machines
  FLASHNS_DIST_SHARE_GPUS=$SHARE timeout "${INVARIANCE_S:-300}" $PYTEST \
    tests/optim/test_invariance.py tests/exchange 2>&1 | results invariance
  say invariance
fi
if has orthogonalize; then
  python3 -m launch.bench.orthogonalize --out "$OUT" --minutes "$(awk "BEGIN {print (${ORTHOGONALIZE_S:-280} - 10) / 60}")" \
    --no-accuracy --tune --compiled --reserve 12 \
    --shapes baseline,gpt2,llama3-8b,qwen3-30b-a3b,deepseek-v3 \
    --candidates "auto;unbiased;fast;gram;gram-newton-schulz;gram-newton-schulz compiled" 2>&1 | log 60
  say orthogonalize
fi
if has deepspeed; then
  ranks "${DEEPSPEED_S:-130}" 2 29600 launch/bench/deepspeed_step.py --size 160m --steps 8 --warmup 4 --rounds 1 --out "$OUT/deepspeed" 2>&1 | log 10
  say deepspeed
fi
if has step; then
  OPTIONS=${OPTIONS:-'[{"name": "FlashMuon defaults"}, {"name": "FlashMuon graph", "cuda_graph": true}]'}
  SHARING='[{"name": "FlashMuon defaults", "cases": "experts"}, {"name": "FlashMuon graph", "cases": "experts", "cuda_graph": true},
    {"name": "FlashMuon share", "cases": "@", "cuda_graph": true, "exchange": {"replicas": "share"}},
    {"name": "FlashMuon repeat", "cases": "@", "cuda_graph": true, "exchange": {"replicas": "repeat"}}]'
  MORE=experts,experts:rows
  [ "$GPUS" -ge 2 ] && MORE=$MORE,1b@2x$((GPUS / 2))
  [ "$GPUS" -ge 4 ] && MORE=$MORE,7b@2x$((GPUS / 2))
  # dion compiles for a minute: at the same time as our tuning.
  (ranks "${WARM_S:-110}" "$GPUS" 29601 launch/bench/step.py --cases 1b,7b --candidates "dion gram" --steps 3 \
    --minutes 1.6 --out "$OUT/warm" >"$OUT/warm.log" 2>&1) &
  ranks "${WARM_S:-110}" "$GPUS" 29602 launch/bench/step.py --tune-only --tune-minutes 1 --cases 1b,7b \
    --options "$OPTIONS" --out "$OUT/tune" >"$OUT/tune.log" 2>&1
  wait
  say "tuned and compiled"
  ranks 45 "$GPUS" 29603 -m flashns_dist.optim.calibration --seconds 10 --shapes "$OUT/tune/shapes.json" \
    --out "$OUT/calibration.json" 2>&1 | log 3
  say calibrated
  ranks "${STEP_S:-120}" "$GPUS" 29604 launch/bench/step.py --cases 1b,7b --steps 10 --options "$OPTIONS" \
    --candidates "FlashMuon,fused AdamW,dion gram" --cost "$OUT/calibration.json" --minutes 1.7 --profile 7b --out "$OUT" 2>&1 | log
  say step
  ranks "${MORE_S:-90}" "$GPUS" 29605 launch/bench/step.py --tune --tune-minutes 0.4 --cases "$MORE" --options "$SHARING" \
    --candidates "FlashMuon,fused AdamW,dion gram" --cost "$OUT/calibration.json" --minutes 1.2 --out "$OUT/more" 2>&1 | log
  say "experts and replicas"
fi
if has fsdp; then
  ranks "${FSDP_S:-120}" "$GPUS" 29607 launch/bench/fsdp_step.py --size 1b --minutes 1.2 --out "$OUT" 2>&1 | log 5
  say fsdp
fi
if has megatron; then
  for layout in "2 1,2" "4 2"; do
    FLASHNS_DIST_SHARE_GPUS=$SHARE CUDA_DEVICE_MAX_CONNECTIONS=1 ranks "${MEGATRON_S:-70}" "${layout% *}" 29606 launch/bench/megatron_step.py \
      --tensor-parallel "${layout#* }" --warmup 2 --steps 5 --out "$OUT/megatron-${layout% *}" 2>&1 | log 10
    say "megatron on ${layout% *}"
  done
fi
if has training; then # a share of the optimizers on each GPU; join with python -m launch.bench.outcome
  names=(adamw torch-muon muon-standard muon-gram muon-unbiased muon-fast muon-aol normuon adamuon dion2 dion)
  for ((gpu = 0; gpu < GPUS; gpu++)); do
    share=$(for ((i = gpu; i < ${#names[@]}; i += GPUS)); do echo -n "${names[i]},"; done)
    CUDA_VISIBLE_DEVICES=$gpu timeout "${TRAINING_S:-400}" python3 -m launch.bench.training --size gpt2-small --steps 100 \
      --seeds 3 --only "${share%,}" --out "$OUT/training-$gpu" >"$OUT/training-$gpu.log" 2>&1 &
  done
  wait
  say training
fi
