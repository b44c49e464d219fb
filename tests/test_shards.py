"""Shards: nothing is lost, doubled or half-written, whatever is interrupted; real files are packed or refused with a reason."""
import errno, json, math, os, resource, shutil, signal, subprocess, sys, threading, time, warnings
from functools import partial
from pathlib import Path
import numpy as np
import pytest, torch
from torch.utils.data import DataLoader
from midas_ref.data import shards as S

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent/'shared'/'real'
ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1'}

def clip(i, frames=10, size=32, fps=12.5, wait=0., log=None):
    "A moving gradient and a tone; leaves a line with its process in `log`."
    if log:
        with open(log, 'a') as f: f.write(f'{i} {os.getpid()}\n')
    time.sleep(wait)
    y, x = np.mgrid[:size, :size]*256/size; t = 3.*np.arange(frames)[:, None, None]
    video = np.stack([(x*.5 + t + 7*i % 60), (y*.4 + 60 + t), (x+y)*.3 + t], -1).clip(0, 255).astype(np.uint8)
    s = np.arange(S.clip_samples(frames, fps))/S.RATE
    return dict(key=f'clip-{i:04d}', video=video, audio=(.3*np.sin(2*np.pi*(200+i)*s)).astype(np.float32), meta=dict(fps=fps, language='none'),
                reference=video[0], truth={'motion': np.full((frames, 2), i, np.float32)})

def keys(samples): return [s.key for s in samples]
def hidden(folder): return [p.name for p in Path(folder).iterdir() if p.name.endswith('.part')]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Eleven clips, four to a shard."
    out = tmp_path_factory.mktemp('shards')/'set'
    S.make_shards(out, 11, clip, per_shard=4, progress=False)
    return out

# --- the sample -----------------------------------------------------------------------------------

@pytest.mark.parametrize('fps, frames', [(12.5, 11), (25, 30), (29.97, 31), (24, 7)])
def test_round_trip(fps, frames):
    s = S.as_sample({**clip(3, frames, 64, fps), 'partner': np.zeros(S.clip_samples(frames, fps), np.float32)}, 'x')
    b = S.decode(S.encode(s)); c = S.decode(S.encode(b))
    assert b.video.shape == s.video.shape and len(b.audio) == round(frames/fps*16000) == len(b.partner)
    assert np.abs(b.audio - s.audio).max() <= .5/32768 and (c.audio == b.audio).all()
    assert 10*math.log10(255**2/((b.video.astype(float)-s.video)**2).mean()) > 38
    assert (b.reference == s.reference).all() and (b.truth['motion'] == s.truth['motion']).all() and b.meta['frames'] == frames
    assert (S.decode(S.encode(s, lossless=True)).video == s.video).all()

def test_loud_sound_is_clipped_not_wrapped(): assert np.abs(S.decode_audio(S.encode_audio(np.array([1., -1., 2., -3.]))) - [1, -1, 1, -1]).max() < 1e-4

@pytest.mark.parametrize('change, said', [
    (dict(audio=np.zeros(99, np.float32)), 'has 99 samples, but 10 frames at 12.5 fps last 12800'), (dict(meta={}), "meta['fps']"),
    (dict(video=np.zeros((10, 31, 32, 3), np.uint8)), 'even height'), (dict(video=np.zeros((10, 32, 32, 3))), 'uint8'), (dict(key='a.b'), 'letters, digits'),
    (dict(audio=np.full(12800, np.nan, np.float32)), 'finite')])
def test_wrong_samples_are_refused(change, said):
    with pytest.raises(ValueError) as e: S.as_sample({**clip(0), **change}, 'x')
    assert said in str(e.value)

def test_pickle_is_never_read(tmp_path):
    "A member called .pkl or .pth stays bytes that nobody opens."
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path/'exploded'), 'w'))
    import pickle
    S.decode({**S.encode(S.as_sample(clip(0), '')), 'pkl': pickle.dumps(Bomb()), 'pth': pickle.dumps(Bomb())})
    assert not (tmp_path/'exploded').exists()

