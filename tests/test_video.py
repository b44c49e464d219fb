"Files in and out: every image and sound format, every refusal, pictures and sound in step, nothing half-written"
import contextlib, errno, io, itertools, json, math, os, signal, struct, subprocess, sys, warnings
from fractions import Fraction
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image, ImageCms
from midas_ref.codec.dcae import DCAE
from midas_ref.codec.temporal import VideoDCAE
from midas_ref.data.shards import RATE, media_frames, media_sound, write_av
from midas_ref.inference import video as V
av = pytest.importorskip('av'); soundfile = pytest.importorskip('soundfile'); pytest.importorskip('cv2')

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get('MIDAS_REAL', ROOT.parent/'shared'/'real'))
PORTRAITS = ROOT/'data_samples'/'portraits'
real = pytest.mark.skipif(not REAL.is_dir(), reason=f'no real recordings at {REAL}')
ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1'}

@pytest.fixture(scope='module')
def mira(): return Image.open(PORTRAITS/'mira.png').convert('RGB')

def plain(n, size=(64, 64), value=90): return (np.full((*size, 3), value, np.uint8) for _ in range(n))
def left(folder): return sorted(p.name for p in Path(folder).iterdir())
def count(path): return len(list(media_frames(path, 'video')))
def line(e): s = str(e.value); assert '\n' not in s and len(s) < 400; return s

def clapper(path, frames, fps, white, **how):
    "White frames with a click at the instant when each begins."
    r = V.frame_rate(fps); x = np.zeros(round(frames/r*RATE) + 1, np.float32)
    for i in white: x[round(i/r*RATE)] = .9
    return V.write_video(path, (np.full((64, 64, 3), 255*(i in white), np.uint8) for i in range(frames)), x, fps, mark=False, **how)

def claps(path):
    times = [(f.time, f.to_ndarray(format='gray').mean() > 128) for f in media_frames(path, 'video')]
    x = np.abs(media_sound(path, 0, round((times[-1][0] + 1)*RATE)))
    at = lambda t: max(0, round((t - .02)*RATE))
    return [t for t, _ in times], [i for i, (_, w) in enumerate(times) if w], [at(t)/RATE + x[at(t):round((t + .05)*RATE)].argmax()/RATE - t for t, w in times if w]

# ---- sync

