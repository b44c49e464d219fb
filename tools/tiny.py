"""How the bundled joint model is trained when the data is made while it learns: writers, drawers and a trainer, side by side.

    python tools/tiny.py scenes runs/scenes --writers 24 --files 150      # processors: scripts, speech, audio tokens (80 scenes a file)
    python tools/tiny.py draw runs/scenes runs/pool --device cuda:0       # one card: people, pictures, latents
    torchrun --nproc-per-node 3 tools/tiny.py joint runs/joint --pool runs/pool --start-from data_samples/weights/midas --minutes 12
    python tools/tiny.py ablation runs/ablations window_2 --pool runs/pool --minutes 14     # one training and exam of page 71

`midas-ref train model` (page 50) does the same in one process, and begins when everything is drawn.
"""
import argparse, subprocess, sys, time
from pathlib import Path
import torch
from midas_ref.codec.dcae import read_safetensors
from midas_ref.codec.train import RunLog, agree, join_ranks, rank
from midas_ref.conditions.audio import load_audio_weights
from midas_ref.data.probes import WEIGHTS, People, mouth_pool
from midas_ref.training import train as T
from midas_ref.training.scale import save_pool

EACH = 80   # scenes of a file

def writer(a):
    "Write the files whose number is mine; one whose script has crashed espeak-ng once is left out."
    torch.set_num_threads(1)
    out, audio = Path(a.out), load_audio_weights(Path(a.weights)/'audio.safetensors')[0]
    for k in range(a.mine, a.files, a.writers):
        path, begun = out/f'{k:05d}.safetensors', out/f'{k:05d}.begun'
        if path.exists() or begun.exists(): continue
        begun.touch()
        T.write_scenes(audio, EACH, 9.6, a.first + k*EACH).save(path.with_suffix('.part')); path.with_suffix('.part').replace(path)

def scenes(a):
    "Keep the writers at work until every file is there or was begun."
    out = Path(a.out); out.mkdir(parents=True, exist_ok=True)
    left = lambda w: any(not (out/f'{k:05d}.begun').exists() for k in range(w, a.files, a.writers))
    start = lambda w: subprocess.Popen([sys.executable, __file__, *sys.argv[1:], '--mine', str(w)])
    running = {w: start(w) for w in range(a.writers)}
    while any(p.poll() is None or left(w) for w, p in running.items()):
        for w, p in running.items():
            if p.poll() is not None and left(w): running[w] = start(w)
        time.sleep(1)

