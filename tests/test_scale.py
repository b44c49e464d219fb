"""Training on many processes: the same bits after every accident, other numbers of processes, damaged checkpoints, encoded data.

Run as a script, this file forks the processes of each run (DeepSpeed is imported once), kills and resumes them, and leaves folders that the tests below look at."""
import dataclasses, hashlib, json, os, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest, torch
import numpy as np
from safetensors import safe_open
from midas_ref import cli
from midas_ref.codec.temporal import VideoDCAE
from midas_ref.conditions.audio import WhisperVQ, save_audio
from midas_ref.config import preset
from midas_ref.data import shards
from midas_ref.model.midas import Midas
from midas_ref.training import scale as S, train as T

STEPS, r = 8, dataclasses.replace

def small():
    "Sizes of a model that trains in moments; 2x2 latents."
    p = preset('tiny')
    return r(p, video=r(p.video, height=128, width=128), text=r(p.text, tokens=16, width=32, layers=1), pose=r(p.pose, tokens_per_frame=2), audio=r(p.audio, width=32, heads=2, layers=1, ffn=64, codes=64),
             backbone=r(p.backbone, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48), head=r(p.head, width=32, layers=1, heads=2), window_frames=12,
             codec=r(p.codec, encoder_widths=(8, 16, 32, 64, 64, 64, 128), decoder_widths=(8, 16, 32, 64, 64, 64, 128), decoder_depths=(0, 1, 1, 1, 1, 1, 1)))

def settings(**kw): return S.TrainConfig(**dict(rows=2, chunks=2, steps=STEPS, lr=1e-3, warm=2, save_every=2, keep=9, log_every=1, workers=0, reader=.3, own=.5, own_from=.5, blind=.2) | kw)

class Slow(S.Synthetic):
    "The same data, late: a run that can be killed at a chosen step."
    def batch(self, first, rows): time.sleep(.2); return super().batch(first, rows)

def one_process(out, resume=False, source=S.Synthetic, stop_after=None, **kw):
    "What each process does; the first leaves a digest of the weights."
    def make(): torch.manual_seed(0); return Midas(small())
    fleet = S.Fleet('cpu')
    said = []
    run = S.ScaleRun(small(), settings(**kw), source(small(), 2), out, fleet, make, resume, said.append)
    said.append(run.run(stop_after))
    if fleet.rank == 0:
        Path(out, 'said.json').write_text(json.dumps(said))
        if kw.get('zero') != 3: Path(out, 'weights').write_text(hashlib.sha256(b''.join(p.detach().float().numpy().tobytes() for p in run.engine.module.parameters())).hexdigest())
    fleet.close()

def fork(world, *a, accident=None, **kw):
    "Start the processes of a run; returns what they ended with."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    pids = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            code = 1
            try: one_process(*a, **kw); code = 0
            except BaseException as e: Path(a[0]).mkdir(parents=True, exist_ok=True); Path(a[0], f'error-{rank}').write_text(f'{type(e).__name__}: {e}')
            finally: os._exit(code)
        pids.append(pid)
    if accident:
        line, which, what = accident
        log = Path(a[0], 'log.jsonl')
        while not log.is_file() or log.read_text().count('\n') < line: time.sleep(.005)
        os.kill(pids[which], what)
    return [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]

def copy(a, b, *steps):
    for s in steps: shutil.copytree(a/'checkpoints'/f'step-{s:08d}', b/'checkpoints'/f'step-{s:08d}')

