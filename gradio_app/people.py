"""Portraits that a visitor can bring to life: the shipped people, people made from controls, uploaded pictures, and drawn look-alikes of photographs."""
import base64, dataclasses, io, json, math, secrets, tempfile, threading, time, warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from .live import Refused

SAMPLES = Path(__file__).resolve().parents[1]/'data_samples'/'portraits'
WHY = "This model has only ever seen people that we drew, so a photograph comes out blurred; here is a drawn look-alike of it, which you can change."

@dataclass
class Person:
    "A portrait in memory."
    picture: np.ndarray       # uint8 (h, w, 3)
    name: str                 # for the list
    identity: dict|None       # its controls, if we drew it
    note: str = ''            # what the visitor should know

def data_url(x:np.ndarray, side:int=256)->str:
    from PIL import Image
    out = io.BytesIO(); Image.fromarray(x).resize((side, side)).save(out, 'JPEG', quality=88)
    return 'data:image/jpeg;base64,' + base64.b64encode(out.getvalue()).decode()

class Store:
    "Things of visitors under keys that cannot be guessed; the oldest go first."
    def __init__(self, most:int=64, keep:float=1800.):
        self.most, self.keep, self.lock, self.items = most, keep, threading.Lock(), OrderedDict()

    def put(self, thing)->str:
        with self.lock:
            now, key = time.monotonic(), secrets.token_urlsafe(12)
            self.items[key] = (thing, now)
            while self.items and (len(self.items) > self.most or now - next(iter(self.items.values()))[1] > self.keep): self.items.popitem(last=False)
            return key

    def get(self, key):
        with self.lock: return self.items[key][0] if isinstance(key, str) and key in self.items else None

# ---- controls of a person

def controls()->list:
    "Every field of `Identity` as a control: name, kind, range or choices, default."
    from midas_ref.data import portraits as P
    choices = dict(hair=P.HAIRS, beard=P.BEARDS, glasses=P.GLASSES, clothes=P.CLOTHES, background=P.BACKGROUNDS, hair_color=P.HAIR_COLORS, eye_color=P.EYE_COLORS)
    signed, out = ('undertone', 'light', 'warmth'), []
    for f in dataclasses.fields(P.Identity):
        d = dict(name=f.name, label=f.name.replace('_', ' '), default=f.default)
        if f.name == 'seed': continue
        if f.name in choices: d |= dict(kind='colour' if f.name.endswith('color') else 'choice', choices=[*choices[f.name]])
        elif f.name in ('cloth_color', 'background_color'): d |= dict(kind='colour', choices=[])
        elif f.name == 'age': d |= dict(kind='number', low=18, high=80, step=1)
        else: d |= dict(kind='number', low=-1 if f.name in signed else 0, high=1.1 if f.name == 'warmth' else 1, step=.01)
        out.append(d)
    return out

def check_identity(
    d,                 # a dictionary from outside
):                     # an `Identity`
    "A person, or a refusal that says which field is wrong."
    from midas_ref.data import portraits as P
    if not isinstance(d, dict): raise Refused("A person is a dictionary of its fields.")
    known, out = {c['name']: c for c in controls()}, {}
    for k, v in list(d.items())[:100]:
        if k == 'seed':
            if isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 2**31: raise Refused("seed: accepted: a whole number from 0 to 2147483647.")
            out[k] = v; continue
        if k not in known: raise Refused(f"{str(k)[:40]!r} is no field of a person.")
        c = known[k]
        if c['kind'] == 'number':
            if isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) or not c['low'] <= v <= c['high']: raise Refused(f"{k}: accepted: a number from {c['low']} to {c['high']}.")
            out[k] = int(v) if k == 'age' else float(v)
        else:
            free = c['kind'] == 'colour' and isinstance(v, str) and len(v) == 6 and all(x in '0123456789abcdefABCDEF' for x in v)
            if not isinstance(v, str) or not (v in c['choices'] or free): raise Refused(f"{k}: accepted: {', '.join(c['choices'][:30])}{' or ' * bool(c['choices']) + 'rrggbb' if c['kind'] == 'colour' else ''}.")
            out[k] = v
    return P.Identity(**out)

def paint(
    who,               # an `Identity`
    size:tuple=(256, 256),  # (h, w)
)->np.ndarray:         # uint8 (h, w, 3)
    "A still portrait, in about a second."
    from midas_ref.data.portraits import bake, neutral_motion, pose
    from midas_ref.inference.session import to_bytes
    return to_bytes(pose(bake(who, size, views=(1, 1), detail=.7), neutral_motion())[0, 0])

def gallery()->dict:
    "The shipped people: name -> `Person` in full size."
    from PIL import Image
    file = SAMPLES/'identities.json'
    about = json.loads(file.read_text()) if file.is_file() else {}
    out = {}
    for p in sorted(SAMPLES.glob('*.png')):
        with Image.open(p) as img: out[p.stem] = Person(np.array(img.convert('RGB')), p.stem.title(), about.get(p.stem, {}).get('identity'))
    return out

def fit_size(x:np.ndarray, size:tuple)->np.ndarray:
    "A portrait in the size of the model."
    from PIL import Image
    return x if x.shape[:2] == tuple(size) else np.array(Image.fromarray(x).resize((size[1], size[0]), Image.Resampling.LANCZOS))

# ---- a look-alike

def _hex(c): return ''.join(f'{int(np.clip(v, 0, 255)):02x}' for v in c)
def _unhex(s): return np.array([int(s[i:i+2], 16) for i in (0, 2, 4)], float)

