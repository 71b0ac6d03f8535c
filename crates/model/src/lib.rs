//! The Llama family, forward and backward, with LoRA and a KV cache.
