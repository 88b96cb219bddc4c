#!/bin/sh
# NOT YET RUN. One GPU, one process: more tokens per step, more steps than recipe_cpu.sh.
#   sh recipe_gpu.sh RUN FOLDER
set -eu
run=$1 folder=$2
train="python train.py --device cuda --out $run --batches 8 --tokens 16384 --threads 8"
$train --steps 3000 --position-weight 1.0 \
  --mix recall:2,updates:4,moves:4,building:1.2,robot:0.7,mixed:1.2,story:0.5
$train --decay 1500 --position-weight 1.0 \
  --mix recall:1,updates:4,moves:4,building:1.2,robot:0.7,mixed:1.2,story:0.5
python mtp.py "$run/final.pt" --device cuda --out "$run/drafted.pt" --steps 1500 --tokens 16384
python export.py "$run/drafted.pt" "$folder"
python check_export.py "$folder"
python evaluate.py "$folder" --device cuda
