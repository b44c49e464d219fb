"""Start the app: model, settings, server."""
import os, socket, threading
from .live import Limits

SOCKET = dict(ws_max_size=1_000_000, ws_per_message_deflate=False)   # JPEG and noise do not get smaller

def limits_of(s)->Limits:
    "The [app] section of the settings as limits."
    return Limits(sessions=s.sessions, idle=float(s.idle_seconds), total=float(s.total_seconds), upload=s.upload_mb*1_000_000)

def make(settings, page_up=None):
    "The `App` and the web application for these settings. With an event `page_up`, the model is loaded when it is set: two imports at once take longer to show the first page."
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False'); os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    from midas_ref.config import pick_device
    from .server import App, make_server
    device = pick_device(settings.device)[0]
    def load():
        if page_up: page_up.wait()
        from midas_ref.inference.animate import load_model              # heavy: the worker imports it, after the page is up
        return load_model(settings.weights.model, settings.device.name, settings.device.dtype)
    app = App(load, limits_of(settings.app), device, loopback=settings.app.host in ('127.0.0.1', 'localhost', '::1'))
    return app, make_server(app)

def check_place(host:str, port:int):
    "Raise if nothing can be served there."
    with socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)              # as the server does: a port just left is free
        try: s.bind((host, port))
        except OSError as e: raise OSError(f"Nothing can be served at {host}, port {port} ({e.strerror or e}); give another with --port or --host, or in the [app] section of settings.ini.") from None

def serve(settings, say=print):
    "Until Ctrl-C."
    check_place(settings.app.host, settings.app.port)                          # before seconds go into imports
    import uvicorn
    page_up = threading.Event()
    app, api = make(settings, page_up)
    host, port = settings.app.host, settings.app.port
    where = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}"
    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            try: await super().startup(sockets)
            finally: page_up.set()                                           # also if it failed: nobody waits for ever
            if not self.should_exit: say(f"MIDAS live: {where}  (Ctrl-C ends it){'' if host != '0.0.0.0' else '; open to the network'}")
    tell(app.hub, say)
    Server(uvicorn.Config(api, host=host, port=port, log_level='warning', **SOCKET, ws_ping_interval=5, ws_ping_timeout=8, timeout_keep_alive=10, timeout_graceful_shutdown=3, limit_concurrency=400)).run()

def tell(hub, say):
    "Print what the model is doing until it is ready."
    import time
    def watch():
        last = None
        while not hub.stopping:
            if (now := (hub.state, hub.note)) != last: say(f'  {hub.note}'); last = now
            if hub.state in ('ready', 'missing'):
                if hub.state == 'missing': say("  Still works: choosing, making and uploading portraits, typed text to speech. A face moves once the model is there ([weights] model in settings.ini).")
                return
            time.sleep(.1)
    threading.Thread(target=watch, daemon=True).start()
