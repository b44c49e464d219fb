"Portrait and voice to video: every kind of bad input, Ctrl-C, a full disk, exact sync, benchmarks, public names."
import copy, dataclasses, errno, json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from midas_ref import cli
from midas_ref.codec.temporal import VideoDCAE
from midas_ref.conditions.audio import WhisperVQ
from midas_ref.conditions.pose import HEAD
from midas_ref.config import preset
from midas_ref.data.shards import media_frames, media_sound
from midas_ref.inference import animate as A
from midas_ref.inference.session import Session
from midas_ref.inference.video import is_marked
from midas_ref.model.midas import Midas
av = pytest.importorskip('av'); soundfile = pytest.importorskip('soundfile'); pytest.importorskip('cv2')

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get('MIDAS_REAL', ROOT.parent/'shared'/'real'))
MIRA = ROOT/'data_samples'/'portraits'/'mira.png'
ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
SHELL = [sys.executable, '-c', 'import sys; from midas_ref.cli import main; sys.exit(main())']

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A model with random weights, as a folder."
    torch.manual_seed(0); torch.set_grad_enabled(True)
    tiny, widths = preset('tiny'), (16, 16, 32, 32, 64, 64, 128)
    cfg = dataclasses.replace(tiny, video=dataclasses.replace(tiny.video, height=64, width=64), codec=dataclasses.replace(tiny.codec, encoder_widths=widths, decoder_widths=widths), window_frames=12,
                              backbone=dataclasses.replace(tiny.backbone, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=128), head=dataclasses.replace(tiny.head, width=64, layers=2, heads=4))
    m = Midas(cfg, VideoDCAE(cfg.codec).eval(), WhisperVQ(cfg.audio).eval()).eval()
    for p in (m.head.out.weight, m.tokens.carry.weight, m.head.look.weight): torch.nn.init.normal_(p, std=.05)
    m.save_pretrained(folder := tmp_path_factory.mktemp('weights')/'midas', dtype=torch.float32)
    return folder

@pytest.fixture(scope='module')
def midas(weights): return A.load_model(weights, 'cpu', 'float32')

def tone(seconds, rate=16000, channels=1):
    t = np.arange(round(seconds*rate))/rate
    return np.repeat((.3*np.sin(2*np.pi*220*t)*np.sin(2*np.pi*3*t)).astype(np.float32)[:, None], channels, 1)

@pytest.fixture(scope='module')
def voice(tmp_path_factory):
    soundfile.write(p := tmp_path_factory.mktemp('voice')/'voice.wav', tone(1.3), 16000, 'FLOAT')
    return p

def run(capsys, *args):
    capsys.readouterr(); status = cli.main([str(a) for a in args]); r = capsys.readouterr()
    return status, r.out, r.err

@pytest.fixture
def go(capsys, weights, voice, tmp_path):
    "animate with defaults: go(portrait=..., audio=..., extra arguments) -> status, output, errors."
    def f(*extra, portrait=MIRA, audio=voice, out=tmp_path/'out.mp4'):
        return run(capsys, 'animate', portrait, audio, '-o', out, '--weights', weights, '--device', 'cpu', '--dtype', 'float32', '--no-progress', *extra)
    return f

def frames(path): return [f.time for f in media_frames(path, 'video')]
def pixels(path): return np.stack([f.to_ndarray(format='rgb24') for f in media_frames(path, 'video')])

# ---- the whole way

def test_a_video_with_its_table(go, tmp_path):
    status, out, err = go()
    assert status == 0 and not err
    assert [round(t, 4) for t in frames(tmp_path/'out.mp4')] == [round(.08*i, 4) for i in range(17)] and is_marked(tmp_path/'out.mp4')
    for word in ('first frame', 'audio', 'prefill', 'head', 'decode', 'step', 'p50', 'p95', 'frames/s', 'real time', 'memory, peak', '17 frames', '64x64'): assert word in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.mp4']

