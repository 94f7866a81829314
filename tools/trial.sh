#!/usr/bin/env bash
# A chat model through all three phases on official games, as far as a lease of a machine goes; called again, it goes on.
#
#   tools/trial.sh MODEL ALFWORLD_DATA MINUTES FOLDER [settings of siri.py]
#
# FOLDER holds all that there is to bring back: probe.txt (what the model answers before it learns), log.txt, and the run itself in
# runs/trial: metrics.csv, results.json, samples/, skills.json, and the adapter in checkpoints/. The settings below are short, to see
# each phase in a quarter of an hour; those that are given come last, and win.
set -euo pipefail
(($# >= 4)) || { sed -n 4p "$0" >&2; exit 2; }
siri=$(realpath "$(dirname "$0")/../siri.py")
model=$(realpath "$1") data=$(realpath "$2") minutes=$3
mkdir -p "$4" && cd "$4" && shift 4
with=(--preset paper --no-4bit --model "$model" --alfworld-data "$data" --max-response 96 --max-prompt 1536)
[ -s probe.txt ] || { python "$siri" --probe "${with[@]}" "$@" > probe.part && mv probe.part probe.txt; cat probe.txt; }
if compgen -G 'runs/trial/checkpoints/0*' > /dev/null; then
    set -- --resume runs/trial
else
    set -- --name trial "${with[@]}" --lora-r 16 --lora-alpha 32 --lr 3e-5 --distill-lr 3e-5 --groups 8 --max-steps 20 --panel 32 \
        --imitate 96 --warmup-max 10 --n-req 12 --floor 0.1 --mining-max 8 --mine-every 1 --mine-wins 8 --n-eval 2 --active-req 4 \
        --distill-max 6 --distill-min 8 --sample-every 2 "$@"
fi
# The first signal lets the iteration end and be saved; two minutes later the run is killed, which costs that iteration.
status=0
timeout --signal INT --kill-after 120 "${minutes}m" python "$siri" "$@" 2>&1 | tee -a log.txt || status=$?
((status == 0 || status == 124 || status == 130 || status == 137)) || exit "$status"
python "$siri" --report runs/trial
