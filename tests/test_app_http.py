"Strangers at the HTTP interface and the socket: a refusal with a reason each time, never a 500, no file left, and nobody else disturbed"
import io, json, os, socket, struct, threading, time
from pathlib import Path
import numpy as np, pytest
for m in ('fastapi', 'uvicorn', 'websockets', 'av', 'httpx', 'cv2'): pytest.importorskip(m)
import httpx, uvicorn
from PIL import Image
from websockets.sync.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from app_stand_in import small
from gradio_app.live import Limits
from gradio_app.server import App, make_server

ROOT = Path(__file__).resolve().parents[1]

class Site:
    "The app on a free port, without its page."
    def __init__(self, load, page=False, **limits):
        self.app = App(load, Limits(**limits))
        self.server = uvicorn.Server(uvicorn.Config(make_server(self.app, page=page), host='127.0.0.1', port=0, log_level='error', ws_max_size=1_000_000, ws_ping_interval=2, ws_ping_timeout=4))
        self.thread = threading.Thread(target=self.server.run, daemon=True); self.thread.start()
        end = time.monotonic() + 40
        while not (self.server.started and self.app.hub.state in ('ready', 'missing')) and time.monotonic() < end: time.sleep(.02)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]; self.url = f'http://127.0.0.1:{self.port}'
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))   # client and server both drop an idle connection after 5 s: a request in that moment would be reset
    def visit(self, **kw): return connect(f'ws://127.0.0.1:{self.port}/api/live', max_size=None, proxy=None, **kw)
    def status(self): return self.http.get('/api/status').json()
    def until(self, f, seconds=10):
        end = time.monotonic() + seconds
        while not f(s := self.status()) and time.monotonic() < end: time.sleep(.03)
        assert f(s), s
    def close(self): self.http.close(); self.server.should_exit = True; self.thread.join(20); assert not self.thread.is_alive() and not self.app.hub.folder.exists()

@pytest.fixture(scope='module')
def site():
    s = Site(small, sessions=2, waiting=60, upload=2_000_000, audio=20.); yield s; s.close()

def talk(ws, **d): ws.send(json.dumps(d))
def hear(ws, kind, seconds=10):
    "The next message of a type."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        m = ws.recv(timeout=end - time.monotonic())
        if isinstance(m, str) and (d := json.loads(m))['type'] == kind: return d
    raise AssertionError(f'no {kind}')
def go(ws, **kw): talk(ws, type='start', portrait={'sample': 'mira'}, **kw); return hear(ws, 'live')
def png(size=(96, 96), mode='RGB', **kw): b = io.BytesIO(); Image.new(mode, size, 128).save(b, 'PNG', **kw); return b.getvalue()
def wav(x, rate=16000):
    x = np.asarray(x, '<i2').tobytes()
    return b'RIFF' + struct.pack('<I', 36 + len(x)) + b'WAVEfmt ' + struct.pack('<IHHIIHH', 16, 1, 1, rate, rate*2, 2, 16) + b'data' + struct.pack('<I', len(x)) + x

# ---- what it is for

def test_a_visit_through_the_socket(site):
    with site.visit() as ws:
        assert go(ws, mic=True)['fps'] == 12.5
        talk(ws, type='mic', on=True, rate=48000); t = np.arange(48000)/48000
        for x in np.split((.3*32767*np.sin(2*np.pi*220*t)).astype('<i2'), 50): ws.send(x.tobytes())
        kinds, sound = [], 0
        while kinds.count(2) < 6:
            m = ws.recv(timeout=10)
            if isinstance(m, bytes):
                kind, pts, _ = struct.unpack('<BxxxIf', m[:12]); kinds.append(kind)
                if kind == 2: assert Image.open(io.BytesIO(m[12:])).size == (128, 128)
                else: assert pts == sound; sound += len(m[12:])//2
        talk(ws, type='stop'); end = hear(ws, 'ended')
    r = site.http.get('/api/recording/' + end['recording'])
    assert r.status_code == 200 and r.headers['content-type'] == 'video/mp4' and r.content[4:8] == b'ftyp'

def test_a_file_and_a_made_person(site):
    p = site.http.post('/api/person', json={'seed': 7}).json()
    assert p['picture'].startswith('data:image/jpeg') and p['identity']['seed'] == 7
    q = site.http.post('/api/person', json={'identity': p['identity'] | {'hair': 'afro', 'hair_color': 'aa3311'}}).json(); assert q['identity']['hair'] == 'afro'
    a = site.http.post('/api/audio', content=(ROOT/'data_samples'/'speech'/'en-us.flac').read_bytes()).json(); assert 4 < a['seconds'] < 5
    with site.visit() as ws:
        talk(ws, type='start', portrait={'key': q['key']}); hear(ws, 'live'); talk(ws, type='say', key=a['key'])
        end = time.monotonic() + 8; loud = 0
        while not loud and time.monotonic() < end:
            m = ws.recv(timeout=8)
            if isinstance(m, bytes) and m[0] == 1: loud = np.abs(np.frombuffer(m[12:], '<i2')).max() > 500
        assert loud

