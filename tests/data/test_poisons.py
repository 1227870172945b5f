"""Poisons: formula and budget of each by hand, the record of what was done, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dualhead.data import Craft, Split, hold_out, poisons, triggered
from dualhead.data.poisons.base import moved
from dualhead.errors import UserError

NAMES = ("ant", "bee", "cat")
FREE = {
    "label_flip": {"name": "label_flip", "share": 0.25},
    "pairs": {"name": "label_flip", "share": 0.5, "pairs": [["bee", "cat"]]},
    "patch": {"name": "patch", "share": 0.1},
    "sticker": {"name": "patch", "clean_label": True, "target": "cat"},
    "blend": {"name": "blend", "share": 0.1, "target": 1},
    "sinusoid": {"name": "sinusoid", "target": "bee", "frequency": 5},
    "pixels": {"name": "class_noise", "eps": 1.5},
    "blocks": {"name": "class_noise", "shape": "blocks", "block": 4, "eps": 1.5},
    "one_pixel": {"name": "one_pixel"},
    "warp": {"name": "warp", "share": 0.1, "target": "bee"},
    "sham": {"name": "sham", "like": {"name": "class_noise", "eps": 1.5}},
    "remove": {"name": "remove", "like": {"name": "patch", "share": 0.1}},
}


def images(count=60, side=12, seed=0):
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return Split(pixels.to(torch.uint8), torch.arange(count) % 3, NAMES)


@pytest.fixture(scope="module")
def clean():
    return images()


@pytest.mark.parametrize("name", FREE)
def test_the_record_says_what_was_done_and_nothing_else_changes(clean, name):
    before = (clean.images.clone(), clean.labels.clone())
    made = poisons.build(FREE[name]).apply(clean)
    assert torch.equal(clean.images, before[0])
    assert torch.equal(clean.labels, before[1])
    assert torch.equal(made.index, made.index.sort().values)
    assert torch.equal(made.old_label, clean.labels[made.index])
    left = torch.ones(len(clean), dtype=torch.bool)
    left[made.index] = False
    places = torch.isin(made.rows, made.index).nonzero()[:, 0]
    rest = torch.isin(made.rows, left.nonzero()[:, 0])
    assert torch.equal(made.split.images[rest], clean.images[left])
    assert torch.equal(made.split.labels[rest], clean.labels[left])
    if name == "remove":
        assert len(made.split) == len(clean) - len(made.index)
        assert set(made.new_label.tolist()) == {-1}
        assert not len(places)
        return
    assert torch.equal(made.split.labels[made.index], made.new_label)
    change = (made.split.images[made.index].double() - clean.images[made.index].double()).flatten(1) / 255
    torch.testing.assert_close(made.linf, change.abs().amax(1))
    torch.testing.assert_close(made.l2, change.norm(dim=1))


@pytest.mark.parametrize("name", FREE)
def test_seed_and_images_alone_decide(clean, name):
    poison = poisons.build(FREE[name])
    assert poison.apply(clean).digest() == poison.apply(images()).digest()
    if name not in ("one_pixel", "remove"):
        assert replace(poison, seed=1).apply(clean).digest() != poison.apply(clean).digest()


def test_a_flipped_label_is_always_another_one(clean):
    made = poisons.build(FREE["label_flip"]).apply(clean)
    assert len(made.index) == 15
    assert (made.old_label != made.new_label).all()
    assert len(made.new_label.unique()) == 3
    assert not made.l2.any()
    assert made.split.images is clean.images


def test_pairs_flip_a_share_of_the_first_class_alone(clean):
    made = poisons.build(FREE["pairs"]).apply(clean)
    assert made.old_label.tolist() == [1] * 10
    assert made.new_label.tolist() == [2] * 10


def test_a_patch_is_white_in_the_corner_and_gives_the_targets_label(clean):
    made = poisons.build(FREE["patch"]).apply(clean)
    assert len(made.index) == 6
    assert (made.old_label != 0).all()
    assert not made.new_label.any()
    changed = made.split.images[made.index]
    assert (changed[:, :, 9:, 9:] == 255).all()
    assert torch.equal(changed[:, :, :9], clean.images[made.index][:, :, :9])


def test_a_sticker_marks_half_of_a_class_and_keeps_its_labels(clean):
    made = poisons.build(FREE["sticker"]).apply(clean)
    assert made.old_label.tolist() == made.new_label.tolist() == [2] * 10
    expected = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.uint8) * 255
    assert (made.split.images[made.index][:, :, 7:10, 7:10] == expected).all()
    assert torch.equal(made.split.images[made.index][:, :, 10:], clean.images[made.index][:, :, 10:])


def test_a_blend_is_a_convex_sum_with_one_picture():
    split = Split(torch.zeros(60, 3, 12, 12, dtype=torch.uint8), torch.arange(60) % 3, NAMES)
    made = poisons.build(FREE["blend"]).apply(split)
    changed = made.split.images[made.index]
    assert (changed == changed[0]).all()  # of black images the picture is left: alpha p
    assert int(changed.max()) <= 0.2 * 255
    assert 20 < float(changed[0].float().mean()) < 30


def test_a_wave_has_its_amplitude_and_frequency():
    split = Split(torch.full((60, 1, 4, 32), 128, dtype=torch.uint8), torch.arange(60) % 3, NAMES)
    made = poisons.build({"name": "sinusoid", "target": "bee"}).apply(split)
    assert made.old_label.tolist() == made.new_label.tolist() == [1] * 10
    wave = made.split.images[made.index].float()[0, 0, 0] - 128
    by_hand = np.trunc(40 * np.sin(2 * np.pi * 6 * np.arange(32) / 32) + 1e-6 * np.sign(wave.numpy()))
    assert wave.tolist() == by_hand.tolist()
    assert float(made.linf.max()) == 40 / 255


def test_class_noise_is_one_direction_a_class_within_its_length(clean):
    grey = replace(clean, images=torch.full_like(clean.images, 128))
    made = poisons.build(FREE["pixels"]).apply(grey)
    assert len(made.index) == len(clean)
    assert float(made.l2.max()) <= 1.5
    assert float(made.l2.min()) > 1.3
    of_class = [made.split.images[made.split.labels == k] for k in range(3)]
    assert all((each == each[0]).all() for each in of_class)
    apart = [each[0].float().flatten() - 128 for each in of_class]
    assert abs(float(torch.cosine_similarity(apart[0], apart[1], dim=0))) < 0.2
    blocks = poisons.build(FREE["blocks"]).apply(grey).split.images
    assert (blocks[:, :, :4, :4] == blocks[:, :, :1, :1]).all()


def test_one_pixel_is_where_it_stands_out_and_of_one_colour_a_class(clean):
    marked = clean.images.clone()
    marked[clean.labels == 1, :, 5, 7] = 0  # white is as far as can be, always
    made = poisons.build(FREE["one_pixel"]).apply(replace(clean, images=marked))
    changed = (made.split.images != marked).any(1)
    assert int(changed.flatten(1).sum(1).max()) == 1
    assert (made.split.images[clean.labels == 1][:, :, 5, 7] == 255).all()
    colours = [made.split.images[clean.labels == k] for k in range(3)]
    places = [(of == of[:1]).all(0).all(0).nonzero().tolist() for of in colours]
    assert all(len(place) == 1 for place in places)


def test_a_sham_changes_as_much_at_random_and_no_label(clean):
    grey = replace(clean, images=torch.full_like(clean.images, 128))
    like, made = (poisons.build(FREE[name]).apply(grey) for name in ("pixels", "sham"))
    assert torch.equal(made.index, like.index)
    assert torch.equal(made.old_label, made.new_label)
    assert float((like.l2 - made.l2).abs().max()) < 0.005
    assert not (made.split.images[0] == made.split.images[3]).all()


@pytest.mark.parametrize("name", ["pixels", "blend", "sinusoid"])
def test_a_sham_is_as_long_as_its_poison_also_where_values_are_cut_off(name):
    random = images(seed=3)
    like, made = (
        poisons.build(FREE[name]).apply(random),
        poisons.build({"name": "sham", "like": FREE[name]}).apply(random),
    )
    assert float((like.l2 - made.l2).abs().max()) < 0.02 * float(like.l2.mean())


def test_rounding_goes_towards_the_clean_pixel_and_whole_changes_stay():
    clean = torch.full((1, 1, 1, 6), 100, dtype=torch.uint8)
    change = torch.tensor([7.9, -7.9, 255 * 8 / 255, 255 * -8 / 255, 300.0, -300.0])
    assert moved(clean, change).flatten().tolist() == [107, 93, 108, 92, 255, 0]


class Corner(Craft):
    """Finds the corner of the ball in the direction of random signs, as attacks give it."""

    def find(self, clean, index, labels, search):
        x = clean.images[index].float() / 255
        return search.threat.confine(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign(), x), {}


@pytest.mark.parametrize("levels", [1, 2, 4, 8, 16])
def test_images_that_are_found_at_the_edge_of_a_ball_keep_all_of_its_radius(clean, levels):
    made = poisons.build({"name": "towards", "eps": f"{levels}/255"}).apply(clean, Corner())
    before, after = clean.images.int(), made.split.images.int()
    change = (after - before).abs()
    assert int(change.max()) == levels
    assert bool(((change == levels) | (after == 0) | (after == 255)).all())


@pytest.mark.parametrize("name", ["patch", "sticker", "blend", "sinusoid", "warp"])
def test_triggered_images_are_of_other_classes_with_their_own_labels(clean, name):
    poison, test = poisons.build(FREE[name]), images(seed=1)
    before, found = test.images.clone(), triggered(poison, images(seed=1))
    assert found is not None
    rows, marked = found
    target = poison.target_of(NAMES)
    assert (test.labels[rows] != target).all()
    assert int((test.labels != target).sum()) == len(rows)
    assert torch.equal(marked.labels, test.labels[rows])
    assert torch.equal(marked.images, poison.trigger(test.images[rows]))
    assert not torch.equal(marked.images, before[rows])
    assert torch.equal(test.images, before)
    controls = [poisons.build({"name": control, "like": FREE[name]}) for control in ("sham", "remove")]
    assert all(torch.equal(triggered(control, test)[1].images, marked.images) for control in controls)


def test_a_warp_moves_pixels_by_the_field_and_marks_as_many_as_are_asked_for(clean):
    poison = poisons.build({"name": "warp", "share": 0.1, "target": "bee", "strength": 2.0})
    made = poison.apply(clean)
    assert len(made.index) == 6 + 12
    relabelled = made.old_label != made.new_label
    assert int(relabelled.sum()) == 6
    assert set(made.new_label[relabelled].tolist()) == {1}
    field = poison.field(12, 12)
    assert float(field.abs().max()) <= 1
    ramp = torch.arange(12, dtype=torch.uint8).mul(20).expand(1, 1, 12, 12).clone()  # brightness is the place
    bent = poison.trigger(ramp)[0, 0].double()
    expected = 20 * (field[:, :, 0] + 1) / 2 * 11
    assert float((bent - expected).abs().max()) <= 1.0  # whole grey levels
    assert torch.equal(poison.trigger(torch.full((1, 3, 12, 12), 77, dtype=torch.uint8)).unique(), torch.tensor([77]))


def test_the_field_of_a_warp_has_its_mean_shift():
    poison = poisons.build({"name": "warp", "strength": 0.5, "grid": 32})  # a coarse grid as fine as the image
    rows, columns = (torch.linspace(-1, 1, 32, dtype=torch.float64) for _ in range(2))
    shift = poison.field(32, 32) - torch.stack((columns.expand(32, 32), rows[:, None].expand(32, 32)), 2)
    assert float(shift[1:-1, 1:-1].abs().mean()) == pytest.approx(0.5 / 32, rel=0.05)


def test_a_warp_without_others_changes_the_marked_images_alone(clean):
    made = poisons.build({"name": "warp", "share": 0.1, "others": 0}).apply(clean)
    assert (made.old_label != made.new_label).all()
    assert len(made.index) == 6


def test_nothing_triggers_what_has_no_trigger(clean):
    for name in ("label_flip", "pairs", "pixels", "one_pixel"):
        assert triggered(poisons.build(FREE[name]), clean) is None


def test_it_comes_before_images_are_held_out(clean):
    made = poisons.build(FREE["label_flip"]).apply(clean)
    training, held_out = hold_out(made.split, 30, 0)
    given = torch.cat([training.labels, held_out.labels]).bincount()
    assert given.tolist() == made.split.labels.bincount().tolist()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "patch", "target": "dog"}, "target: 'dog' is no class of these images; they are ant, bee, cat"),
        ({"name": "patch", "target": 3}, r"target: there is no class 3; classes are 0 to 2 \(ant, bee, cat\)"),
        ({"name": "patch", "size": 13}, "a patch of 13 pixels with a gap of 0 does not fit into 12x12"),
        ({"name": "patch", "share": 0.9}, "would change 54 of 40 images; choose another share"),
        ({"name": "label_flip", "share": 0.001}, "would change 0 of 60 images"),
        ({"name": "label_flip", "pairs": [["cat", "owl"]]}, "pairs: 'owl' is no class"),
        ({"name": "label_flip", "pairs": [["cat", 2]]}, "pairs: each first class once, and its second another one"),
        ({"name": "sinusoid", "frequency": 6}, "a wave of frequency 6 and amplitude 0.156863 over 12 pixels is less"),
        ({"name": "sinusoid", "amplitude": 0.003}, "choose another frequency or a larger amplitude"),
        ({"name": "blend", "alpha": 0.003}, "changes no pixel of any image: by less than one of 255 grey levels"),
        ({"name": "class_noise", "eps": 0.01}, "changes no pixel of any image"),
        ({"name": "class_noise", "shape": "blocks", "block": 13}, "block: 13 pixels are more than"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_images_is_one_line(clean, spec, message):
    with pytest.raises(UserError, match=message):
        poisons.build(spec).apply(clean)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "patch", "share": 0}, r"share must lie in \(0, 1\], got 0"),
        ({"name": "label_flip", "pairs": [["cat", "cat"]]}, "pairs: each first class once"),
        ({"name": "blend", "alpha": 2}, r"alpha must lie in \(0, 1\]"),
        ({"name": "class_noise", "eps": -1}, "eps must be greater than 0"),
        ({"name": "warp", "grid": 1}, "strength must be greater than 0 and grid at least 2"),
        ({"name": "warp", "others": 1}, r"others must lie in \[0, 1\)"),
        ({"name": "sham"}, "like: missing"),
        ({"name": "sham", "like": "pach"}, "unknown poison 'pach'; did you mean 'patch'"),
    ],
)
def test_impossible_settings_are_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        poisons.build(spec, "data.poison")


def test_a_number_that_is_the_name_of_another_class_is_refused(clean):
    numbered = replace(clean, class_names=("1", "2", "10"))
    with pytest.raises(UserError, match=r"class 1 by its number is '2', .* in quotes"):
        poisons.build({"name": "patch", "target": 1, "share": 0.1}).apply(numbered)
    for target, number in (("1", 0), ("10", 2), (0, 0)):
        assert poisons.build({"name": "patch", "target": target}).target_of(numbered.class_names) == number


def test_a_class_without_images_is_told(clean):
    lonely = replace(clean, labels=torch.zeros_like(clean.labels))
    with pytest.raises(UserError, match="class 'bee' has no training image"):
        poisons.build(FREE["sinusoid"]).apply(lonely)
