"""The released code's outputs and gradients, from its parameters; see tests/golden/README.md."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from models import FocalTransformer
from models.checkpoint import convert_official

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
WITH_GRADIENTS = ["global_112", "local_112", "padded_96x160", "small_112", "window_only_112"]


def official_parameter(name: str, shape: list[int]) -> torch.Tensor:
    """A parameter by the rule of tests/golden/README.md."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x: np.ndarray = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
        x = 1 + 0.1 * x
    elif "relative_position_bias" in name:
        x = 0.5 * x
    elif name.endswith("bias"):
        x = 0.1 * x
    elif "pool_layers" in name:
        x = (1 + 0.3 * x) / np.float64(math.prod(shape[1:]))
    else:
        x = x / np.sqrt(math.prod(shape[1:]) if len(shape) > 1 else shape[0])
    # Arithmetic in float32 but for the divisions; every parameter is rounded to float32.
    return torch.from_numpy(x.astype(np.float32)).double()


class Golden:
    """One case: the model, the released parameters and what the released code makes of them."""

    def __init__(self, case: str, backend: str, batch: int | None = None) -> None:
        with np.load(GOLDEN / f"{case}.npz") as file:
            self.arrays = {
                name: torch.from_numpy(file[name]) for name in file.files if name != "meta"
            }
            meta = json.loads(str(file["meta"]))
        config, seed = meta["config"], meta["seed"]
        size = config["img_size"]
        self.height, self.width = size if isinstance(size, list) else (size, size)
        self.model = FocalTransformer(
            img_size=(self.height, self.width),
            num_classes=config["num_classes"],
            embed_dim=config["embed_dim"],
            depths=config["depths"],
            num_heads=config["num_heads"],
            window_size=config["window_size"],
            focal_levels=config["focal_levels"],
            expand_size=config["expand_sizes"],
            region_sizes=config["focal_windows"],
            shift=config["use_shift"],
            drop_path_rate=config["drop_path_rate"],
            attention_backend=backend,
        ).double()
        self.official = {
            name: official_parameter(name, shape) for name, shape in meta["params"].items()
        }
        rng = np.random.default_rng(seed)
        images = rng.standard_normal((meta["batch"], 3, self.height, self.width), dtype=np.float32)
        self.images = torch.from_numpy(images).double()
        logits = self.arrays["logits"]
        self.loss_weight = torch.from_numpy(
            np.random.default_rng(seed + 1).standard_normal(tuple(logits.shape))
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits, and each stage's output after the downsampling that follows it."""
        self.model.load_state_dict(convert_official(self.official, self.model))
        stages: dict[str, torch.Tensor] = {}
        modules = [*(stage.downsample for stage in self.model.stages[1:]), self.model.layers[-1]]
        for index, module in enumerate(modules):
            module.register_forward_hook(
                lambda _, __, out, name=f"stage{index + 1}": stages.update({name: out})
            )
        with torch.no_grad():
            return self.model(images), stages


def check(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Agreement at the accuracy that the expected value is stored with."""
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        got,
        expected.double().reshape(got.shape),
        atol=tolerance * expected.abs().max().item(),
        rtol=tolerance,
        msg=lambda text: f"{name}: {text}",
    )


def check_forward(golden: Golden, batch: int | None = None) -> None:
    """Logits and stages of the first ``batch`` images, of all if None."""
    logits, stages = golden.forward(golden.images[:batch])
    check("logits", logits, golden.arrays["logits"][:batch])
    for name, stage in stages.items():
        check(name, stage, golden.arrays[name][:batch])


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_converted_official_model_gives_the_released_outputs(case, backend):
    check_forward(Golden(case, backend))


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="float64 goes through Triton's interpreter alone, which is on where there is no GPU",
)
def test_triton_path_gives_the_released_outputs_of_a_padded_non_square_image():
    check_forward(Golden("padded_96x160", "triton"), batch=1)


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *((case, "eager") for case in WITH_GRADIENTS),
        ("small_112", "reference"),
        ("padded_96x160", "reference"),
    ],
)
def test_gradients_reach_the_released_parameters_unchanged(case, backend):
    # Through the conversion, which is differentiable, so the doubled ring entries are compared too.
    golden = Golden(case, backend)
    leaves = {name: x.requires_grad_() for name, x in golden.official.items()}
    converted = convert_official(leaves, golden.model)
    logits = torch.func.functional_call(golden.model, converted, (golden.images,))
    (logits * golden.loss_weight).sum().backward()
    compared = 0
    for key, expected in golden.arrays.items():
        kind, _, name = key.partition("/")
        if kind in ("grad", "gradnorm"):
            grad = leaves[name].grad
            grad = torch.zeros_like(leaves[name]) if grad is None else grad
            got = grad if kind == "grad" else grad.norm()
            check(key, got, expected)
            compared += 1
    assert compared > 80
