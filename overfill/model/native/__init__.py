"""The same forward pass in C++, for bfloat16 and int8 models on CPUs with AVX-512."""
