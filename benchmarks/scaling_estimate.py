"""The arithmetic of a long ImageNet run on many GPUs: `python -m benchmarks.scaling_estimate`.

Nothing is measured here. Every figure follows from the assumptions, which are printed above the
table and can each be changed by an option; put in measured ones as soon as there are any.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, log2

# Released figures: parameters, and multiply-adds of one image at 224 pixels.
MODELS = {
    "focal_tiny": (28.88e6, 4.92e9),
    "focal_small": (51.14e6, 9.43e9),
    "focal_base": (89.82e6, 16.37e9),
}
TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000
# GPUs and images per GPU.
PLANS = ((8, 128), (64, 16), (64, 64), (512, 8), (512, 64))


@dataclass(frozen=True)
class Assumptions:
    """What the arithmetic starts from; the comment of each field is its meaning."""

    peak_tflops: float = 989.0  # dense bfloat16 of one GPU (NVIDIA H100 SXM, data sheet)
    utilisation: float = 0.05  # part of the peak that a training step reaches with large batches
    half_batch: float = 16.0  # images per GPU at which half of that is reached
    gpus_per_node: int = 8
    node_gb_s: float = 450.0  # one way between GPUs of a node, each (NVLink 4, data sheet)
    network_gb_s: float = 50.0  # one way between nodes, each GPU (InfiniBand NDR 400, data sheet)
    link_efficiency: float = 0.7  # part of these that an all-reduce reaches
    hop_us: float = 10.0  # latency of one step of an all-reduce, microseconds
    overlap: float = 0.5  # part of the all-reduce that backward hides
    gradient_bytes: int = 4  # float32 gradients, as with bf16-mixed
    image_kb: float = 110.0  # mean size of a stored training image, kilobytes
    core_images_s: float = 150.0  # that one CPU core decodes and augments
    epochs: int = 300


@dataclass(frozen=True)
class Estimate:
    """One run: times in seconds, rates per second."""

    global_batch: int
    gpu_images: float
    compute: float
    reduce_bytes: float
    reduce: float
    step: float
    steps: int
    node_images: float
    node_megabytes: float
    node_cores: float
    hours: float


def images_per_second(multiply_adds: float, batch: int, given: Assumptions) -> float:
    """Training images per second of one GPU: three times the forward operations each."""
    operations = 3 * 2 * multiply_adds
    best = given.peak_tflops * 1e12 * given.utilisation / operations
    return best * batch / (batch + given.half_batch)


def all_reduce(gradient: float, gpus: int, given: Assumptions) -> float:
    """Seconds of a ring's transfers and a tree's latency over the slowest link."""
    link = given.node_gb_s if gpus <= given.gpus_per_node else given.network_gb_s
    transfer = 2 * (gpus - 1) / gpus * gradient / (link * 1e9 * given.link_efficiency)
    return transfer + 2 * ceil(log2(gpus)) * given.hop_us * 1e-6


def estimate(model: str, gpus: int, batch: int, given: Assumptions) -> Estimate:
    """One run of `model` with `batch` images per GPU."""
    parameters, multiply_adds = MODELS[model]
    speed = images_per_second(multiply_adds, batch, given)
    gradient = parameters * given.gradient_bytes
    reduce = all_reduce(gradient, gpus, given)
    step = batch / speed + (1 - given.overlap) * reduce
    steps = TRAIN_IMAGES // (gpus * batch) * given.epochs
    # Evaluation after each epoch, forward alone: a third of the operations.
    evaluation = given.epochs * VAL_IMAGES / (3 * gpus * speed)
    node_images = batch / step * min(gpus, given.gpus_per_node)
    return Estimate(
        global_batch=gpus * batch,
        gpu_images=speed,
        compute=batch / speed,
        reduce_bytes=gradient,
        reduce=reduce,
        step=step,
        steps=steps,
        node_images=node_images,
        node_megabytes=node_images * given.image_kb / 1e3,
        node_cores=node_images / given.core_images_s,
        hours=(steps * step + evaluation) / 3600,
    )


def report(given: Assumptions, plans: Sequence[tuple[int, int]] = PLANS) -> str:
    """The assumptions and a table in Markdown."""
    lines = [f"{field.name} = {getattr(given, field.name):g}" for field in fields(given)]
    head = (
        "model | GPUs · images | global batch | images/s a GPU | compute, ms | all-reduce, MB | "
        "ms | step, ms | steps | images/s a node | MB/s a node | cores a node | hours | GPU hours"
    )
    lines += ["", f"| {head} |", "|---" * len(head.split("|")) + "|"]
    for model in MODELS:
        for gpus, batch in plans:
            row = estimate(model, gpus, batch, given)
            cells = [
                model,
                f"{gpus} · {batch}",
                f"{row.global_batch:,}",
                f"{row.gpu_images:,.0f}",
                f"{row.compute * 1e3:.1f}",
                f"{row.reduce_bytes / 1e6:.0f}",
                f"{row.reduce * 1e3:.2f}",
                f"{row.step * 1e3:.1f}",
                f"{row.steps:,}",
                f"{row.node_images:,.0f}",
                f"{row.node_megabytes:,.0f}",
                f"{row.node_cores:,.0f}",
                f"{row.hours:.1f}",
                f"{row.hours * gpus:,.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> Assumptions:
    """Assumptions from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    given = Assumptions()
    for field in fields(given):
        default = getattr(given, field.name)
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(default), default=default, help="default %(default)s")
    values = vars(parser.parse_args(arguments))
    for name, value in values.items():
        if value < 0 or (value == 0 and name not in ("half_batch", "overlap", "hop_us")):
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value:g}")
    return replace(given, **values)


if __name__ == "__main__":
    print(report(parse()))
