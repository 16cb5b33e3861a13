"""ONNX models become Programs: read and checked, run node by node in torch, and traced by torch.export."""

from .capture import capture_onnx

__all__ = ["capture_onnx"]
