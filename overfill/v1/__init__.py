"""Messages and stubs generated from ``proto/overfill/v1``; never edited by hand."""
