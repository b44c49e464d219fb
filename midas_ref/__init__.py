"An open, executable reference of MIDAS. The names below are loaded on first use, so that `import midas_ref` is quick."
from typing import TYPE_CHECKING
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .conditions.audio import load_audio
    from .inference.session import Session
    from .inference.video import load_portrait, write_video
    from .model.midas import Midas

__all__ = ['Midas', 'Session', 'load_portrait', 'load_audio', 'write_video']
_homes = {'Midas': 'model.midas', 'Session': 'inference.session', 'load_portrait': 'inference.video', 'load_audio': 'conditions.audio', 'write_video': 'inference.video'}

def __getattr__(name):
    if name not in _homes: raise AttributeError(f"module 'midas_ref' has no attribute {name!r}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f'midas_ref.{_homes[name]}'), name)
    return value

def __dir__(): return sorted({*globals(), *__all__})
