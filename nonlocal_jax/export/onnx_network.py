"""Writes a network as an ONNX graph, from the names of the released checkpoints."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nonlocal_jax.export.interface import BLUE_FIRST, Interface
from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.weights.description import ModelDescription

# Of 2022: ONNX Runtime reads them from 1.13 on, in browsers as well.
_OPSET = 17
_IR_VERSION = 8

Arrays = Mapping[str, np.ndarray]


def onnx_model(
  description: ModelDescription, arrays: Arrays, interface: Interface, *, with_logits: bool = False
) -> onnx.ModelProto:
  """Builds the ONNX model of a network.

  Args:
    description: What the network is; goes into the model's metadata.
    arrays: Its parameters and running statistics, see `state_dict.to_state_dict`.
    interface: What the model takes and returns.
    with_logits: Whether logits at the size of the image are another output, to check the model.

  Returns:
    A model with the input 'images' and the outputs 'classes' and, if it has them, 'confidence' and
    'logits', (n, classes, height, width) float32.
  """
  graph = _Graph(arrays, interface.config)
  x = _preprocessed(graph, interface)
  x = _head(graph, _backbone(graph, x, interface.config), interface)
  outputs = _pixels(graph, x, interface, with_logits=with_logits)
  batch = 'n' if interface.batch is None else interface.batch
  shape = (batch, *interface.size)
  shapes = {
    'classes': (TensorProto.UINT8, shape),
    'confidence': (TensorProto.FLOAT, shape),
    'logits': (TensorProto.FLOAT, (batch, interface.config.num_classes, *interface.size)),
  }
  images = helper.make_tensor_value_info(
    'images', TensorProto.UINT8, (*shape, interface.config.in_channels)
  )
  model = helper.make_model(
    helper.make_graph(
      graph.nodes,
      'NonLocalNet',
      [images],
      [helper.make_tensor_value_info(name, *shapes[name]) for name in outputs],
      graph.initializers,
      doc_string=interface.takes(),
    ),
    opset_imports=[helper.make_opsetid('', _OPSET)],
    ir_version=_IR_VERSION,
    producer_name='nonlocal_jax',
  )
  helper.set_model_props(
    model,
    {
      'classes': json.dumps(description.classes),
      'palette': json.dumps(description.palette),
      'inside': interface.inside(),
      'not inside': interface.not_inside(),
      'description': description.to_json(),
    },
  )
  return model


class _Graph:
  """Nodes and constants of a graph that is written from its input to its outputs."""

  def __init__(self, arrays: Arrays, config: NonLocalNetConfig):
    self.arrays = arrays
    self.epsilon = config.batch_norm_epsilon
    self.nodes: list[onnx.NodeProto] = []
    self.initializers: list[onnx.TensorProto] = []

  def add(
    self, kind: str, *inputs: str, name: str = '', outputs: int = 1, **attributes: Any
  ) -> Any:
    """Adds a node; returns the name of its output, or a list of several."""
    name = name or f'{kind}_{len(self.nodes)}'
    names = [name] if outputs == 1 else [f'{name}.{index}' for index in range(outputs)]
    self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
    return name if outputs == 1 else names

  def constant(self, array: np.ndarray, name: str = '') -> str:
    """Adds a constant; returns its name."""
    name = name or f'constant_{len(self.initializers)}'
    self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return name

  def conv(
    self,
    x: str,
    name: str,
    *,
    norm: str = '',
    relu: bool = False,
    stride: int = 1,
    dilation: int = 1,
    factor: float = 1.0,
  ) -> str:
    """Adds a convolution of the checkpoint.

    Args:
      x: (n, channels, h, w).
      name: Of its kernel and bias, without '.weight' and '.bias'.
      norm: Name of the batch normalization that follows, and is made part of it; '' for none.
      relu: Whether a ReLU follows.
      stride: See `models.layers.conv`.
      dilation: See `models.layers.conv`.
      factor: Multiplies the result.
    """
    kernel = self.arrays[f'{name}.weight'].astype(np.float64)
    bias = self.arrays.get(f'{name}.bias', np.zeros(len(kernel))).astype(np.float64)
    if norm:
      scale, offset, mean, var = (
        self.arrays[f'{norm}.{leaf}'].astype(np.float64)
        for leaf in ('weight', 'bias', 'running_mean', 'running_var')
      )
      scale = scale / np.sqrt(var + self.epsilon)
      kernel, bias = kernel * scale[:, None, None, None], (bias - mean) * scale + offset
    return self.conv_of(
      x, name, factor * kernel, factor * bias, relu=relu, stride=stride, dilation=dilation
    )

  def conv_of(
    self,
    x: str,
    name: str,
    kernel: np.ndarray,
    bias: np.ndarray,
    *,
    relu: bool = False,
    stride: int = 1,
    dilation: int = 1,
  ) -> str:
    """Adds a convolution with the padding of the released checkpoints."""
    side = kernel.shape[2]
    x = self.add(
      'Conv',
      x,
      self.constant(kernel.astype(np.float32), f'{name}.weight'),
      self.constant(bias.astype(np.float32), f'{name}.bias'),
      name=name,
      kernel_shape=(side, side),
      pads=(dilation * (side // 2),) * 4,
      strides=(stride, stride),
      dilations=(dilation, dilation),
    )
    return self.add('Relu', x) if relu else x


def _preprocessed(graph: _Graph, interface: Interface) -> str:
  """Images (n, h, w, channels) uint8 -> the network's input (n, channels, h, w) float32."""
  protocol, x = interface.protocol, 'images'
  if protocol.channel_order == 'bgr':
    x = graph.add('Gather', x, graph.constant(np.array(BLUE_FIRST, np.int64)), axis=3)
  x = graph.add('Cast', x, to=TensorProto.FLOAT)
  x = graph.add('Sub', x, graph.constant(np.array(protocol.mean, np.float32)))
  x = graph.add('Mul', x, graph.constant((1 / np.asarray(protocol.std)).astype(np.float32)))
  x = graph.add('Transpose', x, perm=(0, 3, 1, 2))
  if interface.network != interface.size:
    after = [padded - side for padded, side in zip(interface.network, interface.size, strict=True)]
    x = graph.add('Pad', x, graph.constant(np.array([0, 0, 0, 0, 0, 0, *after], np.int64)))
  return x


