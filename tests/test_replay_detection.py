"""examples/replay_detection: from a WAV file to scores, and each part of the way against another way to compute it."""

import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, linalg, signal
from scipy.interpolate import CubicSpline
from scipy.io import wavfile
from sklearn.mixture import GaussianMixture
from sklearn.svm import LinearSVC
from torch import nn

import specqd
from examples.replay_detection import asvspoof, audio, metrics, replay, systems
from examples.replay_detection.cepstra import CQCC, LFCC, LPCC, Deltas
from examples.replay_detection.compiling import compile_audio
from examples.replay_detection.detector import Detector
from examples.replay_detection.ivectors import IVectors, LinearSVM, solve
from examples.replay_detection.lcnn import LCNN, LCNNGRU
from examples.replay_detection.mixtures import LikelihoodRatio, Mixture
from examples.replay_detection.plot import draw
from examples.replay_detection.prepare import RECIPES
from examples.replay_detection.spectra import FLOOR, RATE, Fourier, fit
from examples.replay_detection.speech import fetch
from examples.replay_detection.train import fit_network, scores
from specqd.errors import InputError

SAMPLES = systems.WEIGHTS.parent / "samples"


@pytest.fixture
def speech(rng):
    """Half a second of noise that is coloured like speech."""
    noise = torch.randn(RATE // 2, generator=rng).numpy()
    return torch.from_numpy(signal.lfilter([1], [1, -0.9], noise).astype(np.float32)) * 0.05


# -- networks ---------------------------------------------------------------------------------------------------------


def test_the_lcnn_has_the_published_size():
    net = LCNN()
    assert sum(p.numel() for p in net.parameters()) == 371_874
    assert net.features(torch.zeros(1, 1, 864, 400)).shape == (1, 5184)
    assert LCNNGRU().embed(torch.zeros(1, 1, 864, 400)).shape == (1, 64)


def test_training_lowers_the_loss_of_two_kinds_of_images(rng):
    seen = torch.randn(8, 1, 32, 400, generator=rng)
    seen[::2, :, :16] += 2
    labels = torch.tensor([1, 0] * 4)
    net = nn.Sequential(nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(4, 2))
    losses = list(fit_network(net, seen, labels, epochs=30, rate=0.3, seed=0, batch=4))
    assert losses[-1] < losses[0] / 2
    found = scores(net, seen)
    assert metrics.eer(found[::2], found[1::2]) == 0


# -- error rates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("genuine", "spoof", "wanted"),
    [
        ([2, 3], [0, 1], 0.0),
        ([0, 1], [2, 3], 0.5),
        ([1, 1], [1, 1], 0.5),
        ([1, 3], [0, 2], 0.25),  # the hull goes straight from half accepted to half missed
        ([1, 2, 3, 4], [0, 0, 0, 2.5], 1 / 6),
    ],
)
def test_equal_error_rates_of_cases_by_hand(genuine, spoof, wanted):
    assert metrics.eer(genuine, spoof) == pytest.approx(wanted, abs=1e-12)


def test_equal_error_rate_is_the_worst_prior_s_least_error(rng):
    draw_ = np.random.default_rng(torch.randint(1000, (), generator=rng).item())
    for _ in range(20):
        genuine, spoof = np.round(draw_.normal(1, 1, 12), 1), np.round(draw_.normal(0, 1, 17), 1)
        miss, accepted = metrics.errors(genuine, spoof)
        priors = np.linspace(0, 1, 4001)[:, None]
        worst = (priors * miss + (1 - priors) * accepted).min(1).max()
        assert metrics.eer(genuine, spoof) == pytest.approx(worst, abs=2e-4)


