"""Other engines as peers: plain transformers here, OpenVINO and vLLM in environments of their own."""
