"""The exam of streamed generation: measures with known answers, the scene that is shown, the road from a session to a table."""
import json, math, os
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from midas_ref import cli
from midas_ref.codec.train import CODEC
from midas_ref.data.clips import frame_times, motion, to_uint8, write_script
from midas_ref.data.portraits import MOTION, keypoints, pose
from midas_ref.data.probes import MOOD_NAMES, READ, WEIGHTS, Usual, fit_usual, judge, load_probe
from midas_ref.data.speech import Speech
from midas_ref.conditions.pose import JointVelocity, in_heights
from midas_ref.config import MEMORY_LEVEL, preset, to_dict
from midas_ref.evaluation import ablations as A
from midas_ref.evaluation import quality as Q
from midas_ref.model.midas import Midas
from midas_ref.training import scale

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get('MIDAS_REAL', ROOT.parent/'shared'/'real'))

class Reader(torch.nn.Module):
    "A stand-in for probe B: the opening is the mean of red, yaw of green, lids of blue; everybody is the same person in a neutral mood."
    def __init__(self): super().__init__(); self.p = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x):
        out, mean = torch.zeros(len(x), len(READ)), x.mean((2, 3))
        for c, i in (('open', 0), ('yaw', 1), ('blink_l', 2), ('blink_r', 2)): out[:, READ.index(c)] = mean[:, i]
        return out, torch.eye(len(MOOD_NAMES))[0].expand(len(x), -1)*9, torch.eye(64)[0].expand(len(x), -1)

@pytest.fixture(scope='module')
def case(): return Q.make_case(write_script(20_020, 1.92, 'test', 'talk'), views=(3, 1))

def paint(values): return [np.full((256, 256, 3), round(127.5*(1 + v)), np.uint8) for v in values]

def take(tracks, script=None, m=None):
    n = len(tracks['open'])
    script = script or write_script(20_020, round(n/6)*.48, 'test', 'talk')
    m = motion(script, frame_times(script.seconds, Q.FPS)) if m is None else m
    still = dict(mood=np.tile(np.eye(6)[0], (n, 1)), identity=np.tile(np.eye(64, dtype=np.float32)[0], (n, 1)), change=np.ones(n - 1), face=np.ones(n - 1), **{c: np.zeros(n) for c in ('yaw', 'pitch', 'lids')})
    return Q.Take(script, m, still | tracks, {})

# measures

@pytest.mark.parametrize('lag', [-3, -1, 0, 2])
def test_lag_has_a_sign(lag):
    rng = np.random.default_rng(0)
    x = np.convolve(rng.standard_normal(304), np.ones(5), 'valid')
    assert Q.sync(x[10:-10], np.roll(x, lag)[10:-10])['lag'] == lag

def test_no_movement_is_no_sync():
    x = np.sin(np.arange(60.))
    flat = .2 + 1e-6*np.random.default_rng(0).standard_normal(60)                     # rounding of a picture that stands still
    assert Q.sync(x, flat)['r'] == 0 and math.isnan(Q.sync(x, flat)['lag']) and math.isnan(Q.correlation(x, flat))
    assert math.isnan(Q.pulse([1e-5*x])) and Q.pulse([np.ones(11), np.ones(5)]) == 1

def test_what_is_usual():
    "One in a hundred of those who set the unit lies beyond 1; what never happens together does, where each alone is common."
    g, u = torch.Generator().manual_seed(0), Usual(3)
    assert u(torch.randn(4, 3, generator=g)).isnan().all()                              # not fitted: nobody knows
    draw = lambda n: torch.randn(n, 1, generator=g) + torch.tensor([1., 2., 3.]) + .1*torch.randn(n, 3, generator=g)
    fit_usual(u, draw(4000), draw(4000))
    assert abs((u(draw(4000)) > 1).float().mean() - .01) < .006
    assert u(torch.tensor([[2., 3., 4.]])) < 1 and u(torch.tensor([[2., 1., 4.]])) > 3

def test_only_the_judge_finds_things_strange():
    x = torch.rand(3, 3, 256, 256, generator=torch.Generator().manual_seed(0))*2 - 1
    seen = judge(x, load_probe('b'))
    assert seen['strange'].shape == (3,) and (seen['strange'] > 1).all() and 'strange' not in judge(x, load_probe('a'))