def test_numpy_numbers_in_meta():
    "Numbers and arrays of numpy become plain ones; anything else is refused by name."
    s = S.as_sample({**clip(0), 'meta': {'fps': 12.5, 'yaw': np.float32(.5), 'track': np.arange(3)}}, '')
    assert S.decode(S.encode(s)).meta['track'] == [0, 1, 2]
    for bad in (float('nan'), {1, 2}):
        s.meta['bad'] = bad
        with pytest.raises(ValueError, match='meta holds something that JSON cannot'): S.encode(s)

def test_camera_of_a_long_video_is_smooth_and_inside():
    "Two hours of a jittering detector: no large matrix, no tremble, never outside the picture."
    t = np.arange(0, 7200, .2); rng = np.random.default_rng(0)
    run = [(float(a), 320 + 200*np.sin(a/60) + n[0], 180 + n[1], 150. + n[2]) for a, n in zip(t, rng.normal(0, 4, (len(t), 3)))]
    track, (h, w) = S.camera(run, (360, 640), (256, 256))
    _, x, y = np.array(track).T
    assert np.abs(np.diff(x)).max() < 5 and x.min() >= w/2 - 1e-6 and x.max() <= 640 - w/2 + 1e-6 and y.max() <= 360 - h/2 + 1e-6

def test_missing_package_says_what_to_install():
    with pytest.raises(ImportError, match=r"pip install 'midas_ref\[data\]'"): S.need('no_such_package_here')

def test_deaf_while_other_threads_hear():
    "Ctrl-C given to another thread does not interrupt what is inside; it is raised at the end, and the handler is the old one."
    done, inside, before = threading.Event(), [], signal.getsignal(signal.SIGINT)
    other = threading.Thread(target=done.wait); other.start()
    try:
        with pytest.raises(KeyboardInterrupt), S.deaf():
            signal.pthread_kill(other.ident, signal.SIGINT); time.sleep(.1); inside.append(True)
    finally: done.set(); other.join()
    assert inside and signal.getsignal(signal.SIGINT) is before and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

# --- writing --------------------------------------------------------------------------------------

def test_kill_and_restart(tmp_path):
    "kill -9 of a run with two workers: they leave too, nothing half-written shows, and the restart ends byte for byte as if nothing had happened."
    out, log = tmp_path/'out', tmp_path/'log'
    code = f"import sys, test_shards as t\nfrom functools import partial\nif __name__ == '__main__': t.S.make_shards({str(out)!r}, 22, partial(t.clip, wait=.1, log={str(log)!r}), 3, workers=2, progress=False)"
    p = subprocess.Popen([sys.executable, '-c', code], env=ENV)
    until = time.time() + 40
    while len(list(out.glob('*.json'))) < 3 and time.time() < until: time.sleep(.02)      # dataset.json and two shards
    time.sleep(.12); os.kill(p.pid, signal.SIGKILL); p.wait()
    pids = {int(x.split()[1]) for x in log.read_text().splitlines()} - {p.pid}
    assert pids
    def alive(q):
        try: return Path(f'/proc/{q}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
        except OSError: return False
    until = time.time() + 10
    while any(alive(q) for q in pids) and time.time() < until: time.sleep(.05)
    assert not any(alive(q) for q in pids), "workers outlived their parent"
    done = [q for q in out.glob('*.tar')]
    assert 0 < len(done) < 8
    for q in done: assert len(S.index_tar(q)) == 3                                       # each visible shard is whole
    before = len(log.read_text().splitlines())
    S.make_shards(out, 22, partial(clip, log=str(log)), 3, progress=False)
    again = [int(x.split()[0]) for x in log.read_text().splitlines()[before:]]
    assert len(again) == len(set(again)) < 22
    assert sorted(keys(S.Shards(out))) == [f'clip-{i:04d}' for i in range(22)] and not hidden(out)
    S.make_shards(tmp_path/'whole', 22, clip, 3, progress=False)
    assert all(q.read_bytes() == (out/q.name).read_bytes() for q in (tmp_path/'whole').glob('shard*'))

def test_disk_full(tmp_path):
    "A file that may not grow (like a full disk): one clear error, and no trace of the shard."
    def full(): resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    code = "import sys, test_shards as t\ntry: t.S.make_shards(sys.argv[1], 12, t.clip, 4, lossless=True, progress=False)\nexcept OSError as e: print(e)"
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path/'out')], env=ENV, preexec_fn=full, capture_output=True, text=True)
    assert 'Cannot write to' in r.stdout and 'run the same command again' in r.stdout and not r.stderr, r.stderr
    assert not list((tmp_path/'out').glob('*.tar')) and not hidden(tmp_path/'out')

