"A small model with random weights: it draws noise, but at every boundary it behaves as a trained one."
from dataclasses import replace
from pathlib import Path
import torch
from midas_ref.codec.temporal import VideoDCAE
from midas_ref.conditions.audio import WhisperVQ
from midas_ref.config import preset
from midas_ref.model.midas import Midas

def small(size=128):
    "A `Midas` that a laptop runs several times faster than real time."
    torch.manual_seed(0)
    cfg = preset('tiny')
    cfg = replace(cfg, video=replace(cfg.video, height=size, width=size),
        codec=replace(cfg.codec, encoder_widths=(8, 16, 16, 32, 32, 32, 128), decoder_widths=(8, 16, 16, 32, 32, 32, 128), decoder_depths=(0, 1, 1, 1, 1, 1, 1), attention_from=6, temporal_from=6),
        audio=replace(cfg.audio, width=32, layers=1, heads=2, ffn=64, codes=64), backbone=replace(cfg.backbone, width=64, layers=1, heads=2, kv_heads=1, head_dim=32, ffn=64),
        head=replace(cfg.head, width=32, layers=1, heads=2))
    return Midas(cfg, VideoDCAE(cfg.codec).eval(), WhisperVQ(cfg.audio).eval()).eval()

def save_small(folder, size=128)->Path:
    small(size).save_pretrained(folder)
    return Path(folder)
