# shellcheck shell=bash
# What the launchers beside this file have in common: read the command line, find Python and the GPUs, start finetune.py
# in this process, so that its exit code is the launcher's.
#
#   launch GPUS WHAT DEFAULT ... -- WORD ...
#
# GPUS: one or all. WHAT: what is trained how, for --help. DEFAULT: flags of finetune.py that stand before the user's
# own, so that the user's win. WORD: the user's command line.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

launch() {
  gpus=$1 what=$2 defaults=() words=() config=()
  shift 2
  while [[ $1 != -- ]]; do
    defaults+=("$1")
    shift
  done
  shift
  read_words "$@"
  find_python
  read_config
  require model_name_or_path "-m MODEL"
  require data_path "-d DATA"
  count_gpus
  if [[ $gpus == one ]]; then start_one; else start_all; fi
}

fail() {
  echo "error: $1" >&2
  exit 2
}

show_help() {
  local name=${0##*/}
  cat <<END
$what.

usage: bash $name -m MODEL -d DATA ... [-e EVAL ...] [-o OUTPUT] [any flag of finetune.py]
       bash $name run.yaml [any flag of finetune.py]

  -m, --model MODEL    folder or hub name of the model to start from (--model_name_or_path)
  -d, --data DATA ...  one or more files of conversations to train on (--data_path)
  -e, --eval EVAL ...  one or more files to evaluate on (--eval_data_path)
  -o, --output OUTPUT  folder for what is trained (--output_dir; default output)
  -h, --help           this text; that of all flags: python finetune.py --help

Given before your flags and the entries of run.yaml, which win:
  ${defaults[*]}

Environment:
  PYTHON                 the Python to use (default: .venv/bin/python beside this script, else python3)
  CUDA_VISIBLE_DEVICES   the GPUs to use (default: all)
END
  if [[ $gpus == all ]]; then
    cat <<END
  NPROC_PER_NODE         processes on this machine (default: one for each GPU; with --use_cpu True, 1)
  NNODES NODE_RANK       for several machines: how many there are, and this one's number, from 0; start the same
                         command on each, with the same checkout, model, data and output folder
  MASTER_ADDR MASTER_PORT  address of machine 0 as the others reach it, and a free port there
  NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME  the network interface to use (ip addr), on machines that have several
END
  fi
}

# ----------------------------------------------------------------------------------------------------------------------
# The command line

# Sort the user's words into `config`, a config file that comes first, and `words`, all others in their order.
read_words() {
  if [[ ${1:-} =~ ^[^-].*\.(yaml|yml|json)$ ]]; then
    config=("$1")
    shift
  fi
  while (($#)); do
    case $1 in
      -h | --help)
        show_help
        exit 0
        ;;
      -m | --model) take --model_name_or_path "$@" ;;
      -d | --data) take --data_path "$@" ;;
      -e | --eval) take --eval_data_path "$@" ;;
      -o | --output) take --output_dir "$@" ;;
      *)
        words+=("$1")
        shift
        continue
        ;;
    esac
    shift "$taken"
  done
}

