//! The OpenAI-compatible front of many models, resuming streams across workers.
//!
//! A request becomes choices ([`choice`]); each is driven ([`drive`]) to its end over as many workers
//! as it takes; workers attach by themselves ([`workers`]), and one of the policies in [`routing`]
//! picks among them. [`api`] speaks HTTP over the listeners of [`serve`] with those whom [`keys`] lets
//! in, [`parked`] keeps streams for clients that come back, [`memory`] bounds what all requests hold, [`report`] tells the operator what is asked,
//! [`arena`] has people compare two models.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod api;
pub mod arena;
pub mod choice;
pub mod config;
pub mod drive;
pub mod gateway;
pub mod keys;
pub mod loads;
pub mod memory;
pub mod metrics;
pub mod parked;
pub mod report;
pub mod routing;
pub mod serve;
pub mod workers;
