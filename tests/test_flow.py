import dataclasses
"""Noise, flow and heads: parity with diffusers, number types, errors, and what each head may and may not see."""
import copy
from dataclasses import replace
import numpy as np
import pytest, torch
from torch import nn
from midas_ref.config import HeadConfig, NoiseConfig, head_cost, preset
from midas_ref.model.flow import T_SAMPLERS, flow_loss, sample, sample_t, step_sigmas, velocity
from midas_ref.model.head import DiTHead, MLPHead, grid_positions, make_head, sinusoid
from midas_ref.model.noise import NoiseEmbedding, add_noise, draw_ids, noise_sigmas

SMALL = HeadConfig(width=48, layers=3, heads=4)

@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0)
    with torch.no_grad(): yield

def shake(model, std=.3, gain=1.):
    "Random weights everywhere, so that nothing hides behind zeros."
    for p in model.parameters(): nn.init.normal_(p, std=std if p.ndim < 2 else gain/p.shape[-1]**.5)
    return model.eval()

def gap(a, b): return ((a - b).abs().max() / b.abs().max()).item()

# --- noise -------------------------------------------------------------------------------------------

def test_levels():
    s = noise_sigmas(preset('paper').noise)
    assert len(s) == 20 and s[0] == 0 and s[-1] == .5 and torch.allclose(s.diff(), torch.tensor(.5/19))
    assert noise_sigmas(NoiseConfig(levels=1)).tolist() == [0]

def test_noise_is_per_frame():
    sig, x, e = noise_sigmas(NoiseConfig()), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    ids = torch.tensor([[0, 7, 19], [3, 3, 0]])
    y = add_noise(x, ids, e, sig)
    for b in range(2):
        for t in range(3): assert torch.allclose(y[b, t], (1 - sig[ids[b, t]])*x[b, t] + sig[ids[b, t]]*e[b, t], atol=1e-7)
    assert torch.equal(y[0, 0], x[0, 0]) and torch.equal(y[1, 2], x[1, 2])
    assert add_noise(x.bfloat16(), ids, e.bfloat16(), sig).dtype == torch.bfloat16

@pytest.mark.parametrize('ids', [torch.tensor([[20, 0, 0]]), torch.tensor([[-1, 0, 0]])])
def test_level_out_of_range(ids):
    x = torch.randn(1, 3, 4, 5)
    with pytest.raises(IndexError): add_noise(x, ids, x, noise_sigmas(NoiseConfig()))
    with pytest.raises(IndexError): NoiseEmbedding(20, 8)(ids)

def test_noise_errors():
    x, sig = torch.randn(2, 3, 4, 5), noise_sigmas(NoiseConfig())
    with pytest.raises(ValueError, match=r'one id per frame, \(2, 3\)'): add_noise(x, torch.zeros(2, dtype=torch.long), x, sig)
    with pytest.raises(ValueError, match='that of the latents'): add_noise(x, torch.zeros(2, 3, dtype=torch.long), x[:1], sig)
    with pytest.raises(ValueError, match='high is 1.5'): draw_ids((2,), 20, 1.5)

@pytest.mark.parametrize('high', [0., .3, .8, 1.])
def test_ids_follow_their_law(high):
    ids = draw_ids((200_000,), 20, high, torch.Generator().manual_seed(0))
    assert ids.min() >= 0 and ids.max() <= 19 and ids.dtype == torch.long
    edges = (torch.arange(21, dtype=torch.float64)/20)**(1/(1 - high)) if high < 1 else torch.cat([torch.zeros(20), torch.ones(1)]).double()
    assert (ids.bincount(minlength=20)/len(ids) - edges.diff()).abs().max() < .005
    assert torch.equal(ids, draw_ids((200_000,), 20, high, torch.Generator().manual_seed(0)))

def test_embedding_starts_silent_and_learns_only_used_levels():
    e = NoiseEmbedding(20, 8)
    assert e(torch.randint(20, (2, 3))).abs().max() == 0 and e(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 8)
    with torch.enable_grad(): (e(torch.tensor([4, 4, 9])) + 1).square().sum().backward()
    assert e.table.grad.abs().sum(1).nonzero().flatten().tolist() == [4, 9]

# --- flow --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, scheme', [('logit_normal', 'logit_normal'), ('uniform', 'none')])
def test_t_is_that_of_diffusers(kind, scheme):
    u = pytest.importorskip('diffusers.training_utils').compute_density_for_timestep_sampling
    a = sample_t(512, kind, torch.Generator().manual_seed(3))
    b = u(scheme, 512, logit_mean=0., logit_std=1., generator=torch.Generator().manual_seed(3))
    assert torch.equal(a, b)