# take FLAG SHORT VALUE ... [-...]: the values go under the long name; `taken` words were used.
take() {
  local flag=$1 short=$2
  shift 2
  if (($# == 0)) || [[ -z $1 || $1 == -* ]]; then fail "$short needs a value; see ${0##*/} --help."; fi
  words+=("$flag" "$1")
  taken=2
  shift
  if [[ $flag != *data_path ]]; then return; fi
  while (($#)) && [[ $1 != -* ]]; do
    words+=("$1")
    taken=$((taken + 1))
    shift
  done
}

# Leave out the defaults that the config file gives: the command line, where defaults are put, wins over such a file.
read_config() {
  config_flags=''
  if ((${#config[@]} == 0)); then return; fi
  # cli.py reads the file as finetune.py does; the older and the newer spelling of a flag are the same flag.
  config_flags=$(
    "$python" - "$here" "${config[0]}" <<'END'
import sys
sys.path.insert(0, sys.argv[1])
from recipe import command_line as cli, console
try:
    names = cli.given(sys.argv[2:])
except console.UserError as error:
    console.fail(error)
print(*names, *(new for old, new in cli.RENAMED.items() if old in names), sep="\n")
print(*(old for old, new in cli.RENAMED.items() if new in names), sep="\n")
END
  ) || exit $?
  local word keep='' kept=()
  for word in "${defaults[@]}"; do
    if [[ $word == --* ]]; then
      if in_config "${word#--}"; then keep=''; else keep=yes; fi
    fi
    if [[ $keep ]]; then kept+=("$word"); fi
  done
  defaults=("${kept[@]+"${kept[@]}"}")
}

in_config() {
  grep -qx -- "$1" <<<"$config_flags"
}

# given NAME: whether the user gave the flag, on the command line or in the config file.
given() {
  local word
  for word in "${words[@]+"${words[@]}"}"; do
    word=${word%%=*}
    if [[ $word == --* && ${word//-/_} == "__$1" ]]; then return; fi
  done
  in_config "$1"
}

require() {
  if ! given "$1"; then fail "$2 is missing (or --$1, or an entry of a config file); see ${0##*/} --help."; fi
}

# Whether --use_cpu is given and not False; the last one counts, as in finetune.py.
on_cpu() {
  local answer=no word next i
  local denied="^[^#]*(use_cpu|no_cuda)[\"']?[[:space:]]*:[[:space:]]*[\"']?(false|no|0)"
  if in_config use_cpu && ! grep -Eqi "$denied" "${config[0]}"; then answer=yes; fi
  for ((i = 0; i < ${#words[@]}; i++)); do
    word=${words[i]} next=${words[i + 1]:-}
    case ${word//-/_} in
      __use_cpu | __no_cuda) if [[ $next == --* ]]; then next=true; fi ;;
      __use_cpu=* | __no_cuda=*) next=${word#*=} ;;
      *) continue ;;
    esac
    case $next in
      [Ff]alse | FALSE | [Nn]o | [Nn] | [Ff] | 0) answer=no ;;
      *) answer=yes ;;
    esac
  done
  [[ $answer == yes ]]
}

# ----------------------------------------------------------------------------------------------------------------------
# The machine

find_python() {
  python=${PYTHON:-}
  if [[ -z $python ]]; then
    python=$here/.venv/bin/python
    if [[ ! -x $python ]]; then python=python3; fi
  fi
  if ! command -v "$python" >/dev/null; then
    fail "$python: no such program; run $here/setup.sh requirements.txt, or name a Python: PYTHON=python3.11 bash ..."
  fi
}

# `visible`: GPUs that may be used, as CUDA_VISIBLE_DEVICES has it. `processes`: how many start on this machine.
count_gpus() {
  visible=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || visible=''
  if ! is_number "$visible"; then
    fail "$python cannot import torch; run $here/setup.sh requirements.txt, or name a Python that can: PYTHON=..."
  fi
  if on_cpu; then
    if ((visible == 0)); then echo "no GPU: training on the CPU"; else echo "--use_cpu: training on the CPU"; fi
    visible=0
  elif ((visible == 0)); then
    local now=unset
    if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then now="'$CUDA_VISIBLE_DEVICES'"; fi
    fail "no GPU found (CUDA_VISIBLE_DEVICES is $now); see whether nvidia-smi lists one, or add --use_cpu True."
  fi
}

is_number() {
  [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]
}

need() {
  if [[ -z ${!1:-} ]]; then fail "$1 is not set; NNODES=$NNODES machines need it on each of them, see ${0##*/} --help."; fi
}

# expect NAME LOW HIGH: the variable of that name is a whole number in that range.
expect() {
  local value=${!1:-}
  if ! is_number "$value" || ((value < $2 || value > $3)); then
    fail "$1=$value: expected a whole number from $2 to $3."
  fi
}

# ----------------------------------------------------------------------------------------------------------------------
# The start

start_one() {
  if ((visible > 1)); then
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
    echo "$visible GPUs are visible: using the first one (CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES)"
  fi
  unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE # some clusters set them, and finetune.py would wait for others
  finetune "$python"
}

start_all() {
  local most=$visible nodes name
  if ((most == 0)); then most=4096 NPROC_PER_NODE=${NPROC_PER_NODE:-1}; fi
  NPROC_PER_NODE=${NPROC_PER_NODE:-$most} NNODES=${NNODES:-1}
  expect NPROC_PER_NODE 1 "$most"
  expect NNODES 1 4096
  if [[ -z ${OMP_NUM_THREADS:-} ]]; then # torch.distributed.run would take 1, which is slow for an optimizer on the CPU
    OMP_NUM_THREADS=$(($(nproc 2>/dev/null || echo 1) / NPROC_PER_NODE))
    export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
  fi
  if ((NNODES == 1)); then
    if [[ ${NODE_RANK:-0} != 0 ]]; then fail "NODE_RANK=$NODE_RANK, but NNODES, the number of machines, is not set."; fi
    nodes=(--standalone)
  else
    for name in NODE_RANK MASTER_ADDR MASTER_PORT; do need $name; done
    expect NODE_RANK 0 $((NNODES - 1))
    expect MASTER_PORT 1 65535
    if [[ ! $MASTER_ADDR =~ ^[[:alnum:]_.:-]+$ ]]; then fail "MASTER_ADDR=$MASTER_ADDR: expected a name or an address."; fi
    export NNODES NODE_RANK MASTER_ADDR MASTER_PORT
    PYTHONPATH=$here "$python" "$here/recipe/distributed/nodes.py" || exit $?
    nodes=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
  fi
  PYTHONPATH=$here finetune "$python" "$here/recipe/distributed/nodes.py" "${nodes[@]}" --nproc_per_node "$NPROC_PER_NODE"
}

finetune() {
  exec "$@" "$here/finetune.py" \
    "${config[@]+"${config[@]}"}" "${defaults[@]+"${defaults[@]}"}" "${words[@]+"${words[@]}"}"
}
