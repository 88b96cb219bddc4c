#!/bin/sh
# What made the bundled model, on two CPU cores. Interrupted? Give the same command again.
#   sh recipe_cpu.sh RUN FOLDER
# Phases differ in what they practise: recall was learned first, moves and updates needed most.
set -eu
run=$1 folder=$2
export OMP_NUM_THREADS=1
both="torchrun --nproc-per-node 2"
train="$both train.py --out $run"
$train --steps 450
$train --steps 700 --mix recall:2,updates:2.5,moves:4,building:1.2,robot:0.7,mixed:1.2,story:0.5
$train --steps 900 --mix recall:0.8,updates:3,moves:6,building:0.7,robot:0.7,mixed:0.7,story:0.4
wide="--tokens 2048 --position-weight 1.0"
$train --steps 1400 $wide \
  --mix recall:0.8,updates:3,moves:6,building:0.7,robot:0.7,mixed:0.7,story:0.4
$train --steps 1500 $wide \
  --mix recall:0.7,updates:5,moves:3.5,building:1,robot:0.7,mixed:0.8,story:0.4
cool="$train $wide --mix recall:0.7,updates:4,moves:4.5,building:1.2,robot:0.7,mixed:1,story:0.4"
$cool --decay 1300 --until 1750
$cool --decay 1300 --until 2000 --cap moves:512 # moves had come to rows of 2,048: more than needed
$cool --decay 1000 --cap moves:512
$both mtp.py "$run/final.pt" --out "$run/drafted.pt" --steps 400
mkdir -p "$run/polish"
$both train.py --out "$run/polish" --start "$run/drafted.pt" --decay 150 --lr 0.0015 $wide \
  --decisions --cap moves:512,building:768,mixed:768 \
  --mix recall:0.5,updates:1,moves:1.2,building:4,robot:2.5,mixed:1.5,story:0.5
$both mtp.py "$run/polish/final.pt" --out "$run/polished.pt" --steps 80 --lr 0.001 --seed 2
python export.py "$run/polished.pt" "$folder"
python check_export.py "$folder"
python evaluate.py "$folder"
