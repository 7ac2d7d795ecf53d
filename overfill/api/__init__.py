"""The router's text side: tokenizer, detokenizer, chats, stop strings, request checks, API keys. No torch."""
