"""Every training and measuring command once from end to end, in the smallest sizes that it takes; that their results are good is tested elsewhere."""
import json
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file
from midas_ref import cli
from midas_ref.codec import train as codec_train
from midas_ref.codec.temporal import VideoDCAE
from midas_ref.config import preset
from midas_ref.data import probes
from midas_ref.model.midas import Midas

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    "Pools of mouths and motion from a few scenes instead of hundreds."
    mouths, motion = probes.mouth_pool, codec_train.motion_pool
    monkeypatch.setattr(probes, 'mouth_pool', lambda n: mouths(1))
    monkeypatch.setattr(codec_train, 'motion_pool', lambda n: motion(2))

def ok(capsys, *args):
    "What a command prints, if it ends well."
    capsys.readouterr(); status = cli.main([str(a) for a in (*args, '--no-progress')]); said = capsys.readouterr()
    assert status in (0, None), said.err
    return said.out

def test_codec_through_its_stages_and_the_exam(capsys, tmp_path):
    "Pictures, layers over time, everything; back to pictures; then the exam of the result."
    small, before = ('--people', 2, '--minutes', .01, '--device', 'cpu'), None
    for k, (stage, more) in enumerate(((1, ('--batch', 2)), (2, ('--batch', 1, '--frames', 2)), (3, ('--batch', 1, '--frames', 2)), (1, ('--batch', 2)))):
        ok(capsys, 'train', 'codec', tmp_path/str(k), '--stage', stage, *more, *small, *(('--start-from', before) if before else ()))
        before = tmp_path/str(k)/'codec'
        assert any('.time.' in n for n in load_file(before/'model.safetensors')) == (stage > 1)
    steps = lambda: [json.loads(l)['step'] for l in (tmp_path/'0'/'log.jsonl').read_text().splitlines()]
    n = steps()[-1]; ok(capsys, 'train', 'codec', tmp_path/'0', '--batch', 2, *small, '--begin', .5, '--resume')
    assert steps()[-1] > n
    r = json.loads(ok(capsys, 'bench', 'reconstruction', tmp_path/'2'/'codec', '--clips', 1, '--json', '--device', 'cpu'))
    assert r['psnr'] < 25 and r['r_open_without'] > .9 and r['frames'] == 60

def test_probe(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, 'grade', lambda probe, *a, grade=probes.grade, **kw: grade(probe, 2, **kw))
    ok(capsys, 'train', 'probe', 'a', tmp_path, '--minutes', .01, '--people', 2, '--frames', 2, '--device', 'cpu')
    log = json.loads((tmp_path/'probe_a_log.json').read_text())
    assert log['log'] and 'r' in log['grade']
    assert json.loads(ok(capsys, 'bench', 'probe', 'a', '--weights', tmp_path/'probe_a.safetensors', '--clips', 2, '--json', '--device', 'cpu'))['r'] == pytest.approx(log['grade']['r'], abs=.01)      # the file is in half precision
    ok(capsys, 'train', 'probe', 'b', tmp_path, '--minutes', 0, '--people', 2, '--device', 'cpu')                 # measures what is usual, and trains nothing
    new, old = probes.load_probe('b', tmp_path/'probe_b.safetensors'), probes.load_probe('b')
    assert torch.equal(new.readings.weight, old.readings.weight) and new.usual.whiten.any() and not torch.equal(new.usual.whiten, old.usual.whiten)

@pytest.mark.parametrize('what, said', [('looks', 'share of their own differences'), ('locator', 'of 2 others, whose points are')])
def test_what_streams_keep_to(what, said, capsys, tmp_path):
    "Written into the folder, over one that does not fit, and said what it is worth; the model has it from then on; people of the test side are refused."
    torch.manual_seed(0)
    cfg = preset('tiny')
    Midas(cfg, VideoDCAE(cfg.codec)).save_pretrained(tmp_path/'m')
    (tmp_path/'m'/f'{what}.safetensors').write_bytes(b'damaged')
    told = ok(capsys, 'train', what, tmp_path/'m', '--people', 2, '--frames', 2, '--scenes', 1, '--device', 'cpu')
    m = Midas.from_pretrained(tmp_path/'m')
    assert '2 people, 4 frames' in told and said in told
    assert m.looks.shape == (16, 128, 128) if what == 'looks' else m.locator(torch.zeros(1, 3, 256, 256)).shape == (1, 12, 2)
    assert cli.main(['train', what, str(tmp_path/'none')]) == 2 and 'is no folder' in capsys.readouterr().err
    assert cli.main(['train', what, str(tmp_path/'m'), '--first', '1048570']) == 2 and 'test side' in capsys.readouterr().err

def test_tokenizer(capsys, tmp_path):
    ok(capsys, 'train', 'audio', tmp_path/'a.safetensors', '--hours', .005, '--minutes', .01, '--batch', 1, '--seconds', 1.6, '--workers', 1, '--flite', 0, '--device', 'cpu')
    assert (tmp_path/'a.safetensors').is_file() and json.loads((tmp_path/'a.json').read_text())

def test_scenes_to_latents(capsys, tmp_path):
    "The road of many GPUs: scenes, drawn and encoded."
    ok(capsys, 'data', 'scenes', tmp_path/'s.safetensors', '--hours', 2*1.44/3600, '--seconds', 1.44, '--workers', 0)
    out = ok(capsys, 'data', 'encode', tmp_path/'s.safetensors', tmp_path/'latents', '--people', 2, '--device', 'cpu')
    assert '1 of 1 shards, pieces of 18 frames' in out
    shard = load_file(tmp_path/'latents'/'latents-000000.safetensors')
    assert shard['latents'].shape == (2, 18, 128, 4, 4) and shard['audio'].shape == (2, 18)

def test_shards_to_codec_and_latents(capsys, tmp_path):
    "The road of recordings: packed clips train the codec, and are encoded."
    ok(capsys, 'data', 'make', tmp_path/'shards', '--minutes', 2*2.88/60, '--seconds', 2.88)
    ok(capsys, 'train', 'codec', tmp_path/'real', '--stage', 3, '--start-from', ROOT/'data_samples'/'weights'/'codec', '--data', tmp_path/'shards', '--batch', 1, '--frames', 2, '--minutes', .01, '--device', 'cpu')
    assert (tmp_path/'real'/'codec'/'model.safetensors').is_file() and json.loads((tmp_path/'real'/'log.jsonl').read_text().splitlines()[0])['pixel'] < .5
    assert 'pieces of 12 frames' in ok(capsys, 'data', 'encode', tmp_path/'shards', tmp_path/'latents', '--chunks', 2, '--device', 'cpu')
    assert load_file(tmp_path/'latents'/'latents-000000.safetensors')['latents'].shape == (6, 12, 128, 4, 4)

@pytest.mark.parametrize('line, said', [
    ('bench codec --frames 2 --device cpu', 'stream, decode: median'),
    ('bench draw --calls 2 --frames 2 --size 64 --device cpu', 'frames/s; a call: median'),
])
def test_benchmarks(capsys, line, said): assert said in ok(capsys, *line.split())

def test_guidance_is_what_sessions_use():
    from midas_ref.config import GUIDANCE
    assert cli.GUIDANCE[1]['default'] == GUIDANCE
