"""The app's web server: a small HTTP interface, one WebSocket for each visitor, and the Gradio page over both."""
import asyncio, contextlib, dataclasses, importlib.util, io, json, logging, struct, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit
import numpy as np
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from starlette.requests import ClientDisconnect
from fastapi.responses import FileResponse, JSONResponse, Response
from .live import RATE, Hub, Limits, Refused
from .people import Person, Store, check_identity, controls, data_url, fit_size, gallery, open_upload, paint

log = logging.getLogger('midas_ref.app')
STATIC = Path(__file__).with_name('static')
FILES = {'app.js': 'text/javascript', 'app.css': 'text/css', 'mic.js': 'text/javascript'}     # all that may be asked for by name
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss: data: blob:; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
MESSAGE = 400_000      # bytes of a WebSocket message
LANGUAGES = {'en-us': 'English (US)', 'en-gb': 'English (GB)', 'cmn': 'Mandarin', 'ja': 'Japanese (kana)', 'es': 'Spanish', 'fr': 'French', 'de': 'German', 'hi': 'Hindi', 'ar': 'Arabic',
             'pt-br': 'Portuguese', 'ru': 'Russian', 'ko': 'Korean', 'it': 'Italian', 'nl': 'Dutch', 'tr': 'Turkish', 'sw': 'Swahili'}
ENDS = {'stopped': 'Stopped.', 'idle': 'Ended after a while without voice or steering, so that others can come in.', 'time is up': 'The time of this session is up, so that others can come in.',
        'gone': 'The visitor left.', 'too slow': 'The connection is too slow for live pictures.', 'an error of ours': 'Something broke on our side; please start again.', 'app closed': 'The app was closed.'}

CLOSED = ('upload', 'file', 'proxy', 'stream', 'deep_link', 'component_server', 'call', 'run', 'reset', 'login', 'logout', 'dev', 'vibe')   # of Gradio's own interface: the page needs none of it

class Gate:
    "Headers on every answer; no state-changing request and no WebSocket from another site's page; no body above the limit."
    def __init__(self, app, limit:int): self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send):
        if scope['type'] not in ('http', 'websocket'): return await self.app(scope, receive, send)
        head = {k.decode('latin1').lower(): v.decode('latin1') for k, v in scope['headers']}
        origin, strange = head.get('origin'), False
        if origin and (scope['type'] == 'websocket' or scope['method'] not in ('GET', 'HEAD', 'OPTIONS')):
            try: strange = urlsplit(origin).netloc != head.get('host')
            except ValueError: strange = True
        if strange:
            if scope['type'] == 'websocket': await receive(); return await send({'type': 'websocket.close', 'code': 4403})
            return await JSONResponse({'error': 'This request comes from another site.'}, 403)(scope, receive, send)
        if scope['type'] == 'websocket': return await self.app(scope, receive, send)
        if (p := scope['path'].lstrip('/')).startswith('gradio_api/') and p[11:].startswith(CLOSED): return await JSONResponse({'error': 'Not here.'}, 404)(scope, receive, send)
        length = head.get('content-length', '0')
        if not length.isdigit() or int(length) > self.limit: return await JSONResponse({'error': f'Too large: {self.limit/1e6:g} MB at most.'}, 413)(scope, receive, send)
        async def out(message):
            if message['type'] == 'http.response.start':
                message['headers'] = [*message['headers'], (b'content-security-policy', POLICY.encode()), (b'x-content-type-options', b'nosniff'), (b'referrer-policy', b'no-referrer')]
            await send(message)
        await self.app(scope, receive, out)

async def body_of(request:Request, limit:int, seconds:float=30.)->bytes:
    "The body of a request, up to a limit of bytes and of time."
    out = bytearray()
    async def read():
        async for part in request.stream():
            out.extend(part)
            if len(out) > limit: raise Refused(f'Too large: {limit/1e6:g} MB at most.')
    try: await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError: raise Refused('The upload took too long.') from None
    except ClientDisconnect: raise Refused('The visitor left.') from None
    if not out: raise Refused('Nothing was sent.')
    return bytes(out)

def json_of(data)->dict:
    "A JSON object from outside, with finite numbers only."
    def no(x): raise ValueError(x)
    try: d = json.loads(data, parse_constant=no)
    except (ValueError, RecursionError, UnicodeDecodeError): raise Refused('This is no valid JSON.') from None
    if not isinstance(d, dict): raise Refused('A JSON object is needed.')
    return d

def say(text, lang, voice):
    "espeak-ng, in a process of its own."
    from midas_ref.data.speech import synth
    return synth(text, lang, voice, speed=155).samples

class Desk:
    "Slow work for visitors, a little at a time."
    def __init__(self, most:int=8):
        self.most, self.waiting, self.pool, self.lock, self.voices = most, 0, ThreadPoolExecutor(1, 'midas-desk'), threading.Lock(), None

    async def __call__(self, f, *args):
        with self.lock:
            if self.waiting >= self.most: raise Refused('Many visitors are asking for this at once; please try again in a moment.')
            self.waiting += 1
        future = self.pool.submit(f, *args)
        future.add_done_callback(lambda _: setattr(self, 'waiting', self.waiting - 1))
        return await asyncio.wait_for(asyncio.wrap_future(future), 120)

    def speak(self, text, lang, voice)->np.ndarray:
        "Runs in the desk's thread; espeak-ng may crash, so it works in another process."
        import multiprocessing as mp
        from concurrent.futures import ProcessPoolExecutor
        from concurrent.futures.process import BrokenProcessPool
        self.voices = self.voices or ProcessPoolExecutor(1, mp.get_context('spawn'))
        try: return self.voices.submit(say, text, lang, voice).result(60)
        except BrokenProcessPool: self.voices = None; raise Refused('The voice broke on this text; please change it a little.') from None
        except TimeoutError: self.voices.shutdown(wait=False, cancel_futures=True); self.voices = None; raise Refused('This text took too long.') from None
        except ValueError as e: raise Refused(str(e)) from None

    def close(self):
        self.pool.shutdown(cancel_futures=True)
        if self.voices: self.voices.shutdown(cancel_futures=True)

class App:
    "All that the routes share."
    def __init__(self, load, limits:Limits=Limits(), device='cpu', loopback=True):
        self.hub, self.limits, self.desk, self.loopback = Hub(load, limits, device), limits, Desk(), loopback
        self.people, self.portraits, self.sounds = gallery(), Store(64), Store(32)
        self.visits = set()

    @property
    def size(self):
        m = self.hub.midas
        return (m.cfg.video.height, m.cfg.video.width) if m else (256, 256)

    def portrait(self, d)->np.ndarray:
        "What a start message calls its portrait; a name or a key, never a path."
        if not isinstance(d, dict): raise Refused('portrait: accepted: {"sample": name} or {"key": key}.')
        p = self.people.get(d['sample']) if isinstance(d.get('sample'), str) else self.portraits.get(d.get('key'))
        if p is None: raise Refused('This portrait is not here (any more); please choose it again.')
        return fit_size(p.picture, self.size)

    def keep(self, p:Person)->dict:
        return dict(key=self.portraits.put(p), name=p.name, picture=data_url(p.picture), identity=p.identity, note=p.note)

    def upload(self, data, drawn)->Person:
        codec = self.hub.midas.codec if self.hub.midas else None
        return open_upload(data, self.hub.folder, self.size, codec, drawn)

    def read_sound(self, data)->np.ndarray:
        from midas_ref.inference.video import read_audio
        with tempfile.NamedTemporaryFile(dir=self.hub.folder, suffix='.upload') as f:
            f.write(data); f.flush()
            try: x = read_audio(f.name)
            except Refused: raise
            except Exception as e: raise Refused((str(e).replace(f.name, 'The file').split('\n')[0] or type(e).__name__)[:300]) from None
        if not len(x): raise Refused('The file holds no sound.')
        return np.nan_to_num(x[:round(self.limits.audio*RATE)]).clip(-1, 1).astype(np.float32)

    def status(self): return self.hub.status() | dict(webrtc=importlib.util.find_spec('aiortc') is not None, voices=importlib.util.find_spec('espeakng_loader') is not None,
        chunks=list(self.hub.chunks), levels=self.hub.levels, upload_mb=self.limits.upload/1e6, audio_seconds=self.limits.audio, text=self.limits.text)

    def close(self): self.hub.close(); self.desk.close()

class Visit:
    "One WebSocket, from the first message to the last."
    def __init__(self, app:App, ws:WebSocket):
        self.app, self.ws, self.out, self.loop = app, ws, asyncio.Queue(), asyncio.get_running_loop()
        self.live = self.ticket = self.rtc = self.starting = None
        self.rate, self.over = RATE, False

    # the worker's thread
    def emit(self, kind, **v):
        with contextlib.suppress(RuntimeError): self.loop.call_soon_threadsafe(self.took, kind, v)

    # the loop's thread
    def took(self, kind, v):
        if self.over: return
        if kind == 'ended':
            self.send(type='ended', reason=v['reason'], message=ENDS.get(v['reason'], v['reason']), recording=v['recording'], frames=v['frames']); self.live = None; return
        if self.rtc: self.rtc.player.put(kind, v['pts'], v['samples'] if kind == 'sound' else v['picture'])
        elif self.out.qsize() > 400:
            if self.live: self.live.close('too slow')
        elif kind == 'sound': self.out.put_nowait(struct.pack('<BxxxIf', 1, v['pts'], 0) + (np.clip(v['samples'], -1, 1)*32767).astype('<i2').tobytes())
        elif self.out.qsize() < 60: self.out.put_nowait((v['pts'], v['latency'], v['picture']))

    def send(self, **d): self.out.put_nowait(json.dumps(d))

    async def run(self):
        "Until the visitor goes."
        await self.ws.accept()
        tasks = [asyncio.ensure_future(f()) for f in (self.writer, self.reader, self.panel)]
        try: await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.over = True
            for t in tasks: t.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.starting: self.starting.cancel()             # after the reader, which may have begun one in its last moment
            if self.ticket: self.app.hub.leave(self.ticket)
            if self.live: self.live.close('gone')
            if self.rtc: await self.rtc.close()
            with contextlib.suppress(Exception): await self.ws.close()

    async def writer(self):
        from PIL import Image
        while True:
            m = await self.out.get()
            if isinstance(m, str): await self.ws.send_text(m)
            elif isinstance(m, bytes): await self.ws.send_bytes(m)
            else:
                pts, latency, x = m; b = io.BytesIO(); Image.fromarray(x).save(b, 'JPEG', quality=90)
                await self.ws.send_bytes(struct.pack('<BxxxIf', 2, pts, latency) + b.getvalue())

    async def panel(self):
        while True:
            await asyncio.sleep(.5)
            if self.live and not self.live.closed:
                f = self.live.figures()
                if self.rtc: f |= dict(transport='webrtc', dropped=self.rtc.player.dropped, stalls=self.rtc.player.stalls)
                self.send(type='figures', **f)

    async def reader(self):
        begun = time.monotonic(); spent = 0
        while True:
            try: m = await asyncio.wait_for(self.ws.receive(), None if self.live or self.starting else 60)
            except asyncio.TimeoutError: return
            if m['type'] == 'websocket.disconnect': return
            data = m.get('bytes') if m.get('bytes') is not None else m.get('text') or ''
            spent += 1
            if spent > 200 + 200*(time.monotonic() - begun): self.send(type='refused', message='Too many messages.'); await asyncio.sleep(.1); return
            try:
                if len(data) > MESSAGE: raise Refused('The message is too large.')
                if isinstance(data, bytes): self.pcm(data)
                else:
                    d = json_of(data); kind = d.pop('type', None)
                    do = {'start': self.start, 'steer': self.steer, 'say': self.say, 'hush': self.hush, 'mic': self.mic, 'offer': self.offer, 'leave': self.leave, 'stop': self.stop, 'ping': self.ping}.get(kind) if isinstance(kind, str) else None
                    if not do: raise Refused(f'{str(kind)[:30]!r} is no message that is known here.')
                    await do(d)
            except Refused as e: self.send(type='refused', message=str(e))
            except (TypeError, ValueError, KeyError) as e: log.info('message refused: %r', e); self.send(type='refused', message='This message has a wrong form.')

    # messages

    def pcm(self, data):
        if not self.live: return
        if len(data) % 2: raise Refused('Sound must be 16-bit samples.')
        self.live.hear(np.frombuffer(data, '<i2'), self.rate)

    async def start(self, d):
        if self.live and not self.live.closed or self.starting and not self.starting.done(): raise Refused('A session is running already; stop it first.')
        picture, frames, mic = self.app.portrait(d.get('portrait')), d.get('frames', 6), bool(d.get('mic'))
        if isinstance(frames, bool) or not isinstance(frames, int): raise Refused('frames: accepted: a whole number.')
        if frames not in self.app.hub.chunks: frames = self.app.hub.chunks[0]
        if self.app.hub.state == 'missing': raise Refused(self.app.hub.note)
        steer = {k: v for k, v in (d.get('steer') if isinstance(d.get('steer'), dict) else {}).items() if k in ('expression', 'text', 'level')}
        self.ticket = self.app.hub.enqueue()
        self.starting = asyncio.ensure_future(self.enter(picture, frames, mic, steer))

    async def enter(self, picture, frames, mic, steer):
        "Wait for a place, then go live."
        hub, told = self.app.hub, None
        try:
            while True:
                before = hub.place(self.ticket)
                if before == 0 and hub.state in ('ready', 'missing'):
                    future = hub.open(self.ticket, picture, frames, self.emit, mic=mic)
                    try: live = await asyncio.wrap_future(future)
                    except asyncio.CancelledError:
                        future.add_done_callback(lambda f: None if f.cancelled() or f.exception() else f.result().close('gone')); raise
                    except Refused:
                        if hub.state == 'ready' and hub.place(self.ticket): continue
                        raise
                    break
                text = hub.queue_message(before) if before else hub.note
                if text != told: told = text; self.send(type='queue', before=before, message=text)
                await asyncio.sleep(.1)
            self.live, self.ticket = live, None
            with contextlib.suppress(Refused): live.steer(**steer)
            cfg = hub.midas.cfg
            self.send(type='live', id=live.id, fps=hub.fps, height=cfg.video.height, width=cfg.video.width, frames=frames, total=self.app.limits.total, note=hub.note)
        except Refused as e:
            hub.leave(self.ticket); self.ticket = None
            self.send(type='refused', message=str(e), fatal=True)

    def running(self):
        if not self.live or self.live.closed: raise Refused('Nothing is running; start first.')
        return self.live

    async def steer(self, d):
        if odd := set(d) - {'expression', 'text', 'level', 'frames', 'yaw', 'pitch', 'roll'}: raise Refused(f'{sorted(odd)[0][:30]!r} cannot be steered.')
        self.running().steer(**d)

    async def say(self, d):
        x = self.app.sounds.get(d.get('key'))
        if x is None: raise Refused('This sound is not here (any more); please send it again.')
        live = self.running()
        if sum(map(len, live.playing)) > 2*self.app.limits.audio*RATE: raise Refused('Enough is waiting to be said.')
        live.play(x)

    async def hush(self, d): self.running().hush()

    async def mic(self, d):
        from .live import Ears
        rate = d.get('rate', self.rate); Ears(rate)
        self.rate = rate
        if not d.get('on', True): self.running().rest()

    async def offer(self, d):
        live = self.running()
        if self.rtc: raise Refused('There is a connection already.')
        if importlib.util.find_spec('aiortc') is None: raise Refused('WebRTC is not installed here.')
        from .rtc import Rtc, plain_offer
        plain_offer(d.get('sdp'))
        rtc = Rtc(live, self.app.loopback)
        try: sdp = await asyncio.wait_for(rtc.answer(d.get('sdp')), 10)
        except (Refused, asyncio.TimeoutError): await rtc.close(); raise Refused('This offer cannot be answered; the other way is used.') from None
        self.rtc = rtc
        self.send(type='answer', sdp=sdp)

    async def leave(self, d):
        "WebRTC did not work out: go on through the socket."
        if self.rtc: r, self.rtc = self.rtc, None; await r.close()

    async def stop(self, d):
        if self.starting and not self.starting.done(): self.starting.cancel(); self.app.hub.leave(self.ticket); self.ticket = None
        if self.live: self.live.close('stopped')
        else: self.send(type='ended', reason='stopped', message=ENDS['stopped'], recording=None, frames=0)
        if self.rtc: r, self.rtc = self.rtc, None; await r.close()

    async def ping(self, d): self.send(type='pong', t=d.get('t') if isinstance(d.get('t'), (int, float)) else None)

