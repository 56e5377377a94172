"""Models in other engines: ONNX files, ONNX Runtime and OpenVINO."""