def test_no_space_when_saving(tmp_path, monkeypatch):
    out, real = tmp_path/'out', os.fsync
    def fsync(fd):
        if '.tar' in os.readlink(f'/proc/self/fd/{fd}'): raise OSError(errno.ENOSPC, 'No space left on device')
        real(fd)
    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match='No space left on device. Finished shards are kept'): S.make_shards(out, 4, clip, 4, progress=False)
    assert not list(out.glob('*.tar')) and not hidden(out)
    monkeypatch.undo()
    S.make_shards(out, 4, clip, 4, progress=False)
    assert len(S.Shards(out)) == 4

def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(OSError, match='Cannot write to'): S.make_shards(tmp_path/'file'/'out', 4, clip, progress=False)
    ro = tmp_path/'ro'; ro.mkdir(mode=0o555)
    if os.access(ro, os.W_OK): return                                                     # root may write anywhere
    with pytest.raises(OSError, match='Cannot write to'): S.make_shards(ro/'out', 4, clip, progress=False)

def test_other_settings_are_refused(folder):
    with pytest.raises(ValueError, match='clips was 11 and is now 12'): S.make_shards(folder, 12, clip, 4, progress=False)
    with pytest.raises(ValueError, match="seed was None and is now 3"): S.make_shards(folder, 11, clip, 4, config={'seed': 3}, progress=False)

def test_foreign_tar_files_are_not_mixed(tmp_path):
    S.write_shard(tmp_path/'a.tar', [S.as_sample(clip(0), '')])
    with pytest.raises(ValueError, match='no dataset.json'): S.make_shards(tmp_path, 4, clip, progress=False)

def test_two_writers_at_once(tmp_path):
    def nested(i): S.make_shards(tmp_path/'out', 4, clip, 4, progress=False)
    with pytest.raises(RuntimeError, match='Another process is writing'): S.make_shards(tmp_path/'out', 4, nested, 4, progress=False)

def test_double_keys_are_found(tmp_path):
    with pytest.raises(ValueError, match='keys must be unique'): S.make_shards(tmp_path/'a', 4, lambda i: clip(0), 4, progress=False)
    with pytest.raises(ValueError, match='keys must be unique'): S.make_shards(tmp_path/'b', 4, lambda i: clip(0), 1, progress=False)

def broken(i):
    if i == 5: raise ZeroDivisionError('no such person')
    return clip(i)

def test_error_in_a_worker_names_the_clip(tmp_path):
    with pytest.raises(RuntimeError, match='Clip 5 could not be made: ZeroDivisionError: no such person'): S.make_shards(tmp_path/'out', 12, broken, 2, workers=2, progress=False)
    assert not hidden(tmp_path/'out')
    S.make_shards(tmp_path/'out', 12, clip, 2, progress=False)
    assert len(S.Shards(tmp_path/'out')) == 12

# --- reading --------------------------------------------------------------------------------------

def test_webdataset_reads_them(folder):
    import webdataset as wds
    found = [S.decode(d) for d in wds.WebDataset([str(p) for p in sorted(folder.glob('*.tar'))], shardshuffle=False)]
    assert keys(found) == [f'clip-{i:04d}' for i in range(11)]

def test_shards_of_others(folder, tmp_path):
    "A tar without our index is read as well."
    shutil.copy(folder/'shard-000001.tar', tmp_path/'theirs.tar')
    assert keys(S.Shards(tmp_path)) == [f'clip-{i:04d}' for i in range(4, 8)]

