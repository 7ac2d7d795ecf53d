"""One description of a stack, and the two runners that start it: plain processes, and Ray Serve."""