def test_least_detection_cost_by_hand():
    # With these, C1 = 0.9405 * (1 - 0.05) - 0.0095 * 10 * 0.05 and C2 = 10 * 0.05 * 0.5; accepting all costs C2.
    c1, c2 = 0.9405 * 0.95 - 0.00475, 0.25
    assert metrics.min_tdcf([2, 3], [0, 1]) == 0
    assert metrics.min_tdcf([0, 1], [2, 3]) == 1
    found = metrics.min_tdcf([1, 2, 3, 4], [0, 0, 0, 2.5])
    assert found == pytest.approx(min(c1 * 0.5, c2 * 0.25, c2) / min(c1, c2))
    with pytest.raises(InputError, match="errors of the detector worth while"):
        metrics.min_tdcf([1], [0], metrics.Costs(asv_miss=1.0, nontarget=0.5))


def test_intervals_hold_the_rate_and_widen_with_dependence(rng):
    genuine, spoof = (torch.randn(60, generator=rng).numpy() + shift for shift in (1.5, 0))
    alone = [str(i) for i in range(60)]
    low, high = metrics.bootstrap(genuine, spoof, (alone, [f"s{i}" for i in alone]))
    assert low < metrics.eer(genuine, spoof) < high
    grouped = [str(i // 15) for i in range(60)]
    low_4, high_4 = metrics.bootstrap(np.sort(genuine), np.sort(spoof), (grouped, grouped))
    assert high_4 - low_4 > high - low


@pytest.mark.parametrize(
    ("genuine", "why"), [([], "no genuine trials"), ([1.0, math.nan], "1 of the scores of genuine")]
)
def test_scores_that_have_no_error_rate(genuine, why):
    with pytest.raises(InputError, match=why):
        metrics.eer(genuine, [0.0])


# -- front ends -------------------------------------------------------------------------------------------------------


def test_the_spectrogram_is_scipys(speech):
    found = Fourier()(speech).numpy()
    assert found.shape == (864, 400)
    whole = np.tile(speech.numpy().astype(np.float64), 7)[: 399 * 130 + 1728]
    window = np.zeros(1728)
    window[2:1726] = signal.windows.blackman(1724)
    frames = np.lib.stride_tricks.sliding_window_view(whole, 1728)[::130]
    wanted = np.log(np.abs(fft.rfft(frames * window))[:, :864] ** 2 + FLOOR).T
    loud = wanted > wanted.max() - 12  # of what is 50 dB below, float32 rounds the phase
    np.testing.assert_allclose(found[loud], wanted[loud], rtol=0, atol=2e-3)


def test_lfcc_are_filters_and_a_cosine_transform(speech):
    frames = np.lib.stride_tricks.sliding_window_view(speech.numpy().astype(np.float64), 320)[::160]
    power = np.abs(fft.rfft(frames * signal.windows.hann(320), 512)) ** 2
    hertz, edges = np.arange(257) * RATE / 512, np.linspace(0, 8000, 22)
    bands = np.stack([np.interp(hertz, edges[i : i + 3], [0, 1, 0]) for i in range(20)], 1)
    wanted = fft.dct(np.log(power @ bands + FLOOR), norm="ortho")
    np.testing.assert_allclose(LFCC()(speech).numpy(), wanted, rtol=0, atol=1e-3)


def test_lpcc_are_the_cepstrum_of_the_predictor(speech):
    found = LPCC(order=12)(speech).numpy()
    frame = speech.numpy().astype(np.float64)[160 * 3 :][:400] * signal.windows.hamming(400)
    correlation = np.correlate(frame, frame, "full")[399 : 399 + 13]
    correlation[0] = correlation[0] * (1 + 1e-6) + FLOOR
    a = linalg.solve_toeplitz(correlation[:12], correlation[1:])
    # The cepstrum of 1 / A is that of its log spectrum, whose aliases 4096 points keep away.
    spectrum = -np.log(np.abs(fft.fft(np.concatenate([[1], -a]), 4096)))
    np.testing.assert_allclose(found[3], 2 * fft.ifft(spectrum).real[1:13], rtol=0, atol=1e-4)


def test_slopes_are_those_of_savitzky_and_golay(rng):
    x = torch.randn(30, 4, generator=rng)
    found = Deltas()(x).numpy()
    slopes = signal.savgol_filter(x.double().numpy(), 7, 1, deriv=1, axis=0, mode="nearest")
    np.testing.assert_allclose(found[:, 4:8], slopes, rtol=0, atol=1e-5)
    assert Deltas()(x[:1]).shape == (1, 12)  # one frame has slopes of zero
    assert not Deltas()(x[:1])[:, 4:].any()


@pytest.fixture(scope="module")
def cqcc():
    return CQCC()


def test_constant_q_wavelets_and_bins_are_librosas(cqcc):
    filters = pytest.importorskip(
        "librosa.filters", reason="librosa is not installed (pip install 'specqd[examples]')"
    )
    transform = cqcc.transform
    gamma = 228.7 * (2 ** (1 / 192) - 2 ** (-1 / 192))
    chosen = transform.hertz[[0, 100, 400, 800]]
    # librosa's Q is that of a bandwidth relative to the frequency, as ours.
    lengths, _ = filters.wavelet_lengths(
        freqs=chosen, sr=RATE, window="hann", gamma=gamma, alpha=np.full(4, 2 ** (1 / 192) - 2 ** (-1 / 192))
    )
    for at, length in zip((0, 100, 400, 800), lengths, strict=True):
        table = transform.get_buffer(f"octave_{at // 96}").numpy()
        used = np.count_nonzero(np.hypot(table[:, at % 96], table[:, 96 + at % 96]))
        assert abs(used - length) <= 2


def test_a_tone_shows_in_its_bin(cqcc):
    transform = cqcc.transform
    at = 500
    tone = 0.5 * torch.sin(2 * math.pi * float(transform.hertz[at]) * torch.arange(RATE // 2) / RATE)
    levels = transform(tone)
    assert levels.shape == (864, 63)
    middle = levels[:, 30]
    assert middle.argmax() == at
    assert middle[at].item() == pytest.approx(
        2 * math.log(0.25), abs=0.02
    )  # half of the amplitude is at -hertz


def test_cqcc_are_the_cosine_transform_of_an_even_scale(cqcc, speech):
    levels = cqcc.transform(speech).numpy().astype(np.float64)
    hertz = cqcc.transform.hertz
    even = np.arange(hertz[0], hertz[-1], hertz[0] / 16)
    wanted = fft.dct(CubicSpline(hertz, levels[:, 20])(even), norm="ortho")[:30]
    np.testing.assert_allclose(cqcc(speech)[20].numpy(), wanted, rtol=1e-4, atol=2e-2)


# -- back ends --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clouds(rng):
    """Two clouds `[200, 6]` of points, and which is which."""
    points = torch.randn(400, 6, generator=rng).numpy() * np.array([1, 2, 3, 1, 1, 0.5], np.float32)
    points[::2] += 1.5
    return points, np.arange(400) % 2 == 0


def test_mixtures_score_as_scikit_learn(clouds):
    points, _ = clouds
    fitted = GaussianMixture(5, covariance_type="diag", random_state=0).fit(points)
    mixture = Mixture(5, 6)
    mixture.fit(fitted)
    found = mixture(torch.from_numpy(points)).logsumexp(1).numpy()
    np.testing.assert_allclose(found, fitted.score_samples(points), rtol=1e-4, atol=1e-4)


def test_the_likelihood_ratio_tells_clouds_apart(clouds):
    points, genuine = clouds
    ratio = LikelihoodRatio(2, 6)
    ratio.fit(points[genuine], points[~genuine])
    assert ratio(torch.from_numpy(points[genuine])) > 1 and ratio(torch.from_numpy(points[~genuine])) < -1


def test_the_svm_scores_as_scikit_learn(clouds):
    points, genuine = clouds
    svm = LinearSVM(6)
    svm.fit(points, genuine)
    wanted = (
        LinearSVC(C=1.0, class_weight="balanced", random_state=0)
        .fit(points, genuine)
        .decision_function(points)
    )
    np.testing.assert_allclose(svm(torch.from_numpy(points)).numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_conjugate_gradients_solve(rng):
    root = torch.randn(30, 30, generator=rng)
    matrix, right = torch.eye(30) + root @ root.T, torch.randn(30, generator=rng)
    torch.testing.assert_close(
        solve(matrix, right, 60), torch.linalg.solve(matrix, right), rtol=1e-3, atol=1e-4
    )


def test_ivectors_are_the_posterior_mean(rng):
    model = IVectors(4, 6, 5)
    means = torch.randn(4, 6, generator=rng)
    utterances = [
        (means[torch.randint(4, (80,), generator=rng)] + 0.3 * torch.randn(80, 6, generator=rng)).numpy()
        for _ in range(12)
    ]
    model.fit(utterances, iterations=2, every=1)
    x = model.standard(torch.from_numpy(utterances[0])).double()
    share = model.background(x.float()).softmax(1).double()
    # By the formula for one utterance (Dehak et al., equation 5), component by component.
    precision, right = torch.eye(5).double(), torch.zeros(5).double()
    for c in range(4):
        t = model.loadings[c].double() * model.deviations[c].double()[:, None]
        variance = model.deviations[c].double().square()
        precision += share[:, c].sum() * t.T @ (t / variance[:, None])
        right += t.T @ ((share[:, c, None] * (x - model.means[c].double())).sum(0) / variance)
    wanted = torch.linalg.solve(precision, right) - model.centre.double()
    found = model(torch.from_numpy(utterances[0]))
    torch.testing.assert_close(found.double(), wanted / wanted.norm(), rtol=1e-3, atol=1e-3)


def test_scikit_learns_models_go_through_onnx(tmp_path, clouds):
    skl2onnx = pytest.importorskip(
        "skl2onnx", reason="skl2onnx is not installed (pip install 'specqd[examples]')"
    )
    points, genuine = clouds
    mixture = GaussianMixture(5, covariance_type="diag", random_state=0).fit(points)
    svm = LinearSVC(random_state=0).fit(points, genuine)
    for model, options, at, wanted in (
        (mixture, {"score_samples": True}, 2, mixture.score_samples(points)[:, None]),
        (svm, {"raw_scores": True}, 1, svm.decision_function(points)[:, None] * [-1, 1]),
    ):
        opsets = {"": 18, "ai.onnx.ml": 3}
        made = skl2onnx.to_onnx(model, points[:1], options={id(model): options}, target_opset=opsets)
        (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
        specqd.compile(specqd.capture(tmp_path / "model.onnx"), tmp_path / "artifact", force=True)
        found = specqd.load(tmp_path / "artifact")(points)[at]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


# -- data -------------------------------------------------------------------------------------------------------------


def _corpus(root, lines, part="dev"):
    listed, folder = asvspoof.protocol(root, part)
    listed.parent.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    listed.write_text("\n".join(lines) + "\n")
    for line in lines:
        wavfile.write(folder / line.split()[0], RATE, np.zeros(100, np.int16))


def test_the_corpus_layout_is_read(tmp_path):
    lines = ["D_1000001.wav genuine M0011 S05 - - -", "D_1000711.wav spoof M0013 S02 E17 P10 R11"]
    _corpus(tmp_path, lines)
    first, second = asvspoof.read_trials(tmp_path, "dev")
    assert first.genuine and first.path.name == "D_1000001.wav" and first.speaker == "M0011"
    assert not second.genuine and (second.environment, second.playback, second.recording) == (
        "E17",
        "P10",
        "R11",
    )
    assert [str(first), str(second)] == lines


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["D_1.wav real M1 S1 - - -"], r"line 1: 'D_1.wav real M1 S1 - - -' is not FILE genuine\|spoof"),
        (["D_1.wav genuine M1"], "line 1.*is not FILE"),
        ([" "], "lists no trials"),
    ],
)
def test_damaged_protocols_are_named(tmp_path, lines, why):
    if lines == [" "]:
        _corpus(tmp_path, ["D_1.wav genuine"])
        asvspoof.protocol(tmp_path, "dev")[0].write_text(" \n")
    else:
        _corpus(tmp_path, lines)
    with pytest.raises(InputError, match=why):
        asvspoof.read_trials(tmp_path, "dev")


def test_missing_protocols_and_recordings_are_named(tmp_path):
    with pytest.raises(InputError, match=r"eval\.trl\.txt does not exist"):
        asvspoof.read_trials(tmp_path, "eval")
    _corpus(tmp_path, ["D_1.wav genuine"])
    (asvspoof.protocol(tmp_path, "dev")[1] / "D_1.wav").unlink()
    with pytest.raises(InputError, match="line 1: there is no recording"):
        asvspoof.read_trials(tmp_path, "dev")


def test_parts_share_no_voice_and_no_seed():
    voices = [voice for recipe in RECIPES.values() for voice in recipe.voices]
    assert len(set(voices)) == len(voices)
    assert len({recipe.seed for recipe in RECIPES.values()}) == 3


def test_a_replay_passes_a_loudspeaker_and_a_second_room(speech):
    rng = np.random.default_rng(0)
    click = np.zeros((1, 6400), np.float32)
    click[0, 0] = 1
    echo = click + 0.5 * np.roll(click, 800)
    world = replay.World.draw(rng, [{"near": click, "far": echo}], 3)
    made = replay.genuine(np.random.default_rng(1), world, speech.numpy())
    assert np.array_equal(made, replay.genuine(np.random.default_rng(1), world, speech.numpy()))
    assert made.shape == speech.shape and 0.09 < np.abs(made).max() < 0.91
    assert np.array_equal(made, np.round(made * 32768) / 32768)
    small = replay.Loudspeaker(signal.butter(2, 500, "highpass", fs=RATE, output="sos"), 0.0, 0.0)
    low, high = (np.sin(2 * np.pi * f * np.arange(RATE) / RATE) for f in (100, 2000))
    assert np.abs(small.play(low)[8000:]).max() < 0.05 < 0.9 < np.abs(small.play(high)[8000:]).max()
    bent = replay.Loudspeaker(signal.butter(2, 20, "highpass", fs=RATE, output="sos"), 0.2, 0.0).play(high)
    harmonics = np.abs(fft.rfft(bent[8000:])) / 4000
    assert harmonics[2000] == pytest.approx(0.1, abs=0.01)  # 0.2 sin^2 has half of it at twice the frequency


# -- audio ------------------------------------------------------------------------------------------------------------


def _tone(rate=RATE, seconds=0.5):
    return np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate) * 0.5


def test_audio_of_all_kinds_becomes_mono_at_16_khz(tmp_path):
    path = tmp_path / "a.wav"
    for rate, data, notices in (
        (RATE, (_tone() * 32767).astype(np.int16), ()),
        (RATE, (_tone() * 127 + 128).astype(np.uint8), ()),
        (RATE, _tone().astype(np.float32), ()),
        (RATE, np.stack([_tone(), _tone()], 1).astype(np.float32), ("2 channels were mixed into one",)),
        (44_100, _tone(44_100).astype(np.float32), ("resampled from 44100 Hz to 16000 Hz",)),
    ):
        wavfile.write(path, rate, data)
        found = audio.read(path)
        assert found.notices == notices
        assert found.samples.dtype == np.float32 and found.samples.shape == (8000,)
        np.testing.assert_allclose(found.samples[200:-200], _tone()[200:-200], atol=0.02)  # 8 bits


def test_clipping_and_telephone_audio_are_noticed(tmp_path):
    wavfile.write(tmp_path / "a.wav", 8000, np.clip(_tone(8000) * 4, -1, 1).astype(np.float32))
    clipped, resampled, band = audio.read(tmp_path / "a.wav").notices
    assert clipped.startswith("clipped: 6") and resampled.startswith("resampled from 8000")
    assert band == "nothing above 4000 Hz was recorded, where replays show best"


def _riff(body):
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body


_FORMAT = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"ID3 no wave at all, some other file", "is not a WAV file that can be read"),
        (_riff(b"fmt "), "is not a WAV file that can be read"),
        (
            _riff(_FORMAT.replace(struct.pack("<H", 16), struct.pack("<H", 13))),
            "is not a WAV file that can be read",
        ),
        (_riff(_FORMAT + b"data" + struct.pack("<I", 0)), "has a header and no samples"),
        (_riff(_FORMAT + b"data" + struct.pack("<Ih", 2, 77)), "holds 1 sample .* need 0.25 s at least"),
        (_riff(_FORMAT + b"data" + struct.pack("<I", 20_000) + bytes(20_000)), "is silent"),
        (np.array([0.1, np.nan] * 4000, np.float32), "4000 samples are NaN or infinite"),
        (np.array([0.1, 3e4] * 4000, np.float32), r"floats reach 3e\+04, and full scale is 1"),
    ],
)
def test_audio_that_cannot_be_scored_is_refused_in_a_sentence(tmp_path, content, why):
    path = tmp_path / "bad.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        wavfile.write(path, RATE, content)
    with pytest.raises(InputError, match=why):
        audio.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.wav does not exist"):
        audio.read(tmp_path / "none.wav")


