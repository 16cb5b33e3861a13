"""What a kernel computes: convolutions and matrix products with what follows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal, get_args

from specqd.errors import InputError

__all__ = ["ACTIVATIONS", "PER_WORD", "RANGE", "ConvSpec", "Epilogue", "GemmSpec", "Requantise"]

#: activation functions that an epilogue can end with
ACTIVATIONS = (
    "relu", "relu6", "silu", "sigmoid", "tanh", "gelu", "gelu_tanh", "hardswish", "hardsigmoid", "mish",
)  # fmt: skip

#: elements of an input type in a word of four bytes, the unit in which kernels read inputs
PER_WORD = {"float32": 1, "int32": 1, "bfloat16": 2, "uint8": 4, "int8": 4}

#: the least and the largest value of an integer type of activations
RANGE = {"uint8": (0, 255), "int8": (-128, 127)}

Input = Literal["float32", "bfloat16", "uint8", "int8"]
Output = Literal["float32", "bfloat16", "uint8", "int8", "int32"]


@dataclass(frozen=True)
class Epilogue:
    """What happens to a sum, in this order: a bias a channel, a residual of the output's shape, an activation."""

    bias: bool = False
    residual: bool = False
    activation: str | None = None

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(f"no kernel ends with the activation {self.activation!r}; known are {known}")


@dataclass(frozen=True)
class Requantise:
    """How a real number becomes one of an integer output: `round(value / scale) + zero`, ties to even, saturated."""

    scale: float = 1.0
    zero: int = 0


@dataclass(frozen=True)
class ConvSpec:
    """A convolution, as `torch.nn.functional.conv2d` means it.

    Attributes:
        padding: top, left, bottom, right; what is added equals `zero`.
        dtype: of the input and the weight ("uint8": unsigned input, signed weight).
        out_dtype: of the output and the residual; "int32" gives the sums of an integer convolution as they are.
        planes: the input is plain NCHW, otherwise in blocks of channels; the output is always in blocks.
        zero: the integer that stands for 0 in the input.
        requantise: of an integer output.
        summand: how a residual of its type was made; None: as the output is.
        open_steps: the scales of these two, and the zero of `summand`, are an argument, so that layers share a kernel.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: Input = "float32"
    out_dtype: Output = "float32"
    epilogue: Epilogue = field(default_factory=Epilogue)
    planes: bool = False
    zero: int = 0
    requantise: Requantise = field(default_factory=Requantise)
    summand: Requantise | None = None
    open_steps: bool = False

    def __post_init__(self) -> None:
        sizes = (self.batch, self.in_channels, self.height, self.width, self.out_channels, self.groups)
        if min(*sizes, *self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise InputError(f"{self} has a size below one, or a negative padding")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise InputError(
                f"{self.in_channels} and {self.out_channels} channels cannot be split into {self.groups} groups"
            )
        if min(self.out_height, self.out_width) < 1:
            raise InputError(
                f"a kernel of {self.kernel} does not fit an image of {self.height} x {self.width} with padding "
                f"{self.padding} and dilation {self.dilation}"
            )
        _demand_kinds(self)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the input with its padding."""
        top, left, bottom, right = self.padding
        return self.height + top + bottom, self.width + left + right

    @property
    def out_height(self) -> int:
        """Height of the output."""
        return (self.padded[0] - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Width of the output."""
        return (self.padded[1] - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        taps = self.kernel[0] * self.kernel[1] * self.in_channels // self.groups
        return 2 * self.batch * self.out_channels * self.out_height * self.out_width * taps


@dataclass(frozen=True)
class GemmSpec:
    """`x [batch, m, k] @ weight.T [k, n]`, all row-major.

    Attributes:
        m: rows; None if they are known when the kernel is called.
        batch: how many products; with more than one, or with `dynamic`, the second operand is an activation too.
        dynamic: the second operand is no weight but float32 `[batch, k, n]`.
        transposed: a dynamic second operand is `[batch, n, k]`.
        zero, requantise, summand, open_steps: as for a convolution.
    """

    m: int | None
    n: int
    k: int
    batch: int = 1
    dtype: Input = "float32"
    out_dtype: Output = "float32"
    epilogue: Epilogue = field(default_factory=Epilogue)
    dynamic: bool = False
    transposed: bool = False
    zero: int = 0
    requantise: Requantise = field(default_factory=Requantise)
    summand: Requantise | None = None
    open_steps: bool = False

    def __post_init__(self) -> None:
        if min(1 if self.m is None else self.m, self.n, self.k, self.batch) < 1:
            raise InputError(f"{self} has a size below one")
        if self.k % PER_WORD[self.dtype]:
            raise InputError(f"rows of {self.k} {self.dtype} are no whole words of four bytes: pad them")
        if (self.dynamic or self.batch > 1) and not (self.dynamic and self.dtype == "float32"):
            raise InputError("products of two activations, and only these, are batched, and float32")
        _demand_kinds(self)

    @property
    def flops(self) -> int:
        """Multiplications and additions (of one row if their number is open)."""
        return 2 * self.batch * (self.m or 1) * self.n * self.k


def _demand_kinds(spec: ConvSpec | GemmSpec) -> None:
    dtype, out_dtype = spec.dtype, spec.out_dtype
    integer = dtype in RANGE
    allowed = ("int32", "float32", "uint8", "int8") if integer else ("float32", "bfloat16")
    if dtype not in get_args(Input) or out_dtype not in allowed:
        raise InputError(f"no kernel makes {out_dtype} of {dtype}: outputs are {', '.join(allowed)}")
    if out_dtype == "int32" and spec.epilogue != Epilogue():
        raise InputError("int32 outputs are sums as they are: they take no bias, residual or activation")
    low, high = RANGE.get(dtype, (0, 0))
    if not low <= spec.zero <= high:
        raise InputError(f"the {dtype} inputs have no value {spec.zero} that could stand for 0")
    for how in (spec.requantise, spec.summand or spec.requantise):
        low, high = RANGE.get(out_dtype, (how.zero, how.zero))
        if not (low <= how.zero <= high and 0 < how.scale < inf):
            raise InputError(
                f"{how} gives no {out_dtype} outputs: its scale has to be positive, and its zero one"
            )
