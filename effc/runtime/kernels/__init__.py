"""Native kernels, each in a folder with what builds and calls it; XLA does the same work without them."""
