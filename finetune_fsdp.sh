#!/usr/bin/env bash
# All weights on all GPUs, with FSDP2. bash finetune_fsdp.sh --help: how to start it.
if [ -z "${BASH_VERSION:-}" ]; then echo "error: this script needs bash; start it as: bash $0 ..." >&2 && exit 2; fi
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch.sh
source "$here/launch.sh"

launch all "All weights on all GPUs, with FSDP2" \
  --fsdp --fsdp_config "$here/recipe/distributed/fsdp_config.json" \
  --learning_rate 1e-5 --warmup_steps 0.01 \
  --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --logging_steps 1 \
  -- "$@"
