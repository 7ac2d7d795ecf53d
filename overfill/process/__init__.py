"""The process and its machine: cache folder, installed extras, compiled libraries, start and exit."""
