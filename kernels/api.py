"""`focal_attention` in two forms: checks every argument, then hands over to one backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels import eager, reference
from kernels.coarse import PooledMap, Pooling
from kernels.dropout import draw_seed
from kernels.geometry import FocalGeometry
from kernels.maps import apart

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
if TRITON_INSTALLED:  # Triton has no build for macOS and Windows: the other backends run there
    from kernels import ops

__all__ = ["BACKENDS", "focal_attention", "focal_attention_qkvpacked", "resolve_backend"]

BACKENDS = ("auto", "reference", "eager", "triton")


def focal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    geometry: FocalGeometry,
    pooling: Sequence[Pooling | PooledMap] = (),
    scale: float | None = None,
    map_size: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Focal self-attention of a feature map (paper, section 3.2, equation 2).

    Every query of a window attends the keys that ``geometry`` lists, level after level:
    ``softmax(scale · query · keyᵀ + bias + mask) · value``. Keys of coarse levels are pooled from
    ``key`` and ``value`` inside the operator. A map that is no multiple of the window is taken as
    if zero-padded right and bottom; under ``boundary="wrap"`` the padding's keys (zeros) count as
    keys, under ``"mask"`` they do not. A query that is left without any key gets zeros.

    Args:
        query: `[batch, height, width, heads, head_dim]`, floating point; any strides.
        key: as ``query``.
        value: as ``query``.
        bias: `[heads, window_size², num_keys]`, keys in canonical order; the dtype of ``query``, or
            float32.
        geometry: Window, levels, boundary and shift.
        pooling: One entry per coarse level: `Pooling` (pooled on the fly) or `PooledMap` (made by
            the caller).
        scale: Factor on the scores; ``head_dim ** -0.5`` if None. The kernels are compiled for it.
        map_size: Rows and columns that hold real tokens where the caller padded the map, so that
            ``boundary="mask"`` knows the padding; ``(height, width)`` if None.
        dropout_p: Probability that an attention weight is dropped, in [0, 1).
        dropout_seed: int64 `[1]` on the same device: the dropout mask is a function of it. Drawn
            from PyTorch's generator if None.
        backend: ``"reference"`` (the oracle), ``"eager"`` (PyTorch), ``"triton"`` (GPU, or CPU
            under ``TRITON_INTERPRET=1``) or ``"auto"`` (Triton on a GPU, else eager). An explicit
            backend that cannot run is an error.

    Returns:
        `[batch, height, width, heads, head_dim]`, the dtype of ``query``.

    Raises:
        TypeError: An argument of the wrong type, or dtypes that do not go together.
        ValueError: A wrong rank, shape, device or size, or a backend that cannot run.
        NotImplementedError: Forward-mode derivatives through another backend than the reference.
    """
    _check_maps(query, key, value)
    return _attend(
        (query, key, value),
        bias,
        geometry=geometry,
        pooling=pooling,
        scale=scale,
        map_size=map_size,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        backend=backend,
    )


def focal_attention_qkvpacked(
    qkv: Tensor,
    bias: Tensor,
    *,
    geometry: FocalGeometry,
    pooling: Sequence[Pooling | PooledMap] = (),
    scale: float | None = None,
    map_size: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`focal_attention` of a projection that makes query, key and value side by side.

    Its gradient is one tensor too, where three would have to be copied together again.

    Args:
        qkv: `[batch, height, width, 3, heads, head_dim]`: query, key, value; floating point; any
            strides.
        bias: This and the rest as in `focal_attention`.
        geometry: See there.
        pooling: See there.
        scale: See there.
        map_size: See there.
        dropout_p: See there.
        dropout_seed: See there.
        backend: See there.

    Returns:
        `[batch, height, width, heads, head_dim]`, the dtype of ``qkv``.

    Raises:
        TypeError, ValueError, NotImplementedError: As `focal_attention` does.
    """
    _check_map("qkv", qkv, "[batch, height, width, 3, heads, head_dim]")
    if qkv.shape[3] != 3:
        raise ValueError(
            f"qkv must hold query, key and value along its fourth axis, got {list(qkv.shape)}"
        )
    return _attend(
        (qkv,),
        bias,
        geometry=geometry,
        pooling=pooling,
        scale=scale,
        map_size=map_size,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        backend=backend,
    )


def _attend(
    maps: Sequence[Tensor],
    bias: Tensor,
    *,
    geometry: FocalGeometry,
    pooling: Sequence[Pooling | PooledMap],
    scale: float | None,
    map_size: tuple[int, int] | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    backend: str,
) -> Tensor:
    """The rest of the checks, and the backend; ``maps`` as `kernels.maps.apart` takes them."""
    query, _, _ = apart(maps)
    if not isinstance(geometry, FocalGeometry):
        raise TypeError(f"geometry must be a FocalGeometry, got {type(geometry).__name__}")
    _check_bias(bias, query, geometry)
    pooling = tuple(pooling)
    _check_pooling(pooling, query, geometry)
    height, width = query.shape[1:3]
    map_size = _check_map_size(map_size, height, width)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if dropout_seed is not None:
        _check_seed(dropout_seed, query)
    elif dropout_p > 0.0:
        dropout_seed = draw_seed(query.device)
    name = resolve_backend(backend, query.device, query.dtype)
    if name != "reference" and not torch.compiler.is_compiling():
        _refuse_forward_mode(name, *maps, bias, *_pooling_tensors(pooling))
    run = {"reference": reference, "eager": eager}.get(name) or ops
    return run.focal_attention(
        maps,
        bias,
        geometry=geometry,
        pooling=pooling,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        map_size=map_size,
        dropout_p=float(dropout_p),
        dropout_seed=dropout_seed,
    )


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that ``backend`` stands for on ``device``.

    Args:
        backend: One of `BACKENDS`.
        device: Where the feature map lives.
        dtype: Its floating-point type.

    Returns:
        ``"reference"``, ``"eager"`` or ``"triton"``.

    Raises:
        ValueError: No such backend, or it cannot run there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend not in ("auto", "triton"):
        return backend
    obstacle = _triton_obstacle(device, dtype)
    if backend == "triton" and obstacle:
        raise ValueError(f'backend="triton" cannot run here: {obstacle}')
    if backend == "triton":
        return "triton"
    # The interpreter is for tests: "auto" never picks it on a CPU.
    return "triton" if obstacle is None and device.type == "cuda" else "eager"


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take such tensors, or None."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if ops.INTERPRETED:
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly; use float16 or float32"
        return None
    if device.type != "cuda":
        return f"it needs a GPU, or TRITON_INTERPRET=1 set before the import, got device {device}"
    if dtype == torch.float64:
        return "float64 has no tensor-core product on a GPU; use backend='eager'"
    return None


def _check_map(name: str, tensor: Tensor, layout: str) -> None:
    """A floating-point tensor of a layout, of which the batch alone may be empty."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must be {layout}, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if min(tensor.shape[1:]) < 1:
        raise ValueError(
            f"height, width, heads and head_dim must be positive, got {name} {list(tensor.shape)}"
        )


def _check_maps(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_map(name, tensor, "[batch, height, width, heads, head_dim]")
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name} must have the shape of query, got {list(tensor.shape)} "
                f"and {list(query.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name} must have the dtype of query, got {tensor.dtype} and {query.dtype}"
            )
        _check_device(name, tensor, query)


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(
            f"{name} must be on the device of query, got {tensor.device} and {query.device}"
        )


