"""One readable file per model, cluster, link and study; each offers `get_config()`."""
