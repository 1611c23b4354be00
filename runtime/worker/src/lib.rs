//! An inference worker: continuous batching over a key-value cache
