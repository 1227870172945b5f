"""The gallery shows what it says: attacked images within the ball, and what the model itself says of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dualhead.errors import UserError
from dualhead.evaluation import make_gallery
from dualhead.evaluation.gallery import SHARES, SIDE
from dualhead.heads import attach_second_head
from dualhead.threats.lp import ThreatModel
from helpers.evaluation import THREAT, patterns, trained


@pytest.fixture(scope="module")
def dual():
    images, _ = patterns(2)
    torch.manual_seed(1)
    model = attach_second_head(trained(), "4", num_classes=4, example=images.float() / 255, aggregator="mean")
    return model.eval()


def show(model, count=12, threat=THREAT, **options):
    images, labels = patterns(count)
    return make_gallery(model, images, labels, threat=threat, **options)


@pytest.fixture(scope="module")
def shown(dual):
    return show(dual)


@pytest.mark.parametrize("threat", [THREAT, ThreatModel("L2", 0.5)])
def test_attacked_images_lie_within_each_budget(dual, threat):
    made = show(dual, threat=threat)
    assert made.eps.tolist() == pytest.approx([share * threat.eps for share in SHARES])
    change = (made.adversarial.astype(float) - made.original) / 255
    rounding = 0.5 / 255
    for step, eps in enumerate(made.eps):
        flat = np.abs(change[:, step]).reshape(3, 12, -1)
        largest = flat.max() if threat.norm == "Linf" else np.sqrt((flat**2).sum(2)).max()
        assert largest <= eps + rounding * (1 if threat.norm == "Linf" else np.sqrt(flat.shape[2]))
        assert flat.max() > 0


def test_landscapes_are_of_images_that_were_attacked():
    images, labels = patterns(24)
    torch.manual_seed(0)
    model = attach_second_head(trained(), "4", num_classes=4, example=images.float() / 255, aggregator="mean").eval()
    with torch.no_grad():
        right = (model(images.float() / 255).argmax(1) == labels).nonzero()[:, 0]
    wrong = labels.clone()
    wrong[right[3:]] = (wrong[right[3:]] + 1) % 4  # three are right
    made = make_gallery(model, images, wrong, threat=THREAT)
    assert len(made.landscape_rows) >= 3
    assert set(right[:3].tolist()) <= set(made.landscape_rows.tolist())


class Answerless(torch.nn.Module):
    def forward(self, x):
        return torch.full((len(x), 4), torch.nan) + 0 * x.sum()


def test_logits_that_are_no_numbers_name_no_class():
    made = show(Answerless(), count=4)
    assert (made.clean_prediction == -1).all()
    assert (made.prediction == -1).all()
    assert np.isnan(made.clean_probability).all()


def test_what_outputs_say_is_the_models_own_answer(dual, shown):
    x = torch.from_numpy(shown.original).float() / 255
    with torch.no_grad():
        heads = dual.head_logits(x)
        logits = torch.cat((heads, dual(x)[:, None]), 1)
    np.testing.assert_array_equal(shown.clean_prediction, logits.argmax(2).numpy())
    label = torch.from_numpy(shown.label)[:, None, None].expand(-1, 3, 1)
    np.testing.assert_allclose(shown.clean_probability[..., 1], logits.softmax(2).gather(2, label)[..., 0], rtol=1e-4)
    for prefix in ("clean_", ""):
        right = getattr(shown, f"{prefix}prediction") == (shown.label[:, None])
        np.testing.assert_array_equal(getattr(shown, f"{prefix}margin") > 0, right)


def test_what_merges_is_called_the_mean_where_it_is_the_mean(shown):
    images, _ = patterns(2)
    linear = attach_second_head(trained(), "4", num_classes=4, example=images.float() / 255, aggregator="linear").eval()
    assert shown.outputs.tolist() == ["head1", "head2", "mean"]
    assert show(linear, 1).outputs.tolist() == ["head1", "head2", "aggregate"]
    assert show(linear.view("mean"), 1).outputs.tolist() == ["head1", "head2", "mean"]
    assert show(linear.view("head2"), 1).outputs.tolist() == ["model"]


def test_an_attack_hurts_its_own_target_most(shown):
    right = (shown.margin[:, -1] > 0).mean(1)  # by target and output
    assert (right[[0, 1, 2], [0, 1, 2]] <= right.min(0) + 1e-9).all()
    assert right[0, 0] < (shown.clean_margin[:, 0] > 0).mean()


def test_nothing_depends_on_the_batch(dual, shown):
    again = show(dual, batch_size=5)
    for name in ("adversarial", "prediction", "margin", "landscape", "landscape_rows"):
        np.testing.assert_array_equal(getattr(again, name), getattr(shown, name))


def test_landscapes_pass_through_the_clean_and_the_attacked_image(dual):
    made = show(dual, landscapes=[7, 2])
    assert made.landscape_rows.tolist() == [7, 2]
    middle, one = SIDE // 2, SIDE // 2 + 8
    for surface, row in zip(made.landscape, made.landscape_rows, strict=True):
        np.testing.assert_allclose(surface[:, middle, middle], made.clean_margin[row], atol=1e-4)
        np.testing.assert_allclose(surface[:, middle, one], made.margin[-1, -1, row], atol=1e-4)


def test_a_model_of_one_head_is_shown_alone(tmp_path):
    made = show(trained(), 4)
    assert made.outputs.tolist() == ["model"]
    assert made.margin.shape == (1, len(SHARES), 4, 1)
    made.save(tmp_path / "gallery.npz")
    with np.load(tmp_path / "gallery.npz") as stored:
        np.testing.assert_array_equal(stored["margin"], made.margin)


def test_a_landscape_of_no_sample_is_refused(dual):
    with pytest.raises(UserError, match="landscape of sample 99"):
        show(dual, landscapes=[99])


def test_labels_and_images_that_do_not_fit_the_model_are_refused_in_one_line():
    images, labels = patterns(4)
    with pytest.raises(UserError, match="labels must lie in 0 to 3"):
        make_gallery(trained(), images, labels + 4, threat=THREAT)
    with pytest.raises(UserError, match=r"fails on one image of shape \(3, 6, 6\)"):
        make_gallery(trained(), images[:, :, :6, :6], labels, threat=THREAT)
