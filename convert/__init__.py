"""`python -m convert HF_DIR BUNDLE`: an official checkpoint becomes a bundle that `runtime` runs."""