@pytest.mark.parametrize('ext', ['mp4', 'webm'])
@pytest.mark.parametrize('fps, seconds', [(12.5, 1.3), (12.5, 11), (25, .4), (25, 5.1), (Fraction(30000, 1001), 4.3), (29.97, .7), (24, 2), (23.976, 3), (50, 1.1), (Fraction(50, 3), 3.7), (7, 6)])
def test_flash_and_click_stay_together(tmp_path, ext, fps, seconds):
    r = V.frame_rate(fps); n = int(seconds*r); white = sorted({2, n//2, n - 3})
    times, seen, off = claps(clapper(tmp_path/f'x.{ext}', n, fps, white))
    assert len(times) == n and seen == white
    assert max(abs(t - i/r) for i, t in enumerate(times)) < (1e-5 if ext == 'mp4' else 6e-4)    # WebM counts milliseconds
    assert max(map(abs, off)) < .001

@pytest.mark.parametrize('ext', ['mp4', 'webm'])
def test_after_a_minute(tmp_path, ext):
    white = [3, 500, 1010, 1850]
    times, seen, off = claps(clapper(tmp_path/f'x.{ext}', 1875, 30000/1001, white))     # 62.6 s
    assert seen == white and max(map(abs, off)) < .001

def test_an_hour_at_an_odd_rate_is_counted_from_its_start(tmp_path):
    out = V.VideoWriter(tmp_path/'x.mp4', 29.97); out.tracks.pictures.count = 107892       # 3599.9964 s
    assert out.tracks.due == 57599942
    out.tracks.pictures.count = 0; out.abort(); assert left(tmp_path) == []

@pytest.mark.parametrize('rate', [8000, 16000, 22050, 44100, 48000])
def test_every_rate_of_sound(tmp_path, rate):
    n, t = 38, np.arange(rate*3)/rate
    V.write_video(tmp_path/'x.mp4', plain(n), (.4*np.sin(2*np.pi*440*t)).astype(np.float32), 12.5, rate)
    y = V.read_audio(tmp_path/'x.mp4')
    want = .4*np.sin(2*np.pi*440*np.arange(48000)/RATE)
    assert abs(len(y) - 48640) < 500 and np.corrcoef(y[800:47000], want[800:47000])[0, 1] > .995

def test_pieces_of_any_size_give_the_same_file(tmp_path):
    g = np.random.default_rng(0); x = g.normal(0, .1, 38400).astype(np.float32)
    frames = [g.integers(0, 256, (32, 48, 3)).astype(np.uint8) for _ in range(30)]
    V.write_video(tmp_path/'a.mp4', frames, x)
    for name, plan in (('b', 'sound first'), ('c', 'pictures first'), ('d', 'ragged')):
        with V.VideoWriter(tmp_path/f'{name}.mp4') as out:
            todo = list(np.split(x, np.sort(g.integers(0, 38400, 57))))
            if plan == 'sound first': [out.sound(p) for p in todo]; todo = []
            for i, f in enumerate(frames):
                out.frame(f)
                if plan == 'ragged': [out.sound(todo.pop(0)) for _ in range(min(int(g.integers(0, 4)), len(todo)))]
            for p in todo: out.sound(p)
        for kind in ('video', 'audio'):
            a, b = (np.concatenate([f.to_ndarray().ravel() for f in media_frames(tmp_path/f'{n}.mp4', kind)]) for n in ('a', name))
            assert len(a) == len(b) and (kind == 'audio' or (a == b).all())
        a, b = (media_sound(tmp_path/f'{n}.mp4', 0, 38400) for n in ('a', name))
        assert np.abs(a - b).max() < 1e-6

def test_short_sound_is_padded_and_long_sound_is_cut_with_a_warning(tmp_path):
    x = np.full(4*RATE, .3, np.float32)*np.sin(np.arange(4*RATE)).astype(np.float32)
    V.write_video(tmp_path/'short.mp4', plain(50), x[:RATE])
    y = V.read_audio(tmp_path/'short.mp4')
    assert abs(len(y) - 4*RATE) < 400 and np.abs(y[RATE + 400:]).max() < 1e-3
    with pytest.warns(UserWarning, match=r'2.00 s longer than its pictures, and was cut'): V.write_video(tmp_path/'long.mp4', plain(25), x)
    assert abs(len(V.read_audio(tmp_path/'long.mp4')) - 2*RATE) < 400
    with warnings.catch_warnings():
        warnings.simplefilter('error'); V.write_video(tmp_path/'exact.mp4', plain(50), x); V.write_video(tmp_path/'empty.mp4', plain(3), x[:0])

@pytest.mark.parametrize('ext', ['mp4', 'webm'])
@pytest.mark.parametrize('frames', [1, 2, 13])
def test_the_file_lasts_as_long_as_its_pictures(tmp_path, ext, frames):
    p = V.write_video(tmp_path/f'x.{ext}', plain(frames), np.zeros(100, np.float32))
    assert count(p) == frames
    with av.open(str(p)) as f: assert abs(f.duration/1e6 - frames*.08) < .045 and [s.type for s in f.streams] == ['video', 'audio']

def test_without_sound(tmp_path):
    for ext in ('mp4', 'webm'):
        p = V.write_video(tmp_path/f'x.{ext}', plain(5))
        with av.open(str(p)) as f: assert not f.streams.audio
        with pytest.raises(ValueError, match='no sound'): V.read_audio(p)
    with pytest.raises(ValueError, match='no sound track; open it with rate'):
        with V.VideoWriter(tmp_path/'y.mp4', rate=None) as out: out.sound(np.zeros(5, np.float32))
    assert 'y.mp4' not in left(tmp_path)

# ---- pictures

@pytest.mark.parametrize('size', [(64, 64), (63, 65), (17, 16), (384, 640), (101, 64)])
@pytest.mark.parametrize('ext', ['mp4', 'webm'])
def test_sizes_and_colours(tmp_path, size, ext):
    x = np.zeros((*size, 3), np.uint8); x[:, :size[1]//2] = (200, 40, 60); x[:, size[1]//2:] = (30, 90, 220)
    p = V.write_video(tmp_path/f'x.{ext}', [x]*3, mark=False)
    y = next(media_frames(p, 'video')).to_ndarray(format='rgb24')
    assert y.shape[:2] == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert np.abs(y[2:-2, 2:5].mean((0, 1)) - x[0, 0]).max() < 5 and np.abs(y[2:-2, -5:-2].mean((0, 1)) - x[0, -1]).max() < 5

def test_colours_are_declared(tmp_path):
    with av.open(str(V.write_video(tmp_path/'x.mp4', plain(2)))) as f:
        c = f.streams.video[0].codec_context
        assert (c.color_range, c.colorspace, c.color_primaries, c.color_trc) == (1, 6, 6, 6)

def test_a_tensor_is_as_good_as_an_array(tmp_path):
    x = torch.full((5, 32, 32, 3), 77, dtype=torch.uint8)
    assert count(V.write_video(tmp_path/'x.mp4', x, torch.zeros(100))) == 5

@pytest.mark.parametrize('bad, why', [(np.zeros((32, 32, 3), np.float32), 'float32'), (np.zeros((32, 32), np.uint8), r'\(32, 32\)'), (np.zeros((3, 32, 32), np.uint8), r'\(3, 32, 32\)'),
                                      (np.zeros((32, 32, 4), np.uint8), '4'), (np.zeros((0, 32, 3), np.uint8), '0'), (np.zeros((8, 32, 3), np.uint8), '8×32'), (np.zeros((4098, 16, 3), np.uint8), '4098')])
def test_wrong_frames(tmp_path, bad, why):
    with pytest.raises(ValueError, match=why) as e: V.write_video(tmp_path/'x.mp4', [bad])
    line(e); assert left(tmp_path) == []

def test_frames_of_two_sizes(tmp_path):
    with pytest.raises(ValueError, match='Frame 2 is 32×34 pixels, those before it are 32×32'): V.write_video(tmp_path/'x.mp4', [*plain(2, (32, 32)), *plain(1, (32, 34))])
    assert left(tmp_path) == []

@pytest.mark.parametrize('bad, why', [(np.zeros(9, np.int16), 'Divide 16-bit integers'), (np.zeros((9, 2), np.float32), r'mono'), (np.array([0, np.nan], np.float32), 'the first at sample 1'), (np.array([np.inf]), 'not finite')])
def test_wrong_sound(tmp_path, bad, why):
    with pytest.raises(ValueError, match=why) as e: V.write_video(tmp_path/'x.mp4', plain(3), bad)
    line(e); assert left(tmp_path) == []

def test_loud_sound_is_clipped():
    assert np.abs(V.check_sound(np.array([3., -7.]))).max() == 1

# ---- names, rates, disks

@pytest.mark.parametrize('fps', [0, -1, math.nan, math.inf, 121, '25', None])
def test_wrong_fps(tmp_path, fps):
    with pytest.raises(ValueError, match='accepted: a number from 1 to 120'): V.write_video(tmp_path/'x.mp4', plain(1), fps=fps)
    assert left(tmp_path) == []

def test_wrong_names(tmp_path):
    for name in ('x.avi', 'x', 'x.MP3'):
        with pytest.raises(ValueError, match=r'accepted: .mp4, .webm') as e: V.write_video(tmp_path/name, plain(1))
        line(e)
    (tmp_path/'d.mp4').mkdir()
    with pytest.raises(IsADirectoryError, match='is a folder'): V.write_video(tmp_path/'d.mp4', plain(1))
    with pytest.raises(FileNotFoundError, match='does not exist; make it'): V.write_video(tmp_path/'no'/'x.mp4', plain(1))
    with pytest.raises(ValueError, match='rate is 100'): V.VideoWriter(tmp_path/'x.mp4', rate=100)
    with pytest.raises(ValueError, match='No frame was given'): V.write_video(tmp_path/'x.mp4', [])
    assert left(tmp_path) == ['d.mp4']
    assert count(V.write_video(tmp_path/'X.MP4', plain(2))) == 2

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere')
def test_no_permission(tmp_path):
    os.chmod(tmp_path, 0o500)
    with pytest.raises(PermissionError, match='No permission'): V.write_video(tmp_path/'x.mp4', plain(1))

@pytest.mark.parametrize('ext', ['mp4', 'webm'])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, ext):
    p = V.write_video(tmp_path/f'x.{ext}', plain(4)); old = p.read_bytes()
    def broken(): yield from plain(20); assert '.part' in ''.join(left(tmp_path)) and p.read_bytes() == old; raise KeyError('boom')
    for keep in (False, True):
        with pytest.raises(KeyError): V.write_video(p, broken(), np.zeros(RATE, np.float32), keep=keep)
        assert set(left(tmp_path)) == {f'x.{ext}'} | ({f'x.partial.{ext}'} if keep else set()) and p.read_bytes() == old
    assert count(tmp_path/f'x.partial.{ext}') == 20 and V.is_marked(tmp_path/f'x.partial.{ext}')

def test_closing_early_gives_a_whole_file_and_closing_twice_is_harmless(tmp_path):
    out = V.VideoWriter(tmp_path/'x.mp4')
    for f in plain(7): out.frame(f)
    out.close(); out.close(); out.abort()
    assert left(tmp_path) == ['x.mp4'] and count(tmp_path/'x.mp4') == 7
    for f in (lambda: out.frame(next(plain(1))), lambda: out.sound(np.zeros(3, np.float32))):
        with pytest.raises(ValueError, match='closed already'): f()
    assert count(tmp_path/'x.mp4') == 7

def test_two_writers_of_one_name(tmp_path):
    a, b = V.VideoWriter(tmp_path/'x.mp4', rate=None), V.VideoWriter(tmp_path/'x.mp4', rate=None)
    for f in plain(9): a.frame(f)
    for f in plain(4): b.frame(f)
    a.close(); assert count(tmp_path/'x.mp4') == 9
    b.close(); assert count(tmp_path/'x.mp4') == 4 and left(tmp_path) == ['x.mp4']

def forked(f, *args):
    "What `f` returns in a process of its own (None if it was killed)."
    r, w = os.pipe()
    if not (pid := os.fork()):
        try: os.write(w, json.dumps(f(*args)).encode())
        except BaseException as e: os.write(w, json.dumps(repr(e)).encode())
        finally: os._exit(0)
    os.close(w)
    with os.fdopen(r, 'rb') as f: answer = f.read()
    os.waitpid(pid, 0)
    return json.loads(answer) if answer else None

def playable(path):
    "How many frames a player shows before it meets the torn end."
    n = 0
    with contextlib.suppress(av.error.InvalidDataError):
        for _ in media_frames(path, 'video'): n += 1
    return n

def noise(n, g): return (g.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(n))

def die(path):
    out = V.VideoWriter(path)
    for x in plain(100): out.frame(x); out.sound(np.zeros(1280, np.float32))
    os.kill(os.getpid(), signal.SIGKILL)

posix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')

@posix
@pytest.mark.parametrize('ext', ['mp4', 'webm'])
def test_a_killed_process_leaves_no_file_under_the_name_but_a_part_that_plays(tmp_path, ext):
    assert forked(die, tmp_path/f'x.{ext}') is None
    names = left(tmp_path); assert len(names) == 1 and names[0].endswith('.part')
    assert playable(tmp_path/names[0]) >= 100 - 2*13                  # all but the last key frame interval or two

def fill(path, keep):
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try: V.write_video(path, noise(10**4, np.random.default_rng(0)), np.zeros(16000, np.float32), keep=keep)
    except OSError as e: return [e.errno, str(e)]

@posix
@pytest.mark.parametrize('ext', ['mp4', 'webm'])
@pytest.mark.parametrize('keep', [True, False])
def test_a_full_disk(tmp_path, ext, keep):
    "A limit on the size of files refuses to write just as a full disk does."
    number, text = forked(fill, tmp_path/f'x.{ext}', keep)
    assert number == errno.EFBIG and f'Cannot write {tmp_path}/x.{ext}: File too large' in text and '\n' not in text
    assert left(tmp_path) == ([f'x.partial.{ext}'] if keep else [])
    if keep: assert 'What was written plays' in text and playable(tmp_path/f'x.partial.{ext}') > 10

def long(path):
    rss = lambda: int(open('/proc/self/statm').read().split()[1])*4096/2**20
    base, at = np.random.default_rng(0).integers(0, 256, (96, 48, 3)).astype(np.uint8), []
    with V.VideoWriter(path, 25) as out:
        for i in range(1800):
            out.frame(np.roll(base, i, 0)[:48]); out.sound(base.ravel()[:640].astype(np.float32)/256)
            if i % 300 == 299: at.append(rss())
    return at

@posix
@pytest.mark.skipif(not Path('/proc/self/statm').is_file(), reason='reads /proc')
@pytest.mark.parametrize('ext', ['mp4', 'webm'])
def test_memory_does_not_grow_with_length(tmp_path, ext):
    "72 s at 25 fps: the last 48 s are 8 MiB of pictures and 3 MiB of sound; the index of an mp4 is some bytes a frame."
    at = forked(long, tmp_path/f'x.{ext}')
    assert len(at) == 6 and at[-1] - at[1] < 2, at

# ---- the marks

@pytest.mark.parametrize('ext', ['mp4', 'webm'])
def test_marks(tmp_path, ext):
    grey = [np.full((128, 160, 3), 100, np.uint8)]*4
    a, b = (V.write_video(tmp_path/f'{m}.{ext}', grey, mark=m) for m in (True, False))
    shown = [next(media_frames(p, 'video')).to_ndarray(format='gray').astype(int) for p in (a, b)]
    low = lambda y: y[100:, 80:]
    assert np.ptp(low(shown[0])) > 80 and np.ptp(low(shown[1])) < 8
    assert np.abs(shown[0][:90] - shown[1][:90]).max() < 8
    for p in (a, b):
        assert V.is_marked(p)
        with av.open(str(p)) as f: assert any('Synthetic video' in v and 'midas_ref' in v for v in f.metadata.values())
    write_av(tmp_path/'other.mkv', np.stack(grey), 25); assert not V.is_marked(tmp_path/'other.mkv')

@pytest.mark.parametrize('size', [(16, 16), (16, 400), (400, 16), (64, 64), (256, 256), (640, 384), (1080, 1920)])
def test_the_mark_fits_every_size(size):
    x = np.full((*size, 3), 128, np.uint8); before = x.copy(); y = V.visible_mark(x)
    assert (x == before).all() and y.shape == x.shape and (y != x).any() and (y == x).mean() > .5
    if min(size) >= 64: assert y.max() > 200 and y.min() < 80

# ---- sound in

@pytest.mark.parametrize('ext', ['wav', 'flac', 'ogg', 'mp3', 'm4a', 'mp4', 'webm', 'mkv', 'mov'])
@pytest.mark.parametrize('rate', [8000, 16000, 48000])
def test_sound_of_every_kind_of_file(tmp_path, ext, rate):
    t = np.arange(2*rate)/rate; x = (.5*np.sin(2*np.pi*300*t)*(t > .5)).astype(np.float32); p = tmp_path/f'x.{ext}'
    if ext in ('wav', 'flac', 'ogg', 'mp3'): soundfile.write(p, np.stack([x, x], 1), rate)
    elif ext in ('mp4', 'webm'): V.write_video(p, plain(25), x, 12.5, rate)
    elif ext == 'm4a':
        if rate != 16000: pytest.skip('one rate is enough')
        with av.open(str(p), 'w', format='mp4') as f:
            s = f.add_stream('aac', rate=rate, layout='mono'); a = av.AudioFrame.from_ndarray(x[None], 'fltp', 'mono'); a.sample_rate, a.pts, a.time_base = rate, 0, Fraction(1, rate)
            for part in (rs := av.AudioResampler('fltp', 'mono', rate, frame_size=1024)).resample(a) + rs.resample(None): f.mux(s.encode(part))
            f.mux(s.encode())
    else:
        if rate != 16000: pytest.skip('one rate is enough')
        write_av(p, np.zeros((50, 32, 32, 3), np.uint8), 25, x)
    y = V.read_audio(p); want = np.where(np.arange(32000) > 8000, .5*np.sin(2*np.pi*300*np.arange(32000)/RATE), 0)
    assert y.dtype == np.float32 and abs(len(y) - 32000) < 3000
    assert np.corrcoef(y[:30000], want[:30000])[0, 1] > .99

@pytest.mark.parametrize('picture, sound', [(0, 0), (0, .32), (.48, 0), (.48, .4)])
def test_sound_counts_from_the_first_picture(tmp_path, picture, sound):
    x = np.zeros(2*RATE, np.int16); x[RATE] = 30000
    with av.open(str(tmp_path/'x.mkv'), 'w') as f:
        v, a = f.add_stream('libx264', rate=25, options=dict(tune='zerolatency')), f.add_stream('pcm_s16le', rate=RATE, layout='mono'); v.width = v.height = 32; v.pix_fmt = 'yuv420p'
        for i, p in enumerate(plain(50, (32, 32))): p = av.VideoFrame.from_ndarray(p, 'rgb24'); p.pts, p.time_base = i + round(25*picture), Fraction(1, 25); f.mux(v.encode(p))
        f.mux(v.encode())
        for i in range(0, len(x), 800): s = av.AudioFrame.from_ndarray(x[None, i:i+800], 's16', 'mono'); s.sample_rate, s.pts, s.time_base = RATE, i + round(RATE*sound), Fraction(1, RATE); f.mux(a.encode(s))
    assert abs(np.abs(V.read_audio(tmp_path/'x.mkv')).argmax() - (1 + sound - picture)*RATE) < 20

@pytest.mark.parametrize('name, content, kind, why', [('x.wav', b'', ValueError, 'empty'), ('x.wav', b'hello world', ValueError, 'cannot be read as sound'), ('x.mp4', os.urandom(5000), ValueError, 'cannot be read as sound'),
                                                      ('x.m3u8', b'#EXTM3U\n#EXTINF:1,\nother.ts\n', ValueError, 'cannot be read'), ('x.flac', None, FileNotFoundError, 'does not exist')])
def test_unusable_sound(tmp_path, name, content, kind, why):
    if content is not None: (tmp_path/name).write_bytes(content)
    with pytest.raises(kind, match=why) as e: V.read_audio(tmp_path/name)
    assert name in line(e)

def test_unusable_sound_of_a_good_kind(tmp_path):
    soundfile.write(tmp_path/'nan.wav', np.array([0, np.nan, .2]*999), RATE, 'FLOAT'); soundfile.write(tmp_path/'none.wav', np.zeros(0), RATE)
    Image.new('RGB', (99, 99)).save(tmp_path/'x.png')
    for f in ('nan.wav', 'none.wav', 'x.png'):
        with pytest.raises(ValueError) as e: V.read_audio(tmp_path/f)
        line(e)
    with pytest.raises(IsADirectoryError, match='is a folder'): V.read_audio(tmp_path)
    soundfile.write(tmp_path/'silent.wav', np.zeros(1600), RATE); assert len(V.read_audio(tmp_path/'silent.wav')) == 1600

@real
@pytest.mark.parametrize('file', ['grid_bbaf2n.mpg', 'lr_198-209-0000.ogg', 'fw_stereo_diarization.wav', 'tc_nasa_13013.mp4'])
def test_real_sound(file, tmp_path):
    x = V.read_audio(REAL/file)
    assert len(x) > RATE and .005 < x.std() < .5
    n = math.ceil(len(x)/1280); V.write_video(tmp_path/'x.mp4', plain(n), x)
    y = V.read_audio(tmp_path/'x.mp4')[:len(x)]; lag = np.correlate(np.pad(y[:20000], 200), x[:20000], 'valid').argmax() - 200
    assert abs(lag) <= 1 and np.corrcoef(x, y)[0, 1] > .95

# ---- portraits

def save(img, path, **how): img.save(path, **how); return path

ORIENT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}

def variants(img):
    "name -> (Pillow image, settings of save, largest mean error in levels of 255)"
    alpha = img.copy(); alpha.putalpha(255); grey = img.convert('L')
    exif = {f'exif{k}.jpg': (img.transpose(t), dict(exif=_orientation(k), quality=95), 6) for k, t in ORIENT.items()}
    return exif | {'rgb.png': (img, {}, 0), 'rgba.png': (alpha, {}, 0), 'la.png': (alpha.convert('LA'), {}, None), 'palette.png': (img.quantize(256), {}, 6), 'palette.gif': (img.quantize(256), {}, 6),
        'bmp.bmp': (img, {}, 0), 'tif.tif': (img, {}, 0), 'webp.webp': (img, dict(lossless=True), 0), 'ppm.ppm': (img, {}, 0), 'tga.tga': (img, {}, 0), 'ico.ico': (img.resize((256, 256)), dict(sizes=[(256, 256)]), 3), 'jp2.jp2': (img, {}, 3),
        'jpg.jpg': (img, dict(quality=95), 6), 'cmyk.jpg': (img.convert('CMYK'), dict(quality=95), 8), 'cmyk.tif': (img.convert('CMYK'), {}, 3), 'grey.png': (grey, {}, None),
        'icc.png': (img, dict(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()), 0), 'badicc.png': (img, dict(icc_profile=b'nonsense'), 0),
        'grey16.png': (Image.fromarray(np.asarray(grey).astype(np.uint16)*257), {}, None), 'grey16.tif': (Image.fromarray(np.asarray(grey).astype(np.uint16)*257), {}, None), 'grey32.tif': (Image.fromarray(np.asarray(grey).astype(np.int32)), {}, None),
        'float.tif': (Image.fromarray(np.asarray(grey).astype(np.float32)/255), {}, None), 'lab.tif': (ImageCms.profileToProfile(img, ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), outputMode='LAB'), {}, 4),
        'animated.gif': (img.quantize(256), dict(save_all=True, append_images=[Image.new('P', img.size)]*2, duration=100), 6), 'animated.webp': (img, dict(save_all=True, append_images=[Image.new('RGB', img.size)], lossless=True), 3),
        'animated.png': (img, dict(save_all=True, append_images=[Image.new('RGB', img.size)]), 0), 'pages.tif': (img, dict(save_all=True, append_images=[Image.new('RGB', img.size)]), 0)}