def _backbone(graph: _Graph, x: str, config: NonLocalNetConfig) -> str:
  """The network's input (n, channels, h, w) -> features of the last stage."""
  for index, stride in ((0, 2), (3, 1), (6, 1)):
    name, norm = f'backbone.stem.{index}', f'backbone.stem.{index + 1}'
    x = graph.conv(x, name, norm=norm, relu=True, stride=stride)
  x = graph.add('MaxPool', x, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
  for stage, count in enumerate(config.stage_blocks):
    dilation = config.stage_dilations[stage]
    for index in range(count):
      is_first = index == 0
      x = _bottleneck(
        graph,
        x,
        f'backbone.layer{stage + 1}.{index}',
        stride=config.stage_strides[stage] if is_first else 1,
        dilation=max(dilation // 2, 1) if is_first and config.contract_dilation else dilation,
      )
  return x


def _bottleneck(graph: _Graph, x: str, name: str, *, stride: int, dilation: int) -> str:
  shortcut = x
  if f'{name}.downsample.0.weight' in graph.arrays:
    norm = f'{name}.downsample.1'
    shortcut = graph.conv(x, f'{name}.downsample.0', norm=norm, stride=stride)
  x = graph.conv(x, f'{name}.conv1', norm=f'{name}.bn1', relu=True)
  x = graph.conv(
    x, f'{name}.conv2', norm=f'{name}.bn2', relu=True, stride=stride, dilation=dilation
  )
  x = graph.conv(x, f'{name}.conv3', norm=f'{name}.bn3')
  return graph.add('Relu', graph.add('Add', x, shortcut))


def _head(graph: _Graph, features: str, interface: Interface) -> str:
  """Features of the last stage -> logits (n, classes, rows, columns)."""

  def conv_norm(x: str, name: str) -> str:
    return graph.conv(x, f'{name}.conv', norm=f'{name}.bn', relu=True)

  x = conv_norm(features, 'decode_head.convs.0')
  if interface.config.non_local:
    x = _non_local_block(graph, x, 'decode_head.nl_block', interface)
  x = conv_norm(x, 'decode_head.convs.1')
  x = conv_norm(graph.add('Concat', features, x, axis=1), 'decode_head.conv_cat')
  return graph.conv(x, 'decode_head.conv_seg')


def _non_local_block(graph: _Graph, x: str, name: str, interface: Interface) -> str:
  """Applies `NonLocalBlock` to x (n, channels, rows, columns), in blocks of queries."""
  config, (rows, columns) = interface.config, interface.features
  positions = rows * columns

  def embedded(layer: str, factor: float = 1.0) -> str:
    return flat(graph.conv(x, f'{name}.{layer}.conv', factor=factor))

  def flat(y: str) -> str:  # (n, c, rows, columns) -> (n, c, positions)
    return graph.add('Reshape', y, graph.constant(np.array([0, 0, -1], np.int64)))

  def transposed(y: str) -> str:
    return graph.add('Transpose', y, perm=(0, 2, 1))

  values = transposed(embedded('g'))  # (n, positions, inner)
  if config.mode == 'dot_product':
    # (theta phi^T) g = theta (phi^T g), which needs no pairwise matrix.
    joined = graph.add('MatMul', embedded('phi', 1 / positions), values)
    y = graph.add('MatMul', transposed(embedded('theta')), joined)
  elif config.mode == 'concatenation':
    kernel = graph.arrays[f'{name}.concat_project.conv.weight'][0, :, 0, 0].astype(np.float64)
    queries, keys = (
      flat(_projected(graph, x, f'{name}.{layer}', part))
      for layer, part in zip(('theta', 'phi'), np.split(kernel, 2), strict=True)
    )
    shares = graph.add('Mul', values, graph.constant(np.array(1 / positions, np.float32)))

    def from_concatenation(block: str) -> str:
      return graph.add('MatMul', graph.add('Relu', graph.add('Add', block, keys)), shares)

    y = _in_blocks(graph, transposed(queries), from_concatenation, interface)
  else:
    if config.mode == 'gaussian':
      queries, keys = transposed(flat(x)), flat(x)
    else:
      scale = config.inner_channels**-0.5 if config.use_scale else 1.0
      queries, keys = transposed(embedded('theta', scale)), embedded('phi')

    def from_softmax(block: str) -> str:
      weights = graph.add('Softmax', graph.add('MatMul', block, keys), axis=2)
      return graph.add('MatMul', weights, values)

    y = _in_blocks(graph, queries, from_softmax, interface)
  shape = graph.constant(np.array([0, 0, rows, columns], np.int64))
  y = graph.add('Reshape', transposed(y), shape)
  return graph.add('Add', x, graph.conv(y, f'{name}.conv_out.conv', norm=f'{name}.conv_out.bn'))


def _projected(graph: _Graph, x: str, name: str, weights: np.ndarray) -> str:
  """Multiplies the channels of an embedding by weights and adds them up, in one convolution."""
  kernel = graph.arrays[f'{name}.conv.weight'].astype(np.float64)
  bias = graph.arrays[f'{name}.conv.bias'].astype(np.float64)
  kernel = np.tensordot(weights, kernel, axes=1)[None]
  return graph.conv_of(x, f'{name}.projected', kernel, np.array([weights @ bias]))


def _in_blocks(
  graph: _Graph, queries: str, function: Callable[[str], str], interface: Interface
) -> str:
  """Applies a function to blocks of queries (n, positions, c), so that memory stays bounded."""
  rows, columns = interface.features
  positions = np.arange(rows * columns)
  count = -(-len(positions) // interface.queries_at_once)
  if count == 1:
    return function(queries)
  lengths = np.array([len(block) for block in np.array_split(positions, count)])
  blocks = graph.add('Split', queries, graph.constant(lengths), outputs=count, axis=1)
  return graph.add('Concat', *map(function, blocks), axis=1)


def _pixels(graph: _Graph, logits: str, interface: Interface, *, with_logits: bool) -> list[str]:
  """Logits (n, classes, rows, columns) -> the names of the outputs, computed a few rows at a time.

  Upsampling is a product with one matrix per axis, which means the same to every runtime; Resize
  does not.
  """
  rows, columns = interface.upsampling
  wide = graph.add('MatMul', logits, graph.constant(columns.T))
  count = -(-len(rows) // interface.rows_at_once)
  parts: dict[str, list[str]] = {'classes': []}
  if interface.confidence:
    parts['confidence'] = []
  if with_logits:
    parts['logits'] = []
  for some_rows in np.array_split(rows, count):
    scores = graph.add('MatMul', graph.constant(some_rows), wide)  # (n, classes, some, width)
    classes = graph.add('ArgMax', scores, axis=1, keepdims=0)
    parts['classes'].append(graph.add('Cast', classes, to=TensorProto.UINT8))
    if interface.confidence:
      parts['confidence'].append(_confidence(graph, scores))
    if with_logits:
      parts['logits'].append(scores)
  for name, pieces in parts.items():
    axis = 2 if name == 'logits' else 1
    graph.add('Concat', *pieces, name=name, axis=axis)
  return list(parts)


def _confidence(graph: _Graph, scores: str) -> str:
  """Scores (n, classes, h, w) -> the largest probability (n, h, w)."""
  largest = graph.add('ReduceMax', scores, axes=(1,))
  exponentials = graph.add('Exp', graph.add('Sub', scores, largest))
  axes = graph.constant(np.array([1], np.int64))
  return graph.add('Reciprocal', graph.add('ReduceSum', exponentials, axes, keepdims=0))