def test_a_probe_from_before_still_reads(tmp_path):
    from safetensors.torch import load_file, save_file
    from safetensors import safe_open
    with safe_open(WEIGHTS/'probe_b.safetensors', 'pt') as f: about = f.metadata()
    save_file({k: v for k, v in load_file(WEIGHTS/'probe_b.safetensors').items() if not k.startswith('usual.')}, tmp_path/'b.safetensors', about)
    x = torch.zeros(2, 3, 256, 256)
    old, new = judge(x, load_probe('b', tmp_path/'b.safetensors')), judge(x, load_probe('b'))
    assert torch.equal(old['open'], new['open']) and old['strange'].isnan().all() and new['strange'].isfinite().all()

def test_one_broken_face_among_eight():
    "A frame that is odd does not count, a second that is does; clips shorter than a second have what they have."
    at = lambda *bad: take(dict(open=np.zeros(48), strange=np.where(np.isin(np.arange(48), bad), 1.9, .7)))
    takes = [at(7)]*7 + [at(*range(30, 48))]
    assert Q.unusual(takes) == pytest.approx(dict(strange=(7*.8 + 1.9)/8, strange_worst=1.9))
    assert Q.unusual([replace(at(), tracks=dict(strange=np.linspace(.4, .6, 6)))])['strange'] == pytest.approx(.5)
    assert all(math.isnan(v) for x in ({}, dict(strange=np.full(6, math.nan))) for v in Q.unusual([replace(at(), tracks=x)]).values())
    assert '1.90*' in Q.quality_table({'model': dict(strange_worst=1.9, places=[1.], own=1.)}) and '0.70*' not in Q.quality_table({'truth': dict(strange_worst=.7, places=[1.], own=1.)})

def test_places_start_anew_with_each_clip():
    "Clips of 10 and 13 frames: the bad place is the second of a chunk in both, and the person's offset does not matter."
    rng = np.random.default_rng(1)
    truths = [rng.random(n) for n in (100, 103, 97)]
    reads = [t + 5*i for i, t in enumerate(truths)]
    for r in reads: r[1::6] = rng.random(len(r[1::6])) + r.mean()
    places = Q.by_place(truths, reads)
    assert places[1] < .5 and min(places[0], *places[2:]) > .95

def test_closing_and_silence():
    said = Speech(np.zeros(32000, np.float32), [(0., .5, ''), (.5, .56, 'm'), (.56, .9, 'a'), (.9, 2., '')])
    when = frame_times(2., Q.FPS)
    at = lambda f: np.array([f(t) for t in when])
    assert Q.closing(at(lambda t: 0. if .48 < t < .58 else .5), said)['closed'] == [1.]
    assert Q.closing(at(lambda t: 0. if t < .45 or t > .61 else .5), said)['closed'] == [0.]        # closed before and after, but not there
    assert Q.closing(np.zeros(25), said)['vowels'] == [1.]                                      # a mouth that never opens is found out
    silent = Speech(np.zeros(16000, np.float32), [(0., 1., '')])
    assert Q.closing(np.zeros(12), silent) == dict(closed=[], chance=[], vowels=[]) and Q.far_from_speech(frame_times(1., 12.5), silent).all()
    far = when[Q.far_from_speech(when, said)]
    assert far[far < .7].max() <= .5 - .16 and far[far > .7].min() >= .9 + .16 and len(far) == 4 + 12

def test_heads_and_moods():
    with pytest.raises(ValueError, match='accepted: 1 to 9'): Q.turned(np.zeros(10), 10)
    assert np.allclose(Q.turned(np.arange(10.), 3), 3)
    read = np.tile(np.eye(6)[1], (24, 1))
    assert Q.moods_read(read, [(0., MOOD_NAMES[1], ''), (.96, MOOD_NAMES[2], '')]) == [1., 0.]
    assert Q.moods_read(read[:11], [(0., MOOD_NAMES[1], '')]) == []                              # two chunks were not there