def look_alike(
    x:np.ndarray,      # uint8 (h, w, 3), framed by `load_portrait`
    face:tuple|None,   # centre x, y and side of the face, pixels; None: where it usually is
):                     # an `Identity`
    "A drawn person with the colours and rough proportions of a picture: medians of a few patches, nothing learned."
    from midas_ref.data import portraits as P
    h, w = x.shape[:2]
    cx, cy, side = face or (w*.5, h*.495, h*.5)
    def patch(u, v, r=.05):
        a, b, r = cx + (u - .5)*side, cy + (v - .5)*side, r*side
        y = x[max(0, int(b - r)):max(1, int(b + r) + 1), max(0, int(a - r)):max(1, int(a + r) + 1)].reshape(-1, 3)
        return np.median(y, 0) if len(y) else np.median(x.reshape(-1, 3), 0)
    lum, near = (lambda c: float(np.dot(c, (.3, .59, .11)))), (lambda a, b: float(np.abs(a - b).mean()))
    left, right = patch(.27, .6), patch(.73, .6)
    cheek = (left + right)/2
    skin = float(np.clip(1.292 - .0060*lum(cheek), 0, 1))            # fitted on 36 drawn people: error 0.06 (standard deviation)
    corners = np.median(np.concatenate([x[:h//12, :w//12].reshape(-1, 3), x[:h//12, -w//12:].reshape(-1, 3)]), 0)
    cloth = np.median(x[int(.95*h):, int(.4*w):int(.6*w)].reshape(-1, 3), 0)
    crown = patch(.5, -.12)
    forehead = patch(.5, .1)
    bald = near(crown, forehead) < .11*lum(forehead) + 3 and near(crown, cheek) < .35*lum(cheek)
    is_hair = lambda u, v: not bald and near(patch(u, v, .03), crown) < 22 and near(patch(u, v, .03), corners) > 30
    both = lambda u, v: is_hair(u, v) and is_hair(1 - u, v)
    hair = 'bald' if bald else 'long' if both(-.1, 1.15) else 'bob' if both(-.06, .8) else 'afro' if both(-.25, .0) else 'fringe' if near(patch(.5, .08, .04), crown) < 25 else 'short'
    chin, lip = patch(.5, .97, .04), patch(.3, .88, .03)
    dark = lum(cheek) - lum(chin) > 45 and near(chin, cheek) > 34
    beard = 'none' if not dark else 'short_beard' if lum(cheek) - lum(lip) > 40 else 'goatee'
    # the width of the face: how far along the cheeks the colour of skin goes
    row = x[int(np.clip(cy + .12*side, 0, h - 1))].astype(float)
    skinny = np.abs(row - cheek).mean(-1) < 48; c = int(np.clip(cx, 0, w - 1)); a = b = c
    gap = int(.08*side)
    while a > 0 and skinny[max(0, a - gap):a].any(): a -= 1
    while b < w - 1 and skinny[b+1:b + 1 + gap].any(): b += 1
    width = float(np.clip(((b - a)/side - .92)/.5, .1, .9))
    return P.Identity(seed=1, skin=skin, undertone=float(np.clip((cheek[0] - cheek[2])/max(lum(cheek), 1)*2 - 1, -.6, .6)), hair=hair, hair_color=_hex(crown) if not bald else 'brown',
        grey=0., beard=beard, eye_color=_eyes(x, cx, cy, side, cheek), cloth_color=_hex(cloth), background='studio', background_color=_hex(corners),
        light=float(np.clip(-(lum(left) - lum(right))/40, -.9, .9)) if abs(lum(left) - lum(right)) > 4 else -.3, face_width=width)

def _eyes(x, cx, cy, side, cheek):
    "The nearest named colour of what is neither skin, white nor black in the middle of the eyes."
    from midas_ref.data.portraits import EYE_COLORS
    found = []
    for u in (.3, .7):
        a, b = cx + (u - .5)*side, cy + (.36 - .5)*side
        y = x[max(0, int(b - .06*side)):int(b + .06*side), max(0, int(a - .07*side)):int(a + .07*side)].reshape(-1, 3).astype(float)
        if not len(y): continue
        l = y @ (.3, .59, .11); chroma = lambda v: v/(v.sum(-1, keepdims=True) + 1)
        away = np.abs(chroma(y) - chroma(cheek)).sum(-1)
        keep = (l > 30) & (l < np.quantile(l, .8)) & (away >= np.quantile(away, .7))
        if keep.any(): found.append(np.median(y[keep], 0))
    if not found: return 'brown'
    c = np.mean(found, 0); unit = lambda v: v/(np.linalg.norm(v) + 1e-6)
    return min(EYE_COLORS, key=lambda k: np.abs(unit(_unhex(EYE_COLORS[k])) - unit(c)).sum() + abs(_unhex(EYE_COLORS[k]).mean() - c.mean())/400)

# ---- uploads

def open_upload(
    data:bytes,        # an image file
    folder:Path,       # for the short time that a decoder needs a file
    size:tuple,        # (h, w) of the model
    codec=None,        # of the model, to tell drawn portraits from photographs
    drawn:bool=False,  # the visitor says that it is a drawn portrait
)->Person:
    "A drawn portrait as it is, a photograph as its look-alike."
    from midas_ref.inference.video import is_drawn, load_portrait
    with tempfile.NamedTemporaryFile(dir=folder, suffix='.upload') as f:
        f.write(data); f.flush()
        try: p = load_portrait(f.name, size)
        except (ValueError, OSError) as e: raise Refused(str(e).replace(f.name, 'The file')) from None
    x = np.round((p.picture.permute(1, 2, 0).numpy() + 1)*127.5).astype(np.uint8)
    known = None
    if codec is not None and not drawn:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            known = is_drawn(codec, p)
    if drawn or known: return Person(x, 'Your portrait', None, p.note)
    who = look_alike(x, p.face)
    return Person(paint(who, size), 'Your look-alike', dataclasses.asdict(who), f'{WHY} {p.note}'.strip())
