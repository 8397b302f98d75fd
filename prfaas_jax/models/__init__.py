"""Configuration, the Flax transformer, and the ways in and out of it: Hugging Face, GGUF, Orbax."""
