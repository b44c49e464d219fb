"""The mean of the weights of saved codecs that came from one another: python tools/average.py OUT CODEC CODEC ...

Two points of one training often have a mean that is better than both. The bundled codec is the mean of its stages 1 and 3 (page 24). Whatever is the same in all stays as it is, to the bit, so a joint model that knows the latents of one knows those of the mean, as long as the encoder did not move.
"""
import argparse, shutil
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

def mean(codecs:list)->dict:
    "Tensor by tensor, in the number type of the first."
    if odd := {k for c in codecs[1:] for k in set(c) ^ set(codecs[0])} or {k for c in codecs[1:] for k in c if c[k].shape != codecs[0][k].shape}:
        raise SystemExit(f"These codecs are not of one kind: {len(odd)} tensors differ, the first of them {min(odd)}.")
    return {k: v if all(torch.equal(v, c[k]) for c in codecs) else torch.stack([c[k].float() for c in codecs]).mean(0).to(v.dtype) for k, v in codecs[0].items()}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', type=Path); p.add_argument('codecs', type=Path, nargs='+', metavar='CODEC', help='folders with config.json and model.safetensors')
    a = p.parse_args()
    if missing := [str(c) for c in a.codecs if not (c/'model.safetensors').is_file()]: p.error(f"no model.safetensors in {', '.join(missing)}")
    if len({(c/'config.json').read_text() for c in a.codecs}) > 1: p.error("their config.json differ")
    a.out.mkdir(parents=True, exist_ok=True)
    save_file(mean([load_file(c/'model.safetensors') for c in a.codecs]), a.out/'model.safetensors')
    shutil.copyfile(a.codecs[0]/'config.json', a.out/'config.json')
    print(f"{a.out}: mean of {len(a.codecs)}")
