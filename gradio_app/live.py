"""Live sessions without any browser: one worker owns the model, visitors bring sound, pictures and sound go out with one time line."""
import contextlib, logging, math, secrets, shutil, tempfile, threading, time, warnings
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
import numpy as np

log = logging.getLogger('midas_ref.app')
RATE = 16_000
MOST_AT_ONCE = 10*RATE          # samples that one message may bring
EXPRESSIONS = ('neutral', 'happy', 'sad', 'angry', 'surprised', 'thoughtful')
CHUNKS = (6, 3, 2, 1)           # frames of a chunk that a visitor may choose

@dataclass(frozen=True)
class Limits:
    "What strangers may use."
    sessions: int = 2            # live at once
    waiting: int = 20            # in the queue for a place
    idle: float = 120.           # seconds without voice or steering
    total: float = 600.          # seconds of one session
    behind: float = .6           # seconds of sound that may wait before pictures are skipped
    upload: int = 8_000_000      # bytes of a file
    audio: float = 60.           # seconds of an audio file
    text: int = 300              # characters to speak
    recordings: int = 16         # files kept for download
    keep: float = 600.           # seconds that a file is kept

class Refused(ValueError):
    "Something a visitor asked for that cannot be; the text is for the visitor."

class Ears:
    "Samples of any rate, in pieces of any size, as mono float32 at 16 kHz."
    def __init__(self,
        rate:int=RATE,    # Hz, 8000 to 192000
    ):
        if isinstance(rate, bool) or not isinstance(rate, int) or not 8000 <= rate <= 192000: raise Refused(f"The sample rate is {rate!r}; accepted: a whole number of Hz from 8000 to 192000.")
        self.rate, self.count, self.tool = rate, 0, None
        if rate != RATE:
            import av
            self.tool = av.AudioResampler('flt', 'mono', RATE)

    def __call__(self,
        x:np.ndarray,     # int16 or float (s,)
    )->np.ndarray:        # float32 (s',), within [-1, 1]
        "Resample; what does not fill a sample yet stays inside."
        if x.ndim != 1: raise Refused(f"Sound has {x.ndim} dimensions; accepted: one, mono.")
        x = x.astype(np.float32)/32768 if x.dtype == np.int16 else x.astype(np.float32)
        if not np.isfinite(x).all(): raise Refused("Sound has values that are not finite.")
        x = np.clip(x, -1, 1)
        if not len(x) or not self.tool: return x
        import av
        f = av.AudioFrame.from_ndarray(np.ascontiguousarray(x[None]), format='flt', layout='mono')
        f.sample_rate, f.pts = self.rate, self.count
        self.count += len(x)
        out = [r.to_ndarray()[0] for r in self.tool.resample(f)]
        return np.concatenate(out) if out else np.zeros(0, np.float32)

class Voice:
    "Whether somebody speaks: louder than the quietest of late, with some patience before it says no."
    def __init__(self, patience:float=.7):
        self.patience, self.floor, self.quiet, self.talking, self.rest = patience, -60., 1e9, False, np.zeros(0, np.float32)

    def __call__(self, x:np.ndarray)->bool:    # float32 (s,) at 16 kHz
        "Listen to the next samples."
        n = RATE//25
        x = np.concatenate([self.rest, x]); whole = len(x)//n*n
        self.rest = x[whole:]
        for piece in x[:whole].reshape(-1, n):
            db = 10*math.log10(float(np.square(piece, dtype=np.float64).mean()) + 1e-10)
            self.floor = min(max(db, -80.), self.floor + 1/25)                # falls at once, rises 1 dB a second
            loud = db > max(-48., min(self.floor + 9, -25.))
            self.quiet = 0. if loud else self.quiet + n/RATE
            self.talking = self.quiet < self.patience
        return self.talking

class Recorder:
    "The mp4 of a session, written when nobody waits for a picture."
    most = 50      # pictures and pieces of sound that may wait to be written
    def __init__(self, folder:Path, fps:float):
        from midas_ref.inference.video import VideoWriter
        self.path, self.frames = folder/f'{secrets.token_hex(8)}.mp4', 0
        self.writer, self.last, self.owed, self.done, self.todo = VideoWriter(self.path, fps), None, 0, False, deque()

    def sound(self, x): self._later(lambda: self.writer.sound(x))

    def frame(self, x, times=1): self._later(lambda: self._write(x, times))

    def _later(self, job):
        if self.done: return
        self.todo.append(job)
        if len(self.todo) > self.most: self.work()

    def work(self)->bool:
        "Write the oldest of what waits; False: nothing does. A full disk ends the recording, and not the session."
        if self.done or not self.todo: return False
        try: self.todo.popleft()()
        except Exception: log.exception('recording'); self.done, self.frames = True, 0; self.todo.clear(); self.writer.abort()
        return True

    def _write(self, x, times):
        self.last, self.owed = x if x is not None else self.last, self.owed + times
        if self.last is None: return                       # nothing drawn yet: the first picture will stand for these too
        for _ in range(self.owed): self.writer.frame(self.last); self.frames += 1
        self.owed = 0

    def close(self)->Path|None:
        "The finished file; None if there is nothing in it."
        while self.work(): pass
        if self.done: return self.path if self.frames else None
        self.done = True
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                # sound of the chunk that was not drawn any more is cut
            if self.frames: self.writer.close(); return self.path
            self.writer.abort()

