//! LLaMA and its relatives in tch: weights in and out, and the forward passes of training and inference.
//!
//! A model is a [`Config`] and a map from Hugging Face's tensor names to fp32 tensors. Training
//! runs layer by layer with the free functions of [`layers`] and [`gradients`]; inference holds the
//! weights and the key-value cache in an [`inference::Engine`].
//!
//! Shapes and names are checked when a checkpoint is read. The forward functions rely on it: what
//! can still fail inside them is running out of memory, and then they panic as `tch` does.

mod autograd;
pub mod config;
pub mod cuda;
pub mod device;
mod digest;
mod error;
mod forward;
pub mod frozen;
pub mod gguf;
pub mod gradients;
mod hugging_face;
pub mod inference;
pub mod layers;
pub mod lora;
mod on_disk;
pub mod parameters;
mod pretrained;
pub mod rope;
mod special_tokens;
pub mod tiny;
mod weights_file;

pub use config::{Config, Family};
pub use digest::{WeightsHasher, weights_digest};
pub use error::ModelError;
pub use forward::logits;
pub use hugging_face::{save, save_one_by_one, save_tokenizer};
pub use on_disk::OnDisk;
pub use parameters::{layer_parameter_names, parameter_names, parameter_shape};
pub use pretrained::{Pretrained, load, load_adapted, load_config};
pub use rope::{RopeScaling, Stretch};
pub use special_tokens::SpecialTokens;
pub use weights_file::WeightsWriter;
