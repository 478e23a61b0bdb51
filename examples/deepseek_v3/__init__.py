"""A small DeepSeek-V3 over moecomm: data, model, training, long context, serving."""
