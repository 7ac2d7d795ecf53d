"""Requests and responses of OpenAI's Responses API, to and from the router's messages.

No sockets, no tokens and no torch.
"""
