"""Bad settings and sizes give one clear error each."""
import dataclasses
import pytest
from midas_ref import config as C

@pytest.mark.parametrize('make, said', [
    (lambda: C.VideoConfig(width=0), 'VideoConfig.width is 0'),
    (lambda: C.VideoConfig(width=True), 'VideoConfig.width is True'),
    (lambda: C.VideoConfig(fps=0), 'VideoConfig.fps is 0'),
    (lambda: C.VideoConfig(fps=float('nan')), 'VideoConfig.fps is nan'),
    (lambda: C.CodecConfig(encoder_widths=(1, 2)), 'seven whole numbers'),
    (lambda: C.CodecConfig(decoder_depths=(0, 0, 1, 1, 1, 1, 1)), '1 or more below'),
    (lambda: C.CodecConfig(decoder_widths=(128, 256, 512, 500, 1024, 1024, 2048)), 'multiples of 32'),
    (lambda: C.CodecConfig(encoder_widths=(0,)*7), 'above zero'),
    (lambda: C.CodecConfig(encoder_widths=(128, 256, 512, 512, 1024, 1024, 2080)), 'divide'),
    (lambda: C.CodecConfig(encoder_depths=(0, 1.5, 1, 1, 1, 1, 1)), 'whole numbers'),
    (lambda: C.CodecConfig(attention_from='3'), 'attention_from'),
    (lambda: C.from_dict({'video': 5}), 'dictionary'),
    (lambda: C.DeviceSettings(dtype='float16'), 'float32 or bfloat16'),
    (lambda: C.AppSettings(port='7860'), 'a port'),
    (lambda: C.AudioConfig(heads=7), 'a multiple of heads=7'),
    (lambda: C.BackboneConfig(kv_heads=3), 'a multiple of kv_heads=3'),
    (lambda: C.HeadConfig(kind='cnn'), "'dit' or 'mlp'"),
    (lambda: C.HeadConfig(start=1.5), '0.5 to 1'),
    (lambda: C.HeadConfig(temperature=(1., 1.)), '1, 4, 9'),
    (lambda: C.HeadConfig(temperature=(-.1,)), '0 to 2'),
    (lambda: C.HeadConfig(temperature=()), '1, 4, 9'),
    (lambda: C.NoiseConfig(sigma_max=1.), 'below 1'),
    (lambda: C.from_dict({'video': {'hight': 64}}), 'VideoConfig field is'),
])
def test_impossible_sizes(make, said):
    with pytest.raises(ValueError, match='accepted') as e: make()
    assert said in str(e.value)

@pytest.mark.parametrize('text, said', [
    ('[device]\nthreads = many', "[device] threads is 'many'; accepted: 0 (what torch chooses)"),
    ('[device]\nname = tpu', "[device] name is 'tpu'; accepted: auto, cpu"),
    ('[device]\ndtype = float16', "[device] dtype is 'float16'"),
    ('[device]\ncores = 2', "[device] key is 'cores'; accepted: name, dtype, threads"),
    ('[gpu]\nx = 1', "section is 'gpu'; accepted: [device], [weights], [app]"),
    ('[app]\nport = 70000', "[app] port is '70000'; accepted: a port, 1 to 65535"),
    ('[DEFAULT]\nport = 1', "section is 'DEFAULT'"),
    ('port = 1', 'cannot be read'),
    ('[app]\nport = 1\nport = 2', 'cannot be read'),
])
def test_bad_settings(tmp_path, text, said):
    f = tmp_path/'settings.ini'; f.write_text(text)
    with pytest.raises(ValueError) as e: C.load_settings(f)
    assert said in str(e.value) and str(f) in str(e.value) and '\n' not in str(e.value)

def test_settings_order(tmp_path, monkeypatch):
    "Default, then file, then environment."
    monkeypatch.chdir(tmp_path)
    f = tmp_path/'settings.ini'; f.write_text('[app]\nport = 8000  ; a comment\n')
    assert C.load_settings(f).app == C.AppSettings(port=8000)
    monkeypatch.setenv('MIDAS_APP_PORT', '9000')
    assert C.load_settings(f).app.port == 9000
    with pytest.raises(FileNotFoundError, match='No settings file'): C.load_settings(tmp_path/'nowhere.ini')

def test_misspelt_variable_is_said(monkeypatch):
    monkeypatch.setenv('MIDAS_APP_PROT', '9000')
    with pytest.raises(ValueError, match='MIDAS_APP_PROT'): C.load_settings()

def test_file_from_notepad(tmp_path):
    f = tmp_path/'settings.ini'; f.write_bytes(b'\xef\xbb\xbf[app]\r\nport = 81\r\n')
    assert C.load_settings(f).app.port == 81

def test_no_cuda_is_said(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(ValueError, match='no CUDA device'): C.pick_device(C.DeviceSettings(name='cuda'))

@pytest.mark.parametrize('name', list(C.PRESETS))
def test_round_trip(name): assert C.from_dict(C.to_dict(C.preset(name))) == C.preset(name)

def test_presets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError): C.preset('tiny').frames_per_chunk = 3
    with pytest.raises(dataclasses.FrozenInstanceError): C.preset('tiny').video.height = 64
