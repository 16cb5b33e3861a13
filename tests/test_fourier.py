"""Fourier transforms and complex numbers in compiled modules, against torch's own."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import FNetConfig, FNetModel

import specqd
from specqd.errors import CodegenError


class Apply(nn.Module):
    """A module that computes a function of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


WINDOW = torch.blackman_window(12)


def _transforms(x):
    """Transforms of `[3, 8, 30]`, each as real numbers."""
    fft, complexes = torch.fft, torch.view_as_complex(x.unflatten(-1, (15, 2)))
    return (
        fft.rfft(x).abs(),
        fft.rfft(x, norm="ortho")[..., 1:-1].angle(),  # at the ends it hangs on the sign of a zero
        fft.fft(x).imag,
        fft.fft(x, n=40, norm="forward").real,
        fft.ifft(fft.fft(x)).real,
        torch.view_as_real(fft.ifft(complexes, norm="ortho")),
        fft.fftn(x, dim=(1, 2)).real,
        torch.view_as_real(fft.fft2(complexes)),
        fft.rfft2(x).abs(),
        fft.irfft2(fft.rfft2(x)),
        fft.irfft(fft.rfft(x) * 2j),
        fft.irfft(fft.rfft(x), n=21, norm="ortho"),
        fft.irfft(fft.rfft(x) * fft.rfft(x.flip(-1)).conj()),
        fft.hfft(fft.ihfft(x)),
        fft.fftshift(fft.fft2(x)).real,
        torch.stft(x[0], 16, 5, 12, WINDOW, return_complex=True).abs(),
        torch.view_as_real(torch.stft(x[0, 0], 16, center=False, window=None, return_complex=True)),
        torch.view_as_real(torch.stft(x[0], 16, 4, onesided=False, normalized=True, return_complex=True)),
        torch.istft(complexes.mT, 28, 5, 24, torch.hamming_window(24)),
        torch.istft(complexes[0].mT, 28, length=70, normalized=True),
        torch.istft(complexes, 8, 3, onesided=False, return_complex=True).imag,
    )


@pytest.fixture
def compiled(tmp_path):
    def compile_(module, x, dynamic=None):
        specqd.compile(module, tmp_path / "artifact", example_inputs=(x,), dynamic_shapes=dynamic)
        return specqd.load(tmp_path / "artifact")

    return compile_


@pytest.mark.filterwarnings("ignore:A window was not provided:UserWarning")
@pytest.mark.filterwarnings("ignore:The length of signal is shorter:UserWarning")
def test_transforms_are_those_of_torch(compiled, rng):
    x = torch.randn(3, 8, 30, generator=rng)
    for at, (found, wanted) in enumerate(
        zip(compiled(Apply(_transforms), x)(x), _transforms(x), strict=True)
    ):
        # The sums of some 240 products of float32.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-5, msg=lambda m, at=at: f"{at}: {m}")


@pytest.mark.parametrize("length", [128, 360, 509])
def test_long_transforms_in_two_steps_or_one(compiled, rng, length):
    def transforms(x):
        return torch.fft.rfft(x).abs(), torch.view_as_real(torch.fft.fft(torch.complex(x, x.flip(0))))

    x = torch.randn(4, length, generator=rng)
    for found, wanted in zip(compiled(Apply(transforms), x)(x), transforms(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_a_spectrogram_of_audio_of_any_length(compiled, rng):
    def spectrogram(x):
        return torch.fft.rfft(x.unfold(0, 12, 4) * WINDOW, 16).abs()

    run = compiled(Apply(spectrogram), torch.randn(100, generator=rng), ({0: Dim("time", min=20, max=9999)},))
    for length in (20, 23, 257, 3000):
        x = torch.randn(length, generator=rng)
        torch.testing.assert_close(run(x), spectrogram(x), rtol=1e-5, atol=1e-5)


def test_a_transform_along_an_open_size_is_refused(compiled, rng):
    with pytest.raises(CodegenError, match="transforms a dimension of open size; fix that size"):
        compiled(
            Apply(lambda x: torch.fft.fft(x).abs()), torch.randn(9, generator=rng), ({0: Dim("n", max=99)},)
        )


def test_fnet(compiled):
    torch.manual_seed(0)
    net = FNetModel(
        FNetConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=99)
    ).eval()
    tokens = torch.arange(24).reshape(2, 12)
    run = compiled(Apply(lambda x: net(x).last_hidden_state), tokens)
    with torch.no_grad():
        wanted = net(tokens).last_hidden_state
    torch.testing.assert_close(run(tokens), wanted, rtol=1e-5, atol=1e-5)