def _check_parameter(name: str, tensor: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    """A learned tensor: its shape, and the dtype of query or float32 (mixed precision)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in (query.dtype, torch.float32):
        raise TypeError(
            f"{name} must be {query.dtype} as query is, or torch.float32, got {tensor.dtype}"
        )
    _check_device(name, tensor, query)


def _check_bias(bias: Tensor, query: Tensor, geometry: FocalGeometry) -> None:
    shape = (query.shape[3], geometry.num_queries, geometry.num_keys)
    _check_parameter("bias [heads, window_size², num_keys]", bias, shape, query)


def _check_pooling(
    pooling: tuple[Pooling | PooledMap, ...], query: Tensor, geometry: FocalGeometry
) -> None:
    coarse = len(geometry.levels) - 1
    if len(pooling) != coarse:
        raise ValueError(
            f"pooling must have one entry per coarse level, got {len(pooling)} for {coarse}"
        )
    batch, height, width, heads, head_dim = query.shape
    for index, entry in enumerate(pooling):
        name = f"pooling[{index}]"
        if isinstance(entry, Pooling):
            side = geometry.levels[index + 1].subwindow_size
            _check_parameter(f"{name}.weight", entry.weight, (side, side), query)
            for part in ("key_offset", "value_offset"):
                offset = getattr(entry, part)
                if offset is not None:
                    _check_parameter(f"{name}.{part}", offset, (heads, head_dim), query)
        elif isinstance(entry, PooledMap):
            rows, cols = geometry.map_cells(index + 1, height, width)
            for part in ("key", "value"):
                tensor, shape = getattr(entry, part), (batch, rows, cols, heads, head_dim)
                _check_parameter(f"{name}.{part}", tensor, shape, query)
                if tensor.dtype != query.dtype:
                    raise TypeError(
                        f"{name}.{part} must have the dtype of query, got {tensor.dtype} "
                        f"and {query.dtype}"
                    )
        else:
            raise TypeError(f"{name} must be a Pooling or a PooledMap, got {type(entry).__name__}")


def _check_map_size(map_size: tuple[int, int] | None, height: int, width: int) -> tuple[int, int]:
    if map_size is None:
        return height, width
    if (
        not isinstance(map_size, (tuple, list, torch.Size))
        or len(map_size) != 2
        or not all(isinstance(side, (int, torch.SymInt)) for side in map_size)
    ):
        raise TypeError(f"map_size must be a pair of integers (rows, columns), got {map_size!r}")
    rows, cols = map_size
    if not (1 <= rows <= height and 1 <= cols <= width):
        raise ValueError(
            f"map_size must lie within (1, 1) and the map's ({height}, {width}), got {map_size}"
        )
    return rows, cols


def _pooling_tensors(pooling: Sequence[Pooling | PooledMap]) -> list[Tensor]:
    return [x for entry in pooling for x in vars(entry).values() if x is not None]


def _refuse_forward_mode(backend: str, *tensors: Tensor) -> None:
    """A registered operator drops tangents without a word: derivatives would come out as zero."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"backend={backend!r} has no forward-mode derivative (jvp, jacfwd, dual tensors): "
            "use backend='reference', or reverse mode"
        )


def _check_seed(seed: Tensor, query: Tensor) -> None:
    if not isinstance(seed, Tensor):
        raise TypeError(f"dropout_seed must be a tensor, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or tuple(seed.shape) != (1,):
        raise ValueError(
            f"dropout_seed must be int64 of shape [1], got {seed.dtype} {list(seed.shape)}"
        )
    _check_device("dropout_seed", seed, query)
