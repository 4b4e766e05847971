"""What an evaluation-only run reports: figures per class and calibration, as a file and a picture.

A model is calibrated if of the images it is 80 % sure of 80 % are right. The expected calibration
error is the mean distance between confidence and accuracy over 15 bins of confidence.
"""

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torchmetrics.classification import MulticlassCalibrationError, MulticlassStatScores
from torchmetrics.utilities import dim_zero_cat

from training.metrics import ClassificationMetrics

FILE, PICTURE = "evaluation.json", "reliability.png"
BINS = 15


class EvaluationReport(ClassificationMetrics):
    """Loss, top-1, top-5, calibration and figures per class of every image seen.

    Args:
        class_names: One name per class.
        device: Where the logits are.
    """

    def __init__(self, class_names: tuple[str, ...], device: torch.device) -> None:
        count = len(class_names)
        self.class_names = class_names
        self.scores = MulticlassStatScores(count, average=None, validate_args=False).to(device)
        self.calibration = MulticlassCalibrationError(
            count, n_bins=BINS, norm="l1", validate_args=False
        ).to(device)
        super().__init__(count, device)

    def _metrics(self) -> list:
        return [*super()._metrics(), self.scores, self.calibration]

    def update(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add one batch: its mean loss, `[batch, num_classes]` logits and its `[batch]` labels."""
        super().update(loss, logits, targets)
        probabilities = logits.detach().float().softmax(dim=1)
        self.scores.update(probabilities, targets)
        self.calibration.update(probabilities, targets)

    def compute(self) -> dict[str, float]:
        """`loss`, and `top1`, `top5` and `ece` in percent; all processes must call it."""
        return {**super().compute(), "ece": 100 * float(self.calibration.compute())}

    def details(self) -> dict[str, Any]:
        """Everything, accuracies in percent; all processes must call it.

        A figure of no image, as the precision of a class never predicted, is None.
        """
        classes = []
        scores = self.scores.compute().view(len(self.class_names), 5).tolist()
        for name, (right, false, _, _, images) in zip(self.class_names, scores, strict=True):
            classes.append(
                {
                    "name": name,
                    "images": images,
                    "accuracy": _percent(right, images),
                    "precision": _percent(right, right + false),
                }
            )
        return {**self.compute(), "bins": self._bins(), "classes": classes}

    def _bins(self) -> list[dict[str, Any]]:
        """Images, mean confidence and accuracy in each bin of confidence."""
        with self.calibration.sync_context():
            confidence = dim_zero_cat(self.calibration.confidences).double().cpu()
            right = dim_zero_cat(self.calibration.accuracies).double().cpu()
        place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        counts, sums, hits = (
            torch.bincount(place, weights, BINS).tolist() for weights in (None, confidence, right)
        )
        return [
            {
                "above": number / BINS,
                "images": count,
                "confidence": _percent(total, count),
                "accuracy": _percent(hit, count),
            }
            for number, (count, total, hit) in enumerate(zip(counts, sums, hits, strict=True))
        ]

    def write(self, folder: Path, details: dict[str, Any]) -> None:
        """Write `evaluation.json` and `reliability.png`."""
        text = json.dumps(details, indent=1, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
        figure = Figure(figsize=(4.2, 4.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        bins = [entry for entry in details["bins"] if entry["images"]]
        edges = [100 * entry["above"] for entry in bins]
        bar: dict[str, Any] = {"width": 100 / BINS, "align": "edge", "edgecolor": "white"}
        above.bar(edges, [entry["accuracy"] for entry in bins], color="C0", **bar)
        above.plot([0, 100], [0, 100], color="black", linewidth=1, linestyle="--")
        above.plot(
            [entry["confidence"] for entry in bins],
            [entry["accuracy"] for entry in bins],
            "o",
            color="C1",
            markersize=4,
            clip_on=False,  # at 100 %
        )
        above.set(
            ylabel="accuracy (%)",
            xlim=(0, 100),
            ylim=(0, 100),
            title=f"calibration error {details['ece']:.2f} %, top-1 {details['top1']:.2f} %",
        )
        below.bar(edges, [entry["images"] for entry in bins], color="C7", **bar)
        below.set(xlabel="confidence (%)", ylabel="images")
        figure.savefig(folder / PICTURE, dpi=120)


def _percent(part: float, whole: float) -> float | None:
    return 100 * part / whole if whole else None
