//! One rank of an elastic training.
//!
//! - [`rank`] is the rank's life: it talks to the coordinator ([`coordinator`]), gets model and data
//!   within reach ([`prepare`]), and runs one [`generation`] after another;
//! - a generation loads its state ([`checkpoint`]), connects to its peers ([`collective`]) and runs
//!   steps ([`step`]);
//! - whatever decides the weights is a pure function of the job and the step: micro-batches
//!   ([`batch`]), the order of additions ([`tree`]), what state is where ([`blocks`]), the update
//!   ([`optimizer`], [`schedule`]). So the weights are bit-identical for every number of ranks.

pub mod batch;
pub mod blocks;
pub mod checkpoint;
pub mod cli;
pub mod collective;
pub mod coordinator;
pub mod generation;
pub mod http;
pub mod local;
pub mod metrics;
pub mod numerics;
pub mod optimizer;
pub mod prepare;
pub mod rank;
pub mod result;
pub mod schedule;
pub mod state;
pub mod step;
pub mod tree;
