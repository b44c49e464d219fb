"The chunk layout and the mask: what the pages do not show."
import random
import pytest, torch
import torch.nn.functional as F
from einops import reduce
from torch.nn.attention.flex_attention import create_mask, flex_attention
from midas_ref.config import preset
from midas_ref.model.mask import block_mask, density, mask_loop, training_mask, visible
from midas_ref.model.tokens import Layout, chunk_layout

def draw(seed):
    "A random layout (any subset of conditions, 1 to 12 frames), a number of chunks, a window and the flag."
    r = random.Random(seed)
    kinds = tuple((k, r.randint(1, 4)) for k in ('audio', 'pose', 'text', 'keys') if r.random() < .5)
    layout = Layout(kinds, r.randint(1, 4), r.randint(1, 12) if seed % 12 else 12)
    return layout, r.randint(1, 4), r.randint(1, 5), r.random() < .5

def test_random_configurations_cover_the_edges():
    drawn = [draw(seed) for seed in range(50)]
    assert any(not lay.conditions for lay, *_ in drawn) and {1, 12} <= {lay.frames for lay, *_ in drawn}
    assert any(w < c for _, c, w, _ in drawn) and any(w > c for _, c, w, _ in drawn) and {f for *_, f in drawn} == {True, False}

@pytest.mark.parametrize('seed', range(50))
def test_loop_tensor_and_blocks_agree(seed):
    layout, chunks, window, full = draw(seed)
    n, block = chunks*layout.tokens, (8, 16, 32)[seed % 3]
    oracle = mask_loop(layout, chunks, window, full)
    assert torch.equal(training_mask(layout, chunks, window, full), oracle)
    blocks = block_mask(layout, chunks, window, full, block=block)
    assert torch.equal(create_mask(blocks.mask_mod, 1, 1, n, n, device='cpu')[0, 0], oracle)
    assert blocks.shape[-2:] == (n, n)
    pad = -n % block
    dense = F.pad(oracle, (0, pad, 0, pad))
    computed = reduce(dense, '(i a) (j b) -> i j', 'any', a=block, b=block)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), computed)
    assert density(blocks) == pytest.approx(computed.float().mean().item())
    free = torch.zeros_like(computed)                       # blocks in which the kernel does not call mask_mod
    for i, count in enumerate(blocks.full_kv_num_blocks[0, 0]): free[i, blocks.full_kv_indices[0, 0, i, :count].long()] = True
    assert not (free & ~reduce(dense, '(i a) (j b) -> i j', 'all', a=block, b=block)).any()
    assert density(oracle) == pytest.approx(oracle.float().mean().item())

@pytest.mark.parametrize('seed', range(12))
def test_rule_on_ints_is_the_rule_on_tensors(seed):
    layout, chunks, window, full = draw(seed)
    mask = training_mask(layout, chunks, window, full)
    r = random.Random(seed)
    for _ in range(200):
        q, k = r.randrange(len(mask)), r.randrange(len(mask))
        answer = visible(*layout.locate(q), *layout.locate(k), window, full)
        assert isinstance(answer, bool) and answer == mask[q, k].item()

@pytest.mark.parametrize('seed', range(50))
def test_locate_agrees_with_the_spans(seed):
    layout, chunks, _, _ = draw(seed)
    chunk, group, place = layout.positions(chunks)
    table = [0 if s.kind not in ('reference', 'frame') else 1 + s.frame for s in layout.spans for _ in range(s.start, s.stop)]
    assert group.tolist() == table*chunks and group.max() == layout.groups - 1
    assert place.tolist() == list(range(layout.tokens))*chunks
    assert chunk.tolist() == [c for c in range(chunks) for _ in range(layout.tokens)]
    assert layout.group().tolist() == table
    sources = [layout.span('reference'), *(layout.span('frame', i) for i in range(1, layout.frames))]
    assert layout.predicts().tolist() == [list(range(s.start, s.stop)) for s in sources]
    assert (layout.predicts() + layout.frame_tokens).tolist() == [list(range(s.start, s.stop)) for s in (layout.span('frame', i+1) for i in range(layout.frames))]

