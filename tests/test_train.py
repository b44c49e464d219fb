"""Joint training: scenes, the pool and its alignment, exact resume, the commands."""
import copy, dataclasses, functools, json, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest, torch
from safetensors.torch import save_file
from midas_ref import cli
from midas_ref.config import preset
from midas_ref.codec.temporal import VideoDCAE
from midas_ref.codec.train import moments
from midas_ref.conditions.audio import WhisperVQ, save_audio
from midas_ref.data import probes
from midas_ref.data.portraits import MOTION
from midas_ref.model.midas import Midas
from midas_ref.training import scale
from midas_ref.data.probes import WEIGHTS
from midas_ref.training.train import HEADS, MOODY, READINGS, TURNED, JointTrainer, Plan, Pool, Recipe, Scenes, averaged, change_weight, first_weight, check_scenes, draw_pool, elsewhere, generate, lead_astray, like, load_run, new_midas, own_frames, turned, running_median, save_run, swap_check, tokenizer_hash, write_scenes
from midas_ref.model.tokens import Layout

def small():
    "Sizes of a model that trains in moments; 2x2 latents."
    p, r = preset('tiny'), dataclasses.replace
    return r(p, video=r(p.video, height=128, width=128), text=r(p.text, tokens=16, width=32, layers=1), pose=r(p.pose, tokens_per_frame=2), audio=r(p.audio, width=32, heads=2, layers=1, ffn=64, codes=64),
             backbone=r(p.backbone, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48), head=r(p.head, width=32, layers=1, heads=2), window_frames=12,
             codec=r(p.codec, encoder_widths=(8, 16, 32, 64, 64, 64, 128), decoder_widths=(8, 16, 32, 64, 64, 64, 128), decoder_depths=(0, 1, 1, 1, 1, 1, 1)))