def _orientation(k): e = Image.Exif(); e[0x0112] = k; return e

NAMES = list(variants(Image.new('RGB', (64, 64))))

@pytest.mark.parametrize('name', NAMES)
def test_every_kind_of_image(tmp_path, mira, name):
    img, how, worst = variants(mira)[name]
    p = V.load_portrait(save(img, tmp_path/name, **how))
    want = mira if worst is not None else mira.convert('L').convert('RGB')
    want = np.asarray(want.resize((256, 256), Image.LANCZOS)).astype(int)
    got = ((p.picture.permute(1, 2, 0).numpy() + 1)*127.5).round()
    assert p.picture.dtype == torch.float32 and p.picture.shape == (3, 256, 256) and p.picture.abs().max() <= 1
    assert p.framing == 'whole' and p.note == ''
    assert np.abs(got - want).mean() <= (worst if worst is not None else 1.5)

def test_16_bit_colour(tmp_path, mira):
    import cv2
    cv2.imwrite(str(tmp_path/'x.png'), np.asarray(mira)[..., ::-1].astype(np.uint16)*257)
    p = V.load_portrait(tmp_path/'x.png')
    assert (((p.picture + 1)*127.5).round().byte().permute(1, 2, 0).numpy() == np.asarray(mira.resize((256, 256), Image.LANCZOS))).all()

