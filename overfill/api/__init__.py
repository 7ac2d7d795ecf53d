"""Text to tokens and back, for the router: tokenizer, detokenizer, stop strings, request checks. No torch."""