def test_a_photograph_becomes_a_look_alike_and_a_drawn_portrait_stays(site):
    data = (ROOT/'data_samples'/'portraits'/'tobias.png').read_bytes()
    r = site.http.post('/api/portrait', content=data).json(); assert 'look-alike' in r['note'] and r['identity']['skin'] > .4
    r = site.http.post('/api/portrait?drawn=1', content=data).json(); assert r['identity'] is None and 'look-alike' not in r['note']

def test_typed_text(site):
    pytest.importorskip('espeakng_loader')
    r = site.http.post('/api/speech', json={'text': 'Buenos días.', 'lang': 'es'}); assert r.status_code == 200 and r.json()['seconds'] > .3

def test_headers(site):
    h = site.http.get('/api/status').headers
    assert "default-src 'self'" in h['content-security-policy'] and h['x-content-type-options'] == 'nosniff'

# ---- hostile requests, as a table: method, path, body, headers

PATHS = ['../../etc/passwd', '..%2f..%2fetc%2fpasswd', '%2e%2e/%2e%2e/settings.ini', '/etc/passwd', '%00', 'app.js%00.png', '..\\..\\settings.ini', 'file:///etc/passwd', 'a'*3000, '~root', '.', '..', '%c0%ae%c0%ae/', 'server.py', '\u202e', '%F0%9F%92%A9']
GET = [('GET', f'/api/{where}/{p}', None, {}) for where in ('recording', 'people', 'file') for p in PATHS]
IDENTITIES = [None, [], 5, 'x', {}, {'identity': None}, {'identity': []}, {'identity': {'hair': '../../x'}}, {'identity': {'hair': ['bald']}}, {'identity': {'age': 1e9}}, {'identity': {'age': -1}}, {'identity': {'age': True}}, {'identity': {'age': '30'}},
    {'identity': {'skin': {}}}, {'identity': {'skin': 2}}, {'identity': {'hair_color': 'zzzzzz'}}, {'identity': {'hair_color': 'ff'}}, {'identity': {'cloth_color': 7}}, {'identity': {'__class__': 1}}, {'identity': {'seed': 2**40}}, {'identity': {'seed': -1}}, {'identity': {'seed': 1.5}},
    {'seed': -1}, {'seed': 2**31}, {'seed': '7'}, {'seed': None}, {'seed': 1e300}, {'seed': True}, {'seed': [1]}, {'identity': {str(i): i for i in range(500)}}]
