"Live sessions: one answer for every cut of the sound, equal to the slow reference, alone, in turns, in a batch and with a second thread; wishes act at the next chunk."
import dataclasses, subprocess, sys, threading
from pathlib import Path
import numpy as np, pytest, torch
from midas_ref.codec.temporal import VideoDCAE
from midas_ref.conditions.audio import WhisperVQ
from midas_ref.config import GUIDANCE, GUIDED, MEMORY_HOLD, MEMORY_LEVEL, PUT_RIGHT, preset
from midas_ref.data.probes import Locator
from midas_ref.inference.session import Session, StageClock, Wishes, draw_chunk, fit_looks, fit_locator, generate_offline, held, join_streams, locator_error, open_streams, refine_locator, shares, split_streams, to_bytes
from midas_ref.model.midas import Midas

N = 7680

@pytest.fixture(scope='module')
def midas():
    torch.manual_seed(0)
    tiny, widths = preset('tiny'), (16, 16, 32, 32, 64, 64, 128)
    cfg = dataclasses.replace(tiny, video=dataclasses.replace(tiny.video, height=128, width=64), codec=dataclasses.replace(tiny.codec, encoder_widths=widths, decoder_widths=widths), window_frames=24,
                              backbone=dataclasses.replace(tiny.backbone, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=128), head=dataclasses.replace(tiny.head, width=64, layers=2, heads=4))
    m = Midas(cfg, VideoDCAE(cfg.codec).eval(), WhisperVQ(cfg.audio).eval()).eval()
    for p in (m.head.out.weight, m.tokens.carry.weight, m.head.look.weight): torch.nn.init.normal_(p, std=.05)
    for t in [*m.codec.decoder.time.modules()]:                                    # layers over time that do something
        if hasattr(t, 'proj') and hasattr(t, 'attn'): torch.nn.init.normal_(t.proj.weight, std=.05); torch.nn.init.normal_(t.attn.out.weight, std=.05)
    return m

@pytest.fixture(scope='module')
def sound(): return (.1*np.random.default_rng(0).standard_normal(12*N)).astype(np.float32)

def face(i): return torch.rand(3, 128, 64, generator=torch.Generator().manual_seed(i))*2 - 1
def play(s, x, cuts): return np.concatenate([s.push(p) for p in np.split(x, np.cumsum(cuts)[:-1])])
def differ(a, b): return int(np.abs(a.astype(int) - b.astype(int)).max())

@pytest.mark.parametrize('frames, chunks', [(6, 12), (3, 20), (1, 52)])
def test_streams_equal_the_slow_reference(midas, sound, frames, chunks):
    "In single precision, with pictures as floats, longer than the window of 24 frames; short chunks keep the count of long ones in both."
    s, n, got = Session(midas, face(0), 3, frames), N*frames//6, []
    for k in range(chunks):
        got += [x[0] for x in draw_chunk(s.midas, s.streams, torch.from_numpy(sound[k*n:(k+1)*n])[None], s.reference, {}, MEMORY_LEVEL)]
    slow = generate_offline(s.midas, face(0), torch.from_numpy(sound[:chunks*n]), level=MEMORY_LEVEL, seed=3)
    assert slow.shape[0] == chunks*frames and (torch.stack(got) - slow).abs().max() < 1e-4
    assert slow.std() > .01 and (slow[1:] - slow[:-1]).abs().amax((1, 2, 3)).min() > 1e-3       # something happens

@pytest.mark.parametrize('frames', [None, 1, 2, 3])
def test_any_cut_of_the_sound_gives_the_same_bits(midas, sound, frames):
    x = sound[:3*N]
    whole = play(Session(midas, face(0), 5, frames), x, [len(x)])
    assert whole.shape == (18, 128, 64, 3)
    for cuts in ([1280]*18, [1, 5000, 9000, 9039], [7, 0, 7673, 15360]): assert (play(Session(midas, face(0), 5, frames), x, cuts) == whole).all()

