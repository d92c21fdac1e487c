"""One Triton kernel and its launcher per op; imported only when an op first needs it."""
