"""Requests and answers of Anthropic's Messages API as JSON, to and from the wire's messages."""
