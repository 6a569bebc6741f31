"""predict.py: videos and cameras in, videos of labels and overlays out."""

import dataclasses
import os
import re
import resource
import signal
import struct
import weakref

import cv2
import numpy as np
import pytest

import nonlocal_jax
from nonlocal_jax.cli import predict
from nonlocal_jax.cli.prediction_files import is_prediction
from nonlocal_jax.cli.prediction_videos import video_file
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.pictures import frame_overlay
from nonlocal_jax.inference import stream
from nonlocal_jax.runtime.files import unfinished_patterns
from tests.test_predictor import image_of

SCALE = ['--scale', 96, 72]
LEGEND = np.s_[:72, :60]  # the part of an overlay that it may cover


def write_video(path, *, count=11, rate=29.97, size=(96, 120), codec='mp4v'):
  """Pans over a picture; frames are compressed with losses."""
  picture = image_of((size[0], size[1] + 10 * count))
  width_and_height = size[::-1]
  writer = cv2.VideoWriter(
    str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), rate, width_and_height
  )
  for index in range(count):
    writer.write(np.ascontiguousarray(picture[:, 10 * index : 10 * index + size[1], ::-1]))
  writer.release()
  return path


def frames_of(path):
  """The RGB frames of a video, its frame rate and the number of frames that it promises."""
  capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
  rate, count = (capture.get(x) for x in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
  frames = []
  while (found := capture.read())[0]:
    frames.append(found[1][..., ::-1])
  capture.release()
  return np.array(frames), rate, count


def labels_of(path):
  """The label maps of a video, whose three channels must be equal."""
  frames, _, _ = frames_of(path)
  assert (frames == frames[..., :1]).all()
  return frames[..., 0]


@pytest.fixture
def clip(tmp_path):
  return write_video(tmp_path / 'clip.mp4')


@pytest.fixture(scope='module')
def model(peer_checkpoint):
  """The network as the command tests it."""
  found = nonlocal_jax.load(peer_checkpoint)
  return found.with_protocol(dataclasses.replace(found.protocol, scale=(96, 72)))


@pytest.fixture
def predicted(script, peer_checkpoint, tmp_path):
  """Runs the command, whose results go to the folder 'out'."""

  def run(*arguments):
    options = [f'--checkpoint={peer_checkpoint}', f'--out={tmp_path / "out"}', *SCALE]
    return script(predict, *arguments, *options)

  return run


@pytest.mark.parametrize('at_once', [1, 3])
def test_labels_are_those_of_the_frames_as_images(
  at_once, clip, model, predicted, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(stream, 'images_at_once', lambda *_: at_once)
  assert predicted(clip) == (None, '')
  frames, rate, _ = frames_of(clip)
  assert len(frames) == 11
  labels, overlays = tmp_path / 'out/clip_labels.mkv', tmp_path / 'out/clip_overlay.mp4'
  expected = np.array([model.predict(np.ascontiguousarray(frame)) for frame in frames])
  found = labels_of(labels)
  if at_once == 1:
    np.testing.assert_array_equal(found, expected)
  assert np.mean(found == expected) > 0.9999  # up to ties at rounding
  assert len(np.unique(expected)) > 2
  pictures, rate_of_pictures, count = frames_of(overlays)
  assert (rate, rate_of_pictures, count) == pytest.approx((29.97, 29.97, 11), abs=1e-3)
  assert pictures.shape == frames.shape
  mixed = (frames.astype(float) + np.array(model.palette)[expected]) / 2
  difference = np.abs(pictures - mixed)
  difference[:, *LEGEND] = 0
  assert difference.mean() < 12  # it is compressed
  assert np.mean(pictures[:, :6, :6] > 230) > 0.9  # the legend's margin
  printed = capsys.readouterr()
  assert re.fullmatch(
    rf'Predicted 11 frames of {clip} in \d+\.\d s \(.* per second\), to {labels} and '
    rf'{overlays}\.\n',
    printed.out,
  )
  assert printed.err.count('The results have no sound.') == 1
  assert 'unevenly' not in printed.err


def test_sides_are_even_and_unknown_pixels_255(model, predicted, tmp_path, capsys):
  """OpenCV cannot write videos with odd sides, but reads them from a row of pictures."""
  frames = [image_of((67, 91), seed) for seed in range(3)]
  stream = b''.join(cv2.imencode('.jpg', frame)[1].tobytes() for frame in frames)
  (tmp_path / 'clip.mjpeg').write_bytes(stream)
  asked = ['--unknown-below=0.6', '--no-overlays', '--frame-rate=5', '--frames=2']
  assert predicted(tmp_path / 'clip.mjpeg', *asked) == (None, '')
  printed = capsys.readouterr()
  assert 'has 91x67 pixels, and OpenCV writes even sides only: the results have' in printed.err
  assert [path.name for path in (tmp_path / 'out').iterdir()] == ['clip_labels.mkv']
  found = labels_of(tmp_path / 'out/clip_labels.mkv')
  assert frames_of(tmp_path / 'out/clip_labels.mkv')[1] == 5
  assert found.shape == (2, 68, 92)
  assert (found[:, 67:] == 255).all()
  assert (found[:, :, 91:] == 255).all()
  unknown = []
  for frame, label in zip(frames_of(tmp_path / 'clip.mjpeg')[0], found, strict=False):
    labels, likely = model.predict(np.ascontiguousarray(frame), return_confidence=True)
    assert np.mean(label[:67, :91] == np.where(likely < 0.6, 255, labels)) > 0.999
    unknown.append(label[:67, :91] == 255)
  assert 0 < np.mean(unknown) < 1
  assert f'{np.mean(unknown):.2%} of their pixels are unknown (label 255)' in printed.out


def boxes_around(data, name):
  """Places of the boxes of an MP4 file that hold its first box `name`, the outermost first."""
  start, end, found = 0, len(data), []
  for kind in (b'moov', b'trak', b'mdia', b'minf', b'stbl', name):
    while data[start + 4 : start + 8] != kind:
      start += struct.unpack_from('>I', data, start)[0]
      assert start < end
    found.append(start)
    start += 8
  return found


def test_uneven_frames_are_all_there_and_said(clip, predicted, capsys):
  data = bytearray(clip.read_bytes())
  *outer, place = boxes_around(data, b'stts')
  size, _, _, entries, count, step = struct.unpack_from('>6I', data, place)
  assert (entries, count) == (1, 11)
  uneven = struct.pack('>I4sII4I', size + 8, b'stts', 0, 2, 5, step, 6, 4 * step)
  data[place : place + size] = uneven
  for start in outer:
    struct.pack_into('>I', data, start, struct.unpack_from('>I', data, start)[0] + 8)
  struct.pack_into('>I', data, data.index(b'elst') + 12, 10_000)  # ms, rather than the old duration
  clip.write_bytes(data)
  rate = frames_of(clip)[1]
  assert predicted(clip) == (None, '')
  printed = capsys.readouterr()
  seconds = (5 + 5 * 4) / 29.97  # to the last of eleven
  assert '11 frames of' in printed.out
  assert (
    f'are unevenly spaced in time. All of them are in the results, evenly at {rate:g} per second: '
    f'{10 / rate:.2f} s in place of {seconds:.2f} s; --frame-rate={10 / seconds:.3f} gives them'
  ) in printed.err


def test_a_missing_frame_rate_is_said(predicted, tmp_path, capsys):
  clip = write_video(tmp_path / 'clip.avi', rate=30, codec='MJPG')
  data = bytearray(clip.read_bytes())
  place = data.index(b'strh') + 8 + 20
  assert struct.unpack_from('<2I', data, place) == (1, 30)
  struct.pack_into('<2I', data, place, 1, 90_000)
  clip.write_bytes(data)
  assert predicted(clip, '--no-overlays') == (None, '')
  assert f'File {clip} tells no frame rate: 25 frames per second' in capsys.readouterr().err
  assert frames_of(tmp_path / 'out/clip_labels.mkv')[1] == 25


def test_frames_of_telephones_are_turned(clip, model, predicted, tmp_path):
  upright = frames_of(clip)[0]
  data = bytearray(clip.read_bytes())
  place = data.index(b'tkhd') + 4 + 40
  assert struct.unpack_from('>9i', data, place) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
  struct.pack_into('>9i', data, place, 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
  clip.write_bytes(data)
  assert predicted(clip, '--no-overlays', '--frames=2') == (None, '')
  for found, frame in zip(labels_of(tmp_path / 'out/clip_labels.mkv'), upright, strict=False):
    turned = np.ascontiguousarray(np.rot90(frame, -1))
    np.testing.assert_array_equal(found, model.predict(turned))


def test_a_video_that_is_cut_off_says_where(predicted, tmp_path, capsys):
  clip = write_video(tmp_path / 'clip.avi', codec='MJPG')
  data = clip.read_bytes()
  clip.write_bytes(data[: len(data) // 2])
  (tmp_path / 'none.mp4').write_bytes(b'no video')
  (tmp_path / 'empty.mov').touch()
  good = write_video(tmp_path / 'good.mkv', count=2)
  status, said = predicted(tmp_path)
  (count,) = map(int, re.findall(r'ends after frame (\d+) of 11', said))
  assert 0 < count < 11
  assert (status, said.splitlines()) == (
    1,
    [
      'error: 3 videos failed:',
      f'  File {clip} ends after frame {count} of 11, and so do the results: it is cut off or '
      'broken, or an edit list leaves frames out.',
      f'  File {tmp_path}/empty.mov is no video that OpenCV reads, or broken.',
      f'  File {tmp_path}/none.mp4 is no video that OpenCV reads, or broken.',
    ],
  )
  assert len(labels_of(tmp_path / 'out/clip_labels.mkv')) == count
  assert len(frames_of(tmp_path / 'out/good_overlay.mp4')[0]) == 2
  assert f'Predicted 2 frames of {good} in' in capsys.readouterr().out
  status, said = predicted(good, '--max-pixels=100')
  assert f'File {good} has 11,520 pixels, more than 100: shrink it, or set --max-pixels' in said
  assert not [path for path in (tmp_path / 'out').iterdir() if path.name.startswith('.')]


@pytest.mark.parametrize(
  ('asked', 'sentence'),
  [
    (['{clip}', '--submission'], '--submission is for images, and {clip} is a video: leave'),
    (['{clip}', '--probabilities'], '--probabilities is for images, and {clip} is a video'),
    (['{clip}', '--confidence'], '--confidence is for images, and {clip} is a video'),
    (['--camera=0', '--confidence'], '--confidence is for images, and the camera 0 is a video'),
    (['{clip}', '--camera=0'], '--camera takes the place of INPUTs, and there is {clip}: leave'),
    (['--camera=-1'], '--camera is -1; the first camera has the index 0.'),
    (['--camera=93'], 'Camera 93 cannot be opened: see that it is connected'),
    (['{clip}', '--frames=0'], '--frames is 0; it must be at least 1.'),
    (['{clip}', '--frame-rate=nan'], '--frame-rate is nan; it must be from 0.1 to 1000.'),
    (['{image}', '--frames=2'], '--frames is for videos, and all INPUTs are images'),
    (['{image}', '--frame-rate=2'], '--frame-rate is for videos, and all INPUTs are images'),
  ],
)
def test_options_that_cannot_be(asked, sentence, clip, predicted, tmp_path):
  image = tmp_path / 'image.png'
  cv2.imwrite(str(image), image_of((60, 80)))
  places = {'clip': clip, 'image': image}
  status, said = predicted(*(part.format(**places) for part in asked))
  assert status == 1
  assert said.startswith(f'error: {sentence.format(**places)}')
  assert not [path for path in (tmp_path / 'out').glob('**/*') if path.is_file()]


def test_without_inputs_there_is_a_sentence(predicted):
  status, said = predicted()
  assert (status, said.startswith('error: there is no INPUT: give images, videos')) == (2, True)


def test_results_replace_nothing_else(clip, predicted, tmp_path, capsys):
  assert predicted(clip, '--frames=2') == (None, '')
  overlay, labels = tmp_path / 'out/clip_overlay.mp4', tmp_path / 'out/clip_labels.mkv'
  assert is_prediction(overlay)
  assert is_prediction(labels)
  assert not is_prediction(clip)
  capsys.readouterr()
  assert predicted(tmp_path, '--frames=2', '--no-overlays') == (None, '')
  assert 'Left out: 2 results of earlier predictions.' in capsys.readouterr().err
  assert [path.name for path in (tmp_path / 'out').iterdir()] == ['clip_labels.mkv']
  overlay.write_bytes(clip.read_bytes())
  status, said = predicted(clip)
  assert status == 1
  assert said == (
    f'error: {overlay} exists and is no earlier prediction: give another --out, or remove it.'
  )
  assert overlay.read_bytes() == clip.read_bytes()


class Camera:
  """Stands for a camera: gives the frames of a video file, then `at_end`."""

  def __init__(self, path, at_end):
    self.capture, self.at_end = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), at_end

  def isOpened(self):
    return True

  def get(self, which):
    is_told = which in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
    return self.capture.get(which) if is_told else -1.0

  def read(self):
    found = self.capture.read()
    return found if found[0] else self.at_end()

  def release(self):
    self.capture.release()


@pytest.fixture
def interruptible():
  """Lets SIGINT through, which is ignored in background jobs."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('interruptible')
def test_a_camera_is_recorded_until_a_signal(clip, predicted, tmp_path, monkeypatch, capfd):
  def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    return True, image_of((96, 120))

  capture_of_files = cv2.VideoCapture

  def chosen(at_end):
    def capture(source, *rest):
      return Camera(clip, at_end) if source == 0 else capture_of_files(source, *rest)

    return capture

  monkeypatch.setattr(cv2, 'VideoCapture', chosen(interrupt))
  assert predicted('--camera=0') == (None, '')
  said = capfd.readouterr()
  assert 'SIGINT: finishing the videos; once more to leave at once' in said.err
  frames, rate, count = frames_of(tmp_path / 'out/camera0_overlay.mp4')
  assert 11 >= len(frames) == count >= 8  # read ahead when the signal came, up to three are left
  assert rate == pytest.approx(29.97, abs=1e-3)
  assert len(labels_of(tmp_path / 'out/camera0_labels.mkv')) == count
  status, message = predicted('--camera=0')
  assert (status, 'camera0_labels.mkv exists; remove it or choose another name' in message) == (
    1,
    True,
  )
  for path in (tmp_path / 'out').iterdir():
    path.unlink()
  assert predicted('--camera=0', '--frames=4') == (None, '')
  assert len(frames_of(tmp_path / 'out/camera0_overlay.mp4')[0]) == 4
  for path in (tmp_path / 'out').iterdir():
    path.unlink()
  monkeypatch.setattr(cv2, 'VideoCapture', chosen(lambda: (False, None)))
  status, message = predicted('--camera=0')
  assert message == 'error: Camera 0 gave no picture after frame 11: the results end.'
  assert len(frames_of(tmp_path / 'out/camera0_overlay.mp4')[0]) == 11


def test_few_frames_are_in_memory(model):
  alive, most = 0, 0

  def forget():
    nonlocal alive
    alive -= 1

  def frames():
    nonlocal alive, most
    for index in range(120):
      frame = np.full((24, 32, 3), index, np.uint8)
      weakref.finalize(frame, forget)
      alive += 1
      most = max(most, alive)
      yield frame

  assert [index for index, *_ in model.predict_frames(frames())] == list(range(120))
  assert most < 40


def test_legends_of_frames_fit_into_them():
  image = np.full((96, 160, 3), 200, np.uint8)
  label = np.repeat(np.arange(8, dtype=np.uint8), 12)[:, None].repeat(160, axis=1)
  label[:, 100:], label[90:, 150:] = 6, 255
  palette = [(10 * index, 0, 0) for index in range(8)]
  classes = [f'class {index}' for index in range(8)]
  picture = frame_overlay(image, label, classes=classes, palette=palette)
  assert picture.shape == image.shape
  mixed = (image + np.array([*palette, *[(0, 0, 0)] * 248])[label]) / 2
  np.testing.assert_allclose(picture[:, 80:], mixed[:, 80:], atol=1)
  np.testing.assert_allclose(picture[90:], mixed[90:], atol=1)
  # Three of the nine have room: the most frequent ones, in the order of the classes.
  swatches = [picture[y, 10].tolist() for y in (18, 42, 66)]
  assert swatches == [[0, 0, 0], [10, 0, 0], [60, 0, 0]]
  assert frame_overlay(image[:20], label[:20], classes=classes, palette=palette).shape[0] == 20


def test_frames_of_another_size_are_refused(model):
  frames = [image_of((60, 80)), image_of((60, 84))]
  with pytest.raises(ValueError, match=r'frame 1 has the size \(60, 84\), expected \(60, 80\)'):
    list(model.predict_frames(frames))


def test_videos_are_whole_or_absent_when_there_is_no_room(tmp_path, rng):

  def write_noise(path, shape):
    with video_file(path, (96, 120), 25) as write:
      (pattern,) = unfinished_patterns()
      assert pattern.endswith(f'.partial{path.suffix}')
      for _ in range(20):
        write(rng.integers(0, 256, shape, np.uint8))

  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  for ending, shape in [('.mp4', (96, 120, 3)), ('.mkv', (96, 120))]:
    path = tmp_path / f'a{ending}'
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
      with pytest.raises(UserError, match=f'a{ending} cannot be written'):
        write_noise(path, shape)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    write_noise(path, shape)
    assert len(frames_of(path)[0]) == 20
    path.unlink()
