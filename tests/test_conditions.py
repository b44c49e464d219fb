"What the pages on conditions do not teach: real recordings, every format, an hour of sound, broken files, batches of streams of different age"
import dataclasses, importlib.util, json, math, os, resource, shutil, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from midas_ref.config import AudioConfig, TextConfig, preset
from midas_ref.streaming import stack, unstack
from midas_ref.conditions import audio as A, pose as P, projector as J, text as T

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get('MIDAS_REAL', ROOT.parent/'shared'/'real'))
SPEECH = ('grid_bbaf2n.mpg', 'grid_lbax4n.mpg', 'grid_lrwp9a.mpg', 'grid_pwij3p.mpg', 'grid_sbia1a.mpg', 'lr_198-209-0000.ogg', 'fw_stereo_diarization.wav', 'tc_nasa_13013.mp4')
real = pytest.mark.skipif(not REAL.is_dir(), reason=f'no real recordings at {REAL}')
synthesiser = pytest.mark.skipif(importlib.util.find_spec('espeakng_loader') is None, reason="espeak-ng is not installed (pip install 'midas_ref[data]')")
pytest.importorskip('av'); soundfile = pytest.importorskip('soundfile')
SMALL = dataclasses.replace(AudioConfig(), mel=80, width=64, layers=2, heads=2, ffn=128, codes=256)
TINY = preset('tiny').audio

@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0); threads = torch.get_num_threads(); torch.set_num_threads(1)
    with torch.no_grad(): yield
    torch.set_num_threads(threads)

def minute():
    "All real speech, one after the other, repeated to 60 s; the samples of this project where there is none."
    x = np.concatenate([A.load_audio(f) for f in ([REAL/f for f in SPEECH] if REAL.is_dir() else sorted((ROOT/'data_samples'/'speech').glob('*.flac')))])
    return torch.tensor(np.resize(x, 960000), dtype=torch.float32)[None]

