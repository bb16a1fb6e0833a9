"""report.html: an evaluation as one page that opens from disk, with all its pictures inside."""

import base64
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from cifar_ignite.checkpoints import Row
from cifar_ignite.data import Images
from cifar_ignite.figures import draw_confusion_matrix, draw_history, draw_mistakes, draw_reliability
from cifar_ignite.scores import Scores, format_classes, worst_mistakes
from cifar_ignite.trained import Trained

TEMPLATE = "report.html.j2"
MISTAKES = 24
# On a ground of this luminance black and white are read alike well; contrast is then 4.6, and nowhere less.
EQUAL_CONTRAST = 0.179


def write_report(
    folder: Path,
    trained: Trained,
    scores: Scores,
    summary: Mapping[str, Any],
    images: Images,
    arguments: Sequence[str],
) -> None:
    """Write report.html into an evaluation folder and, where labels are known, the pictures of the scores.

    Args:
        folder: of the evaluation.
        trained: the network.
        scores: its predictions of `images`.
        summary: of metrics.json.
        images: what was predicted.
        arguments: of `evaluate` that reproduce it.

    Raises:
        OSError: a file cannot be written.
    """
    record, pictures = trained.record, {}
    if scores.matrix is not None and scores.bins is not None:
        mistakes = worst_mistakes(scores.details, MISTAKES)
        wrong = images.images[torch.from_numpy(mistakes.index.to_numpy().copy())]
        error = scores.summary["expected_calibration_error"]
        draw_confusion_matrix(scores.matrix, record.class_names, folder / "confusion_matrix.png")
        draw_reliability(scores.bins, error, folder / "reliability.png")
        draw_mistakes(mistakes, wrong.permute(0, 2, 3, 1).numpy(), folder / "mistakes.png")
        pictures = {
            "matrix": shade(scores.matrix, record.class_names),
            "reliability": data_uri((folder / "reliability.png").read_bytes()),
            "error": f"{error:.2%}",
            "gallery": gallery(mistakes, wrong),
        }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(TEMPLATE).render(
        experiment=trained.config.experiment,
        model=trained.config.model.name,
        parameters=f"{sum(parameter.numel() for parameter in trained.model.parameters()):,}",
        record=record,
        summary=summary,
        figures=key_figures(summary),
        curves=curves(record.history),
        classes=format_classes(scores.classes),
        pictures=pictures,
        arguments=arguments,
        config=json.dumps(record.config, indent=2),
        torch=torch.__version__,
        device=trained.device,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def key_figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Value and name of each of the figures at the top of the page."""
    figures = []
    if "accuracy" in summary:
        figures.append((f"{summary['accuracy']:.2%}", "accuracy"))
        if "tta" in summary:
            tta = summary["tta"]
            figures.append((f"{tta['accuracy']:.2%}", f"accuracy with test-time augmentation ({tta['name']})"))
        figures += [
            (f"{summary['top2_accuracy']:.2%}", "right class among the first two"),
            (f"{summary['loss']:.4f}", "cross-entropy, the negative log-likelihood"),
            (f"{summary['expected_calibration_error']:.2%}", "expected calibration error"),
        ]
    return [*figures, (f"{summary['mean_confidence']:.2%}", "mean confidence")]


def curves(history: Sequence[Row]) -> list[dict[str, str]]:
    """The run's figures by epoch, as images with a text for those who do not see them; none before the first epoch."""
    if not history:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        draw_history(history, Path(scratch))
        sources = {name: data_uri((Path(scratch) / f"{name}.png").read_bytes()) for name in ("accuracy", "loss")}
    words = []
    for name, key in (("accuracy", "acc"), ("loss", "loss")):
        told = [f"{len(history)} epochs"]
        for part, column in (("train", f"train_{key}"), ("validation", f"val_{key}")):
            values = [row[column] for row in history if row[column] is not None]  # type: ignore[literal-required]
            if values:
                told.append(f"{part} from {values[0]:.3f} to {values[-1]:.3f}")
        words.append({"source": sources[name], "alt": f"{name} by epoch: {', '.join(told)}"})
    return words


def shade(matrix: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The confusion matrix by rows: of each cell the count, its colours, and what it says in words."""
    rows = []
    for true, counts in zip(class_names, matrix.tolist(), strict=True):
        cells = []
        for predicted, count in zip(class_names, counts, strict=True):
            share = count / max(1, sum(counts))
            # White to dark blue, or to dark red off the diagonal, where a few per cent are many already.
            right = true == predicted
            depth = share if right else min(1.0, 5 * share)
            low, high = (255, 255, 255), ((8, 62, 130) if right else (160, 20, 40))
            channels = [round(a + (b - a) * depth) for a, b in zip(low, high, strict=True)]
            cells.append(
                {
                    "count": count,
                    "color": "#" + "".join(f"{channel:02x}" for channel in channels),
                    "ink": "#000" if luminance(channels) > EQUAL_CONTRAST else "#fff",
                    "tip": f"{count:,} of {sum(counts):,} images of {true} ({share:.1%}) were taken for {predicted}",
                }
            )
        rows.append((true, cells))
    return rows


def luminance(channels: Sequence[int]) -> float:
    """Relative luminance in [0, 1] of an sRGB colour, each channel in [0, 255] (WCAG 2)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in channels)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def gallery(mistakes: pd.DataFrame, pictures: Tensor) -> list[dict[str, str]]:
    """The pictures of the mistakes, each with what it was taken for and what it is."""
    return [
        {
            "source": data_uri(encode_png(picture)),
            "alt": f"image {row['ID']}, {row['true']}, taken for {row['predicted']}",
            "id": str(row["ID"]),
            "true": row["true"],
            "predicted": row["predicted"],
            "confidence": f"{row['confidence']:.1%}",
        }
        for row, picture in zip(mistakes.to_dict("records"), pictures, strict=True)
    ]


def encode_png(picture: Tensor) -> bytes:
    """A PNG of uint8 (3, H, W)."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
