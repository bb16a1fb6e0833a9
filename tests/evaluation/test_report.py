"""The report page of an evaluation."""

import glob
import html.parser
import json
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.evaluate import evaluate
from cifar_ignite.evaluation.metrics import most_confident_errors
from cifar_ignite.evaluation.report import (
    confusion_cells,
    most_frequent_confusions,
    relative_luminance,
    training_curves,
)
from tests.evaluation.helpers import only_evaluation, write_unlabeled_test_file
from tests.helpers import epoch_metrics, write_cifar10, write_cifar100
from tests.helpers.runs import set_options


class Page(html.parser.HTMLParser):
    """All tags of a page with their attributes, all text, and the elements that are still open at the end."""

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


@pytest.fixture(scope="module")
def evaluation_dir(train_once, tmp_path_factory):
    """Directory of an evaluation with drawn figures, which tests only read."""
    directory = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(train_once(), directory / "outputs")
    write_cifar10(directory / "data")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(directory)
        evaluate(tta="flip")
    return only_evaluation(directory)


def test_report_shows_metrics_images_and_confusion_matrix(evaluation_dir):
    text = (evaluation_dir / "report.html").read_text()
    page, summary = Page(text), json.loads((evaluation_dir / "metrics.json").read_text())
    assert page.open == []
    words = " ".join(" ".join(page.words).split())
    for expected in (
        f"{summary['accuracy']:.2%}", f"{summary['tta']['accuracy']:.2%}", f"{summary['loss']:.4f}", summary["run"],
        f"evaluate --model tiny --set output_dir=reproduced_{summary['run']} --tta flip",
        "hybrid_resnet", '"label_smoothing": 0.1',
        f"{summary['uncalibrated']['expected_calibration_error']:.2%}", f"temperature {summary['temperature']:.3f}",
        f"at least 70% are {summary['sure']['fraction']:.1%} of the images",
    ):  # fmt: skip
        assert expected in words
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    num_errors = len(most_confident_errors(pd.read_csv(evaluation_dir / "details.csv"), 24))
    assert len(images) == 2 + 2 + num_errors  # training curves, reliability diagram, coverage, errors
    for image in images:
        assert image["src"].startswith("data:image/png;base64,")
        assert len(image["alt"]) > 10
    details = pd.read_csv(evaluation_dir / "details.csv")
    expected = pd.crosstab(details["true"], details["predicted"]).reindex(CIFAR10_CLASSES, columns=CIFAR10_CLASSES)
    cells = re.findall(r"<td tabindex=\"0\"[^>]*>(\d+)<", text)
    assert [int(cell) for cell in cells] == expected.fillna(0).astype(int).to_numpy().flatten().tolist()


