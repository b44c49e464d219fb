"Portraits for visitors: controls that refuse nonsense, uploads that leave no file, look-alikes that resemble"
import dataclasses, io
import numpy as np, pytest
pytest.importorskip('cv2')
from PIL import Image
from gradio_app import people as P
from gradio_app.live import Refused
from midas_ref.data.portraits import Identity
from midas_ref.inference.video import vote_face

def unhex(s): return np.array([int(s[i:i+2], 16) for i in (0, 2, 4)], float)

def test_every_field_of_a_person_has_a_control_and_every_random_person_passes():
    names = {c['name'] for c in P.controls()}
    assert names == {f.name for f in dataclasses.fields(Identity)} - {'seed'}
    for s in range(300): assert P.check_identity(dataclasses.asdict(Identity.random(s))) == Identity.random(s)

@pytest.mark.parametrize('bad', [dict(age=17), dict(age='30'), dict(skin=float('nan')), dict(hair='wig'), dict(hair_color='#ffffff'), dict(cloth_color='12345g'), dict(seed=True), dict(nose=1), {1: 2}])
def test_nonsense_is_refused(bad):
    with pytest.raises(Refused): P.check_identity(bad)

def test_a_look_alike_has_the_colours_of_the_picture():
    "Eight drawn people stand for photographs, because their truth is known."
    truth = [Identity(seed=1, skin=s, hair_color=h, hair='short', cloth_color=c, background='studio', background_color=b, eye_color=e) for s, h, c, b, e in
             [(.05, 'copper', '7a2e33', '8796a3', 'blue'), (.2, 'black', '3f6b56', 'c2b6a3', 'green'), (.35, 'blond', '37506b', '54606e', 'blue'), (.5, 'dark_brown', 'f3efe8', 'a59c92', 'brown'), (.7, 'black', 'c98b3a', '6f7f78', 'brown'), (.9, 'black', '2f6f7a', '93808c', 'brown')]]
    seen = [P.paint(i) for i in truth]; found = [P.look_alike(x, vote_face(x)) for x in seen]
    assert max(abs(a.skin - b.skin) for a, b in zip(truth, found)) < .2
    for a, b, x in zip(truth, found, seen):
        y = P.paint(b); patch = lambda v, r, c: np.median(v[r, c].reshape(-1, 3).astype(float), 0)
        for name, r, c in (('cloth', slice(246, 256), slice(110, 146)), ('background', slice(4, 20), slice(4, 20)), ('cheek', slice(136, 146), slice(94, 104))): assert np.abs(patch(x, r, c) - patch(y, r, c)).mean() < 40, (name, a, b)
    assert [b.hair for b in found].count('bald') <= 1                                  # blond hair in the light has the colour of skin
    assert sum(a.eye_color == b.eye_color for a, b in zip(truth, found)) >= 3

def test_an_upload_leaves_nothing_behind(tmp_path):
    b = io.BytesIO(); Image.fromarray(P.paint(Identity(), (128, 128))).save(b, 'PNG')
    assert 'look-alike' in P.open_upload(b.getvalue(), tmp_path, (128, 128)).note
    assert np.array_equal(P.open_upload(b.getvalue(), tmp_path, (128, 128), drawn=True).picture, np.array(Image.open(b)))
    with pytest.raises(Refused) as e: P.open_upload(b'no picture', tmp_path, (128, 128))
    assert str(tmp_path) not in str(e.value) and list(tmp_path.iterdir()) == []

def test_a_store_forgets_the_oldest():
    s = P.Store(3); keys = [s.put(i) for i in range(5)]
    assert [s.get(k) for k in keys] == [None, None, 2, 3, 4] and s.get('x') is None and s.get(['x']) is None and s.get(None) is None
    t = P.Store(9, keep=-1.); t.put(1); t.put(2); assert len(t.items) <= 1

def test_everything_begins_at_the_same_noise_level():
    "The page, the commands and a session remember alike."
    import inspect, re
    from pathlib import Path
    from midas_ref import cli
    from midas_ref.config import MEMORY_LEVEL
    from midas_ref.inference.animate import bench_stream
    from midas_ref.inference.session import Session
    page = (Path(__file__).parents[1]/'gradio_app'/'static'/'screen.html').read_text()
    assert re.search(r'<output id="m-level-out">(\d+)<', page)[1] == re.search(r'id="m-level" [^>]*value="(\d+)"', page)[1] == str(MEMORY_LEVEL)
    assert {inspect.signature(f).parameters['level'].default for f in (Session, bench_stream)} == {MEMORY_LEVEL}
    said = [cli._make_parser().parse_args(a).level for a in (['bench', 'quality'], ['bench', 'stream'], ['animate', 'p.png', 'a.wav', '-o', 'o.mp4'])]
    assert set(said) == {MEMORY_LEVEL}

def test_a_taken_port_is_said_in_one_line():
    import socket
    from gradio_app.run import check_place
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(); port = s.getsockname()[1]
        with pytest.raises(OSError, match=f'port {port} .*--port'): check_place('127.0.0.1', port)
    check_place('127.0.0.1', port)
    with pytest.raises(OSError, match='--host'): check_place('nowhere.invalid', 7860)
