"""The full-size model on one GPU: checks, times, floors and a peer, by one command; see `__main__`."""
