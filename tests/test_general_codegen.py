"""Compiled modules against eager torch: each family of operators on odd sizes, dtypes and edges of the domain."""

import numpy as np
import pytest
import torch
from guarded import run_guarded
from torch import nn
from torch.export import Dim
from torch.nn import functional as F  # noqa: N812

import specqd
from specqd.errors import CodegenError, InputError

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Apply(nn.Module):
    """A module that computes a function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.fixture
def check(tmp_path):
    """Compile a module or function for example inputs, and compare it with eager torch on them and on others."""

    def run(module, *example, others=(), dynamic=None, **tolerance):
        module = module if isinstance(module, nn.Module) else Apply(module)
        folder = tmp_path / "artifact"
        dynamic = None if dynamic is None else (dynamic,) if isinstance(module, Apply) else dynamic
        specqd.compile(module, folder, example_inputs=example, dynamic_shapes=dynamic, force=True)
        compiled = specqd.load(folder)
        for inputs in (example, *others):
            with torch.no_grad():
                wanted = module.eval()(*inputs)
            got = compiled(*inputs)
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            for a, b in zip(got if isinstance(got, tuple) else (got,), wanted, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, **(TOLERANCE | tolerance))
        return compiled

    return run


SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.5, 1e-30, -1e30, torch.inf, -torch.inf, torch.nan, 80, -100]
)


def test_elementwise_functions_on_special_values(check):
    def functions(x):
        y = x.flip(0)
        return (
            x.exp(), x.expm1(), x.log(), x.log1p(), x.tanh(), x.sigmoid(), F.relu(x), F.gelu(x.clamp(-9, 9)),
            x.sqrt(), x.rsqrt(), torch.maximum(x, y), torch.minimum(x, y), x.sign(), x.round(),
            x.clamp(-1, 2), x.clamp(torch.nan, 1), x.clamp(max=torch.nan), x.trunc(),
            x.isnan(), x.isinf(), x == y, x < y, torch.where(x > y, x, y), x.abs(), -x, x.pow(2), x.erf(),
            F.leaky_relu(x), F.elu(x), x.atan(), torch.floor_divide(x, 2.0), torch.remainder(x.clamp(-9, 9), -3.0),
        )  # fmt: skip

    check(functions, SPECIAL)


def test_integers_divide_wrap_and_shift_as_in_torch(check):
    a = torch.tensor([7, -7, 7, -7, 0, 2**31 - 1, -(2**31)], dtype=torch.int32)
    b = torch.tensor([2, 2, -2, -2, 3, 5, 7], dtype=torch.int32)

    def functions(a, b):
        return (
            a // b, a % b, torch.fmod(a, b), torch.div(a, b, rounding_mode="trunc"), a / b, a * b, a + 1, a.pow(3),
            a & b, a | b, a ^ b, ~a, a.long() * b, a.to(torch.uint8), a > 0, (a > 0) & (b > 0), a * 1.5, a.bool(),
            a.to(torch.float64) / 3,
        )  # fmt: skip

    check(functions, a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_powers_of_integers_wrap_for_any_exponent(check, dtype):
    a, b = torch.tensor([2, 3, 1, 0, 7], dtype=dtype), torch.tensor([64, 65, 200, 70, 100], dtype=dtype)
    check(lambda a, b: (a**b, torch.pow(3, b), a**70, a**2), a, b)


def test_comparisons_with_nan_are_not_turned_around(check):
    def functions(x):
        y = x.flip(0)
        return (
            x == x, x != x, ~(x < y), torch.logical_not(x <= y), (x <= y) | (y < x), (x < 0).logical_or(x >= 0),
            torch.where(~(x > y), x, y), (x < y) ^ (x >= y), (x < 0) == (y >= 0), (x < 0) != (y >= 0),
            (x < 0) < (y < 0),
        )  # fmt: skip

    check(functions, SPECIAL)


def test_rounding_is_not_simplified_away(check):
    x = torch.tensor([1.25, torch.inf, torch.nan, -3.7])
    check(lambda x: ((x + 1e8) - 1e8, x * 0.0, x - x, (x * 1e-30) * 1e-30, x / 0.0), x)


def test_what_was_divided_is_rounded(check):
    x = torch.linspace(-3, 3, 96).reshape(2, 48)
    check(
        lambda x: (torch.round(x / 0.05) + 128.0, (torch.round(x / 0.05) + 3.0).clamp(0, 9).to(torch.uint8)),
        x,
    )


def test_dtypes_meet_as_torch_says(check):
    given = (
        torch.arange(6, dtype=torch.int8).reshape(2, 3), torch.tensor(2.5, dtype=torch.float64),
        torch.tensor([[True], [False]]), torch.randn(3),
    )  # fmt: skip
    check(
        lambda a, s, m, x: (a + s, a * m, x * s, m + m, a + x, torch.where(m, a, x), x.to(torch.float16) * 2),
        *given,
    )


@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 300), (0, 4), (4, 0), (17,), ()])
def test_reductions(check, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def functions(x):
        found = [x.sum(), x.mean(), x.prod(), (x > 0).any(), (x > 0).all(), (x * 3).to(torch.int32).sum()]
        if x.numel():
            found += [x.amax(), x.argmax(), x.argmin()]
        if x.dim() and x.shape[-1]:
            found += [*x.max(-1), x.logsumexp(-1), x.softmax(0), x.cumsum(-1)]
            found += [x.std(-1, correction=0)] if x.numel() else []
            found += [x.amin(0)] if x.shape[0] else []
        if x.dim() > 1:
            found += [x.sum(0), x.mean((0, 1)), x.sum(1, keepdim=True)]
        return tuple(found)

    check(functions, x)


def test_nan_is_the_extreme_and_sorts_last(check):
    x = torch.tensor([[1.0, torch.nan, 3.0, torch.nan], [2.0, 2.0, -torch.inf, 5.0]])

    def functions(x):
        down = torch.sort(x, stable=True, descending=True)
        return x.amax(1), *x.min(1), x.argmax(1), *torch.sort(x, stable=True), *down, *x.cummax(1)

    check(functions, x)


def test_views_and_joins(check, rng):
    x = torch.randn(4, 6, 5, generator=rng)

    def functions(x):
        a, b, c = x.chunk(3, 1)
        return (
            x.transpose(0, 2)[1:, ::2, -2], x.flip(0, 2).reshape(-1), torch.cat([a, c * 2, b], 1), x.unfold(1, 3, 2),
            F.pad(x, (1, 2, -1, 0)), torch.stack([a, b], -1), x.permute(2, 0, 1).unflatten(1, (2, 2)).sum(1),
            x[:, None].expand(4, 3, 6, 5).contiguous(), x.roll(2, 1), x.diagonal(1, 1, 2), x.tril(),
            torch.zeros_like(x), torch.arange(6) * x[0, :, 0], x[:, 2:2], *x.split([1, 5], 1),
            x.repeat(1, 2, 1), x.narrow(1, 1, 2),
        )  # fmt: skip

    check(functions, x)


def test_indexing_and_scatters(check, rng):
    x, i = torch.randn(5, 7, generator=rng), torch.tensor([[0, -1, 3], [2, 2, 4]])
    j = i.clamp_min(0)

    def functions(x, i, j):
        return (
            x[i], x[:, i], x[i, j], x.gather(0, j), x.index_select(1, j[0]), F.embedding(j, x),
            x.scatter(0, j, x[:2, :3]), x.scatter_add(1, j, x[:2, :3] + 1), x.index_put((j,), x[0], accumulate=True),
            x.masked_fill(x > 0, 2.0), x.index_add(0, j[0], x[:3]), x.scatter_reduce(0, j, x[:2, :3], "amax"),
            x.scatter_reduce(1, j, x[:2, :3], "mean", include_self=False), x.masked_scatter(x > 0, x.flip(0)),
            x.scatter(1, j, 2.0, reduce="multiply"),
            torch.where(x > 0, x, 0.0).topk(3, 1).values, F.one_hot(j, 6),
        )  # fmt: skip

    check(functions, x, i, j)


def test_an_index_out_of_range_is_refused_when_it_is_met(check):
    compiled = check(lambda x, i: x[i], torch.arange(5.0), torch.tensor([0, 4, -5]))
    for wrong in (5, -6):
        with pytest.raises(InputError, match="out of range"):
            compiled(torch.arange(5.0), torch.tensor([0, wrong, 1]))
    compiled = check(lambda x, i: x.gather(0, i), torch.arange(5.0), torch.tensor([0, 4]))
    with pytest.raises(InputError, match="out of range"):
        compiled(torch.arange(5.0), torch.tensor([0, -1]))


def test_integers_are_not_divided_by_zero(check):
    compiled = check(lambda a, b: a // b, torch.tensor([7, -7]), torch.tensor([2, -1]))
    with pytest.raises(InputError, match="integers are divided by zero"):
        compiled(torch.tensor([7, -7]), torch.tensor([2, 0]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 20, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, (1, 5), padding=(0, 2), dilation=(1, 1), groups=4, bias=False),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Conv1d(6, 33, 3, dilation=2),
        nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1)),
        nn.Conv2d(5, 7, 1),
    ],
    ids=str,
)
def test_convolutions(check, rng, layer):
    sizes = (9, 11, 10)[: len(layer.kernel_size)]
    check(layer, torch.randn(2, layer.in_channels, *sizes, generator=rng))


def test_half_precision_stays_what_it_is(check, rng):
    # Of integers sums are exact, in any order.
    net = nn.Sequential(nn.Conv2d(20, 24, 3, bias=False), nn.ReLU(), nn.Conv2d(24, 16, 1)).half()
    for parameter in net.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=rng).half()
    x = torch.randint(-1, 2, (2, 20, 9, 9), generator=rng).half()
    check(net, x)
    check(net[0], x)


def test_what_follows_a_convolution_may_have_a_dtype_that_kernels_do_not(check, rng):
    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(20, 32, 3)

        def forward(self, x):
            y = self.conv(x)
            positive, wide = y > 0, y.double()
            joined = torch.cat([positive, y < -0.5], 1), torch.cat([wide, wide.neg()], 1)
            return positive, ~positive, y.long(), *joined, wide.mean((2, 3)), F.avg_pool2d(wide, 2)

    check(Mask(), torch.randn(2, 20, 9, 9, generator=rng))


def test_rows_meet_their_length_and_squeezes_of_more_than_a_row(check, rng):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 3)

        def forward(self, x, image):
            y = self.conv(x)
            return y * x.shape[2], (y + x.shape[2]).relu(), image.squeeze(2).relu(), image.squeeze(2) + image

    image = torch.randn(2, 3, 4, 5, generator=rng)
    first, *others = ((torch.randn(2, 4, length, generator=rng), image) for length in (9, 4, 30))
    check(Rows(), *first, others=others, dynamic=({2: Dim("length", min=4, max=40)}, None))


def test_pools_norms_and_resizing(check, rng):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(
                [nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True)]
            )
            self.layer = nn.LayerNorm([4, 5])

        def forward(self, x):
            return (
                F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 2, 1, 1, True, False), F.adaptive_avg_pool2d(x, 3),
                *F.max_pool2d(x, 2, return_indices=True), F.interpolate(x, scale_factor=2, mode="bilinear"),
                F.interpolate(x, size=(3, 7)), *(norm(x) for norm in self.norms), self.layer(x[..., :4, :5]),
                F.rms_norm(x, (9,)), F.log_softmax(x, 1), F.adaptive_max_pool2d(x, 1),
                F.adaptive_avg_pool3d(x, (3, 2, 4)),
            )  # fmt: skip

    check(Net(), torch.randn(2, 4, 8, 9, generator=rng))


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"bias": False, "batch_first": True}], ids=str)
def test_long_short_term_memory(check, rng, options):
    class Lstm(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.LSTM(3, 4, **options)

        def forward(self, x, hidden, cell):
            found, (last, kept) = self.layers(x, (hidden, cell))
            return found, last, kept

    states = (torch.randn(2 if "bidirectional" in options else 1, 2, 4, generator=rng) for _ in range(2))
    check(Lstm(), torch.randn(2, 3 if "batch_first" in options else 2, 3, generator=rng), *states)


def test_products(check, rng):
    def functions(a, b, v):
        return (
            a @ b,
            a[0] @ b[0],
            a @ v,
            torch.einsum("bij,bjk->bik", a, b),
            torch.baddbmm(a @ b, a, b, alpha=2, beta=0.5),
        )

    for n in (1, 5, 16, 37):
        given = (
            torch.randn(2, 7, 5, generator=rng),
            torch.randn(2, 5, n, generator=rng),
            torch.randn(5, generator=rng),
        )
        check(functions, *given)


def test_what_follows_a_product_is_done_in_its_kernel(check, rng):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(20, 24, 3, padding=1), nn.Conv2d(20, 24, 1)
            self.row, self.up, self.down = (
                nn.Conv1d(24, 24, 3, padding=1),
                nn.Linear(9, 640),
                nn.Linear(640, 9),
            )

        def forward(self, x):
            y = F.relu6(F.silu(self.a(x)) * 0.5 + self.b(x))
            z = y.flatten(2)
            z = F.relu(z + self.row(z)).unflatten(2, (6, 9))
            w = z + self.down(F.gelu(self.up(z), approximate="tanh"))
            return w, y.amax(1), F.hardswish(self.b(x)).mean((2, 3)), self.b(x).sigmoid() + 1

    check(Block(), torch.randn(2, 20, 6, 9, generator=rng))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_activation_follows_the_whole_sum(check, rng, dtype):
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "square"):
                self.register_buffer(name, torch.randn(128, 128, generator=rng).to(dtype) / 16)
            self.register_buffer("bias", torch.randn(128, generator=rng).to(dtype))

        def forward(self, given, x, residual):
            return (
                torch.addmm(given, x, self.weight).relu(), torch.addmm(residual, x, self.square, alpha=-2).relu(),
                F.linear(x, self.weight, self.bias).relu(), (x @ self.square + residual).relu(),
                torch.addmm(self.bias, x, self.square, beta=0.5) + residual,
            )  # fmt: skip

    given = [torch.randn(shape, generator=rng).to(dtype) for shape in ((128,), (32, 128), (32, 128))]
    # On some CPUs eager torch rounds a half in between, of up to 4: by half of its last place, which is 2^-9.
    check(Sums(), *given, **({"atol": 2**-10} if dtype is torch.float16 else {}))


def test_attention(check, rng):
    def functions(q, k, v, mask):
        return (
            F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, mask),
            F.scaled_dot_product_attention(q, q, q, is_causal=True), F.scaled_dot_product_attention(q, k, v, scale=0.3),
        )  # fmt: skip

    q, k, v = (torch.randn(2, 3, n, 8, generator=rng) for n in (9, 20, 20))
    check(functions, q, k, v, torch.rand(9, 20, generator=rng) > 0.3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.float64, 1e-12)])
def test_other_floats(tmp_path, rng, dtype, tolerance):
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3), nn.Softmax(-1))
        .to(dtype)
        .eval()
    )
    x = torch.randn(5, 8, generator=rng).to(dtype)
    specqd.compile(net, tmp_path / "net", example_inputs=(x,))
    torch.testing.assert_close(specqd.load(tmp_path / "net")(x), net(x), rtol=tolerance, atol=tolerance)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(
        nn.Embedding(50, 32), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(32, 5)
    )


def test_one_compilation_serves_fifty_lengths(check, rng):
    lengths = [torch.randint(0, 50, (2, n), generator=rng) for n in range(2, 52)]
    check(encoder(), lengths[8], others=[(x,) for x in lengths], dynamic=({1: Dim("length", max=64)},))


def test_sorting_any_length(check, rng):
    given = [torch.randint(0, 9, (3, length), generator=rng) for length in (5, 1, 2, 4, 33, 64, 65)]
    check(
        lambda x: tuple(x.sort(dim=-1, stable=True)),
        given[0],
        others=[(x,) for x in given[1:]],
        dynamic=({1: Dim("n", max=100)},),
    )


def test_two_dynamic_sizes_and_what_is_computed_from_them(check, rng):
    def functions(x):
        rows, columns = x.shape
        return (
            x.reshape(rows * columns),
            x.t() * rows,
            torch.cat([x, x * 2]),
            x[:1] * x + x[:, :1] - torch.full((1, 1), 2.0),
            x.mean(1, keepdim=True).expand(rows, columns).contiguous(),
            x.sum() / (rows + columns),
            x.softmax(0),
        )

    others = [(torch.randn(r, c, generator=rng),) for r, c in ((2, 3), (7, 33), (40, 2))]
    check(functions, torch.randn(5, 6, generator=rng), others=others, dynamic=({0: Dim("r"), 1: Dim("c")},))


def test_a_convolutional_network(check, rng):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.SiLU(), nn.Conv2d(16, 24, 1), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, 10), nn.Softmax(1),
    )  # fmt: skip
    check(net, torch.randn(1, 3, 33, 33, generator=rng))


def test_convolutions_of_dynamic_batches_and_lengths(check, rng):
    net = nn.Sequential(
        nn.Conv1d(4, 8, 5, 2), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv1d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    others = [(torch.randn(b, 4, t, generator=rng),) for b, t in ((1, 10), (17, 123))]
    sizes = ({0: Dim("batch", max=64), 2: Dim("time", min=10, max=400)},)
    check(net, torch.randn(3, 4, 50, generator=rng), others=others, dynamic=sizes)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x + torch.rand(3), "rand.*test_general_codegen.py.*draws random numbers"),
        (lambda x: x.bfloat16() * 2, "mul.*bfloat16 is not compiled yet"),
        (lambda x: x.bfloat16().sort()[0].float(), "sort.*bfloat16 is not compiled yet"),
        (lambda x: x.bfloat16(), "output.*bfloat16 is not compiled yet"),
        (lambda x: x.nonzero(), "nonzero.*is only known once the data is"),
        (lambda x: torch.fft.fft(x), "an output is complex; return torch.view_as_real of it"),
        (lambda x: torch.fft.fft2(x.outer(x)).inverse().real, "linalg_inv.* of complex numbers is not"),
        (lambda x: torch.fft.fft(x, n=5003).abs(), "transform of 5003 elements is not compiled: beyond 4096"),
        (lambda x: x[x > 0] if False else torch.linalg.eigvalsh(x.outer(x)), "no rule for this operator"),
    ],
)
def test_what_cannot_be_compiled_is_named_with_its_line_and_why(tmp_path, function, why):
    with pytest.raises(CodegenError, match=why):
        specqd.compile(Apply(function), tmp_path / "artifact", example_inputs=(torch.randn(3),))
    assert not (tmp_path / "artifact").exists()


def test_a_size_that_no_input_has_is_refused_as_that(tmp_path):
    even = ({2: 2 * Dim("half", min=2, max=9)},)
    with pytest.raises(CodegenError, match=r"no input has the dynamic size s\d+ itself"):
        specqd.compile(nn.ReLU(), tmp_path / "a", example_inputs=(torch.randn(1, 2, 8),), dynamic_shapes=even)


def test_arrays_in_arrays_out(check):
    compiled = check(lambda x: x.flip(0) + 1, torch.arange(12.0).reshape(3, 4))
    found = compiled(np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)))
    assert (
        isinstance(found, np.ndarray) and found.tolist() == (np.arange(12).reshape(3, 4)[::-1] + 1).tolist()
    )


def test_products_read_nothing_beyond_their_operands(tmp_path):
    # 197 rows of the second operand are no whole blocks of columns.
    q, k = torch.ones(2, 8, 64), torch.ones(2, 197, 64)
    specqd.compile(Apply(lambda q, k: q @ k.mT), tmp_path / "made", example_inputs=(q, k))
    found = run_guarded(tmp_path / "made", q, k)
    assert found.shape == (2, 8, 197) and (found == 64).all()


@pytest.mark.parametrize("channels", [32, 24])
def test_halves_of_channels_after_a_convolution(check, rng, channels):
    # Halves of 16 channels are whole blocks, in which the maximum and the pool stay; those of 12 are not.
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(8, channels, 3, padding=1), nn.Conv2d(channels // 2, 4, 1)

        def forward(self, x):
            first, second = self.first(x).chunk(2, 1)
            return self.last(F.max_pool2d(torch.maximum(first, second), 2))

    compiled = check(Halves(), torch.randn(2, 8, 12, 10, generator=rng))
    names = [call.function for call in compiled.record.kernels]
    assert sum("to_blocks" in name for name in names) == (1 if channels == 32 else 2), names


def test_pixels_are_picked_from_blocks_of_channels(check, rng):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(20, 32, 3, padding=1), nn.Conv2d(64, 20, 1)

        def forward(self, x):
            y = self.first(x)
            larger = F.interpolate(y, scale_factor=2.0)
            beside = F.interpolate(y.relu(), size=(12, 14))
            columns = torch.tensor([-1, 0, 3])
            joined = torch.cat([larger, beside], 1)
            return self.last(joined), y[:, :, columns], y[:, :, columns, columns], y[:, :, :, columns].relu()

    check(Decoder(), torch.randn(2, 20, 6, 7, generator=rng))
