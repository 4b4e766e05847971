"""Exact classification metrics: sums of samples, added up over processes of unequal size."""

import torch
import torch.nn.functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Mean cross entropy in float32.

    Args:
        logits: `[batch, num_classes]`.
        targets: Labels `[batch]`, or the mixed label weights `[batch, num_classes]` of mixup, which
            carry their own smoothing.
        label_smoothing: Part of the weight spread over all classes, for labels.
    """
    smoothing = label_smoothing if targets.ndim == 1 else 0.0
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


class ClassificationMetrics:
    """Mean loss, top-1 and top-5 over every sample seen, each counted once.

    Under mixup the label with the largest weight counts as the right one.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        top5 = min(5, num_classes)
        self.loss = MeanMetric(nan_strategy="disable").to(device)  # the default leaves NaN out
        self.accuracy = MetricCollection(
            {
                name: MulticlassAccuracy(
                    num_classes, top_k=top_k, average="micro", validate_args=False
                )
                for name, top_k in (("top1", 1), ("top5", top5))
            },
            compute_groups=False,
        ).to(device)
        for metric in self._metrics():
            metric.persistent(True)

    def _metrics(self) -> list:
        return [self.loss, *self.accuracy.values()]

    def update(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add one batch: its mean loss, `[batch, num_classes]` logits and its targets."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        # Once for each image instead of with a weight, which torchmetrics drops under "disable".
        self.loss.update(loss.detach().expand(len(labels)))
        self.accuracy.update(logits.detach().float(), labels)

    def compute(self) -> dict[str, float]:
        """`loss`, and `top1` and `top5` in percent, over all processes; all must call it."""
        values = {name: 100 * float(value) for name, value in self.accuracy.compute().items()}
        return {"loss": float(self.loss.compute()), **values}

    def reset(self) -> None:
        """Forget every sample."""
        for metric in self._metrics():
            metric.reset()

    def state_dict(self) -> list[dict[str, torch.Tensor]]:
        """The sums over all processes; all must call it."""
        states = []
        for metric in self._metrics():
            with metric.sync_context():
                states.append({key: value.clone() for key, value in metric.state_dict().items()})
        return states

    def load_state_dict(self, states: list[dict[str, torch.Tensor]]) -> None:
        """Restore the sums, on one process only: the others start from zero."""
        for metric, state in zip(self._metrics(), states, strict=True):
            metric.load_state_dict(state)
            metric._update_count = 1  # it would warn that it has seen nothing