def test_grid_is_the_samplers():
    assert step_sigmas(4).tolist() == [1, .75, .5, .25, 0]
    assert sorted(set(sample_t(400, 'grid').tolist())) == [.25, .5, .75, 1]
    assert sorted(set(sample_t(400, 'grid', steps=2).tolist())) == [.5, 1]

def test_mixed_is_half_of_each():
    t = sample_t(20_000, 'mixed', torch.Generator().manual_seed(0))
    on = torch.isin(t, step_sigmas(4)[:4])
    assert abs(on.float().mean() - .5) < .02 and all(abs((t == s).float().mean() - .125) < .01 for s in step_sigmas(4)[:4])
    off = t[~on]
    assert abs((off < .5).float().mean() - .5) < .02 and abs((off < .2).float().mean() - .083) < .01      # logit-normal

def test_sampler_starts_where_it_is_told():
    "The head is asked for the times from there on, and steps reach 0."
    asked, x1, z = [], torch.randn(2, 3, 4), torch.zeros(2, 3, 1)
    out = sample(lambda x, t, z: asked.append(t[0].item()) or torch.ones_like(x), z, x1, 4, .8)
    assert torch.allclose(torch.tensor(asked), torch.tensor([.8, .6, .4, .2])) and torch.allclose(out, x1 - .8)
    assert torch.allclose(step_sigmas(4, .8), torch.tensor([.8, .6, .4, .2, 0]))
    for bad in (0, 1.1, -1): pytest.raises(ValueError, step_sigmas, 4, bad)

@pytest.mark.parametrize('temperature', [.5, torch.tensor([[0.], [1.], [2.]])])
def test_temperature_scales_the_noise(temperature):
    "Of all tokens, or of each."
    x1, z = torch.randn(2, 3, 4), torch.zeros(2, 3, 1)
    seen = []
    sample(lambda x, t, z: seen.append(x) or torch.zeros_like(x), z, x1, 4, temperature=temperature)
    assert torch.equal(seen[0], x1*temperature)

@pytest.mark.parametrize('kind', T_SAMPLERS)
def test_t_types_and_range(kind):
    t = sample_t(1000, kind)
    assert t.dtype == torch.float32 and t.shape == (1000,) and t.min() >= 0 and t.max() <= 1

@pytest.mark.parametrize('steps', [1, 2, 4, 8])
def test_sampler_is_that_of_diffusers(steps):
    S = pytest.importorskip('diffusers').FlowMatchEulerDiscreteScheduler
    head, z, x = shake(make_head(SMALL, 16, 8, 2, 3)), torch.randn(2, 6, 16), torch.randn(2, 6, 8)
    ours, s = sample(head, z, x, steps), S()
    s.set_timesteps(sigmas=np.linspace(1, 1/steps, steps))
    for i, t in enumerate(s.timesteps): x = s.step(head(x, (t/1000).expand(2), z), t, x).prev_sample
    assert gap(ours, x) < 1e-6

@pytest.mark.parametrize('steps', [1, 4, 16])
def test_oracle_recovers_data(steps):
    x0, x1 = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    assert (sample(lambda x, t, z: velocity(x0, x1), x0, x1, steps) - x0).abs().max() < 1e-6

def test_time_step_is_exact_in_half_precision():
    "Steps add up in single precision even if the head computes in bf16."
    seen = []
    def head(x, t, z): seen.append((t.dtype, t[0].item(), x.dtype)); return torch.zeros_like(x).bfloat16()
    x1 = torch.randn(2, 3, 4).bfloat16()
    assert torch.equal(sample(head, x1, x1), x1)
    assert seen == [(torch.float32, t, torch.float32) for t in (1., .75, .5, .25)]

