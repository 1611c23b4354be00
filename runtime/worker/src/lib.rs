//! An inference worker: it loads one model from the object store, dials every gateway, and runs
//! their requests in one continuous batch over a key-value cache.
//!
//! One thread, the [`scheduler`], owns the engine and all running sequences; everything else talks
//! to it through one bounded queue. What a token is and what text it makes are pure functions of
//! the request and its tokens so far, so that a stream continues on another worker.

mod attach;
mod completion;
mod detokenize;
mod health;
mod http;
mod metrics;
mod model;
mod options;
mod prompt;
mod run;
mod sampling;
mod scheduler;
mod stop;

pub use options::Options;
pub use run::run;
