"""Turns requests into tokens and tokens into text: templates, tokenizer, stop strings, tools, API keys.

No sockets and no torch.
"""