TEXTS = [{}, {'text': ''}, {'text': ' '}, {'text': 5}, {'text': None}, {'text': ['a']}, {'text': 'a'*301}, {'text': 'hello', 'lang': 'xx'}, {'text': 'hello', 'lang': ['es']}, {'text': 'hello', 'lang': '../../espeak'}, {'text': 'hello', 'lang': None}, {'text': '\u200b\x00\x01'}, {'text': '<break time="99999s"/>'*15}]
RAW = [b'', b'\x00'*10, b'null', b'NaN', b'[' * 5000, b'{"text": NaN}', b'{"text": Infinity}', b'{"text": 1e999}', b'\xff\xfe{}', b'{"text":"\xed\xa0\x80"}', b'"' + b'x'*30_000 + b'"']
def broken_pictures():
    good = png((300, 300)); bomb = io.BytesIO(); Image.new('1', (20000, 20000)).save(bomb, 'PNG'); gif = io.BytesIO(); Image.new('P', (70, 70)).save(gif, 'GIF', save_all=True, append_images=[Image.new('P', (70, 70))]*3)
    head = lambda w, h: good[:16] + struct.pack('>II', w, h) + good[24:]
    return [b'', b'\x89PNG\r\n\x1a\n', good[:40], good[:-30], good[:len(good)//2], head(2**31 - 1, 2**31 - 1), head(0, 0), head(60000, 60000), bomb.getvalue(), png((1, 1)), png((63, 200)), b'GIF89a' + b'\xff'*50, gif.getvalue()[:60], b'\xff\xd8\xff\xe0' + b'\x00'*500, b'RIFF\x00\x00\x00\x00WEBPVP8 ', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run', b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
            b'BM' + b'\xff'*60, b'II*\x00' + b'\xff'*60, b'<?php system("id"); ?>', b'#!/bin/sh\nid', os.urandom(5000), b'PK\x03\x04' + b'\x00'*99, b'\x00\x00\x01\x00\x01\x00' + b'\xff'*40, b'a'*2_100_000]
def broken_sounds():
    good = wav(np.zeros(1600))
    lie = good[:40] + struct.pack('<I', 2**32 - 1) + good[44:]; rate = lambda r: good[:24] + struct.pack('<I', r) + good[28:]
    return [b'', b'RIFF', good[:30], good[:44], rate(0), rate(1), rate(2**31), good[:22] + struct.pack('<H', 0) + good[24:], good[:22] + struct.pack('<H', 65535) + good[24:], good[:34] + struct.pack('<H', 77) + good[36:], b'OggS' + b'\x00'*90, b'fLaC' + b'\xff'*90, b'ID3' + b'\xff'*90, os.urandom(9000), b'<html>', png(), b'#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n', b'#EXTM3U\nhttp://127.0.0.1:9/x\n',
            b'ffconcat version 1.0\nfile /etc/passwd\n', b'v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=audio 9 RTP/AVP 0\r\n', b'<?xml version="1.0"?><MPD><Period><AdaptationSet><Representation><BaseURL>file:///etc/passwd</BaseURL></Representation></AdaptationSet></Period></MPD>', b'a'*2_100_000, lie]
POST = [('POST', '/api/person', json.dumps(b).encode(), {}) for b in IDENTITIES] + [('POST', '/api/speech', json.dumps(b).encode(), {}) for b in TEXTS] + [('POST', p, b, {}) for p in ('/api/person', '/api/speech') for b in RAW]
POST += [('POST', '/api/portrait', b, {}) for b in broken_pictures()] + [('POST', '/api/audio', b, {}) for b in broken_sounds()]
ODD = [('POST', '/api/person', b'{"seed":1}', {'origin': 'http://evil.example'}), ('POST', '/api/portrait', png(), {'origin': 'null'}), ('POST', '/api/person', b'{"seed":1}', {'origin': 'http://[bad'}), 
       ('PUT', '/api/person', b'{}', {}), ('DELETE', '/api/recording/x', None, {}), ('PATCH', '/api/status', b'', {}), ('POST', '/api/status', b'', {}), ('GET', '/api/person', None, {}), ('GET', '/api/live', None, {}), ('GET', '/api/nothing', None, {}), ('GET', '/docs', None, {}), ('GET', '/openapi.json', None, {}), ('GET', '/api//etc/passwd', None, {}), ('TRACE', '/api/status', None, {}), ('GET', '/api/start?' + 'x=1&'*500, None, {'range': 'bytes=0-99999999999999'})]
REFUSED = GET + POST + ODD
GOOD = {('GET', '/api/start')}

MESSAGES = [b'', b'\x00', b'\x00'*3, b'\xff'*400_001, 'x', '', '{}', '[]', 'null', '5', '"start"', '{"type": NaN}', '[' * 9000, '{"type":"nothing"}', '{"type":["start"]}', '{"type":{}}', '{"type":null}', '{"type":"steer"', '{"type":"offer"}', '{"type":"offer","sdp":5}', '{"type":"offer","sdp":"v=0"}', '{"type":"say","key":["x"]}', '{"type":"say","key":{"a":1}}', '{"type":"say"}', '{"type":"mic","rate":0}', '{"type":"mic","rate":"48000"}',
    '{"type":"mic","rate":1e400}', '{"type":"mic","rate":-1}', '{"type":"mic","rate":true}', '{"type":"ping","t":{}}', '{"type":"hush"}', '{"type":"leave"}', '{"type":"steer","yaw":1e999}', '{"type":"steer","__class__":1}', '{"type":"steer","hub":1}', '{"type":"start"}', '{"type":"start","portrait":"../../etc/passwd"}', '{"type":"start","portrait":{"sample":"../mira"}}', '{"type":"start","portrait":{"sample":["mira"]}}', '{"type":"start","portrait":{"key":{}}}', '{"type":"start","portrait":{"path":"/etc/passwd"}}',
    '{"type":"start","portrait":{"sample":"mira"},"frames":"6"}', '{"type":"start","portrait":{"sample":"mira"},"frames":true}', '{"type":"start","portrait":{"sample":"mira"},"frames":[6]}', '{"type":"start","portrait":[]}']
LIVE = ['{"type":"steer","expression":"evil"}', '{"type":"steer","expression":["happy"]}', '{"type":"steer","expression":{}}', '{"type":"steer","text":5}', json.dumps({'type': 'steer', 'text': 'x'*5000}), '{"type":"steer","level":-1}', '{"type":"steer","level":1e308}', '{"type":"steer","level":"3"}', '{"type":"steer","level":[3]}', '{"type":"steer","frames":0}', '{"type":"steer","frames":6000}', '{"type":"steer","frames":[6]}', '{"type":"steer","frames":{}}', '{"type":"steer","yaw":99}', '{"type":"steer","yaw":"left"}', '{"type":"steer","yaw":[1]}',
    '{"type":"steer","portrait":1}', '{"type":"start","portrait":{"sample":"mira"}}', '{"type":"say","key":"nope"}', b'\x01\x02\x03', json.dumps({'type': 'offer', 'sdp': 'v=0\r\n' + 'a=x\r\n'*200}), json.dumps({'type': 'offer', 'sdp': 'v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\nc=IN IP4 0.0.0.0\r\n'}), json.dumps({'type': 'offer', 'sdp': 'v=0\r\nm=video 0 x\r\n'*50}), json.dumps({'type': 'offer', 'sdp': 'v=0' + 'x'*50000}), '{"type":"mic","rate":4}']

def test_the_table_is_long_enough(): assert len(REFUSED) + len(MESSAGES) + len(LIVE) + 50 >= 200

def test_hostile_requests(site):
    "Every one is answered within seconds, none with a 500, and a visitor who is live meanwhile keeps her pictures."
    with site.visit() as other:
        go(other, mic=False); seen, stop = [], threading.Event()
        def watch():
            while not stop.is_set():
                try: m = other.recv(timeout=.5)
                except TimeoutError: continue
                except ConnectionClosed: return
                if isinstance(m, bytes) and m[0] == 2: seen.append(time.monotonic())
        w = threading.Thread(target=watch); w.start(); wrong = []
        before = set(site.app.hub.folder.iterdir())
        for method, path, body, head in REFUSED:
            begun = time.monotonic()
            try: r = site.http.request(method, path, content=body, headers=head); code, text = r.status_code, r.text
            except httpx.InvalidURL: continue
            except httpx.HTTPError as e: code, text = repr(e), ''                 # the server may hang up on a wrong length
            hung, leak = time.monotonic() - begun > 20, 'root:' in text or 'Traceback' in text or str(site.app.hub.folder) in text
            if code == 500 or hung or leak or (code == 200 and not path.startswith('/api/start') and (method, path) not in GOOD and path not in FINE): wrong.append((method, path[:60], (body or b'')[:40], code, text[:100]))
        assert not wrong, wrong
        left = [f for f in set(site.app.hub.folder.iterdir()) - before if f.suffix != '.part']       # the recording of the visitor who is live
        assert not left and site.status()['live'] == 1
        n = len(seen); time.sleep(2); stop.set(); w.join()
        assert len(seen) - n > 8 and site.app.hub.count['failed'] == 0

FINE = {'/api/portrait', '/api/audio', '/api/speech'}      # a decoder may make sense of a strange file; what counts is that nothing breaks

def test_hostile_messages(site):
    with site.visit() as ws:
        for m in MESSAGES:
            try: ws.send(m)
            except ConnectionClosed: pytest.fail(f'closed before {m[:40]!r}')
        talk(ws, type='ping', t=1)
        while hear(ws, 'pong', 20)['t'] != 1: pass                                         # the first answers a ping of the table
    site.until(lambda s: s['live'] == 0 and s['waiting'] == 0)
    with site.visit() as ws:
        go(ws, mic=False)
        for m in LIVE: ws.send(m)
        talk(ws, type='ping', t=2); hear(ws, 'pong', 20); assert site.status()['live'] == 1
        end, got = time.monotonic() + 8, 0
        while got < 6 and time.monotonic() < end: m = ws.recv(timeout=8); got += isinstance(m, bytes) and m[0] == 2
        assert got == 6 and site.app.hub.count['failed'] == 0
    site.until(lambda s: s['live'] == 0)

def test_a_message_above_the_limit_closes_only_that_socket(site):
    with site.visit() as other:
        go(other)
        with site.visit() as ws:
            with pytest.raises(ConnectionClosed):
                ws.send(b'\x00'*1_100_000)
                while True: ws.recv(timeout=5)
        assert hear(other, 'figures', 5)
    site.until(lambda s: s['live'] == 0)

def test_another_sites_page_gets_no_socket(site):
    for origin in ('http://evil.example', 'null', f'http://localhost:{site.port + 1}'):
        with pytest.raises((InvalidStatus, ConnectionClosed)):
            with site.visit(additional_headers={'Origin': origin}) as ws: ws.recv(timeout=3)
    with site.visit(additional_headers={'Origin': site.url}) as ws: talk(ws, type='ping', t=1); hear(ws, 'pong')

def test_fifty_rapid_connects_and_killed_tabs(site):
    all_ = [site.visit() for _ in range(50)]
    for ws in all_[:2]: go(ws)                                                              # nobody promises an order among sockets, so the two who come in come first
    for ws in all_[2:]: talk(ws, type='start', portrait={'sample': 'mira'})
    told = [hear(ws, 'queue') for ws in all_[2:]]; assert sorted(q['before'] for q in told) == list(range(1, 49)) and all(f"number {q['before']} " in q['message'] for q in told)
    site.until(lambda s: s['live'] == 2 and s['waiting'] == 48)
    for ws in all_[:25]: ws.socket.shutdown(socket.SHUT_RDWR)                               # as a killed tab: no farewell
    site.until(lambda s: s['live'] == 2 and s['waiting'] == 23)
    for ws in all_: ws.close()
    site.until(lambda s: s['live'] == 0 and s['waiting'] == 0 and s['held_mb'] == 0)

def test_ten_starts_and_stops_and_the_next_visitor(site):
    begun = site.status()['counters']
    with site.visit() as ws:
        for i in range(10): go(ws); talk(ws, type='stop'); assert hear(ws, 'ended')['reason'] == 'stopped'
    a, b, c = site.visit(), site.visit(), site.visit()
    go(a); go(b); talk(c, type='start', portrait={'sample': 'mira'}); assert 'number 1' in hear(c, 'queue')['message']
    t = time.monotonic(); a.socket.shutdown(socket.SHUT_RDWR); hear(c, 'live', 5); assert time.monotonic() - t < 2
    for ws in (a, b, c): ws.close()
    site.until(lambda s: s['live'] == 0 and s['counters']['opened'] == s['counters']['closed'])
    assert site.status()['counters']['opened'] - begun.get('opened', 0) == 13

def test_slow_and_half_requests_do_not_hold_the_server(site):
    held = []
    for _ in range(20):
        s = socket.create_connection(('127.0.0.1', site.port)); s.sendall(b'POST /api/portrait HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nabc'); held.append(s)
    t = time.monotonic(); assert site.http.get('/api/status').status_code == 200 and time.monotonic() - t < 3
    for s in held: s.close()
    for length in ('99999999999', '-5', 'x', '1e9', '٥'):                              # a body that is announced too large, or in no number at all
        with socket.create_connection(('127.0.0.1', site.port), timeout=10) as s:
            s.sendall(f'POST /api/audio HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nConnection: close\r\n\r\nabc'.encode()); assert s.recv(20)[9:12] in (b'413', b'400')

def test_gradios_own_doors_are_closed():
    "The page is Gradio's, but nothing of a visitor goes through its upload, file or proxy routes."
    pytest.importorskip('gradio')
    s = Site(small, page=True)
    try:
        assert s.http.get('/').status_code == 200
        for method, path in [('POST', 'upload'), ('GET', 'file=/etc/passwd'), ('GET', 'file/etc/passwd'), ('GET', 'file=../../settings.ini'), ('GET', 'proxy=http://127.0.0.1:9/'), ('POST', 'run/predict'), ('POST', 'call/x'), ('GET', 'stream/x/y/z/playlist.m3u8'), ('POST', 'component_server')]:
            r = s.http.request(method, f'/gradio_api/{path}', files={'files': ('../../x', b'x')} if path == 'upload' else None); assert r.status_code in (404, 405), (path, r.status_code)
        for path in ('/static/../../../etc/passwd', '/assets/..%2f..%2f..%2fetc/passwd', '/custom_component/x/../../y', '/theme.css/..%2f'):
            r = s.http.get(path); assert r.status_code < 500 and 'root:' not in r.text
        assert s.http.post('/gradio_api/queue/join', content=b'{"data": [' + b'1,'*500, headers={'content-type': 'application/json'}).status_code < 500
    finally: s.close()

def test_without_weights():
    def nothing(): raise FileNotFoundError('No model at here.')
    s = Site(nothing)
    try:
        st = s.status(); assert st['state'] == 'missing' and 'No model' in st['note']
        assert s.http.post('/api/person', json={'seed': 3}).status_code == 200 and len(s.http.get('/api/start').json()['people']) == 11
        with s.visit() as ws: talk(ws, type='start', portrait={'sample': 'mira'}); assert 'No model' in hear(ws, 'refused')['message']
    finally: s.close()
