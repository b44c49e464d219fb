"""How live the app is: a recording played as a microphone in real time, and when each picture of it is there."""
import contextlib, dataclasses, json, shutil, struct, tempfile, threading, time
from pathlib import Path
import numpy as np
from .live import RATE
from .run import SOCKET, make

SPEECH = Path(__file__).resolve().parents[1]/'data_samples'/'speech'

def recording(seconds:float)->np.ndarray:
    "The sample sentences one after the other, with pauses: float32 at 16 kHz."
    from midas_ref.inference.video import read_audio
    parts = [np.concatenate([read_audio(p), np.zeros(RATE//2, np.float32)]) for p in sorted(SPEECH.glob('*.flac'))]
    return np.resize(np.concatenate(parts), round(seconds*RATE))

@contextlib.contextmanager
def running(settings):
    "The app on a free port of this machine: its `App`, the port, seconds until it answered and until the model was ready."
    import uvicorn
    begun = time.perf_counter(); app, api = make(settings)
    server = uvicorn.Server(uvicorn.Config(api, host='127.0.0.1', port=0, log_level='error', **SOCKET))
    thread = threading.Thread(target=server.run, daemon=True); thread.start()
    try:
        while not server.started:
            if not thread.is_alive(): raise RuntimeError('The server did not start.')
            time.sleep(.02)
        answered = time.perf_counter() - begun
        while app.hub.state not in ('ready', 'missing'): time.sleep(.02)
        if app.hub.state == 'missing': raise FileNotFoundError(app.hub.note)
        yield app, server.servers[0].sockets[0].getsockname()[1], answered, time.perf_counter() - begun
    finally:
        server.should_exit = True; thread.join(20)

def by_socket(port, seconds, frames)->dict:
    "A visitor without a browser: seconds from the sound of a picture to that picture, as it comes through the socket."
    from websockets.sync.client import connect
    x = (recording(seconds)*32767).astype('<i2'); sent, wait, stages = [], [], {}
    with connect(f'ws://127.0.0.1:{port}/api/live', max_size=None, proxy=None) as ws:
        ws.send(json.dumps(dict(type='start', portrait=dict(sample='mira'), mic=True, frames=frames)))
        while json.loads(ws.recv(timeout=60))['type'] != 'live': pass
        def microphone():
            begun = time.perf_counter(); sent.append(begun)
            for i in range(0, len(x), 320):
                time.sleep(max(0, begun + (i + 320)/RATE - time.perf_counter())); ws.send(x[i:i+320].tobytes())
        t = threading.Thread(target=microphone, daemon=True); t.start(); skipped = 0
        while t.is_alive():
            try: m = ws.recv(timeout=1.)
            except TimeoutError: continue
            now = time.perf_counter()
            if isinstance(m, str):
                d = json.loads(m)
                if d['type'] == 'figures': skipped, stages = d['skipped'], d['stages_ms']
                continue
            kind, pts, _ = struct.unpack('<BxxxIf', m[:12])
            if kind == 2: wait.append((pts, now - sent[0] - pts/RATE))
        ws.send(json.dumps(dict(type='stop')))
    step = RATE*2/25                                           # a picture of each chunk decides when the chunk can be shown
    worst = {}
    for pts, w in wait: worst[int(pts//(step*frames))] = max(worst.get(int(pts//(step*frames)), 0), w)
    return dict(seconds=list(worst.values()), pictures=len(wait), skipped=skipped, stages_ms=stages)

def by_browser(port, seconds, chromium)->dict:
    "A visitor in headless Chromium with the recording as the microphone, through the socket: what the page itself measures."
    import soundfile
    from playwright.sync_api import sync_playwright
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        soundfile.write(f'{folder}/mic.wav', np.repeat(recording(30), 3), 48000, subtype='PCM_16')
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream',
            f'--use-file-for-fake-audio-capture={folder}/mic.wav', '--autoplay-policy=no-user-gesture-required'])
        page = b.new_page(); page.goto(f'http://127.0.0.1:{port}/'); page.wait_for_selector('[data-ready="1"]', timeout=60_000)
        page.select_option('#m-way', 'ws'); page.click('#m-mic'); page.wait_for_function('window.midas.stats().shown > 0', timeout=60_000)
        page.wait_for_timeout(1000*seconds); s = page.evaluate('window.midas.stats()'); b.close()
    gaps = np.diff(s['times'])
    return dict(seconds=[v/1000 for v in s['latency']], skew_ms=s['skew'], pictures=s['shown'], late=s['late'], stalls=s['stalls'], skipped=s['figures'].get('skipped', 0), longest_gap_ms=float(gaps.max()) if len(gaps) else None, stages_ms=s['figures'].get('stages_ms', {}))

def bench(settings, seconds=60., frames=6, browser=False, as_json=False):
    "Start the app, visit it, print what was measured."
    import torch
    from midas_ref.codec.dcae import machine
    from midas_ref.metrics import latency
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if browser and not chromium: raise FileNotFoundError('No Chromium on this machine; leave --browser out to measure without one.')
    with running(settings) as (app, port, answered, ready):
        pace, out = app.hub.pace, by_browser(port, seconds, chromium) if browser else by_socket(port, seconds, frames)
    if not out['seconds']: raise RuntimeError('No picture came in that time.')
    out |= dict(latency=dataclasses.asdict(latency(out['seconds'], warmup=min(2, len(out['seconds']) - 1))), answered_s=answered, ready_s=ready, pace=pace, machine=machine(app.hub.device), torch=torch.__version__, way='browser' if browser else 'socket')
    if as_json: print(json.dumps({k: v for k, v in out.items() if k != 'seconds'})); return
    if skew := out.get('skew_ms'): out['skew_ms'] = latency([abs(v)/1000 for v in skew])
    print(f"{out['machine']}, torch {out['torch']}; model: {settings.weights.model}; {seconds:g} s of speech as a microphone, chunks of {1000*frames*.08:g} ms")
    print(f"start: the page answers after {answered:.1f} s, the model is ready after {ready:.1f} s; drawing takes {pace:.2f} s for a second of video")
    print(f"sound in to picture {'shown in the browser' if browser else 'at the client'} ({'every picture shown' if browser else 'slowest picture of each chunk'}): {latency(out['seconds'], warmup=min(2, len(out['seconds']) - 1))}")
    print(f"pictures {out['pictures']}, skipped {out['skipped']}" + (f", late {out['late']}, stalls of the sound {out['stalls']}, longest gap {out['longest_gap_ms']:.0f} ms; |sound - picture|: {out['skew_ms']}" if browser else ''))
    print('stages, median ms: ' + ', '.join(f'{k} {v}' for k, v in out['stages_ms'].items()))