def all_runs(root):
    "Every run that the tests look at."
    S.import_deepspeed(False)
    Midas(small())                                                       # what takes long to import comes before the forks
    import deepspeed.runtime.zero.muon.muon_optimizer, torch.utils.tensorboard, torch.utils.data.distributed    # noqa: F401
    import deepspeed.runtime.zero.stage_1_and_2, deepspeed.runtime.zero.stage3, deepspeed.runtime.bf16_optimizer  # noqa: F401
    ends = dict(whole=fork(2, root/'whole'))
    ends['killed'] = fork(2, root/'killed', source=Slow, accident=(5, 1, signal.SIGKILL))
    (root/'killed/after.json').write_text(json.dumps(sorted(p.name for p in (root/'killed/checkpoints').iterdir())))
    ends['killed, resumed'] = fork(2, root/'killed', True)
    ends['told'] = fork(2, root/'told', source=Slow, accident=(2, 1, signal.SIGTERM))
    shutil.copy(root/'told/said.json', root/'told/said_first.json')
    ends['told, resumed'] = fork(2, root/'told', True)
    copy(root/'whole', root/'damaged', 2, 4, 6)
    at = root/'damaged/checkpoints'
    data = bytearray((f := at/'step-00000006/zero_pp_rank_1_mp_rank_00_optim_states.pt').read_bytes()); data[len(data)//2] ^= 1; f.write_bytes(data)
    os.truncate(at/'step-00000004/mp_rank_00_model_states.pt', 1000)
    (at/'.step-00000008').mkdir(); (at/'.step-00000008/mp_rank_00_model_states.pt').write_bytes(b'half')
    ends['damaged'] = fork(2, root/'damaged', True)
    copy(root/'whole', root/'one', 4)
    ends['2 to 1'] = fork(1, root/'one', True)
    copy(root/'one', root/'two', 6)
    ends['1 to 2'] = fork(2, root/'two', True)
    ends['zero 3'] = fork(2, root/'zero3', zero=3)
    copy(root/'whole', root/'again', 2)
    ends['without --resume'] = fork(1, root/'again')
    copy(root/'whole', root/'other', 2)
    ends['other settings'] = fork(1, root/'other', True, lr=2e-3)
    (root/'ends.json').write_text(json.dumps(ends))

if __name__ == '__main__': all_runs(Path(sys.argv[1])); sys.exit()

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    pytest.importorskip('deepspeed')
    root = tmp_path_factory.mktemp('runs')
    env = os.environ | dict(DS_ACCELERATOR='cpu', OMP_NUM_THREADS='1', PYTHONPATH=str(Path(S.__file__).parents[2]))
    done = subprocess.run([sys.executable, __file__, str(root)], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return root

def losses(folder): return {x['step']: float.fromhex(x['exact']) for x in map(json.loads, (folder/'log.jsonl').read_text().splitlines())}
def said(folder, name='said.json'): return json.loads((folder/name).read_text())
def ends(runs): return json.loads((runs/'ends.json').read_text())
def error(folder): return (folder/'error-0').read_text()

def test_whole_run(runs):
    assert ends(runs)['whole'] == [0, 0] and said(runs/'whole')[0] == 'A new run.' and said(runs/'whole')[-1] == 'end'
    assert list(losses(runs/'whole')) == list(range(1, STEPS + 1)) and len(set(losses(runs/'whole').values())) == STEPS
    assert sorted(p.name for p in (runs/'whole/checkpoints').glob('step-*')) == [f'step-{s:08d}' for s in (2, 4, 6, 8)]

def test_killed_process(runs):
    "kill -9 of one process in the middle; resumed, the losses and the weights are those of the run that nobody disturbed, to the bit."
    assert ends(runs)['killed'][1] == -signal.SIGKILL and ends(runs)['killed'][0] != 0 and ends(runs)['killed, resumed'] == [0, 0]
    assert 'step-00000008' not in said(runs/'killed', 'after.json') and 'step-00000004' in said(runs/'killed', 'after.json')
    assert any(x.startswith('Goes on from step-0000000') for x in said(runs/'killed'))
    assert losses(runs/'killed') == losses(runs/'whole') and (runs/'killed/weights').read_text() == (runs/'whole/weights').read_text()

def test_sigterm(runs):
    "A signal to one of the processes makes all of them finish the step and leave a checkpoint."
    assert ends(runs)['told'] == [0, 0] and said(runs/'told', 'said_first.json')[-1] == 'signal'
    assert said(runs/'told')[-1] == 'end' and losses(runs/'told') == losses(runs/'whole') and (runs/'told/weights').read_text() == (runs/'whole/weights').read_text()
    assert not (runs/'told/checkpoints/step-00000006').exists() or len(losses(runs/'told')) == STEPS

def test_damaged_checkpoints(runs):
    "One changed bit, a file cut short, a folder without its name: each is refused with a line, the last whole one is used, and the bits are right."
    lines = said(runs/'damaged')
    assert 'step-00000006 is refused: zero_pp_rank_1_mp_rank_00_optim_states.pt has changed on the disk' in lines[0]
    assert 'step-00000004 is refused: mp_rank_00_model_states.pt has 1,000 bytes instead of' in lines[1] and lines[2] == 'Goes on from step-00000002.'
    assert {k: v for k, v in losses(runs/'whole').items() if k > 2} == losses(runs/'damaged') and (runs/'damaged/weights').read_text() == (runs/'whole/weights').read_text()
    assert S.damage(runs/'damaged/checkpoints/step-00000006') == '' and not (runs/'damaged/checkpoints/.step-00000008').exists()          # written anew

def test_other_number_of_processes(runs):
    "Universal form, 2 to 1 and 1 to 2: the same data in the same order, the same losses up to rounding."
    assert ends(runs)['2 to 1'] == [0] and ends(runs)['1 to 2'] == [0, 0]
    assert said(runs/'one')[0] == 'Goes on from step-00000004, made by 2 processes.' and said(runs/'two')[0] == 'Goes on from step-00000006, made by 1 processes.'
    for name, first in (('one', 5), ('two', 7)):
        got = losses(runs/name)
        assert list(got) == list(range(first, STEPS + 1))
        for step, v in got.items(): assert abs(v - losses(runs/'whole')[step]) < 1e-3*v, (name, step)
    m = S.read_manifest(runs/'one/checkpoints/step-00000008')
    assert m['world'] == 1 and m['settings']['accumulate'] == 2 and m['position'] == STEPS*4
    assert not list((runs/'one/checkpoints').glob('.*'))                    # nothing is left of the conversion

def test_zero_3(runs):
    got, want = losses(runs/'zero3'), losses(runs/'whole')
    assert ends(runs)['zero 3'] == [0, 0] and all(abs(got[s] - want[s]) < 1e-3*want[s] for s in want)

def test_refusals(runs):
    assert 'add --resume to go on' in error(runs/'again')
    assert 'lr was 0.001 and is now 0.002' in error(runs/'other')

@pytest.mark.parametrize('name', ['whole', 'zero3', 'one'])
def test_export(runs, name, tmp_path):
    "The exported model loads, and is that of the run."
    assert cli.main(['train', 'export', str(runs/name), str(tmp_path/'midas')]) in (0, None)
    model = Midas.from_pretrained(tmp_path/'midas')
    assert model.cfg == small()
    state = torch.load(runs/'whole/checkpoints/step-00000008/mp_rank_00_model_states.pt', weights_only=False)['module']
    for k, v in model.trained_state().items():                               # the file is in half precision
        want = state[f'model.{k}'].half().float()
        assert torch.equal(v, want) if name == 'whole' else torch.allclose(v, want, atol=3e-3), k
    assert any((v - Midas(small()).trained_state()[k]).abs().max() > 1e-3 for k, v in model.trained_state().items())

@pytest.mark.parametrize('option', ['--lr=1e-4', '--muon=2', '--rows=8'])
def test_options_of_one_device_are_refused(capsys, tmp_path, option):
    "They would have been ignored."
    assert cli.main(['train', 'model', str(tmp_path/'r'), '--data', 'synthetic', '--dry-run', option]) == 2
    assert f"{option.split('=')[0]} is for scenes on one device" in capsys.readouterr().err and not (tmp_path/'r').exists()

def test_newest_of_nothing(tmp_path):
    assert S.newest(tmp_path/'none') == (None, None)
    (tmp_path/'step-00000001').mkdir()
    lines = []
    with pytest.raises(ValueError, match='None of the 1 checkpoints'): S.newest(tmp_path, say=lines.append)
    assert 'has no manifest' in lines[0]

def test_same_sequences_for_other_numbers_of_processes():
    m = dict(settings=dataclasses.asdict(settings()), model=S.to_dict(small()), world=6)
    assert S.same_run(m, small(), settings(), 6).accumulate == 1
    assert S.same_run(m, small(), settings(), 2).accumulate == 3
    with pytest.raises(ValueError, match='cannot share'): S.same_run(m, small(), settings(), 4)
    with pytest.raises(ValueError, match='other sizes'): S.same_run(m, preset('tiny'), settings(), 6)

@pytest.mark.parametrize('words, message', [(['rows'], 'NAME=VALUE'), (['speed=1'], 'NAME=VALUE'), (['rows=two'], 'whole number'), (['rows=0'], '1 or more'), (['beta1=2'], '0 to 1'),
                                            (['recompute=perhaps'], 'true or false'), (['precision=float16'], 'bfloat16'), (['lr=-1'], '0 or more'), (['lr=nan'], '0 or more')])
def test_settings_are_checked(words, message):
    with pytest.raises(ValueError, match=message): S.with_settings(S.TrainConfig(), words)

def test_paper_settings():
    "The defaults are those of the paper, and reach DeepSpeed."
    d = S.deepspeed_config(S.train_preset('paper'), 'cuda')
    assert (d['train_micro_batch_size_per_gpu'], d['gradient_clipping'], d['bf16']['enabled'], d['zero_optimization']['stage']) == (2, 1.0, True, 2)
    assert (d['optimizer']['params']['lr'], d['optimizer']['params']['weight_decay']) == (5e-5, .01)
    assert d['scheduler']['type'] == 'WarmupCosineLR' and d['scheduler']['params']['warmup_num_steps'] == 1000 and d['scheduler']['params']['warmup_type'] == 'linear'
    assert not S.deepspeed_config(S.TrainConfig(), 'cpu')['bf16']['enabled']

def test_command_under_torchrun(tmp_path):
    "`midas-ref train model` sees the launcher; the model that it leaves loads."
    pytest.importorskip('deepspeed')
    code = 'import sys; from midas_ref.cli import main; sys.exit(main())'
    words = ['train', 'model', str(tmp_path/'run'), '--data', 'synthetic', '--device', 'cpu'] + [w for s in ('rows=1', 'chunks=1', 'steps=1', 'workers=0') for w in ('--set', s)]
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(Path(S.__file__).parents[2]))
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--rdzv-backend', 'c10d', '--rdzv-endpoint', '127.0.0.1:0', '--no-python', sys.executable, '-c', code, *words],
                          capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'ALL WEIGHTS ARE RANDOM' in done.stdout and done.stdout.count('A new run.') == 1 and 'The run is complete.' in done.stdout
    assert S.read_manifest(tmp_path/'run/checkpoints/step-00000001')['world'] == 2
    assert Midas.from_pretrained(tmp_path/'run/midas').cfg == preset('tiny')

# Data

class Numbers:
    "A source that gives back positions."
    def batch(self, first, rows): return list(range(first, first + rows))

@pytest.mark.parametrize('world, accumulate, workers', [(1, 4, 0), (2, 2, 0), (4, 1, 0), (4, 1, 2), (1, 4, 3)])
def test_every_sequence_once(world, accumulate, workers):
    "Whatever the processes and workers: step s holds positions 12 s ... 12 s + 11, each once."
    its = [S.loader(S.Blocks(Numbers(), 3, 8, rank, world), workers) for rank in range(world)]
    for step in range(3):
        got = sorted(p for it in its for _ in range(accumulate) for p in next(it)[1])
        assert got == list(range(24 + 12*step, 36 + 12*step))

@pytest.fixture(scope='module')
def whole_midas():
    "With a codec and a tokenizer that have learnt nothing."
    torch.manual_seed(0)
    return Midas(small(), VideoDCAE(small().codec).eval(), WhisperVQ(small().audio).eval())

class Clips:
    "Three clips of 26 frames, as `Shards` would give them; frame i of clip k is a grey of 60 k + i."
    def __len__(self): return 3
    def read(self, i, fields=None): return dict(meta=dict(frames=26, fps=12.5))
    def __getitem__(self, i):
        video = np.broadcast_to((60*i + np.arange(26, dtype=np.uint8))[:, None, None, None], (26, 128, 128, 3))
        audio = np.random.default_rng(i).normal(0, .1, shards.clip_samples(26, 12.5)).astype(np.float32)
        motion = np.broadcast_to((100*i + np.arange(26.))[:, None], (26, 27)).astype(np.float32)
        points = np.broadcast_to(np.arange(26.)[:, None, None]*[1., 0.], (26, 12, 2)).astype(np.float32)
        return shards.Sample(f'clip{i}', video, audio, dict(fps=12.5, captions=['a', 'b', 'c', 'd']), np.full((128, 128, 3), 200, np.uint8), dict(motion=motion, keypoints=points))

@pytest.fixture(scope='module')
def encoded(whole_midas, tmp_path_factory):
    out = tmp_path_factory.mktemp('encoded')
    note, make = S.clip_shards(Clips(), whole_midas, 12, per_shard=2)
    for rank in (1, 0): S.encode_shards(out, note, whole_midas.audio.codebook.weight, make, rank, 2, say=lambda _: None)
    return out, note, make

def test_encoded_clips(encoded, whole_midas):
    "Two pieces of 12 frames from each clip, the last two frames dropped; every window is of one piece, and its parts belong together."
    out, note, _ = encoded
    assert list(note['shards'].values()) == [4, 2] and sorted(p.name for p in out.iterdir()) == ['codes.safetensors', 'encoded.json', 'latents-000000.safetensors', 'latents-000001.safetensors']
    data, seen = S.Latents(out, small(), 1), set()
    assert len(data) == 6 and data.codec_hash == whole_midas.codec.fingerprint(decoder=False)
    with torch.no_grad():
        z = [whole_midas.codec.encode(torch.from_numpy(np.array(c.video)).permute(0, 3, 1, 2)[None]/127.5 - 1)[0].half().float() for c in map(Clips().__getitem__, range(3))]
        tokens = [whole_midas.audio(torch.from_numpy(c.audio)[None]).ids[0] for c in map(Clips().__getitem__, range(3))]
    for position in range(60):
        x = data.item(position)
        clip, start = divmod(int(x['face'][0, 0]), 100)
        want, ids = z[clip], tokens[clip]
        assert torch.equal(x['face'][:, 0], 100*clip + start + torch.arange(6.)) and start % 6 == 0
        assert torch.allclose(x['latents'], want[start:start+6], atol=2e-2) and torch.equal(x['audio'], whole_midas.audio.codebook.weight[ids[start:start+6]])
        assert torch.allclose(x['velocity'][1:, 0, 0], torch.tensor(12.5/128), atol=1e-3) and x['known'][1:].all()
        assert x['text'][0, 0] == ord('abcd'[min(int((start + 3)/26*4), 3)]) + 3
        seen.add((position//6, clip, start//12))
    two = S.Latents(out, small(), 2).item(0)
    clip, start = divmod(int(two['face'][0, 0]), 100)
    assert two['text'][:, 0].tolist() == [ord('abcd'[min(int((start + k + 3)/26*4), 3)]) + 3 for k in (0, 6)] and len(set(two['text'][:, 0].tolist())) == 2
    assert len(seen) == 60                                                    # each piece once in every epoch
    assert [data.rows[i] for i in S._order(6, 0, 0)] != [data.rows[i] for i in S._order(6, 0, 1)]

def test_encoded_scenes(whole_midas, tmp_path):
    "Scene k is played by person k of the crowd, whichever shard it is in."
    from safetensors.torch import load_file
    from midas_ref.data.probes import People, mouth_pool
    scenes = T.write_scenes(whole_midas.audio, 3, .96)
    people = People(2, mouth_pool(1), 0, views=(3, 1))
    note, make = S.scene_shards(scenes, people, whole_midas, per_shard=2)
    assert S.encode_shards(tmp_path, note, whole_midas.audio.codebook.weight, make, say=lambda _: None) == 36 and list(note['shards'].values()) == [2, 1]
    whole, parts = T.draw_pool(scenes, people, whole_midas, together=1), [load_file(tmp_path/n) for n in note['shards']]
    got = {k: torch.cat([p[k] for p in parts]) for k in ('latents', 'audio', 'face')}
    assert torch.equal(got['audio'].long(), whole.audio) and torch.equal(got['face'].float(), whole.face)
    gap = lambda a, b: (a.float() - b.float()).abs().mean().item()
    assert gap(got['latents'], whole.latents) < .01 < gap(got['latents'][:1], whole.latents[1:2])

def test_encoding_goes_on(encoded, whole_midas):
    "A shard that is there stays, one that is missing is made again, to the bit; other settings are refused."
    out, note, make = encoded
    was, kept = (out/'latents-000001.safetensors').read_bytes(), (out/'latents-000000.safetensors').stat().st_mtime_ns
    (out/'latents-000001.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='lacks 1 of 2 shards'): S.Latents(out, small(), 1)
    assert S.encode_shards(out, note, whole_midas.audio.codebook.weight, make, say=lambda _: None) == 24
    assert (out/'latents-000001.safetensors').read_bytes() == was and (out/'latents-000000.safetensors').stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match='frames was 12 and is now 6'): S.begin_encoding(out, note | dict(frames=6), whole_midas.audio.codebook.weight)
    with pytest.raises(ValueError, match='latent'): S.Latents(out, preset('tiny'), 1)
    note = json.loads((out/'encoded.json').read_text())
    (out/'encoded.json').write_text(json.dumps({k: v for k, v in note.items() if k != 'readings'}))       # encoded before readings told how a head turns
    with pytest.raises(ValueError, match='readings None where the model has'): S.Latents(out, small(), 1)
    (out/'encoded.json').write_text(json.dumps(note))
    with pytest.raises(ValueError, match='fewer chunks'): S.Latents(out, small(), 3)

@pytest.fixture(scope='module')
def reader(tmp_path_factory):
    "A T5 in a folder, as one from the hub, and a model that wants its features."
    from transformers import ByT5Tokenizer
    from midas_ref.conditions.text import small_t5, text_encoder
    folder = tmp_path_factory.mktemp('t5'); torch.manual_seed(3)
    small_t5(64, 2).save_pretrained(folder); ByT5Tokenizer().save_pretrained(folder)
    cfg = r(small(), text=r(small().text, model=str(folder), tokens=12, width=64))
    midas = Midas(cfg, VideoDCAE(cfg.codec).eval(), WhisperVQ(cfg.audio).eval()).eval()
    for k, v in dict(words=text_encoder(cfg.text), reader=cfg.text.model).items(): object.__setattr__(midas, k, v)
    return cfg, midas

def test_captions_of_a_published_t5(reader, tmp_path, monkeypatch):
    "Each caption is read once and kept without padding; a piece gets the features of its own captions, one of no words the placeholder."
    cfg, midas = reader
    monkeypatch.setattr(Clips, 'words', ['smiling', '', 'sad', 'smiling'], raising=False)
    took = Clips.__getitem__
    monkeypatch.setattr(Clips, '__getitem__', lambda self, i: r(took(self, i), meta=dict(fps=12.5, captions=self.words)))
    note, make = S.clip_shards(Clips(), midas, 12, per_shard=2)
    assert note['captions'] == note['text'] == cfg.text.model
    S.encode_shards(tmp_path, note, midas.audio.codebook.weight, make, say=lambda _: None, words=midas.words)
    with safe_open(tmp_path/'latents-000000.safetensors', 'pt') as f: assert f.get_slice('starts').get_shape() == [4] and f.get_slice('said').get_shape() == [8 + 4, 64]   # smiling and sad, with their end marks
    data, seen = S.Latents(tmp_path, cfg, 1), set()
    want = {w: (midas.words(midas.words.ids([w]))[0] if w else torch.zeros(12, 64)) for w in Clips.words}
    for position in range(30):
        x = data.item(position); start = int(x['face'][0, 0]) % 100
        word = Clips.words[min(int((start + 3)/26*4), 3)]; seen.add(word)
        assert torch.allclose(x['text'][0], want[word].bfloat16().float(), atol=1e-6), word
    assert seen == {'smiling', '', 'sad'}
    with torch.no_grad():
        lead, blank, on = (1, 1), torch.zeros(1, 1, 12, 64), want['sad'][None, None]
        none, empty, given = midas.embed_conditions({}, lead), midas.embed_conditions(dict(text=blank), lead), midas.embed_conditions(dict(text=on), lead)
    assert torch.equal(none, empty) and not torch.equal(none, given)
    data = S.Latents(tmp_path, cfg, 2)
    step = S.JointStep(midas, data.activity(), settings()).settle('cpu')
    assert data.batch(0, 2)[2]['text'].shape == (2, 2, 12, 64) and step(data.batch(0, 2), .2, S.block_seed(0, 0))[0].isfinite()
    for other in (None, 'another/t5'):
        with pytest.raises(ValueError, match=f'captions was .* and is now {other}'): S.begin_encoding(tmp_path, note | dict(captions=other), midas.audio.codebook.weight)

def test_text_of_a_session_with_a_published_t5(reader):
    cfg, midas = reader
    assert midas.text is None and torch.equal(midas.read_text(['sad']), midas.words(midas.words.ids(['sad'])))
    assert not [k for k in midas.state_dict() if 't5' in k]                     # stays outside what is saved
    lost = Midas(r(cfg, text=r(cfg.text, model='/nowhere/t5')))
    with pytest.raises(OSError, match="use the preset 'tiny'"): lost.read_text(['sad'])

def test_step_on_encoded_clips(encoded, whole_midas):
    data = S.Latents(encoded[0], small(), 2)
    step = S.JointStep(Midas(small()), data.activity(), settings()).settle('cpu')
    loss = lambda block: step(data.batch(2*block, 2), .2, S.block_seed(0, block))[0].item()
    assert loss(0) == loss(0) != loss(1)

def test_text_of_another_encoder_is_left_out(encoded, tmp_path):
    "A preset that reads T5 gets a placeholder, not bytes."
    cfg = r(small(), text=r(small().text, model='google/t5-v1_1-xxl'))
    for p in encoded[0].iterdir(): (tmp_path/p.name).write_bytes(p.read_bytes())
    note = json.loads((tmp_path/'encoded.json').read_text()); (tmp_path/'encoded.json').write_text(json.dumps(note | dict(text=cfg.text.model)))
    batch = S.Latents(tmp_path, cfg, 2).batch(0, 2)
    assert set(batch[2]) == {'audio', 'pose'}
    assert torch.isfinite(S.JointStep(Midas(cfg), torch.ones(4, 128), settings()).settle('cpu')(batch, 0., 1)[0])

def test_export_with_codec(runs, whole_midas, tmp_path):
    "A run on latents of a codec takes that codec and that tokenizer along, and no other."
    whole_midas.codec.save(tmp_path/'parts/codec'); save_audio(tmp_path/'parts/audio.safetensors', whole_midas.audio, dtype=torch.float32)
    shutil.copytree(runs/'whole/checkpoints/step-00000002', tmp_path/'run/checkpoints/step-00000002')
    m = S.read_manifest(path := tmp_path/'run/checkpoints/step-00000002')
    lines = []
    for hashes, parts in ((dict(codec_hash=whole_midas.codec.fingerprint(decoder=False), audio_hash=T.tokenizer_hash(whole_midas.audio)), {'codec', 'audio'}), (dict(codec_hash='other', audio_hash='another'), set())):
        (path/'manifest.json').write_text(json.dumps(m | hashes))
        S.export_run(tmp_path/'run', tmp_path/'midas', tmp_path/'parts/codec', tmp_path/'parts/audio.safetensors', say=lines.append)
        assert set(Midas.from_pretrained(tmp_path/'midas').frozen) == parts
        shutil.rmtree(tmp_path/'midas')
    assert 'without its codec: the run used other' in lines[1]

def test_activity_is_that_of_the_pool(encoded):
    data = S.Latents(encoded[0], small(), 1)
    x = {k: v for k, v in S.read_safetensors(encoded[0]/'latents-000000.safetensors').items()}
    assert torch.allclose(data.activity(), T.Pool(**x, codes=None, codec_hash='').activity(), rtol=1e-3)

# Plan and measure

def test_state_of_stages():
    n = 1000
    assert [S.state_bytes(n, 4, s) for s in range(4)] == [16000, 4000 + 3000, 2000 + 500 + 3000, 4000] and S.state_bytes(n, 1, 2) == 16000

@pytest.mark.parametrize('chunks', [1, 2, 3, 5])
def test_keys_are_counted(chunks):
    mask = S.training_mask(S.chunk_layout(small()), chunks, small().window_chunks)
    assert abs(S.mean_keys(small(), chunks) - mask.float().sum(1).mean().item()) < 1e-3

def test_work_is_that_of_the_model():
    "Products of matrices as PyTorch counts them, forward and backward; attention from the pairs of the mask."
    from torch.utils.flop_counter import FlopCounterMode
    cfg = small()
    data, step = S.Synthetic(cfg, 2), S.JointStep(Midas(cfg), torch.ones(4, 128), settings(own=0., blind=0., reader=0.)).settle('cpu')
    latents, reference, signals, mouth = data.batch(0, 2)
    batch = latents, reference, signals | dict(text=torch.randn(2, 2, cfg.text.tokens, cfg.text.width)), mouth                  # past the small T5, which is not counted
    with FlopCounterMode(display=False) as count: step(batch, 0., 1)[0].backward()
    work = S.step_flops(cfg, 2, 2)
    ours = sum(work.values()) - work['backbone, attention']
    theirs = {str(k): v for k, v in count.get_flop_counts()['Global'].items()}
    products = sum(v for k, v in theirs.items() if 'attention' not in k)
    assert .99 < ours/products < 1.02, (ours, theirs)
    pairs = S.training_mask(S.chunk_layout(cfg), 2, cfg.window_chunks).sum().item()
    assert abs(work['backbone, attention']/(12*cfg.backbone.layers*cfg.backbone.heads*cfg.backbone.head_dim*pairs*2) - 1) < 1e-3

def test_bench_and_plan(capsys):
    assert cli.main(['bench', 'train', '--engine', 'plain', '--device', 'cpu', '--steps', '1', '--warm-up', '1', '--set', 'rows=1', '--set', 'chunks=1', '--peak', '.1', '--json']) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures['tokens_per_step'] == 194 and abs(figures['utilisation'] - figures['tflop_per_second']/.1) < 1e-9 and figures['seconds'] > 0
    assert cli.main(['train', 'model', 'nowhere', '--preset', 'paper', '--data', 'none', '--dry-run', '--gpus', '64']) == 0
    out = capsys.readouterr().out
    assert 'ALL WEIGHTS ARE RANDOM' in out and '759,808 tokens' in out and 'ZeRO-2:    6.73 GiB' in out and not Path('nowhere').exists()

@pytest.mark.parametrize('words, message', [(['--set', 'zero=9', '--dry-run'], '1, 2 or 3'), (['--set', 'rows=2'], 'torchrun'), (['--backbone', '/no/where', '--dry-run'], 'No model is found')])
def test_bad_commands(words, message, capsys, monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    assert cli.main(['train', 'model', 'nowhere', '--data', 'none', *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1

def test_plain_engine_is_adamw():
    "The yardstick without DeepSpeed: clipping, decay and moments are those of PyTorch."
    tc, data = settings(own=0., blind=0., clip=1e-7), S.Synthetic(small(), 2)                  # gradients so small that AdamW's epsilon tells their size
    torch.manual_seed(0)
    engine = S.MasterEngine(S.JointStep(Midas(small()), data.activity(), tc), tc, 'cpu')
    torch.manual_seed(0)
    step = S.JointStep(Midas(small()), data.activity(), tc).settle('cpu')
    opt = torch.optim.AdamW(step.groups(tc.decay), tc.lr, (tc.beta1, tc.beta2))
    for k in range(3):
        a = engine(data.batch(2*k, 2), 0., k)[0]; engine.backward(a); engine.step()
        b = step(data.batch(2*k, 2), 0., k)[0]; opt.zero_grad(); b.backward(); torch.nn.utils.clip_grad_norm_(step.parameters(), tc.clip); opt.step()
        assert abs(a.item() - b.item()) < 1e-4*b.item()

def test_the_paper_weighs_all_chunks_alike():
    "What the tiny recipe adds is a setting, and off for the preset of the paper."
    assert S.train_preset('paper').recipe().first == 1 and S.train_preset('tiny').recipe().first == 4
    with pytest.raises(ValueError, match='TrainConfig.first'): S.TrainConfig(first=.5)

def test_a_plan_reads_the_sizes_of_a_backbone_and_not_its_weights(capsys, tmp_path):
    from transformers import Qwen2Config
    Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path/'q')
    assert cli.main(['train', 'model', str(tmp_path/'run'), '--preset', 'tiny', '--data', 'none', '--backbone', str(tmp_path/'q'), '--dry-run', '--gpus', '8']) == 0
    assert 'published weights' in capsys.readouterr().out and not (tmp_path/'run').exists()
    with pytest.raises(FileNotFoundError, match='no weights that can be read'): S.start_model('tiny', str(tmp_path/'q'), say=lambda _: None)[1]()
