"""scikit-learn's handwritten digits: 1,797 grey images of 8×8 pixels, embedded in the package.

A fixed stratified split gives 1,437 training and 360 test images. Each image is resized bilinearly
to `img_size` and repeated over three channels, so that weights of colour models fit. The random
affine map of a training image is part of that one resampling, which keeps augmentation cheap.
"""

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from conf.schema import DigitsConfig
from data.base import ImageData

TEST_SIZE = 360


class Digits(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Digits resized to `[3, img_size, img_size]` with zero mean and unit variance.

    Args:
        images: Grey images `[count, 8, 8]`, already normalised.
        labels: One digit per image.
        img_size: Side of the result, in pixels.
        background: Normalised value of an empty pixel, used beyond the border.
        rotate: Largest rotation, degrees.
        scale: Largest relative change of size.
        translate: Largest shift, as a part of the image side.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: list[int],
        *,
        img_size: int,
        background: float,
        rotate: float = 0.0,
        scale: float = 0.0,
        translate: float = 0.0,
    ) -> None:
        self.images = images - background  # so that zero padding is background
        self.labels = labels
        self.img_size = img_size
        self.background = background
        self.rotate = math.radians(rotate)
        self.scale = scale
        self.translate = 2 * translate  # grid coordinates span 2

    def __len__(self) -> int:
        return len(self.labels)

    def _affine(self) -> torch.Tensor:
        """A random affine map `[1, 2, 3]` from output to input coordinates."""
        turn, grow, right, down = (2 * torch.rand(4) - 1).tolist()
        angle, zoom = turn * self.rotate, 1 / (1 + grow * self.scale)
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        shift_x, shift_y = right * self.translate, down * self.translate
        return torch.tensor([[[cos, -sin, shift_x], [sin, cos, shift_y]]])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        size = [1, 1, self.img_size, self.img_size]
        grid = F.affine_grid(self._affine(), size, align_corners=False)
        image = F.grid_sample(self.images[index][None, None], grid, align_corners=False)
        return (image[0] + self.background).expand(3, -1, -1), self.labels[index]


def build_digits(config: DigitsConfig) -> ImageData:
    """Load the digits and cut the split that `config.split_seed` fixes."""
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_SIZE, stratify=labels, random_state=config.split_seed
    )
    mean, std = float(train_images.mean()), float(train_images.std())

    def normalised(pixels: object) -> torch.Tensor:
        return (torch.as_tensor(pixels, dtype=torch.float32).view(-1, 8, 8) - mean) / std

    background = -mean / std
    return ImageData(
        train=Digits(
            normalised(train_images),
            train_labels.tolist(),
            img_size=config.img_size,
            background=background,
            rotate=config.rotate,
            scale=config.scale,
            translate=config.translate,
        ),
        val=Digits(
            normalised(test_images),
            test_labels.tolist(),
            img_size=config.img_size,
            background=background,
        ),
        class_names=tuple(str(digit) for digit in range(10)),
        in_chans=3,
        img_size=config.img_size,
    )
