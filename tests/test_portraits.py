"What the page on portraits does not teach: reproducibility, independence, exact truth, any size, any seed."
import json
import math
from dataclasses import asdict

import pytest
import torch

from midas_ref.data.portraits import (EXPRESSIONS, KEYPOINTS, LIPS, MOTION, MOTION_RANGE, MOUTH, PARTS, SHOULDERS, SKULL, Identity, Layers,
                                      bake, expression, keypoints, neutral_motion, pose, regions)

torch.set_num_threads(1)
SEEDS = (19, 24, 57)

@pytest.fixture(scope="module")
def people():
    return bake([Identity.random(s) for s in SEEDS], 256, views=(7, 5))

def random_motion(b, t, seed=0):
    g = torch.Generator().manual_seed(seed)
    lo, hi = (torch.tensor([MOTION_RANGE[k][j] for k in MOTION]) for j in (0, 1))
    return lo + (hi - lo) * torch.rand(b, t, len(MOTION), generator=g)

def channel(name): return MOTION.index(name)

def outline(mask, point, reach=3.0):
    "Distance in pixels from a point to the nearest place where a soft mask crosses one half."
    s = torch.linspace(-reach, reach, 61)
    dy, dx = torch.meshgrid(s, s, indexing="ij")
    grid = torch.stack([(point[0] + dx) / mask.shape[1] * 2 - 1, (point[1] + dy) / mask.shape[0] * 2 - 1], -1)
    inside = torch.nn.functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] > 0.5
    edge = torch.zeros_like(inside)
    edge[:, 1:] |= inside[:, 1:] ^ inside[:, :-1]
    edge[1:] |= inside[1:] ^ inside[:-1]
    return torch.hypot(dx, dy)[edge].min().item() if edge.any() else math.inf

def test_same_seed_same_pixels():
    i = Identity.random(5)
    assert Identity.random(5) == i and Identity(**json.loads(json.dumps(asdict(i)))) == i
    m = random_motion(1, 2)
    a, b = (pose(bake(i, 96, views=(3, 3), detail=0.5), m) for _ in range(2))
    assert torch.equal(a, b)

def test_seeds_differ():
    faces = pose(bake([Identity.random(s) for s in range(6)], 64, views=(1, 1), detail=0.5), neutral_motion(6, 1))[:, 0]
    gaps = [(faces[i] - faces[j]).abs().mean().item() for i in range(6) for j in range(i)]
    assert min(gaps) > 0.03

def test_rows_and_frames_are_independent(people):
    m = random_motion(3, 2, seed=1)
    whole = pose(people, m)
    for row in range(3):
        for frame in range(2):
            alone = pose(people[row], m[row:row + 1, frame:frame + 1])
            assert (alone[0, 0] - whole[row, frame]).abs().max() < 1e-4

def test_parts_sum_to_one(people):
    video, parts = pose(people, random_motion(3, 2, seed=2), parts=True)
    assert parts.shape == (3, 2, len(PARTS), 256, 256)
    assert (parts.sum(2) - 1).abs().max() < 1e-5 and parts.min() > -1e-6
    assert torch.equal(video, pose(people, random_motion(3, 2, seed=2)))

@pytest.mark.parametrize("name", [KEYPOINTS[k] for k in LIPS])
def test_lip_keypoints_agree_with_pixels(people, name):
    m = random_motion(3, 4, seed=3)
    for quiet in ("tx", "ty", "tz", "press", "bite", "tongue", "width"): m[..., channel(quiet)] = 0
    m[..., channel("open")] = torch.linspace(0.25, 1, 4)
    m[..., channel("yaw")] = torch.linspace(-0.42, 0.42, 4)
    m[..., channel("pitch")] = m[..., channel("pitch")].clamp(-0.2, 0.2)
    parts, k = pose(people, m, parts=True)[1], keypoints(people, m)
    lips, hole = parts[:, :, PARTS.index("lips")], parts[:, :, PARTS.index("mouth")]
    mask = hole if "inner" in name else lips + hole
    for row in range(3):
        for frame in range(4):
            assert outline(mask[row, frame], k[row, frame, KEYPOINTS.index(name)]) <= 1.5, (row, frame)

def test_open_is_monotone_in_pixels(people):
    others = dict(jaw=0.3, yaw=0.2, width=-0.3, smile=0.4)
    m = neutral_motion(3, 9, open=torch.linspace(0, 1, 9), **others)
    parts, k = pose(people, m, parts=True)[1], keypoints(people, m)
    area = parts[:, :, PARTS.index("mouth")].sum((-1, -2))
    assert (area.diff(dim=1) > 0).all() and (area[:, 0] < 3).all()
    gap = (k[:, :, KEYPOINTS.index("lip_lower_inner")] - k[:, :, KEYPOINTS.index("lip_upper_inner")]).norm(dim=-1)
    assert (gap.diff(dim=1) > 0.5).all() and gap[:, 0].max() < 0.1

