"""The network: dilated ResNet, non-local head, auxiliary FCN head, and the non-local block on its own."""
