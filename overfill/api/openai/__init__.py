"""The OpenAI API's requests and answers as JSON, to and from our own messages. No sockets, no tokens, no torch."""
