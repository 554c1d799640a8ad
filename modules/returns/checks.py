"""What every function of this package checks before it computes: shapes, dtypes and devices, not what tensors hold."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

LOG_MAX = {torch.float64: 700.0, torch.float32: 88.0, torch.bfloat16: 88.0, torch.float16: 11.0}


def check(floats: dict[str, Tensor], masks: dict[str, Tensor | None]) -> None:
    """Compare all arguments with the first of ``floats``, ``[T, *B]``; of the masks ``"valid"`` alone may be None.

    Raises:
        TypeError: on something that is no tensor, a dtype that is not a float's (or not bool), or differs.
        ValueError: on a shape or a device that differs, by the argument's name.
    """
    anchor, like = next(iter(floats.items()))
    _tensor(anchor, like)
    shape, dtype, device = like.shape, like.dtype, like.device
    if not shape or not shape[0]:
        raise ValueError(f"{anchor} must be [T, *B] with T at least 1, got {list(shape)}")
    for name, tensor in floats.items():
        check_float(name, tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of {anchor}, {dtype}, got {tensor.dtype}")
        _same(name, tensor, anchor, shape, device)
    for name, mask in masks.items():
        if mask is None:
            if name == "valid":
                continue
            raise TypeError(f"{name} must be a tensor, got NoneType")
        _tensor(name, mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {mask.dtype}")
        _same(name, mask, anchor, shape, device)


def check_float(name: str, tensor: Tensor) -> None:
    """Of any shape.

    Raises:
        TypeError: on something that is no tensor, or none of floats.
    """
    _tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_mask(valid: Tensor | None, anchor: str, like: Tensor) -> None:
    """Whether ``valid`` is None or a mask for ``like``.

    Raises:
        TypeError, ValueError: if not.
    """
    if valid is None:
        return
    _tensor("valid", valid)
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be a bool tensor, got {valid.dtype}")
    _same("valid", valid, anchor, like.shape, like.device)


def check_numbers(**numbers: Any) -> None:
    """Refuse what is no number, NaN included.

    Raises:
        TypeError, ValueError: by the argument's name.
    """
    for name, number in numbers.items():
        if type(number) is not float and not isinstance(number, Real):  # the second takes longer than all the rest
            raise TypeError(f"{name} must be a number, got {type(number).__name__}")
        if number != number:
            raise ValueError(f"{name} must be a number, got nan")


def discount(gamma: float | Tensor, like: Tensor) -> tuple[float | None, Tensor | None]:
    """A number, or a tensor of the shape of ``like``; the other of the two is None.

    Raises:
        TypeError: when it is neither.
        ValueError: when a tensor does not broadcast to that shape, or is elsewhere.
    """
    if not isinstance(gamma, Tensor):
        check_numbers(gamma=gamma)
        return float(gamma), None
    if not gamma.ndim:
        gamma = gamma.to(like.device)
    if gamma.device != like.device:
        raise ValueError(f"gamma must be on {like.device}, got {gamma.device}")
    try:
        return None, gamma.to(computing_dtype(like)).expand(like.shape)
    except RuntimeError:
        raise ValueError(f"gamma must broadcast to {list(like.shape)}, got {list(gamma.shape)}") from None


def computing_dtype(x: Tensor) -> torch.dtype:
    """float32 for half precision, else the tensor's own."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as ``dtype``, saturated at its largest finite number where that is smaller than what was computed in."""
    if x.dtype == dtype or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def ratio(log_rho: Tensor) -> Tensor:
    """exp(log_rho), saturated at a finite number: inf times the 0 of an ended episode would be NaN."""
    return log_rho.clamp(max=LOG_MAX[log_rho.dtype]).exp()


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _same(name: str, tensor: Tensor, anchor: str, shape: torch.Size, device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape of {anchor}, {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {anchor}, {device}, got {tensor.device}")
