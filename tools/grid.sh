#!/bin/sh
# Five real talkers by heart, with the commands that large runs take: sh tools/grid.sh RECORDINGS OUT
# RECORDINGS holds clips such as those of the GRID corpus (three seconds each). About fifty minutes on one processor core.
set -e
here=$(cd "$(dirname "$0")/.." && pwd); out=$2; weights=$here/data_samples/weights
midas-ref data pack "$1" "$out/shards" --fps 12.5 --licence "CC BY 4.0" --no-progress
from=$weights/codec
for stage in "1 8 6 3e-4" "2 1 1 3e-4" "3 7 1 2e-4"; do
  set -- $stage
  midas-ref train codec "$out/codec$1" --stage "$1" --start-from "$from" --data "$out/shards" --minutes "$2" --batch "$3" --lr "$4" --muon 2.7 --device cpu
  from=$out/codec$1/codec
done
midas-ref data encode "$out/shards" "$out/latents" --codec "$from" --chunks 6 --device cpu --no-progress
torchrun --no-python --nproc-per-node 1 midas-ref train model "$out/joint" --preset tiny --start-from "$weights/midas" --data "$out/latents" \
  --set rows=1 --set chunks=6 --set steps=500 --set lr=6e-4 --set warm=20 --set save_every=100 --set recompute=false --device cpu
midas-ref train export "$out/joint" "$out/midas" --codec "$from"