def test_a_second_thread_changes_nothing(midas, sound):
    x = sound[:4*N]
    plain, clock = play(Session(midas, face(0), 5), x, [len(x)]), StageClock()
    s = Session(midas, face(0), 5, overlap=True, clock=clock)
    assert (play(s, x, [5000, 2*N, 2*N - 5000]) == plain).all()
    assert {k: len(v) for k, v in clock.spans.items()} == dict(audio=4, prefill=4, head=24, decode=24, step=24)
    assert not torch.is_grad_enabled() or s.streams.decoder.slots and not any(t.requires_grad for t in s.streams.decoder.slots.values())
    first = next(Session(midas, face(0), 5, overlap=True).stream(x[:N]))
    assert (first == plain[0]).all()

class Tape:
    "Stands for a CUDA graph on a machine without a GPU: it makes the call again, on the same places."
    def __init__(self, f, places, out): self.f, self.places, self.out = f, places, out
    def replay(self): self.out.copy_(self.f(*self.places))

def test_recorded_calls_give_the_same_frames(midas, sound, monkeypatch):
    "The recording leaves the streams as they were, reads its inputs anew each time, and serves again after a restart."
    import midas_ref.inference.session as S
    from contextlib import nullcontext
    from types import SimpleNamespace
    lane, real, made = SimpleNamespace(wait_stream=lambda o: None), S.record, []
    for name, stub in dict(Stream=lambda: lane, current_stream=lambda: lane, stream=lambda s: nullcontext(), CUDAGraph=object, graph=lambda g: nullcontext()).items(): monkeypatch.setattr(torch.cuda, name, stub)
    def record(f, inputs, states):
        _, places, out = real(f, inputs, states); made.append(f.__name__)
        return Tape(f, places, out), places, out
    monkeypatch.setattr(S, 'record', record)
    x, wish = sound[:4*N], dict(text='laughing', level=9)
    def run(s):
        out = [s.push(x[:N])]; s.steer(**wish); out.append(s.push(x[N:4*N - 5000])); out.append(s.finish()); s.steer(text='', level=MEMORY_LEVEL)
        return np.concatenate(out)
    for frames in (None, 3, 1):
        plain, s = Session(midas, face(0), 5, frames), Session(midas, face(0), 5, frames, fast=True)
        assert s.streams.kept is None                                              # no GPU here
        s.streams.kept = {}; made.clear()
        want = run(plain)
        assert (run(s) == want).all() and sorted(made) == (['follow', 'read', 'read_bare', 'show'] if frames != 1 else ['follow', 'show'])
        assert (run(s) == want).all() and len(made) <= 4                           # a restart keeps the recordings
        s.seed = 6; s.restart(); plain.seed = 6; plain.restart()
        assert (run(s) == (other := run(plain))).all() and (other != want).any()

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda(midas, sound):
    "A GPU draws what the CPU draws; with recordings what it draws without, in turns too."
    import copy
    x, here = sound[:4*N], copy.deepcopy(midas).cuda()
    cpu, plain = Session(midas, face(0), 5).push(x), Session(here, face(0), 5)
    got, a, b = plain.push(x), Session(here, face(0), 5, fast=True), Session(here, face(1), 5, fast=True)
    assert got.shape == cpu.shape                                                  # its generator draws other noise
    turns = [(a.push(x[k*N:(k+1)*N]), b.push(x[k*N:(k+1)*N])) for k in range(4)]
    assert len(a.streams.kept) == 3
    assert differ(np.concatenate([t[0] for t in turns]), got) <= 1
    assert differ(np.concatenate([t[1] for t in turns]), Session(here, face(1), 5).push(x)) <= 1
    a.restart(); assert differ(a.push(x), got) <= 1

def test_the_same_wish_is_read_once(midas, sound, monkeypatch):
    asked, real = [], Midas.read_text
    monkeypatch.setattr(Midas, 'read_text', lambda self, texts: asked.append(texts[0]) or real(self, texts))
    s = Session(midas, face(0), 5)
    for text in ('sad', 'sad', 'glad', '', '', 'glad'): s.steer(text=text); assert ('text' in s.signals()) == bool(text)
    assert asked == ['sad', 'glad', 'glad']