def numbered(scenes=3, frames=36, per_token=1):
    "A pool whose every entry tells its scene and its time."
    at = (1000*torch.arange(scenes)[:, None] + torch.arange(frames)).float()
    chunks = frames//(6*per_token)
    latents = (at[..., None, None, None] + torch.zeros(scenes, frames, 128, 2, 2)).half().float()
    return Pool(latents, torch.randn(scenes, 2, 128, 2, 2), at[..., None, None].expand(-1, -1, 12, 2)/1000, torch.ones(scenes, frames, 12, dtype=torch.bool),
                torch.arange(scenes*frames//per_token).view(scenes, -1), (torch.arange(scenes*chunks).view(scenes, -1, 1) % 100 + 5).expand(-1, -1, 64).int(), at[..., None].expand(-1, -1, READINGS)/1000,
                torch.arange(scenes*frames//per_token)[:, None].expand(-1, 32).float(), 'none')

@pytest.fixture(scope='module')
def pool():
    "Smooth random latents, so that there is something to learn."
    torch.manual_seed(1)
    p = numbered()
    return dataclasses.replace(p, latents=torch.randn(3, 36, 128, 2, 2).cumsum(1)/4, codes=torch.randn(108, 32))

@pytest.fixture(scope='module')
def hearing():
    torch.manual_seed(0)
    return WhisperVQ(small().audio).eval()

@pytest.fixture(scope='module')
def scenes(hearing): return write_scenes(hearing, 2, 1.44)

@pytest.mark.parametrize('frames, chunks', [(1, 7), (2, 5), (3, 4), (6, 3), (6, 6)])
def test_batch_is_aligned(frames, chunks):
    "Audio, pose, face and caption of every frame are those of its own time, whatever the chunk length."
    p, g = numbered(), torch.Generator().manual_seed(frames)
    latents, reference, signals, face = p.batch(64, chunks, frames, g)
    assert latents.shape == (64, chunks*frames, 128, 2, 2) and reference.shape == (64, 128, 2, 2) and signals['text'].shape == (64, chunks, 64)
    when = latents[:, :, 0, 0, 0]
    scene, t = (when//1000).long(), (when % 1000).long()
    assert (scene == scene[:, :1]).all() and (t.diff(dim=1) == 1).all() and (t[:, 0] % frames == 0).all()
    assert torch.equal(signals['audio'][..., 0].long(), scene*36 + t)
    assert torch.allclose(signals['pose'].velocity[..., 0, 0], when/1000) and torch.allclose(face[..., 0], when/1000)
    middle = t[:, frames//2::frames]
    assert torch.equal(signals['text'][..., 0], (scene[:, ::frames]*6 + middle//6) % 100 + 5)
    assert t.max() == 35 and t.min() == 0 and len(scene.unique()) == 3                               # the ends of a scene are drawn too

def test_batch_at_25_frames_a_second():
    "Two frames share an audio token."
    latents, _, signals, _ = numbered(per_token=2).batch(16, 2, 6, torch.Generator().manual_seed(0))
    when = latents[:, ::2, 0, 0, 0]
    assert torch.equal(signals['audio'][..., 0].long(), ((when//1000)*18 + (when % 1000)//2).long())

@pytest.mark.parametrize('frames', [1, 3, 6])
def test_reference_is_of_the_same_scene_and_of_the_start(frames):
    p = numbered(); many = p.reference.shape[1]
    latents, reference, *_ = p.batch(32, 2, frames)
    for z, r in zip(latents, reference):
        scene, start = divmod(int(z[0, 0, 0, 0]), 1000)
        assert torch.equal(r, p.reference[scene, start*many//36])

def test_portraits_look_where_their_part_of_the_scene_begins(scenes, hearing):
    "The k-th portrait of a scene has the pose of the frame before the k-th part, closed lips and open eyes; one in four its mood, too."
    from types import SimpleNamespace
    from midas_ref.data.portraits import MOTION, Identity, bake
    seen = []
    class People:
        device, layers = 'cpu', bake([Identity.random(0)], 64, views=(3, 1))
        def draw(self, who, m): seen.append(m); return torch.zeros(*m.shape[:2], 3, 64, 64)
    codec = SimpleNamespace(mean=torch.zeros(1), encode=lambda x, check: torch.zeros(*x.shape[:2], 128, 1, 1), fingerprint=lambda decoder: 'x')
    cfg = dataclasses.replace(small(), frames_per_chunk=6)
    pool = draw_pool(scenes, People(), SimpleNamespace(codec=codec, audio=hearing, cfg=cfg), references=6, together=1)
    assert pool.reference.shape[:2] == (2, 6)
    for k, drawn in enumerate(torch.cat(seen, 1)[0].split(18 + 6)):
        truth, portraits = drawn[:18], drawn[18:]
        for i, r in enumerate(portraits):
            at, same = truth[max(0, 3*i - 1)], lambda *names: torch.allclose(r[[MOTION.index(n) for n in names]], at[[MOTION.index(n) for n in names]])
            assert same('yaw', 'pitch', 'roll', 'tx', 'ty', 'tz', 'gaze_x', 'gaze_y') and not r[[MOTION.index(n) for n in ('open', 'jaw', 'blink_l', 'blink_r')]].any()
            assert same('smile', 'squint', 'furrow', 'brow_l', 'brow_r') == (i % 4 == 3)

def with_past(scenes=3, **shares):
    "A numbered pool whose second past lies 100,000 higher; in scene 0 the head is elsewhere, in scene 1 the mood, in scene 2 both."
    p = numbered(scenes)
    apart = torch.tensor([[True, False], [False, True], [True, True]])
    place = torch.zeros(scenes, 36, 12, 2)
    return dataclasses.replace(p, past=p.latents + 100_000, apart=apart, place=place, shown=place[:, :2], **shares)

def test_a_past_that_is_elsewhere_is_led_by_signals_that_stay():
    "Those who look back on it are told what leads out of it, always; the others look back on the truth."
    latents, _, signals, _ = with_past(led=.5, places=0.).batch(400, 3, generator=torch.Generator().manual_seed(0))
    scene, off = (latents[:, 0, 0, 0, 0]//1000).long(), (signals['past'] - latents).flatten(1)
    led = off[:, 0] == 100_000
    assert (off == off[:, :1]).all() and (off[~led] == 0).all() and abs(led.float().mean() - .5) < .1
    assert torch.equal(signals['sure']['pose'], led & (scene != 1)) and torch.equal(signals['sure']['text'], led & (scene != 0))
    assert torch.equal(torch.isfinite(signals['pose'].moved).flatten(1).all(1), signals['sure']['pose'])           # they know their way, whatever the share of others
    assert 'past' not in numbered().batch(4, 3)[2]

def test_the_trainer_looks_back_on_it():
    "The past of the pool is what the model sees, with the truth as its target, and live pasts begin at the truth."
    p, seen = with_past(led=1.), []
    t = JointTrainer(Midas(small()), torch.ones(4, 128), Recipe(astray=0., blind=0., own=0.))
    t.context = lambda latents, *a: seen.append(latents) or JointTrainer.context(t, latents, *a)
    batch = p.batch(2, 2, generator=torch.Generator().manual_seed(0))
    t.loss(batch, .1)
    assert torch.equal(seen[0], batch[2]['past']) and (seen[0] - batch[0] == 100_000).all()
    assert t.live(batch).shape == batch[0].shape

def test_elsewhere_moves_heads_and_moods_alone():
    m = torch.rand(60, 18, len(MOTION), generator=torch.Generator().manual_seed(0))*.4
    other, apart = elsewhere(m, torch.Generator().manual_seed(1))
    again, _ = elsewhere(m, torch.Generator().manual_seed(1))
    heads, rest = [MOTION.index(n) for n in HEADS], [i for i, n in enumerate(MOTION) if n not in HEADS and i not in MOODY]
    assert torch.equal(other, again) and torch.equal(other[..., rest], m[..., rest])
    assert torch.equal((other != m)[..., heads].flatten(1).any(1), apart[:, 0]) and torch.equal((other != m)[..., MOODY].flatten(1).any(1), apart[:, 1])
    assert {tuple(a) for a in apart.tolist()} == {(True, False), (False, True), (True, True)} and other.abs().max() <= 1
    assert (other - m)[..., heads].std(1)[apart[:, 0]].min() > 0                                                     # it sways

def test_misheard_tokens_are_like_their_own():
    "The share is kept, and what is heard instead is one of the six nearest codes."
    p = dataclasses.replace(numbered(), mishear=.25)
    heard = p.batch(64, 6, generator=torch.Generator().manual_seed(0))
    truth = (heard[0][..., 0, 0, 0]//1000*36 + heard[0][..., 0, 0, 0] % 1000).long()
    ids = heard[2]['audio'][..., 0].long()                                                                           # the codes of a numbered pool lie on a line
    assert abs((ids != truth).float().mean() - .25) < .03 and (ids - truth).abs().max() <= 6
    assert torch.equal(numbered().batch(4, 3, generator=torch.Generator().manual_seed(0))[0], dataclasses.replace(numbered(), mishear=.5).batch(4, 3, generator=torch.Generator().manual_seed(0))[0])

@pytest.mark.parametrize('rows, chunks, frames, per_token, said', [(1, 7, 6, 1, '36 frames'), (1, 40, 1, 1, '36 frames'), (0, 1, 6, 1, '1 or more'), (1, 0, 6, 1, '1 or more'), (1, 1, 0, 1, '1 or more'), (1, 2, 3, 2, 'whole audio tokens')])
def test_batch_refuses(rows, chunks, frames, per_token, said):
    with pytest.raises(ValueError, match=said): numbered(per_token=per_token).batch(rows, chunks, frames)

def test_scenes_file(scenes, tmp_path, hearing):
    scenes.save(tmp_path/'deep'/'s.safetensors')
    again = Scenes.load(tmp_path/'deep'/'s.safetensors')
    assert all(torch.equal(getattr(again, k), getattr(scenes, k)) for k in ('motion', 'audio', 'words')) and (again.captions, again.fps, again.audio_hash) == (scenes.captions, 12.5, tokenizer_hash(hearing))
    assert scenes.motion.shape[:2] == scenes.audio.shape == (2, 18) and scenes.words.shape == (2, 3)
    four = dataclasses.replace(scenes, **{k: torch.cat([getattr(scenes, k)]*2) for k in ('motion', 'audio', 'words')})
    four.part(1, 2).save(tmp_path/'part.safetensors')                                # rows that do not lie together
    assert torch.equal(Scenes.load(tmp_path/'part.safetensors').motion, scenes.motion[[1, 1]])
    with pytest.raises(FileNotFoundError, match='midas-ref data scenes'): Scenes.load(tmp_path/'none.safetensors')
    (tmp_path/'half.safetensors').write_bytes((tmp_path/'deep'/'s.safetensors').read_bytes()[:-100])
    with pytest.raises(ValueError, match='not a complete safetensors file'): Scenes.load(tmp_path/'half.safetensors')
    save_file({'x': torch.zeros(1)}, tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='holds no scenes but x'): Scenes.load(tmp_path/'other.safetensors')
    save_file({k: torch.zeros(1) for k in ('motion', 'audio', 'words')}, tmp_path/'bare.safetensors', {'captions': '[]'})
    with pytest.raises(ValueError, match='holds no scenes'): Scenes.load(tmp_path/'bare.safetensors')

def test_scenes_repeat_and_differ(scenes, hearing):
    again, later = write_scenes(hearing, 2, 1.44), write_scenes(hearing, 1, 1.44, first=1)
    assert torch.equal(again.audio, scenes.audio) and torch.equal(again.motion, scenes.motion)
    assert torch.equal(later.motion[0], scenes.motion[1]) and not torch.equal(later.motion[0], scenes.motion[0])
    with pytest.raises(ValueError, match='whole chunks of 0.48 s'): write_scenes(hearing, 1, 5.)
    with pytest.raises(ValueError, match='1 or more'): write_scenes(hearing, 0)

def test_another_tokenizer_is_refused(scenes, hearing):
    torch.manual_seed(3)
    m = Midas(small(), audio=WhisperVQ(small().audio))
    with pytest.raises(ValueError, match='heard with tokenizer'): check_scenes(scenes, m)
    with pytest.raises(ValueError, match='25 frames per second'): check_scenes(dataclasses.replace(scenes, fps=25.), Midas(small(), audio=hearing))
    check_scenes(scenes, Midas(small(), audio=hearing))

def fresh(pool, **kw):
    torch.manual_seed(5)
    return JointTrainer(Midas(small()), pool.activity(), Recipe(**dict(warm=1, lr=3e-3) | kw))

def run(trainer, pool, n, progress=.9):
    "Losses of n steps with own frames in the past and chunks of several lengths."
    plan = Plan((3, 2), (2, 4))
    return [float(trainer.update(lambda: plan.draw(pool, progress, .5, trainer.g), progress)['flow']) for _ in range(n)]

def same(a, b):
    "Whether two trainers agree to the bit: weights, averages, moments, generators, step."
    pairs = [(a.model.trained_state(), b.model.trained_state()), (a.ema, b.ema), (a.reader.state_dict(), b.reader.state_dict()), (dict(g=a.g.get_state(), c=a.cpu.get_state()), dict(g=b.g.get_state(), c=b.cpu.get_state()))]
    flat = lambda t: {(n, k): v for n, o in enumerate(t.opts) for k, v in moments(o).items()}
    pairs += [(flat(a), flat(b))]
    return a.step == b.step and all(set(x) == set(y) and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)

def test_two_equal_runs_are_equal(pool):
    "Nothing random comes from the global generator: dropping, own frames, noise, chunk lengths."
    a, b = fresh(pool), fresh(pool)
    torch.manual_seed(1); first = run(a, pool, 6)
    torch.manual_seed(2); state = torch.get_rng_state()
    assert run(b, pool, 6) == first and same(a, b) and torch.equal(torch.get_rng_state(), state)
    assert run(fresh(pool, seed=1), pool, 6) != first

def test_resume_is_exact(pool, tmp_path):
    straight, a, b = fresh(pool), fresh(pool), fresh(pool, seed=0)
    losses = run(straight, pool, 6)
    assert run(a, pool, 3) == losses[:3]
    save_run(a, tmp_path/'c.safetensors'); run(b, pool, 1); load_run(b, tmp_path/'c.safetensors')
    assert same(a, b) and run(b, pool, 3) == losses[3:] and same(b, straight)
    assert not list(tmp_path.glob('*.partial'))

def test_muon_is_exact_too_and_takes_the_inner_matrices(pool, tmp_path):
    a, b, plain = fresh(pool, muon=2.), fresh(pool, muon=2.), fresh(pool)
    adam, muon = a.opts
    inner = {n for n, p in a.model.named_parameters() if any(p is q for g in muon.param_groups for q in g['params'])}
    assert sum(len(g['params']) for o in a.opts for g in o.param_groups) == len(a.params) and len(inner) == 2*7 + 4 + 1
    assert all('.layers.' in n or 'head.blocks' in n or n == 'head.modulation.weight' for n in inner) and not any('norm' in n or 'table' in n or 'bias' in n for n in inner)
    losses = run(a, pool, 4)
    assert muon.param_groups[0]['lr'] == 2*adam.param_groups[0]['lr'] and losses != run(plain, pool, 4)
    assert run(b, pool, 2) == losses[:2]
    save_run(b, tmp_path/'c.safetensors'); c = fresh(pool, muon=2.); load_run(c, tmp_path/'c.safetensors')
    assert same(b, c) and run(c, pool, 2) == losses[2:] and same(a, c)
    with pytest.raises(ValueError, match='another optimiser'): load_run(plain, tmp_path/'c.safetensors')

def test_compiled_layers_are_the_same_layers(pool):
    "Also in what is kept: a copy for the average is not compiled."
    run_one = lambda t: [float(t.update(lambda: (pool.batch(2, 2, generator=t.g), None), .3)['flow']) for _ in range(2)]
    torch.manual_seed(5); plain = JointTrainer(Midas(small()), pool.activity(), Recipe(warm=1, lr=3e-3))
    torch.manual_seed(5); fast = JointTrainer(Midas(small()), pool.activity(), Recipe(warm=1, lr=3e-3), fast=True)
    assert run_one(fast) == pytest.approx(run_one(plain), rel=1e-4)
    assert any(m._compiled_call_impl for m in fast.model.modules()) and not any(m._compiled_call_impl for m in averaged(fast).modules())
    from torch._dynamo.utils import counters
    graphs = lambda: counters['stats']['unique_graphs']
    made = graphs(); assert made > 0
    short = [float(t.update(lambda t=t: (pool.batch(2, 4, 3, t.g), 3), .3)['flow']) for t in (fast, plain)]         # rare lengths run as they are written
    lived = [t.live(pool.batch(2, 2, generator=torch.Generator().manual_seed(0))).float() for t in (fast, plain)]
    assert graphs() == made and short[0] == pytest.approx(short[1], rel=1e-3) and torch.allclose(*lived, atol=.05)

def test_checkpoint_errors(pool, tmp_path):
    t, file = fresh(pool), tmp_path/'c.safetensors'
    with pytest.raises(FileNotFoundError, match='No checkpoint'): load_run(t, file)
    run(t, pool, 1); save_run(t, file)
    data = file.read_bytes(); file.write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match='not a complete safetensors file'): load_run(t, file)
    save_file({'x': torch.zeros(1)}, file)
    with pytest.raises(ValueError, match='no checkpoint of a joint run'): load_run(t, file)
    file.write_bytes(data)
    torch.manual_seed(0)
    other = JointTrainer(Midas(dataclasses.replace(small(), backbone=dataclasses.replace(small().backbone, layers=1))), pool.activity())
    with pytest.raises(ValueError, match='other sizes'): load_run(other, file)

def test_own_frames_are_causal_and_leave_the_mode_alone(pool):
    "An own frame follows from the truth before it: changing frame t changes own frames after t only."
    t = fresh(pool); run(t, pool, 2)
    latents, reference, signals, _ = pool.batch(2, 2, generator=torch.Generator().manual_seed(0))
    other = latents.clone(); other[:, 4] += 1
    a, b = (own_frames(t.model, x, reference, signals, torch.Generator().manual_seed(1), 2) for x in (latents, other))
    moved = (a - b).abs().amax((0, 2, 3, 4))
    assert t.model.training and a.shape == latents.shape and (moved[:5] == 0).all() and (moved[5:] > 0).all()

def test_own_frames_leave_out_what_the_next_pass_leaves_out(pool, monkeypatch):
    "A stream with sound alone strays in its own way: whoever trains without pose looks back on frames drawn without pose."
    t, seen = JointTrainer(Midas(small()), pool.activity(), Recipe(own_from=.5, own_depth=2, blind=0., astray=0.)), []
    forward = type(t.model.conditions).forward
    def watched(self, signals, present=None, lead=None, generator=None, sure=None):
        out = forward(self, signals, present, lead, generator, sure)
        seen.append((out == self.placeholder['pose']).all(-1)[..., self.spans['pose']].flatten(1).all(1).tolist())
        return out
    monkeypatch.setattr(type(t.model.conditions), 'forward', watched)
    batch = pool.batch(16, 2, generator=t.g)
    t.loss(batch, 1.)
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2] and 0 < sum(seen[0]) < 16
    t.loss(batch, 1.)
    assert seen[3] == seen[5] != seen[0]                                       # and another choice in the next step

def test_turned_heads_begin_aside_and_stay_or_come_back():
    at = np.arange(120)/12.5
    all_ = np.stack([turned(s, at) for s in range(400)])
    assert np.abs(all_[:, 0].std(0) - list(TURNED.values())).max() < .03
    stay = (np.abs(all_[:, 0] - all_[:, -1]) < 1e-9).all(1)
    assert .3 < stay.mean() < .5 and np.abs(all_[~stay, -1]).mean() < .5*np.abs(all_[~stay, 0]).mean()

def test_training_learns_and_frozen_parts_stay(pool, hearing):
    torch.manual_seed(5)
    m = Midas(small(), audio=hearing); before = copy.deepcopy(hearing.state_dict())
    t = JointTrainer(m, pool.activity(), Recipe(warm=1, lr=3e-3, blind=0.))
    losses = run(t, pool, 30, progress=.5)
    assert sum(losses[-5:]) < .9*sum(losses[:5])
    assert all(torch.equal(v, before[k]) for k, v in hearing.state_dict().items()) and not any('frozen' in k for k in t.ema)
    kept = averaged(t)
    assert not kept.training and all(torch.equal(kept.trained_state()[k], v) for k, v in t.ema.items()) and t.model.training

def test_weights_stay_in_their_limits(pool):
    w = change_weight(torch.tensor([0., .2, 1., 50.]))
    assert w.tolist() == [.5, .5, 1., 8.] and abs(pool.activity().mean() - 1) < 1e-5

def test_swap_check_hears(pool):
    "Another's audio changes the loss, the same audio does not; the check draws nothing from anybody's generator."
    t = fresh(pool, reader=(0., 0.)); run(t, pool, 5, .5); g, state = t.g.get_state(), torch.get_rng_state()
    batch = pool.batch(3, 2, generator=torch.Generator().manual_seed(0))
    a, b = (swap_check(t.model, batch, pool.activity()) for _ in range(2))
    assert a == b and a['rise'] != 0. and torch.equal(g, t.g.get_state()) and torch.equal(state, torch.get_rng_state()) and t.model.training
    heard = dict(batch[2], audio=batch[2]['audio'][:1].expand(3, -1, -1))
    assert swap_check(t.model, (batch[0], batch[1], heard, batch[3]), pool.activity())['rise'] == 0.   # the same audio everywhere

# the overfit control

CLIP = dict(astray=0., lr=4e-3, warm=10, final=.1, blind=0., own=0., high=0., keep=.9, repeats=6, reader=(0., 0.))

def overfit(pool, steps=120):
    "Relative error of generated latents after learning two short sequences by heart."
    torch.manual_seed(0)
    m = Midas(dataclasses.replace(small(), head=dataclasses.replace(small().head, width=144, heads=4, portrait=False)))  # it must name 128 numbers of noise, which a portrait would show
    for k in m.conditions.drops: m.conditions.drops[k] = 0.
    batch = pool.batch(2, 2, generator=torch.Generator().manual_seed(4))
    t = JointTrainer(m, torch.ones(4, 128), Recipe(**CLIP))
    for i in range(steps): t.update(lambda: (batch, None), i/steps)
    video = generate(averaged(t), batch[1], batch[2], 2)
    return ((video - batch[0]).square().mean()/batch[0].var()).item()

@pytest.mark.parametrize('shift', [True, False])
def test_overfit_needs_the_shift(pool, monkeypatch, shift):
    "Two sequences learnt by heart are drawn again from the reference; trained without the shift, the same model draws nothing of them."
    calm = dataclasses.replace(pool, latents=pool.latents*.3 + torch.randn(3, 1, 128, 2, 2, generator=torch.Generator().manual_seed(2)))
    right = Layout.predicts
    if not shift: monkeypatch.setattr(Layout, 'predicts', lambda self, device=None: right(self, device) + self.frame_tokens)   # x_i is asked for x_i
    error = overfit(calm)
    print('relative error', error)
    assert error < .2 if shift else error > .5, error

# the commands

def call(capsys, *args):
    "Status, output and errors of a command in this process."
    capsys.readouterr(); status = cli.main([str(a) for a in args]); r = capsys.readouterr()
    return status, r.out, r.err

@pytest.fixture
def weights(tmp_path, monkeypatch, hearing):
    "A stand-in for the bundled weights: only the tokenizer."
    (tmp_path/'w').mkdir(); save_audio(tmp_path/'w'/'audio.safetensors', hearing, dtype=torch.float32)
    for m in (probes, scale): monkeypatch.setattr(m, 'WEIGHTS', tmp_path/'w')            # a module that is first imported here would keep it
    return tmp_path/'w'

def test_commands(capsys, tmp_path, monkeypatch, weights, hearing):
    "Scenes, a first piece of a run, a second one that resumes it."
    status, out, err = call(capsys, 'data', 'scenes', tmp_path/'s.safetensors', '--hours', 2.88/3600, '--seconds', 1.44, '--no-progress')
    assert status == 0 and '2 of 1.44 s' in out and not err
    cfg = dataclasses.replace(small(), video=preset('tiny').video)
    torch.manual_seed(0)
    Midas(cfg, VideoDCAE(cfg.codec), hearing).save_pretrained(tmp_path/'m')
    monkeypatch.setattr(probes, 'People', functools.partial(probes.People, views=(3, 1)))
    line = ['train', 'model', tmp_path/'run', '--data', tmp_path/'s.safetensors', '--start-from', tmp_path/'m', '--people', 1, '--rows', 2, '--minutes', .005, '--device', 'cpu']
    status, out, err = call(capsys, *line, '--end', .5)
    assert status == 0, err
    assert {'checkpoint.safetensors', 'log.jsonl', 'midas', 'strip.png'} <= {p.name for p in (tmp_path/'run').iterdir()}
    first = [json.loads(l) for l in (tmp_path/'run'/'log.jsonl').read_text().splitlines()]
    status, out, err = call(capsys, *line, '--begin', .5, '--resume')
    rows = [json.loads(l) for l in (tmp_path/'run'/'log.jsonl').read_text().splitlines()]
    assert status == 0 and rows[-1]['step'] > first[-1]['step'] and max(r['progress'] for r in first) <= .5 <= rows[-1]['progress'], err
    assert Midas.from_pretrained(tmp_path/'run'/'midas').codec_hash == Midas.from_pretrained(tmp_path/'m').codec_hash

def test_command_mistakes(capsys, tmp_path, weights, scenes):
    scenes.save(tmp_path/'s.safetensors')
    for args, said in ((['data', 'scenes', tmp_path/'s.txt'], 'ends in .safetensors'), (['data', 'scenes', tmp_path/'n.safetensors', '--seconds', 5], 'whole chunks of 0.48 s'),
                       (['train', 'model', tmp_path/'r', '--data', tmp_path/'none'], 'No scenes at'), (['train', 'model', tmp_path/'r', '--data', tmp_path/'s.safetensors', '--start-from', tmp_path/'none'], 'No model at'),
                       (['train', 'model', tmp_path/'r'], '--data')):
        status, out, err = call(capsys, *args)
        assert status == 2 and said in err and len(err.splitlines()) == 1, err
    (weights/'audio.safetensors').unlink()
    status, _, err = call(capsys, 'data', 'scenes', tmp_path/'n.safetensors')
    assert status == 2 and 'No audio tokenizer at' in err and len(err.splitlines()) == 1
    with pytest.raises(FileNotFoundError, match='train them first'): new_midas('tiny', weights=weights)
    assert not (tmp_path/'r').exists() and not (tmp_path/'n.safetensors').exists()

RANKS = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']
from test_train import numbered, small
from dataclasses import replace
from midas_ref.codec.train import join_ranks, rank
from midas_ref.model.midas import Midas
from midas_ref.training.train import JointTrainer, Plan, load_run, train_model
torch.set_num_threads(1); join_ranks()
torch.manual_seed(rank())                                                          # every process begins elsewhere
pool = numbered(); pool = replace(pool, latents=torch.randn(3, 36, 128, 2, 2), codes=torch.randn(108, 32))
trainer = JointTrainer(Midas(small()), pool.activity())
train_model(trainer, pool, 0, sys.argv[2], plan=Plan((2, 2), (2, 2)), steps=2, say=None)
torch.save([p.detach() for p in trainer.params] + list(trainer.ema.values()), f'{sys.argv[2]}/rank{rank()}.pt')
load_run(trainer, sys.argv[2] + '/checkpoint.safetensors')
torch.save([torch.rand(8, generator=g) for g in (trainer.g, trainer.cpu)], f'{sys.argv[2]}/numbers{rank()}.pt')
"""

def test_processes_stay_equal(tmp_path):
    "Two processes with other batches, other noise and other first weights end with the same weights; when they go on, their noise is not the same."
    root = Path(__file__).parents[1]
    (tmp_path/'ranks.py').write_text(RANKS)
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone', str(tmp_path/'ranks.py'), str(root), str(tmp_path)],
                         capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert run.returncode == 0, run.stderr[:6000]
    a, b = (torch.load(tmp_path/f'rank{k}.pt', weights_only=True) for k in (0, 1))
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
    a, b = (torch.load(tmp_path/f'numbers{k}.pt', weights_only=True) for k in (0, 1))                          # after going on from a checkpoint, which holds the generators of one
    assert not any(torch.equal(x, y) for x, y in zip(a, b))
    assert (tmp_path/'midas'/'model.safetensors').is_file()

def test_parts_of_scenes_are_disjoint(scenes):
    parts = [scenes.part(k, 2) for k in range(2)]
    assert torch.equal(torch.cat([p.motion for p in parts]), scenes.motion) and torch.equal(torch.cat([p.audio for p in parts]), scenes.audio)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_fast_on_cuda(pool):
    "Compiled layers and FlexAttention give the losses of plain ones, with Muon, own frames and shorter chunks."
    cuda = dataclasses.replace(pool, **{f.name: v.cuda() for f in dataclasses.fields(pool) if isinstance(v := getattr(pool, f.name), torch.Tensor)})
    def losses(fast):
        torch.manual_seed(5)
        model = Midas(dataclasses.replace(small(), backbone=dataclasses.replace(small().backbone, width=64, heads=4, kv_heads=2, head_dim=16))).cuda()
        t = JointTrainer(model, cuda.activity(), Recipe(warm=1, lr=1e-3, muon=2.), fast=fast)
        assert {f: m.backbone.blocks for f, m in t.lengths.items()} == {1: False, 2: False, 3: False, 6: fast}
        return run(t, cuda, 6)
    assert losses(True) == pytest.approx(losses(False), rel=.03)

def test_own_frames_look_as_a_stream_remembers_them(pool, monkeypatch):
    "What `held` of page 60 makes of a frame, for whole sequences; without a gain they stay as drawn, and a trainer uses the gain of its model."
    from midas_ref.inference.session import held
    from midas_ref.training import train as T
    g = torch.Generator().manual_seed(4)
    x, ref, looks = torch.randn(2, 3, 128, 4, 4, generator=g), torch.randn(2, 128, 4, 4, generator=g), .1*torch.randn(16, 128, 128, generator=g)
    tokens = lambda v: v.flatten(-2).movedim(-1, -2)
    want = torch.stack([held(tokens(x[:, t]), tokens(ref), 1., looks) for t in range(3)], 1)
    torch.testing.assert_close(tokens(like(x, ref, looks)), want)
    assert like(x, ref, None) is x
    t = JointTrainer(Midas(small()), pool.activity(), Recipe(own=1., blind=0., astray=0.))
    latents, reference, signals, _ = pool.batch(2, 2, generator=t.g)
    monkeypatch.setattr(T, 'own_frames', lambda model, x, *a: x + 1)
    t.model.looks = looks[:latents[0, 0, 0].numel()]
    torch.testing.assert_close(t.context(latents, reference, signals, 1), like(latents + 1, reference, t.model.looks))

def test_own_frames_go_as_deep_as_told(pool, monkeypatch):
    "Each pass draws from what the last one left, so that after k passes a frame stands at most, and sometimes, on k own ones."
    from midas_ref.training import train as T
    seen, t = [], JointTrainer(Midas(small()), pool.activity(), Recipe(own_from=.5, own_depth=3, blind=0., astray=0.))
    def deeper(model, x, *a): return torch.cat([x[:, :1]*0, x[:, :-1]], 1) + 1
    monkeypatch.setattr(T, 'own_frames', deeper)
    latents, reference, signals, _ = batch = pool.batch(4, 2, generator=t.g)
    zeros = torch.zeros_like(latents)
    assert [t.context(zeros, reference, signals, k).max().item() for k in range(4)] == [0, 1, 2, 3]
    monkeypatch.setattr(t, 'context', lambda x, r, s, passes: seen.append(passes) or x)
    for progress in (.4, .5, .51, .67, .7, .9, 1.): t.loss(batch, progress)
    t.loss(pool.batch(2, 2, 3, t.g), .9, 3)                                    # own frames are drawn for chunks of full length alone
    assert seen == [0, 0, 1, 2, 2, 3, 3, 0]
    t.r.own = 0.; t.loss(batch, .9); assert seen[-1] == 0

@pytest.mark.skipif(not (WEIGHTS/'midas'/'looks.safetensors').is_file(), reason='no bundled weights')
def test_a_model_that_goes_on_keeps_its_gain(tmp_path):
    "As long as it is about the latents of the codec that is taken."
    import shutil
    at = shutil.copytree(WEIGHTS/'midas', tmp_path/'m')
    a, b = new_midas('tiny', at, anew=True), Midas.from_pretrained('tiny')
    assert torch.equal(a.looks, b.looks)
    from midas_ref.model.midas import save_looks
    save_looks(at, b.looks, 'another')
    assert new_midas('tiny', at, anew=True).looks is None

def test_a_model_goes_on_with_another_codec(tmp_path):
    "The weights of the model, the codec of the folder; other sizes are refused."
    from midas_ref.training.train import WEIGHTS, new_midas
    if not (WEIGHTS/'midas').is_dir(): pytest.skip('no trained model')
    old, new = Midas.from_pretrained('tiny'), new_midas('tiny', WEIGHTS/'midas', anew=True)
    now = new.trained_state() | {'pose.net.0.weight': new.pose.net[0].weight[:, :old.pose.net[0].in_features]}
    if not old.head.looks: assert (now.pop('head.look.weight') == 0).all()                                # and draws what it drew
    assert all(torch.equal(v, now[k]) for k, v in old.trained_state().items()) and new.cfg.pose.moved and {'codec', 'audio'} <= set(new.frozen)
    with pytest.raises(ValueError, match='go on from'): new_midas('tiny', anew=True)
    Midas(small()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='has other sizes'): new_midas('tiny', tmp_path, anew=True)

def test_an_error_in_the_whole_past(pool):
    "The same in all frames, in the told share of sequences, towards the next row in some places; what is to be drawn stays true."
    x = pool.latents.float()
    g = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(lead_astray(x, 0., g()), x) and torch.equal(lead_astray(x, 1., g(), 0., 0.), x)
    off = lead_astray(x, 1., g()) - x
    assert torch.allclose(off, off[:, :1].expand_as(off), atol=1e-4) and off.abs().amax((1, 2, 3, 4)).min() > 0
    off = (lead_astray(x, 1., g(), noise=0.) - x)[:, 0]
    way = (off/(x.mean(1).roll(1, 0) - x.mean(1))).mean(1)                        # (b, h, w): one share of the way for each row, or nothing
    assert all(((w.abs() < 1e-3) | ((w - w.max()).abs() < 1e-3)).all() and 0 <= w.max() <= 1 for w in way) and 0 < (way > 1e-3).float().mean() < 1
    many = torch.zeros(400, 2, 1, 1, 1)
    assert .4 < (lead_astray(many, .5, g()).abs().amax((1, 2, 3, 4)) > 0).float().mean() < .6
    t, batch = JointTrainer(Midas(small()), pool.activity(), Recipe(astray=1., blind=0., own=0.)), pool.batch(3, 2)
    assert not torch.equal(t.context(*batch[:3], 0), batch[0]) and torch.equal(JointTrainer(Midas(small()), pool.activity(), Recipe(astray=0., blind=0.)).context(*batch[:3], 0), batch[0])

def test_somebody_else_who_plays_the_same_is_an_error_of_looks_alone(pool, scenes):
    "With pairs, the error moves as the frames do, and rows know who their other one is."
    twice = scenes.twice()
    assert len(twice) == 2*len(scenes) and all(torch.equal(getattr(twice, k)[i::2], getattr(scenes, k)) for k in ('motion', 'audio', 'words') for i in (0, 1))
    n = len(pool)//2*2
    pairs = dataclasses.replace(pool, **{k: v[:n] for k, v in vars(pool).items() if isinstance(v, torch.Tensor) and k != 'codes'}, pairs=True)
    x, _, signals, _ = pairs.batch(8, 2, generator=torch.Generator().manual_seed(0))
    sums = [(s, t) for b in range(8) for s in range(n) for t in range(0, pool.latents.shape[1] - 11, 6) if torch.equal(pool.latents[s, t:t+12].float(), x[b]) and torch.allclose(pool.latents[s ^ 1, t:t+12].float(), x[b] + signals['other'][b], atol=1e-5)]
    assert len(sums) == 8
    off = lead_astray(x, 1., torch.Generator().manual_seed(1), 0., 1., signals['other']) - x
    way = (off/signals['other']).flatten(3).median(2).values                    # one share for a place and all of its frames
    assert ((way - way[:, :1]).abs() < 1e-3).all() and way.max() <= 1.001 and (way.abs() < 1e-3).any() and (way > 1e-3).any()
    t = JointTrainer(Midas(small()), pool.activity(), Recipe(astray=1., blind=0., own=0.))
    a, b = (t.g.manual_seed(3) and t.context(x, x[:, 0], s, 0) for s in (signals, {k: v for k, v in signals.items() if k != 'other'}))
    assert not torch.equal(a, b)
    assert torch.isfinite(t.loss((x, x[:, 0], signals, torch.zeros(*x.shape[:2], READINGS)), .1)[0])

def test_readings_tell_mouth_mood_and_turns():
    from midas_ref.data.portraits import MOTION
    from midas_ref.training.train import FACE, TURN, readings
    m = torch.zeros(5, len(MOTION)); m[:, MOTION.index('smile')] = .3; m[:, MOTION.index('pitch')] = torch.tensor([.1, .1, .12, .12, .1])
    r = readings(m)
    assert r.shape == (5, READINGS) and r[:, FACE.index(MOTION.index('smile'))].eq(.3).all()
    assert torch.allclose(r[:, len(FACE) + TURN.index(MOTION.index('pitch'))], torch.tensor([0, 0, .2, 0, -.2]), atol=1e-5)

def test_old_scenes_are_refused(scenes, tmp_path):
    dataclasses.replace(scenes, motion=scenes.motion.to(torch.int8)).save(tmp_path/'old.safetensors')
    with pytest.raises(ValueError, match='older kind'): Scenes.load(tmp_path/'old.safetensors')

def test_the_past_can_be_a_stream_of_the_model(pool, tmp_path):
    "Drawn anew on time, told apart from the truth, and remembered by a checkpoint."
    r = Recipe(warm=1, lr=3e-3, own=.5, own_from=.5, rollout=1., renew=2, blind=0., astray=0., first=1.)
    new = lambda: (torch.manual_seed(5), JointTrainer(Midas(small()), pool.activity(), r))[1]
    draw = lambda t: lambda: (pool.batch(2, 3, generator=t.g), 6)
    t = new(); t.update(draw(t), .4); assert not t.stock
    t.step = 2; t.update(draw(t), .6); first = t.stock
    assert len(first) == 1 and first[0][1].shape == first[0][0][0].shape and not torch.allclose(first[0][1].float(), first[0][0][0].float())
    t.update(draw(t), .6); assert t.stock is first
    for _ in range(4): t.update(draw(t), .6)
    assert len(t.stock) == 2 and t.model.training
    seen, whole = [], t.model.forward
    t.lengths[6].forward = lambda *a, **kw: seen.append((a[0], kw['context'])) or whole(*a, **kw)
    t.loss(pool.batch(2, 3), .6)
    assert any(torch.equal(seen[0][1], own.to(seen[0][1])) and torch.equal(seen[0][0], b[0]) for b, own in t.stock)
    t.loss(pool.batch(2, 3), .4); assert not any(torch.equal(seen[1][1], own.to(seen[1][1])) for _, own in t.stock)
    del t.lengths[6].forward
    save_run(t, tmp_path/'c.safetensors'); losses = [t.update(draw(t), .6)['flow'].item() for _ in range(3)]
    again = new(); load_run(again, tmp_path/'c.safetensors')
    assert [again.update(draw(again), .6)['flow'].item() for _ in range(3)] == losses

def test_of_a_stream_the_drift_alone_is_taken(pool, monkeypatch):
    "A blink of the stream leaves no trace in the past that it gives, a creeping colour does, where the way is told; signals and weights are as in any step."
    r = Recipe(warm=1, lr=3e-3, own=0., own_from=.5, rollout=1., renew=1, first=1.)
    t, seen = (torch.manual_seed(5), JointTrainer(Midas(small()), pool.activity(), r))[1], []
    whole = t.model.forward
    t.lengths[6].forward = lambda *a, **kw: seen.append((a[3], t.model.conditions.training)) or whole(*a, **kw)
    t.update(lambda: (pool.batch(6, 3, generator=t.g), 6), .6)
    assert [x[1] for x in seen] == [True] and torch.equal(seen[0][0], t.weight.expand_as(seen[0][0]))
    ways = dataclasses.replace(pool, latents=torch.randn(3, 36, 128, 2, 2), place=torch.randn(3, 36, 12, 2), shown=torch.zeros(3, 2, 12, 2), places=.5)
    batch = ways.batch(6, 3, generator=torch.Generator().manual_seed(1))
    told = batch[2]['pose'].moved.isfinite().flatten(1).any(1)
    blink, drift = torch.zeros(18, 1, 1, 1), torch.linspace(0, 1, 18)[:, None, None, None]
    blink[8:11] = 9.
    monkeypatch.setattr('midas_ref.training.train.generate', lambda m, ref, s, chunks, level, seed: batch[0] + drift + blink)
    off = t.live(batch).float() - batch[0]
    assert 0 < told.sum() < 6 and off[~told].abs().max() < .01
    off = off[told]
    assert off.max() < 1.1 and (off[:, -1] - off[:, 0]).mean() > .4 and off.diff(dim=1).min() > -.01
    x = torch.randn(2, 9, 3)
    assert torch.equal(running_median(x, 1), x) and torch.equal(running_median(x, 3)[:, 4], x[:, 3:6].median(1).values) and torch.equal(running_median(x, 3)[:, 0], x[:, 0])

def test_beginnings_count_more(pool):
    "The first chunk has four times the weight of the others, the mean stays, and a plan draws short sequences now and then."
    w = first_weight(12, 6, 3.).flatten()
    assert torch.equal(w[:6], torch.full((6,), 1.5)) and torch.equal(w[6:], torch.full((6,), .5))
    t, seen = fresh(pool), []
    whole = t.model.forward
    t.lengths[6].forward = lambda *a, **kw: seen.append(a[3]) or whole(*a, **kw)
    t.loss(pool.batch(2, 3), .1)
    assert seen[0].shape[0] == 18 and torch.allclose(seen[0].mean(0), t.weight) and torch.allclose(seen[0][0], t.r.first*seen[0][6]) and t.r.first == 4
    plan, g = Plan((8, 3), (4, 3), starts=.5, brief=1), torch.Generator().manual_seed(0)
    shapes = [plan.draw(pool, .1, 0., g)[0][0].shape[:2] for _ in range(40)]
    assert 10 < shapes.count((24, 6)) < 30 and set(shapes) == {(24, 6), (8, 18)}
    never = Plan((8, 3), (4, 3), starts=0.)
    assert {never.draw(pool, .1, 0., g)[0][0].shape[:2] for _ in range(10)} == {(8, 18)}

def tiny_tool():
    "tools/tiny.py as a module."
    import importlib.util
    spec = importlib.util.spec_from_file_location('tiny', Path(__file__).parents[1]/'tools'/'tiny.py')
    tiny = importlib.util.module_from_spec(spec); spec.loader.exec_module(tiny)
    return tiny

def test_ablation_of_a_drawn_pool(tmp_path, monkeypatch):
    "tools/tiny.py ablation: the files of the pool, the codec that made it, the seed and the minutes arrive."
    from midas_ref.evaluation import ablations as A
    pool, calls = numbered(2), []
    scale.save_pool(pool, tmp_path/'0.safetensors', codes=pool.codes)
    monkeypatch.setattr(A, 'run_ablation', lambda *a, **k: calls.append((*a, k)))
    monkeypatch.setattr('sys.argv', ['tiny.py', 'ablation', str(tmp_path/'out'), 'window_2', '--device', 'cpu', '--pool', str(tmp_path), '--minutes', '3', '--seed', '5'])
    tiny_tool().main()
    (name, got, parts, out, minutes, recipe, plan, more), = calls
    assert (name, len(got), got.codec_hash, out, minutes, recipe.seed, more) == ('window_2', 2, parts.codec_hash, str(tmp_path/'out'), 3., 5, dict(long=57.6)) and len(got.codec_hash) == 12
    assert torch.equal(got.latents, pool.latents)

def test_a_pool_grows(tmp_path):
    "The pool of tools/tiny.py: files that come later are read, what was there is kept, and batches come from all of them."
    tiny = tiny_tool()
    whole = numbered(6)
    def write(name, k):
        part = dataclasses.replace(whole, **{n: v[k:k+2] for n, v in vars(whole).items() if isinstance(v, torch.Tensor) and n != 'codes'})
        scale.save_pool(part, tmp_path/f'{name}.safetensors', codes=part.codes)
    write('00001', 2)
    pool = tiny.Grow(tmp_path, 'cpu', 1, every=0.)
    assert len(pool.pool) == 2
    write('00000', 0); write('00002', 4)
    latents = pool.batch(64, 3)[0]
    assert len(pool.pool) == 6 and pool.names == ['00001.safetensors', '00000.safetensors', '00002.safetensors']
    assert torch.equal(pool.pool.latents, whole.latents[[2, 3, 0, 1, 4, 5]]) and torch.equal(pool.pool.codes, whole.codes)
    assert {int(v) for v in latents[:, 0, 0, 0, 0]//1000} == set(range(6))
    assert pool.pool.audio.dtype == torch.int64 and pool.pool.velocity.dtype == torch.float32 and len(list(tmp_path.iterdir())) == 3
