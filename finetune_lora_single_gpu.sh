#!/bin/sh
# A LoRA adapter on one GPU. bash finetune_lora_single_gpu.sh --help shows how to start it.
here=$(cd "$(dirname "$0")" && pwd)
if [ -x "$here/.venv/bin/python" ]; then python=${PYTHON:-"$here/.venv/bin/python"}; else python=${PYTHON:-python3}; fi
if ! command -v "$python" >/dev/null; then
  echo "error: $python: no such program; run $here/setup.sh requirements.txt, or name a Python: PYTHON=python3.11 bash ..." >&2
  exit 2
fi
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$python" -P -m recipe.launch "$0" one "A LoRA adapter on one GPU" \
  --use_lora -- "$@"
