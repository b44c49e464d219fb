"""Streaming layers: parity with published code, any chunk plan, any number type, and states that cannot be mixed up."""
import pytest, torch
from torch import nn
from midas_ref.streaming import CausalConv3d, StreamState, Streaming, TemporalAttention, stack, stream, unstack

class Net(nn.Module, Streaming):
    "Two convolutions and an attention."
    def __init__(self, c=8):
        super().__init__()
        self.a, self.mix, self.b = CausalConv3d(3, c, (3, 1, 1)), TemporalAttention(c, 2), CausalConv3d(c, 3, (4, 3, 3))
    def forward(self, x, state=None):
        with self.call(x, state):
            h = self.a(x, state).tanh()
            return self.b(h + self.mix(h, state), state)

def net(seed=0): torch.manual_seed(seed); return Net().requires_grad_(False)

def test_parity_with_cogvideox_convolution():
    "The published causal convolution that repeats the first frame gives the same numbers, whole and in pieces."
    pytest.importorskip('diffusers')
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
    theirs = CogVideoXCausalConv3d(4, 6, kernel_size=3, pad_mode='first')
    ours = CausalConv3d(4, 6)
    ours.load_state_dict(theirs.conv.state_dict())
    x = torch.randn(1, 9, 4, 5, 7)
    with torch.no_grad():
        ref = theirs(x.transpose(1, 2))[0].transpose(1, 2)
        assert torch.equal(ours(x), ref)
        class One(nn.Module, Streaming):
            def __init__(self): super().__init__(); self.c = ours
            def forward(self, x, state=None):
                with self.call(x, state): return self.c(x, state)
        m = One()
        assert (stream(m, x, [1, 1, 3, 4], m.init_state()) - ref).abs().max() < 1e-6

@pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize('seed', range(4))
def test_any_plan_equals_offline(dtype, tol, seed):
    m = net(seed).to(dtype)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 14, 3, 4, 6, generator=g).to(dtype)
    plan = []
    while sum(plan) < 14: plan.append(min(14 - sum(plan), int(torch.randint(1, 7, (1,), generator=g))))
    assert (stream(m, x, plan, m.init_state(2)) - m(x)).abs().max() <= tol, plan

def test_future_never_changes_the_past():
    m, x = net(), torch.randn(1, 12, 3, 4, 4)
    for t in range(1, 12):
        y = x.clone(); y[:, t:] += 1
        assert torch.equal(m(x)[:, :t], m(y)[:, :t]) and not torch.equal(m(x)[:, t:], m(y)[:, t:])

def test_past_beyond_reach_is_forgotten_and_within_reach_is_not():
    "The cache holds what offline sees: 2 + 5 + 3 frames back."
    m, x = net(), torch.randn(1, 14, 3, 4, 4)
    last = m(x)[:, -1]
    for t in range(14):
        y = x.clone(); y[:, t] += 1
        assert torch.equal(m(y)[:, -1], last) == (t < 14 - 1 - 10), t

def test_rows_at_different_positions():
    "Stacked rows go on as they would alone, across several joins and separations."
    m, x = net(), torch.randn(3, 16, 3, 4, 4)
    whole, pos = m(x), [0, 0, 0]
    states = [m.init_state(seed=i) for i in range(3)]
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        who = [i for i in range(3) if torch.rand(1, generator=g) < .7] or [0]
        s = stack([states[i] for i in who])
        y = m(torch.stack([x[i, pos[i]:pos[i]+3] for i in who]), s)
        for row, i, one in zip(y, who, unstack(s)):
            assert (row - whole[i, pos[i]:pos[i]+3]).abs().max() < 1e-6
            pos[i] += 3; states[i] = one
            assert one.seen.item() == pos[i]
    assert len(set(pos)) > 1

def test_stacking_copies():
    m, x = net(), torch.randn(1, 4, 3, 4, 4)
    a, b = m.init_state(), m.init_state()
    m(x, a); before = {k: t.clone() for k, t in a.slots.items()}
    m(torch.cat([x, x]), stack([a, b]))
    assert all(torch.equal(before[k], t) for k, t in a.slots.items()) and not b.slots

def test_buffers_stay_in_place():
    "Slots keep their address, which CUDA graphs rely on."
    m, s = net(), None
    s = m.init_state(); m(torch.randn(1, 2, 3, 4, 4), s)
    where = {k: t.data_ptr() for k, t in s.slots.items()}
    for n in (1, 3, 9): m(torch.randn(1, n, 3, 4, 4), s)
    assert where == {k: t.data_ptr() for k, t in s.slots.items()}

def test_noise_belongs_to_the_row():
    m = net()
    s = m.init_state(3, seed=[4, 5, 6])
    a = s.randn(2, 5)
    assert torch.equal(a[1], StreamState(m, 1, 5).randn(2, 5)[0])
    again = [u.randn(3)[0] for u in unstack(s)]
    assert torch.equal(torch.stack(again), s.randn(3))

