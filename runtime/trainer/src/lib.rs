//! One rank of an elastic training.
//!
//! - [`rank`] is the rank's life: it talks to the coordinator ([`coordinator`]), gets model and data
//!   within reach ([`prepare`]), and runs one [`generation`] after another;
//! - a generation loads its state ([`checkpoint`]), connects to its peers ([`collective`]) and runs
//!   steps ([`step`]);
//! - whatever decides the weights is a pure function of the job and the step: micro-batches
//!   ([`batch`]), the order of additions ([`tree`]), how the state is cut ([`blocks`]), the update
//!   ([`optimizer`], [`schedule`]). So the weights are bit-identical for every number of ranks;
//! - on what is held out of the data the loss is computed in between ([`evaluation`]);
//! - what became of each step is in the bucket ([`log`]), and with the result its [`card`];
//! - who holds which block ([`layout`]) and runs which micro-batch ([`pace`]) is free, and follows what
//!   is where and who is fast; between generations state goes from memory to memory ([`transfer`]).

pub mod adapters;
pub mod batch;
pub mod blocks;
pub mod card;
pub mod checkpoint;
pub mod cli;
pub mod collective;
pub mod coordinator;
pub mod evaluation;
pub mod export;
pub mod generation;
pub mod heap;
pub mod http;
pub mod inputs;
pub mod interval;
pub mod layout;
pub mod local;
pub mod log;
pub mod memory;
pub mod metrics;
pub mod numerics;
pub mod optimizer;
pub mod pace;
pub mod parallel;
pub mod prepare;
pub mod rank;
pub mod result;
pub mod schedule;
pub mod state;
pub mod step;
pub mod transfer;
pub mod tree;
