"""Reading checkpoints: Hugging Face directories, GGUF files and named assets."""
