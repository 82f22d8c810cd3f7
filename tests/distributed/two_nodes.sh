#!/usr/bin/env bash
# Two machines that train together, lose each other and go on: network namespaces stand for the machines, a veth pair
# for the cable. As root, on Linux: bash tests/distributed/two_nodes.sh [LAUNCHER [FLAG ...]]. It trains a tiny random
# model on the CPU with finetune_lora_ds.sh, cuts the cable after the first checkpoint, and looks at what both do.
# Exit code 0: all checks passed, 1: one failed, 77: namespaces are not allowed here.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
launcher=${1:-finetune_lora_ds.sh}
python=${PYTHON:-$root/.venv/bin/python}
hosts=("finetune-$$-0" "finetune-$$-1")
port=29500
steps=600 # long enough to be cut in the middle
failed=0

clean() {
  trap - EXIT INT TERM
  local host pid
  for host in "${hosts[@]}"; do
    for pid in $(ip netns pids "$host" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null; done
    ip netns delete "$host" 2>/dev/null
  done
  if ((failed)); then echo "the logs are in $work"; else rm -rf "$work"; fi
}

check() { # check WHAT COMMAND ...
  local what=$1
  shift
  if "$@"; then echo "PASS  $what"; else echo "FAIL  $what" && failed=1; fi
}

lay_cable() {
  local rank
  for rank in 0 1; do ip netns add "${hosts[rank]}" || return; done
  ip -n "${hosts[0]}" link add eth0 type veth peer name eth0 netns "${hosts[1]}" || return
  for rank in 0 1; do
    ip -n "${hosts[rank]}" address add "10.77.0.$((rank + 1))/24" dev eth0 || return
    ip -n "${hosts[rank]}" link set lo up || return
    ip -n "${hosts[rank]}" link set eth0 up || return
  done
}

make_model_and_rows() {
  "$python" - "$root" "$work" 2>"$work/model.log" <<'END'
import pathlib, sys

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

root, work = map(pathlib.Path, sys.argv[1:])
rows = (root / "data" / "train.jsonl").read_text().splitlines()[:64]
(work / "rows.jsonl").write_text("\n".join(rows))
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(rows, trainers.BpeTrainer(vocab_size=997, initial_alphabet=alphabet, show_progress=False))
tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in ("endoftext", "im_start", "im_end")])
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
fast.chat_template = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
fast.save_pretrained(work / "model")
torch.manual_seed(0)
Qwen2ForCausalLM(Qwen2Config(
    vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
)).save_pretrained(work / "model")
END
}

# start_both LOG FLAG ...: the launcher on both machines; code-RANK and seconds-RANK appear when it has ended there.
start_both() {
  local log=$1 rank
  shift
  for rank in 0 1; do
    rm -f "$work/code-$rank"
    (
      ip netns exec "${hosts[rank]}" bash -c "$mounting"' && exec "$@"' mounting env \
        NNODES=2 NODE_RANK=$rank MASTER_ADDR=10.77.0.1 MASTER_PORT=$port NPROC_PER_NODE=1 GLOO_SOCKET_IFNAME=eth0 \
        OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache-$rank" PYTHON="$python" \
        bash "$root/$launcher" -m "$work/model" -d "$work/rows.jsonl" -o "$work/shared/output" --use_cpu True \
        --max_steps $steps --save_steps 20 --logging_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "$@" \
        >"$work/$log-$rank.log" 2>&1 </dev/null
      code=$?
      date +%s >"$work/seconds-$rank"
      echo $code >"$work/code-$rank"
    ) &
  done
}

ended() {
  [[ -f $work/code-$1 ]]
}

# wait_for SECONDS COMMAND ...: until the command succeeds or so many seconds are over.
wait_for() {
  local until=$((SECONDS + $1))
  shift
  until "$@"; do
    if ((SECONDS >= until)); then return 1; fi
    sleep 0.2
  done
}

both_ended() { ended 0 && ended 1; }

code_is() { # code_is RANK WANTED, where WANTED is a number or not-0
  local code
  ended "$1" && code=$(<"$work/code-$1") && if [[ $2 == not-0 ]]; then ((code)); else ((code == $2)); fi
}

launcher_on() { # launcher_on RANK: its process id
  local pid
  for pid in $(ip netns pids "${hosts[$1]}"); do
    if tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q ' recipe.launch '; then echo "$pid"; fi
  done
}

after() { echo "$(($(<"$work/seconds-$1") - $2)) s"; }

