"""Real pipelines: the classes behind the tables, loading. The only part that imports torch and diffusers."""
