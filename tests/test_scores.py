"""Figures of predictions, against the same figures computed here in the plainest way; the page they are shown on."""

import html.parser
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import row
from PIL import Image
from test_commands import unlabelled

from cifar_ignite import scores
from cifar_ignite.config import parse_config
from cifar_ignite.data import CIFAR10_CLASSES, Images
from cifar_ignite.engines import create_forward
from cifar_ignite.evaluate import run_evaluator
from cifar_ignite.report import curves, luminance, shade
from cifar_ignite.scores import calibrate, expected_calibration_error, score, worst_mistakes


class Recites(torch.nn.Module):
    """Gives the same logits whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.done = logits, 0

    def forward(self, images):
        self.done += len(images)
        return self.logits[self.done - len(images) : self.done]


@pytest.fixture
def judged():
    """Labels, probabilities, and their scores as an evaluation computes them, in batches."""
    rng = np.random.default_rng(3)
    labels = torch.from_numpy(rng.permutation(np.arange(200) % 10))
    logits = torch.from_numpy(rng.normal(0, 2, (200, 10))).float()
    logits[torch.arange(200), labels] += 2
    logits[:, 7] = -20  # horse is never predicted
    images = Images(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), labels, list(range(1000, 1200)), CIFAR10_CLASSES)
    model, config, device = Recites(logits), parse_config({"data": {"batch_size": 64}}, "test"), torch.device("cpu")
    forward = create_forward(model, device, torch.float32)
    probabilities, metrics = run_evaluator(model, forward, images, config, device)
    assert torch.allclose(probabilities, logits.softmax(1))
    return labels.numpy(), probabilities, score(images, probabilities, metrics, CIFAR10_CLASSES)


def test_single_figures(judged):
    labels, probabilities, found = judged
    values, predicted = probabilities.numpy().astype(float), probabilities.argmax(1).numpy()
    summary = found.summary
    assert summary["images"] == 200
    assert summary["accuracy"] == pytest.approx((predicted == labels).mean())
    top2 = [label in np.argsort(row)[-2:] for label, row in zip(labels, values, strict=True)]
    assert summary["top2_accuracy"] == pytest.approx(np.mean(top2))
    likelihood = -np.log(values[np.arange(200), labels]).mean()
    assert summary["loss"] == summary["negative_log_likelihood"] == pytest.approx(likelihood, rel=1e-5)
    assert summary["mean_confidence"] == pytest.approx(values.max(1).mean(), rel=1e-6)
    for number, name in enumerate(CIFAR10_CLASSES):
        right, of, called = ((labels == number) & (predicted == number)).sum(), labels == number, predicted == number
        assert summary["classes"][name] == {
            "images": of.sum(),
            "precision": pytest.approx(right / max(1, called.sum())),
            "recall": pytest.approx(right / of.sum()),
            "f1": pytest.approx(2 * right / (of.sum() + called.sum())),
        }
    assert json.loads(json.dumps(summary)) == summary
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (labels, predicted), 1)
    assert np.array_equal(found.matrix, matrix)


def test_calibration(judged):
    """Guo et al., equation 3, image by image."""
    labels, probabilities, found = judged
    confidence, predicted = (tensor.numpy() for tensor in probabilities.max(1))
    expected = 0.0
    for number in range(scores.BINS):
        low, high = number / scores.BINS, (number + 1) / scores.BINS
        inside = (confidence > low) & (confidence <= high)
        assert found.bins["images"][number] == inside.sum()
        if inside.any():
            accuracy = (predicted == labels)[inside].mean()
            assert found.bins["accuracy"][number] == pytest.approx(accuracy)
            expected += inside.mean() * abs(accuracy - confidence[inside].mean())
    assert found.summary["expected_calibration_error"] == pytest.approx(expected, rel=1e-5)


def test_calibration_at_the_ends():
    sure = pd.DataFrame({"true": ["cat", "dog"], "predicted": ["cat", "cat"], "confidence": [1.0, 1.0]})
    bins = calibrate(sure)
    assert bins["images"].tolist() == [0] * 14 + [2]
    assert expected_calibration_error(bins) == 0.5
    assert expected_calibration_error(calibrate(sure.assign(predicted=sure["true"]))) == 0


def test_details_and_mistakes(judged):
    labels, probabilities, found = judged
    details = found.details
    assert details.columns.tolist() == ["ID", "true", "predicted", "confidence", *CIFAR10_CLASSES]
    assert details["ID"].tolist() == list(range(1000, 1200))
    assert np.array_equal(details[list(CIFAR10_CLASSES)].to_numpy(), probabilities.numpy())
    mistakes = worst_mistakes(details, 5)
    confidence, predicted = (tensor.numpy() for tensor in probabilities.max(1))
    wrong = np.flatnonzero(predicted != labels)
    assert mistakes.index.tolist() == wrong[np.argsort(-confidence[wrong], kind="stable")][:5].tolist()
    assert len(worst_mistakes(details, 999)) == len(wrong)


def test_without_labels_nothing_is_said_of_what_is_right(judged):
    _, probabilities, with_labels = judged
    images = Images(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), None, list(range(200)), CIFAR10_CLASSES)
    found = score(images, probabilities, {}, CIFAR10_CLASSES)
    assert found.summary.keys() == {"images", "mean_confidence"}
    assert found.bins is found.matrix is None
    assert found.classes["predicted"].tolist() == with_labels.classes["predicted"].tolist()
    assert math.isnan(found.classes.loc["horse", "confidence"])


# --- The page -----------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """All tags with their attributes, and whether each that was opened was closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_of_an_evaluation(command, tiny_file, tmp_path):
    command("train", "--config", tiny_file, "--set", "train.epochs=3")
    assert command("evaluate", "--tta", "flip")[0] == 0
    (folder,) = (tmp_path / "outputs" / "evaluations").iterdir()
    text = (folder / "report.html").read_text()
    page, summary = Page(text), json.loads((folder / "metrics.json").read_text())
    assert page.open == []
    words = " ".join(" ".join(page.words).split())
    for expected in (
        f"{summary['accuracy']:.2%}", f"{summary['tta']['accuracy']:.2%}", f"{summary['loss']:.4f}", summary["run"],
        "hybrid_resnet", "evaluate --model tiny --tta flip", '"label_smoothing": 0.1',
    ):  # fmt: skip
        assert expected in words
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    wrong = len(worst_mistakes(pd.read_csv(folder / "details.csv"), 24))
    assert len(pictures) == 2 + 1 + wrong  # training curves, calibration, mistakes
    for picture in pictures:
        assert picture["src"].startswith("data:image/png;base64,")
        assert len(picture["alt"]) > 10
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|<script|<link", text)  # nothing from elsewhere
    details = pd.read_csv(folder / "details.csv")
    expected = pd.crosstab(details["true"], details["predicted"]).reindex(CIFAR10_CLASSES, columns=CIFAR10_CLASSES)
    cells = re.findall(r"<td tabindex=\"0\"[^>]*>(\d+)<", text)
    assert [int(cell) for cell in cells] == expected.fillna(0).astype(int).to_numpy().flatten().tolist()
    for name, least in (("mistakes", 0.2), ("reliability", 0.05), ("confusion_matrix", 0.05)):
        picture = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        assert (picture < 250).mean() > least, name  # an empty figure is white but for its title