@pytest.mark.parametrize('seed', range(20))
def test_no_query_hears_a_later_group(seed):
    "Over any number of layers: information never flows from a later group or chunk, nor is a row empty."
    layout, chunks, window, full = draw(seed)
    mask = training_mask(layout, chunks, window, full)
    chunk, group, place = layout.positions(chunks)
    order = chunk*layout.groups + group
    reach = torch.linalg.matrix_power(mask.double(), 4) > 0
    assert not (reach & (order > order[:, None])).any()
    assert mask.diagonal().all()
    if not full: assert not (reach & (group == 0) & (order == order[:, None]) & (place > place[:, None])).any()

def test_flex_attention_equals_attention_with_the_dense_mask():
    layout, chunks, window = Layout((('audio', 2), ('text', 3)), 4, 3), 4, 2
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, chunks*layout.tokens, 16)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=training_mask(layout, chunks, window))
    flex = flex_attention(q, k, v, block_mask=block_mask(layout, chunks, window, block=32))
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=0)

def test_window_of_the_paper():
    "48 frames are 8 chunks of 742 tokens: 5,936, and the oldest one is seen until the window moves."
    cfg = preset('paper'); layout = chunk_layout(cfg)
    assert (layout.tokens, layout.tokens*cfg.window_chunks, cfg.window_chunks) == (742, 5936, 8)
    assert layout.tokens == cfg.chunk_tokens and {k: sum(s.stop - s.start for s in layout.spans if s.kind == k.replace('frames', 'frame')) for k in cfg.spans} == cfg.spans
    see = lambda q, k: visible(*layout.locate(q), *layout.locate(k), cfg.window_chunks)
    last = 8*742 - 1                                        # the last token of the eighth chunk sees all 5,936
    assert sum(see(last, k) for k in range(9*742)) == 5936
    assert not see(last + 1, 741) and see(last + 1, 742)
    far = 7500*742 + 400                                    # an hour into a stream
    assert layout.locate(far) == (7500, 2, 400) and layout.locate(torch.tensor(far)) == (7500, 2, 400)
    assert see(far, far - 7*742) and not see(far, far - 8*742) and not see(far, far + 60)

@pytest.mark.parametrize('name', ['tiny', 'paper'])
def test_other_chunk_lengths(name):
    cfg = preset(name)
    for f in (1, 2, 3, 5, 6, 7, 12):
        layout = chunk_layout(cfg, f)
        assert dict(layout.conditions) == dict(audio=f, pose=10*f, text=cfg.text.tokens)
        assert layout.frames == f and layout.frame_tokens == cfg.video.tokens
    assert chunk_layout(cfg) == chunk_layout(cfg, cfg.frames_per_chunk)

def test_layout_is_a_value():
    "Equal layouts are equal keys, also when the conditions come as lists (from JSON)."
    a, b = Layout([['audio', 2]], 4, 3), Layout((('audio', 2),), 4, 3)
    assert a == b and len({a, b}) == 1
    assert training_mask(a, 2, 1).device.type == 'cpu' and a.group(device='meta').device.type == 'meta'
    with pytest.raises(AttributeError): a.frames = 4

@pytest.mark.parametrize('make, says', [
    (lambda: Layout((('audio', 2), ('audio', 1)), 4, 3), "different names"),
    (lambda: Layout((('reference', 2),), 4, 3), "none of them 'reference' or 'frame'"),
    (lambda: Layout((('audio', 0),), 4, 3), "has 0 for audio"),
    (lambda: Layout((('audio', 1.5),), 4, 3), "has 1.5 for audio"),
    (lambda: Layout((), 0, 3), "has 0 for frame_tokens"),
    (lambda: Layout((), 4, 0), "has 0 for frames"),
    (lambda: Layout((), 4, 3).span('audio'), "accepted: reference with frame 0, and 'frame' with 1 to 3"),
    (lambda: Layout((), 4, 3).span('frame'), "No span 'frame' with frame 0"),
    (lambda: chunk_layout(preset('paper'), 0), "frames_per_chunk is 0"),
    (lambda: training_mask(Layout((), 4, 3), 0, 1), "chunks=0"),
    (lambda: mask_loop(Layout((), 4, 3), 1, 0), "window=0"),
    (lambda: block_mask(Layout((), 4, 3), 2, 1.5), "window=1.5"),
])
def test_errors_say_what_was_given_and_what_is_accepted(make, says):
    with pytest.raises(ValueError) as e: make()
    assert says in str(e.value) and 'accepted' in str(e.value)
