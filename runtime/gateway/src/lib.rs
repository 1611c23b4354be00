//! The OpenAI-compatible front of many models, resuming streams across workers.
//!
//! A request becomes choices ([`choice`]); each is driven ([`drive`]) to its end over as many workers
//! as it takes; workers attach by themselves ([`workers`]), and one of the policies in [`routing`]
//! picks among them. [`api`] speaks HTTP, [`report`] tells the operator what is asked.

pub mod api;
pub mod choice;
pub mod config;
pub mod drive;
pub mod gateway;
pub mod loads;
pub mod metrics;
pub mod report;
pub mod routing;
pub mod workers;
