"""Copies and checksums of KV in C++, for CPUs with AVX2."""
