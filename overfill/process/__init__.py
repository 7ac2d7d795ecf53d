"""What a process has from its machine: cache folder, installed extras, compiled libraries, start and end."""