def tokenizer(cfg, x):
    "Random weights, with a codebook that lies on the hidden vectors of `x`."
    torch.manual_seed(1)
    m = A.WhisperVQ(cfg).eval()
    A.seed_codes(m, m.features(x[:, :x.shape[1]//7680*7680])[0])
    return m

WEIGHTS = ROOT/'data_samples'/'weights'/'audio.safetensors'

def trained(): return A.trained_audio(WEIGHTS)

def plan(total, sizes):
    out = []
    while sum(out) < total: out.append(min(sizes[len(out) % len(sizes)], total - sum(out)))
    return out

# ---- loading

@pytest.mark.parametrize('rate', [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize('ext,sub', [('wav', 'PCM_16'), ('wav', 'PCM_24'), ('wav', 'PCM_32'), ('wav', 'PCM_U8'), ('wav', 'FLOAT'), ('wav', 'DOUBLE'), ('flac', 'PCM_16'), ('ogg', 'VORBIS'), ('mp3', None)])
def test_every_format_and_rate(tmp_path, ext, sub, rate):
    if ext == 'mp3' and rate > 48000: pytest.skip('mp3 ends at 48 kHz')
    t = np.arange(int(.8*rate))/rate
    tone = (.5*np.sin(2*np.pi*440*t)*(t > .2)).astype(np.float32)
    want = .5*np.sin(2*np.pi*440*np.arange(12800)/16000)*(np.arange(12800)/16000 > .2)
    for channels in (1, 2):
        soundfile.write(tmp_path/f'x.{ext}', tone if channels == 1 else np.stack([tone, tone], 1), rate, sub)
        y = A.load_audio(tmp_path/f'x.{ext}')
        assert y.dtype == np.float32 and y.ndim == 1 and abs(len(y) - 12800) < (3200 if ext == 'mp3' else 200)
        n = min(len(y), 12000)
        assert np.corrcoef(y[:n], want[:n])[0, 1] > .99          # in place: half a period of delay would make it negative

@pytest.mark.parametrize('rate', [8000, 11025, 22050, 24000, 32000, 44100, 48000, 88200, 96000])
def test_resampling_does_not_delay(rate):
    x = np.zeros(rate, np.float32); x[rate//2] = 1
    y = A.to_rate(x, rate)
    assert len(y) == 16000 and abs(int(np.abs(y).argmax()) - 8000) <= 1
    t = np.arange(3*rate)/rate
    y = A.to_rate(np.sin(2*np.pi*700*t).astype(np.float32), rate)
    assert np.abs(y - np.sin(2*np.pi*700*np.arange(48000)/16000))[500:-500].max() < 2e-3

def test_long_input_in_pieces_equals_one_piece():
    x = np.random.default_rng(0).normal(0, .1, 200001).astype(np.float32)
    a, b = A.to_rate(x, 44100), A.to_rate(x[:65536], 44100)
    assert np.abs(a[:23000] - b[:23000]).max() < 1e-6

@real
@pytest.mark.parametrize('file', SPEECH)
def test_real_recordings_load(file):
    y = A.load_audio(REAL/file)
    assert y.dtype == np.float32 and 2.8 < len(y)/16000 < 15 and .01 < np.abs(y).max() <= 1.01

@real
def test_channels_are_chosen():
    f = REAL/'fw_stereo_diarization.wav'
    a, b, both = A.load_audio(f, channel=0), A.load_audio(f, channel=1), A.load_audio(f)
    assert np.abs((a + b)/2 - both).max() < 1e-4 and np.abs(a - b).max() > .01
    with pytest.raises(ValueError, match='accepts 0 to 1'): A.load_audio(f, channel=2)

@real
def test_sound_of_a_video_starts_with_its_picture():
    import av
    f = REAL/SPEECH[0]
    with av.open(str(f)) as c: video = float(c.streams.video[0].duration*c.streams.video[0].time_base)
    assert abs(len(A.load_audio(f))/16000 - video) < .15

def test_broken_files(tmp_path):
    (tmp_path/'x.wav').write_bytes(b'RIFF nonsense'); (tmp_path/'x.txt').write_text('hello')
    for f in ('x.wav', 'x.txt'):
        with pytest.raises(ValueError, match='cannot be read as audio'): A.load_audio(tmp_path/f)
    with pytest.raises(FileNotFoundError, match='is not a file'): A.load_audio(tmp_path/'none.wav')
    soundfile.write(tmp_path/'e.wav', np.zeros((0, 1)), 16000)
    with pytest.raises(ValueError, match='empty'): A.load_audio(tmp_path/'e.wav')
    import av
    with av.open(str(tmp_path/'mute.mp4'), 'w') as c:
        s = c.add_stream('libx264', rate=25); s.width = s.height = 64; s.pix_fmt = 'yuv420p'
        for p in [*s.encode(av.VideoFrame(64, 64, 'yuv420p')), *s.encode(None)]: c.mux(p)
    with pytest.raises(ValueError, match='has no sound'): A.load_audio(tmp_path/'mute.mp4')

@pytest.mark.parametrize('x,rate,message', [
    (np.zeros(0, np.float32), 16000, 'empty'), (np.array([0, np.nan]), 16000, '1 of 2 samples are NaN or infinite'), (np.array([np.inf, np.inf, 0]), 16000, '2 of 3'),
    (np.zeros((2, 2, 2)), 16000, r'shape \(2, 2, 2\)'), (np.zeros((2, 9)), 16000, 'one channel'), (np.zeros(5, bool), 16000, 'bool'), (np.array(['a']), 16000, '<U1'),
    (np.zeros(5, np.int64), 16000, 'int64'), (np.zeros(5), 48000, r'to_rate\(samples, 48000\)'), (np.full(5, 20000.), 16000, 'divide them by 32768')])
def test_arrays_that_are_refused(x, rate, message):
    with pytest.raises(ValueError, match=message): A.check_audio(x, rate)

@pytest.mark.parametrize('x,message', [
    (np.zeros((1, 1280)), 'float tensor'), (torch.zeros(1, 1280, dtype=torch.int16), 'int16'), (torch.zeros(1280), r'\(b, s\)'), (torch.zeros(1, 1, 1280), r'\(b, s\)'),
    (torch.zeros(1, 0), 'empty'), (torch.full((1, 1280), math.nan), 'NaN')])
def test_tensors_that_the_tokenizer_refuses(x, message):
    m = A.WhisperVQ(TINY).eval(); s = m.init_state()
    for state in (None, s):
        with pytest.raises(ValueError, match=message): m(x, state)
    assert m(torch.zeros(1, 1280), s).ids.shape == (1, 1)         # the stream is none the worse

# ---- log-mel

@pytest.mark.parametrize('bands', [80, 128])
def test_published_mel_equals_whispers(bands):
    from transformers import WhisperFeatureExtractor
    x = minute()[0, :161234].numpy()
    for n in (400, 1280, 8000, 8001, 161234):
        ref = torch.tensor(WhisperFeatureExtractor(feature_size=bands)(x[-n:], sampling_rate=16000, padding='longest').input_features[0]).T
        got = A.LogMel(bands, 'published')(torch.tensor(x[-n:])[None])[0]
        assert got.shape[0] == n//160 and (got - ref[:len(got)]).abs().max() < 1e-5

@pytest.mark.parametrize('sizes', [[1280], [7680], [1, 2, 3], [159], [161], [5000, 7, 160, 399]])
def test_causal_mel_streams(sizes):
    x, m = minute()[:, 400000:406000], A.Alone(A.LogMel(80))
    s = m.init_state()
    assert (torch.cat([m(p, s) for p in x.split(plan(x.shape[1], sizes), 1)], 1) - m(x)).abs().max() < 1e-5

def test_modes_are_not_mixed():
    m = A.WhisperVQ(TINY).eval()
    with pytest.raises(ValueError, match="works on 'causal' ones"): m.hidden(A.LogMel(80, 'published')(torch.zeros(1, 1280)), 'published')
    whole = A.Alone(A.LogMel(80, 'published'))
    with pytest.raises(ValueError, match='needs the whole clip'): whole(torch.zeros(1, 1280), whole.init_state())
    with pytest.raises(ValueError, match="accepted: 'causal' or 'published'"): A.LogMel(80, 'both')

# ---- the tokenizer

def test_published_size():
    with torch.device('meta'): m = A.WhisperVQ(AudioConfig())
    assert sum(p.numel() for p in m.parameters()) == 343_599_360 and len(m.state_dict()) == 249
    assert sum(m.state_dict()[k].numel() for k in ('ema_count', 'ema_weight')) == 20_987_904

@pytest.mark.parametrize('cfg', [TINY, SMALL], ids=['tiny', 'windowed'])
def test_token_counts(cfg):
    m = A.WhisperVQ(cfg).eval()
    for seconds, n in ((.08, 1), (.48, 6), (.5, 7), (1, 13), (4, 50), (5, 63)):
        x = torch.randn(1, round(16000*seconds))*.1
        assert m(x).ids.shape == (1, n) == (m.clip(x).ids.shape if cfg is SMALL else (1, n)) and m(x).vectors.shape == (1, n, cfg.width)
        assert A.stream_tokens(m, x, [x.shape[1]]).shape == (1, n)

def test_encoder_equals_whispers():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder
    ref = WhisperEncoder(WhisperConfig(d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128, num_mel_bins=80)).eval()
    ref.layer_norm = nn.Identity()
    for p in ref.parameters(): p.normal_(0, .2)
    m = A.WhisperVQ(dataclasses.replace(SMALL, block=1500)).eval()
    m.load_state_dict(ref.state_dict(), strict=False)
    m.conv1.ahead = m.conv2.ahead = 1
    x = torch.randn(2, 3000, 80)
    want = ref(x.mT).last_hidden_state.unflatten(1, (-1, 4)).mean(2)
    assert (m.hidden(x, 'published') - want).abs().max() < 1e-5*want.abs().max()

def test_quantiser_equals_brute_force():
    b = A.Codebook(1024, 128).eval()
    x = torch.randn(4, 500, 128)
    assert torch.equal(b.nearest(x), torch.cdist(x.double(), b.codebook.weight.double()).argmin(-1))

@pytest.mark.parametrize('n,block,past', [(21, 4, None), (24, 4, 8), (24, 4, 4), (450, 200, None), (9, 200, None)])
def test_block_mask_equals_loops(n, block, past):
    got = A.block_mask(n, n, block, past)
    for q, k in np.ndindex(n, n):
        assert bool(got[q, k]) == ((q//block == k//block or k < q) and (past is None or q//block*block - k <= past))
    if n % block == 0: assert torch.equal(A.block_mask(block, n, block, past), got[-block:])

def test_half_precision_runs_and_keeps_its_mel():
    x = minute()[:, :64000]; m = tokenizer(TINY, x); want = m(x).ids
    m = m.to(torch.bfloat16); s = m.init_state()
    got = torch.cat([m(p, s).ids for p in x.split(7680, 1)] + [m.flush(s).ids], 1)
    assert m.mel.filters.dtype == torch.float32 and got.shape == want.shape and (got == want).float().mean() > .5

def test_long_clips_in_pieces_equal_one_pass():
    x = minute()[:, :1280*300]; m = tokenizer(TINY, x); pieces = m.features(x)
    m.long = 10**9
    assert (m.features(x) - pieces).abs().max() < 1e-4

def test_moving_averages_equal_a_loop():
    b = A.Codebook(6, 3).train(); w, count, total = b.codebook.weight.clone(), torch.ones(6), b.codebook.weight.clone()
    for _ in range(5):
        x = torch.randn(1, 40, 3)
        ids = torch.cdist(x[0], w).argmin(1)
        got, v, loss = b.quantise(x)
        assert torch.equal(got[0], ids) and (v[0] - w[ids]).abs().max() < 1e-6 and abs(loss - 2.5*(x[0] - w[ids]).square().mean()) < 1e-5
        for k in range(6): count[k], total[k] = .99*count[k] + .01*(ids == k).sum(), .99*total[k] + .01*x[0][ids == k].sum(0)
        w = total/((count + 1e-5)/(count.sum() + 6e-5)*count.sum())[:, None]
        assert (b.codebook.weight - w).abs().max() < 1e-5

def test_a_seeded_codebook_stays_where_it_is():
    b = A.Codebook(32, 4).train(); x = torch.randn(4000, 4); A.seed_codes(b, x); w = b.codebook.weight.clone()
    for _ in range(50): b.quantise(x[None])
    assert (b.codebook.weight - w).norm(dim=1).max() < .5*w.norm(dim=1).mean() and len(b.nearest(x).unique()) == 32

def test_straight_through():
    b = A.Codebook(8, 4).train()
    with torch.enable_grad():
        x = torch.randn(1, 5, 4, requires_grad=True)
        _, v, _ = b.quantise(x); (g,) = torch.autograd.grad((v*torch.arange(4.)).sum(), x)
    assert torch.equal(g[0], torch.arange(4.).expand(5, 4)) and not b.codebook.weight.requires_grad

def test_dead_entries_restart():
    b = A.Codebook(16, 2).train(); b.codebook.weight[1:] += 100; b.ema_weight.copy_(b.codebook.weight)
    for _ in range(205): b.quantise(torch.randn(1, 64, 2))
    assert b.codebook.weight.abs().max() < 10

@pytest.mark.parametrize('make,plans', [
    (lambda x: tokenizer(TINY, x), ([7680],)), (lambda x: trained()[0], ([1280], [2560], [3840], [7680], [1, 5000, 1279, 400], [44100, 13])),
    (lambda x: tokenizer(SMALL, x), ([1280], [7680], [9001, 300]))], ids=['tiny', 'trained', 'windowed'])
def test_a_minute_of_real_speech_streams(make, plans):
    x = minute(); m = make(x)
    whole = m(x).ids
    assert whole.shape == (1, 750) and len(whole.unique()) > .2*m.cfg.codes
    for sizes in plans: assert torch.equal(A.stream_tokens(m, x, plan(960000, sizes)), whole), sizes

@pytest.mark.parametrize('cfg', [TINY, SMALL], ids=['tiny', 'windowed'])
def test_the_future_does_not_change_the_past(cfg):
    x = minute()[:, :160000]; m = tokenizer(cfg, x); y = x.clone(); n = 1280*m.cfg.hop_tokens
    x, y = x[:, :12*n], y[:, :12*n]; y[:, 7*n:] = torch.randn(1, 5*n)
    a, b = m.features(x), m.features(y)
    assert torch.equal(a[:, :7*m.cfg.hop_tokens], b[:, :7*m.cfg.hop_tokens]) and not torch.equal(a, b)

def test_windows_are_the_left_context_rule():
    "Each chunk is what encoding 4 s of sound that end with it gives."
    x = minute()[:, 100000:100000 + 7680*12]; m = A.WhisperVQ(SMALL).eval()
    h = m.features(x)
    for chunk in (8, 11):
        end = 7680*(chunk + 1)
        one = m.hidden(m.mel(x[:, end - 64000:end]), 'published')[:, -6:]
        assert (h[:, 6*chunk:6*chunk + 6] - one).abs().max() < 1e-5

@pytest.mark.parametrize('cfg', [TINY, SMALL], ids=['tiny', 'windowed'])
def test_streams_of_different_age_run_as_a_batch(cfg):
    x = minute(); m = tokenizer(cfg, x); n = 7680
    a, b = m.init_state(), m.init_state()
    for i in range(4): m(x[:, i*n:(i + 1)*n], a)
    both = stack([a, b])
    p, q = x[:, 4*n:8*n], x[:, 300000:300000 + 4*n]
    got = torch.cat([m(torch.cat([u, v]), both).ids for u, v in zip(p.split(n, 1), q.split(n, 1))], 1)
    want = [torch.cat([m(u, s).ids for u in t.split(n, 1)], 1)[0] for t, s in ((p, a), (q, b))]
    assert torch.equal(got, torch.stack(want))
    one = unstack(both)[1]
    assert torch.equal(m(x[:, :n], one).ids, m(x[:, :n], b).ids)

def test_rows_that_stopped_within_a_token_are_refused():
    m = A.WhisperVQ(TINY).eval(); a, b = m.init_state(), m.init_state()
    m(torch.zeros(1, 700), a); m(torch.zeros(1, 1280), b)
    with pytest.raises(ValueError, match='feed whole groups'): m(torch.zeros(2, 1280), stack([a, b]))

def test_an_hour_needs_no_more_memory_and_no_more_precision():
    m, _ = trained(); piece = minute()[:, :1280*60]; s = m.init_state()
    m(piece, s); held, before = s.nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(749): m(piece, s)
    assert int(s.seen) == 3600*16000 and s.nbytes == held < 1e6 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000
    fresh = m.init_state()
    for _ in range(5): m(piece, fresh)                            # 24 s, longer than the layers look back
    assert torch.equal(m(piece, s).vectors, m(piece, fresh).vectors)

def test_trained_tokens_do_not_know_how_they_were_fed():
    "Pieces of 1, 2, 3 and 6 tokens, in a voice that goes on from an older stream; code vectors as well as numbers."
    m, _ = trained(); x = minute()[:, 200000:200000 + 1280*60]; old = m.init_state(); m(minute()[:, :1280*100], old)
    got = [[m(p, s) for p in x.split(1280*n, 1)] for n in (1, 2, 3, 6) for s in [unstack(stack([old]))[0]]]
    ids, vectors = ([torch.cat([c[i] for c in g], 1) for g in got] for i in (0, 1))
    assert all(torch.equal(i, ids[0]) for i in ids) and all(torch.equal(v, vectors[0]) for v in vectors) and not torch.equal(ids[0], m(x).ids)

def test_flush_completes_the_last_token():
    x = minute()[:, :1280*5 + 333]; m = tokenizer(TINY, minute()[:, :160000]); s = m.init_state()
    ids = torch.cat([m(x, s).ids, m.flush(s).ids], 1)
    assert torch.equal(ids, m(x).ids) and ids.shape == (1, 6)
    s = m.init_state(); m(x[:, :1280], s); assert m.flush(s).ids.shape == (1, 0)

# ---- weights

SIZES = dict(num_mel_bins=80, d_model=64, quantize_position=2, encoder_attention_heads=2, encoder_ffn_dim=128, quantize_vocab_size=256, quantize_causal_block_size=200)

def test_published_layout_loads_strictly(tmp_path):
    from safetensors.torch import save_file
    m, x = A.WhisperVQ(SMALL).eval(), torch.randn(1, 20000)*.1
    w = {f'model.encoder.{k}': v for k, v in m.state_dict().items()}
    w |= {'model.encoder.layer_norm.weight': torch.ones(64), 'model.encoder.layer_norm.bias': torch.ones(64), 'model.encoder.layers.31.fc1.weight': torch.ones(2, 2), 'model.decoder.embed_tokens.weight': torch.ones(2, 2)}
    names = sorted(w); (tmp_path/'config.json').write_text(json.dumps(SIZES))
    for i, part in enumerate((names[::2], names[1::2])): save_file({k: w[k] for k in part}, str(tmp_path/f'model-0000{i + 1}-of-00002.safetensors'))
    got = A.WhisperVQ.from_pretrained(tmp_path)
    assert torch.equal(got(x).ids, m(x).ids) and torch.equal(got.clip(x).vectors, m.clip(x).vectors)
    assert {k: v.shape for k, v in got.state_dict().items()} == {k: v.shape for k, v in m.state_dict().items()}
    broken = {k: v for k, v in w.items() if k != 'model.encoder.layers.1.fc2.bias'} | {'model.encoder.extra': torch.ones(1)}
    for f in tmp_path.glob('*.safetensors'): f.unlink()
    save_file(broken, str(tmp_path/'model.safetensors'))
    with pytest.raises(ValueError, match=r"missing \['layers.1.fc2.bias'\].*extra"): A.WhisperVQ.from_pretrained(tmp_path)

def test_missing_and_foreign_checkpoints(tmp_path):
    from safetensors.torch import save_file
    with pytest.raises(FileNotFoundError, match='does not exist'): A.WhisperVQ.from_pretrained(tmp_path/'none.safetensors')
    with pytest.raises(FileNotFoundError, match='holds no .safetensors'): A.WhisperVQ.from_pretrained(tmp_path)
    save_file({'a': torch.ones(1)}, str(tmp_path/'foreign.safetensors'))
    with pytest.raises(ValueError, match='does not say the sizes'): A.WhisperVQ.from_pretrained(tmp_path/'foreign.safetensors')
    with pytest.raises(ValueError, match='does not say the sizes'): A.WhisperVQ.from_pretrained(tmp_path)
    (tmp_path/'bad.safetensors').write_bytes(b'\x00'*100)
    with pytest.raises(ValueError, match='not a safetensors file'): A.WhisperVQ.from_pretrained(tmp_path/'bad.safetensors')

def test_own_weights_round_trip(tmp_path):
    m, h, x = A.WhisperVQ(TINY).half().float().eval(), A.AudioHeads(128).half().float(), torch.randn(1, 20000)*.1
    A.save_audio(tmp_path/'w.safetensors', m, h)
    got, w = A.load_audio_weights(tmp_path/'w.safetensors')
    again = A.AudioHeads(128); again.load_state_dict(w)
    assert got.cfg == m.cfg and torch.equal(got(x).ids, m(x).ids) and torch.equal(again(got(x).vectors)[2], h(m(x).vectors)[2])
    assert (tmp_path/'w.safetensors').stat().st_size < 3e6 and not got.training

@synthesiser
def test_training_learns_and_nothing_held_out_is_heard():
    todo = A.speech_jobs(300, 3)
    held = {j.voice for split in ('voices', 'languages') for j in A.speech_jobs(300, 4, split)}
    assert not held & {j.voice for j in todo} and {j.lang for j in A.speech_jobs(99, 5, 'languages')} == set(A.HELD_OUT_LANGUAGES)
    assert not {j.lang for j in todo} & set(A.HELD_OUT_LANGUAGES)
    data = A.speech_set(todo[:12])
    with torch.enable_grad():
        m, h = A.WhisperVQ(TINY), A.AudioHeads(128)
        notes = A.train_audio(m, h, data, steps=40, batch=3, seconds=1.6, lr=3e-3, soft=.8, every=1)
    soft = [n['loss'] for n in notes if not n['codes']]
    assert np.mean(soft[-5:]) < .85*np.mean(soft[:5]) and notes[-1]['codes'] > 0 and not m.training
    with pytest.raises(ValueError, match='give steps or minutes'): A.train_audio(m, h, data)
    book = m.codebook.weight.clone()
    with torch.enable_grad(): more = A.train_audio(m, h, data, steps=3, batch=3, seconds=1.6, lr=1e-6, every=1, going_on=True)
    assert more[0]['codes'] > 0 and (m.codebook.weight - book).norm() < .2*book.norm()                # not placed anew

RANKS = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
from midas_ref.codec.train import join_ranks, rank
from midas_ref.conditions import audio as A
from midas_ref.config import preset
torch.set_num_threads(1); join_ranks()
g, n = torch.Generator().manual_seed(rank()), 120
data = A.SpeechSet((torch.randn(n*1280, generator=g)*3000).short(), *(torch.randint(k, (2*n,), generator=g).byte() for k in (15, 100)), torch.rand(2*n, 9, generator=g).half(), torch.zeros(n).byte())
torch.manual_seed(7 + rank())                                             # weights differ until they are made equal
m, h = A.WhisperVQ(preset('tiny').audio), A.AudioHeads(128)
A.Codebook.every = 2                                                      # dead codes start again within this run
notes = A.train_audio(m, h, data, steps=6, batch=2, seconds=1.6, soft=.3, every=1)
torch.save(dict(loss=[x['loss'] for x in notes], model=m.state_dict(), heads=h.state_dict()), f'{sys.argv[2]}/rank{rank()}.pt')
'''

def test_processes_train_one_tokenizer(tmp_path):
    (tmp_path/'ranks.py').write_text(RANKS)
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone', str(tmp_path/'ranks.py'), str(ROOT), str(tmp_path)],
                         capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert run.returncode == 0, run.stderr[-6000:]
    a, b = (torch.load(tmp_path/f'rank{k}.pt', weights_only=True) for k in (0, 1))
    assert a['loss'] != b['loss']                                         # sounds of their own
    for part in ('model', 'heads'): assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])

def test_report_of_the_bundled_weights():
    report = json.loads(WEIGHTS.with_suffix('.json').read_text())
    assert set(report['languages']) - {'all', 'closures'} == set(A.HELD_OUT_LANGUAGES) and set(report['voices']) - {'all', 'closures'} == set(A.TRAIN_LANGUAGES)
    assert all(r['opening'] >= .85 for k, r in report['voices'].items() if k != 'closures') and all(r['opening'] >= .8 for k, r in report['languages'].items() if k != 'closures')
    assert report['voices']['all']['used'] >= .6 and report['languages']['all']['used'] >= .6

def test_foreign_heads(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file
    m = A.WhisperVQ(TINY); A.save_audio(tmp_path/'w.safetensors', m)
    with pytest.raises(ValueError, match='a tokenizer without heads'): A.trained_audio(tmp_path/'w.safetensors')
    with safe_open(str(WEIGHTS), 'pt') as f: w, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    save_file(w, str(tmp_path/'w.safetensors'), {**meta, 'labels': meta['labels'].replace('"FF"', '"GG"')})
    with pytest.raises(ValueError, match='other visemes'): A.trained_audio(tmp_path/'w.safetensors')

@synthesiser
@pytest.mark.parametrize('split,least', [('voices', .85), ('languages', .8)])
def test_bundled_weights_know_mouths(split, least):
    m, h = trained()
    r = A.audio_report(m, h, A.speech_set(A.speech_jobs(90, 555, split)))
    assert r['all']['opening'] >= least and r['all']['used'] >= .3, r        # few minutes cannot use every entry

def test_closures():
    o = np.full(50, .5); o[10:12] = 0                                       # 0.40 to 0.48 s
    assert A.closures(o, [(.4, .48)]) == 1 and A.closures(o, [(1., 1.1)]) == 0 and A.closures(o, [(.4, .48), (1., 1.1)]) == .5 and math.isnan(A.closures(o, []))
    assert A.runs(torch.tensor([0, 1, 1, 0, 1]), {1}) == [(.04, .12), (.16, .2)]

# ---- alignment

def test_warping_equals_every_way():
    from itertools import product
    rng = np.random.default_rng(0)
    for t, n in ((1, 1), (2, 3), *[(5, 2), (6, 6), (7, 11)]*10):
        cost = rng.random((t, n)); path = A.follow(cost, .3)
        price = lambda p: cost[range(t), p].sum() + .3*(np.diff(p) != 1).sum()
        ways = [p for s in product(range(3), repeat=t - 1) if (p := np.cumsum([0, *s]))[-1] == n - 1]
        assert path[0] == 0 and path[-1] == n - 1 and set(np.diff(path)) <= {0, 1, 2} and abs(price(path) - min(map(price, ways))) < 1e-9
    for shape in ((3, 6), (3, 0)):
        with pytest.raises(ValueError, match='twice as long'): A.follow(np.zeros(shape))

def test_grid_names():
    assert A.grid_text('id2_vcd_swwp2s.mpg') == 'set white with p two soon' and A.grid_text('/x/pgbyzn.wav') == 'place green by y zero now'
    for n in ('lr_198-209-0000.ogg', 'bwaw2n.mpg', 'bbaf2.mpg', 'hello!.wav', 'xbaf2n.mpg'): assert A.grid_text(n) == ''

@synthesiser
@pytest.mark.parametrize('voice', ['Alex', pytest.param('slt', marks=pytest.mark.skipif(not shutil.which('flite'), reason='flite is not installed')),
                                   pytest.param('awb', marks=pytest.mark.skipif(not shutil.which('flite'), reason='flite is not installed'))])
def test_alignment_finds_known_lips(voice):
    from midas_ref.data.speech import augment, base, flite, join, synth
    lips = lambda s: np.array([(a + b)/2 for a, b, p in s.phonemes if base(p)[:1] in ('p', 'b', 'm')])
    errors = []
    for i, n in enumerate(('lbax4n', 'pwij3p', 'sbim1s', 'lrwp9n')):
        text = A.grid_text(n)
        said = synth(text, 'en-gb', voice, 165) if voice == 'Alex' else flite(text, voice)
        said = augment(join([said], [.5, .4]), i)
        got = A.align(said.samples, text)
        assert got.phonemes[0][0] == 0 and got.phonemes[-1][1] == said.duration and all(a[1] == b[0] and a[0] <= a[1] for a, b in zip(got.phonemes, got.phonemes[1:]))
        errors += list(np.abs(lips(got) - lips(said)))
    assert np.median(errors) < (.02 if voice == 'Alex' else .05) and np.quantile(errors, .8) < .08, errors

@synthesiser
def test_scores_of_truth_and_of_a_mute_mouth():
    from midas_ref.data.speech import join, mouth_track, phoneme_at, synth, viseme
    said = join([synth('Maybe Papa put my paper up there.', 'en-us')], [.4, .4]); when = (np.arange(int(said.duration*25)) + .5)/25
    o, v = mouth_track(said, when)[:, 1], np.array([A.VISEMES.index(viseme(p)) for p in phoneme_at(said, when)])
    best = A.lip_score(o, v, said); d = A.pool_scores([best])
    assert d['closed'] == 1 and d['vowels'] == 0 and d['r'] > .999 and d['visemes'] == 1 and d['luck'] < .3 and d['chance'] < .9 and best['first'] == [True, *[False]*(d['sounds'] - 1)]
    shut, wide = (A.pool_scores([A.lip_score(np.full(len(o), c), v*0, said)]) for c in (0., .8))
    assert shut['closed'] == shut['chance'] == shut['vowels'] == 1 and wide['closed'] == wide['chance'] == wide['vowels'] == 0 and math.isnan(shut['r'])

@real
@synthesiser
def test_real_talkers():
    "Seven sounds decide little; the frames do: well above chance, far below synthesised speech."
    scores = A.grid_scores(REAL, *trained()); d = A.pool_scores([s for _, s in scores.values()])
    assert len(scores) == 5 and d['sounds'] == 7 and d['closed'] >= .6 and d['r'] > .35 and d['visemes'] > 3*d['luck']
    assert len(A.grid_table(scores).splitlines()) == 7

def test_folders_without_grid(tmp_path):
    with pytest.raises(FileNotFoundError, match='is not a folder'): A.grid_scores(tmp_path/'no', None, None)
    (tmp_path/'birthday.mpg').write_bytes(b'x')
    with pytest.raises(ValueError, match='no recording of the GRID corpus'): A.grid_scores(tmp_path, None, None)

# ---- pose

@real
def test_real_motion_capture():
    j = P.read_bvh(REAL/'bvh_wave_hello.bvh')
    assert j.points.shape[0] == 839 and j.points.shape[1] == len(j.names) and abs(j.fps - 120) < 1 and torch.isfinite(j.points).all()
    head, foot = (j.points[:, j.names.index(n)] for n in ('Head', 'LeftFoot'))
    assert ((head - foot).norm(dim=-1) > 20).all()                          # bones keep their length, heads stay above feet
    bone = (j.points[:, j.names.index('LeftArm')] - j.points[:, j.names.index('LeftForeArm')]).norm(dim=-1)
    assert bone.std() < 1e-3*bone.mean()
    slow = P.at_fps(j, 12.5)
    p = P.select(slow.points, slow.names, ('Head', 'LeftShoulder', 'RightShoulder'))/50
    v = P.JointVelocity(3, 3)(p[None])
    assert v.known[:, 1:].all() and not v.known[:, 0].any() and .01 < v.velocity.abs().max() < 10
    assert P.PoseEncoder(3, 3)(*v).shape == (1, 10*p.shape[0], 64)

def test_damaged_motion_capture(tmp_path):
    (tmp_path/'a.bvh').write_text('hello'); (tmp_path/'b.bvh').write_text('HIERARCHY ROOT a { OFFSET 0 0 0 CHANNELS 1 Xrotation End Site { OFFSET 0 1 0 } } MOTION Frames: 2 Frame Time: 0.04 1')
    with pytest.raises(ValueError, match='is not a BVH file'): P.read_bvh(tmp_path/'a.bvh')
    with pytest.raises(ValueError, match='announces 2 frames of 1 numbers but holds 1'): P.read_bvh(tmp_path/'b.bvh')

def test_landmark_files(tmp_path):
    np.save(tmp_path/'a.npy', np.zeros((5, 3, 2))); np.save(tmp_path/'b.npy', np.zeros((5, 3)))
    assert P.read_landmarks(tmp_path/'a.npy').names == ('p0', 'p1', 'p2')
    with pytest.raises(ValueError, match=r'holds an array \(5, 3\)'): P.read_landmarks(tmp_path/'b.npy')
    with pytest.raises(ValueError, match='3 points but 2 names'): P.read_landmarks(tmp_path/'a.npy', ('a', 'b'))
    (tmp_path/'c.csv').write_text('time\n0\n')
    with pytest.raises(ValueError, match='accepted: columns such as'): P.read_landmarks(tmp_path/'c.csv')
    with pytest.raises(ValueError, match='accepted: .npy, .npz or .csv'): P.read_landmarks(tmp_path/'c.txt')

def test_velocities_against_a_loop():
    p, seen = torch.randn(2, 9, 5, 3), torch.rand(2, 9, 5) > .3
    p[0, 4, 1] = math.nan
    m = P.JointVelocity(5, 3, 25.); v, known, _ = m(p, seen)
    for b, t, k in np.ndindex(2, 9, 5):
        ok = t > 0 and all(bool(seen[b, i, k]) and bool(torch.isfinite(p[b, i, k]).all()) for i in (t - 1, t))
        assert bool(known[b, t, k]) == ok
        assert torch.allclose(v[b, t, k], (p[b, t, k] - p[b, t - 1, k])*25 if ok else torch.zeros(3), atol=1e-5)
    s = m.init_state(2); parts = [m(a, q, s) for a, q in zip(p.split([1, 3, 5], 1), seen.split([1, 3, 5], 1))]
    assert torch.equal(torch.cat([x.velocity for x in parts], 1), v) and torch.equal(torch.cat([x.known for x in parts], 1), known)

def test_units_and_rates_agree():
    p = torch.rand(1, 20, 4, 2)*torch.tensor([640., 384.])
    a = P.JointVelocity(4)(P.in_heights(p, 384, 640)).velocity
    b = P.JointVelocity(4)(P.in_heights(p/torch.tensor([640., 384.]), 384, 640, 'normalised')).velocity
    assert (a - b).abs().max() < 1e-4
    path = P.Joints(torch.arange(50.)[:, None, None].expand(50, 1, 2), ('a',), 25.)
    assert abs(P.JointVelocity(1, fps=12.5)(P.at_fps(path, 12.5).points[None]).velocity[0, 5:-1].mean() - 25) < 1e-3

@pytest.mark.parametrize('call,message', [
    (lambda: P.JointVelocity(4)(torch.zeros(1, 2, 5, 2)), r'accepted: \(b, t, 4, 2\)'), (lambda: P.JointVelocity(4)(torch.zeros(1, 2, 4, 3)), r'accepted: \(b, t, 4, 2\)'),
    (lambda: P.JointVelocity(4)(torch.zeros(1, 2, 4, 2), torch.ones(1, 2, dtype=torch.bool)), 'seen has shape'), (lambda: P.JointVelocity(4, 4), 'dims'),
    (lambda: P.in_heights(torch.zeros(4, 5), 1, 1), r'\(..., k, 2\)'), (lambda: P.in_heights(torch.zeros(4, 2), 9, 9, 'cm'), "'pixel' or 'normalised'"),
    (lambda: P.select(torch.zeros(3, 2), ('a', 'b'), ('a',)), '3 keypoints but 2 names'), (lambda: P.PoseEncoder(3)(torch.zeros(1, 1, 3, 3)), r'accepted: \(b, t, 3, 2\)'),
    (lambda: P.PoseEncoder(3)(torch.full((1, 1, 3, 2), math.nan)), 'NaN'), (lambda: P.HeadRig()(torch.zeros(1, 3)), r'accepted: \(b, t, 3\)')])
def test_pose_errors(call, message):
    with pytest.raises(ValueError, match=message): call()

def test_rig_turns_and_stops():
    rig = P.HeadRig(); n = rig.names.index('nose_bridge')
    m = P.turn(torch.randn(20, 3)); assert (m @ m.mT - torch.eye(3)).abs().max() < 1e-5 and (torch.linalg.det(m) - 1).abs().max() < 1e-5
    v = rig(torch.tensor([[[1., 0, 0]], [[0, 1., 0]], [[0, 0, 1.]]]))[:, 0, n]
    assert v[0, 0] > 0 and v[1, 1] < 0 and v[2, 0] > 0                       # right, up, and the top of the head to the right
    held = rig(torch.full((1, 50, 3), 2.)); assert (held[0, 20:] == 0).all() and (held[0, :2, :10].abs().amax(-1) > 0).all()

# ---- text

def test_byte_ids_equal_transformers():
    from transformers import ByT5Tokenizer
    tok = ByT5Tokenizer()
    for t in ('', 'a', 'smiling', 'né', '微笑', '🙂', ' x ', 'a'*63): assert T.byte_ids(t, 64) == tok(t, max_length=64, padding='max_length').input_ids
    for n in range(2, 12):
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); ids = T.byte_ids('né微🙂x', n)
        assert len(ids) == n and bytes(i - 3 for i in ids if i > 2).decode()  in 'né微🙂x'

def test_too_long_text_warns_how_much():
    enc = T.text_encoder(preset('tiny').text)
    with pytest.warns(UserWarning, match="100 bytes and 63 fit; the last 37 are not read"): enc.ids(['y'*100])
    with warnings.catch_warnings(): warnings.simplefilter('error'); enc.ids(['y'*63, ''])

def test_t5_by_folder_equals_transformers(tmp_path):
    from transformers import ByT5Tokenizer
    T.small_t5(64, 2).save_pretrained(tmp_path); ByT5Tokenizer().save_pretrained(tmp_path)
    enc = T.text_encoder(TextConfig(tokens=40, width=64, model=str(tmp_path), layers=2), local_only=True)
    assert not any(p.requires_grad for p in enc.parameters()) and not enc.blank.any()
    texts = ['calm', 'looks tired and sad']
    y, given = enc.encode([*texts, None])
    for i, t in enumerate(texts):
        ref = enc.t5(**ByT5Tokenizer()([t], return_tensors='pt')).last_hidden_state[0]
        assert (y[i, :len(ref)] - ref).abs().max() < 1e-5 and torch.equal(y[i, len(ref):], enc.blank.expand(40 - len(ref), -1))
    assert given.tolist() == [True, True, False]
    with pytest.warns(UserWarning, match='61 tokens and 40 fit; the last 21 are not read'): ids = enc.ids(['z'*60])
    assert ids.shape == (1, 40) and ids[0, -1] == 1
    with pytest.raises(OSError, match="use the preset 'tiny'"): T.text_encoder(TextConfig(model='nobody/nothing'), local_only=True)
    with pytest.raises(ValueError, match='set width=64'): T.text_encoder(TextConfig(model=str(tmp_path)), local_only=True)

# ---- projector

def test_all_subsets_have_one_layout():
    import itertools
    cfg = preset('tiny'); c = J.midas_conditions(cfg).eval(); x = dict(audio=torch.randn(3, 4, 6, 128), pose=torch.randn(3, 4, 60, 64), text=torch.randn(3, 4, 16, 128))
    full = c(x); assert full.shape == (3, 4, 82, cfg.backbone.width) and list(c.spans) == ['audio', 'pose', 'text']
    for n in range(4):
        for kinds in itertools.combinations(x, n):
            y = c({k: x[k] for k in kinds}, lead=(3, 4)); z = c(x, present={k: torch.full((3,), k in kinds) for k in x})
            assert torch.equal(y, z)
            for k, s in c.spans.items(): assert torch.equal(y[..., s, :], full[..., s, :] if k in kinds else c.placeholder[k].expand(3, 4, s.stop - s.start, -1))

def test_gradients_reach_all_and_dropping_repeats():
    c = J.midas_conditions(preset('tiny')); x = dict(audio=torch.randn(64, 6, 128), pose=torch.randn(64, 60, 64), text=torch.randn(64, 16, 128))
    with torch.enable_grad(): y = c(x, generator=torch.Generator().manual_seed(3)); y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in c.parameters())
    assert torch.equal(y, c(x, generator=torch.Generator().manual_seed(3))) and not torch.equal(y, c(x, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(c.eval()(x), c(x))

def test_sure_rows_are_never_dropped_and_the_others_as_before():
    c, x, sure = J.midas_conditions(preset('tiny')), dict(pose=torch.randn(400, 60, 64)), torch.arange(400) % 2 == 0
    missing = lambda **kw: (c(x, generator=torch.Generator().manual_seed(5), **kw)[:, 6] == c.placeholder['pose']).all(-1)
    assert torch.equal(missing(sure=dict(pose=sure)), missing() & ~sure) and missing()[sure].any()
    told = c(x, present=dict(pose=torch.zeros(400, dtype=torch.bool)), sure=dict(pose=sure))                         # what is not there cannot be kept
    assert (told[:, 6:66] == c.placeholder['pose']).all()

def test_presence_reaches_down_to_tokens():
    c = J.midas_conditions(preset('tiny')).eval(); x = {'pose': torch.randn(2, 60, 64)}
    keep = torch.arange(60) < torch.tensor([[40], [0]])
    y, full = c(x, present={'pose': keep}), c(x)
    assert torch.equal(y[0, 6:46], full[0, 6:46]) and torch.equal(y[0, 46:66], c.placeholder['pose'].expand(20, -1)) and torch.equal(y[1, 6:66], c.placeholder['pose'].expand(60, -1))

def test_a_new_signal_leaves_the_others_alone():
    a = J.midas_conditions(preset('tiny')).eval(); b = J.midas_conditions(preset('tiny')).register('direction', 5, 6).eval()
    gap = b.load_state_dict(a.state_dict(), strict=False)
    x = {'text': torch.randn(1, 16, 128)}
    assert not gap.unexpected_keys and torch.equal(b(x)[:, :82], a(x)) and b.spans['direction'] == slice(82, 88)
    for bad in (dict(name='x y'), dict(features=0), dict(count=0), dict(drop=2), dict(name='audio')):
        with pytest.raises(ValueError): b.register(**{**dict(name='new', features=1, count=1), **bad})
