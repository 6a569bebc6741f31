"""Chooses a few padded shapes for images of many sizes: each shape is compiled once."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

import numpy as np

from nonlocal_jax.inference.views import views_of
from nonlocal_jax.protocol import EvalProtocol, Size
from nonlocal_jax.runtime.parallel import Platform

_MOST_CANDIDATES = 256
# Cost of a pixel of the label map relative to one that goes through the network.
_RESULT_COST = 0.02
_MOST_WITH_ROOM = 4
# Pixels through the network that take as long as compiling the programs of a shape.
_PIXELS_OF_COMPILATION: Mapping[Platform, float] = {'cpu': 2**20, 'gpu': 2**28, 'tpu': 2**28}


@dataclasses.dataclass(frozen=True)
class ViewShape:
  """Padded shape of one view of an image.

  Attributes:
    network: (height, width) of the network's input.
    windows: Number of windows (vertically, horizontally).
  """

  network: Size
  windows: Size


@dataclasses.dataclass(frozen=True)
class PaddedShape:
  """Padded shape of an image: everything that a compiled program depends on.

  Attributes:
    result: (height, width) of the label map.
    views: One for each ratio of the protocol.
    padded: Whether the network's inputs may be larger than an image needs, and are masked.
  """

  result: Size
  views: tuple[ViewShape, ...]
  padded: bool = True

  @classmethod
  def from_image(cls, size: Size, protocol: EvalProtocol) -> Self:
    """The shape that an image of (height, width) `size` needs, without padding."""
    views = views_of(protocol, size)
    return cls(
      size,
      tuple(ViewShape(view.network, (len(view.tops), len(view.lefts))) for view in views),
      padded=False,
    )

  def rounded_up(self, multiple: int) -> 'PaddedShape':
    """The shape with sides rounded up to multiples, which images of similar size share."""

    def up(size: Size) -> Size:
      return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple

    views = tuple(dataclasses.replace(view, network=up(view.network)) for view in self.views)
    return PaddedShape(up(self.result), views)

  def with_room(self, *, networks: bool) -> 'PaddedShape':
    """The shape with sides rounded up by at most an eighth, or 63 pixels.

    Images of similar size share it. Those that need no padding of the network's inputs have a
    faster program without masks.

    Args:
      networks: Whether to round the network's inputs up as well; windows are all of one size.
    """
    views = self.views
    if networks:
      views = tuple(dataclasses.replace(view, network=_with_room(view.network)) for view in views)
    return PaddedShape(_with_room(self.result), views, padded=views != self.views)

  def _as_vector(self) -> list[int]:
    return [*self.result, *(side for v in self.views for side in (*v.network, *v.windows))]

  @classmethod
  def _from_vector(cls, vector: Sequence[int]) -> Self:
    result, views = vector[:2], np.reshape(vector[2:], (-1, 4)).tolist()
    return cls(
      (int(result[0]), int(result[1])),
      tuple(ViewShape((h, w), (rows, columns)) for h, w, rows, columns in views),
    )


def _with_room(size: Size) -> Size:
  height, width = (
    -(-side // step) * step for side, step in zip(size, map(_step, size), strict=True)
  )
  return height, width


def _step(side: int) -> int:
  """The largest power of two in an eighth of `side`, at least 64."""
  return max(1 << (side // 8).bit_length() >> 1, 64)


def shapes_for(
  sizes: Iterable[Size], protocol: EvalProtocol, *, most: int
) -> dict[Size, PaddedShape]:
  """Chooses a few padded shapes that add few pixels.

  Greedy: starting from the shapes of the images, the two whose common shape adds the fewest pixels
  are merged until few enough are left.

  Args:
    sizes: (height, width) of each image.
    protocol: How they are tested.
    most: Maximum number of shapes.

  Returns:
    The shape for each size, with at most `2 * most` different shapes of network inputs. Images of
    one size are not padded.
  """
  counts = collections.Counter(sizes)
  exact = {size: PaddedShape.from_image(size, protocol) for size in counts}
  return _merged_shapes(exact, counts, exact, most=most)


def shapes_with_room(
  sizes: Iterable[Size], protocol: EvalProtocol, *, platform: Platform
) -> dict[Size, PaddedShape]:
  """Chooses padded shapes as `PaddedShape.with_room` does, fewer where that saves time.

  Shapes are merged while compiling another program takes longer than computing what the merged one
  adds. They have sides that other images share: programs are found in the compilation cache.

  Args:
    sizes: (height, width) of each image.
    protocol: How they are tested.
    platform: The platform that compiles and computes.

  Returns:
    The shape for each size, at most four different ones.
  """
  counts = collections.Counter(sizes)
  exact = {size: PaddedShape.from_image(size, protocol) for size in counts}
  is_whole = protocol.window_crop is None
  roomy = {size: shape.with_room(networks=is_whole) for size, shape in exact.items()}
  worth = _PIXELS_OF_COMPILATION[platform]
  return _merged_shapes(roomy, counts, exact, most=_MOST_WITH_ROOM, worth=worth)


def _merged_shapes(
  shape_of: dict[Size, PaddedShape],
  counts: Mapping[Size, int],
  exact: Mapping[Size, PaddedShape],
  *,
  most: int,
  worth: float = 0,
) -> dict[Size, PaddedShape]:
  """Merges shapes until `most` are left, and further ones that add less than `worth` pixels."""
  multiple = 8
  while len(set(shape_of.values())) > max(most, _MOST_CANDIDATES):
    shape_of = {size: shape.rounded_up(multiple) for size, shape in exact.items()}
    multiple *= 2
  candidates = list(dict.fromkeys(shape_of.values()))
  place = {shape: index for index, shape in enumerate(candidates)}
  number = np.zeros(len(candidates))
  for size, shape in shape_of.items():
    number[place[shape]] += counts[size]
  vectors, group_of = _merge(
    np.array([c._as_vector() for c in candidates]), number, most=most, cost=_cost, worth=worth
  )
  number = np.bincount(group_of, weights=number)
  merged = _sharing_networks(
    [PaddedShape._from_vector(vector) for vector in vectors.tolist()], number, most=2 * most
  )
  chosen = {size: merged[group_of[place[shape]]] for size, shape in shape_of.items()}
  padded = {shape for size, shape in chosen.items() if exact[size].views != shape.views}
  return {
    size: dataclasses.replace(shape, padded=shape in padded) for size, shape in chosen.items()
  }


def _sharing_networks(
  shapes: list[PaddedShape], number: np.ndarray, *, most: int
) -> list[PaddedShape]:
  """Merges the network inputs of all shapes and views until there are few."""
  uses = [
    (view.network, n) for shape, n in zip(shapes, number, strict=True) for view in shape.views
  ]
  networks = list(dict.fromkeys(network for network, _ in uses))
  weights = [sum(n for used, n in uses if used == network) for network in networks]
  merged, group_of = _merge(
    np.array(networks), np.array(weights), most=most, cost=lambda sides: sides.prod(axis=-1)
  )
  common = {
    network: (int(merged[group][0]), int(merged[group][1]))
    for network, group in zip(networks, group_of, strict=True)
  }
  return [
    dataclasses.replace(
      shape,
      views=tuple(dataclasses.replace(v, network=common[v.network]) for v in shape.views),
    )
    for shape in shapes
  ]


def _merge(
  vectors: np.ndarray,
  number: np.ndarray,
  *,
  most: int,
  cost: Callable[[np.ndarray], np.ndarray],
  worth: float = 0,
) -> tuple[np.ndarray, list[int]]:
  """Merges vectors with multiplicities until there are few; returns them and each one's group.

  Merges also beyond `most`, those that add less than `worth` to the cost.
  """
  vectors, number = vectors.copy(), number.astype(np.float64)
  members = [[index] for index in range(len(vectors))]
  alive = np.ones(len(vectors), bool)
  dearer = np.full((len(vectors), len(vectors)), np.inf)

  def update(index: int) -> None:
    together = cost(np.maximum(vectors, vectors[index]))
    added = number * (together - cost(vectors)) + number[index] * (together - cost(vectors[index]))
    added = np.where(alive, added, np.inf)
    added[index] = np.inf
    dearer[index], dearer[:, index] = added, added

  for index in range(len(vectors)):
    update(index)
  while alive.sum() > most or dearer.min(initial=np.inf) < worth:
    kept, gone = divmod(int(np.argmin(dearer)), len(vectors))
    vectors[kept] = np.maximum(vectors[kept], vectors[gone])
    number[kept] += number[gone]
    members[kept] += members[gone]
    alive[gone] = False
    dearer[gone], dearer[:, gone] = np.inf, np.inf
    update(kept)
  left = np.flatnonzero(alive).tolist()
  group_of = {member: group for group, index in enumerate(left) for member in members[index]}
  return vectors[left], [group_of[index] for index in range(len(vectors))]


def _cost(vectors: np.ndarray) -> np.ndarray:
  """Pixels that go through the network, plus a share of those of the label map."""
  views = vectors[..., 2:].reshape(*vectors.shape[:-1], -1, 4).astype(np.float64)
  return views.prod(axis=-1).sum(axis=-1) + _RESULT_COST * vectors[..., :2].prod(axis=-1)