def test_progress_is_shown(capsys, weights, voice, tmp_path):
    status, out, err = run(capsys, 'animate', MIRA, voice, '-o', tmp_path/'o.webm', '--weights', weights, '--device', 'cpu')
    assert status == 0 and '17/17' in err and 'frame' in err and len(frames(tmp_path/'o.webm')) == 17

def test_the_same_command_gives_the_same_video_and_wishes_change_it(go, tmp_path):
    def see(name, *extra): assert go(*extra, '--no-mark', out=tmp_path/name)[0] == 0; return pixels(tmp_path/name)
    base = see('a.mp4')
    assert (see('b.mp4') == base).all() and (see('c.mp4', '--overlap') == base).all()
    np.save(tmp_path/'pose.npy', np.full((17, 12, 2), .5, np.float32))
    for i, extra in enumerate((('--seed', 1), ('--text', 'laughing'), ('--expression', 'happy'), ('--pose', tmp_path/'pose.npy'), ('--frames', 2), ('--level', 12))):
        assert (see(f'{i}.mp4', *extra) != base).any(), extra

def test_settings_choose_the_weights(capsys, weights, voice, tmp_path, monkeypatch):
    monkeypatch.setenv('MIDAS_WEIGHTS_MODEL', str(weights)); monkeypatch.setenv('MIDAS_DEVICE_NAME', 'cpu')
    assert run(capsys, 'animate', MIRA, voice, '-o', tmp_path/'o.mp4', '--no-progress')[0] == 0

