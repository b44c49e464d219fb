"""Metrics refuse what they cannot measure, and regions mean what they say."""
import pytest, torch
from midas_ref.metrics import flicker, lagged_correlation, latency, pearson, psnr, ssim

v = lambda *s: torch.rand(*s) * 2 - 1

def test_region_ignores_the_rest():
    x, mask = v(2, 5, 3, 16, 16), torch.zeros(16, 16); mask[4:8, 4:8] = 1
    y = x.clone(); y[..., 8:, :] = 0
    assert torch.isinf(psnr(y, x, mask)).all() and psnr(y, x).shape == (2, 5)
    assert psnr(y, x, 1 - mask).max() < 30

def test_masks_per_frame():
    x = torch.zeros(3, 3, 12, 12); y = x.clone(); y[1, :, :6] = .2
    mask = torch.zeros(3, 1, 12, 12); mask[:, :, :6] = 1; mask[1, :, 1:6] = 0
    assert abs(psnr(y, x, mask)[1].item() - 20) < 1e-3 and torch.isinf(psnr(y, x, mask)[0])
    assert ssim(y, x, mask).shape == (3,)

def test_ssim_is_that_of_brightness_from_black():
    x = v(1, 3, 11, 11); y = (x + .2*v(1, 3, 11, 11)).clamp(-1, 1); centre = torch.zeros(11, 11); centre[5, 5] = 1
    g = torch.exp(-(torch.arange(11.) - 5)**2/4.5); w = (g[:, None]*g[None])/g.sum()**2            # the window of Wang et al. 2004, on bytes
    a, b = ((u[0].double() + 1)*127.5 for u in (x, y))
    mean = lambda u: (u*w).sum((1, 2))
    ma, mb = mean(a), mean(b); va, vb, ab = mean(a*a) - ma**2, mean(b*b) - mb**2, mean(a*b) - ma*mb
    c, d = (.01*255)**2, (.03*255)**2
    want = ((2*ma*mb + c)*(2*ab + d)/((ma**2 + mb**2 + c)*(va + vb + d))).mean()
    assert abs(ssim(x, y, centre).item() - want.item()) < 1e-4

def test_flicker_only_counts_still_pixels():
    x = torch.zeros(4, 3, 8, 8); x[1::2, :, :4] = 1.
    still = torch.ones(8, 8); still[:4] = 0
    assert flicker(x, still).item() == 0 and abs(flicker(x, 1-still).item() - 50) < 1e-4

@pytest.mark.parametrize('lag', [-3, 0, 4])
def test_lag_is_found(lag):
    a = torch.randn(100); b = torch.roll(a, lag)
    lags, r = lagged_correlation(a, b)
    assert lags[r.argmax()] == lag

def test_scale_does_not_matter():
    a = torch.randn(50)
    assert abs(pearson(a*1e-13, a).item() - 1) < 1e-5 and abs(pearson(a*1e9, a).item() - 1) < 1e-5

def test_flicker_in_half_precision(): assert abs(flicker(torch.tensor([0., .02]).repeat(50).view(-1, 1, 1, 1).expand(-1, 3, 64, 64).half()).item() - 1) < .01

def test_percentiles_were_measured():
    s = latency([.01]*99 + [.5], deadline=.08)
    assert s.p99 == 500 and s.missed == .01 and latency([.01]).missed is None

def test_constant_track_has_no_correlation(): assert pearson(torch.ones(9), torch.randn(9)) == 0

@pytest.mark.parametrize('call, said', [
    (lambda: psnr(v(1, 3, 8, 8), v(1, 3, 8, 9)), 'of one shape'),
    (lambda: psnr(v(1, 3, 8, 8)*200, v(1, 3, 8, 8)), 'must lie in [-1, 1]'),
    (lambda: psnr(v(1, 3, 8, 8)/0, v(1, 3, 8, 8)), 'not finite'),
    (lambda: psnr(v(1, 3, 8, 8), v(1, 3, 8, 8), torch.zeros(8, 8)), 'empty'),
    (lambda: psnr(v(1, 3, 8, 8), v(1, 3, 8, 8), torch.ones(4, 4)), 'must match'),
    (lambda: ssim(v(1, 3, 8, 8), v(1, 3, 8, 8)), '11 x 11'),
    (lambda: flicker(v(1, 3, 8, 8)), 't of 2 or more'),
    (lambda: lagged_correlation(v(20), v(20)), 'lags up to 6 need 24'),
    (lambda: lagged_correlation(v(40), v(40)*float('nan')), 'finite'),
    (lambda: latency([.1], warmup=-1), '0 or more'),
    (lambda: psnr(v(4, 3, 16, 16), v(4, 3, 16, 16), torch.ones(3, 16, 16)), 'accepted: (h, w)'),
    (lambda: flicker(v(2, 3, 3, 8, 8), torch.tensor([1., 0]).view(2, 1, 1, 1, 1).expand(2, 3, 1, 8, 8)), 'nothing to measure'),
    (lambda: latency([]), 'No durations'),
    (lambda: latency([1, float('nan')]), 'finite'),
])
def test_errors_say_what_to_do(call, said):
    with pytest.raises(ValueError) as e: call()
    assert said in str(e.value)
