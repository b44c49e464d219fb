#!/bin/bash
# The last piece of the bundled weights, on one host with two GPUs or more and 32 processors or more:
#
#     bash tools/tiny.sh runs/tiny
#
# The codec trains on the first card, its latents held where those of the bundled codec are; on the others the joint
# model goes on with the old latents meanwhile. Then the decoder has a stretch on clips, and the model follows the new
# latents. Minutes may be set: STAGE1=7 STAGE3=2.5 BEFORE=12 AFTER=13 (BEFORE counts from the start of everything).
# SIGTERM to the process group ends all. What ran with it, and what came of it, is told on pages 24 and 50.
set -u
out=${1:?where to, such as runs/tiny}; mkdir -p "$out"
start=${START:-data_samples/weights}; cards=$(nvidia-smi -L | wc -l); others=$(seq -s, 1 $((cards-1))); cores=$(python3 -c 'import os; print(len(os.sched_getaffinity(0)))')
midas() { python3 -c 'import sys; from midas_ref.cli import main; sys.exit(main())' "$@"; }
joint() { CUDA_VISIBLE_DEVICES=$others python3 -m torch.distributed.run --standalone --nproc-per-node $((cards-1)) tools/tiny.py joint --times logit_normal "$@"; }
export PYTHONPATH=$PWD OMP_NUM_THREADS=2

CUDA_VISIBLE_DEVICES=0 midas train codec "$out/1" --start-from "$start/codec" --minutes "${STAGE1:-7}" --lr 3e-4 --muon 2.7 --late .6 --people 100 --workers 10 --bake-on cpu \
    --device cuda --freckled .7 --weight detail=.6 --keep-latents .3 --first 60000 > "$out/1.log" 2>&1 & stage1=$!
python3 tools/tiny.py scenes "$out/scenes" --writers $((cores/2 - 4)) --files 160 > "$out/scenes.log" 2>&1 &
python3 tools/tiny.py draw "$out/scenes" "$out/old" --device cuda:1 --most 60 --first 300000 > "$out/draw_old.log" 2>&1 &
joint "$out/before" --pool "$out/old" --start-from "$start/midas" --minutes "${BEFORE:-12}" --begin .3 --end .5 --own-from .9 > "$out/before.log" 2>&1 & before=$!

wait $stage1 || { tail -n 3 "$out/1.log"; exit 1; }
mkdir -p "$out/parts"; cp "$start"/audio.* "$out/parts/"
python3 -c "import torch; from midas_ref.codec.temporal import load_video_dcae; load_video_dcae('$out/1/codec').save('$out/parts/codec', torch.float16)"   # with layers over time, that all who follow share
CUDA_VISIBLE_DEVICES=0 midas train codec "$out/3" --stage 3 --decoder-only --start-from "$out/parts/codec" --minutes "${STAGE3:-2.5}" --lr 4e-5 --muon 2 --people 60 --workers 6 --bake-on cpu \
    --device cuda --freckled .6 --weight detail=.4 --first 260000 > "$out/3.log" 2>&1 & stage3=$!
python3 tools/tiny.py draw "$out/scenes" "$out/new" --device cuda:0 --first 500000 --weights "$out/parts" > "$out/draw_new.log" 2>&1 & draw=$!
while [ "$(ls "$out"/new/*.safetensors 2>/dev/null | wc -l)" -lt 14 ]; do kill -0 $draw || exit 1; sleep 1; done
touch "$out/before/stop" "$out/old/stop"; wait $before || { tail -n 3 "$out/before.log"; exit 1; }
joint "$out/after" --pool "$out/new" --start-from "$start/midas" --weights "$out/parts" --minutes "${AFTER:-13}" --begin .4 --resume "$out/before/checkpoint.safetensors" > "$out/after.log" 2>&1
touch "$out/new/stop"; wait $stage3
echo "$out/3/codec and $out/after/midas"