def test_a_wide_profile_is_obeyed(tmp_path, mira):
    "A profile with swapped curves would show; here gamma 1.0 against sRGB."
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    other = srgb.replace(b's\x00R\x00G\x00B', b'o\x00t\x00h'); i = bytearray(srgb)
    for k in range(struct.unpack('>I', i[128:132])[0]):                         # swap red and blue primaries in the tag table
        tag = bytes(i[132 + 12*k:136 + 12*k])
        if tag in (b'rXYZ', b'bXYZ'): i[132 + 12*k:136 + 12*k] = b'bXYZ' if tag == b'rXYZ' else b'rXYZ'
        if tag == b'desc': i[132 + 12*k:136 + 12*k] = b'xxxx'
    p = V.load_portrait(save(mira, tmp_path/'x.png', icc_profile=bytes(i)))
    plain = V.load_portrait(save(mira, tmp_path/'y.png'))
    assert other and (p.picture - plain.picture).abs().mean() > .02

def test_transparency_lies_on_a_neutral_ground(tmp_path):
    for mode in ('RGBA', 'LA', 'P'):
        img = Image.new('RGBA', (80, 80), (255, 0, 0, 0)) if mode != 'P' else Image.new('RGBA', (80, 80), (255, 0, 0, 0)).quantize(4)
        p = V.load_portrait(save(img.convert(mode) if mode != 'P' else img, tmp_path/f'{mode}.png'))
        assert torch.allclose((p.picture + 1)*127.5, torch.tensor(V.GROUND, dtype=torch.float32)[:, None, None], atol=.6)