def test_what_people_named_is_only_text_on_the_page(command, tiny_file, tmp_path):
    command("train", "--config", tiny_file)
    test_file = unlabelled(tmp_path / "<b>&amp;.pkl")
    command("evaluate", "--test-file", test_file)
    (folder,) = (tmp_path / "outputs" / "evaluations").iterdir()
    page = Page((folder / "report.html").read_text())
    assert page.open == []
    assert "<b>&amp;.pkl" in " ".join(page.words)


def test_cells_can_be_read_on_their_colour():
    """Contrast of at least 4.5 between count and cell (WCAG 2, level AA), whatever the count."""

    def channels(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        return [int(digits[at : at + 2], 16) for at in (0, 2, 4)]

    assert luminance(channels("#fff")) == pytest.approx(1)
    assert luminance(channels("#777777")) == pytest.approx(0.1845, abs=1e-4)  # 4.48 on white, the textbook case
    for share in range(101):
        ((_, cells), _) = shade(np.array([[share, 100 - share], [0, 1]]), ["a", "b"])
        for cell in cells:
            low, high = sorted(luminance(channels(cell[name])) for name in ("ink", "color"))
            assert (high + 0.05) / (low + 0.05) >= 4.5, cell


def test_curves_say_in_words_what_they_show():
    accuracy, loss = curves([row(1, None), row(2, None)])
    assert accuracy["alt"] == "accuracy by epoch: 2 epochs, train from 0.500 to 0.500"
    assert loss["alt"] == "loss by epoch: 2 epochs, train from 1.000 to 1.000"
    assert "validation from 0.300 to 0.400" in curves([row(1, 0.3), row(2, 0.4)])[0]["alt"]
    assert curves([]) == []
