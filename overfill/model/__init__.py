"""The forward pass of Llama-family models over a paged KV cache, and sampling, in torch."""
