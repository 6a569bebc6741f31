"""Folds batch normalization into the preceding convolutions, for networks that only predict."""

from flax import nnx


def fold_batch_norms(graphdef: nnx.GraphDef, state: nnx.State) -> nnx.State:
  """Multiplies the scales of batch normalizations into the kernels before them.

  With running statistics, batch normalization multiplies each channel by a factor and adds an
  offset. The factors are multiplied into the kernels; the offsets stay as biases. Works under
  `jax.jit`.

  Args:
    graphdef: Static part of a network, or of any module with submodules that have a `NORMALIZED`
      attribute: `ConvNorm`, `Bottleneck`, `NonLocalBlock`.
    state: Parameters and running statistics of the module.

  Returns:
    A state with the same names and shapes, for a network whose `Execution.batch_norm` is 'folded'.
  """
  model = nnx.merge(graphdef, state, copy=True)
  for _, module in nnx.iter_modules(model):
    for conv_name, norm_name in getattr(module, 'NORMALIZED', ()):
      conv, norm = getattr(module, conv_name), getattr(module, norm_name)
      if norm is not None:
        conv.kernel[...] = conv.kernel[...] * norm.fold()
  return nnx.state(model)
