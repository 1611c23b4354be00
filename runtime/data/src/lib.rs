//! Conversations in, token ids and loss masks out.
//!
//! The path of the data: [`conversation`] reads and cleans, [`identity`] adds who the model is,
//! [`template`] turns each conversation into ids and labels, [`order`] decides which sequence is in
//! which step. Everything is a pure function of its input, so that every rank computes the same.

pub mod conversation;
pub mod identity;
pub mod order;
pub mod template;

pub use conversation::{Conversation, LoadError, Report, Role, Turn, load_conversations};
pub use order::{Cursor, Length, Mixture, Order};
pub use template::{Encoder, Example, Template, TemplateError};
