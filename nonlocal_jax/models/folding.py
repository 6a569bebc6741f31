"""Batch normalisations as part of the convolutions before them, for networks that only predict."""

from flax import nnx


def fold_batch_norms(graphdef: nnx.GraphDef, state: nnx.State) -> nnx.State:
  """Moves each batch normalisation into its convolution.

  With running statistics a normalisation is a factor and an offset for each channel. The factors
  go into the kernels, the offsets are what is left of the normalisations.

  Args:
    graphdef: Static part of a network, or of any module that holds some of those that tell what is
      `NORMALIZED` in them: `ConvNorm`, `Bottleneck`, `NonLocalBlock`.
    state: Its parameters and running statistics.

  Returns:
    The same names and shapes, for a network whose `Execution.batch_norm` is 'folded'. May be
    traced, as by `jax.jit`.
  """
  model = nnx.merge(graphdef, state, copy=True)
  for _, module in nnx.iter_modules(model):
    for conv_name, norm_name in getattr(module, 'NORMALIZED', ()):
      conv, norm = getattr(module, conv_name), getattr(module, norm_name)
      if norm is not None:
        conv.kernel[...] = conv.kernel[...] * norm.fold()
  return nnx.state(model)
