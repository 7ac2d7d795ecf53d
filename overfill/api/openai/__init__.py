"""Requests and answers of the OpenAI API as JSON, to and from the wire's messages.

No sockets, no tokens and no torch.
"""
