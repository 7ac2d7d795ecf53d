"""Other engines that are measured beside ours: transformers, a plain two-stage loop, OpenVINO GenAI and vLLM.

The first two run in this process (``hf_baseline``). The others run as processes in environments of their own:
``environment`` installs them, ``process`` starts ``subprocess_peer`` there, ``vllm_server`` starts vLLM's server.
"""
