"""Learning from a teacher's predictions (Hinton, Vinyals and Dean 2015, arXiv 1503.02531)."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from conf.schema import ConfigError, DistillationConfig
from data import ImageData
from training.model import FAMILY


class Teacher(nn.Module):
    """A frozen timm model and how much its predictions count.

    Args:
        config: Settings with a teacher.
        data: Whose channels and classes the teacher must have.

    Raises:
        ConfigError: timm has no such model, or the weights do not fit it; says which.
    """

    def __init__(self, config: DistillationConfig, data: ImageData) -> None:
        super().__init__()
        assert config.teacher is not None
        options: dict[str, Any] = {}
        if config.teacher.startswith(FAMILY):
            options["img_size"] = data.img_size
        try:
            self.model = timm.create_model(
                config.teacher,
                num_classes=data.num_classes,
                in_chans=data.in_chans,
                checkpoint_path=config.weights,
                **(options | config.kwargs),
            )
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"distillation.teacher={config.teacher} cannot be built with "
                f"distillation.weights={config.weights}: {error}"
            ) from error
        self.temperature = config.temperature
        self.alpha = config.alpha
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Softened logarithmic probabilities `[batch, num_classes]` for what the model sees."""
        return F.log_softmax(self.model(images).float() / self.temperature, dim=1)

    def loss(
        self, logits: torch.Tensor, expected: torch.Tensor, label_loss: torch.Tensor
    ) -> torch.Tensor:
        """`label_loss` with the loss on the teacher's predictions mixed in.

        Args:
            logits: The model's, `[batch, num_classes]`.
            expected: What the teacher returned for the same images.
            label_loss: Mean loss of `logits` on the labels.
        """
        predicted = F.log_softmax(logits.float() / self.temperature, dim=1)
        divergence = F.kl_div(predicted, expected, reduction="batchmean", log_target=True)
        # Gradients of the softened divergence shrink with the square of the temperature.
        return (1 - self.alpha) * label_loss + self.alpha * self.temperature**2 * divergence