@pytest.mark.parametrize('ext', ['mp4', 'webm'])
@pytest.mark.parametrize('seconds', [.48, 1.93, 6.2])
def test_sound_in_the_file_is_where_it_was(midas, tmp_path, ext, seconds):
    "By correlation with the sound that went in: less than a millisecond off, at the start and at the end."
    g = np.random.default_rng(0); x = (.2*g.standard_normal(round(16000*seconds))).astype(np.float32)
    x = np.convolve(x, np.hanning(9)/4, 'same').astype(np.float32)
    r = A.animate(Session(midas, np.full((64, 64, 3), 120, np.uint8)), x, p := tmp_path/f'x.{ext}')
    assert r.frames == r.wanted == -(-len(x)//1280) == len(frames(p))
    assert max(abs(t - .08*i) for i, t in enumerate(frames(p))) < 6e-4
    y = media_sound(p, 0, len(x))
    for part in (slice(200, 4000), slice(len(x) - 4000, len(x) - 200)):
        at = np.arange(part.start, part.stop); score = [np.corrcoef(x[at], y[np.clip(at + lag, 0, len(y) - 1)])[0, 1] for lag in range(-80, 81)]
        assert abs(int(np.argmax(score)) - 80) < 16 and max(score) > .8                     # 16 samples are a millisecond

def test_pictures_of_the_file_are_those_of_the_session(midas, tmp_path):
    x, face = tone(1.)[:, 0], np.full((64, 64, 3), 120, np.uint8)
    A.animate(Session(midas, face, seed=4), x, tmp_path/'x.mp4', mark=False)
    s = Session(midas, face, seed=4)
    want = np.concatenate([s.push(x), s.finish()]); got = pixels(tmp_path/'x.mp4')
    assert got.shape == want.shape
    assert all(np.abs(got[i].astype(int) - want[i]).mean() < np.abs(got[i].astype(int) - want[j]).mean() for i in range(13) for j in range(13) if (want[i] != want[j]).mean() > .5)

# ---- sound of every kind

@pytest.mark.parametrize('rate, channels, kind', [(8000, 1, 'PCM_16'), (96000, 1, 'PCM_24'), (48000, 8, 'PCM_16'), (44100, 2, 'FLOAT')])
def test_rates_and_channels(go, tmp_path, rate, channels, kind):
    soundfile.write(tmp_path/'v.wav', tone(1, rate, channels), rate, kind)
    status, _, err = go(audio=tmp_path/'v.wav')
    assert status == 0 and not err and len(frames(tmp_path/'out.mp4')) == 13
    x, y = tone(1)[:, 0], media_sound(tmp_path/'out.mp4', 0, 16000)
    assert np.corrcoef(x[300:-300], y[300:-300])[0, 1] > .98

@pytest.mark.skipif(not REAL.is_dir(), reason=f'no real recordings at {REAL}')
@pytest.mark.parametrize('name', ['grid_bbaf2n.mpg', 'lr_198-209-0000.ogg', 'fw_stereo_diarization.wav'])
def test_real_voices(midas, tmp_path, name):
    x = A.load_voice(REAL/name, .48)[:32000]
    A.animate(Session(midas, np.full((64, 64, 3), 120, np.uint8)), x, tmp_path/'x.mp4')
    y = media_sound(tmp_path/'x.mp4', 0, len(x))
    score = [np.corrcoef(x[100:-100], y[100 + lag:len(y) - 100 + lag])[0, 1] for lag in range(-80, 81)]
    assert abs(int(np.argmax(score)) - 80) < 16 and len(frames(tmp_path/'x.mp4')) == -(-len(x)//1280)

# ---- bad input

def wav(path, x, rate=16000): soundfile.write(path, x, rate, 'FLOAT'); return path
def broken(path, data): path.write_bytes(data); return path

SOUNDS = {
    'empty':   (lambda d: wav(d/'a.wav', np.zeros((0, 1), np.float32)), 'empty'),
    '0 bytes': (lambda d: broken(d/'a.wav', b''), '0 bytes'),
    'NaN':     (lambda d: wav(d/'a.wav', np.where(np.arange(16000)[:, None] == 5000, np.nan, tone(1)).astype(np.float32)), 'NaN'),
    'too loud': (lambda d: wav(d/'a.wav', tone(1)*2e4), 'loudest sample'),
    '0.1 s':   (lambda d: wav(d/'a.wav', tone(.1)), 'lasts 0.10 s; accepted: 0.48 s or more'),
    'silent':  (lambda d: wav(d/'a.wav', np.zeros((16000, 1), np.float32)), 'is silent'),
    'text':    (lambda d: broken(d/'a.wav', b'hello there, this is text\n'*20), 'cannot be read as'),
    'picture': (lambda d: MIRA, ''),
    'missing': (lambda d: d/'no.wav', 'does not exist'),
    'folder':  (lambda d: d, 'is a folder')}

@pytest.mark.parametrize('case', SOUNDS)
def test_bad_sound(go, tmp_path, case):
    make, said = SOUNDS[case]; path = make(tmp_path); before = sorted(tmp_path.iterdir())
    status, out, err = go(audio=path)
    assert (status, out, len(err.splitlines())) == (2, '', 1) and said in err and str(path) in err and 'Traceback' not in err, err
    assert sorted(tmp_path.iterdir()) == before

def test_what_was_refused_can_be_asked_for(go, tmp_path):
    assert go('--silent', audio=wav(tmp_path/'s.wav', np.zeros((16000, 1), np.float32)))[0] == 0
    assert go('--frames', 1, audio=wav(tmp_path/'t.wav', tone(.1)))[0] == 0 and len(frames(tmp_path/'out.mp4')) == 2

def huge(path):
    from PIL import Image
    Image.new('L', (10001, 10001)).save(path); return path

PICTURES = {
    'text':    (lambda d: broken(d/'p.png', b'hello'), 'is not an image'),
    '0 bytes': (lambda d: broken(d/'p.png', b''), '0 bytes'),
    '100 MP':  (lambda d: huge(d/'p.png'), 'megapixels'),
    'cut off': (lambda d: broken(d/'p.png', MIRA.read_bytes()[:5000]), 'damaged or cut off'),
    'missing': (lambda d: d/'no.png', 'does not exist'),
    'folder':  (lambda d: d, 'is a folder')}

@pytest.mark.parametrize('case', PICTURES)
def test_bad_picture(go, tmp_path, case):
    make, said = PICTURES[case]; path = make(tmp_path); before = sorted(tmp_path.iterdir())
    status, out, err = go(portrait=path)
    assert (status, out, len(err.splitlines())) == (2, '', 1) and said in err and str(path) in err, err
    assert sorted(tmp_path.iterdir()) == before

def test_no_face_goes_on_with_a_warning(go, tmp_path):
    from PIL import Image
    Image.new('RGB', (300, 200), (90, 120, 160)).save(tmp_path/'p.png')
    status, out, err = go(portrait=tmp_path/'p.png')
    assert status == 0 and len(err.splitlines()) == 1 and 'No face was found' in err and len(frames(tmp_path/'out.mp4')) == 17

def test_a_photograph_is_named_as_such(go, monkeypatch):
    for answer, lines in ((False, 1), (True, 0), (None, 0)):
        monkeypatch.setattr(A, 'is_drawn', lambda *a: answer)
        status, _, err = go()
        assert status == 0 and len(err.splitlines()) == lines and ('photograph' in err) == (answer is False)

@pytest.mark.parametrize('extra, said', [
    (('--text', 'a', '--expression', 'happy'), 'both given'), (('--expression', 'silly'), 'accepted: neutral'), (('--frames', 5), 'accepted'), (('--frames', 0), '1 or more'), (('--level', 20), '19 at most'), (('--seed', -1), '0 or more'),
    (('--pose', 'no.csv'), 'does not exist'), (('--device', 'tpu'), 'accepted'), (('--dtype', 'int8'), 'int8'), (('--weights', 'nowhere'), 'nowhere'), (('--weights', 'paper'), 'without weights'), (('--what',), '--what')])
def test_bad_options(go, tmp_path, extra, said):
    status, out, err = go(*extra)
    assert (status, out, len(err.splitlines())) == (2, '', 1) and said in err and not list(tmp_path.iterdir()), err

@pytest.mark.parametrize('name, said', [('out.avi', '.mp4, .webm'), ('out', '.mp4, .webm'), ('none/out.mp4', 'does not exist'), ('folder.mp4', 'is a folder')])
def test_bad_target(go, tmp_path, name, said):
    (tmp_path/'folder.mp4').mkdir()
    status, out, err = go(out=tmp_path/name)
    assert (status, out, len(err.splitlines())) == (2, '', 1) and said in err

def test_target_that_may_not_be_written(go, tmp_path, monkeypatch):
    if os.geteuid(): (tmp_path/'shut').mkdir(mode=0o500)
    else: (tmp_path/'shut').mkdir(); monkeypatch.setattr(os, 'access', lambda p, mode, real=os.access: 'shut' not in str(p) and real(p, mode))     # root may write everywhere
    status, out, err = go(out=tmp_path/'shut'/'out.mp4')
    assert (status, out, len(err.splitlines())) == (2, '', 1) and 'No permission to write' in err

def test_target_that_cannot_be_opened(go, tmp_path):
    status, out, err = go(out='/proc/out.mp4')
    assert (status, out, len(err.splitlines())) == (2, '', 1) and '/proc' in err

POSES = {'text': ('p.csv', b'hello\n1\n', 'holds no pose'), 'few points': ('p.csv', b'nose_bridge_x,nose_bridge_y\n1,2\n', 'lacks the points'), 'not an array': ('p.npy', b'hello', 'holds no pose'), 'ending': ('p.txt', b'hello', 'holds no pose'), 'empty': ('p.csv', b'', 'holds no pose')}
@pytest.mark.parametrize('case', POSES)
def test_bad_pose(go, tmp_path, case):
    name, data, said = POSES[case]
    status, out, err = go('--pose', broken(tmp_path/name, data))
    assert (status, out, len(err.splitlines())) == (2, '', 1) and said in err and not (tmp_path/'out.mp4').exists(), err

def test_bad_shape_of_pose(go, tmp_path):
    np.save(tmp_path/'p.npy', np.zeros((4, 5, 2), np.float32))
    status, _, err = go('--pose', tmp_path/'p.npy')
    assert status == 2 and '12' in err and len(err.splitlines()) == 1

# ---- the end comes early

def test_full_disk_keeps_what_plays(midas, tmp_path):
    "A limit on the size of a file stands in for a full disk: the write fails in the same place."
    p = subprocess.run([sys.executable, '-c', f'''
import resource, signal, sys, numpy as np
from midas_ref.inference import animate as A
m = A.load_model({str(midas_folder(midas, tmp_path))!r}, 'cpu', 'float32')
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: A.animate(A.Session(m, np.full((64, 64, 3), 120, np.uint8)), A.babble(20), {str(tmp_path/'x.mp4')!r})
except OSError as e: print(e)
'''], env=ENV, capture_output=True, text=True)
    assert 'Cannot write' in p.stdout and 'What was written plays' in p.stdout and len(p.stdout.splitlines()) == 1, p.stdout + p.stderr
    assert not (tmp_path/'x.mp4').exists() and (n := playable(tmp_path/'x.partial.mp4')) > 3, n

def playable(path):
    "Frames that can be decoded before the file breaks off."
    n = 0
    with av.open(str(path)) as f:
        try:
            for _ in f.decode(video=0): n += 1
        except av.error.FFmpegError: pass
    return n

def midas_folder(midas, tmp_path): midas.save_pretrained(tmp_path/'w', dtype=torch.float32); return tmp_path/'w'

def test_full_disk_is_one_line(go, tmp_path, monkeypatch):
    from midas_ref.inference.video import Tracks
    plain = Tracks.frame
    def frame(self, x):
        if self.pictures.count == 9: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, x)
    monkeypatch.setattr(Tracks, 'frame', frame)
    status, out, err = go()
    assert (status, out, len(err.splitlines())) == (2, '', 1) and 'No space left on device' in err and 'out.partial.mp4' in err
    assert len(frames(tmp_path/'out.partial.mp4')) == 9 and sorted(p.name for p in tmp_path.iterdir()) == ['out.partial.mp4']

@pytest.mark.parametrize('ext', ['mp4', 'webm'])
def test_ctrl_c_closes_the_file(weights, tmp_path, ext):
    soundfile.write(tmp_path/'v.wav', tone(600), 16000)
    out = tmp_path/f'o.{ext}'
    p = subprocess.Popen([*SHELL, 'animate', MIRA, tmp_path/'v.wav', '-o', out, '--weights', weights, '--device', 'cpu'], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.time() + 60
    while p.poll() is None and time.time() < until and not any(f.stat().st_size > 40_000 for f in tmp_path.glob('.o.*.part')): time.sleep(.05)
    p.send_signal(signal.SIGINT); text, err = p.communicate(timeout=30)
    assert p.returncode == 130 and 'interrupted' in err and 'is complete up to' in err and 'Traceback' not in err, err
    n = len(frames(out)); y = media_sound(out, 0, 1280*n)
    assert 2 < n < 7500 and f'{n} frames' in text and np.corrcoef(tone(600)[:1280*n, 0], y)[0, 1] > .95
    assert sorted(f.name for f in tmp_path.iterdir()) == [f'o.{ext}', 'v.wav']

def test_ctrl_c_before_the_first_frame_leaves_nothing(weights, voice, tmp_path):
    p = subprocess.Popen([*SHELL, 'animate', MIRA, voice, '-o', tmp_path/'o.mp4', '--weights', weights, '--device', 'cpu'], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5); p.send_signal(signal.SIGINT); _, err = p.communicate(timeout=30)
    assert p.returncode in (0, 130, -2) and not [f for f in tmp_path.iterdir() if f.name.endswith('.part')]

def test_second_ctrl_c_raises():
    with A.noted_ctrl_c() as asked:
        signal.raise_signal(signal.SIGINT); assert len(asked) == 1
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

# ---- pose, bench, weights, names

def test_pose_from_points(tmp_path):
    at = np.stack([np.linspace(0, .96, 25)]*12, 1)[..., None]*[.5, -.25] + .4                # 24 steps of 40 ms
    at[10:12, 3] = np.nan
    np.savez(tmp_path/'p.npz', points=at.astype(np.float32), names=np.array(list(HEAD)), fps=25.)
    v = A.read_pose(tmp_path/'p.npz', 12.5)
    assert v.shape == (12, 12, 2) and v[0].isnan().all() and torch.allclose(v[1:, 0], torch.tensor([.5, -.25]), atol=1e-3)
    assert v[:, 3].isnan().any() and not v[1:, 0].isnan().any()

def test_unknown_velocities_are_told_as_unknown(midas):
    s = Session(midas, np.full((64, 64, 3), 120, np.uint8))
    v = torch.full((3, 12, 2), .2); v[1, 4] = torch.nan
    s.steer(pose=v); pose = s.signals()['pose']
    assert pose.known.sum() == 23 and not pose.known[0, [0, 1], 4].any() and torch.isfinite(pose.velocity).all() and pose.velocity[0, [0, 1], 4].abs().sum() == 0
    way = torch.tensor([1, 2, 3.])*.2/s.midas.cfg.video.fps
    assert torch.allclose(pose.moved[0, :len(v), 0, 0], way) and pose.moved[0, 0, 4].isfinite().all() and pose.moved[0, 1:, 4].isnan().all()   # lost for good

def test_way_from_the_portrait(midas):
    "The first row leads from the portrait to the first frame and is no velocity; rows add up over chunks; a new stream begins at the portrait again."
    s, f = Session(midas, np.full((64, 64, 3), 120, np.uint8)), midas.cfg.frames_per_chunk
    v = torch.randn(2*f, 12, 2)*.1
    s.steer(pose=v); a, b = s.signals()['pose'], s.signals()['pose']
    assert not a.known[0, 0].any() and a.known[0, 1:].all() and b.known.all()
    assert torch.allclose(torch.cat([a.moved, b.moved], 1)[0], v.cumsum(0)/midas.cfg.video.fps, atol=1e-6)
    s.signals(); s.steer(pose=v[:f])                                                       # a chunk in which nobody told anything
    assert s.signals()['pose'].moved.isnan().all()
    s.restart(); v[0] = torch.nan; s.steer(pose=v[:f]); c = s.signals()['pose']
    assert (c.moved[0, 0] == 0).all() and torch.allclose(c.moved[0, 1:], v[1:f].cumsum(0)/midas.cfg.video.fps, atol=1e-6)

@pytest.mark.parametrize('extra, n', [((), 1), (('--sessions', 3), 3), (('--sessions', 3, '--batched'), 3), (('--overlap', '--frames', 2), 1)])
def test_bench_stream(capsys, weights, extra, n):
    status, out, err = run(capsys, 'bench', 'stream', '--weights', weights, '--device', 'cpu', '--dtype', 'float32', '--seconds', '.96', '--warmup', 1, '--no-progress', *extra)
    r = json.loads(out)
    assert status == 0 and not err and r['sessions'] == n and r['seconds'] == pytest.approx(.96) and set(r['stages_ms']) == {'audio', 'prefill', 'head', 'decode', 'step'}
    assert r['by_minute'] == [r['real_time_factor']]
    assert r['frames_per_second'] > 0 and r['real_time_factor'] > 0 and r['first_frame_ms']['p50'] <= r['first_frame_ms']['p95'] and r['machine'] and r['memory_mb']['peak'] > 50 and r['warmup_chunks'] == 1
    assert r['stages_ms']['decode']['n'] == 12*(1 if '--batched' in extra else n)

def test_bench_without_weights_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(A, 'WEIGHTS', tmp_path)
    monkeypatch.setattr(A, 'preset', lambda name, real=preset: dataclasses.replace(real(name), video=dataclasses.replace(real(name).video, height=64, width=64)))
    status, out, err = run(capsys, 'bench', 'stream', '--preset', 'tiny', '--device', 'cpu', '--seconds', '.48', '--warmup', 0, '--no-progress')
    assert status == 0 and json.loads(out)['weights'] == 'random' and len(err.splitlines()) == 1 and "no trained weights for 'tiny'" in err

def test_missing_weights_are_one_line(capsys, monkeypatch, tmp_path, voice):
    monkeypatch.setattr(A, 'WEIGHTS', tmp_path)
    status, out, err = run(capsys, 'animate', MIRA, voice, '-o', tmp_path/'o.mp4', '--weights', 'tiny')
    assert (status, out, len(err.splitlines())) == (2, '', 1) and 'bundled weights are not there' in err and '--weights' in err

@pytest.mark.parametrize('extra, hold', [((), None), (('--text', 'smiling'), None), (('--expression', 'happy'), None), (('--expression', 'happy', '--hold', '.3'), .3), (('--hold', '0'), 0.)])
def test_hold_is_passed_on(tmp_path, capsys, monkeypatch, voice, weights, extra, hold):
    asked, real = [], A.Session
    monkeypatch.setattr(A, 'Session', lambda *a, **kw: asked.append(kw['hold']) or real(*a, **kw))
    status, out, err = run(capsys, 'animate', MIRA, voice, '-o', tmp_path/'o.mp4', '--weights', weights, '--device', 'cpu', '--no-progress', *extra)
    assert status == 0, err
    assert asked == [hold]

def test_make_demo_calls_animate():
    r = subprocess.run(['make', '-n', 'demo', 'READY=Makefile', 'PORTRAIT=a b.png', 'AUDIO=c.wav', 'OUT=d/e.mp4'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0 and 'animate "a b.png" "c.wav" -o "d/e.mp4"' in r.stdout
    r = subprocess.run(['make', '-n', 'demo', 'READY=Makefile'], cwd=ROOT, capture_output=True, text=True)
    for word in ('"data_samples/portraits/mira.png"', '"data_samples/speech/en-us.flac"', '"out/demo.mp4"'): assert word in r.stdout

def test_public_names_are_lazy():
    code = """
import sys, midas_ref
heavy = {'torch', 'numpy', 'av', 'cv2', 'transformers', 'PIL'} & set(sys.modules); assert not heavy, heavy
assert set(midas_ref.__all__) == {'Midas', 'Session', 'load_portrait', 'load_audio', 'write_video'} <= set(dir(midas_ref)) and midas_ref.__version__
for name in ('av', 'cv2', 'soundfile', 'gradio', 'deepspeed', 'espeakng_loader', 'webdataset', 'aiortc', 'diffusers', 'fastcore'): sys.modules[name] = None
from midas_ref import Midas, Session, load_portrait, load_audio, write_video
from midas_ref import *
assert Midas.__name__ == 'Midas' and load_audio.__module__ == 'midas_ref.conditions.audio'
try: midas_ref.nothing
except AttributeError as e: assert 'nothing' in str(e)
else: raise SystemExit('found')
"""
    r = subprocess.run([sys.executable, '-c', code], env=ENV, cwd='/', capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

def test_sorted_weights_give_the_same_frames(midas):
    "What `ready` does on a CPU that multiplies bfloat16, here in float32; changed weights are sorted again."
    m, face, x = copy.deepcopy(midas), torch.zeros(3, midas.cfg.video.height, midas.cfg.video.width), A.babble(.96)
    def frames(): return Session(m, face, seed=1).push(x).astype(int)
    before = frames()
    A.pack(m, m.layout.frame_tokens)
    packed, convs = ([f for f in m.modules() if isinstance(f.forward, kind)] for kind in (A.Packed, A.PackedConv))
    assert len(packed) > 20 and sum(f.forward.gelu is not None for f in packed) >= m.cfg.head.layers and len(convs) > 20
    assert abs(frames() - before).max() <= 1 and all(f.forward.key for f in (m.head.embed, m.head.blocks[0].ff[0]))
    assert m.codec.decoder.stem.forward.key
    with torch.no_grad(): m.head.out.weight.neg_()
    other = frames()
    assert abs(other - before).max() > 2
    with torch.no_grad(): m.codec.decoder.stem.weight.neg_(); m.codec.decoder.out.conv.weight.mul_(.5)
    again, other = other, frames()
    assert abs(other - again).max() > 2
    for f in m.modules(): f.__dict__.pop('forward', None)
    assert abs(frames() - other).max() <= 1
