#!/usr/bin/env bash
# A LoRA adapter on one GPU. bash finetune_lora_single_gpu.sh --help: how to start it.
if [ -z "${BASH_VERSION:-}" ]; then echo "error: this script needs bash; start it as: bash $0 ..." >&2 && exit 2; fi
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch.sh
source "$here/launch.sh"

launch one "A LoRA adapter on one GPU" \
  --use_lora \
  --learning_rate 3e-4 --warmup_steps 0.01 \
  --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --logging_steps 1 \
  -- "$@"