class Live:
    "One visitor: a portrait, sound in, sound and pictures out."
    def __init__(self,
        hub,                     # the `Hub` that owns it
        portrait,                # what `Session` takes
        frames:int=6,            # of a chunk
        emit=None,               # called by the worker as emit(kind, **values); must not block
        record:bool=True,        # write an mp4
        mic:bool=False,          # a microphone will bring the sound, and be the clock
    ):
        from midas_ref.config import MEMORY_LEVEL
        self.hub, self.portrait, self.id, self.born = hub, portrait, secrets.token_urlsafe(12), time.monotonic()
        self.emit, self.lock, self.closed, self.reason = (lambda kind, **v: None) if emit is None else emit, threading.Lock(), False, ''
        self.ears, self.voice, self.mic, self.clock = Ears(), Voice(), mic, None
        self.inbox, self.arrived, self.playing = np.zeros(0, np.float32), deque(), deque()   # arrived: (samples in all, when)
        self.unsaid = []
        self.heard, self.taken, self.active, self.talking = 0, 0, self.born, False
        self.wish, self.text, self.rates, self.level, self.pending = 'neutral', '', None, MEMORY_LEVEL, {'frames': frames}
        self.count, self.waits, self.stamps = Counter(), deque(maxlen=250), deque(maxlen=250)
        self.current, self.rig, self.angle = None, None, None
        self._open(frames)
        self.recorder = Recorder(hub.folder, hub.fps) if record else None

    # ---- called by a transport, from any thread

    def hear(self,
        x:np.ndarray,            # int16 or float (s,)
        rate:int=RATE,           # Hz
    ):
        "Sound of the microphone; from the first call on it is the clock."
        if self.closed: return
        if len(x) > MOST_AT_ONCE: raise Refused(f"A message brought {len(x)} samples; accepted: {MOST_AT_ONCE} at most.")
        with self.lock:
            if self.ears.rate != rate: self.ears = Ears(rate)
            y = self.ears(np.asarray(x))
            if not self.mic: self.mic, self.clock = True, None
            self._take(y)
        self.hub.wake()

    def rest(self):
        "The microphone is off: the session goes on in silence."
        with self.lock: self.mic = False
        self.hub.wake()

    def play(self,
        x:np.ndarray,            # float32 (s,) at 16 kHz
    ):
        "Say this, in place of the microphone."
        with self.lock: self.playing.append(np.asarray(x, np.float32)); self.active = time.monotonic()
        self.hub.wake()

    def hush(self):
        "Stop what is being played."
        with self.lock: self.playing.clear()

    def steer(self, expression=None, text=None, level=None, frames=None, yaw=None, pitch=None, roll=None):
        "Wishes for the next chunk; rates of the head in radians per second."
        number = lambda name, v, lo, hi: v if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and lo <= v <= hi else _refuse(name, v, f'a number from {lo:g} to {hi:g}')
        if expression is not None and expression not in EXPRESSIONS: _refuse('expression', expression, ', '.join(EXPRESSIONS))
        if text is not None and (not isinstance(text, str) or len(text) > 200): _refuse('text', text, 'up to 200 characters')
        if level is not None: number('level', level, 0, self.hub.levels - 1)
        if frames is not None and frames not in self.hub.chunks: _refuse('frames', frames, ', '.join(map(str, self.hub.chunks)))
        rates = [None if v is None else number(k, v, -4, 4) for k, v in (('yaw', yaw), ('pitch', pitch), ('roll', roll))]
        with self.lock:
            if expression is not None: self.wish = expression
            if text is not None: self.text = ' '.join(text.split())
            if level is not None: self.level = int(level)
            if frames is not None: self.pending['frames'] = int(frames)
            if any(v is not None for v in rates): self.rates = [v or 0. for v in rates]
            self.active = time.monotonic()

    def close(self, reason:str='stopped'): self.hub.drop(self, reason)

    # ---- called by the worker only

    def _open(self, frames):
        from midas_ref.inference.session import Session, StageClock
        self.stage = StageClock(self.hub.device, keep=120)
        self.frames, self.session = frames, Session(self.hub.midas, self.portrait, seed=secrets.randbelow(2**31), frames=frames, level=self.level, clock=self.stage)
        self.size, self.step = self.session.midas.cfg.chunk_samples, self.session.midas.cfg.chunk_samples//frames

    def _take(self, y):
        "Put samples into the inbox; what is being played replaces them, and they keep its time."
        now, at = time.monotonic(), 0
        while self.playing and at < len(y):
            p = self.playing[0]; k = min(len(p), len(y) - at)
            if at == 0: y = y.copy()
            y[at:at+k] = p[:k]; at += k
            if k < len(p): self.playing[0] = p[k:]
            else: self.playing.popleft()
        talking = self.voice(y)
        if talking: self.active = now
        self.talking = talking
        self.inbox = np.concatenate([self.inbox, y]); self.heard += len(y)
        self.arrived.append((self.heard, now))
        self.unsaid.append(y)
        if sum(map(len, self.unsaid)) >= self.size:                                # at once, however busy the worker is
            x, self.unsaid = np.concatenate(self.unsaid), []
            self.emit('sound', pts=self.heard - len(x), samples=x)

    def feed(self, now):
        "Without a microphone our own clock brings what is to be said, or silence, one chunk ahead."
        with self.lock:
            if self.mic: return
            if self.clock is None: self.clock = now - self.heard/RATE
            lack = int((now - self.clock)*RATE) + self.size - self.heard
            if lack > 4*RATE: self.clock += (lack - self.size)/RATE; lack = self.size      # we slept: go on from now
            while lack >= self.size//4:
                k = min(lack, self.size); self._take(np.zeros(k, np.float32)); lack -= k

    def ready(self): return self.current is not None or len(self.inbox) >= self.size

    def due(self):
        "When the next picture is wanted; the worker serves the most urgent visitor."
        return self.arrived[0][1] if self.arrived and self.current is None else getattr(self, 'next_due', 0.)

    def turn(self):
        "Draw one picture."
        if self.current is None and not self._begin(): return
        x = next(self.current, None)
        if x is None: self.current = None; return
        now, pts = time.monotonic(), self.start + self.index*self.step
        self.index += 1; self.count['frames'] += 1; self.next_due = self.came + self.index*self.step/RATE
        wait = now - self.came                                  # since the last sample of the chunk was here
        self.waits.append((self.index - 1, wait, wait + (self.size - (self.index - 1)*self.step)/RATE)); self.stamps.append(now)
        self.emit('picture', pts=pts, picture=x, latency=self.waits[-1][2])
        if self.recorder: self.recorder.frame(x)
        if self.index == self.frames: next(self.current, None); self.current = None      # lets the model read its last frame

    def _begin(self):
        "Take the sound of a chunk, and the wishes of now. False: there is nothing to draw."
        with self.lock: f = self.pending.pop('frames', None)
        if f and f != self.frames: self._open(f)
        with self.lock:
            if len(self.inbox) < self.size: return False
            skipped = []
            while len(self.inbox) >= self.size + max(self.size, int(self.hub.limits.behind*RATE)): skipped.append(self._cut())
            chunk = self._cut()
            wish, text, rates, level, action = self.wish, self.text, self.rates, self.level, 'talking' if self.talking else 'listening'
        for _, x, _ in skipped:
            self.count['skipped'] += self.frames
            if self.recorder: self.recorder.sound(x); self.recorder.frame(None, self.frames)
        (self.start, x, self.came), self.index = chunk, 0
        from midas_ref.data.clips import MOODS
        self.session.steer(text=f'{text or MOODS[wish][0]}, {action}', level=level, pose=self._pose(rates))
        if self.recorder: self.recorder.sound(x)
        self.count['chunks'] += 1
        self.current = self.session.stream(x)
        return True

    def _cut(self):
        "The next chunk of the inbox: where it starts, its samples, when its last one came."
        x, self.inbox = self.inbox[:self.size], self.inbox[self.size:]
        start, self.taken = self.taken, self.taken + self.size
        while self.arrived and self.arrived[0][0] < self.taken: self.arrived.popleft()
        return start, x, self.arrived[0][1] if self.arrived else time.monotonic()

    def _pose(self, rates):
        "Rates of the pad as velocities of keypoints, for the frames of one chunk; None while nobody steers."
        if rates is None: return None
        import torch
        if self.rig is None:
            from midas_ref.conditions.pose import HeadRig
            self.rig = HeadRig(fps=self.hub.fps); self.angle = self.rig.init_state(1)
        out = self.rig(torch.tensor(rates).expand(1, self.frames, 3), self.angle)[0]
        with self.lock:
            if self.rates is rates: self.rates = None if not any(rates) else rates
        return out

    def figures(self)->dict:
        "What the live panel shows."
        first = sorted(w[2] for w in list(self.waits) if w[0] == 0); s, now = list(self.stamps), time.monotonic()
        recent = [t for t in s if t > now - 3]
        stages = {k: round(1000*float(np.median(v[-60:])), 1) for k, v in self.stage.seconds.items() if v}
        return dict(latency_ms=round(1000*first[len(first)//2]) if first else None, fps=round(len(recent)/3, 1), stages_ms=stages, frames=self.count['frames'], skipped=self.count['skipped'],
                    talking=self.talking, seconds=round(now - self.born, 1), left=round(max(0., self.hub.limits.total - (now - self.born))), playing=bool(self.playing))

def _refuse(name, given, accepted): raise Refused(f"{name} is {str(given)[:60]!r}; accepted: {accepted}.")

class Ticket:
    "A place in the queue."
    def __init__(self): self.since = time.monotonic()

class Hub:
    "Owns the model, the sessions and the queue."
    def __init__(self,
        load,                    # function () -> Midas, called by the worker
        limits:Limits=Limits(),  # what strangers may use
        device='cpu',            # where the model is
    ):
        self.load, self.limits, self.device, self.midas = load, limits, str(device), None
        self.state, self.note = 'starting', 'Starting.'
        self.lives, self.queue, self.jobs, self.count = {}, deque(), deque(), Counter()
        self.recordings, self.cond, self.stopping = {}, threading.Condition(), False
        self.folder = Path(tempfile.mkdtemp(prefix='midas_app_'))
        self.levels, self.chunks, self.fps = 20, CHUNKS, 12.5
        self.thread = threading.Thread(target=self._run, name='midas-worker', daemon=True); self.thread.start()

    # ---- from any thread

    def wake(self):
        with self.cond: self.cond.notify()

    def call(self, f)->Future:
        "Have the worker do something with the model."
        out = Future()
        with self.cond:
            if self.stopping: out.set_exception(Refused('The app is closing.'))
            else: self.jobs.append((f, out)); self.cond.notify()
        return out

    def enqueue(self)->Ticket:
        "Ask for a place."
        with self.cond:
            if len(self.queue) >= self.limits.waiting: self.count['turned away'] += 1; raise Refused(f"All {self.limits.sessions} places are taken and {len(self.queue)} visitors are waiting. Please come back in some minutes.")
            t = Ticket(); self.queue.append(t); return t

    def leave(self, ticket):
        with self.cond:
            with contextlib.suppress(ValueError): self.queue.remove(ticket)

    def place(self, ticket)->int:
        "How many are before this visitor; 0: come in."
        with self.cond:
            free = self.limits.sessions - len(self.lives)
            return max(0, (self.queue.index(ticket) if ticket in self.queue else 0) + 1 - free)

    def queue_message(self, before:int)->str:
        longest = max((time.monotonic() - l.born for l in list(self.lives.values())), default=0)
        return (f"All {self.limits.sessions} places are taken. You are number {before} in the queue; "
                f"the next place is free in {max(1, math.ceil((self.limits.total - longest)/60))} min at the latest. Keep this page open: it starts by itself.")

    def open(self, ticket, portrait, frames=6, emit=None, record=True, mic=False)->Future:
        "A `Live` for the visitor whose turn it is."
        if frames not in self.chunks: _refuse('frames', frames, ', '.join(map(str, self.chunks)))
        def work():
            if self.midas is None: raise Refused(self.note)
            with self.cond:
                if ticket not in self.queue: raise Refused('This place was given up.')
                if len(self.lives) >= self.limits.sessions: raise Refused('All places are taken.')
            live = Live(self, portrait, frames, emit, record, mic)
            with self.cond:
                stays = ticket in self.queue                 # the visitor may have left while the portrait was read
                if stays: self.lives[live.id] = live; self.queue.remove(ticket); self.count['opened'] += 1
            if not stays: live.closed, live.emit = True, lambda kind, **v: None; self._bury(live); raise Refused('This place was given up.')
            return live
        return self.call(work)

    def drop(self, live, reason)->Path|None:
        "End a session and free what it holds; its recording stays for a while."
        with self.cond:
            if live.closed: return
            live.closed, live.reason = True, reason
            self.lives.pop(live.id, None); self.count['closed'] += 1; self.count[f'closed: {reason}'] += 1
        self.call(lambda: self._bury(live))

    def recording(self, key)->Path|None:
        "The file behind a key that we gave out; nothing else can be asked for."
        with self.cond: entry = self.recordings.get(key) if isinstance(key, str) else None
        return entry[0] if entry else None

    def status(self)->dict:
        with self.cond:
            return dict(state=self.state, note=self.note, live=len(self.lives), waiting=len(self.queue), places=self.limits.sessions,
                        recordings=len(self.recordings), counters=dict(self.count), held_mb=round(sum(l.session.streams.nbytes for l in self.lives.values() if l.session)/1e6, 1))

    def close(self):
        "End everything and remove every file."
        for live in list(self.lives.values()): self.drop(live, 'app closed')
        with self.cond: self.stopping = True; self.cond.notify()
        self.thread.join(20)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- the worker

    def _bury(self, live):
        path = None
        with contextlib.suppress(Exception):
            if live.recorder: path = live.recorder.close()
        if live.current is not None:
            with contextlib.suppress(Exception): live.current.close()
        frames = live.count['frames']
        live.session = live.current = live.portrait = live.recorder = live.rig = live.angle = None
        live.inbox, live.playing = np.zeros(0, np.float32), deque()
        if path:
            with self.cond: self.recordings[live.id] = (path, time.monotonic())
            self._sweep()
        with contextlib.suppress(Exception): live.emit('ended', reason=live.reason, recording=live.id if path else None, frames=frames)
        live.emit = lambda kind, **v: None

    def _sweep(self):
        now = time.monotonic()
        with self.cond:
            old = [k for k, (_, t) in self.recordings.items() if now - t > self.limits.keep]
            old += list(self.recordings)[:max(0, len(self.recordings) - len(old) - self.limits.recordings)] if not old else []
            files = [self.recordings.pop(k)[0] for k in dict.fromkeys(old)]
        for f in files: f.unlink(missing_ok=True)

    def _load(self):
        import torch
        self.state, self.note = 'loading', 'Loading the model.'
        try:
            self.midas = self.load()
            cfg = self.midas.cfg
            self.levels, self.fps = cfg.noise.levels, cfg.video.fps
            self.chunks = tuple(f for f in CHUNKS if f <= cfg.frames_per_chunk and cfg.window_frames % f == 0 and (f/cfg.video.fps/cfg.audio.token_seconds) % 1 < 1e-9)
            self.state, self.note = 'warming', 'Warming up: drawing a first chunk.'
            from midas_ref.inference.session import Session
            s = Session(self.midas, torch.zeros(3, cfg.video.height, cfg.video.width), seed=0)
            s.push(np.zeros(cfg.chunk_samples, np.float32))
            begun = time.perf_counter(); s.push(np.zeros(cfg.chunk_samples, np.float32))
            self.pace = (time.perf_counter() - begun)/cfg.chunk_seconds
            self.state, self.note = 'ready', 'Ready.' if self.pace < .9 else f'Ready, but this machine needs {self.pace:.1f} s for a second of video: pictures will be skipped, the sound stays whole.'
        except (FileNotFoundError, ValueError, OSError) as e: self.state, self.note = 'missing', ' '.join(str(e).split())
        except Exception as e: log.exception('loading'); self.state, self.note = 'missing', f'The model could not be loaded ({type(e).__name__}: {e}).'

    def _run(self):
        self._load()
        swept = checked = 0.
        while True:
            now = time.monotonic()
            with self.cond:
                if self.stopping and not self.jobs: return
                job, lives = self.jobs.popleft() if self.jobs else None, list(self.lives.values())
            if job:
                f, out = job
                if not out.set_running_or_notify_cancel(): continue
                try: r = f()
                except Exception as e: out.set_exception(e)
                else: out.set_result(r)
                del f, out, job
                r = None
                continue
            for live in lives: live.feed(now)
            if now - checked > .25:
                checked = now
                for live in lives:
                    if now - live.born > self.limits.total: self.drop(live, 'time is up')
                    elif now - live.active > self.limits.idle: self.drop(live, 'idle')
            if now - swept > 10: swept = now; self._sweep()
            able = [l for l in lives if not l.closed and l.ready()]
            if able:
                live = min(able, key=lambda l: l.due())
                try: live.turn()
                except Exception: log.exception('session %s', live.id[:4]); self.count['failed'] += 1; self.drop(live, 'an error of ours')
                live = None
            busy = bool(able) or any(l.recorder and l.recorder.work() for l in lives)
            lives = able = None
            if not busy:
                with self.cond:
                    if not self.jobs and not self.stopping: self.cond.wait(.02 if self.lives else .5)
