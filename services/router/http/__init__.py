"""The router's HTTP side: the APIs of OpenAI and Anthropic, status, metrics and the chat page."""