def test_report_refers_to_nothing_outside_the_page(evaluation_dir):
    text = (evaluation_dir / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|<script[^>]+src|<link", text)


def test_figures_of_evaluation_are_not_empty(evaluation_dir):
    """An empty figure is white except for its title."""
    for name, min_fraction in (
        ("mistakes", 0.2),
        ("reliability", 0.05),
        ("coverage", 0.02),
        ("confusion_matrix", 0.05),
    ):
        pixels = np.asarray(Image.open(evaluation_dir / f"{name}.png").convert("L"))
        assert (pixels < 250).mean() > min_fraction, name


@pytest.mark.usefixtures("blank_figures", "trained_run")
def test_commands_of_report_reproduce_evaluation(command, tmp_path):
    """Of the best model, of a full checkpoint, and on a test file: each through the API, in another directory."""
    (tmp_path / "outputs").rename(tmp_path / "my runs")
    (full,) = (tmp_path / "my runs" / "training_runs").glob("*/checkpoints/epoch_*.pt")
    test_file, overrides = (
        write_unlabeled_test_file(tmp_path / "a 'test'.pkl"),
        ["output_dir=my runs", "precision=fp32"],
    )
    evaluations = [
        evaluate(overrides=overrides, tta="flip"),
        evaluate(full, overrides=[*overrides, "unsure_below=0.9"]),
        evaluate(test_file=test_file, overrides=overrides),
    ]
    pages = [Page((evaluation.directory / "report.html").read_text()) for evaluation in evaluations]
    (tmp_path / "config.json").write_text(next(word for word in pages[0].words if word.startswith("{\n")))
    commands = [next(word for word in page.words if word.startswith("python -m")).splitlines() for page in pages]
    assert len({train for train, _ in commands}) == 1
    for line in (commands[0][0], *(line for _, line in commands)):
        words = [found for word in shlex.split(line)[3:] for found in glob.glob(word) or [word]]
        assert command(*words)[0] == 0
    (reproduced,) = tmp_path.glob("reproduced_*")
    repeated = sorted((reproduced / "evaluations").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for evaluation, directory in zip(evaluations, repeated, strict=True):
        for name in ("details.csv", "predictions.csv"):
            assert (directory / name).read_bytes() == (evaluation.directory / name).read_bytes()
        settings = [json.loads((path / "metrics.json").read_text()) for path in (evaluation.directory, directory)]
        for metrics in settings:
            del metrics["run"], metrics["environment"]["command"]
        assert settings[0] == settings[1]


@pytest.mark.usefixtures("blank_figures", "trained_run")
def test_report_of_latest_checkpoint_has_no_command_to_evaluate_it(tmp_path):
    """A run deletes its latest checkpoints, and when they were saved depends on interruptions."""
    latest = next((tmp_path / "outputs" / "training_runs").glob("*/checkpoints/latest_*.pt"))
    page = Page((evaluate(latest, overrides=[f"output_dir={tmp_path}"]).directory / "report.html").read_text())
    train, comment = next(word for word in page.words if word.startswith("python -m")).splitlines()
    assert " train " in train
    assert comment.startswith("# ")
    assert latest.name in comment


@pytest.mark.usefixtures("blank_figures", "trained_run")
def test_report_escapes_user_strings(command, tmp_path):
    test_file = write_unlabeled_test_file(tmp_path / "<b>&amp;.pkl")
    command("evaluate", "--test-file", test_file)
    page = Page((only_evaluation(tmp_path) / "report.html").read_text())
    assert page.open == []
    assert "<b>&amp;.pkl" in " ".join(page.words)


def test_confusion_cells_have_readable_text():
    """The contrast between text and cell is at least 4.5 (WCAG 2, level AA) for every count."""

    def channels(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        return [int(digits[start : start + 2], 16) for start in (0, 2, 4)]

    assert relative_luminance(channels("#fff")) == pytest.approx(1)
    assert relative_luminance(channels("#777777")) == pytest.approx(0.1845, abs=1e-4)  # contrast 4.48 on white
    for count in range(101):
        ((_, cells), _) = confusion_cells(np.array([[count, 100 - count], [0, 1]]), ["a", "b"])
        for cell in cells:
            dark, light = sorted(relative_luminance(channels(cell[name])) for name in ("text_color", "color"))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, cell


@pytest.mark.usefixtures("blank_figures")
def test_report_of_many_classes_shows_errors_and_most_frequent_confusions(command, tmp_path):
    """100 classes: no text for zeros, a scrolling table, and a list of the largest cells."""
    root = write_cifar100(tmp_path / "data", train=400, test=200)
    options = {"data.dataset": "cifar100", "data.root": root, "data.batch_size": 64, "model.width": 2}
    tree = tmp_path / "hundred.json"
    tree.write_text(json.dumps({"experiment": "hundred", "train": {"epochs": 1}}))
    assert command("train", "--config", tree, *set_options(options))[0] == 0
    assert command("evaluate")[0] == 0
    directory = only_evaluation(tmp_path)
    text = (directory / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    details = pd.read_csv(directory / "details.csv")
    counts = pd.crosstab(details["true"], details["predicted"]).to_numpy()
    cells = [int(count) for count in re.findall(r"<td style[^>]*title[^>]*>(\d+)<", text)]
    assert sorted(cells) == sorted(counts[counts > 0].tolist())
    assert "Most frequent confusions" in text
    assert any(attributes.get("class") == "scroll long" for _, attributes in page.tags)
    assert len(text) < 2_000_000


def test_most_frequent_confusions_are_the_largest_cells_off_the_diagonal():
    matrix = np.array([[90, 7, 3], [0, 10, 0], [20, 0, 30]])
    assert most_frequent_confusions(matrix, ["a", "b", "c"]) == [
        ("c", "a", "20", "40.0%"), ("a", "b", "7", "7.0%"), ("a", "c", "3", "3.0%")
    ]  # fmt: skip
    assert most_frequent_confusions(np.eye(3, dtype=int), ["a", "b", "c"]) == []


def test_training_curves_have_alternative_text(tmp_path):
    accuracy, loss = training_curves([epoch_metrics(1, None), epoch_metrics(2, None)], tmp_path)
    assert accuracy["alt"] == "accuracy by epoch: 2 epochs, train from 0.500 to 0.500"
    assert loss["alt"] == "loss by epoch: 2 epochs, train from 1.000 to 1.000"
    validated = training_curves([epoch_metrics(1, 0.3), epoch_metrics(2, 0.4)], tmp_path)[0]
    assert "validation from 0.300 to 0.400" in validated["alt"]
    assert training_curves([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []
