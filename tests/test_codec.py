"""The codec: published arithmetic and names, causal and streaming in both directions, errors that help, half precision."""
import json, os, pickle, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest, torch
from safetensors.torch import save_file
from torch import nn
from midas_ref.codec.blocks import LinearAttention, make_norm
from midas_ref.codec.dcae import DCAE, DIFFUSERS, ORIGINAL, bench_codec, fit_statistics, load_dcae, published_name, race, record_race, translate
from midas_ref.codec.stream import compare_flicker, decode_alone, decode_frame, decode_video, encode_frame, encode_video, state_bytes
from midas_ref.codec.temporal import Fold, TimeBlock, Unfold, VideoDCAE, load_video_dcae
from midas_ref.config import CodecConfig, VideoConfig
from midas_ref.streaming import stack, stream, unstack

ROOT = Path(__file__).parents[1]

NARROW = CodecConfig(encoder_widths=(32, 32, 64, 64, 64, 128, 128), encoder_depths=(0, 1, 2, 1, 1, 1, 1),
                     decoder_widths=(32, 32, 64, 64, 64, 128, 128), decoder_depths=(0, 2, 1, 1, 2, 1, 1))
LIGHT = CodecConfig(encoder_widths=(16, 16, 16, 32, 32, 64, 128), encoder_depths=(0, 1, 1, 1, 1, 1, 1), temporal_from=3,
                    decoder_widths=(16, 16, 16, 32, 32, 64, 128), decoder_depths=(0, 1, 1, 1, 1, 1, 1))

@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0)
    with torch.no_grad(): yield

def shake(model):
    "Random norms, batch statistics and latent statistics, so that none is hidden behind ones and zeros."
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) or type(m).__name__ in ('RMSNorm2d', 'RMSNorm'):
            for n, t in [*m.named_parameters(), *m.named_buffers()]:
                if t.is_floating_point(): t.data = torch.rand_like(t) + .5 if n != 'bias' else torch.randn_like(t)*.3
    return model

def awake(model, std=.3):
    "Random weights in the projections over time that start at zero."
    for n, p in model.named_parameters():
        if '.time.' in n and n.endswith(('proj.weight', 'attn.out.weight')): nn.init.normal_(p, std=std / p[0].numel()**.5)
    return model

def image(cfg=NARROW): return shake(DCAE(cfg)).eval()
def video(cfg=LIGHT): return awake(shake(VideoDCAE(cfg))).eval()
def gap(a, b): return ((a - b).abs().max() / b.abs().max()).item()
def clip(b, t, h=64, w=128): return torch.rand(b, t, 3, h, w)*2 - 1

def reference(cfg, weights=True):
    "The diffusers model of the same sizes."
    diffusers = pytest.importorskip('diffusers')
    kinds = ['ResBlock']*cfg.attention_from + ['EfficientViTBlock']*(7 - cfg.attention_from)
    return diffusers.AutoencoderDC(in_channels=3, latent_channels=cfg.latent_channels, attention_head_dim=32, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=cfg.encoder_widths, decoder_block_out_channels=cfg.decoder_widths, encoder_layers_per_block=cfg.encoder_depths,
        decoder_layers_per_block=cfg.decoder_depths, encoder_qkv_multiscales=[()]*7, decoder_qkv_multiscales=[()]*7, upsample_block_type='pixel_shuffle',
        downsample_block_type='pixel_unshuffle', decoder_norm_types=['batch_norm']*3 + ['rms_norm']*4, decoder_act_fns=['relu']*3 + ['silu']*4).eval()

def published(model, rules):
    "The weights of an image codec as a third party would have written them."
    out = {}
    for k, v in model.state_dict().items():
        if k in ('mean', 'std'): continue
        n = published_name(k, model.cfg, rules)
        if 'to_qkv' in n: out |= {n.replace('to_qkv', f'to_{c}'): t.reshape(t.shape[:2]).clone() for c, t in zip('qkv', v.chunk(3))}
        else: out[n] = v.reshape(v.shape[:2]).clone() if rules is DIFFUSERS and n.endswith('to_out.weight') else v.clone()
    return out

# --- published arithmetic and names ----------------------------------------------------------------

@pytest.mark.parametrize('size', [(384, 640), (640, 384), (128, 192), (256, 512)])   # 60, 60, 6 and 32 latent positions
def test_parity_with_diffusers(size):
    ref = shake(reference(NARROW)); ours = DCAE(NARROW).eval()
    ours.load_state_dict(translate(ref.state_dict(), ours, NARROW))
    x = torch.rand(1, 3, *size)*2 - 1
    z = ref.encode(x).latent
    assert z.shape[-2:] == (size[0]//64, size[1]//64)
    assert gap(ours.denormalise(ours.encode(x)), z) < 1e-5
    assert gap(ours.decode(ours.normalise(z)), ref.decode(z).sample) < 1e-5

def test_original_names_through_diffusers_converter():
    "diffusers' own converter turns our original-style names into exactly its own, value by value."
    ref = reference(NARROW)
    from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers as convert
    ours = image()
    theirs = convert(published(ours, ORIGINAL))
    ref.load_state_dict(theirs, strict=True)
    direct = published(ours, DIFFUSERS)
    assert theirs.keys() == direct.keys() == ref.state_dict().keys()
    assert all(torch.equal(theirs[k].flatten(), direct[k].flatten()) for k in theirs)
    x = clip(1, 1)[0]
    assert gap(ours.denormalise(ours.encode(x)), ref.encode(x).latent) < 1e-5

def test_full_size_counts_and_names():
    with torch.device('meta'): full = DCAE()
    names = [k for k in full.state_dict() if k not in ('mean', 'std')]
    assert sum(p.numel() for p in full.parameters()) == 676_896_140 and len(names) == 386
    assert len({published_name(k, full.cfg, ORIGINAL) for k in names}) == 386
    pytest.importorskip('diffusers')
    with torch.device('meta'): theirs = reference(CodecConfig()).state_dict()
    ours = {n.replace('qkv', c) for k in names for n in [published_name(k, full.cfg, DIFFUSERS)] for c in (('q', 'k', 'v') if 'to_qkv' in n else ('qkv',))}
    assert ours == theirs.keys() and len(ours) == 418

@pytest.mark.parametrize('rules', [ORIGINAL, DIFFUSERS], ids=['original', 'diffusers'])
@pytest.mark.parametrize('cls', [DCAE, VideoDCAE])
def test_strict_load_of_published_files(tmp_path, rules, cls):
    ours = image(); weights = published(ours, rules)
    save_file(weights, tmp_path/'diffusion_pytorch_model.safetensors')
    (tmp_path/'config.json').write_text('{"_class_name": "AutoencoderDC"}')
    again = cls.from_pretrained(tmp_path, NARROW)
    x = clip(1, 2)
    assert gap(again.denormalise(again.encode(x)), ours.encode(x)) < 1e-6 and not again.training
    assert again.std.mean().item() == pytest.approx(1/.2889)
    for change, said in (({list(weights)[3]: None}, '1 tensors missing'), ({'extra.weight': torch.zeros(1)}, '1 unknown')):
        save_file({k: v for k, v in {**weights, **change}.items() if v is not None}, tmp_path/'diffusion_pytorch_model.safetensors')
        with pytest.raises(ValueError, match=said): cls.from_pretrained(tmp_path, NARROW)

def test_scaling_factor_of_the_config_is_taken(tmp_path):
    save_file(published(image(), DIFFUSERS), tmp_path/'w.safetensors')
    (tmp_path/'config.json').write_text('{"scaling_factor": 0.25}')
    assert load_dcae(tmp_path, NARROW).std.unique().tolist() == [4.]

def test_sharded_files_are_joined(tmp_path):
    w = published(image(), DIFFUSERS); keys = list(w)
    for i in range(2): save_file({k: w[k] for k in keys[i::2]}, tmp_path/f'w-{i}.safetensors')
    load_dcae(tmp_path, NARROW)

@pytest.mark.parametrize('positions', [(4, 8), (3, 11), (6, 10), (10, 6), (1, 1)])
def test_both_orders_of_linear_attention(positions):
    a = shake(LinearAttention(64)); b = shake(LinearAttention(64)); b.load_state_dict(a.state_dict())
    a.head_dim = b.head_dim
    x = torch.randn(2, 64, *positions)
    q, k, v = a.qkv(x).reshape(2, 2, 3, 32, -1).unbind(2)
    w = k.relu().mT @ q.relu()
    slow = x + a.norm(a.proj((v @ (w / (w.sum(-2, keepdim=True) + 1e-15))).reshape(x.shape)))
    assert gap(a(x), slow) < 1e-5
    with torch.autocast('cpu', torch.bfloat16): assert gap(a(x), slow) < 3e-2

# --- latents ---------------------------------------------------------------------------------------

def test_latents_are_normalised_and_fingerprinted(tmp_path):
    codec, pictures = image(LIGHT), clip(6, 1, 128, 128)[:, 0]
    before = codec.fingerprint()
    z = fit_statistics(codec, pictures.split(4)).encode(pictures)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3
    assert gap(codec.decode(z), codec.decoder(codec.encoder(pictures))) < 1e-5
    assert codec.fingerprint() != before
    w = next(codec.parameters()).data; w.view(-1)[0] = 0.; before = codec.fingerprint(); w.view(-1)[0] = -0.
    assert codec.fingerprint() == before                                                   # the same number
    codec.save(tmp_path/'a')
    again = load_dcae(tmp_path/'a')
    assert again.cfg == LIGHT and again.fingerprint() == codec.fingerprint()
    codec.save(tmp_path/'b', torch.float16)
    half = load_dcae(tmp_path/'b')
    assert half.fingerprint() != codec.fingerprint() and half.mean.dtype == torch.float32
    assert half.to(torch.float16).fingerprint() == load_dcae(tmp_path/'b').fingerprint()   # the file's own number type changes nothing
    both = fit_statistics(video(), [clip(2, 3), clip(2, 3)])                                # a video codec takes clips
    assert both.std.min() > 0 and torch.isfinite(both.encode(clip(1, 2))).all()
    with pytest.raises(ValueError, match='two latent positions'): fit_statistics(codec, [pictures[:1, :, :64, :64]])

def test_leading_axes():
    codec, x = image(LIGHT), clip(2, 3)
    assert torch.equal(codec.encode(x[None]), codec.encode(x)[None])
    assert codec(x).shape == x.shape and codec(x[0]).shape == x[0].shape

# --- layers over time ------------------------------------------------------------------------------

def test_video_codec_at_start_is_the_image_codec():
    "Ours and diffusers', frame by frame."
    ref = shake(reference(NARROW)); codec = VideoDCAE(NARROW).eval()
    codec.load_state_dict(codec.complete(translate(ref.state_dict(), codec, NARROW)))
    x = clip(2, 3)
    z = torch.stack([ref.encode(f).latent for f in x.unbind(1)], 1)
    assert gap(codec.denormalise(codec.encode(x)), z) < 1e-6
    assert gap(codec.decode(codec.normalise(z)), torch.stack([ref.decode(f).sample for f in z.unbind(1)], 1)) < 2e-6
    plain = DCAE(NARROW).eval(); plain.load_state_dict({k: v for k, v in codec.state_dict().items() if '.time.' not in k})
    assert gap(codec(x), plain(x)) < 1e-6

def test_image_weights_load_into_the_video_codec(tmp_path):
    plain, x = image(LIGHT), clip(1, 2)
    plain.save(tmp_path/'image')
    codec = load_video_dcae(tmp_path/'image')
    assert gap(codec(x), plain(x)) < 1e-6
    state = torch.get_rng_state()
    assert load_video_dcae(tmp_path/'image').fingerprint() == codec.fingerprint() and torch.equal(torch.get_rng_state(), state)
    awake(codec).save(tmp_path/'video')
    again = load_video_dcae(tmp_path/'video')
    assert again.fingerprint() == codec.fingerprint() != plain.fingerprint() and torch.equal(again(x), codec(x))
    with pytest.raises(ValueError, match='does not fit DCAE'): load_dcae(tmp_path/'video')
    part = codec.state_dict(); del part['decoder.time.blocks.3.0.proj.weight']
    save_file(part, tmp_path/'video'/'model.safetensors')
    with pytest.raises(ValueError, match='decoder.time.blocks.3.0.proj.weight'): load_video_dcae(tmp_path/'video')

@torch.enable_grad()
def test_only_last_projections_start_at_zero():
    "After one step every weight receives a gradient; with everything zero none ever does."
    def grads(block, steps=2):
        x, y = torch.randn(2, 1, 7, 32, 3, 3)
        for _ in range(steps):
            block.zero_grad(); (block(x) - y).square().mean().backward()
            for p in block.parameters(): p.data -= .1*p.grad
        return {n: p.grad.abs().max().item() for n, p in block.named_parameters()}
    alive = grads(TimeBlock(32))
    assert all(v > 0 for n, v in alive.items() if n != 'attn.qkv.bias'), alive
    dead = TimeBlock(32)
    for n, p in dead.named_parameters():
        if 'norm' not in n: nn.init.zeros_(p)
    assert {n for n, v in grads(dead, 5).items() if v} == {'proj.bias', 'attn.out.bias'}

def test_stages_with_layers_over_time():
    for first in (1, 4, 7):
        codec = VideoDCAE(replace(LIGHT, temporal_from=first))
        for p in (codec.encoder, codec.decoder): assert [len(b) for b in p.time.blocks] == [int(s >= first) for s in range(1, 7)]
    assert len(VideoDCAE(replace(LIGHT, temporal_from=7)).state_dict()) == len(DCAE(LIGHT).state_dict())

@pytest.mark.parametrize('cfg', [LIGHT, replace(LIGHT, window=2), replace(LIGHT, kernel_t=2, history=3, temporal_from=1), replace(LIGHT, kernel_t=1)], ids=['plain', 'window', 'short', 'kernel 1'])
def test_causal_in_both_directions(cfg):
    codec, x, n = video(cfg), clip(1, 8), cfg.window
    z, y = codec.encode(x), codec.decode(codec.encode(x))
    for t in (1, 4, 7):
        first = t//n*n                                        # the first frame of the window that holds frame t
        x2, z2 = x.clone(), z.clone()
        x2[:, t] = -x2[:, t]; z2[:, t//n] += 1
        a, b = codec.encode(x2), codec.decode(z2)
        assert torch.equal(a[:, :t//n], z[:, :t//n]) and not torch.equal(a[:, t//n], z[:, t//n])
        assert torch.equal(b[:, :first], y[:, :first]) and not torch.equal(b[:, first], y[:, first])

@pytest.mark.parametrize('cfg, h, w, plans', [
    (LIGHT, 64, 128, ([1]*9, [9], [2, 7], [1, 5, 3])), (LIGHT, 384, 640, ([1, 2],)), (LIGHT, 640, 384, ([2, 1],)), (replace(LIGHT, decoder_norm='rms', temporal_from=1), 128, 64, ([1]*9, [4, 5])),
    (replace(LIGHT, window=3), 64, 128, ([1]*3, [2, 1], [3]))], ids=['plain', 'wide', 'tall', 'rms', 'window'])
def test_streaming_equals_offline(cfg, h, w, plans):
    codec, n = video(cfg), cfg.window
    x = clip(2 if h < 200 else 1, sum(plans[0])*n, h, w)
    z = codec.encode(x); y = codec.decode(z)
    assert y.shape == x.shape
    for plan in plans:
        assert gap(stream(codec.encode, x, [n*p for p in plan], codec.init_encode_state(len(x))), z) < 1e-5
        assert gap(stream(codec.decode, z, plan, codec.init_decode_state(len(x))), y) < 1e-5

def test_frame_and_video_forms():
    codec, x = video(), clip(1, 5)
    z, y = codec.encode(x), codec(x).clamp(-1, 1)
    e, d = codec.init_encode_state(), codec.init_decode_state()
    for t in range(5):
        assert gap(encode_frame(codec, x[:, t], e), z[:, t]) < 1e-5
        assert gap(decode_frame(codec, z[:, t], d), y[:, t]) < 1e-5
    for chunk in (1, 2, 9):
        assert gap(torch.stack(list(encode_video(codec, iter(x[0]), chunk))), z[0]) < 1e-5
        assert gap(torch.stack(list(decode_video(codec, z[0], chunk))), y[0]) < 1e-5
    assert list(encode_video(codec, [])) == []
    folded = video(replace(LIGHT, window=2))
    padded = torch.cat([x, x[:, -1:]], 1)
    assert gap(torch.stack(list(encode_video(folded, x[0], 2))), folded.encode(padded)[0]) < 1e-5
    for f, v in ((encode_frame, x[:, 0]), (decode_frame, z[:, 0])):
        with pytest.raises(ValueError, match='2 frames'): f(folded, v, None)

def test_sessions_do_not_touch():
    codec, z = video(), torch.randn(2, 6, 128, 1, 2)
    alone = [stream(codec.decode, r[None], [1]*6, codec.init_decode_state()) for r in z]
    states = [codec.init_decode_state() for _ in z]
    turns = [[codec.decode(r[None, t:t+1], s) for r, s in zip(z, states)] for t in range(6)]
    for i in range(2): assert torch.equal(torch.cat([t[i] for t in turns], 1), alone[i])
    x = clip(2, 4)
    a, b = codec.init_encode_state(), codec.init_decode_state()                     # an encoder and a decoder on one model
    for t in range(4): codec.encode(x[:1, t:t+1], a); codec.decode(z[:1, t:t+1], b)
    assert gap(codec.decode(z[:1, 4:6], b), alone[0][:, 4:6]) < 1e-5

def test_rows_at_different_positions():
    codec, z, ages = video(), torch.randn(3, 9, 128, 1, 2), (6, 2, 0)
    alone = codec.decode(z)
    states = [codec.init_decode_state() for _ in ages]
    for r, s, n in zip(z, states, ages):
        if n: codec.decode(r[None, :n], s)
    batch = stack(states)
    y = codec.decode(torch.stack([r[n:n+2] for r, n in zip(z, ages)]), batch)
    for i, n in enumerate(ages): assert gap(y[i], alone[i, n:n+2]) < 1e-5
    batch.reset(0)
    y = codec.decode(torch.stack([z[0, :1], z[1, 4:5], z[2, 2:3]]), batch)
    for i, n in enumerate((0, 4, 2)): assert gap(y[i], alone[i, n:n+1]) < 1e-5
    assert [s.seen.item() for s in unstack(batch)] == [1, 5, 3]

def test_state_is_constant_and_as_predicted():
    codec = video(replace(LIGHT, temporal_from=5))
    for part, state, run, x in (('decoder', codec.init_decode_state(), codec.decode, torch.randn(1, 20, 128, 1, 1)), ('encoder', codec.init_encode_state(), codec.encode, clip(1, 20, 64, 64))):
        sizes, first = set(), None
        for _ in range(100): last = run(x, state); sizes.add(state.nbytes); first = last if state.seen[0] == 200 else first
        assert state.seen.tolist() == [2000] and len(sizes) == 1
        assert gap(last, first) < 1e-5                                              # the same input for ever gives the same output
        assert 0 <= sizes.pop() - sum(a + b for *_, a, b in state_bytes(codec.cfg, VideoConfig(64, 64), part, 4)) < 200
    with pytest.raises(ValueError, match='accepted'): state_bytes(codec.cfg, VideoConfig(64, 64), 'both')

def test_window_passes_still_pictures():
    "Before training, a still clip goes through a folding codec as through the image codec."
    plain = image(LIGHT); folded = VideoDCAE(replace(LIGHT, window=4)).eval()
    folded.load_state_dict(plain.state_dict() | {k: v for k, v in folded.state_dict().items() if '.time.' in k})
    x = clip(1, 1).expand(-1, 8, -1, -1, -1)
    assert folded.encode(x).shape == (1, 2, 128, 1, 2) and gap(folded(x), plain(x)) < 1e-5
    assert isinstance(folded.encoder.time.window, Fold) and isinstance(folded.decoder.time.window, Unfold)

@torch.enable_grad()
def test_checkpointing_changes_nothing_but_memory():
    codec, x = video().train(), clip(1, 3)
    def grads():
        codec.zero_grad(); y = codec(x); y.square().mean().backward()
        return y.detach(), torch.cat([p.grad.flatten() for p in codec.parameters()])
    y, g = grads(); codec.checkpointing(); y2, g2 = grads()
    assert torch.equal(y, y2) and gap(g2, g) < 1e-5
    before = gap(stream(codec.decode, codec.encode(x).detach(), [1, 2], codec.init_decode_state()), y)
    assert before < 1e-5                                                            # streams ignore it

def test_batch_statistics_stay_frozen():
    codec = video().train()
    stats = {k: v.clone() for k, v in codec.state_dict().items() if 'running' in k}
    codec(clip(1, 4))
    assert stats and all(torch.equal(v, codec.state_dict()[k]) for k, v in stats.items())

def test_shortcuts_can_be_turned_off(tmp_path):
    on, off = DCAE(LIGHT), DCAE(LIGHT, shortcuts=False)
    assert on.state_dict().keys() == off.state_dict().keys()
    off.load_state_dict(on.state_dict()); x = clip(1, 1)
    assert gap(on(x), off(x)) > 1e-2
    pictures = lambda step: clip(1, 2)[0]
    with torch.enable_grad():
        assert len(race(False, pictures, 3, LIGHT)) == 3
        record_race(tmp_path/'r.json', pictures, 4, LIGHT, 'a test', every=2)
    log = json.loads((tmp_path/'r.json').read_text())
    assert log['steps'] == [2, 4] and len(log['with']) == len(log['without']) == 2 and log['about'] == 'a test'

def test_flicker_of_an_untrained_codec():
    clips, numbers = compare_flicker(VideoDCAE(LIGHT).eval(), torch.zeros(3, 64, 64), 6, skip=1)
    assert numbers['streamed'] == pytest.approx(numbers['each frame alone'], rel=1e-3) and numbers['input'] > 1
    z = torch.randn(2, 3, 128, 1, 1); codec = video()
    assert gap(decode_alone(codec, z)[:, 2], codec.decode(z[:, 2:])[:, 0]) < 1e-5
    with pytest.raises(ValueError, match='at least two'): compare_flicker(codec, torch.zeros(3, 64, 64), 6, skip=5)

# --- errors ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('cls', [DCAE, VideoDCAE])
@pytest.mark.parametrize('change, said', [
    (lambda x: x[..., :100], 'multiples of 64'), (lambda x: x[..., :60, :], 'multiples of 64'), (lambda x: x[:, :, :2], '3 colours'), (lambda x: x[:0], 'no axis empty'),
    (lambda x: x*3, r'must lie in \[-1, 1\]'), (lambda x: x*float('nan'), 'not finite'), (lambda x: x/0, 'not finite'), (lambda x: (x*127).byte(), 'floating point')])
def test_bad_frames(cls, change, said):
    with pytest.raises(ValueError, match=said): cls(LIGHT).encode(change(clip(1, 2)))

@pytest.mark.parametrize('cls', [DCAE, VideoDCAE])
@pytest.mark.parametrize('z, said', [(torch.zeros(1, 1, 64, 1, 1), '128'), (torch.full((1, 1, 128, 1, 1), float('nan')), 'not finite'), (torch.zeros(1, 0, 128, 1, 1), 'none empty')])
def test_bad_latents(cls, z, said):
    with pytest.raises(ValueError, match=said): cls(LIGHT).decode(z)

def test_bad_streams():
    codec, x = video(), clip(1, 2)
    e, d = codec.init_encode_state(), codec.init_decode_state()
    for f, v, s in ((codec.encode, x, d), (codec.decode, torch.zeros(1, 1, 128, 1, 2), e), (codec.encode, x, video().init_encode_state())):
        with pytest.raises(ValueError, match='another model'): f(v, s)
    with pytest.raises(ValueError, match=r'\(b, t, 3, h, w\)'): codec.encode(x[0])
    with pytest.raises(ValueError, match=r'\(b, t, 128, h, w\)'): codec.decode(torch.zeros(1, 128, 1, 2))
    with pytest.raises(ValueError, match='one frame per stream'): encode_frame(codec, x, e)
    with pytest.raises(ValueError, match='one latent per stream'): decode_frame(codec, torch.zeros(1, 1, 128, 1, 2), d)
    with pytest.raises(ValueError, match='multiples of 3'): video(replace(LIGHT, window=3)).encode(x)
    with pytest.raises(ValueError, match='1 or more'): list(encode_video(codec, x[0], 0))
    good = codec.encode(x, e)
    with pytest.raises(ValueError): codec.encode(x*float('nan'), e)                 # refused before any cache was touched
    whole = codec.encode(torch.cat([x, x], 1))
    assert gap(torch.cat([good, codec.encode(x, e)], 1), whole) < 1e-5
    assert codec.encode(x*2, check=False).shape == good.shape

def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    image(LIGHT).save(tmp_path/'good')
    data = (tmp_path/'good'/'model.safetensors').read_bytes()
    for name, content in (('half/w.safetensors', data[:len(data)//2]), ('empty/w.safetensors', b''), ('pickle/model.pt', pickle.dumps({})), ('disguised/w.safetensors', pickle.dumps({})), ('json/model.safetensors', data), ('json/config.json', b'{')):
        (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).write_bytes(content)
    (tmp_path/'foreign').mkdir(); save_file({'layers.0.weight': torch.zeros(2)}, tmp_path/'foreign'/'w.safetensors')
    (tmp_path/'nothing').mkdir()
    for where, error, said in (('half', ValueError, 'complete safetensors'), ('empty', ValueError, 'complete safetensors'), ('pickle', FileNotFoundError, 'run code'), ('pickle/model.pt', FileNotFoundError, 'run code'),
                               ('disguised', ValueError, 'complete safetensors'), ('json', ValueError, 'valid JSON'), ('foreign', ValueError, 'no DC-AE checkpoint'), ('nothing', FileNotFoundError, 'safetensors'), ('absent', FileNotFoundError, 'No folder')):
        for load in (load_dcae, load_video_dcae):
            with pytest.raises(error, match=said): load(tmp_path/where)
    for where in ('weights.safetensors', 'some/w.safetensors', './nowhere'):
        with pytest.raises(FileNotFoundError, match='accepted'): load_dcae(where)
    with pytest.raises(FileNotFoundError, match='hub'): load_dcae('midas-ref-nobody/no-such-codec')
    with pytest.raises(ValueError, match='does not fit'): load_dcae(tmp_path/'good', NARROW)      # other sizes
    with pytest.raises(ValueError, match='rms'): make_norm('layer', 4)

# --- number types ----------------------------------------------------------------------------------

@pytest.mark.parametrize('cls', [DCAE, VideoDCAE])
def test_half_precision(cls):
    "bfloat16 stays close, streams, and takes float32 frames."
    codec = awake(cls(replace(LIGHT, decoder_norm='rms'))).eval(); x = clip(1, 3)
    z, y = codec.encode(x), codec(x)
    half = awake(cls(replace(LIGHT, decoder_norm='rms'))).eval(); half.load_state_dict(codec.state_dict()); half = half.to(torch.bfloat16)
    assert half.encode(x).dtype == half.decode(z).dtype == torch.bfloat16
    assert gap(half.encode(x).float(), z) < .05 and gap(half.decode(z).float(), y) < .05
    with torch.autocast('cpu', torch.bfloat16): assert gap(codec(x).float(), y) < .1
    if cls is VideoDCAE:
        got = stream(half.decode, z, [1, 2], half.init_decode_state())
        assert gap(got.float(), half.decode(z).float()) < .05

def test_channels_last_changes_nothing():
    codec, x = video(), clip(1, 3)
    y = codec(x)
    assert gap(codec.channels_last()(x), y) < 1e-5
    assert gap(stream(codec.decode, codec.encode(x), [1, 1, 1], codec.init_decode_state()), y) < 1e-5

def test_bench_gives_latencies():
    codec = image(LIGHT); kept = codec.fingerprint()
    out = bench_codec(codec, 64, 64, n=3, warmup=1)
    assert out['encode'].n == out['decode'].n == 3 and out['decode'].p50 > 0 and codec.fingerprint() == kept

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('dtype, tol', [(torch.float32, 2e-3), (torch.bfloat16, .06)])
def test_cuda(dtype, tol):
    codec, x = video(), clip(1, 4, 128, 192)
    z, y = codec.encode(x), codec(x)
    codec = codec.to('cuda', dtype).channels_last()
    assert gap(codec.encode(x.cuda()).float().cpu(), z) < tol
    assert gap(stream(codec.decode, z.cuda(), [1]*4, codec.init_decode_state()).float().cpu(), y) < tol

# ---- several processes ----------------------------------------------------------------------------------------------------------------

RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from pathlib import Path
from midas_ref.codec.dcae import DCAE
from midas_ref.codec.train import SpatialTrainer, agree, join_ranks, mean_over_ranks, near_identity, rank, train_codec
from midas_ref.config import preset
from midas_ref.data.probes import new_probe
torch.set_num_threads(1)
join_ranks()
p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([1., 2.]) + rank(); idle = torch.nn.Parameter(torch.zeros(1))
mean_over_ranks([p, idle])
widths = (16, 16, 16, 16, 32, 32, 128)
cfg = replace(preset('tiny').codec, encoder_widths=widths, decoder_widths=widths, encoder_depths=(0, 1, 1, 1, 1, 1, 1), decoder_depths=(0, 1, 1, 1, 1, 1, 1), decoder_norm='rms')
torch.manual_seed(0)
trainer = SpatialTrainer(near_identity(DCAE(cfg)), new_probe('a'), seed=rank())
g = torch.Generator().manual_seed(rank())
draw = lambda: (torch.rand(2, 3, 64, 64, generator=g)*2 - 1, torch.rand(2, 2, 64, 64, generator=g))
train_codec(trainer, draw, 0, sys.argv[2], steps=2, say=None)
torch.save(dict(grad=p.grad, said=agree(float(rank() + 7)), step=trainer.step, weights=[v.detach() for v in trainer.model.parameters()], critic=[v.detach() for v in trainer.critic.parameters()]), f'{sys.argv[2]}/rank{rank()}.pt')
"""

def test_processes_share_gradients_and_clock(tmp_path):
    (tmp_path/'ranks.py').write_text(RANKS)
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone', str(tmp_path/'ranks.py'), str(ROOT), str(tmp_path)],
                         capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert run.returncode == 0, run.stderr[:6000]
    a, b = (torch.load(tmp_path/f'rank{k}.pt', weights_only=True) for k in (0, 1))
    for r in (a, b): assert r['grad'].tolist() == [1.5, 2.5] and r['said'] == 7 and r['step'] == 2
    assert all(torch.equal(x, y) for k in ('weights', 'critic') for x, y in zip(a[k], b[k]))
    assert (tmp_path/'codec'/'config.json').is_file() and (tmp_path/'log.jsonl').read_text().count('\n') == 2

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('clips', [False, True])
def test_recorded_steps_are_the_same_steps(clips):
    "A trainer that replays CUDA graphs ends where a plain one does."
    from midas_ref.codec.train import ClipTrainer, SpatialTrainer
    from midas_ref.data.probes import new_probe
    g = torch.Generator().manual_seed(3); lead = (2, 3) if clips else (6,)
    x, masks = (torch.rand(*lead, c, 64, 64, generator=g).cuda() for c in (3, 2)); x = x*2 - 1
    losses = []
    for fast in (False, True):
        trainer = (ClipTrainer if clips else SpatialTrainer)((video if clips else image)(LIGHT).cuda().channels_last().train(), new_probe('a'), lr=1e-3, fast=fast)
        losses.append([trainer.update(x, masks, .9)['loss'].item() for _ in range(4)])
    assert losses[0][3] < losses[0][0] and max(abs(a/b - 1) for a, b in zip(*losses)) < .03, losses

def test_a_new_video_codec_is_causal_without_being_told():
    "Batch normalisation in training mode would mix frames."
    codec, x = VideoDCAE(replace(LIGHT, decoder_norm='batch')), clip(1, 4)
    y = x.clone(); y[:, 3] = 0
    assert torch.equal(codec(x)[:, :3], codec(y)[:, :3])

def test_stage_1_goes_on_from_the_image_part_of_a_video_codec(tmp_path):
    from midas_ref.codec.train import codec_trainer
    codec, x = video(), clip(2, 1, 64, 64)[:, 0]; codec.save(tmp_path)
    trainer = codec_trainer(1, tmp_path)
    assert type(trainer.model) is DCAE and not any('.time.' in k for k in trainer.model.state_dict())
    for part in (codec.encoder, codec.decoder):                                # silence the layers over time: what is left are pictures
        for name, p in part.named_parameters():
            if name.startswith('time.') and name.split('.')[-2] in ('proj', 'out'): p.data.zero_()
    with torch.no_grad(): assert gap(trainer.model.eval()(x), codec(x[:, None])[:, 0]) < 1e-5
    assert all(p.requires_grad for p in trainer.model.parameters())

@pytest.mark.parametrize('stage', [1, 3])
@torch.enable_grad()
def test_a_trained_codec_goes_on_where_it_was(stage, tmp_path):
    "Batch norms with an old memory must not make another codec of it."
    from midas_ref.codec.train import codec_trainer, train_codec
    codec = video(replace(LIGHT, decoder_norm='batch'))
    for m in codec.decoder.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, .05); m.running_var.fill_(.01); torch.nn.init.normal_(m.weight, 0, .2)
    codec.eval().save(tmp_path/'start'); x = clip(8, 1, 128, 128); shape = (8, 1) if stage == 3 else (8,)
    batch = x.view(*shape, *x.shape[-3:]), torch.rand(*shape, 2, 128, 128)
    def first(settled):
        trainer = codec_trainer(stage, tmp_path/'start', lr=1e-9); assert not trainer.settled
        with torch.no_grad(): want = trainer.model.eval().decoder(trainer.model.encoder(batch[0])); trainer.model.train()
        trainer.settled = settled; train_codec(trainer, lambda: batch, 0, tmp_path/f'{settled}', steps=1, say=None)
        with torch.no_grad(): return gap(trainer.model.decoder(trainer.model.encoder(batch[0])), want), gap(trainer.ema.decoder(trainer.ema.encoder(batch[0])), want)
    assert first(False)[0] < .05 and first(False)[1] < .05
    if stage == 1: assert first(True)[0] > .3                                  # without it: another codec

@torch.enable_grad()
def test_a_decoder_may_learn_alone(tmp_path):
    "Latents and their fingerprint stay to the bit; the pictures change."
    from midas_ref.codec.train import codec_trainer, train_codec
    codec = video(replace(LIGHT, decoder_norm='batch')); codec.save(tmp_path/'start', torch.float16); codec = load_dcae(tmp_path/'start', cls=VideoDCAE)
    batch = clip(2, 2, 128, 128), torch.rand(2, 2, 2, 128, 128)
    train_codec(codec_trainer(3, tmp_path/'start', lr=1e-3, parts='decoder'), lambda: batch, 0, tmp_path/'run', steps=3, say=None)
    after = load_dcae(tmp_path/'run'/'codec', cls=VideoDCAE)
    with torch.no_grad(): z = codec.encode(batch[0]); assert torch.equal(after.encode(batch[0]), z) and gap(after.decode(z), codec.decode(z)) > 1e-4
    assert after.fingerprint(decoder=False) == codec.fingerprint(decoder=False) and after.fingerprint() != codec.fingerprint()
    with pytest.raises(ValueError, match="accepted: 'all', 'time' or 'decoder'"): codec_trainer(3, tmp_path/'start', parts='encoder')

def test_squares_prefer_a_guess():
    "A spot at one of four places: absolute errors are lowest without it, the error of detail with a quarter of it at all four."
    from midas_ref.codec.train import detail_error
    spot = torch.zeros(1, 1, 64, 64); spot[..., 30:32, 20:22] = -.4
    places = [spot.roll(k, -1) for k in (0, 4, 8, 12)]
    guess, none = sum(places)/4, torch.zeros_like(spot)
    mean = lambda error, p: sum(error(p, t) for t in places).item()/4
    assert mean(lambda p, t: (p - t).abs().mean(), none) < mean(lambda p, t: (p - t).abs().mean(), guess)
    assert mean(detail_error, none) > mean(detail_error, guess) > 0 and detail_error(spot, spot) == 0
    assert detail_error(spot + .3, spot) < 1e-6                                # brightness is no detail

def test_norms_that_are_not_trained_stay():
    from midas_ref.codec.train import settle_norms
    codec = image(replace(LIGHT, decoder_norm='batch')); x = torch.rand(4, 3, 128, 128)*2 - 1
    codec.decoder.stages.requires_grad_(False)
    frozen = {k: v.clone() for k, v in codec.decoder.stages.state_dict().items()}
    settle_norms(codec, [x])
    assert all(torch.equal(v, frozen[k]) for k, v in codec.decoder.stages.state_dict().items())
    codec.decoder.stages.requires_grad_(True); settle_norms(codec, [x])
    assert not all(torch.equal(v, frozen[k]) for k, v in codec.decoder.stages.state_dict().items())

def test_freckles_are_given_to_light_skins_alone():
    from midas_ref.data.portraits import Identity
    from midas_ref.data.probes import person
    born, given = [Identity.random(i) for i in range(300)], [person(i, .5) for i in range(300)]
    assert [person(i) for i in range(50)] == born[:50] and given == [person(i, .5) for i in range(300)]
    changed = [a for a, b in zip(given, born) if a != b]; light = sum(b.skin < .45 for b in born)
    assert .35*light < len(changed) < .65*light and all(a.skin < .45 and .5 <= a.freckles <= 1 for a in changed)

def twins_of(cls, frames=None):
    "A batch of eight from two people, one with light plain skin (seed 8) and one without (seed 10)."
    from midas_ref.codec import train as T
    from midas_ref.data.probes import People, mouth_pool
    people = People(2, mouth_pool(1), 8, views=(1, 1), freckled=None); people.seeds[1] = 10      # the second is taken for somebody who cannot have freckles
    return T.Twins(people, (2, 4))() if frames is None else T.TwinClips(people, T.motion_pool(2), (8, frames))()

@pytest.mark.parametrize('cls, frames', [('Twins', None), ('TwinClips', 2)])
def test_twins_differ_in_freckles_alone(cls, frames):
    from midas_ref.codec.train import twin_error
    x, masks = twins_of(cls, frames)
    fours = x.unflatten(0, (-1, 4)); apart = (fours[:, 2:] - fours[:, :2]).abs().flatten(2)
    same = apart.mean(-1) < .03
    assert x.shape[:-3] == ((8,) if frames is None else (8, 2)) and masks.shape[-3] == 2
    assert same.any() and not same.all() and (apart[same] > .02).float().mean() < .05 and apart[same].max() > .1     # a few spots, and nothing else
    assert twin_error(x, x) == 0 and abs(twin_error(fours[:, [0, 1, 0, 1]].flatten(0, 1), x).item() - .6931) < 1e-3
    half = fours.clone(); half[:, 2:][same] = (fours[:, :2][same] + fours[:, 2:][same])/2
    assert abs(twin_error(half.flatten(0, 1), x).item() - .2231) < 1e-3                     # half of each spot: log(1 + 1/4)
    other = fours.clone(); other[:, 2:][~same] = 0
    assert twin_error(other.flatten(0, 1), x) == 0                                          # who is no twin does not count

def test_twins_come_in_fours():
    from midas_ref.codec import train as T
    people = type('P', (), dict(layers=range(8), device='cpu'))()
    for source, batch in ((T.Twins, (2, 3)), (T.TwinClips, (6, 2))):
        with pytest.raises(ValueError, match='in fours'): (source(people, batch) if source is T.Twins else source(people, torch.zeros(1, 4, 27), batch)).draw()

def test_twins_are_disturbed_alike():
    from midas_ref.codec.train import SpatialTrainer
    from midas_ref.data.probes import new_probe
    trainer = SpatialTrainer(image(LIGHT), new_probe('a'), z_noise=.2)
    trainer.encode = lambda x: x; trainer.decode = lambda z: z
    x = torch.randn(8, 64, 4, 4)
    for weight, alike in ((.3, True), (0., False)):
        trainer.w['twin'] = weight
        noise = (trainer.through(x) - x).unflatten(0, (2, 4))
        assert torch.allclose(noise[:, :2], noise[:, 2:], atol=1e-6) == alike and not torch.allclose(noise[:, 0], noise[:, 1], atol=1e-6)

@pytest.mark.parametrize('more, says', [(['--batch', '6'], 'a multiple of 4'), (['--data', 'shards'], 'recordings have no twins'), (['--people', '3'], '4 or more'), (['--freckled', '.5'], 'exclude each other'), (['--weight', 'twin=.3'], 'accepted: one of pixel')])
def test_twins_are_refused_where_there_are_none(more, says, tmp_path, capsys):
    from midas_ref.cli import main
    assert main(['train', 'codec', str(tmp_path/'run'), '--twins', '.3', '--device', 'cpu', *more]) == 2
    out = capsys.readouterr().err
    assert says in out and out.count('\n') == 1

@pytest.mark.parametrize('given, says', [('freckles=1', 'accepted: one of pixel'), ('detail=many', 'a number'), ('detail', 'a number'), ('pixel=-1', 'a number')])
def test_weights_of_errors_are_checked(given, says, tmp_path, capsys):
    from midas_ref.cli import main
    assert main(['train', 'codec', str(tmp_path/'run'), '--weight', given, '--device', 'cpu', '--people', '2']) == 2
    out = capsys.readouterr().err
    assert says in out and out.count('\n') == 1

def test_noise_in_training_differs_from_picture_to_picture():
    from midas_ref.codec.train import SpatialTrainer
    from midas_ref.data.probes import new_probe
    trainer = SpatialTrainer(image(LIGHT), new_probe('a'), z_noise=.2)
    trainer.encode = lambda x: x; trainer.decode = lambda z: z
    x = torch.randn(400, 64, 4, 4)
    share = (trainer.through(x) - x).flatten(1).std(1)                          # the latents have deviation 1
    assert .19 < share.max() < .22 and share.median() < .07 and (share < .02).float().mean() > .2

@torch.enable_grad()
def test_the_adversary_has_a_fixed_share_of_the_gradient(monkeypatch):
    from midas_ref.codec import train as T
    from midas_ref.data.probes import new_probe
    trainer, asked = T.SpatialTrainer(image(LIGHT), new_probe('a')), []
    def pulled(share, size):
        y = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        parts = T.pull(y, size*y.square().sum(), trainer.critic, share)
        return ((y.grad - 2*size*y.detach()).norm()/(2*size*y.detach()).norm()).item(), set(parts)
    for size in (1e-3, 1e3):                                                   # however long the gradient of the errors is
        for share in (.1, .2): assert pulled(share, size) == (pytest.approx(share, abs=1e-3), {'critic'})
    assert pulled(0., 1.) == (0., set())
    assert all(p.grad is None for p in trainer.critic.parameters())            # it learns from its own loss alone
    whole = T.pull
    monkeypatch.setattr(T, 'pull', lambda y, loss, critic, share, beside=None: asked.append(share) or whole(y, loss, critic, share, beside))
    for progress in (.5, .66, .71, .9): trainer.update(torch.rand(2, 3, 64, 64), torch.rand(2, 2, 64, 64), progress)
    assert asked == pytest.approx([0, 0, .1, .2])

def test_stock_shows_each_picture_as_often_as_told():
    from midas_ref.codec.train import DrawnPictures
    class Counted(DrawnPictures):
        def __init__(self, reuse): super().__init__(type('Nobody', (), dict(layers=range(4)))(), (2, 1), 0, 2, reuse); self.k = 0
        def draw(self): self.k += 1; return (torch.full((2*self.groups, self.sets, 1, 1, 1), float(self.k)),)
    for reuse in (1, 3):
        draw, seen = Counted(reuse), []
        for _ in range(60): seen.append(int(draw()[0].flatten()[0]))
        assert all(seen.count(k) == 2*reuse for k in range(reuse, draw.k - reuse)) and len(set(seen[:2])) == 1
    assert len(set(seen[6:12])) > 1                                            # new ones come between

@pytest.mark.parametrize('stage', [1, 3])
def test_latents_can_be_kept(stage, tmp_path):
    from midas_ref.codec.train import codec_trainer
    old = video(); old.save(tmp_path/'old')
    g = torch.Generator().manual_seed(1)
    x, masks = torch.rand(2, 3, 256, 256, generator=g)*2 - 1, torch.rand(2, 2, 256, 256, generator=g)
    if stage == 3: x, masks = x[None], masks[None]
    def strayed(keep):
        trainer = codec_trainer(stage, tmp_path/'old', lr=1e-2, keep=keep)
        was = {k: v.clone() for k, v in trainer.home.state_dict().items()} if keep else {}
        with torch.enable_grad(): parts = [trainer.update(x, masks, p) for p in (.0, .3, .9)]                # with the adversary in the last
        if keep: assert all(torch.equal(v, trainer.home.state_dict()[k]) for k, v in was.items()) and all('stray' in p for p in parts)
        new = trainer.model.eval()
        z = new.encoder(x) if stage == 3 else new.encoder(x)[:, None]
        return ((z - old.encoder(x if stage == 3 else x[:, None]))/old.std[:, None, None]).square().mean().item()
    free, kept = strayed(0.), strayed(100.)
    assert kept < .5*free
    with pytest.raises(ValueError, match='give its folder'): codec_trainer(1, cfg=LIGHT, keep=1.)

def test_an_error_beside_the_pictures_reaches_the_weights():
    from midas_ref.codec.train import pull
    w = torch.tensor([2.], requires_grad=True)
    for share in (0., .5):
        w.grad = None
        with torch.enable_grad():
            y = w.view(1, 1, 1, 1)*torch.ones(1, 3, 2, 2)
            pull(y, y.sum(), lambda v: v.sum((1, 2, 3)), share, w.square().sum())
        alone = 12. if not share else 12. - .5*12.                                                            # the adversary pulls the other way, half as long
        assert w.grad.item() == pytest.approx(alone + 4., rel=1e-4)
