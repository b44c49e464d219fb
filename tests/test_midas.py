"""The joint model: sizes, training equal to streaming, nothing from the future, every signal used, files, rows."""
import dataclasses, json, pickle, shutil
import pytest, torch
from safetensors.torch import save_file
from midas_ref.config import preset
from midas_ref.codec.temporal import VideoDCAE
from midas_ref.conditions.audio import WhisperVQ
from midas_ref.conditions.pose import Motion
from midas_ref.model.midas import Live, Midas, by_chunk, load_midas, over_frame, replay_latents, save_looks
from midas_ref.model.noise import draw_ids

def small(frames=6, window=8):
    "A model of 2x2 latents, with chunks of `frames` and a window of `window` chunks."
    p, r = preset('tiny'), dataclasses.replace
    return r(p, video=r(p.video, height=128, width=128), text=r(p.text, tokens=2, width=32, layers=1), pose=r(p.pose, tokens_per_frame=2), audio=r(p.audio, width=32, heads=2, layers=1, ffn=64, codes=16),
             backbone=r(p.backbone, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48), head=r(p.head, width=32, layers=1, heads=2), frames_per_chunk=frames, window_frames=window*frames)

def awake(model):
    "Zero-initialised weights would hide mistakes."
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in (model.tokens.carry.weight, model.tokens.place, model.tokens.mark, model.tokens.noise.table, model.head.out.weight, *model.head.parameters()):
            p.copy_(torch.randn(p.shape, generator=g)*.1)
    return model.eval()

def sequence(cfg, rows, chunks, seed=0):
    "Latents, reference, signals, levels and noise of a sequence."
    g, t = torch.Generator().manual_seed(seed), chunks*cfg.frames_per_chunk
    rand = lambda *s: torch.randn(*s, generator=g)
    known = torch.rand(rows, t, 12, generator=g) < .9; known[:, 1::5] = False
    text = torch.randint(3, 200, (rows, chunks, 8), generator=g); text[:, 2::3] = 0
    far = torch.where(torch.rand(rows, t, 12, 1, generator=g) < .8, rand(rows, t, 12, 2)/10, torch.nan); far[:, 1::5] = torch.nan
    signals = dict(audio=rand(rows, t, 32), pose=Motion(rand(rows, t, 12, 2), known, far), text=text)
    return rand(rows, t, 128, 2, 2), rand(rows, 128, 2, 2), signals, draw_ids((rows, t), 20, generator=g), rand(rows, t, 4, 128)

@torch.no_grad()
def offline(model, latents, reference, signals, ids, noise): return model.hidden(model.embed(latents, reference, signals, ids, noise)[0])

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return awake(Live(small(window=2)))

def test_paper_sizes():
    with torch.device('meta'): m = Midas(preset('paper'))
    count = lambda part: sum(p.numel() for p in part.parameters())
    assert count(m.backbone) == 2_774_773_760 and count(m.head) == 458_643_584
    assert m.layout.tokens == 742 and m.cfg.window_chunks == 8 and m.text is None

@pytest.mark.parametrize('frames', [1, 2, 3, 6])
def test_training_equals_streaming(frames):
    "20 chunks, a window of 8: the ring turns twice, and every frame's condition must agree."
    torch.manual_seed(frames)
    m = awake(Live(small(frames)))
    latents, reference, signals, ids, noise = sequence(m.cfg, 2, 20, frames)
    a = offline(m, latents, reference, signals, ids, noise)
    b = replay_latents(m, latents, reference, by_chunk(signals, 20), ids, noise, m.init_state(2))
    assert a.shape == b.shape == (2, 20*frames, 4, 32)
    error = (a - b).abs().amax((0, 2, 3))/a.abs().max()
    assert error.max() < 1e-5, error