def test_a_plot_is_brightest_where_it_is_loudest(tmp_path):
    levels = np.full((864, 400), -20.0)
    levels[430:434] = 0.0  # 4 kHz
    draw(levels, 3.25, "a tone", tmp_path / "tone.png")
    picture = np.asarray(Image.open(tmp_path / "tone.png").convert("L")).astype(int)
    assert picture.shape == (480, 858)
    assert abs(int(picture[30:450, 400].argmax()) + 30 - (26 + 216)) <= 2


# -- the whole way ----------------------------------------------------------------------------------------------------


def test_raw_audio_to_score_is_one_artifact(tmp_path):
    every = systems.load()
    detector = Detector(every.fourier, every.lcnn).eval()
    run = compile_audio(detector, tmp_path / "lcnn")
    found = {}
    for name in ("genuine", "replayed"):
        samples = audio.read(SAMPLES / f"{name}.wav").samples
        found[name] = float(run(samples))
        assert found[name] == pytest.approx(float(detector(torch.from_numpy(samples))), abs=1e-3)
    assert found["replayed"] < 0 < found["genuine"]
    short = audio.read(SAMPLES / "genuine.wav").samples[:5000]
    assert float(run(short)) == pytest.approx(
        float(run(fit(torch.from_numpy(short), 60_000).numpy())), abs=1e-4
    )


@pytest.mark.extended
def test_the_command_scores_by_all_systems(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from examples.replay_detection.__main__ import app

    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path))
    files = [str(SAMPLES / f"{name}.wav") for name in ("genuine", "replayed")]
    result = CliRunner().invoke(app, ["score", *files, "--plot", str(tmp_path)])
    assert result.exit_code == 0
    fused = [line for line in result.stdout.splitlines() if "fused" in line]
    assert "genuine" in fused[0] and "replayed" in fused[1]
    assert (tmp_path / "genuine.png").is_file()


def test_packages_that_cannot_be_fetched_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # which has no apt-get
    with pytest.raises(InputError, match="asterisk-core-sounds-en-g722 cannot be fetched"):
        fetch(tmp_path / "packages")
    assert not list((tmp_path / "packages").glob("*"))
