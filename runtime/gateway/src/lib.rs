//! The OpenAI-compatible front of many models, resuming streams across workers
