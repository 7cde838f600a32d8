"""What experiments, benchmarks and tests share: logs of JSON lines, documents made from them, and command lines of one shape."""