def test_blinks_of_scripts():
    "The rule counts what the scripts hold, in every mood."
    for k in range(4):
        s = write_script(500 + k, 96., 'test', 'idle')
        lids = motion(s, frame_times(96., Q.FPS))[:, [MOTION.index('blink_l'), MOTION.index('blink_r')]].mean(1)
        assert abs(len(Q.blinks(lids)) - ((s.blinks > -.1) & (s.blinks < 95.9)).sum()) <= 1

def test_pulse_follows_the_chunk_length():
    x = np.ones(47); x[2::3] = 2
    assert Q.pulse([x], 3) == 2 and Q.pulse([x], 6) < 2

def test_lips_find_the_right_clip():
    scripts = [write_script(20_020 + k, 4.8, 'test', 'talk') for k in range(3)]
    tracks = [motion(s, frame_times(4.8, Q.FPS))[:, 1] for s in scripts]
    good = Q.lips([take(dict(open=x), s) for x, s in zip(tracks, scripts)])
    bad = Q.lips([take(dict(open=x), s) for x, s in zip(tracks[1:] + tracks[:1], scripts)])
    assert good['own'] > .999 and good['lag'] == 0 and good['closed'] > .9 and good['silent'] == 1 and good['swapped'] < .3
    assert bad['own'] < .3 and bad['closed'] < good['closed'] - .2 and bad['swapped'] > good['swapped'] + .3

def test_control_wants_the_motion_of_the_truth():
    s = write_script(20_020, 9.6, 'test', 'talk'); m = motion(s, frame_times(9.6, Q.FPS))
    mood = np.stack([np.eye(6)[MOOD_NAMES.index([x for x in s.moods if x[0] <= t][-1][1])] for t in frame_times(9.6, Q.FPS)])
    t = take(dict(open=m[:, 1], yaw=m[:, 9] + .3, pitch=-m[:, 10], mood=mood), s)
    c = Q.control([t], [t])
    assert c['yaw_rate'] > .999 and c['yaw_angle'] > .999 and c['pitch_rate'] < -.999 and c['expression'] == 1

def test_real_voices_are_told_apart():
    scripts = [write_script(20_020 + k, 3.84, 'test', 'talk') for k in range(4)]
    tracks = [motion(s, frame_times(3.84, Q.FPS))[:, 1] for s in scripts]
    right, wrong = (Q.real_voices([take(dict(open=x), s) for x, s in zip(t, scripts)]) for t in (tracks, tracks[1:] + tracks[:1]))
    assert right['real_auc'] == 1 and right['real_r'] > .99 and right['real_closed'] > .9 and wrong['real_auc'] < .7 and wrong['real_r'] < .5

def test_who_becomes_somebody_else_is_noticed():
    "The last second counts, and only scenes whose portrait was read."
    me, other = np.eye(64, dtype=np.float32)[:2]
    t = take(dict(open=np.zeros(60), identity=np.r_[np.tile(me, (48, 1)), np.tile(other, (12, 1))]))
    apart = lambda face: Q.score({('talk', ()): [replace(t, face=face)]})['apart']
    assert apart(torch.from_numpy(other)) < 1e-6 and abs(apart(torch.from_numpy(me)) - 1) < 1e-6 and math.isnan(apart(None))

# the scene

def test_case_gives_what_the_training_gives(case):
    "Velocities are those of the pool of page 50, the first one included; the portrait is no frame of the scene."
    s = case.script
    m = torch.from_numpy(motion(s, frame_times(s.seconds, Q.FPS)))
    pool = JointVelocity(12, fps=Q.FPS)(in_heights(keypoints(case.layers, m[None])[:, :, :12], 256, 256)).velocity[0]
    assert torch.allclose(case.velocity[1:], pool[1:], atol=1e-5) and case.velocity[0].abs().max() < 1.5 and case.velocity.shape == (24, 12, 2)
    assert len(case.words) == 4 and len(case.samples) == 4*7680
    film = case.film
    assert np.array_equal(film[5], np.moveaxis(to_uint8(pose(case.layers, m[None, 5:6])[0, 0]).numpy(), 0, -1))
    assert min(np.abs(film.astype(int) - Q.shown(case.portrait)).mean((1, 2, 3))) > 1
    near = case.driven
    assert np.abs(film[0].astype(int) - Q.shown(near.portrait)).mean() < .5                        # lips aside, the first frame
    assert torch.equal(near.velocity, case.velocity) and torch.equal(near.motion, case.motion)
    with pytest.raises(ValueError, match='whole chunks of 0.48 s'): Q.make_case(write_script(1, 2., 'test', 'idle'))

