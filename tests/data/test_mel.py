"""Log-mel frames against transformers' feature extractor; wav files whole and damaged."""

import numpy as np
import pytest
from tiny_sounds import sound, write_wav

from distill_jax.data import mel
from distill_jax.errors import InputError

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("seconds, frames, bins", [(1.3, 300, 80), (4.0, 300, 80), (2.0, 200, 128)])
def test_frames_are_those_of_transformers(seconds, frames, bins):
  x = sound(seconds)
  extractor = transformers.WhisperFeatureExtractor(
    feature_size=bins, chunk_length=frames // 100, n_fft=mel.WINDOW, hop_length=mel.HOP
  )
  want = extractor(x, sampling_rate=mel.RATE, return_tensors="np").input_features[0].T
  got = mel.log_mel(x, frames, bins)
  assert got.shape == want.shape == (frames, bins)
  # log10 of float32 energies, whose least are sums that cancel: 2e-5 seen.
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width(tmp_path, width):
  x = sound(0.3, 8000)
  got, rate = mel.read_wav(write_wav(tmp_path / "a.wav", x, 8000, width))
  assert rate == 8000 and got.dtype == np.float32
  # Half a step, and that the largest value is one step short of 1.
  np.testing.assert_allclose(got, x, atol=2.0 ** (1 - 8 * width) + 1e-7)


def test_channels_are_averaged(tmp_path):
  x = sound(0.2)
  both = np.stack([x, np.zeros_like(x)], 1).reshape(-1)
  got, _ = mel.read_wav(write_wav(tmp_path / "a.wav", both, mel.RATE, channels=2))
  np.testing.assert_allclose(got, x / 2, atol=1e-4)


def test_resampling_keeps_a_tone():
  t = np.arange(8000) / 8000
  x = np.sin(2 * np.pi * 440 * t).astype(np.float32)
  y = mel.resampled(x, 8000)
  want = np.sin(2 * np.pi * 440 * np.arange(16_000) / mel.RATE)
  assert len(y) == 16_000
  # Away from the ends, where the filter reads zeros: its ripple.
  np.testing.assert_allclose(y[400:-400], want[400:-400], atol=2e-3)
  assert mel.resampled(x, mel.RATE) is x


@pytest.mark.parametrize(
  "spoil, says",
  [
    (lambda raw: b"", "is no wav file"),
    (lambda raw: b"RIFFnothing of the kind", "is no wav file"),
    (lambda raw: raw[:-100], "holds 950 of the 1000 samples"),
    (lambda raw: raw.replace(b"WAVEfmt \x10\0\0\0\x01", b"WAVEfmt \x10\0\0\0\x03"), "no wav file"),
  ],
  ids=["empty", "no wav", "cut short", "floats"],
)
def test_damaged_files_are_named(tmp_path, spoil, says):
  path = write_wav(tmp_path / "a.wav", np.zeros(1000, np.float32), 8000)
  path.write_bytes(spoil(path.read_bytes()))
  with pytest.raises(InputError, match=f"a.wav.*{says}|a.wav {says}"):
    mel.read_wav(path)


def test_a_file_without_a_sound_is_named(tmp_path):
  with pytest.raises(InputError, match="holds 0 of the 0 samples"):
    mel.read_wav(write_wav(tmp_path / "a.wav", np.zeros(0, np.float32), 8000))