def test_streaming_far_from_the_start(model):
    "At five and a half million positions the conditions are the same."
    seq = sequence(model.cfg, 1, 5)
    state = model.init_state(1); model.backbone.seek(state, 5_500_000//model.layout.tokens)
    a, b = (replay_latents(model, *seq[:2], by_chunk(seq[2], 5), *seq[3:], s) for s in (model.init_state(1), state))
    assert (a - b).abs().max() < 1e-5*a.abs().max()

CHANGES = dict(frame=lambda s, t: s[0][:, t].add_(1), level=lambda s, t: s[3][:, t].copy_((s[3][:, t] + 7) % 20), noise=lambda s, t: s[4][:, t].add_(1), audio=lambda s, t: s[2]['audio'][:, t].neg_(),
               pose=lambda s, t: s[2]['pose'].velocity[:, t].add_(1), known=lambda s, t: s[2]['pose'].known[:, t].logical_not_(), moved=lambda s, t: s[2]['pose'].moved[:, t].nan_to_num_().add_(.1), text=lambda s, t: s[2]['text'][:, t//6].add_(5))

@pytest.mark.parametrize('kind', CHANGES)
@pytest.mark.parametrize('t', [6, 9, 11])
def test_future_changes_nothing_and_past_does(model, kind, t):
    "Frame t itself is the future of its own condition; conditions of a chunk are known from its start on."
    seq, other = sequence(model.cfg, 1, 4), sequence(model.cfg, 1, 4)
    for s in (seq, other): s[3].fill_(10); s[2]['text'].clamp_(min=3); s[2]['pose'].known.fill_(True)
    CHANGES[kind](other, t)
    moved = (offline(model, *seq) - offline(model, *other)).abs().amax((0, 2, 3))
    first = t + 1 if kind in ('frame', 'level', 'noise') else t//6*6
    assert (moved[:first] == 0).all(), moved
    assert (moved[first:first+6] > 1e-5).all(), moved

def test_reference_is_used(model):
    seq = sequence(model.cfg, 1, 3)
    moved = (offline(model, *seq) - offline(model, seq[0], seq[1] + 1, *seq[2:])).abs().amax((0, 2, 3))
    assert (moved > 1e-5).all()

def test_what_is_missing_is_a_placeholder(model):
    "No signal, a pose of unknown keypoints and an empty text are the same."
    seq = sequence(model.cfg, 1, 2)
    blank = dict(pose=Motion(torch.randn(1, 12, 12, 2), torch.zeros(1, 12, 12, dtype=torch.bool)), text=model.text.ids(['', '']).unflatten(0, (1, 2)))
    assert torch.equal(model.embed_conditions({}, (1, 2)), model.embed_conditions(blank, (1, 2)))
    assert not torch.equal(model.embed_conditions({}, (1, 2)), model.embed_conditions(dict(blank, audio=seq[2]['audio'][:, :12]), (1, 2)))

def test_where_the_head_is_may_be_all_that_is_known(model):
    "A place without a velocity is a signal; a model that was not made for places does not listen."
    far = torch.full((1, 12, 12, 2), torch.nan); far[:, 6:] = .1
    p = Motion(torch.zeros(1, 12, 12, 2), torch.zeros(1, 12, 12, dtype=torch.bool), far)
    with torch.no_grad(): none, told = (model.embed_conditions(s, (1, 2)) for s in ({}, dict(pose=p)))
    span = model.layout.span('pose')
    assert torch.equal(none[:, 0], told[:, 0]) and ((none - told)[:, 1, span].abs().amax(-1) > 1e-4).all()
    deaf = Live(dataclasses.replace(model.cfg, pose=dataclasses.replace(model.cfg.pose, moved=False)))
    with torch.no_grad(): assert torch.equal(deaf.embed_conditions({}, (1, 2)), deaf.embed_conditions(dict(pose=p), (1, 2)))

def test_weights_of_velocities_alone_are_widened(model):
    "They say what they said, whatever the places."
    old = Live(dataclasses.replace(model.cfg, pose=dataclasses.replace(model.cfg.pose, moved=False)))
    new = Live(model.cfg); new.load_state_dict(old.state_dict())
    p = sequence(model.cfg, 2, 3)[2]['pose']
    with torch.no_grad(): assert torch.equal(old.pose(*p), new.pose(*p)) and not torch.equal(model.pose(*p), model.pose(p.velocity, p.known))

def test_rows_are_independent(model):
    "Three streams together, drawn with seeds of their own, equal each of them alone: prefill, head and ring."
    _, reference, signals, *_ = sequence(model.cfg, 3, 4)
    def draw(rows, seeds):
        mine = dict(audio=signals['audio'][rows], pose=signals['pose'].map(lambda v: v[rows]), text=signals['text'][rows])
        state = model.init_state(len(rows), seeds)
        return torch.stack([x for s in by_chunk(mine, 4) for x in model.chunk(s, reference[rows], state, level=2)], 1)
    together = draw([0, 1, 2], [11, 5, 7])
    for i, seed in enumerate((11, 5, 7)):
        alone = draw([i], [seed])
        assert (together[i] - alone[0]).abs().max() < 1e-5*alone.abs().max()
    assert not torch.allclose(together[0], draw([0], [12])[0], atol=1e-2)

def test_with_frames_shares_weights(model):
    short = model.with_frames(2)
    assert short.layout.like == model.layout == short.with_frames(3).layout.like and model.with_frames(6).layout == model.layout == short.with_frames(6).layout
    assert short.layout.frames == 2 and short.cfg.window_frames == model.cfg.window_frames and model.layout.frames == 6
    mine = {n: p.data_ptr() for n, p in model.named_parameters()}
    assert mine == {n: p.data_ptr() for n, p in short.named_parameters()}
    seq = sequence(short.cfg, 1, 3)
    before = offline(short, *seq)
    with torch.no_grad(): model.tokens.lift.bias.add_(1.)
    after = offline(short, *seq)
    with torch.no_grad(): model.tokens.lift.bias.sub_(1.)
    assert not torch.equal(before, after)
    with pytest.raises(ValueError, match='window_frames'): model.with_frames(5)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_each_part_of_a_frame_has_its_temperature(dtype):
    "A head that has learnt nothing moves nothing, so what it draws is the noise that it began with."
    cfg = small()
    m = Live(dataclasses.replace(cfg, head=dataclasses.replace(cfg.head, temperature=(0., .5, 1., 2.)))).eval().to(dtype)
    for model in (m, m.with_frames(3)):
        state, z = model.init_state(1), torch.zeros(1, 4, 32, dtype=dtype)
        x0 = model.draw(z, state, noise=torch.ones(1, 4, 128, dtype=dtype))
        assert x0.dtype == dtype and torch.equal(x0[0], torch.tensor([0., .5, 1., 2.], dtype=dtype)[:, None].expand(-1, 128))
    assert over_frame((1., 2., 3., 4.), 1, 4)[:, 0].tolist() == [3., 3., 4., 4.] and over_frame((.7,), 2, 3).unique().tolist() == [torch.tensor(.7).item()]

def test_wrong_sizes_are_refused(model):
    latents, reference, signals, ids, noise = sequence(model.cfg, 1, 2)
    with pytest.raises(ValueError, match='whole chunks of 6'): model.embed(latents[:, :7], reference, {}, ids[:, :7], noise[:, :7])
    with pytest.raises(ValueError, match='2 rows and the state 1'): model.prefill({}, reference.expand(2, -1, -1, -1), model.init_state(1))
    with pytest.raises(ValueError, match='another model'): model.prefill({}, reference, Live(model.cfg).init_state(1))

def test_loss_reaches_every_part():
    "No part is left without gradient, except what starts at zero behind another zero."
    torch.manual_seed(0)
    m = awake(Live(small(window=2))).train()
    latents, reference, signals, ids, _ = sequence(m.cfg, 4, 3)
    for name in m.conditions.drops: m.conditions.drops[name] = 0.
    m(latents, reference, signals, ids=ids, generator=torch.Generator().manual_seed(0))['loss'].backward()
    dead = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in dead if n not in ('text.blank', 'conditions.placeholder.audio')], dead     # no text is partly empty, no audio is missing

@pytest.fixture
def saved(tmp_path):
    "A small model with codec and tokenizer, and its folder."
    torch.manual_seed(0)
    cfg = small(window=2)
    cfg = dataclasses.replace(cfg, codec=dataclasses.replace(cfg.codec, encoder_widths=(8, 16, 32, 64, 64, 64, 128), decoder_widths=(8, 16, 32, 64, 64, 64, 128), decoder_depths=(0, 1, 1, 1, 1, 1, 1)))
    m = awake(Midas(cfg, VideoDCAE(cfg.codec), WhisperVQ(cfg.audio)))
    m.load_state_dict({k: v.half().float() for k, v in m.trained_state().items()}, strict=False)
    m.save_pretrained(tmp_path/'m')
    return m, tmp_path/'m'

def test_save_and_load(saved, monkeypatch):
    m, folder = saved
    for name in ('load', 'loads', 'Unpickler'): monkeypatch.setattr(pickle, name, lambda *a, **k: pytest.fail('something was unpickled'))
    monkeypatch.setattr(torch, 'load', lambda *a, **k: pytest.fail('torch.load was called'))
    again = Midas.from_pretrained(folder)
    a, b = m.state_dict(), again.state_dict()
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a if 'ema_' not in k) and again.cfg == m.cfg and again.codec_hash == m.codec.fingerprint(decoder=False)
    _, reference, signals, *_ = sequence(m.cfg, 1, 3)
    x, y = (torch.stack([f for s in by_chunk(signals, 3) for f in n.chunk(s, reference, st)], 1) for n in (m, again) for st in [n.init_state(1, 3)])
    assert torch.equal(x, y) and not again.training

def test_full_precision_file(saved, tmp_path):
    m, _ = saved
    with torch.no_grad(): m.head.out.weight.add_(1e-5)
    (tmp_path/'f').mkdir(); m._save_pretrained(tmp_path/'f', torch.float32)
    again = Midas.from_pretrained(tmp_path/'f')
    assert all(torch.equal(v, again.trained_state()[k]) for k, v in m.trained_state().items())

def edit(folder, **changes):
    info = json.loads((folder/'config.json').read_text()); info.update(changes)
    (folder/'config.json').write_text(json.dumps({k: v for k, v in info.items() if v is not None}))

@pytest.mark.parametrize('damage, error, said', [
    (lambda f: (f/'model.safetensors').write_bytes((f/'model.safetensors').read_bytes()[:-1000]), ValueError, 'not a complete safetensors file'),
    (lambda f: (f/'model.safetensors').write_bytes(pickle.dumps({'a': 1})), ValueError, 'not a complete safetensors file'),
    (lambda f: (f/'model.safetensors').rename(f/'model.bin'), FileNotFoundError, 'config.json and model.safetensors'),
    (lambda f: save_file({'x': torch.zeros(2)}, f/'model.safetensors'), ValueError, 'does not fit its config.json'),
    (lambda f: shutil.copy(f/'codec'/'model.safetensors', f/'model.safetensors'), ValueError, 'does not fit its config.json'),
    (lambda f: (f/'config.json').write_text('{"midas"'), ValueError, 'not valid JSON'),
    (lambda f: edit(f, midas=None), ValueError, 'no MIDAS model'),
    (lambda f: edit(f, points=None), ValueError, 'lacks points'),
    (lambda f: edit(f, points=14), ValueError, 'does not fit its config.json'),
    (lambda f: edit(f, codec_hash='0123456789ab'), ValueError, 'trained with codec 0123456789ab'),
    (lambda f: (f/'config.json').unlink(), FileNotFoundError, 'config.json and model.safetensors')])
def test_damaged_folders(saved, damage, error, said):
    damage(saved[1])
    with pytest.raises(error, match=said) as e: Midas.from_pretrained(saved[1])
    assert len(str(e.value).splitlines()) == 1

def test_foreign_codec(saved):
    "Latents of another codec mean something else."
    m, folder = saved
    torch.manual_seed(9); VideoDCAE(m.cfg.codec).save(folder/'codec')
    with pytest.raises(ValueError, match='its latents would mean something else'): Midas.from_pretrained(folder)

def test_looks_travel_with_the_model(saved, tmp_path):
    "Written and read with it, half the precision; a file about other latents, of another size or damaged is refused in one line."
    m, folder = saved
    assert Midas.from_pretrained(folder).looks is None and not (folder/'looks.safetensors').exists()
    n, c = m.layout.frame_tokens, m.cfg.codec.latent_channels
    m.looks = torch.randn(n, c, c)
    m.save_pretrained(tmp_path/'l')
    again = Midas.from_pretrained(tmp_path/'l')
    assert torch.equal(again.looks, m.looks.half().float()) and not [k for k in again.state_dict() if 'looks' in k] and Midas.from_pretrained(tmp_path/'l').to(torch.bfloat16).looks.dtype == torch.bfloat16
    for damage, said in ((lambda: save_looks(tmp_path/'l', m.looks, 'abc'), 'about the latents of codec abc'), (lambda: save_looks(tmp_path/'l', m.looks[:, 1:], m.codec_hash), 'this model needs'),
                         (lambda: (tmp_path/'l'/'looks.safetensors').write_bytes(b'nothing'), 'cannot be read')):
        damage()
        with pytest.raises(ValueError, match=said) as e: Midas.from_pretrained(tmp_path/'l')
        assert len(str(e.value).splitlines()) == 1 and 'train looks' in str(e.value)
        assert load_midas(tmp_path/'l', Midas, looks=False).looks is None
    again.looks = None; again.save_pretrained(tmp_path/'l')
    assert not (tmp_path/'l'/'looks.safetensors').exists()                                  # it did not fit
    m.save_pretrained(tmp_path/'l'); again.save_pretrained(tmp_path/'l')
    assert (Midas.from_pretrained(tmp_path/'l').looks == m.looks.half()).all()             # it fits: kept

def test_a_locator_travels_with_the_model(saved, tmp_path):
    "Written and read with it, in half precision; trained by nothing; a file that is damaged, foreign or about other points is refused in one line."
    from midas_ref.data.probes import Locator, save_locator
    m, folder = saved
    assert m.locator is None and Midas.from_pretrained(folder).locator is None
    m.frozen['locator'] = Locator().eval().requires_grad_(False)
    m.save_pretrained(at := tmp_path/'l')
    again, x = Midas.from_pretrained(at), torch.rand(2, 3, 64, 64)*2 - 1
    assert (again.locator(x) - m.locator(x)).abs().max() < .01 and again.locator(x).shape == (2, 12, 2) and not [k for k in again.trained_state() if 'locator' in k]
    assert again.to(torch.bfloat16).locator(x).dtype == torch.float32 and not any(p.requires_grad for p in again.locator.parameters())
    for damage, said in ((lambda: save_locator(Locator(5), at/'locator.safetensors'), 'reads 5 points'), (lambda: shutil.copy(at/'model.safetensors', at/'locator.safetensors'), 'holds no locator'),
                         (lambda: (at/'locator.safetensors').write_bytes(b'nothing'), 'cannot be read')):
        damage()
        with pytest.raises(ValueError, match=said) as e: Midas.from_pretrained(at)
        assert len(str(e.value).splitlines()) == 1 and 'train locator' in str(e.value)
        assert load_midas(at, Midas, looks=False).locator is None
    del m.frozen['locator']

def test_missing_parts(saved):
    _, folder = saved
    shutil.rmtree(folder/'codec'); (folder/'audio.safetensors').unlink()
    m = Midas.from_pretrained(folder)
    with pytest.raises(ValueError, match='without its codec'): m.codec
    with pytest.raises(FileNotFoundError, match='No model at'): Midas.from_pretrained(folder/'nowhere')
    assert not any(p.requires_grad for p in saved[0].frozen.parameters()) and not saved[0].train().frozen.training

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda():
    "Training equals streaming on a GPU, the GPU equals the CPU, and a step in bfloat16 is finite."
    torch.manual_seed(1)
    m = awake(Live(small()))
    latents, reference, signals, ids, noise = sequence(m.cfg, 2, 10)
    there = lambda v: type(v)(*(there(q) for q in v)) if isinstance(v, tuple) else {k: there(q) for k, q in v.items()} if isinstance(v, dict) else v.cuda()
    want = offline(m, latents, reference, signals, ids, noise)
    m, args = m.cuda(), tuple(map(there, (latents, reference, signals, ids, noise)))
    got = offline(m, *args)
    assert (got.cpu() - want).abs().max() < 1e-3*want.abs().max()
    live = replay_latents(m, args[0], args[1], by_chunk(args[2], 10), args[3], args[4], m.init_state(2))
    assert (live - got).abs().max() < 1e-3*want.abs().max()
    m.train(); m.conditions.drops.update(audio=.1, pose=.6, text=.5)
    with torch.autocast('cuda', torch.bfloat16):
        out = m(args[0], args[1], args[2], torch.ones(4, 128, device='cuda'), generator=torch.Generator('cuda').manual_seed(0), drop=torch.Generator().manual_seed(0))
    out['loss'].backward()
    assert torch.isfinite(out['loss']) and all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)
