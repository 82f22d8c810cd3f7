#!/usr/bin/env bash
# Create .venv (or $VENV) and install packages into it: a requirements file, or this project with an extra of
# pyproject.toml. A second run finds that nothing changed and ends.
#   ./setup.sh requirements.txt
#   ./setup.sh dev
set -euo pipefail
cd "$(dirname "$0")"
packages=$1
venv=${VENV:-.venv}
python=${PYTHON:-python3}
mark=$venv/installed-$(basename "$packages")
if [[ -f $packages ]]; then install=(-r "$packages") files=("$packages"); else install=(-e ".[$packages]") files=(pyproject.toml); fi
sum=$(cat requirements.txt "${files[@]}" | cksum)
if [[ -f $mark && $(<"$mark") == "$sum" ]]; then exit 0; fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  found=$(command -v "$python" >/dev/null && "$python" --version 2>&1 || true)
  echo "error: found ${found:-no Python}, expected Python 3.11 or later; install it or name it: make PYTHON=python3.11" >&2
  exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "error: $python cannot create virtual environments; install its venv package (Debian: python3-venv)." >&2
  exit 2
fi
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
echo "installing $packages into $venv (the first time takes minutes) ..."
log=$venv/install.log
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${install[@]}" >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  echo "error: the packages of $packages could not be installed; check the network, then run the same command again (whole log: $log)." >&2
  exit 2
fi
echo "$sum" >"$mark"