def test_loss_of_the_oracle_is_zero_and_shapes():
    x0, z = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    def oracle(x, t, c):                                                     # knows x0: v = (x_t - x0) / t
        return (x - x0.repeat(len(x)//3, 1, 1)) / t[:, None, None]
    out = flow_loss(oracle, x0, z, 'grid', repeats=2)
    assert out['loss'] < 1e-10 and out['per_token'].shape == (2, 3, 5) and out['t'].shape == (2, 3)
    assert out['x0_hat'].shape == (2, 3, 5, 4) and (out['x0_hat'] - x0).abs().max() < 1e-6

def test_loss_gives_the_head_what_it_needs():
    "One t per row, x_t on the path, rows matched with their conditions."
    x0, z = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    def head(x, t, c):
        assert torch.equal(c, z.repeat(4, 1, 1)) and t.shape == (12,) and t.unique().numel() == 12
        x1 = (x - (1 - t[:, None, None])*x0.repeat(4, 1, 1)) / t[:, None, None]
        assert abs(x1.mean()) < .25 and abs(x1.std() - 1) < .2
        return torch.zeros_like(x)
    out = flow_loss(head, x0, z, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(out['loss'], out['per_token'].mean())

def test_weights():
    x0, z = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    run = lambda w: flow_loss(lambda x, t, c: torch.zeros_like(x), x0, z, weight=w, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([1., 0., 1.]).view(3, 1, 1)
    out = run(keep)
    assert torch.allclose(out['loss'], out['per_token'][:, [0, 2]].mean())
    assert torch.allclose(run(3*keep)['loss'], out['loss']) and torch.allclose(run(torch.ones(4))['loss'], run(None)['loss'])
    assert run(torch.zeros(3, 1, 1))['loss'] == 0

def test_flow_errors():
    x0, z = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    with pytest.raises(ValueError, match="'cosine'; accepted: 'uniform', 'logit_normal', 'grid'"): sample_t(4, 'cosine')
    with pytest.raises(ValueError, match="'cosine'"): flow_loss(None, x0, z, 'cosine')
    with pytest.raises(ValueError, match='same rows and tokens'): flow_loss(None, x0, z[:, :4])
    with pytest.raises(ValueError, match='repeats is 0'): flow_loss(None, x0, z, repeats=0)
    with pytest.raises(ValueError, match='steps is 0'): step_sigmas(0)

# --- heads -------------------------------------------------------------------------------------------

def pixart(h, w, d, layers, heads, channels, cond, base):
    "A random PixArt of these sizes whose cross-attention adds nothing."
    diffusers = pytest.importorskip('diffusers')
    m = diffusers.PixArtTransformer2DModel(num_attention_heads=heads, attention_head_dim=d//heads, in_channels=channels, out_channels=channels, num_layers=layers,
        cross_attention_dim=d, sample_size=base, patch_size=1, caption_channels=cond, interpolation_scale=1, use_additional_conditions=False)
    shake(m)
    for b in m.transformer_blocks: nn.init.zeros_(b.attn2.to_out[0].weight); nn.init.zeros_(b.attn2.to_out[0].bias)
    return m.eval()

def from_pixart(state, head):
    "Weights of a PixArt under our names; the condition's projection stays ours."
    names = {'embed.weight': 'pos_embed.proj.weight', 'embed.bias': 'pos_embed.proj.bias', 'table': 'scale_shift_table', 'out.weight': 'proj_out.weight', 'out.bias': 'proj_out.bias'}
    for k in ('weight', 'bias'):
        names |= {f'time.{2*i}.{k}': f'adaln_single.emb.timestep_embedder.linear_{i+1}.{k}' for i in (0, 1)} | {f'modulation.{k}': f'adaln_single.linear.{k}'}
    out = {n: state[p].flatten(1) if state[p].ndim == 4 else state[p] for n, p in names.items()}
    for i in range(len(head.blocks)):
        a, b = f'blocks.{i}.', f'transformer_blocks.{i}.'
        out[a + 'table'] = state[b + 'scale_shift_table']
        for k in ('weight', 'bias'):
            out[f'{a}qkv.{k}'] = torch.cat([state[f'{b}attn1.to_{c}.{k}'] for c in 'qkv'])
            for ours, theirs in (('proj', 'attn1.to_out.0'), ('ff.0', 'ff.net.0.proj'), ('ff.2', 'ff.net.2')): out[f'{a}{ours}.{k}'] = state[f'{b}{theirs}.{k}']
    return out | {k: v for k, v in head.state_dict().items() if k.startswith('cond.')}

@pytest.mark.parametrize('h, w', [(6, 10), (10, 6), (4, 4)])
def test_parity_with_pixart(h, w):
    ref = pixart(h, w, 64, 3, 4, 8, 24, base=8)
    head = DiTHead(replace(SMALL, width=64), 24, 8, h, w, base=8)
    head.load_state_dict(from_pixart(ref.state_dict(), head), strict=True)
    x, t = torch.randn(2, 8, h, w), torch.tensor([.25, .9])
    theirs = ref(x, encoder_hidden_states=torch.randn(2, 5, 24), timestep=1000*t, encoder_attention_mask=None).sample
    ours = head(x.flatten(2).mT, t, torch.zeros(2, h*w, 24))
    assert gap(ours.mT.unflatten(-1, (h, w)), theirs) < 1e-6

def test_sinusoid_and_positions_are_those_of_diffusers():
    e = pytest.importorskip('diffusers.models.embeddings')
    t = torch.rand(64)
    assert torch.equal(sinusoid(t), e.get_timestep_embedding(1000*t, 256, flip_sin_to_cos=True, downscale_freq_shift=0))
    assert torch.equal(sinusoid(t.bfloat16()), sinusoid(t.bfloat16().float()))           # 1000 t is never rounded to half precision
    for h, w, base in ((6, 10, 32), (10, 6, 8), (5, 5, 5)):
        assert torch.equal(grid_positions(h, w, 48, base), e.get_2d_sincos_pos_embed(48, (h, w), base_size=base, output_type='pt').float())
    assert torch.equal(grid_positions(5, 5, 48), grid_positions(5, 5, 48, 5))

@pytest.mark.parametrize('name', ['tiny', 'paper'])
def test_dit_has_the_weights_that_page_00_counts(name):
    cfg = preset(name)
    with torch.device('meta'): head = make_head(cfg.head, cfg.backbone.width, cfg.codec.latent_channels, *cfg.video.latent)
    n = sum(p.numel() for p in head.parameters())
    assert n == head_cost(cfg.head, cfg.video.tokens, cfg.backbone.width, cfg.codec.latent_channels).params
    mlp = dataclasses.replace(cfg.head, kind='mlp')
    with torch.device('meta'): other = make_head(mlp, cfg.backbone.width, cfg.codec.latent_channels, cfg.video.height//64, cfg.video.width//64)
    assert sum(p.numel() for p in other.parameters()) == head_cost(mlp, cfg.video.tokens, cfg.backbone.width, cfg.codec.latent_channels).params
    assert name == 'tiny' or n == 458_643_584

@pytest.mark.parametrize('layers, width, millions, twice', [(6, 1024, 35.7, 16), (8, 1280, 72.2, 16), (12, 1536, 151.2, 16)])
def test_mlp_has_the_weights_of_mar(layers, width, millions, twice):
    "MAR's head also predicts a variance: twice the output channels."
    with torch.device('meta'): head = MLPHead(HeadConfig(kind='mlp', layers=layers, width=width, heads=8), {6: 768, 8: 1024, 12: 1280}[layers], 16, 1, 1)
    n = sum(p.numel() for p in head.parameters()) + twice*(width + 1)
    assert abs(n/1e6 - millions) < .06

@pytest.mark.parametrize('kind', ['dit', 'mlp'])
@pytest.mark.parametrize('h, w', [(4, 4), (6, 10), (1, 3)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_any_grid_and_number_type(kind, h, w, dtype):
    head = shake(make_head(replace(SMALL, kind=kind), 16, 8, h, w), .1, .7)
    x, t, z = torch.randn(2, h*w, 8), torch.tensor([.3, 1.]), torch.randn(2, h*w, 16)
    y = copy.deepcopy(head).to(dtype)(x, t, z)
    assert y.dtype == dtype and y.shape == x.shape and gap(y.double(), head(x, t, z).double()) < (.06 if dtype == torch.bfloat16 else 1e-5)

@pytest.mark.parametrize('kind', ['dit', 'mlp'])
def test_starts_at_zero_and_everything_learns(kind):
    head = make_head(replace(SMALL, kind=kind), 16, 8, 2, 3)
    x, t, z = torch.randn(4, 6, 8), torch.rand(4), torch.randn(4, 6, 16)
    assert head(x, t, z).abs().max() == 0
    with torch.enable_grad():
        opt = torch.optim.SGD(head.parameters(), .1)
        for _ in range(4): opt.zero_grad(); (head(x, t, z) - x.roll(1, 1)).square().mean().backward(); opt.step()
    assert not [n for n, p in head.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]

@pytest.mark.parametrize('where', ['x', 'z'])
def test_mlp_keeps_tokens_apart_and_dit_mixes_them(where):
    for kind in ('mlp', 'dit'):
        head = shake(make_head(replace(SMALL, kind=kind), 16, 8, 2, 3))
        x, t, z = torch.randn(1, 6, 8), torch.tensor([.4]), torch.randn(1, 6, 16)
        other = dict(x=x, z=z); other[where] = other[where].clone(); other[where][:, 2] += 1
        moved = (head(other['x'], t, other['z']) - head(x, t, z)).abs().amax((0, 2)) > 0
        assert moved.tolist() == ([False, False, True, False, False, False] if kind == 'mlp' else [True]*6)

def test_each_token_of_the_dit_has_its_own_condition():
    "With attention silenced, a hidden state acts on its own token and on no other."
    head = shake(make_head(SMALL, 16, 8, 2, 3))
    for b in head.blocks: nn.init.zeros_(b.proj.weight); nn.init.zeros_(b.proj.bias)
    x, t, z = torch.randn(1, 6, 8), torch.tensor([.4]), torch.randn(1, 6, 16)
    for end in (False, True):                                                # with the modulation of the blocks, then through the final layer alone
        other = z.clone(); other[:, 2] += 1
        if end: nn.init.zeros_(head.modulation.weight)
        moved = (head(x, t, other) - head(x, t, z)).abs().amax((0, 2)) > 0
        assert moved.tolist() == [False, False, True, False, False, False]

@pytest.mark.parametrize('kind', ['dit', 'mlp'])
def test_rows_are_apart(kind):
    head = shake(make_head(replace(SMALL, kind=kind), 16, 8, 2, 3))
    x, t, z = torch.randn(3, 6, 8), torch.rand(3), torch.randn(3, 6, 16)
    for i in range(3): assert gap(head(x[i:i+1], t[i:i+1], z[i:i+1]), head(x, t, z)[i:i+1]) < 1e-5

@pytest.mark.parametrize('kind', ['dit', 'mlp'])
def test_loads_from_meta(kind):
    "A head built without memory works once weights are assigned: positions are no weights and are there already."
    cfg = replace(SMALL, kind=kind)
    a = shake(make_head(cfg, 16, 8, 2, 3))
    with torch.device('meta'): b = make_head(cfg, 16, 8, 2, 3)
    b.load_state_dict(a.state_dict(), assign=True)
    x, t, z = torch.randn(1, 6, 8), torch.rand(1), torch.randn(1, 6, 16)
    assert torch.equal(a(x, t, z), b(x, t, z)) and not any('positions' in k for k in a.state_dict())

@pytest.mark.parametrize('kind', ['dit', 'mlp'])
def test_head_errors(kind):
    head = make_head(replace(SMALL, kind=kind), 16, 8, 2, 3)
    x, t, z = torch.randn(2, 6, 8), torch.rand(2), torch.randn(2, 6, 16)
    with pytest.raises(ValueError, match=r'x has shape \(2, 5, 8\); this head accepts \(2, 6, 8\)'): head(x[:, :5], t, z)
    with pytest.raises(ValueError, match=r't has shape'): head(x, t[:1], z)
    with pytest.raises(ValueError, match=r'z has shape'): head(x, t, z[..., :4])
    with pytest.raises(ValueError, match="'dit' or 'mlp'"): HeadConfig(kind='unet')
    with pytest.raises(ValueError, match='a multiple of 4'): DiTHead(HeadConfig(width=6, heads=2), 4, 4, 1, 1)

def test_known_times_are_the_same_network():
    head = shake(make_head(SMALL, 16, 8, 2, 3))
    x, z = torch.randn(2, 6, 8), torch.randn(2, 6, 16)
    flows = head.at([1., .3, 0.], z)
    for t, f in zip((1., .3, 0.), flows): assert gap(f(x), head(x, torch.full((2,), t), z)) < 1e-5
    assert gap(flows[0](x), flows[1](x)) > 1e-2
    assert gap(sample(head, z, x), sample(lambda *a: head(*a), z, x)) < 1e-5
    with pytest.raises(ValueError, match='z has shape'): head.at([1.], z[:, :5])
    for wrong in (x[:1], x[:, :5], x[..., :4]):                                     # one row must not be spread over two
        with pytest.raises(ValueError, match='x has shape'): sample(head, z, wrong)

@pytest.mark.parametrize('kind', ['dit', 'mlp'])
def test_sampler_is_one_graph(kind):
    "No decision on data, no number fetched from a device: the tracer finds one graph without a break."
    head = shake(make_head(replace(SMALL, kind=kind), 16, 8, 2, 3))
    z, x = torch.randn(2, 6, 16), torch.randn(2, 6, 8)
    whole = torch.compile(lambda z, x: sample(head, z, x), backend='eager', fullgraph=True)
    assert gap(whole(z, x), sample(head, z, x)) < 1e-5

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize('kind', ['dit', 'mlp'])
def test_sampler_in_a_cuda_graph(kind):
    "Fixed shapes and no decision on data: four steps are captured and replayed with other inputs."
    head = shake(make_head(replace(SMALL, kind=kind), 16, 8, 2, 3)).cuda()
    z, x = torch.randn(2, 6, 16).cuda(), torch.randn(2, 6, 8).cuda()
    side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): sample(head, z, x)
    torch.cuda.current_stream().wait_stream(side)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): y = sample(head, z, x)
    z.normal_(); x.normal_(); g.replay()
    assert gap(y, sample(head, z, x)) < 1e-5
