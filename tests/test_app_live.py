"Live sessions without a browser: sound in, sound and pictures out on one time line, limits, queue, and nothing left behind"
import gc, threading, time, weakref
import numpy as np, pytest, torch
pytest.importorskip('av')
from app_stand_in import small
from gradio_app.live import RATE, Ears, Hub, Limits, Refused, Voice

MODEL = []
def model():
    if not MODEL: MODEL.append(small())
    return MODEL[0]

def until(f, seconds=10):
    end = time.monotonic() + seconds
    while not f() and time.monotonic() < end: time.sleep(.01)
    assert f()

@pytest.fixture
def make():
    hubs = []
    def build(load=model, **limits):
        h = Hub(load, Limits(**limits)); hubs.append(h)
        until(lambda: h.state in ('ready', 'missing'), 30)
        return h
    yield build
    for h in hubs: h.close(); assert not h.folder.exists()

class Log(list):
    "What a transport would have received."
    def __call__(self, kind, **v): self.append((kind, time.monotonic(), v))
    def of(self, kind): return [v for k, _, v in self if k == kind]

FACE = torch.zeros(3, 128, 128)
def visit(hub, log=None, mic=True, **kw): return hub.open(hub.enqueue(), FACE, emit=log if log is not None else Log(), mic=mic, **kw).result(20)
def voice(seconds, rate=RATE): t = np.arange(round(seconds*rate))/rate; return (.3*np.sin(2*np.pi*200*t)).astype(np.float32)
def speak(live, seconds, rate=RATE, piece=.02, slower=1.):
    "Bring sound in real time, as a microphone does, or so many times slower."
    x, n = voice(seconds, rate), round(piece*rate); begun = time.monotonic()
    for i, a in enumerate(range(0, len(x), n)):
        time.sleep(max(0, begun + i*piece*slower - time.monotonic())); live.hear(x[a:a+n], rate)

# ---- ears and voice