@torch.no_grad()
def draw(a):
    "Every file of scenes becomes a file of the pool, played by people of whom up to a third are new each time; several processes may share the work. With --led N every N-th file has also pasts that are elsewhere, with --pairs 1 two people play each scene."
    source, out = Path(a.scenes), Path(a.out); out.mkdir(parents=True, exist_ok=True)
    midas = T.new_midas('tiny', weights=a.weights).to(a.device)
    people, who, drawn = People(EACH, mouth_pool(1), a.first, a.device, workers=a.workers, bake_on='cpu', freckled=a.freckled), 0, 0
    while not (out/'stop').exists() and len(list(out.glob('*.safetensors'))) < a.most:
        ready = [p for p in sorted(source.glob('*.safetensors')) if not (out/f'{p.stem}.taken').exists()]
        if not ready: time.sleep(.5); continue
        try: (out/f'{ready[0].stem}.taken').open('x').close()                        # mine; two may have seen it free
        except FileExistsError: continue
        scenes = T.Scenes.load(ready[0])
        pool = T.draw_pool(scenes.twice() if a.pairs else scenes, people, midas, led=int(ready[0].stem) if a.led and int(ready[0].stem) % a.led == 0 else None)
        if a.led and pool.past is None: pool.past, pool.apart = pool.latents.clone(), torch.zeros(len(pool), 2, dtype=torch.bool, device=a.device)
        save_pool(pool, out/ready[0].name, codes=pool.codes); drawn += 1
        for _ in range(EACH//3): people.replace(who := (who + 1) % EACH)
    print('drawn', drawn, 'files; people up to', people.next, flush=True)

class Grow:
    "A pool that takes in new files as they come."
    def __init__(self, folder, device, least:int, every:float=10., **shares):
        self.folder, self.device, self.every, self.shares, self.names, self.pool = Path(folder), device, every, shares, [], None
        while len(list(self.folder.glob('*.safetensors'))) < least: time.sleep(1)
        self.look()

    def look(self):
        "Read what is new."
        self.at = time.time()
        new = [p for p in sorted(self.folder.glob('*.safetensors')) if p.name not in self.names]
        if not new: return
        exact = dict(velocity=torch.float32, place=torch.float32, shown=torch.float32, audio=torch.int64)       # the rest stays as it is stored
        parts = [{k: v.to(self.device, exact.get(k, v.dtype)) for k, v in read_safetensors(p).items()} for p in new]
        old = [] if self.pool is None else [vars(self.pool)]
        both = {k: parts[0][k] if k == 'codes' else torch.cat([d[k] for d in (*old, *parts)]) for k in parts[0]}
        self.pool = T.Pool(**both, codec_hash='', **self.shares); self.names += [p.name for p in new]

    def __getattr__(self, name): return getattr(self.pool, name)
    def batch(self, *args):
        if time.time() > self.at + self.every: self.look()
        return self.pool.batch(*args)

def two_lengths():
    "Sequences of a training have two lengths: compile each once."
    torch._dynamo.config.automatic_dynamic_shapes, torch._dynamo.config.cache_size_limit = False, 64

def joint(a):
    "The loop of page 50 by the clock of the wall, on a pool that grows."
    two_lengths()
    born, device, out = time.time(), join_ranks(a.device), Path(a.out)
    midas = T.new_midas('tiny', a.start_from, weights=a.weights, anew=bool(a.start_from)).to(device)
    pool = Grow(a.pool, device, a.least, led=a.led, mishear=a.mishear, pairs=bool(a.pairs))
    recipe = T.Recipe(lr=a.lr, muon=2., own_from=a.own_from, own_depth=3, own_steps=a.own_steps, t_kind=a.times, astray=a.astray, blind=.12, reader=(.3, .15), short=a.short, rollout=a.rollout, renew=a.renew)
    trainer, plan, lead = T.JointTrainer(midas, pool.activity(), recipe, fast=device != 'cpu'), T.Plan((a.rows, 16), (a.rows, 16), starts=.3), rank() == 0
    if a.resume: T.load_run(trainer, a.resume)
    log, exam, last, n = RunLog(out) if lead else None, pool.batch(64, 6, 6, torch.Generator(device).manual_seed(99)), -1, 0
    while True:
        done = agree(1. if (out/'stop').exists() else min((time.time() - born)/(60*a.minutes), 1))
        progress = a.begin + (a.end - a.begin)*done
        parts, n = trainer.update(lambda: plan.draw(pool, progress, recipe.short, trainer.g), progress), n + 1
        if (int(done*30) > last or n in (3, 30) or done == 1) and lead:
            if int(done*30) > last:
                T.averaged(trainer).save_pretrained(out/'midas')
                if last % 3 == 0 or done == 1: T.save_run(trainer, out/'checkpoint.safetensors')
                last = int(done*30)
            parts |= {f'{w}_{k}': v for w in ('audio', 'text') for k, v in T.swap_check(trainer.model, exam, trainer.weight, w).items()}
            log.line(step=trainer.step, seconds=time.time() - born, progress=progress, scenes=len(pool.pool), mine=n, memory=torch.cuda.max_memory_allocated()/2**30, **parts)
        if done == 1: break
    agree(1.)
    if lead: log.picture('strip', trainer.step, T.sample_strip(T.averaged(trainer), exam)); (out/'done').touch()
    agree(1.)

def ablation(a):
    "Train and judge one of page 71 on a pool that is there; several may share a card."
    from midas_ref.evaluation.ablations import run_ablation
    two_lengths()
    parts, pool = T.new_midas('tiny', weights=a.weights).to(a.device), Grow(a.pool, a.device, a.least).pool
    pool.codec_hash = parts.codec_hash
    recipe = T.Recipe(lr=1.5e-3, muon=2., own=0., astray=0., short=0., reader=(.3, .15), seed=a.seed)
    run_ablation(a.name, pool, parts, a.out, a.minutes, recipe, T.Plan((48, 6), (24, 16)), long=a.long)

def main():
    "One of the kinds."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = p.add_subparsers(required=True)
    def kind(f, *options):
        q = kinds.add_parser(f.__name__, help=f.__doc__); q.set_defaults(run=f); q.add_argument('--weights', default=str(WEIGHTS), help='folder of codec/ and audio.safetensors')
        for name, default in options: q.add_argument(name, **({} if default is None else dict(default=default, type=type(default))))
    kind(scenes, ('out', None), ('--writers', 8), ('--files', 100), ('--first', 300_000), ('--mine', -1))
    kind(draw, ('scenes', None), ('out', None), ('--device', 'cuda'), ('--most', 10**6), ('--first', 0), ('--workers', 20), ('--freckled', .3), ('--led', 0), ('--pairs', 0))
    kind(joint, ('out', None), ('--device', 'cuda'), ('--pool', ''), ('--start-from', ''), ('--minutes', 10.), ('--begin', .3), ('--end', 1.), ('--own-from', .65), ('--own-steps', 2), ('--times', 'mixed'), ('--rows', 24), ('--lr', 1.5e-3), ('--short', 0.), ('--astray', 1.), ('--rollout', 0.), ('--renew', 60), ('--led', .3), ('--mishear', 0.), ('--least', 12), ('--resume', ''), ('--pairs', 0))
    kind(ablation, ('out', None), ('name', None), ('--device', 'cuda'), ('--pool', ''), ('--minutes', 14.), ('--long', 57.6), ('--least', 1), ('--seed', 0))
    a = p.parse_args()
    (writer if getattr(a, 'mine', -1) >= 0 and a.run is scenes else a.run)(a)

if __name__ == '__main__': main()
