"The backbone: parity with transformers, one answer from training, growing cache and ring, sessions that cannot be mixed up, weights by name."
import dataclasses
import pytest, torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from midas_ref.config import BackboneConfig, preset
from midas_ref.model.backbone import Backbone, Rotary, backbone_config, qwen_config, replay, ring_mask
from midas_ref.model.mask import mask_loop
from midas_ref.model.tokens import Layout, chunk_layout
from midas_ref.streaming import Streaming, stack, unstack

SMALL = BackboneConfig(width=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=48, name='')
LAYOUT = Layout((('audio', 3), ('text', 2)), frame_tokens=3, frames=3)
D = SMALL.width

def loud(net, seed=0):
    "Random weights of full scale in every matrix, bias and norm: at deviation 0.02 a wrong mask hardly shows."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in net.named_parameters(): p.copy_(torch.randn(p.shape, generator=g)*(p.shape[1]**-.5 if p.ndim == 2 else .2) + ('norm' in n))
    return net.eval().requires_grad_(False)

def make(layout=LAYOUT, window=3, cfg=SMALL, full=False, seed=0): return loud(Backbone(cfg, layout, window, full), seed)
def rand(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def close(a, b, tol=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol, (a - b).abs().max()
def conditions(net, hidden): return hidden.unflatten(1, (-1, net.layout.tokens))[:, :, net.layout.predicts()].flatten(1, 2)
def parts(net, chunk):
    n, m = net.layout.frame_tokens, net.layout.condition_tokens
    return chunk.split([m, n] + [n]*net.layout.frames, 1)

def stock(net):
    "Qwen2Model of transformers with the same weights, its own angles and its own attention."
    c = qwen_config(net.cfg); c._attn_implementation = 'sdpa'
    q = Qwen2Model(c).eval()
    gap = q.load_state_dict(net.qwen.state_dict(), strict=False)
    assert (gap.missing_keys, gap.unexpected_keys) == (['embed_tokens.weight'], [])
    return q

# parity

@pytest.mark.parametrize('full', (False, True))
@pytest.mark.parametrize('cfg', (SMALL, BackboneConfig(24, 2, 3, 3, 8, 40, 1e4, ''), BackboneConfig(48, 2, 4, 1, 16, 32, 1e6, '')), ids=('groups', 'no groups', 'wide heads'))
def test_parity_with_transformers_under_the_mask_by_loops(cfg, full):
    net = make(cfg=cfg, full=full)
    x, allowed = rand(2, 5*LAYOUT.tokens, cfg.width), mask_loop(LAYOUT, 5, 3, full)
    with torch.no_grad(): want = stock(net)(inputs_embeds=x, attention_mask=allowed[None, None]).last_hidden_state
    close(net(x), want)
    close(net(x, allowed), want)
    close(net(x, torch.zeros(allowed.shape).masked_fill(~allowed, float('-inf'))), want)
    close(net(x, allowed.expand(2, 1, -1, -1)), want)
    assert (net(x, allowed.tril()) - want).abs().max() > .01         # it can fail

def test_forgetting_the_mask_is_an_error_and_would_have_been_wrong():
    net, n = make(), LAYOUT.frame_tokens
    x, start = rand(1, LAYOUT.tokens, D), LAYOUT.span('frame', 1).start
    q, allowed = stock(net), mask_loop(LAYOUT, 1, 3)[None, None]
    for mask, same in ((torch.ones(1, 1, n, start + n, dtype=torch.bool), True), (None, False)):
        cache = DynamicCache()
        with torch.no_grad():
            q(inputs_embeds=x[:, :start], attention_mask=allowed[..., :start, :start], past_key_values=cache)
            y = q(inputs_embeds=x[:, start:start+n], attention_mask=mask, past_key_values=cache).last_hidden_state
        assert ((y - net(x)[:, start:start+n]).abs().max() < 1e-5) == same
    with pytest.raises(ValueError, match='without a mask'): net.qwen(inputs_embeds=x)

def test_rotary_is_exact_late_and_equal_early():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
    theirs, ours, x = Qwen2RotaryEmbedding(qwen_config(SMALL)), Rotary(8, 1e6), torch.zeros(1)
    for a, b in zip(theirs(x, torch.arange(50)[None]), ours(x, torch.arange(50)[None])): close(a, b, 1e-5)
    p = 5_565_000
    import math
    angles = [p * 1e6**(-2*i/8) for i in range(4)]*2                # python floats are float64
    cos, sin = ours(x, torch.tensor([[p]]))
    close(cos[0, 0], torch.tensor([math.cos(a) for a in angles]), 1e-6); close(sin[0, 0], torch.tensor([math.sin(a) for a in angles]), 1e-6)
    net = make().to(torch.bfloat16).float()                          # a trip through bfloat16 spoils no frequency
    for a, b in zip(net.qwen.rotary_emb(x, torch.tensor([[p]])), (cos, sin)): assert torch.equal(a, b)

def test_published_size():
    with torch.device('meta'): net = Backbone(preset('paper').backbone, chunk_layout(preset('paper')), 8)
    assert sum(p.numel() for p in net.parameters()) == 2_774_773_760
    assert not [k for k in net.state_dict() if 'embed' in k or 'rotary' in k] and len(net.state_dict()) == 36*12 + 1

# three ways, one answer

@pytest.mark.parametrize('window', (1, 2, 8))
@pytest.mark.parametrize('frames', (1, 2, 3, 6))
def test_training_equals_ring_over_twenty_chunks(frames, window):
    net = make(Layout((('audio', frames), ('text', 2)), 3, frames), window)
    x = rand(2, 20*net.layout.tokens, D)
    close(replay(net, x, net.init_state(2)), conditions(net, net(x)))

@pytest.mark.parametrize('frames', (1, 2, 3))
def test_a_shorter_chunk_is_the_first_part_of_a_longer_one(frames):
    "With the count of the longer chunk, the others' tokens unseen; and streamed over windows as at once."
    whole = Layout((('audio', 6), ('pose', 12), ('text', 5)), 4, 6)
    short = Layout((('audio', frames), ('pose', 2*frames), ('text', 5)), 4, frames, like=whole)
    long, net = make(whole), make(short)
    there = [whole.span(s.kind, s.frame).start + i for s in short.spans for i in range(s.stop - s.start)]
    assert [short.rope(0, p) for p in range(short.tokens)] == there and short.rope(2, 0) == 2*round(whole.tokens*frames/6)
    x = rand(2, short.tokens, D)
    full = rand(2, whole.tokens, D, seed=5); full[:, there] = x
    mask = torch.eye(whole.tokens, dtype=torch.bool)
    mask[torch.tensor(there)[:, None], torch.tensor(there)] = mask_loop(short, 1, 3)
    close(net(x), long(full, mask)[:, there])
    assert (net(x) - make(dataclasses.replace(short, like=None))(x)).abs().max() > 1e-2
    x = rand(2, 9*short.tokens, D)
    close(replay(net, x, net.init_state(2)), conditions(net, net(x)))

def test_only_a_shorter_chunk_keeps_a_count():
    whole = Layout((('audio', 6), ('text', 2)), 4, 6)
    for wrong in (dict(frames=6), dict(frames=7), dict(conditions=(('audio', 3),)), dict(conditions=(('audio', 7), ('text', 2))), dict(conditions=(('text', 2), ('audio', 3)))):
        with pytest.raises(ValueError, match='accepted: a longer chunk with the same conditions'): dataclasses.replace(whole, **dict(frames=3) | wrong, like=whole)

@pytest.mark.parametrize('full', (False, True))
@pytest.mark.parametrize('names', ((), (('a', 1),), (('audio', 2), ('pose', 4), ('text', 3))), ids=len)
def test_other_layouts(names, full):
    net = make(Layout(names, 2, 2), 3, full=full)
    x = rand(1, 9*net.layout.tokens, D)
    close(replay(net, x, net.init_state()), conditions(net, net(x)))

@pytest.mark.parametrize('frames, window, chunks', [(LAYOUT.frames, 2, 6), (1, 8, 20), (2, 8, 20), (3, 8, 20), (6, 8, 20)])
def test_growing_cache_group_by_group_of_the_stock_model(frames, window, chunks):
    net = make(Layout((('audio', frames), ('text', 2)), 3, frames), window)
    layout = net.layout
    x, allowed, q, cache, out = rand(1, chunks*layout.tokens, D), mask_loop(layout, chunks, window)[None, None], stock(net), DynamicCache(), []
    edges = sorted({c*layout.tokens + e for c in range(chunks) for s in layout.spans if s.kind in ('reference', 'frame') for e in (s.start, s.stop)} | {0})
    with torch.no_grad():
        for a, b in zip(edges, edges[1:]):
            out.append(q(inputs_embeds=x[:, a:b], attention_mask=allowed[..., a:b, :b], position_ids=torch.arange(a, b)[None], past_key_values=cache).last_hidden_state)
    close(torch.cat(out, 1), net(x))
    close(conditions(net, torch.cat(out, 1)), replay(net, x, net.init_state()))

def test_late_chunks_are_as_good_as_early_ones():
    net, x = make(window=4), rand(3, 12*LAYOUT.tokens, D)
    base = torch.tensor([0, 7_413, 5_500_000//LAYOUT.tokens])
    s = net.init_state(3); net.seek(s, base)
    close(replay(net, x, s), conditions(net, net(x)))
    at = base[:, None]*LAYOUT.tokens + torch.arange(x.shape[1])
    close(net(x, positions=at), net(x))
    with pytest.raises(ValueError, match='seek works on new streams'): net.seek(s, 5)
    s.reset(1)
    assert net.memory(s)[0].tolist() == [12, 0, base[2].item() + 12]

@pytest.mark.parametrize('dtype, tol', ((torch.float64, 1e-5), (torch.bfloat16, .2)))
def test_other_number_types(dtype, tol):
    net, x = make().to(dtype), rand(1, 8*LAYOUT.tokens, D).to(dtype)
    s = net.init_state()
    y = replay(net, x, s)
    assert y.dtype == dtype == s.slots[':kv'].dtype
    close(y.float(), conditions(net, net(x)).float(), tol)

# past and future

def test_future_never_changes_the_past_and_the_past_counts():
    "Every token of chunk 1, in training and in the stream: outputs that may not see it stay bit for bit."
    net, T = make(window=2), LAYOUT.tokens
    x = rand(1, 4*T, D)
    allowed, whole, live = mask_loop(LAYOUT, 4, 2), net(x), replay(net, x, net.init_state())
    seen = allowed.float()
    for _ in range(SMALL.layers - 1): seen = ((seen @ allowed.float()) > 0).float()      # what reaches through the layers
    for i in range(T, 2*T):
        y = x.clone(); y[:, i] += 1
        moved = (net(y) - whole)[0].abs().amax(-1)
        assert torch.equal(moved > 0, seen[:, i] > 0), i
        place = i - T
        first = LAYOUT.frames + max(0, (place - LAYOUT.condition_tokens)//LAYOUT.frame_tokens)
        frames = (replay(net, y, net.init_state()) - live).abs().amax((0, 2, 3))
        assert not frames[:first].any() and frames[first:].all(), i

def test_one_layer_sees_the_window_and_nothing_else():
    "With one layer nothing seeps: a chunk older than the window has no effect, and the oldest chunk inside it has."
    net, T, f = make(window=3, cfg=BackboneConfig(32, 1, 4, 2, 8, 48, name='')), LAYOUT.tokens, LAYOUT.frames
    x = rand(1, 9*T, D)
    last = replay(net, x, net.init_state())[:, -f:]
    for age in range(9):
        y = x.clone(); y[:, (8-age)*T:(9-age)*T] += 1
        assert ((replay(net, y, net.init_state())[:, -f:] - last).abs().max() > 0) == (age < 3), age

def test_last_frame_sees_a_chunk_more_than_its_neighbours_in_the_call():
    "x_f of chunk c - 1 still reads chunk c - window in the prefill of chunk c, whose own tokens do not."
    window, n, T = 3, LAYOUT.frame_tokens, LAYOUT.tokens
    owner = (torch.tensor([4, 5, 6, 3]) + 1).repeat_interleave(T)[None]
    place = torch.cat([torch.arange(T - n, T), torch.arange(T - LAYOUT.frames*n)])
    chunk = torch.where(torch.arange(len(place)) < n, 5, 6)[None]
    seen = ring_mask(LAYOUT, window, chunk, place, owner)[0, 0].unflatten(1, (4, T)).any(-1)
    assert seen[:n].tolist() == [[True, True, False, True]]*n and seen[n:].tolist() == [[True, True, True, False]]*(len(place) - n)

def test_no_query_is_left_with_nothing_to_see():
    "Also in a stream that has read nothing: what softmax over nothing gives depends on the kernel."
    n, T = LAYOUT.frame_tokens, LAYOUT.tokens
    place = torch.cat([torch.arange(T - n, T), torch.arange(T - LAYOUT.frames*n)])
    owner = torch.zeros(1, 4*T, dtype=torch.int64)
    mask = ring_mask(LAYOUT, 3, torch.where(torch.arange(len(place)) < n, -1, 0)[None], place, owner)
    assert mask.sum(-1).eq(1).all()

def test_recomputing_the_window_is_another_model():
    net, T = make(window=3), LAYOUT.tokens
    x = rand(1, 10*T, D)
    scratch = conditions(net, net(x[:, -3*T:], positions=torch.arange(7*T, 10*T)))[:, -LAYOUT.frames:]
    assert (replay(net, x, net.init_state())[:, -LAYOUT.frames:] - scratch).abs().max() > .1

# sessions

def test_blank_first_tail_cannot_pollute():
    net, x, n = make(), rand(1, 6*LAYOUT.tokens, D), LAYOUT.frame_tokens
    clean = replay(net, x, net.init_state())
    assert clean.isfinite().all()
    for junk in (1e3, float('inf'), float('nan')):
        s = net.init_state()
        assert torch.equal(replay(net, x, s, tail=torch.full((1, n, D), junk)), clean)
        assert s.slots[':kv'].isfinite().all()

def test_two_sessions_take_turns():
    net, a, b = make(), rand(1, 7*LAYOUT.tokens, D, seed=2), rand(1, 7*LAYOUT.tokens, D, seed=3)
    def frames(x, s, out):
        tail = x[:, :LAYOUT.frame_tokens]
        for c in x.split(LAYOUT.tokens, 1):
            cond, ref, *xs = parts(net, c)
            yield out.append(net.prefill(tail, cond, ref, s))
            for v in xs[:-1]: yield out.append(net.step(v, s))
            tail = xs[-1]
    one, two = [], []
    runs = [frames(a, net.init_state(), one), frames(b, net.init_state(), two)]
    for i in (0, 0, 0, 0, 1)*100: next(runs[i], None)               # out of step with each other
    for i in range(30): next(runs[1], None)
    for x, out in ((a, one), (b, two)): assert torch.equal(torch.stack(out, 1), replay(net, x, net.init_state()))

@pytest.mark.parametrize('seed', range(3))
def test_batches_that_form_and_part_at_random(seed):
    "Five streams; at each turn those that need the same kind of call are batched at random, whatever their chunk or frame."
    net, f, n = make(window=2), LAYOUT.frames, LAYOUT.frame_tokens
    g = torch.Generator().manual_seed(seed)
    x = rand(5, 6*LAYOUT.tokens, D, seed=seed)
    alone, states, at, out = replay(net, x, net.init_state(5)), [net.init_state(seed=i) for i in range(5)], [0]*5, [[] for _ in range(5)]
    pieces = [[parts(net, c) for c in row[None].split(LAYOUT.tokens, 1)] for row in x]
    mixed = set()
    while min(at) < 6*f:
        pick = torch.randperm(5, generator=g)[:1 + int(torch.randint(3, (1,), generator=g))].tolist()
        start = bool(torch.randint(2, (1,), generator=g))
        rows = [i for i in pick if at[i] < 6*f and (at[i] % f == 0) == start]
        if not rows: continue
        batch, where = stack([states[i] for i in rows]), [divmod(at[i], f) for i in rows]
        if start:
            tails = [pieces[i][c-1][-1] if c else torch.full((1, n, D), 7.) for i, (c, _) in zip(rows, where)]
            y = net.prefill(torch.cat(tails), *(torch.cat([pieces[i][c][k] for i, (c, _) in zip(rows, where)]) for k in (0, 1)), batch)
        else: y = net.step(torch.cat([pieces[i][c][1 + j] for i, (c, j) in zip(rows, where)]), batch)
        mixed.add((start, len({c for c, _ in where}) > 1, len({j for _, j in where}) > 1))
        for i, s, v in zip(rows, unstack(batch), y): states[i] = s; at[i] += 1; out[i].append(v)
    assert {(True, True, False), (False, True, True)} <= mixed       # rows did differ in chunk and in frame
    for i in range(5): close(torch.stack(out[i])[None], alone[i:i+1])

def test_state_never_grows_and_never_moves():
    net, x = make(window=2), rand(1, 10*LAYOUT.tokens, D)
    s = net.init_state(); replay(net, x[:, :LAYOUT.tokens], s)
    before = {k: (t.data_ptr(), t.nbytes) for k, t in s.slots.items()}
    replay(net, x, s, tail=x[:, :3])
    assert {k: (t.data_ptr(), t.nbytes) for k, t in s.slots.items()} == before
    assert s.slots[':kv'].shape == (1, 3, 2, 2, 3*LAYOUT.tokens, 8) and s.seen.item() == 11*3

def test_wrong_order_is_nan_in_its_row_only_and_leaves_no_trace():
    net, x = make(), rand(2, 3*LAYOUT.tokens, D)
    cond, ref, *xs = parts(net, x[:, :LAYOUT.tokens])
    fresh, begun = net.init_state(), net.init_state()
    net.prefill(xs[0][1:], cond[1:], ref[1:], begun)
    both = stack([fresh, begun])
    y = net.step(xs[0], both)
    assert y[0].isnan().all() and y[1].isfinite().all()
    fresh, begun = unstack(both)
    close(replay(net, x[:1], fresh), replay(net, x[:1], net.init_state()))
    net.step(xs[1][1:], begun)
    assert net.step(xs[2][1:], begun).isnan().all()                  # one step too many
    rest = replay(net, x[1:, LAYOUT.tokens:], begun, tail=xs[-1][1:])
    close(rest, replay(net, x[1:], net.init_state())[:, LAYOUT.frames:])
    cut = net.init_state(); net.prefill(xs[0][:1], cond[:1], ref[:1], cut)
    assert net.prefill(xs[0][:1], cond[:1], ref[:1], cut).isnan().all()    # a chunk whose frames are missing
    cut.reset(0)
    close(replay(net, x[:1], cut), replay(net, x[:1], net.init_state()))

def test_part_of_a_larger_model():
    "A model that contains the backbone owns the state and may run a whole chunk in one call."
    class Outer(nn.Module, Streaming):
        def __init__(self): super().__init__(); self.backbone = make()
        def forward(self, x, state, tail=None):
            with self.call(x, state): return replay(self.backbone, x, state, tail)
    outer, x = Outer(), rand(1, 2*LAYOUT.tokens, D)
    s = outer.init_state()
    assert torch.equal(outer(x, s), replay(outer.backbone, x, outer.backbone.init_state()))
    assert set(s.slots) == {f'backbone:{k}' for k in ('chunk', 'frame', 'owner', 'kv')} and s.seen.item() == 2*LAYOUT.tokens
    with pytest.raises(ValueError, match='made for another model'): make().step(x[:, :3], s)

def test_training_is_not_disturbed_by_a_preview():
    net, x = make().requires_grad_(True), rand(1, 4*LAYOUT.tokens, D)
    def grads(preview):
        net.zero_grad()
        loss = net(x).square().mean()
        if preview: replay(net, x, net.init_state())
        loss.backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])
    a = grads(False)
    assert torch.equal(a, grads(True)) and a.isfinite().all() and all(p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim == 2)
    assert not replay(net, x, net.init_state()).requires_grad

def test_inference_mode():
    net, x = make(), rand(1, 5*LAYOUT.tokens, D)
    with torch.inference_mode(): y = replay(net, x, net.init_state())
    assert torch.equal(y, replay(net, x, net.init_state()))

# errors and weights

def test_what_is_refused():
    net, x = make(), rand(1, LAYOUT.tokens, D)
    cond, ref, *xs = parts(net, x)
    for call, words in ((lambda: net(x[:, :-1]), 'whole chunks of 17'), (lambda: net(x[..., :5]), r'accepted: \(b, n, 32\)'),
                        (lambda: net.prefill(ref, cond[:, :1], ref, net.init_state()), r'conditions is \(1, 1, 32\); accepted: \(1, 5, 32\)'),
                        (lambda: net.step(x, net.init_state()), r'x is \(1, 17, 32\)'), (lambda: net.step(xs[0], net.init_state(2)), 'the state has 2 rows'),
                        (lambda: net.step(xs[0], make().init_state()), 'made for another model'), (lambda: Backbone(SMALL, LAYOUT, 0), 'window is 0')):
        with pytest.raises(ValueError, match=words): call()

@pytest.mark.parametrize('head', (False, True))
def test_weights_from_a_folder(tmp_path, head):
    c = Qwen2Config(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_parameters=dict(rope_type='default', rope_theta=5e5),
                    tie_word_embeddings=head, rms_norm_eps=1e-3)
    whole = loud((Qwen2ForCausalLM if head else Qwen2Model)(c))
    whole.save_pretrained(tmp_path)
    assert (tmp_path/'model.safetensors').is_file()
    net = Backbone.from_pretrained(str(tmp_path), LAYOUT, 3)
    assert net.cfg == BackboneConfig(32, 2, 4, 2, 8, 40, 5e5, str(tmp_path)) and net.qwen.config.rms_norm_eps == 1e-3
    x, allowed = rand(1, 3*LAYOUT.tokens, 32), mask_loop(LAYOUT, 3, 3)[None, None]
    close(net.eval()(x), (whole.model if head else whole)(inputs_embeds=x, attention_mask=allowed).last_hidden_state)
    close(replay(net, x, net.init_state()), conditions(net, net(x)))
    assert Backbone.from_pretrained(str(tmp_path), LAYOUT, 3, dtype=torch.bfloat16).qwen.norm.weight.dtype == torch.bfloat16
    again = Backbone(backbone_config(net.qwen.config), LAYOUT, 3)
    again.load_state_dict(net.state_dict())

def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='No model is found under .*nowhere.*accepted: a folder'): Backbone.from_pretrained(str(tmp_path/'nowhere'), LAYOUT, 3)
    LlamaModel(LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(tmp_path/'llama')
    with pytest.raises(ValueError, match="'llama' model; accepted: 'qwen2'"): Backbone.from_pretrained(str(tmp_path/'llama'), LAYOUT, 3)
    q = Qwen2Model(Qwen2Config(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2))
    q.save_pretrained(tmp_path/'part', state_dict={k: v for k, v in q.state_dict().items() if 'layers.1.mlp' not in k})
    with pytest.raises(ValueError, match='lack 3 tensors, the first of them layers.1.mlp.down_proj.weight'): Backbone.from_pretrained(str(tmp_path/'part'), LAYOUT, 3)
    (tmp_path/'part'/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no weights that can be read'): Backbone.from_pretrained(str(tmp_path/'part'), LAYOUT, 3)

def test_all_forms_of_block_attention_agree():
    "FlexAttention, with keys repeated for each head, in sequences of whole blocks: the same as a mask that says it all."
    layout = Layout((('audio', 9), ('text', 5)), frame_tokens=9, frames=3)                # 50 tokens a chunk: 5 of them are no whole blocks of 128
    cfg = BackboneConfig(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=48, name='')
    net, x = make(layout, 2, cfg), rand(2, 250, 64)
    def run(blocks=False, even=False, spread=False):
        net.blocks, net.even = blocks, even
        for layer in net.qwen.layers: layer.self_attn.spread = spread
        with torch.no_grad(): return net(x)
    want = run()
    close(run(True, True, True), want, 2e-5)
    assert {k: m.shape[-1] for k, m in net.masks.items() if k[2]} == {(5, 'cpu', True, True): 256}
