"""The router's HTTP side: the OpenAI API, status, metrics and the chat page."""