def test_skull_and_shoulders_ignore_the_mouth(people):
    a = random_motion(3, 4, seed=4)
    b = a.clone()
    b[..., [channel(c) for c in MOUTH]] = random_motion(3, 4, seed=5)[..., [channel(c) for c in MOUTH]]
    fixed = list(SKULL + SHOULDERS)
    ka, kb = keypoints(people, a), keypoints(people, b)
    assert torch.equal(ka[:, :, fixed], kb[:, :, fixed])
    assert (ka - kb)[:, :, list(LIPS)].norm(dim=-1).mean() > 1

def test_the_mouth_moves_nothing_above_the_cheeks(people):
    a, b = neutral_motion(3, 1), neutral_motion(3, 1, **{c: 0.8 for c in ("jaw", "open", "round")})
    change = (pose(people, a) - pose(people, b)).abs().amax((0, 1, 2))
    eyes = keypoints(people, a)[..., KEYPOINTS.index("lid_lower_l"), 1].min().int()
    assert change[:eyes].max() < 0.02 and change.max() > 0.5

def test_chin_follows_the_jaw(people):
    rows = keypoints(people, neutral_motion(3, 5, jaw=torch.linspace(0, 1, 5)))[..., KEYPOINTS.index("chin"), 1]
    assert (rows.diff(dim=1) > 1).all()

@pytest.mark.parametrize("channel_name, sign, point, axis", [("yaw", 1, "nose_bridge", 0), ("pitch", -1, "nose_bridge", 1), ("tx", 1, "nose_bridge", 0),
                                                              ("ty", -1, "forehead", 1), ("roll", 1, "forehead", 0), ("breath", -1, "shoulder_l", 1)])
def test_directions(people, channel_name, sign, point, axis):
    k = keypoints(people, neutral_motion(3, 2, **{channel_name: torch.tensor([0.0, 0.2])}))[:, :, KEYPOINTS.index(point), axis]
    assert (sign * (k[:, 1] - k[:, 0]) > 0.3).all()

@pytest.mark.parametrize("size", [(384, 640), (640, 384), (192, 128), (96, 256)])
def test_any_size(size):
    layers = bake(Identity.random(3), size, views=(1, 1), detail=0.5)
    video = pose(layers, neutral_motion(smile=1.0))
    assert video.shape == (1, 1, 3, *size) and video.isfinite().all()
    k = keypoints(layers, neutral_motion())[0, 0]
    chin, brow = k[KEYPOINTS.index("chin")], k[KEYPOINTS.index("forehead")]
    assert 0 < brow[1] < chin[1] < size[0] and abs(chin[0].item() - size[1] / 2) < 1

def test_every_seed_is_finite_and_in_range():
    m = random_motion(1, 1, seed=6)
    for seed in range(64):
        video = pose(bake(Identity.random(seed), 64, views=(1, 1), detail=0.5), m)
        assert video.isfinite().all() and video.min() >= -1 and video.max() <= 1, seed

def test_expressions_are_distinct(people):
    m = torch.stack([expression(k) for k in EXPRESSIONS])[None]
    faces = pose(people[0], m)[0, :, :, 60:220, 60:200]
    gaps = (faces[:, None] - faces[None]).abs().mean((2, 3, 4)) + 9 * torch.eye(len(EXPRESSIONS))
    assert gaps.min() > 0.004, gaps.min()

def test_regions(people):
    m = neutral_motion(3, 1, yaw=0.2, open=0.4)
    r = regions(people, m)
    assert set(r.unique().tolist()) <= {0.0, 1.0} and (r.sum((-1, -2)) > 50).all()
    a, b = pose(people, m), pose(people, m + neutral_motion(3, 1, open=0.5, jaw=0.8, blink_l=1.0, blink_r=1.0, gaze_x=0.5))
    still = r[:, :, 3:4]
    assert ((a - b).abs() * still).max() < 0.02
    background = r[:, :, 2:3]
    assert ((a - pose(people, m + neutral_motion(3, 1, smile=1.0, yaw=-0.05))).abs() * background).max() < 1e-4

def test_errors_say_what_to_do(people):
    with pytest.raises(ValueError, match="choose from"): Identity(hair="mohawk")
    with pytest.raises(ValueError, match="choose from"): neutral_motion(jawbone=1.0)
    with pytest.raises(ValueError, match="choose from"): expression("hangry")
    with pytest.raises(ValueError, match="one row a person"): pose(people, neutral_motion(1, 1))

def test_half_precision_views(people):
    half = people.map(lambda v: v)
    half.skin_views, half.hair_views = people.skin_views.half(), people.hair_views.half()
    m = neutral_motion(3, 1, yaw=0.3, open=0.4)
    assert (pose(half, m) - pose(people, m)).abs().mean() < 0.003
    assert len(Layers.stack([people, people])) == 6

def test_turning_is_smooth(people):
    m = neutral_motion(1, 49, yaw=torch.linspace(-0.5, 0.5, 49), pitch=torch.linspace(-0.25, 0.25, 49))
    video = torch.cat([pose(people[1], m[:, i:i + 7]) for i in range(0, 49, 7)], 1)[0]
    change = video.diff(dim=0).abs().mean((1, 2, 3))
    assert change.max() < 2 * change.median() # no pop where the nearest views change