@pytest.mark.parametrize('name', ['mira', 'noor', 'lina', 'kenji'])
@pytest.mark.parametrize('place, scale', [((0, 0), 1.), ((700, 150), .8), ((300, 60), 1.3)])
def test_a_face_anywhere_is_brought_to_its_place(tmp_path, name, place, scale):
    who = Image.open(PORTRAITS/f'{name}.png').convert('RGB'); side = round(512*scale)
    wide = Image.new('RGB', (1300, 800), (120, 125, 130)); wide.paste(who.resize((side, side), Image.LANCZOS), place)
    p = V.load_portrait(save(wide, tmp_path/'x.png'))
    assert p.framing == 'face' and np.abs(np.array(p.face)/256 - V.FACE)[2] < .08
    l, t, w, h = p.box; assert l >= 0 and t >= 0 and l + w <= 1300 + 1e-6 and t + h <= 800 + 1e-6
    if place != (0, 0): assert np.abs(np.array(p.face)/256 - V.FACE).max() < .03
    assert abs(h/side - 1) < .2 and abs(l - place[0]) < .15*side

@pytest.mark.parametrize('name', sorted(p.stem for p in PORTRAITS.glob('*.png')))
def test_drawn_portraits_are_used_whole(name):
    p = V.load_portrait(PORTRAITS/f'{name}.png')
    assert p.box == (0, 0, 512, 512)            # also where no face was found: the middle of a square is all of it
    if name > 'l': return
    q = V.load_portrait(PORTRAITS/f'{name}.png', (512, 512))
    assert (((q.picture + 1)*127.5).round().byte().permute(1, 2, 0).numpy() == np.asarray(Image.open(PORTRAITS/f'{name}.png').convert('RGB'))).all()

