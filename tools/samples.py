"""Make data_samples/ (portraits, speech in five languages, one clip with its truth) and the picture of README.md: python tools/samples.py

Everything is drawn and synthesised by this project, from the seeds below, so a second run gives the same files.
`python tools/samples.py moving` makes the animation of README.md with the bundled model.
"""
import json, sys
from fractions import Fraction
from pathlib import Path
import av
import numpy as np
import soundfile
from PIL import Image
from midas_ref.data.clips import captions, draw, frame_times, motion, to_uint8, write_script
from midas_ref.data.portraits import Identity, bake, expression, neutral_motion, pose
from midas_ref.data.speech import RATE, synth

OUT = Path(__file__).resolve().parents[1]/'data_samples'
PEOPLE = {      # name -> (identity seed, expression)
    'mira': (2, 'happy'), 'noor': (3, 'neutral'), 'tobias': (4, 'thoughtful'), 'greta': (7, 'happy'), 'lina': (19, 'neutral'),
    'amara': (21, 'happy'), 'kenji': (24, 'neutral'), 'rose': (27, 'surprised'), 'ines': (28, 'neutral'), 'edith': (30, 'happy'), 'zahra': (40, 'neutral'),
}
SPEECH = {
    'en-us': ('f2', 'Hello! I was only a drawing, and now I can speak with you.'),
    'cmn': ('f3', '你好，我叫小画，今天我们一起说话。'),
    'es': ('m3', 'Buenos días, me llamo Paloma y vivo en una pantalla.'),
    'ja': ('f1', 'こんにちは。きょうは いっしょに はなしましょう。'),
    'de': ('m1', 'Guten Tag, mein Bild bewegt die Lippen, wenn du mit mir sprichst.'),
}

def portraits(size=512):
    "Portraits as PNG and their identities as JSON."
    (OUT/'portraits').mkdir(parents=True, exist_ok=True)
    about = {}
    for name, (seed, mood) in PEOPLE.items():
        who = Identity.random(seed)
        m = neutral_motion(1, 1) + expression(mood, .6)
        picture = to_uint8(pose(bake([who], (size, size), views=(5, 3)), m)[0, 0]).permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(OUT/'portraits'/f'{name}.png', optimize=True)
        about[name] = dict(seed=seed, expression=mood, identity=vars(who))
    (OUT/'portraits'/'identities.json').write_text(json.dumps(about, indent=1))

def sheet(side=213, cols=6, extra=(5, 15, 16, 25, 42, 44, 45)):
    "The picture at the top of README.md: the sample portraits and a few more."
    files = [Image.open(OUT/'portraits'/f'{n}.png') for n in PEOPLE]
    more = [Image.fromarray(to_uint8(pose(bake([Identity.random(s)], 256, views=(1, 1)), neutral_motion())[0, 0]).permute(1, 2, 0).numpy()) for s in extra]
    all_ = [np.asarray(f.resize((side, side), Image.LANCZOS)) for f in files + more]
    all_ = all_[:len(all_)//cols*cols]
    picture = np.concatenate([np.concatenate(all_[i:i+cols], 1) for i in range(0, len(all_), cols)])
    (OUT.parent/'nbs'/'images').mkdir(exist_ok=True)
    Image.fromarray(picture).save(OUT.parent/'nbs'/'images'/'people.jpg', quality=88)

def speech():
    "One sentence in each language, FLAC at 16 kHz."
    (OUT/'speech').mkdir(parents=True, exist_ok=True)
    for lang, (voice, text) in SPEECH.items():
        x = synth(text, lang, voice, speed=150).samples
        soundfile.write(OUT/'speech'/f'{lang}.flac', np.concatenate([np.zeros(RATE//5, np.float32), x, np.zeros(RATE//5, np.float32)]), RATE)

def clip(seed=4, seconds=5.76, fps=25):
    "A scene with sound as mp4, and its truth as JSON."
    s = write_script(seed, seconds, 'train', 'dialogue', 'en-us', clean=True)
    video, sound = draw(s, fps), s.samples + (s.partner.samples if s.partner else 0)
    with av.open(str(OUT/'truth_clip.mp4'), 'w', options={'movflags': 'faststart'}) as f:
        v, a = f.add_stream('libx264', rate=Fraction(fps)), f.add_stream('aac', rate=48000, layout='mono')
        v.width, v.height, v.pix_fmt, v.options = video.shape[-1], video.shape[-2], 'yuv420p', {'crf': '23', 'preset': 'slow'}
        for frame in video.permute(0, 2, 3, 1).numpy(): f.mux(v.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        f.mux(v.encode())
        wave = av.AudioFrame.from_ndarray((np.clip(sound, -1, 1)[None]*32767).astype(np.int16), format='s16', layout='mono'); wave.sample_rate = RATE
        for r in av.AudioResampler('fltp', 'mono', 48000).resample(wave): f.mux(a.encode(r))
        f.mux(a.encode())
    truth = dict(seed=seed, fps=fps, captions=captions(s), phonemes=s.phonemes(), lips_open=[round(float(x), 3) for x in motion(s, frame_times(s.seconds, fps))[:, 1]])
    (OUT/'truth_clip.json').write_text(json.dumps(truth))

def moving(side=224, chunks=10):
    "The animation of README.md: talking, listening and steered, by the bundled model."
    import torch
    from midas_ref.conditions.pose import HeadRig
    from midas_ref.inference.session import Session
    from midas_ref.inference.video import load_portrait, visible_mark
    from midas_ref.model.midas import Midas
    midas = Midas.from_pretrained('tiny').eval()
    n, rng = chunks*midas.cfg.chunk_samples, np.random.default_rng(0)
    voice = lambda lang: np.resize(np.concatenate([soundfile.read(OUT/'speech'/f'{lang}.flac', dtype='float32')[0], np.zeros(RATE//2, np.float32)]), n)
    rates = torch.zeros(1, 6*chunks, 3); rates[0, :, 0] = .55*torch.cos(torch.arange(6*chunks)/7)                            # to and fro
    columns = []
    for who, sound, steer in (('mira', voice('en-us'), {}), ('kenji', .0005*rng.standard_normal(n).astype(np.float32), {}), ('noor', voice('de'), dict(pose=HeadRig()(rates)[0]))):
        session = Session(midas, load_portrait(OUT/'portraits'/f'{who}.png'), seed=1)
        session.steer(**steer)
        columns.append([np.asarray(Image.fromarray(visible_mark(x)).resize((side, side), Image.LANCZOS)) for x in session.stream(sound)])
    frames = [Image.fromarray(np.concatenate(row, 1)) for row in zip(*columns)]
    frames[0].save(OUT.parent/'nbs'/'images'/'live.webp', save_all=True, append_images=frames[1:], duration=80, loop=0, quality=60, method=6)

if __name__ == '__main__':
    if sys.argv[1:] == ['moving']: moving()
    elif sys.argv[1:]: sys.exit(f"Unknown: {' '.join(sys.argv[1:])}; accepted: nothing, or moving.")
    else: portraits(); sheet(); speech(); clip()
    print(sum(f.stat().st_size for f in OUT.rglob('*') if f.is_file() and 'weights' not in f.parts)//1024, 'kB in', OUT)
