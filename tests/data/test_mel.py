"""Log-mel features equal those of transformers; wav files of all kinds, intact and damaged."""

import numpy as np
import pytest
import scipy.io.wavfile
from tiny_sounds import sound, write_wav

from distill_jax.data import mel
from distill_jax.errors import InputError

pytestmark = pytest.mark.smoke

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
  # log10 of float32 energies; the smallest suffer from cancellation (2e-5 observed).
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width(tmp_path, width):
  x = sound(0.3, 8000)
  got, rate = mel.read_wav(write_wav(tmp_path / "a.wav", x, 8000, width))
  assert rate == 8000 and got.dtype == np.float32
  # The tolerance is half a step, plus half a step since the largest value is one step below 1.
  np.testing.assert_allclose(got, x, atol=2.0 ** (1 - 8 * width) + 1e-7)


def extensible(raw: bytes, kind: int) -> bytes:
  """Returns a wav file with the header WAVE_FORMAT_EXTENSIBLE, and with another chunk before it."""
  name = bytes([kind]) + bytes.fromhex("00000000001000800000aa00389b71")
  bits, data = raw[34:36], raw[36:]
  header = b"\xfe\xff" + raw[22:36] + b"\x16\x00" + bits + bytes(4) + name
  chunks = b"WAVEJUNK\x03\x00\x00\x00odd\x00fmt \x28\x00\x00\x00" + header + data
  return b"RIFF" + len(chunks).to_bytes(4, "little") + chunks


@pytest.mark.parametrize("width", [2, 3])
def test_wav_with_the_extensible_header(tmp_path, width):
  file = write_wav(tmp_path / "a.wav", sound(0.1), mel.RATE, width, channels=2)
  want, raw = mel.read_wav(file)[0], file.read_bytes()
  file.write_bytes(extensible(raw, 1))
  rate, theirs = scipy.io.wavfile.read(file)
  got, our_rate = mel.read_wav(file)
  np.testing.assert_array_equal(got, want)
  assert our_rate == rate == mel.RATE
  largest = 2.0 ** (15 if width == 2 else 31)  # scipy moves 24 bits to the upper ones of 32
  np.testing.assert_allclose(got, (theirs / largest).mean(1), atol=1e-7)
  file.write_bytes(extensible(raw, 3))  # float samples
  with pytest.raises(InputError, match="is not a wav file with integer samples"):
    mel.read_wav(file)


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
  # The tolerance is the filter's ripple. The ends, where the filter reads zeros, are excluded.
  np.testing.assert_allclose(y[400:-400], want[400:-400], atol=2e-3)
  assert mel.resampled(x, mel.RATE) is x


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda raw: b"", "is not a wav file"),
    (lambda raw: b"RIFFnothing of the kind", "is not a wav file"),
    (lambda raw: raw[:-100], "is truncated: it has 950 of the 1000 samples"),
    (
      lambda raw: raw.replace(b"WAVEfmt \x10\0\0\0\x01", b"WAVEfmt \x10\0\0\0\x03"),
      "is not a wav file with integer samples",
    ),
  ],
  ids=["empty", "not a wav file", "truncated", "floats"],
)
def test_damaged_files_are_errors(tmp_path, damage, message):
  path = write_wav(tmp_path / "a.wav", np.zeros(1000, np.float32), 8000)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(InputError, match=f"a.wav {message}"):
    mel.read_wav(path)


def test_a_file_without_samples_is_an_error(tmp_path):
  with pytest.raises(InputError, match="a.wav has no samples"):
    mel.read_wav(write_wav(tmp_path / "a.wav", np.zeros(0, np.float32), 8000))
