"""From a model file to tensors in memory: reading GGUF and safetensors, the disk cache, the table of known models."""