def test_an_error_in_the_second_thread_comes_to_the_caller(midas, sound, monkeypatch):
    import midas_ref.inference.session as S
    threads, real = torch.get_num_threads(), S.decode_frame
    def fail(*a, **k):
        if threading.current_thread() is threading.main_thread(): return real(*a, **k)
        raise RuntimeError(f'no decoder in {threading.current_thread().name}')
    monkeypatch.setattr(S, 'decode_frame', fail)
    frames = Session(midas, face(0), overlap=True).stream(sound[:N])
    next(frames)                                               # the first is decoded here
    with pytest.raises(RuntimeError, match='no decoder in decoder'): next(frames)
    assert torch.get_num_threads() == threads

def test_two_threads_take_half_of_the_cores_each():
    "And this one has all of them back afterwards, also after an error."
    code = """
import torch; from concurrent.futures import ThreadPoolExecutor; from midas_ref.inference.session import beside
torch.set_num_threads(5)
with beside(ThreadPoolExecutor(1), lambda *x: (x, torch.get_num_threads()), 1, 2) as f: print(torch.get_num_threads(), *f.result())
try:
    with beside(ThreadPoolExecutor(1), print): raise KeyError
except KeyError: print(torch.get_num_threads())
torch.set_num_threads(1)
with beside(ThreadPoolExecutor(1), torch.get_num_threads) as f: print(torch.get_num_threads(), f.result())
"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    assert [x for x in out.splitlines() if x] == ['2 (1, 2) 3', '5', '1 1']

@pytest.mark.parametrize('policy, threads, device, says', [('passive', 2, 'cpu', True), ('PASSIVE', 2, 'cpu', True), ('active', 2, 'cpu', False), ('', 2, 'cpu', False), ('passive', 1, 'cpu', False), ('passive', 2, 'cuda', False)])
def test_where_a_second_thread_is_worth_it(midas, monkeypatch, policy, threads, device, says):
    "And a session asks, unless it is told."
    from midas_ref.inference.session import two_cores
    monkeypatch.setenv('OMP_WAIT_POLICY', policy); monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    assert two_cores(device) is says
    if device == 'cpu': assert bool(Session(midas, face(0)).pool) is says and Session(midas, face(0), overlap=True).pool and not Session(midas, face(0), overlap=False).pool

def test_only_frames_that_nobody_waits_for_are_decoded_aside(midas, sound, monkeypatch):
    import midas_ref.inference.session as S
    where, real = [], S.decode_frame
    monkeypatch.setattr(S, 'decode_frame', lambda *a, **k: (where.append(threading.current_thread() is threading.main_thread()), real(*a, **k))[1])
    Session(midas, face(0), overlap=True).push(sound[:N]); Session(midas, face(0), frames=1, overlap=True).push(sound[:N//6])
    assert where == [True, False, False, False, False, True] + [True]

def test_four_in_turns_and_four_in_a_batch_equal_four_alone(midas, sound):
    parts = [np.roll(sound, 999*i)[:3*N] for i in range(4)]
    alone = [Session(midas, face(i), seed=i).push(parts[i]) for i in range(4)]
    turns = [Session(midas, face(i), seed=i, overlap=i % 2 == 1) for i in range(4)]
    got = [np.concatenate(f) for f in zip(*[[s.push(p[k:k+N]) for s, p in zip(turns, parts)] for k in range(0, 3*N, N)])]
    assert all((a == b).all() for a, b in zip(got, alone))
    streams, refs = open_streams(midas, 4, [0, 1, 2, 3]), torch.cat([s.reference for s in turns])
    frames = [x for k in range(0, 3*N, N) for x in draw_chunk(midas, streams, torch.from_numpy(np.stack([p[k:k+N] for p in parts])), refs, {}, MEMORY_LEVEL)]
    assert all(differ(np.stack([to_bytes(f[i]) for f in frames]), alone[i]) <= 1 for i in range(4))

def test_sessions_join_and_part(midas, sound):
    a, b = Session(midas, face(0), 1), Session(midas, face(1), 2)
    want = [Session(midas, face(i), i + 1).push(sound[:3*N])[12:] for i in range(2)]
    for s in (a, b): s.push(sound[:N])
    both, chunk = join_streams([a.streams, b.streams]), torch.from_numpy(sound[N:2*N])[None].expand(2, -1)
    list(draw_chunk(midas, both, chunk, torch.cat([a.reference, b.reference]), {}, MEMORY_LEVEL))
    for s, part in zip((a, b), split_streams(both)): s.streams = part
    assert all(differ(s.push(sound[2*N:3*N]), w) <= 1 for s, w in zip((a, b), want))

def test_wishes_act_at_the_next_chunk_and_not_before(midas, sound):
    plain = Session(midas, face(0), 5).push(sound[:3*N])
    for wish in (dict(text='laughing'), dict(expression='happy'), dict(level=15), dict(pose=torch.full((6, 12, 2), .5))):
        s = Session(midas, face(0), 5)
        it = s.stream(sound[:3*N]); got = [next(it) for _ in range(8)]           # in the middle of the second chunk
        s.steer(**wish); got = np.stack(got + list(it))
        assert (got[:12] == plain[:12]).all(), wish
        later = got[13:] if 'level' in wish else got[12:]                         # a level shows in the frame after the one it noises
        assert (later != plain[-len(later):]).any(), wish

def told(midas, texts):
    "Captions of chunks as a signal; None where nothing is said."
    ids = midas.read_text([t or 'x' for t in texts])[None]
    for k, t in enumerate(texts):
        if not t: ids[:, k] = 0
    return dict(text=ids)

LOUD = 60.   # words do little in a model with random weights

def test_guided_stream_equals_the_slow_reference(midas, sound):
    "Words that come late, stay, change, stop and come again; what comes before them is as it was."
    said = [None, 'laughing', 'laughing', 'laughing', 'sad', None, 'sad', 'laughing']
    s, plain, got = Session(midas, face(0), 3, overlap=False), Session(midas, face(0), 3, guidance=1), []
    assert s.guidance == GUIDANCE > 1
    s.guidance = LOUD
    for k, t in enumerate(said):
        for x in (s, plain): x.steer(text=t or '')
        got.append((s.push(sound[k*N:(k+1)*N]), plain.push(sound[k*N:(k+1)*N])))
    guided, once = (np.concatenate(g) for g in zip(*got))
    for film, g in ((guided, LOUD), (once, 1.)):
        slow = generate_offline(midas, face(0), torch.from_numpy(sound[:8*N]), told(midas, said), MEMORY_LEVEL, 3, guidance=g)
        assert differ(film, np.stack([to_bytes(x) for x in slow])) <= 1
    assert (guided[:6] == once[:6]).all() and differ(guided[6:12], once[6:12]) > 3
    for wrong in (.5, 6, float('nan')):
        with pytest.raises(ValueError, match='accepted: 1 to 5'): Session(midas, face(0), guidance=wrong)

@pytest.mark.parametrize('frames', (6, 3))
def test_a_second_memory_is_kept_only_while_words_are_new(midas, sound, frames):
    "Two chunks of 480 ms, or four of half that; what is asked again is not new, other words are, and so is what was forgotten."
    s, n, new = Session(midas, face(0), 3, frames=frames), N*frames//6, round(GUIDED*12.5)//frames
    s.push(sound[:n]); without = s.streams.nbytes
    def kept(words):
        s.steer(text=words); s.push(sound[:n])
        assert s.streams.nbytes == without + (s.streams.model.nbytes if s.streams.bare else 0)
        return s.streams.bare is not None
    assert [kept('laughing') for _ in range(new + 2)] == [True]*new + [False]*2
    assert [kept(w) for w in ('sad', 'sad', '', 'sad')] == [True, True, False, True]
    s.restart(); assert s.streams.words is None and [kept('sad') for _ in range(new + 1)] == [True]*new + [False]

def test_guided_rows_of_a_batch_equal_sessions_alone(midas, sound):
    "Also where they fall silent at different times, join and part."
    said = [('laughing', 'sad', None, 'sad', 'sad'), (None, 'laughing', 'laughing', 'laughing', 'sad'), (None,)*5, ('sad',)*5]
    alone, first = ([Session(midas, face(i), i) for i in range(4)] for _ in range(2))
    for a in (*alone, *first): a.guidance = LOUD
    want = [np.concatenate([(a.steer(text=t or ''), a.push(sound[k*N:(k+1)*N]))[1] for k, t in enumerate(row)]) for a, row in zip(alone, said)]
    got = [[(a.steer(text=row[0] or ''), a.push(sound[:N]))[1]] for a, row in zip(first, said)]
    both, refs = join_streams([a.streams for a in first]), torch.cat([a.reference for a in first])
    for k in (1, 2, 3):
        signals = dict(text=torch.cat([told(midas, row[k:k+1])['text'] for row in said]))
        for x in draw_chunk(midas, both, torch.from_numpy(sound[k*N:(k+1)*N])[None].expand(4, -1), refs, signals, MEMORY_LEVEL, guidance=LOUD):
            for g, y in zip(got, x): g.append(to_bytes(y)[None])
    for a, part, row, g in zip(first, split_streams(both), said, got):
        a.streams = part; a.steer(text=row[4] or ''); g.append(a.push(sound[4*N:5*N]))
    assert all(differ(np.concatenate(g), w) <= 1 for g, w in zip(got, want))

def test_a_new_portrait_starts_anew(midas, sound):
    s = Session(midas, face(0), 5); s.steer(text='x'); s.push(sound[:2*N + 500]); s.steer(text='')
    s.show(face(1))
    assert (s.push(sound[:2*N]) == Session(midas, face(1), 5).push(sound[:2*N])).all()

def test_memory_stays_and_far_positions_work(midas, sound):
    s, sizes = Session(midas, face(0), 5), []
    for k in range(9): s.push(sound[:N]); sizes.append(s.streams.nbytes)
    assert len(set(sizes[1:])) == 1
    far = Session(midas, face(0), 5)
    with far.streams.model.model().call(torch.zeros(1, 1), far.streams.model): midas.backbone.seek(far.streams.model, 9*10**6)       # fifty days
    assert differ(far.push(sound[:3*N]), Session(midas, face(0), 5).push(sound[:3*N])) <= 1

def test_a_clock_that_forgets():
    "A session without end must not remember every stage it has ever timed."
    from midas_ref.inference.session import StageClock
    for keep, left in ((None, 5), (2, 2)):
        clock = StageClock(keep=keep)
        for _ in range(5):
            with clock('head'): pass
        assert len(clock.spans['head']) == len(clock.seconds['head']) == left and clock.table()['head'].n == left

def test_what_is_remembered_is_held_to_the_portrait(midas, sound):
    "The first frame shows nothing of it, those after it do; the slow reference agrees; all of the portrait is the most."
    runs = {h: Session(midas, face(0), 3, hold=h).push(sound[:2*N]) for h in (0., .5, 1.)}
    assert all((a[0] == b[0]).all() and differ(a[1:], b[1:]) > 1 for a, b in ((runs[0.], runs[.5]), (runs[.5], runs[1.])))
    for h, got in runs.items(): assert differ(got, np.stack([to_bytes(x) for x in generate_offline(midas, face(0), torch.from_numpy(sound[:2*N]), level=MEMORY_LEVEL, seed=3, hold=h)])) <= 1
    for wrong in (-.1, 1.5, float('nan')):
        with pytest.raises(ValueError, match='accepted: 0 to 1'): Session(midas, face(0), hold=wrong)

@pytest.fixture
def looks(midas):
    "Matrices for a model that has none, while a test lasts."
    n, c = midas.layout.frame_tokens, midas.cfg.codec.latent_channels
    midas.looks = .3*torch.eye(c).repeat(n, 1, 1) + .01*torch.randn(n, c, c, generator=torch.Generator().manual_seed(0))
    yield midas.looks
    midas.looks = None

def test_looks_are_held_by_default_where_they_are_known(midas, sound, looks):
    "The slow reference agrees, with chunks of other lengths and in a second thread, too; a hold of 0 is the stream without."
    x = sound[:2*N]
    for frames, overlap in ((None, False), (2, True)):
        s = Session(midas, face(0), 3, frames, overlap=overlap)
        got, slow = s.push(x), generate_offline(s.midas, face(0), torch.from_numpy(x), level=MEMORY_LEVEL, seed=3, hold=MEMORY_HOLD)
        assert s.hold == MEMORY_HOLD and differ(got, np.stack([to_bytes(f) for f in slow])) <= 1
        free = Session(midas, face(0), 3, frames, hold=0.).push(x)
        assert (got[0] == free[0]).all() and differ(got[1:], free[1:]) > 1
    midas.looks = None
    assert Session(midas, face(0), 3).hold == 0 and (Session(midas, face(0), 3).push(x) == Session(midas, face(0), 3, hold=0.).push(x)).all()

def test_held():
    "Without matrices a share of everything; with them that of each position; nothing where frame and portrait agree."
    x, p, k = torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.randn(4, 8, 8)
    assert torch.equal(held(x, p, .25), torch.lerp(x, p, .25)) and torch.equal(held(x, x, .7, k), x)
    want = torch.stack([torch.stack([x[b, n] + .7*k[n] @ (p - x)[b, n] for n in range(4)]) for b in range(2)])
    assert (held(x, p, .7, k) - want).abs().max() < 1e-5
    assert held(x.bfloat16(), p, .7, k).dtype == torch.bfloat16

def test_looks_are_told_from_movement():
    "In directions where people differ and do not move, nearly all is looks; where they move alike, nothing; the two mixed by a rotation, the same."
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    turn = torch.linalg.qr(r(6, 6))[0]
    scale = lambda a, b: torch.tensor([a]*3 + [b]*3)
    crowd = lambda n: torch.einsum('ptcs,dc->ptds', r(n, 1, 6, 1)*scale(1., .03)[:, None] + r(n, 30, 6, 1)*scale(.03, 1.)[:, None], turn)[..., None]      # (p, t, c, 1, 1)
    k = fit_looks(crowd(200), drift=.03)
    assert k.shape == (1, 6, 6)
    inside = turn.T @ k[0] @ turn
    want = torch.diag(scale(.03*1.01/(.03*1.01 + 2*.0009), 0.))
    assert (inside - want).abs().max() < .06
    told = shares(crowd(50), k)
    assert .9 < told['people'] < 1 and told['movement'] < .02
    assert shares(crowd(50), fit_looks(crowd(200), drift=1e-5))['people'] < .02
    posed = crowd(400); posed[:, 1:] += turn[:, 3].view(6, 1, 1)*r(400, 1, 1, 1, 1)                                          # a pose that lasts as long as a window is movement
    assert .9 < shares(posed, k)['people'] < 1.1
    with pytest.raises(ValueError, match='2 or more'): fit_looks(posed[:1])

class Somewhere(Locator):
    "Says that every point of a picture is where the first pixel tells."
    def forward(self, x): return x[:, 0, 0, 0].float()[:, None, None].expand(-1, 12, 2)

@pytest.fixture
def locator(midas):
    "For a model that has none, while a test lasts."
    midas.frozen['locator'] = Somewhere().eval()
    yield midas.locator
    del midas.frozen['locator']

def test_a_head_that_is_beside_its_way_is_put_right(midas, locator):
    "Velocities make good a share of what is missing, of a portrait at 0.2 and a frame at 0.25; the way stays as it was asked for; nobody who is told nothing hears of it."
    at = lambda v: torch.full((3, 4, 4), v)
    v, f = torch.zeros(30, 12, 2), 6
    v[:, :, 0] = .5
    plain, fed = Wishes(midas, 8, 0.), Wishes(midas, 8)
    assert fed.right == PUT_RIGHT and plain.right == 0
    got = {}
    for name, w in (('plain', plain), ('fed', fed)):
        w.begin(at(.2)); w.steer(pose=v)
        got[name] = []
        for k in range(3): got[name].append(w.signals()['pose']); w.look(at(.25))
    for k in range(3): assert torch.equal(got['plain'][k].moved, got['fed'][k].moved) and torch.equal(got['plain'][k].known, got['fed'][k].known)
    assert torch.equal(got['plain'][0].velocity, got['fed'][0].velocity)                                # nothing has been drawn yet
    for k in (1, 2):
        missing = (got['plain'][k-1].moved[0, -1] - .05).clamp(-.1, .1)                                 # .24 and .48 asked for to the right, none down; .05 gone in both
        more = got['fed'][k].velocity - got['plain'][k].velocity
        torch.testing.assert_close(more[0], (PUT_RIGHT*missing*12.5/6).expand(f, -1, -1))
    one = Wishes(midas.with_frames(1), 8); one.begin(at(.2)); one.look(at(.25)); one.moved[:] = .08; one.fresh = False; one.steer(pose=v[:2])
    torch.testing.assert_close(one.signals()['pose'].velocity[0, 0, :, 1], torch.full((12,), (1 - (1 - PUT_RIGHT)**(1/6))/6*.03*12.5))          # shorter chunks, smaller shares, and less of each
    one.moved[:] = .05; torch.testing.assert_close(one.signals()['pose'].velocity[0], v[:1])              # where it should be
    fed.poses.clear(); assert 'pose' not in fed.signals()
    fed.steer(pose=v[:6]); assert torch.equal(fed.signals()['pose'].velocity[0], v[:6])                 # lost on the way: nothing to put right
    for wrong in (-.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='accepted: 0 to 1'): Wishes(midas, 8, wrong)

def test_sessions_look_at_what_they_have_drawn(midas, sound, locator):
    "Told, a session with a locator draws otherwise from the second chunk on, in any cut of the sound; untold it draws the same; without a locator nothing can be put right."
    pose = .2*torch.randn(24, 12, 2, generator=torch.Generator().manual_seed(2))
    def run(cuts, **k):
        s = Session(midas, face(0), 3, **k); s.steer(pose=pose)
        return play(s, sound[:3*N], cuts)
    fed, free = run([3*N]), run([3*N], right=0.)
    assert (fed[:6] == free[:6]).all() and not (fed[6:] == free[6:]).all()
    assert (run([5, 9000, 3*N - 9005]) == fed).all() and (run([3*N], overlap=True) == fed).all()
    assert (Session(midas, face(0), 3).push(sound[:2*N]) == Session(midas, face(0), 3, right=0.).push(sound[:2*N])).all()
    s = Session(midas, face(0), 3); s.steer(pose=pose); s.push(sound[:3*N]); s.show(face(0)); s.poses.clear(); s.steer(pose=pose)
    assert (s.push(sound[:3*N]) == fed).all()                                                            # a new stream has seen nothing
    del midas.frozen['locator']
    assert (run([3*N]) == free).all()
    with pytest.raises(ValueError, match='train locator'): Session(midas, face(0), right=.5)
    midas.frozen['locator'] = Somewhere()

def test_a_map_is_fitted_to_ways():
    "Places of people who differ by constants nobody can see; seen features carry the ways with noise."
    from midas_ref.data.probes import fit_map
    g = torch.Generator().manual_seed(0); r = lambda *s: torch.randn(*s, generator=g)
    true, seen, who = r(24, 192)*.01, r(30, 40, 192), r(30, 1, 12, 2)
    points = (seen @ true.T).unflatten(2, (12, 2)) + who
    assert (fit_map(seen, points, ridge=1e-6) - true).abs().max() < 1e-4
    assert (fit_map(seen, points, ridge=10.) - true).abs().max() > 1e-3
    with pytest.raises(ValueError, match='2 or more'): fit_map(seen[:, :1], points[:, :1])

def test_a_locator_learns_ways():
    "A map that is off reads its own people better after some steps; what the probe reads besides has no part, and the first locator stays as it was."
    from midas_ref.codec.temporal import load_video_dcae
    from midas_ref.data.probes import WEIGHTS, load_probe
    codec, few = load_video_dcae(WEIGHTS/'codec').eval(), dict(people=2, scenes=1, first=720_000)
    before = fit_locator(codec, load_probe('a'), frames=4, **few)
    before.map.weight.data.mul_(.3)                                         # ways are read three times too short
    was = {k: v.clone() for k, v in before.state_dict().items()}
    after = refine_locator(before, codec, batch=(2, 4), steps=16, **few)
    a, b = (locator_error(x, codec, frames=4, **few) for x in (before, after))
    assert a['far'] == b['far'] > 1 and b['off'] < .8*a['off'], (a, b)
    same = {k for k, v in after.state_dict().items() if torch.equal(v, was[k])}
    assert all(torch.equal(v, was[k]) for k, v in before.state_dict().items()) and not any(p.requires_grad for p in after.parameters())
    assert all(k in same for k in was if k.startswith(('probe.readings', 'probe.mood', 'probe.identity'))) and not {'map.weight', 'probe.stem.0.weight'} & same