@pytest.mark.parametrize('side', [200, 256, 320])
def test_a_find_in_a_wrong_place_is_outvoted(tmp_path, side):
    "One detector alone sees a small face beside the real one of tobias at 256 pixels."
    p = V.load_portrait(save(Image.open(PORTRAITS/'tobias.png').convert('RGB').resize((side, side), Image.LANCZOS), tmp_path/'x.png'))
    assert p.box == (0, 0, side, side)

@pytest.mark.parametrize('size', [(384, 640), (640, 384), (64, 64), (512, 256)])
def test_other_sizes(size):
    p = V.load_portrait(PORTRAITS/'mira.png', size)
    assert p.picture.shape == (3, *size) and abs(p.box[2]/p.box[3] - size[1]/size[0]) < .01

def test_no_face_and_small_faces(tmp_path, mira):
    p = V.load_portrait(save(Image.new('RGB', (300, 200), (9, 9, 9)), tmp_path/'x.png'))
    assert (p.face, p.framing, p.box) == (None, 'middle', (50, 0, 200, 200)) and 'No face was found' in p.note
    wide = Image.new('RGB', (1600, 1200), (120, 125, 130)); wide.paste(mira.resize((130, 130), Image.LANCZOS), (900, 700))
    p = V.load_portrait(save(wide, tmp_path/'y.png'))
    assert p.framing == 'face' and 'small' in p.note

