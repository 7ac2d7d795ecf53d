"""The process and its machine: cache folder, installed extras, compiled libraries, memory, start and exit."""
