#!/bin/bash
# Trains a GPT with Megatron-LM's own pretrain_gpt.py and FlashMuon on its distributed optimizer.
#
#   MEGATRON=~/Megatron-LM NPROC=8 launch/megatron_train.sh --tensor-model-parallel-size 2
#
# Mock data and a 1.2B model by default; further arguments are Megatron's and win over these.
# Resume with other sizes of data, tensor or pipeline parallelism: --load the folder of --save.
set -eu
: "${MEGATRON:?folder of a checkout of Megatron-LM (core_v0.16.1 or later)}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONPATH="$MEGATRON${PYTHONPATH:+:$PYTHONPATH}"

defaults=(
  --num-layers 24 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16
  --group-query-attention --num-query-groups 8 --swiglu --disable-bias-linear
  --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
  --seq-length 2048 --max-position-embeddings 2048 --attention-dropout 0 --hidden-dropout 0
  --micro-batch-size 4 --global-batch-size 256 --train-iters 1000 --bf16
  --mock-data --tokenizer-type NullTokenizer --vocab-size 32767
  --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 100
  --weight-decay 0.1 --clip-grad 1.0 --log-interval 10 --eval-iters 0
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable --save-interval 500
  --optimizer flashmuon --muon-momentum 0.95 --flashmuon-adjust-lr-fn match_rms_adamw
)
exec torchrun --nproc-per-node "${NPROC:-1}" -m flashns_dist.integrations.megatron \
  "$MEGATRON/pretrain_gpt.py" "${defaults[@]}" "$@"