def test_bad_actors_do_what_they_say(case):
    assert [int(x) for x in Q.late(range(4))] == [0, 0, 1, 2]
    h = Q.halting(case)
    assert torch.allclose(h[::6], case.motion[::6], atol=1e-5) and not torch.allclose(h[5::6], case.motion[5::6], atol=1e-2)
    assert torch.equal(Q.smoothed(case.motion)[:, 9:], case.motion[:, 9:]) and Q.smoothed(case.motion)[:, 1].std() < case.motion[:, 1].std()
    assert np.corrcoef(Q.borrowed(case)[:, 1], case.motion[:, 1])[0, 1] < .7

def test_watch_does_not_depend_on_the_batch(case):
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 255, (24, 256, 256, 3), dtype=np.uint8))
    a, b = (Q.watch(case, iter(frames), Reader().eval(), keep=(0, 7), batch=n) for n in (5, 32))
    assert all(np.allclose(a.tracks[k], b.tracks[k], atol=1e-5) for k in a.tracks) and set(a.kept) == {0, 7} and np.array_equal(a.kept[7], frames[7])
    x = np.stack(frames).astype(float)
    assert np.allclose(a.tracks['change'], 100*np.abs(np.diff(x, axis=0)).mean((1, 2, 3))/255, atol=1e-3) and len(a.tracks['face']) == 23
    for n in (23, 25):
        with pytest.raises(ValueError, match=f'gave {n} frames for a scene of 24'): Q.watch(case, (frames*2)[:n], Reader().eval())

class Stub:
    "A `Session` that writes down what it was told."
    log = []
    def __init__(self, midas, portrait, frames=6, **kw): self.midas, self.n, self.frames = self, 0, frames; self.cfg = type('C', (), dict(chunk_samples=1280*frames)); Stub.log = [('open', tuple(portrait.shape), kw)]
    def steer(self, **kw): Stub.log.append(('steer', kw))
    def stream(self, samples): Stub.log.append(('sound', len(samples))); return iter(paint([0]*self.frames))
    def finish(self): Stub.log.append(('finish',)); return []