def make_server(app:App, page=True)->FastAPI:
    "The web application; `app` is closed with it."
    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        await asyncio.get_running_loop().run_in_executor(None, app.close)
    api = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    api.state.app = app
    api.add_middleware(Gate, limit=app.limits.upload + 10_000)

    @api.exception_handler(Refused)
    async def refused(_, e): return JSONResponse({'error': str(e)}, 413 if 'Too large' in str(e) else 503 if 'at once' in str(e) else 400)
    @api.exception_handler(asyncio.TimeoutError)
    async def slow(_, e): return JSONResponse({'error': 'This took too long.'}, 503)

    @api.get('/api/status')
    async def status(): return app.status()

    @api.get('/api/start')
    async def begin():
        "All that the page needs once."
        return dict(people=[dict(sample=k, name=p.name, identity=p.identity) for k, p in app.people.items()], controls=controls(), status=app.status(), languages=LANGUAGES)

    @api.get('/api/people/{name}')
    async def person_picture(name:str, request:Request):
        p = app.people.get(name)
        if p is None: return JSONResponse({'error': 'No such person.'}, 404)
        from PIL import Image
        out = io.BytesIO(); side = 512 if 'big' in request.query_params else 128
        Image.fromarray(p.picture).resize((side, side)).save(out, 'JPEG', quality=90)
        return Response(out.getvalue(), media_type='image/jpeg', headers={'cache-control': 'max-age=3600'})

    @api.get('/api/file/{name}')
    async def static(name:str):
        if name not in FILES: return JSONResponse({'error': 'No such file.'}, 404)
        return FileResponse(STATIC/name, media_type=FILES[name], headers={'cache-control': 'no-cache'})

    @api.post('/api/person')
    async def make_person(request:Request):
        d = json_of(await body_of(request, 20_000))
        if 'seed' in d and 'identity' not in d:
            from midas_ref.data.portraits import Identity
            if isinstance(d['seed'], bool) or not isinstance(d['seed'], int) or not 0 <= d['seed'] < 2**31: raise Refused('seed: accepted: a whole number from 0 to 2147483647.')
            who = Identity.random(d['seed'])
        else: who = check_identity(d.get('identity'))
        picture = await app.desk(paint, who, app.size)
        return app.keep(Person(picture, 'Your person', dataclasses.asdict(who)))

    @api.post('/api/portrait')
    async def bring_portrait(request:Request):
        data = await body_of(request, app.limits.upload)
        return app.keep(await app.desk(app.upload, data, request.query_params.get('drawn') == '1'))

    @api.post('/api/audio')
    async def bring_audio(request:Request):
        data = await body_of(request, app.limits.upload)
        x = await app.desk(app.read_sound, data)
        return dict(key=app.sounds.put(x), seconds=round(len(x)/RATE, 2))

    @api.post('/api/speech')
    async def speech(request:Request):
        d = json_of(await body_of(request, 20_000))
        text, lang = d.get('text'), d.get('lang', 'en-us')
        if not isinstance(text, str) or not text.strip() or len(text) > app.limits.text: raise Refused(f'text: accepted: 1 to {app.limits.text} characters.')
        if not isinstance(lang, str) or lang not in LANGUAGES: raise Refused(f"lang: accepted: {', '.join(LANGUAGES)}.")
        if importlib.util.find_spec('espeakng_loader') is None: raise Refused("Typed text needs espeak-ng: install the extra 'data'.")
        x = await app.desk(app.desk.speak, ''.join(c if c.isprintable() else ' ' for c in text), lang, d.get('voice') if d.get('voice') in ('f2', 'm3') else '')
        return dict(key=app.sounds.put(x), seconds=round(len(x)/RATE, 2))

    @api.get('/api/recording/{key}')
    async def recording(key:str):
        path = app.hub.recording(key)
        if path is None or not path.is_file(): return JSONResponse({'error': 'This recording is not here (any more).'}, 404)
        return FileResponse(path, media_type='video/mp4', filename='midas.mp4')

    @api.websocket('/api/live')
    async def live(ws:WebSocket):
        if len(app.visits) >= app.limits.sessions + app.limits.waiting + 20: return await ws.close(1013)
        app.visits.add(ws)
        try: await Visit(app, ws).run()
        except WebSocketDisconnect: pass
        finally: app.visits.discard(ws)

    if not page: return api
    import gradio as gr
    from .page import HEAD, make_page, theme
    return gr.mount_gradio_app(api, make_page(), path='/', ssr_mode=False, max_file_size=1000, footer_links=[], head=HEAD, theme=theme(), show_error=False)
