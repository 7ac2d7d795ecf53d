"""gRPC as this system uses it: channels, TLS, access control, membership, errors as status codes.

No torch.
"""