@pytest.mark.parametrize('frames', [6, 3])
def test_session_is_told_in_time(case, monkeypatch, frames):
    "Each chunk is preceded by the words that belong to it; pose comes first and whole; sound comes chunk by chunk."
    monkeypatch.setattr(Q, 'Session', Stub)
    case = replace(case, words=['smiling', 'sad', 'angry', 'calm'])
    p = Q.by_session(None, frames=frames, level=5)
    assert p.steered and len(list(p.play(case, ('text', 'pose')))) == 24
    log = Stub.log
    assert log[0] == ('open', (3, 256, 256), dict(level=5)) and torch.equal(log[1][1]['pose'], case.velocity)
    steps = log[2:-1]
    assert [x[0] for x in steps] == ['steer', 'sound']*(24//frames) and log[-1] == ('finish',)
    assert [x[1]['text'] for x in steps[::2]] == [w for w in case.words for _ in range(6//frames)]
    list(p.play(case, ()))
    assert not [x for x in Stub.log if x[0] == 'steer']

def test_rows_of_a_batch_are_what_sessions_draw():
    "Scenes of two lengths, told different things, in one call: the frames of single sessions, up to rounding."
    if not (WEIGHTS/'midas'/'model.safetensors').is_file(): pytest.skip('no bundled model')
    midas = Midas.from_pretrained('tiny')
    a, b, c = (Q.make_case(write_script(s, t, 'test', 'talk'), views=(3, 1)) for s, t in ((5, .96), (6, 1.44), (7, .96)))
    jobs = [(a, ('pose',)), (b, ()), (c, ('text',)), (c, ())]
    p = Q.by_session(midas, seed=3, level=6)
    rows = dict(p.together(jobs))
    assert sorted(rows) == [0, 1, 2, 3] and [len(rows[i]) for i in range(4)] == [12, 18, 12, 12]
    for i, job in enumerate(jobs):
        alone = np.stack(list(p.play(*job))).astype(int)
        assert np.abs(rows[i] - alone).max() <= 3 and np.abs(rows[i] - alone).mean() < .02
    assert np.abs(rows[2].astype(int) - rows[3]).max() > 8                                          # words are heard

def test_long_run_sees_what_was_lost(case):
    "Grey noise over the last frames costs decibels; eyes that are shut are not compared."
    m, ref = case.motion.numpy(), torch.eye(64)[0]
    ok = take(dict(open=m[:, 1], lids=m[:, MOTION.index('blink_l')]), case.script, m)
    rng = np.random.default_rng(0)
    noisy = lambda x, s: np.clip(x + rng.normal(0, s, x.shape), 0, 255).round().astype(np.uint8)
    kept = {i: noisy(case.film[i], 4 if i < 12 else 12) for i in range(24)}
    out = Q.endure(ok, replace(ok, kept=kept), case, ref)
    assert out['eyes_first'] == pytest.approx(20*math.log10(255/4), abs=1) and out['mouth_drop'] == pytest.approx(20*math.log10(3), abs=1)
    assert out['identity_ratio'] == pytest.approx(1) and out['sync_change'] == pytest.approx(0, abs=1e-6)
    shut = take(dict(open=m[:, 1], lids=np.ones(24)), case.script, m)
    assert math.isnan(Q.endure(ok, replace(shut, kept=kept), case, ref)['eyes_drop'])
    turned = take(dict(open=m[:, 1], identity=np.where(np.arange(24)[:, None] < 12, np.eye(64, dtype=np.float32)[0], np.eye(64, dtype=np.float32)[1])), case.script, m)
    assert Q.endure(turned, turned, case, ref)['identity_ratio'] > 20

def test_encore(case):
    "The first frames once more, with their sound, words and way; before that a way back, on which the voice fades."
    again = case.encore(6)
    for name in ('motion', 'film', 'samples'):
        a, b, k = getattr(case, name), getattr(again, name), 1280 if name == 'samples' else 1
        assert len(a) == len(b) and np.array_equal(b[-6*k:], a[:6*k]) and np.array_equal(b[:6*k], a[:6*k])
    assert again.words == case.words[:-1] + case.words[:1] and again.portrait is case.portrait
    assert torch.equal(again.velocity[:6], case.velocity[:6]) and torch.allclose(again.velocity[-5:], case.velocity[1:6], atol=1e-5)
    assert np.abs(again.samples[17*1280:18*1280]).max() <= .1*np.abs(case.samples).max() and not np.array_equal(again.samples, case.samples)
    steps = lambda m: m.diff(dim=0)[:, MOTION.index('yaw')].abs().max()
    cut = torch.cat([case.motion[:18], case.motion[:6]])
    assert steps(again.motion) < .7*steps(cut)                                                                      # no jump
    assert torch.allclose(again.velocity, Q.velocities(case.layers, torch.cat([again.motion[:1], again.motion])).where(torch.arange(24)[:, None, None] > 0, case.velocity), atol=1e-5)
    for bad in (0, 4, 12, -6):
        with pytest.raises(ValueError, match='in steps of 6'): case.encore(bad)

def test_ends_are_whole_chunks():
    "Ten seconds of a long scene, less of a short one."
    assert [Q.ends(n) for n in (3000, 504, 300, 120, 24)] == [126, 126, 72, 30, 6]

# all together

def test_exam_to_table_and_json(case, monkeypatch):
    "A performer that listens plays three times; bounds mark what misses; nothing that was not measured becomes a number."
    monkeypatch.setattr(Q, 'make_case', lambda *a, **k: case)
    told, scripts = [], [('talk', lambda: case.script), ('unheard', lambda: case.script)]
    opening = case.motion[:, 1].numpy()
    good = Q.Performer('good', lambda c, t: paint(opening - .5))
    deaf = Q.Performer('deaf', lambda c, t: (told.append((t, c.portrait is case.driven.portrait)), paint(np.random.default_rng(0).random(24) - .5))[1], True)
    results, stills = Q.quality([good, deaf], scripts, Reader().eval(), keep=(0, 9))
    assert told == [((), False), (('pose',), True), (('text',), False), ((), False)] and set(stills['deaf']) == {0, 9}                   # who is driven begins where the scene begins
    assert results['good']['own'] > .99 and results['good']['unheard'] > .99 and abs(results['deaf']['own']) < .6 and results['deaf']['pose_cost'] == 0 and math.isnan(results['good']['pose_cost'])
    table = Q.quality_table(results).splitlines()
    row = next(line for line in table if line.startswith('opening r, own sound'))
    assert row.endswith('*') and row.count('*') == 1 and not [line for line in table if 'begin a scene' in line] and not [line for line in table if line.startswith('real voices')]
    data = json.loads(Q.quality_json(results, clips=1))
    assert data['results']['good']['pose_cost'] is None and data['bounds']['own'] == [.85, None] and len(data['results']['good']['places']) == 6
    assert Q.contact_sheet(stills, size=50).shape == (100, 100, 3)

def test_beginnings_count(case, monkeypatch):
    "Who listens plays a beginning once, with words; its expression counts among all, and has a line of its own."
    monkeypatch.setattr(Q, 'make_case', lambda *a, **k: case)
    told, name = [], case.script.moods[0][1]
    sees = lambda mood: lambda c, **k: replace(take(dict(open=c.motion[:, 1].numpy(), mood=np.eye(6)[[Q.MOOD_NAMES.index(mood)]*24]), c.script, c.motion.numpy()))
    reads = dict(talk=name, begin=next(n for n in Q.MOOD_NAMES if n != name))
    takes = {(g, ('text',)): [sees(m)(case)] for g, m in reads.items()}
    asked = len(Q.moods_read(takes['begin', ('text',)][0].tracks['mood'], case.script.moods))
    monkeypatch.setattr(Q, 'lips', lambda t: dict(own=1.)); monkeypatch.setattr(Q, 'pulses', lambda t: {}); monkeypatch.setattr(Q, 'control', lambda a, b: dict(expression=Q.mean(x for t in b for x in Q.moods_read(t.tracks['mood'], t.script.moods))))
    out = Q.score(takes | {('talk', ()): takes['talk', ('text',)]})
    assert asked and out['begins'] == 0 and out['expression'] == pytest.approx(sum(Q.moods_read(takes['talk', ('text',)][0].tracks['mood'], case.script.moods))/(2*asked))
    monkeypatch.undo(); monkeypatch.setattr(Q, 'make_case', lambda *a, **k: case)
    deaf = Q.Performer('deaf', lambda c, t: (told.append(t), paint(c.motion[:, 1].numpy() - .5))[1], True)
    Q.quality([deaf], [('talk', lambda: case.script), ('begin', lambda: case.script)], Reader().eval())
    assert told == [(), ('pose',), ('text',), ('text',)]

def test_scripts_are_held_out():
    plan = list(Q.exam_scripts(3, 1.92))
    assert [g for g, _ in plan] == ['talk']*3 + ['begin']*18 + ['unheard']*3 and not [g for g, _ in Q.exam_scripts(2, begins=0) if g == 'begin']
    begun = [make() for g, make in plan if g == 'begin']
    assert {(s.split, s.seconds, s.moods[0][0], all(m[0] >= .96 for m in s.moods[1:])) for s in begun} == {('test', .96, 0., True)} and len({s.moods[0][1] for s in begun}) > 3
    made = [make() for g, make in plan if g != 'begin']
    assert {s.split for s in made} == {'test'} and {s.lang for s in made[3:]} == {'nl', 'tr', 'sw'} and not {s.lang for s in made[:3]} & {'nl', 'tr', 'sw'}

def test_recordings(tmp_path):
    with pytest.raises(FileNotFoundError, match='GRID corpus'): Q.recordings(tmp_path/'none')
    with pytest.raises(ValueError, match='bin blue at f two now'): Q.recordings(tmp_path)

@pytest.mark.skipif(not REAL.is_dir(), reason='no recordings (MIDAS_REAL)')
def test_real_recording_becomes_a_scene():
    s = Q.recorded_script(REAL/'grid_bbaf2n.mpg', 'bin blue at f two now')
    assert s.seconds == pytest.approx(3.36) and len(s.samples) == 7*7680 and s.phonemes()[0][2] == 'b' and .1 < s.phonemes()[0][0] < 1.5
    assert motion(s, frame_times(s.seconds, 12.5))[:, 1].max() > .3 and Q.far_from_speech(frame_times(s.seconds, 12.5), s.speech).any()
    free = Q.recorded_script(REAL/'lr_198-209-0000.ogg')
    assert not free.phonemes() and free.seconds/.48 == pytest.approx(round(free.seconds/.48)) and free.speech.loudness.max() > .3

# the command

def call(capsys, *args):
    "Status, output and errors of a command in this process."
    capsys.readouterr(); status = cli.main([str(a) for a in args]); r = capsys.readouterr()
    return status, r.out, r.err

def test_command(capsys, tmp_path, monkeypatch, case):
    "Without a bundled model: one line, and the table of the rest."
    from midas_ref.data import probes
    assert CODEC.is_dir()
    (tmp_path/'w').mkdir(); [monkeypatch.setattr(m, 'WEIGHTS', tmp_path/'w') for m in (probes, scale)]
    monkeypatch.setattr(probes, 'load_probe', lambda *a, **k: Reader().eval()); monkeypatch.setattr(Q, 'load_probe', lambda *a, **k: Reader().eval())
    monkeypatch.setattr(Q, 'make_case', lambda *a, **k: case)
    monkeypatch.setattr(Q, 'exam_scripts', lambda *a, **k: [('talk', lambda: case.script)])
    monkeypatch.setattr(Q, 'through_codec', lambda codec: Q.Performer('codec', Q.BASELINES[0].play))
    status, out, err = call(capsys, 'bench', 'quality', '--seconds', 1.92, '--no-baselines', '--json', '--no-progress', '--device', 'cpu', '--sheet', tmp_path/'s.png')
    assert status == 0 and len(err.splitlines()) == 2 and 'no bundled model' in err and 'truth, codec, from top' in err and set(json.loads(out)['results']) == {'truth', 'codec'} and (tmp_path/'s.png').is_file()

def test_command_mistakes(capsys, tmp_path):
    for args, said in ((['--seconds', 5], 'whole chunks of 0.48 s'), (['--sheet', 'x.jpg'], 'ends in .png'), ([tmp_path/'none'], 'No model at'), (['--clips', 0], '1 or more'), (['--long', 7], 'whole chunks'), (['--long', .96], '1.92 and more')):
        status, out, err = call(capsys, 'bench', 'quality', *args)
        assert status == 2 and said in err and len(err.splitlines()) == 1 and not out, err

# ablations

def flat(d, at=''): return {k2: v2 for k, v in d.items() for k2, v2 in (flat(v, f'{at}{k}.').items() if isinstance(v, dict) else [(at + k, v)])}

def test_ablations_change_what_they_say():
    base = flat(to_dict(preset('tiny')))
    for name, a in A.ABLATIONS.items():
        new = flat(to_dict(A.changed(preset('tiny'), a.changes)))
        assert {k: v for k, v in new.items() if v != base[k]} == a.changes and (name == 'base') == (not a.changes), name
    used = [(s['level'], s['steps']) for s in A.ABLATIONS['base'].settings]
    assert {n for _, n in used} == {1, 2, 4, 8} and used[0] == (MEMORY_LEVEL, 4) and len(set(used)) == len(used)
    for wrong in ('noise.sigma', 'nothing.at', 'window', ''):
        with pytest.raises(ValueError, match='A configuration has no'): A.changed(preset('tiny'), {wrong: 1})

@pytest.mark.parametrize('whole', [True, False])
def test_exam_of_an_ablation_keeps_what_was_asked(monkeypatch, whole):
    "Without pose and words nothing is said about them; what is not a number is null, in lists too."
    seen = {}
    def quality(cast, scripts, *a): seen['told'] = cast[1].steered; return dict(truth={}, model=dict(own=.5, yaw_rate=.1, eyes_drop=2., expression=.3, real_r=math.nan, places=[.1, math.nan])), {}
    monkeypatch.setattr(A, 'quality', quality)
    got = A.examine(type('M', (), dict(sigmas=torch.zeros(1))), dict(level=3), 1, 1.92, 0., whole)
    assert got == dict(own=.5, real_r=None, places=[.1, None]) | (dict(yaw_rate=.1, eyes_drop=2., expression=.3) if whole else {}) and seen['told'] == whole
    json.dumps(got, allow_nan=False)

def test_long_scenes_in_blocks(monkeypatch):
    "Blocks, scenes and lags are where they belong; lips that stop in the second block are found there, whoever comes first; a block longer than the scene is refused."
    class Model: sigmas = torch.zeros(1)
    def by_session(model, name, **settings):
        def together(jobs):
            for i in reversed(range(len(jobs))):
                frames = list(jobs[i][0].draw())
                yield i, np.stack(frames[:24] + [frames[23]]*24)
        return Q.Performer(name, None, True, together)
    monkeypatch.setattr(A, 'by_session', by_session)
    got = A.over_time(Model(), {}, 2, 3.84, 1.92, views=(3, 1))
    shape = lambda x: np.array(x, float).shape
    assert {k: shape(v) for k, v in got['model'].items()} == dict(sync=(2, 2), identity=(2, 2), energy=(2, 2), turns=(3,), blinks=(2,)) and got['lags'] == [.48, .96, 1.92]
    truth, model = ({k: np.array(v, float) for k, v in got[who].items()} for who in ('truth', 'model'))
    assert np.array_equal(truth['sync'][:, 0], model['sync'][:, 0], equal_nan=True) and truth['sync'][:, 0].mean() > .9 and not (np.nan_to_num(model['sync'][:, 1]) > .5).any()
    assert (model['energy'][:, 1] < .3*truth['energy'][:, 1]).all() and (truth['turns'] > model['turns']).all() and truth['identity'].max() < .2
    with pytest.raises(ValueError, match='at least as long as a block'): A.over_time(Model(), {}, 1, .96)

def test_ablation_command(capsys, tmp_path, monkeypatch):
    "One pool for all names; what is done is not done again; mistakes are one line."
    from midas_ref.data import probes
    from midas_ref.training import train as T
    calls = []
    monkeypatch.setattr(T, 'new_midas', lambda *a: torch.nn.Linear(1, 1)); monkeypatch.setattr(T, 'check_scenes', lambda *a: None)
    monkeypatch.setattr(T.Scenes, 'load', classmethod(lambda cls, path: 'scenes')); monkeypatch.setattr(probes, 'People', lambda *a, **k: 'people')
    monkeypatch.setattr(T, 'draw_pool', lambda *a, **k: calls.append('pool') or 'pool'); monkeypatch.setattr(probes, 'mouth_pool', lambda n: None)
    monkeypatch.setattr(A, 'run_ablation', lambda name, *a: calls.append((name, *a[3:])))
    (tmp_path/'no_noise.json').write_text('{}')
    line = ['train', 'ablation', tmp_path, 'base', 'no_noise', 'window_2', '--data', 'x', '--device', 'cpu', '--clips', 2, '--lasting', 3, '--seed', 4]
    status, out, err = call(capsys, *line)
    told = (10., T.Recipe(seed=4), T.Plan((96, 6), (32, 16)), 2, 9.6, 57.6, 3)
    assert status == 0 and calls == ['pool', ('base', *told), ('window_2', *told)], err
    for args, said in ((['bass'], 'accepted: base, no_noise'), (['base', '--long', 7], 'whole chunks of 0.48 s')):
        status, out, err = call(capsys, 'train', 'ablation', tmp_path, *args, '--data', 'x')
        assert status == 2 and said in err and len(err.splitlines()) == 1, err

def test_ablation_that_is_done_is_read(tmp_path):
    (tmp_path/'base.json').write_text('{"name": "base"}')
    assert A.run_ablation('base', None, None, tmp_path) == {'name': 'base'}
    with pytest.raises(ValueError, match='accepted: base, no_noise'): A.run_ablation('bass', None, None, tmp_path)
    with pytest.raises(ValueError, match='forgets after 61.44 s'): A.run_ablation('no_truncation', None, None, tmp_path, long=240.)
