//! An inference worker: it loads models from the object store, dials every gateway, and runs their
//! requests in one continuous batch a model over a paged key-value cache.
//!
//! One thread, the [`scheduler`], owns the engine, the cache and all sequences of a model; everything
//! else talks to it through one bounded queue. What a token is and what text it makes are pure functions of
//! the request and its tokens so far, so that a stream continues on another worker.

mod attach;
mod blocks;
mod completion;
mod detokenize;
mod embedding;
mod grammar;
mod health;
mod http;
mod logprobs;
mod metrics;
mod model;
mod models;
mod on_request;
mod options;
mod prompt;
mod run;
mod sampling;
mod scheduler;
mod scratch;
mod stop;
mod transcripts;

pub use options::Options;
pub use run::run;