@pytest.mark.parametrize('call, said', [
    (lambda m, s: m(torch.randn(2, 1, 3, 4, 4), s), 'has 2 rows and the state 1'),
    (lambda m, s: m(torch.randn(1, 0, 3, 4, 4), s), 'no frames'),
    (lambda m, s: m(torch.randn(1, 1, 5, 4, 4), s), 'takes (b, t, 3, h, w)'),
    (lambda m, s: m(torch.randn(1, 1, 3, 4, 4).double(), s), 'one frame size and number type'),
    (lambda m, s: net(1)(torch.randn(1, 1, 3, 4, 4), s), 'another model'),
    (lambda m, s: net(1).a(torch.randn(1, 1, 3, 4, 4), s), 'another model'),
    (lambda m, s: stack([s, net(1).init_state()]), 'different models'),
    (lambda m, s: stack([]), 'no states'),
    (lambda m, s: m.init_state(0), 'at least one row'),
    (lambda m, s: m.init_state(3, seed=[1]), '1 seeds were given for 3 rows'),
    (lambda m, s: stream(m, torch.randn(1, 4, 3, 4, 4), [1, 1], s), 'has 2 frames, but the input has 4'),
    (lambda m, s: CausalConv3d(3, 3, (3, 2, 3)), 'must be odd'),
    (lambda m, s: TemporalAttention(10, 4), 'multiple of 8'),
    (lambda m, s: TemporalAttention(8, 2, history=0), '1 or more'),
    (lambda m, s: m(torch.randn(1, 0, 3, 4, 4)), 'no frames'),
    (lambda m, s: m(torch.randn(1, 1, 3, 2, 8), s), 'one frame size'),
])
def test_errors_say_what_to_do(call, said):
    m = net(); s = m.init_state(); m(torch.randn(1, 2, 3, 4, 4), s)
    with pytest.raises(ValueError) as e: call(m, s)
    assert said in str(e.value)

def test_refused_call_leaves_the_stream_as_it_was():
    m = net(); x = torch.randn(1, 6, 3, 4, 4); s = m.init_state()
    m(x[:, :3], s)
    with pytest.raises(ValueError): m(torch.randn(1, 1, 3, 5, 5), s)
    assert s.seen.item() == 3 and (m(x[:, 3:], s) - m(x)[:, 3:]).abs().max() < 1e-6

def test_half_finished_call_is_not_continued():
    "When a later layer fails, earlier caches are ahead; the state says so instead of going on."
    m = net(); x = torch.randn(1, 6, 3, 4, 4); s = m.init_state()
    m(x[:, :3], s)
    def boom(*a): raise RuntimeError('boom')
    h = m.b.register_forward_pre_hook(boom)
    with pytest.raises(RuntimeError, match='boom'): m(x[:, 3:4], s)
    h.remove()
    with pytest.raises(ValueError, match='failed half-way'): m(x[:, 3:4], s)

def test_layer_used_twice_is_refused():
    class Twice(nn.Module, Streaming):
        def __init__(self): super().__init__(); self.c = CausalConv3d(3, 3)
        def forward(self, x, state=None):
            with self.call(x, state): return self.c(self.c(x, state), state)
    m = Twice()
    with pytest.raises(ValueError, match='used twice'): m(torch.randn(1, 1, 3, 4, 4), m.init_state())

def test_reset_with_seed_is_a_fresh_row():
    m, x = net(), torch.randn(2, 4, 3, 4, 4)
    s = m.init_state(2, seed=[3, 4]); m(x, s); s.randn(5)
    s.reset(1, seed=9)
    assert torch.equal(s.randn(5)[1], StreamState(m, 1, 9).randn(5)[0])
    assert (m(x, s)[1] - m(x)[1]).abs().max() < 1e-6

def test_follow():
    "Rows asked for go on as the other's; the rest, the random numbers and the other state stay; states that cannot are refused."
    m, x = net(), torch.randn(3, 6, 3, 5, 7)
    a, b = m.init_state(3, 1), m.init_state(3, 5)
    m(x[:, :4], a); m(x[:, 2:3], b)
    c = m.init_state(3, 5); m(x[:, 2:3], c)
    b.follow(a, torch.tensor([True, False, True]))
    y, want, rest = m(x[:, 4:], b), m(x[:, 4:], a), m(x[:, 4:], c)
    assert torch.equal(y[[0, 2]], want[[0, 2]]) and torch.equal(y[1], rest[1]) and not torch.allclose(y[1], want[1])
    assert b.seen.tolist() == [6, 3, 6] and torch.equal(b.randn(4), c.randn(4))
    new = m.init_state(3); new.follow(m.init_state(3), torch.ones(3, dtype=torch.bool)); assert not new.slots
    a.follow(m.init_state(3), torch.tensor([False, True, False]))                     # who follows nobody begins anew
    assert torch.equal(m(x[:, :2], a)[1], m(x[:, :2], m.init_state(3))[1])
    for other, said in ((m.init_state(2), 'has 2'), (net().init_state(3), 'another model')):
        with pytest.raises(ValueError, match=said): a.follow(other, torch.ones(3, dtype=torch.bool))

def test_slots_made_in_inference_mode_serve_afterwards():
    m, x = net(), torch.randn(1, 4, 3, 4, 4)
    s = m.init_state()
    with torch.inference_mode(): m(x[:, :2], s)
    assert (m(x[:, 2:], s) - m(x)[:, 2:]).abs().max() < 1e-6

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda():
    m, x = net().cuda(), torch.randn(2, 8, 3, 4, 4, device='cuda')
    with torch.backends.cudnn.flags(allow_tf32=False): assert (stream(m, x, [1, 5, 2], m.init_state(2)) - m(x)).abs().max() < 1e-5
