"""WebRTC over the same sessions: the server keeps the clock, two tracks follow it. No STUN, no TURN: the addresses of this machine only."""
import asyncio, contextlib, logging, time
from collections import deque
from fractions import Fraction
import numpy as np
from .live import RATE, Refused

log = logging.getLogger('midas_ref.app')
PIECE = RATE//50      # 20 ms

class Player:
    "When each sample and each picture leaves: the first picture starts the clock, sound keeps it."
    def __init__(self,
        lead:float=.06,          # seconds from the first picture to its showing
        catch_up=lambda: False,  # whether time that a stall has cost may be won back by leaving out sound
    ):
        self.lead, self.base, self.sound, self.first, self.have, self.pictures = lead, None, deque(), None, 0, asyncio.Queue(64)   # sound from sample `first` to `have`
        self.more, self.stalls, self.dropped, self.slack, self.hurry, self.catch_up = asyncio.Event(), 0, 0, deque(maxlen=25), False, catch_up

    def put(self, kind, pts, data):
        "What the worker made (in the loop's thread)."
        if kind == 'sound':
            if self.first is None: self.first = self.have = pts            # what came before the connection is gone
            self.sound.append(data); self.have += len(data); self.more.set(); return
        if self.base is None: self.base = time.monotonic() + self.lead - pts/RATE; self.more.set()
        self.slack.append(self.base + pts/RATE - time.monotonic())
        if len(self.slack) == 25 and min(self.slack) > self.lead + .08 and self.catch_up(): self.hurry = True; self.slack.clear()
        if self.pictures.full() or time.monotonic() > self.base + pts/RATE + .3: self.dropped += 1; return
        self.pictures.put_nowait((pts, data))

    async def wait(self, pts):
        "Until it is time."
        while self.base is None: self.more.clear(); await self.more.wait()
        await asyncio.sleep(max(0, self.base + pts/RATE - time.monotonic()))

    def take(self, n)->np.ndarray:
        "The next samples."
        out = []
        while n:
            x = self.sound.popleft(); out.append(x[:n]); n -= len(out[-1])
            if len(x) > len(out[-1]): self.sound.appendleft(x[len(out[-1]):])
        return np.concatenate(out)

    async def piece(self, at)->tuple:      # samples, and where they begin
        "20 ms of sound from sample `at` on; if it is not there yet the clock stands still."
        while self.first is None: self.more.clear(); await self.more.wait()
        at = max(at, self.first)
        await self.wait(at)
        if self.hurry and self.have >= at + 3*PIECE: self.take(2*PIECE); self.base -= 2*PIECE/RATE; at += 2*PIECE; self.hurry = False
        begun = time.monotonic()
        while self.have < at + PIECE: self.more.clear(); await self.more.wait()
        if (late := time.monotonic() - begun) > .005: self.base += late; self.stalls += 1
        return self.take(PIECE), at

def tracks(player):
    "A sound and a picture track of a player."
    import av
    from aiortc import MediaStreamTrack

    class Sound(MediaStreamTrack):
        kind, at = 'audio', 0
        async def recv(self):
            x, self.at = await player.piece(self.at)
            f = av.AudioFrame.from_ndarray((np.clip(x, -1, 1)*32767).astype(np.int16)[None], format='s16', layout='mono')
            f.sample_rate, f.pts, f.time_base = RATE, self.at, Fraction(1, RATE)
            self.at += PIECE
            return f

    class Pictures(MediaStreamTrack):
        kind = 'video'
        async def recv(self):
            pts, x = await player.pictures.get(); await player.wait(pts)
            f = av.VideoFrame.from_ndarray(x, format='rgb24')
            f.pts, f.time_base = pts*90000//RATE, Fraction(1, 90000)
            return f
    return Sound(), Pictures()

def plain_offer(sdp)->str:
    "An offer without names that only the visitor's network knows."
    if not isinstance(sdp, str) or not 20 < len(sdp) < 40_000 or not sdp.startswith('v=0'): raise Refused('This is no WebRTC offer.')
    return '\r\n'.join(l for l in sdp.splitlines() if '.local' not in l) + '\r\n'

class Rtc:
    "One peer connection."
    def __init__(self, live, loopback=False):
        from aiortc import RTCConfiguration, RTCPeerConnection
        if loopback:
            import aioice.ice
            aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ['127.0.0.1']
        self.live, self.player, self.pc, self.listening = live, Player(catch_up=lambda: live.mic and not live.playing), RTCPeerConnection(RTCConfiguration(iceServers=[])), None

    async def answer(self, sdp)->str:
        "Take an offer; the answer holds our addresses."
        from aiortc import RTCSessionDescription
        offer = plain_offer(sdp)
        @self.pc.on('track')
        def on_track(track):
            if track.kind == 'audio' and self.listening is None: self.listening = asyncio.ensure_future(self.listen(track))
        try:
            await self.pc.setRemoteDescription(RTCSessionDescription(offer, 'offer'))
            for t in tracks(self.player): self.pc.addTrack(t)
            await self.pc.setLocalDescription(await self.pc.createAnswer())
        except Refused: raise
        except Exception as e: raise Refused(f'This offer cannot be answered ({type(e).__name__}).') from None
        return self.pc.localDescription.sdp

    async def listen(self, track):
        "Sound of the visitor's microphone."
        from aiortc.mediastreams import MediaStreamError
        with contextlib.suppress(MediaStreamError, asyncio.CancelledError):
            while not self.live.closed:
                f = await track.recv()
                x = f.to_ndarray().reshape(-1)
                if len(f.layout.channels) > 1: x = x.reshape(-1, len(f.layout.channels)).astype(np.int32).mean(1).astype(np.int16)
                with contextlib.suppress(Refused): self.live.hear(x, f.sample_rate)

    async def close(self):
        if self.listening: self.listening.cancel()
        with contextlib.suppress(Exception): await asyncio.wait_for(self.pc.close(), 5)
