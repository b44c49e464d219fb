"""The command line: quick to start, one line for each mistake, and the right exit status."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from midas_ref import cli

ROOT = Path(__file__).resolve().parents[1]
MAKER = '''
import time
import numpy as np
def clip(seed, seconds, fps, height, width, split):
    n = round(seconds*fps); t = np.arange(n)[:, None, None, None]
    time.sleep(WAIT)
    return dict(video=np.broadcast_to(np.arange(width)[:, None] % 200 + t % 40, (n, height, width, 3)).astype(np.uint8),
                audio=np.zeros(round(n/fps*16000), np.float32), meta=dict(fps=fps, seed=seed, language='en'))
def bad(**k): raise ValueError('nobody here')
'''

def start(*args, **kw):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(kw.pop('path', ROOT))]), 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': ''}   # as most people run it
    return subprocess.Popen([sys.executable, '-c', 'import sys; from midas_ref.cli import main; sys.exit(main())', *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def run(capsys, *args):
    "Status, output and errors of a command in this process."
    capsys.readouterr(); status = cli.main([str(a) for a in args]); r = capsys.readouterr()
    return status, r.out, r.err

@pytest.fixture
def maker(tmp_path, monkeypatch):
    "A module with clip functions, importable here and in processes that we start."
    (tmp_path/'lib').mkdir(); (tmp_path/'lib'/'stand_in_maker.py').write_text(MAKER.replace('WAIT', '0'))
    (tmp_path/'lib'/'slow_maker.py').write_text(MAKER.replace('WAIT', '.2'))
    monkeypatch.syspath_prepend(tmp_path/'lib')
    yield 'stand_in_maker:clip'
    for m in ('stand_in_maker', 'slow_maker'): sys.modules.pop(m, None)

def test_help_loads_nothing_heavy():
    code = "import sys; from midas_ref.cli import main; main(['--help']); heavy = {'torch', 'numpy', 'av', 'cv2'} & set(sys.modules); assert not heavy, heavy"
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert r.returncode == 0 and 'midas-ref data make' in r.stdout, r.stderr

@pytest.mark.parametrize('name', sorted(cli.COMMANDS))
def test_every_command_has_help_with_examples(capsys, name):
    status, out, err = run(capsys, *name.split(), '--help')
    assert status == 0 and 'examples:' in out and f'midas-ref {name}' in out.split('examples:')[1] and not err
    for group in {name.split()[0]}: assert run(capsys, group, '--help')[0] == 0

@pytest.mark.parametrize('given, found', [(None, 'passive'), ('active', 'active')])
def test_threads_wait_asleep_unless_told_otherwise(given, found):
    "Set before torch is imported, which reads it once."
    env = {k: v for k, v in os.environ.items() if k != 'OMP_WAIT_POLICY'} | ({'OMP_WAIT_POLICY': given} if given else {})
    code = "import os, sys; from midas_ref.cli import main; main(['--version']); print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-2:] == [found, 'False']

def test_version(capsys): assert run(capsys, '--version')[0] == 0

@pytest.mark.parametrize('line, said', [
    ('', 'required'), ('dance', "'dance'"), ('data', 'required'), ('data make', 'OUT'), ('data make o --size 255', 'even sides'), ('data make o --size 0', '16 to 4096'),
    ('data make o --minutes -1', '0.01 or more'), ('data make o --minutes nan', '0.01 or more'), ('data make o --fps 0', '1 or more'), ('data make o --workers two', 'a whole number'),
    ('data make o --seed 1.5', 'a whole number'), ('data make o --maker here', 'cannot be loaded'), ('data make o --maker json:no_such', 'cannot be loaded'), ('data make o --what', '--what'),
    ('data show none', 'no folder or file'), ('data pack none o', 'There is no folder'), ('data show none --sheet a.jpg', '.png'),
    ('bench audio none', 'is not a folder'), ('bench audio', 'FOLDER'), ('bench audio . --weights none.safetensors', 'does not exist'), ('bench audio .', 'GRID corpus'), ('bench audio . --slack -1', '0 or more')])
def test_mistakes_are_one_line_and_status_2(capsys, tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *line.split())
    assert status == 2 and not out and len(err.splitlines()) == 1 and said in err and 'Traceback' not in err
    assert not list(tmp_path.iterdir())

def test_make_show_and_restart(capsys, tmp_path, maker):
    out = tmp_path/'s'; args = ('data', 'make', out, '--minutes', '.1', '--seconds', '1', '--size', '32x48', '--per-shard', '4', '--maker', maker, '--no-progress')
    status, text, err = run(capsys, *args, '--seed', 3)
    assert status == 0 and '6 clips of 1 s in 2 shards' in text and not err
    assert run(capsys, *args, '--seed', 3)[0] == 0
    status, _, err = run(capsys, *args, '--seed', 4)
    assert status == 2 and 'seed was 3 and is now 4' in err and len(err.splitlines()) == 1
    status, text, _ = run(capsys, 'data', 'show', out, '--sheet', tmp_path/'sheet.png', '--rows', 2)
    assert status == 0 and '32x48' in text and 'en' in text and (tmp_path/'sheet.png').read_bytes()[:4] == b'\x89PNG'
    status, text, _ = run(capsys, 'data', 'show', out, '--json')
    row = json.loads(text)[0]
    assert (row['clips'], row['frames'], row['damaged'], row['language']) == (6, 72, 0, {'en': 6}) and abs(row['minutes'] - .096) < 1e-9
    from midas_ref.data.shards import Shards
    assert [s.meta['seed'] for s in Shards(out)] == [3_000_000 + i for i in range(6)] and Shards(out)[0].key == 'train-3-0000000'

def test_maker_that_fails(capsys, tmp_path, maker, monkeypatch):
    args = ('data', 'make', tmp_path/'s', '--seconds', '1', '--maker', 'stand_in_maker:bad', '--no-progress')
    status, _, err = run(capsys, *args)
    assert status == 2 and 'Clip 0 could not be made: ValueError: nobody here' in err and len(err.splitlines()) == 1
    monkeypatch.setenv('MIDAS_DEBUG', '1')
    with pytest.raises(RuntimeError): cli.main([str(a) for a in args])

def test_folder_in_the_way(capsys, tmp_path, maker):
    (tmp_path/'file').touch()
    status, _, err = run(capsys, 'data', 'make', tmp_path/'file'/'s', '--seconds', '1', '--maker', maker, '--no-progress')
    assert status == 2 and 'Cannot write to' in err and len(err.splitlines()) == 1

def test_pack_without_videos(capsys, tmp_path):
    (tmp_path/'v').mkdir(); (tmp_path/'v'/'a.mp4').write_text('text')
    status, _, err = run(capsys, 'data', 'pack', tmp_path/'v', tmp_path/'o', '--no-progress')
    assert status == 2 and 'None of the 1 files' in err and 'a.mp4: not a video' in err and len(err.splitlines()) == 1
    assert json.loads((tmp_path/'o'/'report.json').read_bytes())['files'][0]['reason']

@pytest.mark.parametrize('workers', [0, 2])
def test_ctrl_c(tmp_path, maker, workers):
    "One line, status 130, nothing half-written; the same command then goes on."
    out = tmp_path/'s'
    p = start('data', 'make', out, '--minutes', '1', '--seconds', '1', '--size', '32', '--per-shard', '4', '--maker', 'slow_maker:clip', '--workers', workers, '--no-progress', path=tmp_path/'lib', start_new_session=True)
    until = time.time() + 30
    while not list(out.glob('*.tar')) and time.time() < until and p.poll() is None: time.sleep(.05)
    os.killpg(p.pid, signal.SIGINT)                                             # the terminal sends it to all processes
    _, err = p.communicate(timeout=20)
    assert p.returncode == 130 and err.strip() == 'midas-ref: interrupted. Run the same command again to go on.', err
    assert list(out.glob('*.tar')) and not [f for f in out.iterdir() if f.name.endswith('.part')]

@pytest.mark.parametrize('wait', [0, .2, .5, 1.])
def test_ctrl_c_while_workers_start(tmp_path, maker, wait):
    "Still importing, they have not been told yet to leave Ctrl-C to their parent."
    p = start('data', 'make', tmp_path/'s', '--minutes', '1', '--seconds', '1', '--size', '32', '--maker', 'slow_maker:clip', '--workers', 2, '--no-progress', path=tmp_path/'lib', start_new_session=True)
    children, until = Path(f'/proc/{p.pid}/task/{p.pid}/children'), time.time() + 60
    if not children.exists(): p.kill(); p.communicate(); pytest.skip('no list of child processes here')
    while len(children.read_text().split()) < 3 and time.time() < until and p.poll() is None: time.sleep(.01)    # two, and the tracker of semaphores
    time.sleep(wait); os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and err.strip() == 'midas-ref: interrupted. Run the same command again to go on.', err

def test_closed_pipe(tmp_path, maker):
    p = start('data', 'make', '--help'); p.stdout.close()
    assert p.stderr.read() == '' and p.wait() in (0, 120, 141)