@real
def test_real_faces(tmp_path):
    for f in sorted(REAL.glob('grid_*.mpg')):
        frame = next(media_frames(f, 'video')).to_ndarray(format='rgb24')
        for turn in (1, 6):
            img = Image.fromarray(frame) if turn == 1 else Image.fromarray(frame).transpose(ORIENT[6])
            p = V.load_portrait(save(img, tmp_path/'x.jpg', exif=_orientation(turn), quality=95))
            assert p.framing == 'face' and p.source == (288, 360) and abs(p.face[0]/256 - .5) < .05 and .4 < p.face[2]/256 < .7

def chunk(kind, data): import zlib; return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def bad_images(mira):
    png, jpg, gif = io.BytesIO(), io.BytesIO(), io.BytesIO(); mira.save(png, 'PNG'); mira.save(jpg, 'JPEG'); mira.quantize(256).save(gif, 'GIF')
    png, jpg, gif = (b.getvalue() for b in (png, jpg, gif))
    bomb = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')
    big = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 10000, 10000, 8, 2, 0, 0, 0)) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')
    slim = io.BytesIO(); Image.new('RGB', (63, 500)).save(slim, 'PNG')
    return {'empty.png': (b'', 'empty'), 'text.png': (b'just text\n', 'not an image'), 'noise.jpg': (os.urandom(4000), 'not an image'), 'half.png': (png[:len(png)//2], 'damaged or cut off'), 'half.jpg': (jpg[:len(jpg)//2], 'damaged or cut off'),
            'half.gif': (gif[:len(gif)//2], 'damaged or cut off'), 'header.png': (png[:40], 'damaged|not an image'), 'broken.png': (png[:9000] + bytes(400) + png[9400:], 'damaged'), 'bomb.png': (bomb, 'more than 64 megapixels'), 'big.png': (big, 'more than 64 megapixels'),
            'slim.png': (slim.getvalue(), '63×500 pixels; accepted: 64'), 'script.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n', 'not an image')}

@pytest.mark.parametrize('name', list(bad_images(Image.new('RGB', (64, 64)))))
def test_unusable_images(tmp_path, mira, name):
    data, why = bad_images(mira)[name]; (tmp_path/name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ValueError, match=why) as e: V.load_portrait(tmp_path/name)
    assert name in line(e)

def test_unusable_names_and_sizes(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'): V.load_portrait(tmp_path/'x.png')
    with pytest.raises(IsADirectoryError, match='is a folder'): V.load_portrait(tmp_path)
    for size in ((0, 256), (256,), (256., 256), (9999, 64)):
        with pytest.raises(ValueError, match='size is'): V.load_portrait(PORTRAITS/'mira.png', size)
    with pytest.raises(ValueError, match='fill is 3'): V.load_portrait(PORTRAITS/'mira.png', fill=3)

def test_frame_box_property():
    g = np.random.default_rng(0)
    for _ in range(500):
        shape, size = tuple(g.integers(64, 2000, 2)), tuple(g.integers(64, 700, 2))
        face = None if g.random() < .2 else (g.uniform(0, shape[1]), g.uniform(0, shape[0]), g.uniform(.05, 1)*min(shape))
        (l, t, w, h), how = V.frame_box(shape, face, size)
        assert l >= -1e-6 and t >= -1e-6 and l + w <= shape[1] + 1e-6 and t + h <= shape[0] + 1e-6 and w > 0 and h > 0
        assert how == 'whole' or abs(w/h/(size[1]/size[0]) - 1) < 1e-6
        if how == 'face' and h < min(shape[0], shape[1]*size[0]/size[1]) - 1: assert abs(face[2]/h - V.FACE[2]) < 1e-6

# ---- drawn or not

def test_the_bundled_codec_has_a_threshold():
    "After a new codec: run the slow cells of page 61 with MIDAS_REAL and store the threshold that they print."
    codec = VideoDCAE.from_pretrained(ROOT/'data_samples'/'weights'/'codec')
    assert codec.fingerprint() in V.THRESHOLDS
    assert all(V.is_drawn(codec, V.load_portrait(p)) is True for p in sorted(PORTRAITS.glob('*.png'))[::3])
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))*2 - 1
    assert V.is_drawn(codec, torch.nn.functional.interpolate(noise[None], (256, 256))[0]) is False

@real
def test_photographs_are_not_drawn(tmp_path):
    codec = VideoDCAE.from_pretrained(ROOT/'data_samples'/'weights'/'codec')
    if codec.fingerprint() not in V.THRESHOLDS: pytest.skip('unknown codec')
    for f in sorted(REAL.glob('*.mp[g4]')):
        frame = list(itertools.islice(media_frames(f, 'video'), 41))[-1].to_ndarray(format='rgb24'); Image.fromarray(frame).save(tmp_path/'x.png')
        assert V.is_drawn(codec, V.load_portrait(tmp_path/'x.png')) is False

def test_an_unknown_codec_is_said_to_be_unknown():
    from midas_ref.config import preset
    for cls in (DCAE, VideoDCAE):
        codec = cls(preset('tiny').codec).eval()
        with pytest.warns(UserWarning, match='unknown codec'): assert V.is_drawn(codec, torch.zeros(3, 64, 64)) is None
        assert 0 < V.codec_error(codec, torch.zeros(3, 64, 64) + .5) < 4

def test_fit_threshold():
    assert V.fit_threshold([.01, .02], [.08, .5]) == pytest.approx(.04)
    with pytest.raises(ValueError, match='cannot tell them apart'): V.fit_threshold([.1], [.09])

def test_imports_without_av_and_opencv():
    code = "import sys; sys.modules['av'] = sys.modules['cv2'] = None\nfrom midas_ref.inference import video as V\nprint(V.frame_rate(12.5))\ntry: V.write_video('x.mp4', [])\nexcept ImportError as e: print(e)"
    r = subprocess.run([sys.executable, '-c', code], env=ENV, text=True, capture_output=True)
    assert '25/2' in r.stdout and 'pip install' in r.stdout, r.stdout + r.stderr
