//! Finding, measuring and embedding faces with ONNX models.
