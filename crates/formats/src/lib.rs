//! Files from outside: GGUF, safetensors, Hugging Face folders, JSONL.