newest_checkpoint() { # marked as complete by its checkpoint.json, which is written last
  local mark
  mark=$(find "$output" -path '*/checkpoint-*/checkpoint.json' 2>/dev/null | sort -V | tail -n 1)
  [[ $mark ]] && dirname "$mark"
}

has_checkpoint_or_ended() { newest_checkpoint >/dev/null || ended 0 || ended 1; }

readable() {
  "$python" - "$1" <<'END'
import pathlib, sys
from safetensors.torch import load_file
files = list(pathlib.Path(sys.argv[1]).glob("*.safetensors"))
assert files and all(tensor.isfinite().all() for file in files for tensor in load_file(file).values()), files
END
}

message() { # message LOG RANK: the sentence that names the other machine
  grep -q "^error: node $((1 - $2)) .*not been heard of" "$work/$1-$2.log"
}

show() {
  local rank
  for rank in 0 1; do grep -h '^error:' "$work/$1-$rank.log" | sed "s/^/      node $rank: /"; done
}

if [[ $(uname) != Linux || $EUID != 0 ]] || ! command -v ip >/dev/null; then
  echo "network namespaces need Linux, root and the program ip: left out"
  exit 77
fi
work=$(mktemp -d)
mkdir "$work/disk" "$work/shared"
output=$work/shared/output mounting=:
if [[ ${STALE:-} ]]; then
  if ! command -v bindfs >/dev/null; then echo "STALE needs the program bindfs: left out" && exit 77; fi
  output=$work/disk/output # as the server sees it; ip netns exec gives each machine mounts of its own
  mounting="bindfs -o attr_timeout=$STALE,entry_timeout=$STALE,negative_timeout=$STALE '$work/disk' '$work/shared'"
fi
trap clean EXIT
trap 'failed=1; exit 130' INT TERM
if ! lay_cable 2>"$work/ip.log"; then
  echo "network namespaces are not allowed here ($(head -n 1 "$work/ip.log")): left out"
  exit 77
fi
shift $(($# > 0))
if ! make_model_and_rows; then
  tail -n 3 "$work/model.log"
  echo "FAIL  the tiny model cannot be made"
  failed=1
  exit 1
fi

echo "== two machines train with $launcher"
started=$(date +%s)
start_both first "$@"
wait_for 180 has_checkpoint_or_ended
took=$(($(date +%s) - started))
check "both train and write a checkpoint ($took s after the start)" eval "newest_checkpoint >/dev/null"
check "both are in the middle of the training" eval '! ended 0 && ! ended 1'
if ((failed)); then tail -n 5 "$work"/first-*.log && exit 1; fi

echo "== the cable is cut"
cut=$(date +%s)
ip -n "${hosts[1]}" link set eth0 down
wait_for 90 both_ended
for rank in 0 1; do
  check "node $rank ends with an error code ($(ended $rank && after $rank "$cut"))" code_is $rank not-0
  check "node $rank says which node is gone" message first $rank
  check "node $rank took at most 60 s" eval "ended $rank && (($(<"$work/seconds-$rank") - cut <= 60))"
done
show first
last=$(newest_checkpoint)
check "the newest checkpoint can be read (${last##*/})" readable "$last"
if ((failed)); then exit 1; fi

echo "== the cable is mended, both start again with --resume_from_checkpoint auto"
ip -n "${hosts[1]}" link set eth0 up
start_both second "$@" --resume_from_checkpoint auto
wait_for 180 eval "grep -q \"'loss'\" '$work/second-0.log' || ended 0 || ended 1"
kill -TERM "$(launcher_on 1)"
signalled=$(date +%s)
wait_for 60 both_ended
for rank in 0 1; do
  check "one SIGTERM on node 1: node $rank ends with its code 143 ($(after $rank "$signalled"))" code_is $rank 143
done
check "the checkpoint is named" grep -q "^SIGTERM: checkpoint-.* is saved in" "$work/second-0.log"
last=$(newest_checkpoint)

echo "== both start again with --resume_from_checkpoint auto"
resumed=$(date +%s)
start_both third "$@" --resume_from_checkpoint auto
wait_for 300 both_ended
for rank in 0 1; do
  check "node $rank finishes ($(ended $rank && after $rank "$resumed"))" code_is $rank 0
  check "node $rank says nothing of an error" eval "! grep -q '^error:' '$work/third-$rank.log'"
done
check "what was trained can be read" readable "$output"
logged=$(grep -o "'loss'" "$work/third-0.log" | wc -l) # one for each step
check "it went on from step ${last##*-} to $steps, with $logged steps" test "$logged" = $((steps - ${last##*-}))
if ((failed)); then tail -n 5 "$work"/third-*.log && exit 1; fi
echo "PASS: all checks"