@pytest.mark.parametrize('workers', [0, 1, 2])
@pytest.mark.parametrize('tail, counts', [('keep', [6, 5]), ('drop', [5, 5]), ('pad', [6, 6])])
def test_each_clip_once(folder, workers, tail, counts):
    "Two ranks, any number of workers: together exactly the epoch."
    parts = [S.ShardLoader(S.ShardDataset(folder, seed=2, rank=r, world=2, tail=tail, fields=('meta',)), batch=2, workers=workers) for r in range(2)]
    got = [[s['key'] for b in p for s in b] for p in parts]
    assert [len(g) for g in got] == counts and [len(p.data) for p in parts] == counts
    both = got[0] + got[1]
    assert len(set(both)) == {'keep': 11, 'drop': 10, 'pad': 11}[tail]

def test_plain_dataloader(folder):
    "PyTorch's own loader over two ranks with two workers: each clip once."
    got = [s['key'] for r in range(2) for b in DataLoader(S.ShardDataset(folder, rank=r, world=2, fields=('meta',)), batch_size=2, num_workers=2, collate_fn=list) for s in b]
    assert sorted(got) == [f'clip-{i:04d}' for i in range(11)]

def test_order(folder):
    d = S.ShardDataset(folder, seed=5, fields=('meta',)); a = [s['key'] for s in d]; b = [s['key'] for s in d]
    assert a != b and sorted(a) == sorted(b)
    d.epoch = 0; assert [s['key'] for s in d] == a
    assert [s['key'] for s in S.ShardDataset(folder, shuffle=False, fields=('meta',))] == sorted(a)
    assert S.epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]

