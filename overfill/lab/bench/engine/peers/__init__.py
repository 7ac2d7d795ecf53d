"""Other engines as peers: plain transformers here, OpenVINO and vLLM in environments of their own.

``hf_baseline`` runs transformers in this process. The others are processes in environments of their own:
``environment`` installs them, ``process`` starts ``subprocess_peer`` there, ``vllm_server`` starts vLLM's server.
"""
