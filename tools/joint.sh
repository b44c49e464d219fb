#!/bin/bash
# A piece of the joint model on one host: scenes are written by the processors, the last GPU draws them (the others help at
# first), and the others train; a single GPU does both. With the recipe of the last row of page 50, on one GPU and 16 cores:
#
#     MINUTES=26.7 WRITERS=10 FILES=110 LEAST=10 FIRST=3300000 bash tools/joint.sh runs/joint \
#         --begin .5 --own-from .62 --own-steps 4 --astray .5 --rows 24 --mishear .06
#
# What follows the folder goes to `tools/tiny.py joint`. May be set: MINUTES=20 (all in all), WRITERS=36, FILES=300 (of 80
# scenes), LEAST=16 (files before the training begins), START=data_samples/weights/midas, LED=1 (pasts that are elsewhere
# are drawn as well, for joint --led).
set -u
trap 'kill $(jobs -p) 2>/dev/null' EXIT
out=${1:?where to, such as runs/joint}; shift; mkdir -p "$out"
cards=$(nvidia-smi -L | wc -l); last=$((cards-1)); learn=$((cards > 1 ? last : 1)); born=$(date +%s)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
have() { find "$out/pool" -name '*.safetensors' 2>/dev/null | wc -l; }
draw() { nice -n 5 python3 tools/tiny.py draw "$out/scenes" "$out/pool" --device "cuda:$1" --first "$2" --workers 5 ${LED:+--led 1} > "$out/draw_$2.log" 2>&1 & drawer=$!; }

nice -n 15 python3 tools/tiny.py scenes "$out/scenes" --writers "${WRITERS:-36}" --files "${FILES:-300}" --first "${FIRST:-2100000}" > "$out/scenes.log" 2>&1 &
helpers=()
for card in $(seq 0 $last); do draw "$card" $((3000000 + card*100000)); [ "$card" -lt $last ] && helpers+=("$drawer"); done
first=$drawer                                                                     # draws to the end
while [ "$(have)" -lt "${LEAST:-16}" ]; do
  kill -0 "$first" 2>/dev/null || { echo "the drawing has ended:"; tail -n 3 "$out"/draw_*.log; exit 1; }
  sleep 1
done
[ ${#helpers[@]} -gt 0 ] && kill "${helpers[@]}"
draw "$last" 3900000                                                              # two on the last card
spent=$(( $(date +%s) - born ))
CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((learn-1))) python3 -m torch.distributed.run --standalone --nproc-per-node $learn tools/tiny.py joint "$out" --pool "$out/pool" --start-from "${START:-data_samples/weights/midas}" \
  --minutes "$(python3 -c "print(${MINUTES:-20} - $spent/60)")" "$@" > "$out/joint.log" 2>&1 || { tail -n 5 "$out/joint.log"; exit 1; }
touch "$out/pool/stop"; echo "$out/midas"
