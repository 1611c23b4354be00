//! The API group `vicuna.dev`: what users write and what the operator answers.
//!
//! Fields have the names and meanings that users know from Kubeflow, HPA v2 and metav1. A field
//! that does nothing is not here. Everything in a status is defaulted or optional, so that a partial
//! server-side apply of it is valid.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod definition;
pub mod interval;
pub mod period;
pub mod pool;
mod schema;
pub mod serving;
pub mod source;
pub mod training;

pub use interval::Interval;
pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
pub use period::Period;
pub use pool::{Capacity, Pool};
pub use serving::{VicunaServing, VicunaServingSpec, VicunaServingStatus, WeightsCache};
pub use source::{SecretReference, Template};
pub use training::{VicunaTraining, VicunaTrainingSpec, VicunaTrainingStatus};

/// The API group of all our types.
pub const GROUP: &str = "vicuna.dev";
/// The version of all our types.
pub const VERSION: &str = "v1alpha1";
