"""Networks as files that run elsewhere: ONNX, JAX programs, safetensors, a page for browsers."""