@pytest.mark.parametrize('before, after', [(0, 2), (1, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize('stop', [1, 3, 4])
def test_resume(folder, before, after, stop):
    "Stop after any batch of any epoch, go on with any number of workers: the same batches follow."
    make = lambda w: S.ShardLoader(S.ShardDataset(folder, seed=7, fields=('meta',)), batch=3, workers=w)
    run = lambda loader: [[s['key'] for s in b] for b in loader]
    ref = make(0); first, second = run(ref), run(ref)
    a = make(before); assert run(a) == first                                              # a whole epoch, then `stop` batches
    it = iter(a); head = [[s['key'] for s in next(it)] for _ in range(stop)]
    state = json.loads(json.dumps(a.state_dict())); del it
    b = make(after); b.load_state_dict(state)
    rest = run(b)
    assert (head + rest == second) if stop < 4 else (head == second and state['epoch'] == 2 and sorted(sum(rest, [])) == sorted(sum(first, [])))

def test_resume_with_another_world(folder):
    make = lambda r, w: S.ShardLoader(S.ShardDataset(folder, seed=7, rank=r, world=w, fields=('meta',)), batch=2)
    seen, loaders = [], [make(r, 2) for r in range(2)]
    for l in loaders: seen += [s['key'] for s in next(iter(l))]
    state = loaders[1].state_dict(); assert state == loaders[0].state_dict() and state['consumed'] == 4
    for r in range(3):
        l = make(r, 3); l.load_state_dict(state); seen += [s['key'] for b in l for s in b]
    assert sorted(seen) == [f'clip-{i:04d}' for i in range(11)]

def test_position_of_another_collection_is_refused(folder, tmp_path):
    S.make_shards(tmp_path/'b', 3, clip, progress=False)
    with pytest.raises(ValueError, match='This position is for clips='): S.ShardLoader(S.ShardDataset(tmp_path/'b')).load_state_dict(S.ShardLoader(S.ShardDataset(folder)).state_dict())

@pytest.mark.parametrize('workers', [0, 2])
def test_damage_is_skipped_and_said(folder, tmp_path, workers):
    shutil.copytree(folder, tmp_path/'bad'); shards = S.Shards(tmp_path/'bad')
    for i, member in ((1, 'mp4'), (6, 'json')):
        path, e = shards.entry(i); at, n, _ = e['members'][member]
        raw = bytearray(path.read_bytes()); raw[at + n//2] ^= 16; path.write_bytes(raw)
    last = tmp_path/'bad'/'shard-000002.tar'; os.truncate(last, shards.entry(10)[1]['members']['flac'][0] + 5)     # the last clip is cut off
    d = S.ShardDataset(tmp_path/'bad', shuffle=False)
    with pytest.warns(UserWarning) as said: got = [s.key for b in S.ShardLoader(d, batch=2, workers=workers) for s in b]
    assert got == [f'clip-{i:04d}' for i in (0, 2, 3, 4, 5, 7, 8, 9)]
    assert [x[1] for x in d.skipped] == ['clip-0001', 'clip-0006', 'clip-0010'] and d.epoch == 1
    text = ' '.join(str(w.message) for w in said)
    assert 'shard-000000.tar' in text and 'is damaged (checksum' in text and 'is cut off' in text

def test_all_damaged_is_an_error(tmp_path):
    S.make_shards(tmp_path/'a', 2, clip, progress=False); os.truncate(tmp_path/'a'/'shard-000000.tar', 10)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match='None of the clips could be read'):
        warnings.simplefilter('ignore'); list(S.ShardDataset(tmp_path/'a'))

def test_broken_index_is_made_again(folder, tmp_path):
    shutil.copytree(folder, tmp_path/'a'); (tmp_path/'a'/'shard-000001.json').write_text('{"half": ')
    with pytest.warns(UserWarning, match='its index cannot be used'): assert len(S.Shards(tmp_path/'a')) == 11

def test_folders_that_cannot_be_read(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='There is no folder'): S.Shards(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='holds no shards'): S.Shards(tmp_path)
    shutil.copytree(folder, tmp_path/'a'); (tmp_path/'a'/'shard-000002.json').unlink(); (tmp_path/'a'/'shard-000002.tar').unlink()
    with pytest.raises(ValueError, match='has 2 of 3 shards'): S.Shards(tmp_path/'a')
    assert len(S.Shards(tmp_path/'a', partial=True)) == 8
    (tmp_path/'a'/'shard-000001.tar').unlink()
    with pytest.raises(FileNotFoundError, match='is missing, though its index'): S.Shards(tmp_path/'a', partial=True)

@pytest.mark.parametrize('given, said', [(dict(tail='cut'), "'keep', 'drop', 'pad'"), (dict(rank=2, world=2), 'rank is 2 of 2'), (dict(fields=('sound',)), 'accepted: video'), (dict(seed=-1), '0 or more')])
def test_wrong_arguments(folder, given, said):
    with pytest.raises(ValueError) as e: S.ShardDataset(folder, **given)
    assert said in str(e.value)

def test_error_in_transform_is_not_hidden(folder):
    with pytest.raises(ZeroDivisionError): list(S.ShardDataset(folder, transform=lambda s: 1/0))

def test_tensors(folder):
    x = next(iter(S.ShardDataset(folder, transform=S.to_tensors)))
    assert x['video'].shape == (10, 3, 32, 32) and x['reference'].shape == (3, 32, 32) and x['video'].dtype == torch.float32 and x['video'].min() >= -1

# --- real video -----------------------------------------------------------------------------------

@pytest.mark.parametrize('source, wanted', [(25, 25), (30, 25), (29.97, 12.5), (60, 12.5), (12.5, 25)])
def test_frames_are_picked_by_time(source, wanted):
    stamps = 5 + np.arange(round(4*source))/source
    at = 5 + (np.arange(round(3.9*wanted)) + .5)/wanted
    err = at - stamps[S.pick_frames(stamps, 5, len(at), wanted)]
    assert (err > -1e-5).all() and (err < 1/source + 1e-5).all()

def drawn_face(size, dx=0.):
    "A face that the detector accepts."
    y, x = np.mgrid[:size, :size]/size
    img = np.tile(np.array([.45, .55, .65]), (size, size, 1))
    parts = [(0, .62, .5, .3, (.2, .3, .5)), (0, -.12, .33, .36, (.25, .16, .1)), (0, 0, .27, .37, (.85, .66, .54)), (0, .02, .05, .12, (.93, .76, .64))]
    for e in (-.11, .11):
        parts += [(e, -.07, .075, .05, (.55, .38, .3)), (e, -.065, .05, .026, (1, 1, 1)), (e, -.065, .024, .026, (.1, .08, .08)), (e, -.14, .075, .018, (.2, .12, .08))]
    for cx, cy, rx, ry, c in parts + [(0, .2, .09, .03, (.55, .2, .22))]:
        a = np.clip((1 - np.hypot((x-.5-dx-.75*cx)/(.75*rx), (y-.52-.75*cy)/(.75*ry)))*.75*min(rx, ry)*size/2, 0, 1)[..., None]
        img = img*(1-a) + np.array(c)*a
    return (img*255).astype(np.uint8)

def beep(seconds, at, late=0.):
    "Silence with a click of 40 ms, for a stream whose first sample stands at `late` seconds."
    s = np.arange(round((seconds-late)*S.RATE))/S.RATE + late
    return np.where((s >= at) & (s < at+.04), .8*np.sin(2*np.pi*1000*s), 0)

@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    "Good and bad files."
    d = tmp_path_factory.mktemp('videos'); (d/'deep').mkdir()
    face = drawn_face(200); n = lambda t, fps=30: np.repeat(face[None], round(t*fps), 0)
    flash = n(3); flash[36:39] = flash[36:39]//2 + 127                                    # at 1.2 s
    S.write_av(d/'deep'/'late.mkv', flash, 30, beep(3, 1.2, .09), late=.09)
    S.write_av(d/'early.mov', flash, 30, beep(3, 1.2))
    gone = n(4); gone[45:75] = 128                                                        # nobody there for a second
    S.write_av(d/'gone.mkv', gone, 30, beep(4, .5))
    S.write_av(d/'silent.mp4', n(2), 30)
    S.write_av(d/'nobody.mkv', np.full((60, 96, 128, 3), 90, np.uint8), 30, beep(2, 1))
    S.write_av(d/'short.mkv', n(.5), 30, beep(.5, .1))
    (d/'text.mp4').write_text('hello'); (d/'empty.mp4').touch(); (d/'list.mp4').write_text('#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n')
    whole = (d/'early.mov').read_bytes(); (d/'cut.mov').write_bytes(whole[:len(whole)//2])
    mid = bytearray((d/'deep'/'late.mkv').read_bytes()); (d/'half.mkv').write_bytes(mid[:len(mid)*2//3])
    import soundfile
    soundfile.write(d/'voice.wav', beep(2, 1), S.RATE)
    return d

def test_pack(videos, tmp_path):
    report = S.pack(videos, tmp_path/'out', fps=25, size=64, progress=False)
    row = {r['file']: r for r in report['files']}
    why = {f: r['reason'].split(' (')[0] for f, r in row.items() if r['reason']}
    bad = 'not a video, or damaged at its beginning'
    assert {k: v for k, v in why.items() if k != 'half.mkv'} == {'silent.mp4': 'no sound', 'nobody.mkv': 'no face found', 'short.mkv': 'too short', 'text.mp4': bad, 'empty.mp4': 'the file is empty',
        'list.mp4': bad, 'cut.mov': bad, 'voice.wav': 'no video'}
    assert row['gone.mkv']['clips'] == 2 and row['deep/late.mkv']['clips'] == row['early.mov']['clips'] == 1
    assert report == json.loads((tmp_path/'out'/'report.json').read_bytes())
    for s in S.Shards(tmp_path/'out'):
        assert len(s.audio) == S.clip_samples(len(s.video), 25) and s.meta['origin'] == 'recording'
        if 'late' not in s.key and 'early' not in s.key: continue
        light = s.video.mean((1, 2, 3)); k = int((np.abs(s.audio) > .1).argmax())
        assert abs(np.diff(light).argmax() + 1 + .5 - (s.meta['start'] + 1.2)*25 + s.meta['start']*50) <= .51     # the frame whose interval holds 1.2 s
        assert abs(k/S.RATE + s.meta['start'] - 1.2) < .002
    S.pack(videos, tmp_path/'out', fps=25, size=64, progress=False)                       # finished: nothing to do
    (videos/'text.mp4').write_text('hello')                                               # surveyed anew, same clips
    S.pack(videos, tmp_path/'out', fps=25, size=64, progress=False)
    with pytest.raises(ValueError, match='was made with other settings'): S.pack(videos, tmp_path/'out', fps=12.5, size=64, progress=False)

def test_pack_in_processes_is_the_same(videos, tmp_path):
    (tmp_path/'in').mkdir()
    for f in ('early.mov', 'gone.mkv', 'text.mp4'): shutil.copy(videos/f, tmp_path/'in')
    S.pack(tmp_path/'in', tmp_path/'a', fps=12.5, size=(64, 96), seconds=1.2, progress=False)
    S.pack(tmp_path/'in', tmp_path/'b', fps=12.5, size=(64, 96), seconds=1.2, workers=2, progress=False)
    assert (tmp_path/'a'/'shard-000000.tar').read_bytes() == (tmp_path/'b'/'shard-000000.tar').read_bytes()
    assert all(s.video.shape == (15, 64, 96, 3) and s.reference is not None for s in S.Shards(tmp_path/'a') if len(s.video) == 15)

def test_pack_goes_on_after_kill(videos, tmp_path):
    "kill -9 while the folder is surveyed: the second run uses the answers of the first and finishes."
    out = tmp_path/'out'; (tmp_path/'in').mkdir()
    for i in range(8): shutil.copy(videos/'early.mov', tmp_path/'in'/f'{i}.mov')
    p = subprocess.Popen([sys.executable, '-c', f"import test_shards as t; t.S.pack({str(tmp_path/'in')!r}, {str(out)!r}, size=32, progress=False)"], env=ENV)
    until = time.time() + 30
    while len(list(out.glob('.survey/*.json'))) < 2 and time.time() < until: time.sleep(.005)
    os.kill(p.pid, signal.SIGKILL); p.wait()
    kept = {q: q.stat().st_mtime_ns for q in out.glob('.survey/*.json')}
    assert 2 <= len(kept) and not list(out.glob('*.tar'))
    assert S.pack(tmp_path/'in', out, size=32, progress=False)['clips'] == 8 and len(set(keys(S.Shards(out)))) == 8
    assert all(q.stat().st_mtime_ns == t for q, t in kept.items()) and len(list(out.glob('.survey/*.json'))) == 8

def test_pack_refuses(tmp_path, videos):
    with pytest.raises(FileNotFoundError): S.pack(tmp_path/'none', tmp_path/'o')
    with pytest.raises(ValueError, match='even numbers'): S.pack(videos, tmp_path/'o', size=65)
    (tmp_path/'only').mkdir(); (tmp_path/'only'/'a.txt').write_text('x')
    with pytest.raises(ValueError, match='None of the 1 files .* a.txt: not a video'): S.pack(tmp_path/'only', tmp_path/'o', progress=False)

def test_a_seek_does_not_change_a_clip(tmp_path):
    "Far into a long file we seek; the frames and the sound must be those of reading from the beginning."
    v = np.zeros((26*10, 32, 32, 3), np.uint8); v += np.arange(260, dtype=np.uint8)[:, None, None, None] % 200
    a = np.random.default_rng(0).uniform(-.5, .5, 26*S.RATE)
    S.write_av(tmp_path/'long.mkv', v, 10, a)
    clip = dict(start=21., frames=30, camera=[(0., 16., 16.)], crop=(32., 32.), picture=(32, 32))
    x = S.clip_frames(tmp_path/'long.mkv', clip, 10, (32, 32)).mean((1, 2, 3))
    assert np.abs(x - v[210:240].mean((1, 2, 3))).max() < 4
    assert np.abs(S.media_sound(tmp_path/'long.mkv', 21., 3*S.RATE) - a[21*S.RATE:24*S.RATE]).max() < 1e-3

def test_a_phone_that_records_sideways(tmp_path):
    "Pictures are turned as their metadata says."
    import av
    from av.bitstream import BitStreamFilterContext
    face = drawn_face(128)
    with av.open(str(tmp_path/'a.h264'), 'w') as out:
        v = out.add_stream('libx264', rate=30); v.height, v.width, v.pix_fmt = 128, 128, 'yuv420p'
        turn = BitStreamFilterContext('h264_metadata=display_orientation=insert:rotate=90', v)
        for i in range(3):
            f = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(face, -1)), format='rgb24'); f.pts = i
            for p in v.encode(f): out.mux(turn.filter(p))
        for p in v.encode(): out.mux(turn.filter(p))
    with av.open(str(tmp_path/'a.h264')) as src: shown = S.upright(next(src.decode(video=0)))
    assert np.abs(shown.astype(float) - face).mean() < 8

def test_real_recordings(tmp_path):
    "Five talkers of GRID are read; everything else in the folder is refused with its reason."
    if not REAL.is_dir(): pytest.skip(f'no real recordings at {REAL}')
    report = S.pack(REAL, tmp_path/'out', fps=25, size=128, language='en', licence='CC BY 4.0', progress=False)
    rows = {r['file']: r for r in report['files']}
    assert {f for f, r in rows.items() if r['clips']} == {f for f in rows if f.startswith('grid_')} and report['clips'] == 5
    assert all(r['clips'] or r['reason'] for r in rows.values())
    import av
    for s in S.Shards(tmp_path/'out'):
        path = REAL/s.meta['source']
        assert s.video.shape == (75, 128, 128, 3) and len(s.audio) == 48000 and s.meta['start'] == 0
        # sound: the loudness of an independent decoding, per millisecond, fits best with no shift
        with av.open(str(path)) as src: raw = np.concatenate([f.to_ndarray().mean(0) for f in src.decode(audio=0)])
        a, b = np.abs(raw), np.abs(s.audio)
        ea, eb = (np.array([x[int(i*k):int((i+10)*k)].mean() for i in range(2900)]) for x, k in ((a, 44.1), (b, 16)))
        lags = range(-20, 21); r = [np.corrcoef(ea[50:-50], np.roll(eb, l)[50:-50])[0, 1] for l in lags]
        assert abs(lags[int(np.argmax(r))]) <= 1 and max(r) > .99
        # picture: frame i of the clip is source frame i, cropped
        with av.open(str(path)) as src: frames = [f.to_ndarray(format='rgb24') for f in src.decode(video=0)]
        c = S.survey(path, 25, (128, 128))['clips'][0]; t, x, y = np.array(c['camera']).T; at = (np.arange(75) + .5)/25
        ref = np.stack([S.crop_frame(f, (np.interp(a, t, x), np.interp(a, t, y)), c['crop'], c['picture'], (128, 128)) for f, a in zip(frames, at, strict=True)])
        assert (S.clip_frames(path, c, 25, (128, 128)) == ref).all() and 10*math.log10(255**2/((s.video.astype(float) - ref)**2).mean()) > 36
        assert S.find_face(s.video[37])[2] > 64                                           # more than half of the height

@pytest.mark.parametrize('rate, fps', [(29.97, 12.5), (25, 25), (12.5, 25), (30, 24)])
def test_streaming_cut_picks_the_frames_of_the_rule(monkeypatch, rate, fps):
    "`clip_frames` decodes once and never looks back, yet takes the frames that `pick_frames` names."
    class Frame(np.ndarray): pass
    def source(path, kind, start):
        for k in range(200):
            f = np.full((2, 2, 3), k, np.uint8).view(Frame); f.time = k/rate
            if f.time >= start - 1: yield f
    monkeypatch.setattr(S, 'media_frames', source)
    monkeypatch.setattr(S, 'crop_frame', lambda frame, *a: np.asarray(frame))
    clip = dict(frames=20, start=1.3, camera=[(0, 0, 0), (9, 0, 0)], crop=None, picture=None)
    got = S.clip_frames(Path('x'), clip, fps, (2, 2))[:, 0, 0, 0]
    assert got.tolist() == S.pick_frames(np.arange(200)/rate, 1.3, 20, fps).tolist()
