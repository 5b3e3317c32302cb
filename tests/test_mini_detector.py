"""The mini detector: exact decoding, damage that drops what it destroys, a short training, save and load."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gvu.errors import GvuError
from gvu.geneval import Detection
from gvu.mini.detector import Detector, DetectorConfig, Targets, decode, encode, truth, verdict
from gvu.mini.grammar import SAMPLERS, SAMPLERS_PP, minimal_edits
from gvu.mini.pretrain.detect import DESTROYED, damage, make_batch, measure, train_detector, worst
from gvu.mini.pretrain.pictures import pixels
from gvu.mini.render import Placed, Scene, random_scene, scene_for

CONFIG = DetectorConfig()
SMALL = DetectorConfig(stem=8, width=16, blocks=1)


def perfect(targets: Targets, config: DetectorConfig = CONFIG) -> Tensor:
    """Raw output that is sure of the targets; cells that need not be empty are."""
    classes = torch.nn.functional.one_hot(targets.class_S_16_16.clamp_min(0), 1 + len(config.names))
    colors = torch.nn.functional.one_hot(targets.color_S_16_16.clamp_min(0), len(config.colors))
    return torch.cat([classes.movedim(-1, 1) * 80.0, colors.movedim(-1, 1) * 80.0, targets.box_S_3_16_16], 1)


def in_order(detections: list[Detection]) -> list[Detection]:
    return sorted(detections, key=lambda d: (d.x1, d.y1))


@pytest.mark.parametrize(("plus", "tag"), [(False, t) for t in SAMPLERS] + [(True, t) for t in SAMPLERS_PP])
def test_perfect_logits_decode_to_the_truth_and_the_rules_agree(plus: bool, tag: str) -> None:
    rng = np.random.default_rng(5)
    metadata = [(SAMPLERS_PP if plus else SAMPLERS)[tag](rng) for _ in range(25)]
    scenes = [scene_for(m, rng) for m in metadata]
    found = decode(perfect(encode([s.objects for s in scenes], CONFIG)), CONFIG)
    for m, scene, objects in zip(metadata, scenes, found, strict=True):
        assert in_order(objects) == in_order(truth(scene.objects))
        assert verdict(m, objects, plus).correct
        assert not any(verdict(edit, objects, plus).correct for edit in minimal_edits(m, rng, 5))


def test_targets_follow_an_object_that_is_off_the_lattice() -> None:
    objects = [Placed(name="cat", color="red", size=16, x=3, y=37)]
    [[found]] = decode(perfect(encode([objects], CONFIG)), CONFIG)
    assert found == truth(objects)[0]


def test_neighbours_that_touch_stay_two_and_votes_for_one_place_are_one() -> None:
    row = [Placed(name="cat", color="red", size=16, x=x, y=8) for x in (0, 16, 32)]
    assert len(decode(perfect(encode([row], CONFIG)), CONFIG)[0]) == 3
    votes = perfect(encode([row[:1]], CONFIG))
    votes[0, 0, 4, 2] = 79.0  # the cat's middle cell is less sure than those around it
    votes[0, 1 + CONFIG.names.index("bird"), 3, 1] = 81.0  # and to one corner a bird is more likely than a cat
    [found] = decode(votes, CONFIG)
    assert found == [replace(truth(row[:1])[0], score=found[0].score)]
    assert found[0].score > 0.99


def test_score_is_the_probability_against_nothing_and_the_floor_cuts() -> None:
    raw = torch.zeros(1, 1 + 24 + 10 + 3, 16, 16)
    raw[:, 0] = 20.0
    raw[0, 1 + 3, 5, 6] = 20.0 + float(np.log(3.0))  # 3 : 1 for a pizza
    raw[0, -1] = 1.0
    [[found]] = decode(raw, CONFIG)
    assert (found.name, found.center) == ("pizza", (24.0, 20.0))
    assert found.score == pytest.approx(0.75, abs=1e-6)
    assert decode(raw, CONFIG, floor=0.8) == [[]]


def test_damage_drops_what_it_destroys_and_keeps_what_it_spares() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(150)]
    clean = pixels(scenes) * 0.5 + 0.5
    kept = total = 0
    for scene, image in zip(scenes, clean, strict=True):
        after, objects = damage(image, scene.objects, clean, rng)
        assert after.shape == image.shape
        assert 0 <= float(after.min()) <= float(after.max()) <= 1
        assert {(o.name, o.color) for o in objects} <= {(o.name, o.color) for o in scene.objects}
        kept, total = kept + len(objects), total + len(scene.objects)
    assert 0.6 < kept / total < 0.95


def test_an_object_shifted_out_of_the_picture_is_dropped() -> None:
    """Off by four of sixteen pixels loses about a quarter of a bus; the threshold is three tenths."""
    edge = Placed(name="bus", color="red", size=16, x=0, y=0)
    rng = np.random.default_rng(1)
    image = pixels([Scene(objects=(edge,))])[0] * 0.5 + 0.5
    outcomes = [damage(image, [edge], image[None].clone().fill_(0.9), rng)[1] for _ in range(200)]
    gone = sum(not objects for objects in outcomes)
    corners = [o for objects in outcomes for o in objects if o.x == -4 and o.y == -4]
    assert 0 < gone < 200
    assert not corners  # 7/16 of the square is beyond the canvas
    assert DESTROYED < 7 / 16


def test_batches_depend_on_seed_and_step_only() -> None:
    a, b, c = (make_batch(3, step, 6, CONFIG) for step in (4, 4, 5))
    assert torch.equal(a.pixels_S_3_64_64, b.pixels_S_3_64_64)
    assert torch.equal(a.targets.class_S_16_16, b.targets.class_S_16_16)
    assert not torch.equal(a.pixels_S_3_64_64, c.pixels_S_3_64_64)


def test_a_third_of_a_batch_is_reconstructed() -> None:
    seen: list[tuple[int, ...]] = []

    def grey(x: Tensor) -> Tensor:
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
        seen.append(tuple(x.shape))
        return torch.full_like(x, 0.5)

    batch = make_batch(0, 0, 12, CONFIG, grey)
    assert seen == [(4, 3, 64, 64)]
    assert bool((batch.pixels_S_3_64_64[:4] == 0.5).all())
    assert int((batch.targets.class_S_16_16[:4] > 0).sum()) > 0


def test_a_short_training_learns_saves_and_loads(tmp_path: Path) -> None:
    detector = train_detector(tmp_path, steps=40, batch=12, config=SMALL)
    lines = [json.loads(line) for line in (tmp_path / "detector" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["class"] < 0.8 * 6.7  # an untrained one starts at about 6.7
    assert lines[-1]["loss"] < lines[0]["loss"]
    again = Detector.load(tmp_path / "detector" / "final")
    assert again.config == SMALL
    assert again.digest == detector.digest
    x = pixels([random_scene(np.random.default_rng(s)) for s in range(3)]) * 0.5 + 0.5
    assert again.detect(x, floor=1e-4) == detector.detect(x, floor=1e-4)
    assert not again.training


def test_detections_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    detector = Detector(SMALL)
    torch.nn.init.normal_(detector.out.weight, std=2.0)
    x = pixels([random_scene(np.random.default_rng(s)) for s in range(5)]) * 0.5 + 0.5
    together, alone = detector.detect(x), [detector.detect(picture[None])[0] for picture in x]
    assert sum(map(len, together)) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert detector.detect(x) == together
    for a, b in zip(together, alone, strict=True):
        assert [(d.name, d.color) for d in a] == [(d.name, d.color) for d in b]
        assert [d.score for d in a] == pytest.approx([d.score for d in b], abs=1e-5)


def test_measure_counts_verdicts() -> None:
    """A detector that sees nothing verifies nothing, rejects every false prompt and finds no garbled object."""
    report = measure(Detector(SMALL), reconstruct=lambda x: x, n_per_tag=2)
    assert report["clean"] == report["reconstructed"]
    assert len(report["clean"]["verified"]) == 13
    assert set(report["clean"]["verified"].values()) == {0.0}
    assert worst(report["clean"]["rejected"])[1] == 1.0
    assert report["garbled"]["found"] == {"above 0.3": 0.0, "above 0.9": 0.0}


def test_the_default_network_is_small() -> None:
    assert sum(p.numel() for p in Detector().parameters()) <= 350_000


def test_bad_input_gets_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(GvuError, match=r"takes \(S, 3, 64, 64\) pictures, got \(1, 3, 32, 32\)"):
        Detector(SMALL).detect(torch.zeros(1, 3, 32, 32))
    with pytest.raises(GvuError, match=r"config\.json is missing"):
        Detector.load(tmp_path / "nowhere")
    Detector(SMALL).save(tmp_path / "d")
    assert len(load_file(tmp_path / "d" / "model.safetensors")) == len(Detector(SMALL).state_dict())
    Detector(replace(SMALL, width=8)).save(tmp_path / "e")
    (tmp_path / "e" / "config.json").write_bytes((tmp_path / "d" / "config.json").read_bytes())
    for broken in ("{}", "[]", "not json", '{"stem": 8, "names": ["cat"], "colors": ["red"], "depth": 3}', None):
        if broken is not None:
            (tmp_path / "d" / "config.json").write_text(broken)
        with pytest.raises(GvuError, match="cannot be loaded"):
            Detector.load(tmp_path / ("e" if broken is None else "d"))