@pytest.mark.parametrize('rate', [8000, 16000, 22050, 44100, 48000, 96000])
def test_any_rate_in_pieces_of_any_size(rate):
    t = np.arange(2*rate)/rate; x = (.5*np.sin(2*np.pi*440*t)).astype(np.float32)
    g, ears, out, at = np.random.default_rng(0), Ears(rate), [], 0
    while at < len(x): k = int(g.integers(1, rate//10)); out.append(ears(x[at:at+k])); at += k
    y = np.concatenate(out)
    assert abs(len(y) - 2*RATE) < 300
    want = .5*np.sin(2*np.pi*440*np.arange(len(y))/RATE)
    lags = range(0, 120); best = max(np.corrcoef(y[400+l:20400+l], want[400:20400])[0, 1] for l in lags)
    assert best > .995

def test_sixteen_bits_and_wrong_sound():
    assert np.allclose(Ears()(np.array([32767, -32768], np.int16)), [1, -1], atol=1e-4)
    for bad in (np.array([np.nan], np.float32), np.array([np.inf], np.float32), np.zeros((2, 2), np.float32)):
        with pytest.raises(Refused): Ears()(bad)
    for rate in (0, 7999, 192001, -1, True, '48000', 4.5, None):
        with pytest.raises(Refused, match='sample rate'): Ears(rate)

def test_voice_is_told_from_silence_and_from_a_noisy_room():
    v, g = Voice(), np.random.default_rng(0)
    room = lambda s: g.normal(0, .004, int(s*RATE)).astype(np.float32)
    assert not Voice()(np.zeros(RATE, np.float32))
    for _ in range(8): v(room(.5))
    assert not v.talking
    assert v(voice(.3) + room(.3)) and v(room(.3)) and not v(room(1.))
    assert v(voice(.1))

# ---- one time line

@pytest.mark.parametrize('frames', [6, 3, 1])
def test_pictures_and_sound_in_step(make, frames):
    hub, log = make(), Log(); live = visit(hub, log, frames=frames)
    x = voice(2.4); live.hear(x, RATE)
    until(lambda: len(log.of('picture')) + live.count['skipped'] >= 30)
    sound = log.of('sound')
    assert [s['pts'] for s in sound] == list(np.cumsum([0] + [len(s['samples']) for s in sound])[:-1])
    assert np.array_equal(np.concatenate([s['samples'] for s in sound]), x)                # every sample once, in order, unchanged
    pts = [p['pts'] for p in log.of('picture')]
    assert pts == sorted(pts) and all(p % 1280 == 0 for p in pts) and len(set(pts)) == len(pts)
    assert len(pts) + live.count['skipped'] == 30

def test_in_real_time_nothing_is_skipped_and_pictures_follow_their_sound(make):
    hub, log = make(), Log(); live = visit(hub, log)
    speak(live, 3, 48000, slower=max(1., 3*hub.pace))                                      # real time, unless the machine has other work
    until(lambda: len(log.of('picture')) >= 30)
    assert live.count['skipped'] == 0
    f = live.figures()
    assert f['latency_ms'] >= 480 - 20 and f['frames'] >= 30 and {'audio', 'prefill', 'head', 'decode', 'step'} <= set(f['stages_ms']) and f['talking']

def test_a_model_that_is_too_slow_drops_pictures_but_no_sound(make):
    hub, log = make(), Log(); live = visit(hub, log)
    draw = live.session.stream
    def slow(x):
        for y in draw(x): time.sleep(.2); yield y
    live.session.stream = slow
    speak(live, 4.8)
    until(lambda: sum(len(s['samples']) for s in log.of('sound')) >= 4.8*RATE - 7680 and live.current is None)
    assert live.count['skipped'] > 0
    sound = log.of('sound')
    assert np.array_equal(np.concatenate([s['samples'] for s in sound]), voice(4.8)[:sum(len(s['samples']) for s in sound)])

def test_sound_does_not_wait_for_a_busy_worker(make):
    "A chunk of sound goes out when it is complete, while the pictures of the one before are still being drawn."
    hub, log = make(), Log(); live = visit(hub, log)
    draw, begun, go = live.session.stream, [], threading.Event()
    def stuck(x):
        begun.append(True); go.wait(10)
        yield from draw(x)
    live.session.stream = stuck
    live.hear(voice(.48), RATE); until(lambda: begun)
    live.hear(voice(.97), RATE)
    assert [(s['pts'], len(s['samples'])) for s in log.of('sound')] == [(0, 7680), (7680, round(.97*RATE))] and not log.of('picture')
    go.set(); until(lambda: len(log.of('picture')) >= 12)

def test_without_a_microphone_time_goes_on_in_silence(make):
    hub, log = make(), Log(); live = visit(hub, log, mic=False)
    until(lambda: len(log.of('picture')) >= 12)
    assert not np.concatenate([s['samples'] for s in log.of('sound')]).any() and not live.talking
    live.play(voice(1.))
    until(lambda: live.talking, 4); until(lambda: not live.talking, 6)
    heard = live.heard; until(lambda: sum(len(s['samples']) for s in log.of('sound')) >= heard)   # sound goes out with its chunk, later than it is heard
    x = np.concatenate([s['samples'] for s in log.of('sound')])
    assert abs(np.count_nonzero(np.abs(x) > 0) - RATE) < 200                               # all of it, once

def test_what_is_played_takes_the_place_of_the_microphone(make):
    hub, log = make(), Log(); live = visit(hub, log)
    live.play(np.full(RATE//2, .25, np.float32)); live.hear(np.full(RATE, .5, np.float32), RATE)
    until(lambda: log.of('sound'))
    x = np.concatenate([s['samples'] for s in log.of('sound')])
    assert (x[:7000] == .25).all() and live.mic
    live.play(voice(5)); live.hush(); assert not live.playing

# ---- the recording

def test_the_recording_is_written_when_nobody_waits(make, monkeypatch):
    "Pictures go out first; what was not written at the end is written then."
    hub, log = make(), Log(); live = visit(hub, log); frames, wrote = live.recorder.writer.frame, []
    live.recorder.writer.frame = lambda x: (wrote.append(len(log.of('picture'))), frames(x))
    live.hear(voice(.48), RATE); until(lambda: len(wrote) == 6)
    assert wrote[0] >= 1 and log.of('picture')[5]['pts'] == 6400
    monkeypatch.setattr(live.recorder, 'work', lambda w=live.recorder.work: False)           # never any time
    live.hear(voice(.96), RATE); until(lambda: len(log.of('picture')) == 18)
    assert len(wrote) == 6 and len(live.recorder.todo) == 14
    monkeypatch.undo(); live.close(); until(lambda: log.of('ended'))
    assert len(wrote) == 18 and hub.recording(log.of('ended')[0]['recording']).stat().st_size > 1000

def test_a_full_disk_ends_the_recording_and_not_the_session(make):
    hub, log = make(), Log(); live = visit(hub, log)
    def full(x): raise OSError(28, 'No space left on device')
    live.recorder.writer.frame = full
    live.hear(voice(.48), RATE); until(lambda: live.recorder.done)
    live.hear(voice(.48), RATE); until(lambda: len(log.of('picture')) == 12)
    assert not live.closed and not live.recorder.todo
    live.close(); until(lambda: log.of('ended')); assert log.of('ended')[0]['recording'] is None and log.of('ended')[0]['frames'] == 12

# ---- steering

def test_steering_acts_at_the_next_chunk_and_is_checked(make):
    hub, log = make(), Log(); live = visit(hub, log); asked = []
    steer = live.session.steer
    live.session.steer = lambda **k: (asked.append(k), steer(**k))
    live.steer(expression='happy', level=7); live.hear(voice(.48), RATE); until(lambda: len(asked) == 1)
    assert asked[0]['text'].startswith('smiling, ') and asked[0]['level'] == 7 and asked[0]['pose'] is None
    live.steer(text='  a wide \n grin ', yaw=.5); live.hear(voice(.48), RATE); until(lambda: len(asked) == 2)
    assert asked[1]['text'] == 'a wide grin, talking' and tuple(asked[1]['pose'].shape) == (6, 12, 2) and asked[1]['pose'].abs().max() > .01
    live.steer(yaw=0.); live.hear(voice(.96), RATE); until(lambda: len(asked) == 4)
    assert asked[3]['pose'] is None                                                        # the pad rests: the placeholder again
    for bad in (dict(expression='evil'), dict(text=5), dict(text='x'*201), dict(level=20), dict(level=float('nan')), dict(level='3'), dict(level=True), dict(frames=4), dict(frames=[6]),
                dict(yaw=float('inf')), dict(pitch=9), dict(roll='left')):
        with pytest.raises(Refused): live.steer(**bad)

def test_another_chunk_length(make):
    hub, log = make(), Log(); live = visit(hub, log)
    live.hear(voice(.48), RATE); until(lambda: len(log.of('picture')) == 6)
    live.steer(frames=2); live.hear(voice(.48), RATE); until(lambda: len(log.of('picture')) == 12)
    assert live.frames == 2 and [p['pts'] for p in log.of('picture')] == [1280*i for i in range(12)]

def test_silence_listens_and_voice_talks(make):
    hub = make(); live = visit(hub); asked = []
    steer = live.session.steer; live.session.steer = lambda **k: (asked.append(k['text'].split(', ')[1]), steer(**k))
    for x in (voice(.96), np.zeros(2*7680, np.float32), voice(.48)): 
        for part in np.split(x, len(x)//7680): 
            n = len(asked); live.hear(part, RATE); until(lambda: len(asked) > n)
    assert asked == ['talking', 'talking', 'talking', 'listening', 'talking']

# ---- limits

def test_queue_at_the_limit(make):
    hub = make(sessions=1, waiting=2); a = visit(hub)
    t, u = hub.enqueue(), hub.enqueue()
    assert hub.place(t) == 1 and hub.place(u) == 2 and 'number 2' in hub.queue_message(2)
    with pytest.raises(Refused, match='Please come back'): hub.enqueue()
    with pytest.raises(Refused, match='places are taken'): hub.open(t, FACE).result(5)
    hub.leave(t); assert hub.place(u) == 1
    begun = time.monotonic(); a.close(); until(lambda: hub.place(u) == 0, 2)
    b = hub.open(u, FACE).result(5); assert time.monotonic() - begun < 2 and hub.status()['live'] == 1
    b.close(); until(lambda: hub.status()['live'] == 0)

def test_idle_and_total_time(make):
    log = Log(); hub = make(idle=1.); live = visit(hub, log, mic=False)
    until(lambda: live.closed, 5); assert live.reason == 'idle'; until(lambda: log.of('ended'))
    hub = make(total=1., idle=60); live = visit(hub)
    speak(live, 1.5); until(lambda: live.closed, 3); assert live.reason == 'time is up'
    live.hear(voice(.1), RATE)                                                             # a late message harms nobody

def test_steering_keeps_a_session_awake(make):
    hub = make(idle=1.); live = visit(hub, mic=False)
    for _ in range(15): live.steer(level=3); time.sleep(.1)
    assert not live.closed

def test_everything_is_freed(make):
    hub = make(sessions=3)
    gone, held = [], []                                                                    # a transport may hold a dead `Live` for a while
    for i in range(10):
        live = visit(hub); live.hear(voice(.5), RATE); gone.append((weakref.ref(live.session), weakref.ref(live.session.streams))); time.sleep(.02*(i % 3)); live.close(); held.append(live)
    until(lambda: hub.status()['live'] == 0 and not hub.jobs); hub.call(lambda: None).result(5); del live
    gc.collect()
    assert not [r for pair in gone for r in pair if r()] and hub.status()['held_mb'] == 0
    assert hub.status()['counters']['opened'] == hub.status()['counters']['closed'] == 10

def test_a_visitor_who_leaves_while_the_session_is_made(make, monkeypatch):
    import gradio_app.live as live
    hub, log = make(sessions=1), Log(); ticket = hub.enqueue()
    class Leaving(live.Live):
        def __init__(self, *a, **kw): super().__init__(*a, **kw); hub.leave(ticket)
    monkeypatch.setattr(live, 'Live', Leaving)
    with pytest.raises(Refused, match='given up'): hub.open(ticket, FACE, emit=log).result(20)
    monkeypatch.undo()
    s = hub.status(); assert s['live'] == s['waiting'] == s['held_mb'] == 0 and not log and not list(hub.folder.iterdir())
    visit(hub).close()                                                                     # the place is free

def test_two_visitors_do_not_touch_each_other(make):
    hub, a, b = make(), Log(), Log(); one, two = visit(hub, a), visit(hub, b)
    class Broken:
        def stream(self, x): raise RuntimeError('boom')
        def steer(self, **k): pass
        streams = one.session.streams
    one.session = Broken()
    for l in (one, two): l.hear(voice(.96), RATE)
    until(lambda: one.closed and len(b.of('picture')) >= 12)
    assert one.reason == 'an error of ours' and not two.closed

def test_a_picture_is_drawn_for_each_visitor_in_turn(make):
    hub, a, b = make(), Log(), Log(); one, two = visit(hub, a), visit(hub, b)
    for l in (one, two): l.hear(voice(.48), RATE)
    until(lambda: len(a.of('picture')) == len(b.of('picture')) == 6)
    order = sorted([(t, 'a') for k, t, _ in a if k == 'picture'] + [(t, 'b') for k, t, _ in b if k == 'picture'])
    assert ''.join(n for _, n in order) not in ('a'*6 + 'b'*6, 'b'*6 + 'a'*6)

# ---- recording

def test_the_recording_has_all_sound_and_pictures_in_step(make):
    from midas_ref.data.shards import media_frames
    from midas_ref.inference.video import is_marked, read_audio
    hub, log = make(), Log(); live = visit(hub, log)
    live.hear(voice(1.44), RATE); until(lambda: len(log.of('picture')) + live.count['skipped'] == 18); live.close()
    until(lambda: log.of('ended')); key = log.of('ended')[0]['recording']
    path = hub.recording(key)
    assert len(list(media_frames(path, 'video'))) == 18 and is_marked(path)
    y = read_audio(path); assert abs(len(y) - 1.44*RATE) < 2000 and np.corrcoef(y[2000:20000], voice(1.44)[2000:20000])[0, 1] > .99
    for bad in ('', '../x', str(path), None, 7, live.id + '0'): assert hub.recording(bad) is None

def test_old_recordings_are_removed(make):
    hub = make(recordings=2, keep=600.); logs = []
    for _ in range(4):
        logs.append(Log()); live = visit(hub, logs[-1]); live.hear(voice(.48), RATE); until(lambda: logs[-1].of('picture')); live.close(); until(lambda: logs[-1].of('ended'))
    assert hub.status()['recordings'] == 2 and len(list(hub.folder.iterdir())) == 2

# ---- no weights

def test_missing_weights_are_said_plainly(make):
    def nothing(): raise FileNotFoundError("No model at /nowhere: a folder with config.json and model.safetensors is needed.")
    hub = make(nothing)
    assert hub.state == 'missing' and 'config.json' in hub.note
    with pytest.raises(Refused, match='No model at'): visit(hub)
    assert hub.status()['live'] == 0

# ---- WebRTC's clock

def test_a_connection_that_comes_later_keeps_sound_and_picture_together():
    "Sound from before the connection is not expected; what comes leaves with its own time."
    import asyncio
    from gradio_app.rtc import PIECE, Player
    async def go():
        p = Player(lead=.01)
        p.put('picture', 8960, None); p.put('sound', 15360, np.arange(7680, dtype=np.float32))
        return p, *await p.piece(0), time.monotonic()
    p, x, at, now = asyncio.run(go())
    assert at == 15360 and len(x) == PIECE and x[0] == 0 and now >= p.base + 15360/RATE - .001 and p.stalls == 0
